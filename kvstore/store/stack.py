"""The tiers of one worker with the residency over them: what must change together changes here, synchronously.

A flip is: residency, the tier's space, the announcement. Bytes are moved by others (`kvstore.store.movement`,
`kvstore.store.loading`) before (`add`) or never again read after (`drop`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kvstore.catalog import Catalog
from kvstore.codec_rules import CodecRules
from kvstore.codecs import NESTED
from kvstore.config import StoreConfig
from kvstore.directory.matching import rule_of
from kvstore.directory.runs import Added, Removed
from kvstore.header import Header
from kvstore.header_columns import kinds
from kvstore.histogram import Histogram
from kvstore.policies.advice import Advice
from kvstore.policies.base import make_policies, prepared
from kvstore.quotas import Quotas
from kvstore.residency.admitting import Coming, admit_all
from kvstore.residency.bulk import take_in
from kvstore.residency.handover import hand_over
from kvstore.residency.residency import Level, Residency
from kvstore.residency.shrinking import shrink
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.store.arena import PAGE_BYTES, Arena, Slot
from kvstore.store.changes import Changes
from kvstore.store.codec_use import CodecUse
from kvstore.store.planes import Planes
from kvstore.store.purges import Purges
from kvstore.store.quota_gate import QuotaGate
from kvstore.store.shared import SharedTier
from kvstore.tiers.base import Location, Recovered, TierStats, TierStore
from kvstore.tiers.found import RecoveredRecords
from kvstore.tiers.host import ArenaTier, HostTier
from kvstore.tiers.hot import ALIGNMENT, DevicePool, HotTier
from kvstore.types import Fidelity, Tier

FREE_GROUPS = ("sliding", "state")
"""Kinds of group whose old blocks go before the later ones: nobody needs them to reach those."""


REDIS_EXTRA_BYTES = 1024
"""More than what Redis counts for a block beside its record."""


class Stack:
    """Levels, fastest first: hot (cpu pool), one hot pool per device, host, ssd. Redis stands beside them."""

    def __init__(
        self,
        system: System,
        config: StoreConfig,
        catalog: Catalog,
        changes: Changes,
        *,
        ssd: TierStore | None,
        redis: SharedTier | None,
        quotas: Mapping[str, Quotas] | None = None,
        codecs: Mapping[str, CodecRules] | None = None,
    ) -> None:
        self.system = system
        self.config = config
        self.catalog = catalog
        self.changes = changes
        self.redis = redis
        self.counters: Counter[str] = Counter()
        self.hits: Counter[Tier] = Counter()
        self.loads: defaultdict[Tier, Histogram] = defaultdict(Histogram)
        self.saved_tokens = 0.0
        self.corrupt: Counter[Tier] = Counter()
        hot_bytes = config.hot_bytes or config.host_bytes // 4
        self.arena = Arena(system.memory, config.host_bytes, config.segment_bytes)
        self.hot = HotTier(self.arena, system.pool, hot_bytes)
        self.host = HostTier(self.arena, system.pool, config.host_bytes - hot_bytes, system.inline_bytes)
        pools = [DevicePool(device, system.pool, config.device_bytes) for device in config.devices]
        self.tiers: tuple[TierStore, ...] = (self.hot, *pools, self.host, *([ssd] if ssd is not None else ()))
        self.HOT, self.HOST = 0, 1 + len(pools)
        self.SSD = self.HOST + 1 if ssd is not None else None
        self.REDIS = len(self.tiers)  # a destination, never a level of residency
        levels = [Level(Tier.HOT, self.hot.capacity, PAGE_BYTES, raw=True)]
        levels += [Level(Tier.HOT, pool.capacity, ALIGNMENT, raw=True) for pool in pools]
        levels += [Level(Tier.HOST, self.host.capacity, PAGE_BYTES)]
        if ssd is not None:
            levels.append(Level(Tier.SSD, ssd.capacity, PAGE_BYTES))
        self.policy = config.policy if prepared(config.policy) else "lru"  # until `take_policy`
        policies = iter(make_policies(self.policy, len(levels), config.ghost_bytes))
        self.residency = Residency(levels, policies.__next__, self._window)
        self.advice = Advice(self.residency, caller_time=config.caller_time)
        self.codec_use = CodecUse()
        self._codec_rules = dict(codecs or {})
        self.planes = Planes(self.residency, config, self._codec_rules, self.nested)
        self._codecs: dict[tuple[str, bytes, bytes], tuple[int, ...]] = {}
        self.quota = QuotaGate(self.residency, system.clock, quotas or {})
        self.purges = Purges(system.clock, config.purge_fence_s)

    def take_policy(self) -> None:
        """Decide by the configured policy, which is prepared now. Mutates."""
        self.policy = self.config.policy
        policies = make_policies(self.policy, len(self.tiers), self.config.ghost_bytes)
        hand_over(self.residency, policies, self.advice.now(self.system.clock.monotonic()))

    # ---- questions

    def arena_tier(self, level: int) -> ArenaTier | None:
        """The tier of a level whose blocks lie in the arena, where readers map them."""
        tier = self.tiers[level]
        return tier if isinstance(tier, ArenaTier) else None

    def mapped(self, row: int, least: Fidelity = Fidelity.COMPACT) -> int | None:
        """The fastest level of a block that readers can map, of those whose copy is worth at least so much."""
        rows = self.residency.rows
        present = rows.present[row]
        for level in (self.HOT, self.HOST):
            if present >> level & 1 and rows.planes[level][row].bit_length() >= least:
                return level
        return None

    def stored_at(self, place: Location) -> Fidelity:
        """What the record says of itself that lies in the host tier, verified."""
        return Header.unpack(self.host.view(place)).stored

    def slot(self, row: int, level: int) -> Slot | None:
        """Where a copy lies in the arena; None where it does not."""
        tier = self.arena_tier(level)
        return None if tier is None else tier.slot(self.residency.location(row, level))

    def length(self, row: int, level: int) -> int:
        return self.residency.location(row, level).length

    def model(self, header: Header) -> tuple[ModelSpec, Shard] | None:
        """What the header's digests stand for; None where the catalog does not know them."""
        spec, shard = self.catalog.spec(header.root), self.catalog.shard(header.shard)
        return None if spec is None or shard is None else (spec, shard)

    def codec_rules(self, namespace: str) -> CodecRules:
        return self._codec_rules.get(namespace, CodecRules())

    def codecs(self, namespace: str, spec: ModelSpec, shard: Shard) -> tuple[int, ...]:
        """The codec of every chunk of a shard on leaving hot."""
        name = (namespace, spec.root, shard.digest)
        found = self._codecs.get(name)
        if found is None:
            found = self._codecs[name] = self.codec_rules(namespace).codecs(spec, shard, self.config.codec)
        return found

    def nested(self, namespace: str, header: Header) -> bool:
        """Whether a namespace's blocks of this shard may have planes."""
        model = self.model(header)
        return model is not None and NESTED in self.codecs(namespace, *model)

    def tier_of(self, destination: int) -> Tier:
        return Tier.REDIS if destination == self.REDIS else self.residency.levels[destination].tier

    def worth_in(self, destination: int, namespace: str, header: Header) -> Fidelity:
        """What a block would be worth in a tier after a move there."""
        model, rules = self.model(header), self.codec_rules(namespace)
        if model is None or (destination < self.REDIS and self.residency.levels[destination].raw):
            return header.fidelity
        return min(header.fidelity, rules.fidelity_in(self.tier_of(destination), self.codecs(namespace, *model)))

    def announced(self, row: int) -> Added:
        """What others are told of a block: its best fidelity, and the fastest tier that has it so."""
        header, level = self.residency.header(row), self.residency.rows.best(row)
        return Added(
            header.root,
            header.shard,
            header.key,
            header.parent,
            header.group,
            header.depth,
            self.residency.levels[level].tier,
            header.fidelity,
            self.length(row, level),
        )

    def stats(self) -> list[TierStats]:
        """One entry per tier, device pools together with the cpu pool; a tier that is not configured is `off`."""
        found: dict[Tier, TierStats] = {}
        for level, tier in enumerate(self.tiers):
            stats = replace(tier.stats())
            stats.blocks, stats.raw_bytes = self.residency.blocks[level], self.residency.raw_bytes[level]
            stats.hits = 0
            above = found.get(stats.tier)
            if above is not None:
                for name in ("used", "capacity", "blocks", "raw_bytes", "writes", "errors"):
                    setattr(stats, name, getattr(stats, name) + getattr(above, name))
            found[stats.tier] = stats
        if self.redis is not None:
            found[Tier.REDIS] = replace(self.redis.stats())
        for kind in Tier:
            stats = found.setdefault(kind, TierStats(kind, state="off"))
            stats.hits = self.hits[kind]
            stats.errors += self.corrupt[kind]
        return [found[kind] for kind in Tier]

    def takes(self, destination: int, namespace: str, nbytes: int) -> bool:
        """Whether a block of so many bytes is within the namespace's quota of a destination at all. Pure."""
        tier = self.tier_of(destination)
        bound = self.quota.of(namespace).tier(tier)
        return not bound or nbytes + REDIS_EXTRA_BYTES * (tier == Tier.REDIS) <= bound

    # ---- flips

    def admit(self, namespace: str, header: Header, level: int, location: Location) -> int:
        """A new block; its row. Mutates."""
        [row] = self.admit_all(namespace, [header], level, [location])
        return row

    def admit_all(
        self,
        namespace: str,
        headers: Sequence[Header],
        level: int,
        places: Sequence[Location],
        *,
        copy_ids: Sequence[int] | None = None,
        coming: Coming | None = None,
    ) -> list[int]:
        """New blocks of one spec and shard; their rows. `copy_ids`: where the headers don't know them. Mutates."""
        residency, first = self.residency, headers[0]
        leaf_first, tier = self._leaf_first(first.root, first.shard), residency.levels[level].tier
        rows = admit_all(
            residency, namespace, headers, level, places, leaf_first=leaf_first, copy_ids=copy_ids, coming=coming
        )
        changes = [
            Added(h.root, h.shard, h.key, h.parent, h.group, h.depth, tier, h.fidelity, place.length)
            for h, place in zip(headers, places, strict=True)
        ]
        self.changes.push(namespace, *changes)
        return rows

    def _leaf_first(self, root: bytes, shard: bytes) -> bool:
        spec, found = self.catalog.spec(root), self.catalog.shard(shard)
        return spec is None or found is None or spec.groups[found.group].kind not in FREE_GROUPS

    def _window(self, root: bytes, shard: bytes) -> int:
        spec, found = self.catalog.spec(root), self.catalog.shard(shard)
        return 1 if spec is None or found is None else rule_of(spec, found.group).window_blocks

    def take_in(self, block: Recovered) -> None:
        """`admit` what the SSD kept, at the start, when nobody is told of single blocks. Mutates."""
        assert self.SSD is not None
        leaf_first = self._leaf_first(block.header.root, block.header.shard)
        self.residency.admit(block.namespace, block.header, self.SSD, block.location, leaf_first=leaf_first)

    def take_in_all(self, found: RecoveredRecords) -> Counter[str]:
        """The same for many at once, in the log's order; how many of each namespace. Mutates."""
        assert self.SSD is not None
        kept: Counter[str] = Counter()
        headers, entries = found.entries["header"], found.entries
        leaf_first = np.empty(len(found), np.bool_)
        for (root, shard), at in kinds(headers["root"], headers["shard"]):
            leaf_first[at] = self._leaf_first(root, shard)
        for (namespace, _), at in kinds(headers["namespace"], headers["shard"]):
            places = found.segments[at], entries["offset"][at], entries["nbytes"][at]
            name = found.names[namespace]
            take_in(self.residency, name, headers[at], self.SSD, places, leaf_first[at])
            kept[name] += len(at)
        return kept

    def add(self, row: int, level: int, location: Location, stored: Fidelity = Fidelity.EXACT) -> None:
        """One more copy of a block, worth `stored`. Mutates."""
        before = self._said(row)
        self.residency.add(row, level, location, stored)
        self._moved(row, before)

    def drop(self, row: int, level: int, *, evicted: bool = True, force: bool = False) -> None:
        """Give up a copy and free its space; with the last one the block is gone. Mutates."""
        residency = self.residency
        header, namespace, before = residency.header(row), residency.namespace(row), self._said(row)
        last = residency.rows.present[row] == 1 << level
        location = residency.drop(row, level, evicted=evicted, force=force)
        self.tiers[level].free(namespace, header, location)
        if last:
            self.changes.push(namespace, Removed(header.shard, header.key))
        else:
            self._moved(row, before)

    def shrink(self, row: int, level: int, header: Header, location: Location) -> None:
        """A copy has lost planes: `header` and `location` are its new record's. Frees the old one. Mutates."""
        before = self._said(row)
        old = shrink(self.residency, row, level, location, header.stored)
        self.residency.replace_header(row, header)
        self.tiers[level].free(self.residency.namespace(row), header, old)
        self._moved(row, before)

    def damaged(self, row: int, level: int) -> None:
        """A copy whose bytes do not hold is given up, pinned or not; nothing where it is gone already. Mutates."""
        if not self.residency.gone(row) and self.residency.present(row, level):
            self.counters["corrupt"] += 1
            self.corrupt[self.residency.levels[level].tier] += 1
            self.drop(row, level, evicted=False, force=True)

    def remove(self, row: int, *, evicted: bool = False) -> None:
        """Give up every copy, pinned or not: what readers hold stays until they let go. Mutates."""
        for level in range(len(self.tiers) - 1, -1, -1):
            if self.residency.present(row, level):
                self.drop(row, level, evicted=evicted, force=True)

    def _said(self, row: int) -> tuple[Tier, int]:
        """What others know: tier and fidelity."""
        return self.residency.levels[self.residency.rows.best(row)].tier, self.residency.rows.fidelity[row]

    def _moved(self, row: int, before: tuple[Tier, int]) -> None:
        if self._said(row) != before:
            self.changes.push(self.residency.namespace(row), self.announced(row))
