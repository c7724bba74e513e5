"""A coordinator process: the service, its server and the heartbeat of membership."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace

from coordinator.peers import Peers
from coordinator.registry import Registry
from coordinator.service import CoordinatorService
from kvstore.auth import Authenticator, load_policy, node_credentials
from kvstore.config import Config
from kvstore.errors import KVStoreError
from kvstore.operations.metrics import coordinator_page
from kvstore.seams import System
from kvstore.transport.base import Credentials, Server, Transport
from kvstore.transport.http import MetricsServer
from kvstore.transport.methods import CAPABILITIES, COORDINATOR, PROTOCOL_VERSION
from kvstore.transport.tls import server_tls
from kvstore.wire import common_pb2

TICKS_A_LEASE = 12


class CoordinatorRuntime:
    """Empty at every start; fills from what workers announce. `start`, then `stop`."""

    def __init__(self, config: Config, system: System, transport: Transport) -> None:
        self._config, self._system, self._transport = config, system, transport
        self._policy = load_policy(config.server.namespaces_file, config.server.token_file, config.server.bind)
        self.id = f"c-{system.token_hex(8)}"
        self.boot_id = system.token_hex(8)
        copies = {name: rules.copies for name, rules in self._policy.namespaces.items()}
        self.registry = Registry(
            config.coordinator,
            list(copies),
            system.clock.monotonic(),
            seed=system.rng.getrandbits(62),
            copies=copies,
        )
        engines = replace(config.coordinator, blocks_max=config.coordinator.engine_blocks_max)
        self.engines = Registry(engines, list(copies), system.clock.monotonic(), seed=system.rng.getrandbits(62))
        self.peers = Peers(
            common_pb2.CoordinatorInfo(id=self.id, boot_id=self.boot_id, host=system.host),
            config.server.coordinators,
            config.coordinator.lease_s,
            system.clock.monotonic(),
        )
        self.service = CoordinatorService(
            config.coordinator,
            system,
            self.registry,
            self.engines,
            peers=self.peers,
            namespaces_digest=self._policy.digest,
        )
        self._servers: list[Server] = []
        self.metrics_address = ""
        self._ticking: list[asyncio.Task[None]] = []

    @property
    def address(self) -> str:
        """Where others reach it; empty before `start`."""
        return self.service.info.address

    async def start(self) -> None:
        """Serving when it returns. SetupError when the address can't be bound."""
        auth = Authenticator(self._policy, os.getuid())
        config = self._config.server
        self._servers.append(await self._transport.serve(config.bind, {"Coordinator": self.service}, auth))
        self.service.info.address = config.advertise or self._servers[0].address
        if config.metrics_bind:
            figures = MetricsServer(
                lambda: coordinator_page(self.service.whole_status()),
                lambda: self.service.whole_status().complete,
                auth,
            )
            self._servers.append(await figures.start(config.metrics_bind, server_tls(self._config).serving))
            self.metrics_address = figures.address
        self._ticking = [asyncio.create_task(self._tick()), asyncio.create_task(self._greet())]

    async def _tick(self) -> None:
        while True:
            now = self._system.clock.monotonic()
            self.registry.tick(now)
            self.engines.tick(now)
            await asyncio.sleep(self._config.coordinator.lease_s / TICKS_A_LEASE)

    async def _greet(self) -> None:
        """Let the other coordinators know of this one, and find out who lives, once a lease."""
        lease_s = self._config.coordinator.lease_s
        credentials = node_credentials(self._config.server, next(iter(self._policy.namespaces)))
        while True:
            addresses = self.peers.to_greet(self._system.clock.monotonic())
            await asyncio.gather(*(self._greet_one(address, credentials, lease_s) for address in addresses))
            await asyncio.sleep(lease_s * self._system.rng.uniform(0.5, 1.0))

    async def _greet_one(self, address: str, credentials: Credentials, timeout_s: float) -> None:
        hello = common_pb2.HelloRequest(
            protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore", coordinator=self.peers.me
        )
        try:
            async with asyncio.timeout(timeout_s):
                channel = await self._transport.connect(address, credentials)
                try:
                    reply = await channel.unary(COORDINATOR["Hello"], hello, timeout_s=timeout_s)
                finally:
                    await channel.close()
        except (KVStoreError, TimeoutError):
            self.registry.counters["peers_silent"] += 1
            self.peers.silent(address)
            return
        answered = common_pb2.CoordinatorInfo(id=reply.id, boot_id=reply.boot_id, address=address, host=reply.host)
        self.peers.heard(answered, self._system.clock.monotonic())
        self.peers.named(reply.coordinators)

    def configure(self, coordinators: Sequence[str]) -> None:
        """Coordinators to greet, too. Mutates."""
        self.peers.named(common_pb2.CoordinatorInfo(address=address) for address in coordinators)

    async def stop(self) -> None:
        """Idempotent."""
        ticking, self._ticking = self._ticking, []
        for task in ticking:
            task.cancel()
        if ticking:
            await asyncio.wait(ticking)
        servers, self._servers = self._servers, []
        for server in reversed(servers):
            await server.close(self._config.server.stop_grace_s)
