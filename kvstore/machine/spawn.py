"""The real `Spawner`: child processes that die with their parent."""

from __future__ import annotations

import os
import signal
import subprocess  # noqa: TID251 - the real spawner
import sys
from collections.abc import Sequence

# Runs in the child before the program: asks the kernel for a signal at the parent's death, closes the race with a
# parent that is gone already, becomes the program. A wrapper rather than preexec_fn, which runs fork handlers of
# libraries (gRPC's among them) in a process full of threads.
_LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)
if os.getppid() != int(sys.argv[2]):
    sys.exit(143)
try:
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    sys.exit(f"{sys.argv[3]}: {error.strerror}")
"""


class LocalProcess:
    """A child in a session of its own (Ctrl-C does not reach it)."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self.pid = child.pid

    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit status once it is gone, negative for a signal; None before."""
        return self._child.poll()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to the child and what it started in its session; returns when the child is gone."""
        if self._child.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            self._child.wait()

    def terminate(self, grace_s: float) -> None:
        if self._child.poll() is None:
            self._child.terminate()
            if not self.wait(grace_s):
                self.kill()


class LocalSpawner:
    """Starts programs on this machine.

    The death signal follows the *thread* that spawned: spawn from one that lives as long as the process.
    """

    def __init__(self, death_signal: int = signal.SIGTERM) -> None:
        self._death_signal = death_signal

    def spawn(self, argv: Sequence[str], *, env: dict[str, str] | None = None, log: str | None = None) -> LocalProcess:
        """Start `argv`, its stdin empty. `env` replaces the environment; output goes to the end of the file `log`.

        A program that cannot be started ends with status 1 and a line in the log.
        """
        if not argv:
            raise ValueError("nothing to start")
        head = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(int(self._death_signal)), str(os.getpid())]
        if log is None:
            return LocalProcess(self._start([*head, *argv], env, subprocess.DEVNULL))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        output = os.open(log, flags, 0o600)  # noqa: TID251 - the real spawner
        try:
            return LocalProcess(self._start([*head, *argv], env, output))
        finally:
            os.close(output)

    @staticmethod
    def _start(argv: list[str], env: dict[str, str] | None, output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )
