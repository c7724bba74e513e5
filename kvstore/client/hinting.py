"""Hints as a client sends them: to every worker that may hold the blocks of a prompt."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

from kvstore.client.links import Links
from kvstore.client.members import Members
from kvstore.config import ClientConfig
from kvstore.errors import DataError, ServiceError
from kvstore.keys import Chain
from kvstore.policies.usage import Hint, Use
from kvstore.spec import Shard
from kvstore.transport.methods import WORKER, WORKER_LOCAL
from kvstore.types import pack_keys
from kvstore.usewire import hint_to_wire, use_to_wire
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

WORKERS_MAX = 8
"""That are told at most: those of this host first."""

NO_HINT = Hint()


class Hinter:
    """Service trouble is counted: a hint is advice."""

    def __init__(self, config: ClientConfig, links: Links, members: Members, counters: Counter[str]) -> None:
        self._config, self._links, self._members, self._counters = config, links, members, counters

    async def hint(
        self,
        chain: Chain,
        hint: Hint,
        *,
        use: Use | None = None,
        shards: Sequence[Shard] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """With `use`: a request begins that uses these blocks. `hint`: what is known of the request that used them
        last, and of what comes after it. How many (shard, block) pairs the workers told hold, all of them together.
        """
        timeout_s = self._config.match_timeout_s if timeout_s is None else timeout_s
        if shards is None:
            shards = [Shard.whole(chain.spec, group) for group in range(len(chain.spec.groups))]
        request = hint_to_wire(hint)
        request.root = chain.spec.root
        if use is not None:
            request.use.CopyFrom(use_to_wire(use))
        keys = pack_keys(list(chain.keys))
        request.blocks.extend(worker_pb2.ShardKeys(shard=shard_to_wire(shard), keys=keys) for shard in shards)
        if not self._members.all() and not self._members.sockets():
            await self._members.fresh(timeout_s=timeout_s)
        sockets = self._members.sockets()
        calls = [self._told(self._local(socket, request, timeout_s)) for socket in sockets]
        remote = [m.address for m in self._members.all() if not self._members.here(m) and m.address]
        left = max(0, WORKERS_MAX - len(calls))
        calls += [self._told(self._remote(address, request, timeout_s)) for address in remote[:left]]
        return sum(await asyncio.gather(*calls))

    async def _told(self, call: Coroutine[Any, Any, Any]) -> int:
        try:
            return int((await call).blocks)
        except (ServiceError, DataError) as error:
            self._counters[f"errors_{type(error).__name__}"] += 1
            return 0

    async def _local(self, socket: str, request: worker_pb2.HintRequest, timeout_s: float) -> Any:
        async with self._links.local.use(socket, timeout_s=timeout_s) as link:
            return await link.call(WORKER_LOCAL["Hint"], request, timeout_s=timeout_s)

    async def _remote(self, address: str, request: worker_pb2.HintRequest, timeout_s: float) -> Any:
        async with self._links.remote.use(address, timeout_s=timeout_s) as channel:
            return await channel.unary(WORKER["Hint"], request, timeout_s=timeout_s)
