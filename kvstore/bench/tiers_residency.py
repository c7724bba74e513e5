"""`bench tiers`, residency: operations a second and bytes a block at ten thousand and at a million resident blocks."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvstore.bench.report import Report
from kvstore.bench.tiers_blocks import BLOCK_BYTES, NAMESPACE, SHARD, header
from kvstore.errors import SetupError
from kvstore.header import Header
from kvstore.machine.system import thread_cpu_s
from kvstore.policies.advice import Advice
from kvstore.policies.base import make_policies
from kvstore.residency.residency import Level, Residency
from kvstore.store.arena import PAGE_BYTES
from kvstore.types import Location, Tier

CHAIN = 64  # blocks
LEVELS = 3  # hot, host, ssd
SSD = 2  # where nearly all of a worker's blocks lie
CYCLES = 5_000
OPERATIONS = 4
"""Of a cycle: admit a block, touch one, pin (and unpin) one, evict one."""


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


class Resident:
    """A residency with `blocks` blocks of chains, as a store builds it."""

    def __init__(self, blocks: int, policy: str = "lru") -> None:
        tiers = (Tier.HOT, Tier.HOST, Tier.SSD)
        levels = [Level(tier, 1 << 60, PAGE_BYTES, raw=tier == Tier.HOT) for tier in tiers]
        self.residency = Residency(levels, iter(make_policies(policy, LEVELS)).__next__)
        self.advice = Advice(self.residency) if policy == "default" else None
        self.next = 0
        self.rows: list[int] = []
        for _ in range(blocks):
            self.admit(header(self.next, CHAIN))

    def admit(self, found: Header) -> int:
        place = Location(self.next // 1024, self.next % 1024 * BLOCK_BYTES, BLOCK_BYTES)
        self.next += 1
        if self.advice is not None:  # as a store does; recency alone heeds none of it
            self.advice.storing(NAMESPACE, found, self.next / 1000)
        return self.residency.admit(NAMESPACE, found, SSD, place, leaf_first=True)

    def cycles(self, headers: Sequence[Header], rows: Sequence[int]) -> None:
        residency, digest = self.residency, SHARD.digest
        for found, row in zip(headers, rows, strict=True):
            self.admit(found)
            residency.touch(row)
            residency.pin(row)
            residency.unpin(row)
            victim = residency.victim(SSD)
            assert victim is not None
            residency.drop(victim, SSD)
        kept = residency.find(NAMESPACE, digest, headers[-1].key) is not None
        assert kept or self.advice is not None, "the newest left first"  # which `default` may well decide


def grown_bytes(blocks: int, policy: str = "lru") -> float:
    """Bytes of memory a block by which this process grows. True only of one that has freed nothing before."""
    Resident(CHAIN, policy)  # what is made once
    gc.collect()
    before = resident_bytes()
    made = Resident(blocks, policy)
    gc.collect()
    grown = (resident_bytes() - before) / blocks
    assert made.residency.blocks[SSD] == blocks
    return grown


async def _grown_elsewhere(blocks: int, policy: str = "lru") -> float:
    """`grown_bytes` in a process of its own."""
    code = f"from kvstore.bench.tiers_residency import grown_bytes; print(grown_bytes({blocks}, {policy!r}))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    if process.returncode:
        raise SetupError("the process that measures metadata failed: its message is above")
    return float(out)


def cycle_seconds(blocks: int, rounds: int, policy: str = "lru") -> list[float]:
    """Seconds a cycle of each round with so many blocks resident."""
    made = Resident(blocks, policy)
    gc.collect()
    rng = np.random.Generator(np.random.PCG64(11))
    seconds = []
    gc.freeze()  # what a worker that runs for long does not look at again either
    for turn in range(-1, rounds):
        headers = [header(made.next + i, CHAIN) for i in range(CYCLES)]
        present = [row for row in map(int, rng.integers(0, blocks, 4 * CYCLES)) if made.residency.present(row, SSD)]
        rows = present[:CYCLES]
        begin = thread_cpu_s()
        made.cycles(headers, rows)
        if turn >= 0:
            seconds.append((thread_cpu_s() - begin) / CYCLES)
    gc.unfreeze()
    return seconds


def measure_residency(report: Report, rounds: int, blocks: int) -> None:
    """Mutates `report`."""
    grown = asyncio.run(_grown_elsewhere(blocks))
    small, large = cycle_seconds(10_000, rounds), cycle_seconds(blocks, rounds)
    report.result("residency_ops_10k", [OPERATIONS / s for s in small], "1/s")
    report.result("residency_ops", [OPERATIONS / s for s in large], "1/s")
    report.target("residency_ops", at_least=200_000)
    report.result("residency_default_ops", [OPERATIONS / s for s in cycle_seconds(blocks, rounds, "default")], "1/s")
    report.target("residency_default_ops", at_least=100_000)
    report.ratio("residency_cost_vs_10k", "residency_ops_10k", "residency_ops", at_most=3.0)
    report.result("metadata_bytes_a_block", [grown], "bytes")
    report.target("metadata_bytes_a_block", at_most=300)
    learned = asyncio.run(_grown_elsewhere(blocks, "default"))
    report.result("metadata_default_bytes_a_block", [learned], "bytes")
    report.notes.append(f"residency_ops: {blocks} resident blocks, seconds of CPU")
