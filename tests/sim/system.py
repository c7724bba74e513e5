"""The simulator's `System`: virtual clock, seeded randomness, byte work after a delay, memory read bit by bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import TypeVar

from kvstore.errors import SetupError
from kvstore.seams import Disk, System
from tests.sim.loop import SimProcess
from tests.sim.memory import SimMemory

T = TypeVar("T")

WALL_NS = 1_800_000_000 * 10**9
DELAY_MAX_S = 0.001


class SimClock:
    """Its own origin and rate per process; the wall clocks of two processes differ, and may be set back."""

    def __init__(self, process: SimProcess) -> None:
        self._process = process

    def monotonic(self) -> float:
        return self._process.monotonic()

    def wall_ns(self) -> int:
        process = self._process
        skew_ns = int(process.clock_offset_s * 1e9) % 10**9 + int(process.wall_step_s * 1e9)
        return WALL_NS + int(asyncio.get_running_loop().time() * 1e9) + skew_ns


class SimPool:
    """Byte work is done in one step at the end of a drawn time, but has seen mapped memory of others bit by bit.

    As in the real pool, a caller that is cancelled before the work began never sees it done; later it waits for it.
    """

    def __init__(self, rng: Random, process: SimProcess) -> None:
        self._rng = rng
        self._process = process
        self.closed = False

    async def run(self, function: Callable[..., T], *args: object) -> T:
        if self.closed:
            raise RuntimeError("the pool is closed")
        await asyncio.sleep(self._delay())
        if not self._process.mappings:
            result = function(*args)
            await asyncio.sleep(self._delay())
            return result
        work = asyncio.get_running_loop().create_task(self._work(function, *args))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            while not work.done():
                try:
                    await asyncio.wait([work])
                except asyncio.CancelledError:
                    continue  # cancelled again: the buffers are still in use
            if not work.cancelled():
                work.exception()  # seen: the caller is told of its cancellation instead
            raise

    async def _work(self, function: Callable[..., T], *args: object) -> T:
        """Maps memory of others: what it sees of it is of two moments, and of the generations the last one."""
        seen, share = list(self._process.mappings), self._rng.random()
        for mapping in seen:
            mapping.look(0.0, share)
        hook, self._process.on_read = self._process.on_read, None
        if hook is not None:
            hook()
        await asyncio.sleep(self._delay())
        for mapping in seen:
            mapping.look(share, 1.0)
            mapping.look_at_table()
        result = function(*args)
        await asyncio.sleep(self._delay())
        return result

    def _delay(self) -> float:
        slow = self._process.slow_s
        return self._rng.uniform(0.0, slow or DELAY_MAX_S)

    def close(self) -> None:
        self.closed = True


def no_disk(folder: str) -> Disk:
    """The default: a scenario that needs one passes tests.memdisk's."""
    raise SetupError(f"{folder}: this scenario has no disk")


def sim_system(process: SimProcess, seed: int | str, disk: Callable[[str], Disk] = no_disk) -> System:
    """The ports of one incarnation of a process; `seed` and its name decide its random numbers."""
    rng = Random(f"system/{seed}/{process.name}/{process.clock_offset_s}")
    return System(
        clock=SimClock(process),
        rng=rng,
        memory=SimMemory(),
        pool=SimPool(Random(f"pool/{seed}/{process.name}/{process.clock_offset_s}"), process),
        host=process.host,
        disk=disk,
    )
