"""`bench recovery`, coordinator: one is killed and started again beside a worker that has a million blocks to tell.

The worker is its announcer alone, over runs that are there already: what it sends, and over what, is a worker's own.
How long a worker needs to gather them is in `bench directory` (`snapshot_worker_pause`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.bench.directory_rig import GROUP, PROMPT, SPEC, WHOLE, prompt_keys, runs_of
from kvstore.bench.recovery_rig import now, until
from kvstore.bench.report import Report
from kvstore.catalog import Catalog
from kvstore.config import Config, override
from kvstore.directory.announce import Outbox
from kvstore.directory.membership import Member
from kvstore.directory.runs import Run
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.machine.system import real_system
from kvstore.operations.observe import Observer
from kvstore.transport.base import Credentials
from kvstore.transport.rpc import GrpcTransport
from kvstore.wire import common_pb2
from workers.announcer import Announcer

PROMPTS = 1024
BLOCKS = PROMPTS * PROMPT  # 2**20
LEASE_S, HEARTBEAT_S = 1.0, 0.25
"""Short, since nobody is said to be complete before a lease is over."""


class RunSource:
    """`workers.announcer.Source` over so many blocks that nobody has."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.catalog.learn_namespace("default")
        self.catalog.learn_spec(SPEC)
        self.catalog.learn_shard(WHOLE)
        self._runs = runs_of(prompt_keys(0, PROMPTS), GROUP)
        self._outbox = Outbox(16, head=BLOCKS)  # all of it told by snapshot

    def member(self) -> Member:
        return Member("bench", 1, address="127.0.0.1:1", host="elsewhere", node="bench")

    def namespaces(self) -> Sequence[str]:
        return ["default"]

    def outbox(self, namespace: str) -> Outbox:
        return self._outbox

    def snapshot(self, namespace: str) -> tuple[int, Iterable[Run]]:
        return self._outbox.head, iter(self._runs)

    def status(self) -> common_pb2.WorkerStatus | None:
        return None

    async def fenced(self, epoch: int) -> None:
        """Nobody else has this id."""
        raise AssertionError(f"fenced by epoch {epoch}")


async def measure_coordinator(report: Report, rounds: int) -> None:
    """From its first answer until it knows everything and says so. Mutates the report."""
    config = override(Config(), {"coordinator": {"lease_s": LEASE_S, "heartbeat_s": HEARTBEAT_S}})
    system = real_system(2)
    transport = GrpcTransport(system.clock)
    observer = Observer(transport, Credentials(), 5.0)
    seconds = []
    try:
        async with LocalCluster(config, workers=0, redis=False) as cluster:
            assert cluster.coordinator is not None
            address = cluster.coordinator.address
            source = RunSource()
            announcer = Announcer(config.worker, system, transport, Credentials(), [address], source)
            announcer.start()

            async def complete() -> bool:
                status = await observer.coordinator_status(address)
                return status.complete and status.directory_blocks == BLOCKS

            await until(complete, "the coordinator knows everything")
            for _ in range(rounds):
                await cluster.restart_coordinator(0)
                begin = now()
                await until(complete, "the restarted coordinator knows everything")
                seconds.append((now() - begin) * 1e6 / BLOCKS)
            await announcer.stop(0.5, leaving=True)
    finally:
        system.pool.close()
    report.result("coordinator_complete_per_million_blocks", seconds, "s")
    report.target("coordinator_complete_per_million_blocks", at_most=2)
