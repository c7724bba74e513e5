"""Canonical and opaque layouts, and cutting one rectangle from another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import BadRequest
from kvstore.layout import LATENT, OPAQUE, STATE, K, V, block_bytes, chunks, cut, dtype_of
from kvstore.spec import DTYPES, Group, ModelSpec, Shard

SPEC = ModelSpec("m", (Group(layers=3, kv_heads=4, k_dim=5, v_dim=3),), block_tokens=2)
MIXED = ModelSpec(
    "m",
    (
        Group(layers=3, kv_heads=4, k_dim=2, v_dim=2),
        Group(kind="sliding", layers=2, kv_heads=2, k_dim=4, v_dim=4, window=8),
        Group(kind="latent", layers=2, k_dim=6),
        Group(kind="state", layers=2, kv_heads=4, page_bytes=16),
    ),
    dtype="float32",
    block_tokens=4,
)
PAGED = ModelSpec(
    "m",
    (Group(kind="opaque", layers=2, kv_heads=2, page_tokens=16, page_bytes=96, page_dtype="bfloat16"),),
    layout="opaque:vllm",
)


def payload(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def test_canonical_order() -> None:
    made = chunks(SPEC, Shard(0, 1, 2, 1, 2))
    assert [(c.layer, c.component) for c in made] == [(1, K), (1, V), (2, K), (2, V)]
    assert [c.shape for c in made] == [(2, 2, 5), (2, 2, 3)] * 2
    assert [c.nbytes for c in made] == [40, 24, 40, 24]
    assert [c.offset for c in made] == [0, 40, 64, 104]
    assert all((c.head_first, c.head_count, c.itemsize) == (1, 2, 2) for c in made)
    assert block_bytes(SPEC, Shard(0, 1, 2, 1, 2)) == 128


def test_other_components() -> None:
    latent = chunks(MIXED, Shard.whole(MIXED, 2))
    assert [(c.layer, c.component, c.shape, c.nbytes) for c in latent] == [
        (0, LATENT, (4, 1, 6), 96),
        (1, LATENT, (4, 1, 6), 96),
    ]
    state = chunks(MIXED, Shard(3, 1, 1, 2, 2))
    assert [(c.layer, c.component, c.shape, c.nbytes, c.itemsize) for c in state] == [(1, STATE, (2, 4), 8, 1)]


def test_opaque_order_is_layer_then_page() -> None:
    made = chunks(PAGED, Shard.whole(PAGED))
    assert [(c.layer, c.component, c.head_first) for c in made] == [(n, OPAQUE, p) for n in (0, 1) for p in range(4)]
    assert all((c.nbytes, c.itemsize) == (96, 2) for c in made)
    assert chunks(PAGED, Shard(0, 0, 1, 0, 1))[0].nbytes == 48


@pytest.mark.parametrize("group", range(4))
def test_chunks_tile_the_block(group: int) -> None:
    shard = Shard.whole(MIXED, group)
    end = 0
    for chunk in chunks(MIXED, shard):
        assert chunk.offset == end and chunk.nbytes > 0
        end += chunk.nbytes
    assert end == block_bytes(MIXED, shard) == MIXED.group_bytes(MIXED.groups[group])


def test_dtypes() -> None:
    for name, size in DTYPES.items():
        spec = ModelSpec("m", SPEC.groups, dtype=name)
        assert dtype_of(spec).itemsize == size
    assert dtype_of(ModelSpec("m", SPEC.groups, dtype="float32")) == np.float32


def as_array(spec: ModelSpec, shard: Shard, raw: bytes | bytearray) -> dict[tuple[int, int, int], bytes]:
    """(layer, component, head) -> its bytes over all tokens, read without layout.py."""
    group = spec.groups[shard.group]
    values: dict[tuple[int, int, int], bytes] = {}
    at = 0
    for layer in range(shard.layer_first, shard.layer_first + shard.layer_count):
        if group.kind == "state":
            dims = [(STATE, 1, group.page_bytes // group.kv_heads)]
        else:
            width = DTYPES[spec.dtype]
            pairs = [(LATENT, group.k_dim)] if group.kind == "latent" else [(K, group.k_dim), (V, group.v_dim)]
            dims = [(c, spec.block_tokens, d * width) for c, d in pairs]
        for component, tokens, size in dims:
            for head in range(shard.head_count):
                row = shard.head_count * size
                rows = [raw[at + t * row + head * size :][:size] for t in range(tokens)]
                values[layer, component, shard.head_first + head] = b"".join(rows)
            at += tokens * shard.head_count * size
    assert at == len(raw)
    return values


def rectangles(spec: ModelSpec, group: int) -> st.SearchStrategy[Shard]:
    def ranges(bound: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, bound - 1), st.integers(1, bound)).map(
            lambda p: (p[0], min(p[1], bound - p[0]))
        )

    g = spec.groups[group]
    return st.builds(lambda a, b: Shard(group, *a, *b), ranges(g.layers), ranges(g.kv_heads))


@given(st.data(), st.integers(0, 3))
@settings(deadline=None)
def test_cut_moves_exactly_what_both_hold(data: st.DataObject, group: int) -> None:
    source, wanted = data.draw(rectangles(MIXED, group)), data.draw(rectangles(MIXED, group))
    raw = payload(block_bytes(MIXED, source))
    before = payload(block_bytes(MIXED, wanted), 1)
    target = bytearray(before)
    copied = cut(MIXED, source, wanted, raw, memoryview(target))
    shared = source.overlap(wanted)
    assert copied == (block_bytes(MIXED, shared) if shared else 0)
    have, was = as_array(MIXED, source, raw), as_array(MIXED, wanted, before)
    assert as_array(MIXED, wanted, target) == {place: have.get(place, old) for place, old in was.items()}


def test_two_halves_make_the_whole() -> None:
    whole = Shard.whole(SPEC)
    raw = payload(block_bytes(SPEC, whole))
    target = bytearray(len(raw))
    for half in (Shard(0, 0, 3, 0, 2), Shard(0, 0, 3, 2, 2)):
        part = bytearray(block_bytes(SPEC, half))
        cut(SPEC, whole, half, raw, memoryview(part))
        cut(SPEC, half, whole, part, memoryview(target))
    assert target == raw


def test_opaque_is_served_to_an_equal_shard_only() -> None:
    whole, half = Shard.whole(PAGED), Shard(0, 0, 2, 0, 1)
    raw = payload(block_bytes(PAGED, whole))
    target = bytearray(len(raw))
    assert cut(PAGED, whole, whole, raw, memoryview(target)) == len(raw) and target == raw
    with pytest.raises(BadRequest):
        cut(PAGED, whole, half, raw, memoryview(bytearray(block_bytes(PAGED, half))))


def test_wrong_lengths_and_shards_are_refused() -> None:
    whole = Shard.whole(SPEC)
    size = block_bytes(SPEC, whole)
    for source, target in ((size - 1, size), (size, size + 1)):
        with pytest.raises(BadRequest):
            cut(SPEC, whole, whole, bytes(source), memoryview(bytearray(target)))
    with pytest.raises(BadRequest):
        chunks(SPEC, Shard(0, 0, 9, 0, 1))
