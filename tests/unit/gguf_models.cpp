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
                        "'rope_freqs.weight': not Llama 3.1's scaling"));
    EXPECT_TRUE(refuses([&] { gguf_llama3(bare, t, 64); }, "'rope_freqs.weight': not 32 F32"));
    t.dtype = "F16";
    EXPECT_TRUE(refuses([&] { gguf_llama3(bare, t, 128); }, "'rope_freqs.weight': not 64 F32"));
}

// How far a divisor may be off does not depend on what the file says: 6e-5, whatever its largest one.
TEST(Llama3Divisors, HaveOneTolerance) {
    RopeConfig bare;
    bare.theta = 500000;
    for (double factor : {8.0, 64.0, 1e5}) {
        std::vector<float> memory;
        Tensor t = divisors_tensor(memory, llama31(factor, 8192), 128);
        if (factor <= 64) { EXPECT_EQ(gguf_llama3(bare, t, 128).factor, factor); }
        memory[50] = float(factor) * 0.999f;
        EXPECT_TRUE(refuses([&] { gguf_llama3(bare, t, 128); }, "not Llama 3.1's scaling")) << factor;
    }
}

// -- 4 keys -----------------------------------------------------------------------------------------

// Keys of deepseek2 that are whole numbers.
struct WholeKeys {
    std::map<std::string, uint32_t> numbers;
    GgufKeys keys{"file", "deepseek2", {}};

    WholeKeys(std::map<std::string, uint32_t> given) : numbers(std::move(given)) {
        for (auto& [name, number] : numbers)
            keys.values["deepseek2." + name] = {GgufType::U32, false, 1,
                                                std::as_bytes(std::span(&number, 1))};
    }
    WholeKeys(const WholeKeys&) = delete;
};
struct Groups {
    int E, K;
    bool sigmoid, biased;
    std::map<std::string, uint32_t> keys;
    int n_group, topk_group;                                 // 0: refused
};

// V3 (256 experts, 8 used) and V2 (160, 6) came before the keys; of other gates with biases nothing is known.
TEST(GgufGroups, AreSaidOrKnown) {
    const char *count = "expert_group_count", *used = "expert_group_used_count";
    const Groups all[] = {{256, 8, true, true, {}, 8, 4},
                          {160, 6, false, false, {}, 8, 3},
                          {64, 6, false, false, {}, 1, 1},
                          {128, 8, true, true, {}, 0, 0},
                          {160, 6, true, true, {}, 0, 0},
                          {256, 4, true, true, {}, 0, 0},
                          {256, 8, true, true, {{count, 1}, {used, 1}}, 1, 1},
                          {256, 8, true, true, {{count, 0}}, 1, 1},
                          {128, 8, true, true, {{count, 4}, {used, 2}}, 4, 2},
                          {128, 8, true, true, {{count, 4}}, 0, 0},
                          {128, 8, true, true, {{count, 4}, {used, 5}}, 0, 0}};
    for (const Groups& g : all) {
        WholeKeys given(g.keys);
        Config c;
        c.E = g.E, c.K = g.K, c.sigmoid_affinity = g.sigmoid;
        auto read = [&] { gguf_groups(c, given.keys, g.biased); };
        if (g.n_group == 0) {
            EXPECT_TRUE(refuses(read, "'deepseek2.expert_group_")) << g.E << " " << g.K;
            continue;
        }
        read();
        EXPECT_EQ(c.n_group, g.n_group) << g.E;
        EXPECT_EQ(c.topk_group, g.topk_group) << g.E;
    }
}
TEST(GgufKeys, BoundsOfWholeNumbersAreNotCut) {
    WholeKeys given({{"zero", 0}, {"one", 1}, {"two", 2}});
    EXPECT_EQ(given.keys.number(".two", 1.1, 1e12), 2);
    EXPECT_TRUE(refuses([&] { given.keys.number(".one", 1.1, 1e12); }, "'deepseek2.one' is 1, outside 1.1"));
    EXPECT_TRUE(refuses([&] { given.keys.number(".zero", 1e-6, 1); }, "'deepseek2.zero' is 0, outside 1e-"));
    EXPECT_TRUE(refuses([&] { given.keys.number(".two", 0, 1.9); }, "'deepseek2.two' is 2, outside"));
}
TEST(CheckRope, HasOneRuleForBothKindsOfFiles) {
    RopeConfig rope = llama31(8, 8192);
    EXPECT_NO_THROW(check_rope(rope, "file"));
    rope.high_freq_factor = 1;
    EXPECT_TRUE(refuses([&] { check_rope(rope, "file"); }, "'high_freq_factor'"));
    RopeConfig yarn;
    yarn.scaling = Scaling::YARN;
    EXPECT_NO_THROW(check_rope(yarn, "file"));
    yarn.beta_slow = 32;
    EXPECT_TRUE(refuses([&] { check_rope(yarn, "file"); }, "file: 'beta_fast' is not above"));
    for (double factor : {0.5, 2e6, double(NAN)}) {
        RopeConfig odd;
        odd.scaling = Scaling::YARN, odd.factor = factor;
        EXPECT_TRUE(refuses([&] { check_rope(odd, "file"); }, "file: 'factor'")) << factor;
    }
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

// -- 8 which format for which matrix ----------------------------------------------------------------

// llama-quantize (llama-quant.cpp, llama_tensor_get_type_impl): of an 80-layer llama whose heads share keys,
// and of an 80-layer qwen2, W^V has five bits where it would have four.
TEST(TargetDtype, OfWVInSeventyBillions) {
    struct Case {
        bool bias, norm;
        int layers, heads, key_heads;
        Dtype expected;
    };
    const Case all[] = {{false, false, 80, 64, 8, Dtype::Q5_K}, {false, false, 80, 64, 64, Dtype::Q4_K},
                        {true, false, 80, 64, 8, Dtype::Q5_K},  {true, false, 80, 64, 64, Dtype::Q5_K},
                        {false, true, 80, 64, 8, Dtype::Q4_K},  {false, false, 64, 64, 8, Dtype::Q4_K}};
    for (const Case& one : all) {
        Config c;
        c.qkv_bias = one.bias, c.qk_norm = one.norm, c.n_layers = one.layers;
        c.H = one.heads, c.G = one.key_heads, c.head_dim = 128;
        for (int l = 0; l < c.n_layers; l++) {
            auto at = [&](const char* type, const char* name) {
                return *target_dtype(file_type(type), text_of("blk.%d.%s.weight", l, name), 8192, c);
            };
            bool more = l < c.n_layers / 8 || l >= 7 * c.n_layers / 8 || (l - c.n_layers / 8) % 3 == 2;
            EXPECT_EQ(at("q4_k_m", "attn_v"), more ? Dtype::Q6_K : one.expected) << l;
            EXPECT_EQ(at("q5_k_m", "attn_v"), more ? Dtype::Q6_K : Dtype::Q5_K) << l;
            EXPECT_EQ(at("q4_k_m", "ffn_down"), more ? Dtype::Q6_K : Dtype::Q4_K) << l;
            EXPECT_EQ(at("q4_k_m", "attn_k"), Dtype::Q4_K) << l;
            EXPECT_EQ(at("q8_0", "attn_v"), Dtype::Q8_0) << l;
        }
    }
}
TEST(IsQuantised, ByItsSmallIntegersAlone) {
    for (Dtype dtype : ALL_DTYPES) {
        Checkpoint c;
        c.tensors["norm"].dtype = "F32", c.tensors["ids"].dtype = "I64";
        EXPECT_FALSE(is_quantised(c));
        c.tensors["weight"].dtype = format_of(dtype).name;
        EXPECT_EQ(is_quantised(c), format_of(dtype).values > 1) << format_of(dtype).name;
    }
}
