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
from kvstore.store import TieredStore
from kvstore.system import RealClock, real_system
from kvstore.tiers.ssd import SsdTier
from kvstore.types import Fidelity

WARM_SHARE = 0.3
WARM_BLOCKS = 400
"""So much of the time and so many puts before the first look: arenas, log, queues and buffers are filled then."""

SOURCES = 16


async def _churn(store: TieredStore, seconds: float) -> tuple[int, int, int]:
    """(resident bytes once warm, the most of them later, blocks put)."""
    clock, sources = RealClock().monotonic, random_buffers(SOURCES, 13)
    rng = np.random.Generator(np.random.PCG64(17))
    begin, number, warm, most = clock(), 0, 0, 0
    while (passed := clock() - begin) < seconds or number < 2 * WARM_BLOCKS:
        for _ in range(8):
            await store.put(NAMESPACE, SPEC, SHARD, header(number, 64), sources.views[number % SOURCES])
            number += 1
        first = max(0, number - int(rng.integers(1, 128)))
        wanted = [(SHARD.digest, header(n, 64).key) for n in range(first, min(first + 4, number))]
        hold = await store.open(NAMESPACE, SPEC.root, wanted, least=Fidelity.EXACT)
        store.release(hold.id)
        if number % 64 == 0:
            await store.tick()
        if passed > WARM_SHARE * seconds and number > WARM_BLOCKS:
            now = resident_bytes()
            warm, most = warm or now, max(most, now)
    await store.idle()
    store.validate()
    sources.close()
    return warm, most, number


def measure_churn(report: Report, seconds: float, folder: str) -> None:
    """Mutates `report`."""
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
        store = TieredStore(system, config, known, ssd=SsdTier(system, config, known), redis=None)
        runner.run(store.start())
        warm, most, blocks = runner.run(_churn(store, seconds))
        spilled = store.counters.get("spilled", 0)
        runner.run(store.close())
        system.pool.close()
    report.result("churn_resident_growth", [most / warm - 1], "of the resident set")
    report.target("churn_resident_growth", at_most=0.02)
    report.result("churn_seconds", [seconds], "s")
    report.result("churn_blocks_put", [float(blocks)], "blocks")
    report.result("churn_blocks_spilled", [float(spilled)], "blocks")
    report.target("churn_blocks_spilled", at_least=1)
