// Chapter 3: config.json and safetensors, read strictly.
#include "unit.h"

#include <sys/resource.h>

// -- the published models ---------------------------------------------------------------------------

static Keys deepseek_keys(const std::string& type) {
    return {{"model_type", "\"" + type + "\""}, {"qk_nope_head_dim", "128"}, {"qk_rope_head_dim", "64"},
            {"v_head_dim", "128"}, {"kv_lora_rank", "512"}, {"max_position_embeddings", "163840"},
            {"rope_theta", "10000"}, {"rms_norm_eps", "1e-06"}, {"hidden_act", "\"silu\""},
            {"tie_word_embeddings", "false"}, {"attention_bias", "false"}, {"moe_layer_freq", "1"}};
}
static std::string yarn_json(const char* mscale) {
    return text_of(R"({"beta_fast":32,"beta_slow":1,"factor":40,"mscale":%s,"mscale_all_dim":%s,)"
                   R"("original_max_position_embeddings":4096,"type":"yarn"})", mscale, mscale);
}
static Keys v2_lite_keys() {
    return with(deepseek_keys("deepseek_v2"), {{"hidden_size", "2048"},
                                               {"num_hidden_layers", "27"},
                                               {"num_attention_heads", "16"},
                                               {"num_key_value_heads", "16"},
                                               {"q_lora_rank", "null"},
                                               {"intermediate_size", "10944"},
                                               {"moe_intermediate_size", "1408"},
                                               {"n_routed_experts", "64"},
                                               {"n_shared_experts", "2"},
                                               {"num_experts_per_tok", "6"},
                                               {"first_k_dense_replace", "1"},
                                               {"topk_method", "\"greedy\""},
                                               {"scoring_func", "\"softmax\""},
                                               {"n_group", "1"},
                                               {"topk_group", "1"},
                                               {"norm_topk_prob", "false"},
                                               {"routed_scaling_factor", "1.0"},
                                               {"vocab_size", "102400"},
                                               {"rope_scaling", yarn_json("0.707")},
                                               {"eos_token_id", "100001"},
                                               {"pretraining_tp", "1"},
                                               {"seq_aux", "true"}});
}
static Keys v2_keys() {
    return with(v2_lite_keys(),
                {{"hidden_size", "5120"}, {"num_hidden_layers", "60"}, {"num_attention_heads", "128"},
                 {"num_key_value_heads", "128"}, {"q_lora_rank", "1536"}, {"intermediate_size", "12288"},
                 {"moe_intermediate_size", "1536"}, {"n_routed_experts", "160"},
                 {"topk_method", "\"group_limited_greedy\""}, {"n_group", "8"}, {"topk_group", "3"},
                 {"routed_scaling_factor", "16.0"}});
}
static Keys v3_keys() {
    return with(
        deepseek_keys("deepseek_v3"),
        {{"hidden_size", "7168"},
         {"num_hidden_layers", "61"},
         {"num_attention_heads", "128"},
         {"num_key_value_heads", "128"},
         {"q_lora_rank", "1536"},
         {"intermediate_size", "18432"},
         {"moe_intermediate_size", "2048"},
         {"n_routed_experts", "256"},
         {"n_shared_experts", "1"},
         {"num_experts_per_tok", "8"},
         {"first_k_dense_replace", "3"},
         {"topk_method", "\"noaux_tc\""},
         {"scoring_func", "\"sigmoid\""},
         {"n_group", "8"},
         {"topk_group", "4"},
         {"norm_topk_prob", "true"},
         {"routed_scaling_factor", "2.5"},
         {"vocab_size", "129280"},
         {"rope_scaling", yarn_json("1.0")},
         {"eos_token_id", "1"},
         {"num_nextn_predict_layers", "1"},
         {"quantization_config", R"({"activation_scheme":"dynamic","fmt":"e4m3","quant_method":"fp8",)"
                                 R"("weight_block_size":[128,128]})"}});
}

struct Distill {
    const char *name, *type;
    int D, ffn, layers, heads, kv_heads, V;
    const char *eps, *theta;
    uint64_t parameters;
};
static const Distill DISTILLS[] = {
    {"Qwen-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151936, "1e-06", "10000", 1777088000},
    {"Qwen-7B", "qwen2", 3584, 18944, 28, 28, 4, 152064, "1e-06", "10000", 7615616512},
    {"Qwen-14B", "qwen2", 5120, 13824, 48, 40, 8, 152064, "1e-05", "1000000.0", 14770033664},
    {"Qwen-32B", "qwen2", 5120, 27648, 64, 40, 8, 152064, "1e-05", "1000000.0", 32763876352},
    {"Llama-8B", "llama", 4096, 14336, 32, 32, 8, 128256, "1e-05", "500000.0", 8030261248},
    {"Llama-70B", "llama", 8192, 28672, 80, 64, 8, 128256, "1e-05", "500000.0", 70553706496},
};
static const char LLAMA3_ROPE[] = R"({"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,)"
                                  R"("original_max_position_embeddings":8192,"rope_type":"llama3"})";
static Keys distill_keys(const Distill& d) {
    Keys keys = {{"model_type", text_of("\"%s\"", d.type)},
                 {"hidden_size", std::to_string(d.D)},
                 {"intermediate_size", std::to_string(d.ffn)},
                 {"num_hidden_layers", std::to_string(d.layers)},
                 {"num_attention_heads", std::to_string(d.heads)},
                 {"num_key_value_heads", std::to_string(d.kv_heads)},
                 {"vocab_size", std::to_string(d.V)},
                 {"rms_norm_eps", d.eps},
                 {"rope_theta", d.theta},
                 {"max_position_embeddings", "131072"},
                 {"tie_word_embeddings", "false"},
                 {"hidden_act", "\"silu\""}};
    if (std::string(d.type) == "qwen2")
        return with(
            keys, {{"use_sliding_window", "false"}, {"sliding_window", "4096"}, {"max_window_layers", "21"}});
    return with(keys, {{"rope_scaling", LLAMA3_ROPE}, {"attention_bias", "false"}, {"mlp_bias", "false"}});
}

// -- 3.2 config.json: what is read ------------------------------------------------------------------

TEST(Config, V2Lite) {
    Config c = config_of(v2_lite_keys());
    EXPECT_EQ(c.Rq, 0);                        // null: queries are not compressed
    EXPECT_EQ(c.q_dim(), 192);
    EXPECT_EQ(c.cache_width(), 576);
    EXPECT_EQ(c.gate, Gate::GREEDY);
    EXPECT_FALSE(c.sigmoid_affinity || c.norm_topk || c.fp8 || c.tied);
    EXPECT_EQ(c.n_mtp, 0);
    EXPECT_EQ(c.rope.mscale_all_dim, 0.707);
    EXPECT_EQ(c.eos, std::vector<int>{100001});
}
TEST(Config, V2) {
    Config c = config_of(v2_keys());
    EXPECT_EQ(c.gate, Gate::GROUP_LIMITED_GREEDY);
    EXPECT_EQ(c.n_group, 8);
    EXPECT_EQ(c.topk_group, 3);
    EXPECT_EQ(c.routed_scale, 16);
    EXPECT_EQ(c.Rq, 1536);
}
TEST(Config, V3) {
    Config c = config_of(v3_keys());
    EXPECT_EQ(c.gate, Gate::NOAUX_TC);
    EXPECT_TRUE(c.sigmoid_affinity && c.norm_topk && c.fp8);
    EXPECT_EQ(c.routed_scale, 2.5);
    EXPECT_EQ(c.n_mtp, 1);
    EXPECT_EQ(c.rope.scaling, Scaling::YARN);
    EXPECT_EQ(c.rope.factor, 40);
    EXPECT_EQ(c.rope.original_context, 4096);
}
TEST(Config, V3HasThreeDenseLayers) {
    Config c = config_of(v3_keys());
    EXPECT_FALSE(c.is_moe(2));
    EXPECT_TRUE(c.is_moe(3) && c.is_moe(60) && c.is_moe(61));
}
TEST(Config, MoeLayerFreqSkipsLayers) {
    Config c = config_of(with(v3_keys(), {{"moe_layer_freq", "2"}}));
    EXPECT_TRUE(c.is_moe(4) && !c.is_moe(5));
}
TEST(Config, DistillsTakeHeadDimFromHiddenSize) {
    for (const Distill& d : DISTILLS) EXPECT_EQ(config_of(distill_keys(d)).head_dim, 128) << d.name;
}
TEST(Config, OnlyQwen2HasBiases) {
    EXPECT_TRUE(config_of(distill_keys(DISTILLS[0])).qkv_bias);
    EXPECT_FALSE(config_of(distill_keys(DISTILLS[4])).qkv_bias);
}
TEST(Config, LlamaHasLlama3Scaling) {
    RopeConfig rope = config_of(distill_keys(DISTILLS[4])).rope;
    EXPECT_EQ(rope.scaling, Scaling::LLAMA3);
    EXPECT_EQ(rope.theta, 500000);
    EXPECT_EQ(rope.high_freq_factor, 4);
}
TEST(Config, RopeParametersOfNewerFilesMeanTheSame) {
    Keys keys = without(without(distill_keys(DISTILLS[4]), "rope_scaling"), "rope_theta");
    std::string rope = std::string(LLAMA3_ROPE).insert(1, "\"rope_theta\":500000.0,");
    Config c = config_of(with(keys, {{"rope_parameters", rope}}));
    EXPECT_EQ(c.rope.theta, 500000);
    EXPECT_EQ(c.rope.factor, 8);
}
TEST(Config, RopeScalingDefaultIsNone) {
    Config c = config_of(with(v3_keys(), {{"rope_scaling", R"({"rope_type":"default"})"}}));
    EXPECT_EQ(c.rope.scaling, Scaling::NONE);
}
TEST(Config, EosMayBeAList) {
    EXPECT_EQ(config_of(with(v3_keys(), {{"eos_token_id", "[1,5]"}})).eos, (std::vector<int>{1, 5}));
}
TEST(Config, EosMayBeNull) {
    EXPECT_TRUE(config_of(with(v3_keys(), {{"eos_token_id", "null"}})).eos.empty());
}

// -- parameter counts: the checksum of a config -----------------------------------------------------

// Without the MTP module.
static uint64_t main_parameters(const Keys& keys) {
    return count_parameters(config_of(without(keys, "num_nextn_predict_layers")));
}

// With only the K experts that a token meets; gates still see all E, biases compute nothing.
static uint64_t active_parameters(const Keys& keys) {
    Config c = config_of(without(keys, "num_nextn_predict_layers"));
    uint64_t idle = uint64_t(c.E - c.K) * uint64_t(c.D), moe_layers = uint64_t(c.n_layers - c.first_dense);
    c.E = c.K;
    uint64_t biases = c.gate == Gate::NOAUX_TC ? uint64_t(c.K) : 0;
    return count_parameters(c) + moe_layers * (idle - biases);
}

TEST(Parameters, V2Lite) { EXPECT_EQ(main_parameters(v2_lite_keys()), 15706484224u); }
TEST(Parameters, V2) { EXPECT_EQ(main_parameters(v2_keys()), 235741434880u); }
TEST(Parameters, V3) { EXPECT_EQ(main_parameters(v3_keys()), 671026419200u); }
TEST(Parameters, V2Activates21Billion) { EXPECT_EQ(active_parameters(v2_keys()), 21375800320u); }
TEST(Parameters, V3Activates37Billion) { EXPECT_EQ(active_parameters(v3_keys()), 37552282624u); }
TEST(Parameters, V3sMtpModuleHas11Billion) {
    EXPECT_EQ(count_parameters(config_of(v3_keys())) - main_parameters(v3_keys()), 11610068224u);
}
// All numbers of the published checkpoint: the model, the MTP module, its copies of embedding and head, the
// scales.
TEST(Parameters, V3sCheckpointIsAccountedFor) {
    uint64_t copies = 2 * uint64_t(129280) * 7168, scales = 41540496;
    EXPECT_EQ(count_parameters(config_of(v3_keys())) + copies + scales, 684531386000u);
}
TEST(Parameters, Distills) {
    for (const Distill& d : DISTILLS)
        EXPECT_EQ(count_parameters(config_of(distill_keys(d))), d.parameters) << d.name;
}
TEST(Parameters, TyingSavesTheHead) {
    Keys keys = distill_keys(DISTILLS[0]);
    uint64_t tied = count_parameters(config_of(with(keys, {{"tie_word_embeddings", "true"}})));
    EXPECT_EQ(count_parameters(config_of(keys)) - tied, uint64_t(151936) * 1536);
}

// -- 3.2 config.json: what is refused ---------------------------------------------------------------

struct Refusal {
    const char *key, *value;   // value nullptr: the field is absent
    const char* names;         // what the line must name; nullptr: the key
};

static void expect_refusals(const Keys& good, std::span<const Refusal> cases) {
    ASSERT_NO_THROW(config_of(good));
    for (const Refusal& r : cases) {
        Keys bad = r.value ? with(good, {{r.key, r.value}}) : without(good, r.key);
        std::string names = r.names ? r.names : text_of("'%s'", r.key);
        EXPECT_TRUE(refuses([&] { config_of(bad); }, names))
            << r.key << " = " << (r.value ? r.value : "absent");
        EXPECT_TRUE(refuses([&] { config_of(bad); }, "config.json")) << r.key;
    }
}

// The same for a field within rope_scaling, which is good as `json` has it.
static void expect_rope_refusals(const Keys& good, const std::string& json,
                                 const std::vector<Refusal>& cases) {
    for (const Refusal& r : cases) {
        Document document(json, "rope");
        Keys rope;
        Fields fields(document.root, "rope");
        for (auto& [key, value] : fields.all()) rope[key] = simdjson::minify(value);
        Keys bad = r.value ? with(rope, {{r.key, r.value}}) : without(rope, r.key);
        Keys keys = with(good, {{"rope_scaling", json_of(bad)}});
        EXPECT_TRUE(refuses([&] { config_of(keys); }, text_of("rope_scaling: '%s'", r.key)) ||
                    refuses([&] { config_of(keys); }, text_of("rope_scaling: no field '%s'", r.key)) ||
                    refuses([&] { config_of(keys); }, text_of("rope_scaling: unknown field '%s'", r.key)))
            << r.key << " = " << (r.value ? r.value : "absent");
    }
}

TEST(ConfigRefusal, ShapeOfTheNetwork) {
    const Refusal cases[] = {{"model_type", nullptr, nullptr},
                             {"model_type", "3", nullptr},
                             {"model_type", "\"gpt2\"", nullptr},
                             {"model_type", "\"deepseek_v32\"", nullptr},
                             {"model_type", "\"\\u0007\"", "\"?\""},
                             {"hidden_size", nullptr, nullptr},
                             {"hidden_size", "0", nullptr},
                             {"hidden_size", "-1", nullptr},
                             {"hidden_size", "16777217", nullptr},
                             {"hidden_size", "1.5", nullptr},
                             {"hidden_size", "\"8\"", nullptr},
                             {"hidden_size", "null", nullptr},
                             {"hidden_size", "1e30", nullptr},
                             {"hidden_size", "9223372036854775808", nullptr},
                             {"hidden_size", "true", nullptr},
                             {"vocab_size", nullptr, nullptr},
                             {"vocab_size", "0", nullptr},
                             {"num_hidden_layers", "0", nullptr},
                             {"num_hidden_layers", "4097", nullptr},
                             {"num_attention_heads", "0", nullptr},
                             {"num_attention_heads", "65537", nullptr},
                             {"intermediate_size", "0", nullptr},
                             {"max_position_embeddings", "0", nullptr},
                             {"rms_norm_eps", nullptr, nullptr},
                             {"rms_norm_eps", "-1", nullptr},
                             {"rms_norm_eps", "2", nullptr},
                             {"rms_norm_eps", "\"1e-6\"", nullptr},
                             {"tie_word_embeddings", "1", nullptr},
                             {"hidden_act", "\"gelu\"", nullptr},
                             {"attention_bias", "true", nullptr},
                             {"attention_bias", "0", nullptr},
                             {"eos_token_id", "\"x\"", nullptr},
                             {"eos_token_id", "-1", nullptr},
                             {"eos_token_id", "[1,-1]", nullptr},
                             {"eos_token_id", "[1,\"a\"]", nullptr},
                             {"num_nextn_predict_layers", "2", nullptr},
                             {"num_nextn_predict_layers", "-1", nullptr}};
    expect_refusals(v3_keys(), cases);
}
TEST(ConfigRefusal, Mla) {
    const Refusal cases[] = {
        {"q_lora_rank", nullptr, nullptr}, {"q_lora_rank", "0", nullptr}, {"kv_lora_rank", nullptr, nullptr},
        {"kv_lora_rank", "0", nullptr}, {"kv_lora_rank", "null", nullptr}, {"qk_nope_head_dim", "0", nullptr},
        {"qk_rope_head_dim", "1", nullptr}, {"qk_rope_head_dim", "63", "even head dimension"},
        {"v_head_dim", "0", nullptr}, {"num_key_value_heads", "16", nullptr},
        {"qk_nope_head_dim", "1000000", "'num_attention_heads'"}};
    expect_refusals(v3_keys(), cases);
}
TEST(ConfigRefusal, Experts) {
    const Refusal cases[] = {{"n_routed_experts", "0", nullptr},
                             {"n_routed_experts", "65537", nullptr},
                             {"num_experts_per_tok", nullptr, nullptr},
                             {"num_experts_per_tok", "0", nullptr},
                             {"num_experts_per_tok", "257", nullptr},
                             {"num_experts_per_tok", "129", nullptr},   // 4 groups of 32
                             {"moe_intermediate_size", nullptr, nullptr},
                             {"moe_intermediate_size", "0", nullptr},
                             {"moe_intermediate_size", "16777216", "'n_shared_experts'"},
                             {"n_shared_experts", "-1", nullptr},
                             {"n_shared_experts", "1025", nullptr},
                             {"first_k_dense_replace", nullptr, nullptr},
                             {"first_k_dense_replace", "-1", nullptr},
                             {"first_k_dense_replace", "62", nullptr},
                             {"moe_layer_freq", "0", nullptr},
                             {"topk_method", "\"topk\"", nullptr},
                             {"topk_method", "\"greedy\"", nullptr},      // of V2 alone
                             {"scoring_func", "\"relu\"", nullptr},
                             {"scoring_func", "\"softmax\"", nullptr},
                             {"norm_topk_prob", "1", nullptr},
                             {"routed_scaling_factor", "0", nullptr},
                             {"n_group", "null", nullptr},
                             {"n_group", "0", nullptr},
                             {"n_group", "7", nullptr},
                             {"topk_group", "null", nullptr},
                             {"topk_group", "0", nullptr},
                             {"topk_group", "9", nullptr}};
    // Two shared experts, so that the product of widths can leave its range.
    expect_refusals(with(v3_keys(), {{"n_shared_experts", "2"}}), cases);
    // 256 groups of one expert: no second best to add.
    expect_refusals(with(v3_keys(), {{"topk_group", "8"}}), std::array{Refusal{"n_group", "256", nullptr}});
}
TEST(ConfigRefusal, Quantization) {
    const char* key = "quantization_config";
    const Refusal cases[] = {
        {key, "3", key},
        {key, "{}", "'quant_method'"},
        {key, R"({"quant_method":"gptq","weight_block_size":[128,128]})", "'quant_method'"},
        {key, R"({"quant_method":"fp8","fmt":"e5m2","weight_block_size":[128,128]})", "'fmt'"},
        {key, R"({"quant_method":"fp8","activation_scheme":"static","weight_block_size":[128,128]})",
         "'activation_scheme'"},
        {key, R"({"quant_method":"fp8","scale_fmt":"e8m0","weight_block_size":[128,128]})", "'scale_fmt'"},
        {key, R"({"quant_method":"fp8","weight_block_size":null})", "'weight_block_size'"},
        {key, R"({"quant_method":"fp8","expert_dtype":"fp4"})", "'expert_dtype'"},
        {key, R"({"quant_method":"fp8","weight_block_size":128})", "'weight_block_size'"},
        {key, R"({"quant_method":"fp8","weight_block_size":[128]})", "'weight_block_size'"},
        {key, R"({"quant_method":"fp8","weight_block_size":[64,128]})", "'weight_block_size'"},
        {key, R"({"quant_method":"fp8","weight_block_size":[128,1]})", "'weight_block_size'"}};
    expect_refusals(v3_keys(), cases);
}
TEST(ConfigRefusal, Yarn) {
    const char* key = "rope_scaling";
    const Refusal cases[] = {
        {"rope_theta", "0", nullptr},
        {"rope_theta", "\"1e4\"", nullptr},
        {key, "4", key},
        {key, R"({"factor":2})", "'rope_type'"},
        {key, R"({"rope_type":"default","beta_max":2})", "'beta_max'"},
        {key, R"({"type":"default","rope_type":"yarn"})", "'rope_type'"},
        {key, R"({"rope_type":"default","rope_theta":1e5})", "'rope_theta'"},
        {key, R"({"rope_type":"default","partial_rotary_factor":0.5})", "'partial_rotary_factor'"},
        {"original_max_position_embeddings", "8192", nullptr},
        {"partial_rotary_factor", "0.5", nullptr},
        {key, R"({"type":"linear","factor":2})", "'type'"},
        {key, R"({"type":"dynamic","factor":2})", "'type'"},
        {key, LLAMA3_ROPE, "\"llama3\""},
        {"rope_parameters", R"({"rope_type":"default","rope_theta":1e4})", "'rope_scaling'"}};
    expect_refusals(v3_keys(), cases);
    expect_rope_refusals(v3_keys(), yarn_json("1.0"),
                         {{"factor", nullptr, nullptr},
                          {"factor", "0.5", nullptr},
                          {"original_max_position_embeddings", nullptr, nullptr},
                          {"original_max_position_embeddings", "0", nullptr},
                          {"beta_fast", "0", nullptr},
                          {"beta_fast", "1", nullptr},            // beta_slow
                          {"beta_slow", "0", nullptr},
                          {"mscale", "-1", nullptr},
                          {"mscale_all_dim", "\"1\"", nullptr},
                          {"attention_factor", "0", nullptr},
                          {"truncate", "0", nullptr}});
    // DeepSeek's model.py gives 1 for cos and sin here, transformers 1.37.
    const char one[] =
        R"({"type":"yarn","factor":40,"original_max_position_embeddings":4096,"mscale_all_dim":1})";
    EXPECT_TRUE(refuses([&] { config_of(with(v3_keys(), {{key, one}})); }, "published programs disagree"));
}
TEST(ConfigRefusal, Dense) {
    const Refusal cases[] = {
        {"num_key_value_heads", "0", nullptr},
        {"num_key_value_heads", "7", nullptr},
        {"num_attention_heads", "24", "'hidden_size'"},
        {"num_attention_heads", "4096", "'head_dim'"},            // 4096 / 4096
        {"head_dim", "1", nullptr},
        {"head_dim", "65", "even head dimension"},
        {"head_dim", "16777216", "'num_attention_heads'"},
        {"use_sliding_window", "true", nullptr},
        {"mlp_bias", "true", nullptr},
        {"attention_bias", "true", nullptr}};
    expect_refusals(distill_keys(DISTILLS[4]), cases);
    expect_rope_refusals(distill_keys(DISTILLS[4]), LLAMA3_ROPE,
                         {{"factor", nullptr, nullptr},
                          {"low_freq_factor", nullptr, nullptr},
                          {"low_freq_factor", "0", nullptr},
                          {"high_freq_factor", nullptr, nullptr},
                          {"high_freq_factor", "1.0", nullptr},
                          {"original_max_position_embeddings", nullptr, nullptr}});
}

// -- 3.2 config.json: every field of transformers' classes that computes -----------------------------

// All that computes, as text.
static std::string arithmetic(const Config& c) {
    const RopeConfig& r = c.rope;
    Rope rope = make_rope(r, c.rope_dim());
    std::string text = text_of(
        "D=%d V=%d L=%d mtp=%d ffn=%d ctx=%d H=%d G=%d d=%d Rq=%d Rkv=%d Dn=%d Dr=%d Dv=%d E=%d K=%d F=%d "
        "shared=%d dense=%d freq=%d groups=%d/%d gate=%d sigmoid=%d norm=%d bias=%d qk_norm=%d tied=%d "
        "fp8=%d ue8m0=%d scale=%g eps=%g theta=%g magnitude=%.9f scores=%.9f frequencies:",
        c.D, c.V, c.n_layers, c.n_mtp, c.ffn_width, c.max_context, c.H, c.G, c.head_dim, c.Rq, c.Rkv, c.Dn,
        c.Dr, c.Dv, c.E, c.K, c.F, c.n_shared, c.first_dense, c.moe_freq, c.topk_group, c.n_group,
        int(c.gate), c.sigmoid_affinity, c.norm_topk, c.qkv_bias, c.qk_norm, c.tied, c.fp8, c.ue8m0,
        c.routed_scale, c.eps,
        r.theta, rope.magnitude, c.mla() ? rope.score_scale : 1);
    for (double f : rope.frequency) text += text_of(" %.6e", f);
    return text;
}

static const char SAME[] = "=";        // as if the field were absent
struct Reading {
    const char *key, *value;           // nullptr: absent
    const char* expected;              // in arithmetic(): SAME, or a part of it; nullptr: refused by name
};
static void expect_readings(const Keys& good, std::span<const Reading> table) {
    const std::string before = arithmetic(config_of(good));
    for (const Reading& r : table) {
        Keys keys = r.value ? with(good, {{r.key, r.value}}) : without(good, r.key);
        SCOPED_TRACE(text_of("%s = %s", r.key, r.value ? r.value : "absent"));
        if (!r.expected) {
            EXPECT_TRUE(refuses([&] { config_of(keys); }, text_of("'%s'", r.key)));
            continue;
        }
        std::string after = arithmetic(config_of(keys));
        if (r.expected == SAME) EXPECT_EQ(after, arithmetic(config_of(without(good, r.key))));
        else EXPECT_NE(after.find(r.expected), after.npos) << after;
        EXPECT_TRUE(r.expected == SAME || after != before || std::string(r.expected).ends_with(' '));
    }
}

// The published config.json of R1-0528-Qwen3-8B.
static Keys qwen3_keys() {
    return {{"model_type", "\"qwen3\""}, {"hidden_size", "4096"}, {"intermediate_size", "12288"},
            {"num_hidden_layers", "36"}, {"num_attention_heads", "32"}, {"num_key_value_heads", "8"},
            {"head_dim", "128"}, {"vocab_size", "151936"}, {"rms_norm_eps", "1e-06"},
            {"rope_theta", "1000000"}, {"max_position_embeddings", "131072"},
            {"tie_word_embeddings", "false"}, {"hidden_act", "\"silu\""},
            {"attention_bias", "false"}, {"attention_dropout", "0.0"}, {"use_sliding_window", "false"},
            {"sliding_window", "null"}, {"max_window_layers", "36"}, {"eos_token_id", "151645"},
            {"rope_scaling", R"({"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768,)"
                             R"("attn_factor":0.8782488562869419})"}};
}
TEST(Config, Qwen3) {
    Config c = config_of(qwen3_keys());
    EXPECT_TRUE(remarks.count("config.json: rope_scaling: 'attn_factor' is passed over, as by transformers "
                              "(vLLM and llama.cpp use it)"));
    EXPECT_TRUE(c.qk_norm && !c.qkv_bias && c.head_dim == 128);
    EXPECT_EQ(count_parameters(c), 8190735360u);             // as the model card of Qwen3-8B has it: 8.2 B
}

// transformers 5.24's inv_freq and attention_scaling of Qwen3RotaryEmbedding, in float64.
#define FREQUENCY_24 " 5.375321e-03 4.131738e-03 "
TEST(Config, YarnOfQwen3IsThatOfTransformers) {
#define YARN "\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":32768"
    const Reading table[] = {
        {"rope_scaling", "{" YARN "}", "magnitude=1.138629436 "},
        {"rope_scaling", "{" YARN "}", FREQUENCY_24},
        {"rope_scaling", "{" YARN ",\"attn_factor\":0.5}", "magnitude=1.138629436 "},
        {"rope_scaling", "{" YARN ",\"attention_factor\":null}", "magnitude=1.138629436 "},
        {"rope_scaling", "{" YARN ",\"truncate\":true}", FREQUENCY_24},
        {"rope_scaling", "{" YARN ",\"partial_rotary_factor\":1}", FREQUENCY_24},
        {"rope_scaling", "{" YARN ",\"type\":\"yarn\"}", FREQUENCY_24},
        {"rope_scaling", "{" YARN ",\"rope_theta\":1e6}", FREQUENCY_24},
        {"rope_scaling", "{" YARN ",\"attention_factor\":0.9}", "magnitude=0.900000000"},
        {"rope_scaling", "{" YARN ",\"mscale\":1.0,\"mscale_all_dim\":0.707}", "magnitude=1.036992730"},
        {"rope_scaling", "{" YARN ",\"mscale\":0.707}", "magnitude=1.138629436 "},
        {"rope_scaling", "{" YARN ",\"mscale_all_dim\":0.707}", "magnitude=1.138629436 "},
        {"rope_scaling", "{" YARN ",\"truncate\":false}", " 5.517270e-03 4.234358e-03"},
        {"rope_scaling", "{" YARN ",\"beta_fast\":16,\"beta_slow\":2}", " 5.623413e-03 4.531584e-03"},
        {"rope_scaling", "{}", " 5.623413e-03 4.531584e-03 3.651741e-03"},
        {"rope_scaling", "null", "magnitude=1.000000000"}};
    expect_readings(qwen3_keys(), table);
    Keys outer = with(qwen3_keys(), {{"rope_scaling", R"({"rope_type":"yarn","factor":4.0})"}});
    const Reading beside[] = {{"original_max_position_embeddings", "32768", FREQUENCY_24}};
    outer["original_max_position_embeddings"] = "4096";
    expect_readings(outer, beside);
#undef YARN
}
TEST(Config, FieldsOfQwen3) {
    const Reading table[] = {
        {"head_dim", nullptr, "d=128 "}, {"head_dim", "64", "d=64"}, {"num_key_value_heads", "4", "G=4 "},
        {"num_key_value_heads", "null", "G=32 "}, {"rope_theta", nullptr, "theta=10000 "},
        {"tie_word_embeddings", "true", "tied=1"}, {"tie_word_embeddings", nullptr, "tied=0 "},
        {"hidden_act", "\"swish\"", SAME}, {"hidden_act", "\"gelu\"", nullptr},
        {"attention_bias", nullptr, SAME}, {"attention_bias", "true", nullptr},
        {"use_sliding_window", nullptr, SAME}, {"use_sliding_window", "true", nullptr},
        {"sliding_window", "4096", SAME}, {"max_window_layers", "1", SAME},
        {"layer_types", R"(["full_attention", "full_attention"])", SAME},
        {"layer_types", R"(["full_attention","sliding_attention"])", nullptr}, {"layer_types", "3", nullptr},
        {"is_causal", "true", SAME}, {"is_causal", "false", nullptr}, {"mlp_bias", "true", nullptr},
        {"partial_rotary_factor", "1.0", SAME}, {"partial_rotary_factor", "0.5", nullptr},
        {"per_layer_config", R"({"0":{"head_dim":64}})", nullptr}, {"attention_chunk_size", "8", nullptr},
        {"attention_dropout", "0.1", SAME}, {"initializer_range", "0.1", SAME}, {"use_cache", "false", SAME},
        {"pad_token_id", "3", SAME}, {"output_router_logits", "true", SAME}, {"dtype", "\"float32\"", SAME}};
    expect_readings(qwen3_keys(), table);
}
TEST(Config, FieldsOfQwen2AndLlama) {
    const Reading both[] = {
        {"head_dim", "64", "d=64"}, {"head_dim", "null", SAME}, {"num_key_value_heads", "2", "G=2 "},
        {"rope_theta", nullptr, "theta=10000 "}, {"is_causal", "false", nullptr},
        {"attention_bias", "true", nullptr}, {"mlp_bias", "true", nullptr}, {"mlp_bias", "false", SAME},
        {"pretraining_tp", "1", SAME}, {"use_sliding_window", "true", nullptr},
        {"rope_interleave", "false", nullptr}, {"rope_parameters", "{}", SAME},
        {"layer_types", R"(["full_attention"])", SAME}, {"layer_types", R"(["sliding_attention"])", nullptr}};
    expect_readings(with(distill_keys(DISTILLS[0]), {{"rope_theta", "20000"}}), both);
    expect_readings(distill_keys(DISTILLS[4]), both);
    const Reading llama[] = {{"sliding_window", "4096", nullptr}, {"sliding_window", "null", SAME}};
    expect_readings(distill_keys(DISTILLS[4]), llama);
    const Reading qwen[] = {{"sliding_window", "17", SAME}, {"max_window_layers", "0", SAME}};
    expect_readings(distill_keys(DISTILLS[0]), qwen);
    Keys newer = without(without(distill_keys(DISTILLS[4]), "rope_scaling"), "rope_theta");
    EXPECT_EQ(config_of(with(newer, {{"rope_parameters", LLAMA3_ROPE}})).rope.theta, 10000);
}

// What transformers 5.24 writes for DeepseekV3Config(num_hidden_layers=2), its own names left in.
static const char SAVED_V3[] =
    R"({"attention_bias":false,"attention_dropout":0.0,"bos_token_id":0,"dtype":"bfloat16",)"
    R"("eos_token_id":1,"first_k_dense_replace":1,"head_dim":64,"hidden_act":"silu",)"
    R"("hidden_size":7168,"initializer_range":0.02,"intermediate_size":18432,"kv_lora_rank":512,)"
    R"("max_position_embeddings":4096,"model_type":"deepseek_v3","moe_intermediate_size":2048,)"
    R"("n_group":8,"n_routed_experts":256,"n_shared_experts":1,"norm_topk_prob":true,)"
    R"("num_attention_heads":128,"num_experts_per_tok":8,"num_hidden_layers":2,)"
    R"("num_key_value_heads":128,"num_nextn_predict_layers":1,"output_router_logits":false,)"
    R"("pad_token_id":null,"pretraining_tp":1,"q_lora_rank":1536,"qk_head_dim":192,)"
    R"("qk_nope_head_dim":128,"qk_rope_head_dim":64,"rms_norm_eps":1e-06,"rope_interleave":true,)"
    R"("rope_parameters":{"rope_theta":10000.0,"rope_type":"default"},"routed_scaling_factor":2.5,)"
    R"("tie_word_embeddings":false,"topk_group":4,"transformers_version":"5.24.0","use_cache":true,)"
    R"("v_head_dim":128,"vocab_size":129280})";

TEST(Config, AV3FolderSavedByTransformersIsWhole) {
    Config saved = parse_config(SAVED_V3, "config.json");
    Keys ours = with(without(without(v3_keys(), "rope_scaling"), "quantization_config"),
                     {{"num_hidden_layers", "2"}, {"first_k_dense_replace", "1"},
                      {"max_position_embeddings", "4096"}});
    EXPECT_EQ(arithmetic(saved), arithmetic(config_of(ours)));
}
TEST(Config, FieldsOfV3) {
    const Reading table[] = {
        {"topk_method", nullptr, "gate=2 "}, {"scoring_func", nullptr, "sigmoid=1 "},
        {"norm_topk_prob", nullptr, "norm=1 "}, {"norm_topk_prob", "false", "norm=0"},
        {"routed_scaling_factor", nullptr, "scale=2.5 "}, {"routed_scaling_factor", "1", "scale=1"},
        {"n_group", nullptr, "groups=4/8 "}, {"topk_group", nullptr, "groups=4/8 "},
        {"n_group", "16", "groups=4/16"}, {"rope_interleave", "true", SAME},
        {"rope_interleave", "false", nullptr}, {"num_nextn_predict_layers", "0", "mtp=0"},
        {"rope_theta", nullptr, "theta=10000 "}, {"rope_scaling", "{}", "scores=1.000000000"},
        {"attention_bias", "true", nullptr}, {"is_causal", "false", nullptr},
        {"sliding_window", "9", nullptr},
        {"head_dim", "64", SAME}, {"aux_loss_alpha", "0.5", SAME}, {"ep_size", "4", SAME},
        {"quantization_config", R"({"quant_method":"fp8"})", "fp8=1 "},
        {"quantization_config", R"({"quant_method":"fp8","scale_fmt":"ue8m0"})", "ue8m0=1"},
        {"rope_scaling", R"({"type":"yarn","factor":40,"original_max_position_embeddings":4096,"mscale":1,)"
                         R"("mscale_all_dim":1,"attention_factor":0.9})",
         "magnitude=0.900000000 scores=1.873854207"}};
    expect_readings(v3_keys(), table);
    const Reading alias[] = {{"num_mtp_layers", "1", "mtp=1"}};
    expect_readings(with(without(v3_keys(), "num_nextn_predict_layers"), {{"num_mtp_layers", "0"}}), alias);
}
TEST(Config, FieldsOfV2) {
    const Reading table[] = {
        {"topk_method", nullptr, "gate=0 "}, {"scoring_func", nullptr, "sigmoid=0 "},
        {"topk_method", "\"noaux_tc\"", nullptr}, {"scoring_func", "\"sigmoid\"", nullptr},
        {"norm_topk_prob", nullptr, "norm=0 "}, {"routed_scaling_factor", nullptr, "scale=1 "},
        {"n_group", "null", "groups=1/1 "}, {"mlp_bias", "true", nullptr}, {"seq_aux", "false", SAME},
        {"rope_theta", nullptr, "theta=10000 "}, {"is_causal", "false", nullptr}};
    expect_readings(v2_lite_keys(), table);
}
TEST(ConfigRefusal, APrunedV3WithoutGroupsKeepsTheDefaultOfEight) {
    Keys keys = without(without(v3_keys(), "n_group"), "topk_group");
    EXPECT_EQ(config_of(keys).n_group, 8);
    EXPECT_TRUE(refuses([&] { config_of(with(keys, {{"n_routed_experts", "100"}})); }, "'n_group' 8"));
}

TEST(ConfigRefusal, APlaceForRopeMayBeEmpty) {
    EXPECT_NO_THROW(config_of(with(v3_keys(), {{"rope_parameters", "{}"}})));
}
TEST(ConfigRefusal, TextThatIsNoConfig) {
    for (const char* text :
         {"", "{", "[]", "3", "{\"hidden_size\":1,}", "{\"model_type\":\"llama\"} x", "\xFF"})
        EXPECT_TRUE(refuses([&] { parse_config(text, "config.json"); }, "config.json")) << text;
}
TEST(ConfigRefusal, AFieldGivenTwice) {
    std::string json = json_of(v3_keys()).insert(1, "\"hidden_size\":7168,");
    EXPECT_TRUE(refuses([&] { parse_config(json, "config.json"); }, "'hidden_size'"));
}
TEST(ConfigRefusal, NestingWithoutEnd) {
    EXPECT_TRUE(refuses([] { parse_config(std::string(1 << 20, '['), "config.json"); }, "config.json"));
    for (const char* bom : {"\xEF\xBB\xBF{}", "\xEF\xBB\xBF"}) {        // Python's json refuses it, too
        EXPECT_TRUE(refuses([&] { parse_config(bom, "config.json"); }, "config.json: begins with a byte"));
        EXPECT_TRUE(refuses([&] { parse_index(bom, "index.json"); }, "index.json: begins with a byte order"));
    }
}

// -- 3.3 safetensors: the header --------------------------------------------------------------------

TEST(Header, ListsTensorsInTheOrderOfTheirBytes) {
    auto list = parse_safetensors_header(R"({"b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]},)"
                                         R"("__metadata__":{"format":"pt"},)"
                                         R"("a":{"dtype":"F16","shape":[3,1],"data_offsets":[0,6]}})",
                                         14, "f");
    ASSERT_EQ(list.size(), 2u);
    EXPECT_EQ(list[0].name + list[1].name, "ab");
    EXPECT_EQ(list[0].shape, (std::vector<uint64_t>{3, 1}));
    EXPECT_EQ(list[1].begin, 6u);
    EXPECT_EQ(list[1].end, 14u);
}
TEST(Header, MayEndInSpaces) { EXPECT_TRUE(parse_safetensors_header("{}   ", 0, "f").empty()); }
TEST(Header, AScalarHasNoAxes) {
    auto list = parse_safetensors_header(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", 1, "f");
    EXPECT_TRUE(list[0].shape.empty());
}
TEST(Header, AnEmptyTensorHasNoBytes) {
    auto list = parse_safetensors_header(R"({"a":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}})", 0,
                                         "f");
    EXPECT_EQ(list.size(), 1u);
}
TEST(Header, KnowsEveryDtypeOfTheFormat) {
    const std::pair<const char*, uint64_t> widths[] = {
        {"F64", 8},     {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1},
        {"F8_E8M0", 1}, {"I64", 8}, {"I32", 4}, {"I16", 2},  {"I8", 1},      {"U8", 1},
        {"U16", 2},     {"U32", 4}, {"U64", 8}, {"BOOL", 1}};
    for (auto [name, width] : widths) EXPECT_EQ(dtype_width(name), width) << name;
}

struct BadHeader {
    const char* json;
    uint64_t bytes;
    const char* names;
};

// Tensor 'a' of a file with 4 bytes of data.
TEST(HeaderRefusal, ATensor) {
    const std::pair<const char*, const char*> cases[] = {
        {R"("dtype":"F31","shape":[1],"data_offsets":[0,4])", "'F31'"},
        {R"("dtype":"f32","shape":[1],"data_offsets":[0,4])", "'f32'"},
        {R"("dtype":4,"shape":[1],"data_offsets":[0,4])", "'dtype'"},
        {R"("shape":[1],"data_offsets":[0,4])", "'dtype'"},
        {R"("dtype":"F32","data_offsets":[0,4])", "'shape'"},
        {R"("dtype":"F32","shape":[1])", "'data_offsets'"},
        {R"("dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4])", "duplicate key 'shape'"},
        {R"("dtype":"F32","shape":1,"data_offsets":[0,4])", "'shape'"},
        {R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])", "'shape'"},
        {R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])", "'shape'"},
        {R"("dtype":"F32","shape":[null],"data_offsets":[0,4])", "'shape'"},
        {R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4])", "'shape' has 9 axes"},
        {R"("dtype":"F32","shape":[2],"data_offsets":[0,4])", "need 8 bytes"},
        {R"("dtype":"BF16","shape":[1],"data_offsets":[0,4])", "need 2 bytes"},
        {R"("dtype":"F32","shape":[0],"data_offsets":[0,4])", "need 0 bytes"},
        {R"("dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4])", "larger than any file"},
        {R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])", "larger than any file"},
        {R"("dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,0])", "f"},
        {R"("dtype":"F32","shape":[1],"data_offsets":[4,0])", "'data_offsets'"},
        {R"("dtype":"F32","shape":[1],"data_offsets":[0,8])", "'data_offsets' outside the 4 bytes"},
        {R"("dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,0])", "'data_offsets'"},
        {R"("dtype":"F32","shape":[1],"data_offsets":[0])", "'data_offsets'"},
        {R"("dtype":"F32","shape":[1],"data_offsets":[0,2,4])", "'data_offsets'"},
        {R"("dtype":"F32","shape":[1],"data_offsets":"0,4")", "'data_offsets'"}};
    for (auto [members, names] : cases) {
        std::string json = text_of("{\"a\":{%s}}", members);
        EXPECT_TRUE(refuses([&] { parse_safetensors_header(json, 4, "f"); }, names)) << members;
    }
}

// Tensors of F32 numbers: name and offsets.
struct TensorSpan {
    const char* name;
    int begin, end;
};
static std::string header_of(const std::vector<TensorSpan>& tensors) {
    std::string out;
    for (const TensorSpan& t : tensors)
        out += text_of(R"(%s"%s":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]})",
                       out.empty() ? "{" : ",", t.name, (t.end - t.begin) / 4, t.begin, t.end);
    return out.empty() ? "{}" : out + "}";
}
TEST(HeaderRefusal, TensorsThatDoNotCoverTheData) {
    struct Case {
        std::vector<TensorSpan> tensors;
        uint64_t bytes;
        const char* names;
    };
    const Case cases[] = {{{{"a", 0, 8}, {"b", 4, 12}}, 12, "'b' overlaps another one"},
                          {{{"a", 0, 8}, {"b", 0, 8}}, 8, "overlaps"},
                          {{{"a", 0, 12}, {"b", 4, 8}}, 12, "'b' overlaps"},
                          {{{"a", 0, 4}, {"b", 8, 12}}, 12, "'b' leaves a gap before it"},
                          {{{"a", 4, 8}}, 8, "'a' leaves a gap before it"},
                          {{{"a", 0, 4}}, 9, "5 bytes after the last tensor"},
                          {{{"a", 0, 4}, {"a", 4, 8}}, 8, "duplicate key 'a'"},
                          {{}, 1, "1 bytes after"}};
    for (const Case& c : cases) {
        std::string json = header_of(c.tensors);
        EXPECT_TRUE(refuses([&] { parse_safetensors_header(json, c.bytes, "f"); }, c.names)) << json;
    }
}
TEST(HeaderRefusal, WhatIsNoHeader) {
    const BadHeader cases[] = {{"", 0, "f"}, {" {}", 0, "f"}, {"[]", 0, "f"}, {"{", 0, "f"}, {"{}x", 0, "f"},
                               {R"({"a":3})", 0, "'a'"}, {R"({"__metadata__":3})", 0, "__metadata__"},
                               {R"({"__metadata__":{"format":3}})", 0, "'format'"}};
    for (const BadHeader& h : cases)
        EXPECT_TRUE(refuses([&] { parse_safetensors_header(h.json, h.bytes, "f"); }, h.names)) << h.json;
}

static TensorFile parse_text(const std::string& text) {
    return parse_safetensors(std::as_bytes(std::span(text)), "f");
}

TEST(SafetensorsFile, DataBeginAfterTheHeader) {
    std::string text = safetensors_of({{"a", "U8", {3}, "abc"}});
    TensorFile file = parse_text(text);
    EXPECT_EQ(text.substr(file.data_begin + file.tensors[0].begin, 3), "abc");
}
TEST(SafetensorsFile, RefusesToBeCutOff) {
    std::string text = safetensors_of({{"a", "U8", {3}, "abc"}});
    for (size_t n = 0; n < text.size(); n++)
        EXPECT_TRUE(refuses([&] { parse_text(text.substr(0, n)); }, "f")) << n << " bytes";
}
TEST(SafetensorsFile, RefusesBytesAfterTheEnd) {
    EXPECT_TRUE(refuses(
        [] {
            parse_text(safetensors_of({{"a", "U8", {3}, "abc"}}) + "d");
        },
        "1 bytes after"));
}
TEST(SafetensorsFile, RefusesAHeaderBeyondTheLimit) {
    uint64_t n = HEADER_LIMIT + 1;
    std::string text(reinterpret_cast<const char*>(&n), 8);
    EXPECT_TRUE(refuses([&] { parse_text(text + "{}"); }, "limit of 100 MB"));
}
TEST(SafetensorsFile, RefusesAHeaderLengthThatWrapsAround) {
    EXPECT_TRUE(refuses([] { parse_text(std::string(8, '\xFF') + "{}"); }, "limit"));
}

// -- 3.4 the index ----------------------------------------------------------------------------------

TEST(Index, MapsTensorsToFiles) {
    auto map = parse_index(
        R"({"metadata":{"total_size":3},"weight_map":{"a":"x.safetensors","b":"y.safetensors"}})", "i");
    EXPECT_EQ(map.at("a") + map.at("b"), "x.safetensorsy.safetensors");
}
TEST(Index, RefusesFilesElsewhere) {
    for (const char* shard :
         {"../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "x.bin", "", "x\\u0000.safetensors"}) {
        std::string json = text_of(R"({"weight_map":{"t":"%s"}})", shard);
        EXPECT_TRUE(refuses([&] { parse_index(json, "i"); }, "'t'")) << shard;
    }
}
TEST(Index, RefusesWhatIsNone) {
    for (const char* json :
         {"", "{}", "[]", R"({"weight_map":{}})", R"({"weight_map":[]})", R"({"weight_map":{"a":1}})"})
        EXPECT_TRUE(refuses([&] { parse_index(json, "i"); }, "i")) << json;
}

// -- 3.4, 3.5 files on disk -------------------------------------------------------------------------

static std::vector<std::string> names_in(const fs::path& folder) {
    std::vector<std::string> names;
    for (auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

TEST(Mapping, RefusesWhatIsNoFile) {
    fs::path folder = scratch("mapping");
    write_text(folder / "empty", "");
    EXPECT_TRUE(refuses([&] { Mapping(folder / "none"); }, "none: No such file"));
    EXPECT_TRUE(refuses([&] { Mapping(folder / "empty"); }, "empty: empty"));
    EXPECT_TRUE(refuses([&] { Mapping{folder}; }, "not a regular file"));
}
TEST(ReadFile, RefusesTooMuch) {
    fs::path folder = scratch("read");
    write_text(folder / "f", "12345");
    EXPECT_EQ(read_file(folder / "f", 5), "12345");
    EXPECT_TRUE(refuses([&] { read_file(folder / "f", 4); }, "larger than 4 bytes"));
    EXPECT_TRUE(refuses([&] { read_file(folder); }, "is a directory"));
}

TEST(AtomicFile, AppearsOnlyWhole) {
    fs::path folder = scratch("atomic");
    {
        AtomicFile file((folder / "f").string());
        file.write("abc", 3);
        EXPECT_FALSE(fs::exists(folder / "f"));
        file.commit();
    }
    EXPECT_EQ(names_in(folder), std::vector<std::string>{"f"});
    EXPECT_EQ(read_file(folder / "f"), "abc");
}
TEST(AtomicFile, LeavesNothingWithoutCommit) {
    fs::path folder = scratch("atomic");
    { AtomicFile((folder / "f").string()).write("abc", 3); }
    EXPECT_TRUE(names_in(folder).empty());
}
TEST(AtomicFile, LeavesNothingWhenAnErrorPassesThrough) {
    fs::path folder = scratch("atomic");
    EXPECT_TRUE(refuses([&] {
        AtomicFile file((folder / "f").string());
        file.write("abc", 3);
        fail("a mistake");
    }, "a mistake"));
    EXPECT_TRUE(names_in(folder).empty());
}
TEST(AtomicFile, KeepsTheOldFileWithoutCommit) {
    fs::path folder = scratch("atomic");
    write_text(folder / "f", "old");
    { AtomicFile((folder / "f").string(), true).write("new", 3); }
    EXPECT_EQ(read_file(folder / "f"), "old");
}
TEST(AtomicFile, ReplacesOnlyWhenToldTo) {
    fs::path folder = scratch("atomic");
    write_text(folder / "f", "old");
    EXPECT_TRUE(refuses([&] { AtomicFile((folder / "f").string()); }, "f: exists already (--force"));
    EXPECT_TRUE(refuses([&] { AtomicFile(""); }, "an empty path"));
    {
        AtomicFile file((folder / "f").string(), true);
        file.write("new", 3), file.commit();
    }
    EXPECT_EQ(read_file(folder / "f"), "new");
    EXPECT_EQ(names_in(folder), std::vector<std::string>{"f"});
}
TEST(AtomicFile, WritesNothingOverTheModelInUseByWhateverName) {
    fs::path folder = scratch("atomic");
    write_text(folder / "config.json", "{}");
    fs::create_symlink("config.json", folder / "soft");
    fs::create_hard_link(folder / "config.json", folder / "hard");
    protect_model(folder);
    for (const char* name : {"config.json", "soft", "hard"})
        EXPECT_TRUE(refuses([&] { AtomicFile((folder / name).string(), true); }, "is a file of the model"));
    in_use.clear();
}
TEST(AtomicFile, WritesWhereALinkPoints) {
    fs::path folder = scratch("atomic");
    write_text(folder / "f", "old");
    fs::create_symlink("f", folder / "link");
    {
        AtomicFile file((folder / "link").string(), true);
        file.write("new", 3), file.commit();
    }
    EXPECT_TRUE(fs::is_symlink(folder / "link"));
    EXPECT_EQ(read_file(folder / "f"), "new");
}
// Two who write the same file do not meet; what a killed one left is removed, not what a living one writes.
TEST(AtomicFile, RemovesWhatAKilledOneLeft) {
    fs::path folder = scratch("atomic");
    AtomicFile living((folder / "f").string(), true), late((folder / "f").string());
    write_text(folder / "f.a1B2c3.tmp", "left behind");
    write_text(folder / "f.tmp", "another's");
    write_text(folder / "ff.a1B2c3.tmp", "another's");
    {
        AtomicFile file((folder / "f").string());
        EXPECT_FALSE(fs::exists(folder / "f.a1B2c3.tmp"));
        file.write("abc", 3), file.commit();
    }
    EXPECT_TRUE(refuses([&] { late.write("no", 2), late.commit(); }, "f: File exists"));   // by now
    living.write("xyz", 3), living.commit();
    EXPECT_EQ(read_file(folder / "f"), "xyz");
    EXPECT_EQ(names_in(folder).size(), 4u);              // f, what is another's, and what `late` will remove
}
TEST(AtomicFile, HasTheRightsOfAnyNewFile) {
    fs::path folder = scratch("atomic");
    const mode_t before = umask(022);
    { AtomicFile file((folder / "f").string()); file.commit(); }
    umask(before);
    EXPECT_EQ(int(fs::status(folder / "f").permissions()), 0644);
}
TEST(AtomicFile, LeavesNothingWhenItsPlaceIsTaken) {
    fs::path folder = scratch("atomic");
    EXPECT_TRUE(refuses([&] {
        AtomicFile file((folder / "f").string());
        fs::create_directory(folder / "f");
        file.commit();
    }, "f: "));
    EXPECT_EQ(names_in(folder), std::vector<std::string>{"f"});   // the directory, and no temporary file
}
TEST(AtomicFile, RefusesADirectory) {
    fs::path folder = scratch("atomic");
    EXPECT_TRUE(refuses([&] { AtomicFile(folder.string()); }, "is a directory"));
    EXPECT_TRUE(refuses([&] { AtomicFile((folder / "no" / "f").string()); }, "cannot be written"));
}
TEST(AtomicFile, SaysWhenTheDiskIsFull) {
    EXPECT_TRUE(refuses([] {
        fs::path folder = scratch("atomic");
        AtomicFile file((folder / "f").string());
        struct rlimit before, small{1000, 0};
        getrlimit(RLIMIT_FSIZE, &before);
        small.rlim_max = before.rlim_max;
        auto handler = std::signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &small);
        std::string data(100000, 'x');
        auto restore = [&](int*) { setrlimit(RLIMIT_FSIZE, &before), std::signal(SIGXFSZ, handler); };
        int any = 0;
        std::unique_ptr<int, decltype(restore)> guard(&any, restore);
        file.write(data.data(), data.size());
        file.commit();
    }, "f: File too large"));
}

TEST(WriteSafetensors, ReadsBack) {
    fs::path path = scratch("write") / "out.safetensors";
    const float a[] = {1, 2, 3, 4, 5, 6};
    const int32_t b[] = {7, 8};
    AtomicFile file(path.string());
    write_safetensors(file, {{"a", "F32", {2, 3}, a, sizeof a}, {"b", "I32", {2}, b, sizeof b}});
    Checkpoint checkpoint;
    add_tensors(checkpoint, path);
    EXPECT_EQ(checkpoint.tensors.at("a").shape, (std::vector<uint64_t>{2, 3}));
    EXPECT_EQ(checkpoint.tensors.at("b").dtype, "I32");
    EXPECT_EQ(std::memcmp(checkpoint.tensors.at("a").data, a, sizeof a), 0);
    EXPECT_EQ(std::memcmp(checkpoint.tensors.at("b").data, b, sizeof b), 0);
}
TEST(WriteSafetensors, AlignsItsData) {
    fs::path path = scratch("write") / "out.safetensors";
    AtomicFile file(path.string());
    write_safetensors(file, {{"a", "U8", {1}, "x", 1}});
    EXPECT_EQ(load<uint64_t>(read_file(path).data()) % 8, 0u);
}

TEST(Checkpoint, JoinsShards) {
    fs::path folder = scratch("shards");
    write_text(folder / "1.safetensors", safetensors_of({{"a", "U8", {1}, "x"}}));
    write_text(folder / "2.safetensors", safetensors_of({{"b", "U8", {1}, "y"}}));
    write_text(folder / "model.safetensors.index.json",
               R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors"}})");
    EXPECT_EQ(open_checkpoint(folder).tensors.size(), 2u);
}

struct BadIndex {
    const char *weight_map, *names;
};
TEST(Checkpoint, RefusesAnIndexThatIsNotTheFiles) {
    fs::path folder = scratch("shards");
    write_text(folder / "1.safetensors", safetensors_of({{"a", "U8", {1}, "x"}, {"c", "U8", {1}, "z"}}));
    write_text(folder / "2.safetensors", safetensors_of({{"b", "U8", {1}, "y"}}));
    write_text(folder / "3.safetensors", safetensors_of({{"a", "U8", {1}, "x"}}));
    const BadIndex cases[] = {
        {R"({"a":"1.safetensors","c":"1.safetensors","b":"1.safetensors"})", "no tensor 'b'"},
        {R"({"a":"1.safetensors","c":"1.safetensors","b":"2.safetensors","d":"2.safetensors"})",
         "no tensor 'd'"},
        {R"({"a":"2.safetensors","c":"1.safetensors","b":"2.safetensors"})", "no tensor 'a'"},
        {R"({"a":"1.safetensors"})", "tensor 'c' is not in the index"},
        {R"({"a":"1.safetensors","c":"1.safetensors","x":"3.safetensors"})", "'a' is also in"},
        {R"({"a":"4.safetensors"})", "4.safetensors: No such file"}};
    for (const BadIndex& c : cases) {
        write_text(folder / "model.safetensors.index.json",
                   std::string(R"({"weight_map":)") + c.weight_map + "}");
        EXPECT_TRUE(refuses([&] { open_checkpoint(folder); }, c.names)) << c.weight_map;
    }
}
TEST(Checkpoint, RefusesAnEmptyFolder) {
    fs::path folder = scratch("none");
    EXPECT_TRUE(refuses([&] { open_checkpoint(folder); }, "neither model.safetensors nor"));
    EXPECT_TRUE(refuses([&] { load_model(folder); }, "no config.json"));
    EXPECT_TRUE(refuses([&] { load_model(folder / "x"); }, "no such file or folder"));
}
