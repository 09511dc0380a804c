// simd.h: the operations of chapter 5 again, as fast as this processor can. Included by deepseek.cpp; needs
// its chapters 1, 2, 5 and 7 and the layout of blocks in gguf.h.
//
// Can the inner loops of chapter 5 be fast and stay the same? Their sixteen lanes are four, two or one of a
// processor's registers, and their integer sums are exact. Each kernel below does the additions of its plain
// twin in the same order, so the choice, made once at start, cannot be seen in any result.
//
// One token needs each weight once: the time is that of reading them from memory, packed as they are. Many
// tokens need each many times: a block of rows is unpacked once, and the sums of some rows with some tokens
// stay in registers. DEEPSEEK_SIMD=plain, avx2, avx512, amx, neon or dotprod overrides the choice.
//
// A kernel stands here once, for registers of SIMD_BITS bits. This file includes itself for each instruction
// set (section 10); sections 2 to 9 are then compiled for it, in a namespace of its own.
//
//   1  What all share             words for the compiler, the maker of the processor
//   2  Registers                  what differs between instruction sets
//   3  Widening                   a row of weights as floats
//   4  Few tokens                 dots of rows as they are
//   5  Blocks of rows             4 tokens and more
//   6  Weighted sums              of rows: attention's second half
//   7  exp                        softmax, silu
//   8  Arranged                   32 tokens and more
//   9  Small integers             weights in blocks
//   10 The passes                 this file for each instruction set; AMX
//   11 The operations             products, attention, the choice of kernels

#ifndef SIMD_BITS

// -- 1  What all share ---------------------------------------------------------------------------

// Loops over registers: an array whose loops are all unrolled has no address and needs no memory. What takes
// or gives registers is inlined: they would go through memory too.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE [[gnu::always_inline]] inline

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
inline const bool INTEL = __builtin_cpu_is("intel");
#endif

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
    // Blocks of T vectors, and of those that no one asked for in the last group: AMX reads 16 at once.
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
    void (*rows)(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end);
    void (*weigh)(Rows out, ConstRows p, const Matrix& v, int T, int n);
    void (*widen)(real* out, const Matrix& w, int r);
    real (*dot_real)(const real* a, const real* b, int n);
    void (*softmax)(real* z, real scale, int n);
    void (*silu_times)(real* gate, const real* up, int n);
    void (*quantise)(const IntRows& out, const real* x);
    void (*int_rows)(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end);
    void (*interleaved_rows)(Rows, const IntRows& x, const Matrix& w, int T, int begin, int end);
    // `rows` for ARRANGE_FROM tokens and more, whose x was arranged before, 8 vectors at a time; or none.
    void (*arrange)(real* out, ConstRows x, int T, int n) = nullptr;
    void (*arranged_rows)(Rows out, const real* x, const Matrix& w, int T, int begin, int end) = nullptr;
    const char* name = nullptr;
};

// -- small integers: what the targets share ------------------------------------------------------
//
// How are the small integers of 5.2 multiplied fast? Every format is unpacked to one form, unsigned bytes
// that are too large by a known offset: for few tokens while they are multiplied, for many a block of 32 rows
// once. Integer sums are exact, so nothing can differ from chapter 5.

// body.operator()<N>() for the N that is n, or for MOST if n is more.
template <int MOST, class Body> INLINE void with_constant(int n, const Body& body) {
    if (n >= MOST) body.template operator()<MOST>();
    else if constexpr (MOST > 1) with_constant<MOST - 1>(n, body);
}
template <int MOST_R, int MOST_T, class Body> INLINE void with_constants(int R, int T, const Body& body) {
    with_constant<MOST_R>(R, [&]<int N>() {
        with_constant<MOST_T>(T, [&]<int M>() { body.template operator()<N, M>(); });
    });
}

constexpr bool of_32(Dtype d) { return format_of(d).values == 32; }
constexpr bool of_256(Dtype d) { return quantised(d) && !of_32(d) && !looked_up(d); }
constexpr bool has_minimums(Dtype d) { return format_of(d).minimums; }
// What makes the values of a block unsigned bytes.
constexpr int offset_of(Dtype d) { return d == Dtype::Q8_0 ? 128 : layout_of(d).zero; }
constexpr bool signed_scales(Dtype d) { return d == Dtype::Q3_K || d == Dtype::Q6_K; }
constexpr bool in_32_groups(Dtype d) { return d == Dtype::Q4_K || d == Dtype::Q5_K; }   // or in 16

// A block of rows for many tokens: the weights of 32 rows are laid out so that a register holds four columns
// of several rows, and four numbers of x, repeated, meet them all.
constexpr int INT_ROWS = 32, INT_TOKENS = GROUP_VECTORS;

struct IntBlock {
    std::byte* w;       // (cols / 4, INT_ROWS, 4): with their offset; AMX has up to two bytes each
    float *d, *m;       // (blocks, INT_ROWS): m negated
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

// -- interleaved rows: the order -----------------------------------------------------------------
//
// Why does a token not take just the time in which memory brings its weights? A block of a K format has up to
// sixteen scales. With a row in a register they must be unpacked, spread over its lanes, and the lanes added.
// With sixteen rows side by side, 32 bits of each, a lane is a row: scales are unpacked for sixteen rows at
// once, and nothing is added across lanes. They take as many bytes as before, so matrices of which each token
// needs every row are interleaved once, after loading. Of experts a token needs few of many.

constexpr int SIDE = 16;                   // rows side by side

// A block of 16 rows is lines of 64 bytes, line i with dword `dword_of_line` of each row, and then the two
// bytes that are left of each (Q3_K, Q6_K). The lines are in the order in which the kernels first read them:
// processors bring what follows before it is asked for, and nothing else.
constexpr int dword_of_line(Dtype d, int i) {
    if (d == Dtype::Q5_K && i >= 4 && i < 20) return (i % 2 ? 12 : 4) + (i - 4) / 2;
    if (d == Dtype::Q3_K) return i < 3 ? 24 + i : i < 19 ? (i % 2 ? 0 : 8) + (i - 3) / 2 : i - 3;
    if (d != Dtype::Q6_K) return i;
    constexpr int SCALES = 4, LOW = 32, HIGH = 16;     // dwords
    if (i < SCALES) return LOW + HIGH + i;
    int half = (i - SCALES) / 24, j = (i - SCALES) % 24 / 3, part = (i - SCALES) % 3;
    return part < 2 ? 16 * half + 8 * part + j : LOW + 8 * half + j;
}

template <Dtype D> constexpr auto LINE_OF_DWORD = [] {
    std::array<int, format_of(D).bytes / 4> line{};
    for (int i = 0; i < int(line.size()); i++) line[size_t(dword_of_line(D, i))] = i;
    return line;
}();

// Sixteen rows, from one order to the other.
template <bool INTERLEAVE> void reorder(std::byte* out, const std::byte* in, Dtype dtype, int cols) {
    const size_t bytes = size_t(format_of(dtype).bytes), row = row_bytes(dtype, cols);
    auto copy = [&](size_t dense, size_t side, auto n) {       // n: a constant, so that this is no call
        for (size_t r = 0; r < SIDE; r++, dense += row, side += n)
            std::memcpy(out + (INTERLEAVE ? side : dense), in + (INTERLEAVE ? dense : side), n);
    };
    for (size_t block = 0; block < row; block += bytes) {
        for (size_t i = 0; i + 4 <= bytes; i += 4)
            copy(block + 4 * size_t(dword_of_line(dtype, int(i / 4))), SIDE * (block + i),
                 std::integral_constant<size_t, 4>());
        if (size_t rest = block + bytes / 4 * 4; bytes % 4)
            copy(rest, SIDE * rest, std::integral_constant<size_t, 2>());
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

inline bool can_interleave(const Matrix& w) { return of_256(w.dtype) && w.rows % SIDE == 0; }

// Copies W to `to` with its rows interleaved, and lets it point there.
inline void interleave_rows(Matrix& w, std::byte* to) {
    constexpr int PART = 16 * SIDE;                    // rows
    parallel_for((w.rows + PART - 1) / PART, [&](int64_t part) {
        int begin = int(part) * PART, end = std::min(w.rows, begin + PART);
        for (int r = begin; r < end; r += SIDE)
            reorder<true>(to + (w.row(r) - w.data), w.row(r), w.dtype, w.cols);
    });
    w.data = to, w.interleaved = true;
}

#else  // SIMD_BITS: once for each instruction set

// -- 2  Registers --------------------------------------------------------------------------------
//
// Both compilers have vectors with the operators of numbers, + * & << ?: and the like: the same text for each
// width. Here stands what is not an operator.

constexpr int WIDTH = SIMD_BITS / 32;          // floats in a register
constexpr int SIXTEEN = LANES / WIDTH;         // registers for sixteen floats
constexpr int REGISTERS = SIMD_BITS == 256 ? 16 : 32;

typedef float Floats __attribute__((vector_size(SIMD_BITS / 8)));
typedef uint32_t Words __attribute__((vector_size(SIMD_BITS / 8)));
typedef double Doubles __attribute__((vector_size(SIMD_BITS / 8)));
typedef int64_t Longs __attribute__((vector_size(SIMD_BITS / 8)));
typedef float HalfFloats __attribute__((vector_size(SIMD_BITS / 16)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef Floats Lanes[SIXTEEN];                 // chapter 5's lanes of one sum

// Chapter 2's load, of registers too. (Through memcpy, g++ loads another kind of register and moves it.)
template <class V> struct [[gnu::packed, gnu::may_alias]] Anywhere {
    V v;
};
template <class V> INLINE V load(const void* p) { return static_cast<const Anywhere<V>*>(p)->v; }
template <class V> INLINE void store(void* p, V v) { static_cast<Anywhere<V>*>(p)->v = v; }
INLINE Floats floats(const float* p) { return load<Floats>(p); }

#if SIMD_BITS == 128
INLINE Floats all(float x) { return vdupq_n_f32(x); }
INLINE Doubles all(double x) { return vdupq_n_f64(x); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return vfmaq_f64(c, a, b); }
INLINE Floats max(Floats a, Floats b) { return vmaxnmq_f32(a, b); }        // b, if a is NaN
INLINE Floats min(Floats a, Floats b) { return vminnmq_f32(a, b); }
INLINE Doubles doubles(HalfFloats x) { return vcvt_f64_f32(x); }
INLINE HalfFloats to_floats(Doubles x) { return vcvt_f32_f64(x); }
INLINE Words bytes_as_words(const std::byte* p) {
    return vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(load<uint32_t>(p))))));
}
INLINE Words halves_as_words(const std::byte* p) { return vmovl_u16(load<uint16x4_t>(p)); }
INLINE Floats halves_as_floats(const std::byte* p) { return vcvt_f32_f16(load<float16x4_t>(p)); }
INLINE HalfFloats lower(Floats v) { return vget_low_f32(v); }
INLINE HalfFloats upper(Floats v) { return vget_high_f32(v); }
INLINE Floats join(HalfFloats low, HalfFloats high) { return vcombine_f32(low, high); }
INLINE FourFloats four(const Lanes& v) { return (v[0] + v[2]) + (v[1] + v[3]); }
// In a register, from here on: g++ would read v from memory again at each use.
template <class V> INLINE void keep(V& v) { asm("" : "+w"(v)); }
#else
#undef MM                                      // Intel named its functions alike for both widths
#if SIMD_BITS == 256
#define MM(function) _mm256_##function
using HalfInts = __m128i;
INLINE __m128i quarter(const std::byte* p) { return _mm_loadu_si64(p); }
INLINE HalfFloats lower(Floats v) { return _mm256_castps256_ps128(v); }
INLINE HalfFloats upper(Floats v) { return _mm256_extractf128_ps(v, 1); }
INLINE Floats join(HalfFloats low, HalfFloats high) { return _mm256_set_m128(high, low); }
INLINE FourFloats four(const Lanes& v) { return lower(v[0] + v[1]) + upper(v[0] + v[1]); }
template <class Row> INLINE Floats each_fourth(const Row& row) {
    return join(load<FourFloats>(row(0)), load<FourFloats>(row(4)));
}
#else
#define MM(function) _mm512_##function
using HalfInts = __m256i;
INLINE __m128i quarter(const std::byte* p) { return load<__m128i>(p); }
INLINE HalfFloats lower(Floats v) { return _mm512_castps512_ps256(v); }
INLINE HalfFloats upper(Floats v) { return _mm512_extractf32x8_ps(v, 1); }
INLINE Floats join(HalfFloats low, HalfFloats high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}
INLINE FourFloats four(const Lanes& v) {
    HalfFloats eight = lower(v[0]) + upper(v[0]);
    return _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
}
template <class Row> INLINE Floats each_fourth(const Row& row) {
    return join(_mm256_set_m128(load<FourFloats>(row(4)), load<FourFloats>(row(0))),
                _mm256_set_m128(load<FourFloats>(row(12)), load<FourFloats>(row(8))));
}
#endif
template <class V> INLINE void keep(V& v) { asm("" : "+v"(v)); }
INLINE Floats all(float x) { return MM(set1_ps)(x); }
INLINE Doubles all(double x) { return MM(set1_pd)(x); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return MM(fmadd_ps)(a, b, c); }
INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return MM(fmadd_pd)(a, b, c); }
INLINE Floats max(Floats a, Floats b) { return MM(max_ps)(a, b); }         // b, if one is NaN
INLINE Floats min(Floats a, Floats b) { return MM(min_ps)(a, b); }
INLINE Doubles doubles(HalfFloats x) { return MM(cvtps_pd)(x); }
INLINE HalfFloats to_floats(Doubles x) { return MM(cvtpd_ps)(x); }
INLINE Words bytes_as_words(const std::byte* p) { return (Words)MM(cvtepu8_epi32)(quarter(p)); }
INLINE Words halves_as_words(const std::byte* p) { return (Words)MM(cvtepu16_epi32)(load<HalfInts>(p)); }
INLINE Floats halves_as_floats(const std::byte* p) { return MM(cvtph_ps)(load<HalfInts>(p)); }
#endif

// The tree of sum_lanes.
INLINE float sum(const Lanes& v) {
    FourFloats u = four(v), two = u + __builtin_shufflevector(u, u, 2, 3, 2, 3);
    return two[0] + two[1];
}

// Of the caches that are to have the bytes at p, the first. A token's weights, which are read once, come to
// the second: into none (nta) they come no faster than unasked on Intel's processors, and slower on Zen 4.
enum Cache { FIRST = 3, SECOND = 2 };
template <Cache CACHE = FIRST> INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, CACHE); }

#if SIMD_BITS > 128
// v[c]: number c of the four, of 32 bits, at row(r), for each r < WIDTH: two perfect shuffles of the rows.
template <class Row> INLINE void to_columns(Floats (&v)[4], const Row& row) {
    UNROLL for (int k = 0; k < 4; k++) v[k] = each_fourth([&](int r) { return row(r + k); });
    UNROLL for (int twice = 0; twice < 2; twice++) {
        Floats a[4] = {v[0], v[1], v[2], v[3]};
        UNROLL for (int k = 0; k < 2; k++)
            v[2 * k] = MM(unpacklo_ps)(a[k], a[k + 2]), v[2 * k + 1] = MM(unpackhi_ps)(a[k], a[k + 2]);
    }
}

// 8 rows of 8 numbers of 32 bits, to columns; strides in bytes.
inline void transpose8(void* out, int64_t out_stride, const void* in, int64_t in_stride) {
    for (int col = 0; col < 8; col += WIDTH / 2) {
        Floats v[4];
        const std::byte* from = static_cast<const std::byte*>(in) + 4 * col;
        to_columns(v, [=](int r) { return from + r % 8 * in_stride + r / 8 * 16; });
        UNROLL for (int c = 0; c < 4; c++) {
            std::byte* to = static_cast<std::byte*>(out) + (col + c) * out_stride;
            if (WIDTH == 8) store(to, v[c]);
            else store(to, lower(v[c])), store(to + 4 * out_stride, upper(v[c]));
        }
    }
}
#if SIMD_BITS == 512
// 16 rows of bytes, `stride` apart: to (columns / 4, 16, 4)
inline void transpose16(std::byte* out, const std::byte* in, int64_t stride, int columns) {
    for (int i = 0; i < columns; i += 16, out += 256) {
        Floats v[4];
        to_columns(v, [=](int r) { return in + i + r * stride; });
        UNROLL for (int k = 0; k < 4; k++) store(out + 64 * k, v[k]);
    }
}
#endif
#endif

// -- unpacking: the layer ------------------------------------------------------------------------
//
// Here registers hold part of a row: 32 bytes of weights, eight sums, eight numbers. NEON takes two for that.

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint32_t Words4 __attribute__((vector_size(16)));

#if SIMD_BITS > 128
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef float Floats8 __attribute__((vector_size(32)));

INLINE Bytes32 all8(int v) { return (Bytes32)_mm256_set1_epi8(char(v)); }
INLINE __m256i all16(int v) { return _mm256_set1_epi16(int16_t(v)); }
// Bits of a byte's neighbour come in: to be masked.
INLINE Bytes32 right(Bytes32 b, int n) { return (Bytes32)_mm256_srli_epi16((__m256i)b, n); }
INLINE Bytes32 left(Bytes32 b, int n) { return (Bytes32)_mm256_slli_epi16((__m256i)b, n); }
// The lower halves of 16 bytes, and then the upper ones.
INLINE Bytes32 nibbles(const std::byte* p) {
    __m256i b = _mm256_broadcastsi128_si256(load<__m128i>(p));
    return (Bytes32)_mm256_srlv_epi32(b, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)) & all8(15);
}
// 16 where the mask has bit i, for 32 i.
INLINE Bytes32 fifth_bits(uint32_t mask) {
    __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    Bytes32 b = (Bytes32)_mm256_shuffle_epi8(_mm256_set1_epi32(int(mask)), places);
    Bytes32 bit = (Bytes32)_mm256_set1_epi64x(int64_t(0x8040201008040201));
    return (Bytes32)((b & bit) == bit) & all8(16);
}
INLINE Bytes32 in_table(Bytes32 q) {
    __m256i table = _mm256_broadcastsi128_si256(load<__m128i>(IQ4_TABLE.data()));
    return (Bytes32)_mm256_shuffle_epi8(table, (__m256i)q);
}
using Shorts16 = __m256i;
INLINE Shorts16 shorts(Bytes16 b) { return _mm256_cvtepi8_epi16((__m128i)b); }

INLINE float half_at(const std::byte* p) { return _cvtsh_ss(load<uint16_t>(p)); }
// Of each 32 bits, the lower 16 as f16.
INLINE Floats8 lower_halves(Ints8 v) {
    __m256i low = (__m256i)(v & 0xFFFF);
    low = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0xD8);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(low));
}
template <class Of> INLINE Ints8 eight_of(const Of& of) {
    __m128i v[2];                                      // g++ would set a vector of eight in memory
    UNROLL for (int i = 0; i < 2; i++) {
        v[i] = _mm_insert_epi32(_mm_cvtsi32_si128(of(4 * i)), of(4 * i + 1), 1);
        v[i] = _mm_insert_epi32(_mm_insert_epi32(v[i], of(4 * i + 2), 2), of(4 * i + 3), 3);
    }
    return (Ints8)_mm256_set_m128i(v[1], v[0]);
}
INLINE Floats8 eight(float v) { return _mm256_set1_ps(v); }
INLINE Floats8 to_floats(Ints8 v) { return _mm256_cvtepi32_ps((__m256i)v); }
INLINE Floats8 eight_bytes(const int8_t* q) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(q)));
}
#else
template <class V> struct Two {
    V low, high;
    friend Two operator&(Two a, Two b) { return {a.low & b.low, a.high & b.high}; }
    friend Two operator|(Two a, Two b) { return {a.low | b.low, a.high | b.high}; }
    friend Two operator^(Two a, Two b) { return {a.low ^ b.low, a.high ^ b.high}; }
    friend Two operator*(Two a, Two b) { return {a.low * b.low, a.high * b.high}; }
    friend Two operator-(Two a, Two b) { return {a.low - b.low, a.high - b.high}; }
    friend Two operator-(Two a) { return {-a.low, -a.high}; }
    friend Two operator>>(Two a, int n) { return {a.low >> n, a.high >> n}; }
    friend Two operator<<(Two a, int n) { return {a.low << n, a.high << n}; }
};
using Bytes32 = Two<Bytes16>;
using Ints8 = Two<int32x4_t>;
using Floats8 = Two<float32x4_t>;

INLINE Bytes32 all8(int v) { return {vdupq_n_u8(uint8_t(v)), vdupq_n_u8(uint8_t(v))}; }
INLINE Bytes32 right(Bytes32 b, int n) { return b >> n; }
INLINE Bytes32 left(Bytes32 b, int n) { return b << n; }
INLINE Bytes32 nibbles(const std::byte* p) {
    Bytes16 b = load<Bytes16>(p);
    return {b & 15, b >> 4};
}
INLINE Bytes32 fifth_bits(uint32_t mask) {
    uint8x8_t bit = vcreate_u8(0x8040201008040201);
    auto half = [&](uint32_t m) {
        Bytes16 b = vcombine_u8(vdup_n_u8(uint8_t(m)), vdup_n_u8(uint8_t(m >> 8)));
        return vtstq_u8(b, vcombine_u8(bit, bit)) & 16;
    };
    return {half(mask), half(mask >> 16)};
}
INLINE Bytes16 in_table(Bytes16 q) { return vqtbl1q_u8(load<Bytes16>(IQ4_TABLE.data()), q); }
INLINE Bytes32 in_table(Bytes32 q) { return {in_table(q.low), in_table(q.high)}; }
using Shorts16 = Two<int16x8_t>;
INLINE Shorts16 shorts(Bytes16 b) {
    return {vmovl_s8(vget_low_s8((int8x16_t)b)), vmovl_high_s8((int8x16_t)b)};
}

INLINE float32x4_t lower_halves(int32x4_t v) { return vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(v))); }
INLINE Floats8 lower_halves(Ints8 v) { return {lower_halves(v.low), lower_halves(v.high)}; }
INLINE float half_at(const std::byte* p) { return lower_halves(vdupq_n_s32(load<uint16_t>(p)))[0]; }
template <class Of> INLINE Ints8 eight_of(const Of& of) {
    return {int32x4_t{of(0), of(1), of(2), of(3)}, int32x4_t{of(4), of(5), of(6), of(7)}};
}
INLINE Floats8 eight(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
INLINE Floats8 to_floats(Ints8 v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }
INLINE Floats8 eight_bytes(const int8_t* q) {
    int16x8_t v = vmovl_s8(vld1_s8(q));
    return to_floats(Ints8{vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v)});
}
#endif

// -- unpacking: bytes and scales -----------------------------------------------------------------
//
// bytes<D>(p, sink) hands a block's values to sink(i, w): w holds the 32 values from 32 i on, plus
// offset_of(D), which makes them unsigned bytes. gguf.h says what the bits mean.

// Field F of the values from i on (a multiple of 32), to bits `to` and up of their bytes
template <BitField F> INLINE Bytes32 bits(const std::byte* p, int i, int to) {
    const Bytes32 b = load<Bytes32>(p + F.byte(i, 0));
    const int n = to - F.shift(i, 0);
    return (n < 0 ? right(b, -n) : left(b, n)) & all8(F.mask() << to);
}

template <Dtype D, class Sink> INLINE void bytes(const std::byte* p, const Sink& sink) {
    constexpr BlockLayout L = layout_of(D);
    constexpr bool HIGH = L.high.bits > 0;
    if constexpr (looked_up(D)) {
        for (int i = 0; i < format_of(D).values / 32; i++)
            sink(i, in_table(nibbles(p + L.low.at + 16 * i)));
    } else if constexpr (D == Dtype::Q8_0) {
        sink(0, load<Bytes32>(p + L.low.at) ^ all8(128));
    } else if constexpr (of_32(D)) {
        const Bytes32 q = nibbles(p + L.low.at);
        sink(0, HIGH ? q | fifth_bits(load<uint32_t>(p + L.high.at)) : q);
    } else {
        UNROLL for (int i = 0; i < 8; i++) {
            Bytes32 q = bits<L.low>(p, 32 * i, 0);
            if constexpr (HIGH) q = q | bits<L.high>(p, 32 * i, L.low.bits);
            sink(i, q);
        }
    }
}

// Of 16 groups: the scale, and the minimum or, where there is none, what the offset is to be times. No number
// is beyond a signed byte.
struct Scales { Bytes16 scale, minimum; };

constexpr uint32_t FOUR_BITS = 0x0F0F0F0F, SIX_BITS = 0x3F3F3F3F, UPPER_TWO = 0x30303030;   // of four bytes

// six_bits of gguf.h: eight scales and eight minimums.
INLINE Bytes16 six_bits(const std::byte* p) {
    const Words4 v = load<Words4>(p);                  // d and m, then the three words of scales
    Words4 low = __builtin_shufflevector(v, v, 1, 3, 2, 3) >> Words4{0, 0, 0, 4};
    Words4 high = __builtin_shufflevector(v, v, 0, 1, 0, 2) >> 2;
    return (Bytes16)((low & Words4{SIX_BITS, FOUR_BITS, SIX_BITS, FOUR_BITS}) |
                     (high & Words4{0, UPPER_TWO, 0, UPPER_TWO}));
}
INLINE Bytes16 lower_twice(Bytes16 v) {
    return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}
INLINE Bytes16 upper_twice(Bytes16 v) {
    return __builtin_shufflevector(v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
}
INLINE Bytes16 scales_q3_k(const std::byte* p) {
    uint32_t a = load<uint32_t>(p), b = load<uint32_t>(p + 4), c = load<uint32_t>(p + 8);
    Words4 four = {a, b, a >> 4, b >> 4}, two = {c << 4, c << 2, c, c >> 2};
    return (Bytes16)((four & FOUR_BITS) | (two & UPPER_TWO)) - 32;
}

template <Dtype D> INLINE Scales scales(const std::byte* p) {
    if constexpr (in_32_groups(D)) {
        Bytes16 six = six_bits(p);
        return {lower_twice(six), upper_twice(six)};
    }
    p += layout_of(D).scales;
    Bytes16 b = D == Dtype::Q3_K ? scales_q3_k(p) : load<Bytes16>(p);
    if (D == Dtype::Q2_K) return {b & 15, b >> 4};
    return {b, b};
}

// What a block's values are times, as numbers. Of 32 values: 1 and, as their minimum is added, -1.
template <Dtype D> struct Factors {
    float d, m = 0;
    alignas(32) int16_t scale[16] = {1, 1}, minimum[16] = {-1, -1};

    INLINE explicit Factors(const std::byte* p) : d(half_at(p + layout_of(D).d)) {
        if (has_minimums(D)) m = half_at(p + layout_of(D).m);
        if constexpr (looked_up(D)) {
            for (int g = 0; !of_32(D) && g < 16; g++) scale[g] = int16_t(group_scale<D>(Bytes(p), g).scale);
        } else if constexpr (!of_32(D)) {
            Scales s = scales<D>(p);
            store(scale, shorts(s.scale)), store(minimum, shorts(s.minimum));
        }
    }
};

// -- 3  Widening ---------------------------------------------------------------------------------

// out: the values of the block at p, with the roundings of gguf.h's dequantise
template <Dtype D> INLINE void dequantise_block(float* out, const std::byte* p) {
    constexpr int VALUES = format_of(D).values;
    const Factors<D> f(p);
    float scale[VALUES / GROUP], minimum[VALUES / GROUP];
    for (int g = 0; g < VALUES / GROUP; g++)
        scale[g] = f.d * float(f.scale[g]), minimum[g] = f.m * float(f.minimum[g]);
    bytes<D>(p, [&](int i, Bytes32 w) {
        alignas(32) int8_t q[32];
        store(q, w - all8(offset_of(D)));
        UNROLL for (int k = 0; k < 32; k += 8) {
            Floats8 y = eight(scale[2 * i + k / GROUP]) * eight_bytes(q + k);
            store(out + 32 * i + k, has_minimums(D) ? y - eight(minimum[2 * i + k / GROUP]) : y);
        }
    });
}

// n values of a quantised row from p on.
inline void dequantise_row(float* out, const std::byte* p, Dtype dtype, int n) {
    for_format(dtype, [=]<Dtype D>() {
        const std::byte* at = p;
        for (int i = 0; i < n; i += format_of(D).values, at += format_of(D).bytes)
            dequantise_block<D>(out + i, at);
    });
}

template <class Row> constexpr size_t STORED = 2;      // bytes of a weight
template <> constexpr size_t STORED<F32Row> = 4;
template <> constexpr size_t STORED<E4m3Row> = 1;

// Numbers i .. i + WIDTH of a row.
INLINE Floats widen(F32Row w, int i) { return load<Floats>(w.p + 4 * size_t(i)); }
INLINE Floats widen(F16Row w, int i) { return halves_as_floats(w.p + 2 * size_t(i)); }
INLINE Floats widen(Bf16Row w, int i) { return (Floats)(halves_as_words(w.p + 2 * size_t(i)) << 16); }
// Exponent and fraction of an e4m3 are moved to their places in an f32 and the bias (7 against 127) is made
// up by a multiplication with 2^120, which also does the subnormals. 127 is NaN.
INLINE Floats widen(E4m3Row w, int i) {
    Words b = bytes_as_words(w.p + i), magnitude = b & 127;
    Floats value = (Floats)(magnitude << 20) * 0x1p120f;
    return (Floats)((Words)value | b >> 7 << 31 | (Words)(magnitude == 127));
}

// The processor's own guesses at what will be read stop at each page.
constexpr int AHEAD = 4096;
INLINE void fetch_ahead(const std::byte* p, size_t bytes) {
    for (size_t i = 0; SIMD_BITS > 128 && i < bytes; i += 64) fetch(p + i);
}

template <class Row> void widen_row(float* out, Row w, int n) {
    constexpr int AT_ONCE = 32;
    int i = 0;
    for (; i + AT_ONCE <= n; i += AT_ONCE) {
        fetch_ahead(w.p + size_t(i) * STORED<Row> + AHEAD, AT_ONCE * STORED<Row>);
        UNROLL for (int k = 0; k < AT_ONCE; k += WIDTH) store(out + i + k, widen(w, i + k));
    }
    for (; i + WIDTH <= n; i += WIDTH) store(out + i, widen(w, i));
    for (; i < n; i++) out[i] = w(i);
}

// body(the row at p), if registers can be widened from its dtype.
template <class Body> INLINE bool with_row(Dtype dtype, const std::byte* p, const Body& body) {
    switch (dtype) {
    case Dtype::F32: return body(F32Row{p}), true;
    case Dtype::BF16: return body(Bf16Row{p}), true;
    case Dtype::F16: return body(F16Row{p}), true;
    case Dtype::F8_E4M3: return body(E4m3Row{p}), true;
    default: return false;
    }
}

// Columns begin .. begin + n of row r, e4m3 without its scales. `begin` is a multiple of 256.
inline void widen_part(float* out, const Matrix& w, int r, int begin, int n) {
    const std::byte* p = w.row(r) + row_bytes(w.dtype, begin);
    if (w.dtype == Dtype::F64) return widen_into(out, F64Row{p}, n);
    if (!with_row(w.dtype, p, [=](auto row) { widen_row(out, row, n); })) dequantise_row(out, p, w.dtype, n);
}

inline void widen(float* out, const Matrix& w, int r) {
    widen_part(out, w, r, 0, w.cols);
    const std::byte* scale = w.scale_row(r);
    for (int i = 0; scale && i < w.cols; i++) out[i] *= load<float>(scale + 4 * size_t(i / SCALE_BLOCK));
}

// -- 4  Few tokens -------------------------------------------------------------------------------

// Vectors of so many columns fill half of an L1 cache: they are to meet many rows at once.
constexpr int LONG = 4096, LONG_ROWS = 8;

// The sums of R rows with T vectors; `ahead`: bytes to the rows that come after these.
template <class Row, int R, int T> struct Dots {
    Lanes v[R][T] = {};

    INLINE void add_products(const Row* w, size_t ahead, ConstRows x, int begin, int end) {
        int i = begin;
        for (; i + LANES <= end; i += LANES) {
            fetch_rows(w, ahead, size_t(i / LANES));
            step(w, x, i);
        }
        if (i == end) return;
        Rest rest(w, x, i, end - i);
        step(rest.row, {rest.x[0], LANES}, 0);
    }

private:
    // The columns i .. i + 16. NEON has no registers to spare for all of a row's numbers at once.
    template <class Weights> INLINE void step(const Weights* w, ConstRows x, int i) {
        constexpr int N = SIMD_BITS == 128 ? 1 : SIXTEEN;
        UNROLL for (int k = 0; k < SIXTEEN; k += N) {
            Floats xt[T][N], wr[N];
            UNROLL for (int t = 0; t < T; t++)
                UNROLL for (int j = 0; j < N; j++) {
                    xt[t][j] = floats(x[t] + i + (k + j) * WIDTH);
                    if (R > 1) keep(xt[t][j]);
                }
            UNROLL for (int r = 0; r < R; r++) {
                UNROLL for (int j = 0; j < N; j++) wr[j] = widen(w[r], i + (k + j) * WIDTH);
                UNROLL for (int t = 0; t < T; t++)
                    UNROLL for (int j = 0; j < N; j++) v[r][t][k + j] = fma(wr[j], xt[t][j], v[r][t][k + j]);
            }
        }
    }
    // The n < 16 columns from i on, filled up with what adds nothing to any number: -0 times 0.
    struct Rest {
        float w[R][LANES], x[T][LANES];
        F32Row row[R];
        [[gnu::noinline]] Rest(const Row* from, ConstRows xs, int i, int n) : x{} {
            for (int r = 0; r < R; r++) {
                for (int j = 0; j < LANES; j++) w[r][j] = j < n ? from[r](i + j) : -0.0f;
                row[r].p = reinterpret_cast<const std::byte*>(w[r]);
            }
            for (int t = 0; t < T; t++) std::copy_n(xs[t] + i, n, x[t]);
        }
    };
    // At step i: of few rows the next ones, as memory has them; of many the columns to come, by turns.
    INLINE void fetch_rows(const Row* w, size_t ahead, size_t i) {
        constexpr size_t BYTES = STORED<Row> * LANES, TURNS = std::max<size_t>(64 / BYTES, 1);
        constexpr bool NEXT = SIMD_BITS == 512 && R > 1 && R < LONG_ROWS;
        for (size_t c = 0; NEXT && c < R * BYTES; c += 64) fetch<SECOND>(w[0].p + ahead + i * R * BYTES + c);
        for (size_t r = i % TURNS; R == LONG_ROWS && r < R; r += TURNS)
            fetch<SECOND>(w[r].p + i * BYTES + 2048);
    }
};

template <class Row, int R, int T> void dots(Rows out, ConstRows x, const Matrix& w, int first) {
    Row row[R];
    UNROLL for (int r = 0; r < R; r++) row[r] = {w.row(first + r)};
    const size_t ahead = size_t(R) * size_t(row[R - 1].p - row[0].p) / std::max(R - 1, 1);
    Dots<Row, R, T> sums;
    if constexpr (std::is_same_v<Row, E4m3Row>) {
        for (int begin = 0; begin < w.cols; begin += SCALE_BLOCK) {
            Dots<Row, R, T> block;
            block.add_products(row, ahead, x, begin, std::min(w.cols, begin + SCALE_BLOCK));
            UNROLL for (int r = 0; r < R; r++) {
                Floats scale = all(load<float>(w.scale_row(first + r) + begin / SCALE_BLOCK * 4));
                UNROLL for (int t = 0; t < T; t++)
                    UNROLL for (int k = 0; k < SIXTEEN; k++)
                        sums.v[r][t][k] = fma(scale, block.v[r][t][k], sums.v[r][t][k]);
            }
        }
    } else {
        sums.add_products(row, ahead, x, 0, w.cols);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) out[t][first + r] = sum(sums.v[r][t]);
}

// Rows at once, for chains of additions to hide each other's latency. How many was measured: with AVX-512,
// Intel is fastest with four, AMD (Zen 4) with two, or eight long ones. AVX2 asks for nothing ahead and is
// slower with two, which are two streams from memory. The smaller numbers take what is left.
template <class Row, int T> void few(Rows out, ConstRows x, const Matrix& w, int begin, int end) {
    int r = begin;
#if SIMD_BITS == 512
    bool long_rows = !INTEL && w.cols >= LONG;
    for (; long_rows && r + LONG_ROWS <= end; r += LONG_ROWS) dots<Row, LONG_ROWS, T>(out, x, w, r);
    for (; (INTEL || long_rows) && r + 4 <= end; r += 4) dots<Row, 4, T>(out, x, w, r);
#endif
    for (; SIMD_BITS != 256 && r + 2 <= end; r += 2) dots<Row, 2, T>(out, x, w, r);
    for (; r < end; r++) dots<Row, 1, T>(out, x, w, r);
}

inline float dot_real(const float* a, const float* b, int n) {
    F32Row row{reinterpret_cast<const std::byte*>(a)};
    Dots<F32Row, 1, 1> all;
    all.add_products(&row, 0, {b, 0}, 0, n);
    return sum(all.v[0][0]);
}

// -- 5  Blocks of rows ---------------------------------------------------------------------------

constexpr int TILE_ROWS = REGISTERS * 3 / 16, TILE_TOKENS = 4;      // sums in three quarters of the registers
constexpr int BLOCK_ROWS = 12, BLOCK_TOKENS = 128, BLOCK_COLS = 256;

struct FloatBlock {
    alignas(64) float w[BLOCK_ROWS][BLOCK_COLS + LANES];   // widened weights; rows in different cache sets
    Lanes lanes[BLOCK_TOKENS / TILE_TOKENS][BLOCK_ROWS][TILE_TOKENS];      // sums so far, of a tile together
    float x[BLOCK_TOKENS][BLOCK_COLS];                     // used where columns do not fill the lanes
};

// lanes += products of w[r] and x[t] over n columns, n a multiple of 16: one register after the other.
template <int R, int T, bool SCALED>
void tile(FloatBlock& b, int row, int token, int col, ConstRows x, int n, const float* scale) {
    auto lanes = b.lanes[token / TILE_TOKENS] + row;
    for (int k = 0; k < SIXTEEN; k++) {
        Floats v[R][T];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) v[r][t] = SCALED ? Floats{} : lanes[r][t][k];
        for (int i = k * WIDTH; i < n; i += LANES) {
            Floats w[R];
            UNROLL for (int r = 0; r < R; r++) w[r] = floats(b.w[row + r] + col + i);
            UNROLL for (int t = 0; t < T; t++) {
                Floats xt = floats(x[t] + i);
                UNROLL for (int r = 0; r < R; r++) v[r][t] = fma(w[r], xt, v[r][t]);
            }
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++)
                lanes[r][t][k] = SCALED ? fma(all(scale[r]), v[r][t], lanes[r][t][k]) : v[r][t];
    }
}

// Adds the columns col .. col + n of the block; x begins at the first of them. scale: (R), or none
inline void add_columns(FloatBlock& b, int R, ConstRows x, int T, int col, int n, const float* scale) {
    for (int t = 0; t < T; t += TILE_TOKENS)
        for (int r = 0; r < R; r += TILE_ROWS)
            with_constants<TILE_ROWS, TILE_TOKENS>(R - r, T - t, [&]<int ROWS, int TOKENS>() {
                if (scale) tile<ROWS, TOKENS, true>(b, r, t, col, {x[t], x.stride}, n, scale + r);
                else tile<ROWS, TOKENS, false>(b, r, t, col, {x[t], x.stride}, n, nullptr);
            });
}

// The block's R rows from `row` on, for T tokens.
inline void float_block(FloatBlock& b, Rows out, ConstRows x, const Matrix& w, int row, int R, int T) {
    const bool scaled = w.dtype == Dtype::F8_E4M3;
    const int step = scaled ? SCALE_BLOCK : BLOCK_COLS;
    std::memset(b.lanes, 0, size_t(T + TILE_TOKENS - 1) / TILE_TOKENS * sizeof *b.lanes);
    for (int begin = 0; begin < w.cols; begin += BLOCK_COLS) {
        int n = std::min(BLOCK_COLS, w.cols - begin), whole = (n + LANES - 1) / LANES * LANES;
        ConstRows part{x[0] + begin, x.stride};
        for (int r = 0; r < R; r++) {
            widen_part(b.w[r], w, row + r, begin, n);
            std::fill(b.w[r] + n, b.w[r] + whole, -0.0f);      // which adds nothing, times 0
        }
        if (n < whole) {
            for (int t = 0; t < T; t++) std::fill_n(std::copy_n(part[t], n, b.x[t]), whole - n, 0.0f);
            part = {b.x[0], BLOCK_COLS};
        }
        for (int col = 0; col < n; col += step) {
            float scale[BLOCK_ROWS];
            for (int r = 0; scaled && r < R; r++)
                scale[r] = load<float>(w.scale_row(row + r) + 4 * size_t((begin + col) / SCALE_BLOCK));
            add_columns(b, R, {part[0] + col, part.stride}, T, col, std::min(step, whole - col),
                        scaled ? scale : nullptr);
        }
    }
    for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) out[t][row + r] = sum(b.lanes[t / TILE_TOKENS][r][t % TILE_TOKENS]);
}

inline void rows(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    auto few_rows = [&]<class Row>(Row) {
        with_constant<MANY_TOKENS - 1>(T, [&]<int N>() { few<Row, N>(out, x, w, begin, end); });
    };
    if (T < MANY_TOKENS && with_row(w.dtype, nullptr, few_rows)) return;
    thread_local FloatBlock block;
    for (int t = 0; t < T; t += BLOCK_TOKENS)
        for (int r = begin; r < end; r += BLOCK_ROWS)
            float_block(block, {out[t], out.stride}, {x[t], x.stride}, w, r, std::min(BLOCK_ROWS, end - r),
                        std::min(BLOCK_TOKENS, T - t));
}

// -- 6  Weighted sums ----------------------------------------------------------------------------

constexpr int WEIGH_TOKENS = 6, WEIGH_ROWS = 64;       // rows that stay in cache
constexpr int WEIGH_REGISTERS = REGISTERS / 8;         // of columns: for six tokens, sums in three quarters

// out[t] (N registers of columns from col on) += sum_j p[t][j] v[j]
template <class Row, int T, int N>
void weigh_tile(Rows out, ConstRows p, const Matrix& v, int col, int begin, int end) {
    Floats y[T][N];
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int k = 0; k < N; k++) y[t][k] = floats(out[t] + col + k * WIDTH);
    const int64_t stride = v.row(1) - v.row(0);
    const std::byte* at = v.row(begin) + STORED<Row> * size_t(col);
    for (int j = begin; j < end; j++, at += stride) {
        fetch_ahead(at + WEIGH_ROWS * stride, N * WIDTH * STORED<Row>);
        Floats w[N];
        UNROLL for (int k = 0; k < N; k++) w[k] = widen(Row{at}, k * WIDTH);
        UNROLL for (int t = 0; t < T; t++) {
            Floats factor = all(p[t][j]);
            UNROLL for (int k = 0; k < N; k++) y[t][k] = fma(factor, w[k], y[t][k]);
        }
    }
    UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int k = 0; k < N; k++) store(out[t] + col + k * WIDTH, y[t][k]);
}

// T <= WEIGH_TOKENS tokens, rows begin .. end.
template <class Row, int T> void weigh_tokens(Rows out, ConstRows p, const Matrix& v, int begin, int end) {
    constexpr int N = WEIGH_REGISTERS;
    int col = 0;
    for (; col + N * WIDTH <= v.cols; col += N * WIDTH) weigh_tile<Row, T, N>(out, p, v, col, begin, end);
    for (; col + WIDTH <= v.cols; col += WIDTH) weigh_tile<Row, T, 1>(out, p, v, col, begin, end);
    for (; col < v.cols; col++)
        for (int t = 0; t < T; t++)
            for (int j = begin; j < end; j++)
                out[t][col] = std::fma(p[t][j], Row{v.row(j)}(col), out[t][col]);
}

template <class Row> void weigh_rows(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    for (int j = 0; j < n; j += WEIGH_ROWS)
        for (int t = 0; t < T; t += WEIGH_TOKENS)
            with_constant<WEIGH_TOKENS>(T - t, [&]<int N>() {
                Rows some{out[t], out.stride};
                weigh_tokens<Row, N>(some, {p[t], p.stride}, v, j, std::min(n, j + WEIGH_ROWS));
            });
}

inline void weigh(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    if (v.dtype == Dtype::F32) return weigh_rows<F32Row>(out, p, v, T, n);
    if (v.dtype == Dtype::BF16) return weigh_rows<Bf16Row>(out, p, v, T, n);
    thread_local std::vector<float> rows;
    rows.resize(size_t(WEIGH_ROWS) * size_t(v.cols));
    Matrix part = real_matrix(rows.data(), WEIGH_ROWS, v.cols);
    for (int begin = 0; begin < n; begin += WEIGH_ROWS) {
        int count = std::min(WEIGH_ROWS, n - begin);
        for (int j = 0; j < count; j++) widen(rows.data() + size_t(j) * size_t(v.cols), v, begin + j);
        weigh_rows<F32Row>(out, {p[0] + begin, p.stride}, part, T, count);
    }
}

// -- 7  exp --------------------------------------------------------------------------------------

INLINE HalfFloats exp_within_bounds(HalfFloats x) {
    Doubles wide = doubles(x), magic = all(TO_INTEGER_F64);
    Doubles shifted = fma(wide, all(LOG2_E), magic), k = shifted - magic;
    Doubles r = fma(k, all(-LN_2), wide), p = all(EXP_SERIES[0]);
    for (size_t i = 1; i < std::size(EXP_SERIES); i++) p = fma(p, r, all(EXP_SERIES[i]));
    return to_floats(p * (Doubles)(((Longs)shifted + 1023) << 52));        // k is in the low bits
}

// exp_of each number.
INLINE Floats exp_of(Floats x) {
    constexpr float LOW = -104.0f, HIGH = 88.8f;
    Floats bounded = min(max(x, all(LOW)), all(HIGH));
    Floats y = join(exp_within_bounds(lower(bounded)), exp_within_bounds(upper(bounded)));
    y = x > HIGH ? all(std::numeric_limits<float>::infinity()) : y;
    y = x <= LOW ? all(0.0f) : y;
    return x == x ? y : x;
}

inline void softmax(float* z, float scale, int n) {
    constexpr float INF = std::numeric_limits<float>::infinity();
    const int whole = n / LANES * LANES, end = (n + LANES - 1) / LANES * LANES;
    float rest[LANES], most[WIDTH];        // the last numbers, and -inf, of which e^x is 0
    std::fill_n(std::copy_n(z + whole, n - whole, rest), LANES - (n - whole), -INF);
    auto at = [&](int i) { return i < whole ? z + i : rest + (i - whole); };
    Floats top = all(-INF);
    for (int i = 0; i < end; i += WIDTH) {
        Floats x = floats(at(i)) * scale;
        store(at(i), x);
        top = max(x, top);                 // the second, if x is NaN
    }
    store(most, top);
    UNROLL for (int j = WIDTH / 2; j > 0; j /= 2)
        UNROLL for (int i = 0; i < j; i++) most[i] = std::max(most[i], most[i + j]);
    top = all(most[0]);
    Lanes lanes = {};
    for (int i = 0; i < end; i += LANES) {
        UNROLL for (int k = 0; k < SIXTEEN; k++) {
            Floats e = exp_of(floats(at(i) + k * WIDTH) - top);
            store(at(i) + k * WIDTH, e);
            lanes[k] += e;
        }
    }
    Floats total = all(sum(lanes));
    for (int i = 0; i < end; i += WIDTH) store(at(i), floats(at(i)) / total);
    std::copy_n(rest, n - whole, z + whole);
}

inline void silu_times(float* gate, const float* up, int n) {
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        Floats z = floats(gate + i);
        store(gate + i, z / (1 + exp_of(-z)) * floats(up + i));
    }
    silu_times_plain(gate + i, up + i, n - i);
}

// -- 8  Arranged ---------------------------------------------------------------------------------
//
// In a tile of section 5 a register holds the lanes of one sum, and 12 products need 7 registers loaded. With
// many tokens that is turned around: a register holds one lane of the sums of 8 or 16 rows, and one number of
// x, repeated, meets them all. A lane's products come one after the other, so weights and x are arranged by
// lanes: number i of a row is number i / 16 of lane i mod 16. (Whether that pays on NEON was never measured.)

#if SIMD_BITS > 128
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
};

// Rows of bf16 are transposed as pairs of columns, and widened then.
inline bool pack_pairs(const WideBlock& block, const Matrix& m, int first, int R) {
    if (m.dtype != Dtype::BF16 || m.cols % 8 != 0 || R % WIDTH != 0) return false;
    const int64_t stride = m.row(1) - m.row(0);
    for (int r = 0; r < R; r += WIDTH) {
        const std::byte* from = m.row(first + r);
        for (int col = 0; col < m.cols; col += 8, from += 16) {
            Floats pairs[4];
            to_columns(pairs, [=](int k) { return from + k * stride; });
            float* to = block.w + col % LANES * block.lane + col / LANES * WIDE_ROWS + r;
            UNROLL for (int i = 0; i < 4; i++, to += 2 * block.lane) {
                Words two = (Words)pairs[i];
                store(to, two << 16), store(to + block.lane, two & 0xFFFF0000);
            }
        }
    }
    return true;
}

// R rows from `first` on. What stands in the other rows is of no account.
inline void pack(const WideBlock& block, const Matrix& m, int first, int R) {
    if (pack_pairs(block, m, first, R)) return;
    for (int r = 0; r < R; r++) {
        widen_part(block.row + r % 8 * block.row_size, m, first + r, 0, m.cols);
        for (int b = 0; m.dtype == Dtype::F8_E4M3 && b * SCALE_BLOCK < m.cols; b++)
            block.scale[b * WIDE_ROWS + r] = load<float>(m.scale_row(first + r) + 4 * size_t(b));
        if (r % 8 < 7 && r + 1 < R) continue;
        for (int64_t i = 0; i < block.row_size; i += 8)
            transpose8(block.w + i % LANES * block.lane + i / LANES * WIDE_ROWS + r / 8 * 8, 4 * block.lane,
                       block.row + i, 4 * block.row_size);
    }
}

// What a tile is to do: to add `steps` products of a lane to its sums, or to begin them, and then to add the
// sums of other lanes from that many planes before; the result is in the first of these planes. It comes by
// reference: a copy, read in wider pieces than were written, would wait for the stores of the tile before.
struct WideStep {
    float* sum;                            // (T, WIDE_ROWS)
    const float *w, *x, *scale, *next;     // next: the x of the tile after this one
    int steps, planes;
    bool first;
};

// v[r][t] += a register of rows, number r of them, times vector t
template <int R, int T>
INLINE void add_steps(Floats (&v)[R][T], const float* w, const float* x, const float* next, int steps) {
    for (int k = 0; k < steps; k++, w += WIDE_ROWS, x += ARRANGED_TOKENS, next += ARRANGED_TOKENS) {
        fetch(next);
        Floats wk[R];
        UNROLL for (int r = 0; r < R; r++) wk[r] = floats(w + r * WIDTH);
        UNROLL for (int t = 0; t < T; t++) {
            Floats xt = all(x[t]);
            UNROLL for (int r = 0; r < R; r++) v[r][t] = fma(wk[r], xt, v[r][t]);
        }
    }
}

template <int R, int T> INLINE void add_scaled_steps(Floats (&v)[R][T], WideStep& s) {
    constexpr int AT_ONCE = SCALE_BLOCK / LANES;
    for (; s.steps > 0; s.steps -= AT_ONCE, s.scale += WIDE_ROWS) {
        Floats part[R][T] = {};
        add_steps(part, s.w, s.x, s.next, std::min(s.steps, AT_ONCE));
        s.w += AT_ONCE * WIDE_ROWS, s.x += AT_ONCE * ARRANGED_TOKENS, s.next += AT_ONCE * ARRANGED_TOKENS;
        UNROLL for (int r = 0; r < R; r++) {
            Floats scale = floats(s.scale + r * WIDTH);
            UNROLL for (int t = 0; t < T; t++) v[r][t] = fma(scale, part[r][t], v[r][t]);
        }
    }
}

// The largest tile: three registers of rows times as many vectors as make sums in three quarters of the
// registers. With scales, half as many: there are two kinds of sums. MOST divides ARRANGED_TOKENS.
constexpr int WIDE_REGISTERS = 3, MOST = REGISTERS / 4;

// R registers of rows, T vectors; with scales, those of each SCALE_BLOCK apart
template <int R, int T> void wide_tile(const WideStep& step) {
    WideStep s = step;
    Floats v[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++)
            v[r][t] = s.first ? Floats{} : floats(s.sum + t * WIDE_ROWS + r * WIDTH);
    if (!s.scale) add_steps(v, s.w, s.x, s.next, s.steps);
    else if constexpr (T <= MOST / 2) add_scaled_steps(v, s);
    for (; s.planes > 0; s.planes--) {
        s.sum -= WIDE_PLANE;
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int t = 0; t < T; t++) v[r][t] += floats(s.sum + t * WIDE_ROWS + r * WIDTH);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) store(s.sum + t * WIDE_ROWS + r * WIDTH, v[r][t]);
}

// The lane whose turn it is, of R packed rows times T <= WIDE_TOKENS vectors. The planes of sums are a stack:
// as lanes come in the order of their bits read backwards, each finds on it what the tree of sum_lanes adds
// it to. Of a long row as much is taken at once as stays in the first cache for all vectors.
inline void wide_lane(const WideBlock& block, const float* x, const Matrix& w, unsigned turn, int R, int T) {
    constexpr int AT_ONCE = 128;
    static_assert(LANES == 16);
    const int lane = int((turn & 1) * 8 + (turn & 2) * 2 + (turn & 4) / 2 + (turn & 8) / 8);
    const int plane = std::popcount(turn), add = std::countr_one(turn), steps = steps_of(w.cols, lane);
    const bool scaled = w.dtype == Dtype::F8_E4M3;
    const int tokens = scaled ? MOST / 2 : MOST, rows = WIDE_REGISTERS * WIDTH;
    auto at = [&](int t, int k) {
        const float* group = x + size_t(t / ARRANGED_TOKENS) * arranged_size(w.cols);
        return group + size_t(lane) * arranged_lane(w.cols) + k * ARRANGED_TOKENS + t % ARRANGED_TOKENS;
    };
    auto some = [&](int k, int t) {        // steps from k on, of a few vectors from t on
        WideStep s{};
        s.steps = std::min(steps - k, AT_ONCE), s.first = k == 0, s.planes = k + AT_ONCE < steps ? 0 : add;
        s.x = at(t, k), s.next = t + tokens < T ? at(t + tokens, k) : at(0, k + s.steps);
        for (int r = 0; r < R; r += rows) {
            s.sum = block.sum + plane * WIDE_PLANE + t * WIDE_ROWS + r;
            s.w = block.w + lane * block.lane + k * WIDE_ROWS + r;
            s.scale = scaled ? block.scale + k / (SCALE_BLOCK / LANES) * WIDE_ROWS + r : nullptr;
            with_constants<WIDE_REGISTERS, MOST>((R - r + WIDTH - 1) / WIDTH, std::min(tokens, T - t),
                                                 [&]<int N, int M>() { wide_tile<N, M>(s); });
        }
    };
    for (int k = 0; k == 0 || k < steps; k += AT_ONCE)
        for (int t = 0; t < T; t += tokens) some(k, t);
}

inline void arranged_rows(Rows out, const float* x, const Matrix& w, int T, int begin, int end) {
    thread_local std::vector<std::byte> memory;
    WideBlock block(memory, w.cols);
    for (int r = begin; r < end; r += WIDE_ROWS) {
        int R = std::min(WIDE_ROWS, end - r);
        pack(block, w, r, R);
        for (int t = 0; t < T; t += WIDE_TOKENS) {
            const float* xt = x + size_t(t / ARRANGED_TOKENS) * arranged_size(w.cols);
            const int n = std::min(WIDE_TOKENS, T - t);
            for (unsigned turn = 0; turn < LANES; turn++) wide_lane(block, xt, w, turn, R, n);
            for (int i = 0; i < n; i++) std::copy_n(block.sum + i * WIDE_ROWS, R, out[t + i] + r);
        }
    }
}
#endif

// -- 9  Small integers ---------------------------------------------------------------------------

// What remains of offset_of in products: those of Q8_0 would be too much for 16 bits, so its bytes are signed
// but where the instruction adds in 32 bits and wants them unsigned.
constexpr int remaining_offset(Dtype d) {
    return d == Dtype::Q8_0 && SIMD_BITS != 512 ? 0 : offset_of(d);
}

#if SIMD_BITS > 128
using Sums = Ints8;                        // of 32 products

// 16 sums of two products. The instruction wants one side unsigned: signed weights give their sign to x.
template <Dtype D> INLINE __m256i products_of_2(Bytes32 w, __m256i x) {
    if (D != Dtype::Q8_0) return _mm256_maddubs_epi16((__m256i)w, x);
    __m256i s = (__m256i)(w ^ all8(128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
}
// 32 weights times x.
template <Dtype D> INLINE Sums dot32(Bytes32 w, const int8_t* x) {
#if SIMD_BITS == 512
    return (Sums)_mm256_dpbusd_epi32(_mm256_setzero_si256(), (__m256i)w, load<__m256i>(x));
#else
    return (Sums)_mm256_madd_epi16(products_of_2<D>(w, load<__m256i>(x)), all16(1));
#endif
}

// Four scales, each four times, as numbers of 16 bits.
template <Dtype D> INLINE __m256i spread(Bytes16 scale, int a, int b, int c, int d) {
    constexpr bool SIGNED = signed_scales(D);          // then they come to the upper halves first
    auto four = [](int g) {
        return int64_t((SIGNED ? 0x80 + 0x100 * unsigned(g) : 0x8000 + unsigned(g)) * 0x0001000100010001u);
    };
    __m256i both = _mm256_broadcastsi128_si256((__m128i)scale);
    both = _mm256_shuffle_epi8(both, _mm256_setr_epi64x(four(a), four(b), four(c), four(d)));
    return SIGNED ? _mm256_srai_epi16(both, 8) : both;
}
// sum + 64 weights times x, times the scales of their groups, g to g + 3
template <Dtype D> struct Scales64 {
#if SIMD_BITS == 512
    __m256i v;                             // sums of four products fit in 16 bits, too
    INLINE Scales64(Bytes16 scale, int g) : v(spread<D>(scale, g, g + 2, g + 1, g + 3)) {}
    INLINE Sums dot(Sums sum, Bytes32 low, Bytes32 high, const int8_t* x) const {
        __m256i four = _mm256_packs_epi32((__m256i)dot32<D>(low, x), (__m256i)dot32<D>(high, x + 32));
        return (Sums)_mm256_dpwssd_epi32((__m256i)sum, four, v);
    }
#else
    __m256i v[2];
    INLINE Scales64(Bytes16 scale, int g)
        : v{spread<D>(scale, g, g, g + 1, g + 1), spread<D>(scale, g + 2, g + 2, g + 3, g + 3)} {}
    INLINE Sums dot(Sums sum, Bytes32 low, Bytes32 high, const int8_t* x) const {
        sum += (Sums)_mm256_madd_epi16(products_of_2<D>(low, load<__m256i>(x)), v[0]);
        return sum + (Sums)_mm256_madd_epi16(products_of_2<D>(high, load<__m256i>(x + 32)), v[1]);
    }
#endif
};
INLINE Sums dot16(Shorts16 a, const int16_t* b) { return (Sums)_mm256_madd_epi16(a, load<__m256i>(b)); }
// The sums of the eight lanes of eight vectors.
INLINE Ints8 sum8(const Sums (&v)[BLOCK_LANES]) {
    __m256i two[4], a, b;
    for (int i = 0; i < 4; i++) two[i] = _mm256_hadd_epi32((__m256i)v[2 * i], (__m256i)v[2 * i + 1]);
    a = _mm256_hadd_epi32(two[0], two[1]), b = _mm256_hadd_epi32(two[2], two[3]);
    return (Ints8)_mm256_permute2x128_si256(a, b, 0x20) + (Ints8)_mm256_permute2x128_si256(a, b, 0x31);
}
// Sums of pairs, times a factor.
INLINE Ints8 pair_sums(Shorts16 v, int factor) { return (Ints8)_mm256_madd_epi16(v, all16(factor)); }
INLINE Floats8 fma8(Floats8 a, Floats8 b, Floats8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE FourFloats sum_halves(Floats8 v) { return _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1); }
#else
using Sums = int32x4_t;

// sum + w . x, each four of 16 bytes apart. Neither side is beyond a signed byte.
INLINE Sums dot_bytes(Sums sum, Bytes16 w, int8x16_t x) {
    int8x16_t s = vreinterpretq_s8_u8(w);
#if !defined(SIMD_DOTPROD)
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(s), vget_low_s8(x)), vmull_high_s8(s, x)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, s, x);
#else
    asm(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(s), "w"(x));
    return sum;
#endif
}
template <Dtype D> INLINE Sums dot32(Bytes32 w, const int8_t* x) {
    if (D == Dtype::Q8_0) w = w ^ all8(128);
    return dot_bytes(dot_bytes(Sums{}, w.low, vld1q_s8(x)), w.high, vld1q_s8(x + 16));
}
template <Dtype D> struct Scales64 {
    int32_t v[4];
    INLINE Scales64(Bytes16 scale, int g) {
        UNROLL for (int i = 0; i < 4; i++) v[i] = int8_t(scale[g + i]);
    }
    INLINE Sums dot(Sums sum, Bytes32 low, Bytes32 high, const int8_t* x) const {
        const Bytes16 w[4] = {low.low, low.high, high.low, high.high};
        UNROLL for (int i = 0; i < 4; i++)
            sum = vmlaq_n_s32(sum, dot_bytes(Sums{}, w[i], vld1q_s8(x + 16 * i)), v[i]);
        return sum;
    }
};
INLINE Sums dot16(Shorts16 a, const int16_t* b) {
    int16x8_t low = vld1q_s16(b), high = vld1q_s16(b + 8);
    Sums sum = vmlal_high_s16(vmull_s16(vget_low_s16(a.low), vget_low_s16(low)), a.low, low);
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a.high), vget_low_s16(high)), a.high, high);
}
INLINE Ints8 sum8(const Sums (&v)[BLOCK_LANES]) {
    auto four = [&](int i) {
        return vpaddq_s32(vpaddq_s32(v[i], v[i + 1]), vpaddq_s32(v[i + 2], v[i + 3]));
    };
    return {four(0), four(4)};
}
INLINE Ints8 pair_sums(Shorts16 v, int k) { return {vpaddlq_s16(v.low) * k, vpaddlq_s16(v.high) * k}; }
INLINE Floats8 fma8(Floats8 a, Floats8 b, Floats8 c) {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
INLINE FourFloats sum_halves(Floats8 v) { return v.low + v.high; }
#endif

// The tree of chapter 5's sum_block_lanes.
INLINE float sum_lanes8(Floats8 v) {
    FourFloats u = sum_halves(v);
    return (u[0] + u[2]) + (u[1] + u[3]);
}

// -- integers: one row, a few tokens -------------------------------------------------------------
//
// Up to eight blocks at a time, one for each of chapter 5's lanes.

// The first n numbers at p, and zeros.
template <class V, class Number> INLINE V load_some(const Number* p, int n) {
    constexpr int ALL = sizeof(V) / sizeof(Number);
    if (n == ALL) return load<V>(p);
#if SIMD_BITS == 512
    return (V)_mm256_maskz_loadu_epi16(__mmask16((1u << n * int(sizeof(Number) / 2)) - 1), p);
#else
    Number some[ALL] = {};
    std::copy_n(p, std::min(n, ALL), some);
    return load<V>(some);
#endif
}

// Of eight blocks of a row from p on, or the `count` that are left: what they are worth.
template <Dtype D> struct EightScales {
    Floats8 d, m;

    EightScales() = default;
    INLINE EightScales(const std::byte* p, int count) {
        constexpr int BYTES = format_of(D).bytes, PLACE = layout_of(D).d;
        constexpr bool LAST = PLACE + 2 == BYTES;      // no byte behind the block is read
        Ints8 both = eight_of([&](int k) {
            return k < count ? load<int32_t>(p + k * BYTES + PLACE - (LAST ? 2 : 0)) : 0;
        });
        d = lower_halves(LAST ? both >> 16 : both);
        if (has_minimums(D)) m = lower_halves(both >> 16);
    }
};

// And their integer sums with vectors; x begins at them. Of 32 values each: first all weights, then one
// vector after the other.
template <Dtype D, int T> struct BlocksOf32 {
    const IntRows& x;
    const int count;
    EightScales<D> scale;
    Bytes32 w[BLOCK_LANES];

    INLINE BlocksOf32(const std::byte* p, const IntRows& x, int count) : x(x), count(count), scale(p, count) {
        UNROLL for (int k = 0; k < BLOCK_LANES; k++)
            if (k < count) bytes<D>(p + k * format_of(D).bytes, [&](int, Bytes32 v) { w[k] = v; });
    }
    INLINE Ints8 sums(int t) const {
        return remaining_offset(D) ? products(t) - pairs(t, remaining_offset(D)) : products(t);
    }
    INLINE Ints8 minimums(int t) const { return pairs(t, -1); }

private:
    INLINE Ints8 products(int t) const {
        Sums v[BLOCK_LANES] = {};
        UNROLL for (int k = 0; k < BLOCK_LANES; k++)
            if (k < count) v[k] = dot32<D>(w[k], x.q + t * x.n + 32 * k);
        return sum8(v);
    }
    INLINE Ints8 pairs(int t, int factor) const {
        return pair_sums(load_some<Shorts16>(x.sums + t * (x.n / GROUP), 2 * count), factor);
    }
};

// The same, of 256.
template <Dtype D, int T> struct BlocksOf256 {
    EightScales<D> scale;
    Sums sum[T][BLOCK_LANES], minimum[T][BLOCK_LANES];

    INLINE BlocksOf256(const std::byte* p, const IntRows& x, int count) {
        for (int k = 0; k < BLOCK_LANES; k++) {
            if (k < count) add_block(k, p + k * format_of(D).bytes, x.at(0, k));
            else for (int t = 0; t < T; t++) sum[t][k] = minimum[t][k] = Sums{};
        }
        scale = EightScales<D>(p, count);
    }
    INLINE Ints8 sums(int t) const { return sum8(sum[t]); }
    INLINE Ints8 minimums(int t) const { return sum8(minimum[t]); }

private:
    INLINE void add_block(int k, const std::byte* p, const IntRows& x) {
        const Scales s = scales<D>(p);
        Sums total[T] = {};
        Bytes32 low{};
        bytes<D>(p, [&](int i, Bytes32 w) {
            if (i % 2 == 0) return void(low = w);
            const Scales64<D> scale(s.scale, 2 * i - 2);
            UNROLL for (int t = 0; t < T; t++)
                total[t] = scale.dot(total[t], low, w, x.q + t * x.n + 32 * (i - 1));
        });
        const Shorts16 m = shorts(s.minimum);
        for (int t = 0; t < T; t++) {
            Sums other = dot16(m, x.sums + t * (x.n / GROUP));
            if (has_minimums(D)) minimum[t][k] = other;
            sum[t][k] = has_minimums(D) ? total[t] : total[t] - other * offset_of(D);
        }
    }
};

// Measured (Zen 4): Q8_0 is read faster if fetched from 8 KB away, Q4_K and Q6_K from 4; and interleaved rows
// if the processor is not asked for them.
template <Dtype D, bool SIDE_BY_SIDE = false>
INLINE void fetch_blocks([[maybe_unused]] const std::byte* p, [[maybe_unused]] int bytes) {
#if SIMD_BITS == 512
    constexpr int FETCH = D == Dtype::Q8_0 ? 2 * AHEAD : AHEAD;
    for (int i = 0; (INTEL || !SIDE_BY_SIDE) && i < bytes; i += 64) fetch<SECOND>(p + FETCH + i);
#endif
}

// lane += up to eight blocks times T vectors
template <Dtype D, int T>
INLINE void add_part(Floats8 (&lane)[T], const std::byte* p, const IntRows& x, int count) {
    fetch_blocks<D>(p, count * format_of(D).bytes);
    const std::conditional_t<of_32(D), BlocksOf32<D, T>, BlocksOf256<D, T>> blocks(p, x, count);
    for (int t = 0; t < T; t++) {
        const Floats8 dx = load_some<Floats8>(x.at(t).d, count);
        lane[t] = fma8(blocks.scale.d * dx, to_floats(blocks.sums(t)), lane[t]);
        if (has_minimums(D))
            lane[t] = fma8(-(blocks.scale.m * dx), to_floats(blocks.minimums(t)), lane[t]);
    }
}

// One function for all rows: it loads its constants once.
template <Dtype D, int T>
[[gnu::noinline]] void few_ints(Rows out, const IntRows& x, const Matrix& w, int begin, int end) {
    constexpr int EIGHT = BLOCK_LANES * format_of(D).bytes;
    const int blocks = x.n / format_of(D).values;
    const int64_t bytes = w.row(1) - w.row(0);
    const std::byte* row = w.row(begin);
    for (int r = begin; r < end; r++, row += bytes) {
        Floats8 lane[T] = {};
        const std::byte* p = row;
        int b = 0;
        for (; b + BLOCK_LANES <= blocks; b += BLOCK_LANES, p += EIGHT)
            add_part<D>(lane, p, x.at(0, b), BLOCK_LANES);
        if (b < blocks) add_part<D>(lane, p, x.at(0, b), blocks - b);
        for (int t = 0; t < T; t++) out[t][r] = sum_lanes8(lane[t]);
    }
}

// -- integers: registers of rows -----------------------------------------------------------------
//
// From here on a lane of 32 bits is a row: four of its weights, a sum, a scale.

typedef int32_t Ints __attribute__((vector_size(SIMD_BITS / 8)));

INLINE Ints repeated(int32_t v) { return Ints{} + v; }
INLINE Ints repeated(const void* p) { return repeated(load<int32_t>(p)); }
INLINE Floats to_floats_of(Ints v) { return __builtin_convertvector(v, Floats); }

constexpr int TILE_REGISTERS = SIMD_BITS == 256 ? 1 : 2;
constexpr int tile_tokens(Dtype d) { return SIMD_BITS == 512 && of_32(d) ? 8 : 4; }
// Steps of four weights that are added before their scale: all that it is for or, with AVX2, as many as 16
// bits hold two products of each of.
constexpr int steps_of_scale(Dtype d) {
    const BlockLayout& l = layout_of(d);
    const int most = of_32(d) || in_32_groups(d) ? 8 : 4, bits = l.low.bits + l.high.bits;
    return SIMD_BITS == 256 ? std::clamp(128 >> bits, 1, most) : most;
}

#if SIMD_BITS == 256
// v + four weights of each row times four numbers of x: here in two sums of 16 bits, and a scale is twice in
// its lane.
template <Dtype D> INLINE Ints dot4(Ints v, Ints w, Ints x) {
    return (Ints)_mm256_add_epi16((__m256i)v, products_of_2<D>((Bytes32)w, (__m256i)x));
}
INLINE Ints add_scaled(Ints sum, Ints v, Ints scale) {
    return sum + (Ints)_mm256_madd_epi16((__m256i)v, (__m256i)scale);
}
constexpr int32_t scale_lane(int16_t scale) { return int32_t(uint16_t(scale) * 0x00010001u); }
// Byte k of each lane as a scale.
template <bool SIGNED> INLINE Ints scale_of(Ints v, int k) {
    const unsigned first = SIGNED ? 0x0080u + 0x100u * unsigned(k) : 0x8000u + unsigned(k);
    auto of = [&](unsigned lane) { return int(0x00010001u * (first + (SIGNED ? 0x400u : 4u) * lane)); };
    Ints order = {of(0), of(1), of(2), of(3), of(0), of(1), of(2), of(3)};
    __m256i both = _mm256_shuffle_epi8((__m256i)v, (__m256i)order);    // signed: in the upper halves first
    return (Ints)(SIGNED ? _mm256_srai_epi16(both, 8) : both);
}
// sum + two numbers of 16 bits of each row times two of x
INLINE Ints add_pair(Ints sum, Ints w, Ints x) { return add_scaled(sum, w, x); }
#else
INLINE Ints add_scaled(Ints sum, Ints v, Ints scale) { return sum + v * scale; }
constexpr int32_t scale_lane(int16_t scale) { return scale; }
template <bool SIGNED> INLINE Ints scale_of(Ints v, int k) { return v << (24 - 8 * k) >> 24; }
#if SIMD_BITS == 512
template <Dtype D> INLINE Ints dot4(Ints v, Ints w, Ints x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)v, (__m512i)w, (__m512i)x);
}
INLINE Ints add_pair(Ints sum, Ints w, Ints x) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
INLINE Floats lower_halves(Ints v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }
#else
template <Dtype D> INLINE Ints dot4(Ints v, Ints w, Ints x) {
    return dot_bytes(v, (Bytes16)(D == Dtype::Q8_0 ? w ^ int32_t(0x80808080) : w), vreinterpretq_s8_s32(x));
}
INLINE Ints add_pair(Ints sum, Ints w, Ints x) {
    return sum + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
}
#endif
#endif

#if SIMD_BITS == 128
inline void transpose8(void* out, int64_t out_stride, const void* in, int64_t in_stride) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++)
            store(static_cast<std::byte*>(out) + j * out_stride + 4 * i,
                  load<int32_t>(static_cast<const std::byte*>(in) + i * in_stride + 4 * j));
}
#endif

// -- integers: a block of rows, many tokens ------------------------------------------------------

template <Dtype D> void pack_row(IntBlock& block, int r, const std::byte* p, int cols) {
    constexpr int VALUES = format_of(D).values;
    std::byte* row = block.row + r * int64_t(cols);
    for (int b = 0; b < cols / VALUES; b++, p += format_of(D).bytes, row += VALUES) {
        bytes<D>(p, [&](int i, Bytes32 w) { store(row + 32 * i, w); });
        const Factors<D> f(p);
        block.d[b * INT_ROWS + r] = f.d, block.m[b * INT_ROWS + r] = -f.m;
        for (int g = 0; !of_32(D) && g < GROUP; g++)
            block.scale[(b * GROUP + g) * INT_ROWS + r] = scale_lane(f.scale[g]);
        for (int g = 0; !of_32(D) && g < GROUP / 2; g++)
            block.minimum[(b * GROUP / 2 + g) * INT_ROWS + r] = load<int32_t>(f.minimum + 2 * g);
    }
}

// R rows from `row` on. What stands in the other rows is of no account, but times 0 it cannot overflow.
template <Dtype D> void pack(IntBlock& block, const Matrix& w, int row, int R) {
    const int unused = R < INT_ROWS && !of_32(D) ? w.cols / GROUP * INT_ROWS : 0;
    std::fill_n(block.scale, unused, 0), std::fill_n(block.minimum, unused / 2, 0);
    for (int r = 0; r < R; r++) pack_row<D>(block, r, w.row(row + r), w.cols);
    for (int r = 0; r < R; r += 8)
        for (int col = 0; col < w.cols; col += 32)
            transpose8(block.w + int64_t(col) * INT_ROWS + 4 * r, 4 * INT_ROWS,
                       block.row + int64_t(r) * w.cols + col, w.cols);
}

// Block b of the rows from r on, times T vectors; x: their block b
template <Dtype D, int T> struct IntTile {
    static constexpr int R = TILE_REGISTERS, VALUES = format_of(D).values;
    Ints sum[R][T] = {}, minimum[R][T] = {};

    INLINE IntTile(const IntBlock& block, int b, int r, const IntRows& x) {
        for (int i = 0; i < VALUES / 4; i += steps_of_scale(D)) {
            Ints part[R][T] = {};
            for (int k = i; k < i + steps_of_scale(D); k++)
                add_four(part, block.w + ((int64_t(b) * VALUES / 4 + k) * INT_ROWS + r) * 4, x.q + 4 * k);
            UNROLL for (int h = 0; h < R; h++) {
                Ints scale = repeated(scale_lane(1));
                if (!of_32(D))
                    scale = load<Ints>(block.scale + (int64_t(b) * GROUP + i / 4) * INT_ROWS + r + h * WIDTH);
                UNROLL for (int t = 0; t < T; t++) sum[h][t] = add_scaled(sum[h][t], part[h][t], scale);
            }
        }
        if constexpr (of_32(D)) add_sums(x.sums);
        else add_minimums(block.minimum + int64_t(b) * (GROUP / 2) * INT_ROWS + r, x.sums);
    }

private:
    INLINE void add_four(Ints (&part)[R][T], const std::byte* w, const int8_t* x) {
        Ints wk[R];
        UNROLL for (int h = 0; h < R; h++) wk[h] = load<Ints>(w + 4 * h * WIDTH);
        UNROLL for (int t = 0; t < T; t++) {
            Ints xt = repeated(x + t * VALUES);
            UNROLL for (int h = 0; h < R; h++) part[h][t] = dot4<D>(part[h][t], wk[h], xt);
        }
    }
    INLINE void add_minimums(const int32_t* m, const int16_t* sums) {
        for (int i = 0; i < GROUP / 2; i++, m += INT_ROWS, sums += 2)
            UNROLL for (int h = 0; h < R; h++) {
                Ints two = load<Ints>(m + h * WIDTH);
                UNROLL for (int t = 0; t < T; t++)
                    minimum[h][t] = add_pair(minimum[h][t], two, repeated(sums + t * GROUP));
            }
        UNROLL for (int h = 0; h < R; h++)
            UNROLL for (int t = 0; t < T; t++)
                if (offset_of(D)) sum[h][t] -= minimum[h][t] * offset_of(D);
    }
    INLINE void add_sums(const int16_t* sums) {
        UNROLL for (int t = 0; t < T; t++) {
            int total = sums[2 * t] + sums[2 * t + 1];
            UNROLL for (int h = 0; h < R; h++) {
                if (has_minimums(D)) minimum[h][t] = repeated(-total);
                else sum[h][t] -= remaining_offset(D) * total;
            }
        }
    }
};

// lane (T, INT_ROWS) += block b of the rows times T vectors; x: their block b. The first eight blocks find
// nothing in their lanes.
template <Dtype D, int T> void int_tile(const IntBlock& block, int b, const IntRows& x, float* lane) {
    for (int r = 0; r < INT_ROWS; r += TILE_REGISTERS * WIDTH) {
        IntTile<D, T> tile(block, b, r, x);
        UNROLL for (int h = 0; h < TILE_REGISTERS; h++) {
            const int row = r + h * WIDTH, at = b * INT_ROWS + row;
            Floats d = floats(block.d + at), m = has_minimums(D) ? floats(block.m + at) : d;
            UNROLL for (int t = 0; t < T; t++) {
                float* out = lane + t * INT_ROWS + row;
                Floats dx = all(x.d[t]), y = b < BLOCK_LANES ? Floats{} : floats(out);
                y = fma(d * dx, to_floats_of(tile.sum[h][t]), y);
                if (has_minimums(D)) y = fma(m * dx, to_floats_of(tile.minimum[h][t]), y);
                store(out, y);
            }
        }
    }
}

// The tree of sum_block_lanes, of registers of rows.
template <class Lane> INLINE Floats sum_block_lanes(const Lane& lane) {
    Floats v[4];
    UNROLL for (int j = 0; j < 4; j++) v[j] = lane(j) + lane(j + 4);
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// R rows, packed, times T <= INT_TOKENS vectors, lane for lane: the sums of one stay in the first cache.
template <Dtype D> void int_block(const IntBlock& block, Rows out, const IntRows& x, int row, int R, int T) {
    constexpr int TOKENS = tile_tokens(D), PLANE = INT_TOKENS * INT_ROWS;
    for (int j = 0; j < BLOCK_LANES; j++) {
        float* lane = block.lane + j * PLANE;
        if (j >= x.n / x.block) std::fill_n(lane, T * INT_ROWS, 0.0f);
        for (int b = j; b < x.n / x.block; b += BLOCK_LANES) {
            int t = 0;
            for (; t + TOKENS <= T; t += TOKENS)
                int_tile<D, TOKENS>(block, b, x.at(t, b), lane + t * INT_ROWS);
            for (; t < T; t++) int_tile<D, 1>(block, b, x.at(t, b), lane + t * INT_ROWS);
        }
    }
    for (int t = 0; t < T; t++) {
        const float* lane = block.lane + t * INT_ROWS;
        float sums[INT_ROWS];
        for (int r = 0; r < INT_ROWS; r += WIDTH)
            store(sums + r, sum_block_lanes([&](int j) { return floats(lane + j * PLANE + r); }));
        std::copy_n(sums, R, out[t] + row);
    }
}

template <Dtype D> void many_ints(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    thread_local std::vector<std::byte> memory;
    IntBlock block(memory, w.cols, x.block);
    for (int r = begin; r < end; r += INT_ROWS) {
        int R = std::min(INT_ROWS, end - r);
        pack<D>(block, w, r, R);
        for (int t = 0; t < T; t += INT_TOKENS)
            int_block<D>(block, {out[t], out.stride}, x.vector(t), r, R, std::min(INT_TOKENS, T - t));
    }
}

inline void int_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    for_integers(w.dtype, [&]<Dtype D>() {
        if (T >= MANY_TOKENS) many_ints<D>(out, x, w, T, begin, end);
        else with_constant<MANY_TOKENS - 1>(T, [&]<int N>() { few_ints<D, N>(out, x, w, begin, end); });
    });
}

// -- integers: activations -----------------------------------------------------------------------

#if SIMD_BITS > 128
inline uint32_t largest_magnitude(const float* x, int n) {
    __m256i top = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8)
        top = _mm256_max_epi32(top, load<__m256i>(x + i) & _mm256_set1_epi32(0x7FFFFFFF));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1))));
}
// q: 32 numbers, rounded, ties to even; sums: of 16
INLINE void round32(int8_t* q, int16_t* sums, const float* x, float inverse) {
    __m256i v[4];
    for (int k = 0; k < 4; k++) v[k] = _mm256_cvtps_epi32(load<Floats8>(x + 8 * k) * inverse);
    __m256i all = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    all = _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    store(q, all);
    Ints8 sum = (Ints8)_mm256_sad_epu8(all ^ _mm256_set1_epi8(-128), _mm256_setzero_si256());   // of q + 128
    sums[0] = int16_t(sum[0] + sum[2] - 16 * 128), sums[1] = int16_t(sum[4] + sum[6] - 16 * 128);
}
#else
inline uint32_t largest_magnitude(const float* x, int n) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int i = 0; i < n; i += 4) top = vmaxq_u32(top, load<Words>(x + i) & 0x7FFFFFFF);
    return vmaxvq_u32(top);
}
INLINE void round32(int8_t* q, int16_t* sums, const float* x, float inverse) {
    for (int i = 0; i < 2; i++, x += GROUP) {
        auto four = [&](int k) { return vmovn_s32(vcvtnq_s32_f32(floats(x + 4 * k) * inverse)); };
        int8x16_t all = vcombine_s8(vmovn_s16(vcombine_s16(four(0), four(1))),
                                    vmovn_s16(vcombine_s16(four(2), four(3))));
        store(q + GROUP * i, all);
        sums[i] = vaddlvq_s8(all);
    }
}
#endif

// One vector: x (n).
inline void quantise(const IntRows& out, const float* x) {
    for (int b = 0; b < out.n / out.block; b++, x += out.block) {
        IntScale s = int_scale(largest_magnitude(x, out.block));
        IntRows block = out.at(0, b);
        *block.d = s.d;
        for (int i = 0; i < out.block && s.inverse != 0; i += 32)
            round32(block.q + i, block.sums + i / GROUP, x + i, s.inverse);
        if (s.inverse != 0) continue;
        std::fill_n(block.q, out.block, int8_t(0));
        std::fill_n(block.sums, out.block / GROUP, int16_t(0));
    }
}

// -- integers: interleaved rows, a few tokens ----------------------------------------------------

// WIDTH of sixteen rows, from `first` on: their block at p times T vectors; x begins at it.
template <Dtype D, int T> struct SideBlock {
    static constexpr int TOGETHER = in_32_groups(D) ? 2 : 4;           // groups of 32 in the same bytes
    static constexpr int PARTS = in_32_groups(D) ? 1 : 2;              // of 32 numbers, with scales
    static constexpr BlockLayout L = layout_of(D);
    const std::byte* p;
    const int first;
    const IntRows x;                       // a copy, so that its fields stay in registers
    Ints packed[4];                        // lines of scales: first in memory, so read (kept) first
    Ints sum[T] = {}, minimum[T] = {};

    INLINE SideBlock(const std::byte* p, int first, const IntRows& x) : p(p), first(first), x(x) {
        UNROLL for (int i = 0; i < (D == Dtype::Q2_K || D == Dtype::Q6_K ? 4 : 3); i++)
            keep(packed[i] = dword(L.scales / 4 + i));
        UNROLL for (int g = 0; g < 8; g += TOGETHER)
            UNROLL for (int part = 0; part < PARTS; part++) add_groups(g, part);
        for (int t = 0; t < T && !has_minimums(D); t++) sum[t] -= minimum[t] * offset_of(D);
    }
    INLINE void add_to(Floats (&lane)[T]) const {
        Floats d, m;
        const Ints both = has_minimums(D) ? dword(L.d / 4) : Ints{};
        if (has_minimums(D)) d = lower_halves(both), m = lower_halves(both >> 16);
        else d = m = halves_as_floats(p + SIDE * L.d + 2 * first);
        for (int t = 0; t < T; t++) {
            Floats dx = all(x.d[t * (x.n / x.block)]);
            lane[t] = fma(d * dx, to_floats_of(sum[t]), lane[t]);
            if (has_minimums(D)) lane[t] = fma(-(m * dx), to_floats_of(minimum[t]), lane[t]);
        }
    }

private:
    INLINE Ints dword(int i) const { return load<Ints>(p + 64 * LINE_OF_DWORD<D>[size_t(i)] + 4 * first); }
    // Bits k .. of each byte, to where the mask has them.
    INLINE static Ints bits(Ints v, int k, int mask) {
        const int n = std::countr_zero(unsigned(mask)) - k;
        return (n < 0 ? v >> -n : v << n) & (mask * 0x01010101);
    }
    // v += numbers i .. i + 4 of group g of 32 of each row times x
    INLINE void dot(Ints (&v)[T], int g, int i) const {
        auto field = [&](BitField f, int to) {
            return bits(dword(f.byte(32 * g, i) / 4), f.shift(32 * g, i), f.mask() << to);
        };
        Ints w = field(L.low, 0);
        if constexpr (L.high.bits > 0) w |= field(L.high, L.low.bits);
        for (int t = 0; t < T; t++) v[t] = dot4<D>(v[t], w, repeated(x.q + t * x.n + 32 * g + i));
    }
    // Four scales, and minimums; where there is none, it is what the offset is to be times.
    INLINE Ints four_scales(int i) const {
        constexpr unsigned TOP = 0x80808080;           // keeps a byte from borrowing
        if (D == Dtype::Q6_K) return packed[i];
        if (D == Dtype::Q2_K) return bits(packed[i], 0, 15);
        if (in_32_groups(D) && i == 0) return bits(packed[0], 0, 63);
        if (in_32_groups(D)) return bits(packed[2], 0, 15) | bits(packed[0], 6, 48);
        Ints six = bits(packed[i % 2], i / 2 * 4, 15) | bits(packed[2], 2 * i, 48);
        return Ints(((Words(six) | TOP) - 0x20202020) ^ TOP);
    }
    INLINE Ints four_minimums(int i) const {
        if (D == Dtype::Q2_K) return bits(packed[i], 4, 15);
        if (in_32_groups(D) && i == 0) return bits(packed[1], 0, 63);
        if (in_32_groups(D)) return bits(packed[2], 4, 15) | bits(packed[1], 6, 48);
        return four_scales(i);
    }
    // Part `part` of groups g .. g + TOGETHER.
    INLINE void add_groups(int g, int part) {
        constexpr int STEPS = steps_of_scale(D), END = 8 / PARTS;
        UNROLL for (int begin = 0; begin < END; begin += STEPS) {
            Ints v[TOGETHER][T] = {};
            UNROLL for (int j = begin; j < begin + STEPS; j++)
                UNROLL for (int k = 0; k < TOGETHER; k++) dot(v[k], g + k, 4 * (part * END + j));
            UNROLL for (int k = 0; k < TOGETHER; k++) {
                const int i = (g + k) * PARTS + part;
                const Ints scale = scale_of<signed_scales(D)>(four_scales(i / 4), i % 4);
                for (int t = 0; t < T; t++) sum[t] = add_scaled(sum[t], v[k][t], scale);
            }
        }
        UNROLL for (int k = 0; k < TOGETHER; k++) {
            const int i = (g + k) * PARTS + part;
            const Ints m = scale_of<signed_scales(D)>(four_minimums(i / 4), i % 4);
            for (int t = 0; t < T; t++) {
                const int16_t* sums = x.sums + t * (x.n / GROUP) + 2 / PARTS * i;
                const int total = PARTS == 1 ? sums[0] + sums[1] : sums[0];
                minimum[t] = add_pair(minimum[t], m, repeated(uint16_t(total)));
            }
        }
    }
};

template <Dtype D, int T> void side_rows(Rows out, const IntRows& x, const Matrix& w, int begin, int end) {
    constexpr int BYTES = SIDE * format_of(D).bytes, PARTS = SIDE / WIDTH;
    const std::byte* p = w.row(begin);
    for (int r = begin; r < end; r += SIDE) {
        Floats lane[BLOCK_LANES][PARTS][T] = {};
        for (int b = 0; b < x.n / x.block; b++, p += BYTES) {
            fetch_blocks<D, true>(p, BYTES);
            for (int i = 0; i < PARTS; i++)
                SideBlock<D, T>(p, i * WIDTH, x.at(0, b)).add_to(lane[b % BLOCK_LANES][i]);
        }
        for (int i = 0; i < PARTS; i++)
            for (int t = 0; t < T; t++)
                store(out[t] + r + i * WIDTH, sum_block_lanes([&](int j) { return lane[j][i][t]; }));
    }
}

inline void interleaved_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    if (T >= MANY_TOKENS) return restored_rows(out, x, w, T, begin, end);
    for_integers(w.dtype, [&]<Dtype D>() {
        if constexpr (!of_32(D))
            with_constant<MANY_TOKENS - 1>(T, [&]<int N>() { side_rows<D, N>(out, x, w, begin, end); });
    });
}

constexpr SimdTarget TARGET = {rows, weigh, widen, dot_real, softmax, silu_times, quantise, int_rows,
#if SIMD_BITS > 128
                               interleaved_rows, arrange, arranged_rows};
#else
                               interleaved_rows};
#endif
#endif

#ifndef SIMD_BITS

// -- 10  The passes ------------------------------------------------------------------------------

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
#define AVX2_TARGET "avx2,fma,f16c"
#define AVX512_TARGET AVX2_TARGET ",avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(name) PRAGMA(clang attribute push(__attribute__((target(name))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(name) PRAGMA(GCC push_options) PRAGMA(GCC target(name))
#define END_TARGET PRAGMA(GCC pop_options)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"   // g++ 12 finds fault with its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// The kernels themselves carry no attribute: those would not reach the lambdas inside.
BEGIN_TARGET(AVX2_TARGET)
namespace avx2 {
#define SIMD_BITS 256
#include "simd.h"
#undef SIMD_BITS
}  // namespace avx2
END_TARGET
BEGIN_TARGET(AVX512_TARGET)
namespace avx512 {
#define SIMD_BITS 512
#include "simd.h"
#undef SIMD_BITS
}  // namespace avx512
END_TARGET

// -- AMX -----------------------------------------------------------------------------------------
//
// A tile is a register of 16 rows of 64 bytes, and one instruction multiplies 16 vectors of 64 signed bytes
// with 16 rows of as many: 16384 products, where VNNI has 64. How are scales kept out of its way? In blocks
// of 256 they are whole numbers: a weight times its scale, of 14 bits at most, is cut in two bytes, 128 high
// + low, and a block is two sums. In blocks of 32 there is one scale a block, and half a tile stays empty.

#define AMX_TARGET AVX512_TARGET ",amx-tile,amx-int8,amx-bf16"
BEGIN_TARGET(AVX512_TARGET)
namespace amx {

using avx512::Bytes32, avx512::Factors, avx512::all16, avx512::all8, avx512::bytes, avx512::fma;
using avx512::load, avx512::store, avx512::transpose16;

constexpr int TILE = 16, ROW_BYTES = 64, TILE_BYTES = TILE * ROW_BYTES;

// -- AMX: weights for tiles ----------------------------------------------------------------------

INLINE __m256i times_scale(__m128i w, int offset, int scale) {
    return _mm256_mullo_epi16(_mm256_sub_epi16(_mm256_cvtepu8_epi16(w), all16(offset)), all16(scale));
}
// 32 weights, with their offset: signed, or times their two scales in low and, from `high` on, high bytes.
template <Dtype D>
INLINE void split(std::byte* out, std::byte* high, Bytes32 weights, const int16_t* scale) {
    constexpr int OFFSET = offset_of(D);
    if (of_32(D)) return store(out, weights - all8(OFFSET));
    __m256i a = times_scale(_mm256_castsi256_si128((__m256i)weights), OFFSET, scale[0]);
    __m256i b = times_scale(_mm256_extracti128_si256((__m256i)weights, 1), OFFSET, scale[1]);
    __m256i low = _mm256_packs_epi16(a & all16(127), b & all16(127));
    __m256i top = _mm256_packs_epi16(_mm256_srai_epi16(a, 7), _mm256_srai_epi16(b, 7));
    store(out, _mm256_permute4x64_epi64(low, 0xD8)), store(high, _mm256_permute4x64_epi64(top, 0xD8));
}

// Minimums of blocks of 256 are multiplied in bf16: a sum of 16 x is cut in 16 high + low, and 32 bits hold
// both, or 16 times the minimum and the minimum. No sum of products passes 2^24, so it is exact in f32.
template <Dtype D> constexpr bool PAIRED = has_minimums(D) && !of_32(D);

INLINE int32_t bf16_pair(int first, int second) {      // of which bf16 holds all bits
    return std::bit_cast<int32_t>(float(second)) | int32_t(std::bit_cast<uint32_t>(float(first)) >> 16);
}
inline void pair_sums(std::vector<int32_t>& pairs, const IntRows& x, int T) {
    pairs.resize(size_t(x.blocks(T)) * GROUP);
#pragma omp simd
    for (size_t i = 0; i < pairs.size(); i++) pairs[i] = bf16_pair(x.sums[i] >> 4, x.sums[i] & 15);
}

// block.row: (INT_ROWS, 1 or 2, cols)   block.scale: (blocks, INT_ROWS / TILE, 16, TILE), pairs
template <Dtype D> void split_row(IntBlock& block, int r, const std::byte* p, int cols) {
    constexpr int VALUES = format_of(D).values;
    std::byte* row = block.row + int64_t(r) * cols * (of_32(D) ? 1 : 2);
    for (int b = 0; b < cols / VALUES; b++, p += format_of(D).bytes) {
        const Factors<D> f(p);
        block.d[b * INT_ROWS + r] = f.d, block.m[b * INT_ROWS + r] = -f.m;
        bytes<D>(p, [&](int i, Bytes32 w) {
            std::byte* out = row + b * VALUES + 32 * i;
            split<D>(out, out + cols, w, f.scale + 2 * i);
        });
        int32_t* pairs = block.scale + (b * INT_ROWS + r / TILE * TILE) * TILE + r % TILE;
        for (int g = 0; PAIRED<D> && g < GROUP; g++)
            pairs[g * TILE] = bf16_pair(16 * f.minimum[g], f.minimum[g]);
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

}  // namespace amx
END_TARGET
BEGIN_TARGET(AMX_TARGET)
namespace amx {

// -- AMX: 16 rows times 16 or 32 vectors ---------------------------------------------------------

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
INLINE void multiply(Products<D>* c, const IntBlock& block, int b, int h, const Vectors& v, int tiles) {
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

using Sums = __m512[TILE];                 // of 16 vectors, each with 16 rows

// y += block b of the rows from h on times 16 vectors, of which c has the products; x: their block b
template <Dtype D>
INLINE void add(Sums& y, const IntBlock& block, int b, int h, const Products<D>& c, const IntRows& x) {
    const int at = b * INT_ROWS + h;
    const __m512 d = load<__m512>(block.d + at), m = has_minimums(D) ? load<__m512>(block.m + at) : d;
    UNROLL for (int t = 0; t < TILE; t++) {
        __m512i sum = load<__m512i>(c.v[0][t]);
        if constexpr (!of_32(D))
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(load<__m512i>(c.v[1][t]), 7));
        y[t] = fma(d * x.d[t], _mm512_cvtepi32_ps(sum), y[t]);
        if (!has_minimums(D)) continue;
        __m512 minimum = _mm512_set1_ps(float(-(x.sums[2 * t] + x.sums[2 * t + 1])));
        if constexpr (PAIRED<D>) minimum = load<__m512>(c.v[2][t]);
        y[t] = fma(m * x.d[t], minimum, y[t]);
    }
}

INLINE void add_sums(Sums& y, const float* p) {
    UNROLL for (int t = 0; t < TILE; t++) y[t] += load<__m512>(p + t * TILE);
}
// The first R rows of the first T vectors, from `row` on.
INLINE void put(Rows out, const Sums& y, int row, int R, int T) {
    const __mmask16 rows = __mmask16((1u << std::min(R, TILE)) - 1);
    UNROLL for (int t = 0; t < TILE; t++)
        if (t < T) _mm512_mask_storeu_ps(out[t] + row, rows, y[t]);
}

// -- AMX: a block of rows, many vectors ----------------------------------------------------------

// Blocks b, b + 8 .. end of a lane: as many as stay, with their products, in the first cache.
struct LanePart {
    unsigned done;                         // lanes before this one
    int b, end;
    bool first, last;                      // part of the lane
};
template <Dtype D> constexpr int PART_BLOCKS = of_32(D) ? 8 : 1;

// VECTOR_TILES<D> times 16 vectors from t on. First all products, then their sums: it takes a while until
// what a tile has stored can be read.
template <Dtype D>
void add_part(const IntBlock& block, Rows out, const Vectors& v, int row, int R, int T, int t,
              const LanePart& p) {
    constexpr int PLANE = INT_TOKENS * INT_ROWS;
    const int tiles = std::min(+VECTOR_TILES<D>, (T - t + TILE - 1) / TILE);
    Products<D> c[PART_BLOCKS<D>][VECTOR_TILES<D>];
    for (int h = 0; h < R; h += TILE) {
        for (int k = 0, b = p.b; b < p.end; k++, b += BLOCK_LANES)
            multiply<D>(c[k], block, b, h, v.at(t, b), tiles);
        for (int i = 0; i < tiles; i++) {
            const int first = t + i * TILE;
            float* top = block.lane + std::popcount(p.done) * PLANE + (first * INT_ROWS + h * TILE);
            Sums y = {};
            if (!p.first) add_sums(y, top);
            for (int k = 0, b = p.b; b < p.end; k++, b += BLOCK_LANES)
                add<D>(y, block, b, h, c[k][i], v.x.at(first, b));
            for (int n = std::countr_one(p.done); p.last && n > 0; n--) add_sums(y, top -= PLANE);
            if (!p.last || p.done < BLOCK_LANES - 1) put({top, TILE}, y, 0, TILE, TILE);
            else put({out[first], out.stride}, y, row + h, R - h, T - first);
        }
    }
}

// out[t], R rows from `row` on: the packed rows times T <= INT_TOKENS vectors. The lanes come in the order of
// the tree that sums them, 0 4 2 6 1 5 3 7, and what waits for its other half stands on a stack: one place
// for each 1 of the binary number of lanes done.
template <Dtype D> void int_block(const IntBlock& block, Rows out, const Vectors& v, int row, int R, int T) {
    constexpr int STEP = PART_BLOCKS<D> * BLOCK_LANES;
    const int blocks = v.x.n / v.x.block;
    for (unsigned done = 0; done < BLOCK_LANES; done++) {
        const int lane = int((done & 1) * 4 + (done & 2) + (done & 4) / 4);
        for (int b = lane; b == lane || b < blocks; b += STEP) {
            LanePart part{done, b, std::min(blocks, b + STEP), b == lane, b + STEP >= blocks};
            for (int t = 0; t < T; t += VECTOR_TILES<D> * TILE)
                add_part<D>(block, out, v, row, R, T, t, part);
        }
    }
}

struct alignas(64) TileConfig {                        // Intel SDM, LDTILECFG
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
template <Dtype D, int COLUMNS = of_32(D) ? 32 : 64>
constexpr TileConfig TILES = {1, 0, {}, {64, 64, 64, 64, COLUMNS, COLUMNS, 64, 64},
                              {16, 16, 16, 16, 16, 16, COLUMNS / 4, 16}};

// Some blocks of rows are packed together, so that vectors are brought to the second cache once for them.
template <Dtype D> void int_rows_of(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    constexpr int MOST = MANY_ROWS / INT_ROWS, BYTES = of_32(D) ? 1 : 2, CACHED = 1 << 20;
    thread_local std::vector<std::byte> memory[MOST];
    thread_local std::vector<int32_t> pairs;
    if (PAIRED<D>) pair_sums(pairs, x, T);
    const int at_once = std::clamp(CACHED / (w.cols * BYTES * INT_ROWS), 1, MOST) * INT_ROWS;
    _tile_loadconfig(&TILES<D>);
    for (int first = begin; first < end; first += at_once) {
        std::vector<IntBlock> blocks;
        blocks.reserve(MOST);
        for (int r = first; r < std::min(end, first + at_once); r += INT_ROWS) {
            blocks.emplace_back(memory[blocks.size()], w.cols, x.block, BYTES,
                                blocks.empty() ? nullptr : &blocks[0]);
            pack_tiles<D>(blocks.back(), w, r, std::min(INT_ROWS, end - r));
        }
        for (int t = 0; t < T; t += INT_TOKENS) {
            Vectors v{x.vector(t), pairs.data() + int64_t(t) * x.n / GROUP};
            for (int i = 0; i < int(blocks.size()); i++) {
                const int r = first + i * INT_ROWS, R = std::min(INT_ROWS, end - r);
                int_block<D>(blocks[size_t(i)], {out[t], out.stride}, v, r, R, std::min(INT_TOKENS, T - t));
            }
        }
    }
    _tile_release();
}

inline void int_rows(Rows out, const IntRows& x, const Matrix& w, int T, int begin, int end) {
    constexpr int WORTH_IT = 8;                        // tokens, of a tile's 16
    if (T < WORTH_IT) return avx512::int_rows(out, x, w, T, begin, end);
    for_integers(w.dtype, [&]<Dtype D>() { int_rows_of<D>(out, x, w, T, begin, end); });
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
END_TARGET
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#elif defined(DEEPSEEK_FLOAT) && defined(__aarch64__)
#define SIMD_BITS 128
namespace neon {
#include "simd.h"
}  // namespace neon
namespace dotprod {
#define SIMD_DOTPROD 1
#include "simd.h"
}  // namespace dotprod
#undef SIMD_BITS
#endif

// -- 11  The operations --------------------------------------------------------------------------

// x as its product wants it: in small integers, or arranged, or as it is.
struct Input {
    IntRows ints;
    real* arranged = nullptr;
};

// The inputs of some products; equal ones once. Memory grows to what the largest call needed.
class Inputs {
public:
    Input of(const Product& p) {
        const int n = p.w->cols, block = in_integers(*p.w) ? format_of(p.w->dtype).values : 0;
        for (size_t i = 0; i < used_; i++) {
            const Entry& e = entries_[i];
            bool same_rows = e.x.data == p.x.data && e.x.stride == p.x.stride && e.T == p.T;
            if (same_rows && e.block == block && e.n == n) return e.input;
        }
        if (p.T == 0) return {};
        if (used_ == entries_.size()) entries_.emplace_back();
        Entry& e = entries_[used_++];
        e.x = p.x, e.T = p.T, e.n = n, e.block = block, e.input = {};
        if (block > 0) quantise(e);
        else if (kernels.target->arrange && p.T >= ARRANGE_FROM) arrange(e);
        return e.input;
    }
    void clear() { used_ = 0; }

private:
    struct Entry {
        ConstRows x{nullptr, 0};
        int T, n, block;
        Input input;
        std::vector<std::byte> memory;
    };
    std::vector<Entry> entries_;
    size_t used_ = 0;

    static void quantise(Entry& e) {
        IntRows& rows = e.input.ints;
        rows = {e.n, e.block, e.T};
        size_t blocks = size_t(rows.blocks(e.T)), n = blocks * size_t(e.block);
        take_from(e.memory, [&](Arena& arena) {
            rows.q = arena.take<int8_t>(n), rows.sums = arena.take<int16_t>(n / GROUP);
            rows.d = arena.take<float>(blocks);
        });
        parallel_for(e.T, [&](int64_t t) { kernels.target->quantise(rows.vector(int(t)), e.x[t]); }, e.n);
    }
    static void arrange(Entry& e) {
        const int groups = (e.T + ARRANGED_TOKENS - 1) / ARRANGED_TOKENS;
        const size_t size = arranged_size(e.n);
        take_from(e.memory, [&](Arena& a) { e.input.arranged = a.take<real>(size_t(groups) * size); });
        parallel_for(groups, [&](int64_t g) {
            int t = int(g) * ARRANGED_TOKENS;
            kernels.target->arrange(e.input.arranged + size_t(g) * size, {e.x[t], e.x.stride},
                                    std::min(ARRANGED_TOKENS, e.T - t), e.n);
        }, int64_t(e.n) * ARRANGED_TOKENS);
    }
};

// A product in parts: rows of W, and vectors x, that a thread takes at once. Few enough for all threads to
// have work and for arranged vectors to stay in a cache, many enough to be worth it.
struct Work {
    Product p;
    Input x;
    int rows, tokens, of_rows, parts;      // parts with the same vectors follow each other

    Work(const Product& p, const Input& x, int threads) : p(p), x(x), tokens(std::max(p.T, 1)) {
        constexpr int CACHED = 5 << 19;    // numbers
        if (x.arranged) tokens = std::max(CACHED / p.w->cols / 64 * 64, 64);
        if (p.T >= MANY_TOKENS) rows = std::clamp(p.w->rows / (4 * threads) / 96 * 96, 96, MANY_ROWS);
        else rows = std::clamp(p.w->rows / (8 * threads) / 16 * 16, 16, 256);
        of_rows = (p.w->rows + rows - 1) / rows;
        parts = of_rows * ((p.T + tokens - 1) / tokens);
    }
    void multiply(int part) const {
        const SimdTarget& target = *kernels.target;
        int t = part / of_rows * tokens, T = std::min(tokens, p.T - t);
        int begin = part % of_rows * rows, end = std::min(p.w->rows, begin + rows);
        Rows out{p.out[t], p.out.stride};
        if (p.w->interleaved) return target.interleaved_rows(out, x.ints, *p.w, T, begin, end);
        if (in_integers(*p.w)) return target.int_rows(out, x.ints, *p.w, T, begin, end);
        if (!x.arranged) return target.rows(out, p.x, *p.w, T, begin, end);
        const real* arranged = x.arranged + size_t(t / ARRANGED_TOKENS) * arranged_size(p.w->cols);
        target.arranged_rows(out, arranged, *p.w, T, begin, end);
    }
};

// On this thread.
inline void matmul_alone(const Product& p) {
    thread_local Inputs inputs;
    inputs.clear();
    Work work(p, inputs.of(p), 1);
    for (int i = 0; i < work.parts; i++) work.multiply(i);
}

// All parts of all products are shared out together.
inline void fast_matmul(std::span<const Product> products) {
    if (in_loop) return void(std::for_each(products.begin(), products.end(), matmul_alone));
    thread_local Inputs inputs;
    inputs.clear();
    std::vector<Work> works;
    std::vector<int64_t> first = {0};      // index of each product's first part
    int64_t cost = 0;
    for (const Product& p : products) {
        works.emplace_back(p, inputs.of(p), n_threads());
        first.push_back(first.back() + works.back().parts);
        cost += int64_t(p.w->rows) * p.w->cols * p.T;
    }
    parallel_for(first.back(), [&](int64_t part) {
        size_t i = size_t(std::upper_bound(first.begin(), first.end(), part) - first.begin()) - 1;
        works[i].multiply(int(part - first[i]));
    }, cost / std::max<int64_t>(first.back(), 1));
}

// -- attention -----------------------------------------------------------------------------------

// Queries `first` to first + Q of a key head, Q <= QUERY_TILE, on this thread: keys and values are read once
// for all of them.   scratch: attention_scratch numbers
inline void attend_tile(const Attention& a, real* scratch, int64_t first, int Q) {
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
        softmax_and_lse(kernels.softmax, scores[i], a.scale, seen(i), a.lse_of(token(i), head(i)));
        std::fill_n(out[i], dv, real(0));
    }
    kernels.weigh(out, scores, a.v, Q, seen(0));
    for (int i = 1; i < Q; i++)            // what only the later queries see
        kernels.weigh({out[i], 0}, {scores[i] + seen(0), 0}, later, 1, seen(i) - seen(0));
    for (int i = 0; !even && i < Q; i++) std::copy_n(out[i], dv, a.out[token(i)] + head(i) * dv);
}

inline void fast_attend(std::span<const Attention> heads, Rows scratch) {
    const Attention& one = heads[0];
    const int64_t queries = int64_t(one.n.size()) * one.heads, all = queries * int64_t(heads.size());
    const int64_t tile = std::min({int64_t(QUERY_TILE), queries, (all + n_threads() - 1) / n_threads()});
    const int64_t tiles = (queries + tile - 1) / tile;
    parallel_for(tiles * int64_t(heads.size()), [&](int64_t i) {
        int64_t first = i % tiles * tile;
        const Attention& head = heads[size_t(i / tiles)];
        attend_tile(head, scratch[thread_index()], first, int(std::min(tile, queries - first)));
    }, tile * one.n.back() * (one.k.cols + one.v.cols) / 2);
}

// -- the choice ----------------------------------------------------------------------------------

// Those that this processor has, the fastest last.
inline std::vector<SimdTarget> make_targets() {
    std::vector<SimdTarget> targets;
    [[maybe_unused]] auto add = [&](const char* name, SimdTarget t) { t.name = name, targets.push_back(t); };
#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add("avx2", avx2::TARGET);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        SimdTarget wide = avx512::TARGET;
        wide.dot_real = avx2::dot_real;                // of one row: two chains of additions, not one
        add("avx512", wide);
        wide.int_rows = amx::int_rows;
        if (amx::available()) add("amx", wide);
    }
#elif defined(DEEPSEEK_FLOAT) && defined(__aarch64__)
    add("neon", neon::TARGET);
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add("dotprod", dotprod::TARGET);
#endif
    return targets;
}

// The plain ones first.
inline std::vector<Kernels> available_kernels() {   // tests/unit/simd_kernels.cpp compares their bits
    static const std::vector<SimdTarget> TARGETS = make_targets();
    std::vector<Kernels> all = {Kernels{}};
    for (const SimdTarget& t : TARGETS)
        all.push_back({t.name, true, t.weigh, t.widen, t.dot_real, t.softmax, t.silu_times, fast_matmul,
                       fast_attend, interleave_rows, can_interleave, &t});
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
#endif
