"""A server and a client in the simulator, for the tests of the simulator itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import Overloaded
from kvstore.transport.base import CallContext, Credentials
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
from tests.sim.loop import run
from tests.sim.memory import SimMemory
from tests.sim.network import Faults, MemoryNetwork

AUTH = Authenticator(load_policy())
ADDRESS = "w:1"


class Service:
    """Every kind of call, and what was seen of them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ended = 0
        self.closed = 0
        self.segment = SimMemory().segment("s", 64, sealed_writes=False)

    async def hello(self, request: Any, context: CallContext) -> common_pb2.HelloReply:
        if context.connection is not None:
            context.connection.on_close.append(self.on_close)
        return common_pb2.HelloReply(id="w", boot_id=context.namespace)

    def on_close(self) -> None:
        self.closed += 1

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        self.seen.append(request.keys.decode())
        await asyncio.sleep(request.wait_ms / 1000)
        request.keys = b"changed in the server"
        return common_pb2.MatchReply(blocks=7)

    async def purge(self, request: Any, context: CallContext) -> worker_pb2.PurgeReply:
        raise Overloaded("later, please")

    async def status(self, request: Any, context: CallContext) -> common_pb2.WorkerStatus:
        raise ZeroDivisionError

    async def get(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncIterator[bytes]:
        for number in range(request.layer_count):
            yield b"frame %d" % number

    async def put(self, requests: AsyncIterator[bytes], context: CallContext) -> worker_pb2.PutReply:
        frames = [frame async for frame in requests]
        return worker_pb2.PutReply(states=[worker_pb2.BLOCK_COMMITTED] * len(frames))

    async def announce(
        self, requests: AsyncIterator[coordinator_pb2.AnnounceRequest], context: CallContext
    ) -> AsyncIterator[coordinator_pb2.AnnounceReply]:
        try:
            async for request in requests:
                yield coordinator_pb2.AnnounceReply(
                    fenced=coordinator_pb2.Fenced(epoch=request.register.member.epoch + 1)
                )
        finally:
            self.ended += 1

    async def stage(self, request: worker_pb2.StageRequest, context: CallContext) -> worker_pb2.StageReply:
        await asyncio.sleep(request.bytes / 1000)
        context.attach(self.segment, writable=True)
        return worker_pb2.StageReply()

    async def open(self, request: worker_pb2.OpenRequest, context: CallContext) -> worker_pb2.OpenReply:
        context.attach(self.segment, writable=False)
        return worker_pb2.OpenReply(hold=5)


async def sequence(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def endless() -> AsyncIterator[Any]:
    yield coordinator_pb2.AnnounceRequest()
    await asyncio.Event().wait()


class Pair:
    """A server `w` and a client `c`."""

    def __init__(self, seed: int = 1, faults: Faults | None = None, same_host: bool = False) -> None:
        self.network = MemoryNetwork(seed, faults)
        self.service = Service()
        self.w = self.network.boot("w", "host")
        self.c = self.network.boot("c", "host" if same_host else "elsewhere")

    async def serve(self) -> None:
        transport = self.network.transport(self.w)
        await transport.serve("127.0.0.1:1", {"Worker": self.service, "Coordinator": self.service}, AUTH)
        await transport.serve_local("/w.sock", self.service, AUTH)

    async def channel(self, namespace: str = "default") -> Any:
        return await self.network.transport(self.c).connect(ADDRESS, Credentials(namespace))

    async def local(self) -> Any:
        return await self.network.transport(self.c).connect_local("/w.sock", Credentials())


def scenario(
    body: Callable[[Pair], Coroutine[Any, Any, Any]], *, seed: int = 1, faults: Faults | None = None, **options: Any
) -> Any:
    pair = Pair(seed, faults, **options)

    async def main() -> Any:
        await pair.serve()
        return await pair.c.spawn(body(pair))

    return run(main(), processes=pair.network.processes)


def match(text: str, wait_ms: int = 0) -> common_pb2.MatchRequest:
    return common_pb2.MatchRequest(keys=text.encode(), wait_ms=wait_ms)
