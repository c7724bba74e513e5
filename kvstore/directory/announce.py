"""Announcing without losing anything: numbered changes, deltas, and a snapshot after a gap. Both sides, no network.

A holder's state in one namespace and epoch is a list of changes numbered 1, 2, ...; state 0 is empty. The holder
numbers at the change (`Outbox.push`), before any queue. A receiver has applied 1..`applied`, or a snapshot that stands
for them, so its directory is always the holder's state at `applied`, whole. What is lost, repeated or out of order
on the way shows as a gap in the numbers, and a gap asks for one snapshot, which names the number it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from kvstore.directory.directory import Directory
from kvstore.directory.runs import (
    Added,
    Change,
    Run,
    RunChange,
    count_blocks,
    in_chain_order,
    tail,
    to_run_changes,
    to_runs,
)
from kvstore.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Delta:
    """All changes `first_seq`..`last_seq`, in order, one block each. BadRequest where the numbers do not fit them."""

    first_seq: int
    last_seq: int
    changes: tuple[RunChange, ...]

    def __post_init__(self) -> None:
        count = count_blocks(self.changes)
        if self.first_seq < 1 or count < 1 or self.last_seq - self.first_seq + 1 != count:
            raise BadRequest(f"a delta {self.first_seq}..{self.last_seq} of {count} changes: number each change by one")

    def __len__(self) -> int:
        """Changes."""
        return self.last_seq - self.first_seq + 1


@dataclass(frozen=True, slots=True)
class SnapshotChunk:
    """Part `index` of the whole state at `resume_seq`. `snapshot` (1, 2, ...) grows with every snapshot of an epoch."""

    snapshot: int
    index: int
    last: bool
    resume_seq: int
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if self.snapshot < 1 or self.index < 0 or self.resume_seq < 0:
            raise BadRequest(f"snapshot {self.snapshot}, part {self.index}: number snapshots from 1, parts from 0")


class Verdict(StrEnum):
    """What became of a message. After GAP the receiver counts on the caller to ask for a snapshot, once."""

    APPLY = "apply"  # the directory is the state at `applied`, which has grown
    SKIP = "skip"  # nothing new in it
    HOLD = "hold"  # kept for later, or part of a snapshot that is on its way
    GAP = "gap"  # something is missing: ask for a snapshot


class Outbox:
    """The last changes of one namespace at its holder, numbered. `limit` of them are kept.

    `head`: numbers that stand for what the holder had before (found at its start) and that only a snapshot can tell.
    """

    def __init__(self, limit: int, *, head: int = 0) -> None:
        if limit < 1:
            raise ValueError("an outbox keeps at least one change")
        self.limit = limit
        self.head = head  # the last number given
        self._kept: list[Change] = []  # a ring: change `seq` lies at (seq - start) % limit
        self._start = head + 1

    @property
    def first(self) -> int:
        """The first number whose change is still kept; `head` + 1 where none is."""
        return max(self._start, self.head - self.limit + 1)

    def push(self, change: Change) -> int:
        """Number a change, at the change. Mutates. O(1)."""
        self.head += 1
        at = (self.head - self._start) % self.limit
        if at < len(self._kept):
            self._kept[at] = change
        else:
            self._kept.append(change)
        return self.head

    def since(self, seq: int, limit: int) -> list[tuple[int, Change]] | None:
        """Up to `limit` changes after number `seq`; None where one of them is gone: a snapshot is needed. Pure."""
        if seq + 1 < self.first or seq > self.head:
            return None
        numbers = range(seq + 1, min(self.head, seq + limit) + 1)
        return [(number, self._kept[(number - self._start) % self.limit]) for number in numbers]

    def delta(self, seq: int, limit: int) -> Delta | None:
        """`since` as a message. Raises LookupError where a snapshot is needed; None where nothing is new. Pure."""
        changes = self.since(seq, limit)
        if changes is None:
            raise LookupError(f"changes after {seq} are no longer kept: send a snapshot")
        if not changes:
            return None
        return Delta(changes[0][0], changes[-1][0], tuple(to_run_changes(change for _, change in changes)))


def snapshot_chunks(
    snapshot: int, resume_seq: int, blocks: Iterable[Added], blocks_max: int
) -> Iterator[SnapshotChunk]:
    """The whole state as messages of at most `blocks_max` blocks; one, without runs, where there is nothing."""
    return run_chunks(snapshot, resume_seq, to_runs(in_chain_order(blocks)), blocks_max)


def run_chunks(snapshot: int, resume_seq: int, runs: Iterable[Run], blocks_max: int) -> Iterator[SnapshotChunk]:
    """The same of runs, taken one after the other."""
    parts = _parts(runs, blocks_max)
    part, index = next(parts), 0
    for after in parts:
        yield SnapshotChunk(snapshot, index, False, resume_seq, part)
        part, index = after, index + 1
    yield SnapshotChunk(snapshot, index, True, resume_seq, part)


def _parts(runs: Iterable[Run], blocks_max: int) -> Iterator[tuple[Run, ...]]:
    """At most `blocks_max` blocks each, all but the last one full; one, empty, where there is nothing."""
    part: list[Run] = []
    room = blocks_max
    for run in runs:
        rest = run
        while len(rest.keys) > room:
            (cut,) = tail([rest], room)
            assert isinstance(cut, Run)
            yield (*part, replace(rest, keys=rest.keys[:room])) if room else tuple(part)
            part, room, rest = [], blocks_max, cut
        part.append(rest)
        room -= len(rest.keys)
    yield tuple(part)


class Receiver:
    """One holder's state in one namespace and epoch, as a directory takes it in. Every method but the queries mutates.

    `held_max` bounds the changes kept while a snapshot is on its way; beyond it they are lost, which is one more gap.
    """

    def __init__(self, directory: Directory, holder: str, epoch: int, *, held_max: int = 65536) -> None:
        self.directory = directory
        self.holder = holder
        self.epoch = epoch
        self.held_max = held_max
        self.applied = 0
        self.head = 0  # the highest number heard of
        self.in_flight = False  # a snapshot is asked for or coming in
        self.closed = False  # its epoch is over: it changes nothing any more
        self._held: dict[int, Delta] = {}  # first_seq -> a delta beyond a gap
        self._held_blocks = 0
        self._snapshot = 0  # the latest begun; earlier ones are void
        self._next_index: int | None = None  # of the part awaited; None: none is coming in

    @property
    def complete(self) -> bool:
        """Whether everything heard of is applied. Pure."""
        return self.applied >= self.head

    def expect(self, head: int) -> None:
        """At registration: the holder has given numbers up to `head` and will send them unasked."""
        self.head = max(self.head, head)

    def want(self) -> None:
        """The holder has a snapshot to send, and waits to be asked for it."""
        self.in_flight = self.in_flight or not self.closed

    def resume(self) -> int:
        """A new stream begins: what was on its way on the old one is void. Returns `applied`, for the welcome."""
        self._abandon()
        return self.applied

    def offer(self, delta: Delta) -> Verdict:
        """Apply what is next, only the tail of what is known in part; keep what lies beyond a gap."""
        if self.closed or delta.last_seq <= self.applied:
            return Verdict.SKIP
        self.head = max(self.head, delta.last_seq)
        if delta.first_seq > self.applied + 1:
            self._hold(delta)
            return self._ask(Verdict.HOLD)
        self._apply(delta)
        self._apply_held()
        return Verdict.APPLY

    def heard(self, head: int) -> Verdict:
        """A heartbeat's head: the last number sent before it on the same stream, so more than applied is a gap."""
        if self.closed:
            return Verdict.SKIP
        self.head = max(self.head, head)
        return Verdict.SKIP if self.applied >= head else self._ask(Verdict.SKIP)

    def snapshot(self, chunk: SnapshotChunk) -> Verdict:
        """Take in one part, in order. The last one replaces what the directory had, then what was held is applied.

        A lost part voids the snapshot; one older than what is applied by now changes nothing.
        """
        if self.closed or chunk.snapshot < self._snapshot:
            return Verdict.SKIP
        if chunk.snapshot > self._snapshot:
            self._abandon()
            self._snapshot, self._next_index, self.in_flight = chunk.snapshot, 0, True
            self.directory.stage(self.holder)
        if self._next_index is None or chunk.index < self._next_index:
            return Verdict.SKIP
        if chunk.index > self._next_index:
            self._abandon()
            return self._ask(Verdict.HOLD)
        self.directory.add_staged(self.holder, *chunk.runs)
        self._next_index += 1
        return self._finish(chunk.resume_seq) if chunk.last else Verdict.HOLD

    def reset(self) -> Verdict:
        """Give up the snapshot on its way (it took too long). GAP where one is still needed."""
        self._abandon()
        return Verdict.SKIP if self.closed or self.complete else self._ask(Verdict.SKIP)

    def close(self) -> None:
        """Its epoch is over. Late messages change nothing."""
        self._abandon()
        self._held.clear()
        self.closed = True

    def _finish(self, resume_seq: int) -> Verdict:
        verdict = Verdict.SKIP
        if resume_seq >= self.applied:
            self.directory.commit_staged(self.holder)
            self.applied = resume_seq
            self.head = max(self.head, resume_seq)
            verdict = Verdict.APPLY
        self._abandon()
        self._apply_held()
        return self._ask(verdict) if self._held else verdict

    def _abandon(self) -> None:
        if self._next_index is not None:
            self.directory.abandon_staged(self.holder)
        self._next_index = None
        self.in_flight = False

    def _ask(self, otherwise: Verdict) -> Verdict:
        if self.in_flight:
            return otherwise
        self.in_flight = True
        return Verdict.GAP

    def _apply(self, delta: Delta) -> None:
        self.directory.apply(self.holder, tail(delta.changes, self.applied + 1 - delta.first_seq))
        self.applied = delta.last_seq

    def _hold(self, delta: Delta) -> None:
        known = self._held.get(delta.first_seq)
        grows_by = len(delta) - (len(known) if known else 0)
        if grows_by > 0 and self._held_blocks + grows_by <= self.held_max:
            self._held[delta.first_seq] = delta
            self._held_blocks += grows_by

    def _apply_held(self) -> None:
        for first_seq in sorted(self._held):
            if first_seq > self.applied + 1:
                return
            delta = self._held.pop(first_seq)
            self._held_blocks -= len(delta)
            if delta.last_seq > self.applied:
                self._apply(delta)


class Inbox:
    """All receivers of one directory: at most one life per holder, and never an older one after a newer (I7)."""

    def __init__(self, directory: Directory, *, held_max: int = 65536) -> None:
        self.directory = directory
        self.held_max = held_max
        self._receivers: dict[str, Receiver] = {}

    def open(self, holder: str, epoch: int) -> Receiver | None:
        """The receiver of this life; a newer one forgets the blocks of the older. None: a newer is known. Mutates."""
        known = self._receivers.get(holder)
        if known is not None and known.epoch > epoch:
            return None
        if known is None or known.epoch < epoch:
            self.forget(holder)
            known = self._receivers[holder] = Receiver(self.directory, holder, epoch, held_max=self.held_max)
        return known

    def get(self, holder: str, epoch: int) -> Receiver | None:
        """The receiver of this very life. Pure."""
        known = self._receivers.get(holder)
        return known if known is not None and known.epoch == epoch else None

    def forget(self, holder: str) -> None:
        """Drop the holder's blocks, end its life here. Membership remembers its epoch. Mutates."""
        known = self._receivers.pop(holder, None)
        if known is not None:
            known.close()
        self.directory.drop(holder)

    def receivers(self) -> list[Receiver]:
        """In the order of their opening. Pure."""
        return list(self._receivers.values())
