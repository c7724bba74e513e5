"""Many blocks of one shard opened and let go of at once, each as one compiled call over the columns of residency.

What it does a block: found by its key, pinned, held in the arena, its header made. `kvstore.store.opening` does the
same one by one until the compiled form is at hand (`prepare`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.header import HEADER_BYTES, MAGIC, VERSION
from kvstore.header_columns import Columns
from kvstore.open_rows import FOUND, OPEN_ROWS, WORDS
from kvstore.residency.key_table import KeyTable
from kvstore.residency.using import settle_all
from kvstore.spec import namespace_digest
from kvstore.store.stack import Stack
from kvstore.types import Fidelity, Keys

Numbers = npt.NDArray[np.int64]

_kernels: list[Any] = []


def prepare() -> None:
    """Thread: have the compiled form at hand; made, for some ten seconds, the first time on a machine."""
    if not _kernels:
        from kvstore.kernels import rows

        _kernels.append(rows)


def prepared() -> bool:
    """Whether `find` may be called."""
    return bool(_kernels)


@dataclass(frozen=True, slots=True)
class Taken:
    """Blocks of one shard as they were found, pinned and held where they are open."""

    numbers: Numbers  # (n,) rows of residency, ABSENT (-1) for each that is not known or not good enough
    levels: Numbers  # (n,) where it is open; else ABSENT, AWAY (-2), OTHER (-3) or POOR (-4)
    opened: int

    @property
    def known(self) -> Numbers:
        """Rows that were found, open or not."""
        return self.numbers[self.numbers >= 0]

    @property
    def poor(self) -> int:
        """How many are here, and not good enough."""
        return 0 if self.opened == len(self.levels) else int((self.levels == _kernels[0].POOR).sum())

    def away(self, absent_too: bool) -> list[int]:
        """Which of them may be had from elsewhere."""
        if self.opened == len(self.numbers):
            return []
        wanted = self.levels == _kernels[0].AWAY
        if absent_too:
            wanted |= (self.levels == _kernels[0].ABSENT) | (self.levels == _kernels[0].POOR)
        found: list[int] = np.flatnonzero(wanted).tolist()
        return found


def find(
    stack: Stack, namespace: str, root: bytes, shard: bytes, keys: Keys, least: Fidelity, rows: Columns
) -> Taken:  # fmt: skip
    """Open what lies in the arena. Mutates `rows`, (n, WORDS) words, those of the blocks that are open; pins and holds
    of these, until `end`."""
    residency = stack.residency
    count, table = len(keys), residency.keys(namespace, shard)
    taken = np.full((2, count), -1, np.int64)
    if not isinstance(table, KeyTable) or not count:
        return Taken(taken[0], taken[1], 0)
    known = residency.rows.known_root(root)
    question = np.array([*table.place(), int(least), -1 if known is None else known], np.int64)
    opened = _kernels[0].open_all(
        residency.rows.addresses,
        question,
        _levels(stack),
        np.frombuffer(keys.packed, np.uint64).reshape(count, 2),
        np.fromiter(map(hash, keys), np.int64, count),
        stack.arena.table(),
        _template(namespace_digest(namespace), shard, root),
        rows,
        taken[0],
        taken[1],
    )
    return Taken(taken[0], taken[1], int(opened))


def end(stack: Stack, numbers: Numbers, rows: Columns) -> None:
    """Let go of blocks that `find` opened: their rows of residency, and (n, WORDS) words as they were answered. Mutates
    pins and holds."""
    kernels, arena, ended = _kernels[0], stack.arena, np.empty(len(numbers), np.int64)
    flags = kernels.close_all(stack.residency.rows.addresses, arena.table(), rows, numbers, ended)
    if flags & kernels.LAST_HOLD and arena.waits:
        places = rows[(ended & kernels.LAST_HOLD) != 0].view(OPEN_ROWS)[:, 0]
        for segment, offset in zip(places["segment"].tolist(), places["offset"].tolist(), strict=True):
            arena.let_go(segment, arena.segment(segment).unit(offset))
    if flags & kernels.LAST_PIN:
        settle_all(stack.residency, numbers[(ended & kernels.LAST_PIN) != 0], gone=bool(flags & kernels.WAS_GONE))


def _levels(stack: Stack) -> Numbers:
    """Those that readers can map, the fastest first: level, tier, whether raw."""
    levels = ((level, stack.residency.levels[level]) for level in (stack.HOT, stack.HOST))
    return np.array([(level, rule.tier, rule.raw) for level, rule in levels], np.int64)


@lru_cache(maxsize=256)
def _template(namespace: bytes, shard: bytes, root: bytes) -> npt.NDArray[np.uint64]:
    """(WORDS,): what the rows of a shard's open blocks share. Pure."""
    row = np.zeros(1, OPEN_ROWS)
    header = row["header"]
    header["magic"], header["version"], header["length"] = int.from_bytes(MAGIC, "little"), VERSION, HEADER_BYTES
    for name, digest in (("namespace", namespace), ("shard", shard), ("root", root)):
        header[name] = np.frombuffer(digest, "<u8")
    row["state"] = FOUND
    words: npt.NDArray[np.uint64] = row.view(np.uint64).reshape(WORDS)
    return words
