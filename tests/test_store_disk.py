"""The store over real memory, threads and a real SSD log: churn by many tasks, restarts, a small namespace beside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.machine.system import real_system
from kvstore.tiers.ssd import SsdTier
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, small_spec
from tests.store_leaks import emptied
from tests.store_rig import KIB, Rig

MIB = 1 << 20
SPEC = small_spec(layers=8, block_tokens=64)  # blocks of 128 KiB


def config(folder: Path) -> StoreConfig:
    return StoreConfig(
        host_bytes=4 * MIB,
        hot_bytes=1 * MIB,
        ssd_folder=str(folder / "ssd"),
        ssd_bytes=24 * MIB,
        ssd_segment_bytes=2 * MIB,
        put_wait_s=10,
        load_wait_s=10,
        threads=2,
    )


class Life:
    """One process's worth of a store on a folder."""

    def __init__(self, folder: Path) -> None:
        self.system = real_system(2)
        made, catalog = config(folder), Catalog()
        ssd = SsdTier(self.system, made, catalog)
        self.rig = Rig.make(config=made, system=self.system, spec=SPEC, ssd=ssd, catalog=catalog)

    async def __aenter__(self) -> Rig:
        await self.rig.start()
        return self.rig

    async def __aexit__(self, *error: object) -> None:
        await self.rig.store.close()
        self.system.pool.close()


async def churn(rig: Rig, seed: int, turns: int) -> int:
    """One client: chains put and read back at random; how many blocks it found."""
    rng, found = Random(seed), 0
    for _ in range(turns):
        session, depth = rng.randrange(12), rng.randrange(10)
        if rng.random() < 0.5:
            for below in range(depth + 1):
                assert (await rig.put(below, session)).state in ("committed", "held", "dropped")
        else:
            hold = await rig.open(range(depth + 1), session)
            for below, placed in enumerate(hold.blocks):
                if placed is not None:
                    assert rig.read(placed) == rig.raw(below, session), "wrong bytes"
                    found += 1
            rig.store.release(hold.id)
    return found


async def test_churn_by_many_tasks_never_gives_wrong_bytes(tmp_path: Path, no_leaks: None) -> None:
    async with Life(tmp_path) as rig:
        ticking = asyncio.ensure_future(tick_along(rig))
        found = await asyncio.gather(*(churn(rig, seed, 30) for seed in range(5)))
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        await rig.settle()
        assert sum(found) > 100
        used = {stats.tier: (stats.used, stats.hits) for stats in rig.store.stats()}
        assert all(used[tier][0] > 0 and used[tier][1] > 0 for tier in (Tier.HOT, Tier.HOST, Tier.SSD)), used
        await emptied(rig.store)


async def tick_along(rig: Rig) -> None:
    while True:
        await rig.store.tick()
        await asyncio.sleep(0.02)


async def test_a_restart_finds_what_the_disk_has(tmp_path: Path) -> None:
    async with Life(tmp_path) as rig:
        await rig.put_all(60)
        await rig.put(0, namespace="other")
        await rig.settle()
        on_disk = [depth for depth in range(60) if Tier.SSD in rig.where(depth)]
        assert len(on_disk) > 20
    async with Life(tmp_path) as rig:
        rig.check()
        assert [depth for depth in range(60) if rig.where(depth)] == on_disk
        for depth in on_disk:
            assert await rig.get(depth) == rig.raw(depth)
        leading = next(depth for depth in range(61) if depth not in on_disk)
        found = rig.store.match(NAMESPACE, SPEC.root, rig.keys(60), [rig.whole], Fidelity.EXACT)
        assert found.blocks == leading
        await rig.settle()


async def test_probe_through_the_real_tiers(tmp_path: Path) -> None:
    async with Life(tmp_path) as rig:
        assert [outcome.ok for outcome in await rig.store.probe(NAMESPACE)] == [True, True, True]
        await rig.settle()


@pytest.mark.parametrize("block", [4 * KIB, 96 * KIB])
async def test_blocks_of_very_different_sizes_share_the_store(tmp_path: Path, block: int) -> None:
    """A second model with small blocks beside: both are served, nothing is fragmented away."""
    small = small_spec(model="beside", layers=1, block_tokens=block // 256)
    async with Life(tmp_path) as rig:
        other = Rig(rig.store, rig.system, rig.catalog, small)
        for depth in range(80):
            assert (await rig.put(depth % 40, depth // 40)).state in ("committed", "held")
            assert (await other.put(depth)).state == "committed"
        await rig.store.idle()
        rig.store.validate()
        for depth in range(80):
            assert await rig.get(depth % 40, depth // 40) in (None, rig.raw(depth % 40, depth // 40))
            assert await other.get(depth) in (None, other.raw(depth))
        assert await other.get(79) == other.raw(79)
        await emptied(rig.store)
