"""Moving bytes to and from files in multiples of 4096, as direct I/O asks, with as few copies as the addresses allow.

The functions block and touch nothing but their arguments: they run in the pool.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from kvstore.seams import File
from kvstore.types import Buffer

ALIGNMENT = 4096
KEPT_BYTES = 64 << 20
"""Of bounce buffers that wait for their next use; more are made when needed and dropped afterwards."""

_ZEROS = bytes(ALIGNMENT)


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole alignment units."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def is_aligned(view: Buffer) -> bool:
    """Whether the bytes begin at an address that direct I/O takes."""
    data = np.frombuffer(view, np.uint8)
    return int(data.__array_interface__["data"][0]) % ALIGNMENT == 0


class Bounce:
    """Page-aligned buffers, faulted in by their first use and then reused. Take and give on the loop."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._idle: dict[int, list[mmap.mmap]] = {}
        self.idle_bytes = 0

    def take(self, nbytes: int) -> mmap.mmap:
        """At least `nbytes`, a power of two. Give it back."""
        size = max(1 << 16, 1 << max(nbytes - 1, 0).bit_length())
        idle = self._idle.get(size)
        if idle:
            self.idle_bytes -= size
            return idle.pop()
        return mmap.mmap(-1, size)

    def give(self, buffer: mmap.mmap) -> None:
        size = len(buffer)
        if self.idle_bytes + size > self._kept_bytes:
            _unmap(buffer)
            return
        self.idle_bytes += size
        self._idle.setdefault(size, []).append(buffer)

    def close(self) -> None:
        for buffers in self._idle.values():
            for buffer in buffers:
                _unmap(buffer)
        self._idle.clear()
        self.idle_bytes = 0


def _unmap(buffer: mmap.mmap) -> None:
    """While the traceback of a failed read or write refers to it, its memory goes with that."""
    with suppress(BufferError):
        buffer.close()


def straight(parts: Sequence[Buffer]) -> bool:
    """Whether direct I/O can take the parts where they lie, but for the last, broken unit."""
    return len(parts) == 1 and is_aligned(parts[0])


def write_record(file: File, offset: int, parts: Sequence[Buffer], nbytes: int, bounce: mmap.mmap | None) -> None:
    """Write `nbytes` of parts at `offset`, zeros up to the next unit. OSError; a write that ends short is EIO.

    `bounce`, where given, is used for direct I/O: for the tail when the parts lie straight, else for everything.
    """
    total = padded(nbytes)
    if bounce is None:
        write_all(file, offset, [*parts, _ZEROS[: total - nbytes]])
        return
    with memoryview(bounce) as view:
        if straight(parts):
            record = memoryview(parts[0]).cast("B")
            whole = nbytes // ALIGNMENT * ALIGNMENT
            tail = _gather(view, [record[whole:]], total - whole)
            write_all(file, offset, [record[:whole], tail])
        else:
            write_all(file, offset, [_gather(view, parts, total)])


def _gather(bounce: memoryview, parts: Sequence[Buffer], total: int) -> memoryview:
    """The parts back to back in the bounce buffer, zeros up to `total`."""
    target, done = np.frombuffer(bounce, np.uint8), 0
    for part in parts:
        source = np.frombuffer(part, np.uint8)
        np.copyto(target[done : done + len(source)], source)  # numpy lets go of the interpreter lock
        done += len(source)
    target[done:total] = 0
    return bounce[:total]


def write_all(file: File, offset: int, parts: Sequence[Buffer]) -> None:
    """pwritev until all is written; OSError from the system, EIO when nothing more goes."""
    rest = [view for view in (memoryview(part).cast("B") for part in parts) if len(view)]
    while rest:
        done = file.pwritev(offset, rest)
        if file.direct:
            done -= done % ALIGNMENT  # go on from a whole unit
        if done <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += done
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if done:
            rest[0] = rest[0][done:]


def read_record(file: File, offset: int, target: memoryview, bounce: mmap.mmap | None) -> bool:
    """Fill `target` from `offset`. False when the file ends before."""
    nbytes = len(target)
    if bounce is None:
        return file.pread_into(offset, target) == nbytes
    with memoryview(bounce) as view:
        if is_aligned(target):
            whole = nbytes // ALIGNMENT * ALIGNMENT
            if file.preadv_into(offset, [target[:whole], view[: padded(nbytes - whole)]]) < nbytes:
                return False
            target[whole:] = view[: nbytes - whole]
            return True
        if file.pread_into(offset, view[: padded(nbytes)]) < nbytes:
            return False
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(view[:nbytes], np.uint8))
        return True
