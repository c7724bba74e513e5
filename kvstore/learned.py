"""The `default` policy: who is least likely to be used again soon leaves first, as `kvstore.learning` has learned.

One level's order over the shared learning. Like `Lru` it sorts the lowest share of its rows at a time (a run), so that
a victim costs O(1) amortised; between two runs the order is that of the last one, and what was used leaves it.
Admission is the same decision: who was just admitted and has the least to offer is the next to leave (bypass).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np

from kvstore.learning import Learning
from kvstore.usage import Hint, Use

RUN_ROWS_MIN = 32
RUN_SHARE = 64  # of the rows in a run
FRESH_ROWS_MAX = 64  # looked at one request late, or when there are more
GROWTH_ROWS_MIN = 64
ABSENT = -1
ROW_BITS = 32


class Learned:
    """A `kvstore.policy.Policy`."""

    def __init__(self, learning: Learning) -> None:
        self.learning = learning
        self._place = array("i")  # by row: where in `_rows`; ABSENT where it is not on this level
        self._rows = array("i")  # on this level, in no order
        self._aside = bytearray()  # by row: 1 where `eligible` refused it and nobody said `ready` since
        self._in_run = bytearray()  # by row: 1 while its key is that of the last run, within its reach
        self._used = array("q")  # by row: the number of the request that touched it last
        self._front = 0  # `next` counts down from here
        self._doomed: dict[int, int] = {}  # row -> its place before all others
        self._run: list[int] = []  # rows, the next to leave last
        self._run_keys: list[int] = []
        self._back: list[tuple[int, int]] = []  # heap of (key, row): who came back into question
        self._set_aside = 0
        self._fresh = array("i")  # came or were used since the last run or the last look; maybe gone, maybe twice
        self._reach = -1  # of the run: rows with lesser keys than this belong in front of its end
        self._seen = 0  # requests at the last look

    # ---- what happens

    def begin(self, use: Use, now_s: float, rows: Sequence[int] = ()) -> None:
        """Mutates the shared learning: once for all levels."""
        self.learning.begin(use, now_s)
        for row in rows:
            self.touch(row)

    def follow(self, row: int | None, above: int, now_s: float, within_s: float) -> None:
        """Mutates the shared learning: once for all levels."""
        self.learning.follow(row, above, now_s, within_s)

    def admit(self, row: int, ident: int, nbytes: int, above: int = 0, depth: int = 0) -> None:
        place = self._place
        if row >= len(place):
            grown = max(GROWTH_ROWS_MIN, row + 1 - len(place), len(place) // 8)
            place.frombytes(b"\xff" * (place.itemsize * grown))
            self._aside.extend(bytes(grown))
            self._in_run.extend(bytes(grown))
            self._used.frombytes(bytes(self._used.itemsize * grown))
        assert place[row] == ABSENT, f"row {row} is admitted twice"
        place[row] = len(self._rows)
        self._used[row] = 0
        self._rows.append(row)
        self._in_run[row] = 0
        self._fresh.append(row)
        self.learning.admit(row, ident, above, depth)

    def touch(self, row: int) -> None:
        assert self._place[row] != ABSENT, f"row {row} is touched but absent"
        if self._used[row] == self.learning.requests:
            return  # by this request already
        self._used[row] = self.learning.requests
        self.learning.touch(row)
        self._in_run[row] = 0
        self._fresh.append(row)
        if self._doomed:
            self._doomed.pop(row, None)

    def remove(self, row: int, *, evicted: bool) -> None:
        at = self._place[row]
        assert at != ABSENT, f"row {row} is removed but absent"
        last = self._rows.pop()
        if last != row:
            self._rows[at] = last
            self._place[last] = at
        self._place[row] = ABSENT
        self._in_run[row] = 0
        if self._aside[row]:
            self._aside[row] = 0
            self._set_aside -= 1
        if self._doomed:
            self._doomed.pop(row, None)
        self.learning.leave(row)

    def ready(self, row: int) -> None:
        if row < len(self._aside) and self._aside[row]:
            self._aside[row] = 0
            self._set_aside -= 1
            if self._in_run[row]:  # else it was used since, or is not among the lowest
                heappush(self._back, (self.learning.key(row), row))

    def next(self, row: int) -> None:
        assert self._place[row] != ABSENT, f"row {row} is hinted but absent"
        self._front -= 1
        self._doomed[row] = self._front
        if self._aside[row]:
            self._aside[row] = 0
            self._set_aside -= 1

    def hint(self, row: int, hint: Hint) -> None:
        assert self._place[row] != ABSENT, f"row {row} is hinted but absent"
        self.learning.tell(row, hint)
        for gone in self._run:  # the order is another one now
            self._in_run[gone] = 0
        self._run.clear()
        self._run_keys.clear()
        self._back.clear()

    # ---- what is asked

    def victim(self, eligible: Callable[[int], bool]) -> int | None:
        if self._doomed:
            for row in reversed(self._doomed):  # the last hinted first
                if not self._aside[row]:
                    if eligible(row):
                        return row
                    self._put_aside(row)
        if self._run and (len(self._fresh) > FRESH_ROWS_MAX or self._seen != self.learning.requests):
            self._look()
        while len(self._rows) > self._set_aside:
            row = self._first()
            if row == ABSENT:
                self._sort()
            elif eligible(row):
                return row
            else:
                self._put_aside(row)
        return None

    def holds(self, row: int) -> bool:
        return row < len(self._place) and self._place[row] != ABSENT

    def order(self, row: int) -> int:
        hinted = self._doomed.get(row)
        if hinted is not None:
            return hinted
        self.learning.settle()
        return self.learning.key(row) << ROW_BITS | row

    def _put_aside(self, row: int) -> None:
        self._aside[row] = 1
        self._set_aside += 1

    def _first(self) -> int:
        """The head of the run or of what came back, whichever is less; ABSENT where both are used up. Mutates."""
        run, in_run, aside = self._run, self._in_run, self._aside
        while run and (not in_run[run[-1]] or aside[run[-1]]):
            run.pop()
            self._run_keys.pop()
        back = self._back
        while back and (not in_run[back[0][1]] or aside[back[0][1]]):
            heappop(back)
        if back and (not run or back[0] < (self._run_keys[-1], run[-1])):
            return back[0][1]
        return run[-1] if run else ABSENT

    def _look(self) -> None:
        """Who came or was used and yet belongs before the end of the run joins it. Mutates."""
        rows = np.unique(np.frombuffer(self._fresh, np.int32))
        self.learning.settle()
        keys = self.learning.written(rows)
        for row, key in zip(rows[keys < self._reach].tolist(), keys[keys < self._reach].tolist(), strict=True):
            if self._place[row] != ABSENT and not self._in_run[row]:
                self._in_run[row] = 1
                heappush(self._back, (key, row))
        self._fresh, self._seen = array("i"), self.learning.requests

    def _sort(self) -> None:
        """A new run: the lowest of the rows that are in question. There is one. Mutates."""
        rows = np.frombuffer(self._rows, np.int32).copy()
        keys = self.learning.keys(rows)
        waits = np.frombuffer(self._aside, np.uint8)[rows] != 0
        free, free_keys = rows[~waits], keys[~waits]
        size = max(RUN_ROWS_MIN, len(free) // RUN_SHARE)
        if len(free) > size:
            lowest = np.argpartition(free_keys, size)[:size]
            free, free_keys = free[lowest], free_keys[lowest]
        order = np.lexsort((free, free_keys))[::-1]
        self._run, self._run_keys = free[order].tolist(), free_keys[order].tolist()
        self._reach = self._run_keys[0]
        in_run = np.frombuffer(self._in_run, np.uint8)  # a writable view: it is a bytearray
        in_run[:] = 0
        in_run[free] = 1
        in_run[rows[waits & (keys <= self._reach)]] = 1  # whose turn comes when `ready` is said of them
        self._back.clear()
        self._fresh, self._seen = array("i"), self.learning.requests
