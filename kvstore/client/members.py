"""The workers a client knows: from replies of coordinators, and the sockets it was configured with."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.client.links import Coordinators
from kvstore.client.plan import is_redis
from kvstore.config import ClientConfig
from kvstore.directory.membership import Member, State
from kvstore.errors import ServiceError
from kvstore.seams import System
from kvstore.transport.methods import COORDINATOR
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import member_from_wire

MEMBERS_MAX = 4096


class Members:
    """A table of workers, as old as its last refresh. Bounded."""

    def __init__(self, config: ClientConfig, system: System, coordinators: Coordinators) -> None:
        self._config, self._system, self._coordinators = config, system, coordinators
        self._table: dict[str, Member] = {}
        self._refreshed: float | None = None

    def learn(self, members: Iterable[common_pb2.Member]) -> None:
        """Take in the holders a reply named. Mutates."""
        for message in members:
            member = member_from_wire(message)
            if not is_redis(member.id) and (member.id in self._table or len(self._table) < MEMBERS_MAX):
                self._table[member.id] = member

    async def refresh(self, *, timeout_s: float) -> None:
        """Ask a coordinator, unless that was done a short while ago. ServiceError when none answers."""
        now = self._system.clock.monotonic()
        if self._refreshed is not None and now - self._refreshed < self._config.members_refresh_s:
            return
        request = coordinator_pb2.MembersRequest()
        reply = await self._coordinators.call(COORDINATOR["Members"], request, timeout_s=timeout_s)
        self._coordinators.learn(reply.coordinators)
        self._table = {}
        self.learn(reply.members)
        # Nobody yet: they may be about to join, and a put now would find no home.
        self._refreshed = self._system.clock.monotonic() if self._table else None

    async def fresh(self, *, timeout_s: float) -> None:
        """`refresh`, where what is known already does for the while that nobody answers."""
        try:
            await self.refresh(timeout_s=timeout_s)
        except ServiceError:
            self._refreshed = self._system.clock.monotonic()  # not asked again with every call

    def forget(self) -> None:
        """The table misled: the next refresh asks at once. Mutates."""
        self._refreshed = None

    def all(self) -> list[Member]:
        """Workers, suspects too."""
        return list(self._table.values())

    def here(self, member: Member) -> bool:
        """Whether its socket can be reached."""
        return bool(member.socket) and member.host == self._system.host

    def sockets(self, *, taking: bool = False) -> list[str]:
        """Local sockets of this host: those configured, then those of members. `taking`: not of those that drain."""
        mine = [member for member in self._table.values() if self.here(member)]
        found = dict.fromkeys(self._config.workers)
        found.update(dict.fromkeys(member.socket for member in mine))
        if taking:
            for member in mine:
                if member.state == State.DRAINING:
                    found.pop(member.socket, None)
        return list(found)

    def takers(self) -> dict[str, str]:
        """Worker id -> address of those that take new blocks from another host: not of newcomers that are still empty,
        where there are others."""
        alive = [member for member in self._table.values() if member.state == State.ALIVE and member.address]
        settled = [member for member in alive if not member.slow_start]
        return {member.id: member.address for member in settled or alive}
