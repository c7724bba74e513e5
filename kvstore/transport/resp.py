"""RESP2 (the protocol of Redis) on one blocking socket: parts sent from where they lie, large values received where
they shall lie. Runs in threads; `abort` may be called from anywhere.
"""

from __future__ import annotations

import socket  # noqa: TID251 - the real network
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from kvstore.errors import ConfigError
from kvstore.types import Buffer


class Seal(Protocol):
    """Sums up a value while it is sent, and makes the bytes that end it."""

    nbytes: int

    def update(self, piece: memoryview) -> None: ...

    def end(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Sealed:
    """One argument: `parts`, then what `seal` makes of them while they are sent. Sent once."""

    parts: tuple[Buffer, ...]
    seal: Seal

    @property
    def nbytes(self) -> int:
        return sum(memoryview(part).nbytes for part in self.parts) + self.seal.nbytes

    def joined(self) -> bytes:
        """The argument in one piece, where no socket sends it."""
        for part in self.parts:
            self.seal.update(memoryview(part).cast("B"))
        return b"".join((*self.parts, self.seal.end()))


Argument = Buffer | str | int | Sealed

Command = Sequence[Argument]

Seen = Callable[[memoryview], None]
"""Told each piece of a value's first part when it was received, in order."""

Waiting = tuple[Sequence[memoryview], Seen | None]
"""Where a value shall lie, and who sees it pass."""

LINE_MAX = 64 << 10
"""Bytes read at a time where nobody said where they shall go; a line must fit."""

JOIN_BYTES = 4096  # smaller parts are put together

PIECE_BYTES = 256 << 10
"""What is sent and summed, or received and summed, at a time: it is still in the core's cache the second time."""

SEND_BUFFER_BYTES = 4 << 20
"""Of a Unix socket, as far as the kernel allows: who need not wait for each 100 KiB to be taken switches less."""

_TIMEVAL = struct.Struct("@ll")

DEPTH_MAX = 8  # of arrays in arrays


class ReplyError(Exception):
    """Redis said no to one command: it stands in the place of that command's reply. `code` as in OOM, NOSCRIPT."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Server:
    """Where a URL leads: redis://, rediss:// (TLS) or unix://, with an ACL user."""

    scheme: str
    host: str
    port: int
    path: str
    user: str
    password: str
    db: int
    tls: tuple[tuple[str, str], ...] = ()  # ssl_ca_certs, ssl_certfile, ssl_keyfile

    @classmethod
    def of(cls, url: str) -> Server:
        """ConfigError for a URL that is none, or an option that is unknown."""
        wanted = "redis_url is no Redis URL: give redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH"
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        try:
            port = parts.port or 6379
            at = options.pop("db", "") or ("" if parts.scheme == "unix" else parts.path.strip("/"))
            db = int(at or 0)
        except ValueError:
            raise ConfigError(wanted) from None
        if parts.scheme not in ("redis", "rediss", "unix") or (parts.scheme == "unix" and not parts.path):
            raise ConfigError(wanted)
        tls = {name: options.pop(name) for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile") if name in options}
        if options or (tls and parts.scheme != "rediss"):
            raise ConfigError("redis_url has an unknown option: give redis://HOST:PORT/DB, nothing more")
        return cls(
            parts.scheme, parts.hostname or "localhost", port, unquote(parts.path), unquote(parts.username or ""),
            unquote(parts.password or ""), db, tuple(tls.items()),
        )  # fmt: skip


class RespSocket:
    """One connection. After any error but ReplyError it is useless: `close` it."""

    def __init__(self, server: Server, timeout_s: float) -> None:
        """Connects. OSError; ReplyError where the server refuses user, password or database."""
        self._buffer = bytearray(LINE_MAX)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # what was received and not read yet
        self._socket = _connected(server, timeout_s)
        self._whole = 0 if isinstance(self._socket, ssl.SSLSocket) else socket.MSG_WAITALL
        try:
            words: list[Command] = []
            if server.password:
                words.append(["AUTH", *([server.user] if server.user else []), server.password])
            if server.db:
                words.append(["SELECT", server.db])
            for reply in self.call(words, ()):
                if isinstance(reply, ReplyError):
                    raise reply
        except BaseException:
            self.close()
            raise

    def call(self, commands: Sequence[Command], into: Sequence[memoryview], seen: Seen | None = None) -> list[Any]:
        """A reply each. The first value of exactly the length of `into` is received there, and `into` stands for it.

        OSError, also for silence longer than the timeout, and for what is no RESP.
        """
        try:
            for parts in _pieces(commands):
                self._send(parts)
            waiting = [(into, seen)] if into else []
            return [self._reply(waiting) for _ in commands]
        except BlockingIOError as error:  # how the kernel says that the socket's own timeout has passed
            raise TimeoutError("the server is silent") from error

    def _send(self, parts: list[Buffer]) -> None:
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                self._socket.sendall(part)
            return
        rest = [memoryview(part) for part in parts]
        while rest:
            sent = self._socket.sendmsg(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def _reply(self, waiting: list[Waiting], depth: int = 0) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            text = rest.decode(errors="replace")
            return ReplyError(text.partition(" ")[0], text)
        if kind not in (b":", b"$", b"*") or not rest.lstrip(b"-").isdigit() or depth > DEPTH_MAX:
            raise OSError("the server does not speak RESP")
        number = int(rest)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"*":
            return [self._reply(waiting, depth + 1) for _ in range(number)]
        return self._bulk(number, waiting)

    def _bulk(self, length: int, waiting: list[Waiting]) -> Any:
        value: Any
        if waiting and sum(map(len, waiting[0][0])) == length:
            value, seen = waiting.pop()
            for part in value:
                self._take(part, seen)
                seen = None
        else:
            into = bytearray(length)
            self._fill(memoryview(into))
            value = bytes(into)
        if self._line():
            raise OSError("the server does not speak RESP")
        return value

    def _take(self, target: memoryview, seen: Seen | None) -> None:
        for start in range(0, len(target), PIECE_BYTES):
            piece = target[start : start + PIECE_BYTES]
            self._fill(piece)
            if seen is not None:
                seen(piece)

    def _line(self) -> bytes:
        """Up to the next end of line, without it."""
        while (at := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._end == LINE_MAX:
                if not self._start:
                    raise OSError("the server does not speak RESP")
                rest = self._buffer[self._start : self._end]
                self._view[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            self._end += self._receive(self._view[self._end :])
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        if self._start == self._end:
            self._start = self._end = 0
        return line

    def _fill(self, target: memoryview) -> None:
        done = min(len(target), self._end - self._start)
        target[:done] = self._view[self._start : self._start + done]
        self._start += done
        if self._start == self._end:
            self._start = self._end = 0
        while done < len(target):
            done += self._receive(target[done:], self._whole)

    def _receive(self, into: memoryview, flags: int = 0) -> int:
        got = self._socket.recv_into(into, 0, flags)
        if not got:
            raise ConnectionResetError("the server closed the connection")
        return got

    def abort(self) -> None:
        """End whatever waits on the socket, in its own thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _connected(server: Server, timeout_s: float) -> socket.socket:
    if server.scheme == "unix":
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(timeout_s)
        try:
            made.connect(server.path)
        except BaseException:
            made.close()
            raise
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return _patient(made, timeout_s)
    made = socket.create_connection((server.host, server.port), timeout_s)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.scheme == "rediss":
            options = dict(server.tls)
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if "ssl_certfile" in options:
                context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
            return context.wrap_socket(made, server_hostname=server.host)
    except BaseException:
        made.close()
        raise
    return _patient(made, timeout_s)


def _patient(made: socket.socket, timeout_s: float) -> socket.socket:
    """Blocking, with the timeout kept by the kernel: one call moves a whole piece. With a timeout of its own Python
    would poll before each part that fits the socket's buffer."""
    made.settimeout(None)
    seconds, rest = divmod(timeout_s, 1.0)
    value = _TIMEVAL.pack(int(seconds), max(1, int(rest * 1e6)))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        made.setsockopt(socket.SOL_SOCKET, option, value)
    return made


def _pieces(commands: Sequence[Command]) -> Iterator[list[Buffer]]:
    """What to send at a time: small parts together, large ones where they lie. A sealed argument's pieces are summed
    just after they are sent: they come from memory once, and the server works on them meanwhile."""
    small: list[Buffer] = []
    for command in commands:
        small.append(b"*%d\r\n" % len(command))
        for argument in command:
            if not isinstance(argument, Sealed):
                word = _bytes(argument)
                small += (b"$%d\r\n" % memoryview(word).nbytes, word, b"\r\n")
                continue
            small.append(b"$%d\r\n" % argument.nbytes)
            for part in argument.parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), PIECE_BYTES):
                    piece = view[start : start + PIECE_BYTES]
                    if len(piece) < JOIN_BYTES:
                        small.append(piece)
                    else:
                        yield [b"".join(small), piece]
                        small.clear()
                    argument.seal.update(piece)
            small += (argument.seal.end(), b"\r\n")
    yield [b"".join(small)]


def _bytes(argument: Buffer | str | int) -> Buffer:
    if isinstance(argument, str):
        return argument.encode()
    return b"%d" % argument if isinstance(argument, int) else argument
