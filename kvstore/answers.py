"""The answer to a lookup: how long a prefix is held, and by whom, as ranges of depths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby

from kvstore.entries import KIND_MASK, Entry, bytes_of, copies_of, fidelity_of, owner_of, tier_of
from kvstore.spec import Shard
from kvstore.types import Fidelity, Tier


@dataclass(frozen=True, slots=True)
class MatchRun:
    """`count` consecutive blocks that one holder has of one stored shard, at one tier and fidelity."""

    holder: str
    shard: Shard  # as stored: a needed rectangle may be cut from it
    tier: Tier
    fidelity: Fidelity
    first_depth: int  # in the chain that was asked for
    count: int
    stored_bytes: int  # of the whole run, within 2 % (each block's mean is kept to 7 significant bits)


@dataclass(slots=True)
class Match:
    """The longest prefix held, in blocks, and who has the blocks it needs."""

    blocks: int = 0
    runs: list[MatchRun] = field(default_factory=list)


def ranges(
    shard: Shard,
    row: Iterable[Entry | None],
    depth: int,
    usable: Callable[[int], bool],
    name: Callable[[int], str],
) -> list[MatchRun]:
    """The usable copies in the entries from `depth` on: one range per holder, tier and fidelity, fastest tier first."""
    done: list[tuple[int, int, int, int]] = []  # (kind, first depth, count, bytes)
    growing: dict[int, tuple[int, int]] = {}  # kind -> (first depth, bytes)
    entries = list(row)
    alike = bool(entries) and entries.count(entries[0]) == len(entries)  # the common case, without a step per block
    groups = [(entries[0], len(entries))] if alike else [(entry, len(list(same))) for entry, same in groupby(entries)]
    for entry, count in groups:
        grown: dict[int, tuple[int, int]] = {}
        for copy in filter(usable, copies_of(entry)):
            first, total = growing.pop(copy & KIND_MASK, (depth, 0))
            grown[copy & KIND_MASK] = first, total + bytes_of(copy) * count
        done += [(kind, first, depth - first, total) for kind, (first, total) in growing.items()]
        growing = grown
        depth += count
    done += [(kind, first, depth - first, total) for kind, (first, total) in growing.items()]
    runs = [
        MatchRun(name(owner_of(kind)), shard, tier_of(kind), fidelity_of(kind), first, count, total)
        for kind, first, count, total in done
    ]
    runs.sort(key=lambda run: (run.tier, -run.fidelity, run.first_depth, -run.count, run.holder))
    return runs


def fewer(runs: list[MatchRun], copies_max: int) -> list[MatchRun]:
    """In order, the runs that bring a block of which fewer than `copies_max` copies are named: none loses its last."""
    if len(runs) <= copies_max:
        return runs
    named: dict[int, int] = {}
    kept = []
    for run in runs:
        depths = range(run.first_depth, run.first_depth + run.count)
        if any(named.get(depth, 0) < copies_max for depth in depths):
            kept.append(run)
            for depth in depths:
                named[depth] = named.get(depth, 0) + 1
    return kept
