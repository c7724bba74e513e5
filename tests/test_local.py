"""The local socket on a real one: calls, memory, who gets in, and what a hostile or dying peer can do (nothing)."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import (
    BadRequest,
    Corrupt,
    DeadlineExceeded,
    NotGranted,
    Overloaded,
    ServiceError,
    SetupError,
    Unauthenticated,
    Unavailable,
)
from kvstore.memory import MemfdMemory
from kvstore.seams import Segment
from kvstore.transport import local, local_frames
from kvstore.transport.base import CallContext, Credentials
from kvstore.transport.local_client import LocalClient, map_descriptor
from kvstore.transport.local_frames import LocalLimits
from kvstore.transport.methods import COORDINATOR, WORKER_LOCAL
from kvstore.wire import common_pb2, worker_pb2

pytestmark = pytest.mark.usefixtures("no_leaks")
KIB = 1024


class Service:
    """`WorkerLocal`. Segments it passes are its own; `gate` holds calls that wait."""

    def __init__(self) -> None:
        self.contexts: list[CallContext] = []
        self.gate = asyncio.Event()
        self.waiting = 0
        self.most = 0  # waiting at a time
        self.closed: list[int] = []  # calls that waited still when a connection was cleaned up
        self.segments: list[Segment] = []

    async def hello(self, request: worker_pb2.LocalHelloRequest, context: CallContext) -> common_pb2.HelloReply:
        assert context.connection is not None
        self.contexts.append(context)
        context.connection.on_close.append(lambda: self.closed.append(self.waiting))
        return common_pb2.HelloReply(id="w", boot_id=context.namespace)

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        self.contexts.append(context)
        if request.wait_ms:
            await self.wait()
        return common_pb2.MatchReply(blocks=len(request.keys), boot_id="x" * request.least)

    async def wait(self) -> None:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1

    async def stage(self, request: worker_pb2.StageRequest, context: CallContext) -> worker_pb2.StageReply:
        if self.gate.is_set():
            await asyncio.sleep(0.01)
        segment = self.make(request.bytes, sealed_writes=False)
        context.attach(segment, writable=True)
        return worker_pb2.StageReply(segment=worker_pb2.SegmentInfo(segment=1, bytes=request.bytes, writable=True))

    async def open(self, request: worker_pb2.OpenRequest, context: CallContext) -> worker_pb2.OpenReply:
        for number in range(request.deadline_ms):
            segment = self.make(4 * KIB, sealed_writes=True)
            segment.view[:4] = struct.pack("<I", number)
            context.attach(segment, writable=False)
        if request.redis:
            await self.wait()
        return worker_pb2.OpenReply(hold=request.deadline_ms)

    async def release(self, request: worker_pb2.ReleaseRequest, context: CallContext) -> worker_pb2.ReleaseReply:
        raise ZeroDivisionError("secret of the server")

    async def commit(self, request: worker_pb2.CommitRequest, context: CallContext) -> worker_pb2.PutReply:
        raise Overloaded("over quota: later")

    def make(self, nbytes: int, *, sealed_writes: bool) -> Segment:
        segment = MemfdMemory().segment("kvstore-test", nbytes, sealed_writes=sealed_writes)
        self.segments.append(segment)
        return segment


class Net:
    """One server, the clients it was asked for, and the ends of raw sockets."""

    def __init__(self, path: str, limits: LocalLimits, auth: Authenticator | None = None) -> None:
        self.path = path
        self.limits = limits
        self.auth = auth or Authenticator(load_policy(), os.getuid())
        self.service = Service()
        self.clients: list[LocalClient] = []
        self.raw: list[socket.socket] = []
        self.server: Any = None

    async def __aenter__(self) -> Net:
        self.server = await local.serve(self.path, self.service, self.auth, self.limits)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for client in self.clients:
            await client.close()
        for sock in self.raw:
            sock.close()
        await self.server.close(0.0)
        for segment in self.service.segments:
            segment.close()

    async def client(self, namespace: str = "default", token: str = "") -> LocalClient:
        client = await local.connect(self.path, Credentials(namespace, token), self.limits)
        self.clients.append(client)
        return client

    async def stranger(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.raw.append(sock)
        await asyncio.get_running_loop().sock_connect(sock, self.path)
        return sock

    async def ended(self, count: int) -> None:
        await soon(lambda: len(self.service.closed) == count)


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with Net(str(tmp_path / "run" / "w.sock"), LocalLimits(message_bytes_max=64 * KIB, inflight_max=8)) as net:
        yield net


async def soon(condition: Any) -> None:
    """Until `condition()` holds, at most 5 s."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def rest(sock: socket.socket) -> bytes:
    """All that comes until the peer closes, at most 5 s."""
    data = b""
    async with asyncio.timeout(5):
        while True:
            try:
                part = await asyncio.get_running_loop().sock_recv(sock, 65536)
            except ConnectionResetError:
                part = b""
            if not part:
                return data
            data += part


def errors_in(data: bytes) -> list[str]:
    frames = local_frames.Decoder(1 << 20, (local_frames.REPLY, local_frames.ERROR)).feed(data)
    return [str(local_frames.decode_error(f.payload)) for f in frames if f.kind == local_frames.ERROR]


def match(keys: bytes = b"", *, wait: bool = False, size: int = 0) -> common_pb2.MatchRequest:
    return common_pb2.MatchRequest(keys=keys, wait_ms=int(wait), least=size)  # type: ignore[arg-type]


HELLO = worker_pb2.LocalHelloRequest(hello=common_pb2.HelloRequest(protocol=1), namespace="default")


def request_frame(name: str, message: Any, call: int = 1) -> bytes:
    return local_frames.encode(local_frames.REQUEST, local_frames.NUMBERS[name], call, message.SerializeToString())


# calls


async def test_a_greeting_and_calls(net: Net) -> None:
    client = await net.client()
    assert (client.hello.id, client.hello.boot_id) == ("w", "default")
    reply, segments = await client.call(WORKER_LOCAL["Match"], match(b"abc"), timeout_s=5)
    assert reply.blocks == 3 and segments == []
    context = net.service.contexts[-1]
    assert (context.identity, context.namespace) == ("default", "default")
    assert context.peer == f"unix:uid={os.getuid()},pid={os.getpid()}"
    assert context.connection is net.service.contexts[0].connection is not None


async def test_calls_overtake_each_other(net: Net) -> None:
    client = await net.client()
    slow = asyncio.create_task(client.call(WORKER_LOCAL["Match"], match(b"slow", wait=True), timeout_s=5))
    await soon(lambda: net.service.waiting == 1)
    fast = [client.call(WORKER_LOCAL["Match"], match(bytes(n)), timeout_s=5) for n in range(5)]
    assert [reply.blocks for reply, _ in await asyncio.gather(*fast)] == list(range(5))
    assert not slow.done()
    net.service.gate.set()
    assert (await slow)[0].blocks == 4


async def test_errors_arrive_as_themselves_and_bugs_as_internal(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    client = await net.client()
    with pytest.raises(Overloaded, match="over quota: later"):
        await client.call(WORKER_LOCAL["Commit"], worker_pb2.CommitRequest(), timeout_s=5)
    with pytest.raises(ServiceError, match="ZeroDivisionError") as caught:
        await client.call(WORKER_LOCAL["Release"], worker_pb2.ReleaseRequest(), timeout_s=5)
    assert "secret" not in str(caught.value)
    assert len([record for record in caplog.records if record.exc_info]) == 1
    with pytest.raises(BadRequest, match="not a call of the local socket"):
        await client.call(COORDINATOR["Match"], match(), timeout_s=5)
    assert (await client.call(WORKER_LOCAL["Match"], match(b"a"), timeout_s=5))[0].blocks == 1, "and it goes on"


async def test_messages_are_bounded_both_ways(net: Net) -> None:
    client = await net.client()
    with pytest.raises(BadRequest, match="at most"):
        await client.call(WORKER_LOCAL["Match"], match(bytes(70 * KIB)), timeout_s=5)
    with pytest.raises(Overloaded, match="ask for less"):
        await client.call(WORKER_LOCAL["Match"], match(size=70_000), timeout_s=5)
    reply, _ = await client.call(WORKER_LOCAL["Match"], match(bytes(60 * KIB), size=60_000), timeout_s=5)
    assert reply.blocks == 60 * KIB and len(reply.boot_id) == 60_000


async def test_many_large_calls_at_once_all_arrive(net: Net) -> None:
    """More than the kernel's buffer, in both directions: the queues and their bounds work."""
    client = await net.client()
    calls = [client.call(WORKER_LOCAL["Match"], match(bytes(60_000 + n), size=60_000), timeout_s=10) for n in range(60)]
    assert [reply.blocks for reply, _ in await asyncio.gather(*calls)] == [60_000 + n for n in range(60)]


async def test_calls_of_a_connection_are_bounded_and_wait_their_turn(net: Net) -> None:
    client = await net.client()
    calls = [asyncio.create_task(client.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=5)) for _ in range(30)]
    await soon(lambda: net.service.waiting == 8)
    net.service.gate.set()
    await asyncio.gather(*calls)
    assert net.service.most == 8


async def test_a_stranger_who_sends_more_calls_than_allowed_waits_too(net: Net) -> None:
    sock = await net.stranger()
    await asyncio.get_running_loop().sock_sendall(sock, request_frame("Hello", HELLO))
    await soon(lambda: net.service.contexts)
    await asyncio.sleep(0)
    many = b"".join(request_frame("Match", match(wait=True), call) for call in range(2, 300))
    await asyncio.get_running_loop().sock_sendall(sock, many)
    await soon(lambda: net.service.waiting == 8)
    net.service.gate.set()
    await soon(lambda: len(net.service.contexts) == 299)
    assert net.service.most == 8


async def test_a_deadline_passes_and_the_late_reply_is_dropped(net: Net) -> None:
    client = await net.client()
    with pytest.raises(DeadlineExceeded, match=r"no answer to Match within 0\.05 s"):
        await client.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=0.05)
    net.service.gate.set()
    await soon(lambda: net.service.waiting == 0)
    assert (await client.call(WORKER_LOCAL["Match"], match(b"a"), timeout_s=5))[0].blocks == 1


async def test_late_memory_ends_the_connection_unless_it_is_taken(net: Net) -> None:
    dropping, taking = await net.client(), await net.client()
    late: list[Any] = []
    taking.on_late = lambda method, reply, segments: late.append((method.name, reply.hold, segments))
    for client in (dropping, taking):
        with pytest.raises(DeadlineExceeded):
            await client.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(deadline_ms=2, redis=True), timeout_s=0.05)
    net.service.gate.set()
    await soon(lambda: dropping.closed and late)
    assert not taking.closed
    [(name, hold, segments)] = late
    assert (name, hold, len(segments)) == ("Open", 2, 2)
    for segment in segments:
        segment.close()


async def test_too_many_unanswered_calls_end_the_connection(net: Net) -> None:
    client = await net.client()
    for _ in range(9):
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await client.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=0.02)
    await soon(lambda: client.closed)


async def test_a_cancelled_caller_leaves_the_connection_whole(net: Net) -> None:
    client = await net.client()
    call = asyncio.create_task(client.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=5))
    await soon(lambda: net.service.waiting == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    net.service.gate.set()
    assert (await client.call(WORKER_LOCAL["Match"], match(b"a"), timeout_s=5))[0].blocks == 1


# memory


async def test_staging_is_written_by_the_client_and_read_by_the_worker(net: Net) -> None:
    client = await net.client()
    reply, [staging] = await client.call(WORKER_LOCAL["Stage"], worker_pb2.StageRequest(bytes=16 * KIB), timeout_s=5)
    assert reply.segment.bytes == 16 * KIB and not staging.view.readonly
    staging.view[:5] = b"bytes"
    assert bytes(net.service.segments[0].view[:5]) == b"bytes"
    staging.close()


async def test_read_segments_are_read_only(net: Net) -> None:
    client = await net.client()
    _, [segment] = await client.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(deadline_ms=1), timeout_s=5)
    assert segment.view.readonly
    net.service.segments[0].view[8] = 77
    assert segment.view[8] == 77, "the same memory"
    segment.close()


@pytest.mark.parametrize("count", [0, 1, 253, 254, 600])
async def test_any_number_of_segments_passes_in_order(net: Net, count: int) -> None:
    client = await net.client()
    other = asyncio.create_task(client.call(WORKER_LOCAL["Match"], match(b"a" * 30_000), timeout_s=5))
    reply, segments = await client.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(deadline_ms=count), timeout_s=10)
    assert reply.hold == count
    assert [struct.unpack_from("<I", segment.view)[0] for segment in segments] == list(range(count))
    assert (await other)[0].blocks == 30_000
    for segment in segments:
        segment.close()


async def test_a_segment_lives_while_a_slice_of_it_does(net: Net) -> None:
    client = await net.client()
    _, [segment] = await client.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(deadline_ms=1), timeout_s=5)
    piece = segment.view[:4]
    segment.close()
    segment.close()
    assert bytes(piece) == bytes(4) and len(segment.view) == 0


async def test_memory_that_could_shrink_is_refused() -> None:
    descriptor = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(descriptor, 4096)
    copy = os.dup(descriptor)
    with pytest.raises(Corrupt, match="not sealed"):
        map_descriptor(descriptor, writable=False)
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(Corrupt, match="not sealed"):
        map_descriptor(os.dup(copy), writable=False)
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    map_descriptor(copy, writable=False).close()
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(Corrupt, match="not sealed"):
        map_descriptor(reading, writable=False)


async def test_a_worker_that_passes_unsealed_memory_is_left(net: Net) -> None:
    class Unsealed:
        view, nbytes = memoryview(b""), 4096

        def __init__(self) -> None:
            self.fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)

        def close(self) -> None:
            os.close(self.fd)

    def unsealed(nbytes: int, *, sealed_writes: bool) -> Any:
        net.service.segments.append(Unsealed())  # type: ignore[arg-type]
        return net.service.segments[-1]

    net.service.make = unsealed  # type: ignore[method-assign]
    client = await net.client()
    with pytest.raises(Corrupt, match="not sealed"):
        await client.call(WORKER_LOCAL["Stage"], worker_pb2.StageRequest(bytes=4096), timeout_s=5)
    assert client.closed


# who gets in


async def test_namespaces_and_versions_are_checked_at_the_greeting(net: Net) -> None:
    with pytest.raises(NotGranted, match="namespace other does not exist"):
        await net.client("other")
    sock = await net.stranger()
    old = worker_pb2.LocalHelloRequest(hello=common_pb2.HelloRequest(protocol=99), namespace="default")
    await asyncio.get_running_loop().sock_sendall(sock, request_frame("Hello", old))
    assert "update the older side" in errors_in(await rest(sock))[0]
    assert net.service.contexts == []


async def test_another_user_needs_a_token(tmp_path: Path) -> None:
    auth = Authenticator(load_policy(), os.getuid() + 1)
    async with Net(str(tmp_path / "w.sock"), LocalLimits(), auth) as net:
        with pytest.raises(Unauthenticated):
            await net.client()
    (tmp_path / "token").write_text("cluster-token-0123456789")
    auth = Authenticator(load_policy("", str(tmp_path / "token")), os.getuid() + 1)
    async with Net(str(tmp_path / "w.sock"), LocalLimits(), auth) as net:
        assert (await net.client(token="cluster-token-0123456789")).hello.id == "w"
        for token in ("", "wrong-token-0123456789"):
            with pytest.raises(Unauthenticated) as caught:
                await net.client(token=token)
            assert "wrong-token" not in str(caught.value)


@pytest.mark.parametrize("name", ["Match", "Open", "Stage", "Commit", "Release"])
async def test_nothing_is_answered_before_the_greeting(net: Net, name: str) -> None:
    request = WORKER_LOCAL[name].request
    assert request is not None
    sock = await net.stranger()
    await asyncio.get_running_loop().sock_sendall(sock, request_frame(name, request()))
    assert errors_in(await rest(sock)) == ["the first frame must be Hello, and its answer be awaited"]
    assert net.service.contexts == []


async def test_calls_sent_along_with_the_greeting_are_refused(net: Net) -> None:
    sock = await net.stranger()
    await asyncio.get_running_loop().sock_sendall(sock, request_frame("Hello", HELLO) + request_frame("Match", match()))
    assert "the first frame must be Hello" in errors_in(await rest(sock))[0]
    assert all(context.namespace == "default" for context in net.service.contexts)


async def test_a_second_greeting_is_refused(net: Net) -> None:
    client = await net.client()
    with pytest.raises(BadRequest, match="greeted already"):
        await client.greet(Credentials("default"))


async def test_connections_are_bounded(tmp_path: Path) -> None:
    async with Net(str(tmp_path / "w.sock"), LocalLimits(connections_max=2)) as net:
        first, _ = await net.client(), await net.client()
        with pytest.raises(Overloaded, match="too many local connections"):
            await net.client()
        await first.close()
        await net.ended(1)
        assert (await net.client()).hello.id == "w", "places come back"


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no worker answers on"):
        await local.connect(str(tmp_path / "none.sock"), Credentials(), LocalLimits())


# hostile bytes


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (struct.pack("<IBBHI", 1 << 31, 1, 1, 0, 1), "at most"),
        (struct.pack("<IBBHI", 0, 9, 1, 0, 1), "unknown kind 9"),
        (struct.pack("<IBBHI", 0, 2, 1, 0, 1), "unknown kind 2"),
        (struct.pack("<IBBHI", 0, 1, 1, 3, 1), "cannot have 3 descriptors"),
        (struct.pack("<IBBHI", 4, 1, 1, 1, 1) + b"\0abc", "1 descriptors announced, 0 came"),
        (struct.pack("<IBBHI", 3, 1, 1, 0, 1) + b"\xff\xff\xff", "is not a LocalHelloRequest"),
        (struct.pack("<IBBHI", 0, 1, 77, 0, 1), "the first frame must be Hello"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", ""),
    ],
)
async def test_bytes_that_are_no_frames_close_the_connection_with_a_reason(net: Net, data: bytes, problem: str) -> None:
    sock = await net.stranger()
    await asyncio.get_running_loop().sock_sendall(sock, data)
    reasons = errors_in(await rest(sock))
    assert len(reasons) == 1 and problem in reasons[0]
    assert (await net.client()).hello.id == "w", "the server goes on"


async def test_random_and_cut_bytes_never_reach_the_loop(net: Net) -> None:
    """Seeded garbage, before and after a greeting; pytest fails on any exception the loop would report."""
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    frame = request_frame("Match", match(b"abc"), 7)
    for number in range(120):
        garbage = bytes(os.urandom(1 + number % 40)) if number % 2 else frame[: number % len(frame)]
        sock = await net.stranger()
        if number % 3:
            await asyncio.get_running_loop().sock_sendall(sock, request_frame("Hello", HELLO))
            await soon(lambda n=len(net.service.contexts): len(net.service.contexts) >= n)
        await asyncio.get_running_loop().sock_sendall(sock, garbage)
        sock.close()
    assert (await net.client()).hello.id == "w"
    assert problems == []


async def test_descriptors_from_a_client_are_closed_and_refused(net: Net) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sock = await net.stranger()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    sock.sendmsg([request_frame("Hello", HELLO)], rights)
    assert "at most 0 may be sent here" in errors_in(await rest(sock))[0]
    assert len(os.listdir("/proc/self/fd")) == before + 1


async def test_a_worker_that_speaks_nonsense_is_left(tmp_path: Path) -> None:
    """The client's side of the same bytes."""
    path = str(tmp_path / "fake.sock")
    answers = [
        b"\xff" * 40,
        local_frames.encode(local_frames.REPLY, 1, 99, b""),
        local_frames.encode(local_frames.REPLY, 1, 1, b"\xff\xff"),
        local_frames.encode(local_frames.REQUEST, 1, 1, b""),
        b"",
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(path)
        listener.listen()
        for answer in answers:
            connecting = asyncio.create_task(local.connect(path, Credentials(), LocalLimits()))
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            with sock:
                await asyncio.get_running_loop().sock_recv(sock, 1000)
                await asyncio.get_running_loop().sock_sendall(sock, answer)
            with pytest.raises((BadRequest, Corrupt, Unavailable)):
                await connecting


# the end


async def test_the_end_of_a_connection_is_cleaned_up_once_and_after_its_calls(net: Net) -> None:
    client = await net.client()
    call = asyncio.create_task(client.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=5))
    await soon(lambda: net.service.waiting == 1)
    await client.close()
    with pytest.raises(Unavailable):
        await call
    await asyncio.sleep(0.02)
    assert net.service.closed == [], "the call still works with what belongs to the connection"
    net.service.gate.set()
    await net.ended(1)
    await net.server.close(0.0)
    assert net.service.closed == [0]
    with pytest.raises(Unavailable):
        await client.call(WORKER_LOCAL["Match"], match(), timeout_s=5)


async def test_a_closing_server_fails_its_clients_and_cleans_up(net: Net) -> None:
    clients = [await net.client(), await net.client()]
    call = asyncio.create_task(clients[0].call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=5))
    await soon(lambda: net.service.waiting == 1)
    await net.server.close(0.0)
    assert len(net.service.closed) == 2 and net.service.closed[-1] == 0
    assert not os.path.exists(net.path)
    with pytest.raises(Unavailable):
        await call
    await soon(lambda: all(client.closed for client in clients))


async def test_a_closing_server_gives_calls_their_grace(net: Net) -> None:
    client = await net.client()
    call = asyncio.create_task(client.call(WORKER_LOCAL["Match"], match(b"ab", wait=True), timeout_s=5))
    await soon(lambda: net.service.waiting == 1)
    closing = asyncio.create_task(net.server.close(30.0))
    await asyncio.sleep(0.01)
    net.service.gate.set()
    assert (await call)[0].blocks == 2
    await asyncio.wait_for(closing, 5)


# the file


async def test_the_socket_is_private(net: Net) -> None:
    assert os.stat(net.path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(net.path)).st_mode & 0o777 == 0o700


async def test_a_live_socket_is_respected_and_a_stale_one_replaced(net: Net, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="another process listens"):
        await local.serve(net.path, Service(), net.auth, net.limits)
    assert (await net.client()).hello.id == "w", "and asking did no harm"
    stale = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(stale)
    async with Net(stale, net.limits) as successor:
        assert (await successor.client()).hello.id == "w"


async def test_a_successors_socket_is_not_unlinked(tmp_path: Path) -> None:
    path = str(tmp_path / "w.sock")
    first = await local.serve(path, Service(), Authenticator(load_policy()), LocalLimits())
    os.unlink(path)
    second = await local.serve(path, Service(), Authenticator(load_policy()), LocalLimits())
    await first.close(0.0)
    assert os.path.exists(path)
    await second.close(0.0)
    assert not os.path.exists(path)


async def test_a_path_that_cannot_be_bound_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no socket")
    for path in (tmp_path / "file", tmp_path / "file" / "w.sock", tmp_path / ("x" * 120), tmp_path):
        with pytest.raises(SetupError, match="--socket") as caught:
            await local.serve(str(path), Service(), Authenticator(load_policy()), LocalLimits())
        assert "\n" not in str(caught.value)
