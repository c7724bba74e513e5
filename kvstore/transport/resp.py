"""RESP2 (the protocol of Redis) on one blocking socket: parts sent from where they lie, large values received where
they shall lie. Runs in threads; `abort` may be called from anywhere.
"""

from __future__ import annotations

import socket  # noqa: TID251 - the real network
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from kvstore.errors import ConfigError
from kvstore.types import Buffer

Argument = Buffer | str | int | tuple[Buffer, ...]
"""Of a command; a tuple is one argument in parts."""

Command = Sequence[Argument]

LINE_MAX = 64 << 10
"""Bytes read at a time where nobody said where they shall go; a line must fit."""

JOIN_BYTES = 4096  # smaller parts are put together
IOV_MAX = 512
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

    def call(self, commands: Sequence[Command], into: Sequence[memoryview]) -> list[Any]:
        """A reply each. The first value of exactly the length of `into` is received there, and `into` stands for it.

        OSError, also for silence longer than the timeout, and for what is no RESP.
        """
        parts: list[Buffer] = []
        for command in commands:
            _append(parts, command)
        self._send(parts)
        waiting = [into] if into else []
        return [self._reply(waiting) for _ in commands]

    def _send(self, parts: list[Buffer]) -> None:
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                self._socket.sendall(part)
            return
        rest = [memoryview(part) for part in parts]
        while rest:
            sent = self._socket.sendmsg(rest[:IOV_MAX])
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def _reply(self, waiting: list[Sequence[memoryview]], depth: int = 0) -> Any:
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

    def _bulk(self, length: int, waiting: list[Sequence[memoryview]]) -> Any:
        value: Any
        if waiting and sum(map(len, waiting[0])) == length:
            value = waiting.pop()
            for part in value:
                self._fill(part)
        else:
            into = bytearray(length)
            self._fill(memoryview(into))
            value = bytes(into)
        if self._line():
            raise OSError("the server does not speak RESP")
        return value

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
            done += self._receive(target[done:])

    def _receive(self, into: memoryview) -> int:
        got = self._socket.recv_into(into)
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
        return made
    made = socket.create_connection((server.host, server.port), timeout_s)
    try:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.scheme == "rediss":
            options = dict(server.tls)
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if "ssl_certfile" in options:
                context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
            made = context.wrap_socket(made, server_hostname=server.host)
    except BaseException:
        made.close()
        raise
    return made


def _append(parts: list[Buffer], command: Command) -> None:
    """A command's bytes, small parts together, large ones where they lie."""
    small = [b"*%d\r\n" % len(command)]
    for argument in command:
        words = argument if isinstance(argument, tuple) else (_bytes(argument),)
        small.append(b"$%d\r\n" % sum(memoryview(word).nbytes for word in words))
        for word in words:
            if memoryview(word).nbytes < JOIN_BYTES:
                small.append(bytes(word))
            else:
                parts += (b"".join(small), memoryview(word).cast("B"))
                small.clear()
        small.append(b"\r\n")
    parts.append(b"".join(small))


def _bytes(argument: Buffer | str | int) -> Buffer:
    if isinstance(argument, str):
        return argument.encode()
    return b"%d" % argument if isinstance(argument, int) else argument
