"""A coordinator process: the service, its server and the heartbeat of membership."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

from coordinator.registry import Registry
from coordinator.service import CoordinatorService
from kvstore.auth import Authenticator, load_policy
from kvstore.config import Config
from kvstore.metrics import coordinator_page
from kvstore.seams import System
from kvstore.transport.base import Server, Transport
from kvstore.transport.http import MetricsServer
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
        peers = [common_pb2.CoordinatorInfo(address=address) for address in config.server.coordinators]
        self.service = CoordinatorService(
            config.coordinator,
            system,
            self.registry,
            self.engines,
            info=common_pb2.CoordinatorInfo(id=self.id, boot_id=self.boot_id),
            peers=peers,
            namespaces_digest=self._policy.digest,
        )
        self._servers: list[Server] = []
        self.metrics_address = ""
        self._ticking: asyncio.Task[None] | None = None

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
            self._servers.append(await figures.start(config.metrics_bind))
            self.metrics_address = figures.address
        self._ticking = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            now = self._system.clock.monotonic()
            self.registry.tick(now)
            self.engines.tick(now)
            await asyncio.sleep(self._config.coordinator.lease_s / TICKS_A_LEASE)

    async def stop(self) -> None:
        """Idempotent."""
        ticking, self._ticking = self._ticking, None
        if ticking is not None:
            ticking.cancel()
            await asyncio.wait([ticking])
        servers, self._servers = self._servers, []
        for server in reversed(servers):
            await server.close(self._config.server.stop_grace_s)
