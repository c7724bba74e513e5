"""The blocks that a call names: runs of one shard each, their keys back to back. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import overload

from kvstore.spec import Shard
from kvstore.types import Keys, pack_keys

Pair = tuple[bytes, bytes]
"""(shard digest, key)."""


class Wanted(Sequence[Pair]):
    """A sequence of pairs, none of which is made before somebody asks for it."""

    __slots__ = ("groups", "runs")

    def __init__(self, groups: Sequence[tuple[bytes, Keys]], runs: Sequence[tuple[Shard, int]] = ()) -> None:
        """`groups`: (shard digest, keys); `runs`: (shard, number of blocks) of the same, where the shards are known."""
        self.groups, self.runs = groups, runs

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Wanted:
        """Itself, or any sequence of pairs as one."""
        if isinstance(pairs, Wanted):
            return pairs
        groups = groupby(pairs, key=lambda pair: pair[0])
        return cls([(shard, Keys(pack_keys([key for _, key in mine]))) for shard, mine in groups])

    @property
    def shards(self) -> list[Shard]:
        """One a block."""
        return [shard for shard, count in self.runs for _ in range(count)]

    def first(self, count: int) -> Wanted:
        """The first so many of them."""
        if count >= len(self):
            return self
        groups, runs, left = [], [], count
        for at, (shard, keys) in enumerate(self.groups):
            if left > 0:
                groups.append((shard, keys[:left]))
                runs += [(run[0], min(run[1], left)) for run in self.runs[at : at + 1]]
                left -= len(keys)
        return Wanted(groups, runs)

    def __len__(self) -> int:
        return sum(len(keys) for _, keys in self.groups)

    @overload
    def __getitem__(self, at: int) -> Pair: ...
    @overload
    def __getitem__(self, at: slice) -> list[Pair]: ...
    def __getitem__(self, at: int | slice) -> Pair | list[Pair]:
        if isinstance(at, slice):
            return list(self)[at]
        left = range(len(self))[at]
        for shard, keys in self.groups:
            if left < len(keys):
                return shard, keys[left]
            left -= len(keys)
        raise AssertionError("a range ends within its blocks")

    def __iter__(self) -> Iterator[Pair]:
        return ((shard, key) for shard, keys in self.groups for key in keys)
