"""What a coordinator does when a worker comes back within its lease: the members are the same, its blocks are not."""

from __future__ import annotations

import pytest

from coordinator.registry import Registry
from kvstore.config import CoordinatorConfig
from kvstore.directory.replicas import Copies
from kvstore.directory.runs import Run
from kvstore.spec import Shard
from tests.service_helpers import FULL, ListSource, prompt

CONFIG = CoordinatorConfig(repair_round_s=1e9)  # by itself it looks again in the year 31689


def announce(registry: Registry, source: ListSource, now: float) -> None:
    """Register, and tell everything."""
    head = source.outboxes["default"].head if source.outboxes else 0
    registry.register(source.member(), {"default": head}, now)
    receiver = registry.receiver(source.worker, source.epoch, "default")
    assert receiver is not None
    if head:
        delta = source.outbox("default").delta(0, 1000)
        assert delta is not None
        receiver.offer(delta)
        registry.repair.learn("default", [change for change in delta.changes if isinstance(change, Run)])


def pulls(registry: Registry, worker: str, now: float) -> int:
    return sum(len(reply.hints.pulls) for reply in registry.repair.hints(worker, now))


@pytest.mark.parametrize("lost", [True, False])
def test_what_a_restarted_worker_lost_is_copied_anew(lost: bool) -> None:
    registry = Registry(CONFIG, ["default"], 0.0, copies={"default": Copies(2)})
    directory = registry.inboxes["default"].directory
    directory.learn_spec(FULL)
    directory.learn_shard(Shard.whole(FULL))
    sources = {name: ListSource(name) for name in "ab"}
    for source in sources.values():
        source.add("default", prompt(1, 4))
        announce(registry, source, 0.0)
    for _ in range(3):
        registry.tick(0.1)
    assert pulls(registry, "a", 0.1) == pulls(registry, "b", 0.1) == 0  # two copies, as wanted
    again = ListSource("b", epoch=2)
    if not lost:
        again.add("default", prompt(1, 4))
    announce(registry, again, 0.2)
    registry.tick(0.3)
    assert pulls(registry, "a", 0.3) == 0 and pulls(registry, "b", 0.3) == (1 if lost else 0)
