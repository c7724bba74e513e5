"""Workers that share a real Redis: its blocks are announced by one of them, served by any, and outlive all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.keys import Chain
from kvstore.types import Tier
from tests.service_cluster import SMALL, MiniCluster, blocks_of, check, put_slowly
from tests.service_cluster import found as found_blocks
from tests.service_helpers import FULL, prompt, until

pytest_plugins = ["tests.redis_fixtures"]

BLOCKS = 320


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        yield made


async def found(client: KVClient, prefix: Chain, blocks: int, redis: int) -> HitPlan:
    """The plan once the announcements are in."""
    async with asyncio.timeout(15):
        while True:
            plan = await client.match(FULL, prefix)
            if plan.blocks >= blocks and plan.tiers().get(Tier.REDIS, 0) >= redis:
                return plan
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("far", [False, True])
async def test_what_left_a_worker_is_served_from_redis(
    cluster: MiniCluster, server: EmbeddedRedis, raw: object, far: bool
) -> None:
    await cluster.coordinator()
    store = replace(SMALL, redis_url=server.url, redis_timeout_s=0.5)
    await cluster.worker("a", store=store)
    await cluster.worker("b", store=store)
    elected = [worker for worker in cluster.workers for mine in worker.redis_announcers if mine.elected]
    await until(
        lambda: sum(m.elected for worker in cluster.workers for m in worker.redis_announcers) == 1, "one is elected"
    )
    assert len(elected) <= 1
    writer = await cluster.client(alone=True, workers=(cluster.workers[0].socket,))
    prefix = prompt(1, BLOCKS)
    await put_slowly(writer, cluster.workers[0], prefix)
    reader = await cluster.client(far=far)
    plan = await found(reader, prefix, BLOCKS, 50)
    assert "redis:default" in plan.holders
    result = await reader.get(plan)
    check(plan, result, BLOCKS)
    assert result.tiers[0].count(Tier.REDIS) >= 20  # some may have been loaded for good on the way
    assert not [name for name in reader.counters if name.startswith("errors")], reader.counters


async def test_redis_outlives_the_workers_and_its_end_is_a_miss(cluster: MiniCluster, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    server = EmbeddedRedis(str(tmp_path / "redis"), 64 << 20)
    server.start()
    try:
        await cluster.coordinator()
        store = replace(SMALL, redis_url=server.url, redis_timeout_s=0.5)
        first = await cluster.worker("a", store=store)
        writer = await cluster.client(alone=True, workers=(first.socket,))
        prefix = prompt(2, BLOCKS)
        await put_slowly(writer, cluster.workers[0], prefix)
        await put_slowly(writer, cluster.workers[0], prompt(99, BLOCKS))  # so that all of the first one leaves
        await first.stop()
        cluster.workers.clear()
        await cluster.worker("b", store=store)
        reader = await cluster.client()
        plan = await found(reader, prefix, 1, 1)
        held = plan.blocks
        result = await reader.get(plan)
        check(plan, result, held)
        assert set(result.tiers[0]) == {Tier.REDIS}
        mine = prompt(3, 10)
        assert (await reader.put(FULL, mine, blocks_of(mine))).states == ["committed"] * 10
        server.stop()
        plan = await found_blocks(reader, mine, 10)
        check(plan, await reader.get(plan), 10)  # same-host hits go on
        async with asyncio.timeout(20):
            while (await reader.match(FULL, prompt(2, BLOCKS))).tiers().get(Tier.REDIS, 0):
                await asyncio.sleep(0.05)  # its announcer has given it up
        far = await cluster.client(far=True)
        assert (await far.get(plan)).blocks == 10
    finally:
        server.stop()
