"""int8 and int4 of bf16, many chunks per call. The bytes: docs/FORMAT.md, "int8" and "int4".

A chunk is rows (tokens) by columns (channels), cut into groups of 64 rows; each group begins with its scales. K has a
scale per column of a group; V one per row (int8) or per row and tile of 64 columns (int4). In int4, row t and row
t + half of a group share bytes. Rounding to integers is adding 2^23: to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit
from kvstore.kernels.scales import (
    affine,
    column_ranges,
    narrow,
    row_ranges,
    steps,
    stored,
    symmetric,
    tile_ranges,
    value_of,
    widen,
)

U8, U16, U32, I8, I16, I32, F32 = np.uint8, np.uint16, np.uint32, np.int8, np.int16, np.int32, np.float32

GROUP = 64


@jit
def int4_bytes(rows: Any, cols: Any, by_row: Any) -> Any:
    """Stored length of a chunk."""
    total = 0
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        scales = n * ((cols + 63) // 64) if by_row else cols
        total += 4 * scales + (n + 1) // 2 * cols
    return total


@jit
def int8_bytes(rows: Any, cols: Any, by_row: Any) -> Any:
    total = 0
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        total += 2 * (n if by_row else cols) + n * cols
    return total


@jit
def _low_by_column(row: Any, least: Any, inv: Any, packed: Any) -> Any:
    for c in range(row.size):
        q = steps(row[c], least[c], inv[c])
        packed[c] = U8(q & U32(15))


@jit
def _high_by_column(row: Any, least: Any, inv: Any, packed: Any) -> Any:
    for c in range(row.size):
        q = steps(row[c], least[c], inv[c])
        packed[c] = U8(U32(packed[c]) | U32(U32(q & U32(15)) << U32(4)))


@jit
def _low_by_row(row: Any, least: Any, inv: Any, packed: Any) -> Any:
    for tile in range(row.size // 64):
        bottom, over = least[tile], inv[tile]
        for c in range(64):
            q = steps(row[tile * 64 + c], bottom, over)
            packed[tile * 64 + c] = U8(q & U32(15))
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        q = steps(row[c], least[tile], inv[tile])
        packed[c] = U8(q & U32(15))


@jit
def _high_by_row(row: Any, least: Any, inv: Any, packed: Any) -> Any:
    for tile in range(row.size // 64):
        bottom, over = least[tile], inv[tile]
        for c in range(64):
            q = steps(row[tile * 64 + c], bottom, over)
            packed[tile * 64 + c] = U8(U32(packed[tile * 64 + c]) | U32(U32(q & U32(15)) << U32(4)))
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        q = steps(row[c], least[tile], inv[tile])
        packed[c] = U8(U32(packed[c]) | U32(U32(q & U32(15)) << U32(4)))


@jit
def _int4_encode(
    x: Any, rows: Any, cols: Any, by_row: Any, dst: Any, low: Any, high: Any, scale: Any, least: Any, inv: Any
) -> Any:
    at = 0
    tiles = (cols + 63) // 64
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        half = (n + 1) // 2
        count = n * tiles if by_row else cols
        if by_row:
            fits = tile_ranges(x, first, n, cols, low, high)
        else:
            fits = column_ranges(x, first, n, cols, low, high)
        if not fits:
            return -1
        body = at + 4 * count
        affine(low[:count], high[:count], F32(15.0), dst[at:body].view(np.uint16), scale, least, inv)
        for t in range(n):
            row = x[(first + t) * cols : (first + t) * cols + cols]
            start = body + (t if t < half else t - half) * cols
            packed = dst[start : start + cols]
            if by_row and t < half:
                _low_by_row(row, least[t * tiles : count], inv[t * tiles : count], packed)
            elif by_row:
                _high_by_row(row, least[t * tiles : count], inv[t * tiles : count], packed)
            elif t < half:
                _low_by_column(row, least, inv, packed)
            else:
                _high_by_column(row, least, inv, packed)
        at = body + half * cols
    return at


@jit
def _value_low(row: Any, packed: Any, scale: Any, least: Any) -> Any:
    for c in range(row.size):
        row[c] = value_of(packed[c] & U8(15), scale[c], least[c])


@jit
def _value_high(row: Any, packed: Any, scale: Any, least: Any) -> Any:
    for c in range(row.size):
        row[c] = value_of(packed[c] >> U8(4), scale[c], least[c])


@jit
def _value_low_by_row(row: Any, packed: Any, scale: Any, least: Any) -> Any:
    for tile in range(row.size // 64):
        step, bottom = scale[tile], least[tile]
        for c in range(64):
            row[tile * 64 + c] = value_of(packed[tile * 64 + c] & U8(15), step, bottom)
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        row[c] = value_of(packed[c] & U8(15), scale[tile], least[tile])


@jit
def _value_high_by_row(row: Any, packed: Any, scale: Any, least: Any) -> Any:
    for tile in range(row.size // 64):
        step, bottom = scale[tile], least[tile]
        for c in range(64):
            row[tile * 64 + c] = value_of(packed[tile * 64 + c] >> U8(4), step, bottom)
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        row[c] = value_of(packed[c] >> U8(4), scale[tile], least[tile])


@jit
def _int4_decode(
    src: Any, x: Any, rows: Any, cols: Any, by_row: Any, factor: Any, shift: Any, scale: Any, least: Any
) -> Any:
    at = 0
    tiles = (cols + 63) // 64
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        half = (n + 1) // 2
        count = n * tiles if by_row else cols
        body = at + 4 * count
        stored(src[at:body].view(np.uint16), factor, shift, scale, least)
        for t in range(n):
            row = x[(first + t) * cols : (first + t) * cols + cols]
            start = body + (t if t < half else t - half) * cols
            packed = src[start : start + cols]
            if by_row and t < half:
                _value_low_by_row(row, packed, scale[t * tiles : count], least[t * tiles : count])
            elif by_row:
                _value_high_by_row(row, packed, scale[t * tiles : count], least[t * tiles : count])
            elif t < half:
                _value_low(row, packed, scale, least)
            else:
                _value_high(row, packed, scale, least)
        at = body + half * cols


@jit
def _byte_by_column(row: Any, inv: Any, packed: Any) -> Any:
    for c in range(row.size):
        packed[c] = U8(F32(F32(widen(row[c]) * inv[c]) + F32(12582912.0)).view(np.uint32) & U32(255))


@jit
def _byte_by_row(row: Any, inv: Any, packed: Any) -> Any:
    for c in range(row.size):
        packed[c] = U8(F32(F32(widen(row[c]) * inv) + F32(12582912.0)).view(np.uint32) & U32(255))


@jit
def _byte_value(row: Any, packed: Any, scale: Any) -> Any:
    for c in range(row.size):
        row[c] = narrow(F32(F32(I32(I8(packed[c]))) * scale[c]))


@jit
def _byte_value_by_row(row: Any, packed: Any, scale: Any) -> Any:
    for c in range(row.size):
        row[c] = narrow(F32(F32(I32(I8(packed[c]))) * scale))


@jit
def _int8_encode(x: Any, rows: Any, cols: Any, by_row: Any, dst: Any, low: Any, high: Any, scale: Any, inv: Any) -> Any:
    at = 0
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        count = n if by_row else cols
        if by_row:
            fits = row_ranges(x, first, n, cols, low, high)
        else:
            fits = column_ranges(x, first, n, cols, low, high)
        if not fits:
            return -1
        body = at + 2 * count
        symmetric(low[:count], high[:count], dst[at:body].view(np.uint16), scale, inv)
        for t in range(n):
            row = x[(first + t) * cols : (first + t) * cols + cols]
            packed = dst[body + t * cols : body + t * cols + cols]
            if by_row:
                _byte_by_row(row, inv[t], packed)
            else:
                _byte_by_column(row, inv, packed)
        at = body + n * cols
    return at


@jit
def _int8_decode(src: Any, x: Any, rows: Any, cols: Any, by_row: Any, scale: Any) -> Any:
    at = 0
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        count = n if by_row else cols
        body = at + 2 * count
        heads = src[at:body].view(np.uint16)
        for k in range(count):
            scale[k] = widen(heads[k])
        for t in range(n):
            row = x[(first + t) * cols : (first + t) * cols + cols]
            packed = src[body + t * cols : body + t * cols + cols]
            if by_row:
                _byte_value_by_row(row, packed, scale[t])
            else:
                _byte_value(row, packed, scale)
        at = body + n * cols


@jit
def scratch_size(jobs: Any) -> Any:
    """Scales of one group of the widest chunk."""
    most = 0
    for k in range(jobs.shape[0]):
        most = max(most, jobs[k, 3])
    return most + 64


@jit
def encode(src: Any, dst: Any, jobs: Any, bits: Any, by_row: Any, results: Any) -> Any:
    """Chunks of one buffer into another, `bits` 8 or 4. `jobs`: see `fast16.encode`; `by_row[k]`: 1 for V.

    `results[k]`: stored bytes, -1 where they would not fit or a value is too large. Mutates `dst` and `results`.
    """
    size = scratch_size(jobs)
    low, high = np.empty(size, np.int16), np.empty(size, np.int16)
    scale, least, inv = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for k in range(jobs.shape[0]):
        start, length, rows, cols, target, room = jobs[k]
        v = by_row[k] != 0
        results[k] = -1
        if room < (int4_bytes(rows, cols, v) if bits == 4 else int8_bytes(rows, cols, v)):
            continue
        x, out = src[start : start + length].view(np.uint16), dst[target : target + room]
        if bits == 4:
            results[k] = _int4_encode(x, rows, cols, v, out, low, high, scale, least, inv)
        else:
            results[k] = _int8_encode(x, rows, cols, v, out, low, high, scale, inv)


@jit
def decode(src: Any, dst: Any, jobs: Any, bits: Any, by_row: Any, factor: Any, shift: Any, results: Any) -> Any:
    """Inverse of `encode`, source and target exchanged. `results[k]`: 0, or -1 where the bytes are no such chunk.

    int4 values are q * (scale * `factor`) + (least + scale * `shift`): 1 and 0, or 16 and 7.5 for the first plane of a
    nested chunk.
    """
    size = scratch_size(jobs)
    scale, least = np.empty(size, np.float32), np.empty(size, np.float32)
    for k in range(jobs.shape[0]):
        start, length, rows, cols, target, room = jobs[k]
        v = by_row[k] != 0
        fits = length == (int4_bytes(rows, cols, v) if bits == 4 else int8_bytes(rows, cols, v))
        results[k] = 0 if fits and room == 2 * rows * cols else -1
        if results[k] < 0:
            continue
        piece, x = src[start : start + length], dst[target : target + room].view(np.uint16)
        if bits == 4:
            _int4_decode(piece, x, rows, cols, v, factor, shift, scale, least)
        else:
            _int8_decode(piece, x, rows, cols, v, scale)
