"""A put: checked, copied out of the caller's memory, visible. Or not kept, and nothing has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.errors import KVStoreError, Overloaded
from kvstore.header import Header
from kvstore.layout import block_bytes
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.store.copier import Copier, prepared
from kvstore.store.movement import Movement
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location
from kvstore.types import BlockId, Fidelity

Offer = tuple[Shard, Header, memoryview]

OVER_RATE = "more bytes a second than the namespace's rate_bytes"


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """`state`: `committed` (under `seq`), `held` (as good or better already), `dropped` (no room), `refused`."""

    state: str
    seq: int = 0
    why: str = ""


@dataclass(slots=True)
class Going:
    """A block on its way into `place`."""

    index: int  # among those offered
    header: Header
    place: Location
    kept: bool = False


class Putting:
    """One per store."""

    def __init__(self, stack: Stack, movement: Movement) -> None:
        self.stack = stack
        self.movement = movement
        self.copier = Copier(stack.system.pool, stack.config.threads)
        self._puts: dict[BlockId, asyncio.Future[None]] = {}
        self._preparing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to prepare what makes copies fast. Mutates; never waits."""
        self._preparing = asyncio.get_running_loop().create_task(prepared(self.stack.system))

    @property
    def busy(self) -> bool:
        return bool(self._puts)

    async def put(
        self,
        namespace: str,
        spec: ModelSpec,
        shard: Shard,
        header: Header,
        source: memoryview,
    ) -> PutOutcome:
        """Keep one block: `source` is copied into hot and checksummed in the same pass, then visible. Never raises for
        what a caller may have got wrong, nor for a tier; `source` may be reused when this returns."""
        why = self._objection(namespace, spec, shard, header, source)
        if why:
            return self._end("refused", why=why)
        id = header.id(namespace)
        while (other := self._puts.get(id)) is not None:
            await asyncio.shield(other)
        if self._held(id, header):
            return self._end("held", self.stack.changes.outbox(namespace).head)
        turn = self._puts[id] = asyncio.get_running_loop().create_future()
        try:
            return await self._put(id, spec, shard, header, source)
        finally:
            del self._puts[id]
            turn.set_result(None)
            self.movement.nudge()

    async def put_all(self, namespace: str, spec: ModelSpec, blocks: Sequence[Offer]) -> list[PutOutcome]:
        """`put` of each (shard, header, source) from a client; those that find room at once share one wait for their
        copies."""
        outcomes: dict[int, PutOutcome] = {}
        going: dict[BlockId, Going] = {}
        loop = asyncio.get_running_loop()
        try:
            for index, (shard, header, source) in enumerate(blocks):
                id = header.id(namespace)
                found = None if id in self._puts else self._begin(id, spec, shard, header, source)
                if isinstance(found, PutOutcome):
                    outcomes[index] = found
                elif found is not None:
                    going[id] = Going(index, header, found)
                    self._puts[id] = loop.create_future()
            view = self.stack.hot.view
            sums = await self.copier.copy_all([(blocks[one.index][2], view(one.place)) for one in going.values()])
            for (id, one), copy_id in zip(going.items(), sums, strict=True):
                outcome = self._keep(id, one.header, one.place, copy_id)
                one.kept, outcomes[one.index] = outcome.state == "committed", outcome
        finally:
            for id, one in going.items():
                if not one.kept:
                    self.stack.hot.free(namespace, one.header, one.place)
                self._puts.pop(id).set_result(None)
            self.movement.nudge()
        late = [index for index in range(len(blocks)) if index not in outcomes]
        outcomes |= zip(
            late, await asyncio.gather(*(self.put(namespace, spec, *blocks[index]) for index in late)), strict=True
        )
        return [outcomes[index] for index in range(len(blocks))]

    def _begin(
        self, id: BlockId, spec: ModelSpec, shard: Shard, header: Header, source: memoryview
    ) -> Location | PutOutcome | None:
        """Where a block goes, or how its put ends; None where it has to wait. Mutates."""
        stack = self.stack
        why = self._objection(id.namespace, spec, shard, header, source)
        if why:
            return self._end("refused", why=why)
        if self._held(id, header):
            return self._end("held", stack.changes.outbox(id.namespace).head)
        why = self._learn(id.namespace, spec, shard)
        if why:
            return self._end("dropped", why=why)
        place = self.movement.room.at_once(stack.HOT, id.namespace, header.raw_length)
        if place is not None and not stack.quota.spend(id.namespace, header.raw_length):
            stack.hot.free(id.namespace, header, place)
            return self._over(id.namespace, "rate", OVER_RATE)
        return place

    def _objection(self, namespace: str, spec: ModelSpec, shard: Shard, header: Header, source: memoryview) -> str:
        """Why these bytes can't be this block; empty when they can."""
        try:
            shard.check(spec)
            size = block_bytes(spec, shard)
            if header.namespace != namespace_digest(namespace):
                return "the header names another namespace"
        except KVStoreError as error:
            return str(error)
        if header.root != spec.root or header.shard != shard.digest or header.tokens != spec.block_tokens:
            return "the header names another model or shard"
        if header.raw_length != size or source.nbytes != size:
            return f"a block of this shard has {size} bytes, not {source.nbytes}"
        if size > self.stack.config.block_bytes_max:
            return f"a block of {size} bytes: at most {self.stack.config.block_bytes_max} (block_bytes_max) are taken"
        least = self.stack.codec_rules(namespace).least
        if header.computed_on < least:
            return f"the namespace takes nothing below {least.name.lower()}: this was computed on less"
        if header.stored != Fidelity.EXACT:
            return "raw bytes are stored exactly: the header says otherwise"
        return ""

    def _end(self, state: str, seq: int = 0, why: str = "") -> PutOutcome:
        self.stack.counters[f"puts_{state}"] += 1
        return PutOutcome(state, seq, why)

    def _over(self, namespace: str, what: str, why: str) -> PutOutcome:
        self.stack.counters[f"puts_over_{what}"] += 1
        self.stack.quota.dropped[namespace] += 1
        return self._end("dropped", why=why)

    def _held(self, id: BlockId, header: Header) -> bool:
        """Whether a copy as good is there; then it was used just now."""
        residency = self.stack.residency
        row = residency.find(id.namespace, id.shard, id.key)
        if row is None or residency.fidelity(row) < header.fidelity:
            return False
        self.stack.advice.storing(id.namespace, header, self.stack.system.clock.monotonic())
        residency.touch(row)
        return True

    async def _put(self, id: BlockId, spec: ModelSpec, shard: Shard, header: Header, source: memoryview) -> PutOutcome:
        stack = self.stack
        why = self._learn(id.namespace, spec, shard)
        if why:
            return self._end("dropped", why=why)
        if not stack.quota.spend(id.namespace, header.raw_length):
            return self._over(id.namespace, "rate", OVER_RATE)
        place = await self.movement.room.wait(stack.HOT, id.namespace, header.raw_length, stack.config.put_wait_s)
        if place is None:
            if stack.quota.over(id.namespace, stack.HOT, header.raw_length) > 0:
                return self._over(id.namespace, "quota", "over the namespace's quota of the hot tier")
            return self._end("dropped", why="no room in the hot tier")
        kept = False
        try:
            copy_id = await self.copier.copy(source, stack.hot.view(place))
            outcome = self._keep(id, header, place, copy_id)
            kept = outcome.state == "committed"
            return outcome
        finally:
            if not kept:
                stack.hot.free(id.namespace, header, place)

    def _keep(self, id: BlockId, header: Header, place: Location, copy_id: int) -> PutOutcome:
        """The bytes are there, with that checksum: committed, and the place is the block's, or not. Mutates."""
        stack = self.stack
        if header.copy_id not in (0, copy_id):
            return self._end("refused", why="the bytes do not have the announced checksum")
        if self._held(id, header):  # loaded from Redis meanwhile
            return self._end("held", stack.changes.outbox(id.namespace).head)
        row = stack.residency.find(id.namespace, id.shard, id.key)
        if row is not None:
            stack.counters["replaced"] += 1
            stack.remove(row)
        stack.hot.filled()
        stack.advice.storing(id.namespace, header, stack.system.clock.monotonic())
        stack.admit(id.namespace, header.with_copy(copy_id), stack.HOT, place)
        return self._end("committed", stack.changes.outbox(id.namespace).head)

    def _learn(self, namespace: str, spec: ModelSpec, shard: Shard) -> str:
        """Why no more can be known here; empty when it is. Mutates."""
        catalog = self.stack.catalog
        try:
            catalog.learn_namespace(namespace)
            catalog.learn_spec(spec)
            catalog.learn_shard(shard)
        except Overloaded as error:
            return str(error)
        return ""

    async def close(self) -> None:
        """Wait for what is being copied: at most one block each."""
        while self._puts:
            await asyncio.wait(list(self._puts.values()))
        preparing, self._preparing = self._preparing, None
        if preparing is not None:
            await preparing
