"""`bench tiers`, churn: whether a store that puts, spills, loads and evicts without end keeps to its memory."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import replace

import numpy as np

from kvstore.bench.report import Report
from kvstore.bench.tiers_blocks import BLOCK_BYTES, NAMESPACE, SHARD, SPEC, catalog, header, random_buffers
from kvstore.bench.tiers_residency import resident_bytes
from kvstore.config import StoreConfig
from kvstore.machine.system import RealClock, real_system
from kvstore.store.tiered import ANNOUNCE_QUEUE, TieredStore
from kvstore.tiers.ssd import SsdTier
from kvstore.types import Fidelity

WARM_BLOCKS = 400
"""Puts before the first look: arenas, log, queues and buffers are filled then."""

QUEUE_QUICK = 1024
"""Changes kept for who is behind, in a short run; the long one keeps a worker's own number, and waits until all are
there (some 290 bytes each): until then the store is not full."""

CURVE_POINTS = 20

SOURCES = 16


async def _churn(store: TieredStore, seconds: float) -> tuple[list[tuple[float, int]], int]:
    """((seconds since everything was full, most resident bytes since the point before) ..., blocks put)."""
    clock, sources = RealClock().monotonic, random_buffers(SOURCES, 13)
    rng = np.random.Generator(np.random.PCG64(17))
    changes, number, full_at, most = store.changes, 0, 0.0, 0
    curve: list[tuple[float, int]] = []
    while not full_at or clock() - full_at < seconds:
        for _ in range(8):
            await store.put(NAMESPACE, SPEC, SHARD, header(number, 64), sources.views[number % SOURCES])
            number += 1
        first = max(0, number - int(rng.integers(1, 128)))
        wanted = [(SHARD.digest, header(n, 64).key) for n in range(first, min(first + 4, number))]
        hold = await store.open(NAMESPACE, SPEC.root, wanted, least=Fidelity.EXACT)
        store.release(hold.id)
        if number % 64 == 0:
            await store.tick()
        if not full_at and number > WARM_BLOCKS and changes.outbox(NAMESPACE).head >= changes.limit:
            full_at = clock()
            curve.append((0.0, resident_bytes()))
        if full_at:
            most = max(most, resident_bytes())
            if clock() - full_at >= len(curve) * seconds / CURVE_POINTS:
                curve.append((clock() - full_at, most))
                most = 0
    await store.idle()
    store.validate()
    sources.close()
    return curve, number


def measure_churn(report: Report, seconds: float, folder: str, changes_kept: int = ANNOUNCE_QUEUE) -> None:
    """Mutates `report`. `seconds` count from when everything is full."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=folder or None) as made, asyncio.Runner() as runner:
        config = replace(
            StoreConfig(),
            host_bytes=32 * BLOCK_BYTES,
            hot_bytes=8 * BLOCK_BYTES,
            ssd_folder=os.path.join(made, "log"),
            ssd_bytes=128 * BLOCK_BYTES,
            put_wait_s=1.0,
            codec="raw",
        )
        system, known = real_system(), catalog()
        store = TieredStore(
            system, config, known, ssd=SsdTier(system, config, known), redis=None, announce_queue=changes_kept
        )
        runner.run(store.start())
        curve, blocks = runner.run(_churn(store, seconds))
        spilled = store.counters.get("spilled", 0)
        runner.run(store.close())
        system.pool.close()
    report.result(
        "churn_resident_growth", [max(nbytes for _, nbytes in curve) / curve[0][1] - 1], "of the resident set"
    )
    report.target("churn_resident_growth", at_most=0.02)
    report.series("churn_resident", [(round(at, 1), nbytes / 2**20) for at, nbytes in curve], "MiB after s")
    report.result("churn_seconds", [seconds], "s")
    report.result("churn_blocks_put", [float(blocks)], "blocks")
    report.result("churn_blocks_spilled", [float(spilled)], "blocks")
    report.target("churn_blocks_spilled", at_least=1)
