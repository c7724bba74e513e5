"""Blocks copied from another worker as they are stored: equal to the source's, or not taken at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import codecs
from kvstore.client.pulling import Landing
from kvstore.errors import Corrupt, DataError
from kvstore.format import ENTRY_BYTES, HEADER_BYTES, Header, Record, decode_record, encode_raw_parts, encode_record
from kvstore.keys import Chain
from kvstore.layout import block_bytes, chunks
from kvstore.spec import Shard
from kvstore.transport import frames
from kvstore.wire import worker_pb2
from tests.contracts.records import NAMESPACE, sample, small_spec
from tests.service_helpers import FULL, payload, prompt

SHARD = Shard.whole(FULL)
PREFIX = prompt(1, 3)
FULL_BYTES = block_bytes(FULL, SHARD)


def header(prefix: Chain, depth: int, namespace: str = "default") -> Header:
    return Header.new(
        namespace,
        FULL,
        SHARD,
        key=prefix.keys[depth],
        parent=prefix.parent(depth),
        group=prefix.group(depth),
        depth=depth,
    )


def stored(depth: int, *, raw: bool, namespace: str = "default") -> tuple[Header, bytes]:
    """A block as a source holds it: its header, and its record or raw bytes."""
    data = payload(FULL, SHARD, PREFIX.keys[depth])
    made, parts = encode_record(header(PREFIX, depth, namespace), data, FULL, SHARD, codecs.SPLIT)
    return (made.unencoded(), data.tobytes()) if raw else (made, b"".join(map(bytes, parts)))


def frames_of(*blocks: tuple[Header, bytes] | None) -> list[bytes]:
    """What a worker sends for blocks: one frame that names them, then one for each chunk of each."""
    first = worker_pb2.GetHeader()
    sent = []
    for index, block in enumerate(blocks):
        if block is None:
            first.blocks.add(state=worker_pb2.BLOCK_MISSING)
            continue
        head, data = block
        first.blocks.add(state=worker_pb2.BLOCK_FOUND, header=head.pack())
        record = data
        if not head.chunk_count:
            made, table = encode_raw_parts(head, data, FULL, SHARD)
            record = made.pack() + table + data
        parsed = Record.parse(record)
        for chunk, row in enumerate(parsed.table.tolist()):
            part = worker_pb2.GetHeader()
            at = HEADER_BYTES + chunk * ENTRY_BYTES
            part.parts.add(block=index, first_chunk=chunk, table=record[at : at + ENTRY_BYTES])
            sent.append(frames.encode(part.SerializeToString(), [record[row[8] : row[8] + row[9]]]))
    return [frames.encode(first.SerializeToString(), ()), *sent]


Pulled = tuple[Header, bytes]


def roomy(landing: Landing) -> list[memoryview | None]:
    """Room for all that is coming, as an arena gives it: with the bytes of other blocks in it."""
    sizes = [0 if head is None else head.stored_length or head.raw_length for head in landing.coming()]
    rooms = [memoryview(bytearray(b"\xa5" * size)) if size else None for size in sizes]
    landing.land_in(rooms)
    return rooms


def finished(landing: Landing, rooms: list[memoryview | None]) -> list[Pulled | None]:
    """What lies whole in its room."""
    heads = landing.coming()
    found: list[Pulled | None] = []
    for head, room, nbytes in zip(heads, rooms, landing.finish(), strict=True):
        assert not nbytes or (head is not None and room is not None and nbytes == len(room))
        found.append((head, bytes(room)) if nbytes and head is not None and room is not None else None)
    return found


def land(sent: list[bytes]) -> list[Pulled | None]:
    """The same by gRPC and by a raw connection."""
    by_grpc, by_raw = (Landing("default", FULL, SHARD, PREFIX.keys) for _ in range(2))
    rooms: list[list[memoryview | None]] = []
    for frame in sent:
        by_grpc.take(frame)
        packed, data = frames.decode(frame)
        for place in by_raw.places(packed or b"", len(data)):
            place[:], data = data[: len(place)], data[len(place) :]
        by_raw.landed()
        rooms = rooms or [roomy(by_grpc), roomy(by_raw)]
    found, same = finished(by_grpc, rooms[0]), finished(by_raw, rooms[1])
    assert found == same and (by_grpc.bad, by_grpc.later) == (by_raw.bad, by_raw.later)
    return found


def test_records_arrive_byte_for_byte_and_raw_blocks_raw() -> None:
    record, raw = stored(0, raw=False), stored(1, raw=True)
    first, second, third = land(frames_of(record, raw, None))
    assert first == record
    out = bytearray(first[0].raw_length)
    decode_record(Record.parse(memoryview(first[1])), FULL, SHARD, memoryview(out))
    assert np.array_equal(np.frombuffer(out, np.uint8), payload(FULL, SHARD, PREFIX.keys[0]))
    assert second == raw and third is None


def test_a_nested_record_arrives_layer_by_layer() -> None:
    """Several entries a chunk: a part's first chunk is not the number of its first entry."""
    found = sample(0, spec=small_spec(block_tokens=64), codec=codecs.NESTED)
    made, record, pieces = found.header, found.record, len(chunks(found.spec, found.shard))
    each = made.chunk_count // pieces
    assert each > 1
    landing = Landing(NAMESPACE, found.spec, found.shard, [made.key])
    first = worker_pb2.GetHeader(blocks=[worker_pb2.BlockInfo(state=worker_pb2.BLOCK_FOUND, header=made.pack())])
    landing.take(frames.encode(first.SerializeToString(), ()))
    rooms = roomy(landing)
    rows = Record.parse(record).table.tolist()
    for chunk in range(pieces):
        part, at = worker_pb2.GetHeader(), HEADER_BYTES + chunk * each * ENTRY_BYTES
        part.parts.add(block=0, first_chunk=chunk, table=record[at : at + each * ENTRY_BYTES])
        mine = rows[chunk * each : (chunk + 1) * each]
        landing.take(frames.encode(part.SerializeToString(), [record[row[8] : row[8] + row[9]] for row in mine]))
    assert finished(landing, rooms) == [(made, record)]


def test_a_stream_that_ends_early_gives_what_was_whole() -> None:
    sent = frames_of(stored(0, raw=False), stored(1, raw=False), None)
    assert [pulled is not None for pulled in land(sent[:-1])] == [True, False, False]


@pytest.mark.parametrize("raw", [True, False])
def test_what_was_announced_and_did_not_come_whole_is_not_taken(raw: bool) -> None:
    """A connection that breaks between the header of a frame and its data."""
    sent = frames_of(stored(0, raw=raw), None, None)
    landing = Landing("default", FULL, SHARD, PREFIX.keys)
    landing.take(sent[0])
    rooms = roomy(landing)
    for frame in sent[1:-1]:
        landing.take(frame)
    packed, data = frames.decode(sent[-1])
    places = landing.places(packed or b"", len(data))
    assert sum(map(len, places)) == len(data) > 0
    assert landing.finish() == [0, 0, 0]
    for place, at in zip(places, range(0, len(data), len(data)), strict=True):
        place[:] = data[at : at + len(place)]
    landing.landed()
    assert [pulled is not None for pulled in finished(landing, rooms)] == [True, False, False]


def test_a_block_without_room_lands_nowhere_and_is_no_fault() -> None:
    """Not wanted, or no room for it: its bytes come all the same, and the others' are right."""
    sent = frames_of(stored(0, raw=True), stored(1, raw=False), stored(2, raw=True))
    landing = Landing("default", FULL, SHARD, PREFIX.keys)
    landing.take(sent[0])
    rooms = [memoryview(bytearray(FULL_BYTES)), None, None]
    landing.land_in(rooms)
    for frame in sent[1:]:
        landing.take(frame)
    assert landing.finish() == [FULL_BYTES, 0, 0] and landing.bad == 0
    assert rooms[0] == stored(0, raw=True)[1]


def test_what_comes_before_there_is_room_is_not_taken() -> None:
    sent = frames_of(stored(0, raw=True), None, None)
    landing = Landing("default", FULL, SHARD, PREFIX.keys)
    for frame in sent:
        landing.take(frame)
    roomy(landing)
    assert landing.finish() == [0, 0, 0] and landing.bad == 1


def test_a_frame_with_more_or_less_than_its_parts_is_refused() -> None:
    packed, data = frames.decode(frames_of(stored(0, raw=True), None, None)[1])
    for nbytes in (len(data) - 1, len(data) + 1, 0):
        landing = Landing("default", FULL, SHARD, PREFIX.keys)
        landing.take(frames_of(stored(0, raw=True), None, None)[0])
        roomy(landing)
        with pytest.raises(Corrupt):
            landing.places(packed or b"", nbytes)


@pytest.mark.parametrize("wrong", ["namespace", "order"])
def test_a_block_that_is_not_the_one_asked_for_is_not_taken(wrong: str) -> None:
    blocks = [stored(0, raw=False), stored(1, raw=False)]
    if wrong == "namespace":
        blocks = [stored(0, raw=False, namespace="other"), blocks[1]]
        assert [pulled is not None for pulled in land(frames_of(*blocks, None))] == [False, True, False]
    else:
        assert land(frames_of(blocks[1], blocks[0], None)) == [None, None, None]


@settings(max_examples=300)
@given(st.data(), st.booleans())
def test_a_flipped_bit_never_gives_other_bytes(data: st.DataObject, raw: bool) -> None:
    block = stored(0, raw=raw)
    sent = frames_of(block, None, None)
    frame = data.draw(st.integers(0, len(sent) - 1))
    flipped = bytearray(sent[frame])
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    sent[frame] = bytes(flipped)
    try:
        found = land(sent)
    except DataError:
        return
    for pulled in found:
        assert pulled is None or pulled == block
