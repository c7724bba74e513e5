"""The fleet: worker and coordinator actors on Ray, held together by one supervisor process.

`kvstore up` starts the supervisor and waits for it; the supervisor owns the Ray cluster (unless `fleet.address` names
an existing one) and the embedded Redis, creates the actors, writes the state file, and on SIGTERM takes all of it down.
Blocking code, main thread only. `kvstore.cli.fleet` has the commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstore.auth import read_token
from kvstore.config import Config, override, to_toml
from kvstore.embedded_redis import SOCKET_PATH_MAX, EmbeddedRedis
from kvstore.errors import ConfigError, SetupError
from kvstore.fleet_state import SSD_FOLDER, FleetState, FleetWorker
from kvstore.processes import process_id
from kvstore.ray_nodes import RESOURCE, RayNode, RayNodes
from kvstore.system import real_system

ACTOR_STOP_EXTRA_S = 3.0
TOKEN_FILE, TOKEN_BYTES = "token", 32


class Interrupted(Exception):
    """A signal came while the fleet was starting."""


class Fleet:
    """Everything `up` makes. `start`, then `wait`, then `stop`; `stop` also after a failed start."""

    def __init__(self, config: Config, folder: Path, mark: str, progress: Callable[[str], None]) -> None:
        self._config, self._folder, self._mark, self._progress = config, folder, mark, progress
        self._ray = RayNodes()
        self._redis: EmbeddedRedis | None = None
        self._coordinators: dict[str, Any] = {}  # actor name -> handle
        self._workers: dict[str, Any] = {}
        self._stopping = threading.Event()

    # --- start -----------------------------------------------------------------------------------------------------

    def start(self) -> FleetState:
        """Up and ready when it returns, the state file written. SetupError, ConfigError or Interrupted otherwise."""
        fleet = self._config.fleet
        self._catch_signals()
        if fleet.address:
            self._step(f"joining the Ray cluster at {fleet.address}")
            self._ray.join(fleet.address, fleet.name)
        else:
            self._step(f"starting Ray on this machine, {fleet.nodes} node{'s' if fleet.nodes > 1 else ''}")
            self._ray.start(fleet.name, fleet.nodes, -(-(fleet.workers or fleet.nodes) // fleet.nodes))
        self._catch_signals()  # Ray has put its own in place
        nodes = self._ray.nodes()
        config = self._shared(nodes)
        token = read_token(config.server.token_file) if config.server.token_file else ""
        self._step(f"starting {config.fleet.coordinators} coordinator(s)")
        addresses = self._start_coordinators(config, nodes, token)
        config = override(config, {"server": {"coordinators": addresses}})
        count = fleet.workers or len(nodes)
        self._step(f"starting {count} worker(s)")
        workers = self._start_workers(config, nodes, count, token)
        state = self._state(config, addresses, workers)
        state.save()
        return state

    def _step(self, message: str) -> None:
        if self._stopping.is_set():
            raise Interrupted
        self._progress(message)

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())

    def _shared(self, nodes: list[RayNode]) -> Config:
        """The configuration of all actors: Redis, and a token where they listen beyond loopback."""
        config = self._config
        machines = {node.ip for node in nodes}
        if not config.store.redis_url:
            if len(machines) > 1:
                raise SetupError("an embedded Redis serves one machine only: pass --redis-url for this cluster")
            self._step("starting the embedded Redis")
            self._redis = EmbeddedRedis(str(self._folder / "redis"), config.store.redis_bytes)
            config = override(config, {"store": {"redis_url": self._redis.start()}})
        if len(machines) > 1 and not config.server.token_file:
            config = override(config, {"server": {"token_file": self._make_token()}})  # they listen beyond loopback
        if not config.store.ssd_folder and len(machines) == 1:
            config = override(config, {"store": {"ssd_folder": str(self._folder / SSD_FOLDER)}})
        return config

    def _make_token(self) -> str:
        """Path of a new cluster token, readable by this user alone."""
        system = real_system(1)
        path = self._folder / TOKEN_FILE
        path.touch(0o600)
        path.write_text(system.token_hex(TOKEN_BYTES))
        system.pool.close()
        return str(path)

    def _start_coordinators(self, config: Config, nodes: list[RayNode], token: str) -> list[str]:
        from coordinator.actor import CoordinatorActor

        several = len({node.ip for node in nodes}) > 1
        placed = [nodes[index % len(nodes)] for index in range(config.fleet.coordinators)]
        first = int(config.server.bind.rpartition(":")[2])
        hosts = [node.ip if several else "127.0.0.1" for node in placed]
        ports = [first + index if first else _free_port() for index in range(len(placed))]
        addresses = [f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)]
        for index, (node, address) in enumerate(zip(placed, addresses, strict=True)):
            name = f"coordinator-{index}"
            own = {"server": {"bind": address, "coordinators": addresses, "node": name}}
            self._coordinators[name] = self._actor(CoordinatorActor, name, node, override(config, own), token, {})
        self._ready(self._coordinators)
        return addresses

    def _start_workers(self, config: Config, nodes: list[RayNode], count: int, token: str) -> list[FleetWorker]:
        from workers.actor import WorkerActor

        several = len({node.ip for node in nodes}) > 1
        resources = {RESOURCE: 1.0} if self._ray.has_resource() else {}
        folders: dict[str, str] = {}
        for index in range(count):
            name, node = f"worker-{index}", nodes[index % len(nodes)]
            host = node.ip if several else "127.0.0.1"
            folders[name] = str(Path(config.store.ssd_folder) / name) if config.store.ssd_folder else ""
            own: dict[str, dict[str, Any]] = {
                "server": {"bind": f"{host}:0", "node": name},
                "store": {"ssd_folder": folders[name]},
                "worker": {"socket": "" if several else self._socket(name)},
            }
            self._workers[name] = self._actor(WorkerActor, name, node, override(config, own), token, resources)
        infos = self._ready(self._workers)
        return [
            FleetWorker(name, name, info["address"], info["id"], info["pid"], folders[name])
            for name, info in infos.items()
        ]

    def _socket(self, name: str) -> str:
        """Path of a worker's local socket, the same over restarts; empty, for a drawn one, where it is too long."""
        path = str(self._folder / f"{name}.sock")
        return path if len(path.encode()) <= SOCKET_PATH_MAX else ""

    def _actor(
        self, kind: type, name: str, node: RayNode, config: Config, token: str, resources: dict[str, float]
    ) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        try:
            ray.get_actor(name)
        except ValueError:
            pass  # as it should be: the name is free
        else:
            raise SetupError(
                f"the Ray cluster has {name} in namespace {config.fleet.name} already: pass another --name"
            )
        return (
            ray.remote(kind)
            .options(
                name=name,
                lifetime="detached",
                max_restarts=-1,
                num_cpus=0,
                num_gpus=0,
                resources=resources,
                max_concurrency=16,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(to_toml(config), token)
        )

    def _ready(self, actors: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What each actor says of itself once it serves. SetupError with the reason of the first that does not."""
        import ray

        infos: dict[str, dict[str, Any]] = {}
        deadline_s = self._config.fleet.start_timeout_s
        waiting = {actor.info.remote(): name for name, actor in actors.items()}
        for _ in range(int(deadline_s / 0.5) + 1):
            if self._stopping.is_set():
                raise Interrupted
            done, _rest = ray.wait(list(waiting), num_returns=1, timeout=0.5)
            for reference in done:
                name = waiting.pop(reference)
                infos[name] = _answer(name, reference)
            if not waiting:
                return {name: infos[name] for name in actors}
        missing = ", ".join(waiting.values())
        raise SetupError(f"{missing} did not start within fleet.start_timeout_s = {deadline_s:g} s")

    def _state(self, config: Config, coordinators: list[str], workers: list[FleetWorker]) -> FleetState:
        own = process_id(os.getpid())
        assert own is not None
        return FleetState(
            name=config.fleet.name,
            mark=self._mark,
            supervisor=own,
            ray_address=self._ray.address,
            own_cluster=not config.fleet.address,
            coordinators=tuple(coordinators),
            coordinator_actors=tuple(self._coordinators),
            workers=tuple(workers),
            redis_url=config.store.redis_url,
            embedded_redis=self._redis is not None,
            token_file=config.server.token_file,
            folder=str(self._folder),
            ray_folder=self._ray.folder,
        )

    # --- until the end ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until SIGTERM or SIGINT."""
        self._stopping.wait()

    def stop(self) -> None:
        """Actors leave cleanly, then Ray and Redis end. Every step is tried; safe after any part of a start."""
        with contextlib.ExitStack() as stack:  # in reverse order, each even when one before it failed
            if self._redis is not None:
                stack.callback(self._redis.stop)
            stack.callback(self._ray.close)
            stack.callback(end_actors, [*self._coordinators.values()], self._config.server.stop_grace_s)
            stack.callback(end_actors, [*self._workers.values()], self._config.server.stop_grace_s)


def _answer(name: str, reference: Any) -> dict[str, Any]:
    import ray

    try:
        info: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SetupError(f"{name} did not start: {lines[-1] if lines else type(error).__name__}") from error
    if info["error"]:
        kind, _, message = info["error"].partition(": ")
        raise ConfigError(message) if kind == "ConfigError" else SetupError(f"{name}: {message}")
    return info


def end_actors(actors: list[Any], grace_s: float) -> None:
    """Ask them to leave, wait for it, and kill them for good."""
    import ray

    if not actors:
        return
    leaving = [actor.stop.remote() for actor in actors]
    ray.wait(leaving, num_returns=len(leaving), timeout=grace_s + ACTOR_STOP_EXTRA_S)
    for actor in actors:
        ray.kill(actor, no_restart=True)


def end_detached(state: FleetState, grace_s: float) -> None:
    """End the actors of a fleet in an existing cluster whose supervisor is gone. SetupError when Ray is silent."""
    nodes = RayNodes()
    nodes.join(state.ray_address, state.name)  # before ray is imported: it reads its environment then
    import ray

    try:
        found = []
        for name in [*(worker.actor for worker in state.workers), *state.coordinator_actors]:
            with contextlib.suppress(ValueError):  # gone already
                found.append(ray.get_actor(name))
        end_actors(found, grace_s)
    finally:
        nodes.close()


def _free_port() -> int:
    """A port of 127.0.0.1 that nobody has at this moment."""

    async def take() -> int:
        server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        port: int = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        return port

    return asyncio.run(take())
