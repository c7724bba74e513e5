"""A local socket under test: a service, its server, its clients and the raw sockets of strangers."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Any

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import Overloaded
from kvstore.machine.memory import MemfdMemory
from kvstore.seams import Segment
from kvstore.transport import local, local_frames
from kvstore.transport.base import CallContext, Credentials
from kvstore.transport.local_client import LocalClient
from kvstore.transport.local_frames import LocalLimits
from kvstore.wire import common_pb2, worker_pb2

KIB = 1024


class Service:
    """`WorkerLocal`. Segments it passes are its own; `gate` holds calls that wait."""

    def __init__(self) -> None:
        self.contexts: list[CallContext] = []
        self.gate = asyncio.Event()
        self.waiting = 0
        self.most = 0  # waiting at a time
        self.closed: list[int] = []  # calls that waited still when a connection was cleaned up
        self.segments: list[Segment] = []

    async def hello(self, request: worker_pb2.LocalHelloRequest, context: CallContext) -> common_pb2.HelloReply:
        assert context.connection is not None
        self.contexts.append(context)
        context.connection.on_close.append(lambda: self.closed.append(self.waiting))
        return common_pb2.HelloReply(id="w", boot_id=context.namespace)

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        self.contexts.append(context)
        if request.wait_ms:
            await self.wait()
        return common_pb2.MatchReply(blocks=len(request.keys), boot_id="x" * request.least)

    async def wait(self) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1

    async def stage(self, request: worker_pb2.StageRequest, context: CallContext) -> worker_pb2.StageReply:
        if self.gate.is_set():
            await asyncio.sleep(0.01)
        segment = self.make(request.bytes, sealed_writes=False)
        context.attach(segment, writable=True)
        return worker_pb2.StageReply(segment=worker_pb2.SegmentInfo(segment=1, bytes=request.bytes, writable=True))

    async def open(self, request: worker_pb2.OpenRequest, context: CallContext) -> worker_pb2.OpenReply:
        for number in range(request.deadline_ms):
            segment = self.make(4 * KIB, sealed_writes=True)
            segment.view[:4] = struct.pack("<I", number)
            context.attach(segment, writable=False)
        if request.redis:
            await self.wait()
        return worker_pb2.OpenReply(hold=request.deadline_ms)

    async def release(self, request: worker_pb2.ReleaseRequest, context: CallContext) -> worker_pb2.ReleaseReply:
        raise ZeroDivisionError("secret of the server")

    async def commit(self, request: worker_pb2.CommitRequest, context: CallContext) -> worker_pb2.PutReply:
        raise Overloaded("over quota: later")

    def make(self, nbytes: int, *, sealed_writes: bool) -> Segment:
        segment = MemfdMemory().segment("kvstore-test", nbytes, sealed_writes=sealed_writes)
        self.segments.append(segment)
        return segment


class Net:
    """One server, the clients it was asked for, and the ends of raw sockets."""

    def __init__(self, path: str, limits: LocalLimits, auth: Authenticator | None = None) -> None:
        self.path = path
        self.limits = limits
        self.auth = auth or Authenticator(load_policy(), os.getuid())
        self.service = Service()
        self.clients: list[LocalClient] = []
        self.raw: list[socket.socket] = []
        self.server: Any = None

    async def __aenter__(self) -> Net:
        self.server = await local.serve(self.path, self.service, self.auth, self.limits)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for client in self.clients:
            await client.close()
        for sock in self.raw:
            sock.close()
        await self.server.close(0.0)
        for segment in self.service.segments:
            segment.close()

    async def client(self, namespace: str = "default", token: str = "") -> LocalClient:
        client = await local.connect(self.path, Credentials(namespace, token), self.limits)
        self.clients.append(client)
        return client

    async def stranger(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.raw.append(sock)
        await asyncio.get_running_loop().sock_connect(sock, self.path)
        return sock

    async def ended(self, count: int) -> None:
        await soon(lambda: len(self.service.closed) == count)


async def soon(condition: Any) -> None:
    """Until `condition()` holds, at most 5 s."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def rest(sock: socket.socket) -> bytes:
    """All that comes until the peer closes, at most 5 s."""
    data = b""
    async with asyncio.timeout(5):
        while True:
            try:
                part = await asyncio.get_running_loop().sock_recv(sock, 65536)
            except ConnectionResetError:
                part = b""
            if not part:
                return data
            data += part


def errors_in(data: bytes) -> list[str]:
    frames = local_frames.Decoder(1 << 20, (local_frames.REPLY, local_frames.ERROR)).feed(data)
    return [str(local_frames.decode_error(f.payload)) for f in frames if f.kind == local_frames.ERROR]


def match(keys: bytes = b"", *, wait: bool = False, size: int = 0) -> common_pb2.MatchRequest:
    return common_pb2.MatchRequest(keys=keys, wait_ms=int(wait), least=size)  # type: ignore[arg-type]


HELLO = worker_pb2.LocalHelloRequest(hello=common_pb2.HelloRequest(protocol=1), namespace="default")


def request_frame(name: str, message: Any, call: int = 1) -> bytes:
    return local_frames.encode(local_frames.REQUEST, local_frames.NUMBERS[name], call, message.SerializeToString())
