"""Announces a namespace's Redis as the holder `redis:<namespace>`, while this worker is the one elected to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from kvstore.catalog import Catalog
from kvstore.client.plan import REDIS_HOLDER
from kvstore.config import WorkerConfig
from kvstore.directory.announce import Outbox
from kvstore.directory.membership import Member
from kvstore.directory.runs import Added, Change, Removed, Run, in_chain_order, to_runs
from kvstore.errors import TierDown
from kvstore.seams import System
from kvstore.tiers.redis import RedisTier
from kvstore.wire import common_pb2
from workers.announcer import Announcer, Source

STOP_S = 1.0

Held = dict[tuple[bytes, bytes], Added]
"""(shard digest, key) -> block"""


class RedisSource:
    """`workers.announcer.Source` of one namespace's index under one epoch: a mirror, kept by `apply`."""

    def __init__(
        self, catalog: Catalog, namespace: str, epoch: int, host: str, limit: int, held: Sequence[Added]
    ) -> None:
        self.catalog = catalog
        self.fenced_by = 0
        self._namespace, self._host = namespace, host
        self._epoch = epoch
        self._held: Held = {(added.shard, added.key): added for added in held}
        self._outbox = Outbox(limit, head=1)  # number 1 stands for what was there before: told by a snapshot

    @property
    def epoch(self) -> int:
        return self._epoch

    def member(self) -> Member:
        return Member(REDIS_HOLDER + self._namespace, self._epoch, host=self._host, node="redis")

    def namespaces(self) -> Sequence[str]:
        return [self._namespace]

    def outbox(self, namespace: str) -> Outbox:
        return self._outbox

    def snapshot(self, namespace: str) -> tuple[int, Iterable[Run]]:
        return self._outbox.head, to_runs(in_chain_order(self._held.values()))

    def status(self) -> common_pb2.WorkerStatus | None:
        return None

    async def fenced(self, epoch: int) -> None:
        """A newer election is known: this one must be held anew."""
        self.fenced_by = max(self.fenced_by, epoch)

    def apply(self, changes: Sequence[Change]) -> None:
        """Mutates."""
        for change in changes:
            if isinstance(change, Added):
                self._held[change.shard, change.key] = change
            else:
                self._held.pop((change.shard, change.key), None)
            self._outbox.push(change)

    def replace(self, held: Sequence[Added]) -> None:
        """What the index holds now, after a gap: only the difference is said. Mutates."""
        now: Held = {(added.shard, added.key): added for added in held}
        gone = [Removed(added.shard, added.key) for id, added in self._held.items() if id not in now]
        self.apply([*gone, *(added for id, added in now.items() if self._held.get(id) != added)])


class RedisAnnouncer:
    """One namespace: runs for the election, and while elected follows the index. `start`, `stop`."""

    def __init__(
        self,
        config: WorkerConfig,
        system: System,
        redis: RedisTier,
        catalog: Catalog,
        namespace: str,
        worker: Callable[[], str],
        announcer: Callable[[Source], Announcer],
    ) -> None:
        self._config, self._system, self._redis, self._catalog = config, system, redis, catalog
        self._namespace, self._worker, self._announcer = namespace, worker, announcer
        self._source: RedisSource | None = None
        self._telling: Announcer | None = None
        self._task: asyncio.Task[None] | None = None
        self._name = ""
        self._above = 0  # the highest epoch that a coordinator knows better: what Redis forgot of

    @property
    def elected(self) -> bool:
        return self._source is not None

    def _draw(self) -> None:
        """A new name to stand for election under: each source numbers its changes from 1, so that neither a worker
        restarted within its old lease nor one that begins again may get an epoch that was announced before."""
        self._name = f"{self._worker()}/{self._system.token_hex(4)}"

    def configure(self, coordinators: Sequence[str]) -> None:
        """Where to announce from now on. Mutates."""
        if self._telling is not None:
            self._telling.configure(coordinators)

    def start(self) -> None:
        self._draw()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Let another worker take over at once. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        elected = self.elected
        await self._end(leaving=False)
        if elected:
            try:
                await self._redis.resign(self._namespace, self._name)
            except TierDown:
                return  # the lease ends by itself

    async def _run(self) -> None:
        while True:
            try:
                await self._round()
            except TierDown:  # nobody can be served from there now; tried again with the next round
                await self._end(leaving=True)
                self._draw()
            await asyncio.sleep(self._config.redis_poll_s if self.elected else self._config.redis_lease_s / 3)

    async def _round(self) -> None:
        source = self._source
        if source is not None and source.fenced_by >= source.epoch:
            self._above = max(self._above, source.fenced_by)
            await self._end(leaving=False)
            await self._redis.resign(self._namespace, self._name)
        epoch = await self._redis.elect(self._namespace, self._name, self._config.redis_lease_s, self._above)
        if epoch is None:
            await self._end(leaving=False)
        elif self._source is None or self._source.epoch != epoch:
            await self._end(leaving=False)
            await self._begin(epoch)
        else:
            changes = await self._redis.changes(self._namespace)
            if changes is None:
                self._source.replace(await self._redis.snapshot(self._namespace))
            else:
                self._source.apply(changes)
            if (changes is None or changes) and self._telling is not None:
                self._telling.wake()

    async def _begin(self, epoch: int) -> None:
        held = await self._redis.snapshot(self._namespace)
        self._source = RedisSource(
            self._catalog, self._namespace, epoch, self._system.host, self._config.announce_queue, held
        )
        self._telling = self._announcer(self._source)
        self._telling.start()

    async def _end(self, *, leaving: bool) -> None:
        telling, self._telling, self._source = self._telling, None, None
        if telling is not None:
            await telling.stop(STOP_S, leaving=leaving)
