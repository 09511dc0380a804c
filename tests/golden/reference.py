"""Float64 reference of the DeepSeek forward pass in NumPy alone: V2, V3 (FP8 and MTP included), Qwen2, Qwen3,
Llama.

    reference.py MODEL_FOLDER --ids 1,2,3 --out taps.safetensors [--float32] [--arith bf16|fp8]

Written from the papers' formulas and the published files, for checking, not for speed. It shares no code
with the C++ program. Weights are read as stored (BF16, F16, F32, F8_E4M3 with 128x128 weight_scale_inv) and
widened exactly to float64. All arithmetic is float64, so a correct float32 program differs only by its own
rounding. Attention is computed in the naive form; the absorbed form is algebraically equal. --float32 runs
the same lines in float32: the difference between the two is a yardstick of what rounding alone may do.

--arith bf16 rounds each result to bfloat16 where DeepSeek's model.py and transformers do, but for the gate's;
fp8 also quantises the inputs of linear layers with FP8 weights to E4M3 in groups of 128.
"""
import argparse
import json
import math
import os
import struct

import numpy as np

F = np.float64              # set reference.F = np.float32 before forward() for the float32 run
ARITH = "f32"               # or bf16, fp8: what activations are rounded to


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
        self.fp8 = {}           # name -> (E4M3 values, scales)
        for k in [k for k in self if k.endswith("_scale_inv")]:
            w, s = self[k[:-len("_scale_inv")]], self.pop(k)
            self.fp8[k[:-len("_scale_inv")]] = w, s
            big = np.repeat(np.repeat(s, 128, 0), 128, 1)[:w.shape[0], :w.shape[1]]
            self[k[:-len("_scale_inv")]] = w * big


# -- bf16 and FP8 --------------------------------------------------------------------------------------------

def step_rounded(x, bits, least):
    """x to `bits` significant bits, ties to even; below 2^least in steps as small as there."""
    _, e = np.frexp(x)                       # x = f 2^e, 1/2 <= f < 1
    step = np.exp2(np.maximum(e - bits, least + 1 - bits).astype(np.float64))
    return np.rint(x / step) * step


def r(x):
    """A result as it is stored."""
    return x if ARITH == "f32" else step_rounded(x.astype(np.float32).astype(np.float64), 8, -126).astype(F)


def power_by_logarithm(s):                   # all float32
    return np.exp2(np.ceil(np.log2(s.astype(np.float64)).astype(np.float32))).astype(np.float32)


def scale_v3(amax, ue8m0):
    s = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    return power_by_logarithm(s) if ue8m0 else s


def linear_fp8(x, q, scale, ue8m0):
    """x (T, K) in E4M3 with a scale for each 128 of a token, times W: blocks are exact in float64."""
    x, y = x.astype(np.float32), np.zeros((len(x), len(q)))
    for b in range(scale.shape[1]):
        part = np.s_[:, b * 128:(b + 1) * 128]
        s = scale_v3(np.abs(x[part]).max(-1, keepdims=True), ue8m0)
        xq = np.clip(step_rounded((x[part] / s).astype(np.float64), 4, -6), -448, 448)
        y += s.astype(np.float64) * scale[:, b].repeat(128)[:len(q)] * (xq @ q[part].T)
    return y


def linear(x, w, name, bias=0.0):
    if ARITH == "fp8" and name in w.fp8:
        return r(r(linear_fp8(x, *w.fp8[name], w.ue8m0)) + bias)
    return r(x @ w[name].T + bias)


# -- small operations ----------------------------------------------------------------------------------------

def rmsnorm(x, w, eps):
    return r(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w)


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
    gate, up = linear(x, w, p + "gate_proj.weight"), linear(x, w, p + "up_proj.weight")
    return linear(r(r(silu(gate)) * up), w, p + "down_proj.weight")


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
    floor, ceil = (math.floor, math.ceil) if s.get("truncate", True) else (float, float)
    low, high = max(floor(corr(s.get("beta_fast", 32))), 0), min(ceil(corr(s.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=F) - low) / ((high - low) or 0.001), 0, 1)
    mscale = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
    all_dim = s.get("mscale_all_dim", 0)
    magnitude, scores = mscale(s.get("mscale", 1)) / mscale(all_dim), mscale(all_dim) ** 2 if all_dim else 1.0
    return f / factor * ramp + f * (1 - ramp), s.get("attention_factor", magnitude), scores


def rope_interleaved(x, pos, f, m):      # pairs (2i, 2i+1), written back in place
    a = pos[:, None, None] * f
    c, s, e, o = np.cos(a) * m, np.sin(a) * m, x[..., 0::2], x[..., 1::2]
    y = np.empty_like(x)
    y[..., 0::2], y[..., 1::2] = e * c - o * s, e * s + o * c
    return r(y)


def rope_half(x, pos, f, m):             # pairs (i, i + d/2)
    a = pos[:, None, None] * f
    h = x.shape[-1] // 2
    c, s, lo, hi = np.cos(a) * m, np.sin(a) * m, x[..., :h], x[..., h:]
    return r(np.concatenate([lo * c - hi * s, hi * c + lo * s], -1))


# -- attention -----------------------------------------------------------------------------------------------

def attend(q, k, v, scale):              # (T,H,dk) (T,H,dk) (T,H,dv), causal; also p (H,T,T), lse (T,H)
    T = q.shape[0]
    s = r(r(np.einsum("thd,jhd->htj", q, k)) * scale) + np.triu(np.full((T, T), -np.inf, F), 1)
    p, top = r(softmax(s)), s.max(-1)
    lse = top + np.log(np.exp(s - top[..., None]).sum(-1))
    return r(np.einsum("htj,jhd->thd", p, v)), p, lse.T


def mla(u, w, p, c, pos, tap):
    T, H, dn, dr = len(u), c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    r, dv, eps = c["kv_lora_rank"], c["v_head_dim"], 1e-6   # latent norms: not rms_norm_eps
    if c.get("q_lora_rank"):
        tap["c_q"] = rmsnorm(linear(u, w, p + "q_a_proj.weight"), w[p + "q_a_layernorm.weight"], eps)
        q = linear(tap["c_q"], w, p + "q_b_proj.weight")
    else:
        q = linear(u, w, p + "q_proj.weight")
    q = q.reshape(T, H, dn + dr)
    a = linear(u, w, p + "kv_a_proj_with_mqa.weight")
    tap["c_kv"] = c_kv = rmsnorm(a[:, :r], w[p + "kv_a_layernorm.weight"], eps)
    f, m, scale = rope_frequencies(c, dr)
    tap["q_nope"] = q[..., :dn]
    tap["q_rope"] = q_rope = rope_interleaved(q[..., dn:], pos, f, m)
    tap["k_rope"] = k_rope = rope_interleaved(a[:, None, r:], pos, f, m)[:, 0]
    kv = linear(c_kv, w, p + "kv_b_proj.weight").reshape(T, H, dn + dv)
    k = np.concatenate([kv[..., :dn], np.repeat(k_rope[:, None], H, 1)], -1)
    q = np.concatenate([q[..., :dn], q_rope], -1)
    o, prob, lse = attend(q, k, kv[..., dn:], scale / math.sqrt(dn + dr))
    # what the absorbed form has instead of keys and values: of the result, which is the naive form's, no part
    wk = w[p + "kv_b_proj.weight"].reshape(H, dn + dv, r)[:, :dn]
    tap["q_absorbed"] = np.concatenate([np.einsum("thd,hdr->thr", q[..., :dn], wk), q_rope], -1)
    tap["z"] = np.einsum("htj,jr->thr", prob, c_kv)
    tap["lse"], tap["o"] = lse, o
    return linear(o.reshape(T, H * dv), w, p + "o_proj.weight")


def gqa(u, w, p, c, pos, tap):
    T, H = len(u), c["num_attention_heads"]
    G, d = c.get("num_key_value_heads", H), c.get("head_dim") or c["hidden_size"] // H
    lin = lambda n: linear(u, w, p + n + ".weight", w.get(p + n + ".bias", 0.0))
    # Qwen3: RMSNorm of each head
    norm = lambda x, n: rmsnorm(x, w[p + n + ".weight"], c["rms_norm_eps"]) if p + n + ".weight" in w else x
    f, m, _ = rope_frequencies(c, d)
    q = rope_half(norm(lin("q_proj").reshape(T, H, d), "q_norm"), pos, f, m)
    k = rope_half(norm(lin("k_proj").reshape(T, G, d), "k_norm"), pos, f, m)
    v = lin("v_proj").reshape(T, G, d)
    o, _, tap["lse"] = attend(q, np.repeat(k, H // G, 1), np.repeat(v, H // G, 1), d ** -0.5)
    tap["o"] = o
    return linear(o.reshape(T, H * d), w, p + "o_proj.weight")


# -- mixture of experts --------------------------------------------------------------------------------------

def gate(logits, bias, c):
    """Of one token: the groups' scores, what selects (-inf outside of the best groups), expert ids in its
    descending order, mixing weights."""
    E, K, G = c["n_routed_experts"], c["num_experts_per_tok"], c.get("n_group") or 1
    method = c.get("topk_method", "noaux_tc")
    scoring = c.get("scoring_func", "sigmoid" if method == "noaux_tc" else "softmax")
    s = softmax(logits) if scoring == "softmax" else sigmoid(logits)
    choice, score = s + bias if method == "noaux_tc" else s, None
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
    return score, choice, idx, g


def moe(u, w, p, c, tap):
    # row by row: equal rows give equal bits, as a tie needs
    tap["router_logits"] = logits = np.stack([(u * row).sum(-1) for row in w[p + "gate.weight"]], -1)
    bias = w.get(p + "gate.e_score_correction_bias", np.zeros(logits.shape[1], F))
    chosen = [gate(l, bias, c) for l in logits]
    for name, part in zip(("group_score", "choice", "expert_idx", "expert_weight"), zip(*chosen)):
        if part[0] is not None:
            tap[name] = np.array(part, np.int32 if name == "expert_idx" else None)
    y = np.zeros_like(u)
    for t, (_, _, idx, g) in enumerate(chosen):
        for i, gi in zip(idx, g):
            y[t] += gi * swiglu(u[t:t + 1], w, f"{p}experts.{i}.")[0]
    tap["routed_out"] = r(y)
    if c.get("n_shared_experts"):
        tap["shared_out"] = swiglu(u, w, p + "shared_experts.")
        y = y + tap["shared_out"]
    return r(y)


# -- the model -----------------------------------------------------------------------------------------------

def layer(x, w, p, c, pos, tap):
    eps, deepseek = c["rms_norm_eps"], "kv_lora_rank" in c
    tap["attn_norm"] = u = rmsnorm(x, w[p + "input_layernorm.weight"], eps)
    tap["attn_out"] = a = (mla if deepseek else gqa)(u, w, p + "self_attn.", c, pos, tap)
    x = r(x + a)
    tap["ffn_norm"] = u = rmsnorm(x, w[p + "post_attention_layernorm.weight"], eps)
    sparse = p + "mlp.gate.weight" in w
    tap["ffn_out"] = y = moe(u, w, p + "mlp.", c, tap) if sparse else swiglu(u, w, p + "mlp.")
    tap["out"] = x = r(x + y)
    return x


def forward(folder, ids, mtp=None):
    """name -> array for every tap, `logits` (T,V) and, with an MTP module, `mtp_logits` (T-1,V). A dict
    passed as `mtp` receives the taps inside the MTP layer."""
    with open(os.path.join(folder, "config.json")) as f:
        c = json.load(f)
    w, ids, pos, taps = Weights(folder), np.asarray(ids), np.arange(len(ids), dtype=F), {}
    w.ue8m0 = (c.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"
    taps["embed"] = x = r(w["model.embed_tokens.weight"][ids])
    for l in range(c["num_hidden_layers"]):
        t = {}
        x = layer(x, w, f"model.layers.{l}.", c, pos, t)
        taps.update({f"layers.{l}.{k}": v for k, v in t.items()})
    head = w["model.embed_tokens.weight"] if c.get("tie_word_embeddings") else w["lm_head.weight"]
    taps["norm"] = h = rmsnorm(x, w["model.norm.weight"], c["rms_norm_eps"])
    taps["logits"] = r(h @ head.T)
    p, eps = f"model.layers.{c['num_hidden_layers']}.", c["rms_norm_eps"]
    if p + "eh_proj.weight" in w:
        # position i: the embedding of token i+1, then the hidden state of token i after the final norm
        e = rmsnorm(taps["embed"][1:], w[p + "enorm.weight"], eps)
        h = rmsnorm(h[:-1], w[p + "hnorm.weight"], eps)
        taps["mtp.in"] = z = linear(np.concatenate([e, h], -1), w, p + "eh_proj.weight")
        taps["mtp.out"] = z = layer(z, w, p, c, pos[:-1], {} if mtp is None else mtp)
        taps["mtp_logits"] = r(rmsnorm(z, w[p + "shared_head.norm.weight"], eps) @ head.T)
    return taps


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("folder")
    a.add_argument("--ids", required=True)
    a.add_argument("--out", required=True)
    a.add_argument("--float32", action="store_true")
    a.add_argument("--arith", choices=("f32", "bf16", "fp8"), default="f32")
    a = a.parse_args()
    ARITH = a.arith
    if a.float32:
        F = np.float32
    write_safetensors(a.out, forward(a.folder, [int(i) for i in a.ids.split(",")]))
