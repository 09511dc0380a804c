// Runs every target on every file of its corpus, without libFuzzer: seeds, and inputs that once broke one.
//
//   g++ -std=c++20 -O1 -pthread tests/fuzz/replay.cpp -o build/replay -lsimdjson -lpcre2-8 -lutf8proc
//   build/replay [CORPUS]       default: tests/fuzz/corpus
//
// Each file runs in a process of its own, as a find ends it. It runs whole, cut short, and with single bits
// changed: near neighbours that a fuzzer would try first.
#include "fuzz.h"

#include <sys/wait.h>

#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "safetensors.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_index
#include "index.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_config
#include "config.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer_json
#include "tokenizer_json.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_messages
#include "messages.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_gguf
#include "gguf.cpp"
#undef LLVMFuzzerTestOneInput

struct Target {
    const char* name;
    int (*run)(const uint8_t* data, size_t size);
};
constexpr Target TARGETS[] = {{"safetensors", fuzz_safetensors},
                              {"index", fuzz_index},
                              {"config", fuzz_config},
                              {"tokenizer_json", fuzz_tokenizer_json},
                              {"messages", fuzz_messages},
                              {"gguf", fuzz_gguf}};

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
        run_near(target, text);
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

int main(int argc, char** argv) {
    fs::path corpus = argc > 1 ? argv[1] : "tests/fuzz/corpus";
    int passed = 0, failed = 0;
    auto count = [&](bool good, const std::string& name) {
        (good ? passed : failed)++;
        if (!good) std::fprintf(stderr, "FAILED %s\n", name.c_str());
    };
    Target broken = {"broken", [](const uint8_t* data, size_t size) {
        return fuzz_one(data, size, [](std::string_view text) {
            if (text == "ab") throw std::logic_error("planted, to see that it is seen");
        });
    }};
    count(survives(broken, "a") && !survives(broken, "abc"), "a find must be seen");
    for (const Target& target : TARGETS) {
        std::vector<fs::path> files = files_of(corpus / target.name);
        if (files.empty()) count(false, (corpus / target.name).string() + ": no files");
        for (const fs::path& file : files) count(survives(target, read_file(file)), file.string());
    }
    std::printf("fuzz-corpus: %d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
