"""What a coordinator knows: members, and a directory per namespace. Soft state; synchronous, `now` is passed in."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from coordinator.repair import Repair
from coordinator.turns import Turns
from coordinator.watch import Watchers
from kvstore.client.plan import REDIS_HOLDER, is_redis
from kvstore.config import CoordinatorConfig
from kvstore.directory.announce import Inbox, Receiver
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Accepted, Event, Fenced, Freed, Member, Membership, Returned, State, Unknown
from kvstore.directory.replicas import Copies
from kvstore.errors import BadRequest
from kvstore.types import CommitToken
from kvstore.wire import common_pb2
from kvstore.wireform import member_to_wire

STALL_SHARE = 1 / 3
"""Of a lease: a tick that comes later than this makes the coordinator doubt itself before others."""

SWEEP_SLOTS = 1 << 16
"""Of each directory, looked at with every tick for what holders that are gone have left: a few milliseconds."""


class Registry:
    """Members and directories of the namespaces that the policy grants. All methods but the queries mutate.

    `seed`: a number nobody else knows. `copies`: of the namespaces that want more than one.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        namespaces: Sequence[str],
        now: float,
        *,
        seed: int = 0,
        copies: Mapping[str, Copies] | None = None,
    ) -> None:
        blocks_max = max(1, config.blocks_max // max(1, len(namespaces)))
        self.inboxes = {name: Inbox(Directory(blocks_max=blocks_max, seed=seed)) for name in namespaces}
        self.membership = Membership(
            config.lease_s,
            config.lease_s * STALL_SHARE,
            slow_start_s=config.slow_start_s,
            workers_max=config.workers_max,
        )
        self.statuses: dict[str, common_pb2.WorkerStatus] = {}
        self.counters: Counter[str] = Counter()
        self.watchers = Watchers(config)
        self.turns = Turns(config.snapshots_max, config.lease_s)
        self._members: dict[str, Member] = {}  # as they registered
        self._shown: dict[str, tuple[Member, common_pb2.Member]] = {}  # as they were when last asked for
        directories = {name: inbox.directory for name, inbox in self.inboxes.items()}
        self.repair = Repair(config, copies or {}, directories, self.membership, self._members.get)
        self._whole_at = now + config.lease_s
        self._renewed: dict[str, int] = {}  # worker -> the epoch it came with, until all it has is known
        self._waiting: dict[str, dict[asyncio.Future[None], None]] = {name: {} for name in namespaces}

    # --- members ---------------------------------------------------------------------------------------------------

    def register(self, member: Member, heads: Mapping[str, int], now: float) -> Accepted | Fenced:
        """A worker, or Redis as one holder, says who it is. BadRequest for an id that can't be one. Overloaded."""
        if not member.id or member.epoch < 1:
            raise BadRequest("a member needs an id and an epoch of 1 or more")
        if is_redis(member.id) and any(member.id != REDIS_HOLDER + name for name in heads):
            raise BadRequest(f"{member.id} may announce its own namespace only")
        if self._forgetful(member, heads):
            self.counters["forgetful_lives"] += 1
            return Fenced(member.epoch)
        outcome = self.membership.register(member.id, member.epoch, now, empty=not any(heads.values()))
        if isinstance(outcome, Fenced):
            return outcome
        self._members[member.id] = member
        self._shown.pop(member.id, None)
        self.membership.drain(member.id, member.epoch, member.state == State.DRAINING)
        self.repair.replaced(member.id)
        for name, inbox in self.inboxes.items():
            if outcome.fresh:
                inbox.forget(member.id)
                self._renewed[member.id] = member.epoch
            if name in heads:
                receiver = inbox.open(member.id, member.epoch)
                if receiver is not None:
                    receiver.resume()
                    receiver.expect(heads[name])
            inbox.directory.show(member.id)
        self._tell(member.id, now)
        self._wake_all()
        return outcome

    def _forgetful(self, member: Member, heads: Mapping[str, int]) -> bool:
        """Whether it has given fewer numbers than it has told here: another life under the same epoch, as when a disk
        or Redis is set back to an old state. Its changes cannot be told from those of the other. Pure."""
        known = ((self.inboxes[name].get(member.id, member.epoch), head) for name, head in heads.items()
                 if name in self.inboxes)  # fmt: skip
        return any(receiver is not None and head < receiver.applied for receiver, head in known)

    def heartbeat(self, member: str, epoch: int, now: float) -> Fenced | Unknown | None:
        outcome = self.membership.heartbeat(member, epoch, now)
        if isinstance(outcome, Fenced | Unknown):
            return outcome
        self.take(outcome, now)
        return None

    def disconnected(self, accepted: Accepted, now: float) -> None:
        """Its stream has ended: hidden at once, freed after the lease."""
        self.take(self.membership.disconnected(accepted.worker, accepted.epoch, now, accepted.session), now)

    def leave(self, member: str, epoch: int, now: float) -> None:
        self.take(self.membership.leave(member, epoch), now)

    def tick(self, now: float) -> None:
        self.take(self.membership.tick(now), now)
        for inbox in self.inboxes.values():
            inbox.directory.sweep(SWEEP_SLOTS)
        for id, epoch in list(self._renewed.items()):
            lives = [receiver for inbox in self.inboxes.values() if (receiver := inbox.get(id, epoch)) is not None]
            if all(life.complete for life in lives):
                del self._renewed[id]
                self.repair.again()  # the members are the same, but what it lost has a copy too few
        self.repair.tick(now)
        self.turns.tick(now)

    def take(self, events: Iterable[Event], now: float) -> None:
        """Do to the directories what membership decided."""
        for event in events:
            self.counters[type(event).__name__.lower()] += 1
            for inbox in self.inboxes.values():
                if isinstance(event, Freed):
                    inbox.forget(event.worker)
                elif isinstance(event, Returned):
                    inbox.directory.show(event.worker)
                else:
                    inbox.directory.hide(event.worker)
            self._tell(event.worker, now, gone=isinstance(event, Freed))
            if isinstance(event, Freed):
                self._members.pop(event.worker, None)
                self._shown.pop(event.worker, None)
                self.statuses.pop(event.worker, None)
        self._wake_all()

    def _tell(self, id: str, now: float, *, gone: bool = False) -> None:
        """Watchers of the namespaces that it belongs to."""
        known = self._members.get(id) if gone else self.member(id, now)
        for name in self.inboxes if known is not None else ():
            if known is not None and (not is_redis(id) or id == REDIS_HOLDER + name):
                self.watchers.member(name, known, gone=gone)

    # --- announcements ---------------------------------------------------------------------------------------------

    def receiver(self, member: str, epoch: int, namespace: str) -> Receiver | None:
        """Where announcements of this life go; None, counted, for a namespace that does not exist here."""
        inbox = self.inboxes.get(namespace)
        if inbox is None or (is_redis(member) and member != REDIS_HOLDER + namespace):
            self.counters["foreign_namespace"] += 1
            return None
        return inbox.open(member, epoch)

    def progressed(self, namespace: str) -> None:
        """Something was applied: lookups that wait for it look again."""
        waiting, self._waiting[namespace] = self._waiting[namespace], {}
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _wake_all(self) -> None:
        for namespace in self._waiting:
            self.progressed(namespace)

    def progress(self, namespace: str) -> asyncio.Future[None]:
        """Done with the next `progressed`. As many as lookups are served at a time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[namespace][future] = None
        future.add_done_callback(lambda done: self._waiting[namespace].pop(done, None))
        return future

    # --- queries: pure ---------------------------------------------------------------------------------------------

    def applied(self, namespace: str, token: CommitToken) -> bool:
        """Whether the commit is in, or its life is over and nothing is to be waited for."""
        if self.membership.epoch(token.worker) > token.epoch:
            return True
        receiver = self.inboxes[namespace].get(token.worker, token.epoch)
        return receiver is not None and receiver.applied >= token.seq

    def complete(self, namespace: str, now: float) -> bool:
        """Whether everybody who lives had the time to register, and what they announced is in."""
        if now < self._whole_at:
            return False
        behind = [receiver.holder for receiver in self.inboxes[namespace].receivers() if not receiver.complete]
        return not behind or set(behind).isdisjoint(self.membership.alive())  # nearly always nobody: every lookup asks

    def member(self, id: str, now: float) -> Member | None:
        """As it is now. None: not a member."""
        shown = self._show(id, now)
        return shown[0] if shown is not None else None

    def member_on_wire(self, id: str, now: float) -> common_pb2.Member | None:
        """`member` as a message, which is not to be changed."""
        shown = self._show(id, now)
        return shown[1] if shown is not None else None

    def _show(self, id: str, now: float) -> tuple[Member, common_pb2.Member] | None:
        """Made anew only where something has changed: every lookup asks for it. Mutates what is remembered."""
        state = self.membership.state(id)
        if state is None:
            return None
        slow_start, shown = self.membership.slow_start(id, now), self._shown.get(id)
        if shown is None or shown[0].state != state or shown[0].slow_start != slow_start:
            known = self._members.get(id)
            if known is None:
                return None
            known = replace(known, state=state.value, slow_start=slow_start)
            shown = self._shown[id] = (known, member_to_wire(known))
        return shown

    def members(self, namespace: str, now: float) -> list[Member]:
        """Workers, and the namespace's own Redis."""
        found = (self.member(id, now) for id in self.membership.members())
        return [m for m in found if m is not None and (not is_redis(m.id) or m.id == REDIS_HOLDER + namespace)]

    def lag(self) -> int:
        """Changes that members who live have told of and that are not in yet."""
        alive = dict.fromkeys(self.membership.alive())
        receivers = (r for inbox in self.inboxes.values() for r in inbox.receivers() if r.holder in alive)
        return sum(max(0, receiver.head - receiver.applied) for receiver in receivers)

    def blocks(self, namespaces: Iterable[str]) -> int:
        return sum(self.inboxes[name].directory.blocks for name in namespaces)
