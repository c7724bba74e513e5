"""`kvstore bench eviction TRACE...`: prefix hits of policies over capacities, beside the exact optimum.

The policies are the objects residency uses (`kvstore.policies.base.make_policy`); the replay and its model stand in
`kvstore.operations.eviction_replay`. Results are percent, named TRACE/CAPACITY/POLICY; `gap_closed` is the mean over
the cells of (policy - LRU) / (OPT - LRU).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvstore.bench.eviction_cost import measure_cost
from kvstore.bench.eviction_plot import plot
from kvstore.bench.report import Report
from kvstore.errors import UsageError
from kvstore.kernels.belady import hits
from kvstore.machine.system import thread_cpu_s
from kvstore.operations.eviction_replay import BlockTrace, Knows, Replay, block_trace
from kvstore.operations.trace import read_trace
from kvstore.policies.base import POLICIES, make_policy

QUICK_REQUESTS = 1500
QUICK_CAPACITIES = "5%"
COST, QUICK_COST = (1_000_000, 1_000_000), (50_000, 50_000)
"""Resident blocks, and accesses that are timed."""


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvstore bench eviction", description=__doc__)
    parser.add_argument("traces", nargs="*", metavar="TRACE", help="JSON lines in the Mooncake format, plain or .zst")
    parser.add_argument("--capacity", default="", metavar="C,...", help="shares of the distinct blocks, or blocks")
    parser.add_argument("--policy", default="lru,s3fifo,arc,default", metavar="P,...", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--hints", choices=("none", "session-end"), default="none", help="what callers tell besides")
    parser.add_argument("--no-output", action="store_true", help="keep output length and finish reason from policies")
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N of each trace")
    parser.add_argument("--plot", metavar="FILE.svg", help="hits over capacity, a panel a trace")
    parser.add_argument("--cost", action="store_true", help="time decisions with a million resident blocks, too")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests at {QUICK_CAPACITIES}")
    return parser


def main(arguments: Sequence[str]) -> Report:
    asked = flags().parse_args(arguments)
    if not asked.traces and not asked.cost:
        raise UsageError("name at least one TRACE, or ask for --cost")
    capacities = (asked.capacity or (QUICK_CAPACITIES if asked.quick else "1%,2%,5%,10%,20%,50%")).split(",")
    policies = asked.policy.split(",")
    for name in policies:
        make_policy(name)  # an unknown one is refused before anything runs
    requests = asked.requests or (QUICK_REQUESTS if asked.quick else None)
    knows = Knows(outputs=not asked.no_output, session_ends=asked.hints == "session-end")
    report = Report("eviction")
    report.notes.append("percent of requested blocks that are prefix hits, over the second half of the time span")
    if knows.session_ends:
        report.notes.append("hints: a perfect `session ended` with the last request of each session")
    if not knows.outputs:
        report.notes.append("policies are not told output length and finish reason")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for path in asked.traces:
            trace = block_trace(read_trace(path, requests))
            if not len(trace.blocks):
                raise UsageError(f"{path} names no block: give a trace in the Mooncake format")
            for capacity in capacities:
                cell = f"{Path(path).name.split('.')[0]}/{capacity}"
                measure(report, trace, cell, blocks_of(capacity, trace), policies, knows, progress)
    if asked.cost:
        measure_cost(report, *(QUICK_COST if asked.quick else COST))
    if "lru" in policies and asked.traces:
        gaps(report, policies)
    if asked.plot:
        Path(asked.plot).write_text(plot(report.results))
    return report


def blocks_of(capacity: str, trace: BlockTrace) -> int:
    """UsageError for text that is no capacity."""
    try:
        blocks = int(trace.distinct * float(capacity[:-1]) / 100) if capacity.endswith("%") else int(capacity)
    except ValueError:
        raise UsageError(f"{capacity!r} is no capacity: write a share such as 5% or a number of blocks") from None
    return max(1, blocks)


def measure(
    report: Report,
    trace: BlockTrace,
    cell: str,
    capacity: int,
    policies: Sequence[str],
    knows: Knows,
    progress: Progress,
) -> None:
    """One capacity of one trace: the optimum, then every policy. Mutates `report`."""
    depth = np.array(trace.depth, np.int64)
    asked = len(trace.blocks) - (int(trace.ends[trace.first_counted - 1]) if trace.first_counted else 0)
    best = hits(trace.ends, trace.blocks, depth, capacity, trace.first_counted)
    report.result(f"{cell}/opt", [100.0 * best / asked], "%")
    for name in policies:
        task = progress.add_task(f"{cell}/{name}", total=len(trace.times))
        begun = thread_cpu_s()
        outcome = Replay(trace, make_policy(name), capacity, knows).run(_told(progress, task))
        seconds = thread_cpu_s() - begun
        progress.remove_task(task)
        report.result(f"{cell}/{name}", [outcome.percent], "%")
        report.result(f"{cell}/{name}/written", [float(outcome.written)], "blocks")
        report.result(f"{cell}/{name}/decisions", [outcome.accesses / max(seconds, 1e-6)], "1/s")


def _told(progress: Progress, task: int) -> Callable[[int], None]:
    return lambda requests: progress.advance(task, requests)  # type: ignore[arg-type]


def gaps(report: Report, policies: Sequence[str]) -> None:
    """How much of the distance from LRU to the optimum each policy closes, where there is one. Mutates `report`."""
    cells = [name.removesuffix("/opt") for name in report.results if name.endswith("/opt")]
    value = {name: result["value"] for name, result in report.results.items()}
    for policy in policies:
        if policy == "lru":
            continue
        closed = [
            100 * (value[f"{c}/{policy}"] - value[f"{c}/lru"]) / (value[f"{c}/opt"] - value[f"{c}/lru"])
            for c in cells
            if value[f"{c}/opt"] > value[f"{c}/lru"]
        ]
        if closed:
            report.result(f"gap_closed/{policy}", [fmean(closed)], "% of the distance from LRU to the optimum")
        worst = min(value[f"{c}/{policy}"] - value[f"{c}/lru"] for c in cells)
        report.result(f"worst_beside_lru/{policy}", [worst], "points")
    if "default" in policies:
        report.target("worst_beside_lru/default", at_least=-0.5)
