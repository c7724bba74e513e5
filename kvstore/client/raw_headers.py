"""Headers of raw blocks of one stored shard: all but a few of their bytes are known before they come."""

from __future__ import annotations

import struct

from kvstore.client.bulk import raw_row
from kvstore.client.pieces import Asked
from kvstore.header import HEADER_BYTES, short_check
from kvstore.header_columns import HEADERS
from kvstore.spec import Shard
from kvstore.types import KEY_BYTES, Fidelity

_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}


def _at(name: str) -> int:
    return int(HEADERS.fields[name][1]) if HEADERS.fields is not None else 0


_KEY, _ROOT, _GROUP, _NAMESPACE, _COPY_ID = map(_at, ("key", "root", "group", "namespace", "copy_id"))
_TOKENS, _CHECK = _at("tokens"), _at("check")
_SAID = struct.Struct("<QBB")  # copy id, computed on, stored
assert (_COPY_ID + _SAID.size, _NAMESPACE + 2 * KEY_BYTES) == (_TOKENS, _COPY_ID), "the fields follow each other"


class RawHeaders:
    """Of one read and stored shard. `kvstore.client.pieces.bound` of what is as expected, with no object a block."""

    def __init__(self, asked: Asked, shard: Shard) -> None:
        row, _ = raw_row(*asked.names(shard))
        wanted = row.tobytes()[:HEADER_BYTES]
        self._begin, self._root = wanted[:_KEY], wanted[_ROOT:_GROUP]
        self._names, self._end = wanted[_NAMESPACE:_COPY_ID], wanted[_TOKENS:_CHECK]
        self._least = int(asked.least)

    def said(self, key: bytes, packed: bytes) -> tuple[Fidelity, Fidelity, int] | None:
        """(worth, stored, copy id); None unless it is that of a raw block as asked for: `bound` knows why."""
        if (
            len(packed) != HEADER_BYTES
            or packed[_KEY : _KEY + KEY_BYTES] != key
            or packed[_NAMESPACE:_COPY_ID] != self._names
            or packed[_ROOT:_GROUP] != self._root
            or packed[_TOKENS:_CHECK] != self._end
            or packed[:_KEY] != self._begin
            or int.from_bytes(packed[_CHECK : _CHECK + 4], "little") != short_check(packed)
        ):
            return None
        copy_id, computed_on, stored = _SAID.unpack_from(packed, _COPY_ID)
        worth = min(computed_on, stored)
        if worth < self._least or computed_on not in _FIDELITIES or stored not in _FIDELITIES:
            return None
        return _FIDELITIES[worth], _FIDELITIES[stored], copy_id
