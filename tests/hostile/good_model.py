"""A small good model folder, from which make_hostile.py makes bad ones.

DeepSeek-V3's architecture with random weights: MLA, two layers of which the second has experts, the MTP
module, FP8 matrices whose scales may be in the other of two shards. A folder is a dict: file name -> bytes.
"""

import json
import pathlib
import random
import struct

TINY = pathlib.Path(__file__).resolve().parents[2] / "weights" / "tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WIDTH = {
    "F32": 4,
    "F64": 8,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 20,
    "kv_lora_rank": 8,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 10,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 6,
    "vocab_size": 512,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "vocab_size": 512,
    "eos_token_id": 1,
}
GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}


def mlp_shapes(prefix, hidden, width):
    return {
        f"{prefix}{name}_proj.weight": (hidden, width) if name == "down" else (width, hidden)
        for name in ("gate", "up", "down")
    }


def attention_shapes(prefix, c):
    heads, rank = c["num_attention_heads"], c["kv_lora_rank"]
    query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    return {
        prefix + "q_a_proj.weight": (c["q_lora_rank"], c["hidden_size"]),
        prefix + "q_a_layernorm.weight": (c["q_lora_rank"],),
        prefix + "q_b_proj.weight": (query, c["q_lora_rank"]),
        prefix + "kv_a_proj_with_mqa.weight": (rank + c["qk_rope_head_dim"], c["hidden_size"]),
        prefix + "kv_a_layernorm.weight": (rank,),
        prefix + "kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank),
        prefix + "o_proj.weight": (c["hidden_size"], heads * c["v_head_dim"]),
    }


def layer_shapes(layer, c):
    prefix, hidden = f"model.layers.{layer}.", c["hidden_size"]
    shapes = {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
    }
    shapes |= attention_shapes(prefix + "self_attn.", c)
    if layer < c["first_k_dense_replace"]:
        return shapes | mlp_shapes(prefix + "mlp.", hidden, c["intermediate_size"])
    width, experts = c["moe_intermediate_size"], c["n_routed_experts"]
    shapes |= {
        prefix + "mlp.gate.weight": (experts, hidden),
        prefix + "mlp.gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes |= mlp_shapes(f"{prefix}mlp.experts.{expert}.", hidden, width)
    return shapes | mlp_shapes(prefix + "mlp.shared_experts.", hidden, width * c["n_shared_experts"])


def all_shapes(c):
    """Name -> shape of every tensor but the scales, in the order of the network."""
    vocab, hidden, mtp = c["vocab_size"], c["hidden_size"], f"model.layers.{c['num_hidden_layers']}."
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        shapes |= layer_shapes(layer, c)
    if c["num_nextn_predict_layers"]:
        shapes |= {
            mtp + name: (hidden,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
        }
        shapes |= {
            mtp + "eh_proj.weight": (hidden, 2 * hidden),
            mtp + "embed_tokens.weight": (vocab, hidden),
            mtp + "shared_head.head.weight": (vocab, hidden),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def numbers(rng, dtype, count):
    """`count` random numbers of `dtype`, small enough for a network that stays finite."""
    if dtype == "F8_E4M3":
        return bytes(rng.randrange(0, 0x60) | rng.randrange(2) << 7 for _ in range(count))
    values = struct.pack(f"<{count}f", *(rng.uniform(-0.5, 0.5) for _ in range(count)))
    return values if dtype == "F32" else b"".join(values[i + 2 : i + 4] for i in range(0, len(values), 4))


def good_tensors():
    """Name -> (dtype, shape, bytes), for each of the two shards."""
    rng = random.Random(3)
    shards = ({}, {})
    for i, (name, shape) in enumerate(all_shapes(CONFIG).items()):
        fp8 = len(shape) == 2 and name.endswith("_proj.weight") and "eh_proj" not in name
        dtype = "F8_E4M3" if fp8 else "F32" if name.endswith("bias") else "BF16"
        rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
        shards[i % 5 == 0][name] = (dtype, list(shape), numbers(rng, dtype, rows * columns))
        if fp8:
            blocks = [-(-rows // 128), -(-columns // 128)]
            scale = struct.pack(f"<{blocks[0] * blocks[1]}f", *[2.0**-5] * (blocks[0] * blocks[1]))
            shards[i % 3 == 0][name + "_scale_inv"] = ("F32", blocks, scale)
    return shards


def safetensors(tensors):
    """The bytes of a safetensors file that holds `tensors`."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return with_header(json.dumps(header), b"".join(data for _, _, data in tensors.values()))


def with_header(header, data):
    text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def index_of(shards):
    weight_map = {name: file for file, tensors in zip(SHARDS, shards) for name in tensors}
    return {"metadata": {"total_size": 0}, "weight_map": dict(sorted(weight_map.items()))}


def good_folder():
    shards = good_tensors()
    folder = {file: safetensors(tensors) for file, tensors in zip(SHARDS, shards)}
    folder["model.safetensors.index.json"] = json.dumps(index_of(shards)).encode()
    folder["config.json"] = json.dumps(CONFIG).encode()
    folder["generation_config.json"] = json.dumps(GENERATION).encode()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder[name] = (TINY / name).read_bytes()
    return folder
