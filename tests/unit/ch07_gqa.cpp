// Chapter 7: some queries against n keys, which head reads which keys, and what the cache keeps.
#include "unit.h"

#include "weights.h"

// -- 7.1 the cache ----------------------------------------------------------------------------------

constexpr Dtype CACHES[] = {REAL, Dtype::BF16, Dtype::Q8_0};

static Cache cache_of(const Config& c, int context, Dtype dtype) {
    return {dtype, context, cache_parts(c), cache_part_width(c), CPU.memory(cache_bytes(c, context, dtype))};
}

// Six heads of 32 on two kv heads: rows that Q8_0 can store.
static Keys wide_dense() { return with(tiny_dense("qwen2"), {{"head_dim", "32"}}); }

TEST(GqaCache, NumbersPerTokenAndLayer) {
    Config c = config_of(with(tiny_dense("qwen2"), {{"num_attention_heads", "12"}, {"head_dim", "128"}}));
    EXPECT_EQ(c.cache_width(), 512);   // R1-Distill-Qwen-1.5B: 2 kv heads of 128, keys and values
    EXPECT_EQ(cache_parts(c), 4);
    EXPECT_EQ(cache_part_width(c), 128);
}
// R1-Distill-Qwen-1.5B, 28 layers: 28,672 bytes in 16 bits; 8 bits and an f16 a 32 numbers are 17 / 32 of it.
TEST(GqaCache, BytesPerToken) {
    Config c = config_of(with(tiny_dense("qwen2"), {{"num_attention_heads", "12"}, {"head_dim", "128"},
                                                    {"num_hidden_layers", "28"}}));
    EXPECT_EQ(cache_bytes(c, 1000, Dtype::F32), 1000u * 57344);
    EXPECT_EQ(cache_bytes(c, 1000, Dtype::BF16), 1000u * 28672);
    EXPECT_EQ(cache_bytes(c, 1000, Dtype::Q8_0), 1000u * 28672 * 17 / 32);
}
// The matrices of all layers and parts lie one after the other and fill the cache.
TEST(GqaCache, PartsFollowEachOther) {
    for (Dtype dtype : CACHES) {
        Config c = config_of(wide_dense());
        Cache cache = cache_of(c, 5, dtype);
        const std::byte* at = cache.memory.get();
        for (int l = 0; l < c.n_layers; l++) {
            for (int part = 0; part < 4; part++) {
                Matrix m = cache.matrix(l, part);
                EXPECT_TRUE(m.dtype == dtype && m.rows == 5 && m.cols == 32);
                EXPECT_EQ(m.data, at) << l << " " << part;
                at = m.row(5);
            }
        }
        EXPECT_EQ(at, cache.memory.get() + cache_bytes(c, 5, dtype));
    }
}
TEST(GqaCache, StoresARowAndNothingElse) {
    for (Dtype dtype : CACHES) {
        Config c = config_of(wide_dense());
        Cache cache = cache_of(c, 5, dtype);
        Vector x = Noise{}.vector(32), row(32);
        store(cache.matrix(1, 2), std::array{4}, {x.data(), 32});
        std::string bytes(row_bytes(dtype, 32), '\0');
        store_row(reinterpret_cast<std::byte*>(bytes.data()), x.data(), 32, dtype);
        const std::byte *begin = cache.matrix(1, 2).row(3), *end = begin + bytes.size();
        EXPECT_EQ(std::memcmp(begin, bytes.data(), bytes.size()), 0);
        for (size_t i = 0; i < cache_bytes(c, 5, dtype); i++) {
            const std::byte* p = cache.memory.get() + i;
            if (p < begin || p >= end) { ASSERT_EQ(*p, std::byte{0}); }
        }
    }
}
// Rows of several tokens, in any order, which need not lie side by side.
TEST(GqaCache, StoresTokensWhereTheyStand) {
    for (Dtype dtype : CACHES) {
        Cache cache = cache_of(config_of(wide_dense()), 9, dtype);
        Vector x = Noise{}.vector(3 * 40);
        const int n[] = {3, 4, 9};
        store(cache.matrix(1, 2), n, {x.data(), 40});
        std::string bytes(9 * row_bytes(dtype, 32), '\0');
        for (size_t t = 0; t < 3; t++) {
            size_t at = size_t(n[t] - 1) * row_bytes(dtype, 32);
            store_row(reinterpret_cast<std::byte*>(bytes.data() + at), x.data() + t * 40, 32, dtype);
        }
        EXPECT_EQ(std::memcmp(cache.matrix(1, 2).data, bytes.data(), bytes.size()), 0)
            << format_of(dtype).name;
    }
}
// What a number may lose: nothing; half a step of 8 significant bits, 2^-8 of it; half a step of the block's
// d, as derived for QuantiseQ8_0.
TEST(GqaCache, LosesHalfAStepAtMost) {
    Noise noise;
    for (Dtype dtype : CACHES) {
        Cache cache = cache_of(config_of(wide_dense()), 50, dtype);
        for (int pos = 0; pos < 50; pos++) {
            Vector x = noise.vector(32), row(32);
            store(cache.matrix(0, 1), std::array{pos + 1}, {x.data(), 32});
            widen_plain(row.data(), cache.matrix(0, 1), pos);
            real top = 0;
            for (real v : x) top = std::max(top, std::fabs(v));
            long double d = (long double)(top) / 127 * (1 + 0x1p-11L);
            for (size_t i = 0; i < 32; i++) {
                long double number = x[i], lost = std::fabs(number - row[i]), size = std::fabs(number);
                long double bound = dtype == REAL ? 0 : dtype == Dtype::BF16 ? size * 0x1p-8L : d * 0.5001L;
                ASSERT_LE(lost, bound) << format_of(dtype).name;
            }
        }
    }
}

// -- 7.2 attend -------------------------------------------------------------------------------------

// Some queries on one key head: query i sees the first n[i] positions.
static void attend_some(Rows out, ConstRows q, const Matrix& k, const Matrix& v, real scale,
                        std::span<const int> n) {
    int64_t size = attention_scratch(n.back(), k.cols, v.cols);
    Vector memory(size_t(size * n_threads()));
    Attention a{out, q, 1, k, v, scale, n};
    attend({&a, 1}, {memory.data(), size});
}

// Keys or values, stored like a cache: rows of `dtype` that lie `gap` bytes apart, and what they are worth.
struct StoredRows {
    std::string bytes;
    Vector values;
    Matrix matrix;

    StoredRows(int n, int width, Dtype dtype, size_t gap, Noise& noise) : values(size_t(n * width)) {
        size_t row = row_bytes(dtype, width), stride = row + gap;
        bytes = std::string(size_t(n) * stride, '\x7F');
        std::byte* data = reinterpret_cast<std::byte*>(bytes.data());
        matrix = {data, nullptr, dtype, n, width, 0, gap ? stride : 0};
        for (int j = 0; j < n; j++) {
            Vector x = noise.vector(size_t(width));
            store_row(data + size_t(j) * stride, x.data(), width, dtype);
            widen_plain(values.data() + j * width, matrix, j);
        }
    }
    StoredRows(const StoredRows&) = delete;
};

struct AttendCase {
    int dk, dv;
    std::vector<int> n;                                  // what each query sees
    Dtype dtype = REAL;
    size_t gap = 0;
    real scale = real(0.7);
};

// For each number of x the step of its block of 32 in integers of 8 bits.
static std::vector<long double> integer_steps(const real* x, size_t n) {
    std::vector<long double> steps;
    for (size_t i = 0; i < n; i++) {
        long double top = 0;
        for (size_t j = i / 32 * 32; j < std::min(n, i / 32 * 32 + 32); j++)
            top = std::max(top, std::fabs((long double)(x[j])));
        steps.push_back(top / 127);
    }
    return steps;
}

// Errors of one query. A score: dot_roundings(dk), or the 2 + 2 ceil(blocks / 8) + 3 of int_dot, and the
// scale's product, on sum |q k|; where q is made integers, half a step and 3 U of itself too. That moves a
// weight by a factor e^(2 score error); softmax_error on top; then n products and sums a value.
static void expect_query(const AttendCase& a, int n, const real* q, const StoredRows& k, const StoredRows& v,
                         const real* out) {
    bool integers = in_integers(k.matrix);
    size_t dk = size_t(a.dk), dv = size_t(a.dv);
    std::vector<long double> p(static_cast<size_t>(n)), steps = integer_steps(q, dk);
    long double top = -INFINITY, bottom = INFINITY, score_error = 0, sum = 0;
    int roundings = std::max(dot_roundings(a.dk), 2 + 2 * ((a.dk / 32 + 7) / 8) + 3) + 1;
    for (size_t j = 0; j < p.size(); j++) {
        long double size = 0, step = 0;
        for (size_t i = 0; i < dk; i++) {
            long double key = k.values[j * dk + i] * (long double)(a.scale), product = q[i] * key;
            p[j] += product, size += std::fabs(product);
            if (integers) step += std::fabs(key) * steps[i] / 2 + 3.01L * U * std::fabs(product);
        }
        top = std::max(top, p[j]), bottom = std::min(bottom, p[j]);
        score_error = std::max(score_error, chain_error(roundings) * (size + step) + step);
    }
    for (long double& x : p) sum += x = std::exp(x - top);
    long double error = std::expm1(2 * score_error) + softmax_error(n, top - bottom + 2 * score_error) +
                        chain_error(n);
    for (size_t i = 0; i < dv; i++) {
        long double exact = 0, size = 0;
        for (size_t j = 0; j < p.size(); j++) {
            long double term = p[j] / sum * v.values[j * dv + i];
            exact += term, size += std::fabs(term);
        }
        ASSERT_LE(std::fabs(out[i] - exact), 1.01L * error * size) << n << " keys of " << a.dk;
    }
}

// All queries at once: each near the formula, and with the bits that it has alone.
static void expect_attention(const AttendCase& a, Noise& noise) {
    int Q = int(a.n.size()), n = a.n.back();
    StoredRows k(n, a.dk, a.dtype, a.gap, noise), v(n, a.dv, a.dtype, a.gap, noise);
    Vector q = noise.vector(size_t(Q * (a.dk + 1))), out(size_t(Q * (a.dv + 2)), 99);
    attend_some({out.data(), a.dv + 2}, {q.data(), a.dk + 1}, k.matrix, v.matrix, a.scale, a.n);
    for (int i = 0; i < Q; i++) {
        const real *query = q.data() + i * (a.dk + 1), *got = out.data() + i * (a.dv + 2);
        int seen = a.n[size_t(i)];
        ASSERT_NO_FATAL_FAILURE(expect_query(a, seen, query, k, v, got));
        Vector alone(static_cast<size_t>(a.dv));
        attend_some({alone.data(), a.dv}, {query, a.dk}, k.matrix, v.matrix, a.scale, {&seen, 1});
        ASSERT_TRUE(same_bits(alone.data(), got, alone.size())) << "query " << i << " of " << Q;
        ASSERT_TRUE(got[a.dv] == 99 && got[a.dv + 1] == 99);
    }
}

TEST(Attend, IsNearTheFormula) {
    Noise noise;
    for (int n : {1, 2, 3, 17, 200}) {
        for (int dk : {1, 2, 16, 33, 192}) expect_attention({dk, 7 + dk / 2, {n}}, noise);
    }
}
TEST(Attend, ManyQueriesAreAsEachAlone) {
    Noise noise;
    for (int Q = 1; Q <= QUERY_TILE; Q++) {
        for (int heads : {1, 3, 16}) {                   // queries that see the same keys
            std::vector<int> n;
            for (int i = 0; i < Q; i++) n.push_back(60 + i / heads);
            expect_attention({33, 20, n}, noise);
        }
    }
    expect_attention({16, 16, {1, 1, 2, 40, 41, 130}}, noise);
}
TEST(Attend, ReadsRowsOfAnyKindAndDistance) {
    Noise noise;
    for (bool integers : {true, false}) {
        for (const Kernels& k : available_kernels()) {
            ScopedKernels scoped(k);
            kernels.integers = integers && sizeof(real) == 4;
            for (Dtype dtype : CACHES) {
                for (size_t gap : {size_t(0), 3 * sizeof(real)})
                    expect_attention({64, 96, {5, 70, 70, 71, 71, 72}, dtype, gap}, noise);
            }
        }
    }
}
// Without integers, a cache in fewer bits is a cache of the numbers that were kept: to the bit.
TEST(Attend, OverFewerBitsIsOverTheirNumbers) {
    Noise noise;
    ScopedKernels scoped(kernels);
    kernels.integers = false;
    for (Dtype dtype : {Dtype::BF16, Dtype::Q8_0}) {
        StoredRows k(50, 64, dtype, 0, noise), v(50, 32, dtype, 0, noise);
        Vector q = noise.vector(3 * 64), out(3 * 32), expected(3 * 32);
        std::vector<int> n = {48, 49, 50};
        attend_some({out.data(), 32}, {q.data(), 64}, k.matrix, v.matrix, 1, n);
        attend_some({expected.data(), 32}, {q.data(), 64}, real_matrix(k.values.data(), 50, 64),
                    real_matrix(v.values.data(), 50, 32), 1, n);
        EXPECT_TRUE(same_bits(out, expected)) << format_of(dtype).name;
    }
}

// Keys, values and one query of the program's own numbers.
static Vector attend_one(const Vector& q, const Vector& k, const Vector& v, real scale, int n) {
    int dk = int(q.size()), rows = int(k.size()) / dk, dv = int(v.size()) / rows;
    Vector out(static_cast<size_t>(dv));
    attend_some({out.data(), dv}, {q.data(), dk}, real_matrix(k.data(), rows, dk),
                real_matrix(v.data(), rows, dv), scale, {&n, 1});
    return out;
}
TEST(Attend, OfOneKeyIsItsValue) {
    Vector v = {real(0.1), real(0.2), real(0.3)};
    EXPECT_EQ(attend_one({1, -2}, {5, 6}, v, real(0.7), 1), v);
}
TEST(Attend, OfEqualKeysIsTheMean) {
    EXPECT_EQ(attend_one({1, 1}, {3, 4, 3, 4, 3, 4, 3, 4}, {1, 2, 3, 6}, 1, 4), Vector{3});
}
TEST(Attend, ReadsNoFurtherThanN) {
    real nan = std::numeric_limits<real>::quiet_NaN();
    EXPECT_EQ(attend_one({1}, {1, 1, nan}, {2, 4, nan}, 1, 2), Vector{3});
}
// A query that sees less is not touched by what another of the same tile sees.
TEST(Attend, EachQuerySeesItsOwnPast) {
    real nan = std::numeric_limits<real>::quiet_NaN();
    Vector q = {1, 1, 1}, k = {1, 1, nan, 1}, v = {2, 4, nan, 1}, out(3);
    std::vector<int> n = {1, 2, 3};
    attend_some({out.data(), 1}, {q.data(), 1}, real_matrix(k.data(), 4, 1), real_matrix(v.data(), 4, 1), 1,
                n);
    EXPECT_EQ(out[0], 2);
    EXPECT_EQ(out[1], 3);
    EXPECT_TRUE(std::isnan(out[2]));
}

// The fast forms, which attend with many queries at once, against two loops: heads side by side or among
// others, a past of any kind, any number of threads.
TEST(Attend, EqualsTwoLoops) {
    Noise noise;
    for (const Kernels& kernel : available_kernels()) {
        for (Dtype dtype : CACHES) {
            for (auto [T, heads, others] :
                 {std::tuple{1, 7, 0}, {5, 16, 0}, {5, 6, 6}, {40, 3, 9}, {9, 1, 5}}) {
                int dk = 64, dv = 32, n = 30 + T;
                StoredRows k(n, dk, dtype, 0, noise), v(n, dv, dtype, 0, noise);
                Vector q = noise.vector(size_t(T * (heads + others) * dk));
                Vector out(size_t(T * (heads + others) * dv), 7), expected = out;
                Vector lse(size_t(T * (heads + others)), 7), expected_lse = lse;
                std::vector<int> seen;
                for (int t = 0; t < T; t++) seen.push_back(31 + t);
                Attention a{{out.data(), (heads + others) * dv}, {q.data(), (heads + others) * dk}, heads,
                            k.matrix, v.matrix, real(0.3), seen, {lse.data(), heads + others}}, b = a;
                b.out.data = expected.data(), b.lse.data = expected_lse.data();
                int64_t size = attention_scratch(n, dk, dv);
                Vector memory(size_t(size * 3));
                ScopedKernels scoped(Kernels{});
                attend_plain(b, {memory.data(), size});
                kernels = kernel;
                for (int threads : {1, 3}) {
                    ScopedThreads some(threads);
                    attend({&a, 1}, {memory.data(), size});
                    ASSERT_TRUE(same_bits(out, expected) && same_bits(lse, expected_lse))
                        << kernel.name << ", " << T << " tokens, " << heads << " heads, "
                        << format_of(dtype).name;
                }
            }
        }
    }
}

// ln of the sum of e^score, from the definition; asking for it changes nothing else.
TEST(Attend, GivesTheLogarithmOfTheSum) {
    Noise noise;
    const int T = 3, heads = 5, n = 70, dk = 24, dv = 8;
    Vector k = noise.vector(n * dk), v = noise.vector(n * dv), q = noise.vector(T * heads * dk);
    Vector out(T * heads * dv), without = out, lse(T * heads);
    std::vector<int> seen = {1, 64, 70};
    Attention a{{out.data(), heads * dv}, {q.data(), heads * dk}, heads, real_matrix(k.data(), n, dk),
                real_matrix(v.data(), n, dv), real(0.4), seen, {lse.data(), heads}}, b = a;
    b.out.data = without.data(), b.lse.data = nullptr;
    Vector memory(size_t(attention_scratch(n, dk, dv)));
    for (const Attention& one : {a, b}) attend({&one, 1}, {memory.data(), 0});
    EXPECT_TRUE(same_bits(out, without));
    for (size_t i = 0; i < lse.size(); i++) {
        long double sum = 0, largest = 0;
        for (size_t j = 0; j < size_t(seen[i / heads]); j++) {
            long double score = 0;
            for (size_t d = 0; d < dk; d++)
                score += (long double)(q[i * dk + d]) * (long double)(k[j * dk + d]);
            sum += std::exp(score * 0.4L), largest = std::max(largest, std::abs(score * 0.4L));
        }
        // Roundings of a dot of 24 products, of a sum of 70 terms in 16 lanes, of its inverse, of the result.
        EXPECT_NEAR(lse[i], double(std::log(sum)), double((24 + 9 + 2 + largest) * 4 * U)) << i;
    }
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
        return Matrix{reinterpret_cast<const std::byte*>(data.data()), nullptr, Dtype::F32, rows, 60, 0, 0};
    };
    Vector none(60), bias(20);
    for (size_t i = 0; i < 20; i++) bias[i] = real(1 + i / 10);
    Gqa w{matrix(zeros, 60), matrix(zeros, 20), matrix(zeros, 20), matrix(identity, 60),
          none, std::span(none).first(20), bias};
    Model model;
    model.config = c;
    Session s(model, {8, 8, MlaForm::ABSORBED});
    std::fill_n(s.a.u, 8 * 60, real(1));
    model.rope = make_rope(c.rope, 10);
    place(s, 8, 0);
    gqa(s, w, 0, 8);
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
    Vector u = noise.vector(size_t(c.D)), k(20), v(20), table(10), row(10);
    std::copy(u.begin(), u.end(), s.a.u);
    place(s, 1, 3), rope_table(table.data(), model.rope, 1, 3);
    gqa(s, w, 0, 1);
    matmul({k.data(), 20}, {u.data(), c.D}, w.wk, 1), add_bias(k.data(), w.bk, 1);
    matmul({v.data(), 20}, {u.data(), c.D}, w.wv, 1), add_bias(v.data(), w.bv, 1);
    rope_half({k.data(), 20, 10, 1, 2}, table.data(), 10);
    for (int g = 0; g < 2; g++) {
        widen_plain(row.data(), s.cache.matrix(0, 2 * g), 3);
        EXPECT_TRUE(same_bits(row.data(), k.data() + 10 * g, 10)) << g;
        widen_plain(row.data(), s.cache.matrix(0, 2 * g + 1), 3);
        EXPECT_TRUE(same_bits(row.data(), v.data() + 10 * g, 10)) << g;
    }
}

// T tokens behind five others, which another call has put into the cache.
struct GqaRun {
    Vector q, o, y;

    GqaRun(const Model& model, Dtype kv, int T, int threads) {
        ScopedThreads scoped(threads);
        const Config& c = model.config;
        Session s(model, {40, 30, MlaForm::ABSORBED, kv});
        Noise noise;
        for (auto [pos, n] : {std::pair{0, 5}, std::pair{5, T}}) {
            Vector u = noise.vector(size_t(n * c.D));
            std::copy(u.begin(), u.end(), s.a.u);
            place(s, n, pos);
            gqa(s, model.layers[1].gqa, 1, n);
        }
        q.assign(s.a.q, s.a.q + T * c.H * c.head_dim), o.assign(s.a.o, s.a.o + T * c.H * c.head_dim);
        y.assign(s.a.y, s.a.y + T * c.D);
        if (threads == 1) expect_each_alone(s, T);
    }
    // The query of each head at each token, attending alone over its kv head's part of the cache.
    void expect_each_alone(const Session& s, int T) {
        const Config& c = s.model.config;
        Vector out(static_cast<size_t>(c.head_dim));
        for (int i = 0; i < T * c.H; i++) {
            int h = i % c.H, g = h / (c.H / c.G), n = 5 + i / c.H + 1;
            Matrix k = s.cache.matrix(1, 2 * g), v = s.cache.matrix(1, 2 * g + 1);
            attend_some({out.data(), c.head_dim}, {q.data() + i * c.head_dim, c.head_dim}, k, v,
                        1 / std::sqrt(real(c.head_dim)), {&n, 1});
            ASSERT_TRUE(same_bits(out.data(), o.data() + i * c.head_dim, out.size())) << "query " << i;
        }
    }
};

// Groups of 1, 3, 16, 20 and 50 heads: below and above QUERY_TILE, and split among threads in every way.
TEST(Gqa, TilesDoNotShowInItsBits) {
    const std::pair<const char*, const char*> heads[] = {{"4", "4"}, {"6", "2"}, {"16", "1"}, {"40", "2"},
                                                         {"50", "1"}};
    for (auto [H, G] : heads) {
        Model model = random_model(
            "tiles", with(wide_dense(), {{"num_attention_heads", H}, {"num_key_value_heads", G}}));
        for (Dtype kv : CACHES) {
            for (int T : {1, 2, 7, 30}) {
                GqaRun expected(model, kv, T, 1);
                for (int threads = 2; threads <= 8; threads++) {
                    GqaRun run(model, kv, T, threads);
                    ASSERT_TRUE(same_bits(run.o, expected.o) && same_bits(run.y, expected.y))
                        << H << " heads on " << G << ", " << T << " tokens, " << threads << " threads, "
                        << format_of(kv).name;
                }
            }
        }
    }
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
