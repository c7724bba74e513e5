"""A Redis in the simulator, behind the real tier and the real announcer: it dies, hangs, is emptied, goes back in time.

`SimLink` is the `Link` of kvstore/tiers/redis_link.py. Commands of one call are done one after the other, and another
worker's may come between two of them; a call that fails may have been done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvstore.errors import TierDown
from kvstore.tiers.redis_link import Command, ReplyError, Sealed, Seen
from tests.sim.loop import SimProcess
from tests.sim.network import MemoryNetwork
from tests.sim.redis_data import Data
from tests.sim.system import WALL_NS

NODE = "redis"


class SimRedis:
    """The server. `maxmemory` 0: none."""

    def __init__(self, network: MemoryNetwork, maxmemory: int = 0) -> None:
        self.network = network
        self.data = Data()
        self.maxmemory = maxmemory
        self.up = True
        self.hangs = False
        self.boot = 0  # how often it was started again

    # what may happen to it

    def stop(self) -> None:
        self.network.note("redis stops")
        self.up = False

    def start(self, data: Data | None = None) -> None:
        """Again, with what a dump kept: nothing, or an older state."""
        self.network.note("redis starts", "empty" if data is None else "restored")
        self.data = Data() if data is None else data.snapshot()
        self.up = True
        self.boot += 1

    def flush(self) -> None:
        """FLUSHALL; the scripts stay."""
        self.network.note("redis is emptied")
        self.data.values.clear()
        self.data.expires.clear()

    # commands

    def now_ms(self) -> int:
        return WALL_NS // 10**6 + int(asyncio.get_running_loop().time() * 1000)

    def execute(self, command: Command) -> Any:
        """One command's reply."""
        name, *given = [_bytes(argument) for argument in command]
        data, now = self.data, self.now_ms()
        match name:
            case b"INFO":
                lines = ["# Memory", f"used_memory:{data.used}", f"maxmemory:{self.maxmemory}"]
                return "\r\n".join([*lines, "maxmemory_policy:noeviction"]).encode()
            case b"SET":
                key, value, _, ttl_ms = given
                if self.maxmemory and data.used + len(value) > self.maxmemory:
                    return ReplyError("OOM", "OOM command not allowed when used memory > 'maxmemory'")
                data.set(key, value, now + int(ttl_ms))
                return b"OK"
            case b"GET":
                return data.get(given[0], now)
            case b"HSET":
                data.made(given[0], now, dict).update(zip(given[1::2], given[2::2], strict=True))
                return len(given) // 2
            case b"HMGET":
                found = data.get(given[0], now) or {}
                return [found.get(field) for field in given[1:]]
            case b"HSCAN":
                return data.scan(given[0], int(given[1]), int(given[3]), now)
            case b"XREAD":
                return self._xread(given, now)
            case b"SCRIPT":
                from hashlib import sha1

                digest = sha1(given[1], usedforsecurity=False).hexdigest()
                data.scripts[digest] = None
                return digest.encode()
            case b"EVALSHA":
                count = int(given[1])
                try:
                    return data.run(given[0].decode(), given[2 : 2 + count], given[2 + count :], now)
                except KeyError:
                    return ReplyError("NOSCRIPT", "NOSCRIPT No matching script")
        raise AssertionError(f"the simulated Redis does not know {name!r}")

    def _xread(self, given: list[bytes], now: int) -> Any:
        _, count, _, key, last = given
        after = tuple(int(part) for part in last.split(b"-"))
        found = [(name, fields) for name, fields in data_stream(self.data, key, now) if name > after][: int(count)]
        return [[key, [[b"%d-%d" % name, list(fields)] for name, fields in found]]] if found else None


def data_stream(data: Data, key: bytes, now: int) -> Any:
    return data.get(key, now) or []


def _bytes(argument: Any) -> bytes:
    if isinstance(argument, Sealed):
        return argument.joined()
    if isinstance(argument, str):
        return argument.encode()
    return b"%d" % argument if isinstance(argument, int) else bytes(argument)


class SimLink:
    """One process's connection."""

    def __init__(self, server: SimRedis, process: SimProcess, timeout_s: float) -> None:
        self._server, self._process, self._timeout_s = server, process, timeout_s
        self._closed = False

    async def call(self, *commands: Command, into: Sequence[memoryview] = (), seen: Seen | None = None) -> list[Any]:
        if self._closed:
            raise TierDown("the connection to Redis is closed")
        server, network = self._server, self._server.network
        sent = [tuple(_bytes(argument) for argument in command) for command in commands]
        await asyncio.sleep(network.delay())
        self._reach()
        lost = network.lost()
        if server.hangs or network.is_cut(self._process.name, NODE) or (lost and network.rng.random() < 0.5):
            await asyncio.sleep(self._timeout_s)
            raise TierDown("Redis does not answer (TimeoutError)")
        boot, replies = server.boot, []
        for command in sent:
            self._reach(boot)
            replies.append(server.execute(command))
            if network.rng.random() < 0.2:
                await asyncio.sleep(network.delay())
        await asyncio.sleep(network.delay())
        self._reach(boot)
        if lost:  # done, and nobody hears of it
            await asyncio.sleep(self._timeout_s)
            raise TierDown("Redis does not answer (TimeoutError)")
        return self._landed(replies, into, seen)

    def _reach(self, boot: int | None = None) -> None:
        if not self._server.up or boot not in (None, self._server.boot):
            raise TierDown("Redis does not answer (ConnectionRefusedError)")

    def _landed(self, replies: list[Any], into: Sequence[memoryview], seen: Seen | None) -> list[Any]:
        """The first value as long as `into` is received there."""
        for index, reply in enumerate(replies if into else ()):
            if isinstance(reply, bytes) and len(reply) == sum(map(len, into)):
                at = 0
                for part in into:
                    part[:] = reply[at : at + len(part)]
                    at += len(part)
                if seen is not None:
                    seen(into[0])
                return [*replies[:index], into, *replies[index + 1 :]]
        return replies

    async def close(self) -> None:
        self._closed = True
