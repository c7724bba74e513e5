"""Processes by number and start time, by descent, by mark; the state file of a fleet."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.config import ClientConfig, FleetConfig
from kvstore.errors import SetupError
from kvstore.fleet.state import FleetState, FleetWorker, fleet_folder
from kvstore.machine.processes import ProcessId, carrying, descendants, process_id

CHILD = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()']); print(p.pid, flush=True); input()"
)


def test_a_process_is_its_number_and_its_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = process_id(child.pid)
        assert found is not None and found.alive()
        other = dataclasses.replace(found, started=found.started + 1)  # the number was handed on
        assert not other.alive() and other.signal(signal.SIGKILL) is False
        assert child.poll() is None
        assert found.signal(signal.SIGTERM) is True
    finally:
        child.kill()
        child.communicate(timeout=30)
    assert not found.alive() and found.signal(signal.SIGTERM) is False
    assert process_id(child.pid) is None


def test_descendants_and_marks_reach_grandchildren() -> None:
    mark = f"test-{os.getpid()}"
    environment = os.environ | {"KVSTORE_TEST_MARK": mark}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        pids = [p.pid for p in descendants(os.getpid())]
        assert pids.index(child.pid) < pids.index(grandchild)
        assert [p.pid for p in carrying("KVSTORE_TEST_MARK", mark)] == sorted([child.pid, grandchild])
        assert carrying("KVSTORE_TEST_MARK", mark + "x") == []
    finally:
        for process in carrying("KVSTORE_TEST_MARK", mark):
            process.signal(signal.SIGKILL)
        child.communicate(timeout=30)


def state(folder: Path) -> FleetState:
    worker = FleetWorker("worker-0", "worker-0", "127.0.0.1:5", "abc", 17, "/ssd/worker-0")
    return FleetState(
        name="kvstore",
        mark="m",
        supervisor=ProcessId(1, 2),
        ray_address="127.0.0.1:3",
        own_cluster=True,
        coordinators=("127.0.0.1:4",),
        coordinator_actors=("coordinator-0",),
        workers=(worker,),
        redis_url="unix:///r",
        embedded_redis=True,
        token_file="/t",
        folder=str(folder),
        ray_folder="/tmp/kv",
    )


def test_the_state_file_comes_back_equal(tmp_path: Path) -> None:
    assert FleetState.load(tmp_path) is None
    saved = state(tmp_path)
    saved.save()
    assert FleetState.load(tmp_path) == saved
    assert (tmp_path / "fleet.json").stat().st_mode & 0o077 == 0  # it may hold the password of a Redis
    client = saved.client(ClientConfig(namespace="n"))
    assert (client.coordinators, client.token_file, client.namespace) == (("127.0.0.1:4",), "/t", "n")
    assert saved.client(ClientConfig(token_file="/own")).token_file == "/own"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "supervisor": 3}'])
def test_a_damaged_state_file_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "fleet.json").write_text(content)
    with pytest.raises(SetupError, match=r"fleet\.json is not readable") as caught:
        FleetState.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_where_state_is_kept() -> None:
    fleet = FleetConfig()
    assert fleet_folder(fleet, {"XDG_STATE_HOME": "/x"}) == Path("/x/tiered-kvstore/kvstore")
    assert fleet_folder(fleet, {"HOME": "/h"}) == Path("/h/.local/state/tiered-kvstore/kvstore")
    assert fleet_folder(fleet, {"HOME": "/h", "XDG_STATE_HOME": "relative"}) == Path(
        "/h/.local/state/tiered-kvstore/kvstore"
    )
    assert fleet_folder(FleetConfig(name="a", state_folder="/s"), {}) == Path("/s/a")
