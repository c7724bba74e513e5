"""The simulator's network: processes stop, links lie, connections end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    NotGranted,
    Overloaded,
    ServiceError,
    SetupError,
    Unavailable,
)
from kvstore.transport.base import Credentials
from kvstore.transport.methods import COORDINATOR, WORKER, WORKER_LOCAL
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
from tests.sim.loop import SimError, run
from tests.sim.network import Faults
from tests.sim.pair import AUTH, Pair, endless, match, scenario, sequence


def test_every_kind_of_call_passes() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.channel()
        request = match("k")
        assert (await channel.unary(WORKER["Match"], request, timeout_s=1)).blocks == 7
        assert request.keys == b"k", "the two sides share no object"
        get = channel.stream(WORKER["Get"], sequence(worker_pb2.GetRequest(layer_count=20)), timeout_s=1)
        assert [frame async for frame in get] == [b"frame %d" % n for n in range(20)]
        put = channel.stream(WORKER["Put"], sequence(*[b"x"] * 30), timeout_s=1)
        assert [len(reply.states) async for reply in put] == [30]
        asked = [
            coordinator_pb2.AnnounceRequest(register=coordinator_pb2.Register(member=common_pb2.Member(epoch=epoch)))
            for epoch in range(12)
        ]
        announce = channel.stream(COORDINATOR["Announce"], sequence(*asked), timeout_s=None)
        assert [reply.fenced.epoch async for reply in announce] == list(range(1, 13))

    scenario(body)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [("Purge", Overloaded, "later, please"), ("Probe", ServiceError, "does not know")],
)
def test_errors_are_those_of_grpc(method: str, error: type[KVStoreError], text: str) -> None:
    async def body(pair: Pair) -> None:
        request = WORKER[method].request
        assert request is not None
        with pytest.raises(error, match=text):
            await (await pair.channel()).unary(WORKER[method], request(), timeout_s=1)
        with pytest.raises(NotGranted):
            await (await pair.channel("other")).unary(WORKER[method], request(), timeout_s=1)

    scenario(body)


def test_a_bug_in_a_handler_is_internal_to_the_client_and_fails_the_scenario() -> None:
    async def body(pair: Pair) -> None:
        with pytest.raises(ServiceError, match="INTERNAL"):
            await (await pair.channel()).unary(WORKER["Status"], common_pb2.StatusRequest(), timeout_s=1)

    with pytest.raises(SimError, match="ZeroDivisionError"):
        scenario(body)


def test_nobody_there_and_no_answer_in_time() -> None:
    async def body(pair: Pair) -> None:
        stranger = await pair.network.transport(pair.c).connect("nobody:1", Credentials())
        with pytest.raises(Unavailable):
            await stranger.unary(WORKER["Match"], match("k"), timeout_s=1)
        channel = await pair.channel()
        with pytest.raises(DeadlineExceeded):
            await channel.unary(WORKER["Match"], match("slow", wait_ms=5_000), timeout_s=1)
        await channel.close()
        with pytest.raises(Unavailable):
            await channel.unary(WORKER["Match"], match("k"), timeout_s=1)

    scenario(body)


def test_a_port_and_a_path_belong_to_one_server() -> None:
    async def body(pair: Pair) -> None:
        with pytest.raises(SetupError):
            await pair.serve()
        with pytest.raises(SetupError):
            await pair.network.transport(pair.w).serve_local("/w.sock", pair.service, AUTH)

    scenario(body)


def test_a_cut_loses_calls_and_breaks_streams_and_heals() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.channel()

        async def requests() -> AsyncIterator[Any]:
            while True:
                yield coordinator_pb2.AnnounceRequest()
                await asyncio.sleep(0.1)

        stream = channel.stream(COORDINATOR["Announce"], requests(), timeout_s=None)
        await anext(stream)
        pair.network.cut("c", "w")
        for _ in range(8):
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await channel.unary(WORKER["Match"], match("k"), timeout_s=1)
        assert pair.service.seen == []
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        await asyncio.sleep(1)
        assert pair.service.ended == 1
        pair.network.heal()
        assert (await channel.unary(WORKER["Match"], match("k"), timeout_s=1)).blocks == 7

    scenario(body)


def test_a_short_cut_only_delays_a_stream() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.channel()
        stream = channel.stream(WORKER["Get"], sequence(worker_pb2.GetRequest(layer_count=50)), timeout_s=60)
        frames = [await anext(stream)]
        pair.network.cut("c", "w")
        pair.network.later(1.0, pair.network.heal)
        begin = asyncio.get_running_loop().time()
        frames += [frame async for frame in stream]
        assert len(frames) == 50
        assert asyncio.get_running_loop().time() - begin >= 1.0

    scenario(body)


def test_lost_and_doubled_messages_show_at_both_ends() -> None:
    async def body(pair: Pair) -> None:
        channel, failed = await pair.channel(), 0
        for number in range(200):
            try:
                await channel.unary(WORKER["Match"], match(str(number)), timeout_s=1)
            except (Unavailable, DeadlineExceeded):
                failed += 1
        seen = pair.service.seen
        assert 10 < failed < 190, "some are lost, not all"
        assert 10 < 200 - len(set(seen)) < 190, "requests are lost"
        assert failed > 200 - len(set(seen)), "replies are lost too"
        assert len(seen) > len(set(seen)), "some come twice"

    scenario(body, faults=Faults(drop=0.2, duplicate=0.2))


def test_independent_calls_overtake_and_a_stream_keeps_its_order() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.channel()
        asked = [str(number) for number in range(30)]
        await asyncio.gather(*(channel.unary(WORKER["Match"], match(text), timeout_s=1) for text in asked))
        assert sorted(pair.service.seen) == sorted(asked) and pair.service.seen != asked

    scenario(body)


def test_a_crashed_server_never_runs_again_and_its_successor_has_the_port() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.channel()
        call = asyncio.create_task(channel.unary(WORKER["Match"], match("k", wait_ms=2_000), timeout_s=30))
        stream = channel.stream(COORDINATOR["Announce"], endless(), timeout_s=None)
        await anext(stream)
        await asyncio.sleep(0.5)
        pair.network.crash(pair.w)
        with pytest.raises(Unavailable):
            await call
        with pytest.raises(Unavailable):
            await anext(stream)
        await asyncio.sleep(60)
        assert pair.service.ended == 0, "no handler of a killed process cleans up"
        pair.w = pair.network.boot("w", "host")
        await pair.serve()
        assert (await channel.unary(WORKER["Match"], match("k"), timeout_s=1)).blocks == 7

    scenario(body)


def test_a_crashed_client_gets_nothing_and_its_handlers_are_cancelled() -> None:
    pair, woke = Pair(), []

    async def body() -> None:
        try:
            async for _ in (await pair.channel()).stream(COORDINATOR["Announce"], endless(), timeout_s=None):
                woke.append("reply")
        finally:
            woke.append("finally")

    async def main() -> None:
        await pair.serve()
        pair.c.spawn(body())
        await asyncio.sleep(1)
        assert woke == ["reply"]
        pair.network.crash(pair.c)
        await asyncio.sleep(60)
        assert woke == ["reply"] and pair.service.ended == 1

    run(main(), processes=pair.network.processes)


def test_a_paused_process_is_late_and_loses_nothing() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.channel()
        pair.w.pause()
        with pytest.raises(DeadlineExceeded):
            await channel.unary(WORKER["Match"], match("first"), timeout_s=1)
        call = asyncio.create_task(channel.unary(WORKER["Match"], match("second"), timeout_s=30))
        await asyncio.sleep(5)
        assert not call.done()
        pair.w.resume()
        assert (await call).blocks == 7

    scenario(body)


def test_local_calls_pass_memory_within_a_host() -> None:
    async def body(pair: Pair) -> None:
        channel = await pair.local()
        assert channel.hello.boot_id == "default"
        _, [staging] = await channel.call(WORKER_LOCAL["Stage"], worker_pb2.StageRequest(), timeout_s=1)
        staging.view[:5] = b"bytes"
        reply, [segment] = await channel.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(), timeout_s=1)
        assert reply.hold == 5 and bytes(segment.view[:5]) == b"bytes" and segment.view.readonly
        await channel.close()
        await asyncio.sleep(1)
        assert pair.service.closed == 1
        with pytest.raises(Unavailable):
            await channel.call(WORKER_LOCAL["Open"], worker_pb2.OpenRequest(), timeout_s=1)

    scenario(body, same_host=True)


def test_another_host_has_no_local_socket() -> None:
    async def body(pair: Pair) -> None:
        with pytest.raises(Unavailable):
            await pair.local()

    scenario(body)


def test_a_late_local_reply_is_handed_over_or_ends_the_connection() -> None:
    async def body(pair: Pair) -> None:
        slow = worker_pb2.StageRequest(bytes=2_000)
        late: list[Any] = []
        keeping = await pair.local()
        keeping.on_late = lambda method, reply, segments: late.append((method.name, len(segments)))
        dropping = await pair.local()
        for channel in (keeping, dropping):
            with pytest.raises(DeadlineExceeded):
                await channel.call(WORKER_LOCAL["Stage"], slow, timeout_s=1)
        await asyncio.sleep(5)
        assert late == [("Stage", 1)] and not keeping.closed
        assert dropping.closed

    scenario(body, same_host=True)


def test_a_crashed_local_client_is_cleaned_up_after_once() -> None:
    pair = Pair(same_host=True)

    async def main() -> None:
        await pair.serve()
        await pair.c.spawn(pair.local())
        pair.network.crash(pair.c)
        await asyncio.sleep(1)
        assert pair.service.closed == 1

    run(main(), processes=pair.network.processes)
