"""Blocks for tests: a small model, chains of it, raw bytes that are a function of the block, and stored records."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from kvstore.catalog import Catalog
from kvstore.checksum import xxh3
from kvstore.format import Header, Record, decode_record, encode_record
from kvstore.keys import chain
from kvstore.layout import block_bytes
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import Fidelity

NAMESPACE = "default"


@lru_cache
def small_spec(model: str = "small", layers: int = 2, block_tokens: int = 16) -> ModelSpec:
    """A block of two layers has 8 KiB raw."""
    group = Group(layers=layers, kv_heads=2, k_dim=32, v_dim=32)
    return ModelSpec(model=model, groups=(group,), dtype="bfloat16", block_tokens=block_tokens)


def catalog_of(*specs: ModelSpec, namespaces: tuple[str, ...] = (NAMESPACE,)) -> Catalog:
    """A catalog that knows the specs, their whole shards and the namespaces."""
    catalog = Catalog()
    for spec in specs or (small_spec(),):
        catalog.learn_spec(spec)
        for group in range(len(spec.groups)):
            catalog.learn_shard(Shard.whole(spec, group))
    for namespace in namespaces:
        catalog.learn_namespace(namespace)
    return catalog


def keys_of(spec: ModelSpec, session: int, blocks: int) -> list[bytes]:
    """Keys of one prompt of `blocks` blocks; another `session` is another prompt."""
    return _keys(spec, session, max(64, 1 << (blocks - 1).bit_length()))[:blocks]


@lru_cache
def _keys(spec: ModelSpec, session: int, blocks: int) -> list[bytes]:
    tokens = np.arange(blocks * spec.block_tokens, dtype=np.uint32) + np.uint32(session * 1_000_003)
    return chain(spec, tokens).keys


@lru_cache(maxsize=256)
def raw_of(spec: ModelSpec, shard: Shard, key: bytes, salt: bytes = b"") -> bytes:
    """Raw bytes of a block, like KV in bfloat16: a function of its key, its shard and a salt."""
    rng = np.random.Generator(np.random.PCG64(xxh3(key + shard.digest + salt)))
    size = block_bytes(spec, shard)
    floats = rng.standard_normal(size // 2, dtype=np.float32)
    return (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes() + rng.bytes(size % 2)


@dataclass(frozen=True, slots=True)
class Sample:
    """One block, raw and as a stored record."""

    namespace: str
    spec: ModelSpec
    shard: Shard
    header: Header  # of the record
    raw: bytes
    record: bytes


def header_of(
    namespace: str,
    spec: ModelSpec,
    shard: Shard,
    session: int,
    depth: int,
    raw: bytes,
    *,
    fidelity: Fidelity = Fidelity.EXACT,
) -> Header:
    """The header of a raw block, as a put carries it."""
    keys = keys_of(spec, session, depth + 1)
    return Header.new(
        namespace,
        spec,
        shard,
        key=keys[depth],
        parent=keys[depth - 1] if depth else spec.root,
        group=keys[depth - depth % spec.group_blocks],
        depth=depth,
        computed_on=fidelity,
        copy_id=xxh3(raw),
    )


def sample(
    depth: int = 0,
    *,
    session: int = 0,
    namespace: str = NAMESPACE,
    spec: ModelSpec | None = None,
    shard: Shard | None = None,
    codec: int = 0,
    salt: bytes = b"",
    fidelity: Fidelity = Fidelity.EXACT,
) -> Sample:
    """Block `depth` of a prompt with its record. Another `salt` is another copy: other bytes under the same id."""
    spec = spec or small_spec()
    shard = shard or Shard.whole(spec)
    key = keys_of(spec, session, depth + 1)[depth]
    raw = raw_of(spec, shard, key, salt)
    header = header_of(namespace, spec, shard, session, depth, raw, fidelity=fidelity)
    stored, parts = encode_record(header, memoryview(raw), spec, shard, codec)
    return Sample(namespace, spec, shard, stored, raw, b"".join(bytes(part) for part in parts))


def decoded(found: Sample, record: bytes) -> bytes:
    """Raw bytes of a record read back, verified against the sample's spec."""
    target = bytearray(len(found.raw))
    decode_record(Record.parse(record), found.spec, found.shard, memoryview(target))
    return bytes(target)


def renamed(header: Header, key: bytes) -> Header:
    """The same header under another key, for binding tests."""
    return replace(header, key=key)
