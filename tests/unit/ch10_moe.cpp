// Chapter 10: the three gates on rows made by hand, dispatch, the mixture.
#include "unit.h"

// -- 10.1 gates -------------------------------------------------------------------------------------

static void gate_of(const Config& c, const Routing& r, const Vector& bias) {
    if (c.gate == Gate::GREEDY) gate_greedy(r, gate_shape(c));
    if (c.gate == Gate::GROUP_LIMITED_GREEDY) gate_group_limited_greedy(r, gate_shape(c));
    if (c.gate == Gate::NOAUX_TC) gate_noaux_tc(r, bias.data(), gate_shape(c));
}

// T tokens through a gate.
struct Gated {
    Config c;
    Vector affinity, choice, weight, group_score;
    std::vector<int> idx;

    Gated(const Config& config, const Vector& logits, const Vector& bias = {}) : c(config) {
        const size_t T = logits.size() / size_t(c.E), K = size_t(c.K);
        affinity = choice = Vector(logits.size()), weight = Vector(T * K), idx = std::vector<int>(T * K);
        group_score = Vector(T * size_t(c.n_group));
        gate_of(c, {int(T), logits.data(), affinity.data(), choice.data(), idx.data(), weight.data(),
                    group_score.data()}, bias);
    }
};

struct Experts {
    int E, K, n_group = 1, topk_group = 1;
};
static Config gate_config(Gate gate, Experts s, double scale = 1, bool norm = false) {
    Config c;
    c.gate = gate, c.sigmoid_affinity = gate == Gate::NOAUX_TC, c.norm_topk = norm, c.routed_scale = scale;
    c.E = s.E, c.K = s.K, c.n_group = s.n_group, c.topk_group = s.topk_group;
    return c;
}
static Config v3_gate(Experts s, double scale = 1) { return gate_config(Gate::NOAUX_TC, s, scale, true); }

// logit of a sigmoid, log of a softmax
static Vector logits_of(const std::vector<double>& affinity, bool sigmoid) {
    Vector out;
    for (double s : affinity) out.push_back(real(sigmoid ? std::log(s / (1 - s)) : std::log(s)));
    return out;
}

using Idx = std::vector<int>;

TEST(GateGreedy, TakesTheBestAndKeepsTheirProbabilities) {
    Gated g(gate_config(Gate::GREEDY, {4, 2}), logits_of({0.125, 0.5, 0.125, 0.25}, false));
    EXPECT_EQ(g.idx, (Idx{1, 3}));
    EXPECT_EQ(g.weight[0], g.affinity[1]);   // no renormalisation, scale 1
    EXPECT_EQ(g.weight[1], g.affinity[3]);
    EXPECT_NEAR(g.weight[0], 0.5,
                softmax_error(4, 2) + 4 * U);   // range ln 4 < 2; the logits themselves are rounded
}
TEST(GateGreedy, TiesGoToTheLowerExpert) {
    EXPECT_EQ(Gated(gate_config(Gate::GREEDY, {6, 4}), Vector(6)).idx, (Idx{0, 1, 2, 3}));
}
TEST(GateGreedy, Scales) {
    Gated g(gate_config(Gate::GREEDY, {4, 1}, 16), Vector(4));
    EXPECT_EQ(g.weight[0], 4);   // 1/4 * 16
}
// V2's published code, when told to normalise, leaves the scale out.
TEST(GateGreedy, NormalisedDoesNotScale) {
    Gated g(gate_config(Gate::GREEDY, {4, 2}, 16, true), Vector(4));
    EXPECT_EQ(g.weight, (Vector{real(0.5), real(0.5)}));
}
TEST(GateGreedy, OneExpertIsNotNormalised) {
    Gated g(gate_config(Gate::GREEDY, {4, 1}, 16, true), Vector(4));
    EXPECT_EQ(g.weight[0], 4);
}

TEST(GateGroupLimited, ScoresAGroupByItsBest) {
    // best: 0.3, 0.2, 0.16; by sums the second group would come first
    Vector logits = logits_of({0.30, 0.01, 0.20, 0.19, 0.16, 0.14}, false);
    EXPECT_EQ(Gated(gate_config(Gate::GROUP_LIMITED_GREEDY, {6, 1, 3, 1}), logits).idx, Idx{0});
    EXPECT_EQ(Gated(gate_config(Gate::GROUP_LIMITED_GREEDY, {6, 2, 3, 1}), logits).idx, (Idx{0, 1}));
    EXPECT_EQ(Gated(gate_config(Gate::GROUP_LIMITED_GREEDY, {6, 3, 3, 2}), logits).idx, (Idx{0, 2, 3}));
}
TEST(GateGroupLimited, LeavesBetterExpertsOfOtherGroupsOut) {
    Vector logits = logits_of({0.30, 0.01, 0.20, 0.19, 0.16, 0.14}, false);
    EXPECT_EQ(Gated(gate_config(Gate::GREEDY, {6, 2}), logits).idx, (Idx{0, 2}));
    EXPECT_EQ(Gated(gate_config(Gate::GROUP_LIMITED_GREEDY, {6, 2, 3, 1}), logits).idx, (Idx{0, 1}));
}
TEST(GateGroupLimited, TiedGroupsGoToTheLower) {
    EXPECT_EQ(Gated(gate_config(Gate::GROUP_LIMITED_GREEDY, {8, 4, 4, 2}), Vector(8)).idx, (Idx{0, 1, 2, 3}));
}
TEST(GateGroupLimited, ScalesBy16) {
    Gated g(gate_config(Gate::GROUP_LIMITED_GREEDY, {8, 2, 4, 2}, 16), Vector(8));
    EXPECT_EQ(g.weight, (Vector{2, 2}));   // 1/8 * 16
}

TEST(GateNoaux, ScoresAGroupByItsBestTwo) {
    // max: 0.9 against 0.6; sum of two: 1.0 against 1.2
    Vector logits = logits_of({0.9, 0.1, 0.6, 0.6}, true), bias(4);
    Gated g(v3_gate({4, 1, 2, 1}), logits, bias);
    EXPECT_EQ(g.idx, Idx{2});
    EXPECT_EQ(Gated(v3_gate({4, 1, 2, 2}), logits, bias).idx, Idx{0});
    EXPECT_NEAR(g.group_score[0], 1.0, 12 * U);                    // two affinities of 5 U each, their sum
    EXPECT_NEAR(g.group_score[1], 1.2, 12 * U);
    EXPECT_EQ(g.choice[0], -std::numeric_limits<real>::infinity());
    EXPECT_EQ(g.choice[2], g.affinity[2]);
}
TEST(GateNoaux, AddsTwoOfAGroupNotAll) {
    // two: 1.0 against 0.9; all three: 1.0 against 1.2
    Vector logits = logits_of({0.5, 0.5, 0.001, 0.45, 0.45, 0.3}, true);
    EXPECT_EQ(Gated(v3_gate({6, 1, 2, 1}), logits, Vector(6)).idx, Idx{0});
}
TEST(GateNoaux, TheExampleOfTheBook) {
    Gated g(v3_gate({2, 1}, 2.5), logits_of({0.90, 0.30}, true), {real(-0.70), 0});
    EXPECT_EQ(g.idx, Idx{1});
    EXPECT_EQ(g.weight[0], g.affinity[1] * real(2.5));
    EXPECT_NEAR(g.affinity[1], 0.30,
                8 * U);   // the logit is rounded (|z| s (1 - s) U < U), then sigmoid's 4 U
}
TEST(GateNoaux, BiasSteersTheChoiceAndNeverTheWeights) {
    Vector logits = logits_of({0.8, 0.7, 0.6, 0.5}, true);
    Gated plain(v3_gate({4, 2}, 2.5), logits, Vector(4)), steered(v3_gate({4, 2}, 2.5), logits, {0, 0, 1, 1});
    EXPECT_EQ(plain.idx, (Idx{0, 1}));
    EXPECT_EQ(steered.idx, (Idx{2, 3}));
    EXPECT_EQ(steered.affinity, plain.affinity);
    EXPECT_NEAR(steered.weight[0], 0.6 / 1.1 * 2.5, 40 * U);   // 5 of an affinity, 6 of the sum, 3 more; 1.4
    EXPECT_NEAR(steered.weight[1], 0.5 / 1.1 * 2.5, 40 * U);
}
TEST(GateNoaux, ABiasOfAllChangesNothing) {
    Vector logits = {0, 1, -1, real(0.5), 2, -2, real(0.25), 3};
    Gated zero(v3_gate({8, 3, 4, 2}), logits, Vector(8)), five(v3_gate({8, 3, 4, 2}), logits, Vector(8, 5));
    EXPECT_EQ(zero.idx, five.idx);
    EXPECT_EQ(zero.weight, five.weight);
}
// Masked with 0, a masked expert would beat every kept one.
TEST(GateNoaux, NegativeBiasesDoNotBringMaskedGroupsBack) {
    Vector logits = logits_of({0.6, 0.5, 0.4, 0.3, 0.2, 0.1}, true), bias(6, -2);
    Gated g(v3_gate({6, 2, 3, 1}), logits, bias);
    EXPECT_EQ(g.idx, (Idx{0, 1}));
    for (size_t e = 2; e < 6; e++) EXPECT_EQ(g.choice[e], real(-INFINITY));
}
TEST(GateNoaux, TiesGoToTheLowerGroupAndExpert) {
    EXPECT_EQ(Gated(v3_gate({8, 4, 4, 2}), Vector(8), Vector(8)).idx, (Idx{0, 1, 2, 3}));
}
TEST(GateNoaux, WeightsOfEqualsAreEqual) {
    EXPECT_EQ(Gated(v3_gate({8, 4, 4, 2}, 2.5), Vector(8), Vector(8)).weight, Vector(4, real(0.625)));
}
TEST(GateNoaux, WeightsFollowThePicksInOrderOfChoice) {
    Gated g(v3_gate({4, 2}), logits_of({0.2, 0.4, 0.3, 0.1}, true), {real(0.5), 0, 0, 0});
    EXPECT_EQ(g.idx, (Idx{0, 1}));                 // 0.7 before 0.4 ...
    EXPECT_LT(g.weight[0], g.weight[1]);           // ... though 0.2 weighs less than 0.4
}

// The recipe a second time: groups by a stable sort of their scores, experts by a stable sort of what is
// left.
static Idx recipe(const Gated& g, const Vector& bias) {
    const Config& c = g.c;
    size_t size = size_t(c.E / c.n_group);
    Vector choice = g.affinity;
    for (size_t e = 0; e < choice.size() && c.gate == Gate::NOAUX_TC; e++) choice[e] += bias[e];
    std::vector<std::pair<real, int>> groups;
    for (int n = 0; n < c.n_group; n++) {
        Vector members(choice.begin() + int64_t(size) * n, choice.begin() + int64_t(size) * (n + 1));
        std::sort(members.rbegin(), members.rend());
        groups.push_back({c.gate == Gate::NOAUX_TC ? members[0] + members[1] : members[0], n});
    }
    std::stable_sort(groups.begin(), groups.end(), [](auto& a, auto& b) { return a.first > b.first; });
    std::set<int> kept;
    for (int n = 0; n < c.topk_group; n++) kept.insert(groups[size_t(n)].second);
    Idx idx;
    for (int e = 0; e < c.E; e++) if (kept.count(e / int(size))) idx.push_back(e);
    std::stable_sort(idx.begin(), idx.end(),
                     [&](int a, int b) { return choice[size_t(a)] > choice[size_t(b)]; });
    idx.resize(size_t(c.K));
    return idx;
}

TEST(Gates, FollowTheRecipeOnRandomRowsWithTies) {
    Noise noise;
    for (int round = 0; round < 2000; round++) {
        Gate gate = round % 2 ? Gate::NOAUX_TC : Gate::GROUP_LIMITED_GREEDY;
        int n_group = 1 + noise.below(6), size = 2 + noise.below(5), topk_group = 1 + noise.below(n_group);
        int K = 1 + noise.below(topk_group * size), levels = 2 + noise.below(20);
        Config c = gate_config(gate, {n_group * size, K, n_group, topk_group}, 2.5, gate == Gate::NOAUX_TC);
        Vector logits, bias;
        for (int e = 0; e < c.E; e++)
            logits.push_back(real(noise.below(levels)) / 4),
                bias.push_back(real(noise.below(levels)) / 8 - 1);
        Gated g(c, logits, bias);
        ASSERT_EQ(g.idx, recipe(g, bias)) << round;
    }
}
// Affinities of the picks are divided by their sum: K additions, 1e-20, a division, a product.
TEST(Gates, NoauxWeightsAddUpToTheScale) {
    Noise noise;
    for (int round = 0; round < 100; round++) {
        Gated g(v3_gate({32, 8, 4, 2}, 2.5), noise.vector(32), noise.vector(32));
        long double sum = 0;
        for (real w : g.weight) sum += w;
        EXPECT_LE(std::fabs(sum - 2.5L), 2.5L * chain_error(8 + 1 + 1 + 1));
    }
}

// A token's routing does not depend on the others', nor on the number of threads.
TEST(Gates, OfManyTokens) {
    const size_t T = 300, E = 32, K = 6;
    Vector logits = Noise{}.vector(T * E), bias = Noise{{7}}.vector(E);
    for (Gate gate : {Gate::GREEDY, Gate::GROUP_LIMITED_GREEDY, Gate::NOAUX_TC}) {
        Config c = gate_config(gate, {int(E), int(K), 4, 2}, 2.5, true);
        for (int threads : {1, 3}) {
            ScopedThreads scoped(threads);
            Gated all(c, logits, bias);
            for (size_t t = 0; t < T; t++) {
                auto at = logits.begin() + int64_t(t * E);
                Gated one(c, Vector(at, at + int64_t(E)), bias);
                EXPECT_TRUE(same_bits(one.affinity.data(), all.affinity.data() + t * E, E)) << t;
                EXPECT_TRUE(same_bits(one.choice.data(), all.choice.data() + t * E, E)) << t;
                EXPECT_TRUE(same_bits(one.weight.data(), all.weight.data() + t * K, K)) << t;
                EXPECT_EQ(std::memcmp(one.idx.data(), all.idx.data() + t * K, K * sizeof(int)), 0) << t;
            }
        }
    }
}

// -- 10.2 dispatch ----------------------------------------------------------------------------------

TEST(Dispatch, IsAStableSortByExpert) {
    Noise noise;
    Model model;
    Config& c = model.config = config_of(tiny_v3());
    Session s(model, {50, 50, MlaForm::ABSORBED});
    int T = 50;
    for (int i = 0; i < T * c.K; i++)
        s.a.expert_idx[i] = i % c.K == 0 ? noise.below(3) : 3 + noise.below(4);   // none for 7
    std::vector<int> first(size_t(c.E) + 1, -1);
    dispatch(first.data(), s.a.slot, s.a.slot_token, s.a.expert_idx, T, c.K, c.E);
    std::vector<int> order(size_t(T * c.K));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return s.a.expert_idx[a] < s.a.expert_idx[b]; });
    EXPECT_EQ(first[0], 0);
    EXPECT_EQ(first[7], first[8]);
    EXPECT_EQ(first[8], T * c.K);
    for (int slot = 0; slot < T * c.K; slot++) {
        int pair = order[size_t(slot)];
        EXPECT_EQ(s.a.slot[pair], slot);
        EXPECT_EQ(s.a.slot_token[slot], pair / c.K);
        EXPECT_TRUE(first[size_t(s.a.expert_idx[pair])] <= slot &&
                    slot < first[size_t(s.a.expert_idx[pair]) + 1]);
    }
}

// -- 10.3 moe ---------------------------------------------------------------------------------------

// Experts that say their number: FFN_e(u) = (e + 1) silu(1) for u = 1, in every output.
struct NamedExperts {
    std::deque<std::vector<float>> store;
    Vector no_bias;
    Moe w;

    Matrix constant(int rows, int cols, float value) {
        const std::vector<float>& data = store.emplace_back(size_t(rows * cols), value);
        return {reinterpret_cast<const std::byte*>(data.data()), nullptr, Dtype::F32, rows, cols, 0, 0};
    }
    explicit NamedExperts(const Config& c) {
        std::vector<float>& gate = store.emplace_back(size_t(c.E * c.D));
        for (size_t e = 0; e < size_t(c.E); e++) gate[e * size_t(c.D)] = float((e * 5) % 8) / 4;
        w.gate_w = {reinterpret_cast<const std::byte*>(gate.data()), nullptr, Dtype::F32, c.E, c.D, 0, 0};
        no_bias.resize(size_t(c.E)), w.gate_bias = no_bias;
        float one = 1 / float(c.D);                        // D inputs of 1 make 1; D = 16 keeps it exact
        for (int e = 0; e < c.E; e++)
            w.experts.push_back(
                {constant(1, c.D, one), constant(1, c.D, one), constant(c.D, 1, float(e + 1))});
        w.shared = {constant(1, c.D, one), constant(1, c.D, one), constant(c.D, 1, 100)};
    }
};

TEST(Moe, MixesTheExpertsThatWerePickedAndTheSharedOne) {
    Model model;
    Config& c = model.config = config_of(
        with(tiny_v3(), {{"hidden_size", "16"}, {"moe_intermediate_size", "1"}}));
    NamedExperts experts(c);
    Session s(model, {1, 1, MlaForm::ABSORBED});
    std::fill_n(s.a.u, c.D, real(1));
    moe(s, experts.w, 1, 1);
    long double expected = 0, weights = 0, unit = sigmoid(1);       // silu(1)
    for (int k = 0; k < c.K; k++) {
        expected += (long double)(s.a.gate_weight[k]) * (s.a.expert_idx[k] + 1) * unit;
        weights += s.a.gate_weight[k];
    }
    EXPECT_LE(std::fabs(weights - 2.5L), 2.5L * chain_error(c.K + 3));
    // an expert's product, K products and sums, the shared expert's product and sum
    for (int i = 0; i < c.D; i++)
        EXPECT_LE(std::fabs(s.a.y[i] - (expected + 100 * unit)),
                  (expected + 100 * unit) * chain_error(c.K + 3))
            << i;
}

// One expert on one token, by the definitions of chapters 5 and 9.
static Vector expert_alone(const Mlp& w, const real* u) {
    Vector hidden, out;
    for (int r = 0; r < w.w_gate.rows; r++) {
        real gate = dot_row_plain(w.w_gate, r, u), up = dot_row_plain(w.w_up, r, u);
        silu_times_plain(&gate, &up, 1);
        hidden.push_back(gate);
    }
    for (int r = 0; r < w.w_down.rows; r++) out.push_back(dot_row_plain(w.w_down, r, hidden.data()));
    return out;
}

// Slot by slot, to the bit: expert_out of a slot is its expert's answer to its token, and y is the shared
// expert's to each. Experts 0 to 2 have many tokens, 3 to 6 some and 7 none.
static void expect_experts(const Model& model, int T, int threads) {
    ScopedThreads scoped(threads);
    const Config& c = model.config;
    const Moe& w = model.layers[1].moe;
    size_t D = size_t(c.D);
    Noise noise{{uint64_t(T)}};
    Session s(model, {T, T, MlaForm::ABSORBED});
    Vector u = noise.vector(size_t(T) * D);
    std::copy(u.begin(), u.end(), s.a.u);
    for (int i = 0; i < T * c.K; i++)
        s.a.expert_idx[i] = i % c.K == 0 ? noise.below(3) : 2 + 2 * (i % c.K) - noise.below(2);
    const int* first = s.a.first;
    dispatch(s.a.first, s.a.slot, s.a.slot_token, s.a.expert_idx, T, c.K, c.E);
    Activations& a = s.a;
    run_experts({a.u, T, c.K, first, a.slot_token, a.expert_in, a.expert_out, a.y, a.gate, a.up}, w);
    for (size_t e = 0; e < size_t(c.E); e++) {
        for (int slot = first[e]; slot < first[e + 1]; slot++) {
            Vector expected = expert_alone(w.experts[e], u.data() + size_t(s.a.slot_token[slot]) * D);
            ASSERT_TRUE(same_bits(s.a.expert_out + size_t(slot) * D, expected.data(), D))
                << T << " tokens, expert " << e << ", slot " << slot << ", " << threads << " threads";
        }
    }
    for (int t = 0; c.n_shared && t < T; t++) {
        Vector expected = expert_alone(w.shared, u.data() + size_t(t) * D);
        ASSERT_TRUE(same_bits(s.a.y + size_t(t) * D, expected.data(), D)) << T << " tokens, token " << t;
    }
}

TEST(RunExperts, EachSeesItsTokensAndNoOthers) {
    for (const Keys& keys : {tiny_v3(), with(tiny_v3(), {{"n_shared_experts", "3"}}), tiny_fp8(),
                             with(tiny_v3(), {{"n_shared_experts", "0"}})}) {
        Model model = random_model("experts", keys, keys.count("quantization_config") ? "F8_E4M3" : "BF16");
        for (const Kernels& k : available_kernels()) {
            ScopedKernels scoped(k);
            for (int T : {1, 2, 3, 11, 50})
                for (int threads : {1, 3, 8}) ASSERT_NO_FATAL_FAILURE(expect_experts(model, T, threads));
        }
    }
}

static Vector run_moe(Session& s, const Moe& w, const Vector& u, int T) {
    std::copy(u.begin(), u.end(), s.a.u);
    moe(s, w, 1, T);
    return Vector(s.a.y, s.a.y + T * s.model.config.D);
}

TEST(Moe, CompanyDoesNotChangeBits) {
    for (const Keys& keys : {tiny_v3(), tiny_v2_lite(), tiny_fp8()}) {
        Model model = random_model("moe", keys, keys.count("quantization_config") ? "F8_E4M3" : "BF16");
        size_t D = size_t(model.config.D);
        Session s(model, {11, 11, MlaForm::ABSORBED});
        Vector u = Noise{}.vector(11 * D), all = run_moe(s, model.layers[1].moe, u, 11);
        for (size_t t = 0; t < 11; t++) {
            Vector token(u.begin() + int64_t(t * D), u.begin() + int64_t((t + 1) * D));
            EXPECT_TRUE(same_bits(run_moe(s, model.layers[1].moe, token, 1).data(), all.data() + t * D, D))
                << t;
        }
    }
}
TEST(Moe, WorksWithoutASharedExpert) {
    Model model = random_model("moe", with(tiny_v3(), {{"n_shared_experts", "0"}}));
    Session s(model, {2, 2, MlaForm::ABSORBED});
    size_t D = size_t(model.config.D);
    std::fill_n(s.a.y, 2 * D, std::numeric_limits<real>::quiet_NaN());   // what was there must not matter
    for (real y : run_moe(s, model.layers[1].moe, Noise{}.vector(2 * D), 2)) EXPECT_TRUE(std::isfinite(y));
}
