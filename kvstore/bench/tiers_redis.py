"""`bench tiers`, Redis: records of 2 MiB written and read, 16 in flight, beside a raw socket to the same server."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace

import numpy as np

from kvstore.bench.baselines import RespLoop
from kvstore.bench.report import Report, in_turns
from kvstore.bench.tiers_blocks import NAMESPACE, Buffers, catalog, differing, records
from kvstore.bench.tiers_ssd import in_flight
from kvstore.config import StoreConfig
from kvstore.errors import SetupError
from kvstore.fleet.embedded_redis import EmbeddedRedis
from kvstore.machine.system import RealClock, real_system
from kvstore.tiers.base import Location
from kvstore.tiers.redis import RedisTier

FLIGHT = 16


def measure_redis(report: Report, rounds: int, blocks: int) -> None:
    """Mutates `report`."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as folder:
        server = EmbeddedRedis(folder, 4 * blocks * (2 << 20))
        try:
            server.start()
        except SetupError as error:
            for name in ("redis_write", "redis_read", "resp_write", "resp_read"):
                report.missing(name, "GB/s", str(error))
            report.ratio("redis_write_vs_resp_write", "redis_write", "resp_write", at_least=0.7)
            report.ratio("redis_read_vs_resp_read", "redis_read", "resp_read", at_least=0.8)
            return
        try:
            _contest(report, rounds, blocks, server.url)
        finally:
            server.stop()


def _contest(report: Report, rounds: int, blocks: int, url: str) -> None:
    found = records(blocks)
    nbytes = found.nbytes
    targets = Buffers(blocks, nbytes)
    system = real_system()
    config = replace(StoreConfig(), redis_url=url, redis_bytes=2 * blocks * nbytes)
    names = [b"raw:%d" % i for i in range(blocks)]
    wrong = 0
    with asyncio.Runner() as runner:
        tier = RedisTier(system, config, catalog(), lambda namespace: b"secret of " + namespace.encode())
        loop = RespLoop(url, FLIGHT)
        runner.run(tier.start())

        async def write() -> None:
            async def one(i: int) -> None:
                await tier.write(NAMESPACE, found.headers[i], [found.views[i]])

            await in_flight(FLIGHT, [lambda i=i: one(i) for i in range(blocks)])  # type: ignore[misc]

        async def read() -> None:
            async def one(i: int) -> None:
                await tier.read(NAMESPACE, found.headers[i], Location(0, 0, nbytes), targets.views[i])

            await in_flight(FLIGHT, [lambda i=i: one(i) for i in range(blocks)])  # type: ignore[misc]

        def between(name: str) -> None:
            nonlocal wrong
            if name.endswith("read"):
                wrong += differing(targets.views, found.views)
                for view in targets.views:
                    np.frombuffer(view, np.uint8)[::4096] = 0
            if name == "redis_read":
                runner.run(tier.purge(NAMESPACE))
            elif name == "resp_read":
                loop.delete(names)

        seconds = in_turns(
            RealClock().monotonic,
            {
                "redis_write": lambda: runner.run(write()),
                "redis_read": lambda: runner.run(read()),
                "resp_write": lambda: loop.set(names, found.views),
                "resp_read": lambda: loop.get(names, targets.views),
            },
            rounds=rounds,
            between=between,
        )
        loop.close()
        runner.run(tier.close())
    system.pool.close()
    targets.close()
    found.close()
    for name, taken in seconds.items():
        report.result(name, [blocks * nbytes / s / 1e9 for s in taken], "GB/s")
    report.ratio("redis_write_vs_resp_write", "redis_write", "resp_write", at_least=0.7)
    report.ratio("redis_read_vs_resp_read", "redis_read", "resp_read", at_least=0.8)
    report.result("redis_wrong_blocks", [float(wrong)], "blocks")
    report.target("redis_wrong_blocks", at_most=0)
