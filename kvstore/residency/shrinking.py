"""A copy gives up planes where it lies: part of residency, over the same rows and counts."""

from __future__ import annotations

from kvstore.residency.residency import Residency
from kvstore.types import Fidelity, Location


def shrink(residency: Residency, row: int, level: int, location: Location, stored: Fidelity) -> Location:
    """A block's copy at a level is one with fewer planes from now on; where the one before it lay. The policy is not
    told: who leaves when is no question of planes. Mutates."""
    rows, rule = residency.rows, residency.levels[level]
    assert residency.staying(row, level) and stored < rows.worth(row, level), f"row {row} has no such plane there"
    before = rows.location(row, level)
    less = rule.footprint(before.length) - rule.footprint(location.length)
    residency.used[level] -= less
    residency.held[residency.namespace(row)][level] -= less
    rows.set_location(row, level, location)
    rows.planes[level][row] = (1 << stored) - 1
    rows.settle_fidelity(row)
    return before
