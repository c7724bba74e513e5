"""Shared memory for blocks: segments of one namespace each, slots of any size in them, generations that betray reuse.

A segment is `data_offset` bytes of generation table (one u64 LE per `UNIT_BYTES` of data), then data. A slot's
generation is that of the unit it begins in; freeing a slot adds one to it before the space is handed out again, so a
reader that looks before and after knows whether the bytes were the block's all along. Capacity counts data bytes.
Synchronous: called on the event loop of the store only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import SetupError
from kvstore.seams import Memory, Segment
from kvstore.store.extents import Extents

UNIT_BYTES = 64 << 10
PAGE_BYTES = 4096  # slots begin at pages: direct I/O reads into them
SEGMENT_SHIFT = 40  # an address is segment << SEGMENT_SHIFT | offset
SPARE_BLOCKS = 4  # a spare that takes fewer blocks than this would waste too much
SYNC_BYTES = 4 << 20
"""A segment up to this size is made where it is needed; a larger one is asked for, since faulting it in takes long."""
GENERATION_MASK = (1 << 64) - 1


def table_bytes(data_bytes: int) -> int:
    """Bytes of the generation table before `data_bytes` of data, a whole number of pages."""
    return _pages(-(-data_bytes // UNIT_BYTES) * 8)


def generation_at(view: memoryview, data_offset: int, offset: int) -> int:
    """Generation of the unit that `offset` (from the segment's start) lies in, read from a segment's mapping."""
    at = (offset - data_offset) // UNIT_BYTES * 8
    return int.from_bytes(view[at : at + 8], "little")


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Slot:
    """Space of one block. `offset` from the segment's start; `length` as asked for, the space is whole pages."""

    segment: int
    offset: int
    length: int
    generation: int


class ArenaSegment:
    """One memfd of one namespace."""

    __slots__ = ("data_bytes", "data_offset", "generations", "held", "id", "live", "namespace", "peers", "segment")

    def __init__(self, id: int, namespace: str, segment: Segment, data_bytes: int) -> None:
        self.id = id
        self.namespace = namespace
        self.segment = segment
        self.data_bytes = data_bytes
        self.data_offset = table_bytes(data_bytes)
        self.generations = segment.view[: self.data_offset].cast("Q")
        self.held = array("I", bytes(4 * -(-data_bytes // UNIT_BYTES)))  # by unit: holds on slots that begin there
        self.live = 0  # bytes of slots, limbo included
        self.peers = 0  # connections that have it mapped

    def unit(self, offset: int) -> int:
        return (offset - self.data_offset) // UNIT_BYTES

    def places(self) -> tuple[int, int, int, int, int]:
        """What compiled loops need of it: id, offset of data, addresses of generations and of holds, log2 of a unit."""
        generations = np.frombuffer(self.generations, np.uint64).ctypes.data
        return self.id, self.data_offset, generations, self.held.buffer_info()[0], UNIT_BYTES.bit_length() - 1

    def close(self) -> None:
        self.generations.release()
        self.segment.close()


class Arena:
    """At most `capacity` bytes of data in segments. Each collection says its invariant.

    `name` goes into the segments' names, for people looking at /proc.
    """

    def __init__(self, memory: Memory, capacity: int, segment_bytes: int, name: str = "kvstore") -> None:
        if capacity < UNIT_BYTES:
            raise SetupError(f"an arena of {capacity} bytes holds nothing: give host_bytes at least {UNIT_BYTES}")
        self.capacity = capacity
        self.segment_bytes = max(UNIT_BYTES, min(segment_bytes, capacity // 8) // UNIT_BYTES * UNIT_BYTES)
        self._segment_max = segment_bytes
        self.reserved = 0  # data bytes of all segments, the spare one included; never above capacity
        self.used = 0  # bytes of live slots in whole pages, limbo included
        self.asked = 0  # data bytes of a segment that an allocation waits for, to be made elsewhere
        self.memory_refusals = 0  # times the kernel had no memory for a segment
        self.no_memory = False  # it had none lately: nothing is asked for
        self._memory = memory
        self._name = name
        self._next_id = 1
        self._segments: dict[int, ArenaSegment] = {}  # every one that may hold slots
        self._spare: tuple[Segment, int] | None = None  # faulted in, nobody's yet; with its data bytes
        self._spare_asked = False  # made for an allocation that waits
        self._free: dict[str, Extents] = {}  # by namespace: every byte of its segments in no live slot
        self._live: dict[int, int] = {}  # address -> bytes in whole pages; disjoint
        self._table: npt.NDArray[np.int64] | None = None  # `places` of all segments, until one comes or goes
        self._limbo: dict[tuple[int, int], list[Slot]] = {}  # freed, waiting for the holds of their unit

    # ---- slots

    def allocate(self, namespace: str, nbytes: int) -> Slot | None:
        """Space for a block, None where there is none now. Mutates; may make, drop, or ask for a segment."""
        need = _pages(max(1, nbytes))
        free = self._free.get(namespace)
        address = free.take(need) if free is not None else None
        if address is None:
            if not self._grow(namespace, need):
                return None
            address = self._free[namespace].take(need)
            assert address is not None, "a fresh segment has no room for what it was made for"
        segment = self._segments[address >> SEGMENT_SHIFT]
        offset = address - (segment.id << SEGMENT_SHIFT)
        self._live[address] = need
        segment.live += need
        self.used += need
        return Slot(segment.id, offset, nbytes, segment.generations[segment.unit(offset)])

    def allocate_all(self, namespace: str, nbytes: int, count: int) -> list[tuple[int, int]]:
        """`allocate` of so many alike, (segment, offset) each, side by side if they can, until there is no space."""
        need, found, free = _pages(max(1, nbytes)), list[tuple[int, int]](), self._free.get(namespace)
        first = free.take(need * count) if free is not None and count > 1 else None
        if first is None:
            while len(found) < count and (slot := self.allocate(namespace, nbytes)) is not None:
                found.append((slot.segment, slot.offset))
            return found
        addresses, segment = range(first, first + need * count, need), self._segments[first >> SEGMENT_SHIFT]
        self._live.update(dict.fromkeys(addresses, need))
        segment.live += need * count
        self.used += need * count
        return [(segment.id, address - (segment.id << SEGMENT_SHIFT)) for address in addresses]

    def free(self, slot: Slot) -> None:
        """Give a slot back; while a reader holds its unit the space waits. AssertionError for one that is not live."""
        assert slot.segment << SEGMENT_SHIFT | slot.offset in self._live, f"{slot} is freed twice"
        found = self._segments[slot.segment]
        place = (slot.segment, found.unit(slot.offset))
        if found.held[place[1]]:
            waiting = self._limbo.setdefault(place, [])
            assert all(other.offset != slot.offset for other in waiting), f"{slot} is freed twice"
            waiting.append(slot)
        else:
            self._reclaim(slot)

    def hold(self, slot: Slot) -> int:
        """Keep the slot's bytes as they are until `release`, freed or not. Counted. Mutates.

        Returns the generation a reader must find: a small neighbour that was freed since may have changed the slot's.
        """
        return self.hold_at(slot.segment, slot.offset)

    def hold_at(self, segment: int, offset: int) -> int:
        """`hold` of the slot that begins there."""
        found = self._segments[segment]
        unit = found.unit(offset)
        found.held[unit] += 1
        return found.generations[unit]

    def release(self, slot: Slot) -> None:
        """Undo one `hold`."""
        self.release_at(slot.segment, slot.offset)

    def release_at(self, segment: int, offset: int) -> None:
        """Undo one `hold_at`."""
        found = self._segments[segment]
        unit = found.unit(offset)
        assert found.held[unit], f"segment {segment} is released at {offset} more often than held"
        found.held[unit] -= 1
        if not found.held[unit]:
            self.let_go(segment, unit)

    def let_go(self, segment: int, unit: int) -> None:
        """The last hold of a unit has ended: what waited for that is free. Mutates."""
        for waiting in self._limbo.pop((segment, unit), ()):
            self._reclaim(waiting)

    @property
    def waits(self) -> bool:
        """Whether a freed slot waits for its readers."""
        return bool(self._limbo)

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes, writable."""
        return self._segments[slot.segment].segment.view[slot.offset : slot.offset + slot.length]

    def _reclaim(self, slot: Slot) -> None:
        """Bump the generation, then let the space be found."""
        address = slot.segment << SEGMENT_SHIFT | slot.offset
        segment = self._segments[slot.segment]
        nbytes = self._live.pop(address)
        unit = segment.unit(slot.offset)
        segment.generations[unit] = (segment.generations[unit] + 1) & GENERATION_MASK
        segment.live -= nbytes
        self.used -= nbytes
        self._free[segment.namespace].add(address, nbytes)

    # ---- segments

    def segment(self, id: int) -> ArenaSegment:
        """KeyError for one that is gone."""
        return self._segments[id]

    def table(self) -> npt.NDArray[np.int64]:
        """(s, 5): `ArenaSegment.places` of all segments, in the order of `segments`."""
        if self._table is None:
            rows = [segment.places() for segment in self._segments.values()]
            self._table = np.array(rows, np.int64).reshape(-1, 5)
        return self._table

    def segments(self) -> Iterator[ArenaSegment]:
        yield from self._segments.values()

    def fits(self, namespace: str, nbytes: int) -> bool:
        """Whether `allocate` would find room now (unless the kernel has none). Pure."""
        need = _pages(max(1, nbytes))
        free = self._free.get(namespace)
        if free is not None and free.largest >= need:
            return True
        if self._spare_takes(need):
            return True
        size = self._size(need, self._reservable())
        return need <= size <= SYNC_BYTES

    def _spare_takes(self, need: int) -> bool:
        """Whether the spare is good for blocks of `need`: several of them, or it was asked for such a block. Pure."""
        if self._spare is None:
            return False
        return self._spare[1] >= need * (1 if self._spare_asked else SPARE_BLOCKS)

    def _reservable(self) -> int:
        """Bytes that may be reserved once the spare and all empty segments are dropped. Pure."""
        empty = sum(s.data_bytes for s in self._segments.values() if not s.live and not s.peers)
        return self.capacity - self.reserved + empty + (self._spare[1] if self._spare is not None else 0)

    def _size(self, need: int, room: int) -> int:
        """Data bytes of a segment made for blocks of `need` where `room` may be reserved. Pure.

        Several blocks to a segment, or the rest of each would be lost; and another namespace still finds its own.
        """
        wanted = max(self.segment_bytes, min(8 * need, self.capacity // 2, self._segment_max), need)
        return min(wanted, room) // need * need

    def lightest(self) -> int | None:
        """The segment in use with the least bytes live: the cheapest to empty for another namespace or size. Pure."""
        found = min((s for s in self._segments.values() if s.live), key=lambda s: (s.live, s.id), default=None)
        return None if found is None else found.id

    def share(self, id: int) -> None:
        """A peer has mapped the segment: it is not dropped before `unshare`, its bytes stay counted."""
        self._segments[id].peers += 1

    def unshare(self, id: int) -> None:
        """A peer that had it mapped is gone. Nothing where the arena is closed already."""
        segment = self._segments.get(id)
        if segment is None:
            return
        assert segment.peers > 0, f"segment {id} is unmapped more often than mapped"
        segment.peers -= 1

    def spare_wanted(self) -> int:
        """Data bytes of a segment to make now: one that was asked for, or one ahead of need; 0 for none. Pure."""
        if self.no_memory or self.asked:
            return self.asked
        ahead = self._spare is None and self.capacity - self.reserved >= self.segment_bytes > SYNC_BYTES
        return self.segment_bytes if ahead else 0

    def make(self, data_bytes: int) -> Segment:
        """A segment's memory, faulted in; runs anywhere, changes nothing here. SetupError when there is none."""
        name = f"{self._name}-arena"
        return self._memory.segment(name, table_bytes(data_bytes) + data_bytes, sealed_writes=True)

    def keep_spare(self, segment: Segment, data_bytes: int) -> None:
        """Take in what `make(spare_wanted())` made; closed when there is no place for it any more. Mutates."""
        asked, self.asked = self.asked > 0, 0
        if asked or self.capacity - self.reserved < data_bytes:
            self._drop_spare()
        if self.capacity - self.reserved < data_bytes or self._spare is not None:
            segment.close()
            return
        self._spare, self._spare_asked = (segment, data_bytes), asked
        self.reserved += data_bytes

    def refused(self) -> None:
        """The kernel had no memory for a segment: `heartbeat` allows the next try. Mutates."""
        self.asked, self.no_memory = 0, True
        self.memory_refusals += 1

    def heartbeat(self) -> None:
        """Ask the kernel again. Mutates."""
        self.no_memory = False

    def _grow(self, namespace: str, need: int) -> bool:
        """A segment for `namespace` with `need` bytes free at its start, if the capacity allows; or it is asked for."""
        if self._spare is not None and self._spare_takes(need):
            segment, data_bytes = self._spare
            self._spare = None
            self._adopt(namespace, segment, data_bytes)
            return True
        if self._size(need, self._reservable()) < need:
            return False
        if self._spare is not None or self.capacity - self.reserved < need:
            self._drop_empty(need)
        data_bytes = self._size(need, self.capacity - self.reserved)
        if data_bytes > SYNC_BYTES:
            self.asked = 0 if self.no_memory else max(self.asked, data_bytes)
            return False
        try:
            segment = self.make(data_bytes)
        except SetupError:
            self.memory_refusals += 1
            return False
        self.reserved += data_bytes
        self._adopt(namespace, segment, data_bytes)
        return True

    def _adopt(self, namespace: str, segment: Segment, data_bytes: int) -> None:
        made = ArenaSegment(self._next_id, namespace, segment, data_bytes)
        self._next_id += 1
        self._segments[made.id], self._table = made, None
        free = self._free.setdefault(namespace, Extents())
        free.add(made.id << SEGMENT_SHIFT | made.data_offset, data_bytes)

    def _drop_empty(self, need: int) -> None:
        """Drop empty segments until `need` bytes may be reserved: space changes hands as a new memfd only."""
        self._drop_spare()
        for empty in [s for s in self._segments.values() if not s.live and not s.peers]:
            if self.capacity - self.reserved >= need:
                return
            self._drop(empty)

    def _drop_spare(self) -> None:
        if self._spare is not None:
            segment, data_bytes = self._spare
            self._spare = None
            segment.close()
            self.reserved -= data_bytes

    def _drop(self, empty: ArenaSegment) -> None:
        free = self._free[empty.namespace]
        free.remove(empty.id << SEGMENT_SHIFT | empty.data_offset, empty.data_bytes)
        if not free.free and not any(s.namespace == empty.namespace for s in self._segments.values() if s is not empty):
            del self._free[empty.namespace]
        del self._segments[empty.id]
        self._table = None
        empty.close()
        self.reserved -= empty.data_bytes

    # ---- whole

    @property
    def limbo_bytes(self) -> int:
        """Bytes of freed slots that a reader still holds."""
        return sum(
            self._live[slot.segment << SEGMENT_SHIFT | slot.offset] for slots in self._limbo.values() for slot in slots
        )

    def validate(self) -> None:
        """AssertionError unless live slots and free ranges tile every segment exactly and every sum agrees."""
        by_segment: dict[int, list[tuple[int, int]]] = {id: [] for id in self._segments}
        for free in self._free.values():
            free.validate()
            for address, nbytes in free.ranges():
                by_segment[address >> SEGMENT_SHIFT].append((address, nbytes))
        for address, nbytes in self._live.items():
            by_segment[address >> SEGMENT_SHIFT].append((address, nbytes))
        for id, ranges in by_segment.items():
            segment = self._segments[id]
            at = id << SEGMENT_SHIFT | segment.data_offset
            for address, nbytes in sorted(ranges):
                assert address == at, f"segment {id}: a gap or an overlap at {address - (id << SEGMENT_SHIFT)}"
                at += nbytes
            assert at == (id << SEGMENT_SHIFT | segment.data_offset) + segment.data_bytes, f"segment {id} is not tiled"
        assert self.used == sum(self._live.values()) == sum(s.live for s in self._segments.values()), "used is off"
        kept = sum(s.data_bytes for s in self._segments.values())
        assert self.reserved == kept + (self._spare[1] if self._spare else 0) <= self.capacity, "reserved is off"
        assert all(self._segments[id].held[unit] for id, unit in self._limbo), "a freed slot waits for nobody"

    def close(self) -> None:
        """Let go of all memory. Slots, holds and views must not be used any more."""
        for segment in self._segments.values():
            segment.close()
        if self._spare is not None:
            self._spare[0].close()
        for collection in (self._segments, self._free, self._live, self._limbo):
            collection.clear()
        self._table = None
        self._spare, self.used, self.reserved = None, 0, 0
