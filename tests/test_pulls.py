"""Blocks pulled from another worker: what does not hold is never seen, and whoever gives up leaves no space taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from kvstore.header import Header
from kvstore.spec import Shard
from kvstore.store.adopting import Adoption
from tests.service_cluster import MiniCluster, blocks_of
from tests.service_helpers import FULL, prompt
from workers.puller import Job
from workers.runtime import WorkerRuntime

PREFIX = prompt(1, 8)
WHOLE = Shard.whole(FULL)


def job(source: WorkerRuntime) -> Job:
    where = ((source.identity.worker, source.address),)
    return Job("default", FULL, WHOLE, PREFIX.group(0), tuple(PREFIX.keys), where)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[WorkerRuntime, WorkerRuntime]]:
    """The second has eight blocks, raw, in hot."""
    async with MiniCluster(tmp_path) as cluster:
        first, second = await cluster.worker("one"), await cluster.worker("two")
        client = await cluster.client(alone=True, workers=(second.socket,))
        assert (await client.put(FULL, PREFIX, blocks_of(PREFIX))).states == ["committed"] * len(PREFIX)
        yield first, second


async def settled(worker: WorkerRuntime) -> None:
    await worker.store.idle()
    worker.store.validate()


async def test_a_block_whose_bytes_broke_at_the_source_is_not_taken(two: tuple[WorkerRuntime, WorkerRuntime]) -> None:
    first, second = two
    stack = second.store.stack
    row = stack.residency.find("default", WHOLE.digest, PREFIX.keys[3])
    assert row is not None
    place = stack.residency.location(row, stack.HOT)
    stack.hot.view(place)[5] ^= 1
    tally = await first.puller.pull(job(second))
    assert (tally.committed, tally.missing, tally.left) == (7, 1, [PREFIX.keys[3]])
    assert first.node.counters["pulled_bad"] == 1 and not first.store.holds("default", WHOLE.digest, PREFIX.keys[3])
    await settled(first)
    stack.hot.view(place)[5] ^= 1
    assert (await first.puller.pull(job(second))).committed == 1, "the control: it was only that bit"
    await settled(first)


async def test_a_pull_that_is_given_up_gives_its_space_back(
    two: tuple[WorkerRuntime, WorkerRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    roomy, make_room = asyncio.Event(), Adoption.make_room

    async def stuck(self: Adoption, headers: Sequence[Header | None]) -> list[memoryview | None]:
        assert all(await make_room(self, headers))
        roomy.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    monkeypatch.setattr(Adoption, "make_room", stuck)
    pulling = asyncio.create_task(first.puller.pull(job(second)))
    await roomy.wait()
    assert first.store.adopting.busy and first.store.stack.hot.used > 0
    await first.puller.stop()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert not first.store.adopting.busy and first.store.stack.hot.used == first.store.blocks("default") == 0
    await settled(first)
