"""Every copy of one block that a worker reaches, read and verified where it lies: what `kvstore inspect KEY` shows.

Moves, touches and admits nothing. A value in Redis that does not hold is removed there, as any read of it would do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.budget import Budget
from kvstore.checksum import xxh3
from kvstore.errors import Corrupt, DataError, TierDown
from kvstore.format import Record, expect
from kvstore.header import Header
from kvstore.spec import Shard
from kvstore.store.shared import FINDS_MAX
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location, TierStore
from kvstore.types import Tier


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy. `table`: 40 bytes a chunk, empty for raw bytes and what can't be read; `error`: empty if it holds."""

    tier: Tier
    raw: bool
    location: Location
    header: Header
    table: bytes = b""
    error: str = ""


@dataclass(slots=True)
class Inspected:
    """One block of a shard, the fastest copy first, Redis last. `header`: as the index of the worker has it."""

    shard: Shard
    header: Header
    copies: list[Copy] = field(default_factory=list)
    pins: int = 0
    secondary: bool = False
    moving: bool = False


class Copies:
    """One per store."""

    def __init__(self, stack: Stack, budget: Budget) -> None:
        self.stack = stack
        self.budget = budget  # bytes read at a time

    async def of(self, namespace: str, key: bytes, *, redis: bool) -> list[Inspected]:
        """The block under every shard that has it here, or in Redis. A tier that is down shows as an error."""
        residency, found = self.stack.residency, {}
        for digest in residency.presence(namespace, key):
            shard, row = self.stack.catalog.shard(digest), residency.find(namespace, digest, key)
            if shard is not None and row is not None:
                found[digest] = await self._here(namespace, shard, row)
        if redis:
            await self._shared(namespace, key, found)
        return list(found.values())

    async def _here(self, namespace: str, shard: Shard, row: int) -> Inspected:
        """From this worker's own tiers; pinned meanwhile, so that each copy stays where it is."""
        residency = self.stack.residency
        header = residency.header(row)
        moving = residency.busy(row)
        made = Inspected(shard, header, [], residency.rows.pins[row], residency.secondary(row), moving)
        residency.pin(row)
        try:
            for level, tier in enumerate(self.stack.tiers):
                if not residency.gone(row) and residency.present(row, level):
                    raw, location = residency.levels[level].raw, residency.location(row, level)
                    made.copies.append(await self._copy(tier, namespace, header, location, raw))
        finally:
            residency.unpin(row)
        return made

    async def _shared(self, namespace: str, key: bytes, found: dict[bytes, Inspected]) -> None:
        redis = self.stack.redis
        if redis is None:
            return
        shards = self.stack.catalog.shards()[:FINDS_MAX]
        entries = await redis.find_many(namespace, [(shard.digest, key) for shard in shards])
        for shard, entry in zip(shards, entries, strict=True):
            if entry is not None:
                header, location = entry
                block = found.setdefault(shard.digest, Inspected(shard, header))
                block.copies.append(await self._copy(redis, namespace, header, location, raw=False))

    async def _copy(self, tier: TierStore, namespace: str, header: Header, location: Location, raw: bool) -> Copy:
        """One copy read into memory of its own and checked."""
        if not 0 < location.length <= self.stack.config.block_bytes_max * 2:
            return Copy(tier.tier, raw, location, header, error=f"{location.length} bytes are no block")
        await self.budget.take(location.length, namespace)
        try:
            view = memoryview(bytearray(location.length))
            await tier.read(namespace, header, location, view)
            table = await self.stack.system.pool.run(_table, view, header, raw)
        except (DataError, TierDown) as error:
            return Copy(tier.tier, raw, location, header, error=str(error))
        finally:
            self.budget.give(location.length)
        return Copy(tier.tier, raw, location, header, table)


def _table(view: memoryview, header: Header, raw: bool) -> bytes:
    """Thread: the chunk table of what lies there. DataError unless it is that copy, whole."""
    if raw:
        if xxh3(view) != header.copy_id:
            raise Corrupt("the raw bytes do not have the checksum of their copy")
        return b""
    record = Record.parse(view)
    expect(record.header, header)
    record.verify()
    return record.table.tobytes()
