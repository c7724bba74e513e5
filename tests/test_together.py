"""Blocks opened and landed in compiled loops: the same as one by one, and nothing but what was asked for arrives."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client.bulk import raw_row
from kvstore.header import short_check
from kvstore.kernels import landing
from kvstore.open_rows import FOUND, LATER, MISSING, OPEN_ROWS, WORDS, short_checks
from kvstore.store import opening, together
from kvstore.store.arena import UNIT_BYTES
from kvstore.types import Fidelity, Keys, Tier, pack_keys
from kvstore.wanted import Wanted
from tests.service_cluster import blocks_of
from tests.service_helpers import FULL, prompt
from tests.worker_met import WHOLE, meeting


async def test_together_and_one_by_one_say_and_keep_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are there, twice, of another model, and not at all; and what is left of it when both have ended."""
    together.prepare()
    async with meeting(tmp_path) as met:
        prefix, other = prompt(10, 5), prompt(11, 1)
        client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
        await client.put(FULL, prefix, blocks_of(prefix))
        store = met.worker.store
        rows = store.stack.residency.rows
        keys = Keys(pack_keys([*prefix.keys, other.keys[0], prefix.keys[2]]))
        for root in (FULL.root, b"another model!!!"):
            found = []
            for compiled in (True, False):
                monkeypatch.setattr(opening, "prepared", lambda compiled=compiled: compiled)
                hold = await store.open("default", root, Wanted([(WHOLE.digest, keys)]), least=Fidelity.EXACT)
                pins = sorted(rows.pins[row] for row in rows)
                held = sum(sum(segment.held) for segment in store.arena.segments())
                found.append((hold.rows.tobytes(), dict(hold.segments), pins, held))
                store.release(hold.id)
                assert not any(rows.pins) and not any(any(segment.held) for segment in store.arena.segments())
            assert found[0] == found[1]
            states = np.frombuffer(found[0][0], OPEN_ROWS)["state"].tolist()
            there = [FOUND] * 5 + [MISSING, FOUND] if root == FULL.root else [MISSING] * 7
            assert states == there and found[0][3] == there.count(FOUND)


async def test_what_is_freed_under_a_hold_is_given_back_at_its_end(tmp_path: Path) -> None:
    together.prepare()
    async with meeting(tmp_path) as met:
        prefix, store = prompt(12, 4), met.worker.store
        client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
        await client.put(FULL, prefix, blocks_of(prefix))
        wanted = [(WHOLE.digest, key) for key in prefix.keys]
        first, second = [await store.open("default", FULL.root, wanted, least=Fidelity.EXACT) for _ in range(2)]
        views = [placed.view.tobytes() for placed in first.blocks if placed is not None]
        assert store.purge("default") == 4 and store.arena.waits
        store.release(first.id)
        assert store.arena.waits and [placed.view.tobytes() for placed in second.blocks if placed is not None] == views
        store.release(second.id)
        assert not store.arena.waits and store.arena.used == 0


def test_wanted_is_the_sequence_of_its_pairs() -> None:
    keys = [bytes([number]) * 16 for number in range(5)]
    pairs = [(b"a" * 16, keys[0]), (b"a" * 16, keys[1]), (b"b" * 16, keys[2]), (b"a" * 16, keys[3])]
    wanted = Wanted.of(pairs)
    assert list(wanted) == pairs and len(wanted) == 4 and wanted[2] == pairs[2] and wanted[1:3] == pairs[1:3]
    assert [list(wanted.first(count)) for count in range(1, 6)] == [pairs[:count] for count in range(1, 6)]
    with pytest.raises(IndexError):
        wanted[4]


class Lane:
    """Blocks of 64 KiB in one segment of plain memory, and rows that name them."""

    def __init__(self, count: int, cuts: Sequence[int] = ()) -> None:
        """`cuts`: where the copy of all bytes is cut in two."""
        self.count, self.cuts = count, cuts
        self.segment = np.zeros(4096 + count * UNIT_BYTES, np.uint8)
        self.generations = self.segment[: 8 * count].view(np.uint64)
        self.data = self.segment[4096:].reshape(count, UNIT_BYTES)
        self.table = np.array([[7, self.segment.ctypes.data, self.segment.nbytes, 4096, 16]], np.uint64)
        self.names = (b"r" * 16, b"n" * 16, b"s" * 16, 64, UNIT_BYTES)
        self.keys = np.arange(2 * count, dtype=np.uint64).reshape(count, 2)
        self.into = np.zeros((count, UNIT_BYTES), np.uint8)
        self.places = np.array(
            [[block, 0, UNIT_BYTES, self.into[block].ctypes.data] for block in range(count)], np.uint64
        )

    def rows(self, **changes: Any) -> Any:
        template, fixed = raw_row(*self.names)
        rows = np.repeat((template & fixed).reshape(1, WORDS), self.count, axis=0).view(OPEN_ROWS)[:, 0]
        rows["state"], rows["raw"], rows["tier"], rows["segment"] = FOUND, 1, int(Tier.HOT), 7
        rows["offset"] = 4096 + UNIT_BYTES * np.arange(self.count)
        rows["generation"] = self.generations
        rows["header"]["key"], rows["header"]["computed_on"], rows["header"]["stored"] = self.keys, 3, 3
        for name, value in changes.items():
            target = rows if name in OPEN_ROWS.names else rows["header"]
            target[name] = value
        rows["header"]["check"] = short_checks(rows)
        return rows

    def land(self, rows: Any) -> list[int]:
        template, fixed = raw_row(*self.names)
        bounds = np.array([Fidelity.EXACT, max(Fidelity), max(Tier)], np.int64)
        outcomes, sources = np.full(self.count, -1, np.int64), np.empty((self.count, 2), np.uint64)
        words = np.ascontiguousarray(rows).view(np.uint64).reshape(-1, WORDS)
        landing.check(words, self.keys, template, fixed, bounds, self.table, sources, outcomes)
        ends = np.cumsum(self.places[:, 2]).view(np.int64)
        cuts = [0, *self.cuts, int(ends[-1])]
        for first, last in reversed(list(itertools.pairwise(cuts))):
            landing.copy(self.places, ends, sources, outcomes, first, last)
        landing.reused(words, sources, outcomes)
        found: list[int] = outcomes.tolist()
        return found


@pytest.mark.parametrize("cuts", [(), (1,), (UNIT_BYTES,), (5, UNIT_BYTES - 1, UNIT_BYTES + 1, 3 * UNIT_BYTES - 63)])
@pytest.mark.parametrize("count", [3, 70])  # the larger one goes past the caches
def test_blocks_land_where_they_are_wanted(count: int, cuts: tuple[int, ...]) -> None:
    lane = Lane(count, cuts)
    lane.data[:] = np.random.default_rng(1).integers(0, 256, lane.data.shape, np.uint8)
    assert lane.land(lane.rows()) == [landing.ARRIVED] * count
    assert np.array_equal(lane.into, lane.data)


def test_pieces_of_blocks_land_where_they_are_wanted() -> None:
    """Pages of an engine: a block goes to several places."""
    lane = Lane(2, (3, 40_000, UNIT_BYTES + 20_000))
    lane.data[:] = np.random.default_rng(3).integers(0, 256, lane.data.shape, np.uint8)
    size = UNIT_BYTES // 4
    pages = np.zeros((8, size), np.uint8)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    lane.places = np.array([[at // 4, at % 4 * size, size, pages[order[at]].ctypes.data] for at in range(8)], np.uint64)
    assert lane.land(lane.rows()) == [landing.ARRIVED] * 2
    assert np.array_equal(pages[order].reshape(lane.data.shape), lane.data)


@pytest.mark.parametrize(
    ("outcome", "changes"),
    [
        (landing.MISSING, {"state": MISSING}),
        (landing.LATER, {"state": LATER}),
        (landing.ENCODED, {"raw": 0}),
        (landing.UNMAPPED, {"segment": 8}),
        (landing.UNMAPPED, {"offset": 4095}),
        (landing.UNMAPPED, {"offset": 4097 + 2 * UNIT_BYTES}),
        (landing.UNMAPPED, {"offset": (1 << 64) - 4096}),
        (landing.REUSED, {"generation": 1}),
        (landing.STRANGE, {"tier": 0}),
        (landing.STRANGE, {"tier": 9}),
        (landing.STRANGE, {"length": UNIT_BYTES - 1}),
        (landing.STRANGE, {"raw_length": UNIT_BYTES - 1}),
        (landing.STRANGE, {"key": 99}),
        (landing.STRANGE, {"root": 99}),
        (landing.STRANGE, {"namespace": 99}),
        (landing.STRANGE, {"shard": 99}),
        (landing.STRANGE, {"computed_on": 2}),
        (landing.STRANGE, {"stored": 4}),
        (landing.STRANGE, {"flags": 1}),
        (landing.STRANGE, {"version": 2}),
    ],
)
def test_a_row_that_is_not_as_asked_for_brings_nothing(outcome: int, changes: dict[str, int]) -> None:
    lane = Lane(3)
    lane.data[:] = 1
    assert lane.land(lane.rows(**changes)) == [outcome] * 3
    assert not lane.into.any() or outcome == landing.REUSED


def test_a_header_whose_check_fails_brings_nothing() -> None:
    lane = Lane(2)
    lane.data[:] = 1
    rows = lane.rows()
    rows["header"]["check"][0] ^= 1
    assert lane.land(rows) == [landing.STRANGE, landing.ARRIVED] and not lane.into[0].any()


def test_the_compiled_short_check_is_the_formats() -> None:
    rng, lane = np.random.default_rng(2), Lane(1)
    for _ in range(50):
        rows = lane.rows()
        rows["header"]["parent"], rows["header"]["copy_id"] = rng.integers(0, 1 << 63, 2), rng.integers(0, 1 << 63)
        rows["header"]["check"] = short_check(rows["header"][0].tobytes())
        assert lane.land(rows) == [landing.ARRIVED]


def test_what_is_overwritten_while_it_lands_never_arrives() -> None:
    """The owner bumps the generation, writes, and tells of it: whatever is said to have arrived is of one writing."""
    lane, stop, told = Lane(4), threading.Event(), [0]

    def owner() -> None:
        while not stop.is_set():
            lane.generations[:] += np.uint64(1)
            lane.data[:] = (told[0] + 1) % 250
            told[0] += 1

    thread = threading.Thread(target=owner)
    thread.start()
    try:
        outcomes = []
        for _ in range(2000):
            found = lane.land(lane.rows(generation=told[0]))
            outcomes += found
            for block, outcome in zip(lane.into, found, strict=True):
                assert outcome == landing.REUSED or (block == block[0]).all()
            if {landing.REUSED, landing.ARRIVED} <= set(outcomes) and len(outcomes) > 800:
                break
    finally:
        stop.set()
        thread.join()
    assert landing.REUSED in outcomes  # the control: it did happen
