"""What a log folder holds after an earlier process: its index files read, what does not hold skipped and counted.

Blocking: runs in the pool. Also what `inspect` of a folder shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvstore.errors import Corrupt
from kvstore.header_columns import Columns, Mask, equal, hold
from kvstore.seams import Disk
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.tiers.aligned import ALIGNMENT, padded
from kvstore.tiers.found import FoundRecords
from kvstore.tiers.segment import MAX_SEGMENT_BYTES, Segment, data_name, index_name
from kvstore.tiers.segment_index import (
    BLOCKS,
    FREED,
    OPEN,
    WORDS,
    Page,
    Scan,
    entries_of,
    freed_of,
    limit_of,
    lines_of,
    scan_pages,
    words_of,
)

COUNTERS = ("damaged_pages", "lost_records", "undescribed_records", "damaged_segments", "orphans")


@dataclass(slots=True)
class FoundSegment:
    """One segment with its records in the order they were indexed, without those freed."""

    segment: Segment
    records: FoundRecords
    specs: list[ModelSpec] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)


@dataclass(slots=True)
class FoundLog:
    segments: list[FoundSegment] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    last_id: int = 0


def scan_log(disk: Disk, *, clean: bool) -> FoundLog:
    """All segments of the folder, oldest first. With `clean`, removes files of ours that belong to no segment.

    OSError when the folder can't be read at all; UnknownFormat for a log of a later version.
    """
    log = FoundLog()
    names = dict.fromkeys(disk.names())
    ids = sorted({segment for name in names if (segment := segment_of(name)) is not None})
    log.last_id = ids[-1] if ids else 0
    for segment in ids:
        found = None
        if data_name(segment) in names and index_name(segment) in names:
            found = scan_segment(disk, segment, log.counters)
        if found is not None:
            log.segments.append(found)
            continue
        _add(log.counters, "orphans", 1)
        if clean:  # the index first: without it the data is an orphan for ever
            for name in (index_name(segment), data_name(segment)):
                if name in names:
                    disk.remove(name)
    return log


def segment_of(name: str) -> int | None:
    """The segment a file name belongs to, None for a file that is not the log's."""
    stem, _, suffix = name.partition(".")
    if suffix in ("data", "index") and len(stem) >= 8 and stem.isascii() and stem.isdigit():
        return int(stem)
    return None


def read_whole(disk: Disk, name: str) -> bytes:
    """A file's content through the port's vectored read."""
    file = disk.open(name)
    try:
        content = bytearray(file.size())
        got = file.pread_into(0, memoryview(content))
        return bytes(memoryview(content)[:got])
    finally:
        file.close()


def scan_segment(disk: Disk, segment: int, counters: dict[str, int]) -> FoundSegment | None:
    """One segment; None, counted, when its first index page does not hold. Mutates `counters` (of any keys)."""
    content, scan = read_whole(disk, index_name(segment)), Scan()
    file = disk.open(data_name(segment))
    try:
        data_bytes = file.size()
    finally:
        file.close()
    pages = scan_pages(content, segment, scan)
    first = next(pages, None)
    if first is None or first.kind != OPEN or not 0 < limit_of(first) <= MAX_SEGMENT_BYTES:
        _add(counters, "damaged_segments", 1)
        return None
    end = padded(data_bytes)
    limit = max(end, limit_of(first))
    state = Segment(segment, first.nonce, limit, end=end, index_end=padded(len(content)), sealed=True)
    dictionary, lines = _Dictionary(), _Lines()
    for page in pages:
        if page.kind == WORDS:
            try:
                dictionary.learn(page, len(lines))
            except Corrupt:
                _add(counters, "damaged_pages", 1)
        else:
            lines.take(page)
        state.sequence = page.sequence + 1
    _add(counters, "damaged_pages", scan.damaged)
    entries = lines.live(dictionary, data_bytes, counters)
    state.adopt(entries["offset"], entries["nbytes"], entries["header"]["raw_length"])
    for digest in dictionary.since:
        state.described[digest] = None
    records = FoundRecords(segment, entries, dictionary.names)
    return FoundSegment(state, records, dictionary.specs, dictionary.shards, list(dictionary.names.values()))


class _Dictionary:
    """What a segment's WORDS pages say, and from which entry on each of it holds."""

    def __init__(self) -> None:
        self.specs: list[ModelSpec] = []
        self.shards: list[Shard] = []
        self.names: dict[bytes, str] = {}  # by digest
        self.since: dict[bytes, int] = {}  # digest -> entries before its first word

    def learn(self, page: Page, entries: int) -> None:
        """Corrupt for a page whose words are none. Mutates."""
        for word in words_of(page):
            if isinstance(word, str):
                digest = namespace_digest(word)
                self.names[digest] = word
            elif isinstance(word, ModelSpec):
                digest = word.root
                self.specs.append(word)
            else:
                digest = word.digest
                self.shards.append(word)
            self.since.setdefault(digest, entries)

    def described(self, headers: Columns) -> Mask:
        """Which headers' namespace, root and shard were all named before them."""
        known = np.ones(len(headers), np.bool_)
        shards, roots = [shard.digest for shard in self.shards], [spec.root for spec in self.specs]
        for name, digests in (("namespace", list(self.names)), ("root", roots), ("shard", shards)):
            one = np.zeros(len(headers), np.bool_)
            for digest in digests:
                since = self.since[digest]
                one[since:] |= equal(headers[name][since:], digest)
            known &= one
        return known


class _Lines:
    """What BLOCKS and FREED pages say, in their order."""

    def __init__(self) -> None:
        self._blocks: list[Page] = []
        self._events: list[tuple[int, int, list[int]]] = []  # entries start..stop are there, or these offsets freed
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def take(self, page: Page) -> None:
        """Mutates."""
        if page.kind == FREED:
            self._events.append((0, 0, freed_of(page)))
        elif page.kind == BLOCKS:
            start = self._count
            if self._events and not self._events[-1][2]:
                start = self._events.pop()[0]
            self._blocks.append(page)
            self._count += lines_of(page)
            self._events.append((start, self._count, []))

    def live(self, dictionary: _Dictionary, data_bytes: int, counters: dict[str, int]) -> Columns:
        """The entries that hold and were not freed after. Mutates `counters`."""
        entries = entries_of(self._blocks)
        headers, offsets, nbytes = entries["header"], entries["offset"], entries["nbytes"]
        valid = hold(headers)
        known = valid & dictionary.described(headers)
        inside = (offsets <= data_bytes) & (nbytes <= data_bytes) & (offsets + nbytes <= data_bytes)
        good = known & inside & (offsets % ALIGNMENT == 0) & (nbytes == headers["stored_length"])
        _add(counters, "undescribed_records", int(np.count_nonzero(valid & ~known)))
        _add(counters, "lost_records", int(np.count_nonzero(~valid) + np.count_nonzero(known & ~good)))
        last: dict[int, int] = {}
        for start, stop, freed in self._events:
            mine = start + np.flatnonzero(good[start:stop])
            last.update(zip(offsets[mine].tolist(), mine.tolist(), strict=True))
            for offset in freed:
                last.pop(offset, None)
        return entries[list(last.values())]


def _add(counters: dict[str, int], name: str, amount: int) -> None:
    counters[name] = counters.get(name, 0) + amount
