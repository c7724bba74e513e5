"""Nested codec of bf16: 8-bit values cut into nibbles, and what is missing to the exact bits. docs/FORMAT.md, "nested".

Plane 0 looks like int4 (its scales are those of 255 steps), plane 1 is the low nibbles alone, plane 2 is made of the
`rest`: for each element the distance in ordered bf16 bits from the 8-bit value to the exact one, zigzag.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit
from kvstore.kernels.quant import int4_bytes, scratch_size
from kvstore.kernels.scales import affine, column_ranges, ordered, steps, stored, tile_ranges, value_of

U8, U16, U32, I16, I32, F32 = np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32


@jit
def low_bytes(rows: Any, cols: Any) -> Any:
    """Stored length of plane 1."""
    total = 0
    for first in range(0, rows, 64):
        total += (min(64, rows - first) + 1) // 2 * cols
    return total


@jit
def _quantise(row: Any, by_row: Any, least: Any, inv: Any, q: Any) -> Any:
    if not by_row:
        for c in range(row.size):
            v = steps(row[c], least[c], inv[c])
            q[c] = U8(v & U32(255))
        return
    for tile in range(row.size // 64):
        bottom, over = least[tile], inv[tile]
        for c in range(64):
            v = steps(row[tile * 64 + c], bottom, over)
            q[tile * 64 + c] = U8(v & U32(255))
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        v = steps(row[c], least[tile], inv[tile])
        q[c] = U8(v & U32(255))


@jit
def _values(q: Any, by_row: Any, scale: Any, least: Any, row: Any) -> Any:
    if not by_row:
        for c in range(row.size):
            row[c] = value_of(q[c], scale[c], least[c])
        return
    for tile in range(row.size // 64):
        step, bottom = scale[tile], least[tile]
        for c in range(64):
            row[tile * 64 + c] = value_of(q[tile * 64 + c], step, bottom)
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        row[c] = value_of(q[c], scale[tile], least[tile])


@jit
def _nibbles(q: Any, high: Any, low: Any, first_half: Any) -> Any:
    """Into the lower halves of the bytes, or added as the upper ones."""
    if first_half:
        for c in range(q.size):
            high[c] = U8(q[c] >> U8(4))
        for c in range(q.size):
            low[c] = U8(q[c] & U8(15))
    else:
        for c in range(q.size):
            high[c] = U8(high[c] | U8(q[c] & U8(0xF0)))
        for c in range(q.size):
            low[c] = U8(low[c] | U8(q[c] << U8(4)))


@jit
def _joined(high: Any, low: Any, first_half: Any, q: Any) -> Any:
    if first_half:
        for c in range(q.size):
            q[c] = U8(U8(high[c] << U8(4)) | U8(low[c] & U8(15)))
    else:
        for c in range(q.size):
            q[c] = U8(U8(high[c] & U8(0xF0)) | U8(low[c] >> U8(4)))


@jit
def _distance(bits: Any, value: Any) -> Any:
    """Zigzag of what `value` lacks to `bits`, in the order of the values."""
    far = I16(ordered(bits) - ordered(value))
    return U16(U16(U16(far) << U16(1)) ^ U16(far >> I16(15)))


@jit
def _rest(row: Any, q: Any, by_row: Any, scale: Any, least: Any, rest: Any) -> Any:
    """How far each element is from the value that `_values` makes of it."""
    if not by_row:
        for c in range(row.size):
            rest[c] = _distance(row[c], value_of(q[c], scale[c], least[c]))
        return
    for tile in range(row.size // 64):
        step, bottom = scale[tile], least[tile]
        for c in range(64):
            rest[tile * 64 + c] = _distance(row[tile * 64 + c], value_of(q[tile * 64 + c], step, bottom))
    for c in range(row.size // 64 * 64, row.size):
        tile = row.size // 64
        rest[c] = _distance(row[c], value_of(q[c], scale[tile], least[tile]))


@jit
def _exact(row: Any, rest: Any) -> Any:
    for c in range(row.size):
        z = rest[c]
        far = I16(U16(z >> U16(1)) ^ U16(U16(0) - U16(z & U16(1))))
        row[c] = U16(ordered(U16(I16(ordered(row[c]) + far))))


@jit
def _encode(
    x: Any,
    rows: Any,
    cols: Any,
    by_row: Any,
    high: Any,
    low: Any,
    rest: Any,
    low_r: Any,
    high_r: Any,
    scale: Any,
    least: Any,
    inv: Any,
    q: Any,
) -> Any:
    at, under = 0, 0
    tiles = (cols + 63) // 64
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        half = (n + 1) // 2
        count = n * tiles if by_row else cols
        if by_row:
            fits = tile_ranges(x, first, n, cols, low_r, high_r)
        else:
            fits = column_ranges(x, first, n, cols, low_r, high_r)
        if not fits:
            return -1
        body = at + 4 * count
        affine(low_r[:count], high_r[:count], F32(255.0), high[at:body].view(np.uint16), scale, least, inv)
        for t in range(n):
            i = (first + t) * cols
            row, skip = x[i : i + cols], t * tiles if by_row else 0
            start = (t if t < half else t - half) * cols
            _quantise(row, by_row, least[skip:], inv[skip:], q[:cols])
            _nibbles(
                q[:cols], high[body + start : body + start + cols], low[under + start : under + start + cols], t < half
            )
            if rest.size:
                _rest(row, q[:cols], by_row, scale[skip:], least[skip:], rest[i : i + cols])
        at, under = body + half * cols, under + half * cols
    return at


@jit
def _decode(
    high: Any, low: Any, rest: Any, x: Any, rows: Any, cols: Any, by_row: Any, scale: Any, least: Any, q: Any
) -> Any:
    at, under = 0, 0
    tiles = (cols + 63) // 64
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        half = (n + 1) // 2
        body = at + 4 * (n * tiles if by_row else cols)
        stored(high[at:body].view(np.uint16), F32(1.0), F32(0.0), scale, least)
        for t in range(n):
            i = (first + t) * cols
            row, skip = x[i : i + cols], t * tiles if by_row else 0
            start = (t if t < half else t - half) * cols
            _joined(
                high[body + start : body + start + cols], low[under + start : under + start + cols], t < half, q[:cols]
            )
            _values(q[:cols], by_row, scale[skip:], least[skip:], row)
            if rest.size:
                _exact(row, rest[i : i + cols])
        at, under = body + half * cols, under + half * cols


@jit
def encode(src: Any, dst: Any, rest: Any, jobs: Any, by_row: Any, results: Any) -> Any:
    """Planes 0 and 1 of chunks of one buffer, and what plane 2 is made of.

    `jobs`, a row each: source, its length, rows, columns, target of plane 0, its length, target of plane 1, its length,
    place in `rest` (uint8; empty: not wanted). `results[k]`: 0, or -1 where a length is another or a value too large.
    Mutates `dst`, `rest` and `results`.
    """
    size = scratch_size(jobs)
    low, high = np.empty(size, np.int16), np.empty(size, np.int16)
    scale, least, inv = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    q = np.empty(size, np.uint8)
    for k in range(jobs.shape[0]):
        start, length, rows, cols, first, room, second, more, place = jobs[k]
        v = by_row[k] != 0
        results[k] = -1
        if room != int4_bytes(rows, cols, v) or more != low_bytes(rows, cols):
            continue
        x = src[start : start + length].view(np.uint16)
        wanted = rest[place : place + length if rest.size else place].view(np.uint16)
        done = _encode(
            x, rows, cols, v, dst[first : first + room], dst[second : second + more], wanted,
            low, high, scale, least, inv, q,
        )  # fmt: skip
        results[k] = 0 if done == room else -1


@jit
def decode(src: Any, dst: Any, rest: Any, jobs: Any, by_row: Any, results: Any) -> Any:
    """Values of planes 0 and 1, and of the rest where it is given. Mutates `dst` and `results`.

    `jobs`, a row each: plane 0, its length, rows, columns, target, its length, plane 1, its length, place in `rest`.
    """
    size = scratch_size(jobs)
    scale, least, q = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.uint8)
    for k in range(jobs.shape[0]):
        first, length, rows, cols, target, room, second, more, place = jobs[k]
        v = by_row[k] != 0
        fits = length == int4_bytes(rows, cols, v) and more == low_bytes(rows, cols) and room == 2 * rows * cols
        results[k] = 0 if fits else -1
        if not fits:
            continue
        wanted = rest[place : place + room if rest.size else place].view(np.uint16)
        _decode(
            src[first : first + length], src[second : second + more], wanted,
            dst[target : target + room].view(np.uint16), rows, cols, v, scale, least, q,
        )  # fmt: skip
