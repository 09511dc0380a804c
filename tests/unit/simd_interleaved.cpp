// simd.h: interleaved rows give the bits of the rows as they were.
#include "unit.h"

#include "weights.h"

constexpr Dtype INTERLEAVED[] = {Dtype::Q2_K, Dtype::Q3_K, Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K};

static std::vector<Kernels> interleaving_kernels() {
    std::vector<Kernels> all = available_kernels();
    std::erase_if(all, [](const Kernels& k) { return !k.rearrange; });
    return all;
}

// A copy of W, interleaved; just as large, so that a sanitizer sees a read beyond the end.
struct Interleaved {
    std::vector<std::byte> bytes;
    Matrix matrix;

    explicit Interleaved(const Matrix& w) : bytes(size_t(w.rows) * row_bytes(w.dtype, w.cols)), matrix(w) {
        for (int r = 0; r < w.rows; r += SIDE)
            reorder<true>(bytes.data() + (w.row(r) - w.data), w.row(r), w.dtype, w.cols);
        matrix.data = bytes.data(), matrix.interleaved = true;
    }
};

// -- the order --------------------------------------------------------------------------------------

TEST(Interleaved, EachDwordHasItsLine) {
    for (Dtype d : INTERLEAVED) {
        std::set<int> seen;
        for (int i = 0; i < format_of(d).bytes / 4; i++) seen.insert(dword_of_line(d, i));
        EXPECT_EQ(int(seen.size()), format_of(d).bytes / 4) << format_of(d).name;
        EXPECT_EQ(*seen.begin(), 0) << format_of(d).name;
        EXPECT_EQ(*seen.rbegin(), format_of(d).bytes / 4 - 1) << format_of(d).name;
    }
}
TEST(Interleaved, RowsComeBack) {
    for (Dtype d : INTERLEAVED) {
        RandomMatrix w(d, 2 * SIDE, 3 * 256, 1, Contents::ANY);
        Interleaved side(w.matrix);
        size_t n = side.bytes.size();
        EXPECT_NE(std::memcmp(side.bytes.data(), w.matrix.data, n), 0) << format_of(d).name;
        std::vector<std::byte> back(n);
        for (int r = 0; r < 2 * SIDE; r += SIDE)
            reorder<false>(back.data() + (side.matrix.row(r) - side.bytes.data()), side.matrix.row(r), d,
                           3 * 256);
        EXPECT_EQ(std::memcmp(back.data(), w.matrix.data, n), 0) << format_of(d).name;
    }
}

// -- products ---------------------------------------------------------------------------------------

// T tokens on the rows begin .. end of a matrix of 48, on one core and without a look at parts.
static void expect_products(const Matrix& w, const Matrix& side, int T, int begin, int end, bool wild) {
    Noise noise{{uint64_t(w.cols + T)}};
    Vector x = noise.vector(size_t(T) * size_t(w.cols));
    if (wild) x[x.size() / 2] = real(INFINITY), x[x.size() / 3] = real(NAN);
    Ints ints(x, T, 256, kernels);
    Vector expected(size_t(T) * size_t(w.rows + 1), 7), out = expected;
    int_rows_plain({expected.data(), w.rows + 1}, {x.data(), w.cols}, w, T, begin, end);
    kernels.target->interleaved_rows({out.data(), w.rows + 1}, ints.rows, side, T, begin, end);
    ASSERT_TRUE(same_bits(expected, out)) << text_of("%s, %s, %d columns, rows %d to %d, T %d", kernels.name,
                                                     format_of(w.dtype).name, w.cols, begin, end, T);
}

// Few tokens, one more than few, and many; fewer blocks than lanes, as many, and more.
TEST(Interleaved, ProductsEqualPlain) {
    for (const Kernels& k : interleaving_kernels()) {
        ScopedKernels scoped(k);
        for (Dtype d : INTERLEAVED) {
            for (int blocks : {1, 2, 6, 7, 8, 9, 17, 35}) {
                RandomMatrix w(d, 3 * SIDE, 256 * blocks, uint64_t(blocks));
                Interleaved side(w.matrix);
                for (int T : {1, 2, 3, 4, 5, 33}) {
                    ASSERT_NO_FATAL_FAILURE(expect_products(w.matrix, side.matrix, T, 0, 3 * SIDE, false));
                    ASSERT_NO_FATAL_FAILURE(expect_products(w.matrix, side.matrix, T, SIDE, 2 * SIDE, false));
                }
            }
        }
    }
}
TEST(Interleaved, ProductsEqualPlainForAnyBits) {
    for (const Kernels& k : interleaving_kernels()) {
        ScopedKernels scoped(k);
        for (Dtype d : INTERLEAVED) {
            for (uint64_t seed = 1; seed <= 10; seed++) {
                RandomMatrix w(d, SIDE, 256 * 5, seed, Contents::ANY);
                Interleaved side(w.matrix);
                for (int T : {1, 2, 3, 4})
                    ASSERT_NO_FATAL_FAILURE(
                        expect_products(w.matrix, side.matrix, T, 0, SIDE, seed % 2 == 0));
            }
        }
    }
}
// The largest sums that 16 bits must hold: all weights at their most, or all bits set; all x at their most.
TEST(Interleaved, ProductsEqualPlainForTheLargestSums) {
    for (const Kernels& k : interleaving_kernels()) {
        ScopedKernels scoped(k);
        for (Dtype d : INTERLEAVED) {
            std::string ones(size_t(format_of(d).bytes), '\xFF');
            for (size_t place : places_of_halves(d)) ones.replace(place, 2, std::string("\x00\x3C", 2));  // 1
            for (const std::string& block : {ones, extreme_block(d)}) {
                RandomMatrix w(d, SIDE, 512, 1);
                for (size_t at = 1; at < w.bytes.size(); at += block.size())
                    w.bytes.replace(at, block.size(), block);
                Interleaved side(w.matrix);
                for (real x : {real(1), real(-1)}) {
                    for (int T : {1, 3}) {
                        Vector same(size_t(T) * 512, x), expected(size_t(T) * SIDE), out = expected;
                        Ints ints(same, T, 256, k);
                        int_rows_plain({expected.data(), SIDE}, {same.data(), 512}, w.matrix, T, 0, SIDE);
                        k.target->interleaved_rows({out.data(), SIDE}, ints.rows, side.matrix, T, 0, SIDE);
                        EXPECT_TRUE(same_bits(expected, out)) << k.name << ", " << format_of(d).name;
                    }
                }
            }
        }
    }
}

// -- models -----------------------------------------------------------------------------------------

#ifdef DEEPSEEK_FLOAT
// Sides that a K format can have: dense, and latent attention with experts and an MTP module.
static Keys large_dense() {
    return with(tiny_dense("llama"), {{"hidden_size", "256"}, {"vocab_size", "64"}, {"head_dim", "64"},
                                      {"num_attention_heads", "4"}, {"intermediate_size", "256"},
                                      {"num_hidden_layers", "3"}});
}
static Keys large_v3() {
    return with(tiny_v3(), {{"hidden_size", "256"}, {"vocab_size", "64"}, {"intermediate_size", "256"},
                            {"q_lora_rank", "256"}, {"moe_intermediate_size", "256"}, {"v_head_dim", "64"},
                            {"num_attention_heads", "4"}, {"num_key_value_heads", "4"}});
}
static std::vector<Keys> large_models() { return {large_dense(), large_v3()}; }
static void no_progress(size_t, size_t) {}

static Model quantised_model(const Keys& keys) {
    fs::path folder = write_model("interleaved", keys, random_tensors(keys, "BF16", 1));
    return load_model(folder, {"q4_k", no_progress});
}

TEST(Interleave, AModelGivesTheSameBits) {
    for (const Keys& keys : large_models()) {
        for (const Kernels& k : interleaving_kernels()) {
            ScopedKernels scoped(k);
            Model dense = quantised_model(keys), side = quantised_model(keys);
            rearrange(side, UINT64_MAX, no_progress);
            ASSERT_TRUE(side.head.interleaved) << k.name;
            std::vector<int> ids = random_ids(20, 64);
            for (int chunk : {1, 2, 3, 20}) {
                SessionOptions options{20, chunk, MlaForm::ABSORBED};
                Answer a = answer(dense, ids, options), b = answer(side, ids, options);
                EXPECT_TRUE(same_bits(a.logits, b.logits)) << k.name << ", chunk " << chunk;
                EXPECT_TRUE(same_bits(a.mtp_logits, b.mtp_logits)) << k.name << ", chunk " << chunk;
            }
        }
    }
}
TEST(Interleave, TakesWhatEachTokenNeedsWhole) {
    for (const Kernels& k : interleaving_kernels()) {
        ScopedKernels scoped(k);
        Model dense = quantised_model(large_dense()), v3 = quantised_model(large_v3());
        rearrange(dense, UINT64_MAX, no_progress), rearrange(v3, UINT64_MAX, no_progress);
        for (const Layer& l : dense.layers)
            for (const Matrix* w : {&l.gqa.wq, &l.gqa.wk, &l.gqa.wv, &l.gqa.wo, &l.mlp.w_gate, &l.mlp.w_up,
                                    &l.mlp.w_down})
                EXPECT_TRUE(w->interleaved);
        const Layer& moe = v3.layers.back();
        for (const Matrix* w : {&moe.mla.wq_a, &moe.mla.wq_b, &moe.mla.wo, &moe.moe.shared.w_gate})
            EXPECT_TRUE(w->interleaved);
        EXPECT_FALSE(moe.moe.experts[0].w_gate.interleaved);
        EXPECT_FALSE(v3.embed.interleaved);
        EXPECT_TRUE(v3.mtp[0].proj.interleaved);
    }
}
TEST(Interleave, LeavesAMatrixAloneThatIsAlsoTheEmbedding) {
    for (const Kernels& k : interleaving_kernels()) {
        ScopedKernels scoped(k);
        Model m = quantised_model(with(large_dense(), {{"tie_word_embeddings", "true"}}));
        rearrange(m, UINT64_MAX, no_progress);
        EXPECT_FALSE(m.head.interleaved);
        EXPECT_TRUE(m.layers[0].gqa.wq.interleaved);
    }
}
// Nor where memory is short, the kernels have no use for it, or numbers are to be exact.
TEST(Interleave, LeavesAModelAlone) {
    for (const Kernels& k : available_kernels()) {
        ScopedKernels scoped(k);
        size_t total = 0;
        Model m = quantised_model(large_dense());
        kernels.integers = false;
        rearrange(m, UINT64_MAX, no_progress);
        EXPECT_FALSE(m.head.interleaved) << k.name;
        kernels.integers = true;
        if (k.rearrange) rearrange(m, UINT64_MAX, [&](size_t, size_t all) { total = all; });
        m = quantised_model(large_dense());
        testing::internal::CaptureStderr();
        rearrange(m, k.rearrange ? total - 1 : UINT64_MAX, no_progress);
        std::string said = testing::internal::GetCapturedStderr();
        EXPECT_EQ(said.starts_with("weights stay as they are"), k.rearrange != nullptr) << k.name;
        EXPECT_FALSE(m.head.interleaved) << k.name;
        EXPECT_EQ(total > 500000, k.rearrange != nullptr) << k.name;
    }
}
// Neither a mapped file nor its pages are written to, and the model keeps its name.
TEST(Interleave, LeavesTheFileAsItIs) {
    for (const Kernels& k : interleaving_kernels()) {
        ScopedKernels scoped(k);
        constexpr size_t OFFSET = 96;
        RandomMatrix w(Dtype::Q4_K, 320, 512, 1);
        fs::path file = scratch("interleaved_file") / "weights";
        std::string before = std::string(OFFSET, 'a') + w.bytes.substr(1) + std::string(OFFSET, 'z');
        write_text(file, before);

        Model m;
        const std::byte* mapped = m.checkpoint.files.emplace_back(file).data();
        m.head = w.matrix;
        m.head.data = mapped + OFFSET;
        m.checkpoint.tensors["head"] = {"f", "Q4_K", {320, 512}, m.head.data, w.bytes.size() - 1};
        uint64_t name = fingerprint(m);
        rearrange(m, before.size(), no_progress);
        ASSERT_TRUE(m.head.interleaved);
        EXPECT_EQ(fingerprint(m), name);
        Interleaved expected(w.matrix);
        EXPECT_EQ(std::memcmp(m.head.data, expected.bytes.data(), expected.bytes.size()), 0);
        EXPECT_TRUE(std::string(reinterpret_cast<const char*>(mapped), before.size()) == before);
        EXPECT_TRUE(read_file(file) == before);
    }
}
#endif
