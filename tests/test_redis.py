"""The Redis tier against a real Redis: contract, bound, sharing, bytes that must not be used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.catalog import Catalog
from kvstore.errors import Corrupt, TierFull
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.seams import System
from kvstore.tiers.base import TierStore
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_index import Space
from kvstore.tiers.redis_value import AES_GMAC, HMAC_SHA256, trailer
from kvstore.types import Fidelity
from tests.contracts.records import NAMESPACE, sample
from tests.contracts.tier_suite import TierContract, read, write
from tests.redis_helpers import Raw, get, put, secret_of, tier_on, value_key

pytest_plugins = ["tests.redis_fixtures"]

BLOCK_BYTES = len(sample().record)


class TestRedisContract(TierContract):
    owns_used = False

    @pytest.fixture
    def make(self, server: EmbeddedRedis, raw: Raw, system: System) -> Callable[[int], RedisTier]:
        return lambda nbytes: tier_on(system, server.url, nbytes, catalog=self.catalog())

    async def test_the_capacity_holds(self, tier: TierStore) -> None:
        """Redis makes room itself: a write is never refused, the oldest blocks go, the bound holds."""
        kept = []
        for depth in range(2 * self.capacity_bytes // BLOCK_BYTES):
            found = sample(depth)
            assert tier.fits(len(found.record))
            kept.append((found, await write(tier, found)))
            assert tier.used <= tier.capacity
        assert tier.stats().blocks * BLOCK_BYTES >= self.capacity_bytes // 2
        assert await read(tier, *kept[-1]) == kept[-1][0].record
        with pytest.raises(Corrupt):
            await read(tier, *kept[0])


# Bound


async def test_a_namespace_has_a_bound_of_its_own(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    """The script keeps it: a quota takes from nobody else, and a block larger than it is refused at once."""
    room = 3 * (BLOCK_BYTES + 1000)
    quotas = {NAMESPACE: room, "tiny": BLOCK_BYTES}
    tier = tier_on(system, server.url, 100 * room, quota=lambda namespace: quotas.get(namespace, 0))
    await tier.start()
    others = [sample(depth, namespace="other") for depth in range(8)]
    for found in others:
        await put(tier, found)
    for depth in range(8):
        await put(tier, sample(depth))
    spaces = tier.index.spaces
    assert spaces[NAMESPACE].used <= room and spaces[NAMESPACE].blocks == 3
    assert [await get(tier, found) for found in others] == [found.record for found in others]
    with pytest.raises(TierFull):
        await put(tier, sample(0, namespace="tiny"))
    await tier.close()


async def test_the_least_recently_used_goes_first(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    tier = tier_on(system, server.url, 10 * (BLOCK_BYTES + 1000))
    await tier.start()
    samples = [sample(depth) for depth in range(10)]
    for found in samples:
        await put(tier, found)
    await get(tier, samples[0])
    await put(tier, sample(10))
    assert await get(tier, samples[0]) == samples[0].record
    with pytest.raises(Corrupt):
        await get(tier, samples[1])
    await tier.close()


async def test_the_byte_total_is_what_is_there(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    """Puts, replacements, evictions and removals by two writers; the script's total equals a count by hand."""
    bound = 40 * BLOCK_BYTES
    tiers = [tier_on(system, server.url, bound) for _ in range(2)]
    for tier in tiers:
        await tier.start()
    for number in range(60):
        fidelity = Fidelity.EXACT if number > 44 else Fidelity.NEAR
        found, tier = sample(number % 45, salt=bytes([number]), fidelity=fidelity), tiers[number % 2]
        location = await put(tier, found)
        if number % 7 == 0:
            tier.free(found.namespace, found.header, location)
            await tier.flush()
    space = tiers[0].index.space(NAMESPACE)
    entries = raw("HGETALL", space.key("index"))
    assert 20 < len(entries) <= 40
    by_hand = sum(raw("STRLEN", space.values + id) + 512 for id in entries)
    assert int(raw("HGET", space.key("meta"), "bytes")) == by_hand <= bound
    assert int(raw("HGET", space.key("meta"), "raw")) == len(entries) * len(sample().raw)
    assert raw("ZCARD", space.key("order")) == len(entries)
    for tier in tiers:
        await tier.close()


async def test_another_copy_replaces_only_a_worse_one(tier: RedisTier) -> None:
    near, exact = sample(0, fidelity=Fidelity.NEAR), sample(0, salt=b"exact")
    await put(tier, near)
    await put(tier, exact)
    assert await get(tier, exact) == exact.record
    await put(tier, near)
    assert await get(tier, exact) == exact.record
    with pytest.raises(Corrupt, match="copy_id"):
        await get(tier, near)
    assert await get(tier, exact) == exact.record, "asking for another copy removes nothing"
    assert tier.stats().blocks == 1


async def test_a_block_that_cannot_fit_is_refused(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    tier = tier_on(system, server.url, BLOCK_BYTES)
    await tier.start()
    assert not tier.fits(BLOCK_BYTES)
    with pytest.raises(TierFull):
        await put(tier, sample(0))
    assert tier.used == 0
    await tier.close()


async def test_nothing_is_kept_under_a_name_that_expires_never(tier: RedisTier, raw: Raw) -> None:
    await put(tier, sample(0))
    await get(tier, sample(0))
    for key in raw("KEYS", "*"):
        assert raw("PTTL", key) > 0, key


# Sharing


async def test_found_again_after_every_worker_died(tier: RedisTier, server: EmbeddedRedis) -> None:
    """Another process with an empty catalog finds header, location and dictionary, and the bytes."""
    samples = [sample(depth) for depth in range(5)]
    for found in samples:
        await put(tier, found)
    await tier.close()
    catalog = Catalog()
    other = tier_on(tier.system, server.url, catalog=catalog)
    assert await other.start() == []
    wanted = [(found.header.shard, found.header.key) for found in samples]
    answers = await other.find_many(NAMESPACE, [*wanted, (bytes(16), bytes(16))])
    assert answers[-1] is None
    for found, answer in zip(samples, answers, strict=False):
        assert answer is not None and answer[0] == found.header
        assert await get(other, found, answer[1]) == found.record
    assert catalog.spec(samples[0].header.root) == samples[0].spec
    await other.close()


async def test_an_emptied_redis_begins_anew(tier: RedisTier, raw: Raw) -> None:
    await put(tier, sample(0))
    await tier.snapshot(NAMESPACE)
    raw("FLUSHALL")
    with pytest.raises(Corrupt):
        await get(tier, sample(0))
    assert await tier.changes(NAMESPACE) is None
    await put(tier, sample(1))
    assert await get(tier, sample(1)) == sample(1).record
    other = tier_on(tier.system, tier.config.redis_url, catalog=Catalog())
    await other.start()
    assert await other.find(NAMESPACE, sample(1).header.shard, sample(1).header.key) is not None, (
        "words are there again"
    )
    assert len(await tier.snapshot(NAMESPACE)) == 1
    raw("SCRIPT", "FLUSH")
    assert await get(tier, sample(1)) == sample(1).record
    await put(tier, sample(2))
    await other.close()


async def test_words_that_an_older_dump_lacks_are_said_again(tier: RedisTier, raw: Raw) -> None:
    """Redis comes up with a dump of the same incarnation, made before this model was used: the next put says it again.
    Else nobody who starts later could announce the block, or find it."""
    await put(tier, sample(0))
    raw("DEL", Space.of(NAMESPACE).key("words"))
    other = tier_on(tier.system, tier.config.redis_url, catalog=Catalog())
    await other.start()
    ids = [(sample(depth).header.shard, sample(depth).header.key) for depth in range(2)]
    assert await other.find_many(NAMESPACE, ids) == [None, None], "the control: nobody can say what it is"
    await put(tier, sample(1))
    assert None not in await other.find_many(NAMESPACE, ids)
    assert len(await other.snapshot(NAMESPACE)) == 2
    await other.close()


async def test_purge_removes_for_all(tier: RedisTier) -> None:
    mine = [sample(depth) for depth in range(600)]
    for found in mine:
        await put(tier, found)
    assert tier.stats().blocks > 300
    count = tier.stats().blocks
    assert await tier.purge(NAMESPACE, root=bytes(16)) == 0
    assert await tier.purge(NAMESPACE, root=mine[0].header.root) == count
    assert (tier.stats().blocks, tier.used) == (0, 0)


# Bytes that must not be used


async def test_a_forged_value_is_corrupt_and_goes(tier: RedisTier, raw: Raw) -> None:
    for depth, change in enumerate(
        (
            lambda value: value[:-1] + bytes([value[-1] ^ 1]),  # the MAC
            lambda value: value[:200] + bytes([value[200] ^ 1]) + value[201:],  # data
            lambda value: value[: len(value) - 40],  # no trailer
            lambda value: value[: len(value) // 2],
            lambda value: b"",
        )
    ):
        found = sample(depth)
        await put(tier, found)
        raw("SET", value_key(tier, found), change(raw("GET", value_key(tier, found))))
        with pytest.raises(Corrupt):
            await get(tier, found)
        assert await tier.find(NAMESPACE, found.header.shard, found.header.key) is None
    assert tier.stats().errors == 5 and tier.stats().state == "ok"


async def test_a_block_in_anothers_place_is_corrupt(tier: RedisTier, raw: Raw) -> None:
    """Well signed, wrong block: the binding refuses it."""
    await put(tier, sample(0))
    await put(tier, sample(1))
    raw("COPY", value_key(tier, sample(1)), value_key(tier, sample(0)), "REPLACE")
    with pytest.raises(Corrupt, match="another"):
        await get(tier, sample(0))
    assert await get(tier, sample(1)) == sample(1).record


async def test_another_secret_reads_nothing(tier: RedisTier, server: EmbeddedRedis) -> None:
    await put(tier, sample(0))
    other = tier_on(tier.system, server.url, secret=lambda namespace: b"another")
    await other.start()
    with pytest.raises(Corrupt, match="MAC"):
        await get(other, sample(0))
    await other.close()


async def test_strange_index_entries_are_skipped(tier: RedisTier, raw: Raw) -> None:
    await put(tier, sample(0))
    space, other = tier.index.space(NAMESPACE), sample(1, namespace="other")
    raw("HSET", space.key("index"), b"x" * 32, b"not a header")
    raw("HSET", space.key("index"), b"y" * 32, sample(1).header.pack())
    raw("HSET", space.key("index"), other.header.shard + other.header.key, other.header.pack())
    raw("XADD", space.key("changes"), "*", "n", 999, "add", b"no header")
    assert [change.key for change in await tier.snapshot(NAMESPACE)] == [sample(0).header.key]
    assert await tier.find(NAMESPACE, b"y" * 16, b"y" * 16) is None
    assert tier.stats().extra["strange_entries"] >= 3


async def test_both_macs_are_read(tier: RedisTier, raw: Raw) -> None:
    """A process without the faster library writes the older one; whoever has both reads both, and forges neither."""
    for depth, algorithm in enumerate((HMAC_SHA256, AES_GMAC)):
        found = sample(depth)
        await put(tier, found)
        end = trailer([found.record], secret_of(NAMESPACE), bytes(12), algorithm)
        raw("SET", value_key(tier, found), found.record + end)
        assert await get(tier, found) == found.record
        forged = trailer([found.record], b"another secret", bytes(12), algorithm)
        raw("SET", value_key(tier, found), found.record + forged)
        with pytest.raises(Corrupt, match="MAC"):
            await get(tier, found)
