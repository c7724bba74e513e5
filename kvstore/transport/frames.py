"""`GetFrame` and `PutFrame`, {header message h = 1; bytes data = 2}, framed by hand. Pure.

Legal protobuf, so that a stranger's generated code reads and writes it; but the payload is never copied through a
protobuf object, which costs three to ten times the copy itself. Wire rules: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.errors import Corrupt
from kvstore.types import Buffer

_H_TAG = b"\x0a"  # field 1, length-delimited
_DATA_TAG = b"\x12"  # field 2, length-delimited
_VARINT, _FIXED64, _LENGTH, _GROUP, _GROUP_END, _FIXED32 = range(6)
_GROUPS_MAX = 100  # protobuf's own limit of nesting
_LENGTH_MAX = (1 << 31) - 1


def encode(header: bytes | None, parts: Sequence[Buffer]) -> bytes:
    """A frame of a serialised header and of `parts` back to back. One copy of the payload.

    None or an empty header, and empty data, are left out, as proto3 does.
    """
    nbytes = sum(memoryview(part).nbytes for part in parts)
    pieces: list[Buffer] = []
    if header is not None:
        pieces += (_H_TAG, _varint(len(header)), header)
    if nbytes:
        pieces += (_DATA_TAG, _varint(nbytes), *parts)
    return b"".join(pieces)


def decode(frame: Buffer) -> tuple[bytes | None, memoryview]:
    """(serialised header or None, the data as a view of `frame`). Corrupt when it is not protobuf.

    As protobuf says: unknown fields are skipped, several headers are one merged message (their concatenation), of
    several data the last one counts.
    """
    view = memoryview(frame)
    header: bytes | None = None
    data = view[:0]
    at = 0
    while at < len(view):
        field, wire, at = _tag(view, at)
        if wire == _LENGTH and field in (1, 2):
            begin, at = _delimited(view, at)
            if field == 1:
                header = (header or b"") + bytes(view[begin:at])
            else:
                data = view[begin:at]
        else:
            at = _skip(view, at, field, wire)
    return header, data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise Corrupt("a frame ends within a number")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise Corrupt("a number in a frame is longer than 64 bits")


def _skip_varint(view: memoryview, at: int) -> int:
    """The position after a number nobody reads: bits beyond 64 do not matter there, as in protobuf."""
    for end in range(at, min(at + 10, len(view))):
        if view[end] < 0x80:
            return end + 1
    raise Corrupt("a frame ends within a number, or has one of more than ten bytes")


def _tag(view: memoryview, at: int) -> tuple[int, int, int]:
    """(field number, wire type, next position)."""
    value, at = _read_varint(view, at)
    if value >> 32 or not value >> 3:
        raise Corrupt("a frame has a field number out of range")
    return value >> 3, value & 7, at


def _delimited(view: memoryview, at: int) -> tuple[int, int]:
    """(begin, end) of a length-delimited value."""
    length, at = _read_varint(view, at)
    if length > _LENGTH_MAX or at + length > len(view):
        raise Corrupt(f"a field of {length} bytes passes the end of its frame")
    return at, at + length


def _skip(view: memoryview, at: int, field: int, wire: int) -> int:
    """The position after a field this build does not know; groups (deprecated, legal) as a whole."""
    open_groups: list[int] = []
    while True:
        if wire == _VARINT:
            at = _skip_varint(view, at)
        elif wire == _LENGTH:
            _, at = _delimited(view, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
            if at > len(view):
                raise Corrupt("a frame ends within a field")
        elif wire == _GROUP:
            open_groups.append(field)
            if len(open_groups) > _GROUPS_MAX:
                raise Corrupt("a frame nests too deep")
        elif wire != _GROUP_END or not open_groups or open_groups.pop() != field:
            raise Corrupt(f"a frame has a field of wire type {wire} where none can be")
        if not open_groups:
            return at
        field, wire, at = _tag(view, at)
