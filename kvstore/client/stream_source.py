"""Reading stored blocks of a worker on another host: a Get stream, decoded as its frames arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing

from kvstore.client.arrivals import Arrivals, Landed, is_direct
from kvstore.client.in_place import InPlace
from kvstore.client.pieces import Asked, Piece, shard_keys
from kvstore.errors import KVStoreError
from kvstore.seams import Pool
from kvstore.transport.base import Channel, Landing
from kvstore.transport.methods import WORKER
from kvstore.wire import worker_pb2

RawGet = Callable[[worker_pb2.GetRequest, Landing, float], Awaitable[float]]
"""(request, landing, seconds): 0 when a raw connection served it; else nothing has landed, and so many seconds are
left."""


async def read_remote(
    channel: Channel,
    pool: Pool,
    asked: Asked,
    pieces: Sequence[Piece],
    *,
    timeout_s: float,
    arrived: Callable[[], None] = lambda: None,
    raw: RawGet | None = None,
) -> None:
    """One Get, by a raw connection where `raw` makes one, else as a gRPC stream. Sets `tier` or `problem` of every
    piece; what was whole before an error counts, and chunks that came of a block need not come again. `arrived` is
    called after every frame.

    KVStoreError: the stream ended early.
    """
    blocks, ordered = shard_keys(pieces)
    request = worker_pb2.GetRequest(
        root=asked.spec.root,
        blocks=blocks,
        least=int(asked.least),  # type: ignore[arg-type]
        redis=asked.redis,
    )
    request.planes = asked.planes
    request.by_block = asked.by_block
    if asked.layers is not None:
        request.layer_first, request.layer_count = asked.layers.start, len(asked.layers)
    for index, piece in enumerate(ordered):
        if piece.chunks and (piece.scratch is not None or is_direct(piece)):
            resume = worker_pb2.Resume(block=index, copy_id=piece.copy_id, first_chunk=piece.chunks)
            request.resume.append(resume)
    arrivals = Arrivals(pool, asked, ordered, arrived)
    failure: KVStoreError | None = None
    expecting = asyncio.get_running_loop().call_soon(arrivals.expect)  # once this waits for the worker
    try:
        left_s = timeout_s
        if raw is not None:
            landing = _landing(arrivals, asked)
            try:
                left_s = await raw(request, landing, timeout_s)
            finally:
                landing.conclude()
        if left_s > 0:
            async with aclosing(channel.stream(WORKER["Get"], _once(request), timeout_s=left_s)) as stream:
                async for frame in stream:
                    await arrivals.take(frame)
    except KVStoreError as error:
        failure = error
    finally:
        expecting.cancel()
        await arrivals.settle()
    await arrivals.finish()
    if failure is not None:
        raise failure


async def _once(request: worker_pb2.GetRequest) -> AsyncIterator[worker_pb2.GetRequest]:
    yield request


def _landing(arrivals: Arrivals, asked: Asked) -> InPlace:
    """For frames whose data is received where it belongs. What has landed is noted in this event loop: at once where
    somebody waits for layers, else by `InPlace.conclude`, since waking the loop takes the receiver's time."""
    loop = asyncio.get_running_loop()

    def at_once(landed: Landed) -> None:
        loop.call_soon_threadsafe(arrivals.note, landed)

    return InPlace(arrivals, at_once if asked.layerwise else None)
