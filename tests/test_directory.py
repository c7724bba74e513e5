"""The directory: unions, groups and ranks, its bounds, and what becomes of holders that hide, go and come back."""

from __future__ import annotations

import pytest

from kvstore.directory.directory import Copy, Directory, Match, MatchRun
from kvstore.errors import BadRequest
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier
from tests.cluster_model import (
    FULL,
    FULL_SLIDING,
    FULL_STATE,
    OPAQUE,
    chain,
    directory_for,
    halves,
    run_of,
)


def test_one_holder_one_run() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 5)
    directory.add("w1", run_of(FULL, whole, keys, 0, 3, Tier.SSD, stored_bytes=100))
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT) == Match(
        3, [MatchRun("w1", whole, Tier.SSD, Fidelity.EXACT, 0, 3, 300)]
    )
    assert directory.match(FULL.root, keys[:2], [whole], Fidelity.EXACT).blocks == 2
    assert directory.contents("w1") == {(whole.digest, key): (Tier.SSD, Fidelity.EXACT) for key in keys[:3]}
    assert directory.blocks == 3
    directory.validate()


def test_misses() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 5)
    assert directory.match(FULL.root, keys, [whole], Fidelity.COMPACT) == Match()
    directory.add("w1", run_of(FULL, whole, keys, 1, 3))
    assert directory.match(FULL.root, keys, [whole], Fidelity.COMPACT) == Match()  # no first block
    assert directory.match(FULL.root, [], [whole], Fidelity.COMPACT) == Match()
    assert directory.match(FULL.root, keys[1:], [], Fidelity.COMPACT) == Match()
    assert directory.match(OPAQUE.root, keys[1:], [whole], Fidelity.COMPACT) == Match()
    assert directory.match(FULL.root, keys[1:], [whole], Fidelity.COMPACT).blocks == 2  # the control
    with pytest.raises(BadRequest, match="shard"):
        directory.match(FULL.root, keys, [Shard(0, 0, 9, 0, 1)], Fidelity.COMPACT)


def test_the_union_of_holders_counts_and_each_is_named() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 6)
    directory.add("w1", run_of(FULL, whole, keys, 0, 4, Tier.SSD))
    directory.add("w2", run_of(FULL, whole, keys, 2, 6, Tier.HOT))
    match = directory.match(FULL.root, keys, [whole], Fidelity.EXACT)
    assert match.blocks == 6
    assert [(run.holder, run.first_depth, run.count) for run in match.runs] == [("w2", 2, 4), ("w1", 0, 4)]


def test_fidelity_below_the_asked_one_is_a_miss() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 3)
    directory.add("w1", run_of(FULL, whole, keys, 0, 2, fidelity=Fidelity.EXACT))
    directory.add("w1", run_of(FULL, whole, keys, 2, 3, fidelity=Fidelity.NEAR))
    lengths = [directory.match(FULL.root, keys, [whole], least).blocks for least in Fidelity]
    assert lengths == [3, 3, 2]


def test_the_last_word_of_a_holder_on_a_block_counts() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 1)
    for tier in (Tier.HOT, Tier.SSD, Tier.HOST):
        directory.add("w1", run_of(FULL, whole, keys, 0, 1, tier))
    assert directory.holders(whole.digest, keys[0]) == [Copy("w1", Tier.HOST, Fidelity.EXACT, 64)]
    assert directory.blocks == 1
    directory.remove("w1", whole.digest, keys)
    assert directory.blocks == 0 and directory.contents("w1") == {}
    directory.validate()


@pytest.mark.parametrize(("spec", "state"), [(FULL_SLIDING, False), (FULL_STATE, True)])
def test_two_groups_two_ranks_and_one_of_them_lost(spec: ModelSpec, state: bool) -> None:
    """Two workers, each a rank, hold both groups of eight blocks (state at every block)."""
    directory, keys = directory_for(spec), chain(spec, 8)
    needed = [*halves(spec, 0), *halves(spec, 1)]
    for shard in needed:
        directory.add("w1" if shard.head_first == 0 else "w2", run_of(spec, shard, keys, 0, 8))
    assert directory.match(spec.root, keys, needed, Fidelity.EXACT).blocks == 8

    lost = needed[3]  # the second rank's shard of the second group loses depths 5 and 7
    directory.remove("w2", lost.digest, [keys[5], keys[7]])
    match = directory.match(spec.root, keys, needed, Fidelity.EXACT)
    assert match.blocks == (7 if state else 5)
    first_needed = 6 if state else 2
    spans = [(run.first_depth, run.count) for run in match.runs if run.shard.group == 1]
    assert spans == [(first_needed, match.blocks - first_needed)] * 2

    directory.hide("w2")
    assert directory.match(spec.root, keys, needed, Fidelity.EXACT) == Match()
    assert directory.match(spec.root, keys, needed[::2], Fidelity.EXACT).blocks == 8  # the first rank's alone
    directory.show("w2")
    assert directory.match(spec.root, keys, needed, Fidelity.EXACT) == match
    directory.drop("w2")
    assert directory.match(spec.root, keys, needed, Fidelity.EXACT) == Match()
    directory.validate()


def test_four_ranks_wrote_two_read() -> None:
    directory, keys = directory_for(FULL), chain(FULL, 4)
    quarters = [Shard(0, 0, 2, head, 1) for head in range(4)]
    for number, shard in enumerate(quarters):
        directory.learn_shard(shard)
        directory.add(f"w{number}", run_of(FULL, shard, keys, 0, 4 - (number == 2)))
    left, right = halves(FULL)
    assert directory.match(FULL.root, keys, [left, right], Fidelity.EXACT).blocks == 3
    match = directory.match(FULL.root, keys, [left], Fidelity.EXACT)
    assert match.blocks == 4 and [run.holder for run in match.runs] == ["w0", "w1"]


def test_hidden_holders_stay_hidden_through_changes_and_snapshots() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 4)
    directory.add("w1", run_of(FULL, whole, keys, 0, 1))
    directory.hide("w1")
    directory.add("w1", run_of(FULL, whole, keys, 1, 2))
    directory.replace("w1", [run_of(FULL, whole, keys, 0, 3)])
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT) == Match()
    assert directory.holders(whole.digest, keys[0]) == []
    assert len(directory.contents("w1")) == 3
    directory.show("w1")
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT).blocks == 3


def test_a_snapshot_shows_only_when_it_is_whole() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 4)
    directory.replace("w1", [run_of(FULL, whole, keys, 0, 2)])
    directory.stage("w1")
    directory.add_staged("w1", run_of(FULL, whole, keys, 0, 4))
    directory.validate()
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT).blocks == 2
    directory.commit_staged("w1")
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT).blocks == 4
    directory.stage("w1")
    directory.abandon_staged("w1")
    directory.commit_staged("w1")
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT).blocks == 4
    directory.validate()


def test_what_names_the_unknown_is_skipped_and_counted() -> None:
    directory, keys = Directory(), chain(FULL, 4)
    whole = Shard.whole(FULL)
    directory.add("w1", run_of(FULL, whole, keys, 0, 4))
    directory.learn_spec(FULL)
    directory.add("w1", run_of(FULL, whole, keys, 0, 4))
    wide = Shard(0, 0, 9, 0, 9)
    directory.learn_shard(wide)
    directory.add("w1", run_of(FULL, wide, keys, 0, 4))
    assert (directory.skipped, directory.blocks) == (12, 0)
    directory.learn_shard(whole)
    directory.add("w1", run_of(FULL, whole, keys, 0, 4))
    assert (directory.skipped, directory.blocks) == (12, 4)
    assert directory.spec(FULL.root) == FULL and directory.shard(whole.digest) == whole


def test_bounds_are_kept_and_counted() -> None:
    directory, whole, keys = directory_for(FULL, blocks_max=5, shards_max=2), Shard.whole(FULL), chain(FULL, 8)
    directory.add("w1", run_of(FULL, whole, keys, 0, 8))
    assert (directory.blocks, directory.refused) == (5, 3)
    directory.add("w1", run_of(FULL, whole, keys, 0, 5, Tier.SSD))  # known ones still change
    assert set(directory.contents("w1").values()) == {(Tier.SSD, Fidelity.EXACT)}
    directory.replace("w1", [run_of(FULL, whole, keys, 3, 8)])  # what it replaces does not count
    assert (directory.blocks, directory.refused) == (5, 3)
    directory.validate()
    left, right = halves(FULL)
    directory.remove("w1", whole.digest, keys[4:])
    directory.add("w1", run_of(FULL, left, keys, 0, 1))
    directory.add("w1", run_of(FULL, right, keys, 0, 1))
    assert (directory.blocks, directory.refused) == (2, 4)
    directory.validate()


def test_an_answer_names_a_bounded_number_of_copies_and_never_too_few() -> None:
    directory, whole, keys = directory_for(FULL, copies_max=3), Shard.whole(FULL), chain(FULL, 8)
    for number in range(20):
        directory.add(f"w{number:02}", run_of(FULL, whole, keys, 0, 4, Tier.HOST if number % 2 else Tier.HOT))
    directory.add("tail", run_of(FULL, whole, keys, 4, 8, Tier.REDIS))
    match = directory.match(FULL.root, keys, [whole], Fidelity.EXACT)
    assert match.blocks == 8
    assert [(run.holder, run.tier) for run in match.runs] == [
        ("w00", Tier.HOT), ("w02", Tier.HOT), ("w04", Tier.HOT), ("tail", Tier.REDIS),
    ]  # fmt: skip


def test_dropped_holders_leave_nothing_behind() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 5000)
    for life in range(5):
        directory.replace("w1", [run_of(FULL, whole, keys, at, at + 50) for at in range(0, 5000, 50)])
        assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT).blocks == 5000, life
        assert directory.sweep(0) <= 5000, "what the dead left behind grows"
    directory.drop("w1")
    assert directory.match(FULL.root, keys, [whole], Fidelity.EXACT) == Match()
    directory.validate()
    while directory.sweep(1000):
        pass
    directory.validate()
    assert directory.blocks == 0 and directory.names() == [] and directory.match(FULL.root, keys, [whole], 1) == Match()


def test_what_is_exported_of_a_holder_makes_another_directory_answer_the_same() -> None:
    directory, whole, keys = directory_for(FULL), Shard.whole(FULL), chain(FULL, 9)
    left, right = halves(FULL)
    directory.add("w1", run_of(FULL, whole, keys, 0, 4, Tier.SSD, stored_bytes=100))
    directory.add("w1", run_of(FULL, left, keys, 2, 7, Tier.HOT, stored_bytes=300))
    directory.add("w1", run_of(FULL, right, keys, 2, 7, Tier.HOT, stored_bytes=300))
    directory.add("w2", run_of(FULL, whole, keys, 0, 9))
    directory.hide("w2")
    runs = directory.export("w1", keys_max=2)
    assert max(len(run.keys) for run in runs) == 2 and sum(len(run.keys) for run in runs) == 14
    other = directory_for(FULL)
    other.replace("w1", runs)
    assert other.contents("w1") == directory.contents("w1")
    assert other.match(FULL.root, keys, [whole], Fidelity.EXACT) == directory.match(
        FULL.root, keys, [whole], Fidelity.EXACT
    )
    assert directory.export("nobody") == []
