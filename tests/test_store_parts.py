"""Small parts of the store: the byte budget, questions put together, outlets that open and close."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.budget import Budget
from kvstore.errors import TierDown
from kvstore.store.room import Outlets
from kvstore.store.shared import Finder
from kvstore.types import Tier
from tests.contracts.records import NAMESPACE, sample
from tests.store_fakes import FaultyTier
from tests.store_rig import SMALL, Rig


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class TestBudget:
    async def test_first_come_first_served(self) -> None:
        budget, order = Budget(10), list[int]()

        async def use(number: int, nbytes: int) -> None:
            await budget.take(nbytes)
            order.append(number)

        tasks = [asyncio.ensure_future(use(number, nbytes)) for number, nbytes in enumerate((6, 6, 2, 4))]
        await turns()
        assert order == [0], "a small one must not overtake the one in line"
        budget.give(6)
        await turns()
        assert order == [0, 1, 2] and budget.used == 8
        budget.give(6)
        await asyncio.gather(*tasks)
        budget.give(2)
        budget.give(4)
        assert order == [0, 1, 2, 3] and budget.used == 0

    async def test_one_larger_than_all_passes_alone(self) -> None:
        budget = Budget(10)
        await budget.take(50)
        waiting = asyncio.ensure_future(budget.take(1))
        await turns()
        assert not waiting.done() and not budget.fits(1)
        budget.give(50)
        await waiting
        assert budget.used == 1

    async def test_who_gives_up_takes_nothing(self) -> None:
        budget = Budget(10)
        await budget.take(10)
        first, second = (asyncio.ensure_future(budget.take(5)) for _ in range(2))
        await turns()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        budget.give(10)
        await second
        assert budget.used == 5

    async def test_cancelled_in_the_moment_of_its_turn(self) -> None:
        budget = Budget(10)
        await budget.take(10)
        waiting = asyncio.ensure_future(budget.take(5))
        await turns()
        budget.give(10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert budget.used == 0

    async def test_room_that_comes_as_a_waiter_is_cancelled_goes_to_the_next(self) -> None:
        budget = Budget(10)
        await budget.take(10)
        first, second = (asyncio.create_task(budget.take(10)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        budget.give(10)  # before the cancelled one had its turn
        await asyncio.wait([first])
        await second
        assert first.cancelled() and budget.used == 10
        budget.give(10)
        assert budget.used == 0


class TestFinder:
    async def test_questions_of_one_turn_are_one(self) -> None:
        redis = FaultyTier(Tier.REDIS)
        found = [sample(depth) for depth in range(3)]
        for one in found[:2]:
            await redis.write(NAMESPACE, one.header, [one.record])
        finder = Finder(redis)
        asked = [finder.find(NAMESPACE, one.header.shard, one.header.key) for one in (*found, found[0])]
        answers = await asyncio.gather(*asked, finder.find("other", found[0].header.shard, found[0].header.key))
        assert redis.finds == 2
        assert [answer is not None for answer in answers] == [True, True, False, True, False]
        assert answers[0] is not None and answers[0][0] == found[0].header

    async def test_a_failure_reaches_all_who_asked(self) -> None:
        redis = FaultyTier(Tier.REDIS)
        redis.down = True
        finder = Finder(redis)
        answers = await asyncio.gather(*(finder.find("n", b"s", bytes([i])) for i in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [TierDown] * 3 and redis.landed == 1

    async def test_one_who_gives_up_does_not_take_the_others_along(self) -> None:
        redis = FaultyTier(Tier.REDIS)
        redis.gate = asyncio.Event()
        finder = Finder(redis)
        first, second = (asyncio.ensure_future(finder.find("n", b"s", b"k")) for _ in range(2))
        await turns()
        first.cancel()
        redis.gate.set()
        assert await second is None
        with pytest.raises(asyncio.CancelledError):
            await first

    async def test_closing_ends_who_waits(self) -> None:
        redis = FaultyTier(Tier.REDIS)
        redis.gate = asyncio.Event()
        finder = Finder(redis)
        waiting = asyncio.ensure_future(finder.find("n", b"s", b"k"))
        await turns()
        await finder.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_outlets_close_until_the_heartbeat_and_evict_only_under_lasting_trouble() -> None:
    rig = Rig.make(ssd=FaultyTier(Tier.SSD), redis=FaultyTier(Tier.REDIS))
    outlets = Outlets(rig.store.stack)
    hot, host, ssd, redis = range(4)
    assert outlets.open(host) == [ssd, redis] and outlets.open(hot) == [host, ssd, redis]
    outlets.failed(ssd)
    assert outlets.open(host) == [redis] and not outlets.evicts(host)
    outlets.failed(redis)
    assert outlets.open(host) == [] and not outlets.evicts(host)
    rig.clock.now += SMALL.evict_after_s
    assert outlets.evicts(host) and outlets.evicts(ssd) and not outlets.evicts(hot)
    outlets.heartbeat()
    assert outlets.open(host) == [ssd, redis] and outlets.evicts(host), "tried again, but not trusted yet"
    outlets.worked(redis)
    assert not outlets.evicts(host) and not outlets.evicts(ssd)
    await rig.store.close()
