"""A small cluster in one process: real workers and coordinators over loopback gRPC, Unix sockets and memfds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.runtime import CoordinatorRuntime
from kvstore.client.kv_client import GetResult, KVClient
from kvstore.client.plan import HitPlan
from kvstore.config import KIB, MIB, ClientConfig, Config, CoordinatorConfig, ServerConfig, StoreConfig, WorkerConfig
from kvstore.keys import Chain
from kvstore.machine.system import real_system
from kvstore.policies.base import make_policies
from kvstore.spec import ModelSpec, Shard
from kvstore.transport.rpc import GrpcTransport
from tests.service_helpers import payload
from workers.runtime import WorkerRuntime

make_policies("default")  # its kernels are compiled before any deadline runs

STORE = StoreConfig(
    host_bytes=32 * MIB,
    segment_bytes=4 * MIB,
    ssd_bytes=64 * MIB,
    ssd_segment_bytes=4 * MIB,
    ssd_sync_s=0.05,
    staging_bytes=2 * MIB,
    staging_total_bytes=16 * MIB,
    threads=2,
    put_wait_s=0.5,  # this machine may be busy with other tests
)
SMALL = replace(STORE, host_bytes=1024 * KIB, hot_bytes=128 * KIB, segment_bytes=64 * KIB)
"""So little memory that a few hundred small blocks move on."""
COORDINATOR = CoordinatorConfig(heartbeat_s=0.05, lease_s=0.6, hint_again_s=0.5)


class MiniCluster:
    """Processes without processes: each part has the system and transport it would have in one of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.system = real_system(4)
        self.transport = GrpcTransport(self.system.clock)
        self.stack = AsyncExitStack()
        self.coordinators: list[CoordinatorRuntime] = []
        self.workers: list[WorkerRuntime] = []

    async def __aenter__(self) -> MiniCluster:
        return self

    async def __aexit__(self, *exc: object) -> None:
        async with asyncio.timeout(60):  # a stop that hangs is a failure, not a wait for ever
            await self.stack.aclose()
        self.system.pool.close()

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(runtime.address for runtime in self.coordinators)

    async def coordinator(self, bind: str = "127.0.0.1:0", **server: Any) -> CoordinatorRuntime:
        config = Config(server=ServerConfig(bind=bind, stop_grace_s=0.2, **server), coordinator=COORDINATOR)
        runtime = CoordinatorRuntime(config, self.system, self.transport)
        await runtime.start()
        self.stack.push_async_callback(runtime.stop)
        self.coordinators.append(runtime)
        return runtime

    async def worker(
        self, name: str, *, ssd: bool = False, store: StoreConfig = STORE, data: int = 4, **server: Any
    ) -> WorkerRuntime:
        folder = str(self.folder / f"ssd-{name}") if ssd else ""
        config = Config(
            store=replace(store, ssd_folder=folder),
            server=ServerConfig(coordinators=self.addresses, stop_grace_s=0.2, node=name, **server),
            worker=WorkerConfig(socket=str(self.folder / f"{name}.sock"), tick_s=0.02, data_connections_max=data),
        )
        runtime = WorkerRuntime(config, self.system, self.transport)
        await runtime.start()
        self.stack.push_async_callback(runtime.stop)
        self.workers.append(runtime)
        with suppress(TimeoutError):  # some tests have coordinators that refuse it, or none that runs
            async with asyncio.timeout(1.0):
                while not all(runtime.identity.worker in c.registry.membership.members() for c in self.coordinators):
                    await asyncio.sleep(0.005)
        return runtime

    async def client(self, *, far: bool = False, alone: bool = False, **config: Any) -> KVClient:
        """`far`: on another host, so that everything goes by gRPC; `alone`: knows no coordinator."""
        system = replace(self.system, host="elsewhere") if far else self.system
        defaults = ClientConfig(coordinators=() if alone else self.addresses, staging_bytes=1 * MIB)
        client = await KVClient.connect(replace(defaults, **config), system, self.transport)
        self.stack.push_async_callback(client.close)
        return client


def blocks_of(prefix: Chain, shard: Shard | None = None, copy: int = 0) -> list[np.ndarray]:
    """The payload of every block of a chain."""
    shard = shard or Shard.whole(prefix.spec)
    return [payload(prefix.spec, shard, key, copy) for key in prefix.keys]


def whole_payload(spec: ModelSpec, key: bytes, group: int = 0) -> np.ndarray:
    return payload(spec, Shard.whole(spec, group), key)


def check(plan: HitPlan, result: GetResult, expected: int, copy: int = 0) -> None:
    """The result has so many blocks, all of them what was put as equal shards."""
    assert result.blocks == expected, (plan.blocks, result.blocks)
    for index, shard in enumerate(plan.shards):
        for depth in range(result.blocks):
            if result.tiers[index][depth] is not None:
                wanted = payload(plan.spec, shard, plan.keys[depth], copy)
                assert np.array_equal(np.asarray(result.buffers[index][depth]).view(np.uint8).ravel(), wanted), depth


async def put_slowly(client: KVClient, worker: WorkerRuntime, prefix: Chain) -> None:
    """Put a chain in steps, each of which has moved on where it must before the next one comes."""
    raws = blocks_of(prefix)
    for first in range(0, len(raws), 4):
        put = await client.put(prefix.spec, prefix, raws[first : first + 4], first)
        assert put.states == ["committed"] * len(put.states)
        await worker.store.idle()


async def found(
    client: KVClient, prefix: Chain, blocks: int, shards: Sequence[Shard] | None = None, *, holders: int = 1
) -> HitPlan:
    """The plan once so many blocks are known, of so many holders each: announcements come bit by bit."""
    async with asyncio.timeout(15):
        while True:
            plan = await client.match(prefix.spec, prefix, shards)
            held = Counter[str]()
            for run in plan.runs:
                held[run.holder] += run.count
            if plan.blocks >= blocks and (holders == 1 or sum(n >= blocks for n in held.values()) >= holders):
                return plan
            await asyncio.sleep(0.01)
