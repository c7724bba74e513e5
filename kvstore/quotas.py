"""What one namespace may use of one worker, and of Redis: `[namespaces.NAME.quotas]` of namespaces.toml. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.types import Tier


@dataclass(frozen=True, slots=True)
class Quotas:
    """Bytes; 0: no bound of its own, only the worker's. Of a worker each, `redis_bytes` of all of them together."""

    hot_bytes: int = 0
    host_bytes: int = 0
    ssd_bytes: int = 0
    redis_bytes: int = 0
    rate_bytes: int = 0  # a second, put or read by other hosts
    pinned_bytes: int = 0
    staging_bytes: int = 0

    def tier(self, tier: Tier) -> int:
        """Bytes of a local tier, or of Redis."""
        return (self.hot_bytes, self.host_bytes, self.ssd_bytes, self.redis_bytes)[tier - 1]


NONE = Quotas()


class Rate:
    """Bytes a second, with one second's worth at once. What is asked for while anything is left passes whole, and is
    paid for later: so a block larger than a second's worth passes too."""

    def __init__(self, rate_bytes: int) -> None:
        self.rate_bytes = rate_bytes
        self._left = float(rate_bytes)
        self._at: float | None = None

    def take(self, nbytes: int, now: float) -> bool:
        """Whether so many may pass now. Mutates."""
        if self._at is not None:
            self._left = min(self.rate_bytes, self._left + (now - self._at) * self.rate_bytes)
        self._at = now
        if self._left <= 0:
            return False
        self._left -= nbytes
        return True
