"""The stored form of a block: header, chunk table, data. docs/FORMAT.md.

Encoding and decoding run in worker threads: they touch nothing but their arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from kvstore import codecs
from kvstore.checksum import copy_and_checksum, xxh3
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
from kvstore.types import Buffer

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
    view: memoryview  # exactly the record

    @classmethod
    def parse(cls, data: Buffer) -> Record:
        """The record at the start of `data` (bytes after it are ignored). Corrupt or UnknownFormat, nothing else."""
        view = memoryview(data).cast("B")
        header = Header.unpack(view)
        if header.chunk_count == 0 or len(view) < header.stored_length:
            raise Corrupt(
                f"a record of {header.stored_length} bytes and {header.chunk_count} chunks in {len(view)} bytes"
            )
        view = view[: header.stored_length]
        if long_checksum(view[:HEADER_BYTES], view[HEADER_BYTES : header.data_start]) != header.checksum:
            raise Corrupt("a record's header and table fail their checksum")
        table = np.frombuffer(view, ENTRY_DTYPE, header.chunk_count, HEADER_BYTES)
        _check_table(header, table)
        return cls(header, table, view)

    def verify(self) -> None:
        """Corrupt unless every chunk's stored bytes have their checksum."""
        for row in self.table.tolist():
            _checked(self.view[row[8] : row[8] + row[9]], row)


def _check_table(header: Header, table: NDArray[np.void]) -> None:
    """Bounds of every entry, without overflow: offsets first. Known codecs, in order, no two on the same bytes."""
    offset, stored = table["offset"], table["stored"].astype(np.uint64)
    if int(offset.max()) > header.stored_length or int(offset[0]) < header.data_start:
        raise Corrupt("a chunk lies outside its record")
    ends = offset + stored
    if int(ends.max()) > header.stored_length or bool(np.any(offset[1:] < ends[:-1])):
        raise Corrupt("chunks overlap or lie outside their record")
    if bool(np.any(table["reserved"])) or bool(np.any(table["plane"])):
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
    header: Header, raw: Buffer, spec: ModelSpec, shard: Shard, codec: int
) -> tuple[Header, list[Buffer]]:
    """(header of the record, parts to write back to back) of a block's raw bytes.

    Parts may be views of `raw`: keep it until they are written. `codec` is tried per chunk, raw where it does not gain.
    Corrupt when `raw` no longer has the header's copy_id (0: computed here); BadRequest for a wrong length.
    """
    view = _raw_view(header, raw, spec, shard)
    pieces = chunks(spec, shard)
    table = np.zeros(len(pieces), ENTRY_DTYPE)
    parts: list[Buffer] = []
    whole = xxh3_64()
    offset = HEADER_BYTES + len(pieces) * ENTRY_BYTES
    raw_from: int | None = None  # raw chunks in a row become one part
    for index, piece in enumerate(pieces):
        data = view[piece.offset : piece.offset + piece.nbytes]
        whole.update(data)
        used, stored = codecs.encode(codec, data, piece.itemsize)
        if used != codecs.RAW:
            if raw_from is not None:
                parts.append(view[raw_from : piece.offset])
            parts.append(stored)
            raw_from = None
        elif raw_from is None:
            raw_from = piece.offset
        table[index] = _entry(piece, used, offset, stored)
        offset += len(stored)
    if raw_from is not None:
        parts.append(view[raw_from:])
    made, head = _sealed(header, whole.intdigest(), table, offset)
    return made, [head, *parts]


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


def _entry(piece: Chunk, codec: int, offset: int, stored: Buffer) -> Entry:
    params = piece.itemsize if codec == codecs.SPLIT else 0
    return (
        piece.layer, piece.component, 0, piece.head_first, piece.head_count,
        codec, 0, params, offset, len(stored), piece.nbytes, xxh3(stored),
    )  # fmt: skip


def _sealed(header: Header, copy_id: int, table: NDArray[np.void], stored_length: int) -> tuple[Header, bytes]:
    """(final header, header and table as bytes)."""
    if header.copy_id not in (0, copy_id):
        raise Corrupt("the block's raw bytes in memory no longer have their checksum")
    made = replace(header, copy_id=copy_id, chunk_count=len(table), stored_length=stored_length, checksum=0)
    rows = table.tobytes()
    made = replace(made, checksum=long_checksum(made.pack(), rows))
    return made, made.pack() + rows


def decode_record(record: Record, spec: ModelSpec, shard: Shard, target: memoryview) -> None:
    """Fill `target` (block_bytes long) with the raw bytes. Corrupt unless every checksum and copy_id hold.

    On an error `target` holds anything. The copy_id is of what arrived in `target`, so that a source reused while it
    was read can't pass.
    """
    header = record.header
    check_header(header, spec, shard)
    target = _writable(target, header.raw_length)
    rows: list[Entry] = record.table.tolist()
    pieces = chunks(spec, shard)
    if len(rows) != len(pieces):
        raise Corrupt(f"the record has {len(rows)} chunks, its shard {len(pieces)}")
    in_memory_form = header.stored_length - header.data_start == header.raw_length
    if in_memory_form and not np.any(record.table["codec"]):
        for row, piece in zip(rows, pieces, strict=True):
            _check_entry(row, piece)
        copy_id = copy_and_checksum(record.view[header.data_start :], target)
    else:
        for row, piece in zip(rows, pieces, strict=True):
            _decode_chunk(row, piece, record.view[row[8] : row[8] + row[9]], target)
        copy_id = xxh3(target)
    if copy_id != header.copy_id:
        raise Corrupt("the decoded block does not have the checksum of its copy")


def decode_chunks(
    table: Buffer, data: Buffer, spec: ModelSpec, shard: Shard, target: memoryview, first_chunk: int = 0
) -> int:
    """Decode consecutive chunks from a wire into their places in `target` (block_bytes long); returns their number.

    `table` holds the entries of chunks first_chunk.. (40 bytes each), `data` their stored bytes back to back; offsets
    in the entries are not read. Corrupt or UnknownFormat for whatever does not hold. The caller checks the block's
    copy_id when all chunks have arrived.
    """
    rows_view, view = memoryview(table).cast("B"), memoryview(data).cast("B")
    pieces = chunks(spec, shard)
    target = _writable(target, pieces[-1].offset + pieces[-1].nbytes)
    count, rest = divmod(len(rows_view), ENTRY_BYTES)
    if rest or not 0 <= first_chunk <= len(pieces) - count:
        raise Corrupt(f"a table part of {len(rows_view)} bytes from chunk {first_chunk} on, of {len(pieces)} chunks")
    rows: list[Entry] = np.frombuffer(rows_view, ENTRY_DTYPE, count).tolist()
    start = 0
    for row, piece in zip(rows, pieces[first_chunk : first_chunk + count], strict=True):
        if row[2] or row[6]:
            raise UnknownFormat("a chunk table with reserved fields in use is unknown to this build")
        _decode_chunk(row, piece, view[start : start + row[9]], target)
        start += row[9]
    if start != len(view):
        raise Corrupt(f"{len(view)} bytes came for chunks of {start}")
    return count


def _writable(target: memoryview, nbytes: int) -> memoryview:
    if target.readonly or not target.c_contiguous or target.nbytes != nbytes:
        raise BadRequest(f"the target has {target.nbytes} bytes: give {nbytes}, contiguous and writable")
    return target.cast("B")


def _check_entry(row: Entry, piece: Chunk) -> None:
    if (row[0], row[1], row[3], row[4], row[10]) != (
        piece.layer, piece.component, piece.head_first, piece.head_count, piece.nbytes,
    ):  # fmt: skip
        raise Corrupt(f"chunk table entry of layer {row[0]}, component {row[1]} is not the one of its place")


def _checked(stored: memoryview, row: Entry) -> memoryview:
    if len(stored) != row[9] or xxh3(stored) != row[11]:
        raise Corrupt(f"chunk of layer {row[0]}, component {row[1]} fails its checksum")
    return stored


def _decode_chunk(row: Entry, piece: Chunk, stored: memoryview, target: memoryview) -> None:
    _check_entry(row, piece)
    place = target[piece.offset : piece.offset + piece.nbytes]
    if row[5] == codecs.RAW and len(stored) == len(place):
        if copy_and_checksum(stored, place) != row[11]:
            raise Corrupt(f"chunk of layer {row[0]}, component {row[1]} fails its checksum")
        return
    codecs.decode(row[5], _checked(stored, row), place, row[7])
