#!/usr/bin/env python3
"""Do two programs compute the same bits? For a change that must not change any result.

    tests/bench/bits.py OLD NEW [--only PART]      PART of a case's name: some of the cases

Compares what `logits --taps` writes, tensor by tensor: for every golden model and weights/tiny, whole and in
chunks, MLA naive and absorbed, as they are and quantised while loading; for GGUF files of every type and
layout; all of it with each set of kernels that the processor has. Then the files that `quantize` writes.
Names each case that differs with its first tensor, and says how many were equal or different; the exit code
is 0 if none differed. A refusal is compared too, by exit code and message. Takes some minutes.
Standard library only.
"""

import argparse
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "gguf"))
import gguf_model
import make_model

SIMD = ("plain", "avx2", "avx512", "amx", "neon", "dotprod")
QUANTS = ("q8_0", "q4_k", "fp8")
TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q5_1", "q5_0", "q4_1", "q4_0")

# Values of a block, its bytes, and where an f16 stands in it, with a value that suits weights of about 0.05.
BLOCKS = {"Q4_0": (32, 18, {0: 0.0075}), "Q4_1": (32, 20, {0: 0.008, 2: -0.06}),
          "Q5_0": (32, 22, {0: 0.0037}), "Q5_1": (32, 24, {0: 0.004, 2: -0.06}),
          "Q8_0": (32, 34, {0: 0.0005}),
          "Q2_K": (256, 84, {80: 0.0025, 82: 0.0037}), "Q3_K": (256, 110, {108: 0.0005}),
          "Q4_K": (256, 144, {0: 0.00013, 2: 0.00097}), "Q5_K": (256, 176, {0: 0.000065, 2: 0.001}),
          "Q6_K": (256, 210, {208: 0.00002})}

# Shapes whose rows hold whole blocks of 256, which those of the golden models do not.
WIDE = {"qwen": make_model.QWEN | {
            "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
            "vocab_size": 528},
        "deepseek": make_model.V2_LITE | {
            "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 256,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 8,
            "vocab_size": 400}}


# -- models -----------------------------------------------------------------------------------------------

def random_blocks(rng, kind, shape):
    """(kind, shape, data): finite weights in a block format, or Q8_0 where its blocks do not fit the rows."""
    if shape[-1] % BLOCKS[kind][0]:
        kind = "Q8_0"
    values, size, halves = BLOCKS[kind]
    n = 1
    for axis in shape:
        n *= axis
    data = bytearray(rng.randbytes(n // values * size))
    for begin in range(0, len(data), size):
        for at, value in halves.items():
            struct.pack_into("<e", data, begin + at, value * rng.uniform(0.5, 1.5))
    return kind, shape, bytes(data)


def wide_files(work):
    """(name, file, vocabulary size) for each block format, shape and layout."""
    rng = random.Random(1)
    for shape, config in WIDE.items():
        folder = work / shape
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        random.seed(2)
        make_model.write(folder / "model.safetensors", config)
        for layout in ("kv_b", "mla") if "kv_lora_rank" in config else ("",):
            keys, tensors = gguf_model.convert(folder, layout)
            for kind in ("BF16", *BLOCKS):
                mine = {name: t if kind == "BF16" or t[0] == "F32" else random_blocks(rng, kind, t[1])
                        for name, t in tensors.items()}
                file = work / f"{shape}{layout}.{kind}.gguf"
                file.write_bytes(gguf_model.container(keys, mine))
                yield file.stem, file, config["vocab_size"]


def golden_folders():
    for folder in [*sorted((ROOT / "tests" / "golden" / "models").iterdir()), ROOT / "weights" / "tiny"]:
        yield folder.name, folder, json.loads((folder / "config.json").read_text())


# -- cases ------------------------------------------------------------------------------------------------

def cases(old, work):
    """(name, DEEPSEEK_SIMD, arguments); {out} stands for the file to write."""
    def logits(name, model, vocabulary, *ways):
        ids = ",".join(str(i * 7919 % vocabulary) for i in range(1, 41))
        for simd in kernels:
            for way in ways:
                yield (f"{name} {simd} {way}".strip(), simd,
                       ["logits", "-m", str(model), "--ids", ids, "--taps", "--out", "{out}", *way.split()])

    tiny = ROOT / "weights" / "tiny"
    one = ["logits", "-m", str(tiny), "--ids", "1", "--out", "{out}"]
    kernels = [simd for simd in SIMD if run(old, simd, one, work / "x")[0] == 0]
    for name, folder, config in golden_folders():
        naive = ["--mla naive", "--mla naive --chunk 3"] if "kv_lora_rank" in config else []
        quants = [f"--quant {q}{more}" for q in QUANTS for more in ("", " --exact", " --chunk 3")]
        ways = ["", "--chunk 3", "--chunk 1", "--threads 1", "--kv bf16", *naive, *quants]
        yield from logits(name, folder, config["vocab_size"], *ways)
    for kind in TYPES:
        file = work / f"tiny.{kind}.gguf"
        run(old, "", ["quantize", "-m", str(tiny), "-o", str(file), "--type", kind], work / "x")
        yield from logits(file.stem, file, config["vocab_size"], "", "--chunk 3", "--exact", "--mla naive")
        yield f"quantize {kind}", "", ["quantize", "-m", str(tiny), "-o", "{out}", "--type", kind]
    for name, file, vocabulary in wide_files(work):
        naive = ["--mla naive"] if name.startswith("deepseek") else []
        yield from logits(name, file, vocabulary, "", "--chunk 3", "--chunk 1", "--exact", *naive)


def run(program, simd, arguments, out):
    """(exit code, what it said, the file that it wrote)."""
    out.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DEEPSEEK_")}
    environment |= {"DEEPSEEK_SIMD": simd} if simd else {}
    done = subprocess.run([program, *(a.replace("{out}", str(out)) for a in arguments)], env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True)
    said = done.stderr.decode(errors="replace") if done.returncode else ""
    return done.returncode, said, out.read_bytes() if out.exists() else b""


def difference(old, new, arguments):
    """Empty, or the first thing that differs."""
    if old == new:
        return ""
    if old[:2] != new[:2]:
        return f"exit codes {old[0]} and {new[0]} {old[1]}{new[1]}".strip()
    if arguments[0] != "logits":
        return "the file"
    a, b = (tensors(data) for _, _, data in (old, new))
    return next((f"tensor {name}" for name in a | b if a.get(name) != b.get(name)), "the header")


def tensors(data):
    """{name: its dtype, shape and bytes} in the order of the file."""
    (size,) = struct.unpack_from("<Q", data)
    header = {k: v for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__"}
    place = lambda t: slice(*(8 + size + at for at in t["data_offsets"]))
    order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: (t["dtype"], t["shape"], data[place(t)]) for name, t in order}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("old"), parser.add_argument("new"), parser.add_argument("--only", default="")
    options = parser.parse_args()
    old, new = (str(pathlib.Path(p).resolve()) for p in (options.old, options.new))
    os.chdir(ROOT)
    equal = different = refused = 0
    with tempfile.TemporaryDirectory() as work:
        out = pathlib.Path(work) / "out"
        for name, simd, arguments in cases(old, pathlib.Path(work)):
            if options.only not in name:
                continue
            results = [run(program, simd, arguments, out) for program in (old, new)]
            text = difference(*results, arguments)
            equal, different = equal + (not text), different + bool(text)
            refused += results[0][0] != 0
            if text:
                print(f"DIFFERENT {name}: {text}", flush=True)
    print(f"{equal} equal, {different} different ({refused} refused by the old one)")
    return 1 if different or equal == refused else 0


if __name__ == "__main__":
    sys.exit(main())
