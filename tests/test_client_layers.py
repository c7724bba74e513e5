"""Layers as they arrive, ranges of layers, memory in many parts, and streams that go on where they broke."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import arrivals, sources
from kvstore.client.arrivals import Arrivals
from kvstore.client.kv_client import KVClient
from kvstore.client.needs import LayerReady
from kvstore.client.plan import HitPlan
from kvstore.errors import BadRequest, Unavailable
from kvstore.format import decode_chunks
from kvstore.keys import Chain
from kvstore.layout import block_bytes, chunks
from kvstore.spec import Group, ModelSpec, Shard
from tests.service_cluster import SMALL, STORE, MiniCluster, blocks_of, found, put_slowly
from tests.service_helpers import prompt
from workers import outgoing
from workers.service import WorkerService

DEEP = ModelSpec("deep", (Group(layers=6, kv_heads=4, k_dim=8, v_dim=8),), dtype="float32", block_tokens=4)
WHOLE = Shard.whole(DEEP)
SIZE = block_bytes(DEEP, WHOLE)
A_LAYER = SIZE // 6


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MiniCluster]:
    monkeypatch.setattr(sources, "INLINE_BYTES", 0)
    monkeypatch.setattr(outgoing, "FIRST_SHARE", 1)
    monkeypatch.setattr(outgoing, "MESSAGE_BYTES", 4 * A_LAYER)  # so that layers come in messages of their own
    async with MiniCluster(tmp_path) as made:
        await made.coordinator()
        yield made


async def stored(cluster: MiniCluster, blocks: int = 4) -> tuple[Chain, list[np.ndarray]]:
    await cluster.worker("a")
    near = await cluster.client()
    prefix = prompt(5, blocks, DEEP)
    raws = blocks_of(prefix)
    await put_all(near, prefix, raws)
    return prefix, raws


async def put_all(client: KVClient, prefix: Chain, raws: list[Any]) -> None:
    """Again where a busy machine dropped something: a put is idempotent."""
    for _ in range(20):
        if set((await client.put(prefix.spec, prefix, raws)).states) <= {"committed", "held"}:
            return
    raise AssertionError(f"never stored: {client.counters}")


@pytest.mark.parametrize("far", [False, True], ids=["same host", "other host"])
async def test_every_layer_is_told_in_order_with_its_bytes_in_place(cluster: MiniCluster, far: bool) -> None:
    prefix, raws = await stored(cluster)
    client = await cluster.client(far=far)
    plan = await found(client, prefix, 4)
    into = [np.zeros(SIZE, np.uint8) for _ in raws]
    told: list[LayerReady] = []

    def ready(layer: LayerReady) -> None:
        told.append(layer)
        at = slice(layer.layer * A_LAYER, (layer.layer + 1) * A_LAYER)
        assert all(np.array_equal(have[at], raw[at]) for have, raw in zip(into, raws, strict=True))

    result = await client.get(plan, [into], on_layer=ready)
    assert told == [LayerReady(layer, 4) for layer in range(6)] and result.blocks == 4


async def test_layers_come_before_the_stream_ends(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last message is held back until the first layers were told."""
    prefix, _ = await stored(cluster)
    client = await cluster.client(far=True)
    plan = await found(client, prefix, 4)
    told = asyncio.Event()
    send = WorkerService._stream

    async def held_back(self: WorkerService, out: outgoing.Outgoing) -> AsyncGenerator[bytes, None]:
        frames = [frame async for frame in send(self, out)]
        for frame in frames[:-1]:
            yield frame
        await told.wait()
        yield frames[-1]

    monkeypatch.setattr(WorkerService, "_stream", held_back)
    seen = []
    async with client.layers(plan) as coming:
        async for ready in coming:
            seen.append(ready.layer)
            if ready.layer == 1:
                told.set()
        assert (await coming.result()).blocks == 4
    assert seen == list(range(6))


async def test_a_layer_stream_left_early_gives_the_rest_up(cluster: MiniCluster) -> None:
    prefix, _ = await stored(cluster)
    client = await cluster.client(far=True)
    plan = await found(client, prefix, 4)
    async with client.layers(plan) as coming:
        async for ready in coming:
            assert ready.layer == 0
            break
    assert (await client.get(plan)).blocks == 4


@pytest.mark.parametrize("far", [False, True], ids=["same host", "other host"])
async def test_a_range_of_layers_takes_only_their_bytes(cluster: MiniCluster, far: bool) -> None:
    prefix, raws = await stored(cluster)
    client = await cluster.client(far=far)
    plan = await found(client, prefix, 4)
    told: list[int] = []
    result = await client.get(plan, layers=range(2, 5), on_layer=lambda ready: told.append(ready.layer))
    assert told == [2, 3, 4] and result.blocks == 4 and result.bytes == 4 * 3 * A_LAYER
    for have, raw in zip(result.buffers[0], raws, strict=True):
        assert np.array_equal(have, raw[2 * A_LAYER : 5 * A_LAYER])
    for wrong in (range(0), range(0, 4, 2), range(-1, 2)):
        with pytest.raises(BadRequest):
            await client.get(plan, layers=wrong)
    beyond = await client.get(plan, layers=range(6, 8))
    assert beyond.buffers == [[None] * 4] and beyond.bytes == 0


@pytest.mark.parametrize("far", [False, True], ids=["same host", "other host"])
async def test_blocks_are_scattered_over_an_engines_pages(cluster: MiniCluster, far: bool) -> None:
    """One buffer for each layer's K and V of each block: slices of an engine's cache tensors, here of bfloat16."""
    prefix, raws = await stored(cluster)
    client = await cluster.client(far=far)
    plan = await found(client, prefix, 4)
    pages = torch.zeros((6, 2, 16, A_LAYER // 4), dtype=torch.bfloat16)  # layer, K or V, page, bytes
    slots = [11, 3, 8, 0]
    into = [[[pages[layer, part, slot] for layer in range(6) for part in range(2)] for slot in slots]]
    told: list[int] = []
    result = await client.get(plan, into, on_layer=lambda ready: told.append(ready.layer))
    assert result.blocks == 4 and told == list(range(6))
    raw_pages = pages.view(torch.uint8).numpy()
    for slot, raw in zip(slots, raws, strict=True):
        assert np.array_equal(raw_pages[:, :, slot].reshape(-1), raw)
    assert not raw_pages[:, :, [1, 2, 4, 5]].any()  # nobody else's page was touched
    for wrong in (
        [np.zeros(SIZE - 1, np.uint8), np.zeros(2, np.uint8)],
        [],
        [bytes(SIZE)],
        pages[:, 0],
        torch.zeros(3),
    ):
        with pytest.raises(BadRequest):
            await client.get(plan, [[wrong] * 4])
    tensors = [torch.from_numpy(raw.copy()).view(torch.float32) for raw in raws]
    other = prompt(6, 4, DEEP)
    await put_all(client, other, tensors)


@pytest.mark.parametrize("far", [False, True], ids=["same host", "other host"])
async def test_heads_cut_out_are_scattered_too(cluster: MiniCluster, far: bool) -> None:
    prefix, raws = await stored(cluster)
    client = await cluster.client(far=far)
    half = Shard(0, 0, 6, 2, 2)
    plan = await found(client, prefix, 4, [half])
    into = [[np.zeros(SIZE // 24, np.uint8) for _ in range(12)] for _ in raws]
    result = await client.get(plan, [into])
    assert result.blocks == 4
    for parts, raw in zip(into, raws, strict=True):
        for part, chunk in zip(parts, chunks(DEEP, WHOLE), strict=True):
            rows = raw[chunk.offset : chunk.offset + chunk.nbytes].reshape(4, 4, -1)
            assert np.array_equal(part, rows[:, 2:].reshape(-1))


@pytest.mark.parametrize("far", [False, True], ids=["same host", "other host"])
async def test_encoded_blocks_come_by_layers_too(cluster: MiniCluster, far: bool) -> None:
    worker = await cluster.worker("small", store=SMALL)
    near = await cluster.client()
    prefix = prompt(7, 40, DEEP)
    await put_slowly(near, worker, prefix)
    client = await cluster.client(far=far)
    plan = await found(client, prefix, 40)
    assert len({run.tier for run in plan.runs}) > 1, "all blocks lie in one tier: the test says nothing"
    into = [[np.zeros(A_LAYER, np.uint8) for _ in range(3)] for _ in range(40)]
    told: list[int] = []
    result = await client.get(plan, [into], layers=range(1, 4), on_layer=lambda ready: told.append(ready.layer))
    assert result.blocks == 40 and told == [1, 2, 3]
    for parts, raw in zip(into, blocks_of(prefix), strict=True):
        assert np.array_equal(np.concatenate(parts), raw[A_LAYER : 4 * A_LAYER])


# --- streams that break --------------------------------------------------------------------------------------------


class Breaking:
    """Makes every worker's Get break after some frames, a number of times, and remembers what it was to go on from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, frames: int) -> None:
        self.times, self.resumed, self.sent = times, list[dict[int, tuple[int, int]]](), list[int]()
        send = WorkerService._stream

        async def breaking(service: WorkerService, out: outgoing.Outgoing) -> AsyncGenerator[bytes, None]:
            self.resumed.append(dict(out._resume))
            self.sent.append(0)
            number = 0
            async for frame in send(service, out):
                if number == frames and len(self.sent) <= self.times:
                    raise Unavailable("the connection broke")
                number += 1
                self.sent[-1] += len(frame)
                yield frame

        monkeypatch.setattr(WorkerService, "_stream", breaking)


@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
async def test_a_broken_stream_goes_on_at_the_chunk(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, scattered: bool
) -> None:
    prefix, raws = await stored(cluster)
    client = await cluster.client(far=True, data_connections_max=0)
    plan = await found(client, prefix, 4)
    broken = Breaking(monkeypatch, 2, frames=3)
    parts = 6 if scattered else 1
    into = [[np.zeros(SIZE // parts, np.uint8) for _ in range(parts)] for _ in raws]
    result = await client.get(plan, [into], on_layer=lambda ready: None)  # so that layers come in order
    assert result.blocks == 4 and client.counters["streams_resumed"] == 2
    assert all(np.array_equal(np.concatenate(have), raw) for have, raw in zip(into, raws, strict=True))
    assert [len(resumed) for resumed in broken.resumed] == [0, 4, 4]
    assert all(copy_id and first_chunk >= 2 for copy_id, first_chunk in broken.resumed[1].values())
    assert sum(broken.sent) < 4 * SIZE + 3 * 4 * 1024  # nothing but headers came twice


async def test_a_stream_that_never_gets_further_is_a_miss(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, _ = await stored(cluster)
    client = await cluster.client(far=True, data_connections_max=0)
    plan = await found(client, prefix, 4)
    broken = Breaking(monkeypatch, 99, frames=1)
    assert (await client.get(plan)).blocks == 0 and len(broken.sent) == 1


async def test_frames_of_a_block_may_land_in_any_order(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte movers take several frames at a time; the last one's end is not the block's."""
    prefix, raws = await stored(cluster)
    client = await cluster.client(far=True, data_connections_max=0)
    plan = await found(client, prefix, 4)
    copy, decode, behind, late = decode_chunks, Arrivals._decode, threading.Event(), []

    def copy_late(table: Any, data: Any, spec: Any, shard: Any, into: Any, first: int, *more: Any, **how: Any) -> int:
        if first == 0:
            late.append(behind.wait(1.0))  # one mover: nobody sets it meanwhile
        return copy(table, data, spec, shard, into, first, *more, **how)

    def decode_first(self: Arrivals, item: Any, part: Any, *more: Any) -> int:
        count = decode(self, item, part, *more)
        if part.first_chunk:
            behind.set()
        return count

    monkeypatch.setattr(arrivals, "decode_chunks", copy_late)
    monkeypatch.setattr(Arrivals, "_decode", decode_first)
    result = await client.get(plan)
    assert any(late) and result.blocks == 4
    assert all(np.array_equal(have, raw) for have, raw in zip(result.buffers[0], raws, strict=True))


async def _two_copies(cluster: MiniCluster, same: bool) -> tuple[KVClient, HitPlan, list[list[np.ndarray]]]:
    """A prefix on two workers, put once as copy 0 and once as another copy (or the same one)."""
    prefix = prompt(8, 4, DEEP)
    copies = [blocks_of(prefix), blocks_of(prefix, copy=0 if same else 1)]
    for name, raws in zip("ab", copies, strict=True):
        worker = await cluster.worker(name, store=STORE)
        by = await cluster.client(alone=True, workers=(worker.socket,))
        await put_all(by, prefix, raws)
    client = await cluster.client(far=True, data_connections_max=0)
    return client, await found(client, prefix, 4, holders=2), copies


@pytest.mark.parametrize("same", [False, True], ids=["another copy", "the same copy"])
async def test_what_was_told_is_never_of_two_copies(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """One holder breaks for good after the first layers were told: the other goes on only with the same copy."""
    client, plan, copies = await _two_copies(cluster, same)
    Breaking(monkeypatch, 1, frames=3)
    monkeypatch.setattr("kvstore.client.fetch.RESUMES_MAX", 0)
    told: list[int] = []
    into = [np.zeros(SIZE, np.uint8) for _ in range(4)]
    result = await client.get(plan, [into], on_layer=lambda ready: told.append(ready.layer))
    assert told[:2] == [0, 1]
    if same:
        assert result.blocks == 4 and told == list(range(6))
        assert all(np.array_equal(have, raw) for have, raw in zip(into, copies[0], strict=True))
    else:
        assert result.blocks == 0 and client.counters["failed_other_copy"] == 4
        first = slice(0, 2 * A_LAYER)
        assert any(all(np.array_equal(i[first], r[first]) for i, r in zip(into, c, strict=True)) for c in copies)


async def test_without_layers_told_another_copy_takes_its_place(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, plan, copies = await _two_copies(cluster, same=False)
    Breaking(monkeypatch, 1, frames=3)
    monkeypatch.setattr("kvstore.client.fetch.RESUMES_MAX", 0)
    result = await client.get(plan)
    assert result.blocks == 4
    for have, *raws in zip(result.buffers[0], *copies, strict=True):
        assert any(np.array_equal(have, raw) for raw in raws)
