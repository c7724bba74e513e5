"""A client's own view of a namespace's directory, kept by `Watch`: lookups without a round trip.

The same `Directory` and the same numbering as at a coordinator. What this client has just put is laid over it until the
view has it. A hint like any directory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvstore.client.plan import HitPlan, PlanRun
from kvstore.convert import chunk_from_wire, delta_from_wire, entry_from_wire
from kvstore.directory.announce import Inbox, Verdict
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Member
from kvstore.directory.runs import Run
from kvstore.errors import Corrupt
from kvstore.seams import Clock
from kvstore.spec import ModelSpec, Shard
from kvstore.types import CommitToken, Fidelity, Keys, Tier
from kvstore.wire import coordinator_pb2
from kvstore.wireform import member_from_wire

OWN = "own:"
"""Holders that stand for a worker's blocks put by this client and not in the view yet."""


class View:
    """One stream's view. Messages in, plans out; synchronous."""

    def __init__(self, entries_max: int, own_max: int) -> None:
        self.directory = Directory(blocks_max=entries_max + own_max)
        self.inbox = Inbox(self.directory)
        self.members: dict[str, Member] = {}
        self.complete = False
        self.ready = False  # everything of the beginning is in

    def take(self, message: coordinator_pb2.WatchReply) -> None:
        """Mutates. Corrupt where it does not fit what came before: the view is of no more use then."""
        for entry in message.dictionary:
            known = entry_from_wire(entry)
            if isinstance(known, ModelSpec):
                self.directory.learn_spec(known)
            else:
                self.directory.learn_shard(known)
        kind = message.WhichOneof("body")
        if kind == "member":
            self._member(message.member)
        elif kind == "state":
            self.complete, self.ready = message.state.complete, True
        elif kind in ("delta", "snapshot"):
            receiver = self.inbox.open(message.worker, message.epoch)
            if receiver is None:
                return  # of a life that is over
            if kind == "delta":
                verdict = receiver.offer(delta_from_wire(message.delta))
            else:
                verdict = receiver.snapshot(chunk_from_wire(message.snapshot))
            if verdict == Verdict.GAP:
                raise Corrupt(f"the watch has a gap in the changes of {message.worker}")

    def _member(self, message: coordinator_pb2.WatchMember) -> None:
        member = member_from_wire(message.member)
        known = self.members.get(member.id)
        if known is not None and member.epoch < known.epoch:
            return
        if message.gone or (known is not None and member.epoch > known.epoch):
            self.inbox.forget(member.id)
            self.members.pop(member.id, None)
        if message.gone:
            return
        self.members[member.id] = member
        for holder in (member.id, OWN + member.id):
            if message.hidden:
                self.directory.hide(holder)
            else:
                self.directory.show(holder)

    # --- queries: pure ---------------------------------------------------------------------------------------------

    def applied(self, token: CommitToken) -> bool:
        """Whether a commit is in, or its life is over."""
        member = self.members.get(token.worker)
        if member is not None and member.epoch > token.epoch:
            return True
        receiver = self.inbox.get(token.worker, token.epoch)
        return receiver is not None and receiver.applied >= token.seq

    def over(self, token: CommitToken) -> bool:
        """Whether the view need not be told of a commit of this client any more."""
        return token.worker not in self.members or self.applied(token)

    def match(
        self, spec: ModelSpec, keys: Sequence[bytes], packed: Keys, shards: tuple[Shard, ...], least: Fidelity
    ) -> HitPlan:
        """As a coordinator answers. `packed` are the same keys."""
        found = self.directory.match(spec.root, packed, shards, least)
        runs, holders = [], {}
        for run in found.runs:
            holder = run.holder.removeprefix(OWN)
            member = self.members.get(holder)
            if member is not None:
                holders[holder] = member
                runs.append(
                    PlanRun(holder, run.shard, run.tier, run.fidelity, run.first_depth, run.count, run.stored_bytes)
                )
        blocks = tuple(keys) if found.blocks == len(keys) else tuple(keys[: found.blocks])
        return HitPlan(spec, blocks, shards, least, tuple(runs), holders, (), self.complete)


@dataclass(frozen=True, slots=True)
class _Own:
    token: CommitToken
    until: float
    spec: ModelSpec
    shard: Shard
    run: Run


class OwnCommits:
    """What this client put and a view may not have yet: at most `blocks_max`, each until its change is applied, its
    epoch is over, or a lease has passed."""

    def __init__(self, clock: Clock, lease_s: float, blocks_max: int) -> None:
        self._clock, self._lease_s, self._blocks_max = clock, lease_s, blocks_max
        self._kept: deque[_Own] = deque()  # oldest first
        self._blocks = 0

    def add(
        self, view: View | None, token: CommitToken, spec: ModelSpec, shard: Shard, keys: Iterable[bytes],
        fidelity: Fidelity, stored_bytes: int,
    ) -> None:  # fmt: skip
        """Mutates, the view too."""
        mine = tuple(keys)[: self._blocks_max]
        if not mine:
            return
        run = Run(spec.root, shard.digest, Tier.HOT, fidelity, spec.root, 0, mine, spec.root, stored_bytes)
        own = _Own(token, self._clock.monotonic() + self._lease_s, spec, shard, run)
        self._kept.append(own)
        self._blocks += len(mine)
        while self._blocks > self._blocks_max:
            self._drop(view, self._kept.popleft())
        if view is not None:
            self._lay(view, own)

    def lay_over(self, view: View) -> None:
        """Everything kept, over a new view. Mutates the view."""
        for own in self._kept:
            self._lay(view, own)

    def tidy(self, view: View) -> None:
        """Let go of what the view has by now. Mutates both."""
        now = self._clock.monotonic()
        if not self._kept or (self._kept[0].until > now and not view.over(self._kept[0].token)):
            return
        gone = [own for own in self._kept if own.until <= now or view.over(own.token)]
        kept = [own for own in self._kept if not (own.until <= now or view.over(own.token))]
        self._kept = deque(kept)
        for own in gone:
            self._drop(view, own)
        for own in kept:  # a block that was put twice
            self._lay(view, own)

    def has(self, token: CommitToken) -> bool:
        """Whether a commit is laid over. Pure."""
        life = (token.worker, token.epoch)
        return any((own.token.worker, own.token.epoch) == life and own.token.seq >= token.seq for own in self._kept)

    def _lay(self, view: View, own: _Own) -> None:
        view.directory.learn_spec(own.spec)
        view.directory.learn_shard(own.shard)
        view.directory.add(OWN + own.token.worker, replace(own.run))

    def _drop(self, view: View | None, own: _Own) -> None:
        self._blocks -= len(own.run.keys)
        if view is not None:
            view.directory.remove(OWN + own.token.worker, own.run.shard, own.run.keys)
