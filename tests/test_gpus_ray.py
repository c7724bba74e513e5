"""A cache GPU of its own, a worker that moves, and what `down` and the token leave: two nodes with logical GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.fleet.state import FleetState, read_status
from tests.fleet_helpers import kvstore, until
from tests.ray_cluster import RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


TOKEN = "no-other-process-ever-sees-this-one"


def serving(state: FleetState) -> list[int]:
    """Processes of the actors that are up."""
    return [row["pid"] for row in read_status(state).get("actors", ()) if row["up"]]  # type: ignore[attr-defined]


def showing(text: str, *folders: Path) -> list[Path]:
    """Files in which it stands."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted({path for path in files if text.encode() in path.read_bytes()})


def test_a_dedicated_gpu_is_taken_and_a_worker_moves_with_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    flags = [
        *("--workers", "1", "--set", "fleet.worker_gpus=1", "--set", "store.host_bytes=24MiB"),
        *("--set", f"server.token_file={token}"),
    ]
    with RayCluster([{}, {"kvstore_worker": 1, "GPU": 2}, {"kvstore_worker": 1, "GPU": 2}]) as cluster:
        done = kvstore(tmp_path, "up", "--address", cluster.address, *flags, timeout_s=120)
        assert done.returncode == 0, done.stdout + done.stderr
        cluster.bystand("of-somebody-else")
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
        until(lambda: len(serving(state)) == 2, "worker and coordinator are up")
        for pid in serving(state):
            shown = Path(f"/proc/{pid}")
            assert TOKEN.encode() not in (shown / "cmdline").read_bytes() + (shown / "environ").read_bytes()
        done = kvstore(tmp_path, "down", timeout_s=90)
        assert done.returncode == 0, done.stdout + done.stderr
        assert cluster.actors() == {"engines": ["of-somebody-else"]}
        assert showing("starts empty", tmp_path, Path(cluster.folder)), "these are not the logs"
        assert showing(TOKEN, tmp_path, Path(cluster.folder)) == [token]
        assert cluster.engine(2, other)
