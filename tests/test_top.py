"""`kvstore top`: rates between two looks, and a screen that fits."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.histogram import BOUNDS_S
from kvstore.operations.observe import View
from kvstore.operations.top import screen, top_object
from kvstore.wire import common_pb2, coordinator_pb2
from tests.service_cluster import MiniCluster, blocks_of, found
from tests.service_helpers import FULL, prompt


def counted(slow: int, fast: int) -> list[int]:
    """So many gets of 3 ms and of 0.05 ms."""
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[0], counts[BOUNDS_S.index(0.005)] = fast, slow
    return counts


def view(hits: int, misses: int, gets: list[int], *, epoch: int = 1, tokens: float = 0.0) -> View:
    worker = common_pb2.WorkerStatus(
        member=common_pb2.Member(id="w1", epoch=epoch, node="n", state="alive"),
        tiers=[common_pb2.TierStatus(tier=common_pb2.TIER_SSD, state="ok", used=50, capacity=200, hits=hits, errors=2)],
        counters={"misses": misses, "corrupt": 1, "pull_errors_Unavailable": 4, "loads": hits},
        lag=7,
        saved_tokens=tokens,
    )
    worker.latencies.add(what="get", bounds_s=BOUNDS_S, counts=gets)
    status = coordinator_pb2.CoordinatorStatus(workers=[worker], directory_blocks=9, complete=True)
    return View(statuses={"c:1": status}, errors={})


def test_rates_are_those_between_two_looks() -> None:
    before, now = view(10, 5, counted(90, 0)), view(30, 6, counted(90, 100), tokens=640.0)
    shown = top_object(now, before, 2.0, ["c:1", "gone:1"])
    (worker,) = shown["workers"]
    assert worker["tiers"]["ssd"] == {"state": "ok", "used": 50, "capacity": 200, "hits_s": 10.0}
    assert (worker["misses_s"], worker["loads_s"], worker["saved_tokens_s"]) == (0.5, 10.0, 320.0)
    assert worker["errors"] == 7 and worker["lag"] == 7
    assert worker["p99_ms"] <= 0.1, "of the gets since the look before: all of them fast"
    first = top_object(before, None, 0.0, ["c:1"])["workers"][0]
    assert first["misses_s"] is None and first["p50_ms"] > 2.5
    assert [c["state"] for c in shown["coordinators"]] == ["complete", "unreachable"]


def test_a_process_that_started_anew_has_no_rates() -> None:
    shown = top_object(view(1, 0, counted(0, 1), epoch=2), view(30, 6, counted(90, 100)), 2.0, ["c:1"])
    assert shown["workers"][0]["tiers"]["ssd"]["hits_s"] is None and shown["workers"][0]["misses_s"] is None


def test_the_screen_fits_its_terminal() -> None:
    shown = top_object(view(30, 6, counted(1, 1)), view(10, 5, counted(0, 0)), 2.0, ["c:1"])
    whole = screen(shown, 300, 100)
    assert "ssd:10.0" in whole and "ssd:25%" in whole and "saved tok/s" in whole
    small = screen(shown, 40, 4)
    assert len(small.splitlines()) == 4 and max(map(len, small.splitlines())) <= 40 and "more lines" in small


async def test_it_shows_a_running_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with MiniCluster(tmp_path) as cluster:
        coordinator = await cluster.coordinator()
        worker = await cluster.worker("a")
        client = await cluster.client()
        prefix = prompt(1, 8)
        await client.put(FULL, prefix, blocks_of(prefix))
        await client.get(await found(client, prefix, 8))
        argv = ["top", "--coordinators", coordinator.address, "--once", "--interval", "0.3"]
        assert await asyncio.to_thread(main, [*argv, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["workers"][0]["id"] == worker.identity.worker and shown["seconds"] >= 0.3
        assert shown["workers"][0]["misses_s"] == 0.0 and shown["coordinators"][0]["blocks"] == 8
        assert await asyncio.to_thread(main, argv) == 0
        assert worker.identity.worker in capsys.readouterr().out


def test_errors_are_one_line_and_ctrl_c_ends_it_cleanly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--coordinators", "127.0.0.1:1", "--once"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["top", "--coordinators", "127.0.0.1:1", "--interval", "0"]) == 2
    done = subprocess.run(
        [sys.executable, "-c", "import asyncio, kvstore.cli.top as t; from kvstore.cli.main import main\n"
         "async def stop(*a): raise KeyboardInterrupt\nt.look = stop\n"
         "raise SystemExit(main(['top', '--coordinators', '127.0.0.1:1']))"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr.strip() == "kvstore top: interrupted"
