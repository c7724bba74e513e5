"""Frames of the raw data channel, byte for byte as docs/PROTOCOL.md has them. Pure.

u32 LE length of the header | u8 kind | 3 bytes 0 | u64 LE length of the data | header | data
"""

from __future__ import annotations

import struct

from kvstore.errors import Corrupt, KVStoreError, from_code

HEAD = struct.Struct("<IB3sQ")
MAGIC = b"kvstore/data/1\n\0"
TICKET_BYTES = 32
HELLO_BYTES = len(MAGIC) + TICKET_BYTES
WELCOME, GET, PUT, GO, FRAME, BYTES, END, REPLY, ERROR = range(1, 10)
_NONE = bytes(3)


def head(kind: int, header_bytes: int, data_bytes: int = 0) -> bytes:
    """What a frame begins with."""
    return HEAD.pack(header_bytes, kind, _NONE, data_bytes)


def frame(kind: int, header: bytes = b"") -> bytes:
    """One without data."""
    return head(kind, len(header)) + header


def parse(packed: bytes, message_bytes_max: int) -> tuple[int, int, int]:
    """(kind, header bytes, data bytes) of a head. Corrupt for what no peer sends. The data of a put has no bound here:
    its header says how much it is."""
    header_bytes, kind, none, data_bytes = HEAD.unpack(packed)
    if none != _NONE or not WELCOME <= kind <= ERROR or header_bytes > message_bytes_max:
        raise Corrupt("what came is no frame of the data channel")
    if kind == FRAME and data_bytes > message_bytes_max:
        raise Corrupt(f"a frame of {data_bytes} bytes: at most {message_bytes_max}")
    if data_bytes and kind not in (FRAME, BYTES):
        raise Corrupt(f"a frame of kind {kind} has no data")
    return kind, header_bytes, data_bytes


def error_frame(error: KVStoreError) -> bytes:
    """The message is cut to 1,024 characters."""
    line = str(error).replace("\n", " ")[:1024]
    return frame(ERROR, f"{error.code}\n{line}".encode(errors="replace"))


def error_of(header: bytes) -> KVStoreError:
    """The error a peer sent."""
    code, _, message = header.decode(errors="replace").partition("\n")
    return from_code(code[:64], message[:1024])


def hello(ticket: bytes) -> bytes:
    """What a client says first."""
    return MAGIC + ticket


def ticket_of(said: bytes) -> bytes:
    """Corrupt for another protocol."""
    if said[: len(MAGIC)] != MAGIC:
        raise Corrupt("whoever connected does not speak the data channel")
    return said[len(MAGIC) :]
