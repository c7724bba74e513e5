"""A client's connections: to coordinators, with failover, and to workers, by socket or by gRPC.

Every table is bounded. A failure is remembered for a short while: a dead peer costs one wait, not one a call.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message

from kvstore.client.data_links import DataLinks
from kvstore.client.host_link import HostLink
from kvstore.client.nearest import Nearest
from kvstore.config import ClientConfig
from kvstore.errors import DeadlineExceeded, KVStoreError, Overloaded, ServiceError, Unavailable
from kvstore.recent import Recent
from kvstore.seams import System
from kvstore.transport.base import Channel, Credentials, Method, Transport
from kvstore.transport.methods import CAPABILITIES, COORDINATOR, PROTOCOL_VERSION
from kvstore.wire.common_pb2 import CoordinatorInfo, HelloRequest, MatchReply

COORDINATORS_MAX = 64
"""Addresses kept, configured and learnt."""

DOWN_S = 0.5
"""How long a peer that can't be reached is left alone: it may be starting again."""

HUNG_S = 3.0
"""How long one that takes calls and does not answer in time is: every further try would cost a wait."""

ATTEMPTS_MAX = 3
"""Coordinators asked within one call."""

RETRIED = (Unavailable, DeadlineExceeded, Overloaded)


class Closable(Protocol):
    async def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


class _Entry(Generic[C]):
    def __init__(self, opening: asyncio.Task[C]) -> None:
        self.opening = opening
        self.users = 0
        opening.add_done_callback(_seen)


def _seen(opening: asyncio.Task[Any]) -> None:
    """Whoever waited for it may have given up by the time it fails."""
    if not opening.cancelled():
        opening.exception()


class Pooled(Generic[C]):
    """Connections by address: opened once for all who wait, at most `bound`, the longest unused closed first.

    `broken` says of a connection that it is of no more use: it is replaced.
    """

    def __init__(
        self,
        system: System,
        open_: Callable[[str], Awaitable[C]],
        bound: int,
        broken: Callable[[C], bool] = lambda connection: False,
    ) -> None:
        self._open, self._bound, self._broken = open_, bound, broken
        self._entries: OrderedDict[str, _Entry[C]] = OrderedDict()
        self.down: Recent[str] = Recent(system.clock, DOWN_S, 4 * bound)
        self.hung: Recent[str] = Recent(system.clock, HUNG_S, 4 * bound)
        self._closing: dict[asyncio.Task[None], None] = {}

    @asynccontextmanager
    async def use(self, address: str, *, timeout_s: float | None = None, avoided: bool = False) -> AsyncIterator[C]:
        """The connection for the time of the block. ServiceError when it can't be had (within `timeout_s`), or failed a
        moment ago, unless `avoided` ones will do."""
        if not avoided and self.avoided(address):
            raise Unavailable(f"{address} did not answer a moment ago")
        entry = self._entries.get(address)
        if entry is not None and self._is_broken(entry):
            self.drop(address, entry)
            entry = None
        if entry is None:
            self._make_room()
            entry = self._entries[address] = _Entry(asyncio.ensure_future(self._connect(address)))
        self._entries.move_to_end(address)
        entry.users += 1
        try:
            try:
                if entry.opening.done():  # mostly: no timer, no turn of the loop
                    connection = entry.opening.result()
                else:
                    async with asyncio.timeout(timeout_s):
                        connection = await asyncio.shield(entry.opening)
            except TimeoutError:
                self.hung.add(address)
                raise DeadlineExceeded(f"{address} did not answer within {timeout_s:.3f} s") from None
            except ServiceError:
                self.drop(address, entry)
                self.down.add(address)
                raise
            yield connection
        finally:
            entry.users -= 1

    def avoided(self, address: str) -> bool:
        """Whether it failed a short while ago. Pure but for what expires."""
        return address in self.down or address in self.hung

    def _is_broken(self, entry: _Entry[C]) -> bool:
        opening = entry.opening
        if not opening.done():
            return False
        return opening.cancelled() or opening.exception() is not None or self._broken(opening.result())

    async def _connect(self, address: str) -> C:
        return await self._open(address)

    def _make_room(self) -> None:
        while len(self._entries) >= self._bound:
            idle = next((address for address, entry in self._entries.items() if entry.users == 0), None)
            if idle is None:
                raise Overloaded(f"all {self._bound} connections are in use: raise client.connections_max")
            self.drop(idle, self._entries[idle])

    def drop(self, address: str, entry: _Entry[C] | None = None) -> None:
        """Forget a connection and close it; the next use opens a new one. Idempotent."""
        known = self._entries.get(address)
        if known is None or (entry is not None and known is not entry):
            return
        del self._entries[address]
        task = asyncio.ensure_future(self._close(known))
        self._closing[task] = None
        task.add_done_callback(lambda done: self._closing.pop(done, None))

    async def _close(self, entry: _Entry[C]) -> None:
        if not entry.opening.done():
            entry.opening.cancel()
        try:
            connection = await entry.opening
        except (ServiceError, asyncio.CancelledError):
            return  # never opened: nothing to close
        await connection.close()

    async def close(self) -> None:
        for address in list(self._entries):
            self.drop(address)
        while self._closing:
            await asyncio.wait(list(self._closing))


class Links:
    """Connections to workers."""

    def __init__(
        self,
        config: ClientConfig,
        system: System,
        transport: Transport,
        credentials: Credentials,
        counters: Counter[str],
    ) -> None:
        self._transport, self._credentials = transport, credentials
        self._connect_timeout_s = config.connect_timeout_s

        async def open_local(path: str) -> HostLink:
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    return HostLink(await transport.connect_local(path, credentials), system)
            except TimeoutError:
                raise DeadlineExceeded(f"{path} did not greet in {self._connect_timeout_s} s") from None

        async def open_remote(address: str) -> Channel:
            return await transport.connect(address, credentials)

        self.local: Pooled[HostLink] = Pooled(system, open_local, config.connections_max, lambda link: link.broken)
        self.remote: Pooled[Channel] = Pooled(system, open_remote, config.connections_max)
        self.data = DataLinks(config, system, transport, counters)

    async def close(self) -> None:
        await self.local.close()
        await self.data.close()
        await self.remote.close()


PROBE_TIMEOUT_S = 1.0
"""Longest wait for the answer to a measurement."""


class Coordinators:
    """All coordinators a process knows. A call goes to the nearest that answers; the rest are its replacements."""

    def __init__(
        self,
        addresses: Iterable[str],
        system: System,
        transport: Transport,
        credentials: Credentials,
        *,
        probe_s: float = 5.0,
    ) -> None:
        """`probe_s`: least time between two rounds of measurements (see `kvstore.client.nearest`)."""
        self._addresses = dict.fromkeys(addresses)
        self._configured = dict(self._addresses)
        self._system = system
        self._nearest = Nearest(system.host, probe_s)
        self._probing: dict[asyncio.Task[None], None] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}  # those that were late, whether they are well again
        self._channels: Pooled[Channel] = Pooled(
            system, lambda address: transport.connect(address, credentials), COORDINATORS_MAX
        )

    @property
    def addresses(self) -> list[str]:
        return list(self._addresses)

    @property
    def reachable(self) -> bool:
        """Whether any is known that did not fail a moment ago."""
        return any(not self._channels.avoided(address) for address in self._addresses)

    @property
    def preferred(self) -> str:
        """The one that answered last; empty for none. Pure."""
        return self._nearest.preferred

    def learn(self, coordinators: Iterable[CoordinatorInfo]) -> None:
        """Remember the addresses a reply named; forget those that failed and that it does not name any more. Those
        that were configured stay. Mutates; bounded."""
        named = {info.address: info.host for info in coordinators}
        if not named:
            return
        for address in [a for a in self._addresses if a not in named and a not in self._configured]:
            if self._channels.avoided(address):
                del self._addresses[address]
                self._nearest.forget(address)
        for address, host in named.items():
            if address and len(self._addresses) < COORDINATORS_MAX:
                self._addresses.setdefault(address)
            if address in self._addresses:
                self._nearest.at(address, host)

    async def call(self, method: Method, request: Message, *, timeout_s: float) -> Any:
        """The reply of the first that gives one. ServiceError: the last one's where none does, Unavailable at once
        where all failed a moment ago. A refusal (NotGranted, Unauthenticated, ...) is an answer and raised as it is."""
        end = self._system.clock.monotonic() + timeout_s
        last: ServiceError = Unavailable("no coordinator answers: check --coordinators, or start one")
        self._measure()
        order = self._order()
        for index, address in enumerate(order):
            left = end - self._system.clock.monotonic()
            if left <= 0:
                break
            try:
                turn_s = left / (len(order) - index)
                async with self._channels.use(address, timeout_s=turn_s) as channel:
                    reply = await channel.unary(method, request, timeout_s=turn_s)
            except RETRIED as error:
                last = error
                if isinstance(error, DeadlineExceeded):
                    self._late(address)
                elif isinstance(error, Unavailable):
                    self._channels.down.add(address)
                self._nearest.failed(address)
                continue
            self._nearest.answered(address)
            if isinstance(reply, MatchReply) and not reply.complete:
                self._nearest.failed(address)  # it has just started: others know more
            return reply
        raise last

    def first(self) -> str:
        """The nearest that did not fail a moment ago, for a stream. Unavailable where there is none."""
        order = self._order()
        if not order:
            raise Unavailable("no coordinator answers: check --coordinators, or start one")
        return order[0]

    def nearer(self, than: str) -> str:
        """One that is clearly nearer, empty for none; for who stays with one for long. Begins to measure when it is
        time to. Mutates."""
        self._measure()
        live = [a for a in self._addresses if a == than or not self._channels.avoided(a)]
        return self._nearest.nearer(than, live)

    @asynccontextmanager
    async def channel(self, address: str) -> AsyncIterator[Channel]:
        """A connection for a stream. Unavailable when it fails."""
        try:
            async with self._channels.use(address) as channel:
                yield channel
        except Unavailable:
            self._channels.down.add(address)
            raise

    def _order(self) -> list[str]:
        live = [address for address in self._addresses if not self._channels.avoided(address)]
        self._system.rng.shuffle(live)  # so that many clients do not all take the first
        return self._nearest.order(live)[:ATTEMPTS_MAX]

    def _measure(self) -> None:
        """Begin to measure round trips, where it is time to. Mutates; no call waits for it."""
        now = self._system.clock.monotonic()
        due = self._nearest.due([a for a in self._addresses if not self._channels.avoided(a)], now)
        if not due or self._probing:
            return
        self._nearest.begin(due, now)
        for address in due:
            task = asyncio.ensure_future(self._probe(address))
            self._probing[task] = None
            task.add_done_callback(lambda done: self._probing.pop(done, None))

    def _late(self, address: str) -> None:
        """It did not answer in time: it is avoided for a while, or until it answers a Hello that no call waits for. One
        that was busy for a moment, and the only one left, must not cost the lookups of HUNG_S. Mutates."""
        self._channels.hung.add(address)
        if address not in self._asking:
            task = self._asking[address] = asyncio.ensure_future(self._ask_again(address))
            task.add_done_callback(lambda done: self._asking.pop(address, None))

    async def _ask_again(self, address: str) -> None:
        try:
            async with self._channels.use(address, timeout_s=HUNG_S, avoided=True) as channel:
                await channel.unary(COORDINATOR["Hello"], _hello(), timeout_s=HUNG_S)
        except KVStoreError:
            return  # it is not well: calls find out again when it is no longer avoided
        self._channels.hung.discard(address)

    async def _probe(self, address: str) -> None:
        hello = _hello()
        try:
            async with self._channels.use(address, timeout_s=PROBE_TIMEOUT_S) as channel:
                begin = self._system.clock.monotonic()
                reply = await channel.unary(COORDINATOR["Hello"], hello, timeout_s=PROBE_TIMEOUT_S)
                self._nearest.at(address, reply.host)
                if reply.incomplete:
                    self._nearest.failed(address)
                else:
                    self._nearest.measured(address, self._system.clock.monotonic() - begin)
        except KVStoreError:  # calls find out in their own time, by the same rules
            self._nearest.failed(address)

    async def close(self) -> None:
        tasks = [*self._probing, *self._asking.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._channels.close()


def _hello() -> HelloRequest:
    return HelloRequest(protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore")
