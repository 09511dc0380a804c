#!/usr/bin/env python3
"""A person at a terminal: what is typed and pasted, chat's commands, and what keys and signals end or stop.

A pseudo-terminal stands for theirs. DEEPSEEK names another program than ./deepseek.
"""
import fcntl
import json
import os
import re
import select
import shutil
import signal
import struct
import termios
import time

import cli
import suite
from cli import ANSWER, ASSISTANT, BOS, EOS, PROGRAM, QUESTION, TINY, USER

PROMPT = r"\n(?:\033\[\?2004[hl])*> \Z"                # and nothing after it: it waits
UP, DOWN, LEFT, HOME, END, BACKSPACE = "\033[A", "\033[B", "\033[D", "\x01", "\x05", "\x7f"
CTRL_C, CTRL_D, CTRL_Z = "\x03", "\x04", "\x1a"


def paste(text):
    return f"\033[200~{text}\033[201~"


def endless_thought(folder):
    """A model that thinks for ever: in its head </think> has the row of BOS, which it never says."""
    cli.endless(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    length, = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8:8 + length])["lm_head.weight"]
    row, begin = 2 * entry["shape"][1], 8 + length + entry["data_offsets"][0]
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    end, = (t["id"] for t in added if t["content"] == "</think>")
    data[begin + end * row:begin + (end + 1) * row] = data[begin:begin + row]
    file.write_bytes(data)
    return folder


class Person(cli.OnTerminal):
    def type(self, text):
        """Types without a pause, and reads what is echoed."""
        text = text if isinstance(text, bytes) else text.encode()
        while text:
            readable, writable, _ = select.select([self.master], [self.master], [])
            if readable:
                self.text += os.read(self.master, 65536)
            if writable:
                text = text[os.write(self.master, text[:512]):]

    def see(self, pattern):
        """What is printed up to a match of `pattern`; the next call begins after that."""
        self.assertTrue(self.read_until(pattern.encode()), self.text[-500:])
        seen, self.text = self.text, b""
        return seen.decode().replace("\r\n", "\n")

    def chat(self, *options, **more):
        self.start("chat", "--device", "cpu", *options, **more)      # of a GPU a line would be said
        return self.see_prompt()

    def see_prompt(self):
        """Until the terminal no longer edits and echoes by itself, which it does for a moment more."""
        seen = self.see(PROMPT)
        while termios.tcgetattr(self.master)[3] & termios.ICANON:
            time.sleep(0.001)
        return seen

    def say(self, text):
        """A line, and all that is printed until the next prompt sign."""
        self.type(text + "\r")
        return self.see_prompt()

    def prompt_of(self, seen):
        """The prompt that --show-prompt printed last."""
        return re.findall(r"prompt: ((?s:.*?))\nids: \[", seen)[-1]

    def leave(self, code=0):
        self.type(CTRL_D)
        ended, text = self.finish()
        self.assertEqual(ended, code, text)
        return text

    def temporaries(self, folder=None):
        return [p.name for p in (folder or self.folder).iterdir() if p.name.endswith(".tmp")]


def asked(*turns):
    """The prompt of the last of some questions, each but the last with its answer."""
    *before, last = turns
    history = "".join(f"{USER}{question}{ASSISTANT}{answer}{EOS}" for question, answer in before)
    return f"{BOS}{history}{USER}{last}{ASSISTANT}<think>\n"


class Typing(Person):
    def test_pasted_lines_are_one_turn(self):
        """However the terminal ends its lines; and the history has them once more."""
        self.chat("--show-prompt", "-n", "1")
        for pasted, text in (("a\rb", "a\nb"), ("a\nb\n\nc\n", "a\nb\n\nc\n"),
                             ("/* a\r */", "/* a\n */"), ("x" * 300, "x" * 300), ("short", "short"),
                             ("a\tb", "a\tb"), ("größer 中文 👋🏽", "größer 中文 👋🏽")):
            self.say("/clear")
            self.assertEqual(self.prompt_of(self.say(paste(pasted))), asked(text))
        self.say("/clear")
        self.assertEqual(self.prompt_of(self.say("say " + paste("1\r2") + " and " + paste("3\r4") + "!")),
                         asked("say 1\n2 and 3\n4!"))
        self.say("/clear")
        self.assertEqual(self.prompt_of(self.say(UP + UP + "?")), asked("say 1\n2 and 3\n4!?"))
        self.leave()

    def test_what_is_pasted_does_nothing(self):
        """Neither a control character in it nor a mark in its text acts."""
        self.chat("--show-prompt", "-n", "1")
        for text in ("ab\x7f\x7fc", "a\x04", "\x12\x15", "a\033[D", "[pasted 2: 1 lines, 3 bytes]\n"):
            self.say("/clear")
            seen = self.say(paste(text))
            expected = re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", lambda c: f"<U+{ord(c[0]):04X}>", text)
            self.assertEqual(self.prompt_of(seen), asked(expected))
        self.leave()

    def test_nothing_is_cut(self):
        """10,000 characters, typed and pasted: a terminal's own lines end at 4,095."""
        cli.endless(self.folder)
        text = "".join(f"{n}. {QUESTION} " for n in range(400))[:10000]
        self.chat("-m", self.folder, "--show-prompt")
        for typed in (text, paste(text)):
            self.type(typed + "\r")
            self.assertEqual(self.prompt_of(self.see(r"ids: \[")), asked(text))
            self.type(CTRL_C)                            # it need not be read
            self.see_prompt()
            self.say("/clear")
        self.leave()

    def test_lines_are_edited(self):
        self.chat("--show-prompt", "-n", "1")
        for typed, text in (("ac" + LEFT + "b", "abc"), ("bc" + HOME + "a" + END + "d", "abcd"),
                            ("aß中" + BACKSPACE * 2 + "b", "ab"), (UP * 2, "ab"), (UP * 4 + "d", "abd"),
                            ("xy" + UP + DOWN + "z", "xyz")):
            self.assertEqual(self.prompt_of(self.say(typed)), asked(text), repr(typed))
            self.say("/clear")
        self.leave()

    def test_a_turn_of_several_lines(self):
        self.chat("--show-prompt", "-n", "1")
        self.type("one\\\r")
        self.see(r"\n\S*\. \Z")
        self.assertEqual(self.prompt_of(self.say("two")), asked("one\ntwo"))
        self.say("/clear")
        for line in ('"""', "/clear", "", "  three \\"):
            self.type(line + "\r")
            self.see(r"\n\S*\. \Z")
        self.assertEqual(self.prompt_of(self.say('"""')), asked("/clear\n\n  three \\"))
        self.type('"""\rlost')
        self.see("lost")
        self.type(CTRL_C)
        self.assertEqual(self.finish()[0], 130)

    def test_what_is_no_utf8_is_refused(self):
        """Typed or pasted; the chat goes on."""
        self.chat("--show-prompt", "-n", "1")
        for wrong in (b"caf\xe9", b"\xff", b"a\xc3(", b"\xed\xa0\x80", b"\033[200~a\r\xe9\033[201~"):
            self.type(wrong + b"\r")
            seen = self.see(r"deepseek: [^\n]+" + PROMPT)
            self.assertRegex(seen, r"deepseek: [^\n]*UTF-8")
            self.assertNotIn("prompt: ", seen)
        self.assertEqual(self.prompt_of(self.say("café")), asked("café"))
        self.leave()

    def test_a_question_that_does_not_fit(self):
        """One line, and the way out; nothing of it is kept."""
        self.chat("--show-prompt")
        seen = self.say("1 " * 300)
        self.assertRegex(seen, r"deepseek: the prompt has \d+ tokens, the context holds 512 [^\n]+\n\S*> \Z")
        first = self.say(QUESTION)
        self.assertEqual(self.prompt_of(first), asked(QUESTION))
        seen = self.say("1 " * 245)
        self.assertRegex(seen, r"deepseek: the prompt has \d+ tokens[^\n]+\n[^\n]*/clear[^\n]*\n\S*> \Z")
        self.assertEqual(self.prompt_of(self.say("Add 6 and 77.")),
                         asked((QUESTION, "\n\n9.9 is larger."), "Add 6 and 77."))
        self.leave()

    def test_a_context_that_becomes_full(self):
        cli.endless(self.folder)
        self.chat("-m", self.folder, "--ctx", "64")
        seen = self.say(QUESTION)
        self.assertRegex(seen, r"ended by the context, which is full\n[^\n]*/clear[^\n]*\n\S*> \Z")
        self.assertNotIn("full", self.say(""))
        self.leave()


class Commands(Person):
    def test_help_and_what_is_unknown(self):
        seen = self.chat()
        self.assertRegex(seen, rf"\A[^\n]*{re.escape(str(TINY))}[^\n]*\n[^\n]*/help[^\n]*\n\S*> \Z")
        seen = self.say("/help")
        for command in ("/clear", "/retry", "/system TEXT", "/save FILE", "/load FILE", "/exit", '"""'):
            self.assertIn(command, seen)
        self.assertRegex(self.say("/frobnicate now"), r"deepseek: [^\n]*/frobnicate[^\n]*/help[^\n]*\n")
        for command, says in (("/save", "FILE"), ("/load", "FILE"), ("/load /nowhere/x", "/nowhere/x"),
                              ("/save /nowhere/x", "/nowhere/x"), ("/retry", "nothing was asked"),
                              (f"/save {TINY}/config.json", "model in use"),
                              (f"/load {TINY}/config.json", "config.json")):
            self.assertRegex(self.say(command), rf"deepseek: [^\n]*{says}[^\n]*\n", command)
        self.type("/exit\r")
        self.assertEqual(self.finish()[0], 0)

    def test_clear_system_and_retry(self):
        self.chat("--show-prompt", "--system", "S", "-n", "200")
        self.say(QUESTION)
        self.assertEqual(self.prompt_of(self.say("/retry")), asked(QUESTION).replace(BOS, BOS + "S"))
        self.assertEqual(self.prompt_of(self.say("b")),
                         asked((QUESTION, "\n\n9.9 is larger."), "b").replace(BOS, BOS + "S"))
        self.say("/clear")
        self.say("/system Be brief.")
        self.assertEqual(self.prompt_of(self.say("c")), asked("c").replace(BOS, BOS + "Be brief."))
        self.say("/clear")
        self.assertEqual(self.prompt_of(self.say("d")), asked("d").replace(BOS, BOS + "S"))
        self.say("/system")
        self.say("/clear")
        self.leave()

    def test_a_saved_conversation_goes_on(self):
        """The messages are those of `tokenize --chat`; the cache is used again, and only if it fits."""
        talk = self.folder / "my talk"
        self.chat("--system", "S")
        self.say(QUESTION)
        self.say(f"/save {talk}")
        self.assertIn("exists already", self.say(f"/save {talk}"))
        self.leave()
        messages = json.loads(talk.read_text())
        self.assertEqual([m["role"] for m in messages], ["system", "user", "assistant"])
        self.assertEqual(messages[2]["content"], cli.TEXT[:-1])
        messages.append({"role": "user", "content": "Add 6 and 77."})
        prompt = self.ok("tokenize", "--chat", given=json.dumps(messages))[0]
        for options, reused in (((), True), (("--kv", "bf16"), False)):
            self.chat("--show-prompt", *options)
            self.assertEqual("its cache is of no use" in self.say(f"/load {talk}"), not reused)
            seen = self.say("Add 6 and 77.")
            self.assertEqual(self.prompt_of(seen), prompt)
            self.assertEqual("from the cache" in seen, reused)
            self.leave()

    def test_what_came_meanwhile_is_not_replaced(self):
        talk = self.folder / "talk"
        self.chat("--save-kv", talk)
        self.say(f"/save {talk}")
        self.assertIn(str(talk), self.leave(1))
        self.assertEqual(json.loads(talk.read_text()), [])
        self.assertEqual(self.temporaries(), [])


class Keys(Person):
    def setUp(self):
        super().setUp()
        self.model = self.folder / "model"
        self.model.mkdir()
        endless_thought(self.model)

    def begin_to_think(self, *options):
        self.chat("-m", self.model, *options)
        self.type(QUESTION + "\r")
        return self.see(r"<think>(?s:.*)So ")

    def test_an_unfinished_thought_is_dropped(self):
        self.begin_to_think("--show-prompt")
        self.type(CTRL_C)
        seen = self.see_prompt()
        self.assertIn("\033[0m", seen)
        self.assertIn("; interrupted\n", seen)
        self.type("And now?\r")
        seen = self.see(r"ids: \[")
        self.assertEqual(self.prompt_of(seen), asked((QUESTION, ""), "And now?"))
        self.see("<think>")
        self.type(CTRL_C)
        self.see_prompt()
        self.leave()

    def test_end_of_input_saves(self):
        kv = self.folder / "kv"
        self.chat("--save-kv", kv)
        self.say(QUESTION)
        self.assertEqual(self.leave()[-1], "\n")         # the shell's next prompt begins a line
        self.chat("--load-kv", kv)
        self.assertRegex(self.say(QUESTION), r"prompt 20 tokens \(19 from the cache\)")
        self.leave()
        self.assertEqual(self.temporaries(), [])

    def test_signals_in_a_thought(self):
        """The terminal is as it was, the cache is there, and the signal is what ended the program."""
        for number, how in enumerate((signal.SIGTERM, signal.SIGHUP)):
            kv = self.folder / f"kv{number}"
            self.assertIn("\033[2m", self.begin_to_think("--save-kv", kv))
            os.kill(self.child, how)
            code, text = self.finish()
            self.assertEqual(code, -how, text)
            self.assertRegex(text, r"\A[^\033]*\033\[0m[^\033]*\Z")
            self.ok("run", "-m", self.model, "-p", QUESTION, "-n", "1", "--load-kv", kv)
            self.assertEqual(self.temporaries(), [])
        self.begin_to_think()
        os.kill(self.child, signal.SIGQUIT)              # at once, with nothing said or saved
        code, text = self.finish()
        self.assertEqual(code, -signal.SIGQUIT, text)
        self.assertRegex(text, r"\A[^\033]*\033\[0m\Z")

    def test_signals_at_the_prompt(self):
        ends = ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGINT, 130))
        for number, (how, code) in enumerate(ends):
            kv = self.folder / f"kv{number}"
            self.start("chat", "--save-kv", kv)
            cooked = termios.tcgetattr(self.master)
            self.see_prompt()
            self.type("half a li")
            self.see("half a li")
            os.kill(self.child, how)
            self.read_until(rb"\A(?!)")
            self.assertEqual(termios.tcgetattr(self.master), cooked)
            ended, text = self.finish()
            self.assertEqual(ended, code, text)
            self.assertIn("\033[?2004l", text)
            self.assertTrue(kv.exists())
            self.assertEqual(self.temporaries(), [])

    def test_no_escape_codes(self):
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}):
            self.start("run", "--device", "cpu", "-p", QUESTION, env=env)
            code, text = self.finish()
            self.assertEqual(code, 0, text)
            self.assertNotIn("\033", text)
            self.assertTrue(text.startswith(ANSWER), text)
            seen = self.chat("--system", "\033[31m", "--show-prompt", env=env)
            for line in ("a" + LEFT + "b", UP + UP, "/help", "x" * 200):
                seen += self.say(line)
            self.assertNotIn("\033", seen + self.leave())

    def test_what_others_wrote_does_nothing(self):
        """Control characters of a prompt or a file's name are shown; into a pipe they go as they are."""
        evil = "\033]0;owned\007\u202e\x9b31m"
        self.start("run", "--raw", "-p", evil, "--show-prompt", "-n", "1")
        code, text = self.finish()
        self.assertIn("prompt: <U+001B>]0;owned<U+0007><U+202E><U+009B>31m\n", text)
        self.assertIn(f"prompt: {evil}\n", self.ok("run", "--raw", "-p", evil, "--show-prompt", "-n", "1")[1])
        self.start("info", "-m", evil)
        code, text = self.finish()
        self.assertEqual(code, 1)
        self.assertRegex(text, r"\Adeepseek: [^\033\007\u202e\x9b\n]+\n\Z")

    def test_a_model_that_breaks_in_a_thought(self):
        """The line about it is not dimmed."""
        data = bytearray((self.model / "model.safetensors").read_bytes())
        length, = struct.unpack("<Q", data[:8])
        entry = json.loads(data[8:8 + length])["model.embed_tokens.weight"]
        row, begin = 2 * entry["shape"][1], 8 + length + entry["data_offsets"][0]
        said = json.loads(self.ok("tokenize", given="So")[0])[0]
        data[begin + said * row:begin + (said + 1) * row] = b"\xff\x7f" * (row // 2)     # no numbers
        (self.model / "model.safetensors").write_bytes(data)
        self.start("run", "-m", self.model, "-p", QUESTION)
        code, text = self.finish()
        self.assertEqual(code, 1)
        self.assertRegex(text, r"\033\[2m<think>[^\033]*\033\[0m\n?deepseek: [^\n\033]*no finite numbers")

    def resize(self, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def test_a_window_of_another_size(self):
        """At the prompt, where the line is drawn anew, and in an answer."""
        self.chat("--show-prompt")
        self.type("a" * 30)
        self.see("a{30}")
        self.resize(20)
        self.see("a{15}")
        self.resize(100)
        self.type("b\r")
        self.assertEqual(self.prompt_of(self.see(r"ids: \[")), asked("a" * 30 + "b"))
        self.see_prompt()
        self.leave()
        self.begin_to_think()
        for columns in (40, 80) * 5:
            self.resize(columns)
        self.type(CTRL_C)
        self.see_prompt()
        self.leave()


class Jobs(Person):
    """Under a shell with job control."""
    def setUp(self):
        super().setUp()
        self.model = self.folder / "model"
        self.model.mkdir()
        endless_thought(self.model)
        bash = shutil.which("bash")
        self.start("--norc", "--noprofile", "--noediting", "-i", program=bash, env={"PS1": "$ ", "PS2": ""})
        self.see(r"\$ \Z")

    def shell(self, line):
        """A command of the shell, and all that is printed until it is over."""
        self.type(line + "; echo =$((6 * 7))=\n")
        return self.see("[\r\n]=42=\r\n(?s:.*)\\$ ")

    def wait_for(self, state):
        """Until the shell says of its job what `jobs` calls it; "" for none."""
        while True:
            said = self.shell("jobs")
            if (state in said) if state else not re.search(r"\[\d\]", said):
                return
            time.sleep(0.05)

    def begin(self, command, until):
        self.type(f"{PROGRAM} {command}\n")
        return self.see_prompt() if until is PROMPT else self.see(until)

    def stop(self):
        self.type(CTRL_Z)
        return self.see(r"Stopped(?s:.*)\$ \Z")

    def test_stop_at_the_prompt(self):
        """The line that was begun is there again."""
        self.begin("chat --show-prompt -n 1", PROMPT)
        self.type("Add 6 ")
        self.see("Add 6 ")
        self.assertIn("\033[?2004l", self.stop())
        self.assertIn(" icanon", self.shell("stty -a | tr ';' '\\n' | grep icanon"))
        self.type("fg\n")
        self.see(r"> Add 6 ")
        self.type("and 77.\r")
        self.assertEqual(self.prompt_of(self.see_prompt()), asked("Add 6 and 77."))
        self.type(CTRL_D)
        self.see(r"\$ \Z")
        self.assertIn("\ncode 0\n", self.shell("echo code $?"))

    def test_stop_in_a_thought(self):
        self.begin(f"chat -m {self.model}", PROMPT)
        self.type(QUESTION + "\r")
        self.see(r"\033\[2m<think>(?s:.*)So ")
        self.assertRegex(self.stop(), r"\033\[0m[^\033]*Stopped")
        self.type("fg\n")
        self.see(r"\033\[2m")
        self.type(CTRL_C)
        self.assertRegex(self.see_prompt(), r"\033\[0m(?s:.*); interrupted\n")
        self.type(CTRL_D)
        self.see(r"\$ \Z")

    def test_on_in_the_background(self):
        """And ended there, with what it has."""
        kv = self.folder / "kv"
        self.begin(f"run -m {self.model} -p 9 --save-kv {kv} > {self.folder}/out", "\n")
        while not (self.folder / "out").exists() or not (self.folder / "out").stat().st_size:
            time.sleep(0.01)
        self.stop()
        self.shell("bg")
        self.wait_for("Running")
        size = (self.folder / "out").stat().st_size
        while (self.folder / "out").stat().st_size < size + 1000:
            time.sleep(0.01)
        self.shell("kill %1")
        self.wait_for("")
        self.assertTrue(kv.exists())
        self.assertEqual(self.temporaries(), [])

    def test_a_stopped_chat_can_be_ended(self):
        kv = self.folder / "kv"
        self.begin(f"chat --save-kv {kv}", PROMPT)
        self.stop()
        self.shell("kill %1")
        self.wait_for("")
        self.assertTrue(kv.exists())
        self.assertEqual(self.temporaries(), [])

    def test_no_shell_no_stop(self):
        """Where nobody could say `fg`, Ctrl-Z does nothing."""
        self.type("exec " + PROGRAM + " chat\n")
        self.see_prompt()
        self.type(CTRL_Z)
        self.assertIn("nothing was asked yet", self.say("/retry"))
        self.type(CTRL_D)
        self.assertEqual(self.finish()[0], 0)


if __name__ == "__main__":
    suite.main("person")
