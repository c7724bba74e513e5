"""The wire to Redis: pipelined commands over a bounded number of connections, through redis-py.

`Link` is a seam of its own, so that the tier's logic knows no socket: `connect` makes the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from kvstore.errors import ConfigError, SetupError, TierDown
from kvstore.types import Buffer

if TYPE_CHECKING:
    from redis.asyncio import Redis

CONNECTIONS_MAX = 16

Argument = Buffer | str | int
Command = Sequence[Argument]


class ReplyError(Exception):
    """Redis said no to one command: it stands in the place of that command's reply. `code` as in OOM, NOSCRIPT."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


_CODES = {
    "NoScriptError": "NOSCRIPT",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "NoPermissionError": "NOPERM",
}


class Refused(TierDown):
    """Redis answers, but not to us: user, password, or rights."""


class Link(Protocol):
    async def call(self, *commands: Command) -> list[Any]:
        """All commands in one round trip, not a transaction; a reply each, `ReplyError` where one was refused.

        TierDown when the server can't be reached or does not answer in time. What was sent may have been done.
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
    """The real link. Nothing is sent yet. SetupError without redis-py, ConfigError for a URL that is none."""
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise SetupError("the Redis tier needs redis-py: pip install 'tiered-kvstore[redis]'") from error
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ConfigError("redis_url is no Redis URL: give redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH")
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            protocol=2,
            retry=Retry(NoBackoff(), 0),  # whether to try again is the caller's decision
        )
        pool.connection_class(**pool.connection_kwargs)  # an option that it does not know would show much later
    except (ValueError, TypeError) as error:
        raise ConfigError("redis_url has an unknown option: give redis://HOST:PORT/DB, nothing more") from error
    client = Redis(connection_pool=pool)
    client.response_callbacks.clear()  # replies as Redis sends them
    return PyLink(client, place(url))


class PyLink:
    """`Link` over redis.asyncio."""

    def __init__(self, client: Redis, where: str) -> None:
        self._client = client
        self._where = where

    async def call(self, *commands: Command) -> list[Any]:
        from redis import exceptions

        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        try:
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        except (exceptions.RedisError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise self._down(error) from error
        for position, reply in enumerate(replies):
            if isinstance(reply, exceptions.ResponseError):
                text = str(reply)  # without the code, where redis-py has a class for it
                code = _CODES.get(type(reply).__name__) or text.partition(" ")[0]
                replies[position] = ReplyError(code, text)
            elif isinstance(reply, Exception):
                raise self._down(reply) from reply
        return replies

    def _down(self, error: Exception) -> TierDown:
        """What an error means: Redis refuses us, or is out of reach."""
        from redis import exceptions

        told: BaseException | None = error
        for _ in range(8):  # redis-py wraps what the handshake met
            if isinstance(told, exceptions.AuthenticationError | exceptions.AuthorizationError):
                return Refused(f"Redis at {self._where} refuses the user or password: mend redis_url")
            if isinstance(told, exceptions.ResponseError):
                return Refused(f"Redis at {self._where} refuses the connection: {told}")
            told = told.__cause__ or told.__context__ if told is not None else None
        return TierDown(f"Redis at {self._where} does not answer ({type(error).__name__})")

    async def close(self) -> None:
        await self._client.aclose()
        await self._client.connection_pool.disconnect()
