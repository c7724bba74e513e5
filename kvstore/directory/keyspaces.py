"""The blocks of a directory: one table per (root, stored shard). Internal to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.directory.block_table import TABLES_MAX, BlockTable
from kvstore.directory.matching import Plan, make_plan
from kvstore.spec import ModelSpec, Shard

_PLANS_MAX = 64  # sets of needed shards remembered per keyspace


@dataclass(slots=True, eq=False)
class Table:
    """One stored shard of one keyspace; its blocks lie under `number`."""

    root: bytes
    shard: Shard
    digest: bytes  # of the shard
    number: int


@dataclass(slots=True)
class Keyspace:
    """The stored shards of one root. A plan's positions are those of `tables`."""

    spec: ModelSpec
    tables: list[Table] = field(default_factory=list)
    plans: dict[tuple[Shard, ...], Plan] = field(default_factory=dict)

    def plan(self, needed: tuple[Shard, ...]) -> Plan:
        """How the needed shards are covered by the stored ones, remembered. BadRequest as `make_plan`."""
        plan = self.plans.get(needed)
        if plan is None:
            plan = make_plan(self.spec, needed, [table.shard for table in self.tables])
            if len(self.plans) >= _PLANS_MAX:
                self.plans.clear()
            self.plans[needed] = plan
        return plan


class Keyspaces:
    """All tables. None is empty between two changes of a directory, so what is stored is what a plan sees."""

    def __init__(self, blocks: BlockTable) -> None:
        self._held = blocks.held_by  # int64, by number: blocks
        self._numbers: list[Table | None] = [None]  # None where free, and for 0, which is none
        self._free: list[int] = []
        self._spaces: dict[bytes, Keyspace] = {}
        self._tables: dict[tuple[bytes, bytes], Table] = {}  # (root, shard digest)
        self._by_shard: dict[bytes, list[Table]] = {}

    def space(self, root: bytes) -> Keyspace | None:
        return self._spaces.get(root)

    def table(self, root: bytes, digest: bytes) -> Table | None:
        return self._tables.get((root, digest))

    def of_shard(self, digest: bytes) -> Sequence[Table]:
        """The tables of a stored shard in all keyspaces: a copy, so that tables may go meanwhile."""
        return tuple(self._by_shard.get(digest, ()))

    def make(self, spec: ModelSpec, shard: Shard, shards_max: int) -> Table | None:
        """A new table, or None where the keyspace has `shards_max` already. Mutates."""
        space = self._spaces.get(spec.root)
        full = len(space.tables) >= shards_max if space is not None else shards_max < 1
        if full or (not self._free and len(self._numbers) > TABLES_MAX):
            return None
        if space is None:
            space = self._spaces[spec.root] = Keyspace(spec)
        if not self._free:
            self._free.append(len(self._numbers))
            self._numbers.append(None)
        number = self._free.pop()
        table = self._numbers[number] = Table(spec.root, shard, shard.digest, number)
        self._tables[table.root, table.digest] = table
        self._by_shard.setdefault(table.digest, []).append(table)
        space.tables.append(table)
        space.plans.clear()
        return table

    def named(self, number: int) -> Table:
        """The table of a number in use."""
        table = self._numbers[number]
        assert table is not None, "a block of a table that is gone"
        return table

    def discard_empty(self) -> None:
        """Mutates: tables without blocks go, and with them what plans know of them."""
        for number in np.flatnonzero(self._held[: len(self._numbers)] == 0).tolist():
            table = self._numbers[number]
            if table is not None:
                self._discard(table)

    def _discard(self, table: Table) -> None:
        self._numbers[table.number] = None
        self._free.append(table.number)
        del self._tables[table.root, table.digest]
        space, same_shard = self._spaces[table.root], self._by_shard[table.digest]
        space.tables.remove(table)
        space.plans.clear()
        if not space.tables:
            del self._spaces[table.root]
        same_shard.remove(table)
        if not same_shard:
            del self._by_shard[table.digest]

    @property
    def limit(self) -> int:
        """All numbers in use are below."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[Table]:
        return iter(self._tables.values())

    def validate(self) -> None:
        """AssertionError where an invariant is broken."""
        for (root, digest), table in self._tables.items():
            assert self._held[table.number], "an empty table was kept"
            assert self._numbers[table.number] is table, "a table under another's number"
            assert (table.root, table.digest) == (root, digest), "a table under another's name"
            assert table in self._spaces[root].tables and table in self._by_shard[digest], "a table is lost"
        assert sum(map(len, self._by_shard.values())) == len(self._tables), "a table by shard that is gone"
        assert sum(len(space.tables) for space in self._spaces.values()) == len(self._tables), "a table too many"
