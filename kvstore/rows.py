"""The columns of residency: one row a block, plain arrays, freed rows used again. Pure storage, no decisions."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from kvstore.header import HEADER_BYTES, Header
from kvstore.types import Location

NONE = -1
GROWTH_ROWS_MIN = 64


class Rows:
    """Column arrays, indexed by row. Bitmaps have bit `level` for each level."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.present = array("B")  # bitmap: a whole copy lies there
        self.writing = array("B")  # bitmap: a copy is being made there
        self.leaving = array("B")  # bitmap: that copy is on its way down, still readable
        self.used = array("B")  # 1 where the row is a block or a zombie, 0 on the free list
        self.gone = array("B")  # 1: removed, but pinned or busy, so the row is not reused yet
        self.leaf_first = array("B")  # 1: children must go first (full attention)
        self.orphan = array("B")  # 1: waits for a parent that is not resident
        self.fidelity = array("B")
        self.space = array("i")  # which (namespace, shard)
        self.pins = array("i")
        self.busy = array("i")  # moves and loads that will come back to this row
        self.parent = array("i")  # rows, NONE where there is none resident
        self.child = array("i")  # first child
        self.next = array("i")  # sibling
        self.prev = array("i")
        self.depth = array("q")
        self.raw = array("q")  # bytes of the raw block
        self.below = [array("i") for _ in range(levels)]  # children whose fastest staying copy is here or faster
        self.segment = [array("q") for _ in range(levels)]
        self.offset = [array("q") for _ in range(levels)]
        self.length = [array("q") for _ in range(levels)]
        self.headers = bytearray()  # HEADER_BYTES a row
        self._free = array("i")
        self._bytes = (
            self.present, self.writing, self.leaving, self.used, self.gone, self.leaf_first, self.orphan, self.fidelity,
        )  # fmt: skip
        self._numbers = (
            self.space, self.pins, self.busy, self.parent, self.child, self.next, self.prev, self.depth, self.raw,
            *self.below, *self.segment, *self.offset, *self.length,
        )  # fmt: skip
        self._links = (self.parent, self.child, self.next, self.prev)

    def __len__(self) -> int:
        """Rows in use, zombies included."""
        return len(self.present) - len(self._free)

    def take(self) -> int:
        """A cleared row. Mutates."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        for flags in self._bytes:
            flags[row] = 0
        for numbers in self._numbers:
            numbers[row] = 0
        for links in self._links:
            links[row] = NONE
        self.used[row] = 1
        return row

    def give(self, row: int) -> None:
        """Free a row. Mutates."""
        assert self.used[row], f"row {row} is freed twice"
        self.used[row] = 0
        self._free.append(row)

    def _grow(self) -> None:
        first = len(self.present)
        more = max(GROWTH_ROWS_MIN, first // 2)
        for flags in self._bytes:
            flags.frombytes(bytes(more))
        for numbers in self._numbers:
            numbers.frombytes(bytes(more * numbers.itemsize))
        self.headers += bytes(more * HEADER_BYTES)
        self._free.extend(range(first + more - 1, first - 1, -1))

    def header(self, row: int) -> Header:
        return Header.unpack(memoryview(self.headers)[row * HEADER_BYTES : (row + 1) * HEADER_BYTES])

    def set_header(self, row: int, header: Header) -> None:
        self.headers[row * HEADER_BYTES : (row + 1) * HEADER_BYTES] = header.pack()

    def location(self, row: int, level: int) -> Location:
        return Location(self.segment[level][row], self.offset[level][row], self.length[level][row])

    def set_location(self, row: int, level: int, location: Location) -> None:
        self.segment[level][row] = location.segment
        self.offset[level][row] = location.offset
        self.length[level][row] = location.length

    def __iter__(self) -> Iterator[int]:
        return (row for row, used in enumerate(self.used) if used)

    def link(self, row: int, parent: int) -> None:
        """Make `row` the first child of `parent`. Mutates."""
        first = self.child[parent]
        self.parent[row], self.prev[row], self.next[row] = parent, NONE, first
        if first != NONE:
            self.prev[first] = row
        self.child[parent] = row

    def unlink(self, row: int) -> None:
        """Take `row` from its parent's children. Mutates."""
        before, after = self.prev[row], self.next[row]
        if before != NONE:
            self.next[before] = after
        else:
            self.child[self.parent[row]] = after
        if after != NONE:
            self.prev[after] = before
        self.parent[row] = self.prev[row] = self.next[row] = NONE

    def children(self, row: int) -> list[int]:
        found, child = [], self.child[row]
        while child != NONE:
            found.append(child)
            child = self.next[child]
        return found
