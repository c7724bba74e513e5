"""Staging: memory that one peer may write, from which its commits are copied out. Bounded apart from the arena."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import Overloaded, SetupError
from kvstore.seams import Memory, Pool, Segment


@dataclass(frozen=True, slots=True)
class StagingSegment:
    """One peer's memfd, sealed against resizing. `id` is never an arena segment's."""

    id: int
    segment: Segment
    nbytes: int


class Staging:
    """All staging segments of a store. Nothing here trusts their content."""

    FIRST_ID = 1 << 31

    def __init__(self, memory: Memory, capacity: int, name: str = "kvstore") -> None:
        self.capacity = capacity
        self.used = 0
        self._memory = memory
        self._name = name
        self._next_id = self.FIRST_ID
        self._segments: dict[int, StagingSegment] = {}

    def open(self, nbytes: int) -> StagingSegment:
        """A new segment. Mutates. Overloaded beyond the capacity; SetupError when the kernel has no memory."""
        self._take(nbytes)
        try:
            return self._keep(self._make(nbytes), nbytes)
        except SetupError:
            self.used -= nbytes
            raise

    async def open_apart(self, pool: Pool, nbytes: int) -> StagingSegment:
        """`open`, its memory faulted in by a thread: that takes long for a large one. Cancelled: nothing is kept."""
        self._take(nbytes)
        made: list[Segment] = []
        try:
            await pool.run(lambda: made.append(self._make(nbytes)))
            return self._keep(made.pop(), nbytes)
        except BaseException:
            self.used -= nbytes
            for unwanted in made:
                unwanted.close()
            raise

    def _take(self, nbytes: int) -> None:
        if nbytes <= 0 or self.used + nbytes > self.capacity:
            raise Overloaded(
                f"no {nbytes} bytes of staging: {self.used} of {self.capacity} are in use; raise staging_total_bytes"
            )
        self.used += nbytes

    def _make(self, nbytes: int) -> Segment:
        return self._memory.segment(f"{self._name}-staging", nbytes, sealed_writes=False)

    def _keep(self, segment: Segment, nbytes: int) -> StagingSegment:
        made = StagingSegment(self._next_id, segment, nbytes)
        self._next_id += 1
        self._segments[made.id] = made
        return made

    def get(self, id: int) -> StagingSegment | None:
        return self._segments.get(id)

    def close(self, id: int) -> None:
        """Its peer is gone. Mutates; idempotent."""
        found = self._segments.pop(id, None)
        if found is not None:
            self.used -= found.nbytes
            found.segment.close()

    def close_all(self) -> None:
        for id in list(self._segments):
            self.close(id)
