"""The scheduler's questions to the store: lookups it waits for a few milliseconds. They know what this engine saved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

from kvstore.client.engine_face import EngineClient
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.errors import KVStoreError
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.options import Options
from kvstore.integrations.vllm.own import OwnSaves
from kvstore.integrations.vllm.requests import Tracked
from kvstore.keys import Chain
from kvstore.recent import Recent
from kvstore.seams import Clock
from kvstore.types import CommitToken

logger = logging.getLogger("vllm.kvstore")

PLAN_S = 1.0
"""How long a lookup's answer is used for a request that waits to be scheduled."""

FAILED_S = 5.0
FAILED_MAX = 65_536
"""Blocks that failed to load are not asked for again for a while."""

POLL_S = 0.001
"""A scheduler that asks again gives the client's thread so long to run: an idle one asks at once."""


class Lookups:
    """Plans of requests. Only the scheduler's thread calls in."""

    def __init__(
        self, identity: Identity, options: Options, face: EngineClient, clock: Clock, counters: Counters, own: OwnSaves
    ) -> None:
        self._spec, self._needed = identity.spec, identity.needed
        self._options, self._face, self._clock, self._counters = options, face, clock, counters
        self._failed: Recent[bytes] = Recent(clock, FAILED_S, FAILED_MAX)
        self._own = own

    def failed(self, key: bytes) -> None:
        """This block could not be loaded: plans end before it for a while. Mutates."""
        self._failed.add(key)

    def waits_for_own(self, tracked: Tracked, keys: Sequence[bytes]) -> bool:
        """Whether this engine is just storing some of these blocks: asked again in a moment, the store has them.
        Bounded per request by `own_saves_wait_ms`. Mutates `tracked`."""
        if not self._own.storing(keys):
            return False
        now = self._clock.monotonic()
        if tracked.own_since is None:
            tracked.own_since = now
            self._counters.add("lookups_after_own_saves")
        return now - tracked.own_since < self._options.own_saves_wait_ms / 1e3

    def plan(self, tracked: Tracked, keys: list[bytes]) -> HitPlan | None:
        """The store's answer for these keys; None while it is still out. Mutates `tracked`."""
        now = self._clock.monotonic()
        if tracked.plan is not None and now - tracked.plan_at < PLAN_S:
            return tracked.plan.shortened(len(keys))
        wait_s = POLL_S
        if tracked.lookup is None:
            shown = self._own.shown(keys)
            tracked.lookup, tracked.lookup_at = self._face.submit_work(self._asking(keys, shown)), now
            if tracked.lookup is None:
                return HitPlan(self._spec, (), self._needed)  # too much in flight
            self._own.told(shown)
            self._counters.add("lookups")
            wait_s = self._options.lookup_wait_ms / 1e3
        plan = self._answer(tracked, wait_s)
        self._counters.add("seconds_waiting", self._clock.monotonic() - now)
        if plan is None:
            return None
        known = next((depth for depth, key in enumerate(plan.keys) if key in self._failed), plan.blocks)
        plan = plan.shortened(known)
        tracked.lookup, tracked.plan, tracked.plan_at = None, plan, now
        tracked.saved = max(tracked.saved, plan.blocks)
        return plan

    def _asking(self, keys: list[bytes], shown: Sequence[CommitToken]) -> Any:
        prefix = Chain(self._spec, list(keys))
        timeout_s = self._options.lookup_timeout_ms / 1e3

        async def ask(client: KVClient) -> HitPlan:  # the client shows the commits again until they are known
            return await client.match(self._spec, prefix, self._needed, after=shown, timeout_s=timeout_s)

        return ask

    def _answer(self, tracked: Tracked, wait_s: float) -> HitPlan | None:
        assert tracked.lookup is not None, "no lookup was made"
        try:
            return tracked.lookup.result(wait_s)
        except (KVStoreError, CancelledError) as error:
            logger.warning("a lookup failed and is taken as a miss: %s", error)
            self._counters.add("errors")
        except TimeoutError:
            late_s = self._clock.monotonic() - tracked.lookup_at
            if not tracked.lookup.done() and late_s < self._options.lookup_timeout_ms / 1e3:
                return None
            tracked.lookup.cancel()
            self._counters.add("lookups_late")
        return HitPlan(self._spec, (), self._needed)

    def forget(self, tracked: Tracked) -> None:
        """The request is over. Mutates."""
        if tracked.lookup is not None:
            tracked.lookup.cancel()
