"""The two ends of a get: the caller's memory made into needs, and what came made into a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from kvstore.client.needs import Need, delivered_blocks, needed_depths
from kvstore.client.pieces import layers_before
from kvstore.client.plan import HitPlan
from kvstore.client.targets import target_of
from kvstore.errors import BadRequest
from kvstore.layout import block_bytes
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier

Buffers = Sequence[Sequence[Any]]
"""[needed shard][depth] -> memory for one raw block: a writable contiguous buffer, or a list of buffers that follow
each other (pages of an engine's cache); None where the group's rule needs none. numpy, torch (CPU), any buffer."""


@dataclass(slots=True)
class GetResult:
    """What a get delivered. `buffers[shard][depth]` holds a raw block in canonical order where `tiers` names a tier;
    others hold anything."""

    blocks: int = 0  # leading blocks that every shard has, by its group's rule
    buffers: list[list[Any]] = field(default_factory=list)
    tiers: list[list[Tier | None]] = field(default_factory=list)
    bytes: int = 0  # delivered, raw
    fidelity: Fidelity = Fidelity.EXACT  # the worst of what came: `computed_on` of what is computed on it

    @property
    def wanted(self) -> bool:
        """Whether any block is to come, or came."""
        return any(buffer is not None for row in self.buffers for buffer in row)


def prepare(plan: HitPlan, into: Buffers | None, first: int, layers: range | None, planes: int) -> GetResult:
    """Nothing delivered yet; the caller's memory, or new, where a block is needed. BadRequest."""
    if into is not None and len(into) != len(plan.shards):
        raise BadRequest(f"buffers for {len(into)} shards were given, the plan has {len(plan.shards)}")
    if layers is not None and (layers.step != 1 or not layers or layers.start < 0):
        raise BadRequest("layers are a range of one or more layers of the model, step 1")
    if planes < 0 or (planes and Fidelity(min(planes, Fidelity.EXACT)) < plan.least):
        raise BadRequest(f"{planes} planes are worth less than {plan.least.name.lower()}: look up with a lower least")
    result = GetResult()
    for index, shard in enumerate(plan.shards):
        row: list[Any] = [None] * plan.blocks
        result.buffers.append(row)
        result.tiers.append([None] * plan.blocks)
        wanted = shard if layers is None else _only_layers(plan.spec, shard, layers)
        if wanted is None:
            continue
        depths = wanted_depths(plan, shard, first)
        if into is None:
            size = block_bytes(plan.spec, wanted)
            row[depths.start : depths.stop] = [np.empty(size, np.uint8) for _ in depths]
        else:
            given = into[index][depths.start : depths.stop]
            row[depths.start : depths.start + len(given)] = given
            if len(given) < len(depths) or any(buffer is None for buffer in given):
                raise BadRequest(f"no buffer was given for one of the blocks {depths.start} to {depths.stop - 1}")
    return result


def preparing(
    plan: HitPlan, into: Buffers | None, first: int, layers: range | None, planes: int
) -> Callable[[], GetResult]:
    """`prepare` at its first call, the same result at each: a request may leave before. BadRequest."""
    made: list[GetResult] = []

    def ready() -> GetResult:
        if not made:
            made.append(prepare(plan, into, first, layers, planes))
        return made[0]

    return ready


def missing(plan: HitPlan, result: GetResult, layers: range | None) -> list[Need]:
    """What was not delivered yet. BadRequest for memory that does not fit."""
    needs: list[Need] = []
    for index, shard in enumerate(plan.shards):
        wanted = shard if layers is None else _only_layers(plan.spec, shard, layers)
        size = 0 if wanted is None else block_bytes(plan.spec, wanted)
        for depth, (buffer, tier) in enumerate(zip(result.buffers[index], result.tiers[index], strict=True)):
            if wanted is not None and buffer is not None and tier is None:
                needs.append(Need(index, shard, wanted, depth, target_of(buffer, size)))
    return needs


def wanted_depths(plan: HitPlan, shard: Shard, first: int) -> range:
    """The blocks that a get from `first` on reads of a shard. Pure."""
    depths = needed_depths(plan, shard)
    return range(max(depths.start, first), max(depths.stop, first))


def conclude(plan: HitPlan, result: GetResult, needs: Sequence[Need], first: int, counters: Counter[str]) -> None:
    """What came. Mutates the result and the counters."""
    for need in needs:
        if need.delivered and need.tier is not None:
            result.tiers[need.index][need.depth] = need.tier
            result.bytes += need.target.nbytes
            result.fidelity = min(result.fidelity, need.fidelity)
        else:
            counters["misses"] += 1
    for tier, blocks in Counter(chain.from_iterable(result.tiers)).items():
        if tier is not None:
            counters[f"hits_{tier.name.lower()}"] += blocks
    # a shard without one of the layers can't shorten the prefix
    rows: list[list[Tier | None]] = [
        tiers if any(buffer is not None for buffer in buffers) else [Tier.HOT] * plan.blocks
        for tiers, buffers in zip(result.tiers, result.buffers, strict=True)
    ]
    result.blocks = delivered_blocks(plan, rows, first)
    counters["bytes_read"] += result.bytes


def _only_layers(spec: ModelSpec, shard: Shard, layers: range) -> Shard | None:
    """The part of a shard in some layers of the model, None where there is none."""
    base = layers_before(spec, shard.group)
    first, last = max(layers.start - base, 0), layers.stop - base
    return (
        shard.overlap(Shard(shard.group, first, last - first, shard.head_first, shard.head_count))
        if last > first
        else None
    )
