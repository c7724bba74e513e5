"""Many packed headers as numpy columns: what a start takes in by the hundred thousand. Pure. docs/FORMAT.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.header import ENTRY_BYTES, HEADER_BYTES, MAGIC, MAX_CHUNKS, VERSION
from kvstore.spec import MAX_BLOCK_BYTES
from kvstore.types import Fidelity

Columns = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_DIGEST = ("<u8", (2,))
HEADERS = np.dtype(
    [
        ("magic", "<u4"), ("version", "<u2"), ("length", "<u2"), ("flags", "<u4"), ("key", *_DIGEST),
        ("parent", *_DIGEST), ("root", *_DIGEST), ("group", *_DIGEST), ("depth", "<u4"), ("namespace", *_DIGEST),
        ("shard", *_DIGEST), ("copy_id", "<u8"), ("computed_on", "u1"), ("stored", "u1"), ("tokens", "<u2"),
        ("chunk_count", "<u4"), ("raw_length", "<u8"), ("stored_length", "<u8"), ("validity_length", "<u4"),
        ("check", "<u4"), ("checksum", "<u8"),
    ]
)  # fmt: skip
"""A packed header; a digest of 16 bytes is two numbers."""
assert HEADERS.itemsize == HEADER_BYTES

_MAGIC = int.from_bytes(MAGIC, "little")
_FIDELITY = np.array([number in set(Fidelity) for number in range(256)])


def hold(headers: Columns) -> Mask:
    """(n,) HEADERS -> (n,) bool: which of them `Header.unpack(..., checked=True)` takes."""
    raw, stored, chunks = headers["raw_length"], headers["stored_length"], headers["chunk_count"]
    known = (headers["magic"] == _MAGIC) & (headers["version"] == VERSION) & (headers["length"] == HEADER_BYTES)
    known &= (headers["flags"] == 0) & (headers["validity_length"] == 0)
    known &= _FIDELITY[headers["computed_on"]] & _FIDELITY[headers["stored"]]
    sane = (raw > 0) & (raw <= MAX_BLOCK_BYTES) & (chunks <= MAX_CHUNKS)
    start = HEADER_BYTES + ENTRY_BYTES * np.minimum(chunks, MAX_CHUNKS).astype(np.uint64)
    encoded = (start < stored) & (stored <= start + np.minimum(raw, MAX_BLOCK_BYTES))
    held: Mask = known & sane & np.where(chunks == 0, stored == 0, encoded)
    return held


def equal(digests: Columns, digest: bytes) -> Mask:
    """(n, 2) column of digests -> (n,) bool: where it is this one."""
    low, high = np.frombuffer(digest, "<u8")
    same: Mask = (digests[:, 0] == low) & (digests[:, 1] == high)
    return same


def as_bytes(*digests: Columns) -> list[bytes]:
    """(n, 2) columns of digests -> 16 bytes of each, joined."""
    joined = np.concatenate(digests, axis=1)
    found: list[bytes] = joined.view(f"V{joined.shape[1] * 8}").ravel().tolist()
    return found


def kinds(*columns: Columns) -> list[tuple[tuple[bytes, ...], npt.NDArray[np.intp]]]:
    """(the digests of each distinct combination, positions that have it) of (n, 2) columns; few combinations."""
    found = []
    rest = np.arange(len(columns[0]))
    while len(rest):
        digests = tuple(column[rest[0]].tobytes() for column in columns)
        same = np.ones(len(rest), np.bool_)
        for column, digest in zip(columns, digests, strict=True):
            same &= equal(column[rest], digest)
        found.append((digests, rest[same]))
        rest = rest[~same]
    return found
