"""The contract of `kvstore.tiers.base.TierStore` as code: what every tier must do.

A tier's test subclasses `TierContract` and gives it a fixture `make`:

    class TestMine(TierContract):
        durable = True

        @pytest.fixture
        def make(self, tmp_path): return lambda capacity: MyTier(...tmp_path..., capacity)

`make(capacity)` returns a tier that is not started; called again, one on the same medium. `capacity_bytes` is
what the suite asks for; a tier that bounds something else (a namespace) still refuses what is beyond it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from kvstore.errors import TierFull
from kvstore.tiers.base import Location, TierStore
from tests.contracts.records import NAMESPACE, Sample, catalog_of, sample

Make = Callable[[int], TierStore]

OTHER = "other"


async def read(tier: TierStore, found: Sample, location: Location) -> bytes:
    """What the tier has at a location."""
    target = bytearray(location.length)
    await tier.read(found.namespace, found.header, location, memoryview(target))
    return bytes(target)


async def write(tier: TierStore, found: Sample) -> Location:
    return await tier.write(found.namespace, found.header, [memoryview(found.record)])


class TierContract:
    """Subclass with a fixture `make`; see the module."""

    capacity_bytes = 4 << 20
    durable = False  # a second tier on the same medium finds what the first one kept
    owns_used = True  # `used` counts this process's writes only (Redis: shared, so only bounded)
    quiet_frees = True  # space is back as soon as `free` returned (a log reclaims later)

    catalog = staticmethod(lambda: catalog_of(namespaces=(NAMESPACE, OTHER)))

    @pytest.fixture
    async def tier(self, make: Make) -> AsyncIterator[TierStore]:
        tier = make(self.capacity_bytes)
        await tier.start()
        yield tier
        await tier.close()

    async def test_starts_empty_within_its_capacity(self, tier: TierStore) -> None:
        stats = tier.stats()
        assert stats.state == "ok", stats.detail
        assert stats.tier == tier.tier
        assert stats.capacity == tier.capacity > 0
        assert 0 <= stats.used == tier.used <= tier.capacity

    async def test_reads_back_what_was_written(self, tier: TierStore) -> None:
        samples = [sample(depth, session=session) for session in range(3) for depth in range(4)]
        locations = [await write(tier, found) for found in samples]
        for found, location in zip(samples, locations, strict=True):
            assert location.length == len(found.record)
            assert await read(tier, found, location) == found.record
        assert tier.stats().writes >= len(samples)

    async def test_the_beginning_of_a_blob_can_be_read_alone(self, tier: TierStore) -> None:
        found = sample()
        location = await write(tier, found)
        for nbytes in (1, 160, 4096, 4097, len(found.record) - 1) if tier.prefixes else ():
            target = bytearray(nbytes)
            await tier.read(found.namespace, found.header, location, memoryview(target))
            assert target == found.record[:nbytes]
        assert await read(tier, found, location) == found.record

    async def test_parts_are_joined(self, tier: TierStore) -> None:
        found = sample()
        record = memoryview(found.record)
        parts = [bytes(record[:160]), bytearray(record[160:1001]), record[1001:1001], record[1001:]]
        location = await tier.write(found.namespace, found.header, parts)
        assert await read(tier, found, location) == found.record

    async def test_the_source_may_change_after_the_write(self, tier: TierStore) -> None:
        found = sample()
        source = bytearray(found.record)
        location = await tier.write(found.namespace, found.header, [memoryview(source)])
        source[:] = bytes(len(source))
        assert await read(tier, found, location) == found.record

    async def test_namespaces_keep_equal_keys_apart(self, tier: TierStore) -> None:
        mine, theirs = sample(namespace=NAMESPACE), sample(namespace=OTHER, salt=b"another copy")
        assert mine.header.key == theirs.header.key
        first, second = await write(tier, mine), await write(tier, theirs)
        assert await read(tier, mine, first) == mine.record
        assert await read(tier, theirs, second) == theirs.record

    async def test_used_follows_writes_and_frees(self, tier: TierStore) -> None:
        before = tier.used
        samples = [sample(depth) for depth in range(4)]
        locations = [await write(tier, found) for found in samples]
        full = tier.used
        assert full >= before + sum(len(found.record) for found in samples)
        assert full <= tier.capacity
        for found, location in zip(samples, locations, strict=True):
            tier.free(found.namespace, found.header, location)
        await tier.tick()
        if self.owns_used and self.quiet_frees:
            assert tier.used == before
        else:
            assert tier.used <= full

    async def test_the_capacity_holds(self, tier: TierStore) -> None:
        """Writes until it is full: used never passes the capacity, TierFull keeps and counts nothing."""
        kept: list[tuple[Sample, Location]] = []
        refused = 0
        size = len(sample().record)
        for depth in range(2 * self.capacity_bytes // size + 2):
            found = sample(depth)
            fits, before = tier.fits(len(found.record)), tier.used
            try:
                kept.append((found, await write(tier, found)))
            except TierFull:
                refused += 1
                assert not fits
                assert tier.used <= before
                if refused == 3:
                    break
            assert tier.used <= tier.capacity
        assert refused, "the tier took twice its capacity"
        assert len(kept) * size >= self.capacity_bytes // 2, "less than half of the capacity was usable"
        for found, location in kept[:: max(1, len(kept) // 16)]:
            assert await read(tier, found, location) == found.record

    async def test_freed_space_is_used_again(self, tier: TierStore) -> None:
        """Four capacities pass through; what is still kept stays right."""
        kept: list[tuple[Sample, Location]] = []
        size = len(sample().record)
        rounds = 4 * self.capacity_bytes // size
        for depth in range(rounds):
            found = sample(depth)
            while not tier.fits(len(found.record)) or len(kept) * size > self.capacity_bytes // 2:
                if not kept:
                    await tier.tick()
                    assert tier.fits(len(found.record)), "everything is freed, nothing fits"
                    break
                old, location = kept.pop(0)
                tier.free(old.namespace, old.header, location)
                await tier.tick()
            kept.append((found, await write(tier, found)))
        for found, location in kept:
            assert await read(tier, found, location) == found.record

    async def test_concurrent_writes_and_reads(self, tier: TierStore) -> None:
        samples = [sample(depth, session=session) for session in range(4) for depth in range(8)]
        locations = await asyncio.gather(*(write(tier, found) for found in samples))
        pairs = zip(samples, locations, strict=True)
        records = await asyncio.gather(*(read(tier, found, location) for found, location in pairs))
        assert records == [found.record for found in samples]

    async def test_ticks_are_harmless(self, tier: TierStore) -> None:
        found = sample()
        location = await write(tier, found)
        for _ in range(3):
            await tier.tick()
        assert await read(tier, found, location) == found.record

    async def test_too_large_is_refused_at_once(self, make: Make) -> None:
        """A blob beyond the whole capacity is TierFull, not a crash and not a wait."""
        tier = make(256 << 10)
        await tier.start()
        try:
            found = sample()
            before = tier.used
            assert not tier.fits(tier.capacity + 1)
            with pytest.raises(TierFull):
                await tier.write(found.namespace, found.header, [memoryview(bytes(tier.capacity + 1))])
            assert tier.used == before
        finally:
            await tier.close()

    async def test_what_survives_a_restart(self, make: Make) -> None:
        """Durable tiers find what was written and not freed, byte for byte; the others start empty."""
        first = make(self.capacity_bytes)
        await first.start()
        samples = [sample(depth, namespace=name) for name in (NAMESPACE, OTHER) for depth in range(3)]
        locations = [await write(first, found) for found in samples]
        first.free(samples[0].namespace, samples[0].header, locations[0])
        await first.close()

        second = make(self.capacity_bytes)
        recovered = await second.start()
        try:
            if not self.durable:
                assert recovered == []
                return
            found = {(r.namespace, r.header.key): r for r in recovered}
            assert set(found) == {(s.namespace, s.header.key) for s in samples[1:]}
            for kept in samples[1:]:
                entry = found[(kept.namespace, kept.header.key)]
                assert entry.header == kept.header
                assert await read(second, kept, entry.location) == kept.record
        finally:
            await second.close()

    async def test_close_twice(self, make: Make) -> None:
        tier = make(self.capacity_bytes)
        await tier.start()
        await tier.close()
        await tier.close()
