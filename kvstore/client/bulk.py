"""Raw blocks of one Open, many at a time: headers checked as columns, bytes copied in one step, generations after it.

What a column check refuses is looked at again one by one (`kvstore.client.pieces.bound`), for the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.client.host_link import Mapped
from kvstore.client.pieces import Asked, Piece, Span, bound, intact, layers_before, span_of
from kvstore.client.targets import address_of
from kvstore.errors import DataError
from kvstore.header import HEADER_BYTES, MAGIC, VERSION, short_check
from kvstore.store.arena import UNIT_BYTES
from kvstore.types import KEY_BYTES, Fidelity, Tier
from kvstore.wire import worker_pb2

_KEY = f"V{KEY_BYTES}"
_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}
HEADER_DTYPE = np.dtype(
    [
        ("magic", "V4"), ("version", "<u2"), ("length", "<u2"), ("flags", "<u4"), ("key", _KEY), ("parent", _KEY),
        ("root", _KEY), ("group", _KEY), ("depth", "<u4"), ("namespace", _KEY), ("shard", _KEY), ("copy_id", "<u8"),
        ("computed_on", "u1"), ("stored", "u1"), ("tokens", "<u2"), ("chunks", "<u4"), ("raw", "<u8"),
        ("stored_length", "<u8"), ("validity", "<u4"), ("check", "<u4"), ("checksum", "<u8"),
    ]
)  # fmt: skip
"""docs/FORMAT.md, "Header", as columns."""
assert HEADER_DTYPE.itemsize == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Opened:
    """One open block: what the worker said, and where it is mapped here."""

    piece: Piece
    block: worker_pb2.OpenBlock
    mapped: Mapped

    @property
    def view(self) -> memoryview:
        return self.mapped.view[self.block.offset : self.block.offset + self.block.length]


class Raws:
    """Raw blocks of one stored shard, wanted as one shard. Runs in a byte mover, but for `whole`."""

    def __init__(self, asked: Asked, opened: Sequence[Opened], span: Span) -> None:
        self.asked, self.opened, self.span = asked, opened, span
        self._marks: list[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64], list[int]]] = []
        self._sources = np.zeros(len(opened), np.uint64)
        self.refused = np.zeros(len(opened), bool)
        self._done = 0  # chunks of the span

    def prepare(self) -> None:
        """Check the headers, find the places. Sets `refused` and the problem of what is not good. Mutates."""
        good = self._good_headers()
        for index in np.flatnonzero(~good).tolist():
            self._refuse(index)
        for index in np.flatnonzero(~self.refused).tolist() if self.asked.verify else ():
            item = self.opened[index]
            if not intact(self.asked, item.view, item.piece.copy_id):
                item.piece.problem, self.refused[index] = "Corrupt", True
        by_segment: dict[int, list[int]] = {}
        for index, item in enumerate(self.opened):
            by_segment.setdefault(id(item.mapped), []).append(index)
        for indices in by_segment.values():
            mapped = self.opened[indices[0]].mapped
            offsets = np.array([self.opened[index].block.offset for index in indices], np.int64)
            generations = np.array([self.opened[index].block.generation for index in indices], np.uint64)
            table = np.frombuffer(mapped.view, np.uint64, mapped.data_offset // 8)
            units = (offsets - mapped.data_offset) // UNIT_BYTES
            self._marks.append((table, units, generations, indices))
            self._sources[indices] = offsets.astype(np.uint64) + np.uint64(address_of(mapped.view))

    def _good_headers(self) -> NDArray[np.bool_]:
        asked, first = self.asked, self.opened[0].piece
        packed = [item.block.header for item in self.opened]
        nbytes = asked.names(first.shard)[4]
        right = [
            len(header) == HEADER_BYTES and item.block.length == nbytes
            for item, header in zip(self.opened, packed, strict=True)
        ]
        if not all(right):
            return np.zeros(len(packed), bool)  # one by one: somebody answers nonsense
        rows = np.frombuffer(b"".join(packed), HEADER_DTYPE)
        root, namespace, shard, tokens, _ = asked.names(first.shard)
        keys = np.frombuffer(b"".join(item.piece.key for item in self.opened), _KEY)
        fidelity = np.minimum(rows["computed_on"], rows["stored"])
        checks = np.array([short_check(header) for header in packed], np.uint32)
        good: NDArray[np.bool_] = (
            (rows["magic"] == np.void(MAGIC)) & (rows["version"] == VERSION) & (rows["length"] == HEADER_BYTES)
            & (rows["key"] == keys) & (rows["root"] == np.void(root)) & (rows["namespace"] == np.void(namespace))
            & (rows["shard"] == np.void(shard)) & (rows["tokens"] == tokens) & (rows["raw"] == nbytes)
            & (fidelity >= int(asked.least)) & (np.maximum(rows["computed_on"], rows["stored"]) <= 3)
            & (rows["flags"] == 0) & (rows["chunks"] == 0) & (rows["stored_length"] == 0) & (rows["validity"] == 0)
            & (rows["check"] == checks)
        )  # fmt: skip
        for index, (copy_id, worth) in enumerate(zip(rows["copy_id"].tolist(), fidelity.tolist(), strict=True)):
            if good[index] and not self.opened[index].piece.begin(copy_id):
                self.refused[index] = True
            elif good[index]:
                self.opened[index].piece.fidelity = _FIDELITIES[worth]
        return good

    def _refuse(self, index: int) -> None:
        item = self.opened[index]
        try:
            header = bound(self.asked, item.piece, item.block.header)
            problem = "" if item.block.length == header.raw_length else "Corrupt"
        except DataError as error:
            problem = type(error).__name__
        if problem:
            item.piece.problem, self.refused[index] = problem, True
        elif not item.piece.begin(header.copy_id):
            self.refused[index] = True

    @property
    def layers(self) -> range:
        """Of the model."""
        base = layers_before(self.asked.spec, self.opened[0].piece.shard.group)
        return range(base + self.span.chunks[0].layer, base + self.span.chunks[-1].layer + 1)

    def copy(self, last_layer: int | None) -> None:
        """The chunks up to a layer of the model (None: all) that were not copied yet; then generations. Mutates."""
        span, first = self.span, self._done
        last = len(span.chunks)
        if last_layer is not None:
            base = layers_before(self.asked.spec, self.opened[0].piece.shard.group)
            last = next((at for at, chunk in enumerate(span.chunks) if base + chunk.layer > last_layer), last)
        if last == first:
            return
        begin, end = span.chunks[first].offset, span.chunks[last - 1].offset + span.chunks[last - 1].nbytes
        self._move(begin, begin - span.source + span.target, end - begin)
        for table, units, generations, indices in self._marks:
            for at in np.flatnonzero(table[units] != generations).tolist():
                self.refused[indices[at]] = True
                self.opened[indices[at]].piece.problem = "reused"
        self._done = last
        for index in np.flatnonzero(~self.refused).tolist():
            self.opened[index].piece.chunks = span.first_chunk + last

    def _move(self, source: int, target: int, nbytes: int) -> None:
        from kvstore.kernels.moves import move  # compiled, or read from its cache, at the first use

        targets, sources, lengths = [], [], []
        bases = self._sources.tolist()
        for index, item in enumerate(self.opened):
            if self.refused[index]:
                continue
            begin = bases[index] + source
            for start, length, address in item.piece.target.places(target, nbytes):
                targets.append(address)
                sources.append(begin + start - target)
                lengths.append(length)
        move(np.array(targets, np.uint64), np.array(sources, np.uint64), np.array(lengths, np.uint64))

    def conclude(self) -> None:
        """Set the tier of every block that arrived. Mutates."""
        for index, item in enumerate(self.opened):
            if not self.refused[index]:
                item.piece.problem, item.piece.tier = "", Tier(item.block.tier)


def ready() -> None:
    """Compile, or load, what the first get would wait for. Runs in a byte mover."""
    import kvstore.kernels.moves  # noqa: F401


def raws_of(asked: Asked, opened: Sequence[Opened]) -> tuple[list[Raws], list[Opened]]:
    """Raw blocks grouped by (stored shard, wanted shard), and all others. Pure."""
    groups: dict[tuple[Any, Any], list[Opened]] = {}
    rest: list[Opened] = []
    for item in opened:
        if item.block.raw:
            groups.setdefault((item.piece.shard, item.piece.wanted), []).append(item)
        else:
            rest.append(item)
    raws = []
    for (shard, wanted), mine in groups.items():
        span = span_of(asked.spec, shard, wanted)
        if span is None:
            rest += mine
        else:
            raws.append(Raws(asked, mine, span))
    return raws, rest
