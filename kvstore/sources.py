"""Reading stored blocks of a worker on this host: opened in shared memory, copied or decoded into the caller's buffers.

A piece is either delivered whole and checked, or it is not; what its target holds then does not matter. The twin for
other hosts is `kvstore.stream_source`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.errors import BadRequest, Corrupt, DataError
from kvstore.format import Header, Record, check_header, decode_record, expect
from kvstore.host_link import HostLink, Mapped
from kvstore.layout import block_bytes, cut
from kvstore.seams import Pool
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.types import BlockId, Fidelity, Tier, pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

BATCH_BYTES = 8 << 20
"""Raw bytes that one turn of a byte mover copies: long enough to pay for the turn, short enough to end soon."""

LATER = "later"
"""The problem of a piece that the worker will serve when the others are released."""


@dataclass(slots=True)
class Piece:
    """One stored block to read. `target` takes a raw block of `wanted`, cut from the stored one where they differ."""

    shard: Shard  # as stored
    wanted: Shard
    depth: int
    key: bytes
    target: memoryview
    tried: dict[str, None] = field(default_factory=dict)  # holders
    tier: Tier | None = None  # that served it; set when delivered
    problem: str = ""  # why the last attempt failed

    def fill(self, spec: ModelSpec, raw: memoryview) -> None:
        """Put a raw block of the stored shard where the caller wants it."""
        if self.shard is self.wanted and len(raw) == len(self.target):
            np.copyto(np.frombuffer(self.target, np.uint8), np.frombuffer(raw, np.uint8))
            return
        cut(spec, self.shard, self.wanted, raw, self.target)


@dataclass(frozen=True, slots=True)
class Asked:
    """What all pieces of one read share."""

    namespace: str
    spec: ModelSpec
    least: Fidelity
    redis: bool = True  # look into Redis for what the worker itself does not hold: it may just have moved there
    _names: dict[Shard, tuple[object, ...]] = field(default_factory=dict, compare=False, repr=False)

    def names(self, shard: Shard) -> tuple[object, ...]:
        """What the header of every block of a stored shard says, found out once."""
        found = self._names.get(shard)
        if found is None:
            found = self._names[shard] = (
                self.spec.root,
                namespace_digest(self.namespace),
                shard.digest,
                self.spec.block_tokens,
                block_bytes(self.spec, shard),
            )
        return found


def shard_keys(pieces: Sequence[Piece]) -> tuple[list[worker_pb2.ShardKeys], list[Piece]]:
    """The pieces as a request names them, and in its order."""
    by_shard: dict[Shard, list[Piece]] = {}
    last: Shard | None = None
    for piece in pieces:
        if piece.shard is not last:  # neighbours mostly share one object: its hash is taken once
            last = piece.shard
            mine = by_shard.setdefault(last, [])
        mine.append(piece)
    messages = [
        worker_pb2.ShardKeys(shard=shard_to_wire(shard), keys=pack_keys([piece.key for piece in mine]))
        for shard, mine in by_shard.items()
    ]
    return messages, [piece for mine in by_shard.values() for piece in mine]


def bound(asked: Asked, piece: Piece, packed: bytes) -> Header:
    """The header of a block that is the one asked for and good enough. DataError otherwise."""
    header = Header.unpack(packed)
    names = (header.root, header.namespace, header.shard, header.tokens, header.raw_length)
    if header.key != piece.key or names != asked.names(piece.shard):  # these two say which of them it is
        expect(header, BlockId(asked.namespace, piece.shard.digest, piece.key), asked.spec.root)
        check_header(header, asked.spec, piece.shard)
        raise Corrupt("the block is not the one asked for")
    if header.fidelity < asked.least:
        raise Corrupt("the worker gave a block of less fidelity than asked for")
    return header


_TIERS = frozenset(int(tier) for tier in Tier)


@dataclass(slots=True)
class _Opened:
    piece: Piece
    block: worker_pb2.OpenBlock
    mapped: Mapped
    view: memoryview


async def read_local(link: HostLink, pool: Pool, asked: Asked, pieces: Sequence[Piece], *, timeout_s: float) -> None:
    """Open, copy or decode, check generations, release. Sets `tier` or `problem` of every piece. ServiceError."""
    blocks, ordered = shard_keys(pieces)
    request = worker_pb2.OpenRequest(
        root=asked.spec.root,
        blocks=blocks,
        least=int(asked.least),  # type: ignore[arg-type]
        redis=asked.redis,
        deadline_ms=max(1, int(timeout_s * 1000)),
    )
    await link.released()  # what this reader had open may have to make room for what it opens now
    reply = await link.open(request, timeout_s=timeout_s)
    try:
        if len(reply.blocks) != len(ordered):
            raise Corrupt(f"{len(ordered)} blocks were asked for and {len(reply.blocks)} answered")
        opened = [_located(link, piece, block) for piece, block in zip(ordered, reply.blocks, strict=True)]
        batches = list(_batches([item for item in opened if item is not None]))
        problems = await asyncio.gather(*(pool.run(_copy, asked, batch) for batch in batches))
        for batch, found in zip(batches, problems, strict=True):
            for item, problem in zip(batch, found, strict=True):
                item.piece.problem = problem
                if not problem:
                    item.piece.tier = Tier(item.block.tier)
    finally:
        link.release(reply.hold)


def _located(link: HostLink, piece: Piece, block: worker_pb2.OpenBlock) -> _Opened | None:
    """Where the worker says the block lies, None (and the problem) where there is nothing to read."""
    state = block.state
    if state != worker_pb2.BLOCK_FOUND:
        piece.problem = LATER if state == worker_pb2.BLOCK_LATER else "missing"
        return None
    mapped, offset, length = link.mapped(block.segment), block.offset, block.length
    if mapped is None or not mapped.holds(offset, length) or block.tier not in _TIERS:
        piece.problem = "unmapped"
        return None
    return _Opened(piece, block, mapped, mapped.view[offset : offset + length])


def _batches(opened: list[_Opened]) -> Iterator[list[_Opened]]:
    batch: list[_Opened] = []
    nbytes = 0
    for item in opened:
        batch.append(item)
        nbytes += len(item.piece.target)
        if nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _copy(asked: Asked, batch: list[_Opened]) -> list[str]:
    """Runs in a byte mover. Per block: empty when it was delivered, else the problem."""
    problems = []
    for item in batch:
        try:
            _copy_one(asked, item)
        except (DataError, BadRequest) as error:
            problems.append(type(error).__name__)
            continue
        same = item.mapped.current(item.block.offset, item.block.generation)
        problems.append("" if same else "reused")
    return problems


def _copy_one(asked: Asked, item: _Opened) -> None:
    header = bound(asked, item.piece, item.block.header)
    if item.block.raw:
        item.piece.fill(asked.spec, item.view)
        return
    record = Record.parse(item.view)
    expect(record.header, header)
    if item.piece.shard == item.piece.wanted:
        decode_record(record, asked.spec, item.piece.shard, item.piece.target)
        return
    scratch = memoryview(bytearray(header.raw_length))
    decode_record(record, asked.spec, item.piece.shard, scratch)
    item.piece.fill(asked.spec, scratch)
