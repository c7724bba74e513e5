"""One seed: clients work on shared prefixes while machines crash, stall and lose each other; then peace."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from kvstore.client import KVClient
from kvstore.keys import Chain, chain
from kvstore.spec import Group, ModelSpec, Shard
from tests.sim.fleet import Fleet, Node, Shape
from tests.sim.loop import run
from tests.sim.network import Faults
from tests.sim.oracle import Oracle, Violation, check_now, differences, payload

BLOCK = 4  # tokens
LATE_S = 0.5  # what a call may take beyond its deadline: virtual time, so only its own delays

PLAIN = ModelSpec(
    model="sim/plain", dtype="float16", block_tokens=BLOCK, group_blocks=4,
    groups=(Group(layers=2, kv_heads=2, k_dim=16, v_dim=16),),
)  # fmt: skip
MIXED = ModelSpec(
    model="sim/mixed", dtype="float16", block_tokens=BLOCK, group_blocks=4,
    groups=(
        Group(layers=1, kv_heads=2, k_dim=16, v_dim=16),
        Group(kind="sliding", layers=2, kv_heads=2, k_dim=16, v_dim=16, window=2 * BLOCK),
    ),
)  # fmt: skip
NEEDS: dict[str, tuple[ModelSpec, tuple[Shard, ...]]] = {
    "plain": (PLAIN, (Shard.whole(PLAIN),)),
    "mixed": (MIXED, (Shard.whole(MIXED, 0), Shard.whole(MIXED, 1))),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed saw, so that a run in which nothing happened shows."""

    seed: int
    seen: Counter[str] = field(default_factory=Counter)


class Scenario:
    """`run_seed` makes one, runs it once."""

    def __init__(self, seed: int, shape: Shape, turns: int) -> None:
        self.rng = Random(f"scenario/{seed}")
        faults = Faults(
            drop=self.rng.choice([0.0, 0.01, 0.05]),
            duplicate=self.rng.choice([0.0, 0.05]),
            slow=self.rng.choice([0.0, 0.02]),
        )
        self.seed, self.turns = seed, turns
        self.fleet = Fleet(seed, shape, faults)
        self.oracle = Oracle()
        self.seen = self.oracle.seen
        self._working = shape.clients

    async def play(self) -> None:
        await self.fleet.start()
        tasks = [asyncio.create_task(self._client(i, node)) for i, node in enumerate(self.fleet.clients)]
        tasks += [asyncio.create_task(self._trouble()), asyncio.create_task(self._watch())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        await self._peace()

    # --- load --------------------------------------------------------------------------------------------------------

    def _prompt(self, rng: Random) -> tuple[str, Chain]:
        """A prompt of a few shared documents and chats: most begin alike."""
        kind = rng.choice(["plain", "plain", "mixed"])
        spec, _ = NEEDS[kind]
        document, branch = rng.randrange(3), rng.randrange(4)
        shared = [document * 1000 + t for t in range(BLOCK * 6)]
        own = [document * 1000 + 500 + branch * 50 + t for t in range(BLOCK * rng.randrange(1, 8))]
        return kind, chain(spec, shared + own)

    async def _client(self, engine: int, node: Node) -> None:
        rng = Random(f"client/{self.seed}/{engine}")
        for _ in range(self.turns):
            process = node.process if node.up else self.fleet.boot_client(node)
            assert process is not None
            work = process.spawn(self._request(engine, node, rng))
            await asyncio.wait([work], timeout=30.0)
            if work.done():
                work.result()
            elif process.crashed:
                self.seen["requests_cut_short"] += 1
            else:
                raise Violation("I8: a request took more than 30 s")
            await asyncio.sleep(rng.uniform(0.0, 0.6))
        self._working -= 1

    async def _request(self, engine: int, node: Node, rng: Random) -> None:
        client: KVClient = node.runtime or await self.fleet.connect(node)
        kind, prompt = self._prompt(rng)
        spec, shards = NEEDS[kind]
        loop = asyncio.get_running_loop()
        begin = loop.time()
        plan = await client.match(spec, prompt, shards)
        self._in_time("match", loop.time() - begin, client.config.match_timeout_s)
        self.oracle.judge_plan(plan)
        begin = loop.time()
        result = await client.get(plan)
        self._in_time("get", loop.time() - begin, client.config.get_timeout_s)
        self.oracle.judge(plan, result)
        self.seen["hit_blocks"] += result.blocks
        for shard in shards:
            await self._put(engine, client, prompt, shard, result.blocks)

    async def _put(self, engine: int, client: KVClient, prompt: Chain, shard: Shard, first: int) -> None:
        raws = [payload(prompt.spec, shard, key, engine) for key in prompt.keys[first:]]
        for key, raw in zip(prompt.keys[first:], raws, strict=True):
            self.oracle.tried(shard, key, raw, engine)
        begin = asyncio.get_running_loop().time()
        stored = await client.put(prompt.spec, prompt, raws, first, shard)
        self._in_time("put", asyncio.get_running_loop().time() - begin, client.config.put_timeout_s)
        for state in stored.states:
            self.seen[f"put_{state}"] += 1
            if state == "refused":
                raise Violation("a sound block was refused")

    def _in_time(self, call: str, took: float, limit: float) -> None:
        if took > limit + LATE_S:
            raise Violation(f"I8: {call} took {took:.3f} s of at most {limit:g} s")

    # --- trouble -----------------------------------------------------------------------------------------------------

    async def _trouble(self) -> None:
        while self._working > 0:
            await asyncio.sleep(self.rng.expovariate(1 / 0.4))
            trouble = self.rng.choice(
                [self._crash_worker, self._crash_coordinator, self._crash_client, self._cut, self._pause]
            )
            await trouble()

    async def _crash_worker(self) -> None:
        node = self.rng.choice(self.fleet.workers)
        if not node.up:
            return
        self.fleet.crash(node, power=self.rng.random() < 0.5)
        self.seen["worker_crashes"] += 1
        await asyncio.sleep(self.rng.choice([0.05, 1.0, 5.0]))
        await self.fleet.start_worker(node)

    async def _crash_coordinator(self) -> None:
        node = self.rng.choice(self.fleet.coordinators)
        if not node.up:
            return
        self.fleet.crash(node)
        self.seen["coordinator_crashes"] += 1
        await asyncio.sleep(self.rng.choice([0.05, 1.0, 5.0]))
        await self.fleet.start_coordinator(node)

    async def _crash_client(self) -> None:
        node = self.rng.choice(self.fleet.clients)
        if node.up:
            self.fleet.crash(node)
            self.seen["client_crashes"] += 1

    async def _cut(self) -> None:
        nodes = [*self.fleet.workers, *self.fleet.coordinators, *self.fleet.clients]
        one, other = self.rng.sample(nodes, 2)
        if one.host == other.host:
            return
        self.fleet.network.cut(one.name, other.name)
        self.seen["cuts"] += 1
        await asyncio.sleep(self.rng.choice([0.2, 2.0, 8.0]))
        self.fleet.network.heal(one.name, other.name)

    async def _pause(self) -> None:
        node = self.rng.choice([*self.fleet.workers, *self.fleet.coordinators])
        process = node.process
        if process is None or process.crashed:
            return
        process.pause()
        self.seen["pauses"] += 1
        await asyncio.sleep(self.rng.choice([0.5, 4.0, 8.0]))
        process.resume()

    async def _watch(self) -> None:
        while self._working > 0:
            check_now(self.fleet)
            await asyncio.sleep(0.5)

    # --- peace -------------------------------------------------------------------------------------------------------

    async def _peace(self) -> None:
        """Everything is up and heard; within a bounded time nothing is left to tell."""
        fleet = self.fleet
        fleet.network.calm()
        wrong: list[str] = []
        for _ in range(240):
            await asyncio.sleep(0.25)
            check_now(fleet)
            wrong = differences(fleet)
            if not wrong and all(
                c.registry.complete("default", c._system.clock.monotonic()) for c in fleet.live_coordinators()
            ):
                break
        else:
            raise Violation(f"I6: after a minute of peace {wrong or 'a coordinator says it is incomplete'}")
        for node in fleet.workers:
            assert node.process is not None
            await asyncio.wait_for(node.process.spawn(node.runtime.store.idle()), 30.0)
            node.runtime.store.validate()
        for worker in fleet.live_workers():
            held = len(worker.store.snapshot("default")[1])
            self.seen["blocks_at_the_end"] += held


def run_seed(seed: int, *, shape: Shape | None = None, turns: int = 20) -> Outcome:
    """Play one seed; Violation, SimError or whatever the code raised tells what went wrong. Deterministic."""
    scenario = Scenario(seed, shape or Shape(), turns)
    run(scenario.play(), processes=scenario.fleet.network.processes)
    return Outcome(seed, scenario.seen)
