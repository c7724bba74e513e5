"""Lookup in one worker's own residency, by the rules of `kvstore.directory.matching`. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.catalog import Catalog
from kvstore.directory.answers import Match, MatchRun
from kvstore.directory.matching import longest, make_plan
from kvstore.residency.residency import Residency
from kvstore.spec import Shard
from kvstore.types import Fidelity, Tier


def match(
    residency: Residency,
    catalog: Catalog,
    holder: str,
    namespace: str,
    root: bytes,
    keys: Sequence[bytes],
    shards: Sequence[Shard],
    least: Fidelity,
) -> Match:
    """The longest prefix of `keys` that this worker alone can serve in every needed shard, and where it lies.

    BadRequest where a needed shard is no rectangle of the spec; an unknown root is a miss.
    """
    spec = catalog.spec(root)
    if spec is None or not keys or not shards:
        return Match()
    stored = [
        shard for shard in map(catalog.shard, residency.shards(namespace)) if shard is not None and shard.fits(spec)
    ]
    plan = make_plan(spec, shards, stored)
    lookups = [residency.keys(namespace, shard.digest).get for shard in stored]
    fidelity = residency.rows.fidelity

    def held(position: int, start: int, stop: int) -> bytes:
        rows = map(lookups[position], keys[start:stop])
        return bytes(row is not None and fidelity[row] >= least for row in rows)

    blocks = longest(plan, held, len(keys))
    runs: list[MatchRun] = []
    for position, rule in plan.sources() if blocks else ():
        first = rule.first_needed(blocks)
        rows = list(map(lookups[position], keys[first:blocks]))
        runs += _runs(residency, holder, stored[position], rows, first, least)
    return Match(blocks, runs)


def _runs(
    residency: Residency, holder: str, shard: Shard, rows: Sequence[int | None], first: int, least: Fidelity
) -> Iterator[MatchRun]:
    """Neighbours at one tier and fidelity together."""
    start, kind, nbytes = first, None, 0
    for depth, row in enumerate((*rows, None), first):
        here: tuple[Tier, Fidelity] | None = None
        if row is not None and residency.fidelity(row) >= least:
            here = residency.levels[residency.rows.best(row)].tier, residency.fidelity(row)
        if here != kind:
            if kind is not None:
                yield MatchRun(holder, shard, kind[0], kind[1], start, depth - start, nbytes)
            start, kind, nbytes = depth, here, 0
        if row is not None and here is not None:
            nbytes += residency.location(row, residency.rows.best(row)).length
