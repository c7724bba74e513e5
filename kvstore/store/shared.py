"""Redis as a store sees it: a tier that belongs to all workers, with an index that can be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from kvstore.errors import KVStoreError
from kvstore.header import Header
from kvstore.tiers.base import Location, TierStore

FINDS_MAX = 4096
"""Blocks asked for in one round trip."""

Entry = tuple[Header, Location]


class SharedTier(TierStore, Protocol):
    """What a store asks of Redis beyond a tier. All raise TierDown."""

    async def find_many(self, namespace: str, wanted: Sequence[tuple[bytes, bytes]]) -> list[Entry | None]:
        """Header and place of (shard, key) blocks, unverified; None where there is no entry."""

    async def purge(self, namespace: str, root: bytes | None = None) -> int:
        """Remove the namespace's blocks, or those of one model, for all workers; how many."""


class Finder:
    """Questions of one turn of the event loop become one round trip per namespace."""

    def __init__(self, redis: SharedTier) -> None:
        self.redis = redis
        self._asked: dict[str, dict[tuple[bytes, bytes], asyncio.Future[Entry | None]]] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}

    async def find(self, namespace: str, shard: bytes, key: bytes) -> Entry | None:
        """The entry of one block. TierDown."""
        asked = self._asked.get(namespace)
        if asked is None or len(asked) >= FINDS_MAX:
            asked = self._asked[namespace] = {}
            task = asyncio.get_running_loop().create_task(self._ask(namespace, asked))
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)
        answer = asked.get((shard, key))
        if answer is None:
            answer = asked[shard, key] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(answer)

    async def _ask(self, namespace: str, asked: dict[tuple[bytes, bytes], asyncio.Future[Entry | None]]) -> None:
        if self._asked.get(namespace) is asked:
            del self._asked[namespace]
        try:
            found = await self.redis.find_many(namespace, list(asked))
            for answer, entry in zip(asked.values(), found, strict=True):
                answer.set_result(entry)
        except KVStoreError as error:
            for answer in asked.values():
                answer.set_exception(type(error)(str(error)))
                answer.exception()  # whoever still waits sees it; nobody has to
        finally:
            for answer in asked.values():
                answer.cancel()

    async def close(self) -> None:
        """Who still waits is cancelled."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
