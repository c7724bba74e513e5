"""Who leaves in a window or state block's stead, and whom the policies can not name. Pure.

A prefix needs the last `window` blocks of a sliding-window group, the last one of a state group, and every block of a
full-attention group (`kvstore.directory.matching`). So a window or state block that a policy names goes by itself where
each prompt through it has what it needs deeper down. Else it is what the end of some prompt hangs on: that end leaves
first, from its last full-attention block on, and the named block is next in line when its own is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstore.residency.rows import NONE

if TYPE_CHECKING:
    from kvstore.residency.residency import Residency

LOOKED_AT = 1024
"""Blocks below a named one that are looked at; beyond them it goes by itself."""


def instead(residency: Residency, row: int, level: int) -> int:
    """Who leaves a level before the window or state block `row` does: the deepest full-attention block that may and
    that no match reaches without `row`; itself where there is none, or where it is not the last copy. Pure."""
    rows = residency.rows
    if rows.leaf_first[row] or residency.elsewhere(row, level):
        return row
    first = row
    for full in namesakes(residency, row, leaf_first=True):
        end = _end(residency, full, row)
        while end not in (NONE, full) and not residency.may_leave(end, level):
            end = rows.parent[end]  # pinned, or in another level already
        if end == NONE or not residency.may_leave(end, level) or rows.secondary[end] < rows.secondary[row]:
            continue
        if first == row or rows.depth[end] > rows.depth[first]:
            first = end
    return first


def margin(residency: Residency, row: int, level: int) -> int | None:
    """What a block is worth more than the next to leave a level, if it came there; None where no policy can tell, or
    that one leaves whatever comes. Pure."""
    rival, secondary = residency.victim(level), residency.rows.secondary
    if rival is None or secondary[rival] or secondary[row]:
        return None
    mine, other = (residency.policies[level].worth(each) for each in (row, rival))
    return None if mine is None or other is None else mine - other


def namesakes(residency: Residency, row: int, *, leaf_first: bool) -> Iterator[int]:
    """Blocks of other shards with the same key, of full-attention groups or of the others. Pure."""
    rows, own, key = residency.rows, residency.rows.space[row], residency.rows.key(row)
    for space in residency.kin(own):
        found = residency.index(space).get(key) if space != own else None
        if found is not None and bool(rows.leaf_first[found]) is leaf_first:
            yield found


def bereave(residency: Residency, row: int) -> None:
    """The last copy of a full-attention block goes: window and state blocks of its key are next in line, unless another
    shard still has it. Mutates the policies."""
    if any(namesakes(residency, row, leaf_first=True)):
        return
    for other in namesakes(residency, row, leaf_first=False):
        for policy in residency.policies_of(other):
            policy.next(other)


def forced(residency: Residency, level: int) -> int | None:
    """The policy's first of those that are neither pinned nor leaving, whatever hangs on it. O(rows). Pure."""
    rows, bit = residency.rows, 1 << level
    orders = [policies[level].order for policies in (residency.policies, residency.secondaries)]
    found = (
        row
        for row, present in enumerate(rows.present)
        if present & bit and not rows.leaving[row] & bit and not rows.pins[row]
    )
    return min(found, key=lambda row: (1 - rows.secondary[row], orders[rows.secondary[row]](row)), default=None)


def _end(residency: Residency, full: int, row: int) -> int:
    """The end of a prompt through `full` that has no whole window of the row's shard deeper down; NONE where all have
    one, or the end is too far away."""
    rows = residency.rows
    shard = residency.names[rows.space[row]][1]
    window, held = residency.window(rows.root_of(row), shard), residency.index(rows.space[row]).get
    line, left = [(full, 0)], LOOKED_AT
    while line:
        at, run = line.pop()
        child = rows.child[at]
        if child == NONE:
            return at
        while child != NONE:
            left -= 1
            if not left:
                return NONE
            after = run + 1 if held(rows.key(child)) is not None else 0
            if after < window:
                line.append((child, after))
            child = rows.next[child]
    return NONE
