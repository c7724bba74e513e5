"""Loading: blocks that lie where no reader can map them come into the arena, verified, once for all who wait."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvstore.budget import Budget
from kvstore.checksum import xxh3
from kvstore.errors import Corrupt, TierDown, UnknownFormat
from kvstore.format import HEADER_BYTES, expect
from kvstore.header import Header
from kvstore.store.carrier import extent, leading, verified
from kvstore.store.movement import Movement
from kvstore.store.planes import USUAL_SHARE
from kvstore.store.shared import Finder
from kvstore.store.stack import Stack
from kvstore.tiers.base import Location, TierStore
from kvstore.types import BlockId, Fidelity, Tier


@dataclass(slots=True)
class Loaded:
    """A row, pinned once for each who waits, and the tier that served it."""

    row: int
    tier: Tier


@dataclass(slots=True)
class Load:
    """One block on its way up."""

    waiters: int = 0
    task: asyncio.Task[Loaded | None] | None = field(default=None)


Flight = tuple[BlockId, bytes, Fidelity, bool]
"""What is loaded: block, root, least fidelity, whether Redis may be asked. Only equal questions share an answer."""


def same_copy(view: memoryview, header: Header) -> None:
    """Thread: Corrupt unless raw bytes are those of the copy."""
    if xxh3(view) != header.copy_id:
        raise Corrupt("raw bytes from a device no longer have the checksum of their copy")


class Loading:
    """One per store."""

    def __init__(self, stack: Stack, movement: Movement, finder: Finder | None, budget: Budget) -> None:
        self.stack = stack
        self.movement = movement
        self.finder = finder
        self.budget = budget
        self._loads: dict[Flight, Load] = {}

    @property
    def busy(self) -> bool:
        return bool(self._loads)

    async def load(self, id: BlockId, root: bytes, least: Fidelity, *, redis: bool) -> Loaded | None:
        """The block in the arena and pinned for the caller, who unpins; None for a miss. One flight for all who ask."""
        name = (id, root, least, redis)
        flight = self._loads.get(name)
        if flight is None:
            flight = self._loads[name] = Load()
            flight.task = asyncio.get_running_loop().create_task(self._fly(name, flight))
        assert flight.task is not None
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            self._give_up(flight)
            raise

    def _give_up(self, flight: Load) -> None:
        """A waiter is gone: its pin is not taken, or taken back."""
        assert flight.task is not None
        if not flight.task.done():
            flight.waiters -= 1
        elif not flight.task.cancelled() and (found := flight.task.result()) is not None:
            self.stack.residency.unpin(found.row)

    async def _fly(self, name: Flight, flight: Load) -> Loaded | None:
        id, root, least, redis = name
        found: Loaded | None = None
        clock = self.stack.system.clock
        begin = clock.monotonic()
        try:
            found = await self._local(id, least)
            if found is None and redis and self.finder is not None:
                found = await self._shared(id, root, least)
            if found is not None:
                self.stack.loads[found.tier].add(clock.monotonic() - begin)
            return found
        finally:
            del self._loads[name]
            if found is not None:
                for _ in range(flight.waiters):
                    self.stack.residency.pin(found.row)
                self.stack.residency.unpin(found.row)  # the flight's own pin
            self.movement.nudge()

    # ---- from this worker's own tiers

    async def _local(self, id: BlockId, least: Fidelity) -> Loaded | None:
        """From the fastest level that gives it; pinned once for the flight."""
        stack, residency = self.stack, self.stack.residency
        row = residency.find(id.namespace, id.shard, id.key)
        if row is None or residency.fidelity(row) < least:
            return None
        residency.pin(row)
        found: Loaded | None = None
        try:
            for level in range(len(stack.tiers)):
                if residency.gone(row):
                    break
                at = stack.mapped(row, least)  # brought there while we looked elsewhere
                if at is not None:
                    found = Loaded(row, residency.levels[at].tier)
                elif (
                    residency.present(row, level)
                    and residency.rows.worth(row, level) >= least
                    and await self._raise(row, level, least)
                ):
                    found = Loaded(row, residency.levels[level].tier)
                if found is not None:
                    break
        finally:
            if found is None:
                residency.unpin(row)
        return found

    async def _raise(self, row: int, level: int, least: Fidelity) -> bool:
        """Copy a block, or what of its planes `least` needs, from a level into the arena; whether it is there now."""
        stack, residency = self.stack, self.stack.residency
        target = stack.HOT if residency.levels[level].raw else stack.HOST
        header, namespace = residency.header(row), residency.namespace(row)
        location, worse = residency.location(row, level), residency.present(row, target)
        residency.work(row, writing=None if worse else target)
        try:
            if target == stack.HOST and least < residency.rows.worth(row, level) and stack.nested(namespace, header):
                place = await self._fetch_planes(stack.tiers[level], namespace, header, location, int(least))
            else:
                place = await self._fetch(stack.tiers[level], target, namespace, header, location)
        except (Corrupt, UnknownFormat):
            stack.damaged(row, level)
            return False
        except TierDown:
            stack.counters["loads_down"] += 1
            return False
        finally:
            residency.done(row, writing=None if worse else target)
        if place is None:
            return False
        stored = Fidelity.EXACT if target == stack.HOT else stack.stored_at(place)
        here = not residency.gone(row) and residency.present(row, target)
        if here and residency.elsewhere(row, target) and residency.rows.worth(row, target) < stored:
            stack.drop(row, target, evicted=False, force=True)  # fewer planes of the same copy
        if residency.gone(row) or residency.present(row, target):
            stack.tiers[target].free(namespace, header, place)
            return not residency.gone(row)
        stack.add(row, target, place, stored)
        stack.counters["loads"] += 1
        return True

    async def _fetch(
        self, tier: TierStore, target: int, namespace: str, header: Header, location: Location
    ) -> Location | None:
        """A verified copy in an arena level's space, not yet anybody's; None where there is no room."""
        stack = self.stack
        await self.budget.take(location.length, namespace)
        try:
            place = await self.movement.room.wait(target, namespace, location.length, stack.config.load_wait_s)
            into = stack.arena_tier(target)
            if place is None or into is None:
                stack.counters["loads_no_room"] += 1
                return None
            try:
                view = into.view(place)
                await tier.read(namespace, header, location, view)
                check = same_copy if target == stack.HOT else verified
                await stack.system.work(len(view), check, view, header)
            except BaseException:
                into.free(namespace, header, place)
                raise
            into.filled()
            return place
        finally:
            self.budget.give(location.length)

    async def _fetch_planes(
        self, tier: TierStore, namespace: str, header: Header, location: Location, planes: int
    ) -> Location | None:
        """The same into the host tier, of a nested block with so many leading planes: no more is read, or kept."""
        stack = self.stack
        await self.budget.take(location.length)
        try:
            view = await self._read_planes(tier, namespace, header, location, planes)
            made, parts = await stack.system.pool.run(leading, view, header, planes)
            nbytes = sum(memoryview(part).nbytes for part in parts)
            place = await self.movement.room.wait(stack.HOST, namespace, nbytes, stack.config.load_wait_s)
            if place is None:
                stack.counters["loads_no_room"] += 1
                return None
            return await stack.host.fill(namespace, made, place, parts)
        finally:
            self.budget.give(location.length)

    async def _read_planes(
        self, tier: TierStore, namespace: str, header: Header, location: Location, planes: int
    ) -> memoryview:
        """The beginning of a record with so many planes: in one read where they take what they usually do."""
        wanted = max(HEADER_BYTES, int(location.length * USUAL_SHARE[planes - 1]))
        view = memoryview(b"")
        while len(view) < wanted:
            if wanted > location.length:
                raise Corrupt(f"a record of {location.length} bytes whose table speaks of {wanted}")
            view = memoryview(bytearray(wanted if tier.prefixes else location.length))
            await tier.read(namespace, header, location, view)
            wanted = await self.stack.system.pool.run(extent, view, planes)
        return view

    # ---- from Redis

    async def _shared(self, id: BlockId, root: bytes, least: Fidelity) -> Loaded | None:
        """From the holder beside the workers: what comes is this worker's block from now on. Pinned once."""
        stack, residency = self.stack, self.stack.residency
        assert self.finder is not None
        if self._fenced(id, root):
            return None
        try:
            entry = await self.finder.find(id.namespace, id.shard, id.key)
            if entry is None or entry[0].fidelity < least:
                return None
            header, location = entry
            expect(header, id, root)
            place = await self._fetch(self.finder.redis, stack.HOST, id.namespace, header, location)
        except (Corrupt, UnknownFormat):  # forged or damaged; or gone, which Redis may do at any time
            stack.counters["redis_hints_failed"] += 1
            return None
        except TierDown:
            stack.counters["loads_down"] += 1
            return None
        if place is None:
            return None
        if self._fenced(id, root):
            stack.host.free(id.namespace, header, place)
            return None
        row = residency.find(id.namespace, id.shard, id.key)
        better = row is not None and residency.fidelity(row) > header.fidelity
        if row is not None and stack.mapped(row, least) is not None and residency.fidelity(row) >= header.fidelity:
            stack.host.free(id.namespace, header, place)  # put here meanwhile
        elif row is not None and better and self._may_join(row, header):
            stack.add(row, stack.HOST, place, header.stored)
            stack.counters["loads"] += 1
        elif better:
            stack.host.free(id.namespace, header, place)  # what is here can't be read now, and is worth more
            return None
        else:
            if row is not None:  # what is here is no better, and can't be read now
                stack.counters["replaced"] += 1
                stack.remove(row)
            row = stack.admit(id.namespace, header, stack.HOST, place)
            stack.counters["loads"] += 1
        assert row is not None
        residency.pin(row)
        return Loaded(row, Tier.REDIS)

    def _fenced(self, id: BlockId, root: bytes) -> bool:
        """Whether Redis may have it from a worker that has yet to do a purge. Mutates a counter."""
        fenced = self.stack.purges.fences(id.namespace, root, self.stack.catalog.spec(root))
        self.stack.counters["redis_loads_fenced"] += fenced
        return fenced

    def _may_join(self, row: int, header: Header) -> bool:
        """Whether fewer planes of a block's very copy may lie in host beside what it has elsewhere. Pure."""
        residency, host = self.stack.residency, self.stack.HOST
        same = residency.header(row).copy_id == header.copy_id
        return same and not residency.present(row, host) and not residency.writing(row, host)

    async def close(self) -> None:
        """What is on its way is given up: who waits for it is cancelled."""
        tasks = [flight.task for flight in self._loads.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
