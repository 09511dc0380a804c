#!/usr/bin/env python3
"""Whole models on the emulated device: the suite `gpu-models`.

    tests/gpu/models.py [PROGRAM]      from anywhere; PROGRAM defaults to build/gpu/deepseek

`logits --taps --device cuda` of every golden model against the CPU's of the same program, which the golden
tests compare with float64: every tap, integers by ==, numbers bit for bit, for the twins add in the CPU's
order. Where attention sees more positions than one split (256, chapter 7 of deepseek.cu) the order is another
one, and the difference may be some times that between the reference's own float32 and float64, both being
roundings of one number. Then what users see: the same words, drafted or not, from GGUF files too, and one
line where it cannot be.
"""
import array
import concurrent.futures
import json
import math
import os
import pathlib
import pty
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "golden" / "models"
PROGRAM = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "build" / "gpu" / "deepseek")
SPLIT = 256
failures, passed = [], 0


def check(name, good, why=""):
    global passed
    if good:
        passed += 1
    else:
        failures.append(name)
        print(f"gpu-models: {name} FAILED {why}")


def run(*arguments, stdin="", **variables):
    """(exit code, stdout, stderr)"""
    done = subprocess.run([PROGRAM, *map(str, arguments)], input=stdin.encode(), capture_output=True,
                          env={**os.environ, **variables}, timeout=600)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def tensors(path):
    """name -> (dtype, shape, values) of a safetensors file, and its metadata."""
    data = pathlib.Path(path).read_bytes()
    n, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    about = header.pop("__metadata__", {})
    found = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        values = array.array("f" if t["dtype"] == "F32" else "i", data[8 + n + begin:8 + n + end])
        found[name] = (t["dtype"], t["shape"], values)
    return found, about


def logits(folder, model, ids, *options):
    """The taps of a model that --device says where to run."""
    handle, out = tempfile.mkstemp(dir=folder)
    os.close(handle)
    code, _, error = run("logits", "-m", model, "--ids", ids, "--taps", "--force", "--out", out, *options)
    if code != 0:
        print(error)
        return {}
    return tensors(out)[0]


def difference(a, b, bound):
    """The first tap in which b differs from a by more than bound times its largest number; or "". """
    if not a or list(a) != list(b):
        return "the names of the taps"
    for name, (dtype, shape, x) in a.items():
        y = b[name][2]
        if b[name][:2] != (dtype, shape):
            return f"{name}: {dtype} {shape}, not {b[name][:2]}"
        if x.tobytes() == y.tobytes():
            continue
        if dtype != "F32" or bound == 0:
            return name
        largest = max(abs(p) for p in x if abs(p) < math.inf)              # choice has -inf
        worst = max(abs(p - q) for p, q in zip(x, y) if p != q)
        if not worst <= bound * largest:
            return f"{name}: {worst:.3g} of {largest:.3g}"
    return ""


def golden_model(folder, model, form):
    golden, about = tensors(model / "taps.safetensors")
    ids = ",".join(map(str, golden["ids"][2]))
    bound = 0
    if len(golden["ids"][2]) > SPLIT:
        # How far float32 is from float64 in this model, relative to each tensor, at its worst.
        errors = json.loads(about["float32_error"])
        bound = 4 * max(e / max(map(abs, golden[name][2])) for name, e in errors.items())
    options = ["--mla", form] if form else []
    cpu = logits(folder, model, ids, "--device", "cpu", *options)
    wrong = difference(cpu, logits(folder, model, ids, "--device", "cuda", *options), bound)
    check(f"{model.name} {form}", wrong == "", wrong)


def golden_models(folder):
    cases = []
    for model in sorted(MODELS.iterdir()):
        mla = "kv_lora_rank" in json.loads((model / "config.json").read_text())
        cases += [(folder, model, form) for form in (["absorbed", "naive"] if mla else [""])]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        list(workers.map(lambda case: golden_model(*case), cases))


def chunks_and_caches(folder):
    """One token at a time is a recorded graph, several are not; and how the cache is stored."""
    ids = "1,5,9,13,2,7,11,3,8"
    for name in ("qwen2", "v3-fp8"):
        whole = logits(folder, MODELS / name, ids, "--device", "cuda")
        for chunk in (1, 2, 4):
            again = logits(folder, MODELS / name, ids, "--device", "cuda", "--chunk", chunk)
            wrong = difference(whole, again, 0)
            check(f"{name} --chunk {chunk}", wrong == "", wrong)
    for name in ("qwen2", "v3-fp8"):
        cpu = logits(folder, MODELS / name, ids, "--device", "cpu", "--kv", "bf16")
        wrong = difference(cpu, logits(folder, MODELS / name, ids, "--device", "cuda", "--kv", "bf16"), 0)
        check(f"{name} --kv bf16", wrong == "", wrong)


def quantised_files(folder):
    """GGUF files and --quant: weights dequantised as they are read, as --exact does on the CPU."""
    ids = "1,5,9,13,2,7,11"
    for name, types in (("qwen2", ("q8_0", "q4_k_m", "q5_0", "q6_k")), ("v2-lite", ("q8_0", "q4_0")),
                        ("llama3", ("q8_0",))):
        for kind in types:
            path = pathlib.Path(folder) / f"{name}.{kind}.gguf"
            code, _, error = run("quantize", "-m", MODELS / name, "-o", path, "--force", "--type", kind)
            check(f"quantize {name} {kind}", code == 0, error)
            cpu = logits(folder, path, ids, "--device", "cpu", "--exact")
            wrong = difference(cpu, logits(folder, path, ids, "--device", "cuda"), 0)
            check(f"{path.name}", wrong == "", wrong)
    for quant in ("fp8", "q4_k"):
        options = ["--exact", "--quant", quant]
        cpu = logits(folder, MODELS / "v3-bf16", ids, "--device", "cpu", *options)
        wrong = difference(cpu, logits(folder, MODELS / "v3-bf16", ids, "--device", "cuda", *options), 0)
        check(f"v3-bf16 --quant {quant}", wrong == "", wrong)


def words(folder):
    tiny = ROOT / "weights" / "tiny"
    for prompt, n in (("17+25=", 24), ("What is larger, 9 or 7?", 12)):
        common = ["run", "-m", tiny, "-p", prompt, "-n", n, "--temp", "0"]
        _, cpu, _ = run(*common, "--device", "cpu")
        for options in ([], ["--mtp"], ["--mla", "naive"]):
            code, gpu, error = run(*common, "--device", "cuda", *options)
            same = code == 0 and gpu == cpu != ""
            check(f"words of {prompt} {options}", same, f"{gpu!r}, not {cpu!r} {error}")
    sampled = ["run", "-m", tiny, "-p", "1+1=", "-n", 10, "--seed", 7]
    check("words with a seed", run(*sampled, "--device", "cpu")[1] == run(*sampled, "--device", "cuda")[1])
    kept = pathlib.Path(folder) / "kept"
    common = ["run", "-m", tiny, "-p", "17+25=", "-n", 6, "--temp", "0"]
    _, whole, _ = run(*common, "--device", "cuda", "--force", "--save-kv", kept)
    for device in ("cpu", "cuda"):
        code, again, error = run(*common, "--device", device, "--load-kv", kept)
        used = code == 0 and again == whole and "from the cache" in error
        check(f"a cache of the device's on {device}", used, error)
    text = pathlib.Path(folder) / "text"
    text.write_text("Which is larger, 9.11 or 9.9?\n")
    both = [run("perplexity", "-m", tiny, "-f", text, "--device", device)[1] for device in ("cpu", "cuda")]
    check("perplexity", both[0] == both[1] != "", both)


def at_terminal(*arguments, **variables):
    """What a person sees of stderr."""
    ours, theirs = pty.openpty()
    nothing = subprocess.DEVNULL
    done = subprocess.run([PROGRAM, *map(str, arguments)], stdin=nothing, stdout=nothing, stderr=theirs,
                          env={**os.environ, **variables}, timeout=600)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode() if done.returncode == 0 else ""
    os.close(ours)
    return seen


def one_line(error):
    return error.startswith("deepseek: ") and error.count("\n") == 1


def refusals():
    common = ["run", "-m", ROOT / "weights" / "tiny", "-p", "1+1=", "-n", "2", "--temp", "0"]
    for name, variables, words_of in (("no device", {"EMU_DEVICES": "0"}, "no CUDA device"),
                                      ("too little memory", {"EMU_MEMORY": "1000000"}, "not enough memory"),
                                      ("a kernel fails", {"EMU_FAULT": "40"}, "cuda: ")):
        code, out, error = run(*common, "--device", "cuda", **variables)
        check(name, code == 1 and out == "" and one_line(error) and words_of in error, (code, out, error))
    error = at_terminal(*common, "--device", "auto", EMU_DEVICES="0")
    check("auto without a device", "device: cpu (no CUDA device" in error, error)
    error = at_terminal(*common, "--device", "auto")
    check("auto with one", "device: cuda" in error, error)
    code, _, error = run(*common, "--device", "cuda", "--arith", "bf16")
    check("--arith bf16", code == 1 and one_line(error) and "--arith bf16" in error, error)
    code, _, error = run("check", "3")
    check("check of no section", code == 1 and one_line(error), error)


def main():
    with tempfile.TemporaryDirectory() as folder:
        golden_models(folder)
        chunks_and_caches(folder)
        quantised_files(folder)
        words(folder)
    refusals()
    print(f"gpu-models: {passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
