"""What a small fleet looks like from outside after a fault: asked of its workers and coordinators, block by block."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from kvstore.client.plan import HitPlan, is_redis
from kvstore.keys import Chain
from kvstore.operations.observe import Observer
from kvstore.spec import Shard
from kvstore.transport.base import Credentials, Transport
from kvstore.transport.methods import COORDINATOR, WORKER
from kvstore.types import Fidelity, pack_keys
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import plan_from_wire, shard_to_wire
from tests.fault_load import SPEC

COPIES = 2
SETTLE_S = 60.0

SETTINGS = {
    "store.host_bytes": "6MiB",
    "store.hot_bytes": "2MiB",
    "store.segment_bytes": "1MiB",
    "store.ssd_bytes": "12MiB",
    "store.ssd_segment_bytes": "1MiB",
    "store.redis_bytes": "32MiB",
    "store.redis_timeout_s": "0.5",
    "store.staging_bytes": "512KiB",
    "store.threads": "2",
    "server.stop_grace_s": "1",
    "worker.drain_grace_s": "3",
    "worker.redis_lease_s": "2",
    "coordinator.heartbeat_s": "0.2",
    "coordinator.lease_s": "1.5",
    "coordinator.hint_again_s": "1",
    "coordinator.repair_round_s": "3",  # what was evicted meanwhile; sooner where a worker is lost
    "fleet.reconcile_s": "0.5",
}
"""Little memory, short leases."""


class Checks:
    """Of one event loop. What is wrong is said in a line, so that it can be waited for; empty: nothing is."""

    def __init__(self, transport: Transport, prompts: Sequence[Chain], credentials: Credentials | None = None) -> None:
        self._transport, self._prompts = transport, prompts
        self._credentials = credentials or Credentials()
        self.observer = Observer(transport, self._credentials, 5.0)

    async def until(self, complaint: Callable[[], Coroutine[Any, Any, str]], what: str) -> None:
        """Wait until nothing is wrong. AssertionError with the last complaint after SETTLE_S."""
        loop = asyncio.get_running_loop()
        end = loop.time() + SETTLE_S
        while True:
            try:
                wrong = await complaint()
            except Exception as error:  # noqa: BLE001 - whoever is asked may be the one that was killed
                wrong = f"{type(error).__name__}: {error}"
            if not wrong:
                return
            assert loop.time() < end, f"not within {SETTLE_S} s: {what}: {wrong}"
            await asyncio.sleep(0.1)

    async def members(self, coordinator: str) -> tuple[bool, dict[str, str]]:
        """Whether a coordinator is complete, and the state of each worker it knows."""
        said = await self.observer.coordinator_status(coordinator)
        members = [worker.member for worker in said.workers]
        return said.complete, {member.id: member.state for member in members if not is_redis(member.id)}

    async def standing(self, coordinators: Sequence[str], wanted: int) -> str:
        """All coordinators are complete and know so many workers."""
        for address in coordinators:
            complete, states = await self.members(address)
            if not complete or list(states.values()) != ["alive"] * wanted:
                return f"{address}: complete {complete}, workers {states}"
        return ""

    async def as_before(self, workers: Mapping[str, str], coordinators: Sequence[str]) -> str:
        """Every block of the prompts lies on two workers, nothing is pinned or staged, directories say what is there.

        `workers`: id -> address."""
        if not all(workers.values()):
            return f"not all workers have an address: {workers}"
        held: dict[str, set[bytes]] = {}
        for worker, address in workers.items():
            held[worker] = await self.held(address)
            said = await self.observer.worker_status(address)
            blocks = sum(entry.blocks for entry in said.namespaces)
            pinned = sum(entry.pinned_bytes + entry.staging_bytes for entry in said.namespaces)
            if blocks != len(held[worker]) or pinned:
                return (
                    f"{worker} has {blocks} blocks, {len(held[worker])} of them known; {pinned} bytes pinned or staged"
                )
        copies = Counter(key for keys in held.values() for key in keys)
        single = sum(copies[key] < COPIES for prompt in self._prompts for key in prompt.keys)
        if single:
            return f"{single} blocks lie on fewer than {COPIES} workers"
        for address in coordinators:
            known = await self.directory(address)
            if {id: keys for id, keys in known.items() if not is_redis(id)} != {i: k for i, k in held.items() if k}:
                return f"the directory of {address} differs from what workers hold"
        return ""

    async def held(self, address: str) -> set[bytes]:
        """Keys of the prompts that a worker has, each of its copies verified."""
        found: set[bytes] = set()
        channel = await self._transport.connect(address, self._credentials)
        try:
            for key in {key for prompt in self._prompts for key in prompt.keys}:
                reply = await channel.unary(WORKER["Inspect"], worker_pb2.InspectRequest(key=key), timeout_s=5.0)
                assert not any(copy.error for block in reply.blocks for copy in block.copies), reply
                found |= {key for block in reply.blocks if block.copies}
        finally:
            await channel.close()
        return found

    async def directory(self, address: str) -> dict[str, set[bytes]]:
        """Holder -> keys of the prompts, by what a coordinator answers to lookups."""
        shard = Shard.whole(SPEC)
        request = common_pb2.MatchRequest(root=SPEC.root, shards=[shard_to_wire(shard)])
        request.least = int(Fidelity.EXACT)  # type: ignore[assignment]
        found: dict[str, set[bytes]] = {}
        channel = await self._transport.connect(address, self._credentials)
        try:
            for prompt in self._prompts:
                request.keys = pack_keys(prompt.keys)
                reply = await channel.unary(COORDINATOR["Match"], request, timeout_s=5.0)
                plan: HitPlan = plan_from_wire(reply, SPEC, prompt.keys, (shard,), Fidelity.EXACT)
                for run in plan.runs:
                    keys = prompt.keys[run.first_depth : run.first_depth + run.count]
                    found.setdefault(run.holder, set()).update(keys)
        finally:
            await channel.close()
        return found
