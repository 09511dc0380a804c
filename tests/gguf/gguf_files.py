#!/usr/bin/env python3
"""GGUF files that `deepseek quantize` wrote say what their models say, and damaged ones are refused.

    tests/gguf/gguf_files.py [PROGRAM]         from anywhere; PROGRAM is ./deepseek unless given
"""
import array
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "deepseek").resolve()
MODELS = ROOT / "tests" / "golden" / "models"
passed, failures = 0, []


def check(name, good, why=""):
    global passed
    passed += bool(good)
    if not good:
        failures.append(f"{name}: {why}")


def deepseek(*arguments):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def tensors(path):
    """name -> bytes, and the metadata."""
    with open(path, "rb") as f:
        size, = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(size)), f.read()
    metadata = header.pop("__metadata__", {})
    return {k: data[slice(*v["data_offsets"])] for k, v in header.items()}, metadata


def floats(data):
    return array.array("f", data)


# A GGUF file of latent attention holds W^UK transposed: its products are summed in another order. Both orders
# are within four times NumPy's own float32 error of float64 (tests/golden checks that), so within eight of
# each other. Grouped-query models have the same sums in the same order: the same bits.
def same_logits(folder, work):
    taps, metadata = tensors(folder / "taps.safetensors")
    ids = ",".join(map(str, array.array("i", taps["ids"])))
    gguf, ours, theirs = work / "model.gguf", work / "a.safetensors", work / "b.safetensors"
    code, _, said = deepseek("quantize", "-m", folder, "-o", gguf, "--type", "f32")
    if folder.name == "v2-groups":               # cos and sin are scaled there, which no GGUF key says
        return check(folder.name, code == 1 and "'mscale'" in said, said)
    for model, out in (folder, ours), (gguf, theirs):
        done = deepseek("logits", "-m", model, "--ids", ids, "--out", out)
        check(f"{folder.name} logits", done[0] == 0, done[2])
    a, b = tensors(ours)[0], tensors(theirs)[0]
    mla = "kv_lora_rank" in json.loads((folder / "config.json").read_text())
    for name, data in a.items():
        gap = max(abs(x - y) for x, y in zip(floats(data), floats(b[name])))
        limit = 8 * json.loads(metadata["float32_error"])[name] if mla else 0
        check(f"{folder.name} {name}", gap <= limit and (mla or data == b[name]), f"{gap} beyond {limit}")


def quantised(work):
    """Each format still answers; the 8-bit one with the same words."""
    question = ("-p", "Add 6 and 77.")
    text = deepseek("run", *question)[1]
    for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q5_1", "q5_0", "q4_1", "q4_0", "bf16", "f16", "f32"):
        file = work / f"{kind}.gguf"
        code, out, said = deepseek("quantize", "-m", ROOT / "weights" / "tiny", "-o", file, "--type", kind)
        check(f"quantize {kind}", code == 0 and not out, said)
        code, out, said = deepseek("run", "-m", file, *question, "-n", 60)
        check(f"run {kind}", code == 0 and out, said)
        if kind in ("q8_0", "bf16", "f32"):
            check(f"text of {kind}", out == text, out)
        check(f"threads {kind}", deepseek("run", "-m", file, *question, "-n", 60, "--threads", 1)[1] == out)
        check(f"chunks {kind}", deepseek("run", "-m", file, *question, "-n", 60, "--chunk", 3)[1] == out)
    return work / "q8_0.gguf"


def damaged(good):
    """name -> bytes of a file that is no GGUF file any more."""
    data = good.read_bytes()
    put = lambda at, form, value: data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form):]
    cases = {f"cut at {n}": data[:n] for n in [0, 3, 4, 8, 15, 23, 24, 31, 43, 100] +
             [len(data) * i // 24 for i in range(1, 24)] + [len(data) - 1]}
    cases |= {"magic": b"GGUX" + data[4:], "version 1": put(4, "<I", 1), "version 9": put(4, "<I", 9),
              "big endian": put(4, ">I", 3), "key longer than the file": put(24, "<Q", 1 << 40),
              "key length wraps": put(24, "<Q", 2**64 - 8), "43 bytes": data[:8] + b"\xff" * 35,
              "type of value": data.replace(b"general.architecture\x08", b"general.architecture\x63", 1),
              "architecture": data.replace(b"deepseek2", b"deepseek9"),
              "a tensor's name": data.replace(b"token_embd.weight", b"token_xmbd.weight", 1),
              "missing key": data.replace(b"deepseek2.block_count", b"deepseek2.block_xount", 1),
              "pre-tokenizer": data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.pxe", 1)}
    for n in (0, 1, 1 << 20, 1 << 40, 2**63, 2**64 - 1):
        cases |= {f"{n} tensors": put(8, "<Q", n), f"{n} keys": put(16, "<Q", n)}
    return cases


def refused(name, content, work):
    file = work / "damaged.gguf"
    file.write_bytes(content)
    code, out, said = deepseek("run", "-m", file, "-p", "hello", "-n", 1)
    lines = said.splitlines()
    check(f"damaged: {name}", code == 1 and not out and len(lines) == 1 and "damaged.gguf" in said,
          f"exit code {code}, {said[:300]}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for model in sorted(MODELS.iterdir()):
            same_logits(model, work)
        good = quantised(work)
        for name, content in damaged(good).items():
            refused(name, content, work)
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"gguf: {passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
