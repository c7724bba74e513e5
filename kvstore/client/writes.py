"""Storing raw blocks on one worker: through the staging segment of this host, or as a Put stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.client.host_link import HostLink, Space, Staging
from kvstore.client.slices import Slices
from kvstore.client.targets import address_of
from kvstore.errors import Overloaded, ServiceError, Unavailable
from kvstore.seams import Pool
from kvstore.spec import ModelSpec, Shard
from kvstore.transport import frames
from kvstore.transport.base import Channel
from kvstore.transport.methods import WORKER
from kvstore.types import CommitToken, Fidelity
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import shard_to_wire

COMMITTED, HELD, DROPPED, REFUSED = "committed", "held", "dropped", "refused"

RawPut = Callable[[worker_pb2.PutHeader, Sequence[memoryview], float], Awaitable[tuple[Any, float]]]
"""(header, raw blocks, seconds): (the reply, 0), or (None, seconds left) where no raw connection served it."""

STATES = {
    worker_pb2.BLOCK_COMMITTED: COMMITTED,
    worker_pb2.BLOCK_HELD_ALREADY: HELD,
    worker_pb2.BLOCK_DROPPED: DROPPED,
    worker_pb2.BLOCK_REFUSED: REFUSED,
}

PARTS = 4
"""A staging segment takes about so many commits at a time: one is written while another is copied out."""

PART_BYTES = 16 << 20
"""Of one commit, at most, unless a block is larger: small enough that most of the writer's copy hides behind the
worker's, large enough that handing over costs little beside copying."""

MESSAGE_BYTES = 2 << 20
"""Payload of one message of a stream. Blocks are not cut across messages unless they are larger: the worker then stores
them from where they lie."""

STREAM_BLOCKS_MAX = 4096


@dataclass(slots=True)
class Item:
    """One block to store: its raw bytes in canonical order."""

    key: bytes
    parent: bytes
    group: bytes
    depth: int
    raw: memoryview
    state: str = ""  # once a worker has answered
    token: CommitToken | None = None  # of that answer

    def message(self, shard: common_pb2.Shard, computed_on: Fidelity, offset: int = 0) -> worker_pb2.PutBlock:
        return worker_pb2.PutBlock(
            shard=shard,
            key=self.key,
            parent=self.parent,
            group=self.group,
            depth=self.depth,
            computed_on=int(computed_on),
            raw_bytes=len(self.raw),
            offset=offset,
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """What all blocks of one put share."""

    spec: ModelSpec
    shard: Shard
    computed_on: Fidelity


def note(items: Sequence[Item], reply: worker_pb2.PutReply) -> CommitToken:
    """The states of a reply. Unavailable where it does not fit the request."""
    if len(reply.states) != len(items):
        raise Unavailable(f"{len(items)} blocks were put and {len(reply.states)} answered")
    token = CommitToken(reply.token.worker, reply.token.epoch, reply.token.seq)
    for item, state in zip(items, reply.states, strict=True):
        item.state, item.token = STATES.get(state, DROPPED), token
    return token


async def put_local(
    link: HostLink, pool: Pool, stored: Stored, items: Sequence[Item], *, staging_bytes: int, timeout_s: float
) -> list[CommitToken]:
    """Commits in pieces that overlap. Sets the state of what was answered. ServiceError where something was not."""
    staging = await link.staging(staging_bytes, timeout_s=timeout_s)
    size = len(items[0].raw)
    if size > staging.nbytes:
        raise Overloaded(f"a block of {size} bytes does not fit the staging segment of {staging.nbytes}")
    step = max(1, min(staging.nbytes // PARTS, PART_BYTES) // size)
    turns, copying = asyncio.Semaphore(PARTS), asyncio.Lock()

    async def one(part: Sequence[Item]) -> CommitToken:
        async with turns, link.space(staging, size * len(part)) as space:
            view = space.view  # taken here: while it lives, the memory stays mapped even if the connection ends
            if len(view) < size * len(part):
                raise Unavailable("the connection ended, and its staging memory with it")
            request = _commit(stored, part, staging, space)
            async with copying:  # one after the other: the worker has the first while the second is copied
                await _copy(pool, part, view)
            await asyncio.sleep(0)  # byte movers are asked for the next part first: the commit wakes another process
            return note(part, await link.commit(request, timeout_s=timeout_s))

    parts = [items[at : at + step] for at in range(0, len(items), step)]
    outcomes = await asyncio.gather(*map(one, parts), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, CommitToken)]


async def _copy(pool: Pool, part: Sequence[Item], view: memoryview) -> None:
    """The part's blocks into `view`, one behind the other. Cancelled: only when nobody copies any more."""
    from kvstore.kernels.landing import copy  # at hand since the client began (`bulk.ready`)

    count, size = len(part), len(part[0].raw)
    assert count * size <= len(view), "a part that is larger than its space"
    numbers, places, sources = np.arange(count), np.zeros((count, 4), np.uint64), np.zeros((count, 2), np.uint64)
    places[:, 0], places[:, 2], places[:, 3] = numbers, size, address_of(view) + numbers * size
    sources[:, 0] = [address_of(item.raw) for item in part]
    ends, all_there = (numbers + 1) * size, np.zeros(count, np.int64)
    await Slices(lambda first, last: copy(places, ends, sources, all_there, first, last), count * size).run(pool)


def _commit(stored: Stored, part: Sequence[Item], staging: Staging, space: Space) -> worker_pb2.CommitRequest:
    size, shard = len(part[0].raw), shard_to_wire(stored.shard)
    blocks = [item.message(shard, stored.computed_on, space.offset + index * size) for index, item in enumerate(part)]
    return worker_pb2.CommitRequest(spec_json=stored.spec.canonical_json(), segment=staging.segment, blocks=blocks)


async def put_remote(
    channel: Channel,
    pool: Pool,
    stored: Stored,
    items: Sequence[Item],
    *,
    timeout_s: float,
    raw: RawPut | None = None,
) -> list[CommitToken]:
    """One Put for every `STREAM_BLOCKS_MAX` blocks, by a raw connection where `raw` makes one, else as a gRPC stream.
    Sets the state of what was answered. ServiceError."""
    tokens = []
    for at in range(0, len(items), STREAM_BLOCKS_MAX):
        part = items[at : at + STREAM_BLOCKS_MAX]
        if raw is not None:
            answer, left_s = await raw(_put_header(stored, part), [item.raw for item in part], timeout_s)
            timeout_s = left_s or timeout_s
            if answer is not None:
                tokens.append(note(part, answer))
                continue
        stream = channel.stream(WORKER["Put"], _frames(pool, stored, part), timeout_s=timeout_s)
        reply: worker_pb2.PutReply | None = None
        async with aclosing(stream):
            async for message in stream:
                reply = message
        if reply is None:
            raise Unavailable("the worker ended a Put without an answer")
        tokens.append(note(part, reply))
    return tokens


def _put_header(stored: Stored, part: Sequence[Item]) -> worker_pb2.PutHeader:
    shard = shard_to_wire(stored.shard)
    blocks = [item.message(shard, stored.computed_on) for item in part]
    return worker_pb2.PutHeader(spec_json=stored.spec.canonical_json(), blocks=blocks)


async def _frames(pool: Pool, stored: Stored, part: Sequence[Item]) -> AsyncIterator[bytes]:
    yield frames.encode(_put_header(stored, part).SerializeToString(), ())
    pending: list[memoryview] = []
    size = 0
    for item in part:
        at = 0
        if pending and size + len(item.raw) > MESSAGE_BYTES >= len(item.raw):
            yield await pool.run(frames.encode, None, pending)
            pending, size = [], 0
        while at < len(item.raw):
            piece = item.raw[at : at + MESSAGE_BYTES - size]
            pending.append(piece)
            at += len(piece)
            size += len(piece)
            if size == MESSAGE_BYTES:
                yield await pool.run(frames.encode, None, pending)
                pending, size = [], 0
    if pending:
        yield await pool.run(frames.encode, None, pending)


def unanswered(items: Sequence[Item]) -> list[Item]:
    """What no worker has taken or refused yet. Pure."""
    return [item for item in items if not item.state]


__all__ = ["Item", "ServiceError", "Stored", "put_local", "put_remote", "unanswered"]
