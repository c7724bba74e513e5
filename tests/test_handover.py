"""A residency at work gets other policies: nothing is lost, and what would have left first still does. And what one
block is worth beside another, over all levels."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from random import Random

import pytest

from kvstore.policies.base import Lru, make_policies
from kvstore.policies.usage import Hint, Use
from kvstore.residency import handover
from kvstore.residency.check import validate
from kvstore.residency.residency import Residency
from kvstore.residency.victims import margin
from kvstore.types import Location
from tests.residency_blocks import HOST, HOT, LEVELS, ROOT, SSD, header_of, place


def key(chain: int, depth: int) -> bytes:
    """As uniform as keys are: policies know a block by half of it."""
    return sha256(bytes([chain, depth])).digest()[:16]


def put(residency: Residency, chain: int, depth: int, level: int) -> int:
    parent = key(chain, depth - 1) if depth else ROOT
    header = replace(header_of(chain, depth, parent=parent), key=key(chain, depth))
    return residency.admit("n", header, level, place(len(residency)), leaf_first=True)


def filled(seed: int) -> Residency:
    """Chains at three levels, some blocks in two, some secondary, in a random order of use."""
    rng, residency = Random(seed), Residency(LEVELS, Lru)
    for chain in range(40):
        rows = [put(residency, chain, depth, rng.choice((HOT, HOST, SSD))) for depth in range(rng.randrange(1, 5))]
        for row in rows:
            if rng.random() < 0.3 and not residency.present(row, SSD):
                residency.add(row, SSD, Location(2, row * 8192, 5000))
            if rng.random() < 0.1:
                residency.mark_secondary(row, True)
    for _ in range(60):
        residency.touch(rng.choice([row for row, used in enumerate(residency.rows.used) if used]))
    return residency


def leaving(residency: Residency, level: int) -> list[int]:
    """Victims of a level in order, each given up there."""
    found = []
    while (row := residency.victim(level)) is not None:
        residency.drop(row, level)
        found.append(row)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", [HOT, HOST, SSD])
def test_the_order_stays(monkeypatch: pytest.MonkeyPatch, seed: int, level: int) -> None:
    monkeypatch.setattr(handover, "REQUEST_BLOCKS", 1)
    residency, twin = filled(seed), filled(seed)
    handover.hand_over(residency, make_policies("default", len(LEVELS)), 5.0)
    validate(residency)
    assert type(residency.policies[0]) is not Lru and type(twin.policies[0]) is Lru
    found, before = leaving(residency, level), leaving(twin, level)
    assert sorted(found) == sorted(before) and found
    assert level != HOT or found == before  # below, what lies in a faster level too leaves later than it did
    validate(residency)


def test_what_comes_and_goes_afterwards_is_decided_by_the_new_ones() -> None:
    residency = filled(9)
    before = residency.policies[HOST]
    handover.hand_over(residency, make_policies("default", len(LEVELS)), 5.0)
    row = put(residency, 200, 0, HOST)
    assert residency.policies[HOST].holds(row) and not before.holds(row)
    residency.drop(row, HOST)
    assert not residency.policies[HOST].holds(row)
    assert residency.find("n", header_of(200, 0).shard, key(200, 0)) is None
    validate(residency)


def test_a_block_is_worth_more_or_less_than_the_next_to_leave_a_level() -> None:
    residency = Residency(LEVELS, iter(make_policies("default", len(LEVELS))).__next__)
    policy = residency.policies[0]
    rows = []
    for chain, (level, hint) in enumerate(
        ((HOT, Hint(reuse_s=1.0)), (HOST, Hint(reuse_s=5.0)), (HOT, Hint(ended=True)))
    ):
        policy.begin(Use(), float(chain))
        rows.append(put(residency, chain, 0, level))
        residency.policies[level].hint(rows[-1], hint)
    soon, later, never = rows
    assert (margin(residency, soon, HOST) or 0) > 0  # would stay there longer than what is there
    assert (margin(residency, never, HOST) or 0) < 0  # would be the next to leave
    assert margin(residency, later, HOST) == 0
    assert margin(residency, soon, SSD) is None  # nobody is there
    residency.mark_secondary(later, True)
    assert margin(residency, never, HOST) is None  # others keep that one: it leaves whatever comes
    plain = Residency(LEVELS, Lru)
    assert margin(plain, put(plain, 1, 0, HOT), HOT) is None  # recency alone tells no worth
