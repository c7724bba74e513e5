"""One Announce stream: what a member says, and what it is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from coordinator.registry import Registry
from kvstore.catalog import Catalog
from kvstore.client.plan import ENGINE_HOLDER, is_redis
from kvstore.convert import chunk_from_wire, delta_from_wire, entry_from_wire
from kvstore.directory.announce import SnapshotChunk, Verdict
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Accepted, Fenced, State, Unknown
from kvstore.directory.runs import RemovedRun, Run, RunChange
from kvstore.errors import BadRequest, Unavailable
from kvstore.seams import Clock
from kvstore.spec import ModelSpec
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import member_from_wire

Reply = coordinator_pb2.AnnounceReply

LEARNT_MAX = 65_536
"""Pairs of spec and shard that a stream remembers to have told the directories."""


class Session:
    """Synchronous. The first message must be Register; `over` when nothing more may come on this stream."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        lease_s: float,
        welcome: Callable[[], coordinator_pb2.Welcome],
        woken: Callable[[], None] = lambda: None,
    ) -> None:
        """`woken`: its turn to send a snapshot has come, `turn` says which one."""
        self._registry, self._clock, self._lease_s, self._welcome = registry, clock, lease_s, welcome
        self._woken = woken
        self._accepted: Accepted | None = None
        self._dictionary = Catalog()  # of this stream: an entry holds for all its namespaces
        self._view = b""  # digest of the view told last
        self._learnt: dict[tuple[str, bytes, bytes], None] = {}  # (namespace, root, shard) that its directory knows
        self._asked: dict[str, float] = {}  # namespace -> when its snapshot was asked for, or last went on
        self._wants: dict[str, None] = {}  # namespaces whose snapshot is needed and not asked for yet
        self._sending = ""  # the namespace of the turn
        self._unasked: dict[str, None] = {}  # namespaces whose snapshot is coming in all the same
        self.over = False

    def handle(self, request: coordinator_pb2.AnnounceRequest) -> list[Reply]:
        """Mutates. BadRequest for what no member says; Unavailable where it has to register anew."""
        kind = request.WhichOneof("body")
        if kind == "register":
            return self._register(request.register)
        if self._accepted is None:
            raise BadRequest("the first message of an Announce stream must be Register")
        if not self._registry.membership.current(self._accepted.worker, self._accepted.epoch):
            return self._replaced()
        if kind == "delta":
            return self._delta(request.delta)
        if kind == "snapshot":
            return self._snapshot(request.snapshot)
        if kind == "heartbeat":
            return self._heartbeat(request.heartbeat)
        raise BadRequest("an Announce message without a body of a known kind")

    def close(self) -> None:
        """The stream has ended, for whatever reason."""
        self._registry.turns.done(self, self._clock.monotonic())
        if self._accepted is not None:
            self._registry.disconnected(self._accepted, self._clock.monotonic())

    def _register(self, message: coordinator_pb2.Register) -> list[Reply]:
        if self._accepted is not None:
            raise BadRequest("this stream is registered already: open another one")
        member = member_from_wire(message.member)
        outcome = self._registry.register(member, dict(message.heads), self._clock.monotonic())
        if isinstance(outcome, Fenced):
            self.over = True
            return [Reply(fenced=coordinator_pb2.Fenced(epoch=outcome.epoch))]
        self._accepted = outcome
        welcome = self._welcome()
        welcome.snapshot_turns = True
        for name in message.heads:
            receiver = self._registry.receiver(member.id, member.epoch, name)
            if receiver is not None:
                welcome.applied[name] = receiver.applied
        return [Reply(welcome=welcome)]

    def _replaced(self) -> list[Reply]:
        """A newer life of the same member is known, or it was given up."""
        assert self._accepted is not None
        known = self._registry.membership.epoch(self._accepted.worker)
        if known > self._accepted.epoch:
            self.over = True
            return [Reply(fenced=coordinator_pb2.Fenced(epoch=known))]
        raise Unavailable("this coordinator no longer knows the worker: register again")

    def _delta(self, message: coordinator_pb2.Delta) -> list[Reply]:
        assert self._accepted is not None
        receiver = self._registry.receiver(self._accepted.worker, self._accepted.epoch, message.namespace)
        if receiver is None:
            return []
        delta = delta_from_wire(message)
        if self._learn(message.namespace, receiver.directory, message.dictionary, delta.changes):
            self._group(message.namespace, delta.changes)
            before = receiver.applied
            verdict = receiver.offer(delta)
            if verdict == Verdict.APPLY:
                self._registry.watchers.applied(message.namespace, receiver, before, message, delta.changes)
        else:  # the message that introduced them was lost: a snapshot brings its own dictionary
            verdict = receiver.heard(delta.last_seq)
        self._registry.counters["deltas"] += 1
        return self._after(message.namespace, verdict)

    def _snapshot(self, message: coordinator_pb2.SnapshotChunk) -> list[Reply]:
        assert self._accepted is not None
        receiver = self._registry.receiver(self._accepted.worker, self._accepted.epoch, message.namespace)
        if receiver is None:
            return []
        part = chunk_from_wire(message)
        self._learn(message.namespace, receiver.directory, message.dictionary, part.runs)
        self._group(message.namespace, part.runs)
        before = receiver.applied
        self._registry.counters["snapshot_parts"] += 1
        if not self._may_come(message.namespace, part):
            return self._after(message.namespace, receiver.reset())
        verdict = receiver.snapshot(part)
        if verdict == Verdict.APPLY or receiver.applied != before:
            self._registry.watchers.replaced(message.namespace, receiver)
        self._asked[message.namespace] = self._clock.monotonic()
        if not receiver.in_flight:
            self._ended(message.namespace)
        return self._after(message.namespace, verdict)

    def _may_come(self, namespace: str, part: SnapshotChunk) -> bool:
        """Whether this part may come in: not after its turn was taken back. One that was not asked for may, because who
        sends it knows nothing of turns. Mutates."""
        turns, now = self._registry.turns, self._clock.monotonic()
        if namespace != self._sending and namespace not in self._unasked:
            if part.index:
                return False
            self._registry.counters["snapshots_unasked"] += 1
            self._unasked[namespace] = None
        if turns.holds(self):
            turns.goes_on(self, now)
        elif namespace in self._unasked:
            turns.force(self, now)
        else:
            self._ended(namespace)
            return False
        return True

    def _heartbeat(self, message: coordinator_pb2.Heartbeat) -> list[Reply]:
        assert self._accepted is not None
        worker, epoch = self._accepted.worker, self._accepted.epoch
        if message.leaving:
            self.over = True
            self._registry.leave(worker, epoch, self._clock.monotonic())
            return []
        if isinstance(self._registry.heartbeat(worker, epoch, self._clock.monotonic()), Fenced | Unknown):
            return self._replaced()
        if message.HasField("status"):
            self._registry.statuses[worker] = message.status
            self._registry.membership.drain(worker, epoch, message.status.member.state == State.DRAINING)
        replies: list[Reply] = []
        ack = coordinator_pb2.Ack()
        for name in message.heads:
            receiver = self._registry.receiver(worker, epoch, name)
            if receiver is None:
                continue
            verdict = receiver.heard(message.heads[name])
            waits = name in self._wants
            if receiver.in_flight and verdict != Verdict.GAP and not waits and self._stalled(name):
                verdict = receiver.reset()
            ack.applied[name] = receiver.applied
            replies += self._after(name, verdict)
        for name in [name for name in (self._sending, *self._unasked) if name and self._stalled(name)]:
            self._ended(name)
        for name in message.wants:
            receiver = self._registry.receiver(worker, epoch, name)
            if receiver is not None and name != self._sending:
                receiver.want()
                self._wants[name] = None
        replies += self.turn()
        ack.waiting.extend(self._wants)
        return [*replies, Reply(ack=ack), *self._hints(worker)]

    def _hints(self, worker: str) -> list[Reply]:
        """What a worker should copy or may give up first, after the view that this is good for."""
        repair = self._registry.repair
        if is_redis(worker) or worker.startswith(ENGINE_HOLDER):
            return []
        hints = repair.hints(worker, self._clock.monotonic())
        if self._view == repair.digest:
            return hints
        self._view = repair.digest
        return [repair.view(), *hints]

    def _group(self, namespace: str, changes: Sequence[RunChange]) -> None:
        """Groups are workers' business: what lies in Redis is no copy of theirs."""
        assert self._accepted is not None
        if not is_redis(self._accepted.worker):
            self._registry.repair.learn(namespace, [change for change in changes if isinstance(change, Run)])

    def _stalled(self, namespace: str) -> bool:
        """Whether a snapshot that was asked for has not gone on for a lease."""
        now = self._clock.monotonic()
        return now - self._asked.setdefault(namespace, now) > self._lease_s

    def _after(self, namespace: str, verdict: Verdict) -> list[Reply]:
        if verdict == Verdict.APPLY:
            self._registry.progressed(namespace)
        if verdict == Verdict.GAP:
            self._registry.counters["gaps"] += 1
            self._wants[namespace] = None
            self._ended(namespace)
        return self.turn()

    @property
    def waits(self) -> bool:
        """Whether a snapshot is needed and not asked for yet. Pure."""
        return bool(self._wants)

    def turn(self) -> list[Reply]:
        """Ask for the next snapshot that is needed, if there is a turn for it. One at a time, so that nobody with many
        namespaces keeps others waiting. Mutates."""
        now = self._clock.monotonic()
        if self._sending or not self._wants or not self._registry.turns.ask(self, self._woken, now):
            return []
        self._sending = next(iter(self._wants))
        del self._wants[self._sending]
        self._asked[self._sending] = now
        return [Reply(snapshot_request=coordinator_pb2.SnapshotRequest(namespace=self._sending))]

    def _ended(self, namespace: str) -> None:
        """A snapshot is in, or void: somebody else's turn."""
        self._unasked.pop(namespace, None)
        if namespace == self._sending:
            self._sending = ""
        if not self._sending and not self._unasked:
            self._registry.turns.done(self, self._clock.monotonic())

    def _learn(
        self,
        namespace: str,
        directory: Directory,
        entries: Iterable[common_pb2.DictionaryEntry],
        changes: Sequence[RunChange],
    ) -> bool:
        """Take in new entries, and tell the directory those it needs; whether it knows all of them now. Mutates.
        BadRequest, Overloaded."""
        for message in entries:
            entry = entry_from_wire(message)
            if isinstance(entry, ModelSpec):
                self._dictionary.learn_spec(entry)
            else:
                self._dictionary.learn_shard(entry)
        known = True
        for change in changes:
            if isinstance(change, RemovedRun) or (namespace, change.root, change.shard) in self._learnt:
                continue
            spec, shard = self._dictionary.spec(change.root), self._dictionary.shard(change.shard)
            if spec is not None and directory.spec(change.root) is None:
                directory.learn_spec(spec)
            if shard is not None and directory.shard(change.shard) is None:
                directory.learn_shard(shard)
            mine = directory.spec(change.root) is not None and directory.shard(change.shard) is not None
            known = known and mine
            if mine:
                if len(self._learnt) >= LEARNT_MAX:
                    self._learnt.clear()  # looked up anew
                self._learnt[namespace, change.root, change.shard] = None
        return known
