"""Made the core golden vectors once: `python -m tests.golden.make`. They are kept for ever, so it refuses to overwrite.

A new version of the format adds files with new names here; tests/test_golden.py reads the old ones with every build.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from kvstore import codecs
from kvstore.checksum import xxh3
from kvstore.format import Header, encode_record
from kvstore.keys import Chain, Extra, chain, engine_chain
from kvstore.layout import block_bytes, chunks
from kvstore.spec import Group, ModelSpec, Shard, namespace_digest
from kvstore.types import Fidelity

FOLDER = Path(__file__).parent

SPECS = {
    "plain": ModelSpec("org/llama", (Group(layers=2, kv_heads=2, k_dim=8, v_dim=8),)),
    "every_field": ModelSpec(
        "org/модель",
        (Group(layers=2, kv_heads=4, k_dim=8, v_dim=4),),
        revision="0f1e2d",
        dtype="float16",
        rope='{"theta":500000.0}',
        numerics="sdpa avx2",
        block_tokens=16,
        group_blocks=8,
    ),
    "two_groups": ModelSpec(
        "org/hybrid",
        (
            Group(layers=4, kv_heads=2, k_dim=8, v_dim=8),
            Group(kind="sliding", layers=4, kv_heads=2, k_dim=8, v_dim=8, window=128),
        ),
        dtype="float32",
    ),
    "latent_and_state": ModelSpec(
        "org/mla",
        (Group(kind="latent", layers=3, k_dim=576), Group(kind="state", layers=2, kv_heads=4, page_bytes=4096)),
    ),
    "opaque": ModelSpec(
        "org/paged",
        (Group(kind="opaque", layers=2, kv_heads=2, page_tokens=16, page_bytes=2048, page_dtype="bfloat16"),),
        layout="opaque:vllm-cpu",
        block_tokens=128,
    ),
    "engine": ModelSpec("org/llama", (Group(layers=2, kv_heads=2, k_dim=8, v_dim=8),), engine_hash="sha256_cbor"),
}
SHARDS = [Shard(0, 0, 2, 0, 2), Shard(0, 0, 2, 0, 1), Shard(0, 0, 2, 1, 1), Shard(1, 2, 2, 0, 2), Shard(0, 0, 32, 4, 4)]
TOKENS = [(7 * i * i + 13 * i) % 150_000 for i in range(150)]
EXTRAS = {
    "none": [],
    "lora": [Extra("lora", b"adapter-1")],
    "salt_and_mm": [Extra("salt", bytes(range(8))), Extra("mm", b"\x01" * 32, 5), Extra("mm", b"\x02" * 32, 70)],
    "embeds": [Extra("embeds", b"\xff" * 16, 64)],
}
HASHES = [bytes([i]) * 32 for i in range(3)]
RECORD_SPEC, RECORD_SHARD = SPECS["plain"], Shard(0, 0, 2, 0, 2)


def record_raw() -> bytes:
    """bfloat16 values: layer 0 repeats itself, layer 1 has few exponents over noise, then noise alone."""
    chunk = block_bytes(RECORD_SPEC, RECORD_SHARD) // 8
    noise = np.frombuffer(b"".join(sha256(bytes([i])).digest() for i in range(4 * chunk // 32)), np.uint8)
    values = np.empty(4 * chunk, np.uint16)
    values[: 2 * chunk] = 0x3F80 + np.arange(2 * chunk) % 4
    values[2 * chunk :] = 0x3E00 + 256 * (np.arange(2 * chunk) % 3) + noise[: 2 * chunk]
    values[3 * chunk :] = noise[2 * chunk :].view("<u2")
    return values.astype("<u2").tobytes()


def record_header() -> Header:
    made = chain(RECORD_SPEC, TOKENS)
    return Header.new(
        "default", RECORD_SPEC, RECORD_SHARD,
        key=made.keys[1], parent=made.parent(1), group=made.group(1), depth=1, computed_on=Fidelity.NEAR,
    )  # fmt: skip


def _keys(made: Chain) -> list[str]:
    return [key.hex() for key in made.keys]


def vectors() -> dict[str, Any]:
    """Everything but the records, as JSON values."""
    raw = record_raw()
    return {
        "specs": {
            n: {"json": s.canonical_json(), "root": s.root.hex()} for n, s in SPECS.items()
        },
        "shards": [
            {"shard": [s.group, s.layer_first, s.layer_count, s.head_first, s.head_count], "digest": s.digest.hex()}
            for s in SHARDS
        ],
        "namespaces": {name: namespace_digest(name).hex() for name in ("default", "team-é")},
        "tokens": TOKENS,
        "keys": {name: _keys(chain(SPECS["plain"], TOKENS, extras)) for name, extras in EXTRAS.items()},
        "keys_every_field": _keys(chain(SPECS["every_field"], TOKENS)),
        "engine_hashes": [h.hex() for h in HASHES],
        "engine_keys": _keys(engine_chain(SPECS["engine"], HASHES)),
        "header": record_header().pack().hex(),
        "raw_xxh3": f"{xxh3(raw):016x}",
        "chunks": {
            name: [
                [c.layer, c.component, c.head_first, c.head_count, c.offset, c.nbytes]
                for group in range(len(SPECS[name].groups))
                for c in chunks(SPECS[name], Shard.whole(SPECS[name], group))
            ]
            for name in ("plain", "every_field", "two_groups", "latent_and_state", "opaque")
        },
    }  # fmt: skip


def main() -> int:
    files = {
        "core.json": (json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n").encode(),
        "core_raw.bin": record_raw(),
    }
    for name, codec in (("raw", codecs.RAW), ("lz4", codecs.LZ4), ("split", codecs.SPLIT)):
        _, parts = encode_record(record_header(), record_raw(), RECORD_SPEC, RECORD_SHARD, codec)
        files[f"core_record_{name}.bin"] = b"".join(parts)
    there = [name for name in files if (FOLDER / name).exists()]
    if there:
        print(f"{', '.join(there)} exist and are kept for ever: give a new format new names", file=sys.stderr)
        return 2
    for name, content in files.items():
        (FOLDER / name).write_bytes(content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
