"""Headers and places for tests of residency: chains of blocks whose keys tell chain and depth."""

from __future__ import annotations

from kvstore.header import Header
from kvstore.residency.residency import Level, Residency
from kvstore.spec import namespace_digest
from kvstore.types import Fidelity, Location, Tier

HOT, HOST, SSD = range(3)
LEVELS = (
    Level(Tier.HOT, 1 << 30, granule=4096, raw=True),
    Level(Tier.HOST, 1 << 30, granule=4096),
    Level(Tier.SSD, 1 << 30),
)
ROOT = b"r" * 16
FULL, SLIDING = b"full-shard-bytes", b"slidingshardbyte"


def key_of(chain: int, depth: int) -> bytes:
    return chain.to_bytes(8, "little") + depth.to_bytes(8, "little")


def header_of(chain: int, depth: int, shard: bytes = FULL, *, parent: bytes | None = None) -> Header:
    if parent is None:
        parent = key_of(chain, depth - 1) if depth else ROOT
    return Header(
        key=key_of(chain, depth),
        parent=parent,
        root=ROOT,
        group=key_of(chain, depth - depth % 32),
        depth=depth,
        namespace=namespace_digest("n"),
        shard=shard,
        copy_id=7,
        computed_on=Fidelity.EXACT,
        stored=Fidelity.EXACT,
        tokens=64,
        raw_length=10_000,
    )


def place(number: int, length: int = 5000) -> Location:
    return Location(1, number * 8192, length)


def put(residency: Residency, chain: int, depth: int, level: int = HOT, shard: bytes = FULL) -> int:
    where = place(len(residency))
    return residency.admit("n", header_of(chain, depth, shard), level, where, leaf_first=shard == FULL)
