"""Residency: leaf first, pins, families, bytes; then against a plain model under random histories."""

from __future__ import annotations

import tracemalloc
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.header import Header
from kvstore.policy import Lru
from kvstore.residency import Level, Residency
from kvstore.residency_check import validate
from kvstore.spec import namespace_digest
from kvstore.tiers.base import Location
from kvstore.types import Fidelity, Tier

HOT, HOST, SSD = range(3)
LEVELS = (
    Level(Tier.HOT, 1 << 30, granule=4096, raw=True),
    Level(Tier.HOST, 1 << 30, granule=4096),
    Level(Tier.SSD, 1 << 30),
)
ROOT = b"r" * 16
FULL, SLIDING = b"full-shard-bytes", b"slidingshardbyte"


def key_of(chain: int, depth: int) -> bytes:
    return chain.to_bytes(8, "little") + depth.to_bytes(8, "little")


def header_of(chain: int, depth: int, shard: bytes = FULL, *, parent: bytes | None = None) -> Header:
    if parent is None:
        parent = key_of(chain, depth - 1) if depth else ROOT
    return Header(
        key=key_of(chain, depth),
        parent=parent,
        root=ROOT,
        group=key_of(chain, depth - depth % 32),
        depth=depth,
        namespace=namespace_digest("n"),
        shard=shard,
        copy_id=7,
        computed_on=Fidelity.EXACT,
        stored=Fidelity.EXACT,
        tokens=64,
        raw_length=10_000,
    )


def place(number: int, length: int = 5000) -> Location:
    return Location(1, number * 8192, length)


def put(residency: Residency, chain: int, depth: int, level: int = HOT, shard: bytes = FULL) -> int:
    where = place(len(residency))
    return residency.admit("n", header_of(chain, depth, shard), level, where, leaf_first=shard == FULL)


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


class Machine(RuleBasedStateMachine):
    """Random histories against a dict of blocks; every block, count and byte is compared after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(LEVELS, Lru)
        self.model: dict[tuple[bytes, bytes], dict[int, Location]] = {}
        self.rows: dict[tuple[bytes, bytes], int] = {}
        self.pins: dict[int, int] = {}  # by row, zombies too
        self.moves: list[tuple[tuple[bytes, bytes], int, int]] = []  # id, row, level it leaves
        self.number = 0

    chains, depths = st.integers(0, 2), st.integers(0, 5)
    shards, levels = st.sampled_from((FULL, SLIDING)), st.sampled_from((HOT, HOST, SSD))

    def where(self) -> Location:
        self.number += 1
        return place(self.number, 1 + self.number % 9000)

    @rule(chain=chains, depth=depths, shard=shards, level=levels)
    def come(self, chain: int, depth: int, shard: bytes, level: int) -> None:
        id = (shard, key_of(chain, depth))
        where = self.where()
        if id not in self.model:
            header = header_of(chain, depth, shard)
            self.rows[id] = self.residency.admit("n", header, level, where, leaf_first=shard == FULL)
            self.model[id] = {}
        elif level not in self.model[id]:
            self.residency.add(self.rows[id], level, where)
        else:
            return
        self.model[id][level] = where

    def pick(self, data: st.DataObject) -> tuple[bytes, bytes]:
        return data.draw(st.sampled_from(sorted(self.model)))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.residency.touch(self.rows[self.pick(data)])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        row = self.rows[self.pick(data)]
        self.residency.pin(row)
        self.pins[row] = self.pins.get(row, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.pins)))
        self.residency.unpin(row)
        self.pins[row] -= 1
        if not self.pins[row]:
            del self.pins[row]

    @rule(level=levels)
    def spill(self, level: int) -> None:
        """Name a victim: it must be there, unpinned, not leaving; then drop it or begin to move it."""
        row = self.residency.victim(level, force=True)
        moving = {(row, at) for _, row, at in self.moves}
        free = [id for id, where in self.model.items() if level in where and self.rows[id] not in self.pins]
        able = [id for id in free if (self.rows[id], level) not in moving]
        assert (row is None) == (not able)
        if row is None:
            return
        id = next(id for id in able if self.rows[id] == row)
        if self.residency.elsewhere(row, level) or level == SSD:
            assert self.residency.drop(row, level) == self.model[id].pop(level)
            self.forget(id)
        else:
            self.residency.work(row)
            self.residency.leave(row, level)
            self.moves.append((id, row, level))

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), works=st.booleans())
    def arrive(self, data: st.DataObject, works: bool) -> None:
        """A move ends: flip when it worked and the block is still wanted there, else it stays."""
        id, row, level = self.moves.pop(data.draw(st.integers(0, len(self.moves) - 1)))
        if self.residency.gone(row):
            self.residency.done(row)
            return
        if works and level + 1 not in self.model[id]:
            where = self.where()
            self.residency.add(row, level + 1, where)
            self.model[id][level + 1] = where
        if works and row not in self.pins:
            self.residency.drop(row, level)
            del self.model[id][level]
            self.forget(id)
        else:
            self.residency.stay(row, level)
        self.residency.done(row)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def purge(self, data: st.DataObject) -> None:
        """All copies go, pinned or not; a moved or pinned row becomes a zombie."""
        id = self.pick(data)
        for level in list(self.model[id]):
            self.residency.drop(self.rows[id], level, evicted=False, force=True)
            del self.model[id][level]
        self.forget(id)

    def forget(self, id: tuple[bytes, bytes]) -> None:
        if not self.model[id]:
            del self.model[id]
            del self.rows[id]

    @invariant()
    def agrees(self) -> None:
        validate(self.residency)
        assert len(self.residency) == len(self.model)
        busy = {row for _, row, _ in self.moves} | set(self.pins)
        assert len(self.residency.rows) == len(set(self.rows.values()) | busy), "a row leaked"
        for (shard, key), where in self.model.items():
            row = self.residency.find("n", shard, key)
            assert row == self.rows[shard, key]
            assert row is not None and self.residency.pinned(row) == (row in self.pins)
            for level in (HOT, HOST, SSD):
                assert self.residency.present(row, level) == (level in where)
                if level in where:
                    assert self.residency.location(row, level) == where[level]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


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
