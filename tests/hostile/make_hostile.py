#!/usr/bin/env python3
"""Malformed model folders, made from a good one. Each says in its name what is wrong.

    tests/hostile/make_hostile.py DIRECTORY     writes all of them to DIRECTORY/NAME
    tests/hostile/run_hostile.py                runs the program on each

A folder is a dict: file name -> bytes, or a Special for what is no plain file.
"""

import copy
import dataclasses
import json
import math
import os
import pathlib
import socket
import struct
import sys

import good_model
from good_model import SHARDS, safetensors, with_header

FIRST, SECOND = SHARDS
INDEX, CONFIG, GENERATION = "model.safetensors.index.json", "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GOOD = good_model.good_folder()
TENSORS = good_model.good_tensors()
DEEP = 3000  # levels of nesting that no parser here should follow
OPENING = '{"a":'

WEIGHTS = ("info", "logits")  # which commands must see a damage: of the files as such,
BINDING = ("logits", "run")  # of what config.json asks of the files,
TALKING = ("run",)  # of what only a conversation needs,
TEXT = ("tokenize", "run")  # of the tokenizer


@dataclasses.dataclass
class Special:
    """No plain file: a fifo, directory, socket, symbolic link, unreadable file, or a file with a hole."""

    kind: str
    target: str = ""
    content: bytes = b""
    size: int = 0


@dataclasses.dataclass
class Case:
    name: str
    folder: dict
    expect: tuple  # what the one line on stderr must contain
    commands: tuple


def write_special(path, special):
    if special.kind == "fifo":
        os.mkfifo(path)
    elif special.kind == "directory":
        path.mkdir()
    elif special.kind == "link":
        path.symlink_to(special.target)
    elif special.kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    else:
        with open(path, "wb") as file:
            file.write(special.content)
            file.truncate(max(special.size, len(special.content)))
        if special.kind == "unreadable":
            path.chmod(0)


def write_folder(path, folder):
    path.mkdir(parents=True)
    for name, content in folder.items():
        if isinstance(content, Special):
            write_special(path / name, content)
        else:
            (path / name).write_bytes(content)


# -- how to damage -----------------------------------------------------------------------------------------

DROP = object()


def put(**files):
    """The good folder with other files; a name's dots are written as __."""
    return GOOD | {name.replace("__", "."): content for name, content in files.items()}


def swap(name, content):
    return GOOD | {name: content}


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


def edited(text, changes):
    """JSON text with some members of its object changed; a path's parts are joined with a slash."""
    root = json.loads(text)
    for path, value in changes.items():
        *parents, last = path.split("/")
        at = root
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at[part]
        if value is DROP:
            del at[last]
        elif isinstance(at, list):
            at[int(last)] = value
        else:
            at[last] = value
    return json.dumps(root).encode("utf-8", "surrogatepass")


def json_file(name, changes):
    return swap(name, edited(GOOD[name], changes))


def split(file):
    """Header text and data of a shard."""
    size = struct.unpack("<Q", GOOD[file][:8])[0]
    return GOOD[file][8 : 8 + size].decode(), GOOD[file][8 + size :]


HEADER, DATA = split(FIRST)
ONE, TWO = list(TENSORS[0])[:2]  # the first tensors of the first shard


def header(change):
    """The first shard with its header changed, by a dict of changes or a function of its text."""
    text = edited(HEADER, change) if isinstance(change, dict) else change(HEADER)
    return swap(FIRST, with_header(text, DATA))


def replaced(old, new):
    assert HEADER.count(old) == 1, old
    return header(lambda text: text.replace(old, new))


def tensor(name, dtype=None, shape=None, data=None):
    """The good folder with one tensor replaced by another whose bytes fit its dtype and shape."""
    shards = copy.deepcopy(TENSORS)
    shard = next(i for i in (0, 1) if name in shards[i])
    dtype, shape = dtype or shards[shard][name][0], shards[shard][name][1] if shape is None else shape
    size = math.prod(shape) * good_model.WIDTH[dtype]
    shards[shard][name] = (dtype, shape, (data or b"\0") * (size // len(data or b"\0")))
    return swap(SHARDS[shard], safetensors(shards[shard]))


def lost(name):
    """The good folder without one tensor, neither in its shard nor in the index."""
    shards = tuple({key: value for key, value in shard.items() if key != name} for shard in TENSORS)
    return packed(shards)


def packed(shards):
    """The good folder with other tensors in its shards."""
    index = json.dumps(good_model.index_of(shards)).encode()
    return GOOD | {file: safetensors(shard) for file, shard in zip(SHARDS, shards)} | {INDEX: index}


def extra(name, dtype="BF16", shape=(2, 2)):
    shards = copy.deepcopy(TENSORS)
    shards[1][name] = (dtype, list(shape), bytes(math.prod(shape) * good_model.WIDTH[dtype]))
    return GOOD | {SECOND: safetensors(shards[1]), INDEX: json.dumps(good_model.index_of(shards)).encode()}


def any_json(file, commands):
    """What can be wrong with every JSON file."""
    good, short = GOOD[file], file.removesuffix(".json").replace(".", "_")
    bad = {
        "empty": b"",
        "blank": b" \n\t",
        "byte_order_mark": b"\xef\xbb\xbf" + good,
        "cut_off": good[: len(good) // 2],
        "not_utf8": good.replace(b'"', b'"\xff', 1),
        "nul_byte": good[:-1] + b"\0}",
        "garbage_after": good + b"}",
        "array": b"[]",
        "number": b"1",
        "null": b"null",
        "single_quotes": good.replace(b'"', b"'"),
        "comment": b"// x\n" + good,
        "control_character": good.replace(b'"', b'"\x01', 1),
        "nested_deep": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "arrays_deep": b"[" * DEEP + b"]" * DEEP,
        "utf16": good.decode().encode("utf-16"),
        "constant_nan": b'{"a": NaN, ' + good.lstrip(b"{"),
        "directory": Special("directory"),
        "fifo": Special("fifo"),
        "socket": Special("socket"),
        "link_loop": Special("link", file),
        "endless_device": Special("link", "/dev/zero"),
        "empty_device": Special("link", "/dev/null"),
        "unreadable": Special("unreadable", content=good),
    }
    for what, content in bad.items():
        yield Case(f"{short}_{what}", swap(file, content), (file,), commands)


# -- safetensors -------------------------------------------------------------------------------------------


def file_cases():
    size = len(HEADER)
    long_header = Special("sparse", content=struct.pack("<Q", 100_000_001) + b"{", size=100_100_000)
    bad = {
        "empty": (b"", "empty"),
        "seven_bytes": (b"\0" * 7, "too short"),
        "header_zero": (bytes(8) + DATA, "not a JSON"),
        "header_beyond_file": (
            struct.pack("<Q", size + len(DATA) + 1) + HEADER.encode() + DATA,
            "longer than the file",
        ),
        "header_2_63": (struct.pack("<Q", 1 << 63) + HEADER.encode() + DATA, "limit"),
        "header_2_64_less_1": (b"\xff" * 8 + HEADER.encode() + DATA, "limit"),
        "header_over_100_mb": (long_header, "limit of 100 MB"),
        "cut_in_header": (GOOD[FIRST][: 8 + size // 2], "longer than the file"),
        "cut_in_data": (GOOD[FIRST][:-1], "data_offsets"),
        "no_data": (GOOD[FIRST][: 8 + size], "data_offsets"),
        "byte_after_data": (GOOD[FIRST] + b"\0", "1 bytes after the last tensor"),
        "zeros": (bytes(4096), "not a JSON"),
        "directory": (Special("directory"), "not a regular file"),
        "fifo": (Special("fifo"), "not a regular file"),
        "socket": (Special("socket"), ""),
        "endless_device": (Special("link", "/dev/zero"), "not a regular file"),
        "empty_device": (Special("link", "/dev/null"), "not a regular file"),
        "link_loop": (Special("link", FIRST), "symbolic links"),
        "link_to_nothing": (Special("link", "nothing"), "No such file"),
        "unreadable": (Special("unreadable", content=GOOD[FIRST]), "denied"),
    }
    for what, (content, text) in bad.items():
        yield Case(f"shard_{what}", swap(FIRST, content), (FIRST, text), WEIGHTS)
    yield Case("shard_missing", without(SECOND), (SECOND, "No such file"), WEIGHTS)
    yield Case(
        "shards_and_index_missing",
        {CONFIG: GOOD[CONFIG], TOKENIZER: GOOD[TOKENIZER]},
        ("model.safetensors",),
        BINDING,
    )


def header_cases():
    def text(change):
        return header(change)

    bad = {
        "array": lambda h: "[]",
        "null": lambda h: "null",
        "empty_object": lambda h: "{}",
        "blank_first": lambda h: " " + h,
        "byte_order_mark": lambda h: "\ufeff" + h,
        "not_utf8": lambda h: h.encode().replace(b"model", b"\xffodel", 1),
        "cut_off": lambda h: h[:-1],
        "garbage_after": lambda h: h + "x",
        "nul_after": lambda h: h + "\0\0",
        "unterminated_string": lambda h: h[:-1] + ',"x',
        "single_quotes": lambda h: h.replace('"', "'"),
        "nested_deep": lambda h: h[:-1] + ',"deep":' + OPENING * DEEP + "1" + "}" * DEEP + "}",
        "number_too_large": lambda h: h[:-1] + ',"x":1e999}',
        "duplicate_tensor": lambda h: h[:-1] + ',"' + ONE + '":{}}',
        "metadata_twice": lambda h: h[:-1] + ',"__metadata__":{}}',
    }
    for what, change in bad.items():
        yield Case(f"header_{what}", text(change), (FIRST,), WEIGHTS)
    for what, value in {
        "number": 1,
        "list": [],
        "number_inside": {"a": 1},
        "object_inside": {"a": {}},
    }.items():
        yield Case(
            f"header_metadata_{what}", header({"__metadata__": value}), (FIRST, "__metadata__"), WEIGHTS
        )
    names = {
        "empty": "",
        "with_nul": "a\0b",
        "with_newline": "a\nb",
        "with_escape": "\x1b[31m",
        "huge": "x" * 100_000,
        "surrogate": "\ud800",
    }
    for what, name in names.items():
        entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
        yield Case(f"tensor_name_{what}", header({name: entry}), (FIRST,), WEIGHTS)


def entry_cases():
    """Damaged entries of one tensor in the header."""
    begin, end = json.loads(HEADER)[ONE]["data_offsets"]
    size, huge = end - begin, 1 << 63
    bad = {
        "is_a_number": ("", 1, ""),
        "is_null": ("", None, ""),
        "without_dtype": ("/dtype", DROP, "dtype"),
        "without_shape": ("/shape", DROP, "shape"),
        "without_offsets": ("/data_offsets", DROP, "data_offsets"),
        "dtype_number": ("/dtype", 1, "dtype"),
        "dtype_empty": ("/dtype", "", "dtype"),
        "dtype_unknown": ("/dtype", "F4", "F4"),
        "dtype_lower_case": ("/dtype", "bf16", "bf16"),
        "dtype_huge": ("/dtype", "F" * 5000, "dtype"),
        "dtype_newline": ("/dtype", "F\n32", "dtype"),
        "shape_number": ("/shape", 1, "shape"),
        "shape_string": ("/shape", ["1"], "shape"),
        "shape_nested": ("/shape", [[1]], "shape"),
        "shape_float": ("/shape", [1.0], "shape"),
        "shape_negative": ("/shape", [-1, -size], "shape"),
        "shape_true": ("/shape", [True], "shape"),
        "shape_nine_axes": ("/shape", [1] * 9, "9 axes"),
        "shape_of_100000_axes": ("/shape", [1] * 100_000, "axes"),
        "shape_wraps_to_zero": ("/shape", [1 << 32, 1 << 32], "larger than any file"),
        "shape_wraps_to_size": ("/shape", [huge + size // 2], "larger than any file"),
        "shape_wraps_past_zero": ("/shape", [1 << 33, 1 << 33, 0], "larger than any file"),
        "shape_beyond_64_bits": ("/shape", [1 << 64], ""),
        "shape_of_no_elements": ("/shape", [0, size], "need 0 bytes"),
        "shape_too_small": ("/shape", [1], "need 2 bytes"),
        "dtype_of_other_width": ("/dtype", "F64", "data_offsets"),
        "offsets_number": ("/data_offsets", 0, "data_offsets"),
        "offsets_one": ("/data_offsets", [0], "data_offsets"),
        "offsets_three": ("/data_offsets", [begin, end, end], "data_offsets"),
        "offsets_negative": ("/data_offsets", [-size, 0], "data_offsets"),
        "offsets_float": ("/data_offsets", [0.0, float(size)], "data_offsets"),
        "offsets_reversed": ("/data_offsets", [end, begin], "data_offsets"),
        "offsets_beyond_data": ("/data_offsets", [len(DATA), len(DATA) + size], "data_offsets"),
        "offsets_near_2_64": ("/data_offsets", [(1 << 64) - size, (1 << 64) - 1], "data_offsets"),
        "offsets_string": ("/data_offsets", ["0", str(size)], "data_offsets"),
        "offsets_too_long": ("/data_offsets", [begin, end + 1], "data_offsets"),
        "offsets_leave_gap": ("/data_offsets", [begin + 2, end + 2], "gap"),
    }
    for what, (field, value, text) in bad.items():
        named = () if what == "shape_beyond_64_bits" or "gap" in what else (ONE,)
        yield Case(f"tensor_{what}", header({ONE + field: value}), (FIRST, text, *named), WEIGHTS)
    entries = json.loads(HEADER)
    same = header({TWO: entries[ONE]})
    yield Case("tensor_overlaps_another", same, (FIRST, "overlaps another one"), WEIGHTS)
    yield Case(
        "tensor_key_twice",
        replaced('"%s": {' % ONE, '"%s": {"dtype": "F32", ' % ONE),
        (FIRST, ONE, "dtype"),
        WEIGHTS,
    )


# -- index -------------------------------------------------------------------------------------------------


def shard_name_cases():
    names = {
        "number": 1,
        "null": None,
        "empty": "",
        "in_parent": "../" + FIRST,
        "absolute": "/dev/" + FIRST,
        "in_folder": "x/" + FIRST,
        "with_nul": FIRST + "\0.safetensors",
        "other_extension": "model.bin",
        "parent": "..",
        "huge": "x" * 5000 + ".safetensors",
        "missing": "..safetensors",
        "newline": "a\n.safetensors",
        "surrogate": "\ud800.safetensors",
    }
    for what, value in names.items():
        index = edited(GOOD[INDEX], {"weight_map/" + ONE: value})
        opened = what in ("huge", "missing", "newline", "surrogate")
        yield Case(f"index_shard_{what}", swap(INDEX, index), () if opened else (INDEX, ONE), WEIGHTS)


def index_cases():
    yield from any_json(INDEX, WEIGHTS)
    bad = {"without_weight_map": DROP, "weight_map_list": [], "weight_map_empty": {}, "weight_map_null": None}
    for what, value in bad.items():
        yield Case(f"index_{what}", json_file(INDEX, {"weight_map": value}), (INDEX, "weight_map"), WEIGHTS)
    yield from shard_name_cases()
    moved = json_file(INDEX, {"weight_map/" + ONE: SECOND})
    yield Case("index_names_wrong_shard", moved, (SECOND, ONE), WEIGHTS)
    yield Case(
        "index_names_tensor_that_is_not_there",
        json_file(INDEX, {"weight_map/nobody": FIRST}),
        (FIRST, "nobody"),
        WEIGHTS,
    )
    yield Case(
        "index_and_another_model",
        GOOD | {"model.safetensors": GOOD[FIRST]},
        (INDEX, "does not name model.safetensors"),
        WEIGHTS,
    )
    yield Case(
        "index_lacks_a_tensor", json_file(INDEX, {"weight_map/" + ONE: DROP}), (FIRST, ONE, "index"), WEIGHTS
    )
    twice = GOOD[INDEX].replace(
        b'"weight_map": {', b'"weight_map": {"%s": "%s", ' % (ONE.encode(), FIRST.encode())
    )
    yield Case("index_tensor_twice", swap(INDEX, twice), (INDEX, ONE, "duplicate"), WEIGHTS)
    nul = json_file(INDEX, {"weight_map/" + ONE + "\0x": FIRST})
    yield Case("index_tensor_with_nul", nul, (INDEX, "NUL"), WEIGHTS)
    shards = copy.deepcopy(TENSORS)
    shards[1][ONE] = shards[0][ONE]
    yield Case("tensor_in_two_shards", swap(SECOND, safetensors(shards[1])), (FIRST, SECOND, ONE), WEIGHTS)
    yield Case(
        "shard_named_by_nothing_holds_a_tensor_twice", swap(SECOND, GOOD[FIRST]), (SECOND, "also in"), WEIGHTS
    )


# -- config.json -------------------------------------------------------------------------------------------

NUMBERS = {
    "hidden_size": (0, -1, 1.5, "24", True, [24], 1 << 21, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**30),
    "vocab_size": (0, -512, 1 << 25),
    "num_hidden_layers": (0, 1025, 1 << 31),
    "num_attention_heads": (0, 1 << 17),
    "intermediate_size": (0, 1 << 25),
    "max_position_embeddings": (0, 1 << 25),
    "rms_norm_eps": (-1e-6, 2, "1e-6"),
    "q_lora_rank": (0, "12"),
    "kv_lora_rank": (0, 1 << 25),
    "qk_nope_head_dim": (0,),
    "qk_rope_head_dim": (1, -2),
    "v_head_dim": (0, 1 << 25),
    "num_key_value_heads": (1, 0),
    "n_routed_experts": (0, 1 << 15),
    "num_experts_per_tok": (0, 5),
    "moe_intermediate_size": (0,),
    "n_shared_experts": (-1, 1025),
    "first_k_dense_replace": (-1, 3),
    "moe_layer_freq": (0,),
    "routed_scaling_factor": (0, -1, 1e300, "2.5"),
    "norm_topk_prob": (1, "true"),
    "n_group": (0, 5),
    "topk_group": (0, 3),
    "num_nextn_predict_layers": (-1, 2),
    "tie_word_embeddings": ("no",),
    "attention_bias": (True, 0),
    "mlp_bias": (True,),
    "is_causal": (False, 1),
    "rope_interleave": (False,),
    "partial_rotary_factor": (0.5,),
    "sliding_window": (4096,),
    "rope_theta": (0, 1, -10000, "10000", 1e13),
    "eos_token_id": (-1, 512, "1", [1, -1], [1, 512], [1.5], [[1]], {}),
}
CHOICES = {
    "model_type": ("deepseek_v9", "", "DEEPSEEK_V3", 3, "deepseek_v3\0", "x" * 5000, "a\nb"),
    "hidden_act": ("gelu", 1),
    "topk_method": ("best", 1, "greedy"),
    "scoring_func": ("tanh", "softmax"),
    "layer_types": ("full_attention", ["full_attention", "sliding_attention"]),
    "per_layer_config": ({"0": {"head_dim": 8}},),
}
REQUIRED = (
    "model_type",
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_group",                                                     # its default does not fit 4 experts
)


def value_name(value):
    kind = {str: "text_", list: "list_", dict: "object_"}.get(type(value), "")
    return kind + "".join(c if c.isalnum() or c in "-." else "_" for c in json.dumps(value)).strip("_")[:24]


def field_cases():
    for table in (NUMBERS, CHOICES):
        for field, values in table.items():
            for value in values:
                named = () if isinstance(value, int) and value >= 1 << 64 else (field,)
                yield Case(
                    f"config_{field}_{value_name(value)}",
                    json_file(CONFIG, {field: value}),
                    (CONFIG, *named),
                    WEIGHTS,
                )
    for field in REQUIRED:
        yield Case(f"config_without_{field}", json_file(CONFIG, {field: DROP}), (CONFIG, field), WEIGHTS)


def combination_cases():
    most = 1 << 24
    bad = {
        "heads_times_width": (
            {"num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16, "v_head_dim": 1 << 16},
            "num_attention_heads",
        ),
        "heads_times_rank": (
            {"num_attention_heads": 1 << 10, "num_key_value_heads": 1 << 10, "kv_lora_rank": most},
            "num_attention_heads",
        ),
        "experts_times_layers": (
            {"num_hidden_layers": 1024, "n_routed_experts": 1 << 14},
            "n_routed_experts",
        ),
        "shared_experts_times_width": (
            {"n_shared_experts": 1024, "moe_intermediate_size": most},
            "n_shared_experts",
        ),
        "groups_that_do_not_divide": ({"n_group": 3}, "n_group"),
        "more_picks_than_kept": ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        "groups_of_one": ({"n_group": 4, "topk_group": 2}, "n_group"),
        "odd_rope": ({"qk_rope_head_dim": 5}, "RoPE"),
    }
    for what, (changes, field) in bad.items():
        yield Case(f"config_{what}", json_file(CONFIG, changes), (CONFIG, field), WEIGHTS)
    twice = GOOD[CONFIG].replace(b'"hidden_size": 24', b'"hidden_size": 24, "hidden_size": 25')
    yield Case("config_field_twice", swap(CONFIG, twice), (CONFIG, "hidden_size"), WEIGHTS)
    nul = json_file(CONFIG, {"hidden_size\0": 24})
    yield Case("config_field_with_nul", nul, (CONFIG, "NUL"), WEIGHTS)
    infinite = GOOD[CONFIG].replace(b"2.5", b"1e999")
    yield Case("config_number_beyond_double", swap(CONFIG, infinite), (CONFIG,), WEIGHTS)
    yield Case(
        "config_of_one_gigabyte",
        swap(CONFIG, Special("sparse", content=b"{", size=1 << 30)),
        (CONFIG, "larger"),
        WEIGHTS,
    )
    yield Case("config_missing", without(CONFIG), (CONFIG,), WEIGHTS)


def nested_cases():
    """Fields of quantization_config and rope_scaling."""
    quantization = {
        "quant_method": ("gptq", 1, DROP),
        "fmt": ("e5m2",),
        "activation_scheme": ("static",),
        "scale_fmt": ("e8m0",),
        "weight_block_size": ([64, 64], [128], [128, 128, 128], [128, 1.5], "128", [128, -128], None),
        "expert_dtype": ("fp4",),
    }
    scaling = {
        "type": ("longrope", "llama3", 1, DROP),
        "factor": (0, -1, 1e7, "4", DROP),
        "original_max_position_embeddings": (0, 1 << 25, DROP),
        "beta_fast": (0, 1, -32),
        "beta_slow": (0, 32, 100),
        "mscale": (-1, 101),
        "mscale_all_dim": (-1, 101),
        "attention_factor": (0, "1"),
        "truncate": (1,),
        "partial_rotary_factor": (0.5,),
        "rope_type": ("llama3",),
        "rope_theta": (0, 20000),
    }
    for parent, table in (("quantization_config", quantization), ("rope_scaling", scaling)):
        for value in (1, [], "fp8", True):
            yield Case(
                f"config_{parent}_{value_name(value)}",
                json_file(CONFIG, {parent: value}),
                (CONFIG, parent),
                WEIGHTS,
            )
        for field, values in table.items():
            for value in values:
                what = "missing" if value is DROP else value_name(value)
                changed = json_file(CONFIG, {f"{parent}/{field}": value})
                expected = (
                    ""
                    if field == "beta_slow"
                    else "rope_type" if field == "type" and value is DROP else field
                )
                yield Case(f"config_{parent}_{field}_{what}", changed, (CONFIG, parent, expected), WEIGHTS)
    both = json_file(CONFIG, {"rope_parameters": {"rope_type": "default"}})
    yield Case("config_two_rope_scalings", both, (CONFIG, "rope_parameters"), WEIGHTS)


def qwen2_cases():
    llama3 = {
        "rope_type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 16,
    }
    bad = {
        "odd_head": ({"head_dim": 5}, "RoPE"),
        "head_of_zero": ({"head_dim": 0}, "head_dim"),
        "heads_that_do_not_divide": (
            {"num_attention_heads": 5, "num_key_value_heads": 1},
            "num_attention_heads",
        ),
        "kv_heads_that_do_not_divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
        "heads_overflow": (
            {"num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16, "head_dim": 1 << 16},
            "num_attention_heads",
        ),
        "sliding_window": ({"use_sliding_window": True}, "use_sliding_window"),
        "mlp_bias": ({"mlp_bias": True}, "mlp_bias"),
        "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
        "frequencies_reversed": ({"rope_scaling": llama3 | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        "frequency_missing": (
            {"rope_scaling": {k: v for k, v in llama3.items() if "low" not in k}},
            "low_freq_factor",
        ),
    }
    for what, (changes, field) in bad.items():
        config = json.dumps(good_model.QWEN2 | changes).encode()
        yield Case(f"qwen2_{what}", swap(CONFIG, config), (CONFIG, field), WEIGHTS)
    other = swap(CONFIG, json.dumps(good_model.QWEN2).encode())
    yield Case("config_of_another_architecture", other, ("model.layers.0",), BINDING)


# -- binding -----------------------------------------------------------------------------------------------

KINDS = {  # one tensor of each kind
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "q_a": "model.layers.0.self_attn.q_a_proj.weight",
    "q_norm": "model.layers.0.self_attn.q_a_layernorm.weight",
    "kv_b": "model.layers.1.self_attn.kv_b_proj.weight",
    "mlp": "model.layers.0.mlp.down_proj.weight",
    "gate": "model.layers.1.mlp.gate.weight",
    "gate_bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "expert": "model.layers.1.mlp.experts.3.up_proj.weight",
    "shared": "model.layers.1.mlp.shared_experts.up_proj.weight",
    "mtp_proj": "model.layers.2.eh_proj.weight",
    "mtp_norm": "model.layers.2.hnorm.weight",
    "mtp_expert": "model.layers.2.mlp.experts.0.gate_proj.weight",
}


def shape_of(name):
    return next(shard[name][1] for shard in TENSORS if name in shard)


def dtype_cases():
    for kind, name in KINDS.items():
        many = ("I64", "I16", "I8", "U8", "BOOL", "F8_E5M2", "F8_E8M0") if kind == "expert" else ("I32",)
        for dtype in many + ("F64",) * (len(shape_of(name)) > 1):
            yield Case(f"{kind}_is_{dtype}", tensor(name, dtype), (name, dtype), BINDING)
    for kind in ("norm", "q_norm", "gate_bias", "mtp_norm"):
        yield Case(f"{kind}_is_F8_E4M3", tensor(KINDS[kind], "F8_E4M3"), (KINDS[kind], "F8_E4M3"), BINDING)
    for kind in ("embed", "head", "gate", "mtp_proj"):  # fp8 without its scales
        yield Case(
            f"{kind}_is_F8_E4M3_without_scale", tensor(KINDS[kind], "F8_E4M3"), (KINDS[kind],), BINDING
        )
    yield Case(
        "F8_without_quantization_config",
        json_file(CONFIG, {"quantization_config": DROP}),
        ("F8_E4M3", "quantization_config"),
        BINDING,
    )


def shape_cases():
    for kind, name in KINDS.items():
        yield Case(f"{kind}_missing", lost(name), (name,), BINDING)
        shape = shape_of(name)
        longer = shape[:-1] + [shape[-1] + 1]
        yield Case(f"{kind}_too_wide", tensor(name, shape=longer), (name, "shape"), BINDING)
        yield Case(f"{kind}_of_another_rank", tensor(name, shape=shape + [1]), (name, "shape"), BINDING)
        if len(shape) == 2:
            yield Case(f"{kind}_transposed", tensor(name, shape=shape[::-1]), (name, "shape"), BINDING)
            yield Case(f"{kind}_flat", tensor(name, shape=[math.prod(shape)]), (name, "shape"), BINDING)
    for name in ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"):
        short = name.split(".")[3]
        yield Case(f"mtp_{short}_misshapen", tensor(name, shape=[511, 24]), (name, "shape"), BINDING)


def value_cases():
    scale, nan, infinity = (
        KINDS["q_a"] + "_scale_inv",
        struct.pack("<f", math.nan),
        struct.pack("<f", math.inf),
    )
    yield Case("scale_nan", tensor(scale, data=nan), (scale, "finite"), BINDING)
    yield Case("scale_infinite", tensor(scale, data=infinity), (scale, "finite"), BINDING)
    for dtype in ("F8_E8M0", "U8"):
        yield Case(f"scale_is_{dtype}", tensor(scale, dtype), (scale, dtype), BINDING)
    yield Case("scale_too_wide", tensor(scale, shape=[1, 2]), (scale, "shape"), BINDING)
    yield Case("scale_missing", lost(scale), (scale,), BINDING)
    for kind in ("norm", "q_norm", "mtp_norm"):
        yield Case(f"{kind}_nan", tensor(KINDS[kind], data=nan[2:]), (KINDS[kind], "finite"), BINDING)
        yield Case(
            f"{kind}_infinite", tensor(KINDS[kind], data=infinity[2:]), (KINDS[kind], "finite"), BINDING
        )
    yield Case("gate_bias_nan", tensor(KINDS["gate_bias"], data=nan), (KINDS["gate_bias"], "finite"), BINDING)
    for kind in ("embed", "head", "kv_b"):
        data = b"\x7f" if kind == "kv_b" else nan[2:]
        yield Case(f"{kind}_full_of_nan", tensor(KINDS[kind], data=data), ("damaged weights?",), TALKING)
    one = struct.pack("<e", 0) * (24 * 100) + nan[2:] * 24 + bytes(24 * 2 * 411)
    yield Case("head_with_one_row_of_nan", tensor(KINDS["head"], data=one), ("damaged weights?",), TALKING)


def count_cases():
    for name in (
        "model.layers.3.input_layernorm.weight",
        "extra",
        KINDS["gate"] + "_scale_inv",
        "lm_head.bias",
        "model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
    ):
        yield Case(f"extra_tensor_{name}", extra(name), (SECOND, name, "no place"), BINDING)
    yield Case(
        "config_one_layer_more", json_file(CONFIG, {"num_hidden_layers": 3}), ("model.layers.2",), BINDING
    )
    yield Case(
        "config_one_layer_less",
        json_file(CONFIG, {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}),
        ("model.layers.", "no place"),
        BINDING,
    )
    yield Case(
        "config_one_expert_pair_more",
        json_file(CONFIG, {"n_routed_experts": 6}),
        ("model.layers.1.mlp",),
        BINDING,
    )
    yield Case(
        "config_vocabulary_larger", json_file(CONFIG, {"vocab_size": 513}), (KINDS["embed"], "shape"), BINDING
    )
    yield Case("config_head_wider", json_file(CONFIG, {"v_head_dim": 7}), ("kv_b_proj", "shape"), BINDING)


# -- generation_config.json --------------------------------------------------------------------------------


def generation_cases():
    yield from any_json(GENERATION, TALKING)
    bad = {
        "temperature": (-0.1, 101, "0.6", True),
        "top_p": (0, 1.5, -1),
        "top_k": (-1, 1.5, 1 << 33),
        "min_p": (-1, 2),
        "do_sample": (1, "yes"),
        "eos_token_id": (-1, 512, [1, "2"], 1 << 40),
        "repetition_penalty": (0, 101, "1.1"),
        "num_beams": (4, "1"),
        "no_repeat_ngram_size": (3,),
        "bad_words_ids": ([[3]],),
        "token_healing": (True,),
    }
    for field, values in bad.items():
        for value in values:
            yield Case(
                f"generation_{field}_{value_name(value)}",
                json_file(GENERATION, {field: value}),
                (GENERATION, field),
                TALKING,
            )
    twice = GOOD[GENERATION].replace(b"{", b'{"top_p": 1, ', 1)
    yield Case("generation_field_twice", swap(GENERATION, twice), (GENERATION, "top_p"), TALKING)


# -- tokenizer ---------------------------------------------------------------------------------------------


def tokenizer_cases():
    yield from any_json(TOKENIZER, TEXT)
    yield Case("tokenizer_missing", without(TOKENIZER), (TOKENIZER,), TEXT)
    model = json.loads(GOOD[TOKENIZER])["model"]
    word = next(iter(model["vocab"]))
    bad = {
        "model": (DROP, None, [], "BPE"),
        "model/type": ("WordPiece", "Unigram", 1, DROP),
        "model/vocab": (DROP, [], 1),
        "model/merges": (
            DROP,
            {},
            1,
            [1],
            [["a"]],
            [["a", "b", "c"]],
            [["a", 1]],
            ["ab"],
            ["a nobody"],
            [["nobody", "a"]],
            [["a", "\0"]],
        ),
        "model/ignore_merges": ("yes",),
        "model/vocab/" + word: (-1, 1.5, "1", None, 1 << 20, 1 << 31, 1 << 40, [1]),
        "pre_tokenizer": (
            DROP,
            None,
            1,
            {},
            {"type": "Metaspace"},
            {"type": "Sequence"},
            {"type": "Sequence", "pretokenizers": 1},
        ),
        "normalizer": (1, {}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}),
        "added_tokens": (1, {}, [1], [{}]),
        "added_tokens/0/id": (-1, "0", 1.5, 1 << 20, 1 << 40, DROP),
        "added_tokens/0/content": ("", 1, None, DROP),
        "added_tokens/0/special": (1, DROP),
    }
    for field, values in bad.items():
        for value in values:
            what = "missing" if value is DROP else value_name(value)
            label = field.replace("model/vocab/" + word, "token id").replace("/", "_").replace(" ", "_")
            key = field.split("/")[0]
            yield Case(
                f"tokenizer_{label}_{what}", json_file(TOKENIZER, {field: value}), (TOKENIZER, key), TEXT
            )
    first = next(iter(model["vocab"].items()))
    twice = GOOD[TOKENIZER].replace(b'"vocab": {', b'"vocab": {%s: 7, ' % json.dumps(first[0]).encode(), 1)
    yield Case("tokenizer_token_twice", swap(TOKENIZER, twice), (TOKENIZER, "vocab"), TEXT)
    same = json_file(TOKENIZER, {"model/vocab/" + word: model["vocab"]["a"]})
    yield Case("tokenizer_id_twice", same, (TOKENIZER, "vocab"), TEXT)
    added = json.loads(GOOD[TOKENIZER])["added_tokens"]
    lengths = [added[-1] | {"id": 600 + i, "content": "a" * i + "b"} for i in range(3000)]
    yield Case(
        "tokenizer_added_tokens_of_3000_lengths",
        json_file(TOKENIZER, {"added_tokens": added + lengths}),
        (TOKENIZER, "added_tokens"),
        ("tokenize-aaaa",),
    )
    lone = GOOD[TOKENIZER].replace(b'"content": "<think>"', b'"content": "\\ud800"', 1)
    yield Case("tokenizer_lone_surrogate", swap(TOKENIZER, lone), (TOKENIZER,), TEXT)


def pre_tokenizer(pattern):
    return json_file(TOKENIZER, {"pre_tokenizer/pretokenizers/0/pattern/Regex": pattern})


def regex_cases():
    bad = {
        "unclosed_group": "(",
        "unclosed_class": "[a",
        "nothing_to_repeat": "*",
        "reversed_range": "[z-a]",
        "trailing_backslash": "a\\",
        "backreference": "(a)\\1",
        "recursion": "(?R)",
        "callout": "(?C1)a",
        "verb": "(*COMMIT)a",
        "verb_limit": "(*LIMIT_MATCH=1)a",
        "named_group": "(?<n>a)",
        "comment": "(?#x)a",
        "hex_digit_class": "\\h",
        "property_unknown": "\\p{Xyz}",
        "property_unclosed": "\\p{L",
        "posix_class": "[[:alpha:]]",
        "code_point": "\\x{41}",
        "huge_repeat": "a{65536}",
        "reversed_repeat": "a{3,1}",
        "possessive_repeat": "a{2}+",
        "nested_repeats": "((((((a{1,200}){1,200}){1,200}){1,200}){1,200}){1,200})",
        "deep_groups": "(" * DEEP + "a" + ")" * DEEP,
        "empty": "",
        "matches_nothing": "a*",
        "matches_boundary": "(?=a)",
        "lookbehind_without_end": "(?<=a+)b",
        "nul": "a\0(",
        "huge": "(" + "a" * 100_000,
        "number": 7,
        "null": None,
    }
    for what, pattern in bad.items():
        yield Case(f"regex_{what}", pre_tokenizer(pattern), (TOKENIZER, "pre_tokenizer"), TEXT)
    blown_up = pre_tokenizer("(?:a|aa|a?a)+[bc]")
    yield Case("regex_that_blows_up", blown_up, (TOKENIZER, "pre_tokenizer"), ("tokenize-aaaa",))
    steps = json.loads(GOOD[TOKENIZER])["pre_tokenizer"]["pretokenizers"]
    many = json_file(TOKENIZER, {"pre_tokenizer/pretokenizers": steps[:1] * 30_000 + steps})
    yield Case("regexes_enough_for_a_stack_overflow", many, (TOKENIZER, "pre_tokenizer"), TEXT)
    dropped = json_file(TOKENIZER, {"pre_tokenizer/pretokenizers/0/pattern/Regex": DROP})
    yield Case("regex_missing", dropped, (TOKENIZER, "pre_tokenizer"), TEXT)


def vocabulary_cases():
    """Files that are good by themselves, but not together, or not for the text."""
    beyond = json.loads(GOOD[TOKENIZER])
    beyond["added_tokens"].append({"id": 512, "content": "<x>", "special": False, "normalized": False})
    yield Case(
        "tokenizer_ids_beyond_vocab_size",
        swap(TOKENIZER, json.dumps(beyond).encode()),
        (TOKENIZER, "vocab_size"),
        TALKING,
    )
    cut = json.loads(GOOD[TOKENIZER])
    cut["model"]["merges"] = [m for m in cut["model"]["merges"] if "q" not in m[0] + m[1]]
    del cut["model"]["vocab"]["q"]
    yield Case(
        "tokenizer_without_a_token_for_a_byte",
        swap(TOKENIZER, json.dumps(cut).encode()),
        ("113",),
        ("tokenize-q",),
    )


def tokenizer_config_cases():
    yield from any_json(TOKENIZER_CONFIG, TEXT)
    bad = {
        "bos_token": (1, "nobody", {}, {"content": 1}),
        "eos_token": (True, "nobody"),
        "add_bos_token": ("yes", 1),
    }
    for field, values in bad.items():
        for value in values:
            yield Case(
                f"tokenizer_config_{field}_{value_name(value)}",
                json_file(TOKENIZER_CONFIG, {field: value}),
                (TOKENIZER_CONFIG, field),
                TEXT,
            )
    for what, template in {"unknown": "{{ messages }}", "none": DROP, "code": "{{ ''.__class__ }}"}.items():
        yield Case(
            f"chat_template_{what}",
            json_file(TOKENIZER_CONFIG, {"chat_template": template}),
            ("--raw",),
            TALKING,
        )
    text = json.loads(GOOD[TOKENIZER_CONFIG])["chat_template"]
    touched = json_file(TOKENIZER_CONFIG, {"chat_template": text.replace("not ns.is_tool", "ns.is_tool")})
    yield Case("chat_template_with_one_word_less", touched, ("--raw",), TALKING)


GROUPS = (
    file_cases,
    header_cases,
    entry_cases,
    index_cases,
    lambda: any_json(CONFIG, WEIGHTS),
    field_cases,
    combination_cases,
    nested_cases,
    qwen2_cases,
    dtype_cases,
    shape_cases,
    value_cases,
    count_cases,
    generation_cases,
    tokenizer_cases,
    regex_cases,
    vocabulary_cases,
    tokenizer_config_cases,
)


def all_cases():
    cases = [case for group in GROUPS for case in group()]
    names = [case.name for case in cases]
    repeated = {name for name in names if names.count(name) > 1}
    assert not repeated, repeated
    return cases


# -- folders that are odd, and good ------------------------------------------------------------------------


def odd_folders():
    """Changes like those above that do no harm: so the others are not refused for being changed."""
    one_file = {name: content for name, content in GOOD.items() if name not in (FIRST, SECOND, INDEX)}
    one_file["model.safetensors"] = safetensors(TENSORS[1] | TENSORS[0])
    yield "good", GOOD
    yield "one_file", one_file
    yield "header_with_blanks", header(lambda text: text + " " * 1000)
    yield "header_reordered", header(lambda text: json.dumps(dict(reversed(json.loads(text).items()))))
    yield "no_metadata", header({"__metadata__": DROP})
    yield "link_to_shard", (GOOD | {"blob": GOOD[FIRST], FIRST: Special("link", "blob")})
    yield "old_buffers", extra("model.layers.0.self_attn.rotary_emb.inv_freq")
    yield "no_generation_config", without(GENERATION)
    yield "eos_list", json_file(CONFIG, {"eos_token_id": [1, 2]})
    yield "norm_in_F16", tensor(KINDS["norm"], "F16", data=struct.pack("<e", 1))
    yield "expert_in_BF16", lost_scale(KINDS["expert"])
    yield "ue8m0", json_file(CONFIG, {"quantization_config/scale_fmt": "ue8m0"})
    yield "no_mtp_in_config", json_file(CONFIG, {"num_nextn_predict_layers": 0})
    main = [{name: t for name, t in shard.items() if ".layers.2." not in name} for shard in TENSORS]
    yield "no_mtp_in_files", packed(main)
    yield "scale_in_BF16", tensor(KINDS["q_a"] + "_scale_inv", "BF16", data=struct.pack("<H", 0x3C00))
    yield "norm_in_F64", tensor(KINDS["norm"], "F64", data=struct.pack("<d", 1))
    for field in ("topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "rope_theta"):
        yield f"no_{field}", json_file(CONFIG, {field: DROP})
    yield "no_weight_block_size", json_file(CONFIG, {"quantization_config/weight_block_size": DROP})
    yield "no_scaling", json_file(CONFIG, {"rope_scaling": {}})
    yield "odd_regex", pre_tokenizer("(?i:'s|'t)|[^\\s\\p{L}]{1,3}(?!\\S)|(?<=a)b")


def lost_scale(name):
    shards = copy.deepcopy(TENSORS)
    for shard in shards:
        shard.pop(name + "_scale_inv", None)
        if name in shard:
            shard[name] = ("BF16", shard[name][1], bytes(2 * len(shard[name][2])))
    return packed(shards)


def packed(shards):
    """The good folder with other tensors in its shards."""
    index = json.dumps(good_model.index_of(shards)).encode()
    return GOOD | {file: safetensors(shard) for file, shard in zip(SHARDS, shards)} | {INDEX: index}


def main(arguments):
    if len(arguments) != 1:
        print(__doc__)
        return 1
    cases = all_cases()
    for case in cases:
        write_folder(pathlib.Path(arguments[0]) / case.name, case.folder)
    print(f"{len(cases)} folders")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
