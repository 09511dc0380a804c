// gguf.h: llama.cpp's files. Reading one as a model, quantising, and writing one.
//
// What if the model is one file, made for llama.cpp? Then everything is in it: the shape of the network, the
// vocabulary, the chat template, and the weights, most of them in blocks of small integers.
//
//     "GGUF" | u32 version | u64 tensors | u64 keys
//     keys      name, u32 type, value                             deepseek2.block_count = 61
//     tensors   name, u32 axes, axes, u32 format, u64 offset      blk.0.attn_q_a.weight, fastest axis first
//     data      each tensor begins at a multiple of general.alignment
//
// The forward pass does not want to know. So such a file is read into what chapter 3 reads a folder into: a
// Config, and a Checkpoint whose tensors bear the names of Hugging Face, with the stacks of experts cut into
// experts. What else differs is undone on the way, or told to the Matrix (chapter 2.2), so that no chapter
// about the network has two forms:
//
//     numbers   Keys hold f32, so that 1e-6 reads 9.99999997e-7. The shortest decimal that rounds to
//               the same f32 is what config.json said.
//     Llama     The rows of W^Q and W^K are in the order of the other RoPE. They stay where they are; the
//               matrix says so (`pairs`), and matmul puts q and k in order. Of its scaling only the divisors
//               of the frequencies are kept.
//     MLA       Newer files hold each head's W^UK transposed, and so does the matrix (`transposed`).
//
// A model may be split over files NAME-00001-of-00003.gguf. Each of them stands for all.
//
// Contents: 1 the container; 2 blocks of small integers; 3 names of tensors; 4 Config and Checkpoint;
//           5 the vocabulary; 6 quantising: what a group of weights is worth; 7 quantising: blocks, matrices;
//           8 which format for which matrix; 9 writing: keys; 10 writing: the vocabulary of a folder;
//           11 writing: tensors.
//
// Needs chapters 1 (errors, Arena, parallel_for), 2 (Dtype, Matrix), 3 (Fields, Config), 4.3 (AtomicFile) and
// 4.4 (Checkpoint, Sampling) of deepseek.cpp, and tokenizer.h.
#pragma once

// -- 1  the container: every length is checked before it is believed -----------------------------

enum class GgufType : uint32_t { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };
constexpr uint64_t GGUF_WIDTH[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};   // bytes; 0: it says itself

// Takes bytes off the front of a file. `what` is what they should be, for messages.
struct GgufCursor {
    std::span<const std::byte> bytes;
    std::string file;
    uint64_t at = 0;

    const std::byte* take(uint64_t n, const std::string& what) {
        if (n > bytes.size() - at) refuse(file, "cut off in %s", what.c_str());
        at += n;
        return bytes.data() + (at - n);
    }
    template <class T> T number(const std::string& what) { return load<T>(take(sizeof(T), what)); }
    std::string_view text(const std::string& what) {
        uint64_t n = number<uint64_t>(what);
        return {reinterpret_cast<const char*>(take(n, what)), size_t(n)};
    }
    std::string name(size_t longest, const std::string& what) {
        std::string_view out = text(what);
        if (out.empty() || out.size() > longest || out.find('\0') != out.npos)
            refuse(file, "%s has a name of %zu bytes, or one with a NUL", what.c_str(), out.size());
        return std::string(out);
    }
    GgufType type(const std::string& what) {
        uint32_t t = number<uint32_t>(what);
        if (t >= std::size(GGUF_WIDTH)) refuse(file, "%s has the unknown type %u", what.c_str(), t);
        return GgufType(t);
    }
};

// A value where it lies; a single one is an array of one.
struct GgufValue {
    GgufType type = GgufType::U8;
    bool array = false;
    uint64_t count = 1;
    std::span<const std::byte> bytes;
};

inline GgufValue take_gguf_value(GgufCursor& in, const std::string& what) {
    GgufValue v{in.type(what), false, 1, {}};
    if (v.type == GgufType::ARRAY) v = {in.type(what), true, in.number<uint64_t>(what), {}};
    if (v.type == GgufType::ARRAY) refuse(in.file, "%s is an array of arrays", what.c_str());
    uint64_t begin = in.at, width = GGUF_WIDTH[size_t(v.type)];
    if (width && v.count > in.bytes.size() / width) refuse(in.file, "cut off in %s", what.c_str());
    if (width) in.take(v.count * width, what);
    else for (uint64_t i = 0; i < v.count; i++) in.text(what);
    v.bytes = in.bytes.subspan(begin, in.at - begin);
    if (v.type != GgufType::BOOL) return v;
    for (std::byte b : v.bytes)
        if (b > std::byte{1}) refuse(in.file, "%s is neither true nor false", what.c_str());
    return v;
}

// Element i of whole numbers; nothing when it is something else or beyond int64.
inline std::optional<int64_t> gguf_integer(const GgufValue& v, uint64_t i) {
    const std::byte* p = v.bytes.data() + i * GGUF_WIDTH[size_t(v.type)];
    switch (v.type) {
    case GgufType::U8: return load<uint8_t>(p);
    case GgufType::I8: return load<int8_t>(p);
    case GgufType::U16: return load<uint16_t>(p);
    case GgufType::I16: return load<int16_t>(p);
    case GgufType::U32: return load<uint32_t>(p);
    case GgufType::I32: return load<int32_t>(p);
    case GgufType::I64: return load<int64_t>(p);
    case GgufType::U64: return load<int64_t>(p) < 0 ? std::nullopt : std::optional(load<int64_t>(p));
    default: return {};
    }
}

constexpr const char* NOT_HERE = "says something that is not supported";

inline double shortest_decimal(float f) {
    char text[32] = {};
    std::to_chars(text, text + sizeof text - 1, f);
    return std::strtod(text, nullptr);
}

// The keys of a file, with the getters of `Fields`. A key that begins with a dot is one of the architecture.
class GgufKeys {
public:
    std::string file, architecture;
    std::map<std::string, GgufValue> values;

    bool has(const std::string& key) const { return values.count(full(key)); }
    const GgufValue& get(const std::string& key, bool array = false) const {
        auto at = values.find(full(key));
        if (at == values.end()) refuse(file, "no key '%s'", full(key).c_str());
        if (at->second.array && !array) wrong(key, "is an array");
        return at->second;
    }
    // An array is a value for each layer. Here all layers are alike.
    int64_t integer(const std::string& key, int64_t low, int64_t high,
                    std::optional<int64_t> absent = {}) const {
        if (absent && !has(key)) return *absent;
        std::vector<int64_t> all = integers(key, low, high);
        if (all.empty() || std::count(all.begin(), all.end(), all[0]) != int64_t(all.size()))
            wrong(key, "is not the same for all layers");
        return all[0];
    }
    std::vector<int64_t> integers(const std::string& key, int64_t low, int64_t high) const {
        const GgufValue& v = get(key, true);
        std::vector<int64_t> out;
        for (uint64_t i = 0; i < v.count; i++) {
            std::optional<int64_t> n = gguf_integer(v, i);
            if (!n) wrong(key, "is not an integer");
            if (*n < low || *n > high)
                wrong(key, text_of("is %jd, outside %jd to %jd", intmax_t(*n), intmax_t(low),
                                   intmax_t(high)));
            out.push_back(*n);
        }
        return out;
    }
    double number(const std::string& key, double low, double high, std::optional<double> absent = {}) const {
        if (absent && !has(key)) return *absent;
        const GgufValue& v = get(key);
        std::optional<int64_t> whole = gguf_integer(v, 0);
        bool single = v.type == GgufType::F32;
        if (!whole && !single && v.type != GgufType::F64) wrong(key, "is not a number");
        double n = whole ? double(*whole) : single ? shortest_decimal(load<float>(v.bytes.data()))
                                                   : load<double>(v.bytes.data());
        if (!(n >= low && n <= high)) wrong(key, text_of("is %g, outside %g to %g", n, low, high));
        return n;
    }
    bool boolean(const std::string& key, bool absent) const {
        if (!has(key)) return absent;
        if (get(key).type != GgufType::BOOL) wrong(key, "is no bool");
        return get(key).bytes[0] == std::byte{1};
    }
    std::vector<std::string_view> texts(const std::string& key) const {
        const GgufValue& v = get(key, true);
        if (v.type != GgufType::STRING) wrong(key, "is no text");
        GgufCursor in{v.bytes, file};
        std::vector<std::string_view> out;
        for (uint64_t i = 0; i < v.count; i++) {
            out.push_back(in.text(key));
            if (!simdjson::validate_utf8(out.back().data(), out.back().size()))
                wrong(key, "is not valid UTF-8");
        }
        return out;
    }
    std::string text(const std::string& key, std::optional<std::string> absent = {}) const {
        if (absent && !has(key)) return *absent;
        get(key);
        return std::string(texts(key)[0]);
    }
    [[noreturn]] void wrong(const std::string& key, const std::string& how) const {
        refuse(file, "'%s' %s", full(key).c_str(), how.c_str());
    }

private:
    std::string full(const std::string& key) const {
        return Fields::printable(key[0] == '.' ? architecture + key : key);
    }
};

struct Gguf {
    std::vector<Mapping> files;
    GgufKeys keys;
    std::map<std::string, Tensor> tensors;      // by their names in the file; shapes slowest axis first
};

// What ggml calls its types, by their numbers. Ours have the same names.
inline constexpr const char* GGML_TYPES[] = {
    "F32",      "F16",      "Q4_0",    "Q4_1",   "Q4_2",  "Q4_3",   "Q5_0",  "Q5_1",   "Q8_0",     "Q8_1",
    "Q2_K",     "Q3_K",     "Q4_K",    "Q5_K",   "Q6_K",  "Q8_K",   "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S",
    "IQ4_NL",   "IQ3_S",    "IQ2_S",   "IQ4_XS", "I8",    "I16",    "I32",   "I64",    "F64",      "IQ1_M",
    "BF16",     "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8",
    "IQ4_NL_8_8", "MXFP4",  "NVFP4",   "Q1_0",   "Q2_0"};

inline uint32_t ggml_type(Dtype dtype) {
    for (uint32_t i = 0; i < std::size(GGML_TYPES); i++)
        if (std::string_view(GGML_TYPES[i]) == format_of(dtype).name) return i;
    CHECK(false, "%s has no place in a GGUF file", format_of(dtype).name);
}

// Bytes of a tensor of `shape`; 0 when there is no such tensor.
inline uint64_t gguf_bytes(Dtype dtype, const std::vector<uint64_t>& shape) {
    const Format& f = format_of(dtype);
    uint64_t bytes = uint64_t(f.bytes);
    if (shape.back() % uint64_t(f.values)) return 0;
    for (size_t i = 0; i < shape.size(); i++) {
        uint64_t n = i + 1 < shape.size() ? shape[i] : shape[i] / uint64_t(f.values);
        if (__builtin_mul_overflow(bytes, n, &bytes)) return 0;
    }
    return bytes;
}

// One line of the table of tensors. `offset` counts from the start of the data.
inline Tensor take_gguf_tensor(GgufCursor& in, const std::string& name, uint64_t& offset) {
    std::string what = "tensor '" + Fields::printable(name) + "'", where = in.file + ": " + what;
    uint32_t axes = in.number<uint32_t>(what);
    if (axes < 1 || axes > 4) refuse(where, "%u axes, 1 to 4 are possible", axes);
    Tensor t{in.file, "", std::vector<uint64_t>(axes), nullptr, 0};
    for (uint32_t i = axes; i-- > 0;) t.shape[i] = in.number<uint64_t>(what);
    uint32_t type = in.number<uint32_t>(what);
    t.dtype = type < std::size(GGML_TYPES) ? GGML_TYPES[type] : "";
    std::optional<Dtype> dtype = weights_dtype(t.dtype);
    if (!dtype || *dtype == Dtype::F64) refuse(where, "type %u %s is not supported", type, t.dtype.c_str());
    t.bytes = gguf_bytes(*dtype, t.shape);
    if (t.bytes == 0) refuse(where, "its axes are impossible for %s", t.dtype.c_str());
    offset = in.number<uint64_t>(what);
    return t;
}

// Gives each tensor its data. By their offsets they must lie one after the other, up to the alignment.
using GgufPlaces = std::multimap<uint64_t, std::pair<const std::string, Tensor>*>;
inline void place_gguf_tensors(const GgufPlaces& places, std::span<const std::byte> data,
                               uint64_t alignment) {
    uint64_t at = 0;
    for (auto& [offset, entry] : places) {
        Tensor& t = entry->second;
        std::string where = t.file + ": tensor '" + Fields::printable(entry->first) + "'";
        if (offset != at) refuse(where, offset < at ? "overlaps another one" : "leaves a gap before it");
        if (offset > data.size() || t.bytes > data.size() - offset)
            refuse(where, "reaches beyond the end of the file (cut off?)");
        t.data = data.data() + offset;
        at = (offset + t.bytes + alignment - 1) / alignment * alignment;
    }
}

// Adds the file, and returns its keys.
inline GgufKeys parse_gguf(Gguf& g, std::span<const std::byte> bytes, const std::string& file) {
    GgufCursor in{bytes, file};
    if (file.ends_with(".safetensors"))
        refuse(file, "one file of a model; -m %s names the folder", fs::absolute(file).parent_path().c_str());
    if (bytes.size() < 24 || std::memcmp(in.take(4, ""), "GGUF", 4) != 0) refuse(file, "not a GGUF file");
    const uint32_t version = in.number<uint32_t>("version");
    if (version == __builtin_bswap32(3))
        refuse(file, "big-endian, which is not supported (llama.cpp's gguf_convert_endian.py turns it)");
    if (version != 3) refuse(file, "GGUF version %u, only 3 is supported", version);
    uint64_t n_tensors = in.number<uint64_t>("header"), n_keys = in.number<uint64_t>("header");
    GgufKeys keys{file, "", {}};
    for (uint64_t i = 0; i < n_keys; i++) {
        std::string key = in.name(65535, text_of("key %llu", (unsigned long long)i));
        std::string what = "key '" + Fields::printable(key) + "'";
        if (!keys.values.emplace(key, take_gguf_value(in, what)).second)
            refuse(file, "%s is there twice", what.c_str());
    }
    uint64_t alignment = uint64_t(keys.integer("general.alignment", 1, 1 << 20, 32));
    if (!std::has_single_bit(alignment)) refuse(file, "'general.alignment' is no power of two");
    GgufPlaces places;
    for (uint64_t i = 0; i < n_tensors; i++) {
        std::string name = in.name(64, text_of("tensor %llu", (unsigned long long)i));
        uint64_t offset = 0;
        auto [at, is_new] = g.tensors.emplace(name, take_gguf_tensor(in, name, offset));
        if (!is_new) refuse(file, "tensor '%s' is there twice", Fields::printable(name).c_str());
        places.emplace(offset, &*at);
    }
    uint64_t begin = std::min((in.at + alignment - 1) / alignment * alignment, uint64_t(bytes.size()));
    place_gguf_tensors(places, bytes.subspan(begin), alignment);
    return keys;
}

// The files that one of them stands for: itself, or NAME-00001-of-0000N.gguf to NAME-0000N-of-0000N.gguf.
inline std::vector<fs::path> gguf_files(const fs::path& path) {
    Gguf one;
    Mapping mapping(path);
    GgufKeys keys = parse_gguf(one, {mapping.data(), mapping.size()}, path.string());
    int n = int(keys.integer("split.count", 0, 99999, 1));
    if (n <= 1) return {path};
    std::string name = path.filename().string(), tail = text_of("-of-%05d.gguf", n);
    if (name.size() < tail.size() + 5 || !name.ends_with(tail))
        refuse(path, "one of %d parts, and not called NAME-00001%s", n, tail.c_str());
    name.resize(name.size() - tail.size() - 5);
    std::vector<fs::path> all;
    for (int i = 1; i <= n; i++)
        all.push_back(path.parent_path() / text_of("%s%05d%s", name.c_str(), i, tail.c_str()));
    return all;
}

inline Gguf open_gguf(const fs::path& path) {
    Gguf g;
    std::vector<fs::path> files = gguf_files(path);
    for (size_t i = 0; i < files.size(); i++) {
        const Mapping& m = g.files.emplace_back(files[i]);
        GgufKeys keys = parse_gguf(g, {m.data(), m.size()}, files[i].string());
        if (files.size() > 1 && (keys.integer("split.no", 0, 99999) != int64_t(i) ||
                                 keys.integer("split.count", 0, 99999) != int64_t(files.size())))
            refuse(files[i], "not part %zu of %zu, by what it says", i + 1, files.size());
        if (i == 0) g.keys = keys;
    }
    int64_t n = int64_t(g.tensors.size());
    if (g.keys.integer("split.tensors.count", 0, 1 << 24, n) != n)
        refuse(path, "not as many tensors as 'split.tensors.count' says");
    g.keys.architecture = g.keys.text("general.architecture");
    return g;
}

// -- 2  blocks of small integers -----------------------------------------------------------------
//
// How are the integers of a block (chapter 2.3) packed? Twelve formats, and one idea: some bytes hold the low
// bits of all values, others their high bits. A byte has those of 8 / bits values, which do not lie side by
// side but a `run` apart, so that one shift and one mask unpack a register full of neighbours.
//
// Q8_0, Q4_0 and their like: 32 values, one scale. The K formats: 256 values, a scale (and a minimum) for
// each 16 or 32 of them, so that outliers spoil few neighbours. After ggml-common.h of llama.cpp.

struct Block {
    int8_t q[256];
    int16_t scale[16], minimum[16];
    float d, m;
};

using Bytes = const uint8_t*;

// Some bits of each value, from byte `at` of the block on. i: a multiple of 16;  j < 16
struct BitField {
    int at, bits, run;                   // run: 16 or more, or 1

    constexpr int mask() const { return (1 << bits) - 1; }
    constexpr int byte(int i, int j) const {
        return at + i / (run * 8 / bits) * run + (run == 1 ? j / 8 : i % run + j);
    }
    constexpr int shift(int i, int j) const { return run == 1 ? j % 8 : i % (run * 8 / bits) / run * bits; }
    constexpr int get(Bytes p, int i, int j) const { return p[byte(i, j)] >> shift(i, j) & mask(); }
    constexpr void put(uint8_t* p, int i, int j, int value) const {         // where there are zeros
        uint8_t& b = p[byte(i, j)];
        b = uint8_t(b | (value & mask()) << shift(i, j));
    }
};

struct BlockLayout {
    int d, m, scales;                    // bytes of the block at which they are; -1: there are none
    BitField low, high;                  // of q + zero
    int zero;
};
inline constexpr BlockLayout BLOCK_LAYOUTS[] = {
    {0, -1, -1, {2, 4, 16}, {}, 8},               // Q4_0
    {0, 2, -1, {4, 4, 16}, {}, 0},                // Q4_1
    {0, -1, -1, {6, 4, 16}, {2, 1, 1}, 16},       // Q5_0
    {0, 2, -1, {8, 4, 16}, {4, 1, 1}, 0},         // Q5_1
    {0, -1, -1, {2, 8, 32}, {}, 0},               // Q8_0, with a sign
    {80, 82, 0, {16, 2, 32}, {}, 0},              // Q2_K
    {108, -1, 96, {32, 2, 32}, {0, 1, 32}, 4},    // Q3_K
    {0, 2, 4, {16, 4, 32}, {}, 0},                // Q4_K
    {0, 2, 4, {48, 4, 32}, {16, 1, 32}, 0},       // Q5_K
    {208, -1, 192, {0, 4, 64}, {128, 2, 32}, 32},    // Q6_K
    {0, -1, -1, {2, 4, 16}, {}, 0},               // IQ4_NL
    {0, -1, 2, {8, 4, 16}, {}, 0}};               // IQ4_XS
constexpr const BlockLayout& layout_of(Dtype dtype) {
    return BLOCK_LAYOUTS[size_t(dtype) - size_t(Dtype::Q4_0)];
}

// What four bits stand for in IQ4_NL and IQ4_XS.
inline constexpr std::array<int8_t, 16> IQ4_TABLE = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                     1,    13,   25,  38,  53,  69,  89,  113};

// The integer that a block of format D means by q, which its fields say.
template <Dtype D> EVERYWHERE constexpr int8_t integer_of(int q) {
    constexpr auto EIGHT = std::bit_cast<std::array<uint64_t, 2>>(IQ4_TABLE);   // for a kernel: no array
    if constexpr (looked_up(D)) return int8_t((q < 8 ? EIGHT[0] : EIGHT[1]) >> q % 8 * 8);
    else return int8_t(q - layout_of(D).zero);
}

inline float f16_at(Bytes p) { return f16_to_float(load<uint16_t>(p)); }

struct GroupScale {
    int scale, minimum;
};

EVERYWHERE inline GroupScale q3_k_scale(Bytes s, int g) {
    int four = g < 8 ? s[g] & 15 : s[g - 8] >> 4, two = s[8 + g % 4] >> (g / 4 * 2) & 3;
    return {(four | two << 4) - 32, 0};
}

// Q4_K, Q5_K: six-bit scales and minimums of eight groups of 32, in 12 bytes.
EVERYWHERE inline GroupScale six_bits(Bytes s, int j) {
    if (j < 4) return {s[j] & 63, s[j + 4] & 63};
    return {(s[j + 4] & 15) | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4};
}

// IQ4_XS: six bits for each of eight groups of 32, the upper two first.
EVERYWHERE inline int iq4_xs_scale(Bytes s, int j) {
    int four = s[2 + j / 2] >> j % 2 * 4 & 15, two = s[j / 4] >> j % 4 * 2 & 3;
    return (four | two << 4) - 32;
}

inline void pack_six_bits(uint8_t* s, const Block& b) {
    for (int j = 0; j < 4; j++) {
        int scale = b.scale[2 * j], minimum = b.minimum[2 * j];
        int scale4 = b.scale[2 * j + 8], minimum4 = b.minimum[2 * j + 8];    // four groups further
        s[j] = uint8_t(scale | (scale4 >> 4) << 6), s[j + 4] = uint8_t(minimum | (minimum4 >> 4) << 6);
        s[j + 8] = uint8_t((scale4 & 15) | (minimum4 & 15) << 4);
    }
}

// Of the 16 values of group g of the block at p.
template <Dtype D> EVERYWHERE GroupScale group_scale(Bytes p, int g) {
    constexpr BlockLayout L = layout_of(D);
    if constexpr (D == Dtype::Q2_K) return {p[g] & 15, p[g] >> 4};
    else if constexpr (D == Dtype::Q3_K) return q3_k_scale(p + L.scales, g);
    else if constexpr (D == Dtype::Q4_K || D == Dtype::Q5_K) return six_bits(p + L.scales, g / 2);
    else if constexpr (D == Dtype::Q6_K) return {int8_t(p[L.scales + g]), 0};
    else if constexpr (D == Dtype::IQ4_XS) return {iq4_xs_scale(p + L.scales, g / 2), 0};
    else return {1, format_of(D).minimums ? -1 : 0};                         // x = d q + m there
}

// body.operator()<D>() for D = dtype, which is quantised. `last`: D is not beyond it.
template <Dtype D = Dtype::Q4_0, Dtype last = Dtype::IQ4_XS, class Body>
void for_format(Dtype dtype, const Body& body) {
    if (dtype == D) return body.template operator()<D>();
    if constexpr (D < last) for_format<Dtype(1 + int(D)), last>(dtype, body);
    else CHECK(false, "%s has no such blocks", format_of(dtype).name);
}
// The same where blocks hold the integers themselves.
template <class Body> void for_integers(Dtype dtype, const Body& body) {
    for_format<Dtype::Q4_0, Dtype::Q6_K>(dtype, body);
}

// Fills the values, scales and minimums of one block.
template <Dtype D> void unpack_block(Block& b, Bytes p) {
    constexpr BlockLayout L = layout_of(D);
    b.d = f16_at(p + L.d), b.m = L.m < 0 ? 0 : f16_at(p + L.m);
    for (int g = 0; g < format_of(D).values / 16; g++) {
        GroupScale s = group_scale<D>(p, g);
        b.scale[g] = int16_t(s.scale), b.minimum[g] = int16_t(s.minimum);
    }
    for (int i = 0; i < format_of(D).values; i += 16) {
#pragma omp simd
        for (int j = 0; j < 16; j++) {
            int q = L.low.get(p, i, j);
            if constexpr (L.high.bits > 0) q |= L.high.get(p, i, j) << L.low.bits;
            b.q[i + j] = integer_of<D>(q);
        }
    }
}
inline void unpack(Block& b, const std::byte* block, Dtype dtype) {
    for_format(dtype, [&]<Dtype D>() { unpack_block<D>(b, reinterpret_cast<Bytes>(block)); });
}

// The inverse. Q2_K, Q3_K and those with a table are not written.
inline void pack(std::byte* block, const Block& b, Dtype dtype) {
    uint8_t* p = reinterpret_cast<uint8_t*>(block);
    auto put = [p](int at, float f) {
        uint16_t half = float_to_f16(f);
        if (at >= 0) std::memcpy(p + at, &half, 2);
    };
    std::fill_n(p, format_of(dtype).bytes, uint8_t(0));
    for_integers(dtype, [&]<Dtype D>() {
        constexpr BlockLayout L = layout_of(D);
        put(L.d, b.d), put(L.m, b.m);
        for (int i = 0; i < format_of(D).values; i++) {
            int q = b.q[i] + L.zero, first = i / 16 * 16;
            L.low.put(p, first, i % 16, q);
            if constexpr (L.high.bits > 0) L.high.put(p, first, i % 16, q >> L.low.bits);
        }
        if (D == Dtype::Q4_K || D == Dtype::Q5_K) pack_six_bits(p + L.scales, b);
        for (int g = 0; D == Dtype::Q6_K && g < 16; g++) p[L.scales + g] = uint8_t(b.scale[g]);
    });
}

// out: the block's values. The order of the operations is that of llama.cpp, to the bit.
inline void dequantise(real* out, const Block& b, int values) {
    for (int i = 0; i < values; i += 16) {
        float scale = b.d * float(b.scale[i / 16]), minimum = b.m * float(b.minimum[i / 16]);
#pragma omp simd
        for (int j = 0; j < 16; j++) out[i + j] = scale * float(b.q[i + j]) - minimum;
    }
}

// out (w.cols) = row r of a quantised W.
inline void dequantise_row(real* out, const Matrix& w, int r) {
    Bytes p = reinterpret_cast<Bytes>(w.row(r));
    for_format(w.dtype, [&]<Dtype D>() {
        constexpr Format F = format_of(D);
        Block block;
        for (int i = 0; i < w.cols / F.values; i++) {
            unpack_block<D>(block, p + i * F.bytes);
            dequantise(out + i * F.values, block, F.values);
        }
    });
}

// out (w.cols) = row r of W, of whatever dtype, exactly; for e4m3 the product with the scale, rounded once.
inline void widen_plain(real* out, const Matrix& w, int r) {
    const std::byte *p = w.row(r), *scale = w.scale_row(r);
    switch (w.dtype) {
    case Dtype::F64: return widen_into(out, F64Row{p}, w.cols);
    case Dtype::F32: return widen_into(out, F32Row{p}, w.cols);
    case Dtype::BF16: return widen_into(out, Bf16Row{p}, w.cols);
    case Dtype::F16: return widen_into(out, F16Row{p}, w.cols);
    case Dtype::F8_LATENT: return widen_into(out, LatentRow{p}, w.cols);
    case Dtype::F8_E4M3: widen_into(out, E4m3Row{p}, w.cols); break;
    default: return dequantise_row(out, w, r);
    }
    for (int i = 0; i < w.cols; i++) out[i] *= load<float>(scale + 4 * size_t(i / SCALE_BLOCK));
}

// -- 3  names of tensors -------------------------------------------------------------------------

struct TensorName {
    const char *gguf, *ours;             // after "blk.N." and "model.layers.N."
};
// Both in the order in which they are written.
inline constexpr TensorName MODEL_NAMES[] = {{"token_embd.weight", "model.embed_tokens.weight"},
                                             {"output_norm.weight", "model.norm.weight"},
                                             {"output.weight", "lm_head.weight"}};
inline constexpr TensorName LAYER_NAMES[] = {
    {"attn_norm.weight", "input_layernorm.weight"}, {"attn_q_a.weight", "self_attn.q_a_proj.weight"},
    {"attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"},
    {"attn_q_b.weight", "self_attn.q_b_proj.weight"}, {"attn_q.weight", "self_attn.q_proj.weight"},
    {"attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"},
    {"attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"},
    {"attn_k_b.weight", "self_attn.k_b_proj.weight"},     // (H * Rkv, Dn), not in Hugging Face's files
    {"attn_v_b.weight", "self_attn.v_b_proj.weight"},     // (H * Dv, Rkv), nor this
    {"attn_k.weight", "self_attn.k_proj.weight"}, {"attn_v.weight", "self_attn.v_proj.weight"},
    {"attn_output.weight", "self_attn.o_proj.weight"}, {"attn_q.bias", "self_attn.q_proj.bias"},
    {"attn_k.bias", "self_attn.k_proj.bias"}, {"attn_v.bias", "self_attn.v_proj.bias"},
    {"attn_q_norm.weight", "self_attn.q_norm.weight"}, {"attn_k_norm.weight", "self_attn.k_norm.weight"},
    {"ffn_norm.weight", "post_attention_layernorm.weight"}, {"ffn_gate_inp.weight", "mlp.gate.weight"},
    {"exp_probs_b.bias", "mlp.gate.e_score_correction_bias"},
    {"ffn_gate_exps.weight", "mlp.experts.*.gate_proj.weight"},   // (E, F, D): one tensor for all experts
    {"ffn_up_exps.weight", "mlp.experts.*.up_proj.weight"},
    {"ffn_down_exps.weight", "mlp.experts.*.down_proj.weight"},
    {"ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj.weight"},
    {"ffn_up_shexp.weight", "mlp.shared_experts.up_proj.weight"},
    {"ffn_down_shexp.weight", "mlp.shared_experts.down_proj.weight"},
    {"ffn_gate.weight", "mlp.gate_proj.weight"}, {"ffn_up.weight", "mlp.up_proj.weight"},
    {"ffn_down.weight", "mlp.down_proj.weight"},
    {"nextn.enorm.weight", "enorm.weight"}, {"nextn.hnorm.weight", "hnorm.weight"},
    {"nextn.shared_head_norm.weight", "shared_head.norm.weight"}, {"nextn.eh_proj.weight", "eh_proj.weight"}};
// Read, but not written: the same in one piece, and copies of the model's.
inline constexpr TensorName OTHER_LAYER_NAMES[] = {
    {"attn_kv_b.weight", "self_attn.kv_b_proj.weight"}, {"nextn.embed_tokens.weight", "embed_tokens.weight"},
    {"nextn.shared_head_head.weight", "shared_head.head.weight"}};

// Those of which the file has one tensor with an axis more: of all heads' W^UK and W^UV.
inline bool of_all_heads(const std::string& ours) {
    return ours.ends_with(".k_b_proj.weight") || ours.ends_with(".v_b_proj.weight");
}
// Llama's W^Q and W^K, whose outputs RoPE turns.
inline bool of_turned_heads(const std::string& ours) {
    return ours.ends_with(".q_proj.weight") || ours.ends_with(".k_proj.weight");
}

// "blk.7.attn_q.weight" -> 7, "attn_q.weight"; -1 where there is no such prefix.
inline std::pair<int, std::string> split_layer(const std::string& name, const std::string& prefix) {
    int layer = -1;
    if (name.starts_with(prefix))
        std::from_chars(name.data() + prefix.size(), name.data() + name.size(), layer);
    std::string head = prefix + std::to_string(layer) + ".";     // one spelling for each number
    if (layer < 0 || !name.starts_with(head)) return {-1, name};
    return {layer, name.substr(head.size())};
}

// What stands for `name`, or for its rest in a layer, on the other side of the tables; nothing if they do not
// have it.
inline const char* other_name(const std::string& name, const char* TensorName::* side, bool in_layer) {
    auto other = side == &TensorName::ours ? &TensorName::gguf : &TensorName::ours;
    auto look = [&](std::span<const TensorName> names) -> const char* {
        for (const TensorName& n : names) if (name == n.*side) return n.*other;
        return nullptr;
    };
    if (!in_layer) return look(MODEL_NAMES);
    const char* found = look(LAYER_NAMES);
    return found ? found : look(OTHER_LAYER_NAMES);
}

// The name in Hugging Face's files; empty where the tables do not have it.
inline std::string name_from_gguf(const std::string& name) {
    auto [layer, rest] = split_layer(name, "blk.");
    const char* ours = other_name(rest, &TensorName::gguf, layer >= 0);
    return !ours ? "" : layer < 0 ? ours : text_of("model.layers.%d.%s", layer, ours);
}

// The name in a GGUF file; the same where the tables do not have it.
inline std::string name_in_gguf(const std::string& name) {
    auto [layer, rest] = split_layer(name, "model.layers.");
    auto [expert, projection] = split_layer(rest, "mlp.experts.");
    if (expert >= 0) rest = "mlp.experts.*." + projection;
    const char* gguf = other_name(rest, &TensorName::ours, layer >= 0);
    return !gguf ? name : layer < 0 ? gguf : text_of("blk.%d.%s", layer, gguf);
}

// -- 4  Config and Checkpoint --------------------------------------------------------------------
//
// What does such a file say about the network? The same as config.json, in other words. So its keys become a
// Config, and its tensors get the names that chapter 11 asks for.

// An architecture's key that is not read here may change what is computed, so it must not be passed over.
inline void refuse_unknown_keys(const GgufKeys& k) {
    static const std::set<std::string> ALL = {
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
        "attention.key_length", "attention.value_length", "attention.causal", "rope.dimension_count",
        "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
        "rope.scaling.attn_factor", "expert_count", "expert_used_count", "nextn_predict_layers",
        "tensor_data_layout"};
    static const std::set<std::string> MLA = {
        "attention.key_length_mla", "attention.value_length_mla", "attention.q_lora_rank",
        "attention.kv_lora_rank", "leading_dense_block_count", "expert_shared_count",
        "expert_feed_forward_length", "expert_weights_scale", "expert_weights_norm", "expert_gating_func",
        "expert_group_count", "expert_group_used_count", "rope.scaling.yarn_log_multiplier"};
    const std::string prefix = k.architecture + ".";
    for (auto& [key, value] : k.values) {
        std::string rest = key.starts_with(prefix) ? key.substr(prefix.size()) : "vocab_size";
        if (!ALL.count(rest) && !(k.architecture == "deepseek2" && MLA.count(rest)))
            refuse(k.file, "unknown key '%s'", Fields::printable(key).c_str());
    }
    if (!k.boolean(".attention.causal", true)) k.wrong(".attention.causal", NOT_HERE);
}

// As llama.cpp reads it: no type means linear, a factor has an older name, 0 stands for 1. Of MLA it is told
// 0.1 mscale_all_dim and takes mscale to be the same, as it is in every published model; 0 it computes in a
// way of its own. Elsewhere cos and sin are longer by 0.1 ln(factor) + 1.
inline RopeConfig gguf_rope(const GgufKeys& k, const Config& c) {
    RopeConfig rope;
    rope.theta = k.number(".rope.freq_base", 1.1, 1e12, 10000);
    k.number(".rope.scaling.attn_factor", 1, 1, 1), k.number(".rope.scaling.yarn_ext_factor", 1, 1, 1);
    k.number(".rope.scaling.yarn_attn_factor", c.mla() ? 1 : 0, c.mla() ? 1 : 100, 1);   // GQA: not used
    std::string type = k.text(".rope.scaling.type", "linear");
    if (type == "none") return rope;
    const char* factor = k.has(".rope.scaling.factor") ? ".rope.scaling.factor" : ".rope.scale_linear";
    rope.factor = k.number(factor, 0, 1e6, 1);
    if (rope.factor == 0) rope.factor = 1;
    if (type == "linear" && rope.factor == 1) return rope;
    if (type == "linear") k.wrong(factor, "stretches positions evenly (type linear), which is not supported");
    if (type != "yarn") k.wrong(".rope.scaling.type", "\"" + Fields::printable(type) + "\" is not known");
    rope.scaling = Scaling::YARN;
    rope.original_context =
        double(k.integer(".rope.scaling.original_context_length", 1, MOST, c.max_context));
    rope.beta_fast = k.number(".rope.scaling.yarn_beta_fast", 1e-6, 1e6, 32);
    rope.beta_slow = k.number(".rope.scaling.yarn_beta_slow", 1e-6, 1e6, 1);
    if (!c.mla()) return rope;
    double multiplier = k.number(".rope.scaling.yarn_log_multiplier", 1e-6, 10);
    rope.mscale = rope.mscale_all_dim = std::round(multiplier * 1e10) / 1e9;   // 0.0707 is 0.707
    return rope;
}

constexpr double TURN = 6.28318530717958647692;         // radians
// Radians a token of pair i of dim / 2, before any scaling (chapter 6.1).
inline double unscaled_frequency(const RopeConfig& c, int i, int dim) {
    return std::pow(c.theta, -2.0 * i / dim);
}

// What Llama 3.1's scaling divides them by, as chapter 6.1 has it.
inline std::vector<double> llama3_divisors(const RopeConfig& c, int dim) {
    std::vector<double> out;
    for (int i = 0; i < dim / 2; i++) {
        double f = unscaled_frequency(c, i, dim), turns = c.original_context * f / TURN;
        double t =
            std::clamp((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0.0, 1.0);
        out.push_back(f / ((1 - t) * f / c.factor + t * f));
    }
    return out;
}

// The scaling found again from its divisors d. The largest is `factor`; one that is between it and 1 tells
// how often its pair turns over the original context. The published parameters of the other two are 1 and 4.
// Whatever this rule does not give back is not Llama 3.1's and is refused.
inline RopeConfig gguf_llama3(RopeConfig rope, const Tensor& t, int dim) {
    std::string where = t.file + ": tensor 'rope_freqs.weight'";
    if (t.dtype != "F32" || t.shape != std::vector<uint64_t>{uint64_t(dim / 2)})
        refuse(where, "not %d F32", dim / 2);
    std::vector<double> d;
    for (int i = 0; i < dim / 2; i++) d.push_back(double(load<float>(t.data + 4 * i)));
    rope.scaling = Scaling::LLAMA3, rope.low_freq_factor = 1, rope.high_freq_factor = 4;
    rope.factor = *std::max_element(d.begin(), d.end()), rope.original_context = 1;
    for (size_t i = 0; i < d.size(); i++) {
        double blend = (1 / d[i] - 1 / rope.factor) / (1 - 1 / rope.factor);
        double context = (1 + 3 * blend) * TURN / unscaled_frequency(rope, int(i), dim);
        if (blend > 0) rope.original_context = blend < 1 ? std::round(context) : std::ceil(context);
    }
    std::vector<double> again = llama3_divisors(rope, dim);
    // The writer's f32: a few roundings of a number up to 4, divided by 3, times the factor; up to 64, twice
    // what any published model has.
    for (size_t i = 0; i < d.size(); i++)
        if (!(std::abs(again[i] / d[i] - 1) < 0x1p-14)) refuse(where, "not Llama 3.1's scaling");
    return rope;
}

inline void gguf_mla(Config& c, const GgufKeys& k) {
    c.Rq = int(k.integer(".attention.q_lora_rank", 0, MOST, 0));
    c.Rkv = int(k.integer(".attention.kv_lora_rank", 1, MOST));
    c.Dr = int(k.integer(".rope.dimension_count", 2, MOST));
    const char* mla = k.has(".attention.key_length_mla") ? "_mla" : "";   // then the plain ones are 576, 512
    c.Dn = int(k.integer(std::string(".attention.key_length") + mla, c.Dr + 1, MOST)) - c.Dr;
    c.Dv = int(k.integer(std::string(".attention.value_length") + mla, 1, MOST));
}

inline void gguf_gqa(Config& c, const GgufKeys& k) {
    c.G = int(k.integer(".attention.head_count_kv", 1, MOST, c.H));
    if (c.H % c.G) refuse(c.file, "%d key heads do not divide %d heads", c.G, c.H);
    if (!k.has(".attention.key_length") && c.D % c.H)
        refuse(c.file, "%d heads do not divide a width of %d", c.H, c.D);
    c.head_dim = int(k.integer(".attention.key_length", 2, MOST, c.D / c.H));
    for (const char* key : {".attention.value_length", ".rope.dimension_count"})
        k.integer(key, c.head_dim, c.head_dim, c.head_dim);
    for (const char* key : {".expert_count", ".expert_used_count"}) k.integer(key, 0, 0, 0);
    c.qkv_bias = c.model_type == "qwen2", c.qk_norm = c.model_type == "qwen3";
}

// Older files do not say how the experts are grouped. The two models that came with groups are known by
// their numbers of experts; of another one with V3's gate it cannot be known.
inline void gguf_groups(Config& c, const GgufKeys& k, bool biased) {
    bool v3 = c.E == 256 && c.K == 8 && biased, v2 = c.E == 160 && c.K == 6 && !biased;
    std::optional<int64_t> groups, used;
    if (v3 || v2) groups = 8, used = v3 ? 4 : 3;
    if (!groups && !biased) groups = 1;
    c.n_group = std::max(int(k.integer(".expert_group_count", 0, c.E, groups)), 1);
    c.topk_group = 1;
    if (c.n_group > 1) c.topk_group = int(k.integer(".expert_group_used_count", 1, c.n_group, used));
}

// In llama.cpp weights that were made to add up to 1 are scaled all the same, as V3's gate does and V2's do
// not; and the two best of a group are its score, as in V3's gate, which needs its biases.
inline void gguf_moe(Config& c, const GgufKeys& k, bool biased) {
    c.E = int(k.integer(".expert_count", 0, MOST_EXPERTS, 0));
    if (c.E == 0) return;
    c.K = int(k.integer(".expert_used_count", 1, c.E));
    c.F = int(k.integer(".expert_feed_forward_length", 1, MOST));
    c.n_shared = int(k.integer(".expert_shared_count", 0, 1024, 0));
    c.first_dense = int(k.integer(".leading_dense_block_count", 0, c.n_layers, 0));
    std::optional<int64_t> softmax = biased ? std::nullopt : std::optional<int64_t>(1);
    c.sigmoid_affinity = k.integer(".expert_gating_func", 1, 2, softmax) == 2;
    c.norm_topk = k.boolean(".expert_weights_norm", false);
    c.routed_scale = k.number(".expert_weights_scale", 1e-6, 1e6, 1);
    if (c.norm_topk && c.K == 1) k.wrong(".expert_weights_norm", "true is not supported for one expert");
    if (!biased && c.norm_topk && c.routed_scale != 1)
        k.wrong(".expert_weights_scale", "beside normed weights needs biases (tensor 'exp_probs_b.bias')");
    gguf_groups(c, k, biased);
    if (!biased && c.sigmoid_affinity && c.n_group > 1)
        k.wrong(".expert_group_count", "beside sigmoids needs biases (tensor 'exp_probs_b.bias')");
    c.gate = biased ? Gate::NOAUX_TC : c.n_group > 1 ? Gate::GROUP_LIMITED_GREEDY : Gate::GREEDY;
    check_moe(c);
}

// What ends an answer: the end of a text, of a turn, of a message to a tool.
constexpr const char* STOP_KEYS[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                     "tokenizer.ggml.eom_token_id"};
inline std::vector<int> gguf_stops(const GgufKeys& k, int V) {
    std::vector<int> ids;
    for (const char* key : STOP_KEYS)
        if (int id = int(k.integer(key, 0, V - 1, -1)); id >= 0 && !std::count(ids.begin(), ids.end(), id))
            ids.push_back(id);
    return ids;
}

inline Config parse_gguf_config(const Gguf& g) {
    const GgufKeys& k = g.keys;
    Config c;
    c.file = k.file, c.model_type = k.architecture;
    if (!std::set<std::string>{"deepseek2", "qwen2", "qwen3", "llama"}.count(c.model_type))
        k.wrong("general.architecture", "\"" + Fields::printable(c.model_type) + "\" is not known");
    if (k.text("general.type", "model") != "model") k.wrong("general.type", NOT_HERE);
    refuse_unknown_keys(k);
    auto tensor = [&](const std::string& name) {
        auto at = g.tensors.find(name);
        return at == g.tensors.end() ? nullptr : &at->second;
    };
    const Tensor *embed = tensor("token_embd.weight"), *divisors = tensor("rope_freqs.weight");
    if (!embed || embed->shape.size() != 2 || embed->shape[0] > MOST)
        refuse(c.file, "no tensor 'token_embd.weight' with two axes");
    bool mla = c.model_type == "deepseek2";
    c.V = int(embed->shape[0]), c.D = int(k.integer(".embedding_length", 1, MOST_WIDTH));
    int blocks = int(k.integer(".block_count", 1, MOST_LAYERS));
    int n_mtp = int(k.integer(".nextn_predict_layers", 0, mla && blocks > 1 ? 1 : 0, 0));
    c.n_layers = blocks - n_mtp;
    c.n_mtp = tensor(text_of("blk.%d.nextn.eh_proj.weight", c.n_layers)) ? n_mtp : 0;   // may be left out
    c.H = int(k.integer(".attention.head_count", 1, 1 << 16));
    c.ffn_width = int(k.integer(".feed_forward_length", 1, MOST));
    c.max_context = int(k.integer(".context_length", 1, MOST));
    c.eps = k.number(".attention.layer_norm_rms_epsilon", 0, 1), c.tied = !tensor("output.weight");
    if (mla) gguf_mla(c, k), gguf_moe(c, k, tensor(text_of("blk.%d.exp_probs_b.bias", c.n_layers - 1)));
    else gguf_gqa(c, k);
    check_heads(c);
    c.rope = gguf_rope(k, c);
    bool unscaled = !mla && c.rope.scaling == Scaling::NONE;
    if (divisors && unscaled) c.rope = gguf_llama3(c.rope, *divisors, c.head_dim);
    check_rope(c.rope, c.file);
    c.eos = gguf_stops(k, c.V);
    return c;
}

// One tensor under our names: stacks of experts cut, of which there must be as many as the keys say; stacks
// of heads as one tall matrix.
inline void add_gguf_tensor(Checkpoint& checkpoint, const Config& c, const std::string& name, Tensor t) {
    std::string ours = name_from_gguf(name), where = t.file + ": tensor '" + Fields::printable(name) + "'";
    if (ours.empty() || split_layer(name, "blk.").first >= c.n_layers + c.n_mtp)
        refuse(where, "has no place in this model");
    if (of_turned_heads(ours) && c.model_type == "llama") t.pairs = c.head_dim;
    size_t star = ours.find('*');
    if (of_all_heads(ours) && t.shape.size() == 3) t.shape = {t.shape[0] * t.shape[1], t.shape[2]};
    if (star == std::string::npos) return void(checkpoint.tensors.emplace(ours, t));
    uint64_t n = t.shape[0];
    if (t.shape.size() != 3 || n != uint64_t(c.E)) refuse(where, "is no stack of %d experts", c.E);
    t.bytes /= n, t.shape.erase(t.shape.begin());
    for (uint64_t e = 0; e < n; e++, t.data += t.bytes)
        checkpoint.tensors.emplace(ours.substr(0, star) + std::to_string(e) + ours.substr(star + 1), t);
}

// rope_freqs.weight has become part of the Config.
inline Checkpoint make_gguf_checkpoint(Gguf g) {
    Checkpoint checkpoint;
    checkpoint.gguf = true;
    const Config c = parse_gguf_config(g);
    for (auto& [name, tensor] : g.tensors)
        if (name != "rope_freqs.weight" || c.rope.scaling != Scaling::LLAMA3)
            add_gguf_tensor(checkpoint, c, name, tensor);
    checkpoint.files = std::move(g.files);
    return checkpoint;
}

// Where number i of a head of d in the order x0 x_d/2 x1 x_d/2+1 ... stands in the order x0 x1 ...
EVERYWHERE inline int place_in_head(int i, int d) { return i % 2 * (d / 2) + i / 2; }

// Puts the heads of q or k, as a matrix with `pairs` gives them, in order.   x: (n)
inline void undo_pairs(real* x, int n, int pairs) {
    Vector head;
    for (; n > 0; n -= pairs, x += pairs) {
        head.assign(x, x + pairs);
        for (int i = 0; i < pairs; i++) x[place_in_head(i, pairs)] = head[size_t(i)];
    }
}

// A model is a folder (chapter 3) or a GGUF file.
inline bool is_gguf(const fs::path& model) {
    return model.extension() == ".gguf" || fs::is_regular_file(model);
}

// -- 5  the vocabulary ---------------------------------------------------------------------------
//
// What does it say about text? Lists of tokens and merges, like a tokenizer.json, and the name of a
// pre-tokenizer. So that becomes the text of a tokenizer.json, and tokenizer.h has one way of reading.

struct Vocabulary {
    std::vector<std::string> tokens, merges;     // as tokenizer.json spells them; "left right"
    std::vector<int64_t> types;                  // of tokens
    std::string pre, chat_template;
    int bos = -1, eos = -1;
    bool add_bos = false;
};
enum TokenType : int64_t { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED };

// tokenizer.ggml.pre is a name for what tokenizer.json says: regexes, composed characters, whole words first.
struct PreTokenizer {
    const char* name;
    bool nfc, ignore_merges;
    std::vector<std::string> regexes;
};

inline const std::vector<PreTokenizer>& pre_tokenizers() {
    static const std::string
        LETTERS =   // cased ones, as Unicode had them
        "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
        "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎ"
        "ꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃",
        CJK = "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+",
        WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|",
        REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        V3 = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|"
             "[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
             " ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        PUNCTUATION = "\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+";
    static const std::vector<PreTokenizer> ALL = {
        {"deepseek-v3", false, false, {"\\p{N}{1,3}", "[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+", V3}},
        {"deepseek-llm", false, false,
         {"[\\r\\n]", "\\s?[" + LETTERS + "]+", PUNCTUATION, "\\s+$", CJK, "\\p{N}"}},
        {"deepseek-coder", false, false, {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", CJK, "\\p{N}"}},
        {"deepseek-r1-qwen", true, false, {WORDS + "\\p{N}" + REST}},
        {"qwen2", true, false, {WORDS + "\\p{N}" + REST}},
        {"llama-bpe", false, true, {WORDS + "\\p{N}{1,3}" + REST}}};
    return ALL;
}

inline const PreTokenizer& pre_tokenizer(const std::string& name, const std::string& file) {
    for (const PreTokenizer& p : pre_tokenizers()) if (name == p.name) return p;
    refuse(file, "'tokenizer.ggml.pre' is \"%s\", which this program does not know",
         Fields::printable(name).c_str());
}

inline Vocabulary gguf_vocabulary(const GgufKeys& k) {
    Vocabulary v;
    if (k.text("tokenizer.ggml.model") != "gpt2")
        refuse(k.file, "'tokenizer.ggml.model' is not \"gpt2\", a byte-level BPE");
    for (std::string_view token : k.texts("tokenizer.ggml.tokens")) v.tokens.emplace_back(token);
    for (std::string_view merge : k.texts("tokenizer.ggml.merges")) v.merges.emplace_back(merge);
    v.types = k.integers("tokenizer.ggml.token_type", NORMAL, UNUSED);
    if (v.types.size() != v.tokens.size())
        refuse(k.file, "%zu tokens and %zu types of tokens", v.tokens.size(), v.types.size());
    v.pre = k.text("tokenizer.ggml.pre");
    int last = int(std::min<size_t>(v.tokens.size(), MOST)) - 1;
    v.bos = int(k.integer("tokenizer.ggml.bos_token_id", 0, last, -1));
    v.eos = int(k.integer("tokenizer.ggml.eos_token_id", 0, last, -1));
    v.add_bos = k.boolean("tokenizer.ggml.add_bos_token", v.pre == "llama-bpe");
    if (k.boolean("tokenizer.ggml.add_eos_token", false)) k.wrong("tokenizer.ggml.add_eos_token", NOT_HERE);
    if (k.has("tokenizer.ggml.suppress_tokens")) k.wrong("tokenizer.ggml.suppress_tokens", NOT_HERE);
    v.chat_template = k.text("tokenizer.chat_template", "");
    return v;
}

// The text of a tokenizer.json that says the same.
inline std::string tokenizer_json(const Vocabulary& v, const PreTokenizer& pre) {
    std::string vocab, added, merges, splits;
    auto append = [](std::string& list, const std::string& item) {
        list += (list.empty() ? "" : ",") + item;
    };
    for (size_t id = 0; id < v.tokens.size(); id++) {
        std::string content = json_quote(v.tokens[id]), number = std::to_string(id);
        if (v.types[id] == NORMAL || v.types[id] == UNKNOWN) append(vocab, content + ":" + number);
        else if (v.types[id] != UNUSED)
            append(added, "{\"id\":" + number + ",\"content\":" + content +
                              ",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                              "\"special\":" + (v.types[id] == CONTROL ? "true}" : "false}"));
    }
    for (const std::string& merge : v.merges) append(merges, json_quote(merge));
    for (const std::string& regex : pre.regexes)
        append(splits, "{\"type\":\"Split\",\"pattern\":{\"Regex\":" + json_quote(regex) +
                           "},\"behavior\":\"Isolated\",\"invert\":false}");
    return "{\"added_tokens\":[" + added + "],\"normalizer\":" + (pre.nfc ? "{\"type\":\"NFC\"}" : "null") +
           ",\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[" + splits +
           ",{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}]},"
           "\"decoder\":{\"type\":\"ByteLevel\"},"
           "\"model\":{\"type\":\"BPE\",\"byte_fallback\":false,\"ignore_merges\":" +
           (pre.ignore_merges ? "true" : "false") +
           ",\"vocab\":{" + vocab + "},\"merges\":[" + merges + "]}}";
}

inline Tokenizer make_tokenizer(const Vocabulary& v, const std::string& file) {
    std::string config = std::string("{\"add_bos_token\":") + (v.add_bos ? "true" : "false");
    if (v.bos >= 0) config += ",\"bos_token\":" + json_quote(v.tokens[size_t(v.bos)]);
    if (v.eos >= 0) config += ",\"eos_token\":" + json_quote(v.tokens[size_t(v.eos)]);
    if (!v.chat_template.empty()) config += ",\"chat_template\":" + json_quote(v.chat_template);
    return Tokenizer::parse(tokenizer_json(v, pre_tokenizer(v.pre, file)), config + "}", file);
}

inline Tokenizer gguf_tokenizer(const fs::path& file) {
    return make_tokenizer(gguf_vocabulary(open_gguf(file).keys), file.string());
}

// What generation_config.json says elsewhere. What would change the choice and is not done here is refused.
inline GenerationConfig gguf_generation(const fs::path& file, int V) {
    const Gguf opened = open_gguf(file);
    const GgufKeys& k = opened.keys;
    const std::string p = "general.sampling.";
    GenerationConfig g;
    g.sampling.temperature = k.number(p + "temp", 0, 100, g.sampling.temperature);
    g.sampling.top_p = k.number(p + "top_p", 1e-9, 1, g.sampling.top_p);
    g.sampling.min_p = k.number(p + "min_p", 0, 1, g.sampling.min_p);
    g.sampling.top_k = int(k.integer(p + "top_k", 0, MOST, g.sampling.top_k));
    g.sampling.repeat_penalty = k.number(p + "penalty_repeat", 1e-6, 100, 1);
    k.number(p + "xtc_probability", 0, 0, 0);
    k.integer(p + "mirostat", 0, 0, 0);
    if (k.has(p + "sequence")) k.wrong(p + "sequence", NOT_HERE);
    g.eos = gguf_stops(k, V);
    if (g.eos.empty()) remark(file.string() + ": no '" + STOP_KEYS[0] + "': no token ends an answer");
    return g;
}

// -- 6  quantising: what a group of weights is worth ---------------------------------------------
//
// How few bits can hold a weight? A model of 8 billion weights in bf16 does not fit into 8 GB and reads 16 GB
// for each token it says; with 4.5 bits a weight it does and reads 4.5. What is lost is the distance of each
// weight to the nearest of the values that its block can say (chapter 2.3):
//
//      x ~ d scale_g q - m minimum_g       q: 4 bits;  scale, minimum: 6 bits for 32 weights;  d, m: f16
//
// So a block is chosen by least squares: the least sum of (x - value)^2. For given integers q the best
// scale and minimum are a formula; for a given scale and minimum the best q is the nearest. Doing one
// after the other never increases the error, and ends in a minimum that depends on where it began. Hence
// the three steps: for each group a few beginnings, from a range that holds all of its weights to
// narrower ones that clip the outermost; then integers for scale and minimum, and their neighbours, for
// the d and m they lead to; then the best d and m for these integers.

struct Scheme {
    int group, low, high;                // values that share scale and minimum; range of q
    int scale_low, scale_high;           // range of the integer scales; 0: there are none
};
inline Scheme scheme_of(Dtype dtype) {
    CHECK(quantised(dtype) && dtype != Dtype::Q2_K && dtype != Dtype::Q3_K && !looked_up(dtype),
          "%s cannot be written", format_of(dtype).name);
    if (dtype == Dtype::Q8_0) return {32, -127, 127, 0, 0};
    if (dtype == Dtype::Q6_K) return {16, -32, 31, -128, 127};
    const BlockLayout& l = layout_of(dtype);
    return {32, -l.zero, (1 << (l.low.bits + l.high.bits)) - 1 - l.zero, 0, l.scales < 0 ? 0 : 63};
}

// x ~ scale q - minimum
struct Fit {
    float scale = 0, minimum = 0, error = std::numeric_limits<float>::infinity();
};

constexpr float TINY = std::numeric_limits<float>::min();

// a . b over N numbers in eight lanes, each a chain of its own: one order, whatever the compiler does.
template <int N> float dot_group(const float* a, const float* b) {
    float lane[8] = {};
    for (int i = 0; i < N; i += 8)
#pragma omp simd
        for (int j = 0; j < 8; j++) lane[j] += a[i + j] * b[i + j];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// The sum of (x - value)^2 with the nearest q, which are left in q.
template <int N> float round_group(float* q, const float* x, float scale, float minimum, const Scheme& s) {
    constexpr float TO_INTEGER = 0x1.8p23f;                              // adding it rounds, ties to even
    float inverse = std::abs(scale) < TINY ? 0 : 1 / scale, low = float(s.low), high = float(s.high), e[N];
#pragma omp simd
    for (int i = 0; i < N; i++) {
        float v = (x[i] + minimum) * inverse;
        v = v < low ? low : v;
        v = v > high ? high : v;
        q[i] = (v + TO_INTEGER) - TO_INTEGER;
        e[i] = x[i] - (scale * q[i] - minimum);
    }
    return dot_group<N>(e, e);
}

// The best scale and minimum for given q, of which the minimum may have to be positive.
template <int N> Fit solve_group(const float* q, const float* x, bool minimums, bool positive) {
    float ones[N], qq = dot_group<N>(q, q), xq = dot_group<N>(x, q);
    Fit f;
    f.scale = qq > 0 ? xq / qq : 0;
    if (!minimums) return f;
    std::fill_n(ones, N, 1.0f);
    float q1 = dot_group<N>(q, ones), x1 = dot_group<N>(x, ones), determinant = N * qq - q1 * q1;
    if (!(determinant > 0)) return f;
    float scale = (N * xq - x1 * q1) / determinant, minimum = (scale * q1 - x1) / N;
    if (minimum >= 0 || !positive) f.scale = scale, f.minimum = minimum;
    return f;
}

constexpr int BEGINNINGS = 6, ROUNDS = 3;

template <int N> Fit fit_group(const float* x, const Scheme& s, bool minimums) {
    bool positive = minimums && s.scale_high > 0;
    float top = *std::max_element(x, x + N), bottom = *std::min_element(x, x + N), q[N];
    if (!minimums || positive) top = std::max(top, 0.0f), bottom = std::min(bottom, 0.0f);
    float extreme = top > -bottom ? top : bottom;
    Fit best;
    for (int k = 0; k < BEGINNINGS; k++) {
        float narrow = 1 - 0.025f * float(k);
        Fit f{extreme * narrow / float(s.low), 0, 0};
        if (minimums) f = {(top - bottom) * narrow / float(s.high), -bottom * narrow, 0};
        for (int round = 0; round < ROUNDS; round++) {
            f.error = round_group<N>(q, x, f.scale, f.minimum, s);
            if (f.error < best.error) best = f;
            f = solve_group<N>(q, x, minimums, positive);
        }
    }
    return best;
}

// -- 7  quantising: blocks, matrices -------------------------------------------------------------

// A block as it is being chosen: its values as float, and how far they are from x.
struct Draft {
    float q[256] = {};
    Block b{};                                   // d, m and the integer scales
    double error = 0;
};

inline float f16_value(float f) { return f16_to_float(float_to_f16(f)); }

// 32 weights with one scale.
inline Draft draft_plain(const float* x, const Scheme& s, bool minimums) {
    Draft z;
    Fit f = fit_group<32>(x, s, minimums);
    z.b.d = f16_value(f.scale), z.b.m = f16_value(-f.minimum);
    std::fill_n(z.b.scale, 2, int16_t(1)), std::fill_n(z.b.minimum, 2, int16_t(minimums ? -1 : 0));
    z.error = double(round_group<32>(z.q, x, z.b.d, -z.b.m, s));
    return z;
}

// For given d and m: in each group the best of the integers next to what was fitted.
template <int N> Draft draft_groups(const float* x, const Scheme& s, const Fit* fits, float d, float m) {
    Draft z;
    z.b.d = d, z.b.m = m;
    auto near = [](float value, float unit) {
        return unit == 0 ? 0 : int(std::nearbyint(std::clamp(value / unit, -1000.0f, 1000.0f)));
    };
    for (int g = 0; g < 256 / N; g++) {
        float best = std::numeric_limits<float>::infinity(), q[N];
        int tries = m == 0 ? 3 : 9;
        for (int k = 0; k < tries; k++) {
            int scale = std::clamp(near(fits[g].scale, d) + k % 3 - 1, s.scale_low, s.scale_high);
            int minimum = m == 0 ? 0 : std::clamp(near(fits[g].minimum, m) + k / 3 - 1, 0, s.scale_high);
            float error = round_group<N>(q, x + g * N, d * float(scale), m * float(minimum), s);
            if (!(error < best)) continue;
            best = error;
            std::copy_n(q, N, z.q + g * N);
            std::fill_n(z.b.scale + g * N / 16, N / 16, int16_t(scale));
            std::fill_n(z.b.minimum + g * N / 16, N / 16, int16_t(minimum));
        }
        z.error += double(best);
    }
    return z;
}

// The best d and m for the integers of a block.
inline Fit solve_block(const Draft& z, const float* x) {
    double aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;
    for (int i = 0; i < 256; i++) {
        double a = double(z.b.scale[i / 16]) * double(z.q[i]), b = -double(z.b.minimum[i / 16]),
               v = double(x[i]);
        aa += a * a, ab += a * b, bb += b * b, xa += v * a, xb += v * b;
    }
    double determinant = aa * bb - ab * ab;
    Fit f;
    f.scale = aa > 0 ? float(xa / aa) : 0;
    if (!(determinant > 0)) return f;
    double d = (xa * bb - xb * ab) / determinant, m = (xb * aa - xa * ab) / determinant;
    if (m >= 0) f.scale = float(d), f.minimum = float(m);
    return f;
}

// 256 weights, of which N share a scale, and a minimum in the formats that have one.
template <int N> Draft draft_super(const float* x, const Scheme& s, bool minimums) {
    Fit fits[256 / N], most;
    for (int g = 0; g < 256 / N; g++) {
        fits[g] = fit_group<N>(x + g * N, s, minimums);
        if (std::abs(fits[g].scale) > std::abs(most.scale)) most.scale = fits[g].scale;
        most.minimum = std::max(most.minimum, fits[g].minimum);
    }
    int widest = s.scale_low < 0 ? s.scale_low : s.scale_high;
    Draft best = draft_groups<N>(x, s, fits, f16_value(most.scale / float(widest)),
                                 f16_value(most.minimum / float(s.scale_high)));
    for (int round = 0; round < 2; round++) {
        Fit f = solve_block(best, x);
        Draft next = draft_groups<N>(x, s, fits, f16_value(f.scale), f16_value(f.minimum));
        if (!(next.error < best.error)) break;
        best = next;
    }
    return best;
}

// One block of x in a quantised dtype; false when that cannot say it. (No format reaches 1e9.)
inline bool quantise_block(std::byte* out, const float* x, Dtype dtype) {
    Scheme s = scheme_of(dtype);
    int n = format_of(dtype).values;
    bool minimums = format_of(dtype).minimums;
    if (!std::all_of(x, x + n, [](float v) { return std::abs(v) < 1e9f; })) return false;
    Draft z = s.scale_high == 0 ? draft_plain(x, s, minimums)
              : s.group == 16   ? draft_super<16>(x, s, minimums) : draft_super<32>(x, s, minimums);
    std::transform(z.q, z.q + n, z.b.q, [](float q) { return int8_t(q); });
    pack(out, z.b, dtype);
    return std::isfinite(z.b.d) && std::isfinite(z.b.m);
}

// x (n) in another dtype; false when that cannot say it.
inline bool narrow_row(std::byte* out, const float* x, int n, Dtype dtype) {
    const Format& f = format_of(dtype);
    bool good = true;
    for (int i = 0; i < n; i += f.values, out += f.bytes) {
        if (quantised(dtype)) good &= quantise_block(out, x + i, dtype);
        if (quantised(dtype)) continue;
        uint16_t half = dtype == Dtype::F16 ? float_to_f16(x[i]) : float_to_bf16(x[i]);
        std::memcpy(out, dtype == Dtype::F32 ? static_cast<const void*>(x + i) : &half, size_t(f.bytes));
        good &= std::isfinite(dtype == Dtype::F16 ? f16_to_float(half) : x[i]);
    }
    return good;
}

// Rows begin, begin + 1, ... of W as float: as they are stored or, in heads of `pairs` rows, brought into the
// order x0 x_d/2 x1 ...; begin is then a multiple of `pairs`.   out: (count, w.cols)
inline std::vector<float> float_rows(const Matrix& w, int begin, int count, int pairs = 0) {
    std::vector<float> out(size_t(count) * size_t(w.cols));
    parallel_for(count, [&](int64_t i) {
        int in_head = pairs ? int(i) % pairs : 0;
        int from = pairs ? int(i) - in_head + place_in_head(in_head, pairs) : int(i);
        Vector row(size_t(w.cols));
        widen_plain(row.data(), w, begin + from);
        std::copy(row.begin(), row.end(), out.begin() + i * w.cols);
    });
    return out;
}

// out: the rows of x in `dtype`, on all cores.   x: (rows, cols)
inline void narrow_rows(std::byte* out, const std::vector<float>& x, int cols, Dtype dtype,
                        const std::string& name) {
    size_t bytes = row_bytes(dtype, cols);
    parallel_for(int64_t(x.size()) / cols, [&](int64_t r) {
        if (!narrow_row(out + size_t(r) * bytes, x.data() + r * cols, cols, dtype))
            fail("tensor '%s' holds values that %s cannot say", name.c_str(), format_of(dtype).name);
    });
}

// One row of blocks of 128 x 128, each with the scale that makes its largest weight 448.   x: (128, cols)
inline void narrow_e4m3(std::byte* out, std::byte* scale, const std::vector<float>& x, int cols) {
    int rows = int(x.size() / size_t(cols));
    parallel_for(scale_blocks(cols), [&](int64_t block) {
        int begin = int(block) * SCALE_BLOCK, end = std::min(cols, begin + SCALE_BLOCK);
        auto at = [&](int r, int i) { return size_t(r) * size_t(cols) + size_t(i); };
        float most = 0;
        for (int r = 0; r < rows; r++)
            for (int i = begin; i < end; i++) most = std::max(most, std::abs(x[at(r, i)]));
        float s = most > 0 ? most / 448 : 1;
        std::memcpy(scale + 4 * block, &s, 4);
        for (int r = 0; r < rows; r++)
            for (int i = begin; i < end; i++) out[at(r, i)] = std::byte(float_to_e4m3(x[at(r, i)] / s));
    });
}

// -- 8  which format for which matrix ------------------------------------------------------------
//
// Not all matrices suffer alike. The usual mixture of the 4-bit formats gives six bits to the head, and, in
// half of the layers, to what is added to the residual stream in the end: W^V and W_down.

struct FileType {
    const char* name;
    int number;                          // general.file_type; -1: not for GGUF files
    Dtype dtype;
    bool mixed;                          // six bits where it matters
};
inline constexpr FileType FILE_TYPES[] = {
    {"f32", 0, Dtype::F32, false},     {"f16", 1, Dtype::F16, false},    {"bf16", 32, Dtype::BF16, false},
    {"q8_0", 7, Dtype::Q8_0, false},   {"q6_k", 18, Dtype::Q6_K, false}, {"q5_k_m", 17, Dtype::Q5_K, true},
    {"q4_k_m", 15, Dtype::Q4_K, true}, {"q5_1", 9, Dtype::Q5_1, false},  {"q5_0", 8, Dtype::Q5_0, false},
    {"q4_1", 3, Dtype::Q4_1, false},   {"q4_0", 2, Dtype::Q4_0, false},  {"q4_k", -1, Dtype::Q4_K, true},
    {"fp8", -1, Dtype::F8_E4M3, false}};

inline const FileType& file_type(const std::string& name) {
    for (const FileType& t : FILE_TYPES) if (name == t.name) return t;
    fail("'%s' is no type of weights", Fields::printable(name).c_str());
}

// Layers at both ends, and every third between them.
inline bool matters(int layer, int n) {
    return layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
}

// `name` as in GGUF. Nothing for matrices that stay as they are: a gate decides by small differences.
inline std::optional<Dtype> target_dtype(const FileType& t, const std::string& name, int cols,
                                         const Config& c) {
    auto [layer, rest] = split_layer(name, "blk.");
    bool embedding = name == "token_embd.weight", head = name == "output.weight" || (c.tied && embedding);
    if (rest == "ffn_gate_inp.weight") return {};
    if (t.dtype == Dtype::F8_E4M3 && (embedding || head || rest == "nextn.eh_proj.weight")) return {};
    bool last = rest == "attn_v.weight" || rest == "attn_kv_b.weight" || rest.starts_with("ffn_down");
    bool six =
        head ? quantised(t.dtype) && t.dtype != Dtype::Q8_0 : t.mixed && last && matters(layer, c.n_layers);
    // llama-quantize's "70B": eight heads share each W^V, so that more bits cost little.
    bool shared = c.n_layers == 80 && !c.mla() && !c.qk_norm && (c.qkv_bias || c.G < c.H);
    Dtype d = six ? Dtype::Q6_K : t.dtype;
    if (shared && rest == "attn_v.weight" && d == Dtype::Q4_K) d = Dtype::Q5_K;
    auto fits = [&] { return cols % format_of(d).values == 0; };
    if (!fits()) d = d == Dtype::Q4_K ? Dtype::Q5_0 : d == Dtype::Q5_K ? Dtype::Q5_1 : Dtype::Q8_0;
    return fits() ? d : Dtype::F32;
}

// The file's pages of a matrix that is not needed again.
inline void forget_pages(const Matrix& w) {
    uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(w.data);
    uintptr_t end = (begin + size_t(w.rows) * row_bytes(w.dtype, w.cols)) / page * page;
    begin = (begin + page - 1) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

// Makes weights smaller while a model is loaded. An arena without memory only counts.
struct Quantiser {
    const FileType* type;
    const Config* config;
    Arena arena;
    std::function<void(size_t)> progress;               // bytes made so far

    // W in the format that suits it.   ours: its name in Hugging Face's files
    Matrix apply(const std::string& ours, const Matrix& w) {
        std::string name = name_in_gguf(ours);
        std::optional<Dtype> dtype = target_dtype(*type, name, w.cols, *config);
        if (!dtype || quantised(w.dtype) || w.dtype == *dtype) return w;
        size_t bytes = row_bytes(*dtype, w.cols);                       // a row's
        size_t scales = 4 * size_t(scale_blocks(w.cols));               // of a row of blocks
        bool scaled = *dtype == Dtype::F8_E4M3;
        std::byte* data = arena.take<std::byte>(size_t(w.rows) * bytes);
        std::byte* scale = arena.take<std::byte>(scaled ? size_t(scale_blocks(w.rows)) * scales : 0);
        for (int r = 0; data && r < w.rows; r += SCALE_BLOCK) {
            Matrix part = w.view(r, std::min(SCALE_BLOCK, w.rows - r));
            std::vector<float> x = float_rows(part, 0, part.rows);
            std::byte* out = data + size_t(r) * bytes;
            if (scaled) narrow_e4m3(out, scale + size_t(r / SCALE_BLOCK) * scales, x, w.cols);
            else narrow_rows(out, x, w.cols, *dtype, name);
            forget_pages(part);
        }
        if (data) progress(arena.used);
        Matrix out = w;
        out.data = data, out.scale = scaled ? scale : nullptr, out.dtype = *dtype;
        return out;
    }
};

// -- 9  writing: keys ----------------------------------------------------------------------------
//
// How does a model become a file that llama.cpp reads too? By the names and layouts of its own converter:
// keys first, then the tensors, each in the format that the mixture of section 8 gives it, written as they
// are made.

// The keys of a file as they are written.
struct GgufHead {
    std::string bytes;
    uint64_t count = 0;

    template <class T> void raw(T v) { bytes.append(reinterpret_cast<const char*>(&v), sizeof v); }
    void string(std::string_view text) { raw(uint64_t(text.size())), bytes += text; }
    void key(const std::string& name, GgufType type) { string(name), raw(type), count++; }
    void u32(const std::string& name, int64_t v) { key(name, GgufType::U32), raw(uint32_t(v)); }
    void f32(const std::string& name, double v) { key(name, GgufType::F32), raw(float(v)); }
    void boolean(const std::string& name, bool v) { key(name, GgufType::BOOL), raw(uint8_t(v)); }
    void text(const std::string& name, std::string_view v) { key(name, GgufType::STRING), string(v); }
    void array(const std::string& name, GgufType type, size_t n) {
        key(name, GgufType::ARRAY), raw(type), raw(uint64_t(n));
    }
    void value(const std::string& name, const GgufValue& v) {
        if (v.array) array(name, v.type, v.count);
        else key(name, v.type);
        bytes.append(reinterpret_cast<const char*>(v.bytes.data()), v.bytes.size());
    }
    void texts(const std::string& name, const std::vector<std::string>& list) {
        array(name, GgufType::STRING, list.size());
        for (const std::string& item : list) string(item);
    }
};

// What the keys cannot say must not be lost on the way.
inline void require_tellable(const Config& c) {
    const RopeConfig& r = c.rope;
    if (c.moe_freq != 1) refuse(c.file, "'moe_layer_freq' has no place in a GGUF file");
    if (c.gate == Gate::GROUP_LIMITED_GREEDY && c.sigmoid_affinity && c.topk_group < c.n_group)
        refuse(c.file, "'scoring_func' sigmoid has groups in a GGUF file only with 'topk_method' noaux_tc");
    const double all = r.mscale_all_dim;
    bool usual = c.mla() ? r.mscale == all && all > 1e-5 : r.mscale == 1 && all == 0;
    if (r.scaling == Scaling::YARN && !(usual && r.attention_factor == 0 && r.truncate))
        refuse(c.file, "its 'mscale', 'attention_factor' or 'truncate' has no place in a GGUF file");
    if (r.scaling == Scaling::LLAMA3 && (r.low_freq_factor != 1 || r.high_freq_factor != 4))
        refuse(c.file, "'low_freq_factor' 1 and 'high_freq_factor' 4 alone have a place in a GGUF file");
}

inline void put_rope_keys(GgufHead& h, const std::string& p, const RopeConfig& r, bool mla) {
    h.f32(p + "rope.freq_base", r.theta);
    if (r.scaling != Scaling::YARN) return;
    h.text(p + "rope.scaling.type", "yarn"), h.f32(p + "rope.scaling.factor", r.factor);
    h.u32(p + "rope.scaling.original_context_length", int64_t(r.original_context));
    h.f32(p + "rope.scaling.yarn_beta_fast", r.beta_fast);
    h.f32(p + "rope.scaling.yarn_beta_slow", r.beta_slow);
    if (mla) h.f32(p + "rope.scaling.yarn_log_multiplier", 0.1 * r.mscale_all_dim);
}

// The MLA keys speak of the absorbed form: one key head, as wide as a row of the cache.
inline void put_mla_keys(GgufHead& h, const std::string& p, const Config& c) {
    if (c.Rq) h.u32(p + "attention.q_lora_rank", c.Rq);
    h.u32(p + "attention.kv_lora_rank", c.Rkv), h.u32(p + "attention.head_count_kv", 1);
    h.u32(p + "attention.key_length", c.Rkv + c.Dr), h.u32(p + "attention.value_length", c.Rkv);
    h.u32(p + "attention.key_length_mla", c.Dn + c.Dr), h.u32(p + "attention.value_length_mla", c.Dv);
    h.u32(p + "rope.dimension_count", c.Dr), h.u32(p + "expert_shared_count", c.n_shared);
    h.u32(p + "leading_dense_block_count", c.E ? c.first_dense : c.n_layers);
    h.u32(p + "expert_feed_forward_length", c.E ? c.F : c.ffn_width);
    if (c.E == 0) return;
    bool grouped = c.gate != Gate::GREEDY && c.topk_group < c.n_group;   // else all groups are the best ones
    bool norm = c.norm_topk && c.K > 1, v2_norm = norm && c.gate != Gate::NOAUX_TC;   // which is not scaled
    h.u32(p + "expert_count", c.E), h.u32(p + "expert_used_count", c.K);
    h.u32(p + "expert_gating_func", c.sigmoid_affinity ? 2 : 1), h.boolean(p + "expert_weights_norm", norm);
    h.f32(p + "expert_weights_scale", v2_norm ? 1 : c.routed_scale);
    h.u32(p + "expert_group_count", grouped ? c.n_group : 1);
    h.u32(p + "expert_group_used_count", grouped ? c.topk_group : 1);
}

inline std::string gguf_architecture(const Config& c) {
    return c.mla() ? "deepseek2" : c.qk_norm ? "qwen3" : c.qkv_bias ? "qwen2" : "llama";
}

// What a file says about where it comes from and how it is sampled is kept; of a folder, what llama.cpp's
// converter keeps. A temperature of 0 is greedy there, too.
inline void put_general_keys(GgufHead& h, const fs::path& source, const Sampling& s) {
    static const std::set<std::string> OURS = {"general.architecture", "general.type", "general.file_type",
                                               "general.quantization_version", "general.alignment"};
    if (is_gguf(source)) {
        for (const Gguf g = open_gguf(source); auto& [key, v] : g.keys.values)
            if (key.starts_with("general.") && !OURS.count(key)) h.value(key, v);
        return;
    }
    h.text("general.name", fs::canonical(source).filename().string());
    if (!fs::exists(source / "generation_config.json")) return;
    h.f32("general.sampling.temp", s.temperature), h.f32("general.sampling.top_p", s.top_p);
    h.f32("general.sampling.min_p", s.min_p), h.u32("general.sampling.top_k", s.top_k);
    h.f32("general.sampling.penalty_repeat", s.repeat_penalty);
}

inline void put_config_keys(GgufHead& h, const Config& c, const FileType& type) {
    std::string arch = gguf_architecture(c), p = arch + ".";
    h.text("general.architecture", arch), h.text("general.type", "model");
    h.u32("general.file_type", type.number), h.u32("general.quantization_version", 2);
    h.u32(p + "block_count", c.n_layers + c.n_mtp);
    if (c.n_mtp) h.u32(p + "nextn_predict_layers", c.n_mtp);
    h.u32(p + "context_length", c.max_context), h.u32(p + "embedding_length", c.D);
    h.u32(p + "feed_forward_length", c.ffn_width), h.u32(p + "vocab_size", c.V);
    h.u32(p + "attention.head_count", c.H);
    h.f32(p + "attention.layer_norm_rms_epsilon", c.eps);
    put_rope_keys(h, p, c.rope, c.mla());
    if (c.mla()) return put_mla_keys(h, p, c);
    h.u32(p + "attention.head_count_kv", c.G), h.u32(p + "attention.key_length", c.head_dim);
    h.u32(p + "attention.value_length", c.head_dim), h.u32(p + "rope.dimension_count", c.head_dim);
}

// -- 10  writing: the vocabulary of a folder -----------------------------------------------------

// A regex without the backslashes that change nothing, so that two spellings of it compare equal.
inline std::string plain_regex(std::string_view regex) {
    std::string out;
    for (size_t i = 0; i < regex.size(); i++) {
        char c = regex[i], next = i + 1 < regex.size() ? regex[i + 1] : 'x';
        if (c != '\\') out += c;
        else if (next == 'r' || next == 'n') out += next == 'r' ? '\r' : '\n', i++;
        else if (!std::ispunct(uint8_t(next))) out += c;
    }
    return out;
}

inline void collect_regexes(const Fields& step, std::vector<std::string>& out) {
    std::string type = step.text("type");
    simdjson::dom::array steps;
    if (type == "Split") out.push_back(plain_regex(Fields(step.get("pattern"), step.where()).text("Regex")));
    if (type == "Digits") out.push_back("\\p{N}");
    if (type != "Sequence") return;
    if (step.get("pretokenizers").get(steps)) fail("%s: 'pretokenizers' is not a list", step.where().c_str());
    for (Json s : steps) collect_regexes(Fields(s, step.where()), out);
}

// The name under which llama.cpp knows what tokenizer.json asks for.
inline std::string name_pre_tokenizer(const Fields& root, bool ignore_merges) {
    std::vector<std::string> found, known;
    collect_regexes(Fields(root.get("pre_tokenizer"), root.where() + ": pre_tokenizer"), found);
    bool nfc = root.has("normalizer") &&
               simdjson::minify(root.get("normalizer")).find("\"NFC\"") != std::string::npos;
    for (const PreTokenizer& p : pre_tokenizers()) {
        known.clear();
        for (const std::string& regex : p.regexes) known.push_back(plain_regex(regex));
        if (found == known && nfc == p.nfc && ignore_merges == p.ignore_merges) return p.name;
    }
    fail("%s: its pre_tokenizer has no name in GGUF files", root.where().c_str());
}

inline void put_added_tokens(Vocabulary& v, const Fields& root) {
    simdjson::dom::array added;
    if (!root.has("added_tokens")) return;
    if (root.get("added_tokens").get(added)) fail("%s: 'added_tokens' is not a list", root.where().c_str());
    for (Json item : added) {
        Fields f(item, root.where() + ": added_tokens");
        std::string token = f.text("content");
        bool mark = (token.starts_with("<｜") && token.ends_with("｜>")) ||
                    (token.starts_with("<|") && token.ends_with("|>"));
        size_t id = size_t(f.integer("id", 0, int64_t(v.tokens.size()) - 1));
        v.tokens[id] = token, v.types[id] = mark || f.boolean("special", false) ? CONTROL : USER_DEFINED;
    }
}

inline void put_merges(Vocabulary& v, const Fields& model) {
    simdjson::dom::array merges, pair;
    if (model.get("merges").get(merges)) fail("%s: 'merges' is not a list", model.where().c_str());
    for (Json item : merges) {
        std::string_view left, right;
        if (!item.get(left)) v.merges.emplace_back(left);              // "left right"
        else if (!item.get(pair) && pair.size() == 2 && !pair.at(0).get(left) && !pair.at(1).get(right))
            v.merges.push_back(std::string(left) + " " + std::string(right));
        else fail("%s: 'merges' holds something that is no pair", model.where().c_str());
    }
}

inline Vocabulary folder_vocabulary(const fs::path& folder, int V) {
    std::string file = (folder / "tokenizer.json").string();
    Document document(read_json_file(file), file);
    Fields root(document.root, file), model(root.get("model"), file + ": model");
    Fields vocab(model.get("vocab"), file + ": vocab");
    Tokenizer tokenizer = Tokenizer::load(folder.string());
    Vocabulary v;
    v.types.assign(size_t(V), UNUSED);
    for (int id = 0; id < V; id++) v.tokens.push_back("[PAD" + std::to_string(id) + "]");
    for (auto& [token, value] : vocab.all()) {
        size_t id = size_t(vocab.integer(token.c_str(), 0, V - 1));
        v.tokens[id] = token, v.types[id] = NORMAL;
    }
    put_added_tokens(v, root);
    put_merges(v, model);
    v.pre = name_pre_tokenizer(root, model.boolean("ignore_merges", false));
    v.bos = tokenizer.bos, v.eos = tokenizer.eos, v.add_bos = tokenizer.add_bos;
    v.chat_template = tokenizer.chat_template;
    return v;
}

// A folder without a tokenizer gives a file without one.   stops: ids that end an answer
inline void put_vocabulary_keys(GgufHead& h, const fs::path& model, int V, std::vector<int> stops) {
    if (!is_gguf(model) && !fs::exists(model / "tokenizer.json"))
        return h.text("tokenizer.ggml.model", "none");
    Vocabulary v = is_gguf(model) ? gguf_vocabulary(open_gguf(model).keys) : folder_vocabulary(model, V);
    h.text("tokenizer.ggml.model", "gpt2");
    h.text("tokenizer.ggml.pre", v.pre);
    h.texts("tokenizer.ggml.tokens", v.tokens);
    h.array("tokenizer.ggml.token_type", GgufType::I32, v.types.size());
    for (int64_t type : v.types) h.raw(int32_t(type));
    h.texts("tokenizer.ggml.merges", v.merges);
    if (v.bos >= 0) h.u32("tokenizer.ggml.bos_token_id", v.bos);
    std::erase(stops, v.eos);
    if (v.eos >= 0) stops.insert(stops.begin(), v.eos);      // first, as the chat template may ask for it
    if (stops.size() > std::size(STOP_KEYS))
        refuse(model, "%zu tokens end an answer; a GGUF file has keys for 3", stops.size());
    for (size_t i = 0; i < stops.size(); i++) h.u32(STOP_KEYS[i], stops[i]);
    h.boolean("tokenizer.ggml.add_bos_token", v.add_bos);
    if (!v.chat_template.empty()) h.text("tokenizer.chat_template", v.chat_template);
}

// -- 11  writing: tensors ------------------------------------------------------------------------

// One tensor of the file: a vector, a matrix, or a stack of matrices (experts, heads).
struct GgufTensor {
    std::string name;
    Dtype dtype;
    std::vector<Matrix> parts;
    int axes;                            // 1: a vector, 2: a matrix, 3: a stack
    int pairs = 0;                       // rows of a head that are to be in the order x0 x_d/2 x1 ...

    int rows() const { return parts[0].rows; }
    int cols() const { return parts[0].cols; }
    uint64_t bytes() const { return uint64_t(parts.size()) * uint64_t(rows()) * row_bytes(dtype, cols()); }
};

// Each head's W^UK, transposed, or its W^UV: from the one matrix that has both, or from one of their own.
inline std::vector<Matrix> head_parts(const Checkpoint& from, const Config& c, const std::string& ours) {
    size_t end = ours.size() - std::strlen("k_b_proj.weight");
    bool keys = ours[end] == 'k';
    std::string both = ours.substr(0, end) + "kv_b_proj.weight";
    std::vector<Matrix> heads;
    if (from.tensors.count(both)) {
        Matrix kv = matrix_of(from, both);
        for (int row = 0; row < kv.rows; row += c.Dn + c.Dv)
            heads.push_back(keys ? kv.view(row, c.Dn).transpose() : kv.view(row + c.Dn, c.Dv));
    } else if (from.tensors.count(ours)) {
        Matrix all = matrix_of(from, ours);
        for (int row = 0, step = keys ? c.Rkv : c.Dv; row < all.rows; row += step)
            heads.push_back(all.view(row, step));
    }
    return heads;
}

// What a checkpoint has for one tensor of the file: the matrices of a stack, or one, or none.
inline std::vector<Matrix> parts_of(const Checkpoint& from, const Config& c, const std::string& ours) {
    std::vector<Matrix> parts;
    auto add = [&](const std::string& name) {
        if (from.tensors.count(name)) parts.push_back(matrix_of(from, name));
    };
    size_t star = ours.find('*');
    if (of_all_heads(ours)) return head_parts(from, c, ours);
    if (star == ours.npos) add(ours);
    else for (int e = 0; e < c.E; e++) add(ours.substr(0, star) + std::to_string(e) + ours.substr(star + 1));
    return parts;
}

// name: in the file
inline GgufTensor gguf_tensor(const Checkpoint& from, const Config& c, const std::string& name,
                              const FileType& type) {
    std::string ours = name_from_gguf(name);
    GgufTensor t{name, Dtype::F32, parts_of(from, c, ours), 0};
    if (t.parts.empty()) return t;
    bool stack = of_all_heads(ours) || ours.find('*') != ours.npos;
    t.axes = stack ? 3 : int(from.tensors.at(ours).shape.size());
    if (t.axes > 1) t.dtype = target_dtype(type, name, t.cols(), c).value_or(Dtype::F32);
    if (of_turned_heads(ours) && gguf_architecture(c) == "llama" && !t.parts[0].pairs) t.pairs = c.head_dim;
    return t;
}

// All tensors of the file, in their order.   divisors: of Llama 3.1's frequencies, if any
inline std::vector<GgufTensor> gguf_tensors(const Checkpoint& from, const Config& c, const FileType& type,
                                            const std::vector<float>& divisors) {
    std::vector<GgufTensor> all;
    auto add = [&](const std::string& name) {
        GgufTensor t = gguf_tensor(from, c, name, type);
        if (!t.parts.empty()) all.push_back(std::move(t));
    };
    for (const TensorName& n : MODEL_NAMES)
        if (!c.tied || n.gguf != std::string("output.weight")) add(n.gguf);
    Matrix d{reinterpret_cast<const std::byte*>(divisors.data()), nullptr, Dtype::F32};
    d.rows = 1, d.cols = int(divisors.size());
    if (d.cols) all.push_back({"rope_freqs.weight", Dtype::F32, {d}, 1});
    for (int l = 0; l < c.n_layers + c.n_mtp; l++)
        for (const TensorName& n : LAYER_NAMES) add(text_of("blk.%d.%s", l, n.gguf));
    return all;
}

// Rows begin, begin + 1, ... of a part in the order of the file.   out: (count, part.cols)
inline std::vector<float> rows_in_file(const GgufTensor& t, const Matrix& part, int begin, int count) {
    if (!part.transposed) return float_rows(part, begin, count, t.pairs);
    std::vector<float> stored = float_rows(part.stored(), 0, part.cols), out;
    for (int r = begin; r < begin + count; r++)
        for (int col = 0; col < part.cols; col++)
            out.push_back(stored[size_t(col) * size_t(part.rows) + size_t(r)]);
    return out;
}

// One part of a tensor; some rows at a time, as a model may be larger than memory.
inline void write_part(AtomicFile& file, const GgufTensor& t, const Matrix& part) {
    const int at_once = part.transposed ? part.rows : t.pairs ? t.pairs : 1024;     // rows
    for (int begin = 0; begin < part.rows; begin += at_once) {
        int count = std::min(at_once, part.rows - begin);
        std::vector<std::byte> out(size_t(count) * row_bytes(t.dtype, part.cols));
        if (part.dtype == t.dtype && !part.transposed && !t.pairs)
            std::memcpy(out.data(), part.row(begin), out.size());   // what is there is not rounded again
        else narrow_rows(out.data(), rows_in_file(t, part, begin, count), part.cols, t.dtype, t.name);
        file.write(out.data(), out.size());
        if (t.axes > 1 && !part.transposed) forget_pages(part.view(begin, count));
    }
}

constexpr uint64_t GGUF_ALIGNMENT = 32;

inline std::string gguf_padding(uint64_t bytes) { return std::string(size_t(-bytes % GGUF_ALIGNMENT), '\0'); }

// Everything before the data. Returns the bytes of the data.
inline uint64_t write_gguf_head(AtomicFile& file, const GgufHead& keys,
                                const std::vector<GgufTensor>& tensors) {
    GgufHead h;
    uint64_t total = 0;
    h.bytes = "GGUF", h.raw(uint32_t(3)), h.raw(uint64_t(tensors.size())), h.raw(keys.count);
    h.bytes += keys.bytes;
    for (const GgufTensor& t : tensors) {
        uint64_t axes[] = {uint64_t(t.cols()), uint64_t(t.rows()), uint64_t(t.parts.size())};
        h.string(t.name), h.raw(uint32_t(t.axes));
        for (int i = 0; i < t.axes; i++) h.raw(axes[i]);
        h.raw(ggml_type(t.dtype)), h.raw(total);
        total += t.bytes() + gguf_padding(t.bytes()).size();
    }
    h.bytes += gguf_padding(h.bytes.size());
    file.write(h.bytes.data(), h.bytes.size());
    return total;
}

// Some weights have been made small integers before. (FP8 is what models are published in.)
inline bool is_quantised(const Checkpoint& from) {
    for (auto& [name, t] : from.tensors) if (auto d = weights_dtype(t.dtype); d && quantised(*d)) return true;
    return false;
}

// Writes the tensors of a checkpoint that has been found whole (load_model, chapter 11.2).   source: the
// folder or file that they came from, for its vocabulary;   progress: bytes done, in all
inline void write_gguf(AtomicFile& file, const Checkpoint& from, const Config& c, const fs::path& source,
                       const FileType& type, const GenerationConfig& generation,
                       const std::function<void(uint64_t, uint64_t)>& progress) {
    require_tellable(c);
    GgufHead keys;
    put_config_keys(keys, c, type);
    put_general_keys(keys, source, generation.sampling);
    put_vocabulary_keys(keys, source, c.V, generation.eos);
    std::vector<float> divisors;         // of Llama 3.1's scaling only its effect is kept
    if (c.rope.scaling == Scaling::LLAMA3)
        for (double d : llama3_divisors(c.rope, c.rope_dim())) divisors.push_back(float(d));
    std::vector<GgufTensor> tensors = gguf_tensors(from, c, type, divisors);
    uint64_t total = write_gguf_head(file, keys, tensors), done = 0;
    for (const GgufTensor& t : tensors) {
        for (const Matrix& part : t.parts) write_part(file, t, part);
        std::string padding = gguf_padding(t.bytes());
        file.write(padding.data(), padding.size());
        progress(done += t.bytes(), total);
    }
    file.commit();
}
