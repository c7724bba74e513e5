"""Nothing stays behind: one temporary folder for everything, and every process below this one found and ended."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from kvstore.errors import SetupError
from kvstore.machine.processes import ProcessId, descendants
from kvstore.seams import Clock

PR_SET_CHILD_SUBREAPER = 36
SOCKET_PATH_BYTES_MAX = 107
ROUNDS_MAX = 20
POLL_S = 0.05
LONGEST_BELOW = len("/r/session_2030-12-31_23-59-59_123456_1234567/sockets/plasma_store.1")
"""The longest path of a Unix socket that Ray makes below its folder."""


class Guard:
    """A folder, and the duty to leave no process behind.

    Orphans of any depth become children of this process (a subreaper), daemons too, so that walking its
    descendants finds whatever the cluster started. Variables of the environment keep children's files in the folder.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
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

        Waits up to `grace_s` for those on their way out, then kills. Idempotent.
        """
        self._wait(grace_s)
        self.ended += [_name(process) for process in descendants(os.getpid())]
        for _ in range(ROUNDS_MAX):  # one may have started another while it was looked at
            alive = descendants(os.getpid())
            if not alive:
                break
            for process in alive:
                process.signal(signal.SIGKILL)
            self._wait(1.0)
        for _ in range(ROUNDS_MAX):  # a file may appear while the folder is emptied
            if not self.folder.exists():
                break
            shutil.rmtree(self.folder, ignore_errors=True)
        os.environ.clear()
        os.environ.update(self._environment)
        tempfile.tempdir = None
        return self.ended

    def left(self) -> list[str]:
        """What is still there after `close`: processes, the folder. Empty unless something went wrong."""
        return [_name(process) for process in descendants(os.getpid())] + [str(self.folder)] * self.folder.exists()

    def _wait(self, seconds: float) -> None:
        """Until no descendant is left, at most so long."""
        end = self._clock.monotonic() + seconds
        while descendants(os.getpid()) and self._clock.monotonic() < end:
            threading.Event().wait(POLL_S)


def _short_folder() -> Path:
    """A new folder whose path leaves room for Ray's sockets below it."""
    for base in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(base) + len("/kvd-12345678") + LONGEST_BELOW <= SOCKET_PATH_BYTES_MAX and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="kvd-", dir=base))
    raise SetupError("no writable temporary folder with a short path: set TMPDIR to one of at most 20 characters")


def _name(process: ProcessId) -> str:
    """What people call it, with its number."""
    try:
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        words = []
    return f"{' '.join(words)[:80] or 'a process'} ({process.pid})"


class Stop:
    """Ctrl-C, a polite kill and a closed terminal: the first cancels what runs, the second interrupts it at once,
    none disturbs the cleaning up."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        self.asked = False
        self.closing = False
        self.cancel: Callable[[], object] | None = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.closing:
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.cancel is not None:
            self.cancel()
        self._say("stopping: ending every process and removing every file")

    def restore(self) -> None:
        """The handlers there were before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
