"""`kvstore up` and `down` on a real Ray cluster: one fleet for the module, looked at from outside as a person does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.fleet.state import MARK, FleetState
from kvstore.machine.processes import carrying
from tests.fleet_helpers import json_of, kvstore, one_line, until

pytestmark = pytest.mark.ray

SMALL = ("store.host_bytes=24MiB", "store.ssd_bytes=32MiB", "store.ssd_segment_bytes=2MiB", "store.redis_bytes=32MiB")
FLAGS = [part for setting in SMALL for part in ("--set", setting)]


def home(folder: Path) -> Path:
    return folder / "state" / "tiered-kvstore" / "kvstore"


def state_of(folder: Path) -> FleetState:
    state = FleetState.load(home(folder))
    assert state is not None
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a fleet of two nodes with a worker each is up."""
    made = tmp_path_factory.mktemp("fleet")
    done = kvstore(made, "up", "--nodes", "2", *FLAGS, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting Ray" in done.stderr and "kvstore down" in done.stdout
    state = state_of(made)
    yield made
    if FleetState.load(home(made)) is not None:
        assert kvstore(made, "down", timeout_s=90).returncode == 0
    assert carrying(MARK, state.mark) == []


def status(folder: Path) -> dict[str, Any]:
    done = kvstore(folder, "status", "--json")
    report: dict[str, Any] = json_of(done)
    return report


def test_it_is_up_with_every_tier(folder: Path) -> None:
    # A coordinator says "filling" until everybody who lives had a lease's time to register.
    until(lambda: [c["state"] for c in status(folder)["coordinators"]] == ["complete"], "the coordinator is complete")
    report = status(folder)
    assert [(w["node"], w["state"], w["epoch"]) for w in sorted(report["workers"], key=lambda w: w["node"])] == [
        ("worker-0", "alive", 1),
        ("worker-1", "alive", 1),
    ]
    for worker in report["workers"]:
        assert {tier: row["state"] for tier, row in worker["tiers"].items()} == dict.fromkeys(
            ("hot", "host", "ssd", "redis"), "ok"
        )
    assert (home(folder) / "fleet.json").stat().st_mode & 0o077 == 0
    assert state_of(folder).ray_address.startswith("127.0.0.1:")


def test_a_second_up_changes_nothing(folder: Path) -> None:
    before = {process.pid for process in carrying(MARK, state_of(folder).mark)}
    done = kvstore(folder, "up", "--nodes", "2", *FLAGS, "--json")
    assert done.returncode == 0 and one_line(done.stderr) == "fleet kvstore is up already"
    assert {worker["node"] for worker in json_of(done)["workers"]} == {"worker-0", "worker-1"}
    assert {process.pid for process in carrying(MARK, state_of(folder).mark)} == before


def test_an_up_with_other_settings_is_refused_in_one_line(folder: Path) -> None:
    done = kvstore(folder, "up", *FLAGS)
    assert done.returncode == 2
    assert one_line(done.stderr) == ("kvstore up: fleet kvstore is up with another nodes: kvstore down, then up again")


def test_status_shows_the_reconciler(folder: Path) -> None:
    until(lambda: status(folder)["reconciler"]["state"] == "settled", "the reconciler has settled")
    shown = status(folder)["reconciler"]
    assert [(row["name"], row["up"]) for row in shown["actors"]] == [
        ("coordinator-0", True),
        ("worker-0", True),
        ("worker-1", True),
    ]
    assert "reconciler: settled" in kvstore(folder, "status").stdout


def test_the_doctor_passes(folder: Path) -> None:
    done = kvstore(folder, "doctor", "--json")
    assert done.returncode == 0, done.stdout


def test_a_killed_worker_comes_back_with_its_id_and_the_next_epoch(folder: Path) -> None:
    before = {worker["node"]: worker["id"] for worker in status(folder)["workers"]}
    victim = state_of(folder).workers[0]
    os.kill(victim.pid, signal.SIGKILL)

    def back() -> bool:
        return (victim.worker_id, 2, "alive") in [(w["id"], w["epoch"], w["state"]) for w in status(folder)["workers"]]

    until(back, "the worker is alive again")
    assert {worker["node"]: worker["id"] for worker in status(folder)["workers"]} == before
    done = kvstore(folder, "doctor", "--json")
    assert done.returncode == 0, done.stdout


def test_a_killed_coordinator_comes_back_on_its_address(folder: Path) -> None:
    (coordinator,) = status(folder)["coordinators"]
    os.kill(coordinator["pid"], signal.SIGKILL)

    def back() -> bool:
        done = kvstore(folder, "status", "--json")
        if done.returncode != 0:
            return False
        report = json.loads(done.stdout)
        (now,) = report["coordinators"]
        return now["pid"] != coordinator["pid"] and now["state"] == "complete" and len(report["workers"]) == 2

    until(back, "the coordinator is there again")


def test_down_ends_all_of_it(folder: Path) -> None:
    state = state_of(folder)
    assert len(carrying(MARK, state.mark)) > 5
    done = kvstore(folder, "down", "--json", timeout_s=90)
    assert (done.returncode, json_of(done)) == (0, {"name": "kvstore", "clean": True, "killed": 0})
    assert carrying(MARK, state.mark) == []
    assert not home(folder).exists() and not Path(state.ray_folder).exists()
    done = kvstore(folder, "down")
    assert done.returncode == 2 and "kvstore up" in one_line(done.stderr)
