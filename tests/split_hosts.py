"""Two hosts on one machine: a network namespace each, joined by a bridge in a third one, which can be cut.

What is cut is a port of the bridge: packets go nowhere, nobody is told, connections hang, as between two racks. Root
only. `ip netns exec` gives what it starts a mount namespace of its own too, so the processes of two hosts do not take
each other for neighbours.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

NETWORK = "10.213.77"
SIDES = 2


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {(done.stderr or done.stdout).strip()}")


class SplitHosts:
    """`with SplitHosts() as hosts`. OSError with what the machine does not allow."""

    def __init__(self) -> None:
        mark = f"kv{os.getpid()}"
        self.names = [f"{mark}-{side}" for side in range(SIDES)]
        self.addresses = [f"{NETWORK}.{side + 1}" for side in range(SIDES)]
        self._wire = f"{mark}-wire"
        self._made: list[str] = []

    def __enter__(self) -> SplitHosts:
        try:
            self._make()
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        for name in (*self.names, self._wire):
            _ip("netns", "add", name)
            self._made.append(name)
        _ip("-n", self._wire, "link", "add", "name", "bridge0", "type", "bridge")
        _ip("-n", self._wire, "link", "set", "bridge0", "up")
        for side, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            port = f"port{side}"
            _ip("-n", self._wire, "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._wire, "link", "set", port, "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        self.heal()

    def cut(self) -> None:
        _ip("-n", self._wire, "link", "set", "port1", "nomaster")

    def heal(self) -> None:
        for side in range(SIDES):
            _ip("-n", self._wire, "link", "set", f"port{side}", "master", "bridge0")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        made, self._made = self._made, []
        for name in made:
            _ip("netns", "delete", name)


class Side:
    """A process on one of the hosts, `python -m tests.split_side`: a JSON command a line, a JSON answer a line."""

    def __init__(self, host: str, log: Path, about: dict[str, Any]) -> None:
        self._path = log
        self._log = log.open("w")
        self._child = subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-W", "error", "-m", "tests.split_side", json.dumps(about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def tell(self, do: str, **arguments: Any) -> None:
        """Begin a command; `answer` has its end."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """AssertionError with the last lines it has said where the command failed."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, "\n".join(self._path.read_text().splitlines()[-30:])
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.tell(do, **arguments)
        return self.answer()

    def close(self) -> int:
        """The end of its commands ends it; its exit status."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            return self._child.wait(30)
        finally:
            self._child.kill()
            self._child.wait(10)
            self._child.stdout.close()
            self._log.close()
