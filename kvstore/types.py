"""The small words every part shares. Values are on the wire and on disk: they never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

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


def pack_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as one bytes field of the wire."""
    return b"".join(keys)


_KEY = np.dtype(f"V{KEY_BYTES}")


def unpack_keys(packed: bytes) -> list[bytes]:
    """Inverse of `pack_keys`. ValueError unless a whole number of keys."""
    if len(packed) % KEY_BYTES:
        raise ValueError(f"packed keys are {len(packed)} bytes, not a multiple of {KEY_BYTES}")
    keys: list[bytes] = np.frombuffer(packed, _KEY).tolist() if packed else []
    return keys
