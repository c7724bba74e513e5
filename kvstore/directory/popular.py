"""Which placement groups lookups ask for most. Bounded; pure.

Counters of at most `groups_max` groups (after Misra and Gries, "Finding repeated elements", 1982): when newcomers find
no room, all counts are halved now and then, and those at zero give way. Counts are also halved every `half_s`, so that
yesterday's prompt cools down.
"""

from __future__ import annotations

from collections.abc import Iterable

GROUPS_A_LOOKUP = 8
"""Leading groups of a prompt that one lookup counts: what is shared is at the beginning."""


class Popular:
    """`ask` with every lookup, `tick` now and then; `hot` answers."""

    def __init__(self, groups_max: int, hits: int, half_s: float) -> None:
        self.groups_max, self.hits, self.half_s = groups_max, hits, half_s
        self._counts: dict[bytes, int] = {}
        self._cooled: list[bytes] = []
        self._turned_away = 0  # newcomers without room since the last halving
        self._halved: float | None = None

    def ask(self, groups: Iterable[bytes]) -> list[bytes]:
        """Count one lookup; the groups that have become hot by it. Mutates. O(groups), amortised."""
        counts, risen = self._counts, []
        for group in groups:
            count = counts.get(group, 0)
            if not count and len(counts) >= self.groups_max:
                self._turned_away += 1
                if self._turned_away >= self.groups_max:
                    self._halve()
                    counts = self._counts
                continue
            counts[group] = count + 1
            if count + 1 == self.hits:
                risen.append(group)
        return risen

    def hot(self, group: bytes) -> bool:
        """Pure."""
        return self._counts.get(group, 0) >= self.hits

    def tick(self, now: float) -> list[bytes]:
        """Halve what is old; the groups that are hot no longer. Mutates. O(groups_max), once every `half_s`."""
        if self._halved is None:
            self._halved = now
        if now - self._halved >= self.half_s:
            self._halved = now
            self._halve()
        cooled, self._cooled = self._cooled, []
        return cooled

    def _halve(self) -> None:
        self._turned_away = 0
        room = self.groups_max - len(self._cooled)
        self._cooled += [group for group, count in self._counts.items() if count >= self.hits > count // 2][:room]
        self._counts = {group: count // 2 for group, count in self._counts.items() if count > 1}
