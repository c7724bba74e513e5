"""docs/OPERATIONS.md names every figure, state and kind of error that the processes show, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from kvstore.directory.membership import State
from kvstore.operations import metrics
from kvstore.wire import common_pb2, coordinator_pb2

TEXT = (Path(__file__).parent.parent / "docs" / "OPERATIONS.md").read_text()


def shown() -> set[str]:
    """Families of both pages."""
    pages = metrics.worker_page(common_pb2.WorkerStatus()) + metrics.coordinator_page(
        coordinator_pb2.CoordinatorStatus()
    )
    return {line.split(" ")[2] for line in pages.splitlines() if line.startswith("# TYPE")}


def test_every_figure_is_explained_and_none_that_does_not_exist() -> None:
    begin = TEXT.index("| figure | means |")
    table = TEXT[begin : TEXT.index("## Security")]
    named = {name for name in re.findall(r"`(kvstore_[a-z_]+)`", table) if not name.startswith("kvstore_head")}
    assert named == shown()


def test_every_state_is_explained() -> None:
    tiers = TEXT[TEXT.index("| tier state |") : TEXT.index("| worker state |")]
    assert set(re.findall(r"^\| `([a-z]+)`", tiers, re.M)) == set(metrics.STATES)
    workers = TEXT[TEXT.index("| worker state |") :]
    workers = workers[: workers.index("\n\n")]
    assert set(re.findall(r"^\| `([a-z]+)`", workers, re.M)) == {state.value for state in State} == set(metrics.MEMBERS)


def test_every_kind_of_error_is_explained() -> None:
    begin = TEXT.index("| kind of error |")
    table = TEXT[begin : TEXT.index("\n\n", begin)]
    named = set(re.findall(r"`([A-Za-z_]+)`", table))
    assert set(metrics.FAULTS) <= named


def test_there_is_a_part_on_each_thing_an_operator_does() -> None:
    heads = re.findall(r"^## (.*)$", TEXT, re.M)
    for part in ("From deploy/", "Sizing", "Upgrading", "Taking a worker away", "Metrics", "Security", "Settings"):
        assert part in heads
