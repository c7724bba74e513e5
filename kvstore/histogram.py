"""How long something took, counted in buckets: as Prometheus does, and with quantiles for people. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper ends of the buckets, seconds; one more is open."""


class Histogram:
    """Mutates by `add` only."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more took so long."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


def quantile(bounds_s: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The seconds that `share` of them took at most, linear within a bucket, the last bound for the open one. None
    where nothing was counted. Pure."""
    rank, before = share * sum(counts), 0.0
    if not rank:
        return None
    for index, count in enumerate(counts):
        if count and before + count >= rank:
            low = bounds_s[index - 1] if index else 0.0
            high = bounds_s[min(index, len(bounds_s) - 1)]
            return low + (high - low) * (rank - before) / count
        before += count
    return bounds_s[-1]
