"""Which holder has which block, for one namespace. Soft state: a hint, rebuilt from what holders announce.

Blocks lie in one dict per (root, stored shard). A holder's entries belong to its current *life*, a small number, so a
dead or replaced holder is out of every answer at once by one flag; what it left behind is swept bit by bit by the
changes that follow. A snapshot is taken in beside the old life and takes its place in one step.

Memory: about 120 bytes an entry at a million entries in runs of 32 (a dict slot of 42 to 84 bytes, a key of 64, 8 in
its holder's log; the value is one int that all blocks of a run share). A block held by several costs a tuple more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.answers import Match, MatchRun, fewer, ranges
from kvstore.catalog import Catalog
from kvstore.entries import (
    FIDELITY_MASK,
    Entry,
    bytes_of,
    copies_of,
    copy_by,
    entry_of,
    fidelity_of,
    owner_of,
    pack,
    tier_of,
)
from kvstore.errors import BadRequest
from kvstore.keyspaces import Keyspaces, Table
from kvstore.lives import Life, Lives, Status
from kvstore.matching import longest
from kvstore.runs import Run
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier

__all__ = ["Copy", "Directory", "Match", "MatchRun"]

_VISIBLE = int(Status.VISIBLE)  # compared for every block of a lookup
_SWEEP_MIN = 64  # entries of dead lives swept with every change, beside two for each block changed


@dataclass(frozen=True, slots=True)
class Copy:
    """One holder of one block."""

    holder: str
    tier: Tier
    fidelity: Fidelity
    stored_bytes: int  # mean over the run it was announced with, to 7 significant bits


class _Usable(dict[Entry | None, int]):
    """entry -> 1 where it has a visible copy that is good enough. Remembers; good for one match."""

    def __init__(self, status: bytearray, least: Fidelity) -> None:
        super().__init__({None: 0})
        self.status = status
        self.least = least

    def copy_usable(self, copy: int) -> bool:
        return self.status[owner_of(copy)] == _VISIBLE and copy & FIDELITY_MASK >= self.least

    def __missing__(self, entry: Entry | None) -> int:
        self[entry] = usable = int(any(map(self.copy_usable, copies_of(entry))))
        return usable


class Directory:
    """Holders of the blocks of one namespace. Synchronous; every method but the queries mutates.

    `blocks_max` bounds the entries (a block counts once per holder and shard), `shards_max` the stored shards of one
    root, `copies_max` the holders an answer names per block (the fastest; never fewer than one). What exceeds a bound
    is left out and counted in `refused`; what names an unknown spec or shard is left out and counted in `skipped`.
    """

    def __init__(self, *, blocks_max: int = 20_000_000, shards_max: int = 256, copies_max: int = 16) -> None:
        self.blocks_max = blocks_max
        self.shards_max = shards_max
        self.copies_max = copies_max
        self.refused = 0
        self.skipped = 0
        self._catalog = Catalog()
        self._spaces = Keyspaces()
        self._lives = Lives()
        self._holders: dict[str, Life] = {}
        self._live = 0  # entries of current lives
        self._staged = 0  # entries of staged ones

    # The dictionary.

    def learn_spec(self, spec: ModelSpec) -> None:
        """Before the first run of its root. Idempotent. Overloaded beyond the catalog's bound."""
        self._catalog.learn_spec(spec)

    def learn_shard(self, shard: Shard) -> None:
        """Before the first run of its digest. Idempotent. Overloaded beyond the catalog's bound."""
        self._catalog.learn_shard(shard)

    def spec(self, root: bytes) -> ModelSpec | None:
        return self._catalog.spec(root)

    def shard(self, digest: bytes) -> Shard | None:
        return self._catalog.shard(digest)

    # Changes.

    def add(self, holder: str, run: Run) -> None:
        """The holder has these blocks; replaces what it said of them before (tier, fidelity, bytes). O(len(keys))."""
        life = self._life(holder)
        added = self._add(life, run, self.blocks_max - self._live)
        self._live += added

    def remove(self, holder: str, shard: bytes, keys: Iterable[bytes]) -> None:
        """The holder has these blocks no longer. Unknown ones are ignored. O(len(keys))."""
        life = self._holders.get(holder)
        if life is None:
            return
        keys = list(keys)
        for table in self._spaces.of_shard(shard):
            removed = sum(table.take(key, life.owner) for key in keys)
            life.live -= removed
            self._live -= removed
            self._spaces.discard_if_empty(table)
        life.compact()
        self.sweep(2 * len(keys) + _SWEEP_MIN)

    def replace(self, holder: str, runs: Iterable[Run]) -> None:
        """The holder has exactly these blocks. O(new blocks), whatever it had."""
        self.stage(holder)
        for run in runs:
            self.add_staged(holder, run)
        self.commit_staged(holder)

    def stage(self, holder: str) -> None:
        """Begin a replacement in pieces, which shows only once it is committed. An earlier one is void."""
        life = self._life(holder)
        self.abandon_staged(holder)
        life.staged = self._lives.new(holder, Status.STAGED)

    def add_staged(self, holder: str, run: Run) -> None:
        """`add` to the replacement. Nothing where none was begun."""
        life = self._holders.get(holder)
        if life is not None and life.staged is not None:
            others = self._live - life.live  # what is being replaced does not count against the bound
            self._staged += self._add(life.staged, run, self.blocks_max - others - self._staged)

    def commit_staged(self, holder: str) -> None:
        """The replacement takes the place of what was known, in one step. O(1). Nothing where none was begun."""
        life = self._holders.get(holder)
        if life is None or life.staged is None:
            return
        staged, life.staged = life.staged, None
        self._lives.status[staged.owner] = self._lives.status[life.owner]
        self._holders[holder] = staged
        self._staged -= staged.live
        self._live += staged.live - life.live
        self._bury(life)

    def abandon_staged(self, holder: str) -> None:
        """The replacement is void. O(1)."""
        life = self._holders.get(holder)
        if life is not None and life.staged is not None:
            staged, life.staged = life.staged, None
            self._staged -= staged.live
            self._bury(staged)

    def drop(self, holder: str) -> None:
        """Forget the holder: out of all answers at once, O(1); its memory comes back with later changes or `sweep`."""
        self.abandon_staged(holder)
        life = self._holders.pop(holder, None)
        if life is not None:
            self._live -= life.live
            self._bury(life)

    def hide(self, holder: str) -> None:
        """Out of all answers until `show` or `drop`, also what is added meanwhile. O(1)."""
        self._lives.status[self._life(holder).owner] = Status.HIDDEN

    def show(self, holder: str) -> None:
        """Undo `hide`. O(1)."""
        if holder in self._holders:
            self._lives.status[self._holders[holder].owner] = Status.VISIBLE

    def sweep(self, budget: int) -> int:
        """Let go of up to `budget` entries that dead lives left; returns how many may be left. For idle moments."""
        while budget > 0 and (batch := self._lives.next_batch(budget)) is not None:
            life, table, keys = batch
            for key in keys:
                table.take(key, life.owner)
            self._spaces.discard_if_empty(table)
            budget -= len(keys)
        return self._lives.left

    # Queries: pure.

    def match(self, root: bytes, keys: Sequence[bytes], shards: Sequence[Shard], least: Fidelity) -> Match:
        """The longest prefix of `keys` (depth 0 first) that the union of visible holders covers in every needed shard.

        By each group's rule, at `least` or better. `runs` names the holders of all blocks that this prefix needs (of a
        sliding window only the last ones): per stored shard that meets a needed one, the fastest tier first.
        BadRequest where a needed shard is no rectangle of the spec; a root nobody announced is a miss.
        """
        space = self._spaces.space(root)
        if space is None or not keys or not shards:
            return Match()
        plan = space.plan(tuple(shards))
        lookups = [table.blocks.get for table in space.tables]
        usable = _Usable(self._lives.status, least)

        rows: dict[int, list[Entry | None]] = {}  # each key is looked up once

        def entries(position: int, start: int, stop: int) -> list[Entry | None]:
            row = rows.setdefault(position, [])
            if stop > len(row):
                row.extend(map(lookups[position], keys[len(row) : stop]))
            return row[start:stop]

        def held(position: int, start: int, stop: int) -> bytes:
            row = entries(position, start, stop)
            if row and row.count(row[0]) == len(row):  # the common case, without a step per block
                return bytes((usable[row[0]],)) * len(row)
            return bytes(map(usable.__getitem__, row))

        blocks = longest(plan, held, len(keys))
        runs: list[MatchRun] = []
        for position, rule in plan.sources() if blocks else ():
            first = rule.first_needed(blocks)
            row = entries(position, first, blocks)
            found = ranges(space.tables[position].shard, row, first, usable.copy_usable, self._lives.name)
            runs += fewer(found, self.copies_max)
        return Match(blocks, runs)

    def holders(self, shard: bytes, key: bytes) -> list[Copy]:
        """Visible holders of one block, the fastest tier first."""
        found = [
            Copy(self._lives.name(owner_of(copy)), tier_of(copy), fidelity_of(copy), bytes_of(copy))
            for table in self._spaces.of_shard(shard)
            for copy in copies_of(table.blocks.get(key))
            if self._lives.status[owner_of(copy)] == Status.VISIBLE
        ]
        return sorted(found, key=lambda copy: (copy.tier, -copy.fidelity, copy.holder))

    def contents(self, holder: str) -> dict[tuple[bytes, bytes], tuple[Tier, Fidelity]]:
        """(shard digest, key) -> where and how: all that is known of one holder, hidden or not. O(its blocks)."""
        life = self._holders.get(holder)
        found: dict[tuple[bytes, bytes], tuple[Tier, Fidelity]] = {}
        if life is not None:
            for table, keys in life.log.items():
                for key in keys:
                    copy = copy_by(table.blocks.get(key), life.owner)
                    if copy is not None:
                        found[table.digest, key] = tier_of(copy), fidelity_of(copy)
        return found

    def names(self) -> list[str]:
        """Holders known, hidden ones too, in the order they were first heard of."""
        return list(self._holders)

    @property
    def blocks(self) -> int:
        """Entries: a block counts once per holder and shard, hidden holders included."""
        return self._live

    def validate(self) -> None:
        """AssertionError where an invariant is broken. O(everything)."""
        self._spaces.validate()
        current = list(self._holders.values())
        staged = [life.staged for life in current if life.staged is not None]
        self._lives.validate(current + staged)
        owned = dict.fromkeys((life.owner for life in [*current, *staged, *self._lives.dead]), 0)
        for table in self._spaces:
            logs = {life.owner: set(life.log.get(table, ())) for life in [*current, *staged, *self._lives.dead]}
            for key, entry in table.blocks.items():
                owners = [owner_of(copy) for copy in copies_of(entry)]
                assert owners and len(set(owners)) == len(owners), "an owner twice in one entry"
                for owner in owners:
                    assert key in logs[owner], "an entry that its owner's log does not know"
                    owned[owner] += 1
        for life in current + staged:
            assert owned[life.owner] == life.live <= life.logged, f"{life.name} is counted wrong"
            assert life.logged == sum(map(len, life.log.values())), f"the log of {life.name} is counted wrong"
        assert sum(life.live for life in current) == self._live <= self.blocks_max, "entries are counted wrong"
        assert sum(life.live for life in staged) == self._staged, "staged entries are counted wrong"

    # Inside.

    def _life(self, holder: str) -> Life:
        life = self._holders.get(holder)
        if life is None:
            life = self._holders[holder] = self._lives.new(holder, Status.VISIBLE)
        return life

    def _bury(self, life: Life) -> None:
        self._lives.bury(life)
        self.sweep(_SWEEP_MIN)

    def _add(self, life: Life, run: Run, room: int) -> int:
        """Entries that are new, at most `room`."""
        if self._lives.dead:
            self.sweep(2 * len(run.keys) + _SWEEP_MIN)
        table = self._table(run)
        if table is None:
            return 0
        copy = pack(life.owner, run.tier, run.fidelity, run.stored_bytes)
        blocks = table.blocks
        new: list[bytes] = []
        for key in run.keys:
            entry = blocks.get(key)
            if entry is None or copy_by(entry, life.owner) is None:
                if len(new) >= room:
                    self.refused += 1
                    continue
                new.append(key)
            blocks[key] = copy if entry is None else self._merged(entry, copy)
        if new:
            life.log.setdefault(table, []).extend(new)
            life.live += len(new)
            life.logged += len(new)
            life.compact()
        self._spaces.discard_if_empty(table)
        return len(new)

    def _merged(self, entry: Entry, copy: int) -> Entry:
        """The entry with the copy in place of its owner's earlier one, and without those of the dead."""
        status, owner = self._lives.status, owner_of(copy)
        kept = [c for c in copies_of(entry) if owner_of(c) != owner and status[owner_of(c)] != Status.DEAD]
        return entry_of([*kept, copy]) or copy

    def _table(self, run: Run) -> Table | None:
        """Where a run belongs. None, counted, where it can't be known or the bound of stored shards is reached."""
        table = self._spaces.table(run.root, run.shard)
        if table is not None:
            return table
        spec, shard = self._catalog.spec(run.root), self._catalog.shard(run.shard)
        if spec is None or shard is None or not _fits(shard, spec):
            self.skipped += len(run.keys)
            return None
        table = self._spaces.make(spec, shard, self.shards_max)
        if table is None:
            self.refused += len(run.keys)
        return table


def _fits(shard: Shard, spec: ModelSpec) -> bool:
    try:
        shard.check(spec)
    except BadRequest:
        return False
    return True
