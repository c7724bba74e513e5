"""Tiers in the arena: `host` keeps encoded records in CPU memory, the hot tier's cpu pool raw blocks beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.errors import TierFull
from kvstore.format import Header
from kvstore.seams import Pool
from kvstore.store.arena import PAGE_BYTES, Arena, Slot
from kvstore.tiers.base import Location, Recovered, TierStats
from kvstore.types import Buffer, Tier


def copy_parts(parts: Sequence[Buffer], target: memoryview) -> None:
    """Lay parts back to back into `target`, exactly filling it. Runs in a thread; large copies release the GIL."""
    into = np.frombuffer(target, np.uint8)
    at = 0
    for part in parts:
        data = np.frombuffer(part, np.uint8)
        np.copyto(into[at : at + data.size], data)
        at += data.size
    assert at == into.size, f"{at} bytes of parts for a space of {into.size}"


class ArenaTier:
    """Blobs in slots of an arena that several tiers share, each within its own capacity. Gone with the process."""

    prefixes = False  # who wants less reads it where it lies

    def __init__(self, tier: Tier, arena: Arena, pool: Pool, capacity: int, inline_bytes: int = 0) -> None:
        """`inline_bytes`: blobs up to there are copied at once instead of by a thread."""
        self.tier = tier
        self.arena = arena
        self.capacity = capacity
        self._pool = pool
        self._inline_bytes = inline_bytes
        self._used = 0
        self._blocks = 0
        self._writes = 0

    @property
    def used(self) -> int:
        """Bytes of the slots taken, in whole pages."""
        return self._used

    def stats(self) -> TierStats:
        return TierStats(
            self.tier,
            used=self._used,
            capacity=self.capacity,
            blocks=self._blocks,
            writes=self._writes,
        )

    @staticmethod
    def footprint(nbytes: int) -> int:
        """Bytes counted for a blob."""
        return -(-nbytes // PAGE_BYTES) * PAGE_BYTES

    def fits(self, nbytes: int) -> bool:
        return self.short(nbytes) <= 0

    def short(self, nbytes: int) -> int:
        """Bytes that must go before a blob fits: of this tier's share, and of the arena, where slots that readers
        hold still count after they were freed. Pure."""
        footprint = self.footprint(nbytes)
        return max(self._used + footprint - self.capacity, self.arena.used + footprint - self.arena.capacity)

    def reserve(self, namespace: str, nbytes: int) -> Location | None:
        """Space that the caller fills through `view`, counted from now on; None where there is none. Mutates."""
        if not self.fits(nbytes):
            return None
        slot = self.arena.allocate(namespace, nbytes)
        if slot is None:
            return None
        self._used += self.footprint(nbytes)
        self._blocks += 1
        return Location(slot.segment, slot.offset, nbytes)

    def reserve_all(self, namespace: str, nbytes: int, count: int) -> list[Location]:
        """`reserve` of so many alike, as many as there is room for, side by side where it is in one piece. Mutates."""
        footprint = self.footprint(nbytes)
        room = min(self.capacity - self._used, self.arena.capacity - self.arena.used) // footprint
        slots = self.arena.allocate_all(namespace, nbytes, max(0, min(count, room)))
        self._used += footprint * len(slots)
        self._blocks += len(slots)
        return [Location(segment, offset, nbytes) for segment, offset in slots]

    def filled(self, count: int = 1) -> None:
        """Count reserved spaces as written. Mutates."""
        self._writes += count

    def slot(self, location: Location) -> Slot:
        """The arena's name of a location. Its generation is what `Arena.hold` returns, not here."""
        return Slot(location.segment, location.offset, location.length, 0)

    def view(self, location: Location) -> memoryview:
        """The blob's bytes as they lie."""
        return self.arena.view(self.slot(location))

    async def start(self) -> list[Recovered]:
        return []

    async def write(self, namespace: str, header: Header, parts: Sequence[Buffer]) -> Location:
        nbytes = sum(memoryview(part).nbytes for part in parts)
        location = self.reserve(namespace, nbytes)
        if location is None:
            raise TierFull(f"{self.tier.name.lower()}: no {nbytes} bytes free of {self.capacity}; raise host_bytes")
        return await self.fill(namespace, header, location, parts)

    async def fill(self, namespace: str, header: Header, location: Location, parts: Sequence[Buffer]) -> Location:
        """Copy parts into a reserved space; on failure it is free again."""
        try:
            if location.length <= self._inline_bytes:
                copy_parts(parts, self.view(location))
            else:
                await self._pool.run(copy_parts, parts, self.view(location))
        except BaseException:
            self.free(namespace, header, location)
            raise
        self.filled()
        return location

    async def read(self, namespace: str, header: Header, location: Location, target: memoryview) -> None:
        await self._pool.run(copy_parts, [self.view(location)], target)

    def free(self, namespace: str, header: Header, location: Location) -> None:
        self.give_back(location)

    def give_back(self, location: Location) -> None:
        """A reserved space is not wanted any more. Mutates."""
        self.arena.free(self.slot(location))
        self._used -= self.footprint(location.length)
        self._blocks -= 1

    async def tick(self) -> None:
        return None

    async def close(self) -> None:
        """The arena belongs to the store, which closes it."""


class HostTier(ArenaTier):
    """Encoded records."""

    def __init__(self, arena: Arena, pool: Pool, capacity: int, inline_bytes: int = 0) -> None:
        super().__init__(Tier.HOST, arena, pool, capacity, inline_bytes)
