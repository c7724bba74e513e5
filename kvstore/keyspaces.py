"""The blocks of a directory: one table per (root, stored shard). Internal to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.entries import Entry, without
from kvstore.matching import Plan, make_plan
from kvstore.spec import ModelSpec, Shard

_PLANS_MAX = 64  # sets of needed shards remembered per keyspace


@dataclass(slots=True, eq=False)
class Table:
    """The blocks of one stored shard of one keyspace."""

    root: bytes
    shard: Shard
    digest: bytes  # of the shard
    blocks: dict[bytes, Entry] = field(default_factory=dict)

    def take(self, key: bytes, owner: int) -> bool:
        """Take one owner's copy out of an entry. Whether there was one. Mutates."""
        entry = self.blocks.get(key)
        if entry is None:
            return False
        rest = without(entry, owner)
        if rest is entry:
            return False
        if rest is None:
            del self.blocks[key]
        else:
            self.blocks[key] = rest
        return True


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

    def __init__(self) -> None:
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
        if space is None:
            space = self._spaces[spec.root] = Keyspace(spec)
        if len(space.tables) >= shards_max:
            return None
        table = Table(spec.root, shard, shard.digest)
        self._tables[table.root, table.digest] = table
        self._by_shard.setdefault(table.digest, []).append(table)
        space.tables.append(table)
        space.plans.clear()
        return table

    def discard_if_empty(self, table: Table) -> None:
        """Mutates; nothing where the table has blocks or is gone already."""
        if table.blocks or self._tables.get((table.root, table.digest)) is not table:
            return
        del self._tables[table.root, table.digest]
        space, same_shard = self._spaces[table.root], self._by_shard[table.digest]
        space.tables.remove(table)
        space.plans.clear()
        if not space.tables:
            del self._spaces[table.root]
        same_shard.remove(table)
        if not same_shard:
            del self._by_shard[table.digest]

    def __iter__(self) -> Iterator[Table]:
        return iter(self._tables.values())

    def validate(self) -> None:
        """AssertionError where an invariant is broken."""
        for (root, digest), table in self._tables.items():
            assert table.blocks, "an empty table was kept"
            assert (table.root, table.digest) == (root, digest), "a table under another's name"
            assert table in self._spaces[root].tables and table in self._by_shard[digest], "a table is lost"
        assert sum(map(len, self._by_shard.values())) == len(self._tables), "a table by shard that is gone"
        assert sum(len(space.tables) for space in self._spaces.values()) == len(self._tables), "a table too many"
