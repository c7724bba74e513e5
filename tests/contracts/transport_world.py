"""What the suite of transports works with: two ends, a service between hosts, and one on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import Overloaded
from kvstore.seams import Memory
from kvstore.transport.base import CallContext, Channel, Credentials, Transport
from kvstore.wire import common_pb2, worker_pb2
from tests.net_service import Service


class World(Protocol):
    """A server's transport and a client's, on one host."""

    server: Transport
    client: Transport
    memory: Memory
    socket: str  # a path for the local socket
    token_file: str  # holds TOKEN


Case = Callable[[World], Awaitable[None]]
TOKEN = "cluster-token-0123456789"


class LocalService(Service):
    """`WorkerLocal`: one segment, passed as the request says."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.segment = memory.segment("kvstore-test", 4096, sealed_writes=False)
        self.closed: list[int] = []

    async def hello(self, request: Any, context: CallContext) -> common_pb2.HelloReply:
        assert context.connection is not None
        context.connection.on_close.append(lambda: self.closed.append(self.ended))
        return await super().hello(request.hello, context)

    async def stage(self, request: worker_pb2.StageRequest, context: CallContext) -> worker_pb2.StageReply:
        context.attach(self.segment, writable=True)
        return worker_pb2.StageReply(segment=worker_pb2.SegmentInfo(segment=1))

    async def open(self, request: worker_pb2.OpenRequest, context: CallContext) -> worker_pb2.OpenReply:
        if request.redis:
            await self.wait()
        context.attach(self.segment, writable=False)
        return worker_pb2.OpenReply(hold=5)

    async def commit(self, request: worker_pb2.CommitRequest, context: CallContext) -> worker_pb2.PutReply:
        raise Overloaded("over quota: later")


async def soon(condition: Callable[[], object]) -> None:
    """Until `condition()` holds, at most 5 s."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


class Grpc:
    """A server and a channel to it."""

    def __init__(self, world: World, token_file: str = "") -> None:
        self.world = world
        self.service = Service()
        self.auth = Authenticator(load_policy("", token_file))
        self.server: Any = None
        self.channels: list[Channel] = []

    async def __aenter__(self) -> Grpc:
        services = {"Worker": self.service, "Coordinator": self.service}
        self.server = await self.world.server.serve("127.0.0.1:0", services, self.auth)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for channel in self.channels:
            await channel.close()
        await self.server.close(0.0)

    async def channel(self, namespace: str = "default", token: str = "") -> Channel:
        channel = await self.world.client.connect(self.server.address, Credentials(namespace, token))
        self.channels.append(channel)
        return channel


class Local:
    """A server on a socket."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.service = LocalService(world.memory)
        self.auth = Authenticator(load_policy())
        self.server: Any = None
        self.channels: list[Any] = []

    async def __aenter__(self) -> Local:
        self.server = await self.world.server.serve_local(self.world.socket, self.service, self.auth)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for channel in self.channels:
            await channel.close()
        await self.server.close(0.0)
        self.service.segment.close()

    async def channel(self, namespace: str = "default") -> Any:
        channel = await self.world.client.connect_local(self.world.socket, Credentials(namespace))
        self.channels.append(channel)
        return channel
