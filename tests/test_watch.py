"""The local view: a snapshot and every change, lookups without a round trip, and `Match` whenever it will not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.watch import Watcher
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.client.view import View
from kvstore.convert import Introduced, delta_to_wire
from kvstore.directory.directory import Directory
from kvstore.errors import Corrupt, Overloaded
from kvstore.spec import Shard
from kvstore.types import CommitToken, Fidelity, Keys
from kvstore.wire import coordinator_pb2
from kvstore.wireform import member_to_wire
from tests.service_cluster import MiniCluster, blocks_of, check, found
from tests.service_helpers import FULL, TWO_GROUPS, ListSource, prompt, until
from tests.test_client_parts import HandClock

WHOLE = Shard.whole(FULL)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        await made.coordinator()
        yield made


def asked(cluster: MiniCluster) -> int:
    """Match calls that the coordinators served."""
    return sum(runtime.registry.counters["matches"] for runtime in cluster.coordinators)


async def watching(cluster: MiniCluster, **config: Any) -> KVClient:
    client = await cluster.client(watch=True, watch_retry_s=0.05, **config)
    await until(lambda: client.watching.fresh, "the view is there")
    return client


def same(ours: HitPlan, theirs: HitPlan) -> bool:
    return (ours.keys, set(ours.runs), ours.holders, ours.complete) == (
        theirs.keys,
        set(theirs.runs),
        theirs.holders,
        theirs.complete,
    )


async def test_a_warm_view_asks_nobody_and_says_the_same(cluster: MiniCluster) -> None:
    await cluster.worker("a")
    await cluster.worker("b")
    plain = await cluster.client()
    before, later, two = prompt(1, 40), prompt(2, 6), prompt(3, 6, TWO_GROUPS)
    await plain.put(FULL, before, blocks_of(before))
    await found(plain, before, 40)
    client = await watching(cluster)  # what was there comes as a snapshot
    await plain.put(FULL, later, blocks_of(later))  # what follows as deltas
    for group in range(2):
        shard = Shard.whole(TWO_GROUPS, group)
        await plain.put(TWO_GROUPS, two, blocks_of(two, shard), shard=shard)
    for prefix, blocks in ((before, 40), (later, 6), (two, 6)):
        before_ = asked(cluster)
        async with asyncio.timeout(5):
            while (plan := await client.match(prefix.spec, prefix)).blocks < blocks:
                await asyncio.sleep(0.005)
        assert asked(cluster) == before_, "a coordinator was asked"
        theirs = await plain.match(prefix.spec, prefix)
        assert same(plan, theirs)
        check(plan, await client.get(plan), blocks)
    purged = await plain.purge(FULL)
    assert purged == 46
    await until(lambda: not client.watching._view.directory.blocks - 12, "removals arrive")  # type: ignore[union-attr]
    assert (await client.match(FULL, before)).blocks == 0
    assert sum(worker.store.blocks("default") for worker in cluster.workers) == 12
    client.watching._view.directory.validate()  # type: ignore[union-attr]


async def test_own_commits_are_seen_before_the_view_has_them(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.worker("a")
    client = await watching(cluster)
    take = View.take
    held: list[coordinator_pb2.WatchReply] = []
    gate = asyncio.Event()

    def late(view: View, message: coordinator_pb2.WatchReply) -> None:
        if message.WhichOneof("body") in ("delta", "snapshot") and not gate.is_set():
            held.append(message)
        else:
            take(view, message)

    monkeypatch.setattr(View, "take", late)
    prefix = prompt(4, 6)
    put = await client.put(FULL, prefix, blocks_of(prefix))
    assert put.states == ["committed"] * 6
    plan = await client.match(FULL, prefix)
    check(plan, await client.get(plan), 6)
    await until(lambda: len(held) > 0, "the view was told")
    assert asked(cluster) == 0 and client.watching._own._blocks == 6
    view = client.watching._view
    assert view is not None
    for message in held:
        take(view, message)
    gate.set()
    assert (await client.match(FULL, prefix)).blocks == 6
    assert client.watching._own._blocks == 0 and view.directory.blocks == 6  # let go of: the view has them
    stranger = await cluster.client()
    other = prompt(5, 3)
    theirs = await stranger.put(FULL, other, blocks_of(other))
    assert (await client.match(FULL, other, after=theirs.tokens)).blocks == 3  # by the view, or by asking


async def test_own_commits_are_bounded_and_end_with_the_lease() -> None:
    from kvstore.client.view import OwnCommits

    clock = HandClock()
    own, view = OwnCommits(clock, 5.0, 10), View(100, 10)
    view.take(_member("w", 1))
    keys = [bytes([i]) * 16 for i in range(24)]

    def add(token: CommitToken, mine: list[bytes]) -> None:
        own.add(view, token, FULL, WHOLE, mine, Fidelity.EXACT, 100)

    add(CommitToken("w", 1, 4), keys[:4])
    add(CommitToken("w", 1, 10), keys[4:10])
    add(CommitToken("w", 1, 13), keys[10:13])
    assert own._blocks == 9 and view.directory.blocks == 9  # the oldest went: at most ten
    assert own.has(CommitToken("w", 1, 13)) and not own.has(CommitToken("w", 1, 14))
    assert view.match(FULL, keys[4:13], Keys(b"".join(keys[4:13])), (WHOLE,), Fidelity.EXACT).blocks == 9
    clock.now = 5.0
    own.tidy(view)
    assert own._blocks == 0 and view.directory.blocks == 0
    add(CommitToken("w", 1, 14), keys[:2])
    view.take(_member("w", 2))  # its epoch is over
    own.tidy(view)
    assert view.directory.blocks == 0
    add(CommitToken("gone", 1, 1), keys[:2])
    own.tidy(view)
    assert view.directory.blocks == 0  # nobody knows that worker (any more)


def _member(id: str, epoch: int, **more: Any) -> coordinator_pb2.WatchReply:
    from kvstore.directory.membership import Member

    told = coordinator_pb2.WatchMember(member=member_to_wire(Member(id, epoch, "127.0.0.1:1")), **more)
    return coordinator_pb2.WatchReply(member=told)


async def test_a_namespace_too_large_is_not_watched(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.worker("a")
    plain = await cluster.client()
    prefix = prompt(6, 30)
    await plain.put(FULL, prefix, blocks_of(prefix))
    await found(plain, prefix, 30)
    client = await cluster.client(watch=True, watch_entries_max=29, watch_retry_s=0.02)
    await until(lambda: client.counters["watch_refused"] > 0, "it is refused")
    assert not client.watching.fresh and (await client.match(FULL, prefix)).blocks == 30  # by Match
    small = await watching(cluster, watch_entries_max=30)
    more = prompt(7, 1)
    await plain.put(FULL, more, blocks_of(more))  # it grows while it is watched
    await until(lambda: small.counters["watch_refused"] > 0, "the watch ends")
    assert (await small.match(FULL, prefix)).blocks == 30


async def test_a_slow_watcher_is_ended_and_bounded() -> None:
    source = ListSource()
    source.add("default", prompt(1, 300))
    directory = Directory()
    watcher = Watcher("default", directory, 2000)
    watcher.push(_member("w", 1))
    assert len(watcher.take()) == 1
    for _ in range(300):
        watcher.push(_member("w", 1))
    with pytest.raises(Overloaded):
        watcher.take()


async def test_the_view_goes_with_its_coordinator_and_comes_back(cluster: MiniCluster) -> None:
    await cluster.worker("a")
    client = await watching(cluster)
    prefix = prompt(8, 4)
    await client.put(FULL, prefix, blocks_of(prefix))
    runtime = cluster.coordinators[0]
    address = runtime.address
    await runtime.stop()
    await until(lambda: not client.watching.fresh, "the view is gone")
    assert (await client.match(FULL, prefix)).blocks == 4  # the worker of this host answers
    cluster.coordinators.clear()
    await cluster.coordinator(bind=address)
    await until(lambda: client.watching.fresh, "a view of the new one is there", 15.0)
    async with asyncio.timeout(5):
        while (await client.match(FULL, prefix)).blocks < 4:
            await asyncio.sleep(0.005)


async def test_a_view_without_a_sign_of_life_is_not_asked(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.worker("a")
    client = await watching(cluster, watch_stale_s=0.5)
    prefix = prompt(9, 2)
    await client.match(FULL, prefix)
    assert asked(cluster) == 0
    monkeypatch.setattr(client.watching, "_heard", client.watching._heard - 1.0)
    await client.match(FULL, prefix)
    assert asked(cluster) == 1


async def test_a_dead_workers_blocks_are_out_of_the_view(cluster: MiniCluster) -> None:
    worker = await cluster.worker("a")
    client = await watching(cluster)
    prefix = prompt(10, 4)
    await client.put(FULL, prefix, blocks_of(prefix))
    await until(lambda: client.watching._view.directory.blocks >= 4, "announced")  # type: ignore[union-attr]
    await worker.stop()
    cluster.workers.clear()
    async with asyncio.timeout(5):
        while (await client.match(FULL, prefix)).blocks:
            await asyncio.sleep(0.005)


async def test_nothing_of_another_namespace_is_watched(tmp_path: Path) -> None:
    grants = tmp_path / "namespaces.toml"
    grants.write_text(
        "[namespaces.a]\n[namespaces.b]\n"
        '[identities.all]\nrole = "node"\nnamespaces = []\n'
        f'token_sha256 = "{_sha("x" * 20)}"\n'
    )
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("x" * 20)
    files = {"namespaces_file": str(grants), "token_file": str(token)}
    async with MiniCluster(tmp_path) as cluster:
        await cluster.coordinator(**files)
        await cluster.worker("a", **files)
        clients = {}
        for name in "ab":
            clients[name] = await cluster.client(namespace=name, token_file=str(token), watch=True, watch_retry_s=0.05)
        prefix = prompt(11, 4)
        await clients["a"].put(FULL, prefix, blocks_of(prefix))
        for name in "ab":
            await until(lambda name=name: clients[name].watching.fresh, "a view")  # type: ignore[misc]
        await until(lambda: clients["a"].watching._view.directory.blocks >= 4, "a sees its own")  # type: ignore[union-attr]
        view = clients["b"].watching._view
        assert view is not None and view.directory.blocks == 0
        assert (await clients["b"].match(FULL, prefix)).blocks == 0


def _sha(word: str) -> str:
    import hashlib

    return hashlib.sha256(word.encode()).hexdigest()


def test_a_gap_ends_the_view() -> None:
    view, source = View(100, 0), ListSource()
    view.take(_member("w", 1))
    source.add("default", prompt(1, 4))
    source.add("default", prompt(2, 4))
    outbox = source.outboxes["default"]
    introduced = Introduced(source.catalog)

    def message(seq: int) -> coordinator_pb2.WatchReply:
        delta = outbox.delta(seq, 4)
        assert delta is not None
        reply = coordinator_pb2.WatchReply(worker="w", epoch=1, dictionary=introduced.entries(delta.changes))
        reply.delta.CopyFrom(delta_to_wire("default", delta))
        return reply

    first, second = message(0), message(4)
    view.take(first)
    assert view.directory.blocks == 4 and view.applied(CommitToken("w", 1, 4))
    assert not view.applied(CommitToken("w", 1, 8))
    view.take(first)  # again: nothing
    view.take(second)
    assert view.directory.blocks == 8
    fresh = View(100, 0)
    fresh.take(_member("w", 1))
    with pytest.raises(Corrupt):
        fresh.take(second)
    view.take(_member("w", 1, gone=True))
    assert view.directory.blocks == 0
