"""Pins of matched blocks: made at the match, renewed before they expire, ended with the load. Nobody waits for them."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from kvstore.client.engine_face import EngineClient
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.options import Options
from kvstore.seams import Clock

TTL_S = 15.0
"""Life of a pin that is not renewed: what an engine that died leaves behind."""

RENEWALS = 3
"""A pin is renewed so often within its life: one renewal may be lost."""


class Keeper:
    """Keeps the blocks of plans where they are, one plan per request. Only the scheduler's thread calls in.

    A pin is a piece of work of the client's loop that lasts as long as the pin: it goes on while the engine computes a
    long step. At most `pins_max` at a time, each for `pin_max_s`: a block that goes before it is loaded is computed.
    """

    def __init__(self, options: Options, face: EngineClient, clock: Clock, counters: Counters) -> None:
        self._options, self._face, self._clock, self._counters = options, face, clock, counters
        self._kept: dict[str, tuple[HitPlan, Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request: str, plan: HitPlan) -> None:
        """Pin the plan's blocks; an earlier pin of the request ends after that. The same plan again changes nothing.
        Mutates."""
        earlier = self._kept.get(request)
        if earlier is not None and earlier[0] == plan and not earlier[1].done():
            return
        if earlier is None and len(self._kept) >= self._options.pins_max:
            self._counters.add("pins_refused")
            return
        before = None if earlier is None else earlier[1]
        work = self._face.submit_work(lambda client: self._hold(client, plan, before))
        if work is None:
            self._counters.add("pins_refused")
            return
        self._kept[request] = (plan, work)

    def let_go(self, request: str) -> None:
        """End the request's pin. Mutates; idempotent."""
        kept = self._kept.pop(request, None)
        if kept is not None:
            kept[1].cancel()

    async def _hold(self, client: KVClient, plan: HitPlan, before: Future[None] | None) -> None:
        """In the client's loop, until it is cancelled or `pin_max_s` is over. The pin `before` it ends once this one is
        made."""
        made = asyncio.ensure_future(client.pin(plan, ttl_s=TTL_S))
        try:
            try:
                pin = await asyncio.shield(made)
            finally:
                if before is not None:
                    before.cancel()
            end = self._clock.monotonic() + self._options.pin_max_s
            while pin.blocks and (left_s := end - self._clock.monotonic()) > 0:
                await asyncio.sleep(min(TTL_S / RENEWALS, left_s))
                if self._clock.monotonic() < end and not await client.renew(pin, ttl_s=TTL_S):
                    return  # its worker has forgotten it, or is gone: what is left ends by age
        finally:
            await client.unpin(await made)
