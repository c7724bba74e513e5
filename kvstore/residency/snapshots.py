"""Everything a worker holds of a namespace, as runs: the state that a snapshot tells.

A million blocks are gathered in one pass of numpy over residency's columns, and not block by block: the worker serves
nobody meanwhile. What comes out does not change any more, whatever the store does next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.directory.runs import Run
from kvstore.residency.residency import Residency
from kvstore.residency.rows import RECORD_BYTES
from kvstore.types import KEY_BYTES, Fidelity, Keys

Array = npt.NDArray[Any]

_RECORD = np.dtype({
    "names": ["key", "parent", "group"],
    "formats": ["V16", "V16", "V16"],
    "offsets": [0, KEY_BYTES, 2 * KEY_BYTES],
    "itemsize": RECORD_BYTES,
})  # fmt: skip


def runs_held(residency: Residency, namespace: str) -> Iterator[Run]:
    """Runs of all blocks of a namespace, chains in one piece where they do not branch within a placement group.

    The columns are read before the first run is asked for. O(all rows).
    """
    rows = residency.rows
    spaces = residency.spaces(namespace)
    space = np.frombuffer(rows.space, np.int32)
    used = (np.frombuffer(rows.used, np.uint8) != 0) & (np.frombuffer(rows.gone, np.uint8) == 0)
    mine = np.flatnonzero(used & np.isin(space, spaces))
    record = np.frombuffer(rows.records, _RECORD)[mine]
    depth = np.frombuffer(rows.depth, np.uint32)[mine].astype(np.int64)
    group = np.ascontiguousarray(record["group"]).view(np.int64).reshape(-1, 2)
    order = np.lexsort((depth, group[:, 1], group[:, 0], space[mine]))
    mine, record, depth, group = mine[order], record[order], depth[order], group[order]
    present = np.frombuffer(rows.present, np.uint8)[mine].astype(np.int64)
    worth = np.stack([np.frombuffer(column, np.uint8)[mine] for column in rows.planes])
    level = np.where(present >> np.arange(rows.levels)[:, None] & 1, worth, 0).argmax(axis=0)  # as `Rows.best`
    lengths = np.stack([np.frombuffer(column, np.uint32) for column in rows.length])
    kind = (space[mine].astype(np.int64) << 16) | (level << 8) | np.frombuffer(rows.fidelity, np.uint8)[mine]
    root = np.frombuffer(rows.root, np.int32)[mine]
    keys = np.ascontiguousarray(record["key"])
    parents = np.ascontiguousarray(record["parent"])
    same = (kind[1:] == kind[:-1]) & (root[1:] == root[:-1]) & (depth[1:] == depth[:-1] + 1)
    same &= (group[1:] == group[:-1]).all(axis=1) & (parents[1:] == keys[:-1])
    starts = np.concatenate(([0], np.flatnonzero(~same) + 1)) if len(mine) else np.empty(0, np.int64)
    nbytes = np.add.reduceat(lengths[level, mine].astype(np.int64), starts) if len(mine) else starts
    return _runs(
        residency, starts, keys, parents[starts], group[starts], depth[starts], kind[starts], mine[starts], nbytes
    )


def _runs(
    residency: Residency,
    starts: Array,
    keys: Array,
    parents: Array,
    groups: Array,
    depths: Array,
    kinds: Array,
    rows: Array,
    nbytes: Array,
) -> Iterator[Run]:
    packed, before, group = keys.tobytes(), parents.tobytes(), groups.tobytes()
    roots = [residency.rows.root_of(row) for row in rows.tolist()]
    tiers = [level.tier for level in residency.levels]
    shards = [shard for _, shard in residency.names]
    fidelities = {int(fidelity): fidelity for fidelity in Fidelity}
    ends = [*starts[1:].tolist(), len(keys)]

    def made() -> Iterator[Run]:
        for at, (start, end) in enumerate(zip(starts.tolist(), ends, strict=False)):
            kind, name = kinds_list[at], slice(at * KEY_BYTES, (at + 1) * KEY_BYTES)
            yield Run(
                roots[at],
                shards[kind >> 16],
                tiers[kind >> 8 & 255],
                fidelities[kind & 255],
                before[name],
                depth_list[at],
                Keys(packed[start * KEY_BYTES : end * KEY_BYTES]),
                group[name],
                -(-totals[at] // (end - start)),
            )

    kinds_list, depth_list, totals = kinds.tolist(), depths.tolist(), nbytes.tolist()
    return made()
