"""The SSD tier: faults of the disk, its folder, aligned input and output."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.config import StoreConfig
from kvstore.errors import Corrupt, SetupError, TierDown
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.tiers.aligned import Bounce, is_aligned, padded, read_record, write_record
from kvstore.tiers.base import Location
from kvstore.tiers.ssd import SsdTier
from tests.contracts.records import Sample, catalog_of, sample
from tests.memdisk import MemoryDisk
from tests.ssd_helpers import advance, get, put, tier_over


@pytest.fixture
def system() -> Iterator[System]:
    system = real_system(threads=2)
    yield system
    system.pool.close()


# Faults of the disk


async def test_a_full_disk_keeps_serving_and_recovers() -> None:
    disk = MemoryDisk(capacity=1 << 20)
    tier = tier_over(disk, 8 << 20)
    await tier.start()
    kept: list[tuple[Sample, Location]] = []

    async def fill() -> None:
        for depth in range(200):
            kept.append((sample(depth), await put(tier, sample(depth))))

    with pytest.raises(TierDown):
        await fill()
    stats = tier.stats()
    assert stats.state == "full" and "disk full" in stats.detail and stats.errors >= 1
    assert tier.used == stats.used == len(kept) * padded(len(kept[0][0].record))
    with pytest.raises(TierDown):
        await put(tier, sample(300))
    for found, location in kept:
        assert await get(tier, found, location) == found.record
    advance(tier, 60.0)
    await tier.tick()
    assert tier.stats().state == "full", "there is still no space"
    disk.capacity = 16 << 20
    advance(tier, 60.0)
    await tier.tick()
    assert tier.stats().state == "ok" and "full" not in tier.stats().detail
    kept.append((sample(300), await put(tier, sample(300))))
    await tier.close()
    assert disk.landed["full"] > 0
    assert len(await tier_over(disk, 8 << 20).start()) == len(kept)


@pytest.mark.parametrize("operation", ["write", "sync", "open"])
async def test_a_failing_disk_steps_down_and_recovers(operation: str) -> None:
    disk = MemoryDisk()
    tier = tier_over(disk)
    await tier.start()
    first = await put(tier, sample(0)) if operation != "open" else None
    disk.failing[operation] = errno.EIO
    disk.failing["replace"] = errno.EIO
    if operation == "sync":
        advance(tier, 1.0)
        await tier.tick()
    else:
        with pytest.raises(TierDown):
            await put(tier, sample(1))
    assert disk.landed[operation] > 0
    assert tier.stats().state == "down" and tier.stats().errors == 1
    with pytest.raises(TierDown):
        await put(tier, sample(2))
    if first is not None:
        assert await get(tier, sample(0), first) == sample(0).record
    disk.failing.clear()
    advance(tier, 60.0)
    await tier.tick()
    assert tier.stats().state == "ok"
    location = await put(tier, sample(3))
    assert await get(tier, sample(3), location) == sample(3).record
    await tier.close()


async def test_a_failing_read_degrades() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk)
    await tier.start()
    location = await put(tier, sample(0))
    disk.failing["read"] = errno.EIO
    with pytest.raises(TierDown):
        await get(tier, sample(0), location)
    assert disk.landed["read"] == tier.stats().errors == 1
    assert tier.stats().state == "degraded"
    disk.failing.clear()
    assert await get(tier, sample(0), location) == sample(0).record
    advance(tier, 60.0)
    await tier.tick()
    assert tier.stats().state == "ok"
    await tier.close()


async def test_short_writes_are_continued() -> None:
    disk = MemoryDisk()
    disk.write_bytes_max = 1000
    tier = tier_over(disk)
    await tier.start()
    location = await put(tier, sample(0))
    assert await get(tier, sample(0), location) == sample(0).record
    assert disk.landed["short"] > 0
    await tier.close()


async def test_a_lost_file_is_corrupt_not_a_crash() -> None:
    disk = MemoryDisk()
    tier = tier_over(disk)
    await tier.start()
    location = await put(tier, sample(0))
    await tier.flush()
    disk.inodes["00000001.data"].content[:] = b""
    with pytest.raises(Corrupt):
        await get(tier, sample(0), location)
    assert tier.stats().errors == 1
    await tier.close()


# The folder


async def test_a_folder_without_direct_io_is_used_all_the_same_and_it_is_said() -> None:
    said = {}
    for takes, asked in ((False, True), (True, True), (False, False)):
        tier = tier_over(MemoryDisk(direct=takes), ssd_direct=asked)
        await tier.start()
        location = await put(tier, sample(0))
        assert await get(tier, sample(0), location) == sample(0).record
        assert tier.direct is (takes and asked) and tier.stats().state == "ok"
        said[takes, asked] = tier.stats().detail
        await tier.close()
    assert said.pop((False, True)).startswith("buffered: ") and set(said.values()) == {""}


async def test_a_folder_has_one_owner(tmp_path: Path, system: System) -> None:
    config = replace(StoreConfig(), ssd_folder=str(tmp_path / "log"), ssd_bytes=1 << 20)
    tier = SsdTier(system, config, catalog_of())
    await tier.start()
    with pytest.raises(SetupError, match="in use by another worker"):
        await SsdTier(system, config, catalog_of()).start()
    await tier.close()
    other = SsdTier(system, config, catalog_of())
    await other.start()
    await other.close()


async def test_unusable_settings_say_what_to_do(tmp_path: Path, system: System) -> None:
    (tmp_path / "file").write_text("")
    for folder, nbytes in (
        (tmp_path / "none" / "log", 1 << 20),
        (tmp_path / "file", 1 << 20),
        (tmp_path / "log", 1000),
    ):
        config = replace(StoreConfig(), ssd_folder=str(folder), ssd_bytes=nbytes)
        with pytest.raises(SetupError) as caught:
            await SsdTier(system, config, catalog_of()).start()
        assert "\n" not in str(caught.value)


async def test_foreign_files_stay_and_orphans_go(tmp_path: Path, system: System) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for name in ("notes.txt", "00000007.data", "00000009.index"):
        (folder / name).write_text("x")
    tier = SsdTier(system, replace(StoreConfig(), ssd_folder=str(folder), ssd_bytes=1 << 20), catalog_of())
    assert not await tier.start()
    assert sorted(os.listdir(folder)) == ["log.lock", "notes.txt"]
    assert tier.stats().extra["recovery_orphans"] == 2
    await tier.close()


async def test_nothing_leaks(tmp_path: Path, no_leaks: None) -> None:
    system = real_system(threads=2)
    tier = SsdTier(system, replace(StoreConfig(), ssd_folder=str(tmp_path / "log"), ssd_bytes=2 << 20), catalog_of())
    await tier.start()
    for depth in range(40):
        location = await put(tier, sample(depth))
        await get(tier, sample(depth), location)
    await tier.close()
    system.pool.close()


async def test_cancelled_callers_leak_nothing(tmp_path: Path, no_leaks: None) -> None:
    """Writes and reads cancelled at every early step; what was whole stays readable, descriptors all close."""
    system = real_system(threads=2)
    tier = SsdTier(system, replace(StoreConfig(), ssd_folder=str(tmp_path / "log"), ssd_bytes=2 << 20), catalog_of())
    await tier.start()
    in_flight = 0
    kept: list[tuple[Sample, Location]] = []
    for number in range(60):
        before = tier.used
        task = asyncio.ensure_future(put(tier, sample(number)))
        for _ in range(number % 6):
            await asyncio.sleep(0)
        begun = tier.used > before  # it has its place in the log
        task.cancel()
        try:
            kept.append((sample(number), await task))
        except asyncio.CancelledError:
            in_flight += begun
        if number % 10 == 0:
            await tier.flush()
    assert in_flight > 0, "no write was cancelled on its way"
    kept.append((sample(60), await put(tier, sample(60))))
    for found, location in kept:
        assert await get(tier, found, location) == found.record
    assert tier._log is not None
    tier._log.state.validate()
    assert tier.used == len(kept) * 12288
    await tier.close()
    system.pool.close()


# Aligned I/O


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("shift", [0, 1])
def test_direct_io_of_any_length_and_address(tmp_path: Path, system: System, nbytes: int, shift: int) -> None:
    disk = system.disk(str(tmp_path / "log"))
    file = disk.open("data", create=True, direct=True)
    if not file.direct:
        pytest.skip("this folder has no direct I/O")
    bounce = Bounce()
    pages = bounce.take(nbytes + 1)
    source = memoryview(pages)[shift : shift + nbytes]
    source[:] = np.random.default_rng(nbytes).bytes(nbytes)
    assert is_aligned(source) is (shift == 0)
    spare, landing = bounce.take(padded(nbytes)), bounce.take(nbytes + 1)
    write_record(file, 8192, [source], nbytes, spare)
    assert file.size() == 8192 + padded(nbytes)
    with memoryview(landing)[shift : shift + nbytes] as target:
        assert read_record(file, 8192, target, spare)
        assert target == source
        assert not read_record(file, 8192 + padded(nbytes), target, spare), "beyond the end"
    source.release()
    file.close()


def test_a_buffer_that_a_failed_write_still_refers_to_stops_nobody() -> None:
    """As a traceback does that nobody has collected yet: closing the log must go on."""
    bounce = Bounce()
    buffer = bounce.take(1)
    seen = memoryview(buffer)[:1]
    bounce.give(buffer)
    bounce.close()
    assert bounce.idle_bytes == 0 and len(seen) == 1
    crowded = Bounce(kept_bytes=0)
    another = crowded.take(1)
    still = memoryview(another)
    crowded.give(another)
    assert len(still) == len(another)
