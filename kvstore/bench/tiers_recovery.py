"""`bench tiers`, recovery: a log read back and verified whole, and many blocks found again from its index alone."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvstore.bench.baselines import read_files
from kvstore.bench.report import Report, in_turns
from kvstore.bench.tiers_blocks import BLOCK_BYTES, NAMESPACE, SHARD, SPEC, catalog, header
from kvstore.bench.tiers_ssd import DEPTH, in_flight, rates
from kvstore.codecs import RAW
from kvstore.config import StoreConfig
from kvstore.format import encode_record
from kvstore.header import Header
from kvstore.machine.system import RealClock, real_system
from kvstore.seams import System
from kvstore.store.tiered import TieredStore
from kvstore.tiers.aligned import padded
from kvstore.tiers.segment import data_name, index_name
from kvstore.tiers.segment_index import open_page, pack_entry, pages_of, word_of_shard
from kvstore.tiers.ssd import SsdTier

INDEXED = 100_000


def measure_recovery(report: Report, rounds: int, nbytes: int, folder: str) -> None:
    """A log of `nbytes` started with every record verified, beside a plain read of its files. Mutates `report`."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=folder or None) as made, asyncio.Runner() as runner:
        config = replace(StoreConfig(), ssd_folder=os.path.join(made, "log"), ssd_bytes=2 * nbytes, ssd_verify=True)
        system = real_system()
        written = runner.run(_fill(system, config, nbytes))
        paths = [str(path) for path in sorted(Path(config.ssd_folder).glob("*.data"))]
        buffer, lost = memoryview(bytearray(4 << 20)), 0.0

        def recover() -> None:
            nonlocal lost
            lost += len(written) - runner.run(_recovered(system, config))

        seconds = in_turns(
            RealClock().monotonic, {"tier": recover, "loop": lambda: read_files(paths, buffer)}, rounds=rounds
        )
        total = sum(padded(found.stored_length) for found in written)
        system.pool.close()
    rates(report, "recovery", "sequential_read", seconds, total, 0.7)
    report.result("recovery_lost_blocks", [lost], "blocks")
    report.target("recovery_lost_blocks", at_most=0)


async def _fill(system: System, config: StoreConfig, nbytes: int) -> list[Header]:
    """A log of about `nbytes`; what was written."""
    tier = SsdTier(system, config, catalog())
    await tier.start()
    raw = np.random.Generator(np.random.PCG64(3)).integers(0, 256, BLOCK_BYTES, np.uint8)
    written: list[Header] = []

    async def one(number: int) -> None:
        stored, parts = encode_record(header(number, 64), raw.data, SPEC, SHARD, RAW)
        await tier.write(NAMESPACE, stored, parts)
        written.append(stored)

    await in_flight(DEPTH, [lambda n=n: one(n) for n in range(nbytes // BLOCK_BYTES)])  # type: ignore[misc]
    await tier.close()
    return written


async def _recovered(system: System, config: StoreConfig) -> int:
    tier = SsdTier(system, config, catalog())
    found = await tier.start()
    await tier.close()
    return len(found)


def measure_index(report: Report, rounds: int, folder: str) -> None:
    """A store started on an index of many blocks. Mutates `report`."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=folder or None) as made, asyncio.Runner() as runner:
        config = replace(StoreConfig(), ssd_folder=os.path.join(made, "log"), ssd_bytes=64 << 30)
        _write_index(Path(config.ssd_folder))
        system, seconds, back = real_system(), [], 0
        clock = RealClock().monotonic
        for _ in range(rounds):
            known = catalog()
            store = TieredStore(system, config, known, ssd=SsdTier(system, config, known), redis=None)
            begin = clock()
            runner.run(store.start())
            seconds.append(clock() - begin)
            back += store.blocks(NAMESPACE)
            runner.run(store.close())
        system.pool.close()
    report.result("index_recovery_100k_blocks", seconds, "s")
    report.target("index_recovery_100k_blocks", at_most=1.0)
    report.result("index_recovery_lost_blocks", [float(INDEXED * rounds - back)], "blocks")
    report.target("index_recovery_lost_blocks", at_most=0)


def _write_index(folder: Path) -> None:
    """Segments as the log leaves them, their data a hole: nothing reads it at a start without `ssd_verify`."""
    folder.mkdir(mode=0o700)
    words = [("namespace", NAMESPACE), ("spec", SPEC.canonical_json()), word_of_shard(SHARD)]
    a_segment, size = 2_000, 4096
    for number in range(INDEXED // a_segment):
        segment, nonce = number + 1, 1000 + number
        entries = []
        for place in range(a_segment):
            found = replace(header(number * a_segment + place, 64), chunk_count=16, stored_length=801, copy_id=1)
            entries.append(pack_entry(found, place * size, found.stored_length))
        pages, _ = pages_of(segment, nonce, 1, words, entries, [])
        (folder / index_name(segment)).write_bytes(open_page(segment, nonce, a_segment * size) + pages)
        (folder / data_name(segment)).touch()
        os.truncate(folder / data_name(segment), a_segment * size)
