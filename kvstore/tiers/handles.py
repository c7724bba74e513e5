"""Open files of a folder, a bounded number of them: a large log has more segments than a process has descriptors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvstore.seams import Disk, File, Pool


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
        self._open: dict[str, _Handle] = {}  # least recently used first

    @asynccontextmanager
    async def lease(self, name: str, *, direct: bool) -> AsyncIterator[File]:
        """The file of that name for the time of the block, also when it is removed meanwhile. OSError."""
        handle = self._open.pop(name, None)
        if handle is None:
            file = await self._pool.run(lambda: self._disk.open(name, direct=direct))
            handle = self._open.pop(name, None)
            if handle is None:
                handle = _Handle(file)
            else:  # somebody else opened it meanwhile
                file.close()
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
        """Keep a file that was just made."""
        self._open[name] = _Handle(file)
        self._trim()

    def forget(self, name: str) -> None:
        """The file goes away: a later lease opens anew, present users finish."""
        handle = self._open.pop(name, None)
        if handle is not None:
            handle.forgotten = True
            if handle.users == 0:
                handle.file.close()

    def close(self) -> None:
        for name in list(self._open):
            self.forget(name)

    def _trim(self) -> None:
        if len(self._open) <= self._limit:
            return
        for name in [name for name, handle in self._open.items() if handle.users == 0][: len(self._open) - self._limit]:
            self.forget(name)
