"""The columns of residency: one row a block, plain arrays, freed rows used again. Pure storage, no decisions.

What all blocks of a shard share (namespace, shard, root) is kept once; the rest of a header is 76 bytes a row.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstore.header import Header
from kvstore.types import Fidelity, Location

NONE = -1
GROWTH_ROWS_MIN = 64
GROWTH_SHARE = 8  # of the rows there are, more at a time

_RECORD = struct.Struct("<16s16s16sQQIIHBB")
RECORD_BYTES = _RECORD.size
KEY_END, PARENT_END = 16, 32
"""In a record: the key, then the parent's key."""

ALL_PLANES = (1 << Fidelity.EXACT) - 1
"""Of an exact copy."""

_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}


class Rows:
    """Column arrays, indexed by row. Bitmaps have bit `level` for each level.

    A row on the free list has no flags, counts or links, but `below` and places hold anything.
    """

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.present = array("B")  # bitmap: a whole copy lies there
        self.writing = array("B")  # bitmap: a copy is being made there
        self.leaving = array("B")  # bitmap: that copy is on its way down, still readable
        self.used = array("B")  # 1 where the row is a block or a zombie, 0 on the free list
        self.gone = array("B")  # 1: removed, but pinned or busy, so the row is not reused yet
        self.leaf_first = array("B")  # 1: children must go first (full attention)
        self.orphan = array("B")  # 1: waits for a parent that is not resident
        self.secondary = array("B")  # 1: other workers are to keep it, this one gives it up before others
        self.fidelity = array("B")  # the lesser of the header's two
        self.space = array("i")  # which (namespace, shard)
        self.root = array("i")  # which root
        self.pins = array("i")
        self.busy = array("i")  # moves and loads that will come back to this row
        self.parent = array("i")  # rows, NONE where there is none resident
        self.child = array("i")  # first child
        self.next = array("i")  # sibling
        self.prev = array("i")
        self.same = array("i")  # the next row in the same bucket of the key table
        self.depth = array("I")
        self.raw = array("I")  # bytes of the raw block
        self.below = [array("i") for _ in range(levels)]  # children whose fastest staying copy is here or faster
        self.segment = [array("i") for _ in range(levels)]
        self.offset = [array("q") for _ in range(levels)]
        self.length = [array("I") for _ in range(levels)]
        self.planes = [array("B") for _ in range(levels)]  # bitmap: bit f - 1 where the copy is worth fidelity f
        self.records = bytearray()  # RECORD_BYTES a row
        self._digests: list[tuple[bytes, bytes]] = []  # by space: digests of its namespace and shard
        self._roots: list[bytes] = []
        self._root_at: dict[bytes, int] = {}
        self._free = array("i")
        self._columns = (
            self.present, self.writing, self.leaving, self.used, self.gone, self.leaf_first, self.orphan,
            self.secondary, self.fidelity, self.space, self.root, self.pins, self.busy, self.depth, self.raw,
            *self.below, *self.segment, *self.offset, *self.length, *self.planes,
        )  # fmt: skip
        self._links = (self.parent, self.child, self.next, self.prev, self.same)
        self.addresses = np.zeros(0, np.uint64)  # of the columns, as `kvstore.kernels.rows` numbers them
        self._locate()

    def __len__(self) -> int:
        """Rows in use, zombies included."""
        return len(self.present) - len(self._free)

    def take(self) -> int:
        """A row without flags, counts or links. Mutates."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        for below in self.below:
            below[row] = 0
        self.used[row] = 1
        return row

    def take_many(self, count: int) -> npt.NDArray[np.int64]:
        """So many rows as `take` gives them: (count,). Mutates."""
        if len(self._free) < count:
            self._grow(count - len(self._free))
        taken = np.array(self._free[len(self._free) - count :], np.int64)[::-1]
        del self._free[len(self._free) - count :]
        for column, fresh in ((self.used, 1), *((below, 0) for below in self.below)):
            np.frombuffer(column, np.dtype(column.typecode))[taken] = fresh
        return taken

    def give(self, row: int) -> None:
        """Free a row that nothing refers to. Mutates."""
        assert self.used[row], f"row {row} is freed twice"
        self.used[row] = 0
        self._free.append(row)

    def _grow(self, wanted: int = 1) -> None:
        first = len(self.present)
        more = max(GROWTH_ROWS_MIN, first // GROWTH_SHARE, wanted)
        for column in self._columns:
            column.frombytes(bytes(more * column.itemsize))
        for links in self._links:
            links.frombytes(b"\xff" * (more * links.itemsize))
        self.records += bytes(more * RECORD_BYTES)
        self._free.extend(range(first + more - 1, first - 1, -1))
        self._locate()

    def _locate(self) -> None:
        named = [self.present, self.fidelity, self.root, self.pins, self.gone, self.depth, self.raw, self.same]
        places = [(self.segment[at], self.offset[at], self.length[at], self.planes[at]) for at in range(self.levels)]
        records = np.frombuffer(self.records, np.uint8).ctypes.data if self.records else 0
        columns = [column.buffer_info()[0] for column in named]
        columns += [records, *(column.buffer_info()[0] for level in places for column in level)]
        self.addresses = np.array(columns, np.uint64)

    def at(self, level: int, segment: int) -> list[int]:
        """Rows whose copy at a level lies in a segment, rising. O(rows), in C."""
        here = np.frombuffer(self.segment[level], np.int32) == segment
        here &= np.frombuffer(self.present, np.uint8) >> level & 1 != 0
        return list(map(int, np.flatnonzero(here)))

    # ---- headers

    def describe(self, namespace: bytes, shard: bytes) -> None:
        """The digests of the next space. Mutates."""
        self._digests.append((namespace, shard))

    def key(self, row: int) -> bytes:
        at = row * RECORD_BYTES
        return bytes(self.records[at : at + KEY_END])

    def parent_key(self, row: int) -> bytes:
        at = row * RECORD_BYTES
        return bytes(self.records[at + KEY_END : at + PARENT_END])

    def ident(self, row: int) -> int:
        """64 bits of its key, as uniform as a hash, and its shard: what policies remember it by."""
        return self.ident_of(self.space[row], self.records[row * RECORD_BYTES : row * RECORD_BYTES + 8])

    def above(self, row: int) -> int:
        """The ident of its parent, 0 for a root."""
        at = row * RECORD_BYTES + KEY_END
        return self.ident_of(self.space[row], self.records[at : at + 8]) if self.depth[row] else 0

    @staticmethod
    def ident_of(space: int, key: bytes | bytearray) -> int:
        """Of any block, here or not."""
        return int.from_bytes(key[:8], "little") ^ space

    def header(self, row: int) -> Header:
        key, parent, group, copy_id, checksum, stored_length, chunks, tokens, computed_on, stored = _RECORD.unpack_from(
            self.records, row * RECORD_BYTES
        )
        namespace, shard = self._digests[self.space[row]]
        return Header(
            key, parent, self._roots[self.root[row]], group, self.depth[row], namespace, shard, copy_id,
            _FIDELITIES[computed_on], _FIDELITIES[stored], tokens, self.raw[row], chunks, stored_length, 0, checksum,
        )  # fmt: skip

    def settle_fidelity(self, row: int) -> None:
        """What the block is worth, from its copies: the header's `stored` is the best of theirs. Mutates."""
        present = self.present[row]
        best = max(self.planes[level][row].bit_length() for level in range(self.levels) if present >> level & 1)
        self.records[(row + 1) * RECORD_BYTES - 1] = best
        self.fidelity[row] = min(best, self.records[(row + 1) * RECORD_BYTES - 2])

    def worth(self, row: int, level: int) -> Fidelity:
        """Fidelity of the copy at a level, whatever the block was computed on."""
        return _FIDELITIES[self.planes[level][row].bit_length()]

    def best(self, row: int) -> int:
        """The fastest level that has it at its best fidelity: what is announced."""
        present = self.present[row]
        top = (present & -present).bit_length() - 1
        if self.planes[top][row] == ALL_PLANES:
            return top
        levels = [level for level in range(self.levels) if present >> level & 1]
        return max(levels, key=lambda level: (self.planes[level][row], -level))

    def stored(self, row: int) -> int:
        """The best fidelity of its copies."""
        return self.records[(row + 1) * RECORD_BYTES - 1]

    def digests_of(self, space: int) -> tuple[bytes, bytes]:
        """Of its namespace and shard."""
        return self._digests[space]

    def root_named(self, number: int) -> bytes:
        """Of the column `root`."""
        return self._roots[number]

    def root_of(self, row: int) -> bytes:
        return self._roots[self.root[row]]

    def known_root(self, root: bytes) -> int | None:
        """What stands for a root in its column, None where no row ever had it. Pure."""
        return self._root_at.get(root)

    def root_number(self, root: bytes) -> int:
        """What stands for a root in its column, made on first use. Mutates."""
        number = self._root_at.setdefault(root, len(self._roots))
        if number == len(self._roots):
            self._roots.append(root)
        return number

    def set_header(self, row: int, header: Header, copy_id: int | None = None) -> None:
        """Of a row whose space is set; `copy_id`: another one than the header's. Mutates."""
        assert header.shard == self._digests[self.space[row]][1], "a header of another shard"
        computed_on, stored = header.computed_on, header.stored
        self.fidelity[row] = computed_on if computed_on < stored else stored
        root = self._root_at.get(header.root)
        if root is None:
            root = self.root_number(header.root)
        self.root[row], self.depth[row], self.raw[row] = root, header.depth, header.raw_length
        _RECORD.pack_into(
            self.records, row * RECORD_BYTES, header.key, header.parent, header.group,
            header.copy_id if copy_id is None else copy_id,
            header.checksum, header.stored_length, header.chunk_count, header.tokens, computed_on, stored,
        )  # fmt: skip

    # ---- places

    def location(self, row: int, level: int) -> Location:
        return Location(self.segment[level][row], self.offset[level][row], self.length[level][row])

    def set_location(self, row: int, level: int, location: Location) -> None:
        self.segment[level][row] = location.segment
        self.offset[level][row] = location.offset
        self.length[level][row] = location.length

    def __iter__(self) -> Iterator[int]:
        return (row for row, used in enumerate(self.used) if used)

    # ---- links

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
