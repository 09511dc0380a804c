"""Makes tests/golden/text: token ids, rendered prompts and greedy answers that the golden tests expect.

    python3 tests/golden/make_text.py            needs numpy, tokenizers 0.23.3 and jinja2 3.1.6

text/unicode/tokenizer.json   a byte-level BPE trained on TRAINING, with the pre-tokenizer of weights/tiny:
                              its merges run through letters that are not ASCII, so how text is cut shows
text/ids.jsonl                texts and their ids from the Rust library `tokenizers`; conversations, their
                              prompts as Jinja renders the model's own template, and those prompts' ids
text/templates/NAME.jinja     published chat templates, with whose texts in what public copies: SOURCES
text/templates/NAME.pretty    the same on many lines, as people write Jinja; Jinja renders it the same
text/templates.jsonl          random chats, rendered by Jinja with each of these and with those of tokenizer/;
                              no "text" where the template fails
text/samples.jsonl            questions for weights/tiny and its greedy answers by reference.py in float64,
                              each with the smallest gap between the best two logits on the way
"""
import json
import os
import random
import re

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


# V2-Chat-0628's could not be had.
SOURCES = {"v2.5": "huggingface.js' list of GGUF files' templates, the Berkeley function-calling leaderboard",
           "v3-0324": "the log of a GGUF file of V3-0324 by llama-cpp-python",
           "r1-0528": "copies of R1-0528-Qwen3-8B's, each changed at another place; vLLM's for R1-0528",
           "v3.1": "a log of ik_llama.cpp with a GGUF file; llama.cpp's, which adds a switch"}
FOLDERS = {"v2": "deepseek-v2", "v3": "deepseek-v3", "r1": "deepseek-r1", "r1-distill": "r1-distill-qwen"}


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


def template_of(name):
    if name in FOLDERS:
        return read_json("tests/golden/tokenizer", FOLDERS[name], "tokenizer_config.json")["chat_template"]
    with open(os.path.join(HERE, "text", "templates", f"{name}.jinja"), encoding="utf-8") as f:
        return f.read()


def render_chat(template, messages, add_generation_prompt, thinking):
    """As transformers renders it; None where that fails."""
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    more = {"thinking": True} if thinking else {}
    try:
        return jinja.from_string(template).render(
            messages=messages, tools=None, add_generation_prompt=add_generation_prompt,
            bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>", **more)
    except (TypeError, jinja2.UndefinedError):
        return None


def random_chat(noise):
    """As people chat, with tools, thoughts and answers that were begun; now and then as nobody does."""
    text = lambda: "".join(noise.choice(["", "a", " b", "c ", "\n", "</think>", "<think>", "é", "d\n\ne"])
                           for _ in range(noise.randrange(5)))
    call = lambda: {"type": "function", "function": {"name": noise.choice("fgh"), "arguments": "{\"x\": 1}"}}
    messages = [{"role": "system", "content": text()} for _ in range(noise.choice([0, 0, 1, 1, 2]))]
    for _ in range(noise.randrange(1, 6)):
        messages.append({"role": "user", "content": text()})
        while noise.random() < 0.4:
            content = noise.choice([None, text()])
            calls = [call() for _ in range(noise.choice([1, 1, 2, 3, 0]))]
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [{"role": "tool", "content": text()} for _ in range(noise.choice([1, 1, 2, 0]))]
        messages.append({"role": "assistant", "content": text()})
        if noise.random() < 0.2:
            messages[-1]["prefix"] = noise.random() < 0.8
    if noise.random() < 0.7:
        messages.pop()
    if noise.random() < 0.2:
        noise.shuffle(messages)
        messages.append({"role": "critic", "content": "x"})
    return messages


def template_lines():
    for name in (*FOLDERS, *SOURCES, "v3.1-thinking"):
        template, noise = template_of(name.removesuffix("-thinking")), random.Random(1)
        for _ in range(20):
            chat, prompt = random_chat(noise), noise.random() < 0.7
            text = render_chat(template, chat, prompt, name.endswith("-thinking"))
            yield {"template": name, "messages": chat, "add_generation_prompt": prompt,
                   **({} if text is None else {"text": text})}


def pretty(template, noise):
    """The template on many lines: newlines, blanks and comments wherever Jinja takes them away."""
    parts = re.split(r"(\{%.*?%\}|\{\{.*?\}\})", template, flags=re.DOTALL)
    out = "{# Pretty, isn't it? #}"
    for i, part in enumerate(parts):
        before, after = (parts[i - 1], parts[i + 1]) if 0 < i < len(parts) - 1 else ("{%", "{%")
        blank = lambda: "\n" * noise.randrange(3) + " " * noise.randrange(5)
        if part.strip() == "" and (after[2:3] == "-" or before[-3:-2] == "-"):
            out += blank() + noise.choice(["", "{#- what? -#}"]) + blank()
        elif part == "" and before.endswith("%}") and after.startswith("{%"):
            out += "\n" + " " * noise.randrange(5)
        elif i % 2 == 0:
            out += part
        else:
            words = re.split(r"('[^']*')", part)
            out += "".join(w if j % 2 else w.replace(" ", noise.choice([" ", "  ", "\n    "]))
                           for j, w in enumerate(words))
    return out + "\n"


def pretty_templates():
    for name in (*FOLDERS, *SOURCES):
        plain, noise = template_of(name), random.Random(name)
        text = pretty(plain, noise)
        for _ in range(200):
            chat, prompt = random_chat(noise), noise.random() < 0.7
            if render_chat(plain, chat, prompt, False) != render_chat(text, chat, prompt, False):
                raise SystemExit(f"{name}: the pretty template renders {chat} otherwise")
        with open(os.path.join(HERE, "text", "templates", f"{name}.pretty"), "w", encoding="utf-8") as f:
            f.write(text)


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
    pretty_templates()
    write_lines("templates.jsonl", template_lines())
    write_lines("ids.jsonl", ids_lines())
    write_lines("samples.jsonl", list(samples()))
