"""A value in Redis: the stored record, then a trailer with a MAC of the namespace's secret. docs/FORMAT-REDIS.md.

Whoever can write to Redis is not who may write to a namespace: without the secret nothing passes for a record. Pure.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

import numpy as np

from kvstore.errors import Corrupt, UnknownFormat
from kvstore.header import HEADER_BYTES, Header, expect
from kvstore.types import Buffer

MAGIC = b"KVR1"
HMAC_SHA256, AES_GMAC = 1, 2
_HEAD = struct.Struct("<4sB3x")
MAC_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16  # of AES-GMAC; the rest of the MAC's bytes is zero
TRAILER_BYTES = _HEAD.size + MAC_BYTES
_GMAC_LABEL = b"kvstore KVR1 AES-256-GMAC"

PREFERRED = AES_GMAC if find_spec("cryptography") is not None else HMAC_SHA256
"""What is written; both are read where the library is there. GMAC runs at memory speed, HMAC-SHA256 at 1.7 GB/s."""


def trailer(parts: Sequence[Buffer], secret: bytes, nonce: bytes, algorithm: int = PREFERRED) -> bytes:
    """What follows a record, given in parts. `nonce`: 12 random bytes, never again with this secret. Thread."""
    head = _HEAD.pack(MAGIC, algorithm)
    return head + _mac([*parts, head], secret, nonce, algorithm)


def _mac(parts: Sequence[Buffer], secret: bytes, nonce: bytes, algorithm: int) -> bytes:
    if algorithm == HMAC_SHA256:
        state = hmac.new(secret, digestmod="sha256")
        for part in parts:
            state.update(part)
        return state.digest()
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import GCM

    work = Cipher(AES(_gmac_key(secret)), GCM(nonce)).encryptor()
    for part in parts:
        work.authenticate_additional_data(part)
    work.finalize()
    return nonce + work.tag + bytes(MAC_BYTES - NONCE_BYTES - TAG_BYTES)


@lru_cache(maxsize=1024)
def _gmac_key(secret: bytes) -> bytes:
    return hmac.digest(secret, _GMAC_LABEL, "sha256")


def check(record: memoryview, end: Buffer, wanted: Header, secret: bytes) -> None:
    """Thread: Corrupt unless trailer, MAC and binding hold; UnknownFormat for another algorithm. Chunk checksums are
    the store's to verify."""
    magic, algorithm = _HEAD.unpack_from(end)
    if magic != MAGIC:
        raise Corrupt("a value in Redis has no trailer")
    if algorithm not in (HMAC_SHA256, PREFERRED):
        raise UnknownFormat(f"a value in Redis has MAC algorithm {algorithm}: this process knows {HMAC_SHA256}")
    head, mac = bytes(end[: _HEAD.size]), bytes(end[_HEAD.size :])
    if not hmac.compare_digest(_mac([record, head], secret, mac[:NONCE_BYTES], algorithm), mac):
        raise Corrupt("a value in Redis fails its MAC: somebody without the namespace's secret wrote it")
    expect(Header.unpack(record), wanted)


def seal(parts: Sequence[Buffer], target: memoryview, secret: bytes, nonce: bytes, algorithm: int = PREFERRED) -> None:
    """Fill `target`, TRAILER_BYTES longer than the parts, with the value of a record."""
    target[:] = b"".join((*parts, trailer(parts, secret, nonce, algorithm)))


def unseal(value: Buffer, wanted: Header, secret: bytes, target: memoryview) -> None:
    """`check` of a whole value, and fill `target` with the record in it. Corrupt also for another length."""
    view = memoryview(value)
    nbytes = len(view) - TRAILER_BYTES
    if nbytes != len(target) or nbytes < HEADER_BYTES:
        raise Corrupt(f"Redis has {len(view)} bytes where a record of {len(target)} was announced")
    check(view[:nbytes], view[nbytes:], wanted, secret)
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(view[:nbytes], np.uint8))
