"""What every `Transport` does: gRPC with the Unix socket, and the simulator's twin.

A subclass says how to play a case: `play(case)` runs `case(world)` on its loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvstore.errors import (
    BadRequest,
    DeadlineExceeded,
    Incompatible,
    NotGranted,
    Overloaded,
    SetupError,
    Unauthenticated,
    Unavailable,
)
from kvstore.transport.base import Method
from kvstore.transport.methods import COORDINATOR, WORKER, WORKER_LOCAL
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
from tests.contracts.transport_world import TOKEN, Case, Grpc, Local, World, soon
from tests.net_service import endless, sequence


def match(keys: int = 1, *, wait: bool = False) -> common_pb2.MatchRequest:
    return common_pb2.MatchRequest(keys=bytes(16 * keys), wait_ms=int(wait))


def announce(epoch: int) -> coordinator_pb2.AnnounceRequest:
    return coordinator_pb2.AnnounceRequest(register=coordinator_pb2.Register(member=common_pb2.Member(epoch=epoch)))


class TransportSuite:
    """Subclass it, define `play`."""

    def play(self, case: Case) -> None:
        raise NotImplementedError

    # between hosts

    def test_every_kind_of_call(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
                channel = await net.channel()
                assert (await channel.unary(WORKER["Match"], match(3), timeout_s=5)).blocks == 3
                request = worker_pb2.GetRequest(layer_count=30, layer_first=100_000)
                got = [f async for f in channel.stream(WORKER["Get"], sequence(request), timeout_s=5)]
                frames = [worker_pb2.GetFrame.FromString(frame) for frame in got]
                assert [frame.h.parts[0].block for frame in frames] == list(range(30))
                assert all(frame.data == bytes(100_000) for frame in frames)
                put = worker_pb2.PutFrame(data=bytes(100_000)).SerializeToString()
                replies = [r async for r in channel.stream(WORKER["Put"], sequence(*[put] * 30), timeout_s=5)]
                assert [len(reply.states) for reply in replies] == [30]
                stream = channel.stream(COORDINATOR["Announce"], sequence(*map(announce, range(30))), timeout_s=None)
                assert [reply.fenced.epoch async for reply in stream] == list(range(1, 31))

        self.play(case)

    def test_errors_arrive_as_themselves(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
                channel = await net.channel()
                with pytest.raises(Overloaded, match="over quota: later"):
                    await channel.unary(WORKER["Purge"], worker_pb2.PurgeRequest(), timeout_s=5)
                request = worker_pb2.GetRequest(redis=True)
                with pytest.raises(Overloaded, match="at once"):
                    await anext(channel.stream(WORKER["Get"], sequence(request), timeout_s=5))
                stop = worker_pb2.PutFrame(data=b"stop").SerializeToString()
                with pytest.raises(Overloaded, match="enough"):
                    await anext(channel.stream(WORKER["Put"], endless(stop), timeout_s=5))
                newer = Method("Worker", "Newer", common_pb2.StatusRequest, common_pb2.WorkerStatus)
                with pytest.raises(Incompatible, match="does not know"):
                    await channel.unary(newer, common_pb2.StatusRequest(), timeout_s=5)
                with pytest.raises(BadRequest, match="needs one request"):
                    await anext(channel.stream(WORKER["Get"], sequence(), timeout_s=5))

        self.play(case)

    def test_the_gate_is_before_every_call(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world, world.token_file) as net:
                for token, namespace, error in (
                    ("", "default", Unauthenticated),
                    ("wrong-token-0123456789", "default", Unauthenticated),
                    (TOKEN, "other", NotGranted),
                ):
                    channel = await net.channel(namespace, token)
                    with pytest.raises(error):
                        await channel.unary(WORKER["Match"], match(), timeout_s=5)
                    with pytest.raises(error):
                        await anext(channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None))
                assert net.service.contexts == []
                await (await net.channel("default", TOKEN)).unary(WORKER["Match"], match(), timeout_s=5)
                [context] = net.service.contexts
                assert (context.identity, context.role, context.namespace) == ("cluster", "node", "default")
                assert context.deadline is not None and context.connection is None

        self.play(case)

    def test_a_deadline_ends_both_sides(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
                channel = await net.channel()
                with pytest.raises(DeadlineExceeded, match=r"no answer to Match within 0\.1 s"):
                    await channel.unary(WORKER["Match"], match(wait=True), timeout_s=0.1)
                await asyncio.wait_for(net.service.cancelled.wait(), 5)
                request = worker_pb2.GetRequest(layer_count=1, least=common_pb2.FIDELITY_EXACT)
                stream = channel.stream(WORKER["Get"], sequence(request), timeout_s=0.1)
                await anext(stream)
                with pytest.raises(DeadlineExceeded):
                    await anext(stream)

        self.play(case)

    def test_whoever_leaves_cancels_the_handler(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
                channel = await net.channel()
                stream: Any = channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None)
                await anext(stream)
                await stream.aclose()
                await soon(lambda: net.service.ended == 1)  # cancelled, or its requests ended: it cannot tell
                net.service.cancelled.clear()
                call = asyncio.create_task(channel.unary(WORKER["Match"], match(wait=True), timeout_s=60))
                await net.service.began.wait()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                await asyncio.wait_for(net.service.cancelled.wait(), 5)

        self.play(case)

    def test_what_the_requests_raise_is_raised_to_the_reader(self) -> None:
        answered = asyncio.Event()

        async def requests() -> AsyncIterator[Any]:
            yield announce(1)
            await answered.wait()
            raise ZeroDivisionError

        async def case(world: World) -> None:
            async with Grpc(world) as net:
                stream = (await net.channel()).stream(COORDINATOR["Announce"], requests(), timeout_s=None)
                await anext(stream)
                answered.set()
                with pytest.raises(ZeroDivisionError):
                    async for _ in stream:
                        pass
                await soon(lambda: net.service.ended == 1)

        self.play(case)

    def test_a_closed_channel_fails_all_calls(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
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
                with pytest.raises(Unavailable):
                    await channel.unary(WORKER["Match"], match(), timeout_s=5)
                with pytest.raises(Unavailable):
                    await anext(channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None))
                await channel.close()

        self.play(case)

    def test_nobody_there_and_an_address_taken(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
                port = net.server.address.rpartition(":")[2]
                with pytest.raises(SetupError, match="is in use: choose another with --bind"):
                    await world.server.serve(f"127.0.0.1:{port}", {}, net.auth)
                channel = await net.channel()
                await net.server.close(0.0)
                with pytest.raises(Unavailable):
                    await channel.unary(WORKER["Match"], match(), timeout_s=5)
                with pytest.raises(Unavailable):
                    await anext(channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None))

        self.play(case)

    def test_closing_ends_streams_at_once_and_gives_calls_their_grace(self) -> None:
        async def case(world: World) -> None:
            async with Grpc(world) as net:
                channel = await net.channel()
                stream = channel.stream(COORDINATOR["Announce"], endless(announce(1)), timeout_s=None)
                await anext(stream)
                call = asyncio.create_task(channel.unary(WORKER["Match"], match(2, wait=True), timeout_s=60))
                await net.service.began.wait()
                closing = asyncio.create_task(net.server.close(30.0))
                with pytest.raises(Unavailable):
                    await anext(stream)
                assert not call.done() and not closing.done()
                net.service.gate.set()
                assert (await call).blocks == 2
                await asyncio.wait_for(closing, 5)

        self.play(case)

    # on one host

    def test_local_calls_and_the_memory_they_pass(self) -> None:
        async def case(world: World) -> None:
            async with Local(world) as net:
                channel = await net.channel()
                reply, none = await channel.call(WORKER_LOCAL["Match"], match(3), timeout_s=5)
                assert reply.blocks == 3 and none == []
                context = net.service.contexts[-1]
                assert context.namespace == "default" and context.connection is not None
                _, [staging] = await channel.call(WORKER_LOCAL["Stage"], worker_pb2.StageRequest(), timeout_s=5)
                staging.view[:5] = b"bytes"
                reply, [segment] = await channel.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(), timeout_s=5)
                assert reply.hold == 5 and bytes(segment.view[:5]) == b"bytes" and segment.view.readonly
                staging.close()
                segment.close()

        self.play(case)

    def test_local_errors(self) -> None:
        async def case(world: World) -> None:
            async with Local(world) as net:
                channel = await net.channel()
                with pytest.raises(Overloaded, match="over quota: later"):
                    await channel.call(WORKER_LOCAL["Commit"], worker_pb2.CommitRequest(), timeout_s=5)
                with pytest.raises(BadRequest, match="not a call of the local socket"):
                    await channel.call(COORDINATOR["Match"], match(), timeout_s=5)
                with pytest.raises(NotGranted):
                    await net.channel("other")
                with pytest.raises(SetupError, match="another process listens"):
                    await world.server.serve_local(world.socket, net.service, net.auth)
                with pytest.raises(DeadlineExceeded, match=r"no answer to Match within 0\.1 s"):
                    await channel.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=0.1)
                net.service.gate.set()
                assert (await channel.call(WORKER_LOCAL["Match"], match(2), timeout_s=5))[0].blocks == 2
            with pytest.raises(Unavailable):
                await net.channel()

        self.play(case)

    def test_late_memory_is_taken_or_ends_the_connection(self) -> None:
        async def case(world: World) -> None:
            async with Local(world) as net:
                taking, dropping = await net.channel(), await net.channel()
                late: list[Any] = []
                taking.on_late = lambda method, reply, segments: late.append((method.name, reply.hold, segments))
                for channel in (taking, dropping):
                    with pytest.raises(DeadlineExceeded):
                        await channel.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(redis=True), timeout_s=0.1)
                net.service.gate.set()
                await soon(lambda: late and dropping.closed)
                [(name, hold, [segment])] = late
                assert (name, hold) == ("Open", 5) and not taking.closed
                segment.close()

        self.play(case)

    def test_a_connection_is_cleaned_up_once_and_after_its_calls(self) -> None:
        async def case(world: World) -> None:
            async with Local(world) as net:
                channel = await net.channel()
                call = asyncio.create_task(channel.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=60))
                await net.service.began.wait()
                await channel.close()
                with pytest.raises(Unavailable):
                    await call
                assert channel.closed
                await asyncio.sleep(0.02)
                assert net.service.closed == []
                net.service.gate.set()
                await soon(lambda: net.service.closed)
                with pytest.raises(Unavailable):
                    await channel.call(WORKER_LOCAL["Match"], match(), timeout_s=5)
            assert net.service.closed == [1]

        self.play(case)

    def test_a_closing_local_server_cleans_up_before_it_has_closed(self) -> None:
        async def case(world: World) -> None:
            async with Local(world) as net:
                channel = await net.channel()
                call = asyncio.create_task(channel.call(WORKER_LOCAL["Match"], match(wait=True), timeout_s=60))
                await net.service.began.wait()
                await net.server.close(0.0)
                assert net.service.closed == [1]
                with pytest.raises(Unavailable):
                    await call
                await soon(lambda: channel.closed)

        self.play(case)
