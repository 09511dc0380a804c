#!/usr/bin/env python3
"""How do two safetensors files differ? For kernels: what yours wrote against `deepseek logits --taps`.

    tests/golden/compare.py A B                                       every tensor, by its bits
    tests/golden/compare.py A B --tolerance lse=1e-6 --tolerance '*=1e-4'
    tests/golden/compare.py A B --only 'layers.1.*'
    tests/golden/compare.py --selftest                                shows that it fails where it must

Names, dtypes and shapes must be the same. A tensor whose numbers differ gets a line with

    max abs      the largest |a - b|
    NMSE         sum (a - b)^2 / sum b^2
    calc_diff    1 - 2 sum a b / (sum a^2 + sum b^2), DeepGEMM's measure
    worst row    the row (of all axes but the last) with the largest calc_diff, and that. One row of zeros
                 among 4,096 moves the tensor's calc_diff by 1e-4 and its own to 1
    first        the first number that differs: where, a, b

--tolerance PATTERN=X: a tensor whose name, or the last part of it, matches is equal while in each row the
largest |a - b| is at most X times the largest |b|, whatever its dtypes; the first pattern that matches
counts. Without one bits decide. Any NaN equals any other. --only PATTERN: the others are not looked at.
Read are F64, F32, F16, BF16, F8_E4M3, F8_E5M2, integers. Exit code 0: equal; 2: different; 1: bad input.
Standard library only.
"""
import argparse
import array
import fnmatch
import json
import math
import os
import struct
import sys
import tempfile
from operator import mul, sub

INTEGERS = {"I8": "b", "U8": "B", "BOOL": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q",
            "U64": "Q"}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
          **{name: struct.calcsize(code) for name, code in INTEGERS.items()}}


class BadInput(Exception):
    pass


def e4m3(b):
    exponent, fraction = b >> 3 & 15, b & 7
    x = math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9)
    return math.nan if b & 127 == 127 else -x if b & 128 else x


E4M3 = [e4m3(b) for b in range(256)]
E5M2 = [struct.unpack("<e", bytes([0, b]))[0] for b in range(256)]          # the upper half of an F16


def numbers(data, dtype):
    """The numbers that bytes stand for, exactly."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return array.array("f", wide)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return [(E4M3 if dtype == "F8_E4M3" else E5M2)[b] for b in data]
    if dtype == "F16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    return array.array({"F64": "d", "F32": "f"}.get(dtype) or INTEGERS[dtype], data)


class File:
    """The tensors of a safetensors file: name -> (dtype, shape, begin of its bytes), and those on demand."""
    def __init__(self, path):
        self.path, self.tensors = path, {}
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as f:
                length, = struct.unpack("<Q", f.read(8))
                if length > size - 8:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, t in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (begin, end) = t["dtype"], tuple(t["shape"]), t["data_offsets"]
                if dtype not in WIDTHS:
                    raise ValueError(f"{name}: dtype {dtype}")
                count = math.prod(shape)
                if end - begin != count * WIDTHS[dtype] or not 0 <= begin <= end <= size - 8 - length:
                    raise ValueError(f"{name}: bytes {begin} to {end}")
                self.tensors[name] = dtype, shape, 8 + length + begin
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise BadInput(f"{path}: {error}") from None

    def data(self, name):
        dtype, shape, begin = self.tensors[name]
        with open(self.path, "rb") as f:
            f.seek(begin)
            return f.read(math.prod(shape) * WIDTHS[dtype])


class Sums:
    """Of a row, or of several."""
    def __init__(self, a=(), b=()):
        if not math.isfinite(sum(a) + sum(b)):           # infinite on both sides is no difference
            a, b = zip(*((0, 0) if x == y or x != x and y != y else (x, y) for x, y in zip(a, b)))
        apart = list(map(sub, a, b))
        self.worst = max(map(abs, apart), default=0) if not any(x != x for x in apart) else math.nan
        self.squares, self.aa, self.bb, self.ab = (sum(map(mul, x, y)) for x, y in
                                                   ((apart, apart), (a, a), (b, b), (a, b)))

    def add(self, other):
        for key in ("squares", "aa", "bb", "ab"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.worst = self.worst if self.worst != self.worst or other.worst <= self.worst else other.worst

    def calc_diff(self):
        return 1 - 2 * self.ab / (self.aa + self.bb) if self.aa + self.bb else 0.0

    def nmse(self):
        return self.squares / self.bb if self.bb else math.inf if self.squares else 0.0


def within(row, b, tolerance):
    return row.worst <= tolerance * max((abs(x) for x in b if math.isfinite(x)), default=0)


def difference(a, b, tolerance):
    """'' or how a differs from b, both (dtype, shape, bytes)."""
    if a[1] != b[1]:
        return f"shape {list(a[1])} against {list(b[1])}"
    if a[0] == b[0] and a[2] == b[2]:
        return ""
    if a[0] != b[0] and tolerance is None:
        return f"dtype {a[0]} against {b[0]}"
    x, y, n = numbers(a[2], a[0]), numbers(b[2], b[0]), a[1][-1] if a[1] else 1
    total, most, worst, wrong, first = Sums(), -math.inf, 0, 0, None
    for begin in range(0, len(x), n):
        p, q = x[begin:begin + n], y[begin:begin + n]
        row = Sums(p, q)
        total.add(row)
        far = row.calc_diff() if row.calc_diff() == row.calc_diff() else math.inf
        if far > most:
            most, worst = far, begin // n
        other = [i for i, (v, w) in enumerate(zip(p, q)) if (v != w and not (v != v and w != w)) or
                 (v == 0 == w and math.copysign(1, v) != math.copysign(1, w))]
        if not other or (tolerance is not None and within(row, q, tolerance)):
            continue
        wrong += len(other)
        first = begin + other[0] if first is None else first
    if first is None:
        return ""
    place = lambda i, shape: [i // math.prod(shape[axis + 1:]) % side for axis, side in enumerate(shape)]
    return (f"{wrong} of {len(x)} numbers; max abs {total.worst:.3g}, NMSE {total.nmse():.3g}, calc_diff "
            f"{total.calc_diff():.3g}; worst row {place(worst, a[1][:-1])}: {most:.3g}; "
            f"first {place(first, a[1])}: {x[first]:.9g} against {y[first]:.9g}")


def compare(a, b, only="*", tolerances=()):
    """Lines of what differs, and how many tensors were looked at."""
    a, b, lines, count = File(a), File(b), [], 0
    matches = lambda name, pattern: any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.split(".")[-1]))
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if not matches(name, only):
            continue
        count += 1
        missing = [f.path for f in (a, b) if name not in f.tensors]
        tolerance = next((x for pattern, x in tolerances if matches(name, pattern)), None)
        text = f"not in {missing[0]}" if missing else difference(
            *((*f.tensors[name][:2], f.data(name)) for f in (a, b)), tolerance)
        if text:
            lines.append(f"{name}: {text}")
    if count == 0:
        raise BadInput(f"no tensor is called {only}" if only != "*" else "no tensors")
    return lines, count


# -- selftest ------------------------------------------------------------------------------------------------

def write(path, tensors):
    header, blob = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header).encode()
    path.write(struct.pack("<Q", len(text)) + text + blob)
    path.flush()


def cases():
    """(what, tensors of A, tensors of B, tolerances, a part of the answer or '')"""
    f32 = lambda *v: array.array("f", v).tobytes()
    one = {"layers.1.z": ("F32", [2, 2], f32(1, 2, 3, 4))}
    with_z = lambda *v: {"layers.1.z": ("F32", [2, 2], f32(*v))}
    rows = array.array("f", (math.sin(i) for i in range(4096 * 16)))
    holed = array.array("f", rows)
    holed[16 * 1000:16 * 1001] = array.array("f", [0] * 16)
    many = lambda v: {"y": ("F32", [4096, 16], v.tobytes())}
    yield "equal", one, one, [], ""
    yield "the last bit", one, with_z(1, 2, 3, 4.0000005), [], "1 of 4 numbers"
    yield "where", one, with_z(1, 2, 3.5, 4), [], "worst row [1]: 0.00"
    yield "the first", one, with_z(1, 2, 3.5, 5), [], "first [1, 0]: 3 against 3.5"
    yield "within a tolerance", one, with_z(1, 2, 3, 4.0003), [("z", 1e-4)], ""
    yield "of its own row", one, with_z(1, 2.0003, 3, 4), [("layers.*", 1e-4)], "1 of 4"
    yield "beyond a tolerance", one, with_z(1, 2, 3, 4.0005), [("z", 1e-4)], "1 of 4"
    yield "the first pattern counts", one, with_z(1, 2, 3, 4.0005), [("z", 1e-4), ("*", 1)], "1 of 4"
    yield "one row of zeros of 4,096", many(holed), many(rows), [], "worst row [1000]: 1;"
    yield "a row of zeros within no tolerance", many(holed), many(rows), [("*", 0.5)], "16 of 65536"
    yield "zero and -zero", with_z(0, 2, 3, 4), with_z(-0.0, 2, 3, 4), [], "1 of 4"
    yield "NaN equals NaN", with_z(math.nan, 2, 3, 4), with_z(-math.nan, 2, 3, 4), [], ""
    yield "NaN is no number", with_z(math.nan, 2, 3, 4), one, [("*", 10)], "first [0, 0]: nan against 1"
    yield "-inf equals -inf", with_z(-math.inf, 2, 3, 4), with_z(-math.inf, 2, 3, 4.0003), [("z", 1e-4)], ""
    yield "-inf is no number", with_z(-math.inf, 2, 3, 4), one, [("*", 10)], "max abs inf"
    yield "another shape", one, {"layers.1.z": ("F32", [4], f32(1, 2, 3, 4))}, [], "shape [2, 2] against [4]"
    yield "another name", one, {"layers.2.z": one["layers.1.z"]}, [], "layers.2.z: not in"
    yield "another dtype", one, {
        "layers.1.z": ("BF16", [2, 2], b"\x80\x3f\x00\x40\x40\x40\x80\x40")}, [], "dtype F32 against BF16"
    yield "BF16 by value", {"x": ("BF16", [3], b"\x80\x3f\x20\xc1\x01\x00")}, {
        "x": ("F32", [3], f32(1, -10, 2**-133))}, [("x", 0)], ""
    yield "E4M3 by value", {"x": ("F8_E4M3", [4], bytes([0x38, 0x7E, 0x81, 0x08]))}, {
        "x": ("F32", [4], f32(1, 448, -2**-9, 2**-6))}, [("x", 0)], ""
    yield "E5M2 by value", {"x": ("F8_E5M2", [4], bytes([0x3C, 0x7B, 0x81, 0x7C]))}, {
        "x": ("F32", [4], f32(1, 57344, -2**-16, math.inf))}, [("x", 0)], ""
    yield "F16 by value", {"x": ("F16", [2], b"\x00\x3c\xff\x7b")}, {
        "x": ("F32", [2], f32(1, 65504))}, [("x", 0)], ""
    yield "integers", {"i": ("I32", [2], struct.pack("<2i", 1, 2))}, {
        "i": ("I32", [2], struct.pack("<2i", 1, 3))}, [], "first [1]: 2 against 3"


def selftest():
    failed, passed = 0, 0
    for what, a, b, tolerances, expected in cases():
        with tempfile.NamedTemporaryFile() as x, tempfile.NamedTemporaryFile() as y:
            write(x, a), write(y, b)
            text = "\n".join(compare(x.name, y.name, tolerances=tolerances)[0])
            options = [word for p, t in tolerances for word in ("--tolerance", f"{p}={t}")]
            code = main([x.name, y.name, *options], True)
        good = (expected in text and code == 2) if expected else (text == "" and code == 0)
        passed, failed = passed + good, failed + (not good)
        if not good:
            print(f"{what}: exit code {code}, {text!r}, not {expected!r}")
    for content in (b"", b"\x08\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]",
                    b'\x3c\0\0\0\0\0\0\0{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}    \0\0\0\0'):
        with tempfile.NamedTemporaryFile() as x:
            x.write(content), x.flush()
            good = main([x.name, x.name], True) == 1
        passed, failed = passed + good, failed + (not good)
        if not good:
            print(f"not refused: {content!r}")
    print(f"compare-selftest: {passed} passed, {failed} failed")
    return 1 if failed else 0


def tolerance(text):
    pattern, _, number = text.rpartition("=")
    if not pattern or not float(number) >= 0:
        raise ValueError(text)
    return pattern, float(number)


def main(arguments, silent=False):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("a"), p.add_argument("b")
    p.add_argument("--tolerance", type=tolerance, action="append", default=[], metavar="PATTERN=X")
    p.add_argument("--only", default="*", metavar="PATTERN")
    p.error = lambda message: (print(f"compare.py: {message}", file=sys.stderr), sys.exit(1))
    p = p.parse_args(arguments)
    try:
        lines, count = compare(p.a, p.b, p.only, p.tolerance)
    except BadInput as error:
        if not silent:
            print(f"compare.py: {error}", file=sys.stderr)
        return 1
    if not silent:
        print(*lines, f"{count - len(lines)} of {count} tensors equal", sep="\n")
    return 2 if lines else 0


if __name__ == "__main__":
    sys.exit(selftest() if sys.argv[1:] == ["--selftest"] else main(sys.argv[1:]))
