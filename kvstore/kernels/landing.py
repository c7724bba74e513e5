"""What a client does with every block that a worker of its host has opened: one compiled call for all of a shard.

Addresses are plain integers; the caller keeps what lies there alive and in bounds.
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
def land(
    rows: Any, keys: Any, template: Any, fixed: Any, bounds: Any, segments: Any, parts: Any, sources: Any,
    outcomes: Any,
) -> None:  # fmt: skip
    """Check the rows of open blocks, copy what they name to where it is wanted, look at the generations afterwards.
    Mutates memory at the parts' addresses; `outcomes`, (n,); `sources`, (n, 2) for its own use.

    `rows`: (n, 24) words from the worker; `keys`: (n, 2), those asked for. `template`, `fixed`: (24,) what each row
    must be, its length too, and in which bits. `bounds`: the least fidelity, the highest one and the highest tier.
    `segments`: (s, 5) as they are mapped here: id, address, bytes, offset of data, log2 of a unit's bytes. `parts`:
    (p, 4): block, offset in it, bytes, address.
    """
    known, total = np.int64(0), np.uint64(0)
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
                    total += length
        outcomes[index] = outcome
    past_caches = total >= np.uint64(STREAM_BYTES)
    for part in range(parts.shape[0]):
        block = np.int64(parts[part, 0])
        if outcomes[block] == ARRIVED:
            source = sources[block, 0] + parts[part, 1]
            if past_caches:
                _stream(parts[part, 3], source, parts[part, 2])
            else:
                _memcpy(parts[part, 3], source, parts[part, 2])
    fence()
    for index in range(outcomes.size):
        if outcomes[index] == ARRIVED:
            row = np.uint64(rows.ctypes.data) + np.uint64(ROW_BYTES * index)
            if u64(sources[index, 1]) != u64(row + np.uint64(176)):
                outcomes[index] = REUSED


_WORDS, _NUMBERS, _ROWS = "uint64[::1]", "int64[::1]", "uint64[:, ::1]"
cast(Any, land).compile(
    f"void({_ROWS}, {_ROWS}, {_WORDS}, {_WORDS}, {_NUMBERS}, {_ROWS}, {_ROWS}, {_ROWS}, {_NUMBERS})"
)
