#!/usr/bin/env python3
"""GGUF files say what their models say, whoever wrote them, in whichever layout; damaged ones are refused.

    tests/gguf/gguf_files.py [PROGRAM]         from anywhere; PROGRAM is ./deepseek unless given
"""
import array
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

import damaged
import gguf_model
import keys as table
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


def unwritten(path):
    """The path, of a file that is not there."""
    path.unlink(missing_ok=True)
    return path


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


# -- keys ------------------------------------------------------------------------------------------------


def logits(model, work):
    """The bytes of `deepseek logits`, or the line that refuses it."""
    out = unwritten(work / "logits.safetensors")
    code, _, said = deepseek("logits", "-m", model, "--ids", "11,1,2,3,4,5,6,7", "--out", out)
    return out.read_bytes() if code == 0 else (code, b"", said)


def said_text(model, _):
    """What `deepseek run` says, or the line that refuses it."""
    code, out, said = deepseek("run", "-m", model, "-p", "ab cab", "--raw", "-n", 9)
    return out if code == 0 else (code, out, said)


def all_keys(name, model, rows, work, answer=logits):
    """Each row of a table of keys.py."""
    architecture, file = model[0]["general.architecture"][1], work / "keyed.gguf"

    def with_keys(more):
        file.write_bytes(gguf_model.container(table.changed(model[0], architecture, more), model[1]))
        return answer(file, work)

    plain = with_keys({})
    for more, happens in rows:
        got, row = with_keys(more), f"{name}: {more} {happens}"
        if isinstance(happens, str) and happens not in (table.SAME, table.OTHER):
            refused(row, got if isinstance(got, tuple) else (0, got, ""), happens)
        else:
            expected = with_keys(happens) if isinstance(happens, dict) else plain
            check(row, not isinstance(got, tuple) and (got == expected) == (happens != table.OTHER), got[:3])


def known_keys(work):
    models = tiny_gguf.all_models()
    for name in ("llama_f16", "qwen2_f32", "qwen3_q8_0", "deepseek2_q4_0"):
        all_keys(name, models[name], table.rows(models[name][0]["general.architecture"][1]), work)
    keys, weights = models["deepseek2_q4_0"]
    unbiased = {name: tensor for name, tensor in weights.items() if "exp_probs_b" not in name}
    all_keys("without biases", (keys, unbiased), table.UNBIASED, work)
    all_keys("general", models["qwen2_q8_0"], table.GENERAL, work, said_text)


# -- formats with a table -------------------------------------------------------------------------------


def single(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def looked_up(dtype, data):
    """The numbers of IQ4_NL and IQ4_XS, as dequantize_blocks of gguf-py's quants.py defines them."""
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    size, groups, begin = (18, 1, 2) if dtype == "IQ4_NL" else (136, 8, 8)
    out = []
    for at in range(0, len(data), size):
        d, high = struct.unpack_from("<eH", data, at)
        for g in range(groups):
            six = (data[at + 4 + g // 2] >> g % 2 * 4 & 15) | (high >> 2 * g & 3) << 4
            scale = d if groups == 1 else single(d * (six - 32))
            q = data[at + begin + 16 * g : at + begin + 16 * g + 16]
            out += [single(scale * values[v]) for v in [b & 15 for b in q] + [b >> 4 for b in q]]
    return struct.pack(f"<{len(out)}f", *out)


def numbers(file):
    """The tensors' bytes of a safetensors file; its head names the model."""
    return file[8 + struct.unpack("<Q", file[:8])[0]:]


def tables_of_integers(work):
    """The same bits as a model of the numbers that the blocks stand for."""
    for name in ("llama_iq4_nl", "qwen2_iq4_xs"):
        keys, weights = tiny_gguf.all_models()[name]
        dense = {tensor: (dtype, shape, data) if dtype == "F32" else ("F32", shape, looked_up(dtype, data))
                 for tensor, (dtype, shape, data) in weights.items()}
        file, twin = work / f"{name}.gguf", work / f"{name}.f32.gguf"
        file.write_bytes(gguf_model.container(keys, weights))
        twin.write_bytes(gguf_model.container(keys, dense))
        a, b = logits(file, work), logits(twin, work)
        check(f"{name} is its numbers", isinstance(a, bytes) and numbers(a) == numbers(b), a[:3])
        ids = ",".join(str(i % 16) for i in range(40))            # enough for products to be arranged
        for options in ((), ("--chunk", 1), ("--exact",)):
            outs = [work / "a", work / "b"]
            for model, out in zip((file, twin), outs):
                deepseek("logits", "-m", model, "--ids", ids, "--out", unwritten(out), *options)
            check(f"{name} {options}", numbers(outs[0].read_bytes()) == numbers(outs[1].read_bytes()))


# -- bounds, messages ------------------------------------------------------------------------------------


def most_memory(*arguments):
    """Exit code and the most memory, in bytes, that the program had."""
    pid = os.posix_spawn(PROGRAM, [PROGRAM, *map(str, arguments)], os.environ, file_actions=[
        (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)])
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), 1024 * usage.ru_maxrss


def stacks_beyond_the_keys(work):
    """Thirty stacks of 65,536 experts in a file that has 4 kB on the disk, where the keys say 4."""
    good, file = work / "good.gguf", work / "stacks.gguf"
    keys, weights = tiny_gguf.all_models()["deepseek2_q4_0"]
    good.write_bytes(gguf_model.container(keys, weights))
    entries, n = [("token_embd.weight", (16, 32), 1, 0)], 1 << 16
    for layer in range(10):
        for stem in ("gate", "up", "down"):
            at = 1024 + 2 * n * (len(entries) - 1)
            entries.append((f"blk.{layer}.ffn_{stem}_exps.weight", (n, 1, 1), 1, at))
    keys = {k: v for k, v in keys.items() if not k.startswith("tokenizer.")}
    for layers in (3, 10):
        more = {"deepseek2.block_count": ("u32", layers), "deepseek2.expert_weights_scale": ("f32", 1),
                "deepseek2.expert_group_count": ("u32", 1), "deepseek2.nextn_predict_layers": ("u32", 0)}
        file.write_bytes(damaged.table(keys | more, entries, b""))
        os.truncate(file, file.stat().st_size + 1024 + 30 * 2 * n)
        ask = ("logits", "-m", file, "--ids", "1", "--out", work / "none")
        refused(f"stacks beyond the keys, {layers} layers", deepseek(*ask), "4 experts")
        base = most_memory("logits", "-m", good, "--ids", "1", "--out", unwritten(work / "out"))
        check("the good one runs", base[0] == 0, base)
        grown = most_memory(*ask)
        check("stacks take no memory", grown[0] == 1 and grown[1] < base[1] + (8 << 20), f"{base}, {grown}")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 3554214621\n"


def what_is_meant(work):
    """Lines that say what to give instead."""
    ask = lambda model: deepseek("run", "-m", model, "-p", "ab cab", "--raw", "-n", 2)
    data = gguf_model.container(*tiny_gguf.all_models()["qwen2_q8_0"])
    folder, copy = work / "files", work / "copy"
    folder.mkdir()
    (folder / "b-q8_0.gguf").write_bytes(data)
    (folder / "a-00002-of-00002.gguf").write_bytes(data)
    (folder / "a-00001-of-00002.gguf").write_bytes(data)
    for command in (ask(folder), deepseek("info", "-m", folder), deepseek("tokenize", "-m", folder)):
        refused("a folder of GGUF files", command, f"give the file: -m {folder}/a-00001-of-00002.gguf")
    shutil.copytree(ROOT / "weights" / "tiny", copy)
    weights = next(copy.glob("*.safetensors"))
    refused("a file of a folder", ask(weights), f"-m {copy}")
    weights.write_bytes(POINTER)
    refused("a pointer in a folder", ask(copy), "a git-lfs pointer")
    check("names it", weights.name in ask(copy)[2] and "git lfs pull" in ask(copy)[2], ask(copy)[2])
    (work / "pointer.gguf").write_bytes(POINTER)
    refused("a pointer", ask(work / "pointer.gguf"), "pointer.gguf: a git-lfs pointer")
    (work / "order.gguf").write_bytes(data[:4] + struct.pack(">IQQ", 3, 1, 1) + data[24:])
    refused("the other order of bytes", ask(work / "order.gguf"), "order.gguf: big-endian")


# -- stops, sampling, what quantize keeps ----------------------------------------------------------------


def stop_tokens(work):
    """An answer ends with each of the three ids; without one that is said."""
    keys, weights = tiny_gguf.all_models()["qwen2_f32"]
    file = work / "stops.gguf"

    def answer(more):
        file.write_bytes(gguf_model.container(table.changed(keys, "qwen2", more), weights))
        return deepseek("run", "-m", file, "-p", "ab cab", "--raw", "-n", 12, "--temp", 0)

    eos, eot, eom = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    code, endless, said = answer({eos: None})
    check("no stops", code == 0 and said.count(f"no '{eos}'") == 1, said)
    ends = {}
    for key in (eos, eot, eom):
        ends[key] = [answer({eos: None, key: ("u32", i)})[1] for i in range(8)]
        check(f"{key} stops", any(len(out) < len(endless) for out in ends[key]), ends[key])
        check(f"{key} is said", "no 'tokenizer" not in answer({eos: None, key: ("u32", 1)})[2])
        refused(f"{key} beyond the vocabulary", answer({key: ("u32", 16)}), key)
    check("all three stop alike", ends[eos] == ends[eot] == ends[eom], ends)
    shortest = min(range(8), key=lambda i: len(ends[eos][i]))
    every = {eos: ("u32", 12), eot: ("u32", 13), eom: ("u32", shortest)}
    check("the third beside the others", answer(every)[1] == ends[eos][shortest])


def folder_with(work, name, generation):
    folder = work / name
    shutil.copytree(ROOT / "weights" / "tiny", folder)
    if generation is None:
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


SAMPLING = ("temp", "top_p", "min_p", "top_k", "penalty_repeat")


def kept(work):
    """What quantize keeps: the sampling, which tokens end an answer, the name."""
    ask = lambda model, *more: deepseek("run", "-m", model, "-p", "Add 6 and 77.", "-n", 40, *more)[1]
    eos = json.loads((ROOT / "weights" / "tiny" / "config.json").read_text())["eos_token_id"]
    cases = {
        "greedy": ({"do_sample": False, "temperature": 0.6, "top_p": 0.95, "eos_token_id": eos},
                   (0, 0.95, 0, 50, 1)),                        # top_k is 50 where nothing is said
        "sampled": ({"do_sample": True, "temperature": 1.5, "top_p": 0.75, "min_p": 0.01, "top_k": 7,
                     "eos_token_id": [eos, 300, 301]}, (1.5, 0.75, 0.01, 7, 1)),
        "silent": (None, None),
    }
    for name, (generation, expected) in cases.items():
        folder, file = folder_with(work, f"Kept-{name}", generation), work / f"{name}.gguf"
        code, _, said = deepseek("quantize", "-m", folder, "-o", file, "--type", "bf16")
        check(f"kept {name}", code == 0, said)
        keys = gguf_model.read_keys(file)
        check(f"name {name}", keys.get("general.name") == f"Kept-{name}", keys.get("general.name"))
        got = [keys.get(f"general.sampling.{key}") for key in SAMPLING]
        right = [None] * 5 if expected is None else [single(x) for x in expected]
        check(f"sampling {name}", got == right, got)
        stops = [keys.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        listed = (generation or {}).get("eos_token_id", eos)
        listed = listed if isinstance(listed, list) else [listed]
        check(f"stops {name}", [s for s in stops if s is not None] == listed, stops)
        for more in ((), ("--seed", 5)):
            check(f"says the same {name}", ask(file, *more) == ask(folder, *more))
    check("greedy knows no seed", ask(work / "greedy.gguf", "--seed", 8) == ask(work / "greedy.gguf"))
    folder = folder_with(work, "many", {"do_sample": False, "eos_token_id": [eos, 300, 301, 302]})
    done = deepseek("quantize", "-m", folder, "-o", work / "many.gguf", "--type", "bf16")
    refused("four stops", done, "4 tokens")
    check("four stops: nothing written", not (work / "many.gguf").exists())
    kept_from_file(work)


def kept_from_file(work):
    """What a GGUF file says about itself stays, whatever its type."""
    keys, weights = tiny_gguf.all_models()["qwen2_f32"]
    more = {"general.name": ("str", "A Name"), "general.tags": (["str"], ["a", "b"]),
            "general.quantized_by": ("str", "me"), "general.sampling.temp": ("f32", 0.25),
            "general.file_type": ("u32", 0), "tokenizer.ggml.eot_token_id": ("u32", 3)}
    source, file = work / "from.gguf", work / "to.gguf"
    source.write_bytes(gguf_model.container(keys | more, weights))
    code, _, said = deepseek("quantize", "-m", source, "-o", file, "--type", "q8_0")
    check("from a file", code == 0, said)
    got = gguf_model.read_keys(file)
    for key, (_, value) in more.items():
        expected = 7 if key == "general.file_type" else value
        check(f"{key} stays", got.get(key) == expected, got.get(key))


def once_is_enough(work):
    """Quantised weights are quantised again only if that is asked for; FP8 and floats are sources."""
    for name, model in tiny_gguf.all_models().items():
        source, file = work / f"once-{name}.gguf", work / f"twice-{name}.gguf"
        source.write_bytes(gguf_model.container(*model))
        ask = ("quantize", "-m", source, "-o", file, "--type", "q5_0")
        if name.endswith(("f32", "f16")):
            check(f"from floats: {name}", deepseek(*ask)[0] == 0)
            continue
        refused(f"twice: {name}", deepseek(*ask), "--allow-requantize")
        check(f"twice: {name} writes nothing", not file.exists())
        check(f"twice, as asked: {name}", deepseek(*ask, "--allow-requantize")[0] == 0 and file.exists())


def main():
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        for model in sorted(MODELS.iterdir()):
            written(model, work)
            layouts(model, work)
        quantised(work)
        split_files(work)
        damaged_files(work)
        known_keys(work)
        tables_of_integers(work)
        stacks_beyond_the_keys(work)
        what_is_meant(work)
        stop_tokens(work)
        kept(work)
        once_is_enough(work)
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"gguf: {passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
