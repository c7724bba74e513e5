"""Leaving without losing what is worth keeping: other workers are asked to pull it, the most useful groups first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from kvstore.auth import node_credentials
from kvstore.directory.membership import State
from kvstore.directory.placement import rank
from kvstore.errors import KVStoreError
from kvstore.transport.base import Transport
from kvstore.transport.methods import WORKER
from kvstore.types import KEY_BYTES, pack_keys, unpack_keys
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import member_to_wire, shard_to_wire
from workers.node import Node

AT_A_TIME = 4
"""Groups on their way to other workers."""

TAKERS_MAX = 2
"""Workers that one group is offered to."""

ROWS_A_TURN = 512
"""Blocks looked at before others have their turn."""

AGAIN_S = 0.1
"""Until what stayed behind is offered once more; twice as long after each refusal in a row."""

REFUSALS_MAX = 6
"""Rounds in which all who were asked answered and left something, over a little more than the time for which a worker
does not turn to one that hung (`kvstore.client.links`): it may be only that it can't reach this one just now. Who does
not answer is asked until the time is over: a worker suspected for a moment would otherwise cost every block that only
this one has."""

BLIND_MAX = 15
"""Rounds in a row without a coordinator to say who is there: then the coordinators are leaving too."""


@dataclass(slots=True)
class _Group:
    namespace: str
    root: bytes
    shard: bytes
    id: bytes
    worth: tuple[int, int]  # lesser goes first
    keys: list[tuple[int, bytes]] = field(default_factory=list)  # (depth, key)


class Draining:
    """One per worker. `begin` once or more; `over` when the worker should stop."""

    def __init__(
        self,
        node: Node,
        transport: Transport,
        view: Callable[[], Mapping[str, common_pb2.Member]],
        told: Callable[[], None],
    ) -> None:
        """`view`: the members as coordinators see them. `told`: called when the member's state has changed."""
        self._node, self._transport, self._view, self._told = node, transport, view, told
        self._task: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()  # somebody was told that it is done
        self._silent = False  # whether in this round somebody could not be asked
        self._progress = worker_pb2.DrainReply()
        self.over = asyncio.Event()

    def begin(self, timeout_s: float) -> None:
        """Take no new blocks from here on, and move those held. Mutates; only the first call counts."""
        if self._task is None:
            self._node.draining = True
            self._told()
            self._task = asyncio.create_task(self._run(timeout_s))

    def progress(self) -> worker_pb2.DrainReply:
        """How far it is. Mutates: who has heard that it is done need not be waited for."""
        reply = worker_pb2.DrainReply()
        reply.CopyFrom(self._progress)
        if reply.done:
            self._asked.set()
        return reply

    async def finish(self, timeout_s: float) -> None:
        """`begin`, and return when it is done: for a signal, whose sender asks nothing."""
        self.begin(timeout_s)
        self._asked.set()
        await self.over.wait()

    async def stop(self) -> None:
        """Idempotent; what was not moved stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, timeout_s: float) -> None:
        progress = self._progress
        try:
            async with asyncio.timeout(timeout_s):
                groups = await self._groups()
                progress.groups = len(groups)
                progress.blocks_left = sum(len(group.keys) for group in groups)
                await self._rounds(groups)
        except TimeoutError:
            self._node.counters["drain_timed_out"] += 1
        progress.done = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._node.config.server.stop_grace_s):
                await self._asked.wait()
        self.over.set()

    async def _rounds(self, groups: list[_Group]) -> None:
        """Offer what is left until all of it is elsewhere, nobody is there to take it, or nobody wants it."""
        refusals = blind = 0
        while groups and refusals < REFUSALS_MAX and blind < BLIND_MAX and (self._others() or not self._view()):
            blind = 0 if self._view() else blind + 1
            self._silent = False
            line = iter(groups)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_A_TIME):
                    tasks.create_task(self._work(line))
            groups = [group for group in groups if group.keys]
            self._progress.groups_done = self._progress.groups - len(groups)
            if groups:
                refusals = 0 if self._silent else refusals + 1
                await asyncio.sleep(AGAIN_S * 2 ** max(0, refusals - 1))

    def _others(self) -> dict[str, common_pb2.Member]:
        """Who may take something, now or once coordinators hear of it again."""
        me = self._node.identity.worker
        return {
            id: member
            for id, member in self._view().items()
            if id != me and member.address and member.state != State.DRAINING
        }

    async def _groups(self) -> list[_Group]:
        """What is held, without copies that the fleet has elsewhere in plenty, the most useful first."""
        found: dict[tuple[str, bytes, bytes], _Group] = {}
        store = self._node.store
        for namespace in store.heads():
            for count, kept in enumerate(store.keepsakes(namespace)):
                if count % ROWS_A_TURN == ROWS_A_TURN - 1:
                    await asyncio.sleep(0)
                header = kept.header
                name = (namespace, header.shard, header.group)
                group = found.get(name)
                if group is None:
                    group = found[name] = _Group(namespace, header.root, header.shard, header.group, kept.worth)
                group.keys.append((header.depth, header.key))
                group.worth = min(group.worth, kept.worth)
        return sorted(found.values(), key=lambda group: group.worth)

    async def _work(self, line: Iterator[_Group]) -> None:
        for group in line:
            group.keys.sort()
            keys = [key for _, key in group.keys]
            step = self._node.config.worker.keys_max
            left: set[bytes] = set()
            for at in range(0, len(keys), step):
                left.update(await self._move(group, keys[at : at + step]))
            group.keys = [(depth, key) for depth, key in group.keys if key in left]

    async def _move(self, group: _Group, keys: list[bytes]) -> list[bytes]:
        """Ask the group's homes among the others, the first first, until all blocks are there; the keys left over."""
        node, progress = self._node, self._progress
        spec, shard = node.catalog.spec(group.root), node.catalog.shard(group.shard)
        if spec is None or shard is None:
            return []  # nobody could say what they are
        others = self._others()
        takers = rank(group.id, [id for id, member in others.items() if member.state == State.ALIVE])[:TAKERS_MAX]
        self._silent |= not takers
        for id in takers:
            if not keys:
                break
            request = worker_pb2.PullRequest(
                spec_json=spec.canonical_json(),
                shard=shard_to_wire(shard),
                group=group.id,
                keys=pack_keys(keys),
                source=member_to_wire(node.member()),
            )
            try:
                reply = await self._ask(others[id].address, group.namespace, request)
            except KVStoreError as error:
                node.counters[f"drain_errors_{type(error).__name__}"] += 1
                self._silent = True
                continue
            left = unpack_keys(reply.left) if len(reply.left) % KEY_BYTES == 0 else keys
            progress.blocks_moved += reply.committed
            progress.blocks_held += reply.held
            progress.blocks_left -= min(progress.blocks_left, reply.committed + reply.held)
            keys = [key for key in left if node.store.holds(group.namespace, group.shard, key)]
        return keys

    async def _ask(self, address: str, namespace: str, request: worker_pb2.PullRequest) -> worker_pb2.PullReply:
        channel = await self._transport.connect(address, node_credentials(self._node.config.server, namespace))
        try:
            timeout_s = 2 * self._node.config.worker.pull_timeout_s
            reply: worker_pb2.PullReply = await channel.unary(WORKER["Pull"], request, timeout_s=timeout_s)
            return reply
        finally:
            await channel.close()
