"""One segment of the log in memory: where its records are, which live, what its index file does not say yet. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvstore.header_columns import Columns
from kvstore.tiers.aligned import ALIGNMENT
from kvstore.tiers.segment_index import PAGE_BYTES, Word

MAX_SEGMENT_BYTES = ALIGNMENT << 24


def data_name(segment: int) -> str:
    return f"{segment:08d}.data"


def index_name(segment: int) -> str:
    return f"{segment:08d}.index"


BLOAT_BYTES_MIN = 4 * PAGE_BYTES
"""So much must be won by writing an index anew: what takes its place is smaller, so that reclaim comes to an end."""


def index_reserve(limit: int) -> int:
    """Bytes set aside for the index file of an open segment."""
    return max(8 * PAGE_BYTES, limit // 16 // PAGE_BYTES * PAGE_BYTES)


@dataclass(slots=True, eq=False)
class Segment:
    """Invariants: live_bytes is the padded sum of the records marked in `live`; every offset in `pending` is live;
    offsets in `freed` are indexed, or about to be, and dead; a sealed segment takes no more records."""

    id: int
    nonce: int
    limit: int  # bytes of data it may grow to; reserved until it is sealed
    end: int = 0  # bytes of data handed out
    index_end: int = 0
    sequence: int = 0  # of the next index page
    sealed: bool = False
    stuck: bool = False  # a record of it can't be read, so it can't be reclaimed by copying
    writers: int = 0  # records being written
    live_bytes: int = 0
    blocks: int = 0
    raw_bytes: int = 0
    live: bytearray = field(default_factory=bytearray)  # per unit: 1 where a live record begins
    pending: dict[int, bytes] = field(default_factory=dict)  # offset -> index entry, written but not indexed
    words: list[Word] = field(default_factory=list)  # dictionary entries not indexed
    freed: list[int] = field(default_factory=list)  # offsets to be marked dead in the index
    described: dict[bytes, None] = field(default_factory=dict)  # digests whose dictionary entry this segment has

    @property
    def disk_bytes(self) -> int:
        """What it may take of the folder."""
        if self.sealed:
            return self.end + self.index_end
        return self.limit + max(self.index_end, index_reserve(self.limit))

    @property
    def garbage(self) -> int:
        """Bytes that reclaiming it would give back, about; of its index what is beyond the reserve, if that is much."""
        bloat = self.index_end - index_reserve(self.limit)
        return self.end - self.live_bytes + (bloat if bloat >= BLOAT_BYTES_MIN else 0)

    @property
    def live_share(self) -> float:
        whole = self.live_bytes + self.garbage
        return self.live_bytes / whole if whole else 0.0

    @property
    def dead(self) -> bool:
        """Nothing lives in it and nothing will: it may be removed."""
        return self.sealed and self.blocks == 0 and self.writers == 0

    def describe(self, digest: bytes, word: Word) -> None:
        """The index is owed a dictionary entry, unless the segment has it."""
        if digest not in self.described:
            self.described[digest] = None
            self.words.append(word)

    def is_live(self, offset: int) -> bool:
        unit = offset // ALIGNMENT
        return unit < len(self.live) and self.live[unit] == 1

    def add(self, offset: int, total: int, raw_length: int, entry: bytes) -> None:
        """A record of `total` padded bytes is there; `entry` is its line for the index."""
        unit = offset // ALIGNMENT
        if unit >= len(self.live):
            self.live.extend(bytes(unit + 1 - len(self.live)))
        self.live[unit] = 1
        self.live_bytes += total
        self.blocks += 1
        self.raw_bytes += raw_length
        self.pending[offset] = entry

    def adopt(self, offsets: Columns, nbytes: Columns, raw: Columns) -> None:
        """Records that its index names: (n,) offsets, bytes and raw bytes. Once, before any other."""
        assert not self.live
        units = (offsets // ALIGNMENT).astype(np.int64)
        flags = np.zeros(int(units.max(initial=-1)) + 1, np.uint8)
        flags[units] = 1
        self.live = bytearray(flags)
        self.live_bytes = int((-(-nbytes.astype(np.int64) // ALIGNMENT) * ALIGNMENT).sum())
        self.blocks = len(offsets)
        self.raw_bytes = int(raw.astype(np.int64).sum())

    def drop(self, offset: int, total: int, raw_length: int) -> bool:
        """The record is no longer wanted; False when it was not there. What the index says of it is mended later."""
        if not self.is_live(offset):
            return False
        self.live[offset // ALIGNMENT] = 0
        self.live_bytes -= total
        self.blocks -= 1
        self.raw_bytes -= raw_length
        if self.pending.pop(offset, None) is None:
            self.freed.append(offset)
        return True

    def validate(self) -> None:
        """AssertionError where an invariant does not hold."""
        assert self.blocks == sum(self.live), (self.id, self.blocks)
        assert 0 <= self.live_bytes <= self.end <= self.limit, (self.id, self.live_bytes, self.end, self.limit)
        assert all(self.is_live(offset) for offset in self.pending), self.id
        assert not any(self.is_live(offset) for offset in self.freed), self.id
        assert self.writers >= 0, self.id
