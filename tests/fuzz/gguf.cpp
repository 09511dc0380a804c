// A GGUF file: the container, the model in it with a forward pass of one token, and the vocabulary.
#include "fuzz.h"

// No tensor may reach beyond the file, nor into another one.
inline void check_tensors(const Gguf& g, std::string_view text) {
    std::vector<std::pair<const std::byte*, const std::byte*>> all;
    for (const auto& [name, t] : g.tensors) all.emplace_back(t.data, t.data + t.bytes);
    std::sort(all.begin(), all.end());
    auto at = reinterpret_cast<const std::byte*>(text.data());
    for (auto [begin, end] : all) {
        FUZZ_CHECK(begin >= at && end >= begin);
        at = end;
    }
    FUZZ_CHECK(at <= reinterpret_cast<const std::byte*>(text.data() + text.size()));
}

inline void run_model(Gguf g) {
    Model m;
    m.config = parse_gguf_config(g);
    m.rope = make_rope(m.config.rope, std::min(m.config.rope_dim(), 256));
    m.checkpoint = make_gguf_checkpoint(std::move(g));
    Binder binder(&m.checkpoint, "fuzz", false);
    bind_model(binder, m);
    binder.finish();
    if (m.config.rope_dim() > 256) return;
    Session s(m, {2, 1, MlaForm::ABSORBED, REAL});      // all sizes come from tensors that are in the file
    std::vector<real> logits(size_t(m.config.V));
    for (int pos : {0, 1}) forward(s, std::vector<int>{m.config.V - 1}, pos);
    head(s, logits.data(), s.a.h, 1);
}

inline void use_vocabulary(const GgufKeys& keys) {
    Tokenizer tokenizer = make_tokenizer(gguf_vocabulary(keys), "fuzz");
    std::vector<int> ids = tokenizer.encode("ab abc<a>h");
    for (int id : ids) FUZZ_CHECK(id >= 0 && id < tokenizer.vocab_size());
    std::string back = tokenizer.decode(ids);
    FUZZ_CHECK(simdjson::validate_utf8(back.data(), back.size()));
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Gguf g;
        g.keys = parse_gguf(g, std::as_bytes(std::span(text.data(), text.size())), "fuzz");
        check_tensors(g, text);
        g.keys.architecture = g.keys.text("general.architecture");
        fuzz_one(nullptr, 0, [&](std::string_view) { use_vocabulary(g.keys); });
        run_model(std::move(g));
    });
}
