"""The fidelity contract in the store: what a namespace allows, what a reader accepts, what tiers keep of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from kvstore.codec_rules import CodecRules
from kvstore.codecs import DENSE, FAST, INT4, INT8, NESTED
from kvstore.directory.runs import Added
from kvstore.format import Record, encode_record, trim_record
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.store import promotion
from kvstore.types import Fidelity, Tier
from tests.contracts.records import NAMESPACE, small_spec
from tests.store_fakes import FaultyTier, ManualClock, YieldingPool, fake_system
from tests.store_rig import MANY, Rig

T = TypeVar("T")
EXACT, NEAR, COMPACT = Fidelity.EXACT, Fidelity.NEAR, Fidelity.COMPACT


async def rig_with(
    rules: CodecRules, *, ssd: FaultyTier | None = None, redis: FaultyTier | None = None, spec: ModelSpec | None = None
) -> Rig:
    rig = Rig.make(ssd=ssd, redis=redis, spec=spec, codecs={NAMESPACE: rules})
    await rig.store.start()
    return rig


def error(raw: bytes, back: bytes) -> float:
    def floats(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)

    return float(np.linalg.norm(floats(back) - floats(raw)) / np.linalg.norm(floats(raw)))


def only_in(rig: Rig, tier: Tier) -> list[int]:
    found = [depth for depth in range(MANY) if rig.where(depth) == [tier]]
    assert found, f"nothing lies in {tier.name} alone"
    return found


def planes(rig: Rig, depth: int) -> dict[Tier, int]:
    """The bitmap of planes in each tier that has the block."""
    residency = rig.store.stack.residency
    row = residency.find(NAMESPACE, rig.whole.digest, rig.key(depth))
    assert row is not None
    return {
        rule.tier: residency.rows.planes[level][row]
        for level, rule in enumerate(residency.levels)
        if residency.present(row, level)
    }


@pytest.mark.parametrize(
    ("name", "codec", "worth", "most"), [("near", INT8, NEAR, 0.015), ("compact", INT4, COMPACT, 0.12)]
)
async def test_a_lossy_copy_answers_only_those_who_accept_it(
    name: str, codec: int, worth: Fidelity, most: float
) -> None:
    rig = await rig_with(CodecRules(worth, name), ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.put_all(MANY)
    await rig.settle()
    for tier in (Tier.HOST, Tier.SSD):
        depth = only_in(rig, tier)[0]
        assert await rig.get(depth, least=EXACT) is None
        back = await rig.get(depth, least=worth)
        assert back is not None and 0 < error(rig.raw(depth), back) < most
        last = [
            change for _, change in rig.told[NAMESPACE] if isinstance(change, Added) and change.key == rig.key(depth)
        ]
        assert last[-1].fidelity == worth
    tables = [Record.parse(record).table["codec"] for _, _, record in rig.store.stack.tiers[2].kept.values()]  # type: ignore[attr-defined]
    assert {int(value) for table in tables for value in table} == {codec}
    await rig.close()


async def test_a_lossy_block_is_never_encoded_again() -> None:
    rig = await rig_with(CodecRules(NEAR, "near"), ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.put_all(MANY)
    await rig.settle()
    depth = only_in(rig, Tier.HOST)[0]
    first = await rig.get(depth, least=NEAR)
    for _ in range(3):
        assert await rig.get(depth, least=NEAR) == first
        await rig.settle()
    assert Tier.HOT not in rig.where(depth), "a lossy block was promoted as raw bytes"
    await rig.close()


async def test_an_exact_put_takes_the_place_of_a_lossy_copy() -> None:
    rig = await rig_with(CodecRules(NEAR, "near"), ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.put_all(MANY)
    await rig.settle()
    depth = only_in(rig, Tier.SSD)[0]
    assert (await rig.put(depth)).state == "committed"
    assert await rig.get(depth, least=EXACT) == rig.raw(depth)
    assert (await rig.put(depth, fidelity=NEAR, salt=b"worse")).state == "held"
    assert await rig.get(depth, least=NEAR) == rig.raw(depth)
    await rig.close()


async def test_what_a_namespace_does_not_allow_is_refused() -> None:
    for least, allowed in ((EXACT, [EXACT]), (NEAR, [EXACT, NEAR]), (COMPACT, [EXACT, NEAR, COMPACT])):
        rig = await rig_with(CodecRules(least))
        for depth, fidelity in enumerate(Fidelity):
            state = (await rig.put(depth, fidelity=fidelity)).state
            assert state == ("committed" if fidelity in allowed else "refused")
        await rig.close()


async def test_nested_blocks_lose_planes_on_the_way_down() -> None:
    ssd, redis = FaultyTier(Tier.SSD, 1 << 20), FaultyTier(Tier.REDIS, 64 << 20)
    rules = CodecRules(COMPACT, "nested", planes={Tier.SSD: 2, Tier.REDIS: 1})
    rig = await rig_with(rules, ssd=ssd, redis=redis)
    for session in range(3):
        await rig.put_all(MANY, session)
    await rig.settle()
    for depth in range(MANY):
        for tier, bitmap in planes(rig, depth).items() if rig.where(depth) else ():
            assert bitmap == {Tier.HOT: 7, Tier.HOST: 7, Tier.SSD: 3}[tier]
    for kept, count in ((ssd, 2), (redis, 1)):
        assert kept.kept, "nothing came there"
        for _, header, record in kept.kept.values():
            parsed = Record.parse(record)
            assert parsed.header.stored == {2: NEAR, 1: COMPACT}[count] == header.stored
            assert int(parsed.table["plane"].max()) == count - 1 and set(parsed.table["codec"].tolist()) == {NESTED}
    away = next(depth for depth in range(MANY) if not rig.where(depth))
    assert await rig.get(away, least=NEAR, redis=True) is None
    back = await rig.get(away, least=COMPACT, redis=True)
    assert back is not None and error(rig.raw(away), back) < 0.12
    await rig.close()


async def test_losing_a_tier_lowers_fidelity_instead_of_losing_the_block() -> None:
    ssd = FaultyTier(Tier.SSD, 4 << 20)
    rig = await rig_with(CodecRules(COMPACT, "nested"), ssd=ssd)
    await rig.put_all(MANY)
    await rig.settle()
    stack, residency = rig.store.stack, rig.store.stack.residency
    depth = only_in(rig, Tier.SSD)[0]
    back = await rig.get(depth, least=COMPACT)
    assert back is not None and 0.01 < error(rig.raw(depth), back) < 0.12, "plane 0 alone was asked for"
    await rig.settle()
    assert planes(rig, depth) == {Tier.HOST: 1, Tier.SSD: 7}
    row = residency.find(NAMESPACE, rig.whole.digest, rig.key(depth))
    assert row is not None and stack.SSD is not None
    before = len(rig.told[NAMESPACE])

    stack.damaged(row, stack.SSD)
    said = rig.told[NAMESPACE][before:]
    assert [change.fidelity for _, change in said if isinstance(change, Added)] == [COMPACT]
    assert await rig.get(depth, least=EXACT) is None
    assert await rig.get(depth, least=COMPACT) == back
    await rig.close()


@pytest.mark.parametrize("same", [True, False])
async def test_a_lossy_copy_from_redis_does_not_take_the_place_of_what_a_failing_disk_has(same: bool) -> None:
    ssd, redis = FaultyTier(Tier.SSD, 4 << 20), FaultyTier(Tier.REDIS, 64 << 20)
    rig = await rig_with(CodecRules(COMPACT, "nested"), ssd=ssd, redis=redis)
    await rig.put_all(MANY)
    await rig.settle()
    depth = only_in(rig, Tier.SSD)[0]
    header, record = next((header, record) for _, header, record in ssd.kept.values() if header.depth == depth)
    if not same:
        _, parts = encode_record(
            replace(header.unencoded(), copy_id=0), rig.raw(depth, salt=b"other"), rig.spec, rig.whole, NESTED
        )
        record = b"".join(parts)
    header, trimmed = trim_record(Record.parse(record), 1)
    redis.kept[1] = NAMESPACE, header, b"".join(bytes(part) for part in trimmed)

    ssd.down = True
    back = await rig.get(depth, least=COMPACT, redis=True)
    assert ssd.landed > 0, "nobody asked the failing disk"
    if same:
        assert back is not None and 0.01 < error(rig.raw(depth), back) < 0.15
        assert planes(rig, depth) == {Tier.HOST: 1, Tier.SSD: 7}
    else:
        assert back is None and planes(rig, depth) == {Tier.SSD: 7}
    ssd.down = False
    assert await rig.get(depth, least=EXACT) == rig.raw(depth)
    await rig.close()


async def test_an_exact_reader_brings_the_planes_that_host_has_not() -> None:
    rig = await rig_with(CodecRules(COMPACT, "nested"), ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.put_all(MANY)
    await rig.settle()
    depth = only_in(rig, Tier.SSD)[0]
    hold = await rig.open([depth], least=NEAR)  # a reader of the lesser copy, while the better one comes
    near, placed = hold.blocks[0], hold.blocks[0]
    assert near is not None and placed is not None and near.header.stored == NEAR
    view = rig.read(placed)
    assert await rig.get(depth, least=EXACT) == rig.raw(depth)
    assert rig.read(placed) == view, "its bytes stay until its hold ends"
    assert planes(rig, depth)[Tier.HOST] == 7
    rig.store.release(hold.id)
    await rig.close()


def flip(ssd: FaultyTier, depth: int, plane: int) -> None:
    """One bit of that plane of a block's first chunk; plane -1: of the table."""
    number, (namespace, header, record) = next(
        (number, kept) for number, kept in ssd.kept.items() if kept[1].depth == depth
    )
    row = Record.parse(record).table[max(plane, 0) * 4]
    assert plane < 0 or row["plane"] == plane
    bad = bytearray(record)
    bad[170 if plane < 0 else int(row["offset"]) + int(row["stored"]) // 2] ^= 4
    ssd.kept[number] = namespace, header, bytes(bad)


@pytest.mark.parametrize("plane", [-1, 0, 1, 2])
async def test_a_flipped_bit_in_any_plane_is_caught(plane: int) -> None:
    """By everyone who reads that plane; who needs less is served what is whole."""
    rig = await rig_with(CodecRules(COMPACT, "nested"), ssd=(ssd := FaultyTier(Tier.SSD, 4 << 20)))
    await rig.put_all(MANY)
    await rig.settle()
    caught = 0
    depths = only_in(rig, Tier.SSD)[:3]
    for depth, least in zip(depths, (COMPACT, NEAR, EXACT), strict=True):
        flip(ssd, depth, plane)
        back = await rig.get(depth, least=least)
        assert (back is None) == (plane < int(least))
        caught += back is None
    assert rig.store.counters["corrupt"] == caught == (3 if plane < 0 else 3 - plane)
    await rig.close()


async def test_who_needs_a_plane_reads_no_more_from_the_disk() -> None:
    wide = Group(layers=1, kv_heads=1, k_dim=128, v_dim=128)  # the scales' part is that of large blocks
    spec = replace(small_spec(block_tokens=64), groups=(wide,))
    for least, share in ((COMPACT, 0.4), (NEAR, 0.72), (EXACT, 1.0)):
        rig = await rig_with(CodecRules(COMPACT, "nested"), ssd=(ssd := FaultyTier(Tier.SSD, 4 << 20)), spec=spec)
        await rig.put_all(MANY)
        await rig.settle()
        depth = only_in(rig, Tier.SSD)[0]
        stored = next(len(record) for _, header, record in ssd.kept.values() if header.depth == depth)
        before = ssd.reads
        ssd.read_bytes = 0
        assert await rig.get(depth, least=least) is not None
        assert ssd.reads - before == 1 and share - 0.02 < ssd.read_bytes / stored <= share
        await rig.close()


async def test_planes_that_take_more_than_usual_are_read_in_a_second_step() -> None:
    """Half of the layers is lossless: then the leading planes are most of the record."""
    rules = CodecRules(COMPACT, "nested", ((0, 0, "lossless"),))
    rig = await rig_with(rules, ssd=(ssd := FaultyTier(Tier.SSD, 4 << 20)))
    await rig.put_all(MANY)
    await rig.settle()
    depth = only_in(rig, Tier.SSD)[0]
    before = ssd.reads
    back = await rig.get(depth, least=COMPACT)
    assert back is not None and 0.01 < error(rig.raw(depth), back) < 0.12
    assert ssd.reads - before == 2
    await rig.settle()
    assert planes(rig, depth) == {Tier.HOST: 1, Tier.SSD: 7}
    await rig.close()


async def test_states_and_engine_pages_stay_exact() -> None:
    groups = (
        Group(layers=2, kv_heads=2, k_dim=16, v_dim=16),
        Group(kind="state", layers=1, kv_heads=2, page_bytes=512, page_dtype="bfloat16"),
    )
    spec = replace(small_spec(), groups=groups)
    rules = CodecRules(COMPACT, "compact")
    assert set(rules.codecs(spec, Shard.whole(spec, 0), "lossless")) == {INT4}
    assert set(rules.codecs(spec, Shard.whole(spec, 1), "lossless")) == {FAST}
    pages = Group(kind="opaque", layers=2, kv_heads=2, page_tokens=16, page_bytes=1024, page_dtype="bfloat16")
    opaque = replace(small_spec(), layout="opaque:test", groups=(pages,))
    assert set(rules.codecs(opaque, Shard.whole(opaque), "lossless")) == {FAST}
    assert set(CodecRules().codecs(opaque, Shard.whole(opaque), "dense")) == {DENSE}


def test_codecs_go_by_layer_of_the_model() -> None:
    groups = (Group(layers=2, kv_heads=2, k_dim=16, v_dim=16), Group(layers=3, kv_heads=2, k_dim=16, v_dim=16))
    spec = replace(small_spec(), groups=groups)
    rules = CodecRules(COMPACT, "compact", ((0, 0, "lossless"), (3, 9, "near")))
    assert rules.codecs(spec, Shard.whole(spec, 0), "raw") == (FAST, FAST, INT4, INT4)
    assert rules.codecs(spec, Shard.whole(spec, 1), "raw") == (INT4, INT4, INT8, INT8, INT8, INT8)


async def test_status_knows_what_codecs_made_of_each_tier() -> None:
    rig = await rig_with(CodecRules(NEAR, "near"), ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.put_all(MANY)
    await rig.settle()
    host, ssd = rig.store.stack.codec_use.of(Tier.HOST), rig.store.stack.codec_use.of(Tier.SSD)
    assert list(host) == list(ssd) == ["int8"] and not rig.store.stack.codec_use.of(Tier.REDIS)
    assert host["int8"].raw_bytes > ssd["int8"].raw_bytes > 0
    assert 1.5 < host["int8"].raw_bytes / host["int8"].stored_bytes < 2
    await rig.close()


async def test_seconds_of_codecs_leave_out_the_line_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread is had after a minute; a block decodes for two seconds."""

    class Line(YieldingPool):
        async def run(self, function: Callable[..., T], *args: object) -> T:
            clock.now += 60.0
            return await super().run(function, *args)

    def slow(*args: Any) -> Any:
        clock.now += 2.0
        return decoded(*args)

    decoded = promotion.decoded
    monkeypatch.setattr(promotion, "decoded", slow)
    system = fake_system(Line())
    clock = system.clock
    assert isinstance(clock, ManualClock)
    rig = Rig.make(system=system, ssd=FaultyTier(Tier.SSD, 4 << 20))
    await rig.store.start()
    await rig.put_all(MANY)
    await rig.settle()
    below = next(depth for depth in range(MANY) if rig.where(depth) == [Tier.HOST])
    rig.store.release((await rig.open([below])).id)
    await rig.settle()
    assert rig.store.counters["promotions"] == 1
    assert sum(use.decode_s for use in rig.store.stack.codec_use.of(Tier.HOST).values()) == pytest.approx(2.0)
    assert sum(use.encode_s for use in rig.store.stack.codec_use.of(Tier.HOST).values()) == 0.0
    await rig.close()
