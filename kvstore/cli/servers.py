"""`kvstore worker` and `kvstore coordinator`: one server in the foreground, without Ray."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from kvstore.cli.common import EXIT_FAULT, EXIT_OK, command, configuration, json_flag, note, print_json, setting
from kvstore.config import Config
from kvstore.machine.disk import FolderDisk

STOP_STEPS = 4
"""A stop has so many parts (announcer, servers, store), each with the grace as its bound."""


class Runtime(Protocol):
    """What both servers have in common."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class Drainable(Protocol):
    """A server that moves what it holds to others before it leaves."""

    async def drained(self) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...


def add(commands: Any) -> None:
    worker = command(
        commands,
        "worker",
        "one worker in the foreground: a store with its tiers",
        examples="""
            kvstore worker --coordinators 127.0.0.1:7700
            kvstore worker --coordinators 127.0.0.1:7700 --ssd-folder /var/lib/kvstore --redis-url redis://127.0.0.1:6379
            kvstore worker --bind 10.0.0.5:7800 --token-file /etc/kvstore/token --coordinators 10.0.0.4:7700
        """,
    )
    _server_flags(worker)
    setting(worker, "--coordinators", "server.coordinators", "HOST:PORT,...", "where to announce")
    setting(worker, "--socket", "worker.socket", "PATH", "local socket for clients on this machine")
    setting(worker, "--host-bytes", "store.host_bytes", "SIZE", "memory for blocks")
    setting(worker, "--hot-bytes", "store.hot_bytes", "SIZE", "of it for raw blocks")
    setting(worker, "--ssd-folder", "store.ssd_folder", "FOLDER", "turns the SSD tier on")
    setting(worker, "--ssd-bytes", "store.ssd_bytes", "SIZE", "bound of the SSD tier")
    setting(worker, "--redis-url", "store.redis_url", "URL", "turns the Redis tier on")
    setting(worker, "--redis-bytes", "store.redis_bytes", "SIZE", "bound of the Redis tier, per namespace")
    worker.set_defaults(run=run_worker)
    coordinator = command(
        commands,
        "coordinator",
        "one coordinator in the foreground: who holds which prefix",
        examples="""
            kvstore coordinator --bind 127.0.0.1:7700
            kvstore coordinator --bind 10.0.0.4:7700 --token-file /etc/kvstore/token
        """,
    )
    _server_flags(coordinator)
    setting(coordinator, "--coordinators", "server.coordinators", "HOST:PORT,...", "all coordinators, told to clients")
    coordinator.set_defaults(run=run_coordinator)


def _server_flags(made: argparse.ArgumentParser) -> None:
    setting(made, "--bind", "server.bind", "HOST:PORT", "address to listen on, port 0: any")
    setting(made, "--token-file", "server.token_file", "FILE", "cluster token, needed beyond loopback")
    setting(made, "--metrics-bind", "server.metrics_bind", "HOST:PORT", "serve /metrics, /healthz and /readyz there")
    setting(made, "--namespaces", "server.namespaces_file", "FILE", "identities and namespaces")
    setting(made, "--node", "server.node", "NAME", "name of this machine, for people")
    json_flag(made)
    made.add_argument("--ready-file", metavar="FILE", help="write the ready object there too, when it is ready")


def run_worker(arguments: argparse.Namespace) -> int:
    from kvstore.assembly import server_transport, tune_malloc
    from kvstore.machine.system import real_system
    from workers.runtime import WorkerRuntime

    config = configuration(arguments)
    tune_malloc()
    system = real_system(config.store.threads)
    runtime = WorkerRuntime(config, system, server_transport(config, system))

    def ready() -> dict[str, Any]:
        said = {"role": "worker", "id": runtime.identity.worker, "address": runtime.address, "socket": runtime.socket}
        return said | ({"metrics": runtime.metrics_address} if runtime.metrics_address else {})

    try:
        return asyncio.run(_serve(runtime, config, arguments, ready, runtime))
    finally:
        system.pool.close()


def run_coordinator(arguments: argparse.Namespace) -> int:
    from coordinator.runtime import CoordinatorRuntime
    from kvstore.assembly import server_transport
    from kvstore.machine.system import real_system

    config = configuration(arguments)
    system = real_system(1)
    runtime = CoordinatorRuntime(config, system, server_transport(config, system))

    def ready() -> dict[str, Any]:
        said = {"role": "coordinator", "id": runtime.id, "address": runtime.address}
        return said | ({"metrics": runtime.metrics_address} if runtime.metrics_address else {})

    try:
        return asyncio.run(_serve(runtime, config, arguments, ready))
    finally:
        system.pool.close()


async def _serve(
    runtime: Runtime,
    config: Config,
    arguments: argparse.Namespace,
    ready: Callable[[], dict[str, Any]],
    holder: Drainable | None = None,
) -> int:
    """From start to a signal, or until it was drained; also a signal while it starts ends it cleanly. SIGTERM drains
    first, for `worker.drain_grace_s`; another signal cuts that short."""
    from kvstore.assembly import settle

    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, int(number))
    starting = asyncio.create_task(runtime.start())
    signalled = asyncio.create_task(signals.get())
    try:
        await asyncio.wait([starting, signalled], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # raises what went wrong
            settle()
            _announce(ready() | {"pid": os.getpid()}, arguments)
            await _until_over(signalled, signals, config.worker.drain_grace_s, holder)
        else:
            starting.cancel()
            await asyncio.wait([starting])
    finally:
        signalled.cancel()
        stopped = await _stop(runtime, config.server.stop_grace_s)
    return EXIT_OK if stopped else EXIT_FAULT


async def _until_over(
    signalled: asyncio.Task[int], signals: asyncio.Queue[int], grace_s: float, holder: Drainable | None
) -> None:
    """Wait for a signal, or for a drain on somebody's order; drain on SIGTERM."""
    if holder is None:
        await signalled
        return
    drained = asyncio.create_task(holder.drained())
    waiting: list[asyncio.Task[Any]] = [drained]
    try:
        await asyncio.wait([signalled, drained], return_when=asyncio.FIRST_COMPLETED)
        if not drained.done() and signalled.result() == signal.SIGTERM and grace_s > 0:
            waiting += [asyncio.create_task(holder.drain(grace_s)), asyncio.create_task(signals.get())]
            await asyncio.wait(waiting[1:], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def _stop(runtime: Runtime, grace_s: float) -> bool:
    try:
        async with asyncio.timeout(STOP_STEPS * grace_s):
            await runtime.stop()
    except TimeoutError:
        note(f"kvstore: not stopped within {STOP_STEPS} times server.stop_grace_s = {grace_s} s: connections are cut")
        return False
    return True


def _announce(ready: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.ready_file:
        path = Path(arguments.ready_file).absolute()
        FolderDisk(str(path.parent)).replace(path.name, json.dumps(ready).encode())
    if arguments.json:
        print_json(ready)
    else:
        where = f", socket {ready['socket']}" if "socket" in ready else ""
        print(f"{ready['role']} {ready['id']} ready on {ready['address']}{where}", flush=True)
