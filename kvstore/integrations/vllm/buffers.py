"""Memory between the store and the engine's pages: bounded, kept for reuse. Used by the client's loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Row = list[NDArray[np.uint8]]
"""One raw block of every group."""


class Rows:
    """At most `bytes_max` of rows, at least one. Fresh memory is slow to touch: rows come back and are used again."""

    def __init__(self, block_bytes: Sequence[int], bytes_max: int) -> None:
        self._block_bytes = list(block_bytes)
        self.row_bytes = sum(block_bytes)
        self.rows_max = max(1, bytes_max // self.row_bytes)
        self._free: list[Row] = []
        self._made = 0
        self._returned = asyncio.Condition()

    def fresh(self, rows: int) -> list[Row]:
        """Rows that are not kept for reuse; the caller bounds them. From any thread."""
        return [[np.empty(nbytes, np.uint8) for nbytes in self._block_bytes] for _ in range(rows)]

    def take(self, rows: int) -> list[Row]:
        """Up to so many rows, now. Mutates."""
        taken: list[Row] = []
        while len(taken) < rows and (self._free or self._made < self.rows_max):
            if not self._free:
                self._made += 1
                self._free.append([np.empty(nbytes, np.uint8) for nbytes in self._block_bytes])
            taken.append(self._free.pop())
        return taken

    async def wait(self, rows: int) -> list[Row]:
        """Up to so many rows and at least one; the caller's deadline bounds the wait. Call it holding none."""
        async with self._returned:
            while not (taken := self.take(rows)):
                await self._returned.wait()
            return taken

    async def give_back(self, rows: Sequence[Row]) -> None:
        """Mutates."""
        async with self._returned:
            self._free.extend(rows)
            self._returned.notify_all()
