"""Watches one worker's store from inside: what a reader holds stays as it was (I2), what residency says is so (I3, I4).

It looks at the store's own books, because no caller could ever see most of what would go wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.arena import generation_at
from kvstore.checksum import xxh3
from kvstore.errors import DataError
from kvstore.format import Record, expect
from kvstore.holds import Placed
from kvstore.store import TieredStore
from tests.sim.oracle import Oracle, Violation
from tests.sim.shape import NAMESPACES


class Witness:
    """One per life of a worker."""

    def __init__(self, store: TieredStore) -> None:
        self.store = store
        self._held: dict[int, list[tuple[Placed, int]]] = {}  # hold -> (block, checksum of its bytes when taken)
        holds = store.opening.holds
        self._watch(holds)

    def _watch(self, holds: Any) -> None:
        take: Callable[..., Placed] = holds.take
        end: Callable[[int], bool] = holds.end

        def taken(id: int, *args: Any, **options: Any) -> Placed:
            placed = take(id, *args, **options)
            self._held.setdefault(id, []).append((placed, xxh3(placed.view)))
            return placed

        def ended(id: int) -> bool:
            for placed, checksum in self._held.pop(id, ()):
                _unchanged(placed, checksum)
            return end(id)

        holds.take, holds.end = taken, ended

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
        counters = self.store.stack.counters
        if counters["corrupt"] or counters["replaced"] or counters["purged"]:
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
