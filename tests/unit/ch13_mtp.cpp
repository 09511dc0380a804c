// Chapter 13: a draft costs nothing but time. The tokens are distributed as without it.
#include "unit.h"

// -- 13.3 verify ------------------------------------------------------------------------------------

using Verify = std::function<int(const Distribution&, const Distribution&, int, Rng&)>;

// Three mistakes that a reader could make. Each test below must see all of them.
static int accept_always(const Distribution&, const Distribution&, int draft, Rng&) { return draft; }
static double chance_of(const Distribution& d, int id) {
    for (const Candidate& c : d) if (c.id == id) return c.p;
    return 0;
}
static int correct_from_p(const Distribution& p, const Distribution& q, int draft, Rng& rng) {
    bool accepted = rng.uniform() * chance_of(q, draft) < chance_of(p, draft);
    return accepted ? draft : sample(p, rng);               // not from what p has more than q
}
static int accept_upside_down(const Distribution& p, const Distribution& q, int draft, Rng& rng) {
    bool accepted = rng.uniform() * chance_of(p, draft) < chance_of(q, draft);
    return accepted ? draft : verify(p, {{-1, 1.0}}, -1, rng);
}
static const std::pair<const char*, Verify> MISTAKES[] = {{"accept always", accept_always},
                                                          {"correct from p", correct_from_p},
                                                          {"q / p for p / q", accept_upside_down}};

// A generator whose first number lies in cell i of 64 and whose second in cell j.
static Rng rng_of_cell(size_t i, size_t j) {
    static const std::vector<uint64_t> SEEDS = [] {
        std::vector<uint64_t> seeds(64 * 64, 0);
        size_t found = 0;
        for (uint64_t seed = 1; found < seeds.size(); seed++) {
            Rng rng{seed};
            uint64_t& at = seeds[size_t(rng.uniform() * 64) * 64 + size_t(rng.uniform() * 64)];
            found += at == 0;
            at = seed;
        }
        return seeds;
    }();
    return {SEEDS[i * 64 + j]};
}

// The distribution of verify's answer, exactly: with weights that are multiples of 1/16, every threshold that
// it compares a random number with is a multiple of 1/64, so one number from each cell stands for all of
// them.
static std::vector<double> outcome(const Verify& rule, const Distribution& p, const Distribution& q, int V) {
    std::vector<double> out(static_cast<size_t>(V));
    for (const Candidate& draft : q) {
        for (size_t cell = 0; cell < 64 * 64; cell++) {
            Rng rng = rng_of_cell(cell / 64, cell % 64);
            out[size_t(rule(p, q, draft.id, rng))] += draft.p / (64 * 64);
        }
    }
    return out;
}

// V weights of sixteenths that add up to 1; zeros are left out and the order is random, as after top-p.
static Distribution sixteenths(Noise& noise, int V, bool powers_of_two) {
    std::vector<int> parts(size_t(V), 0);
    if (!powers_of_two) {
        for (int i = 0; i < 16; i++) parts[size_t(noise.below(V))]++;
    } else {
        std::vector<int> split = {16};
        while (int(split.size()) < V && noise.below(8)) {
            size_t i = size_t(noise.below(int(split.size())));
            if (split[i] > 1) split[i] /= 2, split.push_back(split[i]);
        }
        std::copy(split.begin(), split.end(), parts.begin());
    }
    Distribution d;
    for (int id = 0; id < V; id++) if (parts[size_t(id)]) d.push_back({id, parts[size_t(id)] / 16.0});
    for (size_t i = d.size(); i > 1; i--) std::swap(d[i - 1], d[size_t(noise.below(int(i)))]);
    return d;
}

struct Pair {
    Distribution p, q;
};
// Pairs for which the correction's own thresholds are multiples of 1/64 too: the excess of p over q is a
// power of two.
static std::vector<Pair> exact_pairs(int V) {
    Noise noise{{uint64_t(V)}};
    std::vector<Pair> pairs;
    while (pairs.size() < 60) {
        Pair pair{sixteenths(noise, V, false), sixteenths(noise, V, true)};
        int excess = 0;
        for (const Candidate& c : pair.p)
            excess += std::max(0, int(16 * c.p) - int(16 * chance_of(pair.q, c.id)));
        if ((excess & (excess - 1)) == 0) pairs.push_back(pair);
    }
    return pairs;
}
static bool is_exact(const Verify& rule, const Pair& pair, int V) {
    std::vector<double> out = outcome(rule, pair.p, pair.q, V);
    for (int id = 0; id < V; id++) if (out[size_t(id)] != chance_of(pair.p, id)) return false;
    return true;
}

TEST(Verify, IsDistributedAsPExactly) {
    for (int V : {2, 3, 5}) {
        for (const Pair& pair : exact_pairs(V)) ASSERT_TRUE(is_exact(verify, pair, V));
    }
}
TEST(Verify, TheExactTestSeesEachMistake) {
    std::vector<Pair> pairs = exact_pairs(5);
    for (auto& mistake : MISTAKES) {
        auto sees = [&](const Pair& pair) { return !is_exact(mistake.second, pair, 5); };
        EXPECT_GT(std::count_if(pairs.begin(), pairs.end(), sees), 40) << mistake.first;
    }
}
TEST(Verify, AcceptsADraftThatPLikesBetter) {
    Rng rng{1};
    EXPECT_EQ(verify({{0, 0.5}, {1, 0.5}}, {{0, 0.25}, {1, 0.75}}, 0, rng), 0);
    EXPECT_EQ(rng.state, 1u);                               // without asking chance
}
TEST(Verify, NeverAcceptsWhatPExcludes) {
    for (uint64_t seed = 0; seed < 1000; seed++) {
        Rng rng{seed};
        EXPECT_NE(verify({{1, 0.5}, {2, 0.5}}, {{0, 0.5}, {1, 0.5}}, 0, rng), 0);
    }
}
TEST(Verify, AtTemperatureZeroGivesTheArgmax) {
    Rng rng{1};
    EXPECT_EQ(verify({{3, 1}}, {{3, 1}}, 3, rng), 3);
    EXPECT_EQ(verify({{3, 1}}, {{4, 1}}, 4, rng), 3);
}

static Distribution random_distribution(Noise& noise, int V) {
    Vector logits = noise.vector(size_t(V));
    for (real& z : logits) z *= 2;
    Sampling s;
    s.temperature = 1, s.top_p = 1;
    return distribution(logits.data(), V, s);
}
static double surprise_of(const Verify& rule, const Distribution& p, const Distribution& q, int V) {
    std::vector<int64_t> counts(static_cast<size_t>(V));
    std::vector<long double> expected;
    Rng rng{3};
    for (int i = 0; i < 100000; i++) counts[size_t(rule(p, q, sample(q, rng), rng))]++;
    for (int id = 0; id < V; id++) expected.push_back(chance_of(p, id));
    return surprise(counts, expected);
}

TEST(Verify, IsDistributedAsPForAnyNumbers) {
    Noise noise;
    for (int round = 0; round < 10; round++) {
        Distribution p = random_distribution(noise, 6), q = random_distribution(noise, 6);
        EXPECT_LT(surprise_of(verify, p, q, 6), 1) << round;
        for (auto& [name, rule] : MISTAKES) EXPECT_GT(surprise_of(rule, p, q, 6), 1) << name;
    }
}

// -- 13.1 mtp_forward -------------------------------------------------------------------------------

// The chain's MTP module ignores the hidden state and mixes rows of the next token t: 0.8 of t, 0.6 of t + 1.
// Roundings: two norms of 16 numbers and few more, on a sum of two terms.
TEST(Mtp, PredictsFromTheEmbeddingOfTheNextToken) {
    std::vector<std::vector<float>> table = {{1, 2, 3}, {-1, 0.3f, 7}, {0, 5, 2}};
    Chain chain(table);
    std::vector<int> ids = {0, 2, 1, 1, 0};
    Answer a = answer(chain.model, ids);
    ASSERT_EQ(a.mtp_logits.size(), 4u * 3);
    for (size_t i = 0; i < 12; i++) {
        size_t next = size_t(ids[i / 3 + 1]), v = i % 3;
        long double first = 0.8L * table[next][v], second = 0.6L * table[(next + 1) % 3][v];
        long double float_error =
            2 * std::numeric_limits<float>::epsilon();   // 0.8f, 0.6f and the length of their vector
        EXPECT_NEAR(a.mtp_logits[i], first + second,
                    (30 * U + float_error) * (std::fabs(first) + std::fabs(second)))
            << i;
    }
}
TEST(Mtp, CatchesUpOverChunks) {
    Model model = random_model("mtp", tiny_v3());
    std::vector<int> ids = random_ids(23, 31);
    Answer whole = answer(model, ids);
    for (int chunk : {1, 2, 5, 22})
        EXPECT_TRUE(
            same_bits(answer(model, ids, {23, chunk, MlaForm::ABSORBED}).mtp_logits, whole.mtp_logits))
            << chunk;
}
TEST(Mtp, CatchesUpOnceAndOnlyWhereTheNextTokenIsKnown) {
    Model model = random_model("mtp", tiny_v3());
    Session s(model, {23, 8, MlaForm::ABSORBED});
    s.tokens = random_ids(5, 31);
    forward(s, s.tokens, 0);
    EXPECT_EQ(mtp_catch_up(s), 4);                           // nothing follows the last token
    EXPECT_EQ(mtp_catch_up(s), 0);
    EXPECT_EQ(s.mtp_length, 4);
    s.tokens.push_back(7);
    EXPECT_EQ(mtp_catch_up(s), 1);
}
TEST(MtpDeathTest, ALostHiddenStateIsAMistakeOfOurs) {
    Model model = random_model("mtp", tiny_v3());
    Session s(model, {23, 8, MlaForm::ABSORBED});
    s.tokens = random_ids(9, 31);
    forward(s, std::span(s.tokens).first(4), 0);
    forward(s, std::span(s.tokens).subspan(4), 4);
    EXPECT_DEATH(mtp_catch_up(s), "hidden state of position 0 is gone");
}

// -- 13.3 generate with drafts ----------------------------------------------------------------------

struct Drafted {
    std::vector<int> ids;
    Statistics stats;
};
static Drafted continuation(Session& s, const std::vector<int>& prompt, Generation& g) {
    Drafted out;
    out.stats = generate(s, prompt, g, [](int) {}, [&](int id) { out.ids.push_back(id); return true; });
    return out;
}

TEST(MtpGreedy, SaysTheSameOnTheShippedModel) {
    Model model = load_model("weights/tiny");
    Tokenizer tokenizer = Tokenizer::load("weights/tiny");
    Generation g;
    g.sampling.temperature = 0, g.max_tokens = 120, g.stops = model.config.eos;
    for (const char* text :
         {"Which is larger, 9.11 or 9.9?", "How many r are in strawberry?", "What is 47 + 85?", "zzz"}) {
        std::vector<int> prompt = tokenizer.encode(tokenizer.render({{"user", text, {}}}, true));
        Drafted runs[2];
        for (bool mtp : {false, true}) {
            Session s(model, {400, 64, MlaForm::ABSORBED});
            g.drafting = mtp ? &MTP_DRAFTS : nullptr;
            runs[mtp] = continuation(s, prompt, g);
        }
        EXPECT_EQ(runs[0].ids, runs[1].ids) << text;
        EXPECT_GT(runs[0].ids.size(), 3u) << text;
        EXPECT_GT(runs[1].stats.accepted, 0) << text;
        EXPECT_LT(runs[1].stats.steps, runs[0].stats.steps) << text;
    }
}
TEST(MtpGreedy, SaysTheSameOnRandomModels) {
    for (uint64_t seed = 1; seed <= 5; seed++) {
        Model model = random_model("mtp", with(tiny_v3(), {{"vocab_size", "6"}}), "BF16", seed);
        std::vector<int> prompt = random_ids(5, 6, seed);
        Drafted runs[2];
        Generation g;
        g.sampling.temperature = 0, g.max_tokens = 60;
        for (bool mtp : {false, true}) {
            Session s(model, {100, 8, MlaForm::ABSORBED});
            g.drafting = mtp ? &MTP_DRAFTS : nullptr;
            runs[mtp] = continuation(s, prompt, g);
        }
        EXPECT_EQ(runs[0].ids, runs[1].ids) << seed;
        EXPECT_GT(runs[1].stats.drafted, 0) << seed;
    }
}

// A step may end on a stop token that was drafted: its row of the cache is not the conversation's.
TEST(MtpGreedy, LeavesNoTokenInTheCacheThatWasNotSaid) {
    int ended_on_a_draft = 0;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        Model model = random_model("mtp", with(tiny_v3(), {{"vocab_size", "6"}}), "BF16", seed);
        for (int stop = 0; stop < 6; stop++) {
            Generation g;
            g.sampling.temperature = 0, g.max_tokens = 40, g.stops = {stop}, g.drafting = &MTP_DRAFTS;
            Session s(model, {100, 8, MlaForm::ABSORBED});
            Drafted out = continuation(s, random_ids(5, 6, seed), g);
            ASSERT_EQ(s.tokens.size(), 5 + out.ids.size());
            ASSERT_LE(size_t(s.length), s.tokens.size());
            ended_on_a_draft += out.stats.stop == Stop::END && size_t(s.length) == s.tokens.size();
            fs::path path = scratch("mtp_cache") / "kv";
            AtomicFile file(path.string());
            save_cache(s, file);
            Session loaded(model, {100, 8, MlaForm::ABSORBED});
            load_cache(loaded, path.string());
            EXPECT_TRUE(std::equal(loaded.tokens.begin(), loaded.tokens.end(), s.tokens.begin()));
            EXPECT_EQ(loaded.length, s.length);
        }
    }
    EXPECT_GT(ended_on_a_draft, 0);
}

// Nor after any other end: a text of --stop may come with a token that replaces a draft, or ends a thought.
TEST(MtpGreedy, LeavesATrueCacheWhereverTheTextIsCut) {
    int replaced = 0;
    for (uint64_t seed = 1; seed <= 6; seed++) {
        Model model = random_model("mtp", with(tiny_v3(), {{"vocab_size", "6"}}), "BF16", seed);
        for (int cut = 1; cut <= 12; cut++) {
            Generation g;
            g.sampling.temperature = 0, g.max_tokens = 40, g.drafting = &MTP_DRAFTS;
            if (seed % 2) g.think_begin = 0, g.think_end = 1, g.think_budget = 2;
            Session s(model, {100, 8, MlaForm::ABSORBED});
            int n = 0;
            auto more = [&](int) { return ++n < cut; };
            Statistics stats = generate(s, random_ids(5, 6, seed), g, [](int) {}, more);
            EXPECT_EQ(stats.stop, Stop::TEXT);
            replaced += stats.accepted < stats.drafted;
            std::vector<int> longer = s.tokens;
            longer.push_back(3);
            Session fresh(model, {100, 8, MlaForm::ABSORBED});
            EXPECT_EQ(continuation(s, longer, g).ids, continuation(fresh, longer, g).ids) << seed << cut;
            for (int l = 0; l < model.config.n_layers; l++) {
                const std::byte *a = s.cache.matrix(l, 0).data, *b = fresh.cache.matrix(l, 0).data;
                size_t bytes = longer.size() * row_bytes(s.cache.dtype, s.cache.width);
                EXPECT_EQ(std::memcmp(a, b, bytes), 0) << seed << ' ' << cut << ' ' << l;
            }
        }
    }
    EXPECT_GT(replaced, 0);
}

// Counts of the V^3 continuations of a prompt.
struct Counted {
    std::vector<int64_t> counts;
    int64_t drafted = 0, accepted = 0;
};
static Counted count_continuations(const Model& model, const std::vector<int>& prompt, Generation g, int n) {
    size_t V = size_t(model.config.V);
    Session s(model, {16, 8, MlaForm::ABSORBED});
    Counted out{std::vector<int64_t>(V * V * V), 0, 0};
    g.max_tokens = 3;
    for (int i = 0; i < n; i++) {
        Drafted d = continuation(s, prompt, g);
        out.counts[(size_t(d.ids[0]) * V + size_t(d.ids[1])) * V + size_t(d.ids[2])]++;
        out.drafted += d.stats.drafted, out.accepted += d.stats.accepted;
    }
    return out;
}

// Their probabilities from the logits of every prefix, token by token.
static std::vector<long double> continuation_probabilities(const Model& model, const std::vector<int>& prompt,
                                                           const Sampling& sampling) {
    int V = model.config.V;
    std::vector<long double> p = {1};
    std::vector<std::vector<int>> prefixes = {prompt};
    for (int depth = 0; depth < 3; depth++) {
        std::vector<long double> longer_p;
        std::vector<std::vector<int>> longer;
        for (size_t i = 0; i < prefixes.size(); i++) {
            Vector logits = answer(model, prefixes[i]).logits;
            Distribution d = distribution(logits.data() + logits.size() - size_t(V), V, sampling);
            for (int id = 0; id < V; id++) {
                longer_p.push_back(p[i] * chance_of(d, id));
                longer.push_back(prefixes[i]), longer.back().push_back(id);
            }
        }
        p = longer_p, prefixes = longer;
    }
    return p;
}

static void expect_lossless(const Model& model, const std::vector<int>& prompt, const Sampling& sampling,
                            int n) {
    Generation g;
    g.sampling = sampling;
    std::vector<long double> p = continuation_probabilities(model, prompt, sampling);
    for (bool mtp : {false, true}) {
        g.drafting = mtp ? &MTP_DRAFTS : nullptr;
        Counted c = count_continuations(model, prompt, g, n);
        EXPECT_LT(surprise(c.counts, p), 1) << mtp;
        if (!mtp) continue;
        EXPECT_GT(c.accepted, n / 10);                      // both ways are taken often
        EXPECT_GT(c.drafted - c.accepted, n / 10);
    }
}

static std::vector<std::vector<float>> drafted_table() {
    return {{0, 1, 0.5f, -1}, {1, -1, 0, 2}, {0.2f, 1.5f, 0, 0.3f}, {2, 0, -0.5f, 1}};
}
constexpr int CONTINUATIONS = 10000;

TEST(MtpSampling, IsDistributedAsWithoutDrafts) {
    Chain chain(drafted_table());
    Sampling s;
    s.temperature = 1, s.top_p = 1;
    expect_lossless(chain.model, {0, 3}, s, CONTINUATIONS);
}
TEST(MtpSampling, IsDistributedAsWithoutDraftsUnderTopP) {
    Chain chain(drafted_table());
    Sampling s;
    s.temperature = 0.7, s.top_p = 0.8, s.top_k = 3;
    expect_lossless(chain.model, {0, 3}, s, CONTINUATIONS);
}
TEST(MtpSampling, IsDistributedAsWithoutDraftsOnARandomModel) {
    Model model = random_model("mtp", with(tiny_v3(), {{"vocab_size", "4"}, {"num_hidden_layers", "2"}}),
                               "BF16", 3);
    Sampling s;
    s.temperature = 1, s.top_p = 1;
    expect_lossless(model, random_ids(5, 4), s, CONTINUATIONS / 4);
}

// As generate does it, with any rule in verify's place, from the chain's closed form.
static double surprise_of_chain(const Verify& rule, int n) {
    std::vector<std::vector<float>> table = drafted_table();
    Sampling s;
    s.temperature = 1, s.top_p = 1;
    std::vector<Distribution> p, q;
    for (size_t t = 0; t < 4; t++) {
        Vector row(table[t].begin(), table[t].end()), mixed(4);
        for (size_t v = 0; v < 4; v++) mixed[v] = real(0.8f * table[t][v] + 0.6f * table[(t + 1) % 4][v]);
        p.push_back(distribution(row.data(), 4, s)), q.push_back(distribution(mixed.data(), 4, s));
    }
    std::vector<int64_t> counts(64);
    Rng rng{9};
    for (int i = 0; i < n; i++) {
        std::vector<int> ids = {sample(p[3], rng)};
        while (ids.size() < 3) {
            size_t last = size_t(ids.back());
            int draft = sample(q[last], rng);
            ids.push_back(rule(p[last], q[last], draft, rng));
            if (ids.back() == draft) ids.push_back(sample(p[size_t(draft)], rng));
        }
        counts[size_t(ids[0] * 16 + ids[1] * 4 + ids[2])]++;
    }
    std::vector<long double> expected;
    for (int i = 0; i < 64; i++)
        expected.push_back((long double)(chance_of(p[3], i / 16)) * chance_of(p[size_t(i / 16)], i / 4 % 4) *
                           chance_of(p[size_t(i / 4 % 4)], i % 4));
    return surprise(counts, expected);
}

TEST(MtpSampling, TheTestSeesEachMistakeWithThisManySamples) {
    EXPECT_LT(surprise_of_chain(verify, CONTINUATIONS), 1);
    for (auto& [name, rule] : MISTAKES) EXPECT_GT(surprise_of_chain(rule, CONTINUATIONS), 1) << name;
}
