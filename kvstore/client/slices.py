"""Bytes to copy, cut into slices: byte movers take them, and the event loop too between its turns.

A byte mover that slept takes a tenth of a millisecond to begin, and as long to be heard of: the time that it takes to
copy a megabyte or two. So the loop begins at once, and whoever is free takes the next slice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from kvstore.seams import Pool

SLICE_BYTES = 2 << 20
"""A fifth of a millisecond: the longest that the loop is kept by one slice."""

MOVED_BYTES = 8 << 20
"""For so many bytes a byte mover is asked to help."""

MOVERS_MAX = 2

LAST_SLICES = 2
"""They are the loop's: meanwhile it hears that the byte movers are done."""


class Slices:
    """Of one copy."""

    def __init__(self, copy: Callable[[int, int], None], nbytes: int) -> None:
        """`copy(first, last)` copies the bytes of one slice; several at the same time, and in any order."""
        self._copy, self._nbytes = copy, nbytes
        self._left = deque(range(0, nbytes, SLICE_BYTES))
        self._done = deque[int]()  # appended to by several threads

    async def run(self, pool: Pool) -> None:
        """Copy all. Cancelled: nobody copies any more when it raises. Mutates what `copy` does."""
        movers = [
            asyncio.ensure_future(pool.run(self._work)) for _ in range(min(MOVERS_MAX, self._nbytes // MOVED_BYTES))
        ]
        try:
            if movers:
                await asyncio.sleep(0)  # now they are begun
            while self._turn():
                if self._left:
                    await asyncio.sleep(0)
        finally:
            self._left.clear()
            for mover in movers:
                mover.cancel()  # if it has not begun; a slice that has is waited for
            ended = await asyncio.gather(*movers, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception):
                raise failure
        if sum(self._done) != self._nbytes:
            raise RuntimeError("a slice was taken and not copied")

    def _work(self) -> None:
        """Thread."""
        while len(self._left) > LAST_SLICES and self._turn():
            pass

    def _turn(self) -> bool:
        """Copy the next slice, if there is one."""
        try:
            first = self._left.popleft()
        except IndexError:
            return False
        last = min(first + SLICE_BYTES, self._nbytes)
        self._copy(first, last)
        self._done.append(last - first)
        return True
