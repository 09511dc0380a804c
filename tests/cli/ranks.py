#!/usr/bin/env python3
"""`mpirun -np R deepseek COMMAND`: the bits of one process, ranks that die, stop or differ.

DEEPSEEK names another program than a copy of build/compilers/deepseek-clang, which has MPI in `make test`,
where that finds weights/tiny.
"""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

import cli
import suite
from cli import ROOT, TINY, read_safetensors

PROGRAM = os.environ.get("DEEPSEEK", str(ROOT / "build" / "deepseek-ranks"))
# Many ranks on few processors, in a container, as root; over shared memory alone.
ENV = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
       "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_btl": "self,vader",
       "OMPI_MCA_btl_vader_single_copy_mechanism": "none", "OMPI_MCA_hwloc_base_binding_policy": "none"}
IDS = "0,508,42,360,81,509,510,201,5,6,7,8"
PATIENCE = 120                                           # seconds until a hang is one


def mpirun(ranks, *arguments, given="", program=PROGRAM):
    command = ["mpirun", "-np", str(ranks), program, *map(str, arguments)]
    done = subprocess.run(command, input=given.encode(), capture_output=True, cwd=ROOT, env=ENV,
                          timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def alone(*arguments, given=""):
    done = subprocess.run([PROGRAM, *map(str, arguments)], input=given.encode(), capture_output=True,
                          cwd=ROOT, timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def lines(error):
    """What the program itself said on stderr."""
    return [line for line in error.splitlines() if line.startswith("deepseek: ")]


def ended(pid):
    """Whether a process is gone, or only still listed since nobody has asked how it ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class Case(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name)

    def ok(self, done):
        code, out, error = done
        self.assertEqual(code, 0, error)
        return out

    def taps(self, ranks, *options):
        file = self.folder / f"{ranks}.safetensors"
        arguments = ("logits", "--ids", IDS, "--taps", "--out", file, "--force", *options)
        self.ok(mpirun(ranks, *arguments) if ranks else alone(*arguments))
        return read_safetensors(file)


class SameBits(Case):
    """With the results added in the order of the experts, nobody can tell how many ranks there were."""

    def test_every_intermediate_for_any_ranks_and_chunks(self):
        expected = self.taps(0)
        for ranks, options in ((1, ()), (2, ()), (3, ()), (4, ()), (2, ("--chunk", 5)), (3, ("--chunk", 2)),
                               (4, ("--ranks-per-node", 2)), (3, ("--ranks-per-node", 2)),
                               (3, ("--ranks-per-node", 1)), (2, ("--threads", 2))):
            with self.subTest(ranks=ranks, options=options):
                self.assertEqual(self.taps(ranks, *options), expected)

    def test_quantised_and_rounded(self):
        for options in (("--quant", "q8_0"), ("--quant", "fp8", "--arith", "fp8"), ("--arith", "bf16"),
                        ("--mla", "naive")):
            with self.subTest(options=options):
                self.assertEqual(self.taps(3, *options), self.taps(0, *options))

    def test_what_is_said(self):
        for arguments in (("run", "-p", cli.QUESTION, "--quiet"),
                          ("run", "-p", "Add 6 and 77.", "--quiet", "--mtp"),
                          ("run", "-p", "Add 6 and 77.", "--quiet", "--temp", 1, "--seed", 5),
                          ("perplexity", "-f", "README.md", "--ctx", 300, "--quiet")):
            expected = self.ok(alone(*arguments))
            for ranks in (2, 3):
                with self.subTest(arguments=arguments, ranks=ranks):
                    self.assertEqual(self.ok(mpirun(ranks, *arguments)), expected)

    def test_chat_reads_on_rank_0(self):
        turns = "Add 6 and 77.\nWhich is larger, 9.11 or 9.9?\n"
        self.assertEqual(self.ok(mpirun(2, "chat", "--quiet", given=turns)),
                         self.ok(alone("chat", "--quiet", given=turns)))

    def test_one_rank_answers_what_needs_no_experts(self):
        expected = self.ok(alone("tokenize", given="hello"))
        self.assertEqual(self.ok(mpirun(3, "tokenize", given="hello")), expected)
        self.assertEqual(self.ok(mpirun(2, "info", "--json")).count("\n"), 1)

    def test_copies_of_experts(self):
        expected = self.taps(0)
        loads = self.folder / "loads.safetensors"
        self.ok(alone("bench", "--traffic", "-f", "README.md", "--ranks", 4, "--out", loads))
        two = ("--ranks-per-node", 2)
        for ranks, copies, more in ((2, 4, ()), (4, 4, two), (3, 2, two)):
            with self.subTest(ranks=ranks):
                got = self.taps(ranks, "--redundant-experts", copies, "--routing", loads, *more)
                self.assertEqual(got, expected)
        for options, text in ((("--redundant-experts", 2), "--routing"),
                              (("--redundant-experts", 1, "--routing", loads), "equally many"),
                              (("--routing", TINY / "model.safetensors"), "expert_load")):
            code, _, error = mpirun(2, "run", "-p", "x", *options)
            self.assertEqual(code, 1)
            self.assertIn(text, lines(error)[0])

    def test_bench_counts_every_rank(self):
        out = self.ok(mpirun(2, "bench", "-p", 16, "-n", 4, "-r", 2))
        tests = [json.loads(line) for line in out.splitlines()]
        self.assertEqual([(t["test"], t["ranks"]) for t in tests], [("prefill", 2), ("decode", 2)])


class OtherSums(Case):
    """What travels in fewer bits, or is added in another order, is near, and does not depend on the ranks."""

    def worst(self, got, expected):
        return max(abs(a - b) for a, b in zip(got["logits"][2], expected["logits"][2]))

    def test_orders(self):
        expected = self.taps(0)
        self.assertLess(self.worst(self.taps(3, "--combine-order", "rank"), expected), 1e-3)
        for ranks in (3, 4):
            got = self.taps(ranks, "--combine-order", "hierarchical", "--ranks-per-node", 2)
            self.assertNotEqual(got, expected)
            self.assertLess(self.worst(got, expected), 0.5)

    def test_fewer_bits(self):
        expected = self.taps(0)
        for option in (("--dispatch", "fp8"), ("--dispatch", "bf16"), ("--combine", "bf16")):
            with self.subTest(option=option):
                one = self.taps(0, *option)
                self.assertNotEqual(one, expected)
                self.assertEqual(self.taps(1, *option), one)
                self.assertEqual(self.taps(3, *option), one)


class Refused(Case):
    """What differs between ranks is seen before anything is loaded."""

    def differ(self, first, second, program=PROGRAM):
        command = ["mpirun", "-np", "1", PROGRAM, *map(str, first), ":",
                   "-np", "1", program, *map(str, second)]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, env=ENV, timeout=PATIENCE)
        self.assertEqual(done.returncode, 1, done.stderr.decode())
        self.assertEqual(done.stdout, b"")
        return lines(done.stderr.decode())

    def test_another_model(self):
        other = self.folder / "other"
        shutil.copytree(TINY, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
        ask = ("run", "-p", "Hello", "-n", 2)
        said = self.differ(ask, (*ask, "-m", other))
        self.assertRegex(said[0], r"rank 1 \(.*\) has another model than rank 0$")

    def test_another_option(self):
        ask = ("run", "-p", "Hello", "-n", 2)
        said = self.differ(ask, (*ask, "--arith", "bf16"))
        self.assertRegex(said[0], r"rank 1 \(.*\) has another command line than rank 0$")

    def test_another_build(self):
        other = self.folder / "deepseek"
        other.write_bytes(pathlib.Path(PROGRAM).read_bytes() + b"\0")
        other.chmod(0o755)
        ask = ("run", "-m", TINY, "-p", "Hello", "-n", 2)
        self.assertRegex(self.differ(ask, ask, other)[0], r"rank 1 \(.*\) has another build than rank 0$")

    def test_a_copy_elsewhere_is_the_same_model(self):
        other = self.folder / "other"
        shutil.copytree(TINY, other)
        ask = ("run", "-p", "Add 6 and 77.", "--quiet")
        command = ["mpirun", "-np", "1", PROGRAM, *ask, ":", "-np", "1", PROGRAM, *ask, "-m", str(other)]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, env=ENV, timeout=PATIENCE)
        self.assertEqual(done.stdout.decode(), self.ok(alone(*ask)))

    def test_what_is_wrong_is_said_once(self):
        for arguments, text in ((("run", "-m", "nowhere", "-p", "x"), "nowhere"),
                                (("logits", "--ids", "1,2", "--device", "cuda", "--top", 1), "cuda"),
                                (("perplexity", "-f", "-"), "stdin")):
            with self.subTest(arguments=arguments):
                code, out, error = mpirun(3, *arguments)
                self.assertEqual((code, out), (1, ""))
                self.assertEqual(len(lines(error)), 1, error)
                self.assertIn(text, lines(error)[0])

    def test_more_ranks_than_experts(self):
        code, _, error = mpirun(17, "run", "-p", "x")
        self.assertEqual(code, 1)
        self.assertEqual(lines(error), ["deepseek: 17 ranks: the model has 16 experts a layer"])


class Lost(Case):
    """A rank that dies or stops ends all within --timeout, is named, and leaves nothing half written."""

    def lose(self, how, victim, *launcher, command=("bench", "-p", 256, "-n", 64, "-r", 1000), timeout=6):
        arguments = [*map(str, command), "--timeout", str(timeout)]
        process = subprocess.Popen(["mpirun", *launcher, "-np", "3", PROGRAM, *arguments], cwd=ROOT, env=ENV,
                                   stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        ranks = self.wait_for_ranks(process.pid)
        time.sleep(1)
        os.kill(ranks[victim], how)
        begin = time.monotonic()
        error = process.communicate(timeout=PATIENCE)[1].decode()
        took = time.monotonic() - begin
        self.assertLess(took, timeout + 3, error)        # and what mpirun itself takes
        self.assertFalse([pid for pid in ranks.values() if not ended(pid)])
        said = lines(error)
        self.assertTrue(said, error)
        for line in said:
            self.assertTrue(line.startswith(f"deepseek: rank {victim} (process {ranks[victim]} on "), line)
        return process.returncode, said

    def wait_for_ranks(self, launcher):
        """rank -> process, once all three compute."""
        for _ in range(1000):
            ranks = {}
            for pid in pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
                with open(f"/proc/{pid}/environ", "rb") as f:
                    if match := re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", f.read()):
                        ranks[int(match[1])] = int(pid)
            if len(ranks) == 3:
                return ranks
            time.sleep(0.02)
        self.fail("no three ranks")

    def test_killed(self):
        for victim in (0, 1, 2):
            with self.subTest(victim=victim):
                code, said = self.lose(signal.SIGKILL, victim)
                self.assertNotEqual(code, 0)
                self.assertRegex(said[0], "has died$")

    def test_killed_where_mpirun_lets_the_others_live(self):
        self.assertRegex(self.lose(signal.SIGKILL, 1, "--enable-recovery")[1][0], "has died$")

    def test_stopped(self):
        for victim in (0, 2):
            with self.subTest(victim=victim):
                code, said = self.lose(signal.SIGSTOP, victim)
                self.assertEqual(code, 1)
                self.assertRegex(said[0], "silent")

    def test_stopped_while_a_person_thinks(self):
        code, said = self.lose(signal.SIGSTOP, 1, command=("chat",))
        self.assertEqual(code, 1)
        self.assertRegex(said[0], "silent")

    def test_a_file_that_was_there_stays(self):
        model, file = self.folder / "model", self.folder / "kept.kv"
        model.mkdir()
        cli.endless(model)
        file.write_text("before")
        command = ("run", "-m", model, "-p", "Hello", "--save-kv", file, "--force")
        self.lose(signal.SIGKILL, 1, command=command)
        self.assertEqual(file.read_text(), "before")
        self.assertEqual(sorted(os.listdir(self.folder)), ["kept.kv", "model"])


if __name__ == "__main__":
    if "DEEPSEEK" not in os.environ:
        shutil.copy2(ROOT / "build" / "compilers" / "deepseek-clang", PROGRAM)
    suite.main("ranks")
