"""A worker process: its store, the two servers, the announcers."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kvstore.auth import Authenticator, Policy, load_policy, node_credentials
from kvstore.catalog import Catalog
from kvstore.checksum import prepare
from kvstore.codecs.batch import ready
from kvstore.config import Config
from kvstore.directory.announce import Outbox
from kvstore.directory.membership import Member
from kvstore.directory.runs import Change, Run
from kvstore.errors import SetupError
from kvstore.operations.metrics import worker_page
from kvstore.quotas import NONE, Quotas
from kvstore.seams import Pool, System
from kvstore.store.identity import Identity, claim
from kvstore.store.tiered import TieredStore
from kvstore.tiers.ssd import SsdTier
from kvstore.transport.base import Server, Transport
from kvstore.transport.http import MetricsServer
from kvstore.transport.tls import server_tls
from kvstore.types import Tier
from kvstore.wire import common_pb2, coordinator_pb2
from workers.announcer import Announcer, Source
from workers.data import DataCalls
from workers.draining import Draining
from workers.gathering import Gathering
from workers.local import LocalService
from workers.node import Announced, Node
from workers.prefetching import Prefetching
from workers.puller import Puller
from workers.service import WorkerService
from workers.tickets import Tickets

if TYPE_CHECKING:
    from kvstore.tiers.redis import RedisTier
    from kvstore.tiers.redis_link import Connect
    from workers.redis_announcer import RedisAnnouncer


def socket_path(configured: str, worker: str, boot_id: str) -> str:
    """Where the local socket lies: as configured, else in the user's runtime folder under a name of its own."""
    if configured:
        return configured
    runtime = os.environ.get("XDG_RUNTIME_DIR") or os.path.join(tempfile.gettempdir(), f"kvstore-{os.getuid()}")
    return os.path.join(runtime, "kvstore", f"{worker}-{boot_id[:8]}.sock")


class StoreSource:
    """`workers.announcer.Source` of a worker's own store."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.catalog: Catalog = node.catalog

    def member(self) -> Member:
        return self._node.member()

    def namespaces(self) -> Sequence[str]:
        return list(self._node.store.heads())

    def outbox(self, namespace: str) -> Outbox:
        return self._node.store.outbox(namespace)

    def snapshot(self, namespace: str) -> tuple[int, Iterable[Run]]:
        return self._node.store.snapshot_runs(namespace)

    def status(self) -> common_pb2.WorkerStatus:
        return self._node.status()

    async def fenced(self, epoch: int) -> None:
        try:
            await self._node.identity.raise_epoch(epoch + 1)
        except SetupError:
            self._node.counters["errors_epoch_not_kept"] += 1  # tried again with the next registration


class WorkerRuntime:
    """Made with a configuration and the ports; `start`, then `stop`. A later start needs another one."""

    store: TieredStore
    identity: Identity
    node: Node
    announcer: Announcer
    puller: Puller
    draining: Draining
    prefetching: Prefetching

    def __init__(
        self, config: Config, system: System, transport: Transport, redis_connect: Connect | None = None
    ) -> None:
        """`redis_connect`: makes the link to Redis; None: the real one."""
        self._config, self._system, self._transport, self._redis_connect = config, system, transport, redis_connect
        self._coordinators = config.server.coordinators
        self._policy: Policy = load_policy(config.server.namespaces_file, config.server.token_file, config.server.bind)
        self.catalog = Catalog()
        self.redis_announcers: list[RedisAnnouncer] = []
        self._redis: RedisTier | None = None
        self._servers: list[Server] = []
        self._data_pool: Pool | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._cleanup: list[str] = []  # what was started, in order
        self.metrics_address = ""
        self.found_blocks = 0  # in the SSD folder, at the start

    @property
    def address(self) -> str:
        """Where others reach the gRPC service; empty before `start`."""
        return self.node.address if "node" in self._cleanup else ""

    @property
    def socket(self) -> str:
        """Path of the local socket; empty before `start`."""
        return self.node.socket if "node" in self._cleanup else ""

    async def start(self) -> None:
        """Recovered, serving and announcing when it returns. SetupError, ConfigError; then nothing is left behind."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config, system = self._config, self._system
        for name in self._policy.namespaces:
            self.catalog.learn_namespace(name)
        self.identity = await claim(system, config.store.ssd_folder)
        self._cleanup.append("identity")
        ssd = SsdTier(system, config.store, self.catalog) if config.store.ssd_folder else None
        self._redis = self._redis_tier()
        self.store = TieredStore(
            system,
            config.store,
            self.catalog,
            ssd=ssd,
            redis=self._redis,
            holder=self.identity.worker,
            announce_queue=config.worker.announce_queue,
            quotas=self._quotas(),
            codecs={name: rules.codecs for name, rules in self._policy.namespaces.items()},
        )
        self._cleanup.append("store")
        used = {n for rules in self._policy.namespaces.values() for n in rules.codecs.names(config.store.codec)}
        await system.pool.run(ready, used)
        await system.pool.run(prepare)
        await self.store.start()
        self.found_blocks = max(stats.blocks for stats in self.store.stats() if stats.tier is not Tier.REDIS)
        shared = len(self._policy.namespaces) > 1
        self.node = Node(config, system, self.store, self.catalog, self.identity, self._policy.digest, shared=shared)
        auth = Authenticator(self._policy, os.getuid())
        self.puller = Puller(self.node, self._transport, self._policy.namespaces, lambda: self.announcer.view_digest())
        self.draining = Draining(
            self.node, self._transport, lambda: self.announcer.view(), lambda: self.announcer.beat()
        )
        self.prefetching = Prefetching(self.node, self.puller, lambda: self.announcer.view())
        tickets = Tickets(system, config.worker.data_tickets_max)
        service = WorkerService(self.node, self.puller, self.draining, self.prefetching, tickets)
        server = await self._transport.serve(config.server.bind, {"Worker": service}, auth)
        self._servers.append(server)
        if config.worker.data_connections_max:
            await self._serve_data(DataCalls(service, tickets), server.address.rpartition(":")[0])
        self.node.address = config.server.advertise or server.address
        path = socket_path(config.worker.socket, self.identity.worker, self.node.boot_id)
        self._servers.append(await self._transport.serve_local(path, LocalService(self.node, self.prefetching), auth))
        self.node.socket = path
        self._cleanup.append("node")
        if config.server.metrics_bind:
            figures = MetricsServer(lambda: worker_page(self.node.status()), lambda: "announcer" in self._cleanup, auth)
            self._servers.append(await figures.start(config.server.metrics_bind, server_tls(config).serving))
            self.metrics_address = figures.address
        self.announcer = self._new_announcer(StoreSource(self.node), self.puller.hinted)
        self.node.announced = self._announced
        self._gathering = Gathering(lambda: self.store.putting.busy, self.announcer.wake)
        self.store.subscribe(self._changed)
        self.announcer.start()
        self.puller.start()
        self._cleanup.append("announcer")
        if self._redis is not None:
            self._announce_redis(self._redis)
        self._ticking = asyncio.create_task(self._tick())

    def configure(self, coordinators: Sequence[str]) -> None:
        """Where to announce from now on, beside those that coordinators name. After `start`. Mutates."""
        self._coordinators = tuple(coordinators)
        self.announcer.configure(coordinators)
        for announcer in self.redis_announcers:
            announcer.configure(coordinators)

    async def _serve_data(self, calls: DataCalls, host: str) -> None:
        """Raw connections, beside gRPC: a thread each while bytes move."""
        mine, system = self._config.worker, self._system
        many = mine.data_connections_max
        pool = system.pool
        if system.own_pool is not None:
            pool = self._data_pool = system.own_pool(many)
        server = await self._transport.serve_data(
            f"{host}:{mine.data_port}", calls, pool, connections_max=many, idle_s=mine.data_idle_s
        )
        self._servers.append(server)
        self.node.data_port = int(server.address.rpartition(":")[2])

    def _redis_tier(self) -> RedisTier | None:
        if not self._config.store.redis_url:
            return None
        from kvstore.tiers.redis import RedisTier
        from kvstore.tiers.redis_link import connect

        quotas = self._quotas()
        return RedisTier(
            self._system,
            self._config.store,
            self.catalog,
            self._policy.redis_secret,
            self._redis_connect or connect,
            quota=lambda namespace: quotas.get(namespace, NONE).redis_bytes,
        )

    def _quotas(self) -> dict[str, Quotas]:
        return {name: rules.quotas for name, rules in self._policy.namespaces.items()}

    def _new_announcer(
        self, source: Source, hinted: Callable[[coordinator_pb2.Hints], None] | None = None
    ) -> Announcer:
        config = self._config
        credentials = node_credentials(config.server, next(iter(self._policy.namespaces)))
        return Announcer(config.worker, self._system, self._transport, credentials, self._coordinators, source, hinted)

    def _announce_redis(self, redis: RedisTier) -> None:
        """Every namespace's Redis is announced by whichever worker is elected."""
        from workers.redis_announcer import RedisAnnouncer

        for namespace in self._policy.namespaces:
            mine = RedisAnnouncer(
                self._config.worker,
                self._system,
                redis,
                self.catalog,
                namespace,
                lambda: self.identity.worker,
                self._new_announcer,
            )
            mine.start()
            self.redis_announcers.append(mine)

    def _changed(self, namespace: str, seq: int, change: Change) -> None:
        self._gathering.changed()

    def _announced(self) -> Announced:
        return Announced(self.announcer.lag, self.announcer.connected, self.announcer.counters)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.worker.tick_s)
            await self.store.tick()
            self.puller.tick()

    async def drained(self) -> None:
        """Return when it was drained, on whose order ever, and should stop. After `start`."""
        await self.draining.over.wait()

    async def drain(self, timeout_s: float) -> None:
        """Move what is held to other workers, and return; at most `timeout_s`. After `start`, before `stop`."""
        await self.draining.finish(timeout_s)

    async def stop(self) -> None:
        """Leave the fleet, end calls within the grace, let the store write down what it has. Idempotent."""
        grace_s = self._config.server.stop_grace_s
        started, self._cleanup = self._cleanup, []
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait([self._ticking])
            self._ticking = None
        await asyncio.gather(*(announcer.stop() for announcer in self.redis_announcers))
        self.redis_announcers.clear()
        if "announcer" in started:
            await self.draining.stop()
            await self.puller.stop()
            self._gathering.close()
            await self.announcer.stop(grace_s, leaving=True)
        for server in reversed(self._servers):
            await server.close(grace_s)
        self._servers.clear()
        if self._data_pool is not None:
            self._data_pool.close()
            self._data_pool = None
        if "store" in started:
            await self.store.close()
        if "identity" in started:
            self.identity.release()
