"""Pins: blocks stay while somebody is about to open them, within bounds, and no longer."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.client.pinning import Pin
from kvstore.layout import block_bytes
from kvstore.spec import Shard
from tests.service_cluster import STORE, MiniCluster, blocks_of, check
from tests.service_helpers import FULL, prompt, until

SIZE = block_bytes(FULL, Shard.whole(FULL))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        yield made
        for worker in made.workers:
            assert len(worker.store.pins) == 0, "a pin was left behind"
            worker.store.validate()


@pytest.mark.parametrize("far", [False, True], ids=["socket", "grpc"])
async def test_pinned_blocks_outlive_a_flood_and_the_pin_is_of_use_elsewhere(cluster: MiniCluster, far: bool) -> None:
    await cluster.coordinator()
    small = replace(STORE, host_bytes=8 << 20, hot_bytes=4 << 20, segment_bytes=1 << 20, pin_max_s=600.0)
    worker = await cluster.worker("a", store=small)
    scheduler, reader = await cluster.client(far=far), await cluster.client()
    kept, lost = prompt(1, 8), prompt(2, 8)
    for prefix in (kept, lost):
        assert set((await scheduler.put(FULL, prefix, blocks_of(prefix))).states) == {"committed"}
    plan = await scheduler.match(FULL, kept)
    pin = await scheduler.pin(plan, ttl_s=600)
    assert pin.blocks == 8 and pin.parts[0].worker == worker.identity.worker
    assert pin.parts[0].epoch == worker.identity.epoch
    for seed in range(10, 10 + (12 << 20) // (16 * SIZE)):
        flood = prompt(seed, 16)
        await reader.put(FULL, flood, blocks_of(flood))
    await worker.store.idle()
    assert (await reader.match(FULL, lost)).blocks == 0, "nothing was evicted: the case shows nothing"
    result = await reader.get(plan)
    check(plan, result, 8)
    await reader.unpin(pickle.loads(pickle.dumps(pin)))
    await reader.unpin(pin)
    assert len(worker.store.pins) == 0


async def test_a_pin_ends_by_age_and_lives_on_when_renewed(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a")
    client = await cluster.client()
    prefix = prompt(3, 4)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await client.match(FULL, prefix)
    renewed, left = await client.pin(plan, ttl_s=0.2), await client.pin(plan, first=2, ttl_s=0.2)
    assert (renewed.blocks, left.blocks) == (4, 2)
    assert await client.renew(renewed, ttl_s=30)
    await until(lambda: len(worker.store.pins) == 1, "the other pin's end")
    assert worker.store.counters["pins_expired"] == 1
    assert not await client.renew(left)
    await client.unpin(renewed)


async def test_pinned_bytes_are_bounded_per_namespace(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a", store=replace(STORE, pinned_bytes=3 * SIZE))
    client = await cluster.client()
    prefix = prompt(4, 6)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await client.match(FULL, prefix)
    first, second = await client.pin(plan), await client.pin(plan)
    assert (first.blocks, second.blocks) == (3, 0)
    assert worker.store.pins.pinned_bytes(client.namespace) == 3 * SIZE
    await client.unpin(first, second)
    assert worker.store.pins.pinned_bytes(client.namespace) == 0


async def test_a_worker_that_is_gone_pins_nothing_and_raises_nothing(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a")
    client = await cluster.client()
    prefix = prompt(5, 3)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await client.match(FULL, prefix)
    await worker.stop()
    cluster.workers.remove(worker)
    pin = await client.pin(plan, timeout_s=0.5)
    assert pin.blocks == 0
    assert not await client.renew(Pin(pin.parts, 3, 1.0), timeout_s=0.5)
    await client.unpin(pin, timeout_s=0.5)
