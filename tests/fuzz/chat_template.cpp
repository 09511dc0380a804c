// A chat template in Jinja. What is canonical stays as it is but for Jinja's final newline, and what Jinja
// drops changes no verdict.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        using tokenizer_detail::recognise_template;
        auto known = recognise_template(text);
        std::string jinja(text);
        if (known.first) {
            FUZZ_CHECK(recognise_template("{# ... #}" + jinja) == known);
            FUZZ_CHECK(text.ends_with('\n') || recognise_template(jinja + "\n") == known);
        }
        tokenizer_detail::canonical_template(text);
    });
}
