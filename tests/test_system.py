"""The real ports: folder disk, sealed shared memory, pool, processes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.errors import SetupError
from kvstore.machine.disk import FolderDisk
from kvstore.machine.memory import F_SEAL_FUTURE_WRITE, MemfdMemory
from kvstore.machine.system import LocalSpawner, ThreadPool, host_id, real_system

WAIT_S = 20.0


def wait_until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Poll a condition of another process, for at most a bounded time."""
    done = threading.Event()
    for _ in range(int(timeout_s / 0.01)):
        if holds():
            return
        done.wait(0.01)
    raise AssertionError("the condition did not come true in time")


# Disk


def test_files_keep_what_is_written(tmp_path: Path) -> None:
    disk = FolderDisk(str(tmp_path / "d"))
    file = disk.open("a", create=True)
    assert file.pwritev(3, [b"abc", b"", bytearray(b"def")]) == 6
    file.sync()
    assert file.size() == 9
    first, second = bytearray(4), bytearray(4)
    assert file.preadv_into(3, [memoryview(first), memoryview(second)]) == 6
    assert bytes(first + second) == b"abcdef\0\0"
    file.truncate(4)
    assert file.pread_into(0, memoryview(bytearray(9))) == 4
    file.close()
    file.close()
    with pytest.raises(OSError) as caught:
        file.size()
    assert caught.value.errno == errno.EBADF
    assert disk.names() == ["a"]
    disk.remove("a")
    with pytest.raises(FileNotFoundError):
        disk.open("a")


def test_many_parts_are_a_short_write(tmp_path: Path) -> None:
    file = FolderDisk(str(tmp_path)).open("a", create=True)
    assert file.pwritev(0, [b"x"] * 3000) == 1024
    file.close()


def test_replace_is_all_or_nothing(tmp_path: Path) -> None:
    disk = FolderDisk(str(tmp_path))
    assert disk.read("small") is None
    disk.replace("small", b"one")
    disk.replace("small", b"two")
    assert disk.read("small") == b"two"
    assert disk.names() == ["small"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b"])
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        FolderDisk(str(tmp_path)).open(name, create=True)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    disk = FolderDisk(str(tmp_path))
    with pytest.raises(OSError) as caught:
        disk.open("link")
    assert caught.value.errno == errno.ELOOP
    assert disk.names() == ["target"]


def test_unusable_folders_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder, why in (("file", "not a folder"), ("none/deeper", "parent")):
        with pytest.raises(SetupError, match=why) as caught:
            FolderDisk(str(tmp_path / folder))
        assert "\n" not in str(caught.value)


def test_an_unwritable_folder_is_one_line() -> None:
    with pytest.raises(SetupError, match=r"not writable|cannot be made"):
        FolderDisk("/proc/self" if os.geteuid() == 0 else "/")


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    first, second = FolderDisk(str(tmp_path)), FolderDisk(str(tmp_path))
    unlock = first.lock("l")
    assert unlock is not None
    assert first.lock("l") is None and second.lock("l") is None
    unlock()
    unlock()
    again = second.lock("l")
    assert again is not None
    again()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys; from kvstore.machine.disk import FolderDisk; FolderDisk(sys.argv[1]).lock('l');"
        "FolderDisk(sys.argv[1]).replace('ready', b''); sys.stdin.read() or __import__('signal').pause()"
    )
    child = LocalSpawner().spawn([sys.executable, "-c", code, str(tmp_path)], log=str(tmp_path / "log"))
    try:
        wait_until(lambda: (tmp_path / "ready").exists())
        assert FolderDisk(str(tmp_path)).lock("l") is None
    finally:
        child.kill()
    unlock = FolderDisk(str(tmp_path)).lock("l")
    assert unlock is not None
    unlock()


def test_free_bytes(tmp_path: Path) -> None:
    assert FolderDisk(str(tmp_path)).free_bytes() > 0


# Memory


@pytest.mark.parametrize("sealed_writes", [False, True])
def test_segments_are_sealed_before_they_can_be_passed(sealed_writes: bool) -> None:
    segment = MemfdMemory().segment("test", 100_000, sealed_writes=sealed_writes)
    assert segment.fd is not None and len(segment.view) == segment.nbytes == 100_000
    segment.view[99_999] = 7
    seals = fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS)
    for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL):
        assert seals & seal
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert bool(seals & F_SEAL_FUTURE_WRITE) is sealed_writes
    if sealed_writes:
        with pytest.raises(PermissionError):
            os.pwrite(segment.fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(segment.fd, 4096)
    reader = mmap.mmap(segment.fd, 100_000, prot=mmap.PROT_READ)
    assert reader[99_999] == 7
    segment.view[99_999] = 8
    assert reader[99_999] == 8
    segment.close()
    segment.close()
    assert reader[99_999] == 8, "a peer keeps its own mapping"
    reader.close()


def test_segments_are_faulted_in_and_let_go(no_leaks: None) -> None:
    segment = MemfdMemory().segment("test", 4 << 20, sealed_writes=True)
    assert segment.fd is not None
    assert os.fstat(segment.fd).st_blocks * 512 >= 4 << 20
    view = segment.view[10:20]
    segment.close()
    view[0] = 1  # still mapped for who holds a view
    view.release()


def test_too_much_memory_is_one_line() -> None:
    with pytest.raises(SetupError, match="lower host_bytes"):
        MemfdMemory().segment("test", 1 << 60, sealed_writes=False)


# Pool


async def test_the_pool_returns_and_raises() -> None:
    pool = ThreadPool(2)
    assert await pool.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 7, 0)
    assert await pool.run(threading.get_ident) != threading.get_ident()
    pool.close()


async def test_a_cancelled_caller_waits_for_its_buffers() -> None:
    """Work that runs is waited for, work that has not begun never does."""
    pool = ThreadPool(1)
    begun, go, finished = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        go.wait(WAIT_S)
        finished.append("slow")

    running = asyncio.ensure_future(pool.run(slow))
    while not begun.is_set():
        await asyncio.sleep(0)
    waiting = asyncio.ensure_future(pool.run(finished.append, "never"))
    await asyncio.sleep(0)
    for _ in range(3):
        running.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
    assert not running.done(), "the thread still has the buffers"
    go.set()
    results = await asyncio.gather(running, waiting, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    assert finished == ["slow"]
    pool.close()


# Processes


def test_a_child_ends_with_the_grace(tmp_path: Path) -> None:
    polite = LocalSpawner().spawn(["sleep", "100"])
    assert polite.alive() and polite.pid > 0
    polite.terminate(WAIT_S)
    assert not polite.alive() and polite.returncode == -signal.SIGTERM

    log = tmp_path / "log"
    stubborn = LocalSpawner().spawn(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"], log=str(log))
    wait_until(lambda: "ready" in log.read_text())
    stubborn.terminate(0.05)
    assert stubborn.returncode == -signal.SIGKILL


def test_the_environment_and_a_missing_program(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = LocalSpawner().spawn(
        ["sh", "-c", "echo $NAME"], env={"NAME": "value", "PATH": os.environ["PATH"]}, log=str(log)
    )
    assert child.wait(WAIT_S) and child.returncode == 0
    missing = LocalSpawner().spawn(["/no/such/program"], log=str(log))
    assert missing.wait(WAIT_S) and missing.returncode == 1
    lines = log.read_text().splitlines()
    assert lines == ["value", "/no/such/program: No such file or directory"]


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed with SIGKILL: nobody is left to clean up but the kernel."""
    code = (
        "import sys, signal; from kvstore.machine.system import LocalSpawner;"
        "from kvstore.machine.disk import FolderDisk;"
        "child = LocalSpawner().spawn(['sleep', '1000']);"
        "FolderDisk(sys.argv[1]).replace('pid', str(child.pid).encode()); signal.pause()"
    )
    parent = LocalSpawner().spawn([sys.executable, "-c", code, str(tmp_path)])
    try:
        wait_until(lambda: (tmp_path / "pid").exists())
        child = int((tmp_path / "pid").read_text())
        wait_until(lambda: "sleep" in _command(child))
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(WAIT_S)
    wait_until(lambda: "sleep" not in _command(child))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_system_is_whole(tmp_path: Path) -> None:
    system = real_system(threads=1)
    assert system.host == host_id() and system.host.count("-") >= 5
    assert len(system.token_hex(8)) == 16 and system.token_hex(8) != system.token_hex(8)
    before = system.clock.monotonic()
    assert system.clock.monotonic() >= before and system.clock.wall_ns() > 10**18
    assert system.disk(str(tmp_path / "new")).names() == []
    system.pool.close()
