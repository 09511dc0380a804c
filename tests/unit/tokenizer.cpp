// tokenizer.h: golden ids and prompts of cut vocabularies, and each part against a second way to say it.
#include "unit.h"

#include <set>

namespace tokenizer_test {

namespace td = tokenizer_detail;
using Ids = std::vector<int>;

const std::string GOLDEN = "tests/golden/tokenizer/";
const char* const NAMES[] = {"deepseek-v2", "deepseek-v3", "deepseek-r1", "r1-distill-qwen",
                             "r1-distill-llama"};

// Did `body` end in a TokenizerError whose one line contains `part`?
testing::AssertionResult is_error(const std::function<void()>& body, const std::string& part) {
    try {
        body();
    } catch (const TokenizerError& e) {
        std::string text = e.what();
        if (text.find(part) == std::string::npos)
            return testing::AssertionFailure() << "'" << text << "' does not name '" << part << "'";
        if (text.find('\n') != std::string::npos)
            return testing::AssertionFailure() << "'" << text << "' is more than one line";
        return testing::AssertionSuccess();
    }
    return testing::AssertionFailure() << "no error; expected a line with '" << part << "'";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
    size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

std::string repeated(const std::string& text, size_t n) {
    std::string out;
    for (size_t i = 0; i < n; i++) out += text;
    return out;
}

std::string file(const std::string& path) { return td::read_file(path).value(); }

// Calls body(line) for each line of a file of JSON lines; says how many there were.
template <class Body>
int each_line(const std::string& path, Body body) {
    std::ifstream in(path);
    int n = 0;
    for (std::string text; std::getline(in, text); n++) {
        SCOPED_TRACE(path + ":" + std::to_string(n + 1));
        td::Document line(text, path);
        body(line.root);
    }
    return n;
}

Ids ids_in(const td::Json& line) {
    Ids ids;
    for (const td::Json& id : line.at("ids").items()) ids.push_back(id.as<int64_t>("an integer"));
    return ids;
}

// -- golden -----------------------------------------------------------------------------------------

int wrong_encodings(const Tokenizer& t, const std::string& name) {
    int wrong = 0;
    each_line(GOLDEN + name + ".jsonl", [&](const td::Json& line) {
        wrong += t.encode(line.at("text").string()) != ids_in(line);
    });
    return wrong;
}

TEST(TokenizerGolden, Encode) {
    for (std::string name : NAMES) {
        Tokenizer t = Tokenizer::load(GOLDEN + name);
        int n = each_line(GOLDEN + name + ".jsonl", [&](const td::Json& line) {
            EXPECT_EQ(t.encode(line.at("text").string()), ids_in(line)) << line.at("tag").string();
        });
        EXPECT_GE(n, 400) << name;
    }
}

TEST(TokenizerGolden, Decode) {
    for (std::string name : NAMES) {
        Tokenizer t = Tokenizer::load(GOLDEN + name);
        int n = each_line(GOLDEN + name + ".decode.jsonl", [&](const td::Json& line) {
            EXPECT_EQ(t.decode(ids_in(line)), line.at("text").string()) << line.at("tag").string();
        });
        EXPECT_GE(n, 100) << name;
    }
}

TEST(TokenizerGolden, Templates) {
    std::map<std::string, Tokenizer> tokenizers;
    for (std::string name : NAMES) tokenizers.emplace(name, Tokenizer::load(GOLDEN + name));
    int n = each_line(GOLDEN + "templates.jsonl", [&](const td::Json& line) {
        const Tokenizer& t = tokenizers.at(line.at("template").string());
        Chat chat = parse_chat(simdjson::minify(line.value));
        std::string prompt = t.render(chat.messages, chat.add_generation_prompt);
        EXPECT_EQ(prompt, line.at("text").string());
        EXPECT_EQ(t.encode(prompt), ids_in(line));
    });
    EXPECT_EQ(n, 201);
}

// What the lines can see: each of these changes makes some of them wrong.
TEST(TokenizerGolden, SeesMistakes) {
    struct Mistake { const char *name, *from, *to; };
    const Mistake mistakes[] = {
        {"r1-distill-llama", "\"ignore_merges\":true", "\"ignore_merges\":false"},
        {"r1-distill-qwen", "{\"type\":\"NFC\"}", "null"},
        {"deepseek-v3", R"(\\p{N}{1,3})", R"(\\p{N}{1,2})"},
        {"deepseek-v3", R"(|\\s+(?!\\S)|)", "|"},
        {"deepseek-v2", R"("\\s?[A-Za-z)", R"("[A-Za-z)"},
        {"deepseek-r1", "\"content\":\"<think>\"", "\"content\":\"<thinks>\""},
        {"deepseek-v2", "\"content\":\"ü\"", "\"content\":\"üü\""}};
    for (const Mistake& m : mistakes) {
        std::string json = replaced(file(GOLDEN + m.name + "/tokenizer.json"), m.from, m.to);
        EXPECT_GT(wrong_encodings(Tokenizer::parse(json, "{}", m.name), m.name), 0) << m.name << m.from;
    }
}

TEST(TokenizerGolden, SeesTheOrderOfMerges) {
    std::string json = file(GOLDEN + "deepseek-v3/tokenizer.json"), open = "\"merges\":[\"";
    size_t begin = json.find(open) + open.size(), end = json.rfind("\"]");
    std::string list = json.substr(begin, end - begin), backwards;
    for (size_t at; (at = list.rfind("\",\"")) != std::string::npos; list.resize(at))
        backwards += list.substr(at + 3) + "\",\"";
    json.replace(begin, end - begin, backwards + list);
    EXPECT_GT(wrong_encodings(Tokenizer::parse(json, "{}", "backwards"), "deepseek-v3"), 100);
}

// -- UTF-8 ------------------------------------------------------------------------------------------

const std::string FFFD = "\xEF\xBF\xBD";

// Cuts at two places, and into single bytes.
void expect_decoded(const std::string& bytes, const std::string& text) {
    auto decoded = [](std::initializer_list<std::string> parts) {
        Utf8Stream stream;
        std::string out;
        for (const std::string& part : parts) out += stream.push(part);
        return out + stream.finish();
    };
    for (size_t i = 0; i <= bytes.size(); i++)
        for (size_t j = i; j <= bytes.size(); j++)
            ASSERT_EQ(decoded({bytes.substr(0, i), bytes.substr(i, j - i), bytes.substr(j)}), text)
                << i << ' ' << j;
    Utf8Stream stream;
    std::string out;
    for (char c : bytes) out += stream.push({&c, 1});
    EXPECT_EQ(out + stream.finish(), text);
}

TEST(TokenizerUtf8, AnswerDoesNotDependOnTheCuts) {
    std::string text = "a\xC3\xA9 \xE4\xB8\xAD\xE6\x96\x87 \xF0\x9F\x98\x80\xF4\x8F\xBF\xBF\xED\x9F\xBF.";
    expect_decoded(text, text);
    expect_decoded("", "");
    // Unicode 15, table 3-8 and the examples after it.
    expect_decoded("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64",
                   "a" + repeated(FFFD, 3) + "b" + FFFD + "c" + repeated(FFFD, 2) + "d");
    expect_decoded("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", repeated(FFFD, 8) + "A");       // overlong
    expect_decoded("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", repeated(FFFD, 8) + "A");       // surrogates
    expect_decoded("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", repeated(FFFD, 5) + "A" + repeated(FFFD, 2) + "B");
    expect_decoded("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", repeated(FFFD, 4) + "A");       // cut off
    expect_decoded("a\xF0\x9F\x98", "a" + FFFD);
}

TEST(TokenizerUtf8, HoldsBackAndLetsGo) {
    Utf8Stream stream;
    EXPECT_EQ(stream.push("x\xE4"), "x");
    EXPECT_EQ(stream.push("\xB8"), "");
    EXPECT_EQ(stream.push(""), "");
    EXPECT_EQ(stream.push("\xADy"), "\xE4\xB8\xADy");
    EXPECT_EQ(stream.push("\xF0\x9F"), "");
    EXPECT_EQ(stream.push("z"), FFFD + "z");                      // no character can come of it any more
    EXPECT_EQ(stream.push("\xF0\x9F"), "");
    EXPECT_EQ(stream.finish(), FFFD);
    EXPECT_EQ(stream.finish(), "");                               // as new
    EXPECT_EQ(stream.push("a"), "a");
}

// Whether s is the beginning of a character, or one, as simdjson's validator says. Each condition on a
// following byte begins or ends at one of these six.
bool begins_character(const std::string& s) {
    static const std::string ends = "\x80\x8F\x90\x9F\xA0\xBF";
    if (simdjson::validate_utf8(s.data(), s.size())) return s.size() == 1 || (s[0] & 0x80);
    if (s.size() >= 4 || !(s[0] & 0x80)) return false;
    return std::any_of(ends.begin(), ends.end(), [&](char c) { return begins_character(s + c); });
}

TEST(TokenizerUtf8, PartsAreMaximal) {
    for (int pair = 0; pair < 1 << 16; pair++) {
        std::string s = {char(pair >> 8), char(pair & 255), 'a'};
        int n = td::utf8_part(s);
        bool long_one = (s[0] & 0x80) && begins_character(s.substr(0, 1));
        bool two = long_one && begins_character(s.substr(0, 2));
        bool whole = simdjson::validate_utf8(s.data(), size_t(std::abs(n)));
        ASSERT_EQ(std::abs(n), two ? 2 : 1) << pair;
        ASSERT_EQ(n > 0, whole) << pair;
        int cut = td::utf8_part(std::string_view(s).substr(0, 2));
        ASSERT_EQ(cut == 0, two && !whole) << pair;
    }
}

TEST(TokenizerUtf8, TextMustBeValid) {
    Tokenizer t = Tokenizer::load("weights/tiny");
    for (std::string text : {"\xFF", "a\xC3", "\xED\xA0\x80"})
        EXPECT_TRUE(is_error([&] { t.encode(text); }, "not valid UTF-8"));
}

TEST(TokenizerJson, QuotedStringsAreReadBack) {
    std::string all;
    for (int c = 0; c < 128; c++) all += char(c);
    all += "\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80";
    std::string json = "[" + json_quote(all) + "]";
    EXPECT_EQ(td::Document(json, "x").root.items()[0].string(), all);
    EXPECT_EQ(json_quote("a\"b\\\n\x01"), R"("a\"b\\\n\u0001")");
}

TEST(TokenizerJson, IntegersOfAnySizeAreNumbers) {
    auto number = [](const std::string& json) {
        return td::Document("{\"s\": \"\\\" 10000000000000000000000\", \"n\": " + json + "}", "x")
            .root.at("n").as<double>("a number");
    };
    EXPECT_EQ(number("1000000000000000019884624838656"), 1000000000000000019884624838656.0);
    EXPECT_EQ(number("-1000000000000000019884624838656"), -1000000000000000019884624838656.0);
    EXPECT_EQ(number("100000000000000000000.5"), 100000000000000000000.5);
    EXPECT_EQ(number("100000000000000000000e-2"), 1e18);
    EXPECT_EQ(td::with_exponents(R"({"a\"12345678901234567890": 12345678901234567890})"),
              R"({"a\"12345678901234567890": 12345678901234567890e0})");
    EXPECT_EQ(td::with_exponents("[1e+00000000000000000001]"), "[1e+00000000000000000001]");
    EXPECT_TRUE(is_error([&] { number("10000000000000000000000x"); }, "x: not valid JSON"));
}

// -- regexes ----------------------------------------------------------------------------------------

td::Json regex_field() {
    static td::Document document("\"\"", "field");
    return document.root;
}

// The pieces, with a bar between them.
std::string pieces(const std::string& ruby, const std::string& text) {
    std::string out;
    auto add = [&](std::string_view part) { out += (out.empty() ? "" : "|") + std::string(part); };
    td::cut(text, td::compile_ruby(ruby, regex_field()), add, add);
    return out;
}

TEST(TokenizerRegex, Accepted) {
    EXPECT_EQ(pieces("b", "abba"), "a|b|b|a");
    EXPECT_EQ(pieces("[ab]+|c", "abcxcab"), "ab|c|x|c|ab");
    EXPECT_EQ(pieces("\\s", "a b\xC2\x85" "c\xE2\x80\xA8" "d\xE3\x80\x80" "e\te"),
              "a| |b|\xC2\x85|c|\xE2\x80\xA8|d|\xE3\x80\x80|e|\t|e");
    EXPECT_EQ(pieces("\\s", "a\xE1\xA0\x8E" "b\xE2\x80\x8B" "c\x1C" "d\xEF\xBB\xBF"),    // no white space
              "a\xE1\xA0\x8E" "b\xE2\x80\x8B" "c\x1C" "d\xEF\xBB\xBF");
    EXPECT_EQ(pieces("\\S+", "ab  c\xE1\xA0\x8E"), "ab|  |c\xE1\xA0\x8E");
    EXPECT_EQ(pieces("[^\\s]+", "ab c"), "ab| |c");
    EXPECT_EQ(pieces("[x\\s]", "ax b"), "a|x| |b");
    EXPECT_EQ(pieces("a$", "a\naa"), "a|\na|a");                  // before each line's end
    EXPECT_EQ(pieces("\\s+$", "a  \n b  "), "a|  |\n b|  ");
    EXPECT_EQ(pieces("\\s+$", "a \n\n"), "a| \n\n");
    EXPECT_EQ(pieces("(?i:'s|'ll)", "a'Sb'LL'\xC5\xBF"), "a|'S|b|'LL|'\xC5\xBF");
    EXPECT_EQ(pieces("\\p{Lu}", "aB\xC3\x89"), "a|B|\xC3\x89");
    EXPECT_EQ(pieces("[^\\P{L}a]", "ab1c"), "a|b|1|c");
    EXPECT_EQ(pieces("\\p{N}{1,3}", "1234\xC2\xB2"), "123|4\xC2\xB2");
    EXPECT_EQ(pieces("a{2}b{2,}", "aabbbab"), "aabbb|ab");
    EXPECT_EQ(pieces("[\\]\\[\\\\\\-x-z^]", "a]b[c\\d-ey^"), "a|]|b|[|c|\\|d|-|e|y|^");
    EXPECT_EQ(pieces("[a-]", "a-b"), "a|-|b");
    EXPECT_EQ(pieces("[&]", "a&b"), "a|&|b");
    EXPECT_EQ(pieces("(?:a|b)(?=c)|(?<=x)y|(?<!x)z|(?!q)q*w|(?>e)", "acxyzw"), "a|cx|y|z|w");
    EXPECT_EQ(pieces("(a)+?b*+c?", "aaabbc"), "a|a|abbc");
    EXPECT_EQ(pieces("\\n|\\r|\\t|\\.|\\#| ", "a\nb.c# "), "a|\n|b|.|c|#| ");
    EXPECT_EQ(pieces("\xE4\xB8\x80|[\xE4\xB8\x81-\xE9\xBE\xA5]+", "a\xE4\xB8\x80\xE4\xB8\xAD\xE6\x96\x87"),
              "a|\xE4\xB8\x80|\xE4\xB8\xAD\xE6\x96\x87");
}

TEST(TokenizerRegex, Refused) {
    for (const char* ruby : {"\\a", "\\e", "\\f", "\\v", "[\\t-\\s]", "[\\a]",
                             ".", "a.b", "^a", "\\d", "\\w", "\\h", "\\b", "\\A", "\\z", "\\G", "\\K",
                             "\\R", "\\X", "\\x41", "\\u0041", "\\1", "\\k<a>", "\\Qa\\E", "\\", "a\\",
                             "[\\d]", "[\\S]", "[\\", "[[:alpha:]]", "[a[b]]", "[a&&b]", "[]a]", "[]",
                             "[^]", "[^]a]", "[a", "a]", "[z-a]", "[\\s-a]", "[a-\\s]", "[\\p{L}-a]",
                             "[a-\\p{L}]", "\\pL", "\\p{Han}", "\\p{^L}", "\\p{Lx}", "\\p{L", "\\p{}",
                             "a{2}+", "a{2}?", "a{,2}", "a{", "a{b}", "a{2", "{2}", "}", "a{3,1}",
                             "a{65536}", "(?i:ss)", "(?i:ab|fi)", "(?i:S)", "(?i:a*)", "(?i)a", "(?i:",
                             "(?m:a)", "(?x:a)", "(?<n>a)", "(?P<n>a)", "(?'n'a)", "(?#c)a", "(?R)", "(?1)",
                             "(?C)a", "(?~a)", "(?(1)a)", "(?|a)", "(*ACCEPT)a", "(*UTF)a", "(a", "a)",
                             "(?<=a+)b", "*a", "a**", "", "a*", "a?", "(?=a)", "a|", "(?:)", "$"})
        EXPECT_TRUE(is_error([&] { td::compile_ruby(ruby, regex_field()); }, "field: ")) << ruby;
}

TEST(TokenizerRegex, OneThatBacktracksWithoutEndGivesUp) {
    td::Regex regex = td::compile_ruby("(?:a|aa|a?a)+[bc]", regex_field());
    EXPECT_TRUE(is_error([&] { regex.find(repeated("a", 500) + "d" + "b", 0); }, "field: the regex gave up"));
}

// What body() counts.
uint64_t steps_of(const std::function<void()>& body) {
    uint64_t before = td::steps;
    body();
    return td::steps - before;
}

// The steps of one text are bounded together: a regex that is just not too slow at each of many places ends
// there, and no sooner than one that does as much at one place.
TEST(TokenizerRegex, StepsAreBoundedOnATextNotOnAMatch) {
    td::Regex regex = td::compile_ruby("(?:a|aa|a?a)+[bc]", regex_field());
    const std::string hard = repeated("a", 8) + "d";
    auto search = [&](int n) {
        td::cut(repeated(hard, size_t(n)) + "ab", regex, [](auto) {}, [](auto) {}, td::steps + 5'000'000);
    };
    uint64_t few = steps_of([&] { search(2); }), more = steps_of([&] { search(8); });
    EXPECT_GT(few, 10'000u);
    EXPECT_NEAR(double(more), 4.0 * double(few), double(few));
    EXPECT_TRUE(is_error([&] { search(4000); }, "field: the regex gave up"));
    EXPECT_LT(steps_of([&] { EXPECT_ANY_THROW(search(4000)); }), 5'000'001u);
    std::string v3 = file(GOLDEN + "deepseek-v3/tokenizer.json");
    std::string json = replaced(v3, R"(\\p{N}{1,3})", "(?:1|11|1?1)+[23]");
    Tokenizer t = Tokenizer::parse(json, "{}", "hostile");
    EXPECT_TRUE(is_error([&] { t.encode(repeated(repeated("1", 12) + "4", 300)); }, "the regex gave up"));
}

// A hard place that is far, a match there, places that are easy again: as without limits.
TEST(TokenizerRegex, PlaceByPlaceFindsTheSame) {
    std::string ab = repeated("ab", 3000), text = repeated("x\xC3\xA9", 1000) + ab + "c" + ab + "yab";
    std::string found;
    auto add = [&](std::string_view part) { found += std::to_string(part.size()) + " "; };
    td::cut(text, td::compile_ruby("(?:a|b)+", regex_field()), add, [](auto) {});
    EXPECT_EQ(found, "6000 6000 2 ");
    EXPECT_EQ(td::compile_ruby("(?:a|b)+z", regex_field()).find(text, 0), std::nullopt);
}

// The published regexes never need more than the few steps of a first try: one for each piece.
TEST(TokenizerRegex, PublishedOnesAreNearLinear) {
    for (std::string name : NAMES) {
        Tokenizer t = Tokenizer::load(GOLDEN + name);
        std::string text;
        each_line(GOLDEN + name + ".jsonl", [&](const td::Json& line) { text += line.at("text").string(); });
        uint64_t once = steps_of([&] { t.encode(text); });
        uint64_t four = steps_of([&] { t.encode(repeated(text, 4)); });
        EXPECT_LT(once, 16 * text.size()) << name;
        EXPECT_LT(four, 5 * once) << name;
    }
}

TEST(TokenizerRegex, GroupsThatNeedMuchStack) {
    std::string text = repeated("ab", 20000);
    EXPECT_EQ(td::compile_ruby("(?:a|b)+", regex_field()).find(text, 0)->size(), text.size());
}

// -- bytes and merges -------------------------------------------------------------------------------

TEST(TokenizerBytes, EachByteHasACharacter) {
    std::set<int> characters;
    for (int c = -1; c < 0x110000; c++)
        if (td::byte_of(c) >= 0) characters.insert(td::byte_of(c) << 21 | c);
    ASSERT_EQ(characters.size(), 256u);
    int byte = 0;
    for (int pair : characters) EXPECT_EQ(pair >> 21, byte++);    // each byte once
    EXPECT_EQ(td::byte_of('!'), '!');
    EXPECT_EQ(td::byte_of(0x120), ' ');                           // Ġ
    EXPECT_EQ(td::byte_of(0x10A), '\n');                          // Ċ
    EXPECT_EQ(td::byte_of(0x143), 173);
    EXPECT_EQ(td::bytes_of("\xC4\xA0\xC3\x83\xC2\xA9"), " \xC3\xA9");              // ĠÃ©
    EXPECT_EQ(td::bytes_of("<\xEF\xBD\x9C>"), "<\xEF\xBD\x9C>");
    EXPECT_EQ(td::bytes_of("a b"), "a b");                        // a blank is no character of the alphabet
    EXPECT_EQ(td::bytes_of(""), "");
}

struct RandomBpe {
    td::Bpe bpe;
    std::vector<std::array<int, 3>> merges;      // left, right, result; by rank

    // Tokens over a small alphabet, each made of two earlier ones, merges in any order of rank.
    RandomBpe(Noise& noise, int letters, int n, td::Hash hash = {}) {
        bpe.hash = hash;
        std::vector<std::string> tokens;
        std::map<std::string, int> ids;
        auto add = [&](const std::string& token) {
            if (ids.emplace(token, int(tokens.size())).second) tokens.push_back(token);
            return ids.at(token);
        };
        bpe.byte_token.fill(-1);
        for (int i = 0; i < letters; i++) bpe.byte_token[size_t('a' + i)] = add({char('a' + i)});
        std::set<std::pair<int, int>> seen;
        for (int i = 0; i < n; i++) {
            int left = noise.below(int(tokens.size())), right = noise.below(int(tokens.size()));
            if (!seen.insert({left, right}).second) continue;
            merges.push_back({left, right, add(tokens[size_t(left)] + tokens[size_t(right)])});
        }
        for (size_t i = merges.size(); i > 1; i--)
            std::swap(merges[i - 1], merges[size_t(noise.below(int(i)))]);
        bpe.merges.resize(std::bit_ceil(2 * merges.size() + 1));
        for (size_t rank = 0; rank < merges.size(); rank++) {
            uint64_t pair = td::Bpe::join(merges[rank][0], merges[rank][1]);
            bpe.merges[bpe.place(pair)] = {pair, int(rank), merges[rank][2]};
        }
    }
    // Rank by rank over all pairs, from the left, again and again: the definition.
    Ids textbook(const std::string& piece) const {
        Ids ids;
        for (unsigned char c : piece) ids.push_back(bpe.byte_token[c]);
        for (size_t rank = 0; rank < merges.size();) {
            size_t i = 0;
            while (i + 1 < ids.size() && (ids[i] != merges[rank][0] || ids[i + 1] != merges[rank][1])) i++;
            if (i + 1 >= ids.size()) {
                rank++;
                continue;
            }
            ids[i] = merges[rank][2];
            ids.erase(ids.begin() + long(i) + 1);
            rank = 0;
        }
        return ids;
    }
};

TEST(TokenizerMerges, AsTheTextbookSays) {
    Noise noise;
    for (int round = 0; round < 60; round++) {
        int letters = 1 + noise.below(4);
        RandomBpe random(noise, letters, 1 + noise.below(60));
        for (int i = 0; i < 40; i++) {
            std::string piece;
            for (int n = 1 + noise.below(70); n > 0; n--) piece += char('a' + noise.below(letters));
            Ids ids;
            random.bpe.encode(piece, ids);
            ASSERT_EQ(ids, random.textbook(piece)) << piece;
        }
    }
}

TEST(TokenizerMerges, AByteWithoutATokenIsNamed) {
    Noise noise;
    RandomBpe random(noise, 2, 3);
    Ids ids;
    EXPECT_TRUE(is_error([&] { random.bpe.encode("aza", ids); }, "no token for byte 122"));
    random.bpe.encode("ab", ids);                                 // and nothing of it is left behind
    EXPECT_EQ(ids, random.textbook("ab"));
}

// Merges that fall into one place for a hash that is known, here a product's middle bits. Not for ours, and
// whatever the seed is, the ids are the same.
TEST(TokenizerMerges, CannotBeMadeToCollide) {
    constexpr int N = 20000;
    std::vector<uint64_t> pairs;
    for (uint64_t pair = 1; pairs.size() < N; pair++)
        if ((pair * 0x9E3779B97F4A7C15u >> 32 & 0xFF) == 0) pairs.push_back(pair);
    td::Bpe bpe;
    bpe.merges.resize(std::bit_ceil(size_t(2 * N + 1)));
    auto fill = [&] { for (uint64_t pair : pairs) bpe.merges[bpe.place(pair)] = {pair, 1, 1}; };
    EXPECT_LT(steps_of(fill), 4u * N);
    std::set<uint64_t> words;
    for (int i = 0; i < N; i++) words.insert(td::Hash()(std::to_string(i)) & 0xFFFFF);
    EXPECT_GT(words.size(), size_t(N) * 97 / 100);
    for (uint64_t seed = 1; seed < 2000; seed += 500) {
        Noise noise;
        RandomBpe random(noise, 3, 60, {seed, seed * 77 | 1});
        Ids ids;
        random.bpe.encode("abcabccbaabbccaabbcc", ids);
        EXPECT_EQ(ids, random.textbook("abcabccbaabbccaabbcc"));
    }
}

// The textbook's way would need about 1e12 steps for each of these, and so would a regex that is quadratic.
TEST(TokenizerMerges, LongRunsEnd) {
    for (std::string name : {"deepseek-v2", "deepseek-v3", "r1-distill-qwen"}) {
        Tokenizer t = Tokenizer::load(GOLDEN + name);
        for (std::string text : {repeated("a", 1000000), repeated(" ", 1000000) + "\xE4\xB8\xAD"})
            EXPECT_EQ(t.decode(t.encode(text)), text) << name;
    }
}

// -- a small tokenizer ------------------------------------------------------------------------------

const std::string SMALL = R"({
    "normalizer": {"type": "Sequence", "normalizers": []},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": false},
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "added_tokens": [
        {"id": 10, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false, "special": true},
        {"id": 11, "content": "</think>", "normalized": false, "special": true},
        {"id": 12, "content": "<x>>", "normalized": false, "special": false},
        {"id": 13, "content": ">a", "normalized": true, "special": false},
        {"id": 14, "content": "<|y|>", "normalized": false, "special": false}],
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "<": 6, ">": 7, "1": 8, "Ġ": 9,
                  "Ì": 15, "ģ": 16, "Ã": 17, "¡": 18, "Ã¡": 19},
        "merges": ["b c", ["a", "b"], "Ã ¡"]}
})";

Tokenizer small(const std::string& from = "\"BPE\"", const std::string& to = "\"BPE\"") {
    return Tokenizer::parse(replaced(SMALL, from, to), "{}", "small");
}

TEST(TokenizerSmall, RanksNotLengths) {
    EXPECT_EQ(small().encode("abc"), (Ids{0, 4}));
    EXPECT_EQ(small().encode("ab"), (Ids{3}));
    EXPECT_EQ(small().encode("ab11 ab"), (Ids{3, 8, 8, 9, 3}));
    EXPECT_EQ(small().encode(""), Ids());
}

TEST(TokenizerSmall, IgnoreMergesTakesWholePieces) {
    Tokenizer t = small("\"ignore_merges\": false", "\"ignore_merges\": true");
    EXPECT_EQ(t.encode("abc"), (Ids{5}));
    EXPECT_EQ(t.encode("abca"), (Ids{0, 4, 0}));                  // not in the vocabulary as a whole
}

TEST(TokenizerSmall, AddedTokens) {
    Tokenizer t = small();
    EXPECT_EQ(t.encode("a<x>b"), (Ids{0, 10, 1}));
    EXPECT_EQ(t.encode("<x>>"), (Ids{12}));                       // the longest
    EXPECT_EQ(t.encode("<<x>"), (Ids{6, 10}));
    EXPECT_EQ(t.encode("1<<x>><"), (Ids{8, 6, 12, 6}));
    EXPECT_EQ(t.encode(">a"), (Ids{13}));
    EXPECT_EQ(t.encode("<x>a"), (Ids{10, 0}));                    // raw tokens come first, >a is too late
    EXPECT_EQ(t.encode("<x>>a"), (Ids{12, 0}));
    EXPECT_EQ(t.token_id("<x>"), 10);
    EXPECT_EQ(t.token_id("abc"), 5);
    EXPECT_EQ(t.token_id("nobody"), -1);
    EXPECT_EQ(t.vocab_size(), 20);
}

TEST(TokenizerSmall, WhatIsShown) {
    Tokenizer t = small();
    EXPECT_TRUE(t.is_special(10));
    EXPECT_FALSE(t.is_special(11));                               // </think>, though the file says special
    EXPECT_FALSE(t.is_special(12));
    EXPECT_FALSE(t.is_special(14));                               // <|y|>, as the file says
    for (int id : {-1, 0, 20, 1 << 30}) EXPECT_FALSE(t.is_special(id));
}

// As decode(skip_special_tokens=True) of transformers 5.24 shows or hides them: by the file's flag alone.
// Think marks are shown whatever it says.
TEST(TokenizerSmall, SpecialIsWhatTheFileCallsSpecial) {
    struct Case { const char *name, *token; bool special; };
    for (const Case& c : {Case{"deepseek-v2", "<｜begin▁of▁sentence｜>", true}, Case{"deepseek-v2", "ø", false},
                          Case{"deepseek-v3", "<｜end▁of▁sentence｜>", true},
                          Case{"deepseek-v3", "<｜User｜>", false},
                          Case{"deepseek-v3", "<｜place▁holder▁no▁0｜>", true},
                          Case{"deepseek-v3", "<｜tool▁calls▁begin｜>", false},
                          Case{"deepseek-v3", "<｜tool▁output▁end｜>", false},
                          Case{"deepseek-r1", "<think>", false}, Case{"deepseek-r1", "<｜tool▁sep｜>", false},
                          Case{"r1-distill-qwen", "<|vision_start|>", true},
                          Case{"r1-distill-qwen", "<|fim_prefix|>", false},
                          Case{"r1-distill-llama", "<|eot_id|>", true},
                          Case{"r1-distill-llama", "<｜Assistant｜>", false}}) {
        Tokenizer t = Tokenizer::load(GOLDEN + c.name);
        ASSERT_GE(t.token_id(c.token), 0) << c.token;
        EXPECT_EQ(t.is_special(t.token_id(c.token)), c.special) << c.name << c.token;
    }
}

// With marks in every order, as utf8proc_map composes; and in steps that hardly grow faster than the text.
TEST(TokenizerNfc, AsUtf8procButWithoutItsSquares) {
    const std::string parts[] = {
        "a", "e", "\u0300", "\u0316", "\u0327", "\u0344", "\u0F73", "\u0F75", "\u1161", "\u1112", "\u11AB",
        "\uD55C", "\u1E69", "\u212B", "\U0001D15E", "\u0345", "\u3099", "\u304B", "\u0958", "\n", "\uFB1D",
        "\u0F71", "\u0F74",
        std::string(1, '\0')};
    auto utf8proc = [](const std::string& text) {
        utf8proc_uint8_t* out = nullptr;
        auto in = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
        auto options = utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        utf8proc_ssize_t n = utf8proc_map(in, utf8proc_ssize_t(text.size()), &out, options);
        std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(out, std::free);
        return std::string(reinterpret_cast<char*>(out), size_t(n));
    };
    Noise noise;
    for (int round = 0; round < 3000; round++) {
        std::string text;
        for (int n = noise.below(20); n > 0; n--) text += parts[noise.below(int(std::size(parts)))];
        ASSERT_EQ(td::to_nfc(text), utf8proc(text)) << text;
    }
    for (std::string marks : {"\u0300\u0316", "\u0F73"}) {       // 230 220 230 ..., and 129 130 129 ...
        auto compose = [&](size_t n) {
            std::string out, begin = marks[0] == '\xCC' ? "\u00E0\u0316" : "a\u0F71\u0F71";
            uint64_t steps = steps_of([&] { out = td::to_nfc("a" + repeated(marks, n)); });
            EXPECT_EQ(out.substr(0, begin.size()), begin);
            return steps;
        };
        uint64_t some = compose(1000), many = compose(64000);
        EXPECT_GT(some, 1000u);
        EXPECT_LT(many, 64 * 3 * some);
    }
}

TEST(TokenizerSmall, Nfc) {
    std::string decomposed = "a\xCC\x81", composed = "\xC3\xA1";
    EXPECT_EQ(small().encode(composed), (Ids{19}));
    EXPECT_EQ(small().encode(decomposed), (Ids{0, 15, 16}));
    Tokenizer t = small("\"normalizers\": []", "\"normalizers\": [{\"type\": \"NFC\"}]");
    EXPECT_EQ(t.encode(decomposed), (Ids{19}));
    std::string json = replaced(SMALL, "\"normalizers\": []", "\"normalizers\": [{\"type\": \"NFC\"}]");
    t = Tokenizer::parse(replaced(json, "\">a\"", "\">a\xCC\x81\""), "{}", "small");
    EXPECT_EQ(t.encode(">" + composed), (Ids{13}));               // normalised tokens in normalised text
    EXPECT_EQ(t.encode(">" + decomposed), (Ids{13}));
}

TEST(TokenizerSmall, WithoutByteFallbackThereIsNone) {            // absent is false
    EXPECT_EQ(small("\"byte_fallback\": false, ", "").encode("ab11 ab"), (Ids{3, 8, 8, 9, 3}));
}

// Transformers 5.24 gives [bos, ...] for each of these, whatever tokenizer_config.json says of add_bos_token,
// and a model that was saved by it says nothing.
TEST(TokenizerSmall, BosAsThePostProcessorAsks) {
    const std::string processing = R"({"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<x>": {"id": "<x>", "ids": [10], "tokens": ["<x>"]}}})";
    const std::string bytes = R"({"type": "ByteLevel", "trim_offsets": false})";
    auto bos = [&](const std::string& post_processor, const std::string& config) {
        std::string json = replaced(SMALL, "{\n", "{\"post_processor\": " + post_processor + ",");
        Tokenizer t = Tokenizer::parse(json, config, "small");
        return t.add_bos ? t.bos : -1;
    };
    const std::string sequence = R"({"type": "Sequence", "processors": [)" + bytes + "," + processing + "]}";
    for (const std::string& post : {processing, sequence})
        for (const char* config : {"{}", R"({"bos_token": "<x>"})", R"({"add_bos_token": false})"})
            EXPECT_EQ(bos(post, config), 10) << config;
    for (const std::string& post : {bytes, std::string("null"), replaced(processing,
             R"({"SpecialToken": {"id": "<x>", "type_id": 0}}, )", "")}) {
        EXPECT_EQ(bos(post, R"({"bos_token": "<x>"})"), -1) << post;
        EXPECT_EQ(bos(post, R"({"bos_token": "<x>", "add_bos_token": true})"), 10) << post;
    }
    EXPECT_TRUE(is_error([&] { bos(processing, R"({"bos_token": "a"})"); }, "config.json.bos_token: is not"));
    for (std::string name : {"r1-distill-qwen", "r1-distill-llama"}) {
        std::string json = file(GOLDEN + name + "/tokenizer.json");
        Tokenizer t = Tokenizer::parse(json, R"({"bos_token": "<｜begin▁of▁sentence｜>"})", name);
        EXPECT_TRUE(t.add_bos) << name;
        EXPECT_EQ(encode_prompt(t, "x", t.add_bos)[0], name == "r1-distill-qwen" ? 151646 : 128000);
    }
}

// And so in the GGUF file that is made of the folder, with the template that was chosen.
TEST(TokenizerSmall, BosAndTemplateOfAGgufFile) {
    fs::path folder = scratch("vocabulary");
    write_text(folder / "tokenizer.json", file(GOLDEN + "r1-distill-qwen/tokenizer.json"));
    std::string bos = "\"bos_token\": \"<｜begin▁of▁sentence｜>\"";
    write_text(folder / "tokenizer_config.json",
               "{" + bos + R"(, "chat_template": [{"name": "default", "template": "t"}]})");
    Vocabulary v = folder_vocabulary(folder, 151936);
    EXPECT_TRUE(v.add_bos);
    EXPECT_EQ(v.bos, 151646);
    EXPECT_EQ(v.chat_template, "t");
    write_text(folder / "chat_template.jinja", "u\n");
    EXPECT_EQ(folder_vocabulary(folder, 151936).chat_template, "u\n");
    std::string json = file(GOLDEN + "r1-distill-qwen/tokenizer.json");
    write_text(folder / "tokenizer.json", replaced(json, "\"post_processor\"", "\"p\""));
    EXPECT_FALSE(folder_vocabulary(folder, 151936).add_bos);
}

TEST(TokenizerSmall, IdsWithoutAToken) {
    EXPECT_EQ(small().decode({-1, 0, 500, 1 << 30, 1}), "ab");
    EXPECT_EQ(Tokenizer().decode({0}), "");
}

TEST(TokenizerSmall, MalformedFiles) {
    struct Case { const char *from, *to, *part; };
    const Case cases[] = {
        {"\"model\"", "\"models\"", "'model' is missing"},
        {"\"decoder\": {\"type\": \"ByteLevel\"", "\"decoder\": {\"type\": \"Metaspace\"", "decoder.type"},
        {"\"decoder\"", "\"decoders\"", "'decoder' is missing"},
        {"\"BPE\"", "\"Unigram\"", "model.type: must be \"BPE\""},
        {"\"BPE\"", "1", "model.type"},
        {"\"BPE\"", "\"BPE\", \"type\": \"BPE\"", "model.type: is given twice"},
        {"\"dropout\": null", "\"dropout\": 0.1", "model.dropout"},
        {"\"unk_token\": null", "\"unk_token\": \"<unk>\"", "model.unk_token"},
        {"_prefix\": \"\"", "_prefix\": \"##\"", "model.continuing_subword_prefix"},
        {"_suffix\": \"\"", "_suffix\": \"</w>\"", "model.end_of_word_suffix"},
        {"\"byte_fallback\": false", "\"byte_fallback\": true", "model.byte_fallback: must be false"},
        {"{\n", "\xEF\xBB\xBF{\n", "begins with a byte order mark"},
        {"\"ignore_merges\": false", "\"ignore_merges\": 1", "model.ignore_merges"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": -1", "model.vocab[\"a\"]: token id -1 is out of range"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": 1048576", "model.vocab[\"a\"]: token id 1048576"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": 18446744073709551616", "model.vocab[\"a\"]"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": \"0\"", "model.vocab[\"a\"]: must be an integer"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": 0.5", "model.vocab[\"a\"]: must be an integer"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": 1", "model.vocab[\"b\"]: is empty or given twice"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": 0, \"a\": 99", "vocab[\"a\"]: is empty or given twice"},
        {"\"vocab\": {\"a\": 0", "\"vocab\": {\"a\": 0, \"\": 99", "vocab[\"\"]: is empty or given twice"},
        {"\"vocab\": {", "\"vocab\": {\"line\\nbreak\": -1, ", "model.vocab[\"line\\nbreak\"]"},
        {"\"vocab\": {", "\"vocab\": [], \"v\": {", "model.vocab: must be an object"},
        {"\"vocab\": {", "\"v\": {", "'vocab' is missing"},
        {"\"merges\": [", "\"merges\": [\"a\", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\"\", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\" \", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\"a \", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\" a\", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\"a b c\", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\"a z\", ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [\"a c\", ", "model.merges[0]: must be two tokens that make a third"},
        {"\"merges\": [", "\"merges\": [\"b c\", ", "model.merges[1]: is given twice"},
        {"\"merges\": [", "\"merges\": [[\"a\"], ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [[\"a\", \"b\", \"c\"], ", "model.merges[0]"},
        {"\"merges\": [", "\"merges\": [[\"a\", 1], ", "model.merges[0][1]: must be a string"},
        {"\"merges\": [", "\"merges\": [1, ", "model.merges[0]: must be an array"},
        {"\"merges\": [", "\"merges\": [null, ", "model.merges[0]: must be an array"},
        {"\"merges\": [", "\"merges\": {}, \"m\": [", "model.merges: must be an array"},
        {"\"normalizers\": []", "\"normalizers\": [{\"type\": \"Lowercase\"}]",
         "normalizers[0]: type \"Lowercase\""},
        {"\"normalizers\": []", "\"normalizers\": [{}]", "normalizers[0]: 'type' is missing"},
        {"\"normalizers\": []", "\"normalizers\": 1", "normalizers: must be an array"},
        {"{\"type\": \"Sequence\", \"normalizers\": []}", "\"NFC\"", "normalizer: must be an object"},
        {"\"pre_tokenizer\"", "\"pre\"", "'pre_tokenizer' is missing"},
        {"\"Split\"", "\"Whitespace\"", "pretokenizers[0]: type \"Whitespace\" is not supported"},
        {"\"Split\"", "\"White\\nspace\"", "pretokenizers[0]: type \"White\\nspace\""},
        {"\"Isolated\"", "\"Removed\"", "pretokenizers[0].behavior: must be \"Isolated\""},
        {"\"invert\": false", "\"invert\": true", "pretokenizers[0].invert"},
        {"{\"Regex\": \"[a-z]+\"}", "{\"String\": \"a\"}", "pattern: 'Regex' is missing"},
        {"\"[a-z]+\"", "7", "pattern.Regex: must be a string"},
        {"\"[a-z]+\"", "\"[a-z\"", "pattern.Regex: the regex does not compile"},
        {"\"[a-z]+\"", "\"a*\"", "pattern.Regex: the regex matches the empty text"},
        {"\"[a-z]+\"", "\"a\\\\d\"", "pattern.Regex: no support for the regex from here on: \"\\\\d\""},
        {"\"individual_digits\": true", "\"individual_digits\": false", "pretokenizers[1].individual_digits"},
        {"\"add_prefix_space\": false", "\"add_prefix_space\": true", "pretokenizers[2].add_prefix_space"},
        {"\"use_regex\": false", "\"use_regex\": true", "pretokenizers[2].use_regex"},
        {"\"Digits\"", "\"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false",
         "stands after ByteLevel"},
        {"{\"type\": \"ByteLevel\", \"add_prefix_space\": false",
         "{\"type\": \"Digits\", \"individual_digits\": true", "pre_tokenizer: must end with ByteLevel"},
        {"\"single_word\": false", "\"single_word\": true", "added_tokens[0].single_word"},
        {"\"lstrip\": false", "\"lstrip\": true", "added_tokens[0].lstrip"},
        {"\"rstrip\": false", "\"rstrip\": 0", "added_tokens[0].rstrip"},
        {"\"content\": \"<x>\"", "\"content\": \"\"", "added_tokens[0]: has no content"},
        {"\"content\": \"<x>\"", "\"content\": null", "added_tokens[0]: 'content' is missing"},
        {"\"content\": \"<x>\"", "\"content\": \"\\ud800\"", "not valid JSON"},
        {"\"content\": \"<x>\"", "\"content\": \"<x>>\"", "added_tokens[2]: is given twice"},
        {"\"id\": 10", "\"id\": 0", "added_tokens[0]: has the id of another token"},
        {"\"id\": 10", "\"id\": 11", "added_tokens[1]: has the id of another token"},
        {"\"id\": 10", "\"id\": 1e9", "added_tokens[0].id: must be an integer"},
        {"\"id\": 10", "\"id\": -10", "added_tokens[0].id: token id -10"},
        {"\"normalized\": false", "\"normalized\": \"no\"", "[0].normalized: must be true or false"},
        {"\"special\": true", "\"n\": 1", "added_tokens[0]: 'special' is missing"},
        {"{\n", "[", "not valid JSON"},
        {"{\n", "{\"n\": 1e999, ", "not valid JSON"}};
    EXPECT_EQ(small().vocab_size(), 20);
    for (const Case& c : cases) {
        auto parse = [&] { small(c.from, c.to); };
        EXPECT_TRUE(is_error(parse, c.part)) << c.from << " -> " << c.to;
        EXPECT_TRUE(is_error(parse, "small/tokenizer.json")) << c.from << " -> " << c.to;
    }
    EXPECT_TRUE(is_error([] { small("{\n", repeated("[", 65) + "{\n"); }, "not valid JSON"));     // too deep
    EXPECT_TRUE(is_error([] { small("\"<x>\"", "\"" + repeated("x", 257) + "\""); }, "more than 256 bytes"));
    const std::string text = R"({"Sequence": {"id": "A"}})", single = R"("TemplateProcessing", "single": [)";
    const std::string token = R"({"SpecialToken": {"id": "no\nbody"}})";
    const std::pair<std::string, const char*> processors[] = {
        {R"("BertProcessing")", "post_processor: type \"BertProcessing\" is not supported"},
        {R"("TemplateProcessing")", "post_processor: 'single' is missing"},
        {single + "]", "post_processor: asks for more than BOS"},
        {single + text + ", " + token + "]", "asks for more than BOS"},
        {single + text + ", " + text + "]", "'SpecialToken' is missing"},
        {single + token + ", " + text + "]", "id: \"no\\nbody\" is not in"}};
    for (auto& [type, part] : processors) {
        auto parse = [&] { small("{\n", "{\"post_processor\": {\"type\": " + type + "}, "); };
        EXPECT_TRUE(is_error(parse, part)) << type;
    }
    std::string digits = repeated("{\"type\": \"Digits\", \"individual_digits\": true}, ", 99);
    std::string split = "{\"type\": \"Split\"";
    EXPECT_TRUE(is_error([&] { small(split, digits + split); }, "too many"));
    for (size_t n = 0; n < SMALL.size(); n++)                     // cut off anywhere
        EXPECT_TRUE(is_error([&] { Tokenizer::parse(SMALL.substr(0, n), "{}", "small"); }, "small/")) << n;
}

TEST(TokenizerSmall, Config) {
    auto with_config = [](const std::string& config) { return Tokenizer::parse(SMALL, config, "small"); };
    Tokenizer t = with_config(R"({"bos_token": {"content": "<x>"}, "eos_token": "a", "add_bos_token": true,
                                  "model_max_length": 1000000000000000019884624838656})");
    EXPECT_EQ(t.bos, 10);
    EXPECT_EQ(t.eos, 0);
    EXPECT_TRUE(t.add_bos);
    EXPECT_EQ(with_config(R"({"bos_token": null})").bos, -1);
    struct Case { const char *config, *part; };
    for (const Case& c : {Case{R"({"bos_token": 1})", "bos_token: must be a string"},
                          Case{R"({"bos_token": "no\nbody"})", "bos_token: \"no\\nbody\" is not in"},
                          Case{R"({"bos_token": {}})", "bos_token: 'content' is missing"},
                          Case{R"({"eos_token": {"content": 1}})", "eos_token.content"},
                          Case{R"({"eos_token": "a", "eos_token": "b"})", "eos_token: is given twice"},
                          Case{R"({"add_bos_token": "yes"})", "add_bos_token"},
                          Case{"[]", "must be an object"}, Case{"", "not valid JSON"}})
        EXPECT_TRUE(is_error([&] { with_config(c.config); }, "small/tokenizer_config.json")) << c.config;
}

TEST(TokenizerSmall, Folders) {
    fs::path folder = scratch("tokenizer");
    auto load = [&] { Tokenizer::load(folder.string()); };
    EXPECT_TRUE(is_error(load, "tokenizer.json: no such file"));
    write_text(folder / "tokenizer.json", SMALL);
    EXPECT_NO_THROW(load());                                      // the config may be absent
    fs::create_directory(folder / "tokenizer_config.json");
    EXPECT_TRUE(is_error(load, "tokenizer_config.json: cannot read"));
    fs::remove(folder / "tokenizer_config.json");
    for (std::string name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}) {
        std::string old = fs::exists(folder / name) ? file((folder / name).string()) : "";
        write_text(folder / name, "{}");
        fs::resize_file(folder / name, 100'000'001);              // a hole, which takes no room
        EXPECT_TRUE(is_error(load, name + ": larger than 100000000 bytes"));
        fs::remove(folder / name);
        ASSERT_EQ(mkfifo((folder / name).c_str(), 0600), 0);      // nobody writes into it
        EXPECT_TRUE(is_error(load, name + ": cannot read"));
        fs::remove(folder / name);
        if (!old.empty()) write_text(folder / name, old);
    }
    write_text(folder / "tokenizer_config.json", "\xEF\xBB\xBF{}");
    EXPECT_TRUE(is_error(load, "tokenizer_config.json: begins with a byte order mark"));
}

// -- chat templates ---------------------------------------------------------------------------------

const std::string TEXT = "tests/golden/text/";
const std::pair<const char*, const char*> PUBLISHED[] = {         // name, where it is
    {"v2", "deepseek-v2"}, {"v2.5", ""}, {"v3", "deepseek-v3"}, {"r1", "deepseek-r1"},
    {"r1-distill", "r1-distill-qwen"}, {"r1-distill", "r1-distill-llama"}, {"v3-0324", ""}, {"r1-0528", ""},
    {"v3.1", ""}};

std::string template_of(const std::string& folder) {
    td::Document config(file(GOLDEN + folder + "/tokenizer_config.json"), folder);
    return config.root.at("chat_template").string();
}
std::string template_of(const std::pair<const char*, const char*>& published) {
    if (*published.second) return template_of(published.second);
    return file(TEXT + "templates/" + published.first + ".jinja");
}

std::string recognised(const std::string& jinja) {
    auto [known, opening] = td::recognise_template(jinja);
    return known ? known->name + (" " + opening) : "";
}

TEST(TokenizerTemplate, EachIsKnownAndRendersAsJinjaDoes) {
    Tokenizer t = Tokenizer::load(GOLDEN + "deepseek-v3");
    std::map<std::string, int> lines;
    each_line(TEXT + "templates.jsonl", [&](const td::Json& line) {
        std::string name = line.at("template").string();
        Chat chat = parse_chat(simdjson::minify(line.value));
        t.set_chat_template(name);
        EXPECT_EQ(t.chat_template_name().substr(0, 4), name.substr(0, 4));
        lines[name]++;
        auto text = line.find("text");
        if (text) EXPECT_EQ(t.render(chat.messages, chat.add_generation_prompt), text->string()) << name;
        else EXPECT_TRUE(is_error([&] { t.render(chat.messages, false); }, "needs content")) << name;
    });
    EXPECT_EQ(lines.size(), std::size(td::KNOWN_TEMPLATES));
    for (const td::KnownTemplate& known : td::KNOWN_TEMPLATES) EXPECT_EQ(lines[known.name], 20) << known.name;
    for (auto published : PUBLISHED) {
        std::string config = "{\"chat_template\": " + json_quote(template_of(published)) + "}";
        EXPECT_EQ(Tokenizer::parse(SMALL, config, "small").chat_template_name(), published.first);
    }
}

TEST(TokenizerTemplate, UnknownOnesAreNotRendered) {
    for (std::string config : {"{}", R"({"chat_template": "{{ messages }}"})", R"({"chat_template": 7})",
                               R"({"chat_template": [{"name": "default", "template": "x"}]})"}) {
        Tokenizer t = Tokenizer::parse(SMALL, config, "small");
        EXPECT_EQ(t.chat_template_name(), "unknown");
        auto render = [&] { t.render({{"user", "a"}}, true); };
        const std::string names = "v2, v2.5, v3, r1, r1-distill, v3-0324, r1-0528, v3.1, v3.1-thinking";
        EXPECT_TRUE(is_error(render, "the model's chat template is not known here; --chat-template NAME (" +
                                         names + ") chooses one, --raw does without")) << config;
        t.set_chat_template("v3");
        EXPECT_EQ(t.render({{"user", "a"}}, true), "<｜User｜>a<｜Assistant｜>");
        auto choose = [&] { t.set_chat_template("v4\n"); };
        EXPECT_TRUE(is_error(choose, "no chat template \"v4\\n\"; there are " + names));
    }
}

// What Jinja, as transformers sets it up, renders the same: make_text.py has seen that it does.
TEST(TokenizerTemplate, WhatRendersTheSameIsKnown) {
    for (auto published : PUBLISHED) {
        std::string jinja = template_of(published), wide, escaped, lines;
        bool quoted = false;
        for (char c : jinja) {
            quoted ^= c == '\'';
            escaped += c == '\n' && quoted ? "\\n" : std::string(1, c);
            lines += c == '\n' ? "\r\n" : std::string(1, c);
        }
        const std::string known = recognised(jinja);
        EXPECT_EQ(known.substr(0, known.find(' ')), published.first);
        for (std::string same : {escaped, lines, jinja + "\n", jinja + "\n\n", "{# a comment #}" + jinja,
                                 "  " + jinja, "{# {% #}\n" + jinja,
                                 file(TEXT + "templates/" + published.first + ".pretty")})
            EXPECT_EQ(recognised(same), known);
        for (std::string other : {jinja + " ", "x" + jinja, jinja + "\n\n\n", jinja + "{# #} ", "{#" + jinja,
                                  std::string(1 << 15, '\n') + jinja})
            EXPECT_NE(recognised(other), known) << published.first;
    }
    EXPECT_EQ(recognised(""), "");
    EXPECT_EQ(recognised(std::string(30000, '{')), "");
    EXPECT_EQ(recognised(repeated("{#", 15000)), "");
}

// Each sign left out, and each doubled, makes another template, or one that opens the answer otherwise. Only
// the minus of a tag may be left out where no blank is beside it.
TEST(TokenizerTemplate, ChangedOnesAreNotRecognised) {
    for (auto published : PUBLISHED) {
        std::string jinja = template_of(published), known = recognised(jinja);
        for (size_t i = 0; i < jinja.size(); i += 2) {
            if (jinja[i] == ' ' || jinja[i] == '\n') continue;
            std::string less = recognised(std::string(jinja).erase(i, 1));
            std::string more = recognised(std::string(jinja).insert(i, 1, jinja[i]));
            if (jinja[i] != '-') { EXPECT_NE(less, known) << published.first << ' ' << i; }
            EXPECT_NE(more, known) << published.first << ' ' << i;
            bool in_prompt = i + 60 > jinja.size();
            if (!in_prompt && jinja[i] != '-') { EXPECT_EQ(less, "") << published.first << ' ' << i; }
        }
    }
}

TEST(TokenizerTemplate, OfSeveralTheDefault) {
    std::string v3 = json_quote(template_of("deepseek-v3")), r1 = json_quote(template_of("deepseek-r1"));
    auto name = [&](const std::string& templates, const std::string& jinja = "") {
        std::string config = "{\"chat_template\": " + templates + "}";
        return Tokenizer::parse(SMALL, config, "small", jinja).chat_template_name();
    };
    std::string use = "{\"name\": \"tool_use\", \"template\": " + r1 + "}";
    std::string list = "[" + use + ", {\"name\": \"default\", \"template\": " + v3 + "}]";
    EXPECT_EQ(name(list), "v3");
    EXPECT_EQ(name("[" + use + "]"), "unknown");
    EXPECT_EQ(name(list, template_of("deepseek-v2")), "v2");      // chat_template.jinja is the default then
    EXPECT_TRUE(is_error([&] { name("[{\"template\": \"x\"}]"); }, "chat_template[0]: 'name' is missing"));
    EXPECT_TRUE(is_error([&] { name("[{\"name\": \"default\"}]"); }, "[0]: 'template' is missing"));
}

// V2's history has "Assistant: Hello", its prompt "Assistant:", and the model says " Hello". The ids of the
// history are those of the prompt and of what was said.
TEST(TokenizerTemplate, HistoryHasTheIdsThatWereSaid) {
    for (std::string name : NAMES) {
        Tokenizer t = Tokenizer::load(GOLDEN + name);
        const bool v2 = name == "deepseek-v2", thinks = name != "deepseek-v3" && !v2;
        const std::string said = v2 ? " Hello. How are you?" : "Hello. How are you?";
        std::vector<Message> chat = {{"user", "Hi!"}};
        Ids ids = t.encode(t.render(chat, true) + (thinks ? "</think>" : "")), answer = t.encode(said);
        if (thinks) ids.resize(t.encode(t.render(chat, false)).size() + 1);        // up to <｜Assistant｜>
        ids.insert(ids.end(), answer.begin(), answer.end());
        ids.push_back(t.eos);
        chat.push_back({"assistant", t.as_history(said)});
        EXPECT_EQ(t.encode(t.render(chat, false)), ids) << name;
        EXPECT_EQ(t.as_history("  x"), v2 ? " x" : "  x");
        EXPECT_EQ(t.as_history("x"), "x");
    }
}

TEST(TokenizerTemplate, TheAnswersOpeningIsTheFiles) {
    std::string jinja = replaced(template_of("r1-distill-qwen"), "<think>\\n", "");
    std::string bos = "{\"bos_token\": \"<x>\"";
    std::string config = bos + ", \"chat_template\": " + json_quote(jinja) + "}";
    Tokenizer in_config = Tokenizer::parse(SMALL, config, "small");
    EXPECT_EQ(in_config.render({{"user", "a"}}, true), "<x><｜User｜>a<｜Assistant｜>");
    Tokenizer apart = Tokenizer::parse(SMALL, bos + "}", "small", jinja);          // chat_template.jinja
    EXPECT_EQ(apart.render({{"user", "a"}}, true), "<x><｜User｜>a<｜Assistant｜>");
}

TEST(TokenizerTemplate, HistoryHasNoThoughts) {
    std::string thought = "<think>\nhm</think>\n\nx</think>y";
    std::vector<Message> chat = {{"user", "q"}, {"assistant", thought}, {"user", "r"}};
    std::string begin = "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>";
    std::string end = "<｜end▁of▁sentence｜><｜User｜>r<｜Assistant｜>";
    for (std::string name : {"deepseek-r1", "r1-distill-qwen", "r1-distill-llama"})
        EXPECT_EQ(Tokenizer::load(GOLDEN + name).render(chat, true), begin + "y" + end + "<think>\n") << name;
    Tokenizer v3 = Tokenizer::load(GOLDEN + "deepseek-v3");
    EXPECT_EQ(v3.render(chat, true), begin + thought + end);
}

TEST(TokenizerTemplate, Tools) {
    Message call{"assistant"};
    call.tool_calls = {{"function", "f", "{}"}, {"function", "g", "[]"}};
    std::vector<Message> chat = {{"user", "q"}, call, {"tool", "1"}, {"tool", "2"}};
    std::string f = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>";
    std::string g = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n[]\n```<｜tool▁call▁end｜>";
    std::string begin = "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜><｜tool▁calls▁begin｜>" + f + "\n" + g +
                        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1"
                        "<｜tool▁output▁end｜>";
    std::string end = "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>";
    EXPECT_EQ(Tokenizer::load(GOLDEN + "deepseek-v3").render(chat, true), begin + "\n" + end);
    EXPECT_EQ(Tokenizer::load(GOLDEN + "r1-distill-qwen").render(chat, true), begin + "\n" + end);
    EXPECT_EQ(Tokenizer::load(GOLDEN + "deepseek-r1").render(chat, true), begin + end);
}

// System messages stand in front wherever they come, unknown roles nowhere; the turn stays the tool's.
TEST(TokenizerTemplate, OtherRolesChangeNoTurn) {
    std::vector<Message> chat = {{"user", "q"}, {"tool", "1"}, {"system", "s"}, {"critic", "x"}};
    EXPECT_EQ(Tokenizer::load(GOLDEN + "deepseek-v3").render(chat, true),
              "<｜begin▁of▁sentence｜>s<｜User｜>q<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>"
              "<｜tool▁outputs▁end｜>");
}

TEST(TokenizerTemplate, MessagesWithoutContent) {
    for (std::string name : NAMES) {
        Tokenizer t = Tokenizer::load(GOLDEN + name);
        EXPECT_TRUE(is_error([&] { t.render({{"user"}}, true); }, "of role \"user\" needs content")) << name;
        EXPECT_TRUE(is_error([&] { t.render({{"system"}}, true); }, "role \"system\"")) << name;
    }
}

TEST(TokenizerTemplate, MessagesJson) {
    Chat chat = parse_chat(R"({"messages": [{"role": "user", "content": null, "name": 1},
        {"role": "assistant", "content": "c",
         "tool_calls": [{"type": "t", "function": {"name": "n", "arguments": "a"}}]}],
        "tools": null, "add_generation_prompt": true})");
    ASSERT_EQ(chat.messages.size(), 2u);
    EXPECT_TRUE(chat.add_generation_prompt);
    EXPECT_FALSE(chat.messages[0].content || chat.messages[0].tool_calls);
    EXPECT_EQ(chat.messages[1].tool_calls->at(0).arguments, "a");
    EXPECT_FALSE(parse_chat(R"({"messages": []})").add_generation_prompt);
    EXPECT_EQ(parse_messages(R"([{"role": "r", "content": "c"}])")[0].content, "c");
    struct Case { const char *json, *part; };
    for (const Case& c : {Case{"[]", "chat: must be an object"}, Case{"{}", "'messages' is missing"},
                          Case{R"({"messages": {}})", "chat.messages: must be an array"},
                          Case{R"({"messages": [1]})", "chat.messages[0]: must be an object"},
                          Case{R"({"messages": [{}]})", "chat.messages[0]: 'role' is missing"},
                          Case{R"({"messages": [{"role": 1}]})", "chat.messages[0].role: must be a string"},
                          Case{R"({"messages": [{"role": "u", "content": [1]}]})", "[0].content"},
                          Case{R"({"messages": [{"role": "u", "tool_calls": 1}]})", "[0].tool_calls"},
                          Case{R"({"messages": [{"role": "u", "tool_calls": [{}]}]})", "[0]: 'type'"},
                          Case{R"({"messages": [{"role": "u", "role": "v"}]})", "role: is given twice"},
                          Case{R"({"messages": [], "tools": 1})", "chat.tools: must be an array"},
                          Case{R"({"messages": [], "add_generation_prompt": 1})", "chat.add_gen"},
                          Case{"{", "chat: not valid JSON"}})
        EXPECT_TRUE(is_error([&] { parse_chat(c.json); }, c.part)) << c.json;
}

}  // namespace tokenizer_test
