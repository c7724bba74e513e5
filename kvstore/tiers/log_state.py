"""What the segment log holds, as far as memory knows it. Pure: synchronous, no clock, no file.

The store knows a record by the location that its write returned. Reclaim moves records; `_moved` leads from the
location given out to the present one, and only records that moved cost an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.catalog import Catalog
from kvstore.header import Header
from kvstore.tiers.aligned import ALIGNMENT, padded
from kvstore.tiers.base import Location
from kvstore.tiers.segment import Segment, index_reserve
from kvstore.tiers.segment_index import FREED_A_PAGE, PAGE_BYTES, Word, pack_entry, word_of_shard

SEGMENT_BYTES_MIN = 64 << 10
_OFFSET_BITS = 40


def plan(disk_bytes: int, segment_bytes: int) -> tuple[int, int, int]:
    """(bytes of a segment's data, of a segment with its index, of records that the log takes within `disk_bytes`).

    One segment is being filled and one kept free to reclaim into; a sixteenth of the rest is for indices and garbage,
    so that a log filled to its capacity can still be reclaimed.
    """
    wanted = max(SEGMENT_BYTES_MIN, min(segment_bytes, disk_bytes // 16)) // ALIGNMENT * ALIGNMENT
    reserve = wanted + index_reserve(wanted)
    return wanted, reserve, max(0, (disk_bytes - 2 * reserve) * 15 // 16)


@dataclass(frozen=True, slots=True)
class Owed:
    """What one commit is to write into one segment's index."""

    segment: Segment
    words: list[Word]
    entries: dict[int, bytes]
    freed: list[int]


class LogState:
    """Invariants (`validate`): the totals are the sums over the segments; what the segments may take of the folder is
    within `disk_bytes`; `_moved` and `_origin` are inverse to each other."""

    def __init__(self, catalog: Catalog, *, disk_bytes: int, segment_bytes: int) -> None:
        self.catalog = catalog
        self.disk_bytes = disk_bytes
        self.segment_bytes, self.reserve, self.capacity = plan(disk_bytes, segment_bytes)
        self.segments: dict[int, Segment] = {}
        self.open: Segment | None = None
        self.next_id = 1
        self.live_bytes = 0
        self.blocks = 0
        self.raw_bytes = 0
        self.undescribed = 0  # records added without a dictionary entry: lost at the next start
        self._moved: dict[int, int] = {}
        self._origin: dict[int, int] = {}

    # Records

    def present(self, location: Location) -> tuple[int, int]:
        """(segment, offset) where a record lies now."""
        address = _address(location.segment, location.offset)
        address = self._moved.get(address, address)
        return address >> _OFFSET_BITS, address & ((1 << _OFFSET_BITS) - 1)

    def is_live(self, location: Location) -> bool:
        number, offset = self.present(location)
        segment = self.segments.get(number)
        return segment is not None and segment.is_live(offset)

    def add(self, segment: Segment, offset: int, namespace: str, header: Header, nbytes: int) -> None:
        """The flip: the record's bytes are in the data file, from now on it is live. The index is owed its entry."""
        spec, shard = self.catalog.spec(header.root), self.catalog.shard(header.shard)
        if spec is None or shard is None:
            self.undescribed += 1
        else:
            segment.describe(header.namespace, ("namespace", namespace))
            segment.describe(header.root, ("spec", spec.canonical_json()))
            segment.describe(header.shard, word_of_shard(shard))
        segment.add(offset, padded(nbytes), header.raw_length, pack_entry(header, offset, nbytes))
        self._count(1, padded(nbytes), header.raw_length)

    def adopt(self, segment: Segment) -> None:
        """Take over a segment that recovery found."""
        self.segments[segment.id] = segment
        self._count(segment.blocks, segment.live_bytes, segment.raw_bytes)

    def free(self, header: Header, location: Location) -> bool:
        """The record is no longer wanted; False when it is not there."""
        number, offset = self.present(location)
        segment = self.segments.get(number)
        if segment is None or not segment.drop(offset, padded(location.length), header.raw_length):
            return False
        self._count(-1, -padded(location.length), -header.raw_length)
        self._moved.pop(_address(location.segment, location.offset), None)
        self._origin.pop(_address(number, offset), None)
        return True

    def move(self, victim: Segment, offset: int, segment: Segment, at: int, header: Header, nbytes: int) -> bool:
        """A live record was copied to another place, which is its own from now on. False when it is freed already, or
        nothing says what it is."""
        namespace = self.catalog.namespace(header.namespace)
        if namespace is None or not victim.drop(offset, padded(nbytes), header.raw_length):
            return False
        self._count(-1, -padded(nbytes), -header.raw_length)
        self.add(segment, at, namespace, header, nbytes)
        was, now = _address(victim.id, offset), _address(segment.id, at)
        origin = self._origin.pop(was, was)
        self._moved[origin] = now
        self._origin[now] = origin
        return True

    def _count(self, blocks: int, live_bytes: int, raw_bytes: int) -> None:
        self.blocks += blocks
        self.live_bytes += live_bytes
        self.raw_bytes += raw_bytes

    # Room

    def taken_bytes(self) -> int:
        """Of the folder; room promised to the open segment included."""
        return sum(segment.disk_bytes for segment in self.segments.values())

    def may_begin(self, total: int, spare: int, least: int = 0) -> int:
        """Data bytes of the segment that may be begun for a record of `total`, `spare` left over; 0: none.

        `least`: where a whole segment has no place, one of so many bytes will do.
        """
        for limit in (max(self.segment_bytes, total), max(least, total) if least else 0):
            if limit and self.taken_bytes() + limit + index_reserve(limit) + spare <= self.disk_bytes:
                return limit
        return 0

    def reclaims(self) -> bool:
        """Whether, once dead segments are removed, there is room for a new one, or for what lives in one with garbage:
        else nothing can be reclaimed, and only giving up blocks helps. Pure."""
        alive = [segment for segment in self.segments.values() if not segment.dead]
        room = self.disk_bytes - sum(segment.disk_bytes for segment in alive)
        sizes = [self.segment_bytes, *(segment.live_bytes for segment in alive if segment.garbage > 0)]
        return any(size + index_reserve(size) <= room for size in sizes)

    def begin(self, segment: Segment) -> None:
        self.segments[segment.id] = segment
        self.open = segment

    def place(self, total: int) -> tuple[Segment, int] | None:
        """The next `total` bytes of the open segment, counted as being written; seals it when they are not there."""
        segment = self.open
        if segment is None:
            return None
        if segment.end + total > segment.limit:
            self.seal(segment)
            return None
        offset = segment.end
        segment.end += total
        segment.writers += 1
        return segment, offset

    def seal(self, segment: Segment) -> None:
        """No more records into it."""
        segment.sealed = True
        if self.open is segment:
            self.open = None

    def victim(self, live_share_max: float = 1.0) -> Segment | None:
        """The sealed segment with the smallest share of live bytes that is worth and able to be reclaimed."""
        best: Segment | None = None
        for segment in self.segments.values():
            able = segment.sealed and not segment.stuck and segment.writers == 0 and segment.garbage > 0
            if able and (best is None or segment.live_share < best.live_share):
                best = segment
        return best if best is not None and best.live_share < live_share_max else None

    def dead(self) -> list[Segment]:
        return [segment for segment in self.segments.values() if segment.dead]

    # What the indices are owed

    def take_owed(self) -> list[Owed]:
        """All of it, for one commit; `give_back` what did not get written. Mutates."""
        owed = []
        for segment in self.segments.values():
            if (segment.pending or segment.words or segment.freed) and not segment.dead:
                owed.append(Owed(segment, segment.words, segment.pending, segment.freed))
                segment.words, segment.pending, segment.freed = [], {}, []
        return owed

    @staticmethod
    def give_back(owed: Owed, *, indexed: bool) -> None:
        segment = owed.segment
        segment.freed = owed.freed + segment.freed
        if not indexed:
            segment.words = owed.words + segment.words
            back = {offset: entry for offset, entry in owed.entries.items() if segment.is_live(offset)}
            segment.pending = back | segment.pending

    def may_mark(self, owed: Owed) -> bool:
        """Whether the folder has pages left to mark records as freed; if not, the marks wait until something is
        reclaimed, for which a segment's room stays."""
        pages = -(-len(owed.freed) // FREED_A_PAGE)
        return self.taken_bytes() + pages * PAGE_BYTES + self.reserve <= self.disk_bytes

    def marks_wait(self) -> bool:
        """Whether there are marks that no index has. Pure."""
        return any(segment.freed and not segment.dead for segment in self.segments.values())

    def validate(self) -> None:
        """AssertionError where an invariant does not hold."""
        for segment in self.segments.values():
            segment.validate()
        assert self.blocks == sum(segment.blocks for segment in self.segments.values())
        assert self.live_bytes == sum(segment.live_bytes for segment in self.segments.values())
        assert self.raw_bytes == sum(segment.raw_bytes for segment in self.segments.values())
        assert self.taken_bytes() <= self.disk_bytes, (self.taken_bytes(), self.disk_bytes)
        assert len(self._moved) == len(self._origin) <= self.blocks
        assert all(self._origin[now] == origin for origin, now in self._moved.items())


def _address(segment: int, offset: int) -> int:
    return segment << _OFFSET_BITS | offset
