"""How much may still be written to a device that wears out: a budget in bytes a day. Pure."""

from __future__ import annotations

DAY_S = 86_400.0
BURST_S = 3_600.0  # what was not written for an hour may be written at once


class Endurance:
    """A token bucket. `bytes_day` 0: no bound, only a count. A restart begins with a full burst."""

    def __init__(self, bytes_day: int, now: float) -> None:
        self._rate = bytes_day / DAY_S
        self._burst = bytes_day * BURST_S / DAY_S
        self._left = self._burst
        self._since = now
        self.bytes_day = bytes_day
        self.refused = 0

    def admits(self, nbytes: int, now: float) -> bool:
        """Whether so much may be written now; counts a no. Mutates. A block larger than the burst passes when the
        budget is whole."""
        if not self.bytes_day:
            return True
        self._left = min(self._burst, self._left + (now - self._since) * self._rate)
        self._since = now
        if self._left >= min(nbytes, self._burst):
            return True
        self.refused += 1
        return False

    def spend(self, nbytes: int) -> None:
        """It was written, whoever wanted it: reclaim and indices too. Mutates."""
        if self.bytes_day:
            self._left -= nbytes
