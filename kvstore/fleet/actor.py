"""A server as a Ray actor: started, restarted on its own folder or address, and started again after its death.

Ray calls the constructor anew when it restarts an actor, with the same arguments: the same configuration, hence the
same SSD folder and address. An actor's bytes never travel through Ray. What an actor says of itself, and what it is
told, goes through `report`, which the reconciler calls at each of its looks.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvstore.assembly import server_transport, settle, tune_malloc
from kvstore.config import Config, override, parse_toml
from kvstore.errors import KVStoreError
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.transport.base import Transport

RETRY_FIRST_S, RETRY_MAX_S = 0.2, 3.0
RETRIES_MAX = 12
"""Starts that a restarted actor tries before it gives its process up to Ray, which then makes another."""

CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Sigterm:
    """What SIGTERM does to a Ray worker process: the first is `asked`, where somebody wants it; any other is Ray's.

    Ray's own way out stops the event loop at once, and by the time of its `atexit` handlers Python has closed all
    thread pools: an actor could give nothing to anybody any more. Handlers can be set in the main thread alone, where
    Ray loads an actor's class; the actor itself lives in another.
    """

    def __init__(self) -> None:
        self.asked: Callable[[], object] | None = None
        self._ray: Any = None

    def catch(self) -> None:
        """Where this is the main thread of a Ray worker that Ray has prepared already. Mutates."""
        ray = sys.modules.get("ray")
        if ray is None or threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)
        if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE and callable(before):
            self._ray = before
            signal.signal(signal.SIGTERM, self._came)

    @property
    def caught(self) -> bool:
        return self._ray is not None

    def _came(self, number: int, frame: Any) -> None:
        asked, self.asked = self.asked, None
        if asked is None:
            self._ray(number, frame)  # raises SystemExit
        else:
            asked()


SIGTERM = Sigterm()
SIGTERM.catch()


class Runtime(Protocol):
    """A server: `workers.runtime.WorkerRuntime` or `coordinator.runtime.CoordinatorRuntime`."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def configure(self, coordinators: Sequence[str]) -> None: ...


class ServerActor:
    """Base of the async actors. `config_toml`: of `kvstore.config.to_toml`; `token`: the cluster token, if any."""

    def __init__(self, config_toml: str, token: str = "") -> None:
        tune_malloc()
        config = parse_toml(config_toml)
        if token:
            config = override(config, {"server": {"token_file": _memory_file(token)}})
        if config.store.devices and os.environ.get(CUDA_VISIBLE) == "":
            del os.environ[
                CUDA_VISIBLE
            ]  # Ray hides all GPUs from an actor that asks for none; these are shared by name
        self._config = config
        self._system = real_system(config.store.threads)
        self._runtime: Runtime | None = None
        self._error = ""
        self._left = False
        self._loop = asyncio.get_running_loop()
        self._starting = self._loop.create_task(self._start(restarted()))
        if not SIGTERM.caught:
            print("SIGTERM ends this process without a leave: Ray has loaded it in another thread", flush=True)  # noqa: T201
        SIGTERM.asked = lambda: self._loop.call_soon_threadsafe(self._asked_to_end)

    def make(self, config: Config, system: System, transport: Transport) -> Runtime:
        """A server that is not started yet."""
        raise NotImplementedError

    async def watch(self, runtime: Any) -> None:
        """Runs beside a started server, until the process ends: what it may want to do by itself."""

    async def leave(self, runtime: Any) -> None:
        """What is to be done before a server stops that was asked to end."""

    def describe(self, runtime: Any) -> dict[str, Any]:
        """Id and address of a started server."""
        raise NotImplementedError

    async def _start(self, again: bool) -> None:
        """A first start that fails is reported; a later one is tried again: it has served before."""
        delay_s = RETRY_FIRST_S
        for attempt in range(RETRIES_MAX):
            runtime: Runtime | None = None
            try:
                runtime = self.make(self._config, self._system, server_transport(self._config, self._system))
                await runtime.start()
                settle()
                self._runtime, self._error = runtime, ""
                self._watching = asyncio.get_running_loop().create_task(self.watch(runtime))
                return
            except KVStoreError as error:
                self._error = f"{type(error).__name__}: {error}"
                print(f"start {attempt + 1}: {self._error}", flush=True)  # noqa: T201 - the actor's log
                if runtime is not None:
                    await runtime.stop()
            if not again:
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_MAX_S)
        os._exit(1)

    async def report(self, coordinators: Sequence[str] = ()) -> dict[str, Any]:
        """How it is, at once: `up` when it serves, `error` one line or empty, `left` when it was drained and stopped.

        `coordinators`: where they are now; empty: nobody knows better. Mutates.
        """
        said: dict[str, Any] = {
            "pid": os.getpid(),
            "up": self._runtime is not None,
            "error": self._error if self._starting.done() else "",
            "left": self._left,
        }
        if self._runtime is not None:
            if coordinators:
                self._runtime.configure(coordinators)
            said |= self.describe(self._runtime)
        return said

    async def stop(self) -> None:
        """Leave cleanly, so that nobody has to find out. The process stays until it is killed. Idempotent."""
        self._starting.cancel()
        await asyncio.wait([self._starting])
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await runtime.stop()

    def _asked_to_end(self) -> None:
        self._leaving = self._loop.create_task(self._leave())

    async def _leave(self) -> None:
        """Serve until there is nothing more to do, then let Ray end the process. Ray makes another."""
        try:
            if self._runtime is not None:
                await self.leave(self._runtime)
            await self.stop()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def _memory_file(token: str) -> str:
    """A path to read the token from: of this process alone, in memory, gone with it."""
    descriptor = os.memfd_create("kvstore-token")
    os.write(descriptor, token.encode())
    return f"/proc/self/fd/{descriptor}"


def restarted() -> bool:
    """Whether Ray made this actor again after its process died."""
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
