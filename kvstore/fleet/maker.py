"""How an actor of a fleet is made: its own configuration, its place, and the call that hands it to Ray.

The supervisor makes the first ones, so that they start beside the reconciler and not after it; the reconciler, which
knows them by their names, makes all later ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.config import Config, override, to_toml
from kvstore.fleet.embedded_redis import SOCKET_PATH_MAX
from kvstore.fleet.ray_nodes import RESOURCE
from kvstore.fleet.reconcile import COORDINATOR, WORKER, Placed, Wanted

CALLS_MAX = 16  # of one actor at a time

METRICS_COORDINATORS = 100
"""From the port of a machine's first worker to that of the first coordinator, where metrics are served."""


class Maker:
    """`config`: what all actors share; `loopback`: the fleet stays on this machine, its sockets lie in `folder`; else
    every server listens on its node's address."""

    def __init__(self, config: Config, token: str, loopback: bool, folder: str) -> None:
        self._config, self._token = config, token
        self._loopback, self._folder = loopback, folder

    async def details(self, starts: Sequence[Wanted]) -> list[Placed]:
        """Who they will be: a coordinator's address is drawn."""
        return [Placed(one.role, one.index, one.node.id, await self._detail(one)) for one in starts]

    def make(self, wanted: Wanted, actor: Placed, coordinators: Sequence[str]) -> Any:
        """Hand it to Ray, which knows its name when this returns; its handle."""
        return self._hand_over(actor, self.config_of(wanted, actor, coordinators))

    def config_of(self, wanted: Wanted, actor: Placed, coordinators: Sequence[str]) -> Config:
        """An actor's own configuration. Pure."""
        own: dict[str, dict[str, Any]] = {"server": {"node": actor.title, "coordinators": list(coordinators)}}
        own["server"]["metrics_bind"] = self._metrics(actor)
        if actor.role == COORDINATOR:
            own["server"]["bind"] = actor.detail
        else:
            own["server"]["bind"] = f"{self._host(wanted)}:0"
            own["store"] = {"ssd_folder": self.ssd(actor.detail)}
            own["worker"] = {"socket": self._socket(actor.detail)}
        return override(self._config, own)

    def _metrics(self, actor: Placed) -> str:
        """Actors of one machine may not share a port; those of workers are known by their places, which stay."""
        host, _, port = self._config.server.metrics_bind.rpartition(":")
        if not port.isdigit() or int(port) == 0:
            return self._config.server.metrics_bind
        offset = int(actor.detail) if actor.role == WORKER else METRICS_COORDINATORS + actor.index
        return f"{host}:{int(port) + offset}"

    def ssd(self, slot: str) -> str:
        """Folder of the worker in that place of its machine; empty where none is kept."""
        return str(Path(self._config.store.ssd_folder) / f"worker-{slot}") if self._config.store.ssd_folder else ""

    async def _detail(self, wanted: Wanted) -> str:
        if wanted.role == WORKER:
            return str(wanted.slot)
        first = int(self._config.server.bind.rpartition(":")[2])
        return f"{self._host(wanted)}:{first + wanted.index if first else await _free_port()}"

    def _host(self, wanted: Wanted) -> str:
        return "127.0.0.1" if self._loopback else wanted.node.ip

    def _socket(self, slot: str) -> str:
        """Path of a worker's local socket, the same over restarts; empty, for a drawn one, where it is too long."""
        path = str(Path(self._folder) / f"worker-{slot}.sock")
        return path if self._loopback and len(path.encode()) <= SOCKET_PATH_MAX else ""

    def _hand_over(self, actor: Placed, config: Config) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from coordinator.actor import CoordinatorActor
        from workers.actor import WorkerActor

        worker = actor.role == WORKER
        return (
            ray.remote(WorkerActor if worker else CoordinatorActor)
            .options(
                name=actor.actor,
                lifetime="detached",
                max_restarts=config.fleet.restarts_max,
                num_cpus=0,
                num_gpus=config.fleet.worker_gpus if worker else 0,
                resources={RESOURCE: 1.0} if worker and RESOURCE in ray.cluster_resources() else {},
                max_concurrency=CALLS_MAX,
                scheduling_strategy=NodeAffinitySchedulingStrategy(actor.node, soft=False),
            )
            .remote(to_toml(config), self._token)
        )


async def _free_port() -> int:
    """A port of this machine that nobody has at this moment."""
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port
