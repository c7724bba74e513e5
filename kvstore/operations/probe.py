"""A block written through every tier and read back: what `doctor` asks of a worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kvstore.codecs import RAW
from kvstore.errors import Corrupt, KVStoreError, TierDown, TierFull
from kvstore.format import encode_record
from kvstore.header import Header
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.store.movement import Movement
from kvstore.store.stack import Stack
from kvstore.tiers.base import TierStore
from kvstore.types import Buffer, Tier

PROBE_SPEC = ModelSpec(model="kvstore-probe", groups=(Group(k_dim=64, v_dim=64),), dtype="uint8", block_tokens=16)
PROBE_S = 5.0
"""A tier that takes longer for one small block is as good as down."""


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """One tier. `fix` is one line that says what to do, empty where nothing is wrong."""

    tier: Tier
    ok: bool
    detail: str
    fix: str = ""


FIXES = {
    Tier.HOT: "raise host_bytes or hot_bytes, or wait until readers release their blocks",
    Tier.HOST: "raise host_bytes, or wait until readers release their blocks",
    Tier.SSD: "free space in the SSD folder, lower ssd_bytes, or mend the disk",
    Tier.REDIS: "start Redis or mend its address, then see that maxmemory leaves room for redis_bytes",
}


class Probe:
    """One per store."""

    def __init__(self, stack: Stack, movement: Movement) -> None:
        self.stack = stack
        self.movement = movement

    async def run(self, namespace: str) -> list[ProbeOutcome]:
        """Every configured tier in turn, the fastest first. The block is nobody's: it is never looked up."""
        stack = self.stack
        shard = Shard.whole(PROBE_SPEC)
        stack.catalog.learn_spec(PROBE_SPEC)
        stack.catalog.learn_shard(shard)
        stack.catalog.learn_namespace(namespace)
        raw = stack.system.rng.randbytes(PROBE_SPEC.group_bytes(PROBE_SPEC.groups[0]))
        key = stack.system.rng.randbytes(16)
        header = Header.new(namespace, PROBE_SPEC, shard, key=key, parent=PROBE_SPEC.root, group=key, depth=0)
        record, parts = encode_record(header, raw, PROBE_SPEC, shard, RAW)
        outcomes = []
        for level, tier in enumerate(stack.tiers):
            in_raw = stack.residency.levels[level].raw
            outcomes.append(await self._one(tier, level, namespace, record, [raw] if in_raw else parts))
        if stack.redis is not None:
            outcomes.append(await self._one(stack.redis, None, namespace, record, parts))
        return outcomes

    async def _one(
        self, tier: TierStore, level: int | None, namespace: str, header: Header, parts: list[Buffer]
    ) -> ProbeOutcome:
        fix = FIXES[tier.tier]
        try:
            async with asyncio.timeout(PROBE_S):
                await self._through(tier, level, namespace, header, parts)
        except TimeoutError:
            return ProbeOutcome(tier.tier, False, f"one block took more than {PROBE_S:.0f} s", fix)
        except (TierDown, TierFull, Corrupt) as error:
            stats = tier.stats()
            detail = stats.detail or str(error)
            return ProbeOutcome(tier.tier, False, f"{stats.state}: {detail}" if stats.state != "ok" else detail, fix)
        except KVStoreError as error:
            return ProbeOutcome(tier.tier, False, str(error), fix)
        stats = tier.stats()
        if stats.state not in ("ok", "degraded"):
            return ProbeOutcome(tier.tier, False, f"{stats.state}: {stats.detail}", fix)
        if stats.state == "degraded":
            return ProbeOutcome(tier.tier, True, stats.detail, fix)
        how = f" ({stats.detail})" if stats.detail else ""
        return ProbeOutcome(tier.tier, True, f"a block was written and read back{how}")

    async def _through(
        self, tier: TierStore, level: int | None, namespace: str, header: Header, parts: list[Buffer]
    ) -> None:
        """Write, read, compare, free. TierDown, TierFull, Corrupt."""
        nbytes = sum(memoryview(part).nbytes for part in parts)
        room, memory = self.movement.room, None if level is None else self.stack.arena_tier(level)
        if memory is not None and level is not None:
            place = await room.wait(level, namespace, nbytes, PROBE_S)
            if place is None:
                raise TierFull("all blocks there are held by readers, or can't be moved on")
            location = await memory.fill(namespace, header, place, parts)
        else:
            if level is not None:
                await room.come(level, nbytes)
            location = await tier.write(namespace, header, parts)
        try:
            back = memoryview(bytearray(nbytes))
            await tier.read(namespace, header, location, back)
        finally:
            tier.free(namespace, header, location)
        if back != b"".join(bytes(part) for part in parts):
            raise Corrupt("what was read back is not what was written")
