// Chapter 15: dispatch and combine on ranks that are threads, against sums written out here.
#include "unit.h"

// -- 15.1 to 15.3 -----------------------------------------------------------------------------------

// Tokens of each rank with random experts; where `holes`, some of a token's are none.
struct Scene {
    int R, per_node, E, K, D;
    std::vector<int> first, T;             // experts; tokens of each rank
    std::vector<std::vector<int>> idx;     // (R) of (T, K)
    std::vector<Vector> weight, x;         // (R) of (T, K), (T, D)

    Scene(int R, int per_node, int E, int K, std::vector<int> tokens, uint64_t seed, bool holes = false)
        : R(R), per_node(per_node), E(E), K(K), D(160), T(std::move(tokens)) {
        Rng rng{seed};
        for (int r = 0; r <= R; r++) first.push_back(E * r / R);
        for (int r = 0; r < R; r++) {
            std::vector<int> all(static_cast<size_t>(E));
            std::iota(all.begin(), all.end(), 0);
            idx.emplace_back(), weight.emplace_back(), x.emplace_back();
            for (int t = 0; t < T[size_t(r)]; t++) {
                for (size_t i = all.size(); i > 1; i--) std::swap(all[i - 1], all[rng.next() % i]);
                for (int k = 0; k < K; k++) {
                    idx.back().push_back(holes && rng.next() % 3 == 0 ? -1 : all[size_t(k)]);
                    weight.back().push_back(real(rng.uniform()));
                }
                for (int i = 0; i < D; i++) x.back().push_back(real(rng.uniform() - 0.5));
            }
        }
    }
    RankShape shape() const { return {R, per_node, first.data()}; }
    Trip trip(CombineOrder order = CombineOrder::EXPERT) const {
        return {shape(), K, D, REAL, REAL, order};
    }
    int owner(int e) const { return shape().owner(e); }
    bool goes(int source, int t, int r) const {
        for (int k = 0; k < K; k++) {
            const int e = idx[size_t(source)][size_t(t * K + k)];
            if (e >= 0 && owner(e) == r) return true;
        }
        return false;
    }
};

// An "expert": another function for each, of one row.
static Vector expert_of(int e, const real* x, int D) {
    Vector y(static_cast<size_t>(D));
    for (int i = 0; i < D; i++) y[size_t(i)] = x[(i + e) % D] * real(1 + e) + real(0.125) * real(e);
    return y;
}

static Vector run_own(const Scene& s, const Received& got, int rank) {
    Vector out;
    for (size_t p = 0; p < got.row.size(); p++) {
        const auto after = std::upper_bound(got.first.begin(), got.first.end(), int(p));
        const int expert = s.first[size_t(rank)] + int(after - got.first.begin()) - 1;
        const Vector y = expert_of(expert, got.x.data() + int64_t(got.row[p]) * s.D, s.D);
        out.insert(out.end(), y.begin(), y.end());
    }
    return out;
}

// What all ranks received, and what came home to each.
struct Result {
    std::vector<Received> got;
    std::vector<Vector> out;
};
static Result on_all(const Scene& s, const Trip& trip) {
    Result result{std::vector<Received>(size_t(s.R)), std::vector<Vector>(size_t(s.R))};
    on_ranks(s.R, [&](Wire& wire) {
        const size_t r = size_t(wire.rank);
        Received& got = result.got[r];
        dispatch(got, wire, trip, s.x[r].data(), s.idx[r].data(), s.weight[r].data(), s.T[r]);
        const Vector made = run_own(s, got, wire.rank);
        result.out[r].resize(s.x[r].size());
        combine(result.out[r].data(), s.weight[r].data(), s.T[r], wire, trip, got, made.data());
    });
    return result;
}

// One token's sum, as the chapter's text says it.
static Vector expected(const Scene& s, size_t r, int t, const Trip& trip) {
    auto through = [](Vector x, Dtype d) {
        for (real& v : x) if (d == Dtype::BF16) v = bf16_to_float(float_to_bf16(float(v)));
        return x;
    };
    auto add_to = [](Vector& sum, const Vector& x, real w) {
        for (size_t i = 0; i < x.size(); i++) sum[i] = std::fma(w, x[i], sum[i]);
    };
    Vector row(s.x[r].begin() + t * s.D, s.x[r].begin() + (t + 1) * s.D), sum(static_cast<size_t>(s.D));
    if (trip.there != REAL) row = through(row, trip.there);
    if (trip.order == CombineOrder::EXPERT) {
        for (int k = 0; k < s.K; k++) {
            const size_t pair = size_t(t * s.K + k);
            const int e = s.idx[r][pair];
            if (e >= 0) add_to(sum, through(expert_of(e, row.data(), s.D), trip.back), s.weight[r][pair]);
        }
        return sum;
    }
    const bool nodes = trip.order == CombineOrder::HIERARCHICAL;
    for (int n = 0; n < s.shape().nodes(); n++) {
        Vector node(static_cast<size_t>(s.D));
        for (int rank = s.shape().begin(n); rank < s.shape().end(n); rank++) {
            if (!s.goes(int(r), t, rank)) continue;
            Vector part(static_cast<size_t>(s.D));
            for (int k = 0; k < s.K; k++) {
                const int e = s.idx[r][size_t(t * s.K + k)];
                if (e >= 0 && s.owner(e) == rank)
                    add_to(part, expert_of(e, row.data(), s.D), s.weight[r][size_t(t * s.K + k)]);
            }
            add_to(nodes ? node : sum, through(part, trip.result()), 1);
        }
        if (nodes) add_to(sum, through(node, Dtype::BF16), 1);
    }
    return sum;
}

static std::vector<Scene> scenes() {
    return {{1, 1, 4, 2, {5}, 1},
            {2, 2, 5, 2, {4, 7}, 2},                     // R does not divide E
            {3, 3, 16, 4, {6, 0, 9}, 3},                 // one has no tokens
            {4, 2, 16, 4, {3, 8, 1, 5}, 4, true},        // two nodes, holes
            {5, 2, 7, 3, {2, 2, 2, 0, 4}, 5, true},      // the last node is smaller
            {4, 1, 16, 4, {3, 3, 3, 3}, 6},              // a rank a node
            {8, 4, 32, 6, {1, 2, 3, 4, 5, 6, 7, 8}, 7}};
}

TEST(Machines, RowsComeInTheOrderOfSourceAndToken) {
    for (const Scene& s : scenes()) {
        const Result all = on_all(s, s.trip());
        for (int r = 0; r < s.R; r++) {
            const Received& got = all.got[size_t(r)];
            int i = 0;
            for (int source = 0; source < s.R; source++) {
                for (int t = 0; t < s.T[size_t(source)]; t++) {
                    if (!s.goes(source, t, r)) continue;
                    ASSERT_LT(i, got.n);
                    EXPECT_EQ(got.source[size_t(i)], source);
                    EXPECT_EQ(got.token[size_t(i)], t);
                    for (int d = 0; d < s.D; d++)
                        ASSERT_EQ(got.x[size_t(i * s.D + d)], s.x[size_t(source)][size_t(t * s.D + d)]);
                    for (int k = 0; k < s.K; k++) {
                        const int e = s.idx[size_t(source)][size_t(t * s.K + k)];
                        const bool here = e >= 0 && s.owner(e) == r;
                        EXPECT_EQ(got.idx[size_t(i * s.K + k)], here ? e - s.first[size_t(r)] : -1);
                        EXPECT_EQ(got.weight[size_t(i * s.K + k)],
                                  here ? s.weight[size_t(source)][size_t(t * s.K + k)] : 0);
                    }
                    i++;
                }
            }
            EXPECT_EQ(i, got.n);
        }
    }
}

TEST(Machines, SlotsAreByExpertAndInTheOrderOfRows) {
    for (const Scene& s : scenes()) {
        const Result all = on_all(s, s.trip());
        for (const Received& got : all.got) {
            int pairs = 0;
            for (size_t i = 0; i < got.idx.size(); i++) {
                if (got.idx[i] < 0) {
                    EXPECT_EQ(got.slot[i], -1);
                    continue;
                }
                pairs++;
                EXPECT_GE(got.slot[i], got.first[size_t(got.idx[i])]);
                EXPECT_LT(got.slot[i], got.first[size_t(got.idx[i]) + 1]);
                EXPECT_EQ(got.row[size_t(got.slot[i])], int(i) / s.K);
            }
            EXPECT_EQ(pairs, got.first.back());
            for (size_t e = 0; e + 1 < got.first.size(); e++)
                EXPECT_TRUE(std::is_sorted(got.row.begin() + got.first[e],
                                           got.row.begin() + got.first[e + 1]));
        }
    }
}

TEST(Machines, EachOrderOfCombineIsTheSumOfItsDefinition) {
    for (const Scene& s : scenes()) {
        for (auto order : {CombineOrder::EXPERT, CombineOrder::RANK, CombineOrder::HIERARCHICAL}) {
            for (Dtype there : {REAL, Dtype::BF16}) {
                for (Dtype back : {REAL, Dtype::BF16}) {
                    Trip trip = s.trip(order);
                    trip.there = there, trip.back = back;
                    const Result all = on_all(s, trip);
                    for (size_t r = 0; r < size_t(s.R); r++)
                        for (int t = 0; t < s.T[r]; t++) {
                            const Vector want = expected(s, r, t, trip);
                            const real* out = all.out[r].data() + t * s.D;
                            ASSERT_TRUE(std::equal(want.begin(), want.end(), out))
                                << "R " << s.R << " order " << int(order) << " rank " << r << " token " << t;
                        }
                }
            }
        }
    }
}

TEST(Machines, WithExpertOrderTheNumberOfRanksDoesNotMatter) {
    for (int R : {1, 2, 3, 4, 6}) {
        Scene s(R, R, 13, 4, std::vector<int>(size_t(R)), 9);
        const Scene one(1, 1, 13, 4, {12}, 9);
        for (int r = 0; r < R; r++) {                    // its tokens, spread
            const int begin = 12 * r / R, end = 12 * (r + 1) / R;
            s.T[size_t(r)] = end - begin;
            s.idx[size_t(r)].assign(one.idx[0].begin() + begin * 4, one.idx[0].begin() + end * 4);
            s.weight[size_t(r)].assign(one.weight[0].begin() + begin * 4, one.weight[0].begin() + end * 4);
            s.x[size_t(r)].assign(one.x[0].begin() + begin * s.D, one.x[0].begin() + end * s.D);
        }
        for (Dtype there : {REAL, Dtype::F8_E4M3}) {
            Trip trip = s.trip(), alone = one.trip();
            trip.there = alone.there = there;
            Vector together;
            for (const Vector& out : on_all(s, trip).out)
                together.insert(together.end(), out.begin(), out.end());
            EXPECT_EQ(together, on_all(one, alone).out[0]) << R;
        }
    }
}

TEST(Machines, Fp8RowsAreTilesOfDeepEp) {
    const Scene s(2, 2, 4, 2, {3, 2}, 11);
    Trip trip = s.trip();
    trip.there = Dtype::F8_E4M3;
    const Result all = on_all(s, trip);
    for (int r = 0; r < 2; r++) {
        const Received& got = all.got[size_t(r)];
        for (int i = 0; i < got.n; i++) {
            const real* x = s.x[size_t(got.source[size_t(i)])].data() + got.token[size_t(i)] * s.D;
            for (int begin = 0; begin < s.D; begin += 128) {
                const int end = std::min(begin + 128, s.D);
                float amax = 1e-4f;
                for (int d = begin; d < end; d++) amax = std::max(amax, std::abs(float(x[d])));
                for (int d = begin; d < end; d++) {
                    const float q = e4m3_to_float(float_to_e4m3(float(x[d]) * (448 / amax)));
                    EXPECT_EQ(got.x[size_t(i * s.D + d)], real(q) * real(amax * (1 / 448.0f)));
                }
            }
        }
    }
}

TEST(Machines, BytesCountedAreBytesComputed) {
    for (const Scene& s : scenes()) {
        for (auto order : {CombineOrder::EXPERT, CombineOrder::RANK, CombineOrder::HIERARCHICAL}) {
            const Trip trip = s.trip(order);
            const Result all = on_all(s, trip);
            Traffic there, back, counted_there, counted_back;
            for (const Received& got : all.got) {
                counted_there.slow += got.there.slow, counted_there.fast += got.there.fast;
                counted_back.slow += got.back.slow, counted_back.fast += got.back.fast;
            }
            const RankShape shape = s.shape();
            for (int source = 0; source < s.R; source++) {
                for (int t = 0; t < s.T[size_t(source)]; t++) {
                    for (int n = 0; n < shape.nodes(); n++) {
                        const int hand = shape.forwarder(source, n);
                        uint64_t ranks = 0, results = 0;
                        for (int r = shape.begin(n); r < shape.end(n); r++) {
                            uint64_t pairs = 0;
                            for (int k = 0; k < s.K; k++) {
                                const int e = s.idx[size_t(source)][size_t(t * s.K + k)];
                                pairs += e >= 0 && s.owner(e) == r;
                            }
                            const uint64_t n_results = order == CombineOrder::EXPERT ? pairs : pairs > 0;
                            ranks += pairs > 0, results += n_results;
                            if (r != hand)
                                there.fast += (pairs > 0) * trip.packet(),
                                back.fast += n_results * trip.result_packet();
                        }
                        if (n == shape.node(source) || ranks == 0) continue;
                        there.slow += trip.packet();
                        const bool summed = order == CombineOrder::HIERARCHICAL;
                        back.slow += (summed ? 1 : results) * trip.result_packet();
                    }
                }
            }
            EXPECT_EQ(there.slow, counted_there.slow);
            EXPECT_EQ(there.fast, counted_there.fast);
            EXPECT_EQ(back.slow, counted_back.slow);
            EXPECT_EQ(back.fast, counted_back.fast);
        }
    }
}

// DeepEP's layout of two tokens, by hand: 4 ranks of 2 experts, nodes of 2.
TEST(Machines, LayoutOfTwoTokens) {
    const int first[] = {0, 2, 4, 6, 8}, idx[] = {0, 1, 5, -1, 3, 2};
    int per_rank[4], per_node[2], per_expert[8];
    uint8_t in_rank[8];
    dispatch_layout({per_rank, per_node, per_expert, in_rank}, idx, 2, 3, {4, 2, first});
    EXPECT_EQ(std::vector(per_rank, per_rank + 4), (std::vector{1, 1, 1, 0}));
    EXPECT_EQ(std::vector(per_node, per_node + 2), (std::vector{2, 1}));
    EXPECT_EQ(std::vector(per_expert, per_expert + 8), (std::vector{1, 1, 1, 1, 0, 1, 0, 0}));
    EXPECT_EQ(std::vector<int>(in_rank, in_rank + 8), (std::vector{1, 0, 1, 0, 0, 1, 0, 0}));
}

TEST(Machines, ARankThatFailsEndsTheOthers) {
    EXPECT_THROW(on_ranks(3, [](Wire& wire) {
        Parcels out(3), in;
        if (wire.rank == 1) fail("this one");
        for (int i = 0; i < 3; i++) wire.exchange(out, in);
    }), UserError);
}

// -- 15.5 --------------------------------------------------------------------------------------------

// The example of EPLB's own README: 12 experts in 4 groups, 16 copies, 2 nodes of 4 GPUs.
TEST(Machines, CopiesOfEplb) {
    EXPECT_EQ(rebalance_experts({90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86}, 16, 4, 2, 8),
              (std::vector{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
    EXPECT_EQ(rebalance_experts({20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}, 16, 4, 2, 8),
              (std::vector{7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}));
}

// Equal loads: nothing moves, the first experts are copied first.
TEST(Machines, TiesGoToTheFirst) {
    EXPECT_EQ(rebalance_experts({1, 1, 1, 1}, 4, 1, 1, 2), (std::vector{0, 2, 1, 3}));
    EXPECT_EQ(rebalance_experts({1, 1, 1, 1}, 6, 1, 1, 1), (std::vector{2, 3, 0, 1, 0, 1}));
    EXPECT_EQ(rebalance_experts({1, 2, 3, 4}, 4, 2, 2, 4), (std::vector{0, 1, 2, 3}));   // one a pack
}

TEST(Machines, CopiesAreCompleteAndEven) {
    Rng rng{3};
    for (auto [E, P, groups, nodes, R] : {std::array{16, 16, 4, 2, 4}, {16, 24, 4, 2, 4}, {16, 20, 4, 3, 5},
                                          {7, 9, 1, 1, 3}, {256, 288, 8, 4, 32}, {64, 64, 1, 1, 1}}) {
        std::vector<double> load;
        for (int e = 0; e < E; e++) load.push_back(std::floor(1000 * std::pow(rng.uniform(), 6)));
        const std::vector<int> copies = rebalance_experts(load, P, groups, nodes, R);
        std::vector<int> count(static_cast<size_t>(E));
        ASSERT_EQ(int(copies.size()), P);
        for (int e : copies) count[size_t(e)]++;
        EXPECT_GE(*std::min_element(count.begin(), count.end()), 1);
        double mean = 0, most = 0, heaviest = 0;
        for (int e = 0; e < E; e++) {
            mean += load[size_t(e)] / R;
            heaviest = std::max(heaviest, load[size_t(e)] / count[size_t(e)]);
        }
        for (int r = 0; r < R; r++) {
            double work = 0;
            for (int p = P / R * r; p < P / R * (r + 1); p++)
                work += load[size_t(copies[size_t(p)])] / count[size_t(copies[size_t(p)])];
            most = std::max(most, work);
        }
        if (groups % nodes) {                                          // packing into the lightest
            EXPECT_LE(most, mean + heaviest);
        }
        std::map<int, std::set<int>> homes;                            // a group's copies share a node
        for (int p = 0; p < P; p++) homes[copies[size_t(p)] / (E / groups)].insert(p / (P / nodes));
        for (auto& [group, where] : homes) {
            EXPECT_TRUE(where.size() == 1 || groups % nodes) << group;
        }
    }
}

// -- 15.6 --------------------------------------------------------------------------------------------

static double idle(const Plan& plan, const Costs& costs, int rank) {
    double busy = 0;
    for (const Step& step : plan.ranks[size_t(rank)]) busy += costs.of(step);
    return run_plan(plan, costs).end - busy;
}

TEST(Pipelines, BubblesAreThoseOfThePapers) {
    const Costs costs{1, 1, 1, 0, 0};
    for (int P : {2, 4, 8, 16}) {
        for (int M : {2 * P, 2 * P + 2, 5 * P}) {
            const int n = P - 1;
            const std::pair<Schedule, int> expected[] = {
                {Schedule::GPIPE, n * 3}, {Schedule::ONE_F_ONE_B, n * 3}, {Schedule::ZB1P, n},
                {Schedule::DUALPIPE, (P / 2 - 1) * 2}, {Schedule::DUALPIPEV, n * 2}};
            for (auto [schedule, bubble] : expected) {
                const Plan plan = make_plan(schedule, P, M);
                ASSERT_EQ(run_plan(plan, costs).wrong, "") << int(schedule) << " " << P << " " << M;
                for (int r = 0; r < P; r++) EXPECT_EQ(idle(plan, costs, r), bubble) << int(schedule);
            }
        }
    }
}

// V3's figure 5: 8 ranks, 20 micro-batches; rank 0 begins with 6 forwards of its end.
TEST(Pipelines, DualPipeOfTheFigure) {
    const Plan plan = make_plan(Schedule::DUALPIPE, 8, 20);
    std::string words;
    for (size_t i = 0; i < 9; i++) words += label(plan.ranks[0][i]) + " ";
    EXPECT_EQ(words, "F0 F1 F2 F3 F4 F5 F6 F10 b10 ");
    EXPECT_EQ(label(plan.ranks[7][0]), "F10");
    EXPECT_EQ(label(plan.ranks[3][0]), "F0");
    EXPECT_EQ(label(plan.ranks[3][1]), "F10");
}

TEST(Pipelines, MemoryIsThatOfThePapers) {
    for (int P : {4, 8}) {
        auto most = [&](Schedule schedule) {
            const Plan plan = make_plan(schedule, P, 4 * P);
            const Costs costs;
            const Measured m = measure(plan, costs, run_plan(plan, costs));
            return *std::max_element(m.alive.begin(), m.alive.end());
        };
        EXPECT_EQ(most(Schedule::GPIPE), 4 * P);
        EXPECT_EQ(most(Schedule::ONE_F_ONE_B), P);
        EXPECT_EQ(most(Schedule::ZB1P), P);
        EXPECT_EQ(most(Schedule::DUALPIPE), P + 1);
        EXPECT_EQ(most(Schedule::DUALPIPEV), 2 * P + 1);
    }
}

TEST(Pipelines, WhatCannotBeExecutedIsSeen) {
    const Costs costs;
    auto broken = [&](auto change) {
        Plan plan = make_plan(Schedule::ONE_F_ONE_B, 4, 8);
        change(plan.ranks);
        return run_plan(plan, costs).wrong;
    };
    using Ranks = std::vector<std::vector<Step>>;
    EXPECT_EQ(broken([](Ranks&) {}), "");
    const std::string stuck = broken([](Ranks& r) { std::swap(r[3][0], r[3][1]); });
    EXPECT_NE(stuck.find("waits for ever"), std::string::npos) << stuck;
    EXPECT_NE(broken([](Ranks& r) { r[1].pop_back(); }), "");
    EXPECT_NE(broken([](Ranks& r) { r[2].push_back(r[2].back()); }).find("twice"), std::string::npos);
    EXPECT_NE(broken([](Ranks& r) { std::swap(r[1], r[2]); }).find("has not stage"), std::string::npos);
    EXPECT_NE(broken([](Ranks& r) { r[3].erase(r[3].begin()); }), "");
    Plan early = make_plan(Schedule::ZB1P, 4, 8);        // weights before the inputs that they belong to
    auto& last = early.ranks[3];
    const auto w = std::find_if(last.begin(), last.end(), [](const Step& s) { return s[0].kind == 'W'; });
    std::rotate(last.begin(), w, w + 1);
    EXPECT_NE(run_plan(early, costs).wrong.find("waits for ever"), std::string::npos);
}

TEST(Pipelines, RefusedWithTheReason) {
    auto reason = [](Schedule schedule, int P, int M) {
        try {
            make_plan(schedule, P, M);
        } catch (const UserError& e) {
            return std::string(e.what());
        }
        return std::string();
    };
    EXPECT_NE(reason(Schedule::DUALPIPE, 5, 20).find("odd"), std::string::npos);
    EXPECT_NE(reason(Schedule::DUALPIPE, 4, 9).find("odd"), std::string::npos);
    EXPECT_NE(reason(Schedule::DUALPIPE, 8, 14).find("needs 2 a rank, 16"), std::string::npos);
    EXPECT_NE(reason(Schedule::DUALPIPEV, 3, 5).find("needs 2 a rank, 6"), std::string::npos);
    EXPECT_NE(reason(Schedule::ZB1P, 4, 3).find("needs one a rank"), std::string::npos);
    EXPECT_EQ(reason(Schedule::GPIPE, 5, 1), "");
}

// In 1F1B every forward and backward waits for its communication. In DualPipe most are of a pair.
TEST(Pipelines, CommunicationIsHiddenInPairs) {
    const Costs costs{1, 1, 1, 0.75, 0};
    for (int P : {4, 8}) {
        for (auto schedule : {Schedule::ONE_F_ONE_B, Schedule::DUALPIPE, Schedule::DUALPIPEV}) {
            const Plan plan = make_plan(schedule, P, 8 * P);
            const Timetable t = run_plan(plan, costs);
            const Measured m = measure(plan, costs, t);
            EXPECT_EQ(m.communication, 2 * 0.75 * 8 * P * plan.stages);
            EXPECT_NEAR(*std::max_element(m.bubble.begin(), m.bubble.end()), formula_of(plan, costs).bubble,
                        1e-9) << int(schedule);
            const double share = m.hidden / m.communication;
            EXPECT_EQ(schedule == Schedule::ONE_F_ONE_B, share == 0);
            EXPECT_EQ(schedule != Schedule::ONE_F_ONE_B, share > 0.75);
        }
    }
}
