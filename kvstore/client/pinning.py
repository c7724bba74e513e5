"""Pins as a client sees them: made from a plan in one process, of use to readers in others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.client.links import Links
from kvstore.client.members import Members
from kvstore.client.needs import needed_depths
from kvstore.client.plan import HitPlan, PlanRun, is_redis
from kvstore.errors import DataError, ServiceError
from kvstore.seams import System
from kvstore.spec import Shard
from kvstore.transport.methods import WORKER, WORKER_LOCAL
from kvstore.types import KEY_BYTES, pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

REDIS_EXTRA = 10
"""A block that lies in Redis is pinned there last: that loads it."""


@dataclass(frozen=True, slots=True)
class PinPart:
    """What one worker keeps."""

    worker: str
    epoch: int
    name: bytes  # 16 bytes, drawn by who made the pin
    socket: str  # how it was reached: a socket of this host, or an address
    address: str


@dataclass(frozen=True, slots=True)
class Pin:
    """Blocks kept where they are, until `unpin` or for `ttl_s`. Plain data; it grants nothing."""

    parts: tuple[PinPart, ...]
    blocks: int  # (shard, block) pairs that are kept
    ttl_s: float


class Pinner:
    """Makes and ends pins. Service trouble is counted: a pin of fewer blocks, at worst of none."""

    def __init__(self, system: System, links: Links, members: Members, counters: Counter[str]) -> None:
        self._system, self._links, self._members, self._counters = system, links, members, counters

    async def pin(self, plan: HitPlan, *, first: int, ttl_s: float, timeout_s: float) -> Pin:
        """Every block from depth `first` on at the nearest holder that names it."""
        parts, blocks = [], 0
        for holder, wanted in self._chosen(plan, first).items():
            part, count = await self._pin_at(holder, wanted, plan, ttl_s, timeout_s)
            if part is not None:
                parts.append(part)
                blocks += count
        return Pin(tuple(parts), blocks, ttl_s)

    def _chosen(self, plan: HitPlan, first: int) -> dict[str, dict[Shard, list[int]]]:
        """Depths to pin, by holder and stored shard."""
        groups = {shard.group: needed_depths(plan, shard) for shard in plan.shards}
        taken: dict[tuple[Shard, int], None] = {}
        chosen: dict[str, dict[Shard, list[int]]] = {}
        for run in sorted(plan.runs, key=self._distance):
            for depth in range(max(first, run.first_depth), run.first_depth + run.count):
                if depth in groups.get(run.shard.group, ()) and (run.shard, depth) not in taken:
                    taken[run.shard, depth] = None
                    chosen.setdefault(run.holder, {}).setdefault(run.shard, []).append(depth)
        return chosen

    def _distance(self, run: PlanRun) -> int:
        return int(run.tier) + (REDIS_EXTRA if is_redis(run.holder) else 0)

    async def _pin_at(
        self, holder: str, wanted: dict[Shard, list[int]], plan: HitPlan, ttl_s: float, timeout_s: float
    ) -> tuple[PinPart | None, int]:
        redis = is_redis(holder)
        member = next(iter(self._members.all()), None) if redis else plan.holders.get(holder)
        if member is None:
            return None, 0
        socket = member.socket if self._members.here(member) else ""
        part = PinPart(member.id, 0, self._system.rng.randbytes(KEY_BYTES), socket, member.address)
        request = worker_pb2.PinRequest(
            pin=part.name,
            root=plan.spec.root,
            least=int(plan.least),  # type: ignore[arg-type]
            ttl_ms=max(1, int(ttl_s * 1000)),
            redis=redis,
            deadline_ms=max(1, int(timeout_s * 1000)),
            blocks=[
                worker_pb2.ShardKeys(shard=shard_to_wire(shard), keys=pack_keys([plan.keys[d] for d in depths]))
                for shard, depths in wanted.items()
            ],
        )
        reply = await self._call(part, "Pin", request, timeout_s)
        if reply is None:
            return part, 0  # it may have arrived: to be ended like any other
        count = sum(state == worker_pb2.BLOCK_FOUND for state in reply.states)
        return PinPart(part.worker, reply.epoch, part.name, part.socket, part.address), count

    async def renew(self, pin: Pin, *, ttl_s: float, timeout_s: float) -> bool:
        """Whether every part was still there."""
        known = True
        for part in pin.parts:
            request = worker_pb2.RenewRequest(pins=[part.name], ttl_ms=max(1, int(ttl_s * 1000)))
            reply = await self._call(part, "Renew", request, timeout_s)
            known = known and reply is not None and list(reply.known) == [True]
        return known

    async def unpin(self, pins: Sequence[Pin], *, timeout_s: float) -> None:
        """Idempotent. What can't be reached ends by age."""
        names: dict[tuple[str, str], list[PinPart]] = {}
        for pin in pins:
            for part in pin.parts:
                names.setdefault((part.socket, part.address), []).append(part)
        for parts in names.values():
            await self._call(parts[0], "Unpin", worker_pb2.UnpinRequest(pins=[p.name for p in parts]), timeout_s)

    async def _call(self, part: PinPart, name: str, request: Any, timeout_s: float) -> Any:
        try:
            if part.socket:
                async with self._links.local.use(part.socket) as link:
                    return await link.call(WORKER_LOCAL[name], request, timeout_s=timeout_s)
            async with self._links.remote.use(part.address) as channel:
                return await channel.unary(WORKER[name], request, timeout_s=timeout_s)
        except (ServiceError, DataError) as error:
            self._counters[f"errors_{type(error).__name__}"] += 1
            return None
