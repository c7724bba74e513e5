"""Fast lossless codec of bf16, many chunks per call. The bytes: docs/FORMAT.md, "fast".

Rows are tokens, columns channels. Row loops are outer, so that the inner ones run over neighbours, few arrays each:
LLVM vectorises them then. Every sub-expression is cast: numba widens to int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit

U8, U16, U32, I64 = np.uint8, np.uint16, np.uint32, np.int64


@jit
def _bases(x: Any, rows: Any, cols: Any, bases: Any) -> Any:
    """Per column the exponent of code 0: 15 below the largest one."""
    top = np.zeros(cols, np.uint16)
    for t in range(rows):
        row = x[t * cols : t * cols + cols]
        for c in range(cols):
            top[c] = max(top[c], U16(row[c] & U16(0x7FFF)))
    for c in range(cols):
        exponent = U16(top[c] >> U16(7))
        bases[c] = U8(exponent - U16(15)) if exponent > U16(15) else U8(0)


@jit
def _pack_low(row: Any, bases: Any, sm: Any, nib: Any) -> Any:
    """A row of the first half; not 0 where an exponent lies outside its window."""
    bad = U16(0)
    for c in range(row.size):
        v = row[c]
        e = U16(U16(U16(v >> U16(7)) & U16(0xFF)) - U16(bases[c]))
        bad = U16(bad | e)
        sm[c] = U8(U16(U16(v >> U16(8)) & U16(0x80)) | U16(v & U16(0x7F)))
        nib[c] = U8(e & U16(15))
    return U16(bad & U16(0xFFF0))


@jit
def _pack_high(row: Any, bases: Any, sm: Any, nib: Any) -> Any:
    """A row of the second half, into the high nibbles."""
    bad = U16(0)
    for c in range(row.size):
        v = row[c]
        e = U16(U16(U16(v >> U16(7)) & U16(0xFF)) - U16(bases[c]))
        bad = U16(bad | e)
        sm[c] = U8(U16(U16(v >> U16(8)) & U16(0x80)) | U16(v & U16(0x7F)))
        nib[c] = U8(U16(nib[c]) | U16(U16(e & U16(15)) << U16(4)))
    return U16(bad & U16(0xFFF0))


@jit
def _list_escapes(row: Any, bases: Any, first: Any, places: Any, found: Any) -> Any:
    """Add the positions of a row's escapes; how many are known then, -1 where there are too many."""
    for start in range(0, row.size, 64):
        stop = min(start + 64, row.size)
        bad = U16(0)
        for c in range(start, stop):
            bad = U16(bad | U16(U16(U16(row[c] >> U16(7)) & U16(0xFF)) - U16(bases[c])))
        if not bad & U16(0xFFF0):
            continue
        for c in range(start, stop):
            if U16(U16(U16(row[c] >> U16(7)) & U16(0xFF)) - U16(bases[c])) > U16(15):
                if found == places.size:
                    return -1
                places[found] = first + c
                found += 1
    return found


@jit
def _encode(src: Any, rows: Any, cols: Any, dst: Any, scratch: Any) -> Any:
    """Stored bytes of one chunk; -1 where they would not fit, or where there are more escapes than `scratch` holds."""
    count, half = rows * cols, (rows + 1) // 2
    spans = (count + 65535) // 65536
    head = cols + count + half * cols
    room = min((dst.size - head - 4 * spans) // 4, scratch.size)
    if room < 0:
        return -1
    x = src.view(np.uint16)
    bases = dst[:cols]
    _bases(x, rows, cols, bases)
    places = scratch[:room]
    found = 0
    for t in range(rows):
        at = t * cols
        row = x[at : at + cols]
        sm = dst[cols + at : cols + at + cols]
        if t < half:
            bad = _pack_low(row, bases, sm, dst[cols + count + at : cols + count + at + cols])
        else:
            under = cols + count + at - half * cols
            bad = _pack_high(row, bases, sm, dst[under : under + cols])
        if bad:
            found = _list_escapes(row, bases, at, places, found)
            if found < 0:
                return -1
    return _write_escapes(x, places[:found], dst, head, spans)


@jit
def _write_escapes(x: Any, places: Any, dst: Any, start: Any, spans: Any) -> Any:
    counts = np.zeros(spans, np.uint32)
    for k in range(places.size):
        counts[places[k] >> U32(16)] += U32(1)
    for s in range(spans):
        for byte in range(4):
            dst[start + 4 * s + byte] = U8((counts[s] >> U32(8 * byte)) & U32(255))
    at = start + 4 * spans
    raws = at + 2 * places.size
    for k in range(places.size):
        place, value = places[k], x[places[k]]
        dst[at + 2 * k], dst[at + 2 * k + 1] = U8(place & U32(255)), U8((place >> U32(8)) & U32(255))
        dst[raws + 2 * k], dst[raws + 2 * k + 1] = U8(value & U16(255)), U8(value >> U16(8))
    return raws + 2 * places.size


@jit
def _unpack_low(row: Any, bases: Any, sm: Any, nib: Any) -> Any:
    for c in range(row.size):
        p, e = U16(sm[c]), U16(U16(bases[c]) + U16(nib[c] & U8(15)))
        row[c] = U16(U16(U16(p & U16(0x80)) << U16(8)) | U16(p & U16(0x7F)) | U16(e << U16(7)))


@jit
def _unpack_high(row: Any, bases: Any, sm: Any, nib: Any) -> Any:
    for c in range(row.size):
        p, e = U16(sm[c]), U16(U16(bases[c]) + U16(nib[c] >> U8(4)))
        row[c] = U16(U16(U16(p & U16(0x80)) << U16(8)) | U16(p & U16(0x7F)) | U16(e << U16(7)))


@jit
def _decode(src: Any, rows: Any, cols: Any, dst: Any) -> Any:
    """0, or -1 where the bytes are no such chunk; nothing outside `dst` is written."""
    count, half = rows * cols, (rows + 1) // 2
    spans = (count + 65535) // 65536
    head = cols + count + half * cols
    if src.size < head + 4 * spans or dst.size != 2 * count:
        return -1
    x = dst.view(np.uint16)
    bases = src[:cols]
    for t in range(rows):
        at = t * cols
        row, sm = x[at : at + cols], src[cols + at : cols + at + cols]
        if t < half:
            _unpack_low(row, bases, sm, src[cols + count + at : cols + count + at + cols])
        else:
            under = cols + count + at - half * cols
            _unpack_high(row, bases, sm, src[under : under + cols])
    return _patch(src, head, spans, x)


@jit
def _patch(src: Any, start: Any, spans: Any, x: Any) -> Any:
    """Put the escapes in their places."""
    total: Any = 0
    for s in range(spans):
        for byte in range(4):
            total += I64(src[start + 4 * s + byte]) << I64(8 * byte)
    at = start + 4 * spans
    raws = at + 2 * total
    if src.size != raws + 2 * total:
        return -1
    k = 0
    for s in range(spans):
        listed: Any = 0
        for byte in range(4):
            listed += I64(src[start + 4 * s + byte]) << I64(8 * byte)
        for _ in range(listed):
            place = s * 65536 + I64(src[at + 2 * k]) + (I64(src[at + 2 * k + 1]) << I64(8))
            if place >= x.size:
                return -1
            x[place] = U16(U16(src[raws + 2 * k]) | U16(U16(src[raws + 2 * k + 1]) << U16(8)))
            k += 1
    return 0


@jit
def encode(src: Any, dst: Any, jobs: Any, results: Any) -> Any:
    """Chunks of one buffer into another. `jobs`, a row each (int64): source, its length, rows, columns, target, length.

    `results[i]`: stored bytes, -1 where they would not fit into the target's length. Mutates `dst` and `results`.
    """
    most = 0
    for k in range(jobs.shape[0]):
        most = max(most, jobs[k, 1])
    scratch = np.empty(most // 32 + 1, np.uint32)  # beyond one escape in 16 nothing is gained
    for k in range(jobs.shape[0]):
        start, length, rows, cols, target, room = jobs[k]
        results[k] = _encode(src[start : start + length], rows, cols, dst[target : target + room], scratch)


@jit
def decode(src: Any, dst: Any, jobs: Any, results: Any) -> Any:
    """Inverse of `encode`, the same jobs with source and target exchanged. `results[i]`: 0, -1 for no such chunk."""
    for k in range(jobs.shape[0]):
        start, length, rows, cols, target, room = jobs[k]
        results[k] = _decode(src[start : start + length], rows, cols, dst[target : target + room])
