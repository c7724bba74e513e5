"""Coordinators find each other, and tell workers and clients: added, restarted and removed at run time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from coordinator.peers import PEERS_MAX, SILENT_LEASES, Peers
from coordinator.runtime import CoordinatorRuntime
from kvstore.client.kv_client import KVClient
from kvstore.client.members import Members
from kvstore.directory.membership import Member
from kvstore.transport.base import Credentials
from kvstore.transport.methods import COORDINATOR
from kvstore.wire import common_pb2
from kvstore.wireform import member_to_wire
from tests.service_helpers import ListSource, prompt, until
from tests.test_coordinator_service import FAST, FULL, Cluster, held

GONE_S = SILENT_LEASES * 1.0 + 0.1


def info(name: str, boot: str = "b") -> common_pb2.CoordinatorInfo:
    return common_pb2.CoordinatorInfo(id=name, boot_id=boot, address=f"{name}:1")


def names(peers: Peers, now: float) -> list[str]:
    return [one.address for one in peers.listed(now)]


def test_who_greets_or_answers_is_listed_with_its_boot_id() -> None:
    peers = Peers(info("a"), ["b:1", "a:1"], 1.0, 0.0)
    assert names(peers, 0.0) == ["a:1", "b:1"] and peers.to_greet(0.0) == ["b:1"]
    peers.heard(info("b", "first"), 1.0)
    peers.heard(info("c"), 1.0)
    assert [(one.id, one.boot_id) for one in peers.listed(1.0)] == [("a", "b"), ("b", "first"), ("c", "b")]
    peers.heard(info("b", "second"), 2.0)
    assert [one.boot_id for one in peers.listed(2.0)] == ["b", "second", "b"]
    assert names(peers, 1.0 + GONE_S) == ["a:1", "b:1"]  # c is silent
    assert names(peers, 2.0 + GONE_S) == ["a:1"]
    assert peers.to_greet(2.0 + GONE_S) == ["b:1"]  # it was configured
    peers.heard(info("b", "third"), 20.0)
    assert names(peers, 20.0) == ["a:1", "b:1"]


def test_those_that_others_name_are_greeted_before_they_are_listed() -> None:
    peers = Peers(info("a"), [], 1.0, 0.0)
    peers.named([info("a"), info("b"), common_pb2.CoordinatorInfo()])
    assert names(peers, 0.0) == ["a:1"] and peers.to_greet(0.0) == ["b:1"]
    peers.silent("b:1")
    assert peers.to_greet(0.0) == []
    peers.named([info("b")])
    peers.heard(info("b"), 0.0)
    assert names(peers, 0.0) == ["a:1", "b:1"] == ["a:1", *peers.to_greet(0.0)]


def test_one_coordinator_by_two_names_is_listed_once() -> None:
    peers = Peers(info("a"), ["localhost:1", "b-by-another-name:1"], 1.0, 0.0)
    peers.heard(common_pb2.CoordinatorInfo(id="a", boot_id="b", address="localhost:1"), 0.0)  # itself
    peers.heard(common_pb2.CoordinatorInfo(id="b", boot_id="b", address="b-by-another-name:1"), 0.0)
    peers.heard(info("b"), 0.0)
    assert names(peers, 0.0) == ["a:1", "b:1"]
    assert "localhost:1" not in peers.to_greet(0.0)


def test_the_number_of_peers_is_bounded() -> None:
    peers = Peers(info("a"), [], 1.0, 0.0)
    for number in range(3 * PEERS_MAX):
        peers.heard(info(f"p{number}"), 0.0)
        peers.named([info(f"n{number}")])
    assert len(peers.listed(0.0)) == PEERS_MAX + 1 and len(peers.to_greet(0.0)) == 2 * PEERS_MAX


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster() as made:
        yield made


def lists(runtime: CoordinatorRuntime) -> dict[str, str]:
    """Address -> boot id."""
    return {one.address: one.boot_id for one in runtime.service.coordinators()}


async def test_a_coordinator_comes_and_goes_at_run_time(cluster: Cluster) -> None:
    first = await cluster.coordinator()
    source = ListSource()
    source.add("default", prompt(1, 9))
    announcer = cluster.announcer(source, first.address)
    client = await cluster.client(first.address)
    second = await cluster.coordinator(coordinators=(first.address,))
    both = {first.address: first.boot_id, second.address: second.boot_id}
    await until(lambda: lists(first) == both == lists(second), "they list each other")
    await until(lambda: held(second, source), "the worker announces to the new one")
    await listed_by(client, set(both))
    reply = await greeted(cluster, first)
    assert {one.address: one.boot_id for one in reply.coordinators} == both

    await second.stop()
    only = {first.address: first.boot_id}
    await until(lambda: lists(first) == only, "the silent one is listed no more")
    await until(lambda: list(announcer._streams) == [first.address], "the worker lets go of it")
    client.coordinators._channels.down.add(second.address)
    await listed_by(client, {first.address})


async def listed_by(client: KVClient, addresses: set[str]) -> None:
    """With some lookup's answer, the client knows exactly these."""
    async with asyncio.timeout(20):
        while set(client.coordinators.addresses) != addresses:
            await client.match(FULL, prompt(1, 9))


async def greeted(cluster: Cluster, runtime: CoordinatorRuntime) -> common_pb2.HelloReply:
    channel = await cluster.transport.connect(runtime.address, Credentials())
    try:
        reply: common_pb2.HelloReply = await channel.unary(
            COORDINATOR["Hello"], common_pb2.HelloRequest(protocol=1), timeout_s=5
        )
    finally:
        await channel.close()
    return reply


async def test_a_restarted_coordinator_is_incomplete_until_it_was_told(cluster: Cluster) -> None:
    first = await cluster.coordinator()
    source = ListSource()
    source.add("default", prompt(1, 9))
    cluster.announcer(source, first.address)
    await until(lambda: held(first, source), "it is told")
    address, boot = first.address, first.boot_id
    await first.stop()
    again = await cluster.coordinator(bind=address)
    client = await cluster.client(address)
    seen: list[tuple[bool, int]] = []
    while not seen or not seen[-1][0]:
        plan = await client.match(FULL, prompt(1, 9))
        seen.append((plan.complete, plan.blocks))
        await asyncio.sleep(0.02)
    assert again.boot_id != boot
    assert not seen[0][0] and seen[-1] == (True, 9), "complete before it was told"
    assert all(blocks == 9 for complete, blocks in seen if complete)
    assert again.registry.counters["snapshot_parts"] + again.registry.counters["deltas"] > 0
    assert FAST.lease_s < 1


async def test_newcomers_that_are_still_empty_are_spared_where_there_are_others(cluster: Cluster) -> None:
    client = await cluster.client("127.0.0.1:1")
    members: Members = client.members

    def known(*slow: bool) -> None:
        members.learn(member_to_wire(Member(f"w{at}", 1, f"h{at}:1", slow_start=one)) for at, one in enumerate(slow))

    known(True, True)
    assert set(members.takers()) == {"w0", "w1"}  # everybody is new
    known(True, False)
    assert set(members.takers()) == {"w1"}
    known(False, False)
    assert set(members.takers()) == {"w0", "w1"}
