#!/usr/bin/env python3
"""The budgets of the source text. Prints each violation as FILE:LINE: TEXT.

    tests/style.py               this repository
    tests/style.py --selftest    shows that each rule sees what it forbids

Functions are measured by clang-tidy (readability-function-size) and, for Python, by its own parser: lines
from brace to brace, parameters, and depth of blocks in blocks.
"""
import ast
import itertools
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

COLUMNS = 110
FILE_LINES = {"deepseek.cpp": 7000, "deepseek.cu": 4000, "tokenizer.h": 800, "gguf.h": 1700, "simd.h": 2300,
              "system.h": 500, "cli.h": 1200, "ranks.h": 500,
              "pipeline.h": 400}
HEADERS = tuple(name for name in FILE_LINES if name.endswith(".h"))
TWINS = "tests/twins/twins.h"                           # a part of deepseek.cu
BOOKS = {"deepseek.cpp": HEADERS, "deepseek.cu": (TWINS,)}       # with the headers whose functions are theirs
CUDA = [folder for folder in (os.environ.get("CUDA", ""), "/usr/local/cuda", "/opt/cuda")
        if folder and os.path.exists(f"{folder}/include/cuda_runtime_api.h")][:1]
CHAPTER_LINES, FIRST_CHAPTER_LINES = 500, 250          # a reader of chapter 1 wants to meet the model
FUNCTION_MEDIAN, FUNCTION_P90, FUNCTION_MAX = 20, 60, 130
PARAMETERS = 8
NESTING = 3
SOURCES = (".cpp", ".cu", ".h", ".cuh", ".py", ".sh")
OPEN_ENDS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.:/$}-])/(work|tmp|home|root|Users|mnt)/[\w.$-]")


class Report:
    """Collects violations, by rule."""
    def __init__(self):
        self.rules = {}

    def rule(self, name):
        self.rules.setdefault(name, [])
        return lambda file, line, text: self.rules[name].append(f"{file}:{line}: {text}")

    def violations(self):
        return [v for found in self.rules.values() for v in found]


def tracked(root):
    """Paths of the files in git, or of all files where there is no repository."""
    done = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True)
    if done.returncode == 0:
        names = [name for name in done.stdout.decode().split("\0") if name]
    else:
        names = [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()]
    return [name for name in sorted(names) if (root / name).is_file()]


def is_source(root, name):
    if name.endswith(SOURCES) or pathlib.Path(name).name == "Makefile":
        return True
    with open(root / name, "rb") as f:
        return f.read(2) == b"#!"


def text_lines(root, name):
    """The lines of a text file; none of a binary one."""
    data = (root / name).read_bytes()
    return [] if b"\0" in data else data.decode("utf-8", errors="replace").split("\n")


# -- rules for every file --------------------------------------------------------------------------------

def check_lines(report, root):
    columns, paths, ends = map(report.rule, ("columns", "machine paths", "open ends"))
    for name in tracked(root):
        source = is_source(root, name)
        for number, line in enumerate(text_lines(root, name), 1):
            if source and len(line) > COLUMNS:
                columns(name, number, f"{len(line)} columns, at most {COLUMNS}")
            if match := MACHINE_PATH.search(line):
                paths(name, number, f"a path of one machine: {match[0]}...")
            if (source or name.endswith(".md")) and (match := OPEN_ENDS.search(line)):
                ends(name, number, f"{match[0]}: finish it or leave it out")


def check_file_lines(report, root):
    complain = report.rule("file lines")
    for name, limit in FILE_LINES.items():
        if (root / name).exists():
            lines = len((root / name).read_text().splitlines())
            if lines > limit:
                complain(name, lines, f"{lines} lines, at most {limit}")


# -- rules for the book ----------------------------------------------------------------------------------

def chapters(lines):
    """(line, number, title) of each banner: `// Chapter N. Title` between two lines of `=`."""
    rule = re.compile(r"// =+$")
    found = []
    for i in range(1, len(lines) - 1):
        match = re.fullmatch(r"// (?:Chapter|Appendix) (\w+)\. (.+)", lines[i])
        if match and rule.match(lines[i - 1]) and rule.match(lines[i + 1]):
            found.append((i + 1, match[1], match[2]))
    return found


def check_contents(report, name, lines):
    """The table in chapter 0 and the banners are the same list; numbers rise, and may leave gaps."""
    complain = report.rule("contents")
    banners = chapters(lines)
    end = banners[1][0] if len(banners) > 1 else len(lines)
    table = []
    for number, line in enumerate(lines[:end], 1):
        if match := re.fullmatch(r"//   (\w+) {1,3}(\S.*?) {2,}\S.*", line):
            table.append((number, match[1], match[2]))
        elif table:
            break                         # its first block of lines is the table
    if not banners:
        complain(name, 1, "no chapters")
    last = -1
    for line, number, _ in banners:
        if not number.isdigit():
            complain(name, line, f"chapter '{number}': chapters have numbers")
        elif int(number) <= last:
            complain(name, line, f"chapter {number} after chapter {last}")
        else:
            last = int(number)
    for i in range(max(len(table), len(banners))):
        entry = table[i] if i < len(table) else (end, "nothing", "")
        banner = banners[i] if i < len(banners) else (len(lines), "nothing", "")
        if entry[1:] != banner[1:]:
            complain(name, banner[0], f"chapter '{banner[1]} {banner[2]}' where the table of contents, line "
                     f"{entry[0]}, has '{entry[1]} {entry[2]}'")
            break


def check_chapter_lines(report, name, lines):
    complain = report.rule("chapter lines")
    banners = chapters(lines)
    ends = [b[0] for b in banners[1:]] + [len(lines)]
    for (line, number, _), end in zip(banners, ends):
        limit = FIRST_CHAPTER_LINES if number == "1" else CHAPTER_LINES
        if end - line > limit:
            complain(name, line, f"chapter {number} has {end - line} lines, at most {limit}")


def check_sections(report, name, lines):
    """`// -- N.M  ...` stands in chapter N, and M counts from 1."""
    complain = report.rule("sections")
    starts = {line: number for line, number, _ in chapters(lines)}
    chapter, last = None, 0
    for number, line in enumerate(lines, 1):
        if number in starts:
            chapter, last = starts[number], 0
        if match := re.match(r"// -- (\w+)\.(\d+)\b", line):
            if match[1] != chapter or int(match[2]) != last + 1:
                complain(name, number, f"section {match[1]}.{match[2]} where {chapter}.{last + 1} belongs")
            last = int(match[2])


# -- rules for CUDA --------------------------------------------------------------------------------------

def inside(lines, begin, end):
    """Numbers of the lines from one that matches `begin` to the next that matches `end`."""
    found, open_block = set(), False
    for number, line in enumerate(lines, 1):
        open_block = open_block or bool(re.match(begin, line))
        if open_block:
            found.add(number)
            open_block = not re.match(end, line)
    return found


def check_cuda(report, name, lines):
    """What an emulator of a GPU has to put something else behind stands in one place each."""
    rules = (("assembly", r"\basm\b", "namespace ptx", inside(lines, r"namespace ptx \{", r"\}")),
             ("launches", "<<<", "launch", inside(lines, r"void launch\(", r"\}")),
             ("shared memory", r"\b__shared__\b", "SHARED and DYNAMIC_SHARED",
              inside(lines, r"#define (DYNAMIC_)?SHARED\(", r".*[^\\]$")))
    for rule, word, place, allowed in rules:
        complain = report.rule(rule)
        for number, line in enumerate(lines, 1):
            if (match := re.search(word, line.split("//")[0])) and number not in allowed:
                complain(name, number, f"{match[0]} outside of {place}")


# -- rules for the headers -------------------------------------------------------------------------------

def header_contents(lines):
    """(number, title) of each entry in the comment at the top: lines `//   N  title   more`, or what follows
    `Contents:`, as `N title; N title.`"""
    head = [line[2:] for line in itertools.takewhile(lambda line: line.startswith("//"), lines)]
    text = " ".join(head)
    if "Contents:" not in text:
        entries = (re.fullmatch(r"   (\d+) +(\S.*?) {2,}\S.*", line) for line in head)
        return [entry.groups() for entry in entries if entry]
    entries = text.split("Contents:")[1].split(".")[0].split(";")
    return [tuple(" ".join(entry.split()).split(" ", 1)) for entry in entries]


def check_header_contents(report, name, lines):
    """The contents and the banners, `// -- N  title` or `// == N. Title`, are one list, numbered from 1. A
    banner may go on after its title: `title: more`."""
    complain = report.rule("header contents")
    table = header_contents(lines)
    banners = [(number, match[1], match[2]) for number, line in enumerate(lines, 1)
               if (match := re.match(r"// (?:--|==) (\d+|[A-Z]\.\d+)\.? {1,2}(.*?)(?: [-=]+)?$", line))]
    if not banners:
        complain(name, 1, "no sections")
    for i in range(max(len(table), len(banners))):
        entry = table[i] if i < len(table) else ("nothing", "")
        line, *banner = banners[i] if i < len(banners) else (len(lines), "nothing", "")
        title, expected = banner[1].casefold(), entry[-1].casefold()
        if entry[0] != banner[0] or banner[0] != str(i + 1) or not (title + ":").startswith(expected + ":"):
            complain(name, line, f"section '{' '.join(banner)}' where the contents have '{' '.join(entry)}'")
            break


# -- rules for functions ---------------------------------------------------------------------------------

def tidy(root, name):
    """clang-tidy's report on each function of a file and of the headers that it includes. simd.h is read once
    for each instruction set, in other namespaces: a place in it counts once. CUDA is read as C++ for the
    host, as the tests compile it."""
    options = {"LineThreshold": 0, "StatementThreshold": 0, "ParameterThreshold": PARAMETERS,
               "NestingThreshold": NESTING + 1}      # clang-tidy counts the function's body as the first
    config = ", ".join(f"{{key: readability-function-size.{k}, value: {v}}}" for k, v in options.items())
    command = ["clang-tidy", "--quiet", "--checks=-*,readability-function-size",
               f"--config={{CheckOptions: [{config}]}}", f"--header-filter=({'|'.join(BOOKS[name])})$",
               str(root / name), "--", "-xc++", "-std=c++20", "-fopenmp", f"-I{root}", f"-I{root}/tests/gpu",
               *(f"-isystem{folder}/include" for folder in CUDA)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout


def percentile(sorted_values, share):
    return sorted_values[math.ceil(share * len(sorted_values)) - 1]


def check_functions(report, root, name):
    size, spread, parameters, nesting, parse = map(report.rule, (
        "function lines", "function lines, median and p90", "parameters", "nesting", "clang-tidy"))
    code, output = tidy(root, name)
    lengths, current = {}, None
    for line in output.splitlines():
        match = re.match(r"(\S+?):(\d+):\d+: (warning|error|note): (.*)", line)
        if not match:
            continue
        file = os.path.relpath(match[1], root)
        number, kind, text = int(match[2]), match[3], match[4]
        if kind == "error":
            parse(file, number, text)
        elif named := re.match(r"function '(.*)' exceeds", text):
            current = (file, number, named[1])
            first = current not in lengths
            lengths.setdefault(current, 1)
        elif match := re.match(r"(\d+) lines including", text):
            lengths[current] = int(match[1]) + 1
        elif not first:
            continue
        elif match := re.match(r"(\d+) parameters", text):
            parameters(file, number, f"{current[2]}: {match[1]} parameters, at most {PARAMETERS}")
        elif text.startswith("nesting level"):
            nesting(file, number, f"{current[2]}: blocks nested deeper than {NESTING}")
    if code != 0 or not lengths:
        parse(name, 1, f"clang-tidy ended with {code} and saw {len(lengths)} functions")
        return
    for (file, number, function), lines in lengths.items():
        if lines > FUNCTION_MAX:
            size(file, number, f"{function}: {lines} lines, at most {FUNCTION_MAX}")
    ordered = sorted(lengths.values())
    for share, what, limit in ((0.5, "the median", FUNCTION_MEDIAN), (0.9, "nine of ten", FUNCTION_P90)):
        if percentile(ordered, share) > limit:
            spread(name, 1, f"{what} of {len(ordered)} functions: {percentile(ordered, share)} lines, "
                   f"at most {limit}")


def check_python(report, root):
    rules = ("Python function lines", "Python parameters", "Python syntax")
    size, parameters, parse = map(report.rule, rules)
    for name in tracked(root):
        text = "\n".join(text_lines(root, name))
        if not name.endswith(".py") and not re.match(r"#!.*python", text):
            continue
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            parse(name, error.lineno, error.msg)
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            lines = node.end_lineno - node.lineno + 1
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if lines > FUNCTION_MAX:
                size(name, node.lineno, f"{node.name}: {lines} lines, at most {FUNCTION_MAX}")
            if count > PARAMETERS:
                parameters(name, node.lineno, f"{node.name}: {count} parameters, at most {PARAMETERS}")


# -- the whole -------------------------------------------------------------------------------------------

def check(root):
    report = Report()
    check_lines(report, root)
    check_file_lines(report, root)
    for name in BOOKS:
        lines = text_lines(root, name)
        check_contents(report, name, lines)
        check_chapter_lines(report, name, lines)
        check_sections(report, name, lines)
        if CUDA or not re.search("^#include <cuda", "\n".join(lines), re.MULTILINE):
            check_functions(report, root, name)
    check_cuda(report, "deepseek.cu", text_lines(root, "deepseek.cu"))
    for name in (*HEADERS, TWINS):
        if (root / name).exists():
            check_header_contents(report, name, text_lines(root, name))
    check_python(report, root)
    return report


GOOD = """// A book.
// =====
// Chapter 0. How to read
// =====
//
//   0   How to read            contents
//   1   Ground rules           errors, memory
//   3   Files                  what is in them
//
#include "tokenizer.h"
#include "gguf.h"
#include "simd.h"
// =====
// Chapter 1. Ground rules
// =====
// -- 1.1  one
int one(int a) {
    if (a) {
        while (a > 2) { if (a > 3) { a--; } }
    }
    return a;
}
// -- 1.2  two
int two(int, int, int, int, int, int, int, int) { return 2; }
// =====
// Chapter 3. Files
// =====
// -- 3.1  three
int three() { return 3; }
"""

TOKENIZER = """// tokenizer.h: text.
//
// Contents: 1 errors, JSON;
//           2 the tokenizer.
#pragma once
// == 1. Errors, JSON ==
// == 2. The tokenizer ==
inline int four() {
    return 4;
}
"""

GGUF = """// gguf.h: files.
//
// Contents: 1 the container; 2 writing.
//
// Needs chapter 1.
// -- 1  the container: checked --------
// -- 2  writing ------
inline int five() { return 5; }
"""

SYSTEM = """// system.h: signals.
//
// Contents: 1 files; 2 signals.
//
// -- 1  files --------
// -- 2  signals ------
inline int seven() { return 7; }
"""

# Two passes, as in the real one, with their targets where the compiler has them.
SIMD = """// simd.h: fast.
//
//   1  Kernels                written once
//   2  The passes             for each instruction set
//
#ifdef SIMD_BITS
// -- 1  Kernels --
inline int six(int a) { return a + SIMD_BITS; }
#else
// -- 2  The passes --
#ifdef __x86_64__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#endif
namespace avx2 {
#define SIMD_BITS 256
#include "simd.h"
#undef SIMD_BITS
}
#ifdef __x86_64__
#pragma clang attribute pop
#endif
namespace avx512 {
#define SIMD_BITS 512
#include "simd.h"
#undef SIMD_BITS
}
#endif
"""

CUDA_BOOK = """// A twin.
// =====
// Chapter 0. How to read
// =====
//
//   0   How to read            contents
//   2   Numbers                how they lie
//
#ifdef __CUDACC__
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name) \\
    extern __shared__ T name[]
void launch(int a) {
    f<<<1, 2>>>(a);            // and there is no other <<<
}
#endif
// =====
// Chapter 2. Numbers
// =====
namespace ptx {
inline void nothing() { asm("nop"); }
}
// -- 2.1  one
inline int seven(int a) {
    ptx::nothing();
    return a;
}
#include "tests/twins/twins.h"
"""

TWIN_CASES = """// What is compared.
//
// Contents: 1 a case; 2 chapter 2.
#pragma once
// -- 1  a case ---
inline int eight() { return 8; }
// -- 2  chapter 2 ---
inline int nine() { return 9; }
"""

DEEP = "while (a > 2) { if (a > 3) { if (a > 4) { a--; } } }"
LONG = "int long_one(int a) {\n" + "    a++;\n" * 130 + "    return a;\n}\n"
MANY = "".join(f"int many{i}(int a) {{\n" + "    a++;\n" * 60 + "    return a;\n}\n" for i in range(2))
MEDIUM = "".join(f"int medium{i}(int a) {{\n" + "    a++;\n" * 20 + "    return a;\n}\n" for i in range(8))

# (rule, file, text before, text after, line of the violation or None)
PLANTED = [
    ("columns", "deepseek.cpp", "// A book.", "// " + "ä" * (COLUMNS - 2), 1),
    ("columns", "tests/a.py", "pass", "# " + "x" * COLUMNS, 2),
    ("columns", "tests/run", "echo", "# " + "x" * COLUMNS, 2),
    ("machine paths", "README.md", "A readme", "see /ho" + "me/ann/x", 1),
    ("machine paths", "deepseek.cpp", "// A book.", '// "/tm' + 'p/x"', 1),
    ("open ends", "tokenizer.h", "inline", "inline /* TO" + "DO */", 8),
    ("open ends", "README.md", "A readme", "FIX" + "ME", 1),
    *(("file lines", name, "// ", "\n" * limit + "// ", None) for name, limit in FILE_LINES.items()),
    ("contents", "deepseek.cpp", "//   1   Ground rules  ", "//   1   Ground rule  ", 14),
    ("contents", "deepseek.cpp", "//   3   Files                  what is in them\n", "", 25),
    ("contents", "deepseek.cpp", "Chapter 1. Ground", "Chapter 2. Ground", 14),
    ("contents", "deepseek.cpp", "//\n#include", "//   4   Server                 HTTP\n#include", None),
    ("contents", "deepseek.cpp", "Chapter 3. Files", "Chapter 1. Files", 26),
    ("contents", "deepseek.cpp", "Chapter 3. Files", "Chapter A. Files", 26),
    ("contents", "deepseek.cpp", "Chapter 3. Files", "Appendix A. Files", 26),
    ("chapter lines", "deepseek.cpp", "// -- 3.1", "\n" * 500 + "// -- 3.1", 26),
    ("chapter lines", "deepseek.cpp", "// -- 1.1", "\n" * 250 + "// -- 1.1", 14),
    ("sections", "deepseek.cpp", "// -- 1.2", "// -- 1.1", 23),
    ("sections", "deepseek.cpp", "// -- 3.1", "// -- 1.3", 28),
    ("sections", "deepseek.cpp", "// -- 1.2", "// -- 1.3", 23),
    ("header contents", "tokenizer.h", "Errors, JSON", "Errors", 6),
    ("header contents", "tokenizer.h", "2 the", "3 the", 7),
    ("header contents", "gguf.h", "; 2 writing", "", 7),
    ("header contents", "gguf.h", "container: ", "container, ", 6),
    ("header contents", "gguf.h", "// -- 2  writing", "", None),
    ("header contents", "simd.h", "//   2  The passes", "//   2  Passes", 10),
    ("header contents", "simd.h", "// -- 2  ", "// -- A.2  ", 10),
    ("function lines", "deepseek.cpp", "// -- 1.2", LONG + "// -- 1.2", 23),
    ("function lines", "tokenizer.h", "inline", LONG + "inline", 8),
    ("function lines", "gguf.h", "inline", LONG.replace("int", "inline int", 1) + "inline", 8),
    ("function lines", "simd.h", "inline", LONG.replace("int", "inline int", 1) + "inline", 8),
    ("parameters", "simd.h", "six(int", "six(int, int, int, int, int, int, int, int, int", 8),
    ("function lines, median and p90", "deepseek.cpp", "// -- 1.2", MANY + "// -- 1.2", 1),
    ("function lines, median and p90", "deepseek.cpp", "// -- 1.2", MEDIUM + "// -- 1.2", 1),
    ("parameters", "deepseek.cpp", "two(int,", "two(int, int,", 24),
    ("nesting", "deepseek.cpp", "while (a > 2) { if (a > 3) { a--; } }", DEEP, 19),
    ("contents", "deepseek.cu", "//   2   Numbers  ", "//   2   Digits  ", 18),
    ("contents", "deepseek.cu", "Chapter 2. Numbers", "Chapter 3. Numbers", 18),
    ("chapter lines", "deepseek.cu", "// -- 2.1", "\n" * 500 + "// -- 2.1", 18),
    ("sections", "deepseek.cu", "// -- 2.1", "// -- 2.2", 23),
    ("assembly", "deepseek.cu", "ptx::nothing()", 'asm("nop")', 25),
    ("assembly", "deepseek.cu", "namespace ptx {\n", "namespace p {\n", 21),
    ("launches", "deepseek.cu", "#endif", "void g(int a) { f<<<1, 2>>>(a); }\n#endif", 16),
    ("shared memory", "deepseek.cu", "#endif", "void g() { __shared__ int a[2]; }\n#endif", 16),
    ("shared memory", "deepseek.cu", "    extern __shared__ T name[]\n",
     "    1\nextern __shared__ int n[];\n", 13),
    ("function lines", "deepseek.cu", "// -- 2.1", LONG + "// -- 2.1", 23),
    ("function lines", TWINS, "inline", LONG.replace("int", "inline int", 1) + "inline", 6),
    ("nesting", "deepseek.cu", "return a;", "if (a) { " + DEEP + " } return a;", 26),
    ("parameters", TWINS, "nine(", "nine(int, int, int, int, int, int, int, int, int", 8),
    ("header contents", TWINS, "; 2 chapter 2", "", 7),
    ("clang-tidy", "deepseek.cu", "return a;", "return b;", 26),
    ("clang-tidy", "deepseek.cpp", "return 3;", "return 3", 29),
    ("Python function lines", "tests/a.py", "    pass\n", "    pass\n" * 130, 1),
    ("Python parameters", "tests/a.py", "f()", "f(a, b, c, d, e, f, g, h, *, i)", 1),
    ("Python syntax", "tests/a.py", "f()", "f(", 1),
]


def planted(change):
    """The rules that a small tree breaks once `change` (file, before, after) is made in it."""
    files = {"deepseek.cpp": GOOD, "tokenizer.h": TOKENIZER, "gguf.h": GGUF, "simd.h": SIMD,
             "system.h": SYSTEM, "cli.h": SYSTEM.replace("system.h", "cli.h"),
             "ranks.h": SYSTEM.replace("system.h", "ranks.h"),
             "pipeline.h": SYSTEM.replace("system.h", "pipeline.h"),
             "deepseek.cu": CUDA_BOOK, TWINS: TWIN_CASES, "README.md": "A readme\n",
             "tests/run": "#!/bin/sh\necho\n", "tests/a.py": "def f():\n    pass\n"}
    if change:
        name, before, after = change
        assert files[name].count(before) >= 1, change
        files[name] = files[name].replace(before, after, 1)
    root = pathlib.Path(tempfile.mkdtemp())
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    report = check(root)
    shutil.rmtree(root)
    return {rule: found for rule, found in report.rules.items() if found}


def selftest():
    failed = 0
    if clean := planted(None):
        failed += 1
        print("a clean tree is accused:", clean)
    for rule, name, before, after, line in PLANTED:
        found = planted((name, before, after))
        place = f"{name}:{line}:" if line else f"{name}:"
        # The planted text may break a second rule too; the one that it was made for must see it.
        seen = [v for v in found.get(rule, []) if v.startswith(place)]
        if not seen or len(seen) != len(set(seen)):
            failed += 1
            print(f"not seen once: {rule}, planted at {place} (seen: {found})")
    print(f"style-selftest: {len(PLANTED) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


def main(arguments):
    if arguments == ["--selftest"]:
        return selftest()
    report = check(pathlib.Path(__file__).resolve().parents[1])
    print(*report.violations(), sep="\n", end="\n" if report.violations() else "")
    kept = sum(not found for found in report.rules.values())
    print(f"style: {kept} passed, {len(report.rules) - kept} failed")
    return 1 if report.violations() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
