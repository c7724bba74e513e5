"""Staging: memory that one peer may write, from which its commits are copied out. Bounded apart from the arena."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.errors import Overloaded, SetupError
from kvstore.seams import Memory, Pool, Segment


@dataclass(frozen=True, slots=True)
class StagingSegment:
    """One peer's memfd, sealed against resizing. `id` is never an arena segment's."""

    id: int
    segment: Segment
    nbytes: int
    namespace: str = ""


class Staging:
    """All staging segments of a store. Nothing here trusts their content."""

    FIRST_ID = 1 << 31

    def __init__(
        self, memory: Memory, capacity: int, name: str = "kvstore", bound: Callable[[str], int] = lambda namespace: 0
    ) -> None:
        """`bound`: bytes of one namespace, 0: no bound of its own."""
        self.capacity = capacity
        self.used = 0
        self._bound = bound
        self._used_by: Counter[str] = Counter()
        self._memory = memory
        self._name = name
        self._next_id = self.FIRST_ID
        self._segments: dict[int, StagingSegment] = {}

    def used_by(self, namespace: str) -> int:
        """Bytes of a namespace's segments. Pure."""
        return self._used_by[namespace]

    def open(self, nbytes: int, namespace: str = "") -> StagingSegment:
        """A new segment. Mutates. Overloaded beyond the capacity; SetupError when the kernel has no memory."""
        self._take(nbytes, namespace)
        try:
            return self._keep(self._make(nbytes), nbytes, namespace)
        except SetupError:
            self._give(nbytes, namespace)
            raise

    async def open_apart(self, pool: Pool, nbytes: int, namespace: str = "") -> StagingSegment:
        """`open`, its memory faulted in by a thread: that takes long for a large one. Cancelled: nothing is kept."""
        self._take(nbytes, namespace)
        made: list[Segment] = []
        try:
            await pool.run(lambda: made.append(self._make(nbytes)))
            return self._keep(made.pop(), nbytes, namespace)
        except BaseException:
            self._give(nbytes, namespace)
            for unwanted in made:
                unwanted.close()
            raise

    def _take(self, nbytes: int, namespace: str) -> None:
        bound = self._bound(namespace)
        if bound and self._used_by[namespace] + nbytes > bound:
            raise Overloaded(f"no {nbytes} bytes of staging: over the namespace's staging_bytes, {bound}")
        if nbytes <= 0 or self.used + nbytes > self.capacity:
            raise Overloaded(
                f"no {nbytes} bytes of staging: {self.used} of {self.capacity} are in use; raise staging_total_bytes"
            )
        self.used += nbytes
        self._used_by[namespace] += nbytes

    def _give(self, nbytes: int, namespace: str) -> None:
        self.used -= nbytes
        self._used_by[namespace] -= nbytes

    def _make(self, nbytes: int) -> Segment:
        return self._memory.segment(f"{self._name}-staging", nbytes, sealed_writes=False)

    def _keep(self, segment: Segment, nbytes: int, namespace: str) -> StagingSegment:
        made = StagingSegment(self._next_id, segment, nbytes, namespace)
        self._next_id += 1
        self._segments[made.id] = made
        return made

    def get(self, id: int) -> StagingSegment | None:
        return self._segments.get(id)

    def close(self, id: int) -> None:
        """Its peer is gone. Mutates; idempotent."""
        found = self._segments.pop(id, None)
        if found is not None:
            self._give(found.nbytes, found.namespace)
            found.segment.close()

    def close_all(self) -> None:
        for id in list(self._segments):
            self.close(id)
