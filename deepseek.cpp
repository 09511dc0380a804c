// deepseek: the DeepSeek models, as a program to read.
//
// =================================================================================================
// Chapter 0. How to read this file
// =================================================================================================
//
// This is a program and a book. The program runs DeepSeek V2, V2-Lite, Coder-V2, V3, R1-Zero, R1 and
// the R1-Distills of Qwen2, Qwen3 and Llama from their published files. The book is the same text read
// from top to bottom: each chapter answers one question, and the code below the prose is the answer that
// runs.
//
//   0   How to read this file      contents, notation, reading routes
//   1   Ground rules               errors, memory, the parallel loop, random numbers, taps
//   2   Numbers                    bf16, f16, e4m3 with scale blocks, blocks of integers
//   3   Files                      JSON, config.json, safetensors, writing whole or not at all
//   4   Text to tokens             one prompt on its way through tokenizer.h; opening a model
//   5   Small operations           dot, matmul, softmax, silu, rmsnorm, top_k
//   6   Positions                  RoPE in two layouts, YaRN, llama3 scaling
//   7   Attention I: GQA           causal attention as two loops, the cache, grouped heads
//   8   Attention II: MLA          the latent cache, the naive and the absorbed form
//   9   Feed-forward               SwiGLU
//   10  Mixture of experts         three gates, dispatch, combine
//   11  The model                  weights, cache, block, forward, head
//   12  Talking                    sampling, generate, thinking budget, perplexity
//   13  Multi-token prediction     the MTP module; draft, verify, correct
//   14  FP8                        scales, what a tensor core sums, the forward pass in bf16 and FP8
//   15  Many machines              expert parallelism, dispatch and combine, balance, pipelines
//   19  The bill                   parameters, memory, bytes of the cache
//   21  A conversation             an answer as it comes, the history, a terminal
//   22  Command line               the commands, their options, signals, main: cli.h
//
// Headers stand beside the book and are included where they belong: tokenizer.h (text and ids, alone usable),
// system.h (files, signals, a terminal) and gguf.h (llama.cpp's files) in chapter 4, simd.h (the operations
// again, as fast as the processor can) after chapter 10, ranks.h (processes that talk) and pipeline.h
// (timetables) in chapter 15, cli.h (the commands) at the end. The book can be read without them.
// deepseek.cu includes this file and has each operation again, for a GPU, in chapters of the same numbers.
//
// One token's way through a layer of DeepSeek-V3, with the chapter of each step:
//
//      id --embed--> x --+--> rmsnorm --> MLA (8) -----+--> x --+--> rmsnorm --> experts (10) --+--> x
//                 (11)   |      (5)    q, c_kv, k_rope |        |     (5)    gate, 8 of 256,    |
//                        +-----------------------------+        +--------- one shared ----------+
//
// Notation. A shape stands in a comment, slowest axis first: `// (T, H, Dn)`.
//
//   T tokens in this call    D hidden_size          V vocab_size     L layers
//   H heads                  G kv heads             Dn qk_nope_head_dim, Dr qk_rope_head_dim, Dv v_head_dim
//   Rq q_lora_rank           Rkv kv_lora_rank       E routed experts, K experts per token, F expert width
//
// Symbols of the papers keep a name in the code: h_t is `x`, u_t is `u`, c^KV is `c_kv`, e_i is a row of
// `gate_w`, b_i is `gate_bias`, g_i is `gate_weight`. Equation numbers: V2 = arXiv 2405.04434,
// V3 = arXiv 2412.19437.
//
// Three routes. To see a whole forward pass: 5, 11, then whatever `block` calls. To learn what is new in
// DeepSeek: 7, 8, 10, 13. To check a kernel: 1 (taps), 2, the operation's chapter, then `deepseek logits
// --taps`.

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <charconv>
#include <chrono>
#include <clocale>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <fcntl.h>
#include <omp.h>
#include <poll.h>
#include <sched.h>
#include <simdjson.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

// Functions of single numbers are what kernels call, too: nvcc compiles them for both sides.
#ifdef __CUDACC__
#define EVERYWHERE __host__ __device__
#else
#define EVERYWHERE
#endif

// =================================================================================================
// Chapter 1. Ground rules
// =================================================================================================
//
// What may a reader rely on in every later chapter?
//
// One answer. A reference that gives other bits on another machine is an opinion. So the order of every
// sum is part of its definition (chapter 5), work is split over outputs and never over a sum, and ties go
// to the lower index. The same bits come from 1 or 64 threads, from g++ and clang, from SSE and AVX2, and
// whether a token arrives alone or in a batch.
//
// Two kinds of error. A mistake of the user ends in `fail`: one line, exit code 1. A mistake of ours ends
// in `CHECK`: file, line, abort.

// The type of every activation. -DDEEPSEEK_REAL=double builds the same program in double: the gap between
// the two is the yardstick from which the tests derive their tolerances.
#ifndef DEEPSEEK_REAL
#define DEEPSEEK_REAL float
#define DEEPSEEK_FLOAT 1
#endif
using real = DEEPSEEK_REAL;
namespace fs = std::filesystem;

// -- 1.1  fail, CHECK: the user's mistakes and ours ----------------------------------------------

struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 0))) std::string format_list(const char* format, va_list args) {
    va_list copy;
    va_copy(copy, args);
    std::string text(static_cast<size_t>(std::max(0, std::vsnprintf(nullptr, 0, format, copy))), '\0');
    va_end(copy);
    std::vsnprintf(text.data(), text.size() + 1, format, args);
    return text;
}

__attribute__((format(printf, 1, 2))) std::string text_of(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = format_list(format, args);
    va_end(args);
    return text;
}

// Throws UserError with one clear line; `main` prints it and exits with 1.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = format_list(format, args);
    va_end(args);
    throw UserError(text);
}

#define CHECK(condition, ...)                                                                            \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            std::fprintf(stderr, "%s:%d: CHECK(%s) failed: ", __FILE__, __LINE__, #condition);           \
            std::fprintf(stderr, __VA_ARGS__);                                                           \
            std::fputc('\n', stderr);                                                                    \
            std::abort();                                                                                \
        }                                                                                                \
    } while (0)

// -- 1.2  Pages, Arena: memory whose bill is known before it is spent ----------------------------

// Zeroed pages from the system. A page costs memory only once it is written, so a long context is cheap
// until it is used. `large` pages, where the system has them, suit what is read as a whole again and again:
// the processor looks up fewer addresses.
class Pages {
public:
    explicit Pages(size_t bytes = 0, bool large = false) : bytes_(bytes) {
        if (bytes == 0) return;
        void* p =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("not enough memory: %.2f GB refused by the system", double(bytes) / 1e9);
        base_ = static_cast<std::byte*>(p);
        if (large) madvise(p, bytes, MADV_HUGEPAGE);
    }
    ~Pages() { if (base_) munmap(base_, bytes_); }
    Pages(Pages&& other) noexcept { *this = std::move(other); }
    Pages& operator=(Pages&& other) noexcept {
        std::swap(base_, other.base_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    std::byte* data() const { return base_; }
    size_t size() const { return bytes_; }

private:
    std::byte* base_ = nullptr;
    size_t bytes_ = 0;
};

// Carves arrays out of one block. Without a block it only counts: the same list of `take`s first gives the
// bill, then the pointers.
struct Arena {
    std::byte* base = nullptr;
    size_t used = 0;

    template <class T> T* take(size_t count) {
        size_t at = used;
        used += (count * sizeof(T) + 63) / 64 * 64;
        return base ? reinterpret_cast<T*>(base + at) : nullptr;
    }
};

// take(arena) in `memory`, which grows to what that takes: called twice, the first time to count.
template <class Take> void take_from(std::vector<std::byte>& memory, const Take& take) {
    Arena count, arena;
    take(count);
    if (memory.size() < count.used + 64) memory.resize(count.used + 64);
    arena.base = memory.data() + -reinterpret_cast<uintptr_t>(memory.data()) % 64;
    take(arena);
}

// -- 1.3  parallel_for: the only loop that runs on several cores ---------------------------------
//
// OpenMP's threads wait in a team and are given tasks. A loop is over when its indices are done, not when
// each thread has arrived: one whose core another program has at the moment keeps one index waiting at most.

inline int thread_count = 1;
inline thread_local bool in_loop = false;              // inside a body
inline volatile std::sig_atomic_t interrupted = 0;     // by Ctrl-C (cli.h): the loop that runs ends,
struct Interrupted {};                                 // and throws this

inline int n_threads() { return thread_count; }
inline void set_threads(int n) { thread_count = n; }
inline int thread_index() { return omp_get_thread_num(); }   // 0 <= index < n_threads

// body() on this thread, while the others of a team wait for tasks. What it throws comes out.
inline void with_team(const std::function<void()>& body) {
    if (omp_in_parallel()) return body();
    std::exception_ptr error;
    sigset_t stops, before;                            // these signals are this thread's
    sigemptyset(&stops);
    for (int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&stops, signal);
    pthread_sigmask(SIG_BLOCK, &stops, &before);
#pragma omp parallel num_threads(n_threads())
#pragma omp master
    try {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        body();
    } catch (...) {
        error = std::current_exception();
    }
    if (error) std::rethrow_exception(error);
}

// body(i) for 0 <= i < n, a task for each thread. It takes its share in the order of memory, as processors
// read ahead, and then what is left of the others'.
inline void share_out(int64_t n, const std::function<void(int64_t)>& body) {
    struct alignas(64) Share { std::atomic<int64_t> next; int64_t end; };
    const int64_t tasks = std::min<int64_t>(n, n_threads());
    auto shares = std::make_unique<Share[]>(size_t(tasks));
    for (int64_t k = 0; k < tasks; k++) shares[k].next = n * k / tasks, shares[k].end = n * (k + 1) / tasks;
#pragma omp taskgroup
    for (int64_t k = 0; k < tasks; k++) {
#pragma omp task firstprivate(k) shared(shares, body)
        for (int64_t j = 0; j < tasks; j++) {
            Share& share = shares[(k + j) % tasks];
            for (int64_t i; (i = share.next++) < share.end;) body(i);
        }
    }
}

// So many multiplications take about as long as waking the other threads does.
constexpr int64_t WORTH_WAKING = 1 << 17;

// body(i) for 0 <= i < n, in any order, on all threads, or on this one where n bodies of `cost`
// multiplications are not worth it. Each i writes its own outputs and no sum crosses an i, so the result
// does not depend on the number of threads. What a body throws comes out here. A loop inside a body runs on
// that body's thread. One that is interrupted throws, and its outputs are void.
template <class Body> void parallel_for(int64_t n, const Body& body, int64_t cost = WORTH_WAKING) {
    if (interrupted) throw Interrupted();
    if (n <= 1 || n_threads() == 1 || in_loop || n * cost < WORTH_WAKING) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
    std::exception_ptr error;
    std::mutex mutex;
    auto guarded = [&](int64_t i) {
        if (interrupted) return;
        in_loop = true;
        try {
            body(i);
        } catch (...) {
            std::lock_guard lock(mutex);
            error = std::current_exception();
        }
        in_loop = false;
    };
    with_team([&] { share_out(n, guarded); });
    if (error) std::rethrow_exception(error);
    if (interrupted) throw Interrupted();
}

// -- 1.4  time, and the same random numbers everywhere -------------------------------------------

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, every seed is a good one.
struct Rng {
    uint64_t state;

    uint64_t next() {
        uint64_t z = (state += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    double uniform() { return double(next() >> 11) * 0x1p-53; }   // [0, 1)
};

// -- 1.5  Taps: every intermediate has a name ----------------------------------------------------

// A tap copies a named intermediate out of the forward pass: `layers.3.q_rope`, (T, H, Dr). Calls for later
// chunks of the same prompt append rows. Names and order are those of `deepseek logits --taps`.
struct Taps {
    struct Entry {
        std::string name;
        std::vector<size_t> inner;       // shape after the token axis
        std::vector<real> values;        // one of the two is filled
        std::vector<int32_t> integers;
    };
    std::vector<Entry> entries;          // network order
    std::unordered_map<std::string, size_t> index;
    size_t rows = 0;                     // that each will have: its memory is taken once

    Entry& find(const std::string& name, std::initializer_list<int> inner) {
        auto [at, is_new] = index.try_emplace(name, entries.size());
        if (is_new) entries.push_back({name, {inner.begin(), inner.end()}, {}, {}});
        return entries[at->second];
    }
    void add(const std::string& name, const real* data, int T, std::initializer_list<int> inner) {
        size_t row = 1;
        for (int size : inner) row *= size_t(size);
        Entry& entry = find(name, inner);
        entry.values.reserve(row * rows);
        entry.values.insert(entry.values.end(), data, data + size_t(T) * row);
    }
    void add(const std::string& name, const int* data, int T, int inner) {
        Entry& entry = find(name, {inner});
        entry.integers.insert(entry.integers.end(), data, data + size_t(T) * size_t(inner));
    }
};

// =================================================================================================
// Chapter 2. Numbers
// =================================================================================================
//
// How does a file store a weight, and what is its value?
//
//                sign  exponent  fraction   largest     smallest normal   in the files
//      f32        1       8        23       3.4e38         2^-126         gate_bias, scales
//      bf16       1       8         7       3.4e38         2^-126         V2, distills; V3: norms, embedding
//      f16        1       5        10       65504          2^-14          some fine-tunes
//      e4m3       1       4         3       448            2^-6           V3, R1: all large matrices
//
// bf16 is the upper half of an f32: widening it is a shift. e4m3 has no infinity, and one NaN per sign; its
// 256 values are too few for a whole matrix, so each block of 128 x 128 weights shares an f32 scale:
//
//      W[m][n] = e4m3(q[m][n]) * scale[m / 128][n / 128]
//
// The tensor is called `weight_scale_inv`, yet it multiplies: it is the inverse of the scale with which the
// weight was quantised. V3.1 (`scale_fmt: ue8m0`) rounds scales to powers of two but stores them as f32,
// and not in every tensor, so they are read as they stand. Blocks at the edges may be partial: V3's
// kv_a_proj has 576 = 4.5 * 128 rows and 5 rows of scales.
//
// llama.cpp's files store weights in blocks of 32 or 256 with scales of their own: section 2.3.
//
// Weights stay in the file's format, in the file's mapping; the inner loops of chapter 5 widen them. Every
// widening is exact.

enum class Dtype : uint8_t {
    F64, F32, BF16, F16, F8_E4M3, F8_LATENT, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
    IQ4_NL, IQ4_XS
};
constexpr Dtype REAL = sizeof(real) == 8 ? Dtype::F64 : Dtype::F32;

// How a dtype is stored: `bytes` hold `values` numbers of a row.
struct Format {
    const char* name;
    int values, bytes;
    bool minimums;                       // blocks have a minimum beside the scale
};
constexpr Format FORMATS[] = {
    {"F64", 1, 8, false},     {"F32", 1, 4, false},           {"BF16", 1, 2, false},
    {"F16", 1, 2, false},     {"F8_E4M3", 1, 1, false},       {"F8_LATENT", 576, 656, false},
    {"Q4_0", 32, 18, false},  {"Q4_1", 32, 20, true},         {"Q5_0", 32, 22, false},
    {"Q5_1", 32, 24, true},   {"Q8_0", 32, 34, false},        {"Q2_K", 256, 84, true},
    {"Q3_K", 256, 110, false}, {"Q4_K", 256, 144, true},      {"Q5_K", 256, 176, true},
    {"Q6_K", 256, 210, false}, {"IQ4_NL", 32, 18, false},     {"IQ4_XS", 256, 136, false}};
constexpr const Format& format_of(Dtype dtype) { return FORMATS[size_t(dtype)]; }
constexpr int N_DTYPES = int(Dtype::IQ4_XS) + 1;
static_assert(std::endian::native == std::endian::little && sizeof(size_t) == 8,
              "files are mapped and read as they lie: little-endian, and sizes of 64 bits");
constexpr bool quantised(Dtype dtype) { return dtype >= Dtype::Q4_0; }
constexpr bool looked_up(Dtype dtype) { return dtype >= Dtype::IQ4_NL; }   // integers from a table: 2.3

constexpr int SCALE_BLOCK = 128;

// Bytes of a row of `cols` numbers; cols is a multiple of the format's block.
inline size_t row_bytes(Dtype dtype, int cols) {
    return size_t(cols) / size_t(format_of(dtype).values) * size_t(format_of(dtype).bytes);
}

// A value at any address: tensors in a file need not be aligned.
template <class T> EVERYWHERE T load(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// -- 2.1  widening -------------------------------------------------------------------------------

EVERYWHERE inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

EVERYWHERE inline float f16_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    float subnormal = float(fraction) * 0x1p-24f;
    if (exponent == 0) return sign ? -subnormal : subnormal;
    uint32_t wider = exponent == 31 ? 255 : exponent + 112;       // infinity, NaN; or the biases 15 and 127
    return std::bit_cast<float>(sign | wider << 23 | fraction << 13);
}

inline float e4m3_to_float(uint8_t b) {
    int exponent = (b >> 3) & 15, fraction = b & 7;
    if ((b & 127) == 127) return std::numeric_limits<float>::quiet_NaN();
    float magnitude =
        exponent ? std::ldexp(float(8 + fraction), exponent - 10) : std::ldexp(float(fraction), -9);
    return b & 128 ? -magnitude : magnitude;
}

inline const std::array<float, 256> E4M3 = [] {
    std::array<float, 256> table{};
    for (int b = 0; b < 256; b++) table[size_t(b)] = e4m3_to_float(uint8_t(b));
    return table;
}();

EVERYWHERE inline uint16_t float_to_bf16(float x) {                 // ties to even; NaN stays NaN
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if (std::isnan(x)) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

EVERYWHERE inline uint16_t float_to_f16(float x) {                  // the same
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float a = std::fabs(x);
    if (std::isnan(x)) return uint16_t(sign | 0x7E00);
    if (a >= 65520) return uint16_t(sign | 0x7C00);
    int exponent = a > 0 ? std::max(std::ilogb(a), -14) : -14;
    int fraction = int(std::nearbyint(std::ldexp(a, 10 - exponent)));   // 1024 carries into the exponent
    return uint16_t(sign | ((exponent + 14) * 1024 + fraction));
}

EVERYWHERE inline uint8_t float_to_e4m3(float f) {                  // the same; |f| beyond 448 becomes 448
    uint32_t bits = std::bit_cast<uint32_t>(f), sign = bits >> 24 & 128;
    bits &= 0x7FFFFFFF;
    if (std::isnan(f)) return uint8_t(sign | 127);
    if (bits < 0x3C800000) return uint8_t(sign | uint32_t(std::nearbyint(std::abs(f) * 512)));   // below 2^-6
    uint32_t rounded = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return uint8_t(sign | std::min(rounded, 126u));
}

// How a row of each dtype reads as numbers.
struct F64Row {
    const std::byte* p;
    real operator()(int i) const { return real(load<double>(p + 8 * size_t(i))); }
};
struct F32Row {
    const std::byte* p;
    real operator()(int i) const { return load<float>(p + 4 * size_t(i)); }
};
struct Bf16Row {
    const std::byte* p;
    real operator()(int i) const { return bf16_to_float(load<uint16_t>(p + 2 * size_t(i))); }
};
struct F16Row {
    const std::byte* p;
    real operator()(int i) const { return f16_to_float(load<uint16_t>(p + 2 * size_t(i))); }
};
struct E4m3Row {
    const std::byte* p;
    real operator()(int i) const { return E4M3[size_t(p[i])]; }
};

// A token of V3's latent cache in 656 bytes, as FlashMLA reads it: 512 e4m3 with four f32 scales, 64 bf16.
constexpr int LATENT_SCALED = 512, LATENT_ROPE = LATENT_SCALED + LATENT_SCALED / SCALE_BLOCK * 4;   // bytes
struct LatentRow {
    const std::byte* p;
    real operator()(int i) const {
        if (i >= LATENT_SCALED) return Bf16Row{p + LATENT_ROPE}(i - LATENT_SCALED);
        return E4M3[size_t(p[i])] * load<float>(p + LATENT_SCALED + i / SCALE_BLOCK * 4);
    }
};

template <class Row> void widen_into(real* out, Row w, int n) {
    for (int i = 0; i < n; i++) out[i] = w(i);
}

// -- 2.2  Matrix: weights where they lie ---------------------------------------------------------

// Blocks of scales along n numbers; the last may be partial.
EVERYWHERE inline int64_t scale_blocks(int64_t n) { return (n + SCALE_BLOCK - 1) / SCALE_BLOCK; }

// What activations are rounded to: chapter 14.
enum class Arith : uint8_t { F32, BF16, FP8, FP8_UE8M0 };

// y = W x with W (rows, cols), row-major, in the file's mapping. `scale` belongs to F8_E4M3 alone. A view of
// some rows keeps `first_row`, since a head's rows may begin in the middle of a scale block.
// `transposed` and `pairs` say how llama.cpp's files may hold W (gguf.h): matmul undoes it, row() and view()
// do not.
struct Matrix {
    const std::byte* data = nullptr;
    const std::byte* scale = nullptr;   // f32 (ceil(all rows / 128), ceil(cols / 128))
    Dtype dtype = Dtype::F32;
    int rows = 0, cols = 0, first_row = 0;
    size_t stride = 0;                  // bytes from row to row where they are not dense, else 0
    bool interleaved = false;           // sixteen rows side by side, as a fast kernel wants them (5.4)
    bool transposed = false;            // what is stored is W^T (cols, rows)
    int pairs = 0;                      // rows of a head, stored x0 x_d/2 x1 x_d/2+1 ...; 0: in order
    Arith arith = Arith::F32;           // what its inputs and outputs are rounded to (chapter 14)

    explicit operator bool() const { return data != nullptr; }
    const std::byte* row(int r) const {
        return data + size_t(r) * (stride ? stride : row_bytes(dtype, cols));
    }
    const std::byte* scale_row(int r) const {
        if (!scale) return nullptr;
        return scale + size_t((first_row + r) / SCALE_BLOCK) * size_t(scale_blocks(cols)) * 4;
    }
    Matrix view(int begin, int count) const {
        Matrix part = *this;
        part.data = row(begin), part.rows = count, part.first_row = first_row + begin;
        return part;
    }
    Matrix transpose() const {          // W^T, without moving anything
        Matrix t = *this;
        t.rows = cols, t.cols = rows, t.transposed = !transposed;
        return t;
    }
    Matrix stored() const { return transposed ? transpose() : *this; }
};

// Numbers of the program's own as a matrix.
inline Matrix real_matrix(const real* data, int rows, int cols) {
    return {reinterpret_cast<const std::byte*>(data), nullptr, REAL, rows, cols, 0, 0};
}

// A norm's weight or a bias: few numbers, widened once.
using Vector = std::vector<real>;

// -- 2.3  blocks of small integers ---------------------------------------------------------------
//
// A quantised block is a few small integers q and what they are worth. The twelve formats differ only in how
// they are packed; unpacked, each of them says for its value i, in group g = i / 16:
//
//      x_i = d scale_g q_i  -  m minimum_g          d, m: f16 of the block;  scale, minimum: small integers
//
// Two of them, IQ4_NL and IQ4_XS, store places in a table of sixteen integers, which lie closer near zero, as
// weights do. Such weights are llama.cpp's, and gguf.h packs and unpacks them.

// =================================================================================================
// Chapter 3. Files
// =================================================================================================
//
// What is in a model folder, and how do we know that it is whole?
//
//      config.json                     the shape of the network
//      model.safetensors               u64 n | n bytes of JSON: name -> dtype, shape, [begin, end) | data
//      model.safetensors.index.json    for several files: tensor -> file
//      generation_config.json          sampling defaults (chapter 12)
//      tokenizer.json, tokenizer_config.json    text (chapter 4)
//
// Files come from strangers. Everything is checked before anything is computed: each number has a range,
// each size is multiplied with overflow in mind, the tensors of a file must cover its data without gap or
// overlap, and the model and the files must name the same tensors with the same shapes. A value that this
// program does not implement (an activation, a rope scaling, a gate) is refused, never replaced.

// -- 3.1  refuse, Json: reading objects strictly -------------------------------------------------

// Fails with what is wrong with a file, or with a place in it.
[[noreturn]] __attribute__((format(printf, 2, 3))) void refuse(const std::string& where, const char* format,
                                                               ...) {
    va_list args;
    va_start(args, format);
    std::string wrong = format_list(format, args);
    va_end(args);
    fail("%s: %s", where.c_str(), wrong.c_str());
}

// A line on stderr about what the user may not expect. --quiet: none, nor progress, nor statistics.
inline bool quiet = false;
inline void notice(const std::string& line) { if (!quiet) std::fprintf(stderr, "%s\n", line.c_str()); }
// One about a file that is of use all the same: told once the model is open, and once.
inline std::map<std::string, bool> remarks;              // and whether they were shown
inline void remark(const std::string& line) { remarks.emplace(line, false); }
inline void show_remarks() {
    for (auto& [line, shown] : remarks) if (!std::exchange(shown, true)) notice(line);
}

using Json = simdjson::dom::element;

// A parsed document. simdjson is strict about syntax and depth; the padding it needs is copied here.
struct Document {
    simdjson::dom::parser parser{size_t(1) << 30};
    Json root;

    Document(std::string_view text, const std::string& file) {
        if (text.starts_with("\xEF\xBB\xBF")) refuse(file, "begins with a byte order mark");
        auto error = parser.parse(text.data(), text.size(), true).get(root);
        if (error) refuse(file, "not valid JSON: %s", simdjson::error_message(error));
    }
};

// The members of one JSON object, each name once. Getters check type and range and name file and field;
// `absent` stands for a field that is missing or null.
class Fields {
public:
    Fields(Json json, const std::string& where) : where_(where) {
        simdjson::dom::object object;
        if (json.get(object)) refuse(where, "not a JSON object");
        for (auto [key, value] : object) {
            if (key.find('\0') != key.npos) refuse(where, "a NUL in key '%s'", printable(key).c_str());
            if (!values_.emplace(key, value).second)
                refuse(where, "duplicate key '%s'", printable(key).c_str());
        }
    }
    bool has(const char* key) const { return values_.count(key) && !values_.at(key).is_null(); }
    const std::map<std::string, Json>& all() const { return values_; }
    const std::string& where() const { return where_; }

    Json get(const char* key) const {
        auto at = values_.find(key);
        if (at == values_.end()) refuse(where_, "no field '%s'", key);
        return at->second;
    }
    Fields object(const char* key) const { return {get(key), where_ + ": " + key}; }
    int64_t integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> absent = {}) const {
        intmax_t value = absent && !has(key) ? *absent : typed<int64_t>(key, "not an integer");
        if (value < low || value > high)
            refuse(where_, "'%s' is %jd, outside %jd to %jd", key, value, intmax_t(low), intmax_t(high));
        return value;
    }
    double number(const char* key, double low, double high, std::optional<double> absent = {}) const {
        double value = absent && !has(key) ? *absent : typed<double>(key, "not a number");
        if (!(value >= low && value <= high))
            refuse(where_, "'%s' is %g, outside %g to %g", key, value, low, high);
        return value;
    }
    double number(const char* key, double absent) const { return number(key, -1e300, 1e300, absent); }
    bool boolean(const char* key, std::optional<bool> absent = {}) const {
        return absent && !has(key) ? *absent : typed<bool>(key, "neither true nor false");
    }
    std::string text(const char* key, std::optional<std::string> absent = {}) const {
        return absent && !has(key) ? *absent : std::string(typed<std::string_view>(key, "not a string"));
    }
    // The position of the text in `choices`; anything else is an unknown value.
    int choice(const char* key, std::initializer_list<std::string_view> choices,
               std::optional<std::string> absent = {}) const {
        std::string value = text(key, absent);
        auto at = std::find(choices.begin(), choices.end(), value);
        if (at == choices.end())
            refuse(where_, "'%s' is \"%s\", which this program does not know", key, printable(value).c_str());
        return int(at - choices.begin());
    }
    // A list of natural numbers, none above `most`.
    template <class T = uint64_t>
    std::vector<T> naturals(const char* key, uint64_t most = UINT64_MAX,
                            const char* otherwise = "holds something that is no natural number") const {
        std::vector<T> list;
        if (!get(key).is_array()) refuse(where_, "'%s' is not a list", key);
        for (Json item : simdjson::dom::array(get(key))) {
            uint64_t n = 0;
            if (item.get(n) || n > most) refuse(where_, "'%s' %s", key, otherwise);
            list.push_back(T(n));
        }
        return list;
    }
    // For messages: at most 80 bytes, control characters replaced, so that one line stays one line.
    static std::string printable(std::string_view text) {
        std::string out(text.substr(0, 80));
        for (char& c : out) if (uint8_t(c) < 32 || c == 127) c = '?';
        return out;
    }

private:
    std::string where_;
    std::map<std::string, Json> values_;

    template <class T> T typed(const char* key, const char* otherwise) const {
        T value{};
        if (get(key).get(value)) refuse(where_, "'%s' is %s", key, otherwise);
        return value;
    }
};

// One id below V, or a list of them; absent or null gives none.
std::vector<int> parse_ids(const Fields& f, const char* key, int V) {
    if (!f.has(key)) return {};
    if (!f.get(key).is_array()) return {int(f.integer(key, 0, V - 1))};
    return f.naturals<int>(key, uint64_t(V - 1), "is not a list of ids");
}

constexpr size_t TEXT_LIMIT = size_t(1) << 30, JSON_LIMIT = 100'000'000, HEADER_LIMIT = JSON_LIMIT;

// All of a stream, which may be a pipe or a device without end.
std::string read_stream(std::istream& in, const std::string& name, size_t limit) {
    std::string text, part(size_t(1) << 16, '\0');
    while (in.read(part.data(), std::streamsize(part.size())), in.gcount() > 0) {
        text.append(part, 0, size_t(in.gcount()));
        if (text.size() > limit) refuse(name, "larger than %zu bytes", limit);
    }
    if (in.bad()) refuse(name, "cannot be read");
    return text;
}

std::string read_file(const fs::path& path, size_t limit = TEXT_LIMIT) {
    std::error_code error;
    if (fs::is_directory(path, error)) refuse(path, "is a directory");
    std::ifstream in(path, std::ios::binary);
    if (!in) refuse(path, "%s", std::strerror(errno));
    return read_stream(in, path, limit);
}

// One of a model's JSON files: a regular file, since opening a pipe could wait for ever.
std::string read_json_file(const fs::path& path) {
    std::error_code error;
    if (fs::is_other(path, error)) refuse(path, "not a regular file");
    return read_file(path, JSON_LIMIT);
}

// -- 3.2  Config: the shape of the network -------------------------------------------------------

enum class Gate : uint8_t { GREEDY, GROUP_LIMITED_GREEDY, NOAUX_TC };
enum class Scaling : uint8_t { NONE, LLAMA3, YARN };

struct RopeConfig {
    double theta = 10000;
    Scaling scaling = Scaling::NONE;
    double factor = 1, original_context = 0;
    double low_freq_factor = 1, high_freq_factor = 1;                     // llama3
    double beta_fast = 32, beta_slow = 1, mscale = 1, mscale_all_dim = 0;  // yarn
    double attention_factor = 0;                  // of cos and sin; 0: what the two mscales give
    bool truncate = true;                         // beta_fast and beta_slow mean whole pairs
};

struct Config {
    std::string file, model_type;
    int D = 0, V = 0, n_layers = 0, n_mtp = 0, ffn_width = 0, max_context = 0;
    int H = 0, G = 0, head_dim = 0;                         // GQA; MLA has no use for G and head_dim
    int Rq = 0, Rkv = 0, Dn = 0, Dr = 0, Dv = 0;            // MLA; Rq = 0: queries are not compressed
    int E = 0, K = 0, F = 0, n_shared = 0, first_dense = 0, moe_freq = 1, n_group = 1, topk_group = 1;
    Gate gate = Gate::GREEDY;
    bool sigmoid_affinity = false, norm_topk = false, tied = false;
    bool qkv_bias = false, qk_norm = false;                 // GQA: biases; norms of each head of q and k
    bool fp8 = false, ue8m0 = false;                        // weights in F8_E4M3; scales powers of two
    double routed_scale = 1, eps = 1e-6;
    RopeConfig rope;
    std::vector<int> eos;

    bool mla() const { return Rkv > 0; }
    bool is_moe(int layer) const { return E > 0 && layer >= first_dense && layer % moe_freq == 0; }
    int rope_dim() const { return mla() ? Dr : head_dim; }
    int q_dim() const { return mla() ? Dn + Dr : head_dim; }              // one head's query
    int v_dim() const { return mla() ? Dv : head_dim; }                   // one head's output
    int cache_width() const { return mla() ? Rkv + Dr : 2 * G * head_dim; }   // numbers a token and layer
};

// Limits far above every real model, such that no count or size in this file overflows: the largest sums are
// below 2^64 (parameters, and bytes of a plan with 4,096 threads), strides and expert slots below 2^31.
constexpr int MOST = 1 << 24, MOST_LAYERS = 1 << 10, MOST_EXPERTS = 1 << 14, MOST_WIDTH = 1 << 20;
constexpr int MOST_EXPERTS_IN_ALL = 1 << 16;   // layers times experts: each has its entry in the model

// What must hold of a RopeConfig, whatever file it is from.
inline void check_rope(const RopeConfig& r, const std::string& where) {
    const struct { const char* field; double value, low, high; } ranges[] = {
        {"rope_theta", r.theta, 1.1, 1e12}, {"factor", r.factor, 1, 1e6},
        {"low_freq_factor", r.low_freq_factor, 1e-6, 1e6}, {"beta_fast", r.beta_fast, 1e-6, 1e6},
        {"high_freq_factor", r.high_freq_factor, 1e-6, 1e6}, {"beta_slow", r.beta_slow, 1e-6, 1e6},
        {"mscale", r.mscale, 0, 100}, {"mscale_all_dim", r.mscale_all_dim, 0, 100}};
    for (auto [field, value, low, high] : ranges)
        if (!(value >= low && value <= high))
            refuse(where, "'%s' is %g, outside %g to %g", field, value, low, high);
    if (r.scaling == Scaling::LLAMA3 && r.high_freq_factor <= r.low_freq_factor)
        refuse(where, "'high_freq_factor' is not above 'low_freq_factor'");
    if (r.scaling == Scaling::YARN && r.beta_fast <= r.beta_slow)
        refuse(where, "'beta_fast' is not above 'beta_slow'");
}

// Of the two mscales transformers reads both or none; DeepSeek's model.py, MLA's other reference, each for
// itself. R1-0528-Qwen3-8B has an `attn_factor`, which transformers does not know.
void parse_yarn(RopeConfig& r, const Fields& f, bool mla) {
    r.beta_fast = f.number("beta_fast", r.beta_fast), r.beta_slow = f.number("beta_slow", r.beta_slow);
    r.truncate = f.boolean("truncate", true);
    if (f.has("attention_factor")) r.attention_factor = f.number("attention_factor", 1e-6, 100);
    double mscale = f.number("mscale", 0), all_dim = f.number("mscale_all_dim", 0);
    if (mscale != 0 && all_dim != 0) r.mscale = mscale, r.mscale_all_dim = all_dim;
    else if (mla && (all_dim != 0 || (f.has("mscale") && mscale != 1)))
        refuse(f.where(), "'mscale' without 'mscale_all_dim', or the reverse: published programs disagree");
    if (f.has("attn_factor") && f.number("attn_factor", 1) != 1)
        remark(f.where() + ": 'attn_factor' is passed over, as by transformers (vLLM and llama.cpp use it)");
}

// rope_scaling and rope_theta; newer files keep both in rope_parameters.
RopeConfig parse_rope(const Fields& top, bool mla) {
    static const std::set<std::string> KNOWN = {
        "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
        "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
        "attn_factor", "truncate", "partial_rotary_factor"};
    auto given = [&](const char* key) { return top.has(key) && simdjson::minify(top.get(key)) != "{}"; };
    const bool newer = given("rope_parameters");
    const char *place = newer ? "rope_parameters" : "rope_scaling",
               *original = "original_max_position_embeddings";
    if (newer && given("rope_scaling")) refuse(top.where(), "both 'rope_parameters' and 'rope_scaling'");
    RopeConfig rope{.theta = top.number("rope_theta", RopeConfig().theta)};
    check_rope(rope, top.where()), top.number("partial_rotary_factor", 1, 1, 1);
    if (!given(place)) return rope;
    Fields f = top.object(place);
    for (auto& [key, value] : f.all())
        if (!KNOWN.count(key)) refuse(f.where(), "unknown field '%s'", Fields::printable(key).c_str());
    f.number("partial_rotary_factor", 1, 1, 1), rope.theta = f.number("rope_theta", rope.theta);
    const char* type = f.has("type") ? "type" : "rope_type";
    if (f.has("type") || f.has("rope_type") || f.has("factor"))
        rope.scaling = Scaling(f.choice(type, {"default", "llama3", "yarn"}));
    if (f.text("rope_type", f.text(type, "")) != f.text(type, ""))
        refuse(f.where(), "'type' and 'rope_type' differ");
    for (const char* key : {"rope_theta", original})    // transformers' versions differ in which one counts
        if (f.has(key) && top.has(key) && f.number(key, 0) != top.number(key, 0))
            refuse(f.where(), "'%s' is another one than beside it", key);
    if (rope.scaling != Scaling::NONE) {
        rope.original_context = double((top.has(original) ? top : f).integer(original, 1, MOST));
        rope.factor = f.number("factor", 1, 1e6);
    }
    if (rope.scaling == Scaling::LLAMA3) {
        if (mla) refuse(f.where(), "'%s' \"llama3\" is not used by this architecture", type);
        rope.low_freq_factor = f.number("low_freq_factor", 1e-6, 1e6);
        rope.high_freq_factor = f.number("high_freq_factor", 1e-6, 1e6);
    }
    if (rope.scaling == Scaling::YARN) parse_yarn(rope, f, mla);
    check_rope(rope, f.where());
    return rope;
}

void parse_mla(Config& c, const Fields& f) {
    c.Rq = f.get("q_lora_rank").is_null() ? 0 : int(f.integer("q_lora_rank", 1, MOST));   // absent: wrong
    c.Rkv = int(f.integer("kv_lora_rank", 1, MOST)), c.Dn = int(f.integer("qk_nope_head_dim", 1, MOST));
    c.Dr = int(f.integer("qk_rope_head_dim", 2, MOST)), c.Dv = int(f.integer("v_head_dim", 1, MOST));
    if (f.integer("num_key_value_heads", 1, MOST, c.H) != c.H)
        refuse(c.file, "'num_key_value_heads' differs from 'num_attention_heads', which MLA does not have");
}

void parse_gqa(Config& c, const Fields& f) {
    c.qkv_bias = c.model_type == "qwen2", c.qk_norm = c.model_type == "qwen3";
    c.G = int(f.integer("num_key_value_heads", 1, MOST, c.H));
    if (c.H % c.G)
        refuse(c.file, "'num_key_value_heads' %d does not divide 'num_attention_heads' %d", c.G, c.H);
    if (!f.has("head_dim") && !c.qk_norm && c.D % c.H)
        refuse(c.file, "'num_attention_heads' %d does not divide 'hidden_size' %d", c.H, c.D);
    c.head_dim = int(f.integer("head_dim", 2, MOST, c.qk_norm ? 128 : c.D / c.H));
}

void check_heads(const Config& c) {
    if (c.rope_dim() % 2) refuse(c.file, "RoPE needs an even head dimension, not %d", c.rope_dim());
    int widest = std::max(c.q_dim() + c.v_dim() + c.Dn, c.Rkv + c.Dr);
    if (int64_t(c.H) * widest > MOST || int64_t(c.G) * c.head_dim > MOST)
        refuse(c.file, "'num_attention_heads' times the head dimension is out of range");
}

void parse_moe(Config& c, const Fields& f) {
    c.E = int(f.integer("n_routed_experts", 1, MOST_EXPERTS));
    c.K = int(f.integer("num_experts_per_tok", 1, c.E));
    c.F = int(f.integer("moe_intermediate_size", 1, MOST));
    c.n_shared = int(f.integer("n_shared_experts", 0, 1024, 0));
    c.first_dense = int(f.integer("first_k_dense_replace", 0, c.n_layers));
    c.moe_freq = int(f.integer("moe_layer_freq", 1, MOST, 1));
    const bool v3 = c.model_type == "deepseek_v3";      // the defaults are those of the classes
    const char* method = v3 ? "noaux_tc" : "greedy";
    c.gate = Gate(f.choice("topk_method", {"greedy", "group_limited_greedy", "noaux_tc"}, method));
    c.sigmoid_affinity = f.choice("scoring_func", {"softmax", "sigmoid"}, v3 ? "sigmoid" : "softmax") == 1;
    if ((c.gate == Gate::NOAUX_TC) != v3 || c.sigmoid_affinity != v3)
        refuse(c.file, "'topk_method' and 'scoring_func' are not those of %s", c.model_type.c_str());
    c.norm_topk = f.boolean("norm_topk_prob", v3);
    c.routed_scale = f.number("routed_scaling_factor", 1e-6, 1e6, v3 ? 2.5 : 1);
    if (c.gate == Gate::GREEDY) return;
    auto group = [&](const char* key, int most, int64_t v3s) {                     // a null has no default
        return int(f.integer(key, 1, most, v3 && !f.all().count(key) ? std::optional(v3s) : std::nullopt));
    };
    c.n_group = group("n_group", c.E, 8), c.topk_group = group("topk_group", c.n_group, 4);
}

void check_moe(const Config& c) {
    if (c.E * c.n_layers > MOST_EXPERTS_IN_ALL)
        refuse(c.file, "'n_routed_experts' times 'num_hidden_layers' is out of range");
    if (int64_t(c.n_shared) * c.F > MOST)
        refuse(c.file, "'n_shared_experts' times 'moe_intermediate_size' is out of range");
    if (c.gate == Gate::GREEDY) return;
    int group = c.E / c.n_group, best = c.topk_group * group;
    if (c.E % c.n_group)
        refuse(c.file, "'n_group' %d does not divide 'n_routed_experts' %d", c.n_group, c.E);
    if (c.K > best)
        refuse(c.file, "'num_experts_per_tok' %d exceeds the %d experts of 'topk_group' %d groups", c.K, best,
               c.topk_group);
    if (c.gate == Gate::NOAUX_TC && group < 2)
        refuse(c.file, "'topk_method' noaux_tc needs groups of 2 experts or more ('n_group' %d)", c.n_group);
}

// Fields by which transformers computes something else, at any value but the one that this program has.
void refuse_other_arithmetic(const Fields& f, bool qwen) {
    for (const char* key : {"attention_bias", "mlp_bias", "use_sliding_window"})
        if (f.boolean(key, false)) refuse(f.where(), "'%s' true is not supported", key);
    for (const char* key : {"is_causal", "rope_interleave"})
        if (!f.boolean(key, true)) refuse(f.where(), "'%s' false is not supported", key);
    for (auto k : {qwen ? "per_layer_config" : "sliding_window", "per_layer_config", "attention_chunk_size"})
        if (f.has(k)) refuse(f.where(), "'%s' is not supported", k);
    f.choice("hidden_act", {"silu", "swish"}, "silu");
    std::string types = f.has("layer_types") ? simdjson::minify(f.get("layer_types")) : "[]";
    for (size_t at; (at = types.find("\"full_attention\"")) != types.npos;) types.erase(at, 16);
    if (types[0] != '[' || types.find_first_not_of("[,]") != types.npos)
        refuse(f.where(), "'layer_types' is no list of \"full_attention\" alone");
}

void parse_quantization(Config& c, const Fields& q) {
    q.choice("quant_method", {"fp8"}), q.choice("fmt", {"e4m3"}, "e4m3");
    q.choice("activation_scheme", {"dynamic"}, "dynamic"), q.choice("expert_dtype", {"fp8"}, "fp8");
    c.fp8 = true, c.ue8m0 = q.choice("scale_fmt", {"ue8m0", "float"}, "float") == 0;
    if (q.all().count("weight_block_size") && simdjson::minify(q.get("weight_block_size")) != "[128,128]")
        refuse(q.where(), "'weight_block_size' is not [128, 128]");
}

// config.json, from its text. `file` is for messages.
Config parse_config(std::string_view json, const std::string& file) {
    Document document(json, file);
    Fields f(document.root, file);
    Config c;
    c.file = file, c.model_type = f.text("model_type");
    int kind = f.choice("model_type", {"deepseek_v2", "deepseek_v3", "qwen2", "llama", "qwen3"});
    bool mla = kind < 2;
    auto size = [&](const char* key, int most) { return int(f.integer(key, 1, most)); };
    c.D = size("hidden_size", MOST_WIDTH), c.V = size("vocab_size", MOST);
    c.n_layers = size("num_hidden_layers", MOST_LAYERS), c.H = size("num_attention_heads", 1 << 16);
    c.ffn_width = size("intermediate_size", MOST), c.max_context = size("max_position_embeddings", MOST);
    c.eps = f.number("rms_norm_eps", 0, 1), c.tied = f.boolean("tie_word_embeddings", false);
    refuse_other_arithmetic(f, kind == 2 || kind == 4);
    mla ? parse_mla(c, f) : parse_gqa(c, f);
    if (mla && f.has("n_routed_experts")) parse_moe(c, f), check_moe(c);
    const char* mtp = f.has("num_nextn_predict_layers") ? "num_nextn_predict_layers" : "num_mtp_layers";
    if (kind == 1) c.n_mtp = int(f.integer(mtp, 0, 1, 0));
    if (f.has("quantization_config")) parse_quantization(c, f.object("quantization_config"));
    c.rope = parse_rope(f, mla), c.eos = parse_ids(f, "eos_token_id", c.V);
    check_heads(c);
    return c;
}

// -- 3.3  safetensors: a header that must be right, and bytes ------------------------------------

struct TensorInfo {
    std::string name, dtype;
    std::vector<uint64_t> shape;
    uint64_t begin = 0, end = 0;   // bytes, from the start of the data
};

// Bytes of one element, 0 for a dtype that safetensors does not have.
inline uint64_t dtype_width(const std::string& dtype) {
    static const std::map<std::string, uint64_t> WIDTH = {
        {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
        {"I64", 8}, {"I32", 4}, {"I16", 2}, {"I8", 1},
        {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1}, {"BOOL", 1}};
    auto at = WIDTH.find(dtype);
    return at == WIDTH.end() ? 0 : at->second;
}

TensorInfo parse_tensor_info(const std::string& name, Json json, uint64_t data_bytes,
                             const std::string& file) {
    std::string where = file + ": tensor '" + Fields::printable(name) + "'";
    Fields f(json, where);
    TensorInfo t{name, f.text("dtype"), f.naturals("shape")};
    uint64_t bytes = dtype_width(t.dtype);
    if (bytes == 0) refuse(where, "unknown dtype '%s'", Fields::printable(t.dtype).c_str());
    if (t.shape.size() > 8) refuse(where, "'shape' has %zu axes", t.shape.size());
    for (uint64_t n : t.shape)
        if (__builtin_mul_overflow(bytes, n, &bytes)) refuse(where, "'shape' is larger than any file");
    std::vector<uint64_t> range = f.naturals("data_offsets");
    if (range.size() != 2 || range[0] > range[1] || range[1] > data_bytes)
        refuse(where, "'data_offsets' outside the %ju bytes of data", data_bytes);
    t.begin = range[0], t.end = range[1];
    if (t.end - t.begin != bytes)
        refuse(where, "shape and dtype need %ju bytes, 'data_offsets' has %ju", bytes, t.end - t.begin);
    return t;
}

// The JSON header of a safetensors file. The tensors must cover all `data_bytes`, each byte once.
std::vector<TensorInfo> parse_safetensors_header(std::string_view json, uint64_t data_bytes,
                                                 const std::string& file) {
    if (json.empty() || json[0] != '{') refuse(file, "the safetensors header is not a JSON object");
    Document document(json, file);
    Fields header(document.root, file);
    std::vector<TensorInfo> tensors;
    for (auto& [name, value] : header.all()) {
        if (name != "__metadata__") tensors.push_back(parse_tensor_info(name, value, data_bytes, file));
        else
            for (Fields metadata = header.object("__metadata__"); auto& [key, text] : metadata.all())
                metadata.text(key.c_str());
    }
    std::ranges::sort(tensors, {}, [](const TensorInfo& t) { return std::pair(t.begin, t.end); });
    uint64_t at = 0;
    for (const TensorInfo& t : tensors) {
        if (t.begin != at)
            refuse(file, "tensor '%s' %s", Fields::printable(t.name).c_str(),
                   t.begin < at ? "overlaps another one" : "leaves a gap before it");
        at = t.end;
    }
    if (at != data_bytes) refuse(file, "%ju bytes after the last tensor", data_bytes - at);
    return tensors;
}

// A file's bytes, read-only, brought in by the system as they are touched.
class Mapping {
public:
    explicit Mapping(const fs::path& path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);   // a pipe must not make us wait
        if (fd < 0) refuse(path, "%s", std::strerror(errno));
        struct stat status {};
        bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
        size_t size = regular ? size_t(status.st_size) : 0;
        void* p = size ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
        close(fd);
        if (!regular) refuse(path, "not a regular file");
        if (size == 0) refuse(path, "empty");
        if (p == MAP_FAILED) refuse(path, "cannot be mapped: %s", std::strerror(errno));
        bytes_ = {static_cast<const std::byte*>(p), size};
        std::string_view begin(static_cast<const char*>(p), std::min(size, size_t(40)));
        if (begin == "version https://git-lfs.github.com/spec/")
            refuse(path, "a git-lfs pointer and not yet the file: \"git lfs pull\" in its folder fetches it");
    }
    ~Mapping() { if (data()) munmap(const_cast<std::byte*>(data()), size()); }
    Mapping(Mapping&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
    Mapping& operator=(Mapping&&) = delete;
    const std::byte* data() const { return bytes_.data(); }
    size_t size() const { return bytes_.size(); }

private:
    std::span<const std::byte> bytes_;
};

// A whole safetensors file: where its data begin, and what is in them.
struct TensorFile {
    uint64_t data_begin = 0;
    std::vector<TensorInfo> tensors;
};

TensorFile parse_safetensors(std::span<const std::byte> bytes, const std::string& file) {
    if (bytes.size() < 8) refuse(file, "too short for a safetensors file");
    uint64_t n = load<uint64_t>(bytes.data());
    if (n > HEADER_LIMIT) refuse(file, "a header of %ju bytes is beyond the limit of 100 MB", n);
    if (n > bytes.size() - 8) refuse(file, "the header is longer than the file (cut off?)");
    std::string_view json(reinterpret_cast<const char*>(bytes.data()) + 8, n);
    return {8 + n, parse_safetensors_header(json, bytes.size() - 8 - n, file)};
}

// =================================================================================================
// Chapter 4. Text to tokens
// =================================================================================================
//
// What does the network see of a question? The whole answer is in tokenizer.h; here is one prompt on its
// way, with DeepSeek-V3's tokenizer:
//
//      the user types       don't
//      the chat template    <｜begin▁of▁sentence｜><｜User｜>don't<｜Assistant｜>
//      added tokens         [<｜begin▁of▁sentence｜>] [<｜User｜>]  don't  [<｜Assistant｜>]
//      Split regexes        "don" "'t"              each piece is encoded alone
//      bytes, then merges   d o n -> d on -> don    lowest merge rank first, leftmost on ties
//      ids                  0  128803  20385 1664  128804
//
// Two things go wrong in most ports. The template is part of the model: another one, or a second BOS, and
// the model answers worse without any error. And text decodes to bytes, not characters: a Chinese
// character may be split over two tokens, so a stream must hold back its first half (Utf8Stream).

#include "tokenizer.h"

// -- 4.1  the ids of a prompt --------------------------------------------------------------------

inline std::string json_array(std::span<const int> ids) {
    std::string out = "[";
    for (int id : ids) out += (out.size() > 1 ? "," : "") + std::to_string(id);
    return out + "]";
}

// A prompt's ids. A chat template has its BOS; a raw text gets it here, once.
inline std::vector<int> encode_prompt(const Tokenizer& t, const std::string& text, bool add_bos) {
    std::vector<int> ids = t.encode(text);
    if (add_bos && t.bos >= 0 && (ids.empty() || ids[0] != t.bos)) ids.insert(ids.begin(), t.bos);
    return ids;
}

// -- 4.2  tokenize: text to ids and back, as JSON ------------------------------------------------

struct TokenizeOptions {
    bool add_bos = false, decode = false, chat = false, as_ids = false, lines = false;
};

inline std::vector<int> parse_id_array(Json json) {
    simdjson::dom::array list;
    std::vector<int> ids;
    if (json.get(list)) fail("tokenize --decode: not a JSON array of ids");
    for (Json item : list) {
        int64_t id = -1;
        if (item.get(id) || id < 0 || id > std::numeric_limits<int>::max())
            fail("tokenize --decode: not a JSON array of ids");
        ids.push_back(int(id));
    }
    return ids;
}

inline std::string tokens_json(const Tokenizer& t, std::string_view text, bool add_bos) {
    std::vector<int> ids = t.encode(text);
    if (add_bos && t.bos < 0) fail("tokenize --add-bos: this tokenizer has no BOS");
    if (add_bos) ids.insert(ids.begin(), t.bos);
    return json_array(ids);
}

using Field = tokenizer_detail::Json;                    // says in each complaint which field it is
struct Chat { Messages messages; bool add_generation_prompt = false; };
inline Messages messages_of(const Field& list) {
    Messages out;
    for (const Field& json : list.items()) {
        Message& m = out.emplace_back(Message{json.at("role").string()});
        if (auto content = json.find("content")) m.content = content->string();
        if (auto prefix = json.find("prefix")) m.prefix = prefix->boolean();
        auto calls = json.find("tool_calls");
        if (calls) m.tool_calls.emplace();
        for (const Field& call : calls ? calls->items() : std::vector<Field>()) {
            Field type = call.at("type"), f = call.at("function");
            m.tool_calls->push_back({type.string(), f.at("name").string(), f.at("arguments").string()});
        }
    }
    return out;
}
inline Messages parse_messages(std::string_view json) {          // [{"role": "user", "content": "..."}, ...]
    return messages_of(tokenizer_detail::Document(json, "messages").root);
}

// {"messages": [...], "tools": [...] or null, "add_generation_prompt": true or false}
inline Chat parse_chat(std::string_view json) {
    tokenizer_detail::Document chat(json, "chat");
    if (auto tools = chat.root.find("tools")) tools->items();          // no template reads them
    auto open = chat.root.find("add_generation_prompt");
    return {messages_of(chat.root.at("messages")), open && open->boolean()};
}

// The answer to one input: with --lines, input and output are JSON values.
inline std::string tokenize(const Tokenizer& t, const std::string& input, const TokenizeOptions& o) {
    if (o.decode) {
        Document document(input, "stdin");
        std::string text = t.decode(parse_id_array(document.root));
        return o.lines ? json_quote(text) : text;
    }
    if (o.chat) {
        Chat chat = o.lines ? parse_chat(input) : Chat{parse_messages(input), true};
        std::string text = t.render(chat.messages, chat.add_generation_prompt);
        return o.as_ids ? tokens_json(t, text, false) : o.lines ? json_quote(text) : text;
    }
    if (!o.lines) return tokens_json(t, input, o.add_bos);
    Document document(input, "stdin");
    std::string_view text;
    if (document.root.get(text)) fail("tokenize --lines: a line is not a JSON string");
    return tokens_json(t, text, o.add_bos);
}

// -- 4.3  write_safetensors: results, whole or not at all ----------------------------------------
//
// Who reads a result must never find half of one. AtomicFile, in system.h, writes to a temporary name and
// renames in the end; whatever ends the program before that leaves nothing. That header has all that the
// operating system and a terminal ask for, and nothing about models.

#include "system.h"

inline void copy(void* to, const void* from, size_t bytes) { if (bytes) std::memcpy(to, from, bytes); }

struct OutputTensor {
    std::string name, dtype;
    std::vector<size_t> shape;
    const void* data;
    size_t bytes;
    void (*read)(void* to, const void* from, size_t bytes) = nullptr;   // where data is not ours (11.1)
};

// about: what the file says of itself
void write_safetensors(AtomicFile& file, const std::vector<OutputTensor>& tensors,
                       const std::map<std::string, std::string>& about = {}) {
    std::string header = "{", metadata;
    for (auto& [key, text] : about)
        metadata += (metadata.empty() ? "" : ",") + json_quote(key) + ":" + json_quote(text);
    if (!about.empty()) header += "\"__metadata__\":{" + metadata + "}";
    for (size_t at = 0; const OutputTensor& t : tensors) {
        std::string shape;
        for (size_t n : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
        header += text_of("%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                          header.size() > 1 ? "," : "", t.name.c_str(), t.dtype.c_str(), shape.c_str(), at,
                          at + t.bytes);
        at += t.bytes;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    uint64_t n = header.size();
    file.write(&n, 8), file.write(header.data(), header.size());
    for (std::vector<std::byte> copy; const OutputTensor& t : tensors) {
        if (t.read) copy.resize(t.bytes), t.read(copy.data(), t.data, t.bytes);
        file.write(t.read ? copy.data() : t.data, t.bytes);
    }
    file.commit();
}

// -- 4.4  Checkpoint: the tensors of a model, by name --------------------------------------------

struct Tensor {
    std::string file, dtype;
    std::vector<uint64_t> shape;
    const std::byte* data = nullptr;
    uint64_t bytes = 0;
    int pairs = 0;                         // as in Matrix
};

struct Checkpoint {
    std::vector<Mapping> files;
    std::map<std::string, Tensor> tensors;
    std::deque<std::vector<float>> widened;   // scales that a file has in fewer bits
    bool gguf = false;                     // made from a GGUF file, which has other names for the tensors
};

// The dtype called so, if weights may have it.
inline std::optional<Dtype> weights_dtype(const std::string& name) {
    for (int i = 0; i < N_DTYPES; i++)
        if (name == format_of(Dtype(i)).name) return Dtype(i);
    return {};
}

// A tensor as a matrix, a vector as one of one row; with the scales of e4m3 if they are there.
inline Matrix matrix_of(const Checkpoint& checkpoint, const std::string& name) {
    const Tensor& t = checkpoint.tensors.at(name);
    std::optional<Dtype> dtype = weights_dtype(t.dtype);
    if (!dtype)
        refuse(t.file, "tensor '%s' has dtype %s, which weights do not have", name.c_str(), t.dtype.c_str());
    auto scale = checkpoint.tensors.find(name + "_scale_inv");
    Matrix m{t.data, nullptr, *dtype, t.shape.size() > 1 ? int(t.shape[0]) : 1, int(t.shape.back())};
    if (m.dtype == Dtype::F8_E4M3 && scale != checkpoint.tensors.end()) m.scale = scale->second.data;
    m.pairs = t.pairs;
    return m;
}

// How the model's makers would have it sampled (chapter 12.1).
struct Sampling {
    double temperature = 0.6, top_p = 0.95, min_p = 0;   // DeepSeek's advice for R1
    int top_k = 0;                                       // 0: off
    double repeat_penalty = 1;                           // of tokens that are there already; 1: none
};
struct GenerationConfig {
    Sampling sampling;
    std::vector<int> eos;                                // what ends an answer
};

// -- 4.5  a model: a folder, or one file of llama.cpp's ------------------------------------------
//
// Its config, its tokenizer and its weights are the files of a folder, or all in one file, which gguf.h
// reads. Below is what is asked of both; from there on the network does not depend on which it was.

#include "gguf.h"

// Each GGUF file of a folder is a model of its own, or the first part of one.
inline void refuse_folder_of_gguf(const fs::path& folder) {
    std::error_code error;
    std::set<fs::path> files;
    for (auto& entry : fs::directory_iterator(folder, error))
        if (entry.path().extension() == ".gguf") files.insert(entry.path());
    if (!files.empty()) refuse(folder, "of GGUF files; give the file: -m %s", files.begin()->c_str());
}

inline Tokenizer load_tokenizer(const fs::path& model) {
    if (is_gguf(model)) return gguf_tokenizer(model);
    if (!fs::exists(model / "tokenizer.json")) refuse_folder_of_gguf(model);
    return Tokenizer::load(model.string());
}

// What would change which tokens come and is not done here: at any other value, or at any at all.
constexpr std::pair<const char*, double> ONLY_AT[] = {
    {"num_beams", 1}, {"num_beam_groups", 1}, {"typical_p", 1}, {"encoder_repetition_penalty", 1},
    {"guidance_scale", 1}, {"epsilon_cutoff", 0}, {"eta_cutoff", 0}, {"penalty_alpha", 0},
    {"diversity_penalty", 0}, {"no_repeat_ngram_size", 0}, {"encoder_no_repeat_ngram_size", 0},
    {"min_length", 0}, {"min_new_tokens", 0}};
constexpr const char* NOT_AT_ALL[] = {
    "top_h", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "stop_strings",
    "max_time", "constraints", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "watermarking_config", "dola_layers"};

// generation_config.json, from its text, as transformers reads it: without `do_sample` greedy, and with its
// defaults for what is left out.
inline GenerationConfig parse_generation_config(std::string_view json, const std::string& file, int V) {
    Document document(json, file);
    Fields f(document.root, file);
    for (auto [key, value] : ONLY_AT)
        if (f.number(key, value) != value) refuse(file, "'%s' other than %g is not supported", key, value);
    for (const char* key : NOT_AT_ALL)
        if (f.has(key) && simdjson::minify(f.get(key)) != "[]") refuse(file, "'%s' is not supported", key);
    if (f.boolean("token_healing", false)) refuse(file, "'token_healing' true is not supported");
    GenerationConfig g;
    g.sampling = {f.number("temperature", 0, 100, 1), f.number("top_p", 1e-9, 1, 1),
                  f.number("min_p", 0, 1, 0), int(f.integer("top_k", 0, MOST, 50)),
                  f.number("repetition_penalty", 1e-9, 100, 1)};
    if (!f.boolean("do_sample", false)) g.sampling.temperature = 0;
    g.eos = parse_ids(f, "eos_token_id", V);
    return g;
}

// A model's, and what ends its answers: what generation_config.json says, else config.json, else the
// tokenizer, whose id is -1 if it has none.
inline GenerationConfig read_generation_config(const fs::path& model, const Config& c, int tokenizer_eos) {
    fs::path file = model / "generation_config.json";
    GenerationConfig g;
    if (is_gguf(model)) g = gguf_generation(model, c.V);
    else if (fs::exists(file)) g = parse_generation_config(read_json_file(file), file, c.V);
    if (g.eos.empty()) g.eos = c.eos;
    if (g.eos.empty() && tokenizer_eos >= 0) g.eos = {tokenizer_eos};
    return g;
}

// tensor -> file name, from model.safetensors.index.json.
std::map<std::string, std::string> parse_index(std::string_view json, const std::string& file) {
    Document document(json, file);
    Fields top(document.root, file), map = top.object("weight_map");
    std::map<std::string, std::string> out;
    for (auto& [name, value] : map.all()) {
        std::string shard = map.text(name.c_str());
        if (!shard.ends_with(".safetensors") || shard.find_first_of("/\0", 0, 2) != shard.npos)
            refuse(file, "tensor '%s' names no file of this folder: '%s'", Fields::printable(name).c_str(),
                   Fields::printable(shard).c_str());
        out[name] = shard;
    }
    if (out.empty()) refuse(file, "'weight_map' is empty");
    return out;
}

// Nothing is written over the files of this model.
inline void protect_model(const fs::path& model) {
    auto protect = [](const fs::path& file) { if (auto id = file_id(file)) in_use.insert(*id); };
    if (is_gguf(model)) for (const fs::path& part : gguf_files(model)) protect(part);
    for (const char* name : {"config.json", "generation_config.json", "tokenizer.json",
                             "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                             "vocab.json", "merges.txt", "model.safetensors", "model.safetensors.index.json"})
        protect(model / name);
    fs::path index = model / "model.safetensors.index.json";
    if (fs::exists(index))
        for (auto& [tensor, shard] : parse_index(read_json_file(index), index)) protect(model / shard);
}

// Scales in BF16, F16 or F64 become f32, as which they are multiplied.
inline void widen_scales(Checkpoint& checkpoint, Tensor& t) {
    std::optional<Dtype> dtype = weights_dtype(t.dtype);
    if (!dtype || *dtype > Dtype::F16 || t.dtype == "F32") return;
    size_t n = t.bytes / row_bytes(*dtype, 1);
    if (n > size_t(MOST)) refuse(t.file, "more than %d scales in one tensor", MOST);
    Vector wide(n);
    widen_plain(wide.data(), {t.data, nullptr, *dtype, 1, int(n)}, 0);
    auto& scales = checkpoint.widened.emplace_back(wide.begin(), wide.end());
    t.dtype = "F32", t.data = reinterpret_cast<const std::byte*>(scales.data()), t.bytes = 4 * n;
}

void add_tensors(Checkpoint& checkpoint, const fs::path& path) {
    std::string file = path.string();
    Mapping& mapping = checkpoint.files.emplace_back(path);
    TensorFile parsed = parse_safetensors({mapping.data(), mapping.size()}, file);
    for (TensorInfo& t : parsed.tensors) {
        Tensor tensor{file, t.dtype, t.shape, mapping.data() + parsed.data_begin + t.begin, t.end - t.begin};
        if (t.name.ends_with("_scale_inv")) widen_scales(checkpoint, tensor);
        auto [at, is_new] = checkpoint.tensors.emplace(t.name, tensor);
        if (!is_new)
            refuse(file, "tensor '%s' is also in %s", Fields::printable(t.name).c_str(),
                   at->second.file.c_str());
    }
}

inline bool has_weights(const fs::path& folder) {
    return fs::exists(folder / "model.safetensors.index.json") || fs::exists(folder / "model.safetensors");
}

// The tensors of a model. Those of a folder must be the ones that its index lists, if it has one.
inline Checkpoint open_checkpoint(const fs::path& model) {
    if (is_gguf(model)) return make_gguf_checkpoint(open_gguf(model));
    fs::path index = model / "model.safetensors.index.json";
    Checkpoint checkpoint;
    if (!has_weights(model)) refuse_folder_of_gguf(model);
    if (!has_weights(model))
        refuse(model, "neither model.safetensors nor model.safetensors.index.json (not a model folder, or "
                      "not fetched whole?)");
    if (!fs::exists(index)) {
        add_tensors(checkpoint, model / "model.safetensors");
        return checkpoint;
    }
    auto weight_map = parse_index(read_json_file(index), index);
    std::set<std::string> shards;
    for (auto& [name, shard] : weight_map) shards.insert(model / shard);
    if (fs::exists(model / "model.safetensors") && !shards.count(model / "model.safetensors"))
        refuse(model, "two models: model.safetensors.index.json does not name model.safetensors");
    for (const std::string& shard : shards) add_tensors(checkpoint, shard);
    for (auto& [name, shard] : weight_map) {
        std::string file = model / shard;
        auto at = checkpoint.tensors.find(name);
        if (at == checkpoint.tensors.end() || at->second.file != file)
            refuse(file, "no tensor '%s', which the index expects there", Fields::printable(name).c_str());
    }
    for (auto& [name, tensor] : checkpoint.tensors)
        if (!weight_map.count(name))
            refuse(tensor.file, "tensor '%s' is not in the index", Fields::printable(name).c_str());
    return checkpoint;
}

// Names that are a tensor of layer n_layers, where V3 has its MTP module.
inline bool of_mtp(const Config& c, const std::string& name) {
    return c.model_type == "deepseek_v3" && name.starts_with(text_of("model.layers.%d.", c.n_layers));
}

// config.json and the files may disagree about the MTP module: transformers leaves its tensors out, and
// writes that it is there. It is there when both say so.
inline Config settle_mtp(Config c, const fs::path& folder) {
    fs::path index = folder / "model.safetensors.index.json", file = folder / "model.safetensors";
    if (c.model_type != "deepseek_v3" || !has_weights(folder)) return c;
    bool there = false;
    if (fs::exists(index)) {
        for (auto& [name, shard] : parse_index(read_json_file(index), index)) there |= of_mtp(c, name);
    } else {
        Mapping bytes(file);
        for (const TensorInfo& t : parse_safetensors({bytes.data(), bytes.size()}, file).tensors)
            there |= of_mtp(c, t.name);
    }
    if (there == (c.n_mtp > 0)) return c;
    remark(folder.string() + (there ? ": the files have an MTP module, config.json has not: it is left out"
                                    : ": config.json has an MTP module, the files have not: it is left out"));
    c.n_mtp = 0;
    return c;
}

inline Config read_config(const fs::path& model) {
    fs::path file = model / "config.json";
    if (!fs::exists(model)) refuse(model, "no such file or folder");
    if (is_gguf(model)) return parse_gguf_config(open_gguf(model));
    if (!fs::exists(file)) refuse_folder_of_gguf(model);
    if (!fs::exists(file)) refuse(model, "no config.json (not a model folder?)");
    return settle_mtp(parse_config(read_json_file(file), file), model);
}

// -- 4.6  Binder: every tensor in its place ------------------------------------------------------

// Looks up tensors by name and checks dtype and shape. Without a checkpoint it only counts, so the bill
// of a model can be had from config.json alone. Matrices stay where they lie; vectors are widened.
class Binder {
public:
    Binder(const Checkpoint* checkpoint, const std::string& folder, bool fp8, Quantiser* quantiser = nullptr)
        : checkpoint_(checkpoint), folder_(folder), fp8_(fp8), quantiser_(quantiser) {}
    uint64_t parameters = 0;             // numbers asked for, scales not counted
    uint64_t bytes = 0;                  // of what was found, scales counted
    std::deque<Vector> vectors;          // found so far
    bool elsewhere = false;              // what is asked for must be there, but another rank has it (15.4)

    Matrix matrix(const std::string& name, int rows, int cols) {
        parameters += uint64_t(rows) * uint64_t(cols);
        Matrix m{nullptr, nullptr, Dtype::BF16, rows, cols, 0};
        if (checkpoint_) m = find(name, {uint64_t(rows), uint64_t(cols)});
        if (m.dtype == Dtype::F64) wrong(name, "is F64, which only vectors may be");
        if (m.dtype == Dtype::F8_E4M3) check_scales(name, rows, cols);
        if (elsewhere) return {};
        if (quantiser_) m = quantiser_->apply(name, m);
        bytes += uint64_t(rows) * row_bytes(m.dtype, cols);
        if (m.dtype == Dtype::F8_E4M3) bytes += 4 * blocks(rows) * blocks(cols);
        return m;
    }
    std::span<const real> vector(const std::string& name, int n) {
        parameters += uint64_t(n), bytes += uint64_t(n) * sizeof(real);
        if (!checkpoint_) return {};
        Matrix m = find(name, {uint64_t(n)});
        if (m.dtype == Dtype::F8_E4M3 || quantised(m.dtype))
            wrong(name, text_of("is %s, a vector cannot be", format_of(m.dtype).name));
        Vector& out = vectors.emplace_back(size_t(n));
        widen_plain(out.data(), m, 0);
        for (real v : out)
            if (!std::isfinite(v)) wrong(name, "holds a number that is not finite");
        return out;
    }
    // A second copy of a tensor, which the file may carry and the model does not need.
    void ignore(const std::string& name, int rows, int cols) {
        if (has(name)) place(name, {uint64_t(rows), uint64_t(cols)});
    }
    // The head of a model whose head is its embedding: the same, or config.json is wrong.
    void same(const std::string& name, const std::string& as) {
        if (!has(name)) return;
        const Tensor &t = checkpoint_->tensors.at(name), &other = place(as, t.shape);
        if (t.dtype != other.dtype || std::memcmp(t.data, other.data, t.bytes))
            wrong(name, text_of("is not '%s', but 'tie_word_embeddings' is true", as.c_str()));
        used_.insert(name);
    }
    bool has(const std::string& name) const { return checkpoint_ && checkpoint_->tensors.count(name); }
    // Every tensor of the files must have found its place; old files have buffers that compute nothing.
    void finish() const {
        for (auto& [name, tensor] : checkpoint_->tensors) {
            bool buffer = false;
            for (const char* end : {".inv_freq", "_cached", "attn.masked_bias", "attn.bias", "causal_mask"})
                buffer |= name.ends_with(end);
            if (!used_.count(name) && !buffer) wrong(name, "has no place in this model");
        }
    }

private:
    const Checkpoint* checkpoint_;
    std::string folder_;
    bool fp8_;
    Quantiser* quantiser_;
    std::set<std::string> used_;

    static uint64_t blocks(int n) { return uint64_t(scale_blocks(n)); }
    static std::string shape_text(const std::vector<uint64_t>& shape) {
        std::string text;
        for (uint64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
        return "(" + text + ")";
    }
    // A name as the files spell it.
    std::string shown(const std::string& name) const { return checkpoint_->gguf ? name_in_gguf(name) : name; }
    [[noreturn]] void wrong(const std::string& name, const std::string& what) const {
        refuse(checkpoint_->tensors.at(name).file, "tensor '%s' %s",
               Fields::printable(shown(name)).c_str(), what.c_str());
    }
    const Tensor& place(const std::string& name, const std::vector<uint64_t>& shape) {
        const char* asks = checkpoint_->gguf ? "the file's keys ask" : "config.json asks";
        auto at = checkpoint_->tensors.find(name);
        if (at == checkpoint_->tensors.end())
            refuse(folder_, "no tensor '%s', which %s for", shown(name).c_str(), asks);
        if (at->second.shape != shape)
            wrong(name, text_of("has shape %s, %s for %s", shape_text(at->second.shape).c_str(), asks,
                                shape_text(shape).c_str()));
        used_.insert(name);
        return at->second;
    }
    Matrix find(const std::string& name, const std::vector<uint64_t>& shape) {
        place(name, shape);
        Matrix m = matrix_of(*checkpoint_, name);
        bool fp8 = m.dtype == Dtype::F8_E4M3;
        if (fp8 && !fp8_) wrong(name, "is F8_E4M3, but config.json has no quantization_config");
        return m;
    }
    void check_scales(const std::string& name, int rows, int cols) {
        std::string scales = name + "_scale_inv";
        const Tensor& weights = checkpoint_->tensors.at(name);
        const Tensor& t = place(scales, {blocks(rows), blocks(cols)});
        if (t.dtype != "F32") wrong(scales, "has dtype " + t.dtype + ", not F32");
        for (uint64_t i = 0; i < t.bytes; i += 4)
            if (!std::isfinite(load<float>(t.data + i)))
                wrong(scales, "(of " + weights.file + ") holds a scale that is not finite");
    }
};

// =================================================================================================
// Chapter 5. Small operations
// =================================================================================================
//
// Of what are all the layers made? Almost everything is one operation: the dot product of a row of weights
// with a vector of activations. So it is worth saying exactly what it is:
//
//      lane[j] = fma(w[i], x[i], lane[j])    for i = j, j + 16, j + 32, ...     16 lanes, j = i mod 16
//      dot     = ((0+8) + (4+12)) + ...      a fixed tree over the 16 lanes
//
// Sixteen lanes because two AVX registers, one AVX-512 register or four NEON registers hold them: a fast
// kernel does the same additions in the same order, and returns the same bits. `std::fma` rounds once, on
// every machine; -ffp-contract=off keeps the compiler from fusing anything else.
//
// An e4m3 row adds one step: each block of 128 columns has its own sixteen lanes, which are multiplied by the
// block's scale and added to the row's (V3 section 3.3.2 promotes its partial sums at the same places).
//
// Chapters 5 to 10 hold operations: functions of arrays and sizes. None knows a model, a file or an option.
// What stands in them is the definition; some have a fast form beside it, behind the table of 5.4.

// T vectors, `stride` numbers apart: activations of T tokens, a head's slice of them, or rows of a buffer.
struct Rows {
    real* data;
    int64_t stride;
    EVERYWHERE real* operator[](int64_t t) const { return data + t * stride; }
};
struct ConstRows {
    const real* data;
    int64_t stride;
    ConstRows(const real* data, int64_t stride) : data(data), stride(stride) {}
    ConstRows(Rows rows) : data(rows.data), stride(rows.stride) {}
    EVERYWHERE const real* operator[](int64_t t) const { return data + t * stride; }
};

// -- 5.1  dot: a row of weights times a vector ---------------------------------------------------

constexpr int LANES = 16;

template <class T> T sum_lanes(const T* lane) {
    T v[LANES / 2];
    for (int j = 0; j < 8; j++) v[j] = lane[j] + lane[j + 8];
    for (int j = 0; j < 4; j++) v[j] += v[j + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

template <class Row> void add_products(real* lane, Row w, const real* x, int begin, int end) {
    for (int i = begin; i < end; i++) lane[i % LANES] = std::fma(w(i), x[i], lane[i % LANES]);
}

template <class Row> real dot_plain(Row w, const real* x, int n) {
    real lane[LANES] = {};
    add_products(lane, w, x, 0, n);
    return sum_lanes(lane);
}

// a . b, both (n)
inline real dot_real_plain(const real* a, const real* b, int n) {
    real lane[LANES] = {};
    for (int i = 0; i < n; i++) lane[i % LANES] = std::fma(a[i], b[i], lane[i % LANES]);
    return sum_lanes(lane);
}

inline real dot_scaled_plain(E4m3Row w, const std::byte* scale, const real* x, int n) {
    real lane[LANES] = {};
    for (int begin = 0; begin < n; begin += SCALE_BLOCK, scale += 4) {
        real block[LANES] = {}, s = load<float>(scale);
        add_products(block, w, x, begin, std::min(n, begin + SCALE_BLOCK));
        for (int j = 0; j < LANES; j++) lane[j] = std::fma(s, block[j], lane[j]);
    }
    return sum_lanes(lane);
}

// W[r] . x, quantised weights dequantised
inline real dot_row_plain(const Matrix& w, int r, const real* x) {
    const std::byte* p = w.row(r);
    switch (w.dtype) {
    case Dtype::F64: return dot_plain(F64Row{p}, x, w.cols);
    case Dtype::F32: return dot_plain(F32Row{p}, x, w.cols);
    case Dtype::BF16: return dot_plain(Bf16Row{p}, x, w.cols);
    case Dtype::F16: return dot_plain(F16Row{p}, x, w.cols);
    case Dtype::F8_E4M3: return dot_scaled_plain(E4m3Row{p}, w.scale_row(r), x, w.cols);
    default: break;
    }
    Vector row(size_t(w.cols));
    dequantise_row(row.data(), w, r);
    return dot_real_plain(row.data(), x, w.cols);
}

// -- 5.2  dot in small integers ------------------------------------------------------------------
//
// Quantised weights are small integers, and integer arithmetic is exact: in whatever order a machine adds,
// and whatever width its registers have, the sum is the same. So activations are made integers too: qx = x /
// dx, rounded to 8 bits, with one dx for as many numbers as share a block of the weights, 32 or 256. Eight
// bits because processors multiply bytes the fastest; the error is about that of 8-bit weights. For each
// block b
//
//      I_b = sum_i scale_g q_i qx_i        M_b = sum_g minimum_g (sum of qx in g)          exact, in 32 bits
//      lane[b mod 8] += (d_b dx_b) I_b  -  (m_b dx_b) M_b                                  two fma
//      dot = ((0+4) + (2+6)) + ((1+5) + (3+7))                                             over the 8 lanes
//
// `--exact` leaves x as it is, and dequantises each weight.

constexpr int BLOCK_LANES = 8, GROUP = 16;

inline float sum_block_lanes(const float* lane) {
    float v[4];
    for (int j = 0; j < 4; j++) v[j] = lane[j] + lane[j + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// The bits of |x| order like |x| does; NaN comes out above infinity.
EVERYWHERE inline uint32_t magnitude_bits(float x) { return std::bit_cast<uint32_t>(x) & 0x7FFFFFFF; }

struct IntScale {
    float d, inverse;          // q = x * inverse, rounded; x ~ d * q
};
inline IntScale int_scale(uint32_t largest) {
    constexpr int LIMIT = 127;
    float top = std::bit_cast<float>(largest);
    if (!std::isfinite(top)) return {std::numeric_limits<float>::quiet_NaN(), 0};
    if (top < 0x1p-100f) return {0, 0};
    return {top / LIMIT, LIMIT / top};
}

// q, x: (n), a block of activations; returns d. Ties go to the even integer.
inline float quantise_block_plain(int8_t* q, const real* x, int n) {
    constexpr float TO_INTEGER = 0x1.8p23f;
    uint32_t largest = 0;
    for (int i = 0; i < n; i++) largest = std::max(largest, magnitude_bits(float(x[i])));
    IntScale s = int_scale(largest);
    for (int i = 0; i < n; i++)
        q[i] = int8_t(s.inverse == 0 ? 0 : float(x[i]) * s.inverse + TO_INTEGER - TO_INTEGER);
    return s.d;
}

// W[r] . x
inline float int_dot_plain(const Matrix& w, int r, const real* x) {
    const Format& f = format_of(w.dtype);
    const std::byte* p = w.row(r);
    float lane[BLOCK_LANES] = {};
    Block block;
    int8_t qx[256];
    for (int b = 0; b < w.cols / f.values; b++, p += f.bytes, x += f.values) {
        unpack(block, p, w.dtype);
        float dx = quantise_block_plain(qx, x, f.values);
        int32_t sum = 0, minimum = 0;
        for (int i = 0; i < f.values; i++) {
            sum += block.scale[i / GROUP] * block.q[i] * qx[i];
            minimum += block.minimum[i / GROUP] * qx[i];
        }
        float& y = lane[b % BLOCK_LANES];
        y = std::fma(block.d * dx, float(sum), y);
        if (f.minimums) y = std::fma(-(block.m * dx), float(minimum), y);
    }
    return sum_block_lanes(lane);
}

// -- 5.3  exp, sigmoid, silu, softmax ------------------------------------------------------------

// e^x. The C library's expf differs between systems in the last bit. Here: e^x = 2^k e^r, |r| <= ln(2)/2, a
// polynomial in double (error below 1e-12 of the value), rounded once: the same bits everywhere.
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453, TO_INTEGER_F64 = 0x1.8p52;
constexpr std::array EXP_SERIES = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                   1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                   1.0 / 6,        0.5,           1.0,          1.0};

// In double, |x| < 700: what exp_of rounds, and sampling does not.
EVERYWHERE inline double exp_wide(double x) {
    constexpr auto SERIES = EXP_SERIES;                  // a kernel can read no array of the host
    double k = std::fma(x, LOG2_E, TO_INTEGER_F64) - TO_INTEGER_F64, r = std::fma(k, -LN_2, x);
    double p = SERIES[0];
    for (size_t i = 1; i < SERIES.size(); i++) p = std::fma(p, r, SERIES[i]);
    return p * std::bit_cast<double>(uint64_t(int64_t(k) + 1023) << 52);
}
EVERYWHERE inline float exp_of(float x) {
    if (!(x > -104.0f)) return std::isnan(x) ? x : 0.0f;
    if (x > 88.8f) return std::numeric_limits<float>::infinity();
    return float(exp_wide(double(x)));
}
EVERYWHERE inline double exp_of(double x) { return std::exp(x); }   // the yardstick: the most exact

EVERYWHERE inline real sigmoid(real z) { return 1 / (1 + exp_of(-z)); }

//   silu(z) = z sigmoid(z);   gate[i] = silu(gate[i]) * up[i], both (n)
inline void silu_times_plain(real* gate, const real* up, int n) {
    for (int i = 0; i < n; i++) gate[i] = gate[i] / (1 + exp_of(-gate[i])) * up[i];
}

//   z = e^(scale z - top) / sum, top the largest scale z
// In place over n numbers, -inf allowed; scale > 0. The sum has 16 lanes, like a dot.
inline void softmax_plain(real* z, real scale, int n) {
    real top = -std::numeric_limits<real>::infinity(), lane[LANES] = {};
    for (int i = 0; i < n; i++) z[i] *= scale, top = z[i] > top ? z[i] : top;
    for (int i = 0; i < n; i++) z[i] = exp_of(z[i] - top), lane[i % LANES] += z[i];
    real sum = sum_lanes(lane);
    for (int i = 0; i < n; i++) z[i] /= sum;
}

// -- 5.4  the table of kernels -------------------------------------------------------------------
//
// What takes the time, in the plain form or in the fastest that this processor has (simd.h), with the same
// bits. Chosen once, at start.

// out[t] (v.cols) += sum_j p[t][j] v[j] over the first n rows of V: each output is one chain of fma, in the
// order of j.
inline void weigh_plain(Rows out, ConstRows p, const Matrix& v, int T, int n) {
    Vector row(size_t(v.cols));
    for (int j = 0; j < n; j++) {
        widen_plain(row.data(), v, j);
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < v.cols; i++) out[t][i] = std::fma(p[t][j], row[size_t(i)], out[t][i]);
        }
    }
}

// out[t] = W x[t]   out: (T, w.rows)   x: (T, w.cols)
struct Product {
    Rows out;
    ConstRows x;
    const Matrix* w;
    int T;
};

// One key head and the queries that look at it (chapter 7). A token's queries lie side by side; token t sees
// the first n[t] positions.   q: (T, heads, dk)   out: (T, heads, dv)   k: (context, dk)   v: (context, dv)
struct Attention {
    Rows out;
    ConstRows q;
    int heads;
    Matrix k, v;
    real scale;
    std::span<const int> n;              // (T), not descending
    Rows lse = {nullptr, 0};             // (T, heads): ln of the sum of e^score; or not asked for

    real* lse_of(int64_t t, int64_t h) const { return lse.data ? lse[t] + h : nullptr; }
};

struct Kernels {
    const char* name = "plain";
    bool integers = sizeof(real) == 4;   // quantised weights: in small integers; false: dequantised (--exact)
    void (*weigh)(Rows out, ConstRows p, const Matrix& v, int T, int n) = weigh_plain;
    void (*widen)(real* out, const Matrix& w, int r) = widen_plain;
    real (*dot_real)(const real* a, const real* b, int n) = dot_real_plain;
    void (*softmax)(real* z, real scale, int n) = softmax_plain;
    void (*silu_times)(real* gate, const real* up, int n) = silu_times_plain;
    // None: the plain form, 5.5 and 7.1.
    void (*matmul)(std::span<const Product> products) = nullptr;
    void (*attend)(std::span<const Attention> heads, Rows scratch) = nullptr;
    // Copies W to `to`, in the order that is fastest if each token needs all of it, and lets it point there.
    void (*rearrange)(Matrix& w, std::byte* to) = nullptr;
    bool (*rearranges)(const Matrix& w) = nullptr;
    const struct SimdTarget* target = nullptr;   // what simd.h made these of
    Arith arith = Arith::F32;                    // --arith, and how it rounds results (chapter 14)
    void (*round)(real* x, int64_t n) = nullptr;
};
inline Kernels kernels;

// Operations that are not in the table end with this: results stay as they are, unless --arith asks for fewer
// bits.
inline void rounded(real* x, int64_t n) { if (kernels.round) kernels.round(x, n); }

// -- 5.5  matmul: y = W x for T tokens -----------------------------------------------------------

// Where a table stands between the stored bits and the integers, weights are always dequantised.
inline bool in_integers(const Matrix& w) {
    return kernels.integers && quantised(w.dtype) && !looked_up(w.dtype);
}

// W[r] . x in the arithmetic that was asked for
inline real times_row(const Matrix& w, int r, const real* x) {
    return in_integers(w) ? int_dot_plain(w, r, x) : dot_row_plain(w, r, x);
}

inline void matmul_plain(const Product& p) {
    const Matrix& w = *p.w;
    parallel_for(w.rows, [&](int64_t r) {
        for (int t = 0; t < p.T; t++) p.out[t][r] = times_row(w, int(r), p.x[t]);
    }, int64_t(w.cols) * p.T);
}

// Several products, which may then share threads and inputs. W may have its rows in pairs (2.2).
inline void matmul(std::span<const Product> products) {
    for (const Product& p : products) CHECK(!p.w->transposed, "%d x %d", p.w->rows, p.w->cols);
    if (kernels.matmul) kernels.matmul(products);
    else std::for_each(products.begin(), products.end(), matmul_plain);
    for (const Product& p : products)
        if (p.w->pairs)
            parallel_for(p.T, [&](int64_t t) { undo_pairs(p.out[t], p.w->rows, p.w->pairs); }, p.w->rows);
}

inline void matmul_stored(Rows out, ConstRows x, const Matrix& w, int T) {
    Product p{out, x, &w, T};
    matmul({&p, 1});
}
// W^T x[t], on the calling thread: the sum runs over the rows of W.
inline void weigh_stored(Rows out, ConstRows x, const Matrix& w, int T) {
    for (int t = 0; t < T; t++) std::fill_n(out[t], w.cols, real(0));
    kernels.weigh(out, x, w, T, w.rows);
    for (int t = 0; t < T; t++) rounded(out[t], w.cols);
}

// out[t] (w.rows) = W x[t] and out[t] (w.cols) = W^T x[t], whichever of W and W^T is stored. The order of the
// sums is that of what is stored.
inline void matmul(Rows out, ConstRows x, const Matrix& w, int T) {
    (w.transposed ? weigh_stored : matmul_stored)(out, x, w.stored(), T);
}
inline void matmul_transposed(Rows out, ConstRows x, const Matrix& w, int T) {
    (w.transposed ? matmul_stored : weigh_stored)(out, x, w.stored(), T);
}

// out[t] += bias for T rows   bias: (n) or none
inline void add_bias(real* out, std::span<const real> bias, int T) {
    for (size_t i = 0; i < bias.size() * size_t(T); i++) out[i] += bias[i % bias.size()];
    rounded(out, int64_t(bias.size()) * T);
}

// out += x, both (n)
inline void add(real* out, const real* x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] += x[i];
    rounded(out, int64_t(n));
}

// -- 5.6  embed, softmax, rmsnorm ----------------------------------------------------------------

// out[t] = row ids[t] of W   out: (T, w.cols)
inline void embed(Rows out, const Matrix& w, std::span<const int> ids) {
    for (size_t t = 0; t < ids.size(); t++) {
        kernels.widen(out[int64_t(t)], w, ids[t]);
        rounded(out[int64_t(t)], w.cols);
    }
}

// z[t] = softmax(scale z[t]) in place, over T rows of n numbers, as 5.3 defines it.   scale > 0
inline void softmax(Rows z, real scale, int T, int n) {
    parallel_for(T, [&](int64_t t) { kernels.softmax(z[t], scale, n); }, 16 * int64_t(n));
}

//   y = w * x / sqrt(mean(x^2) + eps)      Zhang, Sennrich 2019
// out, x: (T, n), `x` may be `out`; w: (n)
inline void rmsnorm(Rows out, ConstRows x, std::span<const real> w, int64_t T, double eps) {
    int n = int(w.size());
    parallel_for(T, [&](int64_t t) {
        real scale = 1 / std::sqrt(kernels.dot_real(x[t], x[t], n) / real(n) + real(eps));
        for (int i = 0; i < n; i++) out[t][i] = x[t][i] * scale * w[size_t(i)];
        rounded(out[t], n);
    }, n);
}

// -- 5.7  top_k: the one place that decides ties -------------------------------------------------

// idx: those k of 0 .. n - 1 that come before the others, in order. A heap holds the best so far, the last of
// them on top: n log k comparisons.   0 <= k <= n
template <class Before> void first_of_all(int* idx, int n, int k, const Before& before) {
    std::iota(idx, idx + k, 0);
    std::make_heap(idx, idx + k, before);
    for (int i = k; k > 0 && i < n; i++) {
        if (!before(i, idx[0])) continue;
        std::pop_heap(idx, idx + k, before);
        idx[k - 1] = i;
        std::push_heap(idx, idx + k, before);
    }
    std::sort_heap(idx, idx + k, before);
}

// idx: the k indices of the largest v, in descending order of v; of equal values the lower index comes first.
// v: (n), no NaN, which is neither larger nor smaller than any number
inline void top_k(int* idx, const real* v, int n, int k) {
    first_of_all(idx, n, k, [v](int a, int b) { return v[a] > v[b] || (v[a] == v[b] && a < b); });
}

// =================================================================================================
// Chapter 6. Positions
// =================================================================================================
//
// How does attention know the order of the tokens? RoPE (Su et al. 2021) turns pairs of numbers of each query
// and key by an angle that grows with the position, so that their dot product depends on the distance:
//
//      angle_i(pos) = pos * theta^(-2i / d)         pair i of d / 2
//
// Which two numbers form a pair is a convention of the checkpoint, and the most common mistake of ports:
//
//      interleaved   (x0 x1) (x2 x3) (x4 x5) ...    DeepSeek's MLA
//      half          (x0 x_d/2) (x1 x_d/2+1) ...    Qwen, Llama
//
// A model trained on 4,096 tokens can read 163,840 after its slow pairs were slowed down further. YaRN
// (Peng et al. 2023) divides the frequencies of pairs that turn less than `beta_slow` times over the
// original context by `factor`, keeps those that turn more than `beta_fast` times, and blends in between.
// It also sharpens the softmax: DeepSeek multiplies the attention scores by mscale(mscale_all_dim)^2, at
// every length. Leaving it out is invisible at position 0 and wrong by a factor of 1.59 (V2-Lite) or 1.87
// (V3) after it. The newest distill, R1-0528-Qwen3-8B, scales by YaRN too, as the paper has it: cos and sin
// are multiplied by 0.1 ln(factor) + 1, the scores are not.

// -- 6.1  frequencies ----------------------------------------------------------------------------

struct Rope {
    std::vector<double> frequency;   // (dim / 2), radians a token
    double magnitude = 1;            // multiplies cos and sin
    double score_scale = 1;          // multiplies the attention scores
};

//   YaRN: mscale(m) = 0.1 m ln(factor) + 1
inline double yarn_mscale(double factor, double m) {
    return factor <= 1 ? 1 : 0.1 * m * std::log(factor) + 1;
}

// The pair (a real number) that turns `turns` times over the original context.
inline double yarn_pair(const RopeConfig& c, int dim, double turns) {
    constexpr double PI = 3.14159265358979323846;
    return dim * std::log(c.original_context / (turns * 2 * PI)) / (2 * std::log(c.theta));
}

inline void scale_yarn(Rope& rope, const RopeConfig& c, int dim) {
    double low = yarn_pair(c, dim, c.beta_fast), high = yarn_pair(c, dim, c.beta_slow);
    if (c.truncate) low = std::floor(low), high = std::ceil(high);
    low = std::max(low, 0.0), high = std::min(high, dim - 1.0);
    if (low == high) high += 0.001;
    for (int i = 0; i < dim / 2; i++) {
        double& f = rope.frequency[size_t(i)];
        double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
        f = f / c.factor * ramp + f * (1 - ramp);
    }
    double all = yarn_mscale(c.factor, c.mscale_all_dim);
    rope.magnitude = c.attention_factor > 0 ? c.attention_factor : yarn_mscale(c.factor, c.mscale) / all;
    rope.score_scale = all * all;
}

// Llama 3.1: like YaRN by wavelength, without a change of the scores.
inline void scale_llama3(Rope& rope, const RopeConfig& c) {
    constexpr double TWO_PI = 6.28318530717958647692;
    for (double& f : rope.frequency) {
        double turns = c.original_context * f / TWO_PI;   // over the original context
        double t =
            std::clamp((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0.0, 1.0);
        f = (1 - t) * f / c.factor + t * f;
    }
}

// Frequencies in double, for rope_dim numbers of a head.   Check values: tests/unit/ch06_positions.cpp
inline Rope make_rope(const RopeConfig& c, int dim) {
    Rope rope;
    for (int i = 0; i < dim / 2; i++) rope.frequency.push_back(std::pow(c.theta, -2.0 * i / dim));
    if (c.scaling == Scaling::YARN) scale_yarn(rope, c, dim);
    if (c.scaling == Scaling::LLAMA3) scale_llama3(rope, c);
    return rope;
}

// cos, sin of all pairs at T positions, in double, rounded once.   cos_sin: (T, dim / 2, 2)
inline void rope_table(real* cos_sin, const Rope& rope, int T, int pos) {
    size_t pairs = rope.frequency.size();
    for (size_t i = 0; i < size_t(T) * pairs; i++) {
        double angle = double(size_t(pos) + i / pairs) * rope.frequency[i % pairs];
        cos_sin[2 * i] = real(std::cos(angle) * rope.magnitude);
        cos_sin[2 * i + 1] = real(std::sin(angle) * rope.magnitude);
    }
}

// -- 6.2  rope_interleaved, rope_half: rotate the heads of T tokens in place ---------------------

// H vectors of each of T tokens, `token` numbers from token to token and `head` from head to head.
struct Heads {
    real* data;
    int64_t token, head;
    int T, H;
    EVERYWHERE real* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

EVERYWHERE inline void rotate(real& a, real& b, const real* cos_sin) {
    real x = a, y = b;
    a = x * cos_sin[0] - y * cos_sin[1];
    b = x * cos_sin[1] + y * cos_sin[0];
}

// The first `dim` numbers of each vector; a token's heads turn alike.   cos_sin: (T, dim / 2, 2)
inline void rope_interleaved(const Heads& x, const real* cos_sin, int dim) {
    parallel_for(x.T, [&](int64_t t) {
        for (int h = 0; h < x.H; h++) {
            real* v = x.at(t, h);
            for (int i = 0; i < dim / 2; i++) rotate(v[2 * i], v[2 * i + 1], cos_sin + t * dim + 2 * i);
            rounded(v, dim);
        }
    }, int64_t(x.H) * dim);
}

inline void rope_half(const Heads& x, const real* cos_sin, int dim) {
    parallel_for(x.T, [&](int64_t t) {
        for (int h = 0; h < x.H; h++) {
            real* v = x.at(t, h);
            for (int i = 0; i < dim / 2; i++) rotate(v[i], v[i + dim / 2], cos_sin + t * dim + 2 * i);
            rounded(v, dim);
        }
    }, int64_t(x.H) * dim);
}

// =================================================================================================
// Chapter 7. Attention I: GQA
// =================================================================================================
//
// How does a token look back? It compares its query with the key of each earlier token and takes the mean of
// their values, weighted by the softmax of the comparisons:
//
//      o_t = sum_j softmax_j(q_t . k_j / sqrt(d)) v_j       j <= t
//
//               k0  k1  k2  k3        A token must not see those after it, for it learned to predict them:
//          q0    x                    the causal mask. Here it is no matrix of -inf that is added to the
//          q1    x   x                scores, but the end of a loop: token t sees the first n[t] positions.
//          q2    x   x   x
//          q3    x   x   x   x        n = 1 2 3 4
//
// The keys and values of the past do not change, so they are kept: the KV cache. It, not the arithmetic,
// limits long contexts. With H heads of width d it holds 2 H d numbers a token and layer. Grouped-query
// attention, as in the distills, lets H / G query heads share a key head: 2 G d numbers
// (R1-Distill-Qwen-1.5B: 512 for 12 heads of 128). Chapter 8 is DeepSeek's answer to the same question.

// -- 7.1  attend: causal attention as two loops --------------------------------------------------

// softmax(z, scale, n) and, where that is asked for, ln of the sum of e^(scale z), with which kernels put
// parts of a context together. The largest keeps the share e^0 / sum of e^(scale z - top) of it.
inline void softmax_and_lse(void (*softmax)(real*, real, int), real* z, real scale, int n, real* lse) {
    if (!lse) return softmax(z, scale, n);
    const int best = int(std::max_element(z, z + n) - z);
    const real top = n ? z[best] * scale : std::numeric_limits<real>::infinity();
    softmax(z, scale, n);
    *lse = n ? real(double(top) - std::log(double(z[best]))) : top;
}

inline void attend_plain(const Attention& a, Rows scratch) {
    int64_t dk = a.k.cols, dv = a.v.cols, T = int64_t(a.n.size());
    if (T == 0) return;
    parallel_for(T * a.heads, [&](int64_t i) {
        int64_t t = i / a.heads, h = i % a.heads;
        const int n = a.n[size_t(t)];                  // causal: later keys are masked by not being visited
        const real* q = a.q[t] + h * dk;
        real *out = a.out[t] + h * dv, *p = scratch[thread_index()];
        for (int j = 0; j < n; j++) p[j] = times_row(a.k, j, q);
        softmax_and_lse(softmax_plain, p, a.scale, n, a.lse_of(t, h));
        std::fill_n(out, dv, real(0));
        weigh_plain({out, 0}, {p, 0}, a.v, 1, n);      // out += p[j] v[j]
    }, a.n.back() * (dk + dv));
}

// Of one query's scores to the next's: an odd number of 64 bytes, so that a column's scores do not all fall
// into one set of a cache.
inline int64_t score_stride(int context) { return (int64_t(context + LANES - 1) / LANES | 1) * LANES; }

constexpr int QUERY_TILE = 48;             // queries that a thread of a fast form attends with at once

// Numbers of scratch that each thread needs.
inline int64_t attention_scratch(int context, int dk, int dv) {
    return QUERY_TILE * (score_stride(context) + dk + dv);
}

// out = softmax(scale q K^T, causal) V for each of the key heads.   scratch: (threads, attention_scratch)
inline void attend(std::span<const Attention> heads, Rows scratch) {
    if (kernels.attend) return kernels.attend(heads, scratch);
    for (const Attention& a : heads) attend_plain(a, scratch);
}

// -- 7.2  the cache: keys and values of the past -------------------------------------------------

// 32 numbers to the nearest multiples of the largest / 127; to NaN if one of them is not finite.
EVERYWHERE inline void quantise_q8_0(std::byte* out, const real* x) {
    constexpr float INF = std::numeric_limits<float>::infinity();
    float top = 0;
    for (int i = 0; i < 32; i++) top = std::isfinite(x[i]) ? std::max(top, std::fabs(float(x[i]))) : INF;
    uint16_t d = float_to_f16(top / 127);
    float inverse = f16_to_float(d) > 0 ? 1 / f16_to_float(d) : 0;
    std::memcpy(out, &d, 2);
    for (int i = 0; i < 32; i++) {
        float q = inverse > 0 ? std::clamp(std::nearbyint(float(x[i]) * inverse), -127.0f, 127.0f) : 0;
        out[2 + i] = std::byte(int8_t(q));
    }
}

// Writes n numbers as a row of REAL, BF16 or Q8_0.
inline void store_row(std::byte* out, const real* x, int n, Dtype dtype) {
    if (dtype == REAL) std::memcpy(out, x, size_t(n) * sizeof(real));
    for (int i = 0; dtype == Dtype::BF16 && i < n; i++) {
        uint16_t h = float_to_bf16(float(x[i]));
        std::memcpy(out + 2 * size_t(i), &h, 2);
    }
    for (int i = 0; dtype == Dtype::Q8_0 && i < n; i += 32) quantise_q8_0(out + i / 32 * 34, x + i);
}

// A layer has a matrix (context, width) for each kv head's keys and one for its values (GQA: k_0, v_0, k_1,
// v_1, ...), or one for all heads, [c_kv | k_rope] (MLA). They may be stored in fewer bits than they are
// computed with.
struct Cache {
    Dtype dtype;
    int context, parts, width;
    std::shared_ptr<std::byte> memory;     // `bytes`, zeroed

    static size_t bytes(int layers, int context, int parts, int width, Dtype dtype) {
        return size_t(layers) * size_t(context) * size_t(parts) * row_bytes(dtype, width);
    }
    Matrix matrix(int l, int part) const {
        size_t i = size_t(l) * size_t(parts) + size_t(part);
        const std::byte* data = memory.get() + i * size_t(context) * row_bytes(dtype, width);
        return {data, nullptr, dtype, context, width, 0, 0};
    }
};

// Token t's numbers become row n[t] - 1 of a cache's matrix: the last position that it sees is its own.
// n: (T)   x: (T, cache.cols)
inline void store(const Matrix& cache, std::span<const int> n, ConstRows x) {
    parallel_for(int64_t(n.size()), [&](int64_t t) {
        // A Matrix is read everywhere but here, and what is a cache's is memory of the program's own.
        std::byte* row = const_cast<std::byte*>(cache.row(n[size_t(t)] - 1));
        store_row(row, x[t], cache.cols, cache.dtype);
    }, cache.cols);
}

// -- 7.3  gqa: what the distills have ------------------------------------------------------------

struct Gqa {
    Matrix wq, wk, wv, wo;                 // (H * d, D), (G * d, D), (G * d, D), (D, H * d)
    std::span<const real> bq, bk, bv;      // Qwen2 only
    std::span<const real> q_norm = {}, k_norm = {};   // (d), of each head before it is turned; Qwen3 only
};

// out (T, H, d) = attention of q (T, H, d) over layer l of the cache; query heads h H / G and on share a key
// head.   n: (T)   lse: (T, H), or none
inline void gqa_attend(real* out, const real* q, const Cache& cache, int l, int H, std::span<const int> n,
                       Rows scratch, real* lse) {
    int G = cache.parts / 2, d = cache.width, group = H / G;
    std::vector<Attention> heads;
    for (int g = 0; g < G; g++) {
        int64_t at = int64_t(g) * group * d, stride = int64_t(H) * d;
        heads.push_back({{out + at, stride}, {q + at, stride}, group, cache.matrix(l, 2 * g),
                         cache.matrix(l, 2 * g + 1), 1 / std::sqrt(real(d)), n,
                         {lse ? lse + g * group : nullptr, H}});
    }
    attend(heads, scratch);
}

// =================================================================================================
// Chapter 8. Attention II: MLA
// =================================================================================================
//
// Can many heads share a cache without sharing their keys? Multi-head latent attention stores, for each
// token, one small latent vector c_kv from which every head rebuilds its own key and value:
//
//      k_h = W^UK_h c_kv      v_h = W^UV_h c_kv         c_kv: 512 numbers for 128 heads (V3)
//
// A rotation by position cannot be rebuilt that way (it would stand between W^UK and c_kv), so a second,
// small key k_rope of 64 numbers, one for all heads, carries the position. The cache holds 512 + 64 = 576
// numbers a token and layer; full keys and values would be 128 * (192 + 128) = 40,960.
//
// Queries are compressed too (V3: c_q of 1,536 numbers, from which all 128 * 192 are made), though no cache
// holds them: in training it saves activations and parameters (7,168 * 1,536 + 1,536 * 24,576 = 49 M weights
// instead of 176 M). V2-Lite does without.
//
// The naive form does what the equations say: expand the cache to keys and values, attend. The absorbed
// form never expands, because matrix products associate:
//
//      q . k      = q_nope^T (W^UK c) + q_rope . k_rope  =  (W^UK^T q_nope) . c + q_rope . k_rope
//      sum p_j v_j = sum p_j (W^UV c_j)                  =  W^UV (sum p_j c_j)
//
// With q_absorbed = W^UK^T q_nope (512 numbers), all heads attend directly over the cache rows [c |
// k_rope], as one key head of width 576 whose first 512 numbers are also the value: chapter 7 with G = 1.
// Absorption changes where the work is done, not what is computed. So the scale is still that of 192 numbers,
// times what chapter 6 asks for where YaRN stretched the context: mscale^2 / sqrt(192), V3: 1.87 / 13.86.
//
//      multiplications of one head                   naive           V3         absorbed          V3
//      a pair (query, key):  score                   Dn + Dr         192        Rkv + Dr          576
//                            value                   Dv              128        Rkv               512
//      a position seen                               (Dn + Dv) Rkv   131,072    -
//      a query                                       -                          (Dn + Dv) Rkv     131,072
//
// For T queries over n positions: 320 T n + 131,072 n against 1,088 T n + 131,072 T. Which is cheaper? One
// decoded token over a long past: absorbed, by two orders. A prompt from its start (T = n): naive, 3.4 times
// on the pairs. A chunk of a long prompt: they meet at T = 131,072 / 768 = 171. But expanded keys and values
// take 71 times the memory of the cache, which the absorbed form reads as it is: here it is the default for
// both, and the naive one stands as the definition (`--mla naive`).

// -- 8.1  the two forms --------------------------------------------------------------------------

struct Mla {
    Matrix wq;                             // (H * (Dn + Dr), D), where queries are not compressed
    Matrix wq_a, wq_b;                     // (Rq, D), (H * (Dn + Dr), Rq)
    Matrix wkv_a;                          // (Rkv + Dr, D)
    std::vector<Matrix> wk_b, wv_b;        // H of W^UK (Dn, Rkv), of W^UV (Dv, Rkv)
    Matrix wo;                             // (D, H * Dv)
    std::span<const real> q_norm, kv_norm; // (Rq), (Rkv)
};

// What both forms are asked: T tokens of H heads.
struct LatentAttention {
    real* out;                             // (T, H, Dv)
    const real* q;                         // (T, H, Dn + Dr): [q_nope | q_rope]
    Matrix cache;                          // (context, Rkv + Dr): [c_kv | k_rope]
    std::span<const Matrix> wk_b, wv_b;    // (H)
    std::span<const int> n;                // (T): positions that token t sees, its own the last
    int Dr;
    real scale;                            // score_scale / sqrt(Dn + Dr)
    real *q_absorbed, *z;                  // absorbed: (T, H, Rkv + Dr), (T, H, Rkv)
    Rows expanded;                         // naive: (threads, context * latent_expansion)
    Rows scratch;                          // (threads, attention_scratch)
    real* lse = nullptr;                   // (T, H), or not asked for

    Rows lse_from(int64_t h) const { return {lse ? lse + h : nullptr, int64_t(wk_b.size())}; }
};

// Numbers that the naive form makes of a position, for one head: its row of the cache, [k_nope | k_rope | v].
inline int latent_expansion(int Rkv, int Dn, int Dr, int Dv) { return Rkv + Dr + Dn + Dr + Dv; }

// Each head expands keys and values for all positions; quadratic work a decoded token, kept as the
// definition.                                                                              V2 eq. 9-11, 17-18
inline void mla_naive(const LatentAttention& a) {
    int H = int(a.wk_b.size()), Dn = a.wk_b[0].rows, Rkv = a.wk_b[0].cols, Dv = a.wv_b[0].rows;
    int latent = Rkv + a.Dr, dk = Dn + a.Dr, width = dk + Dv, n = a.n.empty() ? 0 : a.n.back();
    parallel_for(H, [&](int64_t h) {
        real* memory = a.expanded[thread_index()];
        Rows c{memory, latent}, k{memory + int64_t(n) * latent, width}, v{k[0] + dk, width};
        for (int j = 0; j < n; j++) kernels.widen(c[j], a.cache, j);
        matmul(k, c, a.wk_b[size_t(h)], n);                                             // W^UK c
        for (int j = 0; j < n; j++) std::copy_n(c[j] + Rkv, a.Dr, k[j] + Dn);
        matmul(v, c, a.wv_b[size_t(h)], n);                                             // W^UV c
        Attention head{{a.out + h * Dv, int64_t(H) * Dv}, {a.q + h * dk, int64_t(H) * dk}, 1,
                       real_matrix(k[0], n, dk), real_matrix(v[0], n, Dv), a.scale, a.n, a.lse_from(h)};
        head.k.stride = head.v.stride = size_t(width) * sizeof(real);
        attend({&head, 1}, a.scratch);
    });
}

// As mla_naive, without expanding the cache.                                              V2's appendix C
inline void mla_absorbed(const LatentAttention& a) {
    int H = int(a.wk_b.size()), Dn = a.wk_b[0].rows, Rkv = a.wk_b[0].cols, Dv = a.wv_b[0].rows;
    int T = int(a.n.size()), dk = Dn + a.Dr, latent = Rkv + a.Dr;
    int64_t cost = int64_t(T) * Dn * Rkv;
    parallel_for(H, [&](int64_t h) {
        Rows absorbed{a.q_absorbed + h * latent, int64_t(H) * latent};
        ConstRows q{a.q + h * dk, int64_t(H) * dk};
        matmul_transposed(absorbed, q, a.wk_b[size_t(h)], T);                           // W^UK^T q_nope
        for (int t = 0; t < T; t++) std::copy_n(q[t] + Dn, a.Dr, absorbed[t] + Rkv);
    }, cost);
    Attention all{{a.z, int64_t(H) * Rkv}, {a.q_absorbed, int64_t(H) * latent}, H, a.cache, a.cache, a.scale,
                  a.n, a.lse_from(0)};
    all.v.cols = Rkv, all.v.stride = row_bytes(a.cache.dtype, latent);                  // the value: c alone
    attend({&all, 1}, a.scratch);
    parallel_for(H, [&](int64_t h) {                                                    // W^UV z
        matmul({a.out + h * Dv, int64_t(H) * Dv}, {a.z + h * Rkv, int64_t(H) * Rkv}, a.wv_b[size_t(h)], T);
    }, int64_t(T) * Dv * Rkv);
}

// -- 8.2  a cache in pages -----------------------------------------------------------------------
//
// A server's conversations begin and end at any time. So that their caches need no room for what may never be
// said, all rows lie in one pool of pages of 64, and a table says which pages are whose, in order.

constexpr int PAGE = 64;

// B conversations with a new token each. What lies behind a conversation's last position is not looked at,
// neither in its last page nor in its row of the table.
struct PagedAttention {
    real *out, *lse;                       // (B, H, dv); (B, H): ln of the sum of e^score
    const real* q;                         // (B, H, width): [q_absorbed | q_rope]
    Matrix pool;                           // (pages * PAGE, width): [c_kv | k_rope]
    const int* table;                      // (B, table_width): numbers of pages
    int table_width;
    std::span<const int> n;                // (B): positions, its own the last; 0: out = 0, lse = infinity
    int H, dv;
    real scale;
};

// scratch: (threads, table_width * PAGE + pool.cols)         FlashMLA flash_mla_with_kvcache, one token each
inline void mla_paged(const PagedAttention& a, Rows scratch) {
    const int width = a.pool.cols;
    auto row = [&](int64_t b, int j) { return a.table[b * a.table_width + j / PAGE] * PAGE + j % PAGE; };
    parallel_for(int64_t(a.n.size()) * a.H, [&](int64_t i) {
        const int64_t b = i / a.H;
        const int n = a.n[size_t(b)];
        real *out = a.out + i * a.dv, *p = scratch[thread_index()], *c = p + a.table_width * PAGE;
        for (int j = 0; j < n; j++) {
            widen_plain(c, a.pool, row(b, j));
            p[j] = dot_real_plain(c, a.q + i * width, width);
        }
        softmax_and_lse(softmax_plain, p, a.scale, n, a.lse + i);
        std::fill_n(out, a.dv, real(0));
        for (int j = 0; j < n; j++) {
            widen_plain(c, a.pool, row(b, j));
            weigh_plain({out, 0}, {p + j, 0}, real_matrix(c, 1, a.dv), 1, 1);
        }
    }, int64_t(a.table_width) * PAGE * width);
}

constexpr double LATENT_EPS = 1e-6;   // q_a_layernorm, kv_a_layernorm: their own eps, not the config's

// =================================================================================================
// Chapter 9. Feed-forward
// =================================================================================================
//
// What does a layer do with what attention gathered? Each token alone goes through
//
//      y = W_down (silu(W_gate u) * (W_up u))          SwiGLU, Shazeer 2020
//
// The first layers of V2 and V3 and all layers of the distills have one such network of great width. An
// expert (chapter 10) is the same network, narrow.

// -- 9.1  swiglu ---------------------------------------------------------------------------------

struct Mlp {
    Matrix w_gate, w_up, w_down;           // (F, D), (F, D), (D, F)
};

// gate[t] = silu(gate[t]) * up[t] for T rows of `width` numbers
inline void silu_times(real* gate, const real* up, int width, int T) {
    auto row = [&](int64_t t) { kernels.silu_times(gate + t * width, up + t * width, width); };
    parallel_for(T, row, 16 * width);
}

// out (T, D) from x (T, D)   gate, up: (T, F), scratch
inline void swiglu(real* out, const real* x, const Mlp& w, int T, real* gate, real* up) {
    int F = w.w_gate.rows, D = w.w_gate.cols;
    Product products[] = {{{gate, F}, {x, D}, &w.w_gate, T}, {{up, F}, {x, D}, &w.w_up, T}};
    matmul(products);
    silu_times(gate, up, F, T);
    matmul({out, D}, {gate, F}, w.w_down, T);
}

// =================================================================================================
// Chapter 10. Mixture of experts
// =================================================================================================
//
// How can a model know 671 billion numbers and use 37 billion for a token? Most of V3's layers have 256
// narrow feed-forward networks, the experts, and a gate that sends each token to 8 of them. One more, the
// shared expert, sees every token.
//
//      router_logits = W_gate u                    one number an expert
//      s = softmax or sigmoid of them              affinity
//      pick                                        a gate: which K experts
//      y = sum over pick of g_e FFN_e(u)  +  FFN_shared(u)
//
// The three gates differ in how they pick. V2-Lite takes the K best. V2 and V3 first take the best groups
// of experts, since a group lives on one machine and a token should not travel to all of them. V3 adds a
// bias b_e to each affinity before picking. Training nudges b_e up when expert e gets too little work and
// down when it gets too much (no loss term pulls at the weights: "auxiliary-loss-free"). The bias steers
// who is picked and never enters the mixture. An example with K = 1:
//
//      s = 0.90 0.30    b = -0.70 0    s + b = 0.20 0.30    pick: expert 1, with g from s = 0.30

// -- 10.1  gates: which experts see this token ---------------------------------------------------

enum class Affinity : uint8_t { SOFTMAX, SIGMOID };

// What a gate is told besides the scores.
struct GateShape {
    int E, K, n_group, topk_group;
    Affinity affinity;
    bool normalise, scale_normalised;     // divide by the sum of the picked; and then scale all the same
    double scale;
};

// The routing of T tokens.
struct Routing {
    int T;
    const real* logits;           // (T, E)
    real *affinity, *choice;      // (T, E): s; the score by which experts are picked
    int* idx;                     // (T, K), a token's in descending order of choice
    real* weight;                 // (T, K), in the order of idx
    real* group_score;            // (T, n_group), where groups are picked first

    Routing token(int64_t t, const GateShape& g) const {
        return {1,           logits + t * g.E,   affinity + t * g.E,       choice + t * g.E,
                idx + t * g.K, weight + t * g.K, group_score + t * g.n_group};
    }
};

// Calls gate(r) with each token's own routing.
template <class Body> void each_token(const Routing& all, const GateShape& g, const Body& gate) {
    parallel_for(all.T, [&](int64_t t) { gate(all.token(t, g)); }, 32 * int64_t(g.E));
}

inline void affinities(const Routing& r, const GateShape& g) {
    std::copy_n(r.logits, g.E, r.affinity);
    if (g.affinity == Affinity::SOFTMAX) return softmax({r.affinity, g.E}, 1, 1, g.E);
    for (int e = 0; e < g.E; e++) r.affinity[e] = sigmoid(r.logits[e]);
}

// Sets the choice of all experts outside the `topk_group` groups with the best scores to -inf. (0 would
// not do: with negative biases it can beat an expert of a kept group.)
inline void keep_best_groups(const Routing& r, const GateShape& g) {
    int size = g.E / g.n_group;
    std::vector<int> best(static_cast<size_t>(g.topk_group));
    top_k(best.data(), r.group_score, g.n_group, g.topk_group);
    for (int i = 0; i < g.n_group; i++) {
        if (std::find(best.begin(), best.end(), i) != best.end()) continue;
        std::fill_n(r.choice + i * size, size, -std::numeric_limits<real>::infinity());
    }
}

//   g_e = s_e / (sum over pick of s + 1e-20) * scale                     V3 eq. 13: from s, not from s + b
inline void mixture_weights(const Routing& r, const GateShape& g) {
    bool normalise = g.normalise && g.K > 1;
    real sum = 0, scale = normalise && !g.scale_normalised ? real(1) : real(g.scale);
    for (int k = 0; k < g.K; k++) sum += r.affinity[r.idx[k]];
    for (int k = 0; k < g.K; k++) {
        real s = r.affinity[r.idx[k]];
        r.weight[k] = (normalise ? s / (sum + real(1e-20)) : s) * scale;
    }
}

inline void pick(const Routing& r, const GateShape& g) {
    top_k(r.idx, r.choice, g.E, g.K);
    mixture_weights(r, g);
}

//   pick = top-K of s                                                    V2-Lite
inline void gate_greedy(const Routing& all, const GateShape& g) {
    each_token(all, g, [&](const Routing& r) {
        affinities(r, g);
        std::copy_n(r.affinity, g.E, r.choice);
        pick(r, g);
    });
}

//   group score = max of s in the group; pick = top-K of s in the best groups               V2 section 2.2.2
inline void gate_group_limited_greedy(const Routing& all, const GateShape& g) {
    each_token(all, g, [&](const Routing& r) {
        affinities(r, g);
        std::copy_n(r.affinity, g.E, r.choice);
        int size = g.E / g.n_group;
        for (int i = 0; i < g.n_group; i++)
            r.group_score[i] = *std::max_element(r.choice + i * size, r.choice + (i + 1) * size);
        keep_best_groups(r, g);
        pick(r, g);
    });
}

//   group score = sum of the two best s + b; pick = top-K of s + b in the best groups      V3 eq. 16, 2.1.2
// bias: (E)
inline void gate_noaux_tc(const Routing& all, const real* bias, const GateShape& g) {
    each_token(all, g, [&](const Routing& r) {
        affinities(r, g);
        for (int e = 0; e < g.E; e++) r.choice[e] = r.affinity[e] + bias[e];
        int size = g.E / g.n_group, best[2];
        for (int i = 0; i < g.n_group; i++) {
            const real* choice = r.choice + i * size;
            top_k(best, choice, size, 2);
            r.group_score[i] = choice[best[0]] + choice[best[1]];
        }
        keep_best_groups(r, g);
        pick(r, g);
    });
}

// -- 10.2  dispatch: sort the (token, expert) pairs by expert ------------------------------------

// Expert e works on slots first[e] .. first[e + 1]. A slot is one pair; an expert's are in the order of their
// tokens.   first: (E + 1)   slot: (T, K), of each pair   slot_token: (T * K), of each slot
// expert_idx: (T, K)
inline void dispatch(int* first, int* slot, int* slot_token, const int* expert_idx, int T, int K, int E) {
    std::fill_n(first, E + 1, 0);
    for (int i = 0; i < T * K; i++) first[expert_idx[i]]++;
    for (int e = 0; e < E; e++) first[e + 1] += first[e];      // where e's slots end, and back from there
    for (int i = T * K - 1; i >= 0; i--) {
        slot[i] = --first[expert_idx[i]];
        slot_token[slot[i]] = i / K;
    }
}

// -- 10.3  experts and combine -------------------------------------------------------------------

struct Moe {
    Matrix gate_w;                         // (E, D)
    std::span<const real> gate_bias;       // (E), noaux_tc only
    std::vector<Mlp> experts;              // E
    Mlp shared;                            // all shared experts in one, of width n_shared * F; or none
};

struct ExpertWork {
    const real* u;                         // (T, D)
    int T, K;
    const int* first;                      // (E + 1)
    const int* slot_token;                 // (T * K)
    real *in, *out;                        // (T * K, D) each, by slot
    real* shared_out;                      // (T, D); may be `in`, which is used up by then
    real *gate, *up;                       // (T * K * F + T * shared width), scratch
};

// Each expert on its slots, all at the same time: its weights are read once for all its tokens. The shared
// one, with all T tokens, is one of them.
inline void run_experts(const ExpertWork& a, const Moe& w) {
    const int slots = a.T * a.K, F = w.experts[0].w_gate.rows, shared = w.shared.w_gate.rows;
    const int64_t D = w.experts[0].w_gate.cols;
    real *shared_gate = a.gate + int64_t(slots) * F, *shared_up = a.up + int64_t(slots) * F;
    std::vector<Product> up, down;
    parallel_for(slots, [&](int64_t i) { std::copy_n(a.u + a.slot_token[i] * D, D, a.in + i * D); }, D);
    for (size_t e = 0; e < w.experts.size(); e++) {
        const int64_t i = a.first[e];
        const int n = a.first[e + 1] - a.first[e];
        if (n == 0) continue;
        ConstRows in{a.T == 1 ? a.u : a.in + i * D, D};
        up.push_back({{a.gate + i * F, F}, in, &w.experts[e].w_gate, n});
        up.push_back({{a.up + i * F, F}, in, &w.experts[e].w_up, n});
        down.push_back({{a.out + i * D, D}, {a.gate + i * F, F}, &w.experts[e].w_down, n});
    }
    if (shared) {
        up.push_back({{shared_gate, shared}, {a.u, D}, &w.shared.w_gate, a.T});
        up.push_back({{shared_up, shared}, {a.u, D}, &w.shared.w_up, a.T});
        down.push_back({{a.shared_out, D}, {shared_gate, shared}, &w.shared.w_down, a.T});
    }
    matmul(up);
    silu_times(a.gate, a.up, F, slots);
    if (shared) silu_times(shared_gate, shared_up, shared, a.T);
    matmul(down);
}

// out[t] = sum over k of weight[t][k] expert_out[slot[t][k]]  +  shared[t]
// The sum runs in the order of a token's own picks, the shared expert last, so company does not change its
// bits.   out, shared (or none): (T, D)   expert_out: (T * K, D)   slot, weight: (T, K)
inline void combine(real* out, const real* expert_out, const int* slot, const real* weight, int K,
                    const real* shared, int T, int D) {
    parallel_for(T, [&](int64_t t) {
        real* sum = out + t * D;
        std::fill_n(sum, D, real(0));
        for (int64_t k = t * K; k < (t + 1) * K; k++) {
            Matrix expert = real_matrix(expert_out + int64_t(slot[k]) * D, 1, D);
            kernels.weigh({sum, 0}, {weight + k, 0}, expert, 1, 1);
        }
        if (shared) add(sum, shared + t * D, size_t(D));
        else rounded(sum, D);
    }, int64_t(K) * D);
}

#include "simd.h"

// =================================================================================================
// Chapter 11. The model
// =================================================================================================
//
// What is a language model? An embedding, L times the same block, and a head:
//
//      x = embed[token]
//      block:   x += attention(rmsnorm(x))     x += feed_forward(rmsnorm(x))
//      logits = head rmsnorm(x)                one number for each token that may come next
//
// Chapters 5 to 10 have the operations; here are the weights, the cache and the arrays that they get.
// `forward` below is the whole of it: every call is a chapter.

// -- 11.1  weights, device, cache and activations ------------------------------------------------

struct Layer {
    std::span<const real> attn_norm, ffn_norm;   // (D)
    Mla mla;                               // one of the two, by Config::mla
    Gqa gqa;
    Mlp mlp;                               // one of the two, by Config::is_moe
    Moe moe;
};
struct Mtp {                               // chapter 13
    std::span<const real> enorm, hnorm, norm;    // (D)
    Matrix proj;                           // (D, 2 D): embedding first
    Layer layer;
};
struct Model {
    Config config;
    Rope rope;
    Checkpoint checkpoint;                 // keeps the mappings alive
    Pages quantised, rearranged;           // weights that were made smaller, or put in another order (19.3)
    std::deque<Vector> vectors;            // norms and biases: what the spans are views of
    std::shared_ptr<std::byte> uploaded;   // weights in the memory of a device that has its own
    Matrix embed, head;                    // (V, D)
    std::span<const real> norm;            // (D)
    std::vector<Layer> layers;
    std::vector<Mtp> mtp;                  // 0 or 1
};

// What a matrix is, where that decides in what order it is stored or in what arithmetic it is multiplied.
enum class Role : uint8_t { EMBED, HEAD, GATE, LATENT, EXPERT, LINEAR };   // LATENT: W^UK, W^UV of a head

// f(matrix, role) for every matrix that a layer may have; those that it has not are empty.
template <class F> void each_matrix(Layer& l, const F& f) {
    auto mlp = [&](Mlp& w, Role role) { f(w.w_gate, role), f(w.w_up, role), f(w.w_down, role); };
    for (Matrix* w : {&l.gqa.wq, &l.gqa.wk, &l.gqa.wv, &l.gqa.wo, &l.mla.wq, &l.mla.wq_a, &l.mla.wq_b,
                      &l.mla.wkv_a, &l.mla.wo})
        f(*w, Role::LINEAR);
    for (std::vector<Matrix>* heads : {&l.mla.wk_b, &l.mla.wv_b})
        for (Matrix& w : *heads) f(w, Role::LATENT);
    f(l.moe.gate_w, Role::GATE);
    mlp(l.mlp, Role::LINEAR), mlp(l.moe.shared, Role::LINEAR);
    for (Mlp& expert : l.moe.experts) mlp(expert, Role::EXPERT);
}
template <class F> void each_matrix(Model& m, const F& f) {
    f(m.embed, Role::EMBED), f(m.head, Role::HEAD);
    for (Layer& l : m.layers) each_matrix(l, f);
    for (Mtp& mtp : m.mtp) f(mtp.proj, Role::LINEAR), each_matrix(mtp.layer, f);
}
// f(span) for every vector.
template <class F> void each_vector(Model& m, const F& f) {
    auto layer = [&](Layer& l) {
        for (auto* v : {&l.attn_norm, &l.ffn_norm, &l.mla.q_norm, &l.mla.kv_norm, &l.gqa.bq, &l.gqa.bk,
                        &l.gqa.bv, &l.gqa.q_norm, &l.gqa.k_norm, &l.moe.gate_bias})
            f(*v);
    };
    f(m.norm);
    for (Layer& l : m.layers) layer(l);
    for (Mtp& mtp : m.mtp) f(mtp.enorm), f(mtp.hnorm), f(mtp.norm), layer(mtp.layer);
}

enum class MlaForm : uint8_t { ABSORBED, NAIVE };

struct SessionOptions {
    int context = 0, chunk = 128;          // tokens that fit; tokens that one forward pass takes at most
    MlaForm mla = MlaForm::ABSORBED;
    Dtype kv = REAL;                       // how the cache is stored
};

// Where a session's arrays lie and its passes run: on the CPU, whose table is in 13.2, or on a GPU. That has
// twins of the operations, which work on the same structs.
struct Session; struct Choice;
struct Device {
    const char* name;
    std::shared_ptr<std::byte> (*memory)(size_t bytes);                    // zeroed
    void (*read)(void* to, const void* from, size_t bytes);                // from the device's memory
    void (*write)(void* to, const void* from, size_t bytes);               // to it
    int (*threads)();                                                      // with scratch of their own
    int64_t (*attention_scratch)(const Config&, const SessionOptions&);    // numbers of each
    void (*forward)(Session&, std::span<const int> ids, int pos);          // 11.4
    void (*head)(const Session&, real* logits, const real* h, int T);      // 11.4: the logits are ours
    Choice (*choose_next)(const Session&, const real* h, const Sampling&, double at);   // 12.2
    void (*mtp_forward)(Session&, const real* h, std::span<const int> next, int pos);   // 13.1
    uint64_t (*available)();                                               // bytes of memory; 0: unknown
    void (*upload)(Model&, const std::function<void(size_t, size_t)>& progress);   // none: has ours
    std::string (*missing)();                                              // why it cannot be used, or ""
};
extern const Device CPU;

// Everything that a forward pass writes, for at most C = chunk tokens, each array with its shape. One list,
// walked twice: for the bill and for the pointers.
struct Activations {
    Arena& arena;
    const Config& c;
    const SessionOptions& options;
    const Device& device;
    int threads = device.threads(), C = options.chunk;

    template <class... Sides> real* reals(Sides... sides) { return arena.take<real>((size_t(sides) * ...)); }
    template <class... Sides> int* ints(Sides... sides) { return arena.take<int>((size_t(sides) * ...)); }
    Rows row_a_thread(int64_t n) { return {reals(threads, n), n}; }

    real *x = reals(C, c.D), *u = reals(C, c.D);                // residual, normed
    real *y = reals(C, c.D), *h = reals(C, c.D);                // a branch's output, after last norm
    real* cos_sin = reals(C, c.rope_dim() / 2, 2);
    real *c_q = reals(C, c.Rq), *q = reals(C, c.H, c.q_dim());
    real *kv = reals(C, c.cache_width()), *o = reals(C, c.H, c.v_dim());
    real *q_absorbed = reals(C, c.H, c.Rkv + c.Dr), *z = reals(C, c.H, c.Rkv), *lse = reals(C, c.H);
    Rows scratch = row_a_thread(device.attention_scratch(c, options));
    int64_t expansion = latent_expansion(c.Rkv, c.Dn, c.Dr, c.Dv);
    bool naive = c.mla() && options.mla == MlaForm::NAIVE;
    Rows expanded = row_a_thread(naive ? options.context * expansion : 0);
    // The widest FFN: a dense one, or all experts of a token.
    size_t width = std::max(size_t(c.ffn_width), size_t(c.F) * size_t(c.K + c.n_shared));
    real *gate = reals(C, width), *up = reals(C, width);
    real *router_logits = reals(C, c.E), *affinity = reals(C, c.E), *choice = reals(C, c.E);
    real *group_score = reals(C, c.n_group), *gate_weight = reals(C, c.K);
    real *expert_in = reals(C, c.K, c.D), *expert_out = reals(C, c.K, c.D);
    real *mtp_in = reals(c.n_mtp, C, 2 * c.D);
    real *mtp_x = reals(c.n_mtp, C, c.D), *mtp_h = reals(c.n_mtp, C, c.D);
    int* first = ints(c.E ? c.E + 1 : 0);                       // of a dense model: nothing
    int *seen = ints(C), *expert_idx = ints(C, c.K), *slot = ints(C, c.K), *slot_token = ints(C, c.K);

    static size_t bytes(const Config& c, const SessionOptions& o, const Device& device) {
        Arena counter;
        void(Activations{counter, c, o, device});
        return counter.used;
    }
};

// The cache's matrices of a layer, and their width.
inline int cache_parts(const Config& c) { return c.mla() ? 1 : 2 * c.G; }
inline int cache_part_width(const Config& c) { return c.cache_width() / cache_parts(c); }
inline size_t cache_bytes(const Config& c, int context, Dtype dtype) {
    return Cache::bytes(c.n_layers + c.n_mtp, context, cache_parts(c), cache_part_width(c), dtype);
}

// Where experts stand on several ranks, a pass is the work of all (15.4).
enum class Pass : uint8_t { MAIN, MTP, DONE };
struct Crew {
    virtual ~Crew() = default;
    virtual void begin(Pass) = 0;
    virtual void experts(Session&, const Moe&, int l, int T) = 0;          // a.expert_out of all tokens
};

// One conversation with one model. The MTP layer's part of the cache lags behind: it holds `mtp_length`
// tokens.
struct Session {
    const Model& model;
    SessionOptions options;
    const Device& device;
    Cache cache;
    std::shared_ptr<std::byte> memory;     // of the activations
    Arena arena;
    Activations a;
    Taps* taps = nullptr;
    Crew* crew = nullptr;
    std::vector<int> tokens;               // the conversation; the cache holds the first `length` of them
    int length = 0, mtp_length = 0;
    int h_pos = 0, h_rows = 0;             // positions whose final hidden states are in a.h
    std::function<void(int)> at_layer;     // called after each layer of a pass, for who shows progress

    Session(const Model& m, const SessionOptions& o, const Device& device = CPU)
        : model(m), options(o), device(device),
          cache{o.kv, o.context, cache_parts(m.config), cache_part_width(m.config),
                device.memory(cache_bytes(m.config, o.context, o.kv))},
          memory(device.memory(Activations::bytes(m.config, o, device))), arena{memory.get(), 0},
          a{arena, m.config, options, device} {}

    // Taps of layer l; the MTP layer's inner values have no names.
    bool taps_of(int l) const { return taps && l < model.config.n_layers; }
    void tap(int l, const char* name, const real* data, int T, std::initializer_list<int> inner) const {
        if (taps_of(l)) taps->add(text_of("layers.%d.%s", l, name), data, T, inner);
    }
};

// -- 11.2  bind: which tensor is what ------------------------------------------------------------

inline Mlp bind_mlp(Binder& b, const std::string& p, int D, int width) {
    return {b.matrix(p + "gate_proj.weight", width, D), b.matrix(p + "up_proj.weight", width, D),
            b.matrix(p + "down_proj.weight", D, width)};
}

// W^UK and W^UV of the heads: in one tensor, or, as newer GGUF files have it, in two and W^UK transposed.
// With all three, the two say nothing new.
inline void bind_heads(Binder& b, const Config& c, const std::string& p, Mla& w) {
    std::string k_b = p + "k_b_proj.weight", v_b = p + "v_b_proj.weight", kv_b = p + "kv_b_proj.weight";
    if (b.has(k_b) && !b.has(kv_b)) {
        Matrix k = b.matrix(k_b, c.H * c.Rkv, c.Dn), v = b.matrix(v_b, c.H * c.Dv, c.Rkv);
        for (int h = 0; h < c.H; h++) {
            w.wk_b.push_back(k.view(h * c.Rkv, c.Rkv).transpose());
            w.wv_b.push_back(v.view(h * c.Dv, c.Dv));
        }
        return;
    }
    Matrix kv = b.matrix(kv_b, c.H * (c.Dn + c.Dv), c.Rkv);
    for (int first = 0; kv && first < kv.rows; first += c.Dn + c.Dv) {
        w.wk_b.push_back(kv.view(first, c.Dn));
        w.wv_b.push_back(kv.view(first + c.Dn, c.Dv));
    }
    b.ignore(k_b, c.H * c.Rkv, c.Dn);
    b.ignore(v_b, c.H * c.Dv, c.Rkv);
}

inline Mla bind_mla(Binder& b, const Config& c, const std::string& p) {
    Mla w;
    int q_rows = c.H * c.q_dim();
    if (c.Rq) {
        w.wq_a = b.matrix(p + "q_a_proj.weight", c.Rq, c.D);
        w.q_norm = b.vector(p + "q_a_layernorm.weight", c.Rq);
        w.wq_b = b.matrix(p + "q_b_proj.weight", q_rows, c.Rq);
    } else {
        w.wq = b.matrix(p + "q_proj.weight", q_rows, c.D);
    }
    w.wkv_a = b.matrix(p + "kv_a_proj_with_mqa.weight", c.Rkv + c.Dr, c.D);
    w.kv_norm = b.vector(p + "kv_a_layernorm.weight", c.Rkv);
    bind_heads(b, c, p, w);
    w.wo = b.matrix(p + "o_proj.weight", c.D, c.H * c.Dv);
    return w;
}

inline Gqa bind_gqa(Binder& b, const Config& c, const std::string& p) {
    int q_rows = c.H * c.head_dim, kv_rows = c.G * c.head_dim;
    Gqa w{b.matrix(p + "q_proj.weight", q_rows, c.D), b.matrix(p + "k_proj.weight", kv_rows, c.D),
          b.matrix(p + "v_proj.weight", kv_rows, c.D), b.matrix(p + "o_proj.weight", c.D, q_rows),
          {}, {}, {}};
    if (c.qkv_bias) {
        w.bq = b.vector(p + "q_proj.bias", q_rows);
        w.bk = b.vector(p + "k_proj.bias", kv_rows);
        w.bv = b.vector(p + "v_proj.bias", kv_rows);
    }
    if (c.qk_norm)
        w.q_norm = b.vector(p + "q_norm.weight", c.head_dim),
        w.k_norm = b.vector(p + "k_norm.weight", c.head_dim);
    return w;
}

// The experts of layer l that this process has: all, where it is not one of several ranks (15.4).
inline std::function<bool(int l, int expert)> has_expert = [](int, int) { return true; };

inline Moe bind_moe(Binder& b, const Config& c, int l, const std::string& p) {
    Moe w;
    w.gate_w = b.matrix(p + "gate.weight", c.E, c.D);
    if (c.gate == Gate::NOAUX_TC) w.gate_bias = b.vector(p + "gate.e_score_correction_bias", c.E);
    for (int e = 0; e < c.E; e++) {
        b.elsewhere = !has_expert(l, e);
        w.experts.push_back(bind_mlp(b, p + text_of("experts.%d.", e), c.D, c.F));
    }
    b.elsewhere = false;
    if (c.n_shared) w.shared = bind_mlp(b, p + "shared_experts.", c.D, c.n_shared * c.F);
    return w;
}

inline Layer bind_layer(Binder& b, const Config& c, int l) {
    Layer w;
    std::string p = text_of("model.layers.%d.", l);
    w.attn_norm = b.vector(p + "input_layernorm.weight", c.D);
    w.ffn_norm = b.vector(p + "post_attention_layernorm.weight", c.D);
    if (c.mla()) w.mla = bind_mla(b, c, p + "self_attn.");
    else w.gqa = bind_gqa(b, c, p + "self_attn.");
    if (c.is_moe(l)) w.moe = bind_moe(b, c, l, p + "mlp.");
    else w.mlp = bind_mlp(b, p + "mlp.", c.D, c.ffn_width);
    return w;
}

// Layer n_layers of the files. It has its own copies of embedding and head, which V3 section 2.2 shares
// with the main model; the main model's are used.
inline Mtp bind_mtp(Binder& b, const Config& c) {
    Mtp w;
    std::string p = text_of("model.layers.%d.", c.n_layers);
    w.enorm = b.vector(p + "enorm.weight", c.D);
    w.hnorm = b.vector(p + "hnorm.weight", c.D);
    w.norm = b.vector(p + "shared_head.norm.weight", c.D);
    w.proj = b.matrix(p + "eh_proj.weight", c.D, 2 * c.D);
    w.layer = bind_layer(b, c, c.n_layers);
    b.ignore(p + "embed_tokens.weight", c.V, c.D);
    b.ignore(p + "shared_head.head.weight", c.V, c.D);
    return w;
}

inline void bind_model(Binder& b, Model& m) {
    const Config& c = m.config;
    m.embed = b.matrix("model.embed_tokens.weight", c.V, c.D);
    if (m.embed.dtype == Dtype::F8_E4M3) refuse(c.file, "F8_E4M3 embeddings are not supported");
    m.norm = b.vector("model.norm.weight", c.D);
    m.head = c.tied ? m.embed : b.matrix("lm_head.weight", c.V, c.D);
    if (c.tied) b.same("lm_head.weight", "model.embed_tokens.weight");
    for (int l = 0; l < c.n_layers; l++) m.layers.push_back(bind_layer(b, c, l));
    if (c.n_mtp) m.mtp.push_back(bind_mtp(b, c));
    m.vectors = std::move(b.vectors);
}

// -- 11.3  the layers' parts: each operation gets its arrays -------------------------------------

// What attention made of them. The naive form has no q_absorbed and no z.
inline void tap_attention(const Session& s, int l, int T) {
    const Config& c = s.model.config;
    if (c.mla() && s.options.mla == MlaForm::ABSORBED) {
        s.tap(l, "q_absorbed", s.a.q_absorbed, T, {c.H, c.Rkv + c.Dr});
        s.tap(l, "z", s.a.z, T, {c.H, c.Rkv});
    }
    s.tap(l, "lse", s.a.lse, T, {c.H});
    s.tap(l, "o", s.a.o, T, {c.H, c.v_dim()});
}

// a.y (T, D) = attention of a.u (T, D), at the positions that `place` has set; writes the cache of layer l.
// mla too.
inline void gqa(Session& s, const Gqa& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    int d = c.head_dim, width = c.G * d;
    real *k = a.kv, *v = a.kv + int64_t(T) * width;                        // (T, G, d) each
    ConstRows u{a.u, c.D};
    Product products[] = {
        {{a.q, c.H * d}, u, &w.wq, T}, {{k, width}, u, &w.wk, T}, {{v, width}, u, &w.wv, T}};
    matmul(products);
    if (c.qkv_bias) add_bias(a.q, w.bq, T), add_bias(k, w.bk, T), add_bias(v, w.bv, T);
    if (c.qk_norm) {                                                       // a head is a row
        rmsnorm({a.q, d}, {a.q, d}, w.q_norm, int64_t(T) * c.H, c.eps);
        rmsnorm({k, d}, {k, d}, w.k_norm, int64_t(T) * c.G, c.eps);
    }
    rope_half({a.q, c.H * d, d, T, c.H}, a.cos_sin, d);
    rope_half({k, width, d, T, c.G}, a.cos_sin, d);
    std::span<const int> n{a.seen, size_t(T)};
    for (int g = 0; g < c.G; g++) {
        store(s.cache.matrix(l, 2 * g), n, {k + g * d, width});
        store(s.cache.matrix(l, 2 * g + 1), n, {v + g * d, width});
    }
    gqa_attend(a.o, a.q, s.cache, l, c.H, n, a.scratch, s.taps_of(l) ? a.lse : nullptr);
    tap_attention(s, l, T);
    matmul({a.y, c.D}, {a.o, c.H * d}, w.wo, T);
}

inline void tap_mla(const Session& s, int l, int T) {
    if (!s.taps) return;
    const Config& c = s.model.config;
    Matrix past = s.cache.matrix(l, 0);
    Vector q_nope, q_rope, c_kv, k_rope, row(size_t(past.cols));
    auto split = [](const real* row, int at, int n, Vector& left, Vector& right) {
        left.insert(left.end(), row, row + at), right.insert(right.end(), row + at, row + n);
    };
    for (int64_t i = 0; i < int64_t(T) * c.H; i++)
        split(s.a.q + i * c.q_dim(), c.Dn, c.q_dim(), q_nope, q_rope);
    for (int t = 0; t < T; t++) {
        kernels.widen(row.data(), past, s.a.seen[t] - 1);
        split(row.data(), c.Rkv, past.cols, c_kv, k_rope);
    }
    s.tap(l, "q_nope", q_nope.data(), T, {c.H, c.Dn});
    s.tap(l, "q_rope", q_rope.data(), T, {c.H, c.Dr});
    s.tap(l, "c_kv", c_kv.data(), T, {c.Rkv});
    s.tap(l, "k_rope", k_rope.data(), T, {c.Dr});
}

inline real mla_scale(const Model& m) {
    return real(m.rope.score_scale / std::sqrt(double(m.config.Dn + m.config.Dr)));
}

// a.o (T, H, Dv) from a.q and layer l of the cache
inline void attend_latent(Session& s, const Mla& w, int l, int T) {
    Activations& a = s.a;
    LatentAttention core{a.o, a.q, s.cache.matrix(l, 0), w.wk_b, w.wv_b, {a.seen, size_t(T)},
                         s.model.config.Dr, mla_scale(s.model), a.q_absorbed, a.z, a.expanded, a.scratch,
                         s.taps_of(l) ? a.lse : nullptr};
    if (s.options.mla == MlaForm::NAIVE) mla_naive(core);
    else mla_absorbed(core);
}

//   c^Q = RMSNorm(W^DQ u), [q_nope | q_rope] = W^UQ c^Q                   V3 eq. 6-9
//   [c | k] = W^DKV u,  c^KV = RMSNorm(c),  k_rope = RoPE(k)              V3 eq. 1-3
inline void mla(Session& s, const Mla& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    int width = c.Rkv + c.Dr, q_dim = c.q_dim();
    ConstRows u{a.u, c.D};
    Rows kv{a.kv, width}, c_q{a.c_q, c.Rq}, q{a.q, c.H * q_dim};
    Product down[] = {{kv, u, &w.wkv_a, T}, {c.Rq ? c_q : q, u, c.Rq ? &w.wq_a : &w.wq, T}};
    matmul(down);
    if (c.Rq) {
        rmsnorm(c_q, c_q, w.q_norm, T, LATENT_EPS);
        s.tap(l, "c_q", a.c_q, T, {c.Rq});
        matmul(q, c_q, w.wq_b, T);
    }
    rmsnorm(kv, kv, w.kv_norm, T, LATENT_EPS);
    rope_interleaved({a.q + c.Dn, c.H * q_dim, q_dim, T, c.H}, a.cos_sin, c.Dr);
    rope_interleaved({a.kv + c.Rkv, width, 0, T, 1}, a.cos_sin, c.Dr);
    store(s.cache.matrix(l, 0), {a.seen, size_t(T)}, kv);
    tap_mla(s, l, T);
    attend_latent(s, w, l, T);
    tap_attention(s, l, T);
    matmul({a.y, c.D}, {a.o, c.H * c.Dv}, w.wo, T);
}

// V2's published code, when told to normalise, does not scale; V3's always does.
inline GateShape gate_shape(const Config& c) {
    return {c.E, c.K, c.n_group, c.topk_group, c.sigmoid_affinity ? Affinity::SIGMOID : Affinity::SOFTMAX,
            c.norm_topk, c.sigmoid_affinity || c.gate == Gate::NOAUX_TC, c.routed_scale};
}

// a.y (T, D) = experts' mixture of a.u (T, D)
inline void moe(Session& s, const Moe& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    matmul({a.router_logits, c.E}, {a.u, c.D}, w.gate_w, T);
    GateShape shape = gate_shape(c);
    Routing r{T, a.router_logits, a.affinity, a.choice, a.expert_idx, a.gate_weight, a.group_score};
    switch (c.gate) {
    case Gate::GREEDY: gate_greedy(r, shape); break;
    case Gate::GROUP_LIMITED_GREEDY: gate_group_limited_greedy(r, shape); break;
    case Gate::NOAUX_TC: gate_noaux_tc(r, w.gate_bias.data(), shape); break;
    }
    s.tap(l, "router_logits", a.router_logits, T, {c.E});
    if (c.gate != Gate::GREEDY) s.tap(l, "group_score", a.group_score, T, {c.n_group});
    s.tap(l, "choice", a.choice, T, {c.E});
    if (s.taps_of(l)) s.taps->add(text_of("layers.%d.expert_idx", l), a.expert_idx, T, c.K);
    s.tap(l, "expert_weight", a.gate_weight, T, {c.K});

    if (s.crew) {
        s.crew->experts(s, w, l, T);
    } else {
        dispatch(a.first, a.slot, a.slot_token, a.expert_idx, T, c.K, c.E);
        run_experts(
            {a.u, T, c.K, a.first, a.slot_token, a.expert_in, a.expert_out, a.expert_in, a.gate, a.up}, w);
    }
    const real* shared = c.n_shared ? a.expert_in : nullptr;
    if (s.taps_of(l)) {                                  // the sum before the shared expert joins it
        combine(a.u, a.expert_out, a.slot, a.gate_weight, c.K, nullptr, T, c.D);
        s.tap(l, "routed_out", a.u, T, {c.D});
        if (shared) s.tap(l, "shared_out", shared, T, {c.D});
    }
    combine(a.y, a.expert_out, a.slot, a.gate_weight, c.K, shared, T, c.D);
}

// -- 11.4  block, forward, head ------------------------------------------------------------------

// One layer on the residual stream x (T, D), in place.
inline void block(Session& s, const Layer& w, real* x, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    size_t n = size_t(T) * size_t(c.D);

    rmsnorm({a.u, c.D}, {x, c.D}, w.attn_norm, T, c.eps);
    s.tap(l, "attn_norm", a.u, T, {c.D});
    if (c.mla()) mla(s, w.mla, l, T);
    else gqa(s, w.gqa, l, T);
    s.tap(l, "attn_out", a.y, T, {c.D});
    add(x, a.y, n);

    rmsnorm({a.u, c.D}, {x, c.D}, w.ffn_norm, T, c.eps);
    s.tap(l, "ffn_norm", a.u, T, {c.D});
    if (c.is_moe(l)) moe(s, w.moe, l, T);
    else swiglu(a.y, a.u, w.mlp, T, a.gate, a.up);
    s.tap(l, "ffn_out", a.y, T, {c.D});
    add(x, a.y, n);
    s.tap(l, "out", x, T, {c.D});
}

// What depends on the positions pos, pos + 1, ... of T tokens alone.
inline void place(Session& s, int T, int pos) {
    rope_table(s.a.cos_sin, s.model.rope, T, pos);
    for (int t = 0; t < T; t++) s.a.seen[t] = pos + t + 1;
}

// Tokens ids (T) at positions pos, pos + 1, ... whose past is in the cache. Leaves the hidden states
// after the final norm in a.h (T, D). T at most options.chunk; any split of a prompt into calls gives the
// same bits.
inline void forward(Session& s, std::span<const int> ids, int pos) {
    const Model& m = s.model;
    const Config& c = m.config;
    Activations& a = s.a;
    int T = int(ids.size());
    CHECK(T <= s.options.chunk && pos + T <= s.options.context, "%d tokens at %d", T, pos);
    if (s.crew) s.crew->begin(Pass::MAIN);
    place(s, T, pos);
    embed({a.x, c.D}, m.embed, ids);
    if (s.taps) s.taps->add("embed", a.x, T, {c.D});
    for (int l = 0; l < c.n_layers; l++) {
        block(s, m.layers[size_t(l)], a.x, l, T);
        if (s.at_layer) s.at_layer(l + 1);
    }
    rmsnorm({a.h, c.D}, {a.x, c.D}, m.norm, T, c.eps);
    if (s.taps) s.taps->add("norm", a.h, T, {c.D});
    s.length = pos + T, s.h_pos = pos, s.h_rows = T;
}

// logits (T, V) = head h (T, D)
inline void head(const Session& s, real* logits, const real* h, int T) {
    matmul({logits, s.model.config.V}, {h, s.model.config.D}, s.model.head, T);
}

// =================================================================================================
// Chapter 12. Talking
// =================================================================================================
//
// How does a row of logits become an answer? Softmax makes it a distribution, a random number picks one
// token, the token is shown to the model, and so on until it picks an end-of-sentence token:
//
//      prompt ids --prefill--> logits --sample--> id --forward--> logits --sample--> id ...
//
// Greedy decoding (temperature 0) takes the likeliest token each time. Reasoning models tend to loop
// under it, so R1 and its distills come with temperature 0.6 and top-p 0.95 in generation_config.json,
// which is the default here.
//
// R1 thinks before it answers, between <think> and </think>. A thinking budget ends the thought after N
// tokens with the token </think> itself; the same letters spelled from ordinary tokens would mean nothing
// to the model.

// -- 12.1  sampling ------------------------------------------------------------------------------

struct Candidate {
    int id;
    double p;
};
using Distribution = std::vector<Candidate>;             // sums to 1

// e^((z - top) / temperature), top the largest logit: what is below e^-700 of the best is nothing.
EVERYWHERE inline double weight_of(real z, real top, double temperature) {
    const double x = (double(z) - double(top)) / temperature;
    return x < -700 ? 0 : exp_wide(x);
}

// Sorts as many of the heaviest candidates to the front as it takes to hold `share` of the total, and
// drops the rest.
inline void keep_top_p(Distribution& d, double share) {
    double lane[LANES] = {};                             // of so many terms the sum has lanes, as a dot
    for (size_t i = 0; i < d.size(); i++) lane[i % LANES] += d[i].p;
    const double total = sum_lanes(lane);
    auto heavier = [](const Candidate& a, const Candidate& b) {
        return a.p > b.p || (a.p == b.p && a.id < b.id);
    };
    for (size_t sorted = 64;; sorted *= 8) {
        sorted = std::min(sorted, d.size());
        std::partial_sort(d.begin(), d.begin() + int64_t(sorted), d.end(), heavier);
        double sum = 0;
        for (size_t i = 0; i < sorted; i++) {
            sum += d[i].p;
            if (sum < share * total && i + 1 < d.size()) continue;
            d.resize(i + 1);
            return;
        }
    }
}

inline bool all_finite(const real* logits, int64_t V) {
    return std::all_of(logits, logits + V, [](real z) { return std::isfinite(z); });
}
struct BrokenModel : UserError {
    using UserError::UserError;
};
[[noreturn]] inline void fail_of_nan() {
    throw BrokenModel("the model computed logits that are no finite numbers (damaged weights?)");
}
inline void require_finite(const real* logits, int64_t V) { if (!all_finite(logits, V)) fail_of_nan(); }

//   z / r where z > 0, else z r, for each token of the text so far     Keskar et al. 2019 (CTRL), section 4.1
// logits: (V). CTRL divides in both cases, which would make a token with z < 0 likelier.
inline void penalise(real* logits, std::span<const int> tokens, double r) {
    if (r == 1) return;
    for (int id : std::set<int>(tokens.begin(), tokens.end()))
        logits[id] = logits[id] > 0 ? logits[id] / real(r) : logits[id] * real(r);
}

// softmax(logits / temperature), then top-k, top-p and min-p, each on what the one before left. logits: (V)
inline Distribution distribution(const real* logits, int V, const Sampling& s) {
    require_finite(logits, V);
    const int best = int(std::max_element(logits, logits + V) - logits);
    if (s.temperature == 0) return {{best, 1.0}};
    Distribution d;
    for (int i = 0; i < V; i++) d.push_back({i, weight_of(logits[i], logits[best], s.temperature)});
    if (s.top_k > 0 && s.top_k < V) {
        std::vector<int> idx(static_cast<size_t>(s.top_k));
        top_k(idx.data(), logits, V, s.top_k);
        Distribution kept;
        for (int i : idx) kept.push_back(d[size_t(i)]);
        d = kept;
    }
    if (s.top_p < 1) keep_top_p(d, s.top_p);
    std::erase_if(
        d, [&](const Candidate& c) { return c.p < s.min_p; });   // the best has p = 1 before the division
    double sum = 0;
    for (const Candidate& c : d) sum += c.p;
    for (Candidate& c : d) c.p /= sum;
    return d;
}

// The candidate within whose share `at` in [0, 1) lies.
inline int candidate_at(const Distribution& d, double at) {
    for (const Candidate& c : d) {
        if (at < c.p) return c.id;
        at -= c.p;
    }
    return d.back().id;                                  // rounding left a sliver
}
inline int sample(const Distribution& d, Rng& rng) {
    return candidate_at(d, d.size() > 1 ? rng.uniform() : 0);
}

// A token, and of how many it was chosen; no token (-1) where a logit is not finite.
struct Choice {
    int id, candidates;
};

// What `at` chooses from distribution(logits), as an operation.   logits: (V)
inline void choose(Choice* out, const real* logits, int V, const Sampling& s, double at) {
    *out = {-1, 0};
    if (!all_finite(logits, V)) return;
    const Distribution d = distribution(logits, V, s);
    *out = {candidate_at(d, at), int(d.size())};
}

// -- 12.2  generate ------------------------------------------------------------------------------

struct Drafting;                                         // how tokens can be guessed ahead: chapter 13

// Why a text ends: the model's end, -n, the context, Ctrl-C, or one of the texts of --stop.
enum class Stop : uint8_t { END, LENGTH, CONTEXT, INTERRUPTED, TEXT };

struct Generation {
    Sampling sampling;
    int max_tokens = std::numeric_limits<int>::max();
    std::vector<int> stops;                              // end-of-sentence ids: not shown, not kept
    int think_begin = -1, think_end = -1;                // ids, where the tokenizer has them
    int think_budget = -1;                               // tokens of thought; -1: no limit
    const Drafting* drafting = nullptr;                  // none: one token at a time
    std::function<void(const real*)> look;               // at the logits (V) of which a token is chosen
    Rng rng{0};
};

struct Statistics {
    int prompt = 0, reused = 0, generated = 0, steps = 0, drafted = 0, accepted = 0;
    double prefill_s = 0, decode_s = 0;
    Stop stop = Stop::END;
};

// Where the next token stands relative to the thought.
struct Thought {
    bool open = false;
    int tokens = 0;

    Thought(const Generation& g, std::span<const int> prompt) {
        for (int id : prompt) see(g, id);
        tokens = 0;
    }
    void see(const Generation& g, int id) {
        if (id == g.think_begin) open = true;
        else if (id == g.think_end) open = false;
        else tokens += open;
    }
    bool spent(const Generation& g) const { return g.think_budget >= 0 && open && tokens >= g.think_budget; }
};

// Calls forward in chunks; after each, `done(pos, T)` may look at a.h. `progress(n)`: that n tokens are done,
// a layer being its share of a chunk. Throws Interrupted, within a layer.
inline void prefill(Session& s, std::span<const int> ids, int pos, const std::function<void(int, int)>& done,
                    const std::function<void(int)>& progress = {}) {
    struct Quiet {
        Session& s;
        ~Quiet() { s.at_layer = nullptr; }
    } after{s};
    with_team([&] {
        for (size_t at = 0, T = 0; at < ids.size(); at += T) {
            T = std::min(ids.size() - at, size_t(s.options.chunk));
            if (progress) s.at_layer = [&](int l) {
                progress(pos + int(at) + int(int64_t(T) * l / s.model.config.n_layers));
            };
            s.device.forward(s, ids.subspan(at, T), pos + int(at));
            done(pos + int(at), int(T));
        }
    });
}

// How many of `ids` need no forward pass, because the cache already holds them. The last token always
// needs one; with MTP so does the first one whose draft is missing, since the hidden state before it is
// gone.
inline int reusable(Session& s, std::span<const int> ids, bool drafts) {
    size_t common = 0, most = std::min({ids.size() - 1, size_t(s.length), s.tokens.size()});
    while (common < most && s.tokens[common] == ids[common]) common++;
    if (drafts) common = std::min(common - (common > 0), size_t(s.mtp_length));
    s.mtp_length = std::min(s.mtp_length, int(common));
    return int(common);
}

// Logits (rows, V) of the last rows of a.h.
inline Vector last_logits(const Session& s, int rows) {
    const Config& c = s.model.config;
    Vector logits(size_t(rows) * size_t(c.V));
    s.device.head(s, logits.data(), s.a.h + int64_t(s.h_rows - rows) * c.D, rows);
    return logits;
}

// What `at` chooses after hidden state h (D).
inline Choice choose_next(const Session& s, const real* h, const Sampling& sampling, double at) {
    Choice choice;
    Vector logits(size_t(s.model.config.V));
    head(s, logits.data(), h, 1);
    choose(&choice, logits.data(), s.model.config.V, sampling, at);
    return choice;
}

// The token after the last row of a.h. Where somebody sees the logits, or changes them, they come here.
inline int next_token(const Session& s, Generation& g) {
    Rng drawn = g.rng;
    const real* h = s.a.h + int64_t(s.h_rows - 1) * s.model.config.D;
    const double at = drawn.uniform();
    Choice choice;
    if (g.look || g.sampling.repeat_penalty != 1) {
        Vector logits = last_logits(s, 1);
        if (g.look) g.look(logits.data());
        penalise(logits.data(), s.tokens, g.sampling.repeat_penalty);
        choose(&choice, logits.data(), s.model.config.V, g.sampling, at);
    } else {
        choice = s.device.choose_next(s, h, g.sampling, at);
    }
    if (choice.id < 0) fail_of_nan();
    if (choice.candidates > 1) g.rng = drawn;            // what is certain takes no random number
    return choice.id;
}

// The next token or tokens after s.tokens, of which all but the last one are in the cache.
inline std::vector<int> plain_step(Session& s, Generation& g) {
    s.device.forward(s, std::span(s.tokens).subspan(size_t(s.length)), s.length);
    return {next_token(s, g)};
}

struct Drafting {
    int (*catch_up)(Session& s);                         // after each chunk of the prompt
    std::vector<int> (*step)(Session& s, Generation& g, Statistics& stats);   // as plain_step
};

// The cache holds s.tokens[0, length), and no more: so it stays, whatever ends a generation. What was drafted
// and not kept is forgotten: its rows of the cache lie beyond `length`, and are written anew.
inline void settle(Session& s) {
    s.length = std::min(s.length, int(s.tokens.size()));
    s.mtp_length = std::min(s.mtp_length, s.length);
}
inline void check_settled(const Session& s) {
    CHECK(0 <= s.mtp_length && s.mtp_length <= s.length && size_t(s.length) <= s.tokens.size(),
          "%d and %d of %zu tokens in the cache", s.mtp_length, s.length, s.tokens.size());
}

// Generates after a prompt that is in the cache, all but what the next step needs, until something stops it.
inline Stop generate_text(Session& s, Generation& g, Statistics& stats,
                          const std::function<bool(int)>& emit) {
    Thought thought(g, s.tokens);
    for (std::vector<int> next = {next_token(s, g)};;) {
        bool more = true;
        for (int id : next) {
            bool forced = thought.spent(g) && id != g.think_end;
            if (forced) id = g.think_end;
            if (std::find(g.stops.begin(), g.stops.end(), id) != g.stops.end()) return Stop::END;
            if (stats.generated == g.max_tokens) return Stop::LENGTH;
            thought.see(g, id);
            s.tokens.push_back(id);
            stats.generated++;
            more = emit(id);
            if (forced || !more) break;                  // what was drafted after it no longer follows
        }
        s.length = std::min(s.length, int(s.tokens.size()) - 1);         // the last one needs its pass
        if (!more) return Stop::TEXT;
        if (stats.generated == g.max_tokens) return Stop::LENGTH;
        if (int(s.tokens.size()) > s.options.context) return Stop::CONTEXT;
        if (interrupted) return Stop::INTERRUPTED;
        stats.steps++;
        next = g.drafting ? g.drafting->step(s, g, stats) : plain_step(s, g);
    }
}

// Generates after the prompt `ids` until a stop token, max_tokens, the end of the context, Ctrl-C, or until
// `emit(id)`, called with each token, returns false. `progress(n)` is called with the number of prompt tokens
// done. Keeps s.tokens and the cache for a next call.
inline Statistics generate(Session& s, std::span<const int> ids, Generation& g,
                           const std::function<void(int)>& progress, const std::function<bool(int)>& emit) {
    Statistics stats;
    struct Settled {
        Session& s;
        ~Settled() { settle(s); }
    } always{s};
    double start = seconds();
    stats.prompt = stats.reused = s.length = reusable(s, ids, g.drafting);
    s.tokens.assign(ids.begin(), ids.end());
    try {
        auto done = [&](int pos, int T) {
            if (g.drafting) g.drafting->catch_up(s);
            progress(stats.prompt = pos + T);
        };
        prefill(s, ids.subspan(size_t(stats.reused)), stats.reused, done, progress);
        stats.prefill_s = seconds() - start;
        stats.stop = generate_text(s, g, stats, emit);
    } catch (const Interrupted&) {
        stats.stop = Stop::INTERRUPTED;
    }
    settle(s), check_settled(s);
    double took = seconds() - start;
    if (stats.prompt < int(ids.size())) stats.prefill_s = took;          // interrupted on the way
    stats.decode_s = took - stats.prefill_s;
    return stats;
}

// -- 12.3  a prompt's cache on disk --------------------------------------------------------------
//
// A long prompt that is asked about again need not be read again: its keys and values can be kept. The
// file is a safetensors file of bytes as they are in memory; it says by what they were made (weights, config,
// options: `cache_facts`), and for which tokens. Whatever the next prompt shares with them from the start is
// reused.

struct Fnv1a {
    uint64_t h = 0xCBF29CE484222325u;
    void add(const void* data, size_t n) {
        for (size_t i = 0; i < n; i++) h = (h ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001B3u;
    }
};
// At most 2 n bytes of a tensor as a number: the first ones, and from the middle on.
inline uint64_t sample(const std::byte* data, size_t bytes, size_t n) {
    Fnv1a hash;
    hash.add(data, std::min(n, bytes)), hash.add(data + bytes / 2, std::min(n, bytes - bytes / 2));
    return hash.h;
}

// A number that names a model's weights: names, dtypes, shapes and samples of all tensors. Of a small model
// each byte is looked at; 128 MB are, together, of a large one.
inline uint64_t fingerprint(const Model& m) {
    Fnv1a hash;
    const size_t share = std::max<size_t>(256, (size_t(1) << 26) / (m.checkpoint.tensors.size() + 1));
    for (auto& [name, t] : m.checkpoint.tensors) {
        hash.add(name.data(), name.size()), hash.add(t.dtype.data(), t.dtype.size());
        for (uint64_t side : t.shape) hash.add(&side, 8);
        uint64_t bytes = sample(t.data, t.bytes, share);
        hash.add(&bytes, 8);
    }
    return hash.h;
}
// One that names what config.json says of the arithmetic.
inline uint64_t fingerprint(const Config& c) {
    const RopeConfig& r = c.rope;
    Fnv1a hash;
    for (double x : {double(c.D), double(c.V), double(c.n_layers), double(c.n_mtp), double(c.ffn_width),
                     double(c.H), double(c.G), double(c.head_dim), double(c.Rq), double(c.Rkv), double(c.Dn),
                     double(c.Dr), double(c.Dv), double(c.E), double(c.K), double(c.F), double(c.n_shared),
                     double(c.first_dense), double(c.moe_freq), double(c.n_group), double(c.topk_group),
                     double(c.gate), double(c.sigmoid_affinity), double(c.norm_topk), double(c.qkv_bias),
                     double(c.tied), c.routed_scale, c.eps, r.theta, double(r.scaling), r.factor,
                     r.original_context, r.low_freq_factor, r.high_freq_factor, r.beta_fast, r.beta_slow,
                     r.mscale, r.mscale_all_dim, r.attention_factor, double(r.truncate), double(c.qk_norm)})
        hash.add(&x, sizeof x);
    return hash.h;
}
// And one that names the formats that the matrices were given: --quant.
inline uint64_t formats(const Model& m) {
    Fnv1a hash;
    each_matrix(const_cast<Model&>(m), [&](const Matrix& w, Role) { hash.add(&w.dtype, sizeof w.dtype); });
    return hash.h;
}

// Whether quantised weights are multiplied in integers: --exact, and devices, do not.
inline bool in_integers(const Session& s) {
    bool any = false;
    each_matrix(const_cast<Model&>(s.model), [&](const Matrix& w, Role) { any |= w && quantised(w.dtype); });
    return kernels.integers && (!any || &s.device == &CPU);
}

// By what a cache was made: what must be the same where it is used, and how a message calls it.
struct CacheFact {
    const char* name;
    uint64_t value;
};
inline std::vector<CacheFact> cache_facts(const Session& s) {
    return {{"model (other weights)", fingerprint(s.model)},
            {"model (another config.json)", fingerprint(s.model.config)},
            {"--quant", formats(s.model)},
            {"--kv", uint64_t(s.cache.dtype)},
            {"--arith", uint64_t(kernels.arith)},
            {"--mla", uint64_t(s.options.mla)},
            {"--exact", in_integers(s)}};
}

// The filled rows of each of the cache's matrices.
inline std::vector<OutputTensor> cache_tensors(const Session& s) {
    std::vector<OutputTensor> out;
    for (int l = 0; l < s.model.config.n_layers + s.model.config.n_mtp; l++) {
        for (int part = 0; part < s.cache.parts; part++) {
            size_t rows = size_t(l < s.model.config.n_layers ? s.length : s.mtp_length);
            size_t bytes = rows * row_bytes(s.cache.dtype, s.cache.width);
            const std::byte* data = s.cache.matrix(l, part).data;
            out.push_back({text_of("cache.%d.%d", l, part), "U8", {bytes}, data, bytes, s.device.read});
        }
    }
    return out;
}

inline void save_cache(const Session& s, AtomicFile& file) {
    check_settled(s);
    std::vector<uint64_t> about = {uint64_t(s.length), uint64_t(s.mtp_length)};
    for (const CacheFact& fact : cache_facts(s)) about.push_back(fact.value);
    std::vector<OutputTensor> out = {
        {"about", "U64", {about.size()}, about.data(), 8 * about.size()},
        {"tokens", "I32", {size_t(s.length)}, s.tokens.data(), 4 * size_t(s.length)}};
    for (OutputTensor& t : cache_tensors(s)) out.push_back(t);
    write_safetensors(file, out);
}

// Fills a session. The file may be damaged or from elsewhere: names and sizes must be those we would write.
// Where it is refused, the session is empty.
inline void load_cache(Session& s, const std::string& path) {
    Mapping mapping(path);
    TensorFile parsed = parse_safetensors({mapping.data(), mapping.size()}, path);
    std::map<std::string, std::span<const std::byte>> found;
    for (const TensorInfo& t : parsed.tensors)
        found[t.name] = {mapping.data() + parsed.data_begin + t.begin, size_t(t.end - t.begin)};
    std::vector<CacheFact> facts = cache_facts(s);
    std::vector<uint64_t> about(2 + facts.size());
    s.tokens.clear(), s.length = s.mtp_length = 0;
    if (found["about"].size() != 8 * about.size()) refuse(path, "not a cache that --save-kv wrote");
    copy(about.data(), found["about"].data(), 8 * about.size());
    for (size_t i = 0; i < facts.size(); i++)
        if (about[2 + i] != facts[i].value) refuse(path, "was saved with another %s", facts[i].name);
    if (about[0] > uint64_t(s.options.context) || about[1] > about[0])
        refuse(path, "%ju tokens, the context holds %d", uintmax_t(about[0]), s.options.context);
    s.length = int(about[0]), s.mtp_length = int(about[1]);
    std::vector<OutputTensor> wanted = cache_tensors(s);
    std::vector<int> tokens(size_t(s.length));
    wanted.push_back({"tokens", "I32", {}, tokens.data(), 4 * tokens.size()});
    s.length = s.mtp_length = 0;
    for (const OutputTensor& t : wanted) {
        if (found[t.name].size() != t.bytes) refuse(path, "tensor '%s' is missing or cut", t.name.c_str());
        auto write = t.read ? s.device.write : copy;
        write(const_cast<void*>(t.data), found[t.name].data(), t.bytes);
    }
    for (int id : tokens)
        if (id < 0 || id >= s.model.config.V) refuse(path, "holds the token %d, which the model has not", id);
    s.tokens = tokens, s.length = int(about[0]), s.mtp_length = int(about[1]);
}

// -- 12.4  perplexity: how surprised is the model by a text? -------------------------------------

//   nll = -ln softmax(logits)[next]
inline double negative_log_likelihood(const real* logits, int V, int next) {
    double top = double(*std::max_element(logits, logits + V)), sum = 0;
    for (int i = 0; i < V; i++) sum += std::exp(double(logits[i]) - top);
    return top + std::log(sum) - double(logits[next]);
}

struct Perplexity {
    int64_t tokens = 0;     // predicted
    double nll = 0;         // sum, in nats
};

// The text is cut into windows of the session's context, each read from its own start (with `bos` before
// it if not negative); every token but a window's first is predicted from all before it in the window.
// Of each window; of those that are not first, first + step, ... nothing: other ranks have them (15.4).
inline std::vector<Perplexity> perplexities(Session& s, std::span<const int> ids, int bos, size_t first,
                                            size_t step, const std::function<void(size_t)>& progress) {
    const Config& c = s.model.config;
    std::vector<Perplexity> all;
    size_t room = size_t(s.options.context) - (bos >= 0);
    for (size_t begin = 0; begin < ids.size(); begin += room) {
        Perplexity& result = all.emplace_back();
        if ((all.size() - 1) % step != first) continue;
        std::vector<int> window(ids.begin() + int64_t(begin),
                                ids.begin() + int64_t(std::min(ids.size(), begin + room)));
        if (bos >= 0) window.insert(window.begin(), bos);
        Vector logits(size_t(c.V));
        prefill(s, window, 0, [&](int pos, int T) {
            for (int t = 0; t < T && size_t(pos + t + 1) < window.size(); t++) {
                s.device.head(s, logits.data(), s.a.h + int64_t(t) * c.D, 1);
                require_finite(logits.data(), c.V);
                result.nll += negative_log_likelihood(logits.data(), c.V, window[size_t(pos + t + 1)]);
                result.tokens++;
            }
        }, [&](int n) { progress(begin + size_t(n)); });
    }
    return all;
}

inline Perplexity sum(const std::vector<Perplexity>& windows) {
    Perplexity all;
    for (const Perplexity& w : windows) all.tokens += w.tokens, all.nll += w.nll;
    return all;
}

inline Perplexity perplexity(Session& s, std::span<const int> ids, int bos,
                             const std::function<void(size_t)>& progress) {
    return sum(perplexities(s, ids, bos, 0, 1, progress));
}

// =================================================================================================
// Chapter 13. Multi-token prediction
// =================================================================================================
//
// Can a model say two tokens at once? V3 was trained with a second, small predictor on top: from the
// hidden state of token i and the embedding of token i + 1 it predicts token i + 2 (V3 section 2.2):
//
//      h_i (after the final norm) ---- hnorm --+
//                                              +-- embedding, then h -- mtp_proj -- block -- norm -- head
//      embed(token i + 1) ------------ enorm --+
//
// In training it makes the hidden states plan ahead. In use it drafts: while the model forwards token i +
// 1 it can forward the drafted token i + 2 in the same pass, nearly for free, since the weights are read
// once for both. The model's own logits then say whether the draft stands. Nothing is lost: at
// temperature 0 the draft must equal the argmax; otherwise it is accepted with probability min(1, p/q)
// and else replaced by a sample of max(p - q, 0), which together is exactly p (Leviathan et al. 2023; the
// identity is tested in tests/unit/ch13_mtp.cpp).

// -- 13.1  mtp_forward ---------------------------------------------------------------------------

//   h'_i = M [RMSNorm(Emb(t_{i+1})) ; RMSNorm(h_i)]   V3 eq. 21 (h first there, second in the files)
// h: (T, D), final hidden states at pos, pos + 1, ...; next: the tokens after those positions (T). Leaves
// what the head needs in a.mtp_h (T, D). Writes row `pos` and on of the MTP layer's own cache.
inline void mtp_forward(Session& s, const real* h, std::span<const int> next, int pos) {
    const Model& m = s.model;
    const Mtp& w = m.mtp[0];
    const Config& c = m.config;
    Activations& a = s.a;
    int T = int(next.size());
    if (s.crew) s.crew->begin(Pass::MTP);
    embed({a.mtp_in, 2 * c.D}, m.embed, next);
    rmsnorm({a.mtp_in, 2 * c.D}, {a.mtp_in, 2 * c.D}, w.enorm, T, c.eps);
    rmsnorm({a.mtp_in + c.D, 2 * c.D}, {h, c.D}, w.hnorm, T, c.eps);
    matmul({a.mtp_x, c.D}, {a.mtp_in, 2 * c.D}, w.proj, T);
    if (s.taps) s.taps->add("mtp.in", a.mtp_x, T, {c.D});
    place(s, T, pos);
    block(s, w.layer, a.mtp_x, c.n_layers, T);
    if (s.taps) s.taps->add("mtp.out", a.mtp_x, T, {c.D});
    rmsnorm({a.mtp_h, c.D}, {a.mtp_x, c.D}, w.norm, T, c.eps);
    s.mtp_length = pos + T;
}

// Runs the MTP layer over the positions whose hidden state is in a.h and whose next token is known.
// Returns how many.
inline int mtp_catch_up(Session& s) {
    int end = std::min(s.h_pos + s.h_rows, int(s.tokens.size()) - 1), begin = s.mtp_length;
    if (begin >= end) return 0;
    CHECK(begin >= s.h_pos, "hidden state of position %d is gone", begin);
    const real* h = s.a.h + int64_t(begin - s.h_pos) * s.model.config.D;
    s.device.mtp_forward(s, h, std::span(s.tokens).subspan(size_t(begin) + 1, size_t(end - begin)), begin);
    return end - begin;
}

// -- 13.2  the CPU as a device -------------------------------------------------------------------

inline std::shared_ptr<std::byte> zeroed_pages(size_t bytes) {
    auto pages = std::make_shared<Pages>(bytes);
    return {pages, pages->data()};
}
inline int64_t scratch_of_heads(const Config& c, const SessionOptions& o) {
    return attention_scratch(o.context, c.q_dim(), c.v_dim());
}

const Device CPU = {.name = "cpu",
                    .memory = zeroed_pages,
                    .read = copy,
                    .write = copy,
                    .threads = n_threads,
                    .attention_scratch = scratch_of_heads,
                    .forward = forward,
                    .head = head,
                    .choose_next = choose_next,
                    .mtp_forward = mtp_forward,
                    .available = available_memory,
                    .upload = nullptr,
                    .missing = [] { return std::string(); }};

// -- 13.3  draft, verify, correct ----------------------------------------------------------------

// Accepts `draft`, sampled from q, with probability min(1, p/q); else samples max(p - q, 0). The result
// is distributed as p.
inline int verify(const Distribution& p, const Distribution& q, int draft, Rng& rng) {
    std::unordered_map<int, double> q_of;
    for (const Candidate& c : q) q_of[c.id] = c.p;
    Distribution rest;
    double p_draft = 0, sum = 0;
    for (const Candidate& c : p) {
        if (c.id == draft) p_draft = c.p;
        auto at = q_of.find(c.id);
        double excess = c.p - (at == q_of.end() ? 0 : at->second);
        if (excess > 0) rest.push_back({c.id, excess}), sum += excess;
    }
    bool accepted = p_draft >= q_of[draft] || rng.uniform() * q_of[draft] < p_draft;
    if (accepted || rest.empty()) return draft;
    for (Candidate& c : rest) c.p /= sum;
    return sample(rest, rng);
}

// One forward pass over the last token and a draft of its successor: one new token, or two when the draft
// stands.
inline std::vector<int> mtp_step(Session& s, Generation& g, Statistics& stats) {
    const Config& c = s.model.config;
    int rows = mtp_catch_up(s);
    if (rows == 0 || s.length + 2 > s.options.context) return plain_step(s, g);
    Vector logits(size_t(c.V));
    s.device.head(s, logits.data(), s.a.mtp_h + int64_t(rows - 1) * c.D, 1);
    penalise(logits.data(), s.tokens, g.sampling.repeat_penalty);
    Distribution q = distribution(logits.data(), c.V, g.sampling);
    int draft = sample(q, g.rng), pair[2] = {s.tokens.back(), draft};
    s.device.forward(s, std::span(pair), s.length);
    Vector both = last_logits(s, 2);       // row 0: after the last token; row 1: after the draft
    penalise(both.data(), s.tokens, g.sampling.repeat_penalty);
    int next = verify(distribution(both.data(), c.V, g.sampling), q, draft, g.rng);
    stats.drafted++;
    if (next != draft) return {next};      // row 1 is void; `generate` shortens the cache by the draft's row
    stats.accepted++;
    s.tokens.push_back(draft);             // for a moment: the penalty is of the draft, too
    penalise(both.data() + c.V, s.tokens, g.sampling.repeat_penalty);
    s.tokens.pop_back();
    return {draft, sample(distribution(both.data() + c.V, c.V, g.sampling), g.rng)};
}

constexpr Drafting MTP_DRAFTS = {mtp_catch_up, mtp_step};

// -- 13.4  looking inside: every position's logits, and taps -------------------------------------

// x as a tensor of a file: rows of `inner` numbers.
template <class T>
OutputTensor output_rows(const std::string& name, std::vector<size_t> inner, const std::vector<T>& x) {
    size_t row = 1;
    for (size_t side : inner) row *= side;
    inner.insert(inner.begin(), x.size() / row);
    const char* dtype = std::is_integral_v<T> ? "I32" : format_of(REAL).name;
    return {name, dtype, inner, x.data(), x.size() * sizeof(T)};
}

// What the tokens of a prompt make, from position `past` on.
struct Inside {
    size_t V;
    int past;
    bool mtp;
    Taps taps;
    Vector logits, mtp_logits;             // (T - past, V), (T - past - 1, V)

    std::vector<OutputTensor> tensors(bool with_taps) const {
        std::vector<OutputTensor> out;
        for (const Taps::Entry& t : taps.entries) {
            if (!with_taps) continue;
            out.push_back(t.integers.empty() ? output_rows(t.name, t.inner, t.values)
                                             : output_rows(t.name, t.inner, t.integers));
        }
        out.push_back(output_rows("logits", {V}, logits));
        if (mtp) out.push_back(output_rows("mtp_logits", {V}, mtp_logits));
        return out;
    }
};

// Of s.tokens; those before `past` are only read, so that what follows is what decoding would compute.
// done(n): n tokens were read.
inline Inside look_inside(Session& s, int past, bool with_taps, const std::function<void(size_t)>& done) {
    const bool mtp = s.model.config.n_mtp > 0;
    const std::span<const int> ids(s.tokens);
    const size_t V = size_t(s.model.config.V), rows = ids.size() - size_t(past);
    Inside in{V, past, mtp, {}, Vector(rows * V), Vector(mtp ? (rows - 1) * V : 0)};
    in.taps.rows = rows;
    auto progress = [&](int n) { done(size_t(n)); };
    prefill(s, ids.first(size_t(past)), 0, [&](int, int) { if (mtp) mtp_catch_up(s); }, progress);
    if (with_taps) s.taps = &in.taps;
    prefill(s, ids.subspan(size_t(past)), past, [&](int pos, int n) {
        s.device.head(s, in.logits.data() + size_t(pos - past) * V, s.a.h, n);
        require_finite(in.logits.data() + size_t(pos - past) * V, n * int64_t(V));
        const size_t begin = size_t(s.mtp_length - past) * V;
        if (mtp) s.device.head(s, in.mtp_logits.data() + begin, s.a.mtp_h, mtp_catch_up(s));
    }, progress);
    s.taps = nullptr;
    return in;
}

// How they were made, in the words of the options.
inline std::map<std::string, std::string> about_pass(const Session& s, int past) {
    constexpr const char* ARITHS[] = {"f32", "bf16", "fp8", "fp8"};
    std::string kv = format_of(s.cache.dtype).name, ids = json_array(s.tokens);
    for (char& letter : kv) letter = char(std::tolower(letter));
    std::map<std::string, std::string> about = {
        {"chunk", std::to_string(s.options.chunk)}, {"kv", kv}, {"arith", ARITHS[size_t(kernels.arith)]},
        {"exact", kernels.integers ? "false" : "true"}, {"device", s.device.name}, {"kernels", kernels.name},
        {"ids", ids.substr(1, ids.size() - 2)}, {"past", std::to_string(past)}};
    if (s.model.config.mla()) about["mla"] = s.options.mla == MlaForm::NAIVE ? "naive" : "absorbed";
    return about;
}

// A tensor as text: a line for all numbers along its last axis, a long one without its middle.
inline std::string text_of(const OutputTensor& t) {
    constexpr size_t SHOWN = 4;            // of each end
    const auto* data = static_cast<const std::byte*>(t.data);
    auto number = [&](size_t i) {
        return t.dtype == "I32" ? std::to_string(load<int32_t>(data + 4 * i))
                                : text_of("%.6g", double(load<real>(data + i * sizeof(real))));
    };
    std::string out, sides;
    for (size_t side : t.shape) sides += (sides.empty() ? "" : ", ") + std::to_string(side);
    out = t.name + " (" + sides + ") " + t.dtype + "\n";
    const size_t n = t.shape.back(), rows = t.bytes / (t.dtype == "I32" ? 4 : sizeof(real)) / n;
    for (size_t row = 0; row < rows; row++) {
        std::string index;
        for (size_t axis = t.shape.size() - 1, left = row; axis-- > 0; left /= t.shape[axis])
            index = std::to_string(left % t.shape[axis]) + (index.empty() ? "" : ", ") + index;
        out += "[" + index + "]";
        for (size_t i = 0; i < n; i++) {
            if (i == SHOWN && n > 2 * SHOWN + 1)
                out += text_of(" ... %zu more ...", n - 2 * SHOWN), i = n - SHOWN;
            out += " " + number(row * n + i);
        }
        out += "\n";
    }
    return out;
}

// The one with this name as text.
inline std::string text_of(const std::vector<OutputTensor>& all, const std::string& name) {
    auto at = std::ranges::find(all, name, &OutputTensor::name);
    if (at != all.end()) return text_of(*at);
    std::string names, last;                             // of all layers the last is enough
    for (const OutputTensor& t : all)
        if (t.name.starts_with("layers.")) last = t.name.substr(0, t.name.find('.', 7) + 1);
    for (const OutputTensor& t : all)
        if (!t.name.starts_with("layers.") || t.name.starts_with(last)) names += " " + t.name;
    fail("--print %s: no such tensor; there are%s", Fields::printable(name).c_str(), names.c_str());
}

// The k likeliest tokens after each position, as lines or as JSON: id, logit, probability, text.
inline std::string likeliest(const Inside& in, std::span<const int> ids, int k, const Tokenizer* t,
                             bool json) {
    std::string out = json ? "{\"positions\":[" : "";
    auto quoted = [&](int id) { return t ? json_quote(t->decode({id})) : std::string(json ? "null" : ""); };
    std::vector<int> best(std::min(size_t(k), in.V));
    for (size_t pos = size_t(in.past); pos < ids.size(); pos++) {
        const real* z = in.logits.data() + (pos - size_t(in.past)) * in.V;
        const double all = negative_log_likelihood(z, int(in.V), 0) + double(z[0]);    // ln of the sum of e^z
        const char* head = json ? "%s{\"position\":%zu,\"id\":%d,\"token\":%s,\"top\":["
                                : "%sposition %zu: %d %s\n";
        top_k(best.data(), z, int(in.V), int(best.size()));
        out += text_of(head, json && pos > size_t(in.past) ? "," : "", pos, ids[pos],
                       quoted(ids[pos]).c_str());
        for (size_t i = 0; i < best.size(); i++) {
            const char* line = json ? "%s{\"id\":%d,\"logit\":%.9g,\"probability\":%.6g,\"token\":%s}"
                                    : "%s%8d %12.6f %10.6f  %s\n";
            const double logit = double(z[best[i]]);
            out += text_of(line, json && i ? "," : "", best[i], logit, std::exp(logit - all),
                           quoted(best[i]).c_str());
        }
        if (json) out += "]}";
    }
    return out + (json ? "]}\n" : "");
}

// =================================================================================================
// Chapter 14. FP8
// =================================================================================================
//
// What is a tensor core asked for, and what does it answer? V3 was trained, and is served, with e4m3 numbers
// on both sides of nearly every product: half the bytes of bf16 at twice the speed. Eight bits hold too few
// sizes for a whole matrix, and the tensor core's sums hold too few bits for a long row. So (V3 section 3.3)
//
//      x  (T, K)    each token's 128 numbers share a scale       s_x (T, K / 128)          "1 x 128"
//      W  (N, K)    each square of 128 x 128 shares one          s_w (N / 128, K / 128)
//
//      y[t][n] = sum over blocks b of   s_x[t][b] s_w[n / 128][b]   sum over k in b of x_q[t][k] W_q[n][k]
//                     f32, outside the tensor core                        inside: 128 products
//
// An outlier spoils the 127 neighbours that share its scale, no others; and what Hopper's accumulator loses,
// it loses in 128 products, not in 7,168. The second is called promotion.
//
// How far from f32 does it lead? KL divergence of the next token's distribution from that of --arith f32 with
// the same weights, in millinats, the mean over a prompt; and positions whose likeliest token stays:
//
//                     bf16                  fp8
//      weights/tiny   0.010    98 of 98     0.030   98 of 98     FP8 weights by --quant fp8
//      v3-fp8         0.283    24 of 24     13.5    17 of 24     its own (tests/golden/models)
//      v3-ue8m0       0.346    20 of 20     27.4    16 of 20     its own
//      v2-lite        0.306    34 of 34     9.98    26 of 34     --quant fp8
//      qwen2          0.051    33 of 34     1.85    32 of 34     --quant fp8
//      llama3         0.100    47 of 48     5.04    41 of 48     --quant fp8
//
// The trained model hardly moves. The others have random weights: their logits lie close together, and where
// a rounding picks another expert, another sum is computed.
//
// The other half of the chapter is that forward pass: every result rounded to bf16, as PyTorch stores it, and
// the products with FP8 weights in FP8.

// -- 14.1  the scale of a tile: six published formulas -------------------------------------------
//
// All make the largest magnitude of a tile 448, the largest e4m3. They differ in the last bit:
//
//                        s                   q                  with ue8m0 (V3.1): s up to a power of two
//      V3                amax / 448          x / s              2^ceil(log2 s), log2 s rounded to f32
//      V32               amax * (1 / 448)    x / s              exact
//      DEEPGEMM          amax / 448          x * (1 / s)        exact
//      DEEPEP            amax * (1 / 448)    x * (448 / amax)   exact;   q = x * (1 / s)
//      TILEKERNELS       amax / 448          x * (448 / amax)   exact;   q = x * (1 / s)
//      FLASHMLA          amax / 448          x / s              as V3;   published for these alone
//
// With powers of two they agree but for amax / 448 within some 2^-23 of one: amax * (1 / 448) may lie on its
// other side, and V3's logarithm on it. For the sake of tiles of zeros 1e-4 is the least amax, but FLASHMLA's
// least scale: 448 times as much, of which the small latents of a cache lose more. The scale is rounded
// first, then x is divided by it: the other way round, numbers miss their scale by up to a factor of two.

enum class Fp8Formula : uint8_t { V3, V32, DEEPGEMM, DEEPEP, TILEKERNELS, FLASHMLA };

constexpr float E4M3_MOST = 448, LEAST_AMAX = 1e-4f, LEAST_SCALE = 1e-4f;
constexpr uint8_t E4M3_NAN = 127;

struct TileScale {
    float s;                               // x ~ q s
    float inverse = 0;                     // q = x * inverse; 0: q = x / s
};

// The least power of two that is not below s.
EVERYWHERE inline float power_above(float s, bool ue8m0) {
    return ue8m0 ? std::bit_cast<float>((std::bit_cast<uint32_t>(s) + 0x7FFFFF) & 0x7F800000) : s;
}

EVERYWHERE inline float power_by_logarithm(float s, bool ue8m0) {
    return ue8m0 ? std::ldexp(1.0f, int(std::ceil(float(std::log2(double(s)))))) : s;
}

EVERYWHERE inline TileScale scale_v3(float amax, bool ue8m0) {
    return {power_by_logarithm(amax / E4M3_MOST, ue8m0)};
}
EVERYWHERE inline TileScale scale_v32(float amax, bool ue8m0) {
    return {power_above(amax * (1 / E4M3_MOST), ue8m0)};
}
EVERYWHERE inline TileScale scale_deepgemm(float amax, bool ue8m0) {
    float s = power_above(amax / E4M3_MOST, ue8m0);
    return {s, 1 / s};
}
EVERYWHERE inline TileScale scale_deepep(float amax, bool ue8m0) {
    float s = power_above(amax * (1 / E4M3_MOST), ue8m0);
    return {s, ue8m0 ? 1 / s : E4M3_MOST / amax};
}
EVERYWHERE inline TileScale scale_tilekernels(float amax, bool ue8m0) {
    float s = power_above(amax / E4M3_MOST, ue8m0);
    return {s, ue8m0 ? 1 / s : E4M3_MOST / amax};
}
EVERYWHERE inline TileScale scale_flashmla(float amax, bool ue8m0) {
    float s = amax / E4M3_MOST;
    return {power_by_logarithm(s < LEAST_SCALE ? LEAST_SCALE : s, ue8m0)};
}

EVERYWHERE inline TileScale tile_scale(Fp8Formula formula, float amax, bool ue8m0) {
    amax = amax < LEAST_AMAX ? LEAST_AMAX : amax;
    switch (formula) {
    case Fp8Formula::V3: return scale_v3(amax, ue8m0);
    case Fp8Formula::V32: return scale_v32(amax, ue8m0);
    case Fp8Formula::DEEPGEMM: return scale_deepgemm(amax, ue8m0);
    case Fp8Formula::DEEPEP: return scale_deepep(amax, ue8m0);
    case Fp8Formula::TILEKERNELS: return scale_tilekernels(amax, ue8m0);
    case Fp8Formula::FLASHMLA: break;
    }
    return scale_flashmla(amax, ue8m0);
}

// -- 14.2  quantise_fp8: activations 1 x 128, weights 128 x 128 ----------------------------------

struct Fp8Format {
    Fp8Formula formula = Fp8Formula::V3;
    bool ue8m0 = false;
    int tile = 1;                          // rows that share a scale: 1 or 128
};

// One tile of x, whose scale is returned; q: of rows `stride` apart. A number that is not finite makes NaN of
// its whole tile, for no scale holds it.
inline float quantise_tile(uint8_t* q, int64_t stride, ConstRows x, int rows, int n, const Fp8Format& f) {
    uint32_t largest = 0;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < n; i++) largest = std::max(largest, magnitude_bits(float(x[r][i])));
    const float amax = std::bit_cast<float>(largest);
    const bool finite = std::isfinite(amax);
    TileScale t = finite ? tile_scale(f.formula, amax, f.ue8m0) : TileScale{};
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < n; i++) {
            float v = float(x[r][i]);
            q[r * stride + i] = finite ? float_to_e4m3(t.inverse == 0 ? v / t.s : v * t.inverse) : E4M3_NAN;
        }
    }
    return finite ? t.s : std::numeric_limits<float>::quiet_NaN();
}

// q: (rows, n)   scale: (ceil(rows / tile), ceil(n / 128))   x: (rows, n). Tiles at the edges are smaller:
// their scale is that of the numbers they have.
inline void quantise_fp8(uint8_t* q, float* scale, ConstRows x, int rows, int n, const Fp8Format& f) {
    const int64_t blocks = scale_blocks(n), tiles = (rows + f.tile - 1) / f.tile;
    parallel_for(tiles * blocks, [&](int64_t i) {
        int64_t r = i / blocks * f.tile, begin = i % blocks * SCALE_BLOCK;
        scale[i] = quantise_tile(q + r * n + begin, n, {x[r] + begin, x.stride},
                                 int(std::min<int64_t>(f.tile, rows - r)),
                                 int(std::min<int64_t>(SCALE_BLOCK, n - begin)), f);
    }, 16 * int64_t(f.tile) * SCALE_BLOCK);
}

// As `store` (7.2), into rows of 656 bytes: c_kv in four tiles of 128, scales rounded up to powers of two,
// and k_rope in bf16, as it is the more sensitive.                            FlashMLA's FP8 cache of V3.2
inline void store_latent(const Matrix& cache, std::span<const int> n, ConstRows x) {
    CHECK(cache.dtype == Dtype::F8_LATENT, "%s", format_of(cache.dtype).name);
    parallel_for(int64_t(n.size()), [&](int64_t t) {
        std::byte* row = const_cast<std::byte*>(cache.row(n[size_t(t)] - 1));
        float scale[LATENT_SCALED / SCALE_BLOCK];
        quantise_fp8(reinterpret_cast<uint8_t*>(row), scale, {x[t], 0}, 1, LATENT_SCALED,
                     {Fp8Formula::FLASHMLA, true});
        std::memcpy(row + LATENT_SCALED, scale, sizeof scale);
        store_row(row + LATENT_ROPE, x[t] + LATENT_SCALED, cache.cols - LATENT_SCALED, Dtype::BF16);
    }, 16 * cache.cols);
}

// -- 14.3  the sum of one number, in three arithmetics -------------------------------------------
//
//      exact       f64: blocks without an error, scaled and added in order by fma, rounded once in the end
//      promoted    f32: a block as a dot of chapter 5 (16 lanes, a tree), then sum = fma(s_x s_w, block, sum)
//      hopper      the block as four instructions of 32 products, on an accumulator of 13 fraction bits
//
// Hopper's instruction (published measurements of H100; ISCA 2025, arXiv 2505.09343, section 3.1.1) aligns
// its 32 products and the accumulator to the largest exponent among them, cuts each to 13 fraction bits
// toward zero, adds these as integers, and cuts the sum to 14 bits again:
//
//      1.0000000000000          the largest       What lies below the 13th bit is lost from each term, toward
//    + 0.0000010110100|11..                       zero: without promotion, sums of one sign come out too
//    + 0.0000000000000|1..      lost whole        small, by 3.3 % over 2,048 products and 12 % over 7,168.

enum class Fp8Sum : uint8_t { EXACT, PROMOTED, HOPPER };

// A row of each side with its scales, one a block.
struct Fp8Pair {
    const uint8_t *a, *b;                  // (n)
    const float *a_scale, *b_scale;        // (ceil(n / 128))
    int n;
    int end(int begin, int size) const { return std::min(n, begin + size); }
};

inline double sum_exact(const Fp8Pair& p) {
    double sum = 0;
    for (int begin = 0, i = 0; begin < p.n; begin += SCALE_BLOCK, i++) {
        double block = 0;                  // multiples of 2^-18 below 2^25: exact in any order
        for (int k = begin; k < p.end(begin, SCALE_BLOCK); k++)
            block += double(E4M3[p.a[k]]) * double(E4M3[p.b[k]]);
        sum = std::fma(double(p.a_scale[i]) * double(p.b_scale[i]), block, sum);
    }
    return sum;
}

inline float sum_promoted(const Fp8Pair& p) {
    float sum = 0;
    for (int begin = 0, i = 0; begin < p.n; begin += SCALE_BLOCK, i++) {
        float lane[LANES] = {};            // a product of two e4m3 has 8 bits: exact
        for (int k = begin; k < p.end(begin, SCALE_BLOCK); k++)
            lane[k % LANES] += E4M3[p.a[k]] * E4M3[p.b[k]];
        sum = std::fma(p.a_scale[i] * p.b_scale[i], sum_lanes(lane), sum);
    }
    return sum;
}

constexpr int HOPPER_STEP = 32, HOPPER_FRACTION = 13, F32_FRACTION = 23;

// A number as significand / 2^23 * 2^exponent. Subnormals and products above 2 are not normalised.
struct Aligned {
    int exponent, significand;
};
EVERYWHERE inline Aligned aligned_product(uint8_t a, uint8_t b) {
    auto exponent = [](uint8_t x) { return std::max(x >> 3 & 15, 1) - 7; };
    auto eighths = [](uint8_t x) { return (x & 7) + (x >> 3 & 15 ? 8 : 0); };
    int product = eighths(a) * eighths(b) * (1 << (F32_FRACTION - 6));
    return {exponent(a) + exponent(b), (a ^ b) & 128 ? -product : product};
}
EVERYWHERE inline Aligned aligned_float(float c) {
    uint32_t bits = std::bit_cast<uint32_t>(c);
    int exponent = int(bits >> F32_FRACTION & 255);
    int significand = int(bits & 0x7FFFFF) + (exponent ? 0x800000 : 0);
    return {std::max(exponent, 1) - 127, bits >> 31 ? -significand : significand};
}

// One instruction: c plus n products, n at most 32.
inline float hopper_step(float c, const uint8_t* a, const uint8_t* b, int n) {
    Aligned terms[HOPPER_STEP + 1] = {aligned_float(c)};
    int top = terms[0].significand ? terms[0].exponent : -127, sum = 0;
    bool finite = std::isfinite(c);
    for (int i = 0; i < n; i++) {
        terms[i + 1] = aligned_product(a[i], b[i]);
        finite = finite && (a[i] & 127) != E4M3_NAN && (b[i] & 127) != E4M3_NAN;
        if (terms[i + 1].significand) top = std::max(top, terms[i + 1].exponent);
    }
    if (!finite) return std::bit_cast<float>(0x7FFFFFFF);
    for (int i = 0; i <= n; i++) {
        int shift = top - terms[i].exponent + F32_FRACTION - HOPPER_FRACTION;
        sum += shift < 31 ? terms[i].significand / (1 << std::max(shift, 0)) : 0;   // toward zero; a zero may
    }                                                                               // lie above the top
    int cut = 1 << std::max(0, int(std::bit_width(uint32_t(std::abs(sum)))) - HOPPER_FRACTION - 1);
    return std::ldexp(float(sum / cut * cut), top - HOPPER_FRACTION);
}

inline float sum_hopper(const Fp8Pair& p) {
    float sum = 0;
    for (int begin = 0, i = 0; begin < p.n; begin += SCALE_BLOCK, i++) {
        float block = 0;
        int end = p.end(begin, SCALE_BLOCK);
        for (int k = begin; k < end; k += HOPPER_STEP)
            block = hopper_step(block, p.a + k, p.b + k, std::min(HOPPER_STEP, end - k));
        sum = std::fma(p.a_scale[i] * p.b_scale[i], block, sum);
    }
    return sum;
}

// -- 14.4  gemm_fp8: D = A B^T, dense and grouped ------------------------------------------------

// e4m3 rows with their scales.
struct Fp8Matrix {
    const uint8_t* q;                      // (rows, n)
    const float* scale;                    // (ceil((first_row + rows) / tile), ceil(n / 128))
    int rows, n;
    int tile = 1;                          // rows that share a scale: 1 (activations) or 128 (weights)
    int first_row = 0;                     // of a view: the row of its first scales' tile where it begins

    EVERYWHERE const float* scale_row(int64_t r) const {
        return scale + (first_row + r) / tile * scale_blocks(n);
    }
    // Rows begin, begin + 1, ... where each has scales of its own.
    Fp8Matrix view(int64_t begin, int count) const {
        return {q + begin * n, scale_row(begin), count, n, tile, 0};
    }
    // The g-th of several matrices of this shape, one behind the other, each with whole tiles of scales.
    EVERYWHERE Fp8Matrix group(int64_t g) const {
        return {q + g * rows * n, scale + g * ((rows + tile - 1) / tile) * scale_blocks(n), rows, n, tile, 0};
    }
};

struct Fp8Output {
    std::byte* data;                       // (rows of A, rows of B)
    Dtype dtype;                           // BF16 or F32
    bool add = false;                      // D += A B^T: one more addition, before D is rounded

    EVERYWHERE Fp8Output at(int64_t i) const {
        return {data + i * (dtype == Dtype::BF16 ? 2 : 4), dtype, add};
    }
};

// The nearest bf16 of a float64, ties to even: not by way of f32, which would round twice.
EVERYWHERE inline float nearest_bf16(double x) {
    if (x == 0 || !std::isfinite(x)) return float(x);
    int exponent = std::max(std::ilogb(x), -126);
    return float(std::ldexp(std::nearbyint(std::ldexp(x, 7 - exponent)), exponent - 7));
}

// D[0] = sum, or D[0] + sum, rounded once. All NaNs are stored as the same one.
EVERYWHERE inline void put(const Fp8Output& out, double sum, Fp8Sum arithmetic) {
    const bool bf16 = out.dtype == Dtype::BF16;
    if (out.add) {
        float old = bf16 ? bf16_to_float(load<uint16_t>(out.data)) : load<float>(out.data);
        sum = arithmetic == Fp8Sum::EXACT ? double(old) + sum : double(old + float(sum));
    }
    float value = bf16 ? nearest_bf16(sum) : float(sum);
    if (std::isnan(sum)) value = std::numeric_limits<float>::quiet_NaN();
    uint16_t half = float_to_bf16(value);
    if (bf16) std::memcpy(out.data, &half, 2);
    else std::memcpy(out.data, &value, 4);
}

// a: (M, K)   b: (N, K)   out: (M, N). K = 0 is a sum of nothing; M = 0 or N = 0: nothing to do.
//                                                     DeepGEMM fp8_gemm_nt, recipes (1,128,128), (1,1,128)
inline void gemm_fp8(const Fp8Output& out, const Fp8Matrix& a, const Fp8Matrix& b, Fp8Sum arithmetic) {
    CHECK(a.n == b.n, "K is %d and %d", a.n, b.n);
    parallel_for(b.rows, [&](int64_t n) {
        for (int64_t m = 0; m < a.rows; m++) {
            Fp8Pair p{a.q + m * a.n, b.q + n * b.n, a.scale_row(m), b.scale_row(n), a.n};
            double sum = arithmetic == Fp8Sum::EXACT ? sum_exact(p)
                         : arithmetic == Fp8Sum::PROMOTED ? double(sum_promoted(p)) : double(sum_hopper(p));
            put(out.at(m * b.rows + n), sum, arithmetic);
        }
    }, int64_t(a.rows) * a.n);
}

// Row m of A belongs to group[m] of B (G, N, K), or to none (-1): it is not read, nor is D[m] written. Groups
// begin at multiples of 128 rows and what is missing to the next is -1, since a kernel looks at the first row
// of a tile alone.                                            DeepGEMM m_grouped_fp8_gemm_nt_contiguous
inline void gemm_fp8_contiguous(const Fp8Output& out, const Fp8Matrix& a, const Fp8Matrix& b,
                                std::span<const int> group, Fp8Sum arithmetic) {
    for (int64_t begin = 0, end; begin < a.rows; begin = end) {
        const int g = group[size_t(begin)];
        for (end = begin; end < a.rows && end - begin < SCALE_BLOCK && group[size_t(end)] == g;) end++;
        int64_t tile = begin / SCALE_BLOCK * SCALE_BLOCK;
        CHECK(g < 0 || begin == tile, "group %d begins at row %d", g, int(begin));
        if (g >= 0) gemm_fp8(out.at(begin * b.rows), a.view(begin, int(end - begin)), b.group(g), arithmetic);
    }
}

// a: (G, Mmax, K)   b: (G, N, K)   out: (G, Mmax, N)   rows: (G), how many of a group's Mmax are there; the
// others are neither read nor written.                            DeepGEMM m_grouped_fp8_gemm_nt_masked
inline void gemm_fp8_masked(const Fp8Output& out, const Fp8Matrix& a, const Fp8Matrix& b,
                            std::span<const int> rows, Fp8Sum arithmetic) {
    for (size_t g = 0; g < rows.size(); g++) {
        CHECK(rows[g] >= 0 && rows[g] <= a.rows, "group %zu: %d of %d rows", g, rows[g], a.rows);
        Fp8Matrix present = a.group(int64_t(g)).view(0, rows[g]);
        gemm_fp8(out.at(int64_t(g) * a.rows * b.rows), present, b.group(int64_t(g)), arithmetic);
    }
}

// The gradient of the experts' weights: group g sums over its own K_g = k[g] tokens, a multiple of 128 or 0.
// a: of each group (M, K_g), b: (N, K_g), tile 1, one group behind the other; their `n` does not count.
// out: (G, M, N)                                               DeepGEMM k_grouped_fp8_gemm_nt_contiguous
inline void gemm_fp8_k_grouped(const Fp8Output& out, Fp8Matrix a, Fp8Matrix b, std::span<const int> k,
                               Fp8Sum arithmetic) {
    for (size_t g = 0; g < k.size(); g++) {
        CHECK(k[g] >= 0 && k[g] % SCALE_BLOCK == 0, "group %zu has %d tokens", g, k[g]);
        a.n = b.n = k[g];
        gemm_fp8(out.at(int64_t(g) * a.rows * b.rows), a, b, arithmetic);
        a = a.group(1), b = b.group(1);    // the next lies behind this one
    }
}

// -- 14.5  the forward pass in bf16 and FP8 ------------------------------------------------------
//
// --arith bf16: each operation's result is rounded to bf16 as PyTorch does between kernels, and so is every
// number that DeepSeek's model.py keeps: embedding, norms, outputs of the linear layers, rotated queries and
// keys, scores, probabilities, silu and its product, both residual sums, logits. Not the gate: its logits and
// weights are f32 in transformers as here, for a rounding there picks other experts. An expert's output is
// rounded, the sum over experts only in the end. Weights count as stored.
//
// --arith fp8: the same, and a linear layer with FP8 weights gets its input in e4m3, 1 x 128, by V3's formula
// (powers of two where config.json's scale_fmt says ue8m0), summed as `promoted`; with --exact as `exact`.
// What stays in bf16 is what V3 section 3.3 lists: embedding, head, gate, norms, attention; and W^UK and W^UV
// in the absorbed form, where they are a part of attention. In the naive form they are a linear layer.
//
// Chapters 5 to 10 have no more of it than `rounded`: the table of kernels (5.4) is exchanged for one that
// rounds.

inline Kernels in_f32;                     // the table as it was

inline void round_to_bf16(real* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = bf16_to_float(float_to_bf16(float(x[i])));
}

inline void matmul_wide(const Product& p) {
    if (in_f32.matmul) in_f32.matmul({&p, 1});
    else matmul_plain(p);
}

// y = W x in FP8, y in bf16
inline void linear_fp8(const Product& p) {
    const Matrix& w = *p.w;
    const int64_t blocks = scale_blocks(w.cols), inside = w.first_row % SCALE_BLOCK;
    std::vector<uint8_t> q(size_t(p.T) * size_t(w.cols));
    std::vector<float> scale(size_t(p.T * blocks)), w_scale(size_t(scale_blocks(inside + w.rows) * blocks));
    std::vector<uint16_t> y(size_t(p.T) * size_t(w.rows));
    quantise_fp8(q.data(), scale.data(), p.x, p.T, w.cols, {Fp8Formula::V3, w.arith == Arith::FP8_UE8M0});
    std::memcpy(w_scale.data(), w.scale_row(0), w_scale.size() * sizeof(float));
    Fp8Matrix a{q.data(), scale.data(), p.T, w.cols};
    Fp8Matrix b{reinterpret_cast<const uint8_t*>(w.data), w_scale.data(), w.rows, w.cols, SCALE_BLOCK,
                int(inside)};
    gemm_fp8({reinterpret_cast<std::byte*>(y.data()), Dtype::BF16}, a, b,
             kernels.integers ? Fp8Sum::PROMOTED : Fp8Sum::EXACT);
    for (int t = 0; t < p.T; t++)
        for (int n = 0; n < w.rows; n++)
            p.out[t][n] = bf16_to_float(y[size_t(t) * size_t(w.rows) + size_t(n)]);
}

inline void matmul_rounded(std::span<const Product> products) {
    for (const Product& p : products) {
        if (p.w->arith >= Arith::FP8) linear_fp8(p);
        else matmul_wide(p);
        for (int t = 0; p.w->arith == Arith::BF16 && t < p.T; t++) round_to_bf16(p.out[t], p.w->rows);
    }
}

// attend_plain, each step rounded: q . k, times the scale, its softmax, the mean of the values
inline void attend_rounded(std::span<const Attention> heads, Rows scratch) {
    for (const Attention& a : heads) {
        const int64_t dk = a.k.cols, dv = a.v.cols, T = int64_t(a.n.size());
        parallel_for(T * a.heads, [&](int64_t i) {
            int64_t t = i / a.heads, h = i % a.heads;
            const int n = a.n[size_t(t)];
            real *out = a.out[t] + h * dv, *p = scratch[thread_index()];
            Matrix k = a.k;
            k.rows = n;
            matmul_wide({{p, 0}, {a.q[t] + h * dk, 0}, &k, 1});
            round_to_bf16(p, n);
            for (int j = 0; j < n; j++) p[j] *= a.scale;
            round_to_bf16(p, n);
            softmax_and_lse(in_f32.softmax, p, 1, n, a.lse_of(t, h));
            round_to_bf16(p, n);
            std::fill_n(out, dv, real(0));
            in_f32.weigh({out, 0}, {p, 0}, a.v, 1, n);
            round_to_bf16(out, dv);
        }, a.n.back() * (dk + dv));
    }
}

inline void silu_times_rounded(real* gate, const real* up, int n) {
    const Vector one(size_t(n), 1);
    in_f32.silu_times(gate, one.data(), n);
    round_to_bf16(gate, n);
    for (int i = 0; i < n; i++) gate[i] *= up[i];
    round_to_bf16(gate, n);
}

// After the kernels were chosen: from now on in this arithmetic.
inline void use_arith(Arith arith) {
    in_f32 = kernels;
    kernels.arith = arith;
    if (arith == Arith::F32) return;
    kernels.round = round_to_bf16;
    kernels.matmul = matmul_rounded, kernels.attend = attend_rounded, kernels.silu_times = silu_times_rounded;
}

// Such weights make integers of their inputs (5.2): there is nothing left to round.
[[noreturn]] inline void refuse_integers(Dtype dtype) {
    fail("--arith: %s weights are multiplied in integers; --exact dequantises them", format_of(dtype).name);
}

// Tells a model's linear layers, the gates left out, what they are computed in.
inline void set_arith(Model& m, MlaForm form) {
    if (kernels.arith == Arith::F32) return;
    const Arith fp8 = m.config.ue8m0 ? Arith::FP8_UE8M0 : Arith::FP8;
    bool any = kernels.arith == Arith::BF16;
    each_matrix(m, [&](Matrix& w, Role role) {
        if (role == Role::EMBED || role == Role::GATE) return;
        if (in_integers(w)) refuse_integers(w.dtype);
        const bool linear = role != Role::HEAD && (role != Role::LATENT || form == MlaForm::NAIVE);
        w.arith = Arith::BF16;
        if (linear && kernels.arith == Arith::FP8 && w.dtype == Dtype::F8_E4M3) w.arith = fp8, any = true;
    });
    for (Layer& l : m.layers)
        for (Matrix* w : {&l.gqa.wq, &l.gqa.wk, &l.gqa.wv})          // rounded after their bias, not before
            if (m.config.qkv_bias && w->arith == Arith::BF16) w->arith = Arith::F32;
    if (!any) fail("--arith fp8: %s has no FP8 weights", m.config.file.c_str());
}

// =================================================================================================
// Chapter 15. Many machines
// =================================================================================================
//
// 671 billion numbers fit on no machine. How do several compute one network, and what does it cost?
//
// Most of the numbers are experts, so those are what is spread: each of R ranks (a process, or a GPU) owns a
// part of them. Everything else is small and every rank has it; each works on requests of its own. Only at
// the experts do they meet. A rank's token goes to the ranks that own its K experts, once to each, and what
// they made of it comes back:
//
//      rank 0   u --gate--> dispatch --.  .--> experts 0..3 --.  .--> combine --> y
//                                       \/                     \/
//                                       /\                     /\                       a layer of the
//      rank 1   u --gate--> dispatch --'  '--> experts 4..7 --'  '--> combine --> y     experts, R = 2
//
// What it costs, for V3's 58 layers of experts. A token's row is 7168 bytes in FP8 with 224 of scales there
// and 14336 in BF16 back. A token reaches at most 4 nodes (its gate's best groups), and crosses to each once;
// inside, a link 3.2 times as fast (160 over 50 GB/s, V3 section 3.2.2) hands it on, so up to 3.2 experts a
// node cost nothing more. On paper, with the published shares (DeepSeek's open-infra-index; V3 section 3.4):
//
//      prefill, EP32     9 routed experts a GPU, 288 with 32 copies. 4096 tokens go to 5.29 ranks each:
//                        160 MB there, 311 MB back; 7/8 of it over 160 GB/s: 0.88 and 1.70 ms a layer
//      decode, EP144     2 a GPU, 288; 128 tokens: 7.6 MB there, 14.7 MB back; over a card of 50 GB/s 143 and
//                        277 us: a step of 58 layers sends for 24 ms, unless two micro-batches hide it
//      decode, EP320     1 a GPU, 64 GPUs for copies and shared ones: all but 1/40 leaves, 148 and 286 us
//
// Published: 14.8 thousand tokens a second out of a node of 8 GPUs, 1.85 a ms and GPU: with 128 tokens each,
// a step takes at most 69 ms. `bench --traffic` counts bytes, and predicts DeepEP's times.

// -- 15.1  dispatch_layout: who gets what --------------------------------------------------------

// Physical expert p is one that stands somewhere: an expert, or with redundant ones (15.5) a copy of it.
struct RankShape {
    int R, per_node;               // ranks, and how many of them, neighbours, share a machine: a node
    const int* first;              // (R + 1): rank r has the physical experts first[r] .. first[r + 1]

    int nodes() const { return (R + per_node - 1) / per_node; }
    int owner(int p) const { return int(std::upper_bound(first, first + R + 1, p) - first) - 1; }
    int node(int r) const { return r / per_node; }
    int begin(int n) const { return n * per_node; }                    // its ranks
    int end(int n) const { return std::min(R, (n + 1) * per_node); }
    // The rank of node n that has r's place in it.
    int forwarder(int r, int n) const { return begin(n) + r % per_node % (end(n) - begin(n)); }
};
struct Layout {
    int *per_rank, *per_node;      // (R), (nodes): tokens that go there, each counted once
    int* per_expert;               // (first[R]): pairs
    uint8_t* in_rank;              // (T, R): 1 where token t goes to rank r
};

// As DeepEP's get_dispatch_layout.   idx: (T, K), physical experts; -1: none
inline void dispatch_layout(const Layout& out, const int* idx, int T, int K, const RankShape& shape) {
    std::fill_n(out.per_rank, shape.R, 0), std::fill_n(out.per_node, shape.nodes(), 0);
    std::fill_n(out.per_expert, shape.first[shape.R], 0);
    std::fill_n(out.in_rank, int64_t(T) * shape.R, uint8_t(0));
    for (int64_t t = 0; t < T; t++) {
        uint8_t* in_rank = out.in_rank + t * shape.R;
        for (int64_t i = t * K; i < (t + 1) * K; i++) {
            if (idx[i] < 0) continue;
            out.per_expert[idx[i]]++;
            in_rank[shape.owner(idx[i])] = 1;
        }
        for (int r = 0; r < shape.R; r++) out.per_rank[r] += in_rank[r];
        for (int n = 0; n < shape.nodes(); n++)
            out.per_node[n] += *std::max_element(in_rank + shape.begin(n), in_rank + shape.end(n));
    }
}

// -- 15.2  dispatch: a copy to each rank that needs one ------------------------------------------

#include "ranks.h"   // Wire: all ranks call its `exchange` together, each with bytes for every rank

// In which order a token's results are added. EXPERT: all come home, and are added as one process adds them
// (10.3), so the bits are the same. RANK: a rank adds what its own experts made, home adds the ranks in their
// order. HIERARCHICAL: between them a node adds what its ranks made, in bf16. One row travels in place of K,
// and in place of those of all ranks that share a node.
enum class CombineOrder : uint8_t { EXPERT, RANK, HIERARCHICAL };

// What all ranks agree on.
struct Trip {
    RankShape shape;
    int K, D;
    Dtype there = REAL, back = REAL;       // of the numbers on their way: REAL, BF16; there also F8_E4M3
    CombineOrder order = CombineOrder::EXPERT;

    Dtype result() const { return order == CombineOrder::HIERARCHICAL ? Dtype::BF16 : back; }
    // A token: whose, which one there, its experts and their weights, its row.
    size_t packet() const {
        return size_t(2 + K) * sizeof(int) + size_t(K) * sizeof(real) + encoded_bytes(there, D);
    }
    // A result: whose token, which one, of which of its experts, the row.
    size_t result_packet() const { return 3 * sizeof(int) + encoded_bytes(result(), D); }
    // Whether a token with these experts goes to one of the ranks begin .. end.   idx: (K)
    bool goes(const int* idx, int begin, int end) const {
        const int low = shape.first[begin], high = shape.first[end];
        return std::any_of(idx, idx + K, [&](int e) { return e >= low && e < high; });
    }
};

// What dispatch leaves on a rank: rows in the order of their source rank, then of their token there.
struct Received {
    int n = 0;
    Vector x;                              // (n, D)
    std::vector<int> idx;                  // (n, K): experts of this rank, from 0; -1: of another
    Vector weight;                         // (n, K); 0 for those
    std::vector<int> source, token, via;   // (n): whose it is, which one there, and who handed it on
    std::vector<int> first, slot, row;     // (own experts + 1), (n, K), (pairs): as 10.2's
    Traffic there, back;                   // bytes that this rank sent
};

// Rows from the packets that each forwarder handed on.
inline void unpack(Received& got, const Trip& v, int rank, const Parcels& rows) {
    struct Packet { int source, token, via; const std::byte* at; };
    std::vector<Packet> packets;
    for (size_t via = 0; via < rows.size(); via++)
        each_packet(rows[via], v.packet(), [&](const std::byte* p) {
            packets.push_back({load<int>(p), load<int>(p + sizeof(int)), int(via), p});
        });
    std::stable_sort(packets.begin(), packets.end(), [](const Packet& a, const Packet& b) {
        return std::pair(a.source, a.token) < std::pair(b.source, b.token);
    });
    const size_t n = packets.size(), K = size_t(v.K);
    const int begin = v.shape.first[rank], end = v.shape.first[rank + 1];
    got = {}, got.n = int(n), got.x.resize(n * size_t(v.D)), got.idx.resize(n * K), got.weight.resize(n * K);
    for (const Packet& p : packets)
        got.source.push_back(p.source), got.token.push_back(p.token), got.via.push_back(p.via);
    parallel_for(int64_t(n), [&](int64_t i) {
        const std::byte* experts = packets[size_t(i)].at + 2 * sizeof(int);
        const std::byte* weights = experts + K * sizeof(int);
        for (size_t k = 0; k < K; k++) {
            const int e = load<int>(experts + k * sizeof(int));
            const bool here = e >= begin && e < end;
            got.idx[size_t(i) * K + k] = here ? e - begin : -1;
            got.weight[size_t(i) * K + k] = here ? load<real>(weights + k * sizeof(real)) : 0;
        }
        decode(got.x.data() + i * v.D, weights + K * sizeof(real), v.D, v.there);
    }, 4 * int64_t(v.D));
}

// Slots by expert, an expert's in the order of the rows: 10.2, but for pairs that are another rank's.
inline void group_rows(Received& got, int K, int own) {
    got.first.assign(size_t(own) + 1, 0), got.slot.assign(size_t(got.n) * size_t(K), -1);
    for (int e : got.idx) if (e >= 0) got.first[size_t(e) + 1]++;
    std::partial_sum(got.first.begin(), got.first.end(), got.first.begin());
    std::vector<int> next = got.first;
    got.row.resize(size_t(got.first.back()));
    for (size_t i = 0; i < got.idx.size(); i++) {
        if (got.idx[i] < 0) continue;
        got.slot[i] = next[size_t(got.idx[i])]++;
        got.row[size_t(got.slot[i])] = int(i) / K;
    }
}

// DeepEP's dispatch, in two hops: a token crosses to each node once, to the rank there that has its source's
// place, and is handed on inside (V3 section 3.2.2). With one node the first hop stays at home; with a rank a
// node, the second.   x: (T, D)   idx: (T, K), physical experts; -1: none   weight: (T, K)
inline void dispatch(Received& got, Wire& wire, const Trip& v, const real* x, const int* idx,
                     const real* weight, int T) {
    const RankShape& s = v.shape;
    const int node = s.node(wire.rank);
    Parcels out(size_t(s.R)), inside(size_t(s.R)), in;
    Parcel packet;
    std::vector<int> experts(size_t(v.K));
    Traffic traffic;
    for (int t = 0; t < T; t++) {
        packet.clear(), put(packet, wire.rank), put(packet, t);
        for (int k = 0; k < v.K; k++) put(packet, idx[t * v.K + k]);
        for (int k = 0; k < v.K; k++) put(packet, weight[t * v.K + k]);
        encode(packet, x + int64_t(t) * v.D, v.D, v.there);
        for (int n = 0; n < s.nodes(); n++)
            if (v.goes(idx + t * v.K, s.begin(n), s.end(n)))
                append(out[size_t(s.forwarder(wire.rank, n))], packet.data(), packet.size());
    }
    wire.exchange(out, in), traffic.count(out, wire.rank, s.per_node);
    for (const Parcel& from : in) {
        each_packet(from, v.packet(), [&](const std::byte* p) {
            std::memcpy(experts.data(), p + 2 * sizeof(int), experts.size() * sizeof(int));
            for (int r = s.begin(node); r < s.end(node); r++)
                if (v.goes(experts.data(), r, r + 1)) append(inside[size_t(r)], p, v.packet());
        });
    }
    wire.exchange(inside, in), traffic.count(inside, wire.rank, s.per_node);
    unpack(got, v, wire.rank, in), got.there = traffic;
    group_rows(got, v.K, s.first[wire.rank + 1] - s.first[wire.rank]);
}

// -- 15.3  combine: the results go home ----------------------------------------------------------

// Of the rows of this rank, for who handed them on.   expert_out: (pairs, D), by slot
inline Parcels results_of_rows(const Trip& v, const Received& got, const real* expert_out) {
    Parcels out(size_t(v.shape.R));
    Vector sum(size_t(v.D));
    for (int i = 0; i < got.n; i++) {
        Parcel& to = out[size_t(got.via[size_t(i)])];
        auto add_result = [&](int k, const real* row) {
            put(to, got.source[size_t(i)]), put(to, got.token[size_t(i)]), put(to, k);
            encode(to, row, v.D, v.result());
        };
        std::fill(sum.begin(), sum.end(), real(0));
        for (int k = 0; k < v.K; k++) {
            const size_t pair = size_t(i) * size_t(v.K) + size_t(k);
            if (got.slot[pair] < 0) continue;
            const real* row = expert_out + int64_t(got.slot[pair]) * v.D;
            if (v.order == CombineOrder::EXPERT) add_result(k, row);
            else kernels.weigh({sum.data(), 0}, {&got.weight[pair], 0}, real_matrix(row, 1, v.D), 1, 1);
        }
        if (v.order != CombineOrder::EXPERT) add_result(0, sum.data());
    }
    return out;
}

// What the ranks of this node made of the tokens that it handed on, for their sources: in the order of the
// ranks, or their sums.
inline Parcels handed_back(const Trip& v, const Parcels& in) {
    Parcels out(size_t(v.shape.R));
    std::map<std::pair<int, int>, Vector> sums;          // by source and token
    Vector part(size_t(v.D));
    for (const Parcel& from : in) {
        each_packet(from, v.result_packet(), [&](const std::byte* p) {
            const int source = load<int>(p);
            if (v.order != CombineOrder::HIERARCHICAL)
                return append(out[size_t(source)], p, v.result_packet());
            Vector& sum = sums.try_emplace({source, load<int>(p + sizeof(int))}, part.size()).first->second;
            decode(part.data(), p + 3 * sizeof(int), v.D, v.result());
            for (size_t i = 0; i < sum.size(); i++) sum[i] += part[i];
        });
    }
    for (auto& [whose, sum] : sums) {
        Parcel& to = out[size_t(whose.first)];
        put(to, whose.first), put(to, whose.second), put(to, 0);
        encode(to, sum.data(), v.D, v.result());
    }
    return out;
}

// The results of this rank's T tokens, in the order in which they are to be added, with their factors: what
// `combine` (10.3) takes, with slot 0, 1, 2 ...   rows: (T, K, D)   factor: (T, K), before: the weights
inline void bring_home(real* rows, real* factor, int T, Wire& wire, const Trip& v, Received& got,
                       const real* expert_out) {
    const bool expert = v.order == CombineOrder::EXPERT;
    Parcels out = results_of_rows(v, got, expert_out), in;
    wire.exchange(out, in), got.back.count(out, wire.rank, v.shape.per_node);
    out = handed_back(v, in);
    wire.exchange(out, in), got.back.count(out, wire.rank, v.shape.per_node);
    std::vector<int> used(static_cast<size_t>(T));       // rows of each token so far
    std::fill_n(rows, int64_t(T) * v.K * v.D, real(0));
    if (!expert) std::fill_n(factor, T * v.K, real(0));
    for (const Parcel& from : in) {
        each_packet(from, v.result_packet(), [&](const std::byte* p) {
            const int t = load<int>(p + sizeof(int)), k = load<int>(p + 2 * sizeof(int));
            const int row = t * v.K + (expert ? k : used[size_t(t)]++);
            decode(rows + int64_t(row) * v.D, p + 3 * sizeof(int), v.D, v.result());
            if (!expert) factor[row] = 1;
        });
    }
}

// DeepEP's combine, but for the order.   out: (T, D) of this rank's tokens   weight: (T, K), as dispatched
// expert_out: (pairs, D), by slot
inline void combine(real* out, const real* weight, int T, Wire& wire, const Trip& v, Received& got,
                    const real* expert_out) {
    const size_t pairs = size_t(T) * size_t(v.K);
    Vector rows(pairs * size_t(v.D)), factor(weight, weight + pairs);
    std::vector<int> slot(pairs);
    std::iota(slot.begin(), slot.end(), 0);
    bring_home(rows.data(), factor.data(), T, wire, v, got, expert_out);
    combine(out, rows.data(), slot.data(), factor.data(), v.K, nullptr, T, v.D);
}

// -- 15.4  the model on ranks --------------------------------------------------------------------

// Where the experts stand: rank r has the physical experts first[r] .. first[r + 1] of each layer.
struct Placement {
    int E, R;
    std::vector<int> first;                // (R + 1)
    std::vector<std::vector<int>> expert;  // (layers) of (first[R]): which expert each physical one is

    // Neighbours together, shares that differ by one at most.
    static Placement even(int layers, int E, int R) {
        Placement p{E, R, {}, std::vector<std::vector<int>>(size_t(layers), std::vector<int>(size_t(E)))};
        for (int r = 0; r <= R; r++) p.first.push_back(int(int64_t(E) * r / R));
        for (auto& layer : p.expert) std::iota(layer.begin(), layer.end(), 0);
        return p;
    }
    std::span<const int> of(int r, int l) const {
        const size_t begin = size_t(first[size_t(r)]), end = size_t(first[size_t(r) + 1]);
        return std::span(expert[size_t(l)]).subspan(begin, end - begin);
    }
    bool has(int r, int l, int e) const {
        const std::span<const int> all = of(r, l);
        return std::find(all.begin(), all.end(), e) != all.end();
    }
    // idx (T, K) as physical experts; of several copies the tokens take each in turn.
    std::vector<int> physical(int l, const int* idx, int T, int K) const {
        std::vector<std::vector<int>> copies(static_cast<size_t>(E));
        for (int p = 0; p < first.back(); p++) copies[size_t(expert[size_t(l)][size_t(p)])].push_back(p);
        std::vector<int> out;
        for (int i = 0; i < T * K; i++) {
            const std::vector<int>& of = copies[size_t(idx[i])];
            out.push_back(of[size_t(i / K) % of.size()]);
        }
        return out;
    }
};

// The experts of all ranks, as a session's layers call them. A pass through the layers is the work of all
// ranks: those that have no tokens of their own in it serve those that have.
class ExpertRanks : public Crew {
public:
    // base: what travels and comes back, and ranks a node
    ExpertRanks(Wire& wire, Model& m, const Placement& p, const Trip& base)
        : wire_(wire), m_(m), p_(p), trip_(base) {
        const Config& c = m.config;
        trip_.shape.R = p.R, trip_.shape.first = p_.first.data(), trip_.K = c.K, trip_.D = c.D;
        own_.resize(p.expert.size());
        for (int l = 0; l < int(p.expert.size()); l++) {
            if (!c.is_moe(l)) continue;
            const Moe& moe = l < c.n_layers ? m.layers[size_t(l)].moe : m.mtp[0].layer.moe;
            for (int e : p_.of(wire.rank, l)) own_[size_t(l)].experts.push_back(moe.experts[size_t(e)]);
        }
    }

    // Returns when it is the turn of such a pass: before, this rank serves the others' of another kind.
    void begin(Pass mine) override {
        if (left_) throw LostRank("interrupted in the middle of a pass, the ranks cannot go on together");
        for (;;) {
            Parcels out(size_t(wire_.size), Parcel{std::byte(mine)}), in;
            wire_.exchange(out, in, true);
            Pass now = mine;
            for (const Parcel& wish : in) now = std::min(now, Pass(wish.at(0)));
            const Config& c = m_.config;
            const int first = now == Pass::MTP ? c.n_layers : 0, n = now == Pass::MTP ? 1 : c.n_layers;
            for (int l = first; now != Pass::DONE && l < first + n; l++) left_ += c.is_moe(l);
            if (now == mine) return;
            for (int l = first; l < first + n; l++)
                if (c.is_moe(l)) mixture(l, 0);
        }
    }
    // This rank has no more tokens; returns when nobody has.
    void finish() { begin(Pass::DONE); }

    // Makes of a.expert_out, a.slot and a.gate_weight what combine takes.
    void experts(Session& s, const Moe& w, int l, int T) override {
        Activations& a = s.a;
        const std::vector<int> idx = p_.physical(l, a.expert_idx, T, trip_.K);
        mixture(l, T, a.u, idx.data(), a.gate_weight, a.expert_out);
        std::iota(a.slot, a.slot + T * trip_.K, 0);
        if (w.shared.w_gate) swiglu(a.expert_in, a.u, w.shared, T, a.gate, a.up);
    }

private:
    Wire& wire_;
    Model& m_;
    Placement p_;
    Trip trip_;
    int left_ = 0;                         // layers of experts of the pass that is under way
    std::vector<Moe> own_;                 // (layers): this rank's experts, in the order of their places
    Received got_;
    std::vector<std::byte> memory_;

    // x: (T, D)   idx, factor: (T, K); the weights, then the results' factors   rows: (T, K, D), results
    void mixture(int l, int T, const real* x = nullptr, const int* idx = nullptr, real* factor = nullptr,
                 real* rows = nullptr) {
        dispatch(got_, wire_, trip_, x, idx, factor, T);
        const size_t pairs = got_.row.size(), D = size_t(trip_.D), F = size_t(m_.config.F);
        ExpertWork work{got_.x.data(), int(pairs), 1, got_.first.data(), got_.row.data(), {}, {}, {}, {}, {}};
        take_from(memory_, [&](Arena& arena) {
            work.in = arena.take<real>(pairs * D), work.out = arena.take<real>(pairs * D);
            work.gate = arena.take<real>(pairs * F), work.up = arena.take<real>(pairs * F);
        });
        if (pairs) run_experts(work, own_[size_t(l)]);
        bring_home(rows, factor, T, wire_, trip_, got_, work.out);
        left_--;
    }
};

// -- 15.5  rebalance_experts: copies of those that are asked most --------------------------------

// Items 0 .. n - 1 in packs of equal size: the heaviest first, each into the lightest pack that has room; of
// equals the first. Pack after pack, each in the order in which it was filled. A pack each: as they are.
// weight: (n)
inline std::vector<int> pack_evenly(const std::vector<double>& weight, int packs) {
    const size_t n = weight.size(), room = n / size_t(packs);
    std::vector<int> heaviest(n), out;
    std::iota(heaviest.begin(), heaviest.end(), 0);
    if (room == 1) return heaviest;
    std::stable_sort(heaviest.begin(), heaviest.end(),
                     [&](int a, int b) { return weight[size_t(a)] > weight[size_t(b)]; });
    std::vector<std::vector<int>> pack(static_cast<size_t>(packs));
    std::vector<double> load(static_cast<size_t>(packs));
    for (int i : heaviest) {
        size_t best = pack.size();
        for (size_t p = 0; p < pack.size(); p++)
            if (pack[p].size() < room && (best == pack.size() || load[p] < load[best])) best = p;
        pack[best].push_back(i), load[best] += weight[size_t(i)];
    }
    for (const std::vector<int>& p : pack) out.insert(out.end(), p.begin(), p.end());
    return out;
}

// DeepSeek's EPLB: which expert each of P physical ones is, so that R ranks have equal work. Where the nodes
// divide the groups of the gate, a group stays on one node, and so do the copies of its experts; else groups
// and nodes count as one.   load: (E), tokens of each expert
inline std::vector<int> rebalance_experts(const std::vector<double>& load, int P, int groups, int nodes,
                                          int R) {
    const int E = int(load.size());
    if (groups % nodes) groups = nodes = 1;
    CHECK(E % groups == 0 && P >= E && P % R == 0 && R % nodes == 0, "%d of %d on %d", E, P, R);
    const int size = E / groups;
    std::vector<double> group_load(static_cast<size_t>(groups));
    for (int e = 0; e < E; e++) group_load[size_t(e / size)] += load[size_t(e)];
    const std::vector<int> order = pack_evenly(group_load, nodes);
    std::vector<int> out;
    for (int n = 0; n < nodes; n++) {
        std::vector<int> copy;                                             // which expert each copy here is
        std::vector<double> count(size_t(E), 1), share;
        for (int i = n * groups / nodes; i < (n + 1) * groups / nodes; i++)
            for (int e = 0; e < size; e++) copy.push_back(order[size_t(i)] * size + e);
        const size_t own = copy.size();
        auto each = [&](int e) { return load[size_t(e)] / count[size_t(e)]; };
        while (int(copy.size()) < P / nodes) {                             // the first that has most a copy
            const auto most = std::max_element(copy.begin(), copy.begin() + int64_t(own),
                                               [&](int a, int b) { return each(a) < each(b); });
            const int e = *most;
            copy.push_back(e), count[size_t(e)]++;
        }
        for (int e : copy) share.push_back(each(e));
        for (int i : pack_evenly(share, R / nodes)) out.push_back(copy[size_t(i)]);
    }
    return out;
}

// -- 15.6  pipelines: a timetable for each rank --------------------------------------------------
//
// Layers, too, can be spread: a rank has a stage of them, and micro-batches flow through the stages and back.
// A rank that waits is a bubble. Backward is two things: of the inputs, on which the rank before waits, and
// of the weights, W, on which nobody does: put off, it fills bubbles (ZB1P). DualPipe feeds the pipeline from
// both ends, so that a forward of one direction runs together with a backward of the other, and each hides
// the other's communication; DualPipeV folds it, with half the ranks.

enum class Schedule : uint8_t { GPIPE, ONE_F_ONE_B, ZB1P, DUALPIPE, DUALPIPEV };

// 'F'; 'B': for inputs and weights; 'b': for inputs alone, its 'W' comes later. Those of stages that follow
// each other meet in messages: F (m, s) sends to F (m, s + 1), B (m, s) to B (m, s - 1).
struct Op {
    char kind;
    int micro, stage;
};
using Step = std::vector<Op>;              // one; or two, overlapped: an F and a B
struct Plan {
    Schedule schedule;
    int P, M, stages;
    std::vector<std::vector<Step>> ranks;  // (P): what each does, in order

    bool two_ways() const { return schedule == Schedule::DUALPIPE; }
    // Who has a stage: DualPipe's second half of the micro-batches comes from the other end.
    int rank_of(const Op& op) const {
        if (two_ways() && op.micro >= M / 2) return P - 1 - op.stage;
        return op.stage < P ? op.stage : 2 * P - 1 - op.stage;
    }
};

// Each rank's list is written as a table of how often which steps: "F0B1" is a forward of its chunk 0 with a
// backward of its chunk 1 (DualPipe's two directions, DualPipeV's two arms). W is of the oldest 'b'.
struct Phase { int times; const char* steps; };

inline std::vector<Phase> phases(Schedule schedule, int P, int M, int rank) {
    const int behind = P - 1 - rank;
    if (schedule == Schedule::GPIPE) return {{M, "F0"}, {M, "B0"}};
    if (schedule == Schedule::ONE_F_ONE_B) return {{behind, "F0"}, {M - behind, "F0 B0"}, {behind, "B0"}};
    if (schedule == Schedule::ZB1P)
        return {{behind, "F0"}, {rank, "F0 b0"}, {M - P + 1, "F0 b0 W"}, {behind, "b0 W"}, {rank, "W"}};
    // From the outer rank 0 to the middle; the other half is its mirror.          DualPipe's eight steps
    const bool folded = schedule == Schedule::DUALPIPEV;
    const int half = folded ? P : P / 2, at = folded ? rank : std::min(rank, behind), inner = half - 1 - at;
    const int full = (at + 1) / 2, steady = (folded ? M : M / 2) - 2 * half + at + 1;
    std::vector<Phase> all = {{2 * inner, "F0"}, {at + 1, "F0 F1"}, {inner, "b1 W F1"}};
    if (inner == 0) all.push_back({1, "F0 B1 F1B0"});
    all.push_back({steady - (inner == 0), "F0B1 F1B0"}), all.push_back({inner, "B1 F1B0"});
    all.push_back({full, "B1 B0"});
    if (at % 2 == 0) all.push_back({1, "B1 b0"});
    all.push_back({at + 1 - full - (at % 2 == 0), "b1 b0"});
    all.push_back({inner, "W b0"}), all.push_back({at + 1, "W"});
    return all;
}

#include "pipeline.h"   // the lists; and on paper their timetable, their bubble, whether they can be executed

// =================================================================================================
// Chapter 19. The bill
// =================================================================================================
//
// What does a model cost, before anything is loaded? Parameters decide the size of the files, the active ones
// the time of a token, the cache the length of a conversation. config.json alone says all three: binding a
// model without its files (11.2) counts what it would ask for.

// -- 19.1  parameters, bytes, cache --------------------------------------------------------------

struct Bill {
    uint64_t total = 0, active = 0, mtp = 0;             // parameters: main model, of a token, MTP module
    std::map<std::string, uint64_t> bytes;               // of the files, by dtype
    uint64_t kv = 0, full_kv = 0;                        // bytes a token, main layers: ours, full attention
};

// kv: how the cache is stored
inline Bill make_bill(const Config& c, const fs::path& folder, Dtype kv) {
    Model counted;
    counted.config = c;
    counted.config.n_mtp = 0;
    Binder main(nullptr, "", false), mtp(nullptr, "", false);
    bind_model(main, counted);
    if (c.n_mtp) bind_mtp(mtp, c);
    Bill b{main.parameters, main.parameters, mtp.parameters, {}, 0, 0};
    uint64_t biases = c.gate == Gate::NOAUX_TC ? uint64_t(c.E) : 0;   // they pick, but compute nothing
    for (int l = 0; l < c.n_layers; l++) {
        if (c.is_moe(l)) b.active -= uint64_t(c.E - c.K) * 3 * uint64_t(c.D) * uint64_t(c.F) + biases;
    }
    if (is_gguf(folder) || has_weights(folder))
        for (Checkpoint all = open_checkpoint(folder); auto& [name, t] : all.tensors)
            if (c.n_mtp || !of_mtp(c, name)) b.bytes[t.dtype] += t.bytes;
    b.kv = uint64_t(c.n_layers) * row_bytes(kv, c.cache_width());
    b.full_kv = uint64_t(c.n_layers) * uint64_t(c.H) * row_bytes(kv, c.q_dim() + c.v_dim());
    return b;
}

// -- 19.2  the memory plan -----------------------------------------------------------------------

inline double gigabytes(uint64_t bytes) { return double(bytes) / 1e9; }

struct MemoryPlan {
    uint64_t weights, cache, activations, available;   // weights: those that are not in the mapped files
    const Device* device = &CPU;
    std::string where() const { return device == &CPU ? "" : text_of(" on %s", device->name); }
    uint64_t needed() const { return weights + cache + activations; }
    bool fits() const { return available == 0 || needed() <= available; }
    // What weights may take that could stay in the files: a tenth is left to other programs.
    uint64_t left_for_weights() const {
        return available - std::min(available, cache + activations + available / 10);
    }
};

inline MemoryPlan memory_plan(uint64_t weights, const Config& c, const SessionOptions& s,
                              const Device& device) {
    return {weights, cache_bytes(c, s.context, s.kv), Activations::bytes(c, s, device), device.available(),
            &device};
}

// Fails where it does not fit, and says what would.
inline void require_memory(const MemoryPlan& plan, const Config& c, SessionOptions s) {
    if (plan.fits()) return;
    const int asked = s.context;
    int fits = 0;                                        // the longest context that does
    for (int most = asked - 1; fits < most;) {
        MemoryPlan shorter = plan;
        s.context = fits + (most - fits + 1) / 2;
        shorter.cache = cache_bytes(c, s.context, s.kv);
        shorter.activations = Activations::bytes(c, s, *plan.device);
        if (shorter.fits()) fits = s.context;
        else most = s.context - 1;
    }
    std::string advice = fits ? text_of("; --ctx %d fits", fits) : "";
    if (s.kv == REAL) advice += "; --kv bf16 halves the cache";
    fail("not enough memory%s for --ctx %d: %scache %.2f GB and activations %.2f GB need %.2f GB more than "
         "the %.2f GB available%s",
         plan.where().c_str(), asked,
         plan.weights ? text_of("weights %.2f GB, ", gigabytes(plan.weights)).c_str() : "",
         gigabytes(plan.cache), gigabytes(plan.activations), gigabytes(plan.needed() - plan.available),
         gigabytes(plan.available), advice.c_str());
}

// What `logits` keeps until it is written (13.4), in the host's memory.
struct InsideBill {
    uint64_t logits = 0, mtp_logits = 0, taps = 0;

    InsideBill() = default;
    InsideBill(const Config& c, MlaForm form, int rows, bool with_taps) {
        const uint64_t n = uint64_t(rows), V = uint64_t(c.V), D = uint64_t(c.D), H = uint64_t(c.H);
        auto sum = [](auto... sides) { return (uint64_t(sides) + ...); };
        logits = n * V * sizeof(real), mtp_logits = c.n_mtp ? (n - 1) * V * sizeof(real) : 0;
        if (!with_taps) return;
        // embed, norm; of a layer: norms, branches and residual, lse, o; what either attention has besides
        uint64_t numbers = 2 * D + uint64_t(c.n_layers) * sum(5 * D, H, H * uint64_t(c.v_dim()));
        uint64_t latent = c.mla() ? sum(c.Rq, H * uint64_t(c.q_dim()), c.Rkv, c.Dr) : 0;
        if (c.mla() && form == MlaForm::ABSORBED) latent += H * uint64_t(2 * c.Rkv + c.Dr);
        uint64_t experts = sum(2 * c.E, 2 * c.K, D, c.n_shared ? D : 0);
        if (c.gate != Gate::GREEDY) experts += uint64_t(c.n_group);
        for (int l = 0; l < c.n_layers; l++) numbers += latent + (c.is_moe(l) ? experts : 0);
        taps = (n * numbers + (c.n_mtp ? (n - 1) * 2 * D : 0)) * sizeof(real);
    }
    // Fails where it does not fit, beside a session on the CPU.
    void require(const MemoryPlan& plan) const {
        const uint64_t free = CPU.available(), used = plan.device == &CPU ? plan.needed() : 0;
        const uint64_t sum = logits + mtp_logits + taps, left = free - std::min(free, used);
        if (free && sum > left)
            fail("not enough memory for the result: logits %.2f GB, mtp_logits %.2f GB and taps %.2f GB need "
                 "%.2f GB more than the %.2f GB left", gigabytes(logits), gigabytes(mtp_logits),
                 gigabytes(taps), gigabytes(sum - left), gigabytes(left));
    }
};

// -- 19.3  loading within the plan ---------------------------------------------------------------

// Bytes of the weights that need memory of their own, before anything is loaded: those that are quantised
// while loading, or all, where they are copied to a device. Weights that are not there count as BF16.
inline uint64_t weight_bytes(const fs::path& folder, const Config& c, const std::string& quant,
                             const Device& device) {
    const bool made = quant != "none", look = device.upload && (is_gguf(folder) || has_weights(folder));
    if (!made && !device.upload) return 0;
    Checkpoint files = look ? open_checkpoint(folder) : Checkpoint{};
    Quantiser quantiser{made ? &file_type(quant) : nullptr, &c, {}, {}};
    Binder binder(look ? &files : nullptr, folder, c.fp8, made ? &quantiser : nullptr);
    Model counted;
    counted.config = c;
    bind_model(binder, counted);
    return device.upload ? binder.bytes : quantiser.arena.used;
}

// A model's config and tensors, nothing bound yet.
inline Model open_model(const fs::path& folder) {
    Model m;
    m.config = read_config(folder);
    m.rope = make_rope(m.config.rope, m.config.rope_dim());
    m.checkpoint = open_checkpoint(folder);
    auto left_out = [&](auto& tensor) { return !m.config.n_mtp && of_mtp(m.config, tensor.first); };
    std::erase_if(m.checkpoint.tensors, left_out);
    return m;
}

// Opens and checks a model. Weights are mapped, not read: this takes milliseconds.
inline Model load_model(const fs::path& folder) {
    Model m = open_model(folder);
    Binder binder(&m.checkpoint, folder, m.config.fp8);
    bind_model(binder, m);
    binder.finish(), show_remarks();
    return m;
}

struct Loading {
    std::string quant;                                  // q8_0, q4_k, fp8, or none
    std::function<void(size_t, size_t)> progress;       // bytes done and in all
};

// A model whose weights are made smaller while it is loaded.
inline Model load_model(const fs::path& folder, const Loading& loading) {
    if (loading.quant == "none") return load_model(folder);
    Model m = open_model(folder), counted;
    counted.config = m.config;
    Quantiser quantiser{&file_type(loading.quant), &m.config, {}, {}};
    Binder binder(&m.checkpoint, folder, m.config.fp8, &quantiser);
    bind_model(binder, counted);                        // once for the bill, once for the weights
    size_t total = quantiser.arena.used;
    m.quantised = Pages(total, true);
    quantiser.arena = {m.quantised.data(), 0};
    quantiser.progress = [&](size_t done) { loading.progress(done, total); };
    bind_model(binder, m);
    binder.finish(), show_remarks();
    return m;
}

// Those of which each token needs every row, and that are faster in another order.
inline std::vector<Matrix*> to_rearrange(Model& m) {
    std::vector<Matrix*> all;
    each_matrix(m, [&](Matrix& w, Role role) {
        bool every_row = role == Role::LINEAR || role == Role::HEAD;
        if (every_row && w && kernels.rearranges(w) && w.data != m.embed.data) all.push_back(&w);
    });
    return all;
}

// Weights in the order that is fastest, if those take no more than `memory` bytes. progress: bytes done and
// in all
inline void rearrange(Model& m, uint64_t memory, const std::function<void(size_t, size_t)>& progress) {
    if (!kernels.integers || !kernels.rearrange) return;
    std::vector<Matrix*> all = to_rearrange(m);
    auto bytes = [](const Matrix& w) { return size_t(w.rows) * row_bytes(w.dtype, w.cols); };
    Arena bill;
    for (const Matrix* w : all) bill.take<std::byte>(bytes(*w));
    if (bill.used > memory) {
        return notice(text_of("weights stay as they are: to rearrange %.2f GB takes more than the %.2f free",
                              gigabytes(bill.used), gigabytes(memory)));
    }
    m.rearranged = Pages(bill.used, true);
    Arena arena{m.rearranged.data(), 0};
    for (Matrix* w : all) {
        Matrix before = *w;
        kernels.rearrange(*w, arena.take<std::byte>(bytes(*w)));
        forget_pages(before);
        progress(arena.used, bill.used);
    }
}

// A model, ready to run with these options of a session.
inline Model load_planned(const fs::path& folder, const std::string& quant, const Config& c,
                          const SessionOptions& s, const Device& device, const InsideBill& result = {}) {
    if (kernels.arith == Arith::FP8 && quant != "fp8" && (quant != "none" || !c.fp8))
        fail("--arith fp8: needs FP8 weights: those of a folder that has them, or --quant fp8");
    const Dtype weights = quant == "none" ? REAL : file_type(quant).dtype;
    if (kernels.arith != Arith::F32 && kernels.integers && quantised(weights)) refuse_integers(weights);
    MemoryPlan plan = memory_plan(weight_bytes(folder, c, quant, device), c, s, device);
    require_memory(plan, c, s), result.require(plan);
    std::unique_ptr<Progress> progress;
    auto shown = [&progress](const std::string& what) {
        return [&progress, what](size_t done, size_t total) {
            if (!progress) progress = std::make_unique<Progress>(what, total);
            progress->at(done);
        };
    };
    Model model = load_model(folder, {quant, shown(text_of("quantising to %s, bytes", quant.c_str()))});
    progress.reset();
    if (device.upload) device.upload(model, shown("copying weights, bytes"));
    else rearrange(model, plan.left_for_weights(), shown("rearranging weights, bytes"));
    set_arith(model, s.mla);
    return model;
}

// -- 19.4  the bill as text ----------------------------------------------------------------------

inline void print_bill_json(const Config& c, const Bill& b, const SessionOptions& s, const MemoryPlan& plan,
                            const std::string& chat) {
    std::string bytes;
    for (auto& [dtype, n] : b.bytes)
        bytes += text_of("%s\"%s\":%llu", bytes.empty() ? "" : ",", dtype.c_str(), (unsigned long long)n);
    std::printf(
        "{\"architecture\":\"%s\",\"layers\":%d,\"hidden_size\":%d,\"vocab_size\":%d,\"context\":%d,"
        "\"parameters\":{\"total\":%llu,\"active\":%llu,\"mtp\":%llu},\"bytes\":{%s},"
        "\"kv_bytes_per_token\":%llu,\"mha_kv_bytes_per_token\":%llu,"
        "\"memory\":{\"device\":\"%s\",\"ctx\":%d,\"weights\":%llu,\"cache\":%llu,\"activations\":%llu,"
        "\"available\":%llu,\"fits\":%s},\"chat_template\":%s}\n",
        c.model_type.c_str(), c.n_layers, c.D, c.V, c.max_context, (unsigned long long)b.total,
        (unsigned long long)b.active, (unsigned long long)b.mtp, bytes.c_str(), (unsigned long long)b.kv,
        (unsigned long long)b.full_kv, plan.device->name, s.context, (unsigned long long)plan.weights,
        (unsigned long long)plan.cache,
        (unsigned long long)plan.activations, (unsigned long long)plan.available,
        plan.fits() ? "true" : "false", json_quote(chat).c_str());
}

// Whether some of the files' weights will be put in another order.
inline bool will_rearrange(const Bill& b) {
    for (int i = 0; i < N_DTYPES && kernels.integers && kernels.rearranges; i++) {
        Matrix any;
        any.dtype = Dtype(i);
        if (kernels.rearranges(any) && b.bytes.count(format_of(any.dtype).name)) return true;
    }
    return false;
}

inline void print_memory_plan(const Bill& b, const SessionOptions& s, const MemoryPlan& plan,
                              const std::string& quant) {
    uint64_t files = 0;
    for (auto& [dtype, n] : b.bytes) files += n;
    std::string made = plan.weights && quant != "none" ? text_of("--quant %s: ", quant.c_str()) : "";
    if (plan.weights) made += text_of("weights %.3f GB + ", gigabytes(plan.weights));
    std::printf(
        "memory plan    --ctx %d: %scache %.3f GB + activations %.3f GB = %.3f GB; available %.2f GB%s\n",
        s.context, made.c_str(), gigabytes(plan.cache), gigabytes(plan.activations), gigabytes(plan.needed()),
        gigabytes(plan.available), plan.where().c_str());
    if (plan.device->upload) std::printf("               weights are copied there from the files\n");
    else
        std::printf("               weights are mapped from the files and need no memory of their own%s\n",
                    plan.fits() && plan.needed() + files > plan.available && plan.available
                        ? ", but they exceed what is available: each token will read from the disk" : "");
    if (!plan.device->upload && will_rearrange(b))
        std::printf("               K formats but for experts are rearranged in memory where that is free\n");
    if (plan.fits()) std::printf("               fits\n");
    else
        std::printf("               does not fit: %.3f GB too much\n",
                    gigabytes(plan.needed() - plan.available));
}

inline void print_bill(const Config& c, const Bill& b, const fs::path& folder, const std::string& chat) {
    uint64_t files = 0;
    for (auto& [dtype, n] : b.bytes) files += n;
    std::printf("model          %s\n", folder.c_str());
    std::printf("architecture   %s: %d layers, hidden size %d, %d heads, %s, vocabulary %d, context %d\n",
                c.model_type.c_str(), c.n_layers, c.D, c.H,
                c.mla() ? "MLA" : text_of("%d kv heads", c.G).c_str(), c.V, c.max_context);
    if (c.E) std::printf("experts        %d routed, %d a token, %d shared\n", c.E, c.K, c.n_shared);
    std::printf("parameters     %.3f M total, %.3f M active a token", double(b.total) / 1e6,
                double(b.active) / 1e6);
    if (c.n_mtp) std::printf(", MTP module %.3f M more", double(b.mtp) / 1e6);
    std::printf("\nchat template  %s", chat.c_str());
    std::printf("\nweights        %s",
                b.bytes.empty() ? "not in this folder" : text_of("%.3f GB:", gigabytes(files)).c_str());
    for (auto& [dtype, n] : b.bytes) std::printf(" %s %.3f GB", dtype.c_str(), gigabytes(n));
    std::printf(
        "\ncache          %llu bytes a token; full multi-head attention would need %llu (%.1f times)\n",
        (unsigned long long)b.kv, (unsigned long long)b.full_kv, double(b.full_kv) / double(b.kv));
}

// =================================================================================================
// Chapter 21. A conversation
// =================================================================================================
//
// What stands between a model and a person? Tokens come one by one and are halves of characters, a thought
// comes before the answer, the person interrupts, and the history must hold what was said and nothing else.
//
//      ids --bytes--> characters --stop texts--> thought | answer --> stdout, plain
//                                                                 --> a terminal, dimmed and disarmed
//
// What a model says is a stranger's text: on a terminal no control character of it may act. What goes into
// a pipe or a file is exact.

// -- 21.1  an answer as it comes -----------------------------------------------------------------

struct Display {
    std::vector<std::string> stops;        // texts that end an answer; not shown
    bool answer_only = false, json = false, show_prompt = false;
    int logprobs = 0;                      // likeliest tokens to tell of each, in JSON
};

// Cuts a text off where one of some texts begins, though it come in parts: what may be the beginning of one
// is held back.
class StopTexts {
public:
    explicit StopTexts(const std::vector<std::string>& stops) : stops_(stops) {}
    bool found() const { return found_; }
    // What is certain by now.
    std::string push(const std::string& text) {
        if (found_) return "";
        held_ += text;
        size_t cut = held_.size();
        for (const std::string& stop : stops_)
            if (size_t at = held_.find(stop); at != held_.npos) cut = std::min(cut, at), found_ = true;
        size_t sure = cut;
        for (const std::string& stop : stops_)
            for (size_t n = std::min(stop.size() - 1, held_.size()); !found_ && n > 0; n--)
                if (held_.ends_with(std::string_view(stop).substr(0, n)))
                    sure = std::min(sure, held_.size() - n), n = 1;
        return take(sure);
    }
    std::string finish() { return found_ ? "" : take(held_.size()); }

private:
    const std::vector<std::string>& stops_;
    std::string held_;
    bool found_ = false;

    std::string take(size_t n) {
        std::string out = held_.substr(0, n);
        held_.erase(0, n);
        return out;
    }
};

// The text of the tokens as it comes: characters whole, special tokens hidden, the thought dimmed on a
// terminal. Keeps thought and answer apart.
class Printer {
public:
    // in_thought: the prompt has opened a thought.   raw: and that is not to be said
    Printer(const Tokenizer& tokenizer, const Generation& g, const Display& display, bool in_thought,
            bool raw)
        : tokenizer_(tokenizer), g_(g), display_(display), stops_(display.stops), thought_(in_thought),
          opened_(in_thought && !raw && !display.answer_only), answer_at_(in_thought ? std::string::npos : 0),
          terminal_(on_terminal(STDOUT_FILENO)) {}
    ~Printer() { if (terminal.dimmed) terminal.dim(false); }             // a model that breaks in a thought
    // False when a stop text has come.
    bool emit(int id) {
        if (tokenizer_.is_special(id)) return true;
        if (id == g_.think_begin) turns_.push_back({pushed_, true});
        std::string text = stream_.push(tokenizer_.bytes(id));
        pushed_ += text.size();
        if (id == g_.think_end) turns_.push_back({pushed_, false});
        keep(stops_.push(text));
        return !stops_.found();
    }
    void finish() {
        keep(stops_.push(stream_.finish()));
        keep(stops_.finish());
        show("");
        if (terminal.dimmed) terminal.dim(false);
        if (!display_.json && last_ != '\n') std::fputc('\n', stdout);
        std::fflush(stdout);
    }
    // What was said, without what the prompt had opened; the two parts of it, without marks and the blank
    // lines after them.
    const std::string& text() const { return text_; }
    std::string thought() const {
        std::string part = text_.substr(0, answer_at_ == text_.npos ? text_.size() : answer_at_);
        if (part.starts_with("<think>")) part.erase(0, 7);
        if (part.ends_with("</think>")) part.resize(part.size() - 8);
        return trimmed(part);
    }
    std::string answer() const { return thought_ ? "" : trimmed(text_.substr(answer_at_)); }
    bool in_thought() const { return thought_; }

private:
    const Tokenizer& tokenizer_;
    const Generation& g_;
    const Display& display_;
    StopTexts stops_;
    Utf8Stream stream_;
    std::deque<std::pair<size_t, bool>> turns_;          // where in the text a thought begins or ends
    std::string text_;
    size_t pushed_ = 0;                                  // bytes of text, those held back counted
    bool thought_;                                       // at the end of text_
    bool opened_;                                        // by the prompt, and that is still to be shown
    size_t answer_at_;
    bool terminal_;
    char last_ = 0;                                      // that was shown

    static std::string trimmed(std::string_view text) {
        return std::string(text.substr(std::min(text.find_first_not_of('\n'), text.size())));
    }
    void keep(std::string_view text) {
        while (true) {
            for (; !turns_.empty() && turns_.front().first <= text_.size(); turns_.pop_front()) {
                thought_ = turns_.front().second;
                answer_at_ = thought_ ? text_.npos : text_.size();
            }
            if (text.empty()) return;
            size_t n = text.size();
            if (!turns_.empty()) n = std::min(n, turns_.front().first - text_.size());
            text_ += text.substr(0, n);
            show(text.substr(0, n));
            text.remove_prefix(n);
        }
    }
    void show(std::string_view text) {
        if (display_.json || (display_.answer_only && thought_)) return;
        std::string out = std::exchange(opened_, false) ? "<think>" : "";
        out += display_.answer_only && last_ == 0 ? trimmed(text) : text;
        if (out.empty()) return;
        if (terminal_ && !plain_terminal() && thought_ != bool(terminal.dimmed)) terminal.dim(thought_);
        if (terminal_) out = disarmed(out);
        last_ = out.back();
        bool all = std::fwrite(out.data(), 1, out.size(), stdout) == out.size();
        bool flushed = std::fflush(stdout) == 0;
        if (!(all && flushed) && errno == EINTR) clearerr(stdout);   // Ctrl-C, no pipe or disk that failed
    }
};

// -- 21.2  what is said about it -----------------------------------------------------------------

constexpr const char* STOP_NAMES[] = {"end", "length", "context", "interrupted", "stop"};

inline double rate(int n, double t) { return t > 0 ? n / t : 0; }

inline void print_statistics(const Statistics& s, const Generation& g) {
    constexpr const char* WHY[] = {"ended by the model", "ended by -n", "ended by the context, which is full",
                                   "interrupted", "ended by --stop"};
    std::fprintf(stderr, "prompt %d tokens", s.prompt);
    if (s.reused) std::fprintf(stderr, " (%d from the cache)", s.reused);
    std::fprintf(stderr, ", %.1f tok/s; generated %d tokens, %.1f tok/s; %s",
                 rate(s.prompt - s.reused, s.prefill_s), s.generated, rate(s.generated, s.decode_s),
                 WHY[size_t(s.stop)]);
    if (g.drafting)
        std::fprintf(stderr, "; mtp: %d of %d drafts accepted (%.1f %%), %.2f tokens per step", s.accepted,
                     s.drafted, s.drafted ? 100.0 * s.accepted / s.drafted : 0.0,
                     s.steps ? double(s.generated - 1) / s.steps : 0.0);
    std::fputc('\n', stderr);
}

// A token as JSON: its id, its bytes as text, and ln of its probability before temperature and penalty.
inline std::string token_json(const Tokenizer& t, int id, double logprob) {
    return text_of("\"id\":%d,\"text\":%s,\"logprob\":%.6f", id,
                   json_quote(t.decode({id})).c_str(), logprob);
}

// What --logprobs tells: of each token, and of the K likeliest in its place.
struct Logprobs {
    const Tokenizer& tokenizer;
    int K, V;
    Vector logits = {};
    std::string json = {};

    void chosen(int id) {
        if (K == 0 || logits.empty()) return;
        const double none = negative_log_likelihood(logits.data(), V, id);
        std::vector<int> best(size_t(std::min(K, V)));
        top_k(best.data(), logits.data(), V, int(best.size()));
        std::string top;
        for (int other : best)
            top += (top.empty() ? "{" : ",{") +
                   token_json(tokenizer, other, double(logits[size_t(other)] - logits[size_t(id)]) - none) +
                   "}";
        json += (json.empty() ? "{" : ",{") + token_json(tokenizer, id, -none) + ",\"top\":[" + top + "]}";
    }
};

inline void print_answer_json(const Printer& p, const Statistics& s, const Generation& g, uint64_t seed,
                              const Logprobs& logprobs) {
    std::string more;
    if (g.drafting) more += text_of(",\"drafted\":%d,\"accepted\":%d", s.drafted, s.accepted);
    if (logprobs.K) more += ",\"tokens\":[" + logprobs.json + "]";
    std::printf("{\"thought\":%s,\"answer\":%s,\"stop\":\"%s\",\"prompt_tokens\":%d,\"cached_tokens\":%d,"
                "\"generated_tokens\":%d,\"prompt_tokens_per_s\":%.2f,\"tokens_per_s\":%.2f,\"seed\":%ju"
                "%s}\n",
                json_quote(p.thought()).c_str(), json_quote(p.answer()).c_str(), STOP_NAMES[size_t(s.stop)],
                s.prompt, s.reused, s.generated, rate(s.prompt - s.reused, s.prefill_s),
                rate(s.generated, s.decode_s), uintmax_t(seed), more.c_str());
    std::fflush(stdout);
}

// -- 21.3  a conversation ------------------------------------------------------------------------

// One model, and what was said. A turn that cannot be taken leaves it as it was.
struct Conversation {
    Session& session;
    const Tokenizer& tokenizer;
    Generation& generation;
    Display display;
    uint64_t seed = 0;                     // with which it began, for who wants the same words again
    std::vector<Message> messages = {};
    Stop stop = Stop::END;                 // of the last answer

    // Prints the answer to a prompt and returns its text, but nothing of a thought that has no end.
    std::string reply(const std::string& prompt, bool raw) {
        stop = Stop::END;
        std::vector<int> ids = encode_prompt(tokenizer, prompt, raw && tokenizer.add_bos);
        const int context = session.options.context, most = session.model.config.max_context;
        const std::string more = context < most ? text_of("; the model allows --ctx %d", most) : "";
        if (display.show_prompt)
            std::cerr << "prompt: " << (isatty(STDERR_FILENO) ? disarmed(prompt) : prompt)
                      << "\nids: " << json_array(ids) << '\n';
        if (ids.empty()) fail("the prompt is empty");
        if (int(ids.size()) >= context)
            stop = Stop::CONTEXT,
            fail("the prompt has %zu tokens, the context holds %d (one is needed for the answer)%s",
                 ids.size(), context, more.c_str());
        return answer(ids, raw);
    }
    void ask(const std::string& question) {
        messages.push_back({"user", question, {}});
        try {
            std::string said = reply(tokenizer.render(messages, true), false);
            messages.push_back({"assistant", tokenizer.as_history(said), {}});
        } catch (...) {
            messages.pop_back();
            throw;
        }
    }
    // The last question once more. The random numbers go on, so the words are others.
    void retry() {
        if (messages.size() < 2 || messages.back().role != "assistant") fail("/retry: nothing was asked yet");
        std::vector<Message> before = messages;
        messages.pop_back();
        std::string question = *messages.back().content;
        messages.pop_back();
        try {
            ask(question);
        } catch (...) {
            messages = before;
            throw;
        }
    }
    // The messages as JSON; --chat of `tokenize` reads them, too.
    std::string json() const {
        std::string out = "[";
        for (const Message& m : messages)
            out += (out.size() > 1 ? ",\n " : "") + ("{\"role\":" + json_quote(m.role)) + ",\"content\":" +
                   json_quote(m.content.value_or("")) + "}";
        return out + "]\n";
    }

private:
    std::string answer(const std::vector<int>& ids, bool raw) {
        Heed heed;
        Printer printer(tokenizer, generation, display, Thought(generation, ids).open, raw);
        Logprobs logprobs{tokenizer, display.logprobs, session.model.config.V};
        auto look = [&](const real* z) { logprobs.logits.assign(z, z + logprobs.V); };
        if (display.logprobs) generation.look = look;
        auto progress = std::make_unique<Progress>("reading", ids.size(), " tokens");
        auto emit = [&](int id) {
            progress.reset();
            logprobs.chosen(id);
            return printer.emit(id);
        };
        Statistics stats;
        auto read = [&](int n) { if (progress) progress->at(size_t(n)); };
        with_team([&] { stats = generate(session, ids, generation, read, emit); });
        progress.reset();
        printer.finish();
        generation.look = nullptr;
        stop = stats.stop;
        if (display.json) print_answer_json(printer, stats, generation, seed, logprobs);
        if (!quiet) print_statistics(stats, generation);
        return printer.in_thought() ? "" : printer.text();
    }
};

// FILE gets the messages, FILE.kv the cache. `replace`: files that are there already
inline void save_conversation(const Conversation& talk, const std::string& path, bool replace) {
    AtomicFile file(path, replace), cache(path + ".kv", replace);
    std::string json = talk.json();
    file.write(json.data(), json.size());
    save_cache(talk.session, cache);
    file.commit();
}

// Goes on with a saved conversation. Without its cache, or with one of another model, it is read again.
inline void load_conversation(Conversation& talk, const std::string& path) {
    std::vector<Message> messages;
    try {
        messages = parse_messages(read_json_file(path));
    } catch (const TokenizerError& e) {
        refuse(path, "%s", e.what());
    }
    try {
        load_cache(talk.session, path + ".kv");
    } catch (const UserError& e) {
        notice(std::string("its cache is of no use, it will be read again: ") + e.what());
    }
    talk.messages = std::move(messages);
}

// =================================================================================================
// Chapter 22. Command line
// =================================================================================================
//
// Who calls all this? cli.h: the commands, their options, and main.

// What deepseek.cu, which includes this file, sets: a GPU, and the comparison of its operations with the
// CPU's, which prints a line each and returns how many differ.
inline const Device* gpu = nullptr;
inline int (*check_twins)(const std::string& section) = nullptr;

#ifndef DEEPSEEK_NO_MAIN
#include "cli.h"
#endif
