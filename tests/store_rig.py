"""A store with small tiers, and blocks of known bytes put into and read out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvstore.catalog import Catalog
from kvstore.codec_rules import CodecRules
from kvstore.config import StoreConfig
from kvstore.directory.runs import Added, Change, Removed, blocks_of
from kvstore.format import Record, decode_record
from kvstore.quotas import Quotas
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.store.arena import generation_at
from kvstore.store.shared import SharedTier
from kvstore.store.tiered import Hold, Placed, PutOutcome, TieredStore
from kvstore.tiers.base import TierStore
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, header_of, keys_of, raw_of, small_spec
from tests.store_fakes import ManualClock, PlainMemory, fake_system
from tests.store_leaks import emptied

KIB = 1 << 10
MANY = 120  # blocks: about twice what hot and host of SMALL take
SMALL = StoreConfig(host_bytes=512 * KIB, hot_bytes=128 * KIB, put_wait_s=10, load_wait_s=10, policy="lru")
# 16 raw blocks of 8 KiB in hot, 48 records in host; waits never end by time, but as soon as nothing moves


@dataclass
class Rig:
    """Everything is a function of (namespace, session, depth, shard, salt)."""

    store: TieredStore
    system: System
    catalog: Catalog
    spec: ModelSpec
    told: dict[str, list[tuple[int, Change]]] = field(default_factory=dict)
    found: dict[str, tuple[int, list[Added]]] = field(default_factory=dict)  # at the start: what a snapshot told

    @classmethod
    def make(
        cls,
        *,
        config: StoreConfig = SMALL,
        ssd: TierStore | None = None,
        redis: SharedTier | None = None,
        system: System | None = None,
        spec: ModelSpec | None = None,
        catalog: Catalog | None = None,
        quotas: Mapping[str, Quotas] | None = None,
        codecs: Mapping[str, CodecRules] | None = None,
    ) -> Rig:
        """`codecs`: by default the namespace allows any fidelity."""
        codecs = {NAMESPACE: CodecRules(least=Fidelity.COMPACT)} if codecs is None else codecs
        system, catalog = system or fake_system(), catalog or Catalog()
        store = TieredStore(system, config, catalog, ssd=ssd, redis=redis, holder="me", quotas=quotas, codecs=codecs)
        rig = cls(store, system, catalog, spec or small_spec())
        store.subscribe(lambda namespace, seq, change: rig.told.setdefault(namespace, []).append((seq, change)))
        return rig

    @property
    def clock(self) -> ManualClock:
        assert isinstance(self.system.clock, ManualClock)
        return self.system.clock

    @property
    def whole(self) -> Shard:
        return Shard.whole(self.spec)

    def key(self, depth: int, session: int = 0) -> bytes:
        return keys_of(self.spec, session, depth + 1)[depth]

    def keys(self, count: int, session: int = 0) -> list[bytes]:
        return keys_of(self.spec, session, count)

    def raw(self, depth: int, session: int = 0, *, shard: Shard | None = None, salt: bytes = b"") -> bytes:
        return raw_of(self.spec, shard or self.whole, self.key(depth, session), salt)

    async def put(
        self,
        depth: int,
        session: int = 0,
        *,
        namespace: str = NAMESPACE,
        shard: Shard | None = None,
        salt: bytes = b"",
        fidelity: Fidelity = Fidelity.EXACT,
    ) -> PutOutcome:
        shard = shard or self.whole
        raw = self.raw(depth, session, shard=shard, salt=salt)
        header = header_of(namespace, self.spec, shard, session, depth, raw, fidelity=fidelity)
        return await self.store.put(namespace, self.spec, shard, header, memoryview(raw))

    async def put_all(self, count: int, session: int = 0, *, namespace: str = NAMESPACE) -> None:
        """Every block of a chain, each committed."""
        for depth in range(count):
            assert (await self.put(depth, session, namespace=namespace)).state == "committed"

    async def open(
        self,
        depths: Sequence[int],
        session: int = 0,
        *,
        namespace: str = NAMESPACE,
        shard: Shard | None = None,
        least: Fidelity = Fidelity.COMPACT,
        redis: bool = False,
    ) -> Hold:
        shard = shard or self.whole
        wanted = [(shard.digest, self.key(depth, session)) for depth in depths]
        return await self.store.open(namespace, self.spec.root, wanted, least=least, redis=redis)

    async def get(self, depth: int, session: int = 0, **how: object) -> bytes | None:
        """Raw bytes as a reader would get them, None for a miss."""
        hold = await self.open([depth], session, **how)  # type: ignore[arg-type]
        placed = hold.blocks[0]
        shard = how.get("shard") or self.whole
        assert isinstance(shard, Shard)
        raw = None if placed is None else self.read(placed, shard)
        self.store.release(hold.id)
        return raw

    def read(self, placed: Placed, shard: Shard | None = None) -> bytes:
        """What a reader makes of an open block; it looks at the generation first and last."""
        assert self.current(placed)
        data = bytes(placed.view)
        if not placed.raw:
            target = bytearray(placed.header.raw_length)
            decode_record(Record.parse(data), self.spec, shard or self.whole, memoryview(target))
            data = bytes(target)
        assert self.current(placed)
        return data

    @staticmethod
    def current(placed: Placed) -> bool:
        """Whether the bytes there are still the block's."""
        return generation_at(placed.segment.view, placed.data_offset, placed.offset) == placed.generation

    def where(self, depth: int, session: int = 0, *, namespace: str = NAMESPACE) -> list[Tier]:
        """Tiers that hold a block."""
        residency = self.store.stack.residency
        row = residency.find(namespace, self.whole.digest, self.key(depth, session))
        if row is None:
            return []
        return [level.tier for at, level in enumerate(residency.levels) if residency.present(row, at)]

    async def start(self) -> None:
        await self.store.start()
        self.found = {namespace: self.store.snapshot(namespace) for namespace in self.store.heads()}

    async def settle(self) -> None:
        """Until nothing moves; then everything must agree."""
        await self.store.idle()
        self.check()

    def check(self) -> None:
        """validate(), and what was announced equals what is held, numbered without a gap."""
        self.store.validate()
        for namespace, told in self.told.items():
            first, before = self.found.get(namespace, (0, []))
            assert [seq for seq, _ in told] == list(range(first + 1, first + len(told) + 1))
            said: dict[tuple[bytes, bytes], Added] = {(b.shard, b.key): b for b in before}
            for _, change in told:
                if isinstance(change, Removed):
                    del said[change.shard, change.key]
                else:
                    said[change.shard, change.key] = change
            seq, blocks = self.store.snapshot(namespace)
            runs = [block for run in self.store.snapshot_runs(namespace)[1] for block in blocks_of(run)]
            assert {replace(b, stored_bytes=0) for b in runs} == {replace(b, stored_bytes=0) for b in blocks}
            assert len(runs) == len(blocks)
            assert seq == first + len(told) and {(b.shard, b.key): b.tier for b in blocks} == {
                n: b.tier for n, b in said.items()
            }

    async def close(self) -> None:
        """All that is held is given up: no tier, and no account, may have a byte left."""
        await self.settle()
        await emptied(self.store)
        self.check()
        await self.store.close()
        memory = self.system.memory
        assert not isinstance(memory, PlainMemory) or not memory.open_bytes, "segments were left open"


async def filled(rig: Rig, count: int = MANY) -> list[int]:
    """Put so many blocks; the depths that lie on SSD only."""
    await rig.put_all(count)
    await rig.settle()
    found = [depth for depth in range(count) if rig.where(depth) == [Tier.SSD]]
    assert found, "nothing was spilled that far"
    return found


async def until(rig: Rig, condition: Callable[[], bool]) -> None:
    """Give other tasks their turns until it holds; a bound stands for a deadlock."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came about")
