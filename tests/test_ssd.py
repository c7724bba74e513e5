"""The SSD tier: contract, bounds, reclaim, group commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.errors import TierDown, TierFull
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.tiers.aligned import padded
from kvstore.tiers.base import Location
from kvstore.tiers.ssd import SsdTier
from tests.contracts.records import NAMESPACE, Sample, catalog_of, sample, small_spec
from tests.contracts.tier_suite import TierContract
from tests.memdisk import MemoryDisk
from tests.ssd_helpers import advance, get, put, tier_over


@pytest.fixture
def system() -> Iterator[System]:
    system = real_system(threads=2)
    yield system
    system.pool.close()


class SsdContract(TierContract):
    durable = True


class TestSsdDirect(SsdContract):
    """Over a real folder, direct I/O where it has it."""

    @pytest.fixture
    def make(self, tmp_path: Path, system: System) -> Callable[[int], SsdTier]:
        folder = str(tmp_path / "log")
        catalog = self.catalog()
        return lambda nbytes: SsdTier(system, replace(StoreConfig(), ssd_folder=folder, ssd_bytes=nbytes), catalog)


class TestSsdBuffered(SsdContract):
    @pytest.fixture
    def make(self, tmp_path: Path, system: System) -> Callable[[int], SsdTier]:
        config = replace(StoreConfig(), ssd_folder=str(tmp_path / "log"), ssd_direct=False)
        catalog = self.catalog()
        return lambda nbytes: SsdTier(system, replace(config, ssd_bytes=nbytes), catalog)


class TestSsdInMemory(SsdContract):
    @pytest.fixture
    def make(self) -> Callable[[int], SsdTier]:
        disk, catalog = MemoryDisk(), self.catalog()
        return lambda nbytes: tier_over(disk, nbytes, catalog=catalog)


# Bounds and reclaim


@pytest.mark.parametrize("keep", [0.3, 0.9])
async def test_churn_stays_within_the_bound_and_serves_right_bytes(keep: float) -> None:
    """Random frees, the worst case for a log: every record written fits, the folder never grows past its bound."""
    disk, rng, nbytes = MemoryDisk(), Random(1), 4 << 20
    tier = tier_over(disk, nbytes)
    await tier.start()
    log = tier._log
    assert log is not None
    kept: list[tuple[Sample, Location]] = []
    for number in range(2500):
        found = sample(number % 500, session=number // 500)
        while tier.used + padded(len(found.record)) > keep * tier.capacity:
            old, location = kept.pop(rng.randrange(len(kept)))
            tier.free(old.namespace, old.header, location)
        kept.append((found, await put(tier, found)))
        assert disk.used() <= nbytes
        if number % 50 == 0:
            advance(tier, 1.0)
            await tier.tick()
            log.state.validate()
            found, location = kept[rng.randrange(len(kept))]
            assert await get(tier, found, location) == found.record
    for found, location in kept:
        assert await get(tier, found, location) == found.record
    stats = tier.stats()
    assert stats.extra["reclaimed_segments"] > 0 and stats.extra["reclaim_copied_bytes"] > 0
    assert stats.blocks == len(kept)
    log.state.validate()
    await tier.close()

    again = tier_over(disk, nbytes)
    recovered = {item.header.key: item for item in await again.start()}
    assert set(recovered) == {found.header.key for found, _ in kept}
    for found, _ in kept:
        assert await get(again, found, recovered[found.header.key].location) == found.record
    await again.close()


async def test_reads_during_reclaim_see_their_block(tmp_path: Path, system: System) -> None:
    """Readers, writers and reclaim at the same time over a real folder."""
    config = replace(StoreConfig(), ssd_folder=str(tmp_path / "log"), ssd_bytes=2 << 20, ssd_sync_s=0.0)
    tier = SsdTier(system, config, catalog_of())
    await tier.start()
    kept: dict[int, tuple[Sample, Location]] = {}
    rng = Random(2)

    async def write(number: int) -> None:
        found = sample(number)
        kept[number] = (found, await put(tier, found))

    async def check(found: Sample, location: Location) -> None:
        assert await get(tier, found, location) == found.record

    for start in range(0, 480, 8):
        while tier.used + 8 * 12288 > 0.85 * tier.capacity:
            found, location = kept.pop(rng.choice(list(kept)))
            tier.free(found.namespace, found.header, location)
        reads = [check(*kept[number]) for number in rng.sample(list(kept), min(8, len(kept)))]
        await asyncio.gather(tier.tick(), *reads, *(write(number) for number in range(start, start + 8)))
    assert tier.stats().extra["reclaimed_segments"] > 0
    assert sum(path.stat().st_size for path in (tmp_path / "log").iterdir()) <= 2 << 20
    await tier.close()


async def test_a_smaller_bound_drops_the_oldest() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk, 4 << 20)
    await tier.start()
    samples = [sample(depth) for depth in range(200)]
    for found in samples:
        await put(tier, found)
    await tier.close()
    again = tier_over(disk, 1 << 20)
    recovered = await again.start()
    assert 0 < len(recovered) < len(samples)
    assert again.used <= again.capacity and disk.used() <= 1 << 20
    assert [item.header.key for item in recovered] == [s.header.key for s in samples[-len(recovered) :]]
    await put(again, sample(300))
    await again.close()


async def test_a_record_larger_than_a_segment_gets_one_of_its_own() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk, 8 << 20, ssd_segment_bytes=1)
    await tier.start()
    large = sample(spec=small_spec(model="large", layers=64))
    assert len(large.record) > 64 << 10
    tier.catalog.learn_spec(large.spec)
    tier.catalog.learn_shard(large.shard)
    locations = [await put(tier, found) for found in (sample(0), large, sample(1))]
    assert await get(tier, large, locations[1]) == large.record
    await tier.close()


async def test_tier_full_is_said_before_anything_is_written() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk, 1 << 20)
    await tier.start()

    async def fill() -> None:
        for depth in range(1000):
            await put(tier, sample(depth))

    with pytest.raises(TierFull):
        await fill()
    assert tier.used <= tier.capacity
    before = disk.used()
    with pytest.raises(TierFull):
        await put(tier, sample(2000))
    assert disk.used() == before
    await tier.close()


# Durability


async def test_group_commit_comes_with_the_heartbeat() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk, ssd_sync_s=0.5)
    await tier.start()
    await put(tier, sample(0))
    advance(tier, 0.4)
    await tier.tick()
    assert tier.stats().extra["syncs"] == 0
    advance(tier, 0.2)
    await tier.tick()
    assert tier.stats().extra["syncs"] == 1
    await put(tier, sample(1))
    disk.crash(Random(0))
    recovered = await tier_over(disk).start()
    assert [item.header.key for item in recovered] == [sample(0).header.key]


async def test_what_was_freed_stays_gone() -> None:
    """Freed before its index entry was written, freed after: neither comes back, the neighbours do."""
    disk = MemoryDisk()
    tier = tier_over(disk)
    await tier.start()
    locations = [await put(tier, sample(depth)) for depth in range(4)]
    tier.free(NAMESPACE, sample(0).header, locations[0])
    await tier.flush()
    tier.free(NAMESPACE, sample(1).header, locations[1])
    await tier.flush()
    disk.crash(Random(0))
    recovered = await tier_over(disk).start()
    assert [item.header.key for item in recovered] == [sample(depth).header.key for depth in (2, 3)]


async def test_a_record_without_its_dictionary_entry_is_skipped() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk, catalog=Catalog())
    await tier.start()
    found = sample(0)
    location = await put(tier, found)
    assert await get(tier, found, location) == found.record
    assert tier.stats().extra["undescribed_records"] == 1
    await tier.close()
    again = tier_over(disk)
    assert not await again.start()
    assert again.stats().extra["recovery_undescribed_records"] == 1


async def test_another_process_learns_the_dictionary() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk)
    await tier.start()
    await put(tier, sample(0))
    await tier.close()
    catalog = Catalog()
    assert len(await tier_over(disk, catalog=catalog).start()) == 1
    found = sample(0)
    assert catalog.spec(found.header.root) == found.spec and catalog.namespaces() == [NAMESPACE]


async def test_the_endurance_budget_bounds_what_is_written() -> None:
    """An hour's share may be written at once, then as much as time gives back; reads and the rest go on."""
    size = padded(len(sample().record))
    tier = tier_over(MemoryDisk(), ssd_write_bytes_day=24 * 10 * size)
    await tier.start()
    kept = [(sample(depth), await put(tier, sample(depth))) for depth in range(10)]
    for _ in range(3):
        with pytest.raises(TierDown, match="endurance"):
            await put(tier, sample(10))
    assert tier.stats().state == "ok" and tier.stats().extra["endurance_refusals"] == 3
    assert "endurance budget" in tier.stats().detail
    for found, location in kept:
        assert await get(tier, found, location) == found.record
    advance(tier, 3600 / 10 + 1)
    await put(tier, sample(11))
    assert "endurance" not in tier.stats().detail
    with pytest.raises(TierDown):
        await put(tier, sample(12))
    assert tier.stats().extra["written_bytes"] == 11 * size
    await tier.close()
