"""What a worker does with every block that is opened, each as one compiled call for all blocks of a shard.

Columns are named by their addresses, which whoever owns them passes.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from kvstore.kernels import jit_borrowing
from kvstore.kernels.row_parts import ROW_BYTES, check_of, segment_at
from kvstore.kernels.words import i32, i64, put_u8, put_u16, put_u32, put_u64, u8, u16, u32, u64

PRESENT, FIDELITY, ROOT, PINS, GONE, DEPTH, RAW, SAME, RECORDS, FIXED_COLUMNS = range(10)
"""Addresses of columns of residency, then for each level its segments, offsets, lengths and planes."""
BUCKETS, MASK, SPLIT, LEAST, WANTED_ROOT = range(5)
"""Numbers of one question: the key table of a shard, the least fidelity, the model."""
ABSENT, AWAY, OTHER, POOR = -1, -2, -3, -4
"""Instead of a level: not known; not where readers can map it; of another model; not good enough."""
LAST_HOLD, LAST_PIN, WAS_GONE = 1, 2, 4

RECORD_BYTES = 76


@jit_borrowing
def _seek(columns: Any, question: Any, hashed: Any, first: Any, second: Any) -> Any:
    """The row of a key in its table (`kvstore.residency.key_table`), ABSENT where it is not."""
    at = hashed & question[MASK]
    if at < question[SPLIT]:
        at = hashed & (2 * question[MASK] + 1)
    row = np.int64(i32(np.uint64(question[BUCKETS]) + np.uint64(4 * at)))
    while row >= 0:
        record = columns[RECORDS] + np.uint64(RECORD_BYTES * row)
        if u64(record) == first and u64(record + np.uint64(8)) == second:
            return row
        row = np.int64(i32(columns[SAME] + np.uint64(4 * row)))
    return np.int64(ABSENT)


@jit_borrowing
def _fill(columns: Any, level: Any, row: Any, template: Any, into: Any, raw: Any) -> Any:
    """The header of a row's copy at a level; the rest of the row as in the template but for what the caller adds."""
    for word in range(template.size):
        put_u64(into + np.uint64(8 * word), template[word])
    record = columns[RECORDS] + np.uint64(RECORD_BYTES * row)
    for word in range(4):  # key and parent
        put_u64(into + np.uint64(12 + 8 * word), u64(record + np.uint64(8 * word)))
    put_u64(into + np.uint64(60), u64(record + np.uint64(32)))
    put_u64(into + np.uint64(68), u64(record + np.uint64(40)))
    put_u32(into + np.uint64(76), u32(columns[DEPTH] + np.uint64(4 * row)))
    put_u64(into + np.uint64(112), u64(record + np.uint64(48)))
    put_u8(into + np.uint64(120), u8(record + np.uint64(74)))
    put_u16(into + np.uint64(122), u16(record + np.uint64(72)))
    put_u64(into + np.uint64(128), np.uint64(u32(columns[RAW] + np.uint64(4 * row))))
    if raw == 0:
        put_u32(into + np.uint64(124), u32(record + np.uint64(68)))
        put_u64(into + np.uint64(136), np.uint64(u32(record + np.uint64(64))))
        put_u64(into + np.uint64(152), u64(record + np.uint64(56)))


@jit_borrowing
def _width(planes: Any) -> Any:
    """Bits up to the highest one: the fidelity of a copy with those planes."""
    width = 0
    while planes:
        planes >>= 1
        width += 1
    return width


@jit_borrowing
def open_all(
    columns: Any, question: Any, levels: Any, keys: Any, hashes: Any, segments: Any, template: Any, rows: Any,
    found: Any, at_level: Any,
) -> int:  # fmt: skip
    """Find, pin and hold the blocks of one shard, and say where they lie; how many are open. Mutates `rows`, (n, 24)
    words, those of open blocks; `found`, (n,) rows of residency or ABSENT; `at_level`, (n,) levels, or why not; pins
    and holds.

    `columns`: addresses. `levels`: (k, 3), those that readers can map, the fastest first: level, tier, whether raw.
    `keys`: (n, 2) words, `hashes`: Python's of them. `segments`: (s, 5), id, offset of data, addresses of generations
    and of holds, log2 of a unit's bytes, of all that those levels may name. `template`: the row's words that all blocks
    of the shard share.
    """
    count, known = 0, 0
    for index in range(hashes.size):
        row = _seek(columns, question, hashes[index], keys[index, 0], keys[index, 1])
        found[index], at_level[index] = row, ABSENT
        if row >= 0 and np.int64(u8(columns[FIDELITY] + np.uint64(row))) < question[LEAST]:
            row = np.int64(ABSENT)
            found[index], at_level[index] = ABSENT, POOR
        if row < 0:
            continue
        at_level[index] = AWAY
        present = np.int64(u8(columns[PRESENT] + np.uint64(row)))
        for which in range(levels.shape[0]):
            level = levels[which, 0]
            base = FIXED_COLUMNS + 4 * level
            if not present >> level & 1:
                continue
            worth = _width(np.int64(u8(columns[base + 3] + np.uint64(row))))
            if worth < question[LEAST]:
                continue
            if np.int64(i32(columns[ROOT] + np.uint64(4 * row))) != question[WANTED_ROOT]:
                at_level[index] = OTHER
                break
            segment = np.int64(i32(columns[base] + np.uint64(4 * row)))
            at = segment_at(segments, known, segment)
            if at < 0:
                continue
            known = at
            offset = i64(columns[base + 1] + np.uint64(8 * row))
            unit = np.uint64(offset - segments[known, 1]) >> np.uint64(segments[known, 4])
            held, pins = np.uint64(segments[known, 3]) + np.uint64(4) * unit, columns[PINS] + np.uint64(4 * row)
            put_u32(held, u32(held) + np.uint32(1))
            put_u32(pins, u32(pins) + np.uint32(1))
            into = np.uint64(rows.ctypes.data) + np.uint64(ROW_BYTES * index)
            _fill(columns, level, row, template, into, levels[which, 2])
            put_u8(into + np.uint64(121), np.uint8(worth))
            put_u32(into + np.uint64(148), check_of(into))
            put_u64(into + np.uint64(160), np.uint64(offset))
            put_u64(into + np.uint64(168), np.uint64(u32(columns[base + 2] + np.uint64(4 * row))))
            put_u64(into + np.uint64(176), u64(np.uint64(segments[known, 2]) + np.uint64(8) * unit))
            put_u32(into + np.uint64(184), np.uint32(segment))
            put_u8(into + np.uint64(189), np.uint8(levels[which, 1]))
            put_u8(into + np.uint64(190), np.uint8(levels[which, 2]))
            at_level[index] = level
            count += 1
            break
    return count


@jit_borrowing
def close_all(columns: Any, segments: Any, rows: Any, numbers: Any, ended: Any) -> int:
    """Undo `open_all` for open blocks: `rows` (n, 24) as they were answered, `numbers` (n,) of residency. Mutates pins,
    holds and `ended`, (n,) of LAST_HOLD, LAST_PIN and WAS_GONE; all of these together."""
    known, together = 0, 0
    for index in range(numbers.size):
        row = numbers[index]
        into = np.uint64(rows.ctypes.data) + np.uint64(ROW_BYTES * index)
        known = max(0, segment_at(segments, known, np.int64(u32(into + np.uint64(184)))))
        unit = np.uint64(i64(into + np.uint64(160)) - segments[known, 1]) >> np.uint64(segments[known, 4])
        held, pins = np.uint64(segments[known, 3]) + np.uint64(4) * unit, columns[PINS] + np.uint64(4 * row)
        holds, left = u32(held) - np.uint32(1), u32(pins) - np.uint32(1)
        put_u32(held, np.uint32(holds))
        put_u32(pins, np.uint32(left))
        flags = 0
        if np.uint32(holds) == 0:
            flags |= LAST_HOLD
        if np.uint32(left) == 0:
            flags |= LAST_PIN
            if u8(columns[GONE] + np.uint64(row)):
                flags |= WAS_GONE
        ended[index] = flags
        together |= flags
    return together


_WORDS, _NUMBERS, _TABLE, _ROWS = "uint64[::1]", "int64[::1]", "int64[:, ::1]", "uint64[:, ::1]"
cast(Any, open_all).compile(
    f"int64({_WORDS}, {_NUMBERS}, {_TABLE}, {_ROWS}, {_NUMBERS}, {_TABLE}, {_WORDS}, {_ROWS}, {_NUMBERS}, {_NUMBERS})"
)
cast(Any, close_all).compile(f"int64({_WORDS}, {_TABLE}, {_ROWS}, {_NUMBERS}, {_NUMBERS})")
