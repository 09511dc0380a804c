// deepseek: the DeepSeek models in one readable file.
//
// =================================================================================================
// Chapter 0. How to read this file
// =================================================================================================
//
// This is a program and a book. The program runs DeepSeek V2, V2-Lite, Coder-V2, V3, R1-Zero, R1 and
// the six R1-Distills from their published files. The book is the same text read from top to bottom:
// each chapter answers one question, and the code below the prose is the answer that runs.
//
//   0   How to read this file      contents, notation, reading routes
//   1   Ground rules               errors, memory, the parallel loop, random numbers, taps
//   2   Numbers                    bf16, f16, e4m3 and the 128 x 128 scale blocks
//   3   Files                      config.json, safetensors, binding a tensor to its place
//   4   Text to tokens             one prompt on its way through tokenizer.h
//   5   Small operations           dot, matmul, rmsnorm, softmax, silu, top_k
//   6   Positions                  RoPE in two layouts, YaRN, llama3 scaling
//   7   Attention I: GQA           one query against many keys; what MLA replaces
//   8   Attention II: MLA          the latent cache, the naive and the absorbed form
//   9   Feed-forward               SwiGLU
//   10  Mixture of experts         three gates, dispatch, combine
//   11  The model                  block, forward, head
//   12  Talking                    sampling, generate, thinking budget, perplexity
//   13  Multi-token prediction     the MTP module; draft, verify, correct
//   A   Fast CPU                   SIMD kernels, equal to chapter 5 to the bit
//   C   Command line               the commands, then main
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
// DeepSeek: 7, 8, 10, 13. To check a kernel: 1 (taps), 2, 5, A, then `deepseek logits --taps`.

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <fcntl.h>
#include <omp.h>
#include <simdjson.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tokenizer.h"

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
// until it is used.
class Pages {
public:
    explicit Pages(size_t bytes = 0) : bytes_(bytes) {
        if (bytes == 0) return;
        void* p =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) fail("not enough memory: %.2f GB refused by the system", double(bytes) / 1e9);
        base_ = static_cast<std::byte*>(p);
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

// -- 1.3  parallel_for: the only loop that runs on several cores ---------------------------------

// body(i) for 0 <= i < n, in any order, on all threads. Each i writes its own outputs and no sum crosses
// an i, so the result does not depend on the number of threads.
// An exception (memory may run out in a body) may not leave an OpenMP loop, so it is carried out by hand.
template <class Body> void parallel_for(int64_t n, const Body& body) {
    std::exception_ptr error;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        try {
            body(i);
        } catch (...) {
#pragma omp critical
            error = std::current_exception();
        }
    }
    if (error) std::rethrow_exception(error);
}

// -- 1.4  Rng: the same random numbers everywhere ------------------------------------------------

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

    Entry& find(const std::string& name, std::initializer_list<int> inner) {
        auto [at, is_new] = index.try_emplace(name, entries.size());
        if (is_new) entries.push_back({name, {inner.begin(), inner.end()}, {}, {}});
        return entries[at->second];
    }
    void add(const std::string& name, const real* data, int T, std::initializer_list<int> inner) {
        size_t n = size_t(T);
        for (int size : inner) n *= size_t(size);
        Entry& entry = find(name, inner);
        entry.values.insert(entry.values.end(), data, data + n);
    }
    void add(const std::string& name, const int* data, int T, int inner) {
        Entry& entry = find(name, {inner});
        entry.integers.insert(entry.integers.end(), data, data + size_t(T) * size_t(inner));
    }
};

// -- 1.6  time and interruption ------------------------------------------------------------------

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline volatile std::sig_atomic_t interrupted = 0;   // set by Ctrl-C; every long loop looks at it

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
// Weights stay in the file's format, in the file's mapping; the inner loops of chapters 5 and A widen
// them. Every widening is exact.

enum class Dtype : uint8_t { F32, BF16, F16, F8_E4M3 };

constexpr int SCALE_BLOCK = 128;

inline size_t size_of(Dtype dtype) { return dtype == Dtype::F32 ? 4 : dtype == Dtype::F8_E4M3 ? 1 : 2; }

// A value at any address: tensors in a file need not be aligned.
template <class T> T load(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// -- 2.1  widening -------------------------------------------------------------------------------

inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

inline float f16_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | fraction << 13);
    float magnitude =
        exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    return sign ? -magnitude : magnitude;
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

// -- 2.2  Matrix: weights where they lie ---------------------------------------------------------

// y = W x with W (rows, cols), row-major, in the file's mapping. `scale` belongs to F8_E4M3 alone. A view of
// some rows keeps `first_row`, since a head's rows may begin in the middle of a scale block.
struct Matrix {
    const std::byte* data = nullptr;
    const std::byte* scale = nullptr;   // f32 (ceil(all rows / 128), ceil(cols / 128))
    Dtype dtype = Dtype::F32;
    int rows = 0, cols = 0, first_row = 0;

    explicit operator bool() const { return data != nullptr; }
    const std::byte* row(int r) const { return data + size_t(r) * size_t(cols) * size_of(dtype); }
    const std::byte* scale_row(int r) const {
        if (!scale) return nullptr;
        return scale +
               size_t((first_row + r) / SCALE_BLOCK) * size_t((cols + SCALE_BLOCK - 1) / SCALE_BLOCK) * 4;
    }
    Matrix view(int begin, int count) const {
        Matrix part = *this;
        part.data = row(begin), part.rows = count, part.first_row = first_row + begin;
        return part;
    }
};

// A norm's weight or a bias: few numbers, widened once.
using Vector = std::vector<real>;

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

// -- 3.1  Json: reading objects strictly ---------------------------------------------------------

using Json = simdjson::dom::element;

// A parsed document. simdjson is strict about syntax and depth; the padding it needs is copied here.
struct Document {
    simdjson::dom::parser parser{size_t(1) << 30};
    Json root;

    Document(std::string_view text, const std::string& file) {
        auto error = parser.parse(text.data(), text.size(), true).get(root);
        if (error) fail("%s: not valid JSON: %s", file.c_str(), simdjson::error_message(error));
    }
};

// The members of one JSON object, each name once. Getters check type and range and name file and field.
class Fields {
public:
    Fields(Json json, const std::string& where) : where_(where) {
        simdjson::dom::object object;
        if (json.get(object)) fail("%s: not a JSON object", where.c_str());
        for (auto [key, value] : object) {
            if (key.find('\0') != key.npos)
                fail("%s: a NUL in key '%s'", where.c_str(), printable(key).c_str());
            if (!values_.emplace(std::string(key), value).second)
                fail("%s: duplicate key '%s'", where.c_str(), printable(key).c_str());
        }
    }
    bool has(const char* key) const { return values_.count(key) && !values_.at(key).is_null(); }
    const std::map<std::string, Json>& all() const { return values_; }
    const std::string& where() const { return where_; }

    Json get(const char* key) const {
        auto at = values_.find(key);
        if (at == values_.end()) fail("%s: no field '%s'", where_.c_str(), key);
        return at->second;
    }
    int64_t integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> absent = {}) const {
        if (absent && !has(key)) return *absent;
        int64_t value = 0;
        if (get(key).get(value)) fail("%s: '%s' is not an integer", where_.c_str(), key);
        if (value < low || value > high)
            fail("%s: '%s' is %lld, outside %lld to %lld", where_.c_str(), key, (long long)value,
                 (long long)low, (long long)high);
        return value;
    }
    double number(const char* key, double low, double high, std::optional<double> absent = {}) const {
        if (absent && !has(key)) return *absent;
        double value = 0;
        if (get(key).get(value)) fail("%s: '%s' is not a number", where_.c_str(), key);
        if (!(value >= low && value <= high))
            fail("%s: '%s' is %g, outside %g to %g", where_.c_str(), key, value, low, high);
        return value;
    }
    bool boolean(const char* key, std::optional<bool> absent = {}) const {
        if (absent && !has(key)) return *absent;
        bool value = false;
        if (get(key).get(value)) fail("%s: '%s' is neither true nor false", where_.c_str(), key);
        return value;
    }
    std::string text(const char* key, std::optional<std::string> absent = {}) const {
        if (absent && !has(key)) return *absent;
        std::string_view value;
        if (get(key).get(value)) fail("%s: '%s' is not a string", where_.c_str(), key);
        return std::string(value);
    }
    // The position of the text in `choices`; anything else is an unknown value.
    int choice(const char* key, std::initializer_list<const char*> choices,
               std::optional<std::string> absent = {}) const {
        std::string value = text(key, absent);
        int i = 0;
        for (const char* c : choices) {
            if (value == c) return i;
            i++;
        }
        fail("%s: '%s' is \"%s\", which this program does not know", where_.c_str(), key,
             printable(value).c_str());
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
};

constexpr size_t TEXT_LIMIT = size_t(1) << 30, JSON_LIMIT = 100'000'000;

// All of a stream, which may be a pipe or a device without end.
std::string read_stream(std::istream& in, const std::string& name, size_t limit) {
    std::string text, part(size_t(1) << 16, '\0');
    while (in.read(part.data(), std::streamsize(part.size())), in.gcount() > 0) {
        text.append(part, 0, size_t(in.gcount()));
        if (text.size() > limit) fail("%s: larger than %zu bytes", name.c_str(), limit);
    }
    if (in.bad()) fail("%s: cannot be read", name.c_str());
    return text;
}

std::string read_file(const fs::path& path, size_t limit = TEXT_LIMIT) {
    std::error_code error;
    if (fs::is_directory(path, error)) fail("%s: is a directory", path.c_str());
    std::ifstream in(path, std::ios::binary);
    if (!in) fail("%s: %s", path.c_str(), std::strerror(errno));
    return read_stream(in, path.string(), limit);
}

// One of a model's JSON files: a regular file, since opening a pipe could wait for ever.
std::string read_json_file(const fs::path& path) {
    std::error_code error;
    fs::file_status status = fs::status(path, error);
    if (fs::exists(status) && !fs::is_directory(status) && !fs::is_regular_file(status))
        fail("%s: not a regular file", path.c_str());
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
};

struct Config {
    std::string file, model_type;
    int D = 0, V = 0, n_layers = 0, n_mtp = 0, ffn_width = 0, max_context = 0;
    int H = 0, G = 0, head_dim = 0;                         // GQA; MLA has no use for G and head_dim
    int Rq = 0, Rkv = 0, Dn = 0, Dr = 0, Dv = 0;            // MLA; Rq = 0: queries are not compressed
    int E = 0, K = 0, F = 0, n_shared = 0, first_dense = 0, moe_freq = 1, n_group = 1, topk_group = 1;
    Gate gate = Gate::GREEDY;
    bool sigmoid_affinity = false, norm_topk = false, qkv_bias = false, tied = false, fp8 = false;
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
constexpr int MOST = 1 << 24;
constexpr int MOST_LAYERS = 1 << 10, MOST_EXPERTS = 1 << 14, MOST_WIDTH = 1 << 20;
constexpr int MOST_EXPERTS_IN_ALL = 1 << 16;   // layers times experts: each has its entry in the model

RopeConfig parse_rope_scaling(const Fields& f, RopeConfig rope, bool mla) {
    static const std::set<std::string> KNOWN = {
        "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
        "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"};
    for (auto& [key, value] : f.all()) {
        if (!KNOWN.count(key))
            fail("%s: unknown field '%s'", f.where().c_str(), Fields::printable(key).c_str());
    }
    rope.theta = f.number("rope_theta", 1.1, 1e12, rope.theta);
    const char* key = f.has("type") ? "type" : "rope_type";
    int kind = f.choice(key, {"default", "llama3", "yarn"});
    rope.scaling = kind == 0 ? Scaling::NONE : kind == 1 ? Scaling::LLAMA3 : Scaling::YARN;
    if (rope.scaling == Scaling::NONE) return rope;
    if ((rope.scaling == Scaling::YARN) != mla)
        fail("%s: '%s' \"%s\" is not used by this architecture", f.where().c_str(), key, f.text(key).c_str());
    rope.factor = f.number("factor", 1, 1e6);
    rope.original_context = double(f.integer("original_max_position_embeddings", 1, MOST));
    if (rope.scaling == Scaling::LLAMA3) {
        rope.low_freq_factor = f.number("low_freq_factor", 1e-6, 1e6);
        rope.high_freq_factor = f.number("high_freq_factor", 1e-6, 1e6);
        if (rope.high_freq_factor <= rope.low_freq_factor)
            fail("%s: 'high_freq_factor' is not above 'low_freq_factor'", f.where().c_str());
        return rope;
    }
    rope.beta_fast = f.number("beta_fast", 1e-6, 1e6, 32);
    rope.beta_slow = f.number("beta_slow", 1e-6, 1e6, 1);
    if (rope.beta_fast <= rope.beta_slow) fail("%s: 'beta_fast' is not above 'beta_slow'", f.where().c_str());
    rope.mscale = f.number("mscale", 0, 100, 1);
    rope.mscale_all_dim = f.number("mscale_all_dim", 0, 100, 0);
    return rope;
}

// rope_scaling and rope_theta; newer files keep both in rope_parameters.
RopeConfig parse_rope(const Fields& f, bool mla) {
    RopeConfig rope;
    const char* key = f.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
    if (f.has("rope_parameters") && f.has("rope_scaling"))
        fail("%s: both 'rope_parameters' and 'rope_scaling'", f.where().c_str());
    if (!f.has("rope_parameters") || f.has("rope_theta")) rope.theta = f.number("rope_theta", 1.1, 1e12);
    if (!f.has(key)) return rope;
    Fields scaling(f.get(key), f.where() + ": " + key);
    if (!f.has("rope_theta")) scaling.number("rope_theta", 1.1, 1e12);   // one of the two places must have it
    return parse_rope_scaling(scaling, rope, mla);
}

void parse_mla(Config& c, const Fields& f) {
    f.get("q_lora_rank");   // null is a statement (V2-Lite), an absent field is a mistake
    c.Rq = int(f.integer("q_lora_rank", 1, MOST, 0));
    c.Rkv = int(f.integer("kv_lora_rank", 1, MOST));
    c.Dn = int(f.integer("qk_nope_head_dim", 1, MOST));
    c.Dr = int(f.integer("qk_rope_head_dim", 2, MOST));
    c.Dv = int(f.integer("v_head_dim", 1, MOST));
    if (f.integer("num_key_value_heads", 1, MOST, c.H) != c.H)
        fail("%s: 'num_key_value_heads' differs from 'num_attention_heads', which MLA does not have",
             c.file.c_str());
}

void parse_moe(Config& c, const Fields& f) {
    c.E = int(f.integer("n_routed_experts", 1, MOST_EXPERTS));
    if (c.E * c.n_layers > MOST_EXPERTS_IN_ALL)
        fail("%s: 'n_routed_experts' times 'num_hidden_layers' is out of range", c.file.c_str());
    c.K = int(f.integer("num_experts_per_tok", 1, c.E));
    c.F = int(f.integer("moe_intermediate_size", 1, MOST));
    c.n_shared = int(f.integer("n_shared_experts", 0, 1024, 0));
    if (int64_t(c.n_shared) * c.F > MOST)
        fail("%s: 'n_shared_experts' times 'moe_intermediate_size' is out of range", c.file.c_str());
    c.first_dense = int(f.integer("first_k_dense_replace", 0, c.n_layers));
    c.moe_freq = int(f.integer("moe_layer_freq", 1, MOST, 1));
    c.gate = Gate(f.choice("topk_method", {"greedy", "group_limited_greedy", "noaux_tc"}));
    c.sigmoid_affinity = f.choice("scoring_func", {"softmax", "sigmoid"}) == 1;
    c.norm_topk = f.boolean("norm_topk_prob");
    c.routed_scale = f.number("routed_scaling_factor", 1e-6, 1e6);
    if (c.gate == Gate::GREEDY) return;
    c.n_group = int(f.integer("n_group", 1, c.E));
    c.topk_group = int(f.integer("topk_group", 1, c.n_group));
    if (c.E % c.n_group)
        fail("%s: 'n_group' %d does not divide 'n_routed_experts' %d", c.file.c_str(), c.n_group, c.E);
    int group = c.E / c.n_group;
    if (c.K > c.topk_group * group)
        fail("%s: 'num_experts_per_tok' %d exceeds the %d experts of 'topk_group' %d groups", c.file.c_str(),
             c.K, c.topk_group * group, c.topk_group);
    if (c.gate == Gate::NOAUX_TC && group < 2)
        fail("%s: 'topk_method' noaux_tc needs groups of 2 experts or more ('n_group' %d)", c.file.c_str(),
             c.n_group);
}

void parse_gqa(Config& c, const Fields& f) {
    c.G = int(f.integer("num_key_value_heads", 1, MOST, c.H));
    if (c.H % c.G)
        fail("%s: 'num_key_value_heads' %d does not divide 'num_attention_heads' %d", c.file.c_str(), c.G,
             c.H);
    if (!f.has("head_dim") && c.D % c.H)
        fail("%s: 'num_attention_heads' %d does not divide 'hidden_size' %d", c.file.c_str(), c.H, c.D);
    c.head_dim = int(f.integer("head_dim", 2, MOST, c.D / c.H));
    if (f.boolean("use_sliding_window", false))
        fail("%s: 'use_sliding_window' true is not supported", c.file.c_str());
    if (f.boolean("mlp_bias", false)) fail("%s: 'mlp_bias' true is not supported", c.file.c_str());
    c.qkv_bias = c.model_type == "qwen2";
}

void parse_quantization(Config& c, const Fields& f) {
    if (!f.has("quantization_config")) return;
    Fields q(f.get("quantization_config"), c.file + ": quantization_config");
    q.choice("quant_method", {"fp8"});
    q.choice("fmt", {"e4m3"}, "e4m3");
    q.choice("activation_scheme", {"dynamic"}, "dynamic");
    q.choice("scale_fmt", {"ue8m0", "float"}, "float");
    simdjson::dom::array block;
    int64_t sides[2] = {0, 0};
    if (q.get("weight_block_size").get(block) || block.size() != 2 || block.at(0).get(sides[0]) ||
        block.at(1).get(sides[1]) || sides[0] != SCALE_BLOCK || sides[1] != SCALE_BLOCK)
        fail("%s: 'weight_block_size' is not [128, 128]", q.where().c_str());
    c.fp8 = true;
}

// One id or a list of ids; absent or null gives none.
std::vector<int> parse_ids(const Fields& f, const char* key, int V) {
    std::vector<int> ids;
    if (!f.has(key)) return ids;
    simdjson::dom::array list;
    if (f.get(key).get(list)) return {int(f.integer(key, 0, V - 1))};
    for (Json item : list) {
        int64_t id = -1;
        if (item.get(id) || id < 0 || id >= V)
            fail("%s: '%s' is not a list of ids", f.where().c_str(), key);
        ids.push_back(int(id));
    }
    return ids;
}

// config.json, from its text. `file` is for messages.
Config parse_config(std::string_view json, const std::string& file) {
    Document document(json, file);
    Fields f(document.root, file);
    Config c;
    c.file = file;
    c.model_type = f.text("model_type");
    int kind = f.choice("model_type", {"deepseek_v2", "deepseek_v3", "qwen2", "llama"});
    bool mla = kind < 2;
    c.D = int(f.integer("hidden_size", 1, MOST_WIDTH));
    c.V = int(f.integer("vocab_size", 1, MOST));
    c.n_layers = int(f.integer("num_hidden_layers", 1, MOST_LAYERS));
    c.H = int(f.integer("num_attention_heads", 1, 1 << 16));
    c.ffn_width = int(f.integer("intermediate_size", 1, MOST));
    c.max_context = int(f.integer("max_position_embeddings", 1, MOST));
    c.eps = f.number("rms_norm_eps", 0, 1);
    c.tied = f.boolean("tie_word_embeddings", false);
    f.choice("hidden_act", {"silu"}, "silu");
    if (f.boolean("attention_bias", false)) fail("%s: 'attention_bias' true is not supported", file.c_str());
    if (mla) parse_mla(c, f);
    else parse_gqa(c, f);
    if (mla && f.has("n_routed_experts")) parse_moe(c, f);
    if (kind == 1) c.n_mtp = int(f.integer("num_nextn_predict_layers", 0, 1, 0));
    parse_quantization(c, f);
    c.rope = parse_rope(f, mla);
    if (c.rope_dim() % 2) fail("%s: RoPE needs an even head dimension, not %d", file.c_str(), c.rope_dim());
    int widest = std::max(c.q_dim() + c.v_dim() + c.Dn, c.Rkv + c.Dr);
    if (int64_t(c.H) * widest > MOST || int64_t(c.G) * c.head_dim > MOST)
        fail("%s: 'num_attention_heads' times the head dimension is out of range", file.c_str());
    c.eos = parse_ids(f, "eos_token_id", c.V);
    return c;
}

// -- 3.3  safetensors: a header that must be right, and bytes ------------------------------------

struct TensorInfo {
    std::string name, dtype;
    std::vector<uint64_t> shape;
    uint64_t begin = 0, end = 0;   // bytes, from the start of the data
};

constexpr uint64_t HEADER_LIMIT = JSON_LIMIT;

// Bytes of one element, 0 for a dtype that safetensors does not have.
inline uint64_t dtype_width(const std::string& dtype) {
    static const std::map<std::string, uint64_t> WIDTH = {
        {"F64", 8},     {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"F8_E8M0", 1}, {"I64", 8}, {"I32", 4}, {"I16", 2},  {"I8", 1},      {"U8", 1},
        {"U16", 2},     {"U32", 4}, {"U64", 8}, {"BOOL", 1}};
    auto at = WIDTH.find(dtype);
    return at == WIDTH.end() ? 0 : at->second;
}

std::vector<uint64_t> parse_naturals(Json json, const std::string& where, const char* key) {
    simdjson::dom::array list;
    if (json.get(list)) fail("%s: '%s' is not a list", where.c_str(), key);
    std::vector<uint64_t> out;
    for (Json item : list) {
        uint64_t value = 0;
        if (item.get(value)) fail("%s: '%s' holds something that is no natural number", where.c_str(), key);
        out.push_back(value);
    }
    return out;
}

TensorInfo parse_tensor_info(const std::string& name, Json json, uint64_t data_bytes,
                             const std::string& file) {
    std::string where = file + ": tensor '" + Fields::printable(name) + "'";
    Fields f(json, where);
    TensorInfo t{name, f.text("dtype"), parse_naturals(f.get("shape"), where, "shape"), 0, 0};
    uint64_t bytes = dtype_width(t.dtype);
    if (bytes == 0) fail("%s: unknown dtype '%s'", where.c_str(), Fields::printable(t.dtype).c_str());
    if (t.shape.size() > 8) fail("%s: 'shape' has %zu axes", where.c_str(), t.shape.size());
    for (uint64_t n : t.shape) {
        if (__builtin_mul_overflow(bytes, n, &bytes))
            fail("%s: 'shape' is larger than any file", where.c_str());
    }
    auto range = parse_naturals(f.get("data_offsets"), where, "data_offsets");
    if (range.size() != 2 || range[0] > range[1] || range[1] > data_bytes)
        fail("%s: 'data_offsets' outside the %llu bytes of data", where.c_str(),
             (unsigned long long)data_bytes);
    t.begin = range[0], t.end = range[1];
    if (t.end - t.begin != bytes)
        fail("%s: shape and dtype need %llu bytes, 'data_offsets' has %llu", where.c_str(),
             (unsigned long long)bytes, (unsigned long long)(t.end - t.begin));
    return t;
}

// The JSON header of a safetensors file. The tensors must cover all `data_bytes`, each byte once.
std::vector<TensorInfo> parse_safetensors_header(std::string_view json, uint64_t data_bytes,
                                                 const std::string& file) {
    if (json.empty() || json[0] != '{') fail("%s: the safetensors header is not a JSON object", file.c_str());
    Document document(json, file);
    Fields header(document.root, file);
    std::vector<TensorInfo> tensors;
    for (auto& [name, value] : header.all()) {
        if (name != "__metadata__") {
            tensors.push_back(parse_tensor_info(name, value, data_bytes, file));
            continue;
        }
        Fields metadata(value, file + ": __metadata__");
        for (auto& [key, text] : metadata.all()) metadata.text(key.c_str());
    }
    std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
        return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
    });
    uint64_t at = 0;
    for (const TensorInfo& t : tensors) {
        if (t.begin != at)
            fail("%s: tensor '%s' %s", file.c_str(), Fields::printable(t.name).c_str(),
                 t.begin < at ? "overlaps another one" : "leaves a gap before it");
        at = t.end;
    }
    if (at != data_bytes)
        fail("%s: %llu bytes after the last tensor", file.c_str(), (unsigned long long)(data_bytes - at));
    return tensors;
}

// A file's bytes, read-only, brought in by the system as they are touched.
class Mapping {
public:
    explicit Mapping(const fs::path& path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);   // a pipe must not make us wait
        if (fd < 0) fail("%s: %s", path.c_str(), std::strerror(errno));
        struct stat status {};
        bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
        size_ = regular ? size_t(status.st_size) : 0;
        void* p = size_ ? mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
        close(fd);
        if (!regular) fail("%s: not a regular file", path.c_str());
        if (size_ == 0) fail("%s: empty", path.c_str());
        if (p == MAP_FAILED) fail("%s: cannot be mapped: %s", path.c_str(), std::strerror(errno));
        data_ = static_cast<const std::byte*>(p);
    }
    ~Mapping() { if (data_) munmap(const_cast<std::byte*>(data_), size_); }
    Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
    Mapping& operator=(Mapping&&) = delete;
    const std::byte* data() const { return data_; }
    size_t size() const { return size_; }

private:
    const std::byte* data_ = nullptr;
    size_t size_ = 0;
};

// A whole safetensors file: where its data begin, and what is in them.
struct TensorFile {
    uint64_t data_begin = 0;
    std::vector<TensorInfo> tensors;
};

TensorFile parse_safetensors(std::span<const std::byte> bytes, const std::string& file) {
    if (bytes.size() < 8) fail("%s: too short for a safetensors file", file.c_str());
    uint64_t n = load<uint64_t>(bytes.data());
    if (n > HEADER_LIMIT)
        fail("%s: a header of %llu bytes is beyond the limit of 100 MB", file.c_str(), (unsigned long long)n);
    if (n > bytes.size() - 8) fail("%s: the header is longer than the file (cut off?)", file.c_str());
    std::string_view json(reinterpret_cast<const char*>(bytes.data()) + 8, n);
    return {8 + n, parse_safetensors_header(json, bytes.size() - 8 - n, file)};
}

// -- 3.4  Checkpoint: all tensors of a folder, by name -------------------------------------------

struct Tensor {
    std::string file, dtype;
    std::vector<uint64_t> shape;
    const std::byte* data = nullptr;
    uint64_t bytes = 0;
};

struct Checkpoint {
    std::vector<Mapping> files;
    std::map<std::string, Tensor> tensors;
};

// tensor -> file name, from model.safetensors.index.json.
std::map<std::string, std::string> parse_index(std::string_view json, const std::string& file) {
    Document document(json, file);
    Fields top(document.root, file);
    Fields map(top.get("weight_map"), file + ": weight_map");
    std::map<std::string, std::string> out;
    for (auto& [name, value] : map.all()) {
        std::string shard = map.text(name.c_str());
        bool plain =
            !shard.empty() && shard.find('/') == std::string::npos && shard.find('\0') == std::string::npos;
        if (!plain || !shard.ends_with(".safetensors"))
            fail("%s: tensor '%s' names no file of this folder: '%s'", file.c_str(),
                 Fields::printable(name).c_str(), Fields::printable(shard).c_str());
        out[name] = shard;
    }
    if (out.empty()) fail("%s: 'weight_map' is empty", file.c_str());
    return out;
}

void add_tensors(Checkpoint& checkpoint, const fs::path& path) {
    std::string file = path.string();
    Mapping& mapping = checkpoint.files.emplace_back(path);
    TensorFile parsed = parse_safetensors({mapping.data(), mapping.size()}, file);
    for (TensorInfo& t : parsed.tensors) {
        Tensor tensor{file, t.dtype, t.shape, mapping.data() + parsed.data_begin + t.begin, t.end - t.begin};
        auto [at, is_new] = checkpoint.tensors.emplace(t.name, tensor);
        if (!is_new)
            fail("%s: tensor '%s' is also in %s", file.c_str(), Fields::printable(t.name).c_str(),
                 at->second.file.c_str());
    }
}

bool has_weights(const fs::path& folder) {
    return fs::exists(folder / "model.safetensors.index.json") || fs::exists(folder / "model.safetensors");
}

Checkpoint open_checkpoint(const fs::path& folder) {
    Checkpoint checkpoint;
    fs::path index = folder / "model.safetensors.index.json";
    if (!has_weights(folder))
        fail("%s: neither model.safetensors nor model.safetensors.index.json (not a model folder, or not "
             "fetched whole?)",
             folder.c_str());
    if (!fs::exists(index)) {
        add_tensors(checkpoint, folder / "model.safetensors");
        return checkpoint;
    }
    auto weight_map = parse_index(read_json_file(index), index.string());
    std::set<std::string> shards;
    for (auto& [name, shard] : weight_map) shards.insert(shard);
    for (const std::string& shard : shards) add_tensors(checkpoint, folder / shard);
    for (auto& [name, shard] : weight_map) {
        auto at = checkpoint.tensors.find(name);
        if (at == checkpoint.tensors.end() || at->second.file != (folder / shard).string())
            fail("%s: no tensor '%s', which the index expects there", (folder / shard).c_str(),
                 Fields::printable(name).c_str());
    }
    for (auto& [name, tensor] : checkpoint.tensors) {
        if (!weight_map.count(name))
            fail("%s: tensor '%s' is not in the index", tensor.file.c_str(), Fields::printable(name).c_str());
    }
    return checkpoint;
}

// -- 3.5  write_safetensors: results, whole or not at all ----------------------------------------

struct OutputTensor {
    std::string name, dtype;
    std::vector<size_t> shape;
    const void* data;
    size_t bytes;
};

// Writes to a temporary name beside the target and renames, so that a reader never sees half a file.
class AtomicFile {
public:
    explicit AtomicFile(const std::string& path)
        : path_(path), temporary_(text_of("%s.%d.tmp", path.c_str(), int(getpid()))) {
        if (fs::is_directory(path)) fail("%s: is a directory", path.c_str());
        if (fs::exists(path) && !fs::is_regular_file(path)) fail("%s: not a regular file", path.c_str());
        file_ = std::fopen(temporary_.c_str(), "wbx");
        if (!file_) fail("%s: cannot be written: %s", path.c_str(), std::strerror(errno));
    }
    ~AtomicFile() {
        if (!file_) return;
        std::remove(temporary_.c_str());
        std::fclose(file_);
    }
    AtomicFile(const AtomicFile&) = delete;
    void write(const void* data, size_t bytes) {
        if (bytes && std::fwrite(data, 1, bytes, file_) != bytes)
            fail("%s: %s", path_.c_str(), std::strerror(errno));
    }
    void commit() {
        bool whole = std::fflush(file_) == 0 && fsync(fileno(file_)) == 0 &&
                     std::rename(temporary_.c_str(), path_.c_str()) == 0;
        if (!whole) fail("%s: %s", path_.c_str(), std::strerror(errno));
        std::fclose(std::exchange(file_, nullptr));
    }

private:
    std::string path_, temporary_;
    std::FILE* file_ = nullptr;
};

void write_safetensors(AtomicFile& file, const std::vector<OutputTensor>& tensors) {
    std::string header = "{";
    size_t at = 0;
    for (const OutputTensor& t : tensors) {
        std::string shape;
        for (size_t n : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
        header += text_of("%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                          at || header.size() > 1 ? "," : "", t.name.c_str(), t.dtype.c_str(), shape.c_str(),
                          at, at + t.bytes);
        at += t.bytes;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    uint64_t n = header.size();
    file.write(&n, 8);
    file.write(header.data(), header.size());
    for (const OutputTensor& t : tensors) file.write(t.data, t.bytes);
    file.commit();
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
// kernel (appendix A) does the same additions in the same order, and returns the same bits. `std::fma` rounds
// once, on every machine; -ffp-contract=off keeps the compiler from fusing anything else.
//
// An e4m3 row adds one step: each block of 128 columns has its own sixteen lanes, which are multiplied by the
// block's scale and added to the row's (V3 section 3.3.2 promotes its partial sums at the same places).

constexpr int LANES = 16;

inline real sum_lanes(const real* lane) {
    real v[LANES / 2];
    for (int j = 0; j < 8; j++) v[j] = lane[j] + lane[j + 8];
    for (int j = 0; j < 4; j++) v[j] += v[j + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// -- 5.1  dot, axpy: the two inner loops, in plain C++ -------------------------------------------

// How a row of each dtype reads as numbers.
struct RealRow {
    const real* p;
    real operator()(int i) const { return p[i]; }
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

template <class Row> void add_products(real* lane, Row w, const real* x, int begin, int end) {
    for (int i = begin; i < end; i++) lane[i % LANES] = std::fma(w(i), x[i], lane[i % LANES]);
}

template <class Row> real dot_plain(Row w, const real* x, int n) {
    real lane[LANES] = {};
    add_products(lane, w, x, 0, n);
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

// T vectors, `stride` numbers apart: activations of T tokens, a head's slice of them, or rows of a cache.
struct Rows {
    real* data;
    int64_t stride;
    real* operator[](int64_t t) const { return data + t * stride; }
};
struct ConstRows {
    const real* data;
    int64_t stride;
    ConstRows(const real* data, int64_t stride) : data(data), stride(stride) {}
    ConstRows(Rows rows) : data(rows.data), stride(rows.stride) {}
    const real* operator[](int64_t t) const { return data + t * stride; }
};

// out[t] = W[r] . x[t] for 0 <= t < T.   out: stride `out_stride`
inline void dots_plain(real* out, int64_t out_stride, const Matrix& w, int r, ConstRows x, int T) {
    const std::byte* p = w.row(r);
    for (int t = 0; t < T; t++) {
        real& y = out[t * out_stride];
        switch (w.dtype) {
        case Dtype::F32: y = dot_plain(F32Row{p}, x[t], w.cols); break;
        case Dtype::BF16: y = dot_plain(Bf16Row{p}, x[t], w.cols); break;
        case Dtype::F16: y = dot_plain(F16Row{p}, x[t], w.cols); break;
        case Dtype::F8_E4M3: y = dot_scaled_plain(E4m3Row{p}, w.scale_row(r), x[t], w.cols); break;
        }
    }
}

template <class Row> void widen_into(real* out, Row w, int n) {
    for (int i = 0; i < n; i++) out[i] = w(i);
}

// out (w.cols) = row r of W, exactly; for e4m3 the product with the scale, rounded once.
inline void widen_plain(real* out, const Matrix& w, int r) {
    const std::byte *p = w.row(r), *scale = w.scale_row(r);
    switch (w.dtype) {
    case Dtype::F32: return widen_into(out, F32Row{p}, w.cols);
    case Dtype::BF16: return widen_into(out, Bf16Row{p}, w.cols);
    case Dtype::F16: return widen_into(out, F16Row{p}, w.cols);
    case Dtype::F8_E4M3: widen_into(out, E4m3Row{p}, w.cols);
    }
    for (int i = 0; i < w.cols; i++) out[i] *= load<float>(scale + 4 * size_t(i / SCALE_BLOCK));
}

// a . b, both (n)
inline real dot_real_plain(const real* a, const real* b, int n) { return dot_plain(RealRow{a}, b, n); }

// out[i] += a * v[i] for i < n: each output is its own chain of fma, in the order of the calls.
inline void axpy_plain(real* out, real a, const real* v, int n) {
    for (int i = 0; i < n; i++) out[i] = std::fma(a, v[i], out[i]);
}

// The inner loops in use: plain, or the fastest that this processor has (appendix A), with the same bits.
struct Kernels {
    const char* name = "plain";
    void (*dots)(real* out, int64_t out_stride, const Matrix& w, int r, ConstRows x, int T) = dots_plain;
    real (*dot_real)(const real* a, const real* b, int n) = dot_real_plain;
    void (*axpy)(real* out, real a, const real* v, int n) = axpy_plain;
    void (*widen)(real* out, const Matrix& w, int r) = widen_plain;
};
inline Kernels kernels;

// -- 5.2  matmul: y = W x for T tokens -----------------------------------------------------------

constexpr int ROW_BLOCK = 16;    // rows of W that a thread takes at once: they stay in its cache
constexpr int TOKEN_TILE = 4;    // tokens that share one widening of a weight

// out[t][r] = W[r] . x[t] for rows begin <= r < end, on the calling thread.
inline void matmul_rows(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    for (int t = 0; t < T; t += TOKEN_TILE) {
        int n = std::min(TOKEN_TILE, T - t);
        for (int r = begin; r < end; r++) kernels.dots(out[t] + r, out.stride, w, r, {x[t], x.stride}, n);
    }
}

// out: (T, w.rows)   x: (T, w.cols)   dense
inline void matmul(real* out, const real* x, const Matrix& w, int T) {
    parallel_for((w.rows + ROW_BLOCK - 1) / ROW_BLOCK, [&](int64_t block) {
        int begin = int(block) * ROW_BLOCK;
        matmul_rows({out, w.rows}, {x, w.cols}, w, T, begin, std::min(w.rows, begin + ROW_BLOCK));
    });
}

inline void add_bias(real* out, const Vector& bias, int T) {
    for (size_t i = 0; i < bias.size() * size_t(T); i++) out[i] += bias[i % bias.size()];
}

// out += x, both (n)
inline void add(real* out, const real* x, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] += x[i];
}

// -- 5.3  exp, sigmoid, silu, softmax ------------------------------------------------------------

// e^x. The C library's expf differs between systems in the last bit. Here: e^x = 2^k e^r, |r| <= ln(2)/2, a
// polynomial in double (error below 1e-12 of the value), rounded once. Only +, * and a shift: the same bits
// everywhere.
inline float exp_of(float x) {
    if (!(x > -104.0f)) return std::isnan(x) ? x : 0.0f;
    if (x > 88.8f) return std::numeric_limits<float>::infinity();
    constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453, TO_INTEGER = 0x1.8p52;
    double k = (double(x) * LOG2_E + TO_INTEGER) - TO_INTEGER, r = double(x) - k * LN_2, p = 1.0 / 39916800;
    for (double inverse : {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                           1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
        p = p * r + inverse;
    return float(p * std::bit_cast<double>(uint64_t(int64_t(k) + 1023) << 52));
}
inline double exp_of(double x) { return std::exp(x); }   // the yardstick build: as exact as the system can

inline real sigmoid(real z) { return 1 / (1 + exp_of(-z)); }
inline real silu(real z) { return z / (1 + exp_of(-z)); }

// In place over n numbers, -inf allowed. The sum runs from the first to the last.
inline void softmax(real* z, int n) {
    real top = *std::max_element(z, z + n), sum = 0;
    for (int i = 0; i < n; i++) sum += z[i] = exp_of(z[i] - top);
    for (int i = 0; i < n; i++) z[i] /= sum;
}

// -- 5.4  rmsnorm --------------------------------------------------------------------------------

//   y = w * x / sqrt(mean(x^2) + eps)      Zhang, Sennrich 2019
// out, x: (T, n), `x` may be `out`; w: (n)
inline void rmsnorm(Rows out, ConstRows x, const Vector& w, int T, double eps) {
    int n = int(w.size());
    parallel_for(T, [&](int64_t t) {
        real scale = 1 / std::sqrt(kernels.dot_real(x[t], x[t], n) / real(n) + real(eps));
        for (int i = 0; i < n; i++) out[t][i] = x[t][i] * scale * w[size_t(i)];
    });
}

// -- 5.5  top_k: the one place that decides ties -------------------------------------------------

// idx: the k indices of the largest v, in descending order of v; of equal values the lower index comes first.
inline void top_k(int* idx, const real* v, int n, int k) {
    for (int i = 0, filled = 0; i < n; i++) {
        if (filled == k && !(v[i] > v[idx[k - 1]])) continue;
        int at = filled < k ? filled++ : k - 1;
        for (; at > 0 && v[i] > v[idx[at - 1]]; at--) idx[at] = idx[at - 1];
        idx[at] = i;
    }
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
//      half          (x0 x_d/2) (x1 x_d/2+1) ...    Qwen2, Llama
//
// A model trained on 4,096 tokens can read 163,840 after its slow pairs were slowed down further. YaRN
// (Peng et al. 2023) divides the frequencies of pairs that turn less than `beta_slow` times over the
// original context by `factor`, keeps those that turn more than `beta_fast` times, and blends in between.
// It also sharpens the softmax: DeepSeek multiplies the attention scores by mscale(mscale_all_dim)^2, at
// every length. Leaving it out is invisible at position 0 and wrong by a factor of 1.59 (V2-Lite) or 1.87
// (V3) after it.

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
    double low = std::max(std::floor(yarn_pair(c, dim, c.beta_fast)), 0.0);
    double high = std::min(std::ceil(yarn_pair(c, dim, c.beta_slow)), dim - 1.0);
    if (low == high) high += 0.001;
    for (int i = 0; i < dim / 2; i++) {
        double& f = rope.frequency[size_t(i)];
        double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
        f = f / c.factor * ramp + f * (1 - ramp);
    }
    double all = yarn_mscale(c.factor, c.mscale_all_dim);
    rope.magnitude = yarn_mscale(c.factor, c.mscale) / all;
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

// -- 6.2  rope_interleaved, rope_half: rotate one vector in place --------------------------------

inline void rotate(real& a, real& b, const real* cos_sin) {
    real x = a, y = b;
    a = x * cos_sin[0] - y * cos_sin[1];
    b = x * cos_sin[1] + y * cos_sin[0];
}

// x: (dim)   cos_sin: (dim / 2, 2)
inline void rope_interleaved(real* x, const real* cos_sin, int dim) {
    for (int i = 0; i < dim / 2; i++) rotate(x[2 * i], x[2 * i + 1], cos_sin + 2 * i);
}

inline void rope_half(real* x, const real* cos_sin, int dim) {
    for (int i = 0; i < dim / 2; i++) rotate(x[i], x[i + dim / 2], cos_sin + 2 * i);
}

// =================================================================================================
// Chapter 7. Attention I: GQA
// =================================================================================================
//
// How does a token look back? It compares its query with the key of each earlier token and takes the mean of
// their values, weighted by the softmax of the comparisons:
//
//      o = sum_j softmax_j(q . k_j / sqrt(d)) v_j       j <= position
//
// The keys and values of the past do not change, so they are kept: the KV cache. It, not the arithmetic,
// limits long contexts. With H heads of width d it holds 2 H d numbers a token and layer. Grouped-query
// attention, as in the distills, lets H / G query heads share a key head: 2 G d numbers
// (R1-Distill-Qwen-1.5B: 512 for 12 heads of 128). Chapter 8 is DeepSeek's answer to the same question.

// -- 7.1  what a session holds: weights, cache, activations --------------------------------------

struct Mla {                               // chapter 8
    Matrix wq;                             // (H * (Dn + Dr), D), where queries are not compressed
    Matrix wq_a, wq_b;                     // (Rq, D), (H * (Dn + Dr), Rq)
    Matrix wkv_a;                          // (Rkv + Dr, D)
    Matrix wkv_b;                          // (H, Dn + Dv, Rkv): a head's W^UK above its W^UV
    Matrix wo;                             // (D, H * Dv)
    Vector q_norm, kv_norm;                // (Rq), (Rkv)
};
struct Gqa {
    Matrix wq, wk, wv, wo;                 // (H * d, D), (G * d, D), (G * d, D), (D, H * d)
    Vector bq, bk, bv;                     // Qwen2 only
};
struct Mlp {
    Matrix w_gate, w_up, w_down;           // (F, D), (F, D), (D, F)
};
struct Moe {                               // chapter 10
    Matrix gate_w;                         // (E, D)
    Vector gate_bias;                      // (E), noaux_tc only
    std::vector<Mlp> experts;              // E
    Mlp shared;                            // all shared experts in one, of width n_shared * F
};
struct Layer {
    Vector attn_norm, ffn_norm;            // (D)
    Mla mla;                               // one of the two, by Config::mla
    Gqa gqa;
    Mlp mlp;                               // one of the two, by Config::is_moe
    Moe moe;
};
struct Mtp {                               // chapter 13
    Vector enorm, hnorm, norm;             // (D)
    Matrix proj;                           // (D, 2 D): embedding first
    Layer layer;
};
struct Model {
    Config config;
    Rope rope;
    Checkpoint checkpoint;                 // keeps the mappings alive
    Matrix embed, head;                    // (V, D)
    Vector norm;                           // (D)
    std::vector<Layer> layers;
    std::vector<Mtp> mtp;                  // 0 or 1
};

// Keys and values of the past. A row is one token's: MLA (Rkv + Dr) [c_kv | k_rope], GQA (2, G, d) [k | v].
struct Cache {
    int width = 0, context = 0;
    Pages pages;

    static size_t bytes(const Config& c, int context) {
        return size_t(c.n_layers + c.n_mtp) * size_t(context) * size_t(c.cache_width()) * sizeof(real);
    }
    Cache(const Config& c, int context)
        : width(c.cache_width()), context(context), pages(bytes(c, context)) {}
    Rows layer(int l) const {
        return {reinterpret_cast<real*>(pages.data()) + size_t(l) * size_t(context) * size_t(width), width};
    }
};

enum class MlaForm : uint8_t { ABSORBED, NAIVE };

struct SessionOptions {
    int context = 0, chunk = 128;          // tokens that fit; tokens that one forward pass takes at most
    MlaForm mla = MlaForm::ABSORBED;
};

// Everything that a forward pass writes, for at most C = chunk tokens. One list, walked twice: for the
// bill and for the pointers.
struct Activations {
    real *x, *u, *y, *h;                   // (C, D): residual, normed, a branch's output, after last norm
    real *cos_sin;                         // (C, rope_dim / 2, 2)
    real *c_q, *q, *kv, *o;                // (C, Rq), (C, H, q_dim), (C, cache_width), (C, H, v_dim)
    real *q_absorbed, *z;                  // (C, H, Rkv + Dr), (C, H, Rkv)
    real *scores, *expanded;               // (threads, context), naive: (threads, context, Dn + Dr + Dv)
    real *gate, *up;                       // (C, width of the widest FFN)
    real *router_logits, *affinity, *choice;   // (C, E)
    real *gate_weight, *expert_in, *expert_out;   // (C, K), (C, D), (C * K, D)
    real *mtp_in, *mtp_x, *mtp_h;          // (C, 2 D), (C, D), (C, D)
    int *expert_idx, *slot, *slot_token;   // (C, K), (C, K), (C * K)

    Activations(Arena& arena, const Config& c, const SessionOptions& o_, int threads) {
        size_t C = size_t(o_.chunk), D = size_t(c.D), H = size_t(c.H), E = size_t(c.E), K = size_t(c.K);
        size_t context = size_t(o_.context) * size_t(threads);
        size_t width = std::max({size_t(c.ffn_width), size_t(c.F), size_t(c.F) * size_t(c.n_shared)});
        auto reals = [&](size_t n) { return arena.take<real>(n); };
        x = reals(C * D), u = reals(C * D), y = reals(C * D), h = reals(C * D);
        cos_sin = reals(C * size_t(c.rope_dim()));
        c_q = reals(C * size_t(c.Rq)), q = reals(C * H * size_t(c.q_dim()));
        kv = reals(C * size_t(c.cache_width())), o = reals(C * H * size_t(c.v_dim()));
        q_absorbed = reals(c.mla() ? C * H * size_t(c.Rkv + c.Dr) : 0), z = reals(C * H * size_t(c.Rkv));
        scores = reals(context);
        expanded = reals(c.mla() && o_.mla == MlaForm::NAIVE ? context * size_t(c.q_dim() + c.Dv) : 0);
        gate = reals(C * width), up = reals(C * width);
        router_logits = reals(C * E), affinity = reals(C * E), choice = reals(C * E);
        gate_weight = reals(C * K), expert_in = reals(E ? C * D : 0), expert_out = reals(C * K * D);
        mtp_in = reals(c.n_mtp ? 2 * C * D : 0), mtp_x = reals(c.n_mtp ? C * D : 0),
        mtp_h = reals(c.n_mtp ? C * D : 0);
        expert_idx = arena.take<int>(C * K), slot = arena.take<int>(C * K),
        slot_token = arena.take<int>(C * K);
    }
    static size_t bytes(const Config& c, const SessionOptions& o, int threads) {
        Arena counter;
        Activations(counter, c, o, threads);
        return counter.used;
    }
};

// One conversation with one model. The MTP layer's part of the cache lags behind: it holds `mtp_length`
// tokens.
struct Session {
    const Model& model;
    SessionOptions options;
    Cache cache;
    Pages pages;
    Arena arena;
    Activations a;
    Taps* taps = nullptr;
    std::vector<int> tokens;               // the conversation; the cache holds the first `length` of them
    int length = 0, mtp_length = 0;
    int h_pos = 0, h_rows = 0;             // positions whose final hidden states are in a.h

    Session(const Model& m, const SessionOptions& o)
        : model(m), options(o), cache(m.config, o.context),
          pages(Activations::bytes(m.config, o, omp_get_max_threads())), arena{pages.data(), 0},
          a(arena, m.config, o, omp_get_max_threads()) {}

    // Taps of layer l; the MTP layer's inner values have no names.
    void tap(int l, const char* name, const real* data, int T, std::initializer_list<int> inner) const {
        if (taps && l < model.config.n_layers) taps->add(text_of("layers.%d.%s", l, name), data, T, inner);
    }
};

// -- 7.2  attend: one query, n keys --------------------------------------------------------------

struct KeysValues {
    ConstRows k, v;                        // (n, dk), (n, dv)
    int dk, dv;
    real scale;
};

// out (dv) = sum_j softmax_j(scale * q . k_j) v_j over n rows.   q: (dk)   scores: (n), scratch
inline void attend(real* out, const real* q, const KeysValues& kv, int n, real* scores) {
    for (int j = 0; j < n; j++) scores[j] = kv.scale * kernels.dot_real(q, kv.k[j], kv.dk);
    softmax(scores, n);
    std::fill(out, out + kv.dv, real(0));
    for (int j = 0; j < n; j++) kernels.axpy(out, scores[j], kv.v[j], kv.dv);
}

inline real* thread_scores(const Session& s) {
    return s.a.scores + size_t(omp_get_thread_num()) * size_t(s.options.context);
}

// -- 7.3  gqa ------------------------------------------------------------------------------------

// a.y (T, D) = attention of a.u (T, D) at positions pos, pos + 1, ...; writes the cache of layer l.
inline void gqa(Session& s, const Gqa& w, int l, int T, int pos) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    Rows past = s.cache.layer(l);
    int d = c.head_dim, half = c.G * d;                       // a cache row is [k (G, d) | v (G, d)]
    matmul(a.q, a.u, w.wq, T);
    matmul(a.kv, a.u, w.wk, T);
    matmul(a.kv + int64_t(T) * half, a.u, w.wv, T);
    if (c.qkv_bias)
        add_bias(a.q, w.bq, T), add_bias(a.kv, w.bk, T), add_bias(a.kv + int64_t(T) * half, w.bv, T);
    parallel_for(T, [&](int64_t t) {
        const real* cos_sin = a.cos_sin + t * d;
        real* row = past[pos + t];
        std::copy_n(a.kv + t * half, half, row);
        std::copy_n(a.kv + (T + t) * half, half, row + half);
        for (int g = 0; g < c.G; g++) rope_half(row + g * d, cos_sin, d);
        for (int h = 0; h < c.H; h++) rope_half(a.q + (t * c.H + h) * d, cos_sin, d);
    });
    parallel_for(int64_t(T) * c.H, [&](int64_t i) {
        int t = int(i / c.H), g = int(i % c.H) / (c.H / c.G);
        KeysValues kv{{past.data + g * d, past.stride}, {past.data + half + g * d, past.stride}, d, d,
                      1 / std::sqrt(real(d))};
        attend(a.o + i * d, a.q + i * d, kv, pos + t + 1, thread_scores(s));
    });
    matmul(a.y, a.o, w.wo, T);
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
// The naive form does what the equations say: expand the cache to keys and values, attend. The absorbed
// form never expands, because matrix products associate:
//
//      q . k      = q_nope^T (W^UK c) + q_rope . k_rope  =  (W^UK^T q_nope) . c + q_rope . k_rope
//      sum p_j v_j = sum p_j (W^UV c_j)                  =  W^UV (sum p_j c_j)
//
// With q_absorbed = W^UK^T q_nope (512 numbers), all heads attend directly over the cache rows [c |
// k_rope], as one key head of width 576 whose first 512 numbers are also the value. The scale is still
// that of 192: absorption changes where the work is done, not what is computed.
//
//              naive                                   absorbed
//      scores  H * (Dn + Dr) a pair                    H * (Rkv + Dr) a pair
//      values  H * Dv a pair                           H * Rkv a pair
//      extra   H * (Dn + Dv) * Rkv a cached token      H * (Dn + Dv) * Rkv a new token

// -- 8.1  the two forms --------------------------------------------------------------------------

inline real mla_scale(const Model& m) {
    return real(m.rope.score_scale / std::sqrt(double(m.config.Dn + m.config.Dr)));
}

// From a.q (T, H, [q_nope | q_rope]) and the cache of layer l to a.o (T, H, Dv).        V2 eq. 9-11, 17-18
// Each head expands keys and values for all positions; quadratic work a decoded token, kept as the
// definition.
inline void mla_naive(Session& s, const Mla& w, int l, int T, int pos) {
    const Config& c = s.model.config;
    Rows past = s.cache.layer(l);
    int width = c.q_dim() + c.Dv;                                             // [k_nope | k_rope | v]
    parallel_for(c.H, [&](int64_t h) {
        int first = int(h) * (c.Dn + c.Dv), n = pos + T;
        Rows kv{s.a.expanded + size_t(omp_get_thread_num()) * size_t(s.options.context) * size_t(width),
                width};
        matmul_rows(kv, past, w.wkv_b.view(first, c.Dn), n, 0, c.Dn);   // W^UK c
        for (int j = 0; j < n; j++) std::copy_n(past[j] + c.Rkv, c.Dr, kv[j] + c.Dn);
        matmul_rows({kv.data + c.q_dim(), width}, past, w.wkv_b.view(first + c.Dn, c.Dv), n, 0,
                    c.Dv);   // W^UV c
        KeysValues keys{kv, {kv.data + c.q_dim(), width}, c.q_dim(), c.Dv, mla_scale(s.model)};
        for (int t = 0; t < T; t++) {
            int64_t i = int64_t(t) * c.H + h;
            attend(s.a.o + i * c.Dv, s.a.q + i * c.q_dim(), keys, pos + t + 1, thread_scores(s));
        }
    });
}

// out[t] (Rkv) = W^UK_h^T q_nope[t]: the sum runs over the rows of W^UK, each widened once for all T tokens.
inline void absorb_queries(Rows out, ConstRows q_nope, const Matrix& wk_b, int T) {
    Vector row(size_t(wk_b.cols));
    for (int t = 0; t < T; t++) std::fill_n(out[t], wk_b.cols, real(0));
    for (int d = 0; d < wk_b.rows; d++) {
        kernels.widen(row.data(), wk_b, d);
        for (int t = 0; t < T; t++) kernels.axpy(out[t], q_nope[t][d], row.data(), wk_b.cols);
    }
}

// As mla_naive, without expanding the cache.                                              V2 appendix C
inline void mla_absorbed(Session& s, const Mla& w, int l, int T, int pos) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    Rows past = s.cache.layer(l);
    int width = c.Rkv + c.Dr;
    parallel_for(c.H, [&](int64_t h) {
        Rows q{a.q + h * c.q_dim(), c.H * c.q_dim()}, absorbed{a.q_absorbed + h * width, c.H * width};
        absorb_queries(absorbed, q, w.wkv_b.view(int(h) * (c.Dn + c.Dv), c.Dn), T);
        for (int t = 0; t < T; t++) std::copy_n(q[t] + c.Dn, c.Dr, absorbed[t] + c.Rkv);
    });
    KeysValues latent{past, past, width, c.Rkv, mla_scale(s.model)};
    parallel_for(int64_t(T) * c.H, [&](int64_t i) {
        attend(a.z + i * c.Rkv, a.q_absorbed + i * width, latent, pos + int(i / c.H) + 1, thread_scores(s));
    });
    parallel_for(c.H, [&](int64_t h) {
        Matrix wv_b = w.wkv_b.view(int(h) * (c.Dn + c.Dv) + c.Dn, c.Dv);
        matmul_rows({a.o + h * c.Dv, c.H * c.Dv}, {a.z + h * c.Rkv, c.H * c.Rkv}, wv_b, T, 0, c.Dv);
    });
}

// -- 8.2  mla: projections, norms, rotation, cache -----------------------------------------------

constexpr double LATENT_EPS = 1e-6;   // q_a_layernorm, kv_a_layernorm: their own eps, not the config's

inline void tap_mla(const Session& s, int l, int T, int pos) {
    if (!s.taps) return;
    const Config& c = s.model.config;
    Rows past = s.cache.layer(l);
    Vector q_nope, q_rope, c_kv, k_rope;
    for (int64_t i = 0; i < int64_t(T) * c.H; i++) {
        const real* q = s.a.q + i * c.q_dim();
        q_nope.insert(q_nope.end(), q, q + c.Dn);
        q_rope.insert(q_rope.end(), q + c.Dn, q + c.q_dim());
    }
    for (int t = 0; t < T; t++) {
        const real* row = past[pos + t];
        c_kv.insert(c_kv.end(), row, row + c.Rkv);
        k_rope.insert(k_rope.end(), row + c.Rkv, row + c.Rkv + c.Dr);
    }
    s.tap(l, "q_nope", q_nope.data(), T, {c.H, c.Dn});
    s.tap(l, "q_rope", q_rope.data(), T, {c.H, c.Dr});
    s.tap(l, "c_kv", c_kv.data(), T, {c.Rkv});
    s.tap(l, "k_rope", k_rope.data(), T, {c.Dr});
}

//   c^Q = RMSNorm(W^DQ u), [q_nope | q_rope] = W^UQ c^Q                   V3 eq. 6-9
//   [c | k] = W^DKV u,  c^KV = RMSNorm(c),  k_rope = RoPE(k)              V3 eq. 1-3
// a.y (T, D) = attention of a.u (T, D) at positions pos, pos + 1, ...; writes the cache of layer l.
inline void mla(Session& s, const Mla& w, int l, int T, int pos) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    Rows past = s.cache.layer(l);
    int width = c.Rkv + c.Dr, q_dim = c.q_dim();
    if (c.Rq) {
        matmul(a.c_q, a.u, w.wq_a, T);
        rmsnorm({a.c_q, c.Rq}, {a.c_q, c.Rq}, w.q_norm, T, LATENT_EPS);
        s.tap(l, "c_q", a.c_q, T, {c.Rq});
    }
    if (c.Rq) matmul(a.q, a.c_q, w.wq_b, T);
    else matmul(a.q, a.u, w.wq, T);
    matmul(a.kv, a.u, w.wkv_a, T);
    rmsnorm({past[pos], width}, {a.kv, width}, w.kv_norm, T, LATENT_EPS);
    parallel_for(T, [&](int64_t t) {
        const real* cos_sin = a.cos_sin + t * c.Dr;
        real* k_rope = std::copy_n(a.kv + t * width + c.Rkv, c.Dr, past[pos + t] + c.Rkv) - c.Dr;
        rope_interleaved(k_rope, cos_sin, c.Dr);
        for (int h = 0; h < c.H; h++) rope_interleaved(a.q + (t * c.H + h) * q_dim + c.Dn, cos_sin, c.Dr);
    });
    tap_mla(s, l, T, pos);
    (s.options.mla == MlaForm::NAIVE ? mla_naive : mla_absorbed)(s, w, l, T, pos);
    matmul(a.y, a.o, w.wo, T);
}

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

// out (T, D) from x (T, D); a.gate, a.up are scratch.
inline void swiglu(real* out, const real* x, const Mlp& w, int T, Activations& a) {
    int width = w.w_gate.rows;
    matmul(a.gate, x, w.w_gate, T);
    matmul(a.up, x, w.w_up, T);
    parallel_for(T, [&](int64_t t) {
        real *gate = a.gate + t * width, *up = a.up + t * width;
        for (int i = 0; i < width; i++) gate[i] = silu(gate[i]) * up[i];
    });
    matmul(out, a.gate, w.w_down, T);
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

// One token's routing. E-wide arrays are rows of the activations; `choice` is the score by which experts
// are picked.
struct Routing {
    const real* logits;           // (E)
    real *affinity, *choice;      // (E)
    int* idx;                     // (K), in descending order of choice
    real* weight;                 // (K), in the order of idx
};

inline void affinities(const Routing& r, const Config& c) {
    std::copy_n(r.logits, c.E, r.affinity);
    if (!c.sigmoid_affinity) return softmax(r.affinity, c.E);
    for (int e = 0; e < c.E; e++) r.affinity[e] = sigmoid(r.logits[e]);
}

// Sets the choice of all experts outside the `topk_group` groups with the best scores to -inf. (0 would
// not do: with negative biases it can beat an expert of a kept group.)
inline void keep_best_groups(const Routing& r, const std::vector<real>& score, const Config& c) {
    int n_group = int(score.size()), size = c.E / n_group;
    std::vector<int> best(static_cast<size_t>(c.topk_group));
    top_k(best.data(), score.data(), n_group, c.topk_group);
    for (int g = 0; g < n_group; g++) {
        if (std::find(best.begin(), best.end(), g) != best.end()) continue;
        std::fill_n(r.choice + g * size, size, -std::numeric_limits<real>::infinity());
    }
}

//   pick = top-K of s                                                    V2-Lite
inline void gate_greedy(const Routing& r, const real*, const Config& c) {
    std::copy_n(r.affinity, c.E, r.choice);
}

//   group score = max of s in the group; pick = top-K of s in the best groups               V2 section 2.2.2
inline void gate_group_limited_greedy(const Routing& r, const real*, const Config& c) {
    std::copy_n(r.affinity, c.E, r.choice);
    int size = c.E / c.n_group;
    std::vector<real> score;
    for (int g = 0; g < c.n_group; g++)
        score.push_back(*std::max_element(r.choice + g * size, r.choice + (g + 1) * size));
    keep_best_groups(r, score, c);
}

//   group score = sum of the two best s + b; pick = top-K of s + b in the best groups      V3 eq. 16, 2.1.2
inline void gate_noaux_tc(const Routing& r, const real* bias, const Config& c) {
    for (int e = 0; e < c.E; e++) r.choice[e] = r.affinity[e] + bias[e];
    int size = c.E / c.n_group, best[2];
    std::vector<real> score;
    for (int g = 0; g < c.n_group; g++) {
        const real* choice = r.choice + g * size;
        top_k(best, choice, size, 2);
        score.push_back(choice[best[0]] + choice[best[1]]);
    }
    keep_best_groups(r, score, c);
}

//   g_e = s_e / (sum over pick of s + 1e-20) * scale                     V3 eq. 13: from s, not from s + b
// V2's published code, when told to normalise, does not scale; noaux_tc always scales.
inline void mixture_weights(const Routing& r, const Config& c) {
    bool normalise = c.norm_topk && c.K > 1;
    real sum = 0, scale = normalise && c.gate != Gate::NOAUX_TC ? real(1) : real(c.routed_scale);
    for (int k = 0; k < c.K; k++) sum += r.affinity[r.idx[k]];
    for (int k = 0; k < c.K; k++) {
        real s = r.affinity[r.idx[k]];
        r.weight[k] = (normalise ? s / (sum + real(1e-20)) : s) * scale;
    }
}

// bias: (E), or null for the gates that have none
inline void route(const Routing& r, const real* bias, const Config& c) {
    affinities(r, c);
    switch (c.gate) {
    case Gate::GREEDY: gate_greedy(r, bias, c); break;
    case Gate::GROUP_LIMITED_GREEDY: gate_group_limited_greedy(r, bias, c); break;
    case Gate::NOAUX_TC: gate_noaux_tc(r, bias, c); break;
    }
    top_k(r.idx, r.choice, c.E, c.K);
    mixture_weights(r, c);
}

// -- 10.2  dispatch: sort the (token, expert) pairs by expert ------------------------------------

// Expert e works on slots first[e] .. first[e + 1]; a slot is one pair, slot_token its token, in token order.
inline std::vector<int> dispatch(Activations& a, const Config& c, int T) {
    std::vector<int> first(size_t(c.E) + 1);
    for (int i = 0; i < T * c.K; i++) first[size_t(a.expert_idx[i]) + 1]++;
    for (size_t e = 0; e < size_t(c.E); e++) first[e + 1] += first[e];
    std::vector<int> next = first;
    for (int i = 0; i < T * c.K; i++) {
        a.slot[i] = next[size_t(a.expert_idx[i])]++;
        a.slot_token[a.slot[i]] = i / c.K;
    }
    return first;
}

// -- 10.3  moe: route, compute expert by expert, combine -----------------------------------------

// a.y (T, D) = experts' mixture of a.u (T, D). Each expert's weights are read once for all its tokens;
// the sum over a token's experts runs in the order of its own picks, shared expert last, so company does
// not change its bits.
inline void moe(Session& s, const Moe& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    matmul(a.router_logits, a.u, w.gate_w, T);
    parallel_for(T, [&](int64_t t) {
        route({a.router_logits + t * c.E, a.affinity + t * c.E, a.choice + t * c.E, a.expert_idx + t * c.K,
               a.gate_weight + t * c.K}, w.gate_bias.data(), c);
    });
    s.tap(l, "router_logits", a.router_logits, T, {c.E});
    if (s.taps && l < c.n_layers) s.taps->add(text_of("layers.%d.expert_idx", l), a.expert_idx, T, c.K);
    s.tap(l, "expert_weight", a.gate_weight, T, {c.K});

    std::vector<int> first = dispatch(a, c, T);
    for (size_t e = 0; e < size_t(c.E); e++) {
        int n = first[e + 1] - first[e];
        if (n == 0) continue;
        for (int i = 0; i < n; i++)
            std::copy_n(a.u + int64_t(a.slot_token[first[e] + i]) * c.D, c.D, a.expert_in + int64_t(i) * c.D);
        swiglu(a.expert_out + int64_t(first[e]) * c.D, a.expert_in, w.experts[e], n, a);
    }
    if (c.n_shared) swiglu(a.y, a.u, w.shared, T, a);
    parallel_for(T, [&](int64_t t) {
        real *mix = a.expert_in, *y = a.y + t * c.D;
        mix += t * c.D;                                   // the experts are done with it
        std::fill_n(mix, c.D, real(0));
        for (int k = 0; k < c.K; k++)
            kernels.axpy(mix, a.gate_weight[t * c.K + k], a.expert_out + int64_t(a.slot[t * c.K + k]) * c.D,
                         c.D);
        if (c.n_shared) add(mix, y, size_t(c.D));
        std::copy_n(mix, c.D, y);
    });
}

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
// `forward` below is the whole of it: every call is a chapter.

// -- 11.1  bind: every tensor in its place -------------------------------------------------------

// Looks up tensors by name and checks dtype and shape. Without a checkpoint it only counts, so the bill
// of a model can be had from config.json alone.
class Binder {
public:
    Binder(const Checkpoint* checkpoint, const std::string& folder, bool fp8)
        : checkpoint_(checkpoint), folder_(folder), fp8_(fp8) {}
    uint64_t parameters = 0;             // numbers asked for, scales not counted

    Matrix matrix(const std::string& name, int rows, int cols) {
        parameters += uint64_t(rows) * uint64_t(cols);
        if (!checkpoint_) return {};
        const Tensor& t = find(name, {uint64_t(rows), uint64_t(cols)});
        Matrix m{t.data, nullptr, dtype_of(t, name), rows, cols, 0};
        if (m.dtype == Dtype::F8_E4M3) m.scale = scales(t, name, rows, cols);
        return m;
    }
    Vector vector(const std::string& name, int n) {
        parameters += uint64_t(n);
        if (!checkpoint_) return {};
        const Tensor& t = find(name, {uint64_t(n)});
        Matrix m{t.data, nullptr, dtype_of(t, name), 1, n, 0};
        if (m.dtype == Dtype::F8_E4M3)
            fail("%s: tensor '%s' is F8_E4M3, a vector cannot be", t.file.c_str(), name.c_str());
        Vector out(static_cast<size_t>(n));
        widen_plain(out.data(), m, 0);
        for (real v : out) {
            if (!std::isfinite(v))
                fail("%s: tensor '%s' holds a number that is not finite", t.file.c_str(), name.c_str());
        }
        return out;
    }
    // A tensor that the file may carry and the model does not need: a second copy, or old buffers.
    void ignore(const std::string& name, std::vector<uint64_t> shape) {
        if (checkpoint_ && checkpoint_->tensors.count(name)) find(name, shape);
    }
    // Every tensor of the files must have found its place.
    void finish() const {
        for (auto& [name, tensor] : checkpoint_->tensors) {
            if (used_.count(name) || name.ends_with("rotary_emb.inv_freq")) continue;
            fail("%s: tensor '%s' has no place in this model", tensor.file.c_str(),
                 Fields::printable(name).c_str());
        }
    }

private:
    const Checkpoint* checkpoint_;
    std::string folder_;
    bool fp8_;
    std::set<std::string> used_;

    static std::string shape_text(const std::vector<uint64_t>& shape) {
        std::string text;
        for (uint64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
        return "(" + text + ")";
    }
    const Tensor& find(const std::string& name, const std::vector<uint64_t>& shape) {
        auto at = checkpoint_->tensors.find(name);
        if (at == checkpoint_->tensors.end())
            fail("%s: no tensor '%s', which config.json asks for", folder_.c_str(), name.c_str());
        if (at->second.shape != shape)
            fail("%s: tensor '%s' has shape %s, config.json asks for %s", at->second.file.c_str(),
                 name.c_str(), shape_text(at->second.shape).c_str(), shape_text(shape).c_str());
        used_.insert(name);
        return at->second;
    }
    Dtype dtype_of(const Tensor& t, const std::string& name) const {
        if (t.dtype == "F32") return Dtype::F32;
        if (t.dtype == "BF16") return Dtype::BF16;
        if (t.dtype == "F16") return Dtype::F16;
        if (t.dtype != "F8_E4M3")
            fail("%s: tensor '%s' has dtype %s, which weights do not have", t.file.c_str(), name.c_str(),
                 t.dtype.c_str());
        if (!fp8_)
            fail("%s: tensor '%s' is F8_E4M3, but config.json has no quantization_config", t.file.c_str(),
                 name.c_str());
        return Dtype::F8_E4M3;
    }
    const std::byte* scales(const Tensor& weight, const std::string& name, int rows, int cols) {
        auto blocks = [](int n) { return uint64_t((n + SCALE_BLOCK - 1) / SCALE_BLOCK); };
        const Tensor& t = find(name + "_scale_inv", {blocks(rows), blocks(cols)});
        if (t.dtype != "F32")
            fail("%s: tensor '%s_scale_inv' has dtype %s, not F32", t.file.c_str(), name.c_str(),
                 t.dtype.c_str());
        for (uint64_t i = 0; i < t.bytes; i += 4) {
            if (!std::isfinite(load<float>(t.data + i)))
                fail("%s: tensor '%s_scale_inv' (of %s) holds a scale that is not finite", t.file.c_str(),
                     name.c_str(), weight.file.c_str());
        }
        return t.data;
    }
};

inline Mlp bind_mlp(Binder& b, const std::string& p, int D, int width) {
    return {b.matrix(p + "gate_proj.weight", width, D), b.matrix(p + "up_proj.weight", width, D),
            b.matrix(p + "down_proj.weight", D, width)};
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
    w.wkv_b = b.matrix(p + "kv_b_proj.weight", c.H * (c.Dn + c.Dv), c.Rkv);
    w.wo = b.matrix(p + "o_proj.weight", c.D, c.H * c.Dv);
    return w;
}

inline Gqa bind_gqa(Binder& b, const Config& c, const std::string& p) {
    Gqa w;
    int q_rows = c.H * c.head_dim, kv_rows = c.G * c.head_dim;
    w.wq = b.matrix(p + "q_proj.weight", q_rows, c.D);
    w.wk = b.matrix(p + "k_proj.weight", kv_rows, c.D);
    w.wv = b.matrix(p + "v_proj.weight", kv_rows, c.D);
    w.wo = b.matrix(p + "o_proj.weight", c.D, q_rows);
    if (!c.qkv_bias) return w;
    w.bq = b.vector(p + "q_proj.bias", q_rows);
    w.bk = b.vector(p + "k_proj.bias", kv_rows);
    w.bv = b.vector(p + "v_proj.bias", kv_rows);
    return w;
}

inline Moe bind_moe(Binder& b, const Config& c, const std::string& p) {
    Moe w;
    w.gate_w = b.matrix(p + "gate.weight", c.E, c.D);
    if (c.gate == Gate::NOAUX_TC) w.gate_bias = b.vector(p + "gate.e_score_correction_bias", c.E);
    for (int e = 0; e < c.E; e++) w.experts.push_back(bind_mlp(b, p + text_of("experts.%d.", e), c.D, c.F));
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
    if (c.is_moe(l)) w.moe = bind_moe(b, c, p + "mlp.");
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
    b.ignore(p + "embed_tokens.weight", {uint64_t(c.V), uint64_t(c.D)});
    b.ignore(p + "shared_head.head.weight", {uint64_t(c.V), uint64_t(c.D)});
    return w;
}

inline void bind_model(Binder& b, Model& m) {
    const Config& c = m.config;
    m.embed = b.matrix("model.embed_tokens.weight", c.V, c.D);
    if (m.embed.dtype == Dtype::F8_E4M3) fail("%s: F8_E4M3 embeddings are not supported", c.file.c_str());
    m.norm = b.vector("model.norm.weight", c.D);
    if (c.tied) {
        m.head = m.embed;
        b.ignore("lm_head.weight", {uint64_t(c.V), uint64_t(c.D)});
    } else {
        m.head = b.matrix("lm_head.weight", c.V, c.D);
    }
    for (int l = 0; l < c.n_layers; l++) m.layers.push_back(bind_layer(b, c, l));
    if (c.n_mtp) m.mtp.push_back(bind_mtp(b, c));
}

inline Config read_config(const fs::path& folder) {
    fs::path file = folder / "config.json";
    if (!fs::exists(folder)) fail("%s: no such folder", folder.c_str());
    if (folder.extension() == ".gguf") fail("%s: GGUF files are not supported by this build", folder.c_str());
    if (!fs::exists(file)) fail("%s: no config.json (not a model folder?)", folder.c_str());
    return parse_config(read_json_file(file), file.string());
}

// Opens and checks a Hugging Face folder. Weights are mapped, not read: this takes milliseconds.
inline Model load_model(const fs::path& folder) {
    Model m;
    m.config = read_config(folder);
    m.rope = make_rope(m.config.rope, m.config.rope_dim());
    m.checkpoint = open_checkpoint(folder);
    Binder binder(&m.checkpoint, folder.string(), m.config.fp8);
    bind_model(binder, m);
    binder.finish();
    return m;
}

// -- 11.2  block, forward, head ------------------------------------------------------------------

// One layer on the residual stream x (T, D), in place.
inline void block(Session& s, const Layer& w, real* x, int l, int T, int pos) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    size_t n = size_t(T) * size_t(c.D);

    rmsnorm({a.u, c.D}, {x, c.D}, w.attn_norm, T, c.eps);
    s.tap(l, "attn_norm", a.u, T, {c.D});
    if (c.mla()) mla(s, w.mla, l, T, pos);
    else gqa(s, w.gqa, l, T, pos);
    s.tap(l, "attn_out", a.y, T, {c.D});
    add(x, a.y, n);

    rmsnorm({a.u, c.D}, {x, c.D}, w.ffn_norm, T, c.eps);
    s.tap(l, "ffn_norm", a.u, T, {c.D});
    if (c.is_moe(l)) moe(s, w.moe, l, T);
    else swiglu(a.y, a.u, w.mlp, T, a);
    s.tap(l, "ffn_out", a.y, T, {c.D});
    add(x, a.y, n);
    s.tap(l, "out", x, T, {c.D});
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
    rope_table(a.cos_sin, m.rope, T, pos);
    for (int t = 0; t < T; t++) kernels.widen(a.x + int64_t(t) * c.D, m.embed, ids[size_t(t)]);
    if (s.taps) s.taps->add("embed", a.x, T, {c.D});
    for (int l = 0; l < c.n_layers; l++) block(s, m.layers[size_t(l)], a.x, l, T, pos);
    rmsnorm({a.h, c.D}, {a.x, c.D}, m.norm, T, c.eps);
    if (s.taps) s.taps->add("norm", a.h, T, {c.D});
    s.length = pos + T, s.h_pos = pos, s.h_rows = T;
}

// logits (T, V) = head h (T, D)
inline void head(const Model& m, real* logits, const real* h, int T) { matmul(logits, h, m.head, T); }

// Calls forward in chunks; after each, `done(pos, T)` may look at a.h. Stops early when interrupted.
inline void prefill(Session& s, std::span<const int> ids, int pos,
                    const std::function<void(int, int)>& done) {
    for (size_t at = 0; at < ids.size() && !interrupted;) {
        size_t T = std::min(ids.size() - at, size_t(s.options.chunk));
        forward(s, ids.subspan(at, T), pos + int(at));
        done(pos + int(at), int(T));
        at += T;
    }
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

struct Sampling {
    double temperature = 0.6, top_p = 0.95, min_p = 0;   // DeepSeek's advice for R1
    int top_k = 0;                                       // 0: off
};

struct Candidate {
    int id;
    double p;
};
using Distribution = std::vector<Candidate>;             // sums to 1

// Sorts as many of the heaviest candidates to the front as it takes to hold `share` of the total, and
// drops the rest.
inline void keep_top_p(Distribution& d, double share) {
    double total = 0;
    for (const Candidate& c : d) total += c.p;
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

// softmax(logits / temperature), then top-k, top-p and min-p, each on what the one before left. logits: (V)
inline Distribution distribution(const real* logits, int V, const Sampling& s) {
    if (!std::all_of(logits, logits + V, [](real z) { return std::isfinite(z); }))
        fail("the model computed logits that are no finite numbers (damaged weights?)");
    int best = int(std::max_element(logits, logits + V) - logits);
    double top = double(logits[best]);
    if (s.temperature == 0) return {{best, 1.0}};
    Distribution d;
    for (int i = 0; i < V; i++) d.push_back({i, std::exp((double(logits[i]) - top) / s.temperature)});
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

inline int sample(const Distribution& d, Rng& rng) {
    double at = d.size() > 1 ? rng.uniform() : 0;
    for (const Candidate& c : d) {
        if (at < c.p) return c.id;
        at -= c.p;
    }
    return d.back().id;                                  // rounding left a sliver
}

// -- 12.2  generate ------------------------------------------------------------------------------

struct Generation {
    Sampling sampling;
    int max_tokens = std::numeric_limits<int>::max();
    std::vector<int> stops;                              // end-of-sentence ids: not shown, not kept
    int think_begin = -1, think_end = -1;                // ids, where the tokenizer has them
    int think_budget = -1;                               // tokens of thought; -1: no limit
    bool mtp = false;
    Rng rng{0};
};

struct Statistics {
    int prompt = 0, reused = 0, generated = 0, steps = 0, drafted = 0, accepted = 0;
    double prefill_s = 0, decode_s = 0;
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

// How many of `ids` need no forward pass, because the cache already holds them. The last token always
// needs one; with MTP so does the first one whose draft is missing, since the hidden state before it is
// gone.
inline int reusable(Session& s, std::span<const int> ids, bool mtp) {
    size_t common = 0, most = std::min({ids.size() - 1, size_t(s.length), s.tokens.size()});
    while (common < most && s.tokens[common] == ids[common]) common++;
    if (mtp) common = std::min(common - (common > 0), size_t(s.mtp_length));
    s.mtp_length = std::min(s.mtp_length, int(common));
    return int(common);
}

// Logits (rows, V) of the last rows of a.h.
inline Vector last_logits(const Session& s, int rows) {
    const Config& c = s.model.config;
    Vector logits(size_t(rows) * size_t(c.V));
    head(s.model, logits.data(), s.a.h + int64_t(s.h_rows - rows) * c.D, rows);
    return logits;
}

// The next token or tokens after s.tokens, of which all but the last one are in the cache.
inline std::vector<int> plain_step(Session& s, Generation& g) {
    forward(s, std::span(s.tokens).subspan(size_t(s.length)), s.length);
    return {sample(distribution(last_logits(s, 1).data(), s.model.config.V, g.sampling), g.rng)};
}
inline std::vector<int> mtp_step(Session& s, Generation& g, Statistics& stats);   // chapter 13
inline int mtp_catch_up(Session& s);

// Generates after the prompt `ids` until a stop token, max_tokens, the end of the context, or Ctrl-C.
// `progress(n)` is called with the number of prompt tokens done, `emit(id)` with each token. Keeps
// s.tokens and the cache for a next call.
inline Statistics generate(Session& s, std::span<const int> ids, Generation& g,
                           const std::function<void(int)>& progress, const std::function<void(int)>& emit) {
    Statistics stats;
    double start = seconds();
    stats.prompt = stats.reused = reusable(s, ids, g.mtp);
    s.tokens.assign(ids.begin(), ids.end());
    prefill(s, ids.subspan(size_t(stats.reused)), stats.reused, [&](int pos, int T) {
        if (g.mtp) mtp_catch_up(s);
        stats.prompt = pos + T;
        progress(stats.prompt);
    });
    stats.prefill_s = seconds() - start;
    if (interrupted) return stats;
    Thought thought(g, ids);
    std::vector<int> next = {
        sample(distribution(last_logits(s, 1).data(), s.model.config.V, g.sampling), g.rng)};
    while (!interrupted) {
        for (int id : next) {
            bool forced = thought.spent(g) && id != g.think_end;
            if (forced) id = g.think_end;
            if (std::find(g.stops.begin(), g.stops.end(), id) != g.stops.end() ||
                stats.generated == g.max_tokens) {
                stats.decode_s = seconds() - start - stats.prefill_s;
                return stats;
            }
            thought.see(g, id);
            s.tokens.push_back(id);
            stats.generated++;
            emit(id);
            if (forced) break;                           // what was drafted after it no longer follows
        }
        s.length = std::min(s.length, int(s.tokens.size()) - 1);   // forget a rejected draft
        if (int(s.tokens.size()) > s.options.context || stats.generated == g.max_tokens) break;
        stats.steps++;
        next = g.mtp ? mtp_step(s, g, stats) : plain_step(s, g);
    }
    stats.decode_s = seconds() - start - stats.prefill_s;
    return stats;
}

// -- 12.3  perplexity: how surprised is the model by a text? -------------------------------------

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
inline Perplexity perplexity(Session& s, std::span<const int> ids, int bos,
                             const std::function<void(size_t)>& progress) {
    const Config& c = s.model.config;
    Perplexity result;
    size_t room = size_t(s.options.context) - (bos >= 0);
    for (size_t begin = 0; begin < ids.size() && !interrupted; begin += room) {
        std::vector<int> window(ids.begin() + int64_t(begin),
                                ids.begin() + int64_t(std::min(ids.size(), begin + room)));
        if (bos >= 0) window.insert(window.begin(), bos);
        Vector logits(size_t(c.V));
        prefill(s, window, 0, [&](int pos, int T) {
            for (int t = 0; t < T && size_t(pos + t + 1) < window.size(); t++) {
                head(s.model, logits.data(), s.a.h + int64_t(t) * c.D, 1);
                result.nll += negative_log_likelihood(logits.data(), c.V, window[size_t(pos + t + 1)]);
                result.tokens++;
            }
            progress(begin + size_t(pos + T));
        });
    }
    return result;
}

// =================================================================================================
// Chapter 13. Multi-token prediction
// =================================================================================================
//
// Can a model say two tokens at once? V3 was trained with a second, small predictor on top: from the
// hidden state of token i and the embedding of token i + 1 it predicts token i + 2 (V3 section 2.2):
//
//      h_i (after the final norm) ---- hnorm --+
//                                              +-- concat, embedding first -- mtp_proj -- block -- norm -- head
//      embed(token i + 1) ------------ enorm --+
//
// In training it makes the hidden states plan ahead. In use it drafts: while the model forwards token i +
// 1 it can forward the drafted token i + 2 in the same pass, nearly for free, since the weights are read
// once for both. The model's own logits then say whether the draft stands. Nothing is lost: at
// temperature 0 the draft must equal the argmax; otherwise it is accepted with probability min(1, p/q)
// and else replaced by a sample of max(p - q, 0), which together is exactly p (Leviathan et al. 2023; the
// identity is tested in tests/unit/ch13_mtp.cpp).

// -- 13.1  mtp_forward ---------------------------------------------------------------------------

//   h'_i = M [RMSNorm(Emb(t_{i+1})) ; RMSNorm(h_i)]   V3 eq. 21 (the paper has h first, the checkpoints second)
// h: (T, D), final hidden states at pos, pos + 1, ...; next: the tokens after those positions (T). Leaves
// what the head needs in a.mtp_h (T, D). Writes row `pos` and on of the MTP layer's own cache.
inline void mtp_forward(Session& s, const real* h, std::span<const int> next, int pos) {
    const Model& m = s.model;
    const Mtp& w = m.mtp[0];
    const Config& c = m.config;
    Activations& a = s.a;
    int T = int(next.size());
    for (int t = 0; t < T; t++) kernels.widen(a.mtp_in + 2 * int64_t(t) * c.D, m.embed, next[size_t(t)]);
    rmsnorm({a.mtp_in, 2 * c.D}, {a.mtp_in, 2 * c.D}, w.enorm, T, c.eps);
    rmsnorm({a.mtp_in + c.D, 2 * c.D}, {h, c.D}, w.hnorm, T, c.eps);
    matmul(a.mtp_x, a.mtp_in, w.proj, T);
    if (s.taps) s.taps->add("mtp.in", a.mtp_x, T, {c.D});
    rope_table(a.cos_sin, m.rope, T, pos);
    block(s, w.layer, a.mtp_x, c.n_layers, T, pos);
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
    mtp_forward(s, h, std::span(s.tokens).subspan(size_t(begin) + 1, size_t(end - begin)), begin);
    return end - begin;
}

// -- 13.2  draft, verify, correct ----------------------------------------------------------------

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
    head(s.model, logits.data(), s.a.mtp_h + int64_t(rows - 1) * c.D, 1);
    Distribution q = distribution(logits.data(), c.V, g.sampling);
    int draft = sample(q, g.rng), pair[2] = {s.tokens.back(), draft};
    forward(s, pair, s.length);
    Vector both = last_logits(s, 2);
    int next = verify(distribution(both.data(), c.V, g.sampling), q, draft, g.rng);
    stats.drafted++;
    if (next != draft) return {next};
    stats.accepted++;
    return {draft, sample(distribution(both.data() + c.V, c.V, g.sampling), g.rng)};
}

// =================================================================================================
// Appendix A. Fast CPU
// =================================================================================================
//
// Can the inner loops of chapter 5 be fast and stay the same? Their sixteen lanes are two AVX2 registers.
// Each kernel below does the additions of its plain twin in the same order, so the choice, made once at
// start, cannot be seen in any result (tests/unit/chA_fast_cpu.cpp compares bits). The gain for several
// tokens at once: a weight is widened once for up to four. DEEPSEEK_SIMD=plain or avx2 in the environment
// overrides the choice; `--exact` means plain.

#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma,f16c"), always_inline)) inline
#define AVX2_ENTRY __attribute__((target("avx2,fma,f16c"))) inline

namespace avx2 {

// -- A.1  eight weights at a time ----------------------------------------------------------------

AVX2 __m128i load_half(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

AVX2 __m256 widen8(F32Row w, int i) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(w.p + 4 * size_t(i)));
}
AVX2 __m256 widen8(RealRow w, int i) { return _mm256_loadu_ps(w.p + i); }
AVX2 __m256 widen8(F16Row w, int i) { return _mm256_cvtph_ps(load_half(w.p + 2 * size_t(i))); }
AVX2 __m256 widen8(Bf16Row w, int i) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(w.p + 2 * size_t(i))), 16));
}
// Exponent and fraction of an e4m3 are moved to their places in an f32 and the bias (7 against 127) is
// made up by a multiplication with 2^120, which also does the subnormals. 127 is NaN.
AVX2 __m256 widen8(E4m3Row w, int i) {
    __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.p + i)));
    __m256i magnitude = _mm256_and_si256(b, _mm256_set1_epi32(127)),
            sign = _mm256_slli_epi32(_mm256_srli_epi32(b, 7), 31);
    __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127));
    __m256 value =
        _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)), _mm256_set1_ps(0x1p120f));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_or_si256(_mm256_castps_si256(value), sign), nan));
}

// -- A.2  dots of one row with T vectors ---------------------------------------------------------

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
        for (int t = 0; t < T; t++) {
            v[t].low = _mm256_fmadd_ps(low, _mm256_loadu_ps(x[t] + i), v[t].low);
            v[t].high = _mm256_fmadd_ps(high, _mm256_loadu_ps(x[t] + i + 8), v[t].high);
        }
    }
    if (whole == end) return;
    for (int t = 0; t < T; t++) add_tail(v[t], w, x[t], whole, end);
}

template <class Row, int T>
AVX2_ENTRY void tile(float* out, int64_t out_stride, Row w, const std::byte* scale, ConstRows x, int n) {
    Lanes16 v[T];
    for (int t = 0; t < T; t++) v[t] = zero();
    if constexpr (std::is_same_v<Row, E4m3Row>) {
        for (int begin = 0; begin < n; begin += SCALE_BLOCK, scale += 4) {
            Lanes16 block[T];
            for (int t = 0; t < T; t++) block[t] = zero();
            add_products<Row, T>(block, w, x, begin, std::min(n, begin + SCALE_BLOCK));
            __m256 s = _mm256_set1_ps(load<float>(scale));
            for (int t = 0; t < T; t++)
                v[t] = {_mm256_fmadd_ps(s, block[t].low, v[t].low),
                        _mm256_fmadd_ps(s, block[t].high, v[t].high)};
        }
    } else {
        add_products<Row, T>(v, w, x, 0, n);
    }
    for (int t = 0; t < T; t++) out[t * out_stride] = sum(v[t]);
}

template <class Row>
void dots_of(float* out, int64_t out_stride, Row w, const std::byte* scale, ConstRows x, int n, int T) {
    for (int t = 0; t < T; t += TOKEN_TILE) {
        float* y = out + t * out_stride;
        ConstRows rows{x[t], x.stride};
        switch (std::min(TOKEN_TILE, T - t)) {
        case 1: tile<Row, 1>(y, out_stride, w, scale, rows, n); break;
        case 2: tile<Row, 2>(y, out_stride, w, scale, rows, n); break;
        case 3: tile<Row, 3>(y, out_stride, w, scale, rows, n); break;
        default: tile<Row, 4>(y, out_stride, w, scale, rows, n); break;
        }
    }
}

inline void dots(float* out, int64_t out_stride, const Matrix& w, int r, ConstRows x, int T) {
    const std::byte* p = w.row(r);
    switch (w.dtype) {
    case Dtype::F32: return dots_of(out, out_stride, F32Row{p}, nullptr, x, w.cols, T);
    case Dtype::BF16: return dots_of(out, out_stride, Bf16Row{p}, nullptr, x, w.cols, T);
    case Dtype::F16: return dots_of(out, out_stride, F16Row{p}, nullptr, x, w.cols, T);
    case Dtype::F8_E4M3: return dots_of(out, out_stride, E4m3Row{p}, w.scale_row(r), x, w.cols, T);
    }
}

inline float dot_real(const float* a, const float* b, int n) {
    float out;
    tile<RealRow, 1>(&out, 1, RealRow{a}, nullptr, {b, 0}, n);
    return out;
}

// -- A.3  axpy, widen ----------------------------------------------------------------------------

AVX2_ENTRY void axpy(float* out, float a, const float* v, int n) {
    int i = 0;
    for (__m256 factor = _mm256_set1_ps(a); i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_fmadd_ps(factor, _mm256_loadu_ps(v + i), _mm256_loadu_ps(out + i)));
    for (; i < n; i++) out[i] = std::fma(a, v[i], out[i]);
}

template <class Row> AVX2_ENTRY void widen_row(float* out, Row w, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, widen8(w, i));
    for (; i < n; i++) out[i] = w(i);
}

inline void widen(float* out, const Matrix& w, int r) {
    const std::byte *p = w.row(r), *scale = w.scale_row(r);
    switch (w.dtype) {
    case Dtype::F32: return widen_row(out, F32Row{p}, w.cols);
    case Dtype::BF16: return widen_row(out, Bf16Row{p}, w.cols);
    case Dtype::F16: return widen_row(out, F16Row{p}, w.cols);
    case Dtype::F8_E4M3: widen_row(out, E4m3Row{p}, w.cols);
    }
    for (int i = 0; i < w.cols; i++) out[i] *= load<float>(scale + 4 * size_t(i / SCALE_BLOCK));
}

}  // namespace avx2
#endif

// -- A.4  choose_kernels: once, at start ---------------------------------------------------------

inline std::vector<Kernels> available_kernels() {
    std::vector<Kernels> all = {Kernels{}};
#if defined(DEEPSEEK_FLOAT) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        all.push_back({"avx2", avx2::dots, avx2::dot_real, avx2::axpy, avx2::widen});
#endif
    return all;
}

// The fastest, or the one called `name` (empty: no wish).
inline void choose_kernels(const std::string& name) {
    std::string names;
    for (const Kernels& k : available_kernels()) {
        names += (names.empty() ? "" : ", ") + std::string(k.name);
        if (name.empty() || name == k.name) kernels = k;
    }
    if (!name.empty() && kernels.name != name)
        fail("DEEPSEEK_SIMD=%s: this processor and build have %s", name.c_str(), names.c_str());
}

// =================================================================================================
// Chapter C. Command line
// =================================================================================================
//
//      deepseek run -p "Which is larger, 9.11 or 9.9?"            the model in weights/
//      deepseek run -m DeepSeek-R1-Distill-Qwen-1.5B -f question.txt --temp 0.6
//      deepseek chat
//      echo '["hello"]' | deepseek tokenize --lines
//      deepseek logits -m M --ids 1,2,3 --taps --out taps.safetensors
//      deepseek perplexity -f text.txt      deepseek info      deepseek bench
//
// Results go to stdout, progress and statistics to stderr. Exit code 0: done; 1: the input is wrong; 2: a
// check failed.

#ifndef DEEPSEEK_NO_MAIN
#include <CLI/CLI.hpp>

// -- C.1  options --------------------------------------------------------------------------------

struct Options {
    std::string model, device = "auto", quant = "none", mla = "absorbed", prompt, file, dash, system, ids,
                       out;
    int threads = 0, context = 0, chunk = 128, max_tokens = -1, think_budget = -1;
    int bench_prompt = 512, bench_tokens = 128, repeats = 5;
    std::optional<double> temperature, top_p, min_p;
    std::optional<int> top_k;
    uint64_t seed = 0;
    bool exact = false, json = false, raw = false, mtp = false, show_prompt = false, taps = false;
    bool add_bos = false, decode = false, chat = false, as_ids = false, lines = false;
};

constexpr int DEFAULT_CONTEXT = 32768;   // the length at which DeepSeek evaluates R1 and its distills

inline fs::path shipped_model() {
    std::error_code error;
    fs::path here = fs::read_symlink("/proc/self/exe", error).parent_path();
    for (const fs::path& folder : {here, here.parent_path()}) {
        if (fs::exists(folder / "weights" / "tiny" / "config.json")) return folder / "weights" / "tiny";
    }
    fail("no model: -m is missing, and there is no weights/tiny beside the program");
}

inline fs::path model_path(const Options& o) { return o.model.empty() ? shipped_model() : fs::path(o.model); }

// Common checks; sets the number of threads and the kernels.
inline void prepare(const Options& o) {
    if (o.device == "cuda") fail("--device cuda: this build has no CUDA");
    if (o.quant != "none")
        fail("--quant %s: this build runs the weights as they are in the file", o.quant.c_str());
    omp_set_num_threads(o.threads > 0 ? o.threads : omp_get_num_procs());
    const char* wish = std::getenv("DEEPSEEK_SIMD");
    choose_kernels(o.exact ? "plain" : wish ? wish : "");
}

// -- C.2  the memory plan ------------------------------------------------------------------------

// Bytes that the system can give without swapping; 0 where it does not say.
inline uint64_t available_memory() {
    std::ifstream in("/proc/meminfo");
    for (std::string line; std::getline(in, line);) {
        unsigned long long kib = 0;
        if (std::sscanf(line.c_str(), "MemAvailable: %llu kB", &kib) == 1) return uint64_t(kib) * 1024;
    }
    return 0;
}

struct MemoryPlan {
    uint64_t cache, activations, available;
    uint64_t needed() const { return cache + activations; }
    bool fits() const { return available == 0 || needed() <= available; }
};

inline MemoryPlan memory_plan(const Config& c, const SessionOptions& s) {
    return {Cache::bytes(c, s.context), Activations::bytes(c, s, omp_get_max_threads()), available_memory()};
}

inline double gigabytes(uint64_t bytes) { return double(bytes) / 1e9; }

inline SessionOptions session_options(const Options& o, const Config& c, int default_context) {
    SessionOptions s;
    s.context = o.context > 0 ? o.context : std::min(c.max_context, default_context);
    s.chunk = std::min(std::max(o.chunk, 2), std::max(s.context, 2));   // 2: a token and a draft
    s.mla = o.mla == "naive" ? MlaForm::NAIVE : MlaForm::ABSORBED;
    if (s.context > c.max_context)
        fail("--ctx %d: the model's context is %d tokens", s.context, c.max_context);
    return s;
}

inline void require_memory(const Config& c, const SessionOptions& s) {
    MemoryPlan plan = memory_plan(c, s);
    if (!plan.fits())
        fail("not enough memory for --ctx %d: cache %.2f GB and activations %.2f GB need %.2f GB more than "
             "the %.2f GB available",
             s.context, gigabytes(plan.cache), gigabytes(plan.activations),
             gigabytes(plan.needed() - plan.available), gigabytes(plan.available));
}

// -- C.3  prompts and output ---------------------------------------------------------------------

inline std::string read_stdin() { return read_stream(std::cin, "stdin", TEXT_LIMIT); }

inline std::string json_array(std::span<const int> ids) {
    std::string out = "[";
    for (int id : ids) out += (out.size() > 1 ? "," : "") + std::to_string(id);
    return out + "]";
}

inline std::string joined(const std::vector<double>& values, const char* format) {
    std::string out;
    for (double v : values) {
        char number[40];
        std::snprintf(number, sizeof number, format, v);
        out += (out.empty() ? "" : ", ") + std::string(number);
    }
    return out;
}

// The token text as it comes: characters whole, special tokens hidden, the thought dimmed on a terminal.
class Printer {
public:
    Printer(const Tokenizer& tokenizer, int think_begin, int think_end, bool in_thought)
        : tokenizer_(tokenizer), think_begin_(think_begin), think_end_(think_end),
          colour_(isatty(STDOUT_FILENO)) {
        if (colour_ && in_thought) dim(true);
    }
    void emit(int id) {
        if (tokenizer_.is_special(id)) return;
        if (colour_ && id == think_begin_) dim(true);
        write(stream_.push(tokenizer_.bytes(id)));
        if (colour_ && id == think_end_) dim(false);
    }
    void finish() {
        write(stream_.finish());
        if (dimmed_) dim(false);
        if (text_.empty() || text_.back() != '\n') std::fputc('\n', stdout);
        std::fflush(stdout);
    }
    const std::string& text() const { return text_; }

private:
    const Tokenizer& tokenizer_;
    int think_begin_, think_end_;
    bool colour_, dimmed_ = false;
    Utf8Stream stream_;
    std::string text_;

    void dim(bool on) {
        dimmed_ = on;
        std::fputs(on ? "\033[2m" : "\033[0m", stdout);
    }
    void write(const std::string& text) {
        text_ += text;
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
    }
};

// A bar on a terminal, nothing elsewhere.
class Progress {
public:
    Progress(const char* what, size_t total) : what_(what), total_(total), shown_(isatty(STDERR_FILENO)) {}
    ~Progress() { if (drawn_) std::fputs("\r\033[K", stderr); }
    Progress(const Progress&) = delete;
    void at(size_t n) {
        if (!shown_ || seconds() - start_ < 0.5) return;
        std::string bar(n * 30 / std::max<size_t>(total_, 1), '#');
        std::fprintf(stderr, "\r%s [%-30s] %zu / %zu", what_, bar.c_str(), n, total_);
        drawn_ = true;
    }

private:
    const char* what_;
    size_t total_;
    bool shown_, drawn_ = false;
    double start_ = seconds();
};

inline void print_statistics(const Statistics& s, const Generation& g) {
    auto rate = [](int n, double t) { return t > 0 ? n / t : 0.0; };
    std::fprintf(stderr, "%sprompt %d tokens", interrupted ? "interrupted: " : "", s.prompt);
    if (s.reused) std::fprintf(stderr, " (%d from the cache)", s.reused);
    std::fprintf(stderr, ", %.1f tok/s; generated %d tokens, %.1f tok/s",
                 rate(s.prompt - s.reused, s.prefill_s), s.generated, rate(s.generated, s.decode_s));
    if (g.mtp)
        std::fprintf(stderr, "; mtp: %d of %d drafts accepted (%.1f %%), %.2f tokens per step", s.accepted,
                     s.drafted, s.drafted ? 100.0 * s.accepted / s.drafted : 0.0,
                     s.steps ? double(s.generated - 1) / s.steps : 0.0);
    std::fputc('\n', stderr);
}

// -- C.4  run, chat ------------------------------------------------------------------------------

struct GenerationConfig {
    Sampling sampling;
    std::vector<int> eos;
};

// generation_config.json, from its text. `do_sample` false means greedy.
inline GenerationConfig parse_generation_config(std::string_view json, const std::string& file, int V) {
    Document document(json, file);
    Fields f(document.root, file);
    GenerationConfig g;
    g.sampling.temperature = f.number("temperature", 0, 100, g.sampling.temperature);
    g.sampling.top_p = f.number("top_p", 1e-9, 1, g.sampling.top_p);
    g.sampling.min_p = f.number("min_p", 0, 1, 0);
    g.sampling.top_k = int(f.integer("top_k", 0, MOST, 0));
    if (!f.boolean("do_sample", false)) g.sampling.temperature = 0;
    g.eos = parse_ids(f, "eos_token_id", V);
    return g;
}

inline Generation make_generation(const Options& o, const fs::path& folder, const Config& c,
                                  const Tokenizer& t) {
    fs::path file = folder / "generation_config.json";
    GenerationConfig defaults;
    if (fs::exists(file)) defaults = parse_generation_config(read_json_file(file), file.string(), c.V);
    Generation g;
    g.sampling.temperature = o.temperature.value_or(defaults.sampling.temperature);
    g.sampling.top_p = o.top_p.value_or(defaults.sampling.top_p);
    g.sampling.min_p = o.min_p.value_or(defaults.sampling.min_p);
    g.sampling.top_k = o.top_k.value_or(defaults.sampling.top_k);
    g.stops = c.eos;
    g.stops.insert(g.stops.end(), defaults.eos.begin(), defaults.eos.end());
    if (t.eos >= 0) g.stops.push_back(t.eos);
    if (o.max_tokens >= 0) g.max_tokens = o.max_tokens;
    g.think_begin = t.token_id("<think>"), g.think_end = t.token_id("</think>");
    g.think_budget = o.think_budget;
    if (g.think_budget >= 0 && g.think_end < 0) fail("--think-budget: this model has no token </think>");
    g.mtp = o.mtp;
    if (o.mtp && c.n_mtp == 0) fail("--mtp: %s has no MTP module", folder.c_str());
    g.rng.state = o.seed;
    return g;
}

// Model, tokenizer and session of run and chat.
struct Talk {
    fs::path folder;
    Config config;
    Tokenizer tokenizer;
    Generation generation;
    SessionOptions options;
    Model model;
    std::unique_ptr<Session> session;

    explicit Talk(const Options& o)
        : folder(model_path(o)), config(read_config(folder)), tokenizer(Tokenizer::load(folder.string())),
          generation(make_generation(o, folder, config, tokenizer)),
          options(session_options(o, config, DEFAULT_CONTEXT)) {
        if (tokenizer.vocab_size() > config.V)
            fail("%s: tokenizer.json has ids up to %d, config.json has 'vocab_size' %d", folder.c_str(),
                 tokenizer.vocab_size() - 1, config.V);
        require_memory(config, options);
        model = load_model(folder);
        session = std::make_unique<Session>(model, options);
    }
    std::vector<int> encode(const std::string& text, bool add_bos, const Options& o) const {
        std::vector<int> ids = tokenizer.encode(text);
        if (add_bos && tokenizer.bos >= 0 && (ids.empty() || ids[0] != tokenizer.bos))
            ids.insert(ids.begin(), tokenizer.bos);
        if (o.show_prompt)
            std::fprintf(stderr, "prompt: %s\nids: %s\n", text.c_str(), json_array(ids).c_str());
        if (ids.empty()) fail("the prompt is empty");
        if (int(ids.size()) >= options.context)
            fail("the prompt has %zu tokens, the context holds %d (one is needed for the answer)", ids.size(),
                 options.context);
        return ids;
    }
    // Prints the answer to `ids` and returns its text.
    std::string answer(const std::vector<int>& ids) {
        Thought thought(generation, ids);
        Printer printer(tokenizer, generation.think_begin, generation.think_end, thought.open);
        auto progress = std::make_unique<Progress>("reading", ids.size());
        Statistics stats = generate(
            *session, ids, generation, [&](int n) { progress->at(size_t(n)); },
            [&](int id) {
                progress.reset();
                printer.emit(id);
            });
        progress.reset();
        printer.finish();
        print_statistics(stats, generation);
        return printer.text();
    }
};

inline std::string prompt_of(const Options& o) {
    bool dash = o.dash == "-";
    if (!o.dash.empty() && !dash)
        fail("run: unexpected argument '%s' (a prompt is given with -p)", o.dash.c_str());
    if (dash + !o.prompt.empty() + !o.file.empty() != 1)
        fail("run: give one prompt: -p TEXT, -f FILE, or - for stdin");
    std::string prompt = dash ? read_stdin() : o.file.empty() ? o.prompt : read_file(o.file);
    if (prompt.empty()) fail("run: the prompt is empty");
    return prompt;
}

inline void command_run(const Options& o) {
    std::string prompt = prompt_of(o);
    if (o.raw && !o.system.empty()) fail("--system has no place in a --raw prompt");
    Talk talk(o);
    std::vector<Message> messages;
    if (!o.system.empty()) messages.push_back({"system", o.system, {}});
    messages.push_back({"user", prompt, {}});
    std::string text = o.raw ? prompt : talk.tokenizer.render(messages, true);
    talk.answer(talk.encode(text, o.raw && talk.tokenizer.add_bos, o));
}

inline void command_chat(const Options& o) {
    Talk talk(o);
    std::vector<Message> messages;
    if (!o.system.empty()) messages.push_back({"system", o.system, {}});
    bool terminal = isatty(STDIN_FILENO);
    for (std::string line; !interrupted;) {
        if (terminal) std::fputs("> ", stderr);
        if (!std::getline(std::cin, line)) break;
        if (line.empty()) continue;
        messages.push_back({"user", line, {}});
        std::string text = talk.tokenizer.render(messages, true);
        messages.push_back({"assistant", talk.answer(talk.encode(text, false, o)), {}});
        if (terminal) interrupted = 0;   // Ctrl-C ends an answer; at the prompt it ends the chat
    }
}

// -- C.5  tokenize -------------------------------------------------------------------------------

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

// The answer to one input: with `quoted`, input and output are JSON values (--lines).
inline std::string tokenize_one(const Options& o, const Tokenizer& t, const std::string& input, bool quoted) {
    if (o.decode) {
        Document document(input, "stdin");
        std::string text = t.decode(parse_id_array(document.root));
        return quoted ? json_quote(text) : text;
    }
    if (o.chat) {
        Chat chat = quoted ? parse_chat(input) : Chat{parse_messages(input), true};
        std::string text = t.render(chat.messages, chat.add_generation_prompt);
        return o.as_ids ? tokens_json(t, text, false) : quoted ? json_quote(text) : text;
    }
    if (!quoted) return tokens_json(t, input, o.add_bos);
    Document document(input, "stdin");
    std::string_view text;
    if (document.root.get(text)) fail("tokenize --lines: a line is not a JSON string");
    return tokens_json(t, text, o.add_bos);
}

inline void command_tokenize(const Options& o) {
    if (o.decode && o.chat) fail("tokenize: --decode and --chat exclude each other");
    if (o.as_ids && !o.chat) fail("tokenize: --ids goes with --chat");
    Tokenizer tokenizer = Tokenizer::load(model_path(o).string());
    if (!o.lines) {
        std::string out = tokenize_one(o, tokenizer, read_stdin(), false);
        bool text = o.decode || (o.chat && !o.as_ids);   // exactly the text, without a newline of ours
        std::cout << out << (text ? "" : "\n") << std::flush;
        return;
    }
    size_t number = 1;
    for (std::string line; std::getline(std::cin, line); number++) {
        try {
            std::cout << tokenize_one(o, tokenizer, line, true) << '\n' << std::flush;
        } catch (const std::runtime_error& e) {
            fail("line %zu: %s", number, e.what());
        }
    }
}

// -- C.6  logits, perplexity ---------------------------------------------------------------------

inline std::vector<int> parse_id_list(const std::string& text, int V) {
    std::vector<int> ids;
    std::stringstream in(text + ",");                    // so that nothing after a last comma is an item too
    for (std::string item; std::getline(in, item, ',');) {
        bool digits = !item.empty() && item.find_first_not_of("0123456789") == item.npos && item.size() <= 9;
        if (!digits) fail("--ids: '%s' is not a token id", Fields::printable(item).c_str());
        int id = std::stoi(item);
        if (id >= V) fail("--ids: %d is outside the vocabulary of %d", id, V);
        ids.push_back(id);
    }
    return ids;
}

inline void command_logits(const Options& o) {
    Options unlimited = o;
    fs::path folder = model_path(o);
    Config c = read_config(folder);
    std::vector<int> ids = parse_id_list(o.ids, c.V);
    int T = int(ids.size());
    if (T > c.max_context) fail("--ids: %d tokens, the model's context is %d", T, c.max_context);
    unlimited.context = T;
    SessionOptions options = session_options(unlimited, c, T);
    options.chunk = std::min(o.chunk, T);
    require_memory(c, options);
    Model model = load_model(folder);
    AtomicFile file(o.out);
    Session s(model, options);
    Taps taps;
    if (o.taps) s.taps = &taps;
    s.tokens = ids;
    size_t V = size_t(c.V);
    Vector logits(size_t(T) * V), mtp_logits(c.n_mtp ? size_t(T - 1) * V : 0);
    Progress progress("tokens", ids.size());
    prefill(s, ids, 0, [&](int pos, int n) {
        head(model, logits.data() + size_t(pos) * V, s.a.h, n);
        int begin = s.mtp_length, rows = c.n_mtp ? mtp_catch_up(s) : 0;
        head(model, mtp_logits.data() + size_t(begin) * V, s.a.mtp_h, rows);
        progress.at(size_t(pos + n));
    });
    if (interrupted) fail("interrupted; %s not written", o.out.c_str());
    const char* dtype = sizeof(real) == 4 ? "F32" : "F64";
    std::vector<OutputTensor> out;
    for (const Taps::Entry& t : taps.entries) {
        std::vector<size_t> shape = t.inner;
        size_t row = 1, n = t.values.size() + t.integers.size();
        for (size_t side : shape) row *= side;
        shape.insert(shape.begin(), n / row);
        if (t.integers.empty()) out.push_back({t.name, dtype, shape, t.values.data(), n * sizeof(real)});
        else out.push_back({t.name, "I32", shape, t.integers.data(), n * 4});
    }
    out.push_back({"logits", dtype, {size_t(T), V}, logits.data(), logits.size() * sizeof(real)});
    if (c.n_mtp)
        out.push_back(
            {"mtp_logits", dtype, {size_t(T - 1), V}, mtp_logits.data(), mtp_logits.size() * sizeof(real)});
    write_safetensors(file, out);
}

inline void command_perplexity(const Options& o) {
    std::string text = read_file(o.file);
    Talk talk(o);
    if (talk.options.context < 2) fail("%s: a context of one token predicts nothing", talk.folder.c_str());
    std::vector<int> ids = talk.tokenizer.encode(text);
    int bos = talk.tokenizer.add_bos ? talk.tokenizer.bos : -1;
    if (ids.size() + (bos >= 0) < 2) fail("%s: too short: %zu tokens", o.file.c_str(), ids.size());
    Progress progress("tokens", ids.size());
    Perplexity p = perplexity(*talk.session, ids, bos, [&](size_t n) { progress.at(n); });
    if (interrupted) std::fputs("interrupted: of the text so far\n", stderr);
    double nll = p.nll / double(std::max<int64_t>(p.tokens, 1));
    const char* format = o.json ? "{\"tokens\":%lld,\"nll\":%.6f,\"perplexity\":%.6f}\n"
                                : "tokens %lld  nll %.6f  perplexity %.6f\n";
    std::printf(format, static_cast<long long>(p.tokens), nll, std::exp(nll));
}

// -- C.7  info, bench ----------------------------------------------------------------------------

struct Bill {
    uint64_t total = 0, active = 0, mtp = 0;             // parameters: main model, of a token, MTP module
    std::map<std::string, uint64_t> bytes;               // of the files, by dtype
    uint64_t kv = 0, full_kv = 0;                        // bytes a token, main layers: ours, full attention
};

inline Bill make_bill(const Config& c, const fs::path& folder) {
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
    if (has_weights(folder)) {
        for (auto& [name, t] : open_checkpoint(folder).tensors) b.bytes[t.dtype] += t.bytes;
    }
    b.kv = uint64_t(c.n_layers) * uint64_t(c.cache_width()) * sizeof(real);
    b.full_kv = uint64_t(c.n_layers) * uint64_t(c.H) * uint64_t(c.q_dim() + c.v_dim()) * sizeof(real);
    return b;
}

inline void print_info_json(const Config& c, const Bill& b, const SessionOptions& s, const MemoryPlan& plan) {
    std::string bytes;
    for (auto& [dtype, n] : b.bytes)
        bytes += text_of("%s\"%s\":%llu", bytes.empty() ? "" : ",", dtype.c_str(), (unsigned long long)n);
    std::printf(
        "{\"architecture\":\"%s\",\"layers\":%d,\"hidden_size\":%d,\"vocab_size\":%d,\"context\":%d,"
        "\"parameters\":{\"total\":%llu,\"active\":%llu,\"mtp\":%llu},\"bytes\":{%s},"
        "\"kv_bytes_per_token\":%llu,\"mha_kv_bytes_per_token\":%llu,"
        "\"memory\":{\"ctx\":%d,\"cache\":%llu,\"activations\":%llu,\"available\":%llu,\"fits\":%s}}\n",
        c.model_type.c_str(), c.n_layers, c.D, c.V, c.max_context, (unsigned long long)b.total,
        (unsigned long long)b.active, (unsigned long long)b.mtp, bytes.c_str(), (unsigned long long)b.kv,
        (unsigned long long)b.full_kv, s.context, (unsigned long long)plan.cache,
        (unsigned long long)plan.activations, (unsigned long long)plan.available,
        plan.fits() ? "true" : "false");
}

inline void command_info(const Options& o) {
    fs::path folder = model_path(o);
    Config c = read_config(folder);
    SessionOptions s = session_options(o, c, DEFAULT_CONTEXT);
    Bill b = make_bill(c, folder);
    MemoryPlan plan = memory_plan(c, s);
    if (o.json) return print_info_json(c, b, s, plan);
    uint64_t weights = 0;
    for (auto& [dtype, n] : b.bytes) weights += n;
    std::printf("model          %s\n", folder.c_str());
    std::printf("architecture   %s: %d layers, hidden size %d, %d heads, %s, vocabulary %d, context %d\n",
                c.model_type.c_str(), c.n_layers, c.D, c.H,
                c.mla() ? "MLA" : text_of("%d kv heads", c.G).c_str(), c.V, c.max_context);
    if (c.E) std::printf("experts        %d routed, %d a token, %d shared\n", c.E, c.K, c.n_shared);
    std::printf("parameters     %.3f M total, %.3f M active a token", double(b.total) / 1e6,
                double(b.active) / 1e6);
    if (c.n_mtp) std::printf(", MTP module %.3f M more", double(b.mtp) / 1e6);
    std::printf("\nweights        %s",
                b.bytes.empty() ? "not in this folder" : text_of("%.3f GB:", gigabytes(weights)).c_str());
    for (auto& [dtype, n] : b.bytes) std::printf(" %s %.3f GB", dtype.c_str(), gigabytes(n));
    std::printf(
        "\ncache          %llu bytes a token; full multi-head attention would need %llu (%.1f times)\n",
        (unsigned long long)b.kv, (unsigned long long)b.full_kv, double(b.full_kv) / double(b.kv));
    std::printf("memory plan    --ctx %d: cache %.3f GB + activations %.3f GB = %.3f GB; available %.2f GB\n",
                s.context, gigabytes(plan.cache), gigabytes(plan.activations), gigabytes(plan.needed()),
                gigabytes(plan.available));
    std::printf("               weights are mapped from the files and need no memory of their own%s\n",
                plan.fits() && plan.needed() + weights > plan.available && plan.available
                    ? ", but they exceed what is available: each token will read from the disk" : "");
    if (plan.fits()) std::printf("               fits\n");
    else
        std::printf("               does not fit: %.3f GB too much\n",
                    gigabytes(plan.needed() - plan.available));
}

// Seconds of one prefill of n tokens into an empty cache, or of n tokens one by one.
inline double time_tokens(Session& s, int n, bool one_by_one) {
    std::vector<int> ids;
    for (int64_t i = 0; i < n; i++) ids.push_back(int(i * 7919 % s.model.config.V));
    double start = seconds();
    auto logits = [&](int, int) { last_logits(s, 1); };
    if (!one_by_one) prefill(s, ids, 0, [](int, int) {}), last_logits(s, 1);
    else
        for (int i = 0; i < n && !interrupted; i++)
            prefill(s, std::span(ids).subspan(size_t(i), 1), i, logits);
    return seconds() - start;
}

inline void command_bench(const Options& o) {
    fs::path folder = model_path(o);
    Config c = read_config(folder);
    int longest = std::max(o.bench_prompt, o.bench_tokens);
    if (longest > c.max_context) fail("bench: %d tokens, the model's context is %d", longest, c.max_context);
    Options fitted = o;
    fitted.context = std::max(longest, 1);
    SessionOptions options = session_options(fitted, c, longest);
    require_memory(c, options);
    Model model = load_model(folder);
    Session s(model, options);
    for (bool decode : {false, true}) {
        int n = decode ? o.bench_tokens : o.bench_prompt;
        if (n == 0) continue;
        time_tokens(s, std::min(n, 8), decode);          // warm up: page in the weights
        std::vector<double> speed;
        for (int r = 0; r < o.repeats && !interrupted; r++) speed.push_back(n / time_tokens(s, n, decode));
        if (interrupted) return;
        std::printf("{\"test\":\"%s\",\"n\":%d,\"tokens_per_s\":[%s],\"threads\":%d,\"quant\":\"%s\","
                    "\"kernels\":\"%s\"}\n",
                    decode ? "decode" : "prefill", n, joined(speed, "%.2f").c_str(), omp_get_max_threads(),
                    o.quant.c_str(), kernels.name);
        std::fflush(stdout);
    }
}

// -- C.8  main -----------------------------------------------------------------------------------

// An empty path is a shell variable that was not set; it must not mean the default.
inline std::string check_path(const std::string& text) { return text.empty() ? "an empty path" : ""; }

inline CLI::App* add_command(CLI::App& app, const char* name, const char* what, const char* example,
                             Options& o) {
    CLI::App* sub = app.add_subcommand(name, what);
    sub->footer(std::string("Example:\n  ") + example);
    sub->add_option("-m,--model", o.model, "Hugging Face folder of the model (default: the one in weights/)")
        ->check(check_path);
    sub->add_option("--threads", o.threads, "threads (default: all cores)")->check(CLI::Range(1, 4096));
    sub->add_option("--device", o.device, "auto, cpu or cuda")->check(CLI::IsMember({"auto", "cpu", "cuda"}));
    sub->add_option("--quant", o.quant, "none, q8_0, q4_k or fp8: quantise while loading")
        ->check(CLI::IsMember({"none", "q8_0", "q4_k", "fp8"}));
    sub->add_flag("--exact", o.exact, "plain arithmetic only (same results, slower)");
    sub->add_flag("--json", o.json, "machine-readable result");
    return sub;
}

// CLI::Range lets "nan" through, and a seed of -1 or of 30 digits would become another one.
inline std::string check_number(const std::string& text) {
    return text.find_first_of("nN") == text.npos ? "" : "not a number: " + text;
}
inline std::string check_seed(const std::string& text) {
    bool natural = !text.empty() && text.size() < 20 && text.find_first_not_of("0123456789") == text.npos;
    return natural ? "" : "not a natural number below 10^19: " + text;
}

inline void add_generation_options(CLI::App* sub, Options& o) {
    sub->add_option("-n", o.max_tokens, "at most N tokens (default: until the model ends)")
        ->check(CLI::Range(0, MOST));
    sub->add_option("--temp", o.temperature, "temperature, 0: greedy")
        ->check(CLI::Range(0.0, 100.0))
        ->check(check_number);
    sub->add_option("--top-p", o.top_p, "likeliest tokens that hold this share")
        ->check(CLI::Range(1e-9, 1.0))
        ->check(check_number);
    sub->add_option("--top-k", o.top_k, "K likeliest tokens, 0: all")->check(CLI::Range(0, MOST));
    sub->add_option("--min-p", o.min_p, "tokens at least this likely, relative to the best")
        ->check(CLI::Range(0.0, 1.0))
        ->check(check_number);
    sub->add_option("--seed", o.seed, "seed of the random numbers (default: 0)")->check(check_seed);
    sub->add_option("--ctx", o.context, "tokens of context (default: the model's, at most 32768)")
        ->check(CLI::Range(1, MOST));
    sub->add_option("--system", o.system, "system message");
    sub->add_option("--think-budget", o.think_budget, "end the thought after N tokens")
        ->check(CLI::Range(0, MOST));
    sub->add_option("--mla", o.mla, "absorbed or naive")->check(CLI::IsMember({"absorbed", "naive"}));
    sub->add_option("--chunk", o.chunk, "tokens per prefill step (default: 128)")
        ->check(CLI::Range(1, 65536));
    sub->add_flag("--mtp", o.mtp, "draft with the MTP module");
    sub->add_flag("--show-prompt", o.show_prompt, "print the prompt's text and ids to stderr");
}

inline void add_talking_commands(CLI::App& app, Options& o) {
    CLI::App* run = add_command(app, "run", "generate and stream",
                                "deepseek run -p \"Which is larger, 9.11 or 9.9?\"", o);
    run->add_option("-p,--prompt", o.prompt, "the prompt");
    run->add_option("-f,--file", o.file, "a file that holds the prompt");
    run->add_option("stdin", o.dash, "-: read the prompt from stdin");
    run->add_flag("--raw", o.raw, "no chat template: continue the text");
    add_generation_options(run, o);
    run->callback([&o] { prepare(o), command_run(o); });

    CLI::App* chat = add_command(app, "chat", "a conversation; each line of stdin is a turn",
                                 "deepseek chat --system \"Be brief.\"", o);
    add_generation_options(chat, o);
    chat->callback([&o] { prepare(o), command_chat(o); });

    CLI::App* tokenize =
        add_command(app, "tokenize", "text to ids and back", "echo -n hello | deepseek tokenize", o);
    tokenize->add_flag("--add-bos", o.add_bos, "begin with BOS");
    tokenize->add_flag("--decode", o.decode, "stdin: a JSON array of ids; stdout: text");
    tokenize->add_flag("--chat", o.chat, "stdin: a JSON list of messages; stdout: the rendered prompt");
    tokenize->add_flag("--ids", o.as_ids, "with --chat: the prompt's ids");
    tokenize->add_flag("--lines", o.lines, "one JSON value a line, in and out");
    tokenize->callback([&o] { prepare(o), command_tokenize(o); });
}

inline void add_measuring_commands(CLI::App& app, Options& o) {
    CLI::App* logits = add_command(app, "logits", "logits of every position, and every intermediate",
                                   "deepseek logits --ids 0,508,40 --taps --out taps.safetensors", o);
    logits->add_option("--ids", o.ids, "token ids: 1,2,3")->required();
    logits->add_option("--out", o.out, "safetensors file to write")->required()->check(check_path);
    logits->add_flag("--taps", o.taps, "every named intermediate too");
    logits->add_option("--mla", o.mla, "absorbed or naive")->check(CLI::IsMember({"absorbed", "naive"}));
    logits->add_option("--chunk", o.chunk, "prefill in chunks of N tokens (default: 128)")
        ->check(CLI::Range(1, 65536));
    logits->callback([&o] { prepare(o), command_logits(o); });

    CLI::App* text = add_command(app, "perplexity", "negative log-likelihood of a text",
                                 "deepseek perplexity -f README.md", o);
    text->add_option("-f,--file", o.file, "the text")->required();
    text->add_option("--ctx", o.context, "tokens per window (default: the model's context)")
        ->check(CLI::Range(2, MOST));
    text->callback([&o] { prepare(o), command_perplexity(o); });

    CLI::App* info = add_command(app, "info", "architecture, parameters, cache, memory plan",
                                 "deepseek info --ctx 4096", o);
    info->add_option("--ctx", o.context, "tokens of context to plan for")->check(CLI::Range(1, MOST));
    info->callback([&o] { prepare(o), command_info(o); });

    CLI::App* bench = add_command(app, "bench", "speed of prefill and decode, a line of JSON each",
                                  "deepseek bench -p 128 -n 32 -r 3", o);
    bench->add_option("-p", o.bench_prompt, "tokens to prefill (default: 512)")->check(CLI::Range(0, MOST));
    bench->add_option("-n", o.bench_tokens, "tokens to decode (default: 128)")->check(CLI::Range(0, MOST));
    bench->add_option("-r", o.repeats, "runs (default: 5)")->check(CLI::Range(1, 1000));
    bench->callback([&o] { prepare(o), command_bench(o); });
}

// One line on stderr, whatever bytes a file or an argument brought into the message.
inline int complain(std::string message) {
    message.resize(std::min(message.size(), size_t(1000)));
    for (char& c : message) if (uint8_t(c) < 32 || c == 127) c = ' ';
    std::fflush(stdout);
    std::fprintf(stderr, "deepseek: %s\n", message.c_str());
    return 1;
}

// A mapped file was cut short while in use, or its disk failed: no way leads back into the loop that read it.
inline void on_bus_error(int) {
    constexpr std::string_view LINE = "deepseek: a weight file was cut short, or cannot be read any more\n";
    _exit(write(STDERR_FILENO, LINE.data(), LINE.size()) > 0 ? 1 : 3);
}

inline void set_signals() {
    struct sigaction action {};
    action.sa_handler = [](int) { interrupted = 1; };    // no SA_RESTART: a waiting read ends too
    sigaction(SIGINT, &action, nullptr);
    action.sa_handler = on_bus_error;
    sigaction(SIGBUS, &action, nullptr);
}

int main(int argc, char** argv) {
    set_signals();
    Options o;
    CLI::App app{"DeepSeek V2, V3, R1 and the R1-Distills in one readable file."};
    app.name("deepseek")
        ->require_subcommand(0, 1)
        ->footer("Example:\n  deepseek run -p \"How many r are in strawberry?\"");
    add_talking_commands(app, o);
    add_measuring_commands(app, o);
    try {
        app.parse(argc, argv);
    } catch (const CLI::Success& e) {                    // --help
        return app.exit(e);
    } catch (const std::bad_alloc&) {
        return complain("out of memory");
    } catch (const std::length_error&) {                 // an array beyond the address space
        return complain("out of memory");
    } catch (const std::runtime_error& e) {              // CLI::ParseError, UserError, TokenizerError
        return complain(e.what());
    }
    if (app.get_subcommands().empty()) return complain("which command? (deepseek --help lists them)");
    std::cout.flush();
    bool written = std::fflush(stdout) == 0 && !std::ferror(stdout) && std::cout;
    return written ? 0 : complain("stdout cannot be written");
}
#endif
