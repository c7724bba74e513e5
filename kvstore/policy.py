"""Who leaves a tier next. Pure and deterministic: rows in, a row out; one policy object per level.

A policy orders rows; what may leave at all (pins, moves, children) is the caller's question `eligible`. A row that
`eligible` refused is forgotten until the caller says `ready`, so a question costs O(log n) amortised, never a scan.
`admit` and `remove` carry the block's identity and size for policies that remember what was evicted (ghosts) or weigh
bytes. tests/test_policy.py holds the suite every policy passes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Protocol

from kvstore.errors import ConfigError

Eligible = Callable[[int], bool]


class Policy(Protocol):
    def admit(self, row: int, ident: int, nbytes: int) -> None:
        """A block came to this level. `ident`: 64 bits of its key and shard; `nbytes`: what it takes here. Mutates."""

    def touch(self, row: int) -> None:
        """It was used. Mutates."""

    def remove(self, row: int, *, evicted: bool) -> None:
        """It is gone from this level; `evicted`: because `victim` named it. Mutates."""

    def ready(self, row: int) -> None:
        """What `eligible` says of it may have changed. Mutates."""

    def next(self, row: int) -> None:
        """Hint: nobody can reach it any more, it goes before all others. Mutates."""

    def victim(self, eligible: Eligible) -> int | None:
        """The eligible row to leave next, None where there is none. The answer stays until something changes."""

    def holds(self, row: int) -> bool:
        """Whether the row is on this level. Pure."""

    def order(self, row: int) -> int:
        """Lesser leaves earlier; of a row it holds. Pure."""


ABSENT = -1
NOT_QUEUED = 0
FIRST_TICK = 1 << 40  # `next` counts down from here, use counts up
ROW_BITS = 32


class Lru:
    """Least recently used first, by a heap of rows that is brought up to date only where it is looked at."""

    def __init__(self) -> None:
        self._clock = FIRST_TICK
        self._front = FIRST_TICK
        self._tick = array("q")  # by row: when it was used last; ABSENT where it is not on this level
        self._entry = array("q")  # by row: the tick its one valid heap entry stands under, or NOT_QUEUED
        self._heap: list[int] = []  # tick << ROW_BITS | row; entries that differ from _entry are void
        self._rows = 0

    def admit(self, row: int, ident: int, nbytes: int) -> None:
        while row >= len(self._tick):
            grown = max(64, len(self._tick))
            self._tick.extend([ABSENT] * grown)
            self._entry.extend([NOT_QUEUED] * grown)
        assert self._tick[row] == ABSENT, f"row {row} is admitted twice"
        self._rows += 1
        self._clock += 1
        self._tick[row] = self._clock
        if self._entry[row] == NOT_QUEUED:
            self._push(row)

    def touch(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is touched but absent"
        self._clock += 1
        self._tick[row] = self._clock

    def remove(self, row: int, *, evicted: bool) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is removed but absent"
        self._tick[row] = ABSENT
        self._rows -= 1

    def ready(self, row: int) -> None:
        if self._entry[row] == NOT_QUEUED and self._tick[row] != ABSENT:
            self._push(row)

    def next(self, row: int) -> None:
        assert self._tick[row] != ABSENT, f"row {row} is hinted but absent"
        self._front -= 1
        self._tick[row] = self._front
        self._push(row)

    def victim(self, eligible: Eligible) -> int | None:
        heap, ticks, entries = self._heap, self._tick, self._entry
        while heap:
            entry = heap[0]
            row = entry & (1 << ROW_BITS) - 1
            queued, tick = entry >> ROW_BITS, ticks[row]
            if queued != entries[row]:
                heappop(heap)
            elif tick == ABSENT:
                heappop(heap)
                entries[row] = NOT_QUEUED
            elif tick != queued:
                entries[row] = tick
                heapreplace(heap, tick << ROW_BITS | row)
            elif eligible(row):
                return row
            else:
                heappop(heap)
                entries[row] = NOT_QUEUED
        return None

    def holds(self, row: int) -> bool:
        return row < len(self._tick) and self._tick[row] != ABSENT

    def order(self, row: int) -> int:
        return self._tick[row]

    def _push(self, row: int) -> None:
        tick = self._tick[row]
        self._entry[row] = tick
        heappush(self._heap, tick << ROW_BITS | row)
        if len(self._heap) > 2 * self._rows + 1024:  # more void entries than valid ones
            for absent in (row for row, tick in enumerate(self._tick) if tick == ABSENT):
                self._entry[absent] = NOT_QUEUED
            self._heap = [tick << ROW_BITS | row for row, tick in enumerate(self._entry) if tick != NOT_QUEUED]
            heapify(self._heap)


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru}


def make_policy(name: str) -> Policy:
    """A fresh policy by its configured name. ConfigError for an unknown one."""
    if name not in POLICIES:
        raise ConfigError(f"policy is {name!r}: give one of {', '.join(POLICIES)}")
    return POLICIES[name]()
