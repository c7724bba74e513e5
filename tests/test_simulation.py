"""Histories of a small fleet: the real client, worker, store and coordinator under virtual time (tests/sim).

`make sim SEEDS=300` plays many more, `make sim` plays on for ever; here are a few, and the proof that they prove.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore.policies.base import make_policies
from tests.memdisk import MemoryFile
from tests.sim.oracle import Violation
from tests.sim.scenario import LEARNED_SEEDS, RAW_SEEDS, Scenario, play, run_seed
from tests.sim.seeds import FOUND

SEEDS = sorted({*range(10), 12, 16, *FOUND})
SEEN: Counter[str] = Counter()


@pytest.mark.parametrize("seed", SEEDS)
def test_invariants_hold(seed: int) -> None:
    outcome = run_seed(seed, turns=10)
    assert outcome.seen["gets"] > 10 and outcome.seen["put_committed"] > 20
    SEEN.update(outcome.seen)


@pytest.mark.parametrize("seed", range(RAW_SEEDS, RAW_SEEDS + 4))
def test_invariants_hold_by_raw_connections(seed: int) -> None:
    scenario = Scenario(seed, None, turns=10)
    play(scenario)
    assert scenario.seen["gets"] > 10
    SEEN["raw_connections"] += sum(line.endswith(" Admit") for line in scenario.fleet.network.trace)


@pytest.mark.parametrize("seed", range(LEARNED_SEEDS, LEARNED_SEEDS + 4))
def test_invariants_hold_with_the_policy_that_learns(seed: int) -> None:
    make_policies("default")  # compiled before: until it is loaded LRU decides
    scenario = Scenario(seed, None, turns=10)
    play(scenario)
    assert scenario.seen["gets"] > 10
    deciding = [node.runtime.store.stack.policy for node in scenario.fleet.workers if node.runtime is not None]
    assert set(deciding) == {"default"}


def test_the_histories_held_what_they_should() -> None:
    """The faults landed, and hits went on under them: a quiet history would prove nothing."""
    if not SEEN:
        pytest.fail("runs after the seeds: run the whole file")
    faults = (
        "worker_crashes", "power_losses", "drains", "coordinator_crashes", "client_crashes", "cuts", "pauses",
        "slow_machines", "stopped_readers", "clock_steps", "disk_rot", "disk_full", "redis_flushes", "redis_hangs",
        "requests_cut_short",
    )  # fmt: skip
    missing = [fault for fault in faults if not SEEN[fault]]
    assert len(missing) <= 2, f"{missing}: {SEEN}"  # of few seeds, one or the other kind may have had no turn
    for tier in ("hot", "host", "ssd", "redis"):
        assert SEEN[f"blocks_{tier}"] >= 1, f"{tier}: {SEEN}"
    for work in ("assembled", "pinned", "lonely_hits", "pulled", "marked", "over_quota", "purged_slowly"):
        assert SEEN[work] >= 10, f"{work}: {SEEN}"
    assert SEEN["raw_connections"] >= 5, SEEN


def test_the_same_seed_is_the_same_history() -> None:
    """Also in another process, whose sets are in another order."""
    digests = {run_seed(3, turns=6).digest}
    assert digests != {run_seed(4, turns=6).digest}, "a negative control: the seed matters"
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", "from tests.sim.scenario import run_seed; print(run_seed(3, turns=6).digest)"],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1


class _NoSum:
    """A checksum that holds for everything."""

    def update(self, data: object) -> None: ...

    def intdigest(self) -> int:
        return 7


def _sumless(jobs: list[tuple[memoryview, memoryview]]) -> list[int]:
    for source, target in jobs:
        target[:] = source
    return [7] * len(jobs)


def test_the_oracle_sees_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: where no checksum can tell, bytes that rot on a disk do come through, and I1 says so."""
    read = MemoryFile.preadv_into

    def rot(self: MemoryFile, offset: int, targets: Sequence[memoryview]) -> int:
        done = read(self, offset, targets)
        for target in targets:
            for place in range(500, len(target), 97):
                target[place] ^= 0x01
        return done

    def play() -> None:
        for seed in SEEDS:
            run_seed(seed)

    monkeypatch.setattr(MemoryFile, "preadv_into", rot)
    monkeypatch.setattr("kvstore.checksum.xxh3_64_intdigest", lambda data: 7)
    monkeypatch.setattr("kvstore.checksum.xxh3_64", _NoSum)
    monkeypatch.setattr("kvstore.checksum._kernel", [_sumless])
    with pytest.raises(Violation, match="I1"):
        play()
