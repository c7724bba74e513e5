"""Parents and children of resident blocks: who stands in whose way, and whose subtree nobody can reach any more.

Part of residency, over the same rows. Only blocks of full-attention groups have family; a link needs the child's depth
to be its parent's plus one, so that no claim of a writer can make a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.policies.base import Policy
from kvstore.residency.rows import NONE, Rows


def top_of(bitmap: int) -> int:
    """The fastest level of a bitmap that is not empty."""
    return (bitmap & -bitmap).bit_length() - 1


class Family:
    """Links in the rows' columns; `below` counts, per level, children that stay there or at a faster level."""

    def __init__(self, rows: Rows, ranks: Sequence[Sequence[Policy]]) -> None:
        """`ranks`: policies by level, of primary and of secondary blocks."""
        self.rows = rows
        self.ranks = ranks
        self.orphans: list[dict[bytes, int]] = []  # by space: key of an absent parent -> first of its children

    def join(self, row: int, parent_key: bytes, parent: int | None, key: bytes) -> None:
        """Link a new block (present nowhere yet) with its parent and with children that came before it. Mutates."""
        rows = self.rows
        if rows.depth[row] and parent is None:
            self.wait(row, parent_key)
        elif parent is not None and rows.leaf_first[parent] and rows.depth[parent] + 1 == rows.depth[row]:
            rows.link(row, parent)
        orphans = self.orphans[rows.space[row]]
        child = orphans.pop(key, NONE) if orphans else NONE
        while child != NONE:
            after = rows.next[child]
            rows.orphan[child], rows.prev[child], rows.next[child] = 0, NONE, NONE
            if rows.depth[row] + 1 == rows.depth[child]:
                rows.link(child, row)
                self.moved(child, 0, self.stays(child))
            child = after

    def part(self, row: int, parent_key: bytes, key: bytes) -> None:
        """A block is gone: its children become orphans, next in line. Mutates."""
        rows = self.rows
        if rows.child[row] != NONE:
            for child in rows.children(row):
                rows.unlink(child)
                self.wait(child, key)
                self._doom(child)
        if rows.parent[row] != NONE:
            rows.unlink(row)
        elif rows.orphan[row]:
            self._unorphan(row, parent_key)

    def descendant(self, row: int) -> int:
        """A block of the row's subtree that no other resident block needs to be reached; itself where it is one."""
        while self.rows.child[row] != NONE:
            row = self.rows.child[row]
        return row

    def stays(self, row: int) -> int:
        """Bitmap of the copies; one that is on its way down counts as the one it becomes a level below."""
        leaving = self.rows.leaving[row]
        return (self.rows.present[row] & ~leaving | leaving << 1) & (1 << self.rows.levels) - 1

    def moved(self, row: int, before: int, after: int) -> None:
        """`stays` changed: count the block at its parent, at every level from its fastest on down. Mutates."""
        parent = self.rows.parent[row]
        if parent == NONE:
            return
        none = self.rows.levels
        was = (before & -before).bit_length() - 1 if before else none
        now = (after & -after).bit_length() - 1 if after else none
        if was == now:
            return
        step = 1 if now < was else -1
        for level in range(min(was, now), max(was, now)):
            below = self.rows.below[level]
            below[parent] += step
            if not below[parent] and self.rows.present[parent] >> level & 1:
                self.ranks[self.rows.secondary[parent]][level].ready(parent)

    def wait(self, row: int, parent_key: bytes) -> None:
        """Chain a block without its parent before the others that wait for it. Mutates."""
        rows, orphans = self.rows, self.orphans[self.rows.space[row]]
        first = orphans.get(parent_key, NONE)
        rows.orphan[row], rows.prev[row], rows.next[row] = 1, NONE, first
        if first != NONE:
            rows.prev[first] = row
        orphans[parent_key] = row

    def _unorphan(self, row: int, parent_key: bytes) -> None:
        rows, orphans = self.rows, self.orphans[self.rows.space[row]]
        before, after = rows.prev[row], rows.next[row]
        if before != NONE:
            rows.next[before] = after
        elif after != NONE:
            orphans[parent_key] = after
        else:
            del orphans[parent_key]
        if after != NONE:
            rows.prev[after] = before
        rows.orphan[row], rows.prev[row], rows.next[row] = 0, NONE, NONE

    def _doom(self, row: int) -> None:
        """Hint a subtree that nobody can reach any more, the deepest last: the last hinted goes first."""
        subtree = [row]
        for found in subtree:
            subtree.extend(self.rows.children(found))
        for found in subtree:
            for level, policy in enumerate(self.ranks[self.rows.secondary[found]]):
                if self.rows.present[found] >> level & 1:
                    policy.next(found)
