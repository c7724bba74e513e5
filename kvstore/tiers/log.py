"""The segment log: records appended to data files, named by index files, reclaimed a whole segment at a time.

docs/FORMAT-SSD.md says what is on disk. This runs on the event loop, blocking work goes through the pool; what the log
holds (`LogState`) changes in synchronous code only, after the bytes have moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from kvstore.catalog import Catalog
from kvstore.errors import Corrupt, TierFull
from kvstore.header import Header
from kvstore.seams import Disk, File, Pool, System
from kvstore.tiers.aligned import ALIGNMENT, Bounce, is_aligned, padded, read_record, straight, write_all, write_record
from kvstore.tiers.base import Location
from kvstore.tiers.found import Found
from kvstore.tiers.handles import Handles, finish
from kvstore.tiers.log_state import LogState, Owed
from kvstore.tiers.recovery import FoundLog, scan_log, scan_segment
from kvstore.tiers.segment import Segment, data_name, index_name, index_reserve
from kvstore.tiers.segment_index import Word, open_page, pages_of
from kvstore.tiers.verify import damaged_records
from kvstore.types import Buffer

MOVES_BEHIND_MAX = 3
"""Tries to read a record that reclaim moves away meanwhile."""


class SegmentLog:
    """One folder's log. One writer per folder: the caller holds its lock."""

    def __init__(
        self,
        system: System,
        disk: Disk,
        catalog: Catalog,
        reads: Pool,
        *,
        disk_bytes: int,
        segment_bytes: int,
        direct: bool,
    ) -> None:
        """`reads`: where records are read; all else runs in the system's pool."""
        self.system = system
        self._reads = reads
        self.disk = disk
        self.direct = direct
        self.state = LogState(catalog, disk_bytes=disk_bytes, segment_bytes=segment_bytes)
        self.counters: dict[str, int] = dict.fromkeys(
            ("syncs", "reclaimed_segments", "reclaim_copied_bytes", "written_bytes", "unindexed_records"), 0
        )
        self.dirty_since: float | None = None  # when the oldest thing happened that no commit has made durable
        self._handles = Handles(disk, system.pool)
        self._bounce = Bounce()
        self._space = asyncio.Lock()  # who holds it may begin and reclaim segments; taken before `_committing`
        self._committing = asyncio.Lock()  # who holds it may write index files and remove segments

    async def recover(self) -> FoundLog:
        """Read the indices of an earlier process and take over what they name."""
        found = await self.system.pool.run(lambda: scan_log(self.disk, clean=True))
        self.state.next_id = found.last_id + 1
        for item in found.segments:
            self.state.adopt(item.segment)
        return found

    async def damaged(self, found: FoundLog) -> list[Found]:
        """The recovered records that do not hold; reads them all. They are `found` no longer. Mutates `found`."""
        bad = await damaged_records(self.disk, self.system.pool, self._bounce, found.segments, direct=self.direct)
        for item in found.segments:
            gone = [record.offset for record in bad if record.segment == item.segment.id]
            if gone:
                item.records = item.records.only(~np.isin(item.records.entries["offset"], gone))
        return bad

    # Records

    async def append(self, namespace: str, header: Header, parts: Sequence[Buffer], nbytes: int) -> Location:
        """Write a record and make it readable. TierFull without room; OSError as the disk reports it."""
        total = padded(nbytes)
        segment, offset = await self._allocate(total)
        bounce = None
        try:
            async with self._handles.lease(data_name(segment.id), direct=self.direct) as file:
                if file.direct:
                    bounce = self._bounce.take(ALIGNMENT if straight(parts) else total)
                await self.system.pool.run(write_record, file, offset, parts, nbytes, bounce)
        except OSError:
            self.state.seal(segment)  # its end is uncertain; the hole is garbage
            raise
        finally:
            segment.writers -= 1
            if bounce is not None:
                self._bounce.give(bounce)
        self.state.add(segment, offset, namespace, header, nbytes)
        self.counters["written_bytes"] += total
        self._touch()
        return Location(segment.id, offset, nbytes)

    async def read(self, location: Location, target: memoryview) -> None:
        """Fill `target`. Corrupt when the record is gone or cut off; OSError as the disk reports it."""
        for _ in range(MOVES_BEHIND_MAX):
            place = self.state.present(location)
            try:
                if await self._read_at(*place, target):
                    return
            except FileNotFoundError:
                if self.state.present(location) != place:
                    continue  # reclaim moved it between look-up and open
            break
        raise Corrupt(f"segment {location.segment} no longer has the record at {location.offset}")

    async def _read_at(self, segment: int, offset: int, target: memoryview) -> bool:
        bounce = None
        try:
            async with self._handles.lease(data_name(segment), direct=self.direct) as file:
                if file.direct:
                    bounce = self._bounce.take(ALIGNMENT if is_aligned(target) else padded(len(target)))
                return await self._reads.run(read_record, file, offset, target, bounce)
        finally:
            if bounce is not None:
                self._bounce.give(bounce)

    def free(self, header: Header, location: Location) -> bool:
        """Forget a record; False when it is not there. Its mark in the index comes with the next commit."""
        if not self.state.free(header, location):
            return False
        self._touch()
        return True

    def _touch(self) -> None:
        if self.dirty_since is None:
            self.dirty_since = self.system.clock.monotonic()

    # Room

    async def _allocate(self, total: int) -> tuple[Segment, int]:
        """A place for `total` padded bytes, counted as being written. TierFull when reclaim can't make one."""
        async with self._space:
            while (place := await self._place(total, self.state.reserve)) is None:
                await self._reclaim()
            return place

    async def _place(self, total: int, spare: int, least: int = 0) -> tuple[Segment, int] | None:
        """A place if one can be had with `spare` bytes of the folder left over; `least` as in `LogState.may_begin`."""
        place = self.state.place(total)
        if place is None and (limit := self.state.may_begin(total, spare, least)):
            await self._begin(limit)
            place = self.state.place(total)
        return place

    async def _begin(self, limit: int) -> None:
        segment = Segment(self.state.next_id, int.from_bytes(self.system.rng.randbytes(8), "little"), limit)
        self.state.next_id += 1
        page = open_page(segment.id, segment.nonce, limit)

        def keep(files: tuple[File, File]) -> None:
            self._handles.adopt(data_name(segment.id), files[0])
            self._handles.adopt(index_name(segment.id), files[1])
            segment.index_end, segment.sequence = len(page), 1
            self.state.begin(segment)

        await finish(self.system.pool.run(_make_files, self.disk, segment.id, page, self.direct), keep)

    async def _reclaim(self) -> None:
        """Give some room back, or TierFull. Holds `_space`."""
        if await self.remove_dead():
            return
        victim = self.state.victim()
        if victim is None:
            raise TierFull("the log has no segment to reclaim: free blocks, or raise ssd_bytes")
        await self._clean(victim)

    async def _clean(self, victim: Segment) -> None:
        """Copy what lives into the open segment, make it durable, remove the victim."""
        if victim.pending or victim.words:
            await self.commit()
        for found in await self.system.pool.run(_records_of, self.disk, victim.id):
            if victim.is_live(found.offset):
                await self._move(victim, found)
        await self.commit()
        victim.stuck = victim.blocks > 0  # damage: what is left in it goes when it is freed
        self.counters["reclaimed_segments"] += await self.remove_dead()

    async def _move(self, victim: Segment, found: Found) -> None:
        total = padded(found.nbytes)
        place = await self._place(total, 0, victim.live_bytes)
        if place is None:
            raise TierFull("the log has no room to reclaim into: raise ssd_bytes")
        (segment, at), buffer = place, self._bounce.take(total)
        try:
            async with (
                self._handles.lease(data_name(victim.id), direct=self.direct) as source,
                self._handles.lease(data_name(segment.id), direct=self.direct) as target,
            ):
                whole = await self.system.pool.run(_copy, source, found.offset, target, at, memoryview(buffer)[:total])
        except OSError:
            self.state.seal(segment)
            raise
        finally:
            segment.writers -= 1
            self._bounce.give(buffer)
        if whole and self.state.move(victim, found.offset, segment, at, found.header, found.nbytes):
            self.counters["reclaim_copied_bytes"] += total
            self._touch()

    async def remove_dead(self) -> int:
        """Remove segments in which nothing lives; how many."""
        async with self._committing:
            dead = self.state.dead()
            for segment in dead:
                for name in (index_name(segment.id), data_name(segment.id)):  # without its index the data is an orphan
                    self._handles.forget(name)
                    await self.system.pool.run(_remove, self.disk, name)
                del self.state.segments[segment.id]
            return len(dead)

    async def make_room(self) -> None:
        """Ahead of need: reclaim one segment that is mostly garbage when the next one would not fit."""
        async with self._space:
            await self.remove_dead()
            victim = self.state.victim(live_share_max=1.0 if self.state.marks_wait() else 0.5)
            if victim is not None and not self.state.may_begin(0, 2 * self.state.reserve):
                await self._clean(victim)

    async def mark_all(self) -> None:
        """Commit until every mark of what was freed is in an index, or its segment is gone. OSError; TierFull."""
        await self.commit()
        async with self._space:
            while self.state.marks_wait() and (victim := self.state.victim()) is not None:
                await self._clean(victim)

    # Durability

    async def commit(self) -> None:
        """Group commit: data synced, then indexed and the index synced, then marks of what was freed.

        OSError: what could not be written stays owed, but for records whose data could not be synced.
        """
        async with self._committing:
            since, self.dirty_since = self.dirty_since, None
            owed, done = self.state.take_owed(), 0
            try:
                for item in owed:
                    await self._index(item)
                    done += 1
                for item in owed:
                    if item.freed and self.state.may_mark(item):
                        await self._append_index(item.segment, [], [], item.freed)
                        item.freed.clear()
            finally:
                for position, item in enumerate(owed):
                    self.state.give_back(item, indexed=position < done)
                if done < len(owed) and since is not None:
                    self.dirty_since = since

    async def _index(self, owed: Owed) -> None:
        segment = owed.segment
        if not owed.entries and not owed.words:
            return
        try:
            async with self._handles.lease(data_name(segment.id), direct=self.direct) as file:
                await self.system.pool.run(file.sync)
        except OSError:
            self.counters["unindexed_records"] += len(owed.entries)
            owed.entries.clear()  # after a failed sync nobody knows what reached the disk: never index it
            self.state.seal(segment)
            raise
        self.counters["syncs"] += 1
        await self._append_index(segment, owed.words, list(owed.entries.values()), [])
        if not segment.sealed and segment.index_end >= index_reserve(segment.limit):
            self.state.seal(segment)

    async def _append_index(self, segment: Segment, words: list[Word], entries: list[bytes], freed: list[int]) -> None:
        pages, following = pages_of(segment.id, segment.nonce, segment.sequence, words, entries, freed)
        async with self._handles.lease(index_name(segment.id), direct=False) as file:
            await self.system.pool.run(_write_and_sync, file, segment.index_end, pages)
        segment.index_end, segment.sequence = segment.index_end + len(pages), following

    def close(self) -> None:
        """Let go of files and buffers. Commit first."""
        self._handles.close()
        self._bounce.close()


def _make_files(disk: Disk, segment: int, page: bytes, direct: bool) -> tuple[File, File]:
    made: list[File] = []
    names = data_name(segment), index_name(segment)
    try:
        made.append(disk.open(names[0], create=True, direct=direct))
        made.append(disk.open(names[1], create=True))
        write_all(made[1], 0, [page])
    except OSError:
        for file in made:
            file.close()
        for name in names:
            with suppress(OSError):  # an orphan that is left goes at the next start
                disk.remove(name)
        raise
    return made[0], made[1]


def _records_of(disk: Disk, segment: int) -> Sequence[Found]:
    return found.records if (found := scan_segment(disk, segment, {})) is not None else []


def _copy(source: File, offset: int, target: File, at: int, buffer: memoryview) -> bool:
    """Copy a record; False when it can't be read. OSError when it can't be written."""
    with buffer:
        try:
            whole = source.pread_into(offset, buffer) == len(buffer)
        except OSError:
            return False
        if whole:
            write_all(target, at, [buffer])
        return whole


def _write_and_sync(file: File, offset: int, pages: bytes) -> None:
    write_all(file, offset, [pages])
    file.sync()


def _remove(disk: Disk, name: str) -> None:
    with suppress(FileNotFoundError):
        disk.remove(name)
