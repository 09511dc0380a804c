"""GGUF files from model folders, as llama.cpp's converters lay them out: written from its documents and not
from this program's own reader and writer, which it tests. Standard library only.

Layouts of deepseek2: "kv_b" (early 2025 and before), "mla" (W^UK transposed, W^UV), "ik" (all three).
"""

import json
import math
import pathlib
import struct

TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "BF16": 30,
}
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}
SCALAR = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}


# -- the container -----------------------------------------------------------------------------------


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value_bytes(kind, value):
    """`kind` is a scalar's name, "str", or either in a list: ["str"]."""
    if isinstance(kind, list):
        number = 8 if kind[0] == "str" else SCALAR[kind[0]][0]
        items = b"".join(text(v) if kind[0] == "str" else struct.pack(SCALAR[kind[0]][1], v) for v in value)
        return struct.pack("<IIQ", 9, number, len(value)) + items
    if kind == "str":
        return struct.pack("<I", 8) + text(value)
    number, code = SCALAR[kind]
    return struct.pack("<I", number) + struct.pack(code, value)


def container(keys, tensors, alignment=32):
    """keys: {name: (kind, value)}; tensors: {name: (dtype, shape slowest first, data)}"""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    head += b"".join(text(name) + value_bytes(*value) for name, value in keys.items())
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        head += text(name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES[dtype], len(data)
        )
        data += content + b"\0" * (-len(content) % alignment)
    return head + b"\0" * (-len(head) % alignment) + data


def read_keys(path):
    """{name: value} of a file's keys; an array is a list."""
    data, at = path.read_bytes(), 24
    forms = dict(SCALAR.values())

    def take(kind):
        nonlocal at
        if kind == 9:
            inner, n = struct.unpack_from("<IQ", data, at)
            at += 12
            return [take(inner) for _ in range(n)]
        n = struct.unpack_from("<Q", data, at)[0] if kind == 8 else struct.calcsize(forms[kind])
        begin, at = at, at + n + 8 * (kind == 8)
        return data[begin + 8 : at].decode() if kind == 8 else struct.unpack_from(forms[kind], data, begin)[0]

    keys = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        name = take(8)
        at += 4
        keys[name] = take(struct.unpack_from("<I", data, at - 4)[0])
    return keys


# -- a folder ----------------------------------------------------------------------------------------


def read_safetensors(path):
    data = path.read_bytes()
    (n,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + n])
    return {
        name: (
            t["dtype"],
            tuple(t["shape"]),
            data[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]],
        )
        for name, t in header.items()
        if name != "__metadata__"
    }


def read_folder(folder):
    """(config, {name: (dtype, shape, data)})"""
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("model*.safetensors")):
        tensors |= read_safetensors(path)
    return json.loads((pathlib.Path(folder) / "config.json").read_text()), tensors


def to_f32(dtype, data):
    if dtype == "F32":
        return data
    n = len(data) // 2
    if dtype == "F16":
        return struct.pack(f"<{n}f", *struct.unpack(f"<{n}e", data))
    return b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))


# -- tensors -----------------------------------------------------------------------------------------

PLAIN = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def rows_of(data, rows):
    size = len(data) // rows
    return [data[i * size : (i + 1) * size] for i in range(rows)]


def pair_order(tensor, heads):
    """Row 2 j + s of a head is its row s d / 2 + j."""
    dtype, shape, data = tensor
    rows, d = rows_of(data, shape[0]), shape[0] // heads
    order = [h * d + s * (d // 2) + j for h in range(heads) for j in range(d // 2) for s in (0, 1)]
    return dtype, shape, b"".join(rows[i] for i in order)


def split_heads(tensor, c, layout):
    """kv_b_proj as the three layouts have it."""
    dtype, (_, rank), data = tensor
    heads, nope, width = c["num_attention_heads"], c["qk_nope_head_dim"], WIDTH[dtype]
    each = nope + c["v_head_dim"]
    rows = rows_of(data, heads * each)
    keys = [rows[h * each : h * each + nope] for h in range(heads)]
    values = [rows[h * each + nope : (h + 1) * each] for h in range(heads)]
    flipped = b"".join(row[i * width : (i + 1) * width] for head in keys for i in range(rank) for row in head)
    tall = layout == "ik"
    k_b = (heads * rank, nope) if tall else (heads, rank, nope)
    v_b = (heads * c["v_head_dim"], rank) if tall else (heads, c["v_head_dim"], rank)
    out = {"attn_kv_b.weight": tensor} if layout != "mla" else {}
    if layout != "kv_b":
        out |= {
            "attn_k_b.weight": (dtype, k_b, flipped),
            "attn_v_b.weight": (dtype, v_b, b"".join(sum(values, []))),
        }
    return out


def layer_tensors(c, tensors, layer, layout):
    prefix, out = f"model.layers.{layer}.", {}
    mine = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    for name, t in mine.items():
        stem, _, suffix = name.rpartition(".")
        if name == "self_attn.kv_b_proj.weight":
            out |= split_heads(t, c, layout)
        elif name == "mlp.gate.e_score_correction_bias":
            out["exp_probs_b.bias"] = t
        elif c["model_type"] == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = c["num_attention_heads"] if "q_proj" in stem else c["num_key_value_heads"]
            out[f"{PLAIN[stem]}.{suffix}"] = pair_order(t, heads)
        elif "mlp.experts." not in name:
            out[f"{PLAIN[stem]}.{suffix}"] = t
    for projection in ("gate", "up", "down"):
        if f"mlp.experts.0.{projection}_proj.weight" in mine:
            all_ = [mine[f"mlp.experts.{e}.{projection}_proj.weight"] for e in range(c["n_routed_experts"])]
            out[f"ffn_{projection}_exps.weight"] = (
                all_[0][0],
                (len(all_), *all_[0][1]),
                b"".join(t[2] for t in all_),
            )
    return {f"blk.{layer}.{name}": t for name, t in out.items()}


def as_f32(tensors):
    """Vectors and the gate are F32 in GGUF."""
    return {
        name: (
            ("F32", shape, to_f32(dtype, data))
            if len(shape) == 1 or "ffn_gate_inp" in name
            else (dtype, shape, data)
        )
        for name, (dtype, shape, data) in tensors.items()
    }


def rope_freqs(c):
    s = c["rope_scaling"]
    d = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    out = []
    for i in range(0, d, 2):
        turns = s["original_max_position_embeddings"] * c["rope_theta"] ** (-i / d) / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        smooth = (turns - low) / (high - low)
        out.append(
            1 if turns > high else s["factor"] if turns < low else 1 / ((1 - smooth) / s["factor"] + smooth)
        )
    return "F32", (d // 2,), struct.pack(f"<{d // 2}f", *out)


# -- keys --------------------------------------------------------------------------------------------


def architecture(c):
    return "deepseek2" if c["model_type"].startswith("deepseek") else c["model_type"]


def common_keys(c, blocks):
    keys = {
        "block_count": ("u32", blocks),
        "context_length": ("u32", c["max_position_embeddings"]),
        "embedding_length": ("u32", c["hidden_size"]),
        "feed_forward_length": ("u32", c["intermediate_size"]),
        "attention.head_count": ("u32", c["num_attention_heads"]),
        "rope.freq_base": ("f32", c["rope_theta"]),
        "attention.layer_norm_rms_epsilon": ("f32", c["rms_norm_eps"]),
        "vocab_size": ("u32", c["vocab_size"]),
    }
    if architecture(c) == "deepseek2":
        return keys
    d = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    keys["attention.head_count_kv"] = ("u32", c["num_key_value_heads"])
    if c["model_type"] == "llama":
        keys["rope.dimension_count"] = ("u32", d)
    if c.get("head_dim"):
        keys |= {"attention.key_length": ("u32", d), "attention.value_length": ("u32", d)}
    return keys | yarn_keys(c)


def yarn_keys(c):
    """Of RoPE's scaling, if it is YaRN."""
    s = c.get("rope_scaling") or {}
    if s.get("rope_type", s.get("type")) != "yarn":
        return {}
    keys = {
        "rope.scaling.type": ("str", "yarn"),
        "rope.scaling.factor": ("f32", s["factor"]),
        "rope.scaling.original_context_length": ("u32", s["original_max_position_embeddings"]),
    }
    for field in ("attn_factor", "beta_fast", "beta_slow"):
        if field in s:
            keys[f"rope.scaling.yarn_{field}"] = ("f32", s[field])
    return keys


def deepseek_keys(c, layout):
    nope, rope, v, rank = (
        c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    keys = {"attention.kv_lora_rank": ("u32", rank), "rope.dimension_count": ("u32", rope)}
    if c.get("q_lora_rank"):
        keys["attention.q_lora_rank"] = ("u32", c["q_lora_rank"])
    if layout == "mla":
        keys |= {
            "attention.head_count_kv": ("u32", 1),
            "attention.key_length": ("u32", rank + rope),
            "attention.value_length": ("u32", rank),
            "attention.key_length_mla": ("u32", nope + rope),
            "attention.value_length_mla": ("u32", v),
        }
    else:
        keys |= {
            "attention.head_count_kv": ("u32", c["num_attention_heads"]),
            "attention.key_length": ("u32", nope + rope),
            "attention.value_length": ("u32", v),
        }
    if s := c.get("rope_scaling"):
        keys["rope.scaling.yarn_log_multiplier"] = ("f32", 0.1 * s["mscale_all_dim"])
    return keys | yarn_keys(c)


def expert_keys(c, layout):
    if not c.get("n_routed_experts"):
        return {}
    keys = {
        "expert_count": ("u32", c["n_routed_experts"]),
        "expert_used_count": ("u32", c["num_experts_per_tok"]),
        "expert_shared_count": ("u32", c["n_shared_experts"]),
        "expert_feed_forward_length": ("u32", c["moe_intermediate_size"]),
        "expert_weights_scale": ("f32", c["routed_scaling_factor"]),
        "leading_dense_block_count": ("u32", c["first_k_dense_replace"]),
    }
    if c["norm_topk_prob"]:
        keys["expert_weights_norm"] = ("bool", True)
    if layout == "mla" or c["scoring_func"] == "sigmoid":
        keys["expert_gating_func"] = ("u32", {"softmax": 1, "sigmoid": 2}[c["scoring_func"]])
    if c["topk_method"] != "greedy":
        keys |= {
            "expert_group_count": ("u32", c["n_group"]),
            "expert_group_used_count": ("u32", c["topk_group"]),
        }
    return keys


# -- the whole ---------------------------------------------------------------------------------------


def convert(folder, layout="mla"):
    """(keys, tensors) of a folder, without a vocabulary."""
    c, tensors = read_folder(folder)
    n_mtp = c.get("num_nextn_predict_layers", 0) or 0
    blocks = c["num_hidden_layers"] + n_mtp
    keys = common_keys(c, blocks)
    if architecture(c) == "deepseek2":
        keys |= deepseek_keys(c, layout) | expert_keys(c, layout)
    if n_mtp:
        keys["nextn_predict_layers"] = ("u32", n_mtp)
    out = {TOP[name]: t for name, t in tensors.items() if name in TOP}
    if (c.get("rope_scaling") or {}).get("rope_type") == "llama3":
        out["rope_freqs.weight"] = rope_freqs(c)
    for layer in range(blocks):
        out |= layer_tensors(c, tensors, layer, layout)
    prefixed = {f"{architecture(c)}.{name}": value for name, value in keys.items()}
    return {"general.architecture": ("str", architecture(c))} | prefixed, as_f32(out)


def split(keys, tensors, parts):
    """Files of a split model, by name after the prefix."""
    names, files = list(tensors), {}
    for i in range(parts):
        mine = names[i * len(names) // parts : (i + 1) * len(names) // parts]
        numbers = {
            "split.no": ("u16", i),
            "split.count": ("u16", parts),
            "split.tensors.count": ("i32", len(names)),
        }
        files[f"-{i + 1:05}-of-{parts:05}.gguf"] = container(
            (keys if i == 0 else {}) | numbers, {name: tensors[name] for name in mine}
        )
    return files
