"""Many blocks put at once: each ends as it would alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore.header import Header
from kvstore.spec import Shard
from tests.contracts.records import NAMESPACE, header_of
from tests.store_rig import Rig


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
