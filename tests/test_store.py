"""The store's flows over its own memory tiers: put, open, holds, spill to host, promotion, purge, announcements."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvstore.directory.runs import Added, Removed
from kvstore.machine.system import real_system
from kvstore.spec import Shard
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, header_of
from tests.store_fakes import PlainMemory, fake_system
from tests.store_rig import KIB, SMALL, Rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig.make()
    await rig.store.start()
    yield rig
    await rig.close()
    memory = rig.system.memory
    assert isinstance(memory, PlainMemory) and memory.open_bytes == 0


class TestPut:
    async def test_a_block_put_is_there(self, rig: Rig) -> None:
        outcome = await rig.put(0)
        assert (outcome.state, outcome.seq) == ("committed", 1)
        hold = await rig.open([0])
        placed = hold.blocks[0]
        assert placed is not None and placed.raw and placed.tier == Tier.HOT
        assert bytes(placed.view) == rig.raw(0) == rig.read(placed)
        assert placed.header.depth == 0 and placed.header.key == rig.key(0)
        rig.store.release(hold.id)

    async def test_what_is_held_costs_nothing(self, rig: Rig) -> None:
        await rig.put(0)
        outcome = await rig.put(0, salt=b"other low bits")
        assert (outcome.state, outcome.seq) == ("held", 1)
        assert await rig.get(0) == rig.raw(0)

    async def test_exact_replaces_lossy_and_never_the_other_way(self, rig: Rig) -> None:
        await rig.put(0, fidelity=Fidelity.NEAR, salt=b"near")
        assert await rig.get(0, least=Fidelity.EXACT) is None
        assert await rig.get(0, least=Fidelity.NEAR) == rig.raw(0, salt=b"near")
        assert (await rig.put(0)).state == "committed"
        assert await rig.get(0, least=Fidelity.EXACT) == rig.raw(0)
        assert (await rig.put(0, fidelity=Fidelity.NEAR, salt=b"near")).state == "held"
        assert await rig.get(0) == rig.raw(0)

    async def test_a_reader_of_the_replaced_copy_keeps_it(self, rig: Rig) -> None:
        await rig.put(0, fidelity=Fidelity.NEAR, salt=b"near")
        hold = await rig.open([0])
        await rig.put(0)
        placed = hold.blocks[0]
        assert placed is not None and rig.read(placed) == rig.raw(0, salt=b"near")
        rig.store.release(hold.id)
        assert not rig.current(placed)

    async def test_equal_puts_at_once_are_one(self, rig: Rig) -> None:
        outcomes = await asyncio.gather(*(rig.put(0) for _ in range(5)))
        assert sorted(outcome.state for outcome in outcomes) == ["committed"] + ["held"] * 4
        assert rig.store.stack.hot.stats().writes == 1

    async def test_what_can_not_be_that_block_is_refused(self, rig: Rig) -> None:
        raw = rig.raw(0)
        good = header_of(NAMESPACE, rig.spec, rig.whole, 0, 0, raw)
        other = Shard(0, 0, 1, 0, 2)

        async def state(
            header: object = good, data: bytes = raw, namespace: str = NAMESPACE, shard: Shard = rig.whole
        ) -> str:
            return (await rig.store.put(namespace, rig.spec, shard, header, memoryview(data))).state  # type: ignore[arg-type]

        assert await state(data=raw[:-1]) == "refused"
        assert await state(replace(good, copy_id=good.copy_id ^ 1)) == "refused"
        assert await state(replace(good, raw_length=1)) == "refused"
        assert await state(namespace="other") == "refused"
        assert await state(shard=other) == "refused"
        assert await state(replace(good, root=b"x" * 16)) == "refused"
        assert await state(replace(good, stored=Fidelity.NEAR)) == "refused"
        assert rig.store.stack.hot.used == 0 and rig.store.counters["puts_refused"] == 7
        assert await state(replace(good, copy_id=0)) == "committed"
        assert await rig.get(0) == raw

    async def test_a_block_above_the_bound_is_refused(self) -> None:
        rig = Rig.make(config=replace(SMALL, block_bytes_max=4096))
        assert (await rig.put(0)).state == "refused"
        await rig.close()

    async def test_no_room_drops_the_put_and_nothing_else(self, rig: Rig) -> None:
        """Every block is held by a reader: nothing may go, so the new one does."""
        holds = []
        depth = 0
        while (await rig.put(depth)).state == "committed":
            holds.append(await rig.open([depth]))
            depth += 1
        assert depth == 16 and rig.store.counters["puts_dropped"] == 1
        for number, hold in enumerate(holds):
            placed = hold.blocks[0]
            assert placed is not None and rig.read(placed) == rig.raw(number)
            rig.store.release(hold.id)
        assert (await rig.put(depth)).state == "committed"

    async def test_a_late_writer_can_not_touch_a_committed_block(self, rig: Rig) -> None:
        source = bytearray(rig.raw(0))
        header = header_of(NAMESPACE, rig.spec, rig.whole, 0, 0, bytes(source))
        await rig.store.put(NAMESPACE, rig.spec, rig.whole, header, memoryview(source))
        source[:] = bytes(len(source))
        assert await rig.get(0) == rig.raw(0)


class TestSpill:
    async def test_old_blocks_go_to_host_as_records_and_come_back(self, rig: Rig) -> None:
        await rig.put_all(30)
        await rig.settle()
        tiers = [rig.where(depth) for depth in range(30)]
        assert [Tier.HOST] in tiers and [Tier.HOT] in tiers
        hold = await rig.open(range(30))
        assert all(placed is not None for placed in hold.blocks)
        kinds = {placed.raw for placed in hold.blocks if placed is not None}
        assert kinds == {True, False}
        for depth, placed in enumerate(hold.blocks):
            assert placed is not None and rig.read(placed) == rig.raw(depth)
            assert placed.tier == (Tier.HOT if placed.raw else Tier.HOST)
        rig.store.release(hold.id)
        hits = {stats.tier: stats.hits for stats in rig.store.stats()}
        assert hits[Tier.HOT] + hits[Tier.HOST] == 30 and hits[Tier.HOST] > 0

    async def test_encoded_once(self, rig: Rig) -> None:
        """A promoted block keeps its record below: leaving hot again just drops the raw copy."""
        await rig.put_all(30)
        await rig.settle()
        written = rig.store.stack.host.stats().writes
        below = next(depth for depth in range(30) if rig.where(depth) == [Tier.HOST])
        for _ in range(3):
            assert await rig.get(below) == rig.raw(below)
            await rig.settle()
        assert rig.where(below) == [Tier.HOT, Tier.HOST] or rig.store.counters["promotions_skipped"]
        for depth in range(30):
            assert await rig.get(depth) == rig.raw(depth)
            await rig.settle()
        assert rig.store.counters["promotions"] > 0
        rewritten = rig.store.stack.host.stats().writes - written
        assert rewritten <= sum(Tier.HOST in rig.where(depth) for depth in range(30)) - written + 30
        assert rig.store.counters["clean_drops"] > 0

    async def test_promotion_takes_only_room_that_costs_nothing(self, rig: Rig) -> None:
        await rig.put_all(30)
        await rig.settle()
        below = [depth for depth in range(30) if rig.where(depth) == [Tier.HOST]]
        hot = [await rig.open([depth]) for depth in range(30) if rig.where(depth) == [Tier.HOT]]
        for depth in below:
            assert await rig.get(depth) == rig.raw(depth)
        await rig.settle()
        assert rig.store.counters["promotions_skipped"] > 0
        for hold in hot:
            assert hold.blocks[0] is not None and rig.current(hold.blocks[0])
            rig.store.release(hold.id)

    async def test_the_last_tier_evicts_on_purpose_and_says_so(self, rig: Rig) -> None:
        """The oldest chains go, each from its end: what is left of a chain can be reached from its first block."""
        blocks = [(session, depth) for session in range(30) for depth in range(5)]
        for session, depth in blocks:
            assert (await rig.put(depth, session)).state == "committed"
        await rig.settle()
        held = [(session, depth) for session, depth in blocks if rig.where(depth, session)]
        assert rig.store.counters["evicted"] == 150 - len(held) > 0
        removed = [change.key for _, change in rig.told[NAMESPACE] if isinstance(change, Removed)]
        assert sorted(removed) == sorted(rig.key(depth, session) for session, depth in set(blocks) - set(held))
        for session, depth in held:
            assert await rig.get(depth, session) == rig.raw(depth, session)
            assert depth == 0 or (session, depth - 1) in held, "leaves must go before their parents"
        assert held[-5:] == blocks[-5:] and held[0][0] > 0

    async def test_what_others_keep_leaves_before_the_last_copies(self, rig: Rig) -> None:
        """Older chains outlive newer ones that a coordinator's hint named secondary."""
        for session in range(8):
            for depth in range(5):
                assert (await rig.put(depth, session)).state == "committed"
        await rig.settle()
        assert not rig.store.counters.get("evicted")
        marked = {
            session: rig.store.secondary(NAMESPACE, rig.whole.digest, rig.keys(5, session), True) for session in (6, 7)
        }
        assert marked == {6: 5, 7: 5} and rig.store.secondary("another", rig.whole.digest, rig.keys(5), True) == 0
        assert rig.store.secondary(NAMESPACE, rig.whole.digest, rig.keys(5, 6), False) == 5
        newer = 8
        while not rig.store.counters.get("evicted"):
            for depth in range(5):
                assert (await rig.put(depth, newer)).state == "committed"
            await rig.settle()
            newer += 1
        evicted = {session for session in range(newer) for depth in range(5) if not rig.where(depth, session)}
        assert evicted == {7}, "a last copy was given up before a secondary one"

    async def test_a_chain_longer_than_the_store_keeps_its_head(self, rig: Rig) -> None:
        states = []
        for depth in range(70):
            states.append((await rig.put(depth)).state)
            await rig.settle()
            if rig.store.counters.get("evicted"):
                break
        held = [depth for depth in range(70) if rig.where(depth)]
        assert held == list(range(len(held))) and len(held) > 40, "blocks that others hang on were given up"

    async def test_damage_in_hot_is_not_spilled(self, rig: Rig) -> None:
        await rig.put_all(14)
        hold = await rig.open([13])
        placed = hold.blocks[0]
        assert placed is not None
        placed.segment.view[placed.offset] ^= 1
        rig.store.release(hold.id)
        await rig.put_all(20, session=1)
        await rig.settle()
        assert rig.store.counters["corrupt"] == 1 and await rig.get(13) is None
        assert {stats.tier: stats.errors for stats in rig.store.stats()}[Tier.HOT] == 1

    async def test_a_device_pool_in_the_chain(self) -> None:
        pytest.importorskip("torch")
        config = replace(SMALL, devices=("cpu",), device_bytes=96 * KIB)
        rig = Rig.make(config=config)
        await rig.store.start()
        await rig.put_all(40)
        await rig.settle()
        blocks = [level.tier for level in rig.store.stack.residency.levels]
        assert blocks == [Tier.HOT, Tier.HOT, Tier.HOST]
        assert all(count > 0 for count in rig.store.stack.residency.blocks)
        assert [await rig.get(depth) for depth in range(40)] == [rig.raw(depth) for depth in range(40)]
        assert {stats.tier: stats.hits for stats in rig.store.stats()}[Tier.HOT] > 12
        await rig.close()


class TestHolds:
    async def test_what_is_not_there_is_none(self, rig: Rig) -> None:
        await rig.put(1)
        hold = await rig.open([0, 1, 2], redis=True)
        assert [placed is None for placed in hold.blocks] == [True, False, True]
        rig.store.release(hold.id)
        wrong_root = await rig.store.open(
            NAMESPACE, b"r" * 16, [(rig.whole.digest, rig.key(1))], least=Fidelity.COMPACT
        )
        assert wrong_root.blocks == [None]
        rig.store.release(wrong_root.id)
        assert await rig.get(1, namespace="other") is None

    async def test_held_blocks_outlive_any_pressure(self, rig: Rig) -> None:
        await rig.put_all(4)
        hold = await rig.open(range(4))
        await rig.put_all(200, session=1)
        await rig.settle()
        for depth, placed in enumerate(hold.blocks):
            assert placed is not None and rig.read(placed) == rig.raw(depth)
        rig.store.release(hold.id)
        rig.store.release(hold.id)

    async def test_an_expired_hold_protects_nothing_but_shows(self, rig: Rig) -> None:
        await rig.put_all(2)
        hold = await rig.open([0])
        placed = hold.blocks[0]
        assert placed is not None
        rig.clock.now += SMALL.hold_max_s + 1
        assert rig.current(placed)
        await rig.store.tick()
        assert rig.store.counters["holds_expired"] == 1 and rig.current(placed)
        await rig.put_all(60, session=1)
        await rig.settle()
        assert not rig.current(placed), "the slot was used again, and the reader can't tell"
        rig.store.release(hold.id)

    async def test_purged_blocks_stay_readable_for_who_holds_them(self, rig: Rig) -> None:
        await rig.put_all(3)
        await rig.put(0, namespace="other")
        hold = await rig.open([1])
        assert rig.store.purge(NAMESPACE) == 3
        assert await rig.get(1) is None and await rig.get(0, namespace="other") == rig.raw(0)
        placed = hold.blocks[0]
        assert placed is not None and rig.read(placed) == rig.raw(1)
        rig.check()
        rig.store.release(hold.id)
        assert not rig.current(placed)
        assert (await rig.put(1)).state == "committed"

    async def test_purge_of_one_model(self, rig: Rig) -> None:
        await rig.put_all(2)
        assert rig.store.purge(NAMESPACE, b"r" * 16) == 0
        assert rig.store.purge(NAMESPACE, rig.spec.root) == 2


class TestAnnouncements:
    async def test_every_change_is_numbered_as_it_happens(self, rig: Rig) -> None:
        await rig.put_all(40)
        await rig.settle()
        rig.store.purge(NAMESPACE)
        rig.check()
        assert rig.store.heads() == {NAMESPACE: len(rig.told[NAMESPACE])}
        assert rig.store.outbox(NAMESPACE).since(0, 1000) == rig.told[NAMESPACE]
        assert rig.store.snapshot(NAMESPACE) == (len(rig.told[NAMESPACE]), [])

    async def test_a_block_is_announced_at_the_fastest_tier_that_has_it(self, rig: Rig) -> None:
        await rig.put_all(30)
        await rig.settle()
        below = next(depth for depth in range(1, 30) if rig.where(depth) == [Tier.HOST])
        change = [c for _, c in rig.told[NAMESPACE] if c.key == rig.key(below)][-1]
        assert isinstance(change, Added) and change.tier == Tier.HOST
        assert (change.depth, change.parent, change.group) == (below, rig.key(below - 1), rig.key(0))
        assert 0 < change.stored_bytes < len(rig.raw(below))

    async def test_namespaces_count_apart(self, rig: Rig) -> None:
        await rig.put(0)
        await rig.put(0, namespace="other")
        await rig.put(1, namespace="other")
        assert rig.store.heads() == {NAMESPACE: 1, "other": 2}
        assert rig.store.blocks("other") == 2


async def test_a_second_namespace_finds_room_in_a_full_store(rig: Rig) -> None:
    """Segments belong to one namespace: those of the first must be emptied for the second."""
    await rig.put_all(100)
    await rig.settle()
    states = [(await rig.put(depth, namespace="other")).state for depth in range(40)]
    await rig.settle()
    assert states[-10:] == ["committed"] * 10
    assert await rig.get(39, namespace="other") == rig.raw(39)
    owners = {segment.namespace for segment in rig.store.arena.segments()}
    assert owners == {NAMESPACE, "other"}


async def test_probe_and_stats(rig: Rig) -> None:
    await rig.put_all(60)
    await rig.settle()
    outcomes = await rig.store.probe(NAMESPACE)
    assert [(outcome.tier, outcome.ok) for outcome in outcomes] == [(Tier.HOT, True), (Tier.HOST, True)]
    rig.check()
    stats = {stats.tier: stats for stats in rig.store.stats()}
    assert list(stats) == [Tier.HOT, Tier.HOST, Tier.SSD, Tier.REDIS]
    assert stats[Tier.SSD].state == stats[Tier.REDIS].state == "off"
    assert stats[Tier.HOST].raw_bytes == stats[Tier.HOST].blocks * 8192 > stats[Tier.HOST].used * 0.9


async def test_real_memory_and_threads_leave_nothing(no_leaks: None) -> None:
    system = real_system(2)
    rig = Rig.make(system=system)
    await rig.store.start()
    outcomes = await asyncio.gather(*(rig.put(depth) for depth in range(40)))
    await rig.settle()
    kept = [depth for depth, outcome in enumerate(outcomes) if outcome.state == "committed"]
    assert len(kept) >= 16
    for depth in kept:
        if rig.where(depth):
            assert await rig.get(depth) == rig.raw(depth)
    staging = rig.store.staging.open(4096)
    assert staging.segment.fd is not None
    await rig.store.tick()
    rig.store.staging.close(staging.id)
    await rig.close()
    system.pool.close()


LARGE = replace(SMALL, host_bytes=64 << 20, segment_bytes=8 << 20)


async def test_large_segments_are_made_ahead_and_waited_for() -> None:
    rig = Rig.make(config=LARGE)
    assert rig.store.arena.reserved == 0
    await rig.store.start()
    assert (await rig.put(0)).state == "committed", "the first put comes before the first segment is made"
    await rig.settle()
    assert rig.store.arena.reserved == 16 << 20, "one in use and one ahead"
    await rig.close()


async def test_a_kernel_without_memory_drops_puts_until_it_has_some() -> None:
    memory = PlainMemory(limit=0)
    rig = Rig.make(config=LARGE, system=fake_system(memory=memory))
    await rig.store.start()
    assert (await rig.put(0)).state == "dropped"
    await rig.settle()
    assert rig.store.arena.memory_refusals > 0
    memory.limit = None
    await rig.store.tick()
    assert (await rig.put(0)).state == "committed"
    await rig.close()
