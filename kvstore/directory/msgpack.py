"""Reading MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md): what others' events are written in.

Only reading, only plain data, bounded: no extension types, and nothing is made that the message does not hold.
"""

from __future__ import annotations

import struct
from typing import Any

from kvstore.errors import Corrupt

DEPTH_MAX = 16
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"} | {
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def unpack(message: bytes) -> Any:
    """One value, the whole message. Corrupt where it is none."""
    reader = _Reader(message)
    try:
        value = reader.value(0)
    except (struct.error, UnicodeDecodeError, TypeError) as error:
        raise Corrupt(f"not MessagePack: {error}") from None
    if reader.at != len(message):
        raise Corrupt(f"not MessagePack: {len(message) - reader.at} bytes too many")
    return value


class _Reader:
    def __init__(self, message: bytes) -> None:
        self.message, self.at = message, 0

    def value(self, depth: int) -> Any:
        if depth > DEPTH_MAX:
            raise Corrupt(f"not MessagePack that is read here: nested deeper than {DEPTH_MAX}")
        first = self.take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 256
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            form = _NUMBERS[first]
            return struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if first <= 0x8F:
            return self.mapping(first & 15, depth)
        if first <= 0x9F:
            return [self.value(depth + 1) for _ in range(first & 15)]
        if first <= 0xBF:
            return self.take(first & 31).decode()
        if first not in _SIZES:
            raise Corrupt(f"not MessagePack that is read here: type {first:#x}")
        count = int.from_bytes(self.take(_SIZES[first]), "big")
        if first <= 0xC6:
            return self.take(count)
        if first <= 0xDB:
            return self.take(count).decode()
        if count > len(self.message) - self.at:  # each takes a byte at least
            raise Corrupt("not MessagePack: it ends early")
        return [self.value(depth + 1) for _ in range(count)] if first <= 0xDD else self.mapping(count, depth)

    def mapping(self, count: int, depth: int) -> dict[Any, Any]:
        made = {}
        for _ in range(count):
            key = self.value(depth + 1)
            made[key] = self.value(depth + 1)
        return made

    def take(self, count: int) -> bytes:
        if count > len(self.message) - self.at:
            raise Corrupt("not MessagePack: it ends early")
        self.at += count
        return self.message[self.at - count : self.at]
