"""SSD tiers for tests: over a real folder, or over a disk in memory with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.seams import Disk, System
from kvstore.tiers.base import Location, Recovered
from kvstore.tiers.ssd import SsdTier
from tests.contracts.records import Sample, catalog_of


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return 1_700_000_000_000_000_000 + int(self.now * 1e9)


class Inline:
    """A pool that runs at once: nothing in these tests is about threads."""

    async def run(self, function: Callable[..., object], *args: object) -> object:
        return function(*args)

    def close(self) -> None:
        return None


def memory_system(disk: Disk, seed: int = 0) -> System:
    """A system whose only folder is `disk`."""
    return System(HandClock(), Random(seed), memory=None, pool=Inline(), host="here", disk=lambda folder: disk)  # type: ignore[arg-type]


def tier_over(
    disk: Disk, nbytes: int = 4 << 20, *, catalog: Catalog | None = None, seed: int = 0, **config: object
) -> SsdTier:
    settings = replace(StoreConfig(), ssd_folder="memory", ssd_bytes=nbytes, **config)  # type: ignore[arg-type]
    return SsdTier(memory_system(disk, seed), settings, catalog_of() if catalog is None else catalog)


def advance(tier: SsdTier, seconds: float) -> None:
    clock = tier.system.clock
    assert isinstance(clock, HandClock)
    clock.now += seconds


async def put(tier: SsdTier, found: Sample) -> Location:
    return await tier.write(found.namespace, found.header, [memoryview(found.record)])


async def get(tier: SsdTier, found: Sample | Recovered, location: Location) -> bytes:
    target = bytearray(location.length)
    await tier.read(found.namespace, found.header, location, memoryview(target))
    return bytes(target)
