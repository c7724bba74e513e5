"""`validate` of residency: every redundant number against what it stands for. O(blocks); tests and idle moments."""

from __future__ import annotations

from kvstore.residency.family import top_of
from kvstore.residency.residency import Residency
from kvstore.residency.rows import NONE


def validate(residency: Residency) -> None:
    """AssertionError unless indices, links, counts and bytes of a `Residency` agree (I2, I3). Pure."""
    rows = residency.rows
    live = [row for index in residency._index for row in index.values()]
    assert len(set(live)) == len(live), "two blocks share a row"
    zombies = [row for row in rows if rows.gone[row]]
    assert len(live) + len(zombies) == len(rows), "a row is neither a block, nor a zombie, nor free"
    for space, index in enumerate(residency._index):
        for key, row in index.items():
            assert rows.space[row] == space and rows.header(row).key == key, f"row {row} is indexed under another key"
    for row in zombies:
        assert rows.pins[row] or rows.busy[row], f"zombie {row} waits for nobody"
        assert not rows.secondary[row], f"zombie {row} is marked"
        assert not rows.present[row] and rows.parent[row] == rows.child[row] == NONE, f"zombie {row} is still somewhere"
    for row in live:
        _check_row(residency, row)
    _check_family(residency, live)
    _check_bytes(residency, live)


def _check_row(residency: Residency, row: int) -> None:
    rows, header = residency.rows, residency.rows.header(row)
    assert rows.present[row], f"row {row} is a block that is nowhere"
    assert not rows.leaving[row] & ~rows.present[row], f"row {row} leaves a level where it is not"
    assert not rows.writing[row] & rows.present[row], f"row {row} is written to a level where it is"
    assert rows.busy[row] or not (rows.writing[row] or rows.leaving[row]), f"row {row} moves, but nobody moves it"
    assert rows.pins[row] >= 0 and rows.busy[row] >= 0
    assert (rows.fidelity[row], rows.raw[row], rows.depth[row]) == (header.fidelity, header.raw_length, header.depth)
    copies = [rows.planes[level][row] for level in range(rows.levels) if rows.present[row] >> level & 1]
    assert all(planes in (1, 3, 7) for planes in copies), f"row {row}: a plane without those before it"
    assert header.stored == max(copies).bit_length(), f"row {row} is said to be worth what no copy is"
    for rank, policies in enumerate(residency.ranks):
        for level, policy in enumerate(policies):
            here = rows.present[row] >> level & 1 and rows.secondary[row] == rank
            assert policy.holds(row) == bool(here), f"row {row}: policy and presence differ at level {level}"


def _check_family(residency: Residency, live: list[int]) -> None:
    rows, family = residency.rows, residency.family
    expected = [dict.fromkeys(live, 0) for _ in residency.levels]
    waiting = 0
    for row in live:
        header, parent = rows.header(row), rows.parent[row]
        resident = residency._index[rows.space[row]].get(header.parent) if header.depth else None
        if parent != NONE:
            assert parent == resident and not rows.orphan[row], f"row {row} is linked to the wrong parent"
            stays = family.stays(row)
            for level in range(top_of(stays) if stays else rows.levels, rows.levels):
                expected[level][parent] += 1
        assert not rows.orphan[row] or resident is None, f"row {row} waits for a parent that is there"
        waiting += rows.orphan[row]
        assert all(rows.parent[child] == row for child in rows.children(row)), f"row {row} has somebody else's child"
    for level, counts in enumerate(expected):
        for row, count in counts.items():
            assert rows.below[level][row] == count, f"row {row}: children at level {level} miscounted"
    listed = 0
    for space, orphans in enumerate(family.orphans):
        for key, first in orphans.items():
            row, before = first, NONE
            while row != NONE:
                assert rows.orphan[row] and rows.prev[row] == before and rows.space[row] == space
                assert rows.header(row).parent == key, f"row {row} waits for another parent"
                listed, before, row = listed + 1, row, rows.next[row]
    assert listed == waiting, "orphans are miscounted"


def _check_bytes(residency: Residency, live: list[int]) -> None:
    rows = residency.rows
    for number, level in enumerate(residency.levels):
        here = [row for row in live if rows.present[row] >> number & 1]
        sizes = {row: level.footprint(rows.length[number][row]) for row in here}
        leaving = sum(size for row, size in sizes.items() if rows.leaving[row] >> number & 1)
        assert residency.used[number] == sum(sizes.values()), f"bytes at level {number} are off"
        assert residency.leaving_bytes[number] == leaving, f"leaving bytes at level {number} are off"
        assert residency.raw_bytes[number] == sum(rows.raw[row] for row in here), f"raw bytes at level {number} are off"
        assert residency.blocks[number] == len(here), f"blocks at level {number} are off"
        assert residency.used[number] <= level.capacity, f"level {number} is over its capacity"
    for namespace, held in residency.held.items():
        for number, level in enumerate(residency.levels):
            mine = [row for row in live if residency.namespace(row) == namespace and residency.staying(row, number)]
            counted = sum(level.footprint(rows.length[number][row]) for row in mine)
            assert held[number] == counted, f"{namespace}: bytes at level {number} are off"
