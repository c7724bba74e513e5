"""`bench tiers`, memory: puts and gets of 2 MiB blocks through the store, beside memcpy of the same buffers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from kvstore.bench.baselines import memcpy
from kvstore.bench.report import Report, in_turns
from kvstore.bench.tiers_blocks import (
    BLOCK_BYTES,
    COLD_BYTES,
    NAMESPACE,
    SHARD,
    SPEC,
    Buffers,
    catalog,
    differing,
    header,
    random_buffers,
)
from kvstore.bench.tiers_ssd import in_flight
from kvstore.config import StoreConfig
from kvstore.header import Header
from kvstore.machine.system import RealClock, real_system
from kvstore.store.arena import generation_at
from kvstore.store.tiered import Placed, TieredStore
from kvstore.types import Fidelity

UNDER_WAY = 16
"""Blocks of two Commits: a worker offers 8 of each to its store at a time."""

OPENED = 32
"""Blocks that one get opens: a prompt of 2,048 tokens."""


class HostContest:
    """A store whose hot tier takes one round of blocks; one thread moves bytes."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.count = COLD_BYTES // BLOCK_BYTES
        self.sources = random_buffers(self.count, 7)
        self.targets, self.copies = Buffers(self.count, BLOCK_BYTES), Buffers(self.count, BLOCK_BYTES)
        self.headers: list[Header] = [header(number, 64) for number in range(self.count)]
        self.system = real_system(threads=1)
        hot = COLD_BYTES + (32 << 20)
        config = replace(StoreConfig(), host_bytes=2 * hot, hot_bytes=hot, high_watermark=1.0, low_watermark=0.99)
        self.store = TieredStore(self.system, config, catalog(), ssd=None, redis=None)
        self.wrong = 0

    async def put_all(self) -> None:
        """As commits that follow each other: always so many blocks under way."""

        async def one(i: int) -> None:
            found = await self.store.put(NAMESPACE, SPEC, SHARD, self.headers[i], self.sources.views[i])
            assert found.state == "committed"

        await in_flight(UNDER_WAY, [lambda i=i: one(i) for i in range(self.count)])  # type: ignore[misc]

    async def get_all(self) -> None:
        """As a reader of this host: open, copy, look at the generations again, release."""
        for start in range(0, self.count, OPENED):
            some = range(start, min(start + OPENED, self.count))
            wanted = [(SHARD.digest, self.headers[i].key) for i in some]
            hold = await self.store.open(NAMESPACE, SPEC.root, wanted, least=Fidelity.EXACT)
            targets = self.targets.views[some.start : some.stop]
            self.wrong += await self.system.pool.run(copy_out, hold.blocks, targets)
            self.store.release(hold.id)

    def check_put(self) -> None:
        """Every block's bytes in the arena, then room for the next round."""
        self.store.validate()
        residency, tier = self.store.stack.residency, self.store.stack.hot
        views = []
        for made in self.headers:
            row = residency.find(NAMESPACE, SHARD.digest, made.key)
            assert row is not None
            views.append(tier.view(residency.location(row, 0)))
        self.wrong += differing(self.sources.views, views)

    def check_get(self) -> None:
        self.wrong += differing(self.sources.views, self.targets.views)
        for view in self.targets.views:
            np.frombuffer(view, np.uint8)[::4096] = 0

    def close(self) -> None:
        self.system.pool.close()
        for buffers in (self.sources, self.targets, self.copies):
            buffers.close()


def copy_out(blocks: list[Placed | None], targets: list[memoryview]) -> int:
    """Thread: raw blocks into the reader's buffers; how many were not there, or not there to the end."""
    missed = 0
    for placed, target in zip(blocks, targets, strict=True):
        if placed is None or not placed.raw:
            missed += 1
            continue
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(placed.view, np.uint8))
        now = generation_at(placed.segment.view, placed.data_offset, placed.offset)
        missed += now != placed.generation
    return missed


def measure_host(report: Report, rounds: int) -> None:
    """Puts and gets in turns with memcpy. Mutates `report`."""
    contest = HostContest(rounds)
    with asyncio.Runner() as runner:
        runner.run(contest.store.start())

        def between(name: str) -> None:
            if name == "put":
                contest.check_put()
            elif name == "get":
                contest.check_get()
                contest.store.purge(NAMESPACE)

        seconds = in_turns(
            RealClock().monotonic,
            {
                "memcpy_in": lambda: memcpy(contest.sources.views, contest.copies.views),
                "put": lambda: runner.run(contest.put_all()),
                "memcpy_out": lambda: memcpy(contest.copies.views, contest.targets.views),
                "get": lambda: runner.run(contest.get_all()),
            },
            rounds=rounds,
            between=between,
        )
        runner.run(contest.store.close())
    contest.close()
    for name, metric in (
        ("put", "host_put"),
        ("memcpy_in", "memcpy_for_put"),
        ("get", "host_get"),
        ("memcpy_out", "memcpy_for_get"),
    ):
        report.result(metric, [COLD_BYTES / s / 1e9 for s in seconds[name]], "GB/s")
    report.ratio("host_put_vs_memcpy", "host_put", "memcpy_for_put", at_least=0.7)
    report.ratio("host_get_vs_memcpy", "host_get", "memcpy_for_get", at_least=0.9)
    report.result("host_wrong_blocks", [float(contest.wrong)], "blocks")
    report.target("host_wrong_blocks", at_most=0)
