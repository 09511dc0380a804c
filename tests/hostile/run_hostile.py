#!/usr/bin/env python3
"""Runs the program on every malformed folder and hostile command line. Each must be refused: exit code 1, one
line on stderr that names the file and the field, nothing on stdout, and no file left behind.

    tests/hostile/run_hostile.py [PROGRAM] [WORD ...]   PROGRAM: ./deepseek; only cases whose name has a WORD
    tests/hostile/run_hostile.py --selftest             shows that a program that misbehaves is seen
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading

import command_lines
import make_hostile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 20  # seconds, for a command that takes some milliseconds
ADDRESS_SPACE = 4 << 30  # bytes
NOBODY = 65534
COMMANDS = {  # what follows -m FOLDER, and stdin
    "info": ("info", [], b""),
    "logits": ("logits", ["--ids", "1,2,3", "--force", "--out", "out.safetensors", "--threads", "1"], b""),
    "run": ("run", ["-p", "hello", "-n", "2", "--threads", "1"], b""),
    "tokenize": ("tokenize", [], b"hello 123"),
    "tokenize-aaaa": ("tokenize", [], b"a" * 5000),
    "tokenize-q": ("tokenize", [], b"quit"),
}


@dataclasses.dataclass
class Result:
    code: object  # the exit code, or "timeout"
    stdout: bytes
    stderr: bytes
    left: list  # files that were not there before


class Program:
    def __init__(self, path):
        self.path = path
        self.sanitized = b"__asan_init" in pathlib.Path(path).read_bytes()
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "LC_ALL": "C.UTF-8",
            "ASAN_OPTIONS": "exitcode=99:abort_on_error=0:hard_rss_limit_mb=3000",
            "UBSAN_OPTIONS": "exitcode=99",
        }
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not self.sanitized:  # the sanitizer's shadow needs terabytes of addresses
            limit_addresses(ADDRESS_SPACE)

    def run(self, arguments, work, stdin=b"", limits=None, user=None, **variables):
        """`limits`: called in the child, where it needs other limits than ours, which it inherits."""
        before = files_under(work)
        stdin = stdin if isinstance(stdin, bytes) else stdin.encode("utf-8", "surrogatepass")
        try:
            done = subprocess.run(
                [self.path, *arguments],
                cwd=work,
                input=stdin,
                capture_output=True,
                timeout=TIMEOUT,
                env=self.environment | variables,
                user=user,
                preexec_fn=limits,
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, out, err = "timeout", b"", b""
        return Result(code, out, err, sorted(files_under(work) - before))


def files_under(folder):
    return {str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*")}


def limit_addresses(size):
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fill_disk():
    """As if the disk had room for 1,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


# -- verdicts ----------------------------------------------------------------------------------------------


def refusal_faults(result, expect):
    """What is wrong with a refusal: nothing, if the list is empty."""
    line = result.stderr.decode("utf-8", "replace")
    faults = [] if result.code == 1 else [f"exit code {result.code}"]
    if line.count("\n") != 1 or not line.endswith("\n") or not line.startswith("deepseek: "):
        faults.append("stderr is not one line that begins with the program's name")
    if len(result.stderr) > 2000 or re.search(r"[\x00-\x09\x0b-\x1f\x7f]", line):
        faults.append("stderr is too long for a reader, or moves his cursor")
    faults += [f"stderr does not name {text!r}" for text in expect if text not in line]
    if result.stdout:
        faults.append(f"{len(result.stdout)} bytes on stdout")
    if result.left:
        faults.append(f"left behind: {result.left}")
    return faults


def acceptance_faults(result, left=()):
    faults = [] if result.code == 0 else [f"exit code {result.code}"]
    return faults if result.left == list(left) else faults + [f"files: {result.left}"]


class Tally:
    """Counts; prints what failed. Called from several threads."""

    def __init__(self):
        self.passed = self.failed = 0
        self.lock = threading.Lock()

    def add(self, name, faults, stderr=b""):
        with self.lock:
            self.passed += not faults
            self.failed += bool(faults)
            if faults:
                shown = stderr.decode("utf-8", "replace")[:1500]
                print(f"FAILED {name}: {'; '.join(faults)}\n{shown}", flush=True)


# -- the cases ---------------------------------------------------------------------------------------------


class Suite:
    def __init__(self, program, words):
        self.program, self.words, self.tally = program, words, Tally()
        self.top = pathlib.Path(tempfile.mkdtemp(prefix="h"))
        self.top.chmod(0o755)
        self.good = self.top / "good"
        make_hostile.write_folder(self.good, make_hostile.GOOD)

    def wanted(self, name):
        return not self.words or any(word in name for word in self.words)

    def place(self, name, folder):
        """A fresh place: a model folder, and a work folder which only the program changes."""
        place = pathlib.Path(tempfile.mkdtemp(prefix="p", dir=self.top))
        place.chmod(0o755)
        make_hostile.write_folder(place / "folder", folder)
        (place / "work").mkdir()
        (place / "work").chmod(0o777)
        return place

    def command(self, name, place, **more):
        command, arguments, stdin = COMMANDS[name]
        return self.program.run(
            [command, "-m", str(place / "folder"), *arguments], place / "work", stdin, **more
        )

    def folder_case(self, case):
        user = NOBODY if os.getuid() == 0 and case.name.endswith("_unreadable") else None  # root can read all
        place = self.place(case.name, case.folder)
        for name in case.commands:
            result = self.command(name, place, user=user)
            self.tally.add(f"{case.name} ({name})", refusal_faults(result, case.expect), result.stderr)
        shutil.rmtree(place)

    def odd_folder(self, name, folder):
        place = self.place(name, folder)
        for command in ("info", "run", "tokenize", "logits"):
            result = self.command(command, place)
            faults = acceptance_faults(result, ["out.safetensors"] if command == "logits" else [])
            self.tally.add(f"accepted: {name} ({command})", faults, result.stderr)
        shutil.rmtree(place)

    def line_case(self, name, arguments, stdin, expect):
        place = self.place(name, {})
        shutil.rmtree(place / "work")
        make_hostile.write_folder(place / "work", command_lines.work_files())
        filled = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
        filled = [a.replace(b"WORK", os.fsencode(place / "work")) for a in filled]
        filled = [os.fsencode(self.good) if a == b"GOOD" else a for a in filled]
        variables = {"DEEPSEEK_SIMD": "mmx"} if name == "simd_unknown" else {}
        result = self.program.run(filled, place / "work", stdin, **variables)
        self.tally.add(f"line: {name}", refusal_faults(result, expect), result.stderr)
        shutil.rmtree(place)

    def jobs(self):
        for name, folder in make_hostile.odd_folders():
            yield name, lambda n=name, f=folder: self.odd_folder(n, f)
        can_be_nobody = os.getuid() != 0 or self.nobody_can_run()
        for case in make_hostile.all_cases():
            if case.name.endswith("_unreadable") and not can_be_nobody:
                continue
            yield case.name, lambda c=case: self.folder_case(c)
        for line in command_lines.all_lines():
            yield line[0], lambda a=line: self.line_case(*a)
        for name in dir(self):
            if name.startswith("limit_"):
                yield name, lambda n=name: getattr(self, n)()

    def nobody_can_run(self):
        try:
            return self.program.run(["--help"], self.good, user=NOBODY).code == 0
        except PermissionError:
            print("cases of unreadable files are left out: the program cannot be run without root's rights")
            return False

    def run(self):
        jobs = [job for name, job in self.jobs() if self.wanted(name)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()
        shutil.rmtree(self.top)
        print(f"hostile: {self.tally.passed} passed, {self.tally.failed} failed")
        return 1 if self.tally.failed or not self.tally.passed else 0

    # -- limits of the machine -----------------------------------------------------------------------------

    def refused(self, name, folder, arguments, expect, **more):
        """The program must refuse `arguments` ("-m FOLDER" is put behind the command)."""
        place = self.place(name, folder)
        command, *rest = arguments
        result = self.program.run([command, "-m", str(place / "folder"), *rest], place / "work", **more)
        self.tally.add(name, refusal_faults(result, expect), result.stderr)
        shutil.rmtree(place)

    def limit_extreme_sizes(self):
        """The largest configuration that is accepted: no number of `info` may wrap, and nothing may fit."""
        folder = command_lines.extreme_folder()
        place = self.place("extreme", folder)
        result = self.program.run(
            ["info", "--json", "--ctx", str(1 << 24), "--threads", "4096", "-m", str(place / "folder")],
            place / "work",
        )
        faults = acceptance_faults(result)
        if not faults:
            faults = extreme_faults(json.loads(result.stdout), json.loads(folder[make_hostile.CONFIG]))
        self.tally.add("limit_extreme_sizes (info)", faults, result.stderr)
        for form in ("absorbed", "naive"):
            self.refused(
                f"limit_extreme_sizes (run, {form})",
                folder,
                [
                    "run",
                    "-p",
                    "x",
                    "--threads",
                    "4096",
                    "--ctx",
                    str(1 << 24),
                    "--chunk",
                    "65536",
                    "--mla",
                    form,
                ],
                ("not enough memory", "GB"),
            )
        shutil.rmtree(place)

    def limit_memory(self):
        if self.program.sanitized:
            return
        long = command_lines.long_context_folder()
        self.refused(
            "limit_memory (cache)",
            long,
            ["run", "-p", "x", "--ctx", str(1 << 24)],
            ("memory",),
            limits=lambda: limit_addresses(1 << 30),
        )
        place = self.place("large", make_hostile.GOOD)
        make_hostile.write_folder(place / "files", command_lines.work_files())
        self.refused(
            "limit_memory (prompt)",
            make_hostile.GOOD,
            ["run", "-f", str(place / "files" / "large.txt")],
            ("memory",),
            limits=lambda: limit_addresses(1 << 30),
        )
        shutil.rmtree(place)

    def limit_one_token(self):
        """A context of one token: perplexity must not go round for ever."""
        place = self.place("short", {"text": b"some text of several tokens"})
        self.refused(
            "limit_one_token",
            command_lines.one_token_folder(),
            ["perplexity", "-f", str(place / "folder" / "text")],
            ("context",),
        )
        shutil.rmtree(place)

    def limit_mtp(self):
        self.refused("limit_mtp", command_lines.no_mtp_folder(), ["run", "-p", "x", "--mtp"], ("--mtp",))

    def limit_disk(self):
        """A full disk: the output is whole or not there."""
        self.refused(
            "limit_disk",
            make_hostile.GOOD,
            ["logits", "--ids", "1,2,3", "--force", "--out", "out.safetensors"],
            ("out.safetensors",),
            limits=fill_disk,
        )

    def limit_stdout(self):
        """A full disk behind stdout."""
        for name in ("info", "tokenize"):
            command, arguments, stdin = COMMANDS[name]
            with open("/dev/full", "wb") as full:
                done = subprocess.run(
                    [self.program.path, command, "-m", self.good, *arguments],
                    input=stdin,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    timeout=TIMEOUT,
                    env=self.program.environment,
                )
            faults = refusal_faults(Result(done.returncode, b"", done.stderr, []), ("stdout",))
            self.tally.add(f"limit_stdout ({name})", faults, done.stderr)

    def limit_stale_output(self):
        """A refusal leaves an older output as it was."""
        place = self.place("stale", make_hostile.GOOD)
        out = place / "work" / "out.safetensors"
        out.write_bytes(b"older")
        result = self.program.run(
            ["logits", "-m", str(place / "folder"), "--ids", "1,999", "--out", str(out)], place / "work"
        )
        faults = refusal_faults(result, ("999",)) + (
            [] if out.read_bytes() == b"older" else ["the older file is gone"]
        )
        self.tally.add("limit_stale_output", faults, result.stderr)
        shutil.rmtree(place)

    def limit_cut_while_in_use(self):
        """A weight file is cut short between two turns of a chat: one line, not a crash."""
        place = self.place("cut", make_hostile.GOOD)
        chat = subprocess.Popen(
            [self.program.path, "chat", "-m", place / "folder", "-n", "1", "--temp", "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.program.environment,
        )
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        chat.stderr.readline()  # the statistics of the first turn: the weights are mapped and were read
        for name in make_hostile.SHARDS:
            os.truncate(place / "folder" / name, 0)
        _, rest = chat.communicate(b"again\n", timeout=TIMEOUT)
        self.tally.add(
            "limit_cut_while_in_use",
            refusal_faults(Result(chat.returncode, b"", rest, []), ("cut short",)),
            rest,
        )
        shutil.rmtree(place)


def extreme_faults(info, c):
    """Compares the numbers of `info --json` with the same sums in Python's unbounded integers."""
    hidden, vocabulary, layers, heads = (
        c[k] for k in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
    )
    query, rank = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["kv_lora_rank"]
    attention = (
        c["q_lora_rank"] * (hidden + 1 + heads * query)
        + (rank + c["qk_rope_head_dim"]) * hidden
        + rank
        + heads * (c["qk_nope_head_dim"] + c["v_head_dim"]) * rank
        + heads * c["v_head_dim"] * hidden
    )
    expert = 3 * hidden * c["moe_intermediate_size"]
    moe = c["n_routed_experts"] * (hidden + 1 + expert) + c["n_shared_experts"] * expert
    total = 2 * vocabulary * hidden + hidden + layers * (2 * hidden + attention + moe)
    width = rank + c["qk_rope_head_dim"]
    cache, scores = (layers + 1) * (1 << 24) * width * 4, 4096 * (1 << 24) * 4
    chunk_part = 128 * heads * (c["v_head_dim"] + width + rank) * 4
    wanted = {
        "total": (info["parameters"]["total"], total),
        "kv": (info["kv_bytes_per_token"], layers * width * 4),
        "cache": (info["memory"]["cache"], cache),
        "fits": (info["memory"]["fits"], False),
    }
    faults = [f"{name} is {got}, not {right}" for name, (got, right) in wanted.items() if got != right]
    if not scores + chunk_part < info["memory"]["activations"] < 1 << 63:
        faults.append(f"activations are {info['memory']['activations']}")
    return faults


# -- the judge is judged -----------------------------------------------------------------------------------

MISBEHAVIOUR = {  # shell scripts that stand for the program; the first one behaves
    "good": ("echo 'deepseek: a.json: field x' >&2; exit 1", ""),
    "accepts": ("exit 0", "exit code"),
    "crashes": ("echo 'deepseek: a.json: field x' >&2; kill -SEGV $$", "exit code -11"),
    "aborts": ("echo 'deepseek: a.json: field x' >&2; exit 134", "exit code 134"),
    "says_nothing": ("exit 1", "one line"),
    "says_two_lines": ("printf 'deepseek: a.json: field x\\nmore\\n' >&2; exit 1", "one line"),
    "no_newline": ("printf 'deepseek: a.json: field x' >&2; exit 1", "one line"),
    "other_file": ("echo 'deepseek: b.json: field x' >&2; exit 1", "does not name 'a.json'"),
    "other_field": ("echo 'deepseek: a.json: field y' >&2; exit 1", "does not name 'field x'"),
    "prints": ("echo 1; echo 'deepseek: a.json: field x' >&2; exit 1", "on stdout"),
    "leaves_a_file": ("touch out.1.tmp; echo 'deepseek: a.json: field x' >&2; exit 1", "left behind"),
    "moves_the_cursor": ("printf 'deepseek: a.json: field x\\033[2J\\n' >&2; exit 1", "cursor"),
    "floods": ("head -c 5000 /dev/zero | tr '\\0' x >&2; exit 1", "too long"),
    "eats_memory": ("exec python3 -c 'bytearray(5 << 30)'", "one line"),
}


def selftest():
    failed = 0
    for name, (script, fault) in MISBEHAVIOUR.items():
        with tempfile.TemporaryDirectory() as folder:
            program, work = pathlib.Path(folder) / "program", pathlib.Path(folder) / "work"
            work.mkdir()
            program.write_text("#!/bin/sh\n" + script + "\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            faults = refusal_faults(Program(str(program)).run([], work), ("a.json", "field x"))
            seen = any(fault in f for f in faults) if fault else not faults
            failed += not seen
            if not seen:
                print(f"{name}: {faults}")
    config = json.loads(command_lines.extreme_folder()[make_hostile.CONFIG])
    wrapped = {
        "parameters": {"total": 1},
        "kv_bytes_per_token": 1,
        "memory": {"cache": 1, "activations": 1, "fits": True},
    }
    if len(extreme_faults(wrapped, config)) != 5:
        failed += 1
        print("wrapped sizes are not seen")
    print(f"hostile-selftest: {len(MISBEHAVIOUR) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


def main(arguments):
    if arguments == ["--selftest"]:
        return selftest()
    path = arguments[0] if arguments else str(ROOT / "deepseek")
    return Suite(Program(os.path.abspath(path)), arguments[1:]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
