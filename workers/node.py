"""What the services of one worker share: its store, its name, its bounds."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvstore.budget import Budget
from kvstore.catalog import Catalog
from kvstore.config import Config
from kvstore.directory.membership import Member
from kvstore.errors import BadRequest, DeadlineExceeded, Incompatible, Overloaded
from kvstore.header import Header
from kvstore.histogram import Histogram
from kvstore.layout import block_bytes
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.store.arena import PAGE_BYTES
from kvstore.store.codec_use import Use
from kvstore.store.identity import Identity
from kvstore.store.opening import Begun
from kvstore.store.putting import Offer
from kvstore.store.tiered import Hold, TieredStore
from kvstore.transport.methods import CAPABILITIES, PROTOCOL_VERSION
from kvstore.types import Fidelity
from kvstore.wanted import Wanted
from kvstore.wire import common_pb2, worker_pb2
from kvstore.wireform import (
    SHARDS_MAX,
    digest_from_wire,
    keys_from_wire,
    latency_to_wire,
    least_from_wire,
    match_to_wire,
    member_to_wire,
    shard_from_wire,
)

STATES = {
    "committed": worker_pb2.BLOCK_COMMITTED,
    "held": worker_pb2.BLOCK_HELD_ALREADY,
    "dropped": worker_pb2.BLOCK_DROPPED,
    "refused": worker_pb2.BLOCK_REFUSED,
}

_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}

OPEN_SHARE = 8
"""One call opens at most this part of the arena: what it asks beyond it comes later, when the rest is released."""

TOGETHER = 64
"""Blocks of one put that are stored side by side; byte movers take as many at a time as their own bounds say."""


class Receiving:
    """Bytes of blocks that come in by streams. Synchronous; what does not fit is refused, nobody waits. Where there are
    several namespaces, none has more than half."""

    def __init__(self, capacity: int, shared: bool) -> None:
        self.capacity, self.used = capacity, 0
        self._shared = shared
        self._used_by: Counter[str] = Counter()

    @contextmanager
    def take(self, nbytes: int, namespace: str) -> Iterator[None]:
        """For the time of the block. Overloaded when they are not free."""
        mine = self._used_by[namespace]
        crowding = self._shared and mine > 0 and mine + nbytes > self.capacity // 2
        if crowding or self.used + nbytes > self.capacity:
            raise Overloaded(
                f"{nbytes} bytes more than {mine} of this namespace, {self.used} of {self.capacity} in all: later, or "
                "raise worker.put_bytes_max"
            )
        self.used += nbytes
        self._used_by[namespace] += nbytes
        try:
            yield
        finally:
            self.used -= nbytes
            self._used_by[namespace] -= nbytes
            if not self._used_by[namespace]:
                del self._used_by[namespace]


@dataclass(frozen=True, slots=True)
class Announced:
    """How telling the coordinators goes."""

    lag: int = 0  # changes that the slowest connected one has not acknowledged
    coordinators: int = 0  # connected
    counters: Mapping[str, int] = field(default_factory=dict)


class Node:
    """One worker in one life."""

    def __init__(
        self,
        config: Config,
        system: System,
        store: TieredStore,
        catalog: Catalog,
        identity: Identity,
        digest: str,
        *,
        shared: bool = False,
    ) -> None:
        """`shared`: between several namespaces."""
        self.config, self.system, self.store, self.catalog = config, system, store, catalog
        self.identity = identity
        self.boot_id = system.token_hex(8)
        self.address = ""  # known once it is served
        self.socket = ""
        self.data_port = 0  # of raw connections; 0: none are served
        self.draining = False
        self.counters: Counter[str] = Counter()
        self.gets = Histogram()  # whole calls, to their last byte
        self.announced: Callable[[], Announced] = Announced  # how that goes
        self.sending = Budget(config.worker.get_bytes_max, config.worker.get_bytes_max)
        self.receiving = Receiving(config.worker.put_bytes_max, shared)
        self._digest = digest

    def member(self) -> Member:
        return Member(
            id=self.identity.worker,
            epoch=self.identity.epoch,
            address=self.address,
            socket=self.socket,
            host=self.system.host,
            node=self.config.server.node,
            state="draining" if self.draining else "alive",
        )

    def hello(self, request: common_pb2.HelloRequest) -> common_pb2.HelloReply:
        """Incompatible for another protocol."""
        if request.protocol != PROTOCOL_VERSION:
            raise Incompatible(f"protocol {request.protocol} is not spoken here: use a build with {PROTOCOL_VERSION}")
        return common_pb2.HelloReply(
            protocol=PROTOCOL_VERSION,
            capabilities=CAPABILITIES,
            software="kvstore",
            namespaces_digest=self._digest,
            id=self.identity.worker,
            boot_id=self.boot_id,
            host=self.system.host,
            member=member_to_wire(self.member()),
        )

    def match(self, request: common_pb2.MatchRequest, namespace: str) -> common_pb2.MatchReply:
        """What this worker alone can serve. BadRequest."""
        root = digest_from_wire("root", request.root)
        keys = keys_from_wire(request.keys, self.config.worker.keys_max)
        if not 1 <= len(request.shards) <= SHARDS_MAX:
            raise BadRequest(f"{len(request.shards)} shards: name 1 to {SHARDS_MAX}")
        shards = [shard_from_wire(shard) for shard in request.shards]
        found = self.store.match(namespace, root, keys, shards, least_from_wire(request.least))
        reply = match_to_wire(found, lambda holder: member_to_wire(self.member()))
        reply.complete = True
        reply.boot_id = self.boot_id
        return reply

    def asked_bytes(self, root: bytes, wanted: Wanted) -> int:
        """Raw bytes of the blocks of a request; 0 for a model nobody has put here. BadRequest for what no block is."""
        spec = self.catalog.spec(root)
        if spec is None:
            return 0
        total = sum(block_bytes(spec, shard) * count for shard, count in wanted.runs)
        if total > self.sending.capacity:
            raise BadRequest(f"{total} bytes of blocks in one call: at most {self.sending.capacity}, ask in several")
        return total

    def now(self, root: bytes, wanted: Wanted) -> Wanted:
        """A call's blocks, from the first on, that are opened: no caller gets more than its share of memory."""
        spec = self.catalog.spec(root)
        if spec is None:
            return wanted
        room = self.config.store.host_bytes // OPEN_SHARE
        count = 0
        for shard, many in wanted.runs:
            need = -(-block_bytes(spec, shard) // PAGE_BYTES) * PAGE_BYTES
            if need * many > room:
                return wanted.first(max(1, count + room // need))
            room -= need * many
            count += many
        return wanted

    async def open(
        self,
        namespace: str,
        root: bytes,
        wanted: Wanted,
        least: Fidelity,
        *,
        redis: bool,
        timeout_s: float | None,
    ) -> Hold:
        """Blocks held and in memory until `store.release`. DeadlineExceeded, and nothing held, when it takes longer."""
        begun = self.store.opening.begin(namespace, root, wanted, least, redis=redis)
        await self.finish(begun, timeout_s)
        self.store.opening.served(begun)
        return begun.hold

    async def finish(self, begun: Begun, timeout_s: float | None) -> None:
        """Load what is not in memory. DeadlineExceeded, and nothing held, when it takes longer."""
        if not begun.away:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self.store.opening.finish(begun)
        except TimeoutError:
            raise DeadlineExceeded(f"{len(begun.wanted)} blocks were not loaded within {timeout_s:.3f} s") from None

    def put_blocks(
        self, namespace: str, spec: ModelSpec, messages: Sequence[worker_pb2.PutBlock]
    ) -> list[tuple[Shard, Header]]:
        """What a put says of its blocks, checked against the spec. BadRequest."""
        found: list[tuple[Shard, Header]] = []
        told: common_pb2.Shard | None = None
        header: Header | None = None  # of the last one, whose shard `told` names
        for message in messages:
            named = message.shard
            if named != told:
                told, header, shard = named, None, shard_from_wire(named)
                size = self._block_bytes(spec, shard)
            if message.raw_bytes != size:
                raise BadRequest(f"a block of {message.raw_bytes} bytes was put: by its spec and shard it has {size}")
            computed_on = _FIDELITIES.get(message.computed_on)
            if computed_on is None:
                raise BadRequest(f"computed_on is {message.computed_on}: give 1 (compact), 2 (near) or 3 (exact)")
            place = (message.key, message.parent, message.group, message.depth, computed_on, message.copy_id)
            header = Header.new(namespace, spec, shard, *place) if header is None else header.beside(*place)
            found.append((shard, header))
        return found

    def _block_bytes(self, spec: ModelSpec, shard: Shard) -> int:
        """Raw bytes of a block. BadRequest where that is more than is stored."""
        size = block_bytes(spec, shard)
        if size > self.config.store.block_bytes_max:
            raise BadRequest(f"a block of {size} bytes: at most {self.config.store.block_bytes_max} are stored here")
        return size

    def left(self, deadline: float | None) -> float | None:
        """Seconds until a deadline of the monotonic clock."""
        return None if deadline is None else max(0.0, deadline - self.system.clock.monotonic())

    def _namespace(self, name: str, seq: int) -> common_pb2.NamespaceStatus:
        use, quotas = self.store.use(name), self.store.quotas(name)
        return common_pb2.NamespaceStatus(
            namespace=name,
            seq=seq,
            blocks=self.store.blocks(name),
            tiers=[
                common_pb2.TierUse(tier=int(tier), used=used, quota=quotas.tier(tier))  # type: ignore[arg-type]
                for tier, used in use.tiers.items()
            ],
            pinned_bytes=use.pinned,
            staging_bytes=use.staging,
            puts_over_quota=use.dropped,
            blocks_over_quota=use.evicted,
        )

    def status(self) -> common_pb2.WorkerStatus:
        """Everything; `kvstore.views` cuts it to what a caller may see."""
        tiers = [
            common_pb2.TierStatus(
                tier=int(stats.tier),  # type: ignore[arg-type]
                state=stats.state,
                detail=stats.detail,
                used=stats.used,
                capacity=stats.capacity,
                blocks=stats.blocks,
                raw_bytes=stats.raw_bytes,
                hits=stats.hits,
                writes=stats.writes,
                errors=stats.errors,
                codecs=[_codec(name, use) for name, use in self.store.stack.codec_use.of(stats.tier).items()],
            )
            for stats in self.store.stats()
        ]
        announced = self.announced()
        loads = [latency_to_wire("load", known, tier) for tier, known in sorted(self.store.stack.loads.items())]
        namespaces = [self._namespace(name, seq) for name, seq in self.store.heads().items()]
        return common_pb2.WorkerStatus(
            member=member_to_wire(self.member()),
            tiers=tiers,
            namespaces=namespaces,
            counters={**self.store.counters, **self.counters, **announced.counters},
            pid=os.getpid(),
            latencies=[latency_to_wire("get", self.gets), *loads],
            lag=announced.lag,
            coordinators=announced.coordinators,
            saved_tokens=self.store.stack.saved_tokens,
        )


def _codec(name: str, use: Use) -> common_pb2.CodecUse:
    return common_pb2.CodecUse(
        codec=name,
        chunks=use.chunks,
        raw_bytes=use.raw_bytes,
        stored_bytes=use.stored_bytes,
        encode_s=use.encode_s,
        decode_s=use.decode_s,
    )


class Answer:
    """The reply to a put as its blocks are taken in."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._states: list[worker_pb2.BlockState] = []
        self._seq = 0

    async def take(self, namespace: str, spec: ModelSpec, blocks: Sequence[Offer]) -> None:
        """Offer blocks to the store, a few at a time; mutates. Their sources may be reused when this returns."""
        if self._node.draining:
            self._node.counters["puts_draining"] += len(blocks)
            self._states += [STATES["dropped"]] * len(blocks)
            return
        store = self._node.store
        for at in range(0, len(blocks), TOGETHER):
            for outcome in await store.put_all(namespace, spec, blocks[at : at + TOGETHER]):
                self._states.append(STATES[outcome.state])
                self._seq = max(self._seq, outcome.seq)

    def message(self) -> worker_pb2.PutReply:
        identity = self._node.identity
        token = common_pb2.CommitToken(worker=identity.worker, epoch=identity.epoch, seq=self._seq)
        return worker_pb2.PutReply(token=token, states=self._states)
