"""What compiled loops over the rows of `Open` share. A row is one of `kvstore.open_rows`, 24 words.

The short check is the low half of XXH3-64 (Collet, the xxHash specification, "XXH3", inputs of 129 to 240 bytes).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit_borrowing
from kvstore.kernels.copysum import PRIME64, SECRET, _folded
from kvstore.kernels.words import u64

CHECKED_BYTES, ROW_BYTES = 148, 192
_ROUNDS = [*((16 * at, 16 * at) for at in range(8)), (128, 3), (CHECKED_BYTES - 16, 136 - 17)]
_AT = np.array([at for at, _ in _ROUNDS], np.uint64)
_KEYS = np.array(
    [[int.from_bytes(SECRET[at + half : at + half + 8].tobytes(), "little") for half in (0, 8)] for _, at in _ROUNDS],
    np.uint64,
)


@jit_borrowing
def _avalanche(number: Any) -> Any:
    number ^= number >> np.uint64(37)
    number *= np.uint64(0x165667919E3779F9)
    return number ^ number >> np.uint64(32)


@jit_borrowing
def check_of(header: Any) -> Any:
    """The short check of the header at an address."""
    total = np.uint64(CHECKED_BYTES) * np.uint64(PRIME64[0])
    for step in range(10):
        if step == 8:
            total = _avalanche(total)
        at = header + _AT[step]
        total += _folded(u64(at) ^ _KEYS[step, 0], u64(at + np.uint64(8)) ^ _KEYS[step, 1])
    return np.uint32(_avalanche(total) & np.uint64(0xFFFFFFFF))


@jit_borrowing
def segment_at(segments: Any, known: Any, id: Any) -> Any:
    """Where a segment stands in the table, from the one looked at before on; -1 where it does not."""
    for step in range(segments.shape[0]):
        at = known + step
        if at >= segments.shape[0]:
            at -= segments.shape[0]
        if segments[at, 0] == id:
            return at
    return -1
