// gguf.h: blocks of small integers, their formats and how they are chosen.
#include "unit.h"

#include "weights.h"

constexpr Dtype WRITTEN[] = {Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1,
                             Dtype::Q8_0, Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K};

// -- 1 the container --------------------------------------------------------------------------------

// The numbers of ggml.h. It has F64 too, which files of models do not; F8_E4M3 is not in GGUF files.
TEST(GgmlType, EachDtype) {
    const std::pair<Dtype, uint32_t> all[] = {
        {Dtype::F32, 0},   {Dtype::F16, 1},   {Dtype::Q4_0, 2},  {Dtype::Q4_1, 3},  {Dtype::Q5_0, 6},
        {Dtype::Q5_1, 7},  {Dtype::Q8_0, 8},  {Dtype::Q2_K, 10}, {Dtype::Q3_K, 11}, {Dtype::Q4_K, 12},
        {Dtype::Q5_K, 13}, {Dtype::Q6_K, 14}, {Dtype::IQ4_NL, 20}, {Dtype::IQ4_XS, 23}, {Dtype::BF16, 30}};
    EXPECT_EQ(std::size(all) + 2, std::size(ALL_DTYPES));
    for (auto [dtype, number] : all) {
        EXPECT_EQ(ggml_type(dtype), number) << format_of(dtype).name;
        EXPECT_EQ(weights_dtype(GGML_TYPES[number]), dtype) << number;
    }
    EXPECT_EQ(weights_dtype("I64"), std::nullopt);
    EXPECT_EQ(weights_dtype(""), std::nullopt);
    EXPECT_DEATH(ggml_type(Dtype::F8_E4M3), "F8_E4M3 has no place in a GGUF file");
}

// -- 2 blocks ---------------------------------------------------------------------------------------

// A block's integers, scales and minimums are those of the definition, value by value, and the numbers are
// the exact ones, rounded once: no tolerance.
static void expect_block(Dtype dtype, const char* bytes) {
    int values = format_of(dtype).values;
    Block block;
    unpack(block, reinterpret_cast<const std::byte*>(bytes), dtype);
    Defined expected = define(dtype, bytes);
    ASSERT_EQ(expected.q.size(), size_t(values));
    EXPECT_TRUE(same_value(double(block.d), expected.d));
    EXPECT_TRUE(same_value(double(block.m), expected.m));
    Vector out(256, 7);
    dequantise(out.data(), block, values);
    for (int i = 0; i < values; i++) {
        size_t at = size_t(i);
        ASSERT_EQ(block.q[i], expected.q[at]) << format_of(dtype).name << " " << i;
        ASSERT_EQ(block.scale[i / 16], expected.scale[at]) << format_of(dtype).name << " " << i;
        ASSERT_EQ(block.minimum[i / 16], expected.minimum[at]) << format_of(dtype).name << " " << i;
        if (!std::isfinite(expected.d) || !std::isfinite(expected.m)) continue;
        ASSERT_TRUE(same_value(double(out[at]), double(float(expected.value(at)))))
            << format_of(dtype).name << " " << i;
    }
    for (size_t i = size_t(values); i < 256; i++) ASSERT_EQ(out[i], 7);       // and no further
}

TEST(Blocks, UnpackAsTheirFormatsAreDefined) {
    for (Dtype dtype : QUANTISED) {
        Noise noise;
        for (int round = 0; round < 300; round++) {
            Contents contents = round % 2 ? Contents::ANY : Contents::TAME;
            std::string bytes = "x" + random_weights(dtype, format_of(dtype).values, noise, contents);
            ASSERT_NO_FATAL_FAILURE(expect_block(dtype, bytes.data() + 1));
        }
        for (int all : {0x00, 0x0F, 0x80, 0xF0, 0xFF}) {
            std::string bytes(size_t(format_of(dtype).bytes), char(all));
            ASSERT_NO_FATAL_FAILURE(expect_block(dtype, bytes.data()));
        }
    }
}
// Each bit of a block that is no part of d or m is one bit of one integer, scale or minimum.
TEST(Blocks, EachBitCounts) {
    for (Dtype dtype : QUANTISED) {
        Noise noise;
        std::string bytes = random_weights(dtype, format_of(dtype).values, noise);
        for (size_t bit = 0; bit < 8 * bytes.size(); bit++) {
            std::string other = bytes;
            other[bit / 8] = char(other[bit / 8] ^ 1 << bit % 8);
            Block a, b;
            unpack(a, reinterpret_cast<const std::byte*>(bytes.data()), dtype);
            unpack(b, reinterpret_cast<const std::byte*>(other.data()), dtype);
            size_t n = size_t(format_of(dtype).values);
            bool same = a.d == b.d && a.m == b.m && std::equal(a.q, a.q + n, b.q) &&
                        std::equal(a.scale, a.scale + n / 16, b.scale) &&
                        std::equal(a.minimum, a.minimum + n / 16, b.minimum);
            ASSERT_FALSE(same) << format_of(dtype).name << ", bit " << bit;
            ASSERT_NO_FATAL_FAILURE(expect_block(dtype, other.data()));
        }
    }
}

// tests/golden/blocks: blocks of each format and what gguf-py, llama.cpp's own Python package, makes of them.
TEST(Blocks, AreTheNumbersOfGgufPy) {
    fs::path path = "tests/golden/blocks/blocks.safetensors";
    Mapping mapping(path);
    TensorFile file = parse_safetensors({mapping.data(), mapping.size()}, path.string());
    std::map<std::string, const std::byte*> data;
    std::map<std::string, uint64_t> rows;
    for (const TensorInfo& t : file.tensors)
        data[t.name] = mapping.data() + file.data_begin + t.begin, rows[t.name] = t.shape.at(0);
    EXPECT_EQ(data.size(), 2 * std::size(QUANTISED));
    for (Dtype dtype : QUANTISED) {
        std::string name = format_of(dtype).name;
        uint64_t blocks = rows.at(name);
        int values = format_of(dtype).values;
        ASSERT_GE(blocks, 8u) << name;
        Matrix w{data.at(name), nullptr, dtype, int(blocks), values, 0, 0};
        Vector row(static_cast<size_t>(values));
        for (int r = 0; r < w.rows; r++) {
            widen_plain(row.data(), w, r);
            for (int i = 0; i < values; i++) {
                size_t at = size_t(r) * row.size() + size_t(i);
                float expected = load<float>(data.at(name + ".values") + 4 * at);
                ASSERT_TRUE(same_value(double(row[size_t(i)]), double(expected)))
                    << name << ", block " << r << ", value " << i;
            }
        }
    }
}
TEST(Matrix, ViewsOfQuantisedRows) {
    for (Dtype dtype : QUANTISED) {
        RandomMatrix w(dtype, 7, 512, 1);
        Vector row(512);
        widen_plain(row.data(), w.matrix.view(2, 4).view(1, 3), 2);
        EXPECT_TRUE(same_bits(row, w.row(5))) << format_of(dtype).name;
    }
}

// Every bit of a block counts, so packing must give back each of them.
TEST(Pack, IsTheInverseOfUnpacking) {
    for (Dtype dtype : WRITTEN) {
        Noise noise;
        for (int round = 0; round < 300; round++) {
            std::string bytes = random_weights(dtype, format_of(dtype).values, noise);
            std::string again(bytes.size(), 'x');
            Block block;
            unpack(block, reinterpret_cast<const std::byte*>(bytes.data()), dtype);
            pack(reinterpret_cast<std::byte*>(again.data()), block, dtype);
            ASSERT_EQ(again, bytes) << format_of(dtype).name;
        }
    }
}

// -- 7 quantising -----------------------------------------------------------------------------------

// What a block of x becomes, and the sum of (x - value)^2 in long double.
struct Quantised {
    Vector values;
    long double error = 0;

    Quantised(const std::vector<float>& x, Dtype dtype) : values(x.size()) {
        std::string bytes(size_t(format_of(dtype).bytes), '\0');
        EXPECT_TRUE(quantise_block(reinterpret_cast<std::byte*>(bytes.data()), x.data(), dtype));
        Defined b = define(dtype, bytes.data());
        for (size_t i = 0; i < x.size(); i++) {
            values[i] = real(b.value(i));
            error += (b.value(i) - (long double)(x[i])) * (b.value(i) - (long double)(x[i]));
        }
    }
};
static std::vector<float> noisy_block(Dtype dtype, Noise& noise) {
    Vector x = noise.vector(size_t(format_of(dtype).values));
    return {x.begin(), x.end()};
}

// The plainest choice is that of ggml's reference code: the range of all values in equal steps, the outermost
// value at the end that has one step more, each value to the nearest. A block's search begins there. It must
// not end higher, but for d and m being rounded to f16 after it: that moves the outermost of 127 steps by up
// to 127 * 2^-12 of a step, its square is 0.001, and the square of a step's own rounding 1 / 12 on average.
TEST(Quantise, IsNoWorseThanEqualStepsOverTheRange) {
    for (Dtype dtype : WRITTEN) {
        Noise noise;
        Scheme s = scheme_of(dtype);
        for (int round = 0; round < 50; round++) {
            std::vector<float> x = noisy_block(dtype, noise);
            float top = *std::max_element(x.begin(), x.end()), bottom = *std::min_element(x.begin(), x.end());
            float extreme = top > -bottom ? top : bottom, d = f16_value(extreme / float(s.low)), m = 0;
            if (format_of(dtype).minimums)
                d = f16_value((top - std::min(bottom, 0.0f)) / float(s.high)), m = f16_value(-bottom);
            long double error = 0;
            for (float v : x) {
                long double q = std::clamp(std::round((v + m) / d), float(s.low), float(s.high));
                error += (q * d - m - v) * (q * d - m - v);
            }
            ASSERT_LE(Quantised(x, dtype).error, (1 + 12 * 0.001L) * error) << format_of(dtype).name;
        }
    }
}
TEST(Quantise, ZeroStaysZero) {
    for (Dtype dtype : WRITTEN) {
        std::vector<float> zeros(size_t(format_of(dtype).values));
        for (real v : Quantised(zeros, dtype).values) ASSERT_EQ(v, 0) << format_of(dtype).name;
    }
}
TEST(Quantise, RefusesWhatNoFormatCanSay) {
    for (Dtype dtype : WRITTEN) {
        for (float bad : {NAN, INFINITY, -INFINITY, 1e9f}) {
            Noise noise;
            std::vector<float> x = noisy_block(dtype, noise);
            std::string bytes(size_t(format_of(dtype).bytes), '\0');
            x.back() = bad;
            EXPECT_FALSE(quantise_block(reinterpret_cast<std::byte*>(bytes.data()), x.data(), dtype))
                << format_of(dtype).name << " " << bad;
        }
    }
}
