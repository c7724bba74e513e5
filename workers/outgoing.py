"""The blocks of one Get as messages: chunks layer by layer across all blocks, about 2 MiB each. For byte movers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kvstore.checksum import xxh3
from kvstore.client.pieces import layers_before
from kvstore.codecs import PLANES_MAX
from kvstore.errors import DataError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, Entry, Record, grouped, worth
from kvstore.header import HEADER_BYTES, Header
from kvstore.layout import Chunk, chunks
from kvstore.open_rows import FOUND, ROW_BYTES
from kvstore.raw_table import raw_table
from kvstore.spec import ModelSpec, Shard
from kvstore.store.tiered import Hold
from kvstore.transport import frames
from kvstore.types import Buffer
from kvstore.wire import worker_pb2

MESSAGE_BYTES = 2 << 20
"""Payload of one message; a larger chunk makes a larger one. Half of it costs a sixth more processor time."""


FIRST_SHARE = 2
"""Of it, the first message has that part, the next ones twice as much and so on: a reader that is woken once has its
first layer sooner than by two smaller ones."""


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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block lies."""

    raw: bool
    tier: int
    view: memoryview  # its bytes
    generations: memoryview  # of its segment's units
    unit: int
    generation: int  # of that unit, to be found unchanged after reading

    @classmethod
    def of(cls, hold: Hold, row: Sequence[int]) -> _Place | None:
        """From the words of a row of `hold`; None for a block that was not found."""
        offset, length, generation, rest = row[-4:]
        if rest >> 32 & 0xFF != FOUND:
            return None
        segment = hold.segments[rest & 0xFFFFFFFF]
        view = segment.segment.view[offset : offset + length]
        return cls(
            bool(rest >> 48 & 0xFF), rest >> 40 & 0xFF, view, segment.generations, segment.unit(offset), generation
        )

    @property
    def current(self) -> bool:
        now: int = self.generations[self.unit]
        return now == self.generation


class Outgoing:
    """Reads held blocks. `lost` are those whose space was reused under us: nothing more of them is sent."""

    def __init__(
        self,
        spec: ModelSpec | None,
        shards: Sequence[Shard],
        hold: Hold,
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
        self._spec, self._shards, self._hold = spec, shards, hold
        self._rows = hold.rows.tobytes()
        self._places = [_Place.of(hold, row) for row in hold.words.tolist()]
        self._later = later  # blocks after those held that the caller has to ask for again
        self._layers, self._chunk_bytes_max = layers, chunk_bytes_max
        self._records: dict[int, tuple[Record, list[list[Entry]]]] = {}
        self._resume = resume or {}
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
        for block, place in enumerate(self._places):
            parts = self._parts(block, place) if place is not None else None
            if place is None or parts is None:
                header.blocks.add(state=worker_pb2.BLOCK_MISSING)
                continue
            header.blocks.add(state=worker_pb2.BLOCK_FOUND, header=self._header(block), tier=place.tier)
            if parts:
                cuts.append((block, parts))
        header.blocks.extend([worker_pb2.BlockInfo(state=worker_pb2.BLOCK_LATER)] * self._later)
        if self._by_block:
            return header.SerializeToString(), _messages(part.of(block) for block, parts in cuts for _, part in parts)
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
            mine = [part for part in parts if part.block not in self.lost] if self.lost else parts
            if not mine:
                return None
            header = worker_pb2.GetHeader()
            tables, payload = self._raw(mine) if not self._records else self._one_by_one(mine)
            for part, table in zip(mine, tables, strict=True):
                header.parts.add(block=part.block, first_chunk=part.first, table=table)
            if not self._reused(mine):
                return header.SerializeToString(), payload

    def each(self) -> Iterator[tuple[bytes, Sequence[Buffer]]]:
        """Advanced in a byte mover. All frames as `scattered` ones, the first without data."""
        header, messages = self._plan(first_alone=True)
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

    def _header(self, block: int) -> bytes:
        """Packed; what the planes that are sent make of it."""
        packed = self._rows[block * ROW_BYTES : block * ROW_BYTES + HEADER_BYTES]
        if block not in self._records:
            return packed
        header = Header.unpack(packed, checked=True)
        return replace(header, stored=min(header.stored, *(worth(mine) for mine in self._records[block][1]))).pack()

    def _place(self, block: int) -> _Place:
        place = self._places[block]
        assert place is not None, "a part of a block that was not found"
        return place

    def _current(self, block: int) -> bool:
        return self._place(block).current

    def _parts(self, block: int, place: _Place) -> list[tuple[int, Part]] | None:
        """(layer of the model, part) of the layers asked for, layers ascending, or those of a block like it; None where
        the block can't be served."""
        assert self._spec is not None, "nothing can be placed of an unknown model"
        shard, whole = self._shards[block], self._by_block and self._layers is None
        if place.raw and block not in self._resume:
            parts, largest = _raw_cut(self._spec, shard, self._layers, whole, MESSAGE_BYTES)
            if largest > self._chunk_bytes_max or not self._current(block):
                return None
            return parts
        pieces = chunks(self._spec, shard)
        if place.raw:
            sizes = [piece.nbytes for piece in pieces]
        else:
            try:
                record = Record.parse(place.view)
                rows = [mine[: self._planes] for mine in grouped(record.table.tolist(), pieces)]
            except DataError:
                return None
            self._records[block] = record, rows
            sizes = [sum(row[9] for row in mine) for mine in rows]
        if max(sizes) > self._chunk_bytes_max or not self._current(block):
            return None
        copy_id, start = self._resume.get(block, (0, 0))
        if copy_id != int(self._hold.rows["header"]["copy_id"][block]):
            start = 0
        return _cut(
            block, pieces, sizes, start, layers_before(self._spec, shard.group), self._layers, whole, MESSAGE_BYTES
        )

    def _raw(self, parts: Sequence[Part]) -> tuple[list[bytes], list[Buffer]]:
        """(table entries, stored bytes) of parts of raw blocks; views of the arena."""
        assert self._spec is not None
        rows, sums, payload, shard = list[NDArray[np.void]](), list[int](), list[Buffer](), None
        for part in parts:
            if self._shards[part.block] is not shard:  # neighbours mostly share one object
                shard = self._shards[part.block]
                table = raw_table(self._spec, shard)
            view, ends, last = self._place(part.block).view, table.ends, part.first + part.count
            rows.append(table.entries[part.first : last])
            payload.append(view[ends[part.first] : ends[last]])
            if not self._by_block:
                sums += [xxh3(view[ends[one] : ends[one + 1]]) for one in range(part.first, last)]
        joined = np.concatenate(rows)
        if sums:
            joined["xxh3"] = sums
        packed, at, tables = joined.tobytes(), 0, []
        for part in parts:
            tables.append(packed[at : at + part.count * ENTRY_BYTES])
            at += part.count * ENTRY_BYTES
        return tables, payload

    def _one_by_one(self, parts: Sequence[Part]) -> tuple[list[bytes], list[Buffer]]:
        """`_raw` where some are encoded."""
        tables, payload = list[bytes](), list[Buffer]()
        for part in parts:
            if self._place(part.block).raw:
                found, data = self._raw([part])
            else:
                record, by_chunk = self._records[part.block]
                rows = [row for planes in by_chunk[part.first : part.first + part.count] for row in planes]
                found, data = [np.array(rows, ENTRY_DTYPE).tobytes()], [record.view[r[8] : r[8] + r[9]] for r in rows]
            tables += found
            payload += data
        return tables, payload


@lru_cache(maxsize=64)
def _raw_cut(
    spec: ModelSpec, shard: Shard, layers: range | None, whole: bool, message_bytes: int
) -> tuple[list[tuple[int, Part]], int]:
    """(`_cut` of a raw block, with 0 as its number; its largest chunk's bytes): alike for all of a shard. Pure."""
    pieces = chunks(spec, shard)
    sizes = [piece.nbytes for piece in pieces]
    return _cut(0, pieces, sizes, 0, layers_before(spec, shard.group), layers, whole, message_bytes), max(sizes)


def _cut(
    block: int,
    pieces: Sequence[Chunk],
    sizes: Sequence[int],
    start: int,
    base: int,
    layers: range | None,
    whole: bool,
    message_bytes: int,
) -> list[tuple[int, Part]]:
    """(layer of the model, part) of the layers asked for, from chunk `start` on; `whole`: nobody waits for a layer.
    `base`: layers of the model before the group's. Pure."""
    if whole:
        return [(block, part) for part in _split(block, start, sizes[start:], message_bytes)] if sizes[start:] else []
    found: list[tuple[int, Part]] = []
    for index in range(start + 1, len(pieces) + 1):
        if index == len(pieces) or pieces[index].layer != pieces[start].layer:
            layer = base + pieces[start].layer
            if layers is None or layer in layers:
                found += [(layer, part) for part in _split(block, start, sizes[start:index], message_bytes)]
            start = index
    return found


def _split(block: int, first: int, sizes: Sequence[int], message_bytes: int) -> Iterator[Part]:
    """Parts of a layer's chunks, none of more than a message unless it is one chunk."""
    begin, nbytes = 0, 0
    for index, size in enumerate(sizes):
        if index > begin and nbytes + size > message_bytes:
            yield Part(block, first + begin, index - begin, nbytes)
            begin, nbytes = index, 0
        nbytes += size
    yield Part(block, first + begin, len(sizes) - begin, nbytes)


def _by_layer(cuts: Sequence[tuple[int, list[tuple[int, Part]]]], *, first_alone: bool) -> Iterator[list[Part]]:
    """Messages, layer by layer across all blocks. `cuts`: (block, (layer, part) of it or of one like it), layers
    ascending, none of them empty. What comes later is made when it is asked for."""
    layers = _layers(cuts)
    sent = False
    if first_alone and cuts:
        for message in _messages(next(layers)):
            yield message
            sent = True
    yield from _messages(chain.from_iterable(layers), whole=sent)


def _layers(cuts: Sequence[tuple[int, list[tuple[int, Part]]]]) -> Iterator[list[Part]]:
    """Parts of one layer after the other, blocks in their order."""
    left = [(block, parts, 0) for block, parts in cuts]
    while left:
        layer, mine, later = min(parts[at][0] for _, parts, at in left), list[Part](), []
        for block, parts, at in left:
            while at < len(parts) and parts[at][0] == layer:
                mine.append(parts[at][1].of(block))
                at += 1
            if at < len(parts):
                later.append((block, parts, at))
        left = later
        yield mine


def _messages(parts: Iterable[Part], *, whole: bool = False) -> Iterator[list[Part]]:
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
