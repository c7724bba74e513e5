"""A value in Redis: the stored record, then a trailer with a MAC of the namespace's secret. docs/FORMAT-REDIS.md.

Whoever can write to Redis is not who may write to a namespace: without the secret nothing passes for a record. Pure.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvstore.errors import Corrupt, UnknownFormat
from kvstore.header import HEADER_BYTES, Header, expect
from kvstore.types import Buffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.algorithms import AES

MAGIC = b"KVR1"
HMAC_SHA256, AES_GMAC = 1, 2
_HEAD = struct.Struct("<4sB3x")
MAC_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16  # of AES-GMAC; the rest of the MAC's bytes is zero
TRAILER_BYTES = _HEAD.size + MAC_BYTES
_GMAC_LABEL = b"kvstore KVR1 AES-256-GMAC"
_OWN_NONCE = bytes(NONCE_BYTES)

PREFERRED = AES_GMAC if find_spec("cryptography") is not None else HMAC_SHA256
"""What is written; both are read where the library is there. GMAC runs at memory speed, HMAC-SHA256 at 1.7 GB/s."""


class Sealing:
    """What follows a record, made while its pieces pass (`kvstore.transport.resp.Seal`). Thread."""

    nbytes = TRAILER_BYTES

    def __init__(self, secret: bytes, nonce: bytes, algorithm: int = PREFERRED) -> None:
        """`nonce`: 12 random bytes, never again with this secret."""
        self._nonce = nonce if algorithm == AES_GMAC else b""
        self._head = _HEAD.pack(MAGIC, algorithm)
        self._sum = _sum(secret, nonce, algorithm)

    def update(self, piece: Buffer) -> None:
        self._sum.update(piece)

    def end(self) -> bytes:
        self._sum.update(self._head)
        return self._head + (self._nonce + self._sum.end()).ljust(MAC_BYTES, b"\0")


class Checking:
    """The MAC of a value that is being received: the nonce comes last, so the sum runs under another one. GMAC's tag
    is a sum of the bytes that knows no nonce, masked with AES(nonce) (NIST SP 800-38D, section 7.1): `holds` takes one
    mask off and puts the other on. The tag under the other nonce is shown to nobody. Thread."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._sum = _sum(secret, _OWN_NONCE, PREFERRED)

    def update(self, piece: Buffer) -> None:
        """The record's pieces, in order."""
        self._sum.update(piece)

    def holds(self, end: Buffer) -> bool:
        """Whether `end` is the trailer of the record that has passed. Once. Corrupt where it is none; UnknownFormat
        for an algorithm other than PREFERRED."""
        head, mac = bytes(end[: _HEAD.size]), bytes(end[_HEAD.size :])
        if algorithm_of(end) != PREFERRED:
            raise UnknownFormat("this value's MAC is of another algorithm")
        self._sum.update(head)
        found = self._sum.end()
        if PREFERRED == AES_GMAC:
            nonce = mac[:NONCE_BYTES]
            words = (found, _mask(self._secret, _OWN_NONCE), _mask(self._secret, nonce))
            tag = 0
            for word in words:
                tag ^= int.from_bytes(word)
            found = nonce + tag.to_bytes(TAG_BYTES)
        return hmac.compare_digest(found.ljust(MAC_BYTES, b"\0"), mac)


class _Sum(Protocol):
    def update(self, piece: Buffer) -> None: ...

    def end(self) -> bytes: ...


class _Hmac:
    def __init__(self, secret: bytes) -> None:
        self._state = hmac.new(secret, digestmod="sha256")
        self.update = self._state.update
        self.end = self._state.digest


class _Gmac:
    def __init__(self, secret: bytes, nonce: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        self._work = Cipher(_aes(secret), GCM(nonce)).encryptor()
        self.update = self._work.authenticate_additional_data

    def end(self) -> bytes:
        self._work.finalize()
        return self._work.tag


def _sum(secret: bytes, nonce: bytes, algorithm: int) -> _Sum:
    return _Hmac(secret) if algorithm == HMAC_SHA256 else _Gmac(secret, nonce)


@lru_cache(maxsize=1024)
def _aes(secret: bytes) -> AES:
    from cryptography.hazmat.primitives.ciphers.algorithms import AES

    return AES(hmac.digest(secret, _GMAC_LABEL, "sha256"))


def _mask(secret: bytes, nonce: bytes) -> bytes:
    """What GCM adds to its sum of the bytes: AES of the first counter."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    return Cipher(_aes(secret), ECB()).encryptor().update(nonce + b"\0\0\0\1")  # one block, as GCM does


def algorithm_of(end: Buffer) -> int:
    """Of a trailer. Corrupt unless it is one; UnknownFormat for an algorithm this process does not know."""
    magic, algorithm = _HEAD.unpack_from(end)
    if magic != MAGIC:
        raise Corrupt("a value in Redis has no trailer")
    if algorithm not in (HMAC_SHA256, PREFERRED):
        raise UnknownFormat(f"a value in Redis has MAC algorithm {algorithm}: this process knows {HMAC_SHA256}")
    return int(algorithm)


def check(record: memoryview, end: Buffer, wanted: Header, secret: bytes, passed: Checking | None = None) -> None:
    """Corrupt unless trailer, MAC and binding hold; UnknownFormat for an unknown algorithm. Chunk checksums are the
    store's to verify. `passed` has seen all of the record and no more; without it, or for the algorithm that is not
    PREFERRED, the record is read: for a thread."""
    algorithm = algorithm_of(end)
    if passed is not None and algorithm == PREFERRED:
        good = passed.holds(end)
    else:
        sealing = Sealing(secret, bytes(end[_HEAD.size : _HEAD.size + NONCE_BYTES]), algorithm)
        sealing.update(record)
        good = hmac.compare_digest(sealing.end(), bytes(end))
    if not good:
        raise Corrupt("a value in Redis fails its MAC: somebody without the namespace's secret wrote it")
    expect(Header.unpack(record), wanted)


def trailer(parts: Sequence[Buffer], secret: bytes, nonce: bytes, algorithm: int = PREFERRED) -> bytes:
    """What follows a record, given in parts."""
    sealing = Sealing(secret, nonce, algorithm)
    for part in parts:
        sealing.update(part)
    return sealing.end()


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
