"""Block keys: the chain against its definition, written a second time here."""

from __future__ import annotations

import struct
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import BadRequest
from kvstore.keys import Chain, ChainBuilder, Extra, block_key, chain, engine_chain, engine_key
from kvstore.spec import Group, ModelSpec

SPEC = ModelSpec("org/model", (Group(k_dim=8, v_dim=8),), block_tokens=4, group_blocks=2)
ENGINE = ModelSpec("org/model", (Group(k_dim=8, v_dim=8),), block_tokens=4, engine_hash="sha256_cbor")

Tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def defined_key(parent: bytes, tokens: list[int], extras: list[tuple[bytes, bytes]]) -> bytes:
    """DESIGN's sentence, word for word."""
    text = parent + b"".join(struct.pack("<I", t) for t in tokens) + struct.pack("<I", len(extras))
    for tag, value in sorted(extras):
        text += struct.pack("<I", len(tag)) + tag + struct.pack("<I", len(value)) + value
    return sha256(text).digest()[:16]


@given(Tokens)
def test_chain_is_the_defined_one(tokens: list[int]) -> None:
    made = chain(SPEC, tokens)
    assert len(made) == len(tokens) // 4
    parent = SPEC.root
    for depth, key in enumerate(made.keys):
        assert made.parent(depth) == parent
        parent = defined_key(parent, tokens[depth * 4 : depth * 4 + 4], [])
        assert key == parent
        assert key == block_key(made.parent(depth), tokens[depth * 4 : depth * 4 + 4])


@given(Tokens)
def test_arrays_of_any_integer_type_give_the_same_keys(tokens: list[int]) -> None:
    expected = chain(SPEC, tokens).keys
    wide = np.array(tokens, dtype=np.int64)
    assert chain(SPEC, wide).keys == expected
    assert chain(SPEC, wide.astype(np.uint32)).keys == expected
    assert chain(SPEC, wide.astype(">u4")).keys == expected
    assert chain(SPEC, np.repeat(wide, 2)[::2]).keys == expected
    assert chain(SPEC, tuple(tokens)).keys == expected


@given(Tokens, st.lists(st.integers(0, 9), max_size=8))
@settings(deadline=None)
def test_built_piecewise_equals_built_at_once(tokens: list[int], steps: list[int]) -> None:
    extras = [Extra("lora", b"a"), Extra("mm", b"image", 5)]
    builder = ChainBuilder(SPEC, extras)
    new: list[bytes] = []
    rest = list(tokens)
    for step in [*steps, len(tokens)]:
        new += builder.extend(rest[:step])
        del rest[:step]
    assert builder.chain.keys == new == chain(SPEC, tokens, extras).keys
    assert builder.tail_tokens == len(tokens) % 4


def test_extras_enter_where_they_begin_and_all_that_follows() -> None:
    tokens = list(range(12))
    plain = chain(SPEC, tokens)
    extras = [Extra("salt", b"s" * 40), Extra("lora", b"adapter"), Extra("mm", b"picture", 6)]
    made = chain(SPEC, tokens, extras)
    first = defined_key(SPEC.root, tokens[:4], [(b"salt", b"s" * 40), (b"lora", b"adapter")])
    second = defined_key(first, tokens[4:8], [(b"mm:2", b"picture")])
    assert made.keys == [first, second, defined_key(second, tokens[8:], [])]
    assert made.keys == chain(SPEC, tokens, reversed(extras)).keys
    late = chain(SPEC, tokens, [Extra("mm:2", b"picture", 6)])
    assert late.keys[0] == plain.keys[0] and late.keys[1] != plain.keys[1] and late.keys[2] != plain.keys[2]
    assert chain(SPEC, tokens, [Extra("mm", b"later", 12)]).keys == plain.keys  # begins in a block that is not full


def test_extras_can_not_be_shifted_into_one_another() -> None:
    pairs = [("ab", b"c"), ("a", b"bc"), ("abc", b""), ("a", b"b")]
    keys = {block_key(SPEC.root, [1, 2], [Extra(tag, value)]) for tag, value in pairs}
    assert len(keys) == len(pairs)


@pytest.mark.parametrize(
    "extras",
    [
        [Extra("lora", b"a"), Extra("lora", b"b")],
        [Extra("mm", b"a", 1), Extra("mm:1", b"b", 1)],
        [Extra("mm:3", b"a", 1)],
        [Extra("", b"a")],
        [Extra("x" * 256, b"a")],
        [Extra("\ud800", b"a")],
        [Extra("lora", b"a", -1)],
        [Extra("lora", "a")],  # type: ignore[arg-type]
        [Extra("lora", bytes((1 << 20) + 1))],
        [Extra(f"t{i}", b"") for i in range(5000)],
    ],
)
def test_bad_extras(extras: list[Extra]) -> None:
    with pytest.raises(BadRequest):
        chain(SPEC, [1, 2, 3, 4], extras)


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [1.5],
        ["1"],
        "1234",
        b"1234",
        np.array([-1]),
        np.array([2**32]),
        np.array([1.0]),
        np.zeros((2, 2), np.int64),
    ],
)
def test_bad_tokens(tokens: object) -> None:
    builder = ChainBuilder(SPEC)
    builder.extend([7])
    with pytest.raises(BadRequest):
        builder.extend(tokens)  # type: ignore[arg-type]
    assert builder.tail_tokens == 1
    with pytest.raises(BadRequest):
        block_key(SPEC.root, tokens)  # type: ignore[arg-type]


def test_groups_are_named_by_their_first_block() -> None:
    made = chain(SPEC, range(20))
    assert [made.group(i) for i in range(5)] == [made.keys[i] for i in (0, 0, 2, 2, 4)]
    assert made.root == SPEC.root == made.parent(0)


def test_engine_keys() -> None:
    hashes = [b"h" * 32, b"i" * 8]
    first = sha256(ENGINE.root + struct.pack("<I", 32) + hashes[0]).digest()[:16]
    second = sha256(first + struct.pack("<I", 8) + hashes[1]).digest()[:16]
    assert engine_chain(ENGINE, hashes).keys == [first, second]
    assert engine_key(first, hashes[1]) == second


def test_a_keyspace_is_of_tokens_or_of_engine_hashes() -> None:
    with pytest.raises(BadRequest):
        chain(ENGINE, [1, 2, 3, 4])
    with pytest.raises(BadRequest):
        engine_chain(SPEC, [b"h"])
    for bad in (b"", bytes(5000)):
        with pytest.raises(BadRequest):
            engine_key(SPEC.root, bad)
    with pytest.raises(BadRequest):
        engine_key(b"short", b"h")
    with pytest.raises(BadRequest):
        block_key(b"short", [1])


def test_another_spec_is_another_keyspace() -> None:
    other = ModelSpec("org/other", SPEC.groups, block_tokens=4)
    tokens = list(range(8))
    assert not set(chain(SPEC, tokens).keys) & set(chain(other, tokens).keys)


def test_empty_prompt_has_no_key() -> None:
    for empty in ([], np.empty(0, np.int64), (), range(0)):
        assert len(chain(SPEC, empty)) == 0
    assert Chain(SPEC).keys == []
