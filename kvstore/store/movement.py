"""Spilling: what leaves a level for a slower one. Copy, flip, free: a block is readable somewhere at every instant.

`pump` is synchronous and starts as many moves as its bounds allow; a move that ends wakes it again. A move that fails
leaves the block where it was and its level alone until the heartbeat, or until something else gave way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from kvstore.errors import Corrupt, TierDown, TierFull, UnknownFormat
from kvstore.store.carrier import Carrier, NoPlace, NoRoom, SourceDown, Ticket
from kvstore.store.departures import Departure, Departures, Way
from kvstore.store.growth import Growth
from kvstore.store.room import Outlets, Room
from kvstore.store.shared import Finder
from kvstore.store.stack import Stack

DROPS_A_PUMP = 256
"""Clean copies dropped in one go; the rest after the event loop had its turn."""


class Movement:
    """One per store. `pump` whenever something came or gave way."""

    def __init__(self, stack: Stack, finder: Finder | None) -> None:
        self.stack = stack
        self.outlets = Outlets(stack)
        self.departures = Departures(stack, self.outlets)
        self.growth = Growth(stack.arena, stack.system.pool, self.nudge)
        self.room = Room(stack, self.outlets, self.growth, self.press, self._anything_moves, self._move_on)
        self._carrier = Carrier(stack, finder, self.room)
        self.moving_bytes = 0  # of the copies on their way down
        self._targets: dict[int, int] = {}  # level -> bytes it is being drained to, since it crossed its watermark
        self._wanted: dict[int, int] = {}  # likewise, since something waits for room there
        self._thinning: dict[int, int] = {}  # level -> bytes of the planes that are being dropped there
        self._stuck: dict[int, None] = {}  # levels whose last move failed
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._again = False  # a pump stopped at DROPS_A_PUMP
        self._closed = False

    # ---- what is to be moved

    @property
    def busy(self) -> bool:
        return bool(self._tasks) or self._again or self.growth.busy

    def _anything_moves(self) -> bool:
        return bool(self._tasks) or self.growth.busy

    def press(self, level: int, nbytes: int) -> None:
        """`nbytes` are waited for in a level. Mutates."""
        if not self.stack.arena.asked or self.stack.arena_tier(level) is None:
            self._want(level, nbytes)
            self.pump()

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
        for namespace, level in self.stack.quota.limited:
            self.room.give_way(level, namespace, 0)
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
        self.stack.planes.heartbeat()
        self.growth.poke()
        self._stuck.clear()
        self.pump()

    def _pump_level(self, level: int) -> None:
        residency, config = self.stack.residency, self.stack.config
        capacity = residency.levels[level].capacity
        outlet = self.outlets.open(level) or self.stack.planes.any_at(level)
        if self._staying(level) > config.high_watermark * capacity and outlet:
            self._targets.setdefault(level, int(config.low_watermark * capacity))
        done = 0
        while done < DROPS_A_PUMP:
            staying = self._staying(level)
            for targets in (self._targets, self._wanted):
                if staying <= targets.get(level, staying):
                    targets.pop(level, None)
            wanted = level in self._wanted
            if level in self._stuck or not (wanted or level in self._targets):
                return
            short = staying - (self._wanted if wanted else self._targets)[level] - self._thinning.get(level, 0)
            departure = self.departures.next(level, short, give_up=wanted) if short > 0 else None
            if departure is None or not self._depart(departure):
                return
            done += len(departure.rows)
        self._again = True

    def _depart(self, departure: Departure) -> bool:
        """Do what was decided, or begin to; whether anything came of it. Mutates."""
        self.stack.counters["departures"] += 1
        if departure.way == Way.MOVE:
            return self._begin(departure)
        if departure.way == Way.THIN:
            return self._thin(departure)
        for row in departure.rows:
            self.room.shed(row, departure.level)
        self.room.progressed()
        return True

    def _begin(self, departure: Departure) -> bool:
        """Begin to move a run down, as much of it as the bounds allow; whether any. Mutates."""
        if not departure.destinations:
            return bool(self.outlets.open(departure.level)) and self._over_quota(departure.rows[0])
        for at, row in enumerate(departure.rows):
            if at and not self.stack.residency.may_leave(row, departure.level):
                break  # making room for the one before it took more than was foreseen
            if not self._start(row, departure):
                return at > 0
        return True

    def _start(self, row: int, departure: Departure) -> bool:
        """Begin to move a block of a run, if the bounds allow it. Mutates."""
        stack, residency, level = self.stack, self.stack.residency, departure.level
        nearest = departure.destinations[0]
        namespace, nbytes = residency.namespace(row), stack.length(row, level)
        if self._tasks and self.moving_bytes + nbytes > stack.config.spill_queue_bytes:
            return False
        if nearest < stack.REDIS:
            if not self.room.give_way(nearest, namespace, nbytes):
                return self._over_quota(row)
            if self._thins_for(nearest, namespace, nbytes):
                return False  # again when that is done
            if not self._may_come(nearest, nbytes):
                return self._evict_instead(row, level, nearest, nbytes)
        ticket = Ticket(row, level, nbytes, nearest, stack.slot(row, level), departure.planes)
        if ticket.held is not None:
            stack.arena.hold(ticket.held)
        residency.work(row)
        residency.leave(row, level)
        self._carrier.arriving[nearest] += nbytes
        self._run(self._move(ticket, departure.destinations), ticket, nbytes)
        return True

    def _run(self, work: Coroutine[None, None, None], ticket: Ticket, nbytes: int) -> None:
        self.moving_bytes += nbytes
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._ended(task, ticket))

    def _thin(self, departure: Departure) -> bool:
        """Begin to drop the last planes of a run's blocks; whether any. Mutates."""
        stack, residency, level = self.stack, self.stack.residency, departure.level
        for at, row in enumerate(departure.rows):
            nbytes = stack.length(row, level)
            if self._tasks and self.moving_bytes + nbytes > stack.config.spill_queue_bytes:
                return at > 0
            ticket = Ticket(row, level, nbytes, level, stack.slot(row, level), departure.planes, arriving=False)
            assert ticket.held is not None
            stack.arena.hold(ticket.held)
            residency.work(row)
            ticket.saves = stack.planes.saved(nbytes, int(residency.rows.worth(row, level)), departure.planes)
            self._thinning[level] = self._thinning.get(level, 0) + ticket.saves
            self._run(self._thin_one(ticket), ticket, nbytes)
        return True

    async def _thin_one(self, ticket: Ticket) -> None:
        stack, row, level = self.stack, ticket.row, ticket.level
        try:
            if not await self._carrier.thin(ticket):
                self._stuck[level] = None
        except (Corrupt, UnknownFormat):
            stack.damaged(row, level)
        finally:
            assert ticket.held is not None
            stack.arena.release(ticket.held)
            stack.residency.done(row)
            self._thinning[level] -= ticket.saves

    def _move_on(self, row: int, level: int) -> bool:
        """Begin to move a block down for its namespace's quota; whether that, or the end of a block, has begun."""
        if level in self._stuck or self._closed:
            return False
        return self._begin(self.departures.move([row], level))

    def _over_quota(self, row: int) -> bool:
        """Its namespace has no room below either, and nothing of it there gives way: a leaf of it goes. Mutates.

        Whether one did; while anything moves it may yet find room.
        """
        residency = self.stack.residency
        leaf = residency.family.descendant(row)
        if self._tasks or residency.busy(leaf) or residency.pinned(leaf):
            return False
        self.stack.counters["evicted"] += 1
        self.stack.quota.evicted[residency.namespace(leaf)] += 1
        self.stack.remove(leaf, evicted=True)
        self.room.progressed()
        return True

    def _thins_for(self, level: int, namespace: str, nbytes: int) -> bool:
        """Whether planes go for one more in the last level, beside those on their way to it, before any block does:
        those that are worth less. Mutates: they begin to."""
        wanted = nbytes + self._carrier.arriving[level]
        if level in self._stuck or self.stack.arena_tier(level) is None or not self.stack.planes.any_at(level):
            return False
        short = self.room.short(level, wanted)
        if short <= 0 and self.stack.arena.fits(namespace, nbytes):
            return False
        short = max(short, nbytes) - self._thinning.get(level, 0)  # free bytes in pieces are of no use
        if short <= 0:
            return True
        departure = self.departures.thinner(level, short)
        return departure is not None and self._depart(departure)

    def _may_come(self, level: int, nbytes: int) -> bool:
        """Whether a level has, or can make at once, room for one more beside those on their way to it."""
        wanted = nbytes + self._carrier.arriving[level]
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
        leaf = residency.family.descendant(row)
        if residency.busy(leaf):
            return False  # it is on its way somewhere: again when it has arrived
        if residency.pinned(leaf):
            return self.room.make(destination, nbytes + self._carrier.arriving[destination], force=True)
        self.stack.counters["evicted"] += 1
        self.stack.remove(leaf, evicted=True)
        self.room.progressed()
        return True

    def _ended(self, task: asyncio.Task[None], ticket: Ticket) -> None:
        del self._tasks[task]
        self.moving_bytes -= ticket.nbytes
        self._carrier.landed(ticket)
        if task.cancelled():
            return  # only where the process ends: nothing new is begun
        if (error := task.exception()) is not None:
            self.stack.counters["moves_crashed"] += 1
            self._stuck[ticket.level] = None
            asyncio.get_running_loop().call_exception_handler({"message": "a move failed", "exception": error})
        self.room.progressed()
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
        """Whether a destination took the block, or it need not move any more; one that is down, or has no place that
        could become free, is passed over."""
        residency = self.stack.residency
        for destination in destinations:
            if residency.gone(ticket.row) or not residency.present(ticket.row, ticket.level):
                return True
            try:
                await self._carrier.carry(ticket, destination)
                self.outlets.worked(destination)
                return True
            except SourceDown:
                self.stack.counters["moves_down"] += 1
                return False
            except TierDown:
                self.outlets.failed(destination)
                self.stack.counters["moves_down"] += 1
            except TierFull as error:
                self.stack.counters["moves_full"] += 1
                if isinstance(error, NoPlace):
                    if self.outlets.evicts(destination):
                        return self.room.evict(ticket.row, ticket.level)
                    continue
                if destination < self.stack.REDIS:
                    self._want(destination, ticket.nbytes)  # it must give way first
                if not isinstance(error, NoRoom):
                    self.outlets.failed(destination)
                return False
        return False

    async def close(self) -> None:
        """Stop; what is on its way stays where it was."""
        self._closed = True
        await self.growth.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
