"""Watermarks: each tier is drained by its own capacity, from high to low and no further; what waits is bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvstore.types import Tier
from tests.store_fakes import FaultyTier
from tests.store_rig import KIB, SMALL, Rig, until

CHAIN = 4  # blocks of a session
BLOCK = 12 * KIB  # at most, as any tier counts it


@pytest.mark.parametrize(("hot", "ssd"), [(64, 256), (128, 1024), (256, 512)])
async def test_each_tier_drains_from_its_own_high_to_its_own_low_watermark(hot: int, ssd: int) -> None:
    """Tiers of very different sizes: a share of somebody else's capacity would empty one or overfill the other."""
    config = replace(SMALL, hot_bytes=hot * KIB)
    rig = Rig.make(config=config, ssd=FaultyTier(Tier.SSD, ssd * KIB), redis=FaultyTier(Tier.REDIS))
    await rig.start()
    residency = rig.store.stack.residency
    drained = [0 for _ in residency.levels]
    for number in range(400):
        before = list(residency.used)
        assert (await rig.put(number % CHAIN, number // CHAIN)).state == "committed"
        await rig.store.idle()
        for level, rule in enumerate(residency.levels):
            now = residency.used[level]
            assert now <= config.high_watermark * rule.capacity, f"{rule.tier.name} is over its watermark and rests"
            if now < before[level]:
                drained[level] += 1
                assert now > config.low_watermark * rule.capacity - 2 * BLOCK, f"{rule.tier.name} was drained too far"
    assert all(drained), f"not every tier crossed its watermark: {drained}"
    assert not rig.store.counters.get("evicted")
    await rig.close()


async def test_what_is_on_its_way_down_is_bounded_and_stores_give_way_to_loads() -> None:
    """The tier below hangs: moves stop at `spill_queue_bytes`, puts are dropped, and a load of what lies below still
    finds room and is served as soon as it is given: it waits for no store."""
    config = replace(SMALL, spill_queue_bytes=40 * KIB)
    ssd = FaultyTier(Tier.SSD)
    rig = Rig.make(config=config, ssd=ssd)
    await rig.start()
    for number in range(120):
        assert (await rig.put(number % CHAIN, number // CHAIN)).state == "committed"
        await rig.store.idle()
    below = [number for number in range(120) if rig.where(number % CHAIN, number // CHAIN) == [Tier.SSD]]
    ssd.gate = asyncio.Event()
    reads, moving, number = ssd.reads, 0, 120
    while moving < 3:  # host has room yet: it has only just crossed its watermark
        assert (await rig.put(number % CHAIN, number // CHAIN)).state == "committed"
        number += 1
        for _ in range(20):
            await asyncio.sleep(0)
        moving = sum(map(bool, rig.store.stack.residency.rows.leaving))
    loading = asyncio.ensure_future(rig.get(below[0] % CHAIN, below[0] // CHAIN))
    await until(rig, lambda: ssd.reads > reads)
    states = []
    puts = [asyncio.ensure_future(rig.put(at % CHAIN, at // CHAIN)) for at in range(number, number + 120)]
    for _ in range(2000):
        await asyncio.sleep(0)
        assert rig.store.movement.moving_bytes <= config.spill_queue_bytes + BLOCK
    waiting = sum(not put.done() for put in puts)
    assert waiting and waiting * 8 * KIB <= config.spill_queue_bytes, f"{waiting} puts wait for room"
    ssd.gate.set()
    assert await loading == rig.raw(below[0] % CHAIN, below[0] // CHAIN)
    states = [(await put).state for put in puts]
    assert states.count("dropped") > 60 and states.count("committed") > 0
    await rig.close()
