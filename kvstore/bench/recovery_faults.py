"""`bench recovery`, faults: under load a worker is killed and one stopped, a coordinator is killed; hits go on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from kvstore.bench.recovery_rig import LEASE_S, RecoveryRig, Work, now, until
from kvstore.bench.report import Report
from kvstore.client.kv_client import KVClient
from kvstore.config import MIB, Config, override

BLOCK_BYTES, BLOCKS, PROMPTS = 64 << 10, 16, 24
WINDOW_S, WINDOW_QUICK_S = 2.0, 1.2  # of hits after a fault: longer than one get that meets it


async def measure_faults(report: Report, rounds: int, quick: bool) -> int:
    """Mutates the report; blocks that were wrong."""
    window_s = WINDOW_QUICK_S if quick else WINDOW_S
    store = {"host_bytes": 192 * MIB, "hot_bytes": 128 * MIB, "ssd_bytes": 256 * MIB, "ssd_segment_bytes": 16 * MIB}
    killed: list[float] = []
    stopped: list[float] = []
    gap: list[float] = []
    hits: list[float] = []
    work = Work.of(BLOCK_BYTES, BLOCKS, PROMPTS)
    async with RecoveryRig(override(Config(), {"store": store}), workers=3, coordinators=2) as rig:
        by = await rig.client()
        await work.put(by)
        await rig.held(work, by)
        async with rig.load(work, 2) as load:
            for _ in range(rounds):
                for seconds, number in ((killed, signal.SIGKILL), (stopped, signal.SIGSTOP)):
                    took, share = await _worker(rig, work, by, number, window_s, load.hits)
                    seconds.append(took)
                    hits.append(share)
                begin = now()
                gap.append(await _coordinator(rig, work, by, window_s))
                hits.append(load.hits(begin, now()))
                await rig.held(work, by)
        wrong = load.wrong
    report.result("worker_killed_out_of_answers", killed, "s")
    report.target("worker_killed_out_of_answers", at_most=0.5)
    report.result("worker_stopped_out_of_answers", stopped, "s")
    report.result("lease", [LEASE_S], "s")
    report.target("worker_stopped_out_of_answers", at_most=LEASE_S + 0.5)
    report.result("coordinator_killed_served_by_another", gap, "s")
    report.target("coordinator_killed_served_by_another", at_most=1.0)
    report.result("hits_during_faults", [min(hits)], "share of the surviving blocks")
    report.target("hits_during_faults", at_least=0.9)
    return wrong


async def _worker(
    rig: RecoveryRig,
    work: Work,
    by: KVClient,
    number: int,
    window_s: float,
    hits: Callable[[float, float], float],
) -> tuple[float, float]:
    """Seconds until no answer names the worker any more, and the hits meanwhile; it is back when this returns."""
    prompt = work.prompts[0]
    victim = next(iter(await work.holders(by, prompt)))
    index = rig.index(victim)
    pid = rig.cluster.workers[index].process.pid

    async def gone() -> bool:
        return victim not in await work.holders(by, prompt)

    begin = now()
    rig.signal(pid, number)
    took = await until(gone, "the worker is out of the answers")
    await asyncio.sleep(max(0.0, begin + window_s - now()))
    share = hits(begin, now())
    if number == signal.SIGSTOP:
        rig.signal(pid, signal.SIGCONT)
    else:
        await rig.cluster.restart_worker(index)
    await rig.held(work, by)
    return took, share


async def _coordinator(rig: RecoveryRig, work: Work, by: KVClient, window_s: float) -> float:
    """The longest time between two lookups that were answered, around the death of the coordinator that is asked."""
    asked = rig.cluster.coordinators.index(
        next(server for server in rig.cluster.coordinators if server.address == by.coordinators.preferred)
    )
    last, longest = now(), 0.0
    killed = False
    begin = now()
    while now() - begin < window_s:
        plan = await by.match(work.spec, work.prompts[0])
        if plan.blocks == len(work.prompts[0]) and plan.complete:
            longest, last = max(longest, now() - last), now()
        if not killed:
            rig.cluster.coordinators[asked].process.kill()
            killed = True
    longest = max(longest, now() - last)
    await rig.cluster.restart_coordinator(asked)
    return longest
