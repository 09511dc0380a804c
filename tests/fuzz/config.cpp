// config.json, and what is computed from it before any file is opened: the tensors it asks for, the rope
// table, the memory plan. No sum may wrap: each is compared with its largest terms, in long double.
#include "fuzz.h"

inline void check_plan(const Config& c, const SessionOptions& s) {
    using wide = long double;
    Device many = CPU;
    many.threads = [] { return 4096; };
    wide threads = many.threads(), activations = wide(Activations::bytes(c, s, many));
    wide numbers = wide(c.n_layers + c.n_mtp) * s.context * c.cache_width();
    wide cache = numbers / format_of(s.kv).values * format_of(s.kv).bytes;
    wide expanded = wide(c.Rkv) + c.Dr + c.q_dim() + c.Dv;
    wide naive = s.mla == MlaForm::NAIVE && c.mla() ? threads * s.context * expanded : 0;
    wide chunk = s.chunk, scores = threads * QUERY_TILE * s.context;
    wide part = std::max({chunk * c.H * c.q_dim(), chunk * c.ffn_width, chunk * c.K * c.D,
                          chunk * c.n_shared * c.F, scores, naive});
    FUZZ_CHECK(wide(cache_bytes(c, s.context, s.kv)) == cache);
    FUZZ_CHECK(activations >= part * sizeof(real));
    FUZZ_CHECK(cache + activations < 0x1p64L);
}

inline void check_parameters(const Config& c, uint64_t counted) {
    using wide = long double;
    wide most = wide(c.V) * c.D;
    for (int l = 0; l < c.n_layers; l++) {
        most += c.is_moe(l) ? 3 * wide(c.E) * c.D * c.F : 3 * wide(c.D) * c.ffn_width;
        most += wide(c.H) * c.v_dim() * c.D;
    }
    FUZZ_CHECK(wide(counted) >= most && most < 0x1p64L);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return fuzz_one(data, size, [](std::string_view text) {
        Model m;
        m.config = parse_config(text, "fuzz");
        const Config& c = m.config;
        Binder binder(nullptr, "", c.fp8);
        if (c.n_layers * (c.E + 1) < 1000) bind_model(binder, m), check_parameters(c, binder.parameters);
        Rope rope = make_rope(c.rope, std::min(c.rope_dim(), 256));
        for (double f : rope.frequency) FUZZ_CHECK(std::isfinite(f));
        for (MlaForm form : {MlaForm::ABSORBED, MlaForm::NAIVE}) {
            check_plan(c, {c.max_context, 65536, form, REAL});
            check_plan(c, {c.max_context, 65536, form, Dtype::BF16});
            if (cache_part_width(c) % 32 == 0) check_plan(c, {c.max_context, 65536, form, Dtype::Q8_0});
        }
    });
}
