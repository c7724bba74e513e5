"""What a crash leaves of the segment log: only committed bytes, and all of them but the unsynced tail."""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from functools import lru_cache
from pathlib import Path
from random import Random

import pytest

from kvstore.errors import DataError
from kvstore.format import Record, expect
from kvstore.machine.system import LocalSpawner, real_system
from kvstore.seams import System
from kvstore.spec import Group, ModelSpec
from kvstore.tiers.base import Location, Recovered
from kvstore.tiers.ssd import SsdTier
from tests.contracts.records import Sample, catalog_of, sample
from tests.memdisk import Inode, MemoryDisk
from tests.ssd_helpers import advance, get, put, tier_over
from tests.ssd_writer import block, config

TINY = ModelSpec(model="tiny", groups=(Group(kv_heads=1, k_dim=8, v_dim=8),), dtype="int8", block_tokens=4)
"""A record of a few hundred bytes."""


@lru_cache(maxsize=1024)
def tiny(depth: int) -> Sample:
    return sample(depth, spec=TINY)


async def served(tier: SsdTier, found: Recovered) -> bytes | None:
    """What a store would serve of a recovered block: verified and bound, or nothing."""
    try:
        record = await get(tier, found, found.location)
        parsed = Record.parse(record)
        parsed.verify()
        expect(parsed.header, found.header)
    except DataError:
        return None
    return record


async def recover(disk: MemoryDisk) -> tuple[SsdTier, list[Recovered]]:
    tier = tier_over(disk, catalog=catalog_of(TINY))
    return tier, await tier.start()


async def written(count: int, *, flush_each: bool = False) -> MemoryDisk:
    """A disk with `count` tiny blocks, all committed."""
    disk = MemoryDisk()
    tier = tier_over(disk, catalog=catalog_of(TINY))
    await tier.start()
    for depth in range(count):
        await put(tier, tiny(depth))
        if flush_each:
            await tier.flush()
    await tier.flush()
    return disk


def cut(disk: MemoryDisk, name: str, size: int) -> MemoryDisk:
    """The disk after a restart, one file shorter; the other files are shared."""
    other = MemoryDisk()
    other.inodes = dict(disk.inodes)
    other.inodes[name] = Inode(disk.inodes[name].content[:size])
    return other


@pytest.mark.parametrize("suffix", ["data", "index"])
async def test_the_log_cut_at_every_byte(suffix: str) -> None:
    """At every byte of the last records; behind them a page holds zeros, cut in coarser steps."""
    await cut_everywhere(suffix, 128)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["data", "index"])
async def test_the_log_cut_at_every_byte_of_its_last_pages(suffix: str) -> None:
    await cut_everywhere(suffix, 1)


async def cut_everywhere(suffix: str, step: int) -> None:
    """The last records' files, one byte shorter at a time: what is left is served right, and nothing else is lost."""
    disk, name = await written(4, flush_each=True), f"00000001.{suffix}"
    size = len(disk.inodes[name].content)
    ends = len(tiny(3).record) if suffix == "data" else 64 + 176
    counts: dict[int, int] = {}
    lengths = [length for length in range(size - 2 * 4096, size) if length % 4096 <= ends + 8 or length % step == 0]
    for length in lengths:
        tier, found = await recover(cut(disk, name, length))
        for item in found:
            assert await served(tier, item) == tiny(item.header.depth).record
        kept = [item.header.depth for item in found]
        assert kept == list(range(len(kept))), "only the tail may be missing"
        counts[len(kept)] = counts.get(len(kept), 0) + 1
    assert counts[2] == ends, "the last but one was cut at each of its bytes"
    assert step > 1 or len(lengths) == 2 * 4096
    assert counts[3] > ends and counts[4] > 0, counts


async def test_random_bit_flips_never_serve_a_wrong_byte() -> None:
    await flipped(250, 3)


@pytest.mark.slow
async def test_many_random_bit_flips() -> None:
    await flipped(10_000, 4)


async def flipped(rounds: int, seed: int) -> None:
    disk, rng = await written(40), Random(seed)
    lost = refused = 0
    for _ in range(rounds):
        other = copy.deepcopy(disk)
        other.kill()
        for _ in range(rng.choice([1, 1, 4])):
            name = rng.choice(sorted(other.inodes))
            content = other.inodes[name].content
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        tier, found = await recover(other)
        lost += len(found) < 40
        for item in found:
            record = await served(tier, item)
            assert record in (None, tiny(item.header.depth).record)
            refused += record is None
    assert lost > 20 and refused > 10, "the flips did not land"


async def test_power_loss_keeps_what_was_committed() -> None:
    """27, 58, 84: there the marks of freed records once filled the log."""
    landed = [await power_lost(seed) for seed in (*range(22), 27, 58, 84)]
    assert sum(count > 0 for count in landed) > 20, "nothing was unsynced at the crashes"


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_power_loss_many_times() -> None:
    landed = [await power_lost(seed) for seed in range(25, 1025)]
    assert sum(count > 0 for count in landed) > 900, "nothing was unsynced at the crashes"


async def power_lost(seed: int) -> int:
    """Random writes, frees, heartbeats, reclaim; then unsynced writes are lost or torn. Twice; how many were."""
    rng, disk = Random(seed), MemoryDisk()
    tier, nothing = await recover(disk)
    assert not nothing
    present: dict[int, Location] = {}  # depth -> location
    durable: dict[int, None] = {}
    gone: dict[int, None] = {}  # freed, and the free made durable
    depth = 0
    for _ in range(2):
        freed: list[int] = []
        for _ in range(rng.randrange(100, 700)):
            while tier.used + 4096 > 0.9 * tier.capacity or (present and rng.random() < 0.3):
                old = rng.choice(list(present))
                tier.free("default", tiny(old).header, present.pop(old))
                durable.pop(old, None)
                freed.append(old)
            if depth == 1000:  # of which `tiny` knows no more
                break
            present[depth] = await put(tier, tiny(depth))
            depth += 1
            if rng.random() < 0.05:
                advance(tier, 1.0)
                await tier.tick()
            if rng.random() < 0.02:
                await tier.flush()
                durable = dict.fromkeys(present)
                gone.update(dict.fromkeys(freed))
                freed.clear()
        disk.crash(rng)
        tier, found = await recover(disk)
        back = {item.header.depth: item for item in found}
        assert all(old in back for old in durable), "something committed is missing"
        assert not any(old in gone for old in back), "something freed came back"
        for item in found:
            assert await served(tier, item) == tiny(item.header.depth).record
        assert tier._log is not None
        tier._log.state.validate()
        present = {old: item.location for old, item in back.items()}
        durable = dict.fromkeys(present)
    return sum(disk.landed.values())


async def test_a_crash_in_the_middle_of_reclaim_loses_nothing() -> None:
    """Power fails after every single write of a reclaim; the blocks it moves are in the old place or in the new."""
    landed = 0
    for stop in range(30):
        disk = MemoryDisk()
        tier, _ = await recover(disk)
        kept: dict[int, Location] = {}
        for depth in range(200):
            kept[depth] = await put(tier, tiny(depth))
        for depth in range(0, 200, 3):
            tier.free("default", tiny(depth).header, kept.pop(depth))
        await tier.flush()
        assert tier._log is not None
        victim = tier._log.state.victim()
        assert victim is not None
        disk.writes_left = stop
        try:
            async with tier._log._space:
                await tier._log._clean(victim)
        except OSError:
            landed += 1
        disk.writes_left = None
        disk.crash(Random(stop))
        again, found = await recover(disk)
        back = {item.header.depth: item for item in found}
        assert sorted(back) == sorted(kept)
        for item in found:
            assert await served(again, item) == tiny(item.header.depth).record
    assert landed > 5


# A process killed


def wait_for(log: Path, holds: str, after: int = 0, timeout_s: float = 30.0) -> str:
    """The log's text once `holds` stands in it beyond `after`; polled for a bounded time."""
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        text = log.read_text() if log.exists() else ""
        if holds in text[after:]:
            return text
        pause.wait(0.01)
    raise AssertionError(f"{holds!r} did not appear: {text[-500:]}")


async def _verified(system: System, folder: Path) -> list[Sample]:
    """What a restart finds, each block read and compared with what was written under its name."""
    tier = SsdTier(system, config(str(folder)), catalog_of())
    names: list[Sample] = []
    for item in await tier.start():
        record = await served(tier, item)
        assert record is not None, "an indexed record must be whole: its data was synced first"
        names.append(Sample(item.namespace, None, None, item.header, b"", record))  # type: ignore[arg-type]
    await tier.close()
    return names


def test_sigkill_in_the_middle_of_writing(tmp_path: Path) -> None:
    """Killed at random moments, always on the same folder: each restart serves committed bytes, and all that a
    heartbeat had made durable and that was not freed."""
    rng, folder = Random(5), tmp_path / "log"
    first, mid_write = 0, 0
    for round_ in range(4):
        log = tmp_path / f"out{round_}"
        child = LocalSpawner().spawn([sys.executable, "-m", "tests.ssd_writer", str(folder), str(first)], log=str(log))
        try:
            text = wait_for(log, "sync")
            for _ in range(rng.randrange(1, 8)):
                text = wait_for(log, "sync", after=len(text))
        finally:
            assert child.alive(), log.read_text()
            child.kill()
        lines = [line.split() for line in log.read_text().splitlines() if line != "started"]
        last = max(int(line[-1]) for line in lines)
        synced = max(int(line[1]) for line in lines if line[0] == "sync")
        mid_write += last > synced
        system = real_system(threads=1)
        found = asyncio.run(_verified(system, folder))
        system.pool.close()
        written = {block(number).header.key: block(number).record for number in range(first, last + 9)}
        assert all(item.record == written[item.header.key] for item in found if item.header.key in written)
        have = {item.header.key for item in found}
        expected = range(max(first, synced - 100), synced + 1)
        assert all(block(number).header.key in have for number in expected)
        first = last + 9
    assert mid_write > 0, "no kill came between two heartbeats"
