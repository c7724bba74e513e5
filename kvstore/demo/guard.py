"""Nothing stays behind: one temporary folder for everything, and every process below this one found and ended."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

from kvstore.errors import SetupError

PR_SET_CHILD_SUBREAPER = 36
SOCKET_PATH_BYTES_MAX = 107
LONGEST_BELOW = len("/r/session_2030-12-31_23-59-59_123456_1234567/sockets/plasma_store.1")
"""The longest path of a Unix socket that Ray makes below its folder."""


class Guard:
    """A folder, and the duty to leave no process behind.

    Orphans of any depth become children of this process (a subreaper), daemons too, so that walking its
    descendants finds whatever the cluster started. Variables of the environment keep children's files in the folder.
    """

    def __init__(self) -> None:
        self.folder = _short_folder()
        self.ended: list[str] = []
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._environment = dict(os.environ)
        os.environ |= {
            "TMPDIR": str(self.folder),
            "RAY_TMPDIR": str(self.folder / "r"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hf"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "XDG_STATE_HOME": str(self.folder / "state"),
        }
        tempfile.tempdir = None
        for name in ("r", "run", "state"):
            (self.folder / name).mkdir(mode=0o700)

    def close(self, grace_s: float) -> list[str]:
        """End every descendant and remove the folder. The names of processes that had not ended by themselves.

        Waits up to `grace_s` for the ones on their way out, then kills. Idempotent.
        """
        _, waiting = psutil.wait_procs(_descendants(), timeout=grace_s)
        self.ended += [_name(process) for process in waiting]
        for _ in range(20):  # a process may start another one while it is looked at
            alive = _descendants()
            if not alive:
                break
            for process in alive:
                _kill(process)
            psutil.wait_procs(alive, timeout=2.0)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(self._environment)
        tempfile.tempdir = None
        return self.ended

    def left(self) -> list[str]:
        """What is still there after `close`: processes and files by name. Empty unless something went wrong."""
        return [_name(process) for process in _descendants()] + [str(self.folder)] * self.folder.exists()


def _short_folder() -> Path:
    """A new folder whose path leaves room for Ray's sockets below it."""
    for base in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(base) + len("/kvd-12345678") + LONGEST_BELOW <= SOCKET_PATH_BYTES_MAX and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="kvd-", dir=base))
    raise SetupError("no writable temporary folder with a short path: set TMPDIR to one of at most 20 characters")


def _descendants() -> list[psutil.Process]:
    """Every living process below this one; zombies among them are reaped."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                process.wait(0)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            continue
    return found


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()} ({process.pid})"
    except psutil.NoSuchProcess:
        return f"({process.pid})"


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def on_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    """Ctrl-C, a polite kill and a closed terminal all end in `handler`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)
