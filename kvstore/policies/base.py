"""Who leaves a tier next. Pure and deterministic: rows in, a row out; one policy object per level.

A policy orders rows; what may leave at all (pins, moves, children) is the caller's question `eligible`. A row that
`eligible` refused is set aside until the caller says `ready`. `admit` and `remove` carry the block's identity and size
for policies that remember what was evicted (ghosts) or weigh bytes. tests/test_policy.py holds the suite every policy
passes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np

from kvstore.errors import ConfigError
from kvstore.policies.arc import Arc
from kvstore.policies.s3fifo import S3Fifo
from kvstore.policies.usage import Hint, Rows, Use

Eligible = Callable[[int], bool]


class Policy(Protocol):
    def begin(self, use: Use, now_s: float, rows: Sequence[int] = ()) -> None:
        """A request begins: what comes and is used from now on belongs to it. `now_s` rises; `rows`: its blocks that
        are here, deepest first, each touched on its own besides. Mutates."""

    def follow(self, row: int | None, above: int, now_s: float, within_s: float, coming: int = 0) -> None:
        """What comes belongs to the request that used `row`, or the block with ident `above`, at most so many seconds
        ago; else a new one begins. `coming`: the ident of the block that comes, if one does. Mutates."""

    def admit(self, row: int, ident: int, nbytes: int, above: int = 0, depth: int = 0) -> None:
        """A block came to this level. `ident`: 64 bits of its key and shard; `nbytes`: what it takes here; `above`: its
        parent's ident, 0 for none; `depth`: blocks before it in its prompt. Mutates."""

    def touch(self, row: int) -> None:
        """It was used. Mutates."""

    def touch_all(self, rows: Rows) -> None:
        """`touch` of each, in that order. Mutates."""

    def remove(self, row: int, *, evicted: bool) -> None:
        """It is gone from this level; `evicted`: because `victim` named it. Mutates."""

    def ready(self, row: int) -> None:
        """What `eligible` says of it may have changed. Mutates."""

    def ready_all(self, rows: Rows) -> None:
        """`ready` of each. Mutates."""

    def next(self, row: int) -> None:
        """Nobody can reach it any more, it goes before all others. Mutates."""

    def hint(self, row: int, hint: Hint) -> None:
        """What a caller says of the request that used it last. Mutates."""

    def victim(self, eligible: Eligible) -> int | None:
        """The eligible row to leave next, None where there is none. The answer stays until something changes."""

    def holds(self, row: int) -> bool:
        """Whether the row is on this level. Pure."""

    def order(self, row: int) -> int:
        """Lesser leaves earlier; of a row it holds. Pure."""

    def worth(self, row: int) -> int | None:
        """Expected uses a second, in some unit that all levels share, of a row that any of them holds; None from who
        knows no more than an order."""


ABSENT = -1
FIRST_TICK = 1 << 40  # `next` counts down from here, use counts up
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1
RUN_ROWS_MIN = 256
RUN_SHARE = 16  # of the rows in a run


class Lru:
    """Least recently used first.

    A row costs its tick and a flag. The oldest share of the rows is sorted at a time (a run); use only ever moves a row
    behind the run. What comes back into question within the run's reach (`ready`, `next`) waits in a small heap. So a
    victim costs O(1) amortised, and every n/16 victims one pass over the ticks in numpy.
    """

    def __init__(self) -> None:
        self._clock = FIRST_TICK
        self._front = FIRST_TICK
        self._tick = array("q")  # by row: when it was used last; ABSENT where it is not on this level
        self._aside = bytearray()  # by row: 1 where `eligible` refused it and nobody said `ready` since
        self._set_aside = 0  # how many of them are on this level
        self._rows = 0
        self._run_rows = array("i")  # the oldest rows, oldest first, when the run was made
        self._run_ticks = array("q")  # their ticks then: another one now voids the entry
        self._at = 0  # the run is used up to here
        self._reach = 0  # every row with a tick up to here is in the run, in the heap, aside, or gone
        self._heap: list[int] = []  # tick << ROW_BITS | row; void where the tick is another one now, or the row aside

    def begin(self, use: Use, now_s: float, rows: Sequence[int] = ()) -> None:
        """Recency alone counts."""

    def follow(self, row: int | None, above: int, now_s: float, within_s: float, coming: int = 0) -> None:
        """Recency alone counts."""

    def hint(self, row: int, hint: Hint) -> None:
        """Recency alone counts."""

    def admit(self, row: int, ident: int, nbytes: int, above: int = 0, depth: int = 0) -> None:
        if row >= len(self._tick):
            grown = max(64, row + 1 - len(self._tick), len(self._tick) // 8)
            self._tick.frombytes(b"\xff" * (8 * grown))
            self._aside.extend(bytes(grown))
        assert self._tick[row] == ABSENT, f"row {row} is admitted twice"
        self._rows += 1
        self._clock += 1
        self._tick[row] = self._clock

    def touch(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is touched but absent"
        self._clock += 1
        self._tick[row] = self._clock

    def touch_all(self, rows: Rows) -> None:
        ticks = np.frombuffer(self._tick, np.int64)
        assert (ticks[rows] != ABSENT).all(), "a row is touched but absent"
        ticks[rows] = np.arange(self._clock + 1, self._clock + 1 + len(rows))
        self._clock += len(rows)

    def remove(self, row: int, *, evicted: bool) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is removed but absent"
        self._tick[row] = ABSENT
        self._rows -= 1
        if self._aside[row]:
            self._aside[row] = 0
            self._set_aside -= 1

    def ready(self, row: int) -> None:
        if row < len(self._aside) and self._aside[row]:
            self._aside[row] = 0
            self._set_aside -= 1
            tick = self._tick[row]
            if tick <= self._reach:
                self._push(tick << ROW_BITS | row)

    def ready_all(self, rows: Rows) -> None:
        if self._set_aside:
            for row in rows.tolist():
                self.ready(row)

    def next(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is hinted but absent"
        self._front -= 1
        self._tick[row] = self._front
        if self._aside[row]:
            self._aside[row] = 0
            self._set_aside -= 1
        self._push(self._front << ROW_BITS | row)

    def victim(self, eligible: Eligible) -> int | None:
        heap, ticks, aside = self._heap, self._tick, self._aside
        while self._rows > self._set_aside:
            row = tick = ABSENT
            while self._at < len(self._run_rows):
                row, tick = self._run_rows[self._at], self._run_ticks[self._at]
                if ticks[row] == tick and not aside[row]:
                    break
                self._at += 1
            else:
                row = ABSENT
            while heap:
                returned = heap[0] & ROW_MASK
                if ticks[returned] == heap[0] >> ROW_BITS and not aside[returned]:
                    if row == ABSENT or ticks[returned] < tick:
                        row = returned
                    break
                heappop(heap)
            if row == ABSENT:
                self._sort()
            elif eligible(row):
                return row
            else:
                aside[row] = 1
                self._set_aside += 1
        return None

    def holds(self, row: int) -> bool:
        return row < len(self._tick) and self._tick[row] != ABSENT

    def order(self, row: int) -> int:
        return self._tick[row]

    def worth(self, row: int) -> None:
        """Recency alone counts, and each level has its own."""

    def _push(self, entry: int) -> None:
        heappush(self._heap, entry)
        if len(self._heap) > 2 * self._rows + 1024:  # more void entries than valid ones
            self._heap = [entry for entry in self._heap if self._tick[entry & ROW_MASK] == entry >> ROW_BITS]
            heapify(self._heap)

    def _sort(self) -> None:
        """A new run: the oldest of the rows that are in question. There is one. Mutates."""
        ticks = np.frombuffer(self._tick, np.int64)
        rows = np.flatnonzero((ticks != ABSENT) & (np.frombuffer(self._aside, np.uint8) == 0))
        mine = ticks[rows]
        size = max(RUN_ROWS_MIN, len(rows) // RUN_SHARE)
        if len(rows) > size:
            oldest = np.argpartition(mine, size)[:size]
            rows, mine = rows[oldest], mine[oldest]
        order = np.argsort(mine)
        self._run_rows = array("i", rows[order].astype(np.int32).tobytes())
        self._run_ticks = array("q", mine[order].tobytes())
        self._at, self._reach = 0, self._run_ticks[-1]
        self._heap.clear()


POLICIES = ("default", "lru", "s3fifo", "arc")
GHOST_BYTES = 64 << 20


_prepared: dict[str, None] = {name: None for name in POLICIES if name != "default"}


def prepared(name: str) -> bool:
    """Whether `make_policies` takes no time. Pure."""
    return name not in POLICIES or name in _prepared


def prepare(name: str) -> None:
    """Thread: have at hand what a policy needs; compiled, for some twenty seconds, the first time on a machine."""
    make_policies(name)


def make_policies(name: str, levels: int = 1, ghost_bytes: int = GHOST_BYTES) -> tuple[Policy, ...]:
    """Fresh policies by their configured name, one for each level of a worker; those of `default` learn together.

    `ghost_bytes`: memory for what it remembers of evicted blocks. ConfigError for an unknown name.
    """
    if name == "default":
        from kvstore.policies.learned import Learned  # numba takes its time, so only whoever needs it waits
        from kvstore.policies.learning import Learning

        learning = Learning(ghost_bytes)
        _prepared[name] = None
        return tuple(Learned(learning) for _ in range(levels))
    makers: dict[str, Callable[[], Policy]] = {"lru": Lru, "s3fifo": S3Fifo, "arc": Arc}
    if name not in makers:
        raise ConfigError(f"policy is {name!r}: give one of {', '.join(POLICIES)}")
    return tuple(makers[name]() for _ in range(levels))


def make_policy(name: str) -> Policy:
    """The policy of a single level."""
    return make_policies(name)[0]
