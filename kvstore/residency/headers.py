"""The packed headers of many resident blocks, a column at a time: what `Header.pack` of each would be. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.header import HEADER_BYTES, MAGIC, VERSION
from kvstore.header_columns import HEADERS, Columns
from kvstore.residency.bulk import RECORDS, column
from kvstore.residency.rows import Rows

_MAGIC = int.from_bytes(MAGIC, "little")


def fill(into: Columns, rows: Rows, at: npt.NDArray[np.int64], level: int, *, raw: bool) -> None:
    """The headers of rows `at`, `stored` that of the copies at a level; `raw`: as raw bytes in memory. Mutates `into`,
    (n,) HEADERS of zeros; the short checks are left to the caller."""
    assert into.dtype == HEADERS
    records = np.frombuffer(rows.records, RECORDS)[at]
    into["magic"], into["version"], into["length"] = _MAGIC, VERSION, HEADER_BYTES
    for name in ("key", "parent", "group", "copy_id", "tokens", "computed_on"):
        into[name] = records[name]
    if not raw:
        for name in ("checksum", "stored_length", "chunk_count"):
            into[name] = records[name]
    into["depth"], into["raw_length"] = column(rows.depth)[at], column(rows.raw)[at]
    into["stored"] = _WORTH[column(rows.planes[level])[at]]
    spaces, roots = column(rows.space)[at], column(rows.root)[at]
    for space in dict.fromkeys(spaces.tolist()):  # mostly one
        namespace, shard = rows.digests_of(space)
        into["namespace"][spaces == space] = np.frombuffer(namespace, "<u8")
        into["shard"][spaces == space] = np.frombuffer(shard, "<u8")
    for root in dict.fromkeys(roots.tolist()):
        into["root"][roots == root] = np.frombuffer(rows.root_named(root), "<u8")


_WORTH = np.array([planes.bit_length() for planes in range(256)], np.uint8)
