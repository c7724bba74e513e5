"""A worker that joins empty is asked for few copies at first, and for more by and by.

Puts of other hosts pass it by: `Members.takers`.
"""

from __future__ import annotations

from typing import Any

from coordinator.registry import Registry
from coordinator.session import Session
from kvstore.config import CoordinatorConfig
from kvstore.convert import Introduced, delta_to_wire
from kvstore.directory.membership import Member
from kvstore.directory.replicas import Copies
from kvstore.wire import coordinator_pb2
from kvstore.wireform import member_to_wire
from tests.service_helpers import FULL, ListSource, prompt

GROUPS = 400
HINTS = 64


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall_ns(self) -> int:
        return 0


class Two:
    """One worker that holds `GROUPS` groups of one block, and one that joins, with what it is hinted to copy."""

    def __init__(self, *, empty: bool) -> None:
        self.clock = Clock()
        config = CoordinatorConfig(
            hints_max=HINTS, repair_groups=GROUPS, lease_s=1e6, hint_again_s=1e6, repair_round_s=1e6
        )
        self.registry = Registry(config, ["default"], 0.0, copies={"default": Copies(2)})
        self.old = self.session("old", {"default": 0})
        source = ListSource("old", outbox=2 * GROUPS)
        for number in range(GROUPS):
            source.add("default", prompt(number, 1))
        delta = source.outbox("default").delta(0, GROUPS)
        assert delta is not None
        entries = Introduced(source.catalog).entries(delta.changes)
        self.say(self.old, delta=delta_to_wire("default", delta, entries))
        self.new = self.session("new", {"default": 0 if empty else 7})
        self.registry.tick(0.0)

    def session(self, name: str, heads: dict[str, int]) -> Session:
        session = Session(self.registry, self.clock, 1e6, coordinator_pb2.Welcome)
        self.say(session, register=coordinator_pb2.Register(member=member_to_wire(Member(name, 1)), heads=heads))
        return session

    def say(self, session: Session, **body: Any) -> list[coordinator_pb2.AnnounceReply]:
        return session.handle(coordinator_pb2.AnnounceRequest(**body))

    def hinted(self, now: float) -> int:
        """Copies that the answer to a heartbeat asks the new one for."""
        self.clock.now = now
        replies = self.say(self.new, heartbeat=coordinator_pb2.Heartbeat())
        return sum(len(reply.hints.pulls) for reply in replies)


def test_an_empty_newcomer_is_asked_for_more_by_and_by() -> None:
    two = Two(empty=True)
    assert FULL.group_blocks > 1
    assert [two.hinted(now) for now in (0.0, 1.0, 15.0, 30.0)] == [HINTS // 8, HINTS // 8, HINTS // 2, HINTS]


def test_one_that_brings_blocks_is_asked_at_once() -> None:
    """The negative control."""
    two = Two(empty=False)
    assert two.hinted(0.0) == HINTS
