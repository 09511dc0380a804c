// tokenizer_config.json, beside a tokenizer.json that is right: special tokens are in the vocabulary, and a
// chat is rendered, or its template is not known.
#include "fuzz.h"

constexpr const char* VOCABULARY = R"({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
    "use_regex": false}, "decoder": {"type": "ByteLevel"}, "added_tokens": [{"id": 3, "content": "<x>",
    "normalized": false, "special": true}], "post_processor": {"type": "TemplateProcessing", "single": [
    {"SpecialToken": {"id": "<x>"}}, {"Sequence": {}}]},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})";

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Tokenizer tokenizer = Tokenizer::parse(VOCABULARY, text, "fuzz");
        for (int id : {tokenizer.bos, tokenizer.eos}) FUZZ_CHECK(id >= -1 && id < tokenizer.vocab_size());
        FUZZ_CHECK(tokenizer.add_bos && tokenizer.bos == 3);
        const bool known = tokenizer.chat_template_name() != "unknown";
        std::string prompt;
        fuzz_one(nullptr, 0, [&](std::string_view) { prompt = tokenizer.render({{"user", "a"}}, true); });
        FUZZ_CHECK(prompt.empty() != known && simdjson::validate_utf8(prompt.data(), prompt.size()));
    });
}
