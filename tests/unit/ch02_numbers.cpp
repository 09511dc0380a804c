// Chapter 2: what the bits of a weight mean.
#include "unit.h"

#include "weights.h"

// -- 2.1 widening -----------------------------------------------------------------------------------

TEST(E4m3, All256ValuesFollowTheFormula) {
    for (uint32_t b = 0; b < 256; b++) {
        double expected = (b & 127) == 127 ? std::nan("") : value_of(b, 4, 3, false);
        EXPECT_TRUE(same_value(double(E4M3[b]), expected)) << b;
        EXPECT_TRUE(same_value(double(e4m3_to_float(uint8_t(b))), expected)) << b;
    }
}
TEST(E4m3, LargestIs448) { EXPECT_EQ(E4M3[0x7E], 448); }
TEST(E4m3, SmallestNormalIs2ToMinus6) { EXPECT_EQ(E4M3[0x08], 0x1p-6f); }
TEST(E4m3, SubnormalStepIs2ToMinus9) { EXPECT_EQ(E4M3[0x01], 0x1p-9f); }
TEST(E4m3, OneIs0x38) { EXPECT_EQ(E4M3[0x38], 1); }
TEST(E4m3, HasOneNanPerSign) { EXPECT_TRUE(std::isnan(E4M3[0x7F]) && std::isnan(E4M3[0xFF])); }
TEST(E4m3, HasNoInfinity) { for (float v : E4M3) EXPECT_FALSE(std::isinf(v)); }
TEST(E4m3, KeepsTheSignOfZero) { EXPECT_TRUE(std::signbit(E4M3[0x80]) && E4M3[0x80] == 0); }

TEST(F16, All65536ValuesFollowTheFormula) {
    for (uint32_t h = 0; h < 65536; h++)
        ASSERT_TRUE(same_value(double(f16_to_float(uint16_t(h))), value_of(h, 5, 10, true))) << h;
}
TEST(F16, LargestIs65504) { EXPECT_EQ(f16_to_float(0x7BFF), 65504); }
TEST(F16, SmallestIs2ToMinus24) { EXPECT_EQ(f16_to_float(0x0001), 0x1p-24f); }
TEST(F16, HasInfinity) { EXPECT_EQ(f16_to_float(0xFC00), -INFINITY); }

TEST(Bf16, All65536ValuesFollowTheFormula) {
    for (uint32_t h = 0; h < 65536; h++)
        ASSERT_TRUE(same_value(double(bf16_to_float(uint16_t(h))), value_of(h, 8, 7, true))) << h;
}
TEST(Bf16, PiIs0x4049) { EXPECT_EQ(bf16_to_float(0x4049), 3.140625f); }

TEST(Load, ReadsAtAnyAddress) {
    const unsigned char bytes[] = {9, 0, 0, 128, 63, 9};   // 1.0f, little-endian, at an odd address
    EXPECT_EQ(load<float>(bytes + 1), 1.0f);
}

// The sizes and minimums of ggml-common.h.
TEST(Format, EachDtype) {
    struct Expected {
        Dtype dtype;
        const char* name;
        int values, bytes;
        bool minimums;
    };
    const Expected all[] = {{Dtype::F64, "F64", 1, 8, false},
                            {Dtype::F32, "F32", 1, 4, false},
                            {Dtype::BF16, "BF16", 1, 2, false},
                            {Dtype::F16, "F16", 1, 2, false},
                            {Dtype::F8_E4M3, "F8_E4M3", 1, 1, false},
                            {Dtype::Q4_0, "Q4_0", 32, 2 + 16, false},
                            {Dtype::Q4_1, "Q4_1", 32, 4 + 16, true},
                            {Dtype::Q5_0, "Q5_0", 32, 2 + 4 + 16, false},
                            {Dtype::Q5_1, "Q5_1", 32, 4 + 4 + 16, true},
                            {Dtype::Q8_0, "Q8_0", 32, 2 + 32, false},
                            {Dtype::Q2_K, "Q2_K", 256, 16 + 64 + 4, true},
                            {Dtype::Q3_K, "Q3_K", 256, 32 + 64 + 12 + 2, false},
                            {Dtype::Q4_K, "Q4_K", 256, 4 + 12 + 128, true},
                            {Dtype::Q5_K, "Q5_K", 256, 4 + 12 + 32 + 128, true},
                            {Dtype::Q6_K, "Q6_K", 256, 128 + 64 + 16 + 2, false},
                            {Dtype::IQ4_NL, "IQ4_NL", 32, 2 + 16, false},
                            {Dtype::IQ4_XS, "IQ4_XS", 256, 2 + 2 + 4 + 128, false}};
    EXPECT_EQ(std::size(all), std::size(ALL_DTYPES));
    for (const Expected& e : all) {
        const Format& f = format_of(e.dtype);
        EXPECT_STREQ(f.name, e.name);
        EXPECT_EQ(f.values, e.values) << e.name;
        EXPECT_EQ(f.bytes, e.bytes) << e.name;
        EXPECT_EQ(f.minimums, e.minimums) << e.name;
        EXPECT_EQ(quantised(e.dtype), e.values > 1) << e.name;
        EXPECT_EQ(row_bytes(e.dtype, 768), size_t(768 / e.values * e.bytes)) << e.name;
    }
}
TEST(RowBytes, OfALongRowDoNotOverflow) { EXPECT_EQ(row_bytes(Dtype::F64, 1 << 30), size_t(1) << 33); }
TEST(Real, HasItsDtype) { EXPECT_EQ(row_bytes(REAL, 1), sizeof(real)); }

// -- 2.2 Matrix -------------------------------------------------------------------------------------

// e4m3 weights whose row, column and scales are all distinct enough to see a wrong block.
struct ScaledMatrix {
    std::string weights, scales;
    Matrix matrix;

    ScaledMatrix(int rows, int cols) {
        Noise noise{{uint64_t(rows * 1000 + cols)}};
        weights = random_data("F8_E4M3", uint64_t(rows) * uint64_t(cols), 0, 1, noise);
        for (int i = 0; i < (rows + 127) / 128 * ((cols + 127) / 128); i++) {
            float s = 1 + 0.001f * float(i);
            append_bytes(scales, &s, 4);
        }
        matrix = {reinterpret_cast<const std::byte*>(weights.data()),
                  reinterpret_cast<const std::byte*>(scales.data()), Dtype::F8_E4M3, rows, cols, 0, 0};
    }
    // W[r][c] = e4m3(q[r][c]) * scale[r / 128][c / 128], one rounding
    real value(int r, int c) const {
        int block = r / 128 * ((matrix.cols + 127) / 128) + c / 128;
        real weight = e4m3_to_float(uint8_t(weights[size_t(r) * size_t(matrix.cols) + size_t(c)]));
        return weight * load<float>(scales.data() + 4 * size_t(block));
    }
};

static void expect_rows(const ScaledMatrix& m, const Matrix& view, int first) {
    Vector row(size_t(view.cols));
    for (int r = 0; r < view.rows; r++) {
        widen_plain(row.data(), view, r);
        for (int c = 0; c < view.cols; c++)
            ASSERT_EQ(row[size_t(c)], m.value(first + r, c)) << first + r << "," << c;
    }
}

TEST(ScaleBlocks, WholeOnes) {
    ScaledMatrix m(256, 256);
    expect_rows(m, m.matrix, 0);
}
TEST(ScaleBlocks, PartialInRowsAndColumns) {
    ScaledMatrix m(300, 200);
    expect_rows(m, m.matrix, 0);
}
TEST(ScaleBlocks, SmallerThanOne) {
    ScaledMatrix m(3, 5);
    expect_rows(m, m.matrix, 0);
}
TEST(ScaleBlocks, KvAProjHas576RowsAnd5RowsOfScales) {
    ScaledMatrix m(576, 130);
    EXPECT_EQ(m.scales.size(), size_t(5 * 2 * 4));
    expect_rows(m, m.matrix, 0);
}
TEST(ScaleBlocks, AViewMayBeginInsideABlock) {
    ScaledMatrix m(300, 200);
    expect_rows(m, m.matrix.view(100, 60), 100);
    expect_rows(m, m.matrix.view(127, 2), 127);
    expect_rows(m, m.matrix.view(128, 172), 128);
}
TEST(ScaleBlocks, AViewOfAView) {
    ScaledMatrix m(300, 200);
    expect_rows(m, m.matrix.view(90, 200).view(50, 100), 140);
}
TEST(Matrix, ViewOfPlainRows) {
    const float data[] = {1, 2, 3, 4, 5, 6};
    Matrix m{reinterpret_cast<const std::byte*>(data), nullptr, Dtype::F32, 3, 2, 0};
    real row[2];
    widen_plain(row, m.view(1, 2), 1);
    EXPECT_EQ(row[0], 5);
    EXPECT_EQ(m.view(1, 2).scale_row(0), nullptr);
}
TEST(Matrix, IsFalseWithoutData) { EXPECT_FALSE(Matrix{}); }
TEST(Matrix, RowsMayBeFurtherApartThanTheyAreLong) {
    const float data[] = {1, 2, 99, 3, 4, 99, 5, 6, 99};
    Matrix m{reinterpret_cast<const std::byte*>(data), nullptr, Dtype::F32, 3, 2, 0, 3 * sizeof(float)};
    real row[2];
    for (int r = 0; r < 3; r++) {
        widen_plain(row, m, r);
        EXPECT_EQ(row[0], 2 * r + 1);
        EXPECT_EQ(row[1], 2 * r + 2);
    }
    widen_plain(row, m.view(1, 2).view(1, 1), 0);          // a view keeps the distance
    EXPECT_EQ(row[0], 5);
}
TEST(Matrix, OfTheProgramsOwnNumbers) {
    const real data[] = {1, 2, 3, 4, 5, real(1) / 3};
    Matrix m = real_matrix(data, 2, 3);
    real row[3];
    widen_plain(row, m, 1);
    EXPECT_TRUE(same_bits(row, data + 3, 3));
    EXPECT_TRUE(m.rows == 2 && m.cols == 3 && m.dtype == REAL);
}

// -- narrowing --------------------------------------------------------------------------------------

// x rounded to a 16-bit code: by IEEE 754 the nearest, of two equally near ones the even one. `widen` gives
// the value of a code; `steps` are the codes from 0 to infinity.
struct Narrowing {
    uint16_t (*narrow)(float);
    float (*widen)(uint16_t);
    uint32_t infinity;
    float overflow;                                // half a step beyond the largest number
};
constexpr Narrowing NARROWINGS[] = {{float_to_f16, f16_to_float, 0x7C00, 65520.0f},
                                    {float_to_bf16, bf16_to_float, 0x7F80, 0x1.FFp127f}};

TEST(Narrow, IsTheInverseOfWidening) {
    for (const Narrowing& n : NARROWINGS) {
        for (uint32_t code = 0; code < 65536; code++) {
            float x = n.widen(uint16_t(code));
            if (std::isnan(x)) {
                EXPECT_TRUE(std::isnan(n.widen(n.narrow(x)))) << code;
                EXPECT_EQ(n.narrow(x) & 0x8000u, code & 0x8000) << code;
            } else {
                ASSERT_EQ(n.narrow(x), code);
            }
        }
    }
}
TEST(Narrow, TakesTheNearestAndOfTwoTheEvenOne) {
    for (const Narrowing& n : NARROWINGS) {
        for (uint32_t low = 0; low < n.infinity; low++) {
            uint32_t high = low + 1, even = low % 2 ? high : low;
            double above = high == n.infinity ? 2 * double(n.overflow) - double(n.widen(uint16_t(low)))
                                              : double(n.widen(uint16_t(high)));
            float middle = float((double(n.widen(uint16_t(low))) + above) / 2);      // exact
            float before = std::nextafter(middle, 0.0f), after = std::nextafter(middle, INFINITY);
            for (uint32_t sign : {0u, 0x8000u}) {
                float s = sign ? -1.0f : 1.0f;
                ASSERT_EQ(n.narrow(s * middle), sign | even) << low;
                ASSERT_EQ(n.narrow(s * before), sign | low) << low;
                ASSERT_EQ(n.narrow(s * after), sign | high) << low;
            }
        }
    }
}
TEST(Narrow, AtTheEnds) {
    for (const Narrowing& n : NARROWINGS) {
        EXPECT_EQ(n.narrow(INFINITY), n.infinity);
        EXPECT_EQ(n.narrow(-INFINITY), n.infinity | 0x8000);
        EXPECT_EQ(n.narrow(n.overflow), n.infinity);
        EXPECT_EQ(n.narrow(std::nextafter(n.overflow, 0.0f)), n.infinity - 1);
        EXPECT_EQ(n.narrow(-0.0f), 0x8000);
        EXPECT_TRUE(std::isnan(n.widen(n.narrow(std::bit_cast<float>(0x7F800001)))));   // NaN by a low bit
    }
    EXPECT_EQ(float_to_f16(std::numeric_limits<float>::denorm_min()), 0);
    EXPECT_EQ(float_to_f16(0x1p-25f), 0);                                               // ties to even
    EXPECT_EQ(float_to_f16(0x1.000002p-25f), 1);
}

// All floats near a code of e4m3 or between two of them: the nearest, of two the even one, at most 448.
TEST(NarrowToE4m3, TakesTheNearestAndOfTwoTheEvenOne) {
    for (int code = 0; code < 126; code++) {
        float low = E4M3[size_t(code)], high = E4M3[size_t(code) + 1], middle = (low + high) / 2;     // exact
        for (int sign : {0, 128}) {
            float s = sign ? -1.0f : 1.0f;
            EXPECT_EQ(float_to_e4m3(s * low), sign | code);
            EXPECT_EQ(float_to_e4m3(s * middle), sign | (code + code % 2)) << code;
            EXPECT_EQ(float_to_e4m3(s * std::nextafter(middle, 0.0f)), sign | code) << code;
            EXPECT_EQ(float_to_e4m3(s * std::nextafter(middle, 500.0f)), sign | (code + 1)) << code;
        }
    }
    for (float large : {448.0f, 464.0f, 1e30f, INFINITY}) EXPECT_EQ(float_to_e4m3(-large), 0x80 | 126);
    EXPECT_EQ(float_to_e4m3(NAN) & 127, 127);
}

static Vector widened_q8_0(const std::string& bytes) {
    Vector out(bytes.size() / 34 * 32);
    widen_plain(out.data(), {reinterpret_cast<const std::byte*>(bytes.data()), nullptr, Dtype::Q8_0, 1,
                             int(out.size()), 0, 0}, 0);
    return out;
}
static std::string stored(const Vector& x, Dtype dtype) {
    std::string out(row_bytes(dtype, int(x.size())), '\x55');
    store_row(reinterpret_cast<std::byte*>(out.data()), x.data(), int(x.size()), dtype);
    return out;
}

// d is the largest / 127 in f16, off by 2^-11 of it, or by half of f16's smallest step 2^-24. The nearest
// multiple of d is at most d / 2 away, and a little for the roundings of 1 / d and of x / d, 2^-22 of 127 d;
// the largest numbers may be beyond 127 d by what d lost: 127 * 2^-25 at most, or 127 * 2^-11 d < d / 2.
TEST(QuantiseQ8_0, IsWithinHalfAStep) {
    Noise noise;
    for (int e = -40; e <= 15; e++) {
        for (int round = 0; round < 50; round++) {
            Vector x = noise.vector(32);
            for (real& v : x) v = real(std::ldexp(double(v), e));
            std::string bytes = stored(x, Dtype::Q8_0);
            Vector back = widened_q8_0(bytes);
            long double d = half_at(reinterpret_cast<const uint8_t*>(bytes.data())), top = 0;
            for (real v : x) top = std::max(top, std::fabs((long double)(v)));
            ASSERT_LE(std::fabs(d - top / 127), std::max(top / 127 * 0x1p-11L, 0x1p-25L));
            long double bound = d * (0.5L + 127 * 0x1p-22L) + (d < 0x1p-14L ? 127 * 0x1p-25L : 0);
            for (size_t i = 0; i < 32; i++)
                ASSERT_LE(std::fabs(back[i] - (long double)(x[i])), bound) << "exponent " << e;
        }
    }
}
TEST(QuantiseQ8_0, UsesItsWholeRange) {
    Vector x(32);
    for (size_t i = 0; i < 32; i++) x[i] = real(8 * (int(i) - 16) + (i == 0 ? 1 : 0));       // -127 .. 120
    std::string bytes = stored(x, Dtype::Q8_0);
    EXPECT_EQ(half_at(reinterpret_cast<const uint8_t*>(bytes.data())), 1);
    for (size_t i = 0; i < 32; i++) EXPECT_EQ(int8_t(bytes[2 + i]), int(x[i])) << i;
}
TEST(QuantiseQ8_0, OfZeroIsZero) {
    EXPECT_EQ(stored(Vector(32), Dtype::Q8_0), std::string(34, '\0'));
    EXPECT_EQ(widened_q8_0(stored(Vector(32, real(-1e-30)), Dtype::Q8_0)), Vector(32));
}
// A number that is none must not turn into one, or the check of the logits would have nothing to see.
TEST(QuantiseQ8_0, KeepsWhatIsNotFinite) {
    for (double bad : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
        for (size_t place : {0u, 7u, 31u}) {
            Vector x = Noise{}.vector(64);
            x[place] = real(bad);
            Vector back = widened_q8_0(stored(x, Dtype::Q8_0));
            EXPECT_FALSE(std::isfinite(back[place])) << bad << " at " << place;
            for (size_t i = 32; i < 64; i++) ASSERT_TRUE(std::isfinite(back[i]));   // the other block
        }
    }
}
TEST(StoreRow, KeepsRealNumbersAsTheyAre) {
    Vector x = Noise{}.vector(37);
    std::string bytes = stored(x, REAL);
    EXPECT_EQ(std::memcmp(bytes.data(), x.data(), bytes.size()), 0);
}
TEST(StoreRow, RoundsToBf16) {
    Vector x = Noise{}.vector(37);
    std::string bytes = stored(x, Dtype::BF16);
    for (size_t i = 0; i < 37; i++)
        EXPECT_EQ(load<uint16_t>(bytes.data() + 2 * i), float_to_bf16(float(x[i]))) << i;
}
TEST(StoreRow, CutsARowIntoBlocksOfQ8_0) {
    Vector x = Noise{}.vector(96);
    std::string bytes = stored(x, Dtype::Q8_0);
    for (size_t b = 0; b < 3; b++) {
        Vector part(x.begin() + int64_t(32 * b), x.begin() + int64_t(32 * b + 32));
        EXPECT_EQ(bytes.substr(34 * b, 34), stored(part, Dtype::Q8_0)) << b;
    }
}
