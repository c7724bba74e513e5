"""The hot tier: raw blocks, in the arena (always) and in one pre-allocated pool per named device (torch)."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any

from kvstore.errors import SetupError, TierFull
from kvstore.format import Header
from kvstore.seams import Pool
from kvstore.store.arena import Arena
from kvstore.store.extents import Extents
from kvstore.tiers.base import Location, Recovered, TierStats
from kvstore.tiers.host import ArenaTier
from kvstore.types import Buffer, Tier

ALIGNMENT = 512  # of a block in a device pool: what CUDA's own allocator gives
STAGING_BYTES = 8 << 20  # of one pinned buffer; larger blocks pass in pieces
STAGING_BUFFERS = 2  # transfers of one device in flight


class HotTier(ArenaTier):
    """The cpu pool: raw blocks where local readers map them."""

    def __init__(self, arena: Arena, pool: Pool, capacity: int) -> None:
        super().__init__(Tier.HOT, arena, pool, capacity)


class DevicePool:
    """Raw blocks in one uint8 tensor of a device. On CUDA through pinned buffers on a stream of its own.

    A write or read returns after its event, so a block's place is never reused while a transfer still runs.
    """

    tier = Tier.HOT
    prefixes = False

    def __init__(self, device: str, pool: Pool, capacity: int) -> None:
        self.device = device
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._pool = pool
        self._free = Extents()
        self._free.add(0, self.capacity)
        self._blocks = 0
        self._writes = 0
        self._tensor: Any = None
        self._stream: Any = None
        self._staging: list[Any] = []
        self._slots = asyncio.Semaphore(STAGING_BUFFERS)

    @property
    def used(self) -> int:
        return self.capacity - self._free.free

    def stats(self) -> TierStats:
        return TierStats(
            self.tier,
            detail=self.device,
            used=self.used,
            capacity=self.capacity,
            blocks=self._blocks,
            writes=self._writes,
        )

    @staticmethod
    def footprint(nbytes: int) -> int:
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def fits(self, nbytes: int) -> bool:
        return self._free.largest >= self.footprint(nbytes)

    async def start(self) -> list[Recovered]:
        await self._pool.run(self._allocate)
        return []

    def _allocate(self) -> None:
        try:
            torch = importlib.import_module("torch")
        except ImportError as error:
            raise SetupError(f"device {self.device} needs torch: pip install 'tiered-kvstore[torch]'") from error
        try:
            device = torch.device(self.device)
            self._tensor = torch.empty(self.capacity, dtype=torch.uint8, device=device)
            on_cuda = device.type == "cuda"
            self._stream = torch.cuda.Stream(device) if on_cuda else None
            self._staging = [
                torch.empty(min(STAGING_BYTES, self.capacity), dtype=torch.uint8, pin_memory=on_cuda)
                for _ in range(STAGING_BUFFERS)
            ]
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SetupError(
                f"device {self.device} gives no {self.capacity} bytes ({reason}); lower device_bytes"
            ) from error

    async def write(self, namespace: str, header: Header, parts: Sequence[Buffer]) -> Location:
        nbytes = sum(memoryview(part).nbytes for part in parts)
        at = self._free.take(self.footprint(nbytes)) if nbytes else None
        if at is None:
            raise TierFull(f"hot pool of {self.device}: no {nbytes} bytes free of {self.capacity}; raise device_bytes")
        location = Location(0, at, nbytes)
        self._blocks += 1
        try:
            async with self._slots:
                staging = self._staging.pop()
                try:
                    await self._pool.run(self._upload, parts, at, staging)
                finally:
                    self._staging.append(staging)
        except BaseException:
            self.free(namespace, header, location)
            raise
        self._writes += 1
        return location

    async def read(self, namespace: str, header: Header, location: Location, target: memoryview) -> None:
        async with self._slots:
            staging = self._staging.pop()
            try:
                await self._pool.run(self._download, location, target, staging)
            finally:
                self._staging.append(staging)

    def _upload(self, parts: Sequence[Buffer], at: int, staging: Any) -> None:
        """Thread: every piece passes the pinned buffer, which is reused only after its transfer has ended."""
        window = memoryview(staging.numpy())
        for part in parts:
            data = memoryview(part).cast("B")
            for start in range(0, len(data), len(window)):
                piece = data[start : start + len(window)]
                window[: len(piece)] = piece
                self._transfer(self._tensor[at : at + len(piece)], staging[: len(piece)])
                at += len(piece)

    def _download(self, location: Location, target: memoryview, staging: Any) -> None:
        window = memoryview(staging.numpy())
        for start in range(0, location.length, len(window)):
            nbytes = min(len(window), location.length - start)
            self._transfer(staging[:nbytes], self._tensor[location.offset + start : location.offset + start + nbytes])
            target[start : start + nbytes] = window[:nbytes]

    def _transfer(self, target: Any, source: Any) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        torch = importlib.import_module("torch")
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        done.synchronize()

    def free(self, namespace: str, header: Header, location: Location) -> None:
        self._free.add(location.offset, self.footprint(location.length))
        self._blocks -= 1

    async def tick(self) -> None:
        return None

    async def close(self) -> None:
        """Give the device's memory back."""
        self._tensor = self._stream = None
        self._staging.clear()
