#!/usr/bin/env python3
"""One layer in the real shape of DeepSeek-V3, with weights and inputs from a seed, for who checks a kernel.

    tests/golden/v3_layer.py --seed 1 --out FOLDER                  BF16, 32 of the 256 experts: 3.3 GB
    tests/golden/v3_layer.py --seed 1 --out FOLDER --fp8 --experts 256      the layer as published: 11.5 GB
    tests/golden/v3_layer.py --seed 1 --out FOLDER --dense          the first layers' FFN: 1.2 GB

FOLDER becomes a model of one layer that `deepseek logits -m FOLDER --ids ...` runs: hidden size 7168, 128
heads, q_lora_rank 1536, kv_lora_rank 512, heads of 128 + 64 and 128, experts of width 2048 in 8 groups, of
which 4, and 8 a token, and a shared one; embedding and head have 1,024 tokens. It also gets ids.txt, the
input (--tokens), and taps.safetensors, all that the program computes (not with --no-taps).

The seed says everything: number i of a tensor depends on seed, name and i alone, so expert 7 is the same
among 32 as among 256. Weights are one of 256 quantiles of a normal distribution, of variance 1 / inputs;
with --fp8 those of E4M3 and a scale for each 128 x 128. The size is said before anything is written, in
pieces of 8 MB.
--set KEY=NUMBER changes a field of config.json, for other shapes. Standard library only.
"""
import argparse
import json
import math
import os
import pathlib
import random
import shutil
import statistics
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PIECE = 1 << 23
CONFIG = dict(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_act="silu",
              hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=1,
              num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
              qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=32,
              n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=0,
              moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
              routed_scaling_factor=2.5, num_nextn_predict_layers=0, vocab_size=1024, rms_norm_eps=1e-6,
              max_position_embeddings=163840, rope_theta=10000, tie_word_embeddings=False,
              attention_bias=False, bos_token_id=0, eos_token_id=1, torch_dtype="bfloat16",
              rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32,
                                beta_slow=1, mscale=1.0, mscale_all_dim=1.0))
FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
NORMAL = [statistics.NormalDist().inv_cdf((b + 0.5) / 256) for b in range(256)]


# -- numbers -------------------------------------------------------------------------------------------------

def bf16(x):
    bits, = struct.unpack("<I", struct.pack("<f", x))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def e4m3(x):
    """The nearest code, |x| <= 448."""
    value = lambda c: math.ldexp(8 + c % 8, c // 8 - 10) if c >= 8 else math.ldexp(c, -9)
    return min(range(127), key=lambda c: (abs(value(c) - abs(x)), c % 2)) | (128 if x < 0 else 0)


def pieces(rng, count):
    """Random bytes, some at a time."""
    for begin in range(0, count, PIECE):
        yield rng.randbytes(min(PIECE, count - begin))


def in_bf16(rng, count, mean, deviation):
    codes = [bf16(mean + deviation * x) for x in NORMAL]
    low, high = bytes(c & 255 for c in codes), bytes(c >> 8 for c in codes)
    for piece in pieces(rng, count):
        out = bytearray(2 * len(piece))
        out[0::2], out[1::2] = piece.translate(low), piece.translate(high)
        yield out


E4M3_SIZE = 448 / max(NORMAL)                           # the largest quantile is the largest number


def in_e4m3(rng, count):
    codes = bytes(e4m3(E4M3_SIZE * x) for x in NORMAL)
    return (piece.translate(codes) for piece in pieces(rng, count))


def in_f32(rng, count, number):
    yield struct.pack(f"<{count}f", *(number(NORMAL[b]) for b in rng.randbytes(count)))


# -- what there is -------------------------------------------------------------------------------------------

def shapes(c):
    """name -> shape; matrices are (outputs, inputs)."""
    D, V, H, E = (c[k] for k in ("hidden_size", "vocab_size", "num_attention_heads", "n_routed_experts"))
    q, kv, dn, dr, dv = (c[k] for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                                        "v_head_dim"))
    p, a, m = "model.layers.0.", "model.layers.0.self_attn.", "model.layers.0.mlp."
    mlp = lambda at, F: {at + "gate_proj": (F, D), at + "up_proj": (F, D), at + "down_proj": (D, F)}
    out = {"model.embed_tokens": (V, D), p + "input_layernorm": (D,), a + "q_a_proj": (q, D),
           a + "q_a_layernorm": (q,), a + "q_b_proj": (H * (dn + dr), q),
           a + "kv_a_proj_with_mqa": (kv + dr, D),
           a + "kv_a_layernorm": (kv,), a + "kv_b_proj": (H * (dn + dv), kv), a + "o_proj": (D, H * dv),
           p + "post_attention_layernorm": (D,)}
    if c["first_k_dense_replace"]:
        out |= mlp(m, c["intermediate_size"])
    else:
        out |= {m + "gate": (E, D), m + "gate.e_score_correction_bias": (E,)}
        for e in range(E):
            out |= mlp(f"{m}experts.{e}.", c["moe_intermediate_size"])
        out |= mlp(m + "shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])
    return out | {"model.norm": (D,), "lm_head": (V, D)}


def tensors(c):
    """(name, dtype, shape, what makes its bytes of a generator) of each tensor, in the order of the file."""
    for name, shape in shapes(c).items():
        n, full = math.prod(shape), name + ".weight"
        if name.endswith("bias"):                       # near 5, as released: BF16 would lose their order
            yield name, "F32", shape, lambda rng, n=n: in_f32(rng, n, lambda x: 5 + 0.05 * x)
        elif len(shape) == 1:
            yield full, "BF16", shape, lambda rng, n=n: in_bf16(rng, n, 1, 0.1)
        elif "quantization_config" in c and "proj" in name:
            blocks, s = [-(-side // 128) for side in shape], 1 / math.sqrt(shape[1]) / E4M3_SIZE
            yield full, "F8_E4M3", shape, lambda rng, n=n: in_e4m3(rng, n)
            yield full + "_scale_inv", "F32", blocks, lambda rng, n=math.prod(blocks), s=s: in_f32(
                rng, n, lambda x: s * math.exp(0.2 * x))
        else:
            deviation = 1 if "embed" in name else 1 / math.sqrt(shape[1])
            yield full, "BF16", shape, lambda rng, n=n, d=deviation: in_bf16(rng, n, 0, d)


def header(c):
    at, entries = 0, {}
    for name, dtype, shape, _ in tensors(c):
        size = math.prod(shape) * {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), at


def write_weights(path, c, seed):
    """Under another name until they are whole."""
    text, _ = header(c)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, _, _, make in tensors(c):
            for piece in make(random.Random(f"{seed} {name}")):
                f.write(piece)
    part.rename(path)


# -- command line --------------------------------------------------------------------------------------------

def fail(message):
    sys.exit(f"v3_layer.py: {message}")


def setting(text):
    key, _, number = text.partition("=")
    if key not in CONFIG or not isinstance(CONFIG[key], int):
        raise ValueError(text)
    return key, int(number)


def parse(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(message)
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER")
    p.add_argument("--experts", type=int, default=32, help="of V3's 256 (default: 32)")
    p.add_argument("--fp8", action="store_true", help="E4M3 with scales of 128 x 128 blocks, as published")
    p.add_argument("--dense", action="store_true", help="a dense FFN in place of the experts")
    p.add_argument("--tokens", type=int, default=16, help="of the input (default: 16)")
    p.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=NUMBER", dest="settings")
    p.add_argument("--no-taps", action="store_true", help="weights and ids alone")
    p.add_argument("--program", default=os.environ.get("DEEPSEEK", str(ROOT / "deepseek")))
    return p.parse_args(arguments)


def config_of(a):
    c = CONFIG | {"n_routed_experts": a.experts, "first_k_dense_replace": int(a.dense)} | dict(a.settings)
    return c | ({"quantization_config": FP8} if a.fp8 else {})


def main(arguments):
    a = parse(arguments)
    c, taps = config_of(a), a.out / "taps.safetensors"
    if not 0 < a.tokens <= c["max_position_embeddings"]:
        fail(f"--tokens {a.tokens}: not between 1 and {c['max_position_embeddings']}")
    if a.out.exists() and any(a.out.iterdir()):
        fail(f"{a.out}: is there already, and not empty")
    a.out.mkdir(parents=True, exist_ok=True)
    size, free = header(c)[1], shutil.disk_usage(a.out).free
    if size > free:
        fail(f"{a.out}: {size / 1e9:.2f} GB of weights, {free / 1e9:.2f} GB are free (fewer --experts?)")
    print(f"{a.out}: {size / 1e9:.2f} GB of weights", flush=True)
    rng = random.Random(f"{a.seed} ids")
    ids = ",".join(str(rng.randrange(c["vocab_size"])) for t in range(a.tokens))
    (a.out / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    (a.out / "ids.txt").write_text(ids + "\n")
    write_weights(a.out / "model.safetensors", c, a.seed)
    if a.no_taps:
        return 0
    command = [a.program, "logits", "-m", str(a.out), "--ids", ids, "--taps", "--out", str(taps)]
    print(" ".join(command), flush=True)
    try:
        return subprocess.run(command).returncode
    except OSError as error:
        fail(f"{a.program}: {error.strerror} (--program names another one, --no-taps does without)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
