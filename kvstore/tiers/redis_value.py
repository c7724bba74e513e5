"""A value in Redis: the stored record, then a trailer with a MAC of the namespace's secret. docs/FORMAT-REDIS.md.

Whoever can write to Redis is not who may write to a namespace: without the secret nothing passes for a record. Pure.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence

import numpy as np

from kvstore.errors import Corrupt, UnknownFormat
from kvstore.header import HEADER_BYTES, Header, expect
from kvstore.types import Buffer

MAGIC = b"KVR1"
HMAC_SHA256 = 1
_HEAD = struct.Struct("<4sB3x")
MAC_BYTES = 32
TRAILER_BYTES = _HEAD.size + MAC_BYTES


def seal(parts: Sequence[Buffer], target: memoryview, secret: bytes) -> None:
    """Fill `target`, TRAILER_BYTES longer than the parts, with the value of a record."""
    value, done = np.frombuffer(target, np.uint8), 0
    for part in parts:
        source = np.frombuffer(part, np.uint8)
        np.copyto(value[done : done + len(source)], source)
        done += len(source)
    target[done : done + _HEAD.size] = _HEAD.pack(MAGIC, HMAC_SHA256)
    done += _HEAD.size
    target[done:] = hmac.digest(secret, target[:done], "sha256")


def unseal(value: Buffer, wanted: Header, secret: bytes, target: memoryview) -> None:
    """Fill `target` with the record in a value. Corrupt unless length, MAC and binding hold; UnknownFormat for another
    algorithm. Chunk checksums are the store's to verify."""
    view = memoryview(value)
    nbytes = len(view) - TRAILER_BYTES
    if nbytes != len(target) or nbytes < HEADER_BYTES:
        raise Corrupt(f"Redis has {len(view)} bytes where a record of {len(target)} was announced")
    magic, algorithm = _HEAD.unpack_from(view, nbytes)
    if magic != MAGIC:
        raise Corrupt("a value in Redis has no trailer")
    if algorithm != HMAC_SHA256:
        raise UnknownFormat(f"a value in Redis has MAC algorithm {algorithm}: this build knows {HMAC_SHA256}")
    signed = nbytes + _HEAD.size
    if not hmac.compare_digest(hmac.digest(secret, view[:signed], "sha256"), view[signed:]):
        raise Corrupt("a value in Redis fails its MAC: somebody without the namespace's secret wrote it")
    expect(Header.unpack(view), wanted)
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(view[:nbytes], np.uint8))
