"""The workers' side: loads into the engine's pages and saves out of them, as work of the client's loop.

Called once or more a step by the model runner. It waits only for a synchronous load, within its deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from kvstore.client.engine_face import EngineClient
from kvstore.integrations.vllm.buffers import Rows
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.jobs import SAVES_WAITING, LoadJob, SaveJob, Store
from kvstore.integrations.vllm.metadata import Report, Step
from kvstore.integrations.vllm.options import Options
from kvstore.integrations.vllm.pages import Pages
from kvstore.integrations.vllm.rates import Rates
from kvstore.seams import Clock

logger = logging.getLogger("vllm.kvstore")

IDLE_WAIT_S = 0.005
"""A step without tokens waits so long for a load (without one: a save) to end, instead of asking again at once."""

OVERDUE_S = 0.1
"""After its deadline a load ends by itself; so long later it is given up, whatever holds the client's thread."""


class WorkerSide:
    """Loads and saves of one rank. Only the model runner's thread calls in."""

    def __init__(self, identity: Identity, rank: int, options: Options, face: EngineClient, clock: Clock) -> None:
        self._identity, self._options, self._face, self._clock = identity, options, face, clock
        self._shards = identity.shards[rank]
        self._store: Store | None = None  # until the engine has made its pages
        self._loads: dict[int, LoadJob] = {}
        self._saves: dict[int, SaveJob] = {}
        self._ending: dict[str, None] = {}  # finished requests to report once their pages are free
        self._arrived: dict[str, None] = {}  # asynchronous loads to report
        self._errors: set[int] = set()  # page ids
        self._failed_requests: set[str] = set()
        self._report = Report()
        self._rates = Rates(clock)
        self._block_by_page = len(identity.layouts) == 1  # page ids name a page only within one group
        self.counters = Counters()

    def register(self, caches: Mapping[str, Any], page_count: int) -> None:
        """The engine's KV caches by layer name. SetupError where their pages can't be used."""
        spec = self._identity.spec
        pages = [Pages(layout, spec.block_tokens, caches, page_count) for layout in self._identity.layouts]
        block_bytes = [group.block_bytes for group in pages]
        loading = Rows(block_bytes, self._options.load_bytes_max)
        saving = Rows(block_bytes, self._options.save_bytes_max)
        self._store = Store(spec, self._shards, pages, loading, saving, self._clock)
        # Pages of a window come and go within a request, device memory needs the engine's stream: copied at once.
        self._copy_now = not all(group.on_cpu and not group.layout.sliding for group in pages)

    # --- before the step -------------------------------------------------------------------------------------------

    def step_begins(self, step: Step) -> None:
        """A step begins. Pages of preempted requests may be overwritten from now on: what was not copied out of them is
        dropped."""
        self._rates.step_begins()
        for job in self._saves.values():
            if job.save.request in step.preempted:
                job.drop()

    def begin(self, step: Step) -> None:
        """Start the step's loads, and wait for the synchronous ones. Called before the forward pass where there are any
        of these, else after it."""
        for load in step.loads:
            deadline_s = self._rates.deadline_s(
                _tokens(load, self._identity),
                least_s=self._options.load_patience_ms / 1e3,
                most_s=self._options.load_timeout_s,
            )
            job = LoadJob(load, self._store, deadline_s)
            self._loads[load.number] = job
            self.counters.add("loads")
            if self._store is None or step.root != self._identity.spec.root:
                logger.error("the scheduler's model spec is not this rank's: nothing is loaded")
                job.refuse()
            else:
                job.future = self._face.submit_work(job.run)
        for job in [job for job in self._loads.values() if job.load.synchronous]:
            job.wait(max(0.0, job.end - self._clock.monotonic()))
            self._collect(job)

    # --- after the step --------------------------------------------------------------------------------------------

    def end(self, step: Step) -> None:
        """The step's tokens are in the pages: start its saves."""
        self._rates.step_ends(step.tokens if not any(load.synchronous for load in step.loads) else 0)
        self._report.step = max(self._report.step, step.number)
        for request in step.ended:
            self._ending[request] = None
        for save in step.saves:
            job = SaveJob(save, self._store)
            self._saves[save.number] = job
            if self._store is None or step.root != self._identity.spec.root:
                job.drop()
                continue
            rows_max = self._store.saving.rows_max
            if self._store.saving_blocks + save.blocks > SAVES_WAITING * rows_max:
                job.drop()
                continue
            if self._copy_now:
                job.copy_now(rows_max - self._store.saving_blocks)
            self._store.saving_blocks += save.blocks
            job.future = self._face.submit_work(job.run)
        if step.tokens == 0:  # the engine waits for us
            wait(self._futures(), IDLE_WAIT_S, FIRST_COMPLETED)

    def _futures(self) -> list[Future[Any]]:
        """Of the loads; without one of the saves."""
        jobs: list[LoadJob | SaveJob] = [*self._loads.values()] or [*self._saves.values()]
        return [job.future for job in jobs if job.future is not None]

    def finished(self) -> tuple[set[str], set[str], set[str]]:
        """(requests whose pages are free again, requests whose loads ended, of these: those that failed as a whole)."""
        now = self._clock.monotonic()
        for job in list(self._loads.values()):
            if job.future is None or job.future.done():
                self._collect(job)
            elif now > job.end + OVERDUE_S:
                job.give_up()
                self._collect(job)
        for number, save in list(self._saves.items()):
            if save.pages_free and not save.told:
                save.told = True
                self._report.saved[number] = self._report.saved.get(number, 0) + 1
            if save.pages_free and (save.future is None or save.future.done()):
                del self._saves[number]
                self._count_save(save)
                self._report.ended[number] = self._report.ended.get(number, 0) + 1
                for life, seq in save.commits.items():
                    self._report.commits[life] = max(seq, self._report.commits.get(life, 0))
        busy = {job.save.request for job in self._saves.values() if not job.pages_free}
        free = {request for request in self._ending if request not in busy}
        for request in free:
            del self._ending[request]
        arrived, self._arrived = set(self._arrived), {}
        failed, self._failed_requests = self._failed_requests & arrived, set()
        return free, arrived, failed

    def _collect(self, job: LoadJob) -> None:
        """A load has ended: what it could not bring is computed by the engine."""
        load = job.load
        del self._loads[load.number]
        done = job.outcome(self.counters)
        wanted = load.plan.blocks - load.first
        size = self._identity.spec.block_tokens
        loaded = max(0, done * size - load.skip_tokens)
        self.counters.add("tokens_loaded", loaded)
        self.counters.add("bytes_loaded", job.bytes)
        self.counters.add("seconds_loading", job.seconds)
        for name, count in job.tiers.items():
            self.counters.add(f"hits_{name}", count)
        if done == wanted:
            self._rates.loaded(job.bytes, job.seconds)
        else:
            self.counters.add("loads_failed")
            self.counters.add("tokens_failed", wanted * size - load.skip_tokens - loaded)
            depth = load.first + done
            self._report.failed[load.request] = min(depth, self._report.failed.get(load.request, depth))
            if self._block_by_page:
                self._errors.update(load.pages[0][loaded // self._identity.layouts[0].page_tokens :])
            else:
                self._failed_requests.add(load.request)
        if not load.synchronous:
            self._arrived[load.request] = None

    def _count_save(self, job: SaveJob) -> None:
        if job.future is not None and self._store is not None:
            self._store.saving_blocks -= job.save.blocks
        states = job.outcome(self.counters)
        for state in states:
            name = {"committed": "saved", "held": "held"}.get(state, "dropped")
            self.counters.add(f"blocks_{name}")
        row_bytes = self._store.row_bytes if self._store is not None else 0
        self.counters.add("bytes_saved", row_bytes * sum(state == "committed" for state in states) / len(self._shards))

    def load_errors(self) -> set[int]:
        """Pages that were to be loaded and were not, since the last call. Mutates."""
        errors, self._errors = self._errors, set()
        return errors

    def report(self) -> Report:
        """Since the last call. Mutates."""
        report, self._report = self._report, Report(step=self._report.step)
        report.prefill_tokens_s, report.load_bytes_s = self._rates.prefill_tokens_s, self._rates.load_bytes_s
        return report

    def close(self, patience_s: float) -> None:
        """Let saves end for so long, then give up what is under way; nothing is copied from or to the engine's pages
        afterwards."""
        for load in self._loads.values():
            load.give_up()
        end = self._clock.monotonic() + patience_s
        for save in self._saves.values():
            save.wait(max(0.0, end - self._clock.monotonic()))
            save.drop()


def _tokens(load: Any, identity: Identity) -> int:
    return int((load.plan.blocks - load.first) * identity.spec.block_tokens - load.skip_tokens)
