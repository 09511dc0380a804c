// The messages of a chat, which anyone may send, rendered with each known template.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Chat chat = parse_chat(text);
        Tokenizer tokenizer;
        using enum ChatTemplate;
        for (ChatTemplate kind : {V2, V3, R1, R1_DISTILL}) {
            tokenizer.chat_template = kind;
            fuzz_one(nullptr, 0, [&](std::string_view) {             // one may refuse what another renders
                std::string prompt = tokenizer.render(chat.messages, chat.add_generation_prompt);
                FUZZ_CHECK(simdjson::validate_utf8(prompt.data(), prompt.size()));
            });
        }
    });
}
