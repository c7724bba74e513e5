"""Figures and health of each process over plain HTTP: what Prometheus and a supervisor ask."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.auth import Authenticator, load_policy
from kvstore.config import MIB
from kvstore.errors import SetupError
from kvstore.histogram import BOUNDS_S, Histogram, quantile
from kvstore.spec import Shard
from kvstore.transport.base import CallContext
from kvstore.transport.http import CONNECTIONS_MAX, REQUEST_BYTES_MAX, MetricsServer
from kvstore.types import Fidelity, Tier
from kvstore.views import visible_status
from kvstore.wire import common_pb2
from tests.service_cluster import STORE, MiniCluster, blocks_of, check, found, put_slowly
from tests.service_helpers import FULL, LARGE, prompt, until

LINE = re.compile(r'kvstore_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+')


async def ask(address: str, path: str, *headers: str, raw: bytes | None = None) -> tuple[int, str]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = [f"GET {path} HTTP/1.1", f"Host: {address}", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode() if raw is None else raw)
    async with asyncio.timeout(10):
        answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return (int(head.split(" ")[1]) if head else 0), body


def figures(page: str) -> dict[str, float]:
    """Sample -> value; every line is Prometheus's, every family is described before its samples."""
    found: dict[str, float] = {}
    described: set[str] = set()
    for line in page.splitlines():
        if line.startswith("# "):
            described.add(line.split(" ")[2])
            continue
        assert LINE.fullmatch(line), line
        sample, _, value = line.rpartition(" ")
        family = sample.partition("{")[0]
        assert family in described or re.sub("_(bucket|sum|count)$", "", family) in described
        assert sample not in found
        found[sample] = float(value)
    return found


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        yield made


async def ready(address: str) -> None:
    """A coordinator is complete once a lease has passed and everything its members say is in."""
    async with asyncio.timeout(20):
        while (await ask(address, "/readyz"))[0] != 200:
            await asyncio.sleep(0.01)


async def test_what_was_done_shows_in_the_figures(cluster: MiniCluster) -> None:
    coordinator = await cluster.coordinator(metrics_bind="127.0.0.1:0")
    worker = await cluster.worker("a", metrics_bind="127.0.0.1:0")
    client = await cluster.client()
    prefix = prompt(1, 40)
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await found(client, prefix, 40)
    check(plan, await client.get(plan), 40)
    status, page = await ask(worker.metrics_address, "/metrics")
    assert status == 200
    mine = figures(page)
    assert mine['kvstore_tier_blocks{tier="hot"}'] == 40
    assert mine['kvstore_tier_hits_total{tier="hot"}'] == 40
    assert mine['kvstore_tier_used_bytes{tier="hot"}'] == worker.store.use("default").tiers[Tier.HOT]
    assert 0 < mine['kvstore_tier_used_bytes{tier="hot"}'] < mine['kvstore_tier_capacity_bytes{tier="hot"}']
    assert mine['kvstore_tier_state{tier="hot",state="ok"}'] == 1
    assert mine['kvstore_tier_state{tier="hot",state="down"}'] == 0
    assert mine[f'kvstore_info{{role="worker",id="{worker.identity.worker}",node="a"}}'] == 1
    await ready(coordinator.metrics_address)
    _, page = await ask(coordinator.metrics_address, "/metrics")
    its = figures(page)
    assert its["kvstore_directory_blocks"] == 40 and its["kvstore_directory_complete"] == 1
    assert its['kvstore_workers{state="alive"}'] == 1
    assert its['kvstore_events_total{event="matches"}'] >= 1
    assert "default" not in page, "no namespace is named"


async def test_health_says_alive_and_ready(cluster: MiniCluster) -> None:
    coordinator = await cluster.coordinator(metrics_bind="127.0.0.1:0")
    worker = await cluster.worker("a", metrics_bind="127.0.0.1:0")
    for address in (coordinator.metrics_address, worker.metrics_address):
        assert await ask(address, "/healthz") == (200, "alive\n")
    assert await ask(worker.metrics_address, "/readyz?verbose") == (200, "ready\n")
    await ready(coordinator.metrics_address)
    await worker.stop()
    with pytest.raises(OSError):
        await ask(worker.metrics_address, "/healthz")


async def test_beyond_loopback_figures_want_a_token_and_health_does_not(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-sixteen-characters")
    auth = Authenticator(load_policy(token_file=str(token), bind="0.0.0.0:0"))
    server = await MetricsServer(lambda: "figures\n", lambda: False, auth).start("0.0.0.0:0")
    try:
        address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        assert (await ask(address, "/metrics"))[0] == 401
        assert (await ask(address, "/metrics", "Authorization: Bearer another-token-altogether"))[0] == 401
        right = "Authorization: Bearer a-token-of-sixteen-characters"
        assert await ask(address, "/metrics", right) == (200, "figures\n")
        assert (await ask(address, "/healthz"))[0] == 200
        assert (await ask(address, "/readyz"))[0] == 503
    finally:
        await server.close(1.0)


async def test_bad_requests_are_answered_and_bounded() -> None:
    server = await MetricsServer(lambda: "", lambda: True, Authenticator(load_policy())).start("127.0.0.1:0")
    try:
        assert (await ask(server.address, "/other"))[0] == 404
        for raw in (b"POST /metrics HTTP/1.1\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET /" + b"x" * 2 * REQUEST_BYTES_MAX):
            assert (await ask(server.address, "", raw=raw))[0] == 400
        host, _, port = server.address.rpartition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS_MAX)]
        assert (await ask(server.address, "/healthz"))[0] == 0, "beyond the bound a connection is closed"
        for _, writer in idle:
            writer.close()
    finally:
        await server.close(1.0)
    with pytest.raises(SetupError, match="HOST:PORT"):
        await MetricsServer(lambda: "", lambda: True, Authenticator(load_policy())).start("nowhere")


def moved(before: dict[str, float], after: dict[str, float], prefix: str) -> float:
    """By how much the samples that begin so have grown, all together."""
    return sum(value - before.get(name, 0.0) for name, value in after.items() if name.startswith(prefix))


async def test_every_figure_moves_with_what_happens(cluster: MiniCluster) -> None:
    """The ten an operator needs: before and after blocks are stored, spilled, loaded, missed, dropped, refused."""
    coordinator = await cluster.coordinator(metrics_bind="127.0.0.1:0")
    tight = replace(STORE, host_bytes=4 * MIB, hot_bytes=1 * MIB, put_wait_s=5.0, segment_bytes=1 * MIB)
    worker = await cluster.worker("a", ssd=True, store=tight, metrics_bind="127.0.0.1:0")

    async def both() -> tuple[dict[str, float], dict[str, float]]:
        pages = [(await ask(one.metrics_address, "/metrics"))[1] for one in (worker, coordinator)]
        return figures(pages[0]), figures(pages[1])

    client = await cluster.client()
    mine, its = await both()
    prefixes = [prompt(seed, 40, LARGE) for seed in range(3)]
    for prefix in prefixes:  # more than memory holds
        await put_slowly(client, worker, prefix)
    for prefix in prefixes:
        await client.get(await found(client, prefix, 40))
    await client.put(LARGE, prompt(7, 1, LARGE), blocks_of(prompt(7, 1, LARGE)))
    await client.get(await found(client, prompt(7, 1, LARGE), 1))
    worker.node.draining = True
    put = await client.put(LARGE, prompt(9, 1, LARGE), blocks_of(prompt(9, 1, LARGE)))
    worker.node.draining = False
    assert put.states == ["dropped"]
    await client.get(await client.match(LARGE, prompt(9, 1, LARGE)))
    root, shard = LARGE.root, Shard.whole(LARGE).digest
    hold = await worker.store.open("default", root, [(shard, b"nobody has this!")], least=Fidelity.EXACT, redis=False)
    worker.store.release(hold.id)
    worker.store.stack.counters["corrupt"] += 1  # as `Stack.damaged` does
    await until(lambda: coordinator.service.whole_status().lag == 0, "everything is announced")
    after_mine, after_its = await both()
    for name in (
        'tier_hits_total{tier="hot"}', 'tier_hits_total{tier="ssd"}', "misses_total", 'tier_used_bytes{tier="ssd"}',
        'tier_blocks{tier="ssd"}', 'load_seconds_count{tier="ssd"}', 'load_seconds_sum{tier="ssd"}',
        "get_seconds_count", "spills_total", "stores_dropped_total", 'errors_total{kind="corrupt"}',
        "saved_prefill_tokens_total",
    ):  # fmt: skip
        assert moved(mine, after_mine, f"kvstore_{name}") > 0, name
    for name in ("directory_blocks", "match_seconds_count", "match_seconds_sum", "matched_blocks_total"):
        assert moved(its, after_its, f"kvstore_{name}") > 0, name
    assert after_mine["kvstore_coordinators"] == 1 and after_mine['kvstore_tier_capacity_bytes{tier="ssd"}'] > 0
    buckets = [v for n, v in after_mine.items() if n.startswith('kvstore_load_seconds_bucket{tier="ssd"')]
    assert buckets == sorted(buckets) and buckets[-1] == after_mine['kvstore_load_seconds_count{tier="ssd"}']
    served = sum(v for n, v in after_mine.items() if n.startswith("kvstore_tier_hits_total"))
    assert after_mine["kvstore_saved_prefill_tokens_total"] == served * LARGE.block_tokens


async def test_lag_is_what_a_coordinator_has_not_acknowledged(cluster: MiniCluster) -> None:
    coordinator = await cluster.coordinator()
    worker = await cluster.worker("a")
    client = await cluster.client()
    await until(lambda: worker.announcer.connected == 1, "it is welcome")
    prefix = prompt(1, 40)
    await client.put(FULL, prefix, blocks_of(prefix))
    assert worker.announcer.lag == 40, "no heartbeat was answered since"
    await until(lambda: worker.announcer.lag == 0, "the next heartbeat is answered")
    await coordinator.stop()
    await until(lambda: worker.announcer.connected == 0, "the connection has ended")
    await client.put(FULL, prompt(2, 40), blocks_of(prompt(2, 40)))
    assert worker.announcer.lag == 0, "only of those that are connected"


def test_quantiles_and_buckets() -> None:
    histogram = Histogram()
    assert quantile(BOUNDS_S, histogram.counts, 0.5) is None
    for seconds in (0.0001, 0.0004, 0.0004, 0.0004, 99.0):
        histogram.add(seconds)
    assert histogram.counts[0] == 1 and histogram.counts[2] == 3 and histogram.counts[-1] == 1
    assert quantile(BOUNDS_S, histogram.counts, 0.2) == 0.0001
    assert BOUNDS_S[1] < (quantile(BOUNDS_S, histogram.counts, 0.5) or 0) <= BOUNDS_S[2]
    assert quantile(BOUNDS_S, histogram.counts, 0.99) == BOUNDS_S[-1]


def test_a_client_sees_no_figures_of_others() -> None:
    whole = common_pb2.WorkerStatus(lag=3, saved_tokens=2.0, coordinators=1, counters={"misses": 1})
    whole.latencies.add(what="get", counts=[1])
    seen = visible_status(whole, CallContext("someone", "client", "default", ""))
    assert seen == common_pb2.WorkerStatus()
    assert visible_status(whole, CallContext("operator", "node", "default", "")) == whole
