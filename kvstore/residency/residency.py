"""What lies where in one worker, who is pinned, and who leaves next. Pure: no bytes, clock, or waiting.

A block is a row (`rows.py`). It is present at some levels, each a whole clean copy; levels are ordered, the
fastest first. The store asks (`victim`, `elsewhere`), moves bytes, then tells (`add`, `drop`). Leaf first: a block of a
full-attention group may leave a level while none of its children lies there or at a faster one, or when it has another
copy; blocks of sliding-window and state groups go in the policy's order, but after the ends of prompts that hang on
them (`victims.py`). Blocks marked secondary (enough other workers keep them) leave before all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvstore.header import Header
from kvstore.policies.base import Eligible, Lru, Policy
from kvstore.residency.admitting import admit_all
from kvstore.residency.family import Family, top_of
from kvstore.residency.key_table import KeyTable
from kvstore.residency.rows import ALL_PLANES, NONE, Rows
from kvstore.residency.victims import bereave, forced, instead
from kvstore.types import BlockId, Fidelity, Location, Tier

Window = Callable[[bytes, bytes], int]  # (root, shard's digest) -> last blocks that a prefix needs, if not leaf first


@dataclass(frozen=True, slots=True)
class Level:
    """One local level of the stack."""

    tier: Tier
    capacity: int
    granule: int = 1  # bytes are counted in multiples of it
    raw: bool = False  # raw bytes, not a record

    def footprint(self, nbytes: int) -> int:
        return -(-nbytes // self.granule) * self.granule


class Residency:
    """At most 8 levels, 2^31 blocks."""

    def __init__(
        self, levels: Sequence[Level], policy: Callable[[], Policy], window: Window = lambda *names: 1
    ) -> None:
        assert 0 < len(levels) <= 8
        self.levels = tuple(levels)
        self.rows = Rows(len(levels))
        self.secondaries = tuple(Lru() for _ in levels)
        self.family = Family(self.rows, ())
        self.decide_by([policy() for _ in levels])
        self.used = [0] * len(levels)  # footprints of the present copies, by level
        self.leaving_bytes = [0] * len(levels)  # of these, on their way down
        self.raw_bytes = [0] * len(levels)  # what they decode to
        self.blocks = [0] * len(levels)
        self._spaces: dict[tuple[str, bytes], int] = {}  # (namespace, shard) -> its place in the two lists
        self.names: list[tuple[str, bytes]] = []  # (namespace, shard) by number, as the rows' column of spaces has them
        self.held: dict[str, list[int]] = {}  # namespace -> footprints of its copies that are not leaving, by level
        self._held_by: list[list[int]] = []  # the same lists, by space
        self.window = window
        self._kin: dict[str, list[int]] = {}  # namespace -> its spaces
        self.free: dict[str, None] = {}  # namespaces that had blocks which do not leave leaf first
        self._expected = 0  # blocks that the next space is made for
        self._index: list[KeyTable] = []  # by space: key -> row, every live block
        self._granules = [level.granule for level in levels]
        self._eligible = [self._eligibility(level) for level in range(len(levels))]

    def decide_by(self, policies: Sequence[Policy]) -> None:
        """`policies`, one a level, that know what is here; `hand_over` tells them. Mutates."""
        self.policies = tuple(policies)
        self.ranks: tuple[tuple[Policy, ...], ...] = (self.policies, self.secondaries)  # by the rows' `secondary`
        self.family.ranks = self.ranks
        self._at = [
            [tuple(p for level, p in enumerate(rank) if bitmap >> level & 1) for bitmap in range(1 << len(self.levels))]
            for rank in self.ranks
        ]  # by rank and bitmap of presence: the policies of the levels in it

    # ---- questions
    def find(self, namespace: str, shard: bytes, key: bytes) -> int | None:
        space = self._spaces.get((namespace, shard))
        return None if space is None else self._index[space].get(key)

    def space_of(self, namespace: str, shard: bytes) -> int | None:
        """The number of a (namespace, shard), None where it never had a block."""
        return self._spaces.get((namespace, shard))

    def id(self, row: int) -> BlockId:
        namespace, shard = self.names[self.rows.space[row]]
        return BlockId(namespace, shard, self.rows.key(row))

    def namespace(self, row: int) -> str:
        return self.names[self.rows.space[row]][0]

    def header(self, row: int) -> Header:
        return self.rows.header(row)

    def fidelity(self, row: int) -> Fidelity:
        return Fidelity(self.rows.fidelity[row])

    def location(self, row: int, level: int) -> Location:
        assert self.rows.present[row] >> level & 1, f"row {row} is not at level {level}"
        return self.rows.location(row, level)

    def present(self, row: int, level: int) -> bool:
        return bool(self.rows.present[row] >> level & 1)

    def staying(self, row: int, level: int) -> bool:
        """Present, and not on its way down."""
        return bool((self.rows.present[row] & ~self.rows.leaving[row]) >> level & 1)

    def writing(self, row: int, level: int) -> bool:
        """Whether a copy is being made there."""
        return bool(self.rows.writing[row] >> level & 1)

    def gone(self, row: int) -> bool:
        """Removed while pinned or busy."""
        return bool(self.rows.gone[row])

    def secondary(self, row: int) -> bool:
        """Whether others are to keep it."""
        return bool(self.rows.secondary[row])

    def pinned(self, row: int) -> bool:
        return self.rows.pins[row] > 0

    def busy(self, row: int) -> bool:
        """Whether bytes are moving for it."""
        return self.rows.busy[row] > 0

    def top(self, row: int) -> int:
        """The fastest level that has it. Only for a block that is somewhere."""
        return top_of(self.rows.present[row])

    def elsewhere(self, row: int, level: int) -> bool:
        """Whether a copy that stays lies at another level."""
        return bool(self.rows.present[row] & ~self.rows.leaving[row] & ~(1 << level))

    def may_leave(self, row: int, level: int) -> bool:
        """What `victim` asks: present, unpinned, not leaving, and a leaf or a copy among several."""
        return self._eligible[level](row)

    def _eligibility(self, level: int) -> Eligible:
        """`may_leave` at one level, its columns at hand."""
        rows, bit = self.rows, 1 << level
        present, leaving, pins = rows.present, rows.leaving, rows.pins
        leaf_first, below = rows.leaf_first, rows.below[level]

        def eligible(row: int) -> bool:
            staying = present[row] & ~leaving[row]
            return bool(staying & bit and not pins[row] and (not below[row] or not leaf_first[row] or staying & ~bit))

        return eligible

    def victim(self, level: int, *, force: bool = False) -> int | None:
        """Who leaves a level next; None where nobody may.

        `force`: where every block has children in the way, the policy's first goes all the same; its subtree is next.
        """
        for policies in self.ranks[::-1]:
            row = policies[level].victim(self._eligible[level])
            if row is not None:
                return instead(self, row, level)
        return forced(self, level) if force else None

    def kin(self, space: int) -> list[int]:
        """Numbers of all shards of a shard's namespace."""
        return self._kin[self.names[space][0]]

    def spaces(self, namespace: str) -> list[int]:
        """Numbers of a namespace's shards, as the rows have them."""
        return list(self._kin.get(namespace, ()))

    def namespaces(self) -> list[str]:
        return list(self._kin)

    def shards(self, namespace: str) -> list[bytes]:
        """Digests of the shards that a namespace has or had blocks of."""
        return [shard for name, shard in self.names if name == namespace]

    def keys(self, namespace: str, shard: bytes) -> Mapping[bytes, int]:
        """Key -> row of a shard's blocks, as it changes."""
        space = self._spaces.get((namespace, shard))
        return {} if space is None else self._index[space]

    def presence(self, namespace: str, key: bytes) -> dict[bytes, int]:
        """Shards (and so groups) that have a key's block, each with the bitmap of its levels. Pure."""
        found = {}
        for shard in self.shards(namespace):
            row = self.keys(namespace, shard).get(key)
            if row is not None:
                found[shard] = self.rows.present[row]
        return found

    def of(self, namespace: str) -> Iterator[int]:
        """Rows of a namespace, shard by shard, each followed by its children. O(all rows)."""
        parents, children = self.rows.parent, self.rows.children
        for (name, _), index in zip(self.names, self._index, strict=True):
            if name == namespace:
                for first in [row for row in index.rows() if parents[row] == NONE]:
                    line = [first]
                    while line:
                        row = line.pop()
                        yield row
                        line += children(row)

    def index(self, space: int) -> KeyTable:
        return self._index[space]

    def __len__(self) -> int:
        return sum(len(index) for index in self._index)

    # ---- changes

    def reserve(self, blocks: int) -> None:
        """Hint: so many blocks of one shard are about to come. Mutates."""
        self._expected = blocks

    def admit(self, namespace: str, header: Header, level: int, location: Location, *, leaf_first: bool) -> int:
        """A new block with its first copy; its row. Mutates."""
        [row] = admit_all(self, namespace, [header], level, [location], leaf_first=leaf_first)
        return row

    def came(self, namespace: str, level: int, blocks: int, nbytes: int, raw_bytes: int) -> None:
        """Count first copies of new blocks; `nbytes`: their footprints. Mutates."""
        self.used[level] += nbytes
        self.held[namespace][level] += nbytes
        self.raw_bytes[level] += raw_bytes
        self.blocks[level] += blocks

    def add(self, row: int, level: int, location: Location, stored: Fidelity = Fidelity.EXACT) -> None:
        """One more copy, worth `stored`, is complete at a level. Mutates."""
        rows, bit, length = self.rows, 1 << level, location.length
        present = rows.present[row]
        assert present and not present & bit, f"row {row} is at level {level} already, or nowhere"
        before = self.family.stays(row)
        rows.present[row] = present | bit
        rows.segment[level][row], rows.offset[level][row] = location.segment, location.offset
        rows.length[level][row] = length
        rows.planes[level][row] = (1 << stored) - 1
        if stored != rows.stored(row):
            rows.settle_fidelity(row)
        granule = self._granules[level]
        footprint = -(-length // granule) * granule
        self.used[level] += footprint
        self._held_by[rows.space[row]][level] += footprint
        self.raw_bytes[level] += rows.raw[row]
        self.blocks[level] += 1
        if rows.parent[row] != NONE:
            self.family.moved(row, before, self.family.stays(row))
        policy = self.ranks[rows.secondary[row]][level]
        policy.admit(row, rows.ident(row), footprint, rows.above(row), rows.depth[row])
        self._ready(row)

    def drop(self, row: int, level: int, *, evicted: bool = True, force: bool = False) -> Location:
        """A copy is given up; where it lay. With the last copy the block is gone and its subtree next in line. Pinned
        blocks keep theirs unless `force` (purge, corruption: the bytes stay until their holds end). Mutates."""
        rows, bit = self.rows, 1 << level
        present, leaving = rows.present[row], rows.leaving[row]
        assert present & bit, f"row {row} is not at level {level}"
        assert force or not rows.pins[row], f"row {row} is pinned"
        child_of = rows.parent[row] != NONE
        before = self.family.stays(row) if child_of else 0
        location = rows.location(row, level)
        granule = self._granules[level]
        footprint = -(-location.length // granule) * granule
        self.used[level] -= footprint
        if leaving & bit:
            self.leaving_bytes[level] -= footprint
            rows.leaving[row] = leaving & ~bit
        else:
            self._held_by[rows.space[row]][level] -= footprint
        rows.present[row] = present = present & ~bit
        self.raw_bytes[level] -= rows.raw[row]
        self.blocks[level] -= 1
        self.ranks[rows.secondary[row]][level].remove(row, evicted=evicted)
        if child_of:
            self.family.moved(row, before, self.family.stays(row) if present else 0)
        if not present:
            self._remove(row)
        elif rows.planes[top_of(present)][row] != ALL_PLANES:
            rows.settle_fidelity(row)
        return location

    def replace_header(self, row: int, header: Header) -> None:
        """The same copy, now with the header of its record; what it is worth its levels say. Mutates."""
        self.rows.set_header(row, header)
        self.rows.settle_fidelity(row)

    def policies_of(self, row: int) -> tuple[Policy, ...]:  # of the levels where it lies
        return self._at[self.rows.secondary[row]][self.rows.present[row]]

    def touch(self, row: int) -> None:
        """It was used. Mutates."""
        for policy in self.policies_of(row):
            policy.touch(row)

    def mark_secondary(self, row: int, yes: bool) -> None:
        """Enough others keep a copy (`yes`), or the fleet may have no other. Idempotent. Mutates.

        A mark is the block's, at every level, until it is taken back or the block is gone.
        """
        rows = self.rows
        assert not rows.gone[row] and rows.present[row], f"row {row} is no block"
        if rows.secondary[row] == yes:
            return
        left, came = self.ranks[not yes], self.ranks[yes]
        for level, rule in enumerate(self.levels):
            if rows.present[row] >> level & 1:
                left[level].remove(row, evicted=False)
                nbytes = rule.footprint(rows.length[level][row])
                came[level].admit(row, rows.ident(row), nbytes, rows.above(row), rows.depth[row])
        rows.secondary[row] = yes

    def pin(self, row: int) -> None:
        """Keep every copy where it is. Counted. Mutates."""
        assert not self.rows.gone[row]
        self.rows.pins[row] += 1

    def unpin(self, row: int) -> None:
        """Mutates."""
        pins = self.rows.pins
        assert pins[row] > 0, f"row {row} is unpinned more often than pinned"
        pins[row] -= 1
        if not pins[row]:
            self.settle(row)

    def work(self, row: int, writing: int | None = None) -> None:
        """Bytes are moving for this row (to level `writing`): it is not reused until `done`. Mutates."""
        self.rows.busy[row] += 1
        if writing is not None:
            self.rows.writing[row] |= 1 << writing

    def done(self, row: int, writing: int | None = None) -> None:
        """Undo one `work`. Mutates."""
        assert self.rows.busy[row] > 0
        self.rows.busy[row] -= 1
        if writing is not None:
            self.rows.writing[row] &= ~(1 << writing)
        self.settle(row)

    def leave(self, row: int, level: int) -> None:
        """Its copy there is being moved down: no victim any more, still readable. Mutates."""
        assert self.staying(row, level), f"row {row} is not at level {level}, or leaving already"
        self._turn(row, level, 1)

    def stay(self, row: int, level: int) -> None:
        """The move failed, or the block was pinned meanwhile. Mutates."""
        assert self.rows.leaving[row] >> level & 1, f"row {row} is not leaving level {level}"
        self._turn(row, level, -1)
        self._ready(row)

    def _turn(self, row: int, level: int, sign: int) -> None:
        before = self.family.stays(row)
        self.rows.leaving[row] ^= 1 << level
        footprint = sign * self.levels[level].footprint(self.rows.length[level][row])
        self.leaving_bytes[level] += footprint
        self._held_by[self.rows.space[row]][level] -= footprint
        self.family.moved(row, before, self.family.stays(row))

    def space(self, namespace: str, header: Header) -> int:
        """The number of a (namespace, shard), made on first use. Mutates."""
        space = self._spaces.get((namespace, header.shard))
        if space is None:
            space = self._spaces[namespace, header.shard] = len(self.names)
            self.names.append((namespace, header.shard))
            self._kin.setdefault(namespace, []).append(space)
            self._held_by.append(self.held.setdefault(namespace, [0] * len(self.levels)))
            self._index.append(KeyTable(self.rows, space, self._expected))
            self.rows.describe(header.namespace, header.shard)
            self.family.orphans.append({})
        return space

    def settle(self, row: int) -> None:
        """Nobody may need it where it is any more. Mutates."""
        rows = self.rows
        if rows.pins[row] == 0 and rows.busy[row] == 0 and rows.gone[row]:
            rows.gone[row] = 0
            rows.give(row)
        elif not rows.gone[row] and not rows.pins[row]:
            self._ready(row)

    def _ready(self, row: int) -> None:
        for policy in self.policies_of(row):
            policy.ready(row)

    def _remove(self, row: int) -> None:
        """The last copy is gone: the row is free, or a zombie."""
        rows, key = self.rows, self.rows.key(row)
        self._index[rows.space[row]].remove(key, row)
        if rows.leaf_first[row]:
            self.family.part(row, rows.parent_key(row), key)
            if self.namespace(row) in self.free:
                bereave(self, row)
        rows.secondary[row] = 0
        if rows.pins[row] or rows.busy[row]:
            rows.gone[row] = 1
        else:
            rows.give(row)
