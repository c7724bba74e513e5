"""Score: what a router is told of each replica. Engines count here only, and lapse with their lease."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np
import pytest

from kvstore.client.plan import ENGINE_HOLDER
from kvstore.client.scores import ReplicaScore, Scores, scores_of
from kvstore.config import Config, ServerConfig
from kvstore.directory.kv_events import PageHash
from kvstore.errors import BadRequest
from kvstore.keys import Chain
from kvstore.spec import Shard
from kvstore.types import Tier, pack_keys
from kvstore.wire import coordinator_pb2
from kvstore.wireform import shard_to_wire
from tests.packed import pack
from tests.service_helpers import FULL, ListSource, prompt, until
from tests.test_coordinator_service import Cluster
from workers.engine_bridge import EngineBridge

TOKENS = FULL.block_tokens
PAGE = 2  # tokens of an engine's page


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster() as made:
        yield made


def tokens_of(seed: int, blocks: int) -> list[int]:
    """Of `prompt`, which does not keep them."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 31, blocks * TOKENS, dtype=np.uint32)
    return [int(token) for token in drawn]


def stored(seed: int, blocks: int, name: int) -> bytes:
    """One batch: an engine has computed so many blocks of a prompt."""
    pages: list[PageHash] = [name * 1000 + at for at in range(blocks * TOKENS // PAGE)]
    event = ["BlockStored", pages, None, tokens_of(seed, blocks), PAGE, None, "GPU"]
    return pack([0.0, [event]])


async def said(messages: Sequence[tuple[int, bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    for message in messages:
        yield message


async def bridge(cluster: Cluster, address: str, name: str) -> EngineBridge:
    config = Config(server=ServerConfig(coordinators=(address,), stop_grace_s=0.2))
    made = EngineBridge(config, cluster.system, cluster.transport, name=name, namespace="default", spec=FULL)
    await made.start()
    cluster.stack.push_async_callback(made.stop)
    return made


class Here(ListSource):
    """A worker on the engines' host."""

    def __init__(self, host: str, worker: str) -> None:
        super().__init__(worker)
        self._host = host

    def member(self):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return replace(super().member(), host=self._host)


async def test_each_replica_is_scored_by_what_it_has_at_hand(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    near, far = Here(cluster.system.host, "near"), Here("elsewhere", "far")
    whole = prompt(1, 12)
    near.add("default", part(whole, 8), tier=Tier.SSD)
    near.add("default", part(whole, 3), tier=Tier.HOT)
    far.add("default", whole, tier=Tier.HOST)
    for source in (near, far):
        cluster.announcer(source, runtime.address)
    engine = await bridge(cluster, runtime.address, "one")
    other = await bridge(cluster, runtime.address, "two")
    await engine.run(said([(0, stored(1, 10, 1))]))
    client = await cluster.client(runtime.address)

    async def ready() -> bool:
        scores = await client.score(FULL, whole)
        return len(scores.replicas) == 3 and all(r.tokens or r.engine_tokens for r in scores.replicas)

    await eventually(ready)
    scores = await client.score(FULL, whole, ["one", "two", "far", "nobody"])
    assert scores.tokens == 12 * TOKENS
    near_tiers = {Tier.HOT: 3 * TOKENS, Tier.SSD: 5 * TOKENS}
    assert scores.replicas == (
        ReplicaScore("one", True, 10 * TOKENS, 8 * TOKENS, near_tiers),
        ReplicaScore("two", True, 0, 8 * TOKENS, near_tiers),
        ReplicaScore("far", True, 0, 12 * TOKENS, {Tier.HOST: 12 * TOKENS}),
        ReplicaScore("nobody", False),
    )
    assert scores.best == scores.replicas[2]
    assert {r.candidate for r in (await client.score(FULL, whole)).replicas} == {"one", "two", "far"}
    await other.stop()
    assert (await client.score(FULL, whole, ["two"])).replicas == (ReplicaScore("two", False),)


def part(whole: Chain, blocks: int) -> Chain:
    return Chain(whole.spec, whole.keys[:blocks])


async def eventually(condition) -> None:  # type: ignore[no-untyped-def]
    import asyncio

    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_an_engine_is_in_no_plan_and_no_list_of_members(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    engine = await bridge(cluster, runtime.address, "one")
    await engine.run(said([(0, stored(2, 6, 1))]))
    client = await cluster.client(runtime.address)
    whole = prompt(2, 6)

    async def ready() -> bool:
        return bool((await client.score(FULL, whole, ["one"])).replicas[0].engine_tokens)

    await eventually(ready)
    plan = await client.match(FULL, whole)
    assert plan.blocks == 0 and plan.runs == () and (await client.score(FULL, whole, ["one"])).tokens == 0
    members = await cluster.call(runtime, "Members", coordinator_pb2.MembersRequest())
    assert list(members.members) == [] and runtime.registry.membership.members() == []
    assert runtime.engines.membership.members() == [ENGINE_HOLDER + "one"]


async def test_an_engine_lapses_with_its_lease_and_what_it_had_with_its_connection(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    engine = await bridge(cluster, runtime.address, "one")
    await engine.run(said([(0, stored(3, 6, 1)), (1, stored(4, 4, 2)), (2, pack([0.0, [["BlockRemoved", [1000]]]]))]))
    client = await cluster.client(runtime.address)

    async def has(seed: int, blocks: int) -> bool:
        (score,) = (await client.score(FULL, prompt(seed, 6), ["one"])).replicas
        return score.engine_tokens == blocks * TOKENS

    await eventually(lambda: has(4, 4))
    assert await has(3, 0)  # its first page is gone: the rest is out of reach
    await engine.run(said([(7, stored(5, 2, 3))]))  # 3 to 6 are lost
    await eventually(lambda: has(5, 2))
    assert await has(4, 0) and engine.source.counters["gaps"] == 1
    await engine.run(said([(8, b"not msgpack")]))
    await eventually(lambda: has(5, 0))
    await engine.run(said([(9, stored(5, 2, 4)), (-1, b"")]))
    assert engine.source.counters == {"gaps": 1, "batches": 5, "batches_not_read": 1}
    await engine._announcer.stop(0.1, leaving=False)
    await until(lambda: not runtime.engines.membership.members(), "the engine's lease is over")
    assert (await client.score(FULL, prompt(5, 2), ["one"])).replicas == (ReplicaScore("one", False),)


async def test_requests_that_no_coordinator_answers(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    prefix = prompt(1, 2)

    def request(**change: object) -> coordinator_pb2.ScoreRequest:
        fields = {
            "root": FULL.root,
            "keys": pack_keys(prefix.keys),
            "shards": [shard_to_wire(Shard.whole(FULL))],
            "candidates": ["x"],
        }
        return coordinator_pb2.ScoreRequest(**(fields | change))

    reply = await cluster.call(runtime, "Score", request())
    assert reply.blocks == 0 and [s.known for s in reply.scores] == [False] and reply.boot_id
    assert [info.address for info in reply.coordinators] == [runtime.address]
    for wrong in ({"root": b"x"}, {"keys": b"x" * 17}, {"shards": []}, {"candidates": ["x"] * 257}):
        with pytest.raises(BadRequest):
            await cluster.call(runtime, "Score", request(**wrong))


async def test_nobody_answers_and_replies_that_do_not_hold_together(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    client = await cluster.client(runtime.address)
    await runtime.stop()
    assert await client.score(FULL, prompt(1, 3), ["one"], timeout_s=0.5) == Scores()
    assert sum(client.counters.values()) == 1
    for wrong in replies():
        with pytest.raises(Exception, match="answer to a score"):
            scores_of(wrong, FULL, 2)
    good = coordinator_pb2.ScoreReply(
        blocks=2, scores=[coordinator_pb2.ReplicaScore(candidate="a", blocks=2, known=True)]
    )
    assert scores_of(good, FULL, 2).best == ReplicaScore("a", True, 0, 2 * TOKENS)
    assert Scores().best is None


def replies() -> Iterator[coordinator_pb2.ScoreReply]:
    yield coordinator_pb2.ScoreReply(scores=[coordinator_pb2.ReplicaScore(blocks=3)])
    yield coordinator_pb2.ScoreReply(scores=[coordinator_pb2.ReplicaScore(engine_blocks=3)])
    tier = coordinator_pb2.TierBlocks(tier=9, blocks=1)
    yield coordinator_pb2.ScoreReply(scores=[coordinator_pb2.ReplicaScore(tiers=[tier])])
