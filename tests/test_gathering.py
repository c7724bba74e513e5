"""When announcers hear of a change: at once, or when the blocks that are being put are there."""

from __future__ import annotations

import asyncio

from tests.sim.loop import run
from workers.gathering import LOOK_S, LOOKS_MAX, Gathering


class Store:
    """Busy for so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def busy(self) -> bool:
        self.looks -= 1
        return self.looks >= 0


async def heard(looks: int, changes: int = 1) -> list[float]:
    """Seconds after the changes at which somebody was told."""
    loop, times = asyncio.get_running_loop(), list[float]()
    begin = loop.time()
    gathering = Gathering(Store(looks).busy, lambda: times.append(round(loop.time() - begin, 6)))
    for _ in range(changes):
        gathering.changed()
    await asyncio.sleep(1.0)
    gathering.close()
    return times


def test_a_change_is_told_at_once_while_nothing_is_put() -> None:
    assert run(heard(0)) == [0.0] and run(heard(0, changes=3)) == [0.0] * 3


def test_changes_of_a_put_are_told_together_when_it_is_over() -> None:
    assert run(heard(1, changes=3)) == [LOOK_S]
    assert run(heard(3)) == [round(3 * LOOK_S, 6)]


def test_a_put_that_does_not_end_holds_nothing_back_for_long() -> None:
    assert run(heard(1_000)) == [round(LOOKS_MAX * LOOK_S, 6)]


def test_what_is_closed_tells_nobody() -> None:
    async def closed() -> list[str]:
        told = list[str]()
        gathering = Gathering(lambda: True, lambda: told.append("told"))
        gathering.changed()
        gathering.close()
        gathering.changed()
        await asyncio.sleep(1.0)
        return told

    assert run(closed()) == []
