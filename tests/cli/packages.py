#!/usr/bin/env python3
"""The Makefile on machines that lack something: what it installs, what it says, and what it does without apt.

The machine is a PATH: real tools for make's recipes, and stand-ins for compilers, dpkg, apt-get, sudo and id.
"""
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

import suite

ROOT = pathlib.Path(__file__).resolve().parents[2]
REAL = ("bash", "make", "mkdir", "cat", "touch", "cmp", "env", "flock", "nproc", "rm", "sleep", "sh")

# A compiler that works once g++ is installed; a dpkg that knows what apt-get has installed.
COMPILER = 'grep() { [[ "$(cat "$HERE/installed")" == *"$1"* ]]; }; cat >/dev/null; grep "g++"'
DPKG = '[[ " $(cat "$HERE/installed") " == *" $2 "* ]]'
APT_GET = """
mkdir "$HERE/running" || exit 9           # a second one at the same time
sleep 0.2
echo "$DEBIAN_FRONTEND $*" >>"$HERE/calls"
[ ! -e "$HERE/no-network" ] || { echo "E: Could not resolve 'mirror'"; exit 100; }
case "$*" in *install*) for word; do echo -n "$word " >>"$HERE/installed"; done;; esac
rm -r "$HERE/running"
"""


class Machine(unittest.TestCase):
    def setUp(self):
        self.home = pathlib.Path(tempfile.mkdtemp())
        self.tools = self.home / "bin"
        self.tools.mkdir()
        shutil.copy(ROOT / "Makefile", self.home)
        for name in REAL:
            os.symlink(shutil.which(name), self.tools / name)
        sudo = 'echo "sudo $1" >>"$HERE/calls"; "$@"'
        stand_ins = {"g++": COMPILER, "clang++": COMPILER, "clang-tidy": COMPILER, "python3": "exit 0",
                     "curl": "exit 0", "git": "exit 0", "dpkg": DPKG, "apt-get": APT_GET, "id": "echo 0",
                     "sudo": sudo, "mpicc": "exit 0", "mpirun": "exit 0"}
        for name, text in stand_ins.items():
            self.tool(name, text)
        (self.home / "installed").write_text("libpcre2-dev ")
        (self.home / "calls").write_text("")

    def tearDown(self):
        shutil.rmtree(self.home)

    def tool(self, name, text):
        (self.tools / name).write_text(f"#!/bin/bash\nHERE='{self.home}'\n{text}\n")
        (self.tools / name).chmod(0o755)

    def make(self, *targets, code=0):
        done = subprocess.run(["make", *targets], cwd=self.home, env={"PATH": str(self.tools)},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout, (self.home / "calls").read_text().splitlines()

    def test_nothing_missing(self):
        (self.home / "installed").write_text("g++ ")
        self.assertEqual(self.make("build/have-run", "build/have-test", "build/have-style"), ("", []))

    def test_installs_what_is_missing(self):
        out, calls = self.make("build/have-run")
        self.assertEqual(out, "Installing Debian packages, as the program needs them: "
                              "g++ libsimdjson-dev libutf8proc-dev libcli11-dev libedit-dev\n")
        verbs = [re.findall(r"(?<!-)(update|install)\b", call) for call in calls]
        self.assertEqual(verbs, [["update"], ["install"]])
        self.assertTrue(all(call.startswith("noninteractive ") for call in calls), calls)
        self.assertTrue(calls[1].endswith(out.split(": ")[1].strip()), calls)
        self.assertEqual(self.make("build/have-run"), ("make: 'build/have-run' is up to date.\n", calls))

    def test_one_installation_at_a_time(self):
        self.tool("clang-tidy", DPKG.replace("$2", "clang-tidy"))
        self.tool("clang++", "cat >/dev/null; " + DPKG.replace("$2", "clang"))
        out, calls = self.make("-j3", "build/have-test", "build/have-style")
        self.assertEqual(len(re.findall("Installing Debian packages", out)), 3, out)
        self.assertEqual(sum("install" in call for call in calls), 3, calls)

    def test_sudo(self):
        self.tool("id", "echo 1000")
        _, calls = self.make("build/have-run")
        self.assertEqual(calls[0], "sudo env")

    def test_no_apt(self):
        (self.tools / "apt-get").unlink()
        out, _ = self.make("build/have-run", code=2)
        for library in ("C++20 compiler", "simdjson", "PCRE2", "utf8proc", "CLI11", "libedit"):
            self.assertIn(library, out)
        self.assertFalse((self.home / "build" / "have-run").exists())

    def test_no_network(self):
        (self.home / "no-network").touch()
        out, _ = self.make("build/have-run", code=2)
        self.assertIn("Could not resolve", out)
        self.assertIn("They could not be installed.", out)
        self.assertFalse((self.home / "build" / "have-run").exists())

    def test_installed_but_of_no_use(self):
        self.tool("g++", "cat >/dev/null; echo 'g++: unknown option -std=c++20'; exit 1")
        out, _ = self.make("build/have-run", code=2)
        self.assertIn("unknown option", out)
        self.assertIn("the program needs a C++20 compiler", out)


if __name__ == "__main__":
    suite.main("packages")
