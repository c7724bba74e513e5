"""A service with every kind of call, for the tests of the real transports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from kvstore.errors import NotGranted, Overloaded
from kvstore.transport import frames
from kvstore.transport.base import CallContext
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2


class Clock:
    """The machine's."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ns(self) -> int:
        return time.time_ns()


class Service:
    """`Worker` and `Coordinator`. Records the contexts of its calls; `gate` holds calls that wait."""

    def __init__(self) -> None:
        self.contexts: list[CallContext] = []
        self.gate = asyncio.Event()
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.ended = 0

    async def hello(self, request: Any, context: CallContext) -> common_pb2.HelloReply:
        self.contexts.append(context)
        return common_pb2.HelloReply(id="w", boot_id=context.namespace, protocol=1)

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        self.contexts.append(context)
        if request.wait_ms:
            await self.wait()
        return common_pb2.MatchReply(blocks=len(request.keys) // 16, boot_id="x" * request.least)

    async def wait(self) -> None:
        """Until `gate`; tells of its cancellation."""
        self.began.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended += 1

    async def status(self, request: Any, context: CallContext) -> common_pb2.WorkerStatus:
        raise ZeroDivisionError("secret of the server")

    async def members(self, request: Any, context: CallContext) -> coordinator_pb2.MembersReply:
        return coordinator_pb2.MembersReply()

    async def score(self, request: coordinator_pb2.ScoreRequest, context: CallContext) -> coordinator_pb2.ScoreReply:
        return coordinator_pb2.ScoreReply()

    async def probe(self, request: Any, context: CallContext) -> worker_pb2.ProbeReply:
        return worker_pb2.ProbeReply()

    async def purge(self, request: worker_pb2.PurgeRequest, context: CallContext) -> worker_pb2.PurgeReply:
        if request.root:
            raise NotGranted("namespace x does not exist")
        raise Overloaded("over quota: later")

    async def pin(self, request: worker_pb2.PinRequest, context: CallContext) -> worker_pb2.PinReply:
        return worker_pb2.PinReply(ttl_ms=request.ttl_ms)

    async def renew(self, request: worker_pb2.RenewRequest, context: CallContext) -> worker_pb2.RenewReply:
        return worker_pb2.RenewReply(known=[True] * len(request.pins))

    async def unpin(self, request: worker_pb2.UnpinRequest, context: CallContext) -> worker_pb2.UnpinReply:
        return worker_pb2.UnpinReply()

    async def prefetch(self, request: worker_pb2.PrefetchRequest, context: CallContext) -> worker_pb2.PrefetchReply:
        return worker_pb2.PrefetchReply(ready=len(request.parts))

    async def hint(self, request: worker_pb2.HintRequest, context: CallContext) -> worker_pb2.HintReply:
        return worker_pb2.HintReply()

    async def inspect(self, request: worker_pb2.InspectRequest, context: CallContext) -> worker_pb2.InspectReply:
        return worker_pb2.InspectReply()

    async def pull(self, request: worker_pb2.PullRequest, context: CallContext) -> worker_pb2.PullReply:
        return worker_pb2.PullReply()

    async def data(self, request: worker_pb2.DataRequest, context: CallContext) -> worker_pb2.DataReply:
        return worker_pb2.DataReply()

    async def drain(self, request: worker_pb2.DrainRequest, context: CallContext) -> worker_pb2.DrainReply:
        return worker_pb2.DrainReply()

    async def watch(
        self, request: coordinator_pb2.WatchRequest, context: CallContext
    ) -> AsyncIterator[coordinator_pb2.WatchReply]:
        yield coordinator_pb2.WatchReply(state=coordinator_pb2.WatchState(complete=True))

    async def get(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncIterator[bytes]:
        if request.redis:
            raise Overloaded("at once")
        for number in range(request.layer_count):
            header = worker_pb2.GetHeader(parts=[worker_pb2.ChunkPart(block=number)])
            yield frames.encode(header.SerializeToString(), [bytes(request.layer_first)])
        if request.least:
            await self.wait()

    async def put(self, requests: AsyncIterator[bytes], context: CallContext) -> worker_pb2.PutReply:
        states: list[Any] = []
        async for frame in requests:
            _, data = frames.decode(frame)
            if data == b"stop":
                raise Overloaded("enough")
            states.append(worker_pb2.BLOCK_COMMITTED)
        return worker_pb2.PutReply(states=states)

    async def announce(
        self, requests: AsyncIterator[coordinator_pb2.AnnounceRequest], context: CallContext
    ) -> AsyncIterator[coordinator_pb2.AnnounceReply]:
        self.contexts.append(context)
        try:
            async for request in requests:
                yield coordinator_pb2.AnnounceReply(
                    fenced=coordinator_pb2.Fenced(epoch=request.register.member.epoch + 1)
                )
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.ended += 1


async def sequence(*items: Any) -> AsyncIterator[Any]:
    """Each item, then the end."""
    for item in items:
        yield item


async def endless(*items: Any) -> AsyncIterator[Any]:
    """Each item, and no end."""
    for item in items:
        yield item
    await asyncio.Event().wait()
