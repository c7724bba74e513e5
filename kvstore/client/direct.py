"""The short way of a get: blocks that lie raw in the memory of one worker of this host, with no object a block.

They are opened in one call, checked, copied and looked at again (generations) by one compiled loop. What does not come
this way is left to the loop of a get (`fetch.py`), which knows every other: so nothing here tries again.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_char
from dataclasses import dataclass

import numpy as np

from kvstore.client.bulk import raw_row
from kvstore.client.fetch import Failed
from kvstore.client.getting import GetResult, wanted_depths
from kvstore.client.host_link import HostLink, Table
from kvstore.client.links import Links
from kvstore.client.plan import HitPlan, is_redis
from kvstore.client.rates import Rates
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

BATCH_BYTES = 32 << 20
"""Raw bytes that one turn of a byte mover copies: long enough to pay for the turn, short enough to end soon."""

INLINE_BYTES = 256 << 10
"""Raw bytes that are copied on the spot: handing them over takes longer."""

FIRST_SHARE = 0.4
"""Of the time that is left: a worker that hangs leaves time for another way."""

ARRIVED = 0
PROBLEMS = {1: "missing", 3: "unmapped", 4: "Corrupt", 6: "reused"}
"""Outcomes of `kvstore.kernels.landing` that say enough not to ask a holder again; the loop sees to the others."""


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks of one needed shard, and where they go."""

    index: int  # of the shard among the needed ones
    shard: Shard
    depths: range
    nbytes: int  # of a block
    places: array[int]  # four a piece of memory: block, offset in it, bytes, address
    kept: list[Target]  # what keeps that memory where it is, beside the caller


class Direct:
    """Of one client."""

    def __init__(
        self, namespace: str, links: Links, system: System, failed: Recent[Failed], rates: Rates, counters: Counter[str]
    ) -> None:
        self._namespace, self._links, self._system = namespace_digest(namespace), links, system
        self._failed, self._rates, self._counters = failed, rates, counters

    async def get(self, plan: HitPlan, result: GetResult, first: int, end: float) -> None:
        """Deliver what comes this way: sets its tiers, bytes and fidelity in the result. Mutates the memory there.
        BadRequest for memory that does not fit."""
        holder = self._holder(plan, first)
        if holder is None:
            return
        parts = [_part(plan, result, index, shard, first) for index, shard in enumerate(plan.shards)]
        begun = self._system.clock.monotonic()
        timeout_s = (end - begun) * (FIRST_SHARE if holder.address else 1.0)
        before = result.bytes
        try:
            async with self._links.local.use(holder.socket, timeout_s=timeout_s) as link:
                if link.sends_rows:
                    await self._read(link, holder.id, plan, result, parts, timeout_s)
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
        self._rates.note(holder.id, Tier.HOT, result.bytes - before, self._system.clock.monotonic() - begun)

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
        self, link: HostLink, holder: str, plan: HitPlan, result: GetResult, parts: Sequence[Part], timeout_s: float
    ) -> None:
        keys = [b"".join(plan.keys[part.depths.start : part.depths.stop]) for part in parts]
        request = worker_pb2.OpenRequest(
            root=plan.spec.root,
            blocks=[
                worker_pb2.ShardKeys(shard=shard_to_wire(part.shard), keys=packed)
                for part, packed in zip(parts, keys, strict=True)
            ],
            least=int(plan.least),  # type: ignore[arg-type]
            redis=True,  # what the worker does not hold may just have moved there
            deadline_ms=max(1, int(timeout_s * 1000)),
        )
        reply = await link.open(request, timeout_s=timeout_s)
        try:
            if len(reply.rows) != ROW_BYTES * sum(len(part.depths) for part in parts):
                raise Corrupt(f"{len(reply.rows)} bytes of rows: not one for each block that was asked for")
            rows = np.frombuffer(reply.rows, np.uint64).reshape(-1, WORDS)
            at = 0
            for part, packed in zip(parts, keys, strict=True):
                mine = rows[at : at + len(part.depths)]
                at += len(part.depths)
                outcomes = await self._land(link.table(), plan, part, mine, packed)
                self._note(holder, plan, result, part, mine, outcomes)
        finally:
            link.release(reply.hold)

    async def _land(self, table: Table, plan: HitPlan, part: Part, rows: Columns, packed: bytes) -> Columns:
        """(n,) how each block of a part ended. It runs in byte movers, a batch each."""
        names = (plan.spec.root, self._namespace, part.shard.digest, plan.spec.block_tokens, part.nbytes)
        template, fixed = raw_row(*names)
        bounds = np.array([plan.least, max(Fidelity), max(Tier)], np.int64)
        keys = np.frombuffer(packed, np.uint64).reshape(-1, 2)
        places = np.frombuffer(part.places, np.uint64).reshape(-1, 4)
        outcomes, sources = np.empty(len(rows), np.int64), np.empty((len(rows), 2), np.uint64)

        def land(at: slice, these: Columns) -> None:
            from kvstore.kernels import landing

            landing.land(rows[at], keys[at], template, fixed, bounds, table.places, these, sources[at], outcomes[at])

        batches = list(_batches(part, places))
        if len(rows) * part.nbytes <= INLINE_BYTES:
            land(*batches[0])
        elif len(batches) == 1:
            await self._system.pool.run(land, *batches[0])
        else:
            await asyncio.gather(*(self._system.pool.run(land, *batch) for batch in batches))
        return outcomes

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


def _part(plan: HitPlan, result: GetResult, index: int, shard: Shard, first: int) -> Part:
    """A shard's needed blocks, and the caller's memory for them. BadRequest."""
    depths, nbytes = wanted_depths(plan, shard, first), block_bytes(plan.spec, shard)
    row, places, kept, from_buffer = result.buffers[index], array("Q"), list[Target](), c_char.from_buffer
    for block, depth in enumerate(depths):
        given = row[depth]
        if type(given) is memoryview and given.nbytes == nbytes and given.c_contiguous and not given.readonly:
            places.extend((block, 0, nbytes, addressof(from_buffer(given))))
            continue
        kept.append(target_of(given, nbytes))
        for start, length, address in kept[-1].places(0, nbytes):
            places.extend((block, start, length, address))
    return Part(index, shard, depths, nbytes, places, kept)


def _batches(part: Part, places: Columns) -> Iterator[tuple[slice, Columns]]:
    """(which blocks, where they go), about BATCH_BYTES each."""
    count, step = len(part.depths), max(1, BATCH_BYTES // part.nbytes)
    if count <= step:
        yield slice(0, count), places
        return
    for at in range(0, count, step):
        low, high = np.searchsorted(places[:, 0], (at, at + step))
        mine = places[low:high].copy()
        mine[:, 0] -= np.uint64(at)
        yield slice(at, min(count, at + step)), mine
