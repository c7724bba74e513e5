"""A rolling upgrade: processes of the version before serve beside new ones, and refuse nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.wire import common_pb2, coordinator_pb2
from tests.older import OlderTransport, older
from tests.service_cluster import MiniCluster, blocks_of, check, found
from tests.service_helpers import FULL, prompt, until


class Mixed(MiniCluster):
    """Some of its processes are of the version before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.new: Any = self.transport
        self.old: Any = OlderTransport(self.transport)

    def version(self, old: bool) -> None:
        self.transport = self.old if old else self.new


@pytest.fixture
async def mixed(tmp_path: Path) -> AsyncIterator[Mixed]:
    async with Mixed(tmp_path) as made:
        yield made


@pytest.mark.parametrize("old_coordinator", [False, True])
@pytest.mark.parametrize("old_worker", [False, True])
async def test_every_mixture_stores_and_serves(mixed: Mixed, old_coordinator: bool, old_worker: bool) -> None:
    """An old and a new client, an old or new worker and coordinator; the other worker is new."""
    mixed.version(old_coordinator)
    coordinator = await mixed.coordinator()
    mixed.version(old_worker)
    first = await mixed.worker("first", ssd=True)
    mixed.version(False)
    second = await mixed.worker("second")
    for number, old_client in enumerate((True, False)):
        mixed.version(old_client)
        near, far = await mixed.client(workers=(first.socket,)), await mixed.client(far=True)
        prefix = prompt(number, 40)
        put = await near.put(FULL, prefix, blocks_of(prefix))
        assert put.states == ["committed"] * 40
        for client in (near, far):
            plan = await found(client, prefix, 40)
            check(plan, await client.get(plan), 40)
    assert bool(mixed.old.lost) and second.store.blocks("default") + first.store.blocks("default") == 80
    assert coordinator.service.whole_status().directory_blocks >= 80
    assert not [name for name in (*first.announcer.counters, *second.announcer.counters) if name.startswith("refused")]


async def test_an_old_coordinator_beside_a_new_one_is_told_everything(mixed: Mixed) -> None:
    """Snapshots too: to the new one by turns, to the old one at once."""
    mixed.version(False)
    new = await mixed.coordinator()
    worker = await mixed.worker("a")
    client = await mixed.client()
    prefix = prompt(1, 40)
    await client.put(FULL, prefix, blocks_of(prefix))
    worker.store.outbox("default")._kept.clear()  # so that nothing but a snapshot tells them
    worker.store.outbox("default")._start = worker.store.outbox("default").head + 1
    mixed.version(True)
    old = await mixed.coordinator(coordinators=(new.address,))
    for coordinator in (new, old):
        directory = coordinator.registry.inboxes["default"].directory
        await until(lambda directory=directory: directory.blocks == 40, "it knows every block", 20.0)
    assert mixed.old.lost["Welcome.snapshot_turns"] > 0 and old.registry.counters["snapshots_unasked"] > 0
    assert {info.address for info in old.service.coordinators()} == {new.address, old.address}


def test_what_an_older_process_loses_is_what_came_since() -> None:
    """The negative control: without it nothing would be old."""
    lost: Counter[str] = Counter()
    message = coordinator_pb2.AnnounceReply(
        welcome=coordinator_pb2.Welcome(
            snapshot_turns=True, lease_ms=3, self=common_pb2.CoordinatorInfo(host="h", id="c")
        )
    )
    older(message, lost)
    assert message.welcome.lease_ms == 3 and message.welcome.self.id == "c"
    assert not message.welcome.snapshot_turns and not message.welcome.self.host and len(lost) == 2
    hello = older(common_pb2.HelloReply(capabilities=["get.v1", "next.v9"], incomplete=True), lost)
    assert list(hello.capabilities) == ["get.v1"] and not hello.incomplete
