// generation_config.json: numbers within their ranges, ids within the vocabulary.
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        constexpr int V = 1000;
        GenerationConfig g = parse_generation_config(text, "fuzz", V);
        const Sampling& s = g.sampling;
        FUZZ_CHECK(s.temperature >= 0 && s.temperature <= 100 && s.top_p > 0 && s.top_p <= 1);
        FUZZ_CHECK(s.min_p >= 0 && s.min_p <= 1 && s.top_k >= 0);
        FUZZ_CHECK(s.repeat_penalty > 0 && s.repeat_penalty <= 100);
        for (int id : g.eos) FUZZ_CHECK(id >= 0 && id < V);
        const real logits[] = {1, -2, 0.5, 3};
        double sum = 0;
        for (const Candidate& c : distribution(logits, 4, s)) sum += c.p;
        FUZZ_CHECK(std::abs(sum - 1) < 1e-9);
    });
}
