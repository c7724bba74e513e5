"""Frames received where they belong: which of them are taken as columns, and that the others are looked at one by
one."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvstore.checksum import xxh3
from kvstore.client.arrivals import Arrivals
from kvstore.client.in_place import InPlace, raw_parts
from kvstore.client.pieces import Asked, Piece, bound
from kvstore.client.raw_headers import RawHeaders
from kvstore.client.targets import Target
from kvstore.errors import Corrupt, DataError, Unavailable
from kvstore.format import ENTRY_DTYPE
from kvstore.header import Header
from kvstore.layout import chunks
from kvstore.machine.system import ThreadPool
from kvstore.raw_table import raw_table
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.transport.data_link import BUFFERS_AT_ONCE, DataLink
from kvstore.types import Fidelity, Tier
from kvstore.wire import worker_pb2

SPEC = ModelSpec("deep", (Group(layers=6, kv_heads=4, k_dim=8, v_dim=8),), dtype="float32", block_tokens=4)
WHOLE = Shard.whole(SPEC)
TABLE = raw_table(SPEC, WHOLE)
SIZE = TABLE.ends[-1]
A_LAYER = 2  # chunks
BLOCKS = 3
RAWS = [np.random.Generator(np.random.PCG64(number)).integers(0, 256, SIZE, np.uint8).data for number in range(BLOCKS)]


def header_of(number: int, **changes: object) -> Header:
    made = Header.new(
        "default", SPEC, WHOLE, key=bytes([number]) * 16, parent=bytes(16), group=bytes(16), depth=number + 1,
        computed_on=Fidelity.EXACT, copy_id=xxh3(RAWS[number]),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


class Case:
    """Arrivals of BLOCKS blocks, and what a worker sends of them."""

    def __init__(self, pool: ThreadPool, *, layerwise: bool = True) -> None:
        self.asked = Asked("default", SPEC, Fidelity.EXACT, layerwise=layerwise)
        self.into = [memoryview(bytearray(SIZE)) for _ in RAWS]
        self.pieces = [
            Piece(WHOLE, WHOLE, number, bytes([number]) * 16, Target([into])) for number, into in enumerate(self.into)
        ]
        self.noted: list[tuple[int, int, int]] = []
        self.arrivals = Arrivals(pool, self.asked, self.pieces)
        self.landing = InPlace(self.arrivals, self.noted.extend)

    def announce(self) -> None:
        first = worker_pb2.GetHeader()
        for number in range(BLOCKS):
            first.blocks.add(state=worker_pb2.BLOCK_FOUND, header=header_of(number).pack(), tier=int(Tier.HOT))
        assert list(self.landing.places(first.SerializeToString(), 0)) == []
        self.landing.landed()

    def frame(self, layer: int) -> tuple[worker_pb2.GetHeader, list[bytes]]:
        made, data = worker_pb2.GetHeader(), []
        first, last = layer * A_LAYER, (layer + 1) * A_LAYER
        for number, raw in enumerate(RAWS):
            table = TABLE.entries[first:last].copy()
            table["xxh3"] = [xxh3(raw[TABLE.ends[at] : TABLE.ends[at + 1]]) for at in range(first, last)]
            made.parts.add(block=number, first_chunk=first, table=table.tobytes())
            data.append(bytes(raw[TABLE.ends[first] : TABLE.ends[last]]))
        return made, data

    def send(self, header: worker_pb2.GetHeader, data: list[bytes]) -> None:
        joined, at = b"".join(data), 0
        for place in self.landing.places(header.SerializeToString(), len(joined)):
            place[:] = joined[at : at + len(place)]
            at += len(place)
        assert at == len(joined)
        self.landing.landed()

    @property
    def simple(self) -> bool:
        """Whether the frame whose places were told is taken as columns."""
        return self.landing._raw is not None


@pytest.fixture
def case() -> Iterator[Case]:
    pool = ThreadPool(1)
    yield Case(pool)
    pool.close()


def test_the_table_is_that_of_the_chunks() -> None:
    for row, piece in zip(TABLE.entries, chunks(SPEC, WHOLE), strict=True):
        assert (row["layer"], row["component"], row["stored"]) == (piece.layer, piece.component, piece.nbytes)
    assert not TABLE.entries.flags.writeable and not TABLE.words.flags.writeable


async def test_layers_are_taken_as_columns_and_what_changed_is_not(case: Case) -> None:
    case.announce()
    for layer in range(6):
        header, data = case.frame(layer)
        if layer == 4:
            data[1] = bytes([data[1][0] ^ 1]) + data[1][1:]
        case.landing.places(header.SerializeToString(), sum(map(len, data)))
        assert case.simple, "a negative control: these are the frames that are meant"
        case.send(header, data)
    assert case.noted == [
        (number, A_LAYER * layer, -1 if (layer, number) == (4, 1) else A_LAYER)
        for layer in range(6)
        for number in range(BLOCKS)
    ]
    case.arrivals.note(case.noted)
    await case.arrivals.finish()
    assert [piece.tier for piece in case.pieces] == [Tier.HOT, None, Tier.HOT]
    assert [piece.problem for piece in case.pieces] == ["", "Corrupt", ""] and case.into[2] == RAWS[2]


@pytest.mark.parametrize("field", [name for name in ENTRY_DTYPE.names or () if name not in ("offset", "xxh3")])
def test_any_other_table_is_looked_at_one_by_one(case: Case, field: str) -> None:
    case.announce()
    header, data = case.frame(0)
    sizes = sum(map(len, data))
    assert raw_parts(case.arrivals.blocks, header.parts, sizes) is not None
    table = np.frombuffer(header.parts[1].table, ENTRY_DTYPE).copy()
    table[field][1] += 1
    header.parts[1].table = table.tobytes()
    assert raw_parts(case.arrivals.blocks, header.parts, sizes) is None
    if field == "stored":
        with pytest.raises(Corrupt):
            case.send(header, data)
        return
    case.send(header, data)
    outcomes = [count for _, _, count in case.noted]
    assert outcomes == [2, 2 if field == "params" else -1, 2], "nothing is read from the parameters of a raw chunk"


def test_parts_that_are_none_are_not_taken_as_columns(case: Case) -> None:
    case.announce()

    def changed(**fields: object) -> worker_pb2.GetHeader:
        header, _ = case.frame(1)
        for name, value in fields.items():
            setattr(header.parts[2], name, value)
        return header

    nbytes, table = sum(map(len, case.frame(1)[1])), case.frame(1)[0].parts[2].table
    assert raw_parts(case.arrivals.blocks, changed().parts, nbytes) is not None
    for wrong in (
        changed(block=BLOCKS), changed(first_chunk=4), changed(first_chunk=11), changed(table=b""),
        changed(table=table + table[:40]), changed(table=table[:-1]),
    ):  # fmt: skip
        assert raw_parts(case.arrivals.blocks, wrong.parts, nbytes) is None
    assert raw_parts(case.arrivals.blocks, changed().parts, nbytes + 1) is None
    case.arrivals.blocks[2] = None  # it was no good
    assert raw_parts(case.arrivals.blocks, changed().parts, nbytes) is None


def test_what_is_said_of_a_raw_block_is_what_its_header_is_bound_to(case: Case) -> None:
    headers = RawHeaders(case.asked, WHOLE)
    piece, packed = case.pieces[1], header_of(1).pack()
    assert headers.said(piece.key, packed) == (Fidelity.EXACT, Fidelity.EXACT, xxh3(RAWS[1]))
    for at in range(len(packed)):
        other = bytearray(packed)
        other[at] ^= 1
        try:
            bound(case.asked, piece, bytes(other))
            good = True
        except DataError:
            good = False
        assert (headers.said(piece.key, bytes(other)) is not None) == good, at
    for wrong in (
        header_of(1, key=bytes(16)), header_of(1, tokens=5), header_of(1, shard=bytes(16)),
        header_of(1, computed_on=Fidelity.NEAR), header_of(1, stored=Fidelity.COMPACT),
    ):  # fmt: skip
        assert headers.said(piece.key, wrong.pack()) is None
    assert headers.said(piece.key, b"") is None and headers.said(piece.key, packed + b"\0") is None


async def test_what_is_expected_is_what_comes_or_made_anew(case: Case) -> None:
    case.pieces[1].copy_id, case.pieces[1].chunks = xxh3(RAWS[1]), 4  # the first two layers came before it broke
    case.into[1][: TABLE.ends[4]] = RAWS[1][: TABLE.ends[4]]
    case.arrivals.expect()
    case.announce()
    assert [len(item.missing) for item in case.arrivals.blocks if item is not None] == [12, 8, 12]
    for layer in range(6):
        case.send(*case.frame(layer))
    case.arrivals.note(case.noted)
    await case.arrivals.finish()
    assert [piece.tier for piece in case.pieces] == [Tier.HOT] * 3 and case.into == RAWS


async def test_many_places_are_filled_in_order_or_the_end_is_told() -> None:
    here, there = _connected()
    pool = ThreadPool(1)
    link = DataLink(here, pool, 1 << 20)
    sizes = [size % 7 for size in range(2 * BUFFERS_AT_ONCE + 3)] + [1 << 20]
    data = np.random.Generator(np.random.PCG64(1)).bytes(sum(sizes))

    def send() -> None:
        for at in range(0, len(data), 100_003):
            there.sendall(data[at : at + 100_003])
        there.close()

    sender = threading.Thread(target=send)
    sender.start()
    places = [memoryview(bytearray(size)) for size in sizes]
    async with asyncio.timeout(10):
        await link.bulk(lambda: link.fill_all(places))
        assert b"".join(places) == data
        await link.bulk(lambda: link.fill_all([memoryview(b"")]))
        with pytest.raises(Unavailable):
            await link.bulk(lambda: link.fill_all([memoryview(bytearray(1))]))
    sender.join()
    link.close()
    pool.close()


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        here, _ = server.accept()
    return here, there
