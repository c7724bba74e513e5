"""The tiered store of one worker: blocks put, opened, looked up and purged over the whole stack.

All methods run on one event loop. Metadata changes only between two awaits; only bytes move concurrently, in
`System.pool`. Every failure of a tier becomes a miss, a dropped put or a block that stays where it was.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from kvstore.budget import Budget
from kvstore.catalog import Catalog
from kvstore.codec_rules import CodecRules
from kvstore.config import StoreConfig
from kvstore.directory.announce import Outbox
from kvstore.directory.answers import Match
from kvstore.directory.runs import Added, Run
from kvstore.errors import TierError
from kvstore.header import Header
from kvstore.operations.probe import Probe, ProbeOutcome
from kvstore.policies.base import prepare
from kvstore.policies.usage import Hint
from kvstore.policies.usage import Use as RequestUse
from kvstore.quotas import Quotas
from kvstore.residency.check import validate
from kvstore.residency.local_match import match
from kvstore.residency.snapshots import runs_held
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.store.adopting import Adopting, Adoption
from kvstore.store.changes import Changes, Subscriber
from kvstore.store.copies import Copies, Inspected
from kvstore.store.holds import Hold, Placed
from kvstore.store.loading import Loading
from kvstore.store.movement import Movement
from kvstore.store.opening import Opening
from kvstore.store.pins import Pins
from kvstore.store.promotion import Promotion
from kvstore.store.putting import Offer, PutOutcome, Putting
from kvstore.store.shared import Finder, SharedTier
from kvstore.store.stack import Stack
from kvstore.store.staging import Staging
from kvstore.tiers.base import Recovered, TierStats, TierStore
from kvstore.tiers.found import RecoveredRecords
from kvstore.types import Fidelity, Tier

__all__ = ["Hold", "Placed", "ProbeOutcome", "PutOutcome", "TieredStore"]

ANNOUNCE_QUEUE = 1 << 16

HAND_OVER_MAX = 100_000
"""Blocks of which a new policy is told in one go, in half a second; with more to take in the start waits for it."""


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes of one namespace in each local tier, pinned and staged; its puts dropped, and its blocks evicted, over its
    quotas."""

    tiers: Mapping[Tier, int]
    pinned: int
    staging: int
    dropped: int
    evicted: int


@dataclass(frozen=True, slots=True)
class Keepsake:
    """A block, and its worth: lesser first. Blocks of faster levels, then those used last, are worth more."""

    header: Header
    worth: tuple[int, int]


class TieredStore:
    """One per worker. `start`, then anything, `tick` at every heartbeat, `close`."""

    def __init__(
        self,
        system: System,
        config: StoreConfig,
        catalog: Catalog,
        *,
        ssd: TierStore | None,
        redis: SharedTier | None,
        holder: str = "",
        announce_queue: int = ANNOUNCE_QUEUE,
        quotas: Mapping[str, Quotas] | None = None,
        codecs: Mapping[str, CodecRules] | None = None,
    ) -> None:
        """`holder`: what `match` calls this worker. `announce_queue`: changes kept per namespace. `quotas`,
        `codecs`: of those namespaces that have their own."""
        self.system, self.config, self.catalog, self.holder = system, config, catalog, holder
        self.changes = Changes(announce_queue)
        self._finder = None if redis is None else Finder(redis)
        self.stack = Stack(system, config, catalog, self.changes, ssd=ssd, redis=redis, quotas=quotas, codecs=codecs)
        self.arena = self.stack.arena
        quota = self.stack.quota
        self.staging = Staging(
            system.memory, config.staging_total_bytes, bound=lambda namespace: quota.of(namespace).staging_bytes
        )
        self.movement = Movement(self.stack, self._finder)
        budget = Budget(config.load_queue_bytes)
        self.loading = Loading(self.stack, self.movement, self._finder, budget)
        self.promotion = Promotion(self.stack, self.movement, budget)
        self.putting = Putting(self.stack, self.movement)
        self.opening = Opening(self.stack, self.movement, self.loading, self.promotion)
        self.adopting = Adopting(self.stack, self.movement)
        self.pins = Pins(self.stack)
        self._copies = Copies(self.stack, budget)
        self._started: list[TierStore] = []
        self._learning: asyncio.Task[None] | None = None

    # ---- life

    async def start(self) -> None:
        """Open the tiers and take in what the SSD kept. SetupError; nothing stays open then."""
        redis = self.stack.redis
        if self.stack.policy != self.config.policy:
            self._learning = asyncio.get_running_loop().create_task(self._prepare_policy())
        try:
            for tier in (*self.stack.tiers, *([redis] if redis is not None else ())):
                recovered = await tier.start()
                self._started.append(tier)
                if self._learning is not None and len(recovered) > HAND_OVER_MAX:
                    await asyncio.shield(self._learning)
                self._take_in(recovered)
        except BaseException:
            await self.close()
            raise
        self.movement.growth.poke()
        self.movement.pump()
        self.putting.start()

    async def _prepare_policy(self) -> None:
        """The configured policy decides once what it needs is loaded; a worker that starts does not wait for it."""
        pool = self.system.pool if self.system.own_pool is None else self.system.own_pool(1)
        try:
            await pool.run(prepare, self.config.policy)
        finally:
            if pool is not self.system.pool:
                pool.close()
        self.stack.take_policy()

    def _take_in(self, recovered: Sequence[Recovered]) -> None:
        """What the SSD tier kept from an earlier process. Others learn of it by snapshot."""
        kept: Counter[str] = Counter()
        if isinstance(recovered, RecoveredRecords):
            kept = self.stack.take_in_all(recovered)
        else:
            for block in recovered:
                self.stack.take_in(block)
                kept[block.namespace] += 1
        for namespace, blocks in kept.items():
            self.changes.begin(namespace, blocks)

    async def close(self) -> None:
        """Stop all movement, flush the tiers, let go of all memory. What a slower tier has is found again."""
        learning, self._learning = self._learning, None
        if learning is not None:
            await learning
        await self.movement.close()
        await self.putting.close()
        await self.loading.close()
        await self.promotion.close()
        if self._finder is not None:
            await self._finder.close()
        self.opening.holds.end_all()
        self.pins.end_all()
        started, self._started = self._started, []
        for tier in reversed(started):
            await tier.close()
        self.staging.close_all()
        self.arena.close()

    async def tick(self) -> None:
        """The heartbeat: ends old holds and pins, lets tiers do their housekeeping, tries again what failed."""
        self.stack.counters["holds_expired"] += self.opening.holds.expire()
        self.stack.counters["pins_expired"] += self.pins.expire()
        ticks = [tier.tick() for tier in self._started]
        for error in await asyncio.gather(*ticks, return_exceptions=True):
            if isinstance(error, TierError):
                self.stack.counters["ticks_failed"] += 1
            elif error is not None:
                raise error
        self.movement.heartbeat()

    async def idle(self) -> None:
        """Return when nothing moves and nothing more would: for tests, drains and `validate`."""
        self.movement.pump()
        while any(part.busy for part in (self.movement, self.loading, self.promotion, self.putting, self.adopting)):
            await self.movement.room.progress()
            self.movement.pump()

    # ---- blocks

    async def put(
        self, namespace: str, spec: ModelSpec, shard: Shard, header: Header, source: memoryview
    ) -> PutOutcome:
        """Keep one block: `source` is copied into hot and checksummed in the same pass, then visible. Never raises for
        what a caller may have got wrong, nor for a tier; `source` may be reused when this returns."""
        return await self.putting.put(namespace, spec, shard, header, source)

    async def put_all(self, namespace: str, spec: ModelSpec, blocks: Sequence[Offer]) -> list[PutOutcome]:
        """`put` of each (shard, header, source), at one wait where there is room for them."""
        return await self.putting.put_all(namespace, spec, blocks)

    def adoption(self, namespace: str, spec: ModelSpec, shard: Shard) -> AbstractContextManager[Adoption]:
        """Blocks of one shard on their way in, as another worker has them: received where they will lie, visible once
        they are kept. Nobody may write to what it gave when it ends."""
        return self.adopting.adoption(namespace, spec, shard)

    def holds(self, namespace: str, shard: bytes, key: bytes) -> bool:
        """Whether any copy of a block is here. Pure."""
        return self.stack.residency.find(namespace, shard, key) is not None

    async def open(
        self,
        namespace: str,
        root: bytes,
        wanted: Sequence[tuple[bytes, bytes]],
        *,
        least: Fidelity,
        redis: bool = False,
    ) -> Hold:
        """(shard digest, key) blocks in the arena, held until `release` or `hold_max_s`; None for each that is not to
        be had. `redis`: look there too. Cancelled: nothing is held."""
        return await self.opening.open(namespace, root, wanted, least, redis=redis)

    def release(self, hold_id: int) -> None:
        """End a hold. Idempotent."""
        self.opening.release(hold_id)

    def match(
        self, namespace: str, root: bytes, keys: Sequence[bytes], shards: Sequence[Shard], least: Fidelity
    ) -> Match:
        """What this worker alone can serve, without Redis. BadRequest for a shard that is none of the spec. Pure."""
        return match(self.stack.residency, self.catalog, self.holder, namespace, root, keys, shards, least)

    def advise(self, namespace: str, wanted: Sequence[tuple[bytes, bytes]], use: RequestUse | None, hint: Hint) -> int:
        """What a caller knows of (shard digest, key) blocks of one prompt, root first; how many of them are here. With
        `use` a request begins that uses them. Mutates only what the policy knows."""
        residency, advice = self.stack.residency, self.stack.advice
        rows, deepest = list[int](), dict[bytes, int]()
        for shard, key in reversed(wanted):
            row = residency.find(namespace, shard, key)
            if row is not None:
                rows.append(row)
                deepest.setdefault(shard, row)
        if use is not None:
            advice.begin(use, rows, self.system.clock.monotonic())
        if hint != Hint():
            for row in deepest.values():
                advice.hint(row, hint)
        return len(rows)

    def purge(self, namespace: str, root: bytes | None = None) -> int:
        """Forget a namespace's blocks, or those of one model; how many. What readers hold stays until they let go."""
        residency = self.stack.residency
        rows = [row for row in residency.of(namespace) if root is None or residency.header(row).root == root]
        for row in reversed(rows):  # children first: a parent's removal looks at its whole subtree
            self.stack.remove(row)
        self.stack.counters["purged"] += len(rows)
        self.movement.nudge()
        return len(rows)

    def secondary(self, namespace: str, shard: bytes, keys: Sequence[bytes], yes: bool) -> int:
        """What a coordinator hints: other workers are to keep these blocks of a shard, so they leave here before others
        (`yes`); or not any more. How many of them are here. Mutates; a hint: a block that goes and comes again is
        unmarked."""
        residency = self.stack.residency
        found = [row for key in keys if (row := residency.find(namespace, shard, key)) is not None]
        for row in found:
            residency.mark_secondary(row, yes)
        return len(found)

    def unmark(self, blocks: int) -> int:
        """Take back up to so many marks of `secondary`; how many there were. Mutates. O(all rows), in C."""
        residency = self.stack.residency
        rows = np.flatnonzero(np.frombuffer(residency.rows.secondary, np.uint8))[:blocks].tolist()
        for row in rows:
            residency.mark_secondary(row, False)
        return len(rows)

    async def purge_shared(self, namespace: str, root: bytes | None = None) -> int:
        """The same in Redis, for all workers; how many. TierDown when it can't be reached."""
        return 0 if self.stack.redis is None else await self.stack.redis.purge(namespace, root)

    def snapshot(self, namespace: str) -> tuple[int, list[Added]]:
        """The number that the last change had, and everything held. Pure."""
        blocks = [self.stack.announced(row) for row in self.stack.residency.of(namespace)]
        return self.changes.outbox(namespace).head, blocks

    def keepsakes(self, namespace: str) -> Iterator[Keepsake]:
        """Blocks of a namespace with what they are worth, in no order, without those that others keep (`secondary`).
        Blocks may come and go between two steps."""
        residency = self.stack.residency
        for row in residency.of(namespace):
            here = residency.rows.used[row] and not residency.gone(row) and residency.namespace(row) == namespace
            if here and not residency.secondary(row):
                top = residency.top(row)
                yield Keepsake(residency.header(row), (top, -residency.policies[top].order(row)))

    def snapshot_runs(self, namespace: str) -> tuple[int, Iterator[Run]]:
        """The same as runs, of any number of blocks at once."""
        return self.changes.outbox(namespace).head, runs_held(self.stack.residency, namespace)

    def heads(self) -> dict[str, int]:
        """The last change's number of each namespace that ever had one."""
        return self.changes.heads()

    def outbox(self, namespace: str) -> Outbox:
        return self.changes.outbox(namespace)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """`callback(namespace, seq, change)` at every change; returns the way to end it."""
        return self.changes.subscribe(callback)

    def blocks(self, namespace: str) -> int:
        """Blocks held of one namespace."""
        residency = self.stack.residency
        return sum(len(residency.keys(namespace, shard)) for shard in residency.shards(namespace))

    def roomy(self, namespace: str) -> bool:
        """Whether one more block evicts nobody: the slowest local tier is below its high watermark, and the namespace
        below its quota of it. Pure."""
        residency, level = self.stack.residency, self.stack.REDIS - 1
        below = residency.used[level] < self.config.high_watermark * residency.levels[level].capacity
        return below and self.stack.quota.over(namespace, level, 1) <= 0

    def quotas(self, namespace: str) -> Quotas:
        """What bounds a namespace here, beside the worker's own bounds. Pure."""
        return self.stack.quota.of(namespace)

    def use(self, namespace: str) -> Use:
        """What a namespace has here at present. Pure."""
        residency, quota = self.stack.residency, self.stack.quota
        tiers: Counter[Tier] = Counter()
        for level, rule in enumerate(residency.levels):
            tiers[rule.tier] += quota.staying(namespace, level)
        return Use(
            dict(tiers),
            self.pins.pinned_bytes(namespace),
            self.staging.used_by(namespace),
            quota.dropped[namespace],
            quota.evicted[namespace],
        )

    def spend(self, namespace: str, nbytes: int) -> bool:
        """Whether the namespace's rate lets so many bytes out to another host now. Mutates."""
        return self.stack.quota.spend(namespace, nbytes)

    @property
    def counters(self) -> dict[str, int]:
        """What happened since the start, by name."""
        return dict(self.stack.counters)

    def stats(self) -> list[TierStats]:
        """One entry per tier, device pools together with the cpu pool; a tier that is not configured is `off`."""
        return self.stack.stats()

    async def inspect(self, namespace: str, key: bytes, *, redis: bool) -> list[Inspected]:
        """Every copy of a block, read and verified; `redis`: there too. TierDown when Redis can't be asked."""
        return await self._copies.of(namespace, key, redis=redis)

    async def probe(self, namespace: str) -> list[ProbeOutcome]:
        """Write a block through every tier and read it back."""
        return await Probe(self.stack, self.movement).run(namespace)

    def validate(self) -> None:
        """AssertionError unless residency, tiers and arena agree. When idle."""
        stack = self.stack
        validate(stack.residency)
        self.arena.validate()
        for level, tier in enumerate(stack.tiers):
            assert tier.used == stack.residency.used[level], f"{tier.tier.name}: {tier.used} bytes counted otherwise"
        arena_bytes = stack.hot.used + stack.host.used
        assert self.arena.used == arena_bytes + self.arena.limbo_bytes, "slots and tiers disagree"
