"""A worker as a Ray actor: one per node, restarted by Ray, its store found again in its SSD folder."""

from __future__ import annotations

from pathlib import Path

from kvstore.actor import ServerActor
from kvstore.config import Config
from kvstore.errors import SetupError
from kvstore.seams import System
from kvstore.transport.base import Transport
from workers.runtime import WorkerRuntime


class WorkerActor(ServerActor):
    """Async actor; `info` tells pid, id, address and socket."""

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
        """A worker that was drained leaves; its process stays, empty, until the fleet ends."""
        await runtime.drained()
        await self.stop()

    def describe(self, runtime: WorkerRuntime) -> dict[str, str]:
        return {"id": runtime.identity.worker, "address": runtime.address, "socket": runtime.socket}
