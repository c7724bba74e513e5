"""Tiers that are too small to help are named, with what to set; those that are large enough are not."""

from __future__ import annotations

import re

import pytest

from kvstore.config import GIB, MIB, parse_toml
from kvstore.operations.sizing import size_problems
from kvstore.types import Tier
from kvstore.wire import common_pb2


def status(
    *, hot: int = GIB, host: int = 3 * GIB, ssd: int = 64 * GIB, block: int = MIB, full: bool = False, **counters: int
) -> common_pb2.WorkerStatus:
    """A worker with tiers of these capacities, blocks of `block` raw bytes (half of it stored)."""
    made = common_pb2.WorkerStatus(counters=counters)
    for tier, capacity in ((Tier.HOT, hot), (Tier.HOST, host), (Tier.SSD, ssd)):
        if capacity:
            used = int(capacity * (0.9 if full else 0.1))
            blocks = max(1, used // (block // 2))
            made.tiers.add(
                tier=int(tier),
                state="ok",
                capacity=capacity,
                used=used,
                blocks=blocks,
                raw_bytes=blocks * block,
                hits=1000,
            )
    return made


def test_a_worker_of_sensible_sizes_has_no_problem() -> None:
    assert size_problems(status()) == []
    assert size_problems(status(ssd=0)) == []
    assert size_problems(status(full=True, misses=10, evicted=9_000)) == [], "few of those given up are missed"
    assert size_problems(status(full=False, misses=9_000, evicted=9_000)) == [], (
        "there is room: purged, not squeezed out"
    )
    assert size_problems(status(full=True, misses=9_000, evicted=0)) == [], "nothing was given up: they are new prompts"
    assert size_problems(status(full=True, misses=900, evicted=900, ssd=64 * GIB)) != []
    assert size_problems(common_pb2.WorkerStatus()) == []


@pytest.mark.parametrize(
    ("made", "what", "key"),
    [
        (status(hot=2 * GIB, host=GIB), "host .* smaller than hot", "store.host_bytes"),
        (status(hot=16 * MIB), "less than a prompt", "store.hot_bytes"),
        (status(ssd=4 * GIB), "no larger than memory", "store.ssd_bytes"),
        (status(full=True, misses=5_000, evicted=20_000), "ssd is full", "store.ssd_bytes"),
        (status(full=True, misses=5_000, evicted=20_000, ssd=0), "host is full", "store.host_bytes"),
    ],
)
def test_each_that_is_too_small_is_named_with_a_size(made: common_pb2.WorkerStatus, what: str, key: str) -> None:
    ((said, fix),) = size_problems(made)
    assert re.search(what, said) and key in fix
    for name, value in re.findall(r"store.(\w+) = (\"[^\"]+\")", fix):
        lines = [f"{name} = {value}"]
        if name == "hot_bytes":
            lines.append('host_bytes = "64GiB"')
        assert parse_toml("[store]\n" + "\n".join(lines)), "what it says can be set"


def test_the_working_set_it_asks_for_holds_what_was_missed() -> None:
    ((_, fix),) = size_problems(status(full=True, misses=20_000, evicted=20_000))
    size = int(re.findall(r"(\d+)GiB", fix)[0])
    assert 64 + 20_000 * 0.5 / 1024 <= size <= 64 + 20_000 * 0.5 / 1024 + 1.1
