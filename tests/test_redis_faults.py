"""Redis killed, stopped, restarted, flushed, slowed, cut off, filled and forged while blocks are on their way.

Each fault is counted where it met an operation in flight; what an operation then gives is right bytes, a miss, or
`TierDown` within the timeout. Afterwards the tier works again and nothing is left over.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from redis.exceptions import OutOfMemoryError

from kvstore.errors import Corrupt, TierDown
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.machine.system import real_system
from kvstore.tiers.redis import RedisTier
from tests.contracts.records import sample
from tests.redis_helpers import Raw, get, put, tier_on, value_key
from tests.redis_proxy import Proxy, proxy

BLOCKS = 40
TIMEOUT_S = 0.5


class Bench:
    """A server of its own, a door before it, a tier that talks through the door."""

    def __init__(self, server: EmbeddedRedis, door: Proxy, tier: RedisTier) -> None:
        self.server, self.door, self.tier = server, door, tier
        self.seen: Counter[str] = Counter()
        self.raw = Raw(server)

    async def one(self, number: int) -> None:
        """A read or a write of a block; what came of it is counted. Never a wrong byte."""
        found = sample(number % BLOCKS)
        try:
            if number % 3:
                assert await get(self.tier, found) == found.record
            else:
                await put(self.tier, found)
            self.seen["done"] += 1
        except Corrupt:
            self.seen["missed"] += 1
        except TierDown:
            self.seen["down"] += 1

    async def traffic(self, ended: asyncio.Event) -> None:
        number = 0
        while not ended.is_set():
            await asyncio.gather(*(self.one(number + i) for i in range(12)))
            await self.tier.tick()
            await asyncio.sleep(0)
            number += 7

    async def under(self, fault: Callable[[], Awaitable[None]]) -> None:
        """Traffic before, during and after the fault."""
        ended = asyncio.Event()
        running = asyncio.ensure_future(self.traffic(ended))
        try:
            async with asyncio.timeout(60):
                await self.some("done", 60)
                self.seen.clear()
                await fault()
                self.during = Counter(self.seen)
                self.seen.clear()
                while self.tier.stats().state != "ok":
                    await asyncio.sleep(0.005)
                await self.some("done", 60)
        finally:
            ended.set()
            await running

    async def some(self, what: str, count: int) -> None:
        before = self.seen[what]
        while self.seen[what] < before + count:
            await asyncio.sleep(0.005)


@pytest.fixture
async def bench(tmp_path: Path, no_leaks: None) -> AsyncIterator[Bench]:
    system, server = real_system(threads=2), EmbeddedRedis(str(tmp_path / "redis"), 256 << 20)
    async with proxy(server.start()) as door:
        password = server.url.partition("@")[0].removeprefix("unix://")
        tier = tier_on(system, f"redis://{password}@127.0.0.1:{door.port}/0", redis_timeout_s=TIMEOUT_S)
        await tier.start()
        made = Bench(server, door, tier)
        yield made
        for number in range(BLOCKS):  # all of it works again
            await put(tier, sample(number))
            assert await get(tier, sample(number)) == sample(number).record
        assert tier.stats().state == "ok" and tier.used == tier.index.space("default").used
        await tier.close()
        made.raw.close()
    server.stop()
    system.pool.close()


async def test_killed_and_started_again(bench: Bench) -> None:
    async def fault() -> None:
        assert bench.server.pid is not None
        os.kill(bench.server.pid, signal.SIGKILL)
        await bench.some("down", 1)
        bench.server.stop()
        bench.server.start()
        await bench.some("missed", 1)

    await bench.under(fault)
    assert bench.during["down"] > 0 and bench.during["missed"] > 0, bench.during


async def test_stopped_for_longer_than_the_timeout(bench: Bench) -> None:
    async def fault() -> None:
        assert bench.server.pid is not None
        os.kill(bench.server.pid, signal.SIGSTOP)
        try:
            await bench.some("down", 12)
        finally:
            os.kill(bench.server.pid, signal.SIGCONT)

    await bench.under(fault)
    assert bench.during["down"] >= 12, bench.during


async def test_flushed(bench: Bench) -> None:
    async def fault() -> None:
        for _ in range(5):
            bench.raw("FLUSHALL")
            await bench.some("done", 4)

    await bench.under(fault)
    assert bench.during["missed"] > 0 and bench.during["down"] == 0, bench.during


async def test_slowed(bench: Bench) -> None:
    """Each piece takes its time: what is done in time is right, what is not is down, nobody waits for ever."""

    async def fault() -> None:
        bench.door.pause_s = 0.02
        await bench.some("done", 6)
        bench.door.pause_s = 2 * TIMEOUT_S
        await bench.some("down", 1)
        bench.door.pause_s = 0.0

    await bench.under(fault)
    assert bench.door.paused > 10 and bench.during["done"] >= 6 and bench.during["down"] > 0, bench.during


async def test_cut_off_in_the_middle_of_values(bench: Bench) -> None:
    async def fault() -> None:
        size = len(sample().record)
        for cut in (1, 100, size // 2, size + 20, 3 * size):
            bench.door.cut_after = cut
            cuts = bench.door.cuts
            while bench.door.cuts == cuts:
                await asyncio.sleep(0.005)
        bench.door.cut_after = None

    await bench.under(fault)
    assert bench.door.cuts >= 5 and bench.during["down"] > 0, (bench.door, bench.during)


async def test_filled_by_another_process(bench: Bench) -> None:
    async def fault() -> None:
        used = bench.raw.client.info("memory")["used_memory"]
        bench.raw("CONFIG", "SET", "maxmemory", used + (4 << 20))
        with suppress(OutOfMemoryError):
            for number in range(64):
                bench.raw("SET", f"other:{number}", bytes(1 << 20))
        await bench.some("down", 1)
        assert bench.tier.stats().state == "full"
        await bench.some("done", 10)  # reads go on
        bench.raw("CONFIG", "SET", "maxmemory", 512 << 20)

    await bench.under(fault)
    assert bench.during["down"] > 0 and bench.during["done"] >= 10, bench.during


async def test_forged_while_it_is_read(bench: Bench) -> None:
    """Another process without the secret overwrites values all the time: never served, each counted."""

    async def fault() -> None:
        for turn in range(400):
            found = sample(turn % BLOCKS)
            name = value_key(bench.tier, found)
            if bench.raw("EXISTS", name):
                other = sample((turn + 1) % BLOCKS)
                bench.raw("SET", name, found.record[:-1] + b"!" + bytes(40) if turn % 2 else other.record + bytes(40))
            await asyncio.sleep(0)
            if bench.seen["missed"] > 20:
                return

    await bench.under(fault)
    assert bench.during["missed"] > 0 and bench.tier.stats().errors > 0, bench.during
