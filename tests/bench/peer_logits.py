#!/usr/bin/env python3
"""llama.cpp's logits beside ours, for weights/tiny in GGUF files that `deepseek quantize` wrote.

    tests/bench/peer_logits.py PROGRAM

PROGRAM: tests/bench/peer_logits.cpp, which tests/bench/peers.sh builds. Prints for each format, on 256
tokens of the answers in tests/golden/text/samples.jsonl, how far each side's logits are from --exact, the
same weights with plain arithmetic (NMSE, KL), and how often both choose the same token. Exit code 1 where
llama.cpp is farther from --exact than rounding an activation to 8 bits can take it (NMSE 1e-2; formats.py
shows ours) or, in F32 and BF16, to 8 bits of fraction (1e-4). Standard library only.
"""

import array
import json
import pathlib
import subprocess
import sys
import tempfile

import formats

TOKENS = 256


def peer_logits(program, model, ids, work):
    out = work / "peer"
    done = subprocess.run([program, model, out, ids], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{program}: {done.stderr.strip()}")
    numbers = array.array("f", out.read_bytes())
    width = len(numbers) // len(ids.split(","))
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def same_choice(p, q):
    first = lambda row: max(range(len(row)), key=row.__getitem__)
    return sum(first(a) == first(b) for a, b in zip(p, q)) / len(p)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    far = []
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        samples = (formats.ROOT / "tests/golden/text/samples.jsonl").read_text().splitlines()
        answers = "\n".join(json.loads(sample)["text"] for sample in samples)
        ids = ",".join(map(str, json.loads(formats.deepseek("tokenize", text=answers))[:TOKENS]))
        print("| format | NMSE, ours | NMSE, llama.cpp | KL, ours | KL, llama.cpp | same choice |")
        print("|---|---|---|---|---|---|")
        for kind in ("f32", "bf16", *formats.FORMATS):
            file = work / f"{kind}.gguf"
            formats.deepseek("quantize", "-m", formats.MODEL, "-o", file, "--force", "--type", kind)
            exact = formats.logits(file, ids, work, "--exact")
            ours, theirs = formats.logits(file, ids, work), peer_logits(sys.argv[1], file, ids, work)
            errors = [formats.nmse(exact, x) for x in (ours, theirs)]
            away = [formats.kl(exact, x) for x in (ours, theirs)]
            print(f"| {kind} | {errors[0]:.1e} | {errors[1]:.1e} | {away[0]:.1e} | {away[1]:.1e} "
                  f"| {100 * same_choice(ours, theirs):.1f} % |", flush=True)
            if errors[1] > (1e-4 if kind in ("f32", "bf16") else 1e-2):
                far.append(kind)
    if far:
        sys.exit(f"too far from --exact: {', '.join(far)}")


if __name__ == "__main__":
    main()
