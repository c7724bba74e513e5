"""The trace reader: streams, plain and compressed, and says which line is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from kvstore.errors import SetupError, UsageError
from kvstore.operations.trace import LINE_BYTES_MAX, Footprint, Request, check_chained, footprint, read_trace

GOOD = {"timestamp": 5, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1]}


def lines(*requests: object) -> str:
    return "".join(f"{json.dumps(request)}\n" for request in requests)


def plain(folder: Path, text: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text(text)
    return path


def test_plain_and_compressed_read_the_same(tmp_path: Path) -> None:
    text = lines(GOOD, {**GOOD, "timestamp": 5.5, "hash_ids": [], "finish": "end_turn"}) + "\n\n" + lines(GOOD)
    packed = tmp_path / "trace.jsonl.zst"
    packed.write_bytes(zstandard.compress(text.encode()))
    requests = list(read_trace(plain(tmp_path, text)))
    assert requests == list(read_trace(packed))
    assert requests[0] == Request(5.0, 1100, 7, (0, 1))
    assert [r.hash_ids for r in requests] == [(0, 1), (), (0, 1)]


def test_stops_after_the_asked_number_without_reading_on(tmp_path: Path) -> None:
    path = plain(tmp_path, lines(GOOD) * 3 + "broken\n")
    assert len(list(read_trace(path, 3))) == 3
    assert list(read_trace(path, 0)) == []
    with pytest.raises(UsageError, match="line 4"):
        list(read_trace(path, 4))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: a request is a JSON object, not list"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "hash_ids"}), "line 2: hash_ids is missing"),
        (json.dumps({**GOOD, "hash_ids": 3}), "line 2: hash_ids is not a list"),
        (json.dumps({**GOOD, "hash_ids": [0, -1]}), r"line 2: hash_ids\[1\] is -1"),
        (json.dumps({**GOOD, "hash_ids": [True]}), r"line 2: hash_ids\[0\] is True"),
        (json.dumps({**GOOD, "hash_ids": [1 << 64]}), r"line 2: hash_ids\[0\]"),
        (json.dumps({**GOOD, "hash_ids": ["a"]}), r"line 2: hash_ids\[0\] is 'a'"),
        (json.dumps({**GOOD, "timestamp": "now"}), "line 2: timestamp is 'now'"),
        (json.dumps({**GOOD, "input_length": -1}), "line 2: input_length is -1"),
        (json.dumps({**GOOD, "output_length": 1.5}), r"line 2: output_length is 1\.5"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": []}', "line 2: timestamp is nan"),
        ("x" * (LINE_BYTES_MAX + 1), "line 2: longer than"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        list(read_trace(plain(tmp_path, lines(GOOD) + line + "\n")))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"cannot read the trace .*absent\.jsonl: No such file"):
        list(read_trace(tmp_path / "absent.jsonl"))
    with pytest.raises(SetupError, match="directory"):
        list(read_trace(tmp_path))
    fake = tmp_path / "fake.zst"
    fake.write_bytes(b"not zstd at all")
    with pytest.raises(UsageError, match="zst"):
        list(read_trace(fake))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        list(read_trace(binary))


def test_a_cut_zstd_file_is_an_error_after_its_whole_requests(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.zst"
    whole = zstandard.compress(lines(*[{**GOOD, "hash_ids": list(range(i, i + 50))} for i in range(2000)]).encode())
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError):
        list(read_trace(cut))


def test_footprint_and_chaining() -> None:
    requests = [Request(0, 0, 0, (0, 1, 2)), Request(1, 0, 0, (0, 1, 3)), Request(2, 0, 0, ())]
    assert footprint(requests) == Footprint(3, 6, 4)
    assert footprint(requests).reusable == 2
    check_chained(requests)
    with pytest.raises(UsageError, match=r"request 2: block 1 follows 9, earlier 0"):
        check_chained([Request(0, 0, 0, (0, 1)), Request(0, 0, 0, (9, 1))])
