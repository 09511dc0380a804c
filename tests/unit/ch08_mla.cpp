// Chapter 8: the two forms of MLA against the equations, the latent cache.
#include "unit.h"

#include "weights.h"

// -- 8.1 naive and absorbed -------------------------------------------------------------------------

// How a case keeps W^UK: as it is, or transposed.
enum class Keep : uint8_t { W_UK, TRANSPOSED };

// One layer's attention core with random queries, cache and kv_b_proj. `cache` has the numbers that are kept
// in `kv`, so that a cache in fewer bits adds no error of its own.
struct MlaCase {
    Model model;
    RandomMatrix wkv_b;
    Mla w;
    std::deque<Vector> transposed;
    std::vector<Matrix> wk_b_transposed;                 // W^UK, of which W^UK^T is stored
    int T, pos;
    Dtype kv;
    Vector q, cache;

    MlaCase(const Keys& keys, Dtype dtype, int T, int pos, uint64_t seed, Dtype kv = REAL)
        : wkv_b(dtype, rows_of(config_of(keys)), config_of(keys).Rkv, seed), T(T), pos(pos), kv(kv) {
        Config& c = model.config = config_of(keys);
        model.rope = make_rope(c.rope, c.Dr);
        for (size_t i = 1; i < wkv_b.scale_bytes.size(); i += 4) {       // e4m3 reaches 448
            float small = load<float>(wkv_b.scale_bytes.data() + i) / 100;
            std::memcpy(wkv_b.scale_bytes.data() + i, &small, 4);
        }
        for (int h = 0; h < c.H; h++) {
            Matrix k = wkv_b.matrix.view(h * (c.Dn + c.Dv), c.Dn);
            wk_b_transposed.push_back(transpose(k).transpose());
            w.wk_b.push_back(k), w.wv_b.push_back(wkv_b.matrix.view(h * (c.Dn + c.Dv) + c.Dn, c.Dv));
        }
        Noise noise{{seed}};
        q = noise.vector(size_t(T * c.H * c.q_dim()));
        std::string bytes(row_bytes(kv, c.cache_width()), '\0');
        for (int j = 0; j < pos + T; j++) {
            Vector row = noise.vector(size_t(c.cache_width()));
            store_row(reinterpret_cast<std::byte*>(bytes.data()), row.data(), c.cache_width(), kv);
            widen_plain(row.data(), {reinterpret_cast<const std::byte*>(bytes.data()), nullptr, kv, 1,
                                     c.cache_width(), 0, 0}, 0);
            cache.insert(cache.end(), row.begin(), row.end());
        }
    }
    static int rows_of(const Config& c) { return c.H * (c.Dn + c.Dv); }

    Matrix transpose(const Matrix& m) {
        Vector row(size_t(m.cols)), &out = transposed.emplace_back(size_t(m.rows) * size_t(m.cols));
        for (int r = 0; r < m.rows; r++) {
            widen_plain(row.data(), m, r);
            for (int col = 0; col < m.cols; col++) out[size_t(col * m.rows + r)] = row[size_t(col)];
        }
        return real_matrix(out.data(), m.cols, m.rows);
    }
    // (T, H, Dv)
    Vector run(MlaForm form, Keep keep = Keep::W_UK, int threads = 1) const {
        ScopedThreads scoped(threads);
        Mla weights = w;
        if (keep == Keep::TRANSPOSED) weights.wk_b = wk_b_transposed;
        Session s(model, {pos + T, T, form, kv});
        std::copy(q.begin(), q.end(), s.a.q);
        Vector row(size_t(model.config.cache_width()));
        for (int j = 0; j < pos + T; j++) {
            const real* numbers = cache.data() + size_t(j) * row.size();
            store(s.cache.matrix(0, 0), std::array{j + 1}, {numbers, 0});
            widen_plain(row.data(), s.cache.matrix(0, 0), j);
            EXPECT_TRUE(same_bits(row.data(), numbers, row.size())) << "kept numbers are kept once more";
        }
        for (int t = 0; t < T; t++) s.a.seen[t] = pos + t + 1;
        attend_latent(s, weights, 0, T);
        return Vector(s.a.o, s.a.o + T * model.config.H * model.config.Dv);
    }
};

// Head h of the naive form in long double, W^UK c and W^UV c with the sums of their absolute terms.
struct Expanded {
    std::vector<std::vector<long double>> value, size;   // position, Dn + Dv

    Expanded(const MlaCase& m, int h) {
        const Config& c = m.model.config;
        int width = c.Dn + c.Dv;
        Vector row(static_cast<size_t>(c.Rkv));
        for (int j = 0; j < m.pos + m.T; j++) {
            const real* latent = m.cache.data() + j * c.cache_width();
            std::vector<long double>& sum = value.emplace_back(width);
            std::vector<long double>& absolute = size.emplace_back(width);
            for (int r = 0; r < width; r++) {
                widen_plain(row.data(), m.wkv_b.matrix, h * width + r);   // chapter 2's tests vouch for it
                for (size_t i = 0; i < row.size(); i++) {
                    sum[size_t(r)] += (long double)(row[i]) * latent[i];
                    absolute[size_t(r)] += std::fabs((long double)(row[i]) * latent[i]);
                }
            }
        }
    }
};

// A token's softmax weights in long double, and the bound on their relative error.
struct Weights {
    std::vector<long double> p;
    long double error;

    // A score's roundings: for naive a row of W^UK with c (transposed: a chain of Rkv), then the key with q;
    // for absorbed W^UK^T q by a chain of Dn (transposed: a dot), then the latent with it; an e4m3 weight's
    // product with its scale 2 more, the softmax scale 2 more. The largest of all, on S = |q|^T |W| |c|. A
    // score error moves a weight by a factor e^(2 error), as in chapter 7.
    Weights(const MlaCase& m, const Expanded& kv, int h, int t) {
        const Config& c = m.model.config;
        const real* q = m.q.data() + (t * c.H + h) * c.q_dim();
        long double scale = m.model.rope.score_scale / std::sqrt((long double)(c.q_dim())), largest = 0,
                    sum = 0;
        for (int j = 0; j < m.pos + t + 1; j++) {
            const real* k_rope = m.cache.data() + j * c.cache_width() + c.Rkv;
            long double score = 0, size = 0;
            for (int i = 0; i < c.q_dim(); i++) {
                long double k = i < c.Dn ? kv.value[size_t(j)][size_t(i)] : k_rope[i - c.Dn];
                long double k_size = i < c.Dn ? kv.size[size_t(j)][size_t(i)] : std::fabs(k);
                score += scale * q[i] * k, size += scale * std::fabs((long double)(q[i])) * k_size;
            }
            p.push_back(score), largest = std::max(largest, size);
        }
        auto [low, high] = std::minmax_element(p.begin(), p.end());
        long double top = *high, range = *high - *low;
        for (long double& x : p) sum += x = std::exp(x - top);
        for (long double& x : p) x /= sum;
        int naive = std::max(c.Rkv, dot_roundings(c.Rkv)) + dot_roundings(c.q_dim());
        int absorbed = std::max(c.Dn, dot_roundings(c.Dn)) + dot_roundings(c.cache_width());
        long double score_error = chain_error(std::max(naive, absorbed) + 4) * largest;
        error = std::expm1(2 * score_error) + softmax_error(int(p.size()), range);
    }
};

// The values: a chain of n and a row of W^UV (an e4m3 weight's scale 2 more), on sum p |W| |c|.
static void expect_near(const MlaCase& m, const Vector& out, int h, int t, const Expanded& kv) {
    const Config& c = m.model.config;
    Weights w(m, kv, h, t);
    long double error = w.error + chain_error((long double)(w.p.size()) + dot_roundings(c.Rkv) + 2);
    for (int i = 0; i < c.Dv; i++) {
        long double exact = 0, size = 0;
        for (size_t j = 0; j < w.p.size(); j++) {
            exact += w.p[j] * kv.value[j][size_t(c.Dn + i)];
            size += w.p[j] * kv.size[j][size_t(c.Dn + i)];
        }
        long double got = out[size_t((t * c.H + h) * c.Dv + i)];
        ASSERT_LE(std::fabs(got - exact), 1.01L * error * size) << "head " << h << ", token " << t;
    }
}

static void expect_both_forms(const MlaCase& m) {
    std::vector<Vector> outs;
    for (MlaForm form : {MlaForm::NAIVE, MlaForm::ABSORBED})
        for (Keep keep : {Keep::W_UK, Keep::TRANSPOSED}) outs.push_back(m.run(form, keep));
    for (int h = 0; h < m.model.config.H; h++) {
        Expanded kv(m, h);
        for (int t = 0; t < m.T; t++)
            for (const Vector& out : outs) ASSERT_NO_FATAL_FAILURE(expect_near(m, out, h, t, kv));
    }
    for (size_t i = 1; i < 4; i++)   // four ways of computing it, not one under four names
        for (size_t j = 0; j < i; j++) EXPECT_FALSE(same_bits(outs[i], outs[j])) << i << " " << j;
}

TEST(Mla, BothFormsAreNearTheEquations) {
    expect_both_forms(MlaCase(tiny_v3(), Dtype::BF16, 5, 0, 1));
    expect_both_forms(MlaCase(tiny_v2_lite(), Dtype::BF16, 3, 20, 2));   // with YaRN's score scale
}
TEST(Mla, BothFormsReadScaleBlocksThatHeadsStraddle) {
    Keys keys = tiny_fp8();   // heads of 57 rows, blocks of 128
    expect_both_forms(MlaCase(keys, Dtype::F8_E4M3, 4, 3, 3));
}

// Latents of 64 and rotated keys of 32: rows that Q8_0 can store, weights that blocks of 32 can hold.
static Keys wide_mla() {
    return with(tiny_v3(), {{"kv_lora_rank", "64"}, {"qk_rope_head_dim", "32"}, {"qk_nope_head_dim", "32"}});
}

// Dequantised; in integers, queries would be rounded to 8 bits.
TEST(Mla, BothFormsReadQuantisedWeights) {
    ScopedKernels scoped(kernels);
    kernels.integers = false;
    for (Dtype dtype : {Dtype::Q8_0, Dtype::Q4_0, Dtype::Q5_1})
        expect_both_forms(MlaCase(wide_mla(), dtype, 4, 3, 3));
}
TEST(Mla, BothFormsReadACacheInFewerBits) {
    for (const Kernels& k : available_kernels()) {
        ScopedKernels scoped(k);
        kernels.integers = false;
        for (Dtype kv : {Dtype::BF16, Dtype::Q8_0})
            expect_both_forms(MlaCase(wide_mla(), Dtype::BF16, 4, 30, 3, kv));
    }
}
static void expect_no_trace_of_threads(const MlaCase& m) {
    for (MlaForm form : {MlaForm::NAIVE, MlaForm::ABSORBED}) {
        for (Keep keep : {Keep::W_UK, Keep::TRANSPOSED}) {
            Vector expected = m.run(form, keep);
            for (int threads : {2, 3, 5, 8})
                ASSERT_TRUE(same_bits(m.run(form, keep, threads), expected))
                    << m.model.config.H << " heads, " << m.T << " tokens, " << threads << " threads";
        }
    }
}
TEST(Mla, GivesTheSameBitsForEveryNumberOfThreads) {
    Keys many = with(wide_mla(), {{"num_attention_heads", "60"}, {"num_key_value_heads", "60"}});
    for (const Keys& keys : {wide_mla(), many}) {         // fewer and more heads than QUERY_TILE
        for (Dtype kv : {REAL, Dtype::BF16, Dtype::Q8_0}) {
            ASSERT_NO_FATAL_FAILURE(expect_no_trace_of_threads(MlaCase(keys, Dtype::Q8_0, 1, 30, 5, kv)));
            ASSERT_NO_FATAL_FAILURE(expect_no_trace_of_threads(MlaCase(keys, Dtype::Q8_0, 9, 30, 5, kv)));
        }
    }
}
TEST(Mla, ATokenHasTheBitsItHasInCompany) {
    for (Dtype kv : {REAL, Dtype::Q8_0}) {
        MlaCase all(wide_mla(), Dtype::BF16, 20, 0, 5, kv), last(wide_mla(), Dtype::BF16, 1, 19, 5, kv);
        size_t q = last.q.size(), o = size_t(all.model.config.H * all.model.config.Dv);
        last.cache = all.cache;
        std::copy(all.q.end() - int64_t(q), all.q.end(), last.q.begin());
        for (MlaForm form : {MlaForm::NAIVE, MlaForm::ABSORBED}) {
            Vector company = all.run(form), alone = last.run(form);
            EXPECT_TRUE(same_bits(alone.data(), company.data() + 19 * o, o));
        }
    }
}
TEST(Mla, AloneATokenReadsItsOwnValue) {
    MlaCase m(tiny_v3(), Dtype::BF16, 1, 0, 4);
    const Config& c = m.model.config;
    Vector naive = m.run(MlaForm::NAIVE);
    for (int h = 0; h < c.H; h++) {
        for (int i = 0; i < c.Dv; i++) {
            int row = h * (c.Dn + c.Dv) + c.Dn + i;
            real own = dot_row_plain(m.wkv_b.matrix, row, m.cache.data());
            EXPECT_EQ(naive[size_t(h * c.Dv + i)], own) << h << " " << i;
        }
    }
}
TEST(Mla, TheScaleIsThatOf192NotOf576) {
    Model model;
    model.config.Dn = 128, model.config.Dr = 64, model.config.Rkv = 512;
    EXPECT_EQ(text_of("%.6f", double(mla_scale(model))), "0.072169");
    RopeConfig& rope = model.config.rope;
    rope.scaling = Scaling::YARN, rope.factor = 40, rope.original_context = 4096, rope.mscale_all_dim = 1;
    model.rope = make_rope(rope, 64);
    EXPECT_EQ(text_of("%.6f", double(mla_scale(model))), "0.135234");
    rope.mscale_all_dim = 0.707;
    model.rope = make_rope(rope, 64);
    EXPECT_EQ(text_of("%.6f", double(mla_scale(model))), "0.114721");
}

// -- 8.2 the cache ----------------------------------------------------------------------------------

static Config mla_config(const char* layers) {
    return config_of(
        with(without(tiny_v3(), "num_nextn_predict_layers"),
             {{"kv_lora_rank", "512"}, {"qk_rope_head_dim", "64"}, {"num_hidden_layers", layers}}));
}

TEST(MlaCache, Is576NumbersPerTokenAndLayer) { EXPECT_EQ(mla_config("61").cache_width(), 576); }

// Published for bf16: V3 70,272 bytes a token, V2 69,120, V2-Lite 31,104. Q8_0 takes 34 bytes for 32 numbers.
TEST(MlaCache, BytesPerTokenOfTheReleasedModels) {
    const std::pair<const char*, size_t> expected[] = {{"61", 70272}, {"60", 69120}, {"27", 31104}};
    for (auto [layers, bytes] : expected) {
        Config c = mla_config(layers);
        EXPECT_EQ(cache_bytes(c, 1000, REAL), 1000 * bytes * sizeof(real) / 2) << layers;
        EXPECT_EQ(cache_bytes(c, 1000, Dtype::BF16), 1000 * bytes) << layers;
        EXPECT_EQ(cache_bytes(c, 1000, Dtype::Q8_0), 1000 * bytes * 17 / 32) << layers;
    }
}
TEST(MlaCache, TheMtpModuleHasALayerOfItsOwn) {
    Config c = config_of(tiny_v3());
    EXPECT_EQ(cache_bytes(c, 1, REAL), size_t(3 + 1) * 24 * sizeof(real));
}
TEST(MlaCache, IsOneMatrixALayer) {
    Config c = config_of(tiny_v3());
    Cache cache{REAL, 5, cache_parts(c), cache_part_width(c), CPU.memory(cache_bytes(c, 5, REAL))};
    EXPECT_EQ(cache.parts, 1);
    for (int l = 0; l <= c.n_layers; l++) {
        Matrix m = cache.matrix(l, 0);
        EXPECT_EQ(m.data, cache.memory.get() + size_t(l) * 5 * 24 * sizeof(real));
        EXPECT_TRUE(m.rows == 5 && m.cols == 24 && m.dtype == REAL);
    }
}

// What forward leaves in the cache: c_kv after its norm (eps 1e-6), k_rope rotated and not normalised.
TEST(MlaCache, HoldsTheNormedLatentAndTheRotatedKey) {
    Model model = random_model("mla", with(tiny_v3(), {{"rms_norm_eps", "0.1"}}));
    const Config& c = model.config;
    const Mla& w = model.layers[0].mla;
    Session s(model, {4, 4, MlaForm::ABSORBED});
    Noise noise;
    Vector u = noise.vector(size_t(c.D)), kv(24), table(6), row(24);
    std::copy(u.begin(), u.end(), s.a.u);
    place(s, 1, 3), rope_table(table.data(), model.rope, 1, 3);
    mla(s, w, 0, 1);
    matmul({kv.data(), 24}, {u.data(), c.D}, w.wkv_a, 1);
    rmsnorm({kv.data(), 18}, {kv.data(), 18}, w.kv_norm, 1, 1e-6);
    rope_interleaved({kv.data() + 18, 24, 0, 1, 1}, table.data(), 6);
    widen_plain(row.data(), s.cache.matrix(0, 0), 3);
    EXPECT_TRUE(same_bits(row, kv));
}

// -- 8.2 a cache in pages ---------------------------------------------------------------------------

// Conversations of n[b] positions whose pages lie in disorder in a pool, and the same rows in order.
struct Pages64 {
    int H = 3, width = 20, dv = 12;
    std::vector<int> n, table;
    int table_width = 3;
    Vector pool, q;
    std::vector<Vector> rows;                            // of each conversation

    explicit Pages64(std::vector<int> lengths) : n(std::move(lengths)) {
        Noise noise;
        const int pages = table_width * int(n.size());
        pool.assign(size_t(pages * PAGE * width), std::numeric_limits<real>::quiet_NaN());
        table.assign(n.size() * size_t(table_width), 2147480000);
        for (size_t b = 0, next = 0; b < n.size(); b++) {
            rows.push_back(noise.vector(size_t(n[b] * width)));
            for (int j = 0; j < n[b]; j++) {
                int& page = table[b * size_t(table_width) + size_t(j / PAGE)];
                if (j % PAGE == 0) page = int(next++ * 7 % size_t(pages));
                real* to = pool.data() + (page * PAGE + j % PAGE) * width;
                std::copy_n(rows[b].data() + j * width, width, to);
            }
        }
        q = noise.vector(n.size() * size_t(H * width));
    }
    // (B, H, dv), then (B, H)
    std::pair<Vector, Vector> run(int threads = 1) const {
        ScopedThreads scoped(threads);
        Vector out(n.size() * size_t(H * dv)), lse(n.size() * size_t(H));
        Vector scratch(size_t(threads * (table_width * PAGE + width)));
        const Matrix all = real_matrix(pool.data(), int(pool.size()) / width, width);
        mla_paged({out.data(), lse.data(), q.data(), all, table.data(), table_width, n, H, dv, real(0.3)},
                  {scratch.data(), table_width * PAGE + width});
        return {out, lse};
    }
};

TEST(MlaPaged, HasTheBitsOfRowsInOrder) {
    Pages64 c({1, 64, 65, 150, 0});
    for (int threads : {1, 3}) {
        auto [out, lse] = c.run(threads);
        for (size_t b = 0; b < c.n.size(); b++) {
            Vector expected(size_t(c.H * c.dv)), scratch(size_t(attention_scratch(200, c.width, c.dv)));
            Matrix k = real_matrix(c.rows[b].data(), c.n[b], c.width), v = k;
            v.cols = c.dv, v.stride = size_t(c.width) * sizeof(real);
            const real* q = c.q.data() + b * size_t(c.H * c.width);
            Attention one{{expected.data(), 0}, {q, 0}, c.H, k, v, real(0.3), {&c.n[b], 1}};
            if (c.n[b]) attend({&one, 1}, {scratch.data(), 0});
            EXPECT_TRUE(same_bits(out.data() + b * expected.size(), expected.data(), expected.size())) << b;
        }
    }
}

TEST(MlaPaged, GivesTheLogarithmOfTheSum) {
    Pages64 c({70, 0});
    Vector lse = c.run().second;
    for (int h = 0; h < c.H; h++) {
        double sum = 0;
        for (int j = 0; j < 70; j++) {
            double dot = 0;
            for (int i = 0; i < c.width; i++)
                dot += double(c.q[size_t(h * c.width + i)]) * double(c.rows[0][size_t(j * c.width + i)]);
            sum += std::exp(dot * 0.3);
        }
        // A logarithm of f32, and the roundings of a dot and of a sum of 70 terms.
        EXPECT_NEAR(double(lse[size_t(h)]), std::log(sum), 1e-5);
        EXPECT_EQ(lse[size_t(c.H + h)], std::numeric_limits<real>::infinity());
    }
}
