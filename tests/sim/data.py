"""The simulator's raw data channel: the twin of kvstore/transport/data_client.py and data_server.py.

Its frames go the way of the simulator's streams, with the same faults; what is left out is how bytes are laid on a
socket, which tests/test_data_channel.py covers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from kvstore.errors import BadRequest, Corrupt, KVStoreError, Unavailable
from kvstore.seams import Pool
from kvstore.transport import frames
from kvstore.transport.base import Begun, CallContext, Credentials, DataService, Landing, Method
from kvstore.types import Buffer
from kvstore.wire import worker_pb2
from tests.sim.loop import SimProcess
from tests.sim.network import MemoryNetwork
from tests.sim.transport import MemoryChannel, MemoryServer

ADMIT = Method("WorkerData", "Admit", worker_pb2.DataRequest, worker_pb2.DataReply)
GET = Method("WorkerData", "Get", worker_pb2.DataGet, None, server_stream=True)
PUT = Method("WorkerData", "Put", None, worker_pb2.PutReply, client_stream=True)


class MemoryDataServer(MemoryServer):
    """`Server` of raw connections."""

    def __init__(
        self, network: MemoryNetwork, process: SimProcess, address: str, service: DataService, pool: Pool
    ) -> None:
        super().__init__(network, process, address, {"WorkerData": _Served(service, pool)}, None)  # type: ignore[arg-type]
        self._service = service
        self._admitted: dict[str, CallContext] = {}

    def context(
        self, method: Method, credentials: Credentials, client: SimProcess, timeout_s: float | None
    ) -> CallContext:
        if method is ADMIT:
            self._admitted[credentials.token] = self._service.admit(bytes.fromhex(credentials.token), client.name)
        if credentials.token not in self._admitted:
            raise Unavailable("no such connection")
        deadline = None if timeout_s is None else self.process.monotonic() + timeout_s
        return replace(self._admitted[credentials.token], deadline=deadline)


class _Served:
    """`DataService` as the simulated network calls it."""

    def __init__(self, service: DataService, pool: Pool) -> None:
        self._service, self._pool = service, pool

    async def admit(self, request: Any, context: CallContext) -> worker_pb2.DataReply:
        return worker_pb2.DataReply()

    async def get(self, request: worker_pb2.DataGet, context: CallContext) -> AsyncIterator[bytes]:
        async with self._service.get(request.get, context) as outgoing:
            while (frame := await self._pool.run(next, outgoing, None)) is not None:
                yield frames.encode(*frame)

    async def put(self, requests: AsyncIterator[bytes], context: CallContext) -> Any:
        taking = _Taking(requests)
        header, _ = await taking.frame()
        return await self._service.put(worker_pb2.PutHeader.FromString(header or b""), context, taking)


class _Taking:
    """`kvstore.transport.base.Incoming`."""

    def __init__(self, requests: AsyncIterator[bytes]) -> None:
        self._requests = requests
        self._rest = memoryview(b"")

    async def frame(self) -> tuple[bytes | None, memoryview]:
        async for request in self._requests:
            return frames.decode(request)
        raise Unavailable("the caller has gone")

    async def begin(self) -> None:
        """Flow control holds the caller up anyway."""

    async def fill(self, target: memoryview) -> None:
        done = 0
        while done < len(target):
            if not self._rest:
                _, self._rest = await self.frame()
            some = self._rest[: len(target) - done]
            target[done : done + len(some)] = some
            self._rest = self._rest[len(some) :]
            done += len(some)


class MemoryDataChannel:
    """`DataChannel`."""

    def __init__(self, network: MemoryNetwork, process: SimProcess, address: str, ticket: bytes, pool: Pool) -> None:
        self._network, self._address, self._pool = network, address, pool
        self._channel = MemoryChannel(network, process, address, Credentials(token=ticket.hex()))
        self._server: object = None
        self._whole = True  # no call broke off

    async def admit(self, timeout_s: float) -> None:
        self._server = self._network.listeners.get(self._address)
        try:
            await self._channel.unary(ADMIT, worker_pb2.DataRequest(), timeout_s=timeout_s)
        except KVStoreError as error:
            raise Unavailable(f"no data channel at {self._address}: {error}") from None

    @property
    def usable(self) -> bool:
        return self._whole and self._network.listeners.get(self._address) is self._server

    async def get(self, request: Any, landing: Landing, *, timeout_s: float, begun: Begun | None = None) -> None:
        asked = worker_pb2.DataGet(timeout_ms=int(timeout_s * 1000))
        asked.get.CopyFrom(request)
        self._whole = False
        async with aclosing(self._channel.stream(GET, _only(asked), timeout_s=timeout_s)) as stream:
            async for frame in stream:
                await self._pool.run(_land, landing, frame)
                if begun is not None:
                    await begun()
                    begun = None
        self._whole = True

    async def put(self, header: Any, parts: Sequence[Buffer], *, timeout_s: float) -> Any:
        async def requests() -> AsyncIterator[bytes]:
            yield frames.encode(header.SerializeToString(), ())
            for part in parts:
                yield await self._pool.run(frames.encode, None, [part])

        self._whole = False
        async with aclosing(self._channel.stream(PUT, requests(), timeout_s=timeout_s)) as stream:
            async for reply in stream:
                self._whole = True
                return reply
        raise BadRequest("a put without a reply")

    async def close(self) -> None:
        self._whole = False
        await self._channel.close()


def _land(landing: Landing, frame: bytes) -> None:
    packed, data = frames.decode(frame)
    places = landing.places(packed or b"", len(data))
    if sum(map(len, places)) != len(data):
        raise Corrupt("a frame's data does not fit its places")
    at = 0
    for place in places:
        place[:] = data[at : at + len(place)]
        at += len(place)
    landing.landed()


async def _only(request: Any) -> AsyncIterator[Any]:
    yield request
