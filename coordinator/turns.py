"""Whose snapshot a coordinator takes in: a few at a time, in the order of asking. Synchronous, `now` is passed in.

After a coordinator's start, or a network's, every worker has a snapshot to send. Each that is on its way costs memory
(what is staged, what waits on its stream), so only `bound` are, and the rest wait for their turn. A turn that does not
go on for `patience_s` is taken back.
"""

from __future__ import annotations

from collections.abc import Callable

Woken = Callable[[], None]


class Turns:
    """All methods but the queries mutate. Who asks is any object; it is told of its turn by the function it gave."""

    def __init__(self, bound: int, patience_s: float) -> None:
        self._bound, self._patience_s = bound, patience_s
        self._held: dict[object, float] = {}  # who -> when it last went on
        self._waiting: dict[object, Woken] = {}  # in the order of asking

    def ask(self, who: object, woken: Woken, now: float) -> bool:
        """Whether it has a turn now. Else `woken` is called, once, when it has one. Asking again changes nothing."""
        if who in self._held:
            return True
        if not self._waiting and len(self._held) < self._bound:
            self._held[who] = now
            return True
        self._waiting.setdefault(who, woken)
        return False

    def force(self, who: object, now: float) -> None:
        """It sends a snapshot unasked, as an older version does: a turn it takes, whoever waits."""
        self._waiting.pop(who, None)
        self._held[who] = now

    def holds(self, who: object) -> bool:
        """Whether it has a turn. Pure."""
        return who in self._held

    def goes_on(self, who: object, now: float) -> None:
        """A part of its snapshot has come."""
        if who in self._held:
            self._held[who] = now

    def done(self, who: object, now: float) -> None:
        """Its snapshot is in, or it has gone. Idempotent."""
        self._waiting.pop(who, None)
        if self._held.pop(who, None) is not None:
            self._next(now)

    def tick(self, now: float) -> None:
        """Take back the turns of those that do not go on."""
        for who in [who for who, since in self._held.items() if now - since > self._patience_s]:
            del self._held[who]
        self._next(now)

    def _next(self, now: float) -> None:
        while self._waiting and len(self._held) < self._bound:
            who = next(iter(self._waiting))
            woken = self._waiting.pop(who)
            self._held[who] = now
            woken()

    @property
    def held(self) -> int:
        """Turns given out now. Pure."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """Those that wait. Pure."""
        return len(self._waiting)
