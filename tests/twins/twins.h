// What `deepseek check` compares: a function for each twin of deepseek.cu, which includes this file.
//
// Contents: 1 a case in two memories; 2 chapters 5 and 6; 3 chapters 7 and 8; 4 chapters 9 and 10;
//           5 chapter 14; 6 chapter 12; 7 the latent cache in pages and in FP8; 8 chapter 15.
//
// A case is made once, in the host's memory and in the device's, and the same call is made in both. All bits
// of what can be written are compared: of numbers that must stay as they are, too, for rows are further apart
// than they are long, and between them lies NaN. Sizes are odd on purpose: rows that no tile divides, no
// token at all, experts that no one picked, ties, one position more than a split. Among the numbers are some
// that a port may treat in its own way: NaN, infinities, -0, the largest and the subnormal ones.
#pragma once

namespace cuda {

// -- 1  a case in two memories ----------------------------------------------------------------

enum class Side : uint8_t { HOST, DEVICE };
constexpr Side SIDES[] = {Side::HOST, Side::DEVICE};
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float ODD_NUMBERS[] = {NOT_A_NUMBER, INF, -0.0f, 3e38f, 1e-42f, -INF, -3e38f, 0};

// f(...) on the host's arrays, cuda::f(...) on the device's. Arrays are given as x(at).
#define BOTH(f, ...) for (Side at : SIDES) at == Side::HOST ? ::f(__VA_ARGS__) : cuda::f(__VA_ARGS__)

template <class T> struct Array {
    std::vector<T> host;
    Buffer<T> device;

    explicit Array(std::vector<T> v) : host(std::move(v)), device(host) {}
    T* operator()(Side at) { return at == Side::HOST ? host.data() : device.data(); }
    std::span<const T> span(Side at) { return {(*this)(at), host.size()}; }
};
using Reals = Array<real>;
using Ints = Array<int>;

struct Check {
    const char *section, *name;
    int cases = 0;
    double worst = 0, bound = 0;           // of the differences
    std::string wrong = {};                // the first difference beyond its bound
    Rng rng{1};

    float number(float size) { return float(rng.uniform() * 2 - 1) * size; }
    int below(int n) { return int(rng.next() % uint64_t(n)); }
    Vector numbers(int64_t n, float size = 1) {
        Vector v;
        for (int64_t i = 0; i < n; i++) v.push_back(number(size));
        return v;
    }
    // rows of n numbers, `stride` apart, NaN in between
    Vector rows(int64_t n_rows, int n, int stride, float size = 1) {
        Vector v(size_t(n_rows * stride), NOT_A_NUMBER);
        for (int64_t i = 0; i < n_rows * n; i++) v[size_t(i / n * stride + i % n)] = number(size);
        return v;
    }
    // v with an odd number at every so many places
    static Vector odd(Vector v, int64_t apart) {
        for (size_t i = 0, k = 0; i < v.size(); i += size_t(apart)) v[i] = ODD_NUMBERS[k++ % 8];
        return v;
    }
    Vector few_values(int64_t n) {         // many are equal
        Vector v;
        for (int64_t i = 0; i < n; i++) v.push_back(real(below(5) - 2) / 4);
        return v;
    }

    void differs(size_t i, double host, double device, double limit) {
        if (wrong.empty()) wrong = text_of("case %d, [%zu]: %.9g, not %.9g", cases, i, device, host);
        bound = std::max(bound, limit);
    }
    // Bits; any NaN is as good as another.
    template <class T> void same(Array<T>& a) {
        const std::vector<T> device = a.device.host();
        for (size_t i = 0; i < device.size(); i++) {
            if (std::memcmp(&device[i], &a.host[i], sizeof(T)) == 0) continue;
            if constexpr (std::is_same_v<T, float>) {
                if (std::isnan(device[i]) && std::isnan(a.host[i])) continue;
                worst = std::max(worst, std::fabs(double(device[i]) - double(a.host[i])));
            }
            differs(i, double(a.host[i]), double(device[i]), 0);
        }
        cases++;
    }
    void within(Reals& a, double limit) {
        const Vector device = a.device.host();
        for (size_t i = 0; i < device.size(); i++) {
            if (device[i] == a.host[i] || (std::isnan(device[i]) && std::isnan(a.host[i]))) continue;
            const double difference = std::fabs(double(device[i]) - double(a.host[i]));
            worst = std::max(worst, difference);
            if (!(difference <= limit)) differs(i, double(a.host[i]), double(device[i]), limit);
        }
        bound = std::max(bound, limit), cases++;
    }
};

// A matrix of random weights of any format.
struct Weight {
    Array<uint8_t> data;
    Reals scale;
    Matrix shape;

    Matrix at(Side side) {
        Matrix m = shape;
        m.data = reinterpret_cast<const std::byte*>(data(side));
        m.scale = scale.host.empty() ? nullptr : reinterpret_cast<const std::byte*>(scale(side));
        return m;
    }
    // The i-th of matrices of `rows` rows, as a tensor of its own: its scales begin with it.
    Matrix part(Side side, int i, int rows) {
        Matrix m = at(side).view(i * rows, rows);
        if (m.scale) m.scale += scale_blocks(rows) * scale_blocks(m.cols) * 4 * i;
        m.first_row = 0;
        return m;
    }
    void set(size_t i, uint8_t byte) { data.host[i] = byte, data.device = Buffer(data.host); }
};

// Random bits, but numbers: what says how large they are is set.
inline std::vector<uint8_t> random_bytes(Check& c, Dtype dtype, size_t n, float size) {
    std::vector<uint8_t> bytes;
    for (size_t i = 0; i < n; i++) bytes.push_back(uint8_t(c.below(127) | c.below(2) << 7)); // no e4m3 NaN
    auto set = [&](size_t at, auto value) { std::memcpy(bytes.data() + at, &value, sizeof value); };
    for (size_t i = 0; dtype == Dtype::F32 && i < n; i += 4) set(i, c.number(size));
    for (size_t i = 0; dtype == Dtype::BF16 && i < n; i += 2) set(i, float_to_bf16(c.number(size)));
    for (size_t i = 0; dtype == Dtype::F16 && i < n; i += 2) set(i, float_to_f16(c.number(size)));
    for (size_t i = LATENT_SCALED; dtype == Dtype::F8_LATENT && i < n; i += row_bytes(dtype, 576)) {
        for (size_t j = 0; j < 4; j++) set(i + 4 * j, std::ldexp(size, -9 - int(j)));
        for (size_t j = 0; j < 64; j++) set(i + 16 + 2 * j, float_to_bf16(c.number(size)));
    }
    if (!quantised(dtype)) return bytes;
    const BlockLayout& layout = layout_of(dtype);
    for (size_t i = 0; i < n; i += size_t(format_of(dtype).bytes))
        for (int field : {layout.d, layout.m})
            if (field >= 0) set(i + size_t(field), float_to_f16(c.number(size / 64)));
    return bytes;
}

// Rows first, first + 1, ... of a larger one.
inline Weight weight(Check& c, Dtype dtype, int n_rows, int cols, int first = 0, float size = 1) {
    const size_t bytes = size_t(n_rows + first) * row_bytes(dtype, cols);
    const int64_t scales = dtype == Dtype::F8_E4M3 ? scale_blocks(n_rows + first) * scale_blocks(cols) : 0;
    std::vector<uint8_t> data = random_bytes(c, dtype, bytes, size);
    data.erase(data.begin(), data.begin() + int64_t(size_t(first) * row_bytes(dtype, cols)));
    return {
        Array(data), Reals(c.numbers(scales, size / 256)), {nullptr, nullptr, dtype, n_rows, cols, first, 0}};
}

constexpr Dtype PLAIN_DTYPES[] = {Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3};
constexpr int TOKENS[] = {0, 1, 2, 17, 129};

// -- 2  chapters 5 and 6 ----------------------------------------------------------------------

inline void check_softmax(Check& c) {
    for (int T : TOKENS) {
        for (int n : {1, 16, 100}) {
            Vector v = c.rows(T, n, n + 3, 9);
            for (size_t i = 0; n > 1 && i < v.size(); i += size_t(n + 3)) v[i] = -INF;
            Reals z(T == 17 ? c.odd(v, 2 * n + 1) : v);
            BOTH(softmax, {z(at), n + 3}, 0.3f, T, n);
            c.same(z);
        }
    }
}
inline void check_silu_times(Check& c) {
    for (int T : TOKENS) {
        Reals gate(c.odd(c.numbers(T * 37, 20), 9)), up(c.odd(c.numbers(T * 37), 31));
        BOTH(silu_times, gate(at), up(at), 37, T);
        c.same(gate);
    }
}
inline void check_add(Check& c) {
    for (int T : TOKENS) {
        Reals out(c.odd(c.numbers(T * 37), 31)), x(c.odd(c.numbers(T * 37), 9));
        BOTH(add, out(at), x(at), size_t(T) * 37);
        c.same(out);
    }
}
inline void check_add_bias(Check& c) {
    for (int T : TOKENS) {
        Reals out(c.odd(c.numbers(T * 37), 31)), bias(c.odd(c.numbers(37), 9));
        BOTH(add_bias, out(at), bias.span(at), T);
        c.same(out);
    }
}

using Multiply = void (*)(Rows, ConstRows, const Matrix&, int);

// W x, or W^T x, whichever of the two is stored.
inline void check_product(Check& c, Weight& w, bool stored_transposed, bool transposed, int T) {
    Matrix shape = stored_transposed ? w.shape.transpose() : w.shape;
    const int n = transposed ? shape.rows : shape.cols, n_out = transposed ? shape.cols : shape.rows;
    Vector v = c.rows(T, n, n + 1);
    Reals x(T == 17 ? c.odd(v, 2 * n + 7) : v), out(Vector(size_t(T) * size_t(n_out + 2), NOT_A_NUMBER));
    for (Side at : SIDES) {
        const Matrix m = stored_transposed ? w.at(at).transpose() : w.at(at);
        const Rows to{out(at), n_out + 2}, from{x(at), n + 1};
        if (at == Side::HOST)
            (transposed ? ::matmul_transposed : static_cast<Multiply>(::matmul))(to, from, m, T);
        else (transposed ? cuda::matmul_transposed : static_cast<Multiply>(cuda::matmul))(to, from, m, T);
    }
    c.same(out);
}
// Two products of one call, each with its own sizes.
inline void check_products(Check& c) {
    Weight w = weight(c, Dtype::BF16, 37, 64), w2 = weight(c, Dtype::F32, 5, 40);
    Reals x(c.numbers(3 * 64)), x2(c.numbers(40)), out(Vector(3 * 37)), out2(Vector(5));
    for (Side at : SIDES) {
        const Matrix m = w.at(at), m2 = w2.at(at);
        const Product both[] = {{{out(at), 37}, {x(at), 64}, &m, 3}, {{out2(at), 5}, {x2(at), 40}, &m2, 1}};
        at == Side::HOST ? ::matmul(both) : cuda::matmul(both);
    }
    c.same(out), c.same(out2);
}
inline void check_matmul(Check& c) {
    check_products(c);
    for (Dtype dtype : PLAIN_DTYPES) {
        Weight w = weight(c, dtype, 37, 300, 100);
        if (dtype == Dtype::F8_E4M3) w.set(5 * 300 + 7, E4M3_NAN);
        for (int T : TOKENS) check_product(c, w, false, false, T), check_product(c, w, true, false, T);
    }
    for (int i = int(Dtype::Q4_0); i < N_DTYPES; i++) {
        Weight w = weight(c, Dtype(i), 33, 512);
        for (int T : {1, 17}) check_product(c, w, false, false, T);
    }
    Weight paired = weight(c, Dtype::BF16, 48, 40);          // rows as llama.cpp's files have them
    paired.shape.pairs = 16;
    for (int T : {1, 17}) check_product(c, paired, false, false, T);
}
inline void check_matmul_transposed(Check& c) {
    for (Dtype dtype : PLAIN_DTYPES) {
        Weight w = weight(c, dtype, 37, 300, 100);
        for (int T : TOKENS) check_product(c, w, false, true, T), check_product(c, w, true, true, T);
    }
    Weight w = weight(c, Dtype::Q8_0, 33, 64);
    for (int T : {1, 17}) check_product(c, w, false, true, T);
}

inline void check_embed(Check& c) {
    for (Dtype dtype : {Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3, Dtype::Q8_0, Dtype::Q6_K}) {
        Weight w = weight(c, dtype, 50, 256);
        for (int T : TOKENS) {
            std::vector<int> v;
            for (int t = 0; t < T; t++) v.push_back(t == 1 ? 49 : c.below(50));
            Ints ids(v);
            Reals out(Vector(size_t(T) * 260, NOT_A_NUMBER));
            BOTH(embed, {out(at), 260}, w.at(at), ids.span(at));
            c.same(out);
        }
    }
}
inline void check_rmsnorm(Check& c) {
    for (int T : TOKENS) {
        for (int n : {1, 37, 300}) {
            Vector v = c.rows(T, n, n + 5, T == 2 ? 1e-4f : 3);        // where eps counts
            Reals x(T == 17 ? c.odd(v, 2 * n + 3) : v), w(c.numbers(n)),
                out(Vector(size_t(T) * size_t(n + 2), NOT_A_NUMBER));
            BOTH(rmsnorm, {out(at), n + 2}, {x(at), n + 5}, w.span(at), T, 1e-6);
            c.same(out);
            BOTH(rmsnorm, {x(at), n + 5}, {x(at), n + 5}, w.span(at), T, 1e-6);       // in place
            c.same(x);
        }
    }
}
inline void check_top_k(Check& c) {
    for (auto [n, k] : {std::pair{1, 1}, {37, 5}, {256, 8}, {300, 300}}) {
        for (bool ties : {false, true}) {
            Reals v(ties ? c.few_values(n) : c.numbers(n));
            Ints idx(std::vector<int>(size_t(k) + 1, -7));
            BOTH(top_k, idx(at), v(at), n, k);
            c.same(idx);
        }
    }
    // Where NaN belongs is not defined. But who reads the indices must find all of them.
    Reals v(c.odd(c.numbers(37), 3));
    Ints idx(std::vector<int>(37, -7));
    cuda::top_k(idx(Side::DEVICE), v(Side::DEVICE), 37, 37);
    std::vector<int> found = idx.device.host();
    std::sort(found.begin(), found.end());
    for (size_t i = 0; i < idx.host.size(); i++) idx.host[i] = int(i);
    idx.device = Buffer(found);
    c.same(idx);
}

inline void check_rope(Check& c, bool interleaved) {
    for (int T : TOKENS) {
        for (int H : {1, 3, 16, 128}) {
            const int dim = H == 3 || H == 128 ? 2 : 10, head = dim + 3;
            Reals x(c.odd(c.rows(int64_t(T) * H, dim, head), 5 * head)), cos_sin(c.numbers(T * dim));
            for (Side at : SIDES) {
                const Heads heads{x(at), int64_t(H) * head, head, T, H};
                if (interleaved)
                    at == Side::HOST ? ::rope_interleaved(heads, cos_sin(at), dim)
                                     : cuda::rope_interleaved(heads, cos_sin(at), dim);
                else
                    at == Side::HOST ? ::rope_half(heads, cos_sin(at), dim)
                                     : cuda::rope_half(heads, cos_sin(at), dim);
            }
            c.same(x);
        }
    }
}
inline void check_rope_interleaved(Check& c) { check_rope(c, true); }
inline void check_rope_half(Check& c) { check_rope(c, false); }

// -- 3  chapters 7 and 8 ----------------------------------------------------------------------

// T tokens that see up to `most` positions, the last one all of them: each one more than the one before, or
// any number more.
inline std::vector<int> positions(int T, int most) {
    std::vector<int> n;
    for (int t = 0; t < T; t++) n.push_back(std::max(1, most - T + 1 + t));
    return n;
}
inline std::vector<int> ragged_positions(Check& c, int T, int most) {
    std::vector<int> n;
    for (int t = 0; t < T; t++) n.push_back(t + 1 < T ? 1 + c.below(most) : most);
    std::sort(n.begin(), n.end());
    return n;
}

// Rows of a cache; those that no token sees are NaN.
inline Weight cache_rows(Check& c, Dtype dtype, int context, int width, int most, float size = 1) {
    Weight w = weight(c, dtype, context, width, 0, size);
    std::fill(w.data.host.begin() + int64_t(size_t(most) * row_bytes(dtype, width)), w.data.host.end(),
              uint8_t(255));
    w.data.device = Buffer(w.data.host);
    return w;
}

// A number of random_bytes is at most this much.
inline double largest(Dtype dtype, double size) { return dtype == Dtype::Q8_0 ? size * 128 / 64 : size; }

// How far apart are two ways to add up n terms p v, one of which splits them? With u = 2^-24 and |v| at most
// `largest`, each partial sum is at most that:
//
//      the two chains of fma          n u each
//      putting a split to the others  5 u: two products, a sum, and a quotient's two of the weights
//      the weights p = e^d / l        u of e^d, (n / 16 + 4) u of l, u of the quotient; and |d| u of d,
//                                     whose mean over p is at most log(n) u: for n > 256 on both sides less
//                                     than 2 n u
//
// together at most 4 (n + 5 n / 256) u. Within one split both do the same.
inline double attention_bound(int n, double largest) {
    return n <= SPLIT ? 0 : 4 * (n + 5.0 * n / SPLIT) * 0x1p-24 * largest;
}

// Of a logarithm: of a sum of n / 16 roundings a lane, put together in another order; and its own.
inline double lse_bound(int n, const Reals& lse) {
    double largest = 0;
    for (real x : lse.host) if (std::isfinite(x)) largest = std::max(largest, std::fabs(double(x)));
    return n <= SPLIT ? 0 : (n / 16.0 + 4 + largest) * 0x1p-23;
}

struct AttentionCase {
    int T, heads, G, dk, dv, most;
    Dtype kv;
    float size = 2;                        // of a query's numbers: a large one makes scores of thousands
    bool ragged = false, odd = false;
    unsigned lost = 0;                     // bit i: all scores of split i are -inf
};

// Key heads lie evenly apart on the device: all keys one behind the other, then all values.
struct KeysAndValues {
    Weight k, v;                           // the first head's
    Array<uint8_t> all;
    int G;

    Matrix matrix(Side at, bool value, int g) {
        const Weight& w = value ? v : k;
        const size_t head = w.data.host.size(), before = value ? size_t(G) * k.data.host.size() : 0;
        Matrix m = w.shape;
        m.data = reinterpret_cast<const std::byte*>(all(at)) + before + size_t(g) * head;
        return m;
    }
};
inline KeysAndValues keys_and_values(Check& c, const AttentionCase& a, int context) {
    std::vector<uint8_t> all;
    std::vector<Weight> first;
    for (auto [width, size] : {std::pair{a.dk, 2.0f}, {a.dv, 1.0f}}) {
        for (int g = 0; g < a.G; g++) {
            Weight w = cache_rows(c, a.kv, context, width, a.most, size);
            for (int j = 0; a.lost && width == a.dk && j < a.most; j++) {
                const float v = a.lost >> j / SPLIT & 1 ? -100 : 0;
                std::memcpy(w.data.host.data() + size_t(j * width) * sizeof v, &v, sizeof v);
            }
            all.insert(all.end(), w.data.host.begin(), w.data.host.end());
            if (g == 0) first.push_back(std::move(w));
        }
    }
    return {std::move(first[0]), std::move(first[1]), Array(all), a.G};
}

inline void check_attention(Check& c, const AttentionCase& a) {
    const int context = a.most + 40, H = a.heads * a.G;
    Vector numbers = c.numbers(int64_t(a.T) * H * a.dk, a.size);
    for (size_t i = 0; a.lost && i < numbers.size(); i += size_t(a.dk)) numbers[i] = 3e38f;
    Reals q(a.odd ? c.odd(numbers, 3 * a.dk + 1) : numbers);
    Reals out(Vector(size_t(a.T * H * a.dv), NOT_A_NUMBER)), again(out.host);
    Reals lse(Vector(size_t(a.T * H), NOT_A_NUMBER)), lse_again(lse.host);
    Ints n(a.ragged ? ragged_positions(c, a.T, a.most) : positions(a.T, a.most));
    KeysAndValues kv = keys_and_values(c, a, context);
    const int64_t split = split_scratch(a.T, H, context, a.dv),
                  whole = attention_scratch(context, a.dk, a.dv);
    Reals scratch(Vector(size_t(std::max(split, whole * n_threads()))));
    auto run = [&](Side at, real* to, real* logarithm, int64_t stride) {
        std::vector<Attention> heads;
        for (int g = 0; g < a.G; g++) {
            const int64_t first = int64_t(g) * a.heads;
            const Rows from{q(at) + first * a.dk, int64_t(H) * a.dk};
            heads.push_back({{to + first * a.dv, int64_t(H) * a.dv}, from, a.heads, kv.matrix(at, false, g),
                             kv.matrix(at, true, g), 0.4f, n.span(at), {logarithm + g * a.heads, H}});
        }
        at == Side::HOST ? ::attend(heads, {scratch(at), stride})
                         : cuda::attend(heads, {scratch(at), stride});
    };
    const Side host = Side::HOST, device = Side::DEVICE;
    if (a.T) run(host, out(host), lse(host), whole);         // which is not defined for no token
    run(device, out(device), lse(device), split);            // each split its own block
    run(device, again(device), lse_again(device), 0);        // a block all splits
    c.within(out, attention_bound(a.most, largest(a.kv, 1)));
    c.within(lse, lse_bound(a.most, lse));
    again.host = out.device.host(), lse_again.host = lse.device.host();
    c.same(again), c.same(lse_again);
}
inline void check_attend(Check& c) {
    for (const AttentionCase& a : {AttentionCase{1, 1, 1, 16, 16, 1, Dtype::F32},
                                   {0, 3, 2, 16, 16, 10, Dtype::F32},
                                   {17, 3, 2, 20, 12, 40, Dtype::F32, 2, false, true},
                                   {1, 16, 1, 40, 33, 256, Dtype::BF16},
                                   {2, 12, 2, 32, 32, 300, Dtype::Q8_0},
                                   {129, 1, 1, 8, 130, 129, Dtype::F32},
                                   {1, 128, 1, 24, 16, 90, Dtype::BF16},
                                   {3, 5, 1, 24, 16, 700, Dtype::F32},
                                   {2, 3, 2, 24, 140, 513, Dtype::BF16},
                                   {9, 3, 1, 24, 16, 600, Dtype::F32, 2, true, true},
                                   {3, 3, 1, 24, 16, 900, Dtype::F32, 2000},
                                   {2, 3, 1, 24, 16, 600, Dtype::F32, 2, false, false, 2},
                                   {2, 3, 1, 24, 16, 600, Dtype::F32, 2, false, false, 3}})
        check_attention(c, a);
}

inline void check_store(Check& c) {
    for (Dtype dtype : {Dtype::F32, Dtype::BF16, Dtype::Q8_0}) {
        for (int T : {0, 1, 17}) {
            Weight cache = weight(c, dtype, 60, 64);
            Vector v = c.rows(T, 64, 70, 5);
            Reals x(T > 1 ? c.odd(v, 97) : v);
            Ints n(positions(T, 31));
            BOTH(store, cache.at(at), n.span(at), {x(at), 70});
            c.same(cache.data);
        }
    }
}

inline void check_gqa_attend(Check& c) {
    struct Case {
        int G, H, T;
        Dtype kv;
    };
    for (auto [G, H, T, kv] : {Case{1, 3, 1, Dtype::BF16},
                               {2, 12, 17, Dtype::BF16},
                               {4, 4, 2, Dtype::F32},
                               {2, 4, 3, Dtype::Q8_0},
                               {1, 3, 0, Dtype::BF16}}) {
        const int d = 32, context = 64, most = 50;
        const size_t bytes = Cache::bytes(2, context, 2 * G, d, kv);
        Array<uint8_t> memory(random_bytes(c, kv, bytes, 1));
        Reals q(c.numbers(int64_t(T) * H * d)), out(Vector(size_t(T * H * d), NOT_A_NUMBER));
        Reals lse(Vector(size_t(T * H), NOT_A_NUMBER));
        Reals scratch(Vector(size_t(attention_scratch(context, d, d) * n_threads())));
        Ints n(positions(T, most));
        for (Side at : SIDES) {
            std::shared_ptr<std::byte> bytes_at(std::shared_ptr<void>(),
                                                reinterpret_cast<std::byte*>(memory(at)));
            const Cache cache{kv, context, 2 * G, d, bytes_at};
            const Rows rows{scratch(at), attention_scratch(context, d, d)};
            if (at == Side::DEVICE) cuda::gqa_attend(out(at), q(at), cache, 1, H, n.span(at), rows, lse(at));
            else if (T) ::gqa_attend(out(at), q(at), cache, 1, H, n.span(at), rows, lse(at));
        }
        c.same(out), c.same(lse);
    }
}

struct LatentCase {
    int T, H, most;
    Dtype weights, kv;
    bool transposed = false;               // W^UK apart from W^UV, and its transpose is stored
};
inline void check_latent(Check& c, const LatentCase& a, bool absorbed) {
    const int Dn = 24, Dr = 32, Rkv = 64, Dv = 40, latent = Rkv + Dr, dk = Dn + Dr, context = a.most + 20;
    Weight both = weight(c, a.weights, a.H * (Dn + Dv), Rkv, 0, 0.3f),
           k = weight(c, Dtype::F32, a.H * Rkv, Dn, 0, 0.3f);
    Weight cache = cache_rows(c, a.kv, context, latent, a.most);
    Reals q(c.numbers(int64_t(a.T) * a.H * dk, 2)), out(Vector(size_t(a.T * a.H * Dv), NOT_A_NUMBER));
    Ints n(positions(a.T, a.most));
    Reals q_absorbed(Vector(size_t(a.T * a.H * latent))), z(Vector(size_t(a.T * a.H * Rkv)));
    Reals lse(Vector(size_t(a.T * a.H), NOT_A_NUMBER));
    const int64_t expansion = int64_t(context) * latent_expansion(Rkv, Dn, Dr, Dv);
    const int64_t numbers =
        std::max(attention_scratch(context, latent, Rkv), split_scratch(a.T, a.H, context, Rkv));
    Reals expanded(Vector(size_t(expansion * n_threads()), NOT_A_NUMBER)),
        scratch(Vector(size_t(numbers * n_threads())));
    for (Side at : SIDES) {
        std::vector<Matrix> wk_b, wv_b;
        for (int h = 0; h < a.H; h++) {
            wk_b.push_back(a.transposed ? k.at(at).view(h * Rkv, Rkv).transpose()
                                        : both.at(at).view(h * (Dn + Dv), Dn));
            wv_b.push_back(both.at(at).view(h * (Dn + Dv) + Dn, Dv));
        }
        LatentAttention all{out(at),
                            q(at),
                            cache.at(at),
                            wk_b,
                            wv_b,
                            n.span(at),
                            Dr,
                            0.3f,
                            q_absorbed(at),
                            z(at),
                            {expanded(at), expansion},
                            {scratch(at), numbers},
                            lse(at)};
        if (at == Side::DEVICE) absorbed ? cuda::mla_absorbed(all) : cuda::mla_naive(all);
        else if (a.T) absorbed ? ::mla_absorbed(all) : ::mla_naive(all);
    }
    c.within(out, attention_bound(a.most, Rkv * 0.3 * largest(a.kv, 1)));    // W^UV adds up Rkv of them
    c.within(lse, lse_bound(a.most, lse));
    if (absorbed) c.same(q_absorbed), c.within(z, attention_bound(a.most, largest(a.kv, 1)));
}
constexpr LatentCase LATENT_CASES[] = {
    {1, 1, 1, Dtype::F32, Dtype::F32},        {17, 3, 40, Dtype::F8_E4M3, Dtype::F32},
    {1, 16, 200, Dtype::BF16, Dtype::BF16},   {2, 4, 70, Dtype::Q8_0, Dtype::F32},
    {2, 3, 30, Dtype::F16, Dtype::F32, true}, {1, 128, 20, Dtype::F32, Dtype::BF16},
    {2, 2, 600, Dtype::F32, Dtype::F32},      {2, 3, 40, Dtype::BF16, Dtype::Q8_0},
    {0, 2, 10, Dtype::F32, Dtype::F32}};
inline void check_mla_naive(Check& c) {
    for (const LatentCase& a : LATENT_CASES) if (a.H < 100) check_latent(c, a, false);
}
inline void check_mla_absorbed(Check& c) {
    for (const LatentCase& a : LATENT_CASES) check_latent(c, a, true);
}

// -- 4  chapters 9 and 10 ---------------------------------------------------------------------

inline void check_swiglu(Check& c) {
    for (Dtype dtype : {Dtype::F32, Dtype::F8_E4M3, Dtype::Q8_0}) {
        for (int T : {0, 1, 17}) {
            const int D = 64, F = 96;
            Weight gate_w = weight(c, dtype, F, D), up_w = weight(c, dtype, F, D),
                   down_w = weight(c, dtype, D, F);
            Reals x(c.numbers(T * D)), out(Vector(size_t(T * D), NOT_A_NUMBER)), gate(Vector(size_t(T * F))),
                up(gate.host);
            for (Side at : SIDES) {
                const Mlp w{gate_w.at(at), up_w.at(at), down_w.at(at)};
                if (at == Side::HOST) ::swiglu(out(at), x(at), w, T, gate(at), up(at));
                else cuda::swiglu(out(at), x(at), w, T, gate(at), up(at));
            }
            c.same(out);
        }
    }
}

template <class Run> void check_gate(Check& c, bool groups, const Run& run) {
    for (auto [E, K, n_group, topk_group] :
         {std::array{8, 2, 2, 1}, {64, 6, 8, 3}, {256, 8, 8, 4}, {10, 1, 5, 2}}) {
        for (int T : {0, 1, 17, 129}) {
            const bool ties = T % 2 == 1 && E < 100, sigmoids = T != 17;
            const GateShape shape{E, K, groups ? n_group : 1, groups ? topk_group : 1,
                                  sigmoids ? Affinity::SIGMOID : Affinity::SOFTMAX, T > 1, T > 17, 2.5};
            Vector z = ties ? c.few_values(T * E) : c.numbers(T * E, 4);
            if (T > 1) std::fill_n(z.begin(), E, -200.0f);         // sigmoids that are 0, and so their sum
            if (T > 1 && sigmoids) z[size_t(E) + 3] = INF, z[size_t(E) + 5] = -INF;
            Reals logits(z), bias(c.numbers(E, 0.5f));
            Reals affinity(Vector(size_t(T * E))), choice(affinity.host), weights(Vector(size_t(T * K)));
            Reals score(Vector(size_t(T * shape.n_group)));
            Ints idx(std::vector<int>(size_t(T * K), -7));
            for (Side at : SIDES) {
                const Routing r{T, logits(at), affinity(at), choice(at), idx(at), weights(at), score(at)};
                run(at, r, bias(at), shape);
            }
            c.same(idx), c.same(affinity), c.same(choice), c.same(weights), c.same(score);
        }
    }
}
inline void check_gate_greedy(Check& c) {
    check_gate(c, false, [](Side at, const Routing& r, const real*, const GateShape& g) {
        at == Side::HOST ? ::gate_greedy(r, g) : cuda::gate_greedy(r, g);
    });
}
inline void check_gate_group_limited_greedy(Check& c) {
    check_gate(c, true, [](Side at, const Routing& r, const real*, const GateShape& g) {
        at == Side::HOST ? ::gate_group_limited_greedy(r, g) : cuda::gate_group_limited_greedy(r, g);
    });
}
inline void check_gate_noaux_tc(Check& c) {
    check_gate(c, true, [](Side at, const Routing& r, const real* bias, const GateShape& g) {
        at == Side::HOST ? ::gate_noaux_tc(r, bias, g) : cuda::gate_noaux_tc(r, bias, g);
    });
}

// K different experts for each of T tokens; the last of E is never picked.
inline std::vector<int> picks(Check& c, int T, int K, int E) {
    std::vector<int> idx;
    for (int t = 0; t < T; t++)
        for (int k = 0, first = c.below(E - 1); k < K; k++)
            idx.push_back((first + k * (t % 2 ? 1 : 3)) % (E - 1));
    return idx;
}
inline void check_dispatch(Check& c) {
    for (auto [K, E] : {std::pair{1, 3}, {2, 8}, {6, 64}}) {
        for (int T : TOKENS) {
            Ints idx(picks(c, T, K, E)), first(std::vector<int>(size_t(E) + 1, -7));
            Ints slot(std::vector<int>(size_t(T * K), -7)), token(slot.host);
            BOTH(dispatch, first(at), slot(at), token(at), idx(at), T, K, E);
            c.same(first), c.same(slot), c.same(token);
        }
    }
}

// Experts are parts of three tensors, or, `apart`, tensors of their own: then each has its own scales.
inline void check_experts(Check& c, Dtype dtype, int T, bool shared, bool apart) {
    const int E = 8, K = 2, D = 64, F = 96, S = 32, rows = E * SCALE_BLOCK;
    Weight gate_w = weight(c, dtype, rows, D), up_w = weight(c, dtype, rows, D),
           down_w = weight(c, dtype, rows, F);
    auto expert = [&](Weight& w, Side at, int e, int n) {
        return apart ? w.part(at, e, n) : w.at(at).view(e * n, n);
    };
    Weight sg = weight(c, dtype, S, D), su = weight(c, dtype, S, D), sd = weight(c, dtype, D, S);
    Ints idx(picks(c, T, K, E)), first(std::vector<int>(size_t(E) + 1)),
        slot(std::vector<int>(size_t(T * K))), token(slot.host);
    BOTH(dispatch, first(at), slot(at), token(at), idx(at), T, K, E);
    Reals u(c.numbers(T * D)), in(Vector(size_t(T * K * D))), out(in.host), shared_out(Vector(size_t(T * D)));
    Reals gate(Vector(size_t(T * (K * F + S)))), up(gate.host);
    for (Side at : SIDES) {
        Moe w;
        for (int e = 0; e < E; e++)
            w.experts.push_back(
                {expert(gate_w, at, e, F), expert(up_w, at, e, F), expert(down_w, at, e, D)});
        if (shared) w.shared = {sg.at(at), su.at(at), sd.at(at)};
        const ExpertWork work{u(at),          T,        K,     first(at), token(at), in(at), out(at),
                              shared_out(at), gate(at), up(at)};
        at == Side::HOST ? ::run_experts(work, w) : cuda::run_experts(work, w);
    }
    c.same(out), c.same(shared_out);
}
inline void check_run_experts(Check& c) {
    for (Dtype dtype : {Dtype::F32, Dtype::BF16, Dtype::F8_E4M3, Dtype::Q8_0})
        for (int T : {0, 1, 17, 60}) check_experts(c, dtype, T, T != 17, T == 17);
}
inline void check_combine(Check& c) {
    for (auto [T, K, D] : {std::array{0, 2, 8}, {1, 8, 130}, {17, 6, 37}, {129, 1, 64}}) {
        for (bool with_shared : {false, true}) {
            std::vector<int> order(size_t(T) * size_t(K));
            for (size_t i = 0; i < order.size(); i++) order[i] = int((i * 7) % order.size());
            Ints slot(order);
            Reals expert_out(c.odd(c.numbers(int64_t(T) * K * D), 3 * D + 1)), weights(c.numbers(T * K)),
                shared(c.numbers(T * D));
            Reals out(Vector(size_t(T * D), NOT_A_NUMBER));
            BOTH(combine, out(at), expert_out(at), slot(at), weights(at), K,
                 with_shared ? shared(at) : nullptr, T, D);
            c.same(out);
        }
    }
}

// -- 5  chapter 14 ----------------------------------------------------------------------------

// x that is halfway between two e4m3 once it is divided by its row's scale, as V3 makes it: a rounding before
// that decides.
inline void check_halfway(Check& c) {
    const int rows = 40;
    Vector x;
    for (int r = 0; r < rows; r++) {
        const float amax = 1500 + c.number(900);
        x.push_back(amax);
        for (int i = 1; i < SCALE_BLOCK; i++) x.push_back(amax / E4M3_MOST * float(17 + 2 * (i % 8)));
    }
    Reals from(x), scale(Vector(size_t(rows), -1));
    Array<uint8_t> q(std::vector<uint8_t>(x.size()));
    BOTH(quantise_fp8, q(at), scale(at), {from(at), SCALE_BLOCK}, rows, SCALE_BLOCK, {});
    c.same(q), c.same(scale);
}
inline void check_quantise_fp8(Check& c) {
    check_halfway(c);
    for (int formula = 0; formula <= int(Fp8Formula::FLASHMLA); formula++) {
        for (bool ue8m0 : {false, true}) {
            for (auto [rows, n, tile] : {std::array{0, 128, 1}, {1, 100, 1}, {17, 300, 1}, {130, 140, 128}}) {
                Vector v = c.rows(rows, n, n + 3, 3e4f);
                if (tile == 1) v = c.odd(v, 2 * n + 5);
                for (int i = 0; rows > 2 && i < n; i++) v[size_t(i)] = 0;      // a tile of zeros
                if (rows > 2) v[size_t(n + 3)] = INF;                     // and one of NaN
                Reals x(v);
                Array<uint8_t> q(std::vector<uint8_t>(size_t(rows * n)));
                Reals scale(Vector(size_t(scale_blocks(n) * ((rows + tile - 1) / tile)), -1));
                BOTH(quantise_fp8, q(at), scale(at), {x(at), n + 3}, rows, n,
                     {Fp8Formula(formula), ue8m0, tile});
                c.same(q), c.same(scale);
            }
        }
    }
}

// An e4m3 matrix with its scales.
struct Fp8Case {
    Array<uint8_t> q;
    Reals scale;
    Fp8Matrix shape;

    Fp8Matrix at(Side side) {
        Fp8Matrix m = shape;
        m.q = q(side), m.scale = scale(side);
        return m;
    }
};
inline Fp8Case fp8_case(Check& c, int groups, int rows, int n, int tile, int first = 0) {
    const int64_t scales = (first + rows + tile - 1) / tile * scale_blocks(n);
    Array<uint8_t> q(random_bytes(c, Dtype::F8_E4M3, size_t(groups) * size_t(rows) * size_t(n), 1));
    return {std::move(q), Reals(c.numbers(groups * scales, 0.01f)), {nullptr, nullptr, rows, n, tile, first}};
}

// gemm(at, out, arithmetic) for each arithmetic and kind of output, of `numbers` numbers
template <class Gemm> void check_gemm(Check& c, int64_t numbers, const Gemm& gemm) {
    for (Fp8Sum arithmetic : {Fp8Sum::EXACT, Fp8Sum::PROMOTED, Fp8Sum::HOPPER}) {
        for (Dtype dtype : {Dtype::BF16, Dtype::F32}) {
            for (bool add : {false, true}) {
                Array<uint8_t> out(random_bytes(c, dtype, size_t(numbers) * row_bytes(dtype, 1), 1));
                for (Side at : SIDES)
                    gemm(at, Fp8Output{reinterpret_cast<std::byte*>(out(at)), dtype, add}, arithmetic);
                c.same(out);
            }
        }
    }
}
inline void check_gemm_fp8(Check& c) {
    for (auto [M, N, K] : {std::array{0, 9, 128}, {1, 40, 100}, {17, 9, 300}, {3, 1, 0}, {2, 130, 256}}) {
        Fp8Case a = fp8_case(c, 1, M, K, 1), b = fp8_case(c, 1, N, K, SCALE_BLOCK, 70);
        if (M == 17) a.q.host[size_t(9 * K + 5)] = E4M3_NAN, a.q.device = Buffer(a.q.host);
        check_gemm(c, M * N, [&](Side at, const Fp8Output& out, Fp8Sum s) {
            at == Side::HOST ? ::gemm_fp8(out, a.at(at), b.at(at), s)
                             : cuda::gemm_fp8(out, a.at(at), b.at(at), s);
        });
    }
}
inline void check_gemm_fp8_contiguous(Check& c) {
    const int M = 3 * SCALE_BLOCK, N = 9, K = 140, G = 3;
    std::vector<int> groups;               // 128 rows of the last, 5 of the first, none of the second, -1
    for (int m = 0; m < M; m++) groups.push_back(m < SCALE_BLOCK ? 2 : m < SCALE_BLOCK + 5 ? 0 : -1);
    Ints group(groups);
    Fp8Case a = fp8_case(c, 1, M, K, 1), b = fp8_case(c, G, N, K, SCALE_BLOCK);
    check_gemm(c, M * N, [&](Side at, const Fp8Output& out, Fp8Sum s) {
        if (at == Side::HOST) ::gemm_fp8_contiguous(out, a.at(at), b.at(at), group.span(at), s);
        else cuda::gemm_fp8_contiguous(out, a.at(at), b.at(at), group.span(at), s);
    });
}
inline void check_gemm_fp8_masked(Check& c) {
    const int G = 4, M = 9, N = 10, K = 200;
    Ints rows({9, 0, 1, 4});
    Fp8Case a = fp8_case(c, G, M, K, 1), b = fp8_case(c, G, N, K, SCALE_BLOCK);
    check_gemm(c, G * M * N, [&](Side at, const Fp8Output& out, Fp8Sum s) {
        if (at == Side::HOST) ::gemm_fp8_masked(out, a.at(at), b.at(at), rows.span(at), s);
        else cuda::gemm_fp8_masked(out, a.at(at), b.at(at), rows.span(at), s);
    });
}
inline void check_gemm_fp8_k_grouped(Check& c) {
    const int M = 5, N = 9, all = 512;
    Ints k({128, 0, 256, 128});
    Fp8Case a = fp8_case(c, 1, M, all, 1), b = fp8_case(c, 1, N, all, 1);
    check_gemm(c, 4 * M * N, [&](Side at, const Fp8Output& out, Fp8Sum s) {
        if (at == Side::HOST) ::gemm_fp8_k_grouped(out, a.at(at), b.at(at), k.span(at), s);
        else cuda::gemm_fp8_k_grouped(out, a.at(at), b.at(at), k.span(at), s);
    });
}

// -- 6  chapter 12 -------------------------------------------------------------------------------

// A token among V by `s`, with numbers from the begin of [0, 1) to its end.
inline void check_choice(Check& c, const Vector& v, const Sampling& s) {
    Reals logits(v);
    for (double share : {0.0, 0.1, 0.37, 0.5, 0.83, 0.999999}) {
        Ints choice({-7, -7});
        BOTH(choose, reinterpret_cast<Choice*>(choice(at)), logits(at), int(v.size()), s, share);
        c.same(choice);
    }
}
inline void check_choose(Check& c) {
    constexpr Sampling KINDS[] = {
        {0, 1, 0, 0},       {1, 1, 0, 0},     {0.6, 0.95, 0, 0}, {2, 1, 0.2, 0},     // temperature, top-p,
        {1, 1, 0, 5},       {0.7, 0.5, 0, 9}, {1, 0.999, 0, 0},  {0.01, 0.9, 0, 0},  // min-p, top-k
        {1.5, 0.9, 0.3, 8}, {1, 1, 0, 1000},  {1, 1e-9, 0, 0}};
    for (int V : {1, 5, 16, 17, 300}) {
        for (const Sampling& s : KINDS) {
            check_choice(c, c.numbers(V, 6), s);
            check_choice(c, c.few_values(V), s);
        }
        Vector spread = c.numbers(V, 900), broken = c.numbers(V);
        broken[size_t(V / 2)] = NOT_A_NUMBER;
        check_choice(c, spread, KINDS[2]), check_choice(c, spread, KINDS[1]);
        check_choice(c, broken, KINDS[2]);
        broken[size_t(V / 2)] = -std::numeric_limits<float>::infinity();
        check_choice(c, broken, KINDS[0]);
    }
}

// -- 7  the latent cache in pages and in FP8 -----------------------------------------------------

struct PagedCase {
    std::vector<int> n;                    // of each conversation
    int H, width, dv;
    Dtype pool;
    bool splits;                           // a block each
};

// Pages in any order, each of one conversation; the others' rows, and those behind its last, are NaN. What
// the table holds behind a conversation's last page is no page.
inline void check_pages(Check& c, const PagedCase& a) {
    const int B = int(a.n.size()), pages = 30, table_width = 12;
    Weight pool = cache_rows(c, a.pool, pages * PAGE, a.width, 0);
    std::vector<int> table(size_t(B * table_width), 2147480000);
    const Weight numbers = weight(c, a.pool, pages * PAGE, a.width);
    const size_t bytes = row_bytes(a.pool, a.width);
    for (int b = 0, next = 0; b < B; b++) {
        for (int j = 0; j < a.n[size_t(b)]; j++) {
            int& page = table[size_t(b * table_width + j / PAGE)];
            if (j % PAGE == 0) page = next++ * 7 % pages;
            const int64_t row = int64_t(page * PAGE + j % PAGE) * int64_t(bytes);
            std::copy_n(numbers.data.host.begin() + row, bytes, pool.data.host.begin() + row);
        }
    }
    pool.data.device = Buffer(pool.data.host);
    Ints pages_of(table), n(a.n);
    Reals q(c.numbers(int64_t(B) * a.H * a.width)), out(Vector(size_t(B * a.H * a.dv), NOT_A_NUMBER));
    Reals lse(Vector(size_t(B * a.H), NOT_A_NUMBER));
    const int64_t scratch_size = std::max(int64_t(table_width) * PAGE + a.width,
                                          split_scratch(1, B * a.H, table_width * PAGE, a.dv));
    Reals scratch(Vector(size_t(scratch_size * n_threads())));
    for (Side at : SIDES) {
        const PagedAttention all{out(at), lse(at), q(at), pool.at(at), pages_of(at), table_width, n.span(at),
                                 a.H, a.dv, 0.2f};
        const Rows rows{scratch(at), at == Side::HOST || a.splits ? scratch_size : 0};
        at == Side::HOST ? ::mla_paged(all, rows) : cuda::mla_paged(all, rows);
    }
    const int most = *std::max_element(a.n.begin(), a.n.end());
    c.within(out, attention_bound(most, 1));
    // The sum has a rounding for every sixteenth position, a quotient and a product have one each.
    c.within(lse, (most / 16.0 + 4) * 0x1p-23);
}
inline void check_mla_paged(Check& c) {
    for (const PagedCase& a : {PagedCase{{1, 64, 65}, 3, 20, 12, Dtype::F32, true},
                               {{0, 256, 40}, 16, 72, 64, Dtype::BF16, true},
                               {{600, 3}, 1, 24, 16, Dtype::F32, true},
                               {{600, 3}, 1, 24, 16, Dtype::F32, false},
                               {{0}, 8, 24, 16, Dtype::F32, false},
                               {{70, 1}, 9, 576, 512, Dtype::F8_LATENT, true}})
        check_pages(c, a);
}

inline void check_store_latent(Check& c) {
    for (int T : {0, 1, 17}) {
        Weight cache = weight(c, Dtype::F8_LATENT, 40, 576);
        Reals x(c.rows(T, 576, 580, 300));
        for (size_t i = 0; T > 1 && i < 128; i++) x.host[i] = 0;           // a tile of zeros
        if (T > 1) x.host[700] = NOT_A_NUMBER, x.host[1800] = INF;
        x.device = Buffer(x.host);
        Ints n(positions(T, 31));
        BOTH(store_latent, cache.at(at), n.span(at), {x(at), 580});
        c.same(cache.data);
    }
}

// -- 8  chapter 15 ----------------------------------------------------------------------------

inline void check_dispatch_layout(Check& c) {
    for (auto [T, R, per_node, K] : {std::array{0, 4, 2, 3}, {1, 1, 1, 1}, {70, 5, 2, 4}, {33, 8, 8, 2}}) {
        c.cases++;
        std::vector<int> ends{0};
        for (int r = 0; r < R; r++) ends.push_back(ends.back() + 1 + c.below(4));
        const int nodes = (R + per_node - 1) / per_node;
        std::vector<int> picks;
        for (int i = 0; i < T * K; i++) picks.push_back(c.below(ends.back() + 1) - 1);     // -1: none
        Ints first(ends), idx(picks), per_rank(std::vector<int>(size_t(R), -7));
        Ints of_node(std::vector<int>(size_t(nodes), -7));
        Ints per_expert(std::vector<int>(size_t(ends.back()), -7));
        Array<uint8_t> in_rank(std::vector<uint8_t>(size_t(T) * size_t(R), 7));
        for (Side at : SIDES) {
            const Layout out{per_rank(at), of_node(at), per_expert(at), in_rank(at)};
            const RankShape shape{R, per_node, first(at)};
            at == Side::HOST ? ::dispatch_layout(out, idx(at), T, K, shape)
                             : cuda::dispatch_layout(out, idx(at), T, K, shape);
        }
        c.same(per_rank), c.same(of_node), c.same(per_expert), c.same(in_rank);
    }
}

// Ranks with tokens of their own, on the CPU as threads and on the device as windows.
struct PeerCase {
    int E, K, D, most;
    std::vector<int> T;                    // (R)
    Dtype there, back;
    bool by_rank;
};
inline std::vector<PeerCase> peer_cases() {
    return {{4, 2, 40, 6, {6, 3}, Dtype::F32, Dtype::F32, false},
            {7, 3, 130, 5, {5, 0, 4}, Dtype::BF16, Dtype::BF16, false},    // R does not divide E; one is idle
            {16, 4, 300, 4, {4, 1, 3, 2}, Dtype::F8_E4M3, Dtype::BF16, false},
            {8, 8, 33, 3, {3, 2, 3, 3}, Dtype::F32, Dtype::F32, true},     // every expert is picked
            {9, 4, 64, 11, {11, 9, 1, 10}, Dtype::F8_E4M3, Dtype::BF16, true}};
}

struct PeerTokens {
    std::vector<int> T;                    // (R)
    std::vector<Vector> x, weight;         // (R) of (T, D), (T, K)
    std::vector<std::vector<int>> idx;     // (R) of (T, K)
    std::vector<Buffer<float>> x_there, weight_there;
    std::vector<Buffer<int>> idx_there;

    // `one`: all tokens want the same expert, and no other
    PeerTokens(Check& c, const PeerCase& a, bool one) : T(a.T) {
        for (int n : T) {
            x.push_back(c.numbers(int64_t(n) * a.D, 3)), weight.push_back(c.numbers(int64_t(n) * a.K));
            std::vector<int>& picks = idx.emplace_back();
            for (int t = 0; t < n; t++) {
                const int start = one ? 1 : c.below(a.E);
                for (int k = 0; k < a.K; k++)
                    picks.push_back((one ? k > 0 : c.below(5) == 0) ? -1 : (start + k) % a.E);
            }
            x_there.emplace_back(x.back()), weight_there.emplace_back(weight.back());
            idx_there.emplace_back(picks);
        }
        wait();
    }
    Tokens at(size_t r) const {
        return {x_there[r].data(), idx_there[r].data(), weight_there[r].data(), T[r]};
    }
};

inline std::vector<int> shares(int E, int R) {
    std::vector<int> first;
    for (int r = 0; r <= R; r++) first.push_back(E * r / R);
    return first;
}
// An "expert" for these checks: another factor for each.
inline Vector made_of(const real* x, int e, int D) {
    Vector out(x, x + D);
    for (real& v : out) v *= real(e + 1) / 4;
    return out;
}

// The same on the CPU: chapter 15 there, a thread a rank.
struct PeersOnCpu {
    std::vector<Received> got;
    std::vector<Vector> made, out;         // (R) of (pairs, D), (T, D)

    PeersOnCpu(const PeerCase& a, const std::vector<int>& first, const PeerTokens& t)
        : got(a.T.size()), made(a.T.size()), out(a.T.size()) {
        const int R = int(a.T.size());
        const Trip trip{{R, R, first.data()}, a.K, a.D, a.there, a.back,
                        a.by_rank ? CombineOrder::RANK : CombineOrder::EXPERT};
        on_ranks(R, [&](Wire& wire) {
            const size_t r = size_t(wire.rank);
            ::dispatch(got[r], wire, trip, t.x[r].data(), t.idx[r].data(), t.weight[r].data(), a.T[r]);
            made[r].resize(got[r].row.size() * size_t(a.D)), out[r].resize(size_t(a.T[r]) * size_t(a.D));
            for (size_t i = 0; i < got[r].slot.size(); i++) {
                if (got[r].slot[i] < 0) continue;
                const real* x = got[r].x.data() + int64_t(i) / a.K * a.D;
                const Vector y = made_of(x, first[r] + got[r].idx[i], a.D);
                std::copy(y.begin(), y.end(), made[r].begin() + int64_t(got[r].slot[i]) * a.D);
            }
            ::combine(out[r].data(), t.weight[r].data(), a.T[r], wire, trip, got[r], made[r].data());
        });
    }
};

// The first numbers of what a kernel wrote, as the host has them.
template <class T> void expect(Check& c, const std::vector<T>& host, const Buffer<T>& device) {
    const std::vector<T> got = device.host();
    for (size_t i = 0; i < host.size(); i++)
        if (std::memcmp(&host[i], &got[i], sizeof(T))) c.differs(i, double(host[i]), double(got[i]), 0);
}

constexpr int EPOCHS = 5;                  // more than a window has halves

inline void check_peers(Check& c) {
    for (const PeerCase& a : peer_cases()) {
        const size_t R = a.T.size(), rows = R * size_t(a.most);
        const std::vector<int> first = shares(a.E, int(R));
        PeerGroup group(first, a.K, a.D, a.most, a.there, a.back);
        struct Rank {
            Buffer<int> n, idx, source, token;
            Buffer<float> x, weight, sums, out;
            Rank(size_t rows, size_t K, size_t D, size_t T)
                : n(1), idx(rows * K), source(rows), token(rows), x(rows * D), weight(rows * K),
                  sums(rows * D), out(std::max<size_t>(T * D, 1)) {}
            Taken taken() {
                return {n.data(), x.data(), idx.data(), weight.data(), source.data(), token.data()};
            }
        };
        std::vector<Rank> ranks;
        for (size_t r = 0; r < R; r++) ranks.emplace_back(rows, size_t(a.K), size_t(a.D), size_t(a.T[r]));
        for (int epoch = 0; epoch < EPOCHS; epoch++) {
            c.cases++;
            const PeerTokens tokens(c, a, epoch == 2);
            const PeersOnCpu cpu(a, first, tokens);
            group.next_epoch();
            for (size_t r = 0; r < R; r++) {
                const Peers& p = group.peers[r];
                group.start(int(r), notify_kernel, p, tokens.at(r));
                group.start(int(r), send_kernel, p, tokens.at(r));
                group.start(int(r), take_kernel, p, ranks[r].taken());
            }
            group.wait();
            std::vector<Buffer<float>> made;
            std::vector<Buffer<int>> slot;
            for (size_t r = 0; r < R; r++) {
                expect(c, {cpu.got[r].n}, ranks[r].n), expect(c, cpu.got[r].x, ranks[r].x);
                expect(c, cpu.got[r].idx, ranks[r].idx), expect(c, cpu.got[r].weight, ranks[r].weight);
                expect(c, cpu.got[r].source, ranks[r].source), expect(c, cpu.got[r].token, ranks[r].token);
                Vector padded = cpu.made[r];
                padded.push_back(0);                     // no expert of this rank was picked
                made.emplace_back(padded);
                std::vector<int> slots = cpu.got[r].slot;
                slots.push_back(0), slot.emplace_back(slots);
            }
            wait();
            for (size_t r = 0; r < R; r++) {
                const Peers& p = group.peers[r];
                group.start(int(r), return_kernel, p, ranks[r].taken(), made[r].data(), slot[r].data(),
                            ranks[r].sums.data(), a.by_rank);
                group.start(int(r), release_kernel, p);
                group.start(int(r), sum_kernel, p, tokens.at(r), ranks[r].out.data(), a.by_rank);
            }
            group.wait();
            for (size_t r = 0; r < R; r++) expect(c, cpu.out[r], ranks[r].out);
        }
    }
}

// Compares a rank's slabs with what the CPU received, and returns what its experts make of them.
inline Vector made_in_slabs(Check& c, const PeerCase& a, const Received& got, int first_expert,
                            const std::vector<float>& x, const std::vector<int64_t>& range,
                            const std::vector<int>& whose) {
    const size_t R = a.T.size(), rows = R * size_t(a.most), D = size_t(a.D);
    Vector made(x.size());
    for (size_t e = 0; e + 1 < got.first.size(); e++) {
        std::vector<int64_t> counts(R);
        for (int i = got.first[e]; i < got.first[e + 1]; i++) {
            const size_t row = size_t(got.row[size_t(i)]), slot = e * rows + size_t(i - got.first[e]);
            const real* expected = got.x.data() + row * D;
            counts[size_t(got.source[row])]++;
            for (size_t d = 0; d < D; d++)
                if (std::memcmp(&x[slot * D + d], expected + d, sizeof(float)))
                    c.differs(d, expected[d], x[slot * D + d], 0);
            if (whose[slot * 3] != got.source[row] || whose[slot * 3 + 1] != got.token[row])
                c.differs(slot, got.token[row], whose[slot * 3 + 1], 0);
            const Vector y = made_of(expected, first_expert + int(e), a.D);
            std::copy(y.begin(), y.end(), made.begin() + int64_t(slot * D));
        }
        for (int64_t s = 0, begin = 0; s < int64_t(R); begin += counts[size_t(s++)])
            if (range[e * R + size_t(s)] != (begin << 32 | counts[size_t(s)]))
                c.differs(e, double(begin), double(range[e * R + size_t(s)] >> 32), 0);
    }
    return made;
}

inline void check_peers_low_latency(Check& c) {
    for (const PeerCase& a : peer_cases()) {
        if (a.by_rank) continue;
        const size_t R = a.T.size(), rows = R * size_t(a.most), D = size_t(a.D);
        const std::vector<int> first = shares(a.E, int(R));
        PeerGroup group(first, a.K, a.D, a.most, a.there, a.back);
        std::vector<Buffer<float>> x, out;
        std::vector<Buffer<int64_t>> range;
        std::vector<Buffer<int>> whose;
        for (size_t r = 0; r < R; r++) {
            const size_t own = size_t(first[r + 1] - first[r]);
            x.emplace_back(own * rows * D), range.emplace_back(own * R), whose.emplace_back(own * rows * 3);
            out.emplace_back(std::max<size_t>(size_t(a.T[r]) * D, 1));
        }
        auto slabs = [&](size_t r) { return Slabs{x[r].data(), range[r].data(), whose[r].data()}; };
        for (int epoch = 0; epoch < EPOCHS; epoch++) {
            c.cases++;
            const PeerTokens tokens(c, a, epoch == 2);
            const PeersOnCpu cpu(a, first, tokens);
            group.next_epoch();
            for (size_t r = R; r-- > 0;)
                group.start(int(r), low_latency_dispatch_kernel, group.peers[r], tokens.at(r), slabs(r));
            group.wait();
            std::vector<Buffer<float>> made;
            for (size_t r = 0; r < R; r++)
                made.emplace_back(made_in_slabs(c, a, cpu.got[r], first[r], x[r].host(), range[r].host(),
                                                whose[r].host()));
            wait();
            for (size_t r = 0; r < R; r++)
                group.start(int(r), low_latency_combine_kernel, group.peers[r], tokens.at(r), slabs(r),
                            made[r].data(), out[r].data());
            group.wait();
            for (size_t r = 0; r < R; r++) expect(c, cpu.out[r], out[r]);
        }
    }
}

// Calls that no host waits between: a rank may be one epoch ahead of another.
inline void check_epochs_in_flight(Check& c) {
    for (const PeerCase& a : peer_cases()) {
        const size_t R = a.T.size(), rows = R * size_t(a.most), D = size_t(a.D);
        const std::vector<int> first = shares(a.E, int(R));
        PeerGroup group(first, a.K, a.D, a.most, a.there, a.back);
        struct Call {
            PeerTokens tokens;
            PeersOnCpu cpu;
            std::vector<Buffer<float>> x;
            std::vector<Buffer<int64_t>> range;
            std::vector<Buffer<int>> whose;
        };
        std::vector<Call> calls;
        for (int epoch = 0; epoch < EPOCHS; epoch++) {
            PeerTokens tokens(c, a, epoch == 2);
            PeersOnCpu cpu(a, first, tokens);
            Call& call = calls.emplace_back(Call{std::move(tokens), std::move(cpu), {}, {}, {}});
            for (size_t r = 0; r < R; r++) {
                const size_t own = size_t(first[r + 1] - first[r]);
                call.x.emplace_back(own * rows * D), call.range.emplace_back(own * R);
                call.whose.emplace_back(own * rows * 3);
            }
        }
        for (Call& call : calls) {
            group.next_epoch();
            for (size_t r = 0; r < R; r++)
                group.start(int(r), low_latency_dispatch_kernel, group.peers[r], call.tokens.at(r),
                            Slabs{call.x[r].data(), call.range[r].data(), call.whose[r].data()});
        }
        group.wait();
        for (Call& call : calls) {
            c.cases++;
            for (size_t r = 0; r < R; r++)
                made_in_slabs(c, a, call.cpu.got[r], first[r], call.x[r].host(), call.range[r].host(),
                              call.whose[r].host());
        }
    }
}

// A peer that never comes is named, in each form; then it is alive again, in a new group.
inline void check_late_peers(Check& c) {
    const PeerCase a{6, 2, 24, 3, {3, 2, 1}, Dtype::F32, Dtype::F32, false};
    const std::vector<int> first = shares(a.E, 3);
    for (bool low_latency : {false, true}) {
        c.cases++;
        PeerGroup group(first, a.K, a.D, a.most, a.there, a.back);
        const PeerTokens tokens(c, a, false);
        Buffer<float> x(size_t(a.E) * 9 * 24), weight(9 * 2);
        Buffer<int64_t> range(size_t(a.E) * 3);
        Buffer<int> whose(size_t(a.E) * 9 * 3), n(1), idx(9 * 2), source(9), token(9);
        group.next_epoch();
        for (int r : {0, 2}) {                           // rank 1 is dead
            Peers p = group.peers[size_t(r)];
            p.patience = 6000;                           // more than all of a late rank's start takes
            if (low_latency) {
                group.start(r, low_latency_dispatch_kernel, p, tokens.at(size_t(r)),
                            Slabs{x.data(), range.data(), whose.data()});
                continue;
            }
            group.start(r, notify_kernel, p, tokens.at(size_t(r)));
            group.start(r, send_kernel, p, tokens.at(size_t(r)));
            group.start(r, take_kernel, p,
                        Taken{n.data(), x.data(), idx.data(), weight.data(), source.data(), token.data()});
        }
        std::string said;
        try {
            group.wait();
        } catch (const UserError& e) {
            said = e.what();
        }
        if (said != "cuda: rank 0 waited too long for rank 1") c.wrong = "said: " + said;
    }
}

}
