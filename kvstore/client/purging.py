"""A purge of the whole fleet: one id for all workers, and whoever has joined meanwhile is asked as well."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.client.links import Links
from kvstore.client.members import Members
from kvstore.config import ClientConfig
from kvstore.errors import KVStoreError
from kvstore.seams import System
from kvstore.transport.methods import WORKER
from kvstore.types import KEY_BYTES
from kvstore.wire import worker_pb2

LOOKS_MAX = 4
"""At the members, each time for those that are new or have started again since the last look."""

AT_A_TIME = 16
"""Workers asked."""


class Life(Protocol):
    """What is asked of a member."""

    @property
    def id(self) -> str: ...

    @property
    def epoch(self) -> int: ...

    @property
    def address(self) -> str: ...


def purge_id(system: System) -> bytes:
    """A new one, for `PurgeRequest.purge`."""
    return bytes.fromhex(system.token_hex(KEY_BYTES))


@dataclass(slots=True)
class Purged:
    """Blocks dropped, workers that did it, and the error of each that did not."""

    blocks: int = 0
    workers: int = 0
    failed: dict[str, KVStoreError] = field(default_factory=dict)


async def purge_all(look: Callable[[], Awaitable[Iterable[Life]]], ask: Callable[[str], Awaitable[int]]) -> Purged:
    """`ask(address)` every member that `look` names, until a look shows no other; `ask` bounds its own time.

    A worker that starts while others still have the blocks may have copied some before it is asked; one that starts
    later finds none."""
    purged, asked = Purged(), set[tuple[str, int]]()
    turns = asyncio.Semaphore(AT_A_TIME)

    async def one(id: str, address: str) -> None:
        async with turns:
            try:
                blocks = await ask(address)
                purged.blocks += blocks  # only now: others have added theirs meanwhile
                purged.workers += 1
                purged.failed.pop(id, None)
            except KVStoreError as error:
                purged.failed[id] = error

    for _ in range(LOOKS_MAX):
        lives = {(member.id, member.epoch): member.address for member in await look() if member.address}
        fresh = {life: address for life, address in lives.items() if life not in asked}
        if not fresh:
            break
        asked |= fresh.keys()
        await asyncio.gather(*(one(id, address) for (id, _), address in fresh.items()))
    return purged


class Purger:
    """A client's."""

    def __init__(
        self, config: ClientConfig, system: System, links: Links, members: Members, counters: Counter[str]
    ) -> None:
        self._config, self._system, self._links = config, system, links
        self._members, self._counters = members, counters

    async def purge(self, root: bytes, timeout_s: float) -> int:
        """Drop a root's blocks (empty: all) on every worker that answers within `timeout_s`; how many. Never raises
        for a peer."""
        request = worker_pb2.PurgeRequest(root=root, purge=purge_id(self._system))

        async def look() -> Iterable[Life]:
            self._members.forget()
            await self._members.fresh(timeout_s=min(timeout_s, self._config.match_timeout_s))
            return self._members.all()

        async def ask(address: str) -> int:
            async with self._links.remote.use(address) as channel:
                reply: worker_pb2.PurgeReply = await channel.unary(WORKER["Purge"], request, timeout_s=timeout_s)
                return reply.blocks

        purged = await purge_all(look, ask)
        for error in purged.failed.values():
            self._counters[f"errors_{type(error).__name__}"] += 1
        return purged.blocks
