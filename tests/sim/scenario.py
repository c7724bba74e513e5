"""One seed: clients work on shared prefixes while everything goes wrong; then peace; then only the worker here."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from random import Random
from unittest import mock

from coordinator.runtime import CoordinatorRuntime
from kvstore.client import bulk, host_link, slices, sources
from kvstore.client.kv_client import KVClient
from kvstore.client.pinning import Pin
from kvstore.client.plan import HitPlan
from kvstore.client.purging import purge_all, purge_id
from kvstore.client.slices import Slices
from kvstore.directory.membership import Member
from kvstore.keys import Chain
from kvstore.spec import Shard
from kvstore.store import arena
from kvstore.transport.methods import WORKER
from kvstore.types import Fidelity
from kvstore.wire import worker_pb2
from tests.sim.checks import Checks
from tests.sim.fleet import Fleet, Node
from tests.sim.load import WHOLE, WINDOW, Need, alone, draw, payload
from tests.sim.loop import run
from tests.sim.oracle import Oracle, Violation
from tests.sim.shape import SOCKET, Shape, draw_faults
from tests.sim.trouble import SLOW_S, Trouble
from workers import data, outgoing

LATE_S = 0.5  # what a call may take beyond its deadline: virtual time, so only its own delays
PEACE_S = 60.0
COPIED = "default"  # the namespace that wants two copies
PURGE_TRIES = 4
"""As an operator would: Redis may have only just come back, and who has left is a member until its lease is over."""
SLOW_PURGES = 3  # of so many seeds one has such a purge: it takes a tenth of what all else does
PURGED_S = 3.0  # after a purge: what a repair was to bring back would be there
CHECK_S = 0.5
TURNS = 6  # requests a client
LONELY_TRIES = 3
"""Another client may take a block between plan and get, and a shorter prefix of a window needs blocks that the plan
does not name: nothing comes then."""

LEARNED_SEEDS = 2000  # from this seed on the policy that learns decides, LRU before
RAW_SEEDS = 1000  # from this seed on clients get and put by raw data connections, where gRPC serves before it
SCALE = (
    (sources, "INLINE_BYTES", 0),  # small reads take their time, too
    (Slices, "run", lambda copy, pool: pool.run(copy._work)),  # by a byte mover, as most of a large one is
    (slices, "LAST_SLICES", 0),
    (outgoing, "MESSAGE_BYTES", 4 << 10),  # a few blocks, so that things happen between two messages of a Get
    (data, "TAKEN_BYTES", 4 << 10),
    (arena, "UNIT_BYTES", arena.PAGE_BYTES),  # so that neighbours do not keep a block's space from being used again
    (bulk, "UNIT_BYTES", arena.PAGE_BYTES),
    (host_link, "UNIT_BYTES", arena.PAGE_BYTES),
)
"""Bounds that are no configuration, as small as the blocks here are."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed saw, so that a run in which nothing happened shows; `digest` is of every message and fault."""

    seed: int
    seen: Counter[str] = field(default_factory=Counter)
    digest: str = ""


class Scenario:
    """`run_seed` makes one, runs it once."""

    def __init__(self, seed: int, shape: Shape | None, turns: int) -> None:
        self.rng = Random(f"scenario/{seed}")
        faults = draw_faults(self.rng)
        self.seed, self.turns = seed, turns
        policy = "default" if seed >= LEARNED_SEEDS else "lru"
        drawn = shape or replace(Shape.draw(self.rng), raw=seed >= RAW_SEEDS, policy=policy)
        self.fleet = Fleet(seed, drawn, faults)
        self.oracle = Oracle()
        self.checks = Checks(self.fleet, self.oracle)
        self.seen = self.oracle.seen
        self.trouble = Trouble(self.fleet, self.rng, self.seen)

    async def play(self) -> None:
        await self.fleet.start()
        watch = asyncio.create_task(self._watch())
        trouble = asyncio.create_task(self.trouble.run())
        clients = [asyncio.create_task(self._client(i, node)) for i, node in enumerate(self.fleet.clients)]
        working = asyncio.gather(*clients)
        try:
            await asyncio.wait([working, watch, trouble], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                self.trouble.over = True
                working.result()
                await trouble
            for task in (watch, trouble):
                if task.done():
                    task.result()
        finally:
            for task in (*clients, watch, trouble):
                task.cancel()
        await self._peace()
        if self.seed % SLOW_PURGES == 0:
            await self._purge()
        await self._lonely()
        await self._leave()

    # --- load --------------------------------------------------------------------------------------------------------

    async def _client(self, engine: int, node: Node) -> None:
        rng = Random(f"client/{self.seed}/{engine}")
        for _ in range(self.turns):
            process = node.process if node.up else self.fleet.boot_client(node)
            assert process is not None
            paused_s = process.paused_s
            work = process.spawn(self._request(engine, node, rng))
            await asyncio.wait([work], timeout=30.0)
            if work.done():
                work.result()
            elif process.crashed:
                self.seen["requests_cut_short"] += 1
            elif not process.paused and process.paused_s == paused_s:
                raise Violation("I8: a request took more than 30 s")
            await asyncio.sleep(rng.uniform(0.0, 0.4))

    async def _request(self, engine: int, node: Node, rng: Random) -> None:
        client: KVClient = node.runtime or await self.fleet.connect(node)
        need, prompt = draw(rng)
        took = Timer(node)
        plan = await client.match(need.spec, prompt, need.shards)
        took.at_most("match", client.config.match_timeout_s)
        self.oracle.judge_plan(node.namespace, plan)
        pin = await self._pin(client, plan, rng) if rng.random() < 0.1 else None
        took = Timer(node)
        result = await client.get(plan)
        took.at_most("get", client.config.get_timeout_s)
        self.oracle.judge(node.namespace, plan, result)
        self.seen["hit_blocks"] += result.blocks
        if pin is not None:
            await client.unpin(pin)
        for shard in need.shards:
            await self._put(engine, node, client, prompt, shard, result.blocks)
        if rng.random() < 0.01:
            await client.purge(need.spec)
            self.seen["purges"] += 1

    async def _pin(self, client: KVClient, plan: HitPlan, rng: Random) -> Pin:
        pin = await client.pin(plan, ttl_s=rng.choice([0.5, 5.0]))
        self.seen["pinned"] += pin.blocks
        await asyncio.sleep(rng.choice([0.0, 0.3]))
        return pin

    async def _put(
        self, engine: int, node: Node, client: KVClient, prompt: Chain, shard: Shard, first: int
    ) -> list[str]:
        keys = prompt.keys[first:]
        raws = [payload(prompt.spec, shard, node.namespace, key, engine) for key in keys]
        for key, raw in zip(keys, raws, strict=True):
            self.oracle.tried(node.namespace, shard, key, raw)
        took = Timer(node)
        stored = await client.put(prompt.spec, prompt, raws, first, shard)
        took.at_most("put", client.config.put_timeout_s)
        for state in stored.states:
            self.seen[f"put_{state}"] += 1
            if state == "refused":
                raise Violation("a sound block was refused")
        return stored.states

    async def _watch(self) -> None:
        for tick in range(1_000_000):
            if tick % 2:
                self.checks.at_any_moment()
            elif tick % 4 == 0:
                self.checks.blocks()
            await asyncio.sleep(CHECK_S)

    # --- quiet points ------------------------------------------------------------------------------------------------

    async def _peace(self) -> None:
        """Everything is up and heard; within a bounded time nothing is left to tell (I6)."""
        fleet = self.fleet
        fleet.network.calm()
        wrong: list[str] = []
        for _ in range(int(PEACE_S / CHECK_S)):
            await asyncio.sleep(CHECK_S)
            self.checks.at_any_moment()
            wrong = self.checks.differences()
            if not wrong and all(self._whole(coordinator) for coordinator in fleet.live_coordinators()):
                break
        else:
            raise Violation(f"I6: after a minute of peace {wrong or 'a coordinator says it is incomplete'}")
        await self._idle()
        self.checks.blocks()
        for worker in fleet.live_workers():
            self.seen["pulled"] += worker.node.counters["pulled_blocks"]
            self.seen["marked"] += worker.node.counters["marked_secondary"]
            self.seen["over_quota"] += worker.store.use("other").evicted
        self.seen["blocks_at_the_end"] += sum(w.store.blocks("default") for w in fleet.live_workers())

    def _whole(self, coordinator: CoordinatorRuntime) -> bool:
        """It says so, and knows every worker, also one that has nothing to announce."""
        registry, now = coordinator.registry, coordinator._system.clock.monotonic()
        workers = [worker.identity.worker for worker in self.fleet.live_workers()]
        return registry.complete("default", now) and all(registry.member(id, now) for id in workers)

    async def _purge(self) -> None:
        """A purge that one worker does long after the other, while copies are made: nothing of it comes back."""
        self.fleet.rng.shuffle(late := [worker.identity.worker for worker in self.fleet.live_workers()])
        node = next((client for client in self.fleet.clients if client.namespace == COPIED), self.fleet.clients[0])
        if not node.up:
            self.fleet.boot_client(node)
        assert node.process is not None
        await asyncio.wait_for(node.process.spawn(purge_slowly(self.fleet, node, late)), 90.0)
        await asyncio.sleep(PURGED_S)
        for worker in self.fleet.live_workers():
            residency = worker.store.stack.residency
            rows = [row for row in residency.of(node.namespace) if residency.header(row).root == WHOLE.spec.root]
            if rows:
                raise Violation(f"I4: {len(rows)} blocks of a purged model are on {worker.identity.worker} again")
        self.seen["purged_slowly"] += len(late)

    async def _idle(self) -> None:
        for node in self.fleet.workers:
            assert node.process is not None
            await asyncio.wait_for(node.process.spawn(node.runtime.store.idle()), 30.0)

    async def _lonely(self) -> None:
        """I11: no coordinator, no Redis, a full disk. What a client has just stored on its host's worker it gets."""
        fleet = self.fleet
        for node in fleet.coordinators:
            fleet.crash(node)
        if fleet.redis is not None:
            fleet.redis.stop()
        for worker in fleet.workers:
            for disk in worker.disks.values():
                disk.capacity = disk.used()
        hosts = [worker.host for worker in fleet.workers]
        nodes = [node for node in fleet.clients if node.host in hosts]
        await asyncio.gather(*(self._alone(number, node) for number, node in enumerate(nodes)))

    async def _alone(self, number: int, node: Node) -> None:
        if node.up:
            self.fleet.crash(node)
        process = self.fleet.boot_client(node)
        await process.spawn(self._store_and_get(number, node))

    async def _store_and_get(self, number: int, node: Node) -> None:
        client = await self.fleet.connect(node, workers=(SOCKET,))
        for need in (WHOLE, WINDOW):
            prompt = alone(need, number)
            kept = len(prompt)
            for shard in need.shards:
                states = await self._put(number, node, client, prompt, shard, 0)
                good = [state in ("committed", "held") for state in states]
                kept = min(kept, good.index(False) if False in good else kept)
            kept = min(kept, self._held(node, need, prompt))
            for _ in range(LONELY_TRIES):
                plan = await client.match(need.spec, prompt, need.shards)
                self.oracle.judge_plan(node.namespace, plan)
                result = await client.get(plan)
                self.oracle.judge(node.namespace, plan, result)
                if result.blocks >= (kept := min(kept, self._held(node, need, prompt))):
                    break
            else:
                raise Violation(f"I11: {result.blocks} of {kept} blocks on this very host, with nobody else there")
            self.seen["lonely_hits"] += result.blocks

    def _held(self, node: Node, need: Need, prompt: Chain) -> int:
        """Leading blocks that the worker of this host has: with every lower tier gone it may have to give some up."""
        worker = next(worker for worker in self.fleet.workers if worker.host == node.host)
        store = worker.runtime.store
        return int(store.match(node.namespace, need.spec.root, prompt.keys, need.shards, Fidelity.EXACT).blocks)

    async def _leave(self) -> None:
        """All clients go, every lease, hold and pin runs out: nothing stays taken."""
        for node in self.fleet.clients:
            if node.up:
                self.fleet.crash(node)
        await asyncio.sleep(4.0)
        await self._idle()
        self.checks.idle()


class Timer:
    """I8: a call ends in time, unless its own process stood still or had no processor."""

    def __init__(self, node: Node) -> None:
        assert node.process is not None
        self._process = node.process
        self._begin = asyncio.get_running_loop().time()
        self._paused_s, self._slow, self._slowed = self._process.paused_s, self._process.slow_s, self._process.slowed

    def at_most(self, call: str, limit_s: float) -> None:
        took = asyncio.get_running_loop().time() - self._begin - (self._process.paused_s - self._paused_s)
        slow = self._slow or self._process.slowed > self._slowed
        if took > limit_s + LATE_S + (8 * SLOW_S if slow else 0.0):
            raise Violation(f"I8: {call} took {took:.3f} s of at most {limit_s:g} s")


async def purge_slowly(fleet: Fleet, node: Node, late: list[str]) -> None:
    """What `KVClient.purge` does, but that each worker is asked a second after the one before it in `late`."""
    client = await fleet.connect(node)
    request = worker_pb2.PurgeRequest(root=WHOLE.spec.root, purge=purge_id(client.system))
    turn = {worker.address: late.index(worker.identity.worker) for worker in fleet.live_workers()}

    async def look() -> list[Member]:
        await client.members.fresh(timeout_s=1.0)
        return client.members.all()

    async def ask(address: str) -> int:
        await asyncio.sleep(turn.get(address, 0))  # an earlier life's, until its lease is over
        async with client._links.remote.use(address) as channel:
            reply: worker_pb2.PurgeReply = await channel.unary(WORKER["Purge"], request, timeout_s=5.0)
            return reply.blocks

    for _ in range(PURGE_TRIES):
        purged = await purge_all(look, ask)
        if not purged.failed and purged.workers == len(late):
            break
        await asyncio.sleep(2.0)
    else:
        raise Violation(f"I8: in peace a purge was not done by all: {purged}")


def play(scenario: Scenario) -> None:
    """Once. Violation, SimError or whatever the code raised tells what went wrong."""
    with ExitStack() as stack:
        for module, name, value in SCALE:
            stack.enter_context(mock.patch.object(module, name, value))
        run(scenario.play(), processes=scenario.fleet.network.processes)


def run_seed(seed: int, *, shape: Shape | None = None, turns: int = TURNS) -> Outcome:
    """Play one seed. Deterministic."""
    scenario = Scenario(seed, shape, turns)
    play(scenario)
    return Outcome(seed, scenario.seen, scenario.fleet.network.digest())
