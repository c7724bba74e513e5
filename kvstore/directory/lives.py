"""The lives of a directory's holders: numbers for copies to point at. Internal to it.

A holder's copies belong to one life. A snapshot is taken in as a second, staged one; the one it replaces, or that of
a holder that is dropped, is dead: out of all answers by its status, its copies swept later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from kvstore.directory.block_table import BlockTable
from kvstore.directory.entries import OWNERS_MAX
from kvstore.errors import Overloaded


class Status(IntEnum):
    """As the kernels know them."""

    FREE = 0
    VISIBLE = 1
    HIDDEN = 2
    STAGED = 3
    DEAD = 4


@dataclass(slots=True)
class Life:
    """One life of a holder."""

    name: str
    owner: int
    staged: Life | None = None  # a replacement being taken in


class Lives:
    """Owner numbers, handed out again once nothing points at them."""

    def __init__(self, blocks: BlockTable) -> None:
        self._blocks = blocks
        self.status = blocks.status  # uint8, by owner
        self.dead: dict[int, Life] = {}
        self._lives: list[Life | None] = [None]  # by owner; None where free, and for 0, which is nobody
        self._free: list[int] = []

    def new(self, name: str, status: Status) -> Life:
        """Overloaded where all numbers are taken."""
        if not self._free and len(self._lives) > OWNERS_MAX:
            self._blocks.sweep(self._blocks.slots_max)
            self.reclaim()
        if self._free:
            owner = self._free.pop()
        elif len(self._lives) <= OWNERS_MAX:
            owner = len(self._lives)
            self._lives.append(None)
        else:
            raise Overloaded(f"{OWNERS_MAX} holders are known: use fewer holders")
        life = self._lives[owner] = Life(name, owner)
        self.status[owner] = status
        return life

    def owned(self, life: Life) -> int:
        """Copies that are this life's."""
        return int(self._blocks.owned[life.owner])

    def name(self, owner: int) -> str:
        """Of an owner that a copy points at."""
        life = self._lives[owner]
        assert life is not None, "a copy points at a free owner"
        return life.name

    def bury(self, life: Life) -> None:
        """Its copies are in no answer from now on. O(1)."""
        self.status[life.owner] = Status.DEAD
        self.dead[life.owner] = life
        self._blocks.count_dead(life.owner)

    def reclaim(self) -> None:
        """Free the numbers of the dead that left nothing any more."""
        for owner in [owner for owner in self.dead if not self._blocks.owned[owner]]:
            del self.dead[owner]
            self.status[owner] = Status.FREE
            self._lives[owner] = None
            self._free.append(owner)

    @property
    def limit(self) -> int:
        """All numbers in use are below."""
        return len(self._lives)

    def validate(self, current: Iterable[Life]) -> None:
        """AssertionError where an invariant is broken. `current`: all lives that are not dead."""
        known = sorted(life.owner for life in [*current, *self.dead.values()])
        assert known == [life.owner for life in self._lives if life is not None], "a life that belongs to nobody"
        assert sorted([*known, *self._free]) == list(range(1, len(self._lives))), "an owner is lost or in use twice"
        assert all(self.status[owner] == Status.FREE for owner in self._free), "a free owner has a status"
        assert not any(self._blocks.owned[owner] for owner in self._free), "a free owner has copies"
        assert all(self.status[owner] == Status.DEAD for owner in self.dead), "a dead life has a status"
