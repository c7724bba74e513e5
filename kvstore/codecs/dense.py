"""The dense codec of bf16: a chunk of the fast codec whose 4-bit codes are entropy-coded. docs/FORMAT.md, "dense".

A byte holds the codes of two tokens of one channel, so the coder sees pairs that belong together, and half as many
symbols as there are exponents. Both functions work on what `fast16` makes and reads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs import general
from kvstore.errors import Corrupt

LENGTH_BYTES = 4


def _codes(rows: int, columns: int) -> tuple[int, int]:
    """Where the packed codes begin and end in a fast chunk: after the bases and the signs with mantissas."""
    start = columns + rows * columns
    return start, start + (rows + 1) // 2 * columns


def codes_bytes(rows: int, columns: int) -> int:
    start, end = _codes(rows, columns)
    return end - start


def pack(chunk: NDArray[np.uint8], rows: int, columns: int) -> int:
    """Put a frame in the place of a fast chunk's codes; bytes then, -1 where it would not be smaller. Mutates `chunk`.

    The frame is read back and compared before it takes their place.
    """
    start, end = _codes(rows, columns)
    frame = general.packed(chunk[start:end])
    if frame is None or LENGTH_BYTES + len(frame) >= end - start:
        return -1
    first = start + LENGTH_BYTES
    stop = first + len(frame)
    size = stop + chunk.size - end
    chunk[stop:size] = chunk[end:]
    chunk[start:first] = np.frombuffer(len(frame).to_bytes(LENGTH_BYTES, "little"), np.uint8)
    chunk[first:stop] = np.frombuffer(frame, np.uint8)
    return size


def unpack(stored: NDArray[np.uint8], rows: int, columns: int, into: NDArray[np.uint8]) -> int:
    """The fast chunk behind stored bytes, and its length. Corrupt. Mutates `into`: room for `stored` and the codes."""
    start, end = _codes(rows, columns)
    first = start + LENGTH_BYTES
    if stored.size < first:
        raise Corrupt("a dense chunk is shorter than its planes")
    stop = first + int.from_bytes(stored[start:first].tobytes(), "little")
    if stored.size < stop:
        raise Corrupt("a dense chunk is shorter than its frame")
    size = end + stored.size - stop
    into[:start] = stored[:start]
    into[start:end] = np.frombuffer(general.unpacked(stored[first:stop].data, end - start, "plane of codes"), np.uint8)
    into[end:size] = stored[stop:]
    return size
