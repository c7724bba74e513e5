"""Purges that nothing brings back: copies from who has not done them are refused, from who has are taken."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.kv_client import KVClient
from kvstore.client.purging import LOOKS_MAX, Purged, purge_all
from kvstore.directory.membership import Member
from kvstore.errors import Unavailable
from kvstore.spec import Shard
from kvstore.store.purges import PURGES_MAX, Purges, Scope
from kvstore.transport.base import Credentials
from kvstore.transport.methods import WORKER
from kvstore.types import Tier
from kvstore.wire import worker_pb2
from tests.contracts.records import NAMESPACE, sample
from tests.service_cluster import MiniCluster, blocks_of
from tests.service_helpers import FULL, LARGE, prompt
from tests.store_fakes import FaultyTier, ManualClock
from tests.store_rig import Rig, until
from workers.puller import Job, Tally
from workers.runtime import WorkerRuntime

ONE, TWO = b"1" * 16, b"2" * 16
FENCE_S = 10.0


class TestPurges:
    def test_who_did_the_last_purge_of_a_scope_may_give(self) -> None:
        purges = Purges(ManualClock(), FENCE_S)
        assert not purges.fences("a", FULL.root, FULL)
        purges.add("a", Scope(FULL.root), ONE)
        assert purges.fences("a", FULL.root, FULL) and purges.fences("a", FULL.root, FULL, [TWO])
        assert not purges.fences("a", FULL.root, FULL, [TWO, ONE])
        purges.add("a", Scope(FULL.root), TWO)
        assert purges.fences("a", FULL.root, FULL, [ONE]) and not purges.fences("a", FULL.root, FULL, [TWO])
        purges.add("a", Scope(), ONE)  # of all models: both have to be known
        assert purges.fences("a", FULL.root, FULL, [TWO]) and not purges.fences("a", FULL.root, FULL, [ONE, TWO])

    def test_other_models_and_namespaces_are_not_meant(self) -> None:
        purges = Purges(ManualClock(), FENCE_S)
        purges.add("a", Scope(FULL.root), ONE)
        assert not purges.fences("a", LARGE.root, LARGE) and not purges.fences("b", FULL.root, FULL)
        assert purges.known("b") == []

    def test_a_model_by_name_is_meant_before_it_is_known(self) -> None:
        named, revision = Scope(model=FULL.model), Scope(model=FULL.model, revision=FULL.revision)
        for scope in (named, revision, Scope()):
            assert scope.covers(FULL.root, FULL) and scope.covers(FULL.root, None)
        other = Scope(model=FULL.model, revision=FULL.revision + "x")
        assert not other.covers(FULL.root, FULL) and not Scope(model="x").covers(FULL.root, FULL)

    def test_the_fence_falls_before_the_id_is_forgotten(self) -> None:
        clock = ManualClock()
        purges = Purges(clock, FENCE_S)
        purges.add("a", Scope(), ONE)
        clock.now += FENCE_S
        assert not purges.fences("a", FULL.root, FULL) and purges.known("a") == [ONE]
        clock.now += FENCE_S
        assert purges.known("a") == []

    def test_it_is_bounded(self) -> None:
        purges = Purges(ManualClock(), FENCE_S)
        for number in range(PURGES_MAX + 1):
            purges.add("a", Scope(number.to_bytes(16, "big")), number.to_bytes(16, "big"))
        assert len(purges.known("a")) == PURGES_MAX
        assert bytes(16) not in purges.known("a")


class TestPurgeAll:
    async def test_whoever_joins_or_starts_again_meanwhile_is_asked_too(self) -> None:
        asked: list[str] = []
        fleets = [
            [Member("a", 1, address="a1"), Member("b", 1, address="b1")],
            [Member("a", 2, address="a2"), Member("b", 1, address="b1"), Member("c", 1, address="c1")],
        ]

        async def look() -> list[Member]:
            return fleets[min(len(asked) // 2, 1)]

        async def ask(address: str) -> int:
            asked.append(address)
            if address == "a1":
                raise Unavailable("it is starting")
            return 3

        assert await purge_all(look, ask) == Purged(blocks=9, workers=3)
        assert asked == ["a1", "b1", "a2", "c1"]

    async def test_what_several_drop_at_a_time_adds_up(self) -> None:
        members = [Member(name, 1, address=name) for name in "abc"]
        together = asyncio.Barrier(len(members))

        async def look() -> list[Member]:
            return members

        async def ask(address: str) -> int:
            await together.wait()
            return 3

        assert await purge_all(look, ask) == Purged(blocks=9, workers=3)

    async def test_the_looks_are_bounded_and_failures_are_told(self) -> None:
        looks = 0

        async def look() -> list[Member]:
            nonlocal looks
            looks += 1
            return [Member("a", looks, address="a")]

        async def ask(address: str) -> int:
            raise Unavailable("never")

        purged = await purge_all(look, ask)
        assert looks == LOOKS_MAX and list(purged.failed) == ["a"] and purged.workers == 0


# --- between workers --------------------------------------------------------------------------------------------------


PREFIX = prompt(1, 8)
WHOLE = Shard.whole(FULL)


async def purge(cluster: MiniCluster, worker: WorkerRuntime, id: bytes = ONE, **what: bytes | str) -> int:
    channel = await cluster.transport.connect(worker.address, Credentials())
    request = worker_pb2.PurgeRequest(purge=id, **what)  # type: ignore[arg-type]
    reply: worker_pb2.PurgeReply = await channel.unary(WORKER["Purge"], request, timeout_s=5)
    await channel.close()
    return reply.blocks


async def pull(worker: WorkerRuntime, source: WorkerRuntime) -> Tally:
    """What a hint, a drain or a prefetch makes a worker do."""
    where = ((source.identity.worker, source.address),)
    return await worker.puller.pull(Job("default", FULL, WHOLE, PREFIX.group(0), tuple(PREFIX.keys), where))


async def put(cluster: MiniCluster, worker: WorkerRuntime) -> KVClient:
    client = await cluster.client(alone=True, workers=(worker.socket,))
    assert (await client.put(FULL, PREFIX, blocks_of(PREFIX))).states == ["committed"] * len(PREFIX)
    return client


@pytest.fixture
async def cluster(tmp_path: Path):
    async with MiniCluster(tmp_path) as made:
        yield made


@pytest.mark.parametrize("what", [{}, {"root": FULL.root}, {"model": FULL.model}], ids=["all", "root", "model"])
async def test_a_purge_is_not_undone_by_who_has_yet_to_do_it(cluster: MiniCluster, what: dict[str, str]) -> None:
    first, second = await cluster.worker("one"), await cluster.worker("two")
    await put(cluster, second)
    assert await purge(cluster, first, **what) == 0  # it has none of them, and knows no such model
    tally = await pull(first, second)
    assert (tally.committed, tally.left) == (0, list(PREFIX.keys))
    assert first.node.counters["pulls_fenced"] == 1
    assert await purge(cluster, second, **what) == len(PREFIX)
    assert (await pull(first, second)).committed == 0 and first.store.blocks("default") == 0
    await put(cluster, second)  # anew: the purge is over
    assert (await pull(first, second)).committed == len(PREFIX)


async def test_a_purge_without_an_id_is_undone(cluster: MiniCluster) -> None:
    """The control: what the fence is for."""
    first, second = await cluster.worker("one"), await cluster.worker("two")
    await put(cluster, second)
    await purge(cluster, first, b"")
    assert (await pull(first, second)).committed == len(PREFIX)
    assert await purge(cluster, second, b"") == len(PREFIX) and first.store.blocks("default") == len(PREFIX)


async def test_what_a_client_puts_after_a_purge_is_kept(cluster: MiniCluster) -> None:
    only = await cluster.worker("one")
    await purge(cluster, only)
    await put(cluster, only)
    assert only.store.blocks("default") == len(PREFIX)


async def test_a_purge_in_the_middle_of_a_copy(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks were read before either worker's purge; they are to be kept after it."""
    first, second = await cluster.worker("one"), await cluster.worker("two")
    await put(cluster, second)
    adoption = first.store.adoption

    def late(*arguments: Any) -> Any:
        made = adoption(*arguments)

        class Late:
            def __enter__(self) -> Any:
                inner = made.__enter__()
                find = inner.make_room

                async def make_room(headers: Any) -> Any:
                    for worker in (first, second):
                        await purge(cluster, worker)
                    return await find(headers)

                inner.make_room = make_room
                return inner

            def __exit__(self, *error: Any) -> Any:
                return made.__exit__(*error)

        return Late()

    monkeypatch.setattr(first.store, "adoption", late)
    assert (await pull(first, second)).committed == 0 and first.store.blocks("default") == 0
    first.store.validate()


# --- in one store -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False])
async def test_a_copy_is_taken_from_who_has_done_the_purge(raw: bool) -> None:
    rig = Rig.make()
    await rig.store.start()
    found = sample(3, codec=2)
    header, data = (found.header.unencoded(), found.raw) if raw else (found.header, found.record)
    rig.store.stack.purges.add(NAMESPACE, Scope(), ONE)
    for purges, state in (((), "refused"), ((TWO,), "refused"), ((TWO, ONE), "committed")):
        with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
            [room] = await adoption.make_room([header])
            assert room is not None
            room[:] = data
            assert adoption.keep(0, purges).state == state, purges
        await rig.settle()
    await rig.close()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_redis_is_not_asked_while_others_may_still_fill_it(when: str) -> None:
    redis = FaultyTier(Tier.REDIS, 64 << 20)
    rig = Rig.make(redis=redis)
    await rig.store.start()
    found = sample(3, codec=2)
    await redis.write(NAMESPACE, found.header, [found.record])
    purges = rig.store.stack.purges
    if when == "before":
        purges.add(NAMESPACE, Scope(rig.spec.root), ONE)
        assert await rig.get(3, redis=True) is None and redis.finds == 0
    else:
        redis.gate = asyncio.Event()
        getting = asyncio.ensure_future(rig.get(3, redis=True))
        await until(rig, lambda: redis.finds > 0)
        purges.add(NAMESPACE, Scope(rig.spec.root), ONE)
        redis.gate.set()
        assert await getting is None
    assert rig.store.counters["redis_loads_fenced"] == 1 and rig.store.blocks(NAMESPACE) == 0
    rig.clock.now += rig.store.config.purge_fence_s
    assert await rig.get(3, redis=True) == rig.raw(3)
    await rig.close()
