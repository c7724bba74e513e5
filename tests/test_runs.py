"""Runs say exactly what the blocks say, in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.directory.runs import (
    Added,
    Change,
    Removed,
    RemovedRun,
    Run,
    RunChange,
    blocks_of,
    count_blocks,
    in_chain_order,
    tail,
    to_run_changes,
    to_runs,
)
from kvstore.spec import Shard
from kvstore.types import Fidelity, Tier
from tests.cluster_model import FULL, chain, halves

GROUP_BLOCKS = 4
KEYS = chain(FULL, 10)
WHOLE = Shard.whole(FULL)


def block(depth: int, *, shard: Shard = WHOLE, tier: Tier = Tier.HOT, keys: list[bytes] = KEYS, size: int = 9) -> Added:
    parent = keys[depth - 1] if depth else FULL.root
    group = keys[depth // GROUP_BLOCKS * GROUP_BLOCKS]
    return Added(FULL.root, shard.digest, keys[depth], parent, group, depth, tier, Fidelity.EXACT, size)


def single(changes: list[RunChange]) -> list[Change]:
    """Blocks of run changes."""
    found: list[Change] = []
    for change in changes:
        found += blocks_of(change) if isinstance(change, Run) else [Removed(change.shard, key) for key in change.keys]
    return found


def test_a_chain_becomes_a_run_per_placement_group() -> None:
    runs = to_runs(map(block, range(10)))
    assert [(run.first_depth, len(run.keys)) for run in runs] == [(0, 4), (4, 4), (8, 2)]
    assert [run.parent for run in runs] == [FULL.root, KEYS[3], KEYS[7]]
    assert [run.group for run in runs] == [KEYS[0], KEYS[4], KEYS[8]]
    assert single(list(runs)) == [block(depth) for depth in range(10)]


@pytest.mark.parametrize(
    "other",
    [
        replace(block(1), tier=Tier.SSD),
        replace(block(1), fidelity=Fidelity.NEAR),
        replace(block(1), shard=halves(FULL)[0].digest),
        replace(block(1), root=bytes(16)),
        replace(block(1), group=KEYS[1]),
        replace(block(1), depth=2),
        block(2),
        block(1, keys=chain(FULL, 3, b"other")),
    ],
)
def test_whatever_differs_begins_another_run(other: Added) -> None:
    assert len(to_runs([block(0), block(1)])) == 1  # the control
    assert [len(run.keys) for run in to_runs([block(0), other])] == [1, 1]


def test_stored_bytes_are_the_mean_rounded_up() -> None:
    assert to_runs([block(0, size=10), block(1, size=11)])[0].stored_bytes == 11
    assert to_runs([block(0, size=10), block(1, size=10)])[0].stored_bytes == 10


def test_no_blocks_no_runs() -> None:
    assert to_runs([]) == [] and to_run_changes([]) == [] and in_chain_order([]) == []


def test_removals_end_a_run_and_merge_by_shard() -> None:
    left, right = (shard.digest for shard in halves(FULL))
    changes = [block(0), Removed(left, KEYS[5]), Removed(left, KEYS[2]), Removed(right, KEYS[2]), block(1)]
    assert to_run_changes(changes)[1:3] == [RemovedRun(left, (KEYS[5], KEYS[2])), RemovedRun(right, (KEYS[2],))]
    assert single(to_run_changes(changes)) == changes
    assert to_runs([block(0)]) == [change for change in to_run_changes(changes) if isinstance(change, Run)][:1]


Blocks = st.builds(
    block,
    st.integers(0, 9),
    shard=st.sampled_from([WHOLE, halves(FULL)[0]]),
    tier=st.sampled_from([Tier.HOT, Tier.SSD]),
    keys=st.sampled_from([KEYS, KEYS[:5] + chain(FULL, 5, b"branch")]),
)
Changes = st.lists(Blocks | st.builds(Removed, st.just(WHOLE.digest), st.sampled_from(KEYS)), max_size=20)


@settings(max_examples=100, deadline=None)
@given(Changes, st.integers(0, 22))
def test_runs_keep_every_change_in_order_and_a_tail_its_end(changes: list[Change], skip: int) -> None:
    merged = to_run_changes(changes)
    assert single(merged) == changes
    assert count_blocks(merged) == len(changes)
    assert single(tail(merged, skip)) == changes[skip:]


@settings(max_examples=100, deadline=None)
@given(
    st.permutations([block(depth, shard=shard) for shard in halves(FULL) for depth in range(10)]), st.integers(0, 20)
)
def test_chain_order_merges_best(blocks: list[Added], count: int) -> None:
    assert len(to_runs(in_chain_order(blocks))) == 6
    some = in_chain_order(blocks[:count])
    assert sorted(some, key=blocks.index) == blocks[:count]


def test_chain_order_loses_nothing_in_a_loop() -> None:
    """Keys are hashes, so a loop is hostile; it must not be lost or hang."""
    one, two = replace(block(0), parent=KEYS[1]), block(1)
    assert sorted(in_chain_order([one, two]), key=lambda b: b.depth) == [one, two]
    own = replace(block(0), parent=KEYS[0])
    assert in_chain_order([own]) == [own]
    doubled = [block(0), block(1), block(1)]
    assert sorted(in_chain_order(doubled), key=lambda b: b.depth) == doubled
