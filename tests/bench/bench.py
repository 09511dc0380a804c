#!/usr/bin/env python3
"""Speed of ./deepseek, beside what the machine can do at most and, on demand, beside llama.cpp.

    tests/bench/bench.py [--peer FOLDER] [--repeats N] [--prompt N] [--tokens N] MODEL...

MODEL: a folder or a .gguf file. FOLDER holds llama-bench; it is run on .gguf models, in turn with ours. Prints a
table in Markdown: medians of N runs; "of floor" is the share of the time that the machine must need: reading the
weights once (decode), or the multiply-adds in f32 (prefill; integers and tiles can be faster than that).
Standard library only.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def output(*command):
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def ours(model, threads, prompt, tokens):
    text = output(ROOT / "deepseek", "bench", "-m", model, "-p", prompt, "-n", tokens, "-r", 1, "--threads", threads)
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["test"]: line["tokens_per_s"][0] for line in lines}


def theirs(folder, model, threads, prompt, tokens):
    text = output(folder / "llama-bench", "-m", model, "-t", threads, "-p", prompt, "-n", tokens, "-r", 1, "-o", "json")
    return {"prefill" if line["n_prompt"] else "decode": line["avg_ts"] for line in json.loads(text)}


def work(model):
    """Weights that a token meets, and their bytes: all active ones but the embedding's other rows."""
    info = json.loads(output(ROOT / "deepseek", "info", "-m", model, "--json"))
    weights = info["parameters"]["active"] - info["vocab_size"] * info["hidden_size"]
    return weights, sum(info["bytes"].values()) * weights / info["parameters"]["total"]


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def row(model, test, n, measured, floor):
    """A line of the table. floor: tokens per second that the machine allows."""
    mine = statistics.median(m[test] for m in measured["ours"])
    cells = [model.name, f"{test} {n}", f"{mine:.1f}", f"{floor:.1f}", f"{100 * mine / floor:.0f} %"]
    if measured["peer"]:
        peer = statistics.median(m[test] for m in measured["peer"])
        ratio = statistics.median(a[test] / b[test] for a, b in zip(measured["ours"], measured["peer"]))
        cells += [f"{peer:.1f}", f"{ratio:.2f}"]
    return "| " + " | ".join(cells) + " |"


def measure(model, options, threads):
    measured = {"ours": [], "peer": []}
    for _ in range(options.repeats):
        measured["ours"].append(ours(model, threads, options.prompt, options.tokens))
        if options.peer and model.suffix == ".gguf":
            measured["peer"].append(theirs(options.peer, model, threads, options.prompt, options.tokens))
    return measured


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    rows, floors = [], {"read_gb_s": 0, "f32_gflop_s": 0}
    for model in options.models:
        now = json.loads(output(ROOT / "build/floors", threads))
        floors = {key: max(floors[key], now[key]) for key in floors}
        measured = measure(model, options, threads)
        weights, size = work(model)
        rows.append((model, "prefill", options.prompt, measured, lambda f, w=weights: f["f32_gflop_s"] * 1e9 / (2 * w)))
        rows.append((model, "decode", options.tokens, measured, lambda f, s=size: f["read_gb_s"] * 1e9 / s))
    print(f"{datetime.date.today()}, {processor()}, {threads} threads, medians of {options.repeats} runs;", end=" ")
    print(f"memory is read at {floors['read_gb_s']:.1f} GB/s, f32 peak {floors['f32_gflop_s']:.0f} GFLOP/s.\n")
    peer = options.peer is not None
    print("| model | test | tok/s | floor | of floor |" + (" llama.cpp | ratio |" if peer else ""))
    print("|---|---|---|---|---|" + ("---|---|" if peer else ""))
    for model, test, n, measured, floor in rows:
        print(row(model, test, n, measured, floor(floors)))


if __name__ == "__main__":
    main()
