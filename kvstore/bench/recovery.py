"""`kvstore bench recovery`: how long it takes until what was killed is out of the way, back, and copied anew.

Parts: `up` (a fleet on Ray), `faults` (workers and coordinators killed and stopped under load), `repair` (a lost
worker's blocks copied by the others, beside a client that gets the same blocks over TCP), `ssd` (a restarted worker's
first hit), `coordinator` (one restarted with a million blocks to be told). But for `up` all servers are processes of
their own without Ray, which has no part in what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

from kvstore.bench.recovery_coordinator import measure_coordinator
from kvstore.bench.recovery_faults import measure_faults
from kvstore.bench.recovery_repair import measure_repair
from kvstore.bench.recovery_ssd import measure_ssd
from kvstore.bench.report import Report
from kvstore.errors import SetupError
from kvstore.machine.spawn import LocalProcess, LocalSpawner
from kvstore.machine.system import RealClock

PARTS = ("up", "faults", "repair", "ssd", "coordinator")
UP_S = 120.0


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench recovery`'s own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench recovery", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within 40 s")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    arguments = parser.parse_args(argv)
    report, quick = Report("recovery"), arguments.quick
    wrong = 0
    for part in arguments.only or PARTS:
        if part == "up":
            measure_up(report, 1 if quick else 3)
        elif part == "faults":
            wrong += asyncio.run(measure_faults(report, 1 if quick else 7, quick))
        elif part == "repair":
            wrong += asyncio.run(measure_repair(report, 1 if quick else 7, quick))
        elif part == "ssd":
            wrong += asyncio.run(measure_ssd(report, 1 if quick else 7))
        else:
            asyncio.run(measure_coordinator(report, 1 if quick else 5))
    report.result("wrong_blocks", [float(wrong)], "blocks")
    report.target("wrong_blocks", at_most=0)
    return report


def measure_up(report: Report, rounds: int) -> None:
    """From the call to its end: Ray, reconciler, coordinator, worker, Redis."""
    now = RealClock().monotonic
    seconds = []
    for _ in range(rounds):
        home = tempfile.mkdtemp(prefix="kvstore-bench-")
        try:
            begin = now()
            _command(home, "up", "--set", "store.host_bytes=256MiB", "--set", "store.ssd_bytes=1GiB")
            seconds.append(now() - begin)
            _command(home, "down")
        finally:
            shutil.rmtree(home, ignore_errors=True)
    report.result("up", seconds, "s")
    report.target("up", at_most=15)


def _command(home: str, *words: str) -> None:
    """One command of the line, its fleet's state in `home`. SetupError when it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVSTORE_")} | {"XDG_STATE_HOME": home}
    log = os.path.join(home, "log")
    argv = [sys.executable, "-m", "kvstore.cli.main", *words]
    child: LocalProcess = LocalSpawner().spawn(argv, env=environment, log=log)
    if not child.wait(UP_S) or child.returncode != 0:
        child.kill()
        with open(log, encoding="utf-8") as file:
            words_said = file.read().strip().splitlines()
        raise SetupError(f"kvstore {words[0]} failed: {words_said[-1] if words_said else 'without a word'}")
