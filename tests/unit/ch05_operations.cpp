// Chapter 5: dot and its order, in floating point and in integers, matmul, exp, softmax, rmsnorm, top_k.
#include "unit.h"

#include "weights.h"

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

static real defined_dot(const RandomMatrix& w, int r, const Vector& x) {
    if (!w.matrix.scale) return defined_dot(w.row(r), x);
    Vector scale;
    for (size_t k = 0; k < (w.cols() + 127) / 128; k++) scale.push_back(w.scale(r, k));
    return defined_scaled_dot(w.row(r), scale, x);
}

// Numbers of columns: every tail of 16 lanes, and beyond the blocks of scales; whole blocks where there are.
static std::vector<int> widths(Dtype dtype) {
    std::vector<int> out;
    int block = format_of(dtype).values;
    for (int n = block; n <= (block == 256 ? 2560 : 300); n += block) out.push_back(n);
    return out;
}

TEST(Dot, FollowsItsDefinition) {
    Noise noise;
    for (int n = 0; n <= 100; n++) {
        Vector a = noise.vector(size_t(n)), b = noise.vector(size_t(n));
        EXPECT_EQ(dot_real_plain(a.data(), b.data(), n), defined_dot(a, b)) << n;
    }
}
TEST(Dot, FollowsItsDefinitionForEveryDtype) {
    Noise noise;
    for (Dtype dtype : ALL_DTYPES) {
        for (int n : widths(dtype)) {
            RandomMatrix w(dtype, 2, n, uint64_t(n), Contents::TAME, 127);   // rows 127 and 128: two scales
            Vector x = noise.vector(size_t(n));
            for (int r : {0, 1})
                ASSERT_EQ(dot_row_plain(w.matrix, r, x.data()), defined_dot(w, r, x))
                    << format_of(dtype).name << ", n " << n;
        }
    }
}
TEST(Widen, GivesTheNumbersOfTheDefinition) {
    for (Dtype dtype : ALL_DTYPES) {
        for (int n : widths(dtype)) {
            RandomMatrix w(dtype, 2, n, uint64_t(n), Contents::TAME, 127);
            Vector row(static_cast<size_t>(n));
            for (int r : {0, 1}) {
                widen_plain(row.data(), w.matrix, r);
                ASSERT_TRUE(same_bits(row, w.scaled_row(r))) << format_of(dtype).name << ", n " << n;
            }
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
// out[t][i] is one chain of fma that begins with what was there, in the order of j.
TEST(Weigh, IsAChainOfFmaInTheOrderOfTheRows) {
    for (Dtype dtype : ALL_DTYPES) {
        int cols = std::max(37 * (format_of(dtype).values == 1), format_of(dtype).values), T = 3;
        RandomMatrix v(dtype, 9, cols, 5, Contents::TAME, 120);
        Noise noise;
        size_t n = size_t(cols), stride = n + 2;
        Vector p = noise.vector(size_t(T) * 11), out = noise.vector(size_t(T) * stride), expected = out;
        for (int j = 0; j < 8; j++) {                    // of the nine rows
            Vector row = v.scaled_row(j);
            for (size_t t = 0; t < size_t(T); t++)
                for (size_t i = 0; i < n; i++) {
                    real& y = expected[t * stride + i];
                    y = std::fma(p[t * 11 + size_t(j)], row[i], y);
                }
        }
        weigh_plain({out.data(), int64_t(stride)}, {p.data(), 11}, v.matrix, T, 8);
        EXPECT_TRUE(same_bits(out, expected)) << format_of(dtype).name;
    }
}
TEST(Weigh, OfNoRowsLeavesWhatWasThere) {
    Vector out = {1, 2}, p = {3}, v = {4, 5};
    weigh_plain({out.data(), 2}, {p.data(), 1}, real_matrix(v.data(), 1, 2), 1, 0);
    EXPECT_EQ(out, (Vector{1, 2}));
}

// -- 5.2 dot in small integers ----------------------------------------------------------------------

// The definition a second time: q = x 127 / top to the nearest, ties to even, and d = top / 127.
struct DefinedInts {
    std::vector<int> q;
    std::vector<float> d;

    DefinedInts(const Vector& x, size_t block) {
        for (size_t begin = 0; begin < x.size(); begin += block) {
            float top = 0;
            for (size_t i = begin; i < begin + block; i++) top = std::max(top, std::fabs(float(x[i])));
            d.push_back(top / 127);
            float inverse = 127 / top;
            for (size_t i = begin; i < begin + block; i++) q.push_back(to_even(float(x[i]) * inverse));
        }
    }
    static int to_even(float x) {
        int low = int(std::floor(x));
        float over = x - float(low);
        return over > 0.5f || (over == 0.5f && low % 2 != 0) ? low + 1 : low;
    }
};

static Vector ragged(size_t n, Noise& noise) {           // blocks of very different sizes
    Vector x = noise.vector(n);
    for (size_t i = 0; i < n; i++) x[i] *= real(std::ldexp(1.0, int(i / 32 % 7) * 5 - 15));
    return x;
}

TEST(QuantiseX, FollowsItsDefinition) {
    Noise noise;
    for (int block : {32, 256}) {
        for (int round = 0; round < 50; round++) {
            Vector x = ragged(768, noise);
            Ints ints(x, 1, block);
            DefinedInts expected(x, size_t(block));
            for (size_t i = 0; i < x.size(); i++) ASSERT_EQ(ints.q[i], expected.q[i]) << i;
            for (size_t b = 0; b < expected.d.size(); b++) ASSERT_EQ(ints.d[b], expected.d[b]) << b;
            for (size_t g = 0; g < x.size() / 16; g++) {
                const int* first = &expected.q[16 * g];
                ASSERT_EQ(ints.sums[g], std::accumulate(first, first + 16, 0)) << g;
            }
        }
    }
}
// Half a step of d, and the roundings of d, of 127 / top and of the product: 3 * 2^-24 of |x|.
TEST(QuantiseX, IsWithinHalfAStepAndEightBits) {
    Noise noise;
    for (int e = -90; e <= 100; e += 5) {
        Vector x = noise.vector(256);
        for (real& v : x) v = real(std::ldexp(double(v), e));
        Ints ints(x, 1, 256);
        int largest = 0;
        for (size_t i = 0; i < 256; i++) {
            long double d = ints.d[0], size = std::fabs((long double)(x[i]));
            largest = std::max(largest, std::abs(int(ints.q[i])));
            ASSERT_LE(std::fabs(d * ints.q[i] - (long double)(x[i])), d / 2 + 3.01L * 0x1p-24L * size) << e;
        }
        EXPECT_EQ(largest, 127) << e;
    }
}
TEST(QuantiseX, SendsTiesToTheEvenInteger) {
    Vector x(32);
    const float halves[] = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 125.5f, -126.5f};
    std::copy(std::begin(halves), std::end(halves), x.begin()), x[31] = 127;      // d = 1
    Ints ints(x, 1, 32);
    EXPECT_EQ(ints.d[0], 1);
    EXPECT_EQ((std::vector<int>(ints.q.begin(), ints.q.begin() + 8)),
              (std::vector<int>{0, 2, 2, 0, -2, -2, 126, -126}));
}
TEST(QuantiseX, OfZeroIsZero) {
    for (real tiny : {real(0), real(-0.0), real(1e-37), real(-1e-31)}) {           // below 2^-100 is nothing
        Ints ints(Vector(64, tiny), 1, 32);
        EXPECT_EQ(ints.q, std::vector<int8_t>(64)) << tiny;
        EXPECT_EQ(ints.sums, std::vector<int16_t>(4)) << tiny;
        EXPECT_EQ(ints.d, std::vector<float>(2)) << tiny;
    }
}
TEST(QuantiseX, SumsFit16Bits) {
    Ints ints(Vector(32, real(-3)), 1, 32);
    EXPECT_EQ(ints.q, std::vector<int8_t>(32, -127));
    EXPECT_EQ(ints.sums, std::vector<int16_t>(2, -16 * 127));
}

// The definition in 64-bit integers, from the blocks as ch. 2's tests define them.
static float defined_int_dot(const RandomMatrix& w, int r, const DefinedInts& x) {
    float lane[8] = {};
    std::vector<Defined> blocks = w.blocks(r);
    for (size_t b = 0; b < blocks.size(); b++) {
        const Defined& block = blocks[b];
        int64_t sum = 0, minimum = 0;
        for (size_t i = 0; i < block.q.size(); i++) {
            int64_t q = x.q[b * block.q.size() + i];
            sum += q * block.scale[i] * block.q[i], minimum += q * block.minimum[i];
        }
        EXPECT_LT(std::max(std::abs(sum), std::abs(minimum)), int64_t(1) << 31);
        float& y = lane[b % 8];
        y = std::fma(float(block.d) * x.d[b], float(sum), y);
        if (format_of(w.matrix.dtype).minimums) y = std::fma(-(float(block.m) * x.d[b]), float(minimum), y);
    }
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

TEST(IntDot, FollowsItsDefinition) {
    Noise noise;
    for (Dtype dtype : QUANTISED) {
        int block = format_of(dtype).values;
        for (int n = block; n <= 20 * block; n += block) {
            RandomMatrix w(dtype, 2, n, uint64_t(n));
            Vector x = ragged(size_t(n), noise);
            DefinedInts defined(x, size_t(block));
            for (int r : {0, 1})
                ASSERT_EQ(int_dot_plain(w.matrix, r, x.data()), defined_int_dot(w, r, defined))
                    << format_of(dtype).name << ", n " << n;
        }
    }
}

// The exact sum over the exact weights, and how far int_dot may be from it:
//
//   - x is off by half a step of its d, and 3 * 2^-24 of itself (see above), times |w|;
//   - a block's integers are exact. Its term is rounded as an integer turned to float, as a product of scales
//     and in the fma of its lane, which has two for each block (one without minimums), and then in 3 levels
//     of the tree: chain_error on |d dx I| + |m dx M|.
struct ExactSum {
    long double sum = 0, bound = 0;
};
static ExactSum exact_int_dot(const RandomMatrix& w, int r, const Vector& x, const Ints& ints) {
    constexpr long double u = 0x1p-24L;                  // int_dot computes in float whatever `real` is
    ExactSum out;
    long double size = 0;
    std::vector<Defined> blocks = w.blocks(r);
    for (size_t b = 0; b < blocks.size(); b++) {
        long double dx = ints.d[b], sum = 0, minimum = 0;
        for (size_t i = 0; i < blocks[b].q.size(); i++) {
            size_t at = b * blocks[b].q.size() + i;
            long double weight = blocks[b].value(i);
            out.sum += weight * x[at];
            out.bound += std::fabs(weight) * (dx / 2 + 3.01L * u * std::fabs((long double)(x[at])));
            sum += (long double)(ints.q[at]) * blocks[b].scale[i] * blocks[b].q[i];
            minimum += (long double)(ints.q[at]) * blocks[b].minimum[i];
        }
        size += std::fabs(blocks[b].d * dx * sum) + std::fabs(blocks[b].m * dx * minimum);
    }
    long double roundings = 2 + 2 * ((long double)(blocks.size() + 7) / 8) + 3;
    out.bound += roundings * u / (1 - roundings * u) * size;
    return out;
}

TEST(IntDot, IsNearTheSum) {
    Noise noise;
    for (Dtype dtype : QUANTISED) {
        int block = format_of(dtype).values;
        for (int n : {block, 3 * block, 40 * block}) {
            RandomMatrix w(dtype, 20, n, uint64_t(n));
            Vector x = ragged(size_t(n), noise);
            Ints ints(x, 1, block);
            for (int r = 0; r < 20; r++) {
                ExactSum exact = exact_int_dot(w, r, x, ints);
                ASSERT_LE(std::fabs(int_dot_plain(w.matrix, r, x.data()) - exact.sum), exact.bound)
                    << format_of(dtype).name << ", n " << n;
            }
        }
    }
}
// All weights and all activations at their largest, of one sign: the sums stay below 2^31 (compared in 64
// bits), and are what they should be.
TEST(IntDot, DoesNotOverflow) {
    for (Dtype dtype : QUANTISED) {
        int block = format_of(dtype).values, n = 10 * block;
        std::string extreme = extreme_block(dtype);
        RandomMatrix w(dtype, 1, n, 1);
        for (size_t b = 0; b < 10; b++)
            w.bytes.replace(1 + b * extreme.size(), extreme.size(), extreme);
        int largest = 0;
        for (size_t i = 0; i < size_t(block); i++)
            largest = std::max(largest, std::abs(w.blocks(0)[0].scale[i] * w.blocks(0)[0].q[i]));
        EXPECT_EQ(largest, extreme_size(dtype)) << format_of(dtype).name;
        EXPECT_LT(int64_t(largest) * 127 * block, int64_t(1) << 31);
        for (real sign : {real(1), real(-1)}) {
            Vector x(size_t(n), 127 * sign);
            Ints ints(x, 1, block);
            float sum = int_dot_plain(w.matrix, 0, x.data());
            EXPECT_EQ(sum, defined_int_dot(w, 0, DefinedInts(x, size_t(block)))) << format_of(dtype).name;
            ExactSum exact = exact_int_dot(w, 0, x, ints);
            EXPECT_LE(std::fabs(sum - exact.sum), exact.bound)
                << format_of(dtype).name;
        }
    }
}
TEST(IntDot, OfARowThatIsNotFiniteIsNotANumber) {
    for (Dtype dtype : QUANTISED) {
        int block = format_of(dtype).values, n = 3 * block;
        RandomMatrix w(dtype, 1, n, 1);
        for (real bad : {real(NAN), real(INFINITY), real(-INFINITY)}) {
            for (int place : {0, block + 5, n - 1}) {
                Vector x = Noise{}.vector(size_t(n));
                x[size_t(place)] = bad;
                EXPECT_TRUE(std::isnan(int_dot_plain(w.matrix, 0, x.data()))) << format_of(dtype).name;
            }
        }
    }
}
TEST(IntDot, OfZeroIsZero) {
    for (Dtype dtype : QUANTISED) {
        int block = format_of(dtype).values;
        RandomMatrix w(dtype, 1, 3 * block, 1);
        Vector x(size_t(3 * block));
        EXPECT_EQ(int_dot_plain(w.matrix, 0, x.data()), 0) << format_of(dtype).name;
    }
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
// As sigmoid, and one more product.
TEST(SiluTimes, IsNearTheFormula) {
    Noise noise;
    for (double z = -80; z <= 80; z += 0.01) {
        real gate = real(z), up = real(noise.next());
        long double x = gate, exact = x / (1 + std::exp(-x)) * up;
        silu_times_plain(&gate, &up, 1);
        ASSERT_LE(std::fabs(gate - exact), std::fabs(exact) * (EXP_ERROR + 3.01L * U)) << z;
    }
}
TEST(SiluTimes, AtTheEnds) {
    const real one = 1, inf = real(INFINITY), large = 10000;
    const std::pair<real, real> cases[] = {{real(0), real(0)}, {inf, inf}, {large, large}, {-large, real(0)}};
    for (auto [z, expected] : cases) {
        real gate = z;
        silu_times_plain(&gate, &one, 1);
        EXPECT_EQ(gate, expected) << z;
    }
}

TEST(Softmax, IsNearTheFormula) {
    Noise noise;
    for (int n : {1, 2, 7, 64, 1000}) {
        Vector z = noise.vector(size_t(n));
        for (real& v : z) v *= 20;
        std::vector<long double> exact = probabilities(z.data(), n);
        kernels.softmax(z.data(), 1, n);
        for (size_t i = 0; i < z.size(); i++)
            ASSERT_LE(std::fabs(z[i] - exact[i]), softmax_error(n, 40) * exact[i]) << n;
    }
}
// The sum has sixteen lanes and the tree of a dot.
TEST(Softmax, SumsLikeADot) {
    Noise noise;
    for (int n : {1, 15, 16, 17, 100, 333}) {
        Vector z = noise.vector(size_t(n)), e = z;
        real top = *std::max_element(z.begin(), z.end());
        for (real& v : e) v = exp_of(v - top);
        real sum = defined_dot(e, Vector(e.size(), 1));
        for (real& v : e) v /= sum;
        kernels.softmax(z.data(), 1, n);
        EXPECT_TRUE(same_bits(z, e)) << n;
    }
}
TEST(Softmax, OfOneIsOne) {
    real z = -37;
    kernels.softmax(&z, 1, 1);
    EXPECT_EQ(z, 1);
}
TEST(Softmax, OfEqualsIsUniform) {
    Vector z(8, 5);
    kernels.softmax(z.data(), 1, 8);
    EXPECT_EQ(z, Vector(8, real(0.125)));
}
TEST(Softmax, GivesNothingToMinusInfinity) {
    Vector z = {1, real(-INFINITY), 1};
    kernels.softmax(z.data(), 1, 3);
    EXPECT_EQ(z, (Vector{real(0.5), 0, real(0.5)}));
}
TEST(Softmax, DoesNotOverflow) {
    Vector z = {real(1e30), real(1e30), 0};
    kernels.softmax(z.data(), 1, 3);
    EXPECT_EQ(z, (Vector{real(0.5), real(0.5), 0}));
}
TEST(Softmax, DoesNotSeeAShiftThatIsExact) {
    Vector a = {0, 1, 2, 3.5}, b = {8, 9, 10, 11.5};
    kernels.softmax(a.data(), 1, 4), kernels.softmax(b.data(), 1, 4);
    EXPECT_EQ(a, b);
}

// -- 5.5 matmul -------------------------------------------------------------------------------------

// Element r of W x by definition, in the way that the kernels in use ask for.
static real defined_product(const RandomMatrix& w, int r, const Vector& x) {
    if (!in_integers(w.matrix)) return defined_dot(w, r, x);
    return defined_int_dot(w, r, DefinedInts(x, size_t(format_of(w.matrix.dtype).values)));
}
static Vector slice(const Vector& x, size_t begin, size_t n) {
    return Vector(x.begin() + int64_t(begin), x.begin() + int64_t(begin + n));
}
static Kernels plain_kernels(bool integers) {
    Kernels k;
    k.integers = integers;
    return k;
}
constexpr bool IN_FLOAT = sizeof(real) == 4;

TEST(Matmul, IsADotPerElement) {
    Noise noise;
    for (bool integers : {false, IN_FLOAT}) {
        ScopedKernels scoped(plain_kernels(integers));
        for (Dtype dtype : ALL_DTYPES) {
            for (int T : {1, 2, 3, 4, 5, 9}) {
                int rows = 131 + T, cols = format_of(dtype).values == 1 ? 140 : format_of(dtype).values;
                RandomMatrix w(dtype, rows, cols, uint64_t(T));
                Vector x = noise.vector(size_t(T * cols)), out(size_t(T * rows));
                matmul(out.data(), x.data(), w.matrix, T);
                for (int i = 0; i < T * rows; i++) {
                    Vector token = slice(x, size_t(i / rows * cols), size_t(cols));
                    ASSERT_EQ(out[size_t(i)], defined_product(w, i % rows, token))
                        << format_of(dtype).name << ", element " << i;
                }
            }
        }
    }
}
TEST(Matmul, IntegersAreTheDefaultForQuantisedWeightsAlone) {
    for (Dtype dtype : ALL_DTYPES) {
        Matrix w;
        w.dtype = dtype;
        bool table = dtype == Dtype::IQ4_NL || dtype == Dtype::IQ4_XS;
        EXPECT_EQ(in_integers(w), IN_FLOAT && quantised(dtype) && !table) << format_of(dtype).name;
    }
}
TEST(Matmul, DoesNotDependOnThreads) {
    Noise noise;
    for (Dtype dtype : ALL_DTYPES) {
        for (int T : {1, 5, 40}) {
            RandomMatrix w(dtype, 777, 256, 1);
            Vector x = noise.vector(size_t(T) * 256), expected(size_t(T) * 777), out(expected.size());
            matmul(expected.data(), x.data(), w.matrix, T);
            for (int threads = 1; threads <= 8; threads++) {
                ScopedThreads scoped(threads);
                std::fill(out.begin(), out.end(), real(0));
                matmul(out.data(), x.data(), w.matrix, T);
                EXPECT_EQ(out, expected) << format_of(dtype).name << ", " << threads;
            }
        }
    }
}

// Products of one call, with inputs that lie at the same place and are yet not the same: another number of
// tokens, of columns, of numbers between tokens, or other blocks. Each is as if it were alone.
TEST(Matmul, SeveralProductsAreAsEachAlone) {
    Noise noise;
    Vector x = noise.vector(9 * 1024), y = noise.vector(9 * 512);
    std::deque<RandomMatrix> w;
    std::deque<Vector> out;
    std::vector<Product> products;
    auto add = [&](Dtype dtype, int rows, int cols, ConstRows in, int T) {
        const RandomMatrix& m = w.emplace_back(dtype, rows, cols, uint64_t(w.size()));
        Vector& o = out.emplace_back(size_t(std::max(T, 1) * (rows + 3)), real(99));
        products.push_back({{o.data(), rows + 3}, in, &m.matrix, T});
    };
    for (Dtype dtype : {Dtype::Q4_K, Dtype::Q8_0, Dtype::Q6_K, Dtype::BF16, Dtype::Q4_0}) {
        add(dtype, 40, 512, {x.data(), 512}, 2), add(dtype, 100, 512, {x.data(), 512}, 9);
        add(dtype, 41, 256, {x.data(), 512}, 2), add(dtype, 42, 512, {x.data(), 1024}, 2);
        add(dtype, 1, 512, {x.data(), 512}, 1), add(dtype, 7, 512, {y.data(), 512}, 2);
        add(dtype, 43, 512, {x.data() + 1, 512}, 2), add(dtype, 5, 512, {x.data(), 512}, 0);
    }
    for (int threads : {1, 3, 8}) {
        ScopedThreads scoped(threads);
        for (Vector& o : out) std::fill(o.begin(), o.end(), real(99));
        matmul(products);
        for (size_t p = 0; p < products.size(); p++) {
            const Product& product = products[p];
            size_t rows = size_t(product.w->rows), cols = size_t(product.w->cols);
            for (size_t i = 0; i < out[p].size(); i++) {
                size_t t = i / (rows + 3), r = i % (rows + 3);
                bool written = r < rows && t < size_t(product.T);
                Vector token(product.x[int64_t(t)], product.x[int64_t(t)] + cols);
                ASSERT_EQ(out[p][i], written ? defined_product(w[p], int(r), token) : real(99))
                    << "product " << p << ", element " << i << ", " << threads << " threads";
            }
        }
    }
}
TEST(Matmul, OfNothingDoesNothing) { matmul(std::span<const Product>{}); }
TEST(Matmul, WritesItsRowsAtTheirStride) {
    Noise noise;
    for (bool integers : {false, IN_FLOAT}) {
        ScopedKernels scoped(plain_kernels(integers));
        for (Dtype dtype : ALL_DTYPES) {
            RandomMatrix w(dtype, 21, 256, 3);
            Vector x = noise.vector(4 * 300), out(4 * 30, 99);
            matmul({out.data(), 30}, {x.data(), 300}, w.matrix, 4);
            for (size_t i = 0; i < out.size(); i++) {
                Vector token = slice(x, i / 30 * 300, 256);
                ASSERT_EQ(out[i], i % 30 < 21 ? defined_product(w, int(i % 30), token) : 99) << i;
            }
        }
    }
}
// W^T x: the rows of W times the numbers of x, in their order, from 0.
TEST(MatmulTransposed, IsAChainOverTheRows) {
    Noise noise;
    for (Dtype dtype : ALL_DTYPES) {
        RandomMatrix w(dtype, 10, 256, 3);
        Vector x = noise.vector(3 * 12), out(3 * 260, 99);
        matmul_transposed({out.data(), 260}, {x.data(), 12}, w.matrix, 3);
        for (size_t i = 0; i < out.size(); i++) {
            real expected = i % 260 < 256 ? 0 : 99;
            for (int j = 0; i % 260 < 256 && j < 10; j++)
                expected = std::fma(x[i / 260 * 12 + size_t(j)], w.scaled_row(j)[i % 260], expected);
            ASSERT_EQ(out[i], expected) << format_of(dtype).name << " " << i;
        }
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

// -- 5.6 softmax, rmsnorm ---------------------------------------------------------------------------

TEST(SoftmaxOfRows, IsThatOfEachRowAndKeepsToItsStride) {
    Noise noise;
    for (int threads : {1, 3}) {
        ScopedThreads scoped(threads);
        for (int n : {1, 8, 333}) {
            const size_t T = 40, stride = size_t(n) + 3;
            Vector z = noise.vector(T * stride), expected = z;
            for (size_t t = 0; t < T; t++) kernels.softmax(expected.data() + t * stride, real(0.7), n);
            softmax({z.data(), int64_t(stride)}, real(0.7), int(T), n);
            EXPECT_TRUE(same_bits(z, expected)) << n << " numbers, " << threads << " threads";
        }
    }
}

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

// -- 5.7 top_k --------------------------------------------------------------------------------------

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
// Of 100,000 numbers in any order, half of them asked for: n log k steps, not n k.
TEST(TopK, ItsStepsGrowWithNLogK) {
    const int n = 100000, k = n / 2;
    for (int order : {1, -1, 7919}) {
        int64_t steps = 0;
        std::vector<int> idx(static_cast<size_t>(k));
        first_of_all(idx.data(), n, k, [&](int a, int b) {
            steps++;
            return int64_t(a) * order % n > int64_t(b) * order % n;
        });
        EXPECT_LT(double(steps), 4 * n * std::log2(double(k)));
    }
}
TEST(TopK, GivesValidIndicesWhateverTheNumbers) {
    real nan = std::numeric_limits<real>::quiet_NaN();
    for (int i : top({nan, 1, nan, 2}, 3)) EXPECT_TRUE(i >= 0 && i < 4);
}
