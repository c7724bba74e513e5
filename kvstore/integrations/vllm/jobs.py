"""One load and one save: what runs in the client's loop, and the lock that keeps bytes out of pages given to others."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.client.put_blocks import PutResult
from kvstore.integrations.vllm.buffers import Row, Rows
from kvstore.integrations.vllm.counters import Counters
from kvstore.integrations.vllm.metadata import Life, Load, Save
from kvstore.integrations.vllm.pages import Pages
from kvstore.keys import Chain
from kvstore.seams import Clock
from kvstore.spec import ModelSpec, Shard

logger = logging.getLogger("vllm.kvstore")

PUT_TIMEOUT_S = 10.0

PART_BYTES = 24 << 20
"""Of a load, read at once: enough to pay for the call, little enough that copying overlaps with reading."""

OFFERS_MAX = 4
OFFER_PAUSE_S = 0.1
"""What the worker dropped is offered again so often, after 0.1, 0.2, ... s, while other saves have buffers."""

SAVES_WAITING = 4
"""Saves may wait for so many times the buffers there are; beyond that they are dropped."""


class Store:
    """What all jobs of a rank share."""

    def __init__(
        self,
        spec: ModelSpec,
        shards: Sequence[Shard],
        pages: Sequence[Pages],
        loading: Rows,
        saving: Rows,
        clock: Clock,
    ) -> None:
        self.spec, self.shards, self.pages = spec, tuple(shards), tuple(pages)
        self.loading, self.saving, self.clock = loading, saving, clock
        self.row_bytes = loading.row_bytes
        self.saving_blocks = 0  # submitted and not ended


class LoadJob:
    """Blocks into pages. `give_up` keeps everything out of the pages from its return on."""

    def __init__(self, load: Load, store: Store | None, deadline_s: float) -> None:
        self.load, self._store = load, store
        self.future: Future[None] | None = None
        self._begun = store.clock.monotonic() if store is not None else 0.0
        self.end = self._begun + deadline_s
        self.seconds = 0.0
        self.bytes = 0
        self.tiers: Counter[str] = Counter()
        self._done = 0  # leading blocks in the pages
        self._copying = threading.Lock()
        self._given_up = False

    def refuse(self) -> None:
        """Nothing will be loaded."""
        self._given_up = True

    async def run(self, client: KVClient) -> None:
        """Read and copy, a part at a time, until done, a block is missing, or time is up. One part is copied while the
        next one is read."""
        store, load = self._store, self.load
        assert store is not None, "a load was begun without pages"
        plan = replace(load.plan, shards=store.shards)
        part_blocks = max(1, PART_BYTES // store.row_bytes)
        first, complete = load.first, True
        copying: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(max(0.0, self.end - store.clock.monotonic())):
                while first < plan.blocks and complete and not self._given_up:
                    rows = await store.loading.wait(min(part_blocks, plan.blocks - first))
                    try:
                        good = await self._read(client, plan.shortened(first + len(rows)), first, rows)
                        if copying is not None:
                            await asyncio.shield(copying)
                    except BaseException:
                        await store.loading.give_back(rows)
                        raise
                    complete = good == len(rows)
                    copying = asyncio.create_task(self._deliver(client, rows, good, first))
                    first += good
        except TimeoutError:
            logger.warning("a load of %d blocks was not done in time: they are computed", plan.blocks - load.first)
        finally:
            if copying is not None:
                await asyncio.wait([copying])  # nothing is copied any more when this has ended
            self.seconds = store.clock.monotonic() - self._begun
        if copying is not None:
            copying.result()

    async def _read(self, client: KVClient, plan: HitPlan, first: int, rows: list[Row]) -> int:
        """Read blocks `first`.. into rows; how many leading ones came."""
        store = self._store
        assert store is not None
        left_s = self.end - store.clock.monotonic()
        into = [[None] * first + [row[group] for row in rows] for group in range(len(store.shards))]
        result = await client.get(plan, into, first=first, timeout_s=max(0.001, left_s))
        good = 0
        while good < len(rows) and all(tiers[first + good] is not None for tiers in result.tiers):
            good += 1
        for tiers in result.tiers:
            self.tiers.update(tier.name.lower() for tier in tiers[first : first + good] if tier)
        return good

    async def _deliver(self, client: KVClient, rows: list[Row], good: int, first: int) -> None:
        """Copy the leading `good` rows into the pages, and give all of them back."""
        assert self._store is not None
        try:
            if good:
                await client.system.pool.run(self._copy, rows[:good], first)
        finally:
            await self._store.loading.give_back(rows)

    def _copy(self, rows: list[Row], first: int) -> None:
        """In a byte mover's thread: from buffers into pages."""
        store, load = self._store, self.load
        assert store is not None
        with self._copying:
            if self._given_up:
                return
            for group, pages in enumerate(store.pages):
                skipped = load.skip_tokens // pages.layout.page_tokens
                begin = (first - load.first) * pages.pages_a_block - skipped  # in load.pages, of this part
                skip = skipped if first == load.first else 0
                mine = load.pages[group][max(0, begin) : begin + len(rows) * pages.pages_a_block]
                pages.scatter([row[group] for row in rows], mine, skip)
            self._done += len(rows)
            self.bytes += len(rows) * store.row_bytes

    def wait(self, timeout_s: float) -> None:
        """For a load that must be over when this returns: what is not there by then is given up."""
        if self.future is None:
            return
        wait([self.future], timeout_s)
        if self.load.synchronous and not self.future.done():
            self.give_up()

    def give_up(self) -> None:
        """Idempotent; waits for a copy that is just being made."""
        with self._copying:
            self._given_up = True
        if self.future is not None:
            self.future.cancel()

    def outcome(self, counters: Counters) -> int:
        """Leading blocks of the load that are in the pages."""
        _log_failure(self.future, "a load", counters)
        with self._copying:
            self._given_up = True
            return self._done


class SaveJob:
    """Pages into blocks. Once `pages_free`, nothing reads from them any more."""

    def __init__(self, save: Save, store: Store | None) -> None:
        self.save, self._store = save, store
        self.future: Future[list[str]] | None = None
        self.told = False  # the scheduler knows that the pages are free
        self.commits: dict[Life, int] = {}  # the last seq of what was stored
        self._copying = threading.Lock()
        self._rows: list[Row] | None = None
        self._copied = 0  # leading blocks
        self._dropped = False

    @property
    def pages_free(self) -> bool:
        return self._copied == self.save.blocks or self._dropped or (self.future is not None and self.future.done())

    def copy_now(self, blocks_max: int) -> None:
        """Copy before the engine goes on, at most so many blocks: the rest is dropped. Buffers of its own: those for
        reuse belong to the loop."""
        assert self._store is not None
        self._rows = self._store.saving.fresh(max(0, min(self.save.blocks, blocks_max)))
        self._copy(self._rows, 0)
        self.drop()

    async def run(self, client: KVClient) -> list[str]:
        """Copy out and store, as many blocks at a time as there are buffers. One state per block and group."""
        store, save = self._store, self.save
        assert store is not None, "a save was begun without pages"
        if self._rows is not None:
            return await self._put(client, self._rows, 0)
        states: list[str] = []
        while self._copied < save.blocks and not self._dropped:
            rows = await store.saving.wait(save.blocks - self._copied)
            try:
                first = self._copied
                await client.system.pool.run(self._copy, rows, first)
                if self._copied > first:
                    states += await self._put(client, rows, first)
            finally:
                await store.saving.give_back(rows)
        return states

    def _copy(self, rows: list[Row], first: int) -> None:
        """In a byte mover's thread: blocks `first`.. of the save from pages into buffers."""
        assert self._store is not None
        with self._copying:
            if self._dropped:
                return
            for group, pages in enumerate(self._store.pages):
                begin = first * pages.pages_a_block
                mine = self.save.pages[group][begin : begin + len(rows) * pages.pages_a_block]
                pages.gather(mine, [row[group] for row in rows])
            self._copied += len(rows)

    async def _put(self, client: KVClient, rows: list[Row], first: int) -> list[str]:
        store, save = self._store, self.save
        assert store is not None
        prefix = Chain(store.spec, [b""] * save.known + list(save.keys))
        states: list[str] = []
        for group, shard in enumerate(store.shards):
            blocks = [row[group] for row in rows]
            result = await client.put(store.spec, prefix, blocks, save.first + first, shard, timeout_s=PUT_TIMEOUT_S)
            self._note(result)
            states += await self._again(client, prefix, blocks, save.first + first, shard, result.states)
        return states

    def _note(self, result: PutResult) -> None:
        for token in result.tokens:
            life = (token.worker, token.epoch)
            self.commits[life] = max(token.seq, self.commits.get(life, 0))

    async def _again(
        self, client: KVClient, prefix: Chain, blocks: list[Any], first: int, shard: Shard, states: Sequence[str]
    ) -> list[str]:
        """Offer what was dropped once more, after a short while: a worker that makes room drops what comes too soon."""
        left = list(states)
        for attempt in range(1, OFFERS_MAX):
            dropped = [index for index, state in enumerate(left) if state == "dropped"]
            if not dropped or self._store is None or self._store.saving_blocks > self._store.saving.rows_max:
                break
            await asyncio.sleep(OFFER_PAUSE_S * attempt)
            begin, end = dropped[0], dropped[-1] + 1
            result = await client.put(
                self._store.spec, prefix, blocks[begin:end], first + begin, shard, timeout_s=PUT_TIMEOUT_S
            )
            self._note(result)
            for index, state in enumerate(result.states, begin):
                left[index] = state if left[index] == "dropped" else left[index]
        return left

    def wait(self, timeout_s: float) -> None:
        """For its end, at most so long."""
        if self.future is not None:
            wait([self.future], timeout_s)

    def drop(self) -> None:
        """What is not copied by now is not saved; waits for a copy that is just being made. Idempotent."""
        with self._copying:
            if self._copied < self.save.blocks:
                self._dropped = True

    def outcome(self, counters: Counters) -> list[str]:
        """The state of every block and group, "dropped" where it was not offered."""
        everything = self.save.blocks * (len(self._store.shards) if self._store is not None else 1)
        states: list[str] = []
        if self.future is not None and not _log_failure(self.future, "a save", counters):
            states = self.future.result()
        return states + ["dropped"] * (everything - len(states))


def _log_failure(future: Future[Any] | None, what: str, counters: Counters) -> bool:
    """Whether it ended with an error. What the client does not turn into a miss is a fault: logged and counted."""
    if future is None:
        return False
    if not future.done() or future.cancelled():
        return True
    error = future.exception()
    if error is None:
        return False
    counters.add("errors")
    logger.error("%s failed: %s: %s", what, type(error).__name__, error)
    return True
