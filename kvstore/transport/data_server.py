"""The worker's end of raw data connections: who comes with a ticket is let in, then calls follow each other.

A connection is one task on the event loop; only while bytes of blocks move it uses a thread, and there are as many
threads as connections. Whoever connects and stays silent costs a descriptor until `HELLO_S` has passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket  # noqa: TID251 - the real socket
import ssl
from collections.abc import Coroutine
from typing import Any

from google.protobuf.message import DecodeError

from kvstore.errors import BadRequest, Corrupt, DeadlineExceeded, KVStoreError, SetupError
from kvstore.seams import Clock, Pool
from kvstore.transport import data_frames as frames
from kvstore.transport.base import CallContext, DataService, OutgoingFrames
from kvstore.transport.data_link import DataLink
from kvstore.types import Buffer
from kvstore.wire import worker_pb2

HELLO_S = 5.0
"""From connecting to the end of the greeting."""

RETRY_S = 0.05
"""After an accept that failed."""

BACKLOG = 128
LOG = logging.getLogger("kvstore")


class DataServer:
    """`kvstore.transport.base.Server`. `start` it."""

    def __init__(
        self,
        service: DataService,
        pool: Pool,
        clock: Clock,
        *,
        tls: ssl.SSLContext | None,
        connections_max: int,
        idle_s: float,
        call_max_s: float,
        message_bytes_max: int,
    ) -> None:
        self.address = ""
        self._service, self._pool, self._clock, self._tls = service, pool, clock, tls
        self._connections_max, self._idle_s = connections_max, idle_s
        self._call_max_s, self._message_bytes_max = call_max_s, message_bytes_max
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._peers: dict[asyncio.Task[None], Peer] = {}

    def start(self, address: str) -> None:
        """Listening when it returns. SetupError."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        try:
            family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            self._listener = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
        except OSError as error:
            raise SetupError(
                f"cannot listen on {address} for data: {error.strerror}: choose another worker.data_port"
            ) from None
        self._listener.setblocking(False)
        bound = self._listener.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors, mostly: the next one is waited for all the same
                LOG.warning("a data connection was not accepted: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            try:
                link = DataLink(sock, self._pool, self._message_bytes_max)
            except OSError:  # gone again
                sock.close()
                continue
            if not self._room():
                link.close()
                continue
            peer = Peer(self._service, link, self._clock, self._tls, self._idle_s, self._call_max_s)
            task = asyncio.create_task(peer.run())
            self._peers[task] = peer
            task.add_done_callback(lambda done: self._peers.pop(done, None))

    def _room(self) -> bool:
        """Whether another connection may be had, the longest idle one ended for it if need be."""
        if len(self._peers) < self._connections_max:
            return True
        idle = [peer for peer in self._peers.values() if peer.idle_since is not None and not peer.link.broken]
        if not idle:
            return False
        min(idle, key=lambda peer: peer.idle_since or 0.0).link.abort()
        return True

    async def close(self, grace_s: float) -> None:
        """No new connections; calls under way get `grace_s`."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()
        for peer in self._peers.values():
            peer.leave()
        if self._peers:
            await asyncio.wait(list(self._peers), timeout=grace_s)
        for task in list(self._peers):
            task.cancel()
        if self._peers:
            await asyncio.wait(list(self._peers))


class Peer:
    """One connection."""

    def __init__(
        self,
        service: DataService,
        link: DataLink,
        clock: Clock,
        tls: ssl.SSLContext | None,
        idle_s: float,
        call_max_s: float,
    ) -> None:
        self.link = link
        self.idle_since: float | None = None  # between two calls
        self._service, self._clock, self._tls = service, clock, tls
        self._idle_s, self._call_max_s = idle_s, call_max_s
        self._leaving = False

    def leave(self) -> None:
        """End after the call under way."""
        self._leaving = True
        if self.idle_since is not None:
            self.link.abort()

    async def run(self) -> None:
        """Until the peer goes, stays silent for too long or says what can't be understood."""
        try:
            async with asyncio.timeout(HELLO_S):
                context = await self._greet()
            while not self._leaving and await self._next_call():
                await self._call(context)
        except (KVStoreError, TimeoutError):
            pass  # it has been told, or has gone: in either case this connection is over
        except Exception:
            LOG.exception("a data connection failed")
        finally:
            self.link.close()

    async def _greet(self) -> CallContext:
        if self._tls is not None:
            await self.link.secure(self._tls)
        ticket = frames.ticket_of(await self.link.receive(frames.HELLO_BYTES))
        try:
            context = self._service.admit(ticket, self.link.peer_host)
        except KVStoreError as error:
            await self.link.send(frames.error_frame(error))
            raise
        await self.link.send(frames.frame(frames.WELCOME))
        return context

    async def _next_call(self) -> bool:
        """Whether there is one."""
        self.idle_since = self._clock.monotonic()
        try:
            async with asyncio.timeout(self._idle_s):
                await self.link.readable()
        except TimeoutError:
            return False
        finally:
            self.idle_since = None
        return not self.link.broken

    async def _call(self, context: CallContext) -> None:
        async with asyncio.timeout(HELLO_S):
            kind, packed, _ = await self.link.receive_frame()
        try:
            if kind == frames.GET:
                asked = worker_pb2.DataGet.FromString(packed)
                timeout_s = self._timeout_s(context, asked.timeout_ms)
                await self._bounded(self._get(asked.get, context), timeout_s)
            elif kind == frames.PUT:
                offered = worker_pb2.DataPut.FromString(packed)
                timeout_s = self._timeout_s(context, offered.timeout_ms)
                await self._bounded(self._put(offered.put, context), timeout_s)
            else:
                raise Corrupt(f"a frame of kind {kind} where a call should begin")
        except DecodeError:
            raise BadRequest("a call of the data channel can't be read") from None

    def _timeout_s(self, context: CallContext, timeout_ms: int) -> float:
        timeout_s = min(timeout_ms / 1000 if timeout_ms else self._call_max_s, self._call_max_s)
        context.deadline = self._clock.monotonic() + timeout_s
        return timeout_s

    async def _bounded(self, call: Coroutine[Any, Any, None], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await call
        except TimeoutError:
            raise DeadlineExceeded(f"the call took longer than {timeout_s} s") from None

    async def _get(self, request: worker_pb2.GetRequest, context: CallContext) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                outgoing = await self._opened(stack, request, context)
            except KVStoreError as error:
                await self.link.send(frames.error_frame(error))
                return
            await self.link.bulk(lambda: self._send(outgoing))

    async def _opened(
        self, stack: contextlib.AsyncExitStack, request: worker_pb2.GetRequest, context: CallContext
    ) -> OutgoingFrames:
        """What will be sent; given up when the peer goes meanwhile: it says nothing until it has its answer."""
        async with self.link.watched():
            return await stack.enter_async_context(self._service.get(request, context))

    def _send(self, outgoing: OutgoingFrames) -> None:
        """Thread. A frame without data goes along with the next one: waking the peer costs more than making it."""
        ahead: list[Buffer] = []
        for header, parts in outgoing:
            nbytes = sum(memoryview(part).nbytes for part in parts)
            ahead += [frames.head(frames.FRAME, len(header), nbytes) + header, *parts]
            if nbytes:
                self.link.send_all(ahead)
                ahead = []
        self.link.send_all([*ahead, frames.frame(frames.END)])

    async def _put(self, header: worker_pb2.PutHeader, context: CallContext) -> None:
        taking = Taking(self.link, sum(block.raw_bytes for block in header.blocks))
        try:
            reply = await self._service.put(header, context, taking)
        except KVStoreError as error:
            await self.link.send(frames.error_frame(error))
            if taking.begun:
                raise  # bytes may be on their way that nobody will read
            return
        await self.link.send(frames.frame(frames.REPLY, reply.SerializeToString()))


class Taking:
    """`kvstore.transport.base.Incoming` of one put."""

    def __init__(self, link: DataLink, nbytes: int) -> None:
        self._link, self._left = link, nbytes
        self.begun = False

    async def begin(self) -> None:
        self.begun = True
        await self._link.send(frames.frame(frames.GO))
        kind, _, nbytes = await self._link.receive_frame()
        if kind != frames.BYTES or nbytes != self._left:
            raise BadRequest(f"{self._left} bytes were announced and {nbytes} are sent")

    async def fill(self, target: memoryview) -> None:
        self._left -= len(target)
        assert self._left >= 0, "more is read than was announced"
        await self._link.bulk(lambda: self._link.fill(target))
