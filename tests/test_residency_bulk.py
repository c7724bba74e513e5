"""Many blocks taken in at once: the same residency as one admitted after the other."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import DataError
from kvstore.header import HEADER_BYTES, Header
from kvstore.header_columns import HEADERS, as_bytes, hold, kinds
from kvstore.policies.base import Lru
from kvstore.policies.s3fifo import S3Fifo
from kvstore.residency.admitting import admit_all
from kvstore.residency.bulk import take_in
from kvstore.residency.check import validate
from kvstore.residency.residency import Residency
from kvstore.types import Location
from tests.residency_blocks import FULL, HOST, HOT, LEVELS, SLIDING, SSD, header_of, key_of, place


def packed(headers: list[Header]) -> np.ndarray:
    return np.frombuffer(b"".join(header.pack() for header in headers), HEADERS)


def columns(places: list[Location]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    segments, offsets, lengths = zip(*((p.segment, p.offset, p.length) for p in places), strict=True)
    return np.array(segments), np.array(offsets, np.uint64), np.array(lengths, np.uint64)


def blocks_of(rng: Random, shard: bytes) -> list[Header]:
    """Chains in any order, with holes, branches, and some that claim a parent they can't have."""
    names = [(chain, depth) for chain in range(6) for depth in range(8) if rng.random() < 0.8]
    rng.shuffle(names)
    found = []
    for chain, depth in names:
        header = header_of(chain, depth, shard)
        if depth and rng.random() < 0.2:
            header = header_of(chain, depth, shard, parent=key_of(rng.randrange(6), rng.randrange(8)))
        found.append(replace(header, root=bytes([65 + chain % 2]) * 16, copy_id=chain << 8 | depth))
    return found


def both(seed: int, policy: type[Lru] | type[S3Fifo], level: int) -> tuple[Residency, Residency]:
    rng = Random(seed)
    one, other = Residency(LEVELS, policy), Residency(LEVELS, policy)
    for shard in (FULL, SLIDING):
        headers = blocks_of(rng, shard)
        places = [place(number, 1 + rng.randrange(9000)) for number in range(len(headers))]
        leaf_first = [shard == FULL and rng.random() < 0.9 for _ in headers]
        for header, where, leaf in zip(headers, places, leaf_first, strict=True):
            one.admit("n", header, level, where, leaf_first=leaf)
        take_in(other, "n", packed(headers), level, columns(places), np.array(leaf_first))
    return one, other


@pytest.mark.parametrize("level", [HOT, HOST, SSD])
@pytest.mark.parametrize("policy", [Lru, S3Fifo])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_as_one_after_the_other(seed: int, policy: type[Lru] | type[S3Fifo], level: int) -> None:
    one, other = both(seed, policy, level)
    validate(other)
    assert (one.used, one.raw_bytes, one.blocks) == (other.used, other.raw_bytes, other.blocks)
    assert any(one.rows.orphan) and any(one.rows.child[row] >= 0 for row in one.rows), "the case has no families"
    for shard in (FULL, SLIDING):
        mine, theirs = one.keys("n", shard), other.keys("n", shard)
        assert set(mine) == set(theirs) and len(mine) == len(theirs)
        for key, row in mine.items():
            twin = theirs[key]
            assert one.header(row) == other.header(twin) and one.fidelity(row) == other.fidelity(twin)
            assert one.location(row, level) == other.location(twin, level) and other.top(twin) == level
            assert {one.id(child) for child in one.rows.children(row)} == {
                other.id(child) for child in other.rows.children(twin)
            }
    while (row := one.victim(level, force=True)) is not None:
        twin = other.victim(level, force=True)
        assert twin is not None and one.id(row) == other.id(twin)
        one.drop(row, level)
        other.drop(twin, level)
    assert len(other) == len(other.rows) == 0


def test_life_goes_on_after_it() -> None:
    _, other = both(3, Lru, SSD)
    for depth in range(20):
        row = other.admit("n", header_of(9, depth), HOT, place(depth), leaf_first=True)
        other.touch(row)
        validate(other)
    for key in [key_of(chain, depth) for chain in range(10) for depth in range(20)]:
        found = other.find("n", FULL, key)
        assert found is None or other.id(found).key == key
    with pytest.raises(AssertionError, match="has blocks already"):
        take_in(other, "n", packed([header_of(50, 0)]), SSD, columns([place(1)]), np.array([True]))


header_bytes = st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES)


@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), max_size=4), st.booleans())
def test_the_same_headers_hold(changes: list[tuple[int, int]], encoded: bool) -> None:
    header = header_of(1, 1)
    if encoded:
        header = replace(header, chunk_count=3, stored_length=5000)
    content = bytearray(header.pack())
    for at, value in changes:
        content[at] = value
    try:
        Header.unpack(bytes(content), checked=True)
        holds = True
    except DataError:
        holds = False
    assert hold(np.frombuffer(bytes(content), HEADERS)).tolist() == [holds]


@pytest.mark.parametrize("stored", [280, 281, 10_280, 10_281, 1 << 62])
@pytest.mark.parametrize("raw", [0, 1, 10_000, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("chunks", [0, 3, 1 << 20, (1 << 32) - 1])
def test_lengths_at_their_bounds(stored: int, raw: int, chunks: int) -> None:
    content = replace(header_of(1, 1), stored_length=stored, raw_length=raw, chunk_count=chunks).pack()
    try:
        Header.unpack(content, checked=True)
        holds = True
    except DataError:
        holds = False
    assert hold(np.frombuffer(content, HEADERS)).tolist() == [holds]


def test_digests_as_bytes() -> None:
    headers = packed([header_of(chain, 2, shard) for chain in range(3) for shard in (FULL, SLIDING)])
    assert as_bytes(headers["key"])[2] == key_of(1, 2)
    assert as_bytes(headers["key"], headers["shard"])[3] == key_of(1, 2) + SLIDING
    groups = kinds(headers["shard"], headers["root"])
    assert [(digests[0], at.tolist()) for digests, at in groups] == [(FULL, [0, 2, 4]), (SLIDING, [1, 3, 5])]


@pytest.mark.parametrize("policy", [Lru, S3Fifo])
def test_blocks_admitted_together_are_what_they_are_one_by_one(policy: type[Lru] | type[S3Fifo]) -> None:
    """Into a shard that has blocks: children and parents of theirs, before and after them, and in one call."""
    for seed in range(30):
        rng = Random(seed)
        one, other = Residency(LEVELS, policy), Residency(LEVELS, policy)
        for shard in (FULL, SLIDING):
            headers = blocks_of(rng, shard)
            while headers:
                some, headers = headers[:5], headers[5:]
                places = [place(rng.randrange(1000), 1 + rng.randrange(9000)) for _ in some]
                for header, where in zip(some, places, strict=True):
                    one.admit("n", header, HOT, where, leaf_first=shard == FULL)
                admit_all(other, "n", some, HOT, places, leaf_first=shard == FULL)
                validate(other)
                if rng.random() < 0.3 and (row := one.victim(HOT)) is not None:
                    assert other.victim(HOT) == row
                    one.drop(row, HOT)
                    other.drop(row, HOT)
        for name in (
            "present",
            "depth",
            "raw",
            "parent",
            "child",
            "next",
            "prev",
            "same",
            "orphan",
            "fidelity",
            "root",
        ):
            assert getattr(one.rows, name) == getattr(other.rows, name), name
        assert one.rows.below == other.rows.below and one.rows.records == other.rows.records
        assert (one.used, one.held, one.raw_bytes, one.blocks) == (
            other.used,
            other.held,
            other.raw_bytes,
            other.blocks,
        )


def test_each_of_many_is_told_of_after_those_before_it_and_before_its_policy() -> None:
    residency, told = Residency(LEVELS, Lru), list[tuple[int, int]]()

    def coming(header: Header) -> None:
        told.append((header.depth, sum(map(residency.policies[HOT].holds, residency.rows))))
        assert (residency.find("n", FULL, header.parent) is not None) == (header.depth > 0)

    headers = [header_of(0, depth) for depth in range(4)]
    admit_all(residency, "n", headers, HOT, [place(depth) for depth in range(4)], leaf_first=True, coming=coming)
    assert told == [(0, 0), (1, 1), (2, 2), (3, 3)]
    validate(residency)
