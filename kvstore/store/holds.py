"""Holds: blocks that a reader has open. They stay where they are until the hold ends, by release or by age."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.header import Header
from kvstore.seams import Segment
from kvstore.store.arena import Slot
from kvstore.store.stack import Stack
from kvstore.types import Fidelity, Tier


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an open block lies: raw bytes in canonical order, or a stored record that the reader decodes."""

    header: Header
    tier: Tier  # that served it
    raw: bool
    segment: Segment
    segment_id: int
    data_offset: int  # of the segment: the generation table lies before it
    offset: int  # from the segment's start
    length: int
    generation: int  # of the unit at `offset`, to be found unchanged after reading

    @property
    def view(self) -> memoryview:
        """The bytes, for readers of this process."""
        return self.segment.view[self.offset : self.offset + self.length]


@dataclass(slots=True)
class Hold:
    """What `open` answers: `blocks[i]` of the i-th wanted block, None for a miss. Ends with `release(id)`."""

    id: int
    blocks: list[Placed | None]


@dataclass(slots=True)
class Held:
    """What a hold keeps in place."""

    expires: float
    rows: list[int] = field(default_factory=list)  # pinned once each
    slots: list[Slot] = field(default_factory=list)  # held in the arena once each


class Holds:
    """All holds of a store. Synchronous."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._held: dict[int, Held] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._held)

    def begin(self) -> int:
        """A new, empty hold. Mutates."""
        id = self._next_id
        self._next_id += 1
        self._held[id] = Held(self.stack.system.clock.monotonic() + self.stack.config.hold_max_s)
        return id

    def take(self, id: int, row: int, least: Fidelity, tier: Tier | None = None, *, pinned: bool = False) -> Placed:
        """Pin a block that lies in the arena, worth at least so much, under a hold; `pinned`: the caller's pin becomes
        the hold's. Mutates.

        `tier` is what served it, where that is not the level it lies at.
        """
        stack = self.stack
        level = stack.mapped(row, least)
        assert level is not None, f"row {row} is not in the arena"
        held, slot = self._held[id], stack.slot(row, level)
        assert slot is not None
        if not pinned:
            stack.residency.pin(row)
        held.rows.append(row)
        generation = stack.arena.hold(slot)
        held.slots.append(slot)
        header = stack.residency.rows.header_at(row, level)
        raw, segment = stack.residency.levels[level].raw, stack.arena.segment(slot.segment)
        return Placed(
            header=header.unencoded() if raw else header,
            tier=tier or stack.residency.levels[level].tier,
            raw=raw,
            segment=segment.segment,
            segment_id=slot.segment,
            data_offset=segment.data_offset,
            offset=slot.offset,
            length=slot.length,
            generation=generation,
        )

    def end(self, id: int) -> bool:
        """Let go of everything; whether the hold was there. Mutates; idempotent."""
        held = self._held.pop(id, None)
        if held is None:
            return False
        for slot in held.slots:
            self.stack.arena.release(slot)
        for row in held.rows:
            self.stack.residency.unpin(row)
        return True

    def alive(self, id: int) -> bool:
        return id in self._held

    def expire(self) -> int:
        """End the holds that are too old; how many. From then on generations protect their readers. Mutates."""
        now = self.stack.system.clock.monotonic()
        late = [id for id, held in self._held.items() if held.expires <= now]
        for id in late:
            self.end(id)
        return len(late)

    def end_all(self) -> None:
        for id in list(self._held):
            self.end(id)
