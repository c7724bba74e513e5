"""Prefetch as a client asks for it: blocks of a plan in memory near by, before somebody waits for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.client.links import Links
from kvstore.client.members import Members
from kvstore.client.needs import needed_depths
from kvstore.client.plan import HitPlan, PlanRun, is_redis
from kvstore.errors import DataError, ServiceError
from kvstore.spec import Shard
from kvstore.transport.methods import WORKER, WORKER_LOCAL
from kvstore.types import pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

HOLDERS_A_PART = 4

Wanted = dict[tuple[Shard, bytes], dict[int, list[str]]]
"""(stored shard, group) -> depth -> holders, the nearest first."""


def request_for(plan: HitPlan, wanted: Wanted, *, redis: bool, timeout_s: float) -> worker_pb2.PrefetchRequest:
    """The message that asks a worker for those blocks."""
    parts = []
    for (shard, group), depths in wanted.items():
        ordered = sorted(depths)
        holders = dict.fromkeys(id for depth in ordered for id in depths[depth] if not is_redis(id))
        keys = pack_keys([plan.keys[depth] for depth in ordered])
        parts.append(
            worker_pb2.PrefetchPart(
                shard=shard_to_wire(shard), group=group, keys=keys, holders=list(holders)[:HOLDERS_A_PART]
            )
        )
    return worker_pb2.PrefetchRequest(
        spec_json=plan.spec.canonical_json(),
        parts=parts,
        least=int(plan.least),  # type: ignore[arg-type]
        redis=redis,
        deadline_ms=max(1, int(timeout_s * 1000)),
    )


def group_of(plan: HitPlan, depth: int) -> bytes:
    """Id of the placement group that a block of the plan belongs to."""
    return plan.keys[depth - depth % plan.spec.group_blocks]


class Prefetcher:
    """Service trouble is counted: fewer blocks are ready."""

    def __init__(self, links: Links, members: Members, counters: Counter[str]) -> None:
        self._links, self._members, self._counters = links, members, counters

    async def prefetch(self, plan: HitPlan, *, first: int, timeout_s: float) -> int:
        """How many (stored shard, block) pairs are ready. Each at a worker of this host where there is one: it loads
        what it has, and pulls what others have; else where it is held."""
        ready = 0
        for (socket, address), wanted in self._places(plan, first).items():
            redis = any(is_redis(id) for depths in wanted.values() for ids in depths.values() for id in ids)
            request = request_for(plan, wanted, redis=redis, timeout_s=timeout_s)
            reply = await self._call(socket, address, request, timeout_s)
            ready += reply.ready if reply is not None else 0
        return ready

    def _places(self, plan: HitPlan, first: int) -> dict[tuple[str, str], Wanted]:
        """Who is asked for what: (socket, address) of a worker."""
        needed = {shard.group: needed_depths(plan, shard) for shard in plan.shards}
        holders: dict[tuple[Shard, int], list[PlanRun]] = {}
        for run in sorted(plan.runs, key=lambda run: int(run.tier)):
            for depth in range(max(first, run.first_depth), run.first_depth + run.count):
                if depth in needed.get(run.shard.group, ()):
                    holders.setdefault((run.shard, depth), []).append(run)
        places: dict[tuple[str, str], Wanted] = {}
        for (shard, depth), runs in holders.items():
            place = self._place(plan, runs)
            if place is not None:
                mine = places.setdefault(place, {}).setdefault((shard, group_of(plan, depth)), {})
                mine[depth] = [run.holder for run in runs]
        return places

    def _place(self, plan: HitPlan, runs: Sequence[PlanRun]) -> tuple[str, str] | None:
        known = [member for member in map(plan.holders.get, (run.holder for run in runs)) if member is not None]
        here = next((member.socket for member in known if self._members.here(member)), "")
        socket = here or next(iter(self._members.sockets(taking=True)), "")
        if socket:
            return socket, ""
        address = next((member.address for member in known if member.address), "")
        address = address or next(iter(self._members.takers().values()), "")  # Redis alone: any worker loads it
        return ("", address) if address else None

    async def _call(self, socket: str, address: str, request: worker_pb2.PrefetchRequest, timeout_s: float) -> Any:
        try:
            if socket:
                async with self._links.local.use(socket, timeout_s=timeout_s) as link:
                    return await link.call(WORKER_LOCAL["Prefetch"], request, timeout_s=timeout_s)
            async with self._links.remote.use(address, timeout_s=timeout_s) as channel:
                return await channel.unary(WORKER["Prefetch"], request, timeout_s=timeout_s)
        except (ServiceError, DataError) as error:
            self._counters[f"errors_{type(error).__name__}"] += 1
            return None


def wanted_of(plan: HitPlan, pieces: Iterable[tuple[Shard, int]], holders: Sequence[str]) -> Wanted:
    """Blocks that all have the same holders."""
    wanted: Wanted = {}
    for shard, depth in pieces:
        wanted.setdefault((shard, group_of(plan, depth)), {})[depth] = list(holders)
    return wanted
