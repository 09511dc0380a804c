#!/usr/bin/env python3
"""Checks `deepseek tokenize` against golden answers for whole, published tokenizers.

    tests/golden/tokenizer_all.py DEEPSEEK FOLDER... GOLDEN

A FOLDER holds a model folder for each tokenizer (of several, the first that has it counts), GOLDEN the lines:

    NAME.jsonl          {"tag", "text", "ids"}        encoding, no BOS
    NAME.decode.jsonl   {"tag", "ids", "text"}        decoding, special tokens kept
    templates.jsonl     {"template": NAME, "messages", "tools", "add_generation_prompt", "text", "ids"}

Run by hand, as whole tokenizers are too big to ship; tests/golden/tokenizer has cut ones. Lines tagged
unicode16 have characters that Unicode 15.0 to 16.0 assigned. PCRE2's tables may be older: then it takes such
a character for unassigned, neither a letter nor a sign, and cuts differently. These are counted apart.
"""
import collections
import json
import pathlib
import subprocess
import sys
import unicodedata


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def answers(deepseek, folder, options, questions):
    """The answers of one process to all questions, each a JSON value."""
    command = [str(deepseek), "tokenize", "-m", str(folder), "--lines", *options]
    text = "".join(json.dumps(q) + "\n" for q in questions)
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
    lines = done.stdout.split("\n")
    if done.returncode != 0 or len(lines) != len(questions) + 1:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}, {len(lines) - 1} answers to "
                 f"{len(questions)} questions: {done.stderr}")
    return [json.loads(line) for line in lines[:-1]]


def has_unassigned(text):
    """Whether this Python's own tables (3.11: Unicode 14, 3.12: 15, 3.13: 15.1) miss some character."""
    return any(unicodedata.category(c) == "Cn" for c in text)


class Counts:
    def __init__(self):
        self.right, self.wrong, self.apart = (collections.Counter() for _ in range(3))

    def compare(self, what, items, key, got):
        for item, answer in zip(items, got):
            if answer == item[key]:
                self.right[what] += 1
            elif item.get("tag") == "unicode16" and has_unassigned(item["text"]):
                self.apart[what] += 1
            else:
                self.wrong[what] += 1
                print(f"{what}: {json.dumps(item)}\n    got {json.dumps(answer)}")

    def show(self):
        for what in sorted(self.right | self.wrong | self.apart):
            print(f"{what:32} {self.right[what]:4} right, {self.wrong[what]} wrong", end="")
            print(f", {self.apart[what]} newer than PCRE2's Unicode tables" if self.apart[what] else "")


def check_tokenizer(counts, deepseek, folder, name, golden):
    def ask(what, file, options, question, answer):
        items = read_lines(file)
        got = answers(deepseek, folder, options, [item[question] for item in items])
        counts.compare(f"{name} {what}", items, answer, got)

    ask("encode", golden / f"{name}.jsonl", [], "text", "ids")
    ask("decode", golden / f"{name}.decode.jsonl", ["--decode"], "ids", "text")


def check_templates(counts, deepseek, folder, name, items):
    chats = [{k: i[k] for k in ("messages", "tools", "add_generation_prompt")} for i in items]
    counts.compare(f"{name} render", items, "text", answers(deepseek, folder, ["--chat"], chats))
    counts.compare(f"{name} render, ids", items, "ids", answers(deepseek, folder, ["--chat", "--ids"], chats))


def main(arguments):
    if len(arguments) < 3:
        sys.exit(__doc__)
    deepseek, *folders, golden = (pathlib.Path(a).resolve() for a in arguments)
    templates = collections.defaultdict(list)
    for item in read_lines(golden / "templates.jsonl"):
        templates[item["template"]].append(item)
    counts = Counts()
    for decode in sorted(golden.glob("*.decode.jsonl")):
        name = decode.name.removesuffix(".decode.jsonl")
        found = [f / name for f in folders if (f / name / "tokenizer.json").exists()]
        if not found:
            sys.exit(f"no folder {name}")
        check_tokenizer(counts, deepseek, found[0], name, golden)
        if templates[name]:
            check_templates(counts, deepseek, found[0], name, templates[name])
    counts.show()
    right, wrong = counts.right.total(), counts.wrong.total()
    print(f"tokenizer-all: {right} passed, {wrong} failed")
    return 1 if wrong or not right else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
