"""Many blocks taken into residency at once, a column at a time: what a worker finds again at its start. Pure.

The same result as `Residency.admit` of one block after the other (tests/test_residency_bulk.py compares them), at a
tenth of its cost. Only for a shard that has no blocks yet.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.header import Header
from kvstore.header_columns import Columns, Mask, as_bytes
from kvstore.residency.residency import Residency
from kvstore.residency.rows import RECORD_BYTES, Rows

Numbers = npt.NDArray[np.int64]

RECORDS = np.dtype(
    [
        ("key", "<u8", (2,)), ("parent", "<u8", (2,)), ("group", "<u8", (2,)), ("copy_id", "<u8"), ("checksum", "<u8"),
        ("stored_length", "<u4"), ("chunk_count", "<u4"), ("tokens", "<u2"), ("computed_on", "u1"), ("stored", "u1"),
    ]
)  # fmt: skip
"""A record of `Rows` as columns."""
assert RECORDS.itemsize == RECORD_BYTES


def column(numbers: array[int]) -> npt.NDArray[Any]:
    """A view; while it lives, the array can't grow."""
    return np.frombuffer(numbers, np.dtype(numbers.typecode))


def take_in(
    residency: Residency,
    namespace: str,
    headers: Columns,
    level: int,
    places: tuple[Columns, Columns, Columns],
    leaf_first: Mask,
) -> None:
    """Blocks of one namespace and shard, in the order of their use, each with its only copy at `level`. Mutates.

    `headers`: (n,) HEADERS that hold, of distinct keys; `places`: (n,) segments, offsets, lengths; `leaf_first`: (n,).
    """
    if not len(headers):
        return
    residency.reserve(len(headers))
    if not leaf_first.all():
        residency.free[namespace] = None
    space = residency.space(namespace, Header.unpack(headers[0].tobytes(), checked=True))
    assert not residency.keys(namespace, headers[0]["shard"].tobytes()), "the shard has blocks already"
    keys = as_bytes(headers["key"])
    rows = residency.rows.take_many(len(headers))
    _describe(residency.rows, rows, headers, space, leaf_first)
    residency.index(space).fill(keys, rows)
    _place(residency, rows, headers, level, places)
    _join(residency, rows, headers, level, keys, leaf_first)
    footprints = _footprints(residency, level, places[2])
    residency.held[namespace][level] += int(footprints.sum())
    admit = residency.policies[level].admit
    idents = (headers["key"][:, 0] ^ np.uint64(space)).tolist()
    aboves = np.where(headers["depth"] > 0, headers["parent"][:, 0] ^ np.uint64(space), np.uint64(0)).tolist()
    depths = headers["depth"].tolist()
    for row, ident, nbytes, above, depth in zip(
        rows.tolist(), idents, footprints.tolist(), aboves, depths, strict=True
    ):
        admit(row, ident, nbytes, above, depth)


def _describe(rows: Rows, at: Numbers, headers: Columns, space: int, leaf_first: Mask) -> None:
    records = np.frombuffer(rows.records, RECORDS)
    for name in RECORDS.names or ():
        records[name][at] = headers[name]
    column(rows.fidelity)[at] = np.minimum(headers["computed_on"], headers["stored"])
    column(rows.depth)[at] = headers["depth"]
    column(rows.raw)[at] = headers["raw_length"]
    column(rows.leaf_first)[at] = leaf_first
    column(rows.space)[at] = space
    roots = as_bytes(headers["root"])
    numbers = {root: rows.root_number(root) for root in dict.fromkeys(roots)}
    column(rows.root)[at] = np.fromiter(map(numbers.__getitem__, roots), np.int32, len(roots))


def _footprints(residency: Residency, level: int, lengths: Columns) -> Numbers:
    granule = residency.levels[level].granule
    footprints: Numbers = -(-lengths.astype(np.int64) // granule) * granule
    return footprints


def _place(
    residency: Residency, at: Numbers, headers: Columns, level: int, places: tuple[Columns, Columns, Columns]
) -> None:
    rows = residency.rows
    column(rows.present)[at] = 1 << level
    for kept, numbers in zip((rows.segment[level], rows.offset[level], rows.length[level]), places, strict=True):
        column(kept)[at] = numbers
    column(rows.planes[level])[at] = (1 << headers["stored"].astype(np.int64)) - 1
    residency.used[level] += int(_footprints(residency, level, places[2]).sum())
    residency.raw_bytes[level] += int(headers["raw_length"].astype(np.int64).sum())
    residency.blocks[level] += len(at)


def _join(residency: Residency, at: Numbers, headers: Columns, level: int, keys: list[bytes], leaf_first: Mask) -> None:
    """Links between the blocks of full-attention groups; those without their parent wait for it."""
    rows, depths = residency.rows, headers["depth"].astype(np.int64)
    known = dict(zip(keys, range(len(keys)), strict=True))
    parents = as_bytes(headers["parent"])
    positions = np.fromiter((known.get(parent, -1) for parent in parents), np.int64, len(parents))
    wanting = leaf_first & (depths > 0)
    linked = wanting & (positions >= 0)
    linked[linked] = leaf_first[positions[linked]] & (depths[positions[linked]] + 1 == depths[linked])
    _link(rows, at[linked], at[positions[linked]], level)
    for lost in np.flatnonzero(wanting & (positions < 0)).tolist():
        residency.family.wait(int(at[lost]), parents[lost])


def _link(rows: Rows, children: Numbers, parents: Numbers, level: int) -> None:
    """Siblings chained in their order; each parent has so many children at this level and below."""
    order = np.argsort(parents, kind="stable")
    children, parents = children[order], parents[order]
    column(rows.parent)[children] = parents
    siblings = parents[1:] == parents[:-1]
    column(rows.next)[children[:-1][siblings]] = children[1:][siblings]
    column(rows.prev)[children[1:][siblings]] = children[:-1][siblings]
    with_children, first, counts = np.unique(parents, return_index=True, return_counts=True)
    column(rows.child)[with_children] = children[first]
    for below in rows.below[level:]:
        column(below)[with_children] += counts.astype(np.int32)
