#!/usr/bin/env python3
"""Cuts published tokenizers down to what a selection of golden texts needs, and writes the two side by side.

    pip install tokenizers jinja2
    tests/golden/tokenizer/cut.py FOLDERS GOLDEN

FOLDERS/NAME holds tokenizer.json and tokenizer_config.json, GOLDEN the lines that tokenizer_all.py explains.
This folder gets NAME/ with the cut files, and with the selection NAME.jsonl, NAME.decode.jsonl,
templates.jsonl.

Ids are the published ones. Kept are the tokens of the texts, the bytes, the added tokens, and the merges that
were possible at any moment while the texts were encoded. That changes no answer: merging always does the
possible merge of lowest rank, and each such merge was kept, so at every step it is still there and still the
lowest; at the end no merge was possible, so none is now.

Everything is checked before it is written: the ids against the library `tokenizers`, with the whole file and
with the cut one; the prompts against Jinja2 with the model's own template, as transformers sets it up.
"""
import collections
import json
import pathlib
import sys

import jinja2
import jinja2.sandbox
import tokenizers

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ("deepseek-v2", "deepseek-v3", "deepseek-r1", "r1-distill-qwen", "r1-distill-llama")
LINES_PER_TAG, TEXT_LIMIT = 20, 900          # the first of each tag; longer texts only if it has no others


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, items):
    path.write_text("".join(json.dumps(i, separators=(",", ":")) + "\n" for i in items), encoding="ascii")


def select(items):
    """The first lines of each tag. unicode16 is left out: the answers depend on the tables of PCRE2."""
    by_tag = collections.defaultdict(list)
    for item in items:
        if item["tag"] != "unicode16":
            by_tag[item["tag"]].append(item)
    chosen = []
    for tagged in by_tag.values():
        short = [i for i in tagged if len(i["text"]) <= TEXT_LIMIT]
        chosen += (short or tagged)[:LINES_PER_TAG if short else 2]
    return chosen


def possible_merges(piece, ranks):
    """All merges that are possible at some moment while `piece`, spelled, is merged as the textbook says."""
    symbols, seen = list(piece), set()
    while True:
        possible = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in ranks]
        seen.update((symbols[i], symbols[i + 1]) for _, i in possible)
        if not possible:
            return seen
        _, i = min(possible)
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]


class Cutter:
    def __init__(self, folder):
        self.whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.library = tokenizers.Tokenizer.from_str(json.dumps(self.whole))
        model = self.whole["model"]
        self.pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self.token_of = {id: token for token, id in model["vocab"].items()}
        self.tokens = {t for t in model["vocab"] if len(t) == 1}
        self.merges = set()

    def keep_text(self, text):
        if self.library.normalizer:
            text = self.library.normalizer.normalize_str(text)
        for piece, _ in self.library.pre_tokenizer.pre_tokenize_str(text):
            if len(piece) <= 500:            # else the tokens' own merges, see keep_ids, are enough
                self.merges |= possible_merges(piece, self.ranks)

    def keep_ids(self, ids):
        """The merges inside a token are those of its bytes alone, as none reached over its ends."""
        for id in ids:
            if token := self.token_of.get(id):
                self.tokens.add(token)
                self.merges |= possible_merges(token, self.ranks)

    def cut(self):
        """The cut tokenizer.json."""
        for left, right in self.merges:
            self.tokens |= {left, right, left + right}
        cut, model = dict(self.whole), dict(self.whole["model"])
        names = {a["content"] for a in self.whole["added_tokens"]}
        model["vocab"] = {t: id for t, id in model["vocab"].items() if t in self.tokens or t in names}
        model["merges"] = [m for m, pair in zip(model["merges"], self.pairs) if pair in self.merges]
        cut["model"] = model
        return cut


def check_ids(name, tokenizer, items):
    """Ids are looked up by token, as the library numbers added tokens itself where a vocabulary has gaps."""
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    id_of = tokenizer["model"]["vocab"] | {a["content"]: a["id"] for a in tokenizer["added_tokens"]}
    for item in items:
        ids = [id_of[t] for t in library.encode(item["text"], add_special_tokens=False).tokens]
        if ids != item["ids"]:
            sys.exit(f"{name}: {item['text']!r} has the ids {ids}, the line says {item['ids']}")


def check_prompts(name, config, items):
    """Renders with the template of tokenizer_config.json."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template"])
    token = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
    for item in items:
        text = template.render(messages=item["messages"], tools=item["tools"], **token,
                               add_generation_prompt=item["add_generation_prompt"])
        if text != item["text"]:
            sys.exit(f"{name}: {item['messages']} gives {text!r}, the line says {item['text']!r}")


def make(name, folder, golden, templates):
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    encode = select(read_lines(golden / f"{name}.jsonl"))
    decode = select(read_lines(golden / f"{name}.decode.jsonl"))
    prompts = [t for t in templates if t["template"] == name]
    check_prompts(name, config, prompts)
    cutter = Cutter(folder)
    check_ids(name, cutter.whole, encode + prompts)
    for item in encode + prompts:
        cutter.keep_text(item["text"])
    for item in encode + prompts + decode:
        cutter.keep_ids(item["ids"])
    cut = cutter.cut()
    check_ids(name, cut, encode + prompts)
    out = HERE / name
    out.mkdir(exist_ok=True)
    for file, content in ("tokenizer.json", cut), ("tokenizer_config.json", config):
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (out / file).write_text(text + "\n", encoding="utf-8", newline="\n")
    write_lines(HERE / f"{name}.jsonl", encode)
    write_lines(HERE / f"{name}.decode.jsonl", decode)
    model = cut["model"]
    print(f"{name}: {len(encode)} texts, {len(decode)} lists of ids, {len(prompts)} prompts; "
          f"{len(model['vocab'])} tokens, {len(model['merges'])} merges")


def main(arguments):
    if len(arguments) != 2:
        sys.exit(__doc__)
    folders, golden = map(pathlib.Path, arguments)
    templates = read_lines(golden / "templates.jsonl")
    for name in NAMES:
        make(name, folders / name, golden, templates)
    write_lines(HERE / "templates.jsonl", templates)


if __name__ == "__main__":
    main(sys.argv[1:])
