"""`bench recovery`, repair: a worker dies, and the others copy what it had a copy of; beside a client's own gets.

The rate is that of all workers together, from the first block that is copied to the last one; the lease that has to run
out before is not in it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import nullcontext

from kvstore.bench.recovery_rig import POLL_S, WAIT_S, RecoveryRig, Work, blocks_on, now
from kvstore.bench.report import Report
from kvstore.client.kv_client import KVClient
from kvstore.config import MIB, Config, override
from kvstore.errors import SetupError
from kvstore.transport.base import Channel

BLOCK_BYTES, BLOCKS = 2 << 20, 32
PROMPTS, PROMPTS_QUICK = 12, 5
GETS = 7
LOOK_S = 0.25
BEAT_S = 0.05
"""Hints come with the answers to heartbeats: of as little data as here, waiting for them would take half the time."""


async def measure_repair(report: Report, rounds: int, quick: bool) -> int:
    """Mutates the report; blocks that were wrong."""
    work = Work.of(BLOCK_BYTES, BLOCKS, PROMPTS_QUICK if quick else PROMPTS)
    room = work.nbytes * len(work.prompts)
    store = {"hot_bytes": room * 5 // 4 + 64 * MIB, "host_bytes": room * 3 // 2 + 128 * MIB, "ssd_bytes": 4 * room}
    own = {"store": store, "worker": {"pull_rate_bytes": 64 << 30, "pull_bytes_max": 128 * MIB}}
    repairs = ("repair",) if quick else ("repair", "repair_under_replay")
    rates: dict[str, list[float]] = {name: [] for name in ("tcp_get", *repairs)}
    async with RecoveryRig(override(Config(), own), workers=3, heartbeat_s=BEAT_S) as rig:
        by = await rig.client()
        await work.put(by)
        await rig.held(work, by)
        wrong = await _gets(by, work, len(work.prompts), [])  # warm
        for _ in range(rounds):
            wrong += await _gets(by, work, max(2, GETS // rounds), rates["tcp_get"])
            for name in repairs:
                async with rig.load(work, 1) if name == "repair_under_replay" else nullcontext() as load:
                    rates[name].append(await _repair(rig, work, by))
                    await rig.held(work, by)
                wrong += load.wrong if load is not None else 0
        wrong += await _gets(by, work, len(work.prompts), [])  # what was copied is what was put
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


async def _repair(rig: RecoveryRig, work: Work, by: KVClient) -> float:
    """Kill the worker that has most of it, and follow the others; GB/s of raw bytes. It is back when this returns."""
    held: dict[str, int] = {}
    for prompt in work.prompts:
        for worker, count in (await work.holders(by, prompt)).items():
            held[worker] = held.get(worker, 0) + count
    victim = max(held, key=lambda worker: held[worker])
    index = rig.index(victim)
    others = [other for other in range(len(rig.cluster.workers)) if other != index]
    async with rig.channels(others) as channels:
        rig.signal(rig.cluster.workers[index].process.pid, signal.SIGKILL)
        rate = await _follow(channels, held[victim])
    await rig.cluster.restart_worker(index)
    return rate


async def _follow(channels: Sequence[Channel], missing: int) -> float:
    """GB/s from the last look without a new block to the one with all of them. Looks cost the workers time: between the
    two there are few, each half way to when the last block is to be expected."""
    before = sum(await asyncio.gather(*(blocks_on(channel) for channel in channels)))
    started = begin = now()
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
