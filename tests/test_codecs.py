"""Lossless codecs and checksums: bit-exact on anything, Corrupt on anything broken, never more memory than said."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvstore import codecs
from kvstore.checksum import STEP_BYTES, copy_and_checksum, xxh3
from kvstore.codecs import DENSE, FAST, INT4, INT8, LZ4, NESTED, RAW, SPLIT, ZSTD, codec_for, decode, encode
from kvstore.errors import BadRequest, Corrupt, UnknownFormat

SPECIALS = {
    2: np.array([0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x8001, 0x3F80], "<u2"),
    4: np.array([0x7FC00000, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x80000001, 0x3F800000], "<u4"),
}


def gaussian(kind: str, count: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).normal(0, 0.3, count).astype(np.float32)
    if kind == "bfloat16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype(kind).tobytes()


def round_trip(codec: int, raw: bytes, itemsize: int) -> int:
    used, stored = encode(codec, memoryview(raw), itemsize)
    assert len(stored) <= len(raw) and used in (codec, RAW)
    target = bytearray(b"\xaa" * len(raw))
    decode(used, stored, memoryview(target), itemsize)
    assert target == raw
    return used


@given(st.binary(min_size=1, max_size=600), st.sampled_from([RAW, LZ4, SPLIT, ZSTD]), st.sampled_from([1, 2, 4, 8]))
def test_any_bytes_round_trip(raw: bytes, codec: int, itemsize: int) -> None:
    round_trip(codec, raw, itemsize)


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=64),
    st.integers(1, 2000),
    st.integers(0, 7),
    st.sampled_from([2, 4]),
    st.sampled_from([RAW, LZ4, SPLIT, ZSTD]),
)
@settings(deadline=None)
def test_special_values_round_trip_bit_exactly(
    picks: list[int], times: int, odd: int, itemsize: int, codec: int
) -> None:
    raw = np.tile(SPECIALS[itemsize][picks], times)[:20000].tobytes() + bytes(range(odd))
    round_trip(codec, raw, itemsize)


@pytest.mark.parametrize(("kind", "least"), [("bfloat16", 1.40), ("float16", 1.10), ("float32", 1.12)])
def test_split_gains_on_activations(kind: str, least: float) -> None:
    raw = gaussian(kind, 65536)
    used, stored = encode(SPLIT, memoryview(raw), 2 if kind != "float32" else 4)
    assert used == SPLIT and len(raw) / len(stored) > least


def test_noise_falls_back_to_raw_without_a_copy() -> None:
    raw = memoryview(np.random.default_rng(0).bytes(100_000))
    for codec in (LZ4, SPLIT, ZSTD):
        used, stored = encode(codec, raw, 2)
        assert used == RAW and stored is raw


def test_planes_without_gain_stay_raw() -> None:
    raw = gaussian("bfloat16", 65536)
    _, stored = encode(SPLIT, memoryview(raw), 2)
    (low, low_bytes), (high, high_bytes) = struct.iter_unpack("<BI", bytes(stored[:10]))
    assert (low, low_bytes, high) == (codecs.PLANE_RAW, 65536, codecs.PLANE_ZSTD)
    assert 10 + low_bytes + high_bytes == len(stored)
    assert bytes(stored[10 : 10 + low_bytes]) == raw[::2]


def test_unknown_codecs_and_names() -> None:
    with pytest.raises(BadRequest):
        encode(3, memoryview(b"x"), 1)
    with pytest.raises(UnknownFormat):
        decode(3, b"x", memoryview(bytearray(1)), 1)
    with pytest.raises(UnknownFormat):
        decode(SPLIT, bytes(100), memoryview(bytearray(1)), 3)
    with pytest.raises(BadRequest):
        codec_for("gzip", "bfloat16")
    assert [codec_for(n, "bfloat16") for n in ("raw", "lz4", "lossless", "dense")] == [RAW, LZ4, FAST, DENSE]
    assert [codec_for(n, "bfloat16") for n in ("near", "compact", "nested", "zstd")] == [INT8, INT4, NESTED, ZSTD]
    assert codec_for("dense", "float16") == codec_for("dense", "int8") == SPLIT
    assert [codec_for(n, "float16") for n in ("near", "compact", "nested")] == [FAST] * 3
    assert codec_for("lossless", "") == codec_for("lossless", "float64") == LZ4
    assert codec_for("lossless", "float32") == codec_for("lossless", "float8_e5m2") == FAST
    assert codec_for("lossless", "int8") == codec_for("lossless", "float8_e4m3fn") == SPLIT


@given(
    st.binary(max_size=300),
    st.sampled_from([RAW, LZ4, SPLIT, ZSTD]),
    st.sampled_from([1, 2, 4, 5]),
    st.integers(1, 400),
)
def test_garbage_never_decodes_to_another_error(stored: bytes, codec: int, itemsize: int, length: int) -> None:
    target = bytearray(length)
    try:
        decode(codec, stored, memoryview(target), itemsize)
    except (Corrupt, UnknownFormat):
        pass
    else:
        assert len(target) == length


@given(st.sampled_from([LZ4, SPLIT]), st.data())
@settings(deadline=None)
def test_damaged_streams_are_corrupt_or_decode_to_the_length(codec: int, data: st.DataObject) -> None:
    raw = gaussian("bfloat16", 400) if codec == SPLIT else bytes(800)
    used, encoded = encode(codec, memoryview(raw), 2)
    assert used == codec
    stored = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    del stored[data.draw(st.integers(1, len(stored))) :]
    target = bytearray(len(raw))
    try:
        decode(codec, stored, memoryview(target), 2)
    except (Corrupt, UnknownFormat):
        pass


def test_a_frame_that_claims_more_than_the_chunk_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    stored = struct.pack("<BI", codecs.PLANE_ZSTD, len(bomb)) + bomb
    with pytest.raises(Corrupt, match="another length"):
        decode(SPLIT, stored, memoryview(bytearray(1000)), 1)
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))
    with pytest.raises(Corrupt, match="another length"):
        decode(SPLIT, struct.pack("<BI", 1, len(endless)) + endless, memoryview(bytearray(1000)), 1)


def test_extra_bytes_after_a_chunk_are_corrupt() -> None:
    for codec, raw in ((LZ4, bytes(800)), (SPLIT, bytes(800)), (RAW, bytes(8))):
        used, stored = encode(codec, memoryview(raw), 2)
        with pytest.raises(Corrupt):
            decode(used, bytes(stored) + b"x", memoryview(bytearray(len(raw))), 2)


def test_many_threads_at_once() -> None:
    raws = [gaussian("bfloat16", 20_000 + i, i) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda raw: round_trip(SPLIT, raw, 2), raws * 4)) == {SPLIT}


@pytest.mark.parametrize("size", [0, 1, 1000, STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1, 3 * STEP_BYTES + 17])
def test_copy_and_checksum_in_one_pass(size: int) -> None:
    raw = np.random.default_rng(size).bytes(size)
    target = bytearray(size)
    assert copy_and_checksum(raw, memoryview(target)) == xxh3(raw) == xxh3_64_intdigest(raw)
    assert target == raw


def test_copy_and_checksum_refuses_what_it_can_not_copy() -> None:
    good = bytearray(8)
    for source, target in (
        (b"1234567", memoryview(good)),
        (b"12345678", memoryview(b"12345678")),
        (memoryview(bytes(16))[::2], memoryview(good)),
        (b"1234", memoryview(good)[::2]),
    ):
        with pytest.raises(BadRequest):
            copy_and_checksum(source, target)
