"""Open files of a folder, a bounded number of them: a large log has more segments than a process has descriptors."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from kvstore.seams import Disk, File, Pool

T = TypeVar("T")


async def finish(work: Awaitable[T], keep: Callable[[T], None]) -> None:
    """Await `work` and hand its result to `keep`, also when the caller is cancelled meanwhile: an open file that nobody
    took would stay open for ever."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    keep(task.result())
    if cancelled:
        raise asyncio.CancelledError


@dataclass(slots=True, eq=False)
class _Handle:
    file: File
    users: int = 0
    forgotten: bool = False  # close it when the last user is done


class Handles:
    """Invariant: every handle in `_open` is open and not forgotten; beyond the limit only used ones stay open."""

    def __init__(self, disk: Disk, pool: Pool, limit: int = 128) -> None:
        self._disk = disk
        self._pool = pool
        self._limit = limit
        self._closed = False
        self._open: dict[str, _Handle] = {}  # least recently used first

    @asynccontextmanager
    async def lease(self, name: str, *, direct: bool) -> AsyncIterator[File]:
        """The file of that name for the time of the block, also when it is removed meanwhile. OSError."""
        if name not in self._open:
            opening = self._pool.run(lambda: self._disk.open(name, direct=direct))
            await finish(opening, lambda file: self.adopt(name, file))
        handle = self._open.pop(name, None)
        if handle is None:
            raise OSError(errno.EBADF, "the log is closed")
        self._open[name] = handle
        handle.users += 1
        try:
            yield handle.file
        finally:
            handle.users -= 1
            if handle.forgotten and handle.users == 0:
                handle.file.close()
            self._trim()

    def adopt(self, name: str, file: File) -> None:
        """Keep a file that was just opened, unless somebody else opened it meanwhile."""
        if name in self._open or self._closed:
            file.close()
        else:
            self._open[name] = _Handle(file)

    def forget(self, name: str) -> None:
        """The file goes away: a later lease opens anew, present users finish."""
        handle = self._open.pop(name, None)
        if handle is not None:
            handle.forgotten = True
            if handle.users == 0:
                handle.file.close()

    def close(self) -> None:
        """What is in use closes with its last user; nothing opens any more."""
        self._closed = True
        for name in list(self._open):
            self.forget(name)

    def _trim(self) -> None:
        if len(self._open) <= self._limit:
            return
        for name in [name for name, handle in self._open.items() if handle.users == 0][: len(self._open) - self._limit]:
            self.forget(name)
