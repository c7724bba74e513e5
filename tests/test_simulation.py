"""Twenty histories of a small fleet: the real client, worker, store and coordinator under virtual time (tests/sim)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from tests.memdisk import MemoryFile
from tests.sim.oracle import Violation
from tests.sim.scenario import run_seed

SEEDS = range(20)
SEEN: Counter[str] = Counter()


@pytest.mark.parametrize("seed", SEEDS)
def test_invariants_hold(seed: int) -> None:
    outcome = run_seed(seed)
    assert outcome.seen["gets"] > 50 and outcome.seen["put_committed"] > 50
    SEEN.update(outcome.seen)


def test_the_histories_held_what_they_should() -> None:
    """The faults landed, and hits went on under them: a quiet history would prove nothing."""
    if not SEEN:
        pytest.fail("runs after the seeds: run the whole file")
    for fault in ("worker_crashes", "coordinator_crashes", "client_crashes", "cuts", "pauses"):
        assert SEEN[fault] >= 10, f"{fault}: {SEEN}"
    assert SEEN["requests_cut_short"] >= 1, SEEN
    for tier in ("hot", "host", "ssd"):
        assert SEEN[f"blocks_{tier}"] >= 50, f"{tier}: {SEEN}"


def test_the_same_seed_is_the_same_history() -> None:
    assert run_seed(3, turns=10).seen == run_seed(3, turns=10).seen


class _NoSum:
    """A checksum that holds for everything."""

    def update(self, data: object) -> None: ...

    def intdigest(self) -> int:
        return 7


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
    with pytest.raises(Violation, match="I1"):
        play()
