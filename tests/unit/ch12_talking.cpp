// Chapter 12: from logits to tokens to an answer.
#include "unit.h"

// -- 12.1 distribution ------------------------------------------------------------------------------

static Sampling sampling(double temperature, int top_k = 0, double top_p = 1, double min_p = 0) {
    Sampling s;
    s.temperature = temperature, s.top_p = top_p, s.min_p = min_p, s.top_k = top_k;
    return s;
}
static Distribution distribution_of(const Vector& logits, const Sampling& s) {
    return distribution(logits.data(), int(logits.size()), s);
}
static std::vector<int> ids_of(Distribution d) {
    std::vector<int> ids;
    for (const Candidate& c : d) ids.push_back(c.id);
    std::sort(ids.begin(), ids.end());
    return ids;
}
static double p_of(const Distribution& d, int id) {
    for (const Candidate& c : d) if (c.id == id) return c.p;
    return 0;
}
static double total(const Distribution& d) {
    double sum = 0;
    for (const Candidate& c : d) sum += c.p;
    return sum;
}

using Ids = std::vector<int>;

// As if the distribution were laid out from 0 to 1: the token whose share `at` falls into.
TEST(Choose, IsTheCandidateAt) {
    Noise noise;
    Vector logits = noise.vector(40);
    for (const Sampling& s : {sampling(0), sampling(1), sampling(0.5, 7), sampling(1, 0, 0.8),
                              sampling(2, 9, 0.6, 0.3)}) {
        Distribution d = distribution_of(logits, s);
        double sum = 0;
        for (const Candidate& c : d) {
            Choice choice;
            choose(&choice, logits.data(), 40, s, sum + c.p / 2);
            EXPECT_EQ(choice.id, c.id);
            EXPECT_EQ(choice.candidates, int(d.size()));
            sum += c.p;
        }
    }
}
TEST(Choose, HasNoTokenWhereALogitIsNoNumber) {
    for (real bad : {std::numeric_limits<real>::quiet_NaN(), std::numeric_limits<real>::infinity()}) {
        Vector logits = {1, bad, 2};
        Choice choice{5, 5};
        choose(&choice, logits.data(), 3, sampling(1), 0.5);
        EXPECT_EQ(choice.id, -1);
    }
}

// transformers 5, RepetitionPenaltyLogitsProcessor(1.5) on these scores with input_ids [0, 1, 1, 3].
TEST(Penalise, IsThatOfTransformers) {
    Vector z = {3, -2, 4, 0, -1};
    penalise(z.data(), Ids{0, 1, 1, 3}, 1.5);
    EXPECT_EQ(z, (Vector{2, -3, 4, 0, -1}));
}
TEST(Distribution, TemperatureZeroIsTheArgmax) {
    Distribution d = distribution_of({1, 3, 2}, sampling(0));
    EXPECT_EQ(ids_of(d), Ids{1});
    EXPECT_EQ(d[0].p, 1);
}
TEST(Distribution, TiesOfTheArgmaxGoToTheLowerId) {
    EXPECT_EQ(ids_of(distribution_of({1, 3, 3}, sampling(0))), Ids{1});
}
TEST(Distribution, TemperatureZeroOverridesTheRest) {
    EXPECT_EQ(ids_of(distribution_of({1, 3, 3}, sampling(0, 2, 0.1, 0.5))), Ids{1});
}

// In units of 2^-53: 57 of exp_wide, whose series ends before r^12 / 12!, |r| <= ln(2) / 2; V additions, a
// division.
TEST(Distribution, IsASoftmaxOfLogitsOverTemperature) {
    Noise noise;
    Vector logits = noise.vector(50);
    for (real& z : logits) z *= 10;
    for (double temperature : {0.1, 0.6, 1.0, 3.0}) {
        std::vector<long double> exact = probabilities(logits.data(), 50, temperature);
        Distribution d = distribution_of(logits, sampling(temperature));
        long double range = 20 / temperature;   // the quotient's rounding moves exp by range * 2^-53
        for (const Candidate& c : d)
            EXPECT_LE(std::fabs(c.p / exact[size_t(c.id)] - 1), (110 + 4 * range) * 0x1p-53L) << temperature;
    }
}
TEST(Distribution, SumsToOne) {
    Noise noise;
    for (int round = 0; round < 300; round++) {
        Vector logits = noise.vector(size_t(1 + noise.below(200)));
        for (real& z : logits) z *= 15;
        Distribution d = distribution_of(
            logits, sampling(0.3 + noise.below(10), noise.below(30), 0.3 + 0.07 * noise.below(11),
                             0.02 * noise.below(20)));
        ASSERT_LE(std::fabs(total(d) - 1),
                  2 * double(d.size() + 1) * 0x1p-53);   // as many divisions and additions
    }
}
TEST(Distribution, TopKKeepsTheKLikeliest) {
    EXPECT_EQ(ids_of(distribution_of({1, 4, 2, 3}, sampling(1, 2))), (Ids{1, 3}));
    EXPECT_EQ(ids_of(distribution_of({1, 4, 2, 3}, sampling(1, 0))), (Ids{0, 1, 2, 3}));
    EXPECT_EQ(ids_of(distribution_of({1, 4, 2, 3}, sampling(1, 9))), (Ids{0, 1, 2, 3}));
}
TEST(Distribution, TopKTiesGoToTheLowerId) {
    EXPECT_EQ(ids_of(distribution_of({2, 2, 2, 2}, sampling(1, 3))), (Ids{0, 1, 2}));
}

// Probabilities 1/2, 1/4, 1/8, 1/8, made of logits k ln 2.
static Vector halves() {
    real ln2 = real(std::log(2.0));
    return {0, 2 * ln2, ln2, 0};
}
TEST(Distribution, TopPKeepsTheLikeliestThatHoldTheShare) {
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 0.4))), Ids{1});
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 0.6))), (Ids{1, 2}));
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 0.8))),
              (Ids{0, 1, 2}));   // of 0 and 3 the lower
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 0.9))), (Ids{0, 1, 2, 3}));
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 1e-9))), Ids{1});
}
TEST(Distribution, TopPWorksOnLongLists) {
    Vector logits(5000);   // all equal: a share of 0.3 is 1500 ids, the lowest
    Distribution d = distribution_of(logits, sampling(1, 0, 0.3));
    EXPECT_EQ(d.size(), 1500u);
    EXPECT_EQ(ids_of(d).back(), 1499);
}
TEST(Distribution, MinPKeepsWhatIsLikelyEnoughBesideTheBest) {
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 1, 0.4))), (Ids{1, 2}));
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 1, 0.2))), (Ids{0, 1, 2, 3}));
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 1, 1.0))), Ids{1});
}
// top-p 0.7 of all keeps two (1/2 + 1/4). After top-k 2 the same two are 2/3 and 1/3, and 0.6 keeps one.
TEST(Distribution, TopPComesAfterTopK) {
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 0, 0.6))), (Ids{1, 2}));
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 2, 0.6))), Ids{1});
}
// min-p relates to the best, and so does not change with what top-p left.
TEST(Distribution, MinPComesLastAndRelatesToTheBest) {
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(1, 3, 0.99, 0.4))), (Ids{1, 2}));
}
TEST(Distribution, WhatIsKeptIsRenormalised) {
    Distribution d = distribution_of(halves(), sampling(1, 2));
    EXPECT_NEAR(p_of(d, 1), 2.0 / 3, 4 * double(U));         // ln 2 is rounded to real: 2 ln 2 U and less
    EXPECT_NEAR(p_of(d, 2), 1.0 / 3, 4 * double(U));
}
TEST(Distribution, TemperatureComesBeforeTopP) {
    EXPECT_EQ(ids_of(distribution_of(halves(), sampling(0.25, 0, 0.9))), Ids{1});   // 16/17 and more
}
TEST(Distribution, RefusesLogitsThatAreNoNumbers) {
    real nan = std::numeric_limits<real>::quiet_NaN(), inf = std::numeric_limits<real>::infinity();
    for (double temperature : {0.0, 1.0}) {
        for (const Vector& z : {Vector{nan, 1, 2}, Vector{1, nan, 2}, Vector{1, 2, nan},
                                Vector{nan, nan, nan}, Vector{1, inf, 0}})
            EXPECT_TRUE(refuses([&] { distribution_of(z, sampling(temperature)); }, "no finite numbers"))
                << temperature;
    }
}

// -- 12.1 sample ------------------------------------------------------------------------------------

static std::vector<int64_t> draw(const Distribution& d, int V, int n, uint64_t seed) {
    std::vector<int64_t> counts(static_cast<size_t>(V));
    Rng rng{seed};
    for (int i = 0; i < n; i++) counts[size_t(sample(d, rng))]++;
    return counts;
}

TEST(Sample, FollowsTheDistribution) {
    Vector logits = {0, 1, 2, real(0.5), -1, real(1.5), -3, 0};
    for (double temperature : {0.5, 1.0, 2.0}) {
        auto counts = draw(distribution_of(logits, sampling(temperature)), 8, 200000, 1);
        EXPECT_LT(surprise(counts, probabilities(logits.data(), 8, temperature)), 1) << temperature;
    }
}
TEST(Sample, AWrongDistributionWouldBeSeen) {
    Vector logits = {0, 1, 2, real(0.5), -1, real(1.5), -3, 0};
    auto counts = draw(distribution_of(logits, sampling(1.03)), 8, 200000, 1);
    EXPECT_GT(surprise(counts, probabilities(logits.data(), 8, 1)), 1);
}
TEST(Sample, NeverTakesWhatHasNoChance) {
    Rng rng{1};
    for (int i = 0; i < 10000; i++) ASSERT_NE(sample({{0, 0.5}, {1, 0}, {2, 0.5}}, rng), 1);
}
TEST(Sample, SpendsNoRandomNumberOnACertainty) {
    Rng rng{1};
    EXPECT_EQ(sample({{7, 1}}, rng), 7);
    EXPECT_EQ(rng.state, 1u);
}
TEST(Sample, RepeatsWithItsSeed) {
    Distribution d = distribution_of(halves(), sampling(1));
    EXPECT_EQ(draw(d, 4, 100, 5), draw(d, 4, 100, 5));
}

// -- 12.2 generate ----------------------------------------------------------------------------------

struct Spoken {
    Ids ids;
    Statistics stats;
};
static Spoken speak(Session& s, const Ids& prompt, Generation g) {
    Spoken out;
    out.stats = generate(s, prompt, g, [](int) {}, [&](int id) { out.ids.push_back(id); return true; });
    return out;
}
static Spoken speak(const Model& model, const Ids& prompt, const Generation& g, int context = 64) {
    Session s(model, {context, 8, MlaForm::ABSORBED});
    return speak(s, prompt, g);
}
static Generation greedy(int max_tokens) {
    Generation g;
    g.sampling.temperature = 0, g.max_tokens = max_tokens;
    return g;
}

TEST(Chain, SaysItsTableToTheBit) {
    std::vector<std::vector<float>> table = {{1, 2, 3}, {-1, 0.3f, 7}, {0, 5, 2}};
    Chain chain(table);
    Vector logits = answer(chain.model, {2, 0, 1, 1}).logits;
    for (auto [t, row] : {std::pair<size_t, size_t>{0, 2}, {1, 0}, {2, 1}, {3, 1}}) {
        for (size_t v = 0; v < 3; v++) EXPECT_EQ(logits[3 * t + v], real(table[row][v]));
    }
}
TEST(Generate, FollowsTheChain) {
    EXPECT_EQ(speak(Chain(ring(7, 1)).model, {3}, greedy(6)).ids, (Ids{4, 5, 6, 0, 1, 2}));
    EXPECT_EQ(speak(Chain(ring(7, 3)).model, {5, 3}, greedy(3)).ids, (Ids{6, 2, 5}));
}
TEST(Generate, StopsAtMaxTokens) {
    for (int n : {0, 1, 5}) EXPECT_EQ(speak(Chain(ring(7, 1)).model, {3}, greedy(n)).stats.generated, n);
}
TEST(Generate, StopsBeforeAnyStopId) {
    Generation g = greedy(100);
    g.stops = {9, 6};
    EXPECT_EQ(speak(Chain(ring(7, 1)).model, {3}, g).ids, (Ids{4, 5}));
    g.stops = {4};
    EXPECT_TRUE(speak(Chain(ring(7, 1)).model, {3}, g).ids.empty());
}
TEST(Generate, DoesNotKeepTheStopId) {
    Chain chain(ring(7, 1));
    Session s(chain.model, {64, 8, MlaForm::ABSORBED});
    Generation g = greedy(100);
    g.stops = {6};
    speak(s, {3}, g);
    EXPECT_EQ(s.tokens, (Ids{3, 4, 5}));
}
TEST(Generate, EndsWithTheContext) {
    for (bool mtp : {false, true}) {
        Generation g = greedy(1000);
        g.drafting = mtp ? &MTP_DRAFTS : nullptr;
        // the last token that is said needs no place: nothing follows it
        EXPECT_EQ(speak(Chain(ring(7, 1)).model, {3, 4}, g, 10).stats.generated, 10 + 1 - 2) << mtp;
    }
}
TEST(Generate, ReportsItsProgress) {
    Chain chain(ring(7, 1));
    Session s(chain.model, {64, 8, MlaForm::ABSORBED});
    Generation g = greedy(1);
    Ids seen;
    generate(s, Ids(19, 3), g, [&](int n) { seen.push_back(n); }, [](int) { return true; });
    EXPECT_EQ(seen, (Ids{8, 8, 16, 16, 19, 19}));        // after the layer, and after the chunk
}
TEST(Generate, EndsWhenInterrupted) {
    Chain chain(ring(7, 1));
    Session s(chain.model, {64, 8, MlaForm::ABSORBED});
    Generation g = greedy(100);
    int n = 0;
    generate(s, Ids{3}, g, [](int) {}, [&](int) { interrupted = ++n == 4; return true; });
    interrupted = 0;
    EXPECT_EQ(n, 4);
}
TEST(Generate, SaysWhyItEnded) {
    Chain chain(ring(7, 1));
    Generation g = greedy(3);
    EXPECT_EQ(speak(chain.model, {3}, g).stats.stop, Stop::LENGTH);
    g.stops = {5};
    EXPECT_EQ(speak(chain.model, {3}, g).stats.stop, Stop::END);
    EXPECT_EQ(speak(chain.model, {6}, greedy(100), 10).stats.stop, Stop::CONTEXT);
    Session s(chain.model, {64, 8, MlaForm::ABSORBED});
    Generation all = greedy(100);
    EXPECT_EQ(generate(s, Ids{3}, all, [](int) {}, [](int id) { return id != 6; }).stop, Stop::TEXT);
    EXPECT_EQ(s.tokens, (Ids{3, 4, 5, 6}));
}

// What of a session must hold after whatever happened to it: the next prompt gets what a fresh one would.
static void expect_trustworthy(Session& s, const Ids& prompt) {
    ASSERT_LE(0, s.mtp_length);
    ASSERT_LE(s.mtp_length, s.length);
    ASSERT_LE(size_t(s.length), s.tokens.size());
    Generation g = greedy(5);
    g.drafting = s.model.config.n_mtp ? &MTP_DRAFTS : nullptr;
    EXPECT_EQ(speak(s, prompt, g).ids, speak(s.model, prompt, g).ids);
}
TEST(Session, IsWholeAfterAnInterruptionAnywhere) {
    Model model = random_model("interrupted", tiny_v3());
    const Ids before = random_ids(20, 31, 1), after = random_ids(20, 31, 2);
    Ids mixed = before;                                  // shares its beginning with what is in the cache
    std::copy(after.begin() + 11, after.end(), mixed.begin() + 11);
    for (bool mtp : {false, true}) {
        for (int at = 1; at < 20; at++) {                // the interruption comes at the at-th layer
            Session s(model, {64, 8, MlaForm::ABSORBED});
            Generation g = greedy(3);
            g.drafting = mtp ? &MTP_DRAFTS : nullptr;
            speak(s, before, g);
            int n = 0;
            Statistics stats = generate(s, after, g, [&](int) { interrupted = ++n >= at; },
                                        [](int) { return true; });
            EXPECT_EQ(stats.stop, n >= at ? Stop::INTERRUPTED : Stop::LENGTH);
            interrupted = 0;
            expect_trustworthy(s, at % 2 ? before : mixed);
        }
    }
}
TEST(Session, IsWholeAfterAModelThatBreaks) {
    Chain chain({{0, 9, 0}, {0, 0, 9}, {std::numeric_limits<float>::quiet_NaN(), 0, 0}});
    Session s(chain.model, {64, 8, MlaForm::ABSORBED});
    Generation g = greedy(9);
    EXPECT_THROW(speak(s, {0}, g), BrokenModel);
    EXPECT_LE(size_t(s.length), s.tokens.size());
}
TEST(Generate, FollowsTheModelsProbabilities) {
    std::vector<std::vector<float>> table = {{0, 1, 0.5f}, {1, -1, 0}, {0.2f, 0.1f, 0}};
    Chain chain(table);
    Session s(chain.model, {64, 8, MlaForm::ABSORBED});
    std::vector<int64_t> counts(9);
    std::vector<long double> p;
    auto row = [&](size_t t) {
        Vector z(table[t].begin(), table[t].end());
        return probabilities(z.data(), 3);
    };
    for (size_t a = 0; a < 3; a++) for (size_t b = 0; b < 3; b++) p.push_back(row(1)[a] * row(a)[b]);
    Generation g;
    g.sampling = sampling(1), g.max_tokens = 2;
    for (int i = 0; i < 20000; i++) {
        Ids ids;
        generate(s, Ids{1}, g, [](int) {}, [&](int id) { ids.push_back(id); return true; });
        counts[size_t(ids[0] * 3 + ids[1])]++;
    }
    EXPECT_LT(surprise(counts, p), 1);
}

// -- 12.2 the thinking budget: <think> is 5, </think> is 6, the chain counts upwards ----------------

static Generation thinking(int budget, int max_tokens = 6) {
    Generation g = greedy(max_tokens);
    g.think_begin = 5, g.think_end = 6, g.think_budget = budget;
    return g;
}

TEST(ThinkBudget, EndsAThoughtWithTheTokenItself) {
    EXPECT_EQ(speak(Chain(ring(8, 1)).model, {5}, thinking(9, 3)).ids, (Ids{6, 7, 0}));   // ends by itself
    std::vector<std::vector<float>> table = ring(8, 1);
    table[4] = std::vector<float>{9, 0, 0, 0, 0, 0, 0, 0};   // 4 -> 0, so the thought never ends
    table[5] = table[4], table[6] = std::vector<float>{0, 0, 0, 9, 0, 0, 0, 0};
    EXPECT_EQ(speak(Chain(table).model, {5}, thinking(2)).ids, (Ids{0, 1, 6, 3, 4, 0}));
    EXPECT_EQ(speak(Chain(table).model, {5}, thinking(0)).ids, (Ids{6, 3, 4, 0, 1, 2}));
    EXPECT_EQ(speak(Chain(table).model, {5}, thinking(-1)).ids, (Ids{0, 1, 2, 3, 4, 0}));
}
TEST(ThinkBudget, CountsOnlyInsideTheThought) {
    EXPECT_EQ(speak(Chain(ring(8, 1)).model, {0}, thinking(0)).ids, (Ids{1, 2, 3, 4, 5, 6}));
}
TEST(ThinkBudget, IsTheSameWithDrafts) {
    std::vector<std::vector<float>> table = ring(8, 1);
    table[4] = table[5] = std::vector<float>{9, 0, 0, 0, 0, 0, 0, 0};
    for (int budget = 0; budget < 6; budget++) {
        Generation g = thinking(budget, 20);
        Ids expected = speak(Chain(table).model, {5}, g).ids;
        g.drafting = &MTP_DRAFTS;
        EXPECT_EQ(speak(Chain(table).model, {5}, g).ids, expected) << budget;
    }
}
TEST(ThinkBudget, OverridesAStopInsideTheThought) {
    Generation g = thinking(0, 3);
    g.stops = {0};
    std::vector<std::vector<float>> table = ring(8, 1);
    table[5] = std::vector<float>{9, 0, 0, 0, 0, 0, 0, 0};
    EXPECT_EQ(speak(Chain(table).model, {5}, g).ids, (Ids{6, 7}));
}
TEST(Thought, OpensAndClosesWithItsTokens) {
    Generation g = thinking(2);
    EXPECT_FALSE(Thought(g, Ids{1, 2}).open);
    EXPECT_TRUE(Thought(g, Ids{1, 5, 2}).open);
    EXPECT_FALSE(Thought(g, Ids{1, 5, 2, 6, 3}).open);
}
TEST(Thought, DoesNotCountThePrompt) { EXPECT_EQ(Thought(thinking(2), Ids{5, 1, 2, 3}).tokens, 0); }

// -- 12.2 reuse of the cache ------------------------------------------------------------------------

static Generation tiny_greedy(bool mtp, int max_tokens = 20) {
    Generation g = greedy(max_tokens);
    g.drafting = mtp ? &MTP_DRAFTS : nullptr;
    return g;
}

// A conversation in one session says what fresh sessions say to the same prompts.
TEST(Reuse, OfTheCacheChangesNoToken) {
    for (const Keys& keys : {tiny_v3(), tiny_v2_lite(), tiny_dense("qwen2")}) {
        Model model = random_model("reuse", keys);
        for (bool mtp : {false, true}) {
            if (mtp && !model.config.n_mtp) continue;
            Session s(model, {200, 8, MlaForm::ABSORBED});
            Ids prompt = random_ids(12, 31);
            for (int turn = 0; turn < 4; turn++) {
                Spoken spoken = speak(s, prompt, tiny_greedy(mtp));
                EXPECT_EQ(spoken.ids, speak(model, prompt, tiny_greedy(false), 200).ids) << turn;
                EXPECT_GE(spoken.stats.reused, turn ? int(prompt.size()) - 10 : 0);
                prompt.insert(prompt.end(), spoken.ids.begin(), spoken.ids.end());
                for (int i = 0; i < 5; i++) prompt.push_back((turn * 7 + i * 3) % 31);
            }
        }
    }
}
TEST(Reuse, EndsWhereThePromptsDiffer) {
    Model model = random_model("reuse", tiny_v3());
    for (bool mtp : {false, true}) {
        Session s(model, {200, 8, MlaForm::ABSORBED});
        Ids first = random_ids(30, 31), second = first;
        speak(s, first, tiny_greedy(mtp));
        second[17] = (second[17] + 1) % 31;
        Spoken spoken = speak(s, second, tiny_greedy(mtp));
        EXPECT_EQ(spoken.stats.reused, mtp ? 16 : 17);
        EXPECT_EQ(spoken.ids, speak(model, second, tiny_greedy(false), 200).ids);
    }
}
TEST(Reuse, LeavesTheLastTokenOfAnEqualPrompt) {
    Model model = random_model("reuse", tiny_v3());
    Session s(model, {200, 8, MlaForm::ABSORBED});
    Ids prompt = random_ids(10, 31), expected = speak(s, prompt, tiny_greedy(false)).ids;
    Spoken again = speak(s, prompt, tiny_greedy(false));
    EXPECT_EQ(again.stats.reused, 9);
    EXPECT_EQ(again.ids, expected);
}
TEST(Reuse, OfAShorterPromptTakesItsPart) {
    Model model = random_model("reuse", tiny_v3());
    Session s(model, {200, 8, MlaForm::ABSORBED});
    Ids prompt = random_ids(30, 31);
    speak(s, prompt, tiny_greedy(true));
    prompt.resize(10);
    EXPECT_EQ(speak(s, prompt, tiny_greedy(true)).ids, speak(model, prompt, tiny_greedy(false), 200).ids);
}
TEST(Reuse, WithAndWithoutDraftsInTurns) {
    Model model = random_model("reuse", tiny_v3());
    Session s(model, {200, 8, MlaForm::ABSORBED});
    Ids prompt = random_ids(9, 31);
    for (bool mtp : {false, true, false, true, true, false}) {
        Ids ids = speak(s, prompt, tiny_greedy(mtp, 7)).ids;
        EXPECT_EQ(ids, speak(model, prompt, tiny_greedy(false, 7), 200).ids);
        prompt.insert(prompt.end(), ids.begin(), ids.end() - 2);
        prompt.push_back(3);
    }
}

// -- 12.3 perplexity --------------------------------------------------------------------------------

static Perplexity perplexity_of(const Model& model, const Ids& ids, int context, int bos = -1) {
    Session s(model, {context, 8, MlaForm::ABSORBED});
    return perplexity(s, ids, bos, [](size_t) {});
}

TEST(Perplexity, OfUniformLogitsIsTheVocabulary) {
    Chain chain(std::vector<std::vector<float>>(11, std::vector<float>(11, 2.5f)));
    Perplexity p = perplexity_of(chain.model, random_ids(40, 11), 64);
    EXPECT_EQ(p.tokens, 39);
    EXPECT_NEAR(std::exp(p.nll / double(p.tokens)), 11, 11 * 60 * 0x1p-52);   // 39 additions, log, exp
}
TEST(Perplexity, OfWhatIsCertainIsOne) {
    std::vector<std::vector<float>> table = ring(5, 1);
    for (auto& row : table) for (float& z : row) z *= 200;
    Perplexity p = perplexity_of(Chain(table).model, {0, 1, 2, 3, 4, 0, 1}, 64);
    EXPECT_EQ(p.nll, 0);
}
TEST(Perplexity, AddsTheModelsSurprise) {
    std::vector<std::vector<float>> table = {{0, 1, 0.5f}, {1, -1, 0}, {0.2f, 0.1f, 0}};
    auto nll = [&](size_t from, size_t to) {
        Vector z(table[from].begin(), table[from].end());
        return -std::log(probabilities(z.data(), 3)[to]);
    };
    Perplexity p = perplexity_of(Chain(table).model, {1, 0, 2, 2}, 64);
    EXPECT_NEAR(p.nll, double(nll(1, 0) + nll(0, 2) + nll(2, 2)),
                30 * 0x1p-52);   // 10 roundings each of numbers near 1
}
TEST(Perplexity, OfABrokenModelIsAnError) {
    Chain chain({{0, 9, 0}, {0, 0, 9}, {std::numeric_limits<float>::quiet_NaN(), 0, 0}});
    EXPECT_THROW(perplexity_of(chain.model, {0, 1, 2, 1}, 64), BrokenModel);
}
TEST(Perplexity, BosPredictsTheFirstToken) {
    std::vector<std::vector<float>> table = {{0, 1, 0.5f}, {1, -1, 0}, {0.2f, 0.1f, 0}};
    Chain chain(table);
    Perplexity with_bos = perplexity_of(chain.model, {0, 2}, 64, 1),
               without_bos = perplexity_of(chain.model, {1, 0, 2}, 64);
    EXPECT_EQ(with_bos.tokens, 2);
    EXPECT_EQ(with_bos.nll, without_bos.nll);
}
TEST(Perplexity, CutsTheTextIntoWindows) {
    Chain chain(ring(5, 1));
    EXPECT_EQ(perplexity_of(chain.model, random_ids(25, 5), 10).tokens,
              9 + 9 + 4);   // the first of each is given
    EXPECT_EQ(perplexity_of(chain.model, random_ids(25, 5), 10, 0).tokens,
              9 + 9 + 7);   // a BOS in each takes its place
}
TEST(Perplexity, DoesNotDependOnTheChunk) {
    Model model = random_model("perplexity", tiny_v3());
    Ids ids = random_ids(40, 31);
    Session whole(model, {64, 64, MlaForm::ABSORBED}), single(model, {64, 1, MlaForm::ABSORBED});
    EXPECT_EQ(perplexity(whole, ids, -1, [](size_t) {}).nll, perplexity(single, ids, -1, [](size_t) {}).nll);
}
TEST(NegativeLogLikelihood, IsStableForLargeLogits) {
    const real logits[] = {1000, 0};
    EXPECT_EQ(negative_log_likelihood(logits, 2, 0), 0);
    EXPECT_EQ(negative_log_likelihood(logits, 2, 1), 1000);
}
