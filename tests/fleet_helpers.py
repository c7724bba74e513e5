"""Running the command line as a person does: a process, its output, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
POLL_S = 0.05


def environment(folder: Path) -> dict[str, str]:
    """This process's, without our settings, its state in `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}
    return kept | {"XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "160"}


def kvstore(folder: Path, *arguments: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """One command, run to its end."""
    argv = [sys.executable, "-W", "error", "-m", "kvstore.cli.main", *arguments]
    return subprocess.run(
        argv, env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False
    )


class Running:
    """A command in the foreground that says one JSON line when it is ready. Ends with the `with` block."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        argv = [sys.executable, "-m", "kvstore.cli.main", *arguments, "--json"]
        self.process = subprocess.Popen(
            argv, env=environment(folder), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Running:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.ready = json.loads(line)
        return self

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; its exit status and what it said on stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


def one_line(text: str) -> str:
    """The only line of `text`."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait for a condition, bounded."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        signal.sigtimedwait([], POLL_S)


def json_of(done: subprocess.CompletedProcess[str]) -> Any:
    """The one object a command printed."""
    return json.loads(one_line(done.stdout))


def check_names(report: dict[str, Any], *, ok: bool) -> Sequence[str]:
    """Names of the doctor's checks with that outcome."""
    return [check["name"] for check in report["checks"] if check["ok"] is ok]
