"""Everything impure, as ports: clock, random source, disk, memory, byte movers, processes.

The logic of clients, workers and coordinators gets a `System` and reaches for nothing else, so that the
simulator (tests/sim) runs the same code under virtual time. `kvstore.machine.system` holds the real implementations;
the network is a port of its own, `kvstore.transport.base`. Waiting is asyncio's own (`asyncio.timeout`,
`asyncio.sleep`): the simulator replaces the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random  # noqa: TID251 - the type; instances are passed in
from typing import Protocol, TypeVar

from kvstore.types import Buffer

T = TypeVar("T")


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds; the only clock that leases, deadlines and ages may use."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970; for names and people, never for a decision between processes."""


class File(Protocol):
    """An open file. Blocking: called through `Pool`. OSError as the system reports it."""

    @property
    def direct(self) -> bool:
        """Whether I/O bypasses the page cache; offsets, lengths and addresses must then be multiples of 4096."""

    def pread_into(self, offset: int, target: memoryview) -> int:
        """Bytes read; fewer than asked only at the end of the file."""

    def preadv_into(self, offset: int, targets: Sequence[memoryview]) -> int:
        """Fill several targets back to back, as one call. Bytes read; fewer than asked only at the end of the file."""

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> int:
        """Bytes written; may be short, as the system call may."""

    def sync(self) -> None:
        """Data durable when it returns (fdatasync)."""

    def truncate(self, size: int) -> None: ...

    def size(self) -> int: ...

    def close(self) -> None: ...


class Disk(Protocol):
    """One folder. Names are relative to it. Blocking: called through `Pool`."""

    def open(self, name: str, *, create: bool = False, direct: bool = False) -> File:
        """Read and write. With `direct`, O_DIRECT where the folder supports it (see `File.direct`)."""

    def names(self) -> list[str]: ...

    def remove(self, name: str) -> None: ...

    def replace(self, name: str, content: bytes) -> None:
        """Small file, atomically and durably: written aside, synced, renamed, folder synced."""

    def read(self, name: str) -> bytes | None:
        """Small file whole, None where there is none."""

    def lock(self, name: str) -> Callable[[], None] | None:
        """Exclusive for the life of the process; returns the unlock, or None when another process holds it."""

    def free_bytes(self) -> int: ...


class Memory(Protocol):
    """Maker of shared segments."""

    def segment(self, name: str, nbytes: int, *, sealed_writes: bool) -> Segment:
        """Faulted in, sealed against resizing; `sealed_writes`: nobody but this mapping may write from now on."""


class Segment(Protocol):
    """Shared memory of this process, passable to another one as a descriptor."""

    view: memoryview  # writable, len == nbytes
    nbytes: int
    fd: int | None  # None in the simulator

    def close(self) -> None:
        """Unmap and close; peers keep their own mapping."""


class Pool(Protocol):
    """Where blocking byte work runs."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run outside the event loop, return its value or raise what it raised. `function` touches no metadata."""

    async def run_abortable(self, abort: Callable[[], None] | None, function: Callable[..., T], *args: object) -> T:
        """As `run`; work that has begun when the caller is cancelled is asked to end early by `abort`."""

    def close(self) -> None: ...


class Process(Protocol):
    pid: int

    def alive(self) -> bool: ...

    def terminate(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after the grace; returns when it is gone."""


class Spawner(Protocol):
    def spawn(self, argv: Sequence[str], *, env: dict[str, str] | None = None, log: str | None = None) -> Process: ...


@dataclass(frozen=True, slots=True)
class System:
    """The ports one process works with."""

    clock: Clock
    rng: Random
    memory: Memory
    pool: Pool
    host: str  # boot id of the machine: equal on two processes means they share a kernel
    disk: Callable[[str], Disk]  # folder -> Disk; made when missing; SetupError when unusable
    own_pool: Callable[[int], Pool] | None = None  # so many threads for one purpose; None: `pool` serves all
    inline_bytes: int = 0  # work on so few bytes is done at once: changing threads would take longer

    async def work(self, nbytes: int, function: Callable[..., T], *args: object) -> T:
        """Byte work on `nbytes`: by a thread of `pool`, as `Pool.run`, or here and now where it is little."""
        if nbytes <= self.inline_bytes:
            return function(*args)
        return await self.pool.run(function, *args)

    def token_hex(self, nbytes: int) -> str:
        """A name nobody else draws: `nbytes` of randomness as hexadecimal digits."""
        return self.rng.randbytes(nbytes).hex()
