#!/usr/bin/env python3
"""Do the golden tests see the mistakes that ports of DeepSeek's models make?

    tests/golden/mistakes.py               from anywhere; programs and patched sources in build/mistakes
    tests/golden/mistakes.py WORD          only the mistakes whose description contains WORD

Each mistake of the list below is planted in a copy of deepseek.cpp or tokenizer.h, and the golden tests
(golden.cpp, in double and in float) must fail on the named model, with the named tensor as the first one that
differs. Without a mistake they must pass. How a place is written down: tests/planting.py.
"""
import concurrent.futures
import os
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "tests"))
from planting import CHOOSE, find_place, plant
OUT = ROOT / "build" / "mistakes"
CPP, TOKENIZER = "deepseek.cpp", "tokenizer.h"
PROGRAMS = DOUBLE, FLOAT = "golden-double", "golden"


@dataclass
class Mistake:
    kind: str                   # the family, in the words of the field
    what: str                   # what is planted
    model: str                  # where it shows: a golden model, "tokens" or "fp8"
    tensor: str                 # the first tensor that differs; for tokens: ids, chat or decode
    places: list                # (source text with «part to replace», what stands there instead)
    test: str = "MatchesGolden"
    file: str = CPP
    programs: tuple = PROGRAMS  # that must see it: one rounding less among many shows in double alone


# In the patched copy only: what a port does that keeps numbers in another type.
PRELUDE = CHOOSE + """
#include <cmath>
#include <string>
template <class T> T as_f16(T x) {               // 11 significant bits, infinity from 65520 on
    int exponent = 0;
    T fraction = std::frexp(x, &exponent);
    T y = std::ldexp(std::nearbyint(std::ldexp(fraction, 11)), exponent - 11);
    return std::abs(y) > T(65504) ? std::copysign(T(INFINITY), y) : y;
}
template <class T> T as_bf16(T x) {              // 8 significant bits
    int exponent = 0;
    T fraction = std::frexp(x, &exponent);
    return std::isfinite(x) ? std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8) : x;
}
inline const int* planted_slot = nullptr;        // for a mistake in two places
inline const void* planted_weight = nullptr;
inline std::string_view kept(const std::string& text) { return *new std::string(text); }
inline std::string with_ascii_letters(std::string regex) {
    for (size_t at; (at = regex.find("\\\\p{L}")) != std::string::npos;) regex.replace(at, 5, "A-Za-z");
    return regex;
}
"""

SCORES = "p[j] = times_row(a.k, j, q); «softmax_and_lse(softmax_plain, p, a.scale, n, a.lse_of(t, h));»"
SCORES_OF = """for (int j = 0; j < n; j++) p[j] = as_f16(FACTOR * p[j]);
        softmax_plain(p, 1, n);"""
SCALE = "real block[LANES] = {}, s = «load<float>(scale)»;"
UP_TO_2 = "std::exp2(std::ceil(std::log2(load<float>(scale))))"
MLA_HEADS = ("{a.q + c.Dn, c.H * q_dim, q_dim, T, c.H}, a.cos_sin, c.Dr",
             "{a.kv + c.Rkv, width, 0, T, 1}, a.cos_sin, c.Dr")
GQA_HEADS = "{a.q, c.H * d, d, T, c.H}, a.cos_sin, d", "{k, width, d, T, c.G}, a.cos_sin, d"
GATE = "case Gate::NOAUX_TC: «gate_noaux_tc(r, w.gate_bias.data(), shape);»"
RECOVERED = """gate_noaux_tc(r, w.gate_bias.data(), shape);
        for (int t = 0; t < T; t++) {
            Routing one = r.token(t, shape);
            for (int e = 0; e < c.E; e++)
                one.affinity[e] = as_bf16(one.choice[e]) - w.gate_bias[size_t(e)];
            mixture_weights(one, shape);
        }"""
SUM, SHARE = "«sum += r.affinity[r.idx[k]];»", "real s = «r.affinity[r.idx[k]]»;"
ADD_BIAS = "r.choice[e] = r.affinity[e] + «bias[e]»;"
TIES = [("[v](int a, int b) { return v[a] > v[b] || (v[a] == v[b] && «a < b»); }", "a > b")]
EXPERTS = """«run_experts(
        {a.u, T, c.K, a.first, a.slot_token, a.expert_in, a.expert_out, a.expert_in, a.gate, a.up}, w);»"""
DISPATCH = "«std::copy_n(a.u + a.slot_token[i] * D, D, a.in + i * D);»"
MIX = "«kernels.weigh({sum, 0}, {weight + k, 0}, expert, 1, 1);»"
WEIGHTED_INPUT = """int64_t pair = std::find(planted_slot, planted_slot + slots, int(i)) - planted_slot;
    const real* u = a.u + a.slot_token[i] * D;
    for (int d = 0; d < D; d++)
        a.in[i * D + d] = static_cast<const real*>(planted_weight)[pair] * u[d];"""
SWAP = """for (int t = 0; t < T; t++) {
        real* in = a.mtp_in + 2 * int64_t(t) * c.D;
        std::swap_ranges(in, in + c.D, in + c.D);
    }
    matmul({a.mtp_x, c.D}, {a.mtp_in, 2 * c.D}, w.proj, T);"""
MAGNITUDE = "? c.attention_factor : «yarn_mscale(c.factor, c.mscale) / all»;"
NORM_Q = "if (c.qk_norm) rmsnorm({a.q, d}, {a.q, d}, w.q_norm, int64_t(T) * c.H, c.eps);"
NORM_K = "if (c.qk_norm) rmsnorm({k, d}, {k, d}, w.k_norm, int64_t(T) * c.G, c.eps);"
NORM_ALL = """Vector all;
    for (int h = 0; h < c.H; h++) all.insert(all.end(), w.q_norm.begin(), w.q_norm.end());
    rmsnorm({a.q, c.H * d}, {a.q, c.H * d}, all, T, c.eps);"""
MSCALE = "yarn_mscale(c.factor, c.mscale)"
BITS = "HasTheSameBits"
CHUNK = "the second chunk of a prompt"
FP8, H100, ARITH = "GoldenFp8", "GoldenFp8.AddsAsAnH100", "RoundsWhere"
CUT = "«terms[i].significand / (1 << std::max(shift, 0))»"

MISTAKES = [
    # 1. YaRN's mscale: exact at position 0, wrong later, fluent all the same.
    Mistake("mscale", "no mscale^2 in the softmax scale", "v2-lite", "layers.0.z",
            [("«rope.score_scale = all * all;»", "rope.score_scale = 1;")]),
    Mistake("mscale", "mscale instead of its square", "v3-bf16", "layers.0.z",
            [("«rope.score_scale = all * all;»", "rope.score_scale = all;")]),
    Mistake("mscale", "the field mscale taken for mscale_all_dim", "v2-groups", "layers.0.q_rope",
            [("double all = «yarn_mscale(c.factor, c.mscale_all_dim)»;", MSCALE)]),
    Mistake("mscale", "cos and sin without their ratio of mscales", "v2-groups", "layers.0.q_rope",
            [(MAGNITUDE, "1.0")]),
    Mistake("mscale", "cos and sin with mscale itself", "v2-lite", "layers.0.q_rope",
            [(MAGNITUDE, MSCALE)]),
    Mistake("mscale", "softmax scale of the latent width, not of the head's", "v3-bf16", "layers.0.z",
            [("std::sqrt(double(«m.config.Dn + m.config.Dr»))", "m.config.Rkv + m.config.Dr")]),

    # 2. RoPE: which two numbers form a pair.
    Mistake("rope", "half layout in MLA", "v3-bf16", "layers.0.q_rope",
            [(f"«rope_interleaved({heads});»", f"rope_half({heads});") for heads in MLA_HEADS]),
    Mistake("rope", "interleaved layout in GQA", "llama3", "layers.0.lse",
            [(f"«rope_half({heads});»", f"rope_interleaved({heads});") for heads in GQA_HEADS]),

    # Qwen3's norms of heads.
    Mistake("heads", "no norms of q and k", "qwen3", "layers.0.lse",
            [("if («c.qk_norm») { // a head", "false")]),
    Mistake("heads", "norms of q and k after their rotation", "qwen3", "layers.0.lse",
            [("if («c.qk_norm») { // a head", "false"),
             (f"«rope_half({GQA_HEADS[0]});»", f"rope_half({GQA_HEADS[0]}); {NORM_Q}"),
             (f"«rope_half({GQA_HEADS[1]});»", f"rope_half({GQA_HEADS[1]}); {NORM_K}")]),
    Mistake("heads", "one norm over all heads", "qwen3", "layers.0.lse",
            [("«rmsnorm({a.q, d}, {a.q, d}, w.q_norm, int64_t(T) * c.H, c.eps);»", NORM_ALL)]),
    Mistake("heads", "norms of q and k exchanged", "qwen3", "layers.0.lse",
            [('w.q_norm = b.vector(p + «"q_norm.weight"»', '"k_norm.weight"'),
             ('w.k_norm = b.vector(p + «"k_norm.weight"»', '"q_norm.weight"')]),
    Mistake("heads", "1e-6 for the config's eps in the norms of heads", "qwen3-plain", "layers.0.attn_out",
            [("w.k_norm, int64_t(T) * c.G, «c.eps»", "1e-6")]),
    Mistake("mscale", "YaRN of GQA without its factor of cos and sin", "qwen3", "layers.0.lse",
            [(MAGNITUDE, "1.0")]),

    # 3. The correction bias picks experts and must not enter the mixture.
    Mistake("bias", "mixture weights from biased scores", "v3-bf16", "layers.1.expert_weight",
            [(SUM, "sum += r.choice[r.idx[k]];"), (SHARE, "r.choice[r.idx[k]]")]),
    Mistake("bias", "scores recovered as (score + bias) - bias, in bf16", "v3-bf16", "layers.1.expert_weight",
            [(GATE, RECOVERED)]),
    Mistake("bias", "bias stored in bf16", "v3-bf16", "layers.1.group_score",
            [(ADD_BIAS, "as_bf16(bias[e])")]),
    Mistake("bias", "negative bias rejected", "v3-negative", "layers.1.expert_idx",
            [(ADD_BIAS, "std::max(bias[e], real(0))")]),

    # 4. The gate of another model.
    Mistake("gate", "V2's softmax for V3's sigmoid", "v3-bf16", "layers.1.group_score",
            [("«c.sigmoid_affinity ? Affinity::SIGMOID : Affinity::SOFTMAX»", "Affinity::SOFTMAX")]),
    Mistake("gate", "group_limited_greedy for noaux_tc", "v3-bf16", "layers.1.group_score",
            [(GATE, "gate_group_limited_greedy(r, shape);")]),
    Mistake("gate", "a group's score from its best expert alone", "v3-bf16", "layers.1.group_score",
            [("r.group_score[i] = «choice[best[0]] + choice[best[1]]»;", "choice[best[0]]")]),
    Mistake("gate", "masked groups filled with 0", "v3-negative", "layers.1.expert_idx",
            [("r.choice + i * size, size, «-std::numeric_limits<real>::infinity()»", "real(0)")]),

    # 5. Ties.
    Mistake("ties", "the higher id wins (sigmoid)", "v3-ties", "layers.1.expert_idx", TIES),
    Mistake("ties", "the higher id wins (softmax)", "v2-ties", "layers.1.expert_idx", TIES),

    # 6. Block scales and ue8m0.
    Mistake("scales", "the exponent byte of a scale read as an integer", "v3-ue8m0", "layers.0.c_q",
            [(SCALE, "real(std::bit_cast<uint32_t>(load<float>(scale)) >> 23)")]),
    Mistake("scales", "scale rounded to a power of two after quantising", "v3-fp8", "layers.0.c_q",
            [(SCALE, UP_TO_2)]),
    Mistake("scales", "weight_scale_inv taken for an inverse", "v3-fp8", "layers.0.c_q",
            [(SCALE, "1 / load<float>(scale)")]),
    Mistake("scales", "a head's rows counted from the start of a block", "v3-fp8", "layers.0.attn_out",
            [("size_t((«first_row + r») / SCALE_BLOCK)", "r")]),

    # 7. A kernel for powers of two is given other scales. Only o_proj has such here, as in V3.1.
    Mistake("pow2", "all scales of a ue8m0 model rounded to powers of two", "v3-ue8m0", "layers.0.attn_out",
            [(SCALE, UP_TO_2)]),

    # 8. The routing weight belongs to an expert's output. Before the down projection it would only round
    # differently (a product commutes with a matrix); before the activation it changes the result.
    Mistake("weight", "routing weight on an expert's input", "v3-bf16", "layers.1.routed_out",
            [(EXPERTS, "planted_slot = a.slot, planted_weight = a.gate_weight; " + EXPERTS.strip("«»")),
             (DISPATCH, WEIGHTED_INPUT), (MIX, "add(sum, expert_out + int64_t(slot[k]) * D, size_t(D));")]),

    # 9. MTP. (Positions shifted by one would not show: RoPE sees distances alone.)
    Mistake("mtp", "hidden state first, embedding second", "v3-mtp", "mtp.in",
            [("«matmul({a.mtp_x, c.D}, {a.mtp_in, 2 * c.D}, w.proj, T);»", SWAP)]),
    Mistake("mtp", "hidden state before the final norm", "v3-mtp", "mtp.in",
            [("const real* h = «s.a.h» + int64_t(begin", "s.a.x")]),
    Mistake("mtp", "enorm and hnorm exchanged", "v3-mtp", "mtp.in",
            [("{a.mtp_in, 2 * c.D}, «w.enorm», T", "w.hnorm"), ("{h, c.D}, «w.hnorm», T", "w.enorm")]),
    Mistake("mtp", "embedding of this token, not of the next", "v3-mtp", "mtp.in",
            [("std::span(s.tokens).subspan(«size_t(begin) + 1»,", "size_t(begin)")]),

    # 10. Tokenizer.
    Mistake("tokenizer", "a blank put before the text", "tokens", "ids",
            [("cut(«nfc_ ? composed : gap», normalised_added_,", 'kept(" " + std::string(gap))')],
            "Tokens", TOKENIZER),
    Mistake("tokenizer", "Metaspace instead of ByteLevel: blanks lost", "tokens", "ids",
            [("else «bpe_.encode(text, ids);»",
              "bpe_.encode(text.substr(text.size() > 1 && text[0] == ' '), ids);")],
            "Tokens", TOKENIZER),
    Mistake("tokenizer", "a regex that knows ASCII letters alone", "tokens", "ids",
            [("return Regex(«out», PCRE2_UTF | PCRE2_UCP", "with_ascii_letters(out)")], "Tokens", TOKENIZER),
    Mistake("tokenizer", "BOS twice", "tokens", "chat",
            [("return out.append(«bytes(bos)») + (known_",
              "kept(std::string(bytes(bos)) + std::string(bytes(bos)))")],
            "Tokens", TOKENIZER),
    Mistake("tokenizer", "no BOS", "tokens", "chat",
            [("return out.append(«bytes(bos)») + (known_", "std::string_view()")], "Tokens", TOKENIZER),

    # 11. fp16, and what breaks when a prompt takes two forward passes.
    Mistake("fp16", "attention scores in fp16", "v3-bf16", "layers.0.z",
            [(SCORES, SCORES_OF.replace("FACTOR", "a.scale"))]),
    Mistake("fp16", "attention scores overflow to infinity and NaN", "v3-bf16", "layers.0.z",
            [(SCORES, SCORES_OF.replace("FACTOR", "real(0x1p20)"))]),
    Mistake("fp16", "residual stream in fp16", "v3-bf16", "layers.0.out",
            [('"ffn_out", a.y, T, {c.D}); «add(x, a.y, n);»',
              "add(x, a.y, n); for (size_t i = 0; i < n; i++) x[i] = as_f16(x[i]);")]),
    Mistake("chunks", "positions restart with " + CHUNK, "v3-bf16", "layers.0.q_rope",
            [("rope_table(s.a.cos_sin, s.model.rope, T, «pos»);", "0")], BITS),
    Mistake("chunks", "the cache is overwritten by " + CHUNK, "v3-bf16", "layers.0.c_kv",
            [("cache.row(«n[size_t(t)]» - 1)); store_row", "int(t) + 1")], BITS),
    Mistake("chunks", "MLA forgets the past with " + CHUNK, "v3-bf16", "layers.0.z",
            [("n = «a.n[size_t(t)]»; // causal", "int(t) + 1")], BITS),
    Mistake("chunks", "GQA forgets the past with " + CHUNK, "qwen2", "layers.0.lse",
            [("n = «a.n[size_t(t)]»; // causal", "int(t) + 1")], BITS),

    # 12. Expert parallelism: physical and logical experts confused, a combine that takes another's rows.
    Mistake("experts", "permuted expert map", "v3-bf16", "layers.1.routed_out",
            [("in, &«w.experts[e]».w_gate, n", "w.experts[(e + 1) % w.experts.size()]")]),
    Mistake("experts", "combine takes another pick's row", "v3-bf16", "layers.1.routed_out",
            [("real_matrix(expert_out + int64_t(«slot[k]») * D", "slot[t * K + (k + 1) % K]")]),

    # What kernels hand each other.
    Mistake("borders", "the logarithm to base 2", "v3-bf16", "layers.0.lse",
            [("real(double(top) - «std::log(double(z[best]))»)", "std::log2(double(z[best]))")]),
    Mistake("borders", "the logarithm of scores that are not scaled", "qwen2", "layers.0.lse",
            [("top = n ? «z[best] * scale»", "z[best]")]),
    Mistake("borders", "the shared expert in the routed sum", "v3-bf16", "layers.1.routed_out",
            [("a.gate_weight, c.K, «nullptr», T, c.D);", "shared")]),

    # And one that only an unusual config shows.
    Mistake("eps", "the config's eps in the latent norms", "v2-noyarn", "layers.0.c_q",
            [("w.q_norm, T, «LATENT_EPS»", "c.eps")]),

    # 13. FP8: the scale of a tile.
    Mistake("fp8", "NaN beyond 448 instead of 448", "fp8", "cast.q",
            [("sign | «std::min(rounded, 126u)»", "std::min(rounded, 127u)")], FP8),
    Mistake("fp8", "no floor below the scale", "fp8", "quant.v3.s",
            [("amax = «amax < LEAST_AMAX ? LEAST_AMAX : amax»;", "amax")], FP8),
    Mistake("fp8", "times the inverse of the scale where V3 divides", "fp8", "quant.v3.q",
            [("«v / t.s» : v * t.inverse", "v * (1 / t.s)")], FP8),
    Mistake("fp8", "scale rounded to a power of two after dividing by it", "fp8", "quant.v3_ue8m0.s",
            [("tile_scale(f.formula, amax, «f.ue8m0»)", "false"),
             ("return finite ? «t.s»", "power_above(t.s, f.ue8m0)")], FP8),
    Mistake("fp8", "tiles of 127 numbers", "fp8", "quant.v3.q",
            [("begin = i % blocks * «SCALE_BLOCK»; scale[i]", "(SCALE_BLOCK - 1)")], FP8),
    Mistake("fp8", "scales of the wrong block", "fp8", "gemm.exact",
            [("scale + «(first_row + r) / tile * scale_blocks(n)»", "(first_row + r) / tile")], FP8),

    # 14. FP8: what a tensor core adds.
    Mistake("hopper", "no promotion", "fp8", "gemm.hopper",
            [("float block = «0»;", "sum / (p.a_scale[i] * p.b_scale[i])"),
             ("sum = std::fma(p.a_scale[i] * p.b_scale[i], block, «sum»);", "0.0f")], FP8),
    Mistake("hopper", "14 fraction bits", "fp8", "h100.d",
            [("exponent + F32_FRACTION - «HOPPER_FRACTION»;", "14"),
             ("std::abs(sum)))) - «HOPPER_FRACTION» - 1)", "14"), ("top - «HOPPER_FRACTION»);", "14")], H100),
    Mistake("hopper", "terms rounded to the nearest", "fp8", "h100.d",
            [(CUT, "int(std::nearbyint(double(terms[i].significand) / (1 << std::max(shift, 0))))")], H100),
    Mistake("hopper", "terms cut towards minus infinity", "fp8", "h100.d",
            [(CUT, "terms[i].significand >> std::max(shift, 0)")], H100),
    Mistake("hopper", "the sum not cut", "fp8", "h100.d", [("«sum / cut * cut»", "sum")], H100),
    Mistake("promoted", "two roundings more: (sum s_x) s_w, then added", "fp8", "gemm.promoted",
            [("sum = «std::fma(p.a_scale[i] * p.b_scale[i], sum_lanes(lane), sum)»;",
              "sum + sum_lanes(lane) * p.a_scale[i] * p.b_scale[i]")], FP8),

    # 15. The forward pass in bf16 and FP8.
    Mistake("arith", "activations not quantised", "v3-fp8", "layers.0.attn_out",
            [("if («p.w->arith >= Arith::FP8») linear_fp8(p);", "false")], ARITH),
    Mistake("arith", "powers of two where scale_fmt does not ask for them", "v3-fp8", "layers.0.attn_out",
            [("{Fp8Formula::V3, «w.arith == Arith::FP8_UE8M0»}", "true")], ARITH),
    Mistake("arith", "a head's rows counted from the start of a block", "v3-fp8", "layers.0.attn_out",
            [("inside = «w.first_row % SCALE_BLOCK»;", "0")], ARITH),
    Mistake("arith", "norms not rounded", "v3-fp8", "layers.0.attn_out",
            [("* scale * w[size_t(i)]; «rounded(out[t], n);»", ";")], ARITH, CPP, (DOUBLE,)),
    Mistake("arith", "probabilities not rounded", "v3-fp8", "layers.0.attn_out",
            [("p, 1, n, a.lse_of(t, h)); «round_to_bf16(p, n);»", ";")], ARITH, CPP, (DOUBLE,)),
    Mistake("arith", "the gate's logits rounded", "v3-fp8", "layers.1.ffn_out",
            [("role == Role::EMBED || «role == Role::GATE») return;", "false")],
            ARITH, CPP, (DOUBLE,)),
    Mistake("arith", "silu and its product rounded together", "v2-lite", "layers.0.ffn_out",
            [("gate, one.data(), n); «round_to_bf16(gate, n);»", ";")], ARITH, CPP, (DOUBLE,)),
    Mistake("arith", "rounded before the bias is added", "qwen2", "layers.0.attn_out",
            [("if («m.config.qkv_bias && w->arith == Arith::BF16»)", "false")], ARITH, CPP, (DOUBLE,)),
]


# -- planting ------------------------------------------------------------------------------------------------

def planted(source, file):
    """The source text with every mistake of this file in it."""
    places = [(number, place, wrong) for number, m in enumerate(MISTAKES) if m.file == file
              for place, wrong in m.places]
    return plant(source, places, file)


def compile_program(name, options):
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-ffp-contract=off", "-fopenmp", "-w",
               "-DDEEPSEEK_NO_MAIN", f"-I{OUT}", f"-I{ROOT}", *options, str(ROOT / "tests/golden/golden.cpp"),
               "-o", str(OUT / name), "-lgtest", "-lgtest_main", "-lsimdjson", "-lpcre2-8", "-lutf8proc"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)}\n{done.stdout[-3000:]}")


def build(workers):
    OUT.mkdir(parents=True, exist_ok=True)
    for file in (CPP, TOKENIZER):
        text = planted((ROOT / file).read_text(), file)
        (OUT / file).write_text(PRELUDE * (file == CPP) + text)       # which includes the other one
    jobs = [workers.submit(compile_program, DOUBLE, ["-DDEEPSEEK_REAL=double"]),
            workers.submit(compile_program, FLOAT, [])]
    for job in jobs:
        job.result()


# -- judging -------------------------------------------------------------------------------------------------

def run(program, number, filters):
    """(exit code, output) of one program with one mistake (-1: none)."""
    folder = OUT / f"yardsticks.{number}"           # the float build needs the results of the double build
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"MISTAKE": str(number), "GOLDEN_DIR": str(folder)}
    done = subprocess.run([OUT / program, "--gtest_filter=" + filters, "--gtest_brief=1"], cwd=ROOT,
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode(errors="replace")


def verdict(m, code, output):
    """Empty, or what is wrong with the answer to a mistake."""
    seen = re.search(r"first difference: (\S+) ([\w.]*\w)", output)
    if code == 0:
        return "not seen"
    if not seen or seen.groups() != (m.model, m.tensor):
        return f"seen at {seen.groups() if seen else 'no tensor'}\n{output[-1500:]}"
    return ""


def tests_of(m):
    return f"*{m.test}*" if m.model in ("tokens", "fp8") else f"*{m.test}*/{m.model.replace('-', '_')}"


def check(number):
    """Lines of what is wrong, one for each program; the double build first, its results are the yardstick."""
    m = MISTAKES[number]
    wrong = {program: verdict(m, *run(program, number, tests_of(m))) for program in m.programs}
    return [f"{program}: {text}" for program, text in wrong.items() if text]


def check_itself():
    """A blind test, a wrong tensor, a lost place and a double one must not pass."""
    m, wrong = MISTAKES[0], []
    answers = [(0, ""), (0, f"first difference: {m.model} {m.tensor}"), (1, "crashed"),
               (1, f"first difference: {m.model} {m.tensor}_other"), (1, f"first difference: v9 {m.tensor}")]
    wrong += [f"accepted {answer}" for answer in answers if not verdict(m, *answer)]
    if verdict(m, 1, f"first difference: {m.model} {m.tensor}\n") != "":
        wrong.append("refused the right answer")
    for source in ("f(y);", "f( x );\nf(\nx );"):
        try:
            find_place(source, "f( «x» );", "source")
            wrong.append(f"found a place in {source!r}")
        except ValueError:
            pass
    if find_place("g(x); f( a\n  b );", "f( «a b» );", "source") != (9, 14):
        wrong.append("missed a place")
    return wrong


def check_right():
    """Without a mistake the same tests pass."""
    filters = ":".join(sorted(set(map(tests_of, MISTAKES))))
    results = [(program, *run(program, -1, filters)) for program in PROGRAMS]
    return [f"{program}: fails without one\n{output[-1500:]}" for program, code, output in results if code]


def main(words):
    numbers = [n for n, m in enumerate(MISTAKES) if all(w in f"{m.kind} {m.what}" for w in words)]
    wrong = check_itself()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    passed, failed = 0 if wrong else 1, len(wrong)
    with concurrent.futures.ThreadPoolExecutor(2) as workers:
        try:
            build(workers)
        except ValueError as error:
            print(error)
            print(f"mistakes: {passed} passed, {failed + 1} failed")
            return 1
        jobs = [("no mistake", len(PROGRAMS), workers.submit(check_right))]
        for n in numbers:
            m = MISTAKES[n]
            jobs.append((f"{m.kind}: {m.what}", len(m.programs), workers.submit(check, n)))
        for name, tests, job in jobs:
            wrong = job.result()
            passed, failed = passed + tests - len(wrong), failed + len(wrong)
            for line in wrong:
                print(f"{name}: {line}")
    print(f"mistakes: {passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
