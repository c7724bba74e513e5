"""Faults on the real thing: four workers on three Ray nodes, two copies of everything, two coordinators, under load.

Each fault: no wrong byte, no call past its deadline, no exception, hits go on; afterwards every block has two copies
again, nothing is pinned or staged, and both directories say exactly what the workers hold.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from kvstore.keys import chain
from kvstore.operations.payload import Payload, replay_spec, tokens_of
from tests.fault_fleet import NAME, REQUESTS_MIN, FaultFleet
from tests.fault_load import BLOCK_BYTES
from tests.fleet_helpers import kvstore, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

FLOOD = replay_spec(2 * BLOCK_BYTES)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFleet]:
    with FaultFleet(tmp_path_factory.mktemp("faults")) as made:
        yield made
        print("\n| fault | requests under way | requests meanwhile | hits meanwhile | as before after |")
        print("\n".join(seen.row() for seen in made.seen))


def test_a_worker_is_killed(fleet: FaultFleet) -> None:
    victim = fleet.rows("worker")[0]
    fleet.run(fleet.fault("worker killed", lambda: fleet.kill(victim["pid"])))
    after = next(row for row in fleet.rows("worker") if row["name"] == victim["name"])
    assert after["id"] == victim["id"] and after["pid"] != victim["pid"]  # its folder, hence its id


def test_a_coordinator_is_killed(fleet: FaultFleet) -> None:
    victim = fleet.rows("coordinator")[0]
    fleet.run(fleet.fault("coordinator killed", lambda: fleet.kill(victim["pid"])))
    assert victim["address"] in fleet.state.coordinators


def test_the_reconciler_is_killed_and_a_worker_with_it(fleet: FaultFleet) -> None:
    status, victim = fleet.status, fleet.rows("worker")[1]

    def strike() -> None:
        fleet.kill(status["pid"])
        fleet.kill(victim["pid"])

    fleet.run(fleet.fault("reconciler and worker killed", strike))
    after = fleet.status
    assert after["restarted"] and after["pid"] != status["pid"]
    assert "restarted: goes on with what Ray names" in after["log"][0]
    assert {row["name"] for row in after["actors"]} == {row["name"] for row in status["actors"]}


def test_redis_is_killed(fleet: FaultFleet) -> None:
    pid = fleet.redis()
    fleet.run(fleet.fault("Redis killed", lambda: fleet.kill(pid)))
    assert fleet.redis() != pid


def test_a_worker_is_asked_to_end(fleet: FaultFleet) -> None:
    """It drains first, and is read meanwhile; then Ray starts it again."""
    victim = fleet.rows("worker")[2]
    fleet.run(fleet.fault("worker ended by SIGTERM", lambda: fleet.kill(victim["pid"], signal.SIGTERM), seconds=3.0))
    after = next(row for row in fleet.rows("worker") if row["name"] == victim["name"])
    assert after["id"] == victim["id"] and after["pid"] != victim["pid"]


STANDING = [pytest.param(3.0, id="3s"), pytest.param(10.0, id="10s", marks=pytest.mark.slow)]


@pytest.mark.parametrize("seconds", STANDING)
@pytest.mark.parametrize("role", ["worker", "coordinator"])
def test_a_process_stands_still_and_goes_on(fleet: FaultFleet, role: str, seconds: float) -> None:
    pid = fleet.rows(role)[-1]["pid"]
    fleet.run(
        fleet.fault(
            f"{role} stopped for {seconds:g} s",
            lambda: fleet.kill(pid, signal.SIGSTOP),
            lambda: fleet.kill(pid, signal.SIGCONT),
            seconds=seconds,
        )
    )
    assert pid in {row["pid"] for row in fleet.rows(role)}  # nobody buried it for good


def test_a_disk_is_full(fleet: FaultFleet) -> None:
    pids = [row["pid"] for row in fleet.rows("worker")]
    payload = Payload(2 * BLOCK_BYTES)
    flood = [chain(FLOOD, tokens_of(tuple(range(first, first + 20)))) for first in range(0, 2000, 100)]
    fleet.run(
        fleet.fault(
            "disk full",
            lambda: fleet.disk.fill(pids),
            lambda: fleet.disk.free(pids),
            beside=lambda: fleet.flood(FLOOD, flood, payload.make),
            clear=lambda: fleet.purge(FLOOD),
        )
    )


def test_a_node_dies_and_another_joins(fleet: FaultFleet) -> None:
    node = next(node for node in reversed(fleet.cluster.nodes) if fleet.slots[node] == 1)
    slots = fleet.slots.pop(node)
    before = {row["name"]: row["id"] for row in fleet.rows("worker") if row["node"] != node}
    fleet.run(fleet.fault("node killed", lambda: fleet.cluster.remove(node), seconds=4.0))
    assert {row["name"]: row["id"] for row in fleet.rows("worker")} == before  # everybody else stayed
    assert len({row["node"] for row in fleet.rows("coordinator")}) == 2

    def join() -> None:
        fleet.slots[fleet.cluster.add({"kvstore_worker": slots, "GPU": 2})] = slots

    fleet.run(fleet.fault("node added", join, seconds=4.0))
    assert len(fleet.rows("worker")) == 4


def test_a_drained_worker_leaves_no_empty_actor(fleet: FaultFleet) -> None:
    victim = next(row for row in fleet.rows("worker") if fleet.slots[row["node"]] == 1)
    done = kvstore(fleet.folder, "drain", victim["name"], "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: fleet.status.get("held") == [victim["node"]], "the reconciler has seen it off")
    assert victim["name"] not in [row["name"] for row in fleet.rows("worker")]
    assert not any(name.startswith(f"{victim['name']} ") for name in fleet.cluster.actors()[NAME])
    fleet.up()
    fleet.run(fleet.settle())
    assert victim["name"] in [row["name"] for row in fleet.rows("worker")]


def test_an_engine_that_wants_all_gpus_of_a_node_gets_them(fleet: FaultFleet) -> None:
    assert all(fleet.cluster.engine(2, node) for node in fleet.slots)
    assert not fleet.cluster.engine(3)


def test_every_fault_landed_under_load(fleet: FaultFleet) -> None:
    assert len(fleet.seen) in (10, 12)  # without and with those of the long proofs
    for seen in fleet.seen:
        assert seen.flying >= 1 and seen.requests >= REQUESTS_MIN, seen
