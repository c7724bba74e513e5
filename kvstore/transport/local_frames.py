"""Frames of the local socket, byte for byte as docs/PROTOCOL.md has them. Pure.

    u32 LE length of the payload | u8 kind | u8 method | u16 LE descriptors | u32 LE call id | payload

The payload is one flags byte per descriptor (bit 0: writable), then the protobuf message of the method, or for an
error `CODE\\nmessage` in UTF-8.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvstore.config import MIB
from kvstore.errors import BadRequest, KVStoreError, from_code
from kvstore.transport.base import Method
from kvstore.transport.methods import WORKER_LOCAL

HEAD = struct.Struct("<IBBHI")
REQUEST, REPLY, ERROR = 1, 2, 3
WRITABLE = 1  # flag of a descriptor
DESCRIPTORS_MAX = 1024  # of one frame
DESCRIPTORS_AT_ONCE = 253  # SCM_MAX_FD of the kernel
NUMBERS = {
    "Hello": 1,
    "Match": 2,
    "Open": 3,
    "Release": 4,
    "Stage": 5,
    "Commit": 6,
    "Pin": 7,
    "Renew": 8,
    "Unpin": 9,
    "Prefetch": 10,
    "Hint": 11,
}
"""Method numbers are on the wire: they never change."""
METHODS = {NUMBERS[method.name]: method for method in WORKER_LOCAL.values()}


@dataclass(frozen=True, slots=True)
class LocalLimits:
    """Bounds of local sockets. inflight_max: calls of one connection at a time."""

    message_bytes_max: int = 8 * MIB
    connections_max: int = 256
    inflight_max: int = 64
    connect_timeout_s: float = 2.0
    call_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    method: int
    descriptors: int
    call: int
    payload: bytes


def encode(kind: int, method: int, call: int, message: bytes, flags: bytes = b"") -> bytes:
    """One frame. `flags`: one byte per descriptor that goes with it. BadRequest beyond `DESCRIPTORS_MAX`."""
    if len(flags) > DESCRIPTORS_MAX:
        raise BadRequest(f"{len(flags)} descriptors in one frame: at most {DESCRIPTORS_MAX}")
    return HEAD.pack(len(flags) + len(message), kind, method, len(flags), call) + flags + message


def encode_error(method: int, call: int, error: KVStoreError) -> bytes:
    """An error frame; the message is cut to 1,024 characters."""
    line = str(error).replace("\n", " ")[:1024]
    return encode(ERROR, method, call, f"{error.code}\n{line}".encode(errors="replace"))


def decode_error(payload: bytes) -> KVStoreError:
    """The error a peer sent."""
    code, _, message = payload.decode(errors="replace").partition("\n")
    return from_code(code[:64], message[:1024])


def number(method: Method) -> int:
    """The method's number on the wire. BadRequest for a method of another service."""
    if METHODS.get(NUMBERS.get(method.name, 0)) is not method:
        raise BadRequest(f"{method.service}.{method.name} is not a call of the local socket")
    return NUMBERS[method.name]


class Decoder:
    """Bytes of a stream in, whole frames out. Holds at most one unfinished frame.

    payload_max: bytes; kinds: the frame kinds the peer may send. BadRequest on anything else; it stays broken then.
    """

    def __init__(self, payload_max: int, kinds: tuple[int, ...]) -> None:
        self._payload_max = payload_max
        self._kinds = kinds
        self._buffer = bytearray()

    @property
    def idle(self) -> bool:
        """Between two frames."""
        return not self._buffer

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order. Mutates."""
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        frames = []
        at = 0
        while len(source) - at >= HEAD.size:
            length, kind, method, descriptors, call = HEAD.unpack_from(source, at)
            if kind not in self._kinds:
                raise BadRequest(f"a frame of unknown kind {kind}")
            if length > self._payload_max + DESCRIPTORS_MAX:
                raise BadRequest(f"a frame of {length} bytes: at most {self._payload_max}")
            if descriptors > min(length, DESCRIPTORS_MAX):
                raise BadRequest(f"a frame of {length} bytes cannot have {descriptors} descriptors")
            end = at + HEAD.size + length
            if len(source) < end:
                break
            frames.append(Frame(kind, method, descriptors, call, bytes(source[at + HEAD.size : end])))
            at = end
        if source is self._buffer:
            del self._buffer[:at]
        else:
            self._buffer += data[at:]
        return frames
