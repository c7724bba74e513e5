"""Two groups (full attention, sliding window), two shards each: the store follows each group's rule."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE
from tests.store_fakes import FaultyTier
from tests.store_rig import KIB, SMALL, Rig

WINDOW_BLOCKS = 2
SPEC = ModelSpec(
    model="two groups",
    groups=(
        Group(layers=2, kv_heads=2, k_dim=32, v_dim=32),
        Group(kind="sliding", layers=2, kv_heads=2, k_dim=32, v_dim=32, window=16 * WINDOW_BLOCKS),
    ),
    dtype="float16",
    block_tokens=16,
)
HALVES = {group: [Shard(group, 0, 2, head, 1) for head in (0, 1)] for group in (0, 1)}  # tensor parallel 2
SHARDS = [shard for group in (0, 1) for shard in HALVES[group]]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig.make(spec=SPEC, ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.store.start()
    yield rig
    await rig.close()


async def put_chain(rig: Rig, count: int, session: int = 0) -> None:
    for depth in range(count):
        for shard in SHARDS:
            assert (await rig.put(depth, session, shard=shard)).state == "committed"


def matched(rig: Rig, count: int, shards: list[Shard], session: int = 0) -> int:
    return rig.store.match(NAMESPACE, SPEC.root, rig.keys(count, session), shards, Fidelity.EXACT).blocks


def lose(rig: Rig, depth: int, shard: Shard) -> None:
    """As an eviction would."""
    residency = rig.store.stack.residency
    row = residency.find(NAMESPACE, shard.digest, rig.key(depth))
    assert row is not None
    rig.store.stack.remove(row)


async def test_all_shards_are_served_and_matched(rig: Rig) -> None:
    await put_chain(rig, 6)
    assert matched(rig, 10, SHARDS) == 6
    for shard in SHARDS:
        for depth in range(6):
            assert await rig.get(depth, shard=shard) == rig.raw(depth, shard=shard)


async def test_a_rectangle_is_covered_by_the_union_of_stored_ones(rig: Rig) -> None:
    await put_chain(rig, 3)
    assert matched(rig, 3, [Shard.whole(SPEC, 0), Shard.whole(SPEC, 1)]) == 3
    assert matched(rig, 3, [Shard(0, 1, 1, 1, 1)]) == 3
    lose(rig, 1, HALVES[0][1])
    assert matched(rig, 3, [Shard.whole(SPEC, 0)]) == 1
    assert matched(rig, 3, [HALVES[0][0]]) == 3


async def test_full_attention_needs_every_block_a_window_only_the_last(rig: Rig) -> None:
    await put_chain(rig, 6)
    lose(rig, 0, HALVES[1][0])
    lose(rig, 0, HALVES[1][1])
    assert matched(rig, 6, SHARDS) == 6, "old blocks of the window are not needed"
    lose(rig, 5, HALVES[1][0])
    assert matched(rig, 6, SHARDS) == 5
    lose(rig, 3, HALVES[0][1])
    assert matched(rig, 6, SHARDS) == 3


async def test_one_lost_shard_ends_the_prefix(rig: Rig) -> None:
    await put_chain(rig, 4)
    for depth in range(4):
        lose(rig, depth, HALVES[0][1])
    assert matched(rig, 4, SHARDS) == 0
    assert matched(rig, 4, [HALVES[0][0], *HALVES[1]]) == 4


async def test_runs_name_tiers_and_depths(rig: Rig) -> None:
    await put_chain(rig, 60)
    await rig.settle()
    found = rig.store.match(NAMESPACE, SPEC.root, rig.keys(60), SHARDS, Fidelity.EXACT)
    assert found.blocks == 60
    for shard in HALVES[0]:
        depths = [
            d for run in found.runs if run.shard == shard for d in range(run.first_depth, run.first_depth + run.count)
        ]
        assert depths == list(range(60))
    for shard in HALVES[1]:
        depths = [
            d for run in found.runs if run.shard == shard for d in range(run.first_depth, run.first_depth + run.count)
        ]
        assert depths == [58, 59]
    assert {run.tier for run in found.runs} >= {Tier.SSD, Tier.HOT} and {run.holder for run in found.runs} == {"me"}
    assert all(run.stored_bytes > 0 for run in found.runs)


async def test_under_pressure_each_group_gives_up_what_it_can_spare() -> None:
    """No tier below memory: the full group loses ends of old chains, the window its oldest blocks."""
    rig = Rig.make(spec=SPEC, config=replace(SMALL, host_bytes=256 * KIB, hot_bytes=64 * KIB))
    await rig.store.start()
    for session in range(12):
        for depth in range(4):
            for shard in SHARDS:
                await rig.put(depth, session, shard=shard)
    await rig.settle()
    assert rig.store.counters["evicted"] > 0
    residency = rig.store.stack.residency
    for session in range(12):
        for shard in HALVES[0]:
            held = [d for d in range(4) if residency.find(NAMESPACE, shard.digest, rig.key(d, session)) is not None]
            assert held == list(range(len(held))), "a full-attention chain has a hole"
    order = {shard: [] for shard in HALVES[1]}  # type: dict[Shard, list[bool]]
    for session in range(12):
        for depth in range(4):
            for shard in HALVES[1]:
                order[shard].append(residency.find(NAMESPACE, shard.digest, rig.key(depth, session)) is not None)
    for kept in order.values():
        assert True in kept and False in kept and kept == sorted(kept), "an old window block outlived a newer one"
    await rig.close()


async def test_fidelity_counts_in_a_match(rig: Rig) -> None:
    for depth in range(3):
        for shard in SHARDS:
            lossy = Fidelity.NEAR if depth == 2 else Fidelity.EXACT
            await rig.put(depth, shard=shard, fidelity=lossy)
    assert matched(rig, 3, SHARDS) == 2
    keys = rig.keys(3)
    assert rig.store.match(NAMESPACE, SPEC.root, keys, SHARDS, Fidelity.NEAR).blocks == 3


def test_an_unknown_root_is_a_miss(rig: Rig) -> None:
    assert rig.store.match(NAMESPACE, b"r" * 16, [b"k" * 16], SHARDS, Fidelity.EXACT).blocks == 0
