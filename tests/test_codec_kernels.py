"""The codecs made for KV: exact where they say so, near where they say so, the same bits from numba and from torch."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore.checksum import xxh3
from kvstore.client.targets import buffer_of
from kvstore.codecs import DENSE, FAST, INT4, INT8, KNOWN, NESTED, RAW, SPLIT, fidelity_of, general
from kvstore.codecs.batch import Backend, Coded, Plane, decode, encode
from kvstore.codecs.by_numba import Numba
from kvstore.codecs.by_torch import Torch
from kvstore.codecs.registry import CODECS, FORMS
from kvstore.errors import BadRequest, DataError
from kvstore.layout import Chunk, K, V
from kvstore.spec import DTYPES
from kvstore.types import Fidelity
from tests.golden import make_codecs

NUMBA, TORCH = Numba(), Torch()
BACKENDS = (NUMBA, TORCH)
KV_CODECS = (FAST, INT8, INT4, NESTED, DENSE)
NEAR_ERROR = {INT8: 0.012, INT4: 0.12, NESTED: 0.0}
SPECIALS = np.array([0x7FC0, 0xFFC1, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x8001, 0x3F80, 0x7F7F], np.uint16)


def piece(rows: int, columns: int, component: int = K, dtype: str = "bfloat16") -> Chunk:
    nbytes = rows * columns * DTYPES[dtype]
    return Chunk(0, component, 0, 1, 0, nbytes, (rows, 1, columns), DTYPES[dtype], dtype)


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits


def kv(rows: int, columns: int, seed: int = 0, component: int = K) -> bytes:
    """Normal values; of keys, some columns are far larger."""
    rng = np.random.default_rng(seed)
    scale = np.where(rng.random(columns) < 0.05, 20.0, 1.0) if component == K else 1.0
    return bf16(rng.standard_normal((rows, columns)) * scale).tobytes()


def floats(raw: bytes | bytearray) -> NDArray[np.float32]:
    values: NDArray[np.float32] = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values


def stored(codec: int, raw: bytes, chunk: Chunk, use: Backend = NUMBA) -> list[Plane]:
    [planes] = encode(memoryview(raw), [chunk], [codec], use)
    return planes


def restored(planes: list[Plane], chunk: Chunk, use: Backend = NUMBA) -> bytes:
    data = b"".join(bytes(plane.data) for plane in planes)
    spans, at = [], 0
    for plane in planes:
        spans.append((at, len(plane.data)))
        at += len(plane.data)
    target = bytearray(b"\xaa" * chunk.nbytes)
    decode(memoryview(data), [Coded(chunk, planes[0].codec, planes[0].params, tuple(spans))], memoryview(target), use)
    return bytes(target)


def exact(planes: list[Plane]) -> bool:
    return fidelity_of(planes[0].codec, len(planes)) == Fidelity.EXACT


def same_bytes(left: list[Plane], right: list[Plane]) -> bool:
    return [(p.codec, p.params, bytes(p.data)) for p in left] == [(p.codec, p.params, bytes(p.data)) for p in right]


SHAPES = [(64, 128), (64, 100), (63, 64), (1, 64), (2, 3), (65, 70), (200, 33), (256, 64), (127, 1)]


@pytest.mark.parametrize("codec", KV_CODECS)
@pytest.mark.parametrize("component", [K, V])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_kv_comes_back(codec: int, component: int, rows: int, columns: int) -> None:
    raw, chunk = kv(rows, columns, 0, component), piece(rows, columns, component)
    planes = stored(codec, raw, chunk)
    assert sum(len(plane.data) for plane in planes) <= chunk.nbytes
    back = restored(planes, chunk)
    if exact(planes):
        assert back == raw
    else:
        error = np.linalg.norm(floats(back) - floats(raw)) / np.linalg.norm(floats(raw))
        assert error <= NEAR_ERROR[planes[0].codec]


@pytest.mark.parametrize("codec", KV_CODECS)
@pytest.mark.parametrize("component", [K, V])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_torch_makes_the_same_bytes(codec: int, component: int, rows: int, columns: int) -> None:
    raw, chunk = kv(rows, columns, rows, component), piece(rows, columns, component)
    planes = stored(codec, raw, chunk)
    assert same_bytes(planes, stored(codec, raw, chunk, TORCH))
    for count in range(1, len(planes) + 1):
        assert restored(planes[:count], chunk) == restored(planes[:count], chunk, TORCH)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_torch_makes_the_same_bytes_on_any_device(device: str) -> None:
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    use = Torch(device)
    for codec, component, (rows, columns) in product(KV_CODECS, (K, V), ((64, 128), (65, 70), (1, 64))):
        raw, chunk = kv(rows, columns, 7, component), piece(rows, columns, component)
        planes = stored(codec, raw, chunk)
        assert same_bytes(planes, stored(codec, raw, chunk, use))
        for count in range(1, len(planes) + 1):
            assert restored(planes[:count], chunk) == restored(planes[:count], chunk, use)


words = st.one_of(
    st.integers(0, 0xFFFF), st.sampled_from([int(word) for word in SPECIALS]), st.integers(0x3E00, 0x3FFF)
)


@given(st.integers(1, 70), st.integers(1, 9), st.lists(words, min_size=1, max_size=40), st.sampled_from([K, V]))
@settings(deadline=None, max_examples=150)
def test_any_bits_are_exact_or_within_what_was_promised(
    rows: int, columns: int, some: list[int], component: int
) -> None:
    """NaN, infinities, -0, denormals, random bits, any shape: by both backends, alike."""
    raw = np.resize(np.array(some, np.uint16), rows * columns).tobytes()
    chunk = piece(rows, columns, component)
    for codec in KV_CODECS:
        planes = stored(codec, raw, chunk)
        assert same_bytes(planes, stored(codec, raw, chunk, TORCH))
        back = restored(planes, chunk)
        assert back == restored(planes, chunk, TORCH)
        if exact(planes):
            assert back == raw
        else:
            assert np.isfinite(floats(raw)).all() and np.isfinite(floats(back)).all()


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (65, 33), (7, 200), (300, 250)])
def test_every_form_of_the_fast_codec(dtype: str, rows: int, columns: int) -> None:
    import torch

    values = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32))
    raw = values.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()
    chunk = piece(rows, columns, K, dtype)
    planes = stored(FAST, raw, chunk)
    assert restored(planes, chunk) == raw == restored(planes, chunk, TORCH)
    assert same_bytes(planes, stored(FAST, raw, chunk, TORCH))
    assert rows < 64 or planes[0].codec == FAST


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 200), (3, 5), (64, 33), (200, 7)])
def test_special_values_of_every_form_come_back(dtype: str, rows: int, columns: int) -> None:
    """NaN with and without payload, infinities, both zeros, denormals, the largest: alone, and among others."""
    import torch

    itemsize, exponent_bits, mantissa_bits, _ = FORMS[dtype]
    exponents, mantissas = ((1 << exponent_bits) - 1) << mantissa_bits, (1 << mantissa_bits) - 1
    sign = 1 << (exponent_bits + mantissa_bits)
    specials = [0, 1, mantissas, exponents, exponents | 1, exponents | mantissas, exponents - 1, 1 << mantissa_bits]
    words = np.array([*specials, *(sign | word for word in specials)], f"<u{itemsize}")
    normal = torch.from_numpy(np.random.default_rng(3).standard_normal(rows * columns).astype(np.float32))
    mixed = normal.to(getattr(torch, dtype)).view(torch.uint8).numpy().view(f"<u{itemsize}").copy()
    mixed[::37] = np.resize(words, len(mixed[::37]))
    for raw in (np.resize(words, rows * columns).tobytes(), mixed.tobytes()):
        chunk = piece(rows, columns, K, dtype)
        for codec in (FAST, DENSE, NESTED, INT8):
            planes = stored(codec, raw, chunk)
            assert same_bytes(planes, stored(codec, raw, chunk, TORCH))
            if exact(planes):
                assert restored(planes, chunk) == raw == restored(planes, chunk, TORCH)
            else:
                assert dtype == "bfloat16" and codec == INT8 and np.isfinite(floats(raw)).all()


def test_escapes_are_listed_and_too_many_are_refused() -> None:
    values = np.random.default_rng(1).standard_normal((64, 2048)).astype(np.float32)  # more than one span
    values[::9, ::50] = 1e-30
    raw, chunk = bf16(values).tobytes(), piece(64, 2048)
    [plane] = planes = stored(FAST, raw, chunk)
    assert plane.codec == FAST and len(plane.data) >= 2048 + 64 * 2048 * 3 // 2 + 8 + 4 * 8 * 41
    assert restored(planes, chunk) == raw
    values[::2, ::2] = 1e-30
    assert stored(FAST, bf16(values).tobytes(), chunk)[0].codec == SPLIT  # its first fallback


def test_random_bits_stay_raw() -> None:
    raw = np.random.default_rng(2).integers(0, 256, 64 * 128 * 2, np.uint8).tobytes()
    for codec in KV_CODECS:
        [plane] = stored(codec, raw, piece(64, 128))
        assert plane.codec == RAW and bytes(plane.data) == raw


@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC1, 0x7E80, 0xFE80])
@pytest.mark.parametrize("codec", [INT8, INT4, NESTED])
@pytest.mark.parametrize("component", [K, V])
def test_what_has_no_range_is_kept_exactly(word: int, codec: int, component: int) -> None:
    bits = np.frombuffer(kv(64, 64, 0, component), np.uint16).copy()
    assert stored(codec, bits.tobytes(), piece(64, 64, component))[0].codec == codec
    bits[77] = word
    planes = stored(codec, bits.tobytes(), piece(64, 64, component))
    assert planes[0].codec == FAST and restored(planes, piece(64, 64, component)) == bits.tobytes()


def test_planes_of_a_nested_chunk_are_worth_more_and_more() -> None:
    for component in (K, V):
        raw, chunk = kv(64, 128, 0, component), piece(64, 128, component)
        planes = stored(NESTED, raw, chunk)
        assert [plane.codec for plane in planes] == [NESTED] * 3
        errors = [
            np.linalg.norm(floats(restored(planes[:count], chunk)) - floats(raw)) / np.linalg.norm(floats(raw))
            for count in (1, 2, 3)
        ]
        assert 0.03 < errors[0] < 0.12 and 0.001 < errors[1] < 0.008 and errors[2] == 0
        assert len(planes[0].data) * 3.5 < chunk.nbytes
        assert sum(len(plane.data) for plane in planes) * 1.2 < chunk.nbytes


def test_dense_is_fast_with_its_codes_compressed() -> None:
    raw, chunk = kv(64, 128), piece(64, 128)
    [fast], [dense] = stored(FAST, raw, chunk), stored(DENSE, raw, chunk)
    assert dense.codec == DENSE and dense.params == fast.params
    front = 128 + 64 * 128
    assert bytes(dense.data)[:front] == bytes(fast.data)[:front]
    assert len(dense.data) < 0.72 * chunk.nbytes < len(fast.data)


class WrongBack(Numba):
    """A decoder with a fault: what it gives back has one wrong bit."""

    def nested_decode(self, *arguments: Any) -> Any:
        results = super().nested_decode(*arguments)
        arguments[1][100] ^= 1
        return results


def test_what_does_not_read_back_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the verification of dense, split and nested: another codec takes the chunk."""
    raw, chunk = kv(64, 128), piece(64, 128)
    assert [plane.codec for plane in stored(NESTED, raw, chunk)] == [NESTED] * 3
    assert stored(NESTED, raw, chunk, WrongBack())[0].codec == FAST

    class WrongFrames:
        def compress(self, data: Any) -> bytes:
            altered = bytearray(data)
            altered[-1] ^= 1
            return zstandard.ZstdCompressor().compress(altered)

    assert (stored(DENSE, raw, chunk)[0].codec, stored(SPLIT, raw, chunk)[0].codec) == (DENSE, SPLIT)
    monkeypatch.setattr(general, "_compressor", WrongFrames)
    assert stored(DENSE, raw, chunk)[0].codec == FAST
    assert stored(SPLIT, raw, chunk)[0].codec == RAW
    assert stored(NESTED, raw, chunk)[0].codec == FAST, "its rest is too large without an entropy stage"


def test_other_element_types_are_never_made_lossy() -> None:
    raw = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16).tobytes()
    for codec in (INT8, INT4, NESTED, DENSE):
        planes = stored(codec, raw, piece(64, 64, K, "float16"))
        assert exact(planes) and restored(planes, piece(64, 64, K, "float16")) == raw


def test_what_is_not_contiguous_is_refused_at_put_and_any_contiguous_form_is_taken() -> None:
    import torch

    values = torch.randn(4, 6, dtype=torch.bfloat16)
    array = np.arange(24, dtype=np.uint16).reshape(4, 6)
    for good in (values, values[1:3], array, array[2:], memoryview(array).cast("B"), bytes(48)):
        size = good.nbytes if not isinstance(good, bytes) else len(good)
        assert buffer_of(good).nbytes == size
    assert bytes(buffer_of(values)) == values.view(torch.uint8).numpy().tobytes()
    for bad in (values.T, values[:, ::2], array.T, array[:, 1:], memoryview(bytes(48))[::2], np.asfortranarray(array)):
        with pytest.raises(BadRequest, match="contiguous"):
            buffer_of(bad)


def test_many_chunks_of_many_codecs_in_one_call() -> None:
    shapes, wanted = [(64, 128), (64, 64), (64, 128), (1, 64), (64, 96)], [FAST, INT8, NESTED, INT4, RAW]
    pieces, raws, at = [], [], 0
    for rows, columns in shapes:
        part = kv(rows, columns, columns)
        pieces.append(Chunk(0, V, 0, 1, at, len(part), (rows, 1, columns), 2, "bfloat16"))
        raws.append(part)
        at += len(part)
    raw = b"".join(raws)
    made = encode(memoryview(raw), pieces, wanted)
    data, coded = bytearray(), []
    for chunk, planes in zip(pieces, made, strict=True):
        spans = []
        for plane in planes:
            spans.append((len(data), len(plane.data)))
            data += plane.data
        coded.append(Coded(chunk, planes[0].codec, planes[0].params, tuple(spans)))
    target = bytearray(len(raw))
    decode(memoryview(bytes(data)), coded, memoryview(target))
    for chunk, planes in zip(pieces, made, strict=True):
        mine = slice(chunk.offset, chunk.offset + chunk.nbytes)
        alone = Chunk(0, V, 0, 1, 0, chunk.nbytes, chunk.shape, 2, "bfloat16")
        assert target[mine] == restored(planes, alone)


@given(st.binary(max_size=400), st.sampled_from(KV_CODECS), st.integers(0, 2**16), st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=150)
def test_garbage_is_a_data_error_and_never_written_beyond_its_place(
    data: bytes, codec: int, params: int, count: int, by_torch: bool
) -> None:
    chunk = Chunk(0, K, 0, 1, 8, 128, (8, 1, 8), 2, "bfloat16")
    guard = bytearray(b"\x55" * 144)
    count = min(count, CODECS[codec].planes)
    step = len(data) // count
    spans = tuple((index * step, step) for index in range(count))
    try:
        decode(memoryview(data), [Coded(chunk, codec, params, spans)], memoryview(guard), BACKENDS[by_torch])
    except DataError:
        pass
    assert guard[:8] == guard[136:] == b"\x55" * 8


GOLDEN = [
    (vector, case)
    for name, cases in make_codecs.cases().items()
    for vector, case in zip(json.loads((Path(__file__).parent / "golden" / name).read_text()), cases, strict=True)
]


@pytest.mark.parametrize("backend", BACKENDS, ids=["numba", "torch"])
def test_golden_vectors_are_read_and_made_for_ever(backend: Backend) -> None:
    made: dict[tuple[str, int, int], bytes] = {}
    for vector, (dtype, component, codec) in GOLDEN:
        chunk, raw = make_codecs.chunk_of(dtype, component), make_codecs.raw_of(dtype)
        assert (vector["dtype"], vector["component"], vector["codec"]) == (dtype, component, codec)
        planes = [Plane(codec, vector["params"], bytes.fromhex(data)) for data in vector["planes"]]
        back = restored(planes, chunk, backend)
        made[dtype, component, codec] = back
        if exact(planes):
            assert back == raw
        fresh = stored(codec, raw, chunk, backend)
        assert [(plane.codec, plane.params) for plane in fresh] == [(codec, vector["params"])] * len(planes)
        if codec in (FAST, INT8, INT4, NESTED):  # what entropy coders make is theirs; that it is read is ours
            assert [bytes(plane.data) for plane in fresh[:2]] == [plane.data for plane in planes[:2]]
    assert {codec for _, _, codec in made} == set(KNOWN)
    values = {codec: xxh3(made["bfloat16", K, codec]) for codec in (INT8, INT4)}
    assert values == {INT8: 0xD2B96720EAA01C94, INT4: 0x3DEC665A74FDE067}, "lossy codecs decode to other values"
