"""Play the simulated cluster: `python -m tests.sim` plays seeds one after the other for ever, a process per core.

A seed is a history: the same seed with the same code gives the same one, down to its digest. A seed that fails is
printed with the invariant it breaks and the command that plays it again.

  python -m tests.sim --seeds 300              the seeds 0 to 299
  python -m tests.sim --first 17 --seeds 1 -v  one seed: the traceback, and the end of its history
  python -m tests.sim --mutants                each safeguard taken out in turn, until a seed notices
  python -m tests.sim --mutants copy-id        that one
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.play import Played, in_turn
from tests.sim.scenario import TURNS

MUTANT_SEEDS = 300


class Progress:
    """A line on stderr that is written over, where that is a terminal; else one now and then."""

    def __init__(self) -> None:
        self._said = 0.0

    def say(self, text: str, *, last: bool = False) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if not terminal and not last and now - self._said < 10.0:
            return
        self._said = now
        print(f"\r{text:<78}" if terminal else text, end="\n" if last or not terminal else "", file=sys.stderr)


def play_seeds(pool: ProcessPoolExecutor, options: argparse.Namespace) -> bool:
    """Whether all of them were well."""
    stop = options.first + options.seeds if options.seeds else None
    seeds = itertools.islice(itertools.count(), options.first, stop)
    seen: Counter[str] = Counter()
    failed: list[int] = []
    begin, count, progress = time.monotonic(), 0, Progress()
    try:
        for played in in_turn(pool, options.jobs, ((seed, options.turns, "") for seed in seeds)):
            count += 1
            seen += played.seen
            if played.failure:
                failed.append(played.seed)
                print(f"\nseed {played.seed} failed: {played.failure}")
                print(f"  again: python -m tests.sim --first {played.seed} --seeds 1 --turns {options.turns} -v")
            if options.verbose and (played.failure or options.seeds == 1):
                print(played.detail or f"seed {played.seed}: {played.digest}")
            progress.say(f"{count}/{options.seeds or 'endless'} seeds, {len(failed)} failed")
    except KeyboardInterrupt:
        print(f"\nstopped; the next seed is {options.first + count}")
    for name, number in sorted(seen.items()):
        print(f"{name:24} {number}")
    print(f"{count} seeds in {time.monotonic() - begin:.0f} s; failed: {failed or 'none'}")
    return not failed


def catch(pool: ProcessPoolExecutor, options: argparse.Namespace, mutant: Mutant) -> Played | None:
    """The first seed that notices, its known one before all others."""
    first = options.first or mutant.seed
    seeds = itertools.islice(itertools.count(first), options.seeds or MUTANT_SEEDS)
    outcomes = in_turn(pool, options.jobs, ((seed, options.turns, mutant.name) for seed in seeds))
    progress = Progress()
    for count, played in enumerate(outcomes, 1):
        if played.failure:
            outcomes.close()  # type: ignore[attr-defined]
            return played
        progress.say(f"{mutant.name}: {count} seeds did not notice")
    return None


def play_mutants(pool: ProcessPoolExecutor, options: argparse.Namespace) -> bool:
    """Whether every one was caught."""
    missed = []
    for mutant in MUTANTS:
        if options.mutants and mutant.name not in options.mutants:
            continue
        begin = time.monotonic()
        played = catch(pool, options, mutant)
        if played is None:
            missed.append(mutant.name)
            print(f"{mutant.name:20} NOT CAUGHT: {mutant.what}")
        else:
            took = time.monotonic() - begin
            print(f"{mutant.name:20} seed {played.seed:<4} {took:5.1f} s  {played.failure[:120]}", flush=True)
    print(f"missed: {missed or 'none'}")
    return not missed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=0, help="how many (default: for ever; mutants: 300 each)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default 0; mutants: the known one)")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"requests a client (default {TURNS})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="take safeguards out (all, or those named)")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks and histories")
    options = parser.parse_args()
    unknown = set(options.mutants or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant {', '.join(sorted(unknown))}: one of {', '.join(m.name for m in MUTANTS)}")
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        well = play_seeds(pool, options) if options.mutants is None else play_mutants(pool, options)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
