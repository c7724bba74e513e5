"""`inspect` of a block: every copy that a store reaches, read and verified, and nothing changed by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from kvstore.errors import TierDown
from kvstore.format import ENTRY_DTYPE
from kvstore.spec import Shard
from kvstore.store.copies import Copy
from kvstore.types import Tier
from tests.contracts.records import NAMESPACE
from tests.store_fakes import FaultyTier
from tests.store_rig import Rig, filled, until
from tests.test_store_groups import HALVES, SPEC


@pytest.fixture
def ssd() -> FaultyTier:
    return FaultyTier(Tier.SSD, 4 << 20)


@pytest.fixture
def redis() -> FaultyTier:
    return FaultyTier(Tier.REDIS, 64 << 20)


@pytest.fixture
async def rig(ssd: FaultyTier, redis: FaultyTier) -> AsyncIterator[Rig]:
    rig = Rig.make(ssd=ssd, redis=redis)
    await rig.store.start()
    yield rig
    await rig.close()


async def copies(rig: Rig, depth: int, *, redis: bool = False, namespace: str = NAMESPACE) -> list[Copy]:
    found = await rig.store.inspect(namespace, rig.key(depth), redis=redis)
    assert len(found) <= 1
    return [copy for block in found for copy in block.copies]


def tiers(found: list[Copy]) -> list[Tier]:
    return [copy.tier for copy in found]


async def test_every_copy_in_the_order_of_the_tiers(rig: Rig) -> None:
    below = await filled(rig)
    assert await rig.get(below[0]) == rig.raw(below[0])  # now in memory too
    await rig.settle()
    for depth in (*below[:3], 110, 119):
        found = await copies(rig, depth)
        assert tiers(found) == rig.where(depth) != [] and not any(copy.error for copy in found)
        for copy in found:
            assert copy.header.key == rig.key(depth) and copy.raw == (copy.tier == Tier.HOT)
            chunks = np.frombuffer(copy.table, ENTRY_DTYPE)
            assert len(chunks) == (0 if copy.raw else copy.header.chunk_count)
            assert int(chunks["raw"].sum()) == (0 if copy.raw else copy.header.raw_length)
    assert len(await copies(rig, below[0])) > 1
    assert await copies(rig, below[0], namespace="another") == [] and await copies(rig, 500) == []


async def test_nothing_is_changed_by_looking(rig: Rig) -> None:
    below = await filled(rig)
    where = [rig.where(depth) for depth in range(120)]
    victims = [rig.store.stack.residency.victim(level) for level in range(3)]
    for depth in (below[0], below[-1], 119):
        await copies(rig, depth, redis=True)
    assert [rig.where(depth) for depth in range(120)] == where
    assert [rig.store.stack.residency.victim(level) for level in range(3)] == victims


@pytest.mark.parametrize("damage", ["flip", "other", "corrupt", "shorten"])
async def test_a_damaged_copy_says_what_is_wrong(rig: Rig, ssd: FaultyTier, damage: str) -> None:
    below = await filled(rig)
    ssd.damage = damage
    found = await copies(rig, below[0])
    ssd.damage = ""
    assert ssd.landed == 1 and tiers(found) == [Tier.SSD] and found[0].error and found[0].table == b""
    assert rig.where(below[0]) == [Tier.SSD], "looking is not judging"


async def test_raw_bytes_are_checked_too(rig: Rig) -> None:
    await rig.put(0)
    hold = await rig.open([0])
    placed = hold.blocks[0]
    assert placed is not None
    placed.segment.view[placed.offset] ^= 1
    rig.store.release(hold.id)
    assert ["checksum" in copy.error for copy in await copies(rig, 0)] == [True]


async def test_redis_and_tiers_that_are_down(rig: Rig, ssd: FaultyTier, redis: FaultyTier) -> None:
    below = await filled(rig)
    record = ssd.kept[max(ssd.kept)]
    redis.kept[1] = record
    redis.used = redis.footprint(len(record[2]))
    depth = record[1].depth
    assert tiers(await copies(rig, depth, redis=True)) == [*rig.where(depth), Tier.REDIS]
    rig.store.purge(NAMESPACE)
    found = await copies(rig, depth, redis=True)
    assert tiers(found) == [Tier.REDIS] and not found[0].error, "a block that no worker holds"
    redis.damage = "flip"
    assert (await copies(rig, depth, redis=True))[0].error
    redis.down = True
    with pytest.raises(TierDown):
        await copies(rig, depth, redis=True)
    assert redis.landed == 2 and depth in {*below, *range(120)}


async def test_a_purge_in_the_middle(rig: Rig, ssd: FaultyTier) -> None:
    below = await filled(rig)
    ssd.gate = asyncio.Event()
    looking = asyncio.ensure_future(copies(rig, below[0]))
    await until(rig, lambda: ssd.reads == 1)
    rig.store.purge(NAMESPACE)
    ssd.gate.set()
    assert [copy.error for copy in await looking] == ["it was freed"]
    await rig.settle()


async def test_each_group_by_itself() -> None:
    rig = Rig.make(spec=SPEC)
    await rig.store.start()
    for shard in (HALVES[0][0], HALVES[1][1]):
        await rig.put(0, shard=shard)
    residency, key = rig.store.stack.residency, rig.key(0)
    assert residency.presence(NAMESPACE, key) == {HALVES[0][0].digest: 1, HALVES[1][1].digest: 1}
    assert residency.presence("another", key) == {}
    hold = await rig.open([0], shard=HALVES[1][1])
    rig.store.secondary(NAMESPACE, HALVES[0][0].digest, [key], True)
    found = {block.shard: block for block in await rig.store.inspect(NAMESPACE, key, redis=True)}
    assert set(found) == {HALVES[0][0], HALVES[1][1]} and isinstance(next(iter(found)), Shard)
    assert (found[HALVES[0][0]].pins, found[HALVES[1][1]].pins) == (0, 1)
    assert found[HALVES[0][0]].secondary and not found[HALVES[1][1]].secondary
    rig.store.release(hold.id)
    await rig.close()
