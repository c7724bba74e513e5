"""Many blocks put at once: each ends as it would alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvstore.header import Header
from kvstore.quotas import Quotas
from kvstore.spec import Shard
from kvstore.store.putting import OVER_RATE
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, header_of
from tests.store_rig import KIB, Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig.make()
    yield made
    await made.close()


def offer(rig: Rig, depth: int, data: bytes | None = None) -> tuple[Shard, Header, memoryview]:
    raw = rig.raw(depth)
    return rig.whole, header_of(NAMESPACE, rig.spec, rig.whole, 0, depth, raw), memoryview(data or raw)


async def test_each_of_many_put_at_once_ends_as_it_would_alone(rig: Rig) -> None:
    """New ones, one that is held, one twice, one that is refused, one whose bytes are not what it says."""
    await rig.put(1)
    wrong = bytes(len(rig.raw(4)))
    offers = [offer(rig, 0), offer(rig, 1), offer(rig, 2), offer(rig, 0)]
    offers += [offer(rig, 3, b"short"), offer(rig, 4, wrong), offer(rig, 5)]
    outcomes = await rig.store.put_all(NAMESPACE, rig.spec, offers)
    states = [outcome.state for outcome in outcomes]
    assert states == ["committed", "held", "committed", "held", "refused", "refused", "committed"]
    assert outcomes[3].seq == max(outcome.seq for outcome in outcomes) == len(rig.told[NAMESPACE])
    for depth in (0, 1, 2, 5):
        assert await rig.get(depth) == rig.raw(depth)
    assert await rig.get(4) is None and await rig.store.put_all(NAMESPACE, rig.spec, []) == []
    assert not rig.store.putting.busy
    rig.store.validate()


async def test_of_many_put_at_once_those_without_room_are_dropped(rig: Rig) -> None:
    holds = []
    for depth in range(16):
        await rig.put(depth)
        holds.append(await rig.open([depth]))
    outcomes = await rig.store.put_all(NAMESPACE, rig.spec, [offer(rig, depth) for depth in range(15, 19)])
    assert [outcome.state for outcome in outcomes] == ["held"] + ["dropped"] * 3
    for hold in holds:
        rig.store.release(hold.id)
    rig.store.validate()


async def test_many_puts_given_up_leave_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def given_up(jobs: object) -> list[int]:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(rig.store.putting.copier, "copy_all", given_up)
        with pytest.raises(asyncio.CancelledError):
            await rig.store.put_all(NAMESPACE, rig.spec, [offer(rig, depth) for depth in range(3)])
    assert rig.store.stack.hot.used == 0 and not rig.store.putting.busy
    rig.store.validate()
    assert (await rig.put(0)).state == "committed"


async def test_of_many_put_at_once_those_over_the_rate_are_dropped_and_their_places_free() -> None:
    rig = Rig.make(quotas={NAMESPACE: Quotas(rate_bytes=16 * KIB)})
    outcomes = await rig.store.put_all(NAMESPACE, rig.spec, [offer(rig, depth) for depth in range(4)])
    states = [outcome.state for outcome in outcomes]
    assert states == ["committed"] * 2 + ["dropped"] * 2, "a second's worth passes, and what is asked while any is left"
    assert {outcome.why for outcome in outcomes[2:]} == {OVER_RATE} and rig.store.use(NAMESPACE).dropped == 2
    assert rig.store.stack.hot.used == 2 * 8 * KIB
    rig.store.validate()
    await rig.close()


async def test_of_many_put_at_once_those_over_the_quota_push_out_their_own() -> None:
    rig = Rig.make(quotas={NAMESPACE: Quotas(hot_bytes=32 * KIB)})
    for first in (0, 3, 6):  # within the quota at once, then not
        outcomes = await rig.store.put_all(
            NAMESPACE, rig.spec, [offer(rig, depth) for depth in range(first, first + 3)]
        )
        assert [outcome.state for outcome in outcomes] == ["committed"] * 3
    await rig.settle()
    assert rig.store.use(NAMESPACE).tiers[Tier.HOT] <= 32 * KIB
    await rig.close()


async def test_better_ones_replace_worse_and_two_shards_go_together(rig: Rig) -> None:
    """A block of every outcome that one commit of two shards can have, in any order of shards."""
    half = Shard(0, 0, rig.whole.layer_count, 0, rig.whole.head_count // 2)
    await rig.put(0, fidelity=Fidelity.NEAR)
    offers = []
    for depth in range(3):
        raw = rig.raw(depth, shard=half)
        offers += [offer(rig, depth), (half, header_of(NAMESPACE, rig.spec, half, 0, depth, raw), memoryview(raw))]
    outcomes = await rig.store.put_all(NAMESPACE, rig.spec, offers)
    assert [outcome.state for outcome in outcomes] == ["committed"] * 6 and rig.store.counters["replaced"] == 1
    assert rig.store.counters["puts_committed"] == 7 and len({outcome.seq for outcome in outcomes}) == 1
    for depth in range(3):
        assert await rig.get(depth) == rig.raw(depth) and await rig.get(depth, shard=half) == rig.raw(depth, shard=half)
    await rig.settle()


async def test_a_put_given_up_while_it_is_copied_leaves_nothing_and_lets_the_next_one_in(rig: Rig) -> None:
    """Cancelled with its blocks half copied: it ends when nobody writes any more, and who waited for it puts them."""
    copier, gate = rig.store.putting.copier, asyncio.Event()

    class Slow:
        async def run(self, function: Callable[..., Any], *args: object) -> Any:
            await gate.wait()
            return function(*args)

        def close(self) -> None: ...

    fast, copier._pool = copier._pool, Slow()
    first = asyncio.create_task(rig.store.put_all(NAMESPACE, rig.spec, [offer(rig, depth) for depth in range(4)]))
    await asyncio.sleep(0)
    second = asyncio.create_task(rig.store.put_all(NAMESPACE, rig.spec, [offer(rig, depth) for depth in range(2, 4)]))
    await asyncio.sleep(0)
    first.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not first.done() and not second.done(), "its memory is still written to"
    assert await rig.get(0) is None, "nothing is visible before its bytes are there"
    copier._pool = fast
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    async with asyncio.timeout(10):
        assert [outcome.state for outcome in await second] == ["committed"] * 2
    assert [await rig.get(depth) for depth in range(2)] == [None, None]
    assert rig.store.stack.hot.used == 2 * 8 * KIB and not rig.store.putting.busy
    await rig.settle()
