"""Frames by hand agree with protobuf, both ways, on what is well-formed and on what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.errors import Corrupt
from kvstore.transport import frames
from kvstore.wire import worker_pb2

GOLDEN = Path(__file__).parent / "golden"

HEADER = worker_pb2.GetHeader(
    blocks=[
        worker_pb2.BlockInfo(state=worker_pb2.BLOCK_FOUND, header=bytes(range(160)), tier=3),
        worker_pb2.BlockInfo(state=worker_pb2.BLOCK_MISSING),
    ],
    parts=[worker_pb2.ChunkPart(block=0, first_chunk=2, table=b"t" * 80)],
)


def protobuf(frame: bytes) -> tuple[bytes, bytes] | None:
    """What protobuf reads in a frame, None when it refuses."""
    try:
        message = worker_pb2.GetFrame.FromString(frame)
    except DecodeError:
        return None
    return message.h.SerializeToString(deterministic=True), message.data


def by_hand(frame: bytes) -> tuple[bytes, bytes] | None:
    try:
        header, data = frames.decode(frame)
        parsed = worker_pb2.GetHeader.FromString(header or b"")
    except (Corrupt, DecodeError):
        return None
    return parsed.SerializeToString(deterministic=True), bytes(data)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 20])
def test_what_we_write_is_what_protobuf_writes(size: int) -> None:
    data = bytes(size)
    mine = frames.encode(HEADER.SerializeToString(), [memoryview(data)])
    assert mine == worker_pb2.GetFrame(h=HEADER, data=data).SerializeToString()
    assert frames.encode(None, [data]) == worker_pb2.GetFrame(data=data).SerializeToString()


def test_parts_are_joined_and_any_buffer_will_do() -> None:
    whole = bytes(range(200)) * 3
    wide = memoryview(bytearray(whole[:400])).cast("I")
    frame = frames.encode(b"", [wide, bytearray(whole[400:500]), b"", whole[500:]])
    header, data = frames.decode(frame)
    assert header == b"" and data == whole


def test_the_data_is_a_view_and_not_a_copy() -> None:
    frame = bytearray(frames.encode(None, [b"abcd"]))
    _, data = frames.decode(frame)
    frame[-1] = ord("z")
    assert bytes(data) == b"abcz"


def test_duplicates_merge_as_protobuf_says() -> None:
    first = worker_pb2.GetHeader(blocks=[worker_pb2.BlockInfo(state=1)]).SerializeToString()
    second = worker_pb2.GetHeader(blocks=[worker_pb2.BlockInfo(state=2)]).SerializeToString()
    frame = frames.encode(first, [b"old"]) + frames.encode(second, [b"new"])
    assert by_hand(frame) == protobuf(frame)
    header, data = frames.decode(frame)
    assert [block.state for block in worker_pb2.GetHeader.FromString(header or b"").blocks] == [1, 2]
    assert data == b"new"


@pytest.mark.parametrize(
    "unknown",
    [
        b"\x18\x05",  # field 3, varint
        b"\x19" + bytes(8),  # field 3, fixed64
        b"\x1d" + bytes(4),  # field 3, fixed32
        b"\x1a\x02ab",  # field 3, length-delimited
        b"\x1b\x18\x01\x1c",  # field 3, a group with a varint
        b"\x1b\x23\x24\x1c",  # a group within a group
        b"\x10\x07",  # field 2 as a varint: unknown, not data
        b"\xf8\xff\xff\xff\x0f\x00",  # the highest field number
    ],
)
def test_unknown_fields_are_skipped(unknown: bytes) -> None:
    known = frames.encode(HEADER.SerializeToString(), [b"data"])
    for frame in (unknown + known, known + unknown):
        assert by_hand(frame) == protobuf(frame) == (HEADER.SerializeToString(deterministic=True), b"data")


@pytest.mark.parametrize(
    "broken",
    [
        b"\x12",  # a tag alone
        b"\x12\x05abc",  # longer than its frame
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length beyond 64 bits
        b"\x12\xff\xff\xff\xff\x0f",  # beyond 31 bits
        b"\x00\x00",  # field number 0
        b"\x1c",  # the end of no group
        b"\x1b\x24",  # the end of another group
        b"\x1b\x18\x01",  # a group without an end
        b"\x1f",  # wire type 7
        b"\x19\x00",  # a short fixed64
        b"\x80" * 11,  # an endless number
        b"\x1b" * 200,  # nesting without end
    ],
)
def test_malformed_frames_are_corrupt(broken: bytes) -> None:
    assert protobuf(broken) is None, "a negative control: protobuf refuses it too"
    with pytest.raises(Corrupt):
        frames.decode(broken)


@given(st.binary(max_size=400) | st.none(), st.lists(st.binary(max_size=300), max_size=4))
def test_round_trip(header: bytes | None, parts: list[bytes]) -> None:
    found, data = frames.decode(frames.encode(header, parts))
    assert found == header and data == b"".join(parts)


_TAGS = st.sampled_from([b"\x0a", b"\x12", b"\x18", b"\x1a", b"\x1b", b"\x1c", b"\x1d", b"\x19", b"\x10", b"\x08"])


@given(st.lists(_TAGS | st.binary(max_size=6), max_size=12).map(b"".join))
@example(bytes.fromhex("1080808080808080808002"))  # a number with bits beyond 64
def test_any_bytes_mean_the_same_to_both(frame: bytes) -> None:
    assert by_hand(frame) == protobuf(frame)


@pytest.mark.parametrize("cut", range(0, 260, 7))
def test_a_frame_cut_short_means_the_same_to_both(cut: int) -> None:
    frame = frames.encode(HEADER.SerializeToString(), [b"d" * 20])[:cut]
    assert by_hand(frame) == protobuf(frame)


def test_golden_frames_are_read_and_written_for_ever() -> None:
    stored = (GOLDEN / "wire_get_frame.bin").read_bytes()
    header, data = frames.decode(stored)
    assert header == HEADER.SerializeToString(deterministic=True)
    assert data == bytes(range(256)) * 2
    assert frames.encode(header, [bytes(range(256)), bytes(range(256))]) == stored
