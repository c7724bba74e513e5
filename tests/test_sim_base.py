"""The simulator itself: time jumps, processes stop, links lie, and a seed is a history."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kvstore.auth import Authenticator, load_policy
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    NotGranted,
    Overloaded,
    ServiceError,
    SetupError,
    Unavailable,
)
from kvstore.transport.base import CallContext, Credentials
from kvstore.transport.methods import COORDINATOR, WORKER, WORKER_LOCAL
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
from tests.sim.loop import Deadlock, SimError, TimeLimit, run
from tests.sim.network import Faults, MemoryNetwork
from tests.sim.system import SimMemory, sim_system

AUTH = Authenticator(load_policy())
ADDRESS = "w:1"


class Service:
    """Every kind of call, and what was seen of them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ended = 0
        self.closed = 0
        self.segment = SimMemory().segment("s", 64, sealed_writes=False)

    async def hello(self, request: Any, context: CallContext) -> common_pb2.HelloReply:
        if context.connection is not None:
            context.connection.on_close.append(self.on_close)
        return common_pb2.HelloReply(id="w", boot_id=context.namespace)

    def on_close(self) -> None:
        self.closed += 1

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        self.seen.append(request.keys.decode())
        await asyncio.sleep(request.wait_ms / 1000)
        request.keys = b"changed in the server"
        return common_pb2.MatchReply(blocks=7)

    async def purge(self, request: Any, context: CallContext) -> worker_pb2.PurgeReply:
        raise Overloaded("later, please")

    async def status(self, request: Any, context: CallContext) -> common_pb2.WorkerStatus:
        raise ZeroDivisionError

    async def get(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncIterator[bytes]:
        for number in range(request.layer_count):
            yield b"frame %d" % number

    async def put(self, requests: AsyncIterator[bytes], context: CallContext) -> worker_pb2.PutReply:
        frames = [frame async for frame in requests]
        return worker_pb2.PutReply(states=[worker_pb2.BLOCK_COMMITTED] * len(frames))

    async def announce(
        self, requests: AsyncIterator[coordinator_pb2.AnnounceRequest], context: CallContext
    ) -> AsyncIterator[coordinator_pb2.AnnounceReply]:
        try:
            async for request in requests:
                yield coordinator_pb2.AnnounceReply(
                    fenced=coordinator_pb2.Fenced(epoch=request.register.member.epoch + 1)
                )
        finally:
            self.ended += 1

    async def stage(self, request: worker_pb2.StageRequest, context: CallContext) -> worker_pb2.StageReply:
        await asyncio.sleep(request.bytes / 1000)
        context.attach(self.segment, writable=True)
        return worker_pb2.StageReply()

    async def open(self, request: worker_pb2.OpenRequest, context: CallContext) -> worker_pb2.OpenReply:
        context.attach(self.segment, writable=False)
        return worker_pb2.OpenReply(hold=5)


async def sequence(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def endless() -> AsyncIterator[Any]:
    yield coordinator_pb2.AnnounceRequest()
    await asyncio.Event().wait()


class Pair:
    """A server `w` and a client `c`."""

    def __init__(self, seed: int = 1, faults: Faults | None = None, same_host: bool = False) -> None:
        self.network = MemoryNetwork(seed, faults)
        self.service = Service()
        self.w = self.network.boot("w", "host")
        self.c = self.network.boot("c", "host" if same_host else "elsewhere")

    async def serve(self) -> None:
        transport = self.network.transport(self.w)
        await transport.serve("127.0.0.1:1", {"Worker": self.service, "Coordinator": self.service}, AUTH)
        await transport.serve_local("/w.sock", self.service, AUTH)

    async def channel(self, namespace: str = "default") -> Any:
        return await self.network.transport(self.c).connect(ADDRESS, Credentials(namespace))

    async def local(self) -> Any:
        return await self.network.transport(self.c).connect_local("/w.sock", Credentials())


def scenario(
    body: Callable[[Pair], Coroutine[Any, Any, Any]], *, seed: int = 1, faults: Faults | None = None, **options: Any
) -> Any:
    pair = Pair(seed, faults, **options)

    async def main() -> Any:
        await pair.serve()
        return await pair.c.spawn(body(pair))

    return run(main(), processes=pair.network.processes)


def match(text: str, wait_ms: int = 0) -> common_pb2.MatchRequest:
    return common_pb2.MatchRequest(keys=text.encode(), wait_ms=wait_ms)


def test_time_jumps_and_ends_where_the_timers_say() -> None:
    async def main() -> float:
        begin = asyncio.get_running_loop().time()
        await asyncio.gather(asyncio.sleep(2_000), asyncio.sleep(1_000))
        return asyncio.get_running_loop().time() - begin

    assert run(main()) == 2_000


def test_a_deadlock_is_found_and_names_the_task() -> None:
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="waits_for_ever"):
        run(waits_for_ever())


def test_a_scenario_without_end_is_found() -> None:
    async def ticks() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(TimeLimit, match="ticks"):
        run(ticks(), limit_s=100)


def test_an_error_nobody_saw_fails_the_scenario() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        asyncio.create_task(fails())
        await asyncio.sleep(1)

    with pytest.raises(SimError, match="ZeroDivisionError"):
        run(main())


def test_threads_are_refused() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, print)

    with pytest.raises(SimError, match=r"System\.pool"):
        run(main())


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


def test_the_pool_works_at_one_moment_or_not_at_all() -> None:
    async def main() -> None:
        pool = sim_system(MemoryNetwork(1).boot("w"), 1).pool
        done: list[int] = []
        assert await pool.run(lambda: 4) == 4
        call = asyncio.create_task(pool.run(done.append, 1))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert done == []

    run(main())


def test_clocks_of_two_processes_cannot_be_compared() -> None:
    async def main() -> None:
        network = MemoryNetwork(1)
        one, two = (sim_system(network.boot(name), 1).clock for name in "ab")
        begin = one.monotonic(), two.monotonic()
        await asyncio.sleep(3)
        assert abs(begin[0] - begin[1]) > 1
        assert [round(one.monotonic() - begin[0], 6), round(two.monotonic() - begin[1], 6)] == [3, 3]

    run(main())


def busy(seed: int) -> str:
    """A history with every kind of fault; its digest."""
    pair = Pair(seed, Faults(drop=0.05, duplicate=0.1, slow=0.1), same_host=True)

    async def client(number: int) -> None:
        rng = sim_system(pair.c, f"{seed}/{number}").rng
        channel, local = await pair.channel(), await pair.local()
        for _ in range(20):
            try:
                await channel.unary(WORKER["Match"], match("k"), timeout_s=rng.uniform(0.001, 0.1))
                await local.call(WORKER_LOCAL["Match"], match("l"), timeout_s=1)
                get = channel.stream(WORKER["Get"], sequence(worker_pb2.GetRequest(layer_count=9)), timeout_s=1)
                async for _ in get:
                    await asyncio.sleep(rng.uniform(0, 0.01))
            except (Unavailable, DeadlineExceeded) as error:
                pair.network.note("failed", number, type(error).__name__)

    async def main() -> str:
        await pair.serve()
        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(client(number))
            await asyncio.sleep(0.2)
            pair.network.cut("c", "w")
            await asyncio.sleep(0.4)
            pair.network.heal()
        return pair.network.digest()

    return run(main(), processes=pair.network.processes)


def test_a_seed_is_a_history() -> None:
    assert busy(3) == busy(3)
    assert busy(3) != busy(4), "a negative control: the seed matters"


def test_a_history_is_the_same_in_another_process() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", "from tests.test_sim_base import busy; print(busy(5))"],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1
