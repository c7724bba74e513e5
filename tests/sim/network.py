"""The simulated network: which processes there are, what their links do to messages, who listens where.

One random source decides every delay and fault, so that a seed is a history. `tests/sim/transport.py` puts the
`Transport` port on top; nothing there draws a random number of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from tests.sim.loop import SimProcess

if TYPE_CHECKING:
    from tests.sim.transport import MemoryServer, MemoryTransport

TRACE_MAX = 200_000
LATE_MAX_S = 1.0  # by which the last words of a machine without power may be late


@dataclass(slots=True)
class Faults:
    """What links do. Probabilities are per message; a scenario may change them at any time."""

    delay_min_s: float = 0.0002
    delay_max_s: float = 0.003
    slow: float = 0.0  # a message takes `slow_s`
    slow_s: float = 0.5
    drop: float = 0.0  # a request or its reply is lost; a stream breaks
    duplicate: float = 0.0  # a unary request is delivered twice
    unruly: float = 0.0  # a message of an Announce stream is lost, doubled or overtaken, and nobody is told
    damage: float = 0.0  # a frame of a Get stream arrives with a bit flipped, or its parts under each other's names
    keepalive_s: float = 5.0  # after which a stream over a cut link breaks


class MemoryNetwork:
    """Processes and the links between them. `seed`: of every delay and fault."""

    def __init__(self, seed: int | str, faults: Faults | None = None) -> None:
        self.rng = Random(f"network/{seed}")
        self.faults = faults or Faults()
        self.processes: list[SimProcess] = []
        self.listeners: dict[str, MemoryServer] = {}  # gRPC address -> server
        self.sockets: dict[tuple[str, str], MemoryServer] = {}  # (host, path) -> server
        self.trace: list[str] = []
        self._cuts: dict[tuple[str, str], None] = {}  # pairs of node names, in order
        self._streams: dict[Callable[[], None], tuple[SimProcess, SimProcess]] = {}  # breaker -> its ends
        self._postpone: dict[Callable[[], None], Callable[[float], None]] = {}  # breaker -> delays what is on its way
        self._ports = 7_000

    # processes

    def boot(self, name: str, host: str = "", *, drift: float = 0.0) -> SimProcess:
        """A new incarnation of `name`; the one before must have crashed or been left. `host` empty: its own machine.

        Its clock runs faster or slower by at most a share `drift`.
        """
        offset_s, rate = self.rng.uniform(0.0, 1e6), 1.0 + self.rng.uniform(-drift, drift)
        process = SimProcess(name, host or name, clock_offset_s=offset_s, clock_rate=rate)
        self.processes.append(process)
        return process

    def transport(self, process: SimProcess) -> MemoryTransport:
        """The `Transport` of one process."""
        from tests.sim.transport import MemoryTransport

        return MemoryTransport(self, process)

    def crash(self, process: SimProcess, *, silent: bool = False) -> None:
        """SIGKILL: it never runs again, its peers see their connections end, its ports and sockets are free.

        `silent`: its machine lost power, and nobody tells its peers; what it sent before still arrives.
        """
        self.note("crash", process.name, "silent" if silent else "")
        process.crash()
        for address in [a for a, s in self.listeners.items() if s.process is process]:
            del self.listeners[address]
        for place in [p for p, s in self.sockets.items() if s.process is process]:
            del self.sockets[place]
        for breaker, ends in list(self._streams.items()):
            if process in ends:
                self.later(self.keepalive() if silent else self.delay(), breaker)
                if silent and process is ends[0] and breaker in self._postpone:
                    self._postpone[breaker](self.rng.uniform(0.0, LATE_MAX_S))

    def hang_up(self, process: SimProcess) -> None:
        """Whoever serves `process` on its own host ends the connections."""
        self.note("hang up", process.name)
        for breaker, ends in list(self._streams.items()):
            if ends[0] is process and breaker not in self._postpone:
                breaker()

    # links

    def cut(self, a: str, b: str) -> None:
        """No message passes between nodes `a` and `b`; what is on the way is lost or waits."""
        self.note("cut", a, b)
        self._cuts[_pair(a, b)] = None
        for breaker, (one, two) in list(self._streams.items()):
            if _pair(one.name, two.name) == _pair(a, b):
                self.later(self.keepalive(), partial(self._break_if_cut, breaker))

    def heal(self, a: str = "", b: str = "") -> None:
        """Undo `cut`; without names, every one."""
        self.note("heal", a, b)
        if a:
            self._cuts.pop(_pair(a, b), None)
        else:
            self._cuts.clear()

    def is_cut(self, a: str, b: str) -> bool:
        """Whether messages between the nodes `a` and `b` are lost."""
        return _pair(a, b) in self._cuts

    def calm(self) -> None:
        """From now on nothing is lost, doubled or slow; cuts heal. What lives on must come to rest."""
        faults = self.faults
        faults.drop = faults.duplicate = faults.slow = faults.unruly = faults.damage = 0.0
        self.heal()

    # fate

    def delay(self) -> float:
        """Seconds one message takes."""
        faults = self.faults
        if faults.slow and self.rng.random() < faults.slow:
            return faults.slow_s * self.rng.random()
        return self.rng.uniform(faults.delay_min_s, faults.delay_max_s)

    def lost(self) -> bool:
        """Whether the next message is lost."""
        return bool(self.faults.drop) and self.rng.random() < self.faults.drop

    def keepalive(self) -> float:
        """Seconds until a connection over which nothing comes is given up."""
        return self.faults.keepalive_s * (0.5 + self.rng.random())

    def doubled(self) -> bool:
        """Whether the next unary request comes twice."""
        return bool(self.faults.duplicate) and self.rng.random() < self.faults.duplicate

    def later(self, delay_s: float, callback: Callable[[], Any]) -> None:
        """Run `callback` in no process, whoever asks."""
        asyncio.get_running_loop().call_later(delay_s, callback, context=Context())

    def port(self) -> int:
        """A free port number."""
        self._ports += 1
        return self._ports

    # streams and local connections register how they break

    def watch(
        self,
        breaker: Callable[[], None],
        client: SimProcess,
        server: SimProcess,
        postpone: Callable[[float], None] | None = None,
    ) -> None:
        """`breaker` is called when an end crashes, or the link stays cut. `postpone`: what the client has sent comes
        so much later."""
        self._streams[breaker] = (client, server)
        if postpone is not None:
            self._postpone[breaker] = postpone

    def unwatch(self, breaker: Callable[[], None]) -> None:
        self._streams.pop(breaker, None)
        self._postpone.pop(breaker, None)

    def _break_if_cut(self, breaker: Callable[[], None]) -> None:
        ends = self._streams.get(breaker)
        if ends is not None and self.is_cut(ends[0].name, ends[1].name):
            breaker()

    # history

    def note(self, *words: object) -> None:
        """One line of history."""
        if len(self.trace) < TRACE_MAX:
            self.trace.append(f"{asyncio.get_running_loop().time():.9f} {' '.join(map(str, words))}")

    def digest(self) -> str:
        """Of the whole history: equal seeds must give equal ones."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a <= b else (b, a)
