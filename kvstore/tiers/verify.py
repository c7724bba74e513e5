"""Every record of a recovered log read and verified at the start, where that is asked for (`ssd_verify`).

Segments are read from front to back in large pieces, several segments at a time: reading waits for the device, and the
checksums of one piece are computed while others are on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from kvstore.errors import DataError
from kvstore.format import Record, expect
from kvstore.seams import Disk, Pool
from kvstore.tiers.aligned import ALIGNMENT, Bounce, padded
from kvstore.tiers.found import Found
from kvstore.tiers.recovery import FoundSegment
from kvstore.tiers.segment import data_name

PIECE_BYTES = 8 << 20
SEGMENTS_AT_A_TIME = 3


async def damaged_records(
    disk: Disk, pool: Pool, bounce: Bounce, segments: Sequence[FoundSegment], *, direct: bool
) -> list[Found]:
    """The records whose bytes do not hold, or can't be read, in the order of the log."""
    found: dict[int, list[Found]] = {}
    line = iter(segments)

    async def work() -> None:
        for item in line:
            ordered = sorted(item.records, key=lambda record: record.offset)
            size = max([PIECE_BYTES, *(padded(record.nbytes) for record in ordered)])
            buffer = bounce.take(size)
            try:
                view = memoryview(buffer)[:size]
                found[item.segment.id] = await pool.run(_check_segment, disk, ordered, view, direct)
                view.release()
            finally:
                bounce.give(buffer)

    await asyncio.gather(*(work() for _ in range(SEGMENTS_AT_A_TIME)))
    return [record for item in segments for record in found[item.segment.id]]


def _check_segment(disk: Disk, records: Sequence[Found], buffer: memoryview, direct: bool) -> list[Found]:
    """Thread: one segment's records, in the order of their offsets; those that do not hold."""
    bad: list[Found] = []
    if not records:
        return bad
    try:
        file = disk.open(data_name(records[0].segment), direct=direct)
    except OSError:
        return list(records)
    try:
        for piece in _pieces(records, len(buffer)):
            start = piece[0].offset
            length = padded(piece[-1].offset - start + piece[-1].nbytes)
            try:
                got = file.pread_into(start, buffer[:length])
            except OSError:
                bad += piece
                continue
            for record in piece:
                at = record.offset - start
                if at + record.nbytes > got or not _holds(record, buffer[at : at + record.nbytes]):
                    bad.append(record)
    finally:
        file.close()
    return bad


def _pieces(records: Sequence[Found], nbytes: int) -> Iterator[list[Found]]:
    """Neighbours that one read of `nbytes` covers."""
    piece: list[Found] = []
    for record in records:
        assert record.offset % ALIGNMENT == 0
        if piece and record.offset + padded(record.nbytes) - piece[0].offset > nbytes:
            yield piece
            piece = []
        piece.append(record)
    if piece:
        yield piece


def _holds(found: Found, view: memoryview) -> bool:
    try:
        record = Record.parse(view)
        expect(record.header, found.header)
        record.verify()
    except DataError:
        return False
    return True
