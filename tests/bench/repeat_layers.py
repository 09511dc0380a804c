#!/usr/bin/env python3
"""Makes a GGUF model deeper by repeating its layers, to measure speed with: a model of random weights need
not be made and quantised as a whole.

    tests/bench/repeat_layers.py IN.gguf OUT.gguf LAYERS

Layers from IN's last on are copies of its layers 1, 2, ... The number of layers in the metadata is changed.
Standard library only; the formats of GGUF v3's header are in ggml's docs/gguf.md.
"""

import pathlib
import re
import struct
import sys

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, UINT32 = 8, 9, 4
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)}


class Reader:
    def __init__(self, file):
        self.file = file

    def number(self, code):
        return struct.unpack("<" + code, self.file.read(struct.calcsize("<" + code)))[0]

    def text(self):
        return self.file.read(self.number("Q")).decode()

    def skip_value(self, kind):
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            for _ in range(count if inner in (STRING, ARRAY) else 0):
                self.skip_value(inner)
            if inner in SIZES:
                self.file.seek(SIZES[inner] * count, 1)
        else:
            self.file.seek(SIZES[kind], 1)


def layer_of(name):
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


def size_of(shape, kind):
    values, size = BLOCKS[kind]
    count = 1
    for n in shape:
        count *= n
    return count // values * size


def aligned(n):
    return (n + 31) // 32 * 32


def read_header(file):
    """The bytes of the keys, where the number of layers stands in them, and the tensors."""
    r = Reader(file)
    if file.read(4) != b"GGUF" or r.number("I") != 3:
        sys.exit("not a GGUF file of version 3")
    tensors, keys = r.number("Q"), r.number("Q")
    begin, place = file.tell(), None
    for _ in range(keys):
        name, kind = r.text(), r.number("I")
        if name.endswith(".block_count") and kind == UINT32:
            place = file.tell() - begin
        r.skip_value(kind)
    end = file.tell()
    found = []
    for _ in range(tensors):
        name, axes = r.text(), r.number("I")
        shape = [r.number("Q") for _ in range(axes)]
        kind, offset = r.number("I"), r.number("Q")
        found.append((name, shape, kind, offset))
    data = aligned(file.tell())
    file.seek(begin)
    return bytearray(file.read(end - begin)), keys, place, found, data


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    path, out, layers = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    with path.open("rb") as file, out.with_suffix(".tmp").open("wb") as copy:
        keys, count, place, tensors, data = read_header(file)
        (present,) = struct.unpack_from("<I", keys, place)
        struct.pack_into("<I", keys, place, layers)
        rest = [t for t in tensors if layer_of(t[0]) is None]
        wanted = list(rest)
        for i in range(layers):
            source = i if i < present else 1 + (i - 1) % (present - 1)
            mine = [t for t in tensors if layer_of(t[0]) == source]
            wanted += [(t[0].replace(f"blk.{source}.", f"blk.{i}.", 1), *t[1:]) for t in mine]
        header, at = b"", 0
        for name, shape, kind, _ in wanted:
            header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
            header += struct.pack(f"<{len(shape)}QIQ", *shape, kind, at)
            at += aligned(size_of(shape, kind))
        copy.write(b"GGUF" + struct.pack("<IQQ", 3, len(wanted), count) + keys + header)
        copy.write(bytes(aligned(copy.tell()) - copy.tell()))
        for _, shape, kind, offset in wanted:
            file.seek(data + offset)
            size = size_of(shape, kind)
            copy.write(file.read(size) + bytes(aligned(size) - size))
    out.with_suffix(".tmp").rename(out)


if __name__ == "__main__":
    main()
