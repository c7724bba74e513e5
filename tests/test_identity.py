"""Worker id and epoch: kept, raised, never repeated."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.errors import SetupError
from kvstore.machine.system import real_system
from kvstore.seams import System
from kvstore.store.identity import FILE, claim
from tests.memdisk import MemoryDisk
from tests.ssd_helpers import memory_system


@pytest.fixture
def system() -> Iterator[System]:
    system = real_system(threads=1)
    yield system
    system.pool.close()


async def test_the_id_stays_and_the_epoch_grows(tmp_path: Path, system: System) -> None:
    folder = str(tmp_path / "worker")
    seen = []
    for _ in range(3):
        found = await claim(system, folder)
        seen.append((found.worker, found.epoch))
        assert found.durable
        found.release()
    assert seen == [(seen[0][0], epoch) for epoch in (1, 2, 3)]


async def test_without_a_folder_every_start_is_another_worker(system: System) -> None:
    first, second = await claim(system, ""), await claim(system, "")
    assert first.worker != second.worker
    assert (first.epoch, second.epoch, first.durable) == (1, 1, False)
    assert await first.raise_epoch(9) == 9


async def test_a_fence_raises_the_epoch_for_good(tmp_path: Path, system: System) -> None:
    folder = str(tmp_path / "worker")
    found = await claim(system, folder)
    assert await found.raise_epoch(41) == 41
    assert await found.raise_epoch(7) == 41
    found.release()
    assert (await claim(system, folder)).epoch == 42


async def test_a_folder_of_a_live_worker_is_refused(tmp_path: Path, system: System) -> None:
    folder = str(tmp_path / "worker")
    found = await claim(system, folder)
    with pytest.raises(SetupError, match="running worker"):
        await claim(system, folder)
    found.release()
    (await claim(system, folder)).release()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"worker": "", "epoch": 1}', b'{"worker": "ab", "epoch": "1"}']
)
async def test_a_damaged_file_is_a_new_worker(content: bytes) -> None:
    disk = MemoryDisk()
    disk.replace(FILE, content)
    found = await claim(memory_system(disk), "folder")
    assert (found.epoch, found.durable) == (1, True)
    assert len(found.worker) == 16


async def test_an_epoch_that_could_not_be_kept_is_not_used() -> None:
    """A disk that is full at the start: another id, epoch 1. At a fence: the epoch stays."""
    disk = MemoryDisk()
    first = await claim(memory_system(disk, seed=1), "folder")
    first.release()
    disk.failing["replace"] = errno.ENOSPC
    second = await claim(memory_system(disk, seed=2), "folder")
    assert second.worker != first.worker and (second.epoch, second.durable) == (1, False)
    second.release()
    disk.failing.clear()
    third = await claim(memory_system(disk, seed=3), "folder")
    assert (third.worker, third.epoch) == (first.worker, 2)
    disk.failing["replace"] = errno.EIO
    with pytest.raises(SetupError):
        await third.raise_epoch(10)
    assert third.epoch == 2
    assert disk.landed["replace"] == 2
