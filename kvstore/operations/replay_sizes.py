"""How large the tiers of a replay's fresh service are: as asked, or so that LRU serves a quarter of the hits each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvstore.config import KIB, StoreConfig
from kvstore.errors import UsageError
from kvstore.header import ENTRY_BYTES, HEADER_BYTES
from kvstore.layout import block_bytes, chunks
from kvstore.operations.reuse import distances, sizes
from kvstore.operations.trace import Footprint, Request
from kvstore.spec import ModelSpec, Shard
from kvstore.values import parse_size

PAGE_BYTES = 4096
LOSSLESS_SHARE = 0.77  # of the raw bytes of `kvstore.operations.payload`, with the codec's own tables
REDIS_SPARE = 1.3
SSD_SEGMENTS = 16
LEAST_BYTES = (256 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB)  # of one worker


class TierSizes(NamedTuple):
    """Of hot, host, ssd and redis: as text, None for a choice of ours."""

    hot: str | None = None
    host: str | None = None
    ssd: str | None = None
    redis: str | None = None


def choose_sizes(
    requests: Iterable[Request],
    asked: Footprint,
    spec: ModelSpec,
    store: StoreConfig,
    given: TierSizes,
    in_flight: float = 0.0,
) -> tuple[int, int, int, int]:
    """Bytes of hot, host, ssd and redis over all workers. UsageError for a size that is none.

    `in_flight`: blocks that are put at a time; hot must hold them.
    From the reuse distances of these very requests: no fixed shares of a footprint fit two traces.
    """
    shard = Shard.whole(spec)
    raw = block_bytes(spec, shard)
    share = 1.0 if store.codec == "raw" else LOSSLESS_SHARE
    record = _pages(int(raw * share) + HEADER_BYTES + ENTRY_BYTES * 2 * len(chunks(spec, shard)))
    fill = (store.high_watermark + store.low_watermark) / 2  # a tier is about that full
    least = asked.distinct / 100
    hot, host, ssd = sizes(distances(requests, asked.accesses), (max(least, in_flight), least, least))
    chosen = [
        hot * _pages(raw) / fill,
        host * record / fill,
        ssd * record / fill,
        asked.distinct * record * REDIS_SPARE,
    ]
    total = asked.distinct * raw
    return tuple(_given(text, total) or int(own) for text, own in zip(given, chosen, strict=True))  # type: ignore[return-value]


def store_settings(chosen: tuple[int, int, int, int], workers: int, store: StoreConfig) -> dict[str, object]:
    """The `store` section of each of so many workers."""
    hot, host, ssd = (max(least, n // workers) for n, least in zip(chosen[:3], LEAST_BYTES[:3], strict=True))
    return {
        "hot_bytes": hot,
        "host_bytes": hot + host,
        "ssd_bytes": ssd * (SSD_SEGMENTS + 4) // SSD_SEGMENTS,  # of which the log takes records
        "ssd_segment_bytes": min(store.ssd_segment_bytes, max(PAGE_BYTES * 16, ssd // SSD_SEGMENTS)),
        "redis_bytes": max(LEAST_BYTES[3], chosen[3]),
    }


def _given(text: str | None, total: int) -> int:
    """Bytes of "64MiB" or of "10%" of `total`; 0 for None."""
    if text is None:
        return 0
    try:
        nbytes = int(total * float(text[:-1]) / 100) if text.endswith("%") else parse_size(text)
    except ValueError:
        raise UsageError(f"{text!r} is no size: write bytes, a size such as 64MiB, or a share such as 10%") from None
    if nbytes <= 0:
        raise UsageError(f"{text!r} is no size for a tier: it must be greater than 0")
    return nbytes


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
