"""Which coordinator to ask first: one on this host, else the one that answers soonest. Synchronous, `now` passed in.

Round trips are measured with a Hello each, a few at a time and no more often than once in `every_s`, and only while
calls are made. One that failed comes last until a measurement says that it is back.
"""

from __future__ import annotations

from collections.abc import Iterable

ALPHA = 0.3
"""Weight of a new round trip in the moving average (EWMA)."""

GAIN_SHARE, GAIN_S = 0.75, 0.0002
"""Hysteresis: another one takes over with less than this share of the round trip, and at least so much less of it."""

PROBES_MAX = 4
"""Coordinators measured at a time, those longest not measured first."""


class Nearest:
    """What a client has measured. All methods but `order`, `nearer` and `due` mutate."""

    def __init__(self, host: str, every_s: float) -> None:
        """`host`: boot id of this machine."""
        self._host, self._every_s = host, every_s
        self._hosts: dict[str, str] = {}  # address -> boot id of its machine, where that is known
        self._trip_s: dict[str, float] = {}
        self._measured: dict[str, float] = {}  # address -> when it was last tried
        self._failed: dict[str, None] = {}
        self._next = float("-inf")
        self.preferred = ""

    def at(self, address: str, host: str) -> None:
        """A reply says which machine an address is on."""
        if address and host:
            self._hosts[address] = host

    def answered(self, address: str) -> None:
        """It served a call: stay with it, unless another one is nearer."""
        self._failed.pop(address, None)
        self.preferred = address

    def failed(self, address: str) -> None:
        """It did not answer, or not in time."""
        self._failed[address] = None
        if self.preferred == address:
            self.preferred = ""

    def measured(self, address: str, seconds: float) -> None:
        """It answered a Hello."""
        known = self._trip_s.get(address)
        recovers = address in self._failed
        self._failed.pop(address, None)
        self._trip_s[address] = seconds if known is None or recovers else known + ALPHA * (seconds - known)

    def forget(self, address: str) -> None:
        """It is no coordinator any more."""
        for table in (self._hosts, self._trip_s, self._measured, self._failed):
            table.pop(address, None)
        if self.preferred == address:
            self.preferred = ""

    def due(self, addresses: Iterable[str], now: float) -> list[str]:
        """Whom to measure now, at most `PROBES_MAX`: nobody before `every_s` are over, or where
        there is no choice. Pure."""
        known = list(addresses)
        if now < self._next or len(known) < 2:
            return []
        return sorted(known, key=lambda address: self._measured.get(address, float("-inf")))[:PROBES_MAX]

    def begin(self, addresses: Iterable[str], now: float) -> None:
        """These are being measured."""
        self._next = now + self._every_s
        for address in addresses:
            self._measured[address] = now

    def order(self, addresses: Iterable[str]) -> list[str]:
        """Nearest first; equally near ones stay in the order given. Pure."""
        return sorted(addresses, key=lambda address: self._rank(address, self.preferred))

    def nearer(self, than: str, addresses: Iterable[str]) -> str:
        """The nearest, where it has answered a measurement and is clearly nearer than `than`; else empty. Pure."""
        first = min(addresses, key=lambda address: self._rank(address, than), default=than)
        return first if first != than and first in self._trip_s and first not in self._failed else ""

    def _rank(self, address: str, mine: str) -> tuple[bool, bool, float, bool]:
        """Less is nearer: what failed, what is on other machines, what is slower, what is not `mine`."""
        seconds, known = self._trip_s.get(address), self._trip_s.get(mine)
        if address == mine:
            seconds = seconds or 0.0  # nothing measured yet: who answered last
        elif seconds is None:
            seconds = float("inf")
        elif known is not None and seconds <= known and (seconds >= GAIN_SHARE * known or known - seconds <= GAIN_S):
            seconds = known  # a little better is no better
        far = self._hosts.get(address) != self._host
        return address in self._failed, far, seconds, address != mine
