// Chapter 8: the two forms of MLA against the equations, the latent cache.
#include "unit.h"

// -- 8.1 naive and absorbed -------------------------------------------------------------------------

// One layer's attention core with random queries, cache and kv_b_proj.
struct MlaCase {
    Model model;
    std::string bytes, scale_bytes;
    Mla w;
    int T, pos;
    Vector q, cache;

    MlaCase(const Keys& keys, const char* dtype, int T, int pos, uint64_t seed) : T(T), pos(pos) {
        Config& c = model.config = config_of(keys);
        model.rope = make_rope(c.rope, c.Dr);
        Noise noise{{seed}};
        int rows = c.H * (c.Dn + c.Dv);
        bytes = random_data(dtype, uint64_t(rows) * uint64_t(c.Rkv), 0, 1, noise);
        bool fp8 = std::string(dtype) == "F8_E4M3";
        scale_bytes = random_data("F32", uint64_t((rows + 127) / 128 * ((c.Rkv + 127) / 128)), 0.01, 0.005,
                                  noise);
        w.wkv_b = {reinterpret_cast<const std::byte*>(bytes.data()),
                   fp8 ? reinterpret_cast<const std::byte*>(scale_bytes.data()) : nullptr,
                   fp8 ? Dtype::F8_E4M3 : Dtype::BF16, rows, c.Rkv, 0};
        q = noise.vector(size_t(T * c.H * c.q_dim())),
        cache = noise.vector(size_t((pos + T) * c.cache_width()));
    }
    // (T, H, Dv)
    Vector run(MlaForm form) const {
        Session s(model, {pos + T, T, form});
        std::copy(q.begin(), q.end(), s.a.q);
        std::copy(cache.begin(), cache.end(), s.cache.layer(0)[0]);
        (form == MlaForm::NAIVE ? mla_naive : mla_absorbed)(s, w, 0, T, pos);
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
                widen_plain(row.data(), m.w.wkv_b, h * width + r);   // chapter 2's tests vouch for it
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

    // A score's roundings: for naive a row of W^UK with c, then the key with q; for absorbed W^UK^T q by a
    // chain of Dn, then the latent with it; an e4m3 weight's product with its scale 2 more, the softmax scale
    // 2 more. The larger of both, on S = |q|^T |W| |c|. A score error moves a weight by a factor e^(2 error),
    // as in chapter 7.
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
        int naive = dot_roundings(c.Rkv) + dot_roundings(c.q_dim()),
            absorbed = c.Dn + dot_roundings(c.cache_width());
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
    Vector naive = m.run(MlaForm::NAIVE), absorbed = m.run(MlaForm::ABSORBED);
    for (int h = 0; h < m.model.config.H; h++) {
        Expanded kv(m, h);
        for (int t = 0; t < m.T; t++) expect_near(m, naive, h, t, kv), expect_near(m, absorbed, h, t, kv);
    }
    EXPECT_FALSE(same_bits(naive, absorbed));   // two ways of computing it, not one under two names
}

TEST(Mla, BothFormsAreNearTheEquations) {
    expect_both_forms(MlaCase(tiny_v3(), "BF16", 5, 0, 1));
    expect_both_forms(MlaCase(tiny_v2_lite(), "BF16", 3, 20, 2));   // with YaRN's score scale
}
TEST(Mla, BothFormsReadScaleBlocksThatHeadsStraddle) {
    Keys keys = tiny_fp8();   // heads of 57 rows, blocks of 128
    expect_both_forms(MlaCase(keys, "F8_E4M3", 4, 3, 3));
}
TEST(Mla, AloneATokenReadsItsOwnValue) {
    MlaCase m(tiny_v3(), "BF16", 1, 0, 4);
    const Config& c = m.model.config;
    Vector naive = m.run(MlaForm::NAIVE), one(1);
    for (int h = 0; h < c.H; h++) {
        for (int i = 0; i < c.Dv; i++) {
            int row = h * (c.Dn + c.Dv) + c.Dn + i;
            dots_plain(one.data(), 1, m.w.wkv_b, row, {m.cache.data(), c.Rkv}, 1);
            EXPECT_EQ(naive[size_t(h * c.Dv + i)], one[0]) << h << " " << i;
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

// Published for bf16: V3 70,272 bytes a token, V2 69,120, V2-Lite 31,104.
TEST(MlaCache, BytesPerTokenOfTheReleasedModels) {
    const std::pair<const char*, size_t> expected[] = {{"61", 70272}, {"60", 69120}, {"27", 31104}};
    for (auto [layers, bytes] : expected)
        EXPECT_EQ(Cache::bytes(mla_config(layers), 1000), 1000 * bytes * sizeof(real) / 2) << layers;
}
TEST(MlaCache, TheMtpModuleHasALayerOfItsOwn) {
    Config c = config_of(tiny_v3());
    EXPECT_EQ(Cache::bytes(c, 1), size_t(3 + 1) * 24 * sizeof(real));
}

// What forward leaves in the cache: c_kv after its norm (eps 1e-6), k_rope rotated and not normalised.
TEST(MlaCache, HoldsTheNormedLatentAndTheRotatedKey) {
    Model model = random_model("mla", with(tiny_v3(), {{"rms_norm_eps", "0.1"}}));
    const Config& c = model.config;
    const Mla& w = model.layers[0].mla;
    Session s(model, {4, 4, MlaForm::ABSORBED});
    Noise noise;
    Vector u = noise.vector(size_t(c.D)), kv(24), table(6);
    std::copy(u.begin(), u.end(), s.a.u);
    rope_table(s.a.cos_sin, model.rope, 1, 3), rope_table(table.data(), model.rope, 1, 3);
    mla(s, w, 0, 1, 3);
    matmul(kv.data(), u.data(), w.wkv_a, 1);
    rmsnorm({kv.data(), 18}, {kv.data(), 18}, w.kv_norm, 1, 1e-6);
    rope_interleaved(kv.data() + 18, table.data(), 6);
    EXPECT_TRUE(same_bits(s.cache.layer(0)[3], kv.data(), 24));
}
