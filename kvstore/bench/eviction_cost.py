"""`bench eviction --cost`: what a decision costs with a million resident blocks, in CPU time of one core.

Sessions fill the capacity, then go on or begin anew, the recent ones more often: about half of the accesses are uses,
half bring a block, each of which makes another leave. Only what comes after the filling is timed, with the replay's own
bookkeeping in it, which is most of what LRU costs.
"""

from __future__ import annotations

from array import array

import numpy as np

from kvstore.bench.report import Report
from kvstore.machine.system import thread_cpu_s
from kvstore.operations.eviction_replay import BlockTrace, Replay
from kvstore.policies.base import make_policy
from kvstore.policies.usage import Finish

PROMPT_BLOCKS = 64  # of a session's first request
TURN_BLOCKS = 32  # more with each further one
TURNS_MAX = 8
BEGIN_SHARE = 0.4  # of the requests begin a session
STEP_S = 0.1


def sessions(resident: int, timed: int, seed: int = 3) -> tuple[BlockTrace, int]:
    """A trace whose first requests bring `resident` blocks, then about `timed` accesses; and the request where those
    begin. Pure."""
    rng = np.random.Generator(np.random.PCG64(seed))
    parent, depth, blocks, ends = list[int](), list[int](), array("i"), array("q")
    prompts: list[list[int]] = []
    first, accesses = -1, 0
    while accesses < timed:
        filling = len(parent) < resident
        if not filling and first < 0:
            first = len(ends)
        if filling or rng.random() < BEGIN_SHARE:
            prompts.append([])
            prompt, more = prompts[-1], PROMPT_BLOCKS
        else:
            prompt = prompts[-1 - min(len(prompts) - 1, int(rng.exponential(len(prompts) / 4)))]
            more = TURN_BLOCKS if len(prompt) < PROMPT_BLOCKS + TURN_BLOCKS * TURNS_MAX else 0
        for _ in range(more):
            parent.append(prompt[-1] if prompt else -1)
            depth.append(len(prompt))
            prompt.append(len(parent) - 1)
        blocks.extend(prompt)
        ends.append(len(blocks))
        accesses += 0 if filling else len(prompt)
    count = len(ends)
    times = (np.arange(count) * STEP_S).tolist()
    outputs: list[int] = rng.integers(1, 2000, count).tolist()
    finishes = [Finish.TOOL_USE if output % 3 else Finish.END_TURN for output in outputs]
    ended = [False] * count
    columns = np.array(ends, np.int64), np.array(blocks, np.int32)
    return BlockTrace(times, outputs, finishes, *columns, parent, depth, first, ended), first


def measure_cost(report: Report, resident: int, timed: int, policies: tuple[str, ...] = ("lru", "default")) -> None:
    """Mutates `report`."""
    trace, first = sessions(resident, timed)
    begin = int(trace.ends[first - 1])
    for name in policies:
        run = Replay(trace, make_policy(name), resident)
        run.play(0, first)
        began = thread_cpu_s()
        run.play(first, len(trace.times))
        report.result(f"decision_us/{name}", [1e6 * (thread_cpu_s() - began) / (len(trace.blocks) - begin)], "us")
    report.target("decision_us/default", at_most=5.0)
    report.notes.append(f"decision_us: CPU microseconds a block access, {resident} resident blocks")
