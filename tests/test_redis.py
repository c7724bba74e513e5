"""The Redis tier against a real Redis: contract, bound, MAC, breaker, announcing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from kvstore.catalog import Catalog
from kvstore.embedded_redis import EmbeddedRedis
from kvstore.errors import ConfigError, Corrupt, SetupError, TierDown, TierFull
from kvstore.runs import Added, Removed
from kvstore.seams import System
from kvstore.system import real_system
from kvstore.tiers.base import TierStore
from kvstore.tiers.redis import RedisTier
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, sample
from tests.contracts.tier_suite import TierContract, read, write
from tests.redis_helpers import Raw, get, put, tier_on, value_key

BLOCK_BYTES = len(sample().record)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(str(tmp_path_factory.mktemp("redis")), 256 << 20)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def raw(server: EmbeddedRedis) -> Iterator[Raw]:
    raw = Raw(server)
    yield raw
    raw("CONFIG", "SET", "maxmemory", 512 << 20)
    raw("FLUSHALL")
    raw.close()


@pytest.fixture
def system() -> Iterator[System]:
    system = real_system(threads=2)
    yield system
    system.pool.close()


@pytest.fixture
async def tier(server: EmbeddedRedis, raw: Raw, system: System) -> AsyncIterator[RedisTier]:
    tier = tier_on(system, server.url)
    await tier.start()
    yield tier
    await tier.close()


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


# Announcing


async def test_snapshot_and_changes_follow_the_index(tier: RedisTier, server: EmbeddedRedis) -> None:
    announcer = tier_on(tier.system, server.url, catalog=Catalog())
    await announcer.start()
    assert await announcer.changes(NAMESPACE) is None, "no snapshot yet"
    await put(tier, sample(0))
    first = await announcer.snapshot(NAMESPACE)
    assert [(c.key, c.tier, c.parent, c.depth, c.fidelity) for c in first] == [
        (sample(0).header.key, Tier.REDIS, sample(0).header.parent, 0, Fidelity.EXACT)
    ]
    assert await announcer.changes(NAMESPACE) == []
    await put(tier, sample(1))
    await put(tier, sample(2))
    tier.free(NAMESPACE, sample(0).header, await put(tier, sample(0)))
    await tier.flush()
    changes = await announcer.changes(NAMESPACE)
    assert changes is not None
    kinds = [(type(change), change.key) for change in changes]
    assert kinds == [(Added, sample(1).header.key), (Added, sample(2).header.key), (Removed, sample(0).header.key)]
    held = {change.key for change in await announcer.snapshot(NAMESPACE)}
    assert held == {sample(1).header.key, sample(2).header.key}
    await announcer.close()


async def test_evictions_are_announced(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    tier = tier_on(system, server.url, 10 * (BLOCK_BYTES + 1000))
    await tier.start()
    seen: dict[bytes, None] = dict.fromkeys(c.key for c in await tier.snapshot(NAMESPACE))
    for depth in range(30):
        await put(tier, sample(depth))
        for change in await tier.changes(NAMESPACE) or []:
            if isinstance(change, Added):
                seen[change.key] = None
            else:
                del seen[change.key]
    assert dict.fromkeys(sorted(seen)) == dict.fromkeys(sorted(c.key for c in await tier.snapshot(NAMESPACE)))
    assert len(seen) == tier.stats().blocks == 10
    await tier.close()


async def test_who_is_too_far_behind_takes_a_snapshot(tier: RedisTier, raw: Raw) -> None:
    await put(tier, sample(0))
    await tier.snapshot(NAMESPACE)
    for depth in range(1, 6):
        await put(tier, sample(depth))
    raw("XTRIM", tier.index.space(NAMESPACE).key("changes"), "MAXLEN", 2)
    assert await tier.changes(NAMESPACE) is None
    assert len(await tier.snapshot(NAMESPACE)) == 6
    assert await tier.changes(NAMESPACE) == []


async def test_one_announcer_with_growing_epochs(tier: RedisTier, server: EmbeddedRedis, raw: Raw) -> None:
    other = tier_on(tier.system, server.url)
    await other.start()
    first = await tier.elect(NAMESPACE, "a", 30.0)
    assert first is not None and first >= 1_600_000_000_000_000_000
    assert await other.elect(NAMESPACE, "b", 30.0) is None
    assert await tier.elect(NAMESPACE, "a", 30.0) == first, "a renewal"
    await tier.resign(NAMESPACE, "a")
    second = await other.elect(NAMESPACE, "b", 0.05)
    assert second is not None and second > first
    await tier.resign(NAMESPACE, "a")
    while (third := await tier.elect(NAMESPACE, "a", 30.0)) is None:
        await asyncio.sleep(0.01)
    assert third > second, "the lease had ended"
    raw("HSET", tier.index.space(NAMESPACE).key("meta"), "epoch", third + 10**18)
    raw("FLUSHALL")
    fourth = await tier.elect(NAMESPACE, "a", 30.0)
    assert fourth is not None and fourth > third, "another incarnation, and no counter left to trust"
    raw("HSET", tier.index.space(NAMESPACE).key("meta"), "epoch", fourth + 10**17)
    await tier.resign(NAMESPACE, "a")
    assert await tier.elect(NAMESPACE, "a", 30.0) == fourth + 10**17 + 1, "exact beyond 2^53"
    await other.close()


# Faults


async def test_unreachable_at_the_start_is_one_line(tmp_path: Path, system: System) -> None:
    for url, where in (
        ("redis://user:hunter2@127.0.0.1:1/0", "127.0.0.1:1"),
        (f"unix://:hunter2@{tmp_path}/no.sock", f"{tmp_path}/no.sock"),
        ("rediss://user:hunter2@127.0.0.1:1/0", "127.0.0.1:1"),
    ):
        with pytest.raises(SetupError) as caught:
            await tier_on(system, url).start()
        text = str(caught.value)
        assert text == f"Redis at {where} does not answer: start it or leave out --redis-url"
    for url in ("http://127.0.0.1", "redis://127.0.0.1:x", "redis://127.0.0.1/0?none=1"):
        with pytest.raises(ConfigError, match="redis_url"):
            await tier_on(system, url).start()


async def test_a_wrong_password_is_one_line(server: EmbeddedRedis, system: System) -> None:
    path = server.url.partition("@")[2]
    for credentials in (":wrong@", "somebody:wrong@", ""):
        with pytest.raises(SetupError, match="refuses") as caught:
            await tier_on(system, f"unix://{credentials}{path}").start()
        assert "wrong" not in str(caught.value)


async def test_an_acl_user_is_enough(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    raw("ACL", "SETUSER", "worker", "on", ">pass", "~kv:*", "+@all", "-@admin", "-keys", "-flushall")
    tier = tier_on(system, f"unix://worker:pass@{server.url.partition('@')[2]}")
    await tier.start()
    await put(tier, sample(0))
    assert await get(tier, sample(0)) == sample(0).record
    assert await tier.elect(NAMESPACE, "a", 1.0)
    assert len(await tier.snapshot(NAMESPACE)) == 1
    await tier.close()
    raw("ACL", "DELUSER", "worker")


async def test_another_eviction_policy_is_a_warning(server: EmbeddedRedis, raw: Raw, system: System) -> None:
    raw("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    tier = tier_on(system, server.url)
    await tier.start()
    assert tier.stats().state == "ok" and "allkeys-lru" in tier.stats().detail
    await tier.close()
    raw("CONFIG", "SET", "maxmemory-policy", "noeviction")


async def _until_ok(tier: RedisTier) -> None:
    async with asyncio.timeout(20):
        while tier.stats().state != "ok":
            await tier.tick()
            await asyncio.sleep(0.01)


async def test_redis_dies_and_comes_back(tmp_path: Path, system: System) -> None:
    server = EmbeddedRedis(str(tmp_path / "one"), 64 << 20)
    tier = tier_on(system, server.start(), redis_timeout_s=1.0)
    await tier.start()
    await put(tier, sample(0))
    server.stop()
    with pytest.raises(TierDown):
        await put(tier, sample(1))
    stats = tier.stats()
    assert stats.state == "down" and stats.errors == 1 and ":@" not in stats.detail
    before = asyncio.get_running_loop().time()
    for _ in range(50):
        with pytest.raises(TierDown):
            await get(tier, sample(0))
    assert asyncio.get_running_loop().time() - before < 0.5, "the breaker answers at once"
    await tier.flush()
    assert tier.stats().state == "down"
    server.start()
    await _until_ok(tier)
    with pytest.raises(Corrupt):
        await get(tier, sample(0))
    await put(tier, sample(1))
    assert await get(tier, sample(1)) == sample(1).record
    await tier.close()
    server.stop()


async def test_a_stopped_redis_times_out_and_recovers(tmp_path: Path, system: System) -> None:
    """SIGSTOP: connections stay open and nothing answers. Then it goes on."""
    server = EmbeddedRedis(str(tmp_path / "redis"), 64 << 20)
    tier = tier_on(system, server.start(), redis_timeout_s=0.3)
    await tier.start()
    await put(tier, sample(0))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TierDown):
            await get(tier, sample(0))
        assert tier.stats().state == "down"
        with pytest.raises(TierDown):
            await get(tier, sample(0))
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await _until_ok(tier)
    assert await get(tier, sample(0)) == sample(0).record
    await tier.close()
    server.stop()


async def test_out_of_memory_is_full_and_recovers(tier: RedisTier, raw: Raw) -> None:
    """Another process fills the server: reads go on, writes wait for room."""
    await put(tier, sample(0))
    raw("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(TierDown, match="out of memory"):
        await put(tier, sample(1))
    assert tier.stats().state == "full"
    assert await get(tier, sample(0)) == sample(0).record
    with pytest.raises(TierDown):
        await put(tier, sample(1))
    assert tier.stats().errors == 1
    raw("CONFIG", "SET", "maxmemory", 512 << 20)
    await _until_ok(tier)
    await put(tier, sample(1))
    assert await get(tier, sample(1)) == sample(1).record


async def test_nothing_leaks(server: EmbeddedRedis, raw: Raw, no_leaks: None) -> None:
    system = real_system(threads=2)
    tier = tier_on(system, server.url)
    await tier.start()
    await asyncio.gather(*(put(tier, sample(depth)) for depth in range(40)))
    await asyncio.gather(*(get(tier, sample(depth)) for depth in range(40)))
    await tier.close()
    system.pool.close()


# The embedded server


def test_the_embedded_server_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    server = EmbeddedRedis(str(folder), 64 << 20)
    assert server.start() == server.start() and server.alive()
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / "redis.sock").stat().st_mode & 0o077 == 0
    command = Path(f"/proc/{server.pid}/cmdline").read_text()
    assert server.url.partition(":")[2].partition("@")[0].strip("/:") not in command
    raw = Raw(server)
    assert raw.client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert raw.client.config_get("save") == {"save": ""}
    raw.close()
    server.stop()
    server.stop()
    assert not folder.exists() and not server.alive()


def test_a_long_folder_still_has_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 20) / "redis"
    server = EmbeddedRedis(str(folder), 64 << 20)
    server.start()
    assert server.alive()
    path = Path(server.url.partition("@")[2].partition("?")[0])
    assert path.exists()
    server.stop()
    assert not path.parent.exists()
