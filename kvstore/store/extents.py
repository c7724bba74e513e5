"""Free ranges of an address space: best fit, coalescing. Pure; the arena and the device pools allocate from it."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise


class Extents:
    """Free ranges by size and by place. Addresses and lengths are integers in any unit; ranges that touch merge."""

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int]] = []  # (length, start), sorted; the same ranges as in _length
        self._length: dict[int, int] = {}  # start -> length
        self._start: dict[int, int] = {}  # end -> start
        self.free = 0  # sum of all lengths

    def take(self, length: int) -> int | None:
        """Start of a range of `length`, from the smallest that holds it, the lowest among equals. Mutates."""
        index = bisect_left(self._by_size, (length, -1))
        if length <= 0 or index == len(self._by_size):
            return None
        found, start = self._by_size[index]
        self._forget(start, found)
        if found > length:
            self._keep(start + length, found - length)
        return start

    def add(self, start: int, length: int) -> None:
        """Make a range free. Mutates. ValueError where part of it is free already at its borders."""
        if length <= 0 or start in self._length or start + length in self._start:
            raise ValueError(f"range {start}+{length} is free already")
        before = self._start.get(start)
        if before is not None:
            self._forget(before, start - before)
            length, start = length + start - before, before
        after = self._length.get(start + length)
        if after is not None:
            self._forget(start + length, after)
            length += after
        self._keep(start, length)

    def remove(self, start: int, length: int) -> None:
        """Take one whole free range out of the address space. Mutates. ValueError unless exactly that range is free."""
        if self._length.get(start) != length:
            raise ValueError(f"range {start}+{length} is not one free range")
        self._forget(start, length)

    @property
    def largest(self) -> int:
        """Length of the largest free range."""
        return self._by_size[-1][0] if self._by_size else 0

    def ranges(self) -> list[tuple[int, int]]:
        """(start, length) of every free range, by address."""
        return sorted(self._length.items())

    def validate(self) -> None:
        """AssertionError unless the three views agree, ranges are disjoint and none could still merge."""
        ranges = self.ranges()
        assert sorted((length, start) for start, length in ranges) == self._by_size, "sizes and places disagree"
        assert {start + length: start for start, length in ranges} == self._start, "starts and ends disagree"
        assert sum(length for _, length in ranges) == self.free, "the sum of the free ranges is off"
        for (start, length), (following, _) in pairwise(ranges):
            assert start + length < following, f"ranges {start}+{length} and {following} overlap or should be one"

    def _keep(self, start: int, length: int) -> None:
        insort(self._by_size, (length, start))
        self._length[start] = length
        self._start[start + length] = start
        self.free += length

    def _forget(self, start: int, length: int) -> None:
        del self._by_size[bisect_left(self._by_size, (length, start))]
        del self._length[start]
        del self._start[start + length]
        self.free -= length
