"""One connection to a worker on this host: the segments it passed, the staging space, the holds to give back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import Message

from kvstore.client.targets import address_of
from kvstore.errors import Corrupt, DeadlineExceeded, Overloaded, ServiceError, Unavailable
from kvstore.header_columns import Columns, Mask
from kvstore.seams import System
from kvstore.store.arena import UNIT_BYTES, generation_at, table_bytes
from kvstore.transport.base import LocalChannel, MappedSegment, Meanwhile, Method
from kvstore.transport.methods import WORKER_LOCAL
from kvstore.wire import common_pb2, worker_pb2

RELEASE_TIMEOUT_S = 2.0
HOLDS_A_MESSAGE = 1024


@dataclass(frozen=True, slots=True)
class Mapped:
    """A segment of the worker, mapped here: its generation table, which the worker goes on writing, then data."""

    segment: MappedSegment
    view: memoryview
    data_offset: int

    def hold(self, offsets: Columns, lengths: Columns) -> Mask:
        """(n,) uint64 each -> (n,) bool: whether those are ranges of its data."""
        size, first = np.uint64(len(self.view)), np.uint64(self.data_offset)
        inside: Mask = (lengths <= size) & (offsets >= first) & (offsets <= size - np.minimum(lengths, size))
        return inside

    def current(self, offset: int, generation: int) -> bool:
        """Whether the unit at `offset` still has that generation."""
        return generation_at(self.view, self.data_offset, offset) == generation


@dataclass(frozen=True, slots=True)
class Table:
    """Segments for compiled loops. Whoever reads there holds the table: then they stay mapped."""

    places: Columns  # (s, 5) uint64: id, address, bytes, offset of data, log2 of a unit's bytes
    views: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class Space:
    """A part of the staging segment, this holder's alone until it is given back."""

    segment: int
    offset: int
    view: memoryview


class Staging:
    """The writable segment of one connection, given out in contiguous parts, first come first served."""

    def __init__(self, segment: int, mapped: MappedSegment, nbytes: int) -> None:
        self.segment, self.nbytes = segment, nbytes
        self._mapped = mapped
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (offset, bytes), ascending, never adjacent
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, nbytes: int) -> Space:
        """Waits until so many bytes are free in one piece; the caller's deadline bounds it."""
        async with self._turn:
            while True:
                for index, (offset, size) in enumerate(self._free):
                    if size >= nbytes:
                        rest = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                        self._free[index : index + 1] = rest
                        return Space(self.segment, offset, self._mapped.view[offset : offset + nbytes])
                self._freed.clear()
                await self._freed.wait()

    def give_back(self, space: Space) -> None:
        """Mutates. Only when the worker has answered: until then it may still read there."""
        merged: list[tuple[int, int]] = []
        for offset, size in sorted([*self._free, (space.offset, len(space.view))]):
            if merged and merged[-1][0] + merged[-1][1] == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        self._free = merged
        self._freed.set()

    def close(self) -> None:
        self._mapped.close()


class HostLink:
    """Calls of `WorkerLocal`. Raises ServiceError; `broken` once the connection must not be used again."""

    def __init__(self, channel: LocalChannel, system: System) -> None:
        self._channel, self._system = channel, system
        self._segments: dict[int, Mapped] = {}
        self._table: Table | None = None
        self._staging: Staging | None = None
        self._staging_turn = asyncio.Lock()
        self._holds: list[int] = []
        self._releasing: asyncio.Task[None] | None = None
        self._closed = False
        self._takes_releases = "release.v1" in channel.hello.capabilities
        self.sends_rows = "rows.v1" in channel.hello.capabilities
        channel.on_late = self._late

    @property
    def broken(self) -> bool:
        return self._closed or self._channel.closed

    async def match(self, request: common_pb2.MatchRequest, *, timeout_s: float) -> common_pb2.MatchReply:
        reply, _ = await self._channel.call(WORKER_LOCAL["Match"], request, timeout_s=timeout_s)
        assert isinstance(reply, common_pb2.MatchReply)
        return reply

    async def call(self, method: Method, request: Message, *, timeout_s: float) -> Any:
        """A call that passes no memory."""
        reply, _ = await self._channel.call(method, request, timeout_s=timeout_s)
        return reply

    async def open(
        self, request: worker_pb2.OpenRequest, *, timeout_s: float, meanwhile: Meanwhile | None = None
    ) -> worker_pb2.OpenReply:
        """Blocks held until `release`. New segments are mapped and known to `mapped` when this returns. `meanwhile` is
        called when the request has left.

        Holds that were given back before end first: they may have to make room for what is opened now.
        """
        if self._holds and self._takes_releases:
            request.release.extend(self._holds[:HOLDS_A_MESSAGE])
            del self._holds[:HOLDS_A_MESSAGE]
        elif self._releasing is not None:
            await asyncio.wait([self._releasing])
        request.rows = self.sends_rows
        reply, passed = await self._channel.call(
            WORKER_LOCAL["Open"], request, timeout_s=timeout_s, meanwhile=meanwhile
        )
        assert isinstance(reply, worker_pb2.OpenReply)
        self._keep_all(reply, passed)
        if len(passed) != len(reply.segments):
            await self.close()
            raise Corrupt("the worker named other segments than it passed: its connection is closed")
        return reply

    def _late(self, method: Method, reply: Any, passed: list[MappedSegment]) -> None:
        """An answer that nobody waits for any more: what came with it is the connection's all the same."""
        if isinstance(reply, worker_pb2.OpenReply):
            self._keep_all(reply, passed)
            self.release(reply.hold)
        elif isinstance(reply, worker_pb2.StageReply) and passed and self._staging is None:
            self._staging = Staging(reply.segment.segment, passed[0], min(reply.segment.bytes, len(passed[0].view)))

    def _keep_all(self, reply: worker_pb2.OpenReply, passed: list[MappedSegment]) -> None:
        for info, segment in zip(reply.segments, passed, strict=False):
            self._keep(info, segment)

    def _keep(self, info: worker_pb2.SegmentInfo, segment: MappedSegment) -> None:
        nbytes = min(info.bytes, len(segment.view))
        if table_bytes(nbytes - info.data_offset) <= info.data_offset <= nbytes:  # else its blocks will be misses
            self._segments[info.segment] = Mapped(segment, segment.view[:nbytes], info.data_offset)
            self._table = None

    def mapped(self, segment: int) -> Mapped | None:
        return self._segments.get(segment)

    def table(self) -> Table:
        """All segments that are mapped now."""
        if self._table is None:
            shift = UNIT_BYTES.bit_length() - 1
            rows = [(id, address_of(m.view), len(m.view), m.data_offset, shift) for id, m in self._segments.items()]
            self._table = Table(np.array(rows, np.uint64).reshape(-1, 5), [m.view for m in self._segments.values()])
        return self._table

    def release(self, hold: int) -> None:
        """Give a hold back, soon and together with others. What can't be released expires at the worker."""
        self._holds.append(hold)
        if self._releasing is None and not self.broken:
            self._releasing = asyncio.ensure_future(self._release_all())

    async def _release_all(self) -> None:
        try:
            while self._holds:
                batch, self._holds = self._holds[:HOLDS_A_MESSAGE], self._holds[HOLDS_A_MESSAGE:]
                request = worker_pb2.ReleaseRequest(holds=batch)
                await self._channel.call(WORKER_LOCAL["Release"], request, timeout_s=RELEASE_TIMEOUT_S)
        except ServiceError:
            self._holds.clear()  # they end with the connection, or expire
        finally:
            self._releasing = None

    async def staging(self, nbytes: int, *, timeout_s: float) -> Staging:
        """The staging segment, made on first use. Overloaded where the worker has no room for one."""
        async with self._staging_turn:
            if self._staging is None:
                request = worker_pb2.StageRequest(bytes=nbytes)
                reply, passed = await self._channel.call(WORKER_LOCAL["Stage"], request, timeout_s=timeout_s)
                if len(passed) != 1 or len(passed[0].view) < reply.segment.bytes:
                    raise Overloaded("the worker passed no staging segment")
                self._staging = Staging(reply.segment.segment, passed[0], reply.segment.bytes)
            return self._staging

    @asynccontextmanager
    async def space(self, staging: Staging, nbytes: int) -> AsyncIterator[Space]:
        """A part of staging for one commit. Unless the worker answered it may still be reading there: the connection
        ends then, and with it the staging segment."""
        space = await staging.take(nbytes)
        try:
            yield space
        except (Unavailable, DeadlineExceeded):
            await self.close()
            raise
        except ServiceError:
            staging.give_back(space)  # the worker answered: it reads there no longer
            raise
        except BaseException:
            await self.close()
            raise
        staging.give_back(space)

    async def commit(self, request: worker_pb2.CommitRequest, *, timeout_s: float) -> worker_pb2.PutReply:
        if self.broken:
            raise Unavailable("the connection to the worker is closed")
        reply, _ = await self._channel.call(WORKER_LOCAL["Commit"], request, timeout_s=timeout_s)
        assert isinstance(reply, worker_pb2.PutReply)
        return reply

    async def close(self) -> None:
        """End the connection; the worker frees holds and staging. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._releasing is not None:
            self._releasing.cancel()
            await asyncio.wait([self._releasing])
        await self._channel.close()
        segments, self._segments, self._table = self._segments, {}, None
        for mapped in segments.values():
            mapped.segment.close()  # what is being copied keeps its memory until it is done
        if self._staging is not None:
            self._staging.close()
