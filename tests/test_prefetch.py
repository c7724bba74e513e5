"""Blocks near by before they are needed, pulled through once for a host, and what is worth loading at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.plan import HitPlan, PlanRun
from kvstore.client.rates import Rates
from kvstore.config import KIB, MIB
from kvstore.directory.membership import Member
from kvstore.errors import BadRequest
from kvstore.layout import block_bytes
from kvstore.spec import Shard
from kvstore.transport.base import Credentials
from kvstore.transport.methods import WORKER
from kvstore.types import Fidelity, Tier, pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire
from tests.service_cluster import SMALL, MiniCluster, blocks_of, check, found, put_slowly
from tests.service_helpers import FULL, LARGE, TWO_GROUPS, prompt, until
from workers.runtime import WorkerRuntime

WHOLE = Shard.whole(FULL)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        await made.coordinator()
        yield made


async def elsewhere(cluster: MiniCluster, name: str) -> WorkerRuntime:
    """A worker on another host."""
    system, cluster.system = cluster.system, replace(cluster.system, host="elsewhere")
    try:
        return await cluster.worker(name)
    finally:
        cluster.system = system


async def two_hosts(cluster: MiniCluster, blocks: int = 40) -> tuple[WorkerRuntime, WorkerRuntime, Any]:
    """Workers here and elsewhere; the prefix lies elsewhere only."""
    away = await elsewhere(cluster, "away")
    prefix = prompt(31, blocks)
    by = await cluster.client(far=True)
    await by.put(FULL, prefix, blocks_of(prefix))
    here = await cluster.worker("here")
    await until(lambda: away.identity.worker in here.announcer.view(), "the worker here knows the other one")
    return here, away, prefix


async def test_what_lies_on_disk_is_in_memory_before_it_is_read(cluster: MiniCluster) -> None:
    store = replace(SMALL, host_bytes=2 * MIB, hot_bytes=512 * KIB)
    worker = await cluster.worker("a", ssd=True, store=store)
    client = await cluster.client()
    prefix = prompt(30, 60, LARGE)
    await put_slowly(client, worker, prefix)
    plan = await found(client, prefix, 60)
    cold = [run for run in plan.runs if run.tier == Tier.SSD]
    assert cold, "nothing went down to the disk: the test says nothing"
    first = min(run.first_depth for run in cold)
    part = plan.shortened(first + 2)
    assert await client.prefetch(part, first=first) == 2
    result = await client.get(part, first=first)
    assert result.blocks == first + 2 and Tier.SSD not in result.tiers[0][first:]


async def test_what_another_host_holds_is_pulled_ahead(cluster: MiniCluster) -> None:
    here, away, prefix = await two_hosts(cluster)
    client = await cluster.client()
    plan = await found(client, prefix, 40)
    assert {run.holder for run in plan.runs} == {away.identity.worker}
    assert await client.prefetch(plan) == 40
    assert here.store.blocks("default") == 40 and here.node.counters["pulled_blocks"] == 40
    assert await client.prefetch(plan) == 40 and here.node.counters["pulled_blocks"] == 40  # there already
    await until(lambda: here.announcer is not None, "announced")
    plan = await found(client, prefix, 40, holders=2)
    await away.stop()
    cluster.workers.remove(away)
    check(plan, await client.get(plan), 40)


async def test_without_a_worker_on_this_host_the_holder_itself_is_asked(cluster: MiniCluster) -> None:
    _, away, prefix = await two_hosts(cluster)
    client = await cluster.client(far=True, workers=())
    plan = await found(client, prefix, 40)
    client.members._table.clear()  # it knows of no socket that it could reach
    assert await client.prefetch(plan) == 40 and away.node.counters["prefetched_blocks"] == 40


async def test_a_host_reads_another_once_for_all_its_clients(cluster: MiniCluster) -> None:
    here, away, prefix = await two_hosts(cluster)
    clients = [await cluster.client(pull_through=True) for _ in range(5)]
    plans = [await found(client, prefix, 40) for client in clients]
    before = away.store.stack.hits[Tier.HOT]
    results = await asyncio.gather(*(client.get(plan) for client, plan in zip(clients, plans, strict=True)))
    for plan, result in zip(plans, results, strict=True):
        check(plan, result, 40)
    assert away.store.stack.hits[Tier.HOT] - before == 40  # each block left that host once
    assert here.store.blocks("default") == 40 and sum(client.counters["pulled_through"] for client in clients) >= 40


async def test_where_nothing_can_be_pulled_through_the_holder_is_read(cluster: MiniCluster) -> None:
    here, _, prefix = await two_hosts(cluster)
    client = await cluster.client(pull_through=True)
    plan = await found(client, prefix, 40)
    here.node.draining = True  # it takes nothing any more
    check(plan, await client.get(plan), 40)
    assert here.store.blocks("default") == 0


async def test_a_worker_asks_members_only_and_refuses_nonsense(cluster: MiniCluster) -> None:
    here, away, prefix = await two_hosts(cluster)
    channel = await cluster.transport.connect(here.address, Credentials())
    part = worker_pb2.PrefetchPart(
        shard=shard_to_wire(WHOLE), group=prefix.group(0), keys=pack_keys(prefix.keys[:4]), holders=["127.0.0.1:9"]
    )
    request = worker_pb2.PrefetchRequest(spec_json=FULL.canonical_json(), parts=[part], deadline_ms=2000)
    reply = await channel.unary(WORKER["Prefetch"], request, timeout_s=5)
    assert (reply.ready, reply.pulled, reply.missing) == (0, 0, 4)
    part.holders.append(away.identity.worker)
    request = worker_pb2.PrefetchRequest(spec_json=FULL.canonical_json(), parts=[part], deadline_ms=2000)
    reply = await channel.unary(WORKER["Prefetch"], request, timeout_s=5)
    assert (reply.ready, reply.pulled, reply.missing) == (4, 4, 0)
    wrong = [
        worker_pb2.PrefetchRequest(spec_json="{", parts=[part]),
        worker_pb2.PrefetchRequest(spec_json=FULL.canonical_json(), parts=[part] * 2000),
        worker_pb2.PrefetchRequest(
            spec_json=FULL.canonical_json(), parts=[worker_pb2.PrefetchPart(shard=part.shard, group=b"x")]
        ),
        worker_pb2.PrefetchRequest(
            spec_json=FULL.canonical_json(),
            parts=[worker_pb2.PrefetchPart(shard=part.shard, group=part.group, keys=bytes(16 * 20_000))],
        ),
    ]
    for message in wrong:
        with pytest.raises(BadRequest):
            await channel.unary(WORKER["Prefetch"], message, timeout_s=5)
    await channel.close()


# --- what is worth loading -----------------------------------------------------------------------------------------

SIZE = block_bytes(FULL, WHOLE)


def plan_of(*runs: tuple[str, Tier, int, int], spec: Any = FULL, shards: Any = (WHOLE,)) -> HitPlan:
    """Runs of (holder, tier, first depth, count)."""
    made = tuple(PlanRun(h, WHOLE, t, Fidelity.EXACT, first, count, count * 10) for h, t, first, count in runs)
    blocks = max((first + count for _, _, first, count in runs), default=0)
    holders = {h: Member(h, 1) for h, *_ in runs}
    return HitPlan(spec, tuple(bytes([i]) * 16 for i in range(blocks)), shards, runs=made, holders=holders)


def test_the_load_time_follows_what_was_measured() -> None:
    rates = Rates(lambda plan, holder: holder == "near")
    plan = plan_of(("near", Tier.HOT, 0, 8))
    guess = rates.load_s(plan)
    assert guess == pytest.approx(0.001 + 8 * SIZE / 4e9)
    rates.note("near", Tier.HOT, 1 << 20, (1 << 20) / 1e6)  # a megabyte a second
    assert rates.load_s(plan) == pytest.approx(0.001 + 8 * SIZE / 1e6)
    rates.note("near", Tier.HOT, 1 << 20, (1 << 20) / 2e6)
    assert 1e6 < rates.rate(plan, "near", Tier.HOT) < 2e6  # a moving mean
    rates.note("near", Tier.HOT, 10, 100.0)  # too small to say anything
    assert rates.rate(plan, "near", Tier.HOT) > 1e6
    assert rates.rate(plan, "far", Tier.HOT) < rates.rate(plan, "near", Tier.SSD) * 2
    both = plan_of(("near", Tier.HOT, 0, 8), ("far", Tier.HOT, 0, 8), ("far", Tier.HOT, 8, 8))
    rates.note("far", Tier.HOT, 1 << 20, (1 << 20) / 4e6)
    far = 0.003 + 16 * SIZE / 4e6
    assert rates.load_s(both) == pytest.approx(far)  # the slower holder's copies of the same blocks are not read
    split = plan_of(("near", Tier.HOT, 0, 8), ("far", Tier.HOT, 8, 8))
    near = 0.001 + 8 * SIZE / rates.rate(plan, "near", Tier.HOT)
    assert rates.load_s(split) == pytest.approx(max(near, 0.003 + 8 * SIZE / 4e6))  # both at once


def test_what_loads_slower_than_it_is_computed_is_left_out() -> None:
    rates = Rates(lambda plan, holder: True)
    rates.note("w", Tier.HOT, 1 << 20, (1 << 20) / 1e9)
    rates.note("w", Tier.SSD, 1 << 20, (1 << 20) / 1e6)
    plan = plan_of(("w", Tier.HOT, 0, 10), ("w", Tier.SSD, 10, 10))
    slow_engine, fast_engine, hopeless = 100.0, 20_000.0, 1e9
    a_block = FULL.block_tokens
    assert a_block / slow_engine > SIZE / 1e6 and a_block / fast_engine < SIZE / 1e6  # the numbers mean something
    assert rates.worth(plan, slow_engine).blocks == 20
    part = rates.worth(plan, fast_engine)
    assert part.blocks == 10 and part.load_s == pytest.approx(rates.load_s(part)) and part.load_s < 0.002
    assert rates.worth(plan, hopeless).blocks == 0
    whole = Shard.whole(TWO_GROUPS, 1)
    windowed = plan_of(("w", Tier.HOT, 0, 10), ("w", Tier.SSD, 10, 10), spec=TWO_GROUPS, shards=(WHOLE, whole))
    assert rates.worth(windowed, fast_engine).blocks in (0, 20)  # nothing in between is known to be held


async def test_a_match_says_how_long_loading_takes_and_leaves_out_what_is_not_worth_it(cluster: MiniCluster) -> None:
    await cluster.worker("a")
    client = await cluster.client()
    prefix = prompt(33, 6)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await found(client, prefix, 6)
    assert 0 < plan.load_s < 1 and plan.shortened(3).load_s < plan.load_s
    assert (await client.match(FULL, prefix, recompute_tokens_per_s=1.0)).blocks == 6
    assert (await client.match(FULL, prefix, recompute_tokens_per_s=1e12)).blocks == 0
    assert client.counters["blocks_not_worth_loading"] == 6
    with pytest.raises(BadRequest):
        await client.match(FULL, prefix, recompute_tokens_per_s=0)
