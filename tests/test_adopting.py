"""Blocks from other workers, received where they stay: seen once they are kept, and no space is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvstore import codecs
from kvstore.codec_rules import CodecRules
from kvstore.header import Header
from kvstore.quotas import Quotas
from kvstore.store.adopting import Adoption
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, sample
from tests.store_rig import KIB, SMALL, Rig


def arriving(depth: int, *, raw: bool, session: int = 0) -> tuple[Header, bytes]:
    """As another worker has it: its header, and its record or raw bytes."""
    found = sample(depth, session=session, codec=codecs.SPLIT)
    return (found.header.unencoded(), found.raw) if raw else (found.header, found.record)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig.make()
    await made.start()
    yield made
    await made.close()


async def fill(adoption: Adoption, *blocks: tuple[Header, bytes]) -> list[memoryview | None]:
    rooms = await adoption.make_room([header for header, _ in blocks])
    for room, (_, data) in zip(rooms, blocks, strict=True):
        if room is not None:
            room[:] = data
    return rooms


@pytest.mark.parametrize("raw", [True, False])
async def test_a_block_is_seen_once_it_is_kept(rig: Rig, raw: bool) -> None:
    blocks = [arriving(depth, raw=raw) for depth in range(3)]
    with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
        await fill(adoption, *blocks)
        assert [await rig.get(depth) for depth in range(3)] == [None] * 3 and not rig.told
        for block in (0, 2):
            outcome = adoption.keep(block, ())
            assert (outcome.state, outcome.seq) == ("committed", rig.store.heads()[NAMESPACE])
    assert [await rig.get(depth) for depth in range(3)] == [rig.raw(0), None, rig.raw(2)]
    assert rig.where(0) == [Tier.HOT if raw else Tier.HOST]
    assert len(rig.told[NAMESPACE]) == 2
    await rig.settle()


async def test_what_is_not_wanted_gets_no_room(rig: Rig) -> None:
    """Held already, of another model, another namespace, too large: said at once, and no space is taken."""
    await rig.put(0)
    used = rig.store.arena.used
    good = arriving(1, raw=True)[0]
    wrong = [
        arriving(0, raw=True)[0],
        replace(good, root=b"\1" * 16),
        replace(good, namespace=b"\1" * 16),
        replace(good, stored=Fidelity.NEAR),
    ]
    with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
        assert await adoption.make_room([*wrong, None]) == [None] * 5
        assert {block: outcome.state for block, outcome in adoption.outcomes.items()} == {
            0: "held",
            1: "refused",
            2: "refused",
            3: "refused",
        }
        assert rig.store.arena.used == used
    await rig.settle()


async def test_below_the_namespaces_least_fidelity_nothing_is_taken() -> None:
    rig = Rig.make(codecs={NAMESPACE: CodecRules()})
    await rig.start()
    lossy = sample(0, codec=codecs.INT8)
    assert lossy.header.fidelity < Fidelity.EXACT
    with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
        assert await adoption.make_room([lossy.header]) == [None]
        assert adoption.outcomes[0].state == "refused" and "nothing below exact" in adoption.outcomes[0].why
    await rig.close()


async def test_two_copies_of_one_block_and_one_that_was_put_meanwhile(rig: Rig) -> None:
    """The first that is kept wins; the space of the others comes back."""
    with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
        await fill(adoption, arriving(0, raw=True), arriving(0, raw=False), arriving(1, raw=True))
        await rig.put(1)
        assert [adoption.keep(block, ()).state for block in range(3)] == ["committed", "held", "held"]
    assert [await rig.get(depth) for depth in range(2)] == [rig.raw(0), rig.raw(1)]
    await rig.settle()


async def test_an_exact_copy_replaces_a_lossy_one(rig: Rig) -> None:
    lossy = sample(0, codec=codecs.INT8)
    for header, data in ((lossy.header, lossy.record), arriving(0, raw=True)):
        with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
            await fill(adoption, (header, data))
            assert adoption.keep(0, ()).state == "committed"
    assert await rig.get(0) == rig.raw(0) and rig.store.counters["replaced"] == 1
    await rig.settle()


async def test_more_than_there_is_room_for_is_dropped_and_nothing_leaks() -> None:
    """Hot's whole pool is spoken for by blocks that nobody may move; what does not fit ends with the wait."""
    rig = Rig.make(config=replace(SMALL, put_wait_s=0.05))
    await rig.start()
    took = rig.store.stack.hot.capacity // len(rig.raw(0))
    blocks = [arriving(depth, raw=True) for depth in range(took + 2)]
    with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
        rooms = await fill(adoption, *blocks)
        assert [room is not None for room in rooms] == [True] * took + [False] * 2
        assert [adoption.outcomes[took + more].state for more in range(2)] == ["dropped"] * 2
        assert {adoption.keep(block, ()).state for block in range(took)} == {"committed"}
    await rig.settle()
    await rig.close()


async def test_over_a_namespaces_rate_or_quota_it_is_dropped() -> None:
    for quota in (Quotas(rate_bytes=1), Quotas(hot_bytes=4 * KIB)):
        rig = Rig.make(config=replace(SMALL, put_wait_s=0.05), quotas={NAMESPACE: quota})
        await rig.start()
        with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
            await adoption.make_room([arriving(depth, raw=True)[0] for depth in range(2)])
            assert adoption.outcomes[1].state == "dropped"
        assert rig.store.stack.quota.dropped[NAMESPACE] >= 1
        await rig.close()


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_whoever_gives_up_leaves_nothing_behind(how: str) -> None:
    """Cancelled while it waits for room, with some in hand; or failed with all of it."""
    rig = Rig.make()
    await rig.start()
    count = rig.store.stack.hot.capacity // len(rig.raw(0)) + (how == "cancelled")
    waiting = asyncio.Event()

    async def adopt() -> None:
        with rig.store.adoption(NAMESPACE, rig.spec, rig.whole) as adoption:
            asyncio.get_running_loop().call_soon(waiting.set)
            await adoption.make_room([arriving(depth, raw=True)[0] for depth in range(count)])
            raise ConnectionError

    task = asyncio.create_task(adopt())
    await waiting.wait()
    if how == "cancelled":
        task.cancel()
    with pytest.raises(asyncio.CancelledError if how == "cancelled" else ConnectionError):
        await task
    assert not rig.store.adopting.busy and rig.store.stack.hot.used == 0
    await rig.close()
