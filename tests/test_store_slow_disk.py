"""A store over a disk that hangs, fills up, fails in the middle of spilling, or is to be spared: the rest goes on,
nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import threading
from dataclasses import replace

import pytest

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.store.tiered import TieredStore
from kvstore.tiers.base import TierStats
from kvstore.tiers.ssd import SsdTier
from kvstore.types import Tier
from tests.memdisk import MemoryDisk
from tests.store_leaks import emptied
from tests.store_rig import KIB, SMALL, Rig

CONFIG = replace(
    SMALL,
    ssd_folder="log",
    ssd_bytes=8 << 20,
    spill_queue_bytes=64 * KIB,
    put_wait_s=0.1,
    threads=2,
    evict_after_s=600.0,
)
BLOCK = 8 * KIB


class HangingDisk(MemoryDisk):
    """Reads, writes and syncs wait while `moving` is not set; `held` counts those that did."""

    def __init__(self) -> None:
        super().__init__()
        self.moving = threading.Event()
        self.moving.set()
        self.held = 0

    def _check(self, operation: str) -> None:
        if operation in ("read", "write", "sync") and not self.moving.is_set():
            self.held += 1
            assert self.moving.wait(30), "the test forgot the disk"
        super()._check(operation)


def rig_over(disk: MemoryDisk, system: System, config: StoreConfig = CONFIG) -> Rig:
    system, catalog = replace(system, disk=lambda folder: disk), Catalog()
    rig = Rig.make(config=config, system=system, catalog=catalog)
    rig.store = TieredStore(system, config, catalog, ssd=SsdTier(system, config, catalog), redis=None)
    return rig


async def put_some(rig: Rig, count: int, session: int) -> list[int]:
    """The depths that were committed."""
    states = {depth: (await rig.put(depth, session)).state for depth in range(count)}
    assert set(states.values()) <= {"committed", "dropped"}
    return [depth for depth, state in states.items() if state == "committed"]


def ssd_stats(rig: Rig) -> TierStats:
    return next(stats for stats in rig.store.stats() if stats.tier == Tier.SSD)


async def check(rig: Rig, kept: dict[int, list[int]], *, memory_only: bool = False) -> None:
    """All that was committed is there and everything agrees. `memory_only`: read only what needs no room."""
    for session, depths in kept.items():
        for depth in depths:
            tiers = rig.where(depth, session)
            assert tiers, "a committed block is gone"
            if not memory_only or tiers[0] != Tier.SSD:
                assert await rig.get(depth, session) == rig.raw(depth, session)
    await rig.store.idle()
    rig.store.validate()


async def put_one_by_one(rig: Rig, count: int, session: int) -> list[int]:
    """The same, each when nothing moves any more: none is dropped, however slow this machine is."""
    for depth in range(count):
        assert (await rig.put(depth, session)).state == "committed"
        await rig.store.idle()
    return list(range(count))


async def until_every_writer_hangs(rig: Rig, disk: HangingDisk) -> list[int]:
    """Put blocks, each when hot has nothing on its way to host and what leaves host is held at the disk, until all of
    the disk's writers are: so host is just over its watermark then, and has room for a load, however slow this machine
    is. The depths of session 1 that were committed."""
    residency, kept = rig.store.stack.residency, list[int]()
    async with asyncio.timeout(60):
        while disk.held < CONFIG.threads:
            assert (await rig.put(len(kept), 1)).state == "committed"
            kept.append(len(kept))
            leaving = residency.leaving_bytes
            while leaving[rig.store.stack.HOT] or (leaving[rig.store.stack.HOST] and not disk.held):
                await asyncio.sleep(0.001)
            moving = sum(map(bool, residency.rows.leaving))
            while disk.held < min(moving, CONFIG.threads):
                await asyncio.sleep(0.001)
    return kept


async def test_a_disk_that_hangs_holds_up_nobody_else(no_leaks: None) -> None:
    disk, system = HangingDisk(), real_system(2)
    rig = rig_over(disk, system)
    await rig.store.start()
    kept = {0: await put_one_by_one(rig, 80, 0)}
    below = [depth for depth in kept[0] if rig.where(depth) == [Tier.SSD]]
    disk.moving.clear()
    try:
        kept[1] = await until_every_writer_hangs(rig, disk)
        await while_it_hangs(rig, disk, kept[1], below)
    finally:
        disk.moving.set()
    await check(rig, kept)
    await emptied(rig.store)
    await rig.store.close()
    system.pool.close()


async def while_it_hangs(rig: Rig, disk: HangingDisk, kept: list[int], below: list[int]) -> None:
    loading = asyncio.ensure_future(rig.get(below[0]))
    async with asyncio.timeout(20):
        while disk.held == CONFIG.threads:  # the load reaches the disk all the same
            assert not loading.done(), "the load found no room, or was not a hit"
            await asyncio.sleep(0.001)
    for depth in range(len(kept), 120):  # as many as memory takes while nothing leaves it
        state = (await rig.put(depth, 1)).state
        assert rig.store.movement.moving_bytes <= CONFIG.spill_queue_bytes + BLOCK
        if state == "dropped":
            break
        kept.append(depth)
    assert disk.held > CONFIG.threads and len(kept) < 120, "nothing was on its way to the disk, or puts wait for ever"
    async with asyncio.timeout(20):
        for depth in kept[-8:]:
            assert await rig.get(depth, 1) == rig.raw(depth, 1), "a hit in memory waits for the disk"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await rig.get(below[1])
    disk.moving.set()
    assert await loading == rig.raw(below[0])


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
async def test_a_disk_that_refuses_in_the_middle_of_spilling(fault: str, no_leaks: None) -> None:
    disk, system = MemoryDisk(), real_system(2)
    rig = rig_over(disk, system)
    await rig.store.start()
    kept = {0: await put_some(rig, 90, 0)}
    await rig.store.idle()
    blocks = ssd_stats(rig).blocks
    if fault == "ENOSPC":
        disk.capacity = disk.used() + 40_000
    else:
        disk.failing = {"write": errno.EIO, "replace": errno.EIO}
    kept[1] = await put_some(rig, 60, 1)
    assert disk.landed.get("full", 0) + disk.landed.get("write", 0) > 0, "no write met the fault"
    await rig.store.idle()
    stats = ssd_stats(rig)
    assert stats.state == ("full" if fault == "ENOSPC" else "down") and stats.detail and stats.errors
    assert not rig.store.counters.get("evicted") and blocks <= stats.blocks <= blocks + 6
    await check(rig, kept, memory_only=True)
    disk.capacity, disk.failing = None, {}
    async with asyncio.timeout(20):
        while ssd_stats(rig).state != "ok":
            await rig.store.tick()
            await asyncio.sleep(0.01)
    kept[2] = await put_some(rig, 60, 2)
    await rig.store.idle()
    assert ssd_stats(rig).blocks > stats.blocks + 10 and len(kept[2]) == 60, "it does not take blocks again"
    await check(rig, kept)
    await emptied(rig.store)
    await rig.store.close()
    system.pool.close()


async def test_a_disk_that_must_be_spared_gets_its_budget_and_no_more(no_leaks: None) -> None:
    """What may not be written stays in memory; puts are dropped then, nothing is evicted, and `status` says why."""
    budget = 24 * 20 * 12 * KIB  # about 30 records an hour
    disk, system = MemoryDisk(), real_system(2)
    rig = rig_over(disk, system, replace(CONFIG, ssd_write_bytes_day=budget))
    await rig.store.start()
    kept = {0: await put_some(rig, 120, 0)}
    await rig.store.idle()
    stats = ssd_stats(rig)
    assert stats.state == "ok" and "endurance budget" in stats.detail and stats.blocks > 0
    tier = rig.store.stack.tiers[-1]
    assert tier.stats().extra["endurance_refusals"] > 0 and tier.stats().extra["written_bytes"] <= budget // 24
    assert len(kept[0]) < 120 and not rig.store.counters.get("evicted")
    await check(rig, kept, memory_only=True)
    await emptied(rig.store)
    await rig.store.close()
    system.pool.close()
