"""Makes the golden files of chapter 14: quantising, gemm_fp8 in its three arithmetics, and the forward pass
with --arith bf16 and fp8.

    python3 tests/golden/make_fp8.py [--out FOLDER] [--vectors FOLDER]

NumPy alone. FOLDER (default: this one) receives fp8/fp8.safetensors and, beside each taps.safetensors of the
models below, an arith.safetensors. The vectors of a real H100 are those of github.com/
north-numerical-computing/MATLAB-tensor-core (BSD-2-Clause, M. Mikaitis, F. A. Khattak), commit b12b5a7,
model_validation/H100/E4M3: its rows 0 to 255, kept from the last file unless --vectors names that folder.
"""
import argparse
import os

import make_golden as M
import reference as R
import numpy as np

SEED = 14
f32, f64 = np.float32, np.float64
LEAST, MOST = f32(1e-4), f32(448)
FORMULAS = ("v3", "v32", "deepgemm", "deepep", "tilekernels", "flashmla")
ARITH_MODELS = {"v3-fp8": ("bf16", "fp8"), "v3-ue8m0": ("bf16", "fp8"), "v2-lite": ("bf16",),
                "qwen2": ("bf16",), "qwen3": ("bf16",), "llama3": ("bf16",), "tiny": ("bf16",)}
KEPT = ("layers.0.attn_out", "layers.0.ffn_out", "layers.1.attn_out", "layers.1.ffn_out", "logits")


# -- quantising ----------------------------------------------------------------------------------------------

def power_above(s):
    """2^e >= s, the least such: s = f 2^e with 1/2 <= f < 1, and f = 1/2 is a power already."""
    f, e = np.frexp(s)
    return np.ldexp(f32(1), e - (f == 0.5)).astype(f32)


def tile(x, formula, ue8m0):
    """Codes and scale of one tile, in float32 as the published programs have it."""
    if not np.isfinite(x).all():
        return np.full(x.shape, 127, np.uint8), f32(np.nan)
    amax = max(np.abs(x).max(), LEAST)
    s = amax * (f32(1) / MOST) if formula in ("v32", "deepep") else amax / MOST
    if formula == "flashmla":
        s = max(s, LEAST)                                # the others: amax
    if ue8m0:
        s = R.power_by_logarithm(s) if formula in ("v3", "flashmla") else power_above(s)
    if formula in ("v3", "v32", "flashmla"):
        y = x / s
    elif formula == "deepgemm" or ue8m0:
        y = x * (f32(1) / s)
    else:
        y = x * (MOST / amax)
    assert y.dtype == f32
    return M.e4m3(y.astype(f64)), s


def quantise(x, rows, formula="v3", ue8m0=False):
    """Codes (T, n) and scales of tiles of `rows` x 128."""
    s = np.empty([-(-x.shape[0] // rows), -(-x.shape[1] // 128)], f32)
    q = np.empty(x.shape, np.uint8)
    for i, j in np.ndindex(*s.shape):
        part = np.s_[i * rows:(i + 1) * rows, j * 128:(j + 1) * 128]
        q[part], s[i, j] = tile(x[part], formula, ue8m0)
    return q, s


def near_ties(rng, n):
    """n numbers, the first the largest, of which V3's division and DeepGEMM's product make other codes."""
    grid, found = R.E4M3[:127], []
    while len(found) < n - 1:
        amax = f32(rng.uniform(1, 2))
        s = amax / MOST
        x = ((grid[1:] + grid[:-1]) / 2 * s).astype(f32).view(np.int32)
        x = (x[:, None] + np.arange(-2, 3, dtype=np.int32)).ravel().view(f32)
        found = list(x[M.e4m3((x / s).astype(f64)) != M.e4m3((x * (f32(1) / s)).astype(f64))])
    return np.array([amax, *found[:n - 1]], f32)


def awkward(rng):
    """Rows that tell the formulas apart, and edges: zeros, below the floor, huge, NaN, infinity."""
    x = (rng.standard_normal((14, 300)) * np.exp(3 * rng.standard_normal((14, 1)))).astype(f32)
    x[1], x[2, :128], x[3] = 0, 0, x[3] * f32(1e-7)
    x[4] = x[4] / np.abs(x[4]).max() * f32(3e38)
    x[5, 200], x[6, 3], x[7, 299] = np.nan, np.inf, -np.inf
    for i, ulps in enumerate((-1, 0, 1, 2, 3)):          # amax / 448 near a power of two
        row = x[8 + i]
        row[:] = row / np.abs(row).max() * f32(100)
        row[[0, 128, 256]] = (np.array(448 / 1024, f32).view(np.int32) + ulps).view(f32)
        row[:] = np.clip(row, -np.abs(row[0]), np.abs(row[0]))
    x[13, ::2] = -0.0
    x[13, 128:136] = near_ties(rng, 8)
    x[13, 136:256] = 0
    return x


def cast(rng):
    """Floats around e4m3's ties and its end, with their codes."""
    grid = R.E4M3[:127]
    mid = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, mid, np.nextafter(mid.astype(f32), f32(0)), np.nextafter(mid.astype(f32), MOST),
                        [449, 463, 464, 465, 1e4, 3e38, np.inf, 1e-40]]).astype(f32)
    x = np.concatenate([x, -x])
    return {"cast.x": x, "cast.q": codes(M.e4m3(np.nan_to_num(x.astype(f64), posinf=1e39, neginf=-1e39)))}


def codes(q):
    return "F8_E4M3", np.ascontiguousarray(q).tobytes(), q.shape


# -- sums ----------------------------------------------------------------------------------------------------

def blocks(K):
    return [(k, min(k + 128, K)) for k in range(0, K, 128)]


def exact(a, sa, b, sb):
    y = np.zeros((len(a), len(b)))
    for i, (k, end) in enumerate(blocks(a.shape[1])):
        y += sa[:, i:i + 1].astype(f64) * sb[:, i].astype(f64) * (R.E4M3[a[:, k:end]] @ R.E4M3[b[:, k:end]].T)
    return y


def fma(s, x, y):
    """In float32: the product has 48 bits at most, so float64 holds it."""
    return (s.astype(f64) * x.astype(f64) + y.astype(f64)).astype(f32)


def promoted(a, sa, b, sb):
    y = np.zeros((len(a), len(b)), f32)
    for i, (k, end) in enumerate(blocks(a.shape[1])):
        p = (R.E4M3[a[:, None, k:end]] * R.E4M3[b[None, :, k:end]]).astype(f32)
        lane = np.zeros((*y.shape, 16), f32)
        for j in range(0, end - k, 16):
            part = p[..., j:j + 16]
            lane[..., :part.shape[-1]] += part
        v = lane[..., :8] + lane[..., 8:]
        v = v[..., :4] + v[..., 4:]
        y = fma(sa[:, i:i + 1] * sb[:, i], (v[..., 0] + v[..., 2]) + (v[..., 1] + v[..., 3]), y)
    return y


def parts(q):
    """(exponent, significand in eighths, with its sign) of e4m3 codes."""
    e, m = (q >> 3 & 15).astype(int), (q & 7).astype(int)
    return np.maximum(e, 1) - 7, np.where(e > 0, 8 + m, m) * np.where(q & 128, -1, 1)


def instruction(c, a, b):
    """c (float32) + a . b over the last axis, as a tensor core of Hopper adds: see chapter 14.3."""
    (ea, ma), (eb, mb) = parts(a), parts(b)
    e, m = ea + eb, ma * mb                              # m in 64ths
    fc, ec = np.frexp(c.astype(f64))                     # c = fc 2^ec
    none = -10 ** 6
    top = np.maximum(np.where(m != 0, e, none).max(-1), np.where(c != 0, ec - 1, none))
    top = np.where(top == none, 0, top)
    cut = lambda x: np.trunc(x).astype(np.int64)
    total = cut(np.ldexp(m / 64, 13 + e - top[..., None])).sum(-1) + cut(np.ldexp(fc, 13 + ec - top))
    bits = np.frexp(total.astype(f64))[1]                # 2^(bits-1) <= |total| < 2^bits
    keep = np.exp2(np.maximum(bits - 14, 0))
    return np.ldexp(np.trunc(total / keep) * keep, top - 13).astype(f32)


def hopper(a, sa, b, sb):
    y = np.zeros((len(a), len(b)), f32)
    for i, (k, end) in enumerate(blocks(a.shape[1])):
        acc = np.zeros_like(y)
        for j in range(k, end, 32):
            acc = instruction(acc, a[:, None, j:min(j + 32, end)], b[None, :, j:min(j + 32, end)])
        y = fma(sa[:, i:i + 1] * sb[:, i], acc, y)
    return y


def bf16(y):
    return R.step_rounded(y.astype(f64), 8, -126).astype(f32)


# -- files ---------------------------------------------------------------------------------------------------

def operations(rng, vectors):
    x = awkward(rng)
    out = cast(rng) | {"x": x}
    for formula in FORMULAS:
        for ue8m0 in (False, True):
            q, s = quantise(x, 1, formula, ue8m0)
            name = formula + "_ue8m0" * ue8m0
            out |= {f"quant.{name}.q": codes(q), f"quant.{name}.s": s}
    w = (rng.standard_normal((133, 300)) * np.exp(rng.standard_normal((133, 300)))).astype(f32)
    w = bf16(w)
    q, s = quantise(w, 128)
    out |= {"w": ("BF16", M.bf16(w).tobytes(), w.shape), "quant.w.q": codes(q), "quant.w.s": s}
    # Activations and weights of mostly one sign: the sums that show what an accumulator loses.
    a, sa = quantise((np.abs(rng.standard_normal((6, 300))) - 0.1).astype(f32), 1)
    b, sb = quantise((np.abs(w) - f32(0.05)).astype(f32), 128)
    out |= {"a.q": codes(a), "a.s": sa, "b.q": codes(b), "b.s": sb}
    old = rng.standard_normal((6, 133)).astype(f32)
    out["old"] = old = bf16(old)
    rows = sb.repeat(128, 0)[:len(b)]
    for name, function in (("exact", exact), ("promoted", promoted), ("hopper", hopper)):
        y = function(a, sa, b, rows)
        out |= {f"gemm.{name}": y.astype(f32), f"gemm.{name}.bf16": bf16(y),
                f"gemm.{name}.add": (old + y).astype(f32)}
    ha, hb, hd = vectors
    assert (instruction(np.zeros(len(hd), f32), ha, hb) == hd).all()
    return out | {"h100.a": codes(ha), "h100.b": codes(hb), "h100.d": hd}


def read_vectors(folder):
    def hexadecimal(name):
        with open(os.path.join(folder, name)) as f:
            bits = np.array([[int(word, 16) for word in line.split()] for line in f][:256], np.uint32)
        values = bits.view(f32)
        q = M.e4m3(values.astype(f64))
        assert (R.E4M3[q] == values).all()
        return q
    with open(os.path.join(folder, "d_H100_fp32.txt")) as f:
        d = np.array([int(line, 2) for line in f.read().split()[:256]], np.uint32).view(f32)
    return hexadecimal("a_H100_E4M3.txt"), hexadecimal("b_H100_E4M3.txt"), d


def kept_vectors(path):
    head, data = R.read_header(path)
    part = lambda k: np.frombuffer(data, np.uint8)[slice(*head[k]["data_offsets"])]
    return part("h100.a").reshape(-1, 32), part("h100.b").reshape(-1, 32), part("h100.d").view(f32)


def make_arith(name, out):
    here = os.path.dirname(os.path.abspath(__file__))
    tiny = os.path.join(here, "..", "..", "weights", "tiny")
    model = tiny if name == "tiny" else os.path.join(here, "models", name)
    folder = os.path.join(out, "tiny" if name == "tiny" else os.path.join("models", name))
    taps = R.read_safetensors(os.path.join(here, "tiny" if name == "tiny" else model, "taps.safetensors"))
    ids = taps["ids"].astype(int)
    rows = np.linspace(0, len(ids) - 1, 12).astype(np.int32)
    result = {"ids": ids.astype(np.int32), "rows": rows}
    for R.ARITH in ARITH_MODELS[name]:
        found = R.forward(model, ids)
        result |= {f"{R.ARITH}.{k}": found[k][rows] for k in KEPT}
        away = np.sqrt(((found["logits"] - taps["logits"][:len(ids)]) ** 2).mean()) if name != "tiny" else 0
        print(f"{name:10} {R.ARITH}: logits {away:.3f} from f32 (root mean square)")
    R.ARITH = "f32"
    os.makedirs(folder, exist_ok=True)
    R.write_safetensors(os.path.join(folder, "arith.safetensors"), result, {"model": name})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)))
    p.add_argument("--vectors")
    p = p.parse_args()
    path = os.path.join(p.out, "fp8", "fp8.safetensors")
    vectors = read_vectors(p.vectors) if p.vectors else kept_vectors(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    R.write_safetensors(path, operations(np.random.default_rng(SEED), vectors), {"seed": str(SEED)})
    for name in ARITH_MODELS:
        make_arith(name, p.out)
