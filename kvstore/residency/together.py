"""Who leaves a level together: a run of consecutive blocks of a prefix, for which one decision holds. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.residency.rows import NONE

if TYPE_CHECKING:
    from kvstore.residency.residency import Residency

RUN_BLOCKS_MAX = 32
"""Of one decision: as many as a placement group has."""


def together(residency: Residency, row: int, level: int, nbytes: int) -> list[int]:
    """`row`, which leaves a level next, then its parent, and so on: as long as each would be next when the one before
    is gone, and is like it in all that a decision looks at. No more than `nbytes` ask for, but one. Pure."""
    rows, rule = residency.rows, residency.levels[level]
    run, freed = [row], rule.footprint(rows.length[level][row])
    if not residency.may_leave(row, level):
        return run  # forced out before its children: they are next, not its parent
    while freed < nbytes and len(run) < RUN_BLOCKS_MAX:
        above = rows.parent[row]
        if above == NONE or not _goes_along(residency, above, row, level):
            break
        run.append(above)
        freed += rule.footprint(rows.length[level][above])
        row = above
    return run


def _goes_along(residency: Residency, above: int, row: int, level: int) -> bool:
    """Whether a parent is as its child is, may leave when that is gone, and is next then. Pure."""
    rows = residency.rows
    alike = (rows.present[above], rows.leaving[above], rows.planes[level][above], rows.secondary[above]) == (
        rows.present[row], rows.leaving[row], rows.planes[level][row], rows.secondary[row],
    )  # fmt: skip
    if not alike or rows.pins[above] or rows.busy[above] or rows.below[level][above] > 1:
        return False
    policy = residency.secondaries[level] if rows.secondary[row] else residency.policies[level]
    if policy.order(above) <= policy.order(row) + 1:
        return True  # nobody stands between them
    worth = policy.worth(row)
    return worth is not None and policy.worth(above) == worth
