"""The command line as a person meets it: help, one-line errors, exit statuses, servers that start and stop cleanly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from kvstore.cli.main import main, parser
from tests.fleet_helpers import Running, json_of, kvstore, one_line

LISTED = (
    "up",
    "down",
    "status",
    "top",
    "doctor",
    "demo",
    "worker",
    "coordinator",
    "replay",
    "purge",
    "inspect",
    "bench",
)
LISTED += ("drain",)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(argv)
    except SystemExit as error:
        status = int(str(error.code or 0))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- help and usage ----------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_the_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in LISTED:
        assert f"\n    {name}" in out
    assert "kvstore up" in out and "Exit status" in out
    assert "supervisor" not in out


@pytest.mark.parametrize("name", LISTED)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = run(capsys, name, "--help")
    assert status == 0 and f"kvstore {name}" in out


@pytest.mark.parametrize("name", [n for n in LISTED if n != "demo"])
def test_help_gives_examples(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert f"examples:\n  kvstore {name}" in run(capsys, name, "--help")[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "COMMAND"),
        (("bogus",), "invalid choice: 'bogus'"),
        (("status", "--jsn"), "unrecognized arguments: --jsn"),
        (("worker", "--set", "store.hostbytes=1"), "did you mean store.host_bytes"),
        (("worker", "--set", "nonsense"), "--set SECTION.KEY=VALUE"),
        (("worker", "--host-bytes", "much"), "store.host_bytes: 'much' is not a size"),
        (("coordinator", "--bind", "nowhere"), "HOST:PORT"),
        (("coordinator", "--bind", "0.0.0.0:0"), "--token-file"),
        (("coordinator", "--config", "absent.toml"), "cannot read the configuration absent.toml"),
        (("purge", "--root", "xyz"), "32 hexadecimal digits"),
        (("purge", "--revision", "v1"), "give --root, or --model"),
        (("drain",), "WORKER"),
        (("drain", "w", "--timeout", "-1"), "give seconds"),
        (("drain", "w", "--coordinators", "127.0.0.1:1"), "no coordinator answers at 127.0.0.1:1"),
        (("inspect", "absent"), "absent is no folder"),
        (("status", "--coordinators", "127.0.0.1:1"), "no coordinator answers at 127.0.0.1:1"),
        (("purge", "--coordinators", "127.0.0.1:1"), "no coordinator answers at 127.0.0.1:1"),
    ],
)
def test_errors_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], says: str) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == ""
    assert says in one_line(err)


@pytest.mark.parametrize("name", ["status", "doctor", "down", "purge"])
def test_without_a_fleet_commands_say_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    status, _, err = run(capsys, name)
    assert status == 2 and "kvstore up" in one_line(err)


def test_unknown_variables_stop_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_STORE_HOSTBYTES", "1")
    status, _, err = run(capsys, "status")
    assert status == 2 and "KVSTORE_STORE_HOST_BYTES" in one_line(err)


def test_the_parser_builds_alone() -> None:
    assert parser().parse_args(["status", "--json"]).json is True


# --- servers in the foreground -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_coordinator_starts_and_stops_cleanly(folder: Path, number: int) -> None:
    with Running(folder, "coordinator") as coordinator:
        assert set(coordinator.ready) == {"role", "id", "address", "pid"}
        assert coordinator.ready["pid"] == coordinator.process.pid
        report = json_of(kvstore(folder, "status", "--json", "--coordinators", coordinator.ready["address"]))
        (row,) = report["coordinators"]
        assert report["workers"] == []
        assert (row["address"], row["id"]) == (coordinator.ready["address"], coordinator.ready["id"])
        assert (row["pid"], row["blocks"]) == (coordinator.process.pid, 0)
        assert coordinator.end(number) == (0, "")


def test_a_port_in_use_is_one_line(folder: Path) -> None:
    with Running(folder, "coordinator") as coordinator:
        port = coordinator.ready["address"].rpartition(":")[2]
        done = kvstore(folder, "coordinator", "--bind", coordinator.ready["address"])
        assert done.returncode == 2 and f"port {port} is in use" in one_line(done.stderr)
        done = kvstore(folder, "worker", "--bind", coordinator.ready["address"], "--host-bytes", "8MiB")
        assert done.returncode == 2 and f"port {port} is in use" in one_line(done.stderr)


def test_a_worker_starts_announces_and_stops_cleanly(folder: Path, tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    with Running(folder, "coordinator") as coordinator:
        where = ("--coordinators", coordinator.ready["address"])
        flags = (*where, "--host-bytes", "8MiB", "--node", "here", "--ready-file", str(ready_file))
        with Running(folder, "worker", *flags) as worker:
            assert set(worker.ready) == {"role", "id", "address", "socket", "pid"}
            assert json.loads(ready_file.read_text()) == worker.ready
            assert os.path.exists(worker.ready["socket"])
            report = json_of(kvstore(folder, "status", "--json", *where))
            (row,) = report["workers"]
            unknown = kvstore(folder, "drain", "nobody", *where)
            assert unknown.returncode == 2 and worker.ready["id"] in one_line(unknown.stderr)
            assert set(row) == {"id", "epoch", "node", "state", "tiers"}
            assert (row["id"], row["node"], row["state"]) == (worker.ready["id"], "here", "alive")
            assert {"hot", "host"} <= set(row["tiers"])
            assert all(
                set(t) == {"used", "capacity", "blocks", "ratio", "state", "detail", "codecs"}
                for t in row["tiers"].values()
            )
            table = kvstore(folder, "status", *where)
            assert table.returncode == 0 and worker.ready["id"] in table.stdout
            assert worker.end() == (0, "")
        assert not os.path.exists(worker.ready["socket"])


def test_a_worker_that_cannot_start_says_why_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    small = ("--host-bytes", "8MiB", "--ssd-bytes", "16MiB", "--set", "store.ssd_segment_bytes=1MiB")
    done = kvstore(folder, "worker", *small, "--ssd-folder", str(tmp_path / "file" / "ssd"))
    assert done.returncode == 2 and str(tmp_path / "file") in one_line(done.stderr)
    ssd = str(tmp_path / "ssd")
    with Running(folder, "worker", *small, "--ssd-folder", ssd) as worker:
        done = kvstore(folder, "worker", *small, "--ssd-folder", ssd)
        assert done.returncode == 2 and ssd in one_line(done.stderr)
        assert worker.end() == (0, "")
    with Running(folder, "worker", *small, "--ssd-folder", ssd) as again:  # the folder is free again, its id kept
        assert again.ready["id"] == worker.ready["id"]
        assert again.end(signal.SIGINT) == (0, "")
