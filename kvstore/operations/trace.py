"""Traces of KV-block reuse in the Mooncake format: JSON lines, plain or zstd-compressed, read as a stream.

One request a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, the ids of the prompt's
512-token blocks, chained: an id stands for the whole prefix up to and with its block. Other keys are ignored.
Format: Mooncake (FAST'25), FAST25-release/traces.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from kvstore.errors import SetupError, UsageError

TRACE_BLOCK_TOKENS = 512
LINE_BYTES_MAX = 4 << 20  # a prompt of 200,000 blocks
HASH_ID_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `hash_ids` are chained: each stands for the prefix that ends with its block."""

    timestamp_ms: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    finish: str = ""  # how the output ended, where the trace tells


def read_trace(path: str | Path, requests_max: int | None = None) -> Iterator[Request]:
    """Requests in file order, at most `requests_max`. Holds one line at a time.

    SetupError: the file can't be read. UsageError: a line is malformed, as "TRACE line N: why".
    """
    path = Path(path)
    if requests_max is not None and requests_max <= 0:
        return
    count = 0
    try:
        with path.open("rb") as raw:
            packed = path.suffix == ".zst"
            stream = (
                io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, closefd=False)) if packed else raw
            )
            for number, line in enumerate(_lines(stream, path), 1):
                if not line.strip():
                    continue
                yield _request(line, f"{path} line {number}")
                count += 1
                if count == requests_max:
                    return
    except OSError as error:
        raise SetupError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except zstandard.ZstdError as error:
        raise UsageError(f"{path}: damaged or not zstd data after {count} requests: {error}") from error


def _lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    """Lines of UTF-8 text, each of bounded length."""
    number = 0
    while line := stream.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise UsageError(f"{path} line {number}: longer than {LINE_BYTES_MAX} bytes")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} line {number}: not UTF-8 text: is this a trace in JSON lines?") from error


def _request(line: str, where: str) -> Request:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UsageError(f"{where}: not JSON: {reason}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{where}: a request is a JSON object, not {type(fields).__name__}")
    for key in ("timestamp", "input_length", "output_length", "hash_ids"):
        if key not in fields:
            raise UsageError(f"{where}: {key} is missing")
    numbers = []
    for key in ("timestamp", "input_length", "output_length"):
        value = fields[key]
        whole = isinstance(value, int) or (key == "timestamp" and isinstance(value, float))
        if isinstance(value, bool) or not whole or not 0 <= value < 1 << 53:
            raise UsageError(f"{where}: {key} is {value!r}, not a number of at least 0")
        numbers.append(value)
    finish = fields.get("finish", "")
    if not isinstance(finish, str):
        raise UsageError(f"{where}: finish is {finish!r}, not a string")
    return Request(float(numbers[0]), int(numbers[1]), int(numbers[2]), _hash_ids(fields["hash_ids"], where), finish)


def _hash_ids(ids: object, where: str) -> tuple[int, ...]:
    if not isinstance(ids, list):
        raise UsageError(f"{where}: hash_ids is not a list")
    for position, value in enumerate(ids):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= HASH_ID_MAX:
            raise UsageError(f"{where}: hash_ids[{position}] is {value!r}, not a whole number of at least 0")
    return tuple(ids)


def check_chained(requests: Iterable[Request]) -> None:
    """An id always has the same parent, else prompts that differ would share blocks. UsageError names the request.

    Does not mutate.
    """
    parents: dict[int, int | None] = {}
    for number, request in enumerate(requests, 1):
        parent: int | None = None
        for value in request.hash_ids:
            if parents.setdefault(value, parent) != parent:
                raise UsageError(
                    f"request {number}: block {value} follows {parent}, earlier {parents[value]}: not chained"
                )
            parent = value


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a list of requests asks for."""

    requests: int
    accesses: int
    distinct: int

    @property
    def reusable(self) -> int:
        """Accesses that an unbounded cache would serve."""
        return self.accesses - self.distinct


def footprint(requests: Iterable[Request]) -> Footprint:
    """Counts over requests. Pure."""
    seen: set[int] = set()  # only counted, never iterated
    count = accesses = 0
    for request in requests:
        count += 1
        accesses += len(request.hash_ids)
        seen.update(request.hash_ids)
    return Footprint(count, accesses, len(seen))
