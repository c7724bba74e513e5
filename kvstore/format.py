"""The stored form of a block: header, chunk table, data. docs/FORMAT.md.

Encoding and decoding run in worker threads: they touch nothing but their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvstore import codecs
from kvstore.checksum import copy_and_checksum, xxh3
from kvstore.codecs.batch import Coded, Plane
from kvstore.codecs.batch import decode as decode_coded
from kvstore.codecs.batch import encode as encode_planes
from kvstore.errors import BadRequest, Corrupt, UnknownFormat
from kvstore.header import (
    ENTRY_BYTES,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Header,
    check_header,
    expect,
    long_checksum,
)
from kvstore.layout import Chunk, chunks
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Buffer, Fidelity

__all__ = [
    "ENTRY_BYTES",
    "ENTRY_DTYPE",
    "HEADER_BYTES",
    "MAGIC",
    "VERSION",
    "Header",
    "Record",
    "check_header",
    "chunk_data",
    "decode_chunks",
    "decode_record",
    "encode_raw_parts",
    "encode_record",
    "expect",
    "grouped",
    "trim_record",
    "worth",
]

ENTRY_DTYPE = np.dtype(
    [
        ("layer", "<u2"),
        ("component", "u1"),
        ("plane", "u1"),
        ("head_first", "<u2"),
        ("head_count", "<u2"),
        ("codec", "<u2"),
        ("reserved", "<u2"),
        ("params", "<u4"),
        ("offset", "<u8"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("xxh3", "<u8"),
    ]
)
assert ENTRY_DTYPE.itemsize == ENTRY_BYTES

Entry = tuple[int, int, int, int, int, int, int, int, int, int, int, int]
"""A row of the table as Python integers, in the order of ENTRY_DTYPE."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A stored block whose header, table and bounds hold; its data is unverified until read. Views, no copies."""

    header: Header
    table: NDArray[np.void]  # ENTRY_DTYPE, one row per chunk and plane
    view: memoryview  # exactly the record, or what is there of its beginning

    @classmethod
    def parse(cls, data: Buffer, *, beginning: bool = False) -> Record:
        """The record at the start of `data` (bytes after it are ignored). Corrupt or UnknownFormat, nothing else.

        `beginning`: `data` may end anywhere after the table.
        """
        view = memoryview(data).cast("B")
        header = Header.unpack(view)
        if header.chunk_count == 0 or len(view) < (header.data_start if beginning else header.stored_length):
            raise Corrupt(
                f"a record of {header.stored_length} bytes and {header.chunk_count} chunks in {len(view)} bytes"
            )
        view = view[: header.stored_length]
        if long_checksum(view[:HEADER_BYTES], view[HEADER_BYTES : header.data_start]) != header.checksum:
            raise Corrupt("a record's header and table fail their checksum")
        table = np.frombuffer(view, ENTRY_DTYPE, header.chunk_count, HEADER_BYTES)
        _check_table(header, table)
        return cls(header, table, view)

    def verify(self, planes: int = codecs.PLANES_MAX) -> None:
        """Corrupt unless every chunk's stored bytes, of so many leading planes, are there and have their checksum."""
        for row in self.table.tolist():
            if row[2] < planes:
                _checked(self.view[row[8] : row[8] + row[9]], row)

    def leading(self, planes: int) -> int:
        """Bytes from the record's start to the end of so many leading planes."""
        last = self.table[self.table["plane"] < planes][-1]
        return int(last["offset"]) + int(last["stored"])


def _check_table(header: Header, table: NDArray[np.void]) -> None:
    """Bounds of every entry, without overflow: offsets first. Known codecs, in order, no two on the same bytes."""
    offset, stored = table["offset"], table["stored"].astype(np.uint64)
    if int(offset.max()) > header.stored_length or int(offset[0]) < header.data_start:
        raise Corrupt("a chunk lies outside its record")
    ends = offset + stored
    if int(ends.max()) > header.stored_length or bool(np.any(offset[1:] < ends[:-1])):
        raise Corrupt("chunks overlap or lie outside their record")
    planes, nested = table["plane"], table["codec"] == codecs.NESTED
    if bool(np.any(table["reserved"])) or bool(np.any(planes[~nested])) or int(planes.max()) >= codecs.PLANES_MAX:
        raise UnknownFormat("a chunk table with reserved fields in use is unknown to this build")
    if int(table["codec"].max()) > max(codecs.KNOWN):
        raise UnknownFormat(f"chunk codec {int(table['codec'].max())} is unknown to this build")
    if int(table["raw"].sum(dtype=np.uint64)) != header.raw_length:
        raise Corrupt("the chunks' raw lengths do not add up to the block's")


def chunk_data(record: Record, index: int) -> memoryview:
    """Stored bytes of one table entry, unverified."""
    row = record.table[index]
    start = int(row["offset"])
    return record.view[start : start + int(row["stored"])]


def encode_record(
    header: Header,
    raw: Buffer,
    spec: ModelSpec,
    shard: Shard,
    codec: int | Sequence[int],
    planes: int = codecs.PLANES_MAX,
) -> tuple[Header, list[Buffer]]:
    """(header of the record, parts to write back to back) of a block's raw bytes.

    `codec`: of every chunk, or one for each; its fallbacks are tried where it does not take a chunk, raw last. At most
    `planes` leading planes of a chunk are kept. Parts may be views of `raw`: keep it until they are written. The
    header's `stored` is the least fidelity of the chunks. Corrupt when `raw` no longer has the header's copy_id (0:
    computed here); BadRequest for a wrong length.
    """
    view = _raw_view(header, raw, spec, shard)
    pieces = chunks(spec, shard)
    wanted = [codec] * len(pieces) if isinstance(codec, int) else list(codec)
    made = [mine[:planes] for mine in encode_planes(view, pieces, wanted)]
    count = sum(map(len, made))
    table = np.zeros(count, ENTRY_DTYPE)
    parts: list[Buffer] = []
    offset, at = HEADER_BYTES + count * ENTRY_BYTES, 0
    for plane in range(max(map(len, made))):
        raw_from: int | None = None  # raw chunks in a row become one part
        for piece, mine in zip(pieces, made, strict=True):
            if len(mine) <= plane:
                continue
            part = mine[plane]
            if part.codec == codecs.RAW:
                raw_from = piece.offset if raw_from is None else raw_from
            else:
                if raw_from is not None:
                    parts.append(view[raw_from : piece.offset])
                parts.append(part.data)
                raw_from = None
            table[at] = _entry(piece, plane, part, offset)
            at, offset = at + 1, offset + len(part.data)
        if raw_from is not None:
            parts.append(view[raw_from:])
    stored = min(codecs.fidelity_of(mine[0].codec, len(mine)) for mine in made)
    sealed, head = _sealed(replace(header, stored=stored), xxh3(view), table, offset)
    return sealed, [head, *parts]


def trim_record(record: Record, planes: int) -> tuple[Header, list[Buffer]]:
    """The same copy with at most `planes` leading planes of each chunk: (its header, parts to write). Pure.

    Parts are views of the record. Nothing is verified: whoever reads them will.
    """
    kept = record.table[record.table["plane"] < planes].copy()
    end, start = record.leading(planes), int(kept["offset"][0])
    shift = (len(record.table) - len(kept)) * ENTRY_BYTES
    kept["offset"] -= np.uint64(shift)
    by_chunk: dict[tuple[int, int, int], int] = {}
    stored = Fidelity.EXACT
    for row in kept.tolist():
        by_chunk[row[0], row[1], row[3]] = max(row[2], by_chunk.get((row[0], row[1], row[3]), 0))
    for row in kept.tolist():
        stored = min(stored, codecs.fidelity_of(row[5], by_chunk[row[0], row[1], row[3]] + 1))
    header = replace(record.header, stored=stored)
    sealed, head = _sealed(header, header.copy_id, kept, end - shift)
    return sealed, [head, record.view[start:end]]


def encode_raw_parts(header: Header, raw: Buffer, spec: ModelSpec, shard: Shard) -> tuple[Header, bytes]:
    """(header, chunk table) under which raw bytes stand for their own record: what a Get serves from hot memory."""
    made, parts = encode_record(header, raw, spec, shard, codecs.RAW)
    return made, bytes(memoryview(parts[0])[HEADER_BYTES:])


def _raw_view(header: Header, raw: Buffer, spec: ModelSpec, shard: Shard) -> memoryview:
    check_header(header, spec, shard)
    view = memoryview(raw).cast("B")
    if len(view) != header.raw_length:
        raise BadRequest(f"a block of {len(view)} bytes: its shard has {header.raw_length}")
    return view


def _entry(piece: Chunk, plane: int, part: Plane, offset: int) -> Entry:
    return (
        piece.layer, piece.component, plane, piece.head_first, piece.head_count, part.codec, 0, part.params,
        offset, len(part.data), 0 if plane else piece.nbytes, xxh3(part.data),
    )  # fmt: skip


def _sealed(header: Header, copy_id: int, table: NDArray[np.void], stored_length: int) -> tuple[Header, bytes]:
    """(final header, header and table as bytes)."""
    if header.copy_id not in (0, copy_id):
        raise Corrupt("the block's raw bytes in memory no longer have their checksum")
    made = replace(header, copy_id=copy_id, chunk_count=len(table), stored_length=stored_length, checksum=0)
    rows = table.tobytes()
    made = replace(made, checksum=long_checksum(made.pack(), rows))
    return made, made.pack() + rows


def grouped(rows: Sequence[Entry], pieces: Sequence[Chunk]) -> list[list[Entry]]:
    """The rows of a record's table by chunk, planes in order. Corrupt unless they are those of the chunks' places."""
    if len(rows) < len(pieces):
        raise Corrupt(f"the record has {len(rows)} entries, its shard {len(pieces)} chunks")
    found = []
    for row, piece in zip(rows, pieces, strict=False):
        _check_entry(row, piece, 0)
        found.append([row])
    if len(rows) > len(pieces):
        places = {(p.layer, p.component, p.head_first): index for index, p in enumerate(pieces)}
        last = (0, len(pieces))
        for row in rows[len(pieces) :]:
            index = places.get((row[0], row[1], row[3]), -1)
            if index < 0 or (row[2], index) <= last:
                raise Corrupt("a chunk table's planes are out of order")
            last = (row[2], index)
            _check_entry(row, pieces[index], len(found[index]))
            _check_same(row, found[index][0])
            found[index].append(row)
    return found


def decode_record(record: Record, spec: ModelSpec, shard: Shard, target: memoryview, planes: int = 0) -> Fidelity:
    """Fill `target` (block_bytes long) with the raw bytes, from `planes` leading planes of each chunk (0: all); what
    they are worth. Corrupt unless every checksum of what is read, the fidelity and, where they are exact, the copy_id
    hold.

    On an error `target` holds anything. The copy_id is of what arrived in `target`, so that a source reused while it
    was read can't pass. What a lossy record decodes to has no checksum of its own: its chunks have.
    """
    header = record.header
    check_header(header, spec, shard)
    target = _writable(target, header.raw_length)
    rows: list[Entry] = record.table.tolist()
    pieces = chunks(spec, shard)
    by_chunk = grouped(rows, pieces)
    stored = header.stored
    if planes:
        by_chunk = [mine[:planes] for mine in by_chunk]
        stored = min(stored, *(worth(mine) for mine in by_chunk))
    in_memory_form = header.stored_length - header.data_start == header.raw_length
    if in_memory_form and not np.any(record.table["codec"]):
        copy_id = copy_and_checksum(record.view[header.data_start :], target)
    else:
        spans = [[(row[8], row[9]) for row in mine] for mine in by_chunk]
        _decode(record.view, by_chunk, spans, pieces, stored, target)
        copy_id = xxh3(target) if stored == Fidelity.EXACT else header.copy_id
    if copy_id != header.copy_id:
        raise Corrupt("the decoded block does not have the checksum of its copy")
    return stored


def worth(rows: Sequence[Entry]) -> Fidelity:
    """Of a chunk with these planes. UnknownFormat for a codec that this build does not know."""
    if rows[0][5] not in codecs.KNOWN:
        raise UnknownFormat(f"chunk codec {rows[0][5]} is unknown to this build")
    return codecs.fidelity_of(rows[0][5], len(rows))


def decode_chunks(
    table: Buffer,
    data: Buffer,
    spec: ModelSpec,
    shard: Shard,
    target: memoryview,
    first_chunk: int = 0,
    stored: Fidelity = Fidelity.EXACT,
    *,
    in_place: bool = False,
    summed: bool = True,
) -> int:
    """Decode consecutive chunks from a wire into their places in `target` (block_bytes long); returns their number.

    `table` holds the entries of chunks first_chunk.. (40 bytes each; the planes of a chunk follow each other), `data`
    their stored bytes back to back; offsets in the entries are not read. Corrupt or UnknownFormat for whatever does
    not hold, a fidelity below `stored` too. `in_place`: `data` is those chunks' own part of `target`, received there:
    raw ones are summed and stay. Not `summed`: the sums of raw ones are not looked at. The caller checks an exact
    block's copy_id when all chunks have arrived.
    """
    rows_view, view = memoryview(table).cast("B"), memoryview(data).cast("B")
    pieces = chunks(spec, shard)
    target = _writable(target, pieces[-1].offset + pieces[-1].nbytes)
    entries, rest = divmod(len(rows_view), ENTRY_BYTES)
    rows: list[Entry] = np.frombuffer(rows_view, ENTRY_DTYPE, entries).tolist()
    count = sum(row[2] == 0 for row in rows)
    if rest or not 0 <= first_chunk <= len(pieces) - count or (rows and rows[0][2]):
        raise Corrupt(f"a table part of {len(rows_view)} bytes from chunk {first_chunk} on, of {len(pieces)} chunks")
    mine = pieces[first_chunk : first_chunk + count]
    by_chunk: list[list[Entry]] = []
    spans: list[list[tuple[int, int]]] = []
    start = 0
    for row in rows:
        if row[6] or (row[2] and row[5] != codecs.NESTED) or row[2] >= codecs.PLANES_MAX:
            raise UnknownFormat("a chunk table with reserved fields in use is unknown to this build")
        if not row[2]:
            by_chunk.append([])
            spans.append([])
        _check_entry(row, mine[len(by_chunk) - 1], len(by_chunk[-1]))
        by_chunk[-1].append(row)
        _check_same(row, by_chunk[-1][0])
        spans[-1].append((start, row[9]))
        start += row[9]
    if start != len(view):
        raise Corrupt(f"{len(view)} bytes came for chunks of {start}")
    _decode(view, by_chunk, spans, mine, stored, target, in_place=in_place, summed=summed)
    return count


def _writable(target: memoryview, nbytes: int) -> memoryview:
    if target.readonly or not target.c_contiguous or target.nbytes != nbytes:
        raise BadRequest(f"the target has {target.nbytes} bytes: give {nbytes}, contiguous and writable")
    return target.cast("B")


def _check_entry(row: Entry, piece: Chunk, plane: int) -> None:
    if (row[0], row[1], row[2], row[3], row[4], row[10]) != (
        piece.layer, piece.component, plane, piece.head_first, piece.head_count, 0 if plane else piece.nbytes,
    ):  # fmt: skip
        raise Corrupt(f"chunk table entry of layer {row[0]}, component {row[1]} is not the one of its place")


def _check_same(row: Entry, first: Entry) -> None:
    if (row[5], row[7]) != (first[5], first[7]):
        raise Corrupt(f"the planes of layer {row[0]}, component {row[1]} are of two codecs")


def _checked(stored: memoryview, row: Entry) -> memoryview:
    if len(stored) != row[9] or xxh3(stored) != row[11]:
        raise Corrupt(f"chunk of layer {row[0]}, component {row[1]} fails its checksum")
    return stored


def _decode(
    view: memoryview,
    by_chunk: Sequence[Sequence[Entry]],
    spans: Sequence[Sequence[tuple[int, int]]],
    pieces: Sequence[Chunk],
    stored: Fidelity,
    target: memoryview,
    *,
    in_place: bool = False,
    summed: bool = True,
) -> None:
    """Verify and decode chunks, all of one codec at once; raw ones are summed as they are copied."""
    coded = []
    for rows, places, piece in zip(by_chunk, spans, pieces, strict=True):
        row = rows[0]
        if worth(rows) < stored:
            raise Corrupt(f"chunk of layer {row[0]}, component {row[1]} has less fidelity than its block claims")
        if row[5] == codecs.RAW and row[9] == piece.nbytes:
            (start, length), place = places[0], target[piece.offset : piece.offset + piece.nbytes]
            came = view[start : start + length]
            if not summed:
                if not in_place:
                    np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(came, np.uint8))
            elif (xxh3(came) if in_place else copy_and_checksum(came, place)) != row[11]:
                raise Corrupt(f"chunk of layer {row[0]}, component {row[1]} fails its checksum")
            continue
        if in_place:
            raise Corrupt("chunks that are not raw were received as if they were")
        for entry, (start, length) in zip(rows, places, strict=True):
            _checked(view[start : start + length], entry)
        coded.append(Coded(piece, row[5], row[7], tuple(places)))
    decode_coded(view, coded, target)
