"""Where opened blocks lie: what `Open` answers on the local socket, 192 bytes a block. docs/PROTOCOL.md. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from kvstore.errors import Corrupt
from kvstore.header import HEADER_BYTES, short_check
from kvstore.header_columns import HEADERS, Columns

FOUND, MISSING, LATER = 1, 2, 7
"""`BlockState` of the proto."""

OPEN_ROWS = np.dtype(
    [
        ("header", HEADERS), ("offset", "<u8"), ("length", "<u8"), ("generation", "<u8"), ("segment", "<u4"),
        ("state", "u1"), ("tier", "u1"), ("raw", "u1"), ("spare", "u1"),
    ]
)  # fmt: skip
"""The fields of the proto's `OpenBlock`."""
ROW_BYTES = OPEN_ROWS.itemsize
WORDS = ROW_BYTES // 8
assert ROW_BYTES == HEADER_BYTES + 32


def absent(count: int, state: int = MISSING) -> Columns:
    """(count,) OPEN_ROWS of blocks that nothing is said of."""
    rows = np.zeros(count, OPEN_ROWS)
    rows["state"] = state
    return rows


def rows_of(packed: bytes) -> Columns:
    """(n,) OPEN_ROWS, read-only. Corrupt unless whole rows."""
    if len(packed) % ROW_BYTES:
        raise Corrupt(f"{len(packed)} bytes of rows: not a multiple of {ROW_BYTES}")
    return np.frombuffer(packed, OPEN_ROWS)


def rows_from(blocks: Iterable[Any]) -> Columns:
    """(n,) OPEN_ROWS of `OpenBlock` messages, from a worker that does not send rows. Corrupt for other headers."""
    packed = bytearray()
    for block in blocks:
        if len(block.header) not in (0, HEADER_BYTES) or block.state > 255 or block.tier > 255:
            raise Corrupt(f"an open block with a header of {len(block.header)} bytes")
        row = absent(1, block.state)
        row["offset"], row["length"], row["generation"] = block.offset, block.length, block.generation
        row["segment"], row["tier"], row["raw"] = block.segment, block.tier, block.raw
        packed += block.header.ljust(HEADER_BYTES, b"\0") + row.tobytes()[HEADER_BYTES:]
    return np.frombuffer(bytes(packed), OPEN_ROWS)


def short_checks(rows: Columns) -> Columns:
    """(n,) uint32: the short check that each row's header should have."""
    packed = memoryview(rows.tobytes())
    starts = range(0, len(packed), rows.itemsize)
    return np.array([short_check(packed[at : at + HEADER_BYTES]) for at in starts], np.uint32)
