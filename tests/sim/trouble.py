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
            self._crash_worker, self._crash_worker, self._drain, self._crash_coordinator, self._crash_client,
            self._cut, self._cut,
            self._pause, self._pause, self._slow, self._slow_reader, self._pause_reader, self._pause_reader,
            self._disk, self._disk, self._clock,
        ]  # fmt: skip
        if fleet.redis is not None:
            self._kinds += [self._redis, self._redis]
        if rng.random() < 0.6:  # a few kinds, again and again, lead further than all of them in turn
            self._kinds = rng.sample(self._kinds, rng.randrange(2, 6))

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
        for node in self._fleet.coordinators:
            if not node.up:
                await self._fleet.start_coordinator(node)

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
            if not await self._power_loss(node):
                return
        else:
            self._fleet.crash(node)
        self._note("worker_crashes")
        await self._wait(0.05, 0.05, 1.0, 5.0)
        await self._fleet.start_worker(node)

    async def _power_loss(self, node: Node) -> bool:
        """With an announcement on its way, which will come when the next life is known; whether it happened."""
        assert node.process is not None
        process, sent = node.process, asyncio.Event()
        process.on_announce = sent.set
        try:
            async with asyncio.timeout(2.0):
                await sent.wait()
        except TimeoutError:
            process.on_announce = None
        if node.process is not process or not node.up or process.paused or node.runtime is None:
            return False
        self._fleet.power_off(node)
        self._note("power_losses")
        return True

    async def _crash_coordinator(self) -> None:
        """Or leaves; one that was not there yet comes."""
        node = self._rng.choice(self._fleet.coordinators)
        if node.up and (node.runtime is None or node.process is None or node.process.paused):
            return
        if not node.up:
            if node.process is None:
                await self._fleet.start_coordinator(node)
                self._note("coordinators_joined")
            return
        if self._rng.random() < 0.3 and node.process is not None:
            runtime, node.runtime = node.runtime, None
            await asyncio.wait([node.process.spawn(runtime.stop())], timeout=5.0)
            self._note("coordinators_left")
        self._fleet.crash(node)
        self._note("coordinator_crashes")
        await self._wait(0.05, 1.0, 5.0)
        await self._fleet.start_coordinator(node)

    async def _drain(self) -> None:
        """A worker is emptied, stops, and comes back."""
        node = self._any(self._fleet.workers)
        if node is None or node.runtime is None or node.process is None:
            return
        process, runtime = node.process, node.runtime
        await asyncio.wait([process.spawn(runtime.drain(2.0))], timeout=10.0)
        if node.process is not process or not node.up:
            return
        node.runtime = node.witness = None
        await asyncio.wait([process.spawn(runtime.stop())], timeout=10.0)
        if node.process is not process or not node.up:
            return
        self._note("drains")
        self._fleet.crash(node)
        await self._wait(0.05, 1.0)
        await self._fleet.start_worker(node)

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

    async def _pause_reader(self) -> None:
        """A reader stands still in the middle of a copy, and its connection may end: what it reads is used again."""
        node = self._any(self._fleet.clients)
        if node is None or node.process is None or node.process.on_read is not None:
            return
        process, stopped = node.process, asyncio.Event()

        def stop() -> None:
            if not process.paused:
                process.pause()
                stopped.set()

        process.on_read = stop
        try:
            async with asyncio.timeout(3.0):
                await stopped.wait()
        except TimeoutError:
            process.on_read = None
            return
        self._note("stopped_readers")
        if self._rng.random() < 0.5:
            self._fleet.network.hang_up(process)
        await self._wait(1.0, 2.0, 3.0)
        process.resume()

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

    async def _redis(self) -> None:
        kinds = [self._redis_dies, self._redis_dies, self._redis_forgets, self._redis_hangs, self._redis_full]
        await self._rng.choice(kinds)()

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
