"""The gRPC transport on real sockets: every kind of call, the gate, errors, bounds, and the end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import (
    BadRequest,
    Corrupt,
    Incompatible,
    KVStoreError,
    NotGranted,
    Overloaded,
    ServiceError,
    SetupError,
    Unauthenticated,
    Unavailable,
)
from kvstore.transport.base import Channel, Credentials, Method
from kvstore.transport.malloc import keep_freed_memory
from kvstore.transport.methods import COORDINATOR, WORKER
from kvstore.transport.rpc import GrpcTransport
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
from tests.net_service import Clock, Service, endless, sequence

TOKEN = "cluster-token-0123456789"
CLIENT = "client-token-0123456789"
NAMESPACES = f"""
[namespaces.default]
[namespaces.other]
[identities.client]
token_sha256 = "{hashlib.sha256(CLIENT.encode()).hexdigest()}"
namespaces = ["default"]
"""


class Net:
    """One server and the channels to it; all closed with it."""

    def __init__(self, tmp_path: Path | None = None, **limits: Any) -> None:
        policy = load_policy()
        if tmp_path is not None:
            (tmp_path / "token").write_text(TOKEN)
            (tmp_path / "namespaces.toml").write_text(NAMESPACES)
            policy = load_policy(str(tmp_path / "namespaces.toml"), str(tmp_path / "token"))
        self.auth = Authenticator(policy)
        self.transport = GrpcTransport(Clock(), **limits)
        self.service = Service()
        self.channels: list[Channel] = []
        self.server: Any = None

    async def __aenter__(self) -> Net:
        await self.serve("127.0.0.1:0")
        return self

    async def __aexit__(self, *exc: object) -> None:
        for channel in self.channels:
            await channel.close()
        await self.server.close(0.0)

    async def serve(self, address: str) -> None:
        services = {"Worker": self.service, "Coordinator": self.service}
        self.server = await self.transport.serve(address, services, self.auth)

    async def channel(self, token: str = "", namespace: str = "default") -> Channel:
        channel = await self.transport.connect(self.server.address, Credentials(namespace, token))
        self.channels.append(channel)
        return channel


def match(keys: int = 1, *, wait: bool = False, size: int = 0) -> common_pb2.MatchRequest:
    return common_pb2.MatchRequest(keys=bytes(16 * keys), wait_ms=int(wait), least=size)  # type: ignore[arg-type]


def announce(epoch: int) -> coordinator_pb2.AnnounceRequest:
    return coordinator_pb2.AnnounceRequest(register=coordinator_pb2.Register(member=common_pb2.Member(epoch=epoch)))


async def soon(condition: Any) -> None:
    """Until `condition()` holds, at most 5 s."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_context_of_a_call_says_who_and_until_when(tmp_path: Path) -> None:
    async with Net(tmp_path) as net:
        await (await net.channel(CLIENT)).unary(WORKER["Match"], match(), timeout_s=5)
        stream = (await net.channel(TOKEN, "other")).stream(
            COORDINATOR["Announce"], sequence(announce(1)), timeout_s=None
        )
        assert len([reply async for reply in stream]) == 1
        client, node = net.service.contexts
        assert (client.identity, client.role, client.namespace) == ("client", "client", "default")
        assert (node.identity, node.role, node.namespace) == ("cluster", "node", "other")
        assert client.peer.startswith("ipv4:127.0.0.1:")
        assert client.deadline is not None  # gRPC rounds what is left, so a little more than 5 s may be read
        assert 0 < client.deadline - Clock().monotonic() <= 6
        assert node.deadline is None


@pytest.mark.parametrize("method", [m for table in (WORKER, COORDINATOR) for m in table.values()], ids=lambda m: m.path)
async def test_no_call_passes_the_gate_without_its_token(tmp_path: Path, method: Method) -> None:
    async def ask(token: str, namespace: str) -> None:
        channel = await net.channel(token, namespace)
        request = method.request() if method.request is not None else b""
        if method.client_stream or method.server_stream:
            async for _ in channel.stream(method, sequence(request), timeout_s=5):
                pass
        else:
            await channel.unary(method, request, timeout_s=5)

    async with Net(tmp_path) as net:
        for token in ("", "wrong-token-0123456789"):
            with pytest.raises(Unauthenticated) as caught:
                await ask(token, "default")
            assert "wrong-token" not in str(caught.value)
        for namespace in ("other", "nowhere"):
            with pytest.raises(NotGranted, match=f"namespace {namespace} does not exist"):
                await ask(CLIENT, namespace)
        assert net.service.contexts == []


async def test_announcing_is_for_nodes(tmp_path: Path) -> None:
    async with Net(tmp_path) as net:
        stream = (await net.channel(CLIENT)).stream(COORDINATOR["Announce"], sequence(announce(1)), timeout_s=None)
        with pytest.raises(Unauthenticated, match="role node"):
            await anext(stream)


async def test_health_needs_no_token_and_reflection_does(tmp_path: Path) -> None:
    async def listed(metadata: list[tuple[str, str]]) -> list[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        replies = [r async for r in stub.ServerReflectionInfo(sequence(request), metadata=metadata)]
        return [service.name for service in replies[0].list_services_response.service]

    async with Net(tmp_path) as net, grpc.aio.insecure_channel(net.server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tiered_kvstore.v1.Worker", "tiered_kvstore.v1.Coordinator"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed([])
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        names = await listed([("authorization", f"Bearer {CLIENT}")])
        assert {"tiered_kvstore.v1.Worker", "tiered_kvstore.v1.Coordinator"} <= set(names)


async def test_errors_of_a_handler_arrive_as_themselves() -> None:
    async with Net() as net:
        channel = await net.channel()
        with pytest.raises(Overloaded, match="over quota: later"):
            await channel.unary(WORKER["Purge"], worker_pb2.PurgeRequest(), timeout_s=5)
        with pytest.raises(NotGranted, match="namespace x does not exist"):
            await channel.unary(WORKER["Purge"], worker_pb2.PurgeRequest(root=b"r"), timeout_s=5)
        with pytest.raises(Overloaded, match="at once"):
            await anext(channel.stream(WORKER["Get"], sequence(worker_pb2.GetRequest(redis=True)), timeout_s=5))
        stop = worker_pb2.PutFrame(data=b"stop").SerializeToString()
        with pytest.raises(Overloaded, match="enough"):
            await anext(channel.stream(WORKER["Put"], endless(stop), timeout_s=5))
        newer = Method("Worker", "Newer", common_pb2.StatusRequest, common_pb2.WorkerStatus)
        with pytest.raises(Incompatible, match="does not know"):
            await channel.unary(newer, common_pb2.StatusRequest(), timeout_s=5)


async def test_a_bug_is_internal_and_logged_once_without_its_words_on_the_wire(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Net(tmp_path) as net:
        channel = await net.channel(TOKEN)
        with caplog.at_level(logging.DEBUG), pytest.raises(ServiceError) as caught:
            await channel.unary(WORKER["Status"], common_pb2.StatusRequest(), timeout_s=5)
        assert "ZeroDivisionError" in str(caught.value) and "secret of the server" not in str(caught.value)
        assert "\n" not in str(caught.value)
        records = [r for r in caplog.records if r.name == "kvstore" and r.exc_info]
        assert len(records) == 1
        assert TOKEN not in caplog.text


async def test_a_malformed_message_is_the_callers_fault() -> None:
    raw = Method("Worker", "Match", None, None)
    async with Net() as net, grpc.aio.insecure_channel(net.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(raw.path)(b"\xff\xff\xff")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        bad = [f async for f in (await net.channel()).stream(WORKER["Put"], sequence(b""), timeout_s=5)]
        assert len(bad) == 1, "an empty frame is an empty message"
        with pytest.raises(Corrupt):
            await anext((await net.channel()).stream(WORKER["Put"], sequence(b"\xff\xff"), timeout_s=5))
        wrong = Method("Worker", "Get", worker_pb2.GetRequest, common_pb2.MatchReply, server_stream=True)
        request = worker_pb2.GetRequest(layer_count=1, layer_first=3)
        with pytest.raises(Corrupt, match="is not a MatchReply"):
            await anext((await net.channel()).stream(wrong, sequence(request), timeout_s=5))


async def test_a_caller_without_a_deadline_is_bounded_by_the_server() -> None:
    async with Net(call_max_s=0.1) as net, grpc.aio.insecure_channel(net.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(WORKER["Match"].path)(match(wait=True).SerializeToString())
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_calls_at_a_time_are_bounded_and_streams_do_not_take_their_places() -> None:
    async with Net(calls_max=2, streams_max=1) as net:
        channel = await net.channel()
        stream = channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None)
        await anext(stream)
        calls = [asyncio.create_task(channel.unary(WORKER["Match"], match(wait=True), timeout_s=5)) for _ in range(2)]
        await soon(lambda: len(net.service.contexts) == 3)
        with pytest.raises(Overloaded, match="too many calls"):
            await channel.unary(WORKER["Match"], match(), timeout_s=5)
        with pytest.raises(Overloaded, match="too many calls"):
            await anext(channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None))
        net.service.gate.set()
        await asyncio.gather(*calls)
        assert (await channel.unary(WORKER["Match"], match(2), timeout_s=5)).blocks == 2, "places come back"
        await stream.aclose()  # type: ignore[attr-defined]


async def test_messages_are_bounded_both_ways() -> None:
    async with Net(message_bytes_max=100_000) as net:
        channel = await net.channel()
        with pytest.raises(Overloaded):
            await channel.unary(WORKER["Match"], match(10_000), timeout_s=5)
        with pytest.raises(Overloaded):
            await channel.unary(WORKER["Match"], match(size=200_000), timeout_s=5)
        assert (await channel.unary(WORKER["Match"], match(1), timeout_s=5)).blocks == 1


async def test_closing_an_iterator_cancels_the_call() -> None:
    async with Net() as net:
        channel = await net.channel()
        stream: Any = channel.stream(
            WORKER["Get"], sequence(worker_pb2.GetRequest(layer_count=1, least=1)), timeout_s=60
        )
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(net.service.cancelled.wait(), 5)


async def test_a_cancelled_caller_is_cancelled_and_so_is_its_handler() -> None:
    async with Net() as net:
        channel = await net.channel()
        call = asyncio.create_task(channel.unary(WORKER["Match"], match(wait=True), timeout_s=60))
        await net.service.began.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(net.service.cancelled.wait(), 5)


async def test_a_closed_channel_fails_its_calls() -> None:
    async with Net() as net:
        channel = await net.channel()
        call = asyncio.create_task(channel.unary(WORKER["Match"], match(wait=True), timeout_s=60))
        stream = channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None)
        await anext(stream)
        await net.service.began.wait()
        await channel.close()
        with pytest.raises(Unavailable):
            await call
        with pytest.raises(Unavailable):
            await anext(stream)


async def test_nobody_there_is_unavailable_and_a_new_server_is_found() -> None:
    net = Net()
    await net.serve("127.0.0.1:0")
    address = net.server.address
    channel = await net.channel()
    await channel.unary(WORKER["Match"], match(), timeout_s=5)
    await net.server.close(0.0)
    with pytest.raises(Unavailable, match=address):
        await channel.unary(WORKER["Match"], match(), timeout_s=5)
    await net.serve(address)
    async with asyncio.timeout(5):
        while True:
            try:
                await channel.unary(WORKER["Match"], match(), timeout_s=5)
                break
            except Unavailable:
                await asyncio.sleep(0.05)
    await net.__aexit__()


async def test_a_port_in_use_is_a_setup_error() -> None:
    async with Net() as net:
        port = net.server.address.rpartition(":")[2]
        with pytest.raises(SetupError, match=f"port {port} is in use: choose another with --bind"):
            await GrpcTransport(Clock()).serve(net.server.address, {"Worker": Service()}, net.auth)


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.1:9", "no.such.host.invalid:9", ":1", "a:b"])
async def test_an_address_that_cannot_be_bound_is_a_setup_error(address: str) -> None:
    with pytest.raises(SetupError) as caught:
        await GrpcTransport(Clock()).serve(address, {"Worker": Service()}, Authenticator(load_policy()))
    assert "\n" not in str(caught.value) and "in use" not in str(caught.value)


async def test_every_error_of_the_tree_has_a_status_and_comes_back(tmp_path: Path) -> None:
    """Each class with a code of its own survives the wire; the others become their nearest relative."""

    class Raising(Service):
        error: KVStoreError

        async def purge(self, request: Any, context: Any) -> Any:
            raise self.error

    net = Net()
    net.service = raising = Raising()
    async with net:
        channel = await net.channel()
        for kind in (BadRequest, NotGranted, Unauthenticated, Incompatible, Overloaded, Unavailable, Corrupt):
            raising.error = kind("one line that says what to do")
            with pytest.raises(kind, match="one line that says what to do"):
                await channel.unary(WORKER["Purge"], worker_pb2.PurgeRequest(), timeout_s=5)


def test_malloc_is_tuned_unless_the_user_did() -> None:
    glibc = "libc.so.6" in Path("/proc/self/maps").read_text()
    assert keep_freed_memory({}) is glibc
    assert keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "1"}) is False
