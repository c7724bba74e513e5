"""A server of raw data connections and clients of it, in one process, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kvstore.errors import BadRequest, Overloaded
from kvstore.machine.system import ThreadPool, real_system
from kvstore.transport.base import CallContext, Incoming
from kvstore.transport.data_client import DataClient, connect
from kvstore.transport.data_server import DataServer
from kvstore.wire import worker_pb2
from tests.net_service import Clock
from workers.tickets import Tickets

MIB = 1 << 20
PAYLOAD = os.urandom(3 * MIB)
WHO = CallContext("me", "client", "default", "ipv4:127.0.0.1:4000")


class Service:
    """`DataService`: its frames are PAYLOAD in pieces; a put is kept in `taken`."""

    def __init__(self) -> None:
        self.tickets = Tickets(real_system(1), 16)
        self.open = 0
        self.taken = b""
        self.gate = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.contexts: list[CallContext] = []

    def admit(self, ticket: bytes, host: str) -> CallContext:
        return self.tickets.take(ticket, host)

    @asynccontextmanager
    async def get(self, request: Any, context: CallContext) -> AsyncIterator[Iterator[tuple[bytes, Sequence[bytes]]]]:
        self.contexts.append(context)
        if request.planes == 1:
            raise Overloaded("later")
        if request.planes == 2:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        self.open += 1
        try:
            yield self._frames(times=1000 if request.planes == 3 else 1)
        finally:
            self.open -= 1

    def _frames(self, times: int) -> Iterator[tuple[bytes, Sequence[bytes]]]:
        yield b"first", ()
        for number in range(3 * times):
            piece = memoryview(PAYLOAD)[number % 3 * MIB : (number % 3 + 1) * MIB]
            yield b"%d" % number, [piece[:7], piece[7:]]

    async def put(self, header: Any, context: CallContext, incoming: Incoming) -> worker_pb2.PutReply:
        if not header.blocks:
            raise BadRequest("no blocks")
        await incoming.begin()
        if header.spec_json == "full":
            raise Overloaded("enough")
        for block in header.blocks:
            room = memoryview(bytearray(block.raw_bytes))
            await incoming.fill(room)
            self.taken += bytes(room)
        return worker_pb2.PutReply(states=[worker_pb2.BLOCK_COMMITTED] * len(header.blocks))


class Sink:
    """`Landing`."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, bytearray]] = []
        self.landings = 0

    def places(self, header: bytes, nbytes: int) -> list[memoryview]:
        self.got.append((header, bytearray(nbytes)))
        whole = memoryview(self.got[-1][1])
        return [whole[:5], whole[5:]] if nbytes else []

    def landed(self) -> None:
        self.landings += 1


class Net:
    """A server and clients of it, in one process."""

    def __init__(self, *, connections_max: int = 4, idle_s: float = 30.0) -> None:
        self.service, self.pool, self.clients_pool = Service(), ThreadPool(4), ThreadPool(4)
        self.server = DataServer(
            self.service,
            self.pool,
            Clock(),
            tls=None,
            connections_max=connections_max,
            idle_s=idle_s,
            call_max_s=60.0,
            message_bytes_max=8 * MIB,
        )
        self.clients: list[DataClient] = []

    async def __aenter__(self) -> Net:
        self.server.start("127.0.0.1:0")
        return self

    async def __aexit__(self, *exc: object) -> None:
        for client in self.clients:
            await client.close()
        async with asyncio.timeout(10):
            await self.server.close(5.0)
        assert self.service.open == 0, "blocks are still held"
        self.pool.close()
        self.clients_pool.close()

    async def client(self, ticket: bytes | None = None) -> DataClient:
        ticket = self.service.tickets.give(WHO) if ticket is None else ticket
        made = await connect(
            self.server.address, ticket, self.clients_pool, None, timeout_s=5.0, message_bytes_max=8 * MIB
        )
        self.clients.append(made)
        return made

    async def stranger(self, said: bytes) -> bytes:
        """What somebody who connects and says that hears until the connection ends."""
        reader, writer = await asyncio.open_connection(*self.server.address.split(":"))
        writer.write(said)
        heard = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                heard = await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return heard

    async def serves(self) -> None:
        sink = Sink()
        await (await self.client()).get(worker_pb2.GetRequest(), sink, timeout_s=5.0)
        assert b"".join(bytes(data) for _, data in sink.got) == PAYLOAD


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
