"""What callers say reaches the policy: by message, by client; and what a store infers when nobody speaks."""

from __future__ import annotations

import math
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from kvstore.errors import BadRequest
from kvstore.kernels.reuse_state import NOW_RECORD, RECORDS
from kvstore.policies.advice import JOIN_S, Advice
from kvstore.policies.base import make_policies
from kvstore.policies.learned import Learned
from kvstore.policies.usage import Finish, Hint, Use
from kvstore.residency.residency import Level, Residency
from kvstore.types import Location, Tier
from kvstore.usewire import hint_from_wire, hint_to_wire, use_from_wire, use_to_wire
from kvstore.wire import worker_pb2
from tests.residency_blocks import header_of
from tests.service_cluster import STORE, MiniCluster, blocks_of
from tests.test_cluster_small import FULL, cluster, found, prompt  # noqa: F401 - the fixture


@pytest.mark.parametrize(
    "use", [Use(), Use(b"s", 0, Finish.END_TURN, 0.0, 7), Use(b"\xff" * 64, 9, Finish.TOOL_USE, 1.5, 1)]
)
def test_use_over_the_wire(use: Use) -> None:
    assert use_from_wire(worker_pb2.Use.FromString(use_to_wire(use).SerializeToString())) == use


@pytest.mark.parametrize("hint", [Hint(), Hint(True, 0, Finish.OTHER, 2.0, 0.5, -8), Hint(priority=8)])
def test_hint_over_the_wire(hint: Hint) -> None:
    assert hint_from_wire(worker_pb2.HintRequest.FromString(hint_to_wire(hint).SerializeToString())) == hint


def test_what_no_caller_can_mean_is_refused() -> None:
    for message in (
        worker_pb2.Use(session=b"x" * 65),
        worker_pb2.Use(time_s=math.nan),
        worker_pb2.Use(time_s=-1.0),
    ):
        with pytest.raises(BadRequest):
            use_from_wire(message)
    with pytest.raises(BadRequest):
        hint_from_wire(worker_pb2.HintRequest(priority=9))
    assert use_from_wire(worker_pb2.Use(finish=77)).finish == Finish.UNKNOWN  # type: ignore[arg-type]


class Told:
    """A residency with `default`, spoken to through its advice."""

    def __init__(self, *, caller_time: bool = False) -> None:
        self.residency = Residency([Level(Tier.HOST, 1 << 30)], iter(make_policies("default")).__next__)
        self.advice = Advice(self.residency, caller_time=caller_time)
        self.policy = self.residency.policies[0]
        assert isinstance(self.policy, Learned)
        self.learning = self.policy.learning

    def store(self, depth: int, now_s: float) -> int:
        keys = [sha256(bytes([number])).digest()[:16] for number in range(depth + 1)]
        made = replace(header_of(0, depth, parent=keys[-2] if depth else None), key=keys[-1])
        self.advice.storing("n", made, now_s)
        return self.residency.admit("n", made, 0, Location(0, depth * 4096, 4096), leaf_first=True)

    def record(self, row: int) -> int:
        self.learning.settle()
        known = self.learning._known
        return int(known.blocks[known.entry[row]]["request"])


def test_what_is_stored_follows_its_parent() -> None:
    told = Told()
    rows = [told.store(depth, 10.0 + depth) for depth in range(4)]
    assert len({told.record(row) for row in rows}) == 1
    told.advice.opened(np.array(rows[::-1]), 100.0)
    rows.append(told.store(4, 101.0))
    assert len({told.record(row) for row in rows}) == 1  # the request that opened the others
    late = told.store(5, 100_000.0)
    assert told.record(late) != told.record(rows[0])


def test_a_prompt_stored_at_once_is_one_request_told_of_once() -> None:
    """Copies may be complete in another order than they were sent; few of them cost the policy an event."""
    told = Told()
    first = told.store(0, 10.0)
    before = told.learning.requests
    rows = [first, *(told.store(depth, 10.0 + depth / 100) for depth in (1, 2, 4, 3, 5))]
    assert told.learning.requests <= before + 2
    assert len({told.record(row) for row in rows}) == 1
    told.advice.opened(np.array([first]), 20.0)
    rows.append(told.store(6, 20.1))
    assert told.record(rows[-1]) == told.record(rows[1]) != told.record(first)  # it hangs on what was not used since


def test_a_request_that_is_told_of_and_opens_is_one() -> None:
    told = Told()
    rows = [told.store(depth, 0.0) for depth in range(3)][::-1]
    told.advice.begin(Use(output_tokens=100, finish=Finish.TOOL_USE), rows, 50.0)
    first = told.record(rows[0])
    told.advice.opened(np.array(rows), 50.0 + JOIN_S / 2)
    assert told.record(rows[0]) == first
    told.advice.opened(np.array(rows), 60.0)
    assert told.record(rows[0]) != first


def test_hints_change_the_record_of_the_request() -> None:
    told = Told()
    rows = [told.store(depth, 0.0) for depth in range(3)][::-1]
    told.advice.hint(rows[0], Hint(output_tokens=1000, finish=Finish.END_TURN, priority=3))
    record = told.learning._known.requests[told.record(rows[0])]
    assert (record["finish"], record["priority"]) == (Finish.END_TURN, 3) and record["output"] > 1


def test_callers_time_counts_only_where_it_is_asked_for() -> None:
    for caller_time, expected in ((False, 5.0), (True, 1e6)):
        told = Told(caller_time=caller_time)
        told.advice.begin(Use(time_s=1e6), [], 5.0)
        told.learning.settle()
        known = told.learning._known
        assert known.requests[known.n[NOW_RECORD]]["time"] == expected


def test_records_do_not_pile_up() -> None:
    told = Told()
    rows = [told.store(depth, 0.0) for depth in range(3)][::-1]
    for second in range(2, 3000, 2):
        told.advice.opened(np.array(rows), float(second))
    told.learning.settle()
    assert told.learning._known.n[RECORDS] <= 3


async def test_a_client_tells_its_worker(cluster: MiniCluster) -> None:  # noqa: F811
    await cluster.coordinator()
    worker = await cluster.worker("a", store=replace(STORE, policy="default"))
    client = await cluster.client()
    prefix = prompt(1, 12)
    assert await client.hint(FULL, prefix, Hint(ended=True)) == 0  # nothing is here yet
    await client.put(FULL, prefix, blocks_of(prefix))
    assert await client.hint(FULL, prefix, use=Use(output_tokens=7, finish=Finish.TOOL_USE, blocks=12)) == 12
    policy = worker.store.stack.residency.policies[0]
    assert isinstance(policy, Learned)
    policy.learning.settle()
    known = policy.learning._known
    assert known.requests[known.n[NOW_RECORD]]["finish"] == Finish.TOOL_USE
    assert await client.hint(FULL, prefix, Hint(ended=True)) == 12
    policy.learning.settle()
    assert known.requests[known.n[NOW_RECORD]]["finish"] == 4
    assert client.counters["errors_BadRequest"] == 0
