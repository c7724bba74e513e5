"""A fleet on a Ray cluster of several nodes, a trace that is replayed, and faults that strike meanwhile."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kvstore.client.kv_client import KVClient
from kvstore.fleet.state import FleetState, read_status
from kvstore.keys import Chain
from kvstore.machine.processes import all_processes
from kvstore.machine.system import real_system
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import Tier
from tests.fault_checks import COPIES, SETTINGS, Checks
from tests.fault_load import Load, client_config, trace
from tests.fleet_helpers import kvstore
from tests.ray_cluster import RayCluster

T = TypeVar("T")

SLOTS = (2, 1, 1)
"""Workers of each node: four on three."""

COORDINATORS = 2
HITS_MIN = 0.9  # of the share of blocks that survive: with two copies of each, all of them
REQUESTS_MIN = 20  # that end while a fault lasts: what less than that survives, says little
SLOW_S = 20.0  # it lasts longer for them
NAME = "kvstore"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a fault did, for the table."""

    name: str
    flying: int  # requests on their way when it struck
    requests: int  # that ended while it lasted
    hits: float  # share of the blocks asked for meanwhile
    settled_s: float  # from its end until everything was as before
    counted: Mapping[str, int] = field(default_factory=dict)  # what the clients say of it

    def row(self) -> str:
        return f"| {self.name} | {self.flying} | {self.requests} | {100 * self.hits:.1f} % | {self.settled_s:.1f} s |"


class FaultFleet:
    """`with FaultFleet(folder) as fleet`: up, the trace stored twice. `run` runs its coroutines."""

    def __init__(self, folder: Path, prompts: int = 12) -> None:
        self.folder = folder
        self.prompts = trace(1, prompts)
        self.seen: list[Seen] = []
        self.cluster = RayCluster([{"kvstore_worker": slots, "GPU": 2} for slots in SLOTS])
        self.slots: dict[str, int] = {}
        self.disk = Disk(folder / "ssd", 96 << 20)
        self._runner = asyncio.Runner()
        self._system = real_system(2)
        self._transport = GrpcTransport(self._system.clock)
        self.checks = Checks(self._transport, self.prompts)

    def __enter__(self) -> FaultFleet:
        self.cluster.__enter__()
        self.slots = dict(zip(self.cluster.nodes, SLOTS, strict=True))
        self.disk.mount()
        namespaces = self.folder / "namespaces.toml"
        namespaces.write_text(f"[namespaces.default]\ncopies = {COPIES}\n")
        self.up()
        self.run(self._fill())
        return self

    def up(self) -> None:
        """`kvstore up`; where it is up already, nodes whose worker was drained get one again."""
        own = {
            "server.namespaces_file": str(self.folder / "namespaces.toml"),
            "store.ssd_folder": str(self.disk.path),
        }
        flags = [part for key, value in (SETTINGS | own).items() for part in ("--set", f"{key}={value}")]
        where = ("--address", self.cluster.address, "--coordinators", str(COORDINATORS))
        done = kvstore(self.folder, "up", *where, *flags, timeout_s=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            stack.callback(self.cluster.__exit__, None, None, None)
            stack.callback(self.disk.unmount)
            stack.callback(self._system.pool.close)
            stack.callback(self._runner.close)
            done = kvstore(self.folder, "down", timeout_s=90)
            assert done.returncode == 0, done.stdout + done.stderr
            left = self.cluster.actors().get(NAME, [])
            assert left == [], left

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def state(self) -> FleetState:
        state = FleetState.load(self.folder / "state" / "tiered-kvstore" / NAME)
        assert state is not None
        return state

    @property
    def status(self) -> dict[str, Any]:
        return read_status(self.state)

    def rows(self, role: str) -> list[dict[str, Any]]:
        return [row for row in self.status["actors"] if row["role"] == role]

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        os.kill(pid, number)

    def redis(self) -> int:
        """The process of the embedded Redis."""
        for process in all_processes():
            with suppress(OSError):
                words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                mine = os.readlink(f"/proc/{process.pid}/cwd").startswith(str(self.folder))
                if b"redis-server" in words and mine:
                    return process.pid
        raise AssertionError("no redis-server of this fleet")

    async def client(self, stack: AsyncExitStack, *, far: bool = False, **config: Any) -> KVClient:
        system = replace(self._system, host="elsewhere") if far else self._system
        made = client_config(self.state.coordinators)
        client = await KVClient.connect(replace(made, **config), system, self._transport)
        stack.push_async_callback(client.close)
        return client

    # --- faults ----------------------------------------------------------------------------------------------------

    async def _fill(self) -> None:
        async with AsyncExitStack() as stack:
            client = await self.client(stack)
            load = Load([], self.prompts)
            for prompt in self.prompts:
                await load.one(client, prompt)
            assert not load.trouble
        await self.settle()

    async def fault(
        self,
        name: str,
        strike: Callable[[], object],
        heal: Callable[[], object] | None = None,
        *,
        seconds: float = 2.0,
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
        clear: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> Seen:
        """Strike under load, heal after some seconds, and see that all is as before. AssertionError otherwise.

        `beside` runs while the fault lasts, `clear` once it is over and the load has ended."""
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            clients = [await self.client(stack, far=number % 2 == 1) for number in range(3)]
            async with Load(clients, self.prompts) as load:
                while len(load.moments) < 10 or load.flying() == 0:
                    await asyncio.sleep(0.001)
                flying, began = load.flying(), loop.time()
                await asyncio.to_thread(strike)
                if beside is not None:
                    await beside()
                await asyncio.sleep(max(0.0, began + seconds - loop.time()))
                while load.since(began, loop.time())[0] < REQUESTS_MIN and loop.time() < began + seconds + SLOW_S:
                    await asyncio.sleep(0.01)  # a machine that is busy with something else
                if heal is not None:
                    await asyncio.to_thread(heal)
                ended = loop.time()
                requests, asked, got = load.since(began, ended)
                counted = sum((Counter(client.counters) for client in clients), Counter[str]())
                await self._whole()
        assert not load.trouble, dict(load.trouble)
        if clear is not None:
            await clear()
        await self.settle()
        seen = Seen(name, flying, requests, got / max(1, asked), loop.time() - ended, counted)
        self.seen.append(seen)
        assert seen.hits >= HITS_MIN, seen
        return seen

    async def _whole(self) -> None:
        """Until everybody who should be there is, by Ray and by both coordinators."""
        wanted = sum(self.slots.values())
        await self.checks.until(lambda: self._standing(wanted), "the fleet is whole")

    async def _standing(self, wanted: int) -> str:
        status = self.status
        rows = [row["role"] for row in status.get("actors", ())]
        if status["state"] != "settled" or rows.count("worker") != wanted or rows.count("coordinator") != COORDINATORS:
            return f"{status}"
        return await self.checks.standing(self.state.coordinators, wanted)

    async def settle(self) -> None:
        """Until the fleet is whole, every block of the trace lies on two workers, and directories say what is there."""
        await self._whole()
        await self.checks.until(self._as_before, "everything is as before")

    async def _as_before(self) -> str:
        return await self.checks.as_before(
            {row["id"]: row["address"] for row in self.rows("worker")}, self.state.coordinators
        )

    async def flood(self, spec: Any, prompts: Sequence[Chain], blocks: Callable[[bytes], Any]) -> None:
        """Put other prompts, until some disk says that it can't take more."""
        async with AsyncExitStack() as stack:
            client = await self.client(stack)
            for prompt in prompts:
                await client.put(spec, prompt, [blocks(key) for key in prompt.keys])
                if "ok" not in await self._disks():
                    return
            states = await self._disks()
        assert set(states) != {"ok"}, "no disk was ever full"

    async def _disks(self) -> list[str]:
        """State of each worker's SSD tier."""
        said = [await self.checks.observer.worker_status(row["address"]) for row in self.rows("worker")]
        return [tier.state for status in said for tier in status.tiers if tier.tier == Tier.SSD]

    async def purge(self, spec: Any) -> None:
        async with AsyncExitStack() as stack:
            client = await self.client(stack)
            assert await client.purge(spec) > 0
            assert not any(name.startswith("errors_") for name in client.counters), client.counters


class Disk:
    """A small file system of its own where this user may mount one; else the folder, and what fills it is a limit."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self._nbytes = path, nbytes
        self.mounted = False

    def mount(self) -> None:
        self.path.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", f"size={self._nbytes}", "none", str(self.path)]
        self.mounted = subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)

    def fill(self, pids: Sequence[int]) -> None:
        """No byte more can be written there."""
        if not self.mounted:
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with (self.path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 20))

    def free(self, pids: Sequence[int]) -> None:
        if not self.mounted:
            for pid in pids:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return
        (self.path / "filler").unlink()
