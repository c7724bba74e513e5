"""Logs and Redis records of the first version are kept for ever and read by every later one (tests/golden)."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from kvstore.catalog import Catalog
from kvstore.format import Record
from kvstore.header import Header
from kvstore.spec import ModelSpec, Shard
from kvstore.tiers.redis_index import RedisIndex, Space
from kvstore.tiers.redis_value import HMAC_SHA256, TRAILER_BYTES, seal, unseal
from tests.memdisk import Inode, MemoryDisk
from tests.ssd_helpers import get, memory_system, tier_over

GOLDEN = Path(__file__).parent / "golden"
FILES = ("00000001.data", "00000001.index")


def expected(medium: str) -> dict:  # type: ignore[type-arg]
    return json.loads((GOLDEN / medium / "expected.json").read_text())


def golden_disk() -> MemoryDisk:
    disk = MemoryDisk()
    for name in FILES:
        disk.inodes[name] = Inode(bytearray((GOLDEN / "ssd" / name).read_bytes()))
    return disk


async def test_the_golden_log_is_read() -> None:
    facts, catalog = expected("ssd"), Catalog()
    tier = tier_over(golden_disk(), 1 << 20, catalog=catalog)
    found = {item.header.depth: item for item in await tier.start()}
    kept = [record for record in facts["records"] if record["depth"] not in facts["freed"]]
    assert sorted(found) == [record["depth"] for record in kept]
    for record in kept:
        item = found[record["depth"]]
        data = await get(tier, item, item.location)
        Record.parse(data).verify()
        assert (item.header.key.hex(), sha256(data).hexdigest()) == (record["key"], record["sha256"])
        assert item.namespace == facts["namespace"]
    assert [spec.canonical_json() for spec in catalog.specs()] == [facts["spec"]]
    await tier.close()


async def test_the_same_writes_make_the_golden_log() -> None:
    """Today's writer under the same nonce writes the same bytes: a change of format shows here."""
    facts = expected("ssd")
    spec = ModelSpec.from_json(facts["spec"])
    catalog = Catalog()
    catalog.learn_spec(spec)
    catalog.learn_shard(Shard.whole(spec))
    data, disk = (GOLDEN / "ssd" / FILES[0]).read_bytes(), MemoryDisk()
    tier = tier_over(disk, 1 << 20, catalog=catalog, seed=facts["nonce_seed"])
    await tier.start()
    locations = []
    for record in facts["records"]:
        start = record["depth"] * 4096
        header = Header.unpack(data[start : start + 160])
        stored = data[start : start + header.stored_length]
        assert sha256(stored).hexdigest() == record["sha256"]
        locations.append((header, await tier.write(facts["namespace"], header, [stored])))
    await tier.flush()
    for depth in facts["freed"]:
        tier.free(facts["namespace"], *locations[depth])
    await tier.flush()
    for name in FILES:
        assert bytes(disk.inodes[name].content) == (GOLDEN / "ssd" / name).read_bytes(), name


def test_the_golden_redis_record() -> None:
    facts, folder = expected("redis"), GOLDEN / "redis"
    value, entry = (folder / "block.value").read_bytes(), (folder / "block.entry").read_bytes()
    header, secret = Header.unpack(entry), facts["secret"].encode()
    record = bytearray(len(value) - TRAILER_BYTES)
    unseal(value, header, secret, memoryview(record))
    assert sha256(record).hexdigest() == facts["record_sha256"]
    Record.parse(record).verify()
    made = bytearray(len(value))
    seal([record[:100], record[100:]], memoryview(made), secret, bytes(12), HMAC_SHA256)
    assert made == value
    assert header.pack() == entry


def test_the_golden_redis_names_and_words() -> None:
    facts, catalog = expected("redis"), Catalog()
    index = RedisIndex(memory_system(MemoryDisk()), catalog, lambda *commands: None)  # type: ignore[arg-type, return-value]
    space = Space.of(facts["namespace"])
    for digest, word in facts["words"].items():
        assert index._learn(bytes.fromhex(digest), word.encode()), "a later reader learns the words of the first writer"
    header = Header.unpack((GOLDEN / "redis" / "block.entry").read_bytes())
    assert (space.values + header.shard + header.key).hex() == facts["value_key"]
    assert space.key("index").decode() == facts["index_key"]
    fields = index.words(space, header)
    assert {fields[i].hex(): fields[i + 1] for i in range(0, len(fields), 2)} == facts["words"]  # type: ignore[union-attr]
