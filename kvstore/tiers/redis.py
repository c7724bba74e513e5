"""The Redis tier: one store shared by all workers of a namespace, bounded there, found again after all of them died.

Redis itself evicts the oldest blocks of a namespace to take a new one (a script, with the byte total in one place), so
`fits` asks only whether a block could ever fit, and nobody here accounts for what is in it.
States: `ok`; `full` (Redis is out of memory); `down` (out of reach: the breaker is open and one probe at a time asks).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence

from kvstore.catalog import Catalog
from kvstore.config import StoreConfig
from kvstore.directory.runs import Added, Change
from kvstore.errors import BadRequest, Corrupt, DataError, SetupError, TierDown, TierFull
from kvstore.header import Header
from kvstore.seams import System
from kvstore.tiers.base import Location, Recovered, TierStats
from kvstore.tiers.redis_gate import Gate
from kvstore.tiers.redis_index import STREAM_MAX, RedisIndex, Space
from kvstore.tiers.redis_link import Command, Connect, Refused, ReplyError, Sealed, connect, place
from kvstore.tiers.redis_scripts import INDEX_BYTES, PUT, TOUCH, VALUE_EXTRA_BYTES, Script
from kvstore.tiers.redis_value import NONCE_BYTES, PREFERRED, TRAILER_BYTES, Checking, Sealing, algorithm_of, check
from kvstore.types import Buffer, Tier

assert TRAILER_BYTES == VALUE_EXTRA_BYTES

REFRESH_S = 1.0
FREES_MAX = 65_536
"""Blocks freed and not yet removed; of more, the first stay until Redis evicts them."""
FREES_A_CALL = 256
SENT_MS = 60_000
"""Life of a value under the name it is sent by, should its sender die before the script takes it."""
_COPY_ID = struct.Struct("<Q")


class RedisTier:
    """`TierStore` over Redis, and what an announcer of its index needs."""

    tier = Tier.REDIS
    prefixes = False  # its MAC is of the whole value

    def __init__(
        self,
        system: System,
        config: StoreConfig,
        catalog: Catalog,
        secret: Callable[[str], bytes],
        connect: Connect = connect,
        quota: Callable[[str], int] = lambda namespace: 0,
    ) -> None:
        """`secret` gives a namespace's MAC key; `connect` makes the link; `quota`: bytes of a namespace below
        `redis_bytes`, 0: these."""
        self._quota = quota
        self.system = system
        self.config = config
        self._secret = secret
        self._connect = connect
        self._stats = TierStats(Tier.REDIS)
        self._gate = Gate(system.clock, self._stats, place(config.redis_url))
        self.index = RedisIndex(system, catalog, self._gate.call)
        self._pending_bytes = 0
        self._freed: dict[tuple[str, bytes], bytes] = {}  # (namespace, id) -> copy_id, to be removed
        self._housekeeping: asyncio.Task[None] | None = None
        self._refresh_at = 0.0

    # The contract

    @property
    def capacity(self) -> int:
        """`redis_bytes`, or its quota, for each namespace used."""
        return sum(map(self._bound, self.index.spaces)) or self.config.redis_bytes

    @property
    def used(self) -> int:
        """As Redis said last, all workers' blocks together, and what is being written here."""
        return min(self._pending_bytes + sum(space.used for space in self.index.spaces.values()), self.capacity)

    def _bound(self, namespace: str) -> int:
        return min(self._quota(namespace) or self.config.redis_bytes, self.config.redis_bytes)

    def fits(self, nbytes: int) -> bool:
        return _cost(nbytes) <= self.config.redis_bytes

    def stats(self) -> TierStats:
        found, spaces = self._stats, self.index.spaces.values()
        found.used, found.capacity = self.used, self.capacity
        found.blocks = sum(space.blocks for space in spaces)
        found.raw_bytes = sum(space.raw_bytes for space in spaces)
        found.extra = {"strange_entries": self.index.strange, "frees_waiting": len(self._freed)}
        if found.state == "ok":
            found.detail = self._gate.warning
        return found

    async def start(self) -> list[Recovered]:
        """Nothing is recovered: what is in Redis is no worker's own. Out of reach, the tier is down until a probe finds
        it. SetupError where Redis answers and refuses."""
        try:
            await self._gate.open(self._connect(self.config.redis_url, self.config.redis_timeout_s))
        except Refused as error:
            await self.close()
            raise SetupError(str(error)) from error
        return []

    async def close(self) -> None:
        if self._freed and self._gate.ok:
            await self.flush()
        task, self._housekeeping = self._housekeeping, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._gate.close()

    async def write(self, namespace: str, header: Header, parts: Sequence[Buffer]) -> Location:
        nbytes = sum(memoryview(part).nbytes for part in parts)
        if _cost(nbytes) > self._bound(namespace):
            raise TierFull(f"{nbytes} bytes are more than redis_bytes, {self._bound(namespace)}")
        if nbytes != header.stored_length:
            raise BadRequest(f"a record of {nbytes} bytes under a header that says {header.stored_length}")
        if self._stats.state == "full":
            raise TierDown(self._stats.detail)
        self._pending_bytes += _cost(nbytes)
        try:
            await self._put(self.index.space(namespace), header, tuple(parts))
        finally:
            self._pending_bytes -= _cost(nbytes)
        self._freed.pop((namespace, header.shard + header.key), None)
        self._stats.writes += 1
        return Location(0, 0, nbytes)

    async def _put(self, space: Space, header: Header, parts: tuple[Buffer, ...]) -> None:
        id, ttl_ms = header.shard + header.key, int(self.config.redis_ttl_s * 1000)
        for _ in range(3):
            if not space.incarnation:
                await self.index.enter(space)
            sent = space.key("t:") + self.system.rng.randbytes(16)
            value = Sealed(parts, Sealing(self._secret(space.name), self.system.rng.randbytes(NONCE_BYTES)))
            before: list[Command] = [["SET", sent, value, "PX", SENT_MS]]
            words = self.index.words(space, header)
            if words:
                before.insert(0, ["HSET", space.key("words"), *words])
            entry = header.pack()
            arguments = [space.incarnation, id, entry, self._bound(space.name), ttl_ms, STREAM_MAX, space.values]
            arguments += self.index.described(header)
            word, *totals = await self.index.run(PUT, [*space.keys, sent], arguments, before)
            space.count(totals)
            if word == b"enter":  # the index was emptied since, or is an older one: its words are gone
                space.incarnation = b""
                space.described.clear()
                continue
            if word == b"full":
                raise TierFull("Redis could not make room for the block within redis_bytes")
            if word == b"lost":
                break
            space.described.update(dict.fromkeys((header.root, header.shard)))
            return
        raise TierDown("Redis loses what it is sent: it is emptied, or out of memory, again and again")

    async def read(self, namespace: str, header: Header, location: Location, target: memoryview) -> None:
        space = self.index.space(namespace)
        id, ttl_ms = header.shard + header.key, int(self.config.redis_ttl_s * 1000)
        touch: Command = ["EVALSHA", Script(TOUCH).digest, len(space.keys), *space.keys, ttl_ms, space.values, id]
        end = memoryview(bytearray(TRAILER_BYTES))
        secret = self._secret(namespace)
        passed = Checking(secret)
        value, touched = await self._gate.call(
            ["GET", space.values + id], touch, into=(target, end), seen=passed.update
        )
        if isinstance(touched, ReplyError) and touched.code == "NOSCRIPT":
            touched = await self.index.run(TOUCH, space.keys, [ttl_ms, space.values, id])
        try:
            if value is None or isinstance(value, ReplyError):
                raise Corrupt("Redis no longer has the block")
            if isinstance(value, bytes):
                raise Corrupt(f"Redis has {len(value)} bytes where a record of {len(target)} was announced")
            if algorithm_of(end) == PREFERRED:
                check(target, end, header, secret, passed)
            else:
                await self.system.pool.run(check, target, end, header, secret)
        except DataError as error:
            self._stats.errors += 1
            await self.index.remove(space, [(id, _COPY_ID.pack(header.copy_id))])
            raise Corrupt(str(error)) from error
        if not isinstance(touched, ReplyError):
            space.count(touched[1:])
        self._stats.hits += 1

    def free(self, namespace: str, header: Header, location: Location) -> None:
        """Removed from Redis at the next heartbeat, for all workers, unless another copy took its place."""
        if len(self._freed) >= FREES_MAX:
            self._freed.pop(next(iter(self._freed)))
        self._freed[namespace, header.shard + header.key] = _COPY_ID.pack(header.copy_id)
        space = self.index.space(namespace)
        space.used = max(0, space.used - _cost(location.length))

    # Heartbeat

    async def tick(self) -> None:
        """Starts a probe, removals or a refresh in the background when one is due: Redis may be slow, the store's
        heartbeat is not."""
        task, now = self._housekeeping, self.system.clock.monotonic()
        if task is not None and not task.done():
            return
        due = self._refresh_at if self._gate.ok else self._gate.probe_at
        if self._freed or now >= due:
            self._housekeeping = asyncio.ensure_future(self._keep_house(now))

    async def flush(self) -> None:
        """The housekeeping of a heartbeat, waited for."""
        await self.tick()
        if self._housekeeping is not None:
            await self._housekeeping

    async def _keep_house(self, now: float) -> None:
        if self._stats.state != "ok" and now >= self._gate.probe_at:
            await self._gate.probe()
        if not self._gate.ok:
            return
        try:
            await self._remove_freed()
            if now >= self._refresh_at:
                self._refresh_at = now + REFRESH_S
                for space in list(self.index.spaces.values()):
                    await self.index.enter(space)
        except TierDown as error:  # the gate has closed itself, or Redis refuses: the next heartbeat tries again
            self._stats.detail = str(error)

    async def _remove_freed(self) -> None:
        while self._freed:
            namespace = next(iter(self._freed))[0]
            some = [name for name in self._freed if name[0] == namespace][:FREES_A_CALL]
            blocks = [(id, self._freed.pop((namespace, id))) for _, id in some]
            await self.index.remove(self.index.space(namespace), blocks)

    # For the namespace's announcer and for stores. All raise TierDown.

    async def find(self, namespace: str, shard: bytes, key: bytes) -> tuple[Header, Location] | None:
        """A block's header and where to read it, None when Redis does not have it."""
        return (await self.find_many(namespace, [(shard, key)]))[0]

    async def find_many(
        self, namespace: str, wanted: Sequence[tuple[bytes, bytes]]
    ) -> list[tuple[Header, Location] | None]:
        """The same for (shard, key) pairs, in one round trip."""
        headers = await self.index.find(self.index.space(namespace), wanted)
        return [None if header is None else (header, Location(0, 0, header.stored_length)) for header in headers]

    async def purge(self, namespace: str, root: bytes | None = None) -> int:
        """Remove the namespace's blocks, or those of one model, for all workers; how many."""
        return await self.index.purge(self.index.space(namespace), root)

    async def elect(self, namespace: str, worker: str, lease_s: float, above: int = 0) -> int | None:
        """Epoch under which `worker` announces the index as `redis:<namespace>`, None while another one does. `above`:
        an epoch that somebody knows already; a new one is higher."""
        return await self.index.elect(self.index.space(namespace), worker, lease_s, above)

    async def resign(self, namespace: str, worker: str) -> None:
        """Let another worker announce at once."""
        await self.index.resign(self.index.space(namespace), worker)

    async def snapshot(self, namespace: str) -> list[Added]:
        """What the index holds; `changes` goes on from here."""
        return await self.index.snapshot(self.index.space(namespace))

    async def changes(self, namespace: str) -> list[Change] | None:
        """What changed since; None: take a snapshot."""
        return await self.index.changes(self.index.space(namespace))


def _cost(nbytes: int) -> int:
    """What a record of that size counts against `redis_bytes`: as the script charges it."""
    return nbytes + VALUE_EXTRA_BYTES + INDEX_BYTES
