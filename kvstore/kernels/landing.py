"""What a client does with every block that a worker of its host has opened: compiled calls for all of a shard.

`check` first, then `copy` of every range of bytes, by whoever has time and in any order, then `reused`. Addresses are
plain integers; the caller keeps what lies there alive and in bounds.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from kvstore.kernels import jit_borrowing
from kvstore.kernels.lines import fence
from kvstore.kernels.moves import STREAM_BYTES, _memcpy, _stream
from kvstore.kernels.row_parts import ROW_BYTES, check_of, segment_at
from kvstore.kernels.words import u8, u32, u64

ARRIVED, MISSING, LATER, UNMAPPED, STRANGE, ENCODED, REUSED = range(7)
"""How a block ended. STRANGE: its row is not one of a raw block as asked for."""
_FOUND, _LATER = 1, 7


@jit_borrowing
def _examined(row: Any, keys: Any, index: Any, template: Any, fixed: Any, bounds: Any) -> Any:
    """Whether a row is one of a raw block as asked for: ARRIVED, or what it is instead."""
    state = u8(row + np.uint64(188))
    if state != _FOUND:
        return LATER if state == _LATER else MISSING
    if u8(row + np.uint64(190)) == 0:
        return ENCODED
    for word in range(template.size):
        if (u64(row + np.uint64(8 * word)) ^ template[word]) & fixed[word]:
            return STRANGE
    if u64(row + np.uint64(12)) != keys[index, 0] or u64(row + np.uint64(20)) != keys[index, 1]:
        return STRANGE
    computed, stored = np.int64(u8(row + np.uint64(120))), np.int64(u8(row + np.uint64(121)))
    tier = np.int64(u8(row + np.uint64(189)))
    if min(computed, stored) < bounds[0] or max(computed, stored) > bounds[1] or tier < 1 or tier > bounds[2]:
        return STRANGE
    if u32(row + np.uint64(148)) != check_of(row):
        return STRANGE
    return ARRIVED


@jit_borrowing
def check(
    rows: Any, keys: Any, template: Any, fixed: Any, bounds: Any, segments: Any, sources: Any, outcomes: Any
) -> None:  # fmt: skip
    """Check the rows of open blocks, find where they are mapped. Mutates `outcomes`, (n,); `sources`, (n, 2) for the
    use of the other calls: the addresses of a block's bytes and of its generation.

    `rows`: (n, 24) words from the worker; `keys`: (n, 2), those asked for. `template`, `fixed`: (24,) what each row
    must be, its length too, and in which bits. `bounds`: the least fidelity, the highest one and the highest tier.
    `segments`: (s, 5) as they are mapped here: id, address, bytes, offset of data, log2 of a unit's bytes.
    """
    known = np.int64(0)
    for index in range(outcomes.size):
        row = np.uint64(rows.ctypes.data) + np.uint64(ROW_BYTES * index)
        outcome = _examined(row, keys, index, template, fixed, bounds)
        if outcome == ARRIVED:
            at = segment_at(segments, known, np.uint64(u32(row + np.uint64(184))))
            offset, length = u64(row + np.uint64(160)), u64(row + np.uint64(168))
            if at < 0:
                outcome = UNMAPPED
            else:
                known = at
                size, data = segments[at, 2], segments[at, 3]
                if length > size or offset < data or offset > size - length:
                    outcome = UNMAPPED
                else:
                    sources[index, 0] = segments[at, 1] + offset
                    sources[index, 1] = segments[at, 1] + ((offset - data) >> segments[at, 4]) * np.uint64(8)
        outcomes[index] = outcome


@jit_borrowing
def copy(parts: Any, ends: Any, sources: Any, outcomes: Any, first: Any, last: Any) -> None:
    """Copy bytes `first` to `last` of all parts, laid end to end, where their block has ARRIVED. Mutates memory at the
    parts' addresses. Ranges that do not overlap may be copied at the same time.

    `parts`: (p, 4): block, offset in it, bytes, address; `ends`: (p,) where each part ends among all bytes.
    """
    past_caches = ends[ends.size - 1] >= STREAM_BYTES
    part = np.searchsorted(ends, first, side="right")
    at = first
    while at < last:
        begin, end = ends[part] - np.int64(parts[part, 2]), min(last, ends[part])
        block, skipped = np.int64(parts[part, 0]), np.uint64(at - begin)
        if outcomes[block] == ARRIVED:
            target, source = parts[part, 3] + skipped, sources[block, 0] + parts[part, 1] + skipped
            if past_caches:
                _stream(target, source, np.uint64(end - at))
            else:
                _memcpy(target, source, np.uint64(end - at))
        at = end
        part += 1
    fence()


@jit_borrowing
def reused(rows: Any, sources: Any, outcomes: Any) -> None:
    """After the copies: blocks whose generation is another one now are REUSED. Mutates `outcomes`."""
    for index in range(outcomes.size):
        if outcomes[index] == ARRIVED:
            row = np.uint64(rows.ctypes.data) + np.uint64(ROW_BYTES * index)
            if u64(sources[index, 1]) != u64(row + np.uint64(176)):
                outcomes[index] = REUSED


_WORDS, _NUMBERS, _ROWS = "uint64[::1]", "int64[::1]", "uint64[:, ::1]"
cast(Any, check).compile(f"void({_ROWS}, {_ROWS}, {_WORDS}, {_WORDS}, {_NUMBERS}, {_ROWS}, {_ROWS}, {_NUMBERS})")
cast(Any, copy).compile(f"void({_ROWS}, {_NUMBERS}, {_ROWS}, {_NUMBERS}, int64, int64)")
cast(Any, reused).compile(f"void({_ROWS}, {_ROWS}, {_NUMBERS})")
