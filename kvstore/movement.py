"""Spilling: what leaves a level for a slower one. Copy, flip, free: a block is readable somewhere at every instant.

`pump` is synchronous and starts as many moves as its bounds allow; a move that ends wakes it again. A move that fails
leaves the block where it was and its level alone until the heartbeat, or until something else gave way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.arena import Slot
from kvstore.errors import Corrupt, TierDown, TierFull, UnknownFormat
from kvstore.format import Record, encode_record, expect
from kvstore.growth import Growth
from kvstore.header import Header
from kvstore.room import Outlets, Room
from kvstore.shared import Finder
from kvstore.stack import Stack
from kvstore.tiers.base import Location
from kvstore.types import Buffer

DROPS_A_PUMP = 256
"""Clean copies dropped in one go; the rest after the event loop had its turn."""


@dataclass(slots=True)
class Ticket:
    """One move down. Until the destination counts its space itself, `arriving` does."""

    row: int
    level: int
    nbytes: int
    nearest: int
    held: Slot | None  # in the arena: a purge meanwhile must not hand the bytes on while they are read
    arriving: bool = True


@dataclass(slots=True)
class Moving:
    """A block on its way: its header and bytes as the destination will have them."""

    namespace: str
    header: Header
    parts: Sequence[Buffer]

    @property
    def nbytes(self) -> int:
        return sum(memoryview(part).nbytes for part in self.parts)


def verified(view: memoryview, header: Header) -> None:
    """Thread: Corrupt unless `view` is the record of that very copy and every checksum holds."""
    record = Record.parse(view)
    expect(record.header, header)
    record.verify()


class NoRoom(TierFull):
    """The store's own bounds are reached; the medium is well."""


class Movement:
    """One per store. `pump` whenever something came or gave way."""

    def __init__(self, stack: Stack, finder: Finder | None) -> None:
        self.stack = stack
        self.finder = finder
        self.outlets = Outlets(stack)
        self.growth = Growth(stack.arena, stack.system.pool, self.nudge)
        self.room = Room(stack, self.outlets, self.growth, self.press)
        self.moving_bytes = 0  # of the copies on their way down
        self._targets: dict[int, int] = {}  # level -> bytes it is being drained to, since it crossed its watermark
        self._wanted: dict[int, int] = {}  # likewise, since something waits for room there
        self._stuck: dict[int, None] = {}  # levels whose last move failed
        self._arriving = [0] * (stack.REDIS + 1)  # bytes on their way, by destination
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._again = False  # a pump stopped at DROPS_A_PUMP
        self._closed = False

    # ---- what is to be moved

    @property
    def busy(self) -> bool:
        return bool(self._tasks) or self._again or self.growth.busy

    def press(self, level: int, nbytes: int) -> bool:
        """`nbytes` are waited for in a level; whether anything is on its way that may make room. Mutates."""
        if not self.stack.arena.asked or self.stack.arena_tier(level) is None:
            self._want(level, nbytes)
            self.pump()
        return bool(self._tasks) or self.growth.busy

    def _want(self, level: int, nbytes: int) -> None:
        """Drain a level until `nbytes` fit; where they would, but find no place in one piece, by as much. Mutates."""
        short = self.room.short(level, nbytes)
        target = max(0, self.stack.residency.used[level] - (short if short > 0 else nbytes))
        self._wanted[level] = min(target, self._wanted.get(level, target))

    def _staying(self, level: int) -> int:
        """Bytes of a level that nobody moves away yet."""
        return self.stack.residency.used[level] - self.stack.residency.leaving_bytes[level]

    def pump(self) -> None:
        """Start moves, the slowest level first: it makes room for the faster ones. Mutates; never waits."""
        if self._closed:
            return
        self._again = False
        for level in range(len(self.stack.tiers) - 1, -1, -1):
            self._pump_level(level)
        if self._again:
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        self.pump()
        self.room.progressed()

    def nudge(self) -> None:
        """Something gave way: what was stuck for want of room is tried again. Mutates."""
        self._stuck.clear()
        self.room.progressed()
        self.pump()

    def heartbeat(self) -> None:
        """Try again what failed. Mutates."""
        self.outlets.heartbeat()
        self.stack.arena.heartbeat()
        self.growth.poke()
        self._stuck.clear()
        self.pump()

    def _pump_level(self, level: int) -> None:
        residency, config = self.stack.residency, self.stack.config
        capacity = residency.levels[level].capacity
        if self._staying(level) > config.high_watermark * capacity and self.outlets.open(level):
            self._targets.setdefault(level, int(config.low_watermark * capacity))
        for _ in range(DROPS_A_PUMP):
            staying = self._staying(level)
            for targets in (self._targets, self._wanted):
                if staying <= targets.get(level, staying):
                    targets.pop(level, None)
            wanted = level in self._wanted
            if level in self._stuck or not (wanted or level in self._targets):
                return
            row = residency.victim(level, force=not self.outlets.evicts(level))
            if row is None:
                return
            if self.room.shed(row, level, clean_only=not wanted):
                self.room.progressed()
            elif not self._start(row, level):
                return
        self._again = True

    def _start(self, row: int, level: int) -> bool:
        """Begin to move a block down, if a destination and the bounds allow it. Mutates."""
        stack, residency = self.stack, self.stack.residency
        destinations = self.outlets.open(level)
        nbytes = stack.length(row, level)
        if not destinations or (self._tasks and self.moving_bytes + nbytes > stack.config.spill_queue_bytes):
            return False
        if destinations[0] < stack.REDIS and not self._may_come(destinations[0], nbytes):
            return self._evict_instead(row, level, destinations[0], nbytes)
        ticket = Ticket(row, level, nbytes, destinations[0], stack.slot(row, level))
        if ticket.held is not None:
            stack.arena.hold(ticket.held)
        residency.work(row)
        residency.leave(row, level)
        self.moving_bytes += nbytes
        self._arriving[ticket.nearest] += nbytes
        task = asyncio.get_running_loop().create_task(self._move(ticket, destinations))
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._ended(task, ticket))
        return True

    def _may_come(self, level: int, nbytes: int) -> bool:
        """Whether a level has, or can make at once, room for one more beside those on their way to it."""
        wanted = nbytes + self._arriving[level]
        if not self.room.make(level, wanted):
            self._want(level, wanted)
            self._pump_level(level)
        return self.stack.tiers[level].fits(wanted)

    def _evict_instead(self, row: int, level: int, destination: int, nbytes: int) -> bool:
        """All that lies below is needed to reach other blocks: what only hangs on them is worth less. Mutates.

        Gives up a leaf of the coming block's subtree, wherever it lies; whether something was given up.
        """
        residency = self.stack.residency
        if not self.outlets.evicts(destination):
            return False
        leaf = residency.descendant(row)
        if residency.busy(leaf):
            return False  # it is on its way somewhere: again when it has arrived
        if residency.pinned(leaf):
            return self.room.make(destination, nbytes + self._arriving[destination], force=True)
        self.stack.counters["evicted"] += 1
        self.stack.remove(leaf, evicted=True)
        self.room.progressed()
        return True

    def _arrived(self, ticket: Ticket) -> None:
        if ticket.arriving:
            ticket.arriving = False
            self._arriving[ticket.nearest] -= ticket.nbytes

    def _ended(self, task: asyncio.Task[None], ticket: Ticket) -> None:
        del self._tasks[task]
        self.moving_bytes -= ticket.nbytes
        self._arrived(ticket)
        self.room.progressed()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stack.counters["moves_crashed"] += 1
            asyncio.get_running_loop().call_exception_handler({"message": "a move failed", "exception": error})
        self.pump()

    # ---- one move

    async def _move(self, ticket: Ticket, destinations: list[int]) -> None:
        stack, residency = self.stack, self.stack.residency
        row, level = ticket.row, ticket.level
        try:
            if await self._to_one_of(ticket, destinations):
                self._stuck.clear()
            else:
                self._stuck[level] = None
        except (Corrupt, UnknownFormat):
            stack.damaged(row, level)  # bytes that do not hold must not go further
        finally:
            if ticket.held is not None:
                stack.arena.release(ticket.held)
            if not residency.gone(row) and residency.present(row, level) and not residency.staying(row, level):
                residency.stay(row, level)
            residency.done(row)

    async def _to_one_of(self, ticket: Ticket, destinations: list[int]) -> bool:
        """Whether a destination took the block, or it need not move any more; one that is down is passed over."""
        residency = self.stack.residency
        for destination in destinations:
            if residency.gone(ticket.row) or not residency.present(ticket.row, ticket.level):
                return True
            try:
                await self._to(ticket, destination)
                self.outlets.worked(destination)
                return True
            except TierDown:
                self.outlets.failed(destination)
                self.stack.counters["moves_down"] += 1
            except TierFull as error:
                self.stack.counters["moves_full"] += 1
                if destination < self.stack.REDIS:
                    self._want(destination, ticket.nbytes)  # it must give way first
                if not isinstance(error, NoRoom):
                    self.outlets.failed(destination)
                return False
        return False

    async def _to(self, ticket: Ticket, destination: int) -> None:
        """Copy, flip, free. Raises TierDown, TierFull, Corrupt, UnknownFormat: nothing has changed then."""
        stack, residency, row = self.stack, self.stack.residency, ticket.row
        if destination == stack.REDIS:
            await self._to_redis(ticket)
        else:
            moving = await self._source(row, ticket.level, raw=residency.levels[destination].raw)
            location = await self._write(ticket, destination, moving)
            if residency.gone(row) or residency.present(row, destination):
                stack.tiers[destination].free(moving.namespace, moving.header, location)
            else:
                residency.replace_header(row, moving.header)
                stack.add(row, destination, location)
        if not residency.gone(row) and residency.present(row, ticket.level) and not residency.pinned(row):
            leaves = not residency.elsewhere(row, ticket.level)
            stack.drop(row, ticket.level)
            stack.counters["left_to_redis" if leaves else "spilled"] += 1

    async def _to_redis(self, ticket: Ticket) -> None:
        """To a holder of its own. What Redis has already is not sent again."""
        residency, row = self.stack.residency, ticket.row
        assert self.finder is not None
        header, namespace = residency.header(row), residency.namespace(row)
        found = await self.finder.find(namespace, header.shard, header.key)
        if found is None or found[0].fidelity < header.fidelity:
            moving = await self._source(row, ticket.level, raw=False)
            await self.finder.redis.write(namespace, moving.header, moving.parts)

    async def _source(self, row: int, level: int, *, raw: bool) -> Moving:
        """The block's bytes as a destination wants them. Corrupt when they no longer are what was committed."""
        stack, residency = self.stack, self.stack.residency
        pool = stack.system.pool
        header, namespace = residency.header(row), residency.namespace(row)
        location = residency.location(row, level)
        tier = stack.arena_tier(level)
        if tier is not None:
            view = tier.view(location)
        else:
            view = memoryview(bytearray(location.length))
            await stack.tiers[level].read(namespace, header, location, view)
        if not residency.levels[level].raw:
            if tier is None:
                await pool.run(verified, view, header)
            return Moving(namespace, header, [view])
        if raw:
            return Moving(namespace, header, [view])
        model = stack.model(header)
        assert model is not None, "a raw block of a model that no put has taught"
        spec, shard = model
        made, parts = await pool.run(encode_record, header.unencoded(), view, spec, shard, stack.codec(spec, shard))
        return Moving(namespace, made, parts)

    async def _write(self, ticket: Ticket, destination: int, moving: Moving) -> Location:
        stack, tier = self.stack, self.stack.arena_tier(destination)
        self._arrived(ticket)  # from here on the destination counts it, or it has failed
        if tier is None:
            if not self.room.make(destination, moving.nbytes):
                raise NoRoom("no room below")
            return await stack.tiers[destination].write(moving.namespace, moving.header, moving.parts)
        location = self.room.reserve(destination, moving.namespace, moving.nbytes)
        if location is None:
            raise NoRoom("no room below")
        return await tier.fill(moving.namespace, moving.header, location, moving.parts)

    async def close(self) -> None:
        """Stop; what is on its way stays where it was."""
        self._closed = True
        await self.growth.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
