"""The short way of a get: blocks that lie raw in the memory of one worker of this host, with no object a block.

They are opened in one call, checked, copied and looked at again (generations) by one compiled loop. What does not come
this way is left to the loop of a get (`fetch.py`), which knows every other: so nothing here tries again.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.client.bulk import raw_row
from kvstore.client.fetch import Failed
from kvstore.client.getting import GetResult, wanted_depths
from kvstore.client.host_link import HostLink, Table
from kvstore.client.links import Links
from kvstore.client.plan import HitPlan, is_redis
from kvstore.client.rates import Rates
from kvstore.client.slices import Slices
from kvstore.client.targets import Target, target_of
from kvstore.directory.membership import Member
from kvstore.errors import Corrupt, DeadlineExceeded, KVStoreError
from kvstore.header_columns import Columns
from kvstore.layout import block_bytes
from kvstore.open_rows import ROW_BYTES, WORDS
from kvstore.recent import Recent
from kvstore.seams import System
from kvstore.spec import Shard, namespace_digest
from kvstore.types import Fidelity, Tier
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire

CALL_BLOCKS_MAX = 4096
CALL_BYTES_MAX = 128 << 20
"""Of one call; a larger get is left to the loop, which cuts it."""

FIRST_SHARE = 0.4
"""Of the time that is left: a worker that hangs leaves time for another way."""

ARRIVED = 0
PROBLEMS = {1: "missing", 3: "unmapped", 4: "Corrupt", 6: "reused"}
"""Outcomes of `kvstore.kernels.landing` that say enough not to ask a holder again; the loop sees to the others."""


@dataclass(slots=True)
class Part:
    """Blocks of one needed shard."""

    index: int  # of the shard among the needed ones
    shard: Shard
    depths: range
    nbytes: int  # of a block
    keys: bytes  # back to back
    target: Ground | None = None  # where they go, once that is known


@dataclass(frozen=True, slots=True)
class Ground:
    """The caller's memory for a part, and what the compiled loops use (`kvstore.kernels.landing`)."""

    places: Columns  # (p, 4) uint64, a row for each piece of memory: block, offset in it, bytes, address
    ends: Columns  # (p,) int64, of each piece among all bytes
    keys: Columns  # (n, 2) words
    template: Columns
    fixed: Columns
    bounds: Columns
    sources: Columns
    outcomes: Columns
    kept: list[Target]  # what keeps that memory where it is, beside the caller


class Direct:
    """Of one client."""

    def __init__(
        self, namespace: str, links: Links, system: System, failed: Recent[Failed], rates: Rates, counters: Counter[str]
    ) -> None:
        self._namespace, self._links, self._system = namespace_digest(namespace), links, system
        self._failed, self._rates, self._counters = failed, rates, counters

    async def get(self, plan: HitPlan, first: int, end: float, ready: Callable[[], GetResult]) -> bool:
        """Deliver what comes this way; whether that is all. `ready` makes the result, or gives it again: its tiers,
        bytes and fidelity are set. Mutates the memory there."""
        holder = self._holder(plan, first)
        if holder is None:
            return False
        parts = [_part(plan, index, shard, first) for index, shard in enumerate(plan.shards)]
        timeout_s = (end - self._system.clock.monotonic()) * (FIRST_SHARE if holder.address else 1.0)
        try:
            async with self._links.local.use(holder.socket, timeout_s=timeout_s) as link:
                if link.sends_rows:
                    return await self._read(link, holder.id, plan, ready, parts, timeout_s)
        except asyncio.CancelledError:
            if self._system.clock.monotonic() >= end:
                self._blame(plan, holder.id, parts)
            raise
        except DeadlineExceeded:
            self._counters["errors_DeadlineExceeded"] += 1
            self._links.local.hung.add(holder.socket)
            self._blame(plan, holder.id, parts)  # it hangs: another way to the same worker would too
        except KVStoreError as error:
            self._counters[f"errors_{type(error).__name__}"] += 1
        return False

    def _holder(self, plan: HitPlan, first: int) -> Member | None:
        """The worker of this host that has all that is needed, as it is needed, raw in memory; None where it is not so
        simple, or something failed a while ago."""
        if not plan.runs or len(self._failed):
            return None
        holder = plan.holders.get(plan.runs[0].holder)
        if holder is None or is_redis(holder.id) or not holder.socket or holder.host != self._system.host:
            return None
        blocks = nbytes = 0
        for shard in plan.shards:
            depths = wanted_depths(plan, shard, first)
            reached = depths.start
            for run in plan.runs:
                if run.holder != holder.id or run.tier != Tier.HOT:
                    return None
                if run.shard == shard and run.first_depth <= reached < run.first_depth + run.count:
                    reached = run.first_depth + run.count
            if reached < depths.stop:
                return None
            blocks, nbytes = blocks + len(depths), nbytes + len(depths) * block_bytes(plan.spec, shard)
        return holder if 0 < blocks <= CALL_BLOCKS_MAX and nbytes <= CALL_BYTES_MAX else None

    async def _read(
        self, link: HostLink, holder: str, plan: HitPlan, ready: Callable[[], GetResult], parts: Sequence[Part],
        timeout_s: float,
    ) -> bool:  # fmt: skip
        """Whether all came."""
        begun = self._system.clock.monotonic()
        request = worker_pb2.OpenRequest(
            root=plan.spec.root,
            blocks=[worker_pb2.ShardKeys(shard=shard_to_wire(part.shard), keys=part.keys) for part in parts],
            least=int(plan.least),  # type: ignore[arg-type]
            redis=True,  # what the worker does not hold may just have moved there
            deadline_ms=max(1, int(timeout_s * 1000)),
        )

        def meanwhile() -> None:
            for part in parts:
                self._prepare(plan, part, ready().buffers[part.index])

        reply = await link.open(request, timeout_s=timeout_s, meanwhile=meanwhile)
        try:
            if len(reply.rows) != ROW_BYTES * sum(len(part.depths) for part in parts):
                raise Corrupt(f"{len(reply.rows)} bytes of rows: not one for each block that was asked for")
            rows = np.frombuffer(reply.rows, np.uint64).reshape(-1, WORDS)
            at = 0
            for part in parts:
                mine = rows[at : at + len(part.depths)]
                at += len(part.depths)
                self._note(holder, plan, ready(), part, mine, await self._land(link.table(), part, mine))
            self._rates.note(holder, Tier.HOT, ready().bytes, self._system.clock.monotonic() - begun)
            return ready().bytes == sum(len(part.depths) * part.nbytes for part in parts)
        finally:
            link.release(reply.hold)

    def _prepare(self, plan: HitPlan, part: Part, row: Sequence[Any]) -> None:
        """Sets the part's target: all that can be done before the worker has answered. BadRequest."""
        count, nbytes = len(part.depths), part.nbytes
        pieces, kept, from_buffer = array("Q"), list[Target](), c_char.from_buffer
        for block, given in enumerate(row[part.depths.start : part.depths.stop]):
            if type(given) is memoryview and given.nbytes == nbytes and given.c_contiguous and not given.readonly:
                pieces.extend((block, 0, nbytes, addressof(from_buffer(given))))
                continue
            kept.append(target_of(given, nbytes))
            for start, length, address in kept[-1].places(0, nbytes):
                pieces.extend((block, start, length, address))
        places = np.frombuffer(pieces, np.uint64).reshape(-1, 4)
        template, fixed = raw_row(
            plan.spec.root, self._namespace, part.shard.digest, plan.spec.block_tokens, part.nbytes
        )
        part.target = Ground(
            places=places,
            ends=np.cumsum(places[:, 2]).view(np.int64),
            keys=np.frombuffer(part.keys, np.uint64).reshape(count, 2),
            template=template,
            fixed=fixed,
            bounds=np.array([plan.least, max(Fidelity), max(Tier)], np.int64),
            sources=np.empty((count, 2), np.uint64),
            outcomes=np.empty(count, np.int64),
            kept=kept,
        )

    async def _land(self, table: Table, part: Part, rows: Columns) -> Columns:
        """(n,) how each block of a part ended."""
        from kvstore.kernels import landing

        to = part.target
        assert to is not None, "an answer before the request had left"
        landing.check(rows, to.keys, to.template, to.fixed, to.bounds, table.places, to.sources, to.outcomes)

        def copy(first: int, last: int) -> None:
            landing.copy(to.places, to.ends, to.sources, to.outcomes, first, last)

        await Slices(copy, int(to.ends[-1])).run(self._system.pool)
        landing.reused(rows, to.sources, to.outcomes)
        return to.outcomes

    def _note(
        self, holder: str, plan: HitPlan, result: GetResult, part: Part, rows: Columns, outcomes: Columns
    ) -> None:
        """What came of a part, and what its holder is not to be asked for again."""
        tiers, depths = result.tiers[part.index], part.depths
        headers = rows.view(np.uint8)
        here = outcomes == ARRIVED
        if here.all():
            tiers[depths.start : depths.stop] = map(_TIERS.__getitem__, headers[:, 189].tolist())
        else:
            for at, outcome in enumerate(outcomes.tolist()):
                if outcome == ARRIVED:
                    tiers[depths[at]] = _TIERS[int(headers[at, 189])]
                elif outcome in PROBLEMS:
                    self._counters[f"failed_{PROBLEMS[outcome]}"] += 1
                    self._failed.add((holder, part.shard.digest, plan.keys[depths[at]]))
            headers = headers[here]
        result.bytes += len(headers) * part.nbytes
        if len(headers):
            result.fidelity = min(result.fidelity, Fidelity(int(headers[:, 120:122].min())))

    def _blame(self, plan: HitPlan, holder: str, parts: Sequence[Part]) -> None:
        for part in parts:
            for depth in part.depths:
                self._failed.add((holder, part.shard.digest, plan.keys[depth]))


_TIERS = {int(tier): tier for tier in Tier}


def _part(plan: HitPlan, index: int, shard: Shard, first: int) -> Part:
    """A shard's needed blocks."""
    depths = wanted_depths(plan, shard, first)
    keys = b"".join(plan.keys[depths.start : depths.stop])
    return Part(index, shard, depths, block_bytes(plan.spec, shard), keys)
