#!/usr/bin/env python3
"""Runs every command that README.md shows, and compares what it says they print.

They run in a copy of the repository (v3_layer.py for a smaller layer), with a local hub that serves the
shipped model under every name, so that `make weights/NAME` and what follows it run too. Targets that build
or take minutes, such as `make test` itself, are only looked up (`make -n`).
"""
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

import published
import ranks
import suite
from hub import Hub

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ("num_attention_heads=2 num_key_value_heads=2 hidden_size=128 q_lora_rank=64 "
         "moe_intermediate_size=64 vocab_size=64")
LONG = re.compile(r"^make (test|asan|fuzz|cross|style|golden|bench)\b", re.MULTILINE)


def blocks(text):
    """The ```sh blocks, each with the ```text block that follows it, if one does before the next."""
    found = []
    for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind == "sh":
            found.append([body, None])
        elif kind == "text":
            found[-1][1] = body
        else:
            raise ValueError(f"README.md: a block of kind '{kind}' is run by no test")
    return found


def anywhere():
    """Repositories of a hub that has the shipped model under each name that README.md mentions."""
    tiny = {p.name: p.read_bytes() for p in (ROOT / "weights" / "tiny").iterdir()}
    return {f"deepseek-ai/{name}": tiny for names in published.MODELS for name in names.split(", ")}


class Readme(unittest.TestCase):
    def setUp(self):
        self.home = pathlib.Path(tempfile.mkdtemp())
        sources = [path.name for kind in ("*.h", "*.cpp", "*.cu") for path in ROOT.glob(kind)]
        for name in ("Makefile", "README.md", *sources, "build/flags", "build/have-run",
                     "tests/golden/compare.py", "tests/golden/v3_layer.py"):
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.home / name)
        shutil.copy2(published.PROGRAM, self.home / "deepseek")
        os.utime(self.home / "deepseek")                # up to date: `make run` need not build it again
        shutil.copytree(ROOT / "weights" / "tiny", self.home / "weights" / "tiny")
        for name in ("fetch.py", "README.md"):
            shutil.copy2(ROOT / "weights" / name, self.home / "weights")
        self.text = (ROOT / "README.md").read_text()

    def tearDown(self):
        shutil.rmtree(self.home)

    def test_commands(self):
        self.assertGreater(len(blocks(self.text)), 4)
        with Hub(anywhere(), page=100) as hub:
            environment = {**ranks.ENV, "HF_ENDPOINT": hub.url, "NO_PROXY": "*", "OMP_THREAD_LIMIT": "1"}
            for commands, expected in blocks(self.text):
                with self.subTest(commands):
                    script = LONG.sub(rf"make -C '{ROOT}' -n \1 >&2", commands)
                    less = "".join(f" --set {field}" for field in SMALL.split())       # than gigabytes
                    script = script.replace("v3_layer.py ", f"v3_layer.py{less} ")
                    done = subprocess.run(["bash", "-eu", "-c", script], cwd=self.home, env=environment,
                                          input="Hello\n", capture_output=True, text=True)
                    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                    if expected is not None:
                        self.assertEqual(done.stdout, expected)

    def test_targets(self):
        """Every `make TARGET` in the text is one that the Makefile has."""
        targets = set(re.findall(r"`make ([a-z]+)`", self.text))
        self.assertIn("help", targets)
        for target in targets:
            done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_tables(self):
        """The tables of models and of memory are what `deepseek info` computes from their config.json."""
        self.assertIn(published.table(), self.text)
        self.assertIn(published.memory_table(), self.text)

    def test_speed(self):
        """Every line of the table of speed is in RESULTS.md."""
        results = (ROOT / "tests" / "bench" / "RESULTS.md").read_text().splitlines()
        lines = re.findall(r"^\|.*\| [\d.]+ \|$", self.text, re.MULTILINE)
        self.assertTrue(6 <= len(lines) <= 12, lines)
        for line in lines:
            self.assertIn(line, results)

    def test_totals(self):
        """Parameter counts as the hub and the papers state them, so the shapes above are the true ones."""
        totals = {"DeepSeek-R1-Distill-Qwen-1.5B": 1777088000, "DeepSeek-R1-Distill-Qwen-32B": 32763876352,
                  "DeepSeek-R1-Distill-Llama-8B": 8030261248, "DeepSeek-R1-Distill-Llama-70B": 70553706496,
                  "DeepSeek-V2-Lite-Chat": 15706484224, "DeepSeek-V2-Chat": 235741434880,
                  "DeepSeek-R1": 671026419200, "DeepSeek-R1-0528-Qwen3-8B": 8190735360}
        for names, config in published.MODELS.items():
            for name in names.split(", "):
                if name in totals:
                    total = published.info(config, 4096)["parameters"]["total"]
                    self.assertEqual(total, totals.pop(name), name)
        self.assertEqual(totals, {})

    def test_files_named(self):
        """Every path that README.md and weights/README.md name exists."""
        for text in (self.text, (ROOT / "weights" / "README.md").read_text()):
            for path in re.findall(r"`((?:tests|weights)/[\w./-]+|\w+\.(?:cpp|h))`", text):
                if "NAME" not in path:
                    self.assertTrue((ROOT / path).exists(), path)


if __name__ == "__main__":
    suite.main("readme")
