"""A coordinator on real loopback gRPC: announcements, lookups, membership, fences, waiting for commits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from coordinator.runtime import CoordinatorRuntime
from kvstore.auth import node_credentials
from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig, Config, CoordinatorConfig, ServerConfig, WorkerConfig
from kvstore.errors import BadRequest, NotGranted, Unauthenticated
from kvstore.machine.system import real_system
from kvstore.spec import Shard
from kvstore.transport.base import Credentials
from kvstore.transport.methods import COORDINATOR
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import CommitToken, pack_keys
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import shard_to_wire
from tests.service_helpers import FULL, ListSource, prompt, until
from workers.announcer import Announcer

FAST = CoordinatorConfig(heartbeat_s=0.05, lease_s=0.6)


class Cluster:
    """Coordinators and announcers of one test; all ended with it."""

    def __init__(self) -> None:
        self.system = real_system(2)
        self.transport = GrpcTransport(self.system.clock)
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stack.aclose()
        self.system.pool.close()

    async def coordinator(
        self, bind: str = "127.0.0.1:0", coordinator: CoordinatorConfig = FAST, **server: Any
    ) -> CoordinatorRuntime:
        config = Config(server=ServerConfig(bind=bind, stop_grace_s=0.2, **server), coordinator=coordinator)
        runtime = CoordinatorRuntime(config, self.system, self.transport)
        await runtime.start()
        self.stack.push_async_callback(runtime.stop)
        return runtime

    def announcer(
        self,
        source: ListSource,
        *coordinators: str,
        batch: int = 4096,
        token_file: str = "",
        namespace: str = "default",
    ) -> Announcer:
        credentials = node_credentials(ServerConfig(token_file=token_file), namespace)
        config = WorkerConfig(announce_batch=batch)
        announcer = Announcer(config, self.system, self.transport, credentials, coordinators, source)
        announcer.start()
        self.stack.push_async_callback(announcer.stop, 1.0, leaving=True)
        return announcer

    async def client(self, *coordinators: str, **config: Any) -> KVClient:
        client = await KVClient.connect(ClientConfig(coordinators=coordinators, **config), self.system, self.transport)
        self.stack.push_async_callback(client.close)
        return client

    async def call(self, runtime: CoordinatorRuntime, name: str, request: Any, namespace: str = "default") -> Any:
        channel = await self.transport.connect(runtime.address, Credentials(namespace))
        try:
            return await channel.unary(COORDINATOR[name], request, timeout_s=5)
        finally:
            await channel.close()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster() as made:
        yield made


def held(runtime: CoordinatorRuntime, source: ListSource, namespace: str = "default") -> bool:
    """Whether the directory has exactly what the source holds."""
    known = runtime.registry.inboxes[namespace].directory.contents(source.worker)
    return known == {key: (a.tier, a.fidelity) for key, a in source.held.get(namespace, {}).items()}


async def test_what_is_announced_is_found(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    source = ListSource()
    announcer = cluster.announcer(source, runtime.address)
    client = await cluster.client(runtime.address)
    prefix = prompt(1, 70)
    source.add("default", prefix)
    announcer.wake()
    await until(lambda: held(runtime, source), "the blocks are in the directory")
    plan = await client.match(FULL, prefix)
    assert plan.blocks == 70 and plan.tokens == 280
    assert {run.holder for run in plan.runs} == {"w"} and plan.holders["w"].socket == "/nowhere"
    source.remove("default", prompt(1, 30))
    announcer.wake()
    await until(lambda: held(runtime, source), "the removal is in the directory")
    assert (await client.match(FULL, prefix)).blocks == 0
    runtime.registry.inboxes["default"].directory.validate()


async def test_a_snapshot_follows_a_gap_and_a_restart(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    source = ListSource(outbox=8)
    source.add("default", prompt(1, 50))  # beyond the outbox before anybody listens
    announcer = cluster.announcer(source, runtime.address, batch=7)
    await until(lambda: held(runtime, source), "the snapshot is in the directory")
    assert announcer.counters["snapshots"] >= 1
    address = runtime.address
    await runtime.stop()
    source.add("default", prompt(2, 50))
    source.remove("default", prompt(1, 20))
    again = await cluster.coordinator(bind=address)
    await until(lambda: held(again, source), "a new coordinator has learnt everything")
    assert again.boot_id != runtime.boot_id


async def test_two_coordinators_are_told_and_one_stands_in_for_the_other(cluster: Cluster) -> None:
    first = await cluster.coordinator()
    second = await cluster.coordinator(coordinators=(first.address,))
    source = ListSource()
    announcer = cluster.announcer(source, second.address)  # learns of the first from the second
    client = await cluster.client(first.address, second.address)
    prefix = prompt(3, 12)
    seq = source.add("default", prefix)
    announcer.wake()
    await until(lambda: held(first, source) and held(second, source), "both know the blocks")
    await until(lambda: announcer.settled({"default": seq}), "both have acknowledged")
    await first.stop()
    assert (await client.match(FULL, prefix)).blocks == 12
    await second.stop()
    plan = await client.match(FULL, prefix)
    assert plan.blocks == 0 and not plan.complete


async def test_a_lost_worker_is_hidden_then_freed_and_may_return(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    source = ListSource()
    announcer = cluster.announcer(source, runtime.address)
    client = await cluster.client(runtime.address)
    prefix = prompt(4, 5)
    source.add("default", prefix)
    announcer.wake()
    await until(lambda: held(runtime, source), "the blocks are known")
    await announcer.stop(0.1, leaving=False)
    await until(lambda: runtime.registry.membership.state("w") == "suspect", "it is suspected")
    assert (await client.match(FULL, prefix)).blocks == 0
    assert runtime.registry.blocks(["default"]) == 5
    back = cluster.announcer(source, runtime.address)
    await until(lambda: runtime.registry.membership.state("w") == "alive", "it is back")
    assert (await client.match(FULL, prefix)).blocks == 5
    await back.stop(0.1, leaving=False)
    await until(lambda: runtime.registry.blocks(["default"]) == 0, "its lease is over")
    assert runtime.registry.membership.members() == []


async def test_a_clean_stop_leaves_at_once(cluster: Cluster) -> None:
    runtime = await cluster.coordinator(coordinator=CoordinatorConfig(heartbeat_s=0.05, lease_s=60))
    source = ListSource()
    announcer = cluster.announcer(source, runtime.address)
    source.add("default", prompt(5, 5))
    await until(lambda: held(runtime, source), "the blocks are known")
    await announcer.stop(5.0, leaving=True)
    await until(lambda: runtime.registry.membership.members() == [], "it has left")
    assert runtime.registry.blocks(["default"]) == 0


async def test_an_older_epoch_is_fenced_and_comes_back_higher(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    new = ListSource(epoch=5)
    new.add("default", prompt(6, 4))
    newer = cluster.announcer(new, runtime.address)
    await until(lambda: held(runtime, new), "epoch 5 is known")
    await newer.stop(0.1, leaving=False)
    old = ListSource(epoch=2)
    old.add("default", prompt(7, 3))
    announcer = cluster.announcer(old, runtime.address)
    await until(lambda: held(runtime, old), "the older life came back above the newer one")
    assert old.fenced_by == [5] and old.epoch == 6 and announcer.counters["fenced"] == 1
    assert runtime.registry.membership.epoch("w") == 6


async def test_a_lookup_waits_for_commits_it_is_shown(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    source = ListSource()
    source.add("default", prompt(0, 1))
    announcer = cluster.announcer(source, runtime.address)
    await until(lambda: runtime.registry.membership.state("w") == "alive", "the worker is registered")
    client = await cluster.client(runtime.address)
    prefix = prompt(8, 6)
    token = CommitToken("w", 1, 7)
    waiting = asyncio.ensure_future(client.match(FULL, prefix, after=[token]))
    await until(lambda: any(runtime.registry._waiting["default"]), "the lookup waits")
    source.add("default", prefix)
    announcer.wake()
    plan = await waiting
    assert plan.blocks == 6 and plan.not_applied == ()
    late = await client.match(FULL, prefix, after=[CommitToken("w", 1, 99)])
    assert late.blocks == 6 and late.not_applied == (CommitToken("w", 1, 99),)
    dead = await client.match(FULL, prefix, after=[CommitToken("w", 0, 99)])
    assert all(left.epoch != 0 for left in dead.not_applied)  # that life is over: nothing to wait for


async def test_bad_requests_are_one_line(cluster: Cluster) -> None:
    runtime = await cluster.coordinator(coordinator=CoordinatorConfig(match_keys_max=10))
    whole = shard_to_wire(Shard.whole(FULL))
    root, keys = FULL.root, pack_keys(prompt(9, 3).keys)
    bad = [
        common_pb2.MatchRequest(root=b"short", keys=keys, shards=[whole]),
        common_pb2.MatchRequest(root=root, keys=keys[:-1], shards=[whole]),
        common_pb2.MatchRequest(root=root, keys=keys, shards=[]),
        common_pb2.MatchRequest(root=root, keys=bytes(16 * 11), shards=[whole]),
        common_pb2.MatchRequest(root=root, keys=keys, shards=[whole], least=9),  # type: ignore[arg-type]
        common_pb2.MatchRequest(root=root, keys=keys, shards=[common_pb2.Shard(group=1 << 20)]),
        common_pb2.MatchRequest(root=root, keys=keys, shards=[whole], after=[common_pb2.CommitToken()] * 17),
    ]
    for request in bad:
        with pytest.raises(BadRequest) as error:
            await cluster.call(runtime, "Match", request)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
    client = await cluster.client(runtime.address)
    plan = await client.match(FULL, prompt(9, 20))  # beyond this server's bound: a miss, not the engine's exception
    assert plan.blocks == 0 and client.counters["errors_BadRequest"] == 1
    good = common_pb2.MatchRequest(root=root, keys=keys, shards=[whole])
    assert (await cluster.call(runtime, "Match", good)).blocks == 0


async def announce(
    cluster: Cluster,
    runtime: CoordinatorRuntime,
    *requests: coordinator_pb2.AnnounceRequest,
    credentials: Credentials = Credentials(),
) -> list[Any]:
    """Say this on one stream; what was answered."""

    async def send() -> AsyncIterator[coordinator_pb2.AnnounceRequest]:
        for request in requests:
            yield request

    channel = await cluster.transport.connect(runtime.address, credentials)
    try:
        async with aclosing(channel.stream(COORDINATOR["Announce"], send(), timeout_s=5)) as replies:
            return [reply async for reply in replies]
    finally:
        await channel.close()


async def test_a_malformed_announcement_ends_its_stream_only(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    source = ListSource()
    source.add("default", prompt(10, 4))
    cluster.announcer(source, runtime.address)
    await until(lambda: held(runtime, source), "the blocks are known")
    Request = coordinator_pb2.AnnounceRequest
    register = Request(
        register=coordinator_pb2.Register(member=common_pb2.Member(id="x", epoch=1), heads={"default": 0})
    )
    bad_run = common_pb2.Run(root=b"no", shard=b"no", keys=b"odd")
    for requests in (
        [Request(heartbeat=coordinator_pb2.Heartbeat())],
        [Request()],
        [Request(register=coordinator_pb2.Register(member=common_pb2.Member(id="", epoch=1)))],
        [register, register],
        [register, Request()],
        [register, Request(delta=coordinator_pb2.Delta(namespace="default", first_seq=1, last_seq=1))],
        [register, Request(snapshot=coordinator_pb2.SnapshotChunk(namespace="default", snapshot=1, runs=[bad_run]))],
        [
            Request(
                register=coordinator_pb2.Register(member=common_pb2.Member(id="redis:a", epoch=1), heads={"default": 0})
            )
        ],
    ):
        with pytest.raises(BadRequest):
            await announce(cluster, runtime, *requests)
    assert held(runtime, source)
    elsewhere = Request(delta=coordinator_pb2.Delta(namespace="nobodys", first_seq=1, last_seq=1))
    assert [reply.WhichOneof("body") for reply in await announce(cluster, runtime, register, elsewhere)] == ["welcome"]
    assert list(runtime.registry.inboxes) == ["default"]


async def test_completeness_is_told_once_everybody_could_register(cluster: Cluster) -> None:
    runtime = await cluster.coordinator()
    source = ListSource()
    source.add("default", prompt(11, 4))
    cluster.announcer(source, runtime.address)
    status = await cluster.call(runtime, "Status", common_pb2.StatusRequest())
    assert not status.complete
    client = await cluster.client(runtime.address)
    plans = []

    async def look() -> bool:
        plans.append(await client.match(FULL, prompt(11, 4)))
        return plans[-1].complete

    async with asyncio.timeout(10):
        while not await look():
            await asyncio.sleep(0.02)
    assert plans[-1].blocks == 4
    status = await cluster.call(runtime, "Status", common_pb2.StatusRequest())
    assert status.complete and status.directory_blocks == 4
    assert [(w.member.id, w.member.state, w.pid) for w in status.workers] == [("w", "alive", 7)]


async def test_namespaces_do_not_see_each_other(cluster: Cluster, tmp_path: Path) -> None:
    tokens = {name: f"{name}-token-0123456789" for name in ("cluster", "alice", "bob")}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token)
    lines = ["[namespaces.a]", "[namespaces.b]"]
    for name, namespace in (("alice", "a"), ("bob", "b")):
        digest = hashlib.sha256(tokens[name].encode()).hexdigest()
        lines += [f"[identities.{name}]", f'token_sha256 = "{digest}"', f'namespaces = ["{namespace}"]']
    (tmp_path / "namespaces.toml").write_text("\n".join(lines))
    runtime = await cluster.coordinator(
        namespaces_file=str(tmp_path / "namespaces.toml"), token_file=str(tmp_path / "cluster")
    )
    source = ListSource()
    prefix = prompt(12, 6)
    source.add("a", prefix)
    cluster.announcer(source, runtime.address, token_file=str(tmp_path / "cluster"), namespace="a")
    await until(lambda: held(runtime, source, "a"), "namespace a has its blocks")
    alice = await cluster.client(runtime.address, namespace="a", token_file=str(tmp_path / "alice"))
    bob = await cluster.client(runtime.address, namespace="b", token_file=str(tmp_path / "bob"))
    assert (await alice.match(FULL, prefix)).blocks == 6
    assert (await bob.match(FULL, prefix)).blocks == 0
    status = await bob.coordinators.call(COORDINATOR["Status"], common_pb2.StatusRequest(), timeout_s=2)
    assert status.directory_blocks == 0 and not status.counters and not status.workers[0].counters
    with pytest.raises(NotGranted):
        await cluster.client(runtime.address, namespace="a", token_file=str(tmp_path / "bob"))
    with pytest.raises(NotGranted):
        await cluster.client(runtime.address, namespace="c", token_file=str(tmp_path / "bob"))
    with pytest.raises(Unauthenticated):
        await cluster.client(runtime.address, namespace="a")
    register = coordinator_pb2.AnnounceRequest(
        register=coordinator_pb2.Register(member=common_pb2.Member(id="x", epoch=1))
    )
    with pytest.raises(Unauthenticated):  # a client is no worker
        await announce(cluster, runtime, register, credentials=Credentials("a", tokens["alice"]))
