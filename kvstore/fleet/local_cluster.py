"""A whole service on this machine without Ray: servers as child processes, embedded Redis, temporary SSD folders.

For `kvstore replay`, tests and experiments. Everything it makes lies in one temporary folder and is gone after `stop`;
the children die with this process even when it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kvstore.config import ClientConfig, Config, override, to_toml
from kvstore.errors import SetupError
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.machine.spawn import LocalProcess, LocalSpawner

START_S = 120.0  # a first start after an installation compiles
STOP_EXTRA_S = 3.0
POLL_S = 0.02


@dataclass(slots=True)
class Server:
    """One child. `ready` is what it said when it was: id, address, socket, pid."""

    name: str
    process: LocalProcess
    ready: dict[str, Any]
    argv: list[str]

    @property
    def address(self) -> str:
        return str(self.ready["address"])


class LocalCluster:
    """`async with LocalCluster(config, workers=2) as cluster`. Start it from the main thread."""

    def __init__(
        self, config: Config, *, workers: int = 2, coordinators: int = 1, redis: bool = True, ssd_folder: str = ""
    ) -> None:
        """`redis`: an embedded one, unless the configuration names another. `ssd_folder`: one that is kept; empty for a
        temporary one."""
        self._config, self._worker_count, self._with_redis, self._ssd_folder = config, workers, redis, ssd_folder
        self._coordinator_count = coordinators
        self._worker_config = config  # with what is known once the others are up
        self._spawner = LocalSpawner()
        self.folder = ""
        self.redis: EmbeddedRedis | None = None
        self.coordinators: list[Server] = []
        self.workers: list[Server] = []

    @property
    def coordinator(self) -> Server | None:
        """The first."""
        return self.coordinators[0] if self.coordinators else None

    async def __aenter__(self) -> LocalCluster:
        try:
            await self.start()
        except BaseException:
            self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def start(self) -> None:
        """All servers ready when it returns. SetupError with the line of the one that is not."""
        self.folder = tempfile.mkdtemp(prefix="kvstore-local-")
        config = self._config
        if self._with_redis and not config.store.redis_url:
            self.redis = EmbeddedRedis(str(Path(self.folder) / "redis"), config.store.redis_bytes)
            config = override(config, {"store": {"redis_url": self.redis.start()}})
        for index in range(self._coordinator_count):
            name = f"coordinator-{index}" if index else "coordinator"
            await self._spawn([("coordinator", name, config)])
            addresses = [server.address for server in self.coordinators]
            config = override(config, {"server": {"coordinators": addresses}})
        self._worker_config = config
        self.workers = await self._spawn([self._planned(index) for index in range(self._worker_count)])

    def _planned(self, index: int) -> tuple[str, str, Config]:
        name = f"worker-{index}"
        ssd = str(Path(self._ssd_folder or self.folder) / name)
        socket = str(Path(self.folder) / f"{name}.sock")
        own = {"server": {"node": name}, "store": {"ssd_folder": ssd}, "worker": {"socket": socket}}
        return "worker", name, override(self._worker_config, own)

    async def add_worker(self) -> Server:
        """One more, ready. SetupError."""
        [server] = await self._spawn([self._planned(len(self.workers))])
        return server

    def client_config(self, worker: int | None = None) -> ClientConfig:
        """For a client beside worker number `worker`: its socket comes first."""
        assert self.coordinators, "the cluster is not started"
        sockets = () if worker is None else (str(self.workers[worker].ready["socket"]),)
        return ClientConfig(coordinators=tuple(server.address for server in self.coordinators), workers=sockets)

    async def restart_worker(self, index: int) -> Server:
        """Kill a worker as a crash would, and start it again on its folder."""
        old = self.workers[index]
        old.process.kill()
        self.workers[index] = (await self._started([self._launch(old.name, old.argv)]))[0]
        return self.workers[index]

    async def restart_coordinator(self, index: int) -> Server:
        """Kill one as a crash would, and start it again on its address."""
        old = self.coordinators[index]
        old.process.kill()
        argv = old.argv if "--bind" in old.argv else [*old.argv[:-2], "--bind", old.address, *old.argv[-2:]]
        self.coordinators[index] = (await self._started([self._launch(old.name, argv)]))[0]
        return self.coordinators[index]

    def stop(self) -> None:
        """End everything, remove every file. Idempotent."""
        for server in self.workers:  # all at once; the coordinator after them, so that they can take leave
            with contextlib.suppress(ProcessLookupError):
                if server.process.alive():
                    os.kill(server.process.pid, signal.SIGTERM)
        for server in [*self.workers, *self.coordinators]:
            server.process.terminate(self._config.server.stop_grace_s + STOP_EXTRA_S)
        self.workers, self.coordinators = [], []
        if self.redis is not None:
            self.redis.stop()
            self.redis = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _spawn(self, planned: Sequence[tuple[str, str, Config]]) -> list[Server]:
        servers = []
        for role, name, config in planned:
            path = Path(self.folder) / f"{name}.toml"
            path.touch(0o600)
            path.write_text(to_toml(config))
            argv = [sys.executable, "-m", "kvstore.cli.main", role, "--config", str(path)]
            servers.append(self._launch(name, [*argv, "--ready-file", str(path.with_suffix(".ready"))]))
        return await self._started(servers)

    def _launch(self, name: str, argv: list[str]) -> Server:
        Path(argv[-1]).unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVSTORE_")}
        log = str(Path(self.folder) / f"{name}.log")
        server = Server(name, self._spawner.spawn(argv, env=environment, log=log), {}, argv)
        known = self.coordinators if "coordinator" in server.argv else self.workers
        places = [place for place, other in enumerate(known) if other.name == name]
        if places:
            known[places[0]] = server
        else:
            known.append(server)  # known before it is ready, so that `stop` ends it
        return server

    async def _started(self, servers: list[Server]) -> list[Server]:
        for server in servers:
            ready = Path(server.argv[-1])
            for _ in range(int(START_S / POLL_S)):
                if ready.exists():
                    break
                if not server.process.alive():
                    raise SetupError(self._last_words(server))
                await asyncio.sleep(POLL_S)
            else:
                raise SetupError(f"{server.name} was not ready within {START_S:g} s: {self._last_words(server)}")
            server.ready = json.loads(ready.read_text())
        return servers

    def _last_words(self, server: Server) -> str:
        lines = (Path(self.folder) / f"{server.name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"{server.name} ended without a word"
