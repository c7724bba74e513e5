"""A put: checked, copied out of the caller's memory, visible. Or not kept, and nothing has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

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


@dataclass(frozen=True, slots=True)
class Kind:
    """What all blocks of one shard have in common, looked up once for those that are put together."""

    shard: Shard
    why: str  # why none of them can be taken; empty where they can
    size: int = 0  # raw bytes of each
    root: bytes = b""
    namespace: bytes = b""  # digest
    digest: bytes = b""  # of the shard
    tokens: int = 0
    least: Fidelity = Fidelity.COMPACT


@dataclass(slots=True)
class Batch:
    """Blocks that are put together: what has become of each so far."""

    namespace: str
    spec: ModelSpec
    blocks: Sequence[Offer]
    turn: asyncio.Future[None]  # for whoever waits for one of them
    outcomes: dict[int, PutOutcome] = field(default_factory=dict)  # by position
    going: list[Going] = field(default_factory=list)


@dataclass(slots=True)
class Going:
    """A block on its way into `place`."""

    index: int  # among those offered
    id: BlockId
    header: Header
    place: Location
    outcome: PutOutcome | None = None  # `committed`: the place is the block's


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
        [outcome] = await self.put_all(namespace, spec, [(shard, header, source)])
        return outcome

    async def put_all(self, namespace: str, spec: ModelSpec, blocks: Sequence[Offer]) -> list[PutOutcome]:
        """`put` of each (shard, header, source) from a client; those that find room at once share one wait for their
        copies."""
        batch = Batch(namespace, spec, blocks, asyncio.get_running_loop().create_future())
        outcomes, going = batch.outcomes, batch.going
        try:
            self._begin(batch)
            view = self.stack.hot.view
            sums = await self.copier.copy_all([(blocks[one.index][2], view(one.place)) for one in going])
            self._keep(namespace, going, sums)
            outcomes.update((one.index, one.outcome) for one in going if one.outcome is not None)
        finally:
            for one in going:
                self._give_back(one)
                del self._puts[one.id]
            batch.turn.set_result(None)
            self.movement.nudge()
        late = [index for index in range(len(blocks)) if index not in outcomes]
        if late:
            ends = await asyncio.gather(*(self._put_late(namespace, spec, *blocks[index]) for index in late))
            outcomes.update(zip(late, ends, strict=True))
        return [outcomes[index] for index in range(len(blocks))]

    def _begin(self, batch: Batch) -> None:
        """What finds room at once is going, what ends here has an outcome, the rest has to wait. Mutates."""
        kind: Kind | None = None
        wanted: dict[BlockId, int] = {}  # of one kind: position of the first with that id
        for index, (shard, header, source) in enumerate(batch.blocks):
            if kind is None or kind.shard is not shard:
                self._find_room(batch, kind, wanted)
                kind, wanted = self._kind(batch.namespace, batch.spec, shard), {}
            why = kind.why or _objection(kind, header, source)
            if why:
                batch.outcomes[index] = self._end("refused", why=why)
                continue
            id = BlockId(batch.namespace, kind.digest, header.key)
            if id in self._puts or id in wanted:
                continue
            if self._held(id, header):
                batch.outcomes[index] = self._end("held", self.stack.changes.outbox(id.namespace).head)
            else:
                wanted[id] = index
        self._find_room(batch, kind, wanted)

    def _find_room(self, batch: Batch, kind: Kind | None, wanted: dict[BlockId, int]) -> None:
        """Of one kind: those for which there is room at once are going. Mutates."""
        if kind is None or not wanted:
            return
        stack, namespace = self.stack, batch.namespace
        why = self._learn(namespace, batch.spec, kind.shard)
        if why:
            batch.outcomes.update((index, self._end("dropped", why=why)) for index in wanted.values())
            return
        places = self.movement.room.at_once_all(stack.HOT, namespace, kind.size, len(wanted))
        for (id, index), place in zip(wanted.items(), places, strict=False):
            header = batch.blocks[index][1]
            if stack.quota.spend(namespace, kind.size):
                batch.going.append(Going(index, id, header, place))
                self._puts[id] = batch.turn
            else:
                stack.hot.free(namespace, header, place)
                batch.outcomes[index] = self._over(namespace, "rate", OVER_RATE)

    def _kind(self, namespace: str, spec: ModelSpec, shard: Shard) -> Kind:
        try:
            shard.check(spec)
            size, digest = block_bytes(spec, shard), namespace_digest(namespace)
        except KVStoreError as error:
            return Kind(shard, str(error))
        most, why = self.stack.config.block_bytes_max, ""
        if size > most:
            why = f"a block of {size} bytes: at most {most} (block_bytes_max) are taken"
        least = self.stack.codec_rules(namespace).least
        return Kind(shard, why, size, spec.root, digest, shard.digest, spec.block_tokens, least)

    def _end(self, state: str, seq: int = 0, why: str = "") -> PutOutcome:
        self.stack.counters[f"puts_{state}"] += 1
        return PutOutcome(state, seq, why)

    def _over(self, namespace: str, what: str, why: str) -> PutOutcome:
        self.stack.counters[f"puts_over_{what}"] += 1
        self.stack.quota.dropped[namespace] += 1
        return self._end("dropped", why=why)

    def _give_back(self, one: Going) -> None:
        """Its place, unless the block has it now. Mutates."""
        if one.outcome is None or one.outcome.state != "committed":
            self.stack.hot.free(one.id.namespace, one.header, one.place)

    def _held(self, id: BlockId, header: Header) -> bool:
        """Whether a copy as good is there; then it was used just now."""
        row = self.stack.residency.find(id.namespace, id.shard, id.key)
        return row is not None and self._as_good(row, id.namespace, header)

    def _as_good(self, row: int, namespace: str, header: Header) -> bool:
        """The same of a copy that is there."""
        residency = self.stack.residency
        if residency.fidelity(row) < header.fidelity:
            return False
        self.stack.advice.storing(namespace, header, self.stack.system.clock.monotonic())
        residency.touch(row)
        return True

    async def _put_late(
        self, namespace: str, spec: ModelSpec, shard: Shard, header: Header, source: memoryview
    ) -> PutOutcome:
        """Of what can be put: wait for whoever puts the same, then for room."""
        id = header.id(namespace)
        while (other := self._puts.get(id)) is not None:
            await asyncio.shield(other)
        if self._held(id, header):
            return self._end("held", self.stack.changes.outbox(namespace).head)
        turn = self._puts[id] = asyncio.get_running_loop().create_future()
        try:
            return await self._put_waiting(id, spec, shard, header, source)
        finally:
            del self._puts[id]
            turn.set_result(None)
            self.movement.nudge()

    async def _put_waiting(
        self, id: BlockId, spec: ModelSpec, shard: Shard, header: Header, source: memoryview
    ) -> PutOutcome:
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
        one = Going(0, id, header, place)
        try:
            copy_id = await self.copier.copy(source, stack.hot.view(place))
            return self._keep(id.namespace, [one], [copy_id])[0]
        finally:
            self._give_back(one)

    def _keep(self, namespace: str, going: Sequence[Going], sums: Sequence[int]) -> list[PutOutcome]:
        """The bytes are there, with these checksums: each block is committed, and its place is the block's, or not.
        Mutates."""
        stack, fresh = self.stack, list[tuple[Going, int]]()
        for one, copy_id in zip(going, sums, strict=True):
            id, header = one.id, one.header
            if header.copy_id not in (0, copy_id):
                one.outcome = self._end("refused", why="the bytes do not have the announced checksum")
            elif (row := stack.residency.find(namespace, id.shard, id.key)) is None:
                fresh.append((one, copy_id))
            elif self._as_good(row, namespace, header):  # loaded from Redis meanwhile
                one.outcome = self._end("held", stack.changes.outbox(namespace).head)
            else:
                stack.counters["replaced"] += 1
                stack.remove(row)
                fresh.append((one, copy_id))
        now_s = stack.system.clock.monotonic()
        for _, alike in groupby(fresh, key=lambda pair: pair[0].id.shard):
            mine = list(alike)
            stack.admit_all(
                namespace,
                [one.header for one, _ in mine],
                stack.HOT,
                [one.place for one, _ in mine],
                copy_ids=[copy_id for _, copy_id in mine],
                coming=lambda header: stack.advice.storing(namespace, header, now_s),
            )
        if fresh:
            stack.hot.filled(len(fresh))
            stack.counters["puts_committed"] += len(fresh)
            committed = PutOutcome("committed", stack.changes.outbox(namespace).head)
            for one, _ in fresh:
                one.outcome = committed
        return [one.outcome for one in going if one.outcome is not None]

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


def _objection(kind: Kind, header: Header, source: memoryview) -> str:
    """Why these bytes can't be such a block; empty when they can."""
    if header.namespace != kind.namespace:
        return "the header names another namespace"
    if header.root != kind.root or header.shard != kind.digest or header.tokens != kind.tokens:
        return "the header names another model or shard"
    if header.raw_length != kind.size or source.nbytes != kind.size:
        return f"a block of this shard has {kind.size} bytes, not {source.nbytes}"
    if header.computed_on < kind.least:
        return f"the namespace takes nothing below {kind.least.name.lower()}: this was computed on less"
    if header.stored != Fidelity.EXACT:
        return "raw bytes are stored exactly: the header says otherwise"
    return ""
