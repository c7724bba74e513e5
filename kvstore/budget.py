"""A bound on bytes in flight, with a line for those who wait."""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
    """Bytes in flight; who finds none free waits in line. One larger than the whole budget passes alone."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()

    def fits(self, nbytes: int) -> bool:
        return not self._line and (self.used + nbytes <= self.capacity or not self.used)

    async def take(self, nbytes: int) -> None:
        """Wait for `nbytes`. Cancelled: nothing is taken."""
        if self.fits(nbytes):
            self.used += nbytes
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((place, nbytes))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give(nbytes)
            else:
                if (place, nbytes) in self._line:
                    self._line.remove((place, nbytes))
                self._serve()
            raise

    def give(self, nbytes: int) -> None:
        self.used -= nbytes
        self._serve()

    def _serve(self) -> None:
        while self._line:
            place, nbytes = self._line[0]
            if place.cancelled():  # its waiter is about to say so
                self._line.popleft()
                continue
            if self.used and self.used + nbytes > self.capacity:
                return
            self._line.popleft()
            self.used += nbytes
            place.set_result(None)
