"""What a worker serves on raw data connections: the same Get and Put as by gRPC, bytes sent from where they lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import numpy as np

from kvstore.transport.base import CallContext, Incoming, OutgoingFrames
from kvstore.wire import worker_pb2
from workers.incoming import PutBlocks
from workers.service import WorkerService
from workers.tickets import Tickets

TAKEN_BYTES = 4 << 20
"""Of a put, received while as much before it is copied to its place; one block where that is larger."""


class DataCalls:
    """`kvstore.transport.base.DataService` of one worker."""

    def __init__(self, service: WorkerService, tickets: Tickets) -> None:
        self._service, self._tickets = service, tickets

    def admit(self, ticket: bytes, host: str) -> CallContext:
        return self._tickets.take(ticket, host)

    @asynccontextmanager
    async def get(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncIterator[OutgoingFrames]:
        """As `WorkerService.get`; the blocks are held for the time of the block."""
        async with self._service.outgoing(request, context) as outgoing:
            yield outgoing.each()

    async def put(self, header: worker_pb2.PutHeader, context: CallContext, incoming: Incoming) -> worker_pb2.PutReply:
        """As `WorkerService.put`. One buffer is filled while the blocks in another are stored."""
        node = self._service.node
        blocks = PutBlocks(node, context.namespace, header)
        steps = list(_steps(blocks.nbytes))
        size = max(map(sum, steps))
        with node.receiving.take(2 * size, context.namespace):
            await incoming.begin()
            buffers = [memoryview(np.empty(size, np.uint8).data) for _ in range(2)]
            storing: asyncio.Task[None] | None = None
            try:
                for number, step in enumerate(steps):
                    room = buffers[number % 2][: sum(step)]
                    await incoming.fill(room)
                    if storing is not None:
                        await storing
                    storing = asyncio.create_task(blocks.store(list(_cut(room, step))))
                assert storing is not None, "a put without blocks was let in"
                await storing
            finally:
                if storing is not None and not storing.done():
                    await asyncio.wait([storing])
        return blocks.reply()


def _steps(sizes: list[int]) -> Iterator[list[int]]:
    """Sizes of blocks, as many at a time as TAKEN_BYTES have room for. Pure."""
    step: list[int] = []
    for size in sizes:
        if step and sum(step) + size > TAKEN_BYTES:
            yield step
            step = []
        step.append(size)
    yield step


def _cut(room: memoryview, step: list[int]) -> Iterator[memoryview]:
    at = 0
    for size in step:
        yield room[at : at + size]
        at += size
