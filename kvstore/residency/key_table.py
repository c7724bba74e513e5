"""Key -> row for one shard's resident blocks, at about eight bytes a block: the keys themselves stand in the rows.

Linear hashing (Litwin, VLDB 1980): buckets are chains through the rows, and each block that comes splits one bucket, so
the table grows without ever pausing. Python's keyed hash of bytes spreads keys that a hostile writer chose; it decides
nothing that anybody sees.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt

from kvstore.residency.rows import NONE, RECORD_BYTES, Rows

T = TypeVar("T")
BUCKETS_MIN = 8


class KeyTable(Mapping[bytes, int]):
    """A mapping as others see it. `add` and `remove` mutate."""

    def __init__(self, rows: Rows, space: int, expected: int = 0) -> None:
        """`expected`: blocks that it begins with room for."""
        buckets = max(BUCKETS_MIN, 1 << max(0, expected - 1).bit_length() >> 1)
        self._rows = rows
        self._space = space
        self._buckets = array("i", [NONE]) * buckets  # first row of each chain
        self._mask = buckets - 1  # of the round of splits that goes on
        self._split = 0  # buckets below it are split: their keys are told apart by one more bit
        self._blocks = 0

    def place(self) -> tuple[int, int, int]:
        """For compiled loops that look keys up: address of the buckets, mask of the round, buckets split in it."""
        return self._buckets.buffer_info()[0], self._mask, self._split

    def _bucket(self, key: bytes) -> int:
        hashed = hash(key)
        at = hashed & self._mask
        return at if at >= self._split else hashed & (2 * self._mask + 1)

    @overload
    def get(self, key: bytes, /) -> int | None: ...
    @overload
    def get(self, key: bytes, /, default: int | T) -> int | T: ...
    def get(self, key: bytes, /, default: int | T | None = None) -> int | T | None:
        hashed = hash(key)
        at = hashed & self._mask
        if at < self._split:
            at = hashed & (2 * self._mask + 1)
        row = self._buckets[at]
        if row == NONE:
            return default
        records, same = self._rows.records, self._rows.same
        while not records.startswith(key, row * RECORD_BYTES):
            row = same[row]
            if row == NONE:
                return default
        return row

    def __getitem__(self, key: bytes) -> int:
        row = self.get(key)
        if row is None:
            raise KeyError(key)
        return row

    def __len__(self) -> int:
        return self._blocks

    def __iter__(self) -> Iterator[bytes]:
        return map(self._rows.key, self.rows())

    def rows(self) -> Iterator[int]:
        """By number. O(all rows)."""
        used, gone, spaces, mine = self._rows.used, self._rows.gone, self._rows.space, self._space
        return (row for row, space in enumerate(spaces) if space == mine and used[row] and not gone[row])

    def add(self, key: bytes, row: int) -> None:
        """A key that is not there yet; its row's record is written already."""
        if self._blocks >= len(self._buckets):
            self._grow()
        at = self._bucket(key)
        self._rows.same[row] = self._buckets[at]
        self._buckets[at] = row
        self._blocks += 1

    def fill(self, keys: list[bytes], rows: npt.NDArray[np.int64]) -> None:
        """Many distinct keys into an empty table: what `add` of each would do, buckets as many as were expected."""
        assert not self._blocks and not self._split
        at = np.fromiter(map(hash, keys), np.int64, len(keys)) & self._mask
        order = np.argsort(at, kind="stable")
        at, rows = at[order], rows[order]
        same = np.frombuffer(self._rows.same, np.int32)
        chained = at[1:] == at[:-1]
        same[rows[:-1][chained]] = rows[1:][chained]
        first = np.concatenate(([True], ~chained))
        np.frombuffer(self._buckets, np.int32)[at[first]] = rows[first]
        self._blocks = len(keys)

    def remove(self, key: bytes, row: int) -> None:
        """A key that is there, under that row."""
        same, at = self._rows.same, self._bucket(key)
        here = self._buckets[at]
        if here == row:
            self._buckets[at] = same[row]
        else:
            while same[here] != row:
                here = same[here]
            same[here] = same[row]
        same[row] = NONE
        self._blocks -= 1

    def _grow(self) -> None:
        """Split the next bucket in two."""
        same, key, wide = self._rows.same, self._rows.key, 2 * self._mask + 1
        row, stay, go = self._buckets[self._split], NONE, NONE
        while row != NONE:
            after = same[row]
            if hash(key(row)) & wide == self._split:
                same[row], stay = stay, row
            else:
                same[row], go = go, row
            row = after
        self._buckets[self._split] = stay
        self._buckets.append(go)
        self._split += 1
        if self._split > self._mask:
            self._mask, self._split = wide, 0
