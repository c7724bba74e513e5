"""Announcements survive the wire; what no member says is refused with one line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.catalog import Catalog
from kvstore.convert import (
    Introduced,
    change_from_wire,
    change_to_wire,
    chunk_from_wire,
    chunk_to_wire,
    delta_from_wire,
    delta_to_wire,
    entry_from_wire,
    fidelity_from_wire,
    run_from_wire,
    run_to_wire,
    spec_to_wire,
    tier_from_wire,
)
from kvstore.directory.announce import Delta, SnapshotChunk
from kvstore.directory.runs import RemovedRun, Run
from kvstore.errors import BadRequest
from kvstore.spec import Shard
from kvstore.types import Fidelity, Tier
from kvstore.wire import common_pb2, coordinator_pb2
from tests.cluster_model import FULL, FULL_STATE, chain, halves, run_of

KEYS = chain(FULL, 6)
WHOLE = Shard.whole(FULL)
RUN = run_of(FULL, WHOLE, KEYS, 1, 4, Tier.SSD, Fidelity.NEAR, 1 << 40)
GONE = RemovedRun(WHOLE.digest, (KEYS[3], KEYS[0]))

Digest = st.binary(min_size=16, max_size=16)
Keys = st.lists(Digest, min_size=1, max_size=5).map(tuple)
Runs = st.builds(
    Run, Digest, Digest, st.sampled_from(Tier), st.sampled_from(Fidelity), Digest, st.integers(0, 2**32 - 1), Keys,
    Digest, st.integers(0, 2**64 - 1),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(Runs | st.builds(RemovedRun, Digest, Keys))
def test_changes_survive(change: Run | RemovedRun) -> None:
    message = coordinator_pb2.Change.FromString(change_to_wire(change).SerializeToString())
    assert change_from_wire(message) == change


def test_deltas_survive() -> None:
    delta = Delta(7, 11, (RUN, GONE))
    entry = spec_to_wire(FULL)
    message = coordinator_pb2.Delta.FromString(delta_to_wire("tenant", delta, [entry]).SerializeToString())
    assert delta_from_wire(message) == delta
    assert message.namespace == "tenant" and list(message.dictionary) == [entry]


@pytest.mark.parametrize("index", [0, 3])
def test_snapshot_parts_survive(index: int) -> None:
    chunk = SnapshotChunk(2, index, index == 3, 9, (RUN, RUN))
    message = coordinator_pb2.SnapshotChunk.FromString(chunk_to_wire("tenant", chunk).SerializeToString())
    assert chunk_from_wire(message) == chunk
    assert message.namespace == "tenant" and message.first == (index == 0)


def spoiled(**fields: object) -> Callable[[], Run]:
    def read() -> Run:
        message = run_to_wire(RUN)
        for name, value in fields.items():
            setattr(message, name, value)
        return run_from_wire(message)

    return read


@pytest.mark.parametrize(
    "read",
    [
        spoiled(root=b""),
        spoiled(root=bytes(17)),
        spoiled(shard=bytes(15)),
        spoiled(parent=b"x"),
        spoiled(group=b""),
        spoiled(keys=b""),
        spoiled(keys=bytes(17)),
        spoiled(tier=0),
        spoiled(tier=9),
        spoiled(fidelity=0),
        spoiled(fidelity=7),
        lambda: tier_from_wire(-1),
        lambda: fidelity_from_wire(4),
        lambda: change_from_wire(coordinator_pb2.Change()),
        lambda: change_from_wire(coordinator_pb2.Change(removed=common_pb2.RemovedRun(shard=WHOLE.digest))),
        lambda: change_from_wire(coordinator_pb2.Change(removed=common_pb2.RemovedRun(keys=KEYS[0]))),
        lambda: delta_from_wire(coordinator_pb2.Delta(first_seq=1, last_seq=1)),
        lambda: delta_from_wire(coordinator_pb2.Delta(first_seq=1, last_seq=2, changes=[change_to_wire(RUN)])),
        lambda: chunk_from_wire(coordinator_pb2.SnapshotChunk(index=1)),
        lambda: entry_from_wire(common_pb2.DictionaryEntry()),
        lambda: entry_from_wire(common_pb2.DictionaryEntry(spec_json="{")),
        lambda: entry_from_wire(common_pb2.DictionaryEntry(shard=common_pb2.Shard(group=1 << 31))),
    ],
)
def test_what_no_member_says_is_refused(read: Callable[[], object]) -> None:
    assert spoiled()() == RUN  # the control
    with pytest.raises(BadRequest) as caught:
        read()
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(junk: bytes) -> None:
    """Nothing but BadRequest comes out of a message that parses."""
    for kind, read in ((coordinator_pb2.Delta, delta_from_wire), (coordinator_pb2.SnapshotChunk, chunk_from_wire)):
        with suppress(DecodeError, BadRequest):
            read(kind.FromString(junk))  # type: ignore[operator]


def test_the_dictionary_says_each_thing_once_before_its_use() -> None:
    catalog = Catalog()
    left, right = halves(FULL)
    catalog.learn_spec(FULL)
    for shard in (left, right):
        catalog.learn_shard(shard)
    said = Introduced(catalog)
    first = said.entries(
        [run_of(FULL, left, KEYS, 0, 2), RemovedRun(right.digest, (KEYS[0],)), run_of(FULL, left, KEYS, 2, 3)]
    )
    assert [entry_from_wire(entry) for entry in first] == [FULL, left]
    second = said.entries([run_of(FULL, left, KEYS, 0, 1), run_of(FULL, right, KEYS, 0, 1)])
    assert [entry_from_wire(entry) for entry in second] == [right]
    assert [entry_from_wire(entry) for entry in Introduced(catalog).entries([RUN, run_of(FULL, left, KEYS, 0, 1)])] == [
        FULL,
        left,
    ]
    unknown = run_of(FULL_STATE, WHOLE, KEYS, 0, 1)
    assert said.entries([unknown]) == []  # the catalog does not know it yet
    catalog.learn_spec(FULL_STATE)
    catalog.learn_shard(WHOLE)
    assert [entry_from_wire(entry) for entry in said.entries([unknown])] == [FULL_STATE, WHOLE]
