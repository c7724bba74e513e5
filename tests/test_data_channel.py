"""The raw data channel on real sockets: who is let in, what arrives, and what hostile or dying peers can do:
nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from kvstore.errors import BadRequest, Corrupt, DeadlineExceeded, Overloaded, Unauthenticated, Unavailable
from kvstore.machine.system import ThreadPool, real_system
from kvstore.transport import data_frames as frames
from kvstore.transport import data_server
from kvstore.transport.base import CallContext
from kvstore.transport.data_client import connect
from kvstore.wire import worker_pb2
from tests.data_net import MIB, PAYLOAD, WHO, Net, Sink, until
from tests.net_service import Clock
from workers.tickets import TICKET_S, Tickets, host_of


async def test_gets_and_puts_follow_each_other_on_one_connection() -> None:
    async with Net() as net:
        client = await net.client()
        for _ in range(3):
            sink = Sink()
            await client.get(worker_pb2.GetRequest(), sink, timeout_s=5.0)
            assert [header for header, _ in sink.got] == [b"first", b"0", b"1", b"2"] and sink.landings == 4
            assert b"".join(bytes(data) for _, data in sink.got) == PAYLOAD
            with pytest.raises(Overloaded, match="later"):
                await client.get(worker_pb2.GetRequest(planes=1), Sink(), timeout_s=5.0)
            header = worker_pb2.PutHeader(blocks=[worker_pb2.PutBlock(raw_bytes=MIB)] * 3)
            net.service.taken = b""
            parts = [memoryview(PAYLOAD)[:MIB], memoryview(PAYLOAD)[MIB:]]
            reply = await client.put(header, parts, timeout_s=5.0)
            assert len(reply.states) == 3 and net.service.taken == PAYLOAD
            with pytest.raises(BadRequest, match="no blocks"):
                await client.put(worker_pb2.PutHeader(), [], timeout_s=5.0)
            assert client.usable
        assert net.service.contexts[0].namespace == "default" and net.service.contexts[0].deadline is not None


async def test_an_error_amid_a_put_ends_the_connection() -> None:
    async with Net() as net:
        client = await net.client()
        header = worker_pb2.PutHeader(spec_json="full", blocks=[worker_pb2.PutBlock(raw_bytes=len(PAYLOAD))])
        with pytest.raises((Overloaded, Unavailable)):
            await client.put(header, [PAYLOAD], timeout_s=5.0)
        assert not client.usable
        await net.serves()


async def test_a_deadline_and_a_cancellation_let_go_of_the_buffers() -> None:
    async with Net() as net:
        client = await net.client()
        with pytest.raises(DeadlineExceeded):
            await client.get(worker_pb2.GetRequest(planes=2), Sink(), timeout_s=0.1)
        async with asyncio.timeout(5):
            await net.service.cancelled.wait()
        assert not client.usable
        other, sink = await net.client(), Sink()
        call = asyncio.create_task(other.get(worker_pb2.GetRequest(planes=3), sink, timeout_s=60.0))
        await until(lambda: sink.landings > 3)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        came = sink.landings
        await until(lambda: net.service.open == 0)
        assert sink.landings == came, "somebody still receives"


async def test_closing_wakes_whoever_receives() -> None:
    async with Net() as net:
        client = await net.client()
        call = asyncio.create_task(client.get(worker_pb2.GetRequest(planes=2), Sink(), timeout_s=60.0))
        await until(lambda: net.service.contexts)
        await client.close()
        with pytest.raises(Unavailable):
            await call


async def test_a_peer_that_leaves_while_blocks_are_opened_is_noticed() -> None:
    async with Net() as net:
        client = await net.client()
        call = asyncio.create_task(client.get(worker_pb2.GetRequest(planes=2), Sink(), timeout_s=60.0))
        await until(lambda: net.service.contexts)
        assert not net.service.cancelled.is_set(), "it waits while its peer does"
        client._link.abort()
        async with asyncio.timeout(5):
            await net.service.cancelled.wait()
        with pytest.raises(Unavailable):
            await call
        await until(lambda: not net.server._peers)
        await net.serves()


async def test_a_server_that_stops_at_once_ends_what_is_being_opened() -> None:
    async with Net() as net:
        client = await net.client()
        call = asyncio.create_task(client.get(worker_pb2.GetRequest(planes=2), Sink(), timeout_s=60.0))
        await until(lambda: net.service.contexts)
        async with asyncio.timeout(5):
            await net.server.close(0.01)
        assert net.service.cancelled.is_set() and not net.server._peers
        with pytest.raises(Unavailable):
            await call


async def test_nobody_watches_a_peer_whose_blocks_are_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Net() as net:
        client, loop, watched = await net.client(), asyncio.get_running_loop(), list[str]()
        add = loop.add_reader

        def seen(descriptor: int, callback: Any, *arguments: Any) -> None:
            watched.append(callback.__qualname__)
            add(descriptor, callback, *arguments)

        monkeypatch.setattr(loop, "add_reader", seen)
        await client.get(worker_pb2.GetRequest(), Sink(), timeout_s=5.0)
        assert not [name for name in watched if "went" in name]
        call = asyncio.create_task(client.get(worker_pb2.GetRequest(planes=2), Sink(), timeout_s=60.0))
        await until(lambda: [name for name in watched if "went" in name])
        net.service.gate.set()
        await call


async def test_a_reader_that_stops_reading_holds_nothing_after_its_deadline() -> None:
    async with Net() as net:
        reader, writer = await asyncio.open_connection(*net.server.address.split(":"), limit=1024)
        writer.write(frames.hello(net.service.tickets.give(WHO)))
        await reader.readexactly(frames.HEAD.size)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        asked = worker_pb2.DataGet(get=worker_pb2.GetRequest(planes=3), timeout_ms=300)
        writer.write(frames.frame(frames.GET, asked.SerializeToString()))
        await until(lambda: net.service.open == 1)
        await until(lambda: net.service.open == 0)
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        await net.serves()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n" + bytes(64), bytes(64), frames.hello(bytes(32))])
async def test_who_has_no_ticket_is_told_so_or_nothing(said: bytes) -> None:
    async with Net() as net:
        heard = await net.stranger(said)
        assert heard == b"" or b"UNAUTHENTICATED" in heard
        assert not net.service.contexts
        await net.serves()


async def test_a_ticket_is_good_once_for_one_host_for_a_while() -> None:
    async with Net() as net:
        ticket = net.service.tickets.give(WHO)
        await net.client(ticket)
        with pytest.raises(Unavailable, match="was used"):
            await net.client(ticket)
        with pytest.raises(Unavailable, match="another host"):
            await net.client(net.service.tickets.give(CallContext("me", "client", "default", "ipv4:10.0.0.9:1")))
        mapped = CallContext("me", "client", "default", "ipv6:%5B::ffff:127.0.0.1%5D:1")
        await net.client(net.service.tickets.give(mapped))
        await net.serves()


def test_tickets_expire_and_are_bounded() -> None:
    system = real_system(1)
    now = [0.0]

    class Later(Clock):
        def monotonic(self) -> float:
            return now[0]

    object.__setattr__(system, "clock", Later())
    tickets = Tickets(system, 3)
    many = [tickets.give(WHO) for _ in range(4)]
    assert len(tickets) == 3 and len(set(many)) == 4
    with pytest.raises(Unauthenticated):
        tickets.take(many[0], "127.0.0.1")
    assert tickets.take(many[1], "127.0.0.1").identity == "me"
    now[0] = TICKET_S
    with pytest.raises(Unauthenticated, match="too old"):
        tickets.take(many[2], "127.0.0.1")
    system.pool.close()


def test_the_host_of_a_peer() -> None:
    assert host_of("ipv4:10.1.2.3:55") == "10.1.2.3"
    assert host_of("ipv6:%5B::1%5D:55") == host_of("ipv6:[::1]:55") == "::1"
    assert host_of("unix:") is None and host_of("sim:client") is None


async def test_nonsense_after_the_ticket_ends_that_connection_only() -> None:
    async with Net() as net:
        for said in (
            b"\xff" * 64,
            frames.head(frames.GET, 1 << 31),
            frames.frame(frames.GET, b"\xff\xff"),
            frames.frame(frames.REPLY),
            frames.frame(frames.PUT, worker_pb2.DataPut(put={"blocks": [{"raw_bytes": 9}]}).SerializeToString())
            + frames.head(frames.BYTES, 0, 10)
            + bytes(10),
        ):
            await net.stranger(frames.hello(net.service.tickets.give(WHO)) + said)
        await net.serves()


async def test_who_speaks_out_of_turn_loses_its_call() -> None:
    async with Net() as net:
        asked = worker_pb2.DataGet(get=worker_pb2.GetRequest(planes=2))
        call = frames.frame(frames.GET, asked.SerializeToString())
        heard = await net.stranger(frames.hello(net.service.tickets.give(WHO)) + call + call)
        assert len(heard) == frames.HEAD.size, "a welcome and nothing else"
        async with asyncio.timeout(5):
            await net.service.cancelled.wait()


async def test_half_open_connections_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_server, "HELLO_S", 0.2)
    async with Net(connections_max=2) as net:
        silent = [socket.create_connection(net.server.address.split(":")) for _ in range(2)]
        await until(lambda: len(net.server._peers) == 2)
        with pytest.raises(Unavailable):
            await net.client()
        await until(lambda: not net.server._peers)
        await net.serves()
        for one in silent:
            one.close()


async def test_the_longest_idle_connection_makes_room() -> None:
    async with Net(connections_max=2) as net:
        first, second = await net.client(), await net.client()
        await second.get(worker_pb2.GetRequest(), Sink(), timeout_s=5.0)
        await net.serves()
        await until(lambda: not first.usable)
        assert second.usable


async def test_an_idle_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Net(idle_s=0.05) as net:
        client = await net.client()
        await until(lambda: not client.usable)
        with pytest.raises(Unavailable):
            await client.get(worker_pb2.GetRequest(), Sink(), timeout_s=5.0)


async def test_a_server_that_stops_gives_calls_their_grace() -> None:
    async with Net() as net:
        client, sink = await net.client(), Sink()
        call = asyncio.create_task(client.get(worker_pb2.GetRequest(planes=2), sink, timeout_s=60.0))
        await until(lambda: net.service.contexts)
        closing = asyncio.create_task(net.server.close(30.0))
        await asyncio.sleep(0)
        net.service.gate.set()
        await call
        await asyncio.wait_for(closing, 5)
        assert sink.landings == 4


class Liar:
    """A server that lets everybody in and then says what it was told to."""

    def __init__(self, says: bytes) -> None:
        self._says = says
        self._peers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._peer, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._peers.append(task)
        await reader.readexactly(frames.HELLO_BYTES)
        writer.write(frames.frame(frames.WELCOME) + self._says)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await asyncio.gather(*self._peers)
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    "says",
    [
        b"\x00" * 64,
        frames.frame(frames.GO),
        frames.head(frames.FRAME, 0, 1 << 40),
        frames.head(frames.FRAME, 1 << 30),
        frames.head(frames.END, 0)[:-1] + b"\x01",
    ],
)
async def test_a_worker_that_talks_nonsense_is_corrupt(says: bytes) -> None:
    pool = ThreadPool(1)
    async with Liar(says) as address:
        client = await connect(address, bytes(32), pool, None, timeout_s=5.0, message_bytes_max=8 * MIB)
        with pytest.raises(Corrupt):
            await client.get(worker_pb2.GetRequest(), Sink(), timeout_s=5.0)
        assert not client.usable
        await client.close()
    pool.close()
