"""What a log folder holds after an earlier process: its index files read, what does not hold skipped and counted.

Blocking: runs in the pool. Also what `inspect` of a folder shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.errors import Corrupt, DataError
from kvstore.header import Header
from kvstore.seams import Disk
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.tiers.aligned import ALIGNMENT, padded
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
    scan_pages,
    words_of,
)

COUNTERS = ("damaged_pages", "lost_records", "undescribed_records", "damaged_segments", "orphans")


@dataclass(frozen=True, slots=True)
class Found:
    """A record that an index names; its data is verified when it is read."""

    segment: int
    offset: int
    nbytes: int
    header: Header
    namespace: str


@dataclass(slots=True)
class FoundSegment:
    """One segment with its records in the order they were indexed, without those freed."""

    segment: Segment
    records: list[Found] = field(default_factory=list)
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
    found = FoundSegment(state)
    records: dict[int, Found] = {}
    for page in pages:
        _learn(found, records, page, data_bytes, counters)
        state.sequence = page.sequence + 1
    found.records = list(records.values())
    _add(counters, "damaged_pages", scan.damaged)
    for record in found.records:
        state.add(record.offset, padded(record.nbytes), record.header.raw_length, None)
    for digest in [spec.root for spec in found.specs] + [shard.digest for shard in found.shards]:
        state.described[digest] = None
    for name in found.namespaces:
        state.described[namespace_digest(name)] = None
    return found


def _learn(
    found: FoundSegment, records: dict[int, Found], page: Page, data_bytes: int, counters: dict[str, int]
) -> None:
    """Take one page in: dictionary entries, records, or offsets freed."""
    try:
        if page.kind == WORDS:
            for word in words_of(page):
                if isinstance(word, str):
                    found.namespaces.append(word)
                elif isinstance(word, ModelSpec):
                    found.specs.append(word)
                else:
                    found.shards.append(word)
        elif page.kind == FREED:
            for offset in freed_of(page):
                records.pop(offset, None)
    except Corrupt:
        _add(counters, "damaged_pages", 1)
        return
    if page.kind != BLOCKS:
        return
    names = {namespace_digest(name): name for name in found.namespaces}
    roots = {spec.root for spec in found.specs}
    shards = {shard.digest for shard in found.shards}
    segment, unpack = found.segment.id, Header.unpack
    for packed, offset, nbytes in entries_of(page):
        try:
            header = unpack(packed, checked=True)  # the page's checksum holds
        except DataError:
            _add(counters, "lost_records", 1)
            continue
        if header.namespace not in names or header.root not in roots or header.shard not in shards:
            _add(counters, "undescribed_records", 1)
        elif offset % ALIGNMENT or nbytes != header.stored_length or offset + nbytes > data_bytes:
            _add(counters, "lost_records", 1)
        else:
            records[offset] = Found(segment, offset, nbytes, header, names[header.namespace])


def _add(counters: dict[str, int], name: str, amount: int) -> None:
    counters[name] = counters.get(name, 0) + amount
