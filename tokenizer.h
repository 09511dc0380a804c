// tokenizer.h: text <-> token ids, and the chat templates, of the DeepSeek models. Usable alone:
//
//     Tokenizer t = Tokenizer::load("weights/tiny");
//     std::vector<int> ids = t.encode("How many r are in strawberry?");      // never adds BOS
//     std::string text = t.decode(ids);                                      // the same text again
//     std::string prompt = t.render({{"user", "Hello!"}}, true);             // begins with BOS
//
// Link with -lsimdjson -lpcre2-8 -lutf8proc. All errors are TokenizerError with one clear line.
//
// How does a network that knows only numbers read? A tokenizer cuts text into pieces of a fixed list, the
// vocabulary, and names each by its place there. DeepSeek's tokenizers, Qwen's and Llama's are all byte-level
// byte-pair encoders (BPE; Sennrich et al. 2016, Radford et al. 2019), and the model's own tokenizer.json says
// everything in which they differ. So this file holds no list of models: it runs what that file says, and refuses
// a file that says something it does not know. A wrong guess here gives fluent nonsense, an error does not.
//
// One example on its way, with DeepSeek-V3's file, from "<｜User｜>don't 1234":
//
//     chapter 6   added tokens     [<｜User｜>] "don't 1234"           text that spells such a token becomes it
//     chapter 6   normaliser       none here; the Qwen distills ask for Unicode's composed form, NFC
//     chapter 4   Split regexes    "don" "'t" " " "123" "4"          each regex cuts inside every piece so far
//     chapter 3   bytes            a token is a string of bytes, no longer of characters
//     chapter 5   merges           d o n -> do n -> don               the pair with the lowest rank joins first
//     chapter 6   ids              128803, 20385, 1664, 223, 6895, 22
//
// Going back is simple: put the bytes of the ids side by side. Only there do characters matter again, as one
// may be split over two tokens; a stream must hold back the first half (Utf8Stream).
//
// Contents: 1 errors and JSON, 2 UTF-8, 3 bytes as characters, 4 cutting, 5 merging, 6 the tokenizer, 7 chat.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <queue>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <pcre2.h>
#include <simdjson.h>
#include <utf8proc.h>

// =================================================================================================
// 1. Errors and JSON
// =================================================================================================

struct TokenizerError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

namespace tokenizer_detail {

constexpr size_t MAX_FILE = size_t(1) << 30;     // bytes; the largest published tokenizer.json has 17 MB
constexpr size_t MAX_DEPTH = 64;                 // of nested JSON
constexpr int MAX_ID = 1 << 20;                  // the largest published vocabulary has 256 k tokens

// A JSON value that knows where it stands, so that each complaint names the file and the field.
struct Json {
    simdjson::dom::element value;
    std::string where;

    [[noreturn]] void fail(const std::string& what) const { throw TokenizerError(where + ": " + what); }

    // The member `key`, or nothing. A member that is there twice has no meaning that two readers agree on.
    std::optional<Json> find(std::string_view key) const {
        simdjson::dom::object object;
        if (value.get(object)) fail("must be an object");
        std::optional<Json> found;
        for (auto [name, member] : object) {
            if (name != key) continue;
            if (found) fail("'" + std::string(key) + "' is given twice");
            found = Json{member, where + "." + std::string(key)};
        }
        return found;
    }
    // The same, with null counted as absent.
    std::optional<Json> given(std::string_view key) const {
        std::optional<Json> member = find(key);
        return member && member->value.is_null() ? std::nullopt : member;
    }
    Json at(std::string_view key) const {
        if (std::optional<Json> member = find(key)) return *member;
        fail("'" + std::string(key) + "' is missing");
    }
    std::string_view string() const {
        std::string_view s;
        if (value.get(s)) fail("must be a string");
        if (!simdjson::validate_utf8(s.data(), s.size())) fail("is not valid Unicode");     // a lone surrogate
        return s;
    }
    bool boolean() const {
        bool b;
        if (value.get(b)) fail("must be true or false");
        return b;
    }
    int id() const {
        int64_t i;
        if (value.get(i)) fail("must be an integer");
        if (i < 0 || i >= MAX_ID) fail("token id " + std::to_string(i) + " is out of range");
        return int(i);
    }
    std::vector<Json> items() const {
        simdjson::dom::array array;
        if (value.get(array)) fail("must be an array");
        std::vector<Json> out;
        for (simdjson::dom::element e : array) out.push_back({e, where + "[" + std::to_string(out.size()) + "]"});
        return out;
    }
    std::string_view type() const { return at("type").string(); }
    // Fields that must have one value because nothing else is implemented.
    void only(std::string_view key, bool wanted) const {
        if (at(key).boolean() != wanted) at(key).fail(wanted ? "false is not supported" : "true is not supported");
    }
    void absent(std::string_view key) const {
        if (std::optional<Json> m = given(key); m && !(m->value.is_string() && m->string().empty()))
            m->fail("is not supported");
    }
};

// "model_max_length": 1000000000000000019884624838656 is in many files; the parser takes such a number with an
// exponent only. Integers of more than 18 digits get one.
inline std::string with_exponents(std::string_view json) {
    std::string out;
    bool quoted = false;
    for (size_t i = 0, n; i < json.size(); i += n) {
        n = std::min(json.find_first_not_of("0123456789", i), json.size()) - i;
        bool whole = n > 18 && !quoted && (i == 0 || std::string_view(".eE+").find(json[i - 1]) == std::string_view::npos) &&
                     (i + n == json.size() || std::string_view(".eE").find(json[i + n]) == std::string_view::npos);
        if (n == 0) n = quoted && json[i] == '\\' ? std::min<size_t>(2, json.size() - i) : 1;
        if (json[i] == '"') quoted = !quoted;
        out.append(json.substr(i, n)).append(whole ? "e0" : "");
    }
    return out;
}

struct Document {
    simdjson::dom::parser parser;
    Json root;
    Document(std::string_view text, const std::string& name) {
        root.where = name;
        if (text.size() > MAX_FILE) root.fail("too large");
        if (parser.allocate(text.size() + 1, MAX_DEPTH)) root.fail("out of memory");
        simdjson::error_code error = parser.parse(text.data(), text.size()).get(root.value);
        if (error == simdjson::NUMBER_ERROR) error = parser.parse(with_exponents(text)).get(root.value);
        if (error) root.fail(std::string("not valid JSON: ") + simdjson::error_message(error));
    }
};

// The whole file, or nothing when it cannot be opened.
inline std::optional<std::string> read_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) return std::nullopt;
    std::string text(std::istreambuf_iterator<char>(in), {});
    if (in.bad()) throw TokenizerError(path + ": cannot read");
    return text;
}

// =================================================================================================
// 2. UTF-8
// =================================================================================================

// What stands at the head of s: a character, a part that no continuation can save, or a character cut off by the
// end of s. A broken part is maximal (Unicode 3.9, "substitution of maximal subparts"): the longest prefix of
// some character, or one byte. So do Rust and Python, and each part becomes one U+FFFD.
struct Utf8Part {
    enum { CHARACTER, BROKEN, CUT } kind;
    size_t length;
};

inline Utf8Part utf8_part(std::string_view s) {
    unsigned char lead = s[0], low = 0x80, high = 0xBF;
    if (lead < 0x80) return {Utf8Part::CHARACTER, 1};
    if (lead < 0xC2 || lead > 0xF4) return {Utf8Part::BROKEN, 1};
    size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (lead == 0xE0) low = 0xA0;                // shorter forms exist below
    if (lead == 0xED) high = 0x9F;               // surrogates above
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;               // beyond U+10FFFF
    for (size_t i = 1; i < length; i++, low = 0x80, high = 0xBF) {
        if (i == s.size()) return {Utf8Part::CUT, i};
        unsigned char c = s[i];
        if (c < low || c > high) return {Utf8Part::BROKEN, i};
    }
    return {Utf8Part::CHARACTER, length};
}

inline void check_utf8(std::string_view text) {
    if (simdjson::validate_utf8(text.data(), text.size())) return;
    size_t i = 0;
    for (Utf8Part part; (part = utf8_part(text.substr(i))).kind == Utf8Part::CHARACTER;) i += part.length;
    throw TokenizerError("the text is not valid UTF-8 at byte " + std::to_string(i));
}

}  // namespace tokenizer_detail

// Bytes in, whole characters out. The concatenation of all answers, finish() last, does not depend on how the
// bytes were cut into calls; each maximal invalid part has become U+FFFD.
struct Utf8Stream {
    std::string push(std::string_view bytes) {
        using tokenizer_detail::Utf8Part;
        std::string all = std::move(held_) + std::string(bytes), out;
        held_.clear();
        for (size_t i = 0; i < all.size();) {
            Utf8Part part = tokenizer_detail::utf8_part(std::string_view(all).substr(i));
            if (part.kind == Utf8Part::CUT) held_ = all.substr(i);
            else if (part.kind == Utf8Part::BROKEN) out += "\xEF\xBF\xBD";
            else out.append(all, i, part.length);
            i += part.length;
        }
        return out;
    }
    std::string finish() { return std::exchange(held_, {}).empty() ? "" : "\xEF\xBF\xBD"; }

private:
    std::string held_;                           // at most 3 bytes: the beginning of a character
};

// A JSON string, quotes included. utf8: valid UTF-8, which stays as it is.
inline std::string json_quote(std::string_view utf8) {
    std::string out = "\"";
    for (char c : utf8) {
        char escape[8];
        if (c == '"' || c == '\\') out += '\\', out += c;
        else if (c == '\n') out += "\\n";
        else if (c == '\t') out += "\\t";
        else if (c == '\r') out += "\\r";
        else if (static_cast<unsigned char>(c) >= 0x20) out += c;
        else std::snprintf(escape, sizeof escape, "\\u%04x", c), out += escape;
    }
    return out + '"';
}

// =================================================================================================
// 3. Bytes as characters
// =================================================================================================
//
// A vocabulary of byte strings must be written down in JSON, which holds characters. GPT-2's way: the 188 printable
// characters of Latin-1 stand for their own byte, and the other 68 bytes, in order, are U+0100 and on. So a
// blank is written Ġ (U+0120), and "Ã©" is the two bytes of é. BPE itself works on bytes here.

namespace tokenizer_detail {

constexpr bool stands_for_itself(int byte) {
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

// BYTE_OF[character] for the 324 characters U+0000 to U+0143, -1 where a character stands for no byte.
constexpr std::array<int16_t, 324> BYTE_OF = [] {
    std::array<int16_t, 324> table{};
    table.fill(-1);
    for (int byte = 0, other = 256; byte < 256; byte++) table[stands_for_itself(byte) ? byte : other++] = int16_t(byte);
    return table;
}();

// The bytes that `spelled` stands for; nothing when it has a character outside the alphabet.
inline std::optional<std::string> bytes_of(std::string_view spelled) {
    std::string out;
    for (size_t i = 0; i < spelled.size(); i++) {
        unsigned c = static_cast<unsigned char>(spelled[i]);
        if (c >= 0x80 && (c < 0xC2 || c > 0xC5 || i + 1 == spelled.size())) return std::nullopt;
        if (c >= 0x80) c = (c & 0x1F) << 6 | (static_cast<unsigned char>(spelled[++i]) & 0x3F);
        if (c >= BYTE_OF.size() || BYTE_OF[c] < 0) return std::nullopt;
        out += char(BYTE_OF[c]);
    }
    return out;
}

// =================================================================================================
// 4. Cutting
// =================================================================================================
//
// tokenizer.json's regexes are written for Oniguruma with Ruby's syntax; PCRE2 runs them. Most of it means the same to
// both, the rest is listed here: translated where a translation is exact, refused otherwise. (What would go wrong: PCRE2's
// \s also matches U+180E, Ruby's $ matches before every line's end, \h is a hexadecimal digit to one
// and a blank to the other, [a[b]] is a union to one only.)

constexpr std::string_view WHITE_SPACE =         // Unicode's 25 characters of that property
    "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";

struct RegexTranslator {
    std::string_view in;
    const Json& field;                           // for errors
    std::string out = {};
    size_t i = 0;
    bool in_class = false;

    [[noreturn]] void refuse(size_t n) const {
        field.fail("the regex has '" + std::string(in.substr(i, n)) + "' at byte " + std::to_string(i) + ", which is not supported");
    }
    bool next_is(std::string_view s) const { return in.substr(i, s.size()) == s; }
    void copy(size_t n) { out += in.substr(i, n), i += n; }
    void replace(size_t n, std::string_view with) { out += with, i += n; }

    void escape() {
        char c = i + 1 < in.size() ? in[i + 1] : 'c';
        if (c == 's' && in_class && i + 2 < in.size() && in[i + 2] == '-') refuse(3);
        if (c == 's') return in_class ? replace(2, WHITE_SPACE) : replace(2, "[" + std::string(WHITE_SPACE) + "]");
        if (c == 'S' && !in_class) return replace(2, "[^" + std::string(WHITE_SPACE) + "]");
        if (c == 'p' || c == 'P') return property();
        bool same = c == 'n' || c == 'r' || c == 't' || std::string_view("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~").find(c) != std::string_view::npos;
        same ? copy(2) : refuse(2);
    }
    void property() {                            // \p{Lu}: general categories only
        size_t end = in.find('}', i);
        std::string_view name = in.substr(std::min(i + 3, in.size()), end == std::string_view::npos ? 0 : end - i - 3);
        constexpr std::string_view KNOWN = " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp ";
        if (in.substr(i + 2, 1) != "{" || name.empty() || name.size() > 2 || KNOWN.find(" " + std::string(name) + " ") == std::string_view::npos)
            refuse(5);
        copy(name.size() + 4);
    }
    void group() {
        for (std::string_view open : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"})
            if (next_is(open)) return copy(open.size());
        if (next_is("(?") || next_is("(*")) refuse(3);
        copy(1);
    }
    void repeat() {                              // {3} {1,3} {2,}; a sign after it means other things to the two
        size_t n = 1;
        while (i + n < in.size() && in[i + n] >= '0' && in[i + n] <= '9') n++;
        if (n == 1) refuse(2);
        if (next_is(in.substr(i, n)) && i + n < in.size() && in[i + n] == ',') n++;
        while (i + n < in.size() && in[i + n] >= '0' && in[i + n] <= '9') n++;
        if (i + n >= in.size() || in[i + n] != '}') refuse(n);
        if (i + n + 1 < in.size() && (in[i + n + 1] == '+' || in[i + n + 1] == '?')) refuse(n + 2);
        copy(n + 1);
    }
    void one() {
        char c = in[i];
        if (c == '\\') return escape();
        if (in_class) {
            if (c == '[' || next_is("&&")) refuse(2);
            in_class = c != ']';
            return copy(1);
        }
        if (c == '(') return group();
        if (c == '{') return repeat();
        if (c == '$') return replace(1, "(?m:$)");
        if (c == '.' || c == '^' || c == ']' || c == '}') refuse(1);
        copy(1);
        if (c != '[') return;
        in_class = true;
        if (next_is("^")) copy(1);
        if (next_is("]")) refuse(1);
    }
    std::string run() {
        // One rewriting for speed, which changes no match: where \s+$ fails at the first blank of a run, it fails at
        // the others, and trying them all is quadratic. \G: a match may begin where the last one ended.
        if (in == "\\s+$") in = "\\s+$", out = "(?:(?<![" + std::string(WHITE_SPACE) + "])|\\G)";
        while (i < in.size()) one();
        return out;
    }
};

// What a thread needs for matching.
struct MatchMemory {
    pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
    pcre2_match_context* context = pcre2_match_context_create(nullptr);
    pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 8 << 20, nullptr);
    MatchMemory() {
        if (!data || !context || !stack) throw std::bad_alloc();
        pcre2_jit_stack_assign(context, nullptr, stack);
        pcre2_set_match_limit(context, 1000000);
        pcre2_set_heap_limit(context, 64 << 10);           // KiB
    }
    MatchMemory(const MatchMemory&) = delete;
    ~MatchMemory() {
        pcre2_match_data_free(data), pcre2_match_context_free(context), pcre2_jit_stack_free(stack);
    }
};

inline MatchMemory& match_memory() {
    thread_local MatchMemory memory;
    return memory;
}

using Pieces = std::vector<std::string_view>;

// Cuts a piece at each match: matches and the gaps between them become pieces ("Isolated").
struct Splitter {
    struct Free {
        void operator()(pcre2_code* c) const { pcre2_code_free(c); }
    };
    std::unique_ptr<pcre2_code, Free> code;
    std::string where;

    Splitter(std::string_view ruby, const Json& field) : where(field.where) {
        std::string pattern = RegexTranslator{ruby, field}.run();
        std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
            pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
        pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
        int error = 0;
        size_t at = 0;
        code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP,
                                 &error, &at, context.get()));
        if (!code) field.fail("the regex does not compile: " + message(error));
        uint32_t may_be_empty = 0;
        pcre2_pattern_info(code.get(), PCRE2_INFO_MATCHEMPTY, &may_be_empty);
        if (may_be_empty) field.fail("the regex matches the empty text");
        pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);     // where there is no JIT the interpreter gives the same
    }
    static std::string message(int error) {
        unsigned char text[256] = {};
        pcre2_get_error_message(error, text, sizeof text);
        return reinterpret_cast<char*>(text);
    }
    void split(std::string_view piece, Pieces& out) const {
        MatchMemory& memory = match_memory();
        const size_t* match = pcre2_get_ovector_pointer(memory.data);
        auto subject = reinterpret_cast<PCRE2_SPTR>(piece.data());
        size_t done = 0;
        while (done < piece.size()) {
            int rc = pcre2_match(code.get(), subject, piece.size(), done, PCRE2_NO_UTF_CHECK, memory.data, memory.context);
            if (rc == PCRE2_ERROR_NOMATCH) break;
            if (rc < 0) throw TokenizerError(where + ": the regex gave up on this text: " + message(rc));
            if (match[1] <= match[0]) throw TokenizerError(where + ": the regex matches the empty text");
            if (match[0] > done) out.push_back(piece.substr(done, match[0] - done));
            out.push_back(piece.substr(match[0], match[1] - match[0]));
            done = match[1];
        }
        if (done < piece.size()) out.push_back(piece.substr(done));
    }
};

// =================================================================================================
// 5. Merging
// =================================================================================================
//
// A piece starts as its bytes. Each merge names two tokens that, side by side, become a third; its place in the list
// is its rank. As long as some neighbours have a merge, the one with the lowest rank is done, the leftmost on ties.
// The textbook's way looks at all pairs for each merge; here a heap holds the possible merges, and a
// linked list the tokens, so n bytes take O(n log n).

struct Merge {
    int left, right, result;
};

// Finds a merge's rank by its two tokens: open addressing, half full at most.
struct MergeTable {
    std::vector<Merge> merges;                   // by rank
    std::vector<int> slots;                      // rank, or -1
    int shift = 0;

    size_t slot(int left, int right) const {
        uint64_t key = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
        return size_t(key * 0x9E3779B97F4A7C15u >> shift);
    }
    void build() {
        int bits = std::bit_width(merges.size()) + 1;
        shift = 64 - bits;
        slots.assign(size_t(1) << bits, -1);
        for (size_t rank = 0; rank < merges.size(); rank++) {
            size_t s = slot(merges[rank].left, merges[rank].right);
            while (slots[s] >= 0) s = (s + 1) & (slots.size() - 1);
            slots[s] = int(rank);
        }
    }
    int find(int left, int right) const {        // rank, or -1
        for (size_t s = slot(left, right);; s = (s + 1) & (slots.size() - 1)) {
            int rank = slots[s];
            if (rank < 0 || (merges[rank].left == left && merges[rank].right == right)) return rank;
        }
    }
};

struct Bpe {
    MergeTable table;
    std::array<int, 256> byte_token{};           // id, or -1

    // Appends the tokens of `piece` (at most 2^31 bytes) to ids.
    void merge(std::string_view piece, std::vector<int>& ids) const {
        struct Symbol {
            int id, previous, next;              // positions; -1 at the ends; id -1: merged into its left neighbour
        };
        std::vector<Symbol> symbols(piece.size());
        std::vector<uint64_t> possible;          // rank << 32 | position of the left token
        int n = int(piece.size());
        auto offer = [&](int at) {
            int rank = at < 0 || symbols[at].next < 0 ? -1 : table.find(symbols[at].id, symbols[symbols[at].next].id);
            if (rank >= 0) possible.push_back(uint64_t(rank) << 32 | uint32_t(at));
            return rank >= 0;
        };
        for (int i = 0; i < n; i++) {
            int id = byte_token[static_cast<unsigned char>(piece[i])];
            if (id < 0) throw TokenizerError("the vocabulary has no token for byte " + std::to_string(static_cast<unsigned char>(piece[i])));
            symbols[i] = {id, i - 1, i + 1 < n ? i + 1 : -1};
        }
        for (int i = 0; i < n; i++) offer(i);
        std::make_heap(possible.begin(), possible.end(), std::greater<>());
        while (!possible.empty()) {
            std::pop_heap(possible.begin(), possible.end(), std::greater<>());
            uint64_t top = possible.back();
            possible.pop_back();
            int at = int(uint32_t(top)), right = symbols[at].next;
            const Merge& m = table.merges[top >> 32];
            if (symbols[at].id != m.left || right < 0 || symbols[right].id != m.right) continue;     // no longer there
            symbols[at] = {m.result, symbols[at].previous, symbols[right].next};
            symbols[right].id = -1;
            if (symbols[at].next >= 0) symbols[symbols[at].next].previous = at;
            for (int side : {at, symbols[at].previous})
                if (offer(side)) std::push_heap(possible.begin(), possible.end(), std::greater<>());
        }
        for (int i = 0; n > 0 && i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
    }
};

// Added tokens, found in text leftmost first, then longest.
struct AddedTokens {
    std::vector<std::pair<std::string, int>> sorted;     // content, id
    std::array<bool, 256> may_start{};

    void add(std::string_view content, int id) {
        sorted.emplace_back(content, id);
        may_start[static_cast<unsigned char>(content[0])] = true;
    }
    // The longest token at the head of text: its place in `sorted`, or -1. Each byte narrows the range of
    // those that agree so far.
    int longest(std::string_view text) const {
        size_t low = 0, high = sorted.size();
        int best = -1;
        for (size_t n = 0; n < text.size() && low < high; n++) {
            unsigned char c = text[n];
            auto byte = [n](const auto& t) { return n < t.first.size() ? int(static_cast<unsigned char>(t.first[n])) : -1; };
            auto first = sorted.begin() + low, last = sorted.begin() + high;
            low = std::partition_point(first, last, [&](const auto& t) { return byte(t) < c; }) - sorted.begin();
            high = std::partition_point(first, last, [&](const auto& t) { return byte(t) <= c; }) - sorted.begin();
            if (low < high && sorted[low].first.size() == n + 1) best = int(low);
        }
        return best;
    }
    // Calls gap(text) and token(id), in order, for what text is made of.
    template <class Gap, class Token>
    void cut(std::string_view text, Gap gap, Token token) const {
        size_t done = 0;
        for (size_t i = 0; i < text.size();) {
            int found = may_start[static_cast<unsigned char>(text[i])] ? longest(text.substr(i)) : -1;
            if (found < 0) { i++; continue; }
            if (i > done) gap(text.substr(done, i - done));
            token(sorted[found].second);
            done = i += sorted[found].first.size();
        }
        if (done < text.size()) gap(text.substr(done));
    }
};

inline std::string to_nfc(std::string_view text) {
    utf8proc_uint8_t* out = nullptr;
    utf8proc_ssize_t n = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), utf8proc_ssize_t(text.size()), &out,
                                      utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(out, std::free);
    if (n < 0) throw TokenizerError(std::string("NFC: ") + utf8proc_errmsg(n));
    return std::string(reinterpret_cast<char*>(out), size_t(n));
}

}  // namespace tokenizer_detail

// =================================================================================================
// 7a. Chat: what a message is
// =================================================================================================

enum class ChatTemplate { NONE, V2, V3, R1, R1_DISTILL, UNKNOWN };

struct ToolCall {
    std::string type, name, arguments;
};

struct Message {
    std::string role;
    std::optional<std::string> content = {};                      // null where only tools are called
    std::optional<std::vector<ToolCall>> tool_calls = {};         // R1 asks whether the key is there
};

struct Chat {
    std::vector<Message> messages;
    bool add_generation_prompt = false;
};

namespace tokenizer_detail {

inline Message parse_message(const Json& json) {
    Message m{std::string(json.at("role").string())};
    if (auto content = json.given("content")) m.content = content->string();
    auto calls = json.find("tool_calls");
    if (!calls) return m;
    m.tool_calls.emplace();
    for (const Json& call : calls->items()) {
        Json function = call.at("function");
        m.tool_calls->push_back({std::string(call.at("type").string()), std::string(function.at("name").string()),
                                 std::string(function.at("arguments").string())});
    }
    return m;
}

inline std::vector<Message> parse_message_list(const Json& json) {
    std::vector<Message> out;
    for (const Json& item : json.items()) out.push_back(parse_message(item));
    return out;
}

}  // namespace tokenizer_detail

inline std::vector<Message> parse_messages(std::string_view json) {
    return tokenizer_detail::parse_message_list(tokenizer_detail::Document(json, "messages").root);
}

inline Chat parse_chat(std::string_view json) {
    tokenizer_detail::Document document(json, "chat");
    Chat chat{tokenizer_detail::parse_message_list(document.root.at("messages"))};
    if (auto tools = document.root.given("tools")) tools->items();         // no template reads them
    if (auto prompt = document.root.given("add_generation_prompt")) chat.add_generation_prompt = prompt->boolean();
    return chat;
}

namespace tokenizer_detail {

constexpr std::string_view USER = "<｜User｜>", ASSISTANT = "<｜Assistant｜>", END = "<｜end▁of▁sentence｜>";

inline const std::string& content_of(const Message& m) {
    if (!m.content) throw TokenizerError("a message of role '" + m.role + "' needs content");
    return *m.content;
}

inline std::string render_call(const ToolCall& c) {
    return "<｜tool▁call▁begin｜>" + c.type + "<｜tool▁sep｜>" + c.name + "\n```json\n" + c.arguments + "\n```<｜tool▁call▁end｜>";
}

inline std::string render_v2(const std::vector<Message>& messages, std::string_view eos) {
    std::string out;
    for (const Message& m : messages) {
        if (m.role == "user") out += "User: " + content_of(m) + "\n\n";
        if (m.role == "assistant") out += "Assistant: " + content_of(m) + std::string(eos);
        if (m.role == "system") out += content_of(m) + "\n\n";
    }
    return out;
}

// V3, R1 and the distills: one template in three states.
struct Renderer {
    ChatTemplate kind;
    std::string out = {};
    bool called = false, answered = false, is_tool = false;

    void system(const std::vector<Message>& messages) {
        std::string text;
        bool first = true;
        for (const Message& m : messages) {
            if (m.role != "system") continue;
            if (kind == ChatTemplate::R1_DISTILL) text.clear();
            else if (!first) text += "\n\n";
            text += content_of(m);
            first = false;
        }
        out += text;
    }
    void calls(const Message& m) {
        const bool r1 = kind == ChatTemplate::R1;
        is_tool = false;
        for (const ToolCall& c : *m.tool_calls) {
            if (called) out += "\n" + render_call(c) + (r1 ? "" : "<｜tool▁calls▁end｜>" + std::string(END));
            else out += std::string(ASSISTANT) + (r1 ? m.content.value_or("") : "") + "<｜tool▁calls▁begin｜>" + render_call(c);
            called = true;
        }
        if (r1) out += "<｜tool▁calls▁end｜>" + std::string(END);
    }
    void assistant(const Message& m) {
        if (kind == ChatTemplate::R1 ? m.tool_calls.has_value() : !m.content) {
            if (m.tool_calls) calls(m);
            else is_tool = false;
            return;
        }
        std::string text = content_of(m);
        if (is_tool) out += "<｜tool▁outputs▁end｜>";
        else {
            size_t thought = text.rfind("</think>");
            if (kind != ChatTemplate::V3 && thought != std::string::npos) text.erase(0, thought + 8);
            out += ASSISTANT;
        }
        out += text + std::string(END);
        is_tool = false;
    }
    void tool(const Message& m) {
        is_tool = true;
        if (answered) out += kind == ChatTemplate::R1 ? "" : "\n";
        else out += "<｜tool▁outputs▁begin｜>";
        out += "<｜tool▁output▁begin｜>" + content_of(m) + "<｜tool▁output▁end｜>";
        answered = true;
    }
    std::string run(const std::vector<Message>& messages) {
        system(messages);
        for (const Message& m : messages) {
            if (m.role == "user") is_tool = false, out += std::string(USER) + content_of(m);
            if (m.role == "assistant") assistant(m);
            if (m.role == "tool") tool(m);
        }
        if (is_tool) out += "<｜tool▁outputs▁end｜>";
        return out;
    }
};

struct KnownTemplate {
    ChatTemplate kind = ChatTemplate::UNKNOWN;
    std::string generation_prompt = {};
};

// A Jinja template without what does not change its meaning: blanks between the words of a tag, and \n for a newline
// inside a string. Text outside tags stays as it is.
inline std::string normalise_template(std::string_view text) {
    std::string out;
    char quote = 0;
    bool tag = false;
    for (size_t i = 0; i < text.size(); i++) {
        char c = text[i], next = i + 1 < text.size() ? text[i + 1] : char(0);
        if (!tag) tag = c == '{' && (next == '{' || next == '%');
        else if (quote && c == '\\' && next == 'n') c = '\n', i++;
        else if (quote) quote = c == quote ? char(0) : quote;
        else if (c == '\'' || c == '"') quote = c;
        else if ((c == '}' || c == '%') && next == '}') tag = false;
        else if (c == ' ' || c == '\n') continue;
        out += c;
    }
    return out;
}

inline uint64_t fnv1a(std::string_view text) {
    uint64_t h = 0xCBF29CE484222325u;
    for (unsigned char c : text) h = (h ^ c) * 0x100000001B3u;
    return h;
}

inline KnownTemplate recognise_template(std::string_view jinja) {
    std::string text = normalise_template(jinja);
    constexpr std::string_view OPEN = "{{'", CLOSE = "'}}{%endif%}";
    size_t open = text.rfind(OPEN);
    if (open == std::string::npos || !text.ends_with(CLOSE) || open + OPEN.size() + CLOSE.size() > text.size()) return {};
    size_t begin = open + OPEN.size(), length = text.size() - CLOSE.size() - begin;
    std::string prompt = text.substr(begin, length);
    if (prompt.find_first_of("'\\") != std::string::npos) return {};
    text.erase(begin, length);
    switch (fnv1a(text)) {
        case 0xFA843EDF72A44A68u: return {ChatTemplate::V2, prompt};
        case 0xFDADC76FDEBD1414u: return {ChatTemplate::V3, prompt};
        case 0x600924D29AF03729u: return {ChatTemplate::R1, prompt};
        case 0xBE1BC43E96B9FE7Eu: return {ChatTemplate::R1_DISTILL, prompt};
    }
    return {};
}

}  // namespace tokenizer_detail

// =================================================================================================
// 6. The tokenizer
// =================================================================================================

struct Tokenizer {
    int bos = -1, eos = -1;                      // ids, from tokenizer_config.json
    bool add_bos = false;
    ChatTemplate chat_template = ChatTemplate::NONE;

    static Tokenizer load(const std::string& folder) {
        auto tokenizer = tokenizer_detail::read_file(folder + "/tokenizer.json");
        if (!tokenizer) throw TokenizerError(folder + "/tokenizer.json: cannot open");
        std::string config = tokenizer_detail::read_file(folder + "/tokenizer_config.json").value_or("{}");
        std::string jinja = tokenizer_detail::read_file(folder + "/chat_template.jinja").value_or("");
        return parse(*tokenizer, config, folder, jinja);
    }

    static Tokenizer parse(std::string_view tokenizer_json, std::string_view config_json, const std::string& name,
                           std::string_view jinja = {}) {
        Tokenizer t;
        tokenizer_detail::Document model(tokenizer_json, name + "/tokenizer.json");
        t.read_tokenizer(model.root);
        tokenizer_detail::Document config(config_json, name + "/tokenizer_config.json");
        t.read_config(config.root, jinja);
        return t;
    }

    std::vector<int> encode(std::string_view text) const {
        tokenizer_detail::check_utf8(text);
        if (text.size() > size_t(INT32_MAX)) throw TokenizerError("the text is longer than 2 GB");
        std::vector<int> ids;
        auto token = [&](int id) { ids.push_back(id); };
        raw_added_.cut(text, [&](std::string_view gap) {
            std::string composed;
            if (nfc_) gap = composed = tokenizer_detail::to_nfc(gap);
            normalised_added_.cut(gap, [&](std::string_view rest) { encode_plain(rest, ids); }, token);
        }, token);
        return ids;
    }

    std::string decode(std::span<const int> ids) const {
        Utf8Stream stream;
        std::string all;
        for (int id : ids) all += bytes(id);
        std::string out = stream.push(all);
        return out + stream.finish();
    }

    std::string_view bytes(int id) const {
        return id < 0 || id >= vocab_size() ? std::string_view() : std::string_view(tokens_[id].bytes);
    }

    int token_id(std::string_view content) const {
        auto found = by_content_.find(std::string(content));
        return found == by_content_.end() ? -1 : found->second;
    }

    bool is_special(int id) const { return id >= 0 && id < vocab_size() && tokens_[id].special; }
    int vocab_size() const { return int(tokens_.size()); }

    std::string render(const std::vector<Message>& messages, bool add_generation_prompt) const {
        using namespace tokenizer_detail;
        if (chat_template == ChatTemplate::NONE)
            throw TokenizerError("this model has no chat template: use --raw to continue plain text");
        if (chat_template == ChatTemplate::UNKNOWN)
            throw TokenizerError("this model's chat template is not a known one: use --raw and write the prompt yourself");
        std::string out(bytes(bos));
        if (chat_template == ChatTemplate::V2)
            return out + render_v2(messages, bytes(eos)) + (add_generation_prompt ? generation_prompt_ : "");
        Renderer renderer{chat_template};
        out += renderer.run(messages);
        return out + (add_generation_prompt && !renderer.is_tool ? generation_prompt_ : "");
    }

private:
    struct Token {
        std::string bytes;
        bool special = false, exists = false;
    };
    std::vector<Token> tokens_;
    std::unordered_map<std::string, int> by_content_, by_bytes_;
    tokenizer_detail::Bpe bpe_;
    std::vector<tokenizer_detail::Splitter> splitters_;
    tokenizer_detail::AddedTokens raw_added_, normalised_added_;
    bool nfc_ = false, ignore_merges_ = false;
    std::string generation_prompt_;

    void encode_plain(std::string_view text, std::vector<int>& ids) const {
        tokenizer_detail::Pieces pieces{text}, next;
        for (const auto& splitter : splitters_) {
            next.clear();
            for (std::string_view piece : pieces) splitter.split(piece, next);
            pieces.swap(next);
        }
        for (std::string_view piece : pieces) {
            auto whole = ignore_merges_ ? by_bytes_.find(std::string(piece)) : by_bytes_.end();
            if (whole != by_bytes_.end()) ids.push_back(whole->second);
            else bpe_.merge(piece, ids);
        }
    }

    void put(int id, std::string bytes, bool special) {
        if (id >= vocab_size()) tokens_.resize(size_t(id) + 1);
        tokens_[id] = {std::move(bytes), special, true};
    }

    using Json = tokenizer_detail::Json;

    void read_tokenizer(const Json& root) {
        read_vocabulary(root.at("model"));
        read_merges(root.at("model"));
        if (auto normalizer = root.given("normalizer")) read_normalizer(*normalizer);
        read_pre_tokenizer(root.at("pre_tokenizer"));
        if (auto added = root.given("added_tokens")) read_added(*added);
    }

    void read_vocabulary(const Json& model) {
        if (model.type() != "BPE") model.fail("type is not supported");
        simdjson::dom::object vocab;
        Json field = model.at("vocab");
        if (field.value.get(vocab)) field.fail("must be an object");
        for (auto [content, value] : vocab) {
            int id = Json{value, field.where}.id();
            if (id < vocab_size() && tokens_[id].exists) field.fail("id twice");
            if (!by_content_.emplace(content, id).second) field.fail("content twice");
            auto bytes = tokenizer_detail::bytes_of(content);
            if (bytes) by_bytes_[*bytes] = id;
            put(id, bytes ? *bytes : std::string(content), false);
        }
        bpe_.byte_token.fill(-1);
        for (int b = 0; b < 256; b++)
            if (auto found = by_bytes_.find(std::string(1, char(b))); found != by_bytes_.end()) bpe_.byte_token[b] = found->second;
        if (auto ignore = model.given("ignore_merges")) ignore_merges_ = ignore->boolean();
    }

    void read_merges(const Json& model) {
        for (const Json& item : model.at("merges").items()) {
            std::string left, right;
            if (item.value.is_string()) {
                std::string_view s = item.string();
                size_t blank = std::min(s.find(' '), s.size());
                left = s.substr(0, blank), right = s.substr(std::min(blank + 1, s.size()));
            } else {
                auto pair = item.items();
                if (pair.size() != 2) item.fail("must be two tokens");
                left = pair[0].string(), right = pair[1].string();
            }
            tokenizer_detail::Merge m{token_id(left), token_id(right), token_id(left + right)};
            if (m.left < 0 || m.right < 0 || m.result < 0) item.fail("names a token that is not in the vocabulary");
            bpe_.table.merges.push_back(m);
        }
        bpe_.table.build();
    }

    void read_normalizer(const Json& json) {
        if (json.type() == "NFC") nfc_ = true;
        else if (json.type() == "Sequence") for (const Json& item : json.at("normalizers").items()) read_normalizer(item);
        else json.fail("type '" + std::string(json.type()) + "' is not supported");
    }

    void read_pre_tokenizer(const Json& json) {
        std::string_view type = json.type();
        if (type == "Sequence") for (const Json& item : json.at("pretokenizers").items()) read_pre_tokenizer(item);
        else if (type == "Split") splitters_.emplace_back(json.at("pattern").at("Regex").string(), json.at("pattern"));
        else if (type == "Digits") splitters_.emplace_back("\\p{N}", json);
        else if (type != "ByteLevel") json.fail("type '" + std::string(type) + "' is not supported");
    }

    void read_added(const Json& json) {
        for (const Json& item : json.items()) {
            std::string_view content = item.at("content").string();
            int id = item.at("id").id();
            if (content.empty()) item.fail("empty content");
            bool special = item.at("special").boolean() || (content.starts_with("<｜") && content.ends_with("｜>")) ||
                           (content.starts_with("<|") && content.ends_with("|>"));
            put(id, std::string(content), special);
            by_content_[std::string(content)] = id;
            (item.at("normalized").boolean() ? normalised_added_ : raw_added_).add(content, id);
        }
        std::sort(raw_added_.sorted.begin(), raw_added_.sorted.end());
        std::sort(normalised_added_.sorted.begin(), normalised_added_.sorted.end());
    }

    int config_token(const Json& config, std::string_view key) const {
        auto field = config.given(key);
        if (!field) return -1;
        std::string_view content = (field->value.is_object() ? field->at("content") : *field).string();
        int id = token_id(content);
        if (id < 0) field->fail("'" + std::string(content) + "' is not in the vocabulary");
        return id;
    }

    void read_config(const Json& config, std::string_view jinja) {
        bos = config_token(config, "bos_token");
        eos = config_token(config, "eos_token");
        if (auto add = config.given("add_bos_token")) add_bos = add->boolean();
        auto field = config.given("chat_template");
        if (jinja.empty() && field && field->value.is_string()) jinja = field->string();
        if (jinja.empty()) return;
        auto known = tokenizer_detail::recognise_template(jinja);
        chat_template = known.kind, generation_prompt_ = known.generation_prompt;
    }
};
