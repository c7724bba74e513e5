"""What is on the wire stays: golden messages, the local socket's bytes, the proto, the numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import errors
from kvstore.errors import BadRequest
from kvstore.transport import local_frames
from kvstore.transport.local_frames import Decoder, Frame
from kvstore.transport.methods import SERVICES, WORKER_LOCAL
from tests.golden_wire import GOLDEN, LOCAL_HELLO, MESSAGES, files

ROOT = Path(__file__).parent.parent
KINDS = (local_frames.REQUEST, local_frames.REPLY, local_frames.ERROR)


@pytest.mark.parametrize("name", sorted(files()))
def test_golden_messages_are_written_as_they_were(name: str) -> None:
    assert (GOLDEN / f"wire_{name}.bin").read_bytes() == files()[name]


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_golden_messages_are_read_as_they_were(name: str) -> None:
    message = MESSAGES[name]
    assert type(message).FromString((GOLDEN / f"wire_{name}.bin").read_bytes()) == message


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_a_newer_peers_fields_do_no_harm(name: str) -> None:
    message = MESSAGES[name]
    newer = (GOLDEN / f"wire_{name}.bin").read_bytes() + b"\xfa\x07\x03new"  # field 127
    read = type(message).FromString(newer)
    read.DiscardUnknownFields()
    assert read == message


def test_every_call_of_the_proto_is_in_the_table() -> None:
    for name, table in SERVICES.items():
        text = "".join(path.read_text() for path in sorted((ROOT / "proto/kvstore/wire").glob("*.proto")))
        body = re.search(rf"service {name} {{(.*?)\n}}", text, re.DOTALL)
        assert body is not None
        calls = re.findall(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\)", body.group(1))
        assert {call[0] for call in calls} == set(table)
        for call, client_stream, request, server_stream, reply in calls:
            method = table[call]
            assert (bool(client_stream), bool(server_stream)) == (method.client_stream, method.server_stream)
            for wanted, found in ((request, method.request), (reply, method.reply)):
                assert found.DESCRIPTOR.name == wanted if found is not None else wanted in ("GetFrame", "PutFrame")


def test_every_local_call_has_its_number_for_ever() -> None:
    first = {"Hello": 1, "Match": 2, "Open": 3, "Release": 4, "Stage": 5, "Commit": 6}
    assert {**first, "Pin": 7, "Renew": 8, "Unpin": 9, "Prefetch": 10, "Hint": 11} == local_frames.NUMBERS
    assert set(local_frames.NUMBERS) == set(WORKER_LOCAL)


def test_the_example_of_the_documentation_is_what_is_sent() -> None:
    text = (ROOT / "docs/PROTOCOL.md").read_text()
    shown = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert shown is not None
    digits = "".join(line.split("#")[0] for line in shown.group(1).splitlines())
    assert bytes.fromhex(digits) == (GOLDEN / "wire_local_hello.bin").read_bytes()
    [frame] = Decoder(1000, KINDS).feed(bytes.fromhex(digits))
    assert frame.payload == LOCAL_HELLO.SerializeToString(deterministic=True)


def test_every_error_code_is_documented() -> None:
    text = (ROOT / "docs/PROTOCOL.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert [kind.code for kind in kinds if f"`{kind.code}`" not in text] == []


frames = st.lists(
    st.builds(
        lambda kind, method, call, message, flags: (kind, method, call, message, flags),
        st.sampled_from(KINDS),
        st.integers(0, 255),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=40),
        st.binary(max_size=5),
    ),
    max_size=6,
)


@given(frames, st.lists(st.integers(1, 30), max_size=30))
def test_frames_come_whole_however_the_bytes_are_cut(
    sent: list[tuple[int, int, int, bytes, bytes]], cuts: list[int]
) -> None:
    data = b"".join(local_frames.encode(*frame) for frame in sent)
    decoder, got = Decoder(100, KINDS), list[Frame]()
    at = 0
    for cut in [*cuts, len(data)]:
        got += decoder.feed(data[at : at + cut])
        at += cut
    assert [(f.kind, f.method, f.call, f.payload, f.descriptors) for f in got] == [
        (kind, method, call, flags + message, len(flags)) for kind, method, call, message, flags in sent
    ]
    assert decoder.idle


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_any_bytes_are_frames_or_a_bad_request_and_never_pile_up(parts: list[bytes]) -> None:
    decoder = Decoder(100, KINDS)
    for part in parts:
        try:
            decoder.feed(part)
        except BadRequest:
            break
        assert len(decoder._buffer) < local_frames.HEAD.size + 100 + local_frames.DESCRIPTORS_MAX


def test_errors_survive_the_local_wire() -> None:
    for kind in (errors.NotGranted, errors.Overloaded, errors.BadRequest, errors.Unavailable, errors.Corrupt):
        [frame] = Decoder(5000, KINDS).feed(local_frames.encode_error(3, 4, kind("two\nlines ü")))
        error = local_frames.decode_error(frame.payload)
        assert type(error) is kind and str(error) == "two lines ü"
    assert len(local_frames.encode_error(3, 4, errors.BadRequest("x" * 100_000))) < 2_000
    assert type(local_frames.decode_error(b"\xff\xfe")) is errors.ServiceError


def test_more_descriptors_than_a_frame_may_have_are_refused() -> None:
    with pytest.raises(BadRequest, match="at most 1024"):
        local_frames.encode(local_frames.REPLY, 3, 1, b"", bytes(1025))
