"""Who announces Redis: a worker that comes back within its own lease must not go on under its old epoch."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from kvstore.auth import client_credentials
from kvstore.catalog import Catalog
from kvstore.config import ClientConfig, WorkerConfig
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.seams import System
from kvstore.tiers.redis import RedisTier
from kvstore.transport.rpc import GrpcTransport
from tests.contracts.records import NAMESPACE, sample
from tests.redis_helpers import Raw, put, tier_on
from workers.announcer import Announcer, Source
from workers.redis_announcer import RedisAnnouncer

pytest_plugins = ["tests.redis_fixtures"]

CONFIG = WorkerConfig(redis_lease_s=0.4, redis_poll_s=0.02)


class Life:
    """One life of a worker, as far as the election goes; `epochs` are those it announced under."""

    def __init__(self, system: System, redis: RedisTier, worker: str, config: WorkerConfig = CONFIG) -> None:
        self.epochs: list[int] = []
        self._system = system
        self.announcer = RedisAnnouncer(config, system, redis, Catalog(), NAMESPACE, lambda: worker, self._tell)
        self.announcer.start()

    def _tell(self, source: Source) -> Announcer:
        self.epochs.append(source.member().epoch)
        transport = GrpcTransport(self._system.clock, connect_timeout_s=1.0)
        credentials = client_credentials(ClientConfig(coordinators=("127.0.0.1:1",)))
        return Announcer(CONFIG, self._system, transport, credentials, (), source)

    async def elected(self) -> int:
        async with asyncio.timeout(10):
            while not self.announcer.elected:
                await asyncio.sleep(0.01)
        return self.epochs[-1]

    def crash(self) -> None:
        """Gone without a word: its lease stays."""
        task: Any = self.announcer._task
        task.cancel()


async def test_a_worker_back_within_its_lease_announces_under_a_new_epoch(
    tier: RedisTier, server: EmbeddedRedis, raw: Raw, system: System
) -> None:
    await put(tier, sample(0))
    first = Life(system, tier, "w")
    before = await first.elected()
    first.crash()
    again = tier_on(system, server.url)
    await again.start()
    second = Life(system, again, "w")
    assert await second.elected() > before
    await second.announcer.stop()
    await again.close()


async def test_one_that_resigned_and_begins_again_does_too(tier: RedisTier, raw: Raw, system: System) -> None:
    await put(tier, sample(0))
    life = Life(system, tier, "w", replace(CONFIG, redis_lease_s=30.0))
    before = await life.elected()
    await life.announcer.stop()
    life.announcer.start()
    assert await life.elected() > before, "at once: the lease was given back"
    await life.announcer.stop()


async def test_who_is_fenced_is_elected_above_what_is_known(tier: RedisTier, raw: Raw, system: System) -> None:
    """The one before had a clock that was ahead, and Redis has lost its counter since."""
    await put(tier, sample(0))
    life = Life(system, tier, "w")
    before = await life.elected()
    known = before + 10**15  # of coordinators: eleven days ahead
    source: Any = life.announcer._source
    await source.fenced(known)
    async with asyncio.timeout(10):
        while len(life.epochs) == 1 or not life.announcer.elected:
            await asyncio.sleep(0.01)
    assert life.epochs == [before, known + 1], "at once, not step by step"
    await life.announcer.stop()


@pytest.mark.parametrize("worker", ["a", "b"])
async def test_only_one_of_two_announces(tier: RedisTier, raw: Raw, system: System, worker: str) -> None:
    await put(tier, sample(0))
    first = Life(system, tier, "a")
    await first.elected()
    second = Life(system, tier, worker)
    renewals = tier.index
    for _ in range(5):
        await renewals.elect(renewals.space(NAMESPACE), "nobody", 0.1)
    assert not second.announcer.elected
    await first.announcer.stop()
    await second.elected()
    await second.announcer.stop()
