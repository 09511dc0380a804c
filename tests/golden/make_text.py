"""Makes tests/golden/text: token ids, rendered prompts and greedy answers that the golden tests expect.

    python3 tests/golden/make_text.py            needs numpy, tokenizers 0.23.3 and jinja2 3.1.6

text/unicode/tokenizer.json   a byte-level BPE trained on TRAINING, with the pre-tokenizer of weights/tiny:
                              its merges run through letters that are not ASCII, so how text is cut shows
text/ids.jsonl                texts and their ids from the Rust library `tokenizers`; conversations, their
                              prompts as Jinja renders the model's own template, and those prompts' ids
text/samples.jsonl            questions for weights/tiny and its greedy answers by reference.py in float64,
                              each with the smallest gap between the best two logits on the way
"""
import json
import os

for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[v] = "1"
import jinja2.sandbox
import numpy as np
import tokenizers

import reference as R

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
TINY, UNICODE = "weights/tiny", "tests/golden/text/unicode"

TRAINING = ["l'été à Orléans, déjà né, été, été, là où Zoé",
            "größer als fünf Füße, größer, für Größe, fünf", "привет, мир! привет всем, мир и труд",
            "γειά σου κόσμε, κόσμε, κόσμος", "你好,世界。世界你好,你好吗", "こんにちは世界、こんにちは", "नमस्ते दुनिया, नमस्ते",
            "the theory, then the other thing", "we're, it's, don't",
            "x = y  +  z;\n\n    if (x == 12345) return;", "hello world, hello worlds, hello"]
TEXTS = ["", "hello world", "helloworld", " hello", "hello  world   again", "\thello\n\n  world \n",
         "don't we're it's", "12345 67 8901234", "x = y  +  z;\n\n    if (x == 12345) return;",
         "l'été à Orléans", "ÉTÉ été e\u0301te\u0301", "größer als fünf Füße", "привет, мир!", "ПРИВЕТ мир",
         "γειά σου κόσμε", "你好,世界。", "你好 world", "こんにちは世界", "नमस्ते दुनिया",
         "\u0661\u0662\u0663\u0664 ١٢ ²³", "a\u00a0b\u2003c\u3000d", "\U0001f600\U0001f1e9\U0001f1ea!",
         "How many r are in strawberry?", "<think>\nsecret\n</think>\n\n4", "<｜User｜>hi<｜Assistant｜>",
         "</thi nk>", "a" * 70, " " * 17, "the theory\r\nthen"]
user, assistant, system = [lambda c, r=r: {"role": r, "content": c} for r in ("user", "assistant", "system")]
CHATS = [[user("Add 6 and 77.")], [system("Be brief."), user("402 - 9")], [user("")],
         [user("2*9=?"), assistant("2 * 9\nSo 18\n</think>\n\n2 * 9 = 18."), user("And 3*9?")],
         [system("A."), system("B."), user("hi"), assistant("no thought"), user("Sort 54 65 58.")]]


def read_json(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return json.load(f)


def write_lines(name, items):
    with open(os.path.join(HERE, "text", name), "w", encoding="utf-8") as f:
        for item in items:
            f.write(json.dumps(item, ensure_ascii=False) + "\n")


def train_unicode():
    pre = json.dumps(read_json(TINY, "tokenizer.json")["pre_tokenizer"])
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spec = json.loads(t.to_str())
    spec["pre_tokenizer"] = json.loads(pre)
    spec["decoder"] = read_json(TINY, "tokenizer.json")["decoder"]
    t = tokenizers.Tokenizer.from_str(json.dumps(spec))
    alphabet, special = tokenizers.pre_tokenizers.ByteLevel.alphabet(), ["<｜begin▁of▁sentence｜>"]
    t.train_from_iterator(TRAINING, tokenizers.trainers.BpeTrainer(
        vocab_size=480, show_progress=False, initial_alphabet=alphabet, special_tokens=special))
    folder = os.path.join(HERE, "text", "unicode")
    os.makedirs(folder, exist_ok=True)
    t.save(os.path.join(folder, "tokenizer.json"), pretty=False)


def load(folder):
    return tokenizers.Tokenizer.from_file(os.path.join(ROOT, folder, "tokenizer.json"))


def rendered(messages):
    """As transformers renders a chat template, with a prompt for the answer."""
    config = read_json(TINY, "tokenizer_config.json")
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return jinja.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=True, bos_token=config["bos_token"]["content"],
        eos_token=config["eos_token"]["content"])


def ids_lines():
    for folder in (TINY, UNICODE):
        t = load(folder)
        for text in TEXTS:
            yield {"tokenizer": folder, "text": text, "ids": t.encode(text, add_special_tokens=False).ids}
    t = load(TINY)
    for messages in CHATS:
        prompt = rendered(messages)
        ids = t.encode(prompt, add_special_tokens=False).ids
        yield {"tokenizer": TINY, "messages": messages, "prompt": prompt, "ids": ids}


def greedy(t, question, eos):
    ids, gap = t.encode(rendered([user(question)]), add_special_tokens=False).ids, np.inf
    prompt = len(ids)
    while True:
        logits = R.forward(os.path.join(ROOT, TINY), ids)["logits"][-1]
        second, best = np.sort(logits)[-2:]
        gap = min(gap, best - second)
        if np.argmax(logits) == eos:
            return t.decode(ids[prompt:], skip_special_tokens=True), gap
        ids.append(int(np.argmax(logits)))


def samples():
    t, eos = load(TINY), 1
    with open(os.path.join(HERE, "text", "samples.jsonl"), encoding="utf-8") as f:
        old = [json.loads(line) for line in f]
    for s in old:
        text, gap = greedy(t, s["question"], eos)
        print(("same " if text == s["text"] else "OTHER"), f"{gap:.2e}", s["question"], flush=True)
        yield {"question": s["question"], "text": text, "gap": float(f"{gap:.2g}")}


if __name__ == "__main__":
    train_unicode()
    write_lines("ids.jsonl", ids_lines())
    write_lines("samples.jsonl", list(samples()))
