"""Blocks for `bench tiers`: 2 MiB each, bytes that nobody can guess, and stores and records made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.catalog import Catalog
from kvstore.codecs import RAW
from kvstore.format import encode_record
from kvstore.header import Header
from kvstore.machine.memory import MemfdMemory, MemfdSegment
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.store.arena import PAGE_BYTES
from kvstore.tiers.aligned import padded

NAMESPACE = "bench"
BLOCK_BYTES = 2 << 20
COLD_BYTES = 256 << 20
"""What one round moves through DRAM: 8 times a last-level cache of 32 MiB."""

SPEC = ModelSpec(model="bench", groups=(Group(layers=8, kv_heads=8, k_dim=128, v_dim=128),), block_tokens=64)
SHARD = Shard.whole(SPEC)
assert SPEC.group_bytes(SPEC.groups[0]) == BLOCK_BYTES


def catalog() -> Catalog:
    made = Catalog()
    made.learn_namespace(NAMESPACE)
    made.learn_spec(SPEC)
    made.learn_shard(SHARD)
    return made


def header(number: int, length: int = 1 << 30) -> Header:
    """Block `number` of chains of `length` blocks; keys are as uniform as digests, and never equal."""

    def key(n: int) -> bytes:
        return (n * 0x9E3779B97F4A7C15F39CC0605CEDC835 + 1 & (1 << 128) - 1).to_bytes(16, "little")

    depth = number % length
    return Header.new(
        NAMESPACE,
        SPEC,
        SHARD,
        key=key(number),
        parent=key(number - 1) if depth else SPEC.root,
        group=key(number - depth % SPEC.group_blocks),
        depth=depth,
    )


class Buffers:
    """So many page-aligned buffers of one size, faulted in. `close` them when no view is left."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.size = padded(nbytes)
        self._segment: MemfdSegment = MemfdMemory().segment("kvstore-bench", count * self.size, sealed_writes=False)
        self.views = [self._segment.view[i * self.size : i * self.size + nbytes] for i in range(count)]

    def close(self) -> None:
        for view in self.views:
            view.release()
        self._segment.close()


def random_buffers(count: int, seed: int, nbytes: int = BLOCK_BYTES) -> Buffers:
    made, rng = Buffers(count, nbytes), np.random.Generator(np.random.PCG64(seed))
    for view in made.views:
        np.frombuffer(view, np.uint8)[:] = rng.integers(0, 256, nbytes, np.uint8)
    return made


@dataclass(frozen=True, slots=True)
class Records:
    """Stored records, codec raw, one to a page-aligned buffer as the host tier keeps them."""

    buffers: Buffers
    headers: Sequence[Header]

    @property
    def views(self) -> Sequence[memoryview]:
        return self.buffers.views

    @property
    def nbytes(self) -> int:
        """Of one record."""
        return len(self.buffers.views[0])

    def close(self) -> None:
        self.buffers.close()


def records(count: int, seed: int = 1) -> Records:
    rng, headers = np.random.Generator(np.random.PCG64(seed)), []
    raw = np.empty(BLOCK_BYTES, np.uint8)
    made: Buffers | None = None
    for number in range(count):
        raw[:] = rng.integers(0, 256, BLOCK_BYTES, np.uint8)
        stored, parts = encode_record(header(number, 64), raw.data, SPEC, SHARD, RAW)
        made = made or Buffers(count, stored.stored_length)
        into, at = np.frombuffer(made.views[number], np.uint8), 0
        for part in parts:
            piece = np.frombuffer(part, np.uint8)
            into[at : at + len(piece)] = piece
            at += len(piece)
        headers.append(stored)
    assert made is not None and made.size % PAGE_BYTES == 0
    return Records(made, headers)


def differing(left: Sequence[memoryview], right: Sequence[memoryview]) -> int:
    """How many of the pairs differ."""
    return sum(
        not np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
        for a, b in zip(left, right, strict=True)
    )
