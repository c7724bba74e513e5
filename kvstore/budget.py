"""A bound on bytes in flight, with a line for those who wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvstore.errors import DeadlineExceeded, Overloaded
from kvstore.fair import FairLine


class Budget:
    """Bytes in flight; who finds none free waits in line, where namespaces take turns by bytes. One larger than the
    whole budget passes alone."""

    def __init__(self, capacity: int, waiting_max: int = 1 << 62) -> None:
        """`waiting_max`: bytes in line; beyond it the last of whoever has most there gives way."""
        self.capacity, self.waiting_max = capacity, waiting_max
        self.used = 0
        self._line: FairLine[asyncio.Future[None]] = FairLine()

    @property
    def waiting(self) -> int:
        """Bytes in line."""
        return self._line.nbytes

    def fits(self, nbytes: int) -> bool:
        return not self._line and (self.used + nbytes <= self.capacity or not self.used)

    async def take(self, nbytes: int, namespace: str = "") -> None:
        """Wait for `nbytes`. Cancelled: nothing is taken. Overloaded where it would be too long a line."""
        if self.fits(nbytes):
            self.used += nbytes
            return
        gone = self._line.give_way(namespace, nbytes, self.waiting_max)
        if gone is None:
            raise Overloaded(f"{self._line.nbytes} bytes are waited for already: later")
        for other in gone:
            if not other.cancelled():
                other.set_exception(Overloaded("others with less in line were let in: later"))
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.push(namespace, place, nbytes)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                if place.exception() is None:
                    self.give(nbytes)
            else:
                self._line.remove(namespace, place)
                self._serve()
            raise

    @asynccontextmanager
    async def hold(self, nbytes: int, namespace: str, timeout_s: float | None) -> AsyncIterator[None]:
        """`take` for the time of the block. DeadlineExceeded when the turn has not come in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.take(nbytes, namespace)
        except TimeoutError:
            raise DeadlineExceeded(f"{nbytes} bytes did not get their turn within {timeout_s:.3f} s") from None
        try:
            yield
        finally:
            self.give(nbytes)

    def give(self, nbytes: int) -> None:
        self.used -= nbytes
        self._serve()

    def _serve(self) -> None:
        self._line.serve(self._pass, skip=False)

    def _pass(self, namespace: str, place: asyncio.Future[None], nbytes: int) -> bool:
        """Whether it leaves the line: its turn has come, or its waiter is about to say that it waits no more."""
        if place.cancelled():
            return True
        if self.used and self.used + nbytes > self.capacity:
            return False
        self.used += nbytes
        place.set_result(None)
        return True
