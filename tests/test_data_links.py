"""A client's gets and puts by raw connections: used where they are to be had, else gRPC; never wrong bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.host_link import HostLink
from kvstore.client.kv_client import KVClient
from kvstore.client.needs import LayerReady
from kvstore.errors import Unavailable
from kvstore.transport.data_client import DataClient
from kvstore.transport.data_link import DataLink
from tests.data_net import until
from tests.service_cluster import MiniCluster, blocks_of, check, found
from tests.service_helpers import FULL, prompt
from workers.outgoing import Outgoing
from workers.service import WorkerService

BLOCKS = 12


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        await made.coordinator()
        yield made


async def moved(client: KVClient, seed: int) -> None:
    """Put, looked up, got, compared."""
    prefix = prompt(seed, BLOCKS)
    put = await client.put(FULL, prefix, blocks_of(prefix))
    assert put.states == ["committed"] * BLOCKS, client.counters
    plan = await found(client, prefix, BLOCKS)
    check(plan, await client.get(plan), BLOCKS)


async def test_other_hosts_use_raw_connections_and_keep_them(cluster: MiniCluster) -> None:
    worker = await cluster.worker("one")
    client = await cluster.client(far=True)
    for seed in range(3):
        await moved(client, seed)
    assert client.counters["raw_gets"] == client.counters["raw_puts"] == 3 and not client.counters["raw_broken"]
    assert len(client._links.data._idle[worker.address]) == 1, "one connection served all of it"
    near = await cluster.client()
    await moved(near, 9)
    assert not near.counters["raw_gets"], "on the same host there is a socket and shared memory"


@pytest.mark.parametrize("why", ["none here", "none there", "an older worker", "a closed port", "a wrong ticket"])
async def test_without_one_grpc_serves(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "an older worker":
        monkeypatch.delattr(WorkerService, "data")
    worker = await cluster.worker("one", data=0 if why == "none there" else 4)
    if why == "a closed port":
        await worker._servers[1].close(0.0)
    if why == "a wrong ticket":
        monkeypatch.setattr("workers.tickets.TICKET_S", 0.0)
    client = await cluster.client(far=True, data_connections_max=0 if why == "none here" else 2)
    await moved(client, 1)
    assert not client.counters["raw_gets"] + client.counters["raw_puts"] and not client._links.data._open
    assert (worker.address in client._links.data.off) is (why != "none here")


async def test_a_restarted_worker_is_served_again(cluster: MiniCluster) -> None:
    """A connection that was kept has ended meanwhile: that is no failure of the worker that is there now."""
    worker = await cluster.worker("one")
    client = await cluster.client(far=True)
    await moved(client, 1)
    [kept] = client._links.data._idle[worker.address]
    for peer in worker._servers[1]._peers.values():  # type: ignore[attr-defined]
        peer.link.abort()
    await moved(client, 2)
    assert not kept.usable and client.counters["raw_gets"] == 2 and not client.counters["raw_broken"]


@pytest.mark.parametrize("layered", [True, False])
async def test_a_connection_that_breaks_goes_on_where_it_broke(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, layered: bool
) -> None:
    await cluster.worker("one")
    client = await cluster.client(far=True)
    prefix = prompt(1, BLOCKS)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await found(client, prefix, BLOCKS)
    monkeypatch.setattr("workers.outgoing.MESSAGE_BYTES", 4096)
    resumed: list[int] = []
    sent: list[int] = []
    taken, init = DataLink.take_frame, Outgoing.__init__
    count = 0

    def breaking(link: DataLink) -> tuple[int, bytes, int]:
        nonlocal count
        count += 1
        if count == 6:
            raise Unavailable("cut")
        return taken(link)

    def noting(outgoing: Outgoing, *args: Any, **options: Any) -> None:
        resumed.append(len(options["resume"]))
        sent.append(len(args[2].rows))
        init(outgoing, *args, **options)

    monkeypatch.setattr(DataLink, "take_frame", breaking)
    monkeypatch.setattr(Outgoing, "__init__", noting)
    seen: list[int] = []
    check(plan, await client.get(plan, on_layer=(lambda ready: seen.append(ready.layer)) if layered else None), BLOCKS)
    assert client.counters["streams_resumed"] == 1 and client.counters["raw_gets"] == 1
    assert sent[0] == BLOCKS and resumed[0] == 0
    if layered:
        assert sent[1] == BLOCKS and resumed[1] > 0 and seen == sorted(seen)
    else:
        assert 0 < sent[1] < BLOCKS, "blocks that were whole came again"


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("layered", [False, True], ids=["block by block", "layer by layer"])
async def test_bytes_that_changed_on_the_way_are_a_miss(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, place: int, layered: bool
) -> None:
    await cluster.worker("one")
    client = await cluster.client(far=True)
    prefix = prompt(1, BLOCKS)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await found(client, prefix, BLOCKS)
    each = Outgoing.each

    def flipped(outgoing: Outgoing) -> Iterator[tuple[bytes, Sequence[Any]]]:
        for header, parts in each(outgoing):
            if parts:
                changed = bytearray(parts[0])
                changed[place] ^= 1
                parts = [changed, *parts[1:]]
            yield header, parts

    monkeypatch.setattr(Outgoing, "each", flipped)
    told: list[LayerReady] = []
    result = await client.get(plan, on_layer=told.append if layered else None)
    assert result.blocks == 0 and client.counters["failed_Corrupt"] >= 1 and not told
    assert client.counters["raw_gets"] == 1, "a negative control: it went that way"


async def test_space_that_is_reused_while_it_is_sent_is_a_miss(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await cluster.worker("one")
    client = await cluster.client(far=True)
    prefix = prompt(1, BLOCKS)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await found(client, prefix, BLOCKS)
    current, asked = Outgoing._current, 0

    def reused(outgoing: Outgoing, block: int) -> bool:
        nonlocal asked
        asked += block == 3
        return current(outgoing, block) and not (block == 3 and asked > 1)

    monkeypatch.setattr(Outgoing, "_current", reused)
    result = await client.get(plan)
    assert result.blocks == 3
    await until(lambda: worker.node.counters["blocks_lost_in_flight"] == 1)  # once it has let go of the blocks
    assert client.counters["raw_gets"] == 1


async def test_a_client_that_leaves_takes_everything_along(cluster: MiniCluster) -> None:
    await cluster.worker("one")
    client = await cluster.client(far=True)
    await moved(client, 1)
    data = client._links.data
    await client.close()
    assert not data._idle and not data._busy and not data._open and data._own is None


@pytest.mark.parametrize("far", [True, False])
async def test_an_answer_that_was_lost_costs_nothing(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    """The blocks were committed and nobody heard of it: putting them again finds them held, once each."""
    worker = await cluster.worker("one")
    client = await cluster.client(far=far)
    owner, name = (DataClient, "put") if far else (HostLink, "commit")
    call, lost = getattr(owner, name), 0

    async def losing(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal lost
        answer = await call(self, *args, **options)
        lost += 1
        if lost == 1:
            raise Unavailable("the answer was lost")
        return answer

    monkeypatch.setattr(owner, name, losing)
    prefix = prompt(1, BLOCKS)
    put = await client.put(FULL, prefix, blocks_of(prefix))
    assert put.states == ["held"] * BLOCKS and put.tokens and lost >= 1
    assert worker.store.blocks("default") == worker.store.counters["puts_committed"] == BLOCKS
    plan = await found(client, prefix, BLOCKS)
    check(plan, await client.get(plan), BLOCKS)
