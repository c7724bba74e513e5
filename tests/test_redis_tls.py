"""The Redis tier over TLS, as an ACL user, with and without a client's certificate."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from kvstore.errors import SetupError
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.spec import Group, ModelSpec
from tests.contracts.records import NAMESPACE, catalog_of, sample
from tests.redis_helpers import Raw, get, put, tier_on
from tests.redis_proxy import certificate, proxy, server_context

pytest_plugins = ["tests.redis_fixtures"]

LARGE = ModelSpec(
    model="large", groups=(Group(layers=8, kv_heads=8, k_dim=128, v_dim=128),), dtype="float16", block_tokens=64
)
"""Blocks of 2 MiB: many TLS records each."""


@pytest.fixture
def user(raw: Raw) -> str:
    """An ACL user who may do what a worker does, and nothing else."""
    raw("ACL", "SETUSER", "worker", "reset", "on", ">pass", "~kv:*", "+@all", "-@admin", "-keys", "-flushall")
    return "worker:pass@"


async def test_blocks_pass_through_tls(server: EmbeddedRedis, user: str, tmp_path: Path, no_leaks: None) -> None:
    pair, system = certificate(tmp_path, "server"), real_system(threads=2)
    async with proxy(server.url, server_context(pair)) as door:
        url = f"rediss://{user}localhost:{door.port}/0?ssl_ca_certs={pair[0]}"
        tier = tier_on(system, url, 64 << 20, catalog=catalog_of(LARGE))
        await tier.start()
        blocks = [sample(depth, spec=LARGE) for depth in range(6)]
        await asyncio.gather(*(put(tier, found) for found in blocks))
        assert await asyncio.gather(*(get(tier, found) for found in blocks)) == [found.record for found in blocks]
        assert tier.stats().blocks == 6 and door.connections >= 1
        epoch = await tier.elect(NAMESPACE, "a", 1.0)
        assert epoch and len(await tier.snapshot(NAMESPACE)) == 6
        await tier.close()
    system.pool.close()


async def test_who_is_not_vouched_for_is_not_talked_to(
    server: EmbeddedRedis, user: str, system: System, tmp_path: Path
) -> None:
    pair, other = certificate(tmp_path, "server"), certificate(tmp_path, "other")
    async with proxy(server.url, server_context(pair)) as door:
        for url in (
            f"rediss://{user}localhost:{door.port}/0?ssl_ca_certs={other[0]}",
            f"rediss://{user}localhost:{door.port}/0",  # the machine's own authorities
        ):
            with pytest.raises(SetupError) as caught:
                await tier_on(system, url, redis_timeout_s=1.0).start()
            assert "pass" not in str(caught.value) and f"localhost:{door.port}" in str(caught.value)
        tier = tier_on(system, f"redis://{user}localhost:{door.port}/0", redis_timeout_s=1.0)  # no TLS at all
        await tier.start()
        assert tier.stats().state == "down" and "pass" not in tier.stats().detail
        await tier.close()


async def test_a_server_may_ask_for_a_certificate(
    server: EmbeddedRedis, user: str, system: System, tmp_path: Path
) -> None:
    pair, mine = certificate(tmp_path, "server"), certificate(tmp_path, "client")
    async with proxy(server.url, server_context(pair, clients=mine[0])) as door:
        url = f"rediss://{user}localhost:{door.port}/0?ssl_ca_certs={pair[0]}"
        stranger = tier_on(system, url, redis_timeout_s=1.0)
        with suppress(SetupError):  # the server may say why, or just hang up
            await stranger.start()
            assert stranger.stats().state == "down"
        await stranger.close()
        tier = tier_on(system, f"{url}&ssl_certfile={mine[0]}&ssl_keyfile={mine[1]}")
        await tier.start()
        await put(tier, sample(0))
        assert await get(tier, sample(0)) == sample(0).record
        await tier.close()


async def test_rights_and_passwords_count_over_tls_too(
    server: EmbeddedRedis, raw: Raw, system: System, tmp_path: Path
) -> None:
    pair = certificate(tmp_path, "server")
    raw("ACL", "SETUSER", "reader", "reset", "on", ">pass", "~other:*", "+get")
    async with proxy(server.url, server_context(pair)) as door:
        for credentials in ("worker:wrong@", "reader:pass@", ""):
            url = f"rediss://{credentials}localhost:{door.port}/0?ssl_ca_certs={pair[0]}"
            with pytest.raises(SetupError, match="refuses"):
                await tier_on(system, url).start()
