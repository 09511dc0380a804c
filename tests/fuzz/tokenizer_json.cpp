// tokenizer.json; with a file that is accepted, fixed texts go to ids and back.
#include "fuzz.h"

constexpr const char* TEXTS[] = {"ab aab<x>ab",
                                 "Don't  a 1234 \xC3\xA9\xE4\xBD\xA0\xF0\x9F\x98\x80\n\n<x>aaa"};

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Tokenizer tokenizer = Tokenizer::parse(text, "{}", "fuzz");
        for (const char* fixed : TEXTS)
            fuzz_one(nullptr, 0, [&](std::string_view) {             // a byte may have no token
                std::vector<int> ids = tokenizer.encode(fixed);
                for (int id : ids) FUZZ_CHECK(id >= 0 && id < tokenizer.vocab_size());
                std::string back = tokenizer.decode(ids);
                FUZZ_CHECK(simdjson::validate_utf8(back.data(), back.size()));
            });
    });
}
