// Chapter 21: what is shown of an answer, what is kept of it, and where it ends.
#include "unit.h"

// -- 21.1 a terminal --------------------------------------------------------------------------------

TEST(Disarmed, LeavesTextAsItIs) {
    for (const char* text : {"", "plain\n\ttext", "größer 中文 👋🏽", "\u00A0\u200B\u2028"})
        EXPECT_EQ(disarmed(text), text);
}
TEST(Disarmed, ShowsWhatWouldAct) {
    EXPECT_EQ(disarmed("a\033]0;title\007b"), "a<U+001B>]0;title<U+0007>b");
    EXPECT_EQ(disarmed("\u009B31m\r\b\x7F"), "<U+009B>31m<U+000D><U+0008><U+007F>");
    EXPECT_EQ(disarmed("\u202Eevil\u2066\u2069\u200F\u061C"),
              "<U+202E>evil<U+2066><U+2069><U+200F><U+061C>");
    EXPECT_EQ(disarmed(std::string_view("\0", 1)), "<U+0000>");
}
TEST(Disarmed, ShowsBytesThatAreNoText) {
    EXPECT_EQ(disarmed("a\xFFz\x9B" "31m\xC3"), "a<FF>z<9B>31m<C3>");
}

// -- 21.2 stop texts --------------------------------------------------------------------------------

static std::string through(const std::vector<std::string>& stops, const std::string& text, size_t step,
                           bool& found) {
    StopTexts filter(stops);
    std::string out;
    for (size_t at = 0; at < text.size() && !filter.found(); at += step)
        out += filter.push(text.substr(at, step));
    out += filter.finish();
    found = filter.found();
    return out;
}
// However the text is cut: what stands before the first stop text, which is the one that ends first.
TEST(StopTexts, DoNotDependOnTheCuts) {
    Noise noise;
    for (int round = 0; round < 3000; round++) {
        auto random_text = [&](int n) {
            std::string text;
            for (int i = 0; i < n; i++) text += char('a' + noise.below(2));
            return text;
        };
        std::vector<std::string> stops = {random_text(1 + noise.below(4)), random_text(1 + noise.below(4))};
        std::string text = random_text(noise.below(12)), expected = text;
        bool stopped = false;
        for (size_t n = 1; n <= text.size() && !stopped; n++)            // as if a letter came at a time
            for (const std::string& stop : stops) {
                size_t at = text.substr(0, n).find(stop);
                if (at == text.npos) continue;
                expected = stopped ? std::min(expected, text.substr(0, at)) : text.substr(0, at);
                stopped = true;
            }
        bool found = false;
        EXPECT_EQ(through(stops, text, 1, found), expected) << text << " " << stops[0] << " " << stops[1];
        EXPECT_EQ(found, stopped);
    }
}
TEST(StopTexts, HoldBackABeginningAndGiveItBack) {
    bool found = false;
    EXPECT_EQ(through({"</s>"}, "a</x></", 3, found), "a</x></");
    EXPECT_FALSE(found);
    EXPECT_EQ(through({"</s>"}, "a</</s>b", 1, found), "a</");
    EXPECT_TRUE(found);
}

// -- 21.2 printing ----------------------------------------------------------------------------------

struct Printed {
    std::string shown, text, thought, answer;
    bool in_thought;
};
// The shipped model's tokens of `text`, printed.
static Printed printed(const std::string& text, Display display, bool opened, bool raw = false) {
    static const Tokenizer tokenizer = Tokenizer::load("weights/tiny");
    Generation g;
    g.think_begin = tokenizer.token_id("<think>"), g.think_end = tokenizer.token_id("</think>");
    testing::internal::CaptureStdout();
    Printer printer(tokenizer, g, display, opened, raw);
    for (int id : tokenizer.encode(text)) if (!printer.emit(id)) break;
    printer.finish();
    return {testing::internal::GetCapturedStdout(), printer.text(), printer.thought(), printer.answer(),
            printer.in_thought()};
}
TEST(Printer, SaysTheThoughtThatTheTemplateOpened) {
    Printed p = printed("so 3\n</think>\n\nThree.", {}, true);
    EXPECT_EQ(p.shown, "<think>so 3\n</think>\n\nThree.\n");
    EXPECT_EQ(p.text, "so 3\n</think>\n\nThree.");
    EXPECT_EQ(p.thought, "so 3\n");
    EXPECT_EQ(p.answer, "Three.");
    EXPECT_EQ(printed("so 3\n</think>\n\nThree.", {}, true, true).shown, "so 3\n</think>\n\nThree.\n");
}
TEST(Printer, ShowsTheAnswerAlone) {
    Display only;
    only.answer_only = true;
    EXPECT_EQ(printed("so 3\n</think>\n\nThree.\n", only, true).shown, "Three.\n");
    EXPECT_EQ(printed("<think>so 3</think>Three.", only, false).shown, "Three.\n");
    EXPECT_EQ(printed("so 3", only, true).shown, "\n");
    EXPECT_EQ(printed("Three.", only, false).shown, "Three.\n");
}
TEST(Printer, KnowsAnUnfinishedThought) {
    Printed p = printed("so 3", {}, true);
    EXPECT_TRUE(p.in_thought);
    EXPECT_EQ(p.thought, "so 3");
    EXPECT_EQ(p.answer, "");
    p = printed("Three.", {}, false);
    EXPECT_FALSE(p.in_thought);
    EXPECT_EQ(p.thought, "");
    EXPECT_EQ(p.answer, "Three.");
}
TEST(Printer, EndsAtAStopTextEvenInAThought) {
    Display d;
    d.stops = {"3\n</think>"};
    Printed p = printed("so 3\n</think>\n\nThree.", d, true);
    EXPECT_EQ(p.text, "so ");
    EXPECT_TRUE(p.in_thought);
    d.stops = {"re"};
    p = printed("so 3\n</think>\n\nThree.", d, true);
    EXPECT_EQ(p.answer, "Th");
    EXPECT_EQ(p.shown, "<think>so 3\n</think>\n\nTh\n");
}
TEST(Printer, PrintsNothingForJson) {
    Display d;
    d.json = true;
    EXPECT_EQ(printed("so 3\n</think>\n\nThree.", d, true).shown, "");
}
