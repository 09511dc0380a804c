// Chapter 14: quantising to e4m3, what a tensor core sums, and the forward pass in fewer bits.
#include "unit.h"

namespace chapter_14 {

static float value_of(uint8_t q) { return E4M3[q]; }

// -- 14.1 scales ------------------------------------------------------------------------------------

static const Fp8Formula FORMULAS[] = {Fp8Formula::V3, Fp8Formula::V32, Fp8Formula::DEEPGEMM,
                                      Fp8Formula::DEEPEP, Fp8Formula::TILEKERNELS, Fp8Formula::FLASHMLA};

TEST(Fp8Scale, HasTheLargestBe448) {
    for (Fp8Formula f : FORMULAS) {
        TileScale t = tile_scale(f, 896, false);                     // 448 * 2: every formula is exact
        EXPECT_EQ(t.s, 2) << int(f);
        EXPECT_EQ(t.inverse == 0 ? 0.5f : t.inverse, 0.5f) << int(f);
        EXPECT_EQ(tile_scale(f, 896, true).s, 2) << int(f);          // a power of two stays
        EXPECT_EQ(tile_scale(f, 897, true).s, 4) << int(f);          // and else goes up
    }
}
TEST(Fp8Scale, HasAFloor) {
    for (Fp8Formula f : FORMULAS) {
        EXPECT_EQ(tile_scale(f, 0, false).s, tile_scale(f, 1e-4f, false).s);
        EXPECT_EQ(tile_scale(f, 9e-5f, true).s, tile_scale(f, 1e-4f, true).s);
        bool of_amax = f != Fp8Formula::FLASHMLA;                    // 1e-4 / 448 = 2.23e-7, above 2^-23
        EXPECT_EQ(tile_scale(f, 0, true).s, of_amax ? 0x1p-22f : 0x1p-13f);
    }
}
// FlashMLA's is that of the scale: 1e-4, above 2^-14. From there on it is V3's.
TEST(Fp8Scale, OfFlashMlaHasItsFloorAbove) {
    EXPECT_EQ(tile_scale(Fp8Formula::FLASHMLA, 0, false).s, 1e-4f);
    for (float amax = 1; amax > 1e-6f; amax *= 0.9f) {
        float v3 = tile_scale(Fp8Formula::V3, amax, true).s;
        EXPECT_EQ(tile_scale(Fp8Formula::FLASHMLA, amax, true).s, std::max(v3, 0x1p-13f)) << amax;
    }
}
// amax * (1 / 448) and amax / 448 differ for some amax: the formulas are not one.
TEST(Fp8Scale, FormulasDifferInTheLastBit) {
    int differ = 0;
    for (float amax = 1; amax < 2; amax += 0x1p-8f) {
        float divided = amax / 448, multiplied = amax * (1.0f / 448);
        EXPECT_EQ(tile_scale(Fp8Formula::V3, amax, false).s, divided);
        EXPECT_EQ(tile_scale(Fp8Formula::DEEPGEMM, amax, false).s, divided);
        EXPECT_EQ(tile_scale(Fp8Formula::TILEKERNELS, amax, false).s, divided);
        EXPECT_EQ(tile_scale(Fp8Formula::FLASHMLA, amax, false).s, divided);
        EXPECT_EQ(tile_scale(Fp8Formula::V32, amax, false).s, multiplied);
        EXPECT_EQ(tile_scale(Fp8Formula::DEEPEP, amax, false).s, multiplied);
        differ += divided != multiplied;
    }
    EXPECT_GT(differ, 10);
}
// One step above a power of two: exact formulas go up to the next one, the logarithm rounded to f32 does not.
TEST(Fp8Scale, TheLogarithmRoundsDownJustAboveAPowerOfTwo) {
    float amax = std::nextafter(448 * 0x1p-10f, 1.0f);
    float exact = amax / 448 > 0x1p-10f ? 0x1p-9f : 0x1p-10f;
    EXPECT_EQ(tile_scale(Fp8Formula::DEEPGEMM, amax, true).s, exact);
    EXPECT_EQ(tile_scale(Fp8Formula::TILEKERNELS, amax, true).s, exact);
    EXPECT_EQ(tile_scale(Fp8Formula::V3, amax, true).s, 0x1p-10f);
    EXPECT_EQ(tile_scale(Fp8Formula::FLASHMLA, amax, true).s, 0x1p-10f);
    EXPECT_EQ(tile_scale(Fp8Formula::V3, 450 * 0x1p-10f, true).s, 0x1p-9f);
}

// -- 14.2 quantise_fp8 ------------------------------------------------------------------------------

struct InE4m3 {
    std::vector<uint8_t> q;
    std::vector<float> s;
    int rows, n, tile;

    InE4m3(const Vector& x, int rows, int n, const Fp8Format& f = {})
        : q(size_t(rows) * size_t(n)),
          s(size_t((rows + f.tile - 1) / f.tile) * size_t(scale_blocks(n))), rows(rows), n(n), tile(f.tile) {
        quantise_fp8(q.data(), s.data(), {x.data(), n}, rows, n, f);
    }
    Fp8Matrix matrix() const { return {q.data(), s.data(), rows, n, tile, 0}; }
    float value(int r, int i) const {
        return value_of(q[size_t(r * n + i)]) * s[size_t(r / tile * scale_blocks(n) + i / SCALE_BLOCK)];
    }
};

// Half a step of e4m3 is 2^-4 of a normal number; below 2^-6 the step is 2^-9. A factor of 1 + 4 * 2^-24 is
// for the scale and its inverse.
TEST(QuantiseFp8, IsNearX) {
    Noise noise;
    Vector x = noise.vector(size_t(5 * 300));
    for (size_t i = 0; i < x.size(); i += 7) x[i] *= real(0.01);
    for (Fp8Formula formula : FORMULAS) {
        for (bool ue8m0 : {false, true}) {
            InE4m3 y(x, 5, 300, {formula, ue8m0});
            for (int i = 0; i < 5 * 300; i++) {
                float s = y.s[size_t(i / 300 * 3 + i % 300 / 128)], v = float(x[size_t(i)]);
                float most = std::max(std::abs(v) / 16, s * 0x1p-10f) * (1 + 0x1p-22f);
                ASSERT_LE(std::abs(y.value(i / 300, i % 300) - v), most) << i;
            }
        }
    }
}
// The last tile of a row has a scale of its own numbers, of whatever number they are.
TEST(QuantiseFp8, TailsHaveScalesOfTheirOwn) {
    for (int n : {1, 127, 128, 129, 300}) {
        Vector x(size_t(n), 1);
        x.back() = 4480;
        InE4m3 y(x, 1, n);
        EXPECT_EQ(y.s.size(), size_t((n + 127) / 128));
        EXPECT_EQ(y.s.back(), 10) << n;
        if (n > 128) { EXPECT_EQ(y.s[0], 1 / 448.0f) << n; }
        EXPECT_EQ(y.value(0, n - 1), 4480) << n;
    }
}
TEST(QuantiseFp8, WeightsShareAScaleInSquares) {
    const int rows = 130, n = 140;
    Vector x(size_t(rows * n), 1);
    x[5 * n + 7] = 448 * 2, x[5 * n + 130] = 448 * 4, x[129 * n + 7] = 448 * 8, x[128 * n + 139] = 448 * 16;
    InE4m3 y(x, rows, n, {Fp8Formula::V3, false, 128});
    EXPECT_EQ(y.s, (std::vector<float>{2, 4, 8, 16}));
    EXPECT_EQ(y.value(127, 127), 1);
    EXPECT_EQ(y.value(128, 128), 1);
}
TEST(QuantiseFp8, OfZerosIsZero) {
    InE4m3 y(Vector(256), 1, 256);
    EXPECT_EQ(std::count(y.q.begin(), y.q.end(), 0), 256);
    EXPECT_EQ(y.s, std::vector<float>(2, 1e-4f / 448));
}
TEST(QuantiseFp8, ANumberThatIsNotFiniteMakesNaNOfItsTileAlone) {
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        Vector x(384, 1);
        x[200] = bad;
        InE4m3 y(x, 1, 384);
        for (int i = 0; i < 384; i++) EXPECT_EQ(y.q[size_t(i)] == 127, i / 128 == 1) << i;
        EXPECT_TRUE(std::isnan(y.s[1]) && y.s[0] == y.s[2] && std::isfinite(y.s[0]));
    }
}
TEST(QuantiseFp8, TiesGoToTheEvenCode) {
    Vector x = {448, 17, 19, -17, 0x1p-10, 3 * 0x1p-10};        // s = 1: steps of 2 there, of 2^-9 below 2^-6
    InE4m3 y(x, 1, 6);
    std::vector<float> expected = {448, 16, 20, -16, 0, 0x1p-8f};
    for (int i = 0; i < 6; i++) EXPECT_EQ(y.value(0, i), expected[size_t(i)]) << i;
}
TEST(QuantiseFp8, OfNothingWritesNothing) {
    uint8_t q = 5;
    float s = 7;
    quantise_fp8(&q, &s, {nullptr, 0}, 0, 128, {});
    quantise_fp8(&q, &s, {nullptr, 0}, 3, 0, {});
    EXPECT_EQ(q, 5);
    EXPECT_EQ(s, 7);
}
TEST(QuantiseFp8, NumberOfThreadsChangesNothing) {
    Vector x = Noise{}.vector(size_t(300 * 400));
    ScopedThreads one(1);
    InE4m3 a(x, 300, 400, {Fp8Formula::V3, false, 128});
    set_threads(5);
    InE4m3 b(x, 300, 400, {Fp8Formula::V3, false, 128});
    EXPECT_EQ(a.q, b.q);
    EXPECT_EQ(a.s, b.s);
}

TEST(StoreLatent, Has656BytesAToken) {
    EXPECT_EQ(row_bytes(Dtype::F8_LATENT, 576), 656u);
    Noise noise;
    const int T = 2, n[] = {3, 1};
    Vector x = noise.vector(size_t(T) * 576);
    std::vector<std::byte> bytes(size_t(4) * 656, std::byte(7));
    store_latent({bytes.data(), nullptr, Dtype::F8_LATENT, 4, 576}, n, {x.data(), 576});
    for (int t = 0; t < T; t++) {
        const std::byte* row = bytes.data() + (n[t] - 1) * 656;
        Vector back(576);
        widen_plain(back.data(), {row, nullptr, Dtype::F8_LATENT, 1, 576}, 0);
        for (int i = 0; i < 576; i++) {
            const float v = float(x[size_t(t * 576 + i)]), scale = load<float>(row + 512 + i / 128 * 4);
            if (i >= 512) {
                EXPECT_EQ(back[size_t(i)], real(bf16_to_float(float_to_bf16(v)))) << i;
                continue;
            }
            EXPECT_EQ(scale, 0x1p-8f) << i;                // amax / 448 of numbers below 1, rounded up
            EXPECT_EQ(back[size_t(i)], real(e4m3_to_float(float_to_e4m3(v / scale)) * scale)) << i;
        }
    }
    for (size_t i = 656; i < 1312; i++) EXPECT_EQ(bytes[i], std::byte(7));     // position 2 was no one's
    EXPECT_EQ(bytes[3 * 656], std::byte(7));
}

// -- 14.3 sums --------------------------------------------------------------------------------------

static uint8_t code(double x) { return float_to_e4m3(float(x)); }

// Codes of numbers and the sum of one instruction.
static float step(float c, const std::vector<double>& a, const std::vector<double>& b) {
    std::vector<uint8_t> x, y;
    for (double v : a) x.push_back(code(v));
    for (double v : b) y.push_back(code(v));
    return hopper_step(c, x.data(), y.data(), int(x.size()));
}

TEST(HopperStep, IsExactWhereNothingIsBelowThe13thBit) {
    EXPECT_EQ(step(0, {1, 2, 3}, {4, 5, 6}), 32);
    EXPECT_EQ(step(0, {1, -2}, {4, 2}), 0);
    EXPECT_FALSE(std::signbit(step(0, {1, -2}, {4, 2})));
    EXPECT_EQ(step(1.5f, {}, {}), 1.5f);
    EXPECT_EQ(step(0, {}, {}), 0);
}
// 2^13 is 13 places above 1: 1 is the last that is kept, what is below is lost, of either sign.
TEST(HopperStep, CutsTowardZero) {
    EXPECT_EQ(step(0, {256, 1}, {32, 1}), 8193);
    EXPECT_EQ(step(0, {256, 1}, {32, 0.875}), 8192);
    EXPECT_EQ(step(0, {256, -1}, {32, 0.875}), 8192);                 // floor would say 8191
    EXPECT_EQ(step(0, {256, -1}, {32, 1}), 8191);
    EXPECT_EQ(step(0, {256, 1, 1}, {32, 0.5, 0.5}), 8192);            // each term, not their sum
    EXPECT_EQ(step(0, {-256, -1}, {32, 0.875}), -8192);
}
// 14 bits of the sum: 2^14 + 1 has 15.
TEST(HopperStep, CutsTheSumToo) {
    EXPECT_EQ(step(0, {256, 256, 1}, {32, 32, 1}), 16384);
    EXPECT_EQ(step(0, {256, 256, 1, 1}, {32, 32, 1, 1}), 16386);
    EXPECT_EQ(step(0, {-256, -256, -1}, {32, 32, 1}), -16384);
}
// The accumulator loses its low 10 bits even where all products are 0.
TEST(HopperStep, TheAccumulatorIsATerm) {
    float c = 1 + 0x1p-13f + 0x1p-14f;
    EXPECT_EQ(step(c, {0}, {0}), 1 + 0x1p-13f);
    EXPECT_EQ(step(-c, {0}, {0}), -1 - 0x1p-13f);
    EXPECT_EQ(step(0x1p-5f, {256}, {32}), 8192);
    EXPECT_EQ(step(8192, {1}, {0.875}), 8192);
}
// Significands are not normalised: 1.5 * 1.5 = 2.25 is aligned as 2.25 * 2^0, so that 2^-13 is kept; and a
// subnormal as a fraction of 2^-6.
TEST(HopperStep, ProductsAreNotNormalised) {
    EXPECT_EQ(step(0, {1.5, -1.25, 0x1p-6}, {1.5, 1, 0x1p-7}), 1 + 0x1p-13f);
    EXPECT_EQ(step(0, {0x1p-9}, {0x1p-9}), 0x1p-18f);
    EXPECT_EQ(step(0, {0x1p-9, 0x1p-9}, {1, 0x1p-9}), 0x1p-9f + 0x1p-18f);   // 9 places, top is 2^-6: kept
    EXPECT_EQ(step(0, {1, 0}, {1, 448}), 1);                          // a zero does not raise the top
}
TEST(HopperStep, NaNIsOneNaN) {
    uint8_t one = code(1), nans[] = {127, 255}, zero = 0;
    for (uint8_t& nan : nans) {
        EXPECT_EQ(std::bit_cast<uint32_t>(hopper_step(0, &one, &nan, 1)), 0x7FFFFFFFu);
        EXPECT_EQ(std::bit_cast<uint32_t>(hopper_step(0, &nan, &zero, 1)), 0x7FFFFFFFu);
    }
    EXPECT_TRUE(std::isnan(hopper_step(NAN, &one, &one, 1)));
}
TEST(HopperStep, OrderInsideDoesNotCount) {
    Noise noise;
    std::vector<double> a, b;
    for (int i = 0; i < 32; i++) a.push_back(noise.next() * 9), b.push_back(noise.next() * 9);
    float forwards = step(0, a, b);
    std::reverse(a.begin(), a.end()), std::reverse(b.begin(), b.end());
    EXPECT_EQ(step(0, a, b), forwards);
}

static Vector positive(size_t n) {
    Vector x = Noise{}.vector(n);
    for (real& v : x) v = std::abs(v) + real(0.1);
    return x;
}

// A term of `promoted` goes through the roundings of a dot of 128 (chapter 5), of a scale, and of an fma for
// each block.
TEST(SumPromoted, IsWithinItsRoundingsOfExact) {
    constexpr double U32 = 0x1p-24;
    for (int n : {1, 128, 300, 2048}) {
        InE4m3 a(positive(size_t(n)), 1, n), b(positive(size_t(n)), 1, n);
        Fp8Pair p{a.q.data(), b.q.data(), a.s.data(), b.s.data(), n};
        double exact = sum_exact(p), roundings = 128 / LANES + 4 + 1 + double(scale_blocks(n));
        EXPECT_LE(std::abs(sum_promoted(p) - exact), exact * roundings * U32 * 1.01) << n;
        EXPECT_GT(exact, 0);
    }
}
// All terms positive: an instruction loses 2^-13 of the largest's power of two from each of 33 terms, and
// 2^-13 of the sum when it is cut. The sum is no less than that power.
TEST(SumHopper, IsBelowExactByAtMostItsBits) {
    for (int n : {32, 128, 300, 2048}) {
        InE4m3 a(positive(size_t(n)), 1, n), b(positive(size_t(n)), 1, n);
        Fp8Pair p{a.q.data(), b.q.data(), a.s.data(), b.s.data(), n};
        double exact = sum_exact(p), hopper = double(sum_hopper(p)), most = (33 + 1) * 0x1p-13;
        EXPECT_LE(hopper, exact * (1 + 0x1p-20)) << n;
        EXPECT_GE(hopper, exact * (1 - most)) << n;
    }
}
// What promotion is for: one chain over 7,168 products of one sign loses percents, 56 chains of 128 do not.
TEST(SumHopper, PromotionKeepsLongSums) {
    const int n = 7168;
    InE4m3 a(positive(size_t(n)), 1, n), b(positive(size_t(n)), 1, n);
    std::vector<float> ones(a.s.size(), 1);
    Fp8Pair p{a.q.data(), b.q.data(), ones.data(), ones.data(), n};
    double exact = sum_exact(p), chain = 0;
    for (int k = 0; k < n; k += 32) chain = double(hopper_step(float(chain), p.a + k, p.b + k, 32));
    EXPECT_LT(chain / exact, 0.97);
    EXPECT_GT(double(sum_hopper(p)) / exact, 0.998);
}

// -- 14.4 gemm_fp8 ----------------------------------------------------------------------------------

static const Fp8Sum SUMS[] = {Fp8Sum::EXACT, Fp8Sum::PROMOTED, Fp8Sum::HOPPER};

template <class T> std::byte* bytes_of(std::vector<T>& v) { return reinterpret_cast<std::byte*>(v.data()); }

// Small integers as e4m3, so that every arithmetic is exact: the sum must be that of a plain loop.
struct Integers {
    std::vector<uint8_t> q;
    std::vector<float> s;

    Integers(size_t numbers, size_t scales, uint64_t seed) {
        Noise noise{{seed}};
        for (size_t i = 0; i < numbers; i++) q.push_back(code(noise.below(7) - 3));
        for (size_t i = 0; i < scales; i++) s.push_back(float(1 << noise.below(4)));
    }
};
static double plain_sum(const Fp8Matrix& a, int m, const Fp8Matrix& b, int n) {
    double sum = 0;
    for (int k = 0; k < a.n; k++) {
        double s = double(a.scale[m / a.tile * scale_blocks(a.n) + k / 128]) *
                   double(b.scale[(b.first_row + n) / b.tile * scale_blocks(a.n) + k / 128]);
        sum += s * double(value_of(a.q[m * a.n + k])) * double(value_of(b.q[n * a.n + k]));
    }
    return sum;
}

TEST(GemmFp8, IsTheSumForEachShape) {
    for (Fp8Sum sum : SUMS) {
        for (auto [M, N, K] :
             {std::tuple{1, 1, 1}, {3, 129, 128}, {2, 5, 300}, {130, 3, 31}, {4, 260, 257}}) {
            size_t blocks = size_t(scale_blocks(K));
            Integers x(size_t(M * K), size_t(M) * blocks, 1);
            Integers w(size_t(N * K), size_t(scale_blocks(N)) * blocks, 2);
            Fp8Matrix a{x.q.data(), x.s.data(), M, K}, b{w.q.data(), w.s.data(), N, K, 128};
            std::vector<float> out(size_t(M * N), NAN);
            gemm_fp8({bytes_of(out), Dtype::F32}, a, b, sum);
            for (int i = 0; i < M * N; i++)
                ASSERT_EQ(double(out[size_t(i)]), plain_sum(a, i / N, b, i % N)) << int(sum) << " " << i;
            std::vector<float> twice = out;
            gemm_fp8({bytes_of(twice), Dtype::F32, true}, a, b, sum);
            for (size_t i = 0; i < out.size(); i++) ASSERT_EQ(twice[i], 2 * out[i]);
        }
    }
}
// Rows of a head begin in the middle of a scale block.
TEST(GemmFp8, AViewKeepsItsPlaceInTheBlock) {
    const int K = 130, first = 100, N = 60;
    Integers x(size_t(K), 2, 1), w(size_t(N * K), 4, 2);
    Fp8Matrix a{x.q.data(), x.s.data(), 1, K}, b{w.q.data(), w.s.data(), N, K, 128, first};
    std::vector<float> out(static_cast<size_t>(N));
    gemm_fp8({bytes_of(out), Dtype::F32}, a, b, Fp8Sum::EXACT);
    for (int n = 0; n < N; n++) EXPECT_EQ(double(out[size_t(n)]), plain_sum(a, 0, b, n)) << n;
}
TEST(GemmFp8, OfNothing) {
    Fp8Matrix a{nullptr, nullptr, 2, 0}, b{nullptr, nullptr, 3, 0, 128};
    for (Fp8Sum sum : SUMS) {
        std::vector<float> out(6, 5);
        gemm_fp8({bytes_of(out), Dtype::F32, true}, a, b, sum);
        EXPECT_EQ(out, std::vector<float>(6, 5)) << "K = 0, added";
        gemm_fp8({bytes_of(out), Dtype::F32}, a, b, sum);
        EXPECT_EQ(out, std::vector<float>(6, 0)) << "K = 0";
        out[0] = 9;
        gemm_fp8({bytes_of(out), Dtype::F32}, {nullptr, nullptr, 0, 128}, {nullptr, nullptr, 3, 128}, sum);
        gemm_fp8({bytes_of(out), Dtype::F32}, {nullptr, nullptr, 3, 128}, {nullptr, nullptr, 0, 128}, sum);
        EXPECT_EQ(out[0], 9) << "M = 0, N = 0";
    }
}
// 257 + 2^-30 rounds to 258 in bf16, though its f32, 257, is a tie that goes to 256.
TEST(GemmFp8, ExactRoundsOnce) {
    EXPECT_EQ(nearest_bf16(257 + 0x1p-30), 258);
    EXPECT_EQ(nearest_bf16(257), 256);
    EXPECT_EQ(nearest_bf16(-259), -260);
    EXPECT_EQ(nearest_bf16(0x1p-133), 0x1p-133f);
    EXPECT_EQ(nearest_bf16(0x1p-134), 0);
    EXPECT_EQ(nearest_bf16(1.5 * 0x1p-133), 0x1p-132f);
    EXPECT_TRUE(std::isinf(nearest_bf16(INFINITY)));
    std::vector<uint16_t> out(1, float_to_bf16(256));
    std::vector<uint8_t> q = {code(1)};
    float one = 1, s = 1 + 0x1p-20f;
    gemm_fp8({bytes_of(out), Dtype::BF16, true}, {q.data(), &one, 1, 1}, {q.data(), &s, 1, 1}, Fp8Sum::EXACT);
    EXPECT_EQ(bf16_to_float(out[0]), 258);
}
TEST(GemmFp8, NaNIsTheSameEverywhere) {
    std::vector<uint8_t> q = {255};
    float one = 1;
    for (Fp8Sum sum : SUMS) {
        std::vector<float> out(1);
        std::vector<uint16_t> half(1);
        gemm_fp8({bytes_of(out), Dtype::F32}, {q.data(), &one, 1, 1}, {q.data(), &one, 1, 1}, sum);
        gemm_fp8({bytes_of(half), Dtype::BF16}, {q.data(), &one, 1, 1}, {q.data(), &one, 1, 1}, sum);
        EXPECT_EQ(std::bit_cast<uint32_t>(out[0]), 0x7FC00000u) << int(sum);
        EXPECT_EQ(half[0], 0x7FC0u) << int(sum);
    }
}
TEST(GemmFp8, NumberOfThreadsChangesNothing) {
    Vector x = Noise{}.vector(size_t(9 * 500)), w = Noise{{2}}.vector(size_t(300 * 500));
    InE4m3 a(x, 9, 500), b(w, 300, 500, {Fp8Formula::V3, false, 128});
    ScopedThreads scoped(1);
    for (Fp8Sum sum : SUMS) {
        std::vector<float> one(9 * 300), five(9 * 300);
        set_threads(1);
        gemm_fp8({bytes_of(one), Dtype::F32}, a.matrix(), b.matrix(), sum);
        set_threads(5);
        gemm_fp8({bytes_of(five), Dtype::F32}, a.matrix(), b.matrix(), sum);
        EXPECT_EQ(std::memcmp(one.data(), five.data(), one.size() * 4), 0) << int(sum);
    }
}

// G experts' weights (G, N, K), whose N is no multiple of 128.
struct Experts {
    static constexpr int G = 3, N = 130, K = 140;
    Integers w{size_t(G * N * K), size_t(G * 2 * 2), 2};
    Fp8Matrix all{w.q.data(), w.s.data(), N, K, 128};
};

// Row m of `out` must be the product with expert g; of none where g is negative: then it holds `kept` still.
static void expect_row(const std::vector<float>& out, int64_t row, const Fp8Matrix& a, int m,
                       const Experts& e, int g) {
    for (int n = 0; n < Experts::N; n++) {
        float got = out[size_t(row * Experts::N + n)];
        if (g < 0) ASSERT_EQ(got, 5) << row;
        else ASSERT_EQ(double(got), plain_sum(a, m, e.all.group(g), n)) << row << " " << n;
    }
}

TEST(GemmFp8Contiguous, EachRowMeetsItsExpert) {
    Experts e;
    const int M = 512 + 40;
    Integers x(size_t(M * Experts::K), size_t(M * 2), 1);
    std::vector<int> group(size_t(M), -1);
    std::fill_n(group.begin(), 256, 2);                  // expert 1 has no rows
    std::fill_n(group.begin() + 256, 3, 0);              // 125 rows of padding, then a whole tile of it
    std::fill_n(group.begin() + 512, 40, 2);             // and an expert may come again
    for (size_t i = 0; i < group.size(); i++)
        for (int k = 0; k < 2 && group[i] < 0; k++) x.s[2 * i + size_t(k)] = NAN;       // never looked at
    Fp8Matrix a{x.q.data(), x.s.data(), M, Experts::K};
    for (Fp8Sum sum : SUMS) {
        std::vector<float> out(size_t(M * Experts::N), 5);
        gemm_fp8_contiguous({bytes_of(out), Dtype::F32}, a, e.all, group, sum);
        for (int m = 0; m < M; m += 3) expect_row(out, m, a, m, e, group[size_t(m)]);
    }
    gemm_fp8_contiguous({nullptr, Dtype::F32}, {nullptr, nullptr, 0, Experts::K}, e.all, {}, Fp8Sum::EXACT);
}
TEST(GemmFp8ContiguousDeathTest, AGroupBeginsAtATile) {
    Experts e;
    Integers x(size_t(8 * Experts::K), 16, 1);
    Fp8Matrix a{x.q.data(), x.s.data(), 8, Experts::K};
    std::vector<int> group = {0, 0, 0, 0, 1, 1, 1, 1};
    std::vector<float> out(8 * Experts::N);
    EXPECT_DEATH(gemm_fp8_contiguous({bytes_of(out), Dtype::F32}, a, e.all, group, Fp8Sum::EXACT),
                 "group 1 begins at row 4");
}

TEST(GemmFp8Masked, OnlyTheRowsThatAreThere) {
    Experts e;
    const int most = 7, K = Experts::K;
    std::vector<int> rows = {3, 0, 7};
    Integers x(size_t(3 * most * K), size_t(3 * most * 2), 1);
    for (int g = 0; g < 3; g++)
        for (int m = rows[size_t(g)]; m < most; m++) x.s[size_t(2 * (g * most + m))] = NAN;
    Fp8Matrix a{x.q.data(), x.s.data(), most, K};
    std::vector<float> out(size_t(3 * most * Experts::N), 5);
    gemm_fp8_masked({bytes_of(out), Dtype::F32}, a, e.all, rows, Fp8Sum::PROMOTED);
    for (int g = 0; g < 3; g++)
        for (int m = 0; m < most; m++)
            expect_row(out, g * most + m, a.group(g), m, e, m < rows[size_t(g)] ? g : -1);
}

// d_W of each expert: sums over its own tokens, added to what was there.
TEST(GemmFp8KGrouped, EachGroupSumsOverItsOwnTokens) {
    const int M = 3, N = 5;
    std::vector<int> k = {256, 0, 128};
    Integers x(size_t(M * 384), size_t(M * 3), 1), y(size_t(N * 384), size_t(N * 3), 2);
    Fp8Matrix a{x.q.data(), x.s.data(), M, 0}, b{y.q.data(), y.s.data(), N, 0};
    for (bool add : {false, true}) {
        std::vector<float> out(size_t(3 * M * N), 5);
        gemm_fp8_k_grouped({bytes_of(out), Dtype::F32, add}, a, b, k, Fp8Sum::EXACT);
        Fp8Matrix first_a{x.q.data(), x.s.data(), M, 256}, first_b{y.q.data(), y.s.data(), N, 256};
        Fp8Matrix last_a{x.q.data() + M * 256, x.s.data() + M * 2, M, 128};
        Fp8Matrix last_b{y.q.data() + N * 256, y.s.data() + N * 2, N, 128};
        for (int i = 0; i < M * N; i++) {
            float old = add ? 5 : 0;
            EXPECT_EQ(double(out[size_t(i)]), old + plain_sum(first_a, i / N, first_b, i % N));
            EXPECT_EQ(out[size_t(M * N + i)], old) << "no tokens";
            EXPECT_EQ(double(out[size_t(2 * M * N + i)]), old + plain_sum(last_a, i / N, last_b, i % N));
        }
    }
}

// -- 14.5 the forward pass --------------------------------------------------------------------------

struct ScopedArith {
    ScopedKernels scoped{Kernels{}};
    explicit ScopedArith(Arith arith) { use_arith(arith); }
};

static bool is_bf16(real x) { return x == real(bf16_to_float(float_to_bf16(float(x)))); }

TEST(Arith, F32ChangesNothing) {
    ScopedArith scoped(Arith::F32);
    EXPECT_EQ(kernels.round, nullptr);
    EXPECT_EQ(kernels.matmul, Kernels{}.matmul);
    EXPECT_EQ(kernels.attend, Kernels{}.attend);
    Model model = random_model("arith", tiny_fp8(), "F8_E4M3");
    set_arith(model, MlaForm::ABSORBED);
    EXPECT_EQ(model.head.arith, Arith::F32);
}
// Every tap is bf16 but those of the gate, and the logarithm of what softmax divides by.
TEST(Arith, EveryResultIsBf16ButTheGates) {
    constexpr std::string_view KEPT[] = {"router_logits", "group_score", "choice", "expert_weight", "lse"};
    for (auto [keys, dtype, arith] : {std::tuple{tiny_v3(), "BF16", Arith::BF16},
                                      {tiny_v2_lite(), "F32", Arith::BF16},
                                      {tiny_dense("qwen2"), "F32", Arith::BF16},
                                      {tiny_dense("llama"), "F16", Arith::BF16},
                                      {tiny_fp8(), "F8_E4M3", Arith::FP8}}) {
        ScopedArith scoped(arith);
        Model model = random_model("arith", keys, dtype);
        set_arith(model, MlaForm::ABSORBED);
        Answer a = answer(model, random_ids(9, model.config.V), {9, 9, MlaForm::ABSORBED}, true);
        for (const Taps::Entry& t : a.taps.entries) {
            bool kept = std::ranges::count(KEPT, std::string_view(t.name).substr(t.name.rfind('.') + 1)) > 0;
            bool all = std::all_of(t.values.begin(), t.values.end(), is_bf16);
            EXPECT_EQ(all, !kept || t.values.empty()) << t.name;
        }
        EXPECT_TRUE(std::all_of(a.logits.begin(), a.logits.end(), is_bf16));
        EXPECT_TRUE(std::all_of(a.mtp_logits.begin(), a.mtp_logits.end(), is_bf16));
    }
}
// Gate, head, eh_proj and norms stay out of FP8, and W^UK and W^UV in the absorbed form; the naive one has a
// linear layer there.
TEST(Arith, Fp8IsForLinearLayersWithFp8Weights) {
    for (bool ue8m0 : {false, true}) {
        Keys keys = tiny_fp8();
        if (ue8m0)
            keys["quantization_config"] =
                R"({"quant_method":"fp8","weight_block_size":[128,128],"scale_fmt":"ue8m0"})";
        Arith fp8 = ue8m0 ? Arith::FP8_UE8M0 : Arith::FP8;
        ScopedArith scoped(Arith::FP8);
        for (MlaForm form : {MlaForm::ABSORBED, MlaForm::NAIVE}) {
            Model model = random_model("arith", keys, "F8_E4M3");
            set_arith(model, form);
            const Layer &l = model.layers[1], &first = model.layers[0], &mtp = model.mtp[0].layer;
            for (const Matrix* w : {&l.mla.wq_a, &l.mla.wq_b, &l.mla.wkv_a, &l.mla.wo, &l.moe.shared.w_up,
                                    &l.moe.experts[2].w_gate, &l.moe.experts[7].w_down,
                                    &first.mlp.w_down, &mtp.mla.wo})
                EXPECT_EQ(w->arith, fp8);
            EXPECT_EQ(l.moe.gate_w.arith, Arith::F32);
            EXPECT_EQ(model.head.arith, Arith::BF16);
            EXPECT_EQ(model.mtp[0].proj.arith, Arith::BF16);
            EXPECT_EQ(l.mla.wk_b[0].arith, form == MlaForm::NAIVE ? fp8 : Arith::BF16);
            EXPECT_EQ(l.mla.wv_b[2].arith, form == MlaForm::NAIVE ? fp8 : Arith::BF16);
        }
    }
}
TEST(Arith, Fp8NeedsFp8Weights) {
    ScopedArith scoped(Arith::FP8);
    Model model = random_model("arith", tiny_v3());
    EXPECT_TRUE(refuses([&] { set_arith(model, MlaForm::ABSORBED); }, "has no FP8 weights"));
}
// A linear layer is quantise_fp8 and gemm_fp8, a head's view of W^UV too.
TEST(Arith, ALinearLayerIsAGemm) {
    ScopedArith scoped(Arith::FP8);
    Model model = random_model("arith", tiny_fp8(), "F8_E4M3");
    set_arith(model, MlaForm::NAIVE);
    const Mla& mla = model.layers[1].mla;
    for (const Matrix* w : {&mla.wkv_a, &mla.wv_b[2], &mla.wk_b[1]}) {
        const int T = 3, n = w->cols;
        Vector x = Noise{}.vector(size_t(T * n)), out(size_t(T * w->rows));
        matmul({out.data(), w->rows}, {x.data(), n}, *w, T);
        InE4m3 a(x, T, n);
        for (int t = 0; t < T; t++) {
            for (int r = 0; r < w->rows; r++) {
                std::vector<float> s(size_t(scale_blocks(n)));
                std::memcpy(s.data(), w->scale_row(r), s.size() * 4);
                Fp8Pair p{&a.q[size_t(t * n)], reinterpret_cast<const uint8_t*>(w->row(r)),
                          &a.s[size_t(t) * s.size()], s.data(), n};
                double sum = kernels.integers ? double(sum_promoted(p)) : sum_exact(p);
                ASSERT_EQ(out[size_t(t * w->rows + r)], real(nearest_bf16(sum))) << t << " " << r;
            }
        }
    }
}

}  // namespace chapter_14
