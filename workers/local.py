"""The service `WorkerLocal`: processes of this host open blocks in shared memory and commit from their own staging."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.errors import BadRequest, KVStoreError, Overloaded
from kvstore.open_rows import FOUND, LATER, absent
from kvstore.spec import ModelSpec
from kvstore.store.arena import ArenaSegment
from kvstore.store.holds import Hold
from kvstore.store.opening import Begun
from kvstore.store.putting import Offer
from kvstore.store.staging import StagingSegment
from kvstore.transport.base import CallContext, Connection
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import digest_from_wire, least_from_wire, wanted_from_wire
from workers.node import Answer, Node
from workers.pinning import PinCalls
from workers.prefetching import Prefetching

HOLDS_MAX = 4096
"""Of one connection at a time."""

PEER = "peer"


@dataclass(slots=True)
class Peer:
    """What belongs to one connection and ends with it."""

    holds: dict[int, None] = field(default_factory=dict)
    segments: dict[int, None] = field(default_factory=dict)  # passed: the peer has them mapped
    staging: StagingSegment | None = None
    asked_for_staging: bool = False  # it is being made, or is there


class LocalService(PinCalls):
    """One function per call of `WorkerLocal`: a coroutine where it may have to wait."""

    def __init__(self, node: Node, prefetching: Prefetching) -> None:
        super().__init__(node)
        self.prefetch = prefetching.prefetch

    def _peer(self, context: CallContext) -> Peer:
        connection = context.connection
        if connection is None:
            raise BadRequest("WorkerLocal is served on the local socket only")
        peer: Peer | None = connection.state.get(PEER)
        if peer is None:
            peer = connection.state[PEER] = Peer()
            self._bind(connection, peer)
        return peer

    def _bind(self, connection: Connection, peer: Peer) -> None:
        store = self._node.store

        def end() -> None:
            for hold in peer.holds:
                store.release(hold)
            for segment in peer.segments:
                store.arena.unshare(segment)
            if peer.staging is not None:
                store.staging.close(peer.staging.id)

        connection.on_close.append(end)

    async def hello(self, request: worker_pb2.LocalHelloRequest, context: CallContext) -> common_pb2.HelloReply:
        return self._node.hello(request.hello)

    def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        return self._node.match(request, context.namespace)

    def open(
        self, request: worker_pb2.OpenRequest, context: CallContext
    ) -> worker_pb2.OpenReply | Coroutine[Any, Any, worker_pb2.OpenReply]:
        """Where the blocks lie; they stay there until the hold ends. Segments are passed once per connection. At once,
        if nothing has to be loaded; the holds that are given back end afterwards then."""
        try:
            return self._open(request, context)
        except KVStoreError:
            self._end_holds(self._peer(context), request.release)
            raise

    def _open(
        self, request: worker_pb2.OpenRequest, context: CallContext
    ) -> worker_pb2.OpenReply | Coroutine[Any, Any, worker_pb2.OpenReply]:
        node, peer = self._node, self._peer(context)
        begin = node.system.clock.monotonic()
        root = digest_from_wire("root", request.root)
        wanted = wanted_from_wire(request.blocks, node.config.worker.keys_max)
        least = least_from_wire(request.least)
        node.asked_bytes(root, wanted)
        if len(peer.holds) >= HOLDS_MAX:
            self._end_holds(peer, request.release)
        if len(peer.holds) >= HOLDS_MAX:
            raise Overloaded(f"{HOLDS_MAX} holds on one connection: release some")
        begun = node.store.opening.begin(context.namespace, root, node.now(root, wanted), least, redis=request.redis)
        peer.holds[begun.hold.id] = None

        def served() -> None:
            self._end_holds(peer, request.release)
            node.store.opening.served(begun)
            node.gets.add(node.system.clock.monotonic() - begin)

        context.after(served)
        if begun.away:
            self._end_holds(peer, request.release)  # they may have to make room
            return self._open_later(begun, request, len(wanted), context)
        return self._opened(begun.hold, request, len(wanted), context)

    async def _open_later(
        self, begun: Begun, request: worker_pb2.OpenRequest, count: int, context: CallContext
    ) -> worker_pb2.OpenReply:
        """DeadlineExceeded when loading takes longer than the request allows."""
        timeout_s = request.deadline_ms / 1000 if request.deadline_ms else None
        try:
            await self._node.finish(begun, timeout_s)
        finally:
            if not self._node.store.opening.holds.alive(begun.hold.id):
                self._peer(context).holds.pop(begun.hold.id, None)
        return self._opened(begun.hold, request, count, context)

    def _opened(
        self, hold: Hold, request: worker_pb2.OpenRequest, count: int, context: CallContext
    ) -> worker_pb2.OpenReply:
        """`count`: of the blocks that were asked for; what is not opened now is to be asked for later."""
        reply, peer = worker_pb2.OpenReply(hold=hold.id), self._peer(context)
        for segment in hold.segments.values():
            self._share(segment, peer, reply, context)
        rows = hold.rows
        if count > len(rows):
            rows = np.concatenate([rows, absent(count - len(rows), LATER)])
        if request.rows:
            reply.rows = rows.tobytes()
        else:
            reply.blocks.extend(map(_message, rows))
        return reply

    def _share(self, segment: ArenaSegment, peer: Peer, reply: worker_pb2.OpenReply, context: CallContext) -> None:
        """Pass a segment unless the peer has it."""
        if segment.id in peer.segments:
            return
        peer.segments[segment.id] = None
        self._node.store.arena.share(segment.id)
        context.attach(segment.segment, writable=False)
        reply.segments.append(
            worker_pb2.SegmentInfo(
                segment=segment.id, bytes=segment.segment.nbytes, data_offset=segment.data_offset, writable=False
            )
        )

    def release(self, request: worker_pb2.ReleaseRequest, context: CallContext) -> worker_pb2.ReleaseReply:
        """Idempotent; only the connection's own holds."""
        self._end_holds(self._peer(context), request.holds)
        return worker_pb2.ReleaseReply()

    def _end_holds(self, peer: Peer, holds: Iterable[int]) -> None:
        for hold in holds:
            if hold in peer.holds:
                del peer.holds[hold]
                self._node.store.release(hold)

    async def stage(self, request: worker_pb2.StageRequest, context: CallContext) -> worker_pb2.StageReply:
        """The connection's staging segment; one for its life. Overloaded when there is no room for it."""
        node, peer = self._node, self._peer(context)
        if peer.asked_for_staging:
            raise BadRequest("this connection has a staging segment: use it again, or open another connection")
        if request.bytes < 1:
            raise BadRequest("a staging segment of 0 bytes")
        peer.asked_for_staging = True
        try:
            nbytes = min(request.bytes, node.config.store.staging_bytes)
            nbytes = min(nbytes, node.store.quotas(context.namespace).staging_bytes or nbytes)
            staging = await node.store.staging.open_apart(node.system.pool, nbytes, context.namespace)
        except BaseException:
            peer.asked_for_staging = False
            raise
        peer.staging = staging
        context.attach(staging.segment, writable=True)
        info = worker_pb2.SegmentInfo(segment=staging.id, bytes=staging.nbytes, data_offset=0, writable=True)
        return worker_pb2.StageReply(segment=info)

    async def commit(self, request: worker_pb2.CommitRequest, context: CallContext) -> worker_pb2.PutReply:
        """Copy blocks out of staging: what the peer writes there afterwards changes nothing. BadRequest."""
        node, peer = self._node, self._peer(context)
        staging = peer.staging
        if staging is None or request.segment != staging.id:
            raise BadRequest(f"segment {request.segment} is not this connection's staging: call Stage first")
        if len(request.blocks) > node.config.worker.keys_max:
            raise BadRequest(f"{len(request.blocks)} blocks in one Commit: at most {node.config.worker.keys_max}")
        spec = ModelSpec.from_json(request.spec_json)
        described = node.put_blocks(context.namespace, spec, request.blocks)
        view, nbytes, offered = staging.segment.view, staging.nbytes, list[Offer]()
        for message, (shard, header) in zip(request.blocks, described, strict=True):
            begin = message.offset
            end = begin + header.raw_length
            if end > nbytes:
                raise BadRequest(f"a block at {begin} ends outside the staging segment of {nbytes} bytes")
            offered.append((shard, header, view[begin:end]))
        answer = Answer(node)
        await answer.take(context.namespace, spec, offered)
        return answer.message()


def _message(row: Any) -> worker_pb2.OpenBlock:
    """One of OPEN_ROWS, for a client that does not read rows."""
    state = int(row["state"])
    if state != FOUND:
        return worker_pb2.OpenBlock(state=state)  # type: ignore[arg-type]
    return worker_pb2.OpenBlock(
        state=state,  # type: ignore[arg-type]
        tier=int(row["tier"]),  # type: ignore[arg-type]
        segment=int(row["segment"]),
        offset=int(row["offset"]),
        length=int(row["length"]),
        generation=int(row["generation"]),
        raw=bool(row["raw"]),
        header=row["header"].tobytes(),
    )
