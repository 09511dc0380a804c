// The messages of a chat, which anyone may send, rendered with each known template.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Chat chat = parse_chat(text);
        Tokenizer tokenizer;
        for (const tokenizer_detail::KnownTemplate& known : tokenizer_detail::KNOWN_TEMPLATES) {
            tokenizer.set_chat_template(known.name);
            fuzz_one(nullptr, 0, [&](std::string_view) {             // one may refuse what another renders
                std::string prompt = tokenizer.render(chat.messages, chat.add_generation_prompt);
                FUZZ_CHECK(simdjson::validate_utf8(prompt.data(), prompt.size()));
            });
        }
    });
}
