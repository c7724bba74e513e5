"""Copying blocks from another worker as they are stored there: a Get stream put together to records again, verified.

The same stream a client reads, but nothing is decoded: chunks land where they lay in the source's record. What the
source holds raw arrives as raw bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
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
from kvstore.transport.base import Channel
from kvstore.transport.methods import WORKER
from kvstore.types import BlockId, Fidelity, pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire


@dataclass(frozen=True, slots=True)
class Pulled:
    """One block as it came. `header.chunk_count` 0: `data` is raw; else it is the record."""

    header: Header
    data: memoryview


@dataclass(slots=True)
class _Arriving:
    header: Header
    data: memoryview
    missing: dict[int, None]  # chunks


class Landing:
    """The frames of one stream over blocks of one shard, by gRPC (`take`) or a raw connection (`places`, `landed`:
    `kvstore.transport.base.Landing`). Runs in byte movers, one frame at a time."""

    def __init__(self, namespace: str, spec: ModelSpec, shard: Shard, keys: Sequence[bytes]) -> None:
        self._namespace, self._spec, self._shard, self._keys = namespace, spec, shard, keys
        self._pieces: Sequence[Chunk] = chunks(spec, shard)
        self._blocks: list[_Arriving | None] | None = None
        self.purges: tuple[bytes, ...] = ()  # that the source had done before it opened the blocks
        self._header, self._aside = b"", memoryview(bytearray())  # of the frame that comes by a raw connection
        self._room = self._aside
        self.later = 0  # blocks the source would give when asked again
        self.bad = 0  # blocks that did not hold

    def take(self, frame: bytes) -> None:
        """Mutates. Corrupt where the stream is none."""
        packed, data = frames.decode(frame)
        self._take(packed or b"", data)

    def places(self, header: bytes, nbytes: int) -> Sequence[memoryview]:
        """Memory of its own: what a chunk's bytes are worth is known when they are there. Mutates."""
        if nbytes > len(self._room):  # once, or twice: frames are of much the same size
            self._room = memoryview(np.empty(nbytes, np.uint8).data)
        self._header, self._aside = header, self._room[:nbytes]
        return [self._aside]

    def landed(self) -> None:
        """Mutates."""
        self._take(self._header, self._aside)

    def _take(self, packed: bytes, data: memoryview) -> None:
        try:
            header = worker_pb2.GetHeader.FromString(packed)
        except DecodeError as error:
            raise Corrupt(f"a frame of the Get stream can't be read: {error}") from None
        if self._blocks is None:
            if len(header.blocks) != len(self._keys):
                raise Corrupt(f"{len(self._keys)} blocks were asked for and {len(header.blocks)} answered")
            self.purges = tuple(header.purges)
            self._blocks = [self._begin(*pair) for pair in zip(self._keys, header.blocks, strict=True)]
        at = 0
        for part in header.parts:
            if part.block >= len(self._blocks) or len(part.table) % ENTRY_BYTES:
                raise Corrupt("a part of the Get stream names no block that was asked for")
            table = np.frombuffer(part.table, ENTRY_DTYPE)
            nbytes = int(table["stored"].sum(dtype=np.uint64))
            self._land(part.block, part.first_chunk, table, part.table, data[at : at + nbytes])
            at += nbytes

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
        size = header.stored_length or header.raw_length
        count = header.chunk_count or len(self._pieces)
        return _Arriving(header, memoryview(bytearray(size)), dict.fromkeys(range(count)))

    def _land(self, block: int, first: int, table: NDArray[np.void], packed: bytes, data: memoryview) -> None:
        assert self._blocks is not None
        arriving = self._blocks[block]
        if arriving is None:
            return
        at = 0
        for index, row in enumerate(table, first):
            stored = data[at : at + int(row["stored"])]
            at += int(row["stored"])
            if index not in arriving.missing or len(stored) != int(row["stored"]) or xxh3(stored) != int(row["xxh3"]):
                self._blocks[block] = None
                self.bad += 1
                return
            if arriving.header.chunk_count:
                start = int(row["offset"])
                entry = (index - first) * ENTRY_BYTES
                place = HEADER_BYTES + index * ENTRY_BYTES
                arriving.data[place : place + ENTRY_BYTES] = packed[entry : entry + ENTRY_BYTES]
                sound = arriving.header.data_start <= start <= len(arriving.data) - len(stored)
            else:
                start = self._pieces[index].offset
                sound = len(stored) == self._pieces[index].nbytes
            if not sound:
                self._blocks[block] = None
                self.bad += 1
                return
            into = np.frombuffer(arriving.data[start : start + len(stored)], np.uint8)
            np.copyto(into, np.frombuffer(stored, np.uint8))
            del arriving.missing[index]

    def finish(self) -> list[Pulled | None]:
        """Runs in a byte mover. What is whole and holds, block by block."""
        found: list[Pulled | None] = []
        for arriving in self._blocks or [None] * len(self._keys):
            if arriving is None or arriving.missing:
                found.append(None)
                continue
            try:
                found.append(_whole(arriving))
            except DataError:
                self.bad += 1
                found.append(None)
        return found


def _whole(arriving: _Arriving) -> Pulled:
    header = arriving.header
    if header.chunk_count:
        arriving.data[:HEADER_BYTES] = header.pack()
        expect(Record.parse(arriving.data).header, header)
    elif xxh3(arriving.data) != header.copy_id:
        raise Corrupt("raw bytes from another worker do not have the checksum of their copy")
    return Pulled(header if header.chunk_count else header.unencoded(), arriving.data)


async def pull_blocks(
    channel: Channel,
    pool: Pool,
    namespace: str,
    spec: ModelSpec,
    shard: Shard,
    keys: Sequence[bytes],
    *,
    timeout_s: float,
    raw: RawGet | None = None,
) -> tuple[list[Pulled | None], Landing]:
    """One Get, by a raw connection where `raw` makes one, else as a gRPC stream.

    Per key what came, None for what the source does not have or did not give whole. What was whole before it
    broke counts. KVStoreError where nothing did.
    """
    request = worker_pb2.GetRequest(
        root=spec.root,
        blocks=[worker_pb2.ShardKeys(shard=shard_to_wire(shard), keys=pack_keys(keys))],
        least=int(Fidelity.COMPACT),  # type: ignore[arg-type]
        purges=True,
    )
    landing = Landing(namespace, spec, shard, keys)
    failure: KVStoreError | None = None
    try:
        left_s = timeout_s if raw is None else await raw(request, landing, timeout_s)
        if left_s > 0:
            async with aclosing(channel.stream(WORKER["Get"], _once(request), timeout_s=left_s)) as stream:
                async for frame in stream:
                    await pool.run(landing.take, frame)
    except KVStoreError as error:
        failure = error
    found = await pool.run(landing.finish)
    if failure is not None and not any(found):
        raise failure
    return found, landing


async def _once(request: worker_pb2.GetRequest) -> AsyncIterator[worker_pb2.GetRequest]:
    yield request
