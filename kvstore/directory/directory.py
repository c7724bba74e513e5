"""Which holder has which block, for one namespace. Soft state: a hint, rebuilt from what holders announce.

Blocks lie in one hash table of flat arrays (`block_table.py`), worked by compiled kernels: keys come packed from
the wire and go in as they are. A holder's copies belong to its current *life*, a small number, so a dead or replaced
holder is out of every answer at once by one flag; what it left behind is swept bit by bit by the changes that follow.
A snapshot is taken in beside the old life and takes its place in one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.catalog import Catalog
from kvstore.directory.answers import Match, MatchRun, fewer, ranges
from kvstore.directory.block_table import Array, BlockTable, key_array
from kvstore.directory.entries import bytes_of, fidelity_of, owner_of, pack, tier_of
from kvstore.directory.keyspaces import Keyspace, Keyspaces, Table
from kvstore.directory.lives import Life, Lives, Status
from kvstore.directory.matching import Plan, longest
from kvstore.directory.runs import RemovedRun, Run, RunChange
from kvstore.spec import ModelSpec, Shard
from kvstore.types import KEY_BYTES, Fidelity, Keys, Tier, pack_keys

__all__ = ["Copy", "Directory", "Match", "MatchRun"]

_SWEEP = 16  # slots looked at for each block changed while the dead have left copies
_LOOKED_AT = 4  # copies of a block that a lookup looks at, for each that the answer may name


@dataclass(frozen=True, slots=True)
class Copy:
    """One holder of one block."""

    holder: str
    tier: Tier
    fidelity: Fidelity
    stored_bytes: int  # mean over the run it was announced with, to 7 significant bits


class Directory:
    """Holders of the blocks of one namespace. Synchronous; every method but the queries mutates.

    `blocks_max` bounds the copies (a block counts once per holder and shard), `shards_max` the stored shards of one
    root, `copies_max` the holders an answer names per block (the fastest; never fewer than one). What exceeds a bound
    is left out and counted in `refused`; what names an unknown spec or shard is left out and counted in `skipped`.
    `seed`: a number that those who choose keys do not know.
    """

    def __init__(
        self, *, blocks_max: int = 20_000_000, shards_max: int = 256, copies_max: int = 16, seed: int = 0
    ) -> None:
        self.blocks_max = blocks_max
        self.shards_max = shards_max
        self.copies_max = copies_max
        self.refused = 0
        self.skipped = 0
        self._catalog = Catalog()
        self._blocks = BlockTable(blocks_max, seed)
        self._spaces = Keyspaces(self._blocks)
        self._lives = Lives(self._blocks)
        self._holders: dict[str, Life] = {}
        self._live = 0  # copies of current lives
        self._staged = 0  # copies of staged ones

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
        self.apply(holder, (run,))

    def remove(self, holder: str, shard: bytes, keys: Sequence[bytes]) -> None:
        """The holder has these blocks no longer. Unknown ones are ignored. O(len(keys))."""
        self.apply(holder, (RemovedRun(shard, keys),))

    def apply(self, holder: str, changes: Sequence[RunChange]) -> None:
        """`add` and `remove`, in order, in one go. O(blocks); a run costs about as much as 100 blocks."""
        if holder in self._holders or any(isinstance(change, Run) for change in changes):
            self._live += self._apply(self._life(holder), changes, self.blocks_max - self._live)

    def replace(self, holder: str, runs: Iterable[Run]) -> None:
        """The holder has exactly these blocks. O(new blocks), whatever it had."""
        self.stage(holder)
        self.add_staged(holder, *runs)
        self.commit_staged(holder)

    def stage(self, holder: str) -> None:
        """Begin a replacement in pieces, which shows only once it is committed. An earlier one is void."""
        life = self._life(holder)
        self.abandon_staged(holder)
        life.staged = self._lives.new(holder, Status.STAGED)

    def add_staged(self, holder: str, *runs: Run) -> None:
        """`add` to the replacement. Nothing where none was begun."""
        life = self._holders.get(holder)
        if life is not None and life.staged is not None:
            others = self._live - self._lives.owned(life)  # what is being replaced does not count against the bound
            self._staged += self._apply(life.staged, runs, self.blocks_max - others - self._staged)

    def commit_staged(self, holder: str) -> None:
        """The replacement takes the place of what was known, in one step. O(1). Nothing where none was begun."""
        life = self._holders.get(holder)
        if life is None or life.staged is None:
            return
        staged, life.staged = life.staged, None
        self._lives.status[staged.owner] = self._lives.status[life.owner]
        self._holders[holder] = staged
        self._staged -= self._lives.owned(staged)
        self._live += self._lives.owned(staged) - self._lives.owned(life)
        self._bury(life)

    def abandon_staged(self, holder: str) -> None:
        """The replacement is void. O(1)."""
        life = self._holders.get(holder)
        if life is not None and life.staged is not None:
            staged, life.staged = life.staged, None
            self._staged -= self._lives.owned(staged)
            self._bury(staged)

    def drop(self, holder: str) -> None:
        """Forget the holder: out of all answers at once, O(1); its memory comes back with later changes or `sweep`."""
        self.abandon_staged(holder)
        life = self._holders.pop(holder, None)
        if life is not None:
            self._live -= self._lives.owned(life)
            self._bury(life)

    def hide(self, holder: str) -> None:
        """Out of all answers until `show` or `drop`, also what is added meanwhile. O(1)."""
        self._lives.status[self._life(holder).owner] = Status.HIDDEN

    def show(self, holder: str) -> None:
        """Undo `hide`. O(1)."""
        if holder in self._holders:
            self._lives.status[self._holders[holder].owner] = Status.VISIBLE

    def sweep(self, budget: int) -> int:
        """Look at `budget` slots for what dead lives left; how many copies are left. For idle moments.

        Half a million slots take about a millisecond, and more where there is much to let go of.
        """
        if budget > 0 and self._lives.dead:
            self._blocks.sweep(budget)
            self._lives.reclaim()
            self._spaces.discard_empty()
        return self._blocks.dead

    # Queries: pure.

    def match(
        self,
        root: bytes,
        keys: Sequence[bytes],
        shards: Sequence[Shard],
        least: Fidelity,
        *,
        only: Iterable[str] | None = None,
    ) -> Match:
        """The longest prefix of `keys` (depth 0 first) that the union of visible holders covers in every needed shard.

        By each group's rule, at `least` or better. `runs` names the holders of all blocks that this prefix needs (of a
        sliding window only the last ones): per stored shard that meets a needed one, the fastest tier first.
        `only`: as if these were all the holders. BadRequest where a needed shard is no rectangle of the spec; a root
        nobody announced is a miss.
        """
        space = self._spaces.space(root)
        if space is None or not keys or not shards:
            return Match()
        plan = space.plan(tuple(shards))
        seen = (
            None if only is None else self._blocks.only(self._holders[id].owner for id in only if id in self._holders)
        )
        looked_at = _LOOKED_AT * self.copies_max
        only_source = plan.only_source()
        if only_source is not None:
            table = space.tables[only_source]
            blocks, spans = self._blocks.lookup(key_array(keys), table.number, least, looked_at, seen)
            return Match(blocks, fewer(ranges(table.shard, spans, self._lives.name), self.copies_max))
        blocks, slots = self._longest(space, plan, key_array(keys), least, seen)
        runs: list[MatchRun] = []
        for position, rule in plan.sources() if blocks else ():
            first = rule.first_needed(blocks)
            spans = self._blocks.spans(slots[position][first:blocks], first, least, looked_at, seen)
            runs += fewer(ranges(space.tables[position].shard, spans, self._lives.name), self.copies_max)
        return Match(blocks, runs)

    def _longest(
        self, space: Keyspace, plan: Plan, keys: Array, least: Fidelity, seen: Any
    ) -> tuple[int, dict[int, Array]]:
        """The length of the prefix, and by position of a stored shard the slots of its blocks."""
        slots: dict[int, Array] = {}
        flags: dict[int, Array] = {}

        def held(position: int, start: int, stop: int) -> bytes:
            known = len(slots.setdefault(position, np.empty(0, np.int64)))
            if stop > known:  # each key is looked up once
                more, usable = self._blocks.held(keys[known:stop], space.tables[position].number, least, seen)
                slots[position] = np.concatenate((slots[position], more))
                flags[position] = np.concatenate((flags[position], usable)) if known else usable
            return flags[position][start:stop].tobytes()

        blocks = longest(plan, held, len(keys))
        for position, _ in plan.sources() if blocks else ():
            held(position, 0, blocks)
        return blocks, slots

    def holders(self, shard: bytes, key: bytes) -> list[Copy]:
        """Visible holders of one block, the fastest tier first."""
        found = [
            Copy(self._lives.name(owner_of(copy)), tier_of(copy), fidelity_of(copy), bytes_of(copy))
            for table in self._spaces.of_shard(shard)
            for copy in self._blocks.copies(key_array((key,))[0], table.number)
        ]
        return sorted(found, key=lambda copy: (copy.tier, -copy.fidelity, copy.holder))

    def shares(self, shard: bytes, keys: Sequence[bytes]) -> dict[str, int]:
        """Holder -> bitmap of the blocks that it has, bit i for key i. Holders that are hidden too. O(len(keys))."""
        packed = key_array(keys)
        found: dict[str, int] = {}
        for table in self._spaces.of_shard(shard):
            for owner, bits in self._blocks.shares(packed, table.number).items():
                name = self._lives.name(owner)
                if self._is_current(name, owner):
                    found[name] = found.get(name, 0) | bits
        return found

    def _is_current(self, name: str, owner: int) -> bool:
        life = self._holders.get(name)
        return life is not None and life.owner == owner

    def contents(self, holder: str) -> dict[tuple[bytes, bytes], tuple[Tier, Fidelity]]:
        """(shard digest, key) -> where and how: all that is known of one holder, hidden or not. O(all blocks)."""
        life = self._holders.get(holder)
        if life is None:
            return {}
        return {
            (self._spaces.named(number).digest, key): (tier_of(copy), fidelity_of(copy))
            for number, key, copy in self._blocks.of_owner(life.owner)
        }

    def export(self, holder: str, keys_max: int = 4096) -> list[Run]:
        """All that is known of one holder, for another directory: runs of up to `keys_max` blocks in no order; their
        places in chains are not kept. O(all blocks)."""
        life = self._holders.get(holder)
        runs: list[Run] = []
        for number, copy, packed in self._blocks.alike(life.owner) if life is not None else ():
            table = self._spaces.named(number)
            kind = (tier_of(copy), fidelity_of(copy))
            for at in range(0, len(packed), keys_max * KEY_BYTES):
                keys = Keys(packed[at : at + keys_max * KEY_BYTES])
                runs.append(Run(table.root, table.digest, *kind, table.root, 0, keys, table.root, bytes_of(copy)))
        return runs

    def names(self) -> list[str]:
        """Holders known, hidden ones too, in the order they were first heard of."""
        return list(self._holders)

    @property
    def blocks(self) -> int:
        """Copies: a block counts once per holder and shard, hidden holders included."""
        return self._live

    @property
    def nbytes(self) -> int:
        """Memory that the blocks take, in bytes, within a huge page."""
        return self._blocks.nbytes

    def validate(self) -> None:
        """AssertionError where an invariant is broken. O(everything)."""
        self._spaces.validate()
        current = list(self._holders.values())
        staged = [life.staged for life in current if life.staged is not None]
        self._lives.validate(current + staged)
        self._blocks.validate(self._lives.limit, self._spaces.limit)
        assert sum(map(self._lives.owned, current)) == self._live <= self.blocks_max, "copies are counted wrong"
        assert sum(map(self._lives.owned, staged)) == self._staged, "staged copies are counted wrong"

    # Inside.

    def _life(self, holder: str) -> Life:
        life = self._holders.get(holder)
        if life is None:
            life = self._holders[holder] = self._lives.new(holder, Status.VISIBLE)
        return life

    def _bury(self, life: Life) -> None:
        self._lives.bury(life)
        self.sweep(1)

    def _apply(self, life: Life, changes: Iterable[RunChange], room: int) -> int:
        """How many copies more there are, at most `room`."""
        packed: list[bytes] = []
        runs: list[int] = []
        total = 0
        for change in changes:
            count = len(change.keys)
            if isinstance(change, Run):
                table = self._table(change, count)
                if table is None:
                    continue
                copy = pack(life.owner, change.tier, change.fidelity, change.stored_bytes)
                runs += (total, count, table.number, copy)
            else:
                for table in self._spaces.of_shard(change.shard):
                    runs += (total, count, table.number, 0)
            packed.append(pack_keys(change.keys))
            total += count
        if not runs:
            return 0
        new, removed, refused = self._blocks.apply(
            key_array(Keys(b"".join(packed))), np.array(runs, np.int64).reshape(-1, 4), life.owner, max(room, 0)
        )
        self.refused += refused
        if removed or refused:
            self._spaces.discard_empty()
        if self._lives.dead:
            self.sweep(_SWEEP * total)
        return new - removed

    def _table(self, run: Run, count: int) -> Table | None:
        """Where a run belongs. None, counted, where it can't be known or the bound of stored shards is reached."""
        table = self._spaces.table(run.root, run.shard)
        if table is not None:
            return table
        spec, shard = self._catalog.spec(run.root), self._catalog.shard(run.shard)
        if spec is None or shard is None or not shard.fits(spec):
            self.skipped += count
            return None
        table = self._spaces.make(spec, shard, self.shards_max)
        if table is None:
            self.refused += count
        return table
