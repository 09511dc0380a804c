"""Tiny GGUF models with random weights: what damaged.py damages and the fuzzer begins with.

A model is (keys, tensors) as gguf_model.container takes them.

    tests/gguf/tiny_gguf.py FOLDER      writes one of each to FOLDER/NAME
"""

import pathlib
import random
import struct
import sys

from gguf_model import container, split

LETTERS = list("abcdefgh") + ["Ġ", "ab", "abc"]
SPECIALS = ["<bos>", "<eos>", "<a>"]
VOCAB = 16                                    # LETTERS, SPECIALS and two that no text has
D, HEADS, FFN = 32, 2, 32


def vocabulary(pre):
    """Keys of a vocabulary of VOCAB tokens."""
    rest = VOCAB - len(LETTERS) - len(SPECIALS)
    return {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", pre),
        "tokenizer.ggml.tokens": (["str"], LETTERS + SPECIALS + [f"[PAD{i}]" for i in range(rest)]),
        "tokenizer.ggml.token_type": (["i32"], [1] * len(LETTERS) + [3, 3, 4] + [5] * rest),
        "tokenizer.ggml.merges": (["str"], ["a b", "ab c"]),
        "tokenizer.ggml.bos_token_id": ("u32", len(LETTERS)),
        "tokenizer.ggml.eos_token_id": ("u32", len(LETTERS) + 1),
        "tokenizer.ggml.add_bos_token": ("bool", True),
    }


def random_values(rng, dtype, n):
    """n values between -1/4 and 1/4 in the format `dtype`."""
    if dtype == "Q8_0":
        blocks = [struct.pack("<e32b", 1 / 512, *rng.choices(range(-127, 128), k=32)) for _ in range(n // 32)]
        return b"".join(blocks)
    if dtype == "IQ4_XS":                     # scales from -32 to 31
        return b"".join(struct.pack("<e", 1 / 8192) + rng.randbytes(134) for _ in range(n // 256))
    if dtype == "IQ4_NL":
        return b"".join(struct.pack("<e", 1 / 512) + rng.randbytes(16) for _ in range(n // 32))
    if dtype == "Q4_0":
        return b"".join(struct.pack("<e", 1 / 32) + rng.randbytes(16) for _ in range(n // 32))
    values = [rng.uniform(-0.25, 0.25) for _ in range(n)]
    if dtype == "BF16":
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    return struct.pack(f"<{n}{'e' if dtype == 'F16' else 'f'}", *values)


class Tensors(dict):
    def __init__(self, seed, dtype):
        super().__init__()
        self.rng, self.dtype = random.Random(seed), dtype

    def add(self, name, *shape, dtype=None):
        n = 1
        for axis in shape:
            n *= axis
        dtype = dtype or ("F32" if len(shape) == 1 else self.dtype)
        self[name] = (dtype, shape, random_values(self.rng, dtype, n))


def add_ffn(t, prefix, width=D):
    t.add(prefix + "ffn_gate.weight", width, width)
    t.add(prefix + "ffn_up.weight", width, width)
    t.add(prefix + "ffn_down.weight", width, width)


def add_ends(t, width=D):
    t.add("token_embd.weight", VOCAB, width)
    t.add("output_norm.weight", width)
    t.add("output.weight", VOCAB, width)


def gqa(architecture, dtype, pre, width=D):
    """One layer of qwen2, qwen3 or llama."""
    keys = {"general.architecture": ("str", architecture)} | {
        f"{architecture}.{name}": value
        for name, value in {
            "block_count": ("u32", 1),
            "context_length": ("u32", 64),
            "embedding_length": ("u32", width),
            "feed_forward_length": ("u32", width),
            "attention.head_count": ("u32", HEADS),
            "attention.head_count_kv": ("u32", 1),
            "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
            "rope.freq_base": ("f32", 10000),
        }.items()
    }
    t, each = Tensors(architecture, dtype), width // HEADS
    add_ends(t, width)
    t.add("blk.0.attn_norm.weight", width)
    t.add("blk.0.ffn_norm.weight", width)
    for name, rows in (("q", width), ("k", each), ("v", each)):
        t.add(f"blk.0.attn_{name}.weight", rows, width)
        if architecture == "qwen2":
            t.add(f"blk.0.attn_{name}.bias", rows)
        if architecture == "qwen3" and name != "v":
            t.add(f"blk.0.attn_{name}_norm.weight", each)
    t.add("blk.0.attn_output.weight", width, width)
    add_ffn(t, "blk.0.", width)
    return keys | vocabulary(pre), t


def add_mla(t, prefix, rank, nope, rope, v):
    t.add(prefix + "attn_norm.weight", D)
    t.add(prefix + "attn_q_a.weight", rank, D)
    t.add(prefix + "attn_q_a_norm.weight", rank)
    t.add(prefix + "attn_q_b.weight", HEADS * (nope + rope), rank)
    t.add(prefix + "attn_kv_a_mqa.weight", rank + rope, D)
    t.add(prefix + "attn_kv_a_norm.weight", rank)
    t.add(prefix + "attn_k_b.weight", HEADS, rank, nope)
    t.add(prefix + "attn_v_b.weight", HEADS, v, rank)
    t.add(prefix + "attn_output.weight", D, HEADS * v)
    t.add(prefix + "ffn_norm.weight", D)


def add_experts(t, prefix, experts):
    t.add(prefix + "ffn_gate_inp.weight", experts, D, dtype="F32")
    t.add(prefix + "exp_probs_b.bias", experts)
    for stem, rows, columns in (("gate", FFN, D), ("up", FFN, D), ("down", D, FFN)):
        t.add(prefix + f"ffn_{stem}_exps.weight", experts, rows, columns)
        t.add(prefix + f"ffn_{stem}_shexp.weight", rows, columns)


def deepseek2(dtype):
    """DeepSeek-V3: a dense layer, one with experts, and the MTP layer, which has experts too."""
    rank, nope, rope, v, experts = 32, 32, 8, 16, 4
    u32 = {
        "block_count": 3,
        "context_length": 64,
        "embedding_length": D,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": rank,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": v,
        "rope.dimension_count": rope,
        "rope.scaling.original_context_length": 16,
        "expert_count": experts,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": FFN,
        "expert_gating_func": 2,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
        "leading_dense_block_count": 1,
        "nextn_predict_layers": 1,
    }
    f32 = {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000,
        "rope.scaling.factor": 4,
        "rope.scaling.yarn_log_multiplier": 0.1,
        "expert_weights_scale": 2.5,
    }
    keys = {f"deepseek2.{name}": ("u32", value) for name, value in u32.items()}
    keys |= {f"deepseek2.{name}": ("f32", value) for name, value in f32.items()}
    keys["deepseek2.rope.scaling.type"] = ("str", "yarn")
    keys["deepseek2.expert_weights_norm"] = ("bool", True)
    t = Tensors("deepseek2", dtype)
    add_ends(t)
    for layer in range(3):
        add_mla(t, f"blk.{layer}.", rank, nope, rope, v)
        if layer:
            add_experts(t, f"blk.{layer}.", experts)
        else:
            add_ffn(t, "blk.0.")
    t.add("blk.2.nextn.eh_proj.weight", D, 2 * D)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        t.add(f"blk.2.nextn.{name}.weight", D)
    return {"general.architecture": ("str", "deepseek2")} | keys | vocabulary("deepseek-v3"), t


def all_models():
    """name -> (keys, tensors)"""
    return {
        "qwen2_f32": gqa("qwen2", "F32", "qwen2"),
        "qwen2_q8_0": gqa("qwen2", "Q8_0", "deepseek-r1-qwen"),
        "llama_f16": gqa("llama", "F16", "llama-bpe"),
        "llama_q4_0": gqa("llama", "Q4_0", "llama-bpe"),
        "qwen3_q8_0": gqa("qwen3", "Q8_0", "qwen2"),
        "llama_iq4_nl": gqa("llama", "IQ4_NL", "llama-bpe"),
        "qwen2_iq4_xs": gqa("qwen2", "IQ4_XS", "qwen2", 256),
        "deepseek2_q4_0": deepseek2("Q4_0"),
    }


def main(folder):
    for name, model in all_models().items():
        if len(data := container(*model)) < 1 << 16:             # as much as the fuzzer takes
            (pathlib.Path(folder) / name).write_bytes(data)
    keys, tensors = all_models()["qwen2_q8_0"]
    part = split(keys, tensors, 2)["-00001-of-00002.gguf"]
    (pathlib.Path(folder) / "first_of_two").write_bytes(part)


if __name__ == "__main__":
    main(sys.argv[1])
