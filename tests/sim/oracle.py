"""What may come back, and what must hold: the invariants, checked from outside while the fleet is hurt.

I1 a delivered block is byte for byte one block that somebody put under that key and shard.
I3 tiers account for every byte. I6 directories equal contents when quiet. I7 no entry of an older life.
I9 a matched prefix is covered at every depth its groups need.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np

from kvstore.client import GetResult
from kvstore.layout import block_bytes
from kvstore.needs import needed_depths
from kvstore.plan import HitPlan
from kvstore.residency_check import validate
from kvstore.spec import ModelSpec, Shard
from tests.sim.fleet import NAMESPACE, Fleet


class Violation(AssertionError):
    """An invariant does not hold."""


def payload(spec: ModelSpec, shard: Shard, key: bytes, engine: int) -> bytes:
    """The raw block engine number `engine` computes: two engines differ in their low bits."""
    seed = hashlib.sha256(key + shard.digest + bytes([engine])).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:8], "little")))
    values = rng.standard_normal(block_bytes(spec, shard) // 2, np.float32).astype(np.float16)
    return values.tobytes()


class Oracle:
    """Remembers every put that was ever tried; judges what comes back."""

    def __init__(self) -> None:
        self._puts: dict[tuple[bytes, bytes], dict[bytes, int]] = {}
        self.seen: Counter[str] = Counter()

    def tried(self, shard: Shard, key: bytes, raw: bytes, engine: int) -> None:
        self._puts.setdefault((shard.digest, key), {})[raw] = engine

    def judge_plan(self, plan: HitPlan) -> None:
        """I9: some stored rectangle that meets each needed one, at each depth the group's rule needs."""
        for shard in plan.shards:
            for depth in needed_depths(plan, shard):
                meeting = [
                    run.shard
                    for run in plan.runs
                    if run.first_depth <= depth < run.first_depth + run.count and run.shard.overlap(shard) is not None
                ]
                if not meeting:
                    raise Violation(f"I9: depth {depth} of {plan.blocks} is matched, but nobody holds {shard} there")

    def judge(self, plan: HitPlan, result: GetResult) -> None:
        """I1, for every block that is said to be delivered, also beyond the contiguous ones."""
        for index, shard in enumerate(plan.shards):
            for depth, tier in enumerate(result.tiers[index]):
                if tier is None:
                    continue
                got = bytes(result.buffers[index][depth])
                if got not in self._puts.get((shard.digest, plan.keys[depth]), {}):
                    raise Violation(f"I1: wrong bytes for depth {depth} of {shard} from {tier.name}")
                self.seen[f"blocks_{tier.name.lower()}"] += 1
        self.seen["gets"] += 1


def check_now(fleet: Fleet) -> None:
    """I3 and I7, at any moment: also in the middle of a move, when a tier counts what residency does not know yet."""
    for worker in fleet.live_workers():
        stack = worker.store.stack
        validate(stack.residency)
        stack.arena.validate()
        for level, tier in enumerate(stack.tiers):
            known = stack.residency.used[level]
            if not known <= tier.used <= tier.capacity:
                raise Violation(f"I3: {tier.tier.name} counts {tier.used} of {tier.capacity}, residency {known}")
    for coordinator in fleet.live_coordinators():
        registry = coordinator.registry
        directory = registry.inboxes[NAMESPACE].directory
        directory.validate()
        for worker, epochs in fleet.epochs.items():
            known = registry.membership.epoch(worker)
            if known not in epochs:
                continue  # not registered yet, or this life began a moment ago
            stale = [entry for entry in directory.contents(worker) if entry not in fleet.lives[(worker, known)]]
            if stale:
                raise Violation(f"I7: {len(stale)} blocks of {worker} are not of its epoch {known}")


def differences(fleet: Fleet) -> list[str]:
    """I6: how the directories differ from the contents. Empty when quiet and right."""
    found = []
    for worker in fleet.live_workers():
        held = {(a.shard, a.key): (a.tier, a.fidelity) for a in worker.store.snapshot(NAMESPACE)[1]}
        for coordinator in fleet.live_coordinators():
            known = coordinator.registry.inboxes[NAMESPACE].directory.contents(worker.identity.worker)
            if dict(known) != held:
                found.append(
                    f"{coordinator.address}: {len(known)} blocks of {worker.identity.worker}, it holds {len(held)}"
                )
    return found
