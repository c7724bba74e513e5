"""The client's end of a raw data connection: one call at a time, received straight into the caller's memory."""

from __future__ import annotations

import asyncio
import socket  # noqa: TID251 - the real socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError

from kvstore.errors import Corrupt, DeadlineExceeded, KVStoreError, Unavailable
from kvstore.seams import Pool
from kvstore.transport import data_frames as frames
from kvstore.transport.base import Begun, Landing
from kvstore.transport.data_link import DataLink
from kvstore.types import Buffer
from kvstore.wire import worker_pb2

T = TypeVar("T")
Reply = worker_pb2.PutReply


async def connect(
    address: str,
    ticket: bytes,
    pool: Pool,
    tls: tuple[ssl.SSLContext, str] | None,
    *,
    timeout_s: float,
    message_bytes_max: int,
) -> DataClient:
    """Connected and let in. `tls`: the context, and the name in the server's certificate, empty for its address.
    Unavailable when nobody is there, or the ticket is refused."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    link: DataLink | None = None
    try:
        async with asyncio.timeout(timeout_s):
            link = DataLink(await _connected(host, int(port), pool), pool, message_bytes_max)
            if tls is not None:
                await link.secure(tls[0], name=tls[1] or host)
            await link.send(frames.hello(ticket))
            kind, header, _ = await link.receive_frame()
            if kind == frames.ERROR:
                raise frames.error_of(header)
            if kind != frames.WELCOME:
                raise Corrupt(f"{address} answered with a frame of kind {kind}")
    except (KVStoreError, OSError) as error:  # TimeoutError is one of the last
        if link is not None:
            link.close()
        raise Unavailable(f"no data channel at {address}: {error or 'timed out'}") from None
    except BaseException:
        if link is not None:
            link.close()
        raise
    return DataClient(address, link)


async def _connected(host: str, port: int, pool: Pool) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await pool.run(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))  # a name takes its time
    family, kind, protocol, _, where = found[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        await loop.sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


class DataClient:
    """`kvstore.transport.base.DataChannel`."""

    def __init__(self, address: str, link: DataLink) -> None:
        self._address, self._link = address, link
        self._between = True  # two calls

    @property
    def usable(self) -> bool:
        return self._between and self._link.quiet()

    async def get(
        self, request: worker_pb2.GetRequest, landing: Landing, *, timeout_s: float, begun: Begun | None = None
    ) -> None:
        """Frames until the worker says it was the last one."""
        asked = worker_pb2.DataGet(timeout_ms=_ms(timeout_s))
        asked.get.CopyFrom(request)
        packed = frames.frame(frames.GET, asked.SerializeToString())

        def rest() -> None:
            while self._land(landing):
                pass

        async def run() -> None:
            await self._link.send(packed)  # from here: the worker reads it while a thread wakes up
            if begun is not None:
                if not await self._link.bulk(lambda: self._land(landing)):
                    return
                await begun()
            await self._link.bulk(rest)

        await self._call("Get", run, timeout_s)

    def _land(self, landing: Landing) -> bool:
        """Thread: one frame of a Get; whether it was not the end."""
        kind, header, nbytes = self._link.take_frame()
        if kind == frames.END:
            self._between = True
            return False
        if kind == frames.ERROR:
            self._between = True
            raise frames.error_of(header)
        if kind != frames.FRAME:
            raise Corrupt(f"a frame of kind {kind} in a Get")
        places = landing.places(header, nbytes)
        if sum(map(len, places)) != nbytes:
            raise Corrupt("a frame's data does not fit its places")
        self._link.fill_all(places)
        landing.landed()
        return True

    async def put(
        self, header: worker_pb2.PutHeader, parts: Sequence[Buffer], *, timeout_s: float
    ) -> worker_pb2.PutReply:
        """Sent from where it lies, once the worker has room."""
        asked = worker_pb2.DataPut(timeout_ms=_ms(timeout_s))
        asked.put.CopyFrom(header)
        packed = frames.frame(frames.PUT, asked.SerializeToString())

        def run() -> worker_pb2.PutReply:
            link = self._link
            link.send_all([packed])
            self._expect(frames.GO)
            self._between = False  # until the reply: an error may come before the worker has read everything
            link.send_all([frames.head(frames.BYTES, 0, sum(memoryview(part).nbytes for part in parts)), *parts])
            reply = self._expect(frames.REPLY)
            try:
                made = worker_pb2.PutReply.FromString(reply)
            except DecodeError:
                raise Corrupt("the reply to a Put is not a PutReply") from None
            return made

        return await self._call("Put", lambda: self._link.bulk(run), timeout_s)

    def _expect(self, wanted: int) -> bytes:
        kind, header, _ = self._link.take_frame()
        if kind == frames.ERROR:
            self._between = wanted == frames.GO
            raise frames.error_of(header)
        if kind != wanted:
            raise Corrupt(f"a frame of kind {kind} in a Put")
        self._between = True
        return header

    async def _call(self, name: str, run: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        if not self._between:
            raise Unavailable(f"{self._address}: the data connection is of no more use")
        self._between = False
        try:
            async with asyncio.timeout(timeout_s):
                return await run()
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address}: no answer to {name} within {timeout_s} s") from None

    async def close(self) -> None:
        self._link.close()


def _ms(timeout_s: float) -> int:
    return max(1, int(timeout_s * 1000))
