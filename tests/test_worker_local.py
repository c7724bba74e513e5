"""The worker's local socket: memory passed, staging, and what belongs to a connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.checksum import xxh3
from kvstore.client import sources
from kvstore.client.bulk import Raws
from kvstore.client.host_link import HostLink
from kvstore.client.needs import LayerReady
from kvstore.errors import BadRequest, KVStoreError, Overloaded, Unavailable
from kvstore.header import Header
from kvstore.kernels import landing
from kvstore.open_rows import rows_of
from kvstore.types import Tier, pack_keys
from kvstore.wire import common_pb2, worker_pb2
from tests.service_cluster import STORE, blocks_of, check
from tests.service_helpers import FULL, LARGE, prompt, until
from tests.worker_met import SIZE, Met, meeting, open_request, put_block, raw
from workers import local


@pytest.fixture
async def met(tmp_path: Path) -> AsyncIterator[Met]:
    async with meeting(tmp_path) as made:
        yield made


async def test_open_passes_a_segment_once_and_release_is_idempotent(met: Met) -> None:
    prefix = prompt(10, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    first, passed = await met.locally("Open", open_request(prefix, 3))
    assert len(first.segments) == len(passed) == 1 and not first.segments[0].writable
    again, none = await met.locally("Open", open_request(prefix, 2))
    assert not again.segments and not none
    block = first.blocks[1]
    assert bytes(passed[0].view[block.offset : block.offset + block.length]) == raw(prefix, 1)
    with pytest.raises(TypeError):
        passed[0].view[block.offset] = 0  # read-only
    assert len(met.holds()) == 2
    other = await met.another()
    await met.locally("Release", worker_pb2.ReleaseRequest(holds=[first.hold, 77]), other)  # not its own
    assert len(met.holds()) == 2
    for _ in range(2):
        await met.locally("Release", worker_pb2.ReleaseRequest(holds=[first.hold]))
    assert len(met.holds()) == 1
    await other.close()


async def test_holds_that_come_back_with_an_open_end_whatever_becomes_of_it(met: Met) -> None:
    prefix = prompt(12, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    hits = met.worker.store.stack.hits[Tier.HOT]
    first, _ = await met.locally("Open", open_request(prefix, 3))
    assert met.holds() == [first.hold] and met.worker.store.stack.hits[Tier.HOT] == hits + 3
    second, _ = await met.locally("Open", open_request(prefix, 3, release=[first.hold, 77]))
    assert met.holds() == [second.hold]
    third, _ = await met.locally("Open", open_request(prompt(99, 1), 1, release=[second.hold], redis=True))
    assert met.holds() == [third.hold] and not third.blocks[0].length
    with pytest.raises(BadRequest):
        await met.locally("Open", open_request(prefix, 3, least=9, release=[third.hold]))
    assert met.holds() == []


async def test_holds_of_a_connection_are_bounded_by_those_that_are_not_given_back(
    met: Met, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "HOLDS_MAX", 2)
    prefix = prompt(13, 1)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    holds = [(await met.locally("Open", open_request(prefix, 1)))[0].hold for _ in range(2)]
    with pytest.raises(Overloaded):
        await met.locally("Open", open_request(prefix, 1, release=[77, 78]))  # not its own
    assert met.holds() == holds
    await met.locally("Open", open_request(prefix, 1, release=holds[:1]))
    assert len(met.holds()) == 2 and holds[0] not in met.holds()


async def test_memory_that_does_not_fit_is_told_and_leaves_no_hold(met: Met) -> None:
    """The request has left when the caller's memory is looked at."""
    prefix = prompt(15, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await client.match(FULL, prefix)
    with pytest.raises(BadRequest):
        await client.get(plan, [[bytearray(SIZE), bytearray(SIZE), bytearray(SIZE - 1)]])
    await until(lambda: not met.holds(), "the hold is given back")
    check(plan, await client.get(plan), 3)


async def test_what_belongs_to_a_connection_ends_with_it(met: Met) -> None:
    prefix = prompt(11, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    before = met.worker.store.staging.used
    peer = await met.another()
    await met.locally("Open", open_request(prefix, 3), peer)
    await met.locally("Stage", worker_pb2.StageRequest(bytes=1 << 16), peer)
    assert len(met.holds()) == 1 and met.worker.store.staging.used == before + (1 << 16)
    segment = next(met.worker.store.arena.segments())
    peers = segment.peers
    await peer.close()
    await until(lambda: met.worker.store.staging.used == before, "its staging is freed")
    assert met.holds() == [] and segment.peers == peers - 1


async def test_a_late_writer_cannot_touch_what_is_committed(met: Met) -> None:
    prefix = prompt(12, 2)
    reply, passed = await met.locally("Stage", worker_pb2.StageRequest(bytes=2 * SIZE))
    view = passed[0].view
    view[:SIZE] = raw(prefix, 0)
    commit = worker_pb2.CommitRequest(
        spec_json=FULL.canonical_json(), segment=reply.segment.segment, blocks=[put_block(prefix, 0, offset=0)]
    )
    answer, _ = await met.locally("Commit", commit)
    assert list(answer.states) == [worker_pb2.BLOCK_COMMITTED]
    view[:SIZE] = bytes(SIZE)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    plan = await client.match(FULL, prefix)
    check(plan, await client.get(plan), 1)


async def test_malformed_local_calls(met: Met) -> None:
    prefix = prompt(13, 2)
    reply, _ = await met.locally("Stage", worker_pb2.StageRequest(bytes=2 * SIZE))
    mine = reply.segment.segment
    spec = FULL.canonical_json()

    def commit(segment: int = mine, **changes: Any) -> worker_pb2.CommitRequest:
        return worker_pb2.CommitRequest(spec_json=spec, segment=segment, blocks=[put_block(prefix, 0, **changes)])

    bad: list[tuple[str, Any]] = [
        ("Stage", worker_pb2.StageRequest(bytes=SIZE)),
        ("Commit", commit(segment=mine + 1)),
        ("Commit", commit(segment=1)),
        ("Commit", commit(offset=SIZE + 1)),
        ("Commit", commit(offset=(1 << 64) - 1)),
        ("Commit", commit(raw_bytes=1)),
        ("Commit", commit(key=b"")),
        ("Commit", worker_pb2.CommitRequest(spec_json="[]", segment=mine)),
        ("Open", worker_pb2.OpenRequest(root=b"")),
        ("Open", worker_pb2.OpenRequest(root=FULL.root, blocks=[worker_pb2.ShardKeys(keys=b"1")])),
        ("Match", common_pb2.MatchRequest(root=FULL.root)),
    ]
    for name, request in bad:
        with pytest.raises(BadRequest) as error:
            await met.locally(name, request)
        assert "\n" not in str(error.value)
    other = await met.another()
    with pytest.raises(BadRequest):
        await met.locally("Stage", worker_pb2.StageRequest(), other)
    with pytest.raises(BadRequest):
        await met.locally("Commit", commit(), other)  # another connection's staging
    await other.close()
    assert met.held() == 0


async def test_staging_is_bounded_over_all_connections(met: Met) -> None:
    room = STORE.staging_total_bytes // STORE.staging_bytes
    peers = [await met.another() for _ in range(room + 1)]
    for peer in peers[:room]:
        reply, _ = await met.locally("Stage", worker_pb2.StageRequest(bytes=1 << 40), peer)
        assert reply.segment.bytes == STORE.staging_bytes
    with pytest.raises(Overloaded):
        await met.locally("Stage", worker_pb2.StageRequest(bytes=1), peers[room])
    for peer in peers:
        await peer.close()


async def test_a_slot_reused_under_a_reader_is_a_miss(met: Met, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hold is gone while the reader copies: purged, freed, generation bumped."""
    prefix = prompt(14, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await client.match(FULL, prefix)
    move = Raws._move
    loop = asyncio.get_running_loop()

    def slow(self: Any, *place: int) -> None:
        move(self, *place)
        asyncio.run_coroutine_threadsafe(expire(), loop).result(5)

    async def expire() -> None:
        for hold in met.holds():
            met.worker.store.release(hold)
        met.worker.store.purge("default")

    monkeypatch.setattr(sources, "INLINE_BYTES", 0)
    monkeypatch.setattr(Raws, "_move", slow)
    result = await client.get(plan, layers=range(2))  # not the short way
    assert result.tiers == [[None, None, None]] and result.blocks == 0
    assert client.counters["failed_reused"] == 3


async def test_a_slot_reused_before_it_is_read_the_short_way_is_a_miss(
    met: Met, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = prompt(14, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    await client.put(FULL, prefix, blocks_of(prefix))
    plan = await client.match(FULL, prefix)
    copy = landing.copy

    def late(*arguments: Any) -> None:
        for hold in met.holds():
            met.worker.store.release(hold)
        met.worker.store.purge("default")
        copy(*arguments)

    check(plan, await client.get(plan), 3)  # the control
    monkeypatch.setattr(landing, "copy", late)
    result = await client.get(plan)
    assert result.tiers == [[None, None, None]] and result.blocks == 0
    assert client.counters["failed_reused"] == 3


async def test_a_slot_reused_between_two_layers_takes_back_nothing_that_was_told(
    met: Met, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = prompt(24, 3)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    raws = blocks_of(prefix)
    await client.put(FULL, prefix, raws)
    plan = await client.match(FULL, prefix)
    monkeypatch.setattr(sources, "INLINE_BYTES", 0)
    half = len(raws[0]) // 2
    told = []

    def gone(ready: LayerReady) -> None:
        told.append(ready)
        for hold in met.holds():
            met.worker.store.release(hold)
        met.worker.store.purge("default")

    into = [np.zeros(len(raws[0]), np.uint8) for _ in raws]
    result = await client.get(plan, [into], on_layer=gone)
    assert told == [LayerReady(0, 3)] and result.blocks == 0 and result.tiers == [[None] * 3]
    assert all(np.array_equal(have[:half], raw[:half]) for have, raw in zip(into, raws, strict=True))
    assert client.counters["failed_reused"] == 3


class _Row:
    """One of OPEN_ROWS, with the fields of an OpenBlock."""

    def __init__(self, row: Any) -> None:
        object.__setattr__(self, "_row", row)

    def __getattr__(self, name: str) -> Any:
        return self._row[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._row[name] = value


def _forge(forged: str, blocks: Any, others: Any) -> None:
    """All but the first. Mutates `blocks`."""
    for block, another in zip(blocks[1:], others[1:], strict=True):
        if forged == "generation":
            block.generation += 1
        elif forged == "offset":  # a place that is none: before the data
            block.offset = 0
        elif forged == "beyond":  # one that ends after it, or wraps round
            block.offset = (1 << 64) - 4096
        elif forged == "header":
            block.header = another.header
        elif forged == "segment":
            block.segment += 99
        else:
            block.length -= 4096


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("forged", ["beyond", "segment", "generation", "offset", "header", "length"])
@pytest.mark.parametrize("older", [False, True])
async def test_what_is_forged_in_an_answer_is_a_miss(
    met: Met, monkeypatch: pytest.MonkeyPatch, forged: str, layerwise: bool, older: bool
) -> None:
    """A generation that is not the slot's; another block's place, header or length. `older`: by a worker that answers
    in messages."""
    prefix, other = prompt(25, 3, LARGE), prompt(26, 3, LARGE)
    client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
    for chain in (prefix, other):
        assert (await client.put(LARGE, chain, blocks_of(chain))).states == ["committed"] * 3
    plan = await client.match(LARGE, prefix)
    check(plan, await client.get(plan), 3)  # the control
    opened = HostLink.open

    async def forge(link: HostLink, request: Any, *, timeout_s: float, **options: Any) -> Any:
        if older:
            link.sends_rows = False
        reply = await opened(link, request, timeout_s=timeout_s, **options)
        keys = worker_pb2.ShardKeys(shard=request.blocks[0].shard, keys=pack_keys(other.keys))
        theirs = await opened(link, worker_pb2.OpenRequest(root=LARGE.root, blocks=[keys]), timeout_s=timeout_s)
        link.release(theirs.hold)
        assert request.rows != older and bool(reply.blocks) == older
        if older:
            _forge(forged, reply.blocks, theirs.blocks)
        else:
            rows = rows_of(reply.rows).copy()
            _forge(forged, [_Row(row) for row in rows], [_Row(row) for row in rows_of(theirs.rows)])
            reply.rows = rows.tobytes()
        return reply

    monkeypatch.setattr(HostLink, "open", forge)
    result = await client.get(plan, on_layer=(lambda ready: None) if layerwise else None)
    assert result.blocks == 1 and result.tiers == [[Tier.HOT, None, None]]
    assert np.array_equal(result.buffers[0][0], blocks_of(prefix)[0])


async def test_a_writer_that_scribbles_all_the_while_harms_only_what_it_puts(met: Met) -> None:
    """Its staging changes while its commits are copied out: whatever was committed is what its checksum says."""
    staging, passed = await met.locally("Stage", worker_pb2.StageRequest(bytes=1 << 20))
    view = passed[0].view
    stop = threading.Event()

    def scribble() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 251
            np.frombuffer(view, np.uint8)[: 16 * SIZE] = value

    writer = asyncio.get_running_loop().run_in_executor(None, scribble)
    prefix = prompt(27, 200)
    try:
        for first in range(0, 200, 16):
            blocks = [
                put_block(prefix, depth, offset=(depth - first) * SIZE) for depth in range(first, min(first + 16, 200))
            ]
            commit = worker_pb2.CommitRequest(
                spec_json=FULL.canonical_json(), segment=staging.segment.segment, blocks=blocks
            )
            reply, _ = await met.locally("Commit", commit)
            assert set(reply.states) == {worker_pb2.BLOCK_COMMITTED}
    finally:
        stop.set()
        await writer
    reply, passed = await met.locally("Open", open_request(prefix, 200))
    for block in reply.blocks:
        data = passed[0].view[block.offset : block.offset + block.length]
        assert xxh3(data) == Header.unpack(block.header).copy_id
    again = [xxh3(passed[0].view[b.offset : b.offset + b.length]) for b in reply.blocks]
    np.frombuffer(view, np.uint8)[:] = 7
    assert again == [xxh3(passed[0].view[b.offset : b.offset + b.length]) for b in reply.blocks]


async def test_a_stopped_worker_answers_nobody(met: Met) -> None:
    await met.worker.stop()
    met.cluster.workers.clear()
    for attempt in (met.call("Status", common_pb2.StatusRequest()), met.locally("Match", common_pb2.MatchRequest())):
        with pytest.raises((Unavailable, KVStoreError)):
            await attempt
    assert not Path(met.worker.node.socket).exists()
