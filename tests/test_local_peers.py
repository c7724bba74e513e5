"""Peers of a real local socket: who gets in, and what a hostile or dying one can do (nothing)."""

from __future__ import annotations

import array
import asyncio
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
    NotGranted,
    Overloaded,
    SetupError,
    Unauthenticated,
    Unavailable,
)
from kvstore.transport import local, local_frames
from kvstore.transport.base import Credentials
from kvstore.transport.local_frames import LocalLimits
from kvstore.transport.methods import WORKER_LOCAL
from kvstore.wire import common_pb2, worker_pb2
from tests.local_net import HELLO, KIB, Net, Service, errors_in, match, request_frame, rest, soon

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with Net(str(tmp_path / "run" / "w.sock"), LocalLimits(message_bytes_max=64 * KIB, inflight_max=8)) as net:
        yield net


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
