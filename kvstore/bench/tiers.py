"""`kvstore bench tiers`: each tier beside a plain loop that moves the same bytes, and residency at a million blocks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from kvstore.bench.report import Report
from kvstore.bench.tiers_churn import QUEUE_QUICK, measure_churn
from kvstore.bench.tiers_memory import measure_host
from kvstore.bench.tiers_recovery import measure_index, measure_recovery
from kvstore.bench.tiers_redis import measure_redis
from kvstore.bench.tiers_residency import measure_residency
from kvstore.bench.tiers_ssd import measure_ssd

ROUNDS, ROUNDS_LONG = 7, 15
MIB = 1 << 20

Part = Callable[[Report, bool, str], None]
"""Mutates the report; (quick, folder)."""

PARTS: dict[str, Part] = {
    "residency": lambda report, quick, folder: measure_residency(report, ROUNDS, 100_000 if quick else 1_000_000),
    "host": lambda report, quick, folder: measure_host(report, ROUNDS if quick else ROUNDS_LONG),
    "ssd": lambda report, quick, folder: measure_ssd(report, ROUNDS, 64 if quick else 256, folder),
    "redis": lambda report, quick, folder: measure_redis(report, ROUNDS if quick else ROUNDS_LONG, 32),
    "recovery": lambda report, quick, folder: measure_recovery(report, ROUNDS, (256 if quick else 2048) * MIB, folder),
    "index": lambda report, quick, folder: measure_index(report, 3 if quick else ROUNDS, folder),
    "churn": lambda report, quick, folder: (
        measure_churn(report, 4.0, folder, QUEUE_QUICK) if quick else measure_churn(report, 600.0, folder)
    ),
}


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench tiers`' own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench tiers", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer bytes and rounds, within 40 s")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="one part; may be given again")
    parser.add_argument(
        "--folder", default="", help="where the SSD parts write; the folder for temporary files if none"
    )
    arguments = parser.parse_args(argv)
    report = Report("tiers")
    for name in arguments.only or PARTS:
        PARTS[name](report, arguments.quick, arguments.folder)
    return report
