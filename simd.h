// simd.h: the operations of chapter 5 again, as fast as this processor can. Included once, by deepseek.cpp;
// needs chapters 1 to 7.

// -- Inputs in small integers --------------------------------------------------------------------

constexpr int GROUP_VECTORS = 64;
constexpr int MANY_ROWS = 192;             // that a thread takes at once, of MANY_TOKENS and more
constexpr int MANY_TOKENS = 4;             // for which a kernel unpacks a block of rows once

// T vectors of n numbers in small integers. Block b of vector t has x_i ~ d q_i. Blocks of a vector lie one
// after the other; those of up to GROUP_VECTORS vectors, which the same weights meet, side by side.
struct IntRows {
    int n = 0, block = 0;
    int together = 1;                          // vectors of a group
    int64_t next_vector = 0;                   // in blocks
    int8_t* q = nullptr;                       // (block) each
    int16_t* sums = nullptr;                   // (block / GROUP) each: of 16 q
    float* d = nullptr;                        // 1 each

    IntRows() = default;
    IntRows(int n, int block, int T) : n(n), block(block) {
        if (T >= MANY_TOKENS) together = std::min(GROUP_VECTORS, (T + 15) / 16 * 16);
        next_vector = together > 1 ? 1 : n / block;
    }
    // Blocks of T vectors, and of those that no one asked for in the last group: appendix N reads 16 at once.
    int64_t blocks(int T) const { return int64_t(T + together - 1) / together * together * (n / block); }

    [[gnu::always_inline]] IntRows skip(int64_t blocks) const {
        IntRows r = *this;
        r.q += blocks * block, r.sums += blocks * (block / GROUP), r.d += blocks;
        return r;
    }
    // Block b of vector t of this group. Kernels ask for each block, which a call would slow.
    [[gnu::always_inline]] IntRows at(int t, int b = 0) const {
        return skip(t * next_vector + int64_t(b) * together);
    }
    // Vector t, whatever group it is in.
    IntRows vector(int t) const {
        return skip(int64_t(t / together) * together * (n / block)).at(t % together);
    }
};

constexpr int ARRANGE_FROM = 32, ARRANGED_TOKENS = 8;

// Numbers of 8 arranged vectors of n: (LANES, n / LANES, 8), the lanes a little apart.
inline size_t arranged_lane(int n) { return size_t(n + LANES - 1) / LANES * ARRANGED_TOKENS + 16; }
inline size_t arranged_size(int n) { return LANES * arranged_lane(n); }



// The kernels of an instruction set. Rows begin .. end of W, T vectors.
struct SimdTarget {
    const char* name;
    void (*rows)(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end);
    void (*weigh)(Rows out, ConstRows p, const Matrix& v, int T, int n);
    void (*widen)(real* out, const Matrix& w, int r);
    real (*dot_real)(const real* a, const real* b, int n);
    void (*softmax)(real* z, real scale, int n);
    void (*silu_times)(real* gate, const real* up, int n);
    void (*quantise)(const IntRows& out, const real* x);
    void (*int_rows)(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end);
    // `rows` for ARRANGE_FROM tokens and more, whose x was arranged before, 8 vectors at a time; or none.
    void (*arrange)(real* out, ConstRows x, int T, int n);
    void (*arranged_rows)(Rows out, const real* x, const Matrix& w, int T, int begin, int end);
    // `int_rows` for interleaved W, or none.
    void (*interleaved_rows)(Rows, const IntRows& x, const Matrix& w, int T, int begin, int end);
};

// =================================================================================================
// Appendix A. Fast CPU
// =================================================================================================
//
// Can the inner loops of chapter 5 be fast and stay the same? Their sixteen lanes are two AVX2 registers,
// and their integer sums are exact. Each kernel below does the additions of its plain twin in the same
// order, so the choice, made once at start, cannot be seen in any result.
//
// One token needs each weight once: the time is that of reading them from memory, packed as they are. Many
// tokens need each many times: a block of rows is unpacked once, and the sums of 3 rows x 4 tokens (16 x 4 in
// integers) stay in registers. DEEPSEEK_SIMD=plain, avx2, avx512, amx, neon or dotprod overrides the choice.

// Loops over registers: an array whose loops are all unrolled has no address and needs no memory.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma,f16c"), always_inline)) inline
#define AVX2_ENTRY __attribute__((target("avx2,fma,f16c"))) inline

namespace avx2 {

// -- A.1  eight weights at a time ----------------------------------------------------------------

AVX2 __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
AVX2 __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
AVX2 void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

AVX2 __m256 widen8(F32Row w, int i) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(w.p + 4 * size_t(i)));
}
AVX2 __m256 widen8(F16Row w, int i) { return _mm256_cvtph_ps(load128(w.p + 2 * size_t(i))); }
AVX2 __m256 widen8(Bf16Row w, int i) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(w.p + 2 * size_t(i))), 16));
}
// Exponent and fraction of an e4m3 are moved to their places in an f32 and the bias (7 against 127) is
// made up by a multiplication with 2^120, which also does the subnormals. 127 is NaN.
AVX2 __m256 widen8(E4m3Row w, int i) {
    __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.p + i)));
    __m256i magnitude = _mm256_and_si256(b, _mm256_set1_epi32(127));
    __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(b, 7), 31);
    __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127));
    __m256 shifted = _mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20));
    __m256 value = _mm256_mul_ps(shifted, _mm256_set1_ps(0x1p120f));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_or_si256(_mm256_castps_si256(value), sign), nan));
}

template <class Row> constexpr size_t STORED = 2;      // bytes of a weight
template <> constexpr size_t STORED<F32Row> = 4;
template <> constexpr size_t STORED<E4m3Row> = 1;

// The processor's own guesses at what will be read stop at each page.
constexpr int AHEAD = 4096;
AVX2 void fetch(const std::byte* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T0);
}

template <class Row> AVX2_ENTRY void widen_row(float* out, Row w, int n) {
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        fetch(w.p + size_t(i) * STORED<Row> + AHEAD, 32 * STORED<Row>);
        UNROLL for (int k = 0; k < 32; k += 8) _mm256_storeu_ps(out + i + k, widen8(w, i + k));
    }
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, widen8(w, i));
    for (; i < n; i++) out[i] = w(i);
}

// Columns begin .. begin + n of row r, e4m3 without its scales. `begin` is a multiple of 256.
inline void widen_part(float* out, const Matrix& w, int r, int begin, int n) {
    const std::byte* p = w.row(r) + row_bytes(w.dtype, begin);
    switch (w.dtype) {
    case Dtype::F64: return widen_into(out, F64Row{p}, n);
    case Dtype::F32: return widen_row(out, F32Row{p}, n);
    case Dtype::BF16: return widen_row(out, Bf16Row{p}, n);
    case Dtype::F16: return widen_row(out, F16Row{p}, n);
    case Dtype::F8_E4M3: return widen_row(out, E4m3Row{p}, n);
    default: dequantise_row(out, {p, nullptr, w.dtype, 1, n, 0, 0}, 0);
    }
}

inline void widen(float* out, const Matrix& w, int r) {
    widen_part(out, w, r, 0, w.cols);
    const std::byte* scale = w.scale_row(r);
    for (int i = 0; scale && i < w.cols; i++) out[i] *= load<float>(scale + 4 * size_t(i / SCALE_BLOCK));
}

// -- A.2  one row, a few tokens ------------------------------------------------------------------

struct Lanes16 {
    __m256 low, high;
};

AVX2 Lanes16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

// The tree of sum_lanes.
AVX2 float sum(Lanes16 v) {
    __m256 eight = _mm256_add_ps(v.low, v.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <class Row> AVX2 void add_tail(Lanes16& v, Row w, const float* x, int begin, int end) {
    float lane[LANES];
    _mm256_storeu_ps(lane, v.low), _mm256_storeu_ps(lane + 8, v.high);
    for (int i = begin; i < end; i++) lane[i - begin] = std::fma(w(i), x[i], lane[i - begin]);
    v = {_mm256_loadu_ps(lane), _mm256_loadu_ps(lane + 8)};
}

// add_products for T vectors; `begin` is a multiple of 16.
template <class Row, int T> AVX2 void add_products(Lanes16 (&v)[T], Row w, ConstRows x, int begin, int end) {
    int whole = end - (end - begin) % LANES;
    for (int i = begin; i < whole; i += LANES) {
        __m256 low = widen8(w, i), high = widen8(w, i + 8);
        UNROLL for (int t = 0; t < T; t++) {
            v[t].low = _mm256_fmadd_ps(low, _mm256_loadu_ps(x[t] + i), v[t].low);
            v[t].high = _mm256_fmadd_ps(high, _mm256_loadu_ps(x[t] + i + 8), v[t].high);
        }
    }
    if (whole == end) return;
    UNROLL for (int t = 0; t < T; t++) add_tail(v[t], w, x[t], whole, end);
}

template <class Row, int T>
AVX2_ENTRY void dots_of_row(float* out, int64_t stride, Row w, const std::byte* scale, ConstRows x, int n) {
    Lanes16 v[T];
    UNROLL for (int t = 0; t < T; t++) v[t] = zero();
    if constexpr (std::is_same_v<Row, E4m3Row>) {
        for (int begin = 0; begin < n; begin += SCALE_BLOCK, scale += 4) {
            Lanes16 block[T];
            UNROLL for (int t = 0; t < T; t++) block[t] = zero();
            add_products<Row, T>(block, w, x, begin, std::min(n, begin + SCALE_BLOCK));
            __m256 s = _mm256_set1_ps(load<float>(scale));
            UNROLL for (int t = 0; t < T; t++) {
                v[t].low = _mm256_fmadd_ps(s, block[t].low, v[t].low);
                v[t].high = _mm256_fmadd_ps(s, block[t].high, v[t].high);
            }
        }
    } else {
        add_products<Row, T>(v, w, x, 0, n);
    }
    UNROLL for (int t = 0; t < T; t++) out[t * stride] = sum(v[t]);
}

template <class Row> void few_tokens(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    static_assert(MANY_TOKENS == 4);
    for (int r = begin; r < end; r++) {
        Row row{w.row(r)};
        const std::byte* scale = w.scale_row(r);
        if (T == 1) dots_of_row<Row, 1>(out[0] + r, out.stride, row, scale, x, w.cols);
        if (T == 2) dots_of_row<Row, 2>(out[0] + r, out.stride, row, scale, x, w.cols);
        if (T == 3) dots_of_row<Row, 3>(out[0] + r, out.stride, row, scale, x, w.cols);
    }
}

AVX2_ENTRY float dot_real(const float* a, const float* b, int n) {
    float out;
    dots_of_row<F32Row, 1>(&out, 1, {reinterpret_cast<const std::byte*>(a)}, nullptr, {b, 0}, n);
    return out;
}

// -- A.3  a block of rows, many tokens -----------------------------------------------------------

constexpr int TILE_ROWS = 3, TILE_TOKENS = 4;                       // 12 sums of 8 lanes in 16 registers
constexpr int BLOCK_ROWS = 12, BLOCK_TOKENS = 128, BLOCK_COLS = 256;

struct FloatBlock {
    alignas(64) float w[BLOCK_ROWS][BLOCK_COLS + LANES];   // widened weights; rows in different cache sets
    alignas(64) float lanes[BLOCK_TOKENS / TILE_TOKENS][BLOCK_ROWS][TILE_TOKENS][LANES];   // sums so far

    // A tile's lanes lie together.
    float* lane(int r, int t) { return lanes[t / TILE_TOKENS][r][t % TILE_TOKENS]; }
};

// lane[r][t] += products of w[r] and x[t] over n columns, n a multiple of 16; first the lower 8 lanes,
// then the upper.
template <int R, int T, bool SCALED>
AVX2_ENTRY void tile(FloatBlock& b, int row, int token, int col, ConstRows x, int n, const float* scale) {
    for (int half = 0; half < LANES; half += 8) {
        __m256 v[R][T];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++)
                v[r][t] = SCALED ? _mm256_setzero_ps() : _mm256_load_ps(b.lane(row + r, token + t) + half);
        for (int i = half; i < n; i += LANES) {
            __m256 w[R];
            UNROLL for (int r = 0; r < R; r++) w[r] = _mm256_load_ps(b.w[row + r] + col + i);
            UNROLL for (int t = 0; t < T; t++) {
                __m256 xt = _mm256_loadu_ps(x[t] + i);
                UNROLL for (int r = 0; r < R; r++) v[r][t] = _mm256_fmadd_ps(w[r], xt, v[r][t]);
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) {
                float* lane = b.lane(row + r, token + t) + half;
                if (SCALED)
                    v[r][t] = _mm256_fmadd_ps(_mm256_set1_ps(scale[r]), v[r][t], _mm256_load_ps(lane));
                _mm256_store_ps(lane, v[r][t]);
            }
    }
}

// The tile of R <= rows rows and T <= TILE_TOKENS tokens; appendix K has larger ones.
using Tile = void (*)(FloatBlock&, int row, int token, int col, ConstRows x, int n, const float* scale);
struct Tiles {
    int rows;
    Tile (*of)(bool scaled, int R, int T);
};

template <size_t... I> Tile tile_of(bool scaled, int R, int T, std::index_sequence<I...>) {
    static constexpr Tile PLAIN[] = {tile<I / TILE_TOKENS + 1, I % TILE_TOKENS + 1, false>...};
    static constexpr Tile SCALED[] = {tile<I / TILE_TOKENS + 1, I % TILE_TOKENS + 1, true>...};
    return (scaled ? SCALED : PLAIN)[(R - 1) * TILE_TOKENS + T - 1];
}
inline Tile tile_of(bool scaled, int R, int T) {
    return tile_of(scaled, R, T, std::make_index_sequence<TILE_ROWS * TILE_TOKENS>());
}
constexpr Tiles TILES = {TILE_ROWS, tile_of};

// The columns that do not fill 16 lanes, and the e4m3 block that has them.
inline void tile_tail(FloatBlock& b, int R, int T, int col, ConstRows x, int n, const float* scale) {
    for (int r = 0; r < R; r++) {
        for (int t = 0; t < T; t++) {
            float sum[LANES] = {}, *lane = b.lane(r, t), *v = scale ? sum : lane;
            for (int i = 0; i < n; i++) v[i % LANES] = std::fma(b.w[r][col + i], x[t][i], v[i % LANES]);
            for (int j = 0; scale && j < LANES; j++) lane[j] = std::fma(scale[r], sum[j], lane[j]);
        }
    }
}

// Adds the columns col .. col + n of the block; x begins at the first of them. scale: (R), or none
inline void add_columns(const Tiles& tiles, FloatBlock& b, int R, ConstRows x, int T, int col, int n,
                        const float* scale) {
    int whole = scale && n % LANES ? 0 : n / LANES * LANES;
    for (int t = 0; whole > 0 && t < T; t += TILE_TOKENS) {
        for (int r = 0; r < R; r += tiles.rows) {
            Tile f = tiles.of(scale, std::min(tiles.rows, R - r), std::min(TILE_TOKENS, T - t));
            f(b, r, t, col, {x[t], x.stride}, whole, scale ? scale + r : nullptr);
        }
    }
    if (whole < n) tile_tail(b, R, T, col + whole, {x[0] + whole, x.stride}, n - whole, scale);
}

AVX2_ENTRY void sum_lanes_of_rows(float* out, FloatBlock& b, int t, int R) {
    for (int r = 0; r < R; r++)
        out[r] = sum({_mm256_load_ps(b.lane(r, t)), _mm256_load_ps(b.lane(r, t) + 8)});
}

// The block's R rows from `row` on, for T tokens.
inline void float_block(const Tiles& tiles, FloatBlock& b, Rows out, ConstRows x, const Matrix& w, int row,
                        int R, int T) {
    std::fill_n(b.lanes[0][0][0], (T + TILE_TOKENS - 1) / TILE_TOKENS * BLOCK_ROWS * TILE_TOKENS * LANES,
                0.0f);
    for (int begin = 0; begin < w.cols; begin += BLOCK_COLS) {
        int n = std::min(BLOCK_COLS, w.cols - begin);
        for (int r = 0; r < R; r++) widen_part(b.w[r], w, row + r, begin, n);
        ConstRows part{x[0] + begin, x.stride};
        float scale[BLOCK_ROWS];
        if (w.dtype != Dtype::F8_E4M3) add_columns(tiles, b, R, part, T, 0, n, nullptr);
        for (int col = 0; w.dtype == Dtype::F8_E4M3 && col < n; col += SCALE_BLOCK) {
            size_t block = size_t((begin + col) / SCALE_BLOCK);
            for (int r = 0; r < R; r++) scale[r] = load<float>(w.scale_row(row + r) + 4 * block);
            add_columns(tiles, b, R, {part[0] + col, x.stride}, T, col, std::min(SCALE_BLOCK, n - col),
                        scale);
        }
    }
    for (int t = 0; t < T; t++) sum_lanes_of_rows(out[t] + row, b, t, R);
}

inline void many_tokens(const Tiles& tiles, Rows out, ConstRows x, const Matrix& w, int T, int begin,
                        int end) {
    thread_local FloatBlock block;
    for (int t = 0; t < T; t += BLOCK_TOKENS) {
        for (int r = begin; r < end; r += BLOCK_ROWS)
            float_block(tiles, block, {out[t], out.stride}, {x[t], x.stride}, w, r,
                        std::min(BLOCK_ROWS, end - r), std::min(BLOCK_TOKENS, T - t));
    }
}

inline void rows(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    if (T < MANY_TOKENS) {
        switch (w.dtype) {
        case Dtype::F32: return few_tokens<F32Row>(out, x, w, T, begin, end);
        case Dtype::BF16: return few_tokens<Bf16Row>(out, x, w, T, begin, end);
        case Dtype::F16: return few_tokens<F16Row>(out, x, w, T, begin, end);
        case Dtype::F8_E4M3: return few_tokens<E4m3Row>(out, x, w, T, begin, end);
        default: break;
        }
    }
    many_tokens(TILES, out, x, w, T, begin, end);
}

// -- A.4  weighted sums of rows ------------------------------------------------------------------

constexpr int WEIGH_TOKENS = 6, WEIGH_ROWS = 64;   // sums in registers; rows that stay in cache

// out[t] (8 N columns from col on) += sum_j p[t][j] v[j]
template <class Row, int T, int N>
AVX2_ENTRY void weigh_tile(Rows out, ConstRows p, const Matrix& v, int col, int begin, int end) {
    __m256 y[T][N];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int k = 0; k < N; k++) y[t][k] = _mm256_loadu_ps(out[t] + col + 8 * k);
    const int64_t stride = v.row(1) - v.row(0);
    const std::byte* at = v.row(begin) + STORED<Row> * size_t(col);
    for (int j = begin; j < end; j++, at += stride) {
        fetch(at + WEIGH_ROWS * stride, 8 * N * STORED<Row>);
        __m256 w[N];
        UNROLL for (int k = 0; k < N; k++) w[k] = widen8(Row{at}, 8 * k);
        UNROLL for (int t = 0; t < T; t++) {
            __m256 factor = _mm256_broadcast_ss(p[t] + j);
            UNROLL for (int k = 0; k < N; k++) y[t][k] = _mm256_fmadd_ps(factor, w[k], y[t][k]);
        }
    }
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int k = 0; k < N; k++) _mm256_storeu_ps(out[t] + col + 8 * k, y[t][k]);
}

// T <= WEIGH_TOKENS tokens, rows begin .. end. Appendix K has another one.
struct Weigh8 {
    template <class Row, int T>
    static void tokens(Rows out, ConstRows p, const Matrix& v, int begin, int end) {
        int col = 0;
        for (; col + 16 <= v.cols; col += 16) weigh_tile<Row, T, 2>(out, p, v, col, begin, end);
        for (; col + 8 <= v.cols; col += 8) weigh_tile<Row, T, 1>(out, p, v, col, begin, end);
        for (; col < v.cols; col++)
            for (int t = 0; t < T; t++)
                for (int j = begin; j < end; j++)
                    out[t][col] = std::fma(p[t][j], Row{v.row(j)}(col), out[t][col]);
    }
};

template <class Weigh, class Row> void weigh_rows(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    using F = void (*)(Rows, ConstRows, const Matrix&, int, int);
    static constexpr F TOKENS[WEIGH_TOKENS] = {
        Weigh::template tokens<Row, 1>, Weigh::template tokens<Row, 2>, Weigh::template tokens<Row, 3>,
        Weigh::template tokens<Row, 4>, Weigh::template tokens<Row, 5>, Weigh::template tokens<Row, 6>};
    for (int j = 0; j < n; j += WEIGH_ROWS)
        for (int t = 0; t < T; t += WEIGH_TOKENS)
            TOKENS[std::min(WEIGH_TOKENS, T - t) - 1]({out[t], out.stride}, {p[t], p.stride}, v, j,
                                                      std::min(n, j + WEIGH_ROWS));
}

template <class Weigh> void weigh(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    if (v.dtype == Dtype::F32) return weigh_rows<Weigh, F32Row>(out, p, v, T, n);
    if (v.dtype == Dtype::BF16) return weigh_rows<Weigh, Bf16Row>(out, p, v, T, n);
    thread_local std::vector<float> rows;
    rows.resize(size_t(WEIGH_ROWS) * size_t(v.cols));
    Matrix part = real_matrix(rows.data(), WEIGH_ROWS, v.cols);
    for (int begin = 0; begin < n; begin += WEIGH_ROWS) {
        int count = std::min(WEIGH_ROWS, n - begin);
        for (int j = 0; j < count; j++) widen(rows.data() + size_t(j) * size_t(v.cols), v, begin + j);
        weigh_rows<Weigh, F32Row>(out, {p[0] + begin, p.stride}, part, T, count);
    }
}

// -- A.5  exp ------------------------------------------------------------------------------------

AVX2 __m128 exp4(__m128 x) {
    __m256d wide = _mm256_cvtps_pd(x), magic = _mm256_set1_pd(TO_INTEGER_F64);
    __m256d shifted = _mm256_fmadd_pd(wide, _mm256_set1_pd(LOG2_E), magic), k = _mm256_sub_pd(shifted, magic);
    __m256d r = _mm256_fmadd_pd(k, _mm256_set1_pd(-LN_2), wide), p = _mm256_set1_pd(EXP_SERIES[0]);
    for (size_t i = 1; i < std::size(EXP_SERIES); i++)
        p = _mm256_fmadd_pd(p, r, _mm256_set1_pd(EXP_SERIES[i]));
    __m256i exponent =
        _mm256_add_epi64(_mm256_castpd_si256(shifted), _mm256_set1_epi64x(1023));   // k in the low bits
    return _mm256_cvtpd_ps(_mm256_mul_pd(p, _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52))));
}

// exp_of of eight numbers.
AVX2 __m256 exp8(__m256 x) {
    __m256 clamped = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-104.0f)), _mm256_set1_ps(88.8f));
    __m256 y =
        _mm256_set_m128(exp4(_mm256_extractf128_ps(clamped, 1)), exp4(_mm256_castps256_ps128(clamped)));
    __m256 inf = _mm256_set1_ps(std::numeric_limits<float>::infinity());
    y = _mm256_blendv_ps(y, inf, _mm256_cmp_ps(x, _mm256_set1_ps(88.8f), _CMP_GT_OQ));
    y = _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-104.0f), _CMP_LE_OQ), y);
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

AVX2_ENTRY void softmax(float* z, float scale, int n) {
    constexpr float INF = std::numeric_limits<float>::infinity();
    int whole = n / LANES * LANES;
    float rest[LANES];                     // the last numbers, and -inf, of which e^x is 0
    std::fill_n(std::copy_n(z + whole, n - whole, rest), LANES - (n - whole), -INF);
    auto half = [&](int i) { return i < whole ? z + i : rest + (i - whole); };
    __m256 top = _mm256_set1_ps(-INF);
    for (int i = 0; i < whole + LANES; i += 8) {
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(half(i)), _mm256_set1_ps(scale));
        _mm256_storeu_ps(half(i), x);
        top = _mm256_max_ps(x, top);       // the second, if one of them is NaN
    }
    float most[8];
    _mm256_storeu_ps(most, top);
    top = _mm256_set1_ps(*std::max_element(most, most + 8));
    Lanes16 lanes = zero();
    for (int i = 0; i < whole + LANES; i += LANES) {
        __m256 low = exp8(_mm256_sub_ps(_mm256_loadu_ps(half(i)), top)),
               high = exp8(_mm256_sub_ps(_mm256_loadu_ps(half(i) + 8), top));
        _mm256_storeu_ps(half(i), low), _mm256_storeu_ps(half(i) + 8, high);
        lanes = {_mm256_add_ps(lanes.low, low), _mm256_add_ps(lanes.high, high)};
    }
    __m256 all = _mm256_set1_ps(sum(lanes));
    for (int i = 0; i < whole + LANES; i += 8)
        _mm256_storeu_ps(half(i), _mm256_div_ps(_mm256_loadu_ps(half(i)), all));
    std::copy_n(rest, n - whole, z + whole);
}

AVX2_ENTRY void silu_times(float* gate, const float* up, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 z = _mm256_loadu_ps(gate + i), e = exp8(_mm256_xor_ps(z, _mm256_set1_ps(-0.0f)));
        __m256 y = _mm256_div_ps(z, _mm256_add_ps(_mm256_set1_ps(1), e));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(y, _mm256_loadu_ps(up + i)));
    }
    silu_times_plain(gate + i, up + i, n - i);
}

}  // namespace avx2
#endif

// =================================================================================================
// Appendix E. Fast integers
// =================================================================================================
//
// How are the small integers of 5.2 multiplied fast? AVX2 multiplies 32 pairs of bytes, one of them
// unsigned, and adds neighbours in one instruction. So every format is unpacked to one form, unsigned
// bytes that are too large by a known offset, and two kernels serve them all: one for few tokens, which
// unpacks as it multiplies, and one for many, which unpacks a block of 32 rows once. Integer sums are
// exact, so neither can differ from chapter 5.

// body.operator()<D>() for the D that is `dtype`.
template <class Body> void for_quantised(Dtype dtype, const Body& body) {
    switch (dtype) {
    case Dtype::Q4_0: return body.template operator()<Dtype::Q4_0>();
    case Dtype::Q4_1: return body.template operator()<Dtype::Q4_1>();
    case Dtype::Q5_0: return body.template operator()<Dtype::Q5_0>();
    case Dtype::Q5_1: return body.template operator()<Dtype::Q5_1>();
    case Dtype::Q8_0: return body.template operator()<Dtype::Q8_0>();
    case Dtype::Q2_K: return body.template operator()<Dtype::Q2_K>();
    case Dtype::Q3_K: return body.template operator()<Dtype::Q3_K>();
    case Dtype::Q4_K: return body.template operator()<Dtype::Q4_K>();
    case Dtype::Q5_K: return body.template operator()<Dtype::Q5_K>();
    case Dtype::Q6_K: return body.template operator()<Dtype::Q6_K>();
    default: CHECK(false, "dtype %d is not quantised", int(dtype));
    }
}

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
namespace avx2 {

// -- E.1  unpacking bytes ------------------------------------------------------------------------
//
// bytes<D>(p, sink) hands a block's values to sink(i, w): w holds the 32 values from 32 i on, plus
// offset_of(D), which makes them unsigned bytes. Chapter 2.3 says what the bits mean.

constexpr int offset_of(Dtype d) {
    return d == Dtype::Q8_0 ? 128 : d == Dtype::Q4_0 ? 8 : d == Dtype::Q5_0 ? 16
         : d == Dtype::Q6_K ? 32 : d == Dtype::Q3_K ? 4 : 0;
}
constexpr bool of_32(Dtype d) { return d < Dtype::Q2_K; }

AVX2 __m256i all8(int v) { return _mm256_set1_epi8(char(v)); }
AVX2 __m256i all16(int v) { return _mm256_set1_epi16(int16_t(v)); }
AVX2 __m256i low_nibble(__m256i b) { return _mm256_and_si256(b, all8(15)); }
AVX2 __m256i high_nibble(__m256i b) { return low_nibble(_mm256_srli_epi16(b, 4)); }
// `value` where the byte has bit k.
AVX2 __m256i where_bit(__m256i b, int k, int value) {
    __m256i bit = all8(1 << k);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(b, bit), bit), all8(value));
}
// `value` where the mask has bit i, for 32 i.
AVX2 __m256i where_bit_of(uint32_t mask, int value) {
    __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    __m256i b = _mm256_shuffle_epi8(_mm256_set1_epi32(int(mask)), places);
    __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(b, bit), bit), all8(value));
}

template <Dtype D, class Sink> AVX2 void bytes_of_32(const std::byte* p, Sink& sink) {
    if constexpr (D == Dtype::Q8_0) {
        sink(0, _mm256_xor_si256(load256(p + 2), all8(128)));
    } else {
        constexpr bool FIVE = D == Dtype::Q5_0 || D == Dtype::Q5_1;
        p += D == Dtype::Q4_1 || D == Dtype::Q5_1 ? 4 : 2;
        __m128i b = load128(p + (FIVE ? 4 : 0));
        __m256i q = low_nibble(_mm256_set_m128i(_mm_srli_epi16(b, 4), b));
        sink(0, FIVE ? _mm256_or_si256(q, where_bit_of(load<uint32_t>(p), 16)) : q);
    }
}

template <Dtype D, class Sink> AVX2 void bytes_q4_q5_k(const std::byte* p, Sink& sink) {
    constexpr bool FIVE = D == Dtype::Q5_K;
    __m256i bits = FIVE ? load256(p + 16) : _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
        __m256i b = load256(p + (FIVE ? 48 : 16) + 32 * j), q[2] = {low_nibble(b), high_nibble(b)};
        for (int k = 0; k < 2; k++)
            sink(2 * j + k, FIVE ? _mm256_or_si256(q[k], where_bit(bits, 2 * j + k, 16)) : q[k]);
    }
}

template <class Sink> AVX2 void bytes_q6_k(const std::byte* p, Sink& sink) {
    for (int n = 0; n < 2; n++) {
        __m256i a = load256(p + 64 * n), b = load256(p + 64 * n + 32), high = load256(p + 128 + 32 * n);
        __m256i low[4] = {low_nibble(a), low_nibble(b), high_nibble(a), high_nibble(b)};
        __m256i two[4] = {_mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high,
                          _mm256_srli_epi16(high, 2)};
        for (int k = 0; k < 4; k++)
            sink(4 * n + k, _mm256_or_si256(low[k], _mm256_and_si256(two[k], all8(48))));
    }
}

template <Dtype D, class Sink> AVX2 void bytes_q2_q3_k(const std::byte* p, Sink& sink) {
    constexpr bool THREE = D == Dtype::Q3_K;
    __m256i high = THREE ? load256(p) : _mm256_setzero_si256();
    for (int n = 0; n < 2; n++) {
        __m256i b = load256(p + (THREE ? 32 : 16) + 32 * n);
        __m256i crumbs[4] = {b, _mm256_srli_epi16(b, 2), _mm256_srli_epi16(b, 4), _mm256_srli_epi16(b, 6)};
        for (int k = 0; k < 4; k++) {
            __m256i q = _mm256_and_si256(crumbs[k], all8(3));
            sink(4 * n + k, THREE ? _mm256_or_si256(q, where_bit(high, 4 * n + k, 4)) : q);
        }
    }
}

template <Dtype D, class Sink> AVX2 void bytes(const std::byte* p, Sink& sink) {
    if constexpr (of_32(D)) bytes_of_32<D>(p, sink);
    else if constexpr (D == Dtype::Q4_K || D == Dtype::Q5_K) bytes_q4_q5_k<D>(p, sink);
    else if constexpr (D == Dtype::Q6_K) bytes_q6_k(p, sink);
    else bytes_q2_q3_k<D>(p, sink);
}

// Of 16 groups: the scale, and the minimum or, where the format has none, what offset_of adds to a value.
struct Scales {
    alignas(32) int16_t scale[16], minimum[16];
};

AVX2 void six_bit_scales(Scales& s, const std::byte* p) {
    uint32_t a = load<uint32_t>(p), b = load<uint32_t>(p + 4), c = load<uint32_t>(p + 8);
    uint32_t scale_high = (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030),
             min_high = (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030);
    __m128i all = _mm_setr_epi32(int(a & 0x3F3F3F3F), int(scale_high), int(b & 0x3F3F3F3F), int(min_high));
    store256(s.scale, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(all, all)));
    store256(s.minimum, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(all, all)));
}

template <Dtype D> AVX2 void scales(Scales& s, const std::byte* p) {
    if constexpr (D == Dtype::Q4_K || D == Dtype::Q5_K) return six_bit_scales(s, p + 4);
    if constexpr (D == Dtype::Q6_K) {
        store256(s.scale, _mm256_cvtepi8_epi16(load128(p + 192)));
    } else {
        Block block;   // few files have these: the plain way
        if (D == Dtype::Q2_K) unpack_q2_k_scales(block, reinterpret_cast<Bytes>(p));
        else unpack_q3_k_scales(block, reinterpret_cast<Bytes>(p));
        std::copy_n(block.scale, 16, s.scale), std::copy_n(block.minimum, 16, s.minimum);
    }
    if (offset_of(D)) store256(s.minimum, _mm256_mullo_epi16(load256(s.scale), all16(offset_of(D))));
}

// Where the f16 numbers d and m of a block stand.
constexpr int place_of_d(Dtype d) {
    return d == Dtype::Q6_K ? 208 : d == Dtype::Q3_K ? 108 : d == Dtype::Q2_K ? 80 : 0;
}
constexpr bool has_minimums(Dtype d) {
    return d == Dtype::Q4_1 || d == Dtype::Q5_1 || d == Dtype::Q2_K || d == Dtype::Q4_K || d == Dtype::Q5_K;
}

// -- E.2  integers: one row, a few tokens --------------------------------------------------------

// The sums of the eight lanes of eight vectors.
AVX2 __m256i sum8(const __m256i* v) {
    __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// The tree of chapter 5's sum_block_lanes.
AVX2 float sum_block_lanes(__m256 lane) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lane), _mm256_extractf128_ps(lane, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// 32 bytes of weights times x, in 16 sums of two. Signed weights: those of Q8_0, whose offset would be too
// much for 16 bits; the instruction wants one side unsigned, so they give their sign to x.
template <Dtype D> AVX2 __m256i pairs(__m256i w, __m256i x) {
    if (D != Dtype::Q8_0) return _mm256_maddubs_epi16(w, x);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
AVX2 __m256i signed_again(__m256i w) { return _mm256_xor_si256(w, all8(128)); }

// Adds a block's weights, times their scales, times T vectors.
template <Dtype D, int T> struct DotSink {
    __m256i sum[T];
    const Scales& s;
    const int8_t* x;
    int64_t stride;

    AVX2 void operator()(int i, __m256i w) {
        const __m256i halves = _mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100, 0x0302030203020302,
                                                  0x0302030203020302);
        __m256i scale = all16(1);
        if (D == Dtype::Q8_0) w = signed_again(w);
        if (!of_32(D)) scale = _mm256_set1_epi32(load<int32_t>(s.scale + 2 * i));
        if (!of_32(D) && D != Dtype::Q4_K && D != Dtype::Q5_K) scale = _mm256_shuffle_epi8(scale, halves);
        for (int t = 0; t < T; t++) {
            __m256i two = pairs<D>(w, load256(x + t * stride + 32 * i));
            sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(two, scale));
        }
    }
};

// Up to eight blocks of a row: their integer sums with T vectors, and their scales.
template <Dtype D, int T> struct BlockSums {
    __m256i sum[T][BLOCK_LANES], minimum[T][BLOCK_LANES];
    alignas(16) uint16_t d[BLOCK_LANES], m[BLOCK_LANES];

    // The block at p is number k of the eight; x begins at it.
    AVX2 void add(int k, const std::byte* p, const IntRows& x) {
        Scales s;
        if constexpr (!of_32(D)) scales<D>(s, p);
        DotSink<D, T> sink{{}, s, x.q, x.n};
        for (int t = 0; t < T; t++) sink.sum[t] = _mm256_setzero_si256();
        bytes<D>(p, sink);
        d[k] = load<uint16_t>(p + place_of_d(D));
        if (has_minimums(D)) m[k] = load<uint16_t>(p + place_of_d(D) + 2);
        for (int t = 0; t < T; t++) {
            sum[t][k] = sink.sum[t];
            __m256i sums = of_32(D) ? _mm256_setzero_si256() : load256(x.sums + t * (x.n / GROUP));
            if (!of_32(D)) minimum[t][k] = _mm256_madd_epi16(load256(s.minimum), sums);
        }
    }
    // lane += `count` blocks; x begins at the first
    AVX2 void add_to(__m256 (&lane)[T], int count, const IntRows& x) const {
        __m256 ds = _mm256_cvtph_ps(load128(d)), ms = _mm256_cvtph_ps(load128(m));
        for (int t = 0; t < T; t++) {
            IntRows xt = x.at(t);
            float scale[BLOCK_LANES] = {};
            int16_t sums[2 * BLOCK_LANES] = {};
            if (count < BLOCK_LANES) {
                std::copy_n(xt.d, count, scale), xt.d = scale;
                if (of_32(D)) std::copy_n(xt.sums, 2 * count, sums), xt.sums = sums;
            }
            __m256i total = sum8(sum[t]), minimums = _mm256_setzero_si256();
            if (!of_32(D)) minimums = sum8(minimum[t]);
            else if (D != Dtype::Q8_0)
                minimums = _mm256_madd_epi16(load256(xt.sums), all16(offset_of(D) ? offset_of(D) : -1));
            if (offset_of(D)) total = _mm256_sub_epi32(total, minimums);
            __m256 dx = _mm256_loadu_ps(xt.d);
            lane[t] = _mm256_fmadd_ps(_mm256_mul_ps(ds, dx), _mm256_cvtepi32_ps(total), lane[t]);
            if (has_minimums(D))
                lane[t] = _mm256_fnmadd_ps(_mm256_mul_ps(ms, dx), _mm256_cvtepi32_ps(minimums), lane[t]);
        }
    }
};

template <Dtype D, int T>
AVX2_ENTRY void int_row(float* out, int64_t stride, const IntRows& x, const std::byte* p) {
    int blocks = x.n / x.block, bytes = format_of(D).bytes;
    __m256 lane[T];
    for (int t = 0; t < T; t++) lane[t] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b += BLOCK_LANES) {
        int count = std::min(BLOCK_LANES, blocks - b);
        BlockSums<D, T> sums;
        if (count < BLOCK_LANES) std::memset(static_cast<void*>(&sums), 0, sizeof sums);
        for (int k = 0; k < count; k++, p += bytes) sums.add(k, p, x.at(0, b + k));
        sums.add_to(lane, count, x.at(0, b));
    }
    for (int t = 0; t < T; t++) out[t * stride] = sum_block_lanes(lane[t]);
}

template <Dtype D>
void few_tokens_int(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    for (int r = begin; r < end; r++) {
        if (T == 1) int_row<D, 1>(out[0] + r, out.stride, x, w.row(r));
        if (T == 2) int_row<D, 2>(out[0] + r, out.stride, x, w.row(r));
        if (T == 3) int_row<D, 3>(out[0] + r, out.stride, x, w.row(r));
    }
}

// -- E.3  integers: a block of rows, many tokens -------------------------------------------------
//
// The weights of 32 rows are laid out so that one register holds four columns of several rows, and four
// numbers of x, repeated, meet them all.

constexpr int INT_ROWS = 32, INT_TOKENS = GROUP_VECTORS;

struct IntBlock {
    std::byte* w;       // (cols / 4, INT_ROWS, 4): with their offset; appendix N has up to two bytes each
    float *d, *m;       // (blocks, INT_ROWS)
    int32_t* scale;     // (cols / GROUP, INT_ROWS)             blocks of 256
    int32_t* minimum;   // (cols / (2 GROUP), INT_ROWS): of two groups, 16 bits each
    float* lane;        // (BLOCK_LANES, INT_TOKENS, INT_ROWS); `from` lends it and row
    std::byte* row;     // (INT_ROWS, cols): before they are laid out

    IntBlock(std::vector<std::byte>& memory, int cols, int block, size_t bytes = 1, IntBlock* from = {}) {
        size_t n = size_t(cols) * INT_ROWS, blocks = n / size_t(block), groups = block == 32 ? 0 : n / GROUP;
        take_from(memory, [&](Arena& arena) {
            w = arena.take<std::byte>(bytes * n), minimum = arena.take<int32_t>(groups / 2);
            d = arena.take<float>(blocks), m = arena.take<float>(blocks), scale = arena.take<int32_t>(groups);
            lane = from ? from->lane : arena.take<float>(BLOCK_LANES * INT_TOKENS * INT_ROWS);
            row = from ? from->row : arena.take<std::byte>(bytes * n);
        });
    }
};

struct StoreSink {
    std::byte* out;
    AVX2 void operator()(int i, __m256i w) { store256(out + 32 * i, w); }
};

AVX2 float half_at(const std::byte* p) { return _cvtsh_ss(load<uint16_t>(p)); }

template <Dtype D> AVX2_ENTRY void pack_row(IntBlock& block, int r, const std::byte* p, int cols) {
    constexpr int VALUES = format_of(D).values;
    std::byte* row = block.row + r * int64_t(cols);
    for (int b = 0; b < cols / VALUES; b++, p += format_of(D).bytes) {
        StoreSink sink{row + b * VALUES};
        bytes<D>(p, sink);
        int at = b * INT_ROWS + r;
        block.d[at] = half_at(p + place_of_d(D));
        if (has_minimums(D)) block.m[at] = half_at(p + place_of_d(D) + 2);
        if constexpr (of_32(D)) continue;
        Scales s;
        if constexpr (!of_32(D)) scales<D>(s, p);
        for (int g = 0; g < GROUP; g++) block.scale[(b * GROUP + g) * INT_ROWS + r] = s.scale[g];
        for (int g = 0; g < GROUP / 2; g++)
            block.minimum[(b * GROUP / 2 + g) * INT_ROWS + r] = load<int32_t>(s.minimum + 2 * g);
    }
}

// 8 rows of 8 numbers of 32 bits, to columns; strides in bytes.
AVX2_ENTRY void transpose8(void* out, int64_t out_stride, const void* in, int64_t in_stride) {
    __m256i r[8], a[8], b[8];
    for (int i = 0; i < 8; i++) r[i] = load256(static_cast<const std::byte*>(in) + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]), a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        std::byte* to = static_cast<std::byte*>(out) + i * out_stride;
        store256(to, _mm256_permute2x128_si256(b[i], b[i + 4], 0x20));
        store256(to + 4 * out_stride, _mm256_permute2x128_si256(b[i], b[i + 4], 0x31));
    }
}

// R rows from `row` on. What stands in the other rows is of no account.
template <Dtype D> void pack(IntBlock& block, const Matrix& w, int row, int R) {
    for (int r = 0; r < R; r++) pack_row<D>(block, r, w.row(row + r), w.cols);
    for (int r = 0; r < R; r += 8)
        for (int col = 0; col < w.cols; col += 32)
            transpose8(block.w + int64_t(col) * INT_ROWS + 4 * r, 4 * INT_ROWS,
                       block.row + int64_t(r) * w.cols + col, w.cols);
}

// v += 2 n numbers of 8 rows, in pairs of 16 bits, times x: (T, 2 n)
template <int T>
AVX2 void add_pairs(__m256i (&v)[T], const int32_t* w, const int16_t* x, int64_t stride, int n) {
    for (int i = 0; i < n; i++, w += INT_ROWS, x += 2) {
        __m256i two = load256(w);
        for (int t = 0; t < T; t++)
            v[t] = _mm256_add_epi32(
                v[t], _mm256_madd_epi16(two, _mm256_set1_epi32(load<int32_t>(x + t * stride))));
    }
}

// How many products of two bytes each can be added in 16 bits, at most those of a scale.
constexpr int in_16_bits(Dtype d) {
    switch (d) {
    case Dtype::Q8_0: return 1;
    case Dtype::Q6_K: return 2;
    case Dtype::Q4_0: case Dtype::Q4_1: case Dtype::Q4_K: return 8;
    default: return 4;
    }
}

// lane (T, INT_ROWS), of 8 rows from r on, += block b of the rows times T vectors; x: their block b. The
// first eight blocks find nothing in their lanes.
template <Dtype D, int T>
AVX2 void int_tile_of_8(const IntBlock& block, int b, const IntRows& x, float* lane, int r) {
    constexpr int VALUES = format_of(D).values, STEPS = in_16_bits(D);
    const std::byte* w = block.w + (int64_t(b) * VALUES * INT_ROWS + 4 * r);
    __m256i sum[T], minimum[T];
    for (int t = 0; t < T; t++) sum[t] = minimum[t] = _mm256_setzero_si256();
    for (int i = 0; i < VALUES / 4; i += STEPS) {
        __m256i part[T], scale = all16(1);
        for (int t = 0; t < T; t++) part[t] = _mm256_setzero_si256();
        for (int k = i; k < i + STEPS; k++) {
            __m256i wk = load256(w + int64_t(k) * 4 * INT_ROWS);
            if (D == Dtype::Q8_0) wk = signed_again(wk);
            for (int t = 0; t < T; t++) {
                __m256i xt = _mm256_set1_epi32(load<int32_t>(x.q + t * VALUES + 4 * k));
                part[t] = _mm256_add_epi16(part[t], pairs<D>(wk, xt));
            }
        }
        if (!of_32(D)) {
            scale = load256(block.scale + (int64_t(b) * GROUP + i / 4) * INT_ROWS + r);
            scale = _mm256_blend_epi16(scale, _mm256_slli_epi32(scale, 16), 0xAA);
        }
        for (int t = 0; t < T; t++) sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(part[t], scale));
    }
    const int32_t* two = block.minimum + int64_t(b) * (GROUP / 2) * INT_ROWS + r;
    if (!of_32(D)) add_pairs<T>(minimum, two, x.sums, GROUP, GROUP / 2);
    __m256 d = _mm256_load_ps(block.d + b * INT_ROWS + r), m = _mm256_load_ps(block.m + b * INT_ROWS + r);
    for (int t = 0; t < T; t++) {
        if (of_32(D)) {
            int total = x.sums[2 * t] + x.sums[2 * t + 1];
            minimum[t] = _mm256_set1_epi32(total * (has_minimums(D) ? -1 : offset_of(D)));
        }
        if (offset_of(D) && D != Dtype::Q8_0) sum[t] = _mm256_sub_epi32(sum[t], minimum[t]);
        __m256 dx = _mm256_set1_ps(x.d[t]), y = _mm256_setzero_ps();
        if (b >= BLOCK_LANES) y = _mm256_load_ps(lane + t * INT_ROWS + r);
        y = _mm256_fmadd_ps(_mm256_mul_ps(d, dx), _mm256_cvtepi32_ps(sum[t]), y);
        if (has_minimums(D)) y = _mm256_fnmadd_ps(_mm256_mul_ps(m, dx), _mm256_cvtepi32_ps(minimum[t]), y);
        _mm256_store_ps(lane + t * INT_ROWS + r, y);
    }
}

// Appendix K has another one.
struct Tile8 {
    static constexpr int tokens(Dtype) { return 4; }
    template <Dtype D, int T>
    AVX2_ENTRY static void tile(const IntBlock& block, int b, const IntRows& x, float* lane) {
        for (int r = 0; r < INT_ROWS; r += 8) int_tile_of_8<D, T>(block, b, x, lane, r);
    }
};

// The tree of sum_block_lanes, for 32 rows.
AVX2_ENTRY void sum_block_lanes_of_rows(float* out, const float* lane) {
    constexpr int PLANE = INT_TOKENS * INT_ROWS;
    for (int r = 0; r < INT_ROWS; r += 8) {
        __m256 v[4];
        for (int j = 0; j < 4; j++) {
            const float* at = lane + j * PLANE + r;
            v[j] = _mm256_add_ps(_mm256_load_ps(at), _mm256_load_ps(at + 4 * PLANE));
        }
        _mm256_storeu_ps(out + r, _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3])));
    }
}

// R rows, packed, times T <= INT_TOKENS vectors, lane for lane: the sums of one stay in the first cache.
template <class Tile, Dtype D>
void int_block(const IntBlock& block, Rows out, const IntRows& x, int row, int R, int T) {
    constexpr int TOKENS = Tile::tokens(D);
    for (int j = 0; j < BLOCK_LANES; j++) {
        float* lane = block.lane + j * INT_TOKENS * INT_ROWS;
        if (j >= x.n / x.block) std::fill_n(lane, T * INT_ROWS, 0.0f);
        for (int b = j; b < x.n / x.block; b += BLOCK_LANES) {
            int t = 0;
            for (; t + TOKENS <= T; t += TOKENS)
                Tile::template tile<D, TOKENS>(block, b, x.at(t, b), lane + t * INT_ROWS);
            for (; t < T; t++) Tile::template tile<D, 1>(block, b, x.at(t, b), lane + t * INT_ROWS);
        }
    }
    for (int t = 0; t < T; t++) {
        float sums[INT_ROWS];
        sum_block_lanes_of_rows(R == INT_ROWS ? out[t] + row : sums, block.lane + t * INT_ROWS);
        if (R < INT_ROWS) std::copy_n(sums, R, out[t] + row);
    }
}

template <class Tile>
void many_ints(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    thread_local std::vector<std::byte> memory;
    IntBlock block(memory, w.cols, x.block);
    for_quantised(w.dtype, [&]<Dtype D>() {
        for (int r = begin; r < end; r += INT_ROWS) {
            int R = std::min(INT_ROWS, end - r);
            pack<D>(block, w, r, R);
            for (int t = 0; t < T; t += INT_TOKENS)
                int_block<Tile, D>(block, {out[t], out.stride}, x.vector(t), r, R,
                                   std::min(INT_TOKENS, T - t));
        }
    });
}

inline void int_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    if (T >= MANY_TOKENS) return many_ints<Tile8>(out, x, w, T, begin, end);
    for_quantised(w.dtype, [&]<Dtype D>() { few_tokens_int<D>(out, x, w, T, begin, end); });
}

AVX2_ENTRY uint32_t largest_magnitude(const float* x, int n) {
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8)
        top = _mm256_max_epi32(top, _mm256_and_si256(load256(x + i), _mm256_set1_epi32(0x7FFFFFFF)));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1))));
}

AVX2_ENTRY void quantise(const IntRows& out, const float* x) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int b = 0; b < out.n / out.block; b++, x += out.block) {
        IntScale s = int_scale(largest_magnitude(x, out.block));
        IntRows block = out.at(0, b);
        *block.d = s.d;
        for (int i = 0; i < out.block; i += 32) {
            __m256i q[4];
            for (int k = 0; k < 4; k++)
                q[k] = _mm256_cvtps_epi32(
                    _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), _mm256_set1_ps(s.inverse)));
            if (s.inverse == 0) q[0] = q[1] = q[2] = q[3] = _mm256_setzero_si256();
            __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
            __m256i eight = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
            store256(block.q + i, eight);
            __m256i two = _mm256_maddubs_epi16(all8(1), eight), four = _mm256_madd_epi16(two, all16(1));
            four = _mm256_hadd_epi32(four, four), four = _mm256_hadd_epi32(four, four);
            block.sums[i / GROUP] = int16_t(_mm256_extract_epi16(four, 0));
            block.sums[i / GROUP + 1] = int16_t(_mm256_extract_epi16(four, 8));
        }
    }
}

}  // namespace avx2
#endif

// =================================================================================================
// Appendix J. Fast CPU: NEON
// =================================================================================================
//
// And on ARM? Chapter 5's sixteen lanes are four registers of four numbers here, and 32 registers hold the
// sums of two rows with three tokens. So one kernel serves few tokens and many; for many it reads rows that
// were widened before. Small integers are multiplied as bytes and added in 32 bits, as in appendix E.

#if defined(DEEPSEEK_FLOAT) && defined(__aarch64__)
namespace neon {

// -- J.1  four weights at a time -----------------------------------------------------------------

inline uint8x16_t load16(const std::byte* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
inline uint8x8_t load8(const std::byte* p) { return vld1_u8(reinterpret_cast<const uint8_t*>(p)); }

inline float32x4_t widen4(F32Row w, int i) { return vreinterpretq_f32_u8(load16(w.p + 4 * size_t(i))); }
inline float32x4_t widen4(F16Row w, int i) {
    return vcvt_f32_f16(vreinterpret_f16_u8(load8(w.p + 2 * size_t(i))));
}
inline float32x4_t widen4(Bf16Row w, int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(load8(w.p + 2 * size_t(i))), 16));
}
inline float32x4_t widen4(E4m3Row w, int i) {                        // as avx2::widen8
    uint8x8_t four = vreinterpret_u8_u32(vdup_n_u32(load<uint32_t>(w.p + i)));
    uint32x4_t b = vmovl_u16(vget_low_u16(vmovl_u8(four))), magnitude = vandq_u32(b, vdupq_n_u32(127));
    uint32x4_t sign = vshlq_n_u32(vshrq_n_u32(b, 7), 31), nan = vceqq_u32(magnitude, vdupq_n_u32(127));
    float32x4_t value = vmulq_n_f32(vreinterpretq_f32_u32(vshlq_n_u32(magnitude, 20)), 0x1p120f);
    return vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(value), sign), nan));
}

template <class Row> void widen_row(float* out, Row w, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) vst1q_f32(out + i, widen4(w, i));
    for (; i < n; i++) out[i] = w(i);
}

inline void widen(float* out, const Matrix& w, int r) {
    if (w.dtype == Dtype::BF16) return widen_row(out, Bf16Row{w.row(r)}, w.cols);
    if (w.dtype == Dtype::F16) return widen_row(out, F16Row{w.row(r)}, w.cols);
    widen_plain(out, w, r);
}

// -- J.2  dots of R rows and T tokens ------------------------------------------------------------

using Lanes = float32x4_t[4];

// The tree of chapter 5's sum_lanes.
inline float sum(const Lanes& v) {
    float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

template <class Row> void add_tail(Lanes& v, Row w, const float* x, int begin, int end) {
    float lane[LANES];
    for (int q = 0; q < 4; q++) vst1q_f32(lane + 4 * q, v[q]);
    for (int i = begin; i < end; i++) lane[i - begin] = std::fma(w(i), x[i], lane[i - begin]);
    for (int q = 0; q < 4; q++) v[q] = vld1q_f32(lane + 4 * q);
}

template <class Row, int R, int T> struct Dots {
    Lanes v[R][T];

    void clear() {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++)
                UNROLL for (int q = 0; q < 4; q++) v[r][t][q] = vdupq_n_f32(0);
    }
    void add_products(const Row* w, ConstRows x, int begin, int end) {
        int whole = end - (end - begin) % LANES;
        for (int i = begin; i < whole; i += LANES) {
            UNROLL for (int q = 0; q < 4; q++) {
                float32x4_t xt[T];
                UNROLL for (int t = 0; t < T; t++) xt[t] = vld1q_f32(x[t] + i + 4 * q);
                UNROLL for (int r = 0; r < R; r++) {
                    float32x4_t wr = widen4(w[r], i + 4 * q);
                    UNROLL for (int t = 0; t < T; t++) v[r][t][q] = vfmaq_f32(v[r][t][q], wr, xt[t]);
                }
            }
        }
        if (whole == end) return;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) add_tail(v[r][t], w[r], x[t], whole, end);
    }
};

template <class Row, int R, int T> void dots(Rows out, ConstRows x, const Matrix& w, int first) {
    Row row[R];
    UNROLL for (int r = 0; r < R; r++) row[r] = {w.row(first + r)};
    Dots<Row, R, T> all, block;
    all.clear();
    if constexpr (std::is_same_v<Row, E4m3Row>) {
        for (int begin = 0; begin < w.cols; begin += SCALE_BLOCK) {
            block.clear();
            block.add_products(row, x, begin, std::min(w.cols, begin + SCALE_BLOCK));
            UNROLL for (int r = 0; r < R; r++) {
                float s = load<float>(w.scale_row(first + r) + begin / SCALE_BLOCK * 4);
                UNROLL for (int t = 0; t < T; t++)
                    UNROLL for (int q = 0; q < 4; q++)
                        all.v[r][t][q] = vfmaq_n_f32(all.v[r][t][q], block.v[r][t][q], s);
            }
        }
    } else {
        all.add_products(row, x, 0, w.cols);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) out[t][first + r] = sum(all.v[r][t]);
}

// All tokens, three at a time, on R rows.
template <class Row, int R> void dots_of_rows(Rows out, ConstRows x, const Matrix& w, int T, int first) {
    int t = 0;
    for (; t + 3 <= T; t += 3) dots<Row, R, 3>({out[t], out.stride}, {x[t], x.stride}, w, first);
    if (T - t == 2) dots<Row, R, 2>({out[t], out.stride}, {x[t], x.stride}, w, first);
    if (T - t == 1) dots<Row, R, 1>({out[t], out.stride}, {x[t], x.stride}, w, first);
}
template <class Row> void rows_of(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    int r = begin;
    for (; r + 2 <= end; r += 2) dots_of_rows<Row, 2>(out, x, w, T, r);
    if (r < end) dots_of_rows<Row, 1>(out, x, w, T, r);
}

inline void rows(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    if (w.dtype == Dtype::F32) return rows_of<F32Row>(out, x, w, T, begin, end);
    if (w.dtype == Dtype::F8_E4M3) return rows_of<E4m3Row>(out, x, w, T, begin, end);
    if (T < MANY_TOKENS && w.dtype == Dtype::BF16) return rows_of<Bf16Row>(out, x, w, T, begin, end);
    if (T < MANY_TOKENS && w.dtype == Dtype::F16) return rows_of<F16Row>(out, x, w, T, begin, end);
    thread_local Vector widened;
    widened.resize(2 * size_t(w.cols));
    for (int r = begin; r < end; r += 2) {
        int count = std::min(2, end - r);
        for (int k = 0; k < count; k++) widen(widened.data() + size_t(k) * size_t(w.cols), w, r + k);
        rows_of<F32Row>({out[0] + r, out.stride}, x, real_matrix(widened.data(), 2, w.cols), T, 0, count);
    }
}

inline float dot_real(const float* a, const float* b, int n) {
    float out;
    dots<F32Row, 1, 1>({&out, 1}, {b, 0}, real_matrix(a, 1, n), 0);
    return out;
}

// -- J.3  weighted sums of rows ------------------------------------------------------------------

// out[t] += sum_j p[t][j] v[j], v in f32, over the first n rows
template <int T> void weigh_tokens(Rows out, ConstRows p, const Matrix& v, int n) {
    int col = 0;
    for (; col + 16 <= v.cols; col += 16) {
        float32x4_t y[T][4];
        UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int q = 0; q < 4; q++) y[t][q] = vld1q_f32(out[t] + col + 4 * q);
        for (int j = 0; j < n; j++) {
            F32Row row{v.row(j)};
            UNROLL for (int q = 0; q < 4; q++) {
                float32x4_t w = widen4(row, col + 4 * q);
                UNROLL for (int t = 0; t < T; t++) y[t][q] = vfmaq_n_f32(y[t][q], w, p[t][j]);
            }
        }
        UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int q = 0; q < 4; q++) vst1q_f32(out[t] + col + 4 * q, y[t][q]);
    }
    for (; col < v.cols; col++)
        for (int t = 0; t < T; t++)
            for (int j = 0; j < n; j++) out[t][col] = std::fma(p[t][j], F32Row{v.row(j)}(col), out[t][col]);
}

inline void weigh(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    constexpr int AT_ONCE = 64;
    thread_local Vector rows;
    rows.resize(AT_ONCE * size_t(v.cols));
    Matrix part = real_matrix(rows.data(), AT_ONCE, v.cols);
    for (int begin = 0; begin < n; begin += AT_ONCE) {
        int count = std::min(AT_ONCE, n - begin), t = 0;
        if (v.dtype == Dtype::F32) part = v.view(begin, count);
        else for (int j = 0; j < count; j++) widen(rows.data() + size_t(j) * size_t(v.cols), v, begin + j);
        for (; t + 4 <= T; t += 4)
            weigh_tokens<4>({out[t], out.stride}, {p[t] + begin, p.stride}, part, count);
        for (; t < T; t++) weigh_tokens<1>({out[t], out.stride}, {p[t] + begin, p.stride}, part, count);
    }
}

// -- J.4  exp ------------------------------------------------------------------------------------

inline float32x2_t exp2_of(float32x2_t x) {
    float64x2_t wide = vcvt_f64_f32(x), magic = vdupq_n_f64(TO_INTEGER_F64);
    float64x2_t shifted = vfmaq_f64(magic, wide, vdupq_n_f64(LOG2_E)), k = vsubq_f64(shifted, magic);
    float64x2_t r = vfmaq_f64(wide, k, vdupq_n_f64(-LN_2)), p = vdupq_n_f64(EXP_SERIES[0]);
    for (size_t i = 1; i < std::size(EXP_SERIES); i++) p = vfmaq_f64(vdupq_n_f64(EXP_SERIES[i]), p, r);
    int64x2_t exponent = vaddq_s64(vreinterpretq_s64_f64(shifted), vdupq_n_s64(1023));   // as avx2::exp4
    return vcvt_f32_f64(vmulq_f64(p, vreinterpretq_f64_s64(vshlq_n_s64(exponent, 52))));
}

// exp_of of four numbers.
inline float32x4_t exp4(float32x4_t x) {
    float32x4_t low = vdupq_n_f32(-104.0f), high = vdupq_n_f32(88.8f), zero = vdupq_n_f32(0);
    float32x4_t clamped = vminq_f32(vmaxq_f32(x, low), high);
    float32x4_t y = vcombine_f32(exp2_of(vget_low_f32(clamped)), exp2_of(vget_high_f32(clamped)));
    y = vbslq_f32(vcgtq_f32(x, high), vdupq_n_f32(std::numeric_limits<float>::infinity()), y);
    y = vbslq_f32(vcleq_f32(x, low), zero, y);
    return vbslq_f32(vceqq_f32(x, x), y, x);
}

inline void softmax(float* z, float scale, int n) {
    constexpr float INF = std::numeric_limits<float>::infinity();
    int whole = n / LANES * LANES;
    float rest[LANES], lane[LANES] = {};   // the last numbers, and -inf, of which e^x is 0
    std::fill_n(std::copy_n(z + whole, n - whole, rest), LANES - (n - whole), -INF);
    auto four = [&](int i) { return i < whole ? z + i : rest + (i - whole); };
    float32x4_t top = vdupq_n_f32(-INF);
    for (int i = 0; i < whole + LANES; i += 4) {
        float32x4_t x = vmulq_n_f32(vld1q_f32(four(i)), scale);
        vst1q_f32(four(i), x);
        top = vmaxnmq_f32(top, x);         // the other, if one of them is NaN
    }
    top = vdupq_n_f32(vmaxvq_f32(top));
    for (int i = 0; i < whole + LANES; i += 4) {
        float32x4_t e = exp4(vsubq_f32(vld1q_f32(four(i)), top));
        vst1q_f32(four(i), e);
        vst1q_f32(lane + i % LANES, vaddq_f32(vld1q_f32(lane + i % LANES), e));
    }
    float32x4_t all = vdupq_n_f32(sum_lanes(lane));
    for (int i = 0; i < whole + LANES; i += 4) vst1q_f32(four(i), vdivq_f32(vld1q_f32(four(i)), all));
    std::copy_n(rest, n - whole, z + whole);
}

inline void silu_times(float* gate, const float* up, int n) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t z = vld1q_f32(gate + i), e = exp4(vnegq_f32(z));
        float32x4_t y = vdivq_f32(z, vaddq_f32(vdupq_n_f32(1), e));
        vst1q_f32(gate + i, vmulq_f32(y, vld1q_f32(up + i)));
    }
    silu_times_plain(gate + i, up + i, n - i);
}

// -- J.5  small integers -------------------------------------------------------------------------

inline float half_at(const std::byte* p) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load<uint16_t>(p)))), 0);
}
inline void store(int8_t* out, uint8x16_t q) { vst1q_s8(out, vreinterpretq_s8_u8(q)); }
inline uint8x16_t low_nibble(uint8x16_t b) { return vandq_u8(b, vdupq_n_u8(15)); }

inline void unpack_q4_k(Block& b, const std::byte* p) {
    b.d = half_at(p), b.m = half_at(p + 2);
    unpack_six_bits(b, reinterpret_cast<Bytes>(p + 4));
    for (int i = 0; i < 8; i++) {
        uint8x16_t two = load16(p + 16 + 16 * i);
        int8_t* out = b.q + i / 2 * 64 + i % 2 * 16;
        store(out, low_nibble(two)), store(out + 32, vshrq_n_u8(two, 4));
    }
}

inline void unpack_q6_k(Block& b, const std::byte* p) {
    b.d = half_at(p + 208);
    for (int g = 0; g < 16; g++) b.scale[g] = int8_t(p[192 + g]);
    for (int n = 0; n < 2; n++) {
        for (int h = 0; h < 2; h++) {
            uint8x16_t first = load16(p + 64 * n + 16 * h), second = load16(p + 64 * n + 32 + 16 * h),
                       high = load16(p + 128 + 32 * n + 16 * h);
            uint8x16_t low[4] = {low_nibble(first), low_nibble(second), vshrq_n_u8(first, 4),
                                 vshrq_n_u8(second, 4)};
            uint8x16_t two[4] = {vshlq_n_u8(high, 4), vshlq_n_u8(high, 2), high, vshrq_n_u8(high, 2)};
            for (int k = 0; k < 4; k++) {
                uint8x16_t q = vorrq_u8(low[k], vandq_u8(two[k], vdupq_n_u8(48)));
                store(b.q + 128 * n + 32 * k + 16 * h, vsubq_u8(q, vdupq_n_u8(32)));
            }
        }
    }
}

// As chapter 2.3; for what most files have, fast.
template <Dtype D> void unpack_fast(Block& b, const std::byte* p) {
    if constexpr (D == Dtype::Q8_0) b.d = half_at(p), std::memcpy(b.q, p + 2, 32);
    else if constexpr (D == Dtype::Q4_K) unpack_q4_k(b, p);
    else if constexpr (D == Dtype::Q6_K) unpack_q6_k(b, p);
    else unpack(b, p, D);
}

// w . x, 16 numbers each, in four sums; SDOT: by the instruction that newer processors have for it
template <bool SDOT> int32x4_t dot16(const int8_t* w, const int8_t* x) {
    int8x16_t a = vld1q_s8(w), b = vld1q_s8(x);
    int32x4_t sum = vdupq_n_s32(0);
    if (!SDOT) return vpaddlq_s16(vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));   // < 2^15
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    asm(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
    return sum;
#endif
}
inline int32_t dot16(const int16_t* w, const int16_t* x) {
    int16x8_t a = vld1q_s16(w), b = vld1q_s16(x), c = vld1q_s16(w + 8), d = vld1q_s16(x + 8);
    int32x4_t sum = vmlal_high_s16(vmull_s16(vget_low_s16(a), vget_low_s16(b)), a, b);
    return vaddvq_s32(vmlal_high_s16(vmlal_s16(sum, vget_low_s16(c), vget_low_s16(d)), c, d));
}

template <bool SDOT, Dtype D, int T>
void int_row(float* out, int64_t stride, const IntRows& x, const std::byte* p) {
    constexpr int VALUES = format_of(D).values, GROUPS = VALUES / GROUP;
    float lane[T][BLOCK_LANES] = {};
    for (int b = 0; b < x.n / VALUES; b++, p += format_of(D).bytes) {
        Block w;
        unpack_fast<D>(w, p);
        IntRows xs[T];
        UNROLL for (int t = 0; t < T; t++) xs[t] = x.at(t, b);
        int32x4_t sum[T];
        std::fill_n(sum, T, vdupq_n_s32(0));
        for (int g = 0; g < GROUPS; g++) {
            UNROLL for (int t = 0; t < T; t++) {
                int32x4_t group = dot16<SDOT>(w.q + GROUP * g, xs[t].q + GROUP * g);
                sum[t] = VALUES == 32 ? vaddq_s32(sum[t], group) : vmlaq_n_s32(sum[t], group, w.scale[g]);
            }
        }
        UNROLL for (int t = 0; t < T; t++) {
            float dx = *xs[t].d, &y = lane[t][b % BLOCK_LANES];
            y = std::fma(w.d * dx, float(vaddvq_s32(sum[t])), y);
            if (!format_of(D).minimums) continue;
            const int16_t* sums = xs[t].sums;
            int32_t minimum = VALUES == 32 ? -(sums[0] + sums[1]) : dot16(w.minimum, sums);
            y = std::fma(-(w.m * dx), float(minimum), y);
        }
    }
    UNROLL for (int t = 0; t < T; t++) out[t * stride] = sum_block_lanes(lane[t]);
}

template <bool SDOT, Dtype D>
void int_rows_of(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    for (int r = begin; r < end; r++) {
        int t = 0;
        for (; t + 4 <= T; t += 4) int_row<SDOT, D, 4>(out[t] + r, out.stride, x.vector(t), w.row(r));
        for (; t < T; t++) int_row<SDOT, D, 1>(out[t] + r, out.stride, x.vector(t), w.row(r));
    }
}

template <bool SDOT> void int_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    for_quantised(w.dtype, [&]<Dtype D>() { int_rows_of<SDOT, D>(out, x, w, T, begin, end); });
}

inline void quantise(const IntRows& out, const float* x) {
    for (int b = 0; b < out.n / out.block; b++, x += out.block) {
        uint32x4_t top = vdupq_n_u32(0);
        for (int i = 0; i < out.block; i += 4)
            top = vmaxq_u32(top, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7FFFFFFF)));
        IntScale s = int_scale(vmaxvq_u32(top));
        IntRows block = out.at(0, b);
        *block.d = s.d;
        for (int i = 0; i < out.block; i += GROUP) {
            int16x4_t q[4];                      // ties to even; 0 for NaN, which 0 times infinity is
            for (int k = 0; k < 4; k++)
                q[k] = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4 * k), s.inverse)));
            int8x8_t low = vmovn_s16(vcombine_s16(q[0], q[1])), high = vmovn_s16(vcombine_s16(q[2], q[3]));
            int8x16_t all = vcombine_s8(low, high);
            vst1q_s8(block.q + i, all);
            block.sums[i / GROUP] = vaddlvq_s8(all);
        }
    }
}

}  // namespace neon
#endif

// =================================================================================================
// Appendix K. Fast CPU: AVX-512
// =================================================================================================
//
// What do wider registers change? Nothing in any result. Chapter 5's sixteen lanes are one register, and
// "avx512" does what "avx2" does with twice as much an instruction.

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
#define AVX512_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define AVX512 __attribute__((target(AVX512_TARGET), always_inline)) inline
#define AVX512_ENTRY __attribute__((target(AVX512_TARGET))) inline
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"   // g++ 12 finds fault with its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace avx512 {

using avx2::AHEAD, avx2::FloatBlock, avx2::INT_ROWS, avx2::IntBlock, avx2::Scales, avx2::STORED;
using avx2::has_minimums, avx2::load256, avx2::of_32, avx2::offset_of, avx2::place_of_d;

// -- K.1  sixteen weights at a time --------------------------------------------------------------

constexpr __mmask16 ALL = 0xFFFF;
inline __mmask16 first_of(int n) { return n >= 16 ? ALL : __mmask16((1u << n) - 1); }

AVX512 __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
AVX512 __m512i constant(int v) { return _mm512_set1_epi32(v); }

AVX512 __m512 widen16(F32Row w, int i, __mmask16 m) { return _mm512_maskz_loadu_ps(m, w.p + 4 * size_t(i)); }
AVX512 __m512 widen16(F16Row w, int i, __mmask16 m) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, w.p + 2 * size_t(i)));
}
AVX512 __m512 widen16(Bf16Row w, int i, __mmask16 m) {
    __m256i half = _mm256_maskz_loadu_epi16(m, w.p + 2 * size_t(i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
AVX512 __m512 widen16(E4m3Row w, int i, __mmask16 m) {               // as avx2::widen8
    __m512i b = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, w.p + i));
    __m512i magnitude = _mm512_and_si512(b, constant(127));
    __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(b, 7), 31);
    __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20));
    __m512i bits = _mm512_castps_si512(_mm512_mul_ps(value, _mm512_set1_ps(0x1p120f)));
    __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, constant(127));
    return _mm512_castsi512_ps(_mm512_mask_set1_epi32(_mm512_or_si512(bits, sign), nan, -1));
}

// -- K.2  some rows, a few tokens ----------------------------------------------------------------

// Of a token's weights, which are read once and need not stay in any cache. Intel's processors bring them no
// faster than unasked that way (half the speed of this one).
inline const bool INTEL = __builtin_cpu_is("intel");
AVX512 void prefetch(const std::byte* p) {
    const char* at = reinterpret_cast<const char*>(p);
    if (INTEL) _mm_prefetch(at, _MM_HINT_T1);
    else _mm_prefetch(at, _MM_HINT_NTA);
}

AVX512 float sum(__m512 v) {
    return avx2::sum({_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)});
}

// Vectors of so many columns fill half of an L1 cache: they are to meet many rows at once.
constexpr int LONG = 4096, LONG_ROWS = 8;

template <class Row, int R, int T> struct Dots {
    size_t ahead;                                      // bytes to the rows that come after these
    __m512 v[R][T] = {};

    // At step i: of few rows the next ones, as memory has them; of many the columns to come, by turns.
    AVX512 void fetch(const Row* w, size_t i) {
        constexpr size_t BYTES = STORED<Row> * LANES, TURNS = std::max<size_t>(64 / BYTES, 1);
        if constexpr (R < LONG_ROWS) {
            for (size_t c = 0; c < R * BYTES; c += 64) prefetch(w[0].p + ahead + i * R * BYTES + c);
        } else {
            for (size_t r = i % TURNS; r < R; r += TURNS)
                _mm_prefetch(reinterpret_cast<const char*>(w[r].p + i * BYTES + 2048), _MM_HINT_T1);
        }
    }
    // The columns i .. i + 16 of which m has the bit.
    AVX512 void step(const Row* w, ConstRows x, int i, __mmask16 m) {
        __m512 xt[T];
        UNROLL for (int t = 0; t < T; t++) xt[t] = _mm512_maskz_loadu_ps(m, x[t] + i);
        fetch(w, size_t(i / LANES));
        UNROLL for (int r = 0; r < R; r++) {
            __m512 wr = widen16(w[r], i, m);
            UNROLL for (int t = 0; t < T; t++) v[r][t] = _mm512_mask3_fmadd_ps(wr, xt[t], v[r][t], m);
        }
    }
    AVX512 void add_products(const Row* w, ConstRows x, int begin, int end) {
        int i = begin;
        for (; i + LANES <= end; i += LANES) step(w, x, i, ALL);
        if (i < end) step(w, x, i, first_of(end - i));
    }
};

template <class Row, int R, int T> AVX512_ENTRY void dots(Rows out, ConstRows x, const Matrix& w, int first) {
    Row row[R];
    UNROLL for (int r = 0; r < R; r++) row[r] = {w.row(first + r)};
    Dots<Row, R, T> all{size_t(R) * size_t(row[R - 1].p - row[0].p) / std::max(R - 1, 1)};
    if constexpr (std::is_same_v<Row, E4m3Row>) {
        for (int begin = 0; begin < w.cols; begin += SCALE_BLOCK) {
            Dots<Row, R, T> block{all.ahead};
            block.add_products(row, x, begin, std::min(w.cols, begin + SCALE_BLOCK));
            UNROLL for (int r = 0; r < R; r++) {
                __m512 s = _mm512_set1_ps(load<float>(w.scale_row(first + r) + begin / SCALE_BLOCK * 4));
                UNROLL for (int t = 0; t < T; t++)
                    all.v[r][t] = _mm512_fmadd_ps(s, block.v[r][t], all.v[r][t]);
            }
        }
    } else {
        all.add_products(row, x, 0, w.cols);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) out[t][first + r] = sum(all.v[r][t]);
}

// Rows at once, for chains of additions to hide each other's latency. How many was measured: Intel is fastest
// with four, AMD (Zen 4) with two, or eight long ones. The smaller numbers take what is left.
template <class Row, int T> void few(Rows out, ConstRows x, const Matrix& w, int begin, int end) {
    int r = begin;
    bool long_rows = !INTEL && w.cols >= LONG;
    for (; long_rows && r + LONG_ROWS <= end; r += LONG_ROWS) dots<Row, LONG_ROWS, T>(out, x, w, r);
    for (; (INTEL || long_rows) && r + 4 <= end; r += 4) dots<Row, 4, T>(out, x, w, r);
    for (; r + 2 <= end; r += 2) dots<Row, 2, T>(out, x, w, r);
    for (; r < end; r++) dots<Row, 1, T>(out, x, w, r);
}

template <class Row> void few_tokens(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    static_assert(MANY_TOKENS == 4);
    if (T == 1) few<Row, 1>(out, x, w, begin, end);
    if (T == 2) few<Row, 2>(out, x, w, begin, end);
    if (T == 3) few<Row, 3>(out, x, w, begin, end);
}

// -- K.3  a block of rows, many tokens -----------------------------------------------------------

constexpr int TILE_ROWS = 6, TILE_TOKENS = avx2::TILE_TOKENS;         // 24 sums of 16 lanes in 32 registers

// avx2::tile
template <int R, int T, bool SCALED>
AVX512_ENTRY void tile(FloatBlock& b, int row, int token, int col, ConstRows x, int n, const float* scale) {
    __m512 v[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++)
            v[r][t] = SCALED ? _mm512_setzero_ps() : _mm512_load_ps(b.lane(row + r, token + t));
    for (int i = 0; i < n; i += LANES) {
        __m512 xt[T];
        UNROLL for (int t = 0; t < T; t++) xt[t] = _mm512_loadu_ps(x[t] + i);
        UNROLL for (int r = 0; r < R; r++) {
            __m512 w = _mm512_load_ps(b.w[row + r] + col + i);
            UNROLL for (int t = 0; t < T; t++) v[r][t] = _mm512_fmadd_ps(w, xt[t], v[r][t]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) {
            float* lane = b.lane(row + r, token + t);
            if (SCALED) v[r][t] = _mm512_fmadd_ps(_mm512_set1_ps(scale[r]), v[r][t], _mm512_load_ps(lane));
            _mm512_store_ps(lane, v[r][t]);
        }
}

template <size_t... I> avx2::Tile tile_of(bool scaled, int R, int T, std::index_sequence<I...>) {
    static constexpr avx2::Tile PLAIN[] = {tile<I / TILE_TOKENS + 1, I % TILE_TOKENS + 1, false>...};
    static constexpr avx2::Tile SCALED[] = {tile<I / TILE_TOKENS + 1, I % TILE_TOKENS + 1, true>...};
    return (scaled ? SCALED : PLAIN)[(R - 1) * TILE_TOKENS + T - 1];
}
inline avx2::Tile tile_of(bool scaled, int R, int T) {
    return tile_of(scaled, R, T, std::make_index_sequence<TILE_ROWS * TILE_TOKENS>());
}

inline void rows(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    if (T < MANY_TOKENS) {
        switch (w.dtype) {
        case Dtype::F32: return few_tokens<F32Row>(out, x, w, T, begin, end);
        case Dtype::BF16: return few_tokens<Bf16Row>(out, x, w, T, begin, end);
        case Dtype::F16: return few_tokens<F16Row>(out, x, w, T, begin, end);
        case Dtype::F8_E4M3: return few_tokens<E4m3Row>(out, x, w, T, begin, end);
        default: break;
        }
    }
    avx2::many_tokens({TILE_ROWS, tile_of}, out, x, w, T, begin, end);
}

// -- K.4  weighted sums of rows ------------------------------------------------------------------

// out[t] (16 N columns from col on, those of which m has the bit) += sum_j p[t][j] v[j]
template <class Row, int T, int N>
AVX512_ENTRY void weigh_tile(Rows out, ConstRows p, const Matrix& v, int col, __mmask16 m, int begin,
                             int end) {
    const int64_t stride = v.row(1) - v.row(0);
    const std::byte* at = v.row(begin) + STORED<Row> * size_t(col);
    __m512 y[T][N];
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int k = 0; k < N; k++) y[t][k] = _mm512_maskz_loadu_ps(m, out[t] + col + 16 * k);
    }
    for (int j = begin; j < end; j++, at += stride) {
        avx2::fetch(at + avx2::WEIGH_ROWS * stride, 16 * N * STORED<Row>);
        __m512 w[N];
        UNROLL for (int k = 0; k < N; k++) w[k] = widen16(Row{at}, 16 * k, m);
        UNROLL for (int t = 0; t < T; t++) {
            __m512 factor = _mm512_set1_ps(p[t][j]);
            UNROLL for (int k = 0; k < N; k++) y[t][k] = _mm512_fmadd_ps(factor, w[k], y[t][k]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        UNROLL for (int k = 0; k < N; k++) _mm512_mask_storeu_ps(out[t] + col + 16 * k, m, y[t][k]);
    }
}

// avx2::Weigh8
struct Weigh16 {
    template <class Row, int T>
    static void tokens(Rows out, ConstRows p, const Matrix& v, int begin, int end) {
        int col = 0;
        for (; col + 64 <= v.cols; col += 64) weigh_tile<Row, T, 4>(out, p, v, col, ALL, begin, end);
        for (; col + 16 <= v.cols; col += 16) weigh_tile<Row, T, 1>(out, p, v, col, ALL, begin, end);
        if (col < v.cols) weigh_tile<Row, T, 1>(out, p, v, col, first_of(v.cols - col), begin, end);
    }
};
inline void weigh(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    avx2::weigh<Weigh16>(out, p, v, T, n);
}

// -- K.5  exp ------------------------------------------------------------------------------------

// avx2::exp4
AVX512 __m256 exp8(__m256 x) {
    __m512d wide = _mm512_cvtps_pd(x), magic = _mm512_set1_pd(TO_INTEGER_F64);
    __m512d shifted = _mm512_fmadd_pd(wide, _mm512_set1_pd(LOG2_E), magic), k = _mm512_sub_pd(shifted, magic);
    __m512d r = _mm512_fmadd_pd(k, _mm512_set1_pd(-LN_2), wide), p = _mm512_set1_pd(EXP_SERIES[0]);
    for (size_t i = 1; i < std::size(EXP_SERIES); i++)
        p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(EXP_SERIES[i]));
    __m512i exponent = _mm512_add_epi64(_mm512_castpd_si512(shifted), _mm512_set1_epi64(1023));
    return _mm512_cvtpd_ps(_mm512_mul_pd(p, _mm512_castsi512_pd(_mm512_slli_epi64(exponent, 52))));
}

// exp_of of sixteen numbers.
AVX512 __m512 exp16(__m512 x) {
    __m512 low = _mm512_set1_ps(-104.0f), high = _mm512_set1_ps(88.8f);
    __m512 clamped = _mm512_min_ps(_mm512_max_ps(x, low), high);
    __m512 y = _mm512_insertf32x8(_mm512_castps256_ps512(exp8(_mm512_castps512_ps256(clamped))),
                                  exp8(_mm512_extractf32x8_ps(clamped, 1)), 1);
    __mmask16 inf = _mm512_cmp_ps_mask(x, high, _CMP_GT_OQ), zero = _mm512_cmp_ps_mask(x, low, _CMP_LE_OQ);
    y = _mm512_mask_mov_ps(y, inf, _mm512_set1_ps(std::numeric_limits<float>::infinity()));
    y = _mm512_mask_mov_ps(y, zero, _mm512_setzero_ps());
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

AVX512_ENTRY void softmax(float* z, float scale, int n) {
    __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), lanes = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first_of(n - i);
        __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, z + i), _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(z + i, m, x);
        top = _mm512_mask_max_ps(top, m, x, top);     // the second, if one of them is NaN
    }
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first_of(n - i);
        __m512 e = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, z + i), top));
        _mm512_mask_storeu_ps(z + i, m, e);
        lanes = _mm512_mask_add_ps(lanes, m, lanes, e);
    }
    __m512 all = _mm512_set1_ps(sum(lanes));
    for (int i = 0; i < n; i += 16) {
        __mmask16 m = first_of(n - i);
        _mm512_mask_storeu_ps(z + i, m, _mm512_div_ps(_mm512_maskz_loadu_ps(m, z + i), all));
    }
}

AVX512_ENTRY void silu_times(float* gate, const float* up, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 z = _mm512_loadu_ps(gate + i), e = exp16(_mm512_xor_ps(z, _mm512_set1_ps(-0.0f)));
        __m512 y = _mm512_div_ps(z, _mm512_add_ps(_mm512_set1_ps(1), e));
        _mm512_storeu_ps(gate + i, _mm512_mul_ps(y, _mm512_loadu_ps(up + i)));
    }
    silu_times_plain(gate + i, up + i, n - i);
}

}  // namespace avx512
#endif

// =================================================================================================
// Appendix L. Fast integers: AVX-512
// =================================================================================================
//
// And for bytes? One instruction (VNNI) multiplies 64 pairs of them and adds each four to a sum. For few
// tokens here are the formats of the common files; Q2_K, Q3_K and Q5_K take appendix E's way.

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
namespace avx512 {

// -- L.1  integers: one row, a few tokens --------------------------------------------------------

AVX512 __m512i all8(char v) { return _mm512_set1_epi8(v); }
AVX512 __m512i twice(const std::byte* p) { return _mm512_broadcast_i64x4(load256(p)); }
AVX512 __m512i quarters(int a, int b, int c, int d) { return _mm512_set4_epi32(d, c, b, a); }
AVX512 __m512i halves(int64_t low, int64_t high) {
    return _mm512_setr_epi64(low, low, low, low, high, high, high, high);
}
constexpr int64_t TWO_32 = 0x0000000100000001, FOUR_16 = 0x0001000100010001;   // factors that repeat
// The lower half shifted by `low` bits, the upper by `high`, and masked.
AVX512 __m512i shifted_right(__m512i v, int low, int high, char mask) {
    return _mm512_and_si512(_mm512_srlv_epi32(v, halves(low * TWO_32, high * TWO_32)), all8(mask));
}

// The sums of eight blocks. v[i]: eight numbers of block 2 i, eight of block 2 i + 1
AVX512 __m256i sum8(const __m512i (&v)[4]) {
    __m512i two[2];
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                  _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    __m512i four =
        _mm512_add_epi32(_mm512_unpacklo_epi64(two[0], two[1]), _mm512_unpackhi_epi64(two[0], two[1]));
    four = _mm512_shuffle_i64x2(four, four, 0xD8);
    __m256i all = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    return _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
// Eight numbers of each of two blocks, of sixteen each.
AVX512 __m512i pair_of(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
}

// Eight blocks of a row from p on, or the `count` that are left, times T vectors x. COUNT: `count` where that
// is worth code of its own, or 0.
template <Dtype D, int T, int COUNT> struct EightBlocks {
    static constexpr int VALUES = format_of(D).values, BYTES = format_of(D).bytes;
    const std::byte* p;
    const IntRows x;
    const int count;
    __m512i sum[T][4], minimum[T][4];      // of two blocks each
    __m128i d, m{};                        // f16

    AVX512 EightBlocks(const std::byte* p, const IntRows& x, int count) : p(p), x(x), count(count) {}

    AVX512 bool has(int k) const { return k < (COUNT ? COUNT : count); }
    // The halves of a register in which blocks 2 i and 2 i + 1 are.
    AVX512 __mmask16 both(int i) const { return has(2 * i + 1) ? ALL : has(2 * i) ? 0xFF : 0; }
    AVX512 const int8_t* values(int t, int k) const { return x.q + t * x.n + k * VALUES; }
    AVX512 const int16_t* sums(int t, int k) const { return x.sums + (t * x.n + k * VALUES) / GROUP; }

    // The halves of the blocks from `place` on.
    AVX512 __m128i collect(int place) const {
        uint64_t bits[2] = {};
        UNROLL for (int k = 0; k < BLOCK_LANES; k++)
            if (has(k)) bits[k / 4] |= uint64_t(load<uint16_t>(p + k * BYTES + place)) << 16 * (k % 4);
        return _mm_set_epi64x(int64_t(bits[1]), int64_t(bits[0]));
    }

    // Blocks 2 i and 2 i + 1 of 32 values each, with their offset (chapter 2.3).
    AVX512 __m512i two_blocks(int i) const {
        constexpr bool FIVE = D == Dtype::Q5_0 || D == Dtype::Q5_1;
        const std::byte *first = p + 2 * i * BYTES + (has_minimums(D) ? 4 : 2), *second = first + BYTES;
        if constexpr (D == Dtype::Q8_0) {
            __m512i w = _mm512_setzero_si512();
            if (has(2 * i)) w = _mm512_zextsi256_si512(load256(first));
            if (has(2 * i + 1)) w = _mm512_inserti64x4(w, load256(second), 1);
            return _mm512_xor_si512(w, all8(char(offset_of(D))));
        }
        __m256i a = _mm256_setzero_si256(), b = a;
        if (has(2 * i)) a = _mm256_broadcastsi128_si256(avx2::load128(first + (FIVE ? 4 : 0)));
        if (has(2 * i + 1)) b = _mm256_broadcastsi128_si256(avx2::load128(second + (FIVE ? 4 : 0)));
        constexpr int64_t SHIFT = 4 * TWO_32;
        __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        q = _mm512_srlv_epi32(q, _mm512_setr_epi64(0, 0, SHIFT, SHIFT, 0, 0, SHIFT, SHIFT));
        q = _mm512_and_si512(q, all8(15));
        if (!FIVE) return q;
        uint64_t bits = has(2 * i) ? load<uint32_t>(first) : 0;
        if (has(2 * i + 1)) bits |= uint64_t(load<uint32_t>(second)) << 32;
        return _mm512_or_si512(q, _mm512_maskz_set1_epi8(bits, 16));
    }
    AVX512 void add_blocks_of_32() {
        d = collect(0);
        if (has_minimums(D)) m = collect(2);
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i w = two_blocks(i);
            for (int t = 0; t < T; t++) {
                __m512i xs = _mm512_maskz_loadu_epi32(both(i), values(t, 2 * i));
                sum[t][i] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, xs);
            }
        }
    }

    // Weights 128 i .. 128 i + 128 of block k, with their offset, times their scales. Sums of four products
    // fit in 16 bits: four from the first half of the weights, four from the second, and so on.
    AVX512 void add_128(__m512i (&v)[T], int k, int i, const __m512i (&w)[2], __m512i scales) const {
        for (int t = 0; t < T; t++) {
            __m512i four[2];
            UNROLL for (int j = 0; j < 2; j++)
                four[j] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[j],
                                              load512(values(t, k) + 128 * i + 64 * j));
            v[t] = _mm512_dpwssd_epi32(v[t], _mm512_packs_epi32(four[0], four[1]), scales);
        }
    }

    // Scales and minimums of eight groups (unpack_six_bits) of four blocks, a quarter of the register each.
    AVX512 static __m512i six_bits(__m512i header) {
        constexpr int SIX = 0x3F3F3F3F, FOUR = 0x0F0F0F0F, TWO = 0x30303030;
        __m512i low = _mm512_shuffle_epi32(header, _MM_PERM_ENUM(0xED));
        __m512i high = _mm512_srli_epi32(_mm512_shuffle_epi32(header, _MM_PERM_ENUM(0x84)), 2);
        low = _mm512_srlv_epi32(low, quarters(0, 0, 0, 4));
        return _mm512_or_si512(_mm512_and_si512(low, quarters(SIX, FOUR, SIX, FOUR)),
                               _mm512_and_si512(high, quarters(0, TWO, 0, TWO)));
    }
    AVX512 void add_q4_k() {
        __m512i header[2], six[2];
        UNROLL for (int g = 0; g < 2; g++) {
            __m128i h[4] = {};
            UNROLL for (int k = 0; k < 4; k++)
                if (has(4 * g + k)) h[k] = avx2::load128(p + (4 * g + k) * BYTES);
            header[g] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(h[1], h[0])),
                                           _mm256_set_m128i(h[3], h[2]), 1);
            six[g] = six_bits(header[g]);
        }
        __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
        __m256i d_and_m = _mm512_castsi512_si256(_mm512_permutex2var_epi32(header[0], first, header[1]));
        d = _mm256_cvtepi32_epi16(d_and_m), m = _mm256_cvtepi32_epi16(_mm256_srli_epi32(d_and_m, 16));
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i v[2][T];
            UNROLL for (int h = 0; h < 2; h++) {
                for (int t = 0; t < T; t++) v[h][t] = _mm512_setzero_si512();
                if (has(2 * i + h)) add_q4_k_block(v[h], 2 * i + h, six[i / 2]);
            }
            __m512i two = i % 2 ? _mm512_shuffle_i64x2(six[i / 2], six[i / 2], 0xFA)
                                : _mm512_shuffle_i64x2(six[i / 2], six[i / 2], 0x50);
            constexpr int64_t A = 0x8009800980088008, B = A + 0x0002000200020002, C = B + 0x0002000200020002,
                              E = C + 0x0002000200020002;
            two = _mm512_shuffle_epi8(two, _mm512_setr_epi64(A, B, C, E, A, B, C, E));   // each twice
            for (int t = 0; t < T; t++) {
                sum[t][i] = pair_of(v[0][t], v[1][t]);
                minimum[t][i] = _mm512_madd_epi16(two, _mm512_maskz_loadu_epi32(both(i), sums(t, 2 * i)));
            }
        }
    }
    AVX512 void add_q4_k_block(__m512i (&v)[T], int k, __m512i six) const {
        const int q = k % 4 * 4;
        __m512i mine = _mm512_permutexvar_epi32(quarters(q, q + 1, q + 2, q + 3), six);
        UNROLL for (int i = 0; i < 2; i++) {
            int64_t a = int64_t(uint64_t(0x8000 + 4 * i) * FOUR_16), b = a + FOUR_16, c = b + FOUR_16;
            __m512i order = _mm512_setr_epi64(a, c, a, c, b, c + FOUR_16, b, c + FOUR_16), w[2];
            UNROLL for (int j = 0; j < 2; j++)
                w[j] = shifted_right(twice(p + k * BYTES + 16 + 64 * i + 32 * j), 0, 4, 15);
            add_128(v, k, i, w, _mm512_shuffle_epi8(mine, order));
        }
    }

    AVX512 void add_q6_k() {
        d = collect(place_of_d(D));
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i v[2][T];
            UNROLL for (int h = 0; h < 2; h++) {
                for (int t = 0; t < T; t++) v[h][t] = _mm512_setzero_si512();
                if (has(2 * i + h)) add_q6_k_block(v[h], 2 * i + h);
            }
            for (int t = 0; t < T; t++) sum[t][i] = pair_of(v[0][t], v[1][t]);
        }
    }
    // Of 16 scales, the eight of the weights from 128 i on, as add_128 wants them.
    AVX512 static __m512i eight_scales(__m512i scales, int i) {
        int64_t a = 8 * i * FOUR_16, b = a + FOUR_16, c = b + FOUR_16, e = c + FOUR_16, half = 4 * FOUR_16;
        __m512i order = _mm512_setr_epi64(a, a + half, b, b + half, c, c + half, e, e + half);
        return _mm512_permutexvar_epi16(order, scales);
    }
    AVX512 void add_q6_k_block(__m512i (&v)[T], int k) const {
        const std::byte* block = p + k * BYTES;
        __m256i scale = _mm256_cvtepi8_epi16(avx2::load128(block + 192));
        __m256i offset = _mm256_mullo_epi16(scale, avx2::all16(-offset_of(D)));
        __m512i scales = _mm512_castsi256_si512(scale);
        for (int t = 0; t < T; t++)
            v[t] = _mm512_zextsi256_si512(_mm256_madd_epi16(offset, load256(sums(t, k))));
        UNROLL for (int i = 0; i < 2; i++) {
            __m512i low = load512(block + 64 * i), high = twice(block + 128 + 32 * i);
            __m512i w[2] = {_mm512_and_si512(low, all8(15)), shifted_right(low, 4, 4, 15)};
            w[0] = _mm512_or_si512(w[0], shifted_right(_mm512_slli_epi16(high, 4), 0, 2, 48));
            w[1] = _mm512_or_si512(w[1], shifted_right(high, 0, 2, 48));
            add_128(v, k, i, w, eight_scales(scales, i));
        }
    }

    AVX512 void add_to(__m256 (&lane)[T]) {
        if constexpr (of_32(D)) add_blocks_of_32();
        else if constexpr (D == Dtype::Q4_K) add_q4_k();
        else add_q6_k();
        __m256 ds = _mm256_cvtph_ps(d), ms = _mm256_cvtph_ps(m);
        const __mmask8 blocks = __mmask8((1 << (COUNT ? COUNT : count)) - 1);
        for (int t = 0; t < T; t++) {
            __m256 dx = _mm256_maskz_loadu_ps(blocks, x.d + t * (x.n / VALUES));
            __m256i total = sum8(sum[t]), minimums = _mm256_setzero_si256();
            if constexpr (of_32(D)) {
                __m256i two = _mm256_maskz_loadu_epi32(blocks, sums(t, 0));
                minimums = _mm256_madd_epi16(two, avx2::all16(offset_of(D) ? offset_of(D) : -1));
                if (offset_of(D)) total = _mm256_sub_epi32(total, minimums);
            } else if constexpr (has_minimums(D)) {
                minimums = sum8(minimum[t]);
            }
            lane[t] = _mm256_fmadd_ps(_mm256_mul_ps(ds, dx), _mm256_cvtepi32_ps(total), lane[t]);
            if (!has_minimums(D)) continue;
            lane[t] = _mm256_fnmadd_ps(_mm256_mul_ps(ms, dx), _mm256_cvtepi32_ps(minimums), lane[t]);
        }
    }
};

// The last blocks of a row, fewer than eight. Rows of 1,536 numbers have only six of 256.
template <Dtype D, int T, int COUNT = 1>
AVX512 void add_rest(__m256 (&lane)[T], const std::byte* p, const IntRows& x, int count) {
    if constexpr (of_32(D) || T > 1) EightBlocks<D, T, 0>(p, x, count).add_to(lane);
    else if (count == COUNT) EightBlocks<D, T, COUNT>(p, x, count).add_to(lane);
    else if constexpr (COUNT < BLOCK_LANES - 1) add_rest<D, T, COUNT + 1>(lane, p, x, count);
}

template <Dtype D, int T>
AVX512 void int_row(float* out, int64_t stride, const IntRows& x, const std::byte* p) {
    // Measured (Zen 4): Q8_0 is read faster if fetched from 8 KB away, Q4_K and Q6_K from 4.
    constexpr int BYTES = format_of(D).bytes, FETCH = D == Dtype::Q8_0 ? 2 * AHEAD : AHEAD;
    int blocks = x.n / format_of(D).values, b = 0;
    __m256 lane[T];
    for (int t = 0; t < T; t++) lane[t] = _mm256_setzero_ps();
    for (; b + BLOCK_LANES <= blocks; b += BLOCK_LANES, p += BLOCK_LANES * BYTES) {
        for (int i = 0; i < BLOCK_LANES * BYTES; i += 64) prefetch(p + FETCH + i);
        EightBlocks<D, T, BLOCK_LANES>(p, x.at(0, b), BLOCK_LANES).add_to(lane);
    }
    if (b < blocks) {
        for (int i = 0; i < (blocks - b) * BYTES; i += 64) prefetch(p + FETCH + i);
        add_rest<D, T>(lane, p, x.at(0, b), blocks - b);
    }
    for (int t = 0; t < T; t++) out[t * stride] = avx2::sum_block_lanes(lane[t]);
}

// One function, not one for each row: it loads its constants once.
template <Dtype D, int T>
AVX512_ENTRY void row_by_row(Rows out, const IntRows& x, const Matrix& w, int begin, int end) {
    const std::byte* p = w.row(begin);
    const int64_t bytes = w.row(1) - w.row(0);
    for (int r = begin; r < end; r++, p += bytes) int_row<D, T>(out[0] + r, out.stride, x, p);
}
template <Dtype D>
void few_tokens_int(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    if (T == 1) row_by_row<D, 1>(out, x, w, begin, end);
    if (T == 2) row_by_row<D, 2>(out, x, w, begin, end);
    if (T == 3) row_by_row<D, 3>(out, x, w, begin, end);
}

inline void few_ints(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    switch (w.dtype) {
    case Dtype::Q4_0: return few_tokens_int<Dtype::Q4_0>(out, x, w, T, begin, end);
    case Dtype::Q4_1: return few_tokens_int<Dtype::Q4_1>(out, x, w, T, begin, end);
    case Dtype::Q5_0: return few_tokens_int<Dtype::Q5_0>(out, x, w, T, begin, end);
    case Dtype::Q5_1: return few_tokens_int<Dtype::Q5_1>(out, x, w, T, begin, end);
    case Dtype::Q8_0: return few_tokens_int<Dtype::Q8_0>(out, x, w, T, begin, end);
    case Dtype::Q4_K: return few_tokens_int<Dtype::Q4_K>(out, x, w, T, begin, end);
    case Dtype::Q6_K: return few_tokens_int<Dtype::Q6_K>(out, x, w, T, begin, end);
    default: return avx2::int_rows(out, x, w, T, begin, end);
    }
}

// -- L.2  integers: a block of rows, many tokens -------------------------------------------------

// The sums of 32 rows with T vectors.
template <int T> struct IntSums {
    __m512i v[T][2];

    AVX512 void clear() {
        for (int t = 0; t < T; t++) v[t][0] = v[t][1] = _mm512_setzero_si512();
    }
    // += 4 n columns of bytes, of which w is unsigned; x: (T, stride)
    AVX512 void add_bytes(const std::byte* w, const int8_t* x, int64_t stride, int n) {
        for (int i = 0; i < n; i++, w += 4 * INT_ROWS, x += 4) {
            __m512i low = load512(w), high = load512(w + 64);
            for (int t = 0; t < T; t++) {
                __m512i xt = constant(load<int32_t>(x + t * stride));
                v[t][0] = _mm512_dpbusd_epi32(v[t][0], low, xt);
                v[t][1] = _mm512_dpbusd_epi32(v[t][1], high, xt);
            }
        }
    }
    // += 2 n columns of 16 bits
    AVX512 void add_pairs(const int32_t* w, const int16_t* x, int64_t stride, int n) {
        for (int i = 0; i < n; i++, w += INT_ROWS, x += 2) {
            __m512i low = load512(w), high = load512(w + 16);
            for (int t = 0; t < T; t++) {
                __m512i xt = constant(load<int32_t>(x + t * stride));
                v[t][0] = _mm512_dpwssd_epi32(v[t][0], low, xt);
                v[t][1] = _mm512_dpwssd_epi32(v[t][1], high, xt);
            }
        }
    }
};

// lane + (d dx) v, of 16 rows
AVX512 __m512 add_scaled(__m512 lane, __m512 d, float dx, __m512i v) {
    return _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(dx)), _mm512_cvtepi32_ps(v), lane);
}

// Block b of the rows times T vectors; x: their block b
template <Dtype D, int T>
AVX512 void sum_block(IntSums<T>& sum, IntSums<T>& minimum, const IntBlock& block, int b, const IntRows& x) {
    constexpr int VALUES = format_of(D).values, SAME_SCALE = D == Dtype::Q4_K || D == Dtype::Q5_K ? 32 : 16;
    const std::byte* w = block.w + int64_t(b) * VALUES * INT_ROWS;
    sum.clear(), minimum.clear();
    if constexpr (of_32(D)) {
        for (int t = 0; t < T; t++) {
            int total = x.sums[2 * t] + x.sums[2 * t + 1];
            if (offset_of(D)) sum.v[t][0] = sum.v[t][1] = constant(-offset_of(D) * total);
            else minimum.v[t][0] = minimum.v[t][1] = constant(-total);
        }
        sum.add_bytes(w, x.q, VALUES, VALUES / 4);
    } else {
        minimum.add_pairs(block.minimum + int64_t(b) * (GROUP / 2) * INT_ROWS, x.sums, GROUP, GROUP / 2);
        for (int i = 0; i < VALUES; i += SAME_SCALE) {
            IntSums<T> part;
            part.clear();
            part.add_bytes(w + int64_t(i) * INT_ROWS, x.q + i, VALUES, SAME_SCALE / 4);
            const int32_t* scale = block.scale + (int64_t(b) * GROUP + i / GROUP) * INT_ROWS;
            for (int h = 0; h < 2; h++) {
                __m512i s = load512(scale + 16 * h);
                for (int t = 0; t < T; t++)
                    sum.v[t][h] = _mm512_add_epi32(sum.v[t][h], _mm512_mullo_epi32(part.v[t][h], s));
            }
        }
        for (int t = 0; t < T && offset_of(D); t++)
            for (int h = 0; h < 2; h++) sum.v[t][h] = _mm512_sub_epi32(sum.v[t][h], minimum.v[t][h]);
    }
}

// avx2::Tile8
struct Tile16 {
    static constexpr int tokens(Dtype d) { return of_32(d) ? 8 : 4; }

    template <Dtype D, int T>
    AVX512_ENTRY static void tile(const IntBlock& block, int b, const IntRows& x, float* lane) {
        IntSums<T> sum, minimum;
        sum_block<D, T>(sum, minimum, block, b, x);
        for (int h = 0; h < 2; h++) {
            int at = b * INT_ROWS + 16 * h;
            __m512 d = _mm512_load_ps(block.d + at), m = _mm512_setzero_ps();
            if (has_minimums(D)) m = _mm512_sub_ps(_mm512_set1_ps(-0.0f), _mm512_load_ps(block.m + at));
            for (int t = 0; t < T; t++) {
                float* out = lane + t * INT_ROWS + 16 * h;
                __m512 y = b < BLOCK_LANES ? _mm512_setzero_ps() : _mm512_load_ps(out);
                y = add_scaled(y, d, x.d[t], sum.v[t][h]);
                if (has_minimums(D)) y = add_scaled(y, m, x.d[t], minimum.v[t][h]);
                _mm512_store_ps(out, y);
            }
        }
    }
};

inline void int_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    if (T < MANY_TOKENS) few_ints(out, x, w, T, begin, end);
    else avx2::many_ints<Tile16>(out, x, w, T, begin, end);
}

}  // namespace avx512
#endif

// =================================================================================================
// Appendix M. Fast CPU: many tokens
// =================================================================================================
//
// And when many tokens are multiplied in floats? In a tile of A.3 a register holds the lanes of one sum, and
// 12 products need 7 registers loaded. Here that is turned around: a register holds one lane of the sums of
// 8 or 16 rows, and one number of x, repeated, meets them all. A lane's products come one after the other,
// so weights and x are arranged by lanes: number i of a row is number i / 16 of lane i mod 16.

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
namespace avx2 {

// -- M.1  arranging ------------------------------------------------------------------------------

constexpr int WIDE_ROWS = 48, WIDE_TOKENS = 128;
constexpr int WIDE_PLANE = WIDE_TOKENS * WIDE_ROWS, WIDE_PLANES = std::bit_width(unsigned(LANES));

// Numbers of a row of n that are in a lane.
inline int steps_of(int n, int lane) { return (n - lane + LANES - 1) / LANES; }

inline void arrange(float* out, ConstRows x, int T, int n) {
    int64_t lane = int64_t(arranged_lane(n));
    int whole = T == ARRANGED_TOKENS ? n / LANES * LANES : 0;
    for (int i = 0; i < whole; i += 8)
        transpose8(out + i % LANES * lane + i / LANES * ARRANGED_TOKENS, 4 * lane, x[0] + i, 4 * x.stride);
    for (int t = 0; t < T; t++)
        for (int i = whole; i < n; i++)
            out[i % LANES * lane + i / LANES * ARRANGED_TOKENS + t] = x[t][i];
}

struct WideBlock {
    int64_t lane, row_size;
    float* w;       // (LANES, steps, WIDE_ROWS), the lanes `lane` apart
    float* row;     // (8, row_size): before they are arranged
    float* scale;   // (cols / SCALE_BLOCK, WIDE_ROWS): of e4m3
    float* sum;     // (WIDE_PLANES, WIDE_TOKENS, WIDE_ROWS)

    WideBlock(std::vector<std::byte>& memory, int cols) {
        row_size = steps_of(cols, 0) * LANES, lane = row_size / LANES * WIDE_ROWS + 16;
        take_from(memory, [&](Arena& arena) {
            w = arena.take<float>(LANES * size_t(lane)), row = arena.take<float>(8 * size_t(row_size));
            scale = arena.take<float>(size_t(cols / SCALE_BLOCK + 1) * WIDE_ROWS);
            sum = arena.take<float>(WIDE_PLANES * WIDE_PLANE);
        });
    }
    // R rows from `first` on. What stands in the other rows is of no account.
    void pack(const Matrix& m, int first, int R) const {
        for (int r = 0; r < R; r++) {
            widen_part(row + r % 8 * row_size, m, first + r, 0, m.cols);
            for (int b = 0; m.dtype == Dtype::F8_E4M3 && b * SCALE_BLOCK < m.cols; b++)
                scale[b * WIDE_ROWS + r] = load<float>(m.scale_row(first + r) + 4 * size_t(b));
            if (r % 8 < 7 && r + 1 < R) continue;
            for (int64_t i = 0; i < row_size; i += 8)
                transpose8(w + i % LANES * lane + i / LANES * WIDE_ROWS + r / 8 * 8, 4 * lane, row + i,
                           4 * row_size);
        }
    }
};

// -- M.2  tiles ----------------------------------------------------------------------------------

// What a tile is to do: to add `steps` products of a lane to its sums, or to begin them, and then to add the
// sums of other lanes from that many planes before; the result is in the first of these planes. It comes by
// reference: a copy, read in wider pieces than were written, would wait for the stores of the tile before.
struct WideStep {
    float* sum;                            // (T, WIDE_ROWS)
    const float *w, *x, *scale, *next;     // next: the x of the tile after this one
    int steps;
    bool first;
    int planes;
};

// v[r][t] += 8 rows from 8 r on times vector t
template <int R, int T>
AVX2 void add_steps(__m256 (&v)[R][T], const float* w, const float* x, const float* next, int steps) {
    for (int k = 0; k < steps; k++, w += WIDE_ROWS, x += ARRANGED_TOKENS, next += ARRANGED_TOKENS) {
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
        __m256 wk[R];
        UNROLL for (int r = 0; r < R; r++) wk[r] = _mm256_loadu_ps(w + 8 * r);
        UNROLL for (int t = 0; t < T; t++) {
            __m256 xt = _mm256_broadcast_ss(x + t);
            UNROLL for (int r = 0; r < R; r++) v[r][t] = _mm256_fmadd_ps(wk[r], xt, v[r][t]);
        }
    }
}

// R registers of rows, T vectors; with scales, those of each SCALE_BLOCK apart
template <int R, int T, bool SCALED> AVX2_ENTRY void wide_tile(const WideStep& step) {
    WideStep s = step;
    __m256 v[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++)
            v[r][t] = s.first ? _mm256_setzero_ps() : _mm256_loadu_ps(s.sum + t * WIDE_ROWS + 8 * r);
    if (!SCALED) add_steps(v, s.w, s.x, s.next, s.steps);
    constexpr int AT_ONCE = SCALE_BLOCK / LANES;
    for (; SCALED && s.steps > 0; s.steps -= AT_ONCE, s.scale += WIDE_ROWS) {
        __m256 part[R][T];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) part[r][t] = _mm256_setzero_ps();
        add_steps(part, s.w, s.x, s.next, std::min(s.steps, AT_ONCE));
        s.w += AT_ONCE * WIDE_ROWS, s.x += AT_ONCE * ARRANGED_TOKENS, s.next += AT_ONCE * ARRANGED_TOKENS;
        UNROLL for (int r = 0; r < R; r++) {
            __m256 scale = _mm256_loadu_ps(s.scale + 8 * r);
            UNROLL for (int t = 0; t < T; t++) v[r][t] = _mm256_fmadd_ps(scale, part[r][t], v[r][t]);
        }
    }
    for (; s.planes > 0; s.planes--) {
        s.sum -= WIDE_PLANE;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++)
                v[r][t] = _mm256_add_ps(_mm256_loadu_ps(s.sum + t * WIDE_ROWS + 8 * r), v[r][t]);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) _mm256_storeu_ps(s.sum + t * WIDE_ROWS + 8 * r, v[r][t]);
}

using WideTile = void (*)(const WideStep&);
struct WideTiles {
    int rows, tokens, scaled_tokens;                   // of the largest; tokens divide ARRANGED_TOKENS
    WideTile (*of)(bool scaled, int rows, int T);
    void (*pack)(const WideBlock& block, const Matrix& m, int first, int R);
};

template <size_t... I> WideTile wide_tile_of(bool scaled, int R, int T, std::index_sequence<I...>) {
    static constexpr WideTile PLAIN[] = {wide_tile<I / 4 + 1, I % 4 + 1, false>...};
    static constexpr WideTile SCALED[] = {wide_tile<I / 4 + 1, I % 4 % 2 + 1, true>...};
    return (scaled ? SCALED : PLAIN)[(R - 1) * 4 + T - 1];
}
inline WideTile wide_tile_of(bool scaled, int rows, int T) {
    return wide_tile_of(scaled, (rows + 7) / 8, T, std::make_index_sequence<12>());
}

// -- M.3  blocks ---------------------------------------------------------------------------------

// The lane whose turn it is, of R packed rows times T <= WIDE_TOKENS vectors. The planes of sums are a stack:
// as lanes come in the order of their bits read backwards, each finds on it what the tree of sum_lanes adds
// it to. Of a long row as much is taken at once as stays in the first cache for all vectors.
inline void wide_lane(const WideTiles& tiles, const WideBlock& block, const float* x, const Matrix& w,
                      unsigned turn, int R, int T) {
    constexpr int AT_ONCE = 128;
    static_assert(LANES == 16);
    const int lane = int((turn & 1) * 8 + (turn & 2) * 2 + (turn & 4) / 2 + (turn & 8) / 8);
    const int plane = std::popcount(turn), add = std::countr_one(turn);
    bool scaled = w.dtype == Dtype::F8_E4M3;
    const int tokens = scaled ? tiles.scaled_tokens : tiles.tokens, steps = steps_of(w.cols, lane);
    auto at = [&](int t, int k) {
        const float* group = x + size_t(t / ARRANGED_TOKENS) * arranged_size(w.cols);
        return group + size_t(lane) * arranged_lane(w.cols) + k * ARRANGED_TOKENS + t % ARRANGED_TOKENS;
    };
    for (int k = 0; k == 0 || k < steps; k += AT_ONCE) {
        WideStep s{};
        s.steps = std::min(steps - k, AT_ONCE), s.first = k == 0, s.planes = k + AT_ONCE < steps ? 0 : add;
        for (int t = 0; t < T; t += tokens) {
            s.x = at(t, k), s.next = t + tokens < T ? at(t + tokens, k) : at(0, k + s.steps);
            for (int r = 0; r < R; r += tiles.rows) {
                s.sum = block.sum + plane * WIDE_PLANE + t * WIDE_ROWS + r;
                s.w = block.w + lane * block.lane + k * WIDE_ROWS + r;
                s.scale = block.scale + k / (SCALE_BLOCK / LANES) * WIDE_ROWS + r;
                tiles.of(scaled, std::min(tiles.rows, R - r), std::min(tokens, T - t))(s);
            }
        }
    }
}

// The packed rows, R of them from `first` on, times T <= WIDE_TOKENS vectors.
inline void wide_block(const WideTiles& tiles, const WideBlock& block, Rows out, const float* x,
                       const Matrix& w, int first, int R, int T) {
    for (unsigned turn = 0; turn < LANES; turn++) wide_lane(tiles, block, x, w, turn, R, T);
    for (int t = 0; t < T; t++) std::copy_n(block.sum + t * WIDE_ROWS, R, out[t] + first);
}

inline void arranged_rows(const WideTiles& tiles, Rows out, const float* x, const Matrix& w, int T, int begin,
                          int end) {
    thread_local std::vector<std::byte> memory;
    WideBlock block(memory, w.cols);
    for (int r = begin; r < end; r += WIDE_ROWS) {
        int R = std::min(WIDE_ROWS, end - r);
        tiles.pack(block, w, r, R);
        for (int t = 0; t < T; t += WIDE_TOKENS) {
            const float* xt = x + size_t(t / ARRANGED_TOKENS) * arranged_size(w.cols);
            wide_block(tiles, block, {out[t], out.stride}, xt, w, r, R, std::min(WIDE_TOKENS, T - t));
        }
    }
}
inline void arranged_rows(Rows out, const float* x, const Matrix& w, int T, int begin, int end) {
    auto pack = [](const WideBlock& block, const Matrix& m, int first, int R) { block.pack(m, first, R); };
    static constexpr WideTiles TILES = {24, 4, 2, wide_tile_of, pack};   // 12 sums
    arranged_rows(TILES, out, x, w, T, begin, end);
}

}  // namespace avx2

namespace avx512 {

// -- M.4  tiles of AVX-512 -----------------------------------------------------------------------

using avx2::WIDE_ROWS, avx2::WideTile;

// v[r][t] += 16 rows from 16 r on times vector t
template <int R, int T>
AVX512 void add_steps(__m512 (&v)[R][T], const float* w, const float* x, const float* next, int steps) {
    for (int k = 0; k < steps; k++, w += WIDE_ROWS, x += ARRANGED_TOKENS, next += ARRANGED_TOKENS) {
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
        __m512 wk[R];
        UNROLL for (int r = 0; r < R; r++) wk[r] = _mm512_loadu_ps(w + 16 * r);
        UNROLL for (int t = 0; t < T; t++) {
            __m512 xt = _mm512_set1_ps(x[t]);
            UNROLL for (int r = 0; r < R; r++) v[r][t] = _mm512_fmadd_ps(wk[r], xt, v[r][t]);
        }
    }
}

// avx2::wide_tile
template <int R, int T, bool SCALED> AVX512_ENTRY void wide_tile(const avx2::WideStep& step) {
    avx2::WideStep s = step;
    __m512 v[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++)
            v[r][t] = s.first ? _mm512_setzero_ps() : _mm512_loadu_ps(s.sum + t * WIDE_ROWS + 16 * r);
    if (!SCALED) add_steps(v, s.w, s.x, s.next, s.steps);
    constexpr int AT_ONCE = SCALE_BLOCK / LANES;
    for (; SCALED && s.steps > 0; s.steps -= AT_ONCE, s.scale += WIDE_ROWS) {
        __m512 part[R][T];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) part[r][t] = _mm512_setzero_ps();
        add_steps(part, s.w, s.x, s.next, std::min(s.steps, AT_ONCE));
        s.w += AT_ONCE * WIDE_ROWS, s.x += AT_ONCE * ARRANGED_TOKENS, s.next += AT_ONCE * ARRANGED_TOKENS;
        UNROLL for (int r = 0; r < R; r++) {
            __m512 scale = _mm512_loadu_ps(s.scale + 16 * r);
            UNROLL for (int t = 0; t < T; t++) v[r][t] = _mm512_fmadd_ps(scale, part[r][t], v[r][t]);
        }
    }
    for (; s.planes > 0; s.planes--) {
        s.sum -= avx2::WIDE_PLANE;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++)
                v[r][t] = _mm512_add_ps(_mm512_loadu_ps(s.sum + t * WIDE_ROWS + 16 * r), v[r][t]);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) _mm512_storeu_ps(s.sum + t * WIDE_ROWS + 16 * r, v[r][t]);
}

template <size_t... I> WideTile wide_tile_of(bool scaled, int R, int T, std::index_sequence<I...>) {
    static constexpr WideTile PLAIN[] = {wide_tile<I / 8 + 1, I % 8 + 1, false>...};
    static constexpr WideTile SCALED[] = {wide_tile<I / 8 + 1, I % 8 % 4 + 1, true>...};
    return (scaled ? SCALED : PLAIN)[(R - 1) * 8 + T - 1];
}
inline WideTile wide_tile_of(bool scaled, int rows, int T) {
    return wide_tile_of(scaled, (rows + 15) / 16, T, std::make_index_sequence<24>());
}

// 16 rows of bytes, `stride` apart: to (columns / 4, 16, 4)
AVX512_ENTRY void transpose16(std::byte* out, const std::byte* in, int64_t stride, int columns) {
    for (int i = 0; i < columns; i += 16, in += 16, out += 256) {
        __m512i v[4], a[4];
        for (int k = 0; k < 4; k++) {
            const std::byte* p = in + k * stride;
            v[k] = _mm512_castsi128_si512(avx2::load128(p));
            v[k] = _mm512_inserti32x4(v[k], avx2::load128(p + 4 * stride), 1);
            v[k] = _mm512_inserti32x4(v[k], avx2::load128(p + 8 * stride), 2);
            v[k] = _mm512_inserti32x4(v[k], avx2::load128(p + 12 * stride), 3);
        }
        for (int k = 0; k < 2; k++) {
            a[k] = _mm512_unpacklo_epi32(v[2 * k], v[2 * k + 1]);
            a[k + 2] = _mm512_unpackhi_epi32(v[2 * k], v[2 * k + 1]);
        }
        for (int k = 0; k < 2; k++) {
            std::byte* to = out + 128 * k;
            _mm512_storeu_si512(to, _mm512_unpacklo_epi64(a[2 * k], a[2 * k + 1]));
            _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi64(a[2 * k], a[2 * k + 1]));
        }
    }
}

// WideBlock::pack. Rows of bf16 are transposed as pairs of columns, and widened then.
AVX512_ENTRY void pack_wide(const avx2::WideBlock& block, const Matrix& m, int first, int R) {
    if (m.dtype != Dtype::BF16 || m.cols % 32 != 0 || R % 16 != 0) return block.pack(m, first, R);
    alignas(64) std::byte pairs[16 * 64];
    for (int r = 0; r < R; r += 16) {
        const std::byte* row = m.row(first + r);
        for (int col = 0; col < m.cols; col += 32) {
            transpose16(pairs, row + 2 * int64_t(col), m.row(1) - m.row(0), 64);
            float* out = block.w + col / LANES * WIDE_ROWS + r;
            for (int i = 0; i < 16; i++) {
                __m512i two = load512(pairs + 64 * i);
                float* to = out + i / 8 * WIDE_ROWS + i % 8 * 2 * block.lane;
                _mm512_storeu_si512(to, _mm512_slli_epi32(two, 16));
                _mm512_storeu_si512(to + block.lane, _mm512_and_si512(two, constant(int(0xFFFF0000))));
            }
        }
    }
}

inline void arranged_rows(Rows out, const float* x, const Matrix& w, int T, int begin, int end) {
    static constexpr avx2::WideTiles TILES = {WIDE_ROWS, 8, 4, wide_tile_of, pack_wide};
    avx2::arranged_rows(TILES, out, x, w, T, begin, end);
}

}  // namespace avx512
#endif

// =================================================================================================
// Appendix N. Fast integers: AMX
// =================================================================================================
//
// A tile is a register of 16 rows of 64 bytes, and one instruction multiplies 16 vectors of 64 signed bytes
// with 16 rows of as many: 16384 products, where VNNI has 64. How are scales kept out of its way? In blocks
// of 256 they are whole numbers: a weight times its scale, of 14 bits at most, is cut in two bytes, 128 high
// + low, and a block is two sums. In blocks of 32 there is one scale a block, and half a tile stays empty.

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
#define AMX_TARGET AVX512_TARGET ",amx-tile,amx-int8,amx-bf16"
#define AMX __attribute__((target(AMX_TARGET), always_inline)) inline
#define AMX_ENTRY __attribute__((target(AMX_TARGET))) inline

namespace amx {

using avx2::INT_ROWS, avx2::INT_TOKENS, avx2::IntBlock, avx2::all16, avx2::has_minimums, avx2::of_32;
using avx2::offset_of, avx2::place_of_d, avx2::store256, avx512::add_scaled, avx512::constant;
using avx512::load512, avx512::transpose16;

constexpr int TILE = 16, ROW_BYTES = 64, TILE_BYTES = TILE * ROW_BYTES;

// -- N.1  weights for tiles ----------------------------------------------------------------------

// 32 weights, with their offset, from 32 i on: signed, or times their scales in low and high bytes.
template <Dtype D> struct SplitSink {
    std::byte* out;
    int64_t high;                          // bytes from the low ones to the high ones
    const avx2::Scales& s;

    AVX2 __m256i times_scale(__m128i w, int group) const {
        __m256i q = _mm256_sub_epi16(_mm256_cvtepu8_epi16(w), all16(offset_of(D)));
        return _mm256_mullo_epi16(q, all16(s.scale[group]));
    }
    AVX2 void operator()(int i, __m256i w) {
        if (of_32(D)) return store256(out + 32 * i, _mm256_sub_epi8(w, avx2::all8(offset_of(D))));
        __m256i a = times_scale(_mm256_castsi256_si128(w), 2 * i);
        __m256i b = times_scale(_mm256_extracti128_si256(w, 1), 2 * i + 1);
        __m256i low = _mm256_packs_epi16(_mm256_and_si256(a, all16(127)), _mm256_and_si256(b, all16(127)));
        __m256i top = _mm256_packs_epi16(_mm256_srai_epi16(a, 7), _mm256_srai_epi16(b, 7));
        store256(out + 32 * i, _mm256_permute4x64_epi64(low, 0xD8));
        store256(out + 32 * i + high, _mm256_permute4x64_epi64(top, 0xD8));
    }
};

// Minimums of blocks of 256 are multiplied in bf16, of which small whole numbers are: a sum of 16 x is cut in
// 16 high + low, and 32 bits hold both, or 16 times the minimum and the minimum. No sum of their products
// passes 2^24, so it is exact in f32.
template <Dtype D> constexpr bool PAIRED = has_minimums(D) && !of_32(D);

AVX512 __m512i bf16_pairs(__m512i first, __m512i second) {
    __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(first)), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(_mm512_cvtepi32_ps(second)));
}

// Of `blocks` blocks of vectors.
AVX512_ENTRY void pair_sums(int32_t* pairs, const IntRows& x, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        __m512i sum = _mm512_cvtepi16_epi32(avx2::load256(x.sums + b * GROUP));
        __m512i low = _mm512_and_si512(sum, constant(15)), high = _mm512_srai_epi32(sum, 4);
        _mm512_storeu_si512(pairs + b * GROUP, bf16_pairs(high, low));
    }
}

// block.row: (INT_ROWS, 1 or 2, cols)   block.scale: (blocks, INT_ROWS / TILE, 16, TILE), pairs
template <Dtype D> AVX512_ENTRY void split_row(IntBlock& block, int r, const std::byte* p, int cols) {
    constexpr int VALUES = format_of(D).values;
    const __m512i column =
        _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    std::byte* row = block.row + int64_t(r) * cols * (of_32(D) ? 1 : 2);
    for (int b = 0; b < cols / VALUES; b++, p += format_of(D).bytes) {
        block.d[b * INT_ROWS + r] = avx2::half_at(p + place_of_d(D));
        if (has_minimums(D)) block.m[b * INT_ROWS + r] = avx2::half_at(p + place_of_d(D) + 2);
        avx2::Scales s;
        if constexpr (!of_32(D)) avx2::scales<D>(s, p);
        SplitSink<D> sink{row + b * VALUES, cols, s};
        avx2::bytes<D>(p, sink);
        if constexpr (PAIRED<D>) {
            __m512i minimum = _mm512_cvtepi16_epi32(avx2::load256(s.minimum));
            int32_t* pairs = block.scale + (b * INT_ROWS + r / TILE * TILE) * TILE + r % TILE;
            _mm512_i32scatter_epi32(pairs, column, bf16_pairs(_mm512_slli_epi32(minimum, 4), minimum), 4);
        }
    }
}

// Bytes of a block of 16 rows: four times a tile of low and one of high bytes, or half a tile.
template <Dtype D> constexpr int64_t BLOCK_BYTES = of_32(D) ? TILE_BYTES / 2 : 8 * TILE_BYTES;

// R rows from `row` on. block.w: (blocks, INT_ROWS / TILE, BLOCK_BYTES)
template <Dtype D> void pack_tiles(IntBlock& block, const Matrix& w, int row, int R) {
    constexpr int VALUES = format_of(D).values, PLANES = of_32(D) ? 1 : 2, COLUMNS = of_32(D) ? 32 : 64;
    for (int r = 0; r < R; r++) split_row<D>(block, r, w.row(row + r), w.cols);
    const int64_t stride = int64_t(w.cols) * PLANES;
    std::byte* out = block.w;
    for (int i = 0; i < w.cols / VALUES * (INT_ROWS / TILE); i++) {
        const std::byte* in = block.row + i % 2 * TILE * stride + i / 2 * VALUES;
        for (int k = 0; k < VALUES * PLANES / COLUMNS; k++, out += TILE * COLUMNS)
            transpose16(out, in + k / PLANES * COLUMNS + k % PLANES * w.cols, stride, COLUMNS);
    }
}

// -- N.2  16 rows times 16 or 32 vectors ---------------------------------------------------------

// Vectors, and their sums in pairs.
struct Vectors {
    IntRows x;
    const int32_t* pairs;
    [[gnu::always_inline]] Vectors at(int t, int b) const {
        return {x.at(t, b), pairs + (t + int64_t(b) * x.together) * GROUP};
    }
};

// 16 rows times 16 vectors, of a block: or of its low, of its high bytes and, in f32, of its minimums.
template <Dtype D> struct alignas(64) Products {
    int32_t v[of_32(D) ? 1 : PAIRED<D> ? 3 : 2][TILE][TILE];
};

// Tiles of vectors that the same weights meet, at most.
template <Dtype D> constexpr int VECTOR_TILES = of_32(D) ? 2 : 1;

// Block b of the rows from h on times that block of `tiles` <= VECTOR_TILES<D> times 16 vectors. The tiles 0
// to 2 are sums, 4 and 5 vectors, 6 and 7 weights.
template <Dtype D>
AMX void multiply(Products<D>* c, const IntBlock& block, int b, int h, const Vectors& v, int tiles) {
    const int at = b * (INT_ROWS / TILE) + h / TILE;
    const std::byte* w = block.w + at * BLOCK_BYTES<D>;
    _tile_zero(0);
    if constexpr (of_32(D)) {
        _tile_loadd(4, v.x.q, 32);
        _tile_loadd(6, w, ROW_BYTES);
        _tile_dpbssd(0, 4, 6);
        _tile_stored(0, c[0].v[0], ROW_BYTES);
        if (tiles == 1) return;
        _tile_zero(1);
        _tile_loadd(5, v.at(TILE, 0).x.q, 32);
        _tile_dpbssd(1, 5, 6);
        _tile_stored(1, c[1].v[0], ROW_BYTES);
    } else {
        _tile_zero(1);
        UNROLL for (int i = 0; i < 4; i++, w += 2 * TILE_BYTES) {
            _tile_loadd(4, v.x.q + 64 * i, 256);
            _tile_loadd(6, w, ROW_BYTES);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, w + TILE_BYTES, ROW_BYTES);
            _tile_dpbssd(1, 4, 7);
        }
        _tile_stored(0, c->v[0], ROW_BYTES);
        _tile_stored(1, c->v[1], ROW_BYTES);
    }
    if constexpr (PAIRED<D>) {
        _tile_zero(2);
        _tile_loadd(4, v.pairs, ROW_BYTES);
        _tile_loadd(6, block.scale + at * TILE * TILE, ROW_BYTES);
        _tile_dpbf16ps(2, 4, 6);
        _tile_stored(2, c->v[2], ROW_BYTES);
    }
}

using Sums = __m512[2][TILE / 2];          // of 16 vectors, each with 16 rows

// y += block b of the rows from h on times 16 vectors, of which c has the products; x: their block b
template <Dtype D>
AVX512 void add(Sums& y, const IntBlock& block, int b, int h, const Products<D>& c, const IntRows& x) {
    const int at = b * INT_ROWS + h;
    __m512 d = _mm512_load_ps(block.d + at), m = _mm512_setzero_ps();
    if (has_minimums(D)) m = _mm512_sub_ps(_mm512_set1_ps(-0.0f), _mm512_load_ps(block.m + at));
    UNROLL for (int g = 0; g < 2; g++)
        UNROLL for (int k = 0; k < TILE / 2; k++) {
            const int t = g * TILE / 2 + k;
            __m512i sum = load512(c.v[0][t]);
            if constexpr (!of_32(D)) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(load512(c.v[1][t]), 7));
            y[g][k] = add_scaled(y[g][k], d, x.d[t], sum);
            if (!has_minimums(D)) continue;
            __m512 minimum;
            if constexpr (PAIRED<D>) minimum = _mm512_load_ps(c.v[2][t]);
            else minimum = _mm512_set1_ps(float(-(x.sums[2 * t] + x.sums[2 * t + 1])));
            y[g][k] = _mm512_fmadd_ps(_mm512_mul_ps(m, _mm512_set1_ps(x.d[t])), minimum, y[g][k]);
        }
}

AVX512 void add_sums(Sums& y, const float* p) {
    UNROLL for (int g = 0; g < 2; g++)
        UNROLL for (int k = 0; k < TILE / 2; k++)
            y[g][k] = _mm512_add_ps(y[g][k], _mm512_load_ps(p + (g * TILE / 2 + k) * TILE));
}
// The first R rows of the first T vectors, from `row` on.
AVX512 void put(Rows out, const Sums& y, int row, int R, int T) {
    UNROLL for (int g = 0; g < 2; g++)
        UNROLL for (int k = 0; k < TILE / 2; k++)
            if (g * TILE / 2 + k < T)
                _mm512_mask_storeu_ps(out[g * TILE / 2 + k] + row, avx512::first_of(R), y[g][k]);
}

// -- N.3  a block of rows, many vectors ----------------------------------------------------------

// Blocks b, b + 8 .. end of a lane: as many as stay, with their products, in the first cache.
struct LanePart {
    int b, end, depth, halves;             // sums on the stack; how many of them this one meets when done
    bool first, last, all;                 // first and last part of the lane; `all`: of the last lane
};
template <Dtype D> constexpr int PART_BLOCKS = of_32(D) ? 8 : 1;

// VECTOR_TILES<D> times 16 vectors from t on. First all products, then their sums: it takes a while until
// what a tile has stored can be read.
template <Dtype D>
AMX_ENTRY void add_part(const IntBlock& block, Rows out, const Vectors& v, int row, int R, int T, int t,
                        const LanePart& p) {
    constexpr int PLANE = INT_TOKENS * INT_ROWS;
    const int tiles = std::min(+VECTOR_TILES<D>, (T - t + TILE - 1) / TILE);
    Products<D> c[PART_BLOCKS<D>][VECTOR_TILES<D>];
    for (int h = 0; h < R; h += TILE) {
        for (int k = 0, b = p.b; b < p.end; k++, b += BLOCK_LANES)
            multiply<D>(c[k], block, b, h, v.at(t, b), tiles);
        for (int i = 0; i < tiles; i++) {
            const int first = t + i * TILE;
            float* top = block.lane + p.depth * PLANE + (first * INT_ROWS + h * TILE);
            Sums y = {};
            if (!p.first) add_sums(y, top);
            for (int k = 0, b = p.b; b < p.end; k++, b += BLOCK_LANES)
                add<D>(y, block, b, h, c[k][i], v.x.at(first, b));
            for (int n = 0; p.last && n < p.halves; n++) add_sums(y, top -= PLANE);
            if (p.all) put({out[first], out.stride}, y, row + h, R - h, T - first);
            else put({top, TILE}, y, 0, TILE, TILE);
        }
    }
}

// out[t], R rows from `row` on: the packed rows times T <= INT_TOKENS vectors. The lanes come in the order of
// the tree that sums them, 0 4 2 6 1 5 3 7, and what waits for its other half stands on a stack: one place
// for each 1 of the binary number of lanes done.
template <Dtype D>
void int_block(const IntBlock& block, Rows out, const Vectors& v, int row, int R, int T) {
    constexpr int STEP = PART_BLOCKS<D> * BLOCK_LANES;
    const int blocks = v.x.n / v.x.block;
    for (int done = 0; done < BLOCK_LANES; done++) {
        const int lane = (done & 1) * 4 + (done & 2) + (done & 4) / 4;
        int b = lane;
        do {
            bool last = b + STEP >= blocks;
            LanePart part{b, std::min(blocks, b + STEP), std::popcount(unsigned(done)),
                          std::countr_one(unsigned(done)), b == lane, last, last && done == BLOCK_LANES - 1};
            for (int t = 0; t < T; t += VECTOR_TILES<D> * TILE)
                add_part<D>(block, out, v, row, R, T, t, part);
            b += STEP;
        } while (b < blocks);
    }
}

struct alignas(64) TileConfig {                        // Intel SDM, LDTILECFG
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig tiles_for(int columns) {
    TileConfig c;
    c.row_bytes[4] = c.row_bytes[5] = uint16_t(columns), c.rows[6] = uint8_t(columns / 4);
    return c;
}

// Some blocks of rows are packed together, so that vectors are brought to the second cache once for them.
template <Dtype D>
AMX_ENTRY void int_rows_of(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    static constexpr TileConfig TILES = tiles_for(of_32(D) ? 32 : 64);
    constexpr int MOST = MANY_ROWS / INT_ROWS, BYTES = of_32(D) ? 1 : 2, CACHED = 1 << 20;
    thread_local std::vector<std::byte> memory[MOST];
    thread_local std::vector<int32_t> pairs;
    if (PAIRED<D>) {
        pairs.resize(size_t(x.blocks(T)) * GROUP);
        pair_sums(pairs.data(), x, x.blocks(T));
    }
    const int at_once = std::clamp(CACHED / (w.cols * BYTES * INT_ROWS), 1, MOST) * INT_ROWS;
    _tile_loadconfig(&TILES);
    for (int first = begin; first < end; first += at_once) {
        std::vector<IntBlock> blocks;
        blocks.reserve(MOST);
        for (int r = first; r < std::min(end, first + at_once); r += INT_ROWS) {
            IntBlock* first_block = blocks.empty() ? nullptr : &blocks[0];
            blocks.emplace_back(memory[blocks.size()], w.cols, x.block, BYTES, first_block);
            pack_tiles<D>(blocks.back(), w, r, std::min(INT_ROWS, end - r));
        }
        for (int t = 0; t < T; t += INT_TOKENS) {
            Vectors v{x.vector(t), pairs.data() + int64_t(t) * x.n / GROUP};
            int r = first;
            for (const IntBlock& block : blocks) {
                int_block<D>(block, {out[t], out.stride}, v, r, std::min(INT_ROWS, end - r),
                             std::min(INT_TOKENS, T - t));
                r += INT_ROWS;
            }
        }
    }
    _tile_release();
}

inline void int_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    constexpr int WORTH_IT = 8;                        // tokens, of a tile's 16
    if (T < WORTH_IT) return avx512::int_rows(out, x, w, T, begin, end);
    for_quantised(w.dtype, [&]<Dtype D>() { int_rows_of<D>(out, x, w, T, begin, end); });
}

// A process asks the system for the registers of the tiles before it uses them.
inline bool available() {
    constexpr unsigned AMX_BITS = 3u << 24 | 1u << 22;                     // tiles, int8, bf16
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;            // asm/prctl.h; XSAVE component
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX_BITS) != AMX_BITS) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace amx
#endif

// =================================================================================================
// Appendix O. Fast integers: interleaved rows
// =================================================================================================
//
// Why does a token not take just the time in which memory brings its weights? A block of a K format has up
// to sixteen scales. With a row in a register they must be unpacked, spread over its lanes, and the lanes
// added, and that takes longer than bringing the block. With sixteen rows side by side, 32 bits of each, a
// lane is a row: scales are unpacked for sixteen rows at once, and nothing is added across lanes.
//
// Sixteen rows take as many bytes as before. So matrices of which each token needs every row are
// interleaved where they are, once, after loading. Experts are not: a token needs few of many.

// -- O.1  the order ------------------------------------------------------------------------------

constexpr int SIDE = 16;                   // rows side by side

inline bool interleaves(Dtype d) { return d == Dtype::Q4_K || d == Dtype::Q5_K || d == Dtype::Q6_K; }

// A block of 16 rows is lines of 64 bytes, line i with 32 bits of each row, those from byte 4 dword_of_line
// on, and then the two bytes that are left of each (Q6_K). The lines are in the order in which the kernels
// first read them: processors bring what follows before it is asked for, and nothing else.
constexpr int dword_of_line(Dtype d, int i) {
    constexpr int SCALES = 4, LOW = 32, HIGH = 16;     // dwords of Q6_K
    if (d == Dtype::Q5_K && i >= 4 && i < 20) return (i % 2 ? 12 : 4) + (i - 4) / 2;
    if (d != Dtype::Q6_K) return i;
    if (i < SCALES) return LOW + HIGH + i;
    int half = (i - SCALES) / 24, j = (i - SCALES) % 24 / 3, part = (i - SCALES) % 3;
    return part < 2 ? 16 * half + 8 * part + j : LOW + 8 * half + j;
}

// Where numbers 4 j .. 4 j + 4 of groups g and g + 1 are, in four bits each, and where their fifth bits.
template <Dtype D> constexpr int line_of(int g, int j) {
    if (D == Dtype::Q4_K) return 4 + 4 * g + j;
    return g == 0 ? 5 + 2 * j : 12 + 4 * g + j;
}
constexpr int line_of_fifth_bits(int j) { return 4 + 2 * j; }
// Q6_K: where those of four groups of 32 are, in half h: their low bits in this line and the next, their high
// ones in the one after that.
constexpr int line_of_q6_k(int h, int j) { return 4 + 24 * h + 3 * j; }

// Sixteen rows, from one order to the other.
template <bool INTERLEAVE> void reorder(std::byte* out, const std::byte* in, Dtype dtype, int cols) {
    const size_t bytes = size_t(format_of(dtype).bytes), row = row_bytes(dtype, cols);
    constexpr std::integral_constant<size_t, 4> FOUR;  // constants, so that a copy is no call
    constexpr std::integral_constant<size_t, 2> TWO;
    auto copy = [&](size_t dense, size_t side, auto n) {
        for (size_t r = 0; r < SIDE; r++, dense += row, side += n)
            std::memcpy(out + (INTERLEAVE ? side : dense), in + (INTERLEAVE ? dense : side), n);
    };
    for (size_t block = 0; block < row; block += bytes) {
        for (size_t i = 0; i < bytes / 4; i++)
            copy(block + 4 * size_t(dword_of_line(dtype, int(i))), SIDE * (block + 4 * i), FOUR);
        if (size_t rest = block + bytes / 4 * 4; bytes % 4) copy(rest, SIDE * rest, TWO);
    }
}

// For many tokens the rows are put back and go the usual way: what that costs is shared by all of them.
inline void restored_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    thread_local std::vector<std::byte> dense;
    const size_t bytes = row_bytes(w.dtype, w.cols);
    dense.resize(size_t(end - begin) * bytes);
    for (int r = begin; r < end; r += SIDE)
        reorder<false>(dense.data() + size_t(r - begin) * bytes, w.row(r), w.dtype, w.cols);
    Matrix rows{dense.data(), nullptr, w.dtype, end - begin, w.cols};
    kernels.target->int_rows({out[0] + begin, out.stride}, x, rows, T, 0, end - begin);
}

// body.operator()<D, T>() for this dtype and T < MANY_TOKENS
template <class Body> void for_interleaved(Dtype dtype, int T, const Body& body) {
    auto of = [&]<Dtype D>() {
        if (T == 1) body.template operator()<D, 1>();
        if (T == 2) body.template operator()<D, 2>();
        if (T == 3) body.template operator()<D, 3>();
    };
    if (dtype == Dtype::Q4_K) of.template operator()<Dtype::Q4_K>();
    if (dtype == Dtype::Q5_K) of.template operator()<Dtype::Q5_K>();
    if (dtype == Dtype::Q6_K) of.template operator()<Dtype::Q6_K>();
}

// -- O.2  which matrices -------------------------------------------------------------------------

inline bool can_interleave(const Matrix& w) { return interleaves(w.dtype) && w.rows % SIDE == 0; }

// Interleaves W where it is. Pages of a mapped file that are written become memory of our own: all of a part
// at once, which takes a quarter of the time of one by one. False where the system refuses.
inline bool interleave_rows(Matrix& w) {
    constexpr int PART = 16 * SIDE;                    // rows
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    auto pages = [&](int begin, int end, auto call) {  // of these rows
        size_t from = reinterpret_cast<size_t>(w.row(begin)) / page * page;
        return call(reinterpret_cast<void*>(from), reinterpret_cast<size_t>(w.row(end)) - from);
    };
    auto protect = [](int how) { return [how](void* p, size_t n) { return mprotect(p, n, how); }; };
    if (pages(0, w.rows, protect(PROT_READ | PROT_WRITE)) != 0) return false;
    parallel_for((w.rows + PART - 1) / PART, [&](int64_t part) {
        thread_local std::vector<std::byte> dense;
        int begin = int(part) * PART, end = std::min(w.rows, begin + PART);
        pages(begin, end, [](void* p, size_t n) { return madvise(p, n, MADV_POPULATE_WRITE); });
        for (int r = begin; r < end; r += SIDE) {
            dense.assign(w.row(r), w.row(r + SIDE));
            reorder<true>(const_cast<std::byte*>(w.row(r)), dense.data(), w.dtype, w.cols);
        }
    });
    pages(0, w.rows, protect(PROT_READ));
    return w.interleaved = true;
}

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
// -- O.3  AVX2: a few tokens ---------------------------------------------------------------------

namespace avx2 {

// The sum of x over group g, which has a scale of its own.
template <Dtype D> AVX2 int group_sum(const IntRows& x, int t, int g) {
    const int16_t* sums = x.sums + t * (x.n / GROUP);
    return D == Dtype::Q6_K ? sums[g] : sums[2 * g] + sums[2 * g + 1];
}

// Eight of sixteen rows' block at p times T vectors; x begins at it.
template <Dtype D, int T> struct SideBlock {
    static constexpr int STEPS = in_16_bits(D);        // sums of two products that 16 bits hold
    const std::byte* p;
    const int half;
    const IntRows x;
    __m256i sum[T], minimum[T];

    AVX2 SideBlock(const std::byte* p, int half, const IntRows& x) : p(p), half(half), x(x) {
        for (int t = 0; t < T; t++) sum[t] = minimum[t] = _mm256_setzero_si256();
    }
    AVX2 __m256i line(int i) const { return load256(p + 64 * i + 32 * half); }

    // Byte k of each lane as two numbers of 16 bits.
    AVX2 static __m256i twice(__m256i v, int k) {
        constexpr bool SIGNED = D == Dtype::Q6_K;              // then it comes to the upper half first
        const unsigned first = SIGNED ? 0x0080u + 0x100u * unsigned(k) : 0x8000u + unsigned(k);
        auto of = [&](unsigned lane) {
            return int(0x00010001u * (first + (SIGNED ? 0x400u : 4u) * lane));
        };
        v = _mm256_shuffle_epi8(v, _mm256_setr_epi32(of(0), of(1), of(2), of(3), of(0), of(1), of(2), of(3)));
        return SIGNED ? _mm256_srai_epi16(v, 8) : v;
    }
    // v += four weights of each row times x from number i on
    AVX2 void dot(__m256i (&v)[T], __m256i w, int i) const {
        for (int t = 0; t < T; t++) {
            __m256i xt = _mm256_set1_epi32(load<int32_t>(x.q + t * x.n + i));
            v[t] = _mm256_add_epi16(v[t], _mm256_maddubs_epi16(w, xt));
        }
    }
    AVX2 void add(const __m256i (&v)[T], __m256i scale) {
        for (int t = 0; t < T; t++) sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(v[t], scale));
    }
    AVX2 void add_minimum(__m256i m, int g) {
        for (int t = 0; t < T; t++) {
            __m256i xt = _mm256_set1_epi32(uint16_t(group_sum<D>(x, t, g)));
            minimum[t] = _mm256_add_epi32(minimum[t], _mm256_madd_epi16(m, xt));
        }
    }

    // Numbers 4 j .. 4 j + 4 of groups g and g + 1.
    AVX2 void dot_two_groups(__m256i (&v)[2][T], int g, int j) const {
        __m256i w = line(line_of<D>(g, j)), q[2] = {low_nibble(w), high_nibble(w)};
        for (int k = 0; k < 2; k++) {
            if (D == Dtype::Q5_K)
                q[k] = _mm256_or_si256(q[k], where_bit(line(line_of_fifth_bits(j)), g + k, 16));
            dot(v[k], q[k], 32 * (g + k) + 4 * j);
        }
    }
    AVX2 void add_q4_q5_k() {
        const __m256i a = line(1), b = line(2), c = line(3);   // unpack_six_bits
        const __m256i six = all8(63), top = all8(48);
        const __m256i a_top = _mm256_and_si256(_mm256_srli_epi16(a, 2), top),
                      b_top = _mm256_and_si256(_mm256_srli_epi16(b, 2), top);
        const __m256i scale[2] = {_mm256_and_si256(a, six), _mm256_or_si256(low_nibble(c), a_top)};
        const __m256i m[2] = {_mm256_and_si256(b, six), _mm256_or_si256(high_nibble(c), b_top)};
        UNROLL for (int i = 0; i < 4; i++) {
            const int g = 2 * i, byte = 2 * (i % 2);
            UNROLL for (int first = 0; first < 8; first += STEPS) {
                __m256i v[2][T] = {};
                UNROLL for (int j = first; j < first + STEPS; j++) dot_two_groups(v, g, j);
                for (int k = 0; k < 2; k++) add(v[k], twice(scale[i / 2], byte + k));
            }
            for (int k = 0; k < 2; k++) add_minimum(twice(m[i / 2], byte + k), g + k);
        }
    }
    // Here the minimum is what the offset of the weights adds.
    AVX2 void add_q6_k() {
        UNROLL for (int part = 0; part < 4; part++) {          // 16 weights of four groups
            const int h = part / 2, odd = part % 2;
            UNROLL for (int first = 4 * odd; first < 4 * odd + 4; first += STEPS) {
                __m256i v[4][T] = {};
                UNROLL for (int j = first; j < first + STEPS; j++) {
                    const int at = line_of_q6_k(h, j);
                    __m256i a = line(at), b = line(at + 1), high = line(at + 2);
                    __m256i low[4] = {low_nibble(a), low_nibble(b), high_nibble(a), high_nibble(b)};
                    __m256i two[4] = {_mm256_slli_epi16(high, 4), _mm256_slli_epi16(high, 2), high,
                                      _mm256_srli_epi16(high, 2)};
                    for (int k = 0; k < 4; k++)
                        dot(v[k], _mm256_or_si256(low[k], _mm256_and_si256(two[k], all8(48))),
                            128 * h + 32 * k + 4 * j);
                }
                for (int k = 0; k < 4; k++) add(v[k], scale_of(h, k, odd));
            }
            for (int k = 0; k < 4; k++) add_minimum(scale_of(h, k, odd), 8 * h + 2 * k + odd);
        }
        for (int t = 0; t < T; t++) sum[t] = _mm256_sub_epi32(sum[t], _mm256_slli_epi32(minimum[t], 5));
    }
    AVX2 __m256i scale_of(int h, int k, int odd) const { return twice(line(2 * h + k / 2), k % 2 * 2 + odd); }

    AVX2 void add_to(__m256 (&lane)[T][2]) {
        __m256 d, m{};
        if constexpr (D == Dtype::Q6_K) {
            add_q6_k();
            d = _mm256_cvtph_ps(load128(p + SIDE * place_of_d(D) + 16 * half));
        } else {
            add_q4_q5_k();
            __m256i both = line(0), low = _mm256_and_si256(both, _mm256_set1_epi32(0xFFFF));
            both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, _mm256_srli_epi32(both, 16)), 0xD8);
            d = _mm256_cvtph_ps(_mm256_castsi256_si128(both));
            m = _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1));
        }
        for (int t = 0; t < T; t++) {
            __m256 dx = _mm256_set1_ps(x.d[t * (x.n / x.block)]), &y = lane[t][half];
            y = _mm256_fmadd_ps(_mm256_mul_ps(d, dx), _mm256_cvtepi32_ps(sum[t]), y);
            if (D == Dtype::Q6_K) continue;
            y = _mm256_fnmadd_ps(_mm256_mul_ps(m, dx), _mm256_cvtepi32_ps(minimum[t]), y);
        }
    }
};

template <Dtype D, int T>
AVX2_ENTRY void side_rows(Rows out, const IntRows& x, const Matrix& w, int begin, int end) {
    const std::byte* p = w.row(begin);
    for (int r = begin; r < end; r += SIDE) {
        __m256 lane[BLOCK_LANES][T][2] = {};
        for (int b = 0; b < x.n / x.block; b++, p += SIDE * format_of(D).bytes)
            for (int half = 0; half < 2; half++)
                SideBlock<D, T>(p, half, x.at(0, b)).add_to(lane[b % BLOCK_LANES]);
        for (int i = 0; i < 2 * T; i++) {
            const int t = i / 2, half = i % 2;
            __m256 v[4];
            for (int j = 0; j < 4; j++) v[j] = _mm256_add_ps(lane[j][t][half], lane[j + 4][t][half]);
            v[0] = _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
            _mm256_storeu_ps(out[t] + r + 8 * half, v[0]);
        }
    }
}

inline void interleaved_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    if (T >= MANY_TOKENS) return restored_rows(out, x, w, T, begin, end);
    for_interleaved(w.dtype, T, [&]<Dtype D, int N>() { side_rows<D, N>(out, x, w, begin, end); });
}

}  // namespace avx2

// -- O.4  AVX-512: a few tokens ------------------------------------------------------------------

namespace avx512 {

// Sixteen rows' block at p times T vectors, as avx2::SideBlock.
template <Dtype D, int T> struct SideBlock {
    const std::byte* p;
    const IntRows x;
    __m512i sum[T], minimum[T];

    AVX512 SideBlock(const std::byte* p, const IntRows& x) : p(p), x(x) {
        for (int t = 0; t < T; t++) sum[t] = minimum[t] = _mm512_setzero_si512();
    }
    AVX512 __m512i line(int i) const { return load512(p + 64 * i); }
    AVX512 static __m512i masked(__m512i v, int mask) {
        return _mm512_and_si512(v, constant(mask * 0x01010101));
    }
    AVX512 static __m512i byte(__m512i v, int k) {             // k of each lane, as a number of 32 bits
        if (D == Dtype::Q6_K) return _mm512_srai_epi32(_mm512_slli_epi32(v, unsigned(24 - 8 * k)), 24);
        return _mm512_and_si512(_mm512_srli_epi32(v, unsigned(8 * k)), constant(255));
    }
    AVX512 void dot(__m512i (&v)[T], __m512i w, int i) const {
        for (int t = 0; t < T; t++)
            v[t] = _mm512_dpbusd_epi32(v[t], w, constant(load<int32_t>(x.q + t * x.n + i)));
    }
    AVX512 void add(const __m512i (&v)[T], __m512i scale, __m512i m, int g) {
        for (int t = 0; t < T; t++) {
            sum[t] = _mm512_add_epi32(sum[t], _mm512_mullo_epi32(v[t], scale));
            minimum[t] =
                _mm512_dpwssd_epi32(minimum[t], m, constant(uint16_t(avx2::group_sum<D>(x, t, g))));
        }
    }

    AVX512 static __m512i fifth_bit(__m512i v, int k) {        // bit k of each byte, as 16
        v = k < 4 ? _mm512_slli_epi32(v, unsigned(4 - k)) : _mm512_srli_epi32(v, unsigned(k - 4));
        return masked(v, 16);
    }
    AVX512 void dot_two_groups(__m512i (&v)[2][T], int g, int j) const {
        __m512i w = line(line_of<D>(g, j)), q[2] = {masked(w, 15), masked(_mm512_srli_epi32(w, 4), 15)};
        UNROLL for (int k = 0; k < 2; k++) {
            if (D == Dtype::Q5_K) q[k] = _mm512_or_si512(q[k], fifth_bit(line(line_of_fifth_bits(j)), g + k));
            dot(v[k], q[k], 32 * (g + k) + 4 * j);
        }
    }
    AVX512 void add_q4_q5_k() {
        const __m512i a = line(1), b = line(2), c = line(3);
        const __m512i scale[2] = {
            masked(a, 63), _mm512_or_si512(masked(c, 15), masked(_mm512_srli_epi32(a, 2), 48))};
        const __m512i m[2] = {masked(b, 63), _mm512_or_si512(masked(_mm512_srli_epi32(c, 4), 15),
                                                             masked(_mm512_srli_epi32(b, 2), 48))};
        UNROLL for (int i = 0; i < 4; i++) {
            const int g = 2 * i;
            __m512i v[2][T];
            for (int t = 0; t < T; t++) v[0][t] = v[1][t] = _mm512_setzero_si512();
            UNROLL for (int j = 0; j < 8; j++) dot_two_groups(v, g, j);
            UNROLL for (int k = 0; k < 2; k++)
                add(v[k], byte(scale[i / 2], g % 4 + k), byte(m[i / 2], g % 4 + k), g + k);
        }
    }
    AVX512 void add_q6_k() {
        UNROLL for (int part = 0; part < 4; part++) {
            const int h = part / 2, odd = part % 2;
            __m512i v[4][T];
            UNROLL for (int k = 0; k < 4; k++)
                for (int t = 0; t < T; t++) v[k][t] = _mm512_setzero_si512();
            UNROLL for (int j = 4 * odd; j < 4 * odd + 4; j++) {
                const int at = line_of_q6_k(h, j);
                __m512i a = line(at), b = line(at + 1), high = line(at + 2);
                __m512i low[4] = {a, b, _mm512_srli_epi32(a, 4), _mm512_srli_epi32(b, 4)};
                __m512i two[4] = {_mm512_slli_epi32(high, 4), _mm512_slli_epi32(high, 2), high,
                                  _mm512_srli_epi32(high, 2)};
                UNROLL for (int k = 0; k < 4; k++)
                    dot(v[k], _mm512_or_si512(masked(low[k], 15), masked(two[k], 48)),
                        128 * h + 32 * k + 4 * j);
            }
            UNROLL for (int k = 0; k < 4; k++) {
                __m512i scale = byte(line(2 * h + k / 2), k % 2 * 2 + odd);
                add(v[k], scale, scale, 8 * h + 2 * k + odd);
            }
        }
        for (int t = 0; t < T; t++) sum[t] = _mm512_sub_epi32(sum[t], _mm512_slli_epi32(minimum[t], 5));
    }

    AVX512 void add_to(__m512 (&lane)[T]) {
        __m512 d, m = _mm512_setzero_ps();
        if constexpr (D == Dtype::Q6_K) {
            add_q6_k();
            d = _mm512_cvtph_ps(load256(p + SIDE * place_of_d(D)));
        } else {
            add_q4_q5_k();
            d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(line(0)));
            m = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(line(0), 16)));
        }
        for (int t = 0; t < T; t++) {
            __m512 dx = _mm512_set1_ps(x.d[t * (x.n / x.block)]);
            lane[t] = _mm512_fmadd_ps(_mm512_mul_ps(d, dx), _mm512_cvtepi32_ps(sum[t]), lane[t]);
            if (D == Dtype::Q6_K) continue;
            lane[t] = _mm512_fnmadd_ps(_mm512_mul_ps(m, dx), _mm512_cvtepi32_ps(minimum[t]), lane[t]);
        }
    }
};

template <Dtype D, int T>
AVX512_ENTRY void side_rows(Rows out, const IntRows& x, const Matrix& w, int begin, int end) {
    constexpr int BYTES = SIDE * format_of(D).bytes;
    const std::byte* p = w.row(begin);
    for (int r = begin; r < end; r += SIDE) {
        __m512 lane[BLOCK_LANES][T];
        for (auto& l : lane)
            for (int t = 0; t < T; t++) l[t] = _mm512_setzero_ps();
        for (int b = 0; b < x.n / x.block; b++, p += BYTES) {
            // Measured: AMD's processors bring what follows by themselves faster than if they are asked.
            for (int i = 0; INTEL && i < BYTES; i += 64) prefetch(p + AHEAD + i);
            SideBlock<D, T>(p, x.at(0, b)).add_to(lane[b % BLOCK_LANES]);
        }
        for (int t = 0; t < T; t++) {
            __m512 v[4];
            for (int j = 0; j < 4; j++) v[j] = _mm512_add_ps(lane[j][t], lane[j + 4][t]);
            v[0] = _mm512_add_ps(_mm512_add_ps(v[0], v[2]), _mm512_add_ps(v[1], v[3]));
            _mm512_storeu_ps(out[t] + r, v[0]);
        }
    }
}

inline void interleaved_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    if (T >= MANY_TOKENS) return restored_rows(out, x, w, T, begin, end);
    for_interleaved(w.dtype, T, [&]<Dtype D, int N>() { side_rows<D, N>(out, x, w, begin, end); });
}

}  // namespace avx512
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

// x as its product wants it: in small integers, or arranged, or as it is.
struct Input {
    IntRows ints;
    real* arranged = nullptr;
};

// Rows of W, and vectors x, that a thread takes at once: few enough for all threads to have work and for
// arranged vectors to stay in a cache, many enough to be worth it.
struct Parts {
    int rows, tokens, of_rows;
    int count = 0;                         // of parts; those with the same vectors follow each other

    Parts(const Product& p, const Input& x, int threads) : tokens(std::max(p.T, 1)) {
        constexpr int CACHED = 5 << 19;    // numbers
        if (x.arranged) tokens = std::max(CACHED / p.w->cols / 64 * 64, 64);
        if (p.T >= MANY_TOKENS) rows = std::clamp(p.w->rows / (4 * threads) / 96 * 96, 96, MANY_ROWS);
        else rows = std::clamp(p.w->rows / (8 * threads) / 16 * 16, 16, 256);
        of_rows = (p.w->rows + rows - 1) / rows;
        count = of_rows * ((p.T + tokens - 1) / tokens);
    }
};

// Part i of a product.
inline void multiply(const Product& p, const Input& x, const Parts& part, int i) {
    int t = i / part.of_rows * part.tokens, T = std::min(part.tokens, p.T - t);
    int begin = i % part.of_rows * part.rows, end = std::min(p.w->rows, begin + part.rows);
    Rows out{p.out[t], p.out.stride};
    if (p.w->interleaved) return kernels.target->interleaved_rows(out, x.ints, *p.w, T, begin, end);
    if (in_integers(*p.w)) return kernels.target->int_rows(out, x.ints, *p.w, T, begin, end);
    if (!x.arranged) return kernels.target->rows(out, p.x, *p.w, T, begin, end);
    const real* arranged = x.arranged + size_t(t / ARRANGED_TOKENS) * arranged_size(p.w->cols);
    kernels.target->arranged_rows(out, arranged, *p.w, T, begin, end);
}

// The inputs of some products; equal ones once.
class Inputs {
public:
    const Input& add(const Product& p) {
        static const Input NONE;
        if (p.T == 0) return NONE;
        int block = in_integers(*p.w) ? format_of(p.w->dtype).values : 0;
        for (const Entry& e : entries_) {
            bool same_rows = e.x.data == p.x.data && e.x.stride == p.x.stride && e.T == p.T;
            if (same_rows && e.block == block && e.n == p.w->cols) return e.input;
        }
        entries_.push_back({p.x, p.T, p.w->cols, block, {}});
        Input& input = entries_.back().input;
        if (block > 0) quantise(input.ints, p, block);
        else if (kernels.target->arrange && p.T >= ARRANGE_FROM) arrange(input.arranged, p);
        return input;
    }
    void clear() { entries_.clear(); }

private:
    using Buffer = std::vector<std::byte>;
    struct Entry {
        ConstRows x;
        int T, n, block;
        Input input;
    };
    std::deque<Entry> entries_;            // references to its elements stay good
    std::vector<Buffer> memory_;           // grows to what the largest call needed

    void quantise(IntRows& rows, const Product& p, int block) {
        rows = {p.w->cols, block, p.T};
        size_t blocks = size_t(rows.blocks(p.T)), n = blocks * size_t(block);
        take_from(memory(), [&](Arena& arena) {
            rows.q = arena.take<int8_t>(n), rows.sums = arena.take<int16_t>(n / GROUP);
            rows.d = arena.take<float>(blocks);
        });
        parallel_for(p.T, [&](int64_t t) { kernels.target->quantise(rows.vector(int(t)), p.x[t]); }, rows.n);
    }
    void arrange(real*& out, const Product& p) {
        int n = p.w->cols, groups = (p.T + ARRANGED_TOKENS - 1) / ARRANGED_TOKENS;
        take_from(memory(), [&](Arena& arena) { out = arena.take<real>(size_t(groups) * arranged_size(n)); });
        parallel_for(groups, [&](int64_t g) {
            int t = int(g) * ARRANGED_TOKENS;
            kernels.target->arrange(out + size_t(g) * arranged_size(n), {p.x[t], p.x.stride},
                            std::min(ARRANGED_TOKENS, p.T - t), n);
        }, int64_t(n) * ARRANGED_TOKENS);
    }
    Buffer& memory() {                     // of the last entry
        if (memory_.size() < entries_.size()) memory_.resize(entries_.size());
        return memory_[entries_.size() - 1];
    }
};

// Products on one thread, or in a loop of another one.
inline void matmul_alone(const Product& p) {
    thread_local Inputs inputs;
    inputs.clear();
    const Input& input = inputs.add(p);
    Parts part(p, input, 1);
    for (int i = 0; i < part.count; i++) multiply(p, input, part, i);
}

// Equal inputs are made once; all parts of all products are shared out together.
inline void fast_matmul(std::span<const Product> products) {
    if (in_loop) return void(std::for_each(products.begin(), products.end(), matmul_alone));
    thread_local Inputs inputs;
    inputs.clear();
    std::vector<const Input*> x;
    std::vector<Parts> parts;
    std::vector<int64_t> first = {0};                     // index of each product's first part
    int64_t work = 0;
    for (const Product& p : products) {
        x.push_back(&inputs.add(p));
        parts.emplace_back(p, *x.back(), n_threads());
        work += int64_t(p.w->rows) * p.w->cols * p.T;
        first.push_back(first.back() + parts.back().count);
    }
    parallel_for(first.back(), [&](int64_t part) {
        size_t i = size_t(std::upper_bound(first.begin(), first.end(), part) - first.begin()) - 1;
        multiply(products[i], *x[i], parts[i], int(part - first[i]));
    }, work / std::max<int64_t>(first.back(), 1));
}

// -- attend: tiles of queries --------------------------------------------------------------------

// Queries `first` to first + Q of a key head, Q <= QUERY_TILE, on this thread: keys and values are read once
// for all of them.   scratch: attention_scratch numbers
inline void attend_tile(const Attention& a, real* scratch, int first, int Q) {
    const int64_t dk = a.k.cols, dv = a.v.cols;
    auto token = [&](int i) { return (first + i) / a.heads; };
    auto head = [&](int i) { return (first + i) % a.heads; };
    auto seen = [&](int i) { return a.n[size_t(token(i))]; };
    Rows scores{scratch, score_stride(seen(Q - 1))};
    Rows queries{scores[QUERY_TILE], dk}, out{queries[QUERY_TILE], dv};
    ConstRows q = queries;
    const bool even = a.heads == 1 || (a.q.stride == a.heads * dk && a.out.stride == a.heads * dv);
    if (even) {                            // from query to query
        q = {a.q[token(0)] + head(0) * dk, a.heads == 1 ? a.q.stride : dk};
        out = {a.out[token(0)] + head(0) * dv, a.heads == 1 ? a.out.stride : dv};
    }
    for (int i = 0; !even && i < Q; i++) std::copy_n(a.q[token(i)] + head(i) * dk, dk, queries[i]);
    Matrix k = a.k, later = a.v.view(seen(0), seen(Q - 1) - seen(0));
    k.rows = seen(Q - 1);
    matmul_alone({scores, q, &k, Q});
    for (int i = 0; i < Q; i++) {
        kernels.softmax(scores[i], a.scale, seen(i));
        std::fill_n(out[i], dv, real(0));
    }
    kernels.weigh(out, scores, a.v, Q, seen(0));
    for (int i = 1; i < Q; i++)            // what only the later queries see
        kernels.weigh({out[i], 0}, {scores[i] + seen(0), 0}, later, 1, seen(i) - seen(0));
    for (int i = 0; !even && i < Q; i++) std::copy_n(out[i], dv, a.out[token(i)] + head(i) * dv);
}

inline void fast_attend(std::span<const Attention> heads, Rows scratch) {
    const int queries = int(heads[0].n.size()) * heads[0].heads, all = queries * int(heads.size());
    const int tile = std::min({QUERY_TILE, queries, (all + n_threads() - 1) / n_threads()});
    const int tiles = (queries + tile - 1) / tile;
    const Attention& one = heads[0];
    parallel_for(int64_t(tiles) * int64_t(heads.size()), [&](int64_t i) {
        int first = int(i % tiles) * tile;
        attend_tile(heads[size_t(i / tiles)], scratch[thread_index()], first, std::min(tile, queries - first));
    }, int64_t(tile) * one.n.back() * (one.k.cols + one.v.cols) / 2);
}

// -- choose_kernels: once, at start --------------------------------------------------------------

// Those that this processor has, the fastest last.
inline std::vector<SimdTarget> make_targets() {
    std::vector<SimdTarget> targets;
#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        targets.push_back({"avx2", avx2::rows, avx2::weigh<avx2::Weigh8>, avx2::widen, avx2::dot_real,
                           avx2::softmax, avx2::silu_times, avx2::quantise, avx2::int_rows, avx2::arrange,
                           avx2::arranged_rows, avx2::interleaved_rows});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        SimdTarget t = targets.back();
        t.name = "avx512", t.rows = avx512::rows, t.weigh = avx512::weigh, t.softmax = avx512::softmax;
        t.silu_times = avx512::silu_times, t.arranged_rows = avx512::arranged_rows;
        t.int_rows = avx512::int_rows, t.interleaved_rows = avx512::interleaved_rows;
        targets.push_back(t);
        t.name = "amx", t.int_rows = amx::int_rows;
        if (amx::available()) targets.push_back(t);
    }
#elif defined(DEEPSEEK_FLOAT) && defined(__aarch64__)
    targets.push_back({"neon", neon::rows, neon::weigh, neon::widen, neon::dot_real, neon::softmax,
                       neon::silu_times, neon::quantise, neon::int_rows<false>, nullptr, nullptr, nullptr});
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        SimdTarget t = targets.back();
        t.name = "dotprod", t.int_rows = neon::int_rows<true>;
        targets.push_back(t);
    }
#endif
    return targets;
}

// The plain ones first.
inline std::vector<Kernels> available_kernels() {   // tests/unit/simd_kernels.cpp compares their bits
    static const std::vector<SimdTarget> TARGETS = make_targets();
    std::vector<Kernels> all = {Kernels{}};
    for (const SimdTarget& t : TARGETS) {
        bool interleave = t.interleaved_rows != nullptr;
        all.push_back({t.name, true, t.weigh, t.widen, t.dot_real, t.softmax, t.silu_times, fast_matmul,
                       fast_attend, interleave ? interleave_rows : nullptr,
                       interleave ? can_interleave : nullptr, &t});
    }
    return all;
}

// The fastest, or the one called `name` (empty: no wish). exact: quantised weights are dequantised, not
// multiplied in integers.
inline void choose_kernels(const std::string& name, bool exact) {
    std::string names;
    kernels.name = nullptr;
    for (const Kernels& k : available_kernels()) {
        names += (names.empty() ? "" : ", ") + std::string(k.name);
        if (name.empty() || name == k.name) kernels = k;
    }
    if (!kernels.name)
        fail("DEEPSEEK_SIMD=%s: this processor and build have %s", name.c_str(), names.c_str());
    if (exact) kernels.integers = false;
}
