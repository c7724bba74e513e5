"""The fast lossless codec for fp16, fp32 and fp8: the general form of `fast16`. The bytes: docs/FORMAT.md, "fast".

An element's exponent becomes a code of `code_bits` above its column's base; code, sign and mantissa, in this order from
the top, make a value of `bits` bits. Values are cut into planes from the bottom: 16 bits if there are as many, then 8,
4, 2, 1. In planes of less than 8 bits, rows t, t + part, t + 2 part ... share bytes; `part` is the plane's rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit

U8, U16, U32, I64 = np.uint8, np.uint16, np.uint32, np.int64


@jit
def plane_bytes(rows: Any, cols: Any, width: Any) -> Any:
    if width >= 8:
        return rows * cols * (width // 8)
    return (rows + 8 // width - 1) // (8 // width) * cols


@jit
def all_planes(rows: Any, cols: Any, bits: Any) -> Any:
    total = 0
    for power in range(5):
        if bits >> power & 1:
            total += plane_bytes(rows, cols, 1 << power)
    return total


@jit
def _load(src: Any, itemsize: Any, values: Any) -> Any:
    if itemsize == 1:
        for k in range(values.size):
            values[k] = U32(src[k])
    elif itemsize == 2:
        halves = src.view(np.uint16)
        for k in range(values.size):
            values[k] = U32(halves[k])
    else:
        words = src.view(np.uint32)
        for k in range(values.size):
            values[k] = words[k]


@jit
def _store(values: Any, itemsize: Any, dst: Any) -> Any:
    if itemsize == 1:
        for k in range(values.size):
            dst[k] = U8(values[k])
    elif itemsize == 2:
        halves = dst.view(np.uint16)
        for k in range(values.size):
            halves[k] = U16(values[k])
    else:
        words = dst.view(np.uint32)
        for k in range(values.size):
            words[k] = values[k]


@jit
def _bases(values: Any, rows: Any, cols: Any, exponent_bits: Any, mantissa_bits: Any, codes: Any, bases: Any) -> Any:
    """Per column the exponent of code 0: as many below the largest one as there are codes, less one."""
    top = np.zeros(cols, np.uint32)
    mask = U32((1 << exponent_bits) - 1)
    for t in range(rows):
        row = values[t * cols : t * cols + cols]
        for c in range(cols):
            top[c] = max(top[c], U32(U32(row[c] >> U32(mantissa_bits)) & mask))
    for c in range(cols):
        bases[c] = U8(max(I64(top[c]) - (codes - 1), 0))


@jit
def _codes(
    values: Any, rows: Any, cols: Any, exponent_bits: Any, mantissa_bits: Any, codes: Any, bases: Any, places: Any
) -> Any:
    """Values in place of elements; positions of escapes into `places`: how many, -1 where there are too many."""
    found = 0
    exponents, mantissas = U32((1 << exponent_bits) - 1), U32((1 << mantissa_bits) - 1)
    for t in range(rows):
        for c in range(cols):
            v = values[t * cols + c]
            e = U32(U32(U32(v >> U32(mantissa_bits)) & exponents) - U32(bases[c]))
            if e >= U32(codes):
                if found == places.size:
                    return -1
                places[found] = t * cols + c
                found += 1
            e = U32(e & U32(codes - 1))
            sign = U32(v >> U32(mantissa_bits + exponent_bits))
            values[t * cols + c] = U32(
                U32(v & mantissas) | U32(sign << U32(mantissa_bits)) | U32(e << U32(mantissa_bits + 1))
            )
    return found


@jit
def _pack(values: Any, rows: Any, cols: Any, shift: Any, width: Any, dst: Any) -> Any:
    if width == 16:
        halves = dst.view(np.uint16)
        for k in range(values.size):
            halves[k] = U16(U32(values[k] >> U32(shift)) & U32(0xFFFF))
        return
    part = (rows + 8 // width - 1) // (8 // width)
    mask = U32((1 << width) - 1)
    for t in range(rows):
        place = U32(t // part * width)
        out = dst[t % part * cols : t % part * cols + cols]
        row = values[t * cols : t * cols + cols]
        for c in range(cols):
            piece = U32(U32(U32(row[c] >> U32(shift)) & mask) << place)
            out[c] = U8(piece) if place == U32(0) else U8(U32(out[c]) | piece)


@jit
def _unpack(src: Any, rows: Any, cols: Any, shift: Any, width: Any, values: Any) -> Any:
    if width == 16:
        halves = src.view(np.uint16)
        for k in range(values.size):
            values[k] = U32(values[k] | U32(U32(halves[k]) << U32(shift)))
        return
    part = (rows + 8 // width - 1) // (8 // width)
    mask = U32((1 << width) - 1)
    for t in range(rows):
        place = U32(t // part * width)
        packed = src[t % part * cols : t % part * cols + cols]
        row = values[t * cols : t * cols + cols]
        for c in range(cols):
            row[c] = U32(row[c] | U32(U32(U32(U32(packed[c]) >> place) & mask) << U32(shift)))


@jit
def _little(src: Any, at: Any, width: Any) -> Any:
    value: Any = 0
    for byte in range(width):
        value += I64(src[at + byte]) << I64(8 * byte)
    return value


@jit
def _put_little(dst: Any, at: Any, width: Any, value: Any) -> Any:
    for byte in range(width):
        dst[at + byte] = U8((I64(value) >> I64(8 * byte)) & 255)


@jit
def _encode(
    src: Any,
    rows: Any,
    cols: Any,
    itemsize: Any,
    exponent_bits: Any,
    mantissa_bits: Any,
    code_bits: Any,
    dst: Any,
    values: Any,
    scratch: Any,
) -> Any:
    count, bits = rows * cols, code_bits + 1 + mantissa_bits
    spans = (count + 65535) // 65536
    head = cols + all_planes(rows, cols, bits)
    room = min((dst.size - head - 4 * spans) // (2 + itemsize), scratch.size)
    if room < 0:
        return -1
    _load(src, itemsize, values)
    _bases(values, rows, cols, exponent_bits, mantissa_bits, 1 << code_bits, dst[:cols])
    found = _codes(values, rows, cols, exponent_bits, mantissa_bits, 1 << code_bits, dst[:cols], scratch[:room])
    if found < 0:
        return -1
    at, shift = cols, 0
    for power in range(4, -1, -1):
        if bits >> power & 1:
            width = 1 << power
            size = plane_bytes(rows, cols, width)
            _pack(values, rows, cols, shift, width, dst[at : at + size])
            at, shift = at + size, shift + width
    counts = np.zeros(spans, np.int64)
    for k in range(found):
        counts[scratch[k] >> U32(16)] += 1
    for s in range(spans):
        _put_little(dst, at + 4 * s, 4, counts[s])
    at += 4 * spans
    raws = at + 2 * found
    for k in range(found):
        place = I64(scratch[k])
        _put_little(dst, at + 2 * k, 2, place & 65535)
        for byte in range(itemsize):
            dst[raws + itemsize * k + byte] = src[place * itemsize + byte]
    return raws + itemsize * found


@jit
def _decode(
    src: Any,
    rows: Any,
    cols: Any,
    itemsize: Any,
    exponent_bits: Any,
    mantissa_bits: Any,
    code_bits: Any,
    dst: Any,
    values: Any,
) -> Any:
    count, bits = rows * cols, code_bits + 1 + mantissa_bits
    spans = (count + 65535) // 65536
    head = cols + all_planes(rows, cols, bits)
    if src.size < head + 4 * spans or dst.size != itemsize * count:
        return -1
    for k in range(count):
        values[k] = 0
    at, shift = cols, 0
    for power in range(4, -1, -1):
        if bits >> power & 1:
            width = 1 << power
            size = plane_bytes(rows, cols, width)
            _unpack(src[at : at + size], rows, cols, shift, width, values)
            at, shift = at + size, shift + width
    mantissas, exponents = U32((1 << mantissa_bits) - 1), U32((1 << exponent_bits) - 1)
    for t in range(rows):
        for c in range(cols):
            v = values[t * cols + c]
            e = U32(U32(U32(v >> U32(mantissa_bits + 1)) + U32(src[c])) & exponents)
            sign = U32(U32(v >> U32(mantissa_bits)) & U32(1))
            values[t * cols + c] = U32(
                U32(v & mantissas) | U32(e << U32(mantissa_bits)) | U32(sign << U32(mantissa_bits + exponent_bits))
            )
    _store(values, itemsize, dst)
    found = 0
    for s in range(spans):
        found += _little(src, at + 4 * s, 4)
    first, raws = at + 4 * spans, at + 4 * spans + 2 * found
    if src.size != raws + itemsize * found:
        return -1
    k = 0
    for s in range(spans):
        for _ in range(_little(src, at + 4 * s, 4)):
            place = s * 65536 + _little(src, first + 2 * k, 2)
            if place >= count:
                return -1
            for byte in range(itemsize):
                dst[place * itemsize + byte] = src[raws + itemsize * k + byte]
            k += 1
    return 0


@jit
def encode(src: Any, dst: Any, jobs: Any, form: Any, results: Any) -> Any:
    """As `fast16.encode`. `form`: bytes of an element, exponent, mantissa and code bits (int64)."""
    most = 0
    for k in range(jobs.shape[0]):
        most = max(most, jobs[k, 2] * jobs[k, 3])
    values, scratch = np.empty(most, np.uint32), np.empty(most // 16 + 1, np.uint32)
    for k in range(jobs.shape[0]):
        start, length, rows, cols, target, room = jobs[k]
        results[k] = _encode(
            src[start : start + length], rows, cols, form[0], form[1], form[2], form[3], dst[target : target + room],
            values[: rows * cols], scratch,
        )  # fmt: skip


@jit
def decode(src: Any, dst: Any, jobs: Any, form: Any, results: Any) -> Any:
    """As `fast16.decode`."""
    most = 0
    for k in range(jobs.shape[0]):
        most = max(most, jobs[k, 2] * jobs[k, 3])
    values = np.empty(most, np.uint32)
    for k in range(jobs.shape[0]):
        start, length, rows, cols, target, room = jobs[k]
        results[k] = _decode(
            src[start : start + length], rows, cols, form[0], form[1], form[2], form[3], dst[target : target + room],
            values[: rows * cols],
        )  # fmt: skip
