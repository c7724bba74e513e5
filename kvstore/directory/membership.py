"""Who is a member: events in, instructions out. No socket, no clock: `now` is passed in, in seconds, monotonic.

    register --> alive --connection lost, or silent for suspect_s--> suspect (its entries are hidden at once)
                   ^  \\                                               |   \\
                   |   `--leave--> gone (dropped at once)              |    `--lease_s later--> freed (dropped)
                   `-----------heartbeat or register, same epoch-------'

Only a newer epoch fences an older one. A coordinator whose own `tick` comes late has been asleep itself: it hands out
a fresh lease to everyone before it suspects or frees anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvstore.errors import Overloaded


class State(StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Member:
    """What others must know of a worker (or of Redis as one holder) to reach it."""

    id: str  # worker id, or "redis:NAMESPACE"
    epoch: int = 0
    address: str = ""  # gRPC target; empty for Redis
    socket: str = ""  # path of the local socket; empty where there is none
    host: str = ""  # boot id of the machine
    node: str = ""  # a name for people
    state: str = State.ALIVE
    slow_start: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    """The worker is a member from now on. Where `fresh`, whatever a directory knows of it is of an older life: drop it.

    `session` names this registration: a `disconnected` of an earlier one no longer counts.
    """

    worker: str
    epoch: int
    session: int
    fresh: bool
    slow_start: bool


@dataclass(frozen=True, slots=True)
class Fenced:
    """A higher epoch is known: the worker takes `epoch` + 1 and registers again. Nothing has changed."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """Not a member (any more): the worker has to register. Nothing has changed."""

    worker: str


@dataclass(frozen=True, slots=True)
class Suspected:
    """Hide its entries."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Returned:
    """Show its entries again: they were only hidden."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Freed:
    """Drop its entries: the lease is over, or it left."""

    worker: str
    epoch: int


Event = Suspected | Returned | Freed


@dataclass(slots=True)
class _Life:
    """One member in one epoch."""

    epoch: int
    session: int
    heard: float
    suspected: float | None  # since when; None: alive
    slow_until: float
    draining: bool = False


class Membership:
    """The members of one coordinator. All methods but the queries mutate; none waits.

    `workers_max` bounds the members; epochs of `epochs_max` workers that are gone are remembered so that an older
    life stays fenced.
    """

    def __init__(
        self,
        lease_s: float,
        self_stall_s: float,
        *,
        suspect_s: float | None = None,
        slow_start_s: float = 30.0,
        workers_max: int = 4096,
        epochs_max: int = 65536,
    ) -> None:
        self.lease_s = lease_s
        self.self_stall_s = self_stall_s
        self.suspect_s = lease_s / 2 if suspect_s is None else suspect_s
        self.slow_start_s = slow_start_s
        self.workers_max = workers_max
        self.epochs_max = epochs_max
        self.stalls = 0  # times this coordinator found itself late
        self._members: dict[str, _Life] = {}
        self._gone: dict[str, int] = {}  # worker -> last epoch; disjoint from _members, oldest first
        self._sessions = 0
        self._ticked: float | None = None

    def register(self, worker: str, epoch: int, now: float, *, empty: bool = False) -> Accepted | Fenced:
        """A worker says who it is. `empty`: it holds nothing yet, so placement spares it for `slow_start_s`.

        Overloaded when `workers_max` others are members.
        """
        life = self._members.get(worker)
        known = life.epoch if life else self._gone.get(worker, 0)
        if epoch < known:
            return Fenced(known)
        if life is None and len(self._members) >= self.workers_max:
            raise Overloaded(
                f"{self.workers_max} workers are registered already: raise workers_max or use fewer workers"
            )
        self._sessions += 1
        fresh = life is None or life.epoch != epoch
        if life is None or fresh:
            slow_until = now + self.slow_start_s if empty else now
            self._gone.pop(worker, None)
            life = self._members[worker] = _Life(epoch, self._sessions, now, None, slow_until)
        else:
            life.session, life.heard, life.suspected = self._sessions, now, None
        return Accepted(worker, epoch, life.session, fresh, life.slow_until > now)

    def heartbeat(self, worker: str, epoch: int, now: float) -> list[Event] | Fenced | Unknown:
        """A sign of life. [Returned] where it was only suspected."""
        life = self._members.get(worker)
        known = life.epoch if life else self._gone.get(worker, 0)
        if epoch < known:
            return Fenced(known)
        if life is None or epoch > life.epoch:
            return Unknown(worker)
        life.heard = now
        if life.suspected is None:
            return []
        life.suspected = None
        return [Returned(worker, epoch)]

    def disconnected(self, worker: str, epoch: int, now: float, session: int | None = None) -> list[Event]:
        """Its connection is gone: suspect at once. Nothing where it registered again since (`session`)."""
        life = self._members.get(worker)
        if life is None or life.epoch != epoch or life.suspected is not None:
            return []
        if session is not None and session != life.session:
            return []
        life.suspected = now
        return [Suspected(worker, epoch)]

    def leave(self, worker: str, epoch: int) -> list[Event]:
        """A clean stop: gone at once, no lease."""
        life = self._members.get(worker)
        if life is None or life.epoch != epoch:
            return []
        return [self._free(worker, life)]

    def drain(self, worker: str, epoch: int, draining: bool = True) -> None:
        """It wants no new blocks, and goes soon. Nothing where that life is not a member."""
        life = self._members.get(worker)
        if life is not None and life.epoch == epoch:
            life.draining = draining

    def tick(self, now: float) -> list[Event]:
        """To be called several times a lease. Who went silent is suspected; who was suspect for a lease is freed."""
        late = self._ticked is not None and now - self._ticked > self.self_stall_s
        self._ticked = now
        if late:
            self.stalls += 1
            for life in self._members.values():
                life.heard = now
                life.suspected = None if life.suspected is None else now
            return []
        events: list[Event] = []
        for worker, life in list(self._members.items()):
            if life.suspected is None and now - life.heard > self.suspect_s:
                life.suspected = now
                events.append(Suspected(worker, life.epoch))
            elif life.suspected is not None and now - life.suspected > self.lease_s:
                events.append(self._free(worker, life))
        return events

    def _free(self, worker: str, life: _Life) -> Freed:
        del self._members[worker]
        self._gone[worker] = life.epoch
        while len(self._gone) > self.epochs_max:
            del self._gone[next(iter(self._gone))]
        return Freed(worker, life.epoch)

    # Queries: pure.

    def current(self, worker: str, epoch: int) -> bool:
        """Whether a message of this life may change anything."""
        life = self._members.get(worker)
        return life is not None and life.epoch == epoch

    def epoch(self, worker: str) -> int:
        """The highest epoch known, 0 where none is."""
        life = self._members.get(worker)
        return life.epoch if life else self._gone.get(worker, 0)

    def state(self, worker: str) -> State | None:
        """None: not a member."""
        life = self._members.get(worker)
        if life is None:
            return None
        if life.suspected is not None:
            return State.SUSPECT
        return State.DRAINING if life.draining else State.ALIVE

    def slow_start(self, worker: str, now: float) -> bool:
        """Whether it joined empty a short while ago."""
        life = self._members.get(worker)
        return life is not None and life.slow_until > now

    def warmth(self, worker: str, now: float) -> float:
        """How far a newcomer is through its slow start, 0 to 1; 1 for everyone else."""
        life = self._members.get(worker)
        if life is None or life.slow_until <= now:
            return 1.0
        return 1.0 - (life.slow_until - now) / self.slow_start_s

    def members(self) -> list[str]:
        """Everyone whose lease runs, suspects too: what placement draws homes from. In the order of joining."""
        return list(self._members)

    def alive(self) -> list[str]:
        """Members that are not suspect."""
        return [worker for worker, life in self._members.items() if life.suspected is None]

    def validate(self) -> None:
        """AssertionError where an invariant is broken."""
        assert len(self._members) <= self.workers_max, "more members than workers_max"
        assert len(self._gone) <= self.epochs_max, "more remembered epochs than epochs_max"
        assert not any(worker in self._members for worker in self._gone), "a worker is both a member and gone"
