"""Real server processes, stopped and killed under load: no wrong byte, no exception, no call past its deadline."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.kv_client import KVClient
from kvstore.config import MIB, ClientConfig, Config, CoordinatorConfig, ServerConfig, StoreConfig
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import Chain
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.transport.rpc import GrpcTransport
from tests.service_cluster import blocks_of, check, found
from tests.service_helpers import LARGE, prompt

CONFIG = Config(
    store=StoreConfig(host_bytes=64 * MIB, ssd_bytes=64 * MIB, ssd_segment_bytes=8 * MIB, staging_bytes=4 * MIB),
    server=ServerConfig(stop_grace_s=0.5),
    coordinator=CoordinatorConfig(heartbeat_s=0.1, lease_s=1.0),
)
DEADLINE_S = 2.0
SLACK_S = 1.0  # of a machine that others use too


class Fleet:
    """Two worker processes, a coordinator process, and clients here."""

    def __init__(self, cluster: LocalCluster, system: System, stack: AsyncExitStack) -> None:
        self.cluster, self.system, self.stack = cluster, system, stack
        assert cluster.coordinator is not None
        self.coordinator = cluster.coordinator

    async def client(self, *, far: bool = False, **config: Any) -> KVClient:
        system = replace(self.system, host="elsewhere") if far else self.system
        made = ClientConfig(
            coordinators=(self.coordinator.address,), match_timeout_s=DEADLINE_S, get_timeout_s=DEADLINE_S,
            put_timeout_s=DEADLINE_S, staging_bytes=2 * MIB,
        )  # fmt: skip
        client = await KVClient.connect(replace(made, **config), system, GrpcTransport(system.clock))
        self.stack.push_async_callback(client.close)
        return client

    async def everywhere(self, prefix: Chain) -> KVClient:
        """Put a chain on both workers; a client of another host that sees both copies."""
        for worker in self.cluster.workers:
            one = await self.client(coordinators=(), workers=(worker.ready["socket"],), put_timeout_s=20.0)
            assert set((await one.put(LARGE, prefix, blocks_of(prefix))).states) == {"committed"}
        far = await self.client(far=True)
        async with asyncio.timeout(20):
            while len({run.holder for run in (await far.match(LARGE, prefix)).runs}) < 2:
                await asyncio.sleep(0.02)
        return far


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    system = real_system(2)
    async with LocalCluster(CONFIG, workers=2, redis=False) as cluster, AsyncExitStack() as stack:
        yield Fleet(cluster, system, stack)
        for server in cluster.workers:
            if server.process.alive():
                os.kill(server.process.pid, signal.SIGCONT)
    system.pool.close()


async def timed(call: Any) -> Any:
    """The result of a call that must end by its deadline."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    result = await call
    assert loop.time() - begun < DEADLINE_S + SLACK_S
    return result


async def test_a_stopped_worker_costs_time_a_killed_one_less_and_none_a_byte(fleet: Fleet) -> None:
    prefix = prompt(1, 40, LARGE)
    far = await fleet.everywhere(prefix)
    near = await fleet.client()
    nearest = (await found(near, prefix, 40)).runs[0].holder
    stopped = next(worker for worker in fleet.cluster.workers if worker.ready["id"] == nearest)
    for client in (near, far):
        plan = await found(client, prefix, 40)
        os.kill(stopped.process.pid, signal.SIGSTOP)
        result = await timed(client.get(plan))
        check(plan, result, 40)  # from the other one
        put = prompt(2, 4, LARGE)
        assert len((await timed(client.put(LARGE, put, blocks_of(put)))).states) == 4
        os.kill(stopped.process.pid, signal.SIGCONT)
    plan = await found(far, prefix, 40)
    gets = [asyncio.ensure_future(timed(far.get(plan))) for _ in range(6)]
    await asyncio.sleep(0)
    for worker in fleet.cluster.workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    for get in gets:
        result = await get
        check(plan, result, result.blocks)
    for client in (near, far):
        result = await timed(client.get(plan))
        assert result.blocks == 0 and result.bytes == 0
        assert (await timed(client.match(LARGE, prefix))).blocks == 0


async def test_a_killed_coordinator_leaves_same_host_hits(fleet: Fleet) -> None:
    prefix = prompt(3, 10, LARGE)
    near = await fleet.client()
    await near.put(LARGE, prefix, blocks_of(prefix))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(fleet.coordinator.process.pid, number)
        plan = await timed(near.match(LARGE, prefix))
        check(plan, await timed(near.get(plan)), 10)
        more = prompt(int(number), 3, LARGE)
        assert set((await timed(near.put(LARGE, more, blocks_of(more)))).states) == {"committed"}


async def test_killed_clients_leave_nothing_behind(fleet: Fleet) -> None:
    """A client that dies while it has blocks open and staging space: the worker takes both back."""
    near = await fleet.client()
    prefix = prompt(4, 10, LARGE)
    await near.put(LARGE, prefix, blocks_of(prefix))
    worker = fleet.cluster.workers[0]
    script = (
        "import asyncio, sys\n"
        "from kvstore.transport.base import Credentials\n"
        "from kvstore.transport.methods import WORKER_LOCAL\n"
        "from kvstore.transport.rpc import GrpcTransport\n"
        "from kvstore.machine.system import RealClock\n"
        "from kvstore.wire import worker_pb2\n"
        "async def main():\n"
        "    link = await GrpcTransport(RealClock()).connect_local(sys.argv[1], Credentials())\n"
        "    await link.call(WORKER_LOCAL['Stage'], worker_pb2.StageRequest(bytes=1 << 20), timeout_s=5)\n"
        "    print('staged', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )

    def descriptors() -> int:
        """Staging memory and local connections: what else the worker opens meanwhile, segments for instance, stays."""
        folder = Path(f"/proc/{worker.process.pid}/fd")
        local = {f"socket:[{line.split()[6]}]" for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
        links = []
        for link in folder.iterdir():
            with suppress(FileNotFoundError):  # closed since
                links.append(os.readlink(link))
        return sum("-staging" in link or link in local for link in links)

    before = descriptors()
    for _ in range(3):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, worker.ready["socket"], stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None and await child.stdout.readline() == b"staged\n"
        assert descriptors() > before
        child.kill()
        await child.wait()
    async with asyncio.timeout(5):
        while descriptors() > before:
            await asyncio.sleep(0.01)
