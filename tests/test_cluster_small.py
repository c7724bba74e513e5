"""Two workers and a coordinator over real transports: what is put is got, whatever fails in between."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.keys import Chain
from kvstore.layout import block_bytes, cut
from kvstore.spec import Shard
from kvstore.types import Tier
from tests.service_cluster import SMALL, STORE, MiniCluster, blocks_of, check, found, put_slowly
from tests.service_helpers import FULL, TWO_GROUPS, payload, prompt
from workers.runtime import WorkerRuntime


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MiniCluster]:
    async with MiniCluster(tmp_path) as made:
        yield made
        for worker in made.workers:
            await worker.store.idle()
            worker.store.validate()


async def test_same_host_round_trip(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a")
    client = await cluster.client()
    prefix = prompt(1, 40)
    put = await client.put(FULL, prefix, blocks_of(prefix))
    assert put.states == ["committed"] * 40
    assert {token.worker for token in put.tokens} == {worker.identity.worker}
    plan = await found(client, prefix, 40)
    assert plan.tiers() == {Tier.HOT: 40}
    result = await client.get(plan)
    check(plan, result, 40)
    assert result.tiers == [[Tier.HOT] * 40] and result.bytes == 40 * block_bytes(FULL, Shard.whole(FULL))
    again = await client.put(FULL, prefix, blocks_of(prefix))
    assert again.states == ["held"] * 40
    assert client.counters["hits_hot"] == 40 and client.counters["misses"] == 0
    assert not [name for name in client.counters if name.startswith("errors")], client.counters


async def test_remote_round_trip(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    await cluster.worker("a")
    await cluster.worker("b")
    client = await cluster.client(far=True)
    prefix = prompt(2, 70)  # three placement groups
    put = await client.put(FULL, prefix, blocks_of(prefix))
    assert put.states == ["committed"] * 70
    plan = await found(client, prefix, 70)
    into = [[np.zeros(block_bytes(FULL, Shard.whole(FULL)), np.uint8) for _ in range(70)]]
    result = await client.get(plan, into)
    check(plan, result, 70)
    assert result.buffers[0][3] is into[0][3]
    assert not [name for name in client.counters if name.startswith(("errors", "failed"))], client.counters


async def test_read_your_writes_and_tokens_for_another_replica(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    await cluster.worker("a")
    writer, reader = await cluster.client(), await cluster.client(far=True)
    for turn in range(20):
        prefix = prompt(100 + turn, 6)
        put = await writer.put(FULL, prefix, blocks_of(prefix))
        mine, theirs = await asyncio.gather(writer.match(FULL, prefix), reader.match(FULL, prefix, after=put.tokens))
        for plan in (mine, theirs):  # all of it, or it is said that the commit is not in yet
            assert plan.blocks == 6 or plan.not_applied
        check(theirs, await reader.get(theirs), theirs.blocks)


async def test_ssd_blocks_come_back_after_a_restart(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    prefix = prompt(3, 120)
    back = await on_ssd_only(cluster, "a", prefix)
    assert back.identity.epoch == 2
    held = len(back.store.snapshot("default")[1])
    assert 120 < held < 420
    for far in (True, False):
        reader = await cluster.client(far=far)
        plan = await found(reader, prefix, 50)
        check(plan, await reader.get(plan), plan.blocks)
        assert not far or reader.counters["hits_ssd"] > 40  # which brought them into memory


async def test_a_worker_killed_between_match_and_get_is_a_miss(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a")
    near, far = await cluster.client(), await cluster.client(far=True)
    prefix = prompt(4, 10)
    await near.put(FULL, prefix, blocks_of(prefix))
    plans = [await found(near, prefix, 10), await found(far, prefix, 10)]
    await worker.stop()
    cluster.workers.clear()
    for client, plan in zip((near, far), plans, strict=True):
        async with asyncio.timeout(5):
            result = await client.get(plan, timeout_s=3)
        assert result.blocks == 0 and result.bytes == 0 and client.counters["misses"] == 10
        assert (await client.match(FULL, prefix)).blocks == 0  # the failed pairs are remembered


async def test_the_next_holder_serves_when_one_is_gone(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    first = await cluster.worker("a")
    second = await cluster.worker("b")
    prefix = prompt(5, 12)
    for worker in (first, second):
        one = await cluster.client(alone=True, workers=(worker.socket,))
        await one.put(FULL, prefix, blocks_of(prefix))
    far = await cluster.client(far=True)
    async with asyncio.timeout(10):
        plan = await far.match(FULL, prefix)
        while sum(run.count for run in plan.runs) < 2 * 12:  # both holders, all blocks
            await asyncio.sleep(0.01)
            plan = await far.match(FULL, prefix)
    await first.stop()
    cluster.workers.remove(first)
    check(plan, await far.get(plan), 12)


async def test_without_a_coordinator_same_host_hits_go_on(cluster: MiniCluster) -> None:
    coordinator = await cluster.coordinator()
    await cluster.worker("a")
    client = await cluster.client()
    prefix = prompt(6, 9)
    await client.put(FULL, prefix, blocks_of(prefix))
    await coordinator.stop()
    plan = await client.match(FULL, prefix)
    assert not plan.complete
    check(plan, await client.get(plan), 9)
    other = prompt(7, 5)
    assert (await client.put(FULL, other, blocks_of(other))).states == ["committed"] * 5
    assert (await client.match(FULL, other)).blocks == 5
    far = await cluster.client(far=True)  # negative control: nobody can tell it anything
    assert (await far.match(FULL, prefix)).blocks == 0
    assert (await far.put(FULL, prefix, blocks_of(prefix))).states == ["dropped"] * 9


async def test_two_groups_two_shards_and_a_lost_one(cluster: MiniCluster) -> None:
    """Full attention needs every block, a window of 8 tokens (2 blocks) the last two; ranks hold two heads each."""
    await cluster.coordinator()
    worker = await cluster.worker("a")
    client = await cluster.client()
    shards = [Shard(group, 0, 2, head, 2) for group in (0, 1) for head in (0, 2)]
    prefix = prompt(8, 10, TWO_GROUPS)
    for shard in shards:
        blocks = blocks_of(prefix, shard)
        if shard.group == 1:  # the window of the whole prompt, and of the first six blocks
            for first, last in ((4, 6), (8, 10)):
                await client.put(TWO_GROUPS, prefix, blocks[first:last], first, shard)
        else:
            await client.put(TWO_GROUPS, prefix, blocks, 0, shard)
    plan = await found(client, prefix, 10, shards)
    result = await client.get(plan)
    check(plan, result, 10)
    assert [depth for depth in range(10) if result.tiers[2][depth] is not None] == [8, 9]
    lost = [(shards[3].digest, key) for key in prefix.keys[8:]]
    forget(worker, lost)
    async with asyncio.timeout(10):
        while (plan := await client.match(TWO_GROUPS, prefix, shards)).blocks == 10:
            await asyncio.sleep(0.01)
    assert plan.blocks == 6  # where every rank of every group still has what it needs
    check(plan, await client.get(plan), 6)
    forget(worker, [(shards[3].digest, key) for key in prefix.keys[4:6]])
    async with asyncio.timeout(10):
        while (plan := await client.match(TWO_GROUPS, prefix, shards)).blocks:
            await asyncio.sleep(0.01)
    assert (await found(client, prefix, 10, shards[:2])).blocks == 10


def forget(worker: WorkerRuntime, wanted: list[tuple[bytes, bytes]]) -> None:
    """Lose single blocks of a worker, as eviction would."""
    for shard, key in wanted:
        row = worker.store.stack.residency.find("default", shard, key)
        assert row is not None
        worker.store.stack.remove(row)


@pytest.mark.parametrize("far", [False, True])
async def test_tp2_reads_what_tp4_wrote(cluster: MiniCluster, far: bool) -> None:
    await cluster.coordinator()
    await cluster.worker("a")
    client = await cluster.client()
    prefix = prompt(9, 8)
    written = [Shard(0, 0, 2, head, 1) for head in range(4)]
    for shard in written:
        await client.put(FULL, prefix, blocks_of(prefix, shard), 0, shard)
    reader = await cluster.client(far=far)
    needed = [Shard(0, 0, 2, 0, 2), Shard(0, 0, 2, 2, 2), Shard(0, 1, 1, 0, 4)]
    plan = await found(reader, prefix, 8, needed)
    result = await reader.get(plan)
    assert result.blocks == 8
    for index, want in enumerate(needed):
        for depth, key in enumerate(plan.keys):
            expected = memoryview(bytearray(block_bytes(FULL, want)))
            for shard in written:
                cut(FULL, shard, want, payload(FULL, shard, key).data, expected)
            assert bytes(result.buffers[index][depth]) == bytes(expected)


@pytest.mark.parametrize("far", [False, True])
async def test_encoded_blocks_are_decoded_by_the_reader(cluster: MiniCluster, far: bool) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a", store=replace(STORE, hot_bytes=128 << 10))
    client = await cluster.client(far=far)
    shard = Shard.whole(FULL)
    prefix = prompt(10, 60)
    smooth = [np.repeat(np.uint8(depth), block_bytes(FULL, shard)) for depth in range(60)]
    for first in range(0, 60, 4):  # what does not fit into hot at once would be dropped
        put = await client.put(FULL, prefix, smooth[first : first + 4], first)
        assert put.states == ["committed"] * 4
        await worker.store.idle()
    for needed in (shard, Shard(0, 0, 2, 1, 2)):
        plan = await found(client, prefix, 60, [needed])
        result = await client.get(plan)
        assert result.blocks == 60
        assert {Tier.HOT, Tier.HOST} <= {tier for tier in result.tiers[0] if tier is not None}
        assert all(set(bytes(result.buffers[0][depth])) == {depth} for depth in range(60))


async def test_a_block_beyond_the_staging_goes_by_stream(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    await cluster.worker("a")
    client = await cluster.client(staging_bytes=1)
    prefix = prompt(11, 3)
    assert (await client.put(FULL, prefix, blocks_of(prefix))).states == ["committed"] * 3
    assert client.counters["errors_Overloaded"] == 1
    plan = await found(client, prefix, 3)
    check(plan, await client.get(plan), 3)


async def on_ssd_only(cluster: MiniCluster, name: str, prefix: Chain) -> WorkerRuntime:
    """A worker that was restarted: what it still has lies on its SSD."""
    worker = await cluster.worker(name, ssd=True, store=SMALL)
    client = await cluster.client(alone=True, workers=(worker.socket,))
    await put_slowly(client, worker, prefix)
    await put_slowly(client, worker, prompt(99, 300))  # more than memory holds: the older prompt leaves it, all of it
    await client.close()
    await worker.stop()
    cluster.workers.remove(worker)
    return await cluster.worker(name, ssd=True, store=SMALL)


def rot(folder: Path) -> int:
    """Flip a bit every 1000 bytes of every segment file, as a bad disk would; how many."""
    flips = 0
    for path in sorted(folder.iterdir()):
        content = bytearray(path.read_bytes())
        if path.suffix in (".json", ".lock", ".idx") or len(content) < 100_000:
            continue
        for at in range(200, len(content), 1000):
            if content[at]:
                content[at] ^= 0x10
                flips += 1
        with path.open("r+b") as file:
            file.write(content)
    return flips


@pytest.mark.parametrize("far", [False, True])
async def test_a_rotten_disk_is_a_miss_or_the_next_holder(cluster: MiniCluster, tmp_path: Path, far: bool) -> None:
    await cluster.coordinator()
    prefix = prompt(20, 400)
    await on_ssd_only(cluster, "bad", prefix)
    reader = await cluster.client(far=far)
    plan = (await found(reader, prefix, 50)).shortened(50)
    assert rot(tmp_path / "ssd-bad") > 100
    result = await reader.get(plan)
    check(plan, result, result.blocks)
    assert reader.counters["misses"] > 25
    good = await cluster.worker("good")
    writer = await cluster.client(alone=True, workers=(good.socket,))
    await writer.put(FULL, prefix, blocks_of(prefix)[:60])
    fresh = await cluster.client(far=far)
    plan = (await found(fresh, prefix, 60, holders=2)).shortened(60)
    check(plan, await fresh.get(plan), 60)


@pytest.mark.parametrize("needed", [Shard.whole(FULL), Shard(0, 0, 2, 1, 2)], ids=["as stored", "cut"])
async def test_broken_memory_is_a_miss_where_the_reader_verifies_it(cluster: MiniCluster, needed: Shard) -> None:
    await cluster.coordinator()
    worker = await cluster.worker("a")
    writer = await cluster.client()
    prefix = prompt(31, 40)
    await writer.put(FULL, prefix, blocks_of(prefix))
    plan = await found(writer, prefix, 40, [needed])
    assert plan.tiers() == {Tier.HOT: 40}
    good = [bytes(block) for block in (await writer.get(plan)).buffers[0]]
    broken = 17
    flip_in_memory(worker, bytes(payload(FULL, Shard.whole(FULL), prefix.keys[broken])))
    served = await writer.get(plan)
    assert [bytes(block) == raw for block, raw in zip(served.buffers[0], good, strict=True)].count(False) == 1, (
        "nothing broke: the case shows nothing"
    )
    careful = await cluster.client(verify_memory=True)
    result = await careful.get(await found(careful, prefix, 40, [needed]))
    assert result.blocks == broken and careful.counters["failed_Corrupt"] == 1
    assert [bytes(block) for block in result.buffers[0][:broken]] == good[:broken]


def flip_in_memory(worker: WorkerRuntime, raw: bytes) -> None:
    """Change every byte of a raw block that lies in the worker's arena."""
    for segment in worker.store.arena.segments():
        view = segment.segment.view
        at = bytes(view).find(raw)
        if at >= 0:
            np.frombuffer(view, np.uint8)[at : at + len(raw)] ^= 0xFF
            return
    raise AssertionError("the block does not lie in memory")


async def test_namespaces_do_not_share(cluster: MiniCluster, tmp_path: Path) -> None:
    tokens = {name: f"{name}-token-0123456789" for name in ("cluster", "alice", "bob")}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token)
    lines = ["[namespaces.a]", "[namespaces.b]"]
    for name, namespace in (("alice", "a"), ("bob", "b")):
        digest = hashlib.sha256(tokens[name].encode()).hexdigest()
        lines += [f"[identities.{name}]", f'token_sha256 = "{digest}"', f'namespaces = ["{namespace}"]']
    (tmp_path / "namespaces.toml").write_text("\n".join(lines))
    files = {"namespaces_file": str(tmp_path / "namespaces.toml"), "token_file": str(tmp_path / "cluster")}
    await cluster.coordinator(**files)
    worker = await cluster.worker("a", **files)
    for far in (False, True):
        alice = await cluster.client(far=far, namespace="a", token_file=str(tmp_path / "alice"))
        bob = await cluster.client(far=far, namespace="b", token_file=str(tmp_path / "bob"))
        prefix = prompt(21 + far, 5)
        put = await alice.put(FULL, prefix, blocks_of(prefix))
        assert put.states == ["committed"] * 5
        assert (await bob.match(FULL, prefix, after=put.tokens)).blocks == 0
        stolen = await found(alice, prefix, 5)
        assert (await bob.get(stolen)).blocks == 0  # the plan grants nothing
        mine = await bob.put(FULL, prefix, blocks_of(prefix, copy=1))
        assert mine.states == ["committed"] * 5  # what alice has tells bob nothing
        check(stolen, await alice.get(stolen), 5)
        plan = await found(bob, prefix, 5)
        check(plan, await bob.get(plan), 5, copy=1)
        assert await bob.purge() == 5
        assert (await alice.get(await found(alice, prefix, 5))).blocks == 5
    segments = {segment.namespace for segment in worker.store.arena.segments()}
    assert {"a", "b"} <= segments


async def test_everything_is_given_back(tmp_path: Path, no_leaks: None) -> None:
    async with MiniCluster(tmp_path) as cluster:
        await cluster.coordinator()
        await cluster.worker("a", ssd=True)
        for far in (False, True):
            client = await cluster.client(far=far)
            prefix = prompt(30 + far, 20)
            await client.put(FULL, prefix, blocks_of(prefix))
            plan = await found(client, prefix, 20)
            check(plan, await client.get(plan), 20)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".sock"]
