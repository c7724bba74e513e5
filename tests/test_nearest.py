"""A client asks the nearest coordinator: on its host, else the soonest; and comes back to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvstore.client.links import Coordinators
from kvstore.client.nearest import PROBES_MAX, Nearest
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
    incomplete: bool = False
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
                await asyncio.sleep(place.trip_s)
                if not place.up:
                    raise Unavailable(address)
                if method.name == "Hello":
                    return common_pb2.HelloReply(host=place.host, incomplete=place.incomplete)
                if method.name == "Match":
                    return common_pb2.MatchReply(complete=not place.incomplete)
                return coordinator_pb2.MembersReply(coordinators=net.named())

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
