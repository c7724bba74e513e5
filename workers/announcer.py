"""Tells every coordinator what one holder holds: deltas, a snapshot after a gap, heartbeats; one stream each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress

from kvstore.config import WorkerConfig
from kvstore.convert import Introduced, chunk_to_wire, delta_to_wire
from kvstore.directory.announce import SnapshotChunk, run_chunks
from kvstore.directory.placement import membership_digest
from kvstore.errors import DataError, DeadlineExceeded, KVStoreError, ServiceError
from kvstore.seams import System
from kvstore.transport.base import Credentials, Transport
from kvstore.transport.methods import CAPABILITIES, COORDINATOR, PROTOCOL_VERSION
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import member_to_wire
from workers.source import Source

__all__ = ["Announcer", "Source", "Stream"]

COORDINATORS_MAX = 64
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
BACKOFF_LEASES = 0.3
"""Of a coordinator's lease: who comes back is told of every worker within one, before it says that it is complete."""

GATHER_S = 0.005
"""Between a change that was told and the next: a message for each block of a prompt would cost more than its put."""

SILENCE_LEASES = 2.0
"""A coordinator that answers no heartbeat for so many leases is taken for dead, and connected to anew."""

Request = coordinator_pb2.AnnounceRequest


class Announcer:
    """All streams of one source. `start`, `wake` whenever something changed, `stop`."""

    def __init__(
        self,
        config: WorkerConfig,
        system: System,
        transport: Transport,
        credentials: Credentials,
        coordinators: Iterable[str],
        source: Source,
        hinted: Callable[[coordinator_pb2.Hints], None] | None = None,
    ) -> None:
        """`hinted`: is called with what a coordinator says of other copies."""
        self.hinted = hinted
        self.config, self.system, self.transport, self.credentials = config, system, transport, credentials
        self.source = source
        self.counters: Counter[str] = Counter()
        self.stopping = asyncio.Event()
        self._leaving = False
        self._digest: bytes | None = None
        self._fencing = asyncio.Lock()
        self._streams: dict[str, Stream] = {address: Stream(self, address) for address in dict.fromkeys(coordinators)}
        self._configured = dict.fromkeys(self._streams)
        self._ids: dict[str, str] = {}  # coordinator id -> the address it is known by
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._started = False

    @property
    def leaving(self) -> bool:
        return self._leaving

    def start(self) -> None:
        """Begin to announce; needs nobody to answer. Mutates."""
        self._started = True
        for stream in self._streams.values():
            self._run(stream)

    def _run(self, stream: Stream) -> None:
        task = asyncio.ensure_future(stream.run())
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def wake(self) -> None:
        """There is something to say."""
        for stream in self._streams.values():
            stream.wake.set()

    def beat(self) -> None:
        """Say at once how the holder is. Mutates."""
        for stream in self._streams.values():
            stream.beat = True
        self.wake()

    def learn(self, coordinators: Iterable[common_pb2.CoordinatorInfo]) -> None:
        """Announce to coordinators that a reply named, too. Mutates; bounded."""
        for info in coordinators:
            known = info.address in self._streams or (info.id and info.id in self._ids)
            if info.address and not known and len(self._streams) < COORDINATORS_MAX and self._started:
                stream = self._streams[info.address] = Stream(self, info.address)
                self._run(stream)

    def configure(self, coordinators: Sequence[str]) -> None:
        """These are the configured ones from now on. Mutates."""
        self._configured = dict.fromkeys(coordinators)
        self.learn(common_pb2.CoordinatorInfo(address=address) for address in coordinators)

    def dismissed(self, stream: Stream) -> bool:
        """Whether a coordinator that does not answer is none any more: those that do answer do not name it, and nobody
        configured it. Then it is forgotten. Mutates."""
        others = [other for other in self._streams.values() if other is not stream and other.named]
        if stream.address in self._configured or not others or any(stream.address in other.named for other in others):
            return False
        if self._streams.get(stream.address) is stream:
            del self._streams[stream.address]
        return True

    def view(self) -> dict[str, common_pb2.Member]:
        """Workers that homes are drawn from, by id: all that any coordinator on a standing stream names. Pure."""
        found: dict[str, common_pb2.Member] = {}
        for stream in self._streams.values():
            found.update(stream.view)
        return found

    def view_digest(self) -> bytes:
        """Of `view`. Computed when that has changed."""
        if self._digest is None:
            self._digest = membership_digest(self.view())
        return self._digest

    def viewed(self) -> None:
        """A coordinator has another view, or its stream has ended. Mutates."""
        self._digest = None

    def claim(self, coordinator: str, address: str) -> bool:
        """Whether this stream is the one to that coordinator: one known by two names is told once. Mutates."""
        return self._ids.setdefault(coordinator, address) == address

    def disclaim(self, address: str) -> None:
        """The stream has ended: another name may do. Mutates."""
        self._ids = {id: known for id, known in self._ids.items() if known != address}

    async def fenced(self, epoch: int) -> None:
        """Take a higher epoch and register everywhere again."""
        async with self._fencing:
            if self.source.member().epoch <= epoch:
                await self.source.fenced(epoch)
                self.counters["fenced"] += 1
        self.wake()

    def settled(self, seqs: dict[str, int]) -> bool:
        """Whether every coordinator has acknowledged these numbers (or later ones). Pure."""
        streams = self._streams.values()
        return all(stream.acked.get(name, 0) >= seq for stream in streams for name, seq in seqs.items())

    @property
    def connected(self) -> int:
        """Coordinators that have welcomed this holder and whose streams stand. Pure."""
        return sum(stream.standing for stream in self._streams.values())

    @property
    def lag(self) -> int:
        """Changes that the slowest connected coordinator has not acknowledged. Pure."""
        heads = {name: self.source.outbox(name).head for name in self.source.namespaces()}
        standing = [stream for stream in self._streams.values() if stream.standing]
        return max((sum(max(0, h - s.acked.get(n, 0)) for n, h in heads.items()) for s in standing), default=0)

    async def stop(self, grace_s: float, *, leaving: bool) -> None:
        """End all streams; with `leaving` say so first, so that no lease has to run out. Idempotent."""
        self._leaving = leaving
        self.stopping.set()
        self.wake()
        if self._tasks and leaving:
            await asyncio.wait(list(self._tasks), timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


class Stream:
    """The stream to one coordinator, reconnected for as long as the announcer lives."""

    def __init__(self, announcer: Announcer, address: str) -> None:
        self.address = address
        self.wake = asyncio.Event()
        self.acked: dict[str, int] = {}  # namespace -> last number the coordinator said it applied
        self._announcer = announcer
        self._snapshots = 0  # begun in the life of this process; grows, so that an older one is void
        self._twin = False
        self._lease_s = BACKOFF_MAX_S / BACKOFF_LEASES  # of the coordinator, once it has said so
        self._turn = 0
        self._up = False
        self._begin()

    def _begin(self) -> None:
        """A new connection knows nothing."""
        self.named: dict[str, None] = {}  # coordinators that this one listed last
        self._epoch = self._announcer.source.member().epoch
        self._introduced = Introduced(self._announcer.source.catalog)
        self._welcome: coordinator_pb2.Welcome | None = None
        self.view: dict[str, common_pb2.Member] = {}
        self.beat = False  # a heartbeat is due at once
        self._sent: dict[str, int] = {}  # namespace -> last number said; absent while its snapshot is on its way
        self._parts: dict[str, tuple[Iterator[SnapshotChunk], Introduced]] = {}
        self._wants: dict[str, None] = {}  # namespaces whose snapshot waits until the coordinator asks for it

    @property
    def standing(self) -> bool:
        """Whether it is welcome there, and the connection has not ended. Pure."""
        return self._welcome is not None and self._up

    async def run(self) -> None:
        announcer = self._announcer
        delay = BACKOFF_FIRST_S
        while not announcer.stopping.is_set():
            self._begin()
            self._up = True
            try:
                await self._connected()
            except (ServiceError, DataError) as error:
                announcer.counters[f"errors_{type(error).__name__}"] += 1
            except KVStoreError as error:  # refused for good, until somebody mends it; said again with each attempt
                announcer.counters[f"refused_{type(error).__name__}"] += 1
            finally:
                self._up = False
                announcer.disclaim(self.address)
                self.view = {}
                announcer.viewed()
            if self._twin or (self._welcome is None and announcer.dismissed(self)):
                return
            ceiling = min(BACKOFF_MAX_S, self._lease_s * BACKOFF_LEASES)
            delay = BACKOFF_FIRST_S if self._welcome is not None else min(2 * delay, ceiling)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay * announcer.system.rng.uniform(0.5, 1.5)):
                    await announcer.stopping.wait()

    async def _connected(self) -> None:
        announcer = self._announcer
        channel = await announcer.transport.connect(self.address, announcer.credentials)
        try:
            stream = channel.stream(COORDINATOR["Announce"], self._requests(), timeout_s=None)
            async with aclosing(stream):
                while True:
                    reply = await self._next(stream)
                    if reply is None or not await self._take(reply):
                        return
        finally:
            await channel.close()

    async def _next(self, stream: AsyncIterator[coordinator_pb2.AnnounceReply]) -> coordinator_pb2.AnnounceReply | None:
        lease_ms = self._welcome.lease_ms if self._welcome is not None else 5000
        try:
            async with asyncio.timeout(SILENCE_LEASES * lease_ms / 1000):
                return await anext(stream, None)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.address} does not answer heartbeats") from None

    async def _take(self, reply: coordinator_pb2.AnnounceReply) -> bool:
        """Whether to go on with this stream."""
        kind = reply.WhichOneof("body")
        if kind == "fenced":
            await self._announcer.fenced(reply.fenced.epoch)
            return False
        if kind == "welcome":
            if not self._announcer.claim(reply.welcome.self.id, self.address):
                self._twin = True
                return False
            self._sent = dict(reply.welcome.applied)
            self._welcome = reply.welcome
            self._lease_s = reply.welcome.lease_ms / 1000
        elif kind == "ack":
            self.acked.update(reply.ack.applied)
        elif kind == "snapshot_request":
            self._snapshot(reply.snapshot_request.namespace)
        elif kind == "view":
            self.view = {member.id: member for member in reply.view.members}
            self._announcer.viewed()
        elif kind == "hints" and self._announcer.hinted is not None:
            self._announcer.hinted(reply.hints)
        self.named = dict.fromkeys(info.address for info in reply.coordinators)
        self._announcer.learn(reply.coordinators)
        self.wake.set()
        return True

    # --- what is said ----------------------------------------------------------------------------------------------

    async def _requests(self) -> AsyncIterator[Request]:
        announcer, clock = self._announcer, self._announcer.system.clock
        yield self._register()
        while self._welcome is None:
            if announcer.stopping.is_set():
                return
            self.wake.clear()
            await self.wake.wait()
        beat_s = self._welcome.heartbeat_ms / 1000
        beat = clock.monotonic()
        while announcer.source.member().epoch == self._epoch:
            self.wake.clear()
            if announcer.stopping.is_set():
                if announcer.leaving:
                    yield Request(heartbeat=coordinator_pb2.Heartbeat(leaving=True))
                return
            if self.beat or clock.monotonic() >= beat:
                self.beat = False
                beat = clock.monotonic() + beat_s
                yield self._heartbeat()
                continue
            message = self._message()
            if message is not None:
                yield message
                if message.HasField("delta") and self._told_all():
                    await asyncio.sleep(GATHER_S)  # what changes meanwhile goes in one message
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(beat - clock.monotonic()):
                    await self.wake.wait()

    def _register(self) -> Request:
        source = self._announcer.source
        hello = common_pb2.HelloRequest(protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore")
        heads = {name: source.outbox(name).head for name in source.namespaces()}
        return Request(
            register=coordinator_pb2.Register(member=member_to_wire(source.member()), heads=heads, hello=hello)
        )

    def _heartbeat(self) -> Request:
        """Its heads are what was said on this stream, so that more than was applied means that something was lost."""
        status = self._announcer.source.status()
        return Request(heartbeat=coordinator_pb2.Heartbeat(heads=self._sent, status=status, wants=self._wants))

    def _message(self) -> Request | None:
        """The next part of what the coordinator does not know, None when it has been told everything."""
        source, batch = self._announcer.source, self._announcer.config.announce_batch
        names = source.namespaces()
        for turn in range(self._turn, self._turn + len(names)):
            name = names[turn % len(names)]
            if name in self._wants:
                continue
            if name not in self._parts:
                try:
                    delta = source.outbox(name).delta(self._sent.setdefault(name, 0), batch)
                except LookupError:
                    if self._in_turn(name):
                        continue
                    self._snapshot(name)
                else:
                    if delta is None:
                        continue
                    self._sent[name] = delta.last_seq
                    self._turn = turn + 1  # the others first, next time
                    return Request(delta=delta_to_wire(name, delta, self._introduced.entries(delta.changes)))
            parts, introduced = self._parts[name]
            part = next(parts)
            if part.last:
                del self._parts[name]
                self._sent[name] = part.resume_seq
            return Request(snapshot=chunk_to_wire(name, part, introduced.entries(part.runs)))
        return None

    def _in_turn(self, namespace: str) -> bool:
        """Whether a snapshot has to be asked for: then that is said with a heartbeat at once. Mutates."""
        if self._welcome is None or not self._welcome.snapshot_turns:
            return False
        self._wants[namespace] = None
        self.beat = True
        self.wake.set()
        return True

    def _told_all(self) -> bool:
        """Whether nothing more is to be said now. Pure."""
        heads = {name: self._announcer.source.outbox(name).head for name in self._announcer.source.namespaces()}
        return all(self._sent.get(name, -1) >= head for name, head in heads.items())

    def _snapshot(self, namespace: str) -> None:
        """Begin one, void an earlier one. Nothing for a namespace this holder does not have.

        It brings its own dictionary, and deltas begin theirs anew: what was lost on the way may have introduced words.
        """
        if namespace not in self._announcer.source.namespaces():
            return
        self._wants.pop(namespace, None)
        self._snapshots += 1
        self._announcer.counters["snapshots"] += 1
        seq, runs = self._announcer.source.snapshot(namespace)
        parts = run_chunks(self._snapshots, seq, runs, self._announcer.config.announce_batch)
        self._introduced = Introduced(self._announcer.source.catalog)
        self._parts[namespace] = parts, Introduced(self._announcer.source.catalog)
        self._sent.pop(namespace, None)
