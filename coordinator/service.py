"""The gRPC service `Coordinator`: lookups, members, status, announcements."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from coordinator.peers import Peers
from coordinator.registry import Registry
from coordinator.scoring import CANDIDATES_MAX, Scoring
from coordinator.session import Session
from kvstore.client.plan import ENGINE_HOLDER
from kvstore.config import CoordinatorConfig
from kvstore.errors import BadRequest, Incompatible, Overloaded
from kvstore.histogram import Histogram
from kvstore.seams import System
from kvstore.spec import Shard
from kvstore.transport.base import CallContext
from kvstore.transport.methods import CAPABILITIES, PROTOCOL_VERSION
from kvstore.types import CommitToken, Fidelity, Keys
from kvstore.views import sums, visible_status
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import (
    AFTER_MAX,
    SHARDS_MAX,
    digest_from_wire,
    keys_from_wire,
    latency_to_wire,
    least_from_wire,
    match_to_wire,
    member_to_wire,
    shard_from_wire,
    token_from_wire,
    token_to_wire,
)


class CoordinatorService:
    """One coroutine per call of the proto; `context.namespace` is granted already."""

    def __init__(
        self,
        config: CoordinatorConfig,
        system: System,
        registry: Registry,
        engines: Registry,
        *,
        peers: Peers,
        namespaces_digest: str,
    ) -> None:
        self._config, self._system, self._registry, self._engines = config, system, registry, engines
        self._scoring = Scoring(registry, engines)
        self._matches = Histogram()
        self.info = peers.me  # the address is set once it is known
        self._peers, self._digest = peers, namespaces_digest

    def coordinators(self, now: float | None = None) -> list[common_pb2.CoordinatorInfo]:
        """This one, then the others that live."""
        return self._peers.listed(self._system.clock.monotonic() if now is None else now)

    async def hello(self, request: common_pb2.HelloRequest, context: CallContext) -> common_pb2.HelloReply:
        """Incompatible for another protocol."""
        if request.protocol != PROTOCOL_VERSION:
            raise Incompatible(f"protocol {request.protocol} is not spoken here: use a build with {PROTOCOL_VERSION}")
        if request.HasField("coordinator") and context.role == "node":
            self._peers.heard(request.coordinator, self._system.clock.monotonic())
        return common_pb2.HelloReply(
            protocol=PROTOCOL_VERSION,
            capabilities=CAPABILITIES,
            software="kvstore",
            namespaces_digest=self._digest,
            id=self.info.id,
            boot_id=self.info.boot_id,
            host=self._system.host,
            coordinators=self.coordinators(),
            incomplete=not self._registry.complete(context.namespace, self._system.clock.monotonic()),
        )

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        """The longest prefix held, once the commits in `after` are in or the wait is over. BadRequest."""
        begin = self._system.clock.monotonic()
        root, keys, shards, least = self._asked(request)
        missing = await self._wait(request, context.namespace)
        now = self._system.clock.monotonic()
        directory = self._registry.inboxes[context.namespace].directory
        found = directory.match(root, keys, shards, least)
        if found.blocks and (spec := directory.spec(root)) is not None:
            held = keys if found.blocks == len(keys) else keys[: found.blocks]
            self._registry.repair.asked(context.namespace, held, spec.group_blocks)
        reply = match_to_wire(found, lambda holder: self._registry.member_on_wire(holder, now))
        reply.not_applied.extend(token_to_wire(token) for token in missing)
        reply.complete = self._registry.complete(context.namespace, now)
        reply.boot_id = self.info.boot_id
        reply.coordinators.extend(self.coordinators(now))
        self._registry.counters["matches"] += 1
        self._registry.counters["matched_blocks"] += found.blocks
        self._matches.add(self._system.clock.monotonic() - begin)
        return reply

    def _asked(
        self, request: common_pb2.MatchRequest | coordinator_pb2.ScoreRequest
    ) -> tuple[bytes, Keys, list[Shard], Fidelity]:
        root = digest_from_wire("root", request.root)
        keys = keys_from_wire(request.keys, self._config.match_keys_max)
        if not 1 <= len(request.shards) <= SHARDS_MAX:
            raise BadRequest(f"{len(request.shards)} shards: name 1 to {SHARDS_MAX}")
        return root, keys, [shard_from_wire(shard) for shard in request.shards], least_from_wire(request.least)

    async def score(self, request: coordinator_pb2.ScoreRequest, context: CallContext) -> coordinator_pb2.ScoreReply:
        """How much of a prompt each candidate holds. BadRequest."""
        now, namespace = self._system.clock.monotonic(), context.namespace
        candidates = list(request.candidates) or self._scoring.candidates(namespace, now)[:CANDIDATES_MAX]
        reply = self._scoring.score(namespace, *self._asked(request), candidates, now)
        reply.complete = self._registry.complete(namespace, now)
        reply.boot_id = self.info.boot_id
        reply.coordinators.extend(self.coordinators(now))
        self._registry.counters["scores"] += 1
        return reply

    async def _wait(self, request: common_pb2.MatchRequest, namespace: str) -> list[CommitToken]:
        """The commits of `after` that are not applied when the wait is over."""
        if len(request.after) > AFTER_MAX:
            raise BadRequest(f"{len(request.after)} commits to wait for: at most {AFTER_MAX}")
        if not request.after:
            return []
        tokens = [token_from_wire(token) for token in request.after]
        wait_s = min(request.wait_ms / 1000, self._config.match_wait_max_s)
        try:
            async with asyncio.timeout(wait_s):
                while tokens := [token for token in tokens if not self._registry.applied(namespace, token)]:
                    await self._registry.progress(namespace)
        except TimeoutError:
            return [token for token in tokens if not self._registry.applied(namespace, token)]
        return []

    async def members(
        self, request: coordinator_pb2.MembersRequest, context: CallContext
    ) -> coordinator_pb2.MembersReply:
        members = self._registry.members(context.namespace, self._system.clock.monotonic())
        return coordinator_pb2.MembersReply(
            members=map(member_to_wire, members), coordinators=self.coordinators(), boot_id=self.info.boot_id
        )

    async def status(
        self, request: common_pb2.StatusRequest, context: CallContext
    ) -> coordinator_pb2.CoordinatorStatus:
        """What heartbeats said; of other namespaces a client sees nothing."""
        return self.current(context)

    def whole_status(self) -> coordinator_pb2.CoordinatorStatus:
        """What an operator sees. Pure."""
        namespace = next(iter(self._registry.inboxes))
        return self.current(CallContext(identity="operator", role="node", namespace=namespace, peer=""))

    def current(self, context: CallContext) -> coordinator_pb2.CoordinatorStatus:
        """`status` of now. Pure."""
        now = self._system.clock.monotonic()
        whole = context.role == "node"
        workers = []
        for member in self._registry.members(context.namespace, now):
            known = self._registry.statuses.get(member.id, common_pb2.WorkerStatus())
            status = visible_status(known, context)
            status.member.CopyFrom(member_to_wire(member))
            workers.append(status)
        reply = coordinator_pb2.CoordinatorStatus(
            workers=workers,
            directory_blocks=self._registry.blocks(self._registry.inboxes if whole else [context.namespace]),
            complete=self._registry.complete(context.namespace, now),
            counters={**self._registry.counters, **self._registry.repair.counters} if whole else {},
            pid=os.getpid(),
            latencies=[latency_to_wire("match", self._matches)] if whole else (),
            lag=self._registry.lag() if whole else 0,
        )
        reply.self.CopyFrom(self.info)
        reply.namespaces.extend(sums(workers))
        return reply

    async def watch(
        self, request: coordinator_pb2.WatchRequest, context: CallContext
    ) -> AsyncGenerator[coordinator_pb2.WatchReply, None]:
        """What there is, then every change, until the watcher goes, is too slow, or the namespace is too large."""
        namespace, registry = context.namespace, self._registry
        inbox = registry.inboxes[namespace]
        bound = min(self._config.watch_entries_max, request.entries_max or self._config.watch_entries_max)
        with registry.watchers.one(namespace, inbox.directory) as watcher:
            for member in registry.members(namespace, self._system.clock.monotonic()):
                watcher.member(member)
            for receiver in inbox.receivers():
                self._bounded(inbox.directory.blocks, bound)
                if (receiver.holder, receiver.epoch) not in watcher.begun and not receiver.closed:
                    watcher.snapshot(receiver)
                for reply in watcher.take():  # one holder at a time is in memory
                    yield reply
            registry.counters["watches"] += 1
            while True:
                for reply in watcher.take():
                    yield reply
                self._bounded(inbox.directory.blocks, bound)
                yield self._watch_state(namespace)
                await watcher.woken(self._config.heartbeat_s)

    def _bounded(self, entries: int, bound: int) -> None:
        if entries > bound:
            raise Overloaded(f"the namespace has {entries} entries, a watch at most {bound}: use Match")

    def _watch_state(self, namespace: str) -> coordinator_pb2.WatchReply:
        complete = self._registry.complete(namespace, self._system.clock.monotonic())
        state = coordinator_pb2.WatchState(
            complete=complete, boot_id=self.info.boot_id, coordinators=self.coordinators()
        )
        return coordinator_pb2.WatchReply(state=state)

    async def announce(
        self, requests: AsyncIterator[coordinator_pb2.AnnounceRequest], context: CallContext
    ) -> AsyncGenerator[coordinator_pb2.AnnounceReply, None]:
        """One member's stream, from Register to its end."""
        session: Session | None = None
        woken = asyncio.Event()
        heard = _heard(requests, woken, lambda: session is not None and session.waits)
        try:
            async for request in heard:
                if session is None and request is not None:
                    engine = request.register.member.id.startswith(ENGINE_HOLDER)
                    registry = self._engines if engine else self._registry
                    session = Session(registry, self._system.clock, self._config.lease_s, self._welcome, woken.set)
                assert session is not None
                for reply in session.turn() if request is None else session.handle(request):
                    reply.coordinators.extend(self.coordinators())
                    yield reply
                if session.over:
                    return
        finally:
            if session is not None:
                session.close()
            await heard.aclose()

    def _welcome(self) -> coordinator_pb2.Welcome:
        welcome = coordinator_pb2.Welcome(
            heartbeat_ms=int(self._config.heartbeat_s * 1000), lease_ms=int(self._config.lease_s * 1000)
        )
        welcome.self.CopyFrom(self.info)
        return welcome


async def _heard(
    requests: AsyncIterator[coordinator_pb2.AnnounceRequest], woken: asyncio.Event, waits: Callable[[], bool]
) -> AsyncGenerator[coordinator_pb2.AnnounceRequest | None, None]:
    """The requests, and None where `woken` is set while its stream `waits` for a turn."""
    next_one: asyncio.Task[coordinator_pb2.AnnounceRequest | None] | None = None
    try:
        while True:
            if next_one is None and not waits():  # mostly: no task, no event
                request = await anext(requests, None)
            else:
                next_one = next_one or asyncio.ensure_future(_next(requests))
                turn = asyncio.ensure_future(woken.wait())
                try:
                    await asyncio.wait((next_one, turn), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    turn.cancel()
                if woken.is_set():
                    woken.clear()
                    yield None
                    continue
                request, next_one = next_one.result(), None
            if request is None:
                return
            yield request
    finally:
        if next_one is not None:
            next_one.add_done_callback(_seen)
            next_one.cancel()


async def _next(requests: AsyncIterator[coordinator_pb2.AnnounceRequest]) -> coordinator_pb2.AnnounceRequest | None:
    return await anext(requests, None)


def _seen(task: asyncio.Task[Any]) -> None:
    """The stream is over: how its last read ended is nobody's business."""
    if not task.cancelled():
        task.exception()
