"""Blocks on their way into memory, copied and summed several to a turn of a byte mover: a turn costs as much as copying
a few hundred KiB."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvstore.checksum import copy_and_checksum_all, prepare
from kvstore.seams import Pool, System
from kvstore.store import together

TURN_BYTES = 8 << 20

Job = tuple[memoryview, memoryview]
"""(source, target)."""


@dataclass(slots=True)
class Call:
    """The blocks that one caller waits for."""

    sums: list[int]
    done: asyncio.Future[None]
    left: int = 0  # pieces in line, or with a mover
    error: Exception | None = None

    def end(self) -> None:
        """A piece is copied, or failed. Mutates."""
        self.left -= 1
        if not self.left:
            self.done.set_result(None)


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks of a call, together not much more than a turn."""

    call: Call
    first: int  # position of the first among the call's
    jobs: Sequence[Job]
    nbytes: int


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


class Copier:
    """What waits is bounded by the room that was reserved for it."""

    def __init__(self, pool: Pool, lanes: int) -> None:
        """`lanes`: byte movers that copy at a time. One turn more than that is handed over, so that a mover which ends
        one finds the next there: else it would wait until the event loop has told of what arrived (GIL), and the two
        would take turns instead of working at the same time."""
        self._pool = pool
        self._lanes = lanes + 1
        self._line: deque[Piece] = deque()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._running = 0  # lanes that will look at the line again; a task that has ended may still be in `_tasks`

    async def copy(self, source: memoryview, target: memoryview) -> int:
        """XXH3-64 of what arrived in `target`. Cancelled: only when nobody touches the buffers any more."""
        [copied] = await self.copy_all([(source, target)])
        return copied

    async def copy_all(self, jobs: Sequence[Job]) -> list[int]:
        """`copy` of each, with one wait for all. Where one fails, so does the call."""
        if not jobs:
            return []
        loop = asyncio.get_running_loop()
        call = Call([0] * len(jobs), loop.create_future())
        self._queue(call, jobs)
        for _ in range(min(call.left, self._lanes - self._running)):
            self._running += 1
            task = loop.create_task(self._work())
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)
        try:
            await asyncio.shield(call.done)
        except asyncio.CancelledError:
            while not call.done.done():
                with suppress(asyncio.CancelledError):  # cancelled again: the buffers are still in use
                    await asyncio.shield(call.done)
            raise
        if call.error is not None:
            raise call.error
        return call.sums

    def _queue(self, call: Call, jobs: Sequence[Job]) -> None:
        """In pieces of a turn each, the last one with what is left. Mutates."""
        first = nbytes = 0
        for index, (source, _) in enumerate(jobs):
            nbytes += len(source)
            if nbytes >= TURN_BYTES or index == len(jobs) - 1:
                self._line.append(Piece(call, first, jobs[first : index + 1], nbytes))
                call.left += 1
                first, nbytes = index + 1, 0

    async def _work(self) -> None:
        try:
            await self._drain()
        finally:
            self._running -= 1  # in the same step as the last look at the line: nobody is left waiting in it

    async def _drain(self) -> None:
        while self._line:
            pieces, nbytes = [self._line.popleft()], 0
            while self._line and (nbytes := nbytes + pieces[-1].nbytes) < TURN_BYTES:
                pieces.append(self._line.popleft())
            jobs = pieces[0].jobs if len(pieces) == 1 else [job for piece in pieces for job in piece.jobs]
            try:
                sums = await self._pool.run(copy_and_checksum_all, jobs)
            except BaseException as error:
                for piece in pieces:
                    given_up = error if isinstance(error, Exception) else RuntimeError("the copy was given up")
                    piece.call.error = given_up
                    piece.call.end()
                if not isinstance(error, Exception):
                    raise
                continue
            at = 0
            for piece in pieces:
                piece.call.sums[piece.first : piece.first + len(piece.jobs)] = sums[at : at + len(piece.jobs)]
                at += len(piece.jobs)
                piece.call.end()
