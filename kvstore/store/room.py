"""Making room in a level: clean copies first, eviction on purpose only where nothing below can take a block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kvstore.errors import TierFull
from kvstore.fair import FairLine
from kvstore.residency.together import together
from kvstore.store.growth import Growth
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location

ORDERLY_DROPS = 16
"""Victims given up in the policy's order before a whole segment is cleared for an allocation that finds no place."""

SEGMENTS_TRIED = 4

GIVES_A_TURN = 256
"""Blocks of a namespace that give way to one more of it before others have their turn."""

GROWTH_WAIT_S = 5.0
"""Fresh memory is worth waiting for: it is faulted in once, and only while the store is still growing."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One who waits for room; `over`: it gave way to others."""

    place: Location | None = None
    over: bool = False


class Outlets:
    """Which destinations take blocks at present. A failed write closes one until the next heartbeat."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._closed: dict[int, float] = {}  # destination -> since when it failed, without a success between
        self._paused: dict[int, None] = {}  # not tried again before the heartbeat

    def failed(self, destination: int) -> None:
        """A write there failed. Mutates."""
        self._paused[destination] = None
        self._closed.setdefault(destination, self.stack.system.clock.monotonic())

    def worked(self, destination: int) -> None:
        """A write there worked. Mutates."""
        self._paused.pop(destination, None)
        self._closed.pop(destination, None)

    def heartbeat(self) -> None:
        """Try everything again. Mutates."""
        self._paused.clear()

    def below(self, level: int) -> list[int]:
        """Every configured destination under a level, the nearest first. Pure."""
        last = self.stack.REDIS + (1 if self.stack.redis is not None else 0)
        return list(range(level + 1, last))

    def open(self, level: int) -> list[int]:
        """Those that take blocks now, as far as is known. Pure."""
        return [destination for destination in self.below(level) if destination not in self._paused]

    def evicts(self, level: int) -> bool:
        """Whether a level's last copies may be given up: nothing is below it, or nothing there works for long. Pure."""
        below = self.below(level)
        if any(destination not in self._closed for destination in below):
            return False
        now = self.stack.system.clock.monotonic()
        return all(now - self._closed[destination] >= self.stack.config.evict_after_s for destination in below)


class Room:
    """Space for what comes. `reserve` and `make` are synchronous; `wait` waits for moves, within bounds."""

    def __init__(
        self,
        stack: Stack,
        outlets: Outlets,
        growth: Growth,
        press: Callable[[int, int], None],
        moving: Callable[[], bool],
        move_on: Callable[[int, int], bool],
    ) -> None:
        self.stack = stack
        self.outlets = outlets
        self.growth = growth
        self._press = press  # (level, bytes): move so much down
        self._anything_moves = moving  # whether anything is on its way that may make room, a new segment too
        self._move_on = move_on  # (row, level): begin to move it down; whether that, or its end, has begun
        self._lines = [FairLine[Waiter]() for _ in stack.tiers]  # those who wait, by level
        self._progress = asyncio.Event()
        self._served: list[asyncio.Event | None] = [None for _ in stack.tiers]  # the progress after which the line was
        self._moving = [False for _ in stack.tiers]  # served last, and whether anything was on its way then

    def progressed(self) -> None:
        """Something left a level, or a move ended. Mutates: wakes who waits for room."""
        self._progress.set()
        self._progress = asyncio.Event()

    async def progress(self) -> None:
        """Wait for the next `progressed`."""
        await self._progress.wait()

    def shed(self, row: int, level: int, *, clean_only: bool = False) -> bool:
        """Give up one copy at once, if that loses nothing, or where eviction is all that is left. Mutates."""
        stack = self.stack
        if stack.residency.elsewhere(row, level):
            stack.counters["clean_drops"] += 1
        elif not clean_only and self.outlets.evicts(level):
            stack.counters["evicted"] += 1
        else:
            return False
        stack.drop(row, level)
        return True

    def shed_together(self, row: int, level: int, nbytes: int, *, clean_only: bool = False) -> bool:
        """The same for all that leave together with the next one, until so many bytes are free. Mutates."""
        residency = self.stack.residency
        if not residency.elsewhere(row, level) and (clean_only or not self.outlets.evicts(level)):
            return False
        self.stack.counters["departures"] += 1
        for each in together(residency, row, level, nbytes):
            self.shed(each, level, clean_only=clean_only)
        return True

    def evict(self, row: int, level: int) -> bool:
        """Give up a copy that nothing below can take, its move having failed; whether it is gone. Mutates."""
        if self.stack.residency.pinned(row) or not self.stack.residency.present(row, level):
            return False
        self.stack.counters["evicted"] += 1
        self.stack.drop(row, level)
        return True

    def short(self, level: int, nbytes: int) -> int:
        """Bytes that must leave a level before `nbytes` fit; not above 0 where they do. Pure."""
        tier = self.stack.arena_tier(level)
        if tier is not None:
            return tier.short(nbytes)
        below = self.stack.tiers[level]
        return 0 if below.fits(nbytes) else max(1, below.used + nbytes - below.capacity)

    def give_way(self, level: int, namespace: str, nbytes: int, *, clean_only: bool = False) -> bool:
        """Over its quota with `nbytes` more, a namespace's own blocks leave a level first; whether they do. Mutates."""
        quota = self.stack.quota
        for _ in range(GIVES_A_TURN):
            if quota.over(namespace, level, nbytes) <= 0:
                return True
            row = quota.victim(namespace, level)
            if row is None:
                return False
            if self.shed(row, level, clean_only=clean_only):
                quota.evicted[namespace] += 1
            elif clean_only or not self._move_on(row, level):
                return False
        return quota.over(namespace, level, nbytes) <= 0

    def make(self, level: int, nbytes: int, *, namespace: str = "", force: bool = False) -> bool:
        """Shed victims until `nbytes` fit within the level's bound, and the namespace's; whether they do. Mutates.

        `force`: parents before their children, where nothing else is left.
        """
        if not self.give_way(level, namespace, nbytes):
            return False
        tier = self.stack.tiers[level]
        while not tier.fits(nbytes):
            row = self.stack.residency.victim(level, force=force) if nbytes <= tier.capacity else None
            if row is None or not self.shed_together(row, level, self.short(level, nbytes)):
                return False
        return True

    def reserve(self, level: int, namespace: str, nbytes: int, *, clean_only: bool = False) -> Location | None:
        """Space in an arena level, after shedding what may be shed; None where there is none. Mutates."""
        stack = self.stack
        tier = stack.arena_tier(level)
        assert tier is not None, f"level {level} does not lie in the arena"
        if nbytes > tier.capacity or not self.give_way(level, namespace, nbytes, clean_only=clean_only):
            return None
        for dropped in range(ORDERLY_DROPS + stack.residency.blocks[level]):
            location = tier.reserve(namespace, nbytes)
            self.growth.poke()
            if location is not None or stack.arena.asked:
                return location
            crowded = tier.fits(nbytes)  # bytes would do: the free ones are scattered, or another namespace's
            if crowded and dropped >= ORDERLY_DROPS:
                break
            row = stack.residency.victim(level)
            if row is None or not self.shed_together(row, level, tier.short(nbytes), clean_only=clean_only):
                break
        if not clean_only and tier.fits(nbytes):
            self._clear_segments(namespace)
            location = tier.reserve(namespace, nbytes)
            self.growth.poke()  # what it asks for begins at once: nothing else moves on its behalf
            return location
        return None

    def _clear_segments(self, namespace: str) -> None:
        """Empty the lightest segment without a block that is moving or read, of which all may be shed at once. For a
        namespace without any segment, one that nobody reads: what may not be shed begins to move down."""
        stack = self.stack
        waits = all(segment.namespace != namespace for segment in stack.arena.segments())
        residency = stack.residency
        for segment in sorted(stack.arena.segments(), key=lambda s: (s.live, s.id))[:SEGMENTS_TRIED]:
            found = [(row, level) for level in (stack.HOT, stack.HOST) for row in residency.rows.at(level, segment.id)]
            if not found or any(residency.pinned(row) for row, _ in found):
                continue
            if not waits and not all(self._sheds(row, level) for row, level in found):
                continue  # what may be shed of it would be lost in vain
            free = [(row, level) for row, level in found if residency.staying(row, level)]
            if all(self._clear(row, level, waits) for row, level in free):
                return

    def _sheds(self, row: int, level: int) -> bool:
        """What `shed` would say. Pure."""
        residency = self.stack.residency
        if not residency.staying(row, level):
            return False
        return residency.elsewhere(row, level) or self.outlets.evicts(level)

    def _clear(self, row: int, level: int, waits: bool) -> bool:
        """Whether a copy is gone, or on its way down."""
        if not self.stack.residency.present(row, level) or self.shed(row, level):
            return True
        return waits and self._move_on(row, level)

    async def come(self, level: int, nbytes: int) -> None:
        """`make`, waiting as long as any move is on its way; the caller bounds that. TierFull where none is."""
        while not self.make(level, nbytes):
            self._press(level, nbytes)
            if self.make(level, nbytes):
                return
            if not self._anything_moves():
                raise TierFull("all blocks there are held by readers, or can't be moved on")
            await self.progress()

    def _asked(self, level: int, namespace: str, nbytes: int) -> int:
        """What the others must give way to: nothing, where it is the namespace that is over its quota. Pure."""
        return 0 if self.stack.quota.over(namespace, level, 1) > 0 else nbytes

    def at_once(self, level: int, namespace: str, nbytes: int) -> Location | None:
        """`reserve`, unless others wait for room already. Mutates."""
        fits = nbytes <= self.stack.tiers[level].capacity
        return self.reserve(level, namespace, nbytes) if fits and not self._lines[level] else None

    def at_once_all(self, level: int, namespace: str, nbytes: int, count: int) -> list[Location]:
        """`at_once` of so many alike, until one finds no room. Mutates."""
        tier, found = self.stack.arena_tier(level), list[Location]()
        assert tier is not None, f"level {level} does not lie in the arena"
        if not self._lines[level] and self.stack.quota.over(namespace, level, count * tier.footprint(nbytes)) <= 0:
            found = tier.reserve_all(namespace, nbytes, count)
            self.growth.poke()
        while len(found) < count and (place := self.at_once(level, namespace, nbytes)) is not None:
            found.append(place)
        return found

    async def wait(self, level: int, namespace: str, nbytes: int, wait_s: float) -> Location | None:
        """`reserve`, and if need be wait for room: for moves at most `wait_s`, for new segments GROWTH_WAIT_S besides.

        Within `spill_queue_bytes` of waiting blocks, where namespaces take turns by bytes; where the line is full, the
        last one of whoever has most in it gives way.
        """
        line, location = self._lines[level], self.at_once(level, namespace, nbytes)
        if location is not None or nbytes > self.stack.tiers[level].capacity:
            return location
        gone = line.give_way(namespace, nbytes, self.stack.config.spill_queue_bytes)
        if gone is None:
            return None
        for other in gone:
            other.over = True
        if gone:
            self.progressed()
        waiter = Waiter()
        line.push(namespace, waiter, nbytes)
        try:
            return await self._wait(level, namespace, waiter, wait_s)
        except TimeoutError:
            return waiter.place
        except BaseException:
            if waiter.place is not None:
                self._give_back(level, waiter.place)
            raise
        finally:
            line.remove(namespace, waiter)

    async def _wait(self, level: int, namespace: str, waiter: Waiter, wait_s: float) -> Location | None:
        time = asyncio.get_running_loop().time
        until, grown_s, first = time() + wait_s, 0.0, True  # what a new segment takes does not count
        while waiter.place is None and not waiter.over:
            if first or self._served[level] is not self._progress:  # once for all who wait, at each progress
                self._press(level, self._asked(level, namespace, self._lines[level].nbytes))
                self._serve(level)  # pressing may have made room at once; what it can't serve moves and asks for more
                self._moving[level] = self._anything_moves() or self._filling(level)
                self._served[level], first = self._progress, False
            if waiter.place is not None or not self._moving[level]:
                break
            growing, before = self.stack.arena.asked > 0, time()
            async with asyncio.timeout_at(until + (GROWTH_WAIT_S if growing else grown_s)):
                await self.progress()
            if growing:
                grown_s = min(GROWTH_WAIT_S, grown_s + time() - before)
        return waiter.place

    def _filling(self, level: int) -> bool:
        """Whether space is given to blocks that are not complete: they may be moved on when they are. Pure."""
        stack = self.stack
        levels = [level] if stack.arena_tier(level) is None else [stack.HOT, stack.HOST]
        return any(stack.tiers[level].used > stack.residency.used[level] for level in levels)

    def _serve(self, level: int) -> None:
        """Give room to those in line, in turn; who can't have any (its quota, its segments) holds up nobody else."""
        served: list[Waiter] = []

        def give(namespace: str, waiter: Waiter, nbytes: int) -> bool:
            waiter.place = self.reserve(level, namespace, nbytes)
            if waiter.place is not None:
                served.append(waiter)
            return waiter.place is not None

        self._lines[level].serve(give, skip=True)
        if served:
            self.progressed()

    def _give_back(self, level: int, place: Location) -> None:
        tier = self.stack.arena_tier(level)
        assert tier is not None
        tier.give_back(place)
        self.progressed()
