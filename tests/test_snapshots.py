"""Everything held, as runs: the same blocks as told one by one, whole chains together, cut into messages."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from kvstore.directory.announce import run_chunks
from kvstore.directory.runs import Added, Run, blocks_of
from kvstore.header import Header
from kvstore.policies.base import make_policy
from kvstore.residency.residency import Level, Residency
from kvstore.residency.snapshots import runs_held
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Location, Tier
from tests.cluster_model import FULL, FULL_STATE, chain, halves, run_of

LEVELS = (Tier.HOT, Tier.HOST, Tier.SSD)


def empty() -> Residency:
    levels = [Level(tier, 1 << 40, 4096, raw=tier == Tier.HOT) for tier in LEVELS]
    return Residency(levels, lambda: make_policy("lru"))


def header(spec: ModelSpec, shard: Shard, keys: list[bytes], depth: int, namespace: str = "a") -> Header:
    group = depth - depth % spec.group_blocks
    return Header.new(
        namespace, spec, shard, key=keys[depth], parent=keys[depth - 1] if depth else spec.root,
        group=keys[group], depth=depth,
    )  # fmt: skip


def told(residency: Residency, namespace: str) -> list[Added]:
    """One by one, as a store tells them."""
    found = []
    for row in residency.of(namespace):
        header, level = residency.header(row), residency.rows.best(row)
        found.append(
            Added(
                header.root,
                header.shard,
                header.key,
                header.parent,
                header.group,
                header.depth,
                LEVELS[level],
                header.fidelity,
                residency.location(row, level).length,
            )
        )
    return found


def test_a_whole_chain_is_a_run_for_each_placement_group() -> None:
    residency, keys = empty(), chain(FULL, 80)
    for depth in range(80):
        residency.admit("a", header(FULL, Shard.whole(FULL), keys, depth), 1, Location(0, depth, 100), leaf_first=True)
    runs = list(runs_held(residency, "a"))
    assert sorted((run.first_depth, len(run.keys)) for run in runs) == [(0, 32), (32, 32), (64, 16)]
    assert {run.stored_bytes for run in runs} == {100} and {run.tier for run in runs} == {Tier.HOST}
    assert sorted(key for run in runs for key in run.keys) == sorted(keys)
    assert [run.parent for run in runs if run.first_depth == 32] == [keys[31]]


def test_any_blocks_are_those_that_are_told_one_by_one() -> None:
    rng = Random(3)
    residency = empty()
    rows: list[int] = []
    for branch in range(40):
        spec = rng.choice((FULL, FULL_STATE))
        shard = rng.choice([Shard.whole(spec), *halves(spec)])
        trunk = chain(spec, 12, bytes([branch % 3]))
        keys = trunk[: rng.randint(1, 12)]
        keys += chain(spec, rng.randint(1, 40), bytes([branch, 9]))
        namespace = rng.choice(("a", "a", "b"))
        for depth in range(len(keys)):
            if rng.random() < 0.15 or residency.find(namespace, shard.digest, keys[depth]) is not None:
                continue
            made = header(spec, shard, keys, depth, namespace)
            if rng.random() < 0.1:
                made = replace(made, stored=Fidelity.NEAR)
            rows.append(
                residency.admit(namespace, made, rng.randrange(3), Location(0, 0, rng.randrange(9)), leaf_first=False)
            )
    for row in rng.sample(rows, 60):
        level = residency.top(row)
        if rng.random() < 0.5:
            residency.add(row, (level + 1) % 3, Location(1, 1, 7))
        else:
            residency.drop(row, level, force=True)
    for namespace in ("a", "b", "nobody"):
        runs = list(runs_held(residency, namespace))
        blocks = [block for run in runs for block in blocks_of(run)]
        want = told(residency, namespace)
        assert len(blocks) == len(want)
        assert {replace(b, stored_bytes=0) for b in blocks} == {replace(b, stored_bytes=0) for b in want}
        sizes = {(b.shard, b.key): b.stored_bytes for b in want}
        for run in runs:
            total = sum(sizes[run.shard, key] for key in run.keys)
            assert run.stored_bytes == -(-total // len(run.keys))
    assert list(runs_held(residency, "nobody")) == []


def test_what_was_read_does_not_change_with_the_store() -> None:
    residency, keys = empty(), chain(FULL, 8)
    rows = [
        residency.admit("a", header(FULL, Shard.whole(FULL), keys, depth), 0, Location(0, 0, 1), leaf_first=True)
        for depth in range(8)
    ]
    runs = runs_held(residency, "a")
    for row in reversed(rows):
        residency.drop(row, 0)
    residency.admit(
        "a", header(FULL, Shard.whole(FULL), chain(FULL, 1, b"x"), 0), 2, Location(0, 0, 1), leaf_first=True
    )
    (run,) = runs
    assert list(run.keys) == keys and run.tier == Tier.HOT


@pytest.mark.parametrize("lengths", [[], [4], [5], [3, 3, 3], [11], [4, 4], [1, 9, 2], [13, 13]])
def test_messages_are_full_and_nothing_is_lost(lengths: list[int]) -> None:
    keys = chain(FULL, 40)
    runs: list[Run] = []
    at = 0
    for length in lengths:
        runs.append(run_of(FULL, Shard.whole(FULL), keys, at, at + length))
        at += length
    parts = list(run_chunks(1, 7, runs, 4))
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    sizes = [sum(len(run.keys) for run in part.runs) for part in parts]
    assert all(size == 4 for size in sizes[:-1]) and sizes[-1] <= 4
    assert [b for part in parts for run in part.runs for b in blocks_of(run)] == [b for r in runs for b in blocks_of(r)]
