"""A disk in memory that loses power and fails on command: the `Disk` of tests and of the simulator.

What was written is visible at once and durable after `sync`. `crash` throws away or tears, at any byte, what was not
synced; files open before it are dead. Creation, removal and `replace` are durable when they return, as they are with
`kvstore.machine.disk.FolderDisk`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from kvstore.types import Buffer


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@dataclass(slots=True)
class Inode:
    content: bytearray = field(default_factory=bytearray)  # what a reader sees
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)  # (offset, data); None: truncated to offset


class MemoryDisk:
    """One folder. `landed` counts the faults that really hit an operation."""

    def __init__(self, capacity: int | None = None, *, direct: bool = False) -> None:
        self.inodes: dict[str, Inode] = {}
        self.capacity = capacity  # bytes of content; beyond it ENOSPC, after a short write of what still fits
        self.direct = direct  # files opened direct insist on alignment of offset and length
        self.failing: dict[str, int] = {}  # operation (open, read, write, sync, remove, replace) -> errno
        self.write_bytes_max: int | None = None  # a single write is cut off there
        self.writes_left: int | None = None  # then every write and sync fails with EIO
        self.landed: dict[str, int] = {}
        self.boot = 0  # how many crashes
        self._locks: dict[str, None] = {}

    def _check(self, operation: str) -> None:
        if self.writes_left is not None and operation in ("write", "sync", "remove", "replace"):
            if self.writes_left == 0:
                self._land(operation)
                raise _error(errno.EIO)
            self.writes_left -= 1
        if (code := self.failing.get(operation)) is not None:
            self._land(operation)
            raise _error(code)

    def _land(self, fault: str) -> None:
        self.landed[fault] = self.landed.get(fault, 0) + 1

    def used(self) -> int:
        return sum(len(inode.content) for inode in self.inodes.values())

    def open(self, name: str, *, create: bool = False, direct: bool = False) -> MemoryFile:
        self._check("open")
        if name not in self.inodes:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            self.inodes[name] = Inode()
        return MemoryFile(self, self.inodes[name], direct and self.direct)

    def names(self) -> list[str]:
        return sorted(self.inodes)

    def remove(self, name: str) -> None:
        self._check("remove")
        if self.inodes.pop(name, None) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def replace(self, name: str, content: bytes) -> None:
        self._check("replace")
        old = len(self.inodes[name].content) if name in self.inodes else 0
        if self.capacity is not None and self.used() - old + len(content) > self.capacity:
            self._land("full")
            raise _error(errno.ENOSPC)
        self.inodes[name] = Inode(bytearray(content), bytearray(content))

    def read(self, name: str) -> bytes | None:
        self._check("read")
        inode = self.inodes.get(name)
        return None if inode is None else bytes(inode.content)

    def lock(self, name: str) -> Callable[[], None] | None:
        if name in self._locks:
            return None
        self._locks[name] = None
        return lambda: self._locks.pop(name, None)

    def free_bytes(self) -> int:
        return (1 << 50) if self.capacity is None else max(0, self.capacity - self.used())

    def kill(self) -> None:
        """The process dies, the machine goes on: nothing is lost but locks and open files."""
        self.boot += 1
        self._locks.clear()

    def crash(self, rng: Random) -> None:
        """Power loss: each unsynced write is kept, lost or torn, whatever the order they were made in."""
        for inode in self.inodes.values():
            content = bytearray(inode.durable)
            for offset, data in inode.unsynced:
                if data is None:
                    if rng.random() < 0.5:
                        del content[offset:]
                    continue
                fate = rng.random()
                kept = len(data) if fate < 0.3 else 0 if fate < 0.6 else rng.randrange(len(data) + 1)
                if kept < len(data):
                    self._land("torn" if kept else "lost")
                if kept:
                    _put(content, offset, data[:kept])
            inode.content, inode.durable, inode.unsynced = content, bytearray(content), []
        self.kill()

    def rot(self, rng: Random, spared: Sequence[str] = ()) -> None:
        """One bit of some file is not what was written any more, and stays so."""
        names = [name for name, inode in self.inodes.items() if name not in spared and inode.content]
        if names:
            inode = self.inodes[rng.choice(names)]
            place, bit = rng.randrange(len(inode.content)), 1 << rng.randrange(8)
            inode.content[place] ^= bit
            if place < len(inode.durable):
                inode.durable[place] ^= bit
            self._land("rot")


class MemoryFile:
    """An open file; EBADF after a crash or a close."""

    def __init__(self, disk: MemoryDisk, inode: Inode, direct: bool) -> None:
        self._disk = disk
        self._inode = inode
        self._boot: int | None = disk.boot
        self.direct = direct

    def _use(self, operation: str) -> Inode:
        if self._boot != self._disk.boot:
            raise _error(errno.EBADF)
        self._disk._check(operation)
        return self._inode

    def _aligned(self, *numbers: int) -> None:
        if self.direct and any(number % 4096 for number in numbers):
            raise _error(errno.EINVAL)

    def pread_into(self, offset: int, target: memoryview) -> int:
        return self.preadv_into(offset, [target])

    def preadv_into(self, offset: int, targets: Sequence[memoryview]) -> int:
        inode = self._use("read")
        self._aligned(offset, *(len(target) for target in targets))
        done = 0
        for target in targets:
            found = inode.content[offset + done : offset + done + len(target)]
            target[: len(found)] = found
            done += len(found)
            if len(found) < len(target):
                break
        return done

    def pwritev(self, offset: int, parts: Sequence[Buffer]) -> int:
        inode = self._use("write")
        data = b"".join(bytes(part) for part in parts)
        self._aligned(offset, *(memoryview(part).nbytes for part in parts))
        limit = self._disk.write_bytes_max
        if limit is not None and len(data) > limit:
            self._disk._land("short")
            data = data[:limit]
        if self._disk.capacity is not None:
            room = self._disk.free_bytes() + max(0, len(inode.content) - offset)
            if len(data) > room:
                self._disk._land("full")
                data = data[: room // 4096 * 4096]
                if not data:
                    raise _error(errno.ENOSPC)
        _put(inode.content, offset, data)
        inode.unsynced.append((offset, data))
        return len(data)

    def sync(self) -> None:
        inode = self._use("sync")
        inode.durable, inode.unsynced = bytearray(inode.content), []

    def truncate(self, size: int) -> None:
        inode = self._use("write")
        del inode.content[size:]
        inode.content.extend(bytes(size - len(inode.content)))
        inode.unsynced.append((size, None))

    def size(self) -> int:
        return len(self._use("size").content)

    def close(self) -> None:
        self._boot = None


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data
