"""Having blocks in memory ahead of need: up from the slower tiers, from Redis, and from other workers, once for all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from kvstore.errors import BadRequest
from kvstore.spec import ModelSpec
from kvstore.transport.base import CallContext
from kvstore.types import Fidelity, Keys, pack_keys
from kvstore.wanted import Wanted
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import SHARDS_MAX, digest_from_wire, keys_from_wire, least_from_wire, shard_from_wire
from workers.node import Node
from workers.puller import Job, Puller, members_of

TIMEOUT_S = 30.0
"""Of a call that names no deadline."""


class Prefetching:
    """One per worker. `view`: members by id as coordinators name them; nobody else is asked for blocks."""

    def __init__(self, node: Node, puller: Puller, view: Callable[[], Mapping[str, common_pb2.Member]]) -> None:
        self._node, self._puller, self._view = node, puller, view

    async def prefetch(self, request: worker_pb2.PrefetchRequest, context: CallContext) -> worker_pb2.PrefetchReply:
        """What is ready when it ends, or when the time is over. BadRequest; Overloaded."""
        node, spec = self._node, ModelSpec.from_json(request.spec_json)
        if len(request.parts) > SHARDS_MAX:
            raise BadRequest(f"{len(request.parts)} parts in one Prefetch: at most {SHARDS_MAX}")
        least = least_from_wire(request.least)
        jobs, left = [], node.config.worker.keys_max
        for part in request.parts:
            jobs.append(self._job(context.namespace, spec, part, left))
            left -= len(jobs[-1].keys)
        timeout_s = request.deadline_ms / 1000 if request.deadline_ms else TIMEOUT_S
        if context.deadline is not None:
            timeout_s = min(timeout_s, node.left(context.deadline) or 0.0)
        reply = worker_pb2.PrefetchReply()
        end = node.system.clock.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                reply.pulled = await self._pull(jobs, least)
                left_s = max(0.001, end - node.system.clock.monotonic())
                reply.ready = await self._load(context.namespace, spec, jobs, least, request.redis, left_s)
        except TimeoutError:
            node.counters["prefetches_late"] += 1
        reply.missing = sum(len(job.keys) for job in jobs) - reply.ready
        node.counters["prefetched_blocks"] += reply.ready
        return reply

    def _job(self, namespace: str, spec: ModelSpec, part: worker_pb2.PrefetchPart, keys_max: int) -> Job:
        shard = shard_from_wire(part.shard)
        shard.check(spec)
        view = self._view()
        sources = members_of(view[id] for id in part.holders if id in view)
        keys = tuple(keys_from_wire(part.keys, keys_max))
        return Job(namespace, spec, shard, digest_from_wire("group", part.group), keys, sources)

    async def _pull(self, jobs: Sequence[Job], least: Fidelity) -> int:
        """Blocks that other workers gave."""
        if self._node.draining:
            return 0
        wanted = [job for job in jobs if job.sources and not self._holds(job, least)]
        tallies = await asyncio.gather(*(self._puller.pull(job) for job in wanted))
        return sum(tally.committed for tally in tallies)

    def _holds(self, job: Job, least: Fidelity) -> bool:
        return all(self._node.store.holds(job.namespace, job.shard.digest, key) for key in job.keys)

    async def _load(
        self, namespace: str, spec: ModelSpec, jobs: Sequence[Job], least: Fidelity, redis: bool, timeout_s: float
    ) -> int:
        """Blocks that lie in memory after those below were loaded: as many as one call may open."""
        groups = [(job.shard.digest, Keys(pack_keys(job.keys))) for job in jobs]
        now = self._node.now(spec.root, Wanted(groups, [(job.shard, len(job.keys)) for job in jobs]))
        hold = await self._node.open(namespace, spec.root, now, least, redis=redis, timeout_s=timeout_s)
        try:
            return sum(placed is not None for placed in hold.blocks)
        finally:
            self._node.store.release(hold.id)
