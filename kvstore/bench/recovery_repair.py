"""`bench recovery`, repair: a worker dies, and the others copy what it had a copy of; beside a client's own gets.

The rate is that of both others together, from the first block that is copied to the last one; the lease that has to run
out before is not in it. Each round has blocks of its own, those of the round before are purged: so the others copy into
memory that was faulted in before, as a client's buffers are, and workers that serve for long have no other. What the
first round gives, into fresh memory, is told beside it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import nullcontext

from kvstore.bench.recovery_rig import POLL_S, WAIT_S, RecoveryRig, Work, blocks_on, now, until
from kvstore.bench.report import Report
from kvstore.client.kv_client import KVClient
from kvstore.config import MIB, Config, override
from kvstore.errors import SetupError
from kvstore.transport.base import Channel

BLOCK_BYTES, BLOCKS = 2 << 20, 32
PROMPTS, PROMPTS_QUICK = 12, 5
GETS = 7
REPLAYED = 3  # rounds in which a client is at work
WORKERS, VICTIM = 3, 2
COPIES = 2  # of three workers: then each of the other two has everything
LOOK_S = 0.25
BEAT_S = 0.05
"""Hints come with the answers to heartbeats: of as little data as here, waiting for them would take half the time."""


async def measure_repair(report: Report, rounds: int, quick: bool) -> int:
    """Mutates the report; blocks that were wrong."""
    room = BLOCK_BYTES * BLOCKS * (PROMPTS_QUICK if quick else PROMPTS)
    store = {"hot_bytes": room * 5 // 4 + 64 * MIB, "host_bytes": room * 3 // 2 + 128 * MIB, "ssd_bytes": 4 * room}
    own = {"store": store, "worker": {"pull_rate_bytes": 64 << 30, "pull_bytes_max": 128 * MIB}}
    kinds = ["repair_into_fresh_memory"] + ["repair"] * rounds + ["repair_under_replay"] * (0 if quick else REPLAYED)
    rates: dict[str, list[float]] = {"tcp_get": [], **{kind: [] for kind in kinds}}
    wrong = 0
    async with RecoveryRig(override(Config(), own), workers=WORKERS, heartbeat_s=BEAT_S, slow_start_s=0.001) as rig:
        by = await rig.client()
        for number, kind in enumerate(kinds):
            work = Work.of(BLOCK_BYTES, BLOCKS, PROMPTS_QUICK if quick else PROMPTS, revision=str(number))
            await work.put(by)
            await rig.held(work, by, COPIES)
            wrong += await _gets(by, work, len(work.prompts), [])  # warm
            wrong += await _gets(by, work, max(2, GETS // rounds), rates["tcp_get"])
            async with rig.load(work, 1) if kind == "repair_under_replay" else nullcontext() as load:
                rates[kind].append(await _repair(rig, work))
                await rig.held(work, by, COPIES)
            wrong += load.wrong if load is not None else 0
            wrong += await _gets(by, work, len(work.prompts), [])  # what was copied is what was put
            await _renew(rig, work, by)
    for name, values in rates.items():
        report.result(name, values, "GB/s")
    report.ratio("repair_vs_tcp_get", "repair", "tcp_get", at_least=0.5)
    if not quick:
        report.ratio("repair_under_replay_vs_tcp_get", "repair_under_replay", "tcp_get")
    return wrong


async def _gets(by: KVClient, work: Work, count: int, rates: list[float]) -> int:
    """A client's gets of whole prompts, verified outside the timing; blocks that were wrong."""
    wrong = 0
    for number in range(count):
        prompt = work.prompts[number % len(work.prompts)]
        begin = now()
        blocks, buffers = await work.get(by, prompt)
        rates.append(work.nbytes / (now() - begin) / 1e9)
        if blocks < len(prompt):
            raise SetupError(f"{blocks} of {len(prompt)} blocks came: {dict(by.counters)}")
        wrong += work.wrong(prompt, blocks, buffers)
    return wrong


async def _repair(rig: RecoveryRig, work: Work) -> float:
    """Kill a worker, and follow the others until each has everything; GB/s of raw bytes."""
    others = [other for other in range(WORKERS) if other != VICTIM]
    async with rig.channels(others) as channels:
        rig.signal(rig.cluster.workers[VICTIM].process.pid, signal.SIGKILL)
        return await _follow(channels, COPIES * sum(map(len, work.prompts)))


async def _renew(rig: RecoveryRig, work: Work, by: KVClient) -> None:
    """The killed worker is back, and all are empty."""
    await rig.cluster.restart_worker(VICTIM)

    async def whole() -> bool:
        workers = (await by.cluster_status())["workers"]
        return [worker["state"] for worker in workers].count("alive") == WORKERS

    await until(whole, f"{WORKERS} workers are members")
    await by.purge(work.spec)  # which looks at the members anew


async def _follow(channels: Sequence[Channel], whole: int) -> float:
    """GB/s from the last look without a new block to the one with all of them, `whole` together. Looks cost the workers
    time: between those two there are few, each half way to when the last block is to be expected."""
    before = sum(await asyncio.gather(*(blocks_on(channel) for channel in channels)))
    missing = whole - before
    if missing <= 0:
        raise SetupError("the worker that was killed had nothing to lose")
    started = begin = now()
    count = 0
    while now() - begin < WAIT_S:
        asked = now()
        count = sum(await asyncio.gather(*(blocks_on(channel) for channel in channels))) - before
        if count == 0:
            started = asked
        if count >= missing:
            return count * BLOCK_BYTES / (now() - started) / 1e9
        left_s = 0.0 if count == 0 else (asked - started) * (missing - count) / count
        await asyncio.sleep(max(POLL_S, min(left_s / 2, LOOK_S)))
    raise SetupError(f"{count} of {missing} blocks were copied within {WAIT_S:g} s")
