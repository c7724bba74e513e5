"""Raw blocks of one Open, many at a time: headers checked as columns, bytes copied in one step, generations after it.

What a column check refuses is looked at again one by one (`kvstore.client.pieces.bound`), for the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvstore.client.host_link import Mapped
from kvstore.client.pieces import Asked, Piece, Span, bound, intact, layers_before, span_of
from kvstore.client.targets import address_of
from kvstore.errors import DataError
from kvstore.header import HEADER_BYTES, MAGIC, VERSION
from kvstore.header_columns import Columns
from kvstore.open_rows import OPEN_ROWS, ROW_BYTES, short_checks
from kvstore.spec import Shard
from kvstore.store.arena import UNIT_BYTES
from kvstore.types import Fidelity, Tier, pack_keys

_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}
_TIERS = {int(tier): tier for tier in Tier}


@dataclass(frozen=True, slots=True)
class Opened:
    """Open blocks: what the worker said of each, and where its segments are mapped here."""

    pieces: Sequence[Piece]
    rows: Columns  # (n,) OPEN_ROWS
    mapped: Mapping[int, Mapped]  # by segment: all that `rows` name

    def __len__(self) -> int:
        return len(self.pieces)

    def some(self, at: Sequence[int]) -> Opened:
        """These of them."""
        return Opened([self.pieces[index] for index in at], self.rows[list(at)], self.mapped)

    def mapping(self, index: int) -> Mapped:
        return self.mapped[int(self.rows["segment"][index])]

    def view(self, index: int) -> memoryview:
        """The bytes of one, where they lie."""
        offset = int(self.rows["offset"][index])
        return self.mapping(index).view[offset : offset + int(self.rows["length"][index])]

    def header(self, index: int) -> bytes:
        """Packed."""
        found: bytes = self.rows["header"][index].tobytes()
        return found


class Raws:
    """Raw blocks of one stored shard, wanted as one shard. Runs in a byte mover, but for `whole`."""

    def __init__(self, asked: Asked, opened: Opened, span: Span) -> None:
        self.asked, self.opened, self.span = asked, opened, span
        self._marks: list[tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.intp]]] = []
        self._sources = np.zeros(len(opened), np.uint64)
        self.refused = np.zeros(len(opened), bool)
        self._done = 0  # chunks of the span

    def prepare(self) -> None:
        """Check the headers, find the places. Sets `refused` and the problem of what is not good. Mutates."""
        opened, pieces, rows = self.opened, self.opened.pieces, self.opened.rows
        good = self._good_headers()
        for index in np.flatnonzero(~good).tolist():
            self._refuse(index)
        for index in np.flatnonzero(~self.refused).tolist() if self.asked.verify else ():
            if not intact(self.asked, opened.view(index), pieces[index].copy_id):
                pieces[index].problem, self.refused[index] = "Corrupt", True
        for segment in dict.fromkeys(rows["segment"].tolist()):
            mapped, mine = opened.mapped[segment], np.flatnonzero(rows["segment"] == segment)
            table = np.frombuffer(mapped.view, np.uint64, mapped.data_offset // 8)
            units = (rows["offset"][mine].astype(np.int64) - mapped.data_offset) // UNIT_BYTES
            self._marks.append((table, units, rows["generation"][mine], mine))
            self._sources[mine] = rows["offset"][mine] + np.uint64(address_of(mapped.view))

    def _good_headers(self) -> NDArray[np.bool_]:
        asked, pieces, rows = self.asked, self.opened.pieces, self.opened.rows
        headers, (wanted, fixed) = rows["header"], raw_row(*asked.names(pieces[0].shard))
        keys = np.frombuffer(pack_keys([piece.key for piece in pieces]), "<u8").reshape(-1, 2)
        fidelity = np.minimum(headers["computed_on"], headers["stored"])
        best = np.maximum(headers["computed_on"], headers["stored"])
        good: NDArray[np.bool_] = (
            ((rows.view("<u8").reshape(-1, ROW_BYTES // 8) ^ wanted) & fixed == 0).all(axis=1)
            & (headers["key"] == keys).all(axis=1) & (fidelity >= int(asked.least)) & (best <= max(_FIDELITIES))
            & (headers["check"] == short_checks(rows))
        )  # fmt: skip
        for index, (copy_id, worth) in enumerate(zip(headers["copy_id"].tolist(), fidelity.tolist(), strict=True)):
            if good[index] and not pieces[index].begin(copy_id):
                self.refused[index] = True
            elif good[index]:
                pieces[index].fidelity = _FIDELITIES[worth]
        return good

    def _refuse(self, index: int) -> None:
        piece = self.opened.pieces[index]
        try:
            header = bound(self.asked, piece, self.opened.header(index))
            problem = "" if self.opened.rows["length"][index] == header.raw_length else "Corrupt"
        except DataError as error:
            problem = type(error).__name__
        if problem:
            piece.problem, self.refused[index] = problem, True
        elif not piece.begin(header.copy_id):
            self.refused[index] = True

    @property
    def layers(self) -> range:
        """Of the model."""
        base = layers_before(self.asked.spec, self.opened.pieces[0].shard.group)
        return range(base + self.span.chunks[0].layer, base + self.span.chunks[-1].layer + 1)

    def copy(self, last_layer: int | None) -> None:
        """The chunks up to a layer of the model (None: all) that were not copied yet; then generations. Mutates."""
        span, first, pieces = self.span, self._done, self.opened.pieces
        last = len(span.chunks)
        if last_layer is not None:
            base = layers_before(self.asked.spec, pieces[0].shard.group)
            last = next((at for at, chunk in enumerate(span.chunks) if base + chunk.layer > last_layer), last)
        if last == first:
            return
        begin, end = span.chunks[first].offset, span.chunks[last - 1].offset + span.chunks[last - 1].nbytes
        self._move(begin, begin - span.source + span.target, end - begin)
        for table, units, generations, indices in self._marks:
            for index in indices[table[units] != generations].tolist():
                self.refused[index] = True
                pieces[index].problem = "reused"
        self._done = last
        for index in np.flatnonzero(~self.refused).tolist():
            pieces[index].chunks = span.first_chunk + last

    def _move(self, source: int, target: int, nbytes: int) -> None:
        from kvstore.kernels.moves import move  # compiled, or read from its cache, at the first use

        targets, sources, lengths = [], [], []
        bases, pieces, shift = self._sources.tolist(), self.opened.pieces, source - target
        for index in np.flatnonzero(~self.refused).tolist():
            begin = bases[index] + shift
            for start, length, address in pieces[index].target.places(target, nbytes):
                targets.append(address)
                sources.append(begin + start)
                lengths.append(length)
        move(np.array(targets, np.uint64), np.array(sources, np.uint64), np.array(lengths, np.uint64))

    def conclude(self) -> None:
        """Set the tier of every block that arrived. Mutates."""
        tiers = self.opened.rows["tier"].tolist()
        for index in np.flatnonzero(~self.refused).tolist():
            piece = self.opened.pieces[index]
            piece.problem, piece.tier = "", _TIERS[tiers[index]]


@lru_cache(maxsize=64)
def raw_row(
    root: bytes, namespace: bytes, shard: bytes, tokens: int, nbytes: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """What the row of any raw block of a shard says alike, and where, as words: OPEN_ROWS with other fields 0. Pure."""
    made, fixed = np.zeros(1, OPEN_ROWS), np.zeros(1, OPEN_ROWS)
    same = {
        "magic": int.from_bytes(MAGIC, "little"), "version": VERSION, "length": HEADER_BYTES, "flags": 0,
        "root": np.frombuffer(root, "<u8"), "namespace": np.frombuffer(namespace, "<u8"),
        "shard": np.frombuffer(shard, "<u8"), "tokens": tokens, "chunk_count": 0, "raw_length": nbytes,
        "stored_length": 0, "validity_length": 0,
    }  # fmt: skip
    for name, value in same.items():
        made["header"][name] = value
        fixed["header"][name] = np.iinfo(fixed["header"][name].dtype).max
    made["length"], fixed["length"] = nbytes, np.iinfo(np.uint64).max
    return made.view("<u8"), fixed.view("<u8")


def ready() -> None:
    """Compile, or load, what the first get would wait for. Runs in a byte mover."""
    import kvstore.kernels.landing
    import kvstore.kernels.moves  # noqa: F401


def raws_of(asked: Asked, opened: Opened) -> tuple[list[Raws], Opened]:
    """Raw blocks grouped by (stored shard, wanted shard), and all others. Pure."""
    groups: dict[tuple[Shard, Shard], list[int]] = {}
    rest: list[int] = []
    last: Piece | None = None
    for index, (piece, raw) in enumerate(zip(opened.pieces, opened.rows["raw"].tolist(), strict=True)):
        if not raw:
            rest.append(index)
            continue
        if last is None or piece.shard is not last.shard or piece.wanted is not last.wanted:
            last, mine = piece, groups.setdefault((piece.shard, piece.wanted), [])  # neighbours mostly share them
        mine.append(index)
    raws = []
    for (shard, wanted), mine in groups.items():
        span = span_of(asked.spec, shard, wanted)
        if span is None:
            rest += mine
        else:
            raws.append(Raws(asked, opened.some(mine) if len(mine) < len(opened) else opened, span))
    return raws, opened.some(rest)
