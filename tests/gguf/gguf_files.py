#!/usr/bin/env python3
"""GGUF files say what their models say, whoever wrote them, in whichever layout; damaged ones are refused.

    tests/gguf/gguf_files.py [PROGRAM]         from anywhere; PROGRAM is ./deepseek unless given
"""
import array
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

import damaged
import gguf_model
import tiny_gguf

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


# The logits of `ours`, a model folder, and `theirs`. W^UK transposed means that its products are summed in
# another order. Both orders are within four times NumPy's own float32 error of float64 (tests/golden checks
# that), so within eight of each other. All else is the same sums in the same order: the same bits.
def same_logits(name, ours, theirs, work, transposed):
    taps, metadata = tensors(ours / "taps.safetensors")
    ids, outs = ",".join(map(str, array.array("i", taps["ids"]))), []
    for model in ours, theirs:
        outs.append(work / f"{len(outs)}.safetensors")
        done = deepseek("logits", "-m", model, "--ids", ids, "--out", outs[-1], "--force")
        check(f"{name} logits", done[0] == 0, done[2])
    a, b = (tensors(out)[0] for out in outs)
    check(f"{name}: some logits", a and a.keys() == b.keys(), f"{a.keys()} and {b.keys()}")
    for tap, data in a.items():
        gap = max(abs(x - y) for x, y in zip(floats(data), floats(b[tap])))
        limit = 8 * json.loads(metadata["float32_error"])[tap] if transposed else 0
        check(f"{name} {tap}", gap <= limit and (transposed or data == b[tap]), f"{gap} beyond {limit}")


def written(folder, work):
    """What `deepseek quantize` writes."""
    gguf = work / "model.gguf"
    code, _, said = deepseek("quantize", "-m", folder, "-o", gguf, "--force", "--type", "f32")
    if folder.name == "v2-groups":               # cos and sin are scaled there, which no GGUF key says
        return check(folder.name, code == 1 and "'mscale'" in said, said)
    mla = "kv_lora_rank" in json.loads((folder / "config.json").read_text())
    same_logits(folder.name, folder, gguf, work, mla)


def layouts(folder, work):
    """What llama.cpp's converters wrote over the years."""
    config = json.loads((folder / "config.json").read_text())
    if folder.name == "v2-groups" or "quantization_config" in config:    # no GGUF key or type says it
        return
    for layout in ("kv_b", "ik", "mla") if "kv_lora_rank" in config else ("plain",):
        file = work / f"{layout}.gguf"
        file.write_bytes(gguf_model.container(*gguf_model.convert(folder, layout)))
        same_logits(f"{folder.name} {layout}", folder, file, work, layout == "mla")


def quantised(work):
    """Each format still answers; the 8-bit one with the same words."""
    question = ("-p", "Add 6 and 77.")
    text = deepseek("run", *question)[1]
    for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q5_1", "q5_0", "q4_1", "q4_0", "bf16", "f16", "f32"):
        file = work / f"{kind}.gguf"
        code, out, said = deepseek("quantize", "-m", ROOT / "weights" / "tiny", "--force", "-o", file,
                                   "--type", kind)
        check(f"quantize {kind}", code == 0 and not out, said)
        code, out, said = deepseek("run", "-m", file, *question, "-n", 60)
        check(f"run {kind}", code == 0 and out, said)
        if kind in ("q8_0", "bf16", "f32"):
            check(f"text of {kind}", out == text, out)
        check(f"threads {kind}", deepseek("run", "-m", file, *question, "-n", 60, "--threads", 1)[1] == out)
        check(f"chunks {kind}", deepseek("run", "-m", file, *question, "-n", 60, "--chunk", 3)[1] == out)


def refused(name, done, expect):
    code, out, said = done
    check(f"refused: {name}", code == 1 and not out and said.count("\n") == 1 and expect in said,
          f"exit code {code}, {said[:300]} instead of {expect}")


def split_files(work):
    """A model in three files, whichever of them is named; and what may be wrong with the three."""
    keys, weights = tiny_gguf.all_models()["deepseek2_q4_0"]
    whole, parts = work / "whole.gguf", work / "parts"
    parts.mkdir()
    whole.write_bytes(gguf_model.container(keys, weights))
    files = gguf_model.split(keys, weights, 3)
    ask = lambda model: deepseek("run", "-m", model, "-p", "ab cab", "--raw", "-n", 9)
    put = lambda changed: [(parts / f"m{tail}").write_bytes(data) for tail, data in (files | changed).items()]
    put({})
    for tail in files:
        check(f"split: {tail}", ask(parts / f"m{tail}")[:2] == ask(whole)[:2] and ask(whole)[0] == 0)
    first, second, third = files
    qwen2 = gguf_model.split(*tiny_gguf.all_models()["qwen2_q8_0"], 3)
    of_four = gguf_model.split(keys, weights, 4)["-00002-of-00004.gguf"]
    wrong = {"twice the same": {second: files[first]}, "cut short": {second: files[second][:-32]},
             "another order": {second: files[third], third: files[second]},
             "another model": {second: qwen2[second]}, "another number": {second: of_four},
             "empty": {third: b""}}
    for name, changed in wrong.items():
        put(changed)
        refused(f"split: {name}", ask(parts / f"m{first}"), ".gguf")
    put({})
    (parts / f"m{second}").unlink()
    refused("split: a missing part", ask(parts / f"m{third}"), f"m{second}")
    (parts / f"m{first}").rename(parts / "other.gguf")
    refused("split: another name", ask(parts / "other.gguf"), "one of 3 parts")


def damaged_files(work):
    good, file = work / "good.gguf", work / "damaged.gguf"
    for name, model in tiny_gguf.all_models().items():
        good.write_bytes(gguf_model.container(*model))
        code, out, said = deepseek("run", "-m", good, "-p", "ab cab", "--raw", "-n", 2)
        check(f"good: {name}", code == 0 and out, said)
    for name, content, expect in damaged.all_cases():
        file.write_bytes(content)
        done = deepseek("run", "-m", file, "-p", "ab cab", "--raw", "-n", 2)
        refused(name, done, expect)
        check(f"names the file: {name}", "damaged.gguf" in done[2], done[2])


def main():
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for model in sorted(MODELS.iterdir()):
            written(model, work)
            layouts(model, work)
        quantised(work)
        split_files(work)
        damaged_files(work)
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"gguf: {passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
