"""What the store's tests pass in: memory without memfds, and a pool that runs in place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from kvstore.errors import Corrupt, SetupError, TierDown, TierFull
from kvstore.header import Header
from kvstore.seams import Disk, Memory, Pool, System
from kvstore.tiers.base import Location, Recovered, TierStats
from kvstore.types import Buffer, Tier

T = TypeVar("T")


class PlainSegment:
    """A bytearray with a segment's face."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.view = memoryview(bytearray(nbytes))
        self.fd: int | None = None
        self.closed = False

    def close(self) -> None:
        assert not self.closed, "a segment is closed twice"
        self.closed = True


class PlainMemory:
    """Counts what it gave; `limit` bytes in all, like a kernel out of memory."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.made: list[PlainSegment] = []

    def segment(self, name: str, nbytes: int, *, sealed_writes: bool) -> PlainSegment:
        assert name and isinstance(sealed_writes, bool)
        if self.limit is not None and self.open_bytes + nbytes > self.limit:
            raise SetupError(f"no {nbytes} bytes of shared memory")
        self.made.append(PlainSegment(nbytes))
        return self.made[-1]

    @property
    def open_bytes(self) -> int:
        return sum(segment.nbytes for segment in self.made if not segment.closed)


class InPlacePool:
    """Runs work at once, on the loop's thread: every interleaving a test sees is its own."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        return function(*args)

    def close(self) -> None:
        return None


class YieldingPool(InPlacePool):
    """Gives every other task a turn before and after the work, as threads would."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        await asyncio.sleep(0)
        result = function(*args)
        await asyncio.sleep(0)
        return result


class ManualClock:
    """Time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return int(self.now * 1e9)


def fake_system(pool: Pool | None = None, memory: Memory | None = None) -> System:
    """Ports without kernel, threads or time."""

    def no_disk(folder: str) -> Disk:
        raise SetupError("no disk here")

    return System(ManualClock(), Random(1), memory or PlainMemory(), pool or YieldingPool(), "here", no_disk)


class FaultyTier:
    """A tier in a dict that fails as told; also Redis's face. Every fault that really hit is counted in `landed`."""

    def __init__(self, tier: Tier, capacity: int = 1 << 30) -> None:
        self.tier = tier
        self.capacity = capacity
        self.kept: dict[int, tuple[str, Header, bytes]] = {}
        self.used = 0
        self.prefixes = tier == Tier.SSD
        self.read_bytes = 0
        self.reads = self.writes = self.finds = self.frees = 0
        self.asked: list[list[bytes]] = []  # keys of each find
        self.down = self.full = False
        self.bug: Exception | None = None  # raised by every write
        self.damage = ""  # of what is read: "flip" a bit, answer "other" bytes, say "corrupt", "shorten" the record
        self.gate: asyncio.Event | None = None  # reads, writes and finds wait for it
        self.slow_finds = True
        self.landed = 0
        self.recovered: list[Recovered] = []
        self._next = 1

    def stats(self) -> TierStats:
        state = "down" if self.down else "full" if self.full else "ok"
        detail = {"ok": "", "down": "it does not answer", "full": "it has no space"}[state]
        return TierStats(self.tier, state, detail, self.used, self.capacity, blocks=len(self.kept), writes=self.writes)

    def footprint(self, nbytes: int) -> int:
        return -(-nbytes // 4096) * 4096

    def fits(self, nbytes: int) -> bool:
        return self.used + self.footprint(nbytes) <= self.capacity

    async def start(self) -> list[Recovered]:
        return self.recovered

    def _fail(self) -> None:
        if self.down:
            self.landed += 1
            raise TierDown(f"{self.tier.name} is down")

    async def _pass(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)

    async def write(self, namespace: str, header: Header, parts: Sequence[Buffer]) -> Location:
        record = b"".join(bytes(part) for part in parts)
        self._fail()
        if self.bug is not None:
            self.landed += 1
            raise self.bug
        if self.full or not self.fits(len(record)):
            self.landed += 1
            raise TierFull(f"{self.tier.name} is full")
        self.used += self.footprint(len(record))
        try:
            await self._pass()
            self._fail()
        except BaseException:
            self.used -= self.footprint(len(record))
            raise
        self._next += 1
        self.kept[self._next] = (namespace, header, record)
        self.writes += 1
        return Location(self._next, 0, len(record))

    async def read(self, namespace: str, header: Header, location: Location, target: memoryview) -> None:
        self.reads += 1
        await self._pass()
        self._fail()
        if location.segment not in self.kept:
            raise Corrupt("it was freed")
        record = bytearray(self.kept[location.segment][2])
        if self.damage:
            self.landed += 1
        if self.damage == "corrupt":
            raise Corrupt("as told")
        if self.damage == "flip":
            record[self.reads * 7919 % len(record)] ^= 1 << self.reads % 8
        if self.damage == "other":
            record[:] = bytes(len(record))
        if self.damage == "shorten":
            record[len(record) // 2 :] = bytes(len(record) - len(record) // 2)
        assert len(target) == len(record) or (self.prefixes and len(target) < len(record))
        target[:] = record[: len(target)]
        self.read_bytes += len(target)

    def free(self, namespace: str, header: Header, location: Location) -> None:
        _, _, record = self.kept.pop(location.segment)
        self.used -= self.footprint(len(record))
        self.frees += 1

    async def tick(self) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None:
        self.gate = None

    # Redis

    async def find_many(
        self, namespace: str, wanted: Sequence[tuple[bytes, bytes]]
    ) -> list[tuple[Header, Location] | None]:
        self.finds += 1
        self.asked.append([key for _, key in wanted])
        if self.slow_finds:
            await self._pass()
        self._fail()
        found: dict[tuple[bytes, bytes], tuple[Header, Location]] = {}
        for at, (name, header, record) in self.kept.items():
            if name == namespace:
                found[header.shard, header.key] = header, Location(at, 0, len(record))
        return [found.get(name) for name in wanted]

    async def purge(self, namespace: str, root: bytes | None = None) -> int:
        gone = [at for at, (name, header, _) in self.kept.items() if name == namespace and root in (None, header.root)]
        for at in gone:
            self.used -= self.footprint(len(self.kept.pop(at)[2]))
        return len(gone)
