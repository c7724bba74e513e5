"""Each safeguard of the design, taken out: the simulation notices, and the same seed is well with it in place.

`make sim-mutants` looks through 300 seeds. Here the known seed comes first, then a few more: a change of the product
changes what happens in a seed. What many seeds do not notice is left to the long form (`make test-long`).
"""

from __future__ import annotations

import gc

import pytest

from tests.sim.loop import SimError
from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.oracle import Violation
from tests.sim.scenario import run_seed

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""A history that ends in its middle leaves coroutines that can't be finished any more."""

MORE_SEEDS = 40
RARE_SEEDS = 300


def caught_by(mutant: Mutant) -> tuple[int, BaseException] | None:
    """The first seed that notices, and what it says."""
    for seed in (mutant.seed, *range(RARE_SEEDS if mutant.rare else MORE_SEEDS)):
        with mutant.on():
            try:
                run_seed(seed)
            except (Violation, SimError, AssertionError) as violation:
                return seed, violation
    return None


OFTEN = [mutant for mutant in MUTANTS if not mutant.rare]
RARE = [mutant for mutant in MUTANTS if mutant.rare]


def check(mutant: Mutant) -> None:
    caught = caught_by(mutant)
    gc.collect()  # what the broken history left, before the next test
    assert caught is not None, f"{mutant.what}: no seed notices"
    seed, violation = caught
    print(f"seed {seed}: {violation}")
    run_seed(seed)


@pytest.mark.parametrize("mutant", OFTEN, ids=[mutant.name for mutant in OFTEN])
def test_it_is_caught(mutant: Mutant) -> None:
    check(mutant)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mutant", RARE, ids=[mutant.name for mutant in RARE])
def test_it_is_caught_in_the_long_run(mutant: Mutant) -> None:
    check(mutant)
