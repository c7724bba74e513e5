"""Keeping a view: one Watch stream at a time, opened again when it breaks.

Where another coordinator stays clearly nearer, a second stream brings a view from there, and takes the place of the
first once it is whole: no lookup notices.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from kvstore.client.links import Coordinators
from kvstore.client.members import Members
from kvstore.client.plan import HitPlan
from kvstore.client.view import OwnCommits, View
from kvstore.client.writes import Stored
from kvstore.config import ClientConfig
from kvstore.errors import KVStoreError, Overloaded
from kvstore.layout import block_bytes
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.transport.methods import COORDINATOR
from kvstore.types import CommitToken, Fidelity, Keys
from kvstore.wire import coordinator_pb2

TOO_LARGE_WAITS = 10
"""Waits between two attempts where the server says that the namespace is too large, or has watchers enough."""

LEASE_S = 5.0
"""How long an own commit is believed without the view: by then its worker's lease is over, or it is announced."""


class Watching:
    """`start`, ask `match`, `close`. Where there is no fresh view, `match` says None: ask a coordinator."""

    def __init__(
        self, config: ClientConfig, system: System, coordinators: Coordinators, members: Members, counters: Counter[str]
    ) -> None:
        self._config, self._system, self._coordinators = config, system, coordinators
        self._members, self._counters = members, counters
        self._view: View | None = None
        self._heard = 0.0
        self._task: asyncio.Task[None] | None = None
        self._coming: asyncio.Task[None] | None = None  # the stream that is to take over
        self._nearer, self._nearer_since = "", 0.0  # the coordinator that is nearer, and since when
        self._own = OwnCommits(system.clock, LEASE_S, config.own_commits_max)

    def start(self) -> None:
        """Mutates; once."""
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Idempotent."""
        tasks = [task for task in (self._task, self._coming) if task is not None]
        self._task = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._view, self._coming = None, None

    @property
    def fresh(self) -> bool:
        """Whether there is a whole view that was heard of a short while ago. Pure."""
        view = self._view
        return (
            view is not None
            and view.ready
            and view.complete
            and self._system.clock.monotonic() - self._heard < self._config.watch_stale_s
        )

    def match(
        self,
        spec: ModelSpec,
        keys: Sequence[bytes],
        packed: Keys,
        shards: tuple[Shard, ...],
        least: Fidelity,
        after: Sequence[CommitToken],
    ) -> HitPlan | None:
        """From the view; None where it is not fresh or does not know a commit of `after`."""
        view = self._view
        if view is None or not self.fresh:
            return None
        if not all(view.applied(token) or self._own.has(token) for token in after):
            return None
        self._own.tidy(view)
        self._counters["matches_in_view"] += 1
        return view.match(spec, keys, packed, shards, least)

    def committed(self, stored: Stored, token: CommitToken, keys: list[bytes]) -> None:
        """This client has put blocks: its lookups see them from now on. Mutates."""
        if self._task is not None:
            nbytes = block_bytes(stored.spec, stored.shard)
            self._own.add(self._view, token, stored.spec, stored.shard, keys, stored.computed_on, nbytes)

    async def _run(self) -> None:
        while True:
            wait_s = self._config.watch_retry_s
            coming, self._coming = self._coming, None
            try:
                await (coming or self._watch(self._coordinators.first()))
            except Overloaded:
                self._counters["watch_refused"] += 1
                wait_s *= TOO_LARGE_WAITS
            except KVStoreError as error:
                self._counters[f"errors_{type(error).__name__}"] += 1
            if self._coming is None:
                self._view = None
                await asyncio.sleep(wait_s * (0.5 + self._system.rng.random()))

    async def _watch(self, address: str) -> None:
        """Until the stream ends, or another one has taken over. KVStoreError."""
        request = coordinator_pb2.WatchRequest(entries_max=self._config.watch_entries_max)

        async def one() -> AsyncIterator[coordinator_pb2.WatchRequest]:
            yield request

        view = View(self._config.watch_entries_max, self._config.own_commits_max)
        async with (
            self._coordinators.channel(address) as channel,
            aclosing(channel.stream(COORDINATOR["Watch"], one(), timeout_s=None)) as stream,
        ):
            current = False
            while True:
                try:
                    async with asyncio.timeout(self._quiet_s):
                        message = await anext(stream, None)
                except TimeoutError:
                    self._counters["watch_silent"] += 1
                    return
                if message is None or (current and self._view is not view):
                    return
                self._take(view, message)
                current = self._view is view
                if current:
                    self._look_around(address)

    def _look_around(self, address: str) -> None:
        """Begin to move where another coordinator was nearer than this one for `client.probe_s`: at most one at a time,
        and one try in that time. Mutates."""
        if self._coming is not None and not self._coming.done():
            return
        now, nearer = self._system.clock.monotonic(), self._coordinators.nearer(address)
        if self._coming is not None:  # it has ended before its view was whole
            if not self._coming.cancelled() and isinstance(error := self._coming.exception(), KVStoreError):
                self._counters[f"errors_{type(error).__name__}"] += 1
            self._coming, self._nearer = None, ""
        if nearer != self._nearer:
            self._nearer, self._nearer_since = nearer, now
        elif nearer and now - self._nearer_since >= self._config.probe_s:
            self._counters["watch_moves"] += 1
            self._coming = asyncio.ensure_future(self._watch(nearer))

    @property
    def _quiet_s(self) -> float:
        """A stream that is silent for longer has lost its server."""
        return 2 * self._config.watch_stale_s

    def _take(self, view: View, message: coordinator_pb2.WatchReply) -> None:
        view.take(message)
        if message.WhichOneof("body") == "state":
            self._coordinators.learn(message.state.coordinators)
        elif message.WhichOneof("body") == "member" and not message.member.gone:
            self._members.learn([message.member.member])
        if (self._view is None or (self._view is not view and view.complete)) and view.ready:
            self._own.lay_over(view)
            self._view = view
        if self._view is view:
            self._heard = self._system.clock.monotonic()
