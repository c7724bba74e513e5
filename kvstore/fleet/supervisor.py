"""The fleet: one supervisor process, and on Ray the reconciler, which makes and keeps workers and coordinators.

`kvstore up` starts the supervisor and waits for it; the supervisor owns the Ray cluster (unless `fleet.address` names
an existing one) and the embedded Redis, starts the reconciler, keeps the state file, and on SIGTERM takes all of it
down. Without it the fleet goes on. Blocking code, main thread only. `kvstore.cli.fleet` has the commands.
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

from kvstore.auth import is_loopback, read_token
from kvstore.config import Config, override, to_toml
from kvstore.errors import ConfigError, SetupError
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.fleet.maker import Maker
from kvstore.fleet.ray_nodes import RESOURCE, RayNodes, living_nodes
from kvstore.fleet.reconcile import COORDINATOR, WORKER, Placed, Want, plan
from kvstore.fleet.state import SSD_FOLDER, FleetState, FleetWorker, save_status
from kvstore.machine.processes import process_id
from kvstore.machine.system import real_system

ACTOR_STOP_EXTRA_S = 3.0
RECONCILER_RETRIES = 3  # of a call to it that its death cut off
POLL_S, TEND_S = 0.1, 1.0
END_ROUNDS = 3  # one actor more may have been on its way
TOKEN_FILE, TOKEN_BYTES = "token", 32


class Interrupted(Exception):
    """A signal came while the fleet was starting."""


class Fleet:
    """Everything `up` makes. `start`, then `wait`, then `stop`; `stop` also after a failed start."""

    def __init__(self, config: Config, folder: Path, mark: str, progress: Callable[[str], None]) -> None:
        self._config, self._folder, self._mark, self._progress = config, folder, mark, progress
        self._ray = RayNodes()
        self._redis: EmbeddedRedis | None = None
        self._reconciler: Any = None
        self._making = False  # there may be actors
        self._shared_config = config
        self._state_now: FleetState | None = None
        self._stopping, self._release = threading.Event(), threading.Event()

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
        machines = {node.ip for node in living_nodes(fleet.workers)}
        loopback = all(is_loopback(f"{ip}:0") for ip in machines)
        config = self._shared_config = self._shared(machines, loopback)
        token = read_token(config.server.token_file) if config.server.token_file else ""
        self._step("starting the reconciler, coordinators and workers")
        self._reconciler = self._start_reconciler(config, token, loopback)
        status = self._settled(self._reconciler)
        save_status(self._folder, {"state": "settled"} | status)
        state = self._state_now = self._state(config, status)
        state.save()
        return state

    def _step(self, message: str) -> None:
        if self._stopping.is_set():
            raise Interrupted
        self._progress(message)

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stopping.set())
        signal.signal(signal.SIGHUP, lambda *_: self._release.set())  # `up` once more

    def _shared(self, machines: set[str], loopback: bool) -> Config:
        """The configuration of all actors: Redis, and a token where they listen beyond loopback."""
        config = self._config
        if not config.store.redis_url:
            if len(machines) > 1:
                raise SetupError("an embedded Redis serves one machine only: pass --redis-url for this cluster")
            self._step("starting the embedded Redis")
            self._redis = EmbeddedRedis(str(self._folder / "redis"), config.store.redis_bytes)
            config = override(config, {"store": {"redis_url": self._redis.start()}})
        if not loopback and not config.server.token_file:
            config = override(config, {"server": {"token_file": self._make_token()}})
        if not config.store.ssd_folder and loopback:
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

    def _start_reconciler(self, config: Config, token: str, loopback: bool) -> Any:
        import ray

        from kvstore.fleet.reconciler import NAME, Reconciler

        try:
            ray.get_actor(NAME)
        except ValueError:
            pass  # as it should be: the name is free
        else:
            raise SetupError(f"the Ray cluster has a fleet {config.fleet.name} already: pass another --name")
        self._making = True
        self._start_first(Maker(config, token, loopback, str(self._folder)))
        return (
            ray.remote(Reconciler)
            .options(
                name=NAME,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=RECONCILER_RETRIES,
                num_cpus=0,
                num_gpus=0,
                max_concurrency=16,
            )
            .remote(to_toml(config), token, loopback, str(self._folder))
        )

    def _start_first(self, maker: Maker) -> None:
        """What the reconciler would start in its first pass, so that it need not be there yet: it knows the names."""
        fleet = self._config.fleet
        starts = plan(Want(fleet.workers, fleet.coordinators), living_nodes(fleet.workers), (), ()).starts
        made = asyncio.run(maker.details(starts))
        addresses = [actor.detail for actor in made if actor.role == COORDINATOR]
        for wanted, actor in zip(starts, made, strict=True):
            maker.make(wanted, actor, addresses)

    def _settled(self, reconciler: Any) -> dict[str, Any]:
        """The reconciler's status once all that is wanted is up. SetupError or ConfigError for the first that fails."""
        deadline_s = self._config.fleet.start_timeout_s
        status: dict[str, Any] = {"actors": []}
        for _ in range(int(deadline_s / POLL_S) + 1):
            if self._stopping.is_set():
                raise Interrupted
            status = _ask(reconciler.status.remote(), deadline_s)
            for name, error in status["errors"].items():
                kind, _, message = error.partition(": ")
                raise ConfigError(message) if kind == "ConfigError" else SetupError(f"{name}: {message}")
            if status["settled"]:
                return status
            if self._stopping.wait(POLL_S):
                raise Interrupted
        missing = ", ".join(row["name"] for row in status["actors"] if not row["up"])
        if not missing and status.get("unplaced"):
            missing = f"{status['unplaced']} workers, for which no node has a free {RESOURCE},"
        raise SetupError(f"{missing or 'actors'} did not start within fleet.start_timeout_s = {deadline_s:g} s")

    def _state(self, config: Config, status: dict[str, Any]) -> FleetState:
        own = process_id(os.getpid())
        assert own is not None
        coordinators = [row for row in status["actors"] if row["role"] == COORDINATOR]
        return FleetState(
            name=config.fleet.name,
            mark=self._mark,
            supervisor=own,
            ray_address=self._ray.address,
            own_cluster=not config.fleet.address,
            coordinators=tuple(row["address"] for row in coordinators),
            coordinator_actors=tuple(row["name"] for row in coordinators),
            workers=tuple(
                FleetWorker(row["name"], row["name"], row["address"], row["id"], row["pid"], row["ssd_folder"])
                for row in status["actors"]
                if row["role"] == WORKER
            ),
            redis_url=config.store.redis_url,
            embedded_redis=self._redis is not None,
            token_file=config.server.token_file,
            folder=str(self._folder),
            ray_folder=self._ray.folder,
        )

    # --- until the end ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until SIGTERM or SIGINT: keeps the embedded Redis alive, and what the reconciler says in the folder."""
        while not self._stopping.wait(TEND_S):
            if self._redis is not None and not self._redis.alive():
                self._redis.stop()
                self._redis.start()
            self._tend()

    def _tend(self) -> None:
        import ray

        if self._release.is_set():
            self._release.clear()
            self._reconciler.release.remote()
        try:
            status = _ask(self._reconciler.status.remote(), TEND_S)
        except (SetupError, ray.exceptions.GetTimeoutError):
            save_status(self._folder, {"state": "silent"})
            return
        save_status(self._folder, {"state": "settled" if status["settled"] else "working"} | status)
        if status["settled"] and self._state_now is not None:
            state = self._state(self._shared_config, status)
            if state != self._state_now:
                self._state_now = state
                state.save()

    def stop(self) -> None:
        """Actors leave cleanly, then Ray and Redis end. Every step is tried; safe after any part of a start."""
        with contextlib.ExitStack() as stack:  # in reverse order, each even when one before it failed
            if self._redis is not None:
                stack.callback(self._redis.stop)
            stack.callback(self._ray.close)
            if self._making:
                stack.callback(end_fleet, self._config.server.stop_grace_s)


def _ask(reference: Any, timeout_s: float) -> dict[str, Any]:
    """What the reconciler answers. SetupError when it is gone for good, GetTimeoutError when it says nothing."""
    import ray

    try:
        answer: dict[str, Any] = ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SetupError(f"the reconciler ended: {lines[-1] if lines else type(error).__name__}") from error
    return answer


def end_fleet(grace_s: float) -> None:
    """End all actors of the namespace this process is connected to: the reconciler first, so that none comes back."""
    import ray
    from ray.util import list_named_actors

    from kvstore.fleet.reconciler import NAME

    for name in (NAME, WORKER, COORDINATOR):
        for _ in range(END_ROUNDS):
            found = []
            for actor in list_named_actors():
                placed = Placed.of(actor)
                if name == (NAME if actor == NAME else placed and placed.role):
                    with contextlib.suppress(ValueError):  # gone already
                        found.append(ray.get_actor(actor))
            if not found:
                break
            end_actors(found, grace_s)


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
    nodes.join(state.ray_address, state.name)
    try:
        end_fleet(grace_s)
    finally:
        nodes.close()
