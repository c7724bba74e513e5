"""Fixtures: a real Redis for a test module, and a tier on it. Used by `pytest_plugins = ["tests.redis_fixtures"]`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.tiers.redis import RedisTier
from tests.redis_helpers import Raw, tier_on


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
