"""The circuit breaker before a Redis link: after one failure nothing waits for Redis until a probe got an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvstore.errors import TierDown
from kvstore.seams import Clock
from kvstore.tiers.base import TierStats
from kvstore.tiers.redis_link import CONNECTIONS_MAX, Command, Link, Refused, ReplyError, Sealed, Seen

PROBE_PAUSE_S = 0.25
PROBE_PAUSE_MAX_S = 30.0


class Gate:
    """State in `stats`: `ok`; `full`, when Redis is out of memory (reads go on); `down`, while the breaker is open."""

    def __init__(self, clock: Clock, stats: TierStats, where: str) -> None:
        self.stats = stats
        self.warning = ""  # of a setting that should be another one
        self.probe_at = 0.0
        self._where = where
        self._clock = clock
        self._link: Link | None = None
        self._calls = asyncio.Semaphore(CONNECTIONS_MAX)
        self._pause_s = PROBE_PAUSE_S
        self._needed_bytes = 0  # of the largest value that found no memory

    @property
    def ok(self) -> bool:
        return self._link is not None and self.stats.state == "ok"

    async def open(self, link: Link) -> None:
        """Use this link, from when it answers. `Refused` when it answers, but not to us."""
        self._link = link
        try:
            await self._ask()
        except Refused:
            raise
        except TierDown as error:
            self._become("down", str(error))

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def call(self, *commands: Command, into: Sequence[memoryview] = (), seen: Seen | None = None) -> list[Any]:
        """The link's call; TierDown at once while the breaker is open."""
        link = self._link
        if link is None:
            raise TierDown("the Redis tier is not started")
        if self.stats.state == "down":
            raise TierDown(self.stats.detail)
        async with self._calls:
            try:
                replies = await link.call(*commands, into=into, seen=seen)
            except TierDown as error:
                if self.stats.state != "down":  # of many in flight the first one tells
                    self._become("down", str(error))
                raise
        if any(isinstance(reply, ReplyError) and reply.code == "OOM" for reply in replies):
            values = [argument for command in commands for argument in command if isinstance(argument, Sealed)]
            sizes = [value.nbytes for value in values]
            self._needed_bytes = max([self._needed_bytes, *sizes])
            if self.stats.state == "ok":
                self._become("full", "Redis is out of memory: raise its maxmemory or lower redis_bytes")
            raise TierDown(self.stats.detail)
        return replies

    def _become(self, state: str, detail: str) -> None:
        self.stats.errors += 1
        self.stats.state, self.stats.detail = state, detail
        self._pause_s = PROBE_PAUSE_S
        self.probe_at = self._clock.monotonic() + self._pause_s

    async def probe(self) -> None:
        """Half-open: one question decides, asked again with growing pauses."""
        now = self._clock.monotonic()
        try:
            free = await self._ask()
        except TierDown as error:
            free = -1
            if self.stats.state == "down":
                self.stats.detail = str(error)
        if free < self._needed_bytes:
            self._pause_s = min(2 * self._pause_s, PROBE_PAUSE_MAX_S)
            self.probe_at = now + self._pause_s
            return
        self.stats.state, self.stats.detail = "ok", ""
        self._needed_bytes = 0

    async def _ask(self) -> int:
        """Bytes that Redis still takes by its own account, after a look at its settings. TierDown."""
        assert self._link is not None
        (info,) = await self._link.call(["INFO", "memory"])
        if isinstance(info, ReplyError):
            raise Refused(f"Redis at {self._where} refuses INFO: {info}")
        lines = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
        policy = lines.get(b"maxmemory_policy", b"noeviction").decode()
        self.warning = "" if policy == "noeviction" else f"maxmemory-policy is {policy}: set it to noeviction"
        bound = int(lines.get(b"maxmemory", b"0"))
        return bound - int(lines.get(b"used_memory", b"0")) if bound else 1 << 62
