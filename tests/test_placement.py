"""Homes: a function of the group and the membership alone."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.directory.placement import homes, membership_digest, rank, weight

MEMBERS = [f"worker-{number}" for number in range(10)]
GROUPS = [sha256(bytes([number % 256, number // 256])).digest()[:16] for number in range(2000)]
Names = st.lists(st.text(max_size=5), max_size=8)


def test_weights_are_fixed_for_ever() -> None:
    """Workers of different versions must draw the same homes."""
    assert weight(bytes(16), "worker-0").hex() == "885f0c9cc3ea8597"
    assert homes(bytes(range(16)), None, MEMBERS, 3) == ["worker-8", "worker-2", "worker-5"]
    assert membership_digest(["b", "a"]).hex() == "1550278b40dd7979d6242985eadead9c"


@given(st.permutations(MEMBERS))
def test_the_order_in_which_members_were_learnt_does_not_matter(members: list[str]) -> None:
    assert rank(GROUPS[0], members) == rank(GROUPS[0], MEMBERS)
    assert membership_digest(members) == membership_digest(MEMBERS)


@given(Names, Names)
def test_digests_are_equal_exactly_for_equal_sets(some: list[str], others: list[str]) -> None:
    assert (membership_digest(some) == membership_digest(others)) == (set(some) == set(others))


def test_names_do_not_run_together() -> None:
    assert membership_digest(["ab", "c"]) != membership_digest(["a", "bc"])


def test_the_writer_comes_first_and_only_once() -> None:
    for group in GROUPS[:50]:
        drawn = homes(group, "worker-3", MEMBERS, 3)
        assert drawn[0] == "worker-3" and len(set(drawn)) == 3
        assert drawn[1:] == [member for member in rank(group, MEMBERS) if member != "worker-3"][:2]


def test_a_writer_that_is_no_member_has_no_copy() -> None:
    assert homes(GROUPS[0], "gone", MEMBERS, 2) == homes(GROUPS[0], None, MEMBERS, 2) == rank(GROUPS[0], MEMBERS)[:2]


@pytest.mark.parametrize(("copies", "count"), [(0, 0), (-1, 0), (1, 1), (10, 10), (11, 10)])
def test_as_many_copies_as_there_are_members(copies: int, count: int) -> None:
    assert len(homes(GROUPS[0], "worker-3", MEMBERS, copies)) == count
    assert homes(GROUPS[0], None, [], copies) == []


def test_groups_spread_evenly() -> None:
    first = [homes(group, None, MEMBERS, 1)[0] for group in GROUPS]
    for member in MEMBERS:
        assert 140 < first.count(member) < 260  # 200 expected; four standard deviations are 54


def test_a_member_that_goes_moves_only_its_own_groups() -> None:
    rest = [member for member in MEMBERS if member != "worker-4"]
    for group in GROUPS[:300]:
        before, after = rank(group, MEMBERS), rank(group, rest)
        assert after == [member for member in before if member != "worker-4"]
