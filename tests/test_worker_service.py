"""The worker's gRPC service on real sockets, met by honest peers, careless ones and hostile ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.checksum import xxh3
from kvstore.errors import BadRequest, DeadlineExceeded, Incompatible, Overloaded
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, Header
from kvstore.spec import Shard
from kvstore.transport import frames
from kvstore.transport.methods import WORKER
from kvstore.types import Tier
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import shard_from_wire
from tests.service_cluster import blocks_of, check
from tests.service_helpers import FULL, LARGE, TWO_GROUPS, prompt, until
from tests.worker_met import SIZE, Met, get_request, meeting, put_block, put_header, raw


@pytest.fixture
async def met(tmp_path: Path) -> AsyncIterator[Met]:
    async with meeting(tmp_path) as made:
        yield made


async def test_a_put_stream_cut_anywhere_is_put_together(met: Met) -> None:
    prefix = prompt(1, 5)
    data = b"".join(raw(prefix, depth) for depth in range(5))
    cuts = [0, 1, SIZE - 1, SIZE, SIZE + 7, 3 * SIZE + 5, len(data)]
    parts = [frames.encode(None, [data[a:b]]) for a, b in pairwise(cuts)]
    reply = await met.put(put_header(*(put_block(prefix, depth) for depth in range(5))), *parts)
    assert list(reply.states) == [worker_pb2.BLOCK_COMMITTED] * 5
    assert (reply.token.worker, reply.token.seq) == (met.worker.identity.worker, 5)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    plan = await client.match(FULL, prefix)
    check(plan, await client.get(plan), 5)


async def test_a_get_stream_says_what_comes_and_packs_layer_by_layer(met: Met) -> None:
    prefix = prompt(2, 3)
    data = b"".join(raw(prefix, depth) for depth in range(2))
    await met.put(put_header(put_block(prefix, 0), put_block(prefix, 1)), frames.encode(None, [data]))
    out = await met.get(get_request(prefix, 3))
    infos = out[0][0].blocks
    assert [info.state for info in infos] == [worker_pb2.BLOCK_FOUND] * 2 + [worker_pb2.BLOCK_MISSING]
    assert Header.unpack(infos[1].header).copy_id == xxh3(raw(prefix, 1)) and infos[0].tier == Tier.HOT
    order = []
    for header, body in out[1:]:
        assert not header.blocks
        start = 0
        for part in header.parts:
            assert len(part.table) % ENTRY_BYTES == 0
            for row in np.frombuffer(part.table, ENTRY_DTYPE):
                stored = body[start : start + int(row["stored"])]
                assert xxh3(stored) == int(row["xxh3"])
                order.append((int(row["layer"]), part.block, int(row["component"])))
                start += len(stored)
        assert start == len(body)
    assert order == [(layer, block, component) for layer in (0, 1) for block in (0, 1) for component in (0, 1)]
    second = await met.get(get_request(prefix, 2, layer_first=1, layer_count=1))
    tables = b"".join(part.table for header, _ in second[1:] for part in header.parts)
    assert set(np.frombuffer(tables, ENTRY_DTYPE)["layer"].tolist()) == {1}


async def test_malformed_calls_are_refused_in_one_line_and_change_nothing(met: Met) -> None:
    prefix = prompt(3, 2)
    good = put_block(prefix, 0)
    data = frames.encode(None, [raw(prefix, 0)])
    puts: list[list[bytes]] = [
        [],
        [b"\xff\xff\xff"],
        [data],
        [frames.encode(b"\xff\xff", ())],
        [frames.encode(worker_pb2.PutHeader(spec_json="{", blocks=[good]).SerializeToString(), ()), data],
        [frames.encode(worker_pb2.PutHeader(spec_json='{"model":"x"}', blocks=[good]).SerializeToString(), ()), data],
        [put_header(), data],
        [put_header(good), frames.encode(None, [raw(prefix, 0)[:-1]])],
        [put_header(put_block(prefix, 0, raw_bytes=SIZE - 1)), data],
        [put_header(put_block(prefix, 0, raw_bytes=1 << 60)), data],
        [put_header(put_block(prefix, 0, key=b"short")), data],
        [put_header(put_block(prefix, 0, parent=bytes(16))), data],
        [put_header(put_block(prefix, 0, group=b"")), data],
        [put_header(put_block(prefix, 0, computed_on=7)), data],
    ]
    for sent in puts:
        with pytest.raises(BadRequest) as error:
            await met.put(*sent)
        assert "\n" not in str(error.value)
    assert met.held() == 0
    gets = [
        worker_pb2.GetRequest(root=b"no"),
        worker_pb2.GetRequest(root=FULL.root, blocks=[worker_pb2.ShardKeys(keys=bytes(15))]),
        worker_pb2.GetRequest(root=FULL.root, blocks=[worker_pb2.ShardKeys(keys=bytes(16 * 20_000))]),
        worker_pb2.GetRequest(root=FULL.root, blocks=[worker_pb2.ShardKeys()] * 2000),
        get_request(prefix, 1, layer_first=1),
        get_request(prefix, 1, least=8),
    ]
    for request in gets:
        with pytest.raises(BadRequest):
            await met.get(request)
    await met.put(put_header(good), data)
    outside = worker_pb2.ShardKeys(shard=common_pb2.Shard(layer_count=9, head_count=1), keys=prefix.keys[0])
    with pytest.raises(BadRequest):
        await met.get(worker_pb2.GetRequest(root=FULL.root, blocks=[outside]))
    with pytest.raises(Incompatible):
        await met.call("Hello", common_pb2.HelloRequest(protocol=99))
    assert met.held() == 1


async def test_bytes_after_the_last_block_and_a_wrong_checksum(met: Met) -> None:
    prefix = prompt(4, 2)
    with pytest.raises(BadRequest):
        await met.put(put_header(put_block(prefix, 0)), frames.encode(None, [raw(prefix, 0) + b"x"]))
    assert met.held() == 1  # it was whole: a retry finds it held
    wrong = put_block(prefix, 1, copy_id=12345)
    reply = await met.put(put_header(wrong), frames.encode(None, [raw(prefix, 1)]))
    assert list(reply.states) == [worker_pb2.BLOCK_REFUSED] and met.held() == 1
    right = put_block(prefix, 1, copy_id=xxh3(raw(prefix, 1)))
    reply = await met.put(put_header(right), frames.encode(None, [raw(prefix, 1)]))
    assert list(reply.states) == [worker_pb2.BLOCK_COMMITTED] and met.held() == 2


async def test_a_get_that_is_dropped_half_way_holds_nothing(met: Met) -> None:
    prefix = prompt(5, 200)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))

    async def one() -> AsyncIterator[worker_pb2.GetRequest]:
        yield get_request(prefix, 200)

    stream = met.channel.stream(WORKER["Get"], one(), timeout_s=5)
    await anext(stream)
    await stream.aclose()
    await until(lambda: met.holds() == [], "its hold has ended")
    await until(lambda: met.worker.node.sending.used == 0, "its bytes are given back")


async def test_a_put_that_comes_too_slowly_ends_at_its_deadline(met: Met) -> None:
    prefix = prompt(6, 1)
    never = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield put_header(put_block(prefix, 0))
        await never.wait()

    async with aclosing(met.channel.stream(WORKER["Put"], slow(), timeout_s=0.3)) as stream:
        with pytest.raises(DeadlineExceeded):
            await anext(stream)
    await until(lambda: met.worker.node.receiving.used == 0, "its buffer is given back")
    assert met.held() == 0


async def test_bytes_in_flight_are_bounded(met: Met) -> None:
    prefix = prompt(7, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    met.worker.node.sending.capacity = met.worker.node.sending.waiting_max = 2 * SIZE
    with pytest.raises(BadRequest):
        await met.get(get_request(prefix, 3))
    async with met.worker.node.sending.hold(SIZE, "default", 1.0):
        assert len((await met.get(get_request(prefix, 1)))[0][0].blocks) == 1
        waiting = asyncio.ensure_future(met.get(get_request(prefix, 2)))
        await until(lambda: met.worker.node.sending.waiting == 2 * SIZE, "it waits for its turn")
        with pytest.raises(Overloaded):
            await met.get(get_request(prefix, 1))
    assert len((await waiting)[0][0].blocks) == 2
    met.worker.node.receiving.capacity = SIZE - 1
    with pytest.raises(Overloaded):
        await met.put(put_header(put_block(prompt(8, 1), 0)), frames.encode(None, [bytes(SIZE)]))


async def test_purge_by_model_and_revision(met: Met) -> None:
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    for revision in ("v1", "v2"):
        spec = replace(FULL, revision=revision)
        prefix = prompt(10, 3, spec)
        await client.put(spec, prefix, blocks_of(prefix))
    other = prompt(10, 2, TWO_GROUPS)
    await client.put(TWO_GROUPS, other, blocks_of(other))

    async def purged(**what: str) -> int:
        return int((await met.call("Purge", worker_pb2.PurgeRequest(**what))).blocks)

    assert await purged(model=FULL.model, revision="v3") == 0
    assert await purged(model=FULL.model, revision="v2") == 3
    assert await purged(model=FULL.model) == 3
    assert met.held() == 2, "another model stays"
    for wrong in ({"revision": "v1"}, {"model": "full", "root": bytes(16)}):
        with pytest.raises(BadRequest):
            await met.call("Purge", worker_pb2.PurgeRequest(**wrong))


async def test_status_purge_probe(met: Met) -> None:
    prefix = prompt(9, 4)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    status = await met.call("Status", common_pb2.StatusRequest())
    hot = next(tier for tier in status.tiers if tier.tier == Tier.HOT)
    assert (hot.blocks, hot.raw_bytes) == (4, 4 * SIZE) and status.member.id == met.worker.identity.worker
    assert [(n.namespace, n.blocks) for n in status.namespaces] == [("default", 4)]
    probe = await met.call("Probe", worker_pb2.ProbeRequest())
    assert all(result.ok for result in probe.results if result.tier in (Tier.HOT, Tier.HOST)), probe
    (block,) = (await met.call("Inspect", worker_pb2.InspectRequest(key=prefix.keys[2], redis=True))).blocks
    assert shard_from_wire(block.shard) == Shard.whole(FULL) and block.pins == 0
    assert [(copy.tier, copy.raw, copy.length, copy.error) for copy in block.copies] == [(Tier.HOT, True, SIZE, "")]
    assert Header.unpack(block.copies[0].header).key == prefix.keys[2]
    assert not (await met.call("Inspect", worker_pb2.InspectRequest(key=bytes(16)))).blocks
    with pytest.raises(BadRequest):
        await met.call("Inspect", worker_pb2.InspectRequest(key=b"short"))
    assert (await met.call("Purge", worker_pb2.PurgeRequest(root=bytes(16)))).blocks == 0
    assert (await met.call("Purge", worker_pb2.PurgeRequest())).blocks == 4
    assert (await client.match(FULL, prefix)).blocks == 0


async def test_a_get_stream_leaves_out_what_is_reused_under_it(met: Met, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = prompt(15, 3, LARGE)
    near = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await near.put(LARGE, prefix, blocks_of(prefix))
    from workers import outgoing

    read = outgoing.Outgoing._raw
    loop = asyncio.get_running_loop()
    done: list[int] = []

    def slow(self: Any, parts: Any) -> Any:
        found = read(self, parts)
        if not done and 1 in [part.block for part in parts]:
            done.append(1)
            asyncio.run_coroutine_threadsafe(expire(), loop).result(5)
        return found

    async def expire() -> None:
        for hold in met.holds():
            met.worker.store.release(hold)
        row = met.worker.store.stack.residency.find("default", Shard.whole(LARGE).digest, prefix.keys[1])
        assert row is not None
        met.worker.store.stack.remove(row)

    monkeypatch.setattr(outgoing.Outgoing, "_raw", slow)
    out = await met.get(get_request(prefix, 3))
    assert [info.state for info in out[0][0].blocks] == [worker_pb2.BLOCK_FOUND] * 3
    blocks = {part.block for header, _ in out[1:] for part in header.parts}
    assert blocks == {0, 2} and met.worker.node.counters["blocks_lost_in_flight"] == 1
