"""What the tiers are compared with: the same bytes moved by plain loops, with nothing checked, indexed or bounded.

They reach for files and sockets directly: a baseline through the project's own ports would measure them twice.
"""

from __future__ import annotations

import os
import socket  # noqa: TID251 - a baseline
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import unquote, urlsplit

import numpy as np

Blocks = Sequence[memoryview]


def memcpy(sources: Blocks, targets: Blocks) -> None:
    """One thread, block by block."""
    for source, target in zip(sources, targets, strict=True):
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class FileLoop:
    """`pwritev` and `preadv` of aligned blocks with O_DIRECT, `depth` at a time, on one file."""

    def __init__(self, path: str, depth: int) -> None:
        self.path = path
        self._pool = ThreadPoolExecutor(depth)

    def write(self, blocks: Blocks, sync_blocks: int) -> None:
        """Into a new file; fdatasync after every `sync_blocks`."""
        size = len(blocks[0])
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)  # noqa: TID251 - a baseline
        try:
            for start in range(0, len(blocks), sync_blocks):
                some = range(start, min(len(blocks), start + sync_blocks))
                done = self._pool.map(lambda i: os.pwritev(fd, [blocks[i]], i * size), some)
                assert sum(done) == len(some) * size
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def read(self, targets: Blocks, order: Sequence[int]) -> None:
        """Block `i` of the file into `targets[i]`, in the given order."""
        size = len(targets[0])
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)  # noqa: TID251 - a baseline
        try:
            assert sum(self._pool.map(lambda i: os.preadv(fd, [targets[i]], i * size), order)) == len(order) * size
        finally:
            os.close(fd)

    def close(self) -> None:
        self._pool.shutdown()
        with suppress(FileNotFoundError):
            os.unlink(self.path)


def read_files(paths: Sequence[str], buffer: memoryview) -> int:
    """Files from beginning to end with plain buffered reads, their pages dropped from the cache before; bytes read."""
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # noqa: TID251 - a baseline
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while got := os.readv(fd, [buffer]):
                total += got
        finally:
            os.close(fd)
    return total


class RespLoop:
    """Redis spoken over one raw socket: `flight` commands sent, then their replies read, into buffers made before."""

    def __init__(self, url: str, flight: int) -> None:
        """`url`: unix://:password@/path."""
        parts = urlsplit(url)
        self.flight = flight
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(unquote(parts.path))
        self._line = bytearray(256)
        if parts.password:
            self._send([b"AUTH", parts.password.encode()])
            self._expect(b"+OK\r\n")

    def set(self, keys: Sequence[bytes], values: Blocks) -> None:
        self._in_flight(
            len(keys), lambda i: self._send([b"SET", keys[i], values[i]]), lambda i: self._expect(b"+OK\r\n")
        )

    def get(self, keys: Sequence[bytes], targets: Blocks) -> None:
        def receive(i: int) -> None:
            self._expect(b"$%d\r\n" % len(targets[i]))
            self._fill(targets[i])
            self._expect(b"\r\n")

        self._in_flight(len(keys), lambda i: self._send([b"GET", keys[i]]), receive)

    def delete(self, keys: Sequence[bytes]) -> None:
        self._send([b"DEL", *keys])
        self._expect(b":%d\r\n" % len(keys))

    def _in_flight(self, count: int, send: Callable[[int], None], receive: Callable[[int], None]) -> None:
        for i in range(count + self.flight):
            if i >= self.flight:
                receive(i - self.flight)
            if i < count:
                send(i)

    def _send(self, words: Sequence[bytes | memoryview]) -> None:
        parts: list[bytes | memoryview] = [b"*%d\r\n" % len(words)]
        for word in words:
            parts += [b"$%d\r\n" % len(word), word, b"\r\n"]
        for part in _joined(parts):
            self._socket.sendall(part)

    def _expect(self, line: bytes) -> None:
        view = memoryview(self._line)[: len(line)]
        self._fill(view)
        assert view == line, bytes(view)

    def _fill(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            got = self._socket.recv_into(target[done:])
            assert got, "Redis hung up"
            done += got

    def close(self) -> None:
        self._socket.close()


def _joined(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Small parts together, large ones where they lie."""
    out: list[bytes | memoryview] = []
    for part in parts:
        if out and len(part) < 4096 and isinstance(out[-1], bytes):
            out[-1] = b"".join((out[-1], part))
        else:
            out.append(part)
    return out
