"""The chunk table of a raw block: the same for every block of a shard, but for the checksums. Pure. docs/FORMAT.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvstore.codecs import RAW
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, HEADER_BYTES
from kvstore.layout import Chunk, chunks
from kvstore.spec import ModelSpec, Shard

WORDS = ENTRY_BYTES // 8
"""Of an entry."""


@dataclass(frozen=True, slots=True, eq=False)
class RawTable:
    """Of one shard's blocks of n chunks."""

    chunks: tuple[Chunk, ...]
    entries: NDArray[np.void]  # (n,) ENTRY_DTYPE, as a record's would be, checksums 0
    words: NDArray[np.uint64]  # (n, WORDS), the same memory
    ends: list[int]  # n + 1 offsets in the block: a chunk's begin, then the end of the last


def _fixed() -> NDArray[np.uint64]:
    """(WORDS,): the bits of an entry on the wire that are alike. Offsets are not read there."""
    row = np.zeros(1, ENTRY_DTYPE)
    for name in ENTRY_DTYPE.names or ():
        row[name] = 0 if name in ("offset", "xxh3") else np.iinfo(row[name].dtype).max
    return row.view(np.uint64)


FIXED = _fixed()


@lru_cache(maxsize=64)
def raw_table(spec: ModelSpec, shard: Shard) -> RawTable:
    """BadRequest as `Shard.check`."""
    pieces = chunks(spec, shard)
    table = np.zeros(len(pieces), ENTRY_DTYPE)
    data_start = HEADER_BYTES + len(pieces) * ENTRY_BYTES
    for row, piece in enumerate(pieces):
        table[row] = (
            piece.layer, piece.component, 0, piece.head_first, piece.head_count,
            RAW, 0, 0, data_start + piece.offset, piece.nbytes, piece.nbytes, 0,
        )  # fmt: skip
    table.flags.writeable = False
    words = table.view(np.uint64).reshape(len(pieces), WORDS)
    return RawTable(pieces, table, words, [*(piece.offset for piece in pieces), pieces[-1].offset + pieces[-1].nbytes])
