"""What happens to a simulated fleet: machines, disks, clocks, links and Redis go wrong, and come back."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from random import Random

from tests.sim.fleet import Fleet, Node

PAUSE_MEAN_S = 0.3
SLOW_S = 0.3  # of one byte mover's work, at most


class Trouble:
    """Draws one trouble after the other. Every one ends by itself, before `run` returns or soon after."""

    def __init__(self, fleet: Fleet, rng: Random, seen: Counter[str]) -> None:
        self._fleet, self._rng, self._seen = fleet, rng, seen
        self._tasks: dict[asyncio.Task[None], None] = {}
        self.over = False
        self._kinds = [
            self._crash_worker, self._crash_worker, self._crash_coordinator, self._crash_client, self._cut, self._cut,
            self._pause, self._pause, self._slow, self._slow, self._slow_reader, self._slow_reader,
            self._disk, self._disk, self._clock,
        ]  # fmt: skip
        if fleet.redis is not None:
            self._kinds += [self._redis_dies, self._redis_forgets, self._redis_hangs, self._redis_full]

    async def run(self) -> None:
        """Until `over`; two troubles may overlap."""
        while not self.over:
            await asyncio.sleep(self._rng.expovariate(1 / PAUSE_MEAN_S))
            task = asyncio.create_task(self._rng.choice(self._kinds)())
            self._tasks[task] = None
            task.add_done_callback(lambda done: self._tasks.pop(done, None))
            await asyncio.wait([task], timeout=self._rng.choice([0.0, 0.5, 2.0]))
            if task.done():
                task.result()
        for task in list(self._tasks):
            await task

    def _note(self, trouble: str) -> None:
        self._seen[trouble] += 1

    def _any(self, nodes: list[Node]) -> Node | None:
        """One that is up and whole."""
        live = [node for node in nodes if node.up and node.process is not None and not node.process.paused]
        return self._rng.choice(live) if live else None

    async def _wait(self, *seconds: float) -> None:
        await asyncio.sleep(self._rng.choice(seconds))

    # --- processes ---------------------------------------------------------------------------------------------------

    async def _crash_worker(self) -> None:
        node = self._any(self._fleet.workers)
        if node is None or node.runtime is None:
            return
        if self._rng.random() < 0.5:
            self._fleet.power_off(node)
            self._note("power_losses")
        else:
            self._fleet.crash(node)
        self._note("worker_crashes")
        await self._wait(0.05, 0.05, 1.0, 5.0)
        await self._fleet.start_worker(node)

    async def _crash_coordinator(self) -> None:
        node = self._any(self._fleet.coordinators)
        if node is None or node.runtime is None:
            return
        self._fleet.crash(node)
        self._note("coordinator_crashes")
        await self._wait(0.05, 1.0, 5.0)
        await self._fleet.start_coordinator(node)

    async def _crash_client(self) -> None:
        node = self._any(self._fleet.clients)
        if node is not None:
            self._fleet.crash(node)
            self._note("client_crashes")

    async def _pause(self) -> None:
        node = self._any([*self._fleet.workers, *self._fleet.coordinators, *self._fleet.clients])
        if node is None or node.process is None:
            return
        process = node.process
        process.pause()
        self._note("pauses")
        await self._wait(0.5, 1.0, 4.0)
        process.resume()

    async def _slow(self) -> None:
        """Its byte movers take long: a busy machine, a slow disk."""
        node = self._any([*self._fleet.workers, *self._fleet.clients])
        if node is None or node.process is None:
            return
        process = node.process
        process.slow_s = self._rng.choice([0.02, SLOW_S])
        process.slowed += 1
        self._note("slow_machines")
        await self._wait(1.0, 4.0)
        process.slow_s = 0.0

    async def _slow_reader(self) -> None:
        """A reader takes its time, and its worker ends their connection meanwhile: what it reads is no longer held."""
        node = self._any(self._fleet.clients)
        if node is None or node.process is None:
            return
        process = node.process
        process.slow_s = SLOW_S
        process.slowed += 1
        self._note("slow_readers")
        for _ in range(self._rng.randrange(4)):
            await self._wait(0.3, 0.6)
            self._fleet.network.hang_up(process)
        await self._wait(0.5)
        process.slow_s = 0.0

    async def _clock(self) -> None:
        """Somebody sets a wall clock."""
        node = self._any(self._fleet.workers)
        if node is not None and node.process is not None:
            node.process.wall_step_s += self._rng.choice([-30.0, -1.0, 1.0, 30.0])
            self._note("clock_steps")

    # --- links and disks ---------------------------------------------------------------------------------------------

    async def _cut(self) -> None:
        fleet = self._fleet
        nodes = [*fleet.workers, *fleet.coordinators, *fleet.clients]
        one, other = self._rng.sample(nodes, 2)
        if one.host == other.host:
            return
        fleet.network.cut(one.name, other.name)
        self._note("cuts")
        await self._wait(0.2, 2.0, 5.0)
        fleet.network.heal(one.name, other.name)

    async def _disk(self) -> None:
        node = self._rng.choice(self._fleet.workers)
        for disk in list(node.disks.values()):
            kind = self._rng.choice(["full", "rot", "rot", "write", "read", "sync"])
            self._note(f"disk_{kind}")
            if kind == "rot":
                disk.rot(self._rng, spared=("worker.json",))
                continue
            if kind == "full":
                disk.capacity = disk.used()
            else:
                disk.failing[kind] = errno.EIO
            await self._wait(0.3, 2.0)
            disk.capacity = None
            disk.failing.clear()

    # --- Redis -------------------------------------------------------------------------------------------------------

    async def _redis_dies(self) -> None:
        redis = self._fleet.redis
        assert redis is not None
        if not redis.up:
            return
        kept = redis.data.snapshot() if self._rng.random() < 0.5 else None
        await self._wait(0.0, 1.0, 3.0)  # the dump is older than the end
        if not redis.up:
            return
        redis.stop()
        self._note("redis_restored" if kept is not None else "redis_lost")
        await self._wait(0.1, 2.0)
        redis.start(kept)

    async def _redis_forgets(self) -> None:
        assert self._fleet.redis is not None
        self._fleet.redis.flush()
        self._note("redis_flushes")

    async def _redis_hangs(self) -> None:
        assert self._fleet.redis is not None
        self._fleet.redis.hangs = True
        self._note("redis_hangs")
        await self._wait(0.3, 3.0)
        self._fleet.redis.hangs = False

    async def _redis_full(self) -> None:
        redis = self._fleet.redis
        assert redis is not None
        redis.maxmemory = max(1, redis.data.used)
        self._note("redis_full")
        await self._wait(0.5, 2.0)
        redis.maxmemory = 0
