"""What a lookup answered, and how needed rectangles are put together from stored ones. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.directory.matching import Cover
from kvstore.directory.membership import Member
from kvstore.spec import ModelSpec, Shard
from kvstore.types import CommitToken, Fidelity, Tier

REDIS_HOLDER = "redis:"
"""Ids of Redis as a holder begin with it; the namespace follows. It has no address: any worker serves it."""

ENGINE_HOLDER = "engine:"
"""Ids of engines that announce their own prefix cache begin with it. They count in Score only."""


def is_redis(holder: str) -> bool:
    """Whether a holder's id is that of a namespace's Redis."""
    return holder.startswith(REDIS_HOLDER)


@dataclass(frozen=True, slots=True)
class PlanRun:
    """`count` consecutive blocks of one holder from `first_depth` on. `stored_bytes` is of the whole run."""

    holder: str
    shard: Shard  # as stored
    tier: Tier
    fidelity: Fidelity
    first_depth: int
    count: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class HitPlan:
    """Where the longest held prefix lies. A hint: any of it may be gone when it is read.

    `keys` are those of the leading `blocks`; `shards` the rectangles the caller needs, in its order.
    Plain data: it may be sent to another process of the same namespace and read there.
    """

    spec: ModelSpec
    keys: tuple[bytes, ...]
    shards: tuple[Shard, ...]
    least: Fidelity = Fidelity.EXACT
    runs: tuple[PlanRun, ...] = ()
    holders: dict[str, Member] = field(default_factory=dict)
    not_applied: tuple[CommitToken, ...] = ()
    complete: bool = True
    load_s: float = 0.0  # predicted, from what this client has seen of the holders

    @property
    def blocks(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return len(self.keys) * self.spec.block_tokens

    @property
    def stored_bytes(self) -> int:
        """Bytes as stored, each block counted at every holder that has it."""
        return sum(run.stored_bytes for run in self.runs)

    def tiers(self) -> dict[Tier, int]:
        """Blocks per nearest tier that some holder named, summed over the stored rectangles."""
        nearest: dict[tuple[Shard, int], Tier] = {}
        for run in self.runs:
            for depth in range(run.first_depth, run.first_depth + run.count):
                known = nearest.get((run.shard, depth))
                if known is None or run.tier < known:
                    nearest[(run.shard, depth)] = run.tier
        counts: dict[Tier, int] = {}
        for tier in nearest.values():
            counts[tier] = counts.get(tier, 0) + 1
        return counts

    def shortened(self, blocks: int) -> HitPlan:
        """The same plan for fewer leading blocks."""
        if blocks >= self.blocks:
            return self
        runs = []
        for run in self.runs:
            count = min(run.count, blocks - run.first_depth)
            if count > 0:
                runs.append(
                    PlanRun(
                        run.holder, run.shard, run.tier, run.fidelity, run.first_depth, count,
                        run.stored_bytes * count // run.count,
                    )
                )  # fmt: skip
        return HitPlan(
            self.spec, self.keys[:blocks], self.shards, self.least, tuple(runs), self.holders, self.not_applied,
            self.complete, self.load_s * blocks / self.blocks,
        )  # fmt: skip


def stored_shards(plan: HitPlan) -> list[Shard]:
    """The distinct stored rectangles of a plan's runs, in their order."""
    return list(dict.fromkeys(run.shard for run in plan.runs))


def ways(needed: Shard, stored: Sequence[Shard], cover: Cover, have: Callable[[Shard], bool]) -> list[Shard]:
    """The best way to put `needed` together from stored rectangles that can be had: itself, else the least one that
    contains it, else a union, greedily by the cells still open. Empty where nothing covers it.

    `cover` is `matching.make_plan`'s for this need over `stored`.
    """
    usable = [(stored[position], cells) for position, cells in cover.sources if have(stored[position])]
    containing = [shard for shard, cells in usable if cells == cover.full]
    if needed in containing:
        return [needed]
    if containing:
        return [min(containing, key=lambda shard: shard.layer_count * shard.head_count)]
    chosen: list[Shard] = []
    done = 0
    while done != cover.full:
        shard, cells = max(usable, key=lambda source: (source[1] & ~done).bit_count(), default=(needed, 0))
        if not cells & ~done:
            return []
        chosen.append(shard)
        done |= cells
    return chosen
