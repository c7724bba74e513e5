"""The copier's line: nobody is left waiting in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvstore.checksum import xxh3
from kvstore.store.copier import Copier


class NowPool:
    """Runs at once, within the caller's step."""

    async def run(self, function: Callable[..., Any], *args: object) -> Any:
        return function(*args)

    def close(self) -> None: ...


async def test_a_job_that_comes_as_the_last_lane_ends_is_done() -> None:
    """A lane has seen an empty line and ended, but its task is not collected yet when the next job comes."""
    copier = Copier(NowPool(), 1)
    source, target = memoryview(b"x" * 1000), memoryview(bytearray(1000))
    loop = asyncio.get_running_loop()

    async def first() -> int:
        copying = loop.create_task(copier.copy(source, target))
        await asyncio.sleep(0)  # the job is in line, its lane has not begun
        (lane,) = copier._tasks
        while not lane.done():
            await asyncio.sleep(0)
        again = await copier.copy(source, target)  # in line within this very step
        assert again == await copying
        return again

    async with asyncio.timeout(5):
        assert await first() == xxh3(bytes(source))


async def test_many_at_once_through_few_lanes() -> None:
    copier = Copier(NowPool(), 2)
    blocks = [bytes([i]) * 5000 for i in range(200)]
    targets = [bytearray(5000) for _ in blocks]
    async with asyncio.timeout(10):
        pairs = zip(blocks, targets, strict=True)
        sums = await asyncio.gather(*(copier.copy(memoryview(b), memoryview(t)) for b, t in pairs))
    assert sums == [xxh3(block) for block in blocks] and [bytes(t) for t in targets] == blocks
