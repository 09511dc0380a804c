#!/usr/bin/env python3
"""Runs `deepseek check` on the emulator of a GPU: each twin against its operation, in four orders.

    tests/gpu/twins.py [PROGRAM]         from anywhere; by default build/gpu/deepseek
    tests/gpu/twins.py --selftest        shows that a broken check is seen

Each twin of each run is a test. A run has failed, too, if its counts, its exit code or its list of twins is
not what its lines say.
"""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Blocks, warps and threads in order, copies as late as may be; and three times anything at any time, where
# ranks (chapter 15) have 2, 4 and 8 devices.
RUNS = [("fifo", "lazy", 1, 1), ("random", "eager", 1, 2), ("random", "random", 2, 4),
        ("priority", "random", 3, 8)]
TWIN = re.compile(r"\d+\.\d+ +(\w+) +(\d+) cases .* (ok|FAILED, .*)")


def verdict(code, text, expected):
    """(twins, what is wrong) of a run that ended with exit code `code` and printed `text`; `expected`: the
    twins of the first run, or none."""
    lines = text.splitlines()
    twins = {match[1]: match for line in lines if (match := TWIN.fullmatch(line))}
    bad = [name for name, match in twins.items() if match[3] != "ok" or int(match[2]) == 0]
    wrong = [twins[name][0] for name in bad]
    said = f"check: {len(twins) - len(bad)} passed, {len(bad)} failed"
    if not twins or not lines or lines[-1] != said:
        wrong.append("its last lines are not what its twins say:\n" + "\n".join(lines[-5:]))
    elif code != (2 if bad else 0):
        wrong.append(f"{len(bad)} failed, yet exit code {code}")
    if missing := [name for name in expected if name not in twins]:
        wrong.append(f"no line of {', '.join(missing)}, which the first run has")
    return twins, wrong


def run(program, order, asynchronous, seed, devices):
    environment = {"EMU_ORDER": order, "EMU_ASYNC": asynchronous, "EMU_SEED": str(seed),
                   "EMU_DEVICES": str(devices)}
    done = subprocess.run([program, "check"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | environment)
    return done.returncode, done.stdout.decode(errors="replace")


def selftest():
    good = "5.1   add                           5 cases   worst 0         bound 0         ok\n"
    bad = good.replace("ok", "FAILED, case 1, [2]: 3, not 4")
    cases = [((0, good + "check: 1 passed, 0 failed\n", ["add"]), 0),
             ((2, bad + "check: 0 passed, 1 failed\n", []), 1),
             ((0, bad + "check: 0 passed, 1 failed\n", []), 2),
             ((2, good + "check: 1 passed, 0 failed\n", []), 1),
             ((0, good + "check: 2 passed, 0 failed\n", []), 1),
             ((0, good + "check: 1 passed, 0 failed\n", ["add", "top_k"]), 1),
             ((0, good.replace("5 cases", "0 cases") + "check: 1 passed, 0 failed\n", []), 2),
             ((3, good + "emulator: race\n", []), 1),
             ((0, "check: 0 passed, 0 failed\n", []), 1),
             ((-11, "", []), 1)]
    failed = [(given, expected) for given, expected in cases if len(verdict(*given)[1]) != expected]
    for given, _ in failed:
        print(f"{given} gave {verdict(*given)[1]}")
    print(f"twins-selftest: {len(cases) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def main(arguments):
    if arguments == ["--selftest"]:
        return selftest()
    program = pathlib.Path(arguments[0] if arguments else ROOT / "build/gpu/deepseek").resolve()
    if not program.exists():
        print(f"there is no {program}: `make build/gpu/deepseek` comes first\ntwins: 0 passed, 1 failed")
        return 1
    passed = failed = 0
    first = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        runs = list(workers.map(lambda order: run(program, *order), RUNS))
    for order, done in zip(RUNS, runs):
        twins, wrong = verdict(*done, first)
        first = first or list(twins)
        passed, failed = passed + max(0, len(twins) - len(wrong)), failed + len(wrong)
        for line in wrong:
            print("order %s, copies %s, seed %d, devices %d:" % order, line)
    print(f"twins: {passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
