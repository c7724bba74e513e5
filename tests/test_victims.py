"""Window and state blocks under pressure: what is left of a hybrid chain can be used."""

from __future__ import annotations

import pytest

from kvstore.policies.base import Lru
from kvstore.residency import residency as subject
from kvstore.residency.check import validate
from kvstore.residency.residency import Residency
from tests.residency_blocks import FULL, HOT, LEVELS, SLIDING, SSD, header_of, key_of, place, put


def held(residency: Residency, shard: bytes, chain: int = 0) -> list[int]:
    """Depths."""
    return [depth for depth in range(20) if residency.find("n", shard, key_of(chain, depth)) is not None]


def served(residency: Residency, window: int, chain: int = 0) -> int:
    """The longest prefix, by the rules of a lookup."""
    full, bounded = held(residency, FULL, chain), held(residency, SLIDING, chain)
    prefix = next((depth for depth in range(20) if depth not in full), 20)
    ends = [n for n in range(1, prefix + 1) if all(d in bounded for d in range(max(0, n - window), n))]
    return max(ends, default=0)


def use(residency: Residency, chain: int, blocks: int, window: int) -> None:
    """As a lookup and a load do: the deepest first, and of the window only what is needed."""
    for shard, first in ((SLIDING, max(0, blocks - window)), (FULL, 0)):
        for depth in range(blocks - 1, first - 1, -1):
            row = residency.find("n", shard, key_of(chain, depth))
            assert row is not None
            residency.touch(row)


def evict(residency: Residency, level: int = SSD) -> tuple[bytes, int]:
    """Shard and depth of the next victim, dropped."""
    row = residency.victim(level)
    assert row is not None
    id = residency.id(row)
    residency.drop(row, level)
    validate(residency)
    return id.shard, int.from_bytes(id.key[8:], "little")


def hybrid(window: int, depths: int, states: list[int] | None = None) -> Residency:
    residency = Residency(LEVELS, Lru, lambda root, shard: window)
    for depth in range(depths):
        put(residency, 0, depth, SSD)
        if states is None or depth in states:
            put(residency, 0, depth, SSD, SLIDING)
    return residency


def test_a_state_outlives_the_blocks_that_need_it() -> None:
    """The only state of a used chain is its oldest block; the prompt's end goes before it, then it goes."""
    residency = hybrid(1, 6, states=[3, 5])
    use(residency, 0, 6, 1)
    assert [evict(residency) for _ in range(3)] == [(SLIDING, 3), (FULL, 5), (SLIDING, 5)]


def test_without_the_rule_the_state_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same history in the policy's plain order: five blocks are left, none of use. So the test above can fail."""
    monkeypatch.setattr(subject, "instead", lambda residency, row, level: row)
    residency = hybrid(1, 6, states=[3, 5])
    use(residency, 0, 6, 1)
    assert [evict(residency) for _ in range(2)] == [(SLIDING, 3), (SLIDING, 5)]
    assert len(held(residency, FULL)) == 6 and served(residency, 1) == 0


def test_an_earlier_state_stays_as_long_as_it_is_the_last() -> None:
    residency = hybrid(1, 8, states=[2])
    use(residency, 0, 3, 1)
    assert [evict(residency) for _ in range(5)] == [(FULL, depth) for depth in (7, 6, 5, 4, 3)]
    assert served(residency, 1) == 3, "nothing that was of use went"
    assert [evict(residency) for _ in range(2)] == [(FULL, 2), (SLIDING, 2)]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_chain_shrinks_without_holes_in_its_last_window(window: int) -> None:
    """Old blocks of the window first, in order; then ends, and what is left is a match as long as there is a window."""
    residency = hybrid(window, 8)
    use(residency, 0, 8, window)
    old = 8 - window
    assert [evict(residency) for _ in range(old)] == [(SLIDING, depth) for depth in range(old)]
    assert served(residency, window) == 8
    assert evict(residency) == (FULL, 7) and evict(residency) == (SLIDING, 7)


def test_a_branch_with_its_own_state_does_not_hold_the_fork_back() -> None:
    """Two prompts fork after block 1: its state is superseded in one of them only, then in both."""
    residency = hybrid(1, 4, states=[1, 3])
    for depth in (2, 3):
        header = header_of(9, depth, parent=key_of(0 if depth == 2 else 9, depth - 1))
        residency.admit("n", header, SSD, place(90 + depth), leaf_first=True)
    assert evict(residency) == (FULL, 3) and held(residency, FULL, 9) == [2], "the end that hangs on the fork's state"
    assert evict(residency) == (FULL, 2) and held(residency, FULL) == [0, 1, 2, 3]
    assert evict(residency) == (SLIDING, 1)
    assert served(residency, 1) == 4


def test_two_chains_go_one_after_the_other() -> None:
    residency = Residency(LEVELS, Lru, lambda root, shard: 1)
    for chain in (0, 1):
        for depth in range(4):
            put(residency, chain, depth, SSD)
        put(residency, chain, 3, SSD, SLIDING)
    for chain in (0, 1):
        use(residency, chain, 4, 1)
    for _ in range(5):
        evict(residency)
    assert served(residency, 1, 1) == 4 and not held(residency, FULL, 0) and not held(residency, SLIDING, 0)


def test_a_pinned_end_and_other_copies_hold_nothing_up() -> None:
    residency = hybrid(1, 2, states=[1])
    use(residency, 0, 2, 1)
    end, state = (residency.find("n", shard, key_of(0, 1)) for shard in (FULL, SLIDING))
    assert end is not None and state is not None
    residency.pin(end)
    assert residency.victim(SSD) == state, "a reader has the end: the state goes rather than nothing"
    residency.unpin(end)
    assert residency.victim(SSD) == end
    residency.mark_secondary(state, True)
    assert residency.victim(SSD) == state, "others keep the state"
    residency.mark_secondary(state, False)
    residency.add(state, HOT, place(70))
    residency.touch(end)
    assert residency.victim(HOT) == state and residency.victim(SSD) == state, "it is not the last copy"


def test_one_of_several_shards_does_not_let_the_state_go() -> None:
    """A key's full-attention block in another shard: the state is next in line when both are gone."""
    residency = hybrid(1, 1)
    other = b"other-full-shard"
    residency.admit("n", header_of(0, 0, other), SSD, place(80), leaf_first=True)
    put(residency, 1, 0, SSD)
    state = residency.find("n", SLIDING, key_of(0, 0))
    assert state is not None
    residency.touch(state)
    assert [evict(residency)[0] for _ in range(2)] == [FULL, other]
    assert residency.victim(SSD) == state, "before chain 1, though used after it"
