"""What the store's tests pass in: memory without memfds, and a pool that runs in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvstore.errors import SetupError

T = TypeVar("T")


class PlainSegment:
    """A bytearray with a segment's face."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.view = memoryview(bytearray(nbytes))
        self.fd: int | None = None
        self.closed = False

    def close(self) -> None:
        assert not self.closed, "a segment is closed twice"
        self.closed = True


class PlainMemory:
    """Counts what it gave; `limit` bytes in all, like a kernel out of memory."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.made: list[PlainSegment] = []

    def segment(self, name: str, nbytes: int, *, sealed_writes: bool) -> PlainSegment:
        assert name and isinstance(sealed_writes, bool)
        if self.limit is not None and self.open_bytes + nbytes > self.limit:
            raise SetupError(f"no {nbytes} bytes of shared memory")
        self.made.append(PlainSegment(nbytes))
        return self.made[-1]

    @property
    def open_bytes(self) -> int:
        return sum(segment.nbytes for segment in self.made if not segment.closed)


class InPlacePool:
    """Runs work at once, on the loop's thread: every interleaving a test sees is its own."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        return function(*args)

    def close(self) -> None:
        return None
