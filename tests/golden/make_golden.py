"""Makes the golden set: tiny random models and their float64 taps, and the taps of weights/tiny.

    python3 tests/golden/make_golden.py [--out FOLDER] [--only NAME]

NumPy alone (made with Python 3.11.7, NumPy 2.4.6 and its OpenBLAS on x86-64; seeds below). The number of
cores does not matter; another BLAS, or another processor under the same one, may change the last bit of a tap
and the figures of float32_error. FOLDER (default: this one) receives models/NAME/, each a Hugging Face folder
with config.json, model.safetensors (or shards) and taps.safetensors; and tiny/taps.safetensors.

Weights are scaled so that activations stay near 1, router scores are spread, and biases are large enough to
change the choice of experts. Token ids are redrawn until no choice of experts or groups is nearer than MARGIN
to another one, unless it is an exact tie made on purpose.
"""
import argparse
import json
import math
import os

for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[v] = "1"                                     # the same sums on any number of cores
import numpy as np

import reference as R

SEED = 1
MARGIN = 2e-4

# -- what is made --------------------------------------------------------------------------------------------

BASE2 = dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", hidden_act="silu",
             rms_norm_eps=1e-6, vocab_size=307, hidden_size=84, intermediate_size=130,
             moe_intermediate_size=20, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
             kv_lora_rank=36, qk_nope_head_dim=22, qk_rope_head_dim=14, v_head_dim=18, n_shared_experts=2,
             n_routed_experts=12, num_experts_per_tok=3, first_k_dense_replace=1, moe_layer_freq=1,
             max_position_embeddings=4096, rope_theta=10000.0, attention_bias=False,
             tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
             aux_loss_alpha=0.001, seq_aux=True, topk_method="greedy", scoring_func="softmax",
             norm_topk_prob=False, routed_scaling_factor=1.0, n_group=1, topk_group=1, q_lora_rank=50)
YARN = dict(type="yarn", factor=40, original_max_position_embeddings=24, beta_fast=32, beta_slow=1,
            mscale=0.707, mscale_all_dim=0.707)
YARN3 = dict(YARN, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
GROUPS = dict(n_routed_experts=15, n_group=5, topk_group=2, topk_method="group_limited_greedy",
              routed_scaling_factor=16.0, qk_rope_head_dim=20, rope_theta=150.0,
              rope_scaling=dict(YARN, original_max_position_embeddings=36, beta_fast=2, mscale=1.0,
                                mscale_all_dim=0.707))
BASE3 = dict(BASE2, architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", n_shared_experts=1,
             n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, topk_method="noaux_tc",
             scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, rope_scaling=YARN3)
QWEN = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", rms_norm_eps=1e-6,
            vocab_size=307, hidden_size=84, intermediate_size=110, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=4096, rope_theta=10000.0,
            tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
            use_sliding_window=False, sliding_window=16, max_window_layers=1)   # the window must be ignored
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
LLAMA = dict(QWEN, architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5,
             rope_theta=2000.0, attention_bias=False, mlp_bias=False, rope_scaling=LLAMA3)
LLAMA = {k: v for k, v in LLAMA.items() if "window" not in k}
# R1-0528-Qwen3-8B scales by YaRN, with the factor of cos and sin left to be computed: 0.1 ln 4 + 1.
QWEN3 = dict(QWEN, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=20, attention_bias=False,
             rope_theta=1000.0, rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=4,
                                                  original_max_position_embeddings=16))
FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
SMALL = dict(num_hidden_layers=2)
SHAPE_FP8 = dict(SMALL, hidden_size=136, intermediate_size=150, moe_intermediate_size=132,
                 num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=132, q_lora_rank=140,
                 n_routed_experts=6, num_experts_per_tok=3, n_group=3, vocab_size=151)
SHAPE_UE8M0 = dict(SMALL, hidden_size=256, intermediate_size=128, moe_intermediate_size=128,
                   num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=128, q_lora_rank=128,
                   v_head_dim=32, n_routed_experts=6, num_experts_per_tok=2, n_group=3, vocab_size=151)
MODELS = {
    "v2-lite": dict(BASE2, q_lora_rank=None, rope_scaling=YARN),
    "v2-groups": dict(BASE2, **GROUPS),
    "v2-noyarn": dict(BASE2, **SMALL, rope_scaling=None, rms_norm_eps=1e-3),
    "v2-ties": dict(BASE2, **SMALL, n_group=4, topk_group=2, topk_method="group_limited_greedy",
                    routed_scaling_factor=2.0, rope_scaling=YARN),
    "v3-bf16": dict(BASE3),
    "v3-mtp": dict(BASE3, n_routed_experts=12, num_experts_per_tok=3, num_nextn_predict_layers=1,
                   first_k_dense_replace=2),
    "v3-negative": dict(BASE3, **SMALL),
    "v3-ties": dict(BASE3, **SMALL, n_routed_experts=12, num_experts_per_tok=3),
    "v3-fp8": dict(BASE3, **SHAPE_FP8, num_nextn_predict_layers=1, quantization_config=FP8),
    "v3-ue8m0": dict(BASE3, **SHAPE_UE8M0, quantization_config=dict(FP8, scale_fmt="ue8m0")),
    "v3-f16": dict(BASE3, **SMALL, vocab_size=151, torch_dtype="float16"),
    "v3-long": dict(BASE3, **SMALL, vocab_size=151, n_routed_experts=12, num_experts_per_tok=3,
                    num_nextn_predict_layers=1,
                    rope_scaling=dict(YARN3, original_max_position_embeddings=64)),
    "qwen2": dict(QWEN, **SMALL),
    "qwen2-tied": dict(QWEN, **SMALL, tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1,
                       rope_theta=1000000.0, rms_norm_eps=1e-5),
    "qwen2-f32": dict(QWEN, **SMALL, vocab_size=151, intermediate_size=50, torch_dtype="float32"),
    "qwen3": dict(QWEN3),
    "qwen3-plain": dict(QWEN3, **SMALL, vocab_size=151, head_dim=28, rms_norm_eps=1e-3, rope_scaling=None,
                        tie_word_embeddings=True),
    "llama3": dict(LLAMA),
    "llama3-long": dict(LLAMA, **SMALL, vocab_size=151, rope_theta=500000.0,
                        rope_scaling=dict(LLAMA3, original_max_position_embeddings=64)),
}
# Mean of e_score_correction_bias, else -0.2. 5 as in the released V3: BF16 would lose the order. -1.1: most
# biased scores are below 0, so masked groups filled with 0 would win.
BIAS = {"v3-bf16": 5.0, "v3-negative": -1.1}
TOKENS = {"v2-groups": 46, "v3-bf16": 46, "v3-negative": 28, "v3-fp8": 24, "v3-ue8m0": 20, "llama3": 48,
          "v3-long": 300, "llama3-long": 300}               # else 34
SHARDS = {"v3-fp8": 3, "v2-groups": 2, "qwen2-f32": 3}
# Positions whose rows are stored, else all: the ends, both sides of chunk borders, and within and beyond the
# original context.
LONG_ROWS = [0, 1, 2, 6, 7, 63, 64, 65, 127, 128, 192, 255, 256, 298, 299]
ROWS = {"v3-long": LONG_ROWS, "llama3-long": LONG_ROWS}

# Models whose kernels' borders are stored, too; in the others they would say nothing new in as many bytes.
BORDERS = ("q_absorbed", "z", "lse", "o", "group_score", "choice", "routed_out", "shared_out")
WITH_BORDERS = ("v2-lite", "v2-groups", "v3-bf16", "v3-long", "qwen2", "qwen2-tied", "qwen2-f32", "llama3",
                "llama3-long", "qwen3")

# weights/tiny: "714 - 95=?" with its thought and answer, as its tokenizer writes them.
TINY_IDS = [0, 508, 319, 292, 223, 21, 22, 25, 260, 223, 26, 23, 33, 509, 510, 201, 21, 22, 25, 260, 223, 26,
            23, 201, 25, 260, 223, 23, 259, 223, 19, 20, 14, 268, 223, 20, 14, 295, 223, 19, 201, 22, 260,
            223, 26, 260, 223, 19, 259, 223, 19, 21, 14, 268, 223, 21, 14, 295, 223, 19, 201, 21, 260, 223,
            18, 260, 223, 19, 259, 223, 22, 14, 268, 223, 22, 201, 266, 223, 22, 21, 20, 201, 511, 263, 21,
            22, 25, 260, 223, 26, 23, 259, 223, 22, 21, 20, 16, 1]
TINY_ROWS = [0, 1, 2, 6, 7, 8, 13, 15, 31, 40, 63, 64, 65, 82, 83, 96, 97]


# -- numbers -------------------------------------------------------------------------------------------------

def bf16(x):
    u = x.astype(np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def stored(x, c):
    """x as (dtype, bytes, shape) in the config's own type."""
    dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[c["torch_dtype"]]
    data = bf16(x) if dtype == "BF16" else x.astype("<f2" if dtype == "F16" else "<f4")
    return dtype, data.tobytes(), x.shape


def e4m3(x):                              # round to nearest even, saturating
    grid = R.E4M3[:127]
    a = np.minimum(np.abs(x), 448.0)
    hi = np.clip(np.searchsorted(grid, a), 1, 126)
    lo = hi - 1
    mid = (grid[lo] + grid[hi]) / 2
    code = np.where(a > mid, hi, np.where(a < mid, lo, np.where(lo % 2 == 0, lo, hi)))
    return (code | (np.signbit(x).astype(int) << 7)).astype(np.uint8)


def quantise(x, ue8m0):
    """E4M3 codes and the F32 scale of each 128x128 block; blocks at the edges may be partial."""
    s, q = np.empty([-(-n // 128) for n in x.shape], np.float32), np.empty(x.shape, np.uint8)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            b = np.s_[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
            v = np.abs(x[b]).max() / 448
            s[i, j] = 2.0 ** math.ceil(math.log2(v)) if ue8m0 else v
            q[b] = e4m3(x[b] / np.float64(s[i, j]))
    return q, s


# -- weights -------------------------------------------------------------------------------------------------

def mlp_shapes(p, width, D):
    return {p + "gate_proj.weight": ((width, D), "w"), p + "up_proj.weight": ((width, D), "w"),
            p + "down_proj.weight": ((D, width), "w")}


def mla_shapes(c, a):
    D, H, r, rq = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["q_lora_rank"]
    dn, dr, dv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if rq:
        out = {a + "q_a_proj.weight": ((rq, D), "w"), a + "q_a_layernorm.weight": ((rq,), "n"),
               a + "q_b_proj.weight": ((H * (dn + dr), rq), "w")}
    else:
        out = {a + "q_proj.weight": ((H * (dn + dr), D), "w")}
    return out | {a + "kv_a_proj_with_mqa.weight": ((r + dr, D), "w"),
                  a + "kv_a_layernorm.weight": ((r,), "n"), a + "kv_b_proj.weight": ((H * (dn + dv), r), "w"),
                  a + "o_proj.weight": ((D, H * dv), "w")}


def gqa_shapes(c, a):
    D, H, G, out = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], {}
    d = c.get("head_dim", D // H)
    for n, k in (("q", H), ("k", G), ("v", G)):
        out[a + n + "_proj.weight"] = ((k * d, D), "w")
        if c["model_type"] == "qwen2":
            out[a + n + "_proj.bias"] = ((k * d,), "b")
        if c["model_type"] == "qwen3" and n != "v":
            out[a + n + "_norm.weight"] = ((d,), "n")
    return out | {a + "o_proj.weight": ((D, H * d), "w")}


def moe_shapes(c, m):
    D, E, F = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
    out = {m + "gate.weight": ((E, D), "g")}
    if c["topk_method"] == "noaux_tc":
        out[m + "gate.e_score_correction_bias"] = ((E,), "c")
    for e in range(E):
        out |= mlp_shapes(f"{m}experts.{e}.", F, D)
    return out | mlp_shapes(m + "shared_experts.", F * c["n_shared_experts"], D)


def mtp_shapes(c, p):
    D = c["hidden_size"]
    return {p + "enorm.weight": ((D,), "n"), p + "hnorm.weight": ((D,), "n"),
            p + "shared_head.norm.weight": ((D,), "n"), p + "eh_proj.weight": ((D, 2 * D), "h"),
            p + "embed_tokens.weight": (None, "copy"), p + "shared_head.head.weight": (None, "copy")}


def shapes(c):
    """name -> (shape, kind); kind: 'w' linear, 'n' norm, 'e' embedding, 'h' head or eh_proj, 'b' bias,
    'c' correction bias, 'g' gate, 'copy'."""
    D, V, L = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    out = {"model.embed_tokens.weight": ((V, D), "e")}
    for l in range(L + c.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{l}."
        out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = ((D,), "n")
        out |= (mla_shapes if "kv_lora_rank" in c else gqa_shapes)(c, p + "self_attn.")
        if "n_routed_experts" in c and l >= c["first_k_dense_replace"]:
            out |= moe_shapes(c, p + "mlp.")
        else:
            out |= mlp_shapes(p + "mlp.", c["intermediate_size"], D)
        if l >= L:
            out |= mtp_shapes(c, p)
    out["model.norm.weight"] = ((D,), "n")
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = ((V, D), "h")
    return out


def tie(x, c):
    """Rows or biases of a gate with exact ties: expert 1 equals 0, the last group is the first reversed."""
    n = c["n_routed_experts"] // c["n_group"]
    x[1] = x[0]
    x[-n:] = x[:n][::-1]
    return x


def spread_blocks(x, rng):
    """Gives the 128x128 blocks different sizes."""
    m, n = [-(-n // 128) for n in x.shape]
    size = np.exp(0.5 * rng.standard_normal((m, n)))
    return x * size.repeat(128, 0).repeat(128, 1)[:x.shape[0], :x.shape[1]]


def draw(name, c, shape, kind, rng):
    x = rng.standard_normal(shape)
    if kind == "n":
        x = 1 + 0.2 * x
    elif kind == "b":
        x = 0.5 * x
    elif kind == "c":
        x = 0.3 * x + BIAS.get(name, -0.2)
    elif kind == "g":
        x = x * 2 / math.sqrt(shape[1])
    elif kind != "e":
        x = x * 1.2 / math.sqrt(shape[1])
    return tie(x, c) if name.endswith("ties") and kind in "gc" else x


def weights(name, c, rng):
    quant, t = c.get("quantization_config"), {}
    for k, (shape, kind) in shapes(c).items():
        if kind == "copy":
            t[k] = k
            continue
        x = draw(name, c, shape, kind, rng)
        if kind == "c":
            t[k] = ("F32", x.astype("<f4").tobytes(), shape)
        elif kind == "w" and quant:
            # V3.1's o_proj scales are no powers of two
            q, s = quantise(spread_blocks(x, rng), "scale_fmt" in quant and "o_proj" not in k)
            t[k] = ("F8_E4M3", q.tobytes(), shape)
            t[k + "_scale_inv"] = ("F32", s.tobytes(), s.shape)
        else:
            t[k] = stored(x, c)
    for k in [k for k, v in t.items() if v == k]:
        t[k] = t["model.embed_tokens.weight" if "embed" in k else "lm_head.weight"]
    return t


def write_shards(folder, t, n):
    """In n files, neighbours apart: a scale, made right after its weight, lies in the next one."""
    name = lambda i: f"model-{i + 1:05}-of-{n:06}.safetensors"
    files = {name(i): {k: v for j, (k, v) in enumerate(t.items()) if j % n == i} for i in range(n)}
    for f, part in files.items():
        R.write_safetensors(os.path.join(folder, f), part, {"format": "pt"})
    index = {"metadata": {"total_size": sum(len(v[1]) for v in t.values())},
             "weight_map": {k: f for f, part in files.items() for k in part}}
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump(index, f, indent=1)


# -- prompts -------------------------------------------------------------------------------------------------

def margins(c, router_logits, bias):
    """(T): the smallest nonzero gap that decides which groups and experts a token takes, in which order."""
    E, K, G = c["n_routed_experts"], c["num_experts_per_tok"], c["n_group"]
    gaps = lambda v: [d for d in -np.diff(-np.sort(-v)) if d > 0]
    least = []
    for l in router_logits:
        s, found = R.softmax(l) if c["scoring_func"] == "softmax" else R.sigmoid(l), [np.inf]
        s = s + bias
        if c["topk_method"] != "greedy":
            score = np.sort(s.reshape(G, -1), -1)
            score = score[:, -2:].sum(-1) if c["topk_method"] == "noaux_tc" else score[:, -1]
            found += gaps(np.sort(score)[::-1][c["topk_group"] - 1:c["topk_group"] + 1])
            s = np.where(np.isin(np.arange(E) // (E // G), R.top(score, c["topk_group"])), s, -1e9)
        least.append(min(found + gaps(np.sort(s)[::-1][:K + 1])))
    return np.array(least)


def routing_margins(c, w, out, mtp, T):
    """(T): margins over all layers. Position i of the MTP layer depends on token i + 1."""
    least, L = np.full(T, np.inf), c["num_hidden_layers"]
    bias = lambda l: w.get(f"model.layers.{l}.mlp.gate.e_score_correction_bias", 0)
    for l in range(L):
        if f"layers.{l}.router_logits" in out:
            least = np.minimum(least, margins(c, out[f"layers.{l}.router_logits"], bias(l)))
    if mtp:
        least[1:] = np.minimum(least[1:], margins(c, mtp["router_logits"], bias(L)))
    return least


def draw_prompt(name, c, folder, rng):
    """Ids and the reference's results. A short prompt is redrawn whole, a long one from the first token whose
    margin is too small: what comes before does not depend on it."""
    T, w, kept = TOKENS.get(name, 34), R.Weights(folder), 0
    ids = rng.integers(2, c["vocab_size"], T)
    while True:
        mtp = {}
        out = R.forward(folder, ids, mtp)
        least = routing_margins(c, w, out, mtp, T)
        if least.min() >= MARGIN:
            return ids, out, least.min()
        kept = int(np.argmax(least < MARGIN)) if name in ROWS else 0
        ids = np.concatenate([ids[:kept], rng.integers(2, c["vocab_size"], T - kept)])


# -- files ---------------------------------------------------------------------------------------------------

def float32_errors(folder, ids, out):
    """tensor -> largest error of the same lines in float32."""
    R.F = np.float32
    single = R.forward(folder, ids)
    R.F = np.float64
    apart = lambda a, b: np.abs(np.subtract(a, b, out=np.zeros(b.shape), where=a != b)).max()   # of -inf: 0
    error = {k: float(apart(single[k].astype(np.float64), out[k])) for k in out}
    assert all(error[k] == 0 for k in out if k.endswith("expert_idx"))
    return error


def write_taps(path, ids, out, error, rows, meta):
    """All rows, or those at the positions `rows` (of the MTP tensors, without the last position)."""
    head = {"ids": np.asarray(ids, np.int32)}
    if meta["model"] not in WITH_BORDERS:
        meta = meta | {"without": " ".join(BORDERS)}
        out = {k: v for k, v in out.items() if k.split(".")[-1] not in BORDERS}
        error = {k: error[k] for k in out}
    if rows:
        head["rows"] = np.array(rows, np.int32)
        out = {k: v[[r for r in rows if r < len(v)]] for k, v in out.items()}
    short = json.dumps({k: float(f"{v:.3g}") for k, v in error.items()})
    meta = meta | {"arithmetic": "float64, stored as F32", "float32_error": short}
    R.write_safetensors(path, head | out, meta)


def folder_size(folder):
    return sum(os.path.getsize(os.path.join(folder, f)) for f in os.listdir(folder))


def make(name, folder):
    c, rng = MODELS[name], np.random.default_rng([SEED, *name.encode()])
    os.makedirs(folder, exist_ok=True)
    t = weights(name, c, rng)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(c, f, indent=1)
    if name in SHARDS:
        write_shards(folder, t, SHARDS[name])
    else:
        R.write_safetensors(os.path.join(folder, "model.safetensors"), t, {"format": "pt"})
    ids, out, gap = draw_prompt(name, c, folder, rng)
    error = float32_errors(folder, ids, out)
    meta = {"model": name, "seed": str(SEED)}
    write_taps(os.path.join(folder, "taps.safetensors"), ids, out, error, ROWS.get(name), meta)
    rms = np.sqrt((out["logits"] ** 2).mean())
    print(f"{name:12} tokens {len(ids):3}  logits rms {rms:.3f}  float32 error {error['logits']:.1e}  "
          f"routing margin {gap:.1e}  {folder_size(folder) / 1e6:.2f} MB")


def make_tiny(folder):
    model = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "weights", "tiny")
    os.makedirs(folder, exist_ok=True)
    out = R.forward(model, TINY_IDS)
    error = float32_errors(model, TINY_IDS, out)
    meta = {"model": "weights/tiny"}
    write_taps(os.path.join(folder, "taps.safetensors"), TINY_IDS, out, error, TINY_ROWS, meta)
    print(f"{'tiny':12} tokens {len(TINY_IDS):3}  float32 error {error['logits']:.1e}  "
          f"{folder_size(folder) / 1e6:.2f} MB")


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)))
    a.add_argument("--only", choices=[*MODELS, "tiny"])
    a = a.parse_args()
    for name in MODELS:
        if a.only in (None, name):
            make(name, os.path.join(a.out, "models", name))
    if a.only in (None, "tiny"):
        make_tiny(os.path.join(a.out, "tiny"))
