// Runs every target on every file of its corpus, without libFuzzer: seeds, and inputs that once broke one.
//
//   build/tests --gtest_filter='Fuzz*'        tests/tests.cpp includes this file
//
// Each file runs in a process of its own, as a find ends it. It runs whole, cut short, and with single bits
// changed: near neighbours that a fuzzer would try first.
#include <gtest/gtest.h>

#include "fuzz.h"

#include <sys/wait.h>

namespace fuzz {

#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "safetensors.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_index
#include "index.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_config
#include "config.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_generation_config
#include "generation_config.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer_json
#include "tokenizer_json.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer_config
#include "tokenizer_config.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_chat_template
#include "chat_template.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_messages
#include "messages.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_gguf
#include "gguf.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_cache
#include "cache.cpp"
#undef LLVMFuzzerTestOneInput

struct Target {
    const char* name;
    int (*run)(const uint8_t* data, size_t size);
};
constexpr Target TARGETS[] = {{"safetensors", fuzz_safetensors},
                              {"index", fuzz_index},
                              {"config", fuzz_config},
                              {"generation_config", fuzz_generation_config},
                              {"tokenizer_json", fuzz_tokenizer_json},
                              {"tokenizer_config", fuzz_tokenizer_config},
                              {"chat_template", fuzz_chat_template},
                              {"messages", fuzz_messages},
                              {"gguf", fuzz_gguf},
                              {"cache", fuzz_cache}};

// Copies to the heap, where a sanitizer sees a read beyond the end.
void run_on(const Target& target, std::string_view text) {
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[text.size()]);
    std::copy(text.begin(), text.end(), bytes.get());
    target.run(bytes.get(), text.size());
}

void run_near(const Target& target, const std::string& text) {
    size_t step = 1 + text.size() / 8;
    run_on(target, text);
    for (size_t at = 0; at < text.size(); at += step) {
        run_on(target, std::string_view(text).substr(0, at));
        std::string changed = text;
        changed[at] = char(changed[at] ^ 1);
        run_on(target, changed);
    }
}

// Whether a process that runs the target on `text` ends well. The alarm is for an input that never ends.
bool survives(const Target& target, const std::string& text) {
    pid_t child = fork();
    if (child == 0) {
        alarm(300);
        [&]() noexcept { run_near(target, text); }();    // an exception ends it: GoogleTest would catch it
        _exit(0);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

std::vector<fs::path> files_of(const fs::path& folder) {
    std::vector<fs::path> files;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(folder, error)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    return files;
}

struct Input {
    Target target;
    fs::path file;
};
void PrintTo(const Input& input, std::ostream* out) { *out << input.file.string(); }

std::vector<Input> all_inputs() {
    std::vector<Input> inputs;
    for (const Target& target : TARGETS)
        for (const fs::path& file : files_of(fs::path("tests/fuzz/corpus") / target.name))
            inputs.push_back({target, file});
    return inputs;
}

// Death tests run first, so these processes are forked before any loop has started threads.
class CorpusDeathTest : public testing::TestWithParam<Input> {};
INSTANTIATE_TEST_SUITE_P(Fuzz, CorpusDeathTest, testing::ValuesIn(all_inputs()));
TEST_P(CorpusDeathTest, Survives) { EXPECT_TRUE(survives(GetParam().target, read_file(GetParam().file))); }

TEST(FuzzDeathTest, HasFilesForEachTarget) {
    for (const Target& target : TARGETS)
        EXPECT_FALSE(files_of(fs::path("tests/fuzz/corpus") / target.name).empty()) << target.name;
}

// A seed that is refused at once would show nothing (cache_seeds.py makes them anew).
TEST(FuzzDeathTest, SeedsOfCachesAreAccepted) {
    for (const char* seed : {"none", "plain", "drafted"}) {
        std::string text = read_file(fs::path("tests/fuzz/corpus/cache") / seed);
        EXPECT_EXIT(_exit(use_cache(text) ? 0 : 1), testing::ExitedWithCode(0), "") << seed;
    }
}

TEST(FuzzDeathTest, AFindIsSeen) {
    Target broken = {"broken", [](const uint8_t* data, size_t size) {
        return fuzz_one(data, size, [](std::string_view text) {
            if (text == "ab") throw std::logic_error("planted, to see that it is seen");
        });
    }};
    EXPECT_TRUE(survives(broken, "a"));
    EXPECT_FALSE(survives(broken, "abc"));
}

}  // namespace fuzz
