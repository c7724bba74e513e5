"""The other coordinators: who they are, found out by greeting each other. Nobody is in charge. Synchronous, `now` in.

A coordinator greets those it was configured with and those it hears of, and takes in who greets it, so one that is
added to any of them is soon listed by all. One that has been silent for `SILENT_LEASES` is listed no more; it is still
greeted where it was configured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.wire import common_pb2

PEERS_MAX = 64
SILENT_LEASES = 4


@dataclass(slots=True)
class _Peer:
    info: common_pb2.CoordinatorInfo
    heard: float  # when it last showed that it lives; for a configured one at first the start
    configured: bool


class Peers:
    """All methods but the queries mutate."""

    def __init__(self, me: common_pb2.CoordinatorInfo, configured: Iterable[str], lease_s: float, now: float) -> None:
        self.me = me  # its address is set once it is known
        self._silent_s = SILENT_LEASES * lease_s
        self._peers = {
            address: _Peer(common_pb2.CoordinatorInfo(address=address), now, True)
            for address in list(dict.fromkeys(configured))[:PEERS_MAX]
        }
        self._named: dict[str, None] = {}  # addresses heard of, that nobody answered at yet

    def heard(self, info: common_pb2.CoordinatorInfo, now: float) -> None:
        """It greeted, or answered a greeting."""
        if not info.address or info.address == self.me.address:
            return
        if info.id == self.me.id:  # this coordinator by another name
            self._peers.pop(info.address, None)
            self._named.pop(info.address, None)
            return
        known = self._peers.get(info.address)
        if known is None and len(self._peers) >= PEERS_MAX:
            return
        self._named.pop(info.address, None)
        kept = common_pb2.CoordinatorInfo()
        kept.CopyFrom(info)
        self._peers[info.address] = _Peer(kept, now, known is not None and known.configured)

    def named(self, infos: Iterable[common_pb2.CoordinatorInfo]) -> None:
        """Another one lists them: to be greeted."""
        for info in infos:
            new = info.address not in self._peers and info.id != self.me.id
            if info.address and new and info.address != self.me.address and len(self._named) < PEERS_MAX:
                self._named[info.address] = None

    def silent(self, address: str) -> None:
        """A greeting was not answered."""
        self._named.pop(address, None)  # whoever lists it may say so again

    def to_greet(self, now: float) -> list[str]:
        """Addresses to greet in this round; learnt ones that are silent for too long are forgotten."""
        gone = [a for a, peer in self._peers.items() if not peer.configured and now - peer.heard > self._silent_s]
        for address in gone:
            del self._peers[address]
        return [address for address in (*self._peers, *self._named) if address != self.me.address]

    def listed(self, now: float) -> list[common_pb2.CoordinatorInfo]:
        """This one, then the others that live as far as is known. Pure."""
        if not self._peers:
            return [self.me]
        living = [peer.info for peer in self._peers.values() if now - peer.heard <= self._silent_s]
        found = {info.id or info.address: info for info in living if info.address != self.me.address}
        return [self.me, *found.values()]
