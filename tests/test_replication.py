"""Copies of placement groups in a running cluster: repaired after a loss, moved before a worker leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.convert import spec_to_wire
from kvstore.directory.membership import State
from kvstore.directory.placement import rank
from kvstore.keys import Chain
from kvstore.layout import block_bytes
from kvstore.spec import Shard
from kvstore.types import Tier
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import member_to_wire, shard_to_wire
from tests.service_cluster import COORDINATOR, MiniCluster, blocks_of, check, found
from tests.service_helpers import LARGE, prompt
from tests.service_helpers import until as within
from workers import draining
from workers.puller import Job
from workers.runtime import WorkerRuntime


async def until(condition: Callable[[], bool], what: str) -> None:
    """Patient: on a busy machine leases of 0.6 s run out, and every such change of the members begins a repair anew."""
    await within(condition, what, 40.0)


TWO = "[namespaces.default]\ncopies = 2\n"


def held(worker: WorkerRuntime, prefix: Chain) -> int:
    shard = Shard.whole(prefix.spec).digest
    return sum(worker.store.holds("default", shard, key) for key in prefix.keys)


def rules(folder: Path, text: str = TWO) -> str:
    path = folder / "namespaces.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture
async def cluster(tmp_path: Path):
    async with MiniCluster(tmp_path) as made:
        yield made


async def test_a_second_copy_comes_and_is_made_anew_after_a_loss(cluster: MiniCluster, tmp_path: Path) -> None:
    file = rules(tmp_path)
    await cluster.coordinator(namespaces_file=file)
    first = await cluster.worker("one", namespaces_file=file)
    second = await cluster.worker("two", namespaces_file=file)
    client = await cluster.client()
    prefix = prompt(1, 70)
    put = await client.put(prefix.spec, prefix, blocks_of(prefix))
    assert put.states == ["committed"] * 70
    await until(lambda: held(first, prefix) == held(second, prefix) == 70, "both workers hold all blocks")
    third = await cluster.worker("three", namespaces_file=file)
    await until(lambda: len(first.announcer.view()) == 3, "the third is known")
    await second.stop()
    await until(lambda: held(first, prefix) == held(third, prefix) == 70, "the third has a copy of what was lost")
    pulled = [worker.node.counters["pulled_blocks"] for worker in (first, second, third)]
    assert sorted(pulled) == [0, 70, 70], "each block came once for each copy that was missing"
    raw = [worker.node.counters["raw_gets"] for worker in (first, second, third)]
    assert [gets > 0 for gets in raw] == [blocks > 0 for blocks in pulled], "by raw connections, as clients read"
    plan = await found(client, prefix, 70, holders=2)
    check(plan, await client.get(plan), 70)


async def test_copies_beyond_the_wanted_number_are_marked_until_the_members_change(
    cluster: MiniCluster, tmp_path: Path
) -> None:
    file = rules(tmp_path)
    await cluster.coordinator(namespaces_file=file)
    workers = [await cluster.worker(name, namespaces_file=file) for name in ("one", "two", "three")]
    prefix = prompt(1, 20)  # one group
    for worker in workers:
        client = await cluster.client(alone=True, workers=(worker.socket,))
        await client.put(prefix.spec, prefix, blocks_of(prefix))

    def marked(worker: WorkerRuntime) -> int:
        residency = worker.store.stack.residency
        shard = Shard.whole(prefix.spec).digest
        rows = [residency.find("default", shard, key) for key in prefix.keys]
        return sum(residency.secondary(row) for row in rows if row is not None)

    order = rank(prefix.group(0), [worker.identity.worker for worker in workers])
    ranked = sorted(workers, key=lambda worker: order.index(worker.identity.worker))
    await until(lambda: marked(ranked[2]) == 20, "the lowest ranked one's copy is marked")
    assert [marked(worker) for worker in ranked] == [0, 0, 20]
    await ranked[0].stop()
    await until(lambda: marked(ranked[2]) == 0, "it is one of the wanted two now")


async def test_one_copy_is_enough_where_no_more_are_wanted(cluster: MiniCluster, tmp_path: Path) -> None:
    """The control: without `copies` nothing is pulled."""
    file = rules(tmp_path, "[namespaces.default]\n")
    coordinator = await cluster.coordinator(namespaces_file=file)
    first = await cluster.worker("one", namespaces_file=file)
    second = await cluster.worker("two", namespaces_file=file)
    client = await cluster.client()
    prefix = prompt(1, 40)
    await client.put(prefix.spec, prefix, blocks_of(prefix))
    await found(client, prefix, 40)
    before = coordinator.registry.counters["deltas"]
    await until(lambda: len(first.announcer.view()) == len(second.announcer.view()) == 2, "all are known")
    assert coordinator.registry.repair.groups == 0 and before > 0
    assert sorted([held(first, prefix), held(second, prefix)]) == [0, 40]


async def test_a_worker_that_drains_leaves_its_blocks_to_others(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    first = await cluster.worker("one")
    client = await cluster.client()
    prefix = prompt(2, 70)
    await client.put(prefix.spec, prefix, blocks_of(prefix))
    second = await cluster.worker("two")
    third = await cluster.worker("three")
    await until(lambda: len(first.announcer.view()) == 3, "all are known")
    first.draining.begin(20.0)
    await until(lambda: first.draining.progress().done, "it has drained")
    progress = first.draining.progress()
    assert (progress.groups, progress.blocks_moved, progress.blocks_left) == (3, 70, 0)
    assert held(second, prefix) + held(third, prefix) == 70
    await first.drained()
    await first.stop()
    plan = await found(client, prefix, 70)
    assert first.identity.worker not in plan.holders
    check(plan, await client.get(plan), 70)


async def _holder_and_taker(cluster: MiniCluster) -> tuple[WorkerRuntime, WorkerRuntime, Chain]:
    """A worker with 20 blocks, one that has nothing and is known to it, and the blocks' chain."""
    await cluster.coordinator()
    first = await cluster.worker("one")
    client = await cluster.client()
    prefix = prompt(6, 20)
    await client.put(prefix.spec, prefix, blocks_of(prefix))
    second = await cluster.worker("two")
    await until(lambda: len(first.announcer.view()) == 2, "both are known")
    return first, second, prefix


@pytest.mark.parametrize(("looks", "moved"), [(6, 20), (10**9, 0)])
async def test_who_drains_waits_for_a_worker_that_is_suspected(cluster: MiniCluster, looks: int, moved: int) -> None:
    """The second is hidden when the drain begins: for a few looks, or (the control) for as long as it lasts."""
    first, second, prefix = await _holder_and_taker(cluster)
    seen = 0

    def view() -> dict[str, common_pb2.Member]:
        nonlocal seen
        seen += 1
        members = first.announcer.view()
        if seen <= looks and second.identity.worker in members:
            hidden = common_pb2.Member()
            hidden.CopyFrom(members[second.identity.worker])
            hidden.state = State.SUSPECT
            members[second.identity.worker] = hidden
        return members

    first.draining._view = view
    first.draining.begin(20.0 if moved else 1.0)
    await until(lambda: first.draining.progress().done, "it has drained, or its time is over")
    assert (first.draining.progress().blocks_moved, held(second, prefix)) == (moved, moved)
    assert first.node.counters["drain_timed_out"] == (moved == 0)


@pytest.mark.parametrize(("rounds", "moved"), [(draining.REFUSALS_MAX, 20), (3, 0)])
async def test_who_drains_waits_for_a_taker_that_can_not_reach_it(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch, rounds: int, moved: int
) -> None:
    """A call of the taker to the one that drains hung just before: it answers, and pulls nothing for a while. The
    control gives up after three rounds."""
    monkeypatch.setattr(draining, "REFUSALS_MAX", rounds)
    first, second, prefix = await _holder_and_taker(cluster)
    channels, _ = second.puller._linked("default")
    channels.hung.add(first.address)
    first.draining.begin(20.0)
    await until(lambda: first.draining.progress().done, "it has drained, or gives up")
    assert (first.draining.progress().blocks_moved, held(second, prefix)) == (moved, moved)
    assert second.puller.counters["pull_errors_Unavailable"] > 0, "it could reach it at once"


async def test_a_worker_that_drains_takes_no_new_blocks(cluster: MiniCluster) -> None:
    await cluster.coordinator()
    only = await cluster.worker("one")
    client = await cluster.client(far=True)
    prefix = prompt(3, 4)
    await client.put(prefix.spec, prefix, blocks_of(prefix))
    only.draining.begin(20.0)
    other = prompt(4, 4)
    put = await client.put(other.spec, other, blocks_of(other))
    assert put.states == ["dropped"] * 4
    await until(lambda: only.draining.progress().done, "nobody is there to take anything")
    assert only.draining.progress().blocks_left == 4


async def test_a_prefix_that_everybody_asks_for_gets_another_copy(cluster: MiniCluster, tmp_path: Path) -> None:
    file = rules(tmp_path, '[namespaces.default]\nhot_copies = 2\nhot_bytes = "1GiB"\n')
    coordinator = await cluster.coordinator(namespaces_file=file)
    first = await cluster.worker("one", namespaces_file=file)
    second = await cluster.worker("two", namespaces_file=file)
    client = await cluster.client()
    hot, cold = prompt(1, 20), prompt(2, 20)
    for prefix in (hot, cold):
        await client.put(prefix.spec, prefix, blocks_of(prefix))
        await found(client, prefix, 20)
    for _ in range(2 * COORDINATOR.hot_hits):
        await client.match(hot.spec, hot)
    await until(lambda: held(first, hot) == held(second, hot) == 20, "what is asked for most lies on both")
    assert sorted([held(first, cold), held(second, cold)]) == [0, 20]
    assert coordinator.registry.repair.counters["pulls_hinted"] >= 1


async def test_who_hammers_a_worker_leaves_a_quiet_tenant_all_its_hits(cluster: MiniCluster, tmp_path: Path) -> None:
    """Over the wire, with a quota: counts only. What the loud one does shows nowhere in the quiet one's status."""
    text = (
        '[namespaces.quiet]\n[namespaces.loud]\n[namespaces.loud.quotas]\nhot_bytes = "256KiB"\nhost_bytes = "512KiB"\n'
    )
    file = rules(tmp_path, text)
    await cluster.coordinator(namespaces_file=file)
    worker = await cluster.worker("one", namespaces_file=file)
    quiet = await cluster.client(namespace="quiet")
    loud = await cluster.client(namespace="loud")
    mine = prompt(1, 20, LARGE)
    await quiet.put(LARGE, mine, blocks_of(mine))
    before = worker.store.use("quiet")

    async def hammer(seed: int) -> None:
        theirs = prompt(seed, 20, LARGE)
        await loud.put(LARGE, theirs, blocks_of(theirs))

    hammering = asyncio.gather(*(hammer(seed) for seed in range(2, 22)))
    hits = 0
    for _ in range(10):
        plan = await found(quiet, mine, 20)
        result = await quiet.get(plan)
        check(plan, result, 20)
        hits += result.blocks
    await hammering
    await worker.store.idle()
    plan = await quiet.match(LARGE, mine)
    check(plan, await quiet.get(plan), 20)
    assert hits == 200
    assert worker.store.use("quiet") == before, "nothing of it was moved, dropped or evicted"
    over = worker.store.use("loud")
    assert over.evicted + over.dropped > 0
    assert over.tiers[Tier.HOT] <= 256 << 10 and over.tiers[Tier.HOST] <= 512 << 10
    worker.store.validate()


async def test_a_group_that_grows_while_it_waits_is_pulled_whole(cluster: MiniCluster) -> None:
    """Hints of one group come with the keys that are new: the ones before must not be forgotten."""
    await cluster.coordinator()
    first, second = await cluster.worker("one"), await cluster.worker("two")
    client = await cluster.client(alone=True, workers=(first.socket,))
    prefix = prompt(5, 8)
    await client.put(prefix.spec, prefix, blocks_of(prefix))
    await until(lambda: len(second.announcer.view()) == 2, "the other one is known")
    shard = Shard.whole(prefix.spec)
    for part in (prefix.keys[:3], prefix.keys[3:]):
        second.puller.hinted(
            coordinator_pb2.Hints(
                view=second.announcer.view_digest(),
                dictionary=[spec_to_wire(prefix.spec), common_pb2.DictionaryEntry(shard=shard_to_wire(shard))],
                holders=[member_to_wire(first.node.member())],
                pulls=[
                    coordinator_pb2.PullHint(
                        namespace="default",
                        root=prefix.spec.root,
                        shard=shard.digest,
                        group=prefix.group(0),
                        keys=b"".join(part),
                        sources=[0],
                    )
                ],
            )
        )
    await until(lambda: held(second, prefix) == 8, "both parts have come")
    assert second.node.counters["pulls"] == 1


async def test_copies_come_no_faster_than_the_rate_whoever_asks_for_them(cluster: MiniCluster) -> None:
    first, second = await cluster.worker("one"), await cluster.worker("two")
    client = await cluster.client(alone=True, workers=(second.socket,))
    prompts = [prompt(number, 8) for number in range(1, 4)]
    for prefix in prompts:
        assert (await client.put(prefix.spec, prefix, blocks_of(prefix))).states == ["committed"] * 8
    shard = Shard.whole(prompts[0].spec)
    nbytes = sum(len(prefix) for prefix in prompts) * block_bytes(prompts[0].spec, shard)
    allowed_s = 0.5
    config = first.node.config
    first.node.config = replace(config, worker=replace(config.worker, pull_rate_bytes=int(nbytes / allowed_s)))
    where = ((second.identity.worker, second.address),)
    jobs = [Job("default", prefix.spec, shard, prefix.group(0), tuple(prefix.keys), where) for prefix in prompts]
    begin = cluster.system.clock.monotonic()
    done = await asyncio.gather(*(first.puller.pull(job) for job in jobs))
    assert [tally.committed for tally in done] == [8, 8, 8]
    assert cluster.system.clock.monotonic() - begin > 0.99 * allowed_s
