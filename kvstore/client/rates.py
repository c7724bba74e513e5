"""How fast blocks load, by holder and tier, as this client has seen it; and what of a plan is worth loading.

Loading pays iff it is done before the same tokens are computed anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from kvstore.client.plan import HitPlan, PlanRun
from kvstore.directory.matching import rule_of
from kvstore.layout import block_bytes
from kvstore.types import Tier

FIRST_GUESS = {Tier.HOT: 4e9, Tier.HOST: 1.5e9, Tier.SSD: 0.8e9, Tier.REDIS: 0.5e9}
"""Raw bytes a second of a holder on this host that nothing was loaded from yet."""

AWAY = 1.2e9
"""Bytes a second that another host gives at most, before anything is known."""

LATENCY_S = {True: 0.001, False: 0.003}
"""Of a call, by whether the holder is on this host."""

WEIGHT = 0.3
"""Of the newest measurement."""

COUNTED_BYTES = 256 << 10
"""A smaller load says more of latency than of a rate."""

HOLDERS_MAX = 4096
CUTS_MAX = 64
"""Lengths of a plan that are weighed against each other."""


class Rates:
    """Bytes a second of (holder, tier), a moving mean. Bounded; the longest unused go."""

    def __init__(self, here: Callable[[HitPlan, str], bool]) -> None:
        """`here(plan, holder)`: whether the holder is on this host."""
        self._here = here
        self._seen: OrderedDict[tuple[str, Tier], float] = OrderedDict()

    def note(self, holder: str, tier: Tier, nbytes: int, seconds: float) -> None:
        """One load of so many bytes, the slowest of them from `tier`. Mutates."""
        if nbytes < COUNTED_BYTES or seconds <= 0:
            return
        rate, known = nbytes / seconds, self._seen.get((holder, tier))
        self._seen[holder, tier] = rate if known is None else known + WEIGHT * (rate - known)
        self._seen.move_to_end((holder, tier))
        while len(self._seen) > HOLDERS_MAX:
            self._seen.popitem(last=False)

    def rate(self, plan: HitPlan, holder: str, tier: Tier) -> float:
        """Bytes a second. Pure."""
        known = self._seen.get((holder, tier))
        if known is not None:
            return known
        guess = FIRST_GUESS[tier]
        return guess if self._here(plan, holder) else min(guess, AWAY)

    def load_s(self, plan: HitPlan) -> float:
        """Predicted seconds to load a plan: all holders at once, each block from the fastest. Pure."""
        busy: dict[str, float] = {}
        for run, nbytes in self._fastest(plan):
            begun = busy.get(run.holder)
            begun = LATENCY_S[self._here(plan, run.holder)] if begun is None else begun
            busy[run.holder] = begun + nbytes / self.rate(plan, run.holder, run.tier)
        return max(busy.values(), default=0.0)

    def _fastest(self, plan: HitPlan) -> list[tuple[PlanRun, int]]:
        """(run, raw bytes that come from it), blocks named twice counted once."""
        taken: dict[object, list[tuple[int, int]]] = {}  # stored shard -> ranges of depths
        found = []
        for run in sorted(plan.runs, key=lambda run: -self.rate(plan, run.holder, run.tier)):
            mine = taken.setdefault(run.shard, [])
            left = run.count
            for first, last in mine:
                left -= max(0, min(last, run.first_depth + run.count) - max(first, run.first_depth))
            if left > 0:
                found.append((run, block_bytes(plan.spec, run.shard) * left))
                mine.append((run.first_depth, run.first_depth + run.count))
        return found

    def predicted(self, plan: HitPlan) -> HitPlan:
        """The plan with its predicted load time. Pure."""
        return replace(plan, load_s=self.load_s(plan)) if plan.blocks else plan

    def worth(self, plan: HitPlan, tokens_per_s: float) -> HitPlan:
        """The part of a plan that makes load and computation of the rest shortest: without blocks that are computed
        sooner than they load. Pure."""
        if not plan.blocks:
            return plan
        cuts = {0, plan.blocks}
        if all(rule_of(plan.spec, shard.group).window_blocks == 0 for shard in plan.shards):
            edges = {edge for run in plan.runs for edge in (run.first_depth, run.first_depth + run.count)}
            cuts |= set(sorted(edges, reverse=True)[:CUTS_MAX])

        def seconds(part: HitPlan) -> float:
            return self.load_s(part) + (plan.tokens - part.tokens) / tokens_per_s

        parts = [plan.shortened(cut) for cut in sorted(cuts, reverse=True)]
        return self.predicted(min(parts, key=seconds))
