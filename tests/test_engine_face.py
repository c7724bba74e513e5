"""The client without an event loop: submit, poll, wait, close; against a real cluster in another thread's loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client.engine_face import Done, EngineClient
from kvstore.client.kv_client import GetResult, KVClient
from kvstore.client.needs import LayerReady
from kvstore.client.plan import HitPlan
from kvstore.client.put_blocks import PutResult
from kvstore.config import ClientConfig
from kvstore.errors import BadRequest, NotGranted
from kvstore.spec import Shard
from tests.service_cluster import MiniCluster, blocks_of, check
from tests.service_helpers import FULL, payload, prompt


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        await made.coordinator()
        await made.worker("a")
        yield made


async def engine(cluster: MiniCluster, work: Callable[[EngineClient], None], **config: Any) -> None:
    """Run `work` in a thread that, like an engine's, has no event loop."""

    def run() -> None:
        with EngineClient(ClientConfig(coordinators=cluster.addresses, **config)) as client:
            work(client)

    await asyncio.to_thread(run)
    assert [thread for thread in threading.enumerate() if thread.name == "kvstore-client"] == []


def finished(client: EngineClient, count: int) -> dict[int, Done]:
    """Poll until so many are done, as a scheduler does between steps."""
    done: dict[int, Done] = {}
    waited = threading.Event()
    for _ in range(2000):
        for one in client.poll():
            assert one.ticket not in done
            done[one.ticket] = one
        if len(done) == count:
            return done
        waited.wait(0.005)
    raise AssertionError(f"{len(done)} of {count} operations ended")


async def test_submit_and_poll(cluster: MiniCluster) -> None:
    prefixes = [prompt(seed, 5) for seed in range(10)]

    def work(client: EngineClient) -> None:
        puts = [client.submit_put(FULL, prefix, blocks_of(prefix)) for prefix in prefixes]
        assert None not in puts
        done = finished(client, 10)
        assert set(done) == set(puts)
        for one in done.values():
            assert isinstance(one.value, PutResult) and one.value.states == ["committed"] * 5
        for prefix in prefixes:
            ticket = client.submit_match(FULL, prefix)
            assert ticket is not None
            match = client.wait(ticket, 5.0)
            assert match is not None and isinstance(match.value, HitPlan) and match.value.blocks == 5
            into = [[np.zeros(len(payload(FULL, Shard.whole(FULL), key)), np.uint8) for key in prefix.keys]]
            ticket = client.submit_get(match.value, into)
            assert ticket is not None
            got = client.wait(ticket, 5.0)
            assert got is not None and isinstance(got.value, GetResult)
            check(match.value, got.value, 5)
            told: list[LayerReady] = []
            ticket = client.submit_get(match.value, layers=range(1, 2), on_layer=told.append)
            assert ticket is not None
            got = client.wait(ticket, 5.0)
            assert got is not None and isinstance(got.value, GetResult) and got.value.blocks == 5
            assert told == [LayerReady(1, 5)]
            ticket = client.submit_prefetch(match.value)
            assert ticket is not None
            ready = client.wait(ticket, 5.0)
            assert ready is not None and ready.value == 5
        assert client.poll() == []

    await engine(cluster, work)


async def test_errors_come_late_and_only_for_wrong_arguments(cluster: MiniCluster) -> None:
    def work(client: EngineClient) -> None:
        ticket = client.submit_match(FULL, [-1] * 8)
        assert ticket is not None
        done = client.wait(ticket, 5.0)
        assert done is not None and isinstance(done.error, BadRequest) and done.value is None
        with pytest.raises(BadRequest):
            client.wait(ticket, 0.0)
        with pytest.raises(BadRequest):
            client.wait(999, 0.0)

    await engine(cluster, work)
    with pytest.raises(NotGranted):
        await engine(cluster, work, namespace="nobodys")


async def test_what_is_in_flight_is_bounded_and_ends_with_the_client(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.client.engine_face.INFLIGHT_MAX", 3)

    async def never(self: KVClient, *args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(KVClient, "match", never)

    def work(client: EngineClient) -> None:
        tickets = [client.submit_match(FULL, prompt(1, 1)) for _ in range(4)]
        assert tickets[3] is None and None not in tickets[:3]
        assert tickets[0] is not None and client.wait(tickets[0], 0.01) is None
        client.close()
        assert [done.value for done in client.poll()] == [None] * 3

    await engine(cluster, work)


async def test_after_a_fork_it_says_so(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(client: EngineClient) -> None:
        here = os.getpid()
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: here + 1)
            with pytest.raises(BadRequest, match="fork"):
                client.poll()
            with pytest.raises(BadRequest, match="fork"):
                client.submit_match(FULL, prompt(1, 1))

    await engine(cluster, work)
