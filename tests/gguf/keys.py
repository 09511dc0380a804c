"""Every key that llama.cpp reads of a model, and what becomes of it: read as llama.cpp reads it, or refused.

The names are those of LLM_KV_NAMES in llama.cpp's src/llama-arch.cpp (of the source in llama-cpp-python
0.3.36); what they mean is what its src/llama-model.cpp, src/llama-context.cpp and src/models/*.cpp do with
them. A key of the list that no row below names must be refused.

A row of the table: (what is added to or, as None, taken from the keys of a tiny model, what happens). That is
SAME: the logits of the unchanged model, to the bit; OTHER: other logits; another row's keys: the same logits
as with these; or a piece of the line that refuses them.
"""

SAME, OTHER = "same", "other"

NAMES = """
vocab_size context_length embedding_length embedding_length_out embedding_length_per_layer_input
features_length block_count leading_dense_block_count attn_res.block_size activation.situ_beta
activation.situ_linear_beta feed_forward_length expert_feed_forward_length expert_shared_feed_forward_length
expert_chunk_feed_forward_length swiglu_clamp_exp swiglu_clamp_shexp use_parallel_residual tensor_data_layout
expert_count expert_used_count expert_shared_count expert_group_count expert_group_used_count
expert_weights_scale expert_weights_norm expert_latent_length expert_gating_func expert_group_scale
experts_per_group moe_every_n_layers moe_latent_size nextn_predict_layers n_deepstack_layers deepstack_mapping
hidden_activation pooling_type logit_scale decoder_start_token_id decoder_block_count attn_logit_softcapping
router_logit_softcapping final_logit_softcapping swin_norm rescale_every_n_layers time_mix_extra_dim
time_decay_extra_dim residual_scale embedding_scale adapters.count token_shift_count interleave_moe_layer_step
full_attention_interval num_loops skip_loop_final_norm attention.head_count attention.head_count_kv
attention.max_alibi_bias attention.clamp_kqv attention.key_length attention.value_length
attention.layer_norm_epsilon attention.layer_norm_rms_epsilon attention.group_norm_epsilon
attention.group_norm_groups attention.causal attention.q_lora_rank attention.kv_lora_rank
attention.decay_lora_rank attention.iclr_lora_rank attention.value_residual_mix_lora_rank
attention.gate_lora_rank attention.relative_buckets_count attention.sliding_window
attention.sliding_window_pattern attention.rope_pattern attention.scale attention.output_scale
attention.value_scale attention.temperature_length attention.temperature_scale attention.key_length_mla
attention.value_length_mla attention.key_length_swa attention.value_length_swa attention.key_length_mla_swa
attention.value_length_mla_swa attention.kv_lora_rank_swa attention.indexer.head_count
attention.indexer.key_length attention.indexer.top_k attention.indexer.block_size attention.indexer.types
attention.output_group_count attention.output_lora_rank attention.compress_rope_freq_base
attention.compress_ratios attention.shared_kv_layers attention.recurrent_layers hyper_connection.count
hyper_connection.epsilon hash_layer_count rope.dimension_count rope.dimension_count_swa
rope.dimension_sections rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.type
rope.scaling.factor rope.scaling.alpha rope.scaling.attn_factor rope.scaling.original_context_length
rope.scaling.finetuned rope.scaling.yarn_log_multiplier rope.scaling.yarn_ext_factor
rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow ssm.conv_kernel
ssm.inner_size ssm.state_size ssm.time_step_rank ssm.group_count kda.head_dim wkv.head_size
posnet.embedding_length convnext.embedding_length classifier.output_labels classifier.pooling_type
target_layers norm_before_residual block_size shortconv.l_cache dense_2_feat_in dense_2_feat_out
""".split()

def of_kind(kind):
    return lambda value: (kind, value)


f32, u32, boolean, text = map(of_kind, ("f32", "u32", "bool", "str"))


def rope(kind=None, factor=None, **more):
    """Keys of RoPE's scaling."""
    keys = {} if kind is None else {"rope.scaling.type": text(kind)}
    if factor is not None:
        keys["rope.scaling.factor"] = f32(factor)
    return keys | {f"rope.scaling.{name}": value for name, value in more.items()}


# Of every architecture.
COMMON = [
    ({"vocab_size": u32(7)}, SAME),                              # the tensors say it
    ({"context_length": u32(32)}, SAME),
    ({"tensor_data_layout": text("Meta AI original pth")}, SAME),
    ({"attention.causal": boolean(True)}, SAME),
    ({"attention.causal": boolean(False)}, "attention.causal"),
    ({"attention.layer_norm_rms_epsilon": f32(0.5)}, OTHER),
    ({"attention.layer_norm_rms_epsilon": f32(-1)}, "layer_norm_rms_epsilon"),
    ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    ({"embedding_length": None}, "embedding_length"),
    ({"block_count": None}, "block_count"),
    ({"feed_forward_length": None}, "feed_forward_length"),
    ({"attention.head_count": None}, "attention.head_count"),
    ({"rope.freq_base": None}, SAME),                            # 10000
    ({"rope.freq_base": f32(500000)}, OTHER),
    ({"rope.freq_base": f32(1.05)}, "rope.freq_base"),
    ({"rope.freq_base": u32(1)}, "rope.freq_base"),              # bounds are not cut to integers
    ({"rope.freq_base": u32(10000)}, SAME),
    ({"rope.freq_base": f32(2e12)}, "rope.freq_base"),
    (rope(finetuned=boolean(True)), SAME),
    (rope(attn_factor=f32(1)), SAME),
    (rope(attn_factor=f32(2)), "attn_factor"),
    (rope(yarn_ext_factor=f32(1)), SAME),
    (rope(yarn_ext_factor=f32(0.5)), "yarn_ext_factor"),
    (rope(alpha=f32(1)), "rope.scaling.alpha"),
    (rope("longrope", 4), "longrope"),
    (rope("su", 4), "su"),
]

# RoPE unscaled: llama and qwen2.
UNSCALED = [
    (rope(factor=1), SAME),
    (rope(factor=0), SAME),
    (rope(factor=4), "rope.scaling.factor"),                     # no type is linear
    (rope("linear"), SAME),
    (rope("linear", 1), SAME),
    (rope("linear", 4), "rope.scaling.factor"),
    (rope("none", 4), SAME),
    ({"rope.scale_linear": f32(1)}, SAME),
    ({"rope.scale_linear": f32(4)}, "rope.scale_linear"),
    ({"rope.scale_linear": f32(4)} | rope(factor=1), SAME),      # the newer name comes first
    ({"rope.scale_linear": f32(4)} | rope("none"), SAME),
    (rope("yarn", 4, original_context_length=u32(16)), OTHER),
    (rope("yarn", 4), rope("yarn", 4, original_context_length=u32(64))),
    (rope("yarn") | {"rope.scale_linear": f32(4)}, rope("yarn", 4)),
    (rope("yarn", 4, yarn_attn_factor=f32(0.5)), rope("yarn", 4)),     # read by none of these models
    (rope("yarn", 4, yarn_beta_fast=f32(32), yarn_beta_slow=f32(1)), rope("yarn", 4)),
    (rope("yarn", 4, yarn_beta_fast=f32(1), yarn_beta_slow=f32(1)), "beta_fast"),
    (rope("yarn", 0.5), "factor"),
    (rope("yarn", 4, original_context_length=u32(0)), "original_context_length"),
    (rope("yarn", 4, yarn_log_multiplier=f32(0.1)), "yarn_log_multiplier"),
    ({"expert_count": u32(0), "expert_used_count": u32(0)}, SAME),
    ({"expert_count": u32(8)}, "expert_count"),
    ({"nextn_predict_layers": u32(0)}, SAME),
    ({"nextn_predict_layers": u32(1)}, "nextn_predict_layers"),
    ({"attention.head_count_kv": u32(3)}, "key heads do not divide"),
    ({"attention.head_count_kv": None}, "attn_k.weight"),        # as many as heads
    ({"attention.head_count": u32(3), "attention.head_count_kv": None}, "3 heads do not divide"),
    ({"attention.key_length": u32(16), "attention.value_length": u32(16)}, SAME),
    ({"attention.key_length": u32(8)}, "attn_"),
    ({"attention.value_length": u32(8)}, "attention.value_length"),
    ({"rope.dimension_count": u32(16)}, SAME),
    ({"rope.dimension_count": u32(8)}, "rope.dimension_count"),
]

# DeepSeek-V3 with YaRN.
DEEPSEEK2 = [
    (rope("none"), OTHER),
    (rope(factor=1), OTHER),
    (rope("none"), rope(factor=1)),
    ({"rope.scaling.type": None}, "rope.scaling.factor"),        # linear by 4
    ({"rope.scaling.type": None, "rope.scaling.factor": None}, rope("none")),
    ({"rope.scaling.factor": None, "rope.scale_linear": f32(4)}, SAME),
    (rope(original_context_length=None), rope(original_context_length=u32(64))),
    (rope(original_context_length=None), OTHER),
    (rope(yarn_log_multiplier=None), "yarn_log_multiplier"),
    (rope(yarn_log_multiplier=f32(0)), "yarn_log_multiplier"),
    (rope(yarn_log_multiplier=f32(0.0707)), OTHER),
    (rope(yarn_beta_fast=f32(32), yarn_beta_slow=f32(1)), SAME),
    (rope(yarn_beta_fast=f32(1), yarn_beta_slow=f32(32)), "beta_fast"),
    (rope(yarn_beta_fast=u32(0)), "yarn_beta_fast"),
    (rope(yarn_attn_factor=f32(1)), SAME),
    (rope(yarn_attn_factor=f32(0.5)), "yarn_attn_factor"),
    ({"expert_gating_func": None}, "expert_gating_func"),
    ({"expert_gating_func": u32(0)}, "expert_gating_func"),
    ({"expert_gating_func": u32(1)}, OTHER),                     # softmax
    ({"expert_gating_func": u32(3)}, "expert_gating_func"),
    ({"expert_weights_scale": None}, {"expert_weights_scale": f32(1)}),
    ({"expert_weights_scale": f32(1)}, OTHER),
    ({"expert_weights_scale": f32(0)}, "expert_weights_scale"),
    ({"expert_weights_norm": None}, {"expert_weights_norm": boolean(False)}),
    ({"expert_weights_norm": boolean(False)}, OTHER),
    ({"expert_used_count": u32(1)}, "expert_weights_norm"),
    ({"expert_used_count": u32(1), "expert_weights_norm": None}, OTHER),
    ({"expert_count": u32(8)}, "no stack of 8 experts"),
    ({"expert_group_count": None, "expert_group_used_count": None}, "expert_group_count"),
    ({"expert_group_count": u32(0)}, {"expert_group_count": u32(1)}),
    ({"expert_group_count": u32(1)}, OTHER),
    ({"expert_group_used_count": None}, "expert_group_used_count"),
    ({"expert_group_used_count": u32(2)}, {"expert_group_count": u32(1)}),
    ({"expert_shared_count": u32(2)}, "shexp"),
    ({"leading_dense_block_count": u32(0)}, "blk.0"),
    ({"nextn_predict_layers": u32(2)}, "nextn_predict_layers"),
    ({"expert_feed_forward_length": None}, "expert_feed_forward_length"),
    ({"attention.q_lora_rank": None}, "attn_q.weight"),
    ({"attention.kv_lora_rank": None}, "attention.kv_lora_rank"),
    ({"attention.key_length": u32(7), "attention.value_length": u32(7)}, SAME),      # MLA has its own
    ({"attention.head_count_kv": u32(2)}, SAME),
    ({"attention.key_length_mla": None}, "attn_"),
    ({"attention.value_length_mla": u32(8)}, "attn_"),
]

# The same without the gates' biases.
UNBIASED = [
    ({}, "expert_weights_scale"),                                # V2's gate would not scale what it normed
    ({"expert_weights_scale": f32(1)}, "expert_group_count"),    # V3's groups by sigmoids
    ({"expert_weights_norm": None}, "expert_group_count"),
    ({"expert_weights_norm": None, "expert_group_count": u32(1)},
     {"expert_weights_norm": None, "expert_group_count": None, "expert_group_used_count": None}),
    ({"expert_weights_norm": None, "expert_gating_func": u32(1)},
     {"expert_weights_norm": None, "expert_gating_func": None}),
]

# Keys that no architecture's name stands before.
GENERAL = [
    ({"general.type": text("model")}, SAME),
    ({"general.type": text("adapter")}, "general.type"),
    ({"tokenizer.ggml.add_eos_token": boolean(False)}, SAME),
    ({"tokenizer.ggml.add_eos_token": boolean(True)}, "add_eos_token"),
    ({"tokenizer.ggml.suppress_tokens": (["i32"], [1])}, "suppress_tokens"),
    ({"general.sampling.penalty_repeat": f32(1)}, SAME),
    ({"general.sampling.penalty_repeat": f32(50), "general.sampling.temp": f32(0)}, OTHER),
    ({"general.sampling.penalty_repeat": f32(0)}, "general.sampling.penalty_repeat"),
    ({"general.sampling.xtc_probability": f32(0)}, SAME),
    ({"general.sampling.xtc_probability": f32(0.1)}, "general.sampling.xtc_probability"),
    ({"general.sampling.mirostat": u32(0)}, SAME),
    ({"general.sampling.mirostat": u32(2)}, "general.sampling.mirostat"),
    ({"general.sampling.sequence": text("temp;top_k")}, "general.sampling.sequence"),
    ({"general.sampling.temp": f32(-1)}, "general.sampling.temp"),
    ({"general.sampling.top_p": f32(2)}, "general.sampling.top_p"),
    ({"general.sampling.top_k": u32(40)}, SAME),
    ({"general.name": text("x"), "general.tags": (["str"], ["a", "b"])}, SAME),
]


def changed(keys, architecture, more):
    """The keys with those of a row, whose names may lack the architecture's."""
    full = {name if name.startswith(("general.", "tokenizer.")) else f"{architecture}.{name}": value
            for name, value in more.items()}
    return {name: value for name, value in (keys | full).items() if value is not None}


def rows(architecture):
    table = COMMON + (DEEPSEEK2 if architecture == "deepseek2" else UNSCALED)
    named = {name for more, _ in table for name in more} | {"attention.head_count_kv", "rope.dimension_count"}
    table += [({name: u32(1)}, f"unknown key '{architecture}.{name}'") for name in NAMES if name not in named]
    return table + [({"some.new_key": u32(1)}, f"unknown key '{architecture}.some.new_key'")]
