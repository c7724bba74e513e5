"""Receiving where it belongs: where the data of each frame of a raw connection goes, and whether it is good there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from kvstore.checksum import xxh3
from kvstore.client.arrivals import Arrivals, Arriving, Landed, stored_bytes
from kvstore.errors import Corrupt
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE
from kvstore.raw_table import FIXED, WORDS
from kvstore.wire import worker_pb2


@dataclass(frozen=True, slots=True)
class RawParts:
    """The parts of a frame, all of them raw chunks that lie together in their blocks."""

    parts: list[tuple[int, Arriving, int, int]]  # (block, that, first chunk, chunks)
    places: list[memoryview]
    sums: list[int]  # of each chunk


class InPlace:
    """`kvstore.transport.base.Landing` over the blocks of one Get: raw chunks are received where they belong, others
    into memory of its own. Runs in a byte mover."""

    def __init__(self, arrivals: Arrivals, at_once: Callable[[Landed], object] | None) -> None:
        self._arrivals, self._at_once = arrivals, at_once
        self._later: Landed = []
        self._raw: RawParts | None = None
        self._parts: list[tuple[worker_pb2.ChunkPart, memoryview, bool]] = []
        self._aside = memoryview(b"")

    def places(self, header: bytes, nbytes: int) -> Sequence[memoryview]:
        """Mutates."""
        try:
            parsed = worker_pb2.GetHeader.FromString(header)
        except DecodeError:
            raise Corrupt("a frame has no readable header") from None
        self._arrivals.announce(parsed)
        self._raw = raw_parts(self._arrivals.blocks, parsed.parts, nbytes)
        return self._one_by_one(parsed.parts, nbytes) if self._raw is None else self._raw.places

    def _one_by_one(self, parts: Sequence[worker_pb2.ChunkPart], nbytes: int) -> list[memoryview]:
        sizes = [stored_bytes(part.table) for part in parts]
        if sum(sizes) != nbytes:
            raise Corrupt(f"{nbytes} bytes came for chunks of {sum(sizes)}")
        if nbytes > len(self._aside):  # once, or twice: frames are of much the same size
            self._aside = memoryview(np.empty(nbytes, np.uint8).data)
        start = 0
        self._parts = []
        for part, size in zip(parts, sizes, strict=True):
            place = self._arrivals.place(part, size)
            aside = self._aside[start : start + size]
            self._parts.append((part, aside, False) if place is None else (part, place, True))
            start += size
        return [place for _, place, _ in self._parts]

    def landed(self) -> None:
        """Mutates."""
        raw, parts, self._raw, self._parts = self._raw, self._parts, None, []
        if raw is not None:
            landed = self._checked(raw)
        else:
            landed = [self._arrivals.land(part, place, there=there, alone=True) for part, place, there in parts]
        if self._at_once is None:
            self._later += landed
        elif landed:
            self._at_once(landed)

    def _checked(self, raw: RawParts) -> Landed:
        landed, at = Landed(), 0
        for block, item, first, count in raw.parts:
            item.whole = None
            summed, ends = self._arrivals.summed(item), item.table.ends
            sums, at = raw.sums[at : at + count], at + count
            if summed and sums != [xxh3(item.raw[ends[one] : ends[one + 1]]) for one in range(first, first + count)]:
                item.piece.problem = "Corrupt"
                landed.append((block, first, -1))
                continue
            self._arrivals.came(item, first, count, summed_now=not summed)
            landed.append((block, first, count))
        return landed

    def conclude(self) -> None:
        """In the event loop, when nothing comes any more. Mutates."""
        landed, self._later = self._later, []
        self._arrivals.note(landed)


def raw_parts(blocks: Sequence[Arriving | None], parts: Sequence[worker_pb2.ChunkPart], nbytes: int) -> RawParts | None:
    """A frame's parts, its table checked as columns; None where anything about it is not as simple, or wrong. Pure."""
    tables = [part.table for part in parts]
    packed = b"".join(tables)
    if not packed or len(packed) % ENTRY_BYTES:
        return None
    found, places, expected = [], [], []
    for part, table in zip(parts, tables, strict=True):
        block, first, count = part.block, part.first_chunk, len(table) // ENTRY_BYTES
        item = blocks[block] if block < len(blocks) else None
        if item is None or not count or len(table) % ENTRY_BYTES or first + count > len(item.table.chunks):
            return None
        places.append(item.raw[item.table.ends[first] : item.table.ends[first + count]])
        expected.append((item.table.words, first, count))
        found.append((block, item, first, count))
    words, first, count = expected[0]
    rows = np.frombuffer(packed, np.uint64).reshape(-1, WORDS)
    if all(one[0] is words and one[1] == first and one[2] == count for one in expected):  # a layer, mostly
        differing = (rows.reshape(-1, count, WORDS) ^ words[first : first + count]) & FIXED
    else:
        differing = (rows ^ np.concatenate([those[begin : begin + many] for those, begin, many in expected])) & FIXED
    if differing.any() or sum(map(len, places)) != nbytes:
        return None
    return RawParts(found, places, rows.view(ENTRY_DTYPE)["xxh3"].ravel().tolist())
