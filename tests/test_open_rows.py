"""Rows of `Open`: as docs/PROTOCOL.md has them, the same as the messages, and with the headers that are packed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import Corrupt
from kvstore.header import Header
from kvstore.open_rows import FOUND, LATER, MISSING, OPEN_ROWS, ROW_BYTES, absent, rows_from, rows_of, short_checks
from kvstore.types import pack_keys
from kvstore.wire import worker_pb2
from tests.service_cluster import blocks_of
from tests.service_helpers import FULL, prompt
from tests.worker_met import WHOLE, meeting, open_request


def test_states_are_the_protos() -> None:
    assert (FOUND, MISSING, LATER) == (worker_pb2.BLOCK_FOUND, worker_pb2.BLOCK_MISSING, worker_pb2.BLOCK_LATER)


def test_a_row_is_what_the_protocol_says() -> None:
    row = absent(1, FOUND)
    row["offset"], row["length"], row["generation"], row["segment"], row["tier"], row["raw"] = 1, 2, 3, 4, 5, 1
    assert ROW_BYTES == 192 and row.tobytes() == bytes(160) + struct.pack("<QQQIBBBB", 1, 2, 3, 4, FOUND, 5, 1, 0)
    assert absent(2, LATER).tobytes() == (bytes(188) + bytes([LATER]) + bytes(3)) * 2


@pytest.mark.parametrize("nbytes", [1, 191, 193, 400])
def test_parts_of_a_row_are_corrupt(nbytes: int) -> None:
    with pytest.raises(Corrupt):
        rows_of(bytes(nbytes))
    assert len(rows_of(b"")) == 0


def test_messages_that_no_row_can_be_are_corrupt() -> None:
    for bad in (worker_pb2.OpenBlock(header=b"1"), worker_pb2.OpenBlock(header=bytes(161))):
        with pytest.raises(Corrupt):
            rows_from([bad])


async def test_rows_and_messages_say_the_same(tmp_path: Path) -> None:
    """Of blocks that are there, of one that is not, and of the header that the store itself would pack."""
    async with meeting(tmp_path) as met:
        prefix, other = prompt(10, 5), prompt(11, 1)
        client = await met.cluster.client(alone=True, workers=(met.worker.socket,))
        await client.put(FULL, prefix, blocks_of(prefix))
        request = open_request(prefix, 5)
        request.blocks[0].keys += pack_keys(other.keys)
        plain, _ = await met.locally("Open", request)
        request.rows = True
        packed, _ = await met.locally("Open", request)
        assert not plain.rows and not packed.blocks
        rows = rows_of(packed.rows)
        assert rows.tobytes() == rows_from(plain.blocks).tobytes() and rows.dtype == OPEN_ROWS
        assert rows["state"].tolist() == [FOUND] * 5 + [MISSING]
        assert np.array_equal(rows["header"]["check"][:5], short_checks(rows)[:5])
        residency = met.worker.store.stack.residency
        for row, key in zip(rows[:5], prefix.keys, strict=True):
            found = residency.find("default", WHOLE.digest, key)
            assert found is not None and row["header"].tobytes() == residency.header(found).unencoded().pack()
            assert Header.unpack(row["header"].tobytes()).key == key
