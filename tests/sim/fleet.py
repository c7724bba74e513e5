"""A whole cluster in one process: the real runtimes on simulated machines, and the means to hurt them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import Any

from coordinator.runtime import CoordinatorRuntime
from kvstore.client.kv_client import KVClient
from kvstore.directory.runs import Added, Change
from kvstore.errors import SetupError
from tests.memdisk import MemoryDisk
from tests.sim.loop import SimProcess
from tests.sim.network import Faults, MemoryNetwork
from tests.sim.redis_server import SimLink, SimRedis
from tests.sim.shape import NAMESPACES, PORT, Shape, client
from tests.sim.system import sim_system
from tests.sim.witness import Witness
from workers.runtime import WorkerRuntime

START_TRIES = 120
START_PAUSE_S = 0.5

Held = dict[tuple[str, bytes, bytes], None]
"""(namespace, shard, key), ordered"""


@dataclass(slots=True)
class Node:
    """A machine slot: what survives its processes."""

    name: str
    host: str
    process: SimProcess | None = None
    runtime: Any = None
    system: Any = None
    namespace: str = ""  # a client's
    disks: dict[str, MemoryDisk] = field(default_factory=dict)
    witness: Witness | None = None  # a worker's

    @property
    def up(self) -> bool:
        return self.process is not None and not self.process.crashed


class Fleet:
    """Starts, crashes and restarts; remembers what each life of a worker ever held (for I7)."""

    def __init__(self, seed: int, shape: Shape, faults: Faults) -> None:
        self.seed, self.shape = seed, shape
        self.network = MemoryNetwork(seed, faults)
        self.rng = Random(f"fleet/{seed}")
        self.workers = [Node(f"w{i}", f"h{i}") for i in range(shape.workers)]
        self.coordinators = [Node(f"c{i}", f"hc{i}") for i in range(shape.coordinators)]
        hosts = [0, *range(shape.workers + 1)]  # two clients with the first worker, one with none
        self.clients = [Node(f"k{i}", f"h{hosts[i % len(hosts)]}") for i in range(shape.clients)]
        self.addresses = tuple(f"{node.name}:{PORT}" for node in self.coordinators)
        self.redis = SimRedis(self.network) if shape.redis else None
        self.lives: dict[tuple[str, int], Held] = {}
        self.epochs: dict[str, list[int]] = {}

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """The last coordinator of several comes later, as a trouble that ends."""
        for node in self.coordinators[: max(1, len(self.coordinators) - 1)]:
            await self.start_coordinator(node)
        for node in self.workers:
            await self.start_worker(node)

    def _boot(self, node: Node) -> Any:
        assert not node.up
        node.runtime = None
        node.process = self.network.boot(node.name, node.host, drift=self.shape.drift)

        def disk(folder: str) -> MemoryDisk:
            return node.disks.setdefault(folder, MemoryDisk())

        return sim_system(node.process, self.seed, disk)

    async def start_coordinator(self, node: Node) -> None:
        system, process = self._boot(node), node.process
        assert process is not None
        runtime = CoordinatorRuntime(self.shape.coordinator(self.addresses), system, self.network.transport(process))
        await process.spawn(runtime.start())
        node.runtime = runtime

    async def start_worker(self, node: Node) -> None:
        """Started again, as a supervisor does, for as long as its Redis is out of reach or its disk fails."""
        last: SetupError | None = None
        for _ in range(START_TRIES):
            system, process = self._boot(node), node.process
            assert process is not None
            runtime = WorkerRuntime(
                self.shape.worker(self.addresses), system, self.network.transport(process), self._link(process)
            )
            try:
                await process.spawn(self._begin(node, runtime))
                return
            except SetupError as error:
                last = error
                self.network.note("no start", node.name, error)
                self.crash(node)
                await asyncio.sleep(START_PAUSE_S)
        raise AssertionError(f"{node.name} does not start: {last}")

    def _link(self, process: SimProcess) -> Any:
        def connect(url: str, timeout_s: float) -> SimLink:
            assert self.redis is not None
            return SimLink(self.redis, process, timeout_s)

        return connect

    async def _begin(self, node: Node, runtime: WorkerRuntime) -> None:
        await runtime.start()
        node.runtime = runtime
        node.witness = Witness(runtime.store)
        life: Held = {}
        worker, epoch = runtime.identity.worker, runtime.identity.epoch
        assert (worker, epoch) not in self.lives, f"epoch {epoch} of {worker} was used twice"
        self.lives[(worker, epoch)] = life
        self.epochs.setdefault(worker, []).append(epoch)

        def remember(namespace: str, seq: int, change: Change) -> None:
            if isinstance(change, Added):
                life[(namespace, change.shard, change.key)] = None

        runtime.store.subscribe(remember)
        for namespace in NAMESPACES:
            for added in runtime.store.snapshot(namespace)[1]:
                life[(namespace, added.shard, added.key)] = None

    def boot_client(self, node: Node) -> SimProcess:
        node.system = self._boot(node)
        node.namespace = self.rng.choice(NAMESPACES)
        assert node.process is not None
        return node.process

    async def connect(self, node: Node, *, workers: tuple[str, ...] = ()) -> KVClient:
        """Runs in the client's process, which may crash in the middle of it."""
        assert node.process is not None
        order = list(self.addresses)
        self.rng.shuffle(order)
        some = self.rng.random() < 0.5, self.rng.random() < 0.3
        config = client(tuple(order), node.namespace, workers, watch=some[0], pull_through=some[1], raw=self.shape.raw)
        node.runtime = await KVClient.connect(config, node.system, self.network.transport(node.process))
        return node.runtime

    # --- hurting -----------------------------------------------------------------------------------------------------

    def crash(self, node: Node) -> None:
        """SIGKILL."""
        assert node.process is not None
        self.network.crash(node.process)
        for disk in node.disks.values():
            disk.kill()

    def power_off(self, node: Node) -> None:
        """The machine loses power: everything on it dies, nobody is told, and what was not synced is lost or torn."""
        for other in (*self.workers, *self.coordinators, *self.clients):
            if other.host == node.host and other.up:
                assert other.process is not None
                self.network.crash(other.process, silent=True)
                for disk in other.disks.values():
                    disk.crash(self.rng)

    # --- looking -----------------------------------------------------------------------------------------------------

    def live_workers(self) -> list[WorkerRuntime]:
        return [node.runtime for node in self.workers if node.up and node.runtime is not None]

    def live_coordinators(self) -> list[CoordinatorRuntime]:
        return [node.runtime for node in self.coordinators if node.up and node.runtime is not None]

    def witnesses(self) -> list[Witness]:
        return [node.witness for node in self.workers if node.up and node.witness is not None]
