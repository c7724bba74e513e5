"""Golden vectors of keys, digests and the stored form: what was written once is read for ever.

A failure here means that caches, logs and peers of older builds can not be read: mend the code, not the vectors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore import codecs
from kvstore.checksum import xxh3
from kvstore.errors import Corrupt
from kvstore.format import Header, Record, decode_record, encode_record, expect
from kvstore.keys import chain, engine_chain
from kvstore.layout import chunks
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.types import Fidelity
from tests.golden.make import EXTRAS, RECORD_SHARD, SPECS, record_header, record_raw

FOLDER = Path(__file__).parent / "golden"
CORE: dict[str, Any] = json.loads((FOLDER / "core.json").read_text("utf-8"))
RAW = (FOLDER / "core_raw.bin").read_bytes()
CODECS = {"raw": codecs.RAW, "lz4": codecs.LZ4, "split": codecs.SPLIT}


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_json(CORE["specs"][name]["json"])


@pytest.mark.parametrize("name", CORE["specs"])
def test_specs(name: str) -> None:
    spec = spec_of(name)
    assert spec == SPECS[name]
    assert spec.canonical_json() == CORE["specs"][name]["json"]
    assert spec.root.hex() == CORE["specs"][name]["root"]


def test_shards_and_namespaces() -> None:
    for entry in CORE["shards"]:
        assert Shard(*entry["shard"]).digest.hex() == entry["digest"]
    assert {name: namespace_digest(name).hex() for name in CORE["namespaces"]} == CORE["namespaces"]


def test_keys() -> None:
    assert list(CORE["keys"]) == list(EXTRAS)
    for name, extras in EXTRAS.items():
        assert [k.hex() for k in chain(spec_of("plain"), CORE["tokens"], extras).keys] == CORE["keys"][name]
    assert [k.hex() for k in chain(spec_of("every_field"), CORE["tokens"]).keys] == CORE["keys_every_field"]
    hashes = [bytes.fromhex(h) for h in CORE["engine_hashes"]]
    assert [k.hex() for k in engine_chain(spec_of("engine"), hashes).keys] == CORE["engine_keys"]


@pytest.mark.parametrize("name", CORE["chunks"])
def test_layouts(name: str) -> None:
    spec = spec_of(name)
    made = [c for group in range(len(spec.groups)) for c in chunks(spec, Shard.whole(spec, group))]
    expected = CORE["chunks"][name]
    assert [[c.layer, c.component, c.head_first, c.head_count, c.offset, c.nbytes] for c in made] == expected


def test_header() -> None:
    packed = bytes.fromhex(CORE["header"])
    header = Header.unpack(packed)
    assert header == record_header() and header.pack() == packed
    assert header.key.hex() == CORE["keys"]["none"][1] and header.root.hex() == CORE["specs"]["plain"]["root"]
    assert (header.computed_on, header.stored, header.depth, header.tokens) == (Fidelity.NEAR, Fidelity.EXACT, 1, 64)


@pytest.mark.parametrize("name", CODECS)
def test_records_are_read(name: str) -> None:
    data = (FOLDER / f"core_record_{name}.bin").read_bytes()
    record = Record.parse(data)
    record.verify()
    expect(record.header, record_header())
    assert f"{record.header.copy_id:016x}" == f"{xxh3(RAW):016x}" == CORE["raw_xxh3"]
    assert CODECS[name] in record.table["codec"].tolist() and codecs.RAW in record.table["codec"].tolist()
    target = bytearray(len(RAW))
    decode_record(record, spec_of("plain"), RECORD_SHARD, memoryview(target))
    assert target == RAW == record_raw()
    damaged = bytearray(data)
    damaged[-1] ^= 1
    with pytest.raises(Corrupt):
        decode_record(Record.parse(damaged), spec_of("plain"), RECORD_SHARD, memoryview(target))


def test_raw_records_are_written_the_same() -> None:
    _, parts = encode_record(record_header(), RAW, spec_of("plain"), RECORD_SHARD, codecs.RAW)
    assert b"".join(parts) == (FOLDER / "core_record_raw.bin").read_bytes()


def test_vectors_are_never_overwritten() -> None:
    before = {path.name: path.read_bytes() for path in FOLDER.glob("core*")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.make"],
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "kept for ever" in done.stderr and done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in FOLDER.glob("core*")} == before
