"""The index file of a segment: pages that say which records its data file holds. docs/FORMAT-SSD.md.

A page is written once and never changed. Recovery reads index files, not data. Pure.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.checksum import xxh3
from kvstore.errors import BadRequest, Corrupt, UnknownFormat
from kvstore.header import HEADER_BYTES, Header
from kvstore.header_columns import HEADERS, Columns
from kvstore.spec import ModelSpec, Shard

PAGE_BYTES = 4096
MAGIC = b"KVI1"
VERSION = 1

OPEN, WORDS, BLOCKS, FREED = 1, 2, 3, 4
"""Kinds of page: the segment itself, dictionary entries, records, records freed."""

_HEAD = struct.Struct("<4sBBHIIQQQ16xQ")
HEAD_BYTES = _HEAD.size
_CHECKED = HEAD_BYTES - 8  # bytes of the head under the checksum
assert HEAD_BYTES == 64

_PLACE = struct.Struct("<QQ")
ENTRY_BYTES = HEADER_BYTES + _PLACE.size
ENTRIES = np.dtype([("header", HEADERS), ("offset", "<u8"), ("nbytes", "<u8")])
"""The lines of BLOCKS pages as columns."""
assert ENTRIES.itemsize == ENTRY_BYTES
ENTRIES_A_PAGE = (PAGE_BYTES - HEAD_BYTES) // ENTRY_BYTES
_OFFSET = struct.Struct("<Q")
FREED_A_PAGE = (PAGE_BYTES - HEAD_BYTES) // _OFFSET.size
_LIMIT = struct.Struct("<Q")

Word = tuple[str, Any]
"""A dictionary entry: ("namespace", name), ("spec", canonical JSON) or ("shard", the five fields of a `Shard`)."""


@dataclass(frozen=True, slots=True)
class Page:
    """One valid page (or several that belong together, for a long dictionary entry)."""

    kind: int
    count: int
    segment: int
    nonce: int
    sequence: int
    payload: bytes


def pack_page(kind: int, count: int, segment: int, nonce: int, sequence: int, payload: bytes) -> bytes:
    """Whole pages, zeros behind the payload."""
    pages = -(-(HEAD_BYTES + len(payload)) // PAGE_BYTES)
    head = _HEAD.pack(MAGIC, VERSION, kind, count, pages, len(payload), segment, nonce, sequence, 0)[:_CHECKED]
    sealed = head + _OFFSET.pack(xxh3(head + payload)) + payload
    return sealed + bytes(pages * PAGE_BYTES - len(sealed))


def pack_entry(header: Header, offset: int, nbytes: int) -> bytes:
    """A record's line in a BLOCKS page."""
    return header.pack() + _PLACE.pack(offset, nbytes)


def open_page(segment: int, nonce: int, limit: int) -> bytes:
    return pack_page(OPEN, 1, segment, nonce, 0, _LIMIT.pack(limit))


def words_payload(words: Sequence[Word]) -> bytes:
    return json.dumps(list(words), separators=(",", ":"), ensure_ascii=False).encode()


def pages_of(
    segment: int, nonce: int, sequence: int, words: Sequence[Word], entries: Sequence[bytes], freed: Sequence[int]
) -> tuple[bytes, int]:
    """(pages that append all of it, the next sequence number). Words first: an entry needs them."""
    pages: list[bytes] = []

    def add(kind: int, count: int, payload: bytes) -> None:
        pages.append(pack_page(kind, count, segment, nonce, sequence + len(pages), payload))

    for word in words:  # one a page: what is damaged takes no other with it
        add(WORDS, 1, words_payload([word]))
    for start in range(0, len(entries), ENTRIES_A_PAGE):
        some = entries[start : start + ENTRIES_A_PAGE]
        add(BLOCKS, len(some), b"".join(some))
    for start in range(0, len(freed), FREED_A_PAGE):
        gone = freed[start : start + FREED_A_PAGE]
        add(FREED, len(gone), b"".join(_OFFSET.pack(offset) for offset in gone))
    return b"".join(pages), sequence + len(pages)


@dataclass(slots=True)
class Scan:
    """What `scan_pages` met besides the pages it yielded."""

    damaged: int = 0  # pages that do not hold


def scan_pages(content: bytes, segment: int, scan: Scan) -> Iterator[Page]:
    """The valid pages of an index file, in order; what does not hold is skipped and counted.

    The nonce of the first page, drawn when the segment began, is on every page: nothing that a writer of blocks or
    names could choose passes for a page. Nothing is yielded when the first page is damaged or of another segment.
    UnknownFormat for a version of the future.
    """
    position, nonce = 0, None
    while position < len(content):
        page, pages = _page_at(content, position)
        ours = page is not None and page.segment == segment
        if page is not None and ours and (page.kind == OPEN if position == 0 else page.nonce == nonce):
            nonce = page.nonce
            yield page
        else:
            scan.damaged += 1
            if position == 0:
                return
        position += pages * PAGE_BYTES


def _page_at(content: bytes, position: int) -> tuple[Page | None, int]:
    """(the page or None, pages to step over)."""
    if len(content) - position < HEAD_BYTES:
        return None, 1
    head = _HEAD.unpack_from(content, position)
    magic, version, kind, count, pages, length, segment, nonce, sequence, checksum = head
    if magic != MAGIC:
        return None, 1
    end = position + HEAD_BYTES + length
    if end > len(content) or pages != -(-(HEAD_BYTES + length) // PAGE_BYTES):
        return None, 1
    payload = content[position + HEAD_BYTES : end]
    if xxh3(content[position : position + _CHECKED] + payload) != checksum:
        return None, 1
    if version != VERSION:
        raise UnknownFormat(f"segment {segment} has index version {version}: this build reads {VERSION}")
    return Page(kind, count, segment, nonce, sequence, payload), pages


def limit_of(page: Page) -> int:
    """Bytes the data file of an OPEN page's segment may grow to."""
    return int(_LIMIT.unpack_from(page.payload)[0])


def entries_of(pages: Sequence[Page]) -> Columns:
    """The lines of BLOCKS pages: (n,) of ENTRIES."""
    return np.frombuffer(b"".join(page.payload[: lines_of(page) * ENTRY_BYTES] for page in pages), ENTRIES)


def lines_of(page: Page) -> int:
    """How many a BLOCKS page has."""
    return min(page.count, len(page.payload) // ENTRY_BYTES)


def freed_of(page: Page) -> list[int]:
    """Offsets of a FREED page."""
    return [offset for (offset,) in _OFFSET.iter_unpack(page.payload)]


def words_of(page: Page) -> list[str | ModelSpec | Shard]:
    """Dictionary entries of a WORDS page: a namespace's name, a spec or a shard. Corrupt where one is none."""
    found: list[str | ModelSpec | Shard] = []
    try:
        for kind, value in json.loads(page.payload):
            if kind == "namespace" and isinstance(value, str):
                found.append(value)
            elif kind == "spec" and isinstance(value, str):
                found.append(ModelSpec.from_json(value))
            elif kind == "shard":
                found.append(Shard(*value))
    except (ValueError, TypeError, BadRequest) as error:
        raise Corrupt(f"a dictionary entry does not hold: {error}") from None
    return found


def word_of_shard(shard: Shard) -> Word:
    return ("shard", [shard.group, shard.layer_first, shard.layer_count, shard.head_first, shard.head_count])
