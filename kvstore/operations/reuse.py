"""How far apart a trace's reuses lie: LRU stack distances, from which tiers are sized so that each gets its share.

Distances by a Fenwick tree over access times (Mattson 1970; Olken 1981), on a spatial sample of the ids where the trace
is long (SHARDS, Waldspurger et al., FAST'15, section 3: fixed rate).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from kvstore.operations.trace import Request

SAMPLE_ACCESSES = 60_000
_MIX = 0x9E3779B97F4A7C15
_BUCKETS = 1 << 24


class _Fenwick:
    """Sums over prefixes of a growing list of 0 and 1."""

    def __init__(self, length: int) -> None:
        self._tree = [0] * (length + 1)

    def add(self, index: int, value: int) -> None:
        while index < len(self._tree):
            self._tree[index] += value
            index += index & -index

    def upto(self, index: int) -> int:
        total = 0
        while index > 0:
            total += self._tree[index]
            index -= index & -index
        return total


def distances(requests: Iterable[Request], accesses: int) -> list[float]:
    """Reuse distances in distinct blocks, sorted: of each reuse, or of a sample of them where `accesses` is large.

    A request accesses its blocks from leaf to root, so that a parent is always younger than its children.
    """
    threshold = _BUCKETS * min(1.0, SAMPLE_ACCESSES / max(1, accesses))
    sampled = [
        block
        for request in requests
        for block in reversed(request.hash_ids)
        if (block * _MIX >> 20) % _BUCKETS < threshold
    ]
    scale = _BUCKETS / threshold
    tree = _Fenwick(len(sampled))
    last: dict[int, int] = {}
    found: list[float] = []
    for now, block in enumerate(sampled, 1):
        before = last.get(block)
        if before is not None:
            found.append((tree.upto(now - 1) - tree.upto(before)) * scale)
            tree.add(before, -1)
        tree.add(now, 1)
        last[block] = now
    return sorted(found)


def sizes(sorted_distances: Sequence[float], least: Sequence[float]) -> list[float]:
    """Blocks per tier, fastest first, so that under LRU each serves the same part of the reuses, and what is below the
    last one the same part again. Each is at least its `least`; the others share what that leaves. Pure."""
    sized: list[float] = []
    above = 0.0
    for position, floor in enumerate(least):
        served = bisect_right(sorted_distances, above)
        rest = len(sorted_distances) - served
        reach = sorted_distances[served + rest // (len(least) - position + 1)] if rest else above
        sized.append(max(floor, reach - above))
        above += sized[-1]
    return sized
