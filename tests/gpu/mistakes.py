#!/usr/bin/env python3
"""Does `deepseek check` see the mistakes that kernels are known for?

    tests/gpu/mistakes.py                from anywhere, with build/gpu/twin-mistakes, which `make` builds
    tests/gpu/mistakes.py WORD...        only mistakes whose description has all of the words
    tests/gpu/mistakes.py --list         what is planted
    tests/gpu/mistakes.py --plant FILE   writes the patched source, for the Makefile

Each mistake of the list below is planted in a copy of deepseek.cu (tests/planting.py says how), and the named
twin must fail with it: by a result that differs, by what the emulator says, or by an error of the run time.
First in the plain order of threads, then in random ones, until it is seen. Without a mistake all twins pass.
"""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "tests"))
from planting import CHOOSE, find_place, plant

PROGRAM, PLANTED = ROOT / "build/gpu/twin-mistakes", ROOT / "build/gpu/mistakes/planted.cpp"
ORDERS = [{"EMU_ORDER": "fifo"}] + [
    {"EMU_ORDER": order, "EMU_ASYNC": "random", "EMU_SEED": "1"} for order in ("priority", "random")]
DIFFERS = r"case \d+, \["                  # of a result; what the emulator says of kernels:
OUTSIDE, RACE = "an access |the host accesses", "race: {}|{}.* no one wrote it"


@dataclass
class Mistake:
    kind: str                   # the family
    what: str                   # what is planted
    twin: str                   # that must fail
    places: list                # (source text with «part to replace», what stands there instead)
    sign: str = DIFFERS         # what it must say


def barrier(where, twin, place, shared=""):
    """A barrier left out; `shared`: the array that the emulator must name."""
    return Mistake("barrier", f"none {where}", twin, [(place, ";")],
                   RACE.format(shared, shared) if shared else DIFFERS)


SCALE_ROW = "int64_t tile = «(first_row + g * next_first_row + r)» / SCALE_BLOCK;"
BLOCK_SUM = "scale * float(integer_of<D>(q))"
TREE = "x += __shfl_xor_sync(ALL_LANES, x, «apart», HALF)"
ONE_BY_ONE = """[&] {
    float s = 0;
    for (int j = 0; j < HALF; j++) s += __shfl_sync(ALL_LANES, sum[i / TT][i % TT], j, HALF);
    return s;
}()"""
ROOT_OF = "1 / «std::sqrt(sum_lanes(sum) / float(n) + eps)»"
SEEN = "count = max(0, min(«seen» - begin, n))"
FUSED = """[&] {
    const Weights w = put_together(top, sum, part[0], part[1]);
    return std::fma(out, w.old, part[2 + i] * w.now);
}()"""
HALF_SPLIT = "(a.partial ? SPLIT : SPLIT / 2)"
TRUNCATED_Q8_0 = """std::byte* block = row + 34 * i;
    quantise_q8_0(block, x[t] + 32 * i);
    for (int j = 0; j < 32; j++) {
        float v = x[t][32 * i + j] / f16_at(block);
        if (v == v) block[2 + j] = std::byte(int8_t(v));
    }"""
LAST_PICK = "(2 * t + 1) * K - 1 - k"
PAIR = "rotate(«head[2 * p.i]», head[2 * p.i + 1],", "rotate(head[2 * p.i], «head[2 * p.i + 1]»,"
APART = "rotate(«head[p.i]», head[p.i + dim / 2],", "rotate(head[p.i], «head[p.i + dim / 2]»,"
MIXED = ["sum += «affinity[idx[k]]»;", "const float s = «affinity[idx[k]]»;"]
PROMOTION = [("begin += «SCALE_BLOCK», i++) { float lane", "64"),
             ("min(p.n, begin + «SCALE_BLOCK»); k += HALF) lane", "64"),
             ("«std::fma(p.a_scale[i] * p.b_scale[i], cuda::sum_lanes(lane), sum)»",
              "std::fma(p.a_scale[i / 2] * p.b_scale[i / 2], cuda::sum_lanes(lane), sum)")]

MISTAKES = [
    # Chapters 1 and 2.
    Mistake("launch", "an empty grid is launched", "add",
            [("if («grid.x == 0 || grid.y == 0 || grid.z == 0») return;", "false")], "a launch"),
    Mistake("launch", "kernels in another queue than copies", "add",
            [("dim3(THREADS), bytes, «queue», args", "cudaStream_t(nullptr)")]),
    Mistake("sum", "the tree from its other end", "matmul", [(TREE, "HALF / 2 / apart")]),
    Mistake("sum", "lane after lane", "matmul", [("y = «sum_lanes(sum[i / TT][i % TT])»;", ONE_BY_ONE)]),
    Mistake("sum", "a product rounded before it is added", "matmul",
            [("«std::fma(v, x[t][i], part[r][t])»", "part[r][t] + v * x[t][i]")]),
    Mistake("e4m3", "subnormal numbers are 0", "matmul",
            [("float magnitude = «__uint_as_float(uint32_t(b & 127) << 20) * 0x1p120f»;",
              "b & 120 ? __uint_as_float(uint32_t(b & 127) << 20) * 0x1p120f : 0")]),
    Mistake("e4m3", "NaN is 480", "matmul", [("if («(b & 127) == E4M3_NAN») return __uint", "false")]),
    Mistake("e4m3", "the sign is lost", "matmul", [("return «b & 128» ? -magnitude", "false")]),
    Mistake("scales", "rows of a view counted from the start of a block", "matmul", [(SCALE_ROW, "r")]),
    Mistake("scales", "experts' rows counted from the first one's", "run_experts",
            [(SCALE_ROW, "(first_row + r)")]),
    Mistake("scales", "all experts have the first one's", "run_experts",
            [("(scale + «g * next_scale»)", "0")]),
    Mistake("scales", "the partial block of a row is not counted", "matmul",
            [("tile * «scale_blocks(cols)»", "cols / SCALE_BLOCK")]),
    Mistake("scales", "the block's product and sum rounded apart", "matmul",
            [("SCALED ? «std::fma(s, part[r][t], sum[r][t])»", "sum[r][t] + s * part[r][t]")]),
    Mistake("scales", "the first column block's for all", "matmul_transposed",
            [("v *= b.w.scales(g, j)[«i / SCALE_BLOCK»]", "0")]),
    Mistake("blocks", "minimums ignored", "matmul", [(f"return «{BLOCK_SUM} - minimum»;", BLOCK_SUM)]),
    Mistake("blocks", "high bits ignored", "matmul",
            [("if constexpr (L.high.bits > 0) «q |= L.high.get(p, group * GROUP, at % GROUP) << L.low.bits;»",
              ";")]),
    Mistake("blocks", "the first group's scale for all", "matmul", [("group_scale<D>(p, «group»)", "0")]),

    # Chapter 5.
    Mistake("softmax", "without the largest taken out", "softmax",
            [("exp_of(«z[i] - shift»), sum", "float(z[i])")]),
    Mistake("softmax", "its scale forgotten", "softmax", [("z[i] = «z[i] * scale»;", "float(z[i])")]),
    Mistake("softmax", "not divided", "softmax", [("row && i < n; i += HALF) «row[i] /= sum;»", ";")]),
    Mistake("tail", "the last row dropped", "softmax", [("float* row = «t < T» ? z[t]", "t + 1 < T")]),
    Mistake("silu", "without the up", "silu_times",
            [("gate[i] = «gate[i] / (1 + exp_of(-gate[i])) * up[i]»;", "gate[i] / (1 + exp_of(-gate[i]))")]),
    Mistake("silu", "z times sigmoid, a rounding more", "silu_times",
            [("gate[i] = «gate[i] / (1 + exp_of(-gate[i])) * up[i]»;",
              "gate[i] * (1 / (1 + exp_of(-gate[i]))) * up[i]")]),
    Mistake("tail", "numbers behind the last half-warp dropped", "add",
            [("if («i < n») out[i] += x", "i < n / HALF * HALF")]),
    Mistake("bias", "a row's in place of a column's", "add_bias",
            [("x[«i % period»]", "i / period % period")]),
    Mistake("tail", "columns behind the last half-warp dropped", "matmul",
            [("begin + half_lane(); i < «end»; i += HALF) { for", "end / HALF * HALF")]),
    Mistake("tail", "a partial last block dropped", "matmul",
            [("end = SCALED ? «min(begin + SCALE_BLOCK, cols)»",
              "begin + SCALE_BLOCK > cols ? begin : begin + SCALE_BLOCK")]),
    Mistake("tail", "the last row of W dropped", "matmul", [("«r > last» || t >= tile.end", "r >= last")]),
    Mistake("tail", "the last token dropped", "matmul",
            [("r > last || «t >= tile.end»", "t + 1 >= tile.end")]),
    Mistake("tail", "the last token dropped", "matmul_transposed", [("«t0 + t < b.T»;", "t0 + t + 1 < b.T")]),
    Mistake("pairs", "not undone", "matmul", [("at = «b.w.pairs» ? r / b.w.pairs", "0")]),
    Mistake("transposed", "not honoured", "matmul",
            [("(«w.transposed» ? by_columns : by_rows)", "false")], f"{DIFFERS}|{OUTSIDE}"),
    Mistake("transposed", "not honoured", "matmul_transposed",
            [("(«w.transposed» ? by_rows : by_columns)", "false")], f"{DIFFERS}|{OUTSIDE}"),
    Mistake("embed", "the row before", "embed", [("r = ids ? «ids[t]»", "max(ids[t] - 1, 0)")]),
    Mistake("embed", "without the scales", "embed", [("out[t][i] = «D == Dtype::F8_E4M3» ?", "false")]),
    Mistake("rmsnorm", "eps outside of the root", "rmsnorm",
            [(ROOT_OF, "std::sqrt(sum_lanes(sum) / float(n)) + eps")]),
    Mistake("rmsnorm", "without eps", "rmsnorm", [(ROOT_OF, "std::sqrt(sum_lanes(sum) / float(n))")]),
    Mistake("rmsnorm", "weight and scale multiplied first", "rmsnorm",
            [("«row[i] * scale * w[i]»", "row[i] * (scale * w[i])")]),
    barrier("before x is overwritten", "rmsnorm", "+ eps); «__syncthreads();» // `out` may be `x`"),
    Mistake("ties", "the higher index wins", "top_k", [("key(j) == mine && «j < i»", "j > i")]),
    Mistake("ties", "equal numbers share a place", "top_k", [("key(j) == mine && «j < i»", "false")]),
    Mistake("top_k", "NaN is before all others", "top_k", [("return «z == z» ? z : -std", "true")]),

    # Chapter 6.
    Mistake("rope", "half layout", "rope_interleaved",
            [(PAIR[0], "head[p.i]"), (PAIR[1], "head[p.i + dim / 2]")]),
    Mistake("rope", "interleaved layout", "rope_half",
            [(APART[0], "head[2 * p.i]"), (APART[1], "head[2 * p.i + 1]")]),
    Mistake("rope", "the first token's angles for all", "rope_interleaved",
            [("rotate(head[2 * p.i], head[2 * p.i + 1], cos_sin + «p.t * dim»", "0")]),
    Mistake("rope", "the first token's angles for all", "rope_half",
            [("rotate(head[p.i], head[p.i + dim / 2], cos_sin + «p.t * dim»", "0")]),
    Mistake("tail", "the last token not turned", "rope_half",
            [("return {«t < x.T» ? t : -1", "t + 1 < x.T")]),

    # Chapter 7.
    Mistake("merge", "without the maximum", "attend",
            [("both = «top > top2 ? top : top2»;", "0")]),
    Mistake("merge", "the maximum of what there was", "attend",
            [("both = «top > top2 ? top : top2»;", "top")]),
    Mistake("merge", "without the old sum", "attend",
            [("a = «sum * exp_of(top - both)»", "exp_of(top - both)")]),
    Mistake("merge", "the old output not scaled", "attend",
            [("? now : «old * w.old + now * w.now»;", "old + now * w.now")]),
    Mistake("merge", "0 times NaN counts", "attend", [("return «w.now == 0» ? old", "false")]),
    Mistake("merge", "splits that are all -inf count", "attend",
            [("if («sum2 == 0») return {1, 0};", "false"), ("if («sum == 0») { top = top2", "false")]),
    Mistake("merge", "-inf taken out of -inf", "attend",
            [("shift = «top == -std::numeric_limits<float>::infinity()» ? 0", "false")]),
    Mistake("merge", "fused in one of the two ways", "attend",
            [("out = «mixed(out, part[2 + i], put_together(top, sum, part[0], part[1]))»;", FUSED)]),
    Mistake("merge", "in another order where splits have blocks of their own", "attend",
            [("part = a.part(query, «split»); out = mixed", "int(ceil_div(n, SPLIT)) - split")]),
    Mistake("merge", "the last query's largest not kept", "attend",
            [("«first + mine <= last») { float* part", "first + mine < last")]),
    Mistake("split", "half as long where one block does all", "attend",
            [("split < end && split * «SPLIT» < most", HALF_SPLIT),
             ("begin = split * «SPLIT», n", HALF_SPLIT),
             ("n = min(«SPLIT», most - begin)", HALF_SPLIT), ("from + 1 : «a.splits»;", "2 * a.splits")]),
    Mistake("mask", "the token itself not seen", "attend", [(SEEN, "seen - 1")]),
    Mistake("mask", "the next token seen", "attend", [(SEEN, "seen + 1")]),
    Mistake("mask", "the first query's for all of a block", "attend",
            [("int seen = «a.seen(query)», most", "a.seen(first)")]),
    Mistake("mask", "the last split of one position not joined", "attend",
            [("query = int(blockIdx.x), n = «a.seen(query)»;", "a.seen(query) - 1")]),
    Mistake("attend", "scores not scaled", "attend", [("mine * SPLIT}, «a.scale», count", "1")]),
    Mistake("attend", "times the inverse of the sum", "attend",
            [("p[mine * SPLIT + j] = «p[mine * SPLIT + j] / part_sum»;",
              "p[mine * SPLIT + j] * (1 / part_sum)")]),
    Mistake("attend", "the first key head's keys and values for all", "attend",
            [("if (!table) return s.row(«int(blockIdx.z)», j);", "0")]),
    Mistake("attend", "the first key head's queries for all", "attend",
            [("a.q[query / a.heads] + «blockIdx.z * a.next_q»", "0")]),
    Mistake("lse", "the first key head's place for all", "attend",
            [("a.lse[query / a.heads][«blockIdx.z * a.next_lse» + query", "0")]),
    Mistake("lse", "the first query's for all of a token", "attend",
            [("blockIdx.z * a.next_lse + «query % a.heads»] =", "0")]),
    Mistake("lse", "the first head's place for all", "mla_naive",
            [("real_matrix(v[0], n, Dv), a.scale, a.n, a.lse_from(«h»)", "0")]),
    Mistake("tail", "numbers of a value beyond the block's threads dropped", "attend",
            [("i < «a.v.cols»; i += THREADS) { float o[QUERIES]", "min(a.v.cols, THREADS)")]),
    Mistake("tail", "the last query of a block dropped", "attend",
            [("if («first + m > last») continue;", "first + m >= last")]),
    barrier("after the scores", "attend", "scores<D>(p, a, first, begin, n); «__syncthreads();»", "p"),
    barrier("after the softmax", "attend", "now[mine] = w.now; «__syncthreads();»", "(p|visible|old|now)"),
    barrier("before the next split's scores", "attend",
            "«__syncthreads();» // before the scores of the next split", "(p|visible|old|now)"),
    Mistake("store", "one row too far", "store", [("cache.row(0, «n[t] - 1»)", "n[t]")]),
    Mistake("store", "bf16 cut, not rounded", "store",
            [("= «float_to_bf16(x[t][i])»;", "uint16_t(__float_as_uint(x[t][i]) >> 16)")]),
    Mistake("store", "Q8_0 cut, not rounded", "store",
            [("«quantise_q8_0(row + 34 * i, x[t] + 32 * i);»", TRUNCATED_Q8_0)]),
    Mistake("gqa", "all keys before all values", "gqa_attend",
            [("group, cache.matrix(l, «2 * g»), cache", "g"),
             ("group, cache.matrix(l, 2 * g), cache.matrix(l, «2 * g + 1»)", "G + g")]),
    Mistake("gqa", "query heads in turn over key heads", "gqa_attend",
            [("at = int64_t(g) * «group * d»,", "d")]),

    # Chapter 8.
    Mistake("mla", "keys without their rope part", "mla_naive",
            [("«copy({k[0] + Dn, width, 0, n, 1}, {c[0] + Rkv, latent, 0, n, 1}, a.Dr);»", ";")]),
    Mistake("mla", "queries without their rope part", "mla_absorbed",
            [("""«copy({a.q_absorbed + Rkv, int64_t(H) * latent, latent, T, H},
                 {const_cast<real*>(a.q) + Dn, int64_t(H) * dk, dk, T, H}, a.Dr);»""", ";")]),
    Mistake("mla", "the host reads the device's memory", "mla_naive",
            [("if (!a.n.empty()) «read(&n, &a.n.back(), sizeof n);»", "n = a.n.back();")], OUTSIDE),
    Mistake("mla", "W^UK for W^UV", "mla_absorbed", [("cuda::stack_of(«a.wv_b»), T, H, Dv", "a.wk_b")],
            f"{DIFFERS}|{OUTSIDE}"),
    Mistake("mla", "the first head's query for all", "mla_absorbed", [("[«g * b.next_x» + j], v", "0")]),
    Mistake("mla", "the first head's latent for all", "mla_absorbed",
            [("b.token[row] : row] + «g * b.next_x»;", "0")]),
    Mistake("transposed", "W^UK's not honoured", "mla_absorbed",
            [("(«a.wk_b[0].transposed» ? by_rows", "false")], f"{DIFFERS}|{OUTSIDE}"),

    Mistake("pages", "the first conversation's for all", "mla_paged",
            [("page = table[«int64_t(blockIdx.z) * table_width» + j / PAGE]", "0")], f"{DIFFERS}|{OUTSIDE}"),
    Mistake("pages", "all rows from the pages' first", "mla_paged",
            [("int64_t(page) * PAGE + «j % PAGE»)", "0")]),
    Mistake("pages", "no answer where nothing is seen", "mla_paged",
            [("for (int i = 0; «seen == 0» && i < a.v.cols; i++) a.output", "false")]),
    Mistake("pages", "the logarithm to base 2", "mla_paged",
            [("- «log(double(1 / sum))»)", "std::log2(double(1 / sum))")]),
    Mistake("pages", "the logarithm without the largest score", "mla_paged",
            [("float(«double(top)» - log", "0.0")]),
    Mistake("latent", "the first tile's scale for all", "mla_paged",
            [("* scale[«i / SCALE_BLOCK»]; }", "0")]),
    Mistake("latent", "the scale no power of two", "store_latent",
            [("{Fp8Formula::FLASHMLA, «true»}", "false")]),

    # Chapters 9 and 10.
    Mistake("swiglu", "silu forgotten", "swiglu", [("«cuda::silu_times(gate, up, F, T);»", ";")]),
    Mistake("gate", "sigmoid for softmax", "gate_greedy",
            [("if («g.affinity == Affinity::SIGMOID»)", "true")]),
    Mistake("gate", "weights from biased scores", "gate_noaux_tc", [(m, "choice[idx[k]]") for m in MIXED]),
    Mistake("gate", "masked groups filled with 0", "gate_noaux_tc",
            [("choice[e] = «-std::numeric_limits<float>::infinity()»;", "0.0f")]),
    Mistake("gate", "a group's score from its best alone", "gate_noaux_tc",
            [("return «by == GroupScore::BEST» ? best", "true")]),
    Mistake("gate", "a group's score from its two best", "gate_group_limited_greedy",
            [("return «by == GroupScore::BEST» ? best", "false")]),
    Mistake("gate", "all tokens' scores of groups in one place", "gate_noaux_tc",
            [("r.group_score[«t * g.n_group» + i]", "0")]),
    Mistake("gate", "a group too many", "gate_group_limited_greedy",
            [("«rank_of(score, g.n_group, e / size) >= g.topk_group»",
              "rank_of(score, g.n_group, e / size) > g.topk_group")]),
    Mistake("gate", "not normalised", "gate_greedy", [("normalise = «g.normalise && g.K > 1»;", "false")]),
    Mistake("gate", "a single pick normalised", "gate_greedy",
            [("normalise = «g.normalise && g.K > 1»;", "g.normalise")]),
    Mistake("gate", "a sum of zeros divided by", "gate_greedy", [("(sum + «1e-20f»)", "0.0f")]),
    Mistake("gate", "scaled although normalised", "gate_greedy",
            [("scale = «normalise && !g.scale_normalised» ?", "false")]),
    barrier("after the choices", "gate_noaux_tc", "bias[e] : affinity[e]; «__syncthreads();»"),
    barrier("after the groups' scores", "gate_noaux_tc", "size, by); «__syncthreads();»", "score"),
    barrier("after the mask", "gate_noaux_tc", "::infinity(); «__syncthreads();»"),
    barrier("after the picks", "gate_noaux_tc", "idx[rank] = e; } «__syncthreads();» const bool normalise"),
    Mistake("dispatch", "an expert begins behind its slots", "dispatch",
            [("lower += «expert_idx[i] < e»;", "expert_idx[i] <= e")], f"{DIFFERS}|{OUTSIDE}"),
    Mistake("dispatch", "the end of the last expert's slots not written", "dispatch",
            [("if («e > E») return; int lower", "e >= E")]),
    Mistake("dispatch", "slots in descending order", "dispatch",
            [("for (int j = «0»; j < i; j++) at +=", "i + 1"),
             ("for (int j = 0; j < «i»; j++) at +=", "pairs")]),
    Mistake("dispatch", "a slot's pair for its token", "dispatch", [("slot_token[at] = «i / K»;", "i")]),
    Mistake("experts", "the next one at the last slot", "run_experts",
            [("if («first[middle] <= slot») low", "first[middle] <= slot + 1")]),
    Mistake("experts", "the one before at the first slot", "run_experts",
            [("if («first[middle] <= slot») low", "first[middle] < slot")]),
    Mistake("experts", "tiles counted from the first slot of all", "run_experts",
            [("begins = «(slot - b.first[group]) % TT == 0»;", "slot % TT == 0")]),
    Mistake("experts", "tokens in their own order", "run_experts",
            [("b.x[b.token ? «b.token[row]» : row]", "row / 2")]),
    Mistake("experts", "w_gate for w_up", "run_experts",
            [("all({a.up, F}, {a.u, D}, «&Mlp::w_up», a.slot_token)", "&Mlp::w_gate")]),
    Mistake("experts", "silu forgotten", "run_experts",
            [("«cuda::silu_times(a.gate, a.up, F, slots);»", ";")]),
    Mistake("experts", "the shared one forgotten", "run_experts",
            [("if («!w.shared.w_gate») return;", "true")]),
    Mistake("combine", "the last pick first", "combine",
            [("std::fma(weight[«k»], expert_out", LAST_PICK),
             ("expert_out[int64_t(slot[«k»]) * D + d]", LAST_PICK)]),
    Mistake("combine", "the shared expert first", "combine",
            [("float sum = «0»; for (int64_t k = t * K", "shared ? shared[item()] : 0.0f"),
             ("out[item()] = «shared ? sum + shared[item()] : sum»;", "sum")]),

    # Chapter 12.
    Mistake("choice", "of equal logits the last", "choose",
            [("a.z > b.z || (a.z == b.z && «a.i < b.i»)", "a.i > b.i")]),
    Mistake("choice", "a search may find the last token again", "choose",
            [("if («comes_before(last, mine)» && comes", "last.i < 0 || last.z >= mine.z")]),
    Mistake("choice", "the last half-warp's best forgotten", "choose",
            [("for (int i = 0; i < «HALVES»; i++) { const Found other", "HALVES - 1")],
            f"{DIFFERS}|it ends, while others wait"),   # that half-warp knows better, and goes its own way
    Mistake("barrier", "none before the bests are written", "choose",
            [("«__syncthreads();» if (half_lane() == 0) zs[", ";")], RACE.format("zs", "zs")),
    Mistake("barrier", "none before the bests are read", "choose",
            [("is[half_of_block()] = best.i; «__syncthreads();» for", ";")], RACE.format("zs", "zs")),
    Mistake("choice", "tokens behind the last sixteen forgotten", "choose",
            [("if (!done && first + lane < «V») done", "V / HALF * HALF")]),
    Mistake("choice", "min-p not asked", "choose", [("if («w >= s.min_p») sum += w, choice", "true")]),
    Mistake("choice", "top-p of the whole in place of the top-k", "choose",
            [("for (int i = half_lane(); «!limited» && i < V; i += HALF) lane", "true")]),
    Mistake("choice", "the token that reaches top-p left out", "choose",
            [("n < most && «seen < enough»; n++", "seen + weight(last.z) < enough")]),
    Mistake("choice", "probabilities not divided by what is left", "choose",
            [("p = «weight(last.z) / sum»;", "weight(last.z)")]),
    Mistake("choice", "NaN is not looked for", "choose", [("if («no_number») choice = {-1, 0};", "false")]),
    Mistake("choice", "the temperature forgotten", "choose",
            [("w = «weight_of(logits[mine], top, temperature)»;", "weight_of(logits[mine], top, 1)")]),

    # Chapter 14.
    Mistake("quantise", "a block's last half-warp not asked", "quantise_fp8",
            [("for (int i = 0; i < «HALVES»; i++) mine", "HALVES - 1")]),
    Mistake("quantise", "times the inverse of the scale where V3 divides", "quantise_fp8",
            [("«v / t.s» : v * t.inverse", "v * (1 / t.s)")]),
    Mistake("quantise", "infinity has a scale", "quantise_fp8",
            [("if («largest >= NO_NUMBER») return {", "false")]),
    barrier("after the largest of each half-warp", "quantise_fp8",
            "shared[half_of_block()] = mine; «__syncthreads();»", "largest_of"),
    Mistake("exact", "scales multiplied in f32", "gemm_fp8",
            [("std::fma(«double(p.a_scale[i]) * double(p.b_scale[i])», cuda::sum_lanes(block)",
              "double(p.a_scale[i] * p.b_scale[i])")]),
    Mistake("promoted", "after 64 products", "gemm_fp8", PROMOTION),
    Mistake("promoted", "a block's sum multiplied, then added", "gemm_fp8",
            [("«std::fma(p.a_scale[i] * p.b_scale[i], cuda::sum_lanes(lane), sum)»",
              "sum + cuda::sum_lanes(lane) * (p.a_scale[i] * p.b_scale[i])")]),
    Mistake("hopper", "14 fraction bits", "gemm_fp8",
            [("F32_FRACTION - «HOPPER_FRACTION»;", "14"), ("bits - «HOPPER_FRACTION» - 1)", "14"),
             ("top - «HOPPER_FRACTION»);", "14")]),
    Mistake("hopper", "aligned without the accumulator", "gemm_fp8",
            [("top = «start.significand ? start.exponent : -127»", "-127")]),
    Mistake("hopper", "terms cut towards minus infinity", "gemm_fp8",
            [("«term.significand / (1 << max(shift, 0))»", "term.significand >> max(shift, 0)")]),
    Mistake("hopper", "the sum not cut", "gemm_fp8", [("float(«sum / cut * cut»)", "sum")]),
    Mistake("hopper", "NaN is a number", "gemm_fp8",
            [("broken |= «(a[k] & 127) == E4M3_NAN || (b[k] & 127) == E4M3_NAN»;", "0")]),
    Mistake("hopper", "NaN forgotten by the next instruction", "gemm_fp8",
            [("broken = «!std::isfinite(c)»;", "0")]),
    Mistake("gemm", "b's rows counted from the start of a tile", "gemm_fp8",
            [("a.scale_row(m), «b.scale_row(n)», a.n}", "b.scale + n / b.tile * scale_blocks(b.n)")]),
    Mistake("gemm", "add ignored", "gemm_fp8",
            [("out = «g.out.at(row * b.rows + n)»;",
              "(Fp8Output{g.out.at(row * b.rows + n).data, g.out.dtype})")]),
    Mistake("tail", "the last column dropped", "gemm_fp8", [("half_lane() == 0 && «n <= last»", "n < last")]),
    Mistake("groups", "rows of no group computed", "gemm_fp8_contiguous",
            [("if («g.group[m] < 0») return false;", "false")], f"{DIFFERS}|{OUTSIDE}"),
    Mistake("groups", "the first one's matrix for all", "gemm_fp8_contiguous",
            [("b = b.group(«g.group[m]»)", "0")]),
    Mistake("groups", "masked rows computed", "gemm_fp8_masked",
            [("if («m >= g.group[z]») return", "false")]),
    Mistake("groups", "the first one's matrix for all", "gemm_fp8_masked",
            [("a.group(z), b = b.group(«z»)", "0")]),
    Mistake("groups", "columns counted from the group before the last", "gemm_fp8_k_grouped",
            [("for (int i = 0; i < «z»; i++) before", "z - 1")]),
    Mistake("groups", "scales of another block of columns", "gemm_fp8_k_grouped",
            [("a.scale += «before / SCALE_BLOCK * a.rows»", "before / SCALE_BLOCK")]),
    Mistake("peers", "nobody told who was missing", "late_peers",
            [("«*p.late() = who + 1;»", ";")], "said: "),
    Mistake("peers", "none is an expert of the first rank", "dispatch_layout",
            [("any |= «idx[k] >= low && idx[k] < high»", "idx[k] < high")]),
    Mistake("peers", "the flag before the rows of other threads", "peers_low_latency",
            [("inline void release(volatile uint64_t* flag, uint64_t word) {\n    «__syncthreads();»", ";")]),
    Mistake("peers", "a flag of an epoch before is good enough", "epochs_in_flight",
            [("if («unsigned(word >> 32) == p.epoch») return", "unsigned(word >> 32) != 0")]),
    Mistake("peers", "one half of a window for all epochs", "epochs_in_flight",
            [("window[r] + 16 + «epoch % 2» * half()", "0")], "livelock|" + DIFFERS),
    Mistake("peers", "a source's rows begin behind its own", "peers",
            [("for (int s = 0; «s < p.me»; s++) before[0] +=", "s <= p.me")], OUTSIDE + "|" + DIFFERS),
    Mistake("peers", "all rows of a source in one slot", "peers_low_latency",
            [("for (int j = 0; «j < i»; j++) slot += has(s, j) >= 0;", "j < 0")],
            OUTSIDE + "|" + DIFFERS),
    Mistake("peers", "experts counted from the first rank's", "peers",
            [("out.idx[i * p.K + k] = here ? «head[2 + k] - p.first[p.me]»", "head[2 + k]")]),
    Mistake("peers", "each rank's sum over the one before", "peers",
            [("encode(p.result(home, «first + ranks_before»)", "first")]),
    Mistake("peers", "results returned before they are complete", "peers_low_latency",
            [("if (idx[k] >= 0) «await(p, p.expert_done(p.me) + idx[k], owner)»", "0")]),
]

# What the patched source ends with: a twin, or all, without what only `deepseek check` prints.
MAIN = """
int main(int argc, char** argv) {
    cuda::begin();
    choose_kernels("plain", true);
    const std::string chosen = argc > 1 ? argv[1] : "";
    int failed = 0, run = 0;
    for (const cuda::Twin& twin : cuda::TWINS) {
        if (!chosen.empty() && chosen != twin.name) continue;
        cuda::Check c{twin.section, twin.name};
        try {
            twin.run(c);
        } catch (const std::exception& e) {
            c.wrong = e.what();
        }
        std::printf("%s: %s\\n", twin.name, c.wrong.empty() ? "ok" : c.wrong.c_str());
        run++, failed += !c.wrong.empty();
    }
    return !run ? 1 : failed ? 2 : 0;
}
"""


# -- planting ------------------------------------------------------------------------------------------------

def planted(source):
    """The patched source, and a line of each place that is not in it."""
    lost, places = [], []
    for number, m in enumerate(MISTAKES):
        try:
            for place, _ in m.places:
                find_place(source, place, "deepseek.cu")
            places += [(number, place, wrong) for place, wrong in m.places]
        except ValueError as error:
            lost.append(f"{m.kind}: {m.what}: {error}")
    return CHOOSE + plant(source, places, "deepseek.cu") + MAIN, lost


# -- judging -------------------------------------------------------------------------------------------------

def run(number, twin, order):
    """(exit code, output) of the twin's cases with one mistake (-1: none)."""
    done = subprocess.run([PROGRAM, twin] if twin else [PROGRAM], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=os.environ | order | {"MISTAKE": str(number)})
    return done.returncode, done.stdout.decode(errors="replace")


def verdict(m, code, output):
    """Empty, or what is wrong with the answer to a mistake."""
    if code == 0:
        return "not seen"
    if code not in (2, 3) or not re.search(m.sign, output):
        return f"not the answer that was expected, exit code {code}: {output[-300:]}"
    return ""


def check(number):
    m = MISTAKES[number]
    for order in ORDERS:
        if (wrong := verdict(m, *run(number, m.twin, order))) != "not seen":
            break
    return wrong


def check_right():
    code, output = run(-1, "", ORDERS[0])
    return "" if code == 0 and output.count(": ok\n") > 20 else f"fails without one\n{output[-1500:]}"


def check_itself():
    """What is wrong with this suite: a blind check, a lost place and a double one must not pass."""
    m, wrong = MISTAKES[-1], []
    for answer in ((0, ""), (0, "case 1, [2]: 3, not 4"), (2, "gone"), (-11, "case 1, [2]: 3, not 4")):
        if not verdict(m, *answer):
            wrong.append(f"accepted {answer}")
    if verdict(m, 2, "gemm: case 1, [2]: 3, not 4"):
        wrong.append("refused the right answer")
    source = (ROOT / "deepseek.cu").read_text()
    before, part, after = re.split("[«»]", m.places[-1][0])
    for text in (source.replace(before, "reworded "), source + before + part + after):
        if not any(m.what in line for line in planted(text)[1]):
            wrong.append("missed a lost place")
    return wrong


def report(wrong, name, counts):
    print(*(f"{name}: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    counts[bool(wrong)] += max(1, len(wrong))


def main(words):
    if words == ["--list"]:
        print(*(f"{m.kind}: {m.what} ({m.twin})" for m in MISTAKES), sep="\n")
        return 0
    text, lost = planted((ROOT / "deepseek.cu").read_text())
    if words[:1] == ["--plant"]:
        pathlib.Path(words[1]).write_text(text)
        return 0
    counts = [0, 0]
    report(check_itself(), "the suite itself", counts)
    report(lost, "a lost place", counts)
    fresh = PROGRAM.exists() and PLANTED.exists() and PLANTED.read_text() == text
    report([] if fresh else ["`make build/gpu/twin-mistakes` comes first"], "the program", counts)
    numbers = [n for n, m in enumerate(MISTAKES) if all(w in f"{m.kind} {m.what} {m.twin}" for w in words)
               and not any(line.startswith(f"{m.kind}: {m.what}: ") for line in lost)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        jobs = [("no mistake", workers.submit(check_right))] if fresh else []
        for n in numbers if fresh else []:
            m = MISTAKES[n]
            jobs.append((f"{m.kind}: {m.what} ({m.twin})", workers.submit(check, n)))
        for name, job in jobs:
            report([job.result()] if job.result() else [], name, counts)
    print(f"twin-mistakes: {counts[0]} passed, {counts[1]} failed")
    return 1 if counts[1] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
