"""The scheduler's side: how much of a prompt is held, which pages to load into, which blocks to save.

It stands still for a lookup at most `lookup_wait_ms`; everything else is bookkeeping. Nothing here moves bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvstore.client.engine_face import EngineClient
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.keeping import Keeper
from kvstore.integrations.vllm.lookups import Lookups
from kvstore.integrations.vllm.metadata import Load, Report, Save, Step
from kvstore.integrations.vllm.options import Options
from kvstore.integrations.vllm.own import OwnSaves
from kvstore.integrations.vllm.requests import Tracked, track
from kvstore.integrations.vllm.telling import Teller
from kvstore.layout import block_bytes
from kvstore.seams import Clock

FAILURES_MAX = 2
"""Failed loads of one request, after which it is computed."""


class SchedulerSide:
    """State of all requests the scheduler has shown us. Only its thread calls in."""

    def __init__(self, identity: Identity, options: Options, face: EngineClient, clock: Clock) -> None:
        self._identity, self._options = identity, options
        self._spec = identity.spec
        self._ranks = len(identity.shards)
        self._row_bytes = max(sum(block_bytes(self._spec, shard) for shard in rank) for rank in identity.shards)
        self._synchronous = options.load == "sync" and len(identity.layouts) == 1
        self._requests: dict[str, Tracked] = {}
        self._adapters: dict[str, bytes] = {}
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
        self._own = OwnSaves(clock)
        self._lookups = Lookups(identity, options, face, clock, self.counters, self._own)
        self._keeper = Keeper(options, face, clock, self.counters)
        self._teller = Teller(identity, face, self.counters)

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
        keys = tracked.extend(request.num_tokens)
        self._teller.begins(tracked, keys)
        if tracked.lookup is None and self._lookups.waits_for_own(tracked, keys[first:limit]):
            return None, False
        plan = self._lookups.plan(tracked, keys)
        if plan is None:
            return None, False
        plan = tracked.plan = plan.shortened(limit)
        tokens = plan.blocks * size - computed
        if self._pays(plan.blocks - first, tokens):
            self._keeper.keep(tracked.id, plan)
            return tokens, not self._synchronous
        self._keeper.let_go(tracked.id)
        return 0, False

    def _track(self, request: Any) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is None and len(self._requests) < self._options.requests_max:
            tracked = track(request, self._spec, self._adapters)
            if tracked is not None:
                self._requests[tracked.id] = tracked
        return tracked

    def _pays(self, blocks: int, tokens: int) -> bool:
        """Whether there is enough to load, and loading is predicted to be faster than computing, by the rates measured
        so far."""
        if blocks < self._options.min_load_blocks or tokens <= 0:
            return False
        if self._prefill_tokens_s is None or self._load_bytes_s is None:
            return True
        bound_s = max(tokens / self._prefill_tokens_s, self._options.load_patience_ms / 1e3)
        if blocks * self._row_bytes / self._load_bytes_s < bound_s:
            return True
        self.counters.add("tokens_not_worth", tokens)
        return False

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

    def step(self, output: Any) -> Step:
        """What the workers have to load in the step that `output` describes, and whose pages change hands. Mutates."""
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
        return step

    def saves(self, output: Any) -> list[Save]:
        """Full blocks that are in the engine's pages once this step has run and were not offered yet. None while it is
        not known whether what they are computed on was really loaded. Mutates."""
        if not self._options.save or self._unconfirmed:
            return []
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
        self._own.begin(save, self._ranks)
        return save

    # --- what the workers report -----------------------------------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Mutates."""
        for step in [step for step in self._unconfirmed if step <= report.step]:
            self.loaded(self._unconfirmed.pop(step))
        self._own.ended(report.ended, report.commits)
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
                    self._lookups.failed(keys[depth])

    def loaded(self, requests: Iterable[str]) -> None:
        """Loads of these requests have ended, one way or the other. Mutates."""
        for request_id in requests:
            self._keeper.let_go(request_id)

    def finished(self, request: Any) -> bool:
        """The request is over. True: its pages are still read from, the workers will say when they are free."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False
        self._lookups.forget(tracked)
        self._keeper.let_go(tracked.id)
        self._teller.ended(tracked)
        if not tracked.saving:
            return False
        self._ended[tracked.id] = tracked.saving
        return True

    def take_counters(self) -> Counters | None:
        """Since the last call. Mutates."""
        return self.counters.take()
