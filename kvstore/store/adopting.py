"""Taking in blocks that another worker has, as they are stored there: a put without a client.

They are received where they will lie. A reserved space is no block yet: nobody finds it before it is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from kvstore.errors import KVStoreError
from kvstore.header import Header, check_header
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.store.movement import Movement
from kvstore.store.putting import PutOutcome
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location
from kvstore.tiers.host import ArenaTier
from kvstore.types import Fidelity

ROOM_SHARE = 4
"""One adoption has at most this part of hot's cpu pool: its spaces are nobody's blocks until all of them have come."""


class Adopting:
    """One per store."""

    def __init__(self, stack: Stack, movement: Movement) -> None:
        self._stack, self._movement = stack, movement
        self._under_way = 0

    @property
    def busy(self) -> bool:
        return self._under_way > 0

    @property
    def bytes_max(self) -> int:
        """Raw bytes of the blocks of one adoption. Pure."""
        return self._stack.hot.capacity // ROOM_SHARE

    @contextmanager
    def adoption(self, namespace: str, spec: ModelSpec, shard: Shard) -> Iterator[Adoption]:
        """Blocks of one shard on their way in. What is not kept at its end is given back: nobody writes to it then."""
        made = Adoption(self._stack, self._movement, namespace, spec, shard)
        self._under_way += 1
        try:
            yield made
        finally:
            self._under_way -= 1
            made.give_back()
            self._movement.nudge()


class Adoption:
    """`make_room` once, fill and verify what it gave, `keep`."""

    def __init__(self, stack: Stack, movement: Movement, namespace: str, spec: ModelSpec, shard: Shard) -> None:
        self._stack, self._movement = stack, movement
        self._namespace, self._spec, self._shard = namespace, spec, shard
        self._headers: Sequence[Header | None] = ()
        self._places: dict[int, tuple[int, Location]] = {}  # block -> (level, space), reserved and not kept
        self.outcomes: dict[int, PutOutcome] = {}  # of blocks about which nothing is left to decide

    async def make_room(self, headers: Sequence[Header | None]) -> list[memoryview | None]:
        """Where the bytes of each block are to land: its record, or its raw bytes where the header has no chunks. None
        for those that are not wanted or find no room: `outcomes` says why. Mutates; waits for room at most
        `put_wait_s`, for all of them together. Never raises for a tier, nor for what a peer may have got wrong."""
        self._headers = headers
        time = asyncio.get_running_loop().time
        until = time() + self._stack.config.put_wait_s
        learned = self._learn()
        rooms: list[memoryview | None] = []
        for block, header in enumerate(headers):
            room = None if header is None else await self._room(block, header, learned, max(0.0, until - time()))
            rooms.append(room)
        return rooms

    async def _room(self, block: int, header: Header, unknown: str, wait_s: float) -> memoryview | None:
        """Mutates. `unknown`: what `_learn` said."""
        outcome = self._why_not(header, unknown)
        if outcome is None:
            level = self._stack.HOST if header.chunk_count else self._stack.HOT  # a record, or raw bytes
            nbytes = header.stored_length or header.raw_length
            place = await self._movement.room.wait(level, self._namespace, nbytes, wait_s)
            if place is not None:
                self._places[block] = level, place
                return self._tier(level).view(place)
            outcome = self._no_room(level, nbytes)
        self.outcomes[block] = outcome
        return None

    def keep(self, block: int, purges: Collection[bytes]) -> PutOutcome:
        """A block of those that got room is there, verified: visible from now on, unless it must not be. Mutates.
        `purges`: what its holder had done when it gave the copy; one from before a purge is refused."""
        stack, namespace, header = self._stack, self._namespace, self._headers[block]
        assert header is not None, "a block without a header got room"
        level, place = self._places.pop(block)
        kept = False
        try:
            if stack.purges.fences(namespace, self._spec.root, self._spec, purges):
                return self._outcome("refused", why="purged here since, and not where it came from")
            if self._held(header):  # put here meanwhile
                return self._outcome("held")
            row = stack.residency.find(namespace, header.shard, header.key)
            if row is not None:
                stack.counters["replaced"] += 1
                stack.remove(row)
            self._tier(level).filled()
            if level == stack.HOT:
                stack.advice.storing(namespace, header, stack.system.clock.monotonic())
            stack.admit(namespace, header, level, place)
            kept = True
            return self._outcome("committed", stack.changes.outbox(namespace).head)
        finally:
            if not kept:
                self._tier(level).free(namespace, header, place)

    def give_back(self) -> None:
        """What was not kept. Mutates; idempotent."""
        places, self._places = self._places, {}
        for block, (level, place) in places.items():
            header = self._headers[block]
            assert header is not None, "a block without a header got room"
            self._tier(level).free(self._namespace, header, place)

    def _tier(self, level: int) -> ArenaTier:
        return self._stack.hot if level == self._stack.HOT else self._stack.host

    def _learn(self) -> str:
        """Have the catalog know what the blocks are of; why it does not, empty when it does. Mutates."""
        catalog = self._stack.catalog
        try:
            self._shard.check(self._spec)
            catalog.learn_namespace(self._namespace)
            catalog.learn_spec(self._spec)
            catalog.learn_shard(self._shard)
        except KVStoreError as error:
            return str(error)
        return ""

    def _why_not(self, header: Header, unknown: str) -> PutOutcome | None:
        """What becomes of a block that needs no room. Mutates: a namespace's rate is spent."""
        why = self._objection(header)
        if why:
            return self._outcome("refused", why=why)
        if self._held(header):
            return self._outcome("held")
        if unknown:
            return self._outcome("dropped", why=unknown)
        quota = self._stack.quota
        if not header.chunk_count and not quota.spend(self._namespace, header.raw_length):
            quota.dropped[self._namespace] += 1
            return self._outcome("dropped", why="more bytes a second than the namespace's rate_bytes")
        return None

    def _objection(self, header: Header) -> str:
        """Why this can't be a block of these; empty when it can. Pure."""
        try:
            check_header(header, self._spec, self._shard)
        except KVStoreError as error:
            return str(error)
        if header.namespace != namespace_digest(self._namespace):
            return "the header names another namespace"
        least = self._stack.codec_rules(self._namespace).least
        if header.fidelity < least:
            return f"the namespace takes nothing below {least.name.lower()}"
        if not header.chunk_count and header.stored != Fidelity.EXACT:
            return "raw bytes are stored exactly: the header says otherwise"
        if header.raw_length > self._stack.config.block_bytes_max:
            return f"at most {self._stack.config.block_bytes_max} bytes (block_bytes_max) are taken"
        return ""

    def _held(self, header: Header) -> bool:
        """Whether a copy as good is here. Pure."""
        row = self._stack.residency.find(self._namespace, header.shard, header.key)
        return row is not None and self._stack.residency.fidelity(row) >= header.fidelity

    def _no_room(self, level: int, nbytes: int) -> PutOutcome:
        quota = self._stack.quota
        if quota.over(self._namespace, level, nbytes) > 0:
            quota.dropped[self._namespace] += 1
        return self._outcome("dropped", why="no room in the tier, or within the namespace's quota of it")

    def _outcome(self, state: str, seq: int = 0, why: str = "") -> PutOutcome:
        self._stack.counters[f"adopted_{state}"] += 1
        return PutOutcome(state, seq, why)
