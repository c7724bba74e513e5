"""Which groups have too few or too many copies, and who is told: single cases, and any fleet whatever the views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.directory.placement import rank
from kvstore.directory.popular import Popular
from kvstore.directory.replicas import Copies, Fleet, Mark, Pull, Replicas
from kvstore.directory.runs import Run
from kvstore.types import KEY_BYTES, Fidelity, Tier

ROOT, SHARD = b"r" * KEY_BYTES, b"s" * KEY_BYTES
AGAIN_S = 10.0

Content = dict[str, set[bytes]]


def key(group: int, index: int) -> bytes:
    return bytes([group, index]) * (KEY_BYTES // 2)


def run(group: int, indices: Sequence[int]) -> Run:
    keys = tuple(key(group, index) for index in indices)
    return Run(ROOT, SHARD, Tier.HOST, Fidelity.EXACT, ROOT, 0, keys, key(group, 0), 100)


def fleet(*members: str) -> Fleet:
    return Fleet(dict.fromkeys(members), dict.fromkeys(members))


def shares(content: Content):
    def ask(shard: bytes, keys: Sequence[bytes]) -> Mapping[str, int]:
        bits = {name: sum(1 << i for i, one in enumerate(keys) if one in mine) for name, mine in content.items()}
        return {name: mask for name, mask in bits.items() if mask}

    return ask


def made(copies: Copies, groups: Mapping[int, int], popular: Popular | None = None) -> Replicas:
    """Knows groups of so many blocks."""
    replicas = Replicas(copies, groups_max=1000, again_s=AGAIN_S, popular=popular)
    for group, blocks in groups.items():
        replicas.learn(run(group, range(blocks)))
    return replicas


def look(replicas: Replicas, content: Content, seen: Fleet, now: float = 0.0, budget: int = 1000) -> list[Pull | Mark]:
    found = replicas.look(shares(content), seen, now, budget)
    replicas.validate()
    return found


def keys_of(hint: Pull | Mark) -> set[bytes]:
    return {hint.keys[at : at + KEY_BYTES] for at in range(0, len(hint.keys), KEY_BYTES)}


def obey(hints: Sequence[Pull | Mark], content: Content, marks: Content) -> None:
    """What workers do about hints, when all goes well."""
    for hint in hints:
        if isinstance(hint, Pull):
            given = set().union(*(content[source] & keys_of(hint) for source in hint.sources if source in content))
            content.setdefault(hint.to, set()).update(given)
        elif hint.secondary:
            marks.setdefault(hint.to, set()).update(keys_of(hint))
        else:
            marks.setdefault(hint.to, set()).difference_update(keys_of(hint))


# --- single cases --------------------------------------------------------------------------------------------------


def test_the_highest_ranked_who_lacks_a_copy_is_told_once() -> None:
    members = ["a", "b", "c", "d"]
    replicas = made(Copies(2), {1: 4})
    content = {"a": {key(1, i) for i in range(4)}}
    [hint] = look(replicas, content, fleet(*members))
    assert isinstance(hint, Pull)
    assert hint.to == next(name for name in rank(key(1, 0), members) if name != "a")
    assert (keys_of(hint), hint.sources) == (content["a"], ("a",))
    assert replicas.waiting, "it is to be looked at once more, whatever else happens"
    assert look(replicas, content, fleet(*members), AGAIN_S / 2) == [], "told already"
    assert look(replicas, content, fleet(*members), 1.5 * AGAIN_S) == [hint], "told again: it did not happen"


def test_nothing_is_told_while_a_holder_is_only_suspect() -> None:
    content = {"a": {key(1, 0)}, "b": {key(1, 0)}}
    replicas = made(Copies(2), {1: 1})
    suspect = Fleet(dict.fromkeys(("a", "b", "c")), dict.fromkeys(("a", "c")))
    assert look(replicas, content, suspect) == []
    replicas.changed(1.0)
    [hint] = look(replicas, {"a": {key(1, 0)}}, fleet("a", "c"), 1.0)
    assert isinstance(hint, Pull) and hint.to == "c"


def test_copies_of_one_who_drains_do_not_count_but_are_read() -> None:
    replicas = made(Copies(1, 2, 1), {1: 1})  # 1 byte of hot copies: none
    drains = Fleet(dict.fromkeys(("b", "c")), dict.fromkeys(("a", "b", "c")))
    [hint] = look(replicas, {"a": {key(1, 0)}}, drains)
    assert isinstance(hint, Pull) and hint.sources == ("a",)


def test_copies_beyond_the_wanted_number_are_secondary_until_one_is_lost() -> None:
    members = ["a", "b", "c"]
    order = rank(key(1, 0), members)
    content = {name: {key(1, 0)} for name in members}
    replicas = made(Copies(2), {1: 1})
    [mark] = look(replicas, content, fleet(*members))
    assert mark == Mark(order[2], SHARD, key(1, 0), True)
    replicas.again()
    assert look(replicas, content, fleet(*members)) == [], "told already"
    del content[order[0]]  # evicted there, though still a member
    replicas.again()
    assert Mark(order[2], SHARD, key(1, 0), False) in look(replicas, content, fleet(*members))


def test_a_look_costs_no_more_than_its_budget() -> None:
    replicas = made(Copies(2), dict.fromkeys(range(100), 2))
    content = {"a": {key(group, i) for group in range(100) for i in range(2)}}
    asked = []

    def ask(shard: bytes, keys: Sequence[bytes]) -> Mapping[str, int]:
        asked.append(keys)
        return shares(content)(shard, keys)

    for turn in range(1, 11):
        assert len(replicas.look(ask, fleet("a", "b"), 0.0, 10)) == 10
        assert len(asked) == 10 * turn
    assert replicas.look(ask, fleet("a", "b"), 0.0, 10) == []


def test_ranking_many_members_counts_against_the_budget() -> None:
    members = [f"w{i}" for i in range(320)]
    replicas = made(Copies(2), dict.fromkeys(range(100), 1))
    content = {"w0": {key(group, 0) for group in range(100)}}
    assert len(replicas.look(shares(content), fleet(*members), 0.0, 22)) == 2


def test_what_nobody_holds_any_more_is_forgotten_after_a_while() -> None:
    replicas = made(Copies(2), {1: 2, 2: 1})
    content = {"a": {key(1, 1)}, "b": {key(1, 1)}}
    for now in range(0, 61, 10):
        look(replicas, content, fleet("a", "b"), float(now))
    assert len(replicas) == 1, "a snapshot that is on its way shows late: not at once"


def test_groups_beyond_the_bound_are_left_alone() -> None:
    replicas = Replicas(Copies(2), groups_max=2, again_s=AGAIN_S)
    for group in range(5):
        replicas.learn(run(group, [0]))
    assert (len(replicas), replicas.refused) == (2, 3)


def test_hot_prefixes_get_more_copies_within_their_bytes() -> None:
    popular = Popular(100, 3, 60.0)
    replicas = made(Copies(1, hot_copies=3, hot_bytes=450), {1: 2, 2: 2}, popular)  # one group's two more take 400
    content = {"a": {key(group, i) for group in (1, 2) for i in range(2)}}
    members = fleet("a", "b", "c")
    assert look(replicas, content, members) == [], "nobody asks for them"
    for group in (1, 2):
        for _ in range(3):
            for risen in popular.ask([key(group, 0)]):
                replicas.asked(risen)
    hints = look(replicas, content, members)
    assert {hint.to for hint in hints} == {"b", "c"} and {hint.group for hint in hints if isinstance(hint, Pull)} == {
        key(1, 0)
    }
    obey(hints, content, {})
    popular.tick(0.0)
    for cooled in popular.tick(61.0):
        replicas.asked(cooled)
    marks = look(replicas, content, members, 61.0)
    assert len(marks) == 2 and all(isinstance(mark, Mark) and mark.secondary for mark in marks), "what cooled may go"
    assert replicas.hot_bytes == 0


def test_popular_counts_a_bounded_number_of_groups() -> None:
    popular = Popular(10, 5, 60.0)
    for _ in range(20):
        popular.ask([b"hot"])
    for i in range(1000):
        popular.ask([f"{i}".encode(), b"hot"])
    assert popular.hot(b"hot") and len(popular._counts) <= 10
    assert not popular.hot(b"7")


@pytest.mark.parametrize("wanted", [Copies(1), Copies(1, 3, 0), Copies(2, 1, 100)])
def test_one_copy_wants_nothing_unless_told(wanted: Copies) -> None:
    assert wanted.wanted == (wanted.copies > 1)


# --- any fleet, any views ------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d", "e"]
contents = st.dictionaries(
    st.sampled_from(NAMES), st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12), min_size=1
)
views = st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=3)


def settle(copies: int, content: Content, seen: Sequence[set[str]]) -> tuple[Content, int]:
    """Coordinators with these views look and workers obey until nobody says anything; what is marked, pulls."""
    marks: Content = {}
    coordinators = []
    for _ in seen:
        replicas = Replicas(Copies(copies), groups_max=1000, again_s=AGAIN_S)
        for held in content.values():
            for one in sorted(held):
                replicas.learn(run(one[0], [one[1]]))
        coordinators.append(replicas)
    pulls, said, now = 0, True, 0.0
    while said:
        said = False
        now += 2 * AGAIN_S
        assert now < 40 * AGAIN_S, "they never agree"
        for replicas, members in zip(coordinators, seen, strict=True):
            replicas.again()
            known = {name: held for name, held in content.items() if name in members}
            for hint in look(replicas, known, fleet(*sorted(members)), now):
                assert hint.to in members
                if isinstance(hint, Pull):
                    assert all(content[source] & keys_of(hint) for source in hint.sources), "a source without a block"
                    pulls += 1
                said = True
                obey([hint], content, marks)
    return marks, pulls


@given(contents, st.sets(st.sampled_from(NAMES), min_size=1), st.integers(2, 3))
def test_equal_views_agree_and_dropping_every_secondary_copy_leaves_the_wanted_number(
    start: Mapping[str, set[tuple[int, int]]], members: set[str], copies: int
) -> None:
    content = {name: {key(*block) for block in blocks} for name, blocks in start.items() if name in members}
    everything = set().union(*content.values()) if content else set()
    marks, _ = settle(copies, content, [members, members])
    for name, marked in marks.items():
        content[name] -= marked
    for block in everything:
        assert sum(block in held for held in content.values()) == min(copies, len(members))


@given(contents, views, st.integers(2, 3))
def test_split_views_cost_copies_and_never_invent_or_lose_any_by_themselves(
    start: Mapping[str, set[tuple[int, int]]], seen: list[set[str]], copies: int
) -> None:
    content = {name: {key(*block) for block in blocks} for name, blocks in start.items()}
    before = {name: set(held) for name, held in content.items()}
    everything = set().union(*content.values())
    settle(copies, content, seen)
    assert set().union(*content.values()) == everything
    for name, held in before.items():
        assert content[name] >= held, "a hint took something away"
    for block in everything:
        now = sum(block in held for held in content.values())
        was = sum(block in held for held in before.values())
        assert now - was <= copies * len(seen), "each view costs its own copies at most"
