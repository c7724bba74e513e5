"""Whether a worker's tiers are large enough to help, by what it reports, and what to set. Pure."""

from __future__ import annotations

from kvstore.types import Tier
from kvstore.wire import common_pb2

PROMPT_BLOCKS = 64
"""Blocks of a prompt in flight: what `hot` must hold at least."""

FULL_SHARE = 0.75
"""Of a tier's capacity, from which it counts as full (spilling stops at `store.low_watermark`)."""

ASKED_MIN = 1_000
"""Blocks asked for, before what is missed says anything."""

MISSED_SHARE = 0.2
"""Of the blocks asked for: more than this missed, of those that were given up, and the working set does not fit."""

SSD_TIMES_MEMORY = 4


def size_problems(status: common_pb2.WorkerStatus) -> list[tuple[str, str]]:
    """(what is too small, what to set) for each tier that helps less than it could."""
    tiers = {Tier(tier.tier): tier for tier in status.tiers if tier.capacity and tier.state != "off"}
    hot, host, ssd = (tiers.get(tier) for tier in (Tier.HOT, Tier.HOST, Tier.SSD))
    found = []
    if hot is not None and host is not None and host.capacity < hot.capacity:
        found.append((
            f"host ({_size(host.capacity)}) is smaller than hot ({_size(hot.capacity)}): what leaves hot has no place",
            f"store.host_bytes = {_quoted(4 * hot.capacity)}, of which hot is a part, or a smaller store.hot_bytes",
        ))  # fmt: skip
    block = max((tier.raw_bytes // tier.blocks for tier in tiers.values() if tier.blocks), default=0)
    window = PROMPT_BLOCKS * block
    if hot is not None and hot.capacity < window:
        found.append((
            f"hot ({_size(hot.capacity)}) holds less than a prompt of {PROMPT_BLOCKS} blocks ({_size(window)})",
            f"store.hot_bytes = {_quoted(2 * window)} and store.host_bytes = {_quoted(8 * window)} or more",
        ))  # fmt: skip
    memory = sum(tier.capacity for tier in (hot, host) if tier is not None)
    if ssd is not None and ssd.capacity <= memory:
        found.append((
            f"ssd ({_size(ssd.capacity)}) is no larger than memory ({_size(memory)}): it repeats what lies there",
            f"store.ssd_bytes = {_quoted(SSD_TIMES_MEMORY * memory)} or more, or no SSD tier",
        ))  # fmt: skip
    return found + _working_set(status, ssd or host)


def _working_set(status: common_pb2.WorkerStatus, last: common_pb2.TierStatus | None) -> list[tuple[str, str]]:
    """Whether blocks are given up and then asked for. `last`: the tier they leave from."""
    misses, evicted = status.counters["misses"], status.counters["evicted"]
    asked = misses + sum(tier.hits for tier in status.tiers)
    missed = min(misses, evicted)  # more than were given up cannot have been missed for that
    if last is None or not last.blocks or asked < ASKED_MIN or missed < MISSED_SHARE * asked:
        return []
    if last.used < FULL_SHARE * last.capacity:
        return []
    tier = Tier(last.tier)
    name, key = tier.name.lower(), "store.ssd_bytes" if tier == Tier.SSD else "store.host_bytes"
    wanted = last.capacity + missed * (last.used // last.blocks)
    return [(
        f"{name} is full, {evicted} blocks were given up and {misses} of {asked} asked for were not there: "
        "the working set does not fit",
        f"{key} = {_quoted(wanted)} would have kept them, or another worker",
    )]  # fmt: skip


def _size(nbytes: float) -> str:
    return _quoted(nbytes).strip('"')


def _quoted(nbytes: float) -> str:
    """As a setting is written, rounded up."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= 4 * size:
            return f'"{-(-int(nbytes) // size)}{unit}"'
    return f'"{int(nbytes)}B"'
