#!/usr/bin/env python3
"""What fewer bits and integer arithmetic change, on weights/tiny: the table in RESULTS.md.

    tests/bench/formats.py

For each format, on the first 512 tokens of the answers in tests/golden/text/samples.jsonl: perplexity; how
far the logits are from those of the model as shipped (KL); and how far integer arithmetic is from --exact,
the same weights with plain arithmetic (NMSE, KL). Standard library only.
"""

import array
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL, TOKENS = ROOT / "weights" / "tiny", 512
FORMATS = ("q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0")


def deepseek(*arguments, text=None):
    command = [ROOT / "deepseek", *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return done.stdout


def logits(model, ids, work, *options):
    """A list of rows."""
    out = work / "logits.safetensors"
    deepseek("logits", "-m", model, "--ids", ids, "--force", "--out", out, *options)
    data = out.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + size])["logits"]
    begin, end = entry["data_offsets"]
    numbers, width = array.array("f", data[8 + size + begin : 8 + size + end]), entry["shape"][1]
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def log_softmax(row):
    top = max(row)
    total = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def kl(p, q):
    """Mean over the rows of the divergence of q from p, in nats."""
    rows = [(log_softmax(a), log_softmax(b)) for a, b in zip(p, q)]
    return math.fsum(math.exp(x) * (x - y) for a, b in rows for x, y in zip(a, b)) / len(rows)


def nmse(p, q):
    error = math.fsum((x - y) ** 2 for a, b in zip(p, q) for x, y in zip(a, b))
    return error / math.fsum(x * x for a in p for x in a)


def perplexity(model, text, *options):
    return json.loads(deepseek("perplexity", "-m", model, "-f", text, "--json", *options))["perplexity"]


def row(kind, ids, text, plain, work):
    file = work / f"{kind}.gguf"
    deepseek("quantize", "-m", MODEL, "-o", file, "--force", "--type", kind)
    measure = lambda *o: perplexity(file, text, *o)
    integers, exact = logits(file, ids, work), logits(file, ids, work, "--exact")
    size = file.stat().st_size / 1e6
    return (f"| {kind} | {size:.2f} MB | {measure():.4f} | {measure('--exact'):.4f} "
            f"| {kl(plain, integers):.1e} | {nmse(exact, integers):.1e} | {kl(exact, integers):.1e} |")


def main():
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        samples = (ROOT / "tests/golden/text/samples.jsonl").read_text().splitlines()
        answers = "\n".join(json.loads(sample)["text"] for sample in samples)
        ids = json.loads(deepseek("tokenize", text=answers))[:TOKENS]
        text, listed = work / "text", ",".join(map(str, ids))
        text.write_text(deepseek("tokenize", "--decode", text=json.dumps(ids)))
        plain = logits(MODEL, listed, work)
        print("| format | size | perplexity | with --exact |", end=" ")
        print("KL from BF16 | NMSE to --exact | KL to --exact |\n|---|---|---|---|---|---|---|")
        size = (MODEL / "model.safetensors").stat().st_size / 1e6
        print(f"| bf16 | {size:.2f} MB | {perplexity(MODEL, text):.4f} | | | | |")
        for kind in FORMATS:
            print(row(kind, listed, text, plain, work))


if __name__ == "__main__":
    main()
