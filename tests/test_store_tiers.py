"""The store over an SSD tier: spill, single-flight loads, recovery; the tier failing in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvstore.directory.runs import Removed
from kvstore.errors import SetupError
from kvstore.tiers.base import Recovered
from kvstore.types import Location, Tier
from tests.contracts.records import NAMESPACE, sample
from tests.store_fakes import FaultyTier
from tests.store_rig import KIB, MANY, SMALL, Rig, filled, until


@pytest.fixture
def ssd() -> FaultyTier:
    return FaultyTier(Tier.SSD, 4 << 20)


@pytest.fixture
def redis() -> FaultyTier:
    return FaultyTier(Tier.REDIS, 64 << 20)


@pytest.fixture
async def rig(ssd: FaultyTier) -> AsyncIterator[Rig]:
    rig = Rig.make(ssd=ssd)
    await rig.store.start()
    yield rig
    await rig.close()


@pytest.fixture
async def both(ssd: FaultyTier, redis: FaultyTier) -> AsyncIterator[Rig]:
    rig = Rig.make(ssd=ssd, redis=redis)
    await rig.store.start()
    yield rig
    await rig.close()


class TestSsd:
    async def test_nothing_is_lost_on_the_way_down_and_up(self, rig: Rig, ssd: FaultyTier) -> None:
        await filled(rig)
        assert [await rig.get(depth) for depth in range(MANY)] == [rig.raw(depth) for depth in range(MANY)]
        hits = {stats.tier: stats.hits for stats in rig.store.stats()}
        assert hits[Tier.SSD] > 0 and sum(hits.values()) == MANY

    async def test_records_move_down_unchanged(self, rig: Rig, ssd: FaultyTier) -> None:
        await filled(rig)
        [codec] = set(rig.store.stack.codecs(NAMESPACE, rig.spec, rig.whole))
        for _, header, record in ssd.kept.values():
            assert record == sample(header.depth, codec=codec).record

    async def test_one_load_for_all_who_ask(self, rig: Rig, ssd: FaultyTier) -> None:
        below = await filled(rig)
        ssd.gate = asyncio.Event()
        asking = [asyncio.ensure_future(rig.open([below[0]])) for _ in range(8)]
        await until(rig, lambda: ssd.reads == 1)
        ssd.gate.set()
        holds = await asyncio.gather(*asking)
        assert ssd.reads == 1
        for hold in holds:
            assert hold.blocks[0] is not None and rig.read(hold.blocks[0]) == rig.raw(below[0])
            assert hold.blocks[0].tier == Tier.SSD
            rig.store.release(hold.id)
        assert {stats.tier: stats.hits for stats in rig.store.stats()}[Tier.SSD] == 8

    async def test_one_promotion_for_all_who_open(self, rig: Rig) -> None:
        await filled(rig)
        await rig.settle()
        below = next(depth for depth in range(MANY) if rig.where(depth) == [Tier.HOST])
        holds = await asyncio.gather(*(rig.open([below]) for _ in range(6)))
        await rig.settle()
        assert rig.store.counters["promotions"] == 1 and rig.where(below) == [Tier.HOT, Tier.HOST]
        for hold in holds:
            rig.store.release(hold.id)

    async def test_who_gives_up_waiting_leaves_nothing_pinned(self, rig: Rig, ssd: FaultyTier) -> None:
        below = await filled(rig)
        ssd.gate = asyncio.Event()
        asking = [asyncio.ensure_future(rig.open(below[:3])) for _ in range(3)]
        await until(rig, lambda: ssd.reads == 3)
        asking[0].cancel()
        await asyncio.gather(asking[0], return_exceptions=True)
        ssd.gate.set()
        for hold in await asyncio.gather(*asking[1:]):
            assert None not in hold.blocks
            rig.store.release(hold.id)
        asking = [asyncio.ensure_future(rig.open(below[3:5]))]
        await asyncio.sleep(0)
        asking[0].cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await rig.settle()
        assert len(rig.store.opening.holds) == 0 and not any(rig.store.stack.residency.rows.pins)

    async def test_loads_stay_within_their_bytes(self, ssd: FaultyTier) -> None:
        rig = Rig.make(config=replace(SMALL, load_queue_bytes=15 * KIB), ssd=ssd)
        await rig.store.start()
        below = await filled(rig)
        ssd.gate, before = asyncio.Event(), ssd.reads
        asking = asyncio.ensure_future(rig.open(below[:6]))
        await until(rig, lambda: ssd.reads - before == 2)
        for _ in range(50):
            await asyncio.sleep(0)
        assert ssd.reads - before == 2, "more bytes are being loaded than load_queue_bytes"
        ssd.gate.set()
        hold = await asking
        assert None not in hold.blocks
        rig.store.release(hold.id)
        await rig.close()

    async def test_more_than_fits_is_a_shorter_hit(self, rig: Rig) -> None:
        below = await filled(rig, 200)
        hold = await rig.open(below)
        found = [placed is not None for placed in hold.blocks]
        assert 10 < sum(found) < len(below)
        for depth, placed in zip(below, hold.blocks, strict=True):
            assert placed is None or rig.read(placed) == rig.raw(depth)
        rig.store.release(hold.id)

    async def test_recovered_blocks_are_announced_and_served(self, rig: Rig, ssd: FaultyTier) -> None:
        below = await filled(rig)
        again = FaultyTier(Tier.SSD, 4 << 20)
        again.kept, again.used, again._next = dict(ssd.kept), ssd.used, ssd._next
        again.recovered = [
            Recovered(name, header, Location(at, 0, len(record))) for at, (name, header, record) in ssd.kept.items()
        ][::-1]
        later = Rig.make(ssd=again)
        later.catalog.learn_spec(rig.spec)
        later.catalog.learn_shard(rig.whole)
        await later.start()
        later.check()
        assert later.store.blocks(NAMESPACE) == len(again.kept) >= len(below)
        first = below[0]
        assert await later.get(first) == rig.raw(first)
        assert later.where(first)[-1] == Tier.SSD
        await later.close()

    async def test_a_tier_that_can_not_start_leaves_nothing_open(self, no_leaks: None) -> None:
        class Unusable(FaultyTier):
            async def start(self) -> list[Recovered]:
                raise SetupError("folder is not writable; name another")

        rig = Rig.make(ssd=Unusable(Tier.SSD))
        with pytest.raises(SetupError, match="not writable"):
            await rig.store.start()


class TestSsdFails:
    @pytest.mark.parametrize("damage", ["flip", "other", "corrupt", "shorten"])
    async def test_damaged_records_are_misses_and_given_up(self, rig: Rig, ssd: FaultyTier, damage: str) -> None:
        below = await filled(rig)
        ssd.damage = damage
        found = [await rig.get(depth) for depth in below[:5]]
        assert ssd.landed == 5, "no fault landed"
        assert found == [None] * 5 and rig.store.counters["corrupt"] == 5
        removed = {change.key for _, change in rig.told[NAMESPACE] if isinstance(change, Removed)}
        assert {rig.key(depth) for depth in below[:5]} <= removed
        ssd.damage = ""
        assert (await rig.put(below[0])).state == "committed"
        assert await rig.get(below[0]) == rig.raw(below[0])

    async def test_down_is_a_miss_that_loses_nothing(self, rig: Rig, ssd: FaultyTier) -> None:
        below = await filled(rig)
        ssd.down = True
        assert await rig.get(below[0]) is None and ssd.landed == 1
        ssd.down = False
        assert await rig.get(below[0]) == rig.raw(below[0])

    async def test_blocks_stay_where_they_were_while_it_is_down(self, rig: Rig, ssd: FaultyTier) -> None:
        """Nothing committed is lost, puts are dropped once memory is full; all goes on when it is back."""
        ssd.down = True
        states = [(await rig.put(depth)).state for depth in range(MANY)]
        kept = [depth for depth, state in enumerate(states) if state == "committed"]
        assert ssd.landed > 0 and states.count("dropped") > 0 and len(kept) > 50
        assert [await rig.get(depth) for depth in kept] == [rig.raw(depth) for depth in kept]
        assert "evicted" not in rig.store.counters
        await rig.settle()
        ssd.down = False
        await rig.store.tick()
        await rig.settle()
        assert ssd.writes > 0
        for depth in range(MANY):
            if states[depth] == "dropped":
                assert (await rig.put(depth)).state == "committed"
        assert [await rig.get(depth) for depth in range(MANY)] == [rig.raw(depth) for depth in range(MANY)]

    async def test_when_nothing_works_for_long_blocks_are_evicted_on_purpose(self, rig: Rig, ssd: FaultyTier) -> None:
        ssd.down = True
        for depth in range(MANY):
            await rig.put(depth, session=1)
        await rig.settle()
        assert ssd.landed > 0, "no move met the fault"
        rig.clock.now += SMALL.evict_after_s + 1
        states = []
        for depth in range(20):
            states.append((await rig.put(depth, session=2)).state)
            await rig.store.tick()
        assert states.count("committed") > 15 and rig.store.counters["evicted"] > 0
        for depth in range(MANY):
            assert await rig.get(depth, session=1) in (None, rig.raw(depth, session=1))

    async def test_an_error_nobody_foresaw_leaves_the_block_and_is_not_repeated_at_once(
        self, rig: Rig, ssd: FaultyTier
    ) -> None:
        """A bug in a tier: counted and told to the loop's handler, tried again at the heartbeat only."""
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
        ssd.bug = ValueError("a bug")
        for depth in range(64):
            await rig.put(depth)
        await rig.settle()
        assert told and len(told) < 64 and set(map(type, told)) == {ValueError}
        assert rig.store.counters["moves_crashed"] == len(told) == ssd.landed
        ssd.bug = None
        await rig.store.tick()
        await rig.settle()
        assert ssd.writes > 0

    async def test_full_waits_for_room_below(self, ssd: FaultyTier) -> None:
        """The last tier is full: it evicts for what comes, oldest chains first, and nothing hangs."""
        ssd.capacity = 256 * KIB
        rig = Rig.make(ssd=ssd)
        await rig.store.start()
        for session in range(40):
            for depth in range(5):
                assert (await rig.put(depth, session)).state == "committed"
        await rig.settle()
        assert rig.store.counters["evicted"] > 0 and ssd.used <= ssd.capacity
        for session in range(40):
            for depth in range(5):
                assert await rig.get(depth, session) in (None, rig.raw(depth, session))
        assert await rig.get(4, 39) == rig.raw(4, 39)
        await rig.close()

    async def test_a_medium_that_says_full_is_left_alone_until_the_heartbeat(self, rig: Rig, ssd: FaultyTier) -> None:
        ssd.full = True
        for depth in range(70):
            await rig.put(depth)
        await rig.settle()
        landed = ssd.landed
        assert landed > 0
        for depth in range(70, 80):
            await rig.put(depth)
        assert ssd.landed <= landed + 10
        ssd.full = False
        await rig.store.tick()
        await rig.settle()
        assert ssd.writes > 0

    async def test_probe_names_what_is_wrong(self, both: Rig, ssd: FaultyTier, redis: FaultyTier) -> None:
        ssd.full = redis.down = True
        outcomes = {outcome.tier: outcome for outcome in await both.store.probe(NAMESPACE)}
        assert outcomes[Tier.HOT].ok and outcomes[Tier.HOST].ok
        assert not outcomes[Tier.SSD].ok and "no space" in outcomes[Tier.SSD].detail
        assert "ssd_bytes" in outcomes[Tier.SSD].fix
        assert not outcomes[Tier.REDIS].ok and "Redis" in outcomes[Tier.REDIS].fix
        assert ssd.landed == redis.landed == 1
        ssd.full = redis.down = False
        assert all(outcome.ok for outcome in await both.store.probe(NAMESPACE))
        ssd.damage = "flip"
        wrong = {outcome.tier: outcome for outcome in await both.store.probe(NAMESPACE)}
        assert not wrong[Tier.SSD].ok and "not what was written" in wrong[Tier.SSD].detail
        assert ssd.landed == 2
        ssd.damage = ""
        assert not ssd.kept and not redis.kept


class TestInFlight:
    async def test_a_purge_meets_a_move(self, rig: Rig, ssd: FaultyTier) -> None:
        ssd.gate = asyncio.Event()
        depth = 0
        while not ssd.used:
            assert (await rig.put(depth)).state == "committed"
            depth += 1
            await asyncio.sleep(0)
        assert rig.store.purge(NAMESPACE) == depth
        assert (await rig.put(0)).state == "committed"
        ssd.gate.set()
        await rig.settle()
        assert not ssd.kept and await rig.get(0) == rig.raw(0) and rig.store.blocks(NAMESPACE) == 1

    async def test_a_purge_meets_a_load(self, rig: Rig, ssd: FaultyTier) -> None:
        below = await filled(rig)
        ssd.gate = asyncio.Event()
        asking = asyncio.ensure_future(rig.open(below[:2]))
        await until(rig, lambda: ssd.reads == 2)
        kept = dict(ssd.kept)
        rig.store.purge(NAMESPACE)
        ssd.kept.update(kept)  # as a log would: the bytes are still there
        ssd.gate.set()
        hold = await asking
        assert hold.blocks == [None, None]
        rig.store.release(hold.id)
        await rig.settle()
        assert rig.store.blocks(NAMESPACE) == 0
        ssd.kept.clear()

    async def test_a_block_is_open_while_it_moves_and_stays_while_it_is_open(self, rig: Rig, ssd: FaultyTier) -> None:
        ssd.gate = asyncio.Event()
        depth = 0
        while not ssd.used:
            await rig.put(depth)
            depth += 1
            await asyncio.sleep(0)
        moving = [
            d for d in range(depth) if any(rig.store.stack.residency.rows.leaving) and rig.where(d) == [Tier.HOST]
        ]
        holds = {d: await rig.open([d]) for d in moving}
        ssd.gate.set()
        await rig.settle()
        both_tiers = 0
        for d, hold in holds.items():
            placed = hold.blocks[0]
            assert placed is not None and rig.read(placed) == rig.raw(d)
            both_tiers += rig.where(d)[-2:] == [Tier.HOST, Tier.SSD]
            rig.store.release(hold.id)
        assert both_tiers > 0, "no open block was on its way"

    async def test_close_in_the_middle_of_everything(self, ssd: FaultyTier, no_leaks: None) -> None:
        rig = Rig.make(config=replace(SMALL, put_wait_s=0.01), ssd=ssd)
        await rig.store.start()
        for depth in range(MANY):
            await rig.put(depth)
        await rig.settle()
        below = [depth for depth in range(MANY) if rig.where(depth) == [Tier.SSD]]
        ssd.gate = asyncio.Event()
        asking = asyncio.ensure_future(rig.open(below[:2]))
        for depth in range(20):
            await rig.put(depth, session=1)
        await rig.store.close()
        with pytest.raises(asyncio.CancelledError):
            await asking
