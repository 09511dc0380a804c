// Chapter 5: dot and its order, matmul, exp, softmax, rmsnorm, top_k.
#include "unit.h"

// -- 5.1 dot: the definition, written out a second time ---------------------------------------------

static real tree(const std::vector<real>& lane) {
    auto four = [&](size_t j) { return (lane[j] + lane[j + 8]) + (lane[j + 4] + lane[j + 12]); };
    return (four(0) + four(2)) + (four(1) + four(3));
}
static real defined_dot(const Vector& w, const Vector& x) {
    std::vector<real> lane(16);
    for (size_t i = 0; i < w.size(); i++) lane[i % 16] = std::fma(w[i], x[i], lane[i % 16]);
    return tree(lane);
}
// e4m3: sixteen lanes a block of 128 columns, times the block's scale.
static real defined_scaled_dot(const Vector& w, const Vector& scale, const Vector& x) {
    std::vector<real> lane(16);
    for (size_t block = 0; block < scale.size(); block++) {
        std::vector<real> part(16);
        for (size_t i = 128 * block; i < std::min(w.size(), 128 * (block + 1)); i++)
            part[i % 16] = std::fma(w[i], x[i], part[i % 16]);
        for (size_t j = 0; j < 16; j++) lane[j] = std::fma(scale[block], part[j], lane[j]);
    }
    return tree(lane);
}

// A matrix of any dtype with random contents, and its numbers (scales apart).
struct AnyMatrix {
    std::string bytes, scale_bytes;
    Vector values, scales;
    Matrix matrix;

    AnyMatrix(Dtype dtype, int rows, int cols, uint64_t seed) {
        static const char* const NAMES[] = {"F32", "BF16", "F16", "F8_E4M3"};
        Noise noise{{seed}};
        bytes = random_data(NAMES[int(dtype)], uint64_t(rows) * uint64_t(cols), 0, 1, noise);
        matrix = {reinterpret_cast<const std::byte*>(bytes.data()), nullptr, dtype, rows, cols, 0};
        for (size_t i = 0; i < size_t(rows) * size_t(cols); i++) {
            const char* p = bytes.data() + i * size_of(dtype);
            values.push_back(dtype == Dtype::F32    ? load<float>(p)
                             : dtype == Dtype::BF16 ? bf16_to_float(load<uint16_t>(p))
                             : dtype == Dtype::F16  ? f16_to_float(load<uint16_t>(p))
                                                    : e4m3_to_float(load<uint8_t>(p)));
        }
        if (dtype != Dtype::F8_E4M3) return;
        scale_bytes = random_data("F32", uint64_t((rows + 127) / 128 * ((cols + 127) / 128)), 1, 0.5, noise);
        for (size_t i = 0; i < scale_bytes.size(); i += 4)
            scales.push_back(load<float>(scale_bytes.data() + i));
        matrix.scale = reinterpret_cast<const std::byte*>(scale_bytes.data());
    }
    real dot_row(int r, const Vector& x) const {
        size_t n = size_t(matrix.cols), blocks = (n + 127) / 128;
        Vector row(values.begin() + int64_t(n) * r, values.begin() + int64_t(n) * (r + 1));
        if (scales.empty()) return defined_dot(row, x);
        auto at = scales.begin() + int64_t(blocks) * (r / 128);
        return defined_scaled_dot(row, Vector(at, at + int64_t(blocks)), x);
    }
};

constexpr Dtype DTYPES[] = {Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3};

TEST(Dot, FollowsItsDefinition) {
    Noise noise;
    for (int n = 0; n <= 100; n++) {
        Vector a = noise.vector(size_t(n)), b = noise.vector(size_t(n));
        EXPECT_EQ(dot_real_plain(a.data(), b.data(), n), defined_dot(a, b)) << n;
    }
}
TEST(Dot, FollowsItsDefinitionForEveryDtype) {
    Noise noise;
    for (Dtype dtype : DTYPES) {
        for (int n = 1; n <= 300; n++) {
            AnyMatrix w(dtype, 1, n, uint64_t(n));
            Vector x = noise.vector(size_t(n));
            real out = 0;
            dots_plain(&out, 1, w.matrix, 0, {x.data(), n}, 1);
            ASSERT_EQ(out, w.dot_row(0, x)) << "dtype " << int(dtype) << ", n " << n;
        }
    }
}
// Each product passes through dot_roundings(n) roundings at most.
TEST(Dot, IsNearTheSum) {
    Noise noise;
    for (int n : {1, 16, 100, 1000, 7168}) {
        Vector a = noise.vector(size_t(n)), b = noise.vector(size_t(n));
        long double sum = 0, size = 0;
        for (size_t i = 0; i < a.size(); i++)
            sum += (long double)(a[i]) * b[i], size += std::fabs((long double)(a[i]) * b[i]);
        EXPECT_LE(std::fabs(dot_real_plain(a.data(), b.data(), n) - sum),
                  chain_error(dot_roundings(n)) * size)
            << n;
    }
}
TEST(Dot, OfNothingIsZero) { EXPECT_EQ(dot_real_plain(nullptr, nullptr, 0), 0); }
TEST(Dot, FusesItsProducts) {
    real a[17] = {}, b[17] = {}, e = std::numeric_limits<real>::epsilon();
    a[0] = -1, b[0] = 1, a[16] = 1 + e,
    b[16] = 1 - e;   // both in lane 0: (1 + e) (1 - e) alone would round to 1
    EXPECT_EQ(dot_real_plain(a, b, 17), -e * e);
}
TEST(Axpy, IsAChainOfFma) {
    Noise noise;
    Vector a = noise.vector(37), b = noise.vector(37), out(37), expected(37);
    axpy_plain(out.data(), real(0.3), a.data(), 37), axpy_plain(out.data(), real(-1.7), b.data(), 37);
    for (size_t i = 0; i < 37; i++)
        expected[i] = std::fma(real(-1.7), b[i], std::fma(real(0.3), a[i], real(0)));
    EXPECT_EQ(out, expected);
}

// -- 5.2 matmul -------------------------------------------------------------------------------------

TEST(Matmul, IsADotPerElement) {
    Noise noise;
    for (Dtype dtype : DTYPES) {
        for (int T : {1, 2, 3, 4, 5, 9}) {
            int rows = 131 + T, cols = 140;
            AnyMatrix w(dtype, rows, cols, uint64_t(T));
            Vector x = noise.vector(size_t(T * cols)), out(size_t(T * rows));
            matmul(out.data(), x.data(), w.matrix, T);
            for (int i = 0; i < T * rows; i++) {
                Vector token(x.begin() + i / rows * cols, x.begin() + (i / rows + 1) * cols);
                ASSERT_EQ(out[size_t(i)], w.dot_row(i % rows, token))
                    << "dtype " << int(dtype) << ", element " << i;
            }
        }
    }
}
TEST(Matmul, DoesNotDependOnThreads) {
    Noise noise;
    AnyMatrix w(Dtype::BF16, 77, 50, 1);
    Vector x = noise.vector(5 * 50), expected(5 * 77), out(5 * 77);
    matmul(expected.data(), x.data(), w.matrix, 5);
    for (int threads = 1; threads <= 8; threads++) {
        ScopedThreads scoped(threads);
        std::fill(out.begin(), out.end(), real(0));
        matmul(out.data(), x.data(), w.matrix, 5);
        EXPECT_EQ(out, expected) << threads;
    }
}
TEST(Matmul, RowsWriteAtTheirStride) {
    AnyMatrix w(Dtype::F32, 4, 3, 1);
    Vector x = {1, 0, 0, -9, 0, 1, 0, -9}, out(20, 99);
    matmul_rows({out.data(), 10}, {x.data(), 4}, w.matrix, 2, 1, 3);
    for (size_t i = 0; i < 20; i++) {
        bool written = i == 1 || i == 2 || i == 11 || i == 12;
        EXPECT_EQ(out[i], written ? w.values[i % 10 * 3 + i / 10] : 99) << i;
    }
}
TEST(AddBias, ToEachToken) {
    Vector out = {1, 2, 3, 4, 5, 6}, bias = {10, 20, 30};
    add_bias(out.data(), bias, 2);
    EXPECT_EQ(out, (Vector{11, 22, 33, 14, 25, 36}));
}
TEST(Add, InPlace) {
    Vector out = {1, 2, 3}, x = {10, 20, 30};
    add(out.data(), x.data(), 2);
    EXPECT_EQ(out, (Vector{11, 22, 3}));
}

// -- 5.3 exp, sigmoid, silu, softmax ----------------------------------------------------------------

// The error in units in the last place of the exact result (of the smallest normal for subnormal ones).
// exp_of works in double: |r| <= ln(2) / 2 leaves a remainder of r^12 / 12! < 1e-14, and the roundings of 11
// steps and of k ln(2) with |k| <= 150 come to less than 5e-14 of the value, 5e-14 * 2^24 < 1e-6 units. One
// rounding to float adds half a unit.
TEST(Exp, IsRoundedCorrectlyButForAMillionthOfAUnit) {
    double worst = 0;
    for (float sign : {1.0f, -1.0f}) {
        for (uint32_t bits = 0; bits < std::bit_cast<uint32_t>(104.0f); bits += 499) {
            float x = sign * std::bit_cast<float>(bits);
            long double exact = std::exp((long double)(x));
            if (exact > std::numeric_limits<float>::max()) continue;
            int exponent = std::max(std::ilogb(exact), -126);
            worst = std::max(worst, double(std::fabs(exp_of(x) - exact) / std::scalbn(1.0L, exponent - 23)));
        }
    }
    EXPECT_LE(worst, 0.5 + 1e-6);
    EXPECT_GE(worst, 0.49);   // the sweep is dense enough to meet a worst case
}
TEST(Exp, OfZeroIsOne) { EXPECT_TRUE(exp_of(0.0f) == 1 && exp_of(-0.0f) == 1); }
TEST(Exp, OfInfinities) { EXPECT_TRUE(exp_of(INFINITY) == INFINITY && exp_of(-INFINITY) == 0); }
TEST(Exp, OfNan) { EXPECT_TRUE(std::isnan(exp_of(std::nanf("")))); }
TEST(Exp, OverflowsWhereFloatsEnd) {
    EXPECT_EQ(exp_of(88.72283f), float(std::exp(88.72283f * 1.0L)));
    EXPECT_EQ(exp_of(88.72284f), INFINITY);
    EXPECT_EQ(exp_of(88.8f), INFINITY);
    EXPECT_EQ(exp_of(1000.0f), INFINITY);
}
TEST(Exp, UnderflowsWhereFloatsEnd) {
    EXPECT_EQ(exp_of(-103.9f), 0x1p-149f);
    EXPECT_EQ(exp_of(-104.0f), 0);
    EXPECT_EQ(exp_of(-1e30f), 0);
}
TEST(Exp, OfDoubleIsTheSystems) { EXPECT_EQ(exp_of(1.25), std::exp(1.25)); }

// 1 + e^-z and the division add two roundings to exp_of's error.
TEST(Sigmoid, IsNearTheFormula) {
    for (double z = -80; z <= 80; z += 0.01) {
        long double exact = 1 / (1 + std::exp(-(long double)(real(z))));
        ASSERT_LE(std::fabs(sigmoid(real(z)) - exact), exact * (EXP_ERROR + 2.01L * U)) << z;
    }
}
TEST(Sigmoid, AtTheEnds) {
    EXPECT_EQ(sigmoid(0), real(0.5));
    EXPECT_EQ(sigmoid(real(INFINITY)), 1);
    EXPECT_EQ(sigmoid(real(-INFINITY)), 0);
}
TEST(Silu, IsNearTheFormula) {
    for (double z = -80; z <= 80; z += 0.01) {
        long double x = real(z), exact = x / (1 + std::exp(-x));
        ASSERT_LE(std::fabs(silu(real(z)) - exact), std::fabs(exact) * (EXP_ERROR + 2.01L * U)) << z;
    }
}

TEST(Softmax, IsNearTheFormula) {
    Noise noise;
    for (int n : {1, 2, 7, 64, 1000}) {
        Vector z = noise.vector(size_t(n));
        for (real& v : z) v *= 20;
        std::vector<long double> exact = probabilities(z.data(), n);
        softmax(z.data(), n);
        for (size_t i = 0; i < z.size(); i++)
            ASSERT_LE(std::fabs(z[i] - exact[i]), softmax_error(n, 40) * exact[i]) << n;
    }
}
TEST(Softmax, OfOneIsOne) {
    real z = -37;
    softmax(&z, 1);
    EXPECT_EQ(z, 1);
}
TEST(Softmax, OfEqualsIsUniform) {
    Vector z(8, 5);
    softmax(z.data(), 8);
    EXPECT_EQ(z, Vector(8, real(0.125)));
}
TEST(Softmax, GivesNothingToMinusInfinity) {
    Vector z = {1, real(-INFINITY), 1};
    softmax(z.data(), 3);
    EXPECT_EQ(z, (Vector{real(0.5), 0, real(0.5)}));
}
TEST(Softmax, DoesNotOverflow) {
    Vector z = {real(1e30), real(1e30), 0};
    softmax(z.data(), 3);
    EXPECT_EQ(z, (Vector{real(0.5), real(0.5), 0}));
}
TEST(Softmax, DoesNotSeeAShiftThatIsExact) {
    Vector a = {0, 1, 2, 3.5}, b = {8, 9, 10, 11.5};
    softmax(a.data(), 4), softmax(b.data(), 4);
    EXPECT_EQ(a, b);
}

// -- 5.4 rmsnorm ------------------------------------------------------------------------------------

// Roundings: of the sum of squares dot_roundings(n), division by n, eps (twice: itself and the addition); the
// square root halves what came before and adds one; then 1 / root and two products.
TEST(Rmsnorm, IsNearTheFormula) {
    Noise noise;
    for (int n : {1, 5, 16, 100, 1000}) {
        Vector x = noise.vector(size_t(n)), w = noise.vector(size_t(n)), out(x.size());
        long double squares = 0;
        for (real v : x) squares += (long double)(v) * v;
        rmsnorm({out.data(), n}, {x.data(), n}, w, 1, 1e-6);
        long double bound = chain_error((dot_roundings(n) + 3) / 2.0L + 4);
        for (size_t i = 0; i < x.size(); i++) {
            long double exact = x[i] * (long double)(w[i]) / std::sqrt(squares / n + 1e-6L);
            ASSERT_LE(std::fabs(out[i] - exact), bound * std::fabs(exact)) << n;
        }
    }
}
TEST(Rmsnorm, EpsKeepsZeroFinite) {
    Vector x(4), w(4, 1);
    rmsnorm({x.data(), 4}, {x.data(), 4}, w, 1, 1e-6);
    EXPECT_EQ(x, Vector(4));
}
TEST(Rmsnorm, KeepsToItsStridesAndWorksInPlace) {
    Vector x = {3, 3, 99, 4, 4, 99}, w = {1, 2};
    rmsnorm({x.data(), 3}, {x.data(), 3}, w, 2, 0);
    EXPECT_EQ(x, (Vector{1, 2, 99, 1, 2, 99}));
}

// -- 5.5 top_k --------------------------------------------------------------------------------------

static std::vector<int> top(const Vector& v, int k) {
    std::vector<int> idx(static_cast<size_t>(k));
    top_k(idx.data(), v.data(), int(v.size()), k);
    return idx;
}
static std::vector<int> sorted_top(const Vector& v, int k) {
    std::vector<int> idx(v.size());
    std::iota(idx.begin(), idx.end(), 0);
    std::stable_sort(idx.begin(), idx.end(), [&](int a, int b) { return v[size_t(a)] > v[size_t(b)]; });
    idx.resize(size_t(k));
    return idx;
}

TEST(TopK, DescendsAndBreaksTiesByIndex) {
    EXPECT_EQ(top({1, 3, 2, 3, 3}, 4), (std::vector<int>{1, 3, 4, 2}));
    EXPECT_EQ(top({0, 0, 0}, 2), (std::vector<int>{0, 1}));
    EXPECT_EQ(top({real(-INFINITY), real(-INFINITY), -5}, 2), (std::vector<int>{2, 0}));
}
TEST(TopK, EqualsAStableSort) {
    Noise noise;
    for (int round = 0; round < 2000; round++) {
        int n = 1 + noise.below(40), k = 1 + noise.below(n), levels = 1 + noise.below(12);
        Vector v;
        for (int i = 0; i < n; i++) v.push_back(real(noise.below(levels)));
        ASSERT_EQ(top(v, k), sorted_top(v, k));
    }
}
TEST(TopK, GivesValidIndicesWhateverTheNumbers) {
    real nan = std::numeric_limits<real>::quiet_NaN();
    for (int i : top({nan, 1, nan, 2}, 3)) EXPECT_TRUE(i >= 0 && i < 4);
}
