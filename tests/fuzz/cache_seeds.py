#!/usr/bin/env python3
"""Writes the seeds of the target `cache`: caches of the shipped model, the facts about it set to zero."""
import json
import pathlib
import struct
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "fuzz" / "corpus" / "cache"


def write(name, *command):
    file = CORPUS / name
    subprocess.run([ROOT / "deepseek", *command, "--quiet", "--save-kv", file, "--force"], check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    data = bytearray(file.read_bytes())
    length, = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8:8 + length])["about"]["data_offsets"]
    data[8 + length + begin + 16:8 + length + end] = bytes(end - begin - 16)     # but for the two lengths
    file.write_bytes(data)


def main():
    CORPUS.mkdir(parents=True, exist_ok=True)
    write("none", "chat")
    write("plain", "run", "--raw", "-p", "9", "-n", "0")
    write("drafted", "run", "--raw", "-p", "9", "-n", "1", "--mtp")


if __name__ == "__main__":
    main()
