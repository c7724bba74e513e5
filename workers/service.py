"""The gRPC service `Worker`: what other hosts, and people, ask of a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager

from google.protobuf.message import DecodeError

from kvstore.config import KIB
from kvstore.errors import BadRequest, Corrupt, DeadlineExceeded, Overloaded, TierDown, Unavailable
from kvstore.spec import ModelSpec
from kvstore.store.purges import Scope
from kvstore.transport import frames
from kvstore.transport.base import CallContext
from kvstore.types import pack_keys
from kvstore.views import visible_status
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import digest_from_wire, keys_from_wire, least_from_wire, shard_from_wire, wanted_from_wire
from workers.draining import Draining
from workers.incoming import PutBlocks
from workers.inspecting import inspected_to_wire
from workers.node import Node
from workers.outgoing import Outgoing
from workers.pinning import PinCalls
from workers.prefetching import Prefetching
from workers.puller import Job, Puller, members_of
from workers.tickets import TICKET_S, Tickets

FRAME_SLACK_BYTES = 256 * KIB
"""Of a message's bound, what its header may take."""


class WorkerService(PinCalls):
    """One coroutine per call of the proto; `context.namespace` is granted already."""

    def __init__(
        self, node: Node, puller: Puller, draining: Draining, prefetching: Prefetching, tickets: Tickets
    ) -> None:
        super().__init__(node)
        self.node, self._tickets = node, tickets
        self._puller, self._draining = puller, draining
        self.prefetch = prefetching.prefetch

    async def hello(self, request: common_pb2.HelloRequest, context: CallContext) -> common_pb2.HelloReply:
        return self.node.hello(request)

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        return self.node.match(request, context.namespace)

    async def status(self, request: common_pb2.StatusRequest, context: CallContext) -> common_pb2.WorkerStatus:
        return visible_status(self.node.status(), context)

    async def purge(self, request: worker_pb2.PurgeRequest, context: CallContext) -> worker_pb2.PurgeReply:
        """Forget a model's blocks, or all of the caller's namespace; those in Redis too. BadRequest."""
        scope = Scope(digest_from_wire("root", request.root) if request.root else b"", request.model, request.revision)
        roots: list[bytes | None] = [scope.root or None]
        if scope.model or scope.revision:
            if scope.root or not scope.model:
                raise BadRequest("a purge names a root, or a model, or a model and its revision")
            roots = [spec.root for spec in self.node.catalog.specs() if scope.covers(spec.root, spec)]
        blocks, store = 0, self.node.store
        if request.purge:
            store.stack.purges.add(context.namespace, scope, digest_from_wire("purge", request.purge))
        for one in roots:
            blocks += store.purge(context.namespace, one)
        for one in roots:
            blocks += await store.purge_shared(context.namespace, one)
        return worker_pb2.PurgeReply(blocks=blocks)

    async def probe(self, request: worker_pb2.ProbeRequest, context: CallContext) -> worker_pb2.ProbeReply:
        """Write a block through every tier and read it back."""
        outcomes = await self.node.store.probe(context.namespace)
        results = [
            worker_pb2.ProbeResult(
                tier=int(outcome.tier),  # type: ignore[arg-type]
                ok=outcome.ok,
                detail=outcome.detail,
                fix=outcome.fix,
            )
            for outcome in outcomes
        ]
        return worker_pb2.ProbeReply(results=results)

    async def inspect(self, request: worker_pb2.InspectRequest, context: CallContext) -> worker_pb2.InspectReply:
        """Every copy of a block of the caller's namespace. BadRequest; Unavailable when Redis can't be asked."""
        key = digest_from_wire("key", request.key)
        try:
            found = await self.node.store.inspect(context.namespace, key, redis=request.redis)
        except TierDown as error:
            raise Unavailable(str(error)) from None
        return worker_pb2.InspectReply(blocks=map(inspected_to_wire, found))

    async def pull(self, request: worker_pb2.PullRequest, context: CallContext) -> worker_pb2.PullReply:
        """Copy blocks of one group from another worker. BadRequest; Overloaded where this one leaves too."""
        if self.node.draining:
            raise Overloaded("this worker drains: ask another one")
        spec, shard = ModelSpec.from_json(request.spec_json), shard_from_wire(request.shard)
        shard.check(spec)
        keys = keys_from_wire(request.keys, self.node.config.worker.keys_max)
        group = digest_from_wire("group", request.group)
        job = Job(context.namespace, spec, shard, group, tuple(keys), members_of([request.source]))
        tally = await self._puller.pull(job)
        return worker_pb2.PullReply(
            committed=tally.committed,
            held=tally.held,
            dropped=tally.dropped,
            missing=tally.missing,
            left=pack_keys(tally.left),
        )

    async def data(self, request: worker_pb2.DataRequest, context: CallContext) -> worker_pb2.DataReply:
        """A ticket for a raw connection, where those are served."""
        port = self.node.data_port
        if not port:
            return worker_pb2.DataReply()
        return worker_pb2.DataReply(port=port, ticket=self._tickets.give(context), ttl_ms=int(TICKET_S * 1000))

    async def drain(self, request: worker_pb2.DrainRequest, context: CallContext) -> worker_pb2.DrainReply:
        """Begin to leave, or say how far that is."""
        self._draining.begin(request.timeout_ms / 1000 or self.node.config.worker.drain_s)
        return self._draining.progress()

    # --- get -------------------------------------------------------------------------------------------------------

    async def get(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncGenerator[bytes, None]:
        """What there is of the blocks, then their chunks. BadRequest, Overloaded, DeadlineExceeded."""
        async with self.outgoing(request, context) as outgoing, aclosing(self._stream(outgoing)) as stream:
            async for frame in stream:
                yield frame

    @asynccontextmanager
    async def outgoing(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncIterator[Outgoing]:
        """The blocks of a Get, held for the time of the block. BadRequest, Overloaded, DeadlineExceeded."""
        node = self.node
        begin = node.system.clock.monotonic()
        root = digest_from_wire("root", request.root)
        wanted = wanted_from_wire(request.blocks, node.config.worker.keys_max)
        least = least_from_wire(request.least)
        if request.layer_count == 0 and request.layer_first:
            raise BadRequest("layer_first without layer_count: give both, or neither for all layers")
        if len(request.resume) > len(wanted):
            raise BadRequest(f"{len(request.resume)} blocks to go on with, and {len(wanted)} asked for")
        asked = node.asked_bytes(root, wanted)
        if not node.store.spend(context.namespace, asked):
            raise Overloaded("more bytes a second than the namespace's rate_bytes: later, or less")
        async with node.sending.hold(asked, context.namespace, node.left(context.deadline)):
            now = node.now(root, wanted)
            # Asked before anything is opened: what is then found of a purged model came after the purge.
            purges = node.store.stack.purges.known(context.namespace) if request.purges else []
            hold = await node.open(
                context.namespace, root, now, least, redis=request.redis, timeout_s=node.left(context.deadline)
            )
            layers = range(request.layer_first, request.layer_first + request.layer_count)
            outgoing = Outgoing(
                node.catalog.spec(root),
                wanted.shards,
                hold,
                later=len(wanted) - len(now),
                layers=layers or None,
                chunk_bytes_max=node.config.server.message_bytes_max - FRAME_SLACK_BYTES,
                planes=request.planes,
                by_block=request.by_block and not layers,
                purges=purges,
                resume={part.block: (part.copy_id, part.first_chunk) for part in request.resume},
            )
            try:
                yield outgoing
                node.gets.add(node.system.clock.monotonic() - begin)
            finally:
                node.store.release(hold.id)
                node.counters["blocks_lost_in_flight"] += len(outgoing.lost)

    async def _stream(self, outgoing: Outgoing) -> AsyncGenerator[bytes, None]:
        """Frames, the next one being made while one is sent."""
        pool = self.node.system.pool
        first, messages, ready = await pool.run(outgoing.start)
        ahead: asyncio.Task[bytes | None] | None = None
        try:
            yield first
            for parts in messages:
                ahead = asyncio.ensure_future(pool.run(outgoing.message, parts))
                if ready is not None:
                    yield ready
                ready = await asyncio.shield(ahead)
            if ready is not None:
                yield ready
        finally:
            if ahead is not None and not ahead.done():
                await asyncio.wait([ahead])  # it reads blocks that are held only until now

    # --- put -------------------------------------------------------------------------------------------------------

    async def put(self, requests: AsyncIterator[bytes], context: CallContext) -> worker_pb2.PutReply:
        """Blocks become visible one by one as they are whole. BadRequest, Overloaded, DeadlineExceeded."""
        timeout_s = self.node.left(context.deadline)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._put(requests, context.namespace)
        except TimeoutError:
            raise DeadlineExceeded("the blocks did not come in time") from None

    async def _put(self, requests: AsyncIterator[bytes], namespace: str) -> worker_pb2.PutReply:
        incoming: PutBlocks | None = None
        with ExitStack() as room:
            async for frame in requests:
                try:
                    packed, data = frames.decode(frame)
                    header = worker_pb2.PutHeader.FromString(packed or b"")
                except (Corrupt, DecodeError) as error:
                    raise BadRequest(f"a frame of the Put stream can't be read: {error}") from None
                if incoming is None:
                    incoming = PutBlocks(self.node, namespace, header)
                    room.enter_context(self.node.receiving.take(incoming.largest, namespace))
                elif header.blocks:
                    raise BadRequest("blocks are named in the first message of a Put stream only")
                await incoming.take(data)
            if incoming is None:
                raise BadRequest("a Put stream without a message")
            return incoming.reply()
