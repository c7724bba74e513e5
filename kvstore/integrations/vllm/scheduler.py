"""The scheduler's side: how much of a prompt is held, which pages to load into, which blocks to save.

It stands still for a lookup at most `lookup_wait_ms`; everything else is bookkeeping. Nothing here moves bytes.
"""

from __future__ import annotations

import logging
from asyncio import wrap_future
from collections.abc import Iterable
from concurrent.futures import CancelledError
from typing import Any

from kvstore.client import KVClient
from kvstore.engine_face import EngineClient
from kvstore.errors import KVStoreError
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.metadata import Load, Report, Save, Step
from kvstore.integrations.vllm.options import Options
from kvstore.integrations.vllm.requests import Tracked, track
from kvstore.keys import Chain
from kvstore.layout import block_bytes
from kvstore.pinning import Pin
from kvstore.plan import HitPlan
from kvstore.recent import Recent
from kvstore.seams import Clock

logger = logging.getLogger("vllm.kvstore")

FAILURES_MAX = 2
"""Failed loads of one request, after which it is computed."""

PLAN_S = 1.0
"""How long a lookup's answer is used for a request that waits to be scheduled."""

FAILED_S = 5.0
FAILED_MAX = 65_536
"""Blocks that failed to load are not asked for again for a while."""


class SchedulerSide:
    """State of all requests the scheduler has shown us. Only its thread calls in."""

    def __init__(self, identity: Identity, options: Options, face: EngineClient, clock: Clock) -> None:
        self._identity, self._options, self._face, self._clock = identity, options, face, clock
        self._spec = identity.spec
        self._needed = identity.needed
        self._ranks = len(identity.shards)
        self._row_bytes = max(sum(block_bytes(self._spec, shard) for shard in rank) for rank in identity.shards)
        self._synchronous = options.load == "sync" and len(identity.layouts) == 1
        self._requests: dict[str, Tracked] = {}
        self._adapters: dict[str, bytes] = {}
        self._failed: Recent[bytes] = Recent(clock, FAILED_S, FAILED_MAX)
        self._loads: list[Load] = []  # to go out with the next step
        self._ended: dict[str, dict[int, int]] = {}  # finished requests to announce, with their saves
        self._saving: dict[int, tuple[str, dict[int, int]]] = {}  # save number -> its request
        self._number = 0  # last load or save
        self._step = 0  # last step built
        self._unconfirmed: dict[
            int, list[str]
        ] = {}  # steps with synchronous loads, of whom, whose end is not known yet
        self._prefill_tokens_s: float | None = None
        self._load_bytes_s: float | None = None
        self.counters = Counters()
        self.totals = Counters()  # of both sides, since the start
        self.lookup_seconds: list[float] = []  # that the scheduler stood still, the last ones

    # --- matching --------------------------------------------------------------------------------------------------

    def matched(self, request: Any, computed: int, wanted: bool = True) -> tuple[int | None, bool]:
        """Tokens held beyond the `computed` ones, and whether they load between steps. (None, False): ask again.

        Not `wanted`: the request is only followed, for its saves. Mutates."""
        tracked = self._track(request)
        size = self._spec.block_tokens
        limit = (request.num_tokens - 1) // size  # the last token is always computed: its logits are wanted
        first = computed // size
        if (
            not wanted
            or tracked is None
            or tracked.failures >= FAILURES_MAX
            or limit - first < self._options.min_load_blocks
        ):
            return 0, False
        plan = self._lookup(tracked, tracked.extend(request.num_tokens)[:limit])
        if plan is None:
            return None, False
        tokens = plan.blocks * size - computed
        if plan.blocks - first < self._options.min_load_blocks or tokens <= 0:
            return 0, False
        if not self._worth(plan.blocks - first, tokens):
            self.counters.add("tokens_not_worth", tokens)
            return 0, False
        return tokens, not self._synchronous

    def _track(self, request: Any) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is None and len(self._requests) < self._options.requests_max:
            tracked = track(request, self._spec, self._adapters)
            if tracked is not None:
                self._requests[tracked.id] = tracked
        return tracked

    def _lookup(self, tracked: Tracked, keys: list[bytes]) -> HitPlan | None:
        """The store's answer for these keys; None while it is still out. Mutates `tracked`."""
        now = self._clock.monotonic()
        if tracked.plan is not None and now - tracked.plan_at < PLAN_S:
            return tracked.plan.shortened(len(keys))
        wait_s = 0.0
        if tracked.lookup is None:
            tracked.lookup, tracked.lookup_at = self._face.submit_work(self._asking(keys)), now
            if tracked.lookup is None:
                return HitPlan(self._spec, (), self._needed)  # too much in flight
            self.counters.add("lookups")
            wait_s = self._options.lookup_wait_ms / 1e3
        plan = self._answer(tracked, wait_s)
        self.lookup_seconds = [*self.lookup_seconds[-4095:], self._clock.monotonic() - now]
        if plan is None:
            return None
        known = next((depth for depth, key in enumerate(plan.keys) if key in self._failed), plan.blocks)
        tracked.lookup, tracked.plan, tracked.plan_at = None, plan.shortened(known), now
        self._pin(tracked)
        tracked.saved = max(tracked.saved, tracked.plan.blocks)
        return tracked.plan

    def _pin(self, tracked: Tracked) -> None:
        """Have the plan's blocks kept while the request waits and loads. Nobody waits for the pin: a block that goes
        before it is kept is computed. Mutates."""
        plan = tracked.plan
        self._unpin(tracked)
        if plan is None or not plan.blocks:
            return

        async def keep(client: KVClient) -> Pin:
            return await client.pin(plan)

        tracked.pin = self._face.submit_work(keep)

    def _unpin(self, tracked: Tracked) -> None:
        """End the request's pin, once it is known. Mutates."""
        pin, tracked.pin = tracked.pin, None
        if pin is None:
            return

        async def let_go(client: KVClient) -> None:
            await client.unpin(await wrap_future(pin))

        self._face.submit_work(let_go)

    def loaded(self, requests: Iterable[str]) -> None:
        """Loads of these requests have ended, one way or the other. Mutates."""
        for request_id in requests:
            tracked = self._requests.get(request_id)
            if tracked is not None:
                self._unpin(tracked)

    def _asking(self, keys: list[bytes]) -> Any:
        prefix = Chain(self._spec, list(keys))
        timeout_s = self._options.lookup_timeout_ms / 1e3

        async def ask(client: KVClient) -> HitPlan:
            return await client.match(self._spec, prefix, self._needed, timeout_s=timeout_s)

        return ask

    def _answer(self, tracked: Tracked, wait_s: float) -> HitPlan | None:
        assert tracked.lookup is not None, "no lookup was made"
        try:
            return tracked.lookup.result(wait_s)
        except (KVStoreError, CancelledError) as error:
            logger.warning("a lookup failed and is taken as a miss: %s", error)
            self.counters.add("errors")
        except TimeoutError:
            late_s = self._clock.monotonic() - tracked.lookup_at
            if not tracked.lookup.done() and late_s < self._options.lookup_timeout_ms / 1e3:
                return None
            tracked.lookup.cancel()
            self.counters.add("lookups_late")
        return HitPlan(self._spec, (), self._needed)

    def _worth(self, blocks: int, tokens: int) -> bool:
        """Whether loading is predicted to be faster than computing, by the rates measured so far."""
        if self._prefill_tokens_s is None or self._load_bytes_s is None:
            return True
        bound_s = max(tokens / self._prefill_tokens_s, self._options.load_patience_ms / 1e3)
        return blocks * self._row_bytes / self._load_bytes_s < bound_s

    # --- loads and saves -------------------------------------------------------------------------------------------

    def allocated(self, request: Any, page_ids: tuple[list[int], ...], tokens: int) -> None:
        """The engine gave pages for `tokens` held ones: they go into the next step's loads."""
        tracked = self._requests.get(request.request_id)
        if tokens <= 0 or tracked is None or tracked.plan is None:
            return
        end = tracked.plan.blocks * self._spec.block_tokens
        begin = end - tokens
        first, skip = divmod(begin, self._spec.block_tokens)
        pages = tuple(
            tuple(ids[begin // layout.page_tokens : end // layout.page_tokens])
            for ids, layout in zip(page_ids, self._identity.layouts, strict=True)
        )
        self._number += 1
        self._loads.append(Load(self._number, tracked.id, tracked.plan, first, skip, pages, self._synchronous))
        tracked.plan = None
        self.counters.add("tokens_matched", tokens)

    def step(self, output: Any, save: bool = True) -> Step:
        """What the workers have to do in the step that `output` describes. Mutates."""
        self._step += 1
        loads, self._loads = self._loads, []
        synchronous = [load.request for load in loads if load.synchronous]
        if synchronous:
            self._unconfirmed[self._step] = synchronous
        step = Step(
            number=self._step,
            root=self._spec.root,
            tokens=output.total_num_scheduled_tokens,
            loads=loads,
            preempted=tuple(sorted(output.preempted_req_ids or ())),
            ended=tuple(self._ended),
        )
        self._ended = {}
        if save and self._options.save and not self._unconfirmed:
            step.saves = self._saves(output)
        return step

    def _saves(self, output: Any) -> list[Save]:
        """Full blocks that are in the engine's pages once this step has run and were not offered yet."""
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        saves = []
        for request_id, before in computed.items():
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            after = before + output.num_scheduled_tokens.get(request_id, 0)
            known = min(after, tracked.prompt_tokens)
            if self._options.save_decode:  # tokens not yet sampled, or only guessed, are not saved
                known = max(known, min(before, tracked.request.num_tokens))
            ready = known // self._spec.block_tokens
            if ready > tracked.saved:
                page_ids = output.kv_connector_block_state.get_block_ids(request_id)
                keys = tracked.extend(known)
                first = self._first_whole(tracked.saved, ready, page_ids)
                tracked.saved = ready
                if first < ready:
                    saves.append(self._save(tracked, keys, first, ready, page_ids))
        return saves

    def _first_whole(self, first: int, ready: int, page_ids: tuple[list[int], ...]) -> int:
        """The block from which on no page was given back because it left a window (page 0 is the null page)."""
        for ids, layout in zip(page_ids, self._identity.layouts, strict=True):
            pages = self._spec.block_tokens // layout.page_tokens
            gone = [at for at in range(first * pages, ready * pages) if ids[at] == 0]
            first = max([first, *(at // pages + 1 for at in gone)])
        return first

    def _save(
        self, tracked: Tracked, keys: list[bytes], first: int, ready: int, page_ids: tuple[list[int], ...]
    ) -> Save:
        size = self._spec.block_tokens
        known = max(0, first - first % self._spec.group_blocks - 1)
        pages = tuple(
            tuple(ids[first * size // layout.page_tokens : ready * size // layout.page_tokens])
            for ids, layout in zip(page_ids, self._identity.layouts, strict=True)
        )
        self._number += 1
        save = Save(self._number, tracked.id, first, ready - first, known, tuple(keys[known:ready]), pages)
        tracked.saving[save.number] = self._ranks
        self._saving[save.number] = (tracked.id, tracked.saving)
        return save

    # --- what the workers report -----------------------------------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Mutates."""
        for step in [step for step in self._unconfirmed if step <= report.step]:
            self.loaded(self._unconfirmed.pop(step))
        self._prefill_tokens_s = report.prefill_tokens_s or self._prefill_tokens_s
        self._load_bytes_s = report.load_bytes_s or self._load_bytes_s
        for number, ranks in report.saved.items():
            entry = self._saving.get(number)
            if entry is not None:
                entry[1][number] -= ranks
                if entry[1][number] <= 0:
                    del entry[1][number], self._saving[number]
        for request_id, depth in report.failed.items():
            tracked = self._requests.get(request_id)
            if tracked is not None:
                tracked.saved = min(tracked.saved, depth)
                tracked.plan = None
                tracked.failures += 1
                keys = tracked.builder.chain.keys
                if depth < len(keys):
                    self._failed.add(keys[depth])

    def finished(self, request: Any) -> bool:
        """The request is over. True: its pages are still read from, the workers will say when they are free."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False
        if tracked.lookup is not None:
            tracked.lookup.cancel()
        self._unpin(tracked)
        if not tracked.saving:
            return False
        self._ended[tracked.id] = tracked.saving
        return True

    def take_counters(self) -> Counters | None:
        """Since the last call. Mutates."""
        return self.counters.take()
