// tokenizer.json; with a file that is accepted, a fixed text goes to ids and back.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Tokenizer tokenizer = Tokenizer::parse(text, "{}", "fuzz");
        const char* fixed = "Don't  a 1234 \xC3\xA9\xE4\xBD\xA0\xF0\x9F\x98\x80\n\n<x>aaaaaaaa";
        std::vector<int> ids = tokenizer.encode(fixed);
        for (int id : ids) FUZZ_CHECK(id >= 0 && id < tokenizer.vocab_size());
        std::string back = tokenizer.decode(ids);
        FUZZ_CHECK(simdjson::validate_utf8(back.data(), back.size()));
    });
}
