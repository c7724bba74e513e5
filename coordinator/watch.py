"""Who watches a namespace: what is applied to its directory is told to them, each at its own pace, within bounds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvstore.config import CoordinatorConfig
from kvstore.convert import Introduced, chunk_to_wire
from kvstore.directory.announce import Receiver, SnapshotChunk
from kvstore.directory.directory import Directory
from kvstore.directory.membership import Member, State
from kvstore.directory.runs import Run, RunChange
from kvstore.errors import KVStoreError, Overloaded
from kvstore.wire import coordinator_pb2
from kvstore.wireform import member_to_wire

Reply = coordinator_pb2.WatchReply

KEYS_A_MESSAGE = 16_384


class Watcher:
    """One stream. `over` is why it must end."""

    def __init__(self, namespace: str, directory: Directory, queue_bytes: int) -> None:
        self.namespace, self.directory = namespace, directory
        self.over: KVStoreError | None = None
        self.begun: dict[tuple[str, int], None] = {}  # lives whose snapshot went into the queue
        self._introduced = Introduced(directory)
        self._queue_bytes = queue_bytes
        self._queue: deque[Reply] = deque()
        self._queued = 0
        self._snapshots = 0
        self._woken = asyncio.Event()

    def push(self, reply: Reply) -> None:
        """Mutates. One that is too slow is over."""
        self._queue.append(reply)
        self._queued += reply.ByteSize()
        if self._queued > self._queue_bytes:
            self.over = Overloaded("the watcher is too slow: watch again, or raise watch_queue_bytes")
        self._woken.set()

    def delta(self, receiver: Receiver, message: coordinator_pb2.Delta, changes: Sequence[RunChange]) -> None:
        """What follows on what this watcher was told."""
        reply = Reply(worker=receiver.holder, epoch=receiver.epoch, dictionary=self._introduced.entries(changes))
        reply.delta.CopyFrom(message)
        self.push(reply)

    def snapshot(self, receiver: Receiver) -> None:
        """All that one holder has, as of `applied`. O(its blocks)."""
        self.begun[receiver.holder, receiver.epoch] = None
        self._snapshots += 1
        parts = list(_parts(self.directory.export(receiver.holder)))
        for index, runs in enumerate(parts):
            part = SnapshotChunk(self._snapshots, index, index + 1 == len(parts), receiver.applied, tuple(runs))
            reply = Reply(worker=receiver.holder, epoch=receiver.epoch, dictionary=self._introduced.entries(runs))
            reply.snapshot.CopyFrom(chunk_to_wire(self.namespace, part))
            self.push(reply)

    def member(self, member: Member, *, gone: bool = False) -> None:
        told = coordinator_pb2.WatchMember(
            member=member_to_wire(member), hidden=member.state == State.SUSPECT, gone=gone
        )
        self.push(Reply(member=told))

    def take(self) -> list[Reply]:
        """What waits, in order. Mutates. Raises what ends the stream."""
        if self.over is not None:
            raise self.over
        taken = list(self._queue)
        self._queue.clear()
        self._queued = 0
        self._woken.clear()
        return taken

    async def woken(self, timeout_s: float) -> None:
        """Return when something waits, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return


def _parts(runs: list[Run]) -> Iterator[list[Run]]:
    """Messages of a snapshot; one, without runs, where there is nothing."""
    part: list[Run] = []
    keys = 0
    for run in runs:
        if part and keys + len(run.keys) > KEYS_A_MESSAGE:
            yield part
            part, keys = [], 0
        part.append(run)
        keys += len(run.keys)
    yield part


class Watchers:
    """All of a coordinator. Synchronous; called wherever a directory or a member changes."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._watchers: dict[str, dict[Watcher, None]] = {}
        self._count = 0

    @contextmanager
    def one(self, namespace: str, directory: Directory) -> Iterator[Watcher]:
        """Told of everything from now on, for the time of the block. Overloaded beyond `watchers_max`."""
        if self._count >= self._config.watchers_max:
            raise Overloaded(f"{self._count} watchers at a time: use Match, or raise watchers_max")
        watcher = Watcher(namespace, directory, self._config.watch_queue_bytes)
        mine = self._watchers.setdefault(namespace, {})
        mine[watcher] = None
        self._count += 1
        try:
            yield watcher
        finally:
            del mine[watcher]
            self._count -= 1

    def applied(
        self,
        namespace: str,
        receiver: Receiver,
        before: int,
        message: coordinator_pb2.Delta,
        changes: Sequence[RunChange],
    ) -> None:
        """A delta was applied; `before` is what was applied before it. More than it may have been: then a snapshot."""
        for watcher in self._watchers.get(namespace, ()):
            follows = message.first_seq <= before + 1 and receiver.applied == message.last_seq
            if follows and (receiver.holder, receiver.epoch) in watcher.begun:
                watcher.delta(receiver, message, changes)
            else:
                watcher.snapshot(receiver)

    def replaced(self, namespace: str, receiver: Receiver) -> None:
        """A snapshot took the place of what was known."""
        for watcher in self._watchers.get(namespace, ()):
            watcher.snapshot(receiver)

    def member(self, namespace: str, member: Member, *, gone: bool = False) -> None:
        for watcher in self._watchers.get(namespace, ()):
            watcher.member(member, gone=gone)
