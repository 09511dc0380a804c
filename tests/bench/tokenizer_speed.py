#!/usr/bin/env python3
"""Compares the speed of tokenizer.h with the Rust library `tokenizers`, one thread each, on the same text.

    pip install tokenizers
    g++ -std=c++20 -O2 tests/bench/tokenizer_speed.cpp -o build/tokenizer_speed -lsimdjson -lpcre2-8 -lutf8proc
    tests/bench/tokenizer_speed.py MODEL_FOLDER FILE...

The two take turns, RUNS times each; a line per FILE gives the medians in MB/s and their ratio. The ids must be equal.
Rust's library keeps a cache of words from run to run, so its first run, with the cache empty, is given too.
"""
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import tokenizers  # noqa: E402  (reads the environment)

RUNS = 9
ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    folder, files = sys.argv[1], sys.argv[2:]
    ours = subprocess.Popen([ROOT / "build" / "tokenizer_speed", folder, *files], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    print(f"tokenizers {tokenizers.__version__}, {folder}")
    print(f"{'file':24} {'MB':>6} {'ours MB/s':>10} {'Rust MB/s':>10} {'ratio':>6}   first run: ours, Rust, ratio")
    for number, file in enumerate(files):
        text = pathlib.Path(file).read_text(encoding="utf-8")
        megabytes = len(text.encode()) / 1e6
        theirs = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
        times = {"ours": [], "rust": []}
        for _ in range(RUNS):
            ours.stdin.write(f"{number}\n")
            ours.stdin.flush()
            seconds, count = ours.stdout.readline().split()
            times["ours"].append(float(seconds))
            start = time.perf_counter()
            ids = theirs.encode(text, add_special_tokens=False).ids
            times["rust"].append(time.perf_counter() - start)
            assert len(ids) == int(count), (file, len(ids), count)
        a, b = (megabytes / statistics.median(times[k]) for k in ("ours", "rust"))
        c, d = (megabytes / times[k][0] for k in ("ours", "rust"))
        print(f"{pathlib.Path(file).name:24} {megabytes:6.2f} {a:10.2f} {b:10.2f} {a / b:6.2f}   {c:.2f}, {d:.2f}, {c / d:.2f}")
    ours.stdin.close()
    ours.wait()


if __name__ == "__main__":
    main()
