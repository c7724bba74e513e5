"""Reading stored blocks of a worker on another host: a Get stream, decoded as its frames arrive."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from kvstore.checksum import xxh3
from kvstore.client.pieces import LATER, Asked, Piece, Span, bound, shard_keys, span_of
from kvstore.codecs import RAW
from kvstore.errors import BadRequest, Corrupt, DataError, KVStoreError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, Header, decode_chunks
from kvstore.layout import block_bytes, chunks
from kvstore.seams import Pool
from kvstore.transport import frames
from kvstore.transport.base import Channel, Landing
from kvstore.transport.methods import WORKER
from kvstore.types import Fidelity, Tier
from kvstore.wire import worker_pb2

FRAMES_AHEAD = 4
"""Frames of a stream that may wait for a byte mover while the next ones arrive."""

RawGet = Callable[[worker_pb2.GetRequest, Landing, float], Awaitable[float]]
"""(request, landing, seconds): 0 when a raw connection served it; else nothing has landed, and so many seconds are
left."""

Landed = list[tuple[int, int, int]]
"""(block, first chunk, chunks; -1 where they are no good) of each part of a frame."""


async def read_remote(
    channel: Channel,
    pool: Pool,
    asked: Asked,
    pieces: Sequence[Piece],
    *,
    timeout_s: float,
    arrived: Callable[[], None] = lambda: None,
    raw: RawGet | None = None,
) -> None:
    """One Get, by a raw connection where `raw` makes one, else as a gRPC stream. Sets `tier` or `problem` of every
    piece; what was whole before an error counts, and chunks that came of a block need not come again. `arrived` is
    called after every frame.

    KVStoreError: the stream ended early.
    """
    blocks, ordered = shard_keys(pieces)
    request = worker_pb2.GetRequest(
        root=asked.spec.root,
        blocks=blocks,
        least=int(asked.least),  # type: ignore[arg-type]
        redis=asked.redis,
    )
    request.planes = asked.planes
    request.by_block = asked.by_block
    if asked.layers is not None:
        request.layer_first, request.layer_count = asked.layers.start, len(asked.layers)
    for index, piece in enumerate(ordered):
        if piece.chunks and (piece.scratch is not None or _direct(piece)):
            resume = worker_pb2.Resume(block=index, copy_id=piece.copy_id, first_chunk=piece.chunks)
            request.resume.append(resume)
    arrivals = Arrivals(pool, asked, ordered, arrived)
    failure: KVStoreError | None = None
    try:
        left_s = timeout_s
        if raw is not None:
            landing = arrivals.landing()
            try:
                left_s = await raw(request, landing, timeout_s)
            finally:
                landing.conclude()
        if left_s > 0:
            async with aclosing(channel.stream(WORKER["Get"], _once(request), timeout_s=left_s)) as stream:
                async for frame in stream:
                    await arrivals.take(frame)
    except KVStoreError as error:
        failure = error
    finally:
        await arrivals.settle()
    await arrivals.finish()
    if failure is not None:
        raise failure


def _direct(piece: Piece) -> bool:
    """Whether its chunks are decoded where the caller wants them."""
    return piece.shard == piece.wanted and piece.target.whole is not None


async def _once(request: worker_pb2.GetRequest) -> AsyncIterator[worker_pb2.GetRequest]:
    yield request


@dataclass(slots=True)
class _Arriving:
    """A block on its way in. `raw` is the target itself, or scratch for one that is cut, or scattered."""

    piece: Piece
    header: Header
    tier: Tier
    raw: memoryview
    span: Span | None  # of the bytes that go on to the target as they come; None: at the end
    missing: dict[int, None]  # chunks
    direct: bool  # `raw` is the target
    whole: bool | None = None  # whether its bytes are those of its copy; None: not looked at since something came


class Arrivals:
    """The blocks of one stream. `take` each frame, then `settle`, then `finish`."""

    def __init__(
        self, pool: Pool, asked: Asked, ordered: list[Piece], arrived: Callable[[], None] = lambda: None
    ) -> None:
        self._pool, self._asked, self._ordered, self._arrived = pool, asked, ordered, arrived
        self.blocks: list[_Arriving | None] = []
        self._landing: deque[asyncio.Task[None]] = deque()
        for piece in ordered:
            piece.problem = "missing"

    def landing(self) -> InPlace:
        """For frames whose data is received where it belongs. What has landed is noted in this event loop: at once
        where somebody waits for layers, else by `InPlace.conclude`, since waking the loop takes the receiver's time."""
        loop = asyncio.get_running_loop()

        def at_once(landed: Landed) -> None:
            loop.call_soon_threadsafe(self.note, landed)

        return InPlace(self, at_once if self._asked.layerwise else None)

    def announce(self, header: worker_pb2.GetHeader) -> None:
        """The first header says what will come. Mutates. Corrupt."""
        if not self.blocks:
            infos = header.blocks
            if len(infos) != len(self._ordered):
                raise Corrupt(f"{len(self._ordered)} blocks were asked for and {len(infos)} answered")
            self.blocks = [self._announced(*pair) for pair in zip(self._ordered, infos, strict=True)]

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

    def _announced(self, piece: Piece, info: worker_pb2.BlockInfo) -> _Arriving | None:
        if info.state != worker_pb2.BLOCK_FOUND:
            piece.problem = LATER if info.state == worker_pb2.BLOCK_LATER else "missing"
            return None
        try:
            header, tier = bound(self._asked, piece, info.header), Tier(info.tier)
        except (DataError, ValueError) as error:
            piece.problem = type(error).__name__
            return None
        if not piece.begin(header.copy_id):
            return None
        spec = self._asked.spec
        span = span_of(spec, piece.shard, piece.wanted)
        direct = _direct(piece)
        if direct:
            assert piece.target.whole is not None
            raw = piece.target.whole
        else:
            if piece.scratch is None:
                piece.scratch, piece.chunks = memoryview(bytearray(block_bytes(spec, piece.shard))), 0
            raw = piece.scratch
        count = len(chunks(spec, piece.shard))
        wanted = range(count) if self._asked.layers is None else _wanted(span, count)
        missing = dict.fromkeys(chunk for chunk in wanted if chunk >= piece.chunks)
        return _Arriving(piece, header, tier, raw, span, missing, direct)

    def _land(self, frame: bytes) -> Landed:
        """Runs in a byte mover: decode the chunks of a frame to their places."""
        header, data = _header(frame)
        landed: Landed = []
        start = 0
        for part in header.parts:
            nbytes = _stored_bytes(part.table)
            landed.append(self.land(part, data[start : start + nbytes]))
            start += nbytes
        return landed

    def place(self, part: worker_pb2.ChunkPart, nbytes: int) -> memoryview | None:
        """Where the bytes of a part belong, if they are raw and all of them lie there in one piece. Pure."""
        item = self.blocks[part.block] if part.block < len(self.blocks) else None
        if item is None:
            return None
        table = np.frombuffer(part.table, ENTRY_DTYPE)
        mine = chunks(self._asked.spec, item.piece.shard)[part.first_chunk : part.first_chunk + len(table)]
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

    def _decode(self, item: _Arriving, part: worker_pb2.ChunkPart, data: memoryview, there: bool, alone: bool) -> int:
        spec, first, stored = self._asked.spec, part.first_chunk, item.header.stored
        at_last = self._asked.by_block and stored == Fidelity.EXACT  # the sum of the whole block says it all
        item.whole = None
        count = decode_chunks(
            part.table, data, spec, item.piece.shard, item.raw, first, stored, in_place=there, summed=not at_last
        )
        if at_last and alone and first + count == len(chunks(spec, item.piece.shard)):
            item.whole = xxh3(item.raw) == item.header.copy_id  # now, while it lies in the cache
        if not item.direct and item.span is not None and count:
            span = item.span
            low, high = max(first, span.first_chunk), min(first + count, span.first_chunk + len(span.chunks))
            if low < high:
                begin, last = span.chunks[low - span.first_chunk], span.chunks[high - 1 - span.first_chunk]
                raw = item.raw[begin.offset : last.offset + last.nbytes]
                item.piece.target.fill(begin.offset - span.source + span.target, raw)
        return count

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
            item.piece.chunks = next(iter(item.missing), len(chunks(self._asked.spec, item.piece.shard)))
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

    def _check(self, whole: list[_Arriving]) -> list[str]:
        """Runs in a byte mover. Empty for a block whose bytes are those of its copy; of some of its layers, every chunk
        was checked by itself."""
        problems = []
        for item in whole:
            lossy = item.header.stored < Fidelity.EXACT  # its chunks have sums, what they decode to has none
            same = lossy or self._asked.layers is not None or self._same(item)
            if same and item.span is None:
                item.piece.fill(self._asked.spec, item.raw)
            problems.append("" if same else "Corrupt")
        return problems

    def _same(self, item: _Arriving) -> bool:
        return xxh3(item.raw) == item.header.copy_id if item.whole is None else item.whole


class InPlace:
    """`kvstore.transport.base.Landing` over the blocks of one Get: raw chunks are received where they belong, others
    into memory of its own. Runs in a byte mover."""

    def __init__(self, arrivals: Arrivals, at_once: Callable[[Landed], object] | None) -> None:
        self._arrivals, self._at_once = arrivals, at_once
        self._later: Landed = []
        self._parts: list[tuple[worker_pb2.ChunkPart, memoryview, bool]] = []
        self._aside = memoryview(b"")

    def places(self, header: bytes, nbytes: int) -> Sequence[memoryview]:
        """Mutates."""
        try:
            parsed = worker_pb2.GetHeader.FromString(header)
        except DecodeError:
            raise Corrupt("a frame has no readable header") from None
        self._arrivals.announce(parsed)
        sizes = [_stored_bytes(part.table) for part in parsed.parts]
        if sum(sizes) != nbytes:
            raise Corrupt(f"{nbytes} bytes came for chunks of {sum(sizes)}")
        if nbytes > len(self._aside):  # once, or twice: frames are of much the same size
            self._aside = memoryview(np.empty(nbytes, np.uint8).data)
        start = 0
        self._parts = []
        for part, size in zip(parsed.parts, sizes, strict=True):
            place = self._arrivals.place(part, size)
            aside = self._aside[start : start + size]
            self._parts.append((part, aside, False) if place is None else (part, place, True))
            start += size
        return [place for _, place, _ in self._parts]

    def landed(self) -> None:
        """Mutates."""
        parts, self._parts = self._parts, []
        landed = [self._arrivals.land(part, place, there=there, alone=True) for part, place, there in parts]
        if self._at_once is None:
            self._later += landed
        else:
            self._at_once(landed)

    def conclude(self) -> None:
        """In the event loop, when nothing comes any more. Mutates."""
        landed, self._later = self._later, []
        self._arrivals.note(landed)


def _wanted(span: Span | None, count: int) -> range:
    """Chunks of a stored block that come where only some layers are asked for."""
    return range(count) if span is None else range(span.first_chunk, span.first_chunk + len(span.chunks))


def _header(frame: bytes) -> tuple[worker_pb2.GetHeader, memoryview]:
    packed, data = frames.decode(frame)
    try:
        return worker_pb2.GetHeader.FromString(packed or b""), data
    except DecodeError:
        raise Corrupt("a frame of the stream has no readable header") from None


def _stored_bytes(table: bytes) -> int:
    """Stored bytes of all entries of a part of a chunk table."""
    if len(table) % ENTRY_BYTES:
        raise Corrupt(f"a table part of {len(table)} bytes is no whole number of entries")
    return int(np.frombuffer(table, ENTRY_DTYPE)["stored"].sum(dtype=np.uint64))
