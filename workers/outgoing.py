"""The blocks of one Get as messages: chunks layer by layer across all blocks, about 2 MiB each. For byte movers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvstore.checksum import xxh3
from kvstore.client.pieces import layers_before
from kvstore.codecs import PLANES_MAX, RAW
from kvstore.errors import DataError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, HEADER_BYTES, Entry, Record, grouped, worth
from kvstore.header import Header
from kvstore.layout import Chunk, chunks
from kvstore.spec import ModelSpec, Shard
from kvstore.store.arena import generation_at
from kvstore.store.tiered import Placed
from kvstore.transport import frames
from kvstore.types import Buffer
from kvstore.wire import worker_pb2

MESSAGE_BYTES = 2 << 20
"""Payload of one message; a larger chunk makes a larger one. Half of it costs a sixth more processor time."""


FIRST_SHARE = 4
"""Of it, the first message has that part, the next twice as much, and so on."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive chunks of one layer of one block."""

    block: int
    first: int
    count: int
    nbytes: int  # stored

    def of(self, block: int) -> Part:
        """The same of a block like it. Pure."""
        return self if block == self.block else Part(block, self.first, self.count, self.nbytes)


class Outgoing:
    """Reads held blocks. `lost` are those whose space was reused under us: nothing more of them is sent."""

    def __init__(
        self,
        spec: ModelSpec | None,
        shards: Sequence[Shard],
        placed: Sequence[Placed | None],
        *,
        later: int,
        layers: range | None,
        chunk_bytes_max: int,
        resume: Mapping[int, tuple[int, int]] | None = None,
        planes: int = 0,
        by_block: bool = False,
        purges: Sequence[bytes] = (),
    ) -> None:
        """`spec` None: of a model that nobody has put a block of. `resume`: block -> (copy id, first chunk) of those
        the reader has in part. `planes`: of nested chunks; 0: all there are. `purges`: told in the first message."""
        self._spec, self._shards, self._placed = spec, shards, placed
        self._later = later  # blocks after those placed that the caller has to ask for again
        self._layers, self._chunk_bytes_max = layers, chunk_bytes_max
        self._bases = [] if spec is None else [layers_before(spec, index) for index in range(len(spec.groups))]
        self._records: dict[int, tuple[Record, list[list[Entry]]]] = {}
        self._resume = resume or {}
        self._alike: dict[Shard, list[tuple[int, Part]]] = {}  # the parts of any raw block of a shard
        self._planes = planes or PLANES_MAX
        self._purges = purges
        self._by_block = by_block  # the reader sums whole blocks, so raw chunks need no sums
        self.lost: dict[int, None] = {}

    def begin(self) -> tuple[bytes, list[list[Part]]]:
        """Runs in a byte mover. The first message, which says what will come, and the parts of all others."""
        header, messages = self._plan()
        return frames.encode(header, ()), list(messages)

    def _plan(self, *, first_alone: bool = False) -> tuple[bytes, Iterator[list[Part]]]:
        """The header of the first message, and the parts of the others. `first_alone`: none has parts of the first
        layer and of others, and whoever waits for that layer does not wait for the others to be planned."""
        header = worker_pb2.GetHeader(purges=self._purges)
        cuts: list[tuple[int, list[tuple[int, Part]]]] = []  # (block, its parts, or those of one like it)
        for block, placed in enumerate(self._placed):
            parts = self._parts(block, placed) if placed is not None else None
            if placed is None or parts is None:
                header.blocks.append(worker_pb2.BlockInfo(state=worker_pb2.BLOCK_MISSING))
                continue
            info = worker_pb2.BlockInfo(
                state=worker_pb2.BLOCK_FOUND,
                header=self._header(block, placed.header).pack(),
                tier=int(placed.tier),  # type: ignore[arg-type]
            )
            header.blocks.append(info)
            if parts:
                cuts.append((block, parts))
        header.blocks.extend([worker_pb2.BlockInfo(state=worker_pb2.BLOCK_LATER)] * self._later)
        return header.SerializeToString(), _by_layer(cuts, first_alone=first_alone)

    def start(self) -> tuple[bytes, list[list[Part]], bytes | None]:
        """Runs in a byte mover. `begin`, and the first of the other messages: somebody waits for both."""
        first, messages = self.begin()
        return first, messages[1:], self.message(messages[0]) if messages else None

    def message(self, parts: Sequence[Part]) -> bytes | None:
        """Runs in a byte mover. A frame; without the blocks whose space was reused while it was copied, and None when
        nothing is left."""
        while (made := self.scattered(parts)) is not None:
            frame = frames.encode(*made)
            if not self._reused(parts):
                return frame
        return None

    def scattered(self, parts: Sequence[Part]) -> tuple[bytes, list[Buffer]] | None:
        """Runs in a byte mover. (header, stored bytes where they lie) of a frame. Their checksums are those of blocks
        that were still there afterwards: whatever is read later is them, or does not have these sums."""
        while True:
            mine = [part for part in parts if part.block not in self.lost]
            if not mine:
                return None
            header = worker_pb2.GetHeader()
            payload: list[Buffer] = []
            for part in mine:
                table, data = self._read(part)
                header.parts.append(worker_pb2.ChunkPart(block=part.block, first_chunk=part.first, table=table))
                payload += data
            if not self._reused(mine):
                return header.SerializeToString(), payload

    def each(self) -> Iterator[tuple[bytes, Sequence[Buffer]]]:
        """Advanced in a byte mover. All frames as `scattered` ones, the first without data."""
        header, messages = self._plan(first_alone=not self._by_block)
        yield header, ()
        for parts in messages:
            made = self.scattered(parts)
            if made is not None:
                yield made
                self._reused(parts)

    def _reused(self, parts: Sequence[Part]) -> bool:
        """Whether the space of any was, of those not known to be lost. Mutates."""
        found = [part.block for part in parts if part.block not in self.lost and not self._current(part.block)]
        self.lost.update(dict.fromkeys(found))
        return bool(found)

    def _header(self, block: int, header: Header) -> Header:
        """What the planes that are sent make of a block."""
        if block not in self._records:
            return header
        return replace(header, stored=min(header.stored, *(worth(mine) for mine in self._records[block][1])))

    def _view(self, placed: Placed) -> memoryview:
        return placed.segment.view[placed.offset : placed.offset + placed.length]

    def _current(self, block: int) -> bool:
        placed = self._placed[block]
        assert placed is not None
        return generation_at(placed.segment.view, placed.data_offset, placed.offset) == placed.generation

    def _parts(self, block: int, placed: Placed) -> list[tuple[int, Part]] | None:
        """(layer of the model, part) of the layers asked for, layers ascending, or those of a block like it; None where
        the block can't be served."""
        assert self._spec is not None, "nothing can be placed of an unknown model"
        shard = self._shards[block]
        pieces = chunks(self._spec, shard)
        if placed.raw:
            sizes = [piece.nbytes for piece in pieces]
        else:
            try:
                record = Record.parse(self._view(placed))
            except DataError:
                return None
            try:
                rows = [mine[: self._planes] for mine in grouped(record.table.tolist(), pieces)]
            except DataError:
                return None
            self._records[block] = record, rows
            sizes = [sum(row[9] for row in mine) for mine in rows]
        if max(sizes) > self._chunk_bytes_max or not self._current(block):
            return None
        if placed.raw and block not in self._resume:
            if shard not in self._alike:  # the same for all of them
                self._alike[shard] = self._cut(block, shard, pieces, sizes, 0)
            if not self._by_block:
                return self._alike[shard]
            return [(block, part.of(block)) for _, part in self._alike[shard]]
        copy_id, start = self._resume.get(block, (0, 0))
        if copy_id != placed.header.copy_id:
            start = 0
        return self._cut(block, shard, pieces, sizes, start)

    def _cut(
        self, block: int, shard: Shard, pieces: Sequence[Chunk], sizes: Sequence[int], start: int
    ) -> list[tuple[int, Part]]:
        """(layer of the model, part) of the layers asked for, from chunk `start` on."""
        if self._by_block and self._layers is None:
            return [(block, part) for part in self._split(block, start, sizes[start:])] if sizes[start:] else []
        base = self._bases[shard.group]
        found: list[tuple[int, Part]] = []
        for index in range(start + 1, len(pieces) + 1):
            if index == len(pieces) or pieces[index].layer != pieces[start].layer:
                layer = base + pieces[start].layer
                if self._layers is None or layer in self._layers:
                    found += [(layer, part) for part in self._split(block, start, sizes[start:index])]
                start = index
        return found

    def _split(self, block: int, first: int, sizes: Sequence[int]) -> Iterator[Part]:
        """Parts of a layer's chunks, none of more than a message unless it is one chunk."""
        begin, nbytes = 0, 0
        for index, size in enumerate(sizes):
            if index > begin and nbytes + size > MESSAGE_BYTES:
                yield Part(block, first + begin, index - begin, nbytes)
                begin, nbytes = index, 0
            nbytes += size
        yield Part(block, first + begin, len(sizes) - begin, nbytes)

    def _read(self, part: Part) -> tuple[bytes, list[Buffer]]:
        """(table entries, stored bytes) of a part; views of the arena."""
        placed = self._placed[part.block]
        assert placed is not None and self._spec is not None
        view = self._view(placed)
        if placed.raw:
            shard = self._shards[part.block]
            mine = chunks(self._spec, shard)[part.first : part.first + part.count]
            table = _raw_entries(self._spec, shard)[part.first : part.first + part.count]
            if not self._by_block:
                table = table.copy()
                table["xxh3"] = [xxh3(view[piece.offset : piece.offset + piece.nbytes]) for piece in mine]
            return table.tobytes(), [view[mine[0].offset : mine[-1].offset + mine[-1].nbytes]]
        record, by_chunk = self._records[part.block]
        rows = [row for planes in by_chunk[part.first : part.first + part.count] for row in planes]
        return np.array(rows, ENTRY_DTYPE).tobytes(), [record.view[row[8] : row[8] + row[9]] for row in rows]


@lru_cache(maxsize=64)
def _raw_entries(spec: ModelSpec, shard: Shard) -> NDArray[np.void]:
    """Entries of a shard's raw chunks, as a record of them would have, but for the checksums."""
    pieces = chunks(spec, shard)
    table = np.zeros(len(pieces), ENTRY_DTYPE)
    data_start = HEADER_BYTES + len(pieces) * ENTRY_BYTES
    for row, piece in enumerate(pieces):
        table[row] = (
            piece.layer, piece.component, 0, piece.head_first, piece.head_count,
            RAW, 0, 0, data_start + piece.offset, piece.nbytes, piece.nbytes, 0,
        )  # fmt: skip
    return table


def _by_layer(cuts: Sequence[tuple[int, list[tuple[int, Part]]]], *, first_alone: bool) -> Iterator[list[Part]]:
    """Messages, layer by layer across all blocks. `cuts`: (block, (layer, part) of it or of one like it), layers
    ascending, none of them empty. What comes later is made when it is asked for."""
    first, sent = -1, False
    if first_alone and cuts:
        first = min(parts[0][0] for _, parts in cuts)
        mine = [part.of(block) for block, parts in cuts for layer, part in parts if layer == first]
        for message in _messages(mine):
            yield message
            sent = True
    others: dict[int, list[Part]] = {}
    for block, parts in cuts:
        for layer, part in parts:
            if layer != first:
                others.setdefault(layer, []).append(part.of(block))
    yield from _messages([part for layer in sorted(others) for part in others[layer]], whole=sent)


def _messages(parts: Sequence[Part], *, whole: bool = False) -> Iterator[list[Part]]:
    """Parts packed into messages, their order kept. Unless `whole` the first are smaller: somebody may wait for the
    first layer."""
    message: list[Part] = []
    nbytes, limit = 0, MESSAGE_BYTES if whole else MESSAGE_BYTES // FIRST_SHARE
    for part in parts:
        if message and nbytes + part.nbytes > limit:
            yield message
            message, nbytes, limit = [], 0, min(2 * limit, MESSAGE_BYTES)
        message.append(part)
        nbytes += part.nbytes
    if message:
        yield message
