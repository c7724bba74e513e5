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
        groups: list[_Group] = []
        try:
            async with asyncio.timeout(timeout_s):
                groups = await self._groups()
                progress.groups = len(groups)
                progress.blocks_left = sum(len(group.keys) for group in groups)
                line = iter(groups)
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(AT_A_TIME):
                        tasks.create_task(self._work(line))
        except TimeoutError:
            self._node.counters["drain_timed_out"] += 1
        progress.done = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._node.config.server.stop_grace_s):
                await self._asked.wait()
        self.over.set()

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
            for at in range(0, len(keys), step):
                await self._move(group, keys[at : at + step])
            self._progress.groups_done += 1

    async def _move(self, group: _Group, keys: list[bytes]) -> None:
        """Ask the group's homes among the others, the first first, until all blocks are there."""
        node, progress = self._node, self._progress
        spec, shard = node.catalog.spec(group.root), node.catalog.shard(group.shard)
        if spec is None or shard is None:
            return
        view = self._view()
        others = [id for id, member in view.items() if id != node.identity.worker and member.state == State.ALIVE]
        for id in rank(group.id, others)[:TAKERS_MAX]:
            if not keys:
                return
            request = worker_pb2.PullRequest(
                spec_json=spec.canonical_json(),
                shard=shard_to_wire(shard),
                group=group.id,
                keys=pack_keys(keys),
                source=member_to_wire(node.member()),
            )
            try:
                reply = await self._ask(view[id].address, group.namespace, request)
            except KVStoreError as error:
                node.counters[f"drain_errors_{type(error).__name__}"] += 1
                continue
            left = unpack_keys(reply.left) if len(reply.left) % KEY_BYTES == 0 else keys
            progress.blocks_moved += reply.committed
            progress.blocks_held += reply.held
            progress.blocks_left -= min(progress.blocks_left, reply.committed + reply.held)
            keys = [key for key in left if node.store.holds(group.namespace, group.shard, key)]

    async def _ask(self, address: str, namespace: str, request: worker_pb2.PullRequest) -> worker_pb2.PullReply:
        channel = await self._transport.connect(address, node_credentials(self._node.config.server, namespace))
        try:
            timeout_s = 2 * self._node.config.worker.pull_timeout_s
            reply: worker_pb2.PullReply = await channel.unary(WORKER["Pull"], request, timeout_s=timeout_s)
            return reply
        finally:
            await channel.close()
