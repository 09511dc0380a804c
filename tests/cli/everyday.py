#!/usr/bin/env python3
"""Everyday use outside the happy path: files that are written, caches, how answers end, signals.

DEEPSEEK names another program than ./deepseek.
"""
import contextlib
import fcntl
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import time

import cli
import suite
from cli import ANSWER, ONE_THREAD, PROGRAM, QUESTION, TEXT, TINY, best_of, endless, read_safetensors, run

IDS = "0,508,42,360,81,509,510,201"
ASK = ("run", "-p", QUESTION)


def start(*arguments, env=ONE_THREAD, **more):
    return subprocess.Popen([PROGRAM, *map(str, arguments)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **more)


def catches(process, how):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (how - 1) & 1


def is_whole(path):
    """Whether a safetensors file ends where its header says."""
    data = pathlib.Path(path).read_bytes()
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return len(data) == 8 + length + max(ends)


def whole_or_none(path, expected):
    return not path.exists() or path.read_bytes() == expected


class Case(cli.Case):
    def model(self, **config):
        """A copy of the shipped model, with other fields in its config.json."""
        folder = self.folder / f"model{len(list(self.folder.iterdir()))}"
        shutil.copytree(TINY, folder)
        fields = json.loads((TINY / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, **config}))
        return folder

    def names(self, folder=None):
        return sorted(p.name for p in (folder or self.folder).iterdir())


class Outputs(Case):
    """What may be written over, and what is found before the work begins."""
    def commands(self, model, out):
        return {"logits": ("logits", "-m", model, "--ids", IDS, "--out", out),
                "quantize": ("quantize", "-m", model, "-o", out, "--type", "q8_0"),
                "run": (*ASK, "-m", model, "-n", "1", "--save-kv", out),
                "chat": ("chat", "-m", model, "--save-kv", out)}

    def test_files_of_the_model_are_safe(self):
        """Under whatever name, and with --force too."""
        model = self.model()
        for name in sorted(os.listdir(model)):
            (self.folder / f"soft.{name}").symlink_to(model / name)
            os.link(model / name, self.folder / f"hard.{name}")
        before = {p.name: p.read_bytes() for p in model.iterdir()}
        targets = [model / name for name in before]
        targets += [self.folder / f"{kind}.{name}" for kind in ("soft", "hard") for name in before]
        targets.append(f"{model}/../{model.name}/./config.json")
        for number, target in enumerate(targets):
            for command in list(self.commands(model, target).values())[number % 2::2]:
                self.refused(*command, "--force", says="model in use")
        self.assertEqual({p.name: p.read_bytes() for p in model.iterdir()}, before)

    def test_a_gguf_file_is_safe_from_itself(self):
        file = self.folder / "m.gguf"
        self.ok("quantize", "-m", TINY, "-o", file, "--type", "f16")
        before = file.read_bytes()
        self.refused("quantize", "-m", file, "-o", file, "--type", "q8_0", "--force", says="model in use")
        self.refused(*ASK, "-m", file, "--save-kv", file, "--force", says="model in use")
        self.assertEqual(file.read_bytes(), before)

    def test_other_files_need_force(self):
        for name, command in self.commands(TINY, self.folder / "out").items():
            (self.folder / "out").write_text("mine")
            self.refused(*command, says="--force")
            self.assertEqual((self.folder / "out").read_text(), "mine")
            self.ok(*command, "--force")
            self.assertNotEqual((self.folder / "out").read_bytes(), b"mine", name)
        link = self.folder / "link"
        link.symlink_to(self.folder / "out")
        self.ok(*self.commands(TINY, link)["logits"], "--force")
        self.assertTrue(link.is_symlink() and is_whole(self.folder / "out"))
        self.assertEqual(self.names(), ["link", "out"])

    def test_paths_are_looked_at_first(self):
        """Before weights that are not even there."""
        bare = self.folder / "bare"
        shutil.copytree(TINY, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        for target, says in ((self.folder / "no" / "such", "such"), (self.folder, "is a directory"),
                             ("/dev/null", "/dev/null"), ("", "an empty path"), ("x" * 300, "xxx")):
            for command in self.commands(bare, target).values():
                self.refused(*command, says=says)
        self.assertEqual(self.names(), ["bare"])
        for option in ("-m", "--save-kv", "--load-kv", "-f", "--stop"):
            self.refused("run", *(() if option == "-f" else ("-p", "a")), option, "", says="an empty path")

    def test_a_full_disk(self):
        """Here: a limit for files. One line, and nothing half-written."""
        for name, command in self.commands(TINY, self.folder / "out").items():
            done = subprocess.run([PROGRAM, *map(str, command)], capture_output=True, text=True,
                                  env=ONE_THREAD,
                                  stdin=subprocess.DEVNULL, preexec_fn=lambda: resource.setrlimit(
                                      resource.RLIMIT_FSIZE, (100, 100)))
            self.assertEqual(done.returncode, 1, name)
            self.assertRegex(done.stderr, r"(?m)^deepseek: [^\n]*out: File too large\n\Z")
            self.assertEqual(self.names(), [], name)

    def test_what_a_kill_leaves_is_removed(self):
        """By the next who writes that name; not what belongs to another name, or to one who still writes."""
        model = self.folder / "m"
        model.mkdir()
        endless(model)
        running = [start(*ASK, "-m", model, "--save-kv", self.folder / name) for name in ("a", "b", "a")]
        for process in running:
            process.stdout.read(20)
        self.assertEqual(len(self.names()), 4)
        for process in running[:2]:
            process.kill()
            process.communicate()
        self.ok(*ASK, "--save-kv", self.folder / "a")
        left = [re.sub(r"\.\w{6}\.tmp", ".tmp", name) for name in self.names()]
        self.assertEqual(left, ["a", "a.tmp", "b.tmp", "m"])
        running[2].send_signal(signal.SIGTERM)           # its file was there in the meantime
        self.assertIn("File exists", running[2].communicate()[1].decode())
        self.ok(*ASK, "--save-kv", self.folder / "b")
        self.assertEqual(self.names(), ["a", "b", "m"])


class Caches(Case):
    FOLLOW = "Add 6 and 77."

    def saved(self, *options, model=TINY):
        file = self.folder / "kv"
        self.ok(*ASK, "-m", model, "--save-kv", file, "--force", *options)
        return file

    def test_a_cache_is_of_one_arithmetic(self):
        """Whatever else would compute other numbers is refused; what would not is not."""
        plain = self.saved()
        for same in (("--threads", "2"), ("--chunk", "3"), ("--seed", "5"), ("--temp", "0"), ("--mtp",)):
            self.assertEqual(self.ok(*ASK, "--load-kv", plain, *same)[0], ANSWER, same)
        for other in (("--quant", "q8_0"), ("--mla", "naive"), ("--kv", "bf16"), ("--arith", "bf16")):
            self.refused(*ASK, "--load-kv", plain, *other, says=f"another {other[0]}")
        quantised = self.saved("--quant", "q8_0")
        self.refused(*ASK, "--load-kv", quantised, "--quant", "q8_0", "--exact", says="--exact")
        self.refused(*ASK, "--load-kv", quantised, "--quant", "q4_k", says="--quant")

    def test_a_cache_is_of_one_config(self):
        plain = self.saved()
        changes = {"rope_theta": 10001.0, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.0,
                   "norm_topk_prob": False, "topk_group": 3, "num_experts_per_tok": 3,
                   "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}}
        for field, value in changes.items():
            model = self.model(**{field: value})
            self.refused(*ASK, "-m", model, "--load-kv", plain, says="config.json")
        self.ok(*ASK, "-m", self.model(max_position_embeddings=400), "--load-kv", plain)

    def test_a_cache_is_of_one_set_of_weights(self):
        """One byte in any tensor tells them apart."""
        plain = self.saved()
        model = self.model()
        file = model / "model.safetensors"
        data = file.read_bytes()
        length, = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8:8 + length])
        chosen = random.Random(1).sample(sorted(set(entries) - {"__metadata__"}), 12)
        for name in chosen + ["lm_head.weight", "model.embed_tokens.weight"]:
            begin, end = entries[name]["data_offsets"]
            at = 8 + length + random.Random(name).randrange(begin, end, 2)         # a low byte: no infinities
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])
            self.refused(*ASK, "-m", model, "--load-kv", plain, says="weights")

    def test_damaged_files(self):
        file = self.saved()
        data = file.read_bytes()
        broken = self.folder / "broken"
        for text in (b"", b"\0", data[:7], data[:100], data[:-1], data + b"\0", b"{}" * 50,
                     TINY.joinpath("model.safetensors").read_bytes()):
            broken.write_bytes(text)
            self.refused(*ASK, "--load-kv", broken, says="broken")
        self.refused(*ASK, "--load-kv", self.folder / "absent", says="absent")
        self.refused(*ASK, "--load-kv", self.folder, says=self.folder.name)
        self.refused(*ASK, "--load-kv", file, "--ctx", "30", says="the context holds 30")

    def test_however_an_answer_ended(self):
        """A cache goes on as the conversation would have without it."""
        endings = [("-n", str(n)) for n in (0, 1, 2, 7)] + [("--think-budget", "3"), ("--ctx", "30"), ()]
        endings += [("--stop", text) for text in ("same", "1 <", "So", "larger.", "</think>")]
        for drafts in ((), ("--mtp",)):
            for ending in endings:
                prompt = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜><think>\n"
                options = ("--save-kv", self.folder / "kv", "--force", *drafts, *ending)
                said = self.ok("run", "--raw", "-p", prompt, *options)[0]
                for more in (said, said.rstrip("\n") + "9", TEXT):
                    expected = self.ok("run", "--raw", "-p", prompt + more, "-n", "12")[0]
                    found = self.ok("run", "--raw", "-p", prompt + more, "-n", "12", "--load-kv",
                                    self.folder / "kv", *drafts)[0]
                    self.assertEqual(found, expected, (drafts, ending))

    def test_nothing_said(self):
        """A chat without a turn has a cache without a token."""
        self.ok("chat", "--save-kv", self.folder / "kv", given="")
        self.assertEqual(read_tokens(self.folder / "kv"), 0)
        self.assertEqual(self.ok(*ASK, "--load-kv", self.folder / "kv")[0], ANSWER)


def read_tokens(path):
    data = pathlib.Path(path).read_bytes()
    length, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + length])["tokens"]["shape"][0]


class Answers(Case):
    def json_of(self, *options, **more):
        return json.loads(self.ok(*ASK, "--json", *options, **more)[0])

    def test_why_it_ended(self):
        model = endless(self.folder)
        for options, stop, says in (((), "end", "ended by the model"), (("-n", "5"), "length", "ended by -n"),
                                    (("-n", "0"), "length", "ended by -n"),
                                    (("--ctx", "25"), "context", "ended by the context, which is full"),
                                    (("--stop", "9.9"), "stop", "ended by --stop")):
            self.assertEqual(self.json_of(*options)["stop"], stop)
            self.assertTrue(self.ok(*ASK, *options)[1].endswith(f"; {says}\n"), options)
            self.assertEqual(self.ok(*ASK, "--quiet", *options)[1], "")
        process = start(*ASK, "-m", model, "--stop", "never said")
        process.stdout.read(len(ANSWER))
        process.send_signal(signal.SIGINT)
        self.assertRegex(process.communicate()[1].decode(), rf"\A{cli.INTERRUPTED}\n\Z")
        self.assertEqual(process.returncode, 130)
        process = start(*ASK, "-m", model, "--json", stdin=subprocess.DEVNULL)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out = process.communicate()[0]
        self.assertTrue(process.returncode == 130 and (not out or json.loads(out)["stop"] == "interrupted"))

    def test_stop_texts(self):
        """Whatever tokens they are made of; the first that comes ends; they are not shown."""
        for stops, text in ((("So",), "9 and 9: same\n1 and 9: 1 < 9\n"),
                            (("9.9 is", "1 <"), "9 and 9: same\n1 and 9: "),
                            (("\n\n9",), TEXT.split("\n\n9")[0]),
                            (("e\n1 a",), "9 and 9: sam"), (("x",), TEXT)):
            options = [part for text in stops for part in ("--stop", text)]
            for drafts in ((), ("--mtp",)):
                said = self.ok(*ASK, *options, *drafts)[0]
                self.assertEqual(said.rstrip("\n"), ("<think>" + text).rstrip("\n"))
        self.assertEqual(self.json_of("--stop", "larger")["answer"], "9.9 is ")
        said = self.ok("run", "--stop", "So", "-", given=QUESTION)[0]     # takes one text, and not the `-`
        self.assertEqual(said, "<think>9 and 9: same\n1 and 9: 1 < 9\n")
        done = subprocess.run([PROGRAM, *ASK, "--stop", b"\xe9"], capture_output=True)
        self.assertEqual((done.returncode, done.stdout), (1, b""))
        self.assertIn(b"UTF-8", done.stderr)

    def test_the_answer_alone(self):
        self.assertEqual(self.ok(*ASK, "--answer-only")[0], "9.9 is larger.\n")
        self.assertEqual(self.ok(*ASK, "--answer-only", "-n", "3")[0], "\n")
        out = self.ok("chat", "--answer-only", given=f"{QUESTION}\n{QUESTION}\n")[0]
        self.assertEqual(out, "9.9 is larger.\n" * 2)
        told = self.json_of()
        self.assertEqual((told["thought"], told["answer"]), (TEXT.split("</think>")[0], "9.9 is larger."))
        for command in (ASK, ("chat",)):
            self.refused(*command, "--answer-only", "--json", says="--answer-only")

    def test_one_newline_of_a_file_is_dropped(self):
        for given, text in (("a", "a"), ("a\n", "a"), ("a\n\n", "a\n"), ("a\r\n", "a"), (" a ", " a ")):
            (self.folder / "f").write_bytes(given.encode())
            for source in (("-f", self.folder / "f"), ("-",), ("-f", "-")):
                error = self.ok("run", *source, "-n", "0", "--show-prompt", given=given)[1]
                self.assertIn(f"<｜User｜>{text}<｜Assistant｜>", error)
                error = self.ok("run", *source, "-n", "0", "--raw", "--show-prompt", given=given)[1]
                self.assertIn(f"prompt: {given}\nids", error)
            self.assertIn(f"<｜User｜>{given}<｜A", self.ok("run", "-p", given, "-n", "0", "--show-prompt")[1])
        self.refused("run", "-", given="\n", says="empty")

    def test_logprobs_are_those_of_the_logits(self):
        told = self.json_of("--logprobs", "3", "-n", "4")
        prompt = json.loads(re.search(r"ids: (.*)", self.ok(*ASK, "-n", "0", "--show-prompt")[1])[1])
        said = [t["id"] for t in told["tokens"]]
        self.ok("logits", "--ids", ",".join(map(str, prompt + said)), "--out", self.folder / "l")
        logits = read_safetensors(self.folder / "l")["logits"][2]
        for t, token in enumerate(told["tokens"], len(prompt) - 1):
            row = logits[t * 512:t * 512 + 512]
            total = math.log(sum(math.exp(z - max(row)) for z in row)) + max(row)
            best = sorted(range(512), key=lambda i: (-row[i], i))[:3]
            self.assertEqual(token["id"], best[0])
            self.assertEqual([other["id"] for other in token["top"]], best)
            for other in token["top"]:                   # six decimals, of floats near 20
                self.assertAlmostEqual(other["logprob"], row[other["id"]] - total, delta=3e-6)
        self.refused(*ASK, "--logprobs", "3", says="--json")

    def test_the_penalty_is_the_papers(self):
        """CTRL's: z / r for a token of the text so far, z r where z is negative."""
        prompt = json.loads(re.search(r"ids: (.*)", self.ok(*ASK, "-n", "0", "--show-prompt")[1])[1])
        told = self.json_of("--repeat-penalty", "4", "-n", "6", "--logprobs", "1")
        for token in told["tokens"]:
            self.ok("logits", "--ids", ",".join(map(str, prompt)), "--out", self.folder / "l", "--force")
            row = read_safetensors(self.folder / "l")["logits"][2][-512:]
            for seen in set(prompt):
                row[seen] = row[seen] / 4 if row[seen] > 0 else row[seen] * 4
            self.assertEqual(token["id"], best_of(row, 0))
            prompt.append(token["id"])
        self.assertNotEqual(told["thought"], self.json_of("-n", "6")["thought"])

    def test_numbers_that_are_none(self):
        """In every command one line, exit code 1 and no file."""
        model = self.model()
        data = bytearray((model / "model.safetensors").read_bytes())
        length, = struct.unpack("<Q", data[:8])
        begin, end = json.loads(data[8:8 + length])["lm_head.weight"]["data_offsets"]
        data[8 + length + end - 2:8 + length + end] = b"\xff\x7f"
        (model / "model.safetensors").write_bytes(data)
        (self.folder / "text").write_text("Ask Mia.")
        for command in (ASK, ("run", "-p", "a", "--mtp"), ("perplexity", "-f", self.folder / "text"),
                        ("logits", "--ids", IDS, "--out", self.folder / "out"),
                        ("bench", "-p", "4", "-n", "2", "-r", "1")):
            code, _, error = run(*command, "-m", model)
            self.assertEqual(code, 1, error)
            self.assertRegex(error, r"\Adeepseek: [^\n]*no finite numbers[^\n]*\n\Z")
        code, _, error = run("chat", "-m", model, "--save-kv", self.folder / "kv", given="a\nb\n")
        self.assertEqual((code, error.count("\n")), (1, 1))
        self.assertTrue(is_whole(self.folder / "kv"))


class Lines(Case):
    """chat off a terminal, and options."""
    def test_a_line_that_cannot_be_taken(self):
        lines = [b"caf\xe9", b"1 " * 600, b"", b"  ", b"Hi\0there", *2 * [QUESTION.encode()]]
        lines[-2] += b"\r"
        for end in (b"", b"\n"):
            options = ("--show-prompt", "-n", "1", "--save-kv", self.folder / "kv", "--force")
            command = [PROGRAM, "chat", *options]
            done = subprocess.run(command, env=ONE_THREAD, input=b"\n".join(lines) + end, capture_output=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            said = done.stderr.decode()
            refused = re.findall(r"(?m)^deepseek: (.*)$", said)
            self.assertRegex(refused.pop(0), "UTF-8")
            self.assertRegex(refused.pop(0), r"\Athe prompt has \d+ tokens, the context holds 512")
            asked = [p.split("<｜User｜>")[-1] for p in re.findall(r"prompt: ([^\n]*)<｜Assistant｜>", said)]
            self.assertEqual((asked[1:], refused), (["Hi\0there", QUESTION, QUESTION], []))
            self.assertEqual(len(re.findall(cli.STATISTICS, said)), 3)
            self.assertTrue(is_whole(self.folder / "kv"))

    def test_windows_and_stops_cut_nothing(self):
        """A signal that does not end the program ends no line that it reads or writes."""
        for command, parts, expected in ((("run", "-"), ("Which is larger, ", "9.11 or 9.9?"), ANSWER),
                                         (("chat",), (QUESTION[:9], QUESTION[9:] + "\n"), ANSWER),
                                         (("tokenize",), ("Mi", "a"), run("tokenize", given="Mia")[1])):
            process = start(*command, stdin=subprocess.PIPE)
            for part in parts:
                while pathlib.Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "S":
                    time.sleep(0.01)
                for how in (signal.SIGWINCH, signal.SIGSTOP, signal.SIGCONT):
                    time.sleep(0.1)
                    process.send_signal(how)
                process.stdin.write(part.encode())
                process.stdin.flush()
            self.assertEqual(process.communicate()[0].decode(), expected)

    def test_options(self):
        self.assertEqual(self.ok("--version")[0].split()[0], "deepseek")
        short = ("-t", "1", "-c", "100", "-s", "3", "-n", "-1", "--quiet")
        self.assertEqual(self.ok(*ASK, *short), (ANSWER, ""))
        loud = ("--quant", "Q8_0", "--device", "CPU", "--kv", "BF16", "--mla", "ABSORBED", "--arith", "F32")
        self.assertEqual(self.ok(*ASK, *loud)[0], ANSWER)
        error = self.ok(*ASK, "--seed", "-1", "--temp", "5", "-n", "20")[1]
        seed, = re.findall(r"(?m)^seed (\d+)$", error)
        hot = (*ASK, "--temp", "5", "-n", "20", "--json")
        told = json.loads(self.ok(*hot, "--seed", "-1")[0])
        again = json.loads(self.ok(*hot, "--seed", str(told["seed"]))[0])
        self.assertEqual((told["thought"], told["answer"]), (again["thought"], again["answer"]))
        for arguments, says in ((("--top-p", "0"), "--temp 0 is greedy"), (("-ngl", "99"), "--device"),
                                (("--n-gpu-layers", "9"), "--device"), (("--temprature", "1"), "--temp"),
                                (("--max-tokens", "1"), "--max-tokens"), (("--temp", "warm"), "is no number"),
                                (("-n", "1.5"), "whole number"), (("-n", "99999999999"), "99999999999"),
                                (("-s", "x"), "seed"), (("--quant", "q9"), "q9"), (("--stop",), "--stop")):
            self.refused(*ASK, *arguments, says=says)
        self.refused("run", "-p", "1 " * 300, "--ctx", "100", says="--ctx 512")      # which the model allows
        self.refused("quantise", says="(quantize?)")

    def test_json_everywhere_or_refused(self):
        (self.folder / "text").write_text("Ask Mia.")
        for command in (ASK, ("info",), ("perplexity", "-f", self.folder / "text"), ("tokenize", "--decode"),
                        ("bench", "-p", "2", "-n", "0", "-r", "1"), ("tokenize",),
                        ("quantize", "-m", TINY, "-o", self.folder / "q", "--type", "Q8_0")):
            out, error = self.ok(*command, "--json", given="[7,8]")
            json.loads(out)
        lines = self.ok("chat", "--json", given="a\nb\n")[0].splitlines()
        self.assertEqual(["answer" in json.loads(line) for line in lines], [True, True])
        self.refused("check", "--json", says="--json")

    def test_what_quantize_and_bench_say(self):
        file = self.folder / "q.gguf"
        error = self.ok("quantize", "-m", TINY, "-o", file, "--type", "q8_0")[1]
        said = rf"{re.escape(str(file))}: ([\d.]+) GB, q8_0, ([\d.]+) bits a weight\n"
        size, bits = re.fullmatch(said, error).groups()
        self.assertAlmostEqual(float(size), file.stat().st_size / 1e9, delta=0.0005)
        again = ("quantize", "-m", TINY, "-o", file, "--type", "q8_0", "--force")
        told = json.loads(self.ok(*again, "--json")[0])
        self.assertEqual(told["bytes"], file.stat().st_size)
        self.assertAlmostEqual(float(bits), told["bits_per_weight"], delta=0.006)
        line, = map(json.loads, self.ok("bench", "-p", "4", "-n", "0", "-r", "4", "-d", "8")[0].splitlines())
        speeds = line["tokens_per_s"]
        mean = sum(speeds) / 4
        self.assertEqual((line["depth"], line["n"], line["model"]), (8, 4, str(TINY)))
        self.assertAlmostEqual(line["mean"], mean, delta=0.02)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in speeds) / 3)
        self.assertAlmostEqual(line["deviation"], deviation, delta=0.02)
        self.refused("bench", "-p", "500", "-n", "1", "-d", "13", says="context is 512")


class Signals(Case):
    TIMES = 100

    def at_random(self, command, whole, given=b""):
        """Each signal at any moment of a command: nothing temporary is left, and what is there is whole."""
        rng = random.Random(command[0])
        begin = time.monotonic()
        process = start(*command, stdin=subprocess.PIPE)
        process.communicate(given)
        took, ended = time.monotonic() - begin, 0
        for _ in range(self.TIMES):
            for file in self.folder.iterdir():
                file.unlink()
            how = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
            process = start(*command, stdin=subprocess.PIPE)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(given)
                process.stdin.flush()
            while not catches(process, signal.SIGWINCH): # the last one that it prepares for
                pass
            time.sleep(rng.random() * took)
            process.send_signal(how)
            out, error = process.communicate()
            self.assertIn(process.returncode, (0, 130) if how == signal.SIGINT else (0, -how), error)
            self.assertIn(self.names(), ([], ["out"]))
            self.assertTrue(process.returncode or self.names())
            self.assertNotIn("\033", error.decode())
            whole(out, self.folder / "out")
            ended += process.returncode != 0
        self.assertGreater(ended, self.TIMES // 10)

    def speaks(self, out, file):
        self.assertTrue(ANSWER.startswith(out.decode().rstrip("\n")), out)
        if file.exists():
            self.assertTrue(is_whole(file))
            self.assertLessEqual(0, read_tokens(file))

    def test_run(self):
        self.at_random((*ASK, "--save-kv", self.folder / "out"), self.speaks)
        if (self.folder / "out").exists():
            self.ok(*ASK, "--load-kv", self.folder / "out")

    def test_chat(self):
        command = ("chat", "--mtp", "--save-kv", self.folder / "out")
        self.at_random(command, self.speaks, f"{QUESTION}\n".encode())

    def test_logits(self):
        command = ("logits", "--ids", IDS, "--taps", "--out", self.folder / "out")
        self.ok(*command)
        expected = (self.folder / "out").read_bytes()
        self.at_random(command, lambda _, file: self.assertTrue(whole_or_none(file, expected)))

    def test_quantize(self):
        command = ("quantize", "-m", TINY, "-o", self.folder / "out", "--type", "q8_0")
        self.ok(*command)
        expected = (self.folder / "out").read_bytes()
        self.at_random(command, lambda _, file: self.assertTrue(whole_or_none(file, expected)))

    def test_twice(self):
        """The second Ctrl-C waits for nothing, not even for who does not read."""
        model = self.model()
        endless(model)
        reader, writer = os.pipe()
        os.write(writer, b"-" * fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096))
        command = [PROGRAM, *ASK, "-m", model, "--save-kv", self.folder / "out"]
        process = subprocess.Popen(command, env=ONE_THREAD, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        for _ in range(2):
            asleep, state = 0, pathlib.Path(f"/proc/{process.pid}/stat")
            while asleep < 5:                            # in a write into a pipe that is full
                time.sleep(0.05)
                asleep = asleep + 1 if state.read_text().split()[2] == "S" else 0
            self.assertIsNone(process.poll())
            process.send_signal(signal.SIGINT)
        error = process.communicate()[1].decode()
        os.close(reader)
        self.assertEqual((process.returncode, error), (130, "\ndeepseek: interrupted\n"))
        self.assertEqual(self.names(), [model.name])

    def test_a_pipe_that_breaks(self):
        """A chat whose reader goes keeps its cache."""
        process = start("chat", "--save-kv", self.folder / "out", stdin=subprocess.PIPE)
        process.stdout.close()
        process.stdin.write(f"{QUESTION}\n".encode())
        process.stdin.flush()
        process.wait()
        process.stdin.close()
        process.stderr.close()
        self.assertEqual(process.returncode, -signal.SIGPIPE)
        self.assertEqual(self.names(), ["out"])
        self.assertGreater(read_tokens(self.folder / "out"), 0)

    def test_no_figure_after_an_interruption(self):
        model = self.model()
        endless(model)
        (self.folder / "text").write_text("1 " * 20000)
        for command in (("perplexity", "-f", self.folder / "text"),
                        ("bench", "-p", "20000", "-n", "0", "-r", "1")):
            process = start(*command, "-m", model)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            out, error = process.communicate()
            self.assertEqual((process.returncode, out), (130, b""), error)

    def test_weights_that_are_cut_while_in_use(self):
        """One line from any thread, and no temporary file."""
        env = {k: v for k, v in os.environ.items() if k != "OMP_THREAD_LIMIT"}
        ids = ",".join(["7"] * 20000)
        for command in ((*ASK, "--save-kv", self.folder / "out"),
                        ("logits", "--ids", ids, "--out", self.folder / "out")):
            for _ in range(3):
                model = self.model()
                endless(model)
                process = start(*command, "-m", model, "--threads", "4", env=env)
                if command[0] == "run":
                    process.stdout.read(40)
                else:
                    stat = pathlib.Path(f"/proc/{process.pid}/stat")
                    while sum(map(int, stat.read_text().split()[13:15])) < 40:       # hundredths of a second
                        time.sleep(0.01)
                os.truncate(model / "model.safetensors", 4096)
                error = process.communicate()[1].decode()
                self.assertEqual(process.returncode, 1, error)
                self.assertRegex(error, r"\Adeepseek: a weight file [^\n]+\n\Z")
                self.assertEqual(self.names(), [model.name])
                shutil.rmtree(model)


if __name__ == "__main__":
    suite.main("everyday")
