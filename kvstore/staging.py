"""Staging: memory that one peer may write, from which its commits are copied out. Bounded apart from the arena."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import Overloaded
from kvstore.seams import Memory, Segment


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
        if nbytes <= 0 or self.used + nbytes > self.capacity:
            raise Overloaded(
                f"no {nbytes} bytes of staging: {self.used} of {self.capacity} are in use; raise staging_total_bytes"
            )
        segment = self._memory.segment(f"{self._name}-staging", nbytes, sealed_writes=False)
        made = StagingSegment(self._next_id, segment, nbytes)
        self._next_id += 1
        self._segments[made.id] = made
        self.used += nbytes
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
