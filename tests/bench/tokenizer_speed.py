#!/usr/bin/env python3
r"""Compares the speed of tokenizer.h with the Rust library `tokenizers`, one thread each, on the same text.

    pip install tokenizers
    g++ -std=c++20 -O2 tests/bench/tokenizer_speed.cpp -o build/tokenizer_speed \
        -lsimdjson -lpcre2-8 -lutf8proc
    tests/bench/tokenizer_speed.py build/tokenizer_speed MODEL_FOLDER FILE...

Each FILE is encoded as one text, and as documents of 8 kB. The two programs take turns, RUNS times each; a
line gives the medians in MB/s and their ratio. All ids must be equal. Rust's library keeps a cache of words
from run to run; its first run, with the cache empty, is given too. Any text will do, but one that repeats
itself flatters the cache.
"""
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import tokenizers  # noqa: E402  (reads the environment)

RUNS = 7
DOCUMENT = 8192


def hash_of(ids):
    h = 0
    for id in ids:
        h = (h * 1000003 + id) % 2**43
    return h


class Ours:
    def __init__(self, program, folder, files):
        self.process = subprocess.Popen([program, folder, *files], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)

    def encode(self, number, size):
        """Seconds, count and hash of ids."""
        self.process.stdin.write(f"{number} {size}\n")
        self.process.stdin.flush()
        seconds, count, hash = self.process.stdout.readline().split()
        return float(seconds), (int(count), int(hash))


class Rust:
    def __init__(self, folder):
        self.tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")

    def encode(self, documents):
        start = time.perf_counter()
        encodings = [self.tokenizer.encode(d, add_special_tokens=False) for d in documents]
        return time.perf_counter() - start, [id for e in encodings for id in e.ids]


def documents_of(text, size):
    """As tokenizer_speed.cpp cuts."""
    data = text.encode()
    ends = [0]
    while ends[-1] < len(data):
        newline = data.find(b"\n", ends[-1] + size)
        ends.append(len(data) if newline < 0 else newline + 1)
    return [data[a:b].decode() for a, b in zip(ends, ends[1:])]


def compare(ours, folder, number, file, size):
    text = pathlib.Path(file).read_bytes().decode()
    documents, megabytes = documents_of(text, size), len(text.encode()) / 1e6
    rust = Rust(folder)                                           # with an empty cache
    our_times, their_times = [], []
    for _ in range(RUNS):
        seconds, said = ours.encode(number, size)
        our_times.append(seconds)
        seconds, ids = rust.encode(documents)
        their_times.append(seconds)
        if (len(ids), hash_of(ids)) != said:
            sys.exit(f"{file}: other ids than the library's")
    a, b = (megabytes / statistics.median(t) for t in (our_times, their_times))
    c, d = megabytes / our_times[0], megabytes / their_times[0]
    print(f"{pathlib.Path(file).name:16} {megabytes:6.2f} {len(documents):6} {a:8.2f} {b:8.2f} {a / b:6.2f}"
          f"     {c:8.2f} {d:8.2f} {c / d:6.2f}", flush=True)


def main(arguments):
    if len(arguments) < 3:
        sys.exit(__doc__)
    program, folder, *files = arguments
    ours = Ours(program, folder, files)
    processor = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    print(f"{pathlib.Path(folder).name}, tokenizers {tokenizers.__version__}, {processor and processor[1]}")
    print("text                 MB   docs     ours     Rust  ratio     first run: ours, Rust, ratio   (MB/s)")
    for number, file in enumerate(files):
        for size in (1 << 40, DOCUMENT):
            compare(ours, folder, number, file, size)


if __name__ == "__main__":
    main(sys.argv[1:])
