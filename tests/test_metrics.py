"""Figures and health of each process over plain HTTP: what Prometheus and a supervisor ask."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import SetupError
from kvstore.transport.http import CONNECTIONS_MAX, REQUEST_BYTES_MAX, MetricsServer
from kvstore.types import Tier
from tests.service_cluster import MiniCluster, blocks_of, check, found
from tests.service_helpers import FULL, prompt

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
        assert sample.partition("{")[0] in described
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
