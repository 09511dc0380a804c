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
// vocabulary, and names each by its place there; going back puts their bytes side by side. DeepSeek's, Qwen's
// and Llama's are byte-level byte-pair encoders (BPE; Sennrich et al. 2016, Radford et al. 2019). How they
// differ the model's own tokenizer.json says, and is run as it stands; what is not known here is refused.
//
// One example on its way, with DeepSeek-V3's file, from "<｜User｜>don't 1234":
//
//     chapter 5   added tokens     [<｜User｜>] "don't 1234"        then NFC, in the files that ask for it
//     chapter 3   Split regexes    "don" "'t" " " "123" "4"       each regex cuts inside every piece so far
//     chapter 4   bytes, merges    d o n -> do n -> don            the pair with the lowest rank joins first
//     chapter 7   ids              128803, 20385, 1664, 223, 6895, 22
//
// Contents: 1 errors, regexes, JSON; 2 UTF-8; 3 cutting; 4 bytes and merges; 5 added tokens, NFC;
//           6 chat templates; 7 the tokenizer.
#pragma once
#define PCRE2_CODE_UNIT_WIDTH 8
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <queue>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>
#include <pcre2.h>
#include <simdjson.h>
#include <utf8proc.h>

// == 1. Errors, regexes, JSON =====================================================================
struct TokenizerError : std::runtime_error { using std::runtime_error::runtime_error; };

// A JSON string, quotes included. utf8: valid UTF-8, which stays as it is.
inline std::string json_quote(std::string_view utf8) {
    const char* hex = "0123456789abcdef";
    std::string out = "\"";
    for (unsigned char c : utf8) {
        if (c == '"' || c == '\\') out.append(1, '\\').append(1, char(c));
        else if (c == '\n') out += "\\n";
        else if (c < 0x20) out.append("\\u00").append(1, hex[c >> 4]).append(1, hex[c & 15]);
        else out += char(c);
    }
    return out + '"';
}

namespace tokenizer_detail {
// Counted wherever time could grow with the square of what a stranger sends, for whoever wants to see.
inline thread_local uint64_t steps = 0;

// A regex of PCRE2, bounded in time and memory as it may come from a hostile file.
struct Regex {
    std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code{nullptr, pcre2_code_free};
    std::string where;                           // for errors
    Regex(const std::string& pattern, uint32_t options, std::string_view place = "regex") : where(place) {
        std::string text = "(*LF)(*LIMIT_HEAP=65536)" + pattern;
        int error;
        size_t at;
        uint32_t may_be_empty = 0;
        code.reset(pcre2_compile(bytes(text), text.size(), options, &error, &at, nullptr));
        if (!code) throw TokenizerError(where + ": the regex does not compile");
        pcre2_pattern_info(code.get(), PCRE2_INFO_MATCHEMPTY, &may_be_empty);
        if (may_be_empty) throw TokenizerError(where + ": the regex matches the empty text");
        pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);          // without a JIT the same, slower
    }
    // The first match that begins there or later. text: valid UTF-8, if the options say UTF. Gives up before
    // `steps` passes `last`. PCRE2 limits the steps at one place and does not tell how many it took: where a
    // few are not enough, place by place is tried alone, with a limit that grows and counts as taken.
    std::optional<std::string_view> find(std::string_view text, size_t at,
                                         uint64_t last = steps + ENOUGH) const {
        constexpr uint32_t FEW = 256;
        std::string_view part;
        int count = match(text, at, 0, FEW, part);
        for (uint64_t limit = FEW; steps++, count == PCRE2_ERROR_MATCHLIMIT && steps + limit <= last;) {
            count = match(text, at, PCRE2_ANCHORED | PCRE2_NO_JIT, uint32_t(limit), part);
            if (count == PCRE2_ERROR_MATCHLIMIT) steps += limit, limit *= 4;
            if (count != PCRE2_ERROR_NOMATCH || at == text.size()) continue;
            do at++; while (at < text.size() && (text[at] & 0xC0) == 0x80);
            limit = FEW, count = PCRE2_ERROR_MATCHLIMIT;
        }
        if (count == PCRE2_ERROR_NOMATCH) return std::nullopt;
        if (count < 0) throw TokenizerError(where + ": the regex gave up on this text");
        return part;
    }
    static constexpr uint64_t ENOUGH = 20'000'000;

private:
    static PCRE2_SPTR bytes(std::string_view s) { return reinterpret_cast<PCRE2_SPTR>(s.data()); }
    int match(std::string_view text, size_t at, uint32_t options, uint32_t limit,
              std::string_view& part) const {
        thread_local const struct Scratch {
            pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
            pcre2_match_context* context = pcre2_match_context_create(nullptr);
            ~Scratch() { pcre2_match_data_free(data), pcre2_match_context_free(context); }
        } mine;
        pcre2_set_match_limit(mine.context, limit);
        int count = pcre2_match(code.get(), bytes(text), text.size(), at, options | PCRE2_NO_UTF_CHECK,
                                mine.data, mine.context);
        const size_t* ends = pcre2_get_ovector_pointer(mine.data);
        if (count >= 0) part = text.substr(ends[0], ends[1] - ends[0]);
        return count == PCRE2_ERROR_JIT_STACKLIMIT ? PCRE2_ERROR_MATCHLIMIT : count;
    }
};

// Calls match(part) for each match that the finder finds and gap(part) for all between, in order.
template <class Finder, class OnMatch, class OnGap, class... Last>
void cut(std::string_view text, const Finder& finder, OnMatch match, OnGap gap, Last... last) {
    size_t done = 0;
    while (std::optional<std::string_view> part = finder.find(text, done, last...)) {
        size_t begin = size_t(part->data() - text.data());
        if (begin > done) gap(text.substr(done, begin - done));
        match(*part), done = begin + part->size();
    }
    if (done < text.size()) gap(text.substr(done));
}

// A JSON value that knows where it stands, so that each complaint names the file and the field.
struct Json {
    simdjson::dom::element value;
    std::string where;
    [[noreturn]] void fail(const std::string& what) const { throw TokenizerError(where + ": " + what); }
    template <class T> T as(const std::string& what) const {
        T out;
        if (value.get(out)) fail("must be " + what);
        return out;
    }
    bool boolean() const { return as<bool>("true or false"); }
    std::string string() const { return std::string(as<std::string_view>("a string")); }       // valid UTF-8
    int id() const {                             // the largest published vocabulary has 256 k tokens
        auto i = as<int64_t>("an integer");
        if (i < 0 || i >= 1 << 20) fail("token id " + std::to_string(i) + " is out of range");
        return int(i);
    }
    std::vector<Json> items() const {
        std::vector<Json> out;
        for (simdjson::dom::element e : as<simdjson::dom::array>("an array"))
            out.push_back({e, where + "[" + std::to_string(out.size()) + "]"});
        return out;
    }
    // The member `key`, unless it is absent or null. Two of that name have no meaning all readers agree on.
    std::optional<Json> find(std::string_view key) const {
        std::optional<Json> found;
        for (auto [name, member] : as<simdjson::dom::object>("an object")) {
            if (name != key) continue;
            if (found) found->fail("is given twice");
            found = Json{member, where + "." + std::string(key)};
        }
        return found && !found->value.is_null() ? found : std::nullopt;
    }
    Json at(std::string_view key) const {
        if (std::optional<Json> member = find(key)) return *member;
        fail("'" + std::string(key) + "' is missing");
    }
    void only(std::string_view key, const std::string& wanted) const {         // wanted: as JSON
        if (Json m = at(key); simdjson::minify(m.value) != wanted) m.fail("must be " + wanted);
    }
};

// "model_max_length": 1000000000000000019884624838656 is in many files; the parser takes such a number with
// an exponent only. So integers of more than 18 digits, outside of strings, get one.
inline std::string with_exponents(std::string_view json) {
    static const Regex big(R"("[^"\\]*+(?:\\.[^"\\]*+)*+"|(?<![\d.eE+])\d{19,}(?![\d.eE]))", 0);
    std::string out;
    cut(json, big, [&](auto part) { out.append(part).append(part[0] == '"' ? "" : "e0"); },
        [&](auto part) { out += part; });
    return out;
}

struct Document {
    simdjson::dom::parser parser;
    Json root;
    Document(std::string_view text, const std::string& name) : root{{}, name} {
        if (text.starts_with("\xEF\xBB\xBF")) root.fail("begins with a byte order mark");
        if (parser.allocate(text.size() + 1, 64)) root.fail("too large");      // 64: depth of nesting
        simdjson::error_code error = parser.parse(text.data(), text.size()).get(root.value);
        if (error == simdjson::NUMBER_ERROR) error = parser.parse(with_exponents(text)).get(root.value);
        if (error) root.fail(std::string("not valid JSON: ") + simdjson::error_message(error));
    }
};

inline std::optional<std::string> read_file(const std::string& path) {         // nothing: no such file
    std::error_code error;
    std::filesystem::file_status status = std::filesystem::status(path, error);
    if (status.type() == std::filesystem::file_type::not_found) return std::nullopt;
    simdjson::padded_string text;
    bool regular = std::filesystem::is_regular_file(status);           // a pipe may never end
    if (regular && std::filesystem::file_size(path, error) > 100'000'000)      // the largest known has 11 MB
        throw TokenizerError(path + ": larger than 100000000 bytes");
    if (!regular || simdjson::padded_string::load(path).get(text))
        throw TokenizerError(path + ": cannot read");
    return std::string(std::string_view(text));
}

// For tables that a file fills. With a known hash a file could name things that all fall into one place, and
// each look would pass all of them; so the seed is another in each run. No result depends on it.
inline const std::array<uint64_t, 2> SEED = {std::random_device()() * 0x9E3779B97F4A7C15u,
                                             std::random_device()() * 0x9E3779B97F4A7C15u | 1};
struct Hash {
    using is_transparent = void;                 // a table of strings can be asked for a string_view
    uint64_t a = SEED[0], b = SEED[1];
    // A product's halves on each other: what two x differ in does not say what their hashes differ in.
    uint64_t operator()(uint64_t x) const {
        uint64_t y = x ^ a, high = y >> 32, low = uint32_t(y), b_high = b >> 32, b_low = uint32_t(b);
        return y * b ^ (high * b_high + (high * b_low >> 32) + (low * b_high >> 32));
    }
    uint64_t operator()(std::string_view s) const {
        uint64_t out = s.size();
        for (unsigned char c : s) out = (*this)(out ^ c);
        return out;
    }
};

// == 2. UTF-8 =====================================================================================
// The length of what stands at the head of s: n, a character; -n, a part that no continuation can make one;
// 0, a character cut off by the end of s. A broken part is maximal (Unicode 3.9, "substitution of maximal
// subparts"): the longest prefix of some character, or one byte. So do Rust and Python.
inline int utf8_part(std::string_view s) {
    unsigned char lead = s[0], low = 0x80, high = 0xBF;
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return -1;
    int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (lead == 0xE0 || lead == 0xF0) low = lead == 0xE0 ? 0xA0 : 0x90;        // shorter forms exist below
    if (lead == 0xED || lead == 0xF4) high = lead == 0xED ? 0x9F : 0x8F;       // surrogates, beyond U+10FFFF
    for (int i = 1; i < length; i++, low = 0x80, high = 0xBF) {
        if (size_t(i) == s.size()) return 0;
        unsigned char c = s[i];
        if (c < low || c > high) return -i;
    }
    return length;
}

// Bytes in, whole characters out; each broken part has become U+FFFD. All answers side by side, finish()
// last, do not depend on how the bytes were cut into calls.
struct Utf8Stream {
    std::string held;                            // at most 3 bytes: the beginning of a character
    std::string push(std::string_view bytes) {
        std::string out, all = std::exchange(held, {}).append(bytes);
        for (std::string_view rest = all; !rest.empty();) {
            int n = utf8_part(rest);
            if (n == 0) return held = rest, out;
            n < 0 ? out.append("\uFFFD") : out.append(rest, 0, n);
            rest.remove_prefix(std::abs(n));
        }
        return out;
    }
    std::string finish() { return std::exchange(held, {}).empty() ? "" : "\uFFFD"; }
};

// == 3. Cutting ===================================================================================
// No token reaches over the end of a word, a number or a run of signs: regexes cut the text there first.
// Those of tokenizer.json are written for Oniguruma with Ruby's syntax; PCRE2 runs them. What means the same
// to both is copied, a few things get an exact translation, all else is refused: PCRE2's \s matches U+180E
// too, Ruby's $ before every line's end, \h is a hexadecimal digit to one and a blank to the other, [a[b]]
// and [a&&b] are sets to one only, (?i:ss) matches ß in one only.

// Unicode's 25 characters of the property White_Space, for use in a class.
inline const std::string WHITE_SPACE =
    "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";

// Compiles Ruby's regex, rewritten element by element.
inline Regex compile_ruby(std::string_view ruby, const Json& field) {
    constexpr uint32_t OPTIONS = PCRE2_UTF | PCRE2_ANCHORED | PCRE2_EXTENDED;      // blanks do not count
    const std::string escape = R"(\\[nrt!-/:-@\[-`{-~])",
        category = R"(\\[pP]\{(?: L[ulmto]? | M[nce]? | N[dlo]? | P[cdseifo]? | S[mcko]? | Z[slp]? )\})";
    struct Rule { bool in_class; Regex element; std::string pcre2; };              // "": stays as it is
    static const Rule rules[] = {
        {false, {escape + "|" + category + R"(
            | [^\\.^$()\[\]{}]                                     # a character, or one of | * + ?
            | \((?![?*]) | \(\?(?: : | <?[=!] | > ) | \)           # groups, looks ahead and back
            | \(\?i:(?! [a-z'|]*(?: f[fil] | s[st] ))[a-z'|]*\)    # letters that fold one to one
            | \{[0-9]+(?: ,[0-9]* )?\}(?![+?])                     # a sign after } has two meanings
            | \[\^?(?!\]) )", OPTIONS}, ""},
        {true, {escape + "|" + category + R"((?!-) | [^\\\[&-] | &(?!&) | -(?!\\[pPs]))", OPTIONS}, ""},
        {false, {R"(\\s)", OPTIONS}, "[" + WHITE_SPACE + "]"}, {true, {R"(\\s(?!-))", OPTIONS}, WHITE_SPACE},
        {false, {R"(\\S)", OPTIONS}, "[^" + WHITE_SPACE + "]"}, {false, {R"(\$)", OPTIONS}, "(?m:$)"}};
    // Where \s+$ fails at the first blank of a run it fails at the others, and what it leaves of a run holds
    // no other match: so a match begins a run, as trying all of its places would be quadratic.
    std::string out = ruby == "\\s+$" ? "(?<![" + WHITE_SPACE + "])" : "";
    bool in_class = false;
    for (std::optional<std::string_view> element; !ruby.empty(); ruby.remove_prefix(element->size())) {
        auto rule = std::find_if(std::begin(rules), std::end(rules), [&](const Rule& r) {
            return r.in_class == in_class && (element = r.element.find(ruby, 0));
        });
        if (rule == std::end(rules)) field.fail("no support for the regex from here on: " + json_quote(ruby));
        out += rule->pcre2.empty() ? *element : rule->pcre2;
        in_class = ruby[0] == '[' || (in_class && ruby[0] != ']');
    }
    return Regex(out, PCRE2_UTF | PCRE2_UCP, field.where);
}

// == 4. Bytes and merges ==========================================================================
// A vocabulary of byte strings must be written down in JSON, which holds characters. GPT-2's way: the 188
// printable characters of Latin-1 stand for their own byte, and the other 68 bytes, in order, are U+0100 and
// on. So a blank is written Ġ (U+0120), and "Ã©" is the two bytes of é.

inline int byte_of(int character) {              // that it stands for, or -1
    auto printable = [](int b) { return (b > 32 && b < 127) || (b > 160 && b != 173); };   // 173: soft hyphen
    if (character < 256) return printable(character) ? character : -1;
    for (int b = 0, other = 256; b < 256; b++)
        if (!printable(b) && other++ == character) return b;
    return -1;
}

// The bytes that `spelled` stands for. A token with a character outside the alphabet, as V3's
// <｜begin▁of▁sentence｜>, stands for its own UTF-8.
inline std::string bytes_of(const std::string& spelled) {
    std::string out;
    auto at = reinterpret_cast<const utf8proc_uint8_t*>(spelled.data()), end = at + spelled.size();
    for (utf8proc_int32_t c; at < end; out += char(byte_of(c))) {
        at += std::max<utf8proc_ssize_t>(utf8proc_iterate(at, end - at, &c), 0);
        if (byte_of(c) < 0) return spelled;      // c: -1 where it is no character
    }
    return out;
}

// A piece starts as its bytes. A merge names two tokens that, side by side, become a third; its place in the
// file's list is its rank. As long as some neighbours have a merge, the one with the lowest rank is done, the
// leftmost on ties. The textbook looks at all pairs for each merge; here a heap holds the possible merges, a
// linked list the tokens. n bytes have at most n - 1 merges, each offers at most two new ones: O(n log n).
struct Bpe {
    struct Merge { uint64_t pair = 0; int rank = -1, result = -1; };       // pair: left id << 32 | right id
    std::vector<Merge> merges;                   // a hash table of 2^n places, half of them free: rank -1
    Hash hash;
    std::array<int, 256> byte_token{};           // id, or -1
    static uint64_t join(int high, int low) { return uint64_t(high) << 32 | uint64_t(low); }
    size_t place(uint64_t pair) const {          // of its merge; a free one if it has none
        size_t mask = merges.size() - 1, at = size_t(hash(pair)) & mask;
        for (; merges[at].rank >= 0 && merges[at].pair != pair; at = (at + 1) & mask) steps++;
        return at;
    }
    // Appends the tokens of `piece` (1 to 2^31 - 1 bytes) to ids.
    void encode(std::string_view piece, std::vector<int>& ids) const {
        struct Symbol { int id, previous, next; };         // a token; its neighbours' places or -1
        thread_local std::vector<Symbol> symbols;          // kept, so that a short piece costs no allocation
        thread_local std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap;
        auto merge_at = [&](int at) {                      // of the token there with its right neighbour
            int next = at < 0 ? -1 : symbols[at].next;
            return next < 0 ? Merge{} : merges[place(join(symbols[at].id, symbols[next].id))];
        };
        auto offer = [&](int at) { if (Merge m = merge_at(at); m.rank >= 0) heap.push(join(m.rank, at)); };
        symbols.clear();
        for (unsigned char byte : piece) {
            int id = byte_token[byte], at = int(symbols.size());
            if (id < 0) throw TokenizerError("the vocabulary has no token for byte " + std::to_string(byte));
            symbols.push_back({id, at - 1, at + 1});
        }
        symbols.back().next = -1;
        for (int at = 0; at < int(symbols.size()); at++) offer(at);
        while (!heap.empty()) {
            int at = int(uint32_t(heap.top())), rank = int(heap.top() >> 32);
            heap.pop();
            Merge m = merge_at(at);
            if (m.rank != rank) continue;                  // one of the two has been merged meanwhile
            Symbol& left = symbols[at];
            left = {m.result, left.previous, std::exchange(symbols[left.next], {-1, -1, -1}).next};
            if (left.next >= 0) symbols[left.next].previous = at;
            offer(at);
            offer(left.previous);
        }
        for (int at = 0; at >= 0; at = symbols[at].next) ids.push_back(symbols[at].id);
    }
};

// == 5. Added tokens, NFC =========================================================================
using Ids = std::unordered_map<std::string, int, Hash, std::equal_to<>>;

inline int id_of(const Ids& ids, std::string_view key) {           // or -1
    auto found = ids.find(key);
    return found == ids.end() ? -1 : found->second;
}

// Tokens that no merge makes. Where text spells some of them, the leftmost is taken, then the longest.
struct AddedTokens {
    Ids ids;
    std::set<size_t, std::greater<>> lengths;    // of their texts
    std::array<bool, 256> may_start{};           // by first byte

    bool add(const std::string& content, int id) {                 // false: it is there already
        lengths.insert(content.size());
        may_start[static_cast<unsigned char>(content[0])] = true;
        return ids.emplace(content, id).second;
    }
    std::optional<std::string_view> find(std::string_view text, size_t from) const {
        for (size_t at = from; at < text.size(); at++) {
            if (!may_start[static_cast<unsigned char>(text[at])]) continue;
            for (size_t n : lengths)
                if (auto part = text.substr(at, n); part.size() == n && id_of(ids, part) >= 0) return part;
        }
        return std::nullopt;
    }
};

// Characters taken apart, marks sorted by class, characters put together. utf8proc_map does the same, but in
// n^2 steps for n marks, and anyone can send a letter with 100,000 of them. Of valid UTF-8 no call can fail.
inline std::string to_nfc(std::string_view text) {
    constexpr auto OPTIONS = utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    auto at = reinterpret_cast<const utf8proc_uint8_t*>(text.data()), end = at + text.size();
    std::vector<utf8proc_int32_t> all;
    for (utf8proc_int32_t c, parts[32]; at < end;) {       // a character has at most 4
        int unused = 0;
        at += utf8proc_iterate(at, end - at, &c);
        all.insert(all.end(), parts, parts + utf8proc_decompose_char(c, parts, 32, OPTIONS, &unused));
    }
    auto mark = [](auto c) { return utf8proc_get_property(c)->combining_class; };      // 0: none
    for (auto i = all.begin(); i != all.end();) {
        auto run = std::find_if(i, all.end(), [&](auto c) { return mark(c) == 0; });
        std::stable_sort(i, run, [&](auto a, auto b) { return steps++, mark(a) < mark(b); });
        i = run == all.end() ? run : run + 1;
    }
    all.push_back(0);                                      // room for the one that ends a string in C
    utf8proc_ssize_t n = utf8proc_reencode(all.data(), utf8proc_ssize_t(all.size() - 1), OPTIONS);
    return std::string(reinterpret_cast<const char*>(all.data()), size_t(n));
}

// == 6. Chat templates ============================================================================
// The model's template turns a chat into one text; it is a program in the language Jinja. Eight of them are
// written here in C++, byte for byte, oddities included. Which one a file has is told by its text.

struct ToolCall { std::string type, name, arguments; };
struct Message {
    std::string role;
    std::optional<std::string> content = {};                      // null where only tools are called
    std::optional<std::vector<ToolCall>> tool_calls = {};         // R1 asks whether the key is there
    bool prefix = false;                                          // V3.1: an answer begun, to go on from
};

using Messages = std::vector<Message>;
inline const std::string& content_of(const Message& m) {
    if (!m.content) throw TokenizerError("a message of role " + json_quote(m.role) + " needs content");
    return *m.content;
}

enum Kind { V2, V2_5, V3, R1, R1_DISTILL, V3_0324, R1_0528, V3_1 };

// hash: FNV-1a of the template's canonical text before the answer's opening; opening: as published last.
struct KnownTemplate { Kind kind; const char* name; uint64_t hash; const char* opening; };
inline constexpr const char* THINK = "<｜Assistant｜><think>\n";
inline constexpr KnownTemplate KNOWN_TEMPLATES[] = {
    {V2, "v2", 0xF0E956185DAE2867u, "Assistant:"}, {V2_5, "v2.5", 0x0B4C9B729BA7E08Cu, "<｜Assistant｜>"},
    {V3, "v3", 0x8A0F3A94C547F1D7u, "<｜Assistant｜>"}, {R1, "r1", 0x75610832181C9DA3u, THINK},
    {R1_DISTILL, "r1-distill", 0x734D9CCB411EBE70u, THINK},
    {V3_0324, "v3-0324", 0x3B39A46A731D12C6u, "<｜Assistant｜>"},
    {R1_0528, "r1-0528", 0x6E0DB10398741579u, "<｜Assistant｜>"},
    {V3_1, "v3.1", 0x2D06FFE45A239D5Fu, "<｜Assistant｜></think>"},
    {V3_1, "v3.1-thinking", 0, "<｜Assistant｜><think>"}};             // V3.1's with thinking=True

inline const std::string USER = "<｜User｜>", ASSISTANT = "<｜Assistant｜>", EOS = "<｜end▁of▁sentence｜>",
    OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>", OUTPUTS_END = "<｜tool▁outputs▁end｜>",
    CALLS_BEGIN = "<｜tool▁calls▁begin｜>", CALLS_END = "<｜tool▁calls▁end｜>" + EOS, SEP = "<｜tool▁sep｜>";

// A blank line between the system messages; but V2.5 and the distills know the last one only.
inline std::string system_of(Kind kind, const Messages& messages) {
    std::string out, between;
    for (const Message& m : messages) {
        if (m.role != "system") continue;
        const std::string& text = content_of(m);
        out = kind == R1_DISTILL || kind == V2_5 ? text : out + std::exchange(between, "\n\n") + text;
    }
    return out;
}

inline std::string render_v2(const Messages& messages, std::string_view eos, std::string_view prompt) {
    std::string out;
    for (const Message& m : messages) {
        if (m.role == "user") out += "User: " + content_of(m) + "\n\n";
        if (m.role == "assistant") out.append("Assistant: ").append(content_of(m)).append(eos);
        if (m.role == "system") out += content_of(m) + "\n\n";
    }
    return out.append(prompt);
}

// All others are one template that grew. Up to R1 it never forgets that a tool was called or has answered, so
// a second round of tools opens unlike the first; R1 keeps the text before the calls and closes them once,
// the others close after each but the first. From V3-0324 on each round begins anew, and the answer's mark
// stands behind the question; V3.1 waits with it for what follows, and spares most brackets around tools.
inline std::string render_v3(const KnownTemplate& t, const Messages& messages, std::string_view prompt) {
    const bool r1 = t.kind == R1, distill = t.kind == R1_DISTILL;
    const bool anew = t.kind >= V3_0324, r1_0528 = t.kind == R1_0528;
    const bool v31 = t.kind == V3_1, thinks = std::string_view(t.opening).ends_with("<think>");
    auto text_of = [&](const ToolCall& c) {
        return v31 ? c.name + SEP + c.arguments
                   : c.type + SEP + c.name + "\n```json\n" + c.arguments + "\n```";
    };
    std::string out = system_of(t.kind, messages);
    bool called = false, answered = false;       // a tool, ever or in this round
    bool after_user = false, after_tool = false;
    for (const Message& m : messages) {
        if (m.role == "user") {
            out += USER + content_of(m) + (anew && !v31 ? ASSISTANT : "");
        } else if (m.role == "tool") {
            out += v31 ? "" : !answered ? OUTPUTS_BEGIN : r1 ? "" : "\n";
            out += "<｜tool▁output▁begin｜>" + content_of(m) + "<｜tool▁output▁end｜>";
            answered = true;
        } else if (m.role == "assistant") {
            const bool calls = r1 || anew ? m.tool_calls.has_value() : !m.content;
            std::string text = calls && !r1_0528 ? m.content.value_or("") : content_of(m);
            const bool cuts = r1_0528 || ((r1 || distill || v31) && !calls && !after_tool);
            size_t thought = !cuts ? text.npos : v31 ? text.find("</think>") : text.rfind("</think>");
            if (thought != text.npos) text.erase(0, thought + 8);
            std::string mark = after_tool && !calls ? OUTPUTS_END : ASSISTANT;
            if (anew) mark = after_tool && !v31 ? OUTPUTS_END : "";
            if (v31 && after_user) mark = ASSISTANT + (thinks && m.prefix && !calls ? "<think>" : "</think>");
            if (anew) out += std::exchange(mark, ""), called = false, answered &= !calls;
            for (const ToolCall& c : calls && m.tool_calls ? *m.tool_calls : std::vector<ToolCall>()) {
                out += !called ? mark + text + CALLS_BEGIN : v31 ? "" : "\n";
                out += "<｜tool▁call▁begin｜>" + text_of(c) + "<｜tool▁call▁end｜>";
                if (std::exchange(called, true) && !r1 && !anew) out += CALLS_END;
            }
            out += !calls ? mark + text + EOS : r1 || anew ? CALLS_END : "";
        } else continue;
        after_user = m.role == "user", after_tool = m.role == "tool";
    }
    if (after_tool) return out.append(v31 ? "" : OUTPUTS_END);
    return !anew || after_user == v31 ? out.append(prompt) : out;
}

inline std::string replaced(std::string_view text, const Regex& regex, std::string_view with) {
    std::string out;
    cut(text, regex, [&](auto) { out += with; }, [&](auto part) { out += part; });
    return out;
}

// A template as Jinja's lexer leaves it, with transformers' settings: without comments and the blanks that
// tags take away ({%- and -%} those beside them, {% those before it in its line, %} a newline). Inside of
// tags, blanks stand between two words only, and strings have single quotes and real newlines.
inline std::string canonical_template(std::string_view jinja) {
    static const struct { Regex regex; const char* with; } PASSES[] = {
        {{"\r\n?", 0}, "\n"}, {{"\n\\z", 0}, ""}, {{R"((?<!\s)\s++(?=\{[{%#]-))", 0}, ""},
        {{R"((?:(?<=\n)|\A)[^\S\n]++(?=\{[%#](?![+-])))", 0}, ""}, {{R"((?<=-[%#}]\})\s++)", 0}, ""},
        {{R"((?<=[%#]\})(?<![+-].\})\n)", 0}, ""}, {{R"((?s)\{#.*?#\})", 0}, ""},
        {{R"((?<=\{[{%])[+-]|[+-](?=[%}]\}))", 0}, ""}};
    static const Regex tag(R"(\{[{%](?:[^'"%}]|'[^']*+'?+|"[^"]*+"?+|[%}](?!}))*+(?:[%}]})?+)", 0),
        quoted(R"('[^']*+'?+|"[^'"]*+"|"[^"]*+"?+)", 0), newline(R"(\\n)", 0), quote("\"", 0),
        blanks(R"(\s++(?!\w)|(?<!\w)\s++)", 0), some("\\s++", 0);
    std::string text(jinja), out;
    for (auto& [regex, with] : PASSES) text = replaced(text, regex, with);
    auto in_quotes = [&](std::string_view part) {
        out += replaced(replaced(part, newline, "\n"), quote, part.find('\'') == part.npos ? "'" : "\"");
    };
    auto words = [&](std::string_view part) { out += replaced(replaced(part, blanks, ""), some, " "); };
    cut(text, tag, [&](std::string_view part) { cut(part, quoted, in_quotes, words); },
        [&](std::string_view part) { out += part; });
    return out;
}

// The known template that renders as this one, or none, and what opens the answer: most end with the tags
// {{'...'}}{%endif%}, where ... is that text, other ones in other releases. All before is told by its hash.
inline std::pair<const KnownTemplate*, std::string> recognise_template(std::string_view jinja) {
    static const Regex last_string(R"((?<=\{\{')[^'\\]++(?='}}\{%endif%}\z))", 0);
    std::string text = jinja.size() < 1 << 15 ? canonical_template(jinja) : "";
    auto opening = last_string.find(text, 0);
    uint64_t hash = 0xCBF29CE484222325u;
    for (const char& c : text)
        if (!opening || &c < opening->data()) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
    for (const KnownTemplate& t : KNOWN_TEMPLATES)
        if (hash == t.hash) return {&t, std::string(opening.value_or(t.opening))};
    return {nullptr, ""};
}

// == 7. The tokenizer =============================================================================
class Tokenizer {
public:
    int bos = -1, eos = -1;                      // ids, from tokenizer_config.json; -1: none
    bool add_bos = false;                        // before a text that no template has made
    std::string chat_template;                   // the file's, in Jinja; "": none

    // From a model's folder: tokenizer.json and, if they exist, tokenizer_config.json, chat_template.jinja.
    static Tokenizer load(const std::string& folder) {
        auto tokenizer = read_file(folder + "/tokenizer.json");
        if (!tokenizer) throw TokenizerError(folder + "/tokenizer.json: no such file");
        return parse(*tokenizer, read_file(folder + "/tokenizer_config.json").value_or("{}"), folder,
                     read_file(folder + "/chat_template.jinja").value_or(""));
    }
    static Tokenizer parse(std::string_view tokenizer_json, std::string_view config_json,
                           const std::string& name, std::string_view jinja = {}) {
        Tokenizer t;
        t.read_tokenizer(Document(tokenizer_json, name + "/tokenizer.json").root);
        t.read_config(Document(config_json, name + "/tokenizer_config.json").root, jinja);
        return t;
    }
    std::vector<int> encode(std::string_view text) const {
        if (!simdjson::validate_utf8(text)) throw TokenizerError("the text is not valid UTF-8");
        std::vector<int> ids;
        auto added = [&](std::string_view token) { ids.push_back(token_id(token)); };
        const uint64_t last = steps + Regex::ENOUGH + 64 * text.size();
        auto plain = [&](std::string_view part) { encode_plain(part, 0, last, ids); };
        cut(text, raw_added_, added, [&](std::string_view gap) {
            std::string composed = nfc_ ? to_nfc(gap) : "";
            cut(nfc_ ? composed : gap, normalised_added_, added, plain);
        });
        return ids;
    }
    // Special tokens stay; each broken part of the UTF-8 becomes U+FFFD.
    std::string decode(const std::vector<int>& ids) const {
        std::string out;
        Utf8Stream stream;
        for (int id : ids) out += stream.push(bytes(id));
        return out + stream.finish();
    }
    std::string_view bytes(int id) const {                   // of a token; none where an id has no token
        return id < 0 || id >= vocab_size() ? std::string_view() : tokens_[id];
    }
    bool is_special(int id) const { return special_.contains(id); }        // a mark for the model, not shown
    int token_id(std::string_view content) const {           // or -1
        for (const Ids* ids : {&raw_added_.ids, &normalised_added_.ids, &vocabulary_})
            if (int id = id_of(*ids, content); id >= 0) return id;
        return -1;
    }
    int vocab_size() const { return int(tokens_.size()); }
    std::string render(const Messages& messages, bool add_generation_prompt) const {
        if (!known_)
            throw TokenizerError("the model's chat template is not known here; --chat-template NAME (" +
                                 template_names() + ") chooses one, --raw does without");
        std::string out, prompt = add_generation_prompt ? opening_ : "";
        for (const Message& m : messages)        // V2.5's template has blanks between two tags
            if (known_->kind == V2_5 && m.role == "system") out.append(8, ' ');
        return out.append(bytes(bos)) + (known_->kind == V2 ? render_v2(messages, bytes(eos), prompt)
                                                            : render_v3(*known_, messages, prompt));
    }
    // As a message of the history, an answer renders to the tokens that the model said. V2 writes a blank
    // behind "Assistant:", where the model has said it itself.
    std::string as_history(std::string answer) const {
        bool twice = known_ && known_->kind == V2 && answer.starts_with(' ');
        return twice ? answer.substr(1) : answer;
    }
    std::string chat_template_name() const { return known_ ? known_->name : "unknown"; }
    void set_chat_template(std::string_view name) {
        for (const KnownTemplate& t : KNOWN_TEMPLATES)
            if (name == t.name) return void((known_ = &t, opening_ = t.opening));
        throw TokenizerError("no chat template " + json_quote(name) + "; there are " + template_names());
    }
    static std::string template_names() {
        std::string out;
        for (const KnownTemplate& t : KNOWN_TEMPLATES) out.append(out.empty() ? "" : ", ").append(t.name);
        return out;
    }

private:
    std::vector<std::string> tokens_;            // their bytes by id; "" where an id has no token
    std::set<int> special_;
    Ids vocabulary_;                             // by bytes; the added tokens are apart
    AddedTokens raw_added_, normalised_added_;   // the latter are looked for in normalised text
    bool nfc_ = false, ignore_merges_ = false, byte_level_ = false;
    std::vector<Regex> splits_;
    Bpe bpe_;
    const KnownTemplate* known_ = nullptr;
    std::string opening_;                        // of an answer

    void put(int id, const std::string& bytes) {
        if (id >= vocab_size()) tokens_.resize(size_t(id) + 1);
        tokens_[id] = bytes;
    }
    // Cuts at the regexes from number `depth` on, then merges. last: see Regex::find.
    void encode_plain(std::string_view text, size_t depth, uint64_t last, std::vector<int>& ids) const {
        if (depth < splits_.size()) {
            auto deeper = [&](std::string_view part) { encode_plain(part, depth + 1, last, ids); };
            return cut(text, splits_[depth], deeper, deeper, last);
        }
        if (text.size() > size_t(INT32_MAX)) throw TokenizerError("the text is longer than 2 GB");
        int whole = ignore_merges_ ? id_of(vocabulary_, text) : -1;
        if (whole >= 0) ids.push_back(whole);
        else bpe_.encode(text, ids);
    }

    void read_tokenizer(const Json& root) {
        Json model = root.at("model"), pre_tokenizer = root.at("pre_tokenizer");
        root.at("decoder").only("type", "\"ByteLevel\"");
        model.only("type", "\"BPE\"");
        if (model.find("byte_fallback")) model.only("byte_fallback", "false");
        for (auto key : {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"})
            if (model.find(key)) model.only(key, "\"\"");
        if (auto ignore = model.find("ignore_merges")) ignore_merges_ = ignore->boolean();
        read_vocabulary(model.at("vocab"));
        read_merges(model.at("merges").items());
        if (auto normalizer = root.find("normalizer")) read_step(*normalizer);
        read_step(pre_tokenizer);
        if (!byte_level_) pre_tokenizer.fail("must end with ByteLevel");
        if (auto added = root.find("added_tokens"))
            for (const Json& item : added->items()) read_added(item);
        if (auto post_processor = root.find("post_processor")) read_post_processor(*post_processor);
    }
    void read_vocabulary(const Json& vocab) {
        for (auto [spelled, value] : vocab.as<simdjson::dom::object>("an object")) {
            Json field{value, vocab.where + "[" + json_quote(spelled) + "]"};
            std::string token = bytes_of(std::string(spelled));
            int id = field.id();
            if (token.empty() || !bytes(id).empty() || !vocabulary_.emplace(token, id).second)
                field.fail("is empty or given twice");
            put(id, token);
        }
        for (int b = 0; b < 256; b++) bpe_.byte_token[b] = id_of(vocabulary_, std::string(1, char(b)));
    }
    void read_merges(const std::vector<Json>& items) {
        bpe_.merges.resize(std::bit_ceil(2 * items.size() + 1));
        for (int rank = 0; rank < int(items.size()); rank++) {
            const Json& item = items[rank];
            std::string text;                    // "left right" or, in newer files, ["left", "right"]
            if (item.value.is_string()) text = item.string();
            else for (const Json& t : item.items()) text += (text.empty() ? "" : " ") + t.string();
            size_t blank = std::min(text.find(' '), text.size());
            std::string a = bytes_of(text.substr(0, blank)), b = bytes_of(text.substr(blank).erase(0, 1));
            int left = id_of(vocabulary_, a), right = id_of(vocabulary_, b), both = id_of(vocabulary_, a + b);
            if (left < 0 || right < 0 || both < 0) item.fail("must be two tokens that make a third");
            Bpe::Merge& merge = bpe_.merges[bpe_.place(Bpe::join(left, right))];
            if (merge.rank >= 0) item.fail("is given twice");
            merge = {Bpe::join(left, right), rank, both};
        }
    }
    // A step on the text's way to the merges: of the normalizer or the pre_tokenizer.
    void read_step(const Json& step) {
        std::string type = step.at("type").string();
        if (byte_level_) step.fail("stands after ByteLevel");
        if (splits_.size() > 99) step.fail("is one regex too many");         // each is a level of recursion
        if (type == "Sequence") {
            auto steps = step.find("normalizers");
            for (const Json& s : (steps ? *steps : step.at("pretokenizers")).items()) read_step(s);
        } else if (type == "Split") {
            step.only("behavior", "\"Isolated\""), step.only("invert", "false");
            Json regex = step.at("pattern").at("Regex");
            splits_.push_back(compile_ruby(regex.string(), regex));
        } else if (type == "Digits") {
            step.only("individual_digits", "true"), splits_.push_back(compile_ruby("\\p{N}", step));
        } else if (type == "ByteLevel") {
            step.only("add_prefix_space", "false"), step.only("use_regex", "false"), byte_level_ = true;
        } else if (type == "NFC") nfc_ = true;
        else step.fail("type " + json_quote(type) + " is not supported");
    }
    // A token is special when the file says so; but the marks of a thought are for the reader.
    void read_added(const Json& item) {
        for (auto key : {"single_word", "lstrip", "rstrip"})
            if (item.find(key)) item.only(key, "false");
        std::string content = item.at("content").string();
        int id = item.at("id").id();
        bool normalised = item.at("normalized").boolean(), special = item.at("special").boolean();
        if (content.empty() || content.size() > 256) item.fail("has no content, or more than 256 bytes");
        if (!bytes(id).empty() && bytes(id) != content) item.fail("has the id of another token");
        if (special && content != "<think>" && content != "</think>") special_.insert(id);
        put(id, content);
        if (normalised && nfc_) content = to_nfc(content);
        if (!(normalised ? normalised_added_ : raw_added_).add(content, id)) item.fail("is given twice");
    }
    // What is put around a plain text: nothing, or a BOS before it.
    void read_post_processor(const Json& step) {
        std::string type = step.at("type").string();
        if (type == "Sequence") for (const Json& s : step.at("processors").items()) read_post_processor(s);
        else if (type == "TemplateProcessing") {
            std::vector<Json> parts = step.at("single").items();
            if (parts.empty() || parts.size() > 2 || !parts.back().find("Sequence"))
                step.fail("asks for more than BOS before a text");
            if (parts.size() == 1) return;
            Json token = parts[0].at("SpecialToken").at("id");
            bos = token_id(token.string()), add_bos = true;
            if (bos < 0) token.fail(json_quote(token.string()) + " is not in the vocabulary");
        } else if (type != "ByteLevel") step.fail("type " + json_quote(type) + " is not supported");
    }
    void read_config(const Json& config, std::string_view jinja) {
        auto token = [&](std::string_view key) {
            auto field = config.find(key);
            if (!field) return -1;
            std::string content = (field->value.is_object() ? field->at("content") : *field).string();
            int id = token_id(content);
            if (id < 0) field->fail(json_quote(content) + " is not in the vocabulary");
            return id;
        };
        int id = token("bos_token");
        if (add_bos && id >= 0 && id != bos) config.at("bos_token").fail("is not tokenizer.json's");
        bos = std::max(bos, id), eos = token("eos_token");
        if (auto add = config.find("add_bos_token")) add_bos |= add->boolean();
        chat_template = jinja.empty() ? template_in(config) : jinja;
        std::tie(known_, opening_) = recognise_template(chat_template);
    }
    // The text of the template, of several named ones the default.
    static std::string template_in(const Json& config) {
        auto text = config.find("chat_template");
        std::vector<Json> named = text && text->value.is_array() ? text->items() : std::vector<Json>();
        for (const Json& item : named) if (item.at("name").string() == "default") text = item.at("template");
        return text && text->value.is_string() ? text->string() : "";
    }
};

}  // namespace tokenizer_detail
using tokenizer_detail::Tokenizer, tokenizer_detail::Message, tokenizer_detail::Messages;
using tokenizer_detail::ToolCall, tokenizer_detail::Utf8Stream;
