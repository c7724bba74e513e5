"""The Redis tier against a real Redis: announcing, faults, and the embedded server itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.catalog import Catalog
from kvstore.directory.runs import Added, Removed
from kvstore.errors import ConfigError, Corrupt, SetupError, TierDown
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.tiers.redis import RedisTier
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, sample
from tests.redis_helpers import Raw, get, put, tier_on

pytest_plugins = ["tests.redis_fixtures"]

BLOCK_BYTES = len(sample().record)


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
    assert await tier.elect(NAMESPACE, "a", 30.0, 2 * 10**18) == fourth + 10**17 + 1, "a renewal stays"
    await tier.resign(NAMESPACE, "a")
    assert await tier.elect(NAMESPACE, "a", 30.0, fourth + 10**17 + 500) == fourth + 10**17 + 501
    await other.close()


# Faults


async def test_out_of_reach_at_the_start_it_joins_later(tmp_path: Path, system: System) -> None:
    server = EmbeddedRedis(str(tmp_path / "late"), 64 << 20)
    url = server.start()
    server.stop()
    tier = tier_on(system, url, redis_timeout_s=1.0)
    assert await tier.start() == []
    stats = tier.stats()
    assert stats.state == "down" and stats.errors == 1 and "does not answer" in stats.detail
    with pytest.raises(TierDown):
        await put(tier, sample(0))
    await tier.flush()
    assert tier.stats().state == "down"
    server.start()
    await _until_ok(tier)
    await put(tier, sample(0))
    assert await get(tier, sample(0)) == sample(0).record
    await tier.close()
    server.stop()


async def test_out_of_reach_is_told_without_the_password(tmp_path: Path, system: System) -> None:
    for url, where in (
        ("redis://user:hunter2@127.0.0.1:1/0", "127.0.0.1:1"),
        (f"unix://:hunter2@{tmp_path}/no.sock", f"{tmp_path}/no.sock"),
        ("rediss://user:hunter2@127.0.0.1:1/0", "127.0.0.1:1"),
    ):
        tier = tier_on(system, url)
        await tier.start()
        detail = tier.stats().detail
        assert detail.startswith(f"Redis at {where} does not answer (") and "hunter2" not in detail
        await tier.close()
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


async def _on_their_way(operations: Sequence[Coroutine[Any, Any, object]]) -> list[asyncio.Future[Any]]:
    """All of them begun, none of them ended."""
    asking = [asyncio.ensure_future(operation) for operation in operations]
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in asking), "the fault comes too late"
    return asking


async def _down(asking: Sequence[asyncio.Future[Any]], why: str = "") -> int:
    """How many ended as TierDown for that reason; the others worked."""
    ends = await asyncio.gather(*asking, return_exceptions=True)
    wrong = [end for end in ends if isinstance(end, BaseException) and not isinstance(end, TierDown)]
    assert not wrong, wrong
    return sum(isinstance(end, TierDown) and why in str(end) for end in ends)


async def test_redis_dies_and_comes_back(tmp_path: Path, system: System) -> None:
    server = EmbeddedRedis(str(tmp_path / "one"), 64 << 20)
    tier = tier_on(system, server.start(), redis_timeout_s=1.0)
    await tier.start()
    await put(tier, sample(0))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)  # so that what is sent has no answer when it dies
    asking = await _on_their_way([put(tier, sample(depth)) for depth in range(1, 9)])
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    assert await _down(asking) == len(asking), "a write did not meet the death of the server"
    stats = tier.stats()
    assert stats.state == "down" and stats.errors >= 1 and ":@" not in stats.detail
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
        asking = await _on_their_way([get(tier, sample(0)) for _ in range(8)])
        assert await _down(asking) == len(asking), "a read did not wait for the stopped server"
        assert tier.stats().state == "down" and tier.stats().errors >= 1
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
    asking = [asyncio.ensure_future(put(tier, sample(depth))) for depth in range(1, 9)]
    assert await _down(asking, "out of memory") > 0, "no write on its way was refused by the server"
    assert tier.stats().state == "full"
    errors = tier.stats().errors
    assert await get(tier, sample(0)) == sample(0).record
    with pytest.raises(TierDown):
        await put(tier, sample(1))
    assert tier.stats().errors == errors > 0, "a write was tried while the server is known to be full"
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
