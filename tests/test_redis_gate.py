"""The circuit breaker before Redis, with a clock that the test moves: closed, open, half-open, closed again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from kvstore.errors import TierDown
from kvstore.tiers.base import TierStats
from kvstore.tiers.redis_gate import PROBE_PAUSE_MAX_S, PROBE_PAUSE_S, Gate
from kvstore.tiers.redis_link import Command, ReplyError
from kvstore.types import Tier
from tests.store_fakes import ManualClock


class FakeLink:
    """Answers everything, or nothing; counts what reached it."""

    def __init__(self) -> None:
        self.reached = 0
        self.dead = False
        self.used = 100

    async def call(self, *commands: Command, into: Sequence[memoryview] = (), seen: object = None) -> list[Any]:
        self.reached += 1
        await asyncio.sleep(0)
        if self.dead:
            raise TierDown("no answer")
        info = f"maxmemory:1000\r\nused_memory:{self.used}\r\nmaxmemory_policy:noeviction\r\n".encode()
        return [info if command[0] == "INFO" else b"OK" for command in commands]

    async def close(self) -> None:
        return None


class Rig:
    def __init__(self) -> None:
        self.clock, self.link, self.stats = ManualClock(), FakeLink(), TierStats(Tier.REDIS)
        self.gate = Gate(self.clock, self.stats, "here")

    async def opened(self) -> Rig:
        await self.gate.open(self.link)  # type: ignore[arg-type]
        self.link.reached = 0
        return self

    async def tick(self) -> None:
        """As the tier's heartbeat does."""
        if not self.gate.ok and self.clock.now >= self.gate.probe_at:
            await self.gate.probe()

    async def call(self) -> bool:
        try:
            return await self.gate.call(["GET", b"x"]) == [b"OK"]
        except TierDown:
            return False


async def test_one_failure_opens_it_and_then_nothing_waits_for_redis() -> None:
    rig = await Rig().opened()
    assert await rig.call()
    rig.link.dead = True
    assert await asyncio.gather(*(rig.call() for _ in range(3))) == [False] * 3
    assert rig.stats.state == "down" and rig.stats.errors == 1, "of many in flight the first one tells"
    reached = rig.link.reached
    assert not any([await rig.call() for _ in range(100)])
    await rig.tick()
    assert rig.link.reached == reached, "something asked Redis while the breaker is open"


async def test_half_open_one_question_decides_with_growing_pauses() -> None:
    rig = await Rig().opened()
    rig.link.dead = True
    await rig.call()
    rig.link.reached, pauses = 0, []
    for probes in range(1, 12):
        began = rig.clock.now
        rig.clock.now = rig.gate.probe_at - 0.001
        await rig.tick()
        assert rig.link.reached == probes - 1, "asked before its time"
        rig.clock.now = rig.gate.probe_at
        await rig.tick()
        assert not await rig.call() and rig.link.reached == probes, "a probe is one question, and it failed"
        pauses.append(rig.clock.now - began)
    assert pauses[0] == pytest.approx(PROBE_PAUSE_S)
    grown = [after / before for before, after in pairwise(pauses)]
    assert all(step == pytest.approx(2) for step in grown[:6]) and max(pauses) == pytest.approx(PROBE_PAUSE_MAX_S)


async def test_an_answer_closes_it_and_the_pauses_begin_anew() -> None:
    rig = await Rig().opened()
    for _ in range(2):
        rig.link.dead = True
        await rig.call()
        for _ in range(4):
            rig.clock.now = rig.gate.probe_at
            await rig.tick()
        assert rig.stats.state == "down" and rig.gate.probe_at - rig.clock.now > PROBE_PAUSE_S
        rig.link.dead = False
        rig.clock.now = rig.gate.probe_at
        await rig.tick()
        assert rig.stats.state == "ok" and rig.stats.detail == "" and await rig.call()
    rig.link.dead = True
    await rig.call()
    assert rig.gate.probe_at - rig.clock.now == pytest.approx(PROBE_PAUSE_S)


async def test_out_of_memory_is_not_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads pass while it is full; it is well again when there is as much room as the refused value needs."""
    rig = await Rig().opened()
    answer = rig.link.call

    async def refusing(*commands: Command, **how: Any) -> list[Any]:
        return [ReplyError("OOM", "command not allowed") if command[0] == "SET" else b"OK" for command in commands]

    monkeypatch.setattr(rig.link, "call", refusing)
    with pytest.raises(TierDown, match="out of memory"):
        await rig.gate.call(["SET", b"x", b"y"])
    assert rig.stats.state == "full" and await rig.call()
    monkeypatch.setattr(rig.link, "call", answer)
    rig.link.used, rig.clock.now = 1001, rig.gate.probe_at
    await rig.tick()
    assert rig.stats.state == "full", "there is still no room"
    rig.link.used, rig.clock.now = 100, rig.gate.probe_at
    await rig.tick()
    assert rig.stats.state == "ok"
