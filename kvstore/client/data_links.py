"""A client's raw data connections: opened with a ticket, kept for the next call, and where there are none gRPC serves.

Whatever goes wrong before something has come is no failure of the worker: the same call is then made by gRPC, which
says what the matter is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvstore.config import ClientConfig
from kvstore.errors import Corrupt, Incompatible, Overloaded, Unavailable
from kvstore.recent import Recent
from kvstore.seams import Pool, System
from kvstore.transport.base import Begun, Channel, DataChannel, Landing, Transport
from kvstore.transport.methods import WORKER
from kvstore.wire import worker_pb2

OFF_S = 30.0
"""How long a worker is left alone whose data port can't be reached, or that has none."""


class DataLinks:
    """At most `client.data_connections_max`, to all workers together; beyond them gRPC serves."""

    def __init__(self, config: ClientConfig, system: System, transport: Transport, counters: Counter[str]) -> None:
        self._bound, self._connect_timeout_s = config.data_connections_max, config.connect_timeout_s
        self._system, self._transport, self._counters = system, transport, counters
        self._own: Pool | None = None
        self._idle: dict[str, list[DataChannel]] = {}
        self._busy: dict[DataChannel, None] = {}
        self._open = 0
        self.off: Recent[str] = Recent(system.clock, OFF_S, 4 * config.connections_max)

    def getter(
        self, address: str, channel: Channel, begun: Begun | None = None
    ) -> Callable[[worker_pb2.GetRequest, Landing, float], Awaitable[float]]:
        """`kvstore.client.stream_source.RawGet` for one worker, which `channel` reaches by gRPC; `begun` as of
        `DataChannel.get`."""

        async def get(request: worker_pb2.GetRequest, landing: Landing, timeout_s: float) -> float:
            end = self._system.clock.monotonic() + timeout_s
            link = await self._take(address, channel, timeout_s)
            if link is None:
                return self._left(end)
            watched = _Watched(landing)
            try:
                await link.get(request, watched, timeout_s=self._left(end), begun=begun)
            except Unavailable:
                if watched.began:
                    raise
                self._counters["raw_broken"] += 1
                return self._left(end)
            finally:
                await self._give_back(address, link)
            self._counters["raw_gets"] += 1
            return 0.0

        return get

    def putter(
        self, address: str, channel: Channel
    ) -> Callable[[worker_pb2.PutHeader, Sequence[memoryview], float], Awaitable[tuple[Any, float]]]:
        """`kvstore.client.writes.RawPut` for one worker. One that breaks is tried again by gRPC: putting twice does no
        harm."""

        async def put(header: worker_pb2.PutHeader, parts: Sequence[memoryview], timeout_s: float) -> tuple[Any, float]:
            end = self._system.clock.monotonic() + timeout_s
            link = await self._take(address, channel, timeout_s)
            if link is None:
                return None, self._left(end)
            try:
                reply = await link.put(header, parts, timeout_s=self._left(end))
                self._counters["raw_puts"] += 1
                return reply, 0.0
            except Unavailable:
                self._counters["raw_broken"] += 1
                return None, self._left(end)
            finally:
                await self._give_back(address, link)

        return put

    def _left(self, end: float) -> float:
        return max(0.001, end - self._system.clock.monotonic())

    async def _take(self, address: str, channel: Channel, timeout_s: float) -> DataChannel | None:
        """A connection that nobody uses; None where there is none to be had. ServiceError of the call for a ticket."""
        while (idle := self._idle.get(address)) is not None:
            link = idle.pop()
            if not idle:
                del self._idle[address]
            if link.usable:
                self._busy[link] = None
                return link
            await self._end(link)
        if address in self.off or not await self._room():
            return None
        self._open += 1
        try:
            made = await self._connect(address, channel, timeout_s)
        except BaseException:
            self._open -= 1
            raise
        if made is None:
            self._open -= 1
            self.off.add(address)
        else:
            self._busy[made] = None
        return made

    async def _room(self) -> bool:
        """Whether another may be opened; an idle one elsewhere makes room."""
        if self._open < self._bound:
            return True
        for address, others in self._idle.items():
            link = others.pop(0)
            if not others:
                del self._idle[address]
            await self._end(link)
            return self._open < self._bound
        return False

    async def _connect(self, address: str, channel: Channel, timeout_s: float) -> DataChannel | None:
        begun = self._system.clock.monotonic()
        try:
            reply = await channel.unary(WORKER["Data"], worker_pb2.DataRequest(), timeout_s=timeout_s)
        except (Incompatible, Overloaded):  # an older worker, or a busy one
            return None
        left = timeout_s - (self._system.clock.monotonic() - begun)
        if not reply.port or left <= 0:
            return None
        try:
            return await self._transport.connect_data(
                f"{address.rpartition(':')[0]}:{reply.port}",
                reply.ticket,
                self._pool(),
                timeout_s=min(self._connect_timeout_s, left / 2),
            )
        except (Unavailable, Corrupt):
            return None

    def _pool(self) -> Pool:
        if self._system.own_pool is None:
            return self._system.pool
        if self._own is None:
            self._own = self._system.own_pool(self._bound)
        return self._own

    async def _give_back(self, address: str, link: DataChannel) -> None:
        self._busy.pop(link, None)
        if link.usable and self._bound:
            self._idle.setdefault(address, []).append(link)
        else:
            await self._end(link)

    async def _end(self, link: DataChannel) -> None:
        self._open -= 1
        await link.close()

    async def close(self) -> None:
        """Calls under way end with Unavailable. Idempotent."""
        self._bound = 0
        for link in list(self._busy):
            await link.close()
        idle, self._idle = self._idle, {}
        for links in idle.values():
            for link in links:
                await self._end(link)
        own, self._own = self._own, None
        if own is not None:
            own.close()


class _Watched:
    """A landing that remembers whether anything came."""

    def __init__(self, landing: Landing) -> None:
        self._landing = landing
        self.began = False

    def places(self, header: bytes, nbytes: int) -> Sequence[memoryview]:
        self.began = True
        return self._landing.places(header, nbytes)

    def landed(self) -> None:
        self._landing.landed()
