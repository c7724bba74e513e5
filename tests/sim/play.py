"""Seeds in several processes: a module of its own, so that a process of the pool finds its work."""

from __future__ import annotations

import itertools
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field

from tests.sim.mutants import MUTANTS
from tests.sim.scenario import Scenario, play

HISTORY_LINES = 40


@dataclass
class Played:
    """What became of a seed. `failure` empty: every invariant held."""

    seed: int
    failure: str = ""
    detail: str = ""
    digest: str = ""
    seen: Counter[str] = field(default_factory=Counter)


def play_one(seed: int, turns: int, mutant: str = "") -> Played:
    """Runs in a process of the pool."""
    chosen = [m for m in MUTANTS if m.name == mutant]
    scenario = Scenario(seed, None, turns)
    try:
        with chosen[0].on() if chosen else nullcontext():
            play(scenario)
    except Exception as error:  # noqa: BLE001 - every failure is shown with its seed, and the run goes on
        history = "\n".join(scenario.fleet.network.trace[-HISTORY_LINES:])
        detail = f"{traceback.format_exc()}\nthe end of its history:\n{history}"
        return Played(seed, f"{type(error).__name__}: {error}".splitlines()[0], detail)
    return Played(seed, digest=scenario.fleet.network.digest(), seen=scenario.seen)


def in_turn(pool: ProcessPoolExecutor, jobs: int, calls: Iterator[tuple[int, int, str]]) -> Iterator[Played]:
    """Outcomes as they come, a few calls ahead; ends the calls that are left when it is closed."""
    under_way: set[Future[Played]] = set()
    try:
        while True:
            under_way |= {pool.submit(play_one, *call) for call in itertools.islice(calls, 2 * jobs - len(under_way))}
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from sorted((future.result() for future in done), key=lambda played: played.seed)
    finally:
        for future in under_way:
            future.cancel()
