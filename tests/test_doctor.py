"""`kvstore doctor` on a real service of child processes: passes when all is well, and names each fault with its fix."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli.doctor import examine
from kvstore.cli.main import main
from kvstore.config import Config, load_config, override
from kvstore.fleet.local_cluster import LocalCluster
from tests.fleet_helpers import check_names

SMALL = {
    "store": {"host_bytes": "16MiB", "ssd_bytes": "64MiB", "ssd_segment_bytes": "1MiB", "redis_bytes": "16MiB"},
    "coordinator": {"heartbeat_s": 0.2, "lease_s": 1.0},
}
TRIES = 400  # examinations; each takes a while itself


def asked(cluster: LocalCluster) -> Config:
    assert cluster.coordinator is not None
    url = cluster.redis.url if cluster.redis else ""
    sections = {"client": {"coordinators": [cluster.coordinator.address]}, "store": {"redis_url": url}}
    return override(load_config(env={}), sections)


async def until_well(cluster: LocalCluster) -> None:
    """Until the workers have announced themselves."""
    for _ in range(TRIES):
        report = await examine(asked(cluster), 2)
        if report["ok"]:
            return
    pytest.fail(json.dumps(report, indent=1))


async def until_fault(cluster: LocalCluster, *names: str) -> dict[str, Any]:
    """The first report that finds all of these wrong."""
    for _ in range(TRIES):
        report = await examine(asked(cluster), 2)
        faults = check_names(report, ok=False)
        if all(any(name in fault for fault in faults) for name in names):
            return report
    pytest.fail(json.dumps(report, indent=1))


def faults(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report["checks"] if not check["ok"]}


async def test_all_well_then_one_fault_after_the_other() -> None:
    """A service loses its Redis policy, its Redis, a worker and its coordinator: each is named, and only it."""
    async with LocalCluster(load_config(env={}, overrides=SMALL), workers=2) as cluster:
        await until_well(cluster)
        well(await examine(asked(cluster), 2))
        set_policy(cluster, "allkeys-lru")
        found = faults(await until_fault(cluster, "redis"))
        assert "allkeys-lru" in found["redis"]["detail"] and "noeviction" in found["redis"]["fix"]
        set_policy(cluster, "noeviction")
        await until_well(cluster)

        assert cluster.redis is not None and cluster.redis.pid is not None
        os.kill(cluster.redis.pid, 9)
        found = faults(await until_fault(cluster, "redis of ", "redis"))
        assert found["redis"]["fix"] and "does not answer" in found["redis"]["detail"]
        assert all("redis" in name for name in found), found  # the rest goes on

        cluster.workers[0].process.kill()
        found = faults(await until_fault(cluster, "workers"))
        assert "1 of 2 workers are alive" in found["workers"]["detail"]
        assert "start it again" in found["workers"]["fix"]
        assert not any(name.startswith("client beside") for name in found)

        assert cluster.coordinator is not None
        cluster.coordinator.process.kill()
        found = faults(await until_fault(cluster, "coordinator"))
        (name,) = [name for name in found if name.startswith("coordinator")]
        assert cluster.coordinator.address in name and found[name]["fix"]


def well(report: dict[str, Any]) -> None:
    assert set(report) == {"ok", "checks"} and report["ok"] is True
    assert all(set(check) == {"name", "ok", "detail", "fix"} for check in report["checks"])
    names = check_names(report, ok=True)
    assert {"configuration", "workers", "namespaces", "redis"} <= set(names)
    for tier in ("hot", "host", "ssd", "redis"):
        assert sum(name.startswith(f"{tier} of ") for name in names) == 2
    assert sum(name.startswith("client beside") for name in names) == 2
    assert all(check["fix"] == "" for check in report["checks"])


def set_policy(cluster: LocalCluster, policy: str) -> None:
    import redis

    assert cluster.redis is not None
    client = redis.Redis.from_url(cluster.redis.url)
    client.config_set("maxmemory-policy", policy)
    client.close()


def small_disk(folder: Path, mebibytes: int) -> bool:
    """Mount a small file system there, where this process may."""
    mount = shutil.which("mount")
    if mount is None:
        return False
    argv = [mount, "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def fill(path: Path) -> None:
    """Write until the file system is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


async def test_a_full_ssd_folder_is_named(tmp_path: Path) -> None:
    """A file system that somebody else filled. Without the right to mount one this cannot be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not small_disk(disk, 24):
        pytest.skip("needs the right to mount a file system")
    try:
        config = load_config(env={}, overrides=SMALL)
        async with LocalCluster(config, workers=1, redis=False, ssd_folder=str(disk)) as cluster:
            for _ in range(TRIES):
                report = await examine(asked(cluster), 1)
                if report["ok"]:
                    break
            else:
                pytest.fail(json.dumps(report, indent=1))
            fill(disk / "somebody-elses")
            found = faults(await until_fault(cluster, "ssd of "))
            (name,) = [name for name in found if name.startswith("ssd of ")]
            assert "space" in found[name]["detail"] + found[name]["fix"], found
            assert not any(name.startswith(("hot", "host", "client")) for name in found)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True, capture_output=True)


def test_nobody_there_is_a_report_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--coordinators", "127.0.0.1:1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert "coordinator 127.0.0.1:1" in check_names(report, ok=False)
    assert main(["doctor", "--coordinators", "127.0.0.1:1"]) == 1
    assert "FAULT" in capsys.readouterr().out
