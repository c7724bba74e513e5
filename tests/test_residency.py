"""Residency: leaf first, pins, families, bytes, secondary copies."""

from __future__ import annotations

import tracemalloc
from random import Random

import pytest

from kvstore.policies.base import Lru
from kvstore.residency.check import validate
from kvstore.residency.residency import Residency
from tests.residency_blocks import FULL, HOST, HOT, LEVELS, SLIDING, SSD, header_of, key_of, place, put


@pytest.fixture
def residency() -> Residency:
    return Residency(LEVELS, Lru)


def evict(residency: Residency, level: int, count: int) -> list[tuple[int, int]]:
    """(chain, depth) of the next victims, each dropped."""
    found = []
    for _ in range(count):
        row = residency.victim(level)
        assert row is not None
        key = residency.id(row).key
        found.append((int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")))
        residency.drop(row, level)
        validate(residency)
    return found


class TestVictims:
    def test_leaves_before_parents(self, residency: Residency) -> None:
        for depth in range(4):
            put(residency, 0, depth)
        assert evict(residency, HOT, 4) == [(0, 3), (0, 2), (0, 1), (0, 0)]
        assert residency.victim(HOT) is None

    def test_the_oldest_leaf_of_several_chains(self, residency: Residency) -> None:
        for chain in range(3):
            for depth in range(2):
                put(residency, chain, depth)
        found = residency.find("n", FULL, key_of(0, 1))
        assert found is not None
        residency.touch(found)
        assert evict(residency, HOT, 6) == [(1, 1), (1, 0), (2, 1), (2, 0), (0, 1), (0, 0)]

    def test_a_shared_prefix_outlives_all_branches(self, residency: Residency) -> None:
        put(residency, 0, 0)
        for branch in range(1, 4):
            header = header_of(branch, 1, parent=key_of(0, 0))
            residency.admit("n", header, HOT, place(branch), leaf_first=True)
        assert evict(residency, HOT, 4) == [(1, 1), (2, 1), (3, 1), (0, 0)]

    def test_sliding_blocks_go_in_the_order_of_use(self, residency: Residency) -> None:
        for depth in range(4):
            put(residency, 0, depth, shard=SLIDING)
        assert evict(residency, HOT, 4) == [(0, 0), (0, 1), (0, 2), (0, 3)]

    def test_pinned_blocks_stay(self, residency: Residency) -> None:
        rows = [put(residency, chain, 0) for chain in range(3)]
        residency.pin(rows[0])
        assert evict(residency, HOT, 2) == [(1, 0), (2, 0)]
        assert residency.victim(HOT) is None
        with pytest.raises(AssertionError, match="pinned"):
            residency.drop(rows[0], HOT)
        residency.unpin(rows[0])
        assert residency.victim(HOT) == rows[0]

    def test_a_pinned_leaf_does_not_hold_its_parents_for_ever(self, residency: Residency) -> None:
        rows = [put(residency, 0, depth) for depth in range(3)]
        residency.pin(rows[2])
        assert residency.victim(HOT) is None
        assert residency.victim(HOT, force=True) == rows[0]  # no leaf is left: the policy's first goes all the same

    def test_a_leaving_child_is_out_of_the_way(self, residency: Residency) -> None:
        rows = [put(residency, 0, depth) for depth in range(3)]
        for row in reversed(rows):
            assert residency.victim(HOT) == row
            residency.work(row)
            residency.leave(row, HOT)
        assert residency.victim(HOT) is None
        validate(residency)
        residency.stay(rows[1], HOT)
        residency.done(rows[1])
        assert residency.victim(HOT) == rows[1]
        validate(residency)

    def test_a_copy_among_several_may_go_whatever_its_children_do(self, residency: Residency) -> None:
        parent = put(residency, 0, 0)
        put(residency, 0, 1)
        residency.add(parent, HOST, place(9))
        assert residency.elsewhere(parent, HOT) and residency.victim(HOT) == parent
        residency.drop(parent, HOT)
        assert residency.top(parent) == HOST
        validate(residency)

    def test_a_child_above_holds_its_parent_below(self, residency: Residency) -> None:
        put(residency, 0, 0, HOST)
        put(residency, 0, 1, HOT)
        put(residency, 1, 0, HOST)
        assert evict(residency, HOST, 1) == [(1, 0)]


class TestSecondary:
    """Copies that other workers are to keep go before the fleet's last ones."""

    def mark(self, residency: Residency, chain: int, depth: int, yes: bool = True) -> None:
        row = residency.find("n", FULL, key_of(chain, depth))
        assert row is not None
        residency.mark_secondary(row, yes)
        validate(residency)

    def test_secondary_copies_leave_first_even_when_used_last(self, residency: Residency) -> None:
        rows = [put(residency, chain, 0) for chain in range(4)]
        self.mark(residency, 3, 0)
        self.mark(residency, 1, 0)
        residency.touch(rows[3])
        assert evict(residency, HOT, 4) == [(1, 0), (3, 0), (0, 0), (2, 0)]

    def test_unmarked_again_it_is_as_good_as_any(self, residency: Residency) -> None:
        for chain in range(3):
            put(residency, chain, 0)
        self.mark(residency, 1, 0)
        self.mark(residency, 1, 0)
        self.mark(residency, 1, 0, yes=False)
        assert evict(residency, HOT, 3) == [(0, 0), (2, 0), (1, 0)]

    def test_children_still_go_before_a_secondary_parent(self, residency: Residency) -> None:
        put(residency, 0, 0)
        put(residency, 1, 0)
        put(residency, 0, 1)
        self.mark(residency, 0, 0)
        assert evict(residency, HOT, 3) == [(1, 0), (0, 1), (0, 0)]

    def test_a_marked_parent_whose_child_is_gone_is_in_question_again(self, residency: Residency) -> None:
        put(residency, 0, 0)
        child = put(residency, 0, 1)
        put(residency, 1, 0)
        self.mark(residency, 0, 0)
        assert residency.victim(HOT) == child  # the parent is set aside
        residency.touch(child)
        residency.drop(child, HOT)
        assert evict(residency, HOT, 2) == [(0, 0), (1, 0)]

    def test_pins_hold_it(self, residency: Residency) -> None:
        row, other = put(residency, 0, 0), put(residency, 1, 0)
        self.mark(residency, 0, 0)
        residency.pin(row)
        assert residency.victim(HOT) == other
        residency.unpin(row)
        assert residency.victim(HOT) == row

    def test_the_mark_goes_along_to_other_levels_and_ends_with_the_block(self, residency: Residency) -> None:
        row, other = put(residency, 1, 0), put(residency, 0, 0)
        residency.add(other, HOST, place(8))
        self.mark(residency, 0, 0)
        residency.add(row, HOST, place(9))
        residency.drop(other, HOT)
        assert residency.victim(HOST) == other and residency.secondary(other)
        residency.drop(other, HOST)
        again = put(residency, 0, 0)
        assert again == other and not residency.secondary(again)
        assert evict(residency, HOT, 2) == [(1, 0), (0, 0)]

    def test_forced_victims_too(self, residency: Residency) -> None:
        rows = [put(residency, 0, depth) for depth in range(3)]
        residency.pin(rows[2])
        self.mark(residency, 0, 1)
        assert residency.victim(HOT) is None and residency.victim(HOT, force=True) == rows[1]


class TestFamilies:
    def test_the_subtree_of_a_lost_parent_is_next_in_line(self, residency: Residency) -> None:
        rows = [put(residency, 0, depth) for depth in range(4)]
        put(residency, 1, 0)
        for row in rows:
            residency.touch(row)
        residency.drop(rows[1], HOT, force=True)
        validate(residency)
        assert evict(residency, HOT, 2) == [(0, 3), (0, 2)]

    def test_order_of_arrival_does_not_matter(self, residency: Residency) -> None:
        for depth in (2, 0, 3, 1):
            put(residency, 0, depth)
            validate(residency)
        assert evict(residency, HOT, 4) == [(0, 3), (0, 2), (0, 1), (0, 0)]

    def test_a_parent_that_returns_finds_its_children(self, residency: Residency) -> None:
        rows = [put(residency, 0, depth) for depth in range(3)]
        residency.drop(rows[0], HOT, force=True)
        put(residency, 0, 0, HOST)
        validate(residency)
        put(residency, 5, 0, HOST)
        assert evict(residency, HOST, 1) == [(5, 0)]

    def test_claimed_cycles_and_depths_make_no_family(self, residency: Residency) -> None:
        """A writer may claim any parent: links need consecutive depths, so nothing can be its own ancestor."""
        a, b = key_of(1, 1), key_of(2, 1)
        for chain, parent in ((1, b), (2, a), (3, key_of(3, 1))):
            header = header_of(chain, 1, parent=parent)
            residency.admit("n", header, HOT, place(chain), leaf_first=True)
            validate(residency)
        assert len(evict(residency, HOT, 3)) == 3

    def test_shards_and_namespaces_are_families_of_their_own(self, residency: Residency) -> None:
        put(residency, 0, 0)
        residency.admit("m", header_of(0, 1), HOT, place(5), leaf_first=True)
        put(residency, 0, 1, shard=SLIDING)
        assert evict(residency, HOT, 3) == [(0, 0), (0, 1), (0, 1)]


class TestRows:
    def test_a_purged_block_keeps_its_row_while_pinned_or_busy(self, residency: Residency) -> None:
        row = put(residency, 0, 0)
        residency.pin(row)
        residency.work(row)
        residency.drop(row, HOT, force=True)
        assert residency.gone(row) and residency.find("n", FULL, key_of(0, 0)) is None
        other = put(residency, 0, 0)
        assert other != row
        residency.unpin(row)
        validate(residency)
        residency.done(row)
        assert put(residency, 0, 1) == row  # free again
        validate(residency)

    def test_bytes_count_in_granules(self, residency: Residency) -> None:
        row = put(residency, 0, 0)
        residency.add(row, SSD, place(0, 5000))
        assert residency.used == [8192, 0, 5000] and residency.raw_bytes == [10_000, 0, 10_000]
        residency.drop(row, HOT)
        assert residency.used == [0, 0, 5000] and residency.blocks == [0, 0, 1]

    def test_the_header_may_become_that_of_a_record(self, residency: Residency) -> None:
        row = put(residency, 0, 0)
        residency.work(row)
        residency.drop(row, HOT, force=True)
        residency.done(row)
        assert len(residency) == 0 and len(residency.rows) == 0

    def test_metadata_per_block_is_bounded(self) -> None:
        """Measured, so that a change of it shows. The headers alone are 160 bytes."""
        tracemalloc.start()
        residency = Residency(LEVELS, Lru)
        before = tracemalloc.get_traced_memory()[0]
        for chain in range(20_000 // 50):
            for depth in range(50):
                put(residency, chain, depth)
        per_block = (tracemalloc.get_traced_memory()[0] - before) / 20_000
        tracemalloc.stop()
        assert per_block < 700


def test_a_long_history_ends_whole() -> None:
    residency, rng = Residency(LEVELS, Lru), Random(11)
    for turn in range(8000):
        chain, depth, level = rng.randrange(200), rng.randrange(30), rng.randrange(3)
        row = residency.find("n", FULL, key_of(chain, depth))
        if row is not None:
            residency.touch(row)
        elif rng.random() < 0.7:
            put(residency, chain, depth, level)
        if turn % 2 and (victim := residency.victim(level)) is not None:
            residency.drop(victim, level)
    validate(residency)
    assert len(residency) > 100
