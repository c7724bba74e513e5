"""The blocks of a directory in flat arrays: (table, key) to copies. Worked by `kvstore.kernels.directory`.

Memory: 32 bytes a slot, of which 44 to 88 % are in use once there are thousands of blocks, so 36 to 73 bytes a block
with up to two copies; each further copy takes 8. Address space for the most that may ever come is reserved at the
start and costs nothing before it is used.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.directory.entries import OWNERS_MAX
from kvstore.types import KEY_BYTES, Fidelity, pack_keys

Array = npt.NDArray[Any]

TABLES_MAX = 65535
SLOT_BYTES = 32
_FILL_MIN = 0.42  # of the slots, in the mean
_HUGE = 2 << 20
_BITS = 63  # of a number that the kernels fill
_WARM: list[bool] = []


def key_array(keys: Sequence[bytes]) -> Array:
    """int64 [n, 2] over the packed keys. ValueError unless each has `KEY_BYTES` bytes."""
    packed = pack_keys(keys)
    if len(packed) != len(keys) * KEY_BYTES:
        raise ValueError(f"{len(keys)} keys of {len(packed)} bytes: {KEY_BYTES} each")
    return np.frombuffer(packed, np.int64).reshape(-1, 2)


def prepare() -> None:
    """Have the kernels compiled (seconds, once a machine) or loaded (tenths, once a process), so that no call waits."""
    if not _WARM:
        _WARM.append(True)
        table = BlockTable(1)
        keys = np.zeros((1, 2), np.int64)
        for copy in (1 << 12, 0):
            table.apply(keys, np.array([[0, 1, 1, copy]], np.int64), 1, 1)
            table.lookup(keys, 1, Fidelity.EXACT, 4)
            slots = table.held(keys, 1, Fidelity.EXACT)[0]
            table.spans(slots, 0, Fidelity.EXACT, 4)
            table.shares(keys, 1)
        table.status[1] = 4
        table.count_dead(1)
        table.sweep(1)
        list(table.of_owner(1))
        table.validate(2, 2)


def reserve(nbytes: int) -> mmap.mmap:
    """Zeroed memory that is taken from the system only where it is touched; in huge pages beyond the first."""
    size = -(-nbytes // _HUGE) * _HUGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    made = mmap.mmap(-1, size, flags=flags)
    if size > _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        made.madvise(mmap.MADV_HUGEPAGE, _HUGE, size - _HUGE)
    return made


class BlockTable:
    """Copies of blocks of up to `TABLES_MAX` tables; about 2 * `blocks_max` at the most. Every method but the queries
    mutates. `seed` keeps those who choose keys from choosing where they fall."""

    def __init__(self, blocks_max: int, seed: int = 0) -> None:
        if not _WARM:
            prepare()
        from kvstore.kernels import directory, directory_match  # they import numba, which a client may never need

        self._kernels: ModuleType = directory
        self._lookups: ModuleType = directory_match
        pages = int(2 * blocks_max / (_FILL_MIN * directory.PAGE_SLOTS)) + 64
        self.slots_max = pages * directory.PAGE_SLOTS
        slots = reserve(self.slots_max * SLOT_BYTES)
        nodes = reserve((2 * blocks_max + 64) * 8)
        words = np.frombuffer(slots, np.uint32, self.slots_max * 8).reshape(-1, 8)
        self._arrays = directory.Arrays(
            keys=words.view(np.int64),
            words=words,
            nodes=np.frombuffer(nodes, np.uint32, (2 * blocks_max + 64) * 2).reshape(-1, 2),
            page_of=np.frombuffer(reserve(4 << directory.DEPTH_MAX), np.int32),
            pages=np.zeros((pages, 3), np.int64),
            status=np.zeros(OWNERS_MAX + 1, np.uint8),
            owned=np.zeros(OWNERS_MAX + 1, np.int64),
            held=np.zeros(TABLES_MAX + 1, np.int64),
            state=np.zeros(directory.STATE_FIELDS, np.int64),
            page=np.empty((directory.PAGE_SLOTS, 4), np.int64),
        )
        self.status, self.owned, self.held_by = self._arrays.status, self._arrays.owned, self._arrays.held
        self._state = state = self._arrays.state
        state[directory.DEPTH] = state[directory.PAGES] = state[directory.NODES] = 1
        state[directory.FREE_PAGE] = -1
        state[directory.SEED] = seed
        self._report = np.zeros(3, np.int64)
        self._spans = np.empty((1024, 4), np.int64)
        self._found, self._work = np.empty(0, np.int64), np.empty((0, 3), np.int64)
        self._pairs = np.empty((64, 2), np.int64)

    def apply(self, keys: Array, runs: Array, owner: int, room: int) -> tuple[int, int, int]:
        """An owner's changes in order, as `kernels.directory.apply` has them: copies (new, removed, refused)."""
        self._kernels.apply(self._arrays, keys, runs, owner, room, self._report)
        new, removed, refused = self._report.tolist()
        return new, removed, refused

    def count_dead(self, owner: int) -> None:
        """The owner's status has become that of the dead: its copies are to be swept."""
        self._state[self._kernels.DEAD] += self.owned[owner]

    def sweep(self, slots: int) -> int:
        """Look for copies of the dead in so many slots (whole pages); how many are left."""
        if slots > 0 and self.dead:
            self._kernels.sweep(self._arrays, -(-slots // self._kernels.PAGE_SLOTS))
        return self.dead

    # --- queries: pure ---------------------------------------------------------------------------------------------

    @property
    def dead(self) -> int:
        """Copies of the dead that are left."""
        return int(self._state[self._kernels.DEAD])

    @property
    def blocks(self) -> int:
        """Slots in use: a block counts once per table."""
        return int(self._state[self._kernels.SLOTS])

    @property
    def nbytes(self) -> int:
        """Memory touched, in bytes."""
        k, state = self._kernels, self._state
        pages, depth, nodes = int(state[k.PAGES]), int(state[k.DEPTH]), int(state[k.NODES])
        return pages * (int(k.PAGE_SLOTS) * SLOT_BYTES + 24) + (4 << depth) + nodes * 8

    def only(self, owners: Iterable[int]) -> Any:
        """The table as a lookup sees it where of those visible only these are there. Changes with the table."""
        status = np.zeros_like(self.status)
        for owner in owners:
            status[owner] = self.status[owner]
        return self._arrays._replace(status=status)

    def lookup(
        self, keys: Array, table: int, least: Fidelity, copies: int, seen: Any = None
    ) -> tuple[int, list[list[int]]]:
        """How many leading keys are held by somebody visible, at `least` or better, and their `spans` from depth 0 on.

        `seen`: what `only` gave, here and below.
        """
        arrays, found, work = seen or self._arrays, *self._room(copies)
        while True:
            blocks, count = self._lookups.lookup(arrays, keys, table, 3 - least, found, work, self._spans)
            if count >= 0:
                ranges: list[list[int]] = self._spans[:count].tolist()
                return blocks, ranges
            self._spans = np.empty((2 * len(self._spans), 4), np.int64)

    def _room(self, copies: int) -> tuple[Array, Array]:
        """Where a lookup that looks at so many copies of a block (4 or more) keeps them meanwhile."""
        if len(self._found) != copies:
            self._found, self._work = np.empty(copies, np.int64), np.empty((2 * copies, 3), np.int64)
        return self._found, self._work

    def held(self, keys: Array, table: int, least: Fidelity, seen: Any = None) -> tuple[Array, Array]:
        """Per key its slot (int64, -1: none), and 1 (uint8) where it is held by somebody visible."""
        slots, flags = np.empty(len(keys), np.int64), np.empty(len(keys), np.uint8)
        self._lookups.held(seen or self._arrays, keys, table, 3 - least, slots, flags)
        return slots, flags

    def spans(self, slots: Array, depth: int, least: Fidelity, copies: int, seen: Any = None) -> list[list[int]]:
        """[kind, first depth, count, bytes] of the visible copies in `slots`, as `kernels.directory_match.spans`."""
        arrays, found, work = seen or self._arrays, *self._room(copies)
        while (count := self._lookups.spans(arrays, slots, depth, 3 - least, found, work, self._spans)) < 0:
            self._spans = np.empty((2 * len(self._spans), 4), np.int64)
        ranges: list[list[int]] = self._spans[:count].tolist()
        return ranges

    def copies(self, key: Array, table: int) -> list[int]:
        """The visible copies of one key, rising. `key` int64 [2]."""
        found = np.empty(OWNERS_MAX, np.int64)
        slot = self._kernels.seek(self._arrays, key[0], key[1], table)
        count = 0 if slot < 0 else self._lookups.gather(self._arrays, slot, 3, found)
        copies: list[int] = found[:count].tolist()
        return copies

    def shares(self, keys: Array, table: int) -> dict[int, int]:
        """Owner -> bitmap of the keys that it has a copy of, bit i for key i, visible or not."""
        found: dict[int, int] = {}
        for first in range(0, len(keys), _BITS):
            some = keys[first : first + _BITS]
            while (count := self._lookups.shares(self._arrays, some, table, self._pairs)) < 0:
                self._pairs = np.empty((2 * len(self._pairs), 2), np.int64)
            for owner, bits in self._pairs[:count].tolist():
                found[owner] = found.get(owner, 0) | bits << first
        return found

    def of_owner(self, owner: int) -> Iterator[tuple[int, bytes, int]]:
        """(table, key, copy) of every copy of an owner. O(all slots)."""
        found = np.empty((int(self.owned[owner]), 4), np.int64)
        count = self._lookups.of_owner(self._arrays, owner, found)
        assert count == len(found), f"owner {owner} is counted wrong"
        keys = np.ascontiguousarray(found[:, 1:3]).tobytes()
        for at, (table, copy) in enumerate(found[:, ::3].tolist()):
            yield table, keys[at * KEY_BYTES : (at + 1) * KEY_BYTES], copy

    def alike(self, owner: int) -> Iterator[tuple[int, int, bytes]]:
        """(table, copy, packed keys) of all copies of an owner, those that are alike together. O(all slots)."""
        found = np.empty((int(self.owned[owner]), 4), np.int64)
        count = self._lookups.of_owner(self._arrays, owner, found)
        assert count == len(found), f"owner {owner} is counted wrong"
        found = found[np.lexsort((found[:, 3], found[:, 0]))]
        edges = np.flatnonzero(np.any(found[1:, ::3] != found[:-1, ::3], axis=1)) + 1
        for part in np.split(found, edges) if count else ():
            yield int(part[0, 0]), int(part[0, 3]), np.ascontiguousarray(part[:, 1:3]).tobytes()

    def validate(self, owners: int, tables: int) -> None:
        """AssertionError where an invariant is broken; numbers in use are below `owners`, `tables`. O(all slots)."""
        owned, held = np.zeros(owners, np.int64), np.zeros(tables, np.int64)
        pages = np.zeros(self._state[self._kernels.PAGES], np.int64)
        wrong = self._lookups.recount(self._arrays, owned, held, pages)
        assert wrong < 0, f"slot {wrong} is not found, has no copy or copies out of order, or a node is lost"
        assert np.array_equal(owned, self.owned[:owners]), "copies of an owner are counted wrong"
        assert np.array_equal(held, self.held_by[:tables]), "blocks of a table are counted wrong"
        assert np.array_equal(pages, self._arrays.pages[: len(pages), 1]), "slots of a page are counted wrong"
        assert int(owned[self.status[:owners] == 4].sum()) == self.dead, "copies of the dead are counted wrong"
