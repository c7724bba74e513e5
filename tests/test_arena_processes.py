"""The arena's memory in real processes: independent of /dev/shm, and gone with the process that made it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from kvstore.machine.memory import MemfdMemory
from kvstore.machine.system import LocalSpawner
from tests.test_ssd_crash import wait_for

SHM = Path("/dev/shm")
MIB = 1 << 20

CHILD = """
import os, threading
from kvstore.store.arena import Arena
from kvstore.machine.memory import MemfdMemory
arena = Arena(MemfdMemory(), 32 << 20, 4 << 20)
slots = [arena.allocate("n", 3 << 20) for _ in range(6)]
assert None not in slots
inodes = sorted({os.fstat(segment.segment.fd).st_ino for segment in arena.segments()})
print("made", *inodes, flush=True)
threading.Event().wait()
"""


SMALL_SHM = """
import os, subprocess, sys
from kvstore.store.arena import Arena
from kvstore.machine.memory import MemfdMemory
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", "/dev/shm"], check=True)
full = 0
with open("/dev/shm/filler", "wb", 0) as filler:
    try:
        while True:
            full += filler.write(bytes(1 << 20))
    except OSError:
        pass
assert full <= 64 << 20, full
arena = Arena(MemfdMemory(), 256 << 20, 32 << 20)
slots = []
while (slot := arena.allocate("n", 2 << 20)) is not None or arena.asked:
    if slot is None:
        arena.keep_spare(arena.make(arena.asked), arena.asked)
    else:
        arena.view(slot)[:] = len(slots).to_bytes(1, "little") * (2 << 20)
        slots.append(slot)
assert all(bytes(arena.view(slot)) == bytes([at]) * (2 << 20) for at, slot in enumerate(slots))
print("filled", full, len(slots) * (2 << 20))
"""


def test_an_arena_of_256_mib_beside_a_dev_shm_of_64_that_is_full() -> None:
    """In a mount namespace of its own where this machine lets one be made; else the same file-system identity counts
    that `test_segments_do_not_lie_in_dev_shm` looks at, and nothing less than that."""
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", SMALL_SHM]
    if shutil.which("unshare") is None or subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        test_segments_do_not_lie_in_dev_shm()
        return
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    word, shm_bytes, arena_bytes = done.stdout.split()
    assert word == "filled" and int(shm_bytes) <= 64 * MIB and int(arena_bytes) >= 0.95 * 256 * MIB


def holders(inodes: set[int]) -> set[int]:
    """Processes that map a memfd with one of these inodes."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = re.findall(r"^\S+ \S+ \S+ \S+ (\d+) +/memfd:", maps.read_text(), re.MULTILINE)
        except OSError:  # it ended, or is somebody else's
            continue
        if inodes & set(map(int, lines)):
            found.add(int(maps.parent.name))
    return found


def test_segments_do_not_lie_in_dev_shm() -> None:
    """A container's /dev/shm of 64 MB bounds what lies in that file system; memfds lie in the kernel's own."""
    before = set(os.listdir(SHM)) if SHM.exists() else set()
    segment = MemfdMemory().segment("kvstore-test", 80 * MIB, sealed_writes=False)
    try:
        assert segment.fd is not None and segment.nbytes >= 80 * MIB
        assert os.readlink(f"/proc/self/fd/{segment.fd}").startswith("/memfd:")
        assert not SHM.exists() or os.fstat(segment.fd).st_dev != os.stat(SHM).st_dev
        mine = {name for name in (set(os.listdir(SHM)) if SHM.exists() else set()) - before if "kvstore" in name}
        assert not mine
    finally:
        segment.close()


def test_segments_of_a_killed_process_leave_nothing_behind(tmp_path: Path) -> None:
    log = tmp_path / "out"
    child = LocalSpawner().spawn([sys.executable, "-c", CHILD], log=str(log))
    try:
        inodes = set(map(int, wait_for(log, "made").split("made")[1].split()))
        assert len(inodes) >= 5 and holders(inodes) == {child.pid}, log.read_text()
    finally:
        child.kill()
    assert holders(inodes) == set(), "memory outlives its process"
    assert not SHM.exists() or not [name for name in os.listdir(SHM) if "kvstore" in name]
