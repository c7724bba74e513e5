"""The suite every eviction policy passes, and what LRU promises beyond it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from kvstore.errors import ConfigError
from kvstore.policies.base import POLICIES, Lru, Policy, make_policy
from kvstore.policies.s3fifo import GHOSTS_MIN, S3Fifo


def anyone(row: int) -> bool:
    return True


def drain(policy: Policy, eligible: Callable[[int], bool] = anyone) -> list[int]:
    """Victims in order, each removed."""
    found = []
    while (row := policy.victim(eligible)) is not None:
        policy.remove(row, evicted=True)
        found.append(row)
    return found


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return make_policy(request.param)


class TestEveryPolicy:
    def test_empty_has_no_victim(self, policy: Policy) -> None:
        assert policy.victim(anyone) is None

    def test_names_each_block_once(self, policy: Policy) -> None:
        for row in range(200):
            policy.admit(row, row * 7919, 4096)
        for row in range(0, 200, 3):
            policy.touch(row)
        assert sorted(drain(policy)) == list(range(200))

    def test_asking_twice_gives_the_same(self, policy: Policy) -> None:
        for row in range(10):
            policy.admit(row, row, 1)
        assert policy.victim(anyone) == policy.victim(anyone)

    def test_never_names_who_may_not_leave(self, policy: Policy) -> None:
        for row in range(50):
            policy.admit(row, row, 1)
        kept = {3, 7, 20}
        assert kept.isdisjoint(drain(policy, lambda row: row not in kept))
        assert policy.victim(lambda row: row not in kept) is None

    def test_a_refused_block_comes_back_when_it_is_ready(self, policy: Policy) -> None:
        policy.admit(1, 1, 1)
        assert policy.victim(lambda row: False) is None
        policy.ready(1)
        assert policy.victim(anyone) == 1

    def test_readiness_may_be_said_too_often(self, policy: Policy) -> None:
        for row in range(5):
            policy.admit(row, row, 1)
            for _ in range(3):
                policy.ready(row)
        policy.admit(5, 5, 1)
        policy.remove(5, evicted=False)
        policy.ready(5)
        assert sorted(drain(policy)) == list(range(5))

    def test_a_hinted_block_goes_first(self, policy: Policy) -> None:
        for row in range(20):
            policy.admit(row, row, 1)
        for _ in range(3):
            policy.touch(11)
        policy.next(11)
        assert policy.victim(anyone) == 11

    def test_removed_blocks_are_forgotten(self, policy: Policy) -> None:
        for row in range(10):
            policy.admit(row, row, 1)
        for row in range(0, 10, 2):
            policy.remove(row, evicted=False)
        assert sorted(drain(policy)) == [1, 3, 5, 7, 9]

    def test_rows_are_used_again(self, policy: Policy) -> None:
        for turn in range(5):
            for row in range(30):
                policy.admit(row, turn * 100 + row, 1)
            assert sorted(drain(policy)) == list(range(30))

    def test_order_agrees_with_the_victim(self, policy: Policy) -> None:
        for row in range(30):
            policy.admit(row, row, 1)
        for row in (4, 9, 0):
            policy.touch(row)
        assert policy.victim(anyone) == min(range(30), key=policy.order)

    def test_deterministic(self) -> None:
        for name in POLICIES:
            assert _random_run(make_policy(name), 5) == _random_run(make_policy(name), 5)


def _random_run(policy: Policy, seed: int) -> list[int]:
    rng, present, named = Random(seed), list[int](), list[int]()
    for row in range(2000):
        policy.admit(row, rng.getrandbits(64), rng.randrange(1, 100))
        present.append(row)
        policy.touch(rng.choice(present))
        if len(present) > 100:
            victim = policy.victim(lambda row: row % 3 != 0) if rng.random() < 0.5 else policy.victim(anyone)
            if victim is not None:
                policy.remove(victim, evicted=True)
                present.remove(victim)
                named.append(victim)
        policy.ready(rng.choice(present))
    return named


class TestLru:
    def test_least_recently_used_first(self) -> None:
        policy = Lru()
        for row in range(6):
            policy.admit(row, row, 1)
        for row in (0, 3, 1):
            policy.touch(row)
        assert drain(policy) == [2, 4, 5, 0, 3, 1]

    def test_against_a_plain_list(self) -> None:
        policy, rng = Lru(), Random(3)
        model: list[int] = []  # least recent first
        free = list(range(300))
        for _ in range(20_000):
            act = rng.random()
            if act < 0.3 and free:
                row = free.pop(rng.randrange(len(free)))
                policy.admit(row, row, 1)
                model.append(row)
            elif act < 0.6 and model:
                row = rng.choice(model)
                policy.touch(row)
                model.remove(row)
                model.append(row)
            elif act < 0.65 and model:
                row = rng.choice(model)
                policy.next(row)
                model.remove(row)
                model.insert(0, row)
            elif act < 0.75 and model:
                row = model.pop(rng.randrange(len(model)))
                policy.remove(row, evicted=False)
                free.append(row)
            elif model:
                kept = set(rng.sample(model, len(model) // 4))
                expected = next((row for row in model if row not in kept), None)
                assert policy.victim(lambda row, kept=kept: row not in kept) == expected  # type: ignore[misc]
                for row in model:
                    policy.ready(row)

    def test_its_memory_follows_its_blocks(self) -> None:
        """Rows that come, are hinted and go leave no entries behind for ever."""
        policy = Lru()
        for turn in range(20_000):
            policy.admit(turn % 8, turn, 1)
            policy.next(turn % 8)
            policy.remove(turn % 8, evicted=True)
        assert len(policy._heap) <= 2 * 8 + 1024 + 1


class TestS3Fifo:
    def cache(self, policy: Policy, requests: list[int], capacity: int) -> int:
        """Hits of a cache of equal blocks; a block's number is its identity."""
        rows: dict[int, int] = {}
        free, hits = list(range(capacity + 1)), 0
        for block in requests:
            if block in rows:
                hits += 1
                policy.touch(rows[block])
                continue
            if len(rows) == capacity:
                victim = policy.victim(anyone)
                assert victim is not None
                policy.remove(victim, evicted=True)
                del rows[next(name for name, row in rows.items() if row == victim)]
                free.append(victim)
            row = free.pop()
            rows[block] = row
            policy.admit(row, block, 4096)
        return hits

    def test_a_scan_displaces_nothing_that_is_used(self) -> None:
        """Blocks in use between blocks that come once, more of them than fit: LRU loses all, S3-FIFO next to none."""
        requests, once = [], 1_000
        for _ in range(60):
            requests += range(40)
            requests += range(once, once + 80)
            once += 80
        lru, s3fifo = self.cache(Lru(), requests, 100), self.cache(S3Fifo(), requests, 100)
        assert lru == 0 and s3fifo > 0.8 * 59 * 40

    def test_who_comes_back_while_remembered_goes_to_the_main_queue(self) -> None:
        policy = S3Fifo()
        for row in range(10):
            policy.admit(row, row, 1)
        assert policy.victim(anyone) == 0
        policy.remove(0, evicted=True)
        policy.admit(0, 0, 1)  # a ghost
        assert drain(policy) == [*range(1, 10), 0]

    def test_a_block_used_twice_outlives_the_small_queue(self) -> None:
        policy = S3Fifo()
        for row in range(10):
            policy.admit(row, row, 1)
        policy.touch(3)
        policy.touch(3)
        assert drain(policy) == [0, 1, 2, *range(4, 10), 3]

    def test_its_memory_follows_its_blocks(self) -> None:
        policy = S3Fifo()
        for turn in range(20_000):
            policy.admit(turn % 8, turn, 1)
            policy.next(turn % 8)
            policy.remove(turn % 8, evicted=True)
        assert len(policy._doomed) <= 2 * 8 + 1025 and len(policy._line[0]) <= 2 * 8 + 1025
        assert len(policy._ghosts) <= GHOSTS_MIN


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="lru"):
        make_policy("magic")
