"""Tickets: what lets a caller who was authenticated once, on gRPC, open one raw connection."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections import OrderedDict
from dataclasses import replace

from kvstore.errors import Unauthenticated
from kvstore.seams import System
from kvstore.transport.base import CallContext
from kvstore.transport.data_frames import TICKET_BYTES

TICKET_S = 10.0
"""Life of a ticket that is not used."""


class Tickets:
    """Those that were given out and not used: at most `bound`, beyond it the oldest are void. Kept as digests only."""

    def __init__(self, system: System, bound: int) -> None:
        self._system, self._bound = system, bound
        self._kept: OrderedDict[bytes, tuple[CallContext, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def give(self, context: CallContext) -> bytes:
        """One for whoever made this call. Mutates."""
        ticket = self._system.rng.randbytes(TICKET_BYTES)
        kept = replace(context, deadline=None, connection=None, attachments=[])
        self._kept[_digest(ticket)] = kept, self._system.clock.monotonic() + TICKET_S
        while len(self._kept) > self._bound:
            self._kept.popitem(last=False)
        return ticket

    def take(self, ticket: bytes, host: str) -> CallContext:
        """The call it was given out on. Unauthenticated for one that is unknown, used, too old, or was given to a
        caller of another host. Mutates: it is void now."""
        kept = self._kept.pop(_digest(ticket), None)
        if kept is None or self._system.clock.monotonic() >= kept[1]:
            raise Unauthenticated("the ticket is not known here, was used, or is too old: ask for another one")
        context = kept[0]
        theirs = host_of(context.peer)
        if theirs is not None and theirs != _plain(host):
            raise Unauthenticated("the ticket was given to another host")
        return context


def host_of(peer: str) -> str | None:
    """The address in a gRPC peer ("ipv4:10.0.0.1:5000", "ipv6:%5B::1%5D:5000"); None for any other. Pure."""
    match = re.fullmatch(r"ipv[46]:(.+):\d+", peer)
    if match is None:
        return None
    return _plain(match.group(1).replace("%5B", "").replace("%5D", "").strip("[]"))


def _plain(host: str) -> str:
    """One form for each address: an IPv4 one within IPv6 is the IPv4 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _digest(ticket: bytes) -> bytes:
    return hashlib.sha256(ticket).digest()
