"""Blocks with real-looking bytes, for tests of the stored form."""

from __future__ import annotations

import numpy as np

from kvstore.header import Header
from kvstore.keys import chain
from kvstore.layout import block_bytes
from kvstore.spec import Group, ModelSpec, Shard

NAMESPACE = "default"
SPEC = ModelSpec("org/model", (Group(layers=3, kv_heads=4, k_dim=16, v_dim=8),), block_tokens=16)
HYBRID = ModelSpec(
    "org/hybrid",
    (
        Group(layers=2, kv_heads=2, k_dim=8, v_dim=8),
        Group(kind="sliding", layers=2, kv_heads=2, k_dim=8, v_dim=8, window=32),
        Group(kind="latent", layers=2, k_dim=24),
        Group(kind="state", layers=2, kv_heads=2, page_bytes=320, page_dtype="float32"),
    ),
    dtype="float32",
    block_tokens=16,
)
PAGED = ModelSpec(
    "org/paged",
    (Group(kind="opaque", layers=2, page_tokens=8, page_bytes=1024, page_dtype="bfloat16"),),
    layout="opaque:vllm",
    block_tokens=16,
)
SHARDS = [
    (SPEC, Shard.whole(SPEC)),
    (SPEC, Shard(0, 1, 2, 1, 2)),
    *((HYBRID, Shard.whole(HYBRID, group)) for group in range(4)),
    (PAGED, Shard.whole(PAGED)),
]


def payload(spec: ModelSpec, shard: Shard, seed: int = 0) -> bytes:
    """Raw bytes of one block: normal values as bfloat16, so that codecs find something to do."""
    values = np.random.default_rng(seed).normal(0, 0.3, block_bytes(spec, shard) // 2 + 1).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()[: block_bytes(spec, shard)]


def header_of(spec: ModelSpec, shard: Shard, depth: int = 1, namespace: str = NAMESPACE) -> Header:
    """Of block `depth` of the prompt 0, 1, 2, ..."""
    made = chain(spec, range((depth + 1) * spec.block_tokens))
    return Header.new(
        namespace,
        spec,
        shard,
        key=made.keys[depth],
        parent=made.parent(depth),
        group=made.group(depth),
        depth=depth,
    )
