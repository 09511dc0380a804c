"""Damaged GGUF files, made from the tiny good ones. Each must be refused with a line that says what is wrong.

`all_cases()` gives (name, file's bytes, what the line must contain).
"""

import struct

import tiny_gguf
from gguf_model import TYPES, container, text

# Types that exist and are not supported, by the numbers that llama.cpp's ggml.h gives them.
NOT_READ = {
    "Q8_1": 9, "Q8_K": 15, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ3_S": 21, "IQ2_S": 22,
    "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
    "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}
# MLA has keys of its own for these.
IGNORED = ("attention.head_count_kv", "attention.key_length", "attention.value_length")


# -- the container ---------------------------------------------------------------------------------------


def container_cases(keys, tensors):
    """Bytes changed by place: the header, lengths, and the end."""
    data = container(keys, tensors)
    put = lambda at, form, value: data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]
    size = len(data)
    for n in [0, 3, 4, 8, 15, 23, 24, 31, 43, 100, *(size * i // 24 for i in range(1, 24)), size - 32]:
        yield f"cut at {n}", data[:n], ""
    yield "magic", b"GGUX" + data[4:], "not a GGUF file"
    yield "version 1", put(4, "<I", 1), "version 1"
    yield "version 2", put(4, "<I", 2), "version 2"
    yield "version 9", put(4, "<I", 9), "version 9"
    yield "big endian", put(4, ">I", 3), "big-endian"
    yield "a key longer than the file", put(24, "<Q", 1 << 40), "key 0"
    yield "a key's length wraps", put(24, "<Q", 2**64 - 8), "key 0"
    yield "a key of no bytes", put(24, "<Q", 0), "key 0"
    yield "43 bytes", data[:8] + b"\xff" * 35, ""
    for n in (0, 1, 1 << 20, 1 << 40, 2**63, 2**64 - 1):
        yield f"{n} tensors", put(8, "<Q", n), ""
        yield f"{n} keys", put(16, "<Q", n), ""
    value = data.replace(b"general.architecture\x08", b"general.architecture\x63", 1)
    yield "type of a value", value, "type 99"


def raw_value(keys, tensors, name, raw):
    """The file with `raw` in place of the type and value of a new key."""
    whole = container(keys, tensors)
    n_keys = len(keys) + 1
    plain = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), n_keys)
    return plain + text(name) + raw + whole[24:]


def value_cases(keys, tensors):
    make = lambda raw: raw_value(keys, tensors, "x.y", raw)
    yield "an array of arrays", make(struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 0)), "arrays"
    yield "an array longer than the file", make(struct.pack("<IIQ", 9, 4, 1 << 60)), "x.y"
    yield "texts more than the file has", make(struct.pack("<IIQ", 9, 8, 2**64 - 1)), ""
    yield "a bool of 2", make(struct.pack("<IB", 7, 2)), "neither true nor false"
    yield "a text longer than the file", make(struct.pack("<IQ", 8, 1 << 50)), "x.y"
    first = next(iter(keys))
    again = raw_value(keys, tensors, first, struct.pack("<I", 8) + text("x"))
    yield "a key twice", again, "twice"
    nul = raw_value(keys, tensors, "a\0b", struct.pack("<IB", 7, 1))
    yield "a key with NUL", nul, "NUL"


# -- keys ------------------------------------------------------------------------------------------------


def key_cases(keys, tensors):
    """Every number of the model: missing where it is needed, of a wrong type, out of range."""
    needed = (".block_count", ".context_length", "embedding_length", "2.feed_forward_length", "kv_lora_rank")
    for key in keys:
        kind, _ = keys[key]
        if not key.startswith("deepseek2.") or key.endswith(IGNORED) or kind not in ("u32", "f32"):
            continue
        if key.endswith(needed):
            yield f"no {key}", container({k: v for k, v in keys.items() if k != key}, tensors), f"'{key}'"
        wrong = {"a text": ("str", "7"), "negative": ("i32", -1), "huge": ("u64", 2**64 - 1)}
        if kind == "f32":
            wrong = {"a text": ("str", "7"), "negative": ("f32", -1), "not a number": ("f32", float("nan"))}
        wrong["an array of two"] = (["u32"], [1, 2]) if kind == "u32" else (["f32"], [1, 2])
        for name, value in wrong.items():
            yield f"{key} is {name}", container(keys | {key: value}, tensors), f"'{key}'"


def odd_key_cases(keys, tensors):
    change = lambda **more: container(keys | {k.replace("__", "."): v for k, v in more.items()}, tensors)
    yield "architecture", change(general__architecture=("str", "deepseek9")), "deepseek9"
    yield "architecture is a number", change(general__architecture=("u32", 2)), "general.architecture"
    yield "alignment 0", change(general__alignment=("u32", 0)), "general.alignment"
    yield "alignment 48", change(general__alignment=("u32", 48)), "power of two"
    yield "unknown attention", change(deepseek2__attention__sliding_window=("u32", 8)), "sliding_window"
    yield "unknown gate", change(deepseek2__expert_gating_func=("u32", 3)), "expert_gating_func"
    yield "rope scaling", change(deepseek2__rope__scaling__type=("str", "longrope")), "longrope"
    yield "more used than there are", change(deepseek2__expert_used_count=("u32", 5)), "expert_used_count"
    yield "groups that do not divide", change(deepseek2__expert_group_count=("u32", 3)), ""
    yield "all layers dense", change(deepseek2__leading_dense_block_count=("u32", 2)), ""
    yield "odd rope", change(deepseek2__rope__dimension_count=("u32", 7)), ""
    yield "another width", change(deepseek2__embedding_length=("u32", 64)), "token_embd.weight"
    yield "heads do not fit", change(deepseek2__attention__head_count=("u32", 3)), "attn_"
    yield "one layer more", change(deepseek2__block_count=("u32", 4)), ""


# -- tensors ---------------------------------------------------------------------------------------------


def table(keys, entries, data):
    """A file whose table of tensors is `entries`: (name, axes slowest first, type, offset)."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(keys)) + container(keys, {}, alignment=1)[24:]
    for name, axes, kind, offset in entries:
        head += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *reversed(axes), kind, offset)
    return head + b"\0" * (-len(head) % 32) + data


def table_cases(keys, tensors):
    entries, data = [], b""
    for name, (dtype, shape, content) in tensors.items():
        entries.append((name, shape, TYPES[dtype], len(data)))
        data += content + b"\0" * (-len(content) % 32)
    name, shape, kind, offset = entries[3]
    make = lambda *entry: table(keys, entries[:3] + [entry] + entries[4:], data)
    yield "no axes", make(name, (), kind, offset), "0 axes"
    yield "five axes", make(name, (1, 1, 1, 1, *shape), kind, offset), "5 axes"
    yield "axes that wrap", make(name, (2**40, 2**40), kind, offset), "axes are impossible"
    yield "an axis of 0", make(name, (0, *shape), kind, offset), "axes are impossible"
    yield "part of a block", make(name, (33,), TYPES["Q8_0"], offset), "axes are impossible"
    for other, number in NOT_READ.items():
        yield f"type {other}", make(name, shape, number, offset), f"type {number} {other} is not"
    yield "a type that is none", make(name, shape, 9999, offset), "9999"
    yield "overlap", make(name, shape, kind, offset - 32), f"'{name}'"
    yield "a gap", make(name, shape, kind, offset + 32), ""
    yield "an odd offset", make(name, shape, kind, offset + 1), ""
    yield "an offset beyond the end", make(name, shape, kind, 2**64 - 32), ""
    yield "a name of 65 bytes", make("n" * 65, shape, kind, offset), "65 bytes"
    yield "a name with NUL", make("a\0b", shape, kind, offset), "NUL"
    yield "a name twice", make(entries[2][0], shape, kind, offset), "twice"
    yield "a name of no tensor", make("blk.0.attn_z.weight", shape, kind, offset), "attn_z"
    yield "a layer too many", make("blk.9.attn_norm.weight", shape, kind, offset), ""
    yield "a layer with a zero", make("blk.00.attn_norm.weight", shape, kind, offset), "blk.00"
    yield "other axes", make(name, (*shape, 1), kind, offset), f"'{name}'"


def tensor_cases(keys, tensors):
    for name, (_, shape, content) in tensors.items():
        if name != "output.weight":  # without it, the embedding is the head
            yield f"no {name}", container(keys, {k: v for k, v in tensors.items() if k != name}), "tensor"
        if len(shape) == 1:
            nan = content[:4] + struct.pack("<f", float("nan")) + content[8:]
            yield f"{name} not finite", container(keys, tensors | {name: ("F32", shape, nan)}), f"'{name}'"
    norm = "output_norm.weight"
    (width,) = tensors[norm][1]
    wide, small = ("F16", (width * 2,), bytes(4 * width)), ("Q8_0", (width,), bytes(34 * width // 32))
    yield "a norm of twice the width", container(keys, tensors | {norm: wide}), f"'{norm}'"
    yield "a norm of small integers", container(keys, tensors | {norm: small}), "a vector cannot be"


# -- the vocabulary --------------------------------------------------------------------------------------


def vocabulary_cases(keys, tensors):
    change = lambda key, value: container(keys | {f"tokenizer.ggml.{key}": value}, tensors)
    without = lambda key: container({k: v for k, v in keys.items() if k != f"tokenizer.ggml.{key}"}, tensors)
    tokens, types = keys["tokenizer.ggml.tokens"][1], keys["tokenizer.ggml.token_type"][1]
    for key in ("model", "pre", "tokens", "token_type", "merges"):
        yield f"no {key}", without(key), f"tokenizer.ggml.{key}"
    yield "a sentencepiece model", change("model", ("str", "llama")), "tokenizer.ggml.model"
    yield "an unknown pre-tokenizer", change("pre", ("str", "gpt-9")), "gpt-9"
    yield "no name of a pre-tokenizer", change("pre", ("str", "")), "tokenizer.ggml.pre"
    yield "tokens are numbers", change("tokens", (["u32"], [1] * len(tokens))), "tokenizer.ggml.tokens"
    yield "a token is not UTF-8", change("tokens", (["str"], [b"\xff\xfe"] + tokens[1:])), "UTF-8"
    yield "a token too few", change("tokens", (["str"], tokens[:-1])), "types of tokens"
    yield "a token twice", change("tokens", (["str"], tokens[:1] + tokens[:-1])), ""
    yield "no tokens", container(
        keys | {"tokenizer.ggml.tokens": (["str"], []), "tokenizer.ggml.token_type": (["i32"], [])}, tensors
    ), ""
    yield "type of a token 9", change("token_type", (["i32"], types[:-1] + [9])), "tokenizer.ggml.token_type"
    yield "types are texts", change("token_type", (["str"], ["1"] * len(types))), "tokenizer.ggml.token_type"
    yield "a merge of one", change("merges", (["str"], ["ab"])), ""
    yield "a merge of three", change("merges", (["str"], ["a b c"])), ""
    yield "a merge of strangers", change("merges", (["str"], ["x y"])), ""
    yield "a merge into a stranger", change("merges", (["str"], ["b a"])), ""
    yield "eos beyond the vocabulary", change("eos_token_id", ("u32", len(tokens))), "eos_token_id"
    yield "bos is a text", change("bos_token_id", ("str", "<bos>")), "bos_token_id"
    yield "add_bos is a number", change("add_bos_token", ("u32", 1)), "add_bos_token"
    more = {
        "tokenizer.ggml.tokens": (["str"], tokens + [f"more{i}" for i in range(9)]),
        "tokenizer.ggml.token_type": (["i32"], types + [1] * 9),
    }
    yield "more tokens than rows of the embedding", container(keys | more, tensors), ""
    template = container(keys | {"tokenizer.chat_template": ("u32", 1)}, tensors)
    yield "the template is a number", template, "tokenizer.chat_template"


# -- all -------------------------------------------------------------------------------------------------


def all_cases():
    deepseek2, qwen2 = (tiny_gguf.all_models()[name] for name in ("deepseek2_q4_0", "qwen2_q8_0"))
    for cases in (container_cases, value_cases, key_cases, odd_key_cases, table_cases, tensor_cases):
        yield from cases(*deepseek2)
    for cases in (container_cases, table_cases, tensor_cases, vocabulary_cases):
        yield from ((f"qwen2: {name}", data, expect) for name, data, expect in cases(*qwen2))
