"""Who is a member, told by a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.directory.membership import Accepted, Fenced, Freed, Membership, Returned, State, Suspected, Unknown
from kvstore.errors import Overloaded

LEASE, STALL = 3.0, 1.0


def fresh(**more: float) -> Membership:
    members = Membership(LEASE, STALL, **more)  # type: ignore[arg-type]
    members.tick(0.0)
    return members


def accepted(outcome: Accepted | Fenced) -> Accepted:
    assert isinstance(outcome, Accepted)
    return outcome


def run_until(members: Membership, begin: float, end: float, step: float = 0.25) -> list[tuple[float, object]]:
    """Ticks in time; what came out, with when."""
    found: list[tuple[float, object]] = []
    now = begin
    while now < end:
        now += step
        found += [(now, event) for event in members.tick(now)]
    return found


def test_a_worker_joins_beats_and_leaves() -> None:
    members = fresh()
    welcome = accepted(members.register("w", 1, 0.0))
    assert welcome.fresh and not welcome.slow_start
    assert members.state("w") is State.ALIVE and members.members() == members.alive() == ["w"]
    assert members.heartbeat("w", 1, 0.5) == []
    assert members.leave("w", 1) == [Freed("w", 1)]
    assert members.state("w") is None and members.members() == []
    assert members.leave("w", 1) == []
    members.validate()


def test_silence_is_suspected_then_freed() -> None:
    members = fresh()
    members.register("w", 1, 0.0)
    found = run_until(members, 0.0, 6.0)
    assert found == [(1.75, Suspected("w", 1)), (5.0, Freed("w", 1))]
    assert members.epoch("w") == 1


def test_a_lost_connection_is_suspected_at_once_and_freed_after_the_lease() -> None:
    members = fresh()
    members.register("w", 1, 0.0)
    assert members.disconnected("w", 1, 0.25) == [Suspected("w", 1)]
    assert members.disconnected("w", 1, 0.3) == []
    assert members.state("w") is State.SUSPECT
    assert members.members() == ["w"] and members.alive() == []
    assert run_until(members, 0.25, 6.0) == [(3.5, Freed("w", 1))]


def test_a_suspect_returns_with_a_heartbeat_or_a_registration_of_the_same_epoch() -> None:
    members = fresh()
    members.register("w", 1, 0.0)
    members.disconnected("w", 1, 0.1)
    assert members.heartbeat("w", 1, 0.5) == [Returned("w", 1)]
    assert members.heartbeat("w", 1, 0.6) == []
    members.disconnected("w", 1, 0.7)
    again = accepted(members.register("w", 1, 0.9))
    assert not again.fresh and members.state("w") is State.ALIVE
    assert run_until(members, 0.9, 2.0) == []


def test_once_freed_the_same_epoch_may_come_back_and_starts_anew() -> None:
    members = fresh()
    members.register("w", 1, 0.0)
    members.disconnected("w", 1, 0.0)
    run_until(members, 0.0, 4.0)
    assert members.heartbeat("w", 1, 4.1) == Unknown("w")
    assert accepted(members.register("w", 1, 4.2)).fresh


def test_only_a_newer_epoch_fences() -> None:
    members = fresh()
    members.register("w", 5, 0.0)
    assert members.register("w", 4, 0.1) == Fenced(5)
    assert members.heartbeat("w", 4, 0.1) == Fenced(5)
    assert members.leave("w", 4) == [] and members.disconnected("w", 4, 0.1) == []
    assert members.state("w") is State.ALIVE
    assert accepted(members.register("w", 6, 0.2)).fresh
    assert members.current("w", 6) and not members.current("w", 5)
    assert members.leave("w", 5) == [] and members.disconnected("w", 5, 0.3) == []
    assert members.heartbeat("w", 7, 0.3) == Unknown("w")  # it has to say so first
    assert members.epoch("w") == 6


def test_an_older_life_stays_fenced_after_the_newer_one_is_gone() -> None:
    members = fresh()
    members.register("w", 5, 0.0)
    members.leave("w", 5)
    assert members.register("w", 4, 1.0) == Fenced(5)
    assert members.heartbeat("w", 4, 1.0) == Fenced(5)
    assert accepted(members.register("w", 5, 1.0)).fresh


def test_the_end_of_an_old_connection_does_not_hurt_the_new_one() -> None:
    members = fresh()
    first = accepted(members.register("w", 1, 0.0))
    second = accepted(members.register("w", 1, 0.1))
    assert members.disconnected("w", 1, 0.2, first.session) == []
    assert members.state("w") is State.ALIVE
    assert members.disconnected("w", 1, 0.3, second.session) == [Suspected("w", 1)]


def test_a_coordinator_that_stalled_buries_nobody() -> None:
    members = fresh()
    members.register("alive", 1, 0.0)
    members.register("suspect", 1, 0.0)
    members.disconnected("suspect", 1, 0.1)
    assert members.tick(60.0) == [] and members.stalls == 1
    assert members.state("alive") is State.ALIVE and members.state("suspect") is State.SUSPECT
    found = run_until(members, 60.0, 64.0)
    assert found == [(61.75, Suspected("alive", 1)), (63.25, Freed("suspect", 1))]  # a whole lease after the stall


def test_ticks_in_time_are_no_stall() -> None:
    members = fresh()
    members.register("w", 1, 0.0)
    assert run_until(members, 0.0, 2.0, step=STALL) == [(2.0, Suspected("w", 1))]
    assert members.stalls == 0


def test_a_slow_start_for_who_comes_empty() -> None:
    members = fresh(slow_start_s=10.0)
    assert accepted(members.register("empty", 1, 0.0, empty=True)).slow_start
    assert not accepted(members.register("full", 1, 0.0)).slow_start
    assert members.slow_start("empty", 9.9) and not members.slow_start("empty", 10.0)
    assert not members.slow_start("full", 0.0) and not members.slow_start("nobody", 0.0)
    assert [members.warmth("empty", at) for at in (0.0, 5.0, 10.0, 99.0)] == [0.0, 0.5, 1.0, 1.0]
    assert members.warmth("full", 0.0) == members.warmth("nobody", 0.0) == 1.0
    assert accepted(members.register("empty", 1, 5.0)).slow_start  # a new connection changes nothing


def test_draining_is_a_state_of_the_living() -> None:
    members = fresh()
    members.register("w", 2, 0.0)
    members.drain("w", 1)
    members.drain("nobody", 1)
    assert members.state("w") is State.ALIVE
    members.drain("w", 2)
    assert members.state("w") is State.DRAINING and members.alive() == ["w"]
    members.disconnected("w", 2, 0.1)
    assert members.state("w") is State.SUSPECT


def test_bounds() -> None:
    members = fresh(workers_max=2, epochs_max=2)
    for name in ("a", "b"):
        members.register(name, 1, 0.0)
    with pytest.raises(Overloaded, match="workers_max"):
        members.register("c", 1, 0.0)
    accepted(members.register("a", 2, 0.0))  # a known one may come again
    for name in ("a", "b", "c", "d"):
        if members.epoch(name) == 0:
            members.register(name, 3, 0.0)
        members.leave(name, members.epoch(name))
        members.validate()
    assert members.epoch("a") == 0  # forgotten, the oldest first
    assert members.epoch("d") == 3


Step = st.tuples(
    st.sampled_from(["register", "heartbeat", "disconnected", "leave", "tick"]),
    st.sampled_from(["a", "b"]),
    st.integers(1, 3),
    st.floats(0.0, 2.0),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(Step, max_size=40))
def test_no_older_epoch_is_ever_current_again(steps: list[tuple[str, str, int, float]]) -> None:
    members, now = fresh(), 0.0
    highest = {"a": 0, "b": 0}
    for action, worker, epoch, after in steps:
        now += after
        match action:
            case "register":
                if isinstance(members.register(worker, epoch, now), Accepted):
                    assert epoch >= highest[worker]
                    highest[worker] = epoch
                else:
                    assert epoch < highest[worker]
            case "heartbeat":
                members.heartbeat(worker, epoch, now)
            case "disconnected":
                members.disconnected(worker, epoch, now)
            case "leave":
                members.leave(worker, epoch)
            case _:
                members.tick(now)
        members.validate()
        for name, epoch_max in highest.items():
            assert members.epoch(name) == epoch_max
            assert not any(members.current(name, older) for older in range(epoch_max))
