#!/usr/bin/env python3
"""Makes tests/golden/blocks/blocks.safetensors: quantised blocks and the numbers they stand for.

    PYTHONPATH=llama.cpp/gguf-py tests/golden/make_blocks.py      needs numpy and gguf, llama.cpp's package

For each block format NAME of GGUF files the file has `NAME` (10, bytes of a block), U8, and `NAME.values`
(10, numbers of a block), F32, as gguf.quants.dequantize gives them. Eight blocks are random bytes; the last
two have all bits 0 and all bits 1. The f16 scales are random, finite ones.
"""
import json
import pathlib
import struct

import gguf
import numpy as np

# Where a block has f16 numbers.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
          "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
          "IQ4_NL": [0], "IQ4_XS": [0]}
RANDOM = 8


def blocks_of(name, rng):
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    blocks = rng.integers(0, 256, (RANDOM + 2, size), dtype=np.uint8)
    blocks[RANDOM], blocks[RANDOM + 1] = 0, 255
    for at in HALVES[name]:
        halves = rng.normal(0, 0.01, RANDOM + 2).astype(np.float16)
        blocks[:, at:at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks


def main():
    rng = np.random.default_rng(1)
    tensors = {}
    for name in HALVES:
        blocks = blocks_of(name, rng)
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).astype("<f4")
        tensors[name], tensors[name + ".values"] = ("U8", blocks), ("F32", values)
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    folder = pathlib.Path(__file__).parent / "blocks"
    folder.mkdir(exist_ok=True)
    (folder / "blocks.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


if __name__ == "__main__":
    main()
