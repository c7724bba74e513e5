"""What `bench directory` measures is right: small rigs, fleets and plots, without a clock."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvstore.bench.directory import Updates, dead_worker
from kvstore.bench.directory_fleet import Cache, measure_fleet, run_fleet, unit_keys
from kvstore.bench.directory_rig import COPIES, PROMPT, Rig
from kvstore.bench.directory_snapshot import measure_snapshot
from kvstore.bench.plot import Panel, svg
from kvstore.bench.report import Report
from kvstore.operations.trace import Request
from kvstore.wire import common_pb2


def requests(count: int, length: int, shared: int) -> list[Request]:
    """Prompts of `length` blocks, of which `shared` are the same for all; each prompt twice."""
    made = []
    for number in range(count):
        ids = [*range(shared), *(1000 + number * length + at for at in range(length - shared))]
        made += [Request(number * 1000.0, 512 * length, 1, tuple(ids))] * 2
    return made


def test_the_rig_answers_as_a_coordinator_does() -> None:
    rig = Rig(1 << 18)
    for worker, message, _ in rig.announced(16):
        worker.hear(message)
    assert rig.directory.blocks == COPIES * rig.prompts * PROMPT
    before = rig.directory.blocks
    updates = Updates(rig)
    while updates.apply():
        pass
    assert rig.directory.blocks == before and updates.applied == len(updates.messages) > 0
    for prompt in (0, rig.prompts - 1):
        reply = common_pb2.MatchReply.FromString(rig.lookup(rig.request(prompt)))
        assert reply.blocks == PROMPT and len(reply.runs) == COPIES
        assert {holder.id for holder in reply.holders} == {worker.id for worker in rig.holders(prompt)}
    missed = common_pb2.MatchReply.FromString(rig.lookup(rig.request(rig.prompts)))
    assert missed.blocks == 0 and not missed.runs
    rig.directory.validate()
    rig.close()


def test_snapshots_and_a_dead_worker_come_out_whole() -> None:
    report = Report("directory")
    measure_snapshot(report, 1500, 1)
    dead_worker(report, 16_384, 2)
    assert report.results["snapshot_blocks"]["value"] == 1500
    assert report.results["dead_worker_blocks"]["value"] == 16_384


def test_a_fleet_with_room_for_everything_misses_only_what_is_new() -> None:
    outcome = run_fleet(requests(20, 12, 3), workers=4, blocks=8 * 4000, turnover=0.2)
    populations = outcome.requests // 40
    assert outcome.accesses == populations * 40 * 12
    new = populations * (3 + 20 * 9)
    assert outcome.hits == outcome.one_hits == outcome.accesses - new
    assert outcome.stored == outcome.unique == 8 * new


def test_a_fleet_that_is_too_small_evicts_and_stays_true_to_its_directory() -> None:
    outcome = run_fleet(requests(60, 12, 3), workers=5, blocks=8 * 100)
    assert 0 < outcome.hits < outcome.accesses and outcome.stored <= 8 * 100
    assert outcome.announced > outcome.stored and sum(outcome.loads) == outcome.requests


def test_a_cache_lets_go_of_children_first() -> None:
    cache = Cache(3)
    for unit in (1, 2, 3):
        assert cache.put(unit, unit - 1 or -1) == []
    assert cache.put(8, -1) == [3]  # the others are parents
    assert cache.put(9, -1) in ([2], [8]) and 1 in cache.rows


def test_what_lies_behind_a_gap_is_put_once() -> None:
    """Another worker had the beginning and lost it: the rest is here already, and must not be held twice."""
    cache = Cache(3)
    for unit in (2, 3, 1, 2, 3):
        assert cache.put(unit, unit - 1 if unit - 1 in cache.rows else -1) == []
    for unit in (7, 8, 9):
        cache.put(unit, -1)
    assert len(cache.rows) == 3


def test_unit_keys_differ_everywhere() -> None:
    packed = unit_keys(range(1000))
    keys = {packed[at : at + 16] for at in range(0, len(packed), 16)}
    assert len(keys) == 8000 and unit_keys([999]) == packed[-128:]


@pytest.mark.parametrize("workers", [1, 16])
def test_the_fleet_bench_reports_and_plots(tmp_path: Path, workers: int) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": r.timestamp_ms, "input_length": 9, "output_length": 1, "hash_ids": list(r.hash_ids)}
        for r in requests(30, 10, 2)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    report = Report("directory")
    measure_fleet(report, str(trace), workers, 8 * 64 * workers, str(tmp_path / "plot.svg"))
    assert report.ratios["fleet_hits_vs_one_cache"] is not None
    assert f"workers_{workers}_lookup" in report.results
    assert len(ElementTree.parse(tmp_path / "plot.svg").getroot()) > 5


def test_a_plot_of_nothing_much() -> None:
    document = svg("a < b", [1, 1000], "x", [Panel("p & q", "%", {"none": [None, None], "zero": [0.0, 0.0]})])
    assert "a &lt; b" in document and ElementTree.fromstring(document) is not None
