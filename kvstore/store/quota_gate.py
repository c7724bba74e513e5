"""Quotas of namespaces over the tiers of one worker: who is over, and which of its own blocks gives way next.

A quota bounds what **stays** in a tier; what is on its way down no longer counts, what is on its way in does not yet.
So a namespace may be over by what moves at a time, and is back under its bound when that has arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from kvstore.quotas import NONE, Quotas, Rate
from kvstore.residency.residency import Residency
from kvstore.residency.victims import instead
from kvstore.seams import Clock

BATCH_SHARE = 16  # of a namespace's blocks in a tier, put in order at a time
BATCH_MIN = 256
SECONDARY_FIRST = 1 << 62


class QuotaGate:
    """One per store. Metadata only."""

    def __init__(self, residency: Residency, clock: Clock, quotas: Mapping[str, Quotas]) -> None:
        self._residency, self._clock, self._quotas = residency, clock, quotas
        self._rates = {name: Rate(quota.rate_bytes) for name, quota in quotas.items() if quota.rate_bytes}
        self._lines: dict[tuple[str, int], list[tuple[int, int]]] = {}  # oldest last: (row, its order then)
        self.dropped: Counter[str] = Counter()  # puts by namespace, over a quota or the rate
        self.evicted: Counter[str] = Counter()  # blocks by namespace, given up for its quota
        self.limited = [
            (name, level)
            for name, quota in quotas.items()
            for level, rule in enumerate(residency.levels)
            if quota.tier(rule.tier)
        ]

    def of(self, namespace: str) -> Quotas:
        return self._quotas.get(namespace, NONE)

    def over(self, namespace: str, level: int, nbytes: int = 0) -> int:
        """Bytes that must leave before `nbytes` more are within the quota; not above 0 where they are. Pure."""
        residency = self._residency
        bound = self.of(namespace).tier(residency.levels[level].tier)
        if not bound:
            return 0
        tier = residency.levels[level].tier
        staying = sum(
            self.staying(namespace, other) for other, rule in enumerate(residency.levels) if rule.tier == tier
        )
        return staying + residency.levels[level].footprint(nbytes) - bound

    def staying(self, namespace: str, level: int) -> int:
        """Footprints of a namespace's copies at a level that are not on their way down. Pure."""
        held = self._residency.held.get(namespace)
        return 0 if held is None else held[level]

    def spend(self, namespace: str, nbytes: int) -> bool:
        """Whether the namespace's rate lets so many bytes pass. Mutates."""
        rate = self._rates.get(namespace)
        return rate is None or rate.take(nbytes, self._clock.monotonic())

    def victim(self, namespace: str, level: int) -> int | None:
        """The namespace's own block that leaves the level next: secondary copies, then in the policy's order. None
        where none may. Mutates nothing but its memory of that order. Amortised O(`BATCH_SHARE`) a victim."""
        residency = self._residency
        for fresh in (False, True):
            if fresh:
                self._lines[namespace, level] = self._line(namespace, level)
            line = self._lines.get((namespace, level), [])
            while line:
                row, order = line[-1]
                here = residency.present(row, level) and not residency.gone(row)
                mine = here and residency.namespace(row) == namespace and self._order(row, level) == order
                if mine and residency.may_leave(row, level):
                    return instead(residency, row, level)
                line.pop()
        return None

    def _line(self, namespace: str, level: int) -> list[tuple[int, int]]:
        """The namespace's blocks that may leave the level, a share of them, the next one last."""
        residency = self._residency
        rows = [row for row in self._rows(namespace, level) if residency.may_leave(row, level)]
        if not rows:
            return []
        orders = [self._order(row, level) for row in rows]  # a policy's order may be wider than 64 bits
        keep = min(len(rows), max(BATCH_MIN, len(rows) // BATCH_SHARE))
        oldest = sorted(range(len(rows)), key=orders.__getitem__)[:keep]
        return [(rows[at], orders[at]) for at in reversed(oldest)]

    def _rows(self, namespace: str, level: int) -> list[int]:
        """Rows of a namespace with a copy at a level. O(all rows), in C."""
        rows = self._residency.rows
        here = np.frombuffer(rows.present, np.uint8) >> level & 1 == 1
        mine = np.isin(np.frombuffer(rows.space, np.int32), self._residency.spaces(namespace))
        found: list[int] = np.flatnonzero(here & mine).tolist()
        return found

    def _order(self, row: int, level: int) -> int:
        """Lesser leaves the level earlier; of a block that is there. Secondary copies before all others."""
        residency = self._residency
        if residency.secondary(row):
            return residency.secondaries[level].order(row) - SECONDARY_FIRST
        return residency.policies[level].order(row)
