"""The blocks of one Get as their chunks arrive, by a stream or by a raw connection: checked, and decoded to their
places."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from kvstore.checksum import xxh3
from kvstore.client.pieces import LATER, Asked, Piece, Span, bound, span_of
from kvstore.client.raw_headers import RawHeaders
from kvstore.codecs import RAW
from kvstore.errors import BadRequest, Corrupt, DataError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, decode_chunks
from kvstore.raw_table import RawTable, raw_table
from kvstore.seams import Pool
from kvstore.transport import frames
from kvstore.types import Fidelity, Tier
from kvstore.wire import worker_pb2

FRAMES_AHEAD = 4
"""Frames of a stream that may wait for a byte mover while the next ones arrive."""

_TIERS = {int(tier): tier for tier in Tier}

Landed = list[tuple[int, int, int]]
"""(block, first chunk, chunks; -1 where they are no good) of each part of a frame."""


def is_direct(piece: Piece) -> bool:
    """Whether its chunks are decoded where the caller wants them."""
    return piece.shard == piece.wanted and piece.target.whole is not None


@dataclass(slots=True)
class Arriving:
    """A block on its way in. `raw` is the target itself, or scratch for one that is cut, or scattered."""

    piece: Piece
    table: RawTable  # of its shard: what the chunks have to be
    raw: memoryview
    span: Span | None  # of the bytes that go on to the target as they come; None: at the end
    missing: dict[int, None]  # chunks
    direct: bool  # `raw` is the target
    copy_id: int = 0
    stored: Fidelity = Fidelity.EXACT  # as the worker sends it
    tier: Tier = Tier.HOT
    whole: bool | None = None  # whether its bytes are those of its copy; None: not looked at since something came


@dataclass(frozen=True, slots=True)
class _Expected:
    """What is known before the worker has answered."""

    headers: dict[int, RawHeaders]  # by identity of the stored shard
    tables: dict[int, RawTable]
    items: list[Arriving | None]  # those that begin at the first chunk, where the caller wants them


class Arrivals:
    """The blocks of one stream. `take` each frame, then `settle`, then `finish`."""

    def __init__(
        self, pool: Pool, asked: Asked, ordered: list[Piece], arrived: Callable[[], None] = lambda: None
    ) -> None:
        self._pool, self._asked, self._ordered, self._arrived = pool, asked, ordered, arrived
        self.blocks: list[Arriving | None] = []
        self._expected: _Expected | None = None
        self._landing: deque[asyncio.Task[None]] = deque()
        for piece in ordered:
            piece.problem = "missing"

    def expect(self) -> None:
        """In the event loop, best while the worker is at it: what can be known before its answer. Mutates."""
        self._expected = self._known()
        self._arrived()

    def _known(self) -> _Expected:
        spec, asked, items = self._asked.spec, self._asked, list[Arriving | None]()
        shards = {id(piece.shard): piece.shard for piece in self._ordered}
        tables = {at: raw_table(spec, shard) for at, shard in shards.items()}
        for piece in self._ordered:
            simple = not piece.chunks and is_direct(piece)
            items.append(_begun(asked, piece, tables[id(piece.shard)]) if simple else None)
        return _Expected({at: RawHeaders(asked, shard) for at, shard in shards.items()}, tables, items)

    def announce(self, header: worker_pb2.GetHeader) -> None:
        """The first header says what will come. Mutates. Corrupt."""
        if not self.blocks:
            infos = header.blocks
            if len(infos) != len(self._ordered):
                raise Corrupt(f"{len(self._ordered)} blocks were asked for and {len(infos)} answered")
            expected = self._expected or self._known()
            self.blocks = [
                self._announced(expected, *one) for one in zip(self._ordered, infos, expected.items, strict=True)
            ]

    def _announced(
        self, expected: _Expected, piece: Piece, info: worker_pb2.BlockInfo, item: Arriving | None
    ) -> Arriving | None:
        if info.state != worker_pb2.BLOCK_FOUND:
            piece.problem = LATER if info.state == worker_pb2.BLOCK_LATER else "missing"
            return None
        packed = info.header
        said = expected.headers[id(piece.shard)].said(piece.key, packed)
        try:
            if said is not None:
                piece.fidelity, stored, copy_id = said
            else:
                header = bound(self._asked, piece, packed)
                stored, copy_id = header.stored, header.copy_id
            tier = _TIERS.get(info.tier) or Tier(info.tier)
        except (DataError, ValueError) as error:
            piece.problem = type(error).__name__
            return None
        if not piece.begin(copy_id):
            return None
        if item is None or piece.chunks:
            item = _begun(self._asked, piece, expected.tables[id(piece.shard)])
        item.copy_id, item.stored, item.tier = copy_id, stored, tier
        return item

    async def take(self, frame: bytes) -> None:
        """Mutates. Corrupt where the stream is none: it is of no more use then."""
        if not self.blocks:
            self.announce(_header(frame)[0])
        self._landing.append(asyncio.ensure_future(self._come(frame)))
        while self._landing and (len(self._landing) >= FRAMES_AHEAD or self._landing[0].done()):
            await asyncio.shield(self._landing[0])
            self._landing.popleft()

    async def _come(self, frame: bytes) -> None:
        self.note(await self._pool.run(self._land, frame))

    def _land(self, frame: bytes) -> Landed:
        """Runs in a byte mover: decode the chunks of a frame to their places."""
        header, data = _header(frame)
        landed: Landed = []
        start = 0
        for part in header.parts:
            nbytes = stored_bytes(part.table)
            landed.append(self.land(part, data[start : start + nbytes]))
            start += nbytes
        return landed

    def place(self, part: worker_pb2.ChunkPart, nbytes: int) -> memoryview | None:
        """Where the bytes of a part belong, if they are raw and all of them lie there in one piece. Pure."""
        item = self.blocks[part.block] if part.block < len(self.blocks) else None
        if item is None:
            return None
        table = np.frombuffer(part.table, ENTRY_DTYPE)
        mine = item.table.chunks[part.first_chunk : part.first_chunk + len(table)]
        if not mine or (table["codec"] != RAW).any() or sum(piece.nbytes for piece in mine) != nbytes:
            return None
        return item.raw[mine[0].offset : mine[0].offset + nbytes]

    def land(
        self, part: worker_pb2.ChunkPart, data: memoryview, *, there: bool = False, alone: bool = False
    ) -> tuple[int, int, int]:
        """Runs in a byte mover. One part of a frame: checked, and decoded to its place unless it is `there`. `alone`:
        no other frame lands meanwhile."""
        if part.block >= len(self.blocks):
            raise Corrupt("chunks came of a block that was not announced")
        item = self.blocks[part.block]
        count = -1
        if item is not None:
            try:
                count = self._decode(item, part, data, there, alone)
            except (DataError, BadRequest) as error:
                item.piece.problem = type(error).__name__
        return part.block, part.first_chunk, count

    def _decode(self, item: Arriving, part: worker_pb2.ChunkPart, data: memoryview, there: bool, alone: bool) -> int:
        summed = self.summed(item)
        item.whole = None
        count = decode_chunks(
            part.table, data, self._asked.spec, item.piece.shard, item.raw, part.first_chunk, item.stored,
            in_place=there, summed=summed,
        )  # fmt: skip
        self.came(item, part.first_chunk, count, summed_now=not summed and alone)
        return count

    def summed(self, item: Arriving) -> bool:
        """Whether raw chunks have sums: where the sum of the whole block says it all they need none. Pure."""
        return not (self._asked.by_block and item.stored == Fidelity.EXACT)

    def came(self, item: Arriving, first: int, count: int, *, summed_now: bool) -> None:
        """Runs in a byte mover. Chunks lie in `item.raw`: what is to lie elsewhere is copied. `summed_now`: with the
        last one the block is summed."""
        if summed_now and first + count == len(item.table.chunks):
            item.whole = xxh3(item.raw) == item.copy_id  # now, while it lies in the cache
        if not item.direct and item.span is not None and count:
            span = item.span
            low, high = max(first, span.first_chunk), min(first + count, span.first_chunk + len(span.chunks))
            if low < high:
                begin, last = span.chunks[low - span.first_chunk], span.chunks[high - 1 - span.first_chunk]
                raw = item.raw[begin.offset : last.offset + last.nbytes]
                item.piece.target.fill(begin.offset - span.source + span.target, raw)

    def note(self, landed: Landed) -> None:
        for block, first, count in landed:
            item = self.blocks[block]
            if item is None:
                continue
            if count < 0:
                item.piece.chunks = 0  # nothing of it is built upon
                item.piece.copy_id = item.piece.copy_id if item.piece.shown else 0
                self.blocks[block] = None
                continue
            for chunk in range(first, first + count):
                item.missing.pop(chunk, None)
            item.piece.chunks = next(iter(item.missing), len(item.table.chunks))
        self._arrived()

    async def settle(self) -> None:
        """Wait for every byte mover: until then buffers are in use, so a cancellation waits too."""
        cancelled = False
        while self._landing:
            task = self._landing[0]
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                cancelled = True
                continue
            self._landing.popleft()
            if task.cancelled():
                continue
            error = task.exception()
            if error is not None and not isinstance(error, DataError):
                raise error
        if cancelled:
            raise asyncio.CancelledError

    async def finish(self) -> None:
        """Check the copy of every block that is whole, cut it where it must be, and note what was delivered."""
        whole = [item for item in self.blocks if item is not None and not item.missing]
        for item, problem in zip(whole, await self._pool.run(self._check, whole), strict=True):
            item.piece.problem = problem
            item.piece.tier = None if problem else item.tier
            if problem:
                item.piece.chunks = 0
        self._arrived()

    def _check(self, whole: list[Arriving]) -> list[str]:
        """Runs in a byte mover. Empty for a block whose bytes are those of its copy; of some of its layers, every chunk
        was checked by itself."""
        problems = []
        for item in whole:
            lossy = item.stored < Fidelity.EXACT  # its chunks have sums, what they decode to has none
            same = lossy or self._asked.layers is not None or self._same(item)
            if same and item.span is None:
                item.piece.fill(self._asked.spec, item.raw)
            problems.append("" if same else "Corrupt")
        return problems

    def _same(self, item: Arriving) -> bool:
        return xxh3(item.raw) == item.copy_id if item.whole is None else item.whole


def _begun(asked: Asked, piece: Piece, table: RawTable) -> Arriving:
    """Mutates a piece that is not received where it goes: it gets memory of its own."""
    span, direct, count = span_of(asked.spec, piece.shard, piece.wanted), is_direct(piece), len(table.chunks)
    if direct:
        assert piece.target.whole is not None
        raw = piece.target.whole
    else:
        if piece.scratch is None:
            piece.scratch, piece.chunks = memoryview(bytearray(table.ends[-1])), 0
        raw = piece.scratch
    wanted = range(count) if asked.layers is None else _wanted(span, count)
    missing = dict.fromkeys(range(max(wanted.start, piece.chunks), wanted.stop))
    return Arriving(piece, table, raw, span, missing, direct)


def _wanted(span: Span | None, count: int) -> range:
    """Chunks of a stored block that come where only some layers are asked for."""
    return range(count) if span is None else range(span.first_chunk, span.first_chunk + len(span.chunks))


def _header(frame: bytes) -> tuple[worker_pb2.GetHeader, memoryview]:
    packed, data = frames.decode(frame)
    try:
        return worker_pb2.GetHeader.FromString(packed or b""), data
    except DecodeError:
        raise Corrupt("a frame of the stream has no readable header") from None


def stored_bytes(table: bytes) -> int:
    """Stored bytes of all entries of a part of a chunk table."""
    if len(table) % ENTRY_BYTES:
        raise Corrupt(f"a table part of {len(table)} bytes is no whole number of entries")
    return int(np.frombuffer(table, ENTRY_DTYPE)["stored"].sum(dtype=np.uint64))
