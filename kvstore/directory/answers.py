"""The answer to a lookup: how long a prefix is held, and by whom, as ranges of depths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.directory.entries import KIND_SHIFT, fidelity_of, owner_of, tier_of
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


def ranges(shard: Shard, spans: Iterable[Sequence[int]], name: Callable[[int], str]) -> list[MatchRun]:
    """(kind, first depth, count, bytes) of one stored shard as runs, the fastest tier first."""
    runs = [
        MatchRun(
            name(owner_of(kind << KIND_SHIFT)),
            shard,
            tier_of(kind << KIND_SHIFT),
            fidelity_of(kind << KIND_SHIFT),
            first,
            count,
            nbytes,
        )
        for kind, first, count, nbytes in spans
    ]
    if len(runs) > 1:
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
