"""The headers of raw blocks of one stored shard, checked as columns: `kvstore.client.pieces.bound` of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.client.bulk import raw_row
from kvstore.client.pieces import Asked, Piece
from kvstore.header import HEADER_BYTES
from kvstore.header_columns import HEADERS
from kvstore.open_rows import short_checks
from kvstore.types import Fidelity, pack_keys

_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}


def raw_headers(
    asked: Asked, pieces: Sequence[Piece], packed: Sequence[bytes]
) -> list[tuple[Fidelity, Fidelity, int]] | None:
    """(worth, stored, copy id) of each; None where one of them is not the header of a raw block as asked for: whoever
    wants the reason looks at them one by one. Pure."""
    joined = b"".join(packed)
    if len(joined) != len(pieces) * HEADER_BYTES or not pieces:
        return None
    headers = np.frombuffer(joined, HEADERS)
    wanted, fixed = (row[: HEADER_BYTES // 8] for row in raw_row(*asked.names(pieces[0].shard)))
    keys = np.frombuffer(pack_keys([piece.key for piece in pieces]), "<u8").reshape(-1, 2)
    computed, stored = headers["computed_on"], headers["stored"]
    worth = np.minimum(computed, stored)
    good = (
        (((headers.view("<u8").reshape(len(pieces), -1) ^ wanted) & fixed) == 0).all()
        and (headers["key"] == keys).all() and (worth >= max(1, int(asked.least))).all()
        and (np.maximum(computed, stored) <= max(_FIDELITIES)).all()
        and (headers["check"] == short_checks(headers)).all()
    )  # fmt: skip
    if not good:
        return None
    rows = zip(worth.tolist(), stored.tolist(), headers["copy_id"].tolist(), strict=True)
    return [(_FIDELITIES[least], _FIDELITIES[here], copy_id) for least, here, copy_id in rows]
