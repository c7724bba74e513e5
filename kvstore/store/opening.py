"""Opening: blocks pinned where readers can map them, loaded first where they lie below."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from kvstore.open_rows import FOUND
from kvstore.policies.usage import Rows
from kvstore.store.holds import Hold, Holds
from kvstore.store.loading import Loading
from kvstore.store.movement import Movement
from kvstore.store.promotion import Promotion
from kvstore.store.stack import Stack
from kvstore.store.together import find, prepared
from kvstore.types import BlockId, Fidelity, Keys, Tier
from kvstore.wanted import Pair, Wanted


class Opening:
    """One per store."""

    def __init__(self, stack: Stack, movement: Movement, loading: Loading, promotion: Promotion) -> None:
        self.stack = stack
        self.movement = movement
        self.loading = loading
        self.promotion = promotion
        self.holds = Holds(stack)

    async def open(
        self,
        namespace: str,
        root: bytes,
        wanted: Sequence[Pair],
        least: Fidelity,
        *,
        redis: bool,
    ) -> Hold:
        """(shard digest, key) blocks in the arena, held until `release` or `hold_max_s`; None for each that is not to
        be had. `redis`: look there too. Cancelled: nothing is held."""
        stack, wanted = self.stack, Wanted.of(wanted)
        hold = self.holds.begin(len(wanted))
        try:
            away = self._here(hold, namespace, root, wanted, least, redis and stack.redis is not None)
            if away:
                loads = [self._load(hold, index, namespace, root, wanted[index], least, redis) for index in away]
                for error in await asyncio.gather(*loads, return_exceptions=True):
                    if error is not None:
                        raise error
        except BaseException:
            self.holds.end(hold.id)
            self.movement.nudge()
            raise
        self._served(hold, wanted, namespace, root)
        return hold

    def _here(
        self, hold: Hold, namespace: str, root: bytes, wanted: Wanted, least: Fidelity, elsewhere: bool
    ) -> list[int]:
        """Take what lies in the arena; which of the others to load. `elsewhere`: also those not known here. Mutates."""
        stack = self.stack
        away, used, poor, at = list[int](), list[Rows](), 0, 0
        for shard, keys in wanted.groups:
            if prepared():
                taken = find(stack, namespace, shard, root, keys, least, hold.words[at : at + len(keys)])
                self.holds.keep(hold, range(at, at + len(keys)), taken)
                known, missing, refused = taken.known, taken.away(elsewhere), taken.poor
            else:
                known, missing, refused = self._one_by_one(hold, at, namespace, shard, root, keys, least, elsewhere)
            used.append(known)
            poor += refused
            away += [at + index for index in missing]
            at += len(keys)
        deepest_first = np.concatenate(used or [np.zeros(0, np.int64)])[
            ::-1
        ]  # so that no parent is older than its child
        stack.planes.opened(namespace, least, len(deepest_first) + poor)
        stack.advice.opened(deepest_first, stack.system.clock.monotonic())
        return away

    def _one_by_one(
        self, hold: Hold, first: int, namespace: str, shard: bytes, root: bytes, keys: Keys, least: Fidelity,
        elsewhere: bool,
    ) -> tuple[Rows, list[int], int]:  # fmt: skip
        """What `find` and `Holds.keep` do, until those are at hand: rows known, which are away, how many too poor."""
        stack, rows = self.stack, self.stack.residency.rows
        index, same_root = stack.residency.keys(namespace, shard), rows.known_root(root)
        away, known, poor = list[int](), list[int](), 0
        here: dict[int, tuple[list[int], list[int]]] = {}  # level -> (which of them, rows)
        for at, key in enumerate(keys):
            row = index.get(key)
            poor += row is not None and rows.fidelity[row] < least
            if row is None or rows.fidelity[row] < least:
                away += [at] * elsewhere
                continue
            known.append(row)
            level = stack.mapped(row, least)
            if level is None:
                away.append(at)
            elif rows.root[row] == same_root:
                mine = here.setdefault(level, ([], []))
                mine[0].append(first + at)
                mine[1].append(row)
        for level, mine in here.items():
            self.holds.take(hold, *mine, level)
        return np.array(known, np.int64), away, poor

    async def _load(
        self,
        hold: Hold,
        index: int,
        namespace: str,
        root: bytes,
        wanted: Pair,
        least: Fidelity,
        redis: bool,
    ) -> None:
        residency = self.stack.residency
        found = await self.loading.load(BlockId(namespace, *wanted), root, least, redis=redis)
        if found is None:
            return
        level, same = self.stack.mapped(found.row, least), residency.rows.root_of(found.row) == root
        if same and level is not None and self.holds.alive(hold.id):
            self.holds.take(hold, [index], [found.row], level, found.tier, pinned=True)
        else:
            residency.unpin(found.row)

    def _served(self, hold: Hold, wanted: Wanted, namespace: str, root: bytes) -> None:
        """Count, and promote what lies below."""
        residency, found = self.stack.residency, hold.rows[hold.rows["state"] == FOUND]
        for tier, count in enumerate(np.bincount(found["tier"]).tolist()):
            if count:
                self.stack.hits[Tier(tier)] += count
        raw_bytes = int(found["header"]["raw_length"].sum())
        self.stack.counters["misses"] += len(hold.rows) - len(found)
        spec = self.stack.catalog.spec(root) if raw_bytes else None
        if spec is not None:  # a rank loads its part of a block: as many tokens as its bytes are of the whole block's
            self.stack.saved_tokens += spec.block_tokens * raw_bytes / sum(map(spec.group_bytes, spec.groups))
        below = np.flatnonzero((hold.rows["state"] == FOUND) & (hold.rows["raw"] == 0)).tolist()
        rows = [residency.find(namespace, *wanted[at]) for at in below]
        self.promotion.promote([row for row in rows if row is not None])

    def release(self, hold_id: int) -> None:
        """End a hold. Idempotent."""
        if self.holds.end(hold_id):
            self.movement.nudge()
