"""One move of one block to a slower level: copy, flip, free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.codecs import PLANES_MAX, RAW
from kvstore.errors import TierDown, TierFull
from kvstore.format import ENTRY_DTYPE, HEADER_BYTES, Record, encode_record, expect, trim_record
from kvstore.header import Header
from kvstore.spec import ModelSpec, Shard
from kvstore.store.arena import Slot
from kvstore.store.room import Room
from kvstore.store.shared import Finder
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location
from kvstore.types import Buffer


@dataclass(slots=True)
class Ticket:
    """One move down. Until the destination counts its space itself, `arriving` does."""

    row: int
    level: int
    nbytes: int
    nearest: int
    held: Slot | None  # in the arena: a purge meanwhile must not hand the bytes on while they are read
    planes: int = PLANES_MAX  # leading ones that arrive at the nearest destination
    arriving: bool = True
    saves: int = 0  # bytes that dropping a plane where it lies is thought to free


@dataclass(slots=True)
class Moving:
    """A block on its way: its header and bytes as the destination will have them."""

    namespace: str
    header: Header
    parts: Sequence[Buffer]
    encode_s: float = 0.0  # where it was encoded on the way

    @property
    def nbytes(self) -> int:
        return sum(memoryview(part).nbytes for part in self.parts)


def verified(view: memoryview, header: Header) -> None:
    """Thread: Corrupt unless `view` is the record of that very copy and every checksum holds."""
    record = Record.parse(view)
    expect(record.header, header)
    record.verify()


def lowered(view: memoryview, planes: int) -> tuple[Header, list[Buffer]]:
    """Thread: a record with at most so many planes; as it lies where it has no more."""
    record = Record.parse(view)
    if int(record.table["plane"].max()) < planes:
        return record.header, [view]
    return trim_record(record, planes)


def extent(view: memoryview, planes: int) -> int:
    """Thread: bytes of a record, of which `view` is the beginning, that hold so many leading planes; of what tells it
    where that is not in `view`. Corrupt."""
    header = Header.unpack(view)
    if header.data_start > len(view):
        return header.data_start
    return Record.parse(view, beginning=True).leading(planes)


def leading(view: memoryview, header: Header, planes: int) -> tuple[Header, list[Buffer]]:
    """Thread: the leading planes of a record, of which `view` has at least these. Corrupt unless it is that very copy
    and each of their checksums holds."""
    record = Record.parse(view, beginning=True)
    expect(record.header, header)
    record.verify(planes)
    if len(view) >= record.header.stored_length and int(record.table["plane"].max()) < planes:
        return record.header, [record.view]
    return trim_record(record, planes)


class NoRoom(TierFull):
    """The store's own bounds are reached; the medium is well."""


class NoPlace(NoRoom):
    """There are bytes enough, but none in one piece where the namespace may lie, and nobody there to give way."""


class SourceDown(TierDown):
    """The tier that a block is to leave does not give it: no fault of where it is to go."""


class Carrier:
    """One per store."""

    def __init__(self, stack: Stack, finder: Finder | None, room: Room) -> None:
        self.stack = stack
        self.finder = finder
        self.room = room
        self.arriving = [0] * (stack.REDIS + 1)  # bytes on their way, by destination

    def landed(self, ticket: Ticket) -> None:
        """From here on the destination counts the block, or it has failed. Mutates; idempotent."""
        if ticket.arriving:
            ticket.arriving = False
            self.arriving[ticket.nearest] -= ticket.nbytes

    async def carry(self, ticket: Ticket, destination: int) -> None:
        """Copy, flip, free. Raises TierDown, TierFull, Corrupt, UnknownFormat: nothing has changed then."""
        stack, residency, row = self.stack, self.stack.residency, ticket.row
        if destination == stack.REDIS:
            await self._to_redis(ticket)
        else:
            planes = ticket.planes if destination == ticket.nearest else PLANES_MAX
            moving = await self._source(row, ticket.level, destination, planes)
            location = await self._write(ticket, destination, moving)
            if residency.gone(row) or residency.present(row, destination):
                stack.tiers[destination].free(moving.namespace, moving.header, location)
            else:
                residency.replace_header(row, moving.header)
                stack.add(row, destination, location, moving.header.stored)
                self._count(moving, destination)
        if not residency.gone(row) and residency.present(row, ticket.level) and not residency.pinned(row):
            leaves = not residency.elsewhere(row, ticket.level)
            stack.drop(row, ticket.level)
            stack.counters["left_to_redis" if leaves else "spilled"] += 1

    async def thin(self, ticket: Ticket) -> bool:
        """Drop a block's last planes where it lies: copy what is left, flip, free. Whether the level may go on:
        not where it has no room for the copy. Corrupt, UnknownFormat."""
        stack, residency, row, level = self.stack, self.stack.residency, ticket.row, ticket.level
        tier, slot = stack.arena_tier(level), ticket.held
        assert tier is not None and slot is not None
        if not self._lies_in(row, level, slot):
            return True
        namespace, view = residency.namespace(row), stack.arena.view(slot)
        header, parts = await stack.system.work(len(view), leading, view, residency.header(row), ticket.planes)
        nbytes = sum(memoryview(part).nbytes for part in parts)
        if nbytes >= len(view):
            stack.planes.keep(row)
            return True
        place = tier.reserve(namespace, nbytes)
        if place is None:
            return False
        await tier.fill(namespace, header, place, parts)
        if self._lies_in(row, level, slot) and residency.staying(row, level):
            stack.shrink(row, level, header, place)
            stack.counters["planes_dropped"] += 1
        else:
            tier.free(namespace, header, place)
        return True

    def _lies_in(self, row: int, level: int, slot: Slot) -> bool:
        """Whether a block's copy at a level is still the one in a slot that is held. Pure."""
        if self.stack.residency.gone(row) or not self.stack.residency.present(row, level):
            return False
        now = self.stack.slot(row, level)
        return now is not None and (now.segment, now.offset) == (slot.segment, slot.offset)

    async def _to_redis(self, ticket: Ticket) -> None:
        """To a holder of its own. What Redis has already is not sent again."""
        stack, residency, row = self.stack, self.stack.residency, ticket.row
        assert self.finder is not None
        header, namespace = residency.header(row), residency.namespace(row)
        found = await self.finder.find(namespace, header.shard, header.key)
        known = found is not None and found[0].fidelity >= stack.worth_in(stack.REDIS, namespace, header)
        if known or residency.gone(row) or not residency.present(row, ticket.level):
            return
        moving = await self._source(row, ticket.level, stack.REDIS)
        location = await self.finder.redis.write(namespace, moving.header, moving.parts)
        self._count(moving, stack.REDIS)
        if residency.gone(row):  # purged, or replaced by a better copy, while it was sent
            self.finder.redis.free(namespace, moving.header, location)

    async def _source(self, row: int, level: int, destination: int, most: int = PLANES_MAX) -> Moving:
        """The block's bytes as a destination wants them. Corrupt when they no longer are what was committed."""
        stack, residency = self.stack, self.stack.residency
        work = stack.system.work
        header, namespace = residency.header(row), residency.namespace(row)
        location = residency.location(row, level)
        tier = stack.arena_tier(level)
        if tier is not None:
            view = tier.view(location)
        else:
            view = memoryview(bytearray(location.length))
            try:
                await stack.tiers[level].read(namespace, header, location, view)
            except TierDown as error:
                raise SourceDown(str(error)) from error
        planes = min(most, stack.codec_rules(namespace).planes_in(stack.tier_of(destination)))
        if not residency.levels[level].raw:
            if tier is None:
                await work(len(view), verified, view, header)
            return Moving(namespace, *await work(len(view), lowered, view, planes))
        if destination != stack.REDIS and residency.levels[destination].raw:
            return Moving(namespace, header, [view])
        model = stack.model(header)
        assert model is not None, "a raw block of a model that no put has taught"
        codecs = stack.codecs(namespace, *model)
        little = len(view) if set(codecs) == {RAW} else len(view) + stack.system.inline_bytes  # kernels load in threads
        made, parts, took = await work(little, self._encode, header.unencoded(), view, *model, codecs, planes)
        return Moving(namespace, made, parts, took)

    def _encode(
        self, header: Header, view: memoryview, spec: ModelSpec, shard: Shard, codecs: Sequence[int], planes: int
    ) -> tuple[Header, list[Buffer], float]:
        """Thread: a record of raw bytes, and the seconds it took."""
        clock = self.stack.system.clock
        begin = clock.monotonic()
        made, parts = encode_record(header, view, spec, shard, codecs, planes)
        return made, parts, clock.monotonic() - begin

    def _count(self, moving: Moving, destination: int) -> None:
        """What codecs made of it, for the status."""
        if moving.header.chunk_count:
            table = np.frombuffer(moving.parts[0], ENTRY_DTYPE, moving.header.chunk_count, HEADER_BYTES)
            self.stack.codec_use.written(self.stack.tier_of(destination), table, moving.encode_s)

    async def _write(self, ticket: Ticket, destination: int, moving: Moving) -> Location:
        stack, tier = self.stack, self.stack.arena_tier(destination)
        self.landed(ticket)
        if tier is None:
            if not self.room.make(destination, moving.nbytes, namespace=moving.namespace):
                raise NoRoom("no room below")
            return await stack.tiers[destination].write(moving.namespace, moving.header, moving.parts)
        location = self.room.reserve(destination, moving.namespace, moving.nbytes)
        if location is None:
            scattered = tier.fits(moving.nbytes) and not stack.arena.asked
            if scattered and stack.residency.victim(destination) is None:
                raise NoPlace("the free bytes below are scattered over other namespaces' segments")
            raise NoRoom("no room below")
        return await tier.fill(moving.namespace, moving.header, location, moving.parts)
