// Chapter 6: RoPE frequencies, the two layouts, and what a rotation keeps.
#include "unit.h"

// The configuration of the released models: 10000, 40 times 4096.
static RopeConfig yarn(double mscale, double mscale_all_dim) {
    RopeConfig c;
    c.scaling = Scaling::YARN, c.factor = 40, c.original_context = 4096;
    c.mscale = mscale, c.mscale_all_dim = mscale_all_dim;
    return c;
}
static RopeConfig llama3() {
    RopeConfig c;
    c.theta = 500000, c.scaling = Scaling::LLAMA3, c.factor = 8, c.original_context = 8192;
    c.low_freq_factor = 1, c.high_freq_factor = 4;
    return c;
}

// Published digits are compared digit by digit: no tolerance.
static std::string digits(double x, int n) { return text_of("%.*e", n - 1, x); }
static std::string decimals(double x, int n) { return text_of("%.*f", n, x); }

// -- 6.1 frequencies --------------------------------------------------------------------------------

// pow in double is within a unit in the last place, 2^-52.
TEST(Frequencies, ArePowersOfTheta) {
    for (double theta : {10000.0, 500000.0, 1e6}) {
        RopeConfig c;
        c.theta = theta;
        Rope rope = make_rope(c, 128);
        ASSERT_EQ(rope.frequency.size(), 64u);
        for (int i = 0; i < 64; i++) {
            long double exact = std::pow((long double)(theta), -2.0L * i / 128);
            EXPECT_LE(std::fabs(rope.frequency[size_t(i)] - exact), 0x1p-52L * exact) << i;
        }
    }
}
TEST(Frequencies, WithoutScalingLeaveTheScoresAlone) {
    Rope rope = make_rope(RopeConfig{}, 64);
    EXPECT_TRUE(rope.magnitude == 1 && rope.score_scale == 1);
}
TEST(Yarn, BlendsBetweenPairs10And23) {
    EXPECT_EQ(decimals(yarn_pair(yarn(1, 1), 64, 32), 4), "10.4722");
    EXPECT_EQ(decimals(yarn_pair(yarn(1, 1), 64, 1), 4), "22.5134");
}
TEST(Yarn, Frequencies) {
    Rope rope = make_rope(yarn(1, 1), 64);
    const std::pair<size_t, const char*> expected[] = {
        {0, "1.000000000e+00"},  {10, "5.623413252e-02"}, {11, "3.900692657e-02"}, {12, "2.687936011e-02"},
        {15, "8.334508951e-03"}, {16, "5.500000000e-03"}, {20, "7.905694150e-04"}, {22, "1.778279410e-04"},
        {23, "3.333803580e-05"}, {31, "3.333803580e-06"}};
    for (auto [i, text] : expected) EXPECT_EQ(digits(rope.frequency[i], 10), text) << i;
}
TEST(Yarn, KeepsFastPairsAndDividesSlowOnes) {
    Rope plain = make_rope(RopeConfig{}, 64), rope = make_rope(yarn(1, 1), 64);
    for (size_t i = 0; i <= 10; i++) EXPECT_EQ(rope.frequency[i], plain.frequency[i]);
    for (size_t i = 23; i < 32; i++) EXPECT_EQ(rope.frequency[i], plain.frequency[i] / 40);
}
TEST(Yarn, HasAStepWhereTheRampIsEmpty) {
    RopeConfig c = yarn(1, 1);
    c.original_context = 32 * 2 * 3.14159265358979323846, c.beta_slow = 32;   // both ends at pair 0
    Rope rope = make_rope(c, 64);
    EXPECT_EQ(rope.frequency[0], 1);
    EXPECT_EQ(rope.frequency[1], std::pow(10000, -2.0 / 64) / 40);
}
TEST(Yarn, Mscale) {
    EXPECT_EQ(decimals(yarn_mscale(40, 0.707), 10), "1.2608037774");
    EXPECT_EQ(decimals(yarn_mscale(40, 1.0), 10), "1.3688879454");
    EXPECT_EQ(yarn_mscale(1, 1), 1);
    EXPECT_EQ(yarn_mscale(0.5, 1), 1);
}
TEST(Yarn, ScalesTheScoresByMscaleSquared) {
    EXPECT_EQ(decimals(make_rope(yarn(0.707, 0.707), 64).score_scale, 9), "1.589626165");
    EXPECT_EQ(decimals(make_rope(yarn(1, 1), 64).score_scale, 10), "1.8738542071");
}
TEST(Yarn, SoftmaxScales) {
    EXPECT_EQ(decimals(make_rope(yarn(0.707, 0.707), 64).score_scale / std::sqrt(192.0), 10), "0.1147213868");
    EXPECT_EQ(decimals(make_rope(yarn(1, 1), 64).score_scale / std::sqrt(192.0), 10), "0.1352337789");
    EXPECT_EQ(decimals(make_rope(RopeConfig{}, 64).score_scale / std::sqrt(192.0), 10), "0.0721687836");
}
TEST(Yarn, RotatesWithoutMagnitudeInEveryReleasedModel) {
    EXPECT_EQ(make_rope(yarn(0.707, 0.707), 64).magnitude, 1);
    EXPECT_EQ(make_rope(yarn(1, 1), 64).magnitude, 1);
}
TEST(Yarn, MagnitudeIsARatio) {
    EXPECT_EQ(digits(make_rope(yarn(1, 0.707), 64).magnitude, 10), digits(1.3688879454 / 1.2608037774, 10));
    EXPECT_EQ(decimals(make_rope(yarn(1, 0), 64).magnitude, 10), "1.3688879454");
}
TEST(Llama3, Frequencies) {
    Rope rope = make_rope(llama3(), 128);
    const std::pair<size_t, const char*> expected[] = {{28, "3.211446e-03"}, {29, "2.166571e-03"},
                                                       {30, "1.371894e-03"}, {32, "5.248462e-04"},
                                                       {35, "9.556212e-05"}, {63, "3.068926e-07"}};
    for (auto [i, text] : expected) EXPECT_EQ(digits(rope.frequency[i], 7), text) << i;
}
TEST(Llama3, LeavesTheScoresAlone) {
    Rope rope = make_rope(llama3(), 128);
    EXPECT_TRUE(rope.magnitude == 1 && rope.score_scale == 1);
}

// pos * frequency is rounded once in double (2^-53 of the angle), cos in double within a unit in the last
// place of at most 1 (2^-53), then rounded to `real`.
static long double table_error(double angle) { return U + 0x1p-53L * (std::fabs(angle) + 1); }

TEST(RopeTable, IsNearCosAndSinUpToTheLastPosition) {
    for (const RopeConfig& c : {RopeConfig{}, yarn(1, 1), llama3()}) {
        Rope rope = make_rope(c, 64);
        for (int pos : {0, 1, 4095, 163839}) {
            Vector table(64);
            rope_table(table.data(), rope, 1, pos);
            for (size_t i = 0; i < 32; i++) {
                long double angle = (long double)(pos)*rope.frequency[i], bound = table_error(double(angle));
                EXPECT_LE(std::fabs(table[2 * i] - std::cos(angle)), bound) << pos << " " << i;
                EXPECT_LE(std::fabs(table[2 * i + 1] - std::sin(angle)), bound) << pos << " " << i;
            }
        }
    }
}
TEST(RopeTable, AtPositionZeroDoesNothing) {
    Vector table(64);
    rope_table(table.data(), make_rope(yarn(1, 1), 64), 1, 0);
    for (size_t i = 0; i < 64; i++) EXPECT_EQ(table[i], i % 2 ? 0 : 1);
}
TEST(RopeTable, IsTheSameForOneTokenAndForMany) {
    Rope rope = make_rope(yarn(1, 0.707), 20);
    Vector all(5 * 20), one(20);
    rope_table(all.data(), rope, 5, 77);
    for (int t = 0; t < 5; t++) {
        rope_table(one.data(), rope, 1, 77 + t);
        EXPECT_TRUE(same_bits(one.data(), all.data() + t * 20, 20)) << t;
    }
}
TEST(RopeTable, CarriesTheMagnitude) {
    Rope rope = make_rope(RopeConfig{}, 2);
    rope.magnitude = 2;
    real table[2];
    rope_table(table, rope, 1, 1);
    EXPECT_EQ(table[0], real(2 * std::cos(1.0)));
    EXPECT_EQ(table[1], real(2 * std::sin(1.0)));
}

// -- 6.2 rotation -----------------------------------------------------------------------------------

// One head of one token.
static Heads one(Vector& x) { return {x.data(), 0, 0, 1, 1}; }

TEST(Rotation, ByAQuarterTurn) {
    const real quarter[] = {0, 1, 0, 1};
    Vector interleaved = {1, 2, 3, 4}, half = {1, 2, 3, 4};
    rope_interleaved(one(interleaved), quarter, 4);
    rope_half(one(half), quarter, 4);
    EXPECT_EQ(interleaved, (Vector{-2, 1, -4, 3}));   // pairs (1 2) (3 4)
    EXPECT_EQ(half, (Vector{-3, -4, 1, 2}));          // pairs (1 3) (2 4)
}
TEST(Rotation, TheLayoutsArePermutationsOfEachOther) {
    Noise noise;
    Vector table(64), interleaved = noise.vector(64), half(64);
    rope_table(table.data(), make_rope(yarn(1, 1), 64), 1, 1234);
    for (size_t i = 0; i < 64; i++) half[i / 2 + i % 2 * 32] = interleaved[i];
    rope_interleaved(one(interleaved), table.data(), 64);
    rope_half(one(half), table.data(), 64);
    for (size_t i = 0; i < 64; i++) EXPECT_EQ(half[i / 2 + i % 2 * 32], interleaved[i]) << i;
}

// The two pairs' dot product after rotation by `distance`.
static long double rotated_dot(const real* q, const real* k, long double angle) {
    long double c = std::cos(angle), s = std::sin(angle);
    return c * ((long double)(q[0]) * k[0] + (long double)(q[1]) * k[1]) -
           s * ((long double)(q[1]) * k[0] - (long double)(q[0]) * k[1]);
}

// A score sees the distance alone. Errors of a pair, with P = |q0| + |q1| and Q likewise for k: a rotated
// number is off by (table_error + 2 U) P (two products, one difference), so each of the two products of the
// dot by twice that times Q.
TEST(Rotation, KeepsTheDotProductOfARelativePosition) {
    Noise noise;
    Rope rope = make_rope(yarn(1, 1), 64);
    Vector q = noise.vector(64), k = noise.vector(64), table(64);
    for (auto [m, n] : {std::pair{0, 0}, std::pair{5, 3}, std::pair{4100, 2}, std::pair{163839, 163800}}) {
        Vector qm = q, kn = k;
        rope_table(table.data(), rope, 1, m), rope_interleaved(one(qm), table.data(), 64);
        rope_table(table.data(), rope, 1, n), rope_interleaved(one(kn), table.data(), 64);
        long double dot = 0, exact = 0, bound = 0;
        for (size_t i = 0; i < 64; i += 2) {
            long double size = (std::fabs((long double)(q[i])) + std::fabs((long double)(q[i + 1]))) *
                               (std::fabs((long double)(k[i])) + std::fabs((long double)(k[i + 1])));
            dot += (long double)(qm[i]) * kn[i] + (long double)(qm[i + 1]) * kn[i + 1];
            exact += rotated_dot(&q[i], &k[i], (long double)(m - n) * rope.frequency[i / 2]);
            bound += 4 * 1.01L * (table_error(m * rope.frequency[i / 2]) + 2 * U) * size;
        }
        EXPECT_LE(std::fabs(dot - exact), bound) << m << " " << n;
    }
}
// Each vector of each token by its own position, and nothing between them: heads may lie at any distance.
TEST(Rotation, OfManyHeadsAndTokens) {
    const int T = 5, H = 3, dim = 8, head = dim + 2, token = H * head + 1;
    Noise noise;
    Vector table(size_t(T * dim));
    rope_table(table.data(), make_rope(yarn(1, 1), dim), T, 1000);
    for (auto rope : {rope_interleaved, rope_half}) {
        Vector x = noise.vector(size_t(T * token)), expected = x;
        for (int i = 0; i < T * H; i++) {
            Heads alone{expected.data() + i / H * token + i % H * head, 0, 0, 1, 1};
            rope(alone, table.data() + i / H * dim, dim);
        }
        rope({x.data(), token, head, T, H}, table.data(), dim);
        EXPECT_TRUE(same_bits(x, expected));
    }
}
TEST(Rotation, TurnsTheQueryForward) {
    Vector table(2), x = {1, 0};
    rope_table(table.data(), make_rope(RopeConfig{}, 2), 1, 1);
    rope_interleaved(one(x), table.data(), 2);
    EXPECT_EQ(x, (Vector{real(std::cos(1.0)), real(std::sin(1.0))}));
}
