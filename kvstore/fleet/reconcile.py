"""What a fleet on Ray lacks, and what to do about it. Pure: nodes and actors in, starts and ends out.

An actor's name in Ray is all the state there is: who it is and where it belongs. Whoever reads the names knows the
fleet, so a reconciler that died and came back goes on where it was.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

WORKER, COORDINATOR = "worker", "coordinator"
_NAME = re.compile(r"(worker|coordinator)-(\d{1,6}) (\S+) (\S+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the Ray cluster. `slots`: workers it takes. `ip` names its machine, which several may share."""

    id: str
    ip: str
    slots: int


@dataclass(frozen=True, slots=True, order=True)
class Placed:
    """An actor and where it belongs: what its name in Ray says.

    `detail`: of a coordinator its address; of a worker its folder's number on that machine, so that whoever starts
    there again finds what an earlier one left.
    """

    role: str
    index: int
    node: str
    detail: str

    @property
    def title(self) -> str:
        """For people: "worker-0"."""
        return f"{self.role}-{self.index}"

    @property
    def actor(self) -> str:
        """Its name in Ray."""
        return f"{self.title} {self.node} {self.detail}"

    @classmethod
    def of(cls, actor: str) -> Placed | None:
        """Inverse of `actor`; None for a name that is none of ours."""
        found = _NAME.fullmatch(actor)
        return None if found is None else cls(found[1], int(found[2]), found[3], found[4])


@dataclass(frozen=True, slots=True)
class Want:
    """`workers` 0: as many as the nodes take. Coordinators stand on different nodes as far as there are some."""

    workers: int
    coordinators: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """An actor to start: its detail is drawn by whoever starts a coordinator."""

    role: str
    index: int
    node: Node
    slot: int  # of a worker, on its machine

    @property
    def title(self) -> str:
        return f"{self.role}-{self.index}"


@dataclass(frozen=True, slots=True)
class Plan:
    """`ends`: (actor, why)."""

    ends: tuple[tuple[Placed, str], ...]
    starts: tuple[Wanted, ...]
    unplaced: int  # workers wanted that no node has room for


def plan(want: Want, nodes: Sequence[Node], actors: Iterable[Placed], held: Collection[str]) -> Plan:
    """What to end and to start. `held`: ids of nodes whose worker was drained, which get none. Pure."""
    known = {node.id: node for node in nodes}
    ends = [(actor, "its node is gone") for actor in sorted(actors) if actor.node not in known]
    standing = [actor for actor in sorted(actors) if actor.node in known]
    workers = [actor for actor in standing if actor.role == WORKER]
    coordinators = [actor for actor in standing if actor.role == COORDINATOR]
    places = sorted(nodes, key=lambda node: (node.ip, node.id))
    marked = [node for node in places if node.slots] or places
    starts = _coordinators(want.coordinators, marked, coordinators, held)
    if not starts:
        ends += _crowded(marked, coordinators, held)
    more, unplaced = _workers(want.workers, places, workers, known, held)
    return Plan(tuple(ends), (*starts, *more), unplaced)


def _coordinators(
    count: int, places: Sequence[Node], standing: Sequence[Placed], held: Collection[str]
) -> list[Wanted]:
    on = Counter(actor.node for actor in standing)
    taken = {actor.index for actor in standing}
    starts = []
    for index in _free(taken, count - len(standing)):
        if not places:
            break
        node = min(places, key=lambda node: (on[node.id], node.id in held))  # the first of equals
        on[node.id] += 1
        starts.append(Wanted(COORDINATOR, index, node, 0))
    return starts


def _crowded(places: Sequence[Node], standing: Sequence[Placed], held: Collection[str]) -> list[tuple[Placed, str]]:
    """One coordinator at a time makes way for a node that has none: what it knows is told again within a lease."""
    on = Counter(actor.node for actor in standing)
    if not any(on[node.id] == 0 and node.id not in held for node in places):
        return []
    crowd = [actor for actor in standing if on[actor.node] > 1]
    return [(max(crowd), "another node has no coordinator yet")] if crowd else []


def _workers(
    count: int, places: Sequence[Node], standing: Sequence[Placed], known: dict[str, Node], held: Collection[str]
) -> tuple[list[Wanted], int]:
    on = Counter(actor.node for actor in standing)
    room = {node.id: 0 if node.id in held else max(0, node.slots - on[node.id]) for node in places}
    missing = (count - len(standing)) if count else sum(room.values())
    folders = {(known[actor.node].ip, int(actor.detail)) for actor in standing if actor.detail.isdigit()}
    starts = []
    for index in _free({actor.index for actor in standing}, min(missing, sum(room.values()))):
        node = min((node for node in places if room[node.id]), key=lambda node: on[node.id])
        slot = next(slot for slot in range(len(folders) + 1) if (node.ip, slot) not in folders)
        folders.add((node.ip, slot))
        on[node.id] += 1
        room[node.id] -= 1
        starts.append(Wanted(WORKER, index, node, slot))
    return starts, max(0, missing - len(starts))


def _free(taken: set[int], count: int) -> list[int]:
    """The lowest numbers nobody has."""
    found: list[int] = []
    index = 0
    while len(found) < count:
        if index not in taken:
            found.append(index)
        index += 1
    return found


@dataclass(slots=True)
class Backoff:
    """How long to wait before an actor that keeps ending is started again. Methods but `waits` mutate."""

    first_s: float
    max_s: float
    stable_s: float  # one that lived for so long is forgiven
    _failures: Counter[str] = field(default_factory=Counter)
    _started: dict[str, float] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)

    def started(self, title: str, now: float) -> None:
        self._started[title] = now

    def failed(self, title: str, now: float) -> float:
        """It ended by itself; seconds until it may be started again: none the first time, then ever more, bounded."""
        if now - self._started.pop(title, now) >= self.stable_s:
            self._failures[title] = 0
        count = self._failures[title]
        self._failures[title] = count + 1
        delay_s = min(self.max_s, self.first_s * 2.0 ** min(count - 1, 32)) if count else 0.0
        self._until[title] = now + delay_s
        return delay_s

    def ended(self, title: str) -> None:
        """It was ended on purpose: nothing is held against it."""
        self._failures.pop(title, None)
        self._started.pop(title, None)
        self._until.pop(title, None)

    def waits(self, title: str, now: float) -> bool:
        return now < self._until.get(title, now)
