"""A client asks the nearest coordinator: on its host, else the soonest; and comes back to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore.client.links import Coordinators
from kvstore.client.members import Members
from kvstore.client.nearest import PROBES_MAX, Nearest
from kvstore.client.watching import Watching
from kvstore.config import ClientConfig
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.transport.base import Credentials, Method
from kvstore.transport.methods import COORDINATOR
from kvstore.wire import common_pb2, coordinator_pb2
from tests.sim.loop import run
from tests.sim.network import MemoryNetwork
from tests.sim.system import sim_system

NEAR, MIDDLE, FAR = "near:1", "middle:1", "far:1"


def measured(**trips: float) -> Nearest:
    nearest = Nearest("here", 5.0)
    for name, seconds in trips.items():
        nearest.measured(f"{name}:1", seconds)
    return nearest


def test_the_sooner_one_comes_first_and_those_on_this_host_before_all() -> None:
    nearest = measured(near=0.001, middle=0.004, far=0.080)
    assert nearest.order([FAR, MIDDLE, NEAR]) == [NEAR, MIDDLE, FAR]
    nearest.at(FAR, "here")
    assert nearest.order([MIDDLE, NEAR, FAR]) == [FAR, NEAR, MIDDLE]
    nearest.failed(FAR)
    assert nearest.order([MIDDLE, NEAR, FAR]) == [NEAR, MIDDLE, FAR]
    nearest.measured(FAR, 0.080)
    assert nearest.order([MIDDLE, NEAR, FAR])[0] == FAR, "back as soon as it is measured again"


def test_a_little_better_is_no_better() -> None:
    nearest = measured(near=0.0010, middle=0.0012)
    nearest.answered(MIDDLE)
    assert nearest.order([NEAR, MIDDLE])[0] == MIDDLE
    nearest.measured(MIDDLE, 0.0100)
    assert nearest.order([NEAR, MIDDLE])[0] == NEAR, "much better is"
    without = measured(near=0.0010, middle=0.0012)
    assert without.order([MIDDLE, NEAR])[0] == NEAR, "nobody preferred: the sooner one"


def test_one_slow_answer_moves_the_average_by_its_weight_only() -> None:
    nearest = measured(near=0.001, middle=0.002)
    nearest.answered(NEAR)
    nearest.measured(NEAR, 0.0015)
    assert nearest.order([MIDDLE, NEAR])[0] == NEAR


def test_who_stays_with_one_hears_of_another_that_is_clearly_nearer() -> None:
    nearest = measured(near=0.0010, middle=0.0012, far=0.080)
    assert nearest.nearer(FAR, [FAR, MIDDLE, NEAR]) == NEAR
    assert nearest.nearer(NEAR, [FAR, MIDDLE, NEAR]) == ""
    assert nearest.nearer(MIDDLE, [FAR, MIDDLE, NEAR]) == "", "a little better is no better"
    assert nearest.nearer(FAR, []) == nearest.nearer(FAR, [FAR]) == ""
    nearest.failed(NEAR)
    assert nearest.nearer(FAR, [FAR, MIDDLE, NEAR]) == MIDDLE, "not one that failed"
    nearest.at(FAR, "here")
    assert nearest.nearer(NEAR, [FAR, NEAR]) == FAR and nearest.nearer(FAR, [FAR, MIDDLE]) == "", "hosts first"
    assert Nearest("here", 5.0).nearer(FAR, [FAR, NEAR]) == "", "nothing is measured: nobody moves"


def test_measurements_are_few_and_there_are_none_without_a_choice() -> None:
    nearest = Nearest("here", 5.0)
    assert nearest.due([NEAR], 0.0) == []
    many = [f"c{index}:1" for index in range(10)]
    seen: Counter[str] = Counter()
    for tenth in range(200):  # 20 seconds
        due = nearest.due(many, tenth / 10)
        assert len(due) <= PROBES_MAX
        if due:
            nearest.begin(due, tenth / 10)
        seen.update(due)
    assert sum(seen.values()) == 4 * PROBES_MAX and max(seen.values()) == 2 and len(seen) == 10


@dataclass
class Where:
    trip_s: float
    host: str
    up: bool = True
    hangs: bool = False
    late_until: float = 0.0  # what is asked before is answered then
    incomplete: bool = False
    whole: bool = True  # what its Watch says of itself
    streams: int = 0  # of Watch, open now
    calls: Counter[str] = field(default_factory=Counter)


class Net:
    """Coordinators at distances: a transport for one client."""

    def __init__(self, **places: Where) -> None:
        self.places = {f"{name}:1": place for name, place in places.items()}

    async def connect(self, address: str, credentials: Credentials) -> Any:
        net, place = self, self.places[address]

        class Channel:
            async def unary(self, method: Method, request: Any, *, timeout_s: float) -> Any:
                place.calls[method.name] += 1
                if place.hangs:
                    await asyncio.sleep(timeout_s)
                    raise DeadlineExceeded(address)
                late_s = place.late_until - asyncio.get_running_loop().time()
                if late_s > timeout_s:
                    await asyncio.sleep(timeout_s)
                    raise DeadlineExceeded(address)
                await asyncio.sleep(max(place.trip_s, late_s))
                if not place.up:
                    raise Unavailable(address)
                if method.name == "Hello":
                    return common_pb2.HelloReply(host=place.host, incomplete=place.incomplete)
                if method.name == "Match":
                    return common_pb2.MatchReply(complete=not place.incomplete)
                return coordinator_pb2.MembersReply(coordinators=net.named())

            async def stream(self, method: Method, requests: Any, *, timeout_s: float | None) -> AsyncIterator[Any]:
                place.calls[method.name] += 1
                place.streams += 1
                try:
                    while place.up:
                        state = coordinator_pb2.WatchState(complete=place.whole, coordinators=net.named())
                        yield coordinator_pb2.WatchReply(state=state)
                        await asyncio.sleep(0.5)
                    raise Unavailable(address)
                finally:
                    place.streams -= 1

            async def close(self) -> None: ...

        return Channel()

    def named(self) -> list[common_pb2.CoordinatorInfo]:
        return [common_pb2.CoordinatorInfo(id=a, address=a, host=p.host) for a, p in self.places.items()]


class Caller:
    """A client on host `here` that calls every tenth of a second."""

    def __init__(self, net: Net, probe_s: float = 1.0) -> None:
        self.net = net
        self.system = sim_system(MemoryNetwork(1).boot("client", "here"), 1)
        transport: Any = net
        self.of = Coordinators(net.places, self.system, transport, Credentials(), probe_s=probe_s)

    async def calls(self, seconds: float) -> Counter[str]:
        """Who served how many of the calls; each within its deadline."""
        before = {address: place.calls["Match"] for address, place in self.net.places.items()}
        for _ in range(round(10 * seconds)):
            begin = self.system.clock.monotonic()
            await self.of.call(COORDINATOR["Match"], common_pb2.MatchRequest(), timeout_s=0.9)
            assert self.system.clock.monotonic() - begin <= 0.9
            await asyncio.sleep(0.1)
        after = {a: place.calls["Match"] - before[a] for a, place in self.net.places.items()}
        return Counter({address: count for address, count in after.items() if count})


def play(body: Any, probe_s: float = 1.0, **places: Where) -> Any:
    async def main() -> Any:
        caller = Caller(Net(**places), probe_s)
        try:
            return await body(caller, caller.net.places)
        finally:
            await caller.of.close()

    return run(main())


def three() -> dict[str, Where]:
    return {"far": Where(0.06, "there"), "near": Where(0.002, "elsewhere"), "middle": Where(0.02, "there")}


def test_calls_settle_on_the_soonest_fail_over_and_come_back() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> None:
        await caller.calls(3)
        assert set(await caller.calls(3)) == {NEAR}
        places[NEAR].up = False
        await caller.calls(1)
        assert set(await caller.calls(0.3)) <= {NEAR, MIDDLE}, "the next nearest"
        assert (await caller.calls(3))[NEAR] == 0, "what is down is left to measurements: no call waits for it"
        places[NEAR].up = True
        await caller.calls(2)
        assert set(await caller.calls(3)) == {NEAR}

    play(body, **three())


def test_one_that_hangs_costs_one_wait_and_is_used_again_when_it_is_well() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> None:
        await caller.calls(3)
        places[NEAR].hangs = True
        assert (await caller.calls(10))[NEAR] == 1
        places[NEAR].hangs = False
        await caller.calls(6)
        assert set(await caller.calls(2)) == {NEAR}

    play(body, **three())


@pytest.mark.parametrize(("hangs_s", "served_s"), [(1.0, 2.0), (30.0, 0.0)])
def test_the_only_one_is_asked_again_as_soon_as_it_answers(hangs_s: float, served_s: float) -> None:
    """One that was busy for a moment does not cost the lookups of all the time for which one that hangs is avoided."""

    async def body(caller: Caller, places: dict[str, Where]) -> None:
        where, clock = places[NEAR], caller.system.clock
        where.late_until = asyncio.get_running_loop().time() + hangs_s
        with pytest.raises(DeadlineExceeded):
            await caller.of.call(COORDINATOR["Match"], common_pb2.MatchRequest(), timeout_s=0.3)
        begin, served = clock.monotonic(), 0
        while clock.monotonic() < begin + 2.9:
            try:
                await caller.of.call(COORDINATOR["Match"], common_pb2.MatchRequest(), timeout_s=0.3)
                served += 1
            except Unavailable:
                assert clock.monotonic() - begin < 2.9 - served_s, "it answers again, and is avoided still"
            await asyncio.sleep(0.1)
        assert (served > 0) == (served_s > 0) and where.calls["Hello"] == 1

    play(body, probe_s=1e9, near=Where(0.002, "elsewhere"))


def test_one_on_this_host_is_nearest_although_another_answers_sooner() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> None:
        places[FAR].host = "here"
        await caller.calls(3)
        assert set(await caller.calls(2)) == {FAR}

    play(body, **three())


def test_a_reply_says_who_is_on_this_host_before_anything_is_measured() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> None:
        places[FAR].host = "here"
        caller.of.learn(caller.net.named())
        assert set(await caller.calls(1)) == {FAR}

    play(body, probe_s=1e9, **three())


def test_one_that_is_filling_comes_after_those_that_are_whole() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> None:
        await caller.calls(3)
        places[NEAR].incomplete = True
        await caller.calls(0.2)
        assert (await caller.calls(3))[NEAR] == 0
        places[NEAR].incomplete = False
        await caller.calls(2)
        assert set(await caller.calls(2)) == {NEAR}

    play(body, **three())


def test_without_measurements_calls_stay_where_they_were_answered() -> None:
    """The negative control: nothing else moves them to the nearest."""

    async def body(caller: Caller, places: dict[str, Where]) -> set[str]:
        places[NEAR].up = False
        await caller.calls(1)
        places[NEAR].up = True
        return set(await caller.calls(10))

    assert NEAR not in play(body, probe_s=1e9, **three())


def test_measurements_are_bounded_by_their_rate_and_end_with_the_client() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> Counter[str]:
        await caller.calls(20)
        return Counter({address: place.calls["Hello"] for address, place in places.items()})

    assert all(3 <= count <= 5 for count in play(body, probe_s=5.0, **three()).values())


def test_the_same_seed_is_the_same_history() -> None:
    async def body(caller: Caller, places: dict[str, Where]) -> list[Counter[str]]:
        return [await caller.calls(1) for _ in range(5)]

    assert play(body, **three()) == play(body, **three())


class Watcher(Caller):
    """A client on host `here` that keeps a view and makes no calls."""

    def __init__(self, net: Net, probe_s: float = 1.0) -> None:
        super().__init__(net, probe_s)
        config = ClientConfig(watch=True, probe_s=probe_s, watch_retry_s=0.1)
        members = Members(config, self.system, self.of)
        self.counters: Counter[str] = Counter()
        self.watching = Watching(config, self.system, self.of, members, self.counters)
        self.watching.start()

    async def streams(self, seconds: float) -> Counter[str]:
        """Who had a stream for how many twentieths of a second; the view is fresh, or there is at most one stream."""
        seen: Counter[str] = Counter()
        for _ in range(round(20 * seconds)):
            await asyncio.sleep(0.05)
            open_ = {address: place.streams for address, place in self.net.places.items() if place.streams}
            assert sum(open_.values()) <= (2 if self.watching.fresh else 1), open_
            seen.update(open_)
        return seen


def watch(body: Any, probe_s: float = 1.0, **places: Where) -> Any:
    async def main() -> Any:
        watcher = Watcher(Net(**places), probe_s)
        try:
            return await body(watcher, watcher.net.places)
        finally:
            await watcher.watching.close()
            assert not any(place.streams for place in places.values()), "a stream was left open"
            await watcher.of.close()

    return run(main())


def test_a_view_moves_to_a_coordinator_that_is_nearer_when_it_is_back() -> None:
    async def body(watcher: Watcher, places: dict[str, Where]) -> None:
        await watcher.streams(5)
        assert set(await watcher.streams(1)) == {NEAR}, "it settled on the nearest"
        places[NEAR].up = False
        await watcher.streams(3)
        assert set(await watcher.streams(1)) == {MIDDLE}
        places[NEAR].up = True
        fresh = 0
        for _ in range(80):
            await watcher.streams(0.05)
            fresh += watcher.watching.fresh
        assert fresh == 80, "lookups had the view all the time"
        assert set(await watcher.streams(1)) == {NEAR}, "and is back with it"
        moves = watcher.counters["watch_moves"]
        await watcher.streams(20)
        assert watcher.counters["watch_moves"] == moves, "it stays there"

    watch(body, **three())


def test_a_view_stays_where_another_is_only_a_little_nearer_or_for_a_moment() -> None:
    async def body(watcher: Watcher, places: dict[str, Where]) -> None:
        await watcher.streams(5)
        mine = next(address for address, place in places.items() if place.streams)
        other = next(address for address in places if address != mine)
        places[other].trip_s = 0.8 * places[mine].trip_s
        moves = watcher.counters["watch_moves"]
        assert set(await watcher.streams(20)) == {mine}
        for _ in range(10):  # flapping: nearer for less than `probe_s` at a time
            places[other].trip_s = 0.0001
            await watcher.streams(0.9)
            places[other].incomplete = True
            await watcher.streams(1.1)
            places[other].incomplete = False
            places[other].trip_s = 0.01
            await watcher.streams(2.1)
        assert watcher.counters["watch_moves"] == moves

    watch(body, near=Where(0.01, "there"), far=Where(0.01, "there"))


def test_a_move_to_a_view_that_is_never_whole_is_tried_now_and_then_and_changes_nothing() -> None:
    async def body(watcher: Watcher, places: dict[str, Where]) -> None:
        places[NEAR].up = False
        await watcher.streams(5)
        places[NEAR].up, places[NEAR].whole = True, False
        seen = await watcher.streams(20)
        assert seen[MIDDLE] == 400, "the view it had goes on"
        assert watcher.watching.fresh and places[NEAR].streams <= 1 and places[NEAR].calls["Watch"] < 25
        places[NEAR].whole = True
        await watcher.streams(3)
        assert set(await watcher.streams(1)) == {NEAR}

    watch(body, **three())
