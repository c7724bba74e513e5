"""The simulated Redis against a real one: each script of the index has a twin in Python that does the same."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from kvstore.config import StoreConfig
from kvstore.errors import TierDown
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_index import Space
from kvstore.tiers.redis_scripts import ELECT, ENTER, MARK, PUT, REMOVE, RESIGN, TOUCH, Script
from tests.contracts.records import NAMESPACE, catalog_of, sample
from tests.redis_helpers import Raw, put, secret_of
from tests.sim.loop import run
from tests.sim.network import MemoryNetwork
from tests.sim.redis_data import Data
from tests.sim.redis_server import SimLink, SimRedis
from tests.sim.system import sim_system

pytest_plugins = ["tests.redis_fixtures"]

SPACE = Space.of("default")
LEASE = SPACE.key("lease")
REAL_CLOCK = "local now = redis.call('TIME')\n  return now[1] * 1000 + now[2] / 1000"
OUR_CLOCK = "return tonumber(redis.call('GET', 'now'))"
TTL_MS, CAPACITY = 10_000_000, 6_000


class Both:
    """The same commands to both. The real one's clock is ours too, or the order of two touches would be chance."""

    def __init__(self, raw: Raw) -> None:
        self.raw, self.data, self.now = raw, Data(), 1_800_000_000_000

    def script(self, source: str, keys: list[bytes], *arguments: Any) -> Any:
        self.now += 1
        self.raw("SET", "now", self.now)
        given = [a if isinstance(a, bytes) else str(a).encode() for a in arguments]
        digest = Script(source).digest
        self.data.scripts[digest] = None
        ours = self.data.run(digest, keys, given, self.now)
        real = self.raw("EVAL", source.replace(REAL_CLOCK, OUR_CLOCK), len(keys), *keys, *given)
        if source is MARK:  # the real stream's ids are of the real clock
            ours, real = ours[:2], real[:2]
        assert ours == real, source
        return real

    def same(self) -> None:
        """The whole index."""
        meta, index, order, changes, _ = SPACE.keys
        assert self.raw("HGETALL", meta) == (self.data.get(meta, self.now) or {})
        assert self.raw("HGETALL", index) == (self.data.get(index, self.now) or {})
        real = dict(self.raw("ZRANGE", order, 0, -1, "WITHSCORES"))
        assert real == (self.data.get(order, self.now) or {})
        told = [list(sum(fields.items(), ())) for _, fields in self.raw("XRANGE", changes, "-", "+")]
        assert told == [fields for _, fields in self.data.get(changes, self.now) or []]

    def send(self, key: bytes, value: bytes) -> None:
        self.raw("SET", key, value)
        self.data.set(key, value, None)

    def empty(self) -> None:
        self.raw("FLUSHALL")
        self.data.values.clear()


def entry(rng: Random, copy_id: int) -> bytes:
    """An index entry as far as the scripts read it."""
    packed = bytearray(rng.randbytes(160))
    packed[112:120] = struct.pack("<Q", copy_id)
    packed[120], packed[121] = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    packed[128:136] = struct.pack("<Q", rng.randrange(1, 4000))
    packed[136:144] = struct.pack("<Q", rng.randrange(1, 2000))
    return bytes(packed)


def one(both: Both, rng: Random, incarnation: bytes) -> bytes:
    """One command, drawn; the incarnation from then on."""
    keys, values = SPACE.keys, SPACE.values
    id = rng.choice(b"abcdef").to_bytes(1, "little") * 32
    match rng.randrange(9):
        case 0:
            incarnation = both.script(ENTER, keys, rng.randbytes(16).hex(), "default")[0]
        case 1 | 2 | 3:
            sent = SPACE.key("t:") + rng.randbytes(4)
            if rng.random() < 0.9:
                both.send(sent, b"value")
            both.script(
                PUT, [*keys, sent], incarnation, id, entry(rng, rng.randrange(3)), CAPACITY, TTL_MS, 65_536, values
            )
        case 4:
            both.script(TOUCH, keys, TTL_MS, values, id)
        case 5:
            both.script(REMOVE, keys, 65_536, values, id, rng.choice([b"", struct.pack("<Q", rng.randrange(3))]))
        case 6:
            wall = rng.choice([1, both.now * 10**6, 2**62])
            both.script(ELECT, [keys[0], LEASE], rng.choice([b"w1", b"w2"]), TTL_MS, wall)
        case 7:
            both.script(RESIGN, [LEASE], rng.choice([b"w1", b"w2"]))
        case 8:
            both.script(MARK, [keys[0], keys[3]])
            if rng.random() < 0.05:
                both.empty()
    return incarnation


@pytest.mark.parametrize("seed", range(6))
def test_every_script_has_its_twin(raw: Raw, seed: int) -> None:
    both, rng, incarnation = Both(raw), Random(seed), b""
    for _ in range(150):
        incarnation = one(both, rng, incarnation)
        both.same()


def test_a_twin_that_differs_is_seen(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr("tests.sim.redis_data.cost", lambda entry: 1)
    with pytest.raises(AssertionError):
        test_every_script_has_its_twin(raw, 0)


def test_an_index_that_goes_back_in_time_is_read_anew() -> None:
    """A restart from an older dump, so fast that nobody met a closed door."""

    async def main() -> None:
        network = MemoryNetwork(1)
        redis, process = SimRedis(network), network.boot("w")
        config = replace(StoreConfig(), redis_url="redis://redis", redis_bytes=1 << 20)
        system = sim_system(process, 1)
        tier = RedisTier(system, config, catalog_of(), secret_of, lambda url, timeout_s: SimLink(redis, process, 1.0))
        await tier.start()
        await put(tier, sample(0))
        assert len(await tier.snapshot(NAMESPACE)) == 1
        dump = redis.data.snapshot()
        await put(tier, sample(1))
        assert len(await tier.changes(NAMESPACE) or ()) == 1
        redis.stop()
        redis.start(dump)
        assert await tier.changes(NAMESPACE) is None
        assert len(await tier.snapshot(NAMESPACE)) == 1
        assert await tier.changes(NAMESPACE) == []
        await tier.close()

    run(main())


def test_a_call_fails_as_the_real_link_says() -> None:
    async def main() -> None:
        network = MemoryNetwork(1)
        redis, process = SimRedis(network), network.boot("w")
        link = SimLink(redis, process, 0.5)
        set_, get = ["SET", b"k", b"ab", "PX", 1000], ["GET", b"k"]
        assert await link.call(set_, get) == [b"OK", b"ab"]
        into = (memoryview(bytearray(1)), memoryview(bytearray(1)))
        seen: list[bytes] = []
        replies = await link.call(get, into=into, seen=lambda piece: seen.append(bytes(piece)))
        assert replies[0] is into and bytes(into[1]) == b"b" and seen == [b"a"]
        await asyncio.sleep(2)
        assert await link.call(get) == [None], "it has expired"
        for trouble in (redis.stop, lambda: setattr(redis, "hangs", True), lambda: network.cut("w", "redis")):
            trouble()
            with pytest.raises(TierDown):
                await link.call(get)
            redis.start()
            redis.hangs = False
            network.heal()
            assert await link.call(get) == [None]
        redis.maxmemory = 1
        assert (await link.call(set_))[0].code == "OOM"
        assert (await link.call(["EVALSHA", Script(MARK).digest, 0]))[0].code == "NOSCRIPT"

    run(main())
