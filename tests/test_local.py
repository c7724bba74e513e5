"""Calls on a real local socket, and the memory they pass."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import (
    BadRequest,
    Corrupt,
    DeadlineExceeded,
    Overloaded,
    ServiceError,
    Unavailable,
)
from kvstore.transport.base import CallContext
from kvstore.transport.local_client import map_descriptor
from kvstore.transport.local_frames import LocalLimits
from kvstore.transport.methods import COORDINATOR, WORKER_LOCAL
from kvstore.wire import worker_pb2
from tests.local_net import HELLO, KIB, Net, match, request_frame, soon

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with Net(str(tmp_path / "run" / "w.sock"), LocalLimits(message_bytes_max=64 * KIB, inflight_max=8)) as net:
        yield net


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


async def test_what_is_done_meanwhile_is_done_once_the_request_has_left(net: Net) -> None:
    client = await net.client()
    seen: list[int] = []
    call = client.call(WORKER_LOCAL["Match"], match(b"ab"), timeout_s=5, meanwhile=lambda: seen.append(1))
    assert (await call)[0].blocks == 2 and seen == [1]


async def test_what_fails_meanwhile_ends_the_call_and_its_reply_comes_late(net: Net) -> None:
    client = await net.client()
    late: list[Any] = []
    client.on_late = lambda method, reply, segments: late.append((reply.hold, segments))

    def fails() -> None:
        raise BadRequest("does not fit")

    with pytest.raises(BadRequest, match="does not fit"):
        await client.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(deadline_ms=1), timeout_s=5, meanwhile=fails)
    await soon(lambda: late)
    [(hold, [segment])] = late
    assert hold == 1 and not client.closed
    segment.close()
    assert (await client.call(WORKER_LOCAL["Match"], match(b"a"), timeout_s=5))[0].blocks == 1


async def test_what_fails_meanwhile_is_told_also_where_the_request_could_not_leave(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await net.client()
    monkeypatch.setattr(client._link, "send", lambda frame: client._link.end(Unavailable("cut")))

    def fails() -> None:
        raise BadRequest("does not fit")

    with pytest.raises(BadRequest, match="does not fit"):
        await client.call(WORKER_LOCAL["Match"], match(b"a"), timeout_s=5, meanwhile=fails)
    assert client.closed and not client._pending


async def test_a_handler_that_has_its_answer_gives_it_at_once(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    """No task; what the caller need not wait for comes after the reply; errors arrive as any handler's."""
    client = await net.client()
    order: list[str] = []

    def hint(request: worker_pb2.HintRequest, context: CallContext) -> worker_pb2.HintReply:
        [peer] = net.server._peers
        order.append(f"{len(peer._tasks)} tasks")
        sent = peer.link.send
        peer.link.send = lambda *frame: (order.append("reply"), sent(*frame))
        context.after(lambda: order.append("after"))
        if request.root == b"over":
            raise Overloaded("later")
        if request.root == b"bug":
            raise ZeroDivisionError("secret of the server")
        return worker_pb2.HintReply(blocks=7)

    net.service.hint = hint  # type: ignore[attr-defined]
    reply, _ = await client.call(WORKER_LOCAL["Hint"], worker_pb2.HintRequest(), timeout_s=5)
    assert reply.blocks == 7 and order == ["0 tasks", "reply", "after"]
    with pytest.raises(Overloaded, match="later"):
        await client.call(WORKER_LOCAL["Hint"], worker_pb2.HintRequest(root=b"over"), timeout_s=5)
    with pytest.raises(ServiceError, match="ZeroDivisionError"):
        await client.call(WORKER_LOCAL["Hint"], worker_pb2.HintRequest(root=b"bug"), timeout_s=5)
    assert order.count("after") == 1, "nothing is done after an error"
    assert "secret" in caplog.text


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
