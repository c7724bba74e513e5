"""Two threads, a core each, on chunks that stay in their caches, beside what the machine gives two threads at all.

A call decodes or encodes 16 chunks, as the store's calls of a block do; here they are the same two over and over. The
controls: a loop in registers, and copies of the same two chunks, compiled alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvstore.bench.codec_speed import BF16, CHUNK, TOGETHER, Kernel, Memory
from kvstore.bench.report import Report, in_turns
from kvstore.kernels import jit

CALLS = 400
SPIN = 1 << 20  # steps that take about as long as a call on a block


@jit
def spin(count: Any, seed: Any) -> Any:
    """Knuth's linear congruential generator: each step waits for the one before, none for memory."""
    x = np.uint64(seed)
    for _ in range(count):
        x = np.uint64(x * np.uint64(6364136223846793005) + np.uint64(1442695040888963407))
    return x


@jit
def copies(source: Any, target: Any, times: Any) -> Any:
    for _ in range(times):
        for k in range(source.size):
            target[k] = source[k]


class Thread:
    """One thread's own chunks."""

    def __init__(self) -> None:
        self.kernel = Kernel(Memory(2 * CHUNK), "fast")
        self.kernel.encode(range(2))
        memory, jobs = self.kernel.memory, self.kernel.jobs
        back = jobs[:, [4, 5, 2, 3, 0, 1]]
        back[:, 1], back[:, 5] = self.kernel.sizes, CHUNK
        self.jobs = {name: np.tile(some, (TOGETHER // 2, 1)) for name, some in (("encode", jobs), ("decode", back))}
        self.source, self.target = memory.raw.view(np.uint64), memory.back.view(np.uint64)

    def work(self, what: str, calls: int) -> None:
        use, memory = self.kernel.use, self.kernel.memory
        for _ in range(calls):
            if what == "registers":
                spin(SPIN, 1)
            elif what == "memcpy":
                copies(self.source, self.target, TOGETHER)
            elif what == "encode":
                use.fast_encode(BF16, memory.source, memory.out, self.jobs[what])
            else:
                use.fast_decode(BF16, memory.stored, memory.back, self.jobs[what])


def threads(report: Report, clock: Callable[[], float], rounds: int) -> None:
    """`threads/WHAT_two_to_one` for the codec and its controls."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        for what in ("decode", "encode"):
            report.missing(f"threads/{what}_two_to_one", "x", "this process has one core")
            report.target(f"threads/{what}_two_to_one", at_least=1.5)
        return
    mine = [Thread(), Thread()]
    for what in ("registers", "memcpy", "decode", "encode"):
        mine[0].work(what, 1)  # compiled before it is timed
        free = iter(cores)

        def stay(free: Iterator[int] = free) -> None:
            os.sched_setaffinity(
                0, {next(free)}
            )  # of this thread: the scheduler takes longer than a round to part them

        with ThreadPoolExecutor(2, initializer=stay) as pool:

            def one(what: str = what) -> None:
                pool.submit(mine[0].work, what, CALLS).result()

            def two(what: str = what) -> None:
                list(pool.map(lambda which: mine[which].work(what, CALLS), (0, 1)))

            seconds = in_turns(clock, {"one": one, "two": two}, rounds=rounds)
        for name, count in (("one", 1), ("two", 2)):
            done = {"registers": SPIN, "memcpy": TOGETHER * 2 * CHUNK}.get(what, TOGETHER * CHUNK)
            rate = count * CALLS * done / 1e9
            unit = "G steps/s" if what == "registers" else "GB/s of raw bytes"
            report.result(f"threads/{what}_{name}", [rate / s for s in seconds[name]], unit)
        bars = {"at_least": 1.5} if what in ("decode", "encode") else {}
        report.ratio(f"threads/{what}_two_to_one", f"threads/{what}_two", f"threads/{what}_one", **bars)
