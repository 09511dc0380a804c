// gguf.h: names, and the layouts that only llama.cpp's files have.
#include "unit.h"

#include "weights.h"

// -- 3 names ----------------------------------------------------------------------------------------

TEST(GgufNames, EachHasItsPlaceOnBothSides) {
    for (const TensorName& n : MODEL_NAMES) {
        EXPECT_EQ(name_from_gguf(n.gguf), n.ours);
        EXPECT_EQ(name_in_gguf(n.ours), n.gguf);
    }
    using Names = std::span<const TensorName>;
    for (Names names : {Names(LAYER_NAMES), Names(OTHER_LAYER_NAMES)}) {
        for (const TensorName& n : names) {
            std::string gguf = text_of("blk.17.%s", n.gguf), ours = text_of("model.layers.17.%s", n.ours);
            EXPECT_EQ(name_from_gguf(gguf), ours);
            EXPECT_EQ(name_in_gguf(ours), gguf);
            EXPECT_EQ(name_from_gguf(n.gguf), "") << "a layer's tensor without a layer";
        }
    }
    EXPECT_EQ(name_in_gguf("model.layers.3.mlp.experts.12.up_proj.weight"), "blk.3.ffn_up_exps.weight");
}
TEST(GgufNames, HaveOneSpelling) {
    for (const char* name : {"blk.07.attn_q.weight", "blk..attn_q.weight", "blk.-1.attn_q.weight",
                             "blk.1.token_embd.weight", "blk.99999999999.attn_q.weight", "attn_q.weight", ""})
        EXPECT_EQ(name_from_gguf(name), "") << name;
    EXPECT_EQ(name_in_gguf("model.layers.01.self_attn.q_proj.weight"),
              "model.layers.01.self_attn.q_proj.weight");
}

// -- 4 Llama ----------------------------------------------------------------------------------------

static RopeConfig llama31(double factor, double context) {
    RopeConfig rope;
    rope.theta = 500000, rope.scaling = Scaling::LLAMA3, rope.factor = factor;
    rope.low_freq_factor = 1, rope.high_freq_factor = 4, rope.original_context = context;
    return rope;
}

// By what the frequencies are divided is the quotient of chapter 6.1's frequencies, to the bit.
TEST(Llama3Divisors, AreThoseOfChapter6) {
    for (int dim : {64, 128}) {
        RopeConfig scaled = llama31(8, 8192), plain = scaled;
        plain.scaling = Scaling::NONE;
        std::vector<double> divisors = llama3_divisors(scaled, dim);
        Rope with = make_rope(scaled, dim), without = make_rope(plain, dim);
        ASSERT_EQ(divisors.size(), size_t(dim / 2));
        for (size_t i = 0; i < divisors.size(); i++) {
            EXPECT_EQ(divisors[i], without.frequency[i] / with.frequency[i]) << i;
            EXPECT_EQ(unscaled_frequency(scaled, int(i), dim), without.frequency[i]) << i;
        }
    }
}
static Tensor divisors_tensor(std::vector<float>& memory, const RopeConfig& rope, int dim) {
    for (double d : llama3_divisors(rope, dim)) memory.push_back(float(d));
    const std::byte* data = reinterpret_cast<const std::byte*>(memory.data());
    return {"freqs", "F32", {memory.size()}, data, 4 * memory.size()};
}
TEST(Llama3Divisors, TellTheScaling) {
    for (auto [factor, context] : {std::pair{8.0, 8192.0}, {32.0, 8192.0}, {4.0, 1024.0}}) {
        std::vector<float> memory;
        RopeConfig rope = llama31(factor, context), bare;
        bare.theta = rope.theta;
        RopeConfig found = gguf_llama3(bare, divisors_tensor(memory, rope, 128), 128);
        EXPECT_EQ(found.scaling, Scaling::LLAMA3);
        EXPECT_EQ(found.factor, factor);
        EXPECT_EQ(found.original_context, context);
        EXPECT_EQ(found.low_freq_factor, 1);
        EXPECT_EQ(found.high_freq_factor, 4);
    }
}
TEST(Llama3Divisors, OfAnotherRuleAreRefused) {
    std::vector<float> memory;
    RopeConfig bare;
    bare.theta = 500000;
    Tensor t = divisors_tensor(memory, llama31(8, 8192), 128);
    memory[40] *= 1.001f;
    EXPECT_TRUE(refuses([&] { gguf_llama3(bare, t, 128); },
                        "'rope_freqs.weight' is not Llama 3.1's scaling"));
    EXPECT_TRUE(refuses([&] { gguf_llama3(bare, t, 64); }, "'rope_freqs.weight' is not 32 F32"));
    t.dtype = "F16";
    EXPECT_TRUE(refuses([&] { gguf_llama3(bare, t, 128); }, "'rope_freqs.weight' is not 64 F32"));
}

// Rows in pairs: the product is that of the rows in order, to the bit.
TEST(Pairs, MatmulPutsThemInOrder) {
    constexpr int HEADS = 3, D = 8, COLS = 40;
    Noise noise;
    Vector rows = noise.vector(HEADS * D * COLS), paired;
    for (int h = 0; h < HEADS; h++) {
        for (int i = 0; i < D; i++) {                       // x0 x4 x1 x5 ...
            int from = h * D + i / 2 + (i % 2 ? D / 2 : 0);
            paired.insert(paired.end(), rows.begin() + from * COLS, rows.begin() + (from + 1) * COLS);
        }
    }
    Matrix plain = real_matrix(rows.data(), HEADS * D, COLS);
    Matrix pairs = real_matrix(paired.data(), HEADS * D, COLS);
    pairs.pairs = D;
    for (int T : {0, 1, 3, 40}) {
        Vector x = noise.vector(size_t(T * COLS)), expected(size_t(T * HEADS * D)), out(expected.size(), 7);
        matmul(expected.data(), x.data(), plain, T);
        matmul(out.data(), x.data(), pairs, T);
        EXPECT_TRUE(same_bits(out, expected)) << T;
    }
}
// float_rows brings rows in order into pairs: the inverse.
TEST(Pairs, AreWrittenAsTheyAreRead) {
    Vector rows(6 * 2 * 2);
    std::iota(rows.begin(), rows.end(), real(0));
    std::vector<float> out = float_rows(real_matrix(rows.data(), 12, 2), 0, 12, 6);
    for (int col = 0; col < 2; col++) {
        Vector column;
        for (size_t r = 0; r < 12; r++) column.push_back(out[2 * r + size_t(col)]);
        undo_pairs(column.data(), 12, 6);
        for (size_t r = 0; r < 12; r++) EXPECT_EQ(column[r], real(2 * r + size_t(col)));
    }
}

TEST(Transposed, IsWithoutMovingAnything) {
    real data[] = {1, 2, 3, 4, 5, 6};
    Matrix m = real_matrix(data, 2, 3), t = m.transpose();
    EXPECT_TRUE(t.rows == 3 && t.cols == 2 && t.transposed && t.data == m.data);
    EXPECT_TRUE(t.stored().rows == 2 && !t.stored().transposed && !t.transpose().transposed);
    EXPECT_TRUE(m.stored().rows == 2 && !m.stored().transposed);
}
// What is stored is multiplied as it is stored: W x by sums along its rows, W^T x by dots with them.
TEST(Transposed, MultipliesAsWhatIsStoredDoes) {
    Noise noise;
    constexpr int ROWS = 33, COLS = 20, T = 3;              // of what is stored
    Vector data = noise.vector(ROWS * COLS), tall = noise.vector(T * ROWS), wide = noise.vector(T * COLS);
    Matrix m = real_matrix(data.data(), ROWS, COLS);
    Vector expected(T * COLS), out(T * COLS, 7);
    matmul_transposed({expected.data(), COLS}, {tall.data(), ROWS}, m, T);
    matmul({out.data(), COLS}, {tall.data(), ROWS}, m.transpose(), T);
    EXPECT_TRUE(same_bits(out, expected));
    Vector expected2(T * ROWS), out2(T * ROWS, 7);
    matmul({expected2.data(), ROWS}, {wide.data(), COLS}, m, T);
    matmul_transposed({out2.data(), ROWS}, {wide.data(), COLS}, m.transpose(), T);
    EXPECT_TRUE(same_bits(out2, expected2));
}
