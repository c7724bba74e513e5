"""New blocks come into residency, one or several of a shard: what they share is looked up once for all. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvstore.header import Header
from kvstore.residency.rows import NONE
from kvstore.types import Location

if TYPE_CHECKING:
    from kvstore.residency.residency import Residency

Coming = Callable[[Header], object]
"""Called right before a block's policy hears of it: others of its call are there already."""


def admit_all(
    residency: Residency,
    namespace: str,
    headers: Sequence[Header],
    level: int,
    places: Sequence[Location],
    *,
    leaf_first: bool,
    copy_ids: Sequence[int] | None = None,
    coming: Coming | None = None,
) -> list[int]:
    """New blocks of one shard, in this order, each with its first copy at `level`; their rows. `copy_ids`: what to keep
    instead of those of the headers. Mutates."""
    space, rows, family = residency.space(namespace, headers[0]), residency.rows, residency.family
    index, policy, bit = residency.index(space), residency.policies[level], 1 << level
    present, planes, granule = rows.present, rows.planes[level], residency.levels[level].granule
    if not leaf_first:
        residency.free[namespace] = None
    ident_of, taken, held, raw = rows.ident_of, list[int](), 0, 0
    ids = [header.copy_id for header in headers] if copy_ids is None else copy_ids
    for header, place, copy_id in zip(headers, places, ids, strict=True):
        key, parent, depth, row = header.key, header.parent, header.depth, rows.take()
        rows.space[row], rows.leaf_first[row] = space, leaf_first
        rows.set_header(row, header, copy_id)
        index.add(key, row)
        if coming is not None:
            coming(header)
        if leaf_first:
            family.join(row, parent, index.get(parent) if depth else None, key)
        present[row], planes[row] = bit, (1 << header.stored) - 1
        rows.set_location(row, level, place)
        if rows.parent[row] != NONE:
            family.moved(row, 0, bit)
        nbytes = -(-place.length // granule) * granule
        policy.admit(row, ident_of(space, key), nbytes, ident_of(space, parent) if depth else 0, depth)
        held, raw = held + nbytes, raw + header.raw_length
        taken.append(row)
    residency.came(namespace, level, len(taken), held, raw)
    return taken
