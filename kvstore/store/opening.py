"""Opening: blocks pinned where readers can map them, loaded first where they lie below."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from kvstore.open_rows import FOUND
from kvstore.store.holds import Hold, Holds
from kvstore.store.loading import Loading
from kvstore.store.movement import Movement
from kvstore.store.promotion import Promotion
from kvstore.store.stack import Stack
from kvstore.types import BlockId, Fidelity, Tier


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
        wanted: Sequence[tuple[bytes, bytes]],
        least: Fidelity,
        *,
        redis: bool,
    ) -> Hold:
        """(shard digest, key) blocks in the arena, held until `release` or `hold_max_s`; None for each that is not to
        be had. `redis`: look there too. Cancelled: nothing is held."""
        stack, rows = self.stack, self.stack.residency.rows
        hold = self.holds.begin(len(wanted))
        try:
            away, used, refused = list[int](), list[int](), 0
            here: dict[int, tuple[list[int], list[int]]] = {}  # level -> (which of them, rows)
            same_root = rows.known_root(root)
            last, index = b"", cast("Mapping[bytes, int]", {})
            for at, (shard, key) in enumerate(wanted):
                if shard != last:
                    last, index = shard, stack.residency.keys(namespace, shard)
                row = index.get(key)
                refused += row is not None and rows.fidelity[row] < least
                if row is None or rows.fidelity[row] < least:
                    if redis and stack.redis is not None:
                        away.append(at)
                    continue
                used.append(row)
                level = stack.mapped(row, least)
                if level is None:
                    away.append(at)
                elif rows.root[row] == same_root:
                    mine = here.setdefault(level, ([], []))
                    mine[0].append(at)
                    mine[1].append(row)
            for level, mine in here.items():
                self.holds.take(hold, *mine, level)
            stack.planes.opened(namespace, least, len(used) + refused)
            used.reverse()  # the deepest first, so that no parent is older than its child
            stack.advice.opened(used, stack.system.clock.monotonic())
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

    async def _load(
        self,
        hold: Hold,
        index: int,
        namespace: str,
        root: bytes,
        wanted: tuple[bytes, bytes],
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

    def _served(self, hold: Hold, wanted: Sequence[tuple[bytes, bytes]], namespace: str, root: bytes) -> None:
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
