"""Copies from other workers: what coordinators hint at, and what a worker that drains asks for. Pulled, never pushed.

Bounded: groups that wait (`pull_queue`), groups at a time (`pulls_max`), bytes on their way (`pull_bytes_max`), bytes a
second (`pull_rate_bytes`). One flight for each group, whoever asks.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from kvstore.auth import node_credentials
from kvstore.budget import Budget
from kvstore.client.data_links import DataLinks
from kvstore.client.links import Pooled
from kvstore.client.pulling import Landing, pull_blocks
from kvstore.convert import entry_from_wire
from kvstore.errors import KVStoreError, Overloaded
from kvstore.fair import FairLine
from kvstore.layout import block_bytes
from kvstore.spec import ModelSpec, Shard
from kvstore.store.adopting import Adoption
from kvstore.transport.base import Channel, Transport
from kvstore.types import KEY_BYTES, unpack_keys
from kvstore.wire import common_pb2, coordinator_pb2
from workers.node import TOGETHER, Node

CONNECTIONS_MAX = 64
"""To other workers, per namespace."""

BATCH_BYTES = 16 << 20
"""Read at a time: their spaces are taken all the while, and nobody sees them before the last has come."""

MARKS_A_TURN = 256
"""Marks taken back before others have their turn."""


@dataclass(slots=True)
class Tally:
    """Blocks of one pull, by what became of them."""

    committed: int = 0
    held: int = 0
    dropped: int = 0
    missing: int = 0
    left: list[bytes] = field(default_factory=list)  # keys of those dropped and missing


@dataclass(frozen=True, slots=True)
class Job:
    """Blocks of one placement group, parents first, and who has them: (id, address), the best first."""

    namespace: str
    spec: ModelSpec
    shard: Shard
    group: bytes
    keys: tuple[bytes, ...]
    sources: tuple[tuple[str, str], ...]

    @property
    def name(self) -> tuple[str, bytes, bytes]:
        return self.namespace, self.shard.digest, self.group


class Puller:
    """One per worker. `start`, then `hinted` and `pull`, then `stop`."""

    def __init__(
        self,
        node: Node,
        transport: Transport,
        namespaces: Iterable[str],
        view: Callable[[], bytes],
    ) -> None:
        """`namespaces`: those that exist here. `view`: digest of the members as coordinators see them."""
        self._node, self._transport, self._view = node, transport, view
        self._namespaces = dict.fromkeys(namespaces)
        config = node.config.worker
        self._budget = Budget(config.pull_bytes_max)
        self._free_at = 0.0  # when the bytes pulled so far are paid for, at the configured rate
        self._links: dict[str, tuple[Pooled[Channel], DataLinks]] = {}
        self._waiting: dict[tuple[str, bytes, bytes], Job] = {}
        self._line: FairLine[tuple[str, bytes, bytes]] = FairLine()  # of them; namespaces take turns
        self._flights: dict[tuple[str, bytes, bytes], asyncio.Task[Tally]] = {}
        self._wake = asyncio.Event()
        self._marks: deque[coordinator_pb2.MarkHint | None] = deque()  # None: take back all marks
        self._marked_under = b""  # the view that marks were made under
        self._marking = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.counters: Counter[str] = node.counters

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._node.config.worker.pulls_max)]
        self._tasks.append(asyncio.create_task(self._mark()))

    async def stop(self) -> None:
        """Idempotent; what is on its way is given up."""
        tasks = [*self._tasks, *self._flights.values()]
        self._tasks = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        links, self._links = list(self._links.values()), {}
        for pooled, data in links:
            await data.close()
            await pooled.close()

    # ---- hints

    def hinted(self, hints: coordinator_pb2.Hints) -> None:
        """Keep what a coordinator says, if it sees the same members as this worker. Mutates. BadRequest."""
        node = self._node
        if hints.view != self._view():
            self.counters["hints_of_another_view"] += 1
            return
        if node.draining or not self._learn(hints):
            return
        self.tick()
        for mark in hints.marks:
            if self._sound(mark) and len(self._marks) < self._node.config.worker.pull_queue:
                self._marks.append(mark)
                self._marking.set()
        for pull in filter(self._sound, hints.pulls):
            spec, shard = node.catalog.spec(pull.root), node.catalog.shard(pull.shard)
            sources = members_of(hints.holders[index] for index in pull.sources if index < len(hints.holders))
            if spec is not None and shard is not None:
                self._keep(Job(pull.namespace, spec, shard, pull.group, tuple(unpack_keys(pull.keys)), sources))

    def _sound(self, hint: coordinator_pb2.PullHint | coordinator_pb2.MarkHint) -> bool:
        return hint.namespace in self._namespaces and len(hint.keys) % KEY_BYTES == 0

    def tick(self) -> None:
        """Other members, other ranks: what was marked under another view is void. Mutates."""
        view = self._view()
        if view != self._marked_under:
            self._marked_under = view
            self._marks.clear()
            self._marks.append(None)
            self._marking.set()

    async def _mark(self) -> None:
        """Marks in the order they came, a few at a time."""
        store = self._node.store
        while True:
            while not self._marks:
                self._marking.clear()
                await self._marking.wait()
            mark = self._marks.popleft()
            if mark is None:
                if store.unmark(MARKS_A_TURN) == MARKS_A_TURN:
                    self._marks.appendleft(None)
            else:
                count = store.secondary(mark.namespace, mark.shard, unpack_keys(mark.keys), mark.secondary)
                self.counters["marked_secondary" if mark.secondary else "marked_primary"] += count
            await asyncio.sleep(0)

    def _learn(self, hints: coordinator_pb2.Hints) -> bool:
        catalog = self._node.catalog
        try:
            for entry in map(entry_from_wire, hints.dictionary):
                if isinstance(entry, ModelSpec):
                    catalog.learn_spec(entry)
                else:
                    catalog.learn_shard(entry)
        except Overloaded:
            self.counters["hints_of_unknown_models"] += 1
            return False
        return True

    def _keep(self, job: Job) -> None:
        if job.name not in self._waiting and len(self._waiting) >= self._node.config.worker.pull_queue:
            self.counters["pulls_dropped"] += 1  # hinted again later
            return
        waiting = self._waiting.get(job.name)
        if waiting is None:
            self._line.push(job.namespace, job.name, len(job.keys) * block_bytes(job.spec, job.shard))
        else:  # the group has grown since, or is hinted again: all that was asked for, the newer sources
            job = replace(job, keys=tuple(dict.fromkeys((*waiting.keys, *job.keys))))
        self._waiting[job.name] = job
        self._wake.set()

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            job = self._next()
            if self._node.store.roomy(job.namespace):
                await self.pull(job)
            else:
                self.counters["pulls_vetoed"] += 1  # a second copy is not worth somebody's only one

    def _next(self) -> Job:
        """The job whose turn it is, out of the line. There is one. Mutates."""
        found: list[Job] = []

        def give(namespace: str, name: tuple[str, bytes, bytes], nbytes: int) -> bool:
            if not found:
                found.append(self._waiting.pop(name))
                return True
            return False

        self._line.serve(give, skip=False)
        return found[0]

    # ---- pulling

    async def pull(self, job: Job) -> Tally:
        """Copy what is missing here of a group; one flight for all who ask at a time. Never raises for a peer."""
        while (flight := self._flights.get(job.name)) is not None:
            await asyncio.wait([flight])  # it may have been asked for fewer blocks: look again
        flight = self._flights[job.name] = asyncio.create_task(self._pull(job))
        flight.add_done_callback(lambda done: self._flights.pop(job.name))
        return await asyncio.shield(flight)

    async def _pull(self, job: Job) -> Tally:
        tally = Tally()
        wanted = [key for key in job.keys if not self._node.store.holds(job.namespace, job.shard.digest, key)]
        tally.held = len(job.keys) - len(wanted)
        try:
            async with asyncio.timeout(self._node.config.worker.pull_timeout_s):
                for id, address in job.sources:
                    if wanted and id != self._node.identity.worker:
                        wanted = await self._from(address, job, wanted, tally)
        except TimeoutError:
            self.counters["pulls_timed_out"] += 1
        tally.left += wanted
        tally.missing = len(job.keys) - tally.held - tally.committed - tally.dropped
        self.counters["pulls"] += 1
        self.counters["pulled_blocks"] += tally.committed
        return tally

    async def _from(self, address: str, job: Job, wanted: Sequence[bytes], tally: Tally) -> list[bytes]:
        """Take what one source gives; the keys it did not give."""
        size = block_bytes(job.spec, job.shard)
        config, store = self._node.config.worker, self._node.store
        nbytes = min(config.pull_bytes_max // 2, config.get_bytes_max // 2, store.adopting.bytes_max, BATCH_BYTES)
        count = min(TOGETHER, max(1, nbytes // size))
        missing: list[bytes] = []
        waiting = list(wanted)
        while waiting:
            batch, waiting = waiting[:count], waiting[count:]
            await self._budget.take(len(batch) * size, job.namespace)
            try:
                with store.adoption(job.namespace, job.spec, job.shard) as adoption:
                    came, landing = await self._read(address, job, batch, adoption)
                    absent = _settled(adoption, batch, came, () if landing is None else landing.purges, tally)
                await self._pay(sum(came))
            finally:
                self._budget.give(len(batch) * size)
            if len(absent) == len(batch):
                return [*missing, *absent, *waiting]
            if landing is not None and landing.later:
                waiting = absent + waiting
            else:
                missing += absent
        return missing

    async def _read(
        self, address: str, job: Job, keys: Sequence[bytes], adoption: Adoption
    ) -> tuple[list[int], Landing | None]:
        """Per key the bytes that came, and the stream they came by; None where nothing came that may be kept."""
        node = self._node
        timeout_s = node.config.worker.pull_timeout_s
        try:
            channels, data = self._linked(job.namespace)
            async with channels.use(address, timeout_s=timeout_s) as channel:
                came, landing = await pull_blocks(
                    channel,
                    node.system.pool,
                    job.namespace,
                    job.spec,
                    job.shard,
                    keys,
                    adoption.make_room,
                    timeout_s=timeout_s,
                    raw=partial(data.getter, address, channel),
                )
        except KVStoreError as error:
            self.counters[f"pull_errors_{type(error).__name__}"] += 1
            return [0] * len(keys), None
        self.counters["pulled_bad"] += landing.bad
        if node.store.stack.purges.fences(job.namespace, job.spec.root, job.spec, landing.purges):
            self.counters["pulls_fenced"] += 1  # nothing of that source, as long as it has not done a purge of ours
            return [0] * len(keys), None
        return came, landing

    async def _pay(self, nbytes: int) -> None:
        """Wait until the rate allows what has come."""
        now = self._node.system.clock.monotonic()
        self._free_at = max(self._free_at, now) + nbytes / self._node.config.worker.pull_rate_bytes
        if self._free_at - now > 0.001:
            await asyncio.sleep(self._free_at - now)

    def _linked(self, namespace: str) -> tuple[Pooled[Channel], DataLinks]:
        """Connections as a node, and raw ones that it opens with tickets from there."""
        found = self._links.get(namespace)
        if found is None:
            node, credentials = self._node, node_credentials(self._node.config.server, namespace)

            async def connect(address: str) -> Channel:
                return await self._transport.connect(address, credentials)

            data = DataLinks(node.config.client, node.system, self._transport, self.counters)
            found = self._links[namespace] = Pooled(node.system, connect, CONNECTIONS_MAX), data
        return found


def _settled(
    adoption: Adoption, keys: Sequence[bytes], came: Sequence[int], purges: Sequence[bytes], tally: Tally
) -> list[bytes]:
    """Keep what came; the keys of which nothing did. Mutates the tally."""
    absent = []
    for block, (key, nbytes) in enumerate(zip(keys, came, strict=True)):
        outcome = adoption.keep(block, purges) if nbytes else adoption.outcomes.get(block)
        if outcome is None:
            absent.append(key)
        elif outcome.state == "committed":
            tally.committed += 1
        elif outcome.state == "held":
            tally.held += 1
        else:
            tally.dropped += 1
            tally.left.append(key)
    return absent


def members_of(sources: Iterable[common_pb2.Member]) -> tuple[tuple[str, str], ...]:
    """(id, address) of those that can be read."""
    return tuple((member.id, member.address) for member in sources if member.address)
