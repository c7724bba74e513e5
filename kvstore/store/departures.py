"""What leaves a level, and how: one decision for a run of consecutive blocks of a prefix. Pure; `Movement` does it.

A run is given up where nothing is lost by it, or nothing below takes it; it moves to the level where it is not the next
to leave; or, where a plane of some block is worth less beside its bytes than the run is, planes go instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstore.codecs import PLANES_MAX
from kvstore.residency.together import together
from kvstore.residency.victims import margin
from kvstore.store.room import Outlets
from kvstore.store.stack import Stack


class Way(Enum):
    DROP = "drop"  # the copies are given up
    THIN = "thin"  # they lose planes where they lie
    MOVE = "move"


@dataclass(frozen=True, slots=True)
class Departure:
    """Rows, the deepest first, and what becomes of all of them."""

    rows: list[int]
    level: int
    way: Way
    destinations: list[int]  # of a move: those that take it, the nearest first
    planes: int = PLANES_MAX  # leading ones that are left


class Departures:
    """One per store."""

    def __init__(self, stack: Stack, outlets: Outlets) -> None:
        self.stack = stack
        self.outlets = outlets

    def next(self, level: int, nbytes: int, *, give_up: bool) -> Departure | None:
        """What leaves a level so that `nbytes` are free, or the first part of it; None where nothing may. `give_up`:
        last copies too, where nothing below takes them."""
        residency = self.stack.residency
        last = self.outlets.evicts(level)
        row = residency.victim(level, force=not last)
        if row is None:
            return None
        if residency.elsewhere(row, level):
            return Departure(together(residency, row, level, nbytes), level, Way.DROP, [])
        thin = self.thinner(level, nbytes) if last else None
        if thin is not None:
            return thin
        if not (last and give_up) and not self.outlets.open(level):
            return None
        run = together(residency, row, level, nbytes)
        return Departure(run, level, Way.DROP, []) if last and give_up else self.move(run, level)

    def move(self, rows: list[int], level: int) -> Departure:
        """Where a run goes: no destination where nothing below works now, or is within its namespace's quota at all."""
        stack, row = self.stack, rows[0]
        namespace, nbytes = stack.residency.namespace(row), stack.length(row, level)
        below = self.outlets.open(level)
        destinations = [destination for destination in below if stack.takes(destination, namespace, nbytes)]
        while len(destinations) > 1 and self._passes_by(row, destinations[0], nbytes):
            del destinations[0]
        planes = self._planes(row, level, destinations[0], nbytes) if destinations else PLANES_MAX
        return Departure(rows, level, Way.MOVE, destinations, planes)

    def _full(self, level: int, nbytes: int) -> bool:
        """Whether a level would have to give something up for so many bytes more."""
        residency = self.stack.residency
        staying = residency.used[level] - residency.leaving_bytes[level]
        return staying + nbytes > self.stack.config.high_watermark * residency.levels[level].capacity

    def _passes_by(self, row: int, level: int, nbytes: int) -> bool:
        """Whether a block would be the next to leave a level it came to, so that it had better go further down at once:
        the level's room is for what is expected to be used more."""
        if level >= self.stack.REDIS or not self._full(level, nbytes):
            return False
        more = margin(self.stack.residency, row, level)
        return more is not None and more < 0

    def _planes(self, row: int, level: int, destination: int, nbytes: int) -> int:
        """Leading planes that a run brings along: all, except where it comes to the last level and that is full."""
        planes = self.stack.planes
        last = destination < self.stack.REDIS and self.outlets.evicts(destination)
        if not last or not planes.any_at(destination) or not self._full(destination, nbytes):
            return PLANES_MAX
        return planes.carried(row, level, destination)

    def thinner(self, level: int, nbytes: int) -> Departure | None:
        """Planes to give up so that `nbytes` are free, or the first part of it, rather than whoever leaves the last
        level next; None where there are none, or they are worth more beside their bytes. Mutates `Planes`."""
        stack, residency = self.stack, self.stack.residency
        if not stack.planes.any_at(level) or stack.arena_tier(level) is None or not self.outlets.evicts(level):
            return None  # what lies on a disk is not written again for it
        row = residency.victim(level)
        price = None if row is None else stack.planes.price(row, level)
        thin = None if price is None else stack.planes.cheapest(level, price)
        if thin is None:
            return None
        row, left = thin
        return Departure(stack.planes.alike(row, level, nbytes, left), level, Way.THIN, [], left)
