"""Making the arena's segments off the event loop: faulting one in takes as long as copying many blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.errors import SetupError
from kvstore.seams import Pool, Segment
from kvstore.store.arena import Arena


class Growth:
    """One segment at a time: what an allocation waits for, else one ahead of need."""

    def __init__(self, arena: Arena, pool: Pool, grown: Callable[[], None]) -> None:
        self.arena = arena
        self._pool = pool
        self._grown = grown  # called when an allocation that found no room may be tried again
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        return self._task is not None

    def poke(self) -> None:
        """Begin if a segment is wanted and none is being made. Mutates; never waits."""
        if self._task is None and not self._closed and self.arena.spare_wanted():
            self._task = asyncio.get_running_loop().create_task(self._make(self.arena.spare_wanted()))
            self._task.add_done_callback(self._ended)

    async def _make(self, data_bytes: int) -> None:
        made: list[Segment] = []
        try:
            await self._pool.run(lambda: made.append(self.arena.make(data_bytes)))
            self.arena.keep_spare(made.pop(), data_bytes)
        except SetupError:
            self.arena.refused()
        finally:
            for unwanted in made:  # cancelled while it was being made
                unwanted.close()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler({"message": "a segment failed", "exception": error})
        self._grown()
        self.poke()

    async def close(self) -> None:
        """Stop; a segment in the making is thrown away."""
        self._closed = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
