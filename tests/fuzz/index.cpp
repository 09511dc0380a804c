// model.safetensors.index.json. Every shard it names must be a plain name.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        for (auto& [name, shard] : parse_index(text, "fuzz"))
            FUZZ_CHECK(fs::path(shard).filename() == shard && shard.find('\0') == shard.npos);
    });
}
