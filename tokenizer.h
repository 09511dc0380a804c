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
// byte-pair encoders (BPE; Sennrich et al. 2016, Radford et al. 2019). The model's own tokenizer.json says in
// what they differ, and is run here as it stands. What this file does not know it refuses, as a wrong guess
// would give fluent nonsense.
//
// One example on its way, with DeepSeek-V3's file, from "<｜User｜>don't 1234":
//
//     chapter 5   added tokens     [<｜User｜>] "don't 1234"        then NFC, in the files that ask for it
//     chapter 3   Split regexes    "don" "'t" " " "123" "4"       each regex cuts inside every piece so far
//     chapter 4   bytes            a token is a string of bytes, no longer of characters
//     chapter 4   merges           d o n -> do n -> don            the pair with the lowest rank joins first
//     chapter 7   ids              128803, 20385, 1664, 223, 6895, 22
//
// Going back is simple: put the bytes of the ids side by side. Only there do characters matter again, as one
// may be split over two tokens; a stream must hold back the first half (Utf8Stream).
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
// A regex of PCRE2, bounded in time and memory as it may come from a hostile file.
struct Regex {
    std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code{nullptr, pcre2_code_free};
    std::string where;                           // for errors
    Regex(const std::string& pattern, uint32_t options, std::string_view place = "regex") : where(place) {
        std::string text = "(*LF)(*LIMIT_MATCH=100000000)(*LIMIT_HEAP=65536)" + pattern;
        int error;
        size_t at;
        code.reset(pcre2_compile(bytes(text), text.size(), options, &error, &at, nullptr));
        if (!code) throw TokenizerError(where + ": the regex does not compile");
        uint32_t may_be_empty = 0;
        pcre2_pattern_info(code.get(), PCRE2_INFO_MATCHEMPTY, &may_be_empty);
        if (may_be_empty) throw TokenizerError(where + ": the regex matches the empty text");
        pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);          // without a JIT the same, slower
    }
    // The first match that begins there or later. text: valid UTF-8, if the options say UTF.
    std::optional<std::string_view> find(std::string_view text, size_t from) const {
        thread_local const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
            pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
        int count = PCRE2_ERROR_JIT_STACKLIMIT;
        for (uint32_t way : {PCRE2_NO_UTF_CHECK, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT})
            if (count == PCRE2_ERROR_JIT_STACKLIMIT)
                count = pcre2_match(code.get(), bytes(text), text.size(), from, way, data.get(), nullptr);
        if (count == PCRE2_ERROR_NOMATCH) return std::nullopt;
        if (count < 0) throw TokenizerError(where + ": the regex gave up on this text");
        const size_t* ends = pcre2_get_ovector_pointer(data.get());
        return text.substr(ends[0], ends[1] - ends[0]);
    }
    static PCRE2_SPTR bytes(std::string_view s) { return reinterpret_cast<PCRE2_SPTR>(s.data()); }
};

// Calls match(part) for each match that the finder finds and gap(part) for all between, in order.
template <class Finder, class OnMatch, class OnGap>
void cut(std::string_view text, const Finder& finder, OnMatch match, OnGap gap) {
    size_t done = 0;
    while (std::optional<std::string_view> part = finder.find(text, done)) {
        size_t begin = size_t(part->data() - text.data());
        if (begin > done) gap(text.substr(done, begin - done));
        match(*part);
        done = begin + part->size();
    }
    if (done < text.size()) gap(text.substr(done));
}

// A JSON value that knows where it stands, so that each complaint names the file and the field.
struct Json {
    simdjson::dom::element value;
    std::string where;

    [[noreturn]] void fail(const std::string& what) const { throw TokenizerError(where + ": " + what); }
    template <class T>
    T as(const std::string& what) const {
        T out;
        if (value.get(out)) fail("must be " + what);
        return out;
    }
    bool boolean() const { return as<bool>("true or false"); }
    std::string string() const { return std::string(as<std::string_view>("a string")); }       // valid UTF-8
    int id() const {
        auto i = as<int64_t>("an integer");      // the largest published vocabulary has 256 k tokens
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
    static const Regex big(R"("(?:[^"\\]++|\\.)*+"(*SKIP)(*FAIL)|(?<![\d.eE+])\d{19,}(?![\d.eE]))", 0);
    std::string out;
    cut(json, big, [&](auto number) { out.append(number).append("e0"); }, [&](auto rest) { out += rest; });
    return out;
}

struct Document {
    simdjson::dom::parser parser;
    Json root;
    Document(std::string_view text, const std::string& name) : root{{}, name} {
        if (parser.allocate(text.size() + 1, 64)) root.fail("too large");      // 64: depth of nesting
        simdjson::error_code error = parser.parse(text.data(), text.size()).get(root.value);
        if (error == simdjson::NUMBER_ERROR) error = parser.parse(with_exponents(text)).get(root.value);
        if (error) root.fail(std::string("not valid JSON: ") + simdjson::error_message(error));
    }
};

// The whole file, or nothing where there is none.
inline std::optional<std::string> read_file(const std::string& path) {
    std::error_code error;
    std::filesystem::file_status status = std::filesystem::status(path, error);
    if (status.type() == std::filesystem::file_type::not_found) return std::nullopt;
    simdjson::padded_string text;
    if (!std::filesystem::is_regular_file(status) || simdjson::padded_string::load(path).get(text))
        throw TokenizerError(path + ": cannot read");
    return std::string(std::string_view(text));
}

// == 2. UTF-8 =====================================================================================
// The length of what stands at the head of s: n, a character; -n, a part that no continuation can make one;
// 0, a character cut off by the end of s. A broken part is maximal (Unicode 3.9, "substitution of maximal
// subparts"): the longest prefix of some character, or one byte. So do Rust and Python.
inline int utf8_part(std::string_view s) {
    unsigned char lead = s[0], low = 0x80, high = 0xBF;
    if (lead < 0x80) return 1;
    if (lead < 0xC2 || lead > 0xF4) return -1;
    int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (lead == 0xE0) low = 0xA0;                // shorter forms exist below
    if (lead == 0xED) high = 0x9F;               // surrogates above
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;               // beyond U+10FFFF
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
// to both is copied, the few things that have an exact translation get it, and all else is refused: PCRE2's
// \s also matches U+180E, Ruby's $ matches before every line's end, \h is a hexadecimal digit to one and a
// blank to the other, [a[b]] and [a&&b] are sets to one only, (?i:ss) matches ß in one only.

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
    // Where \s+$ fails at the first blank of a run, it fails at the others, and trying them all is quadratic:
    // then a match must begin a run, or where the last one ended (\G).
    std::string out = ruby == "\\s+$" ? "(?:(?<![" + WHITE_SPACE + "])|\\G)" : "";
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

// The byte that a character stands for, or -1.
inline int byte_of(int character) {
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
    while (at < end) {
        utf8proc_int32_t c = -1;
        utf8proc_ssize_t n = utf8proc_iterate(at, end - at, &c);
        if (n < 1 || byte_of(c) < 0) return spelled;
        out += char(byte_of(c));
        at += n;
    }
    return out;
}

// A piece starts as its bytes. A merge names two tokens that, side by side, become a third; its place in the
// file's list is its rank. As long as some neighbours have a merge, the one with the lowest rank is done, the
// leftmost on ties. The textbook's way looks at all pairs for each merge; here a heap holds the possible
// merges and a linked list the tokens. n bytes have at most n - 1 merges, and each offers at most two new
// ones, so the heap sees fewer than 3n: O(n log n).
struct Bpe {
    struct Merge { uint64_t pair = 0; int rank = -1, result = -1; };       // pair: left id << 32 | right id
    std::vector<Merge> merges;                   // a hash table of 2^n places, half of them free: rank -1
    std::array<int, 256> byte_token{};           // id, or -1

    static uint64_t join(int high, int low) { return uint64_t(high) << 32 | uint64_t(low); }
    // The place of a pair's merge, free if it has none.
    size_t place(uint64_t pair) const {
        size_t mask = merges.size() - 1, at = size_t(pair * 0x9E3779B97F4A7C15u >> 32) & mask;
        while (merges[at].rank >= 0 && merges[at].pair != pair) at = (at + 1) & mask;
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
        auto offer = [&](int at) {
            if (Merge m = merge_at(at); m.rank >= 0) heap.push(join(m.rank, at));
        };
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
using Ids = std::unordered_map<std::string, int>;

inline int id_of(const Ids& ids, std::string_view key) {           // or -1
    auto found = ids.find(std::string(key));
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

inline std::string to_nfc(std::string_view text) {
    utf8proc_uint8_t* out = nullptr;
    auto in = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    utf8proc_ssize_t n = utf8proc_map(in, utf8proc_ssize_t(text.size()), &out,
                                      utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(out, std::free);
    if (n < 0) throw TokenizerError(std::string("NFC: ") + utf8proc_errmsg(n));
    return std::string(reinterpret_cast<char*>(out), size_t(n));
}

// == 6. Chat templates ============================================================================
// The model's template turns a chat into one text; it is a program in the language Jinja, in
// tokenizer_config.json. Four of them are written here in C++, byte for byte, oddities included. Which one a
// file has is told by its text; anything else is UNKNOWN, and cannot be rendered.

struct ToolCall { std::string type, name, arguments; };
struct Message {
    std::string role;
    std::optional<std::string> content = {};                      // null where only tools are called
    std::optional<std::vector<ToolCall>> tool_calls = {};         // R1 asks whether the key is there
};

using Messages = std::vector<Message>;
struct Chat { Messages messages; bool add_generation_prompt = false; };

inline Messages messages_of(const Json& list) {
    Messages out;
    for (const Json& json : list.items()) {
        Message& m = out.emplace_back(Message{json.at("role").string()});
        if (auto content = json.find("content")) m.content = content->string();
        auto calls = json.find("tool_calls");
        if (!calls) continue;
        m.tool_calls.emplace();
        for (const Json& call : calls->items()) {
            Json type = call.at("type"), f = call.at("function");
            m.tool_calls->push_back({type.string(), f.at("name").string(), f.at("arguments").string()});
        }
    }
    return out;
}

// [{"role": "user", "content": "..."}, ...]
inline Messages parse_messages(std::string_view json) { return messages_of(Document(json, "messages").root); }

// {"messages": [...], "tools": [...] or null, "add_generation_prompt": true or false}
inline Chat parse_chat(std::string_view json) {
    Document chat(json, "chat");
    if (auto tools = chat.root.find("tools")) tools->items();          // no template reads them
    auto open = chat.root.find("add_generation_prompt");
    return {messages_of(chat.root.at("messages")), open && open->boolean()};
}

inline const std::string& content_of(const Message& m) {
    if (!m.content) throw TokenizerError("a message of role " + json_quote(m.role) + " needs content");
    return *m.content;
}

enum class ChatTemplate : uint64_t { UNKNOWN, V2 = 0xD08BA60B6BF06499u, V3 = 0x6FED5BCA9D6E9565u,
                                     R1 = 0xFB856605D687C970u, R1_DISTILL = 0xBF0AA492FEB521EFu };

inline std::string render_v2(const Messages& messages, std::string_view eos, std::string_view prompt) {
    std::string out;
    for (const Message& m : messages) {
        if (m.role == "user") out += "User: " + content_of(m) + "\n\n";
        if (m.role == "assistant") out += "Assistant: " + content_of(m) + std::string(eos);
        if (m.role == "system") out += content_of(m) + "\n\n";
    }
    return out.append(prompt);
}

// V3, R1 and the distills: one template in three states. It never forgets that a tool was called or has
// answered, so a second round of tools opens unlike the first. R1 keeps the text before the calls and closes
// them once; the others close after each call but the first.
inline std::string render_v3(ChatTemplate kind, const Messages& messages, std::string_view prompt) {
    const bool r1 = kind == ChatTemplate::R1;
    const std::string eos = "<｜end▁of▁sentence｜>", close = "<｜tool▁calls▁end｜>" + eos;
    std::string out, separator;
    for (const Message& m : messages) {
        if (m.role != "system") continue;
        if (kind == ChatTemplate::R1_DISTILL) out.clear();
        else out += std::exchange(separator, "\n\n");
        out += content_of(m);
    }
    bool called = false, answered = false;       // a tool, ever
    bool after_tools = false;                    // the last message was a tool's
    for (const Message& m : messages) {
        if (m.role == "user") {
            out += "<｜User｜>" + content_of(m);
        } else if (m.role == "tool") {
            out += !answered ? "<｜tool▁outputs▁begin｜>" : r1 ? "" : "\n";
            out += "<｜tool▁output▁begin｜>" + content_of(m) + "<｜tool▁output▁end｜>";
            answered = true;
        } else if (m.role == "assistant" && (r1 ? m.tool_calls.has_value() : !m.content)) {
            for (const ToolCall& c : m.tool_calls.value_or(std::vector<ToolCall>())) {
                std::string before = "<｜Assistant｜>" + (r1 ? m.content.value_or("") : "");
                out += (called ? "\n" : before + "<｜tool▁calls▁begin｜>") + "<｜tool▁call▁begin｜>" + c.type +
                       "<｜tool▁sep｜>" + c.name + "\n```json\n" + c.arguments + "\n```<｜tool▁call▁end｜>";
                if (std::exchange(called, true) && !r1) out += close;
            }
            if (r1) out += close;
        } else if (m.role == "assistant") {
            std::string_view text = content_of(m);
            size_t thought = kind == ChatTemplate::V3 || after_tools ? text.npos : text.rfind("</think>");
            out += after_tools ? "<｜tool▁outputs▁end｜>" : "<｜Assistant｜>";
            out.append(text.substr(thought == text.npos ? 0 : thought + 8)).append(eos);
        } else continue;
        after_tools = m.role == "tool";
    }
    return out.append(after_tools ? "<｜tool▁outputs▁end｜>" : prompt);
}

// A Jinja template without what does not change its meaning: blanks between the words of a tag, and \n for a
// newline in a quoted string. Text outside tags stays as it is.
inline std::string normalise_template(std::string_view text) {
    static const Regex tag(R"(\{[{%](?:[^'"%}]|'[^']*+'?+|"[^"]*+"?+|[%}](?!}))*+(?:[%}]})?+)", 0),
        quoted(R"('[^']*+'?+|"[^"]*+"?+)", 0), newline(R"(\\n)", 0), blanks("[ \n]+", 0);
    std::string out;
    auto copy = [&](std::string_view part) { out += part; };
    auto in_quotes = [&](std::string_view part) { cut(part, newline, [&](auto) { out += '\n'; }, copy); };
    auto words = [&](std::string_view part) { cut(part, blanks, [](auto) {}, copy); };
    cut(text, tag, [&](std::string_view part) { cut(part, quoted, in_quotes, words); }, copy);
    return out;
}

// The template's kind, and the text that opens the answer: all four end with {{'...'}}{% endif %}, where ...
// is that text. It differs between releases (the distills' <think> came later), so it is read from the file;
// all before it is told by its hash, FNV-1a, which is the kind's number.
inline std::pair<ChatTemplate, std::string> recognise_template(std::string_view jinja) {
    static const Regex last_string(R"((?<=\{\{')[^'\\]++(?='}}\{%endif%}\z))", 0);
    std::string text = normalise_template(jinja);
    auto prompt = last_string.find(text, 0);
    uint64_t hash = 0xCBF29CE484222325u;
    for (const char* c = text.data(); prompt && c < prompt->data(); c++)
        hash = (hash ^ static_cast<unsigned char>(*c)) * 0x100000001B3u;
    for (auto kind : {ChatTemplate::V2, ChatTemplate::V3, ChatTemplate::R1, ChatTemplate::R1_DISTILL})
        if (prompt && hash == uint64_t(kind)) return {kind, std::string(*prompt)};
    return {ChatTemplate::UNKNOWN, ""};
}

// == 7. The tokenizer =============================================================================
class Tokenizer {
public:
    int bos = -1, eos = -1;                      // ids, from tokenizer_config.json; -1: none
    bool add_bos = false;
    ChatTemplate chat_template = ChatTemplate::UNKNOWN;

    // From a model's folder: tokenizer.json and, if they exist, tokenizer_config.json, chat_template.jinja.
    static Tokenizer load(const std::string& folder) {
        auto tokenizer = read_file(folder + "/tokenizer.json");
        if (!tokenizer) throw TokenizerError(folder + "/tokenizer.json: no such file");
        std::string config = read_file(folder + "/tokenizer_config.json").value_or("{}");
        return parse(*tokenizer, config, folder, read_file(folder + "/chat_template.jinja").value_or(""));
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
        auto plain = [&](std::string_view part) { encode_plain(part, 0, ids); };
        cut(text, raw_added_, added, [&](std::string_view gap) {
            std::string composed = nfc_ ? to_nfc(gap) : "";
            cut(nfc_ ? composed : gap, normalised_added_, added, plain);
        });
        return ids;
    }
    // Special tokens stay; each broken part of the UTF-8 becomes U+FFFD.
    std::string decode(const std::vector<int>& ids) const {
        Utf8Stream stream;
        std::string out;
        for (int id : ids) out += stream.push(bytes(id));
        return out + stream.finish();
    }
    // What a token stands for; nothing for an id that no token has.
    std::string_view bytes(int id) const {
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
        if (chat_template == ChatTemplate::UNKNOWN)
            throw TokenizerError("the model has no chat template that is known here; --raw does without");
        std::string out(bytes(bos)), prompt = add_generation_prompt ? generation_prompt_ : "";
        if (chat_template == ChatTemplate::V2) return out + render_v2(messages, bytes(eos), prompt);
        return out + render_v3(chat_template, messages, prompt);
    }

private:
    std::vector<std::string> tokens_;            // their bytes by id; "" where an id has no token
    std::set<int> special_;
    Ids vocabulary_;                             // by bytes; the added tokens are apart
    AddedTokens raw_added_, normalised_added_;   // the latter are looked for in normalised text
    bool nfc_ = false, ignore_merges_ = false, byte_level_ = false;
    std::vector<Regex> splits_;
    Bpe bpe_;
    std::string generation_prompt_;

    void put(int id, const std::string& bytes) {
        if (id >= vocab_size()) tokens_.resize(size_t(id) + 1);
        tokens_[id] = bytes;
    }
    // Cuts at the regexes from number `depth` on, then merges.
    void encode_plain(std::string_view text, size_t depth, std::vector<int>& ids) const {
        if (depth < splits_.size()) {
            auto deeper = [&](std::string_view part) { encode_plain(part, depth + 1, ids); };
            return cut(text, splits_[depth], deeper, deeper);
        }
        if (text.size() > size_t(INT32_MAX)) throw TokenizerError("the text is longer than 2 GB");
        int whole = ignore_merges_ ? id_of(vocabulary_, text) : -1;
        if (whole >= 0) ids.push_back(whole);
        else bpe_.encode(text, ids);
    }

    void read_tokenizer(const Json& root) {
        Json model = root.at("model"), pre_tokenizer = root.at("pre_tokenizer");
        root.at("decoder").only("type", "\"ByteLevel\"");
        model.only("type", "\"BPE\""), model.only("byte_fallback", "false");
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
            step.only("individual_digits", "true");
            splits_.push_back(compile_ruby("\\p{N}", step));
        } else if (type == "ByteLevel") {
            step.only("add_prefix_space", "false"), step.only("use_regex", "false");
            byte_level_ = true;
        } else if (type == "NFC") nfc_ = true;
        else step.fail("type " + json_quote(type) + " is not supported");
    }
    // A token is special when the file says so or its name does, as V3 leaves <｜User｜> unmarked; but the
    // marks of a thought are for the reader, whatever the file says.
    void read_added(const Json& item) {
        for (auto key : {"single_word", "lstrip", "rstrip"})
            if (item.find(key)) item.only(key, "false");
        std::string content = item.at("content").string();
        int id = item.at("id").id();
        bool normalised = item.at("normalized").boolean(), special = item.at("special").boolean();
        if (content.empty() || content.size() > 256) item.fail("has no content, or more than 256 bytes");
        if (!bytes(id).empty() && bytes(id) != content) item.fail("has the id of another token");
        special |= content.starts_with("<｜") || content.starts_with("<|");
        if (special && content != "<think>" && content != "</think>") special_.insert(id);
        put(id, content);
        if (normalised && nfc_) content = to_nfc(content);
        if (!(normalised ? normalised_added_ : raw_added_).add(content, id)) item.fail("is given twice");
    }
    void read_config(const Json& config, std::string_view jinja) {
        auto token = [&](std::string_view key) {
            auto field = config.find(key);
            if (!field) return -1;
            std::string content = (field->value.is_object() ? field->at("content") : *field).string();
            if (token_id(content) < 0) field->fail(json_quote(content) + " is not in the vocabulary");
            return token_id(content);
        };
        bos = token("bos_token"), eos = token("eos_token");
        if (auto add = config.find("add_bos_token")) add_bos = add->boolean();
        auto field = config.find("chat_template");
        std::string text = field && field->value.is_string() ? field->string() : "";
        auto [kind, prompt] = recognise_template(jinja.empty() ? text : jinja);
        chat_template = kind, generation_prompt_ = prompt;
    }
};

}  // namespace tokenizer_detail
using tokenizer_detail::Tokenizer, tokenizer_detail::Message, tokenizer_detail::ToolCall;
using tokenizer_detail::Chat, tokenizer_detail::ChatTemplate, tokenizer_detail::parse_chat;
using tokenizer_detail::parse_messages, tokenizer_detail::Utf8Stream;
