"""A worker as a Ray actor: one per node, restarted by Ray, its store found again in its SSD folder."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from kvstore.config import Config
from kvstore.errors import SetupError
from kvstore.fleet.actor import ServerActor
from kvstore.seams import System
from kvstore.transport.base import Transport
from workers.runtime import WorkerRuntime


class WorkerActor(ServerActor):
    """Async actor; `report` tells id, address, socket, and how many blocks its folder had at the start too."""

    def make(self, config: Config, system: System, transport: Transport) -> WorkerRuntime:
        if config.store.ssd_folder:
            base = Path(config.store.ssd_folder).parent  # of all workers of the fleet
            try:
                base.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"folder {base} can't be made ({error.strerror}): name another --ssd-folder"
                ) from error
        return WorkerRuntime(config, system, transport)

    async def watch(self, runtime: WorkerRuntime) -> None:
        """A worker that was drained leaves; the reconciler sees that and ends its process."""
        await runtime.drained()
        await self.stop()
        self._left = True

    async def leave(self, runtime: WorkerRuntime) -> None:
        """What is worth keeping goes to the other workers, for the grace."""
        if self._config.worker.drain_grace_s > 0:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            await runtime.drain(self._config.worker.drain_grace_s)

    def describe(self, runtime: WorkerRuntime) -> dict[str, Any]:
        return {
            "id": runtime.identity.worker,
            "address": runtime.address,
            "socket": runtime.socket,
            "found": runtime.found_blocks,
        }
