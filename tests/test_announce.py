"""Outbox, receiver and inbox, one behaviour at a time. tests/test_announce_machine.py tries all of them at once."""

from __future__ import annotations

import pytest

from kvstore.directory.announce import Delta, Inbox, Outbox, Receiver, SnapshotChunk, Verdict, snapshot_chunks
from kvstore.directory.runs import Added, Removed, RemovedRun, blocks_of
from kvstore.errors import BadRequest
from kvstore.spec import Shard
from tests.cluster_model import FULL, chain, directory_for, run_of

KEYS = chain(FULL, 40)
WHOLE = Shard.whole(FULL)


def added(depth: int) -> Added:
    return next(blocks_of(run_of(FULL, WHOLE, KEYS, depth, depth + 1)))


def removed(depth: int) -> Removed:
    return Removed(WHOLE.digest, KEYS[depth])


def delta(first: int, last: int) -> Delta:
    """Change `n` adds the block at depth n - 1."""
    return Delta(first, last, (run_of(FULL, WHOLE, KEYS, first - 1, last),))


def chunk(
    resume: int, snapshot: int = 1, index: int = 0, *, last: bool = True, blocks: range | None = None
) -> SnapshotChunk:
    """The state after change `resume`, or the part of it in `blocks`."""
    depths = range(resume) if blocks is None else blocks
    runs = (run_of(FULL, WHOLE, KEYS, depths.start, depths.stop),) if depths else ()
    return SnapshotChunk(snapshot, index, last, resume, runs)


def receiver(**more: int) -> Receiver:
    return Receiver(directory_for(FULL), "w", 1, **more)


def held(of: Receiver) -> list[int]:
    """Depths the directory has, after checking it."""
    of.directory.validate()
    return sorted(KEYS.index(key) for _, key in of.directory.contents("w"))


class TestOutbox:
    def test_numbers_begin_at_one_and_stay_in_order(self) -> None:
        outbox = Outbox(10)
        assert (outbox.head, outbox.first, outbox.since(0, 5)) == (0, 1, [])
        assert [outbox.push(added(depth)) for depth in range(3)] == [1, 2, 3]
        assert outbox.since(0, 2) == [(1, added(0)), (2, added(1))]
        assert outbox.since(2, 9) == [(3, added(2))]
        assert outbox.since(3, 9) == []

    def test_what_is_no_longer_kept_needs_a_snapshot(self) -> None:
        outbox = Outbox(3)
        for depth in range(8):
            outbox.push(added(depth))
        assert (outbox.head, outbox.first) == (8, 6)
        assert outbox.since(5, 9) == [(6, added(5)), (7, added(6)), (8, added(7))]
        assert outbox.since(4, 9) is None
        assert outbox.since(9, 9) is None  # a number never given: of another life
        with pytest.raises(LookupError, match="snapshot"):
            outbox.delta(4, 9)

    def test_what_was_there_before_needs_a_snapshot(self) -> None:
        outbox = Outbox(3, head=5)
        assert outbox.since(0, 9) is None and outbox.since(4, 9) is None
        assert outbox.since(5, 9) == []
        assert outbox.push(added(0)) == 6
        assert outbox.since(5, 9) == [(6, added(0))]

    def test_a_delta_merges_runs(self) -> None:
        outbox = Outbox(10)
        for change in (added(0), added(1), removed(0), removed(1), added(2)):
            outbox.push(change)
        assert outbox.delta(5, 9) is None
        whole = outbox.delta(0, 9)
        assert whole is not None and len(whole) == 5 and len(whole.changes) == 3
        assert whole.changes[1] == RemovedRun(WHOLE.digest, (KEYS[0], KEYS[1]))
        part = outbox.delta(1, 2)
        assert part is not None and (part.first_seq, part.last_seq) == (2, 3)

    def test_it_keeps_at_least_one(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Outbox(0)


@pytest.mark.parametrize(("first", "last", "blocks"), [(0, 1, 2), (1, 3, 2), (2, 2, 2), (3, 2, 0), (1, 1, 0)])
def test_a_delta_whose_numbers_do_not_fit_is_refused(first: int, last: int, blocks: int) -> None:
    changes = (run_of(FULL, WHOLE, KEYS, 0, blocks),) if blocks else ()
    with pytest.raises(BadRequest, match="delta"):
        Delta(first, last, changes)


def test_a_snapshot_part_without_a_number_is_refused() -> None:
    for snapshot, index in ((0, 0), (1, -1)):
        with pytest.raises(BadRequest, match="snapshot"):
            SnapshotChunk(snapshot, index, True, 0, ())


def test_snapshots_come_in_parts_and_never_in_none() -> None:
    blocks = [added(depth) for depth in range(10)]
    chunks = list(snapshot_chunks(7, 12, blocks[::-1], 4))
    assert [(c.snapshot, c.index, c.last, c.resume_seq) for c in chunks] == [
        (7, 0, False, 12),
        (7, 1, False, 12),
        (7, 2, True, 12),
    ]
    assert [[len(run.keys) for run in c.runs] for c in chunks] == [[4], [4], [2]]
    assert list(snapshot_chunks(1, 0, [], 4)) == [SnapshotChunk(1, 0, True, 0, ())]
    assert len(list(snapshot_chunks(1, 0, blocks, 10))) == 1


class TestReceiver:
    def test_deltas_in_order(self) -> None:
        one = receiver()
        assert [one.offer(delta(1, 3)), one.offer(delta(4, 4))] == [Verdict.APPLY] * 2
        assert held(one) == [0, 1, 2, 3] and one.applied == 4 and one.complete

    def test_repeated_and_overlapping_ones(self) -> None:
        one = receiver()
        one.offer(delta(1, 3))
        one.directory.remove("w", WHOLE.digest, [KEYS[1]])  # a mark: applying 2 again would undo it
        assert one.offer(delta(1, 3)) is Verdict.SKIP
        assert one.offer(delta(2, 5)) is Verdict.APPLY
        assert held(one) == [0, 2, 3, 4]

    def test_a_gap_asks_once_and_the_snapshot_closes_it(self) -> None:
        one = receiver()
        assert [one.offer(delta(2, 2)), one.offer(delta(4, 5))] == [Verdict.GAP, Verdict.HOLD]
        assert one.in_flight and not one.complete and held(one) == []
        assert one.snapshot(chunk(3)) is Verdict.APPLY
        assert held(one) == [0, 1, 2, 3, 4] and one.applied == 5 and not one.in_flight

    def test_a_gap_that_the_snapshot_leaves_open_asks_again(self) -> None:
        one = receiver()
        one.offer(delta(9, 9))
        assert one.snapshot(chunk(3)) is Verdict.GAP
        assert held(one) == [0, 1, 2] and one.in_flight
        assert one.snapshot(chunk(8, 2)) is Verdict.APPLY
        assert held(one) == list(range(9))

    def test_what_was_missing_may_still_come(self) -> None:
        one = receiver()
        assert one.offer(delta(3, 4)) is Verdict.GAP
        assert one.offer(delta(1, 2)) is Verdict.APPLY
        assert held(one) == [0, 1, 2, 3] and one.complete
        assert one.snapshot(chunk(2)) is Verdict.SKIP  # too old by now
        assert held(one) == [0, 1, 2, 3] and not one.in_flight

    def test_a_heartbeat_shows_a_gap(self) -> None:
        one = receiver()
        assert one.heard(0) is Verdict.SKIP
        assert one.heard(2) is Verdict.GAP
        assert one.heard(3) is Verdict.SKIP  # asked already
        assert one.snapshot(chunk(3)) is Verdict.APPLY
        assert one.heard(3) is Verdict.SKIP and one.heard(1) is Verdict.SKIP

    def test_registration_expects_without_asking(self) -> None:
        one = receiver()
        one.expect(4)
        assert not one.complete and not one.in_flight
        one.offer(delta(1, 4))
        assert one.complete

    def test_parts_show_only_together(self) -> None:
        one = receiver()
        one.offer(delta(1, 2))
        assert one.snapshot(chunk(6, last=False, blocks=range(3))) is Verdict.HOLD
        assert one.snapshot(chunk(6, last=False, blocks=range(3))) is Verdict.SKIP  # repeated
        assert held(one) == [0, 1]
        assert one.offer(delta(7, 7)) is Verdict.HOLD
        assert one.snapshot(chunk(6, index=1, blocks=range(3, 6))) is Verdict.APPLY
        assert held(one) == list(range(7))
        assert one.snapshot(chunk(6, index=1, blocks=range(3, 6))) is Verdict.SKIP

    def test_a_lost_part_voids_the_snapshot_and_asks_again(self) -> None:
        one = receiver()
        assert one.snapshot(chunk(6, index=1, blocks=range(3, 6))) is Verdict.GAP  # the first is lost
        assert one.snapshot(chunk(6, index=2, blocks=range(6, 6))) is Verdict.SKIP
        assert one.snapshot(chunk(6, snapshot=2, last=False, blocks=range(1))) is Verdict.HOLD
        assert one.snapshot(chunk(6, snapshot=2, index=2, blocks=range(3, 6))) is Verdict.GAP
        assert held(one) == [] and one.applied == 0
        assert one.snapshot(chunk(6, snapshot=3)) is Verdict.APPLY
        assert held(one) == list(range(6))

    def test_a_newer_snapshot_voids_the_one_coming_in(self) -> None:
        one = receiver()
        one.snapshot(chunk(6, last=False, blocks=range(3)))
        assert one.snapshot(chunk(2, snapshot=2)) is Verdict.APPLY
        assert one.snapshot(chunk(6, index=1, blocks=range(3, 6))) is Verdict.SKIP
        assert held(one) == [0, 1] and one.applied == 2

    def test_a_snapshot_that_takes_too_long_is_asked_for_anew(self) -> None:
        one = receiver()
        assert one.reset() is Verdict.SKIP  # nothing is missing
        one.heard(3)
        one.snapshot(chunk(3, last=False, blocks=range(2)))
        assert one.reset() is Verdict.GAP and one.in_flight
        assert one.snapshot(chunk(3, index=1, blocks=range(2, 3))) is Verdict.SKIP
        assert one.snapshot(chunk(3, snapshot=2)) is Verdict.APPLY
        assert one.reset() is Verdict.SKIP

    def test_a_new_stream_goes_on_where_the_old_one_broke(self) -> None:
        one = receiver()
        one.offer(delta(1, 2))
        one.offer(delta(5, 5))
        one.snapshot(chunk(4, last=False, blocks=range(2)))
        assert one.resume() == 2 and not one.in_flight
        assert one.offer(delta(3, 4)) is Verdict.APPLY
        assert held(one) == [0, 1, 2, 3, 4]  # 5 was kept

    def test_what_is_kept_meanwhile_is_bounded(self) -> None:
        one = receiver(held_max=4)
        one.offer(delta(2, 3))
        one.offer(delta(2, 4))  # the longer one in its place
        one.offer(delta(6, 9))  # one too many
        assert one.offer(delta(1, 1)) is Verdict.APPLY
        assert held(one) == [0, 1, 2, 3] and not one.complete
        assert one.reset() is Verdict.GAP

    def test_a_closed_one_changes_nothing(self) -> None:
        one = receiver()
        one.close()
        verdicts = [one.offer(delta(1, 1)), one.offer(delta(3, 3)), one.heard(9), one.snapshot(chunk(3)), one.reset()]
        assert verdicts == [Verdict.SKIP] * 5
        assert held(one) == [] and one.directory.names() == []


class TestInbox:
    def test_one_life_at_a_time(self) -> None:
        inbox = Inbox(directory_for(FULL))
        old = inbox.open("w", 1)
        assert old is not None and inbox.open("w", 1) is old and inbox.get("w", 1) is old
        old.offer(delta(1, 3))
        new = inbox.open("w", 2)
        assert new is not None and new is not old and inbox.receivers() == [new]
        assert inbox.directory.contents("w") == {}
        assert old.offer(delta(4, 4)) is Verdict.SKIP and old.snapshot(chunk(4)) is Verdict.SKIP
        assert inbox.open("w", 1) is None and inbox.get("w", 1) is None
        assert inbox.directory.contents("w") == {}
        new.offer(delta(1, 1))
        inbox.forget("w")
        inbox.forget("nobody")
        assert inbox.directory.contents("w") == {} and inbox.receivers() == []
