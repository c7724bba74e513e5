"""The small words every part shares. Values are on the wire and on disk: they never change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import overload

import numpy as np

Buffer = bytes | bytearray | memoryview

KEY_BYTES = 16
"""Length of a BlockKey, a root, a shard digest and a namespace digest."""


class Tier(IntEnum):
    """Where bytes lie, fastest first."""

    HOT = 1
    HOST = 2
    SSD = 3
    REDIS = 4


class Fidelity(IntEnum):
    """How near stored KV is to what the model computed. Greater is better."""

    COMPACT = 1
    NEAR = 2
    EXACT = 3


@dataclass(frozen=True, slots=True)
class BlockId:
    """A stored object: (namespace, key, shard). Equal ids may still be different copies (see `copy_id`)."""

    namespace: str
    shard: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tier keeps one blob. Meaningful to that tier alone."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class CommitToken:
    """A state change of one worker, numbered at the change."""

    worker: str
    epoch: int
    seq: int


_KEY = np.dtype(f"V{KEY_BYTES}")


class Keys(Sequence[bytes]):
    """Keys back to back, as a bytes field of the wire has them; no object per key until somebody asks for one.

    Equal to any sequence of the same keys. ValueError unless a whole number of keys.
    """

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        if len(packed) % KEY_BYTES:
            raise ValueError(f"packed keys are {len(packed)} bytes, not a multiple of {KEY_BYTES}")
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // KEY_BYTES

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> Keys: ...
    def __getitem__(self, at: int | slice) -> bytes | Keys:
        if type(at) is int and at >= 0:  # the common case
            key = self.packed[at * KEY_BYTES : (at + 1) * KEY_BYTES]
            if key:
                return key
            raise IndexError(f"key {at} of {len(self)}")
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step != 1:
                return Keys(b"".join(self[index] for index in range(start, stop, step)))
            return Keys(self.packed[start * KEY_BYTES : stop * KEY_BYTES])
        at = range(len(self))[at]
        return self.packed[at * KEY_BYTES : (at + 1) * KEY_BYTES]

    def __iter__(self) -> Iterator[bytes]:
        return iter(unpack_keys(self.packed))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return self.packed == other.packed
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Keys({len(self)} of {self.packed[:KEY_BYTES].hex()}...)"


def pack_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as one bytes field of the wire."""
    return keys.packed if isinstance(keys, Keys) else b"".join(keys)


def unpack_keys(packed: bytes) -> list[bytes]:
    """Inverse of `pack_keys`. ValueError unless a whole number of keys."""
    if len(packed) % KEY_BYTES:
        raise ValueError(f"packed keys are {len(packed)} bytes, not a multiple of {KEY_BYTES}")
    keys: list[bytes] = np.frombuffer(packed, _KEY).tolist() if packed else []
    return keys
