"""Fidelity from end to end: a namespace of nested blocks, readers on this host and on another, planes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.cli.tables import print_status
from kvstore.client.kv_client import GetResult, KVClient
from kvstore.client.plan import HitPlan
from kvstore.codecs.batch import ready
from kvstore.config import KIB, StoreConfig
from kvstore.errors import BadRequest
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.keys import Chain, chain
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import Fidelity, Tier
from tests.service_cluster import SMALL, MiniCluster
from workers.runtime import WorkerRuntime

pytest_plugins = ["tests.redis_fixtures"]

ready(("nested", "lossless"))  # compiled before any deadline runs
SPEC = ModelSpec("nested", (Group(layers=2, kv_heads=2, k_dim=16, v_dim=16),), block_tokens=64)
BLOCKS = 24
TOKENS = np.random.default_rng(5).integers(0, 1 << 31, BLOCKS * SPEC.block_tokens, dtype=np.uint32)
RULES = '[namespaces.default]\nleast_fidelity = "compact"\ncodec = "nested"\n'


def prompt_of() -> tuple[Chain, list[np.ndarray]]:
    values = np.random.default_rng(6).standard_normal((BLOCKS, 2 * 2 * 64 * 32)).astype(np.float32)
    return chain(SPEC, TOKENS), [(row.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8) for row in values]


def worst_of(result: GetResult, raws: list[np.ndarray]) -> float:
    def floats(raw: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    buffers = result.buffers[0]
    errors = [
        np.linalg.norm(floats(np.asarray(got).view(np.uint8).ravel()) - floats(raw)) / np.linalg.norm(floats(raw))
        for got, raw in zip(buffers, raws, strict=True)
    ]
    return float(max(errors))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        yield made
        for worker in made.workers:
            await worker.store.idle()
            worker.store.validate()


async def filled(
    cluster: MiniCluster, tmp_path: Path, rules: str = RULES, store: StoreConfig = SMALL
) -> tuple[WorkerRuntime, Chain, list[np.ndarray]]:
    """A worker that has most of a prompt's blocks encoded, in host or on SSD."""
    (tmp_path / "namespaces.toml").write_text(
        rules + '[identities.all]\nrole = "node"\ntoken_sha256 = "' + "0" * 64 + '"\n'
    )
    files = {"namespaces_file": str(tmp_path / "namespaces.toml"), "token_file": str(tmp_path / "token")}
    (tmp_path / "token").write_text("one-word-of-a-cluster-token")
    await cluster.coordinator(**files)
    worker = await cluster.worker("a", ssd=not store.redis_url, store=store, **files)
    client = await cluster.client(token_file=files["token_file"])
    prefix, raws = prompt_of()
    for depth in range(BLOCKS):  # one at a time: room for the next is made before it comes
        async with asyncio.timeout(
            15
        ):  # the first encoding may load compiled loops meanwhile: a put does not wait for it
            while (await client.put(SPEC, prefix, raws[depth : depth + 1], depth)).states == ["dropped"]:
                await worker.store.idle()
        await worker.store.idle()
    assert sum(stats.blocks for stats in worker.store.stats() if stats.tier > Tier.HOT) >= BLOCKS // 2
    return worker, prefix, raws


async def looked_up(client: KVClient, prefix: Chain, least: Fidelity, blocks: int = BLOCKS) -> HitPlan:
    """Once so many blocks are known to be worth that, and no more."""
    async with asyncio.timeout(15):
        while (plan := await client.match(SPEC, prefix, least=least)).blocks != blocks:
            await asyncio.sleep(0.01)
    return plan


@pytest.mark.parametrize("far", [False, True])
async def test_planes_on_request(cluster: MiniCluster, tmp_path: Path, far: bool) -> None:
    _, prefix, raws = await filled(cluster, tmp_path)
    client = await cluster.client(far=far, token_file=str(tmp_path / "token"))
    plan = await looked_up(client, prefix, Fidelity.COMPACT)
    for planes, fidelity, most in ((1, Fidelity.COMPACT, 0.12), (2, Fidelity.NEAR, 0.008), (0, Fidelity.EXACT, 0.0)):
        result = await client.get(plan if planes else await looked_up(client, prefix, Fidelity.EXACT), planes=planes)
        assert result.blocks == BLOCKS and result.fidelity == fidelity, client.counters
        error = worst_of(result, raws)
        assert error <= most and (error > 0) == (planes > 0)


async def test_planes_that_the_plan_does_not_accept_are_refused(cluster: MiniCluster, tmp_path: Path) -> None:
    _, prefix, _ = await filled(cluster, tmp_path)
    client = await cluster.client(token_file=str(tmp_path / "token"))
    plan = await looked_up(client, prefix, Fidelity.EXACT)
    with pytest.raises(BadRequest, match="look up with a lower least"):
        await client.get(plan, planes=2)


def host_codecs(said: dict[str, Any]) -> dict[str, Any]:
    """What the first worker's host tier tells of its codecs; empty before it has told."""
    tiers = [worker["tiers"] for worker in said["workers"]]
    codecs: dict[str, Any] = tiers[0].get("host", {}).get("codecs", {}) if tiers else {}
    return codecs


async def test_status_says_what_codecs_make_of_it(
    cluster: MiniCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker, _, _ = await filled(cluster, tmp_path)
    status = worker.node.status()
    uses = {tier.tier: {use.codec: use for use in tier.codecs} for tier in status.tiers}
    host = uses[int(Tier.HOST)]["nested"]
    assert host.chunks > 0 and host.encode_s > 0 and 1.2 < host.raw_bytes / host.stored_bytes < 1.4
    client = await cluster.client(token_file=str(tmp_path / "token"))
    async with asyncio.timeout(15):
        while "nested" not in host_codecs(said := await client.cluster_status()):  # the heartbeat tells of it
            await asyncio.sleep(0.02)
    print_status(said)
    printed = capsys.readouterr().out
    shown = host_codecs(said)["nested"]["ratio"]
    assert 1.2 < shown < 1.4
    assert "nested" in printed and f"{shown:.2f}" in printed


TIGHT = replace(SMALL, hot_bytes=64 * KIB, host_bytes=320 * KIB)
"""Most blocks of the prompt lie on SSD."""


OTHER = replace(SPEC, model="other")


async def crowded(writer: KVClient, worker: WorkerRuntime, raws: list[np.ndarray]) -> None:
    """Another model's prompt comes, so that the first one moves on, its beginning too."""
    later = chain(OTHER, TOKENS)
    for depth in range(BLOCKS):
        assert (await writer.put(OTHER, later, raws[depth : depth + 1], depth)).states == ["committed"]
        await worker.store.idle()


async def test_a_lost_disk_leaves_the_planes_that_host_has(cluster: MiniCluster, tmp_path: Path) -> None:
    """To a reader on another host: no exact block any more, and every one of them still worth `compact`."""
    worker, prefix, raws = await filled(cluster, tmp_path, store=TIGHT)
    residency, stack = worker.store.stack.residency, worker.store.stack
    assert stack.SSD is not None
    client = await cluster.client(far=True, token_file=str(tmp_path / "token"))
    shard = Shard.whole(SPEC)
    start = Chain(SPEC, prefix.keys[:8])
    rows = [row for key in start.keys if (row := residency.find("default", shard.digest, key)) is not None]
    assert len(rows) == 8
    writer = await cluster.client(token_file=str(tmp_path / "token"))
    await crowded(writer, worker, raws)
    assert await writer.purge(OTHER) == BLOCKS
    assert {residency.rows.present[row] for row in rows} == {1 << stack.SSD}
    plan = await looked_up(client, start, Fidelity.COMPACT, 8)
    assert {run.fidelity for run in plan.runs} == {Fidelity.EXACT}
    assert (await client.get(plan, planes=1)).blocks == 8
    await worker.store.idle()
    assert all(residency.present(row, stack.HOST) and residency.present(row, stack.SSD) for row in rows)
    assert {residency.rows.worth(row, stack.HOST) for row in rows} == {Fidelity.COMPACT}

    for name in (tmp_path / "ssd-a").iterdir():
        if name.stat().st_size > 4096:
            name.write_bytes(bytes(name.stat().st_size))
    exact = await looked_up(client, start, Fidelity.EXACT, 8)
    assert (await client.get(exact)).blocks == 0, "the disk was read, or something else had the planes"
    await looked_up(client, start, Fidelity.EXACT, 0)
    plan = await looked_up(client, start, Fidelity.COMPACT, 8)
    assert {run.fidelity for run in plan.runs} == {Fidelity.COMPACT}
    result = await client.get(plan)
    assert result.blocks == 8 and result.fidelity == Fidelity.COMPACT
    assert 0 < worst_of(result, raws[:8]) <= 0.12


async def test_a_lost_worker_leaves_the_plane_that_redis_has(
    cluster: MiniCluster, tmp_path: Path, server: EmbeddedRedis, raw: object
) -> None:
    store = replace(TIGHT, redis_url=server.url, redis_timeout_s=0.5)
    worker, prefix, raws = await filled(cluster, tmp_path, RULES + "planes = { redis = 1 }\n", store)
    files = {"namespaces_file": str(tmp_path / "namespaces.toml"), "token_file": str(tmp_path / "token")}
    await crowded(await cluster.client(token_file=str(tmp_path / "token")), worker, raws)
    await worker.stop()
    cluster.workers.clear()
    await cluster.worker("b", store=store, **files)
    client = await cluster.client(far=True, token_file=str(tmp_path / "token"))
    async with asyncio.timeout(15):
        while not (plan := await client.match(SPEC, prefix, least=Fidelity.COMPACT)).blocks:
            await asyncio.sleep(0.02)
    assert {(run.tier, run.fidelity) for run in plan.runs} == {(Tier.REDIS, Fidelity.COMPACT)}
    assert (await client.match(SPEC, prefix, least=Fidelity.NEAR)).blocks == 0
    result = await client.get(plan)
    assert result.blocks == plan.blocks and result.fidelity == Fidelity.COMPACT
    assert 0 < worst_of(result, raws[: plan.blocks]) <= 0.12


@pytest.mark.parametrize("far", [False, True])
async def test_what_a_block_was_computed_on_travels_with_it(cluster: MiniCluster, tmp_path: Path, far: bool) -> None:
    _, prefix, raws = await filled(cluster, tmp_path)
    client = await cluster.client(far=far, token_file=str(tmp_path / "token"))
    result = await client.get(await looked_up(client, prefix, Fidelity.NEAR), planes=2)
    assert result.fidelity == Fidelity.NEAR
    other = chain(SPEC, np.concatenate([TOKENS, np.arange(SPEC.block_tokens, dtype=np.uint32)]))
    put = await client.put(SPEC, other, [raws[0]], BLOCKS, computed_on=result.fidelity)
    assert put.states == ["committed"]
    plan = await looked_up(client, other, Fidelity.NEAR, BLOCKS + 1)
    assert (await client.get(plan)).fidelity == Fidelity.NEAR
    assert (await looked_up(client, other, Fidelity.EXACT)).blocks == BLOCKS
