"""The reconciler's decisions, without Ray: any nodes and actors are brought to what is wanted, and stay there."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.config import Config, override
from kvstore.fleet.maker import Maker
from kvstore.fleet.reconcile import COORDINATOR, WORKER, Backoff, Node, Placed, Plan, Want, plan

A, B, C = (Node(id, f"10.0.0.{number}", 1) for number, id in enumerate("abc", 1))


def carried_out(plan: Plan, actors: set[Placed]) -> set[Placed]:
    """What stands once the plan is done."""
    actors = actors - {actor for actor, _ in plan.ends}
    for wanted in plan.starts:
        detail = str(wanted.slot) if wanted.role == WORKER else f"{wanted.node.ip}:{7700 + wanted.index}"
        actors.add(Placed(wanted.role, wanted.index, wanted.node.id, detail))
    return actors


def settled(want: Want, nodes: list[Node], actors: set[Placed], held: frozenset[str] = frozenset()) -> set[Placed]:
    for _ in range(20):
        todo = plan(want, nodes, actors, held)
        if not todo.ends and not todo.starts:
            return actors
        actors = carried_out(todo, actors)
    raise AssertionError(f"never settles: {todo}")


def where(actors: set[Placed], role: str) -> dict[str, int]:
    return dict(Counter(actor.node for actor in actors if actor.role == role))


def test_a_name_says_everything() -> None:
    actor = Placed(WORKER, 3, "c0ffee", "1")
    assert (actor.title, actor.actor) == ("worker-3", "worker-3 c0ffee 1")
    assert Placed.of(actor.actor) == actor
    assert [Placed.of(name) for name in ("reconciler", "worker-1", "worker-1 a b c", "engine-1 a b")] == [None] * 4


def test_one_worker_a_node_and_coordinators_apart() -> None:
    actors = settled(Want(0, 2), [A, B, C], set())
    assert where(actors, WORKER) == {"a": 1, "b": 1, "c": 1}
    assert where(actors, COORDINATOR) == {"a": 1, "b": 1}
    assert sorted(actor.title for actor in actors if actor.role == WORKER) == ["worker-0", "worker-1", "worker-2"]


def test_a_node_that_dies_takes_its_own_along_and_one_that_joins_gets_its_own() -> None:
    actors = settled(Want(0, 2), [A, B, C], set())
    todo = plan(Want(0, 2), [B, C], actors, ())
    assert [(actor.title, why) for actor, why in todo.ends] == [
        ("coordinator-0", "its node is gone"),
        ("worker-0", "its node is gone"),
    ]
    fewer = settled(Want(0, 2), [B, C], actors)
    assert where(fewer, WORKER) == {"b": 1, "c": 1} and where(fewer, COORDINATOR) == {"b": 1, "c": 1}
    back = settled(Want(0, 2), [A, B, C], fewer)
    assert where(back, WORKER) == {"a": 1, "b": 1, "c": 1}
    assert fewer < back  # nobody else was touched


def test_a_wanted_number_of_workers_moves_to_who_has_room() -> None:
    two = [Node(node.id, node.ip, 2) for node in (A, B, C)]
    actors = settled(Want(4, 1), two, set())
    assert sorted(where(actors, WORKER).values()) == [1, 1, 2]
    fewer = settled(Want(4, 1), two[1:], actors)
    assert where(fewer, WORKER) == {"b": 2, "c": 2}
    todo = plan(Want(4, 1), two[1:2], fewer, ())
    assert todo.unplaced == 2


def test_a_worker_finds_the_folder_of_its_machine_again() -> None:
    actors = settled(Want(0, 1), [A, B, C], set())
    assert {actor.detail for actor in actors if actor.role == WORKER} == {"0"}
    returned = [Node("a2", A.ip, 1), B, C]  # the same machine, a new life of its raylet
    assert Placed(WORKER, 0, "a2", "0") in settled(Want(0, 1), returned, actors)
    shared = [Node(id, "127.0.0.1", 1) for id in "xyz"]  # several nodes on one machine: a folder each
    assert sorted(actor.detail for actor in settled(Want(0, 1), shared, set()) if actor.role == WORKER) == [*"012"]


def test_coordinators_share_a_node_only_while_they_must() -> None:
    alone = settled(Want(0, 2), [A], set())
    assert where(alone, COORDINATOR) == {"a": 2}
    todo = plan(Want(0, 2), [A, B], alone, ())
    assert [actor.title for actor, _ in todo.ends] == ["coordinator-1"]  # one at a time
    assert where(settled(Want(0, 2), [A, B], alone), COORDINATOR) == {"a": 1, "b": 1}


def test_a_drained_node_gets_no_worker_until_it_is_released() -> None:
    actors = {actor for actor in settled(Want(0, 1), [A, B], set()) if actor.node != "b"}
    assert where(settled(Want(0, 1), [A, B], actors, frozenset("b")), WORKER) == {"a": 1}
    assert where(settled(Want(0, 1), [A, B], actors), WORKER) == {"a": 1, "b": 1}


@given(
    want=st.builds(Want, st.integers(0, 6), st.integers(1, 4)),
    before=st.lists(st.integers(0, 7), unique=True),
    after=st.lists(st.integers(0, 7), unique=True, min_size=1),
    held=st.frozensets(st.sampled_from(["n0", "n1", "n2"])),
)
def test_it_settles_from_anywhere(want: Want, before: list[int], after: list[int], held: frozenset[str]) -> None:
    def nodes(numbers: list[int]) -> list[Node]:
        return [Node(f"n{number}", f"10.0.0.{number // 2}", 1 + number % 3) for number in numbers]

    actors = settled(want, nodes(before), set())
    kept = {actor for actor in actors if actor.node in {f"n{number}" for number in after}}
    actors = settled(want, nodes(after), actors, held)
    workers = [actor for actor in actors if actor.role == WORKER]
    assert {actor for actor in kept if actor.role == WORKER} <= actors  # whoever has blocks stays where it is
    slots = {node.id: node.slots for node in nodes(after)}
    machine = {node.id: node.ip for node in nodes(after)}
    assert all(count <= slots[node] for node, count in where(actors, WORKER).items())
    assert len({actor.title for actor in actors}) == len(actors)
    assert len({(machine[actor.node], actor.detail) for actor in workers}) == len(workers)
    spread = where(actors, COORDINATOR)
    assert sum(spread.values()) >= want.coordinators
    if want.workers == 0:
        assert all(where(actors, WORKER).get(node, 0) == slots[node] for node in slots if node not in held)


def test_crash_loops_are_slowed_down_and_forgiven() -> None:
    backoff = Backoff(first_s=0.5, max_s=4.0, stable_s=60.0)
    delays = []
    now = 0.0
    for _ in range(7):
        backoff.started("worker-0", now)
        now += 1.0
        delays.append(backoff.failed("worker-0", now))
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert backoff.waits("worker-0", now + 3.9) and not backoff.waits("worker-0", now + 4.0)
    assert not backoff.waits("worker-1", now)
    backoff.started("worker-0", now)
    assert backoff.failed("worker-0", now + 60.0) == 0.0
    backoff.failed("worker-0", now)
    backoff.ended("worker-0")
    assert not backoff.waits("worker-0", now) and backoff.failed("worker-0", now) == pytest.approx(0.0)


def metrics_of(bind: str, starts: Plan) -> list[str]:
    maker = Maker(override(Config(), {"server": {"metrics_bind": bind}}), "", True, "/nowhere")
    placed = [
        Placed(one.role, one.index, one.node.id, str(one.slot) if one.role == WORKER else "127.0.0.1:1")
        for one in starts.starts
    ]
    pairs = zip(starts.starts, placed, strict=True)
    return [maker.config_of(one, actor, ["127.0.0.1:1"]).server.metrics_bind for one, actor in pairs]


def test_actors_of_one_machine_serve_their_metrics_on_ports_of_their_own() -> None:
    starts = plan(Want(workers=0, coordinators=2), [Node("a", "10.0.0.1", 3), Node("b", "10.0.0.1", 1)], (), ())
    found = metrics_of("0.0.0.0:9100", starts)
    assert sorted(found) == sorted(f"0.0.0.0:{port}" for port in (9100, 9101, 9102, 9103, 9200, 9201))
    assert set(metrics_of("0.0.0.0:0", starts)) == {"0.0.0.0:0"} and set(metrics_of("", starts)) == {""}
