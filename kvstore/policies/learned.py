"""The `default` policy: who is least likely to be used again soon leaves first, as `learning.py` has learned.

One level's order over the shared learning. Like `Lru` it sorts the lowest share of its rows at a time (a run), so that
a victim costs O(1) amortised; between two runs the order is that of the last one, and what was used leaves it.
Admission is the same decision: who was just admitted and has the least to offer is the next to leave (bypass).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np

from kvstore.kernels.reuse_state import Array
from kvstore.policies.learning import Learning
from kvstore.policies.one_by_one import OneByOne
from kvstore.policies.usage import Hint, Use

RUN_ROWS_MIN = 256
RUN_SHARE, RUN_SHARE_NEAR = 16, 64  # of the rows in a run
FRESH_ROWS_MAX = 64  # looked at one request late, or when there are more
SORT_ROWS = 8  # rows that one use pays for: a new order of all with a new request, once enough were used
SORT_ROWS_NEAR = 128  # as long as they are few: all they need lies in the processor's caches
NEAR_ROWS = 1 << 14
SPREAD = 8  # rows numbered at most so many times as far as there are here are listed by number
DEPTH_BITS = 16
DEPTH_MASK = (1 << DEPTH_BITS) - 1
GROWTH_ROWS_MIN = 64
ABSENT = -1
ROW_BITS = 32


class Learned(OneByOne):
    """A `kvstore.policies.base.Policy`."""

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
        self._back: list[tuple[int, int]] = []  # heap of (key, row): who came back into question, or came in
        self._offer: dict[int, int] = {}  # row -> its key there; a guess, if it came since the last look
        self._came, self._came_in = ABSENT, 0  # the last new block, and the number of the request that brought it
        self._like, self._like_in = 0, 0  # the key of a new block, without its depth, and the request whose are so
        self._ordered, self._paid, self._due = (
            0,
            0,
            0,
        )  # requests at the last run, uses since, how many pay for a new one
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

    def follow(self, row: int | None, above: int, now_s: float, within_s: float, coming: int = 0) -> None:
        """Mutates the shared learning: once for all levels."""
        self.learning.follow(row, above, now_s, within_s, coming)

    def admit(self, row: int, ident: int, nbytes: int, above: int = 0, depth: int = 0) -> None:
        place, learning = self._place, self.learning
        if row >= len(place):
            self._more_rows(row)
        assert place[row] == ABSENT, f"row {row} is admitted twice"
        place[row] = len(self._rows)
        self._used[row] = 0
        self._rows.append(row)
        self._fresh.append(row)
        self._paid += 1
        if learning.admit(row, ident, above, depth):
            self._came, self._came_in = row, learning.requests
            if self._like_in == learning.requests:
                self._put_in(row, self._like | (DEPTH_MASK - depth if depth < DEPTH_MASK else 0))

    def touch(self, row: int) -> None:
        assert self._place[row] != ABSENT, f"row {row} is touched but absent"
        if self._used[row] == self.learning.requests:
            return  # by this request already
        self._used[row] = self.learning.requests
        self._paid += 1
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
        if self._in_run[row]:
            self._in_run[row] = 0
            self._offer.pop(row, None)
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
                self._offer[row] = self.learning.key(row)
                heappush(self._back, (self._offer[row], row))

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
        self._offer.clear()

    # ---- what is asked

    def victim(self, eligible: Callable[[int], bool]) -> int | None:
        if self._doomed:
            for row in reversed(self._doomed):  # the last hinted first
                if not self._aside[row]:
                    if eligible(row):
                        return row
                    self._put_aside(row)
        requests, waiting = self.learning.requests, len(self._rows) - self._set_aside
        if self._paid >= self._due and self._ordered != requests and waiting:
            self._sort()
        elif self._run and (len(self._fresh) > FRESH_ROWS_MAX or self._seen != requests):
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

    def worth(self, row: int) -> int:
        self.learning.settle()
        return self.learning.key(row) >> DEPTH_BITS

    def _put_aside(self, row: int) -> None:
        self._aside[row] = 1
        self._set_aside += 1

    def _more_rows(self, row: int) -> None:
        grown = max(GROWTH_ROWS_MIN, row + 1 - len(self._place), len(self._place) // 8)
        self._place.frombytes(b"\xff" * (self._place.itemsize * grown))
        self._aside.extend(bytes(grown))
        self._in_run.extend(bytes(grown))
        self._used.frombytes(bytes(self._used.itemsize * grown))

    def _put_in(self, row: int, key: int) -> None:
        """A row joins the run, if it belongs before its end. Mutates."""
        if key < self._reach:
            self._in_run[row] = 1
            self._offer[row] = key
            heappush(self._back, (key, row))

    def _first(self) -> int:
        """The head of the run or of what came back, whichever is less; ABSENT where both are used up. Mutates."""
        run, in_run, aside, offer = self._run, self._in_run, self._aside, self._offer
        while run and (not in_run[run[-1]] or aside[run[-1]] or run[-1] in offer):
            run.pop()
            self._run_keys.pop()
        back = self._back
        while back and (not in_run[back[0][1]] or aside[back[0][1]] or offer.get(back[0][1]) != back[0][0]):
            heappop(back)
        if back and (not run or back[0] < (self._run_keys[-1], run[-1])):
            return back[0][1]
        return run[-1] if run else ABSENT

    def _look(self) -> None:
        """Who came or was used and yet belongs before the end of the run joins it. Mutates."""
        rows = np.unique(np.frombuffer(self._fresh, np.int32))
        self.learning.settle()
        keys, in_run = self.learning.written(rows), np.frombuffer(self._in_run, np.uint8)
        here = np.frombuffer(self._place, np.int32)[rows] != ABSENT
        here &= (keys < self._reach) | (in_run[rows] != 0)  # most belong behind it
        for row, key in zip(rows[here].tolist(), keys[here].tolist(), strict=True):
            if self._in_run[row]:
                if self._offer.get(row, key) == key:
                    continue
                self._in_run[row] = 0  # the guess was wrong
            self._put_in(row, key)
        self._looked()

    def _looked(self) -> None:
        self._fresh, self._seen = array("i"), self.learning.requests
        if self._came_in == self.learning.requests and self._place[self._came] != ABSENT:
            self._like, self._like_in = self.learning.key(self._came) & ~DEPTH_MASK, self._came_in

    def _here(self) -> Array:
        """Rows of this level, by number where that costs little: neighbours came together and lie together. Pure."""
        if len(self._place) <= SPREAD * len(self._rows):
            return np.flatnonzero(np.frombuffer(self._place, np.int32) != ABSENT).astype(np.int32)
        return np.frombuffer(self._rows, np.int32).copy()

    def _sort(self) -> None:
        """A new run: the lowest of the rows that are in question. There is one. Mutates."""
        rows = self._here()
        keys = self.learning.keys(rows)
        waits = np.frombuffer(self._aside, np.uint8)[rows] != 0
        free, free_keys = rows[~waits], keys[~waits]
        share, pays = (RUN_SHARE_NEAR, SORT_ROWS_NEAR) if len(free) <= NEAR_ROWS else (RUN_SHARE, SORT_ROWS)
        self._ordered, self._paid, self._due = self.learning.requests, 0, len(free) // pays
        size = max(RUN_ROWS_MIN, len(free) // share)
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
        self._offer.clear()
        self._looked()
