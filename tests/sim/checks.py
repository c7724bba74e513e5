"""The invariants that are checked from outside while the fleet is hurt, and those that hold when it is quiet.

`at_any_moment` holds between any two steps, also in the middle of a move, when a tier counts what residency does not
know yet. The rest is for quiet points.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.runtime import CoordinatorRuntime
from kvstore.client.plan import REDIS_HOLDER
from kvstore.residency.check import validate
from kvstore.tiers.redis_index import Space
from tests.sim.fleet import Fleet
from tests.sim.oracle import Oracle, Violation
from tests.sim.redis_data import fidelity
from tests.sim.shape import NAMESPACES
from workers.runtime import WorkerRuntime


class Checks:
    """Of one fleet. Remembers the highest epoch each coordinator has shown of each worker."""

    def __init__(self, fleet: Fleet, oracle: Oracle) -> None:
        self.fleet, self.oracle = fleet, oracle
        self._epochs: dict[tuple[str, str], int] = {}  # (boot id of a coordinator, worker) -> epoch

    def at_any_moment(self) -> None:
        """I2, I3, I6 (as far as it holds then), I7, I8, I10."""
        for worker in self.fleet.live_workers():
            _accounts(worker)
            _bounds(worker)
        for witness in self.fleet.witnesses():
            witness.check_holds()
            witness.check_moves()
            witness.check_pins()
        for coordinator in self.fleet.live_coordinators():
            for namespace in NAMESPACES:
                coordinator.registry.inboxes[namespace].directory.validate()
            self._lives(coordinator)
        self._whole()

    def blocks(self) -> None:
        """I3, I4, I5, I10 of every block in every arena."""
        for witness in self.fleet.witnesses():
            witness.check_blocks(self.oracle)

    def _lives(self, coordinator: CoordinatorRuntime) -> None:
        """I7: what a coordinator knows of a worker is of its newest life it has heard of, and that never goes back."""
        registry = coordinator.registry
        for worker, epochs in self.fleet.epochs.items():
            known = registry.membership.epoch(worker)
            name = (coordinator.boot_id, worker)
            if known < self._epochs.get(name, 0):
                raise Violation(f"I7: {coordinator.address} took epoch {known} of {worker} after a newer one")
            self._epochs[name] = known
            for namespace in NAMESPACES:
                for receiver in registry.inboxes[namespace].receivers():
                    if receiver.holder == worker and receiver.epoch < known:
                        raise Violation(f"I7: {coordinator.address} listens to an older life of {worker}")
            if known not in epochs:
                continue  # not registered yet, or this life began a moment ago
            for namespace in NAMESPACES:
                life = self.fleet.lives[(worker, known)]
                contents = registry.inboxes[namespace].directory.contents(worker)
                stale = [entry for entry in contents if (namespace, *entry) not in life]
                if stale:
                    raise Violation(f"I7: {len(stale)} blocks of {worker} are not of its epoch {known}")

    def _whole(self) -> None:
        """I6 at any moment: whoever has applied everything that a worker has numbered knows exactly what it holds."""
        for worker in self.fleet.live_workers():
            for coordinator in self.fleet.live_coordinators():
                for namespace in NAMESPACES:
                    inbox = coordinator.registry.inboxes[namespace]
                    receiver = inbox.get(worker.identity.worker, worker.identity.epoch)
                    head = worker.store.outbox(namespace).head
                    if receiver is not None and receiver.applied == head and _differs(worker, coordinator, namespace):
                        raise Violation(f"I6: {coordinator.address} has all changes of {worker.identity.worker}, but")

    def differences(self) -> list[str]:
        """I6: how the directories differ from the contents. Empty when quiet and right."""
        found = []
        for coordinator in self.fleet.live_coordinators():
            for worker in self.fleet.live_workers():
                for namespace in NAMESPACES:
                    if _differs(worker, coordinator, namespace):
                        found.append(f"{coordinator.address} on {worker.identity.worker} in {namespace}")
            found += self._redis_differences(coordinator)
        return found

    def _redis_differences(self, coordinator: CoordinatorRuntime) -> Iterator[str]:
        redis = self.fleet.redis
        if redis is None:
            return
        for namespace in NAMESPACES:
            index = redis.data.get(Space.of(namespace).key("index"), redis.now_ms()) or {}
            held = {(id[:16], id[16:]): fidelity(entry) for id, entry in index.items()}
            known = coordinator.registry.inboxes[namespace].directory.contents(REDIS_HOLDER + namespace)
            if {name: int(copy[1]) for name, copy in known.items()} != held:
                yield f"{coordinator.address} on Redis in {namespace}: {len(known)} of {len(held)}"

    def idle(self) -> None:
        """I3, I8 when nothing moves and no client is there: everything that was taken is given back."""
        for worker in self.fleet.live_workers():
            store, name = worker.store, worker.identity.worker
            store.validate()
            left = {
                "staging bytes": store.staging.used,
                "holds": len(store.opening.holds),
                "pins": len(store.pins),
                "pinned rows": sum(1 for row in store.stack.residency.rows if store.stack.residency.pinned(row)),
                "bytes in limbo": store.arena.limbo_bytes,
                "bytes in Get streams": worker.node.sending.used,
                "bytes in Put streams": worker.node.receiving.used,
                "bytes being loaded": store.loading.budget.used,
                "bytes being moved": store.movement.moving_bytes,
                "segments mapped by peers": sum(segment.peers for segment in store.arena.segments()),
            }
            if any(left.values()):
                kept = {what: count for what, count in left.items() if count}
                raise Violation(f"I3, I8: {name} is idle and keeps {kept}")


def _differs(worker: WorkerRuntime, coordinator: CoordinatorRuntime, namespace: str) -> bool:
    held = {(a.shard, a.key): (a.tier, a.fidelity) for a in worker.store.snapshot(namespace)[1]}
    known = coordinator.registry.inboxes[namespace].directory.contents(worker.identity.worker)
    return dict(known) != held


def _accounts(worker: WorkerRuntime) -> None:
    """I3."""
    stack = worker.store.stack
    validate(stack.residency)
    stack.arena.validate()
    for level, tier in enumerate(stack.tiers):
        known = stack.residency.used[level]
        if not known <= tier.used <= tier.capacity:
            raise Violation(f"I3: {tier.tier.name} counts {tier.used} of {tier.capacity}, residency {known}")


def _bounds(worker: WorkerRuntime) -> None:
    """I8, of what is counted in one place."""
    store, config = worker.store, worker._config
    bounds = {
        "staging": (store.staging.used, config.store.staging_total_bytes),
        "loads": (store.loading.budget.used, config.store.load_queue_bytes),
        "moves": (store.movement.moving_bytes, config.store.spill_queue_bytes + config.store.block_bytes_max),
        "Get streams": (worker.node.sending.used, config.worker.get_bytes_max),
        "Put streams": (worker.node.receiving.used, config.worker.put_bytes_max),
        "pins": (sum(map(store.pins.pinned_bytes, NAMESPACES)), 2 * config.store.pinned_bytes),
    }
    for name, (used, bound) in bounds.items():
        if used > bound:
            raise Violation(f"I8: {name} of {worker.identity.worker}: {used} of at most {bound}")
