"""Processes of this machine as /proc shows them: who is alive, who descends from whom, who carries a mark.

A process is named by its id and start time together: ids are reused.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessId:
    """`started` in clock ticks since boot."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether exactly this process still runs. A zombie does not."""
        return process_id(self.pid) == self

    def signal(self, number: int) -> bool:
        """Whether the signal was sent; False when the process is gone."""
        if not self.alive():
            return False
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():  # the number was handed on before the handle was there
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start time; None when there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return fields[0], int(fields[1]), int(fields[19])


def process_id(pid: int) -> ProcessId | None:
    """The process with this number now, None for none or a zombie."""
    found = _stat(pid)
    return None if found is None or found[0] in "ZX" else ProcessId(pid, found[2])


def all_processes() -> list[ProcessId]:
    """Every process that runs, in the order of their numbers."""
    numbers = sorted(int(name) for name in os.listdir(PROC) if name.isdigit())
    return [found for number in numbers if (found := process_id(number)) is not None]


def descendants(pid: int) -> list[ProcessId]:
    """Children and theirs, parents before children. Those whose parent ended belong to whoever took them over."""
    children: dict[int, list[int]] = {}
    for process in all_processes():
        found = _stat(process.pid)
        if found is not None:
            children.setdefault(found[1], []).append(process.pid)
    order: list[ProcessId] = []
    queue = list(children.get(pid, ()))
    while queue:
        number = queue.pop(0)
        queue += children.get(number, ())
        process_now = process_id(number)
        if process_now is not None:
            order.append(process_now)
    return order


def carrying(variable: str, value: str) -> list[ProcessId]:
    """Processes of this user that were started with the environment variable set so."""
    mark = f"{variable}={value}".encode()
    found = []
    for process in all_processes():
        with suppress(OSError):  # gone, or another user's
            if mark in (PROC / str(process.pid) / "environ").read_bytes().split(b"\0"):
                found.append(process)
    return found
