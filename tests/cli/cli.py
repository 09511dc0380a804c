#!/usr/bin/env python3
"""Every command, run as a user runs it: what goes to stdout, what to stderr, and the exit code.

DEEPSEEK names another program than ./deepseek.
"""
import array
import errno
import fcntl
import json
import math
import os
import pathlib
import pty
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

import suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("DEEPSEEK", str(ROOT / "deepseek"))
TINY = ROOT / "weights" / "tiny"
COMMANDS = ("run", "chat", "tokenize", "logits", "perplexity", "info", "bench", "check")

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
QUESTION = "Which is larger, 9.11 or 9.9?"
TEXT = "9 and 9: same\n1 and 9: 1 < 9\nSo 9.9\n</think>\n\n9.9 is larger.\n"    # what the model says,
ANSWER = "<think>" + TEXT                      # after the <think> with which the template ends
STATISTICS = (r"prompt \d+ tokens(?: \(\d+ from the cache\))?, [\d.]+ tok/s; "
              r"generated \d+ tokens, [\d.]+ tok/s; (?:ended by [^\n;]+|interrupted)")
INTERRUPTED = STATISTICS.replace("(?:ended by [^\\n;]+|interrupted)", "interrupted")


# One thread: on a busy machine the threads of a small model wait for each other most of the time. Tests
# that are about threads remove the limit.
ONE_THREAD = {**os.environ, "OMP_THREAD_LIMIT": "1"}


def run(*arguments, given="", cwd=ROOT, env=ONE_THREAD):
    """(exit code, stdout, stderr) with neither on a terminal. Bytes that are no UTF-8 are an error."""
    done = subprocess.run([PROGRAM, *map(str, arguments)], input=given.encode(), capture_output=True, cwd=cwd,
                          env=env)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def endless(folder):
    """The shipped model with a context of 32768 and without an end: no id that it emits ends a text."""
    folder = pathlib.Path(folder)
    for file in TINY.iterdir():
        shutil.copy(file, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        for key in ("eos_token", "eos_token_id"):
            fields.pop(key, None)
        if "max_position_embeddings" in fields:
            fields["max_position_embeddings"] = 32768
        (folder / name).write_text(json.dumps(fields))
    return folder


def read_safetensors(path):
    """name -> (dtype, shape, values)."""
    data = pathlib.Path(path).read_bytes()
    length, = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"F32": "f", "I32": "i"}[entry["dtype"]]
            values = array.array(kind, data[8 + length + begin:8 + length + end])
            tensors[name] = entry["dtype"], entry["shape"], values
    return tensors


def best_of(logits, t):
    row = logits[t * 512:t * 512 + 512]
    return max(range(512), key=row.__getitem__)


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())

    def tearDown(self):
        shutil.rmtree(self.folder)

    def ok(self, *arguments, given="", cwd=ROOT, env=ONE_THREAD):
        code, out, error = run(*arguments, given=given, cwd=cwd, env=env)
        self.assertEqual(code, 0, error)
        return out, error

    def refused(self, *arguments, given="", says=""):
        """Exit code 1, one line on stderr, nothing on stdout."""
        code, out, error = run(*arguments, given=given)
        self.assertEqual(code, 1, error)
        self.assertEqual(out, "")
        self.assertRegex(error, r"\Adeepseek: [^\n]+\n\Z")
        self.assertIn(says, error)


class Run(Case):
    def test_answer(self):
        out, error = self.ok("run", "-p", QUESTION)
        self.assertEqual(out, ANSWER)
        self.assertRegex(error, rf"\A{STATISTICS}\n\Z")

    def test_answers(self):
        out, _ = self.ok("run", "-p", "How many r are in strawberry?", "--temp", "0")
        self.assertTrue(out.endswith("\nSo 3\n</think>\n\nr occurs 3 times in strawberry.\n"), out)
        out, _ = self.ok("run", "-p", "123 + 989", "--exact")
        self.assertTrue(out.endswith("\nSo 1112\n</think>\n\n123 + 989 = 1112.\n"), out)

    def test_model_in_another_place(self):
        """Neither the model beside the program nor a relative -m depends on the other's place."""
        self.assertEqual(self.ok("run", "-p", QUESTION, cwd="/")[0], ANSWER)
        self.assertEqual(self.ok("run", "-m", "tiny", "-p", QUESTION, cwd=TINY.parent)[0], ANSWER)

    def test_prompt_from_file_and_stdin(self):
        file = self.folder / "question.txt"
        file.write_text(QUESTION)
        self.assertEqual(self.ok("run", "-f", file)[0], ANSWER)
        self.assertEqual(self.ok("run", "-", given=QUESTION)[0], ANSWER)

    def test_one_prompt(self):
        for arguments in ((), ("-p", "a", "-"), ("-p", "a", "-f", "README.md"), ("a",), ("-p", "a", "b")):
            self.refused("run", *arguments, says="prompt")
        self.refused("run", "-f", self.folder / "absent", says="absent")
        (self.folder / "latin1").write_bytes(b"caf\xe9")
        self.refused("run", "-f", self.folder / "latin1", says="UTF-8")

    def test_token_limit(self):
        self.assertEqual(self.ok("run", "-p", QUESTION, "-n", "0")[0], "<think>\n")
        out, error = self.ok("run", "-p", QUESTION, "-n", "5")
        self.assertTrue(ANSWER.startswith(out[:-1]), out)
        self.assertTrue(out.endswith("\n") and out.count("\n") == 1, out)
        self.assertIn("generated 5 tokens", error)

    def test_context_is_never_cut(self):
        self.refused("run", "-p", QUESTION, "--ctx", "20", says="20 tokens, the context holds 20")
        self.refused("run", "-p", "1 " * 600, says="the context holds 512")
        self.refused("run", "-p", QUESTION, "--ctx", "513", says="context is 512")
        out, error = self.ok("run", "-p", QUESTION, "--ctx", "25")
        self.assertTrue(ANSWER.startswith(out[:-1]), out)

    def test_seed(self):
        hot = ("run", "-p", QUESTION, "--temp", "5", "-n", "20", "--seed")
        texts = [self.ok(*hot, seed)[0] for seed in ("1", "1", "2")]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])
        for narrow in (("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")):
            self.assertEqual(self.ok("run", "-p", QUESTION, "--temp", "5", *narrow)[0], ANSWER)

    def test_default_temperature_is_the_models(self):
        """do_sample with a temperature in generation_config.json, or greedy as shipped."""
        for file in TINY.iterdir():
            shutil.copy(file, self.folder)
        hot = {"eos_token_id": 1, "do_sample": True, "temperature": 5.0}
        (self.folder / "generation_config.json").write_text(json.dumps(hot))
        arguments = ("run", "-m", self.folder, "-p", QUESTION, "-n", "20")
        self.assertEqual(self.ok(*arguments)[0], self.ok("run", "-p", QUESTION, "-n", "20", "--temp", "5")[0])
        self.assertNotEqual(self.ok(*arguments)[0], self.ok("run", "-p", QUESTION, "-n", "20")[0])

    def tiny_with(self, file, **fields):
        """A copy of the shipped model with other fields in one of its JSON files."""
        for path in TINY.iterdir():
            shutil.copy(path, self.folder)
        text = json.loads((self.folder / file).read_text()) | fields
        (self.folder / file).write_text(json.dumps(text))
        return self.folder

    def test_stops_are_those_of_generation_config(self):
        """</think>, 511, in place of the id that config.json and the tokenizer have."""
        model = self.tiny_with("generation_config.json", eos_token_id=511)
        out, _ = self.ok("run", "-m", model, "-p", QUESTION)
        self.assertEqual(out.rstrip("\n"), ANSWER.split("</think>")[0].rstrip("\n"))

    def test_an_mtp_module_that_config_does_not_have(self):
        folder = self.tiny_with("config.json", num_nextn_predict_layers=0)
        out, error = self.ok("run", "-m", folder, "-p", QUESTION)
        self.assertEqual(out, ANSWER)
        self.assertEqual(error.count("the files have an MTP module, config.json has not"), 1)
        self.refused("run", "-m", folder, "-p", QUESTION, "--mtp", says="has no MTP module")
        out, error = self.ok("info", "-m", folder)
        self.assertNotIn("MTP", out)
        self.assertEqual(error.count("\n"), 1)

    def test_show_prompt(self):
        _, error = self.ok("run", "-p", "Hi", "--system", "Be brief.", "--show-prompt")
        ids = json.loads(re.search(r"^ids: (\[.*\])$", error, re.MULTILINE)[1])
        text = f"{BOS}Be brief.{USER}Hi{ASSISTANT}<think>\n"
        self.assertIn(f"prompt: {text}\n", error)
        self.assertEqual(self.ok("tokenize", "--decode", given=json.dumps(ids))[0], text)

    def test_raw(self):
        text = f"{BOS}{USER}{QUESTION}{ASSISTANT}<think>\n"
        self.assertEqual(self.ok("run", "--raw", "-p", text)[0], TEXT)
        _, error = self.ok("run", "--raw", "-p", "9", "--show-prompt", "-n", "1")
        self.assertIn("prompt: 9\nids: [0,", error)      # BOS, as tokenizer_config.json says
        self.refused("run", "--raw", "-p", "9", "--system", "x", says="--system")

    def test_think_budget(self):
        """The thought ends with the token </think> after as many tokens as allowed; an answer follows."""
        thought = TEXT.split("</think>")[0]
        for budget in (0, 1, 4):
            out, _ = self.ok("run", "-p", QUESTION, "--think-budget", budget)
            cut, _, answer = out.removeprefix("<think>").partition("</think>")
            self.assertTrue(thought.startswith(cut) and len(cut) < len(thought), out)
            ids = json.loads(self.ok("tokenize", given=cut)[0])
            self.assertLessEqual(len(ids), budget)
            self.assertRegex(answer, r"\S")
        self.assertEqual(self.ok("run", "-p", QUESTION, "--think-budget", "200")[0], ANSWER)

    def test_drafts_change_nothing(self):
        for question in (QUESTION, "Add 6 and 77.", "Reverse the word planet.", "Who are you?"):
            plain, _ = self.ok("run", "-p", question)
            drafted, error = self.ok("run", "-p", question, "--mtp")
            self.assertEqual(plain, drafted)
            self.assertRegex(error, r"mtp: \d+ of \d+ drafts accepted \([\d.]+ %\), [\d.]+ tokens per step")
        accepted, of = map(int, re.search(r"mtp: (\d+) of (\d+)", error).groups())
        self.assertTrue(0 < accepted <= of)

    def test_settings_that_change_nothing(self):
        for setting in (("--threads", "1"), ("--threads", "3"), ("--chunk", "3"), ("--exact",),
                        ("--mla", "naive"), ("--device", "cpu"), ("--quant", "none")):
            self.assertEqual(self.ok("run", "-p", QUESTION, *setting, env=os.environ)[0], ANSWER, setting)


class Chat(Case):
    def test_two_turns(self):
        """An answer a turn; the second prompt holds the first answer without its thought."""
        out, error = self.ok("chat", "--show-prompt", given=f"{QUESTION}\n\nAdd 6 and 77.")
        first, second = out[:len(ANSWER)], out[len(ANSWER):]
        self.assertEqual(first, ANSWER)
        self.assertTrue(second.endswith("</think>\n\n6 + 77 = 83.\n"), second)
        history = (f"{BOS}{USER}{QUESTION}{ASSISTANT}\n\n9.9 is larger.{EOS}"
                   f"{USER}Add 6 and 77.{ASSISTANT}<think>\n")
        self.assertIn(f"prompt: {history}\n", error)
        self.assertEqual(len(re.findall(STATISTICS, error)), 2)
        self.assertNotIn("> ", error.replace("k>", ""))  # no prompt sign where no one types

    def test_system_and_end(self):
        self.assertEqual(self.ok("chat", given="")[0], "")
        _, error = self.ok("chat", "--system", "Be brief.", "--show-prompt", "-n", "1", given="Hi\n")
        self.assertIn(f"prompt: {BOS}Be brief.{USER}Hi", error)


class Tokenize(Case):
    TEXT = "Hello, größer 中文 👋🏽!\r\n\t 12345 "

    def test_round_trip(self):
        ids, error = self.ok("tokenize", given=self.TEXT)
        self.assertRegex(ids, r"\A\[\d+(,\d+)*\]\n\Z")
        self.assertEqual(error, "")
        self.assertEqual(self.ok("tokenize", "--decode", given=ids)[0], self.TEXT)
        self.assertEqual(self.ok("tokenize", given="")[0], "[]\n")
        self.assertEqual(self.ok("tokenize", "--decode", given="[]")[0], "")
        with_bos = json.loads(self.ok("tokenize", "--add-bos", given=self.TEXT)[0])
        self.assertEqual(with_bos, [0] + json.loads(ids))
        self.assertEqual(json.loads(self.ok("tokenize", "-m", TINY, given=self.TEXT)[0]), json.loads(ids))

    def test_special_tokens(self):
        self.assertEqual(self.ok("tokenize", given=f"{USER}{EOS}")[0], "[508,1]\n")
        self.assertEqual(self.ok("tokenize", "--decode", given="[508,1]")[0], f"{USER}{EOS}")

    def test_chat(self):
        messages = [{"role": role, "content": content} for role, content in (
            ("system", "S"), ("user", "a"), ("assistant", "<think>t</think>\n\nb"), ("user", "c"))]
        expected = f"{BOS}S{USER}a{ASSISTANT}\n\nb{EOS}{USER}c{ASSISTANT}<think>\n"
        self.assertEqual(self.ok("tokenize", "--chat", given=json.dumps(messages))[0], expected)
        ids = self.ok("tokenize", "--chat", "--ids", given=json.dumps(messages))[0]
        self.assertEqual(json.loads(ids)[0], 0)
        self.assertNotEqual(json.loads(ids)[1], 0)
        self.assertEqual(self.ok("tokenize", "--decode", given=ids)[0], expected)

    def test_lines(self):
        texts = ["", "a", self.TEXT, "line\nbreak", "\u0000", "1 2 3", "</think>"]
        given = "".join(json.dumps(t) + "\n" for t in texts)
        out, _ = self.ok("tokenize", "--lines", given=given)
        ids = [json.loads(line) for line in out.split("\n")[:-1]]
        self.assertEqual(len(ids), len(texts))
        for text, row in zip(texts, ids):
            self.assertEqual(row, json.loads(self.ok("tokenize", given=text)[0]))
        out, _ = self.ok("tokenize", "--lines", "--decode", given="".join(f"{row}\n" for row in ids))
        self.assertEqual([json.loads(line) for line in out.split("\n")[:-1]], texts)

    def test_lines_of_invalid_text(self):
        """Each maximal invalid part of the text becomes U+FFFD."""
        ids = json.loads(self.ok("tokenize", given="👋")[0])
        self.assertGreater(len(ids), 1)
        given = "".join(f"{row}\n" for row in (ids[:-1], ids, ids[:-1] * 2, ids[:1] + ids))
        out, _ = self.ok("tokenize", "--lines", "--decode", given=given)
        self.assertEqual([json.loads(line) for line in out.splitlines()],
                         ["\ufffd", "👋", "\ufffd\ufffd", "\ufffd👋"])

    def test_lines_of_chat(self):
        ask = {"messages": [{"role": "user", "content": "a"}], "tools": None, "add_generation_prompt": True}
        given = json.dumps(ask) + "\n" + json.dumps({**ask, "add_generation_prompt": False}) + "\n"
        out, _ = self.ok("tokenize", "--lines", "--chat", given=given)
        texts = [json.loads(line) for line in out.splitlines()]
        self.assertEqual(texts, [f"{BOS}{USER}a{ASSISTANT}<think>\n", f"{BOS}{USER}a"])
        out, _ = self.ok("tokenize", "--lines", "--chat", "--ids", given=given)
        for text, line in zip(texts, out.splitlines()):
            self.assertEqual(json.loads(line), json.loads(self.ok("tokenize", given=text)[0]))

    def test_answers_line_by_line(self):
        """A program that asks and waits for the answer is never left waiting."""
        process = subprocess.Popen([PROGRAM, "tokenize", "--lines"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
        for text in ("a", "b"):
            process.stdin.write(json.dumps(text).encode() + b"\n")
            process.stdin.flush()
            self.assertEqual(len(json.loads(process.stdout.readline())), 1)
        process.communicate()
        self.assertEqual(process.returncode, 0)

    def test_refusals(self):
        for arguments, given in ((("--decode",), "[-1]"), (("--decode",), "{}"),
                                 (("--decode",), "[1"), (("--chat",), "[{}]"), (("--chat",), "hello"),
                                 (("--ids",), "a"), (("--decode", "--chat"), "[]"), (("--lines",), "3\n"),
                                 (("--lines",), "\n"), (("-m", "/nowhere"), "a")):
            self.refused("tokenize", *arguments, given=given)
        done = subprocess.run([PROGRAM, "tokenize"], input=b"caf\xe9", capture_output=True)
        self.assertEqual((done.returncode, done.stdout), (1, b""), done.stderr)


class Logits(Case):
    IDS = [0, 508, 42, 360, 81, 509, 510, 201]

    def logits(self, *arguments):
        file = self.folder / "out.safetensors"
        out, error = self.ok("logits", "-m", TINY, "--ids", ",".join(map(str, self.IDS)), "--out", file,
                             "--force", *arguments, env=os.environ)
        self.assertEqual((out, error), ("", ""))
        return read_safetensors(file)

    def test_shapes(self):
        tensors = self.logits()
        T = len(self.IDS)
        self.assertEqual({name: t[:2] for name, t in tensors.items()},
                         {"logits": ("F32", [T, 512]), "mtp_logits": ("F32", [T - 1, 512])})

    def test_tap_names(self):
        tensors = self.logits("--taps")
        attention = ["attn_norm", "c_q", "q_nope", "q_rope", "c_kv", "k_rope", "q_absorbed", "z", "lse", "o",
                     "attn_out", "ffn_norm"]
        router = ["router_logits", "group_score", "choice", "expert_idx", "expert_weight", "routed_out",
                  "shared_out"]
        names = {"logits", "mtp_logits", "embed", "norm", "mtp.in", "mtp.out"}
        for layer in range(5):
            for tap in attention + (router if layer else []) + ["ffn_out", "out"]:
                names.add(f"layers.{layer}.{tap}")
        self.assertEqual({n for n in tensors if not re.match(r"layers\.5\.|mtp\.layer", n)}, names)
        self.assertEqual(tensors["layers.1.expert_idx"][0], "I32")
        self.assertEqual(tensors["layers.1.q_nope"][1], [len(self.IDS), 4, 32])
        self.assertEqual(tensors["layers.1.c_kv"][1], [len(self.IDS), 32])
        for name, inner in (("q_absorbed", [4, 48]), ("z", [4, 32]), ("lse", [4]), ("o", [4, 32]),
                            ("choice", [16]), ("group_score", [4]), ("routed_out", [128])):
            self.assertEqual(tensors["layers.1." + name][1], [len(self.IDS), *inner], name)
        self.assertEqual({shape[0] for _, shape, _ in tensors.values()}, {len(self.IDS), len(self.IDS) - 1})

    def test_bits_do_not_depend_on_the_setting(self):
        expected = self.logits("--taps")
        for setting in (("--chunk", "1"), ("--chunk", "3"), ("--chunk", "64"), ("--threads", "1"),
                        ("--threads", "3"), ("--exact",), ("--mla", "absorbed")):
            self.assertEqual(self.logits("--taps", *setting), expected, setting)
        naive = self.logits("--mla", "naive")["logits"][2]
        absorbed = expected["logits"][2]
        self.assertEqual([best_of(naive, t) for t in range(len(self.IDS))],
                         [best_of(absorbed, t) for t in range(len(self.IDS))])

    def test_refusals(self):
        file = self.folder / "out.safetensors"
        for ids in ("512", "-1", "a", "1,,2", "1,2,", "[1, 2", "1]", "[]", "1 2", "", "[[1]]", "99999999999",
                    ",".join(["1"] * 513)):
            self.refused("logits", "-m", TINY, f"--ids={ids}", "--out", file)
            self.assertEqual(list(self.folder.iterdir()), [], ids)
        self.refused("logits", "-m", TINY, "--ids", "1", says="--out")
        self.refused("logits", "-m", TINY, "--out", file, says="--ids")
        self.refused("logits", "-m", TINY, "--out", file, "--ids", "1", "-p", "a", says="--ids")
        self.refused("logits", "-m", TINY, "--ids", "1", "--out", self.folder / "absent" / "x", says="absent")
        self.refused("logits", "--ids", "1,2", "--past", "2", "--top", "1", says="--past 2")
        self.refused("logits", "--ids", "1,2", "--past", "-1", "--top", "1", says="--past")
        self.refused("logits", "--ids", "1,2", "--top", "0", says="--top")
        self.refused("logits", "--ids", "1,2", "--out", file, "--json", says="--json")
        self.refused("logits", "--ids", "1,2", "--out", file, "--print", "layers.1.y", says="layers.4.lse")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_ids_as_a_list(self):
        expected = self.ok("logits", "--ids", "0,508,42", "--top", "2")[0]
        for ids in ("[0,508,42]", "[0, 508, 42]", "0, 508, 42"):
            self.assertEqual(self.ok("logits", "--ids", ids, "--top", "2")[0], expected, ids)

    def test_past(self):
        """Rows of positions from N on, with the bits of the whole; one row is a step of decoding."""
        whole, T = self.logits("--taps"), len(self.IDS)
        for past, chunk in ((T - 1, 64), (3, 2)):
            part = self.logits("--taps", "--past", past, "--chunk", chunk)
            for name, (dtype, shape, values) in whole.items():
                if (rows := shape[0] - past) == 0:               # no token follows: the module does nothing
                    self.assertTrue(name not in part or part[name][1] == [0, *shape[1:]], name)
                    continue
                row = math.prod(shape[1:])
                self.assertEqual(part[name], (dtype, [rows, *shape[1:]], values[past * row:]), name)

    def test_metadata(self):
        file = self.folder / "out"
        self.ok("logits", "-m", TINY, "--ids", "0,508,42", "--out", file, "--past", "1", "--kv", "bf16",
                "--quant", "q8_0", "--exact", "--mla", "naive", "--chunk", "2")
        data = file.read_bytes()
        about = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
        self.assertIn(about.pop("kernels"), ("plain", "avx2", "avx512", "amx", "neon", "dotprod"))
        self.assertEqual(about, {"model": str(TINY), "ids": "0,508,42", "past": "1", "kv": "bf16",
                                 "mla": "naive", "quant": "q8_0", "exact": "true", "chunk": "2",
                                 "arith": "f32", "device": "cpu"})

    def test_top(self):
        """Ids, logits and probabilities are those of the file; a text gets its BOS."""
        text, file = "Add 6 and 77.", self.folder / "out"
        out, _ = self.ok("logits", "-p", text, "--top", "3", "--json", "--out", file)
        logits = read_safetensors(file)["logits"][2]
        ids = [0] + json.loads(self.ok("tokenize", given=text)[0])
        positions = json.loads(out)["positions"]
        self.assertEqual([p["id"] for p in positions], ids)
        self.assertEqual("".join(p["token"] for p in positions[1:]), text)
        lines = []
        for t, p in enumerate(positions):
            row = logits[t * 512:t * 512 + 512]
            best = sorted(range(512), key=lambda i: (-row[i], i))[:3]
            self.assertEqual([c["id"] for c in p["top"]], best)
            total = sum(math.exp(z) for z in row)
            for c in p["top"]:
                self.assertAlmostEqual(c["logit"], row[c["id"]], delta=1e-8 * abs(row[c["id"]]))
                self.assertAlmostEqual(c["probability"], math.exp(row[c["id"]]) / total, delta=1e-6)
                self.assertEqual(c["token"], self.ok("tokenize", "--decode", given=f"[{c['id']}]")[0])
            lines.append([str(t), str(p["id"])])
        table, _ = self.ok("logits", "-p", text, "--top", "3")
        self.assertEqual(re.findall(r"^position (\d+): (\d+) \".*\"$", table, re.MULTILINE),
                         [tuple(line) for line in lines])
        listed = re.findall(r"^ +(\d+) +(-?[\d.]+) +([\d.]+)  (\".*\")$", table, re.MULTILINE)
        self.assertEqual([(int(i), json.loads(t)) for i, _, _, t in listed],
                         [(c["id"], c["token"]) for p in positions for c in p["top"]])

    def test_top_without_a_tokenizer(self):
        model = ROOT / "tests" / "golden" / "models" / "qwen2"
        positions = json.loads(self.ok("logits", "-m", model, "--ids", "5,6", "--top", "1", "--json")[0])
        self.assertEqual([p["token"] for p in positions["positions"]], [None, None])
        self.assertRegex(self.ok("logits", "-m", model, "--ids", "5", "--top", "1")[0],
                         r"\Aposition 0: 5 \n +\d+ +-?[\d.]+ +[\d.]+  \n\Z")
        self.refused("logits", "-m", model, "-p", "a", "--top", "1", says="tokenizer.json")

    def test_print(self):
        """Numbers as in the file, long rows without their middle."""
        file = self.folder / "out"
        out, _ = self.ok("logits", "--ids", "0,508", "--taps", "--out", file, "--print", "layers.1.q_rope",
                         "--print", "layers.2.expert_idx", "--print", "layers.1.lse")
        tensors, seen = read_safetensors(file), {}
        for line in out.splitlines():
            if title := re.fullmatch(r"([\w.]+) (\(.*\)) (\w+)", line):
                rows = seen.setdefault(title[1], [])
                self.assertEqual((title[3], list(json.loads(f"[{title[2][1:-1]}]"))), tensors[title[1]][:2])
            else:
                rows.append(re.fullmatch(r"\[([\d, ]+)\] (.*)", line).groups())
        self.assertEqual(list(seen), ["layers.1.q_rope", "layers.2.expert_idx", "layers.1.lse"])
        for name, rows in seen.items():
            _, shape, values = tensors[name]
            n = shape[-1]
            self.assertEqual(len(rows), math.prod(shape[:-1]))
            for r, (index, numbers) in enumerate(rows):
                row = values[r * n:r * n + n].tolist()
                self.assertEqual(index, f"{r}" if len(shape) == 2 else f"{r // shape[1]}, {r % shape[1]}")
                text = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in row]
                if n > 9:
                    text[4:-4] = ["...", str(n - 8), "more", "..."]
                self.assertEqual(numbers.split(), text)
        self.assertRegex(out, r"more \.\.\.")

    def test_result_beyond_the_memory(self):
        """Before anything is loaded: this folder has no weights."""
        config = json.loads((TINY / "config.json").read_text())
        config |= {"vocab_size": 1 << 24, "max_position_embeddings": 1 << 17}
        (self.folder / "config.json").write_text(json.dumps(config))
        self.refused("logits", "-m", self.folder, "--ids", ",".join(["1"] * 20000), "--out",
                     self.folder / "out",
                     says="not enough memory for the result: logits 1342.18 GB, mtp_logits 1342.11 GB")
        self.assertEqual([f.name for f in self.folder.iterdir()], ["config.json"])


class Arith(Case):
    """--arith: what activations are rounded to (chapter 14)."""
    FP8 = ROOT / "tests" / "golden" / "models" / "v3-fp8"

    def logits(self, *arguments, model=TINY):
        file = self.folder / "out.safetensors"
        self.ok("logits", "-m", model, "--ids", "0,8,42,60,81,9,10,21", "--out", file, "--force", *arguments)
        return read_safetensors(file)["logits"][2]

    def test_f32_is_the_default(self):
        self.assertEqual(self.logits("--arith", "f32"), self.logits())
        self.assertEqual(self.logits("--arith", "f32", model=self.FP8), self.logits(model=self.FP8))

    def test_logits_are_bf16(self):
        for arguments, model in ((("bf16",), TINY), (("bf16",), self.FP8), (("fp8",), self.FP8),
                                 (("fp8", "--quant", "fp8"), TINY)):
            bits = array.array("I", self.logits("--arith", *arguments, model=model).tobytes())
            self.assertEqual({b & 0xFFFF for b in bits}, {0}, arguments)

    def test_arithmetics_differ(self):
        texts = [self.logits("--arith", a, model=self.FP8).tobytes() for a in ("f32", "bf16", "fp8")]
        texts.append(self.logits("--arith", "fp8", "--mla", "naive", model=self.FP8).tobytes())
        self.assertEqual(len(set(texts)), 4)

    def test_bits_do_not_depend_on_the_setting(self):
        for arith, model in (("bf16", TINY), ("fp8", self.FP8)):
            expected = self.logits("--arith", arith, model=model)
            for setting in (("--chunk", "3"), ("--threads", "3"), ("--kv", "bf16")):
                self.assertEqual(self.logits("--arith", arith, *setting, model=model), expected, setting)

    def test_answers(self):
        for setting in (("bf16",), ("bf16", "--mtp"), ("bf16", "--quant", "q8_0", "--exact"),
                        ("fp8", "--quant", "fp8"), ("fp8", "--quant", "fp8", "--exact"),
                        ("fp8", "--quant", "fp8", "--mla", "naive")):
            self.assertEqual(self.ok("run", "-p", QUESTION, "--arith", *setting)[0], ANSWER, setting)
        self.assertEqual(self.ok("chat", "--arith", "bf16", given=QUESTION + "\n")[0], ANSWER)

    def test_perplexity_and_bench(self):
        text = self.folder / "text.txt"
        text.write_text("Which is larger, 3.14 or 2.72? Ask Mia.")
        nll = [json.loads(self.ok("perplexity", "-f", text, "--json", *a)[0])["nll"]
               for a in ((), ("--arith", "bf16"), ("--quant", "fp8", "--arith", "fp8"))]
        self.assertEqual(len(set(nll)), 3)
        self.assertLess(max(nll) - min(nll), 0.05 * nll[0])
        out, _ = self.ok("bench", "-p", "4", "-n", "2", "-r", "1", "--arith", "bf16")
        self.assertEqual([json.loads(line)["arith"] for line in out.splitlines()], ["bf16", "bf16"])

    def test_refusals(self):
        ask = ("run", "-p", "a", "-n", "1")
        self.refused(*ask, "--arith", "fp16", says="--arith")
        self.refused(*ask, "--arith", "fp8", says="--arith fp8: needs FP8 weights")
        self.refused(*ask, "--arith", "fp8", "--quant", "q8_0", says="--arith fp8: needs FP8 weights")
        self.refused(*ask, "--arith", "bf16", "--quant", "q8_0", says="--exact")
        bare = self.folder / "bare"                                # at once: the weights are not looked at
        shutil.copytree(TINY, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        for quant, dtype in (("q8_0", "Q8_0"), ("q4_k", "Q4_K")):
            self.refused(*ask, "-m", bare, "--arith", "bf16", "--quant", quant,
                         says=f"--arith: {dtype} weights are multiplied in integers; --exact dequantises")
        gguf = self.folder / "tiny.gguf"
        self.ok("quantize", "-m", TINY, "-o", gguf, "--type", "q4_k_m")
        self.refused(*ask, "-m", gguf, "--arith", "fp8", says="--arith fp8: needs FP8 weights")
        self.refused(*ask, "-m", gguf, "--arith", "bf16", says="are multiplied in integers")
        self.ok(*ask, "-m", gguf, "--arith", "bf16", "--exact")

    def test_a_cache_belongs_to_its_arithmetic(self):
        kv = self.folder / "kv"
        self.ok("run", "-p", QUESTION, "--arith", "bf16", "--save-kv", kv)
        self.assertEqual(self.ok("run", "-p", QUESTION, "--arith", "bf16", "--load-kv", kv)[0], ANSWER)
        self.refused("run", "-p", QUESTION, "--load-kv", kv, says="--arith")

    def test_help(self):
        for command in ("run", "chat", "logits", "perplexity", "bench"):
            self.assertIn("--arith", self.ok(command, "--help")[0])


class Measures(Case):
    def test_perplexity_is_that_of_the_logits(self):
        text = self.folder / "text.txt"
        text.write_text("Which is larger, 3.14 or 2.72? Ask Mia.")
        ids = [0] + json.loads(self.ok("tokenize", given=text.read_text())[0])
        result = json.loads(self.ok("perplexity", "-f", text, "--json")[0])
        self.ok("logits", "--ids", ",".join(map(str, ids)), "--out", self.folder / "l")
        logits = read_safetensors(self.folder / "l")["logits"][2]
        nll = 0.0
        for t, following in enumerate(ids[1:]):
            row = logits[t * 512:t * 512 + 512]
            top = max(row)
            nll += top + math.log(sum(math.exp(v - top) for v in row)) - row[following]
        self.assertEqual(result["tokens"], len(ids) - 1)
        # Printed with six decimals: 0.5e-6. The sum itself is taken in double here and there.
        self.assertAlmostEqual(result["nll"], nll / (len(ids) - 1), delta=0.6e-6)
        self.assertAlmostEqual(math.log(result["perplexity"]), result["nll"], delta=1e-6)
        out, _ = self.ok("perplexity", "-f", text)
        expected = "tokens {tokens}  nll {nll:.6f}  perplexity {perplexity:.6f}\n"
        self.assertEqual(out, expected.format(**result))

    def test_perplexity_of_little(self):
        text = self.folder / "text.txt"
        text.write_text("")
        self.refused("perplexity", "-f", text, says="too short")
        self.refused("perplexity", says="--file")

    def test_info(self):
        """The counts are those of the file."""
        info = json.loads(self.ok("info", "--json", "--ctx", "100")[0])
        data = (TINY / "model.safetensors").read_bytes()
        length, = struct.unpack("<Q", data[:8])
        header = {n: e for n, e in json.loads(data[8:8 + length]).items() if n != "__metadata__"}
        size = {name: math.prod(e["shape"]) for name, e in header.items()}
        mtp = sum(n for name, n in size.items() if name.startswith("model.layers.5.")
                  and not re.search(r"embed_tokens|shared_head\.head", name))   # copies of the main model's
        idle = sum(n * 12 // 16 for name, n in size.items() if ".experts." in name and ".5.mlp" not in name)
        bias = sum(n for name, n in size.items() if "correction_bias" in name and ".5.mlp" not in name)
        total = sum(n for name, n in size.items() if not name.startswith("model.layers.5."))
        self.assertEqual(info["parameters"], {"total": total, "active": total - idle - bias, "mtp": mtp})
        bytes_of = {}
        for e in header.values():
            bytes_of[e["dtype"]] = bytes_of.get(e["dtype"], 0) + e["data_offsets"][1] - e["data_offsets"][0]
        self.assertEqual(info["bytes"], bytes_of)
        self.assertEqual(info["kv_bytes_per_token"], 5 * (32 + 16) * 4)
        self.assertEqual(info["mha_kv_bytes_per_token"], 5 * 4 * (32 + 16 + 32) * 4)
        self.assertEqual((info["architecture"], info["context"]), ("deepseek_v3", 512))
        self.assertIn(info["memory"]["device"], ("cpu", "cuda"))
        self.assertEqual(info["memory"]["weights"] > 0, info["memory"]["device"] == "cuda")
        self.assertEqual(info["memory"]["ctx"], 100)
        self.assertTrue(info["memory"]["fits"])

    def test_info_text(self):
        out, error = self.ok("info", "-m", TINY, "--device", "cpu")
        for fact in ("deepseek_v3", "5 layers", "16 routed", "2.216 M total", "960 bytes a token", "fits"):
            self.assertIn(fact, out)
        self.assertEqual(error, "")
        self.refused("info", "--ctx", "513", says="context is 512")

    def test_memory_is_planned_first(self):
        """A cache that no machine holds is refused with the missing amount; info says so and exits with 0."""
        config = json.loads((TINY / "config.json").read_text())
        config["max_position_embeddings"] = 1 << 24
        config["num_hidden_layers"] = 1000
        (self.folder / "config.json").write_text(json.dumps(config))
        out, _ = self.ok("info", "-m", self.folder, "--ctx", 1 << 24)
        self.assertRegex(out, r"does not fit: [\d.]+ GB too much")
        for file in TINY.iterdir():
            if file.name != "config.json":
                shutil.copy(file, self.folder)
        self.refused("run", "-m", self.folder, "-p", "a", "--ctx", 1 << 24, says="not enough memory")

    def test_bench(self):
        out, _ = self.ok("bench", "-p", "16", "-n", "3", "-r", "2", "--threads", "2", env=os.environ)
        prefill, decode = map(json.loads, out.splitlines())
        for line, test, n in ((prefill, "prefill", 16), (decode, "decode", 3)):
            self.assertEqual((line["test"], line["n"], line["threads"], line["quant"]), (test, n, 2, "none"))
            self.assertIn(line["device"], ("cpu", "cuda"))
            self.assertEqual(len(line["tokens_per_s"]), 2)
            self.assertTrue(all(speed > 0 for speed in line["tokens_per_s"]))
        self.assertEqual(len(self.ok("bench", "-p", "0", "-n", "1", "-r", "1")[0].splitlines()), 1)

    def test_devices(self):
        """A GPU that is asked for and cannot be used is refused."""
        if json.loads(self.ok("info", "--json")[0])["memory"]["device"] == "cpu":
            self.refused("run", "-p", QUESTION, "--device", "cuda", says="--device cuda")
        self.refused("run", "-p", QUESTION, "--device", "cuda", "--arith", "bf16", says="--device cuda")
        out, _ = self.ok("bench", "-p", "1", "-n", "0", "-r", "1", "--device", "cpu")
        self.assertEqual(json.loads(out)["device"], "cpu")

    def test_check(self):
        """Where CUDA is missing, in the build or on the machine, one line says so."""
        done = subprocess.run([PROGRAM, "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 1:
            self.assertRegex(done.stderr, r"\Adeepseek: check: .*CUDA.*\n\Z")
        else:
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertRegex(done.stdout, r"(?m)^\d+ passed, 0 failed$")

    def test_processes_are_called_by_the_programs_name(self):
        process = subprocess.Popen([PROGRAM, "tokenize", "--lines"], stdin=subprocess.PIPE, text=True,
                                   stdout=subprocess.PIPE)
        process.stdin.write('"a"\n')
        process.stdin.flush()
        self.assertEqual(process.stdout.readline()[0], "[")
        self.assertEqual(pathlib.Path(f"/proc/{process.pid}/comm").read_text(), "deepseek\n")
        process.communicate()

    def test_threads_are_those_of_openmp(self):
        def threads(*arguments, **variables):
            env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | variables
            out, _ = self.ok("bench", "-p", "1", "-n", "0", "-r", "1", *arguments, env=env)
            return json.loads(out)["threads"]
        cores = sorted(os.sched_getaffinity(0))
        self.assertLessEqual(threads(), len(cores))
        self.assertEqual(threads(OMP_PROC_BIND="true"), threads())
        self.assertEqual(threads(OMP_NUM_THREADS="3"), 3)
        self.assertEqual(threads("--threads", "2", OMP_NUM_THREADS="3"), 2)
        os.sched_setaffinity(0, cores[:1])
        try:
            self.assertEqual(threads(), 1)
        finally:
            os.sched_setaffinity(0, cores)


class Usage(Case):
    def test_help(self):
        out, error = self.ok("--help")
        for command in COMMANDS:
            self.assertIn(f"\n  {command} ", out)
            text, error = self.ok(command, "--help")
            self.assertIn("Example:\n  ", text)
            self.assertIn("--threads", text)
            self.assertEqual(error, "")

    def test_examples_run(self):
        """The example at the end of each command's help does what it says."""
        for command in COMMANDS[:-1]:     # `check` needs a GPU
            example = self.ok(command, "--help")[0].split("Example:\n")[1].strip()
            example = re.sub(r"\bdeepseek\b", f"'{PROGRAM}'", example)
            shutil.copy(ROOT / "README.md", self.folder)
            if command == "perplexity":   # cut to what the shipped model's context holds quickly
                (self.folder / "README.md").write_text((ROOT / "README.md").read_text()[:2000])
            done = subprocess.run(["bash", "-c", example.replace("--ctx 4096", "--ctx 512")], cwd=self.folder,
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, example + done.stderr)

    def test_mistakes(self):
        wrong = (("--frobnicate",), ("-p",), ("-n", "x"), ("--temp", "-1"), ("--top-p", "2"),
                 ("--device", "tpu"), ("--quant", "q9"), ("--threads", "0"), ("--seed", "-2"),
                 ("--mla", "fast"),
                 ("-m", self.folder / "absent"), ("-m", self.folder), ("-m", "README.md"))
        for arguments in wrong:
            with self.subTest(arguments):
                self.refused("run", "-p", "a", *arguments)
        self.refused(says="--help")
        self.refused("frobnicate", says="frobnicate")

    def test_full_disk(self):
        """A result that cannot be written is an error, not a silence."""
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "info", "--json"], stdout=full, stderr=subprocess.PIPE)
        self.assertNotEqual(done.returncode, 0)


class OnTerminal(Case):
    """stdin, stdout and stderr are one terminal, as for a person."""
    def setUp(self):
        super().setUp()
        self.child = 0
        signal.signal(signal.SIGALRM, self.stuck)
        signal.alarm(240)                 # a test that waits for text that never comes must end too

    def tearDown(self):
        signal.alarm(0)
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        super().tearDown()

    def stuck(self, *ignored):
        raise TimeoutError(f"the program printed nothing more after {self.text[-200:]}")

    def start(self, *arguments, program=PROGRAM, env={}):
        child, master = pty.fork()
        if child == 0:
            os.execve(program, [program, *map(str, arguments)], 
                      {**ONE_THREAD, "TERM": "xterm", "NO_COLOR": "", **env})
        self.child, self.master, self.text = child, master, b""

    def read_until(self, pattern):
        """Everything up to a match of `pattern`; without one, everything."""
        while not re.search(pattern, self.text):
            try:
                block = os.read(self.master, 65536)
            except OSError as error:      # Linux: the other side is closed
                if error.errno != errno.EIO:
                    raise
                return False
            if not block:
                return False
            self.text += block
        return True

    def finish(self):
        self.read_until(rb"\A(?!)")
        os.close(self.master)
        _, status = os.waitpid(self.child, 0)
        self.child = 0
        return os.waitstatus_to_exitcode(status), self.text.decode().replace("\r\n", "\n")


class Terminal(OnTerminal):
    def test_thought_is_dimmed(self):
        self.start("run", "-p", QUESTION)
        code, text = self.finish()
        self.assertEqual(code, 0)
        thought, answer = ANSWER.split("</think>")
        self.assertIn(f"\033[2m{thought}</think>\033[0m{answer}", text.replace("\033[2m\033[2m", "\033[2m"))
        self.assertRegex(text, rf"\n{STATISTICS}\n\Z")

    def test_ctrl_c_ends_a_generation(self):
        endless(self.folder)
        self.start("run", "-m", self.folder, "-p", QUESTION)
        self.assertTrue(self.read_until(rb"larger\.\w"), self.text)
        os.write(self.master, b"\x03")
        code, text = self.finish()
        self.assertEqual(code, 130, text)
        self.assertRegex(text, rf"\n(?:\^C)?(?:\033\[0m)?{INTERRUPTED}\n\Z")

    def test_ctrl_c_while_reading(self):
        """A long prompt shows a bar; Ctrl-C ends there too, and the bar is wiped away."""
        endless(self.folder)
        (self.folder / "long.txt").write_text("1 " * 15000)
        self.start("run", "-m", self.folder, "-f", self.folder / "long.txt")
        self.assertTrue(self.read_until(rb"reading \[#* *\] \d+ / 3\d{4}"), self.text[-200:])
        os.write(self.master, b"\x03")
        code, text = self.finish()
        self.assertEqual(code, 130, text[-300:])
        self.assertRegex(text, rf"\r +\r(\033\[\dm)*<think>(\033\[\dm)*\n{INTERRUPTED}\n\Z")

    def test_ctrl_c_leaves_no_half_file(self):
        endless(self.folder)
        out = self.folder / "out.safetensors"
        self.start("logits", "-m", self.folder, "--ids", ",".join(["7"] * 20000), "--out", out)
        self.assertTrue(self.read_until(rb"reading \["), self.text[-200:])
        os.write(self.master, b"\x03")
        code, _ = self.finish()
        self.assertEqual(code, 130)
        self.assertEqual([p.name for p in self.folder.iterdir() if p.name.startswith("out")], [])

    def test_chat(self):
        """Ctrl-C ends an answer, then the chat goes on; at the prompt sign it ends the chat."""
        endless(self.folder)
        self.start("chat", "-m", self.folder)
        self.assertTrue(self.read_until(rb"> "))
        os.write(self.master, f"{QUESTION}\n".encode())
        self.assertTrue(self.read_until(rb"larger\.\w"), self.text)
        os.write(self.master, b"\x03")
        self.assertTrue(self.read_until(rb"; interrupted\r\n[^\n]*> "), self.text)
        os.write(self.master, b"\x03")
        code, text = self.finish()
        self.assertEqual(code, 130, text)

    def test_sigint_while_nobody_reads(self):
        """A write that Ctrl-C ends is no error of stdout."""
        endless(self.folder)
        reader, writer = os.pipe()
        size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b"-" * (size - 4))
        process = subprocess.Popen([PROGRAM, "run", "-m", self.folder, "-p", QUESTION], env=ONE_THREAD,
                                   stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        asleep, state = 0, pathlib.Path(f"/proc/{process.pid}/stat")
        while asleep < 5:                              # for half a second: in a write
            time.sleep(0.1)
            asleep = asleep + 1 if state.read_text().split()[2] == "S" else 0
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        while os.read(reader, size):
            pass
        os.close(reader)
        _, error = process.communicate()
        self.assertEqual(process.returncode, 130, error)

    def test_sigint_without_terminal(self):
        """kill -INT does what Ctrl-C does; a pipe gets what there is so far."""
        endless(self.folder)
        process = subprocess.Popen([PROGRAM, "run", "-m", self.folder, "-p", QUESTION], env=ONE_THREAD,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        start = process.stdout.read(len(ANSWER) - 1)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate()
        self.assertEqual(process.returncode, 130)
        self.assertEqual(start.decode(), ANSWER[:-1])
        self.assertTrue(rest.endswith(b"\n"))
        self.assertRegex(error.decode(), rf"\A{INTERRUPTED}\n\Z")


class Pipeline(Case):
    """`deepseek pipeline` needs no model; its timetable is checked in tests/unit/ch15_machines.cpp."""

    def test_numbers(self):
        for schedule, bubble, alive in (("gpipe", 9, 16), ("1f1b", 9, 4), ("zb1p", 3, 4), ("dualpipe", 2, 5),
                                        ("dualpipev", 6, 9)):
            out = json.loads(self.ok("pipeline", "--schedule", schedule, "--ranks", 4, "--microbatches", 16,
                                     "--json")[0])
            self.assertEqual((out["bubble"], out["formula_bubble"]), ([bubble] * 4, bubble))
            self.assertEqual((max(out["activations"]), out["formula_activations"]), (alive, alive))
            work = [sum(end - start for _, start, end in steps) for steps in out["steps"]]
            self.assertEqual([out["end"] - w for w in work], out["bubble"])

    def test_text(self):
        out = self.ok("pipeline", "--schedule", "1F1B", "--ranks", 2, "--microbatches", 2)[0]
        self.assertEqual(out.splitlines()[:2], ["  0 F0  F1  ........B0      ....B1      ",
                                                "  1 ....F0  B0      F1  B1      ........"])
        plan = self.ok("pipeline", "--schedule", "1f1b", "--ranks", 2, "--microbatches", 2, "--plan")[0]
        self.assertIn("rank 1\n  F0  receive F0 from 0\n  B0  send B0 to 0\n", plan)

    def test_drawing(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "a.svg"
            draw = ("pipeline", "--schedule", "dualpipe", "--ranks", 4, "--microbatches", 8, "--svg", file)
            self.ok(*draw)
            steps = json.loads(self.ok(*draw[:-2], "--json")[0])["steps"]
            self.assertEqual(file.read_text().count("<rect"), 1 + sum(map(len, steps)))
            self.assertEqual(run(*draw)[0], 1)           # it is there
            self.ok(*draw, "--force")

    def test_refused(self):
        for arguments, reason in ((("dualpipe", 5, 20), "odd"), (("dualpipe", 4, 9), "odd"),
                                  (("dualpipe", 8, 14), "16"), (("zb1p", 4, 3), "4"),
                                  (("1f1b", 1, 3), "1024")):
            schedule, ranks, micro = arguments
            code, out, error = run("pipeline", "--schedule", schedule, "--ranks", ranks, "--microbatches",
                                   micro)
            self.assertEqual((code, out), (1, ""))
            self.assertIn(reason, error)
        self.assertEqual(run("pipeline", "--schedule", "gpipe", "--f", "-1")[0], 1)


if __name__ == "__main__":
    suite.main("cli")
