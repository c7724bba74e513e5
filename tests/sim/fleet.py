"""A whole cluster in one process: the real runtimes on simulated machines, and the means to hurt them."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from coordinator.runtime import CoordinatorRuntime
from kvstore.client import KVClient
from kvstore.config import KIB, ClientConfig, Config, CoordinatorConfig, ServerConfig, StoreConfig, WorkerConfig
from kvstore.runs import Added, Change
from tests.memdisk import MemoryDisk
from tests.sim.loop import SimProcess
from tests.sim.network import Faults, MemoryNetwork
from tests.sim.system import sim_system
from workers.runtime import WorkerRuntime

NAMESPACE = "default"
PORT = 7100
FOLDER = "/ssd"

Held = dict[tuple[bytes, bytes], None]  # (shard, key), ordered


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the simulated cluster is. Byte bounds are small, so that every tier is under pressure."""

    workers: int = 3
    coordinators: int = 2
    clients: int = 4
    host_bytes: int = 512 * KIB
    hot_bytes: int = 128 * KIB
    ssd_bytes: int = 512 * KIB
    segment_bytes: int = 64 * KIB
    lease_s: float = 3.0


@dataclass(slots=True)
class Node:
    """A machine slot: what survives its processes."""

    name: str
    host: str
    process: SimProcess | None = None
    runtime: Any = None
    system: Any = None
    disks: dict[str, MemoryDisk] = field(default_factory=dict)

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
        self.clients = [Node(f"k{i}", f"h{i % (shape.workers + 1)}") for i in range(shape.clients)]
        self.addresses = tuple(f"{node.name}:{PORT}" for node in self.coordinators)
        self.lives: dict[tuple[str, int], Held] = {}
        self.epochs: dict[str, list[int]] = {}

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        for node in self.coordinators:
            await self.start_coordinator(node)
        for node in self.workers:
            await self.start_worker(node)

    def _boot(self, node: Node) -> Any:
        assert not node.up
        node.runtime = None
        node.process = self.network.boot(node.name, node.host)

        def disk(folder: str) -> MemoryDisk:
            return node.disks.setdefault(folder, MemoryDisk())

        return sim_system(node.process, self.seed, disk)

    def _config(self) -> Config:
        shape = self.shape
        return Config(
            store=StoreConfig(
                host_bytes=shape.host_bytes,
                hot_bytes=shape.hot_bytes,
                ssd_folder=FOLDER,
                ssd_bytes=shape.ssd_bytes,
                ssd_segment_bytes=shape.segment_bytes,
                segment_bytes=shape.segment_bytes,
                spill_queue_bytes=64 * KIB,
                load_queue_bytes=64 * KIB,
                staging_bytes=64 * KIB,
                staging_total_bytes=512 * KIB,
                hold_max_s=2.0,
            ),
            server=ServerConfig(coordinators=self.addresses, stop_grace_s=1.0),
            worker=WorkerConfig(socket="/run/kvstore.sock"),
            coordinator=CoordinatorConfig(lease_s=shape.lease_s),
        )

    async def start_coordinator(self, node: Node) -> None:
        system = self._boot(node)
        process = node.process
        assert process is not None
        config = self._config()
        config = Config(
            server=ServerConfig(bind=f"127.0.0.1:{PORT}", coordinators=self.addresses), coordinator=config.coordinator
        )
        runtime = CoordinatorRuntime(config, system, self.network.transport(process))
        await process.spawn(runtime.start())
        node.runtime = runtime

    async def start_worker(self, node: Node) -> None:
        system = self._boot(node)
        process = node.process
        assert process is not None
        runtime = WorkerRuntime(self._config(), system, self.network.transport(process))
        await process.spawn(self._begin(node, runtime))

    async def _begin(self, node: Node, runtime: WorkerRuntime) -> None:
        await runtime.start()
        node.runtime = runtime
        life: Held = {}
        worker, epoch = runtime.identity.worker, runtime.identity.epoch
        assert (worker, epoch) not in self.lives, f"epoch {epoch} of {worker} was used twice"
        self.lives[(worker, epoch)] = life
        self.epochs.setdefault(worker, []).append(epoch)

        def remember(namespace: str, seq: int, change: Change) -> None:
            if isinstance(change, Added):
                life[(change.shard, change.key)] = None

        runtime.store.subscribe(remember)
        for added in runtime.store.snapshot(NAMESPACE)[1]:
            life[(added.shard, added.key)] = None

    def boot_client(self, node: Node) -> SimProcess:
        node.system = self._boot(node)
        assert node.process is not None
        return node.process

    async def connect(self, node: Node) -> KVClient:
        """Runs in the client's process, which may crash in the middle of it."""
        assert node.process is not None
        order = list(self.addresses)
        self.rng.shuffle(order)
        config = ClientConfig(
            coordinators=tuple(order),
            match_timeout_s=1.0,
            get_timeout_s=3.0,
            put_timeout_s=3.0,
            staging_bytes=32 * KIB,
            negative_cache_s=1.0,
        )
        node.runtime = await KVClient.connect(config, node.system, self.network.transport(node.process))
        return node.runtime

    # --- hurting -----------------------------------------------------------------------------------------------------

    def crash(self, node: Node, *, power: bool = False) -> None:
        """SIGKILL; with `power` the machine too: what was not synced may be lost or torn."""
        assert node.process is not None
        self.network.crash(node.process)
        for disk in node.disks.values():
            if power:
                disk.crash(self.rng)
            else:
                disk.kill()

    # --- looking -----------------------------------------------------------------------------------------------------

    def live_workers(self) -> list[WorkerRuntime]:
        return [node.runtime for node in self.workers if node.up and node.runtime is not None]

    def live_coordinators(self) -> list[CoordinatorRuntime]:
        return [node.runtime for node in self.coordinators if node.up and node.runtime is not None]
