"""Who a worker is: an id drawn once and an epoch that grows at every start, kept in its SSD folder.

An epoch counts only once it is durable, so that no later start can repeat it. A worker without a folder, or with one
that can't be written, draws a new id at every start instead, whose first epoch is 1: no clock is trusted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from kvstore.errors import SetupError
from kvstore.seams import Disk, System

FILE = "worker.json"
LOCK = "worker.lock"
ID_BYTES = 8
EPOCH_MAX = (1 << 63) - 1


class Identity:
    """A worker's (id, epoch). Held for the life of the process; `release` lets another process have the folder."""

    def __init__(self, system: System, worker: str, epoch: int, disk: Disk | None, unlock: Callable[[], None] | None):
        self.worker = worker
        self.epoch = epoch
        self._system = system
        self._disk = disk
        self._unlock = unlock
        self._raising = asyncio.Lock()

    @property
    def durable(self) -> bool:
        """Whether the next start will be the same worker."""
        return self._disk is not None

    async def raise_epoch(self, at_least: int) -> int:
        """A coordinator knows of a higher epoch: take `at_least`, or keep a greater one. Durable when it returns.

        SetupError when it can't be kept; the epoch is then unchanged.
        """
        if at_least > EPOCH_MAX:
            raise SetupError(f"epoch {at_least} is out of range: remove {FILE} from the worker's folder")
        async with self._raising:
            if at_least > self.epoch:
                if self._disk is not None:
                    try:
                        await self._system.pool.run(_keep, self._disk, self.worker, at_least)
                    except OSError as error:
                        raise SetupError(f"the epoch can't be kept ({error.strerror}): mend the folder") from error
                self.epoch = at_least
            return self.epoch

    def release(self) -> None:
        unlock, self._unlock = self._unlock, None
        if unlock is not None:
            unlock()


async def claim(system: System, folder: str) -> Identity:
    """The identity kept in `folder`, one epoch on; a new one where there is none, or no folder ("").

    SetupError for a folder that can't be used or that a live process owns.
    """
    drawn = system.token_hex(ID_BYTES)
    if not folder:
        return Identity(system, drawn, 1, None, None)
    disk = await system.pool.run(system.disk, folder)
    try:
        unlock = await system.pool.run(disk.lock, LOCK)
    except OSError as error:
        raise SetupError(f"folder {folder} can't be locked ({error.strerror}): name another folder") from error
    if unlock is None:
        raise SetupError(f"folder {folder} belongs to a running worker: stop it or name another folder")
    try:
        worker, epoch = await system.pool.run(_next, disk, drawn)
    except OSError:  # a full or failing disk: the service goes on under a name that needs no memory
        return Identity(system, drawn, 1, None, unlock)
    return Identity(system, worker, epoch, disk, unlock)


def _next(disk: Disk, drawn: str) -> tuple[str, int]:
    """(id, epoch) of this start, kept before they are used."""
    worker, epoch = _parse(disk.read(FILE)) or (drawn, 0)
    _keep(disk, worker, epoch + 1)
    return worker, epoch + 1


def _keep(disk: Disk, worker: str, epoch: int) -> None:
    disk.replace(FILE, json.dumps({"worker": worker, "epoch": epoch}).encode() + b"\n")


def _parse(content: bytes | None) -> tuple[str, int] | None:
    """None for no file, or one that is damaged: a new id is as good."""
    try:
        kept = json.loads(content or b"")
        worker, epoch = kept["worker"], kept["epoch"]
    except (ValueError, KeyError, TypeError):
        return None
    if not (isinstance(worker, str) and worker.isascii() and worker.isalnum() and len(worker) <= 64):
        return None
    return (worker, epoch) if type(epoch) is int and 0 < epoch < EPOCH_MAX else None
