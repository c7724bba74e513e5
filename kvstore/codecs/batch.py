"""The chunks of a block, encoded and decoded together: one kernel call for all that share a codec.

Kernels are imported where first needed (numba, over half a second): who meets no such chunk does not pay. Where numba
is missing the same loops run in torch. Everything here may run in worker threads: it touches nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs import dense, general
from kvstore.codecs.registry import (
    BY_FORM_ID,
    DENSE,
    FAST,
    FORM_IDS,
    INT4,
    INT8,
    NESTED,
    QUANTISED,
    RAW,
    SPLIT,
    codec_for,
    fallbacks,
)
from kvstore.errors import Corrupt, UnknownFormat
from kvstore.layout import Chunk, V
from kvstore.types import Buffer

Bytes = NDArray[np.uint8]
Jobs = NDArray[np.int64]

BY_COLUMN, BY_ROW = 0, 1
"""Variants of the quantising codecs: where the scales stand."""

_VARIANT_BITS = 4
OTHERS = ("float16",)  # its loops are those of all other element types

NESTED_BYTES = 512 * 1024
"""Raw bytes the nested codec takes at a time: what lies between a block and its planes, twice as much, stays in a
core's cache, and is not mapped anew for each block (where malloc does that, 2 MiB at a time take 1.6 times as long).
"""


class Plane(NamedTuple):
    """One entry of the chunk table in the making."""

    codec: int
    params: int
    data: Buffer


class Coded(NamedTuple):
    """A stored chunk: its codec and parameters, and where its leading planes lie in a buffer (start, length)."""

    chunk: Chunk
    codec: int
    params: int
    planes: tuple[tuple[int, int], ...]


class Backend(Protocol):
    """The loops, as numba or torch has them. `jobs` as in `kvstore.kernels.fast16`; results as there."""

    def fast_encode(self, form: int, src: Bytes, dst: Bytes, jobs: Jobs) -> Jobs: ...
    def fast_decode(self, form: int, src: Bytes, dst: Bytes, jobs: Jobs) -> Jobs: ...
    def quant_encode(self, bits: int, src: Bytes, dst: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs: ...
    def quant_decode(
        self, bits: int, src: Bytes, dst: Bytes, jobs: Jobs, by_row: Bytes, factor: float, shift: float
    ) -> Jobs: ...
    def nested_encode(self, src: Bytes, dst: Bytes, rest: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs: ...
    def nested_decode(self, src: Bytes, dst: Bytes, rest: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs: ...


@cache
def backend() -> Backend:
    """numba's, or torch's where numba is not installed. UnknownFormat where neither is."""
    if find_spec("numba") is not None:
        from kvstore.codecs.by_numba import Numba

        return Numba()
    if find_spec("torch") is not None:
        from kvstore.codecs.by_torch import Torch

        return Torch()
    raise UnknownFormat("this chunk's codec needs numba or torch: install one of them")


def ready(names: Iterable[str]) -> None:
    """Compile, or load, what blocks of these configured names need, whatever their elements are, and what is fallen
    back to: a compiler at work holds up all the rest."""
    zeros, names = bytes(2 * 64 * 64), list(names)
    wanted = {(codec_for(name, dtype), dtype) for name in names for dtype in (QUANTISED, *OTHERS)}
    wanted |= {(back, dtype) for codec, dtype in wanted for back in fallbacks(codec, dtype)}
    for codec, dtype in sorted(wanted, reverse=True):  # those by numba first: the split one looks whether it is there
        piece = Chunk(0, V, 0, 1, 0, len(zeros), (64, 1, 64), 2, dtype)
        [planes] = encode(memoryview(zeros), [piece], [codec])
        data, spans = b"", []
        for plane in planes:
            spans.append((len(data), len(plane.data)))
            data += plane.data
        coded = Coded(piece, planes[0].codec, planes[0].params, tuple(spans))
        decode(memoryview(data), [coded], memoryview(bytearray(len(zeros))))


# ---- sizes


def quant_bytes(bits: int, rows: int, columns: int, by_row: bool) -> int:
    """Stored length of an int8 or int4 chunk, and of plane 0 of a nested one (4)."""
    total = 0
    for first in range(0, rows, 64):
        n = min(64, rows - first)
        if bits == 8:
            total += 2 * (n if by_row else columns) + n * columns
        else:
            total += 4 * (n * -(-columns // 64) if by_row else columns) + (n + 1) // 2 * columns
    return total


def low_bytes(rows: int, columns: int) -> int:
    """Stored length of plane 1 of a nested chunk."""
    return sum((min(64, rows - first) + 1) // 2 * columns for first in range(0, rows, 64))


# ---- encoding


def encode(
    raw: memoryview, pieces: Sequence[Chunk], wanted: Sequence[int], use: Backend | None = None
) -> list[list[Plane]]:
    """Planes of each chunk of a block's raw bytes, by the codec wanted for it or the first of its fallbacks that gains.

    Buffers may be views of `raw`. Pure.
    """
    made: list[list[Plane]] = [[] for _ in pieces]
    open_: dict[int, tuple[int, ...]] = {
        index: (codec, *fallbacks(codec, piece.dtype))
        for index, (codec, piece) in enumerate(zip(wanted, pieces, strict=True))
    }
    out: Bytes | None = None
    while open_:
        turn: dict[tuple[int, str], list[int]] = {}
        for index, left in open_.items():
            turn.setdefault((left[0] if left else RAW, pieces[index].dtype), []).append(index)
        for (codec, dtype), mine in turn.items():
            group = [pieces[index] for index in mine]
            if codec in general.GENERAL:
                found = [_general(codec, raw, piece) for piece in group]
            else:
                out = np.empty(len(raw), np.uint8) if out is None else out
                found = _by_kernel(codec, dtype, raw, out, group, use or backend())
            for index, planes in zip(mine, found, strict=True):
                if planes:
                    made[index] = planes
                    del open_[index]
                else:
                    open_[index] = open_[index][1:]
    return made


def _general(codec: int, raw: memoryview, piece: Chunk) -> list[Plane]:
    data = raw[piece.offset : piece.offset + piece.nbytes]
    used, stored = general.encode(codec, data, piece.itemsize)
    if used != codec:
        return []
    return [Plane(codec, piece.itemsize if codec == SPLIT else 0, stored)]


def _by_kernel(
    codec: int, dtype: str, raw: memoryview, out: Bytes, group: list[Chunk], use: Backend
) -> list[list[Plane]]:
    """Empty where a chunk is not taken."""
    if (dtype not in FORM_IDS) if codec == FAST else dtype != QUANTISED:
        return [[] for _ in group]
    if codec in (FAST, DENSE):
        return _fast(codec, dtype, raw, out, group, use)
    return _nested(raw, out, group, use) if codec == NESTED else _quant(codec, raw, out, group, use)


def _fast(codec: int, dtype: str, raw: memoryview, out: Bytes, group: list[Chunk], use: Backend) -> list[list[Plane]]:
    form = FORM_IDS[dtype]
    jobs = np.array([(p.offset, p.nbytes, p.rows, p.columns, p.offset, p.nbytes - 1) for p in group], np.int64)
    sizes = use.fast_encode(form, _source(raw), out, jobs).tolist()
    if codec == DENSE:
        sizes = [
            size if size < 0 else dense.pack(out[p.offset : p.offset + size], p.rows, p.columns)
            for p, size in zip(group, sizes, strict=True)
        ]
    return [_one(codec, form, piece, out, size) for piece, size in zip(group, sizes, strict=True)]


def _quant(codec: int, raw: memoryview, out: Bytes, group: list[Chunk], use: Backend) -> list[list[Plane]]:
    by_row = _by_row(group)
    jobs = np.array([(p.offset, p.nbytes, p.rows, p.columns, p.offset, p.nbytes - 1) for p in group], np.int64)
    sizes = use.quant_encode(8 if codec == INT8 else 4, _source(raw), out, jobs, by_row).tolist()
    variants = by_row.tolist()
    return [_one(codec, v, piece, out, size) for v, piece, size in zip(variants, group, sizes, strict=True)]


def _one(codec: int, variant: int, piece: Chunk, out: Bytes, size: int) -> list[Plane]:
    if size < 0:
        return []
    return [Plane(codec, piece.rows << _VARIANT_BITS | variant, out[piece.offset : piece.offset + size].data)]


def _nested(raw: memoryview, out: Bytes, group: list[Chunk], use: Backend) -> list[list[Plane]]:
    made: list[list[Plane]] = []
    for span in _spans([piece.nbytes for piece in group]):
        made += _nested_few(raw, out, group[span], use)
    return made


def _spans(sizes: list[int]) -> list[slice]:
    """Neighbours of at most `NESTED_BYTES` together; one at least."""
    spans, first, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > NESTED_BYTES:
            spans.append(slice(first, index))
            first, total = index, 0
        total += size
    return [*spans, slice(first, len(sizes))]


def _nested_few(raw: memoryview, out: Bytes, group: list[Chunk], use: Backend) -> list[list[Plane]]:
    by_row = _by_row(group)
    fits, jobs, total = [], [], 0
    for piece, variant in zip(group, by_row.tolist(), strict=True):
        first, second = quant_bytes(4, piece.rows, piece.columns, bool(variant)), low_bytes(piece.rows, piece.columns)
        fits.append(first + second < piece.nbytes)
        at = piece.offset
        jobs.append((at, piece.nbytes, piece.rows, piece.columns, at, first, at + first, second, total))
        total += piece.nbytes
    if not all(fits):
        return [[] if not fit else _nested_few(raw, out, [p], use)[0] for fit, p in zip(fits, group, strict=True)]
    table, rest, back = np.array(jobs, np.int64), np.empty(total, np.uint8), np.empty(total, np.uint8)
    source = _source(raw)
    taken = use.nested_encode(source, out, rest, table, by_row)
    packed: list[bytes] = []
    for piece, job, done in zip(group, jobs, taken.tolist(), strict=True):
        mine = rest[job[8] : job[8] + piece.nbytes].data
        packed.append(general.encode_split(mine, 2, check=False) if done == 0 else b"")
        if done == 0:
            general.decode_split(memoryview(packed[-1]), mine, 2)  # from here on `rest` is what a reader gets
    again = np.stack([table[:, i] for i in (4, 5, 2, 3, 8, 1, 6, 7, 8)], 1)
    use.nested_decode(_source(out.data), back, rest, again, by_row)
    made: list[list[Plane]] = []
    for piece, variant, job, plane2 in zip(group, by_row.tolist(), jobs, packed, strict=True):
        first, room, second, more, place = job[4:]
        raw_bytes = source[piece.offset : piece.offset + piece.nbytes]
        exact = bool(plane2) and np.array_equal(back[place : place + piece.nbytes], raw_bytes)  # before it is trusted
        params = piece.rows << _VARIANT_BITS | variant
        if not exact or room + more + len(plane2) >= piece.nbytes:
            made.append([])
            continue
        parts: tuple[Buffer, ...] = (out[first : first + room].data, out[second : second + more].data, plane2)
        made.append([Plane(NESTED, params, part) for part in parts])
    return made


def _by_row(group: list[Chunk]) -> Bytes:
    return np.array([BY_ROW if piece.component == V else BY_COLUMN for piece in group], np.uint8)


def _source(view: Buffer) -> Bytes:
    """Read-only, whatever it is: kernels are compiled once for that."""
    found = np.frombuffer(view, np.uint8)
    found.flags.writeable = False
    return found


# ---- decoding


def decode(src: memoryview, coded: Iterable[Coded], target: memoryview, use: Backend | None = None) -> None:
    """Fill the chunks' places in `target` from the planes that are there. Mutates `target`.

    Corrupt where the bytes are no such chunk, UnknownFormat for an unknown codec. What is then in `target` is anything.
    """
    by_kernel: dict[tuple[int, int, int], list[Coded]] = {}
    for item in coded:
        if item.codec in general.GENERAL:
            (start, length), chunk = item.planes[0], item.chunk
            place = target[chunk.offset : chunk.offset + chunk.nbytes]
            general.decode(item.codec, src[start : start + length], place, item.params)
        else:
            form = item.params & 15 if item.codec in (FAST, DENSE) else 0
            by_kernel.setdefault((item.codec, form, len(item.planes)), []).append(item)
    for (codec, form, planes), mine in by_kernel.items():
        _decode_group(codec, form, planes, src, mine, target, use)


def _decode_group(
    codec: int, form: int, planes: int, src: memoryview, mine: list[Coded], target: memoryview, use: Backend | None
) -> None:
    known = {FAST: form in BY_FORM_ID, DENSE: form == FORM_IDS[QUANTISED], INT8: True, INT4: True, NESTED: True}
    if not known.get(codec):
        raise UnknownFormat(f"chunk codec {codec} with form {form} is unknown to this build")
    use, source, into = use or backend(), _source(src), np.frombuffer(target, np.uint8)
    jobs = np.array([_job(item, BY_FORM_ID[form][0] if form else 2) for item in mine], np.int64)
    by_row = np.array([item.params & 1 for item in mine], np.uint8)
    if codec in (FAST, DENSE):
        source = source if codec == FAST else _unpacked(source, jobs)
        results = use.fast_decode(form, source, into, jobs)
    elif codec != NESTED or planes == 1:
        factor, shift = (16.0, 7.5) if codec == NESTED else (1.0, 0.0)
        results = use.quant_decode(8 if codec == INT8 else 4, source, into, jobs, by_row, factor, shift)
    else:
        results = _decode_nested(source, into, jobs, mine, by_row, use)
    if results.any():
        raise Corrupt(f"a chunk of codec {codec} does not decode")


def _job(item: Coded, itemsize: int) -> tuple[int, int, int, int, int, int]:
    rows, chunk = item.params >> _VARIANT_BITS, item.chunk
    count = chunk.nbytes // itemsize
    by_form = item.codec in (FAST, DENSE)
    if rows < 1 or count % rows or chunk.nbytes % itemsize or (not by_form and item.params & 14):
        raise Corrupt(f"a chunk of {chunk.nbytes} bytes has no {rows} rows")
    (start, length) = item.planes[0]
    return start, length, rows, count // rows, chunk.offset, chunk.nbytes


def _unpacked(source: Bytes, jobs: Jobs) -> Bytes:
    """The fast chunks behind dense ones; the jobs then read from here. Mutates `jobs`."""
    room = [length + dense.codes_bytes(rows, columns) for _, length, rows, columns, _, _ in jobs.tolist()]
    made, at = np.empty(sum(room), np.uint8), 0
    for job, nbytes in zip(jobs, room, strict=True):
        start, length, rows, columns, _, _ = job.tolist()
        size = dense.unpack(source[start : start + length], rows, columns, made[at : at + nbytes])
        job[:2] = at, size
        at += nbytes
    made.flags.writeable = False
    return made


def _decode_nested(source: Bytes, into: Bytes, jobs: Jobs, mine: list[Coded], by_row: Bytes, use: Backend) -> Jobs:
    done = np.empty(len(mine), np.int64)
    for span in _spans(jobs[:, 5].tolist()):
        done[span] = _decode_few(source, into, jobs[span], mine[span], by_row[span], use)
    return done


def _decode_few(source: Bytes, into: Bytes, jobs: Jobs, mine: list[Coded], by_row: Bytes, use: Backend) -> Jobs:
    more = np.array([(*item.planes[1], 0) for item in mine], np.int64)
    rest = np.empty(0, np.uint8)
    if len(mine[0].planes) == 3:
        rest = np.empty(int(jobs[:, 5].sum()), np.uint8)
        at = 0
        for index, item in enumerate(mine):
            (start, length), nbytes = item.planes[2], item.chunk.nbytes
            general.decode_split(source[start : start + length].data, rest[at : at + nbytes].data, 2)
            more[index, 2] = at
            at += nbytes
    return use.nested_decode(source, into, rest, np.concatenate([jobs, more], 1), by_row)
