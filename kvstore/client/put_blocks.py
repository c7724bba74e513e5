"""The put of a client: on this host's worker, else on the homes of the placement group; and the tokens it got back."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from kvstore.client.links import Links
from kvstore.client.members import Members
from kvstore.client.writes import COMMITTED, DROPPED, HELD, Item, Stored, put_local, put_remote, unanswered
from kvstore.config import ClientConfig
from kvstore.directory.placement import rank
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.keys import Chain
from kvstore.seams import System
from kvstore.spec import Shard
from kvstore.types import CommitToken, Fidelity
from kvstore.wireform import AFTER_MAX

TOKEN_S = 5.0
"""How long a commit is shown to coordinators: after that its worker's lease is over, or it is applied everywhere."""

FIRST_SHARE = 0.6
"""Of the time that is left, what a worker of this host gets: one that hangs leaves time for another."""

CANDIDATES_MAX = 2
"""Workers of other hosts that a group of blocks is offered to."""


@dataclass(slots=True)
class PutResult:
    """`states[i]` of block i: "committed", "held" (already, as good), "dropped" (no room, nobody there), "refused"
    (the worker does not take such bytes). `tokens`: for `match(after=)` of whoever must see the blocks."""

    tokens: list[CommitToken] = field(default_factory=list)
    states: list[str] = field(default_factory=list)


class Tokens:
    """The last commits that a coordinator may not know yet: one per worker and epoch, at most 16, for a while."""

    def __init__(self, system: System) -> None:
        self._clock = system.clock
        self._kept: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()

    def add(self, tokens: Iterable[CommitToken]) -> None:
        """Mutates."""
        for token in tokens:
            life = (token.worker, token.epoch)
            seq = max(token.seq, self._kept.get(life, (0, 0.0))[0])
            self._kept[life] = (seq, self._clock.monotonic() + TOKEN_S)
            self._kept.move_to_end(life)
        while len(self._kept) > AFTER_MAX:
            self._kept.popitem(last=False)

    def pending(self) -> list[CommitToken]:
        """Those to show with the next lookup. Mutates: expired ones go."""
        now = self._clock.monotonic()
        for life in [life for life, (_, until) in self._kept.items() if until <= now]:
            del self._kept[life]
        return [CommitToken(worker, epoch, seq) for (worker, epoch), (seq, _) in self._kept.items()]

    def applied(self, shown: Sequence[CommitToken], not_applied: Sequence[CommitToken]) -> None:
        """A coordinator knows the shown ones but these. Mutates."""
        missing = {(token.worker, token.epoch) for token in not_applied}
        for token in shown:
            life = (token.worker, token.epoch)
            if life not in missing and self._kept.get(life, (-1, 0.0))[0] == token.seq:
                del self._kept[life]


class Putter:
    """Stores blocks. Service trouble is counted; what it cost is in the result."""

    def __init__(
        self,
        config: ClientConfig,
        system: System,
        links: Links,
        members: Members,
        counters: Counter[str],
        committed: Callable[[Stored, CommitToken, list[bytes]], None],
    ) -> None:
        """`committed` hears of blocks that one worker has now."""
        self._committed = committed
        self._config, self._system, self._links = config, system, links
        self._members, self._counters = members, counters
        self.tokens = Tokens(system)

    async def put(
        self,
        chain: Chain,
        raws: Sequence[memoryview],
        first: int,
        shard: Shard,
        computed_on: Fidelity,
        *,
        timeout_s: float,
    ) -> PutResult:
        items = [
            Item(chain.keys[depth], chain.parent(depth), chain.group(depth), depth, raw)
            for depth, raw in enumerate(raws, first)
        ]
        result = PutResult()
        stored = Stored(chain.spec, shard, computed_on)
        if items:
            end = self._system.clock.monotonic() + timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    await self._put(stored, items, result.tokens, end)
            except TimeoutError:
                self._counters["errors_DeadlineExceeded"] += 1
        for item in items:
            item.state = item.state or DROPPED
            self._counters[f"put_{item.state}"] += 1
        result.states = [item.state for item in items]
        for token, mine in groupby(items, key=lambda item: item.token):
            keys = [item.key for item in mine if item.state in (COMMITTED, HELD)]
            if token is not None and keys:
                self._committed(stored, token, keys)
        self.tokens.add(result.tokens)
        return result

    async def _put(self, stored: Stored, items: list[Item], tokens: list[CommitToken], end: float) -> None:
        if not self._members.all() or not self._members.sockets(taking=True):
            await self._members.fresh(timeout_s=min(self._config.match_timeout_s, self._left(end)))
        for socket in self._members.sockets(taking=True):
            if not unanswered(items):
                return
            await self._local(socket, stored, unanswered(items), tokens, end)
        if not unanswered(items):
            return
        await self._members.fresh(timeout_s=min(self._config.match_timeout_s, self._left(end)))
        for group, mine in _groups(unanswered(items)):
            takers = self._members.takers()
            for worker in rank(group, takers)[:CANDIDATES_MAX]:
                if unanswered(mine):
                    await self._remote(takers[worker], stored, unanswered(mine), tokens, end)

    def _left(self, end: float) -> float:
        return max(0.001, end - self._system.clock.monotonic())

    async def _local(
        self, socket: str, stored: Stored, items: list[Item], tokens: list[CommitToken], end: float
    ) -> None:
        timeout_s = self._left(end) * FIRST_SHARE
        try:
            async with self._links.local.use(socket, timeout_s=timeout_s) as link:
                tokens += await put_local(
                    link,
                    self._system.pool,
                    stored,
                    items,
                    staging_bytes=self._config.staging_bytes,
                    timeout_s=timeout_s,
                )
        except KVStoreError as error:
            if isinstance(error, DeadlineExceeded):
                self._links.local.hung.add(socket)
            self._failed(error)

    async def _remote(
        self, address: str, stored: Stored, items: list[Item], tokens: list[CommitToken], end: float
    ) -> None:
        try:
            async with self._links.remote.use(address, timeout_s=self._left(end)) as channel:
                raw, left_s = self._links.data.putter(address, channel), self._left(end)
                tokens += await put_remote(channel, self._system.pool, stored, items, timeout_s=left_s, raw=raw)
        except KVStoreError as error:
            if isinstance(error, DeadlineExceeded):
                self._links.remote.hung.add(address)
            self._failed(error)

    def _failed(self, error: KVStoreError) -> None:
        self._counters[f"errors_{type(error).__name__}"] += 1
        self._members.forget()  # the worker may have moved


def _groups(items: Sequence[Item]) -> Iterator[tuple[bytes, list[Item]]]:
    """Consecutive blocks of one placement group."""
    by_group: dict[bytes, list[Item]] = {}
    for item in items:
        by_group.setdefault(item.group, []).append(item)
    yield from by_group.items()
