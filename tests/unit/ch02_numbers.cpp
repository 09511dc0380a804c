// Chapter 2: what the bits of a weight mean.
#include "unit.h"

// The value of a floating-point code with `exponent_bits` and `fraction_bits`, as IEEE 754 defines it:
// subnormals below exponent 1, and for `has_infinity` the largest exponent is infinity and NaN.
static double value_of(uint32_t code, int exponent_bits, int fraction_bits, bool has_infinity) {
    int bias = (1 << (exponent_bits - 1)) - 1, e = int(code >> fraction_bits) & ((1 << exponent_bits) - 1);
    double f = double(code & ((1u << fraction_bits) - 1)) / (1 << fraction_bits);
    double sign = (code >> (exponent_bits + fraction_bits)) & 1 ? -1 : 1;
    if (has_infinity && e == (1 << exponent_bits) - 1) return f != 0 ? std::nan("") : sign * INFINITY;
    return sign * (e ? std::pow(2.0, e - bias) * (1 + f) : std::pow(2.0, 1 - bias) * f);
}

static bool same_value(double a, double b) {
    return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

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
TEST(SizeOf, EachDtype) {
    EXPECT_EQ(size_of(Dtype::F32), 4u);
    EXPECT_EQ(size_of(Dtype::BF16), 2u);
    EXPECT_EQ(size_of(Dtype::F16), 2u);
    EXPECT_EQ(size_of(Dtype::F8_E4M3), 1u);
}

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
                  reinterpret_cast<const std::byte*>(scales.data()), Dtype::F8_E4M3, rows, cols, 0};
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
