"""Fidelity from end to end: a namespace of nested blocks, readers on this host and on another, planes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.client import KVClient
from kvstore.errors import BadRequest
from kvstore.keys import Chain, chain
from kvstore.plan import HitPlan
from kvstore.spec import Group, ModelSpec
from kvstore.types import Fidelity, Tier
from tests.service_cluster import SMALL, MiniCluster
from workers.runtime import WorkerRuntime

SPEC = ModelSpec("nested", (Group(layers=2, kv_heads=2, k_dim=16, v_dim=16),), block_tokens=64)
BLOCKS = 24
RULES = '[namespaces.default]\nleast_fidelity = "compact"\ncodec = "nested"\n'


def prompt_of() -> tuple[Chain, list[np.ndarray]]:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 1 << 31, BLOCKS * SPEC.block_tokens, dtype=np.uint32)
    values = rng.standard_normal((BLOCKS, 2 * 2 * 64 * 32)).astype(np.float32)
    return chain(SPEC, tokens), [(row.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8) for row in values]


def worst(result: object, raws: list[np.ndarray]) -> float:
    def floats(raw: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    buffers = result.buffers[0]  # type: ignore[attr-defined]
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


async def filled(cluster: MiniCluster, tmp_path: Path) -> tuple[WorkerRuntime, Chain, list[np.ndarray]]:
    """A worker that has most of a prompt's blocks encoded, in host or on SSD."""
    (tmp_path / "namespaces.toml").write_text(
        RULES + '[identities.all]\nrole = "node"\ntoken_sha256 = "' + "0" * 64 + '"\n'
    )
    files = {"namespaces_file": str(tmp_path / "namespaces.toml"), "token_file": str(tmp_path / "token")}
    (tmp_path / "token").write_text("one-word-of-a-cluster-token")
    await cluster.coordinator(**files)
    worker = await cluster.worker("a", ssd=True, store=SMALL, **files)
    client = await cluster.client(token_file=files["token_file"])
    prefix, raws = prompt_of()
    for depth in range(BLOCKS):  # one at a time: room for the next is made before it comes
        put = await client.put(SPEC, prefix, raws[depth : depth + 1], depth)
        assert put.states == ["committed"]
        await worker.store.idle()
    assert sum(stats.blocks for stats in worker.store.stats() if stats.tier in (Tier.HOST, Tier.SSD)) >= BLOCKS // 2
    return worker, prefix, raws


async def looked_up(client: KVClient, prefix: Chain, least: Fidelity) -> HitPlan:
    async with asyncio.timeout(15):
        while (plan := await client.match(SPEC, prefix, least=least)).blocks < BLOCKS:
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
        error = worst(result, raws)
        assert error <= most and (error > 0) == (planes > 0)


async def test_planes_that_the_plan_does_not_accept_are_refused(cluster: MiniCluster, tmp_path: Path) -> None:
    _, prefix, _ = await filled(cluster, tmp_path)
    client = await cluster.client(token_file=str(tmp_path / "token"))
    plan = await looked_up(client, prefix, Fidelity.EXACT)
    with pytest.raises(BadRequest, match="look up with a lower least"):
        await client.get(plan, planes=2)


async def test_status_says_what_codecs_make_of_it(cluster: MiniCluster, tmp_path: Path) -> None:
    worker, _, _ = await filled(cluster, tmp_path)
    status = worker.node.status()
    uses = {tier.tier: {use.codec: use for use in tier.codecs} for tier in status.tiers}
    host = uses[int(Tier.HOST)]["nested"]
    assert host.chunks > 0 and host.encode_s > 0 and 1.2 < host.raw_bytes / host.stored_bytes < 1.4
