"""S3-FIFO: three queues instead of recency, so that what is used once does not displace what is used often.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, section 4. New blocks enter a small queue (a
tenth of the bytes); used twice there they go on to the main one, else they leave and only their identity is remembered
(ghosts); whoever comes back while remembered enters the main queue at once. The main queue gives each block another
round for every use, three at most.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from kvstore.policies.one_by_one import OneByOne
from kvstore.policies.usage import Hint, Use

ABSENT = -1
FIRST_TICK = 1 << 40  # `next` counts down from here, queues count up
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
SMALL, MAIN = 0, 1
SMALL_SHARE = 0.1
USES_MAX = 3
GHOSTS_MIN = 64


class S3Fifo(OneByOne):
    """A `kvstore.policies.base.Policy`. A row's place in its queue is its tick; entries under another tick are void."""

    def __init__(self) -> None:
        self._clock = FIRST_TICK
        self._front = FIRST_TICK
        self._tick = array("q")  # by row; ABSENT where it is not on this level
        self._queue = bytearray()  # by row: SMALL or MAIN
        self._uses = bytearray()  # by row: since it entered its queue, at most USES_MAX
        self._aside = bytearray()  # by row: 1 where `eligible` refused it and nobody said `ready` since
        self._bytes = array("q")  # by row
        self._ident = array("Q")  # by row
        self._rows = 0
        self._queue_bytes = [0, 0]
        self._line: tuple[deque[int], deque[int]] = (deque(), deque())  # tick << ROW_BITS | row, oldest first
        self._back: tuple[list[int], list[int]] = ([], [])  # heaps: who came back into question, at its old place
        self._doomed: list[int] = []  # heap: who was hinted
        self._ghosts: dict[int, None] = {}  # identities, oldest first

    def begin(self, use: Use, now_s: float, rows: Sequence[int] = ()) -> None:
        """Uses alone count."""

    def follow(self, row: int | None, above: int, now_s: float, within_s: float, coming: int = 0) -> None:
        """Uses alone count."""

    def hint(self, row: int, hint: Hint) -> None:
        """Uses alone count."""

    def admit(self, row: int, ident: int, nbytes: int, above: int = 0, depth: int = 0) -> None:
        if row >= len(self._tick):
            grown = max(64, row + 1 - len(self._tick), len(self._tick) // 8)
            self._tick.frombytes(b"\xff" * (8 * grown))
            for numbers in (self._bytes, self._ident):
                numbers.frombytes(bytes(8 * grown))
            for flags in (self._queue, self._uses, self._aside):
                flags.extend(bytes(grown))
        assert self._tick[row] == ABSENT, f"row {row} is admitted twice"
        ident &= (1 << 64) - 1
        self._rows += 1
        self._bytes[row], self._ident[row], self._uses[row] = nbytes, ident, 0
        remembered = ident in self._ghosts
        self._ghosts.pop(ident, None)
        self._enter(row, MAIN if remembered else SMALL)

    def touch(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is touched but absent"
        if self._tick[row] <= FIRST_TICK:
            self._leave_queue(row)
            self._enter(row, MAIN)  # wanted after all
        self._uses[row] = min(USES_MAX, self._uses[row] + 1)
        if self._aside[row] and self._queue[row] == SMALL and self._uses[row] >= 2:
            self._leave_queue(row)
            self._uses[row] = 0
            self._enter(row, MAIN)
            self._aside[row] = 1  # still

    def remove(self, row: int, *, evicted: bool) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is removed but absent"
        if evicted and self._queue[row] == SMALL:
            self._ghosts[self._ident[row]] = None
            while len(self._ghosts) > max(GHOSTS_MIN, self._rows):
                del self._ghosts[next(iter(self._ghosts))]
        self._leave_queue(row)
        self._tick[row] = ABSENT
        self._rows -= 1
        self._aside[row] = 0

    def ready(self, row: int) -> None:
        if row < len(self._aside) and self._aside[row]:
            self._aside[row] = 0
            if self._tick[row] <= FIRST_TICK:
                self._push(self._doomed, self._tick[row] << ROW_BITS | row)
            else:
                self._return(row)

    def _return(self, row: int) -> None:
        """Its turn came while others hung on it. It gets another round of its queue, or a prompt would go from its end
        to its beginning before others lose anything; and no more than one: its uses were theirs. Mutates."""
        self._uses[row] = 0
        self._leave_queue(row)
        self._enter(row, self._queue[row])

    def next(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is hinted but absent"
        self._front -= 1
        self._tick[row], self._aside[row], self._uses[row] = self._front, 0, 0
        self._push(self._doomed, self._front << ROW_BITS | row)

    def victim(self, eligible: Callable[[int], bool]) -> int | None:
        while self._rows:
            row = self._first(deque(), self._doomed)
            if row is None:
                row = self._by_queue()
            if row is None:
                return None
            if eligible(row):
                return row
            self._aside[row] = 1
        return None

    def _by_queue(self) -> int | None:
        """The head of the queue that is to give, after those who earned another round or a better queue have it."""
        while True:
            queue = SMALL if self._queue_bytes[SMALL] >= SMALL_SHARE * sum(self._queue_bytes) else MAIN
            row = self._first(self._line[queue], self._back[queue])
            if row is None:  # all of it is set aside
                queue = MAIN - queue
                row = self._first(self._line[queue], self._back[queue])
            if row is None:
                return None
            uses = self._uses[row]
            if (queue == SMALL and uses < 2) or (queue == MAIN and uses == 0):
                return row
            self._leave_queue(row)
            self._uses[row] = 0 if queue == SMALL else uses - 1
            self._enter(row, MAIN)

    def _first(self, line: deque[int], back: list[int]) -> int | None:
        """The oldest that is neither void nor set aside; what is void goes."""
        while line and self._void(line[0]):
            line.popleft()
        while back and self._void(back[0]):
            heappop(back)
        if line and back:
            return min(line[0], back[0]) & ROW_MASK
        entry = line[0] if line else back[0] if back else None
        return None if entry is None else entry & ROW_MASK

    def _void(self, entry: int) -> bool:
        row = entry & ROW_MASK
        return self._tick[row] != entry >> ROW_BITS or self._aside[row] == 1

    def holds(self, row: int) -> bool:
        return row < len(self._tick) and self._tick[row] != ABSENT

    def order(self, row: int) -> int:
        hinted = self._tick[row] <= FIRST_TICK
        return self._tick[row] if hinted else self._tick[row] + (self._queue[row] << 60)

    def worth(self, row: int) -> None:
        """Uses alone count."""

    def _enter(self, row: int, queue: int) -> None:
        self._clock += 1
        self._tick[row], self._queue[row], self._aside[row] = self._clock, queue, 0
        self._queue_bytes[queue] += self._bytes[row]
        line = self._line[queue]
        line.append(self._clock << ROW_BITS | row)
        if len(line) > 2 * self._rows + 1024:  # more void entries than valid ones
            kept = [entry for entry in line if not self._void(entry)]
            line.clear()
            line.extend(kept)

    def _leave_queue(self, row: int) -> None:
        queue = self._queue[row]
        self._queue_bytes[queue] -= self._bytes[row]

    def _push(self, heap: list[int], entry: int) -> None:
        heappush(heap, entry)
        if len(heap) > 2 * self._rows + 1024:
            heap[:] = [entry for entry in heap if not self._void(entry)]
            heapify(heap)
