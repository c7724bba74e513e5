"""The contract of a tier: one level of the stack that keeps opaque blobs within a byte bound.

Above it, `TieredStore` decides what lies where (`kvstore.residency`) and verifies what it reads
(kvstore.format); a tier only moves bytes. tests/contracts/tier_suite.py is the contract as code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.format import Header
from kvstore.types import Buffer, Tier
from kvstore.types import Location as Location  # part of this contract


@dataclass(frozen=True, slots=True)
class Recovered:
    """A blob found at start: committed before, header verified."""

    namespace: str
    header: Header
    location: Location


@dataclass(slots=True)
class TierStats:
    """What `status` shows of one tier. Bytes are what the bound counts."""

    tier: Tier
    state: str = "ok"  # ok | full | degraded | down | off
    detail: str = ""
    used: int = 0
    capacity: int = 0
    blocks: int = 0
    raw_bytes: int = 0
    hits: int = 0
    writes: int = 0
    errors: int = 0
    extra: dict[str, int] = field(default_factory=dict)


class TierStore(Protocol):
    """Methods run on the event loop of the store; bytes move in `System.pool`."""

    tier: Tier
    prefixes: bool
    """Whether `read` gives the beginning of a blob alone: not where a blob is only good as a whole."""

    @property
    def capacity(self) -> int:
        """Bytes it may hold."""

    @property
    def used(self) -> int:
        """Bytes counted against the capacity, writes in flight included."""

    def stats(self) -> TierStats: ...

    def fits(self, nbytes: int) -> bool:
        """Whether a blob of that size would be taken now without evicting. Pure."""

    async def start(self) -> Sequence[Recovered]:
        """Open the medium; what survived an earlier process, one copy of each block. SetupError when it can't work."""

    async def write(self, namespace: str, header: Header, parts: Sequence[Buffer]) -> Location:
        """Keep the concatenation of `parts`. Counted from the call on; on failure nothing is kept or counted.
        Raises TierFull, TierDown."""

    async def read(self, namespace: str, header: Header, location: Location, target: memoryview) -> None:
        """Fill `target`: `location.length` bytes, or fewer, the beginning, where the tier has `prefixes`.
        Raises TierDown, or Corrupt where the tier can tell."""

    def free(self, namespace: str, header: Header, location: Location) -> None:
        """Forget a blob; its space may be reused. Idempotence is the store's business: once per location."""

    async def tick(self) -> None:
        """Housekeeping at the store's heartbeat: group commit, probes of a tier that is down, reclaim."""

    async def close(self) -> None:
        """Flush and let go; a later start finds what was written."""
