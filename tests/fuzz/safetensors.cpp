// A whole safetensors file. What is accepted must cover the bytes, without overlap and without gap.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        TensorFile file = parse_safetensors(std::as_bytes(std::span(text.data(), text.size())), "fuzz");
        uint64_t at = file.data_begin;
        for (const TensorInfo& t : file.tensors) {
            uint64_t bytes = dtype_width(t.dtype);
            for (uint64_t n : t.shape) bytes *= n;
            FUZZ_CHECK(file.data_begin + t.begin == at && bytes == t.end - t.begin);
            at += bytes;
        }
        FUZZ_CHECK(at == text.size());
    });
}
