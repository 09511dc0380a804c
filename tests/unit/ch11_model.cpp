// Chapter 11: every tensor in its place, one answer however a prompt is cut, and all of it on any device.
#include "unit.h"
#include <list>

struct Variant {
    const char* name;
    Keys keys;
    const char* dtype;
    Dtype kv = REAL;
};
static std::vector<Variant> variants() {
    Keys latent = with(tiny_v3(), {{"kv_lora_rank", "64"}, {"qk_rope_head_dim", "32"}});   // rows for Q8_0
    Keys dense = with(tiny_dense("llama"), {{"head_dim", "32"}});
    return {{"v3", tiny_v3(), "BF16"},
            {"v2-lite", tiny_v2_lite(), "F32"},
            {"fp8", tiny_fp8(), "F8_E4M3"},
            {"f16", tiny_v3(), "F16"},
            {"qwen2", tiny_dense("qwen2"), "BF16"},
            {"llama", tiny_dense("llama"), "BF16"},
            {"qwen3", tiny_dense("qwen3"), "BF16"},
            {"v3, cache in bf16", tiny_v3(), "BF16", Dtype::BF16},
            {"qwen2, cache in bf16", tiny_dense("qwen2"), "BF16", Dtype::BF16},
            {"v3, cache in q8_0", latent, "BF16", Dtype::Q8_0},
            {"llama, cache in q8_0", dense, "BF16", Dtype::Q8_0}};
}

// -- 11.1 bind --------------------------------------------------------------------------------------

// A checkpoint in memory, so that one tensor can be taken away or changed.
struct Loose {
    Config config;
    std::vector<FileTensor> list;
    Checkpoint checkpoint;

    Loose(const Keys& keys, const char* dtype)
        : config(config_of(keys)), list(random_tensors(keys, dtype, 1)) {
        for (const FileTensor& t : list)
            checkpoint.tensors[t.name] = {"f", t.dtype, t.shape,
                                          reinterpret_cast<const std::byte*>(t.data.data()), t.data.size()};
    }
    void bind() {
        Model model;
        model.config = config;
        Binder binder(&checkpoint, "folder", config.fp8);
        bind_model(binder, model);
        binder.finish();
    }
    // Binds with tensor `name` changed, then changes it back.
    testing::AssertionResult refused(const std::string& name, const std::function<void(Tensor&)>& change) {
        Tensor before = checkpoint.tensors.at(name);
        change(checkpoint.tensors.at(name));
        auto result = refuses([&] { bind(); }, "'" + name + "'");
        checkpoint.tensors.at(name) = before;
        return result;
    }
};

TEST(Bind, TakesEachTensorOfEachArchitecture) {
    for (const Variant& v : variants()) EXPECT_NO_THROW(Loose(v.keys, v.dtype).bind()) << v.name;
}
TEST(Bind, NamesATensorThatIsMissing) {
    for (const Variant& v : variants()) {
        Loose loose(v.keys, v.dtype);
        for (const FileTensor& t : loose.list) {
            auto node = loose.checkpoint.tensors.extract(t.name);
            EXPECT_TRUE(refuses([&] { loose.bind(); }, "no tensor '" + t.name + "'"));
            loose.checkpoint.tensors.insert(std::move(node));
        }
    }
}
TEST(Bind, NamesATensorOfAnotherShape) {
    for (const Variant& v : variants()) {
        Loose loose(v.keys, v.dtype);
        for (const FileTensor& t : loose.list) {
            EXPECT_TRUE(loose.refused(t.name, [](Tensor& x) { x.shape[0]++; }));
            EXPECT_TRUE(loose.refused(t.name, [](Tensor& x) { x.shape.push_back(1); }));
            EXPECT_TRUE(loose.refused(t.name, [](Tensor& x) { x.shape.clear(); }));
        }
    }
}
TEST(Bind, NamesATensorOfAnotherDtype) {
    Loose loose(tiny_v3(), "BF16");
    for (const FileTensor& t : loose.list) {
        for (const char* dtype : {"I32", t.shape.size() > 1 ? "F64" : "U8", "F8_E5M2", "F8_E4M3", "BOOL"})
            EXPECT_TRUE(loose.refused(t.name, [&](Tensor& x) { x.dtype = dtype; })) << dtype;
    }
}
TEST(Bind, NamesATensorThatHasNoPlace) {
    for (const Variant& v : variants()) {
        Loose loose(v.keys, v.dtype);
        loose.checkpoint.tensors["model.layers.0.extra\n"] = {"f", "F32", {1}, nullptr, 4};
        EXPECT_TRUE(refuses([&] { loose.bind(); }, "f: tensor 'model.layers.0.extra?' has no place"))
            << v.name;
    }
}
TEST(Bind, LeavesOldBuffersAlone) {
    for (const char* name : {"layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq",
                             "layers.1.self_attn.rotary_emb.cos_cached", "layers.1.self_attn.bias",
                             "layers.0.self_attn.masked_bias", "causal_mask"}) {
        Loose loose(tiny_dense("llama"), "BF16");
        loose.checkpoint.tensors[std::string("model.") + name] = {"f", "F32", {5}, nullptr, 20};
        EXPECT_NO_THROW(loose.bind()) << name;
    }
}
// What vectors and scales are does not depend on the type that a file has them in.
TEST(LoadModel, TakesNormsAndScalesInAnyType) {
    auto tensors = random_tensors(tiny_fp8(), "F8_E4M3", 1);
    for (FileTensor& t : tensors) {                    // to what BF16 holds, so that every type holds it
        if (!t.name.ends_with("_scale_inv")) continue;
        for (size_t i = 0; i < t.data.size(); i += 4) t.data[i] = t.data[i + 1] = 0;
    }
    Model before = load_model(write_model("as-f32", tiny_fp8(), tensors));
    for (FileTensor& t : tensors) {
        bool scale = t.name.ends_with("_scale_inv"), norm = t.name.ends_with("norm.weight");
        std::string other;
        for (size_t i = 0; scale && i < t.data.size(); i += 4) other += t.data.substr(i + 2, 2);
        for (size_t i = 0; norm && i < t.data.size(); i += 2) {
            double wide = bf16_to_float(load<uint16_t>(t.data.data() + i));
            append_bytes(other, &wide, 8);
        }
        if (scale) t.dtype = "BF16", t.data = other;
        if (norm) t.dtype = "F64", t.data = other;
    }
    Model after = load_model(write_model("as-bf16", tiny_fp8(), tensors));
    EXPECT_GT(after.checkpoint.widened.size(), 50u);
    std::vector<int> ids = random_ids(9, before.config.V);
    EXPECT_TRUE(same_bits(answer(before, ids).logits, answer(after, ids).logits));
}
TEST(LoadModel, RefusesAMatrixInF64) {
    auto tensors = random_tensors(tiny_dense("llama"), "BF16", 1);
    for (FileTensor& t : tensors)
        if (t.name.ends_with("o_proj.weight")) t.dtype = "F64", t.data.resize(4 * t.data.size());
    fs::path folder = write_model("f64", tiny_dense("llama"), tensors);
    EXPECT_TRUE(refuses([&] { load_model(folder); }, "o_proj.weight' is F64"));
}
TEST(LoadModel, RefusesATiedHeadThatIsAnother) {
    Keys keys = with(tiny_dense("qwen2"), {{"tie_word_embeddings", "true"}});
    auto tensors = random_tensors(keys, "BF16", 1);
    FileTensor head = tensors[0];
    ASSERT_EQ(head.name, "model.embed_tokens.weight");
    head.name = "lm_head.weight";
    tensors.push_back(head);
    EXPECT_NO_THROW(load_model(write_model("tied-copy", keys, tensors)));
    tensors.back().data[100] ^= 1;
    fs::path folder = write_model("tied-other", keys, tensors);
    EXPECT_TRUE(refuses([&] { load_model(folder); }, "'lm_head.weight' is not 'model.embed_tokens.weight'"));
}
TEST(LoadModel, RefusesTwoModelsInOneFolder) {
    fs::path folder = write_model("two", tiny_dense("llama"), random_tensors(tiny_dense("llama"), "BF16", 1));
    write_text(folder / "a.safetensors", safetensors_of({{"a", "U8", {1}, "x"}}));
    write_text(folder / "model.safetensors.index.json", R"({"weight_map":{"a":"a.safetensors"}})");
    EXPECT_TRUE(refuses([&] { load_model(folder); },
                        "model.safetensors.index.json does not name model.safetensors"));
}

// config.json and the files about the MTP module: the main model is the same, whoever is wrong.
struct Disagreement {
    const char* says;                      // num_nextn_predict_layers; nullptr: absent
    bool there;
    int n_mtp;
    const char* notice;
};
TEST(LoadModel, TheMtpModuleIsThereWhenConfigAndFilesSaySo) {
    Keys none = without(tiny_v3(), "num_nextn_predict_layers");
    std::vector<int> ids = random_ids(9, 31);
    Vector expected = answer(load_model(write_model("mtp", tiny_v3(), random_tensors(tiny_v3(), "BF16", 1))),
                             ids).logits;
    for (bool index : {false, true})
        for (const Disagreement& d : {Disagreement{"1", true, 1, ""}, {"1", false, 0, "the files have not"},
                                      {"0", false, 0, ""}, {"0", true, 0, "config.json has not"},
                                      {nullptr, true, 0, "config.json has not"}, {nullptr, false, 0, ""}}) {
            SCOPED_TRACE(text_of("%s, %d, index %d", d.says ? d.says : "absent", d.there, index));
            auto tensors = random_tensors(tiny_v3(), "BF16", 1);
            if (!d.there)
                std::erase_if(tensors, [](auto& t) { return t.name.starts_with("model.layers.3."); });
            fs::path folder = write_model(text_of("mtp%s%d%d", d.says ? d.says : "x", d.there, index),
                                          d.says ? with(none, {{"num_nextn_predict_layers", d.says}}) : none,
                                          tensors);
            std::string map;
            for (const FileTensor& t : tensors)
                map += (map.empty() ? "\"" : ",\"") + t.name + "\":\"model.safetensors\"";
            if (index) write_text(folder / "model.safetensors.index.json", "{\"weight_map\":{" + map + "}}");
            testing::internal::CaptureStderr();
            Model model = load_model(folder);
            std::string said = testing::internal::GetCapturedStderr();
            EXPECT_EQ(said.empty(), !*d.notice) << said;
            EXPECT_NE(said.find(d.notice), said.npos) << said;
            EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), *d.notice ? 1 : 0);
            EXPECT_EQ(model.config.n_mtp, d.n_mtp);
            EXPECT_EQ(model.mtp.size(), size_t(d.n_mtp));
            EXPECT_EQ(read_config(folder).n_mtp, d.n_mtp);
            EXPECT_TRUE(same_bits(answer(model, ids).logits, expected));
        }
}

// -- 4.5 generation_config.json ---------------------------------------------------------------------

static GenerationConfig generation_of(const std::string& json) {
    return parse_generation_config(json, "generation_config.json", 100);
}
static std::string sampling_text(const Sampling& s) {
    return text_of("%g %g %g %d %g", s.temperature, s.top_p, s.min_p, s.top_k, s.repeat_penalty);
}
// temperature, top_p, min_p, top_k, penalty: GenerationConfig._get_default_generation_params of transformers
// 5.24 for what is left out.
TEST(GenerationConfig, ReadsWhatTransformersReads) {
    const std::pair<const char*, const char*> table[] = {
        {"{}", "0 1 0 50 1"},                                               // greedy
        {R"({"do_sample":true})", "1 1 0 50 1"},
        {R"({"do_sample":false,"temperature":0.6,"top_p":0.95})", "0 0.95 0 50 1"},
        {R"({"do_sample":true,"temperature":0.6,"top_p":0.95})", "0.6 0.95 0 50 1"},
        {R"({"do_sample":true,"temperature":null,"top_k":0,"min_p":0.1})", "1 1 0.1 0 1"},
        {R"({"do_sample":true,"top_k":20,"repetition_penalty":1.05})", "1 1 0 20 1.05"},
        {R"({"do_sample":true,"max_length":20,"use_cache":false,"length_penalty":2,"pad_token_id":7,)"
         R"("transformers_version":"5.24.0","_from_model_config":true,"renormalize_logits":true})",
         "1 1 0 50 1"}};
    for (auto [json, expected] : table)
        EXPECT_EQ(sampling_text(generation_of(json).sampling), expected) << json;
}
TEST(GenerationConfig, RefusesWhatWouldGiveOtherTokens) {
    // field, its neutral value, another one
    const std::array<const char*, 3> table[] = {
        {"num_beams", "1", "4"}, {"num_beam_groups", "1", "2"}, {"typical_p", "1.0", "0.9"},
        {"encoder_repetition_penalty", "1.0", "1.2"}, {"guidance_scale", "1", "1.5"},
        {"epsilon_cutoff", "0.0", "3e-4"}, {"eta_cutoff", "0.0", "3e-4"}, {"penalty_alpha", "0", "0.6"},
        {"diversity_penalty", "0.0", "1"}, {"no_repeat_ngram_size", "0", "3"},
        {"encoder_no_repeat_ngram_size", "0", "3"}, {"min_length", "0", "5"}, {"min_new_tokens", "0", "5"},
        {"top_h", "null", "0.4"}, {"bad_words_ids", "null", "[[3]]"},
        {"sequence_bias", "null", "[[[3],1.0]]"},
        {"suppress_tokens", "[]", "[3]"}, {"begin_suppress_tokens", "[]", "[3]"},
        {"stop_strings", "[]", "[\"x\"]"},
        {"max_time", "null", "2.0"}, {"constraints", "null", "[1]"}, {"force_words_ids", "null", "[[1]]"},
        {"forced_bos_token_id", "null", "1"}, {"forced_eos_token_id", "null", "1"},
        {"exponential_decay_length_penalty", "null", "[5,1.1]"},
        {"watermarking_config", "null", "{\"bias\":2}"},
        {"dola_layers", "null", "\"low\""}, {"token_healing", "false", "true"},
        {"repetition_penalty", "1.0", "0"}, {"repetition_penalty", "100", "101"}, {"top_p", "1", "1.5"},
        {"temperature", "1", "-1"}, {"top_k", "50", "-1"}, {"eos_token_id", "[3,5]", "[100]"}};
    for (auto [key, neutral, other] : table) {
        EXPECT_NO_THROW(generation_of(text_of("{\"%s\":%s}", key, neutral))) << key;
        EXPECT_TRUE(refuses([&, k = key, o = other] { generation_of(text_of("{\"%s\":%s}", k, o)); },
                            text_of("generation_config.json: '%s'", key)));
    }
}
// generate() stops at generation_config's ids alone; without that file at config.json's.
TEST(GenerationConfig, StopsAreTheFirstThatAreSaid) {
    fs::path folder = scratch("stops");
    Config c;
    c.V = 100, c.eos = {7};
    auto eos = [&](int tokenizer) { return read_generation_config(folder, c, tokenizer).eos; };
    EXPECT_EQ(eos(9), std::vector<int>{7});
    EXPECT_EQ(sampling_text(read_generation_config(folder, c, 9).sampling), "0.6 0.95 0 0 1");   // for R1
    write_text(folder / "generation_config.json", R"({"eos_token_id":[3,5]})");
    EXPECT_EQ(eos(9), (std::vector<int>{3, 5}));
    write_text(folder / "generation_config.json", R"({"do_sample":true})");
    EXPECT_EQ(eos(9), std::vector<int>{7});
    c.eos = {};
    EXPECT_EQ(eos(9), std::vector<int>{9});
    EXPECT_TRUE(eos(-1).empty());
}
TEST(Bind, TakesTheMtpModulesCopiesOfEmbeddingAndHead) {
    for (const char* name :
         {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}) {
        Loose loose(tiny_v3(), "BF16");
        loose.checkpoint.tensors[name] = {"f", "BF16", {31, 24}, nullptr, 31 * 24 * 2};
        EXPECT_NO_THROW(loose.bind());
        EXPECT_TRUE(loose.refused(name, [](Tensor& t) { t.shape = {30, 24}; }));
    }
}
TEST(Bind, TiedModelsHaveOneMatrix) {
    Keys keys = with(tiny_dense("qwen2"), {{"tie_word_embeddings", "true"}});
    Model model = random_model("tied", keys);
    EXPECT_EQ(model.head.data, model.embed.data);
    EXPECT_EQ(model.checkpoint.tensors.count("lm_head.weight"), 0u);
}
TEST(Bind, Fp8NeedsItsScales) {
    Loose loose(tiny_fp8(), "F8_E4M3");
    int scaled = 0;
    for (const FileTensor& t : loose.list) {
        if (!t.name.ends_with("_scale_inv")) continue;
        scaled++;
        EXPECT_TRUE(loose.refused(t.name, [](Tensor& x) { x.dtype = "BF16"; }));
        float bad[16] = {1, INFINITY, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        std::swap(bad[0], bad[t.data.size() > 4 ? 0 : 1]);
        EXPECT_TRUE(
            loose.refused(t.name, [&](Tensor& x) { x.data = reinterpret_cast<const std::byte*>(bad); }));
    }
    EXPECT_GT(scaled, 50);
}
TEST(Bind, Fp8NeedsItsConfig) {
    Loose loose(tiny_fp8(), "F8_E4M3");
    loose.config.fp8 = false;
    EXPECT_TRUE(refuses([&] { loose.bind(); }, "no quantization_config"));
}
TEST(Bind, Fp8EmbeddingsAreRefused) {
    Loose loose(tiny_fp8(), "F8_E4M3");
    std::string scales(100, '\0');
    loose.checkpoint.tensors["model.embed_tokens.weight_scale_inv"] = {
        "f", "F32", {1, 2}, reinterpret_cast<std::byte*>(scales.data()), 8};
    loose.checkpoint.tensors["model.embed_tokens.weight"].dtype = "F8_E4M3";
    EXPECT_TRUE(refuses([&] { loose.bind(); }, "embeddings"));
}
TEST(LoadModel, NamesTheFileOfATensorThatIsMissing) {
    auto tensors = random_tensors(tiny_v3(), "BF16", 1);
    tensors.pop_back();
    fs::path folder = write_model("missing", tiny_v3(), tensors);
    EXPECT_TRUE(refuses([&] { load_model(folder); },
                        folder.string() + ": no tensor 'model.layers.3.eh_proj.weight'"));
}

// -- 11.2 one answer --------------------------------------------------------------------------------

static void expect_same(const Answer& a, const Answer& b, const std::string& label) {
    EXPECT_TRUE(same_bits(a.logits, b.logits)) << label;
    EXPECT_TRUE(same_bits(a.mtp_logits, b.mtp_logits)) << label;
    ASSERT_EQ(a.taps.entries.size(), b.taps.entries.size()) << label;
    for (size_t i = 0; i < a.taps.entries.size(); i++) {
        const Taps::Entry &x = a.taps.entries[i], &y = b.taps.entries[i];
        EXPECT_EQ(x.name, y.name) << label;
        EXPECT_EQ(x.integers, y.integers) << label << " " << x.name;
        EXPECT_TRUE(same_bits(x.values, y.values)) << label << " " << x.name;
    }
}

TEST(Forward, GivesTheSameBitsForEveryChunk) {
    for (const Variant& v : variants()) {
        Model model = random_model("chunks", v.keys, v.dtype);
        std::vector<int> ids = random_ids(70, model.config.V);
        for (MlaForm form : {MlaForm::ABSORBED, MlaForm::NAIVE}) {
            Answer whole = answer(model, ids, {70, 70, form, v.kv}, true);
            for (int chunk : {1, 3, 7, 64})
                expect_same(answer(model, ids, {70, chunk, form, v.kv}, true), whole,
                            text_of("%s, chunk %d", v.name, chunk));
            if (!model.config.mla()) break;
        }
    }
}
TEST(Forward, GivesTheSameBitsForEveryNumberOfThreads) {
    for (const Variant& v : variants()) {
        Model model = random_model("threads", v.keys, v.dtype);
        for (int T : {1, 9, 40}) {
            std::vector<int> ids = random_ids(T, model.config.V);
            Answer expected = answer(model, ids, {T, T, MlaForm::ABSORBED, v.kv}, true);
            for (int threads : {2, 3, 8}) {
                ScopedThreads scoped(threads);
                expect_same(answer(model, ids, {T, T, MlaForm::ABSORBED, v.kv}, true), expected,
                            text_of("%s, %d threads", v.name, threads));
            }
        }
    }
}
TEST(Forward, GivesTheSameBitsWithEveryKernel) {
    for (const Variant& v : variants()) {
        Model model = random_model("kernels", v.keys, v.dtype);
        std::vector<int> ids = random_ids(20, model.config.V);
        Answer expected = answer(model, ids, {20, 20, MlaForm::ABSORBED, v.kv}, true);
        for (const Kernels& k : available_kernels()) {
            ScopedKernels scoped(k);
            expect_same(answer(model, ids, {20, 20, MlaForm::ABSORBED, v.kv}, true), expected,
                        text_of("%s, %s", v.name, k.name));
        }
    }
}
// The largest change of a logit when the cache is kept in `kv`.
static double change_of_logits(const Model& model, const std::vector<int>& ids, Dtype kv) {
    int T = int(ids.size());
    Vector a = answer(model, ids, {T, T, MlaForm::ABSORBED, REAL}).logits;
    Vector b = answer(model, ids, {T, T, MlaForm::ABSORBED, kv}).logits;
    double most = 0;
    for (size_t i = 0; i < a.size(); i++) most = std::max(most, std::fabs(double(a[i]) - double(b[i])));
    return most;
}
// What a cache of q8_0 loses, in units of what one of bf16 loses (the golden tests bound that). A number
// is off by up to d / 2, evenly, so by d / sqrt 12 in the mean square, and d is 1 / 127 of the largest of
// 32, which for normal numbers is 2.4 deviations: 1 / 184 of the deviation. bf16 is off by up to 2^-8 of
// the power of two below a number, 2^-8 / sqrt 3 of it in the mean square: 1 / 600 of the deviation. The
// ratio is 3.3, and of the largest changes within a factor of 3 of that; 1.8 to 5.6 are seen. All layers
// are dense: another choice of experts is no matter of size.
TEST(Forward, ACacheOfQ8_0LosesAFewTimesWhatBf16Does) {
    for (Variant v : variants()) {
        if (v.kv != Dtype::Q8_0) continue;
        v.keys["first_k_dense_replace"] = "3";
        for (uint64_t seed = 1; seed <= 5; seed++) {
            Model model = random_model("kv", v.keys, v.dtype, seed);
            std::vector<int> ids = random_ids(60, model.config.V, seed);
            double bf16 = change_of_logits(model, ids, Dtype::BF16);
            double q8_0 = change_of_logits(model, ids, Dtype::Q8_0);
            EXPECT_GT(bf16, 0) << v.name;
            EXPECT_TRUE(q8_0 > 1.1 * bf16 && q8_0 < 10 * bf16) << v.name << ": " << bf16 << ", " << q8_0;
        }
    }
}
TEST(Forward, ASmallerPastGivesTheSameBitsInALargerContext) {
    Model model = random_model("context", tiny_v3());
    std::vector<int> ids = random_ids(9, 31);
    EXPECT_TRUE(same_bits(answer(model, ids, {9, 9, MlaForm::ABSORBED}).logits,
                          answer(model, ids, {300, 128, MlaForm::ABSORBED}).logits));
}
TEST(Forward, StartsFromTheRowsOfTheEmbedding) {
    Model model = random_model("embed", tiny_v3());
    Answer a = answer(model, {7, 0, 30}, {3, 3, MlaForm::ABSORBED}, true);
    const Taps::Entry& embed = a.taps.entries.at(0);
    ASSERT_EQ(embed.name, "embed");
    Vector row(24);
    for (auto [t, id] : {std::pair{0, 7}, std::pair{1, 0}, std::pair{2, 30}}) {
        widen_plain(row.data(), model.embed, id);
        EXPECT_TRUE(same_bits(embed.values.data() + t * 24, row.data(), 24));
    }
}
// out = (residual + attn_out) + ffn_out; the next layer's norm sees out.
TEST(Forward, AddsBothBranchesToTheResidual) {
    Model model = random_model("residual", tiny_v3());
    Answer a = answer(model, random_ids(5, 31), {5, 5, MlaForm::ABSORBED}, true);
    auto tap = [&](const std::string& name) { return a.taps.entries[a.taps.index.at(name)].values; };
    Vector x = tap("embed");
    for (int l = 0; l < 3; l++) {
        std::string p = text_of("layers.%d.", l);
        Vector attention = tap(p + "attn_out"), ffn = tap(p + "ffn_out");
        for (size_t i = 0; i < x.size(); i++) x[i] = (x[i] + attention[i]) + ffn[i];
        EXPECT_TRUE(same_bits(x, tap(p + "out"))) << l;
    }
}
TEST(Forward, NamesItsTapsInTheOrderOfTheNetwork) {
    Model model = random_model("taps", tiny_v3());
    Answer a = answer(model, random_ids(3, 31), {3, 3, MlaForm::ABSORBED}, true);
    std::vector<std::string> names, expected = {"embed"};
    for (const Taps::Entry& e : a.taps.entries) names.push_back(e.name);
    for (int l = 0; l < 3; l++) {
        for (const char* name :
             {"attn_norm", "c_q", "q_nope", "q_rope", "c_kv", "k_rope", "q_absorbed", "z", "lse", "o",
              "attn_out", "ffn_norm"})
            expected.push_back(text_of("layers.%d.%s", l, name));
        for (const char* name : {"router_logits", "group_score", "choice", "expert_idx", "expert_weight",
                                 "routed_out", "shared_out"})
            if (l > 0) expected.push_back(text_of("layers.%d.%s", l, name));
        for (const char* name : {"ffn_out", "out"}) expected.push_back(text_of("layers.%d.%s", l, name));
    }
    for (const char* name : {"norm", "mtp.in", "mtp.out"}) expected.push_back(name);
    EXPECT_EQ(names, expected);
}
TEST(Forward, HasNoTapOfWhatAFormDoesNotCompute) {
    Model v3 = random_model("taps", tiny_v3()), v2 = random_model("taps_v2", tiny_v2_lite());
    Taps naive = answer(v3, random_ids(3, 31), {3, 3, MlaForm::NAIVE}, true).taps;
    for (const char* name : {"layers.1.q_absorbed", "layers.1.z"}) EXPECT_FALSE(naive.index.count(name));
    for (const char* name : {"layers.1.lse", "layers.1.o"}) EXPECT_TRUE(naive.index.count(name));
    Taps greedy = answer(v2, random_ids(3, 31), {3, 3, MlaForm::ABSORBED}, true).taps;
    EXPECT_FALSE(greedy.index.count("layers.1.group_score"));
    EXPECT_TRUE(greedy.index.count("layers.1.choice"));
}
// What the memory plan says of a result is what it takes.
TEST(Forward, AResultsBillIsItsSize) {
    for (const Variant& v : variants()) {
        Model model = random_model("bill", v.keys, v.dtype);
        for (MlaForm form : {MlaForm::ABSORBED, MlaForm::NAIVE}) {
            for (int past : {0, 3}) {
                Session s(model, {7, 3, form});
                s.tokens = random_ids(7, model.config.V);
                Inside in = look_inside(s, past, true, [](size_t) {});
                InsideBill bill(model.config, form, 7 - past, true);
                size_t logits = 0, mtp_logits = 0, taps = 0;
                for (const OutputTensor& t : in.tensors(true)) {
                    size_t& of = t.name == "logits" ? logits : t.name == "mtp_logits" ? mtp_logits : taps;
                    of += t.dtype == "I32" ? t.bytes / 4 * sizeof(real) : t.bytes;
                }
                EXPECT_EQ(logits, bill.logits) << v.name;
                EXPECT_EQ(mtp_logits, bill.mtp_logits) << v.name;
                EXPECT_EQ(taps, bill.taps) << v.name;
            }
        }
    }
}
// The borders of kernels meet: what one tap holds makes the next.
TEST(Forward, TapsFollowFromEachOther) {
    Model model = random_model("taps", tiny_v3());
    const Config& c = model.config;
    const int T = 6;
    Answer a = answer(model, random_ids(T, 31), {T, 4, MlaForm::ABSORBED}, true);
    auto tap = [&](const std::string& name) {
        return a.taps.entries[a.taps.index.at("layers.1." + name)].values;
    };
    Vector o = tap("o"), y(size_t(T * c.D)), sum = tap("routed_out"), shared = tap("shared_out");
    matmul({y.data(), c.D}, {o.data(), c.H * c.Dv}, model.layers[1].mla.wo, T);
    EXPECT_TRUE(same_bits(y, tap("attn_out")));
    for (size_t i = 0; i < sum.size(); i++) sum[i] += shared[i];
    EXPECT_TRUE(same_bits(sum, tap("ffn_out")));
    Vector q = tap("q_absorbed"), rope = tap("q_rope"), z = tap("z"), choice = tap("choice");
    const int width = c.Rkv + c.Dr;
    for (int64_t i = 0; i < T * c.H; i++)
        EXPECT_TRUE(same_bits(q.data() + i * width + c.Rkv, rope.data() + i * c.Dr, size_t(c.Dr))) << i;
    for (int h = 0; h < c.H; h++) {
        matmul({y.data(), c.Dv}, {z.data() + h * c.Rkv, c.H * c.Rkv}, model.layers[1].mla.wv_b[size_t(h)], 1);
        EXPECT_TRUE(same_bits(y.data(), o.data() + h * c.Dv, size_t(c.Dv))) << h;
    }
    std::vector<int> idx(size_t(T * c.K));
    for (int t = 0; t < T; t++) top_k(idx.data() + t * c.K, choice.data() + t * c.E, c.E, c.K);
    EXPECT_EQ(idx, a.taps.entries[a.taps.index.at("layers.1.expert_idx")].integers);
}
TEST(Prefill, ReportsEachChunk) {
    Model model = random_model("prefill", tiny_v3());
    Session s(model, {10, 4, MlaForm::ABSORBED});
    std::vector<std::pair<int, int>> seen;
    prefill(s, random_ids(10, 31), 0, [&](int pos, int T) { seen.push_back({pos, T}); });
    EXPECT_EQ(seen, (std::vector<std::pair<int, int>>{{0, 4}, {4, 4}, {8, 2}}));
    EXPECT_EQ(s.length, 10);
}
TEST(Prefill, StopsWhenInterrupted) {
    Model model = random_model("prefill", tiny_v3());
    Session s(model, {10, 4, MlaForm::ABSORBED});
    EXPECT_THROW(prefill(s, random_ids(10, 31), 0, [&](int, int) { interrupted = 1; }), Interrupted);
    interrupted = 0;
    EXPECT_EQ(s.length, 4);
}

// -- 11.1 the walk over all weights -----------------------------------------------------------------

TEST(EachMatrix, MeetsEveryNumberOfTheModel) {
    for (const Variant& v : variants()) {
        Model model = random_model("walk", v.keys, v.dtype);
        uint64_t numbers = 0, bytes = 0;
        std::set<const void*> met;
        each_matrix(model, [&](Matrix& w, Role role) {
            if (!w || (role == Role::HEAD && model.config.tied)) return;
            EXPECT_TRUE(met.insert(w.data).second);
            numbers += uint64_t(w.rows) * uint64_t(w.cols);
        });
        each_vector(model, [&](std::span<const real>& x) {
            EXPECT_TRUE(x.empty() || met.insert(x.data()).second);
            numbers += x.size(), bytes += x.size() * sizeof(real);
        });
        EXPECT_EQ(numbers, count_parameters(model.config)) << v.name;
        uint64_t of_vectors = 0;
        for (const Vector& x : model.vectors) of_vectors += x.size() * sizeof(real);
        EXPECT_EQ(bytes, of_vectors) << v.name;
    }
}

// -- 11.1 a device ----------------------------------------------------------------------------------

// A device whose memory nothing but its own operations may touch: the system would end the program. They are
// the CPU's, and counted.
namespace elsewhere {
struct Block { void* data; size_t bytes; };
static std::list<Block> blocks;
static std::map<std::string, int> calls;

static void allow(bool access) {
    for (const Block& b : blocks) mprotect(b.data, b.bytes, access ? PROT_READ | PROT_WRITE : PROT_NONE);
}
template <class Body> static void count(const char* name, const Body& body) {
    calls[name]++;
    allow(true), body(), allow(false);
}
static std::shared_ptr<std::byte> memory(size_t bytes) {
    auto pages = std::make_shared<Pages>(bytes);
    if (bytes == 0) return {};
    auto at = blocks.insert(blocks.end(), {pages->data(), bytes});
    allow(false);
    return {pages->data(), [pages, at](std::byte*) { blocks.erase(at); }};
}
static void read(void* to, const void* from, size_t bytes) {
    count("read", [&] { CPU.read(to, from, bytes); });
}
static void write(void* to, const void* from, size_t bytes) {
    count("write", [&] { CPU.write(to, from, bytes); });
}
static void forward(Session& s, std::span<const int> ids, int pos) {
    count("forward", [&] { CPU.forward(s, ids, pos); });
}
static void head(const Session& s, real* logits, const real* h, int T) {
    count("head", [&] { CPU.head(s, logits, h, T); });
}
static Choice choose_next(const Session& s, const real* h, const Sampling& sampling, double at) {
    Choice choice;
    count("head", [&] { choice = CPU.choose_next(s, h, sampling, at); });
    return choice;
}
static void mtp_forward(Session& s, const real* h, std::span<const int> next, int pos) {
    count("mtp_forward", [&] { CPU.mtp_forward(s, h, next, pos); });
}
static void upload(Model&, const std::function<void(size_t, size_t)>&) { calls["upload"]++; }

static Device device() {
    calls.clear();
    Device d = CPU;
    d.name = "elsewhere", d.memory = memory, d.read = read, d.write = write, d.forward = forward;
    d.head = head, d.choose_next = choose_next, d.mtp_forward = mtp_forward, d.upload = upload;
    d.available = [] { return uint64_t(100'000'000); };
    return d;
}
}

TEST(Device, ItsMemoryIsNotOurs) {
    Device device = elsewhere::device();
    std::shared_ptr<std::byte> p = device.memory(1);
    EXPECT_DEATH(*p = std::byte{1}, "");
}
TEST(Device, GivesWhatTheCpuGives) {
    Device device = elsewhere::device();
    for (const Variant& v : variants()) {
        Model model = random_model("device", v.keys, v.dtype);
        SessionOptions options{20, 7, MlaForm::ABSORBED, v.kv};
        std::vector<int> ids = random_ids(20, 31);
        Answer here = answer(model, ids, options), there = answer(model, ids, options, false, device);
        EXPECT_TRUE(same_bits(here.logits, there.logits)) << v.name;
        EXPECT_TRUE(same_bits(here.mtp_logits, there.mtp_logits)) << v.name;
        EXPECT_GE(std::exchange(elsewhere::calls["forward"], 0), 3) << v.name;
        EXPECT_GE(std::exchange(elsewhere::calls["head"], 0), 3) << v.name;
        EXPECT_EQ(std::exchange(elsewhere::calls["mtp_forward"], 0) > 0, model.config.n_mtp > 0) << v.name;
    }
}
TEST(Device, GeneratesWithAndWithoutDrafts) {
    Device device = elsewhere::device();
    Model model = random_model("device", tiny_v3());
    std::vector<int> prompt = random_ids(12, 31), said[2];
    for (bool mtp : {false, true}) {
        for (const Device* d : {&CPU, static_cast<const Device*>(&device)}) {
            Session s(model, {64, 8, MlaForm::ABSORBED}, *d);
            Generation g;
            g.sampling.temperature = 0, g.max_tokens = 20, g.drafting = mtp ? &MTP_DRAFTS : nullptr;
            said[d != &CPU].clear();
            generate(s, prompt, g, [](int) {}, [&](int id) { said[d != &CPU].push_back(id); return true; });
        }
        EXPECT_EQ(said[0].size(), 20u);
        EXPECT_EQ(said[0], said[1]);
        EXPECT_EQ(elsewhere::calls["mtp_forward"] > 0, mtp);
    }
}
TEST(Device, MeasuresPerplexity) {
    Device device = elsewhere::device();
    Model model = random_model("device", tiny_dense("qwen2"));
    std::vector<int> ids = random_ids(40, 31);
    Session here(model, {16, 8, MlaForm::ABSORBED}), there(model, {16, 8, MlaForm::ABSORBED}, device);
    EXPECT_EQ(perplexity(here, ids, -1, [](size_t) {}).nll, perplexity(there, ids, -1, [](size_t) {}).nll);
    EXPECT_EQ(elsewhere::calls["head"], 40 - 3);
}
// What one device saved the other loads, and both go on in the same way.
TEST(Device, SavesAndLoadsItsCache) {
    Device device = elsewhere::device();
    fs::path folder = scratch("device_cache");
    for (const Keys& keys : {tiny_v3(), tiny_dense("llama")}) {
        Model model = random_model("device", keys);
        std::vector<int> ids = random_ids(9, 31), next = {3};
        Vector expected;
        for (const Device* from : {&CPU, static_cast<const Device*>(&device)}) {
            for (const Device* to : {&CPU, static_cast<const Device*>(&device)}) {
                elsewhere::calls.clear();
                SessionOptions options{10, 8, MlaForm::ABSORBED, Dtype::BF16};
                Session a(model, options, *from), b(model, options, *to);
                a.tokens = ids;
                prefill(a, ids, 0, [&](int, int) { if (model.config.n_mtp) mtp_catch_up(a); });
                AtomicFile file((folder / "kv").string(), true);
                save_cache(a, file);
                load_cache(b, folder / "kv");
                EXPECT_EQ(b.tokens, ids);
                EXPECT_EQ(b.mtp_length, model.config.n_mtp ? 8 : 0);
                b.device.forward(b, next, 9);
                Vector logits = last_logits(b, 1);
                if (expected.empty()) expected = logits;
                EXPECT_TRUE(same_bits(logits, expected));
                EXPECT_EQ(elsewhere::calls["read"] > 0, from != &CPU);
                EXPECT_EQ(elsewhere::calls["write"] > 0, to != &CPU);
            }
        }
    }
}
