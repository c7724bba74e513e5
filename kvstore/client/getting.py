"""The two ends of a get: the caller's memory made into needs, and what came made into a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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


def prepare(plan: HitPlan, into: Buffers | None, first: int, layers: range | None) -> tuple[GetResult, list[Need]]:
    if into is not None and len(into) != len(plan.shards):
        raise BadRequest(f"buffers for {len(into)} shards were given, the plan has {len(plan.shards)}")
    if layers is not None and (layers.step != 1 or not layers or layers.start < 0):
        raise BadRequest("layers are a range of one or more layers of the model, step 1")
    result = GetResult()
    needs: list[Need] = []
    for index, shard in enumerate(plan.shards):
        row: list[Any] = [None] * plan.blocks
        result.buffers.append(row)
        result.tiers.append([None] * plan.blocks)
        wanted = shard if layers is None else _only_layers(plan.spec, shard, layers)
        if wanted is None:
            continue
        size = block_bytes(plan.spec, wanted)
        for depth in needed_depths(plan, shard):
            if depth < first:
                continue
            row[depth] = np.empty(size, np.uint8) if into is None else _given(into[index], depth)
            needs.append(Need(index, shard, wanted, depth, target_of(row[depth], size)))
    return result, needs


def conclude(plan: HitPlan, result: GetResult, needs: Sequence[Need], first: int, counters: Counter[str]) -> None:
    """What came. Mutates the result and the counters."""
    served: Counter[Tier] = Counter()
    for need in needs:
        if need.delivered and need.tier is not None:
            result.tiers[need.index][need.depth] = need.tier
            result.bytes += need.target.nbytes
            result.fidelity = min(result.fidelity, need.fidelity)
            served[need.tier] += 1
    for tier, blocks in served.items():
        counters[f"hits_{tier.name.lower()}"] += blocks
    if len(needs) > served.total():
        counters["misses"] += len(needs) - served.total()
    mine = dict.fromkeys(need.index for need in needs)  # a shard without one of the layers can't shorten the prefix
    rows = [row if index in mine else [Tier.HOT] * plan.blocks for index, row in enumerate(result.tiers)]
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


def _given(row: Sequence[Any], depth: int) -> Any:
    if depth >= len(row) or row[depth] is None:
        raise BadRequest(f"no buffer was given for block {depth}")
    return row[depth]
