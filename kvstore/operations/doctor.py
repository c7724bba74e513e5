"""`kvstore doctor`: proves that the service works, tier by tier and end to end, or names what does not and the fix.

Every check is a plain value; nothing here raises a KVStoreError of the service: it becomes a check that failed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvstore.client.kv_client import KVClient
from kvstore.config import MIB, ClientConfig, Config
from kvstore.errors import KVStoreError
from kvstore.fleet.state import FleetState
from kvstore.keys import Chain, chain
from kvstore.layout import block_bytes
from kvstore.operations.observe import Observer, View, look
from kvstore.operations.payload import Payload, replay_spec, tokens_of
from kvstore.operations.sizing import size_problems
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Tier
from kvstore.wire import common_pb2, worker_pb2

PROBE_S = 15.0
PROBE_BLOCKS = 3
PROBE_BLOCK_BYTES = 16 << 10
SSD_SPARE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried. `fix` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What should be there. `workers`: id -> name for people; `count`: the least; `folders`: of the SSD tiers."""

    workers: Mapping[str, str]
    count: int = 1
    redis_url: str = ""
    folders: Mapping[str, str] | None = None

    @classmethod
    def of(cls, state: FleetState | None, config: Config, count: int) -> Expected:
        """From the state of the fleet that is up here, or the configuration."""
        if state is None:
            return cls({}, count, config.store.redis_url)
        folders = {worker.actor: worker.ssd_folder for worker in state.workers if worker.ssd_folder}
        workers = {worker.worker_id: worker.actor for worker in state.workers}
        return cls(workers, max(count, len(workers)), state.redis_url, folders)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's configuration: what was found in it, and how it would reach the service (None: not at all)."""

    checks: list[Check]
    client: ClientConfig | None


class Doctor:
    """One examination."""

    def __init__(
        self,
        observer: Observer,
        client: ClientConfig,
        system: System,
        expected: Expected,
        engine: Engine | None = None,
    ) -> None:
        self._observer, self._client, self._system, self._expected = observer, client, system, expected
        self._engine = engine
        self.checks: list[Check] = []

    async def examine(self) -> dict[str, Any]:
        """The object of `kvstore doctor --json`."""
        self._add("configuration", True, "loads, every key known and in range")
        view = await look(self._observer, self._client.coordinators)
        self._coordinators(view)
        workers = view.workers()
        if view.statuses:
            self._workers(workers)
        reachable = [worker for worker in workers.values() if worker.member.address]
        await self._namespaces(view, reachable)
        self._sizes(workers)
        await asyncio.gather(*(self._tiers(worker) for worker in reachable))
        self._ssd_folders()
        await self._redis()
        if view.statuses:
            await self._end_to_end(reachable)
        if self._engine is not None:
            self.checks += self._engine.checks
            if self._engine.client is not None:
                await self._as_the_engine(self._engine.client, reachable)
        return {"ok": all(check.ok for check in self.checks), "checks": [asdict(check) for check in self.checks]}

    def _add(self, name: str, ok: bool, detail: str, fix: str = "") -> None:
        self.checks.append(Check(name, ok, detail, "" if ok else fix))

    # --- who is there ----------------------------------------------------------------------------------------------

    def _coordinators(self, view: View) -> None:
        for address in self._client.coordinators:
            name = f"coordinator {address}"
            if address in view.errors:
                fix = "start it again (kvstore coordinator --bind, or kvstore down and up) or correct --coordinators"
                self._add(name, False, f"does not answer: {view.errors[address]}", fix)
                continue
            status = view.statuses[address]
            detail = f"answers, {status.directory_blocks} blocks known"
            fix = "wait for the workers' snapshots; if it stays so, look at the workers' logs"
            self._add(name, status.complete, detail if status.complete else f"{detail}, still filling", fix)

    def _workers(self, workers: Mapping[str, common_pb2.WorkerStatus]) -> None:
        fix = "start it again: kvstore down and kvstore up, or kvstore worker with its SSD folder"
        for id in sorted({*workers, *self._expected.workers}):
            name = f"worker {self._expected.workers.get(id, id)}"
            worker = workers.get(id)
            if worker is None:
                self._add(name, False, f"missing: no coordinator knows {id}", fix)
                continue
            state = worker.member.state
            detail = f"{state}, {id} epoch {worker.member.epoch} at {worker.member.address}"
            self._add(name, state == "alive", detail, fix)
        alive = sum(worker.member.state == "alive" for worker in workers.values())
        missing = f"{alive} of {self._expected.count} workers are alive"
        self._add("workers", alive >= self._expected.count, missing, fix)

    async def _namespaces(self, view: View, workers: list[common_pb2.WorkerStatus]) -> None:
        """Every process must have been given the same namespaces.toml."""
        asked = [(f"coordinator {address}", self._observer.coordinator_hello(address)) for address in view.statuses]
        asked += [(f"worker {w.member.id}", self._observer.worker_hello(w.member.address)) for w in workers]
        digests: dict[str, list[str]] = {}
        for (name, _), reply in zip(
            asked, await asyncio.gather(*(a for _, a in asked), return_exceptions=True), strict=True
        ):
            if isinstance(reply, common_pb2.HelloReply):
                digests.setdefault(reply.namespaces_digest, []).append(name)
            elif not isinstance(reply, KVStoreError):
                raise reply
        parts = [f"{digest or 'no file'}: {', '.join(names)}" for digest, names in digests.items()]
        same = f"the same everywhere ({parts[0].partition(':')[0]})" if len(parts) == 1 else "; ".join(parts)
        fix = "give every process the same namespaces.toml and restart those that differ"
        self._add("namespaces", len(parts) == 1, same if parts else "nobody answers", fix)

    # --- tiers -----------------------------------------------------------------------------------------------------

    def _sizes(self, workers: Mapping[str, common_pb2.WorkerStatus]) -> None:
        """Whether each tier is large enough to help."""
        for worker in workers.values():
            if not worker.tiers:
                continue
            name = f"sizes of {self._expected.workers.get(worker.member.id, worker.member.id)}"
            problems = size_problems(worker)
            for what, fix in problems:
                self._add(name, False, what, fix)
            if not problems:
                self._add(name, True, "each tier is large enough to help, as far as its figures say")

    async def _tiers(self, worker: common_pb2.WorkerStatus) -> None:
        """Write a block through every tier of a worker and read it back."""
        name = self._expected.workers.get(worker.member.id, worker.member.id)
        try:
            reply = await self._observer.probe(worker.member.address, PROBE_S)
        except KVStoreError as error:
            fix = "see whether its process runs and what its log says; restart it"
            self._add(f"tiers of {name}", False, f"cannot be probed: {error}", fix)
            return
        for result in reply.results:
            detail = result.detail or ("written and read back" if result.ok else "failed")
            self._add(f"{Tier(result.tier).name.lower()} of {name}", result.ok, detail, result.fix)

    def _ssd_folders(self) -> None:
        for name, folder in (self._expected.folders or {}).items():
            if not os.path.isdir(folder):
                self._add(f"SSD folder of {name}", False, f"{folder} is gone", "restart the worker: it makes a new one")
                continue
            free = self._system.disk(folder).free_bytes()
            detail = f"{free // MIB} MiB free in {folder}"
            fix = "free some space there, or lower store.ssd_bytes"
            self._add(f"SSD folder of {name}", free >= SSD_SPARE_BYTES, detail, fix)

    async def _redis(self) -> None:
        if not self._expected.redis_url:
            return
        from kvstore.tiers.redis_link import ReplyError, connect, place

        where, link = place(self._expected.redis_url), connect(self._expected.redis_url, self._observer.timeout_s)
        try:
            (info,) = await link.call(["INFO", "memory"])
        except KVStoreError as error:
            self._add("redis", False, f"{where} does not answer: {error}", "start it again, or correct store.redis_url")
            return
        finally:
            await link.close()
        lines = {} if isinstance(info, ReplyError) else dict(x.split(b":", 1) for x in info.splitlines() if b":" in x)
        policy = lines.get(b"maxmemory_policy", b"unknown").decode().strip()
        detail = f"{where} answers, maxmemory-policy {policy}" + (f" ({info})" if isinstance(info, ReplyError) else "")
        self._add("redis", policy == "noeviction", detail, "redis-cli CONFIG SET maxmemory-policy noeviction")

    # --- end to end ------------------------------------------------------------------------------------------------

    async def _end_to_end(self, workers: list[common_pb2.WorkerStatus]) -> None:
        """Put, match, get as a client does, beside each worker of this machine; then drop what was put."""
        local = [w.member for w in workers if w.member.socket and w.member.host == self._system.host]
        configs = [(member.node or member.id, replace(self._client, workers=(member.socket,))) for member in local]
        for name, config in configs or [("any worker", self._client)]:
            problem, spec = await self._tried(config)
            await self._tidy(workers, spec.root)
            detail = problem or f"{PROBE_BLOCKS} blocks put, matched and read back byte for byte"
            self._add(f"client beside {name}", not problem, detail, "mend what failed above first, then run it again")

    async def _as_the_engine(self, config: ClientConfig, workers: list[common_pb2.WorkerStatus]) -> None:
        """Whether each address of an engine's settings answers, and a block put with them comes back."""
        each = [(f"coordinator {a}", replace(config, coordinators=(a,), workers=())) for a in config.coordinators]
        each += [(f"worker {s}", replace(config, coordinators=(), workers=(s,))) for s in config.workers]
        fix = "correct kv_connector_extra_config: addresses, token_file, namespace"
        for name, alone in each:
            try:
                async with await KVClient.connect(alone, self._system) as client:
                    errors = [error for error in client.counters if error.startswith("errors_")]
                problem = f"does not answer ({', '.join(errors).removeprefix('errors_')})" if errors else ""
            except KVStoreError as error:
                problem = f"refuses: {error}"
            self._add(f"vllm {name}", not problem, problem or "answers the engine's identity", fix)
        problem, spec = await self._tried(config)
        await self._tidy(workers, spec.root)
        detail = problem or f"{PROBE_BLOCKS} blocks put, matched and read back byte for byte"
        self._add("vllm end to end", not problem, detail, fix)

    async def _tried(self, config: ClientConfig) -> tuple[str, ModelSpec]:
        """What went wrong with a model of its own, and the model."""
        spec = replace(replay_spec(PROBE_BLOCK_BYTES), model=f"kvstore/doctor-{self._system.token_hex(8)}")
        try:
            return await self._round_trip(config, chain(spec, tokens_of(tuple(range(PROBE_BLOCKS))))), spec
        except KVStoreError as error:
            return f"{type(error).__name__}: {error}", spec

    async def _tidy(self, workers: list[common_pb2.WorkerStatus], root: bytes) -> None:
        """Drop what was put. What a worker can't drop now, its policy will: nobody asks for it again."""
        for worker in workers:
            with suppress(KVStoreError):
                await self._observer.purge(worker.member.address, worker_pb2.PurgeRequest(root=root), PROBE_S)

    async def _round_trip(self, config: ClientConfig, prompt: Chain) -> str:
        """What went wrong, empty when nothing did."""
        payload = Payload(block_bytes(prompt.spec, Shard.whole(prompt.spec)))
        async with await KVClient.connect(config, self._system) as client:
            stored = await client.put(prompt.spec, prompt, [payload.make(key) for key in prompt.keys])
            if stored.states != ["committed"] * len(prompt):
                return f"put answered {', '.join(stored.states)}"
            plan = await client.match(prompt.spec, prompt)
            if plan.blocks != len(prompt):
                return f"match found {plan.blocks} of {len(prompt)} blocks"
            got = await client.get(plan)
            if got.blocks != len(prompt):
                return f"get delivered {got.blocks} of {len(prompt)} blocks"
            right = all(payload.check(key, got.buffers[0][depth]) for depth, key in enumerate(prompt.keys))
            return "" if right else "get delivered other bytes than were put"
