"""A real Redis for tests, and tiers on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import redis

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.seams import System
from kvstore.tiers.base import Location, Recovered
from kvstore.tiers.redis import RedisTier
from tests.contracts.records import NAMESPACE, Sample, catalog_of


def secret_of(namespace: str) -> bytes:
    return b"secret of " + namespace.encode()


def tier_on(
    system: System,
    url: str,
    nbytes: int = 4 << 20,
    *,
    catalog: Catalog | None = None,
    secret: Callable[[str], bytes] = secret_of,
    quota: Callable[[str], int] = lambda namespace: 0,
    **config: Any,
) -> RedisTier:
    settings = replace(StoreConfig(), redis_url=url, redis_bytes=nbytes, **config)
    return RedisTier(system, settings, catalog_of() if catalog is None else catalog, secret, quota=quota)


class Raw:
    """Commands of somebody else on the same server."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self.client = redis.Redis.from_url(server.url)

    def __call__(self, *command: Any) -> Any:
        return self.client.execute_command(*command)

    def close(self) -> None:
        self.client.close()


async def put(tier: RedisTier, found: Sample) -> Location:
    return await tier.write(found.namespace, found.header, [memoryview(found.record)])


async def get(tier: RedisTier, found: Sample | Recovered, location: Location | None = None) -> bytes:
    target = bytearray(found.header.stored_length if location is None else location.length)
    await tier.read(found.namespace, found.header, location or Location(0, 0, len(target)), memoryview(target))
    return bytes(target)


def value_key(tier: RedisTier, found: Sample) -> bytes:
    return tier.index.space(NAMESPACE).values + found.header.shard + found.header.key
