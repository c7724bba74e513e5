"""Replays through policies: against a naive LRU, brute force, and what the learned policy promises."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kvstore.bench.eviction import main
from kvstore.bench.eviction_cost import measure_cost
from kvstore.bench.report import Report
from kvstore.errors import UsageError
from kvstore.kernels.belady import hits
from kvstore.operations.eviction_replay import BlockTrace, Knows, Replay, block_trace
from kvstore.operations.trace import Request
from kvstore.policies.base import POLICIES, make_policies, make_policy
from kvstore.policies.usage import Hint, Use
from tests.test_replay import write_trace


def tree(seed: int, requests: int, roots: int = 2, length: int = 5) -> list[Request]:
    """Prompts that are paths in a random tree of few blocks."""
    rng, names, found = Random(seed), dict[tuple[int, ...], int](), list[Request]()
    for turn in range(requests):
        path: tuple[int, ...] = (rng.randrange(roots),)
        while len(path) < length and rng.random() < 0.8:
            path += (rng.randrange(2),)
        ids = tuple(names.setdefault(path[: end + 1], len(names)) for end in range(len(path)))
        found.append(Request(turn * 1000.0, 512 * len(ids), rng.randrange(200), ids))
    return found


def sessions(seed: int, spans: int = 600) -> list[Request]:
    """Sessions that go on soon after a tool call and never after their end, beside prompts that come once."""
    rng, events, block = Random(seed), list[tuple[float, tuple[int, ...], str]](), 0
    for _ in range(spans):
        now, ids = rng.uniform(0, 20_000), tuple[int, ...]()
        for turn in range(rng.choice((1, 1, 4, 8))):
            ids += tuple(range(block, block + 3))
            block += 3
            events.append((now, ids, "tool_use"))
            now += rng.uniform(5, 30) * (turn + 1)
        events[-1] = (events[-1][0], ids, "end_turn")
    return [Request(time * 1000, 512 * len(ids), 50, ids, finish) for time, ids, finish in sorted(events)]


def naive_lru(requests: list[Request], capacity: int, counted: int) -> int:
    order: OrderedDict[int, None] = OrderedDict()
    found = 0
    for number, request in enumerate(requests):
        leading = 0
        while leading < len(request.hash_ids) and request.hash_ids[leading] in order:
            leading += 1
        found += leading if number >= counted else 0
        for block in reversed(request.hash_ids):
            order[block] = None
            order.move_to_end(block)
            if len(order) > capacity:
                order.popitem(last=False)
    return found


def best_of_all(requests: list[Request], capacity: int, counted: int) -> int:
    """Every choice of what to keep, tried."""

    def kept(candidates: frozenset[int]) -> list[frozenset[int]]:
        if len(candidates) <= capacity:
            return [candidates]
        return [subset for block in candidates for subset in kept(candidates - {block})]

    @cache
    def most(number: int, present: frozenset[int]) -> int:
        if number == len(requests):
            return 0
        ids, leading = requests[number].hash_ids, 0
        while leading < len(ids) and ids[leading] in present:
            leading += 1
        gain = leading if number >= counted else 0
        return gain + max(most(number + 1, choice) for choice in set(kept(present | set(ids))))

    return most(0, frozenset())


def optimum(trace: BlockTrace, capacity: int) -> int:
    depth = np.array(trace.depth, np.int64)
    return int(hits(trace.ends, trace.blocks, depth, capacity, trace.first_counted))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [2, 5, 9])
def test_lru_is_the_naive_one(seed: int, capacity: int) -> None:
    requests = tree(seed, 300)
    trace = block_trace(requests)
    assert Replay(trace, make_policy("lru"), capacity).run().hits == naive_lru(requests, capacity, trace.first_counted)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capacity", [2, 3, 4])
def test_the_optimum_is_that_of_brute_force(seed: int, capacity: int) -> None:
    requests = tree(seed, 9, length=3)
    trace = replace(block_trace(requests), first_counted=0)
    assert optimum(trace, capacity) == best_of_all(requests, capacity, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_beats_the_optimum_and_all_count_the_same(name: str) -> None:
    trace = block_trace(tree(7, 400))
    for capacity in (3, 8, 1000):
        outcome = Replay(trace, make_policy(name), capacity).run()
        assert outcome.hits <= optimum(trace, capacity)
        assert outcome.accesses == len(trace.blocks)
        assert 0 <= outcome.written <= outcome.accesses
    assert outcome.written == trace.distinct  # everything fits: each block comes once


def test_the_bench_names_its_cells(tmp_path: Path) -> None:
    path, plot = write_trace(tmp_path / "one.jsonl", tree(3, 200)), tmp_path / "plot.svg"
    report = main([str(path), "--capacity", "10%,50%", "--policy", "lru,default", "--plot", str(plot)])
    cells = {f"one/{capacity}/{name}" for capacity in ("10%", "50%") for name in ("opt", "lru", "default")}
    assert cells <= set(report.results) and plot.read_text().startswith("<svg")
    assert report.results["one/10%/lru"]["value"] <= report.results["one/10%/opt"]["value"]
    with pytest.raises(UsageError, match="TRACE"):
        main(["--policy", "lru"])


def test_the_cost_of_a_decision_is_measured_where_everything_is_full() -> None:
    report = Report("eviction")
    measure_cost(report, 2000, 2000)
    assert report.results["decision_us/default"]["value"] > 0 and report.results["decision_us/lru"]["value"] > 0


def test_default_learns_who_comes_back() -> None:
    """Far better than LRU where finish reasons tell all, and better yet when told of ends; not so when told nothing."""
    trace = block_trace(sessions(1))
    capacity = trace.distinct // 100
    lru = Replay(trace, make_policy("lru"), capacity).run()
    told = Replay(trace, make_policy("default"), capacity).run()
    ends = Replay(trace, make_policy("default"), capacity, Knows(session_ends=True)).run()
    blind = Replay(trace, make_policy("default"), capacity, Knows(outputs=False)).run()
    assert told.percent > lru.percent + 5
    assert ends.hits >= told.hits - told.asked // 100
    assert told.hits > blind.hits


def test_the_guard_goes_by_age_where_lru_is_better() -> None:
    """What the policy has learned turns false: prompts that came back at once now come back late, and the other way."""
    from kvstore.policies.learned import Learned

    policy = make_policy("default")
    assert isinstance(policy, Learned)
    learning = policy.learning
    rows = 64
    seen, learned = False, False
    learning._known.tables[3] = np.linspace(
        0.0, 1.0, learning._known.tables.shape[2], dtype=np.float32
    )  # older: better
    for turn in range(6000):
        policy.begin(Use(), float(turn))
        block = turn % 3 if turn % 5 else 10_000 + turn
        present = [row for row in range(rows) if policy.holds(row)]
        known = {learning._known.blocks[learning._known.entry[row]]["ident"]: row for row in present}
        if np.uint64(block + 1) in known:
            policy.touch(known[np.uint64(block + 1)])
        else:
            if len(present) == 8:
                victim = policy.victim(lambda row: True)
                assert victim is not None
                policy.remove(victim, evicted=True)
            free = next(row for row in range(rows) if not policy.holds(row))
            policy.admit(free, block + 1, 1)
            learning.settle()
        learning._known.tables[3] = np.linspace(0.0, 1.0, learning._known.tables.shape[2], dtype=np.float32)
        learned = learned or not learning.by_age  # by age at first, as long as nothing was measured
        seen = seen or (learned and learning.by_age)
    assert seen


def test_levels_learn_together_and_ghosts_are_bounded() -> None:
    hot, host = make_policies("default", 2, ghost_bytes=1)
    learning = hot.learning  # type: ignore[attr-defined]
    for block in range(12_000):
        row = block % 50
        hot.begin(Use(), float(block))
        if hot.holds(row):
            hot.remove(row, evicted=True)
            host.remove(row, evicted=True)
        hot.admit(row, block + 1, 1, block, block)
        host.admit(row, block + 1, 1, block, block)
    learning.settle()
    assert int(learning._known.n[0]) <= 4096 + 50
    assert int(learning._known.n[6]) == 50  # resident, each once although at two levels


def test_before_anything_is_measured_the_oldest_leaves_first() -> None:
    policy, lru = make_policy("default"), make_policy("lru")
    rng = Random(5)
    for row in range(500):
        for each in (policy, lru):
            each.begin(Use(), row / 1000)
            each.admit(row, row + 1, 1)
        used = rng.randrange(row + 1)
        for each in (policy, lru):
            each.begin(Use(), (row + 0.5) / 1000)
            each.touch(used)
    for _ in range(500):
        row = lru.victim(lambda row: True)
        assert row is not None and policy.victim(lambda row: True) == row
        policy.remove(row, evicted=True)
        lru.remove(row, evicted=True)


def test_hints_order_victims() -> None:
    policy = make_policy("default")
    for row in range(4):
        policy.begin(Use(), float(row))
        policy.admit(row, row + 1, 1)
    policy.begin(Use(), 10.0)
    policy.hint(2, Hint(ended=True))
    policy.hint(0, Hint(reuse_s=1.0))
    policy.hint(1, Hint(priority=-8))
    found = []
    while (row := policy.victim(lambda row: True)) is not None:
        policy.remove(row, evicted=True)
        found.append(row)
    assert found.index(2) < found.index(3) and found.index(1) < found.index(3) and found[-1] == 0


def test_a_time_to_live_that_passed() -> None:
    policy = make_policy("default")
    for row in range(3):
        policy.begin(Use(), float(row))
        policy.admit(row, row + 1, 1)
    policy.hint(2, Hint(ttl_s=5.0))
    policy.begin(Use(), 6.0)
    assert policy.victim(lambda row: True) != 2
    policy.begin(Use(), 60.0)  # with a new request the order is made anew
    assert policy.victim(lambda row: True) == 2


def test_a_new_block_of_a_poor_kind_is_the_next_to_leave() -> None:
    """Bypass within one request: what the first new block showed goes for those that come after it."""
    policy = make_policy("default")
    for row in range(40):
        policy.begin(Use(), row / 1000)
        policy.admit(row, row + 1, 1)
    policy.begin(Use(), 0.041)
    found = []
    for depth in range(20, 0, -1):
        policy.admit(100 + depth, 1000 + depth, 1, 999 + depth, depth)
        if depth == 20:
            policy.hint(120, Hint(priority=-8))
        row = policy.victim(lambda row: True)
        assert row is not None
        policy.remove(row, evicted=True)
        found.append(row)
    assert found == list(range(120, 100, -1))
