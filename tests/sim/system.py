"""The simulator's `System`: virtual clock, seeded randomness, byte work inline after a delay, memory of bytearrays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import TypeVar

from kvstore.errors import SetupError
from kvstore.seams import Disk, System
from tests.sim.loop import SimProcess

T = TypeVar("T")

WALL_NS = 1_800_000_000 * 10**9


class SimClock:
    """Its own origin per process; the wall clocks of two processes differ by up to a second."""

    def __init__(self, process: SimProcess) -> None:
        self._process = process

    def monotonic(self) -> float:
        return self._process.monotonic()

    def wall_ns(self) -> int:
        skew_ns = int(self._process.clock_offset_s * 1e9) % 10**9
        return WALL_NS + int(asyncio.get_running_loop().time() * 1e9) + skew_ns


class SimPool:
    """Byte work is atomic at a drawn moment between its call and its return.

    As in the real pool, a caller that is cancelled before the work began never sees it done.
    """

    def __init__(self, rng: Random, delay_max_s: float = 0.001) -> None:
        self._rng = rng
        self.delay_max_s = delay_max_s
        self.closed = False

    async def run(self, function: Callable[..., T], *args: object) -> T:
        if self.closed:
            raise RuntimeError("the pool is closed")
        await asyncio.sleep(self._rng.uniform(0.0, self.delay_max_s))
        result = function(*args)
        await asyncio.sleep(self._rng.uniform(0.0, self.delay_max_s))
        return result

    def close(self) -> None:
        self.closed = True


class SimSegment:
    """Shared memory that lives as long as any mapping of it."""

    fd: int | None = None

    def __init__(self, name: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.view = memoryview(bytearray(nbytes))

    def close(self) -> None:
        self.view = memoryview(b"")


class SimMemory:
    """Counts what it made, so that a scenario can bound it."""

    def __init__(self) -> None:
        self.made = 0

    def segment(self, name: str, nbytes: int, *, sealed_writes: bool) -> SimSegment:
        self.made += 1
        return SimSegment(name, nbytes)


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
        pool=SimPool(Random(f"pool/{seed}/{process.name}/{process.clock_offset_s}")),
        host=process.host,
        disk=disk,
    )
