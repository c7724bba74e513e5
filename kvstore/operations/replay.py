"""Driving a trace through the service: match, get, check every byte, put what was missing.

Hits per tier are what the workers counted; that the bytes are right is checked here, against `payload.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.client.kv_client import KVClient
from kvstore.keys import Chain, chain
from kvstore.operations.observe import Observer
from kvstore.operations.payload import Payload, replay_spec, tokens_of
from kvstore.operations.trace import Request
from kvstore.policies.usage import Finish, Use
from kvstore.seams import Clock
from kvstore.types import Tier

TIERS = ("hot", "host", "ssd", "redis")
PUT_BLOCKS_MAX = 256  # made and put at a time
PUT_TRIES, PUT_PAUSE_S = 12, 0.02


FINISHES = {"tool_use": Finish.TOOL_USE, "end_turn": Finish.END_TURN, "other": Finish.OTHER}


def use_of(request: Request) -> Use:
    """What a trace tells of a request, as an engine would tell it."""
    return Use(
        output_tokens=request.output_tokens,
        finish=FINISHES.get(request.finish, Finish.UNKNOWN),
        time_s=request.timestamp_ms / 1000,
        blocks=len(request.hash_ids),
    )


@dataclass(slots=True)
class Tally:
    """Counts of one half of the requests."""

    requests: int = 0
    blocks: int = 0
    stored: int = 0
    wrong: int = 0
    misses: int = 0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    delivered: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))  # as the clients saw it

    def counts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "requests": self.requests,
            "blocks": self.blocks,
            "stored": self.stored,
            "wrong": self.wrong,
            "hits": dict(self.hits),
            "misses": self.misses,
        }

    def plus(self, other: Tally) -> Tally:
        """The sum, a new one."""
        both = Tally(
            *(getattr(self, n) + getattr(other, n) for n in ("requests", "blocks", "stored", "wrong", "misses"))
        )
        both.hits = {tier: self.hits[tier] + other.hits[tier] for tier in TIERS}
        both.delivered = {tier: self.delivered[tier] + other.delivered[tier] for tier in TIERS}
        return both


class Replay:
    """One run. `clients`: each beside another worker; requests go to them in turn."""

    def __init__(
        self,
        clients: Sequence[KVClient],
        observer: Observer,
        clock: Clock,
        *,
        block_bytes: int,
        concurrency: int,
        pace: bool = False,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._clients, self._observer, self._clock = clients, observer, clock
        self._concurrency, self._pace, self._progress = concurrency, pace, progress
        self._spec = replay_spec(block_bytes)
        self._payload = Payload(block_bytes)
        self._get_ms: list[float] = []
        self._next = 0

    async def run(self, requests: Iterator[Request], first_half: int) -> dict[str, Any]:
        """The object of `kvstore replay --json`. The first `first_half` requests end before the others begin, so that
        the workers' counters can be read in between."""
        began = self._clock.monotonic()
        before = await self._hits()
        first = await self._half(requests, first_half, began)
        between = await self._hits()
        second = await self._half(requests, None, began)
        after = await self._hits()
        first.hits = {tier: between[tier] - before[tier] for tier in TIERS}
        second.hits = {tier: after[tier] - between[tier] for tier in TIERS}
        waits = sorted(self._get_ms)
        return first.plus(second).counts() | {
            "second_half": second.counts(),
            "seconds": round(self._clock.monotonic() - began, 3),
            "get_ms_p50": _quantile(waits, 0.50),
            "get_ms_p99": _quantile(waits, 0.99),
        }

    async def _half(self, requests: Iterator[Request], count: int | None, began: float) -> Tally:
        tally = Tally()
        taken = 0

        async def drive() -> None:
            nonlocal taken
            while count is None or taken < count:
                taken += 1
                request = next(requests, None)
                if request is None:
                    return
                client = self._clients[self._next % len(self._clients)]
                self._next += 1
                if self._pace:
                    await self._until(request, began)
                await self._one(client, request, tally)
                self._progress()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._concurrency):
                tasks.create_task(drive())
        return tally

    async def _until(self, request: Request, began: float) -> None:
        await asyncio.sleep(max(0.0, began + request.timestamp_ms / 1000 - self._clock.monotonic()))

    async def _one(self, client: KVClient, request: Request, tally: Tally) -> None:
        tally.requests += 1
        tally.blocks += len(request.hash_ids)
        if not request.hash_ids:
            return
        prompt = chain(self._spec, tokens_of(request.hash_ids))
        await client.hint(self._spec, prompt, use=use_of(request))
        plan = await client.match(self._spec, prompt)
        held = 0
        if plan.blocks:
            began = self._clock.monotonic()
            got = await client.get(plan)
            self._get_ms.append((self._clock.monotonic() - began) * 1000)
            held = got.blocks
            for depth, tier in enumerate(got.tiers[0]):
                if tier is not None:
                    tally.delivered[Tier(tier).name.lower()] += 1
                    tally.wrong += not self._payload.check(prompt.keys[depth], got.buffers[0][depth])
        tally.misses += len(prompt) - held
        await self._store(client, prompt, held, tally)

    async def _store(self, client: KVClient, prompt: Chain, first: int, tally: Tally) -> None:
        """Put the rest of a prompt. Unpaced, the driver goes as fast as the service takes blocks: what was dropped is
        put again after a pause, a bounded number of times. Paced, time does not wait for the service."""
        for begin in range(first, len(prompt), PUT_BLOCKS_MAX):
            end = min(begin + PUT_BLOCKS_MAX, len(prompt))
            for attempt in range(1 if self._pace else PUT_TRIES):
                blocks = [self._payload.make(key) for key in prompt.keys[begin:end]]
                states = (await client.put(self._spec, prompt, blocks, begin)).states
                tally.stored += states.count("committed")
                if "dropped" not in states:
                    break
                begin += states.index("dropped")
                await asyncio.sleep(PUT_PAUSE_S * (attempt + 1))

    async def _hits(self) -> dict[str, int]:
        """Blocks served per tier so far, over all workers."""
        counted = dict.fromkeys(TIERS, 0)
        coordinators = self._clients[0].config.coordinators
        for member in (await self._observer.members(coordinators[0])).members:
            if not member.address:
                continue  # Redis: its blocks are served, and counted, by workers
            for tier in (await self._observer.worker_status(member.address)).tiers:
                counted[Tier(tier.tier).name.lower()] += tier.hits
        return counted


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """Of sorted values; None of none. Pure."""
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
