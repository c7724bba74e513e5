"""`bench tiers`, SSD: the segment log beside pwritev and preadv loops in the same folder."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvstore.bench.baselines import FileLoop
from kvstore.bench.report import Report, in_turns
from kvstore.bench.tiers_blocks import NAMESPACE, Buffers, Records, catalog, differing, records
from kvstore.config import StoreConfig
from kvstore.machine.system import RealClock, real_system
from kvstore.tiers.aligned import padded
from kvstore.tiers.base import Location
from kvstore.tiers.ssd import SsdTier

DEPTH = 4
"""Blocks in flight at the device: one for each of the store's byte movers."""

WAITING = 2 * DEPTH
"""Blocks asked for at a time: a byte mover finds its next one when it is done, as the threads of the loop do."""

SYNC_BLOCKS = 64
"""Both sides: fdatasync after so many blocks."""


async def in_flight(depth: int, work: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """All of it, `depth` at a time."""
    line = iter(work)

    async def one() -> None:
        for call in line:
            await call()

    await asyncio.gather(*(one() for _ in range(depth)))


def read_bytes() -> int:
    """Bytes that this process had fetched from block devices."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class LogContest:
    """A log that takes one round of records at a time, and a file beside it."""

    def __init__(self, folder: str, found: Records) -> None:
        self.records, self.count = found, len(found.headers)
        self.system = real_system(threads=DEPTH)
        size = padded(found.nbytes)
        config = replace(
            StoreConfig(), ssd_folder=os.path.join(folder, "log"), ssd_bytes=2 * self.count * size + (1 << 30)
        )
        self.tier = SsdTier(self.system, config, catalog())
        self.loop = FileLoop(os.path.join(folder, "loop"), DEPTH)
        self.padded = Buffers(self.count, size)  # what the loop writes: as many bytes, no tail
        for view, source in zip(self.padded.views, found.views, strict=True):
            np.frombuffer(view, np.uint8)[: len(source)] = np.frombuffer(source, np.uint8)
        self.targets = Buffers(self.count, size)
        self.places: list[Location | None] = [None] * self.count
        self.order = [0] * self.count
        self.wrong = 0

    async def write(self) -> None:
        async def one(i: int) -> None:
            header = self.records.headers[i]
            self.places[i] = await self.tier.write(NAMESPACE, header, [self.records.views[i]])

        for start in range(0, self.count, SYNC_BLOCKS):
            some = range(start, min(start + SYNC_BLOCKS, self.count))
            await in_flight(WAITING, [lambda i=i: one(i) for i in some])  # type: ignore[misc]
            await self.tier.flush()

    async def read(self) -> None:
        nbytes = self.records.nbytes

        async def one(i: int) -> None:
            place = self.places[i]
            assert place is not None
            await self.tier.read(NAMESPACE, self.records.headers[i], place, self.targets.views[i][:nbytes])

        await in_flight(WAITING, [lambda i=i: one(i) for i in self.order])  # type: ignore[misc]

    def check(self) -> None:
        """What arrived in the targets, which are emptied then."""
        nbytes = self.records.nbytes
        self.wrong += differing([view[:nbytes] for view in self.targets.views], self.records.views)
        for view in self.targets.views:
            np.frombuffer(view, np.uint8)[::4096] = 0

    async def forget(self) -> None:
        for header, place in zip(self.records.headers, self.places, strict=True):
            if place is not None:
                self.tier.free(NAMESPACE, header, place)
        await self.tier.flush()
        await self.tier.tick()

    async def close(self) -> None:
        await self.tier.close()
        self.system.pool.close()
        self.loop.close()
        self.padded.close()
        self.targets.close()


def measure_ssd(report: Report, rounds: int, blocks: int, folder: str) -> None:
    """Writes, then random cold reads, each in turns with the loop. Mutates `report`."""
    found = records(blocks)
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=folder or None) as made, asyncio.Runner() as runner:
        contest = LogContest(made, found)
        runner.run(contest.tier.start())
        if not contest.tier.direct:
            report.notes.append("the folder has no direct I/O: pass --folder")
        contest.order = list(range(blocks))

        def written(name: str) -> None:
            if name == "tier":
                runner.run(contest.read())
                contest.check()
                runner.run(contest.forget())

        clock = RealClock().monotonic
        contestants = {
            "tier": lambda: runner.run(contest.write()),
            "loop": lambda: contest.loop.write(contest.padded.views, SYNC_BLOCKS),
        }
        seconds = in_turns(clock, contestants, rounds=rounds, between=written)
        rates(report, "ssd_write", "pwritev_loop", seconds, blocks * padded(found.nbytes), 0.85)
        runner.run(contest.write())
        shares, before = [], 0
        rng = np.random.Generator(np.random.PCG64(5))

        def shuffled(name: str) -> None:
            nonlocal before
            contest.check()
            if name == "loop":
                contest.order = [int(i) for i in rng.permutation(blocks)]
            else:
                shares.append((read_bytes() - before) / (blocks * padded(found.nbytes)))
            before = read_bytes()

        before = read_bytes()
        contestants = {
            "tier": lambda: runner.run(contest.read()),
            "loop": lambda: contest.loop.read(contest.targets.views, contest.order),
        }
        seconds = in_turns(clock, contestants, rounds=rounds, between=shuffled)
        rates(report, "ssd_read", "preadv_loop", seconds, blocks * padded(found.nbytes), 0.85)
        report.result("ssd_read_from_device_share", shares, "of the bytes")
        report.target("ssd_read_from_device_share", at_least=0.99)
        report.result("ssd_wrong_blocks", [float(contest.wrong)], "blocks")
        report.target("ssd_wrong_blocks", at_most=0)
        runner.run(contest.close())
    found.close()


def rates(report: Report, ours: str, theirs: str, seconds: dict[str, list[float]], nbytes: int, bar: float) -> None:
    """Rates of `tier` and `loop`, and their ratio against its bar. Mutates `report`."""
    report.result(ours, [nbytes / s / 1e9 for s in seconds["tier"]], "GB/s")
    report.result(theirs, [nbytes / s / 1e9 for s in seconds["loop"]], "GB/s")
    report.ratio(f"{ours}_vs_{theirs}", ours, theirs, at_least=bar)
