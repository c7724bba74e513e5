"""What the Ray actors of workers and coordinators share: a server that starts with the actor and again after its death.

Ray calls the constructor anew when it restarts an actor, with the same arguments: the same configuration, hence the
same SSD folder and address. An actor's bytes never travel through Ray.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Protocol

from kvstore.assembly import server_transport, tune_malloc
from kvstore.config import Config, override, parse_toml
from kvstore.errors import KVStoreError
from kvstore.seams import System
from kvstore.system import real_system
from kvstore.transport.base import Transport

RETRY_FIRST_S, RETRY_MAX_S = 0.2, 3.0
RETRIES_MAX = 12
"""Starts that a restarted actor tries before it gives its process up to Ray, which then makes another."""


class Runtime(Protocol):
    """A server: `workers.runtime.WorkerRuntime` or `coordinator.runtime.CoordinatorRuntime`."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class ServerActor:
    """Base of the async actors. `config_toml`: of `kvstore.config.to_toml`; `token`: the cluster token, if any."""

    def __init__(self, config_toml: str, token: str = "") -> None:
        tune_malloc()
        config = parse_toml(config_toml)
        if token:
            config = override(config, {"server": {"token_file": _memory_file(token)}})
        self._config = config
        self._system = real_system(config.store.threads)
        self._runtime: Runtime | None = None
        self._error = ""
        self._starting = asyncio.get_running_loop().create_task(self._start(_restarted()))

    def make(self, config: Config, system: System, transport: Transport) -> Runtime:
        """A server that is not started yet."""
        raise NotImplementedError

    async def watch(self, runtime: Any) -> None:
        """Runs beside a started server, until the process ends: what it may want to do by itself."""

    def describe(self, runtime: Any) -> dict[str, str]:
        """Id and address of a started server."""
        raise NotImplementedError

    async def _start(self, restarted: bool) -> None:
        """A first start that fails is reported by `info`; a later one is tried again: nobody watches."""
        delay_s = RETRY_FIRST_S
        for attempt in range(RETRIES_MAX):
            runtime: Runtime | None = None
            try:
                runtime = self.make(self._config, self._system, server_transport(self._config, self._system))
                await runtime.start()
                self._runtime, self._error = runtime, ""
                self._watching = asyncio.get_running_loop().create_task(self.watch(runtime))
                return
            except KVStoreError as error:
                self._error = f"{type(error).__name__}: {error}"
                print(f"start {attempt + 1}: {self._error}", flush=True)  # noqa: T201 - the actor's log
                if runtime is not None:
                    await runtime.stop()
            if not restarted:
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_MAX_S)
        os._exit(1)

    async def info(self) -> dict[str, Any]:
        """Once it has started, or failed to: `error` is empty or one line."""
        await self._starting
        found: dict[str, Any] = {"pid": os.getpid(), "error": self._error, "id": "", "address": ""}
        if self._runtime is not None:
            found |= self.describe(self._runtime)
        return found

    async def stop(self) -> None:
        """Leave cleanly, so that nobody has to find out. The process stays until it is killed. Idempotent."""
        self._starting.cancel()
        await asyncio.wait([self._starting])
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await runtime.stop()


def _memory_file(token: str) -> str:
    """A path to read the token from: of this process alone, in memory, gone with it."""
    descriptor = os.memfd_create("kvstore-token")
    os.write(descriptor, token.encode())
    return f"/proc/self/fd/{descriptor}"


def _restarted() -> bool:
    """Whether Ray made this actor again after its process died."""
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
