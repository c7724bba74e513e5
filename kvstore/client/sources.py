"""Reading stored blocks of a worker on this host: opened in shared memory, copied or decoded into the caller's buffers.

A piece is either delivered whole and checked, or it is not; what its target holds then does not matter. The twin for
other hosts is `kvstore.client.stream_source`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from kvstore.client.bulk import Opened, Raws, raws_of
from kvstore.client.host_link import HostLink
from kvstore.client.pieces import LATER, Asked, Piece, bound, intact, shard_keys
from kvstore.errors import BadRequest, Corrupt, DataError
from kvstore.format import Record, decode_record, expect
from kvstore.seams import Pool
from kvstore.types import Tier
from kvstore.wire import worker_pb2

BATCH_BYTES = 32 << 20
"""Raw bytes that one turn of a byte mover copies: long enough to pay for the turn, short enough to end soon."""

INLINE_BYTES = 256 << 10
"""Raw bytes that are copied on the spot: handing them over takes longer."""

_TIERS = frozenset(int(tier) for tier in Tier)


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
        if len(reply.blocks) != len(ordered):
            raise Corrupt(f"{len(ordered)} blocks were asked for and {len(reply.blocks)} answered")
        located = [_located(link, piece, block) for piece, block in zip(ordered, reply.blocks, strict=True)]
        await _deliver(pool, asked, [item for item in located if item is not None], arrived)
    finally:
        link.release(reply.hold)


def _located(link: HostLink, piece: Piece, block: worker_pb2.OpenBlock) -> Opened | None:
    """Where the worker says the block lies, None (and the problem) where there is nothing to read."""
    state = block.state
    if state != worker_pb2.BLOCK_FOUND:
        piece.problem = LATER if state == worker_pb2.BLOCK_LATER else "missing"
        return None
    mapped = link.mapped(block.segment)
    if mapped is None or not mapped.holds(block.offset, block.length) or block.tier not in _TIERS:
        piece.problem = "unmapped"
        return None
    return Opened(piece, block, mapped)


async def _deliver(pool: Pool, asked: Asked, opened: list[Opened], arrived: Callable[[], None]) -> None:
    """Copy or decode everything: in parallel batches, or layer by layer across all blocks."""
    if sum(item.block.length for item in opened) <= INLINE_BYTES:
        _whole(asked, opened)
    elif not asked.layerwise:
        await asyncio.gather(*(pool.run(_whole, asked, batch) for batch in _batches(opened)))
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


def _batches(opened: list[Opened]) -> Iterator[list[Opened]]:
    batch: list[Opened] = []
    nbytes = 0
    for item in opened:
        batch.append(item)
        nbytes += item.piece.target.nbytes
        if nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _whole(asked: Asked, opened: list[Opened]) -> None:
    """Runs in a byte mover."""
    raws, rest = raws_of(asked, opened)
    _prepare(asked, raws, rest)
    _copy(raws, None)
    for group in raws:
        group.conclude()


def _prepare(asked: Asked, raws: list[Raws], rest: list[Opened]) -> None:
    """Runs in a byte mover: what lies encoded, or has to be cut, is done at once; raw blocks are got ready."""
    for group in raws:
        group.prepare()
    for item in rest:
        item.piece.problem = _one(asked, item)
        if not item.piece.problem:
            item.piece.tier = Tier(item.block.tier)


def _copy(raws: list[Raws], last_layer: int | None) -> None:
    """Runs in a byte mover: all layers up to one, of the model."""
    for group in raws:
        group.copy(last_layer)


def _one(asked: Asked, item: Opened) -> str:
    """Empty when the block was delivered, else the problem."""
    try:
        delivered = _decode(asked, item)
    except (DataError, BadRequest) as error:
        return type(error).__name__
    if not delivered:
        return item.piece.problem
    return "" if item.mapped.current(item.block.offset, item.block.generation) else "reused"


def _decode(asked: Asked, item: Opened) -> bool:
    piece = item.piece
    header = bound(asked, piece, item.block.header)
    if not piece.begin(header.copy_id):
        return False
    if item.block.raw:
        if not intact(asked, item.view, header.copy_id):
            raise Corrupt("the block's bytes are not those that were put")
        piece.fill(asked.spec, item.view)
        return True
    record = Record.parse(item.view)
    expect(record.header, header)
    if record.header.fidelity < asked.least:
        raise Corrupt("the worker gave a block of less fidelity than asked for")
    whole = piece.shard == piece.wanted and piece.target.whole is not None
    raw = piece.target.whole if whole and piece.target.whole is not None else memoryview(bytearray(header.raw_length))
    piece.fidelity = min(header.computed_on, decode_record(record, asked.spec, piece.shard, raw, asked.planes))
    if not whole:
        piece.fill(asked.spec, raw)
    return True
