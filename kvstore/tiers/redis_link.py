"""The wire to Redis: pipelined commands over a bounded number of connections.

`Link` is a seam of its own, so that the tier's logic knows no socket: `connect` makes the real one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from kvstore.errors import TierDown
from kvstore.machine.system import ThreadPool
from kvstore.transport.resp import Command, ReplyError, RespSocket, Sealed, Seen, Server

__all__ = [
    "CONNECTIONS_MAX",
    "Command",
    "Connect",
    "Link",
    "Refused",
    "ReplyError",
    "Sealed",
    "Seen",
    "connect",
    "place",
]

CONNECTIONS_MAX = 16
"""Calls under way at a time."""

TALKERS = 3
"""Connections, each in a thread. Redis serves one at a time: the others have their bytes summed and their next ones on
the way meanwhile (docs/BENCHMARKS.md)."""

_REFUSALS = ("NOAUTH", "WRONGPASS", "NOPERM", "ERR")
_NOT_YET = ("LOADING", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN")
"""Codes by which a server says that it is not there yet: as good as out of reach."""


class Refused(TierDown):
    """Redis answers, but not to us: user, password, or rights."""


class Link(Protocol):
    async def call(self, *commands: Command, into: Sequence[memoryview] = (), seen: Seen | None = None) -> list[Any]:
        """All commands in one round trip, not a transaction; a reply each, `ReplyError` where one was refused.

        The first value exactly as long as `into` is received there, and `into` stands for it; `seen`
        is told the pieces of its first part, in a thread. The caller's buffers are
        nobody else's any more when this returns or raises. TierDown when the server can't be reached or does not
        answer in time. What was sent may have been done.
        """

    async def close(self) -> None: ...


class Connect(Protocol):
    def __call__(self, url: str, timeout_s: float) -> Link: ...


def place(url: str) -> str:
    """Where a URL leads, for people: never a user or password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    try:
        return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:  # a port that is none
        return parts.hostname or "localhost"


def connect(url: str, timeout_s: float) -> Link:
    """The real link. Nothing is sent yet. ConfigError for a URL that is none."""
    return SocketLink(Server.of(url), timeout_s, place(url))


class SocketLink:
    """`Link` over blocking sockets, each call in a thread of its own pool: a Redis that hangs holds up nobody else."""

    def __init__(self, server: Server, timeout_s: float, where: str) -> None:
        self._server, self._timeout_s, self._where = server, timeout_s, where
        self._pool = ThreadPool(TALKERS)
        self._idle: list[RespSocket] = []
        self._used: dict[int, list[RespSocket]] = {}  # by identity: the sockets of each call under way
        self._quiet = asyncio.Event()  # no call is under way
        self._quiet.set()
        self._closed = False

    async def call(self, *commands: Command, into: Sequence[memoryview] = (), seen: Seen | None = None) -> list[Any]:
        if self._closed:
            raise TierDown("the connection to Redis is closed")
        kept = [self._idle.pop()] if self._idle else []
        self._used[id(kept)] = kept
        self._quiet.clear()
        try:
            replies = await self._pool.run_abortable(partial(_abort, kept), self._exchange, kept, commands, into, seen)
        except asyncio.CancelledError:
            _close(kept)
            raise
        except OSError as error:
            _close(kept)
            _close(self._idle)  # what one meets the others will
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
                raise Refused(f"Redis at {self._where} refuses TLS, or its certificate does not hold") from error
            raise TierDown(f"Redis at {self._where} does not answer ({type(error).__name__})") from error
        except ReplyError as error:
            raise self._refusal(error) from error
        finally:
            del self._used[id(kept)]
            if not self._used:
                self._quiet.set()
        self._idle += kept
        if self._idle and self._ended():
            _close(self._idle)
        for reply in replies:
            if isinstance(reply, ReplyError) and reply.code in _NOT_YET:
                raise TierDown(f"Redis at {self._where} is not ready: {reply}")
        return replies

    def _exchange(
        self, kept: list[RespSocket], commands: Sequence[Command], into: Sequence[memoryview], seen: Seen | None
    ) -> list[Any]:
        """Thread. A new connection is left in `kept`."""
        if not kept:
            kept.append(RespSocket(self._server, self._timeout_s))
        return kept[0].call(commands, into, seen)

    def _refusal(self, error: ReplyError) -> TierDown:
        """While connecting; the message may name a user, so it is not passed on."""
        if error.code in _REFUSALS:
            return Refused(f"Redis at {self._where} refuses the user or password: mend redis_url")
        return TierDown(f"Redis at {self._where} is not ready ({error.code})")

    def _ended(self) -> bool:
        """Whether `close` was called while a call was under way."""
        return self._closed

    async def close(self) -> None:
        self._closed = True
        for kept in self._used.values():
            _abort(kept)
        await self._quiet.wait()
        _close(self._idle)
        self._pool.close()


def _abort(sockets: list[RespSocket]) -> None:
    for used in sockets:
        used.abort()


def _close(sockets: list[RespSocket]) -> None:
    while sockets:
        sockets.pop().close()
