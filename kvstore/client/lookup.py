"""The lookup of a client: ask a coordinator; where none answers, the workers of this host for what they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kvstore.client.fetch import Failed
from kvstore.client.links import Coordinators, Links
from kvstore.client.members import Members
from kvstore.client.plan import HitPlan, stored_shards
from kvstore.client.rates import Rates
from kvstore.client.watching import Watching
from kvstore.config import ClientConfig
from kvstore.directory.matching import longest, make_plan
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.keys import Chain
from kvstore.recent import Recent
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.transport.methods import COORDINATOR
from kvstore.types import CommitToken, Fidelity
from kvstore.wire import common_pb2
from kvstore.wireform import plan_from_wire, shard_to_wire, token_to_wire

KEYS_MAX = 16_384
"""Blocks one lookup asks for; the rest of a longer chain is a miss."""

WAIT_MS_MAX = 100
SOCKETS_MAX = 4
"""Workers of this host that are asked when no coordinator answers."""


class Lookup:
    """Makes hit plans. Service trouble is counted and answered with a plan of what is left, at worst of 0 blocks."""

    def __init__(
        self,
        config: ClientConfig,
        system: System,
        links: Links,
        coordinators: Coordinators,
        members: Members,
        failed: Recent[Failed],
        counters: Counter[str],
        watching: Watching,
        rates: Rates,
    ) -> None:
        self._rates = rates
        self._watching = watching
        self._config, self._system, self._links, self._coordinators = config, system, links, coordinators
        self._members, self._failed, self._counters = members, failed, counters

    async def match(
        self,
        spec: ModelSpec,
        chain: Chain,
        shards: tuple[Shard, ...],
        least: Fidelity,
        *,
        after: Sequence[CommitToken],
        timeout_s: float,
    ) -> HitPlan:
        keys, packed = chain.keys, chain.packed
        if len(keys) > KEYS_MAX:
            keys, packed = keys[:KEYS_MAX], packed[:KEYS_MAX]
        end = self._system.clock.monotonic() + timeout_s
        plan = self._watching.match(spec, keys, packed, shards, least, after)
        if plan is not None:
            return self._rates.predicted(self._without_failed(plan))
        request = common_pb2.MatchRequest(
            root=spec.root,
            keys=packed.packed,
            shards=[shard_to_wire(shard) for shard in shards],
            least=int(least),  # type: ignore[arg-type]
        )
        plan = HitPlan(spec, (), shards, least, not_applied=tuple(after), complete=False)
        sockets = self._members.sockets()
        if self._coordinators.reachable:
            request.after.extend(token_to_wire(token) for token in after)
            request.wait_ms = min(WAIT_MS_MAX, int(timeout_s * 500)) if after else 0
            plan = await self._ask_coordinator(request, plan, keys, timeout_s * (0.7 if sockets else 1.0))
            del request.after[:]
            request.wait_ms = 0
        if not plan.complete:  # none answered, or one that has just begun to learn
            asked = sockets[:SOCKETS_MAX]
            for turn, socket in enumerate(asked):
                left = (end - self._system.clock.monotonic()) / (len(asked) - turn)
                local = await self._ask_worker(socket, request, plan, keys, left)
                if local.blocks > plan.blocks:
                    plan = replace(local, complete=plan.complete, not_applied=plan.not_applied)
        return self._rates.predicted(self._without_failed(plan))

    async def _ask_coordinator(
        self, request: common_pb2.MatchRequest, empty: HitPlan, keys: Sequence[bytes], timeout_s: float
    ) -> HitPlan:
        try:
            reply = await self._coordinators.call(COORDINATOR["Match"], request, timeout_s=timeout_s)
            self._coordinators.learn(reply.coordinators)
            self._members.learn(reply.holders)
            return plan_from_wire(reply, empty.spec, keys, empty.shards, empty.least)
        except KVStoreError as error:
            self._counters[f"errors_{type(error).__name__}"] += 1
            return empty

    async def _ask_worker(
        self, socket: str, request: common_pb2.MatchRequest, empty: HitPlan, keys: Sequence[bytes], timeout_s: float
    ) -> HitPlan:
        if timeout_s <= 0:
            return empty
        try:
            async with self._links.local.use(socket, timeout_s=timeout_s) as link:
                reply = await link.match(request, timeout_s=timeout_s)
            self._members.learn(reply.holders)
            return plan_from_wire(reply, empty.spec, keys, empty.shards, empty.least)
        except KVStoreError as error:
            if isinstance(error, DeadlineExceeded):
                self._links.local.hung.add(socket)
            self._counters[f"errors_{type(error).__name__}"] += 1
            return empty

    def _without_failed(self, plan: HitPlan) -> HitPlan:
        """The prefix that is left without (holder, block) pairs that failed lately: they would fail again."""
        if not len(self._failed) or not plan.blocks:
            return plan
        stored = stored_shards(plan)
        rows = [bytearray(plan.blocks) for _ in stored]
        position = {shard: index for index, shard in enumerate(stored)}
        for run in plan.runs:
            row, digest = rows[position[run.shard]], run.shard.digest
            for depth in range(run.first_depth, run.first_depth + run.count):
                if (run.holder, digest, plan.keys[depth]) not in self._failed:
                    row[depth] = 1
        cover = make_plan(plan.spec, plan.shards, stored)
        left = longest(cover, lambda at, start, stop: bytes(rows[at][start:stop]), plan.blocks)
        return plan.shortened(left)
