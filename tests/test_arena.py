"""Extents, arena, staging: nothing is owned twice, reuse shows, bounds hold, nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.errors import Overloaded, SetupError
from kvstore.machine.memory import MemfdMemory
from kvstore.store.arena import UNIT_BYTES, Arena, Slot, generation_at, table_bytes
from kvstore.store.extents import Extents
from kvstore.store.staging import Staging, StagingSegment
from tests.store_fakes import PlainMemory, YieldingPool

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    memory = PlainMemory()
    arena = Arena(memory, 4 * MIB, 64 * MIB)
    yield arena
    arena.validate()
    arena.close()
    assert memory.open_bytes == 0


def grow(arena: Arena) -> None:
    """Make the segment that is wanted, as the store does in a thread."""
    size = arena.spare_wanted()
    arena.keep_spare(arena.make(size), size)


class TestExtents:
    def test_best_fit_and_lowest_first(self) -> None:
        extents = Extents()
        for start, length in ((0, 10), (100, 4), (200, 4), (300, 6)):
            extents.add(start, length)
        assert [extents.take(4), extents.take(4), extents.take(5), extents.take(11)] == [100, 200, 300, None]
        extents.validate()

    def test_neighbours_merge(self) -> None:
        extents = Extents()
        for start in (0, 20, 10):
            extents.add(start, 10)
        assert extents.ranges() == [(0, 30)]
        assert extents.largest == extents.free == 30

    def test_freeing_twice_is_an_error(self) -> None:
        extents = Extents()
        extents.add(0, 10)
        with pytest.raises(ValueError, match="free already"):
            extents.add(0, 10)

    def test_only_whole_ranges_can_be_removed(self) -> None:
        extents = Extents()
        extents.add(0, 10)
        with pytest.raises(ValueError, match="not one free range"):
            extents.remove(0, 5)
        extents.remove(0, 10)
        assert extents.free == 0 and extents.take(1) is None


class TestSlots:
    def test_views_are_apart(self, arena: Arena) -> None:
        slots = [slot for _ in range(20) if (slot := arena.allocate("a", 50_000))]
        for index, slot in enumerate(slots):
            arena.view(slot)[:] = bytes([index]) * 50_000
        assert all(bytes(arena.view(slot)) == bytes([index]) * 50_000 for index, slot in enumerate(slots))

    def test_reuse_shows_in_the_generation(self, arena: Arena) -> None:
        first = arena.allocate("a", 100_000)
        assert first is not None
        segment = arena.segment(first.segment)
        seen = generation_at(segment.segment.view, segment.data_offset, first.offset)
        assert seen == first.generation
        arena.free(first)
        assert generation_at(segment.segment.view, segment.data_offset, first.offset) != seen  # before any reuse
        second = arena.allocate("a", 100_000)
        assert second is not None and second.offset == first.offset
        assert second.generation != first.generation

    def test_large_neighbours_do_not_disturb_each_other(self, arena: Arena) -> None:
        slots = [arena.allocate("a", UNIT_BYTES + 5000) for _ in range(6)]
        kept = slots[3]
        assert kept is not None
        for slot in (*slots[:3], *slots[4:]):
            assert slot is not None
            arena.free(slot)
        segment = arena.segment(kept.segment)
        assert generation_at(segment.segment.view, segment.data_offset, kept.offset) == kept.generation

    def test_a_held_slot_keeps_its_bytes_until_released(self, arena: Arena) -> None:
        slot = arena.allocate("a", 10_000)
        assert slot is not None
        arena.view(slot)[:] = b"x" * 10_000
        arena.hold(slot)
        arena.hold(slot)
        arena.free(slot)
        taken: list[Slot] = []
        while (other := arena.allocate("a", 10_000)) is not None:
            arena.view(other)[:] = b"y" * 10_000
            taken.append(other)
        assert bytes(arena.view(slot)) == b"x" * 10_000
        segment = arena.segment(slot.segment)
        assert generation_at(segment.segment.view, segment.data_offset, slot.offset) == slot.generation
        assert arena.limbo_bytes == 12_288
        arena.release(slot)
        assert arena.allocate("a", 10_000) is None
        arena.release(slot)
        reused = arena.allocate("a", 10_000)
        assert reused is not None and (reused.segment, reused.offset) == (slot.segment, slot.offset)
        assert arena.limbo_bytes == 0

    def test_a_small_neighbour_of_a_held_slot_waits_too(self, arena: Arena) -> None:
        """They share a unit: bumping it would turn the reader's hit into a miss."""
        held, neighbour = arena.allocate("a", 1000), arena.allocate("a", 1000)
        assert held is not None and neighbour is not None
        arena.hold(held)
        arena.free(neighbour)
        segment = arena.segment(held.segment)
        assert generation_at(segment.segment.view, segment.data_offset, held.offset) == held.generation
        arena.release(held)
        assert generation_at(segment.segment.view, segment.data_offset, held.offset) != held.generation

    def test_freeing_twice_is_caught(self, arena: Arena) -> None:
        slot = arena.allocate("a", 1000)
        assert slot is not None
        arena.hold(slot)
        arena.free(slot)
        with pytest.raises(AssertionError, match="freed twice"):
            arena.free(slot)
        arena.release(slot)
        with pytest.raises(AssertionError, match="freed twice"):
            arena.free(slot)


class TestSegments:
    def test_namespaces_never_share_a_segment(self, arena: Arena) -> None:
        slots = {name: [arena.allocate(name, 30_000) for _ in range(8)] for name in ("a", "b")}
        owned = {name: {slot.segment for slot in here if slot} for name, here in slots.items()}
        assert owned["a"] and owned["b"] and not owned["a"] & owned["b"]

    def test_space_changes_hands_as_a_new_segment_only(self) -> None:
        memory = PlainMemory()
        arena = Arena(memory, MIB, 64 * MIB)
        mine: list[Slot] = []
        while (slot := arena.allocate("a", 60_000)) is not None:
            mine.append(slot)
        assert arena.allocate("b", 60_000) is None
        before = {segment.id for segment in arena.segments()}
        for slot in mine:
            arena.free(slot)
        theirs = arena.allocate("b", 60_000)
        assert theirs is not None and theirs.segment not in before
        assert memory.made[-1].view.tobytes().count(0) >= 60_000  # fresh memory
        arena.validate()
        arena.close()

    def test_a_mapped_segment_is_not_dropped(self) -> None:
        arena = Arena(PlainMemory(), UNIT_BYTES, UNIT_BYTES)
        slot = arena.allocate("a", UNIT_BYTES)
        assert slot is not None
        arena.share(slot.segment)
        arena.free(slot)
        assert not arena.fits("b", 1000) and arena.allocate("b", 1000) is None
        arena.unshare(slot.segment)
        assert arena.fits("b", 1000) and arena.allocate("b", 1000) is not None
        arena.close()

    @pytest.mark.parametrize(
        ("capacity", "block"), [(MIB, 64 * KIB), (4 * MIB, 512 * KIB), (MIB, 8 * KIB), (3 * MIB, MIB)]
    )
    def test_small_arenas_are_usable(self, capacity: int, block: int) -> None:
        arena = Arena(PlainMemory(), capacity, 64 * MIB)
        count = 0
        while arena.allocate("a", block) is not None:
            count += 1
        assert count * block >= 0.95 * capacity
        arena.validate()
        arena.close()

    def test_a_block_larger_than_a_segment(self, arena: Arena) -> None:
        slot = arena.allocate("a", 3 * MIB)
        assert slot is not None and arena.fits("a", MIB) and not arena.fits("a", 2 * MIB)
        assert arena.allocate("a", 5 * MIB) is None

    def test_large_segments_are_asked_for(self) -> None:
        """Faulting one in takes long: it is made ahead of need, or elsewhere while the allocation waits."""
        arena = Arena(PlainMemory(), 64 * MIB, 8 * MIB)
        assert arena.spare_wanted() == 8 * MIB and not arena.asked
        assert not arena.fits("a", MIB) and arena.allocate("a", MIB) is None
        assert arena.asked == arena.spare_wanted() == 8 * MIB
        grow(arena)
        assert arena.fits("a", MIB) and not arena.asked
        slot = arena.allocate("a", MIB)
        assert slot is not None and arena.spare_wanted() == 8 * MIB
        arena.validate()
        arena.close()

    def test_a_spare_that_is_too_small_gives_way(self) -> None:
        memory = PlainMemory()
        arena = Arena(memory, 64 * MIB, 8 * MIB)
        grow(arena)
        assert arena.allocate("a", 20 * MIB) is None and arena.asked == 20 * MIB
        assert memory.made[0].closed
        grow(arena)
        assert arena.allocate("a", 20 * MIB) is not None
        arena.validate()

    def test_refused_memory_is_not_asked_for_until_the_heartbeat(self) -> None:
        arena = Arena(PlainMemory(limit=0), 64 * MIB, 8 * MIB)
        assert arena.allocate("a", MIB) is None and arena.asked
        arena.refused()
        assert not arena.asked and arena.spare_wanted() == 0
        assert arena.allocate("a", MIB) is None and not arena.asked
        arena.heartbeat()
        assert arena.allocate("a", MIB) is None and arena.asked

    def test_no_memory_is_no_room(self) -> None:
        arena = Arena(PlainMemory(limit=MIB + 4 * KIB), 8 * MIB, MIB)
        slots = [arena.allocate("a", 500_000) for _ in range(4)]
        assert slots[0] is not None and slots[-1] is None
        assert arena.memory_refusals > 0
        arena.validate()
        arena.close()

    def test_too_small_an_arena_is_refused(self) -> None:
        with pytest.raises(SetupError, match="host_bytes"):
            Arena(PlainMemory(), 1000, MIB)

    def test_tables_are_pages(self) -> None:
        assert table_bytes(1) == table_bytes(32 * MIB) == 4096
        assert table_bytes(64 * MIB) == 8192


def test_slots_taken_together_lie_side_by_side_where_they_can(arena: Arena) -> None:
    first = arena.allocate("n", 8 * KIB)
    assert first is not None
    found = arena.allocate_all("n", 8 * KIB - 1, 5)
    assert found == [(first.segment, first.offset + (1 + at) * 8 * KIB) for at in range(5)]
    arena.validate()
    for segment, offset in found[1:4:2]:
        arena.free(Slot(segment, offset, 8 * KIB, 0))
    arena.validate()
    rest = arena.allocate_all("n", 8 * KIB, 1 << 20)
    assert {found[1], found[3]} <= set(rest), "one by one where they don't fit in one piece: holes too"
    assert len(set(rest)) == len(rest) and not set(rest) & {found[0], found[2], found[4]}
    arena.validate()
    assert arena.allocate_all("n", 8 * KIB, 3) == [] == arena.allocate_all("n", 8 * KIB, 0)


def test_churn_leaves_95_percent_usable() -> None:
    """Mixed sizes, freed oldest first until the next one fits: the share of the capacity that live blocks take."""
    arena = Arena(PlainMemory(), 64 * MIB, 16 * MIB)
    rng = Random(7)
    live: dict[int, Slot] = {}
    shares: list[float] = []
    for index in range(6000):
        nbytes = rng.choice((512 * KIB, rng.randrange(300 * KIB, 400 * KIB), rng.randrange(8 * KIB, 100 * KIB)))
        while (slot := arena.allocate("a", nbytes)) is None:
            if arena.asked:
                grow(arena)
            else:
                arena.free(live.pop(next(iter(live))))
        live[index] = slot
        if index > 1500:
            shares.append(
                sum(s.length for s in live.values()) / arena.capacity
                if index % 50 == 0
                else shares[-1]
                if shares
                else 1
            )
    arena.validate()
    arena.close()
    assert sum(shares) / len(shares) >= 0.95, f"mean {sum(shares) / len(shares):.4f}, worst {min(shares):.4f}"


def test_real_memory_leaves_nothing(no_leaks: None) -> None:
    arena = Arena(MemfdMemory(), MIB, 256 * KIB)
    slots = [arena.allocate(name, 10_000) for name in ("a", "b") for _ in range(10)]
    for slot in slots:
        assert slot is not None
        arena.view(slot)[:] = b"z" * 10_000
    arena.validate()
    arena.close()


class TestStaging:
    def test_bounded_and_freed(self) -> None:
        memory = PlainMemory()
        staging = Staging(memory, MIB)
        first = staging.open(600 * KIB)
        with pytest.raises(Overloaded, match="staging_total_bytes"):
            staging.open(600 * KIB)
        staging.close(first.id)
        staging.close(first.id)
        second = staging.open(600 * KIB)
        assert second.id != first.id and staging.get(first.id) is None and staging.get(second.id) is second
        staging.close_all()
        assert staging.used == 0 and memory.open_bytes == 0

    async def test_made_apart(self) -> None:
        memory, pool = PlainMemory(), YieldingPool()
        staging = Staging(memory, MIB)
        making = [asyncio.ensure_future(staging.open_apart(pool, 600 * KIB)) for _ in range(2)]
        made, refused = await asyncio.gather(*making, return_exceptions=True)
        assert isinstance(refused, Overloaded) and staging.used == 600 * KIB
        assert isinstance(made, StagingSegment) and staging.get(made.id) is made
        staging.close(made.id)
        late = asyncio.ensure_future(staging.open_apart(pool, KIB))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        memory.limit = 0
        with pytest.raises(SetupError):
            await staging.open_apart(pool, KIB)
        with pytest.raises(SetupError):
            staging.open(KIB)
        assert staging.used == 0 and memory.open_bytes == 0


class ArenaMachine(RuleBasedStateMachine):
    """Against a plain model: which slots are live, what they contain, who holds them."""

    @initialize()
    def begin(self) -> None:
        self.memory = PlainMemory()
        self.arena = Arena(self.memory, 2 * MIB, 256 * KIB)
        self.live: list[tuple[str, Slot, int]] = []
        self.held: list[tuple[Slot, int, int]] = []  # slot, generation, mark; freed or not, their bytes must stay
        self.count = 0

    @rule(namespace=st.sampled_from("ab"), nbytes=st.integers(1, 300_000))
    def allocate(self, namespace: str, nbytes: int) -> None:
        fits = self.arena.fits(namespace, nbytes)
        slot = self.arena.allocate(namespace, nbytes)
        assert (slot is not None) == fits
        if slot is None:
            return
        assert self.arena.segment(slot.segment).namespace == namespace
        self.count = (self.count + 1) % 251
        self.arena.view(slot)[:] = bytes([self.count]) * nbytes
        self.live.append((namespace, slot, self.count))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        _, slot, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.arena.free(slot)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        _, slot, mark = self.live[data.draw(st.integers(0, len(self.live) - 1))]
        self.held.append((slot, self.arena.hold(slot), mark))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot, _, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.arena.release(slot)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.validate()
        for _, slot, mark in self.live:
            assert set(self.arena.view(slot)[:: max(1, slot.length - 1)]) == {mark}, "a live slot was overwritten"
        for slot, generation, mark in self.held:
            assert set(self.arena.view(slot)[:: max(1, slot.length - 1)]) == {mark}, "a held slot was overwritten"
            segment = self.arena.segment(slot.segment)
            assert generation_at(segment.segment.view, segment.data_offset, slot.offset) == generation
        assert self.memory.open_bytes <= 2 * MIB + 4096 * 64

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()
            assert self.memory.open_bytes == 0


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
