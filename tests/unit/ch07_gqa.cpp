// Chapter 7: one query against n keys, and which head reads which keys.
#include "unit.h"

// -- 7.2 attend -------------------------------------------------------------------------------------

struct AttendCase {
    int n, dk, dv;
    real scale;
};

// Errors of one query. A score: dot_roundings(dk) and the scale's product, on sum |q k|. That moves a weight
// by a factor e^(2 score error); softmax_error on top; then n products and sums a value.
static void expect_attention(const AttendCase& a, Noise& noise) {
    Vector q = noise.vector(size_t(a.dk)), k = noise.vector(size_t(a.n * a.dk)),
           v = noise.vector(size_t(a.n * a.dv));
    Vector out(static_cast<size_t>(a.dv)), scores(static_cast<size_t>(a.n));
    attend(out.data(), q.data(), {{k.data(), a.dk}, {v.data(), a.dv}, a.dk, a.dv, a.scale}, a.n,
           scores.data());

    std::vector<long double> p(size_t(a.n));
    long double top = -INFINITY, bottom = INFINITY, largest = 0, sum = 0;
    for (size_t j = 0; j < p.size(); j++) {
        long double size = 0;
        for (size_t i = 0; i < q.size(); i++) {
            long double product = (long double)(q[i]) * k[j * q.size() + i] * a.scale;
            p[j] += product, size += std::fabs(product);
        }
        top = std::max(top, p[j]), bottom = std::min(bottom, p[j]), largest = std::max(largest, size);
    }
    for (long double& x : p) sum += x = std::exp(x - top);
    long double score_error = chain_error(dot_roundings(a.dk) + 1) * largest;
    long double error = std::expm1(2 * score_error) + softmax_error(a.n, top - bottom) + chain_error(a.n);
    for (size_t i = 0; i < out.size(); i++) {
        long double exact = 0, size = 0;
        for (size_t j = 0; j < p.size(); j++) {
            long double term = p[j] / sum * v[j * out.size() + i];
            exact += term, size += std::fabs(term);
        }
        ASSERT_LE(std::fabs(out[i] - exact), 1.01L * error * size) << a.n << " keys of " << a.dk;
    }
}

TEST(Attend, IsNearTheFormula) {
    Noise noise;
    for (int n : {1, 2, 3, 17, 200}) {
        for (int dk : {1, 2, 16, 33, 192}) expect_attention({n, dk, 7 + dk / 2, real(0.7)}, noise);
    }
}
TEST(Attend, OfOneKeyIsItsValue) {
    Vector q = {1, -2}, k = {5, 6}, v = {real(0.1), real(0.2), real(0.3)}, out(3);
    real score;
    attend(out.data(), q.data(), {{k.data(), 2}, {v.data(), 3}, 2, 3, real(0.7)}, 1, &score);
    EXPECT_EQ(out, v);
}
TEST(Attend, OfEqualKeysIsTheMean) {
    Vector q = {1, 1}, k = {3, 4, 3, 4, 3, 4, 3, 4}, v = {1, 2, 3, 6}, out(1), scores(4);
    attend(out.data(), q.data(), {{k.data(), 2}, {v.data(), 1}, 2, 1, 1}, 4, scores.data());
    EXPECT_EQ(out[0], 3);
}
TEST(Attend, ReadsNoFurtherThanN) {
    real nan = std::numeric_limits<real>::quiet_NaN();
    Vector q = {1}, k = {1, 1, nan}, v = {2, 4, nan}, out(1), scores(3);
    attend(out.data(), q.data(), {{k.data(), 1}, {v.data(), 1}, 1, 1, 1}, 2, scores.data());
    EXPECT_EQ(out[0], 3);
}

// -- 7.1 the cache ----------------------------------------------------------------------------------

TEST(GqaCache, NumbersPerTokenAndLayer) {
    Config c = config_of(with(tiny_dense("qwen2"), {{"num_attention_heads", "12"}, {"head_dim", "128"}}));
    EXPECT_EQ(c.cache_width(), 512);   // R1-Distill-Qwen-1.5B: 2 kv heads of 128, keys and values
}
TEST(GqaCache, ALayersRowsFollowEachOther) {
    Config c = config_of(tiny_dense("llama"));
    Cache cache(c, 5);
    EXPECT_EQ(cache.pages.size(), Cache::bytes(c, 5));
    EXPECT_EQ(cache.layer(1)[0] - cache.layer(0)[0], 5 * c.cache_width());
    EXPECT_EQ(reinterpret_cast<std::byte*>(cache.layer(c.n_layers - 1)[5]),
              cache.pages.data() + cache.pages.size());
}

// -- 7.3 gqa ----------------------------------------------------------------------------------------

// Values that name their kv head, and an output matrix that passes everything on: y shows who read whom.
// Weights of 1 / n are rounded once, n of them added.
TEST(Gqa, HeadsShareKvHeadsInOrder) {
    Keys keys = with(tiny_dense("qwen2"), {{"hidden_size", "60"}});   // 6 heads of 10 on 2 kv heads
    Config c = config_of(keys);
    std::vector<float> zeros(60 * 60), identity(60 * 60);
    for (size_t i = 0; i < 60; i++) identity[61 * i] = 1;
    auto matrix = [](const std::vector<float>& data, int rows) {
        return Matrix{reinterpret_cast<const std::byte*>(data.data()), nullptr, Dtype::F32, rows, 60, 0};
    };
    Gqa w{matrix(zeros, 60), matrix(zeros, 20), matrix(zeros, 20), matrix(identity, 60),
          Vector(60),        Vector(20),        Vector(20)};
    for (size_t i = 0; i < 20; i++) w.bv[i] = real(1 + i / 10);
    Model model;
    model.config = c;
    Session s(model, {8, 8, MlaForm::ABSORBED});
    std::fill_n(s.a.u, 8 * 60, real(1));
    rope_table(s.a.cos_sin, make_rope(c.rope, 10), 8, 0);
    gqa(s, w, 0, 8, 0);
    for (int t = 0; t < 8; t++) {
        for (int i = 0; i < 60; i++) ASSERT_NEAR(s.a.y[t * 60 + i], i / 10 < 3 ? 1 : 2, 2 * chain_error(9));
    }
}
TEST(Gqa, KeysAreCachedRotatedAndValuesAsTheyAre) {
    Model model = random_model("gqa", tiny_dense("qwen2"));
    const Config& c = model.config;
    const Gqa& w = model.layers[0].gqa;
    Session s(model, {4, 4, MlaForm::ABSORBED});
    Noise noise;
    Vector u = noise.vector(size_t(c.D)), k(20), v(20), table(10);
    std::copy(u.begin(), u.end(), s.a.u);
    rope_table(s.a.cos_sin, model.rope, 1, 3), rope_table(table.data(), model.rope, 1, 3);
    gqa(s, w, 0, 1, 3);
    matmul(k.data(), u.data(), w.wk, 1), add_bias(k.data(), w.bk, 1);
    matmul(v.data(), u.data(), w.wv, 1), add_bias(v.data(), w.bv, 1);
    for (int g = 0; g < 2; g++) rope_half(k.data() + 10 * g, table.data(), 10);
    EXPECT_TRUE(same_bits(s.cache.layer(0)[3], k.data(), 20));
    EXPECT_TRUE(same_bits(s.cache.layer(0)[3] + 20, v.data(), 20));
}

static void expect_causal(const Model& model, MlaForm form) {
    std::vector<int> ids = random_ids(12, model.config.V), other = ids;
    other[11] = (other[11] + 1) % model.config.V;
    Answer a = answer(model, ids, {12, 12, form}), b = answer(model, other, {12, 12, form});
    size_t earlier = 11 * size_t(model.config.V);
    EXPECT_TRUE(same_bits(a.logits.data(), b.logits.data(), earlier));
    EXPECT_FALSE(same_bits(a.logits.data() + earlier, b.logits.data() + earlier, size_t(model.config.V)));
}

TEST(Causality, ALaterTokenChangesNoEarlierOutput) {
    expect_causal(random_model("causal", tiny_dense("qwen2")), MlaForm::ABSORBED);
    expect_causal(random_model("causal", tiny_dense("llama")), MlaForm::ABSORBED);
    for (MlaForm form : {MlaForm::ABSORBED, MlaForm::NAIVE}) {
        expect_causal(random_model("causal", tiny_v3()), form);
        expect_causal(random_model("causal", tiny_v2_lite()), form);
    }
}
