"""An engine's own prefix cache as a holder: announced like a worker's blocks, counted in Score only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvstore.catalog import Catalog
from kvstore.client.plan import ENGINE_HOLDER
from kvstore.directory.announce import Outbox
from kvstore.directory.engine_cache import EngineCache
from kvstore.directory.kv_events import parse
from kvstore.directory.membership import Member
from kvstore.directory.runs import Change, Run, in_chain_order, to_runs
from kvstore.errors import Corrupt
from kvstore.wire import common_pb2


class EngineSource:
    """`workers.announcer.Source` fed by an engine's published batches. Synchronous."""

    def __init__(
        self, name: str, namespace: str, cache: EngineCache, *, epoch: int, host: str, address: str, queue: int
    ) -> None:
        self.catalog = Catalog()
        self.catalog.learn_spec(cache.spec)
        for shard in cache.shards:
            self.catalog.learn_shard(shard)
        self.counters: Counter[str] = Counter()
        self._name, self._namespace, self._cache = name, namespace, cache
        self._epoch, self._host, self._address = epoch, host, address
        self._outbox = Outbox(queue)
        self._next: int | None = None  # number of the engine's batch that is awaited

    def hear(self, number: int, payload: bytes) -> None:
        """The engine's batch of this number. After a gap nothing is known: what the engine has is learnt anew, as far
        as it tells it again. Mutates."""
        if self._next is not None and number != self._next:
            self.counters["gaps"] += 1
            self._push_all(self._cache.clear())
        self._next = number + 1
        try:
            events = parse(payload)
        except Corrupt:
            self.counters["batches_not_read"] += 1
            self._push_all(self._cache.clear())
            return
        self.counters["batches"] += 1
        self._push_all(self._cache.take(events))

    def _push_all(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._outbox.push(change)

    def lost(self) -> None:
        """The engine is gone, or its stream is: nothing is held. Mutates."""
        self._next = None
        self._push_all(self._cache.clear())

    # --- `Source` --------------------------------------------------------------------------------------------------

    def member(self) -> Member:
        return Member(ENGINE_HOLDER + self._name, self._epoch, self._address, host=self._host, node=self._name)

    def namespaces(self) -> Sequence[str]:
        return (self._namespace,)

    def outbox(self, namespace: str) -> Outbox:
        return self._outbox

    def snapshot(self, namespace: str) -> tuple[int, Iterable[Run]]:
        return self._outbox.head, to_runs(in_chain_order(self._cache.blocks()))

    def status(self) -> common_pb2.WorkerStatus | None:
        return common_pb2.WorkerStatus(counters={**self.counters, **self._cache.counters})

    async def fenced(self, epoch: int) -> None:
        self._epoch = max(self._epoch, epoch + 1)
