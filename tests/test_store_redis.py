"""The store beside Redis: what leaves goes there, what is asked for comes back, whatever is wrong with it is a miss."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore.directory.runs import Added, Removed
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, sample, small_spec
from tests.store_fakes import FaultyTier
from tests.store_rig import MANY, Rig, filled, until


@pytest.fixture
def ssd() -> FaultyTier:
    return FaultyTier(Tier.SSD, 4 << 20)


@pytest.fixture
def redis() -> FaultyTier:
    return FaultyTier(Tier.REDIS, 64 << 20)


@pytest.fixture
async def both(ssd: FaultyTier, redis: FaultyTier) -> AsyncIterator[Rig]:
    rig = Rig.make(ssd=ssd, redis=redis)
    await rig.store.start()
    yield rig
    await rig.close()


class TestRedis:
    async def test_what_leaves_the_last_local_tier_goes_to_redis(self, redis: FaultyTier) -> None:
        rig = Rig.make(redis=redis)
        await rig.store.start()
        await rig.put_all(MANY)
        await rig.settle()
        away = [depth for depth in range(MANY) if not rig.where(depth)]
        assert {header.depth for _, header, _ in redis.kept.values()} == set(away) and away
        last = {change.key: change for _, change in rig.told[NAMESPACE]}
        assert all(isinstance(last[rig.key(depth)], Removed) for depth in away)

        assert await rig.get(away[0]) is None
        assert await rig.get(away[0], redis=True) == rig.raw(away[0])
        change = rig.told[NAMESPACE][-1][1]
        assert rig.where(away[0]) and isinstance(change, Added) and change.key == rig.key(away[0])
        assert {stats.tier: stats.hits for stats in rig.store.stats()}[Tier.REDIS] == 1
        await rig.close()

    async def test_redis_is_asked_once_for_many(self, redis: FaultyTier) -> None:
        rig = Rig.make(redis=redis)
        await rig.store.start()
        await rig.put_all(MANY)
        await rig.settle()
        away = [depth for depth in range(MANY) if not rig.where(depth)][:8]
        redis.asked.clear()
        hold = await rig.open([*away, 10_000], redis=True)
        assert [placed is not None for placed in hold.blocks] == [True] * len(away) + [False]
        wanted = {rig.key(depth) for depth in [*away, 10_000]}
        questions = [asked for asked in redis.asked if wanted.intersection(asked)]  # moves ask for what they move
        assert len(questions) == 1 and wanted <= set(questions[0])
        rig.store.release(hold.id)
        await rig.close()

    async def test_what_redis_has_is_not_sent_again(self, redis: FaultyTier) -> None:
        rig = Rig.make(redis=redis)
        await rig.store.start()
        await rig.put_all(MANY)
        await rig.settle()
        away = [depth for depth in range(MANY) if not rig.where(depth)]
        writes = redis.writes
        for depth in away:
            assert (await rig.get(depth, redis=True)) == rig.raw(depth)
        for depth in range(MANY):
            await rig.get(depth)
        await rig.settle()
        names = [(header.shard, header.key) for _, header, _ in redis.kept.values()]
        assert len(names) == len(set(names)) and redis.writes - writes == len(names) - writes
        await rig.close()

    async def test_redis_takes_over_while_ssd_is_down(self, both: Rig, ssd: FaultyTier, redis: FaultyTier) -> None:
        ssd.down = True
        await both.put_all(MANY)
        await both.settle()
        assert ssd.landed > 0 and not ssd.kept and redis.kept
        for depth in range(MANY):
            assert await both.get(depth, redis=True) == both.raw(depth)

    async def test_what_redis_gives_for_a_copy_on_a_disk_that_is_down_is_counted_as_its_successor(
        self, redis: FaultyTier
    ) -> None:
        """Another worker left the same block to Redis: here it goes and comes, for a reason that is told."""
        other = Rig.make(redis=redis)
        await other.store.start()
        await other.put_all(MANY)
        await other.settle()
        await other.close()
        ssd = FaultyTier(Tier.SSD, 1 << 30)
        rig = Rig.make(ssd=ssd, redis=redis)
        await rig.store.start()
        await rig.put_all(MANY)
        await rig.settle()
        shared = {header.key for _, header, _ in redis.kept.values()}
        there = [depth for depth in range(MANY) if rig.key(depth) in shared and rig.where(depth) == [Tier.SSD]]
        assert there
        ssd.down = True
        assert await rig.get(there[0], redis=True) == rig.raw(there[0])
        assert rig.store.counters["replaced"] == 1
        assert rig.where(there[0]) == [Tier.HOST]
        await rig.close()

    async def test_a_disk_that_does_not_give_is_no_fault_of_redis(self, redis: FaultyTier) -> None:
        """Blocks on their way from SSD to Redis can't be read: they stay, and Redis still takes others."""
        ssd = FaultyTier(Tier.SSD, 256 << 10)
        rig = Rig.make(ssd=ssd, redis=redis)
        await rig.store.start()
        await rig.put_all(90)
        await rig.settle()
        ssd.down = True
        kept = redis.writes
        for depth in range(90, MANY):
            await rig.put(depth)
        await rig.settle()
        assert ssd.landed > 0 and redis.writes > kept, "what could not go to SSD should have gone to Redis"
        assert not rig.store.movement.outlets.evicts(rig.store.stack.HOST)
        ssd.down = False
        await rig.store.tick()
        await rig.settle()
        for depth in range(90):
            assert await rig.get(depth, redis=True) == rig.raw(depth)
        await rig.close()

    async def test_all_of_it_down_keeps_memory_serving(self, both: Rig, ssd: FaultyTier, redis: FaultyTier) -> None:
        ssd.down = redis.down = True
        states = [(await both.put(depth)).state for depth in range(MANY)]
        kept = [depth for depth, state in enumerate(states) if state == "committed"]
        assert [await both.get(depth, redis=True) for depth in kept] == [both.raw(depth) for depth in kept]
        assert ssd.landed > 0 and redis.landed > 0 and await both.get(10_000, redis=True) is None

    async def test_a_damaged_ssd_copy_is_looked_for_in_redis(
        self, both: Rig, ssd: FaultyTier, redis: FaultyTier
    ) -> None:
        below = await filled(both)
        found = next(header for _, header, _ in ssd.kept.values() if header.depth == below[0])
        record = next(record for _, header, record in ssd.kept.values() if header == found)
        await redis.write(NAMESPACE, found, [record])
        ssd.damage = "flip"
        assert await both.get(below[0], redis=True) == both.raw(below[0])
        assert ssd.landed == 1 and both.where(below[0])[-1] == Tier.HOST

    async def test_a_purge_meets_a_move_to_redis(self, redis: FaultyTier) -> None:
        """In the question and in the sending: what was purged is not in Redis afterwards."""
        rig = Rig.make(redis=redis)
        await rig.store.start()
        redis.gate = asyncio.Event()
        for depth in range(60):
            await rig.put(depth)
        assert redis.finds > 0 and not redis.used
        rig.store.purge(NAMESPACE)
        redis.gate.set()
        await rig.settle()
        assert not redis.kept

        redis.gate, redis.slow_finds = asyncio.Event(), False
        for depth in range(60):
            await rig.put(depth)
        await until(rig, lambda: redis.used > 0)
        rig.store.purge(NAMESPACE)
        redis.gate.set()
        await rig.settle()
        assert not redis.kept and redis.frees > 0
        await rig.close()

    @pytest.mark.parametrize("damage", ["flip", "other", "corrupt", "shorten"])
    async def test_a_forged_value_is_a_miss(self, redis: FaultyTier, damage: str) -> None:
        rig = Rig.make(redis=redis)
        await rig.store.start()
        found = sample(3, codec=2)
        await redis.write(NAMESPACE, found.header, [found.record])
        redis.damage = damage
        assert await rig.get(3, redis=True) is None and redis.landed == 1
        redis.damage = ""
        assert await rig.get(3, redis=True) == rig.raw(3)
        assert rig.store.match(NAMESPACE, rig.spec.root, [rig.key(3)], [rig.whole], Fidelity.EXACT).blocks == 0
        await rig.close()

    async def test_an_entry_of_another_block_is_refused(self, redis: FaultyTier) -> None:
        """The index answers with somebody else's record: header, checksums and all, but not what was asked for."""

        class Lying(FaultyTier):
            async def find_many(self, namespace, wanted):  # type: ignore[no-untyped-def]
                entry = await super().find_many(namespace, [(other.header.shard, other.header.key)])
                return entry * len(wanted)

        other, lying = sample(7), Lying(Tier.REDIS)
        rig = Rig.make(redis=lying)
        await rig.store.start()
        await lying.write(NAMESPACE, other.header, [other.record])
        assert await rig.get(3, redis=True) is None
        assert rig.store.counters["redis_hints_failed"] == 1
        await rig.close()

    async def test_purge_reaches_redis(self, both: Rig, redis: FaultyTier) -> None:
        found = sample(0)
        await redis.write(NAMESPACE, found.header, [found.record])
        await redis.write("other", sample(0, namespace="other").header, [found.record])
        assert await both.store.purge_shared(NAMESPACE) == 1 and len(redis.kept) == 1
        assert await both.store.purge_shared(NAMESPACE, small_spec().root) == 0
