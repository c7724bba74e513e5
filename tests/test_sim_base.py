"""The simulator's loop and system: time jumps, a deadlock shows, and a seed is a history."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import (
    DeadlineExceeded,
    Unavailable,
)
from kvstore.transport.methods import WORKER, WORKER_LOCAL
from kvstore.wire import worker_pb2
from tests.sim.loop import Deadlock, SimError, TimeLimit, run
from tests.sim.network import Faults, MemoryNetwork
from tests.sim.pair import Pair, match, sequence
from tests.sim.system import sim_system


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
