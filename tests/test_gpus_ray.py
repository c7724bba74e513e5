"""A cache GPU of its own, and a worker that moves: one worker on two nodes with logical GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.fleet.state import FleetState, read_status
from tests.fleet_helpers import kvstore, until
from tests.ray_cluster import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def test_a_dedicated_gpu_is_taken_and_a_worker_moves_with_it(tmp_path: Path) -> None:
    flags = ("--workers", "1", "--set", "fleet.worker_gpus=1", "--set", "store.host_bytes=24MiB")
    with RayCluster([{}, {"kvstore_worker": 1, "GPU": 2}, {"kvstore_worker": 1, "GPU": 2}]) as cluster:
        done = kvstore(tmp_path, "up", "--address", cluster.address, *flags, timeout_s=120)
        assert done.returncode == 0, done.stdout + done.stderr
        state = FleetState.load(tmp_path / "state" / "tiered-kvstore" / "kvstore")
        assert state is not None

        def where() -> list[str]:
            rows = read_status(state).get("actors", ())
            return [row["node"] for row in rows if row["role"] == "worker" and row["up"]]  # type: ignore[attr-defined]

        (first,) = where()
        (other,) = {*cluster.nodes[1:]} - {first}
        assert not cluster.engine(2, first) and cluster.engine(1, first) and cluster.engine(2, other)
        cluster.remove(first)
        until(lambda: where() == [other], "the worker has moved")
        log = read_status(state)["log"]
        moved = any(f"worker-0 moves from {first[:8]} to {other[:8]}" in line for line in log)  # type: ignore[attr-defined]
        # A reconciler that was on that node itself does not know where the worker was before.
        assert moved or "restarted" in log[0], log  # type: ignore[index]
        assert any(f"up on {other[:8]}" in line and "starts empty" in line for line in log), log  # type: ignore[attr-defined]
        assert not cluster.engine(2, other)
        done = kvstore(tmp_path, "down", timeout_s=90)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "kvstore" not in cluster.actors()
        assert cluster.engine(2, other)
