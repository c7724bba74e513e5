"""The fixed header of a stored block: 160 bytes, the same on every tier and on the wire. docs/FORMAT.md."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from kvstore.checksum import xxh3
from kvstore.errors import BadRequest, Corrupt, UnknownFormat
from kvstore.layout import block_bytes
from kvstore.spec import MAX_BLOCK_BYTES, ModelSpec, Shard, namespace_digest
from kvstore.types import KEY_BYTES, BlockId, Buffer, Fidelity

MAGIC = b"KVB1"
VERSION = 1
HEADER_BYTES = 160
ENTRY_BYTES = 40
MAX_CHUNKS = 1 << 20

_STRUCT = struct.Struct("<4sHHI16s16s16s16sI16s16sQBBHIQQIIQ")
_CHECKED = 148  # bytes that the short check at 148 covers; the checksum at 152 covers it, the table and the bitmap
_LENGTH = struct.Struct("<I")
_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}
assert _STRUCT.size == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """What a copy of a block is. With `chunk_count` 0 it describes raw bytes in memory that no record holds yet."""

    key: bytes
    parent: bytes
    root: bytes
    group: bytes  # placement group: key of its first block
    depth: int
    namespace: bytes  # digest
    shard: bytes  # digest
    copy_id: int  # XXH3-64 of the raw bytes; 0: not computed yet
    computed_on: Fidelity
    stored: Fidelity
    tokens: int
    raw_length: int
    chunk_count: int = 0
    stored_length: int = 0  # of the whole record: header, table, bitmap, data
    validity_length: int = 0  # bytes of the token validity bitmap; always 0 in version 1
    checksum: int = 0  # XXH3-64 over header[:152], table and bitmap

    @classmethod
    def new(
        cls,
        namespace: str,
        spec: ModelSpec,
        shard: Shard,
        key: bytes,
        parent: bytes,
        group: bytes,
        depth: int,
        computed_on: Fidelity = Fidelity.EXACT,
        copy_id: int = 0,
    ) -> Header:
        """Of raw bytes about to be put. BadRequest where a part does not fit."""
        _check_place(key, parent, group, depth, spec.root)
        return cls(
            key=key,
            parent=parent,
            root=spec.root,
            group=group,
            depth=depth,
            namespace=namespace_digest(namespace),
            shard=shard.digest,
            copy_id=copy_id,
            computed_on=computed_on,
            stored=Fidelity.EXACT,
            tokens=spec.block_tokens,
            raw_length=block_bytes(spec, shard),
        )

    def beside(
        self, key: bytes, parent: bytes, group: bytes, depth: int, computed_on: Fidelity, copy_id: int
    ) -> Header:
        """`new` of another block of the same namespace, spec and shard. BadRequest."""
        _check_place(key, parent, group, depth, self.root)
        return Header(
            key, parent, self.root, group, depth, self.namespace, self.shard, copy_id, computed_on, Fidelity.EXACT,
            self.tokens, self.raw_length,
        )  # fmt: skip

    @property
    def fidelity(self) -> Fidelity:
        """The lesser of what it was computed on and how it is stored."""
        return min(self.computed_on, self.stored)

    def id(self, namespace: str) -> BlockId:
        """The object this is a copy of; `namespace` is the name behind the digest."""
        return BlockId(namespace, self.shard, self.key)

    @property
    def data_start(self) -> int:
        """Offset of the first stored byte of data in the record."""
        return HEADER_BYTES + self.chunk_count * ENTRY_BYTES + self.validity_length

    def pack(self) -> bytes:
        """160 bytes, short check included."""
        packed = bytearray(
            _STRUCT.pack(
                MAGIC,
                VERSION,
                HEADER_BYTES,
                0,
                self.key,
                self.parent,
                self.root,
                self.group,
                self.depth,
                self.namespace,
                self.shard,
                self.copy_id,
                self.computed_on,
                self.stored,
                self.tokens,
                self.chunk_count,
                self.raw_length,
                self.stored_length,
                self.validity_length,
                0,
                self.checksum,
            )
        )
        _LENGTH.pack_into(packed, _CHECKED, short_check(packed))
        return bytes(packed)

    @classmethod
    def unpack(cls, data: Buffer, *, checked: bool = False) -> Header:
        """The header in the first 160 bytes. UnknownFormat for another version, Corrupt where it does not hold.

        Only a `Record` has what the long checksum covers; here the short check stands for it, or, where the bytes are
        `checked` already, whatever the caller has checked.
        """
        view = data if checked and len(data) == HEADER_BYTES else memoryview(data)[:HEADER_BYTES]
        if len(view) < HEADER_BYTES or view[:4] != MAGIC:
            raise Corrupt(f"no block header: {len(view)} bytes that begin with {bytes(view[:4])!r}")
        (_, version, length, flags, key, parent, root, group, depth, namespace, shard, copy_id, computed_on, stored,
         tokens, chunk_count, raw_length, stored_length, validity, check, checksum) = _STRUCT.unpack(view)  # fmt: skip
        if version != VERSION or length != HEADER_BYTES:
            raise UnknownFormat(f"block header of version {version} with {length} bytes: this build reads {VERSION}")
        if not checked and check != short_check(view):
            raise Corrupt("block header fails its check")
        if flags or validity:
            raise UnknownFormat(
                f"block header with flags {flags:#x} and a bitmap of {validity} bytes: unknown to this build"
            )
        fidelity, stored_as = _FIDELITIES.get(computed_on), _FIDELITIES.get(stored)
        if fidelity is None or stored_as is None:
            raise UnknownFormat(f"block header with fidelities {computed_on}, {stored}: unknown to this build")
        header = cls(
            key, parent, root, group, depth, namespace, shard, copy_id, fidelity, stored_as, tokens, raw_length,
            chunk_count, stored_length, validity, checksum,
        )  # fmt: skip
        header._check_lengths()
        return header

    def _check_lengths(self) -> None:
        if not 0 < self.raw_length <= MAX_BLOCK_BYTES or self.chunk_count > MAX_CHUNKS:
            raise Corrupt(f"block header claims {self.raw_length} raw bytes in {self.chunk_count} chunks")
        if self.chunk_count == 0:
            if self.stored_length:
                raise Corrupt(f"block header claims {self.stored_length} stored bytes without a chunk")
        elif not self.data_start < self.stored_length <= self.data_start + self.raw_length:
            raise Corrupt(f"block header claims {self.stored_length} stored bytes for {self.raw_length} raw ones")

    def unencoded(self) -> Header:
        """The same copy as raw bytes in memory."""
        if not (self.chunk_count or self.stored_length or self.checksum or self.validity_length):
            return self
        return replace(self, chunk_count=0, stored_length=0, checksum=0, validity_length=0)


def _check_place(key: bytes, parent: bytes, group: bytes, depth: int, root: bytes) -> None:
    """BadRequest for what can't be a block's place in a chain."""
    if len(key) == len(parent) == len(group) == KEY_BYTES and 0 < depth < 1 << 32:
        return
    for name, digest in (("key", key), ("parent", parent), ("group", group)):
        if len(digest) != KEY_BYTES:
            raise BadRequest(f"{name} has {len(digest)} bytes: give {KEY_BYTES}")
    if not 0 <= depth < 1 << 32:
        raise BadRequest(f"depth is {depth}: give a block's index in its chain")
    if depth == 0 and parent != root:
        raise BadRequest("the first block's parent is not the root of its spec")


def short_check(packed: Buffer) -> int:
    """The u32 at 148: low half of XXH3-64 over the bytes before it, so that 160 bytes alone can be trusted."""
    return xxh3(memoryview(packed)[:_CHECKED]) & 0xFFFFFFFF


def long_checksum(packed: Buffer, table: Buffer) -> int:
    """The u64 at 152: XXH3-64 over header[:152] and what stands between header and data."""
    return xxh3(b"".join((memoryview(packed)[: HEADER_BYTES - 8], table)))


def check_header(header: Header, spec: ModelSpec, shard: Shard) -> None:
    """Corrupt unless the header's root, shard, tokens and raw length are those of a spec and shard. Pure."""
    if header.root != spec.root or header.shard != shard.digest:
        raise Corrupt("the block is of another model or shard than the one asked for")
    if header.tokens != spec.block_tokens or header.raw_length != block_bytes(spec, shard):
        raise Corrupt(
            f"the block claims {header.tokens} tokens in {header.raw_length} bytes, which its spec does not have"
        )


def expect(found: Header, wanted: Header | BlockId, root: bytes | None = None) -> None:
    """The binding: Corrupt unless `found` is the object asked for, and the same copy where `wanted` names one. Pure."""
    names: list[tuple[str, object, object]]
    if isinstance(wanted, BlockId):
        names = [("key", found.key, wanted.key), ("shard", found.shard, wanted.shard)]
        names.append(("namespace", found.namespace, namespace_digest(wanted.namespace)))
    else:
        names = [(n, getattr(found, n), getattr(wanted, n)) for n in ("key", "shard", "namespace", "root", "parent")]
        if wanted.copy_id:
            names.append(("copy_id", found.copy_id, wanted.copy_id))
    if root is not None:
        names.append(("root", found.root, root))
    for name, is_, should in names:
        if is_ != should:
            raise Corrupt(f"the stored block has another {name} than the one asked for")
