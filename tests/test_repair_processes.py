"""Real worker processes with two copies of everything: one is killed, one is drained, nothing worth keeping is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.client.kv_client import KVClient
from kvstore.config import MIB, ClientConfig, Config, CoordinatorConfig, ServerConfig, StoreConfig
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import Chain
from kvstore.machine.system import real_system
from kvstore.transport.rpc import GrpcTransport
from tests.service_cluster import blocks_of, check, found
from tests.service_helpers import LARGE, prompt

CONFIG = Config(
    store=StoreConfig(host_bytes=64 * MIB, ssd_bytes=64 * MIB, ssd_segment_bytes=8 * MIB, staging_bytes=4 * MIB),
    server=ServerConfig(stop_grace_s=0.5),
    coordinator=CoordinatorConfig(heartbeat_s=0.1, lease_s=1.0, hint_again_s=0.5),
)
BLOCKS = 40  # of two placement groups


class World:
    """A cluster of processes and a client on another host."""

    def __init__(self, cluster: LocalCluster, client: KVClient) -> None:
        self.cluster, self.client = cluster, client

    async def put(self, seed: int) -> Chain:
        prefix = prompt(seed, BLOCKS, LARGE)
        put = await self.client.put(LARGE, prefix, blocks_of(prefix))
        assert set(put.states) == {"committed"}
        return prefix

    async def copies(self, prefix: Chain, holders: int) -> None:
        await found(self.client, prefix, BLOCKS, holders=holders)

    async def drain(self, worker: str) -> dict[str, float]:
        """`kvstore drain` as a person calls it."""
        assert self.cluster.coordinator is not None
        argv = [sys.executable, "-m", "kvstore.cli.main", "drain", worker, "--json"]
        argv += ["--coordinators", self.cluster.coordinator.address]
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        out, _ = await asyncio.wait_for(process.communicate(), 30.0)
        assert process.returncode == 0
        report: dict[str, float] = json.loads(out)
        return report


async def world(folder: Path, copies: int, workers: int) -> AsyncIterator[World]:
    file = folder / "namespaces.toml"
    file.write_text(f"[namespaces.default]\ncopies = {copies}\n")
    config = replace(CONFIG, server=replace(CONFIG.server, namespaces_file=str(file)))
    system = real_system(2)
    try:
        async with LocalCluster(config, workers=workers, redis=False) as cluster:
            assert cluster.coordinator is not None
            far = ClientConfig(coordinators=(cluster.coordinator.address,), negative_cache_s=0.2)
            transport = GrpcTransport(system.clock)
            client = await KVClient.connect(far, replace(system, host="elsewhere"), transport)
            yield World(cluster, client)
            await client.close()
    finally:
        system.pool.close()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[World]:
    async for made in world(tmp_path, copies=2, workers=2):
        yield made


@pytest.fixture
async def one_copy(tmp_path: Path) -> AsyncIterator[World]:
    async for made in world(tmp_path, copies=1, workers=2):
        yield made


async def test_the_groups_of_a_killed_worker_get_a_second_copy_on_a_newcomer(two: World) -> None:
    prefix = await two.put(1)
    await two.copies(prefix, 2)
    third = await two.cluster.add_worker()
    two.cluster.workers[0].process.kill()
    async with asyncio.timeout(20):  # until the dead one's lease is over and the copies are made anew
        while True:
            plan = await found(two.client, prefix, BLOCKS, holders=2)
            if third.ready["id"] in plan.holders:
                break
            await asyncio.sleep(0.02)
    two.cluster.workers[1].process.kill()  # now the newcomer has all there is
    async with asyncio.timeout(20):
        while set((plan := await two.client.match(LARGE, prefix)).holders) != {third.ready["id"]}:
            await asyncio.sleep(0.02)
    check(plan, await two.client.get(plan), BLOCKS)


async def test_drain_moves_the_only_copies_and_hits_go_on(one_copy: World) -> None:
    prefixes = [await one_copy.put(seed) for seed in range(4)]
    for prefix in prefixes:
        await one_copy.copies(prefix, 1)
    first, second = (server.ready["id"] for server in one_copy.cluster.workers)
    report = await one_copy.drain(str(first))
    assert report["worker"] == first and report["left"] == 0
    process = one_copy.cluster.workers[0].process
    async with asyncio.timeout(10):
        while process.alive():
            await asyncio.sleep(0.02)
    for prefix in prefixes:
        plan = await found(one_copy.client, prefix, BLOCKS)
        assert set(plan.holders) == {second}
        check(plan, await one_copy.client.get(plan), BLOCKS)


async def test_sigterm_drains_within_the_grace_period(one_copy: World) -> None:
    prefixes = [await one_copy.put(seed) for seed in range(4)]
    for prefix in prefixes:
        await one_copy.copies(prefix, 1)
    process = one_copy.cluster.workers[1].process
    os.kill(process.pid, signal.SIGTERM)
    async with asyncio.timeout(15):
        while process.alive():
            await asyncio.sleep(0.02)
    for prefix in prefixes:
        plan = await found(one_copy.client, prefix, BLOCKS)
        assert set(plan.holders) == {one_copy.cluster.workers[0].ready["id"]}
        check(plan, await one_copy.client.get(plan), BLOCKS)
