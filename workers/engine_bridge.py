"""Tells the coordinators what an engine's own prefix cache holds: its events in, announcements out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from kvstore.auth import node_credentials
from kvstore.config import Config
from kvstore.directory.engine_cache import EngineCache
from kvstore.seams import System
from kvstore.spec import ModelSpec
from kvstore.transport.base import Transport
from workers.announcer import Announcer
from workers.engine_source import EngineSource


class EngineBridge:
    """`start`, `run` until the events end, `stop`. Its epoch is the wall clock's nanoseconds, as a bridge keeps
    nothing; a coordinator that knows a higher one says so."""

    def __init__(
        self,
        config: Config,
        system: System,
        transport: Transport,
        *,
        name: str,
        namespace: str,
        spec: ModelSpec,
        address: str = "",
    ) -> None:
        self.source = EngineSource(
            name,
            namespace,
            EngineCache(spec),
            epoch=system.clock.wall_ns(),
            host=system.host,
            address=address,
            queue=config.worker.announce_queue,
        )
        self._announcer = Announcer(
            config.worker,
            system,
            transport,
            node_credentials(config.server, namespace),
            config.server.coordinators,
            self.source,
        )
        self._grace_s = config.server.stop_grace_s

    async def start(self) -> None:
        self._announcer.start()

    async def run(self, batches: AsyncIterator[tuple[int, bytes]]) -> None:
        """Take in batches until there are no more; number -1: the engine is gone, what it had too."""
        async with aclosing(batches) as coming:  # type: ignore[type-var]
            async for number, payload in coming:
                if number < 0:
                    self.source.lost()
                else:
                    self.source.hear(number, payload)
                self._announcer.wake()
                await asyncio.sleep(0)  # a flood of batches leaves room for heartbeats

    async def stop(self) -> None:
        """The coordinators forget the engine at once. Idempotent."""
        await self._announcer.stop(self._grace_s, leaving=True)
