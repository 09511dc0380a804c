"""Hostile command lines: what a user, or someone who sends him a line, may type.

Each is (name, arguments, stdin, what the one line on stderr must contain). In the arguments GOOD stands for a
good model folder, WORK for an empty folder, and the names of files that `work_files` makes are found there.
"""

from make_hostile import CONFIG, GOOD, Special, edited, json_file

DEEP = "[" * 3000 + "]" * 3000
CONTEXT = 64  # of the good model

IDS = {
    "empty": "",
    "comma": ",",
    "comma_last": "1,",
    "comma_first": ",1",
    "commas": "1,,2",
    "word": "one",
    "blank": "1 2",
    "bracket_open": "[1, 2",
    "bracket_close": "1]",
    "brackets": "[[1]]",
    "list_empty": "[]",
    "negative": "-1",
    "beyond_vocabulary": "512",
    "beyond_64_bits": "9" * 30,
    "fraction": "1.5",
    "hexadecimal": "0x1",
    "plus": "+1",
    "semicolon": "1;2",
    "newline": "1\n2",
    "arabic_digit": "\u0661",
    "not_utf8": b"1,\xff",
    "longer_than_context": ",".join(["1"] * (CONTEXT + 1)),
}
OPTIONS = {  # of `run`
    "--chunk": ("0", "-1", "65537", "1e3", "x", "", "9" * 30),
    "--ctx": ("0", "-1", "65", "16777217", "x", "9" * 30, "nan"),
    "-n": ("-2", "x", "1.5", "9" * 30),
    "--temp": ("-1", "101", "nan", "-nan", "NAN", "inf", "x", ""),
    "--top-p": ("0", "-1", "1.1", "nan", "x"),
    "--top-k": ("-1", "1.5", "x", "9" * 30),
    "--min-p": ("-1", "1.1", "nan"),
    "--seed": ("-2", "1.5", "x", "9" * 30, ""),
    "--threads": ("0", "-1", "4097", "9" * 30, "x"),
    "--think-budget": ("-1", "x"),
    "--device": ("gpu", ""),
    "--quant": ("q9", ""),
    "--mla": ("both", ""),
    "--arith": ("fp16", "bf17", ""),
}
MESSAGES = {
    "empty": "",
    "word": "hello",
    "number": "1",
    "object": "{}",
    "list_of_numbers": "[1]",
    "deep": DEEP,
    "cut_off": '[{"role":',
    "no_role": '[{"content":"x"}]',
    "no_content": '[{"role":"user"}]',
    "role_number": '[{"role":1,"content":"x"}]',
    "content_number": '[{"role":"user","content":1}]',
    "content_list": '[{"role":"user","content":[]}]',
    "content_surrogate": '[{"role":"user","content":"\\ud800"}]',
    "not_utf8": b'[{"role":"user","content":"\xff"}]',
    "nul": '[{"role":"user","content":"\0"}]',
    "role_twice": '[{"role":"user","role":"user","content":"x"}]',
    "calls_number": '[{"role":"assistant","content":null,"tool_calls":1}]',
    "call_without_function": '[{"role":"assistant","content":null,"tool_calls":[{}]}]',
    "arguments_object": '[{"role":"assistant","content":null,"tool_calls":'
    '[{"type":"function","function":{"name":"f","arguments":{}}}]}]',
}
ID_ARRAYS = {
    "empty": "",
    "word": "x",
    "object": "{}",
    "number": "1",
    "fraction": "[1.5]",
    "negative": "[-1]",
    "text": '["1"]',
    "nested": "[[1]]",
    "deep": DEEP,
    "null": "[null]",
    "beyond_31_bits": "[2147483648]",
    "beyond_64_bits": "[%s]" % ("9" * 30),
    "cut_off": "[1,",
    "two_values": "[1][2]",
}
LINES = {
    "empty": "\n",
    "word": "x\n",
    "number": "1\n",
    "array": "[1]\n",
    "cut_off": '"x\n',
    "two_values": '"a" "b"\n',
    "not_utf8": b'"\xff"\n',
    "deep": DEEP + "\n",
}
LOGITS = ["logits", "--force", "-m", "GOOD", "--out", "WORK/out.safetensors"]
RUN = ["run", "-m", "GOOD", "-n", "2"]
HELLO = RUN + ["-p", "hello"]


def work_files():
    """What the command lines below find in WORK besides nothing."""
    return {
        "empty.txt": b"",
        "short.txt": b"a",
        "not_utf8.txt": b"abc\xff",
        "folder": Special("directory"),
        "fifo": Special("fifo"),
        "large.txt": Special("sparse", size=600 << 20),
        "fake.gguf": b"GGUF",
        "device": Special("link", "/dev/null"),  # never the device itself: a bad program would replace it
        "file": b"x",
    }


def table(prefix, head, values, expect, as_stdin=False):
    for what, value in values.items():
        yield (f"{prefix}_{what}", head if as_stdin else head + [value], value if as_stdin else b"", expect)


def model_lines():
    paths = {
        "nowhere": "WORK/nowhere",
        "file": "WORK/file",
        "folder_without_files": "WORK/folder",
        "gguf_that_is_none": "WORK/fake.gguf",
        "gguf_nowhere": "WORK/no.gguf",
        "newline": "WORK/a\nb",
        "escape": "WORK/\x1b[31m",
        "fifo": "WORK/fifo",
        "not_utf8": b"\xff\xfe",
        "huge": "x" * 5000,
        "empty": "",
    }
    for command, more in {
        "run": ["-p", "x"],
        "info": [],
        "logits": ["--ids", "1", "--force", "--out", "WORK/out.safetensors"],
    }.items():
        yield from table(f"{command}_model", [command, *more, "-m"], paths, ())
    del paths["folder_without_files"]
    yield from table("tokenize_model", ["tokenize", "-m"], paths, ())


def option_lines():
    for option, values in OPTIONS.items():
        for value in values:
            yield (f"run_{option.strip('-')}_{value[:8]}", HELLO + [option, value], b"", (option,))
    for name, arguments in {
        "nothing": [],
        "unknown_command": ["walk"],
        "unknown_option": HELLO + ["--fast"],
        "unknown_letter": HELLO + ["-x"],
        "newline": ["run", "a\nb"],
        "option_without_value": ["run", "-m"],
        "model_twice": HELLO + ["-m", "GOOD"],
        "not_utf8": [b"\xff"],
        "huge": ["x" * 100_000],
    }.items():
        yield (f"line_{name}", arguments, b"", ())
    yield ("run_ctx_names_both_numbers", HELLO + ["--ctx", "65"], b"", ("65", "64"))


def prompt_lines():
    longer = "<think>" * 100  # one token each, after BOS
    yield ("prompt_none", RUN, b"", ())
    yield ("prompt_empty", RUN + ["-p", ""], b"", ())
    yield ("prompt_twice", RUN + ["-p", "a", "-f", "WORK/short.txt"], b"", ())
    yield ("prompt_stray", RUN + ["hello"], b"", ("hello",))
    yield ("prompt_not_utf8", RUN + ["-p", b"\xff"], b"", ("UTF-8",))
    yield ("prompt_too_long", RUN + ["--raw", "-p", longer], b"", ("101", str(CONTEXT)))
    yield ("prompt_too_long_for_ctx", RUN + ["--raw", "--ctx", "33", "-p", longer], b"", ("101", "33"))
    yield ("prompt_on_stdin_empty", RUN + ["-"], b"", ("empty",))
    yield ("prompt_on_stdin_not_utf8", RUN + ["-"], b"a\xffb", ("UTF-8",))
    yield ("prompt_on_stdin_too_long", RUN + ["--raw", "-"], longer.encode() * 1000, ("100001", str(CONTEXT)))
    for file in ("empty.txt", "not_utf8.txt", "folder", "nowhere"):
        yield ("prompt_file_" + file, RUN + ["-f", "WORK/" + file], b"", ())
    yield ("system_with_raw", HELLO + ["--raw", "--system", "x"], b"", ("--system",))
    yield ("simd_unknown", HELLO, b"", ("DEEPSEEK_SIMD",))


def text_lines():
    yield from table("messages", ["tokenize", "-m", "GOOD", "--chat"], MESSAGES, (), True)
    yield from table("decode", ["tokenize", "-m", "GOOD", "--decode"], ID_ARRAYS, (), True)
    yield from table("line", ["tokenize", "-m", "GOOD", "--lines"], LINES, ("line 1",), True)
    yield from table(
        "chat_line",
        ["tokenize", "-m", "GOOD", "--lines", "--chat"],
        LINES | {"messages_number": '{"messages":1}\n'},
        ("line 1",),
        True,
    )
    yield ("tokenize_not_utf8", ["tokenize", "-m", "GOOD"], b"abc\xff", ("UTF-8",))
    yield ("tokenize_decode_and_chat", ["tokenize", "-m", "GOOD", "--decode", "--chat"], b"", ("--chat",))
    yield ("tokenize_ids_without_chat", ["tokenize", "-m", "GOOD", "--ids"], b"", ("--chat",))


def other_lines():
    yield from table("ids", LOGITS + ["--ids"], IDS, ("--ids",))
    yield ("ids_longer_names_both_numbers", LOGITS + ["--ids", IDS["longer_than_context"]], b"", ("65", "64"))
    yield ("ids_missing", LOGITS, b"", ("--ids",))
    outs = {
        "missing": [],
        "folder": ["--out", "WORK/folder"],
        "in_no_folder": ["--out", "WORK/no/x"],
        "device": ["--out", "WORK/device"],
        "fifo": ["--out", "WORK/fifo"],
        "empty": ["--out", ""],
        "in_file": ["--out", "WORK/file/x"],
        "huge": ["--out", "WORK/" + "x" * 5000],
    }
    for what, out in outs.items():
        yield (f"out_{what}", ["logits", "-m", "GOOD", "--ids", "1,2", *out], b"", ())
    top = ["logits", "-m", "GOOD", "--ids", "1,2"]
    yield from table("top", [*top, "--top"], {"zero": "0", "word": "x", "huge": "1001"}, ("--top",))
    yield from table("past", [*top, "--top", "1", "--past"], {"negative": "-1", "all": "2"}, ("--past",))
    yield ("print_unknown", [*top, "--print", "layers.0.none"], b"", ("layers.0.none", "attn_norm"))
    yield ("print_escape", [*top, "--print", "\x1b[31m"], b"", ("--print",))
    yield ("logits_json", [*top, "--out", "WORK/out.safetensors", "--json"], b"", ("--json",))
    yield ("logits_chunk_zero", LOGITS + ["--ids", "1", "--chunk", "0"], b"", ("--chunk",))
    for what in ("empty.txt", "not_utf8.txt", "nowhere", "folder"):
        yield (f"perplexity_of_{what}", ["perplexity", "-m", "GOOD", "-f", "WORK/" + what], b"", ())
    yield ("perplexity_of_nothing", ["perplexity", "-m", "GOOD"], b"", ())
    yield (
        "perplexity_ctx_one",
        ["perplexity", "-m", "GOOD", "-f", "WORK/short.txt", "--ctx", "1"],
        b"",
        ("--ctx",),
    )
    for option, value in {"-r": "0", "-n": "-1", "-p": "65"}.items():
        yield (f"bench{option}_{value}", ["bench", "-m", "GOOD", option, value], b"", ())
    yield ("info_ctx_zero", ["info", "-m", "GOOD", "--ctx", "0"], b"", ("--ctx",))
    yield ("info_ctx_beyond", ["info", "-m", "GOOD", "--ctx", "65"], b"", ("65", "64"))


def all_lines():
    for group in (model_lines, option_lines, prompt_lines, text_lines, other_lines):
        yield from group()


# -- limits ------------------------------------------------------------------------------------------------
#
# A configuration at the limits of what parse_config accepts: higher ones, and some number would wrap.

EXTREME = {
    "hidden_size": 1 << 20,
    "vocab_size": 1 << 24,
    "num_hidden_layers": 1 << 10,
    "intermediate_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "q_lora_rank": 1 << 24,
    "kv_lora_rank": (1 << 24) - 2,
    "qk_nope_head_dim": 1,
    "qk_rope_head_dim": 2,
    "v_head_dim": (1 << 24) - 5,
    "n_routed_experts": 1 << 6,
    "num_experts_per_tok": 1 << 5,
    "moe_intermediate_size": 1 << 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}


def extreme_folder():
    """No weights: `info` needs none, and `run` must refuse before it looks for them."""
    return {name: content for name, content in GOOD.items() if "safetensors" not in name} | {
        CONFIG: edited(GOOD[CONFIG], EXTREME)
    }


def long_context_folder():
    return json_file(CONFIG, {"max_position_embeddings": 1 << 24})


def one_token_folder():
    return json_file(CONFIG, {"max_position_embeddings": 1})


def no_mtp_folder():
    return json_file(CONFIG, {"num_nextn_predict_layers": 0})
