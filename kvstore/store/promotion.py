"""Promotion: what was served from below comes into hot behind the reader, and only into room that costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.budget import Budget
from kvstore.errors import Corrupt, UnknownFormat
from kvstore.format import Record, decode_record, expect
from kvstore.header import Header
from kvstore.residency.victims import margin
from kvstore.spec import ModelSpec, Shard
from kvstore.store.movement import Movement
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location
from kvstore.types import Fidelity, Tier


def decoded(view: memoryview, header: Header, spec: ModelSpec, shard: Shard, target: memoryview) -> NDArray[np.void]:
    """Thread: the raw bytes of a record into `target`; its table. Corrupt unless it is that very copy."""
    record = Record.parse(view)
    expect(record.header, header)
    decode_record(record, spec, shard, target)
    return record.table.copy()


class Promotion:
    """One per store. Shares the loads' budget and never waits for it: loads come first."""

    def __init__(self, stack: Stack, movement: Movement, budget: Budget) -> None:
        self.stack = stack
        self.movement = movement
        self.budget = budget
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._closed = False

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def promote(self, rows: Sequence[int]) -> None:
        """Bring blocks that were served from below into hot if room costs nothing, else count that: decided once for
        consecutive blocks of a prefix that are worth the same. `rows`: as they lie in their prompt. Mutates."""
        residency, hot = self.stack.residency, self.stack.HOT
        runs, last = list[list[int]](), None
        for row in rows:
            if self._closed or residency.present(row, hot) or residency.writing(row, hot) or self._lossy(row):
                continue
            worth = residency.policies[hot].worth(row)
            if runs and residency.rows.parent[row] == runs[-1][-1] and worth == last:
                runs[-1].append(row)
            else:
                runs.append([row])
            last = worth
        for run in runs:
            if self._worth_it(run):
                for row in run:
                    self._begin(row)
            else:
                self.stack.counters["promotions_skipped"] += len(run)

    def _lossy(self, row: int) -> bool:
        """Whether its stored chunks are all there is to know: raw bytes in hot would have to be encoded again."""
        residency, host = self.stack.residency, self.stack.HOST
        return residency.present(row, host) and residency.rows.worth(row, host) < Fidelity.EXACT

    def _worth_it(self, run: Sequence[int]) -> bool:
        """Whether there is room for all of a run, or it is expected to be used more than what would give way."""
        stack, residency = self.stack, self.stack.residency
        if self.movement.room.short(stack.HOT, sum(residency.rows.raw[row] for row in run)) <= 0:
            return True
        more = margin(residency, run[0], stack.HOT)
        return more is None or more > 0

    def _begin(self, row: int) -> None:
        """Promote one block into room that costs nothing, else count that. Mutates."""
        stack, residency = self.stack, self.stack.residency
        header, namespace = residency.header(row), residency.namespace(row)
        model, slot = stack.model(header), stack.slot(row, stack.HOST) if residency.present(row, stack.HOST) else None
        place = None
        if model is not None and slot is not None and self.budget.fits(header.raw_length):
            place = self.movement.room.reserve(stack.HOT, namespace, header.raw_length, clean_only=True)
        if model is None or slot is None or place is None:
            stack.counters["promotions_skipped"] += 1
            return
        self.budget.used += header.raw_length
        residency.pin(row)
        residency.work(row, writing=stack.HOT)
        stack.arena.hold(slot)
        source = stack.host.view(residency.location(row, stack.HOST))
        task = asyncio.get_running_loop().create_task(self._promote(row, header, model, source, place))
        self._tasks[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            stack.arena.release(slot)
            residency.unpin(row)
            self.budget.give(header.raw_length)
            self.movement.nudge()
            if not task.cancelled() and (error := task.exception()) is not None:
                asyncio.get_running_loop().call_exception_handler({"message": "a promotion failed", "exception": error})

        task.add_done_callback(ended)

    async def _promote(
        self, row: int, header: Header, model: tuple[ModelSpec, Shard], source: memoryview, place: Location
    ) -> None:
        stack, residency = self.stack, self.stack.residency
        namespace, kept = residency.namespace(row), False
        try:
            table, took = await stack.system.pool.run(self._decode, source, header, *model, stack.hot.view(place))
            stack.codec_use.decoded(Tier.HOST, table, took)
            if not residency.gone(row) and not residency.present(row, stack.HOT):
                stack.hot.filled()
                stack.add(row, stack.HOT, place)
                stack.counters["promotions"] += 1
                kept = True
        except (Corrupt, UnknownFormat):
            stack.damaged(row, stack.HOST)
        finally:
            residency.done(row, writing=stack.HOT)
            if not kept:
                stack.hot.free(namespace, header, place)

    def _decode(self, source: memoryview, header: Header, *rest: Any) -> tuple[NDArray[np.void], float]:
        """Thread: as `decoded`, and the seconds it took, without those in the line for a thread."""
        clock = self.stack.system.clock
        begin = clock.monotonic()
        return decoded(source, header, *rest), clock.monotonic() - begin

    async def close(self) -> None:
        """What is on its way is given up."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
