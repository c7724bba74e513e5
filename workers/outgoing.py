"""The blocks of one Get as messages: chunks layer by layer across all blocks, about 2 MiB each. For byte movers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from kvstore.checksum import xxh3
from kvstore.client.pieces import layers_before
from kvstore.codecs import PLANES_MAX
from kvstore.errors import DataError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, Entry, Record, grouped, worth
from kvstore.header import Header
from kvstore.layout import Chunk, chunks
from kvstore.open_rows import FOUND
from kvstore.raw_table import raw_table
from kvstore.spec import ModelSpec, Shard
from kvstore.store.tiered import Hold
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
        self._places = [_Place.of(hold, row) for row in hold.words.tolist()]
        self._later = later  # blocks after those held that the caller has to ask for again
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
        for block, place in enumerate(self._places):
            parts = self._parts(block, place) if place is not None else None
            if place is None or parts is None:
                header.blocks.add(state=worker_pb2.BLOCK_MISSING)
                continue
            header.blocks.add(state=worker_pb2.BLOCK_FOUND, header=self._header(block), tier=place.tier)
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

    def _header(self, block: int) -> bytes:
        """Packed; what the planes that are sent make of it."""
        packed: bytes = self._hold.rows["header"][block].tobytes()
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
        shard = self._shards[block]
        pieces = chunks(self._spec, shard)
        if place.raw:
            sizes = [piece.nbytes for piece in pieces]
        else:
            try:
                record = Record.parse(place.view)
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
        if place.raw and block not in self._resume:
            if shard not in self._alike:  # the same for all of them
                self._alike[shard] = self._cut(block, shard, pieces, sizes, 0)
            if not self._by_block:
                return self._alike[shard]
            return [(block, part.of(block)) for _, part in self._alike[shard]]
        copy_id, start = self._resume.get(block, (0, 0))
        if copy_id != int(self._hold.rows["header"]["copy_id"][block]):
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


def _by_layer(cuts: Sequence[tuple[int, list[tuple[int, Part]]]], *, first_alone: bool) -> Iterator[list[Part]]:
    """Messages, layer by layer across all blocks. `cuts`: (block, (layer, part) of it or of one like it), layers
    ascending, none of them empty. What comes later is made when it is asked for."""
    first, sent = -1, False
    if first_alone and cuts:
        first = min(parts[0][0] for _, parts in cuts)
        mine = [
            part.of(block)
            for block, parts in cuts
            for _, part in takewhile(
                lambda cut: cut[0] == first, parts
            )  # the others are looked at when it is on its way
        ]
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
