"""Blocks on their way into memory, copied and summed several to a turn of a byte mover: a turn costs as much as copying
a few hundred KiB."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from kvstore.checksum import copy_and_checksum_all, prepare
from kvstore.seams import Pool, System
from kvstore.store import together

TURN_BYTES = 8 << 20

Job = tuple[memoryview, memoryview, "asyncio.Future[int]"]


async def prepared(system: System) -> None:
    """Have the fast way of copying at hand. The slow one serves until then, and where a thread of its own may do it,
    nobody waits."""
    pool = system.pool if system.own_pool is None else system.own_pool(1)
    try:
        await pool.run(prepare)
        await pool.run(together.prepare)
    finally:
        if pool is not system.pool:
            pool.close()


def copy_all(jobs: list[Job]) -> list[int]:
    """Thread: every source into its target; the checksums."""
    return copy_and_checksum_all([(source, target) for source, target, _ in jobs])


class Copier:
    """What waits is bounded by the room that was reserved for it."""

    def __init__(self, pool: Pool, lanes: int) -> None:
        """`lanes`: byte movers that copy at a time. One turn more than that is handed over, so that a mover which ends
        one finds the next there: else it would wait until the event loop has told of what arrived (GIL), and the two
        would take turns instead of working at the same time."""
        self._pool = pool
        self._lanes = lanes + 1
        self._line: deque[Job] = deque()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._running = 0  # lanes that will look at the line again; a task that has ended may still be in `_tasks`

    async def copy(self, source: memoryview, target: memoryview) -> int:
        """XXH3-64 of what arrived in `target`. Cancelled: only when nobody touches the buffers any more."""
        [copied] = await self.copy_all([(source, target)])
        return copied

    async def copy_all(self, jobs: Sequence[tuple[memoryview, memoryview]]) -> list[int]:
        """`copy` of each (source, target), with one wait for all. Where one fails, so does the call."""
        if not jobs:
            return []
        loop = asyncio.get_running_loop()
        copies: list[asyncio.Future[int]] = [loop.create_future() for _ in jobs]
        self._line.extend((source, target, done) for (source, target), done in zip(jobs, copies, strict=True))
        turns = -(-sum(len(source) for source, _ in jobs) // TURN_BYTES)
        for _ in range(min(turns, self._lanes - self._running)):
            self._running += 1
            task = loop.create_task(self._work())
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)
        try:
            await asyncio.wait(copies)
        except asyncio.CancelledError:
            while not all(done.done() for done in copies):
                with suppress(asyncio.CancelledError):  # cancelled again: the buffers are still in use
                    await asyncio.wait(copies)
            raise
        return [done.result() for done in copies]

    async def _work(self) -> None:
        try:
            await self._drain()
        finally:
            self._running -= 1  # in the same step as the last look at the line: nobody is left waiting in it

    async def _drain(self) -> None:
        while self._line:
            jobs, nbytes = [self._line.popleft()], 0
            while self._line and (nbytes := nbytes + len(jobs[-1][0])) < TURN_BYTES:
                jobs.append(self._line.popleft())
            try:
                sums = await self._pool.run(copy_all, jobs)
            except BaseException as error:
                for _, _, done in jobs:
                    done.set_exception(error if isinstance(error, Exception) else RuntimeError("the copy was given up"))
                    done.exception()  # seen, also where nobody waits any more
                if not isinstance(error, Exception):
                    raise
                continue
            for (_, _, done), copy_id in zip(jobs, sums, strict=True):
                done.set_result(copy_id)
