"""The parts of the client that need no server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.client.host_link import Space, Staging
from kvstore.client.kv_client import delivered_blocks
from kvstore.client.links import Pooled
from kvstore.client.plan import HitPlan, PlanRun, ways
from kvstore.client.put_blocks import Tokens
from kvstore.client.writes import Item, Stored, put_local
from kvstore.directory.matching import make_plan
from kvstore.errors import Overloaded, Unavailable
from kvstore.machine.system import real_system
from kvstore.recent import Recent
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import CommitToken, Fidelity, Tier
from kvstore.wire import worker_pb2
from tests.service_helpers import FULL

WHOLE = Shard.whole(FULL)


class HandClock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return 0


def test_recent_forgets_by_time_and_by_bound() -> None:
    clock = HandClock()
    recent: Recent[str] = Recent(clock, 5.0, 3)
    for name in "abcd":
        recent.add(name)
    assert [name for name in "abcd" if name in recent] == ["b", "c", "d"]
    recent.discard("c")
    clock.now = 4.0
    recent.add("b")
    clock.now = 6.0
    assert [name for name in "abcd" if name in recent] == ["b"]


def test_tokens_keep_the_latest_of_sixteen_lives_until_applied_or_expired() -> None:
    clock = HandClock()
    tokens = Tokens(replace(real_system(1), clock=clock))
    tokens.add(CommitToken(f"w{index}", 1, 1) for index in range(20))
    assert [token.worker for token in tokens.pending()] == [f"w{index}" for index in range(4, 20)]
    tokens.add([CommitToken("w9", 1, 5), CommitToken("w9", 1, 3)])
    shown = tokens.pending()
    assert CommitToken("w9", 1, 5) in shown and len(shown) == 16
    tokens.add([CommitToken("w8", 1, 7)])  # while the answer is on its way
    tokens.applied(shown, [CommitToken("w9", 1, 5)])
    assert tokens.pending() == [CommitToken("w9", 1, 5), CommitToken("w8", 1, 7)]
    clock.now = 60.0
    assert tokens.pending() == []


def test_ways_prefer_the_shard_itself_then_one_around_it_then_a_union() -> None:
    need = Shard(0, 0, 2, 0, 2)
    left, right, low, high = Shard(0, 0, 2, 0, 1), Shard(0, 0, 2, 1, 1), Shard(0, 0, 1, 0, 4), Shard(0, 1, 1, 0, 4)
    stored = [left, low, right, WHOLE, need, high]
    cover = make_plan(FULL, [need], stored).covers[0]

    def best(*lost: Shard) -> list[Shard]:
        return ways(need, stored, cover, lambda shard: shard not in lost)

    assert best() == [need]
    assert best(need) == [WHOLE]
    for lost in ((need, WHOLE), (need, WHOLE, left), (need, WHOLE, low)):
        chosen = best(*lost)
        cells = {(x, y) for s in chosen for x in range(s.layer_first, s.layer_first + s.layer_count)
                 for y in range(s.head_first, s.head_first + s.head_count)}  # fmt: skip
        assert {(0, 0), (0, 1), (1, 0), (1, 1)} <= cells and not set(lost) & set(chosen)
    assert best(need, WHOLE, left, low) == []


def test_delivered_blocks_follow_each_groups_rule() -> None:
    spec = ModelSpec("m", (Group(k_dim=2, v_dim=2), Group("state", page_bytes=8)), dtype="float32", block_tokens=4)
    shards = (Shard.whole(spec, 0), Shard.whole(spec, 1))
    plan = HitPlan(spec, tuple(bytes([i]) * 16 for i in range(4)), shards)
    hot = Tier.HOT
    assert delivered_blocks(plan, [[hot] * 4, [None, None, None, hot]]) == 4
    assert delivered_blocks(plan, [[hot] * 4, [None] * 4]) == 0
    assert delivered_blocks(plan, [[hot, hot, None, hot], [None, hot, None, hot]]) == 2
    assert delivered_blocks(plan, [[hot, None, hot, hot], [None, hot, None, hot]]) == 0


def test_a_shortened_plan_keeps_only_what_is_left() -> None:
    run = PlanRun("w", WHOLE, Tier.HOT, Fidelity.EXACT, 1, 4, 400)
    plan = HitPlan(
        FULL, tuple(bytes([i]) * 16 for i in range(5)), (WHOLE,), runs=(run, replace(run, first_depth=4, count=1))
    )
    short = plan.shortened(3)
    assert short.blocks == 3 and short.runs == (replace(run, count=2, stored_bytes=200),)
    assert plan.shortened(5) is plan and plan.shortened(0).runs == ()


async def test_staging_is_given_out_in_turn_and_comes_back_whole() -> None:
    class Memory:
        view = memoryview(bytearray(100))

        def close(self) -> None: ...

    staging = Staging(1, Memory(), 100)
    first, second = await staging.take(40), await staging.take(40)
    third = asyncio.ensure_future(staging.take(60))
    fourth = asyncio.ensure_future(staging.take(10))
    await asyncio.sleep(0)
    staging.give_back(first)
    await asyncio.sleep(0)
    assert not third.done() and not fourth.done()  # 40 and 20 bytes are free, but not 60 in one piece
    staging.give_back(second)
    assert (await third).offset == 0 and (await fourth).offset == 60
    staging.give_back(await third)
    staging.give_back(await fourth)
    assert (await staging.take(100)).offset == 0


async def test_connections_are_opened_once_bounded_and_replaced() -> None:
    system = real_system(1)
    opened: list[str] = []
    closed: list[str] = []

    class Connection:
        broken = False

        def __init__(self, address: str) -> None:
            self.address = address

        async def close(self) -> None:
            closed.append(self.address)

    async def open_(address: str) -> Connection:
        opened.append(address)
        await asyncio.sleep(0)
        if address == "dead":
            raise Unavailable("nobody there")
        return Connection(address)

    pooled: Pooled[Connection] = Pooled(system, open_, 2, lambda connection: connection.broken)

    async def use(address: str) -> Connection:
        async with pooled.use(address) as connection:
            return connection

    same = await asyncio.gather(use("a"), use("a"), use("a"))
    assert opened == ["a"] and len(set(map(id, same))) == 1
    async with pooled.use("a"), pooled.use("b"):
        with pytest.raises(Overloaded):
            await use("c")
    await use("c")
    assert opened == ["a", "b", "c"]
    for _ in range(3):
        with pytest.raises(Unavailable):
            await use("dead")
    assert opened.count("dead") == 1  # remembered for a while
    (await use("c")).broken = True
    assert (await use("c")).broken is False and opened[-1] == "c"
    await pooled.close()
    assert sorted(closed) == ["a", "b", "c", "c"]
    system.pool.close()


class StagingLink:
    """Of `HostLink`, what a put through staging needs. The worker answers once `gate` is set."""

    def __init__(self, nbytes: int) -> None:
        self.memory, self.at, self.commits = memoryview(bytearray(nbytes)), 0, list[int]()
        self.gate = asyncio.Event()

    async def staging(self, nbytes: int, *, timeout_s: float) -> Any:
        return SimpleNamespace(nbytes=len(self.memory), segment=1)

    @asynccontextmanager
    async def space(self, staging: Any, nbytes: int) -> AsyncIterator[Space]:
        at, self.at = self.at, self.at + nbytes
        yield Space(1, at, self.memory[at : at + nbytes])

    async def commit(self, request: worker_pb2.CommitRequest, *, timeout_s: float) -> worker_pb2.PutReply:
        for block in request.blocks:
            assert self.memory[block.offset : block.offset + block.raw_bytes] == bytes([block.depth]) * block.raw_bytes
        self.commits.append(len(request.blocks))
        await self.gate.wait()
        return worker_pb2.PutReply(states=[worker_pb2.BLOCK_COMMITTED] * len(request.blocks))


async def test_a_part_is_committed_as_soon_as_it_is_copied_and_the_next_copied_before_it_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that are no whole number of slices, read-only sources, parts of three blocks."""
    size, key, pool = 5000, bytes(16), real_system().pool
    monkeypatch.setattr("kvstore.client.writes.PART_BYTES", 3 * size)
    monkeypatch.setattr("kvstore.client.slices.SLICE_BYTES", 1234)
    monkeypatch.setattr("kvstore.client.slices.MOVED_BYTES", 2 * size)
    items = [Item(key, key, key, depth, memoryview(bytes([depth]) * size)) for depth in range(8)]
    link: Any = StagingLink(4 * 3 * size)
    stored = Stored(FULL, WHOLE, Fidelity.EXACT)
    putting = asyncio.create_task(put_local(link, pool, stored, items, staging_bytes=1, timeout_s=1.0))
    async with asyncio.timeout(60):
        while link.commits != [3, 3, 2]:
            await asyncio.sleep(0)
        assert not putting.done()
        link.gate.set()
        await putting
    assert {item.state for item in items} == {"committed"}
    pool.close()
