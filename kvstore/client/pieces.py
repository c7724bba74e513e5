"""What a read is made of: stored blocks, each with the memory its bytes go to, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from kvstore.checksum import xxh3
from kvstore.client.targets import Target
from kvstore.errors import Corrupt
from kvstore.format import Header, check_header, expect
from kvstore.layout import Chunk, block_bytes, chunks, cut
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.types import BlockId, Buffer, Fidelity, Tier, pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

LATER = "later"
"""The problem of a piece that the worker will serve when the others are released."""

OTHER_COPY = "other_copy"
"""The problem of a piece of which the caller has seen layers already, of a copy that this holder does not have."""


@dataclass(slots=True)
class Piece:
    """One stored block to read. `target` takes a raw block of `wanted`, cut from the stored one where they differ."""

    shard: Shard  # as stored
    wanted: Shard
    depth: int
    key: bytes
    target: Target
    tried: dict[str, None] = field(default_factory=dict)  # holders
    tier: Tier | None = None  # that served it; set when delivered
    problem: str = ""  # why the last attempt failed
    fidelity: Fidelity = Fidelity.EXACT  # of what came, and of what that was computed on
    copy_id: int = 0  # of the copy that the chunks here are of; 0: none came yet
    chunks: int = 0  # of the stored block: all that are wanted before this one are here
    scratch: memoryview | None = None  # a raw block of `shard`, where it can't go to `target` as it comes
    shown: bool = False  # the caller was told of layers of it: no other copy may take its place

    def fill(self, spec: ModelSpec, raw: memoryview) -> None:
        """Put a raw block of the stored shard where the caller wants it. Mutates the caller's memory."""
        span = span_of(spec, self.shard, self.wanted)
        if span is not None:
            self.target.fill(span.target, raw[span.source : span.source + span.nbytes])
        else:
            assert self.target.whole is not None, "heads are cut into one piece of memory (see fetch)"
            cut(spec, self.shard, self.wanted, raw, self.target.whole)

    def begin(self, copy_id: int) -> bool:
        """A holder has this copy: what came of another goes. False where the caller saw layers of that. Mutates."""
        if copy_id != self.copy_id:
            if self.shown:
                self.problem = OTHER_COPY
                return False
            self.copy_id, self.chunks, self.scratch = copy_id, 0, None
        return True


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes that a stored shard's raw block and a wanted one share, where those lie in one piece in both."""

    source: int  # offset in the stored raw block
    target: int  # in the wanted one
    nbytes: int
    chunks: tuple[Chunk, ...]  # of the stored block
    first_chunk: int  # index of the first of them


@lru_cache(maxsize=1024)
def span_of(spec: ModelSpec, stored: Shard, wanted: Shard) -> Span | None:
    """None where only heads cut out of each layer are shared. Pure."""
    shared = stored.overlap(wanted)
    heads = (stored.head_first, stored.head_count) == (wanted.head_first, wanted.head_count)
    if shared is None or not heads:
        return None
    mine = range(shared.layer_first, shared.layer_first + shared.layer_count)
    pieces = chunks(spec, stored)
    inside = tuple(piece for piece in pieces if piece.layer in mine)
    there = next(piece for piece in chunks(spec, wanted) if piece.layer == shared.layer_first)
    first = pieces.index(inside[0])
    nbytes = inside[-1].offset + inside[-1].nbytes - inside[0].offset
    return Span(inside[0].offset, there.offset, nbytes, inside, first)


@dataclass(frozen=True, slots=True)
class Asked:
    """What all pieces of one read share."""

    namespace: str
    spec: ModelSpec
    least: Fidelity
    redis: bool = True  # look into Redis for what the worker itself does not hold: it may just have moved there
    layers: range | None = None  # of the model; None: all
    planes: int = 0  # leading planes of nested chunks; 0: all there are
    layerwise: bool = False  # the caller waits for layers, in order
    verify: bool = False  # sum raw blocks in this host's memory, too
    _names: dict[Shard, tuple[bytes, bytes, bytes, int, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def by_block(self) -> bool:
        """Whether nobody looks at parts of a block before it is whole."""
        return self.layers is None and not self.layerwise

    def names(self, shard: Shard) -> tuple[bytes, bytes, bytes, int, int]:
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


def intact(asked: Asked, raw: memoryview, copy_id: int) -> bool:
    """Whether a raw block in this host's memory is what was put, where the caller wants to know. Pure."""
    return not asked.verify or xxh3(raw) == copy_id


def bound(asked: Asked, piece: Piece, packed: Buffer) -> Header:
    """The header of a block that is the one asked for and good enough. DataError otherwise."""
    header = Header.unpack(packed)
    names = (header.root, header.namespace, header.shard, header.tokens, header.raw_length)
    if header.key != piece.key or names != asked.names(piece.shard):  # these two say which of them it is
        expect(header, BlockId(asked.namespace, piece.shard.digest, piece.key), asked.spec.root)
        check_header(header, asked.spec, piece.shard)
        raise Corrupt("the block is not the one asked for")
    if header.fidelity < asked.least:
        raise Corrupt("the worker gave a block of less fidelity than asked for")
    piece.fidelity = header.fidelity
    return header


def layers_before(spec: ModelSpec, group: int) -> int:
    """Layers of the model that stand before a group's own. Pure."""
    return sum(before.layers for before in spec.groups[:group])
