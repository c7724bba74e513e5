"""The SSD tier: a segment log in one folder, bounded in bytes on disk, found again after a crash.

States: `ok`; `full` (the disk has no space: nothing is written, everything is read); `down` (writing fails);
`degraded` (a read failed lately). A tier that is not ok is probed, with growing pauses, and recovers by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.errors import BadRequest, Corrupt, Overloaded, SetupError, TierDown, TierFull, UnknownFormat
from kvstore.header import Header
from kvstore.header_columns import Mask, as_bytes
from kvstore.seams import Disk, System
from kvstore.tiers.aligned import padded
from kvstore.tiers.base import Location, Recovered, TierStats
from kvstore.tiers.endurance import Endurance
from kvstore.tiers.found import Found, FoundRecords, RecoveredRecords
from kvstore.tiers.log import SegmentLog
from kvstore.tiers.log_state import LogState, plan
from kvstore.tiers.recovery import FoundLog, FoundSegment
from kvstore.types import Buffer, Tier

LOCK = "log.lock"
PROBE = "log.probe"
PROBE_BYTES = 64 << 10
PROBE_PAUSE_S = 0.25
PROBE_PAUSE_MAX_S = 30.0
SLACK_BYTES = 1 << 20
"""Free space beyond what the failed write needed before a full disk is tried again."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class SsdTier:
    """`TierStore` over a folder, which one process at a time owns (a lock file says so)."""

    tier = Tier.SSD
    prefixes = True

    def __init__(self, system: System, config: StoreConfig, catalog: Catalog) -> None:
        self.system = system
        self._given_pool = self._read_pool = system.pool
        self.config = config
        self.catalog = catalog
        self.folder = config.ssd_folder
        self.capacity = plan(config.ssd_bytes, config.ssd_segment_bytes)[2]
        self._disk: Disk | None = None
        self._log: SegmentLog | None = None
        self._unlock: Callable[[], None] | None = None
        self._stats = TierStats(Tier.SSD, capacity=self.capacity)
        self._pending_bytes = 0  # padded bytes of writes in flight
        self._needed_bytes = 0  # of the write that found the disk full
        self._probe_at = 0.0
        self._probe_pause_s = PROBE_PAUSE_S
        self._recovery: dict[str, int] = {}
        self._endurance = Endurance(config.ssd_write_bytes_day, system.clock.monotonic())
        self._spent_bytes = 0  # of what the log wrote, charged already

    @property
    def direct(self) -> bool:
        """Whether the folder takes direct I/O; known once started."""
        return self.config.ssd_direct and getattr(self._disk, "direct", False)

    def _way(self) -> str:
        """What to say of a tier that is well: empty, unless its folder does not do what was asked for."""
        return "" if self.direct or not self.config.ssd_direct else f"buffered: {self.folder} takes no direct I/O"

    @property
    def used(self) -> int:
        """Bytes of records, each padded to 4096. Indices, garbage and reclaim live in the rest of `ssd_bytes`."""
        return self._pending_bytes + (self._log.state.live_bytes if self._log is not None else 0)

    def fits(self, nbytes: int) -> bool:
        return self.used + padded(nbytes) <= self.capacity

    def stats(self) -> TierStats:
        found = self._stats
        found.used = self.used
        if self._log is not None:
            found.blocks, found.raw_bytes = self._log.state.blocks, self._log.state.raw_bytes
            found.extra = {
                **self._recovery,
                **self._log.counters,
                "segments": len(self._log.state.segments),
                "disk_bytes": self._log.state.taken_bytes(),
                "undescribed_records": self._log.state.undescribed,
                "endurance_refusals": self._endurance.refused,
            }
        return found

    # Life

    async def start(self) -> Sequence[Recovered]:
        """SetupError for a folder that can't be used or that a live process owns, or a bound that holds nothing."""
        config = self.config
        if self.capacity <= 0:
            raise SetupError(f"ssd_bytes {config.ssd_bytes} is too little for a log: give at least 256 KiB")
        own_pool = self.system.own_pool
        if own_pool is not None:  # a disk that hangs holds up nobody else, and writes in a queue no load
            self.system, self._read_pool = replace(self.system, pool=own_pool(config.threads)), own_pool(config.threads)
        try:
            self._disk = await self.system.pool.run(self.system.disk, self.folder)
            self._unlock = await self.system.pool.run(self._disk.lock, LOCK)
            if self._unlock is None:
                raise SetupError(f"folder {self.folder} is in use by another worker: stop it or name another folder")
            log = SegmentLog(
                self.system,
                self._disk,
                self.catalog,
                self._read_pool,
                disk_bytes=config.ssd_bytes,
                segment_bytes=config.ssd_segment_bytes,
                direct=config.ssd_direct,
            )
            found = await log.recover()
        except (OSError, UnknownFormat) as error:
            self._release()
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise SetupError(
                f"folder {self.folder} can't be read ({reason}): mend it or name another folder"
            ) from error
        except BaseException:
            self._release()
            raise
        self._log = log
        self._stats.detail = self._way()
        self._recovery = {f"recovery_{name}": count for name, count in found.counters.items()}
        if config.ssd_verify:
            damaged = await log.damaged(found)
            self._recovery["recovery_damaged_records"] = len(damaged)
            for record in damaged:
                log.free(record.header, _location(record))
        return await self._take_over(log, found)

    async def _take_over(self, log: SegmentLog, found: FoundLog) -> RecoveredRecords:
        """What of the found records is kept: the last copy of each block, the newest blocks within the bound."""
        state, dropped = log.state, 0

        def drop(records: FoundRecords) -> None:
            nonlocal dropped
            dropped += sum(log.free(record.header, _location(record)) for record in records)

        known = []
        for item in found.segments:
            if self._learn(item):
                known.append(item.records)
            else:
                drop(item.records)
        for records, last in zip(known, _last_copies(known), strict=True):
            if not last.all():  # a crash in the middle of reclaim leaves both copies
                drop(records.only(~last))
        for item in found.segments:  # a smaller ssd_bytes than before: whole segments go, the oldest first
            if state.reclaims():
                break
            drop(item.records)
        for records in known:
            for at in range(len(records)):
                if state.live_bytes <= self.capacity:
                    break
                drop(records[at : at + 1])
        self._recovery["recovery_dropped_records"] = dropped
        if dropped:
            known = [records.only(_live(state, records)) for records in known]
        with suppress(OSError):  # a disk that fails now fails the first write too, which is where it is told
            await log.remove_dead()
        return RecoveredRecords(known)

    def _learn(self, found: FoundSegment) -> bool:
        """Whether the catalog has room for all that a segment describes."""
        try:
            for name in found.namespaces:
                self.catalog.learn_namespace(name)
            for spec in found.specs:
                self.catalog.learn_spec(spec)
            for shard in found.shards:
                self.catalog.learn_shard(shard)
        except Overloaded:
            return False
        return True

    async def close(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            try:
                await log.commit()
                await log.remove_dead()
            except OSError as error:
                self._fail(error, 0)
            finally:
                log.close()
        self._release()

    def _release(self) -> None:
        unlock, self._unlock = self._unlock, None
        if unlock is not None:
            unlock()
        if self.system.pool is not self._given_pool:
            self.system.pool.close()
            self._read_pool.close()
            self.system, self._read_pool = replace(self.system, pool=self._given_pool), self._given_pool

    # Bytes

    async def write(self, namespace: str, header: Header, parts: Sequence[Buffer]) -> Location:
        nbytes = sum(memoryview(part).nbytes for part in parts)
        if not self.fits(nbytes):
            raise TierFull(f"{nbytes} bytes do not fit: {self.used} of {self.capacity} are used")
        if nbytes != header.stored_length:
            raise BadRequest(f"a record of {nbytes} bytes under a header that says {header.stored_length}")
        log = self._running()
        if self._stats.state in ("full", "down"):
            raise TierDown(self._stats.detail)
        self._charge()
        if not self._endurance.admits(self._pending_bytes + padded(nbytes), self.system.clock.monotonic()):
            self._stats.detail = f"the endurance budget of {self._endurance.bytes_day} bytes a day is spent for now"
            raise TierDown(self._stats.detail)
        if self._stats.state == "ok":
            self._stats.detail = self._way()
        self._pending_bytes += padded(nbytes)
        try:
            location = await log.append(namespace, header, parts, nbytes)
        except OSError as error:
            self._fail(error, nbytes)
            raise TierDown(self._stats.detail) from error
        finally:
            self._pending_bytes -= padded(nbytes)
        self._stats.writes += 1
        return location

    def _charge(self) -> None:
        """Take what the log has written since, reclaim included, from the budget. Mutates."""
        assert self._log is not None
        written = self._log.counters["written_bytes"] + self._log.counters["reclaim_copied_bytes"]
        self._endurance.spend(written - self._spent_bytes)
        self._spent_bytes = written

    async def read(self, namespace: str, header: Header, location: Location, target: memoryview) -> None:
        log = self._running()
        try:
            await log.read(location, target)
        except OSError as error:
            self._stats.errors += 1
            if self._stats.state == "ok":
                self._become("degraded", f"reading fails in {self.folder}: {error.strerror}")
            raise TierDown(f"reading fails in {self.folder}: {error.strerror}") from error
        except Corrupt:
            self._stats.errors += 1
            raise
        self._stats.hits += 1

    def free(self, namespace: str, header: Header, location: Location) -> None:
        self._running().free(header, location)

    def _running(self) -> SegmentLog:
        if self._log is None:
            raise TierDown("the SSD tier is not started")
        return self._log

    # Heartbeat

    async def tick(self) -> None:
        """Group commit once the oldest uncommitted write is `ssd_sync_s` old; reclaim ahead; probe while not ok."""
        log = self._running()
        now = self.system.clock.monotonic()
        if self._stats.state != "ok" and now >= self._probe_at:
            await self._probe(now)
        try:
            await log.remove_dead()  # which also helps a disk that is full
            if self._stats.state in ("full", "down"):
                return
            if log.dirty_since is not None and now - log.dirty_since >= self.config.ssd_sync_s:
                await log.commit()
            with suppress(TierFull):  # ahead of need: the write that needs the room will say so
                await log.make_room()
        except OSError as error:
            self._fail(error, 0)

    async def flush(self) -> None:
        """Everything written so far is durable when it returns, and everything freed stays gone. TierDown."""
        log = self._running()
        try:
            await log.remove_dead()
            await log.mark_all()
        except OSError as error:
            self._fail(error, 0)
            raise TierDown(self._stats.detail) from error

    def _fail(self, error: OSError, nbytes: int) -> None:
        self._stats.errors += 1
        if error.errno in NO_SPACE:
            self._needed_bytes = max(self._needed_bytes, nbytes)
            self._become("full", f"disk full: free some space for {self.folder} or lower ssd_bytes")
        else:
            self._become("down", f"writing fails in {self.folder}: {error.strerror}")

    def _become(self, state: str, detail: str) -> None:
        self._stats.state, self._stats.detail = state, detail
        self._probe_pause_s = PROBE_PAUSE_S
        self._probe_at = self.system.clock.monotonic() + self._probe_pause_s

    async def _probe(self, now: float) -> None:
        assert self._disk is not None
        needed = self._needed_bytes + SLACK_BYTES if self._stats.state == "full" else 0
        try:
            await self.system.pool.run(_try_disk, self._disk, needed)
        except OSError:
            self._probe_pause_s = min(2 * self._probe_pause_s, PROBE_PAUSE_MAX_S)
            self._probe_at = now + self._probe_pause_s
            return
        self._stats.state, self._stats.detail = "ok", self._way()
        self._needed_bytes = 0


def _location(record: Found) -> Location:
    return Location(record.segment, record.offset, record.nbytes)


def _last_copies(found: Sequence[FoundRecords]) -> list[Mask]:
    """Of the records of several segments, in order: where each is the last one under its name."""
    headers = [records.entries["header"] for records in found]
    names = [name for some in headers for name in as_bytes(some["key"], some["shard"], some["namespace"])]
    last = np.zeros(len(names), np.bool_)
    last[list(dict(zip(names, range(len(names)), strict=True)).values())] = True
    return np.split(last, np.cumsum([len(some) for some in headers])[:-1]) if headers else []


def _live(state: LogState, records: FoundRecords) -> Mask:
    segment = state.segments[records.segment]
    return np.array([segment.is_live(offset) for offset in records.entries["offset"].tolist()], np.bool_)


def _try_disk(disk: Disk, needed: int) -> None:
    """Write, sync and read back a small file. OSError when that fails, or less than `needed` bytes are free."""
    if needed and disk.free_bytes() < needed:
        raise OSError(errno.ENOSPC, "less space than a record needs")
    content = bytes(PROBE_BYTES)
    disk.replace(PROBE, content)
    same = disk.read(PROBE) == content
    disk.remove(PROBE)
    if not same:
        raise OSError(errno.EIO, "what was written is not what is read")
