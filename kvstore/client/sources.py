"""Reading stored blocks of a worker on this host: opened in shared memory, copied or decoded into the caller's buffers.

A piece is either delivered whole and checked, or it is not; what its target holds then does not matter. The twin for
other hosts is `kvstore.client.stream_source`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvstore.client.bulk import Opened, Raws, raws_of
from kvstore.client.host_link import HostLink, Mapped
from kvstore.client.pieces import LATER, Asked, Piece, bound, intact, shard_keys
from kvstore.errors import BadRequest, Corrupt, DataError
from kvstore.format import Record, decode_record, expect
from kvstore.header_columns import Columns
from kvstore.open_rows import FOUND, rows_from, rows_of
from kvstore.open_rows import LATER as BLOCK_LATER
from kvstore.seams import Pool
from kvstore.types import Tier
from kvstore.wire import worker_pb2

BATCH_BYTES = 32 << 20
"""Raw bytes that one turn of a byte mover copies: long enough to pay for the turn, short enough to end soon."""

INLINE_BYTES = 256 << 10
"""Raw bytes that are copied on the spot: handing them over takes longer."""

_KNOWN = np.array([number in set(Tier) for number in range(256)])


async def read_local(
    link: HostLink,
    pool: Pool,
    asked: Asked,
    pieces: Sequence[Piece],
    *,
    timeout_s: float,
    arrived: Callable[[], None] = lambda: None,
) -> None:
    """Open, copy or decode, check generations, release. Sets `tier` or `problem` of every piece. ServiceError.

    `arrived` is called whenever layers have come in, if the caller waits for them.
    """
    blocks, ordered = shard_keys(pieces)
    request = worker_pb2.OpenRequest(
        root=asked.spec.root,
        blocks=blocks,
        least=int(asked.least),  # type: ignore[arg-type]
        redis=asked.redis,
        deadline_ms=max(1, int(timeout_s * 1000)),
    )
    reply = await link.open(request, timeout_s=timeout_s)
    try:
        rows = rows_of(reply.rows) if request.rows else rows_from(reply.blocks)
        if len(rows) != len(ordered):
            raise Corrupt(f"{len(ordered)} blocks were asked for and {len(rows)} answered")
        await _deliver(pool, asked, _located(link, ordered, rows), arrived)
    finally:
        link.release(reply.hold)


def _located(link: HostLink, pieces: Sequence[Piece], rows: Columns) -> Opened:
    """Those of which the worker says where they lie; the problem of the others, where there is nothing to read."""
    there = rows["state"] == FOUND
    for index in np.flatnonzero(~there).tolist():
        pieces[index].problem = LATER if rows["state"][index] == BLOCK_LATER else "missing"
    known, mapped = _KNOWN[rows["tier"]], dict[int, Mapped]()
    for segment in dict.fromkeys(rows["segment"][there].tolist()):
        mine, found = rows["segment"] == segment, link.mapped(segment)
        if found is not None:
            mapped[segment] = found
            known &= ~mine | found.hold(rows["offset"], rows["length"])
        else:
            known &= ~mine
    for index in np.flatnonzero(there & ~known).tolist():
        pieces[index].problem = "unmapped"
    opened = Opened(pieces, rows, mapped)
    return opened if (there & known).all() else opened.some(np.flatnonzero(there & known).tolist())


async def _deliver(pool: Pool, asked: Asked, opened: Opened, arrived: Callable[[], None]) -> None:
    """Copy or decode everything: in parallel batches, or layer by layer across all blocks."""
    if int(opened.rows["length"].sum()) <= INLINE_BYTES:
        _whole(asked, opened)
    elif not asked.layerwise:
        batches = list(_batches(opened))
        if len(batches) == 1:
            await pool.run(_whole, asked, batches[0])
        else:
            await asyncio.gather(*(pool.run(_whole, asked, batch) for batch in batches))
    else:
        raws, rest = raws_of(asked, opened)
        await pool.run(_prepare, asked, raws, rest)
        layers = sorted({layer for group in raws for layer in group.layers})
        first, step = 0, 1
        while first < len(layers):  # the first one alone, then more and more at a time: a turn has its price
            await pool.run(_copy, raws, layers[min(first + step, len(layers)) - 1])
            arrived()
            first, step = first + step, step if first == 0 else 2 * step
        for group in raws:
            group.conclude()
    arrived()


def _batches(opened: Opened) -> Iterator[Opened]:
    ends = (np.cumsum([piece.target.nbytes for piece in opened.pieces]) - 1) // BATCH_BYTES
    if ends[-1] == 0 or ends[0] == ends[-1]:
        yield opened
        return
    for number in range(int(ends[-1]) + 1):
        mine = np.flatnonzero(ends == number).tolist()
        if mine:
            yield opened.some(mine)


def _whole(asked: Asked, opened: Opened) -> None:
    """Runs in a byte mover."""
    raws, rest = raws_of(asked, opened)
    _prepare(asked, raws, rest)
    _copy(raws, None)
    for group in raws:
        group.conclude()


def _prepare(asked: Asked, raws: list[Raws], rest: Opened) -> None:
    """Runs in a byte mover: what lies encoded, or has to be cut, is done at once; raw blocks are got ready."""
    for group in raws:
        group.prepare()
    for index, piece in enumerate(rest.pieces):
        piece.problem = _one(asked, rest, index)
        if not piece.problem:
            piece.tier = Tier(int(rest.rows["tier"][index]))


def _copy(raws: list[Raws], last_layer: int | None) -> None:
    """Runs in a byte mover: all layers up to one, of the model."""
    for group in raws:
        group.copy(last_layer)


def _one(asked: Asked, opened: Opened, index: int) -> str:
    """Empty when the block was delivered, else the problem."""
    try:
        delivered = _decode(asked, opened, index)
    except (DataError, BadRequest) as error:
        return type(error).__name__
    if not delivered:
        return opened.pieces[index].problem
    row = opened.rows[index]
    return "" if opened.mapping(index).current(int(row["offset"]), int(row["generation"])) else "reused"


def _decode(asked: Asked, opened: Opened, index: int) -> bool:
    piece, view = opened.pieces[index], opened.view(index)
    header = bound(asked, piece, opened.header(index))
    if not piece.begin(header.copy_id):
        return False
    if opened.rows["raw"][index]:
        if not intact(asked, view, header.copy_id):
            raise Corrupt("the block's bytes are not those that were put")
        piece.fill(asked.spec, view)
        return True
    record = Record.parse(view)
    expect(record.header, header)
    if record.header.fidelity < asked.least:
        raise Corrupt("the worker gave a block of less fidelity than asked for")
    whole = piece.shard == piece.wanted and piece.target.whole is not None
    raw = piece.target.whole if whole and piece.target.whole is not None else memoryview(bytearray(header.raw_length))
    piece.fidelity = min(header.computed_on, decode_record(record, asked.spec, piece.shard, raw, asked.planes))
    if not whole:
        piece.fill(asked.spec, raw)
    return True
