"""The copier's line: nobody is left waiting in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.checksum import xxh3
from kvstore.errors import BadRequest
from kvstore.store import copier
from kvstore.store.copier import Copier


class NowPool:
    """Runs at once, within the caller's step."""

    async def run(self, function: Callable[..., Any], *args: object) -> Any:
        return function(*args)

    def close(self) -> None: ...


async def test_a_job_that_comes_as_the_last_lane_ends_is_done() -> None:
    """A lane has seen an empty line and ended, but its task is not collected yet when the next job comes."""
    mover = Copier(NowPool(), 1)
    source, target = memoryview(b"x" * 1000), memoryview(bytearray(1000))
    loop = asyncio.get_running_loop()

    async def first() -> int:
        copying = loop.create_task(mover.copy(source, target))
        await asyncio.sleep(0)  # the job is in line, its lane has not begun
        (lane,) = mover._tasks
        while not lane.done():
            await asyncio.sleep(0)
        again = await mover.copy(source, target)  # in line within this very step
        assert again == await copying
        return again

    async with asyncio.timeout(5):
        assert await first() == xxh3(bytes(source))


async def test_many_at_once_through_few_lanes() -> None:
    mover = Copier(NowPool(), 2)
    blocks = [bytes([i]) * 5000 for i in range(200)]
    targets = [bytearray(5000) for _ in blocks]
    async with asyncio.timeout(10):
        pairs = zip(blocks, targets, strict=True)
        sums = await asyncio.gather(*(mover.copy(memoryview(b), memoryview(t)) for b, t in pairs))
    assert sums == [xxh3(block) for block in blocks] and [bytes(t) for t in targets] == blocks


async def test_the_next_turn_is_handed_over_before_one_ends_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "TURN_BYTES", 2000)
    asked, gate = list[int](), asyncio.Event()

    class HeldPool(NowPool):
        async def run(self, function: Callable[..., Any], *args: object) -> Any:
            asked.append(len(args))
            await gate.wait()
            return function(*args)

    made, source = Copier(HeldPool(), 1), memoryview(b"x" * 1000)
    tasks = [asyncio.create_task(made.copy(source, memoryview(bytearray(1000)))) for _ in range(20)]
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(asked) == 2, "one mover copies, one turn waits for it"
    gate.set()
    assert await asyncio.gather(*tasks) == [xxh3(bytes(source))] * 20


async def test_a_long_call_goes_in_turns_and_one_that_fails_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "TURN_BYTES", 2000)
    turns = list[int]()

    class Pool(NowPool):
        async def run(self, function: Callable[..., Any], *args: Any) -> Any:
            turns.append(len(args[0]))
            return function(*args)

    made = Copier(Pool(), 1)
    blocks = [bytes([i]) * 1000 for i in range(5)]
    jobs = [(memoryview(block), memoryview(bytearray(1000))) for block in blocks]
    assert await made.copy_all(jobs) == [xxh3(block) for block in blocks] and turns == [2, 2, 1]
    assert [bytes(target) for _, target in jobs] == blocks
    wrong = [(memoryview(bytes(2000)), memoryview(bytearray(2000))), (memoryview(bytes(2000)), memoryview(bytes(2000)))]
    good, bad = await asyncio.gather(made.copy_all(jobs), made.copy_all(wrong), return_exceptions=True)
    assert good == [xxh3(block) for block in blocks] and isinstance(bad, BadRequest)
    assert not made._line and not made._running
