"""Changes of what a holder holds, block by block, and runs: many consecutive blocks in one message.

A run is only an encoding. It never crosses a placement group, so a run of a long chain costs its fixed fields
once per `group_blocks` blocks and every block's group stays known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvstore.types import Fidelity, Tier


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one chain (each the parent of the next) that share everything but their key."""

    root: bytes
    shard: bytes  # digest
    tier: Tier  # the slowest tier that this fidelity needs
    fidelity: Fidelity
    parent: bytes  # key before the first one; the root at depth 0
    first_depth: int
    keys: Sequence[bytes]  # `Keys` from a wire
    group: bytes  # placement group of every block of the run
    stored_bytes: int  # of one block, the mean over the run rounded up


@dataclass(frozen=True, slots=True)
class RemovedRun:
    """Blocks of one shard that a holder holds no longer, in the order of their removal."""

    shard: bytes  # digest
    keys: Sequence[bytes]  # `Keys` from a wire


@dataclass(frozen=True, slots=True)
class Added:
    """A holder holds one block, at this tier and fidelity. Replaces what it said of (shard, key) before."""

    root: bytes
    shard: bytes  # digest
    key: bytes
    parent: bytes
    group: bytes
    depth: int
    tier: Tier  # the slowest tier that this fidelity needs
    fidelity: Fidelity
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A holder holds one block no longer."""

    shard: bytes  # digest
    key: bytes


Change = Added | Removed
"""One block's change. An absolute statement: applying it twice is the same as once."""

RunChange = Run | RemovedRun
"""Consecutive changes in one message; stands for `len(keys)` sequence numbers."""


def to_runs(added: Iterable[Added]) -> list[Run]:
    """Merge neighbours in the given order: each block the child of the one before, same shard, tier, fidelity, group.

    Every block is in exactly one run, in order. Use `in_chain_order` first when the order does not matter.
    """
    return [run for run in to_run_changes(added) if isinstance(run, Run)]


def to_run_changes(changes: Iterable[Change]) -> list[RunChange]:
    """Like `to_runs` for additions and removals together; the order between them is kept."""
    merged: list[RunChange] = []
    pending: list[Added] = []
    gone: list[Removed] = []
    for change in changes:
        if isinstance(change, Added):
            if gone:
                merged.append(_removed_run(gone))
                gone = []
            if pending and not _continues(pending[-1], change):
                merged.append(_run(pending))
                pending = []
            pending.append(change)
        else:
            if pending:
                merged.append(_run(pending))
                pending = []
            if gone and gone[-1].shard != change.shard:
                merged.append(_removed_run(gone))
                gone = []
            gone.append(change)
    if pending:
        merged.append(_run(pending))
    if gone:
        merged.append(_removed_run(gone))
    return merged


def in_chain_order(added: Iterable[Added]) -> list[Added]:
    """The same blocks, every chain in one piece where it does not branch: the order in which `to_runs` merges best.

    For snapshots, whose order is free. O(n); the order is a function of the input's order.
    """
    blocks = list(added)
    present = {(block.shard, block.key) for block in blocks}
    children: dict[tuple[bytes, bytes], list[Added]] = {}
    starts: list[Added] = []
    for block in blocks:
        parent = (block.shard, block.parent)
        if parent in present:
            children.setdefault(parent, []).append(block)
        else:
            starts.append(block)
    ordered: list[Added] = []
    stack = starts[::-1]
    while stack:
        block = stack.pop()
        ordered.append(block)
        stack.extend(reversed(children.pop((block.shard, block.key), ())))
    ordered.extend(block for rest in children.values() for block in rest)  # a cycle: hostile, but nothing is lost
    return ordered


def blocks_of(run: Run) -> Iterator[Added]:
    """The blocks of a run. Inverse of `to_runs` but for `stored_bytes`, which is the mean."""
    parent = run.parent
    for index, key in enumerate(run.keys):
        depth = run.first_depth + index
        yield Added(run.root, run.shard, key, parent, run.group, depth, run.tier, run.fidelity, run.stored_bytes)
        parent = key


def count_blocks(changes: Iterable[RunChange]) -> int:
    """Sequence numbers that the changes stand for."""
    return sum(len(change.keys) for change in changes)


def tail(changes: Sequence[RunChange], skip: int) -> list[RunChange]:
    """The changes without their first `skip` blocks."""
    if skip <= 0:
        return list(changes)
    rest: list[RunChange] = []
    for change in changes:
        if skip >= len(change.keys):
            skip -= len(change.keys)
        elif skip == 0:
            rest.append(change)
        else:
            rest.append(_cut(change, skip))
            skip = 0
    return rest


def _cut(change: RunChange, skip: int) -> RunChange:
    if isinstance(change, RemovedRun):
        return RemovedRun(change.shard, change.keys[skip:])
    parent = change.keys[skip - 1]
    return replace(change, parent=parent, first_depth=change.first_depth + skip, keys=change.keys[skip:])


def _continues(last: Added, block: Added) -> bool:
    return (
        block.parent == last.key
        and block.shard == last.shard
        and block.tier == last.tier
        and block.fidelity == last.fidelity
        and block.group == last.group
        and block.root == last.root
        and block.depth == last.depth + 1
    )


def _run(blocks: list[Added]) -> Run:
    first = blocks[0]
    mean = -(-sum(block.stored_bytes for block in blocks) // len(blocks))
    keys = tuple(block.key for block in blocks)
    return Run(first.root, first.shard, first.tier, first.fidelity, first.parent, first.depth, keys, first.group, mean)


def _removed_run(gone: list[Removed]) -> RemovedRun:
    return RemovedRun(gone[0].shard, tuple(removal.key for removal in gone))
