"""The simulator's shared memory: a peer's mapping shows what the owner wrote, but a copy out of it takes time.

A byte mover that reads a mapping reads each byte at some moment between its start and its end, the generation table
after the data. So the mapping is a copy of its own that is brought up to date in parts: the first part of the data at
the start, the rest later, the table last. What the owner does to the memory in between shows in one part and not in
the other, as it would on a real machine.
"""

from __future__ import annotations

from kvstore.seams import Segment
from kvstore.store.arena import PAGE_BYTES
from tests.sim.loop import SimProcess


class SimSegment:
    """Shared memory that lives as long as any mapping of it."""

    fd: int | None = None

    def __init__(self, name: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.view = memoryview(bytearray(nbytes))

    def close(self) -> None:
        self.view = memoryview(b"")


class SimMemory:
    """Counts what it made, so that a scenario can bound it."""

    def __init__(self) -> None:
        self.made = 0

    def segment(self, name: str, nbytes: int, *, sealed_writes: bool) -> SimSegment:
        self.made += 1
        return SimSegment(name, nbytes)


class Mapping:
    """`MappedSegment` of a peer. Writable: the owner's very bytes (its copy out of them is one step). Else a copy that
    byte movers of `process` bring up to date."""

    def __init__(self, segment: Segment, writable: bool, process: SimProcess) -> None:
        self._theirs = segment.view[:]
        self._process = process
        self._mine: memoryview | None = None
        if writable:
            self.view = segment.view[:]
            return
        self._mine = memoryview(bytearray(self._theirs))
        self.view = self._mine.toreadonly()
        process.mappings.append(self)

    def look(self, first: float, last: float) -> None:
        """See a part of the data as it is now: from a share of it to another, in whole pages."""
        assert self._mine is not None
        data = len(self._mine) - PAGE_BYTES
        start = PAGE_BYTES + int(data * first) // PAGE_BYTES * PAGE_BYTES
        stop = len(self._mine) if last >= 1.0 else PAGE_BYTES + int(data * last) // PAGE_BYTES * PAGE_BYTES
        self._mine[start:stop] = self._theirs[start:stop]

    def look_at_table(self) -> None:
        """See the generations as they are now: they stand in the first page."""
        assert self._mine is not None
        self._mine[:PAGE_BYTES] = self._theirs[:PAGE_BYTES]

    def close(self) -> None:
        """What is being copied keeps its memory: the view stays readable for who has taken a part of it."""
        self.view = memoryview(b"")
        if self in self._process.mappings:
            self._process.mappings.remove(self)
