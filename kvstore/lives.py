"""The lives of a directory's holders: numbers for entries to point at, and what each left behind. Internal to it.

A holder's entries belong to one life. A snapshot is taken in as a second, staged one; the one it replaces, or that of
a holder that is dropped, is dead: out of all answers by its status, its entries swept later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from kvstore.entries import OWNERS_MAX, copy_by
from kvstore.errors import Overloaded
from kvstore.keyspaces import Table


class Status(IntEnum):
    FREE = 0
    VISIBLE = 1
    HIDDEN = 2
    STAGED = 3
    DEAD = 4


@dataclass(slots=True)
class Life:
    """One life of a holder. `log` has at least the keys it owns, per table; some may be stale or twice there."""

    name: str
    owner: int
    live: int = 0  # entries owned
    logged: int = 0  # keys in the log
    log: dict[Table, list[bytes]] = field(default_factory=dict)
    staged: Life | None = None  # a replacement being taken in

    def compact(self) -> None:
        """Rebuild the log once most of it is stale: amortised O(1) per removal."""
        if self.logged <= 2 * self.live + 1024:
            return
        log: dict[Table, list[bytes]] = {}
        for table, keys in self.log.items():
            owned = [key for key in dict.fromkeys(keys) if copy_by(table.blocks.get(key), self.owner) is not None]
            if owned:
                log[table] = owned
        self.log = log
        self.logged = sum(map(len, log.values()))


class Lives:
    """Owner numbers, handed out again once nothing points at them."""

    def __init__(self) -> None:
        self.status = bytearray()  # owner -> Status
        self.dead: deque[Life] = deque()
        self.left = 0  # entries of the dead that may be left
        self._lives: list[Life | None] = []  # None where free
        self._free: list[int] = []

    def new(self, name: str, status: Status) -> Life:
        """Overloaded where all numbers are taken."""
        if self._free:
            owner = self._free.pop()
        elif len(self._lives) < OWNERS_MAX:
            owner = len(self._lives)
            self._lives.append(None)
            self.status.append(Status.FREE)
        else:
            raise Overloaded(f"{OWNERS_MAX} holders are known or not yet swept: use fewer holders")
        life = self._lives[owner] = Life(name, owner)
        self.status[owner] = status
        return life

    def name(self, owner: int) -> str:
        """Of an owner that an entry points at."""
        life = self._lives[owner]
        assert life is not None, "an entry points at a free owner"
        return life.name

    def bury(self, life: Life) -> None:
        self.status[life.owner] = Status.DEAD
        self.dead.append(life)
        self.left += life.logged

    def next_batch(self, budget: int) -> tuple[Life, Table, list[bytes]] | None:
        """Up to `budget` entries of a dead life, taken off its log: the caller removes them. None: no dead are left."""
        while self.dead:
            life = self.dead[0]
            if not life.log:
                self.dead.popleft()
                self.status[life.owner] = Status.FREE
                self._lives[life.owner] = None
                self._free.append(life.owner)
                continue
            table, keys = next(reversed(life.log.items()))
            batch = keys[-budget:]
            del keys[-budget:]
            if not keys:
                del life.log[table]
            life.logged -= len(batch)
            self.left -= len(batch)
            return life, table, batch
        return None

    def validate(self, current: list[Life]) -> None:
        """AssertionError where an invariant is broken. `current`: all lives that are not dead."""
        known = sorted(life.owner for life in [*current, *self.dead])
        assert known == [life.owner for life in self._lives if life is not None], "a life that belongs to nobody"
        assert sorted([*known, *self._free]) == list(range(len(self._lives))), "an owner is lost or in use twice"
        assert all(self.status[owner] == Status.FREE for owner in self._free), "a free owner has a status"
        assert all(self.status[life.owner] == Status.DEAD for life in self.dead), "a dead life has a status"
        assert self.left == sum(life.logged for life in self.dead), "entries of the dead are counted wrong"
