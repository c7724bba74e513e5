"""Namespaces take turns by bytes: in the line itself, for bytes in flight, for room in the store, for transfers."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.budget import Budget
from kvstore.errors import DeadlineExceeded, Overloaded
from kvstore.fair import FairLine
from kvstore.types import Tier
from tests.store_fakes import FaultyTier
from tests.store_rig import KIB, SMALL, Rig
from workers.node import Receiving

LOUD, QUIET = "loud", "quiet"

arrivals = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), max_size=60)


def lined_up(items: list[tuple[str, int]]) -> FairLine[int]:
    line: FairLine[int] = FairLine()
    for number, (namespace, nbytes) in enumerate(items):
        line.push(namespace, number, nbytes)
        line.validate()
    return line


@given(arrivals, st.booleans())
def test_everyone_is_served_once_in_the_order_of_its_namespace(items: list[tuple[str, int]], skip: bool) -> None:
    line, served = lined_up(items), list[int]()

    def give(namespace: str, item: int, nbytes: int) -> bool:
        assert items[item] == (namespace, nbytes)
        served.append(item)
        return True

    line.serve(give, skip=skip)
    assert sorted(served) == list(range(len(items))) and not line and line.nbytes == 0
    for one in "abc":
        assert [i for i in served if items[i][0] == one] == [i for i, (name, _) in enumerate(items) if name == one]


@given(arrivals, st.integers(0, 3000))
def test_while_several_wait_none_is_ahead_by_more_than_two_turns(items: list[tuple[str, int]], room: int) -> None:
    line, got, left = lined_up(items), Counter[str](), [room]

    def give(namespace: str, item: int, nbytes: int) -> bool:
        if nbytes > left[0]:
            return False
        left[0] -= nbytes
        got[namespace] += nbytes
        return True

    line.serve(give, skip=False)
    line.validate()
    backlogged = [name for name in "abc" if line.waiting(name)]
    largest = max((nbytes for _, nbytes in items), default=0)
    for one in backlogged:
        for other in "abc":
            assert got[other] - got[one] <= 3 * largest, "somebody passed while another one waited"


@given(arrivals, st.sets(st.sampled_from("abc")))
def test_who_can_not_be_served_holds_up_nobody_else(items: list[tuple[str, int]], stuck: set[str]) -> None:
    line = lined_up(items)
    line.serve(lambda namespace, item, nbytes: namespace not in stuck, skip=True)
    line.validate()
    waiting = sum(nbytes for name, nbytes in items if name in stuck)
    assert line.nbytes == waiting


@given(arrivals, st.sampled_from("abc"), st.integers(1, 100), st.integers(1, 1500))
def test_the_longest_gives_way_and_the_bound_holds(
    items: list[tuple[str, int]], newcomer: str, nbytes: int, capacity: int
) -> None:
    line: FairLine[int] = FairLine()
    for number, (namespace, size) in enumerate(items):
        before = {name: line.waiting(name) for name in "abc"}
        gone = line.give_way(namespace, size, capacity)
        line.validate()
        if gone is None:
            assert before == {name: line.waiting(name) for name in "abc"}, "refused, and yet something changed"
            continue
        line.push(namespace, number, size)
        assert line.nbytes <= capacity
    mine = line.waiting(newcomer)
    gone = line.give_way(newcomer, nbytes, capacity)
    assert line.waiting(newcomer) == mine, "a newcomer never takes from its own namespace"
    if gone is None and nbytes <= capacity:
        assert all(line.waiting(name) <= mine + nbytes for name in "abc") or line.nbytes + nbytes > capacity


def test_one_that_left_the_line_is_not_served() -> None:
    line = lined_up([("a", 1), ("b", 1), ("a", 1)])
    second = 1
    assert line.remove("b", second) and not line.remove("b", second) and not line.remove("c", second)
    served: list[int] = []
    line.serve(lambda namespace, item, nbytes: not served.append(item), skip=False)  # type: ignore[func-returns-value]
    assert served == [0, 2]


# --- bytes in flight -----------------------------------------------------------------------------------------------


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_quiet_namespace_is_next_however_many_of_another_wait() -> None:
    budget, order = Budget(10), list[str]()
    await budget.take(10, LOUD)

    async def use(namespace: str) -> None:
        await budget.take(5, namespace)
        order.append(namespace)
        budget.give(5)

    tasks = [asyncio.ensure_future(use(LOUD)) for _ in range(50)]
    await turns()
    tasks.append(asyncio.ensure_future(use(QUIET)))
    await turns()
    budget.give(10)
    await asyncio.gather(*tasks)
    assert order.index(QUIET) <= 4 and budget.used == budget.waiting == 0


async def test_a_full_line_lets_in_who_has_less_in_it() -> None:
    budget = Budget(10, waiting_max=20)
    await budget.take(10, LOUD)
    loud = [asyncio.ensure_future(budget.take(5, LOUD)) for _ in range(5)]
    await turns()
    assert [task.done() for task in loud] == [False] * 4 + [True]
    assert isinstance(loud[4].exception(), Overloaded)
    quiet = asyncio.ensure_future(budget.take(5, QUIET))
    await turns()
    assert isinstance(loud[3].exception(), Overloaded) and not quiet.done() and budget.waiting == 20
    budget.give(10)
    await asyncio.gather(quiet, loud[0])
    for task in loud:
        task.cancel()
    await asyncio.gather(*loud, return_exceptions=True)
    assert budget.used == 10 and budget.waiting == 0


async def test_a_turn_that_does_not_come_in_time_takes_nothing() -> None:
    budget = Budget(10)
    async with budget.hold(10, LOUD, None):
        with pytest.raises(DeadlineExceeded):
            async with budget.hold(5, QUIET, 0.01):
                raise AssertionError("it was not its turn")
    assert budget.used == budget.waiting == 0


def test_of_what_comes_in_none_has_more_than_half_where_there_are_several() -> None:
    receiving = Receiving(100, shared=True)
    with receiving.take(40, LOUD):
        with pytest.raises(Overloaded), receiving.take(20, LOUD):
            raise AssertionError("more than half")
        with receiving.take(60, QUIET), pytest.raises(Overloaded), receiving.take(1, "third"):
            raise AssertionError("more than there is")
    with Receiving(100, shared=False).take(40, LOUD) as _:
        assert receiving.used == 0
    alone = Receiving(100, shared=False)
    with alone.take(40, LOUD), alone.take(60, LOUD):
        assert alone.used == 100


# --- room in the store ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fair", [True, False])
async def test_puts_that_wait_for_room_take_turns(fair: bool) -> None:
    """Many of one namespace before one of another: the line lets the quiet one in near its front. The control asks
    in the same namespace, and is at the end."""
    ssd = FaultyTier(Tier.SSD)
    config = replace(
        SMALL, host_bytes=256 * KIB, hot_bytes=64 * KIB, segment_bytes=64 * KIB, spill_queue_bytes=400 * KIB
    )
    rig = Rig.make(config=config, ssd=ssd)
    await rig.start()
    await rig.put(0, namespace=QUIET)
    hold = await rig.open([0], namespace=QUIET)  # so that it keeps a segment of its own
    for depth in range(40):  # hot and host are full
        await rig.put(depth, namespace=LOUD)
    ssd.gate = asyncio.Event()  # nothing moves on before all are in line
    order: list[str] = []

    async def put(session: int, namespace: str, name: str) -> str:
        outcome = await rig.put(0, session, namespace=namespace)
        if outcome.state == "committed":
            order.append(name)
        return outcome.state

    tasks = [asyncio.ensure_future(put(session, LOUD, "loud")) for session in range(1, 41)]
    await turns(20)
    last = asyncio.ensure_future(put(99, QUIET if fair else LOUD, "last"))
    await turns(20)
    ssd.gate.set()
    ssd.gate = None
    states = await asyncio.gather(*tasks, last)
    assert states[-1] == "committed"
    place = order.index("last")
    assert place < 16 if fair else place >= len(order) - 8, f"number {place} of {len(order)}"
    rig.store.release(hold.id)
    await rig.store.idle()
    rig.store.validate()
    await rig.close()


async def test_a_full_line_of_puts_drops_the_last_of_who_has_most() -> None:
    ssd = FaultyTier(Tier.SSD)
    config = replace(
        SMALL, host_bytes=256 * KIB, hot_bytes=64 * KIB, segment_bytes=64 * KIB, spill_queue_bytes=64 * KIB
    )
    rig = Rig.make(config=config, ssd=ssd)
    await rig.start()
    await rig.put(0, namespace=QUIET)
    hold = await rig.open([0], namespace=QUIET)
    for depth in range(40):
        await rig.put(depth, namespace=LOUD)
    ssd.gate = asyncio.Event()
    loud = [asyncio.ensure_future(rig.put(0, session, namespace=LOUD)) for session in range(1, 41)]
    await turns(20)
    quiet = asyncio.ensure_future(rig.put(0, 99, namespace=QUIET))
    await turns(20)
    ssd.gate.set()
    ssd.gate = None
    assert (await quiet).state == "committed"
    states = Counter(outcome.state for outcome in await asyncio.gather(*loud))
    assert states["committed"] > 0 and states["dropped"] > 0
    rig.store.release(hold.id)
    await rig.store.idle()
    rig.store.validate()
    await rig.close()
