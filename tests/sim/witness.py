"""Watches one worker's store from inside: what a reader holds stays as it was (I2), what residency says is so (I3, I4).

It looks at the store's own books, because no caller could ever see most of what would go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstore.checksum import xxh3
from kvstore.directory.runs import Change, Removed
from kvstore.errors import DataError
from kvstore.format import Record, expect
from kvstore.store.arena import generation_at
from kvstore.store.holds import Hold, Placed
from kvstore.store.tiered import TieredStore
from kvstore.store.together import Taken
from tests.sim.oracle import Oracle, Violation
from tests.sim.shape import NAMESPACES


class Witness:
    """One per life of a worker."""

    def __init__(self, store: TieredStore) -> None:
        self.store = store
        self._held: dict[int, list[tuple[Placed, int]]] = {}  # hold -> (block, checksum of its bytes when taken)
        self._moving: dict[tuple[str, bytes, bytes], None] = {}  # on their way to a lower tier of this worker
        self._problems: list[str] = []
        self._watch(store.opening.holds)
        self._watch_moves(store.movement._carrier)
        store.subscribe(self._changed)

    def _watch(self, holds: Any) -> None:
        take: Callable[..., None] = holds.take
        keep: Callable[..., None] = holds.keep
        end: Callable[[int], bool] = holds.end

        def kept(hold: Hold, at: range, taken: Taken) -> None:
            keep(hold, at, taken)
            found = [hold.placed(at[index]) for index in np.flatnonzero(taken.levels >= 0).tolist()]
            self._held.setdefault(hold.id, []).extend((placed, xxh3(placed.view)) for placed in found)

        def taken(hold: Hold, at: Sequence[int], *args: Any, **options: Any) -> None:
            take(hold, at, *args, **options)
            taken = [hold.placed(index) for index in at]
            self._held.setdefault(hold.id, []).extend((placed, xxh3(placed.view)) for placed in taken)

        def ended(id: int) -> bool:
            for placed, checksum in self._held.pop(id, ()):
                _unchanged(placed, checksum)
            return end(id)

        holds.take, holds.keep, holds.end = taken, kept, ended

    def _watch_moves(self, carrier: Any) -> None:
        carry, residency = carrier.carry, self.store.stack.residency

        async def carried(ticket: Any, destination: int) -> None:
            if destination == self.store.stack.REDIS or residency.gone(ticket.row):
                await carry(ticket, destination)
                return
            header = residency.header(ticket.row)
            id = (residency.namespace(ticket.row), header.shard, header.key)
            self._moving[id] = None
            try:
                await carry(ticket, destination)
            finally:
                self._moving.pop(id, None)

        carrier.carry = carried

    def _changed(self, namespace: str, seq: int, change: Change) -> None:
        """I4: what is on its way down is gone at no instant, unless somebody wanted it gone."""
        if isinstance(change, Removed) and (namespace, change.shard, change.key) in self._moving:
            self._problems.append("I4: a block was nowhere while it moved to a lower tier")

    def _wanted_gone(self) -> bool:
        """Whether blocks may have gone for another reason than room."""
        counters = self.store.stack.counters
        return bool(counters["purged"] or counters["corrupt"] or counters["replaced"])

    def check_moves(self) -> None:
        """I4, since the last time."""
        if self._problems and not self._wanted_gone():
            raise Violation(self._problems[0])

    def check_holds(self) -> None:
        """I2, at any moment."""
        for blocks in self._held.values():
            for placed, checksum in blocks:
                _unchanged(placed, checksum)

    def check_blocks(self, oracle: Oracle) -> None:
        """I3, I4, I10 at any moment: every copy in the arena has a live slot of its own, in a segment of its namespace,
        with the bytes of one put; I5: so has everything that recovery brought back, by its checksum."""
        stack, owners = self.store.stack, {}
        residency = stack.residency
        for namespace in NAMESPACES:
            for row in residency.of(namespace):
                header = residency.header(row)
                if not oracle.is_copy(namespace, header.shard, header.key, header.copy_id):
                    raise Violation(f"I5: {namespace} has a block of a copy that nobody put")
                for level in (stack.HOT, stack.HOST):
                    if not residency.present(row, level):
                        continue
                    slot, tier = stack.slot(row, level), stack.arena_tier(level)
                    assert slot is not None and tier is not None
                    if owners.setdefault((slot.segment, slot.offset), row) != row:
                        raise Violation("I3: two blocks have one slot")
                    if stack.arena.segment(slot.segment).namespace != namespace:
                        raise Violation(f"I10: a block of {namespace} lies in a segment of another namespace")
                    view = tier.view(residency.location(row, level))
                    raw = residency.levels[level].raw
                    if not (xxh3(view) == header.copy_id if raw else _is_record(view, header)):
                        raise Violation(f"I4: a block of {tier.tier.name} no longer has its bytes")

    def check_pins(self) -> None:
        """I2: what is pinned is there, unless its bytes were damaged, or it was purged, or a better copy came."""
        if self._wanted_gone():
            return
        for pin in self.store.pins._pins.values():
            if any(self.store.stack.residency.gone(row) for row in pin.rows):
                raise Violation("I2: a pinned block is gone")


def _unchanged(placed: Placed, checksum: int) -> None:
    if generation_at(placed.segment.view, placed.data_offset, placed.offset) != placed.generation:
        raise Violation("I2: the generation of a held block has changed")
    if xxh3(placed.view) != checksum:
        raise Violation("I2: the bytes of a held block have changed")


def _is_record(view: memoryview, header: Any) -> bool:
    try:
        record = Record.parse(view)
        expect(record.header, header)
        record.verify()
    except DataError:
        return False
    return True
