"""Copying blocks from another worker as they are stored there: a Get stream put together to records again, verified.

The same stream a client reads, but nothing is decoded: chunks land where they lay in the source's record. What the
source holds raw arrives as raw bytes. Once the first frame says what will come, the caller gives room for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from kvstore.checksum import xxh3
from kvstore.client.stream_source import RawGet
from kvstore.errors import Corrupt, DataError, KVStoreError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, HEADER_BYTES, Header, Record
from kvstore.header import check_header, expect
from kvstore.layout import Chunk, chunks
from kvstore.seams import Pool
from kvstore.spec import ModelSpec, Shard
from kvstore.transport import frames
from kvstore.transport.base import Begun, Channel
from kvstore.transport.methods import WORKER
from kvstore.types import BlockId, Fidelity, pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

MakeRoom = Callable[[Sequence[Header | None]], Awaitable[Sequence[memoryview | None]]]
"""For each block that will come (None: it won't) memory as long as its record, or as its raw bytes where the header has
no chunks; None for those that are not wanted."""


@dataclass(slots=True)
class _Arriving:
    """A block on its way in. Entries of its table come in order: so many have come so far, and are there by now."""

    header: Header
    entries: int
    data: memoryview | None = None  # where it goes; none yet
    come: int = 0
    there: int = 0
    sound: bool = True


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a frame: entries, how they are written, and where their stored bytes go."""

    block: _Arriving | None
    first: int  # of the entries, in the block's table
    table: NDArray[np.void]
    packed: bytes
    into: memoryview


class Landing:
    """The frames of one stream over blocks of one shard, each received where it lay in its block. In byte movers, one
    frame at a time: `places`, then `landed`; or `take`, where it has come already. After the first one: `land_in`."""

    def __init__(self, namespace: str, spec: ModelSpec, shard: Shard, keys: Sequence[bytes]) -> None:
        self._namespace, self._spec, self._shard, self._keys = namespace, spec, shard, keys
        self._pieces: Sequence[Chunk] = chunks(spec, shard)
        self._blocks: list[_Arriving | None] | None = None
        self._parts: list[_Part] = []
        self.purges: tuple[bytes, ...] = ()  # that the source had done before it opened the blocks
        self.later = 0  # blocks the source would give when asked again
        self.bad = 0  # blocks that did not hold

    def take(self, frame: bytes) -> None:
        """Mutates. Corrupt where the stream is none."""
        packed, data = frames.decode(frame)
        at = 0
        for place in self.places(packed or b"", len(data)):
            np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(data[at : at + len(place)], np.uint8))
            at += len(place)
        self.landed()

    def places(self, header: bytes, nbytes: int) -> Sequence[memoryview]:
        """Mutates. Corrupt where the stream is none."""
        try:
            said = worker_pb2.GetHeader.FromString(header)
        except DecodeError as error:
            raise Corrupt(f"a frame of the Get stream can't be read: {error}") from None
        if self._blocks is None:
            if len(said.blocks) != len(self._keys):
                raise Corrupt(f"{len(self._keys)} blocks were asked for and {len(said.blocks)} answered")
            self.purges = tuple(said.purges)
            self._blocks = [self._begin(*pair) for pair in zip(self._keys, said.blocks, strict=True)]
        self._parts = []
        for part in said.parts:
            self._parts.append(self._part(self._blocks, part, nbytes))
            nbytes -= len(self._parts[-1].into)
        if nbytes:
            raise Corrupt(f"{nbytes} bytes of a frame are of none of its parts")
        return [part.into for part in self._parts]

    def coming(self) -> list[Header | None]:
        """By block asked for, once the first frame has landed. Pure."""
        return [None if block is None else block.header for block in self._blocks or [None] * len(self._keys)]

    def land_in(self, rooms: Sequence[memoryview | None]) -> None:
        """Where the blocks go: MakeRoom's answer to `coming`. Mutates."""
        assert self._blocks is not None, "room is given once it is known for what"
        for index, (block, room) in enumerate(zip(self._blocks, rooms, strict=True)):
            if block is None or room is None:
                self._blocks[index] = None
                continue
            nbytes = block.header.stored_length or block.header.raw_length
            assert len(room) == nbytes, f"a room of {len(room)} bytes for {nbytes}"
            block.data = room

    def _begin(self, key: bytes, info: worker_pb2.BlockInfo) -> _Arriving | None:
        if info.state != worker_pb2.BLOCK_FOUND:
            self.later += info.state == worker_pb2.BLOCK_LATER
            return None
        try:
            header = Header.unpack(info.header)
            expect(header, BlockId(self._namespace, self._shard.digest, key), self._spec.root)
            check_header(header, self._spec, self._shard)
            if 0 < header.chunk_count < len(self._pieces):
                raise Corrupt("a record with fewer chunks than its shard has")
        except DataError:
            self.bad += 1
            return None
        return (
            _Arriving(header, header.chunk_count)
            if header.chunk_count
            else _Arriving(header.unencoded(), len(self._pieces))
        )

    def _part(self, blocks: Sequence[_Arriving | None], said: worker_pb2.ChunkPart, left: int) -> _Part:
        """Where a part goes, of at most `left` bytes; aside, where its block is none, or it lies nowhere in it."""
        if said.block >= len(blocks) or len(said.table) % ENTRY_BYTES:
            raise Corrupt("a part of the Get stream names no block that was asked for")
        block, table = blocks[said.block], np.frombuffer(said.table, ENTRY_DTYPE)
        nbytes = int(table["stored"].sum(dtype=np.uint64))
        if nbytes > left:
            raise Corrupt(f"a part of {nbytes} bytes, and only {left} of its frame are left")
        first = 0 if block is None else block.come
        into = None if block is None or block.data is None else self._into(block, block.data, said.first_chunk, table)
        if block is not None:
            block.come += len(table)
            block.sound &= into is not None
        return _Part(block, first, table, said.table, memoryview(bytearray(nbytes)) if into is None else into)

    def _into(self, block: _Arriving, data: memoryview, chunk: int, table: NDArray[np.void]) -> memoryview | None:
        """Where in a block's bytes the next entries go; None where they are not these. Mutates the bytes."""
        nbytes = int(table["stored"].sum(dtype=np.uint64))
        start = self._start(block, data, chunk, table, nbytes)
        if start is None:
            return None
        if block.header.chunk_count and not block.come:  # cleared: what no chunk covers is kept, too
            np.frombuffer(data, np.uint8).fill(0)
        return data[start : start + nbytes]

    def _start(
        self, block: _Arriving, data: memoryview, chunk: int, table: NDArray[np.void], nbytes: int
    ) -> int | None:
        """Where in a block's bytes the next entries lie, one behind the other; None where they do not. Pure."""
        header, first = block.header, block.come
        if not len(table) or first + len(table) > block.entries:
            return None
        if not header.chunk_count:
            mine = self._pieces[first : first + len(table)]
            fits = chunk == first and [piece.nbytes for piece in mine] == table["stored"].tolist()
            return mine[0].offset if fits else None
        start = int(table["offset"][0])
        behind = start + np.cumsum(table["stored"], dtype=np.uint64)
        inside = header.data_start <= start <= len(data) - nbytes
        return start if inside and (table["offset"][1:] == behind[:-1]).all() else None

    def landed(self) -> None:
        """Mutates."""
        parts, self._parts = self._parts, []
        for part in parts:
            block = part.block
            if block is None or block.data is None or not block.sound:
                continue
            block.there += len(part.table)
            if block.header.chunk_count:
                block.sound = _sums_hold(part.table, part.into)
                at = HEADER_BYTES + part.first * ENTRY_BYTES
                block.data[at : at + len(part.packed)] = part.packed
            elif block.there == block.entries:  # now, while it lies in the cache
                block.sound = xxh3(block.data) == block.header.copy_id

    def finish(self) -> list[int]:
        """Runs in a byte mover. Bytes of each block that lies whole in its room and holds; 0 for the others."""
        return [0 if block is None else self._whole(block) for block in self._blocks or [None] * len(self._keys)]

    def _whole(self, block: _Arriving) -> int:
        self.bad += not block.sound
        header, data = block.header, block.data
        if not block.sound or data is None or block.there < block.entries:
            return 0
        if header.chunk_count:
            data[:HEADER_BYTES] = header.pack()
            try:
                expect(Record.parse(data).header, header)
            except DataError:
                self.bad += 1
                return 0
        return len(data)


def _sums_hold(table: NDArray[np.void], stored: memoryview) -> bool:
    at = 0
    for nbytes, xxh3_said in zip(table["stored"].tolist(), table["xxh3"].tolist(), strict=True):
        if xxh3(stored[at : at + nbytes]) != xxh3_said:
            return False
        at += nbytes
    return True


async def pull_blocks(
    channel: Channel,
    pool: Pool,
    namespace: str,
    spec: ModelSpec,
    shard: Shard,
    keys: Sequence[bytes],
    make_room: MakeRoom,
    *,
    timeout_s: float,
    raw: Callable[[Begun], RawGet] | None = None,
) -> tuple[list[int], Landing]:
    """One Get, by a raw connection where `raw` makes one, else as a gRPC stream; per key the bytes that lie in its room
    now, whole and verified, 0 for what the source does not have or did not give whole.

    What was whole before the stream broke counts. KVStoreError where nothing did. Cancelled: nobody touches the rooms
    any more.
    """
    request = worker_pb2.GetRequest(
        root=spec.root,
        blocks=[worker_pb2.ShardKeys(shard=shard_to_wire(shard), keys=pack_keys(keys))],
        least=int(Fidelity.COMPACT),  # type: ignore[arg-type]
        purges=True,
        by_block=True,
    )
    landing = Landing(namespace, spec, shard, keys)

    async def begun() -> None:
        landing.land_in(await make_room(landing.coming()))

    failure: KVStoreError | None = None
    try:
        left_s = timeout_s if raw is None else await raw(begun)(request, landing, timeout_s)
        if left_s > 0:
            async with aclosing(channel.stream(WORKER["Get"], _once(request), timeout_s=left_s)) as stream:
                await _take_all(stream, landing, pool, begun)
    except KVStoreError as error:
        failure = error
    found = await pool.run(landing.finish)
    if failure is not None and not any(found):
        raise failure
    return found, landing


async def _take_all(stream: AsyncIterator[bytes], landing: Landing, pool: Pool, begun: Begun) -> None:
    first = True
    async for frame in stream:
        await pool.run(landing.take, frame)
        if first:
            await begun()
        first = False


async def _once(request: worker_pb2.GetRequest) -> AsyncIterator[worker_pb2.GetRequest]:
    yield request
