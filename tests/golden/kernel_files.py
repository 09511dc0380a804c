#!/usr/bin/env python3
"""What a kernel author is given: compare.py and v3_layer.py, at small sizes. The suite `kernel-files`.

DEEPSEEK names another program than ./deepseek.
"""
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(HERE.parent / "cli"))
import compare
import published
import suite
import v3_layer

SMALL = {"hidden_size": 192, "intermediate_size": 150, "moe_intermediate_size": 40, "num_attention_heads": 4,
         "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24,
         "qk_rope_head_dim": 16, "v_head_dim": 20, "vocab_size": 100}
SETTINGS = [word for item in SMALL.items() for word in ("--set", "=".join(map(str, item)))]


def run(script, *arguments):
    """(exit code, stdout, stderr)"""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())

    def tearDown(self):
        shutil.rmtree(self.folder)

    def layer(self, name, *arguments):
        out = self.folder / name
        code, text, error = run("v3_layer.py", "--seed", 1, "--out", out, *SETTINGS, *arguments)
        self.assertEqual((code, error), (0, ""))
        self.assertRegex(text, r"\A\S+: 0\.\d\d GB of weights\n")
        return out

    def taps(self, model, *options):
        out = self.folder / "-".join(["taps", *options])
        ids = (model / "ids.txt").read_text().strip()
        command = [published.PROGRAM, "logits", "-m", model, "--ids", ids, "--taps", "--out", out, *options]
        subprocess.run(command, check=True)
        return out


class Compare(Case):
    def test_itself(self):
        code, text, _ = run("compare.py", "--selftest")
        self.assertEqual(code, 0, text)
        self.assertRegex(text, r"\Acompare-selftest: 28 passed, 0 failed\n\Z")

    def test_two_forms(self):
        """They differ in bits and not within float32's rounding; what the naive one has not is named."""
        model = self.layer("a")
        ours, naive = model / "taps.safetensors", self.taps(model, "--mla", "naive")
        self.assertEqual(run("compare.py", ours, self.taps(model))[:2], (0, "24 of 24 tensors equal\n"))
        code, text, _ = run("compare.py", ours, naive)
        self.assertEqual(code, 2)
        self.assertRegex(text, r"(?m)^layers\.0\.lse: \d+ of 64 numbers; max abs [\d.e-]+, NMSE [\d.e-]+, "
                               r"calc_diff -?[\d.e-]+; worst row \[\d+\]: [\d.e-]+; "
                               r"first \[\d+, \d\]: \S+ against \S+$")
        code, text, _ = run("compare.py", ours, naive, "--tolerance", "*=2e-5")
        self.assertEqual((code, text.splitlines()),
                         (2, [f"layers.0.q_absorbed: not in {naive}", f"layers.0.z: not in {naive}",
                              "22 of 24 tensors equal"]))
        self.assertEqual(run("compare.py", ours, naive, "--only", "c_kv")[0], 0)

    def test_bad_input(self):
        (self.folder / "x").write_bytes(b"no tensors")
        for arguments in ((self.folder / "x", self.folder / "x"), (self.folder / "absent", self.folder / "x"),
                          (self.folder / "x",), (self.folder / "x", self.folder / "x", "--tolerance", "z")):
            code, out, error = run("compare.py", *arguments)
            self.assertEqual((code, out, error.count("\n")), (1, "", 1), error)


class V3Layer(Case):
    def test_shape(self):
        """The published config.json, but for one layer, its experts and the vocabulary."""
        other = {"num_hidden_layers", "n_routed_experts", "first_k_dense_replace", "vocab_size",
                 "num_nextn_predict_layers"}
        config = v3_layer.config_of(v3_layer.parse(["--seed", "1", "--out", "x", "--fp8"]))
        self.assertEqual({k for k in published.V3 if config[k] != published.V3[k]}, other)

    def test_size(self):
        """The published files hold 58 layers with experts, three dense ones, and the MTP module's."""
        def elements(*arguments):
            config = v3_layer.config_of(v3_layer.parse(["--seed", "1", "--out", "x", "--fp8", *arguments]))
            return sum(math.prod(t[2]) for t in v3_layer.tensors(config) if t[1] == "F8_E4M3")
        self.assertEqual(59 * elements("--experts", "256") + 3 * elements("--dense"), 680571043840)

    def test_seed(self):
        a, again, fewer = self.layer("a"), self.layer("again"), self.layer("fewer", "--experts", "16")
        weights = lambda folder: compare.File(folder / "model.safetensors")
        self.assertEqual((a / "model.safetensors").read_bytes(), (again / "model.safetensors").read_bytes())
        self.assertEqual((a / "ids.txt").read_text(), (again / "ids.txt").read_text())
        name = "model.layers.0.mlp.experts.7.up_proj.weight"
        self.assertEqual(weights(a).data(name), weights(fewer).data(name))
        self.assertNotEqual(weights(a).data(name), weights(a).data(name.replace(".7.", ".8.")))
        run("v3_layer.py", "--seed", 2, "--out", self.folder / "other", *SETTINGS, "--no-taps")
        self.assertNotEqual(weights(a).data(name), weights(self.folder / "other").data(name))
        self.assertFalse((self.folder / "other" / "taps.safetensors").exists())

    def test_weights(self):
        """Of variance 1 / inputs, in either format."""
        for folder in (self.layer("a"), self.layer("b", "--fp8")):
            file, name = compare.File(folder / "model.safetensors"), "model.layers.0.self_attn.o_proj.weight"
            dtype, (rows, cols), _ = file.tensors[name]
            w = compare.numbers(file.data(name), dtype)
            if dtype == "F8_E4M3":
                scale = compare.numbers(file.data(name + "_scale_inv"), "F32")
                w = [x * scale[i // cols // 128 * -(-cols // 128) + i % cols // 128] for i, x in enumerate(w)]
            self.assertAlmostEqual(sum(w) / len(w) * math.sqrt(cols), 0, delta=0.05)
            self.assertAlmostEqual(sum(x * x for x in w) / len(w) * cols, 1, delta=0.3)

    def test_rounding(self):
        """E4M3 as golden vectors have it; the ties of BF16 go to even."""
        file = compare.File(HERE / "fp8" / "fp8.safetensors")
        x, codes = compare.numbers(file.data("cast.x"), "F32"), file.data("cast.q")
        pairs = [(v, c) for v, c in zip(x, codes) if abs(v) <= 448 and v != 0]
        self.assertGreater(len(pairs), 100)
        for v, code in pairs:
            self.assertEqual(v3_layer.e4m3(v), code, v)
        self.assertEqual([v3_layer.bf16(v) for v in (1, 1 + 2**-8, 1 + 3 * 2**-8, -2.5)],
                         [0x3F80, 0x3F80, 0x3F82, 0xC020])

    def test_variants(self):
        for name, arguments, tap in (("f", ["--fp8"], "choice"), ("d", ["--dense"], "lse")):
            file = compare.File(self.layer(name, *arguments) / "taps.safetensors")
            self.assertIn(f"layers.0.{tap}", file.tensors)
            values = compare.numbers(file.data("logits"), "F32")
            self.assertTrue(0.1 < math.sqrt(sum(v * v for v in values) / len(values)) < 10)
        self.assertNotIn("layers.0.choice", file.tensors)

    def test_refusals(self):
        self.layer("a", "--no-taps")
        for arguments, says in ((["--out", self.folder / "a"], "not empty"),
                                (["--out", self.folder / "b", "--set", "hidden=1"], "hidden=1"),
                                (["--out", self.folder / "b", "--tokens", "0"], "--tokens 0"),
                                (["--out", self.folder / "b", "--set", f"vocab_size={1 << 40}"], "are free"),
                                (["--out", self.folder / "c", *SETTINGS, "--program", "absent"], "absent")):
            code, _, error = run("v3_layer.py", "--seed", 1, *arguments)
            self.assertEqual((code, error.count("\n")), (1, 1), error)
            self.assertIn(says, error)


if __name__ == "__main__":
    suite.main("kernel-files")
