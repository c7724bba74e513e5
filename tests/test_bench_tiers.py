"""`kvstore bench tiers`: every part runs and verifies what it delivers. Figures are not judged."""

from __future__ import annotations

from pathlib import Path

from kvstore.bench.report import Report
from kvstore.bench.tiers_churn import QUEUE_QUICK, measure_churn
from kvstore.bench.tiers_recovery import measure_recovery
from kvstore.bench.tiers_redis import measure_redis
from kvstore.bench.tiers_residency import Resident, measure_residency
from kvstore.bench.tiers_ssd import measure_ssd
from kvstore.residency.check import validate

MIB = 1 << 20


def test_ssd_redis_and_recovery_deliver_what_was_written(tmp_path: Path, no_leaks: None) -> None:
    report = Report("tiers")
    measure_ssd(report, 1, 4, str(tmp_path))
    measure_recovery(report, 1, 8 * MIB, str(tmp_path))
    measure_redis(report, 1, 4)
    for name in ("ssd_wrong_blocks", "redis_wrong_blocks", "recovery_lost_blocks"):
        assert report.results[name]["value"] == 0
    ratios = ("ssd_write_vs_pwritev_loop", "ssd_read_vs_preadv_loop", "redis_write_vs_resp_write")
    assert all((report.ratios[name] or 0) > 0 for name in ratios)
    assert list(tmp_path.iterdir()) == []


def test_residency_and_churn(tmp_path: Path) -> None:
    report = Report("tiers")
    measure_residency(report, 1, 20_000)
    assert report.results["residency_ops"]["value"] > 0
    made = Resident(300)
    validate(made.residency)
    measure_churn(report, 0.1, str(tmp_path), QUEUE_QUICK)
    assert report.results["churn_blocks_spilled"]["value"] > 0
