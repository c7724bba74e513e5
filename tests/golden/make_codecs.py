"""Golden vectors of every codec: `python -m tests.golden.make_codecs` writes those that do not exist. Kept for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.codecs.batch import encode
from kvstore.codecs.registry import FORMS
from kvstore.layout import Chunk, K, V
from kvstore.spec import DTYPES

FOLDER = Path(__file__).parent
ROWS, COLUMNS = 67, 65  # a whole group of 64 rows and a part of one; a whole tile and a part of one


def raw_of(dtype: str) -> bytes:
    """Bits made by integer arithmetic alone, so that every machine makes the same: a spread of exponents per column."""
    numbers = np.arange(ROWS * COLUMNS, dtype=np.uint64)
    mixed = (numbers * np.uint64(0x9E3779B97F4A7C15)) ^ (numbers >> np.uint64(3))
    itemsize, exponent_bits, mantissa_bits, _ = FORMS[dtype]
    exponent = (
        (1 << exponent_bits) // 2 + (numbers % 65 % 3).astype(np.int64) - (mixed >> np.uint64(50)).astype(np.int64) % 4
    )
    sign, mantissa = (mixed >> np.uint64(63)), (mixed >> np.uint64(20)) & np.uint64((1 << mantissa_bits) - 1)
    bits = (
        (sign << np.uint64(exponent_bits + mantissa_bits))
        | (exponent.astype(np.uint64) << np.uint64(mantissa_bits))
        | mantissa
    )
    bits[::401] = 0
    return bits.astype(f"<u{itemsize}").tobytes()


def chunk_of(dtype: str, component: int) -> Chunk:
    nbytes = ROWS * COLUMNS * DTYPES[dtype]
    return Chunk(0, component, 0, 1, 0, nbytes, (ROWS, 1, COLUMNS), DTYPES[dtype], dtype)


def cases() -> dict[str, list[tuple[str, int, int]]]:
    """(element type, component, codec) of what stands in each file."""
    first = [("bfloat16", component, codec) for component in (K, V) for codec in range(8)]
    return {
        "codecs.json": first + [(dtype, K, 3) for dtype in FORMS if dtype != "bfloat16"],
        "codecs-dense.json": [("bfloat16", component, 8) for component in (K, V)],
    }


def vector(dtype: str, component: int, codec: int) -> dict[str, Any]:
    """What the codec makes of the raw bytes: one entry a plane."""
    [planes] = encode(memoryview(raw_of(dtype)), [chunk_of(dtype, component)], [codec])
    return {
        "dtype": dtype,
        "component": component,
        "codec": planes[0].codec,
        "params": planes[0].params,
        "planes": [bytes(plane.data).hex() for plane in planes],
    }


def main() -> int:
    for name, wanted in cases().items():
        path = FOLDER / name
        if path.exists():
            print(f"{path.name} exists and is kept for ever: give new codecs a new file")
        else:
            path.write_text(json.dumps([vector(*case) for case in wanted], indent=0) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
