"""Opening: blocks pinned where readers can map them, loaded first where they lie below."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.store.holds import Hold, Holds
from kvstore.store.loading import Loading
from kvstore.store.movement import Movement
from kvstore.store.promotion import Promotion
from kvstore.store.stack import Stack
from kvstore.types import BlockId, Fidelity


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
        stack, residency = self.stack, self.stack.residency
        hold = Hold(self.holds.begin(), [None] * len(wanted))
        try:
            away, used = list[int](), list[int]()
            for index, (shard, key) in enumerate(wanted):
                row = residency.find(namespace, shard, key)
                good = row is not None and residency.fidelity(row) >= least
                if row is not None and good:
                    used.append(row)
                if row is not None and good and stack.mapped(row, least) is not None:
                    if residency.rows.root_of(row) == root:
                        hold.blocks[index] = self.holds.take(hold.id, row, least)
                elif good or (redis and self.stack.redis is not None):
                    away.append(index)
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
        mapped, same = self.stack.mapped(found.row, least), residency.rows.root_of(found.row) == root
        if same and mapped is not None and self.holds.alive(hold.id):
            hold.blocks[index] = self.holds.take(hold.id, found.row, least, found.tier, pinned=True)
        else:
            residency.unpin(found.row)

    def _served(self, hold: Hold, wanted: Sequence[tuple[bytes, bytes]], namespace: str, root: bytes) -> None:
        """Count, and promote what lies below."""
        residency = self.stack.residency
        missed = raw_bytes = 0
        for placed in hold.blocks:
            if placed is None:
                missed += 1
                continue
            self.stack.hits[placed.tier] += 1
            raw_bytes += placed.header.raw_length
        self.stack.counters["misses"] += missed
        spec = self.stack.catalog.spec(root) if raw_bytes else None
        if spec is not None:  # a rank loads its part of a block: as many tokens as its bytes are of the whole block's
            self.stack.saved_tokens += spec.block_tokens * raw_bytes / sum(map(spec.group_bytes, spec.groups))
        for (shard, key), placed in zip(wanted, hold.blocks, strict=True):
            row = residency.find(namespace, shard, key) if placed is not None and not placed.raw else None
            if row is not None:
                self.promotion.promote(row)

    def release(self, hold_id: int) -> None:
        """End a hold. Idempotent."""
        if self.holds.end(hold_id):
            self.movement.nudge()
