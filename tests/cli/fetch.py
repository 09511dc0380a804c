#!/usr/bin/env python3
"""`make weights/NAME` against a local hub that cuts connections, sends wrong bytes and lies about sizes."""
import fcntl
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import suite
from hub import Hub, listed

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAME = "DeepSeek-R1-Distill-Tiny"
REPO = f"deepseek-ai/{NAME}"


def model():
    """A repository as published: what is wanted, and what is not."""
    noise = random.Random(1)
    return {".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# A model\n", "LICENSE": b"MIT\n",
            "config.json": b'{"model_type": "qwen2"}\n', "generation_config.json": b"{}\n",
            "tokenizer.json": b'{"model": {}}' * 1000, "tokenizer_config.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
            "model.safetensors.index.json": b'{"weight_map": {}}',
            "model-00001-of-000002.safetensors": noise.randbytes(300000),
            "model-00002-of-000002.safetensors": noise.randbytes(200001),
            "modeling_deepseek.py": b"import os\n", "pytorch_model.bin": bytes(5000),
            "figures/benchmark.jpg": bytes(9000), "original/model.safetensors": bytes(9000)}


FIRST = "model-00001-of-000002.safetensors"
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "model.safetensors.index.json", FIRST, "model-00002-of-000002.safetensors"}


def heed_interrupts():
    """What a shell starts in the background ignores SIGINT, and so would what we start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Fetch(unittest.TestCase):
    def setUp(self):
        self.home = pathlib.Path(tempfile.mkdtemp())
        self.weights = self.home / "weights"
        self.weights.mkdir()
        shutil.copy(ROOT / "Makefile", self.home)
        shutil.copy(ROOT / "weights" / "fetch.py", self.weights)
        self.target, self.part = self.weights / NAME, self.weights / f"{NAME}.part"

    def tearDown(self):
        shutil.rmtree(self.home)

    def environment(self, hub):
        return {**os.environ, "HF_ENDPOINT": hub.url, "NO_PROXY": "*", "FETCH_PAUSE": "0"}

    def fetch(self, hub, name=NAME, code=0):
        done = subprocess.run([self.weights / "fetch.py", name], env=self.environment(hub), cwd=self.home,
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        if code:                          # one line, no traceback
            self.assertRegex(done.stderr, r"\Afetch: [^\n]+\n\Z")
            self.assertFalse((self.weights / name).exists())
        return done.stdout + done.stderr

    def assert_whole(self, hub, repo=REPO, name=NAME):
        folder = self.weights / name
        self.assertEqual({p.name for p in folder.iterdir()}, WANTED)
        for path in WANTED:
            self.assertEqual((folder / path).read_bytes(), hub.repos[repo][path], path)
        self.assertFalse((self.weights / f"{name}.part").exists())

    # -- what must work ------------------------------------------------------------------------------

    def test_make_weights(self):
        with Hub({REPO: model()}) as hub:
            done = subprocess.run(["make", f"weights/{NAME}"], env=self.environment(hub), cwd=self.home,
                                  capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assert_whole(hub)
            self.assertIn("8 files, 513.06 kB", done.stdout)
            self.assertIn(f"./deepseek run -m weights/{NAME}", done.stdout)
            again = subprocess.run(["make", f"weights/{NAME}"], env=self.environment(hub), cwd=self.home)
            self.assertEqual(again.returncode, 0)
            self.assertEqual(hub.fetched(FIRST), [None])

    def test_any_organisation(self):
        with Hub({"some-org/Some.Model-7B": model()}, redirect=True) as hub:
            self.fetch(hub, "some-org/Some.Model-7B")
            self.assert_whole(hub, "some-org/Some.Model-7B", "some-org/Some.Model-7B")

    def test_only_what_is_wanted_is_asked_for(self):
        with Hub({REPO: model()}) as hub:
            self.fetch(hub)
            asked = {url.split("/resolve/main/")[1] for url, _ in hub.requests if "/resolve/" in url}
            self.assertEqual(asked, WANTED)

    def test_empty_file(self):
        repository = model()
        repository["generation_config.json"] = b""
        with Hub({REPO: repository}) as hub:
            self.fetch(hub)
            self.assert_whole(hub)

    # -- connections ---------------------------------------------------------------------------------

    def test_cut_connection_goes_on(self):
        for fault in ("cut", "no length"):
            with self.subTest(fault), Hub({REPO: model()}, redirect=True) as hub:
                hub.fault(FIRST, fault, fault, fault, fault)
                self.assertIn("cut off", self.fetch(hub))
                self.assert_whole(hub)
                self.assertEqual(hub.fetched(f"{FIRST}")[1::2][:3], [None, "bytes=150000-", "bytes=225000-"])
                shutil.rmtree(self.target)

    def test_cut_without_ranges_starts_over(self):
        with Hub({REPO: model()}, ranges=False) as hub:
            hub.fault(FIRST, "cut")
            self.fetch(hub)
            self.assert_whole(hub)

    def test_no_progress_gives_up_and_a_second_call_resumes(self):
        with Hub({REPO: model()}) as hub:
            hub.fault(FIRST, "cut", "nothing", "nothing", "nothing")
            self.assertIn("150.00 kB of 300.00 kB", self.fetch(hub, code=1))
            small = hub.fetched("config.json")
            self.fetch(hub)
            self.assert_whole(hub)
            self.assertEqual(hub.fetched(FIRST)[-1], "bytes=150000-")
            self.assertEqual(hub.fetched("config.json"), small)

    def test_stopped_midway(self):
        """Ctrl-C and kill -9 in a file leave no folder that looks whole; the next call resumes."""
        for sign in (signal.SIGINT, signal.SIGKILL):
            with self.subTest(sign), Hub({REPO: model()}) as hub:
                hub.fault(FIRST, *["nothing"] * 1000)
                environment = {**self.environment(hub), "FETCH_PAUSE": "100"}
                process = subprocess.Popen([self.weights / "fetch.py", NAME], env=environment, cwd=self.home,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                           preexec_fn=heed_interrupts)
                while not hub.fetched(FIRST):
                    time.sleep(0.01)
                process.send_signal(sign)
                error = process.communicate()[1]
                self.assertFalse(self.target.exists())
                self.assertTrue(self.part.exists())
                if sign == signal.SIGINT:
                    self.assertEqual(process.returncode, 1)
                    self.assertIn("goes on from here", error)
                hub.fault(FIRST)
                self.fetch(hub)
                self.assert_whole(hub)
                self.assertEqual(len(hub.fetched("config.json")), 1)
                shutil.rmtree(self.target)

    # -- content -------------------------------------------------------------------------------------

    def test_wrong_byte_is_named_and_fetched_again(self):
        for path, name in ((FIRST, "SHA-256"), ("config.json", "SHA-1")):
            with self.subTest(path), Hub({REPO: model()}) as hub:
                hub.fault(path, "wrong byte")
                self.assertIn(f"{path}: corrupted, its {name}", self.fetch(hub))
                self.assert_whole(hub)
                self.assertEqual(hub.fetched(path), [None, None])
                shutil.rmtree(self.target)

    def test_always_wrong_is_an_error(self):
        with Hub({REPO: model()}) as hub:
            hub.fault(FIRST, *["wrong byte"] * 10)
            self.assertIn(f"{FIRST}: corrupted 3 times", self.fetch(hub, code=1))

    def test_damage_between_two_calls(self):
        """A partial file that rotted is caught by its hash; a finished one that lost bytes comes again."""
        with Hub({REPO: model()}) as hub:
            hub.fault(FIRST, "cut", "nothing", "nothing", "nothing")
            self.fetch(hub, code=1)
            partial, = self.part.glob("*.incomplete")
            partial.write_bytes(b"x" + partial.read_bytes()[1:])
            (self.part / "tokenizer.json").write_bytes(b"short")
            self.assertIn(f"{FIRST}: corrupted", self.fetch(hub))
            self.assert_whole(hub)

    def test_longer_than_listed(self):
        with Hub({REPO: model()}) as hub:
            hub.fault(FIRST, "longer")
            self.assertIn("sends more than the 300000 bytes", self.fetch(hub))
            self.assert_whole(hub)
            shutil.rmtree(self.target)
            hub.fault(FIRST, *["longer"] * 10)
            self.assertIn("sends more than", self.fetch(hub, code=1))

    def test_shorter_than_listed(self):
        with Hub({REPO: model()}) as hub:
            hub.fault(FIRST, *["shorter"] * 10)
            self.assertIn("given up after 3 tries", self.fetch(hub, code=1))

    def test_new_version_between_two_calls(self):
        """Neither a partial nor a finished file of the older version gets into the newer one."""
        with Hub({REPO: model()}) as hub:
            hub.fault(FIRST, "cut", "nothing", "nothing", "nothing")
            self.fetch(hub, code=1)
            hub.repos[REPO][FIRST] = random.Random(2).randbytes(300000)
            hub.repos[REPO]["config.json"] = b'{"model_type": "llama"}\n'
            self.fetch(hub)
            self.assert_whole(hub)
            self.assertEqual(hub.fetched(FIRST)[-1], None)

    # -- refusals ------------------------------------------------------------------------------------

    def test_unknown_model(self):
        for status in (401, 403, 404):
            with self.subTest(status), Hub({REPO: model()}) as hub:
                hub.fault("list", status)
                self.assertIn(f"no public model '{REPO}' (HTTP {status}", self.fetch(hub, code=1))
                self.assertEqual(list(self.weights.iterdir()), [self.weights / "fetch.py"])

    def test_list_that_fails(self):
        broken = (500, b"<html>", b"{}", b'[{"type":"file"}]', b"[1]", b"")
        for fault in broken:
            with self.subTest(fault), Hub({REPO: model()}) as hub:
                hub.fault("list", fault)
                self.assertIn("the hub's list", self.fetch(hub, code=1))

    def test_file_that_is_gone(self):
        for status in (401, 404):
            with self.subTest(status), Hub({REPO: model()}) as hub:
                hub.fault(FIRST, status)
                self.assertIn(f"HTTP {status}", self.fetch(hub, code=1))

    def test_no_safetensors(self):
        with Hub({REPO: {"model.gguf": bytes(9000), "config.json": b"{}"}}) as hub:
            self.assertIn("no config.json with safetensors", self.fetch(hub, code=1))

    def test_hub_not_there(self):
        with Hub({}) as hub:
            pass                          # closed: nothing listens at its address now
        self.assertRegex(self.fetch(hub, code=1), r"no connection to http://\S+ \(offline\?.*curl error 7\)")

    def test_hostile_lists(self):
        true = listed("x.safetensors", bytes(9000))
        lies = [{**true, "path": "..safetensors"}, {**true, "path": "-o.safetensors"},
                {**true, "path": "a\nb.safetensors"}, {**true, "size": -1}, {**true, "size": "9000"},
                {**true, "size": 1 << 60}, {**true, "lfs": {"oid": "../../x"}}, {**true, "lfs": {}},
                {**true, "lfs": None, "oid": "abc"}]
        for lie in lies:
            with self.subTest(lie), Hub({REPO: model()}) as hub:
                hub.lies = [lie]
                self.assertIn("the hub's list", self.fetch(hub, code=1))

    def test_disk_too_small(self):
        with Hub({REPO: model()}) as hub:
            hub.lies = [{**listed(FIRST, bytes(9000)), "size": 1 << 49}]
            self.assertRegex(self.fetch(hub, code=1), r"562949\.9\d GB to fetch, but only [\d.]+ GB free")

    def test_bad_names(self):
        with Hub({}) as hub:
            for name in ("../x", "a/b/c", "", "-x", "a/..", "a b", "a/b?c", "ä"):
                with self.subTest(name):
                    done = subprocess.run([self.weights / "fetch.py", name], env=self.environment(hub),
                                          capture_output=True, text=True)
                    self.assertEqual(done.returncode, 1)
                    self.assertIn("is no model name", done.stderr)
            self.assertEqual(hub.requests, [])

    def test_a_model_called_part_is_left_alone(self):
        """Its files are no leftovers of a fetch, and no fetch makes a model with such a name."""
        with Hub({REPO: model(), f"{REPO}.part": model()}) as hub:
            self.part.mkdir()
            (self.part / "model.safetensors").write_bytes(b"mine")
            self.assertIn(f"{NAME}.part holds what no fetch has left there", self.fetch(hub, code=1))
            self.assertEqual([p.name for p in self.part.iterdir()], ["model.safetensors"])
            self.assertEqual((self.part / "model.safetensors").read_bytes(), b"mine")
            shutil.rmtree(self.part)
            requests = list(hub.requests)
            self.assertIn("is no model name", self.fetch(hub, f"{NAME}.part", code=1))
            self.assertEqual(hub.requests, requests)
            self.part.mkdir()             # a fetch that ended before its first file
            self.fetch(hub)
            self.assert_whole(hub)

    def test_two_at_once(self):
        with Hub({REPO: model()}) as hub:
            self.part.mkdir()
            handle = os.open(self.part, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.assertIn("another fetch", self.fetch(hub, code=1))
            os.close(handle)
            self.fetch(hub)
            self.assert_whole(hub)


if __name__ == "__main__":
    suite.main("fetch")
