#!/usr/bin/env python3
"""Writes a model of a published model's shape with random weights, to measure speed with.

    tests/bench/make_model.py SHAPE FOLDER

SHAPE: qwen-1.5b    R1-Distill-Qwen-1.5B, all 28 layers: 3.5 GB in BF16
       v2-lite      DeepSeek-V2-Lite, 6 of its 27 layers (all else full-sized, 64 experts): 7.4 GB in BF16;
                    tests/bench/repeat_layers.py makes 27 of them
The gates are random too, so tokens go to random experts. The tokenizer is that of weights/tiny.
Standard library only.
"""

import json
import math
import pathlib
import random
import shutil
import struct
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
SHAPES = {"qwen-1.5b": QWEN, "v2-lite": V2_LITE}


def mlp(prefix, hidden, width):
    return [
        (prefix + "gate_proj.weight", [width, hidden]),
        (prefix + "up_proj.weight", [width, hidden]),
        (prefix + "down_proj.weight", [hidden, width]),
    ]


def qwen_attention(p, c):
    head = c["hidden_size"] // c["num_attention_heads"]
    rows = {"q": c["hidden_size"], "k": head * c["num_key_value_heads"], "v": head * c["num_key_value_heads"]}
    weights = [(f"{p}{name}_proj.weight", [n, c["hidden_size"]]) for name, n in rows.items()]
    return (
        weights
        + [(f"{p}{name}_proj.bias", [n]) for name, n in rows.items()]
        + [(p + "o_proj.weight", [c["hidden_size"], c["hidden_size"]])]
    )


def mla(p, c):
    heads, nope, rope, value = (
        c["num_attention_heads"],
        c["qk_nope_head_dim"],
        c["qk_rope_head_dim"],
        c["v_head_dim"],
    )
    rank, hidden = c["kv_lora_rank"], c["hidden_size"]
    return [
        (p + "q_proj.weight", [heads * (nope + rope), hidden]),
        (p + "kv_a_proj_with_mqa.weight", [rank + rope, hidden]),
        (p + "kv_a_layernorm.weight", [rank]),
        (p + "kv_b_proj.weight", [heads * (nope + value), rank]),
        (p + "o_proj.weight", [hidden, heads * value]),
    ]


def layer(p, c, i):
    hidden = c["hidden_size"]
    out = [(p + "input_layernorm.weight", [hidden]), (p + "post_attention_layernorm.weight", [hidden])]
    out += mla(p + "self_attn.", c) if "kv_lora_rank" in c else qwen_attention(p + "self_attn.", c)
    if i < c.get("first_k_dense_replace", c["num_hidden_layers"]):
        return out + mlp(p + "mlp.", hidden, c["intermediate_size"])
    width = c["moe_intermediate_size"]
    out.append((p + "mlp.gate.weight", [c["n_routed_experts"], hidden]))
    for e in range(c["n_routed_experts"]):
        out += mlp(f"{p}mlp.experts.{e}.", hidden, width)
    return out + mlp(p + "mlp.shared_experts.", hidden, width * c["n_shared_experts"])


def tensors(c):
    out = [
        ("model.embed_tokens.weight", [c["vocab_size"], c["hidden_size"]]),
        ("lm_head.weight", [c["vocab_size"], c["hidden_size"]]),
        ("model.norm.weight", [c["hidden_size"]]),
    ]
    for i in range(c["num_hidden_layers"]):
        out += layer(f"model.layers.{i}.", c, i)
    return out


def noise(size):
    """BF16 numbers of either sign between 1/128 and 1/32, where trained weights lie too."""
    values = bytearray(size)
    values[0::2] = random.randbytes(size // 2)
    values[1::2] = random.randbytes(size // 2).translate(bytes((b & 0x80) | 0x3C for b in range(256)))
    return bytes(values)


def write(path, c):
    header, at = {}, 0
    for name, shape in tensors(c):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = noise(1 << 26)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(c):
            left = 2 * math.prod(shape)
            if len(shape) == 1:
                one = b"\x00\x00" if name.endswith("bias") else b"\x80\x3f"
                f.write(one * (left // 2))
                continue
            begin = 2 * random.randrange(1 << 20)  # no two matrices begin alike
            while left > 0:
                left -= f.write(block[begin : begin + left])
                begin = 0


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    config, folder = SHAPES[sys.argv[1]], pathlib.Path(sys.argv[2])
    random.seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "weights" / "tiny" / name, folder / name)
    write(folder / "model.safetensors.part", config)
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")


if __name__ == "__main__":
    main()
