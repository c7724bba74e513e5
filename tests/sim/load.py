"""What the simulated engines work on: models, prompts that mostly begin alike, blocks that tell who made them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from kvstore.keys import Chain, chain
from kvstore.layout import block_bytes, cut
from kvstore.spec import Group, ModelSpec, Shard

BLOCK = 4  # tokens
DOCUMENTS, BRANCHES = 3, 4
DOCUMENT_BLOCKS, OWN_BLOCKS_MAX = 6, 8
BASE_BYTES = 4096  # of random numbers that a block's bytes are made from

PLAIN = ModelSpec(
    model="sim/plain", dtype="float16", block_tokens=BLOCK, group_blocks=4,
    groups=(Group(layers=2, kv_heads=2, k_dim=16, v_dim=16),),
)  # fmt: skip
MIXED = ModelSpec(
    model="sim/mixed", dtype="float16", block_tokens=BLOCK, group_blocks=4,
    groups=(
        Group(layers=1, kv_heads=2, k_dim=16, v_dim=16),
        Group(kind="sliding", layers=2, kv_heads=2, k_dim=16, v_dim=16, window=2 * BLOCK),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Need:
    """A model, and the rectangles one kind of client needs of it."""

    spec: ModelSpec
    shards: tuple[Shard, ...]


WHOLE = Need(PLAIN, (Shard.whole(PLAIN),))
HALVES = Need(PLAIN, (Shard(0, 0, 2, 0, 1), Shard(0, 0, 2, 1, 1)))  # two ranks: what one of them stores serves both
WINDOW = Need(MIXED, (Shard.whole(MIXED, 0), Shard.whole(MIXED, 1)))


def draw(rng: Random) -> tuple[Need, Chain]:
    """A prompt of a few shared documents and chats."""
    need = rng.choice([WHOLE, WHOLE, HALVES, WINDOW])
    document, branch = rng.randrange(DOCUMENTS), rng.randrange(BRANCHES)
    own = rng.randrange(1, OWN_BLOCKS_MAX)
    return need, _prompt(need.spec, document, branch, own)


def alone(need: Need, number: int) -> Chain:
    """A prompt that nobody else has."""
    return chain(need.spec, [900_000 + 100 * number + token for token in range(BLOCK * 4)])


@lru_cache(maxsize=4096)
def _prompt(spec: ModelSpec, document: int, branch: int, own: int) -> Chain:
    shared = [document * 1000 + t for t in range(BLOCK * DOCUMENT_BLOCKS)]
    return chain(spec, shared + [document * 1000 + 500 + branch * 50 + t for t in range(BLOCK * own)])


_BASE = (
    np.random.Generator(np.random.PCG64(7)).standard_normal(BASE_BYTES // 2, np.float32).astype(np.float16).tobytes()
)


@lru_cache(maxsize=8192)
def payload(spec: ModelSpec, shard: Shard, namespace: str, key: bytes, engine: int) -> bytes:
    """The raw block that engine number `engine` computes: two engines' differ in every chunk, and so do two blocks'.

    A rectangle's block is cut from the one of the whole group, as it is in a real model.
    """
    whole = Shard.whole(spec, shard.group)
    if shard != whole:
        target = memoryview(bytearray(block_bytes(spec, shard)))
        cut(spec, whole, shard, payload(spec, whole, namespace, key, engine), target)
        return bytes(target)
    name = hashlib.sha256(b"%s/%d/%d/%s" % (key, shard.group, engine, namespace.encode())).digest()
    size, at = block_bytes(spec, whole), name[0]
    raw = np.frombuffer((_BASE * (2 + size // BASE_BYTES))[2 * at : 2 * at + size], np.uint16).copy()
    raw ^= np.resize(np.frombuffer(name, np.uint16) & 0x03FF, raw.size)  # the low bits, as rounding would
    return raw.tobytes()
