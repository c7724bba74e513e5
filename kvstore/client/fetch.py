"""The loop of a get: every needed block from its nearest holder, then the next holder, the next tier, then a miss."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvstore.client.host_link import HostLink
from kvstore.client.links import Links
from kvstore.client.needs import Need, Progress
from kvstore.client.pieces import LATER, Asked, Piece, span_of
from kvstore.client.plan import HitPlan, PlanRun, is_redis, stored_shards, ways
from kvstore.client.prefetching import request_for, wanted_of
from kvstore.client.rates import Rates
from kvstore.client.sources import read_local
from kvstore.client.stream_source import read_remote
from kvstore.client.targets import Target
from kvstore.config import ClientConfig
from kvstore.directory.matching import Cover, make_plan
from kvstore.directory.membership import Member
from kvstore.errors import DeadlineExceeded, KVStoreError, Unavailable
from kvstore.layout import block_bytes
from kvstore.recent import Recent
from kvstore.seams import System
from kvstore.spec import Shard
from kvstore.transport.methods import WORKER_LOCAL
from kvstore.types import Fidelity, Tier

Failed = tuple[str, bytes, bytes]
"""(holder, stored shard, key) that failed."""

CALL_BLOCKS_MAX = 4096
"""Blocks asked for in one call."""

_NEARNESS = {Tier.HOT: 0, Tier.HOST: 1, Tier.SSD: 4, Tier.REDIS: 7}
FIRST_SHARE = 0.4
"""Of the time that is left, what an attempt gets when another one could follow: a holder that hangs leaves time."""

RESUMES_MAX = 2
"""Times that a broken stream goes on, within one attempt at a holder."""

_REMOTE = 2
"""What another host adds: its memory is nearer than this host's disk."""


@dataclass(frozen=True, slots=True)
class Route:
    """How to reach a holder's blocks: a socket on this host or an address elsewhere."""

    socket: str
    address: str
    through: str = ""  # a holder elsewhere: the worker of this host is to pull from it first


class Fetch:
    """One get. `run` returns when every need is delivered or missed; cancelled, it waits for byte movers first."""

    def __init__(
        self,
        plan: HitPlan,
        namespace: str,
        needs: Sequence[Need],
        *,
        links: Links,
        system: System,
        config: ClientConfig,
        failed: Recent[Failed],
        sockets: Sequence[str],
        addresses: Sequence[str],
        counters: Counter[str],
        end: float,
        rates: Rates,
        layers: range | None = None,
        planes: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._plan, self._needs = plan, needs
        self._links, self._system, self._config = links, system, config
        self._failed, self._counters, self._end = failed, counters, end
        self._progress, self._rates = progress, rates
        self._asked = Asked(
            namespace,
            plan.spec,
            plan.least,
            layers=layers,
            planes=planes,
            layerwise=progress is not None,
            verify=config.verify_memory,
        )
        self._any = [*(Route(socket, "") for socket in sockets), *(Route("", address) for address in addresses)]
        self._stored = stored_shards(plan)
        self._runs: dict[Shard, list[PlanRun]] = {shard: [] for shard in self._stored}
        for run in sorted(plan.runs, key=self._distance):
            self._runs[run.shard].append(run)
        self._last: Shard | None = None
        self._last_runs: list[PlanRun] = []
        self._covers: dict[Shard, Cover] = {}  # of shards that nobody has whole
        self._owners: dict[int, Need] = {}  # piece identity -> its need, while open
        self._sizes = {shard: block_bytes(plan.spec, shard) for shard in self._stored}
        self._alone = len({run.holder for run in plan.runs}) == 1  # nobody else to ask

    async def run(self) -> None:
        pieces = [piece for need in self._needs for piece in self._begin(need)]
        await self._dispatch(pieces)
        self._look()

    def _look(self) -> None:
        if self._progress is not None:
            self._progress.look()

    def _distance(self, run: PlanRun) -> int:
        holder = self._plan.holders.get(run.holder)
        here = holder is not None and (is_redis(holder.id) or self._here(holder))
        return _NEARNESS[run.tier] + (0 if here else _REMOTE)

    def _here(self, member: Member) -> bool:
        return bool(member.socket) and member.host == self._system.host

    def _begin(self, need: Need) -> list[Piece]:
        """Pieces that together make the need; none, and the need is a miss, where nothing covers it."""
        depth, target = need.depth, need.target
        if self._runs_of(need.shard) and self._have(need, need.shard):
            chosen = [need.shard]  # then nothing is better
        else:
            have = partial(self._have, need)
            if need.shard not in self._covers:
                self._covers[need.shard] = make_plan(self._plan.spec, [need.shard], self._stored).covers[0]
            chosen = ways(need.shard, self._stored, self._covers[need.shard], have)
        need.failed, need.tier, need.fidelity = not chosen, None, Fidelity.EXACT
        key, spec = self._plan.keys[depth], self._plan.spec
        if need.wanted is not need.shard:  # only layers that are asked for
            chosen = [shard for shard in chosen if shard.overlap(need.wanted) is not None]
        if target.whole is None and any(span_of(spec, shard, need.wanted) is None for shard in chosen):
            need.aside = bytearray(target.nbytes)
            target = Target([memoryview(need.aside)])
        pieces = need.pieces = [Piece(shard, need.wanted, depth, key, target) for shard in chosen]
        for piece in pieces:
            need.open[id(piece)] = piece
            self._owners[id(piece)] = need
        return pieces

    def _have(self, need: Need, shard: Shard) -> bool:
        """Whether somebody may still give a stored shard for a need."""
        return not (need.lost and shard in need.lost) and self._next(shard, need.depth, ()) is not None

    def _runs_of(self, shard: Shard) -> list[PlanRun]:
        """Who has a stored shard, the nearest first. Neighbours mostly share one object: its hash is taken once."""
        if shard is not self._last:
            self._last, self._last_runs = shard, self._runs.get(shard, [])
        return self._last_runs

    def _next(self, shard: Shard, depth: int, tried: Sequence[str] | dict[str, None]) -> str | None:
        """The nearest holder of a stored block that was not tried and did not fail lately."""
        failed, holders = self._failed, self._plan.holders
        any_failed = len(failed) > 0
        for run in self._runs_of(shard):
            holder = run.holder
            if not run.first_depth <= depth < run.first_depth + run.count or holder in tried:
                continue
            if holder in holders and not (any_failed and (holder, shard.digest, self._plan.keys[depth]) in failed):
                return holder
        return None

    async def _dispatch(self, pieces: Sequence[Piece]) -> None:
        """Read all pieces, each from its next holder, all holders at once."""
        by_holder: dict[str, list[Piece]] = {}
        for piece in pieces:
            holder = self._next(piece.shard, piece.depth, piece.tried)
            assert holder is not None, "a piece without a holder was dispatched"
            piece.tried[holder] = None
            by_holder.setdefault(holder, []).append(piece)
        if len(by_holder) == 1:
            [(holder, mine)] = by_holder.items()
            await self._serve(holder, mine)
        elif by_holder:
            async with asyncio.TaskGroup() as group:
                for holder, mine in by_holder.items():
                    group.create_task(self._serve(holder, mine))

    async def _serve(self, holder: str, pieces: list[Piece]) -> None:
        """Read pieces from one holder in bounded calls; what fails goes on to the next one."""
        waiting = deque(self._batches(pieces))
        while waiting:
            batch = waiting.popleft()
            try:
                await self._read(holder, batch)
            except asyncio.CancelledError:
                if (
                    self._system.clock.monotonic() >= self._end
                ):  # else the caller gave up, which says nothing of the holder
                    self._blame(holder, batch)  # the next lookup looks elsewhere
                raise
            later = [piece for piece in batch if piece.tier is None and piece.problem == LATER]
            tried = [piece for piece in batch if piece.tier is not None or piece.problem != LATER]
            if not tried:  # no progress: that holder will not do
                later, tried = [], batch
            self._blame(holder, tried)
            if later:
                waiting.appendleft(later)
            again = [piece for done in tried for piece in self._settle(done)]
            self._look()
            await self._dispatch(again)

    def _blame(self, holder: str, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.tier is None:
                self._failed.add((holder, piece.shard.digest, piece.key))

    def _settle(self, piece: Piece) -> list[Piece]:
        """Note how an attempt ended; what is to be read now."""
        need = self._owners[id(piece)]
        if piece.tier is None:
            self._counters[f"failed_{piece.problem or 'unanswered'}"] += 1
            if self._next(piece.shard, piece.depth, piece.tried) is not None:
                return [piece]
            need.lost[piece.shard] = None
            need.failed = True
        del need.open[id(piece)], self._owners[id(piece)]
        if piece.tier is not None:
            need.tier = max(need.tier or piece.tier, piece.tier)
            need.fidelity = min(need.fidelity, piece.fidelity)
        if need.open:
            return []  # others still write to the target: begin anew only when they are done
        if need.delivered and need.aside is not None:
            need.target.fill(0, need.aside)
            need.aside = None
        return self._begin(need) if need.failed and not need.shown else []

    def _batches(self, pieces: list[Piece]) -> list[list[Piece]]:
        limit = max(1, self._config.inflight_bytes_max // 4)
        batches: list[list[Piece]] = [[]]
        nbytes = 0
        last: Shard | None = None
        size = 0
        for piece in pieces:
            if piece.shard is not last:
                last, size = piece.shard, self._sizes[piece.shard]
            if batches[-1] and (nbytes + size > limit or len(batches[-1]) >= CALL_BLOCKS_MAX):
                batches.append([])
                nbytes = 0
            batches[-1].append(piece)
            nbytes += size
        return batches

    async def _read(self, holder: str, pieces: list[Piece]) -> None:
        """One call to one holder. Service trouble is counted and leaves its pieces undelivered."""
        routes = self._routes(holder)
        others = not self._alone and any(
            self._next(piece.shard, piece.depth, piece.tried) is not None for piece in pieces
        )
        for index, route in enumerate(routes):
            left = self._end - self._system.clock.monotonic()
            if left <= 0:
                return
            if others or index + 1 < len(routes):
                left *= FIRST_SHARE
            begun = self._system.clock.monotonic()
            try:
                await self._resuming(route, pieces, left)
                self._measured(holder, pieces, self._system.clock.monotonic() - begun)
                pieces = [piece for piece in pieces if piece.tier is None]
                if not route.through or not pieces:
                    return
                continue  # what this host's worker did not get is read where it is
            except DeadlineExceeded:
                self._counters["errors_DeadlineExceeded"] += 1
                (self._links.local if route.socket else self._links.remote).hung.add(route.socket or route.address)
                if not is_redis(holder):
                    return  # it hangs: another way to the same worker would too
            except KVStoreError as error:  # a refusal too: the caller's arguments were checked before
                self._counters[f"errors_{type(error).__name__}"] += 1
            if any(piece.tier is not None for piece in pieces):
                return  # it did answer: what is left is tried elsewhere

    def _measured(self, holder: str, pieces: Sequence[Piece], seconds: float) -> None:
        came = [piece for piece in pieces if piece.tier is not None]
        if came:
            slowest = max(piece.tier for piece in came if piece.tier is not None)
            self._rates.note(holder, slowest, sum(piece.target.nbytes for piece in came), seconds)

    async def _resuming(self, route: Route, pieces: list[Piece], timeout_s: float) -> None:
        """Read; a stream that breaks after it brought something goes on where it broke, on a new connection."""
        end = self._system.clock.monotonic() + timeout_s
        for attempt in range(RESUMES_MAX + 1):
            missing = [piece for piece in pieces if piece.tier is None]
            if not missing:
                return
            before = sum(piece.chunks for piece in missing)
            try:
                await self._by(route, missing, end - self._system.clock.monotonic())
                return
            except Unavailable:
                left = [piece for piece in missing if piece.tier is None]
                came = len(left) < len(missing) or sum(piece.chunks for piece in left) > before
                if route.socket or not came or attempt == RESUMES_MAX or self._system.clock.monotonic() >= end:
                    raise
                self._counters["streams_resumed"] += 1

    async def _by(self, route: Route, pieces: list[Piece], timeout_s: float) -> None:
        pool, asked, look = self._system.pool, self._asked, self._look
        if route.socket:
            async with self._links.local.use(route.socket, timeout_s=timeout_s) as link:
                if route.through:
                    timeout_s = await self._through(link, route.through, pieces, timeout_s)
                await read_local(link, pool, asked, pieces, timeout_s=timeout_s, arrived=look)
        else:
            async with self._links.remote.use(route.address, timeout_s=timeout_s) as channel:
                raw = self._links.data.getter(route.address, channel)
                await read_remote(channel, pool, asked, pieces, timeout_s=timeout_s, arrived=look, raw=raw)

    async def _through(self, link: HostLink, holder: str, pieces: Sequence[Piece], timeout_s: float) -> float:
        """Have the worker of this host pull the pieces, once for all who ask; the time that is left."""
        begun = self._system.clock.monotonic()
        wanted = wanted_of(self._plan, ((piece.shard, piece.depth) for piece in pieces), [holder])
        request = request_for(self._plan, wanted, redis=False, timeout_s=timeout_s)
        reply = await link.call(WORKER_LOCAL["Prefetch"], request, timeout_s=timeout_s)
        self._counters["pulled_through"] += reply.pulled
        return max(0.001, timeout_s - (self._system.clock.monotonic() - begun))

    def _routes(self, holder: str) -> list[Route]:
        """Ways to the holder's blocks, the best first. Redis is read through any worker, at most two of them."""
        if not is_redis(holder):
            member = self._plan.holders[holder]
            here = [Route(member.socket, "")] if self._here(member) else []
            if not here and self._config.pull_through:
                here = [Route(route.socket, "", holder) for route in self._any[:1] if route.socket]
            return [*here, *([Route("", member.address)] if member.address else [])]
        return self._any[:2]
