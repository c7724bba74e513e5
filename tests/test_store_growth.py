"""Namespaces that come while the arena still grows, or when all of its segments are another one's: what must go moves
down, and nobody's put is dropped for want of a segment while there is something that can make way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from random import Random

import pytest

from kvstore.spec import Group, ModelSpec
from kvstore.types import Tier
from tests.store_fakes import FaultyTier
from tests.store_rig import SMALL, Rig

MIB = 1 << 20


def spec_of(block_bytes: int) -> ModelSpec:
    dim = block_bytes // (2 * 2 * 16)
    group = Group(layers=1, kv_heads=1, k_dim=dim, v_dim=dim)
    return ModelSpec(model="large blocks", groups=(group,), dtype="float16", block_tokens=16)


@dataclass(frozen=True)
class Case:
    host: int  # MiB, as all of them
    hot: int
    segment: int  # large ones are made elsewhere, and waited for
    block: float
    first: int  # blocks of namespace a before, or while, the others come
    together: bool


CASES = {
    "the second asks for a segment": Case(32, 16, 16, 2, 12, False),
    "all ask at once": Case(32, 16, 8, 2, 5, True),
    "every segment is the first one's": Case(32, 16, 5, 1, 27, False),
    "one segment left with one block": Case(32, 8, 16, 1, 27, False),
    "hot is full of blocks that are being copied": Case(32, 8, 5, 2, 7, True),
}


async def committed(rig: Rig, namespace: str, count: int, session: int = 0) -> None:
    for depth in range(count):
        outcome = await rig.put(depth, session, namespace=namespace)
        assert outcome.state == "committed", (namespace, session, depth, outcome)


async def everybody_is_served(case: Case, *, below: bool = True) -> int:
    """No put is dropped, and nothing is lost. Not `below`: without an SSD blocks are evicted; how many."""
    ssd = FaultyTier(Tier.SSD, 1 << 30) if below else None
    config = replace(
        SMALL, host_bytes=case.host * MIB, hot_bytes=case.hot * MIB, segment_bytes=case.segment * MIB, codec="raw",
        spill_queue_bytes=64 * MIB,
    )  # fmt: skip
    rig = Rig.make(config=config, ssd=ssd, spec=spec_of(int(case.block * MIB)), codecs={})
    await rig.store.start()
    try:
        if case.together:
            chains = [("a", max(1, case.first // 4), session) for session in range(4)] + [("b", 3, 0)]
            await asyncio.gather(*(committed(rig, *chain) for chain in chains))
        else:
            chains = [("a", case.first, 0), ("b", 3, 0), ("c", 3, 1)]
            for chain in chains:
                await committed(rig, *chain)
        await rig.settle()
        for namespace, count, session in chains:
            for depth in range(count):
                got = await rig.get(depth, session, namespace=namespace)
                assert got == rig.raw(depth, session) or (got is None and not below), (namespace, session, depth)
        evicted = rig.store.counters.get("evicted", 0)
        assert not (evicted and below)
        return evicted
    finally:
        await rig.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_a_namespace_that_comes_late_gets_its_segment(case: Case) -> None:
    await everybody_is_served(case)


def case_of(seed: int) -> Case:
    rng = Random(seed)
    host, block = rng.choice([32, 48]), rng.choice([0.5, 1, 2])
    return Case(
        host, host // rng.choice([2, 4]), rng.choice([5, 8, 16]), block, rng.randrange(1, int(host / block)),
        rng.random() < 0.5,
    )  # fmt: skip


SCATTERED = (14, 108)
"""Seeds where host has bytes enough, but none in one piece where the namespace of hot's next victim may lie."""


@pytest.mark.parametrize("seed", [*range(6), *SCATTERED])
async def test_any_sizes(seed: int) -> None:
    await everybody_is_served(case_of(seed))


async def test_any_sizes_without_anything_below() -> None:
    """3, 15 and 28: there puts were dropped while hot was full of what host had no piece for."""
    assert sum([await everybody_is_served(case_of(seed), below=False) for seed in (0, 1, 3, 15, 28, *SCATTERED)]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("seed", range(6, 120))
async def test_any_sizes_long(seed: int, below: bool) -> None:
    await everybody_is_served(case_of(seed), below=below)
