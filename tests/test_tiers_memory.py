"""Tiers in memory pass the contract: host, hot in the arena, hot on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.errors import SetupError, TierFull
from kvstore.machine.memory import MemfdMemory
from kvstore.machine.system import ThreadPool
from kvstore.store.arena import Arena
from kvstore.tiers.host import ArenaTier, HostTier, copy_parts
from kvstore.tiers.hot import DevicePool, HotTier
from tests.contracts.records import NAMESPACE, sample
from tests.contracts.tier_suite import Make, TierContract

MIB = 1 << 20


def has_cuda() -> bool:
    torch = pytest.importorskip("torch")
    return bool(torch.cuda.is_available())


@pytest.fixture
def pool(no_leaks: None) -> Iterator[ThreadPool]:
    pool = ThreadPool(2)
    yield pool
    pool.close()


class ArenaContract(TierContract):
    kind: type[HostTier] | type[HotTier]

    @pytest.fixture
    def make(self, pool: ThreadPool) -> Iterator[Make]:
        arenas: list[Arena] = []

        def make(capacity: int) -> ArenaTier:
            arenas.append(Arena(MemfdMemory(), capacity, 64 * MIB))
            return self.kind(arenas[-1], pool, capacity)

        yield make
        for arena in arenas:
            arena.validate()
            arena.close()


class TestHost(ArenaContract):
    kind = HostTier


class TestHotCpu(ArenaContract):
    kind = HotTier


class TestHotDevice(TierContract):
    """The device pool's code on torch's own CPU device."""

    @pytest.fixture
    def make(self, pool: ThreadPool) -> Make:
        pytest.importorskip("torch")
        return lambda capacity: DevicePool("cpu", pool, capacity)

    async def test_blocks_larger_than_the_staging_buffer(self, make: Make) -> None:
        tier = make(20 * MIB)
        await tier.start()
        found = sample()
        parts = [found.record, bytes(range(256)) * (9 * MIB // 256), found.record]
        location = await tier.write(NAMESPACE, found.header, parts)
        target = bytearray(location.length)
        await tier.read(NAMESPACE, found.header, location, memoryview(target))
        assert bytes(target) == b"".join(parts)
        await tier.close()

    async def test_an_unknown_device_says_what_to_do(self, pool: ThreadPool) -> None:
        with pytest.raises(SetupError, match="device"):
            await DevicePool("cuda:999", pool, MIB).start()


@pytest.mark.gpu
class TestHotCuda(TierContract):
    @pytest.fixture
    def make(self, pool: ThreadPool) -> Make:
        if not has_cuda():
            pytest.skip("no CUDA device")
        return lambda capacity: DevicePool("cuda:0", pool, capacity)


async def test_two_tiers_share_an_arena_within_their_own_bounds(pool: ThreadPool) -> None:
    arena = Arena(MemfdMemory(), MIB, 64 * MIB)
    hot, host = HotTier(arena, pool, 256 << 10), HostTier(arena, pool, 768 << 10)
    found = sample()
    locations = []
    while hot.fits(len(found.raw)):
        locations.append(await hot.write(NAMESPACE, found.header, [found.raw]))
    with pytest.raises(TierFull):
        await hot.write(NAMESPACE, found.header, [found.raw])
    assert 0 < hot.used <= hot.capacity
    kept = await host.write(NAMESPACE, found.header, [found.record])
    assert arena.used == hot.used + host.used
    for location in locations:
        hot.free(NAMESPACE, found.header, location)
    assert hot.used == 0 and bytes(host.view(kept)) == found.record
    arena.validate()
    arena.close()


def test_parts_must_fill_their_place() -> None:
    with pytest.raises(AssertionError, match="3 bytes of parts"):
        copy_parts([b"abc"], memoryview(bytearray(4)))
