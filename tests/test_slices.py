"""Copies that byte movers and the event loop share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from kvstore.client import slices
from kvstore.client.slices import SLICE_BYTES, Slices
from kvstore.machine.system import ThreadPool

pytestmark = pytest.mark.usefixtures("no_leaks")

NEVER = threading.Event()  # waiting for it is a copy that takes its time


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    made = ThreadPool(2)
    yield made
    made.close()


class Copy:
    """Remembers what was copied, and by whom. `pause`: seconds a slice takes."""

    def __init__(self, pause: float = 0.0) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self.going = 0
        self.pause = pause

    def __call__(self, first: int, last: int) -> None:
        self.going += 1
        NEVER.wait(self.pause)
        self.ranges.append((first, last))
        self.threads.add(threading.get_ident())
        self.going -= 1


def whole(nbytes: int) -> list[tuple[int, int]]:
    return [(at, min(at + SLICE_BYTES, nbytes)) for at in range(0, nbytes, SLICE_BYTES)]


@pytest.mark.parametrize("nbytes", [1, SLICE_BYTES, SLICE_BYTES + 1, 7 * SLICE_BYTES, 31 * SLICE_BYTES - 5])
async def test_every_byte_is_copied_once(pool: ThreadPool, nbytes: int) -> None:
    copy = Copy()
    await Slices(copy, nbytes).run(pool)
    assert sorted(copy.ranges) == whole(nbytes)


async def test_a_large_copy_is_shared_and_the_loop_goes_on_between(pool: ThreadPool) -> None:
    copy, turns = Copy(0.005), 0
    nbytes, together = 40 * SLICE_BYTES, threading.Barrier(1 + slices.MOVERS_MAX)

    def shared(first: int, last: int) -> None:
        if threading.get_ident() not in copy.threads:
            together.wait(30)  # all of them at the same time
        copy(first, last)

    async def others() -> None:
        nonlocal turns
        while len(copy.ranges) < 40:
            turns += 1
            await asyncio.sleep(0)

    await asyncio.gather(Slices(shared, nbytes).run(pool), others())
    assert sorted(copy.ranges) == whole(nbytes)
    assert len(copy.threads) == 1 + slices.MOVERS_MAX and threading.get_ident() in copy.threads
    assert turns > 2


async def test_a_small_copy_asks_nobody(pool: ThreadPool) -> None:
    copy = Copy()
    await Slices(copy, slices.MOVED_BYTES - 1).run(pool)
    assert copy.threads == {threading.get_ident()}


async def test_busy_byte_movers_are_not_waited_for(pool: ThreadPool) -> None:
    released = threading.Event()
    busy = [asyncio.ensure_future(pool.run(released.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    copy = Copy()
    await asyncio.wait_for(Slices(copy, 20 * SLICE_BYTES).run(pool), 5)
    assert sorted(copy.ranges) == whole(20 * SLICE_BYTES) and copy.threads == {threading.get_ident()}
    assert not any(task.done() for task in busy)
    released.set()
    await asyncio.gather(*busy)


async def test_cancelled_it_ends_when_nobody_copies_any_more(pool: ThreadPool) -> None:
    copy = Copy(0.02)
    copying = asyncio.ensure_future(Slices(copy, 400 * SLICE_BYTES).run(pool))
    while len(copy.ranges) < 4:
        await asyncio.sleep(0.001)
    assert copy.going > 0
    copying.cancel()
    await asyncio.sleep(0)
    copying.cancel()  # an impatient caller
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert copy.going == 0
    done = len(copy.ranges)
    await asyncio.sleep(0.06)
    assert len(copy.ranges) == done < 400


@pytest.mark.parametrize("by_loop", [True, False])
async def test_a_slice_that_fails_fails_the_copy(pool: ThreadPool, by_loop: bool) -> None:
    here = threading.get_ident()

    def copy(first: int, last: int) -> None:
        NEVER.wait(0.005)
        if (threading.get_ident() == here) == by_loop:
            raise MemoryError

    with pytest.raises((MemoryError, RuntimeError)):
        await Slices(copy, 40 * SLICE_BYTES).run(pool)
