"""Float64 reference of the DeepSeek forward pass in NumPy alone: V2, V3 (FP8 and MTP included), Qwen2, Llama.

    reference.py MODEL_FOLDER --ids 1,2,3 --out taps.safetensors [--float32]

Written from the papers' formulas and the published files, for checking, not for speed. It shares no code
with the C++ program. Weights are read as stored (BF16, F16, F32, F8_E4M3 with 128x128 weight_scale_inv) and
widened exactly to float64. All arithmetic is float64, so a correct float32 program differs only by its own
rounding. Attention is computed in the naive form; the absorbed form is algebraically equal. --float32 runs
the same lines in float32: the difference between the two is a yardstick of what rounding alone may do.
"""
import argparse
import json
import math
import os
import struct

import numpy as np

F = np.float64              # set reference.F = np.float32 before forward() for the float32 run


# -- files ---------------------------------------------------------------------------------------------------

def e4m3_table():
    t = np.zeros(256, F)
    for b in range(256):
        s, e, m = b >> 7, (b >> 3) & 15, b & 7
        v = math.ldexp(m, -9) if e == 0 else math.ldexp(8 + m, e - 10)
        if e == 15 and m == 7:
            v = math.nan
        t[b] = -v if s else v
    return t


E4M3 = e4m3_table()         # every value is exact in float32 too


def widen(raw, dtype):
    if dtype == "F64":
        return np.frombuffer(raw, "<f8").astype(F)
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(F)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(F)
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(F)
    if dtype == "F8_E4M3":
        return E4M3[np.frombuffer(raw, np.uint8)].astype(F)
    if dtype in ("I64", "I32"):
        return np.frombuffer(raw, "<i8" if dtype == "I64" else "<i4")
    raise ValueError(dtype)


def read_header(path):
    with open(path, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        return json.loads(f.read(n)), f.read()


def read_safetensors(path):
    head, data = read_header(path)
    head.pop("__metadata__", None)
    part = lambda v: data[v["data_offsets"][0]:v["data_offsets"][1]]
    return {k: widen(part(v), v["dtype"]).reshape(v["shape"]) for k, v in head.items()}


def write_safetensors(path, tensors, meta=None):
    """tensors: name -> float array (F32), int array (I32), or (dtype, raw bytes, shape). Wide types come
    first, so that every tensor is aligned to its type."""
    head, blob, parts = ({"__metadata__": meta} if meta else {}), b"", {}
    for k, v in tensors.items():
        if not isinstance(v, tuple):
            v = np.ascontiguousarray(v)
            dtype, code = ("I32", "<i4") if v.dtype.kind in "iu" else ("F32", "<f4")
            v = (dtype, v.astype(code).tobytes(), v.shape)
        parts[k] = v
    width = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
    for k, (dtype, raw, shape) in sorted(parts.items(), key=lambda kv: -width[kv[1][0]]):
        head[k] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    h = json.dumps(head, separators=(",", ":")).encode()
    h += b" " * (-len(h) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h + blob)


class Weights(dict):
    """Tensor name -> float64 array; FP8 tensors times their block scales, which may live in any shard."""

    def __init__(self, folder):
        index, files = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
        if os.path.exists(index):
            with open(index) as f:
                files = sorted(set(json.load(f)["weight_map"].values()))
        for f in files:
            self.update(read_safetensors(os.path.join(folder, f)))
        for k in [k for k in self if k.endswith("_scale_inv")]:
            w, s = self[k[:-len("_scale_inv")]], self.pop(k)
            big = np.repeat(np.repeat(s, 128, 0), 128, 1)[:w.shape[0], :w.shape[1]]
            self[k[:-len("_scale_inv")]] = w * big


# -- small operations ----------------------------------------------------------------------------------------

def rmsnorm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def silu(z):
    return z / (1 + np.exp(-z))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def top(values, k):
    """Indices of the k largest, ties to the lower index, in descending order of value."""
    return np.argsort(-values, kind="stable")[:k]


def swiglu(x, w, p):
    gate, up = x @ w[p + "gate_proj.weight"].T, x @ w[p + "up_proj.weight"].T
    return (silu(gate) * up) @ w[p + "down_proj.weight"].T


# -- positions -----------------------------------------------------------------------------------------------

def llama3_frequencies(f, s):
    old, lo, hi = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wave, factor = 2 * math.pi / f, s["factor"]
    t = (old / wave - lo) / (hi - lo)
    mid = (1 - t) * f / factor + t * f
    return np.where(wave < old / hi, f, np.where(wave > old / lo, f / factor, mid))


def rope_frequencies(c, dim):
    """(frequencies (dim/2), multiplier of cos and sin, multiplier of the softmax scale)."""
    base = c.get("rope_theta", 10000.0)
    f = base ** (-np.arange(0, dim, 2, dtype=F) / dim)
    s = c.get("rope_scaling") or {}
    kind = s.get("type", s.get("rope_type"))
    if kind in (None, "default"):
        return f, 1.0, 1.0
    if kind == "llama3":
        return llama3_frequencies(f, s), 1.0, 1.0
    assert kind == "yarn", kind
    factor, old = s["factor"], s["original_max_position_embeddings"]
    corr = lambda n: dim * math.log(old / (n * 2 * math.pi)) / (2 * math.log(base))
    low = max(math.floor(corr(s.get("beta_fast", 32))), 0)
    high = min(math.ceil(corr(s.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=F) - low) / ((high - low) or 0.001), 0, 1)
    mscale = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
    all_dim = s.get("mscale_all_dim", 0)
    magnitude, scores = mscale(s.get("mscale", 1)) / mscale(all_dim), mscale(all_dim) ** 2 if all_dim else 1.0
    return f / factor * ramp + f * (1 - ramp), magnitude, scores


def rope_interleaved(x, pos, f, m):      # pairs (2i, 2i+1), written back in place
    a = pos[:, None, None] * f
    c, s, e, o = np.cos(a) * m, np.sin(a) * m, x[..., 0::2], x[..., 1::2]
    y = np.empty_like(x)
    y[..., 0::2], y[..., 1::2] = e * c - o * s, e * s + o * c
    return y


def rope_half(x, pos, f, m):             # pairs (i, i + d/2)
    a = pos[:, None, None] * f
    h = x.shape[-1] // 2
    c, s, lo, hi = np.cos(a) * m, np.sin(a) * m, x[..., :h], x[..., h:]
    return np.concatenate([lo * c - hi * s, hi * c + lo * s], -1)


# -- attention -----------------------------------------------------------------------------------------------

def attend(q, k, v, scale):              # (T,H,dk) (T,H,dk) (T,H,dv), causal
    T = q.shape[0]
    s = np.einsum("thd,jhd->htj", q, k) * scale + np.triu(np.full((T, T), -np.inf, F), 1)
    return np.einsum("htj,jhd->thd", softmax(s), v)


def mla(u, w, p, c, pos, tap):
    T, H, dn, dr = len(u), c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    r, dv, eps = c["kv_lora_rank"], c["v_head_dim"], 1e-6   # latent norms: not rms_norm_eps
    if c.get("q_lora_rank"):
        tap["c_q"] = rmsnorm(u @ w[p + "q_a_proj.weight"].T, w[p + "q_a_layernorm.weight"], eps)
        q = tap["c_q"] @ w[p + "q_b_proj.weight"].T
    else:
        q = u @ w[p + "q_proj.weight"].T
    q = q.reshape(T, H, dn + dr)
    a = u @ w[p + "kv_a_proj_with_mqa.weight"].T
    tap["c_kv"] = c_kv = rmsnorm(a[:, :r], w[p + "kv_a_layernorm.weight"], eps)
    f, m, scale = rope_frequencies(c, dr)
    tap["q_nope"] = q[..., :dn]
    tap["q_rope"] = q_rope = rope_interleaved(q[..., dn:], pos, f, m)
    tap["k_rope"] = k_rope = rope_interleaved(a[:, None, r:], pos, f, m)[:, 0]
    kv = (c_kv @ w[p + "kv_b_proj.weight"].T).reshape(T, H, dn + dv)
    k = np.concatenate([kv[..., :dn], np.repeat(k_rope[:, None], H, 1)], -1)
    o = attend(np.concatenate([q[..., :dn], q_rope], -1), k, kv[..., dn:], scale / math.sqrt(dn + dr))
    return o.reshape(T, H * dv) @ w[p + "o_proj.weight"].T


def gqa(u, w, p, c, pos, tap):
    T, H = len(u), c["num_attention_heads"]
    G, d = c.get("num_key_value_heads", H), c.get("head_dim") or c["hidden_size"] // H
    lin = lambda n: u @ w[p + n + ".weight"].T + w.get(p + n + ".bias", 0.0)
    f, m, _ = rope_frequencies(c, d)
    q = rope_half(lin("q_proj").reshape(T, H, d), pos, f, m)
    k = rope_half(lin("k_proj").reshape(T, G, d), pos, f, m)
    v = lin("v_proj").reshape(T, G, d)
    o = attend(q, np.repeat(k, H // G, 1), np.repeat(v, H // G, 1), d ** -0.5)
    return o.reshape(T, H * d) @ w[p + "o_proj.weight"].T


# -- mixture of experts --------------------------------------------------------------------------------------

def gate(logits, bias, c):
    """Expert ids (in descending order of the selecting score) and mixing weights of one token."""
    E, K, G = c["n_routed_experts"], c["num_experts_per_tok"], c.get("n_group") or 1
    method = c.get("topk_method", "noaux_tc")
    scoring = c.get("scoring_func", "sigmoid" if method == "noaux_tc" else "softmax")
    s = softmax(logits) if scoring == "softmax" else sigmoid(logits)
    choice = s + bias if method == "noaux_tc" else s
    if method != "greedy":
        per = choice.reshape(G, E // G)
        score = np.sort(per, -1)[:, -2:].sum(-1) if method == "noaux_tc" else per.max(-1)
        kept = np.isin(np.arange(E) // (E // G), top(score, c["topk_group"]))
        choice = np.where(kept, choice, -np.inf)
    idx = top(choice, K)
    g = s[idx]
    if c.get("norm_topk_prob"):
        g = g / (g.sum() + 1e-20)
    if method == "noaux_tc" or not c.get("norm_topk_prob"):
        g = g * c.get("routed_scaling_factor", 1.0)
    return idx, g


def moe(u, w, p, c, tap):
    # row by row: equal rows give equal bits, as a tie needs
    tap["router_logits"] = logits = np.stack([(u * row).sum(-1) for row in w[p + "gate.weight"]], -1)
    bias = w.get(p + "gate.e_score_correction_bias", np.zeros(logits.shape[1], F))
    chosen = [gate(l, bias, c) for l in logits]
    tap["expert_idx"] = np.array([i for i, _ in chosen], np.int32)
    tap["expert_weight"] = np.array([g for _, g in chosen])
    y = swiglu(u, w, p + "shared_experts.") if c.get("n_shared_experts") else np.zeros_like(u)
    for t, (idx, g) in enumerate(chosen):
        for i, gi in zip(idx, g):
            y[t] += gi * swiglu(u[t:t + 1], w, f"{p}experts.{i}.")[0]
    return y


# -- the model -----------------------------------------------------------------------------------------------

def layer(x, w, p, c, pos, tap):
    eps, deepseek = c["rms_norm_eps"], "kv_lora_rank" in c
    tap["attn_norm"] = u = rmsnorm(x, w[p + "input_layernorm.weight"], eps)
    tap["attn_out"] = a = (mla if deepseek else gqa)(u, w, p + "self_attn.", c, pos, tap)
    x = x + a
    tap["ffn_norm"] = u = rmsnorm(x, w[p + "post_attention_layernorm.weight"], eps)
    sparse = p + "mlp.gate.weight" in w
    tap["ffn_out"] = y = moe(u, w, p + "mlp.", c, tap) if sparse else swiglu(u, w, p + "mlp.")
    tap["out"] = x + y
    return x + y


def forward(folder, ids, mtp=None):
    """name -> array for every tap, `logits` (T,V) and, with an MTP module, `mtp_logits` (T-1,V). A dict
    passed as `mtp` receives the taps inside the MTP layer."""
    with open(os.path.join(folder, "config.json")) as f:
        c = json.load(f)
    w, ids, pos, taps = Weights(folder), np.asarray(ids), np.arange(len(ids), dtype=F), {}
    taps["embed"] = x = w["model.embed_tokens.weight"][ids]
    for l in range(c["num_hidden_layers"]):
        t = {}
        x = layer(x, w, f"model.layers.{l}.", c, pos, t)
        taps.update({f"layers.{l}.{k}": v for k, v in t.items()})
    head = w["model.embed_tokens.weight"] if c.get("tie_word_embeddings") else w["lm_head.weight"]
    taps["norm"] = h = rmsnorm(x, w["model.norm.weight"], c["rms_norm_eps"])
    taps["logits"] = h @ head.T
    p, eps = f"model.layers.{c['num_hidden_layers']}.", c["rms_norm_eps"]
    if p + "eh_proj.weight" in w:
        # position i: the embedding of token i+1, then the hidden state of token i after the final norm
        e = rmsnorm(w["model.embed_tokens.weight"][ids[1:]], w[p + "enorm.weight"], eps)
        h = rmsnorm(h[:-1], w[p + "hnorm.weight"], eps)
        taps["mtp.in"] = z = np.concatenate([e, h], -1) @ w[p + "eh_proj.weight"].T
        taps["mtp.out"] = z = layer(z, w, p, c, pos[:-1], {} if mtp is None else mtp)
        taps["mtp_logits"] = rmsnorm(z, w[p + "shared_head.norm.weight"], eps) @ head.T
    return taps


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("folder")
    a.add_argument("--ids", required=True)
    a.add_argument("--out", required=True)
    a.add_argument("--float32", action="store_true")
    a = a.parse_args()
    if a.float32:
        F = np.float32
    write_safetensors(a.out, forward(a.folder, [int(i) for i in a.ids.split(",")]))
