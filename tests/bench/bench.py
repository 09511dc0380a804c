#!/usr/bin/env python3
"""Speed of ./deepseek, beside what the machine can do at most and, on demand, beside llama.cpp.

    tests/bench/bench.py [--peer FOLDER] [--repeats N] [--prompt N] [--tokens N] MODEL...

MODEL: a folder or a .gguf file. FOLDER holds llama-bench; it is run on .gguf models, in turn with ours.
Prints a table in Markdown: medians of N runs and, as the machine's own speed changes, of each run's ratios.
The runs themselves go to stderr.
A model that llama.cpp cannot run with rearranged weights it runs without, and the last line says so.
"of floor" is the share of the time that the machine must need: reading the weights once (decode), or the
multiply-adds in f32 (prefill; integers and tiles can be faster than that). The head's are counted for every
token, though it is computed for the last of a prefill alone.
Standard library only.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def output(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def ours(model, threads, prompt, tokens):
    """The second of two runs: the first finds the file's pages not mapped. The peer has such a run too."""
    sizes = "-p", prompt, "-n", tokens, "-r", 2
    text = output(ROOT / "deepseek", "bench", "-m", model, "--threads", threads, *sizes)
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["test"]: line["tokens_per_s"][1] for line in lines}


@functools.cache
def repacks(folder, model):
    """Whether llama.cpp runs the model with rearranged weights: a deepseek2 one, with AMX, it does not."""
    command = folder / "llama-bench", "-m", model, "-p", 1, "-n", 0, "-r", 1
    return subprocess.run([str(c) for c in command], capture_output=True).returncode == 0


def theirs(folder, model, threads, prompt, tokens):
    sizes = "-p", prompt, "-n", tokens, "-r", 1, "--repack", int(repacks(folder, model))
    text = output(folder / "llama-bench", "-m", model, "-t", threads, "-o", "json", *sizes)
    return {"prefill" if line["n_prompt"] else "decode": line["avg_ts"] for line in json.loads(text)}


def work(model):
    """Weights that a token meets, and their bytes at the file's mean width: all active ones but the
    embedding, of which a token needs one row. A model whose head is its embedding is not meant here."""
    info = json.loads(output(ROOT / "deepseek", "info", "-m", model, "--json"))
    parameters = info["parameters"]
    weights = parameters["active"] - info["vocab_size"] * info["hidden_size"]
    return weights, sum(info["bytes"].values()) * weights / (parameters["total"] + parameters["mtp"])


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def median(runs, value):
    return statistics.median(value(run) for run in runs)


def row(model, test, n, runs, floor):
    """A line of the table. floor(run): tokens per second that the machine allowed in that run."""
    cells = [model.name, f"{test} {n}", f"{median(runs, lambda r: r['ours'][test]):.1f}"]
    share = median(runs, lambda r: r["ours"][test] / floor(r))
    cells += [f"{median(runs, floor):.1f}", f"{100 * share:.0f} %"]
    if "peer" in runs[0]:
        cells.append(f"{median(runs, lambda r: r['peer'][test]):.1f}")
        cells.append(f"{median(runs, lambda r: r['ours'][test] / r['peer'][test]):.2f}")
    return "| " + " | ".join(cells) + " |"


def measure(model, options, threads):
    """One run: what the machine can do just now, then our speed and the peer's."""
    run = {"floors": json.loads(output(ROOT / "build/floors", threads))}
    run["ours"] = ours(model, threads, options.prompt, options.tokens)
    if options.peer and model.suffix == ".gguf":
        run["peer"] = theirs(options.peer, model, threads, options.prompt, options.tokens)
    return run


def rows_of(model, options, threads, runs):
    weights, size = work(model)
    compute = lambda r: r["floors"]["f32_gflop_s"] * 1e9 / (2 * weights)
    read = lambda r: r["floors"]["read_gb_s"] * 1e9 / size
    yield row(model, "prefill", options.prompt, runs, compute)
    yield row(model, "decode", options.tokens, runs, read)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    options = parser.parse_args()
    threads, rows, runs = len(os.sched_getaffinity(0)), [], []
    for model in options.models:
        own = []
        for repeat in range(options.repeats):
            own.append(measure(model, options, threads))
            print(f"{model.name}, run {repeat + 1} of {options.repeats}: {own[-1]}", file=sys.stderr)
        rows += rows_of(model, options, threads, own)
        runs += own
    read, peak = (median(runs, lambda r, k=k: r["floors"][k]) for k in ("read_gb_s", "f32_gflop_s"))
    print(f"{datetime.date.today()}, {processor()}, {threads} threads, medians of {options.repeats} runs;")
    print(f"memory was read at {read:.1f} GB/s, f32 peak {peak:.0f} GFLOP/s.\n")
    peer = options.peer is not None
    print("| model | test | tok/s | floor | of floor |" + (" llama.cpp | ratio |" if peer else ""))
    print("|---|---|---|---|---|" + ("---|---|" if peer else ""))
    print(*rows, sep="\n")
    if peer:
        plain = [m.name for m in options.models if m.suffix == ".gguf" and not repacks(options.peer, m)]
        if plain:
            print(f"\nllama.cpp fails with rearranged weights, and ran with --repack 0: {', '.join(plain)}")


if __name__ == "__main__":
    main()
