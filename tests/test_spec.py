"""Specs, shards and namespaces: one canonical form, one digest, bounds on everything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.catalog import Catalog
from kvstore.errors import BadRequest, Overloaded
from kvstore.spec import DTYPES, Group, ModelSpec, Shard, dump, namespace_digest

FULL = Group(layers=4, kv_heads=8, k_dim=64, v_dim=64)
SPEC = ModelSpec("org/model", (FULL,))
OPAQUE = Group(kind="opaque", layers=2, kv_heads=2, page_tokens=16, page_bytes=4096, page_dtype="bfloat16")


def texts(max_size: int = 20) -> st.SearchStrategy[str]:
    return st.text(st.characters(blacklist_categories=("Cs",)), max_size=max_size)


def groups() -> st.SearchStrategy[Group]:
    small = st.integers(1, 64)
    return st.one_of(
        st.builds(Group, layers=small, kv_heads=small, k_dim=small, v_dim=small),
        st.builds(Group, kind=st.just("sliding"), layers=small, kv_heads=small, k_dim=small, v_dim=small, window=small),
        st.builds(Group, kind=st.just("latent"), layers=small, k_dim=small),
        st.builds(
            Group, kind=st.just("state"), layers=small, page_bytes=small, page_dtype=st.sampled_from(["", "float32"])
        ),
    )


def specs() -> st.SearchStrategy[ModelSpec]:
    return st.builds(
        ModelSpec,
        model=texts().filter(bool),
        groups=st.lists(groups(), min_size=1, max_size=4).map(tuple),
        revision=texts(),
        dtype=st.sampled_from(sorted(DTYPES)),
        rope=texts(),
        numerics=texts(),
        block_tokens=st.integers(1, 128),
        group_blocks=st.integers(1, 64),
        engine_hash=texts(),
    )


@given(specs())
@settings(deadline=None)
def test_canonical_json_round_trips(spec: ModelSpec) -> None:
    text = spec.canonical_json()
    assert ModelSpec.from_json(text) == spec
    assert ModelSpec.from_json(text.encode()).root == spec.root
    assert spec.root == sha256(b"kvstore/1\0" + text.encode()).digest()[:16]


@given(specs())
@settings(deadline=None)
def test_canonical_json_is_sorted_and_tight(spec: ModelSpec) -> None:
    text = spec.canonical_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def test_defaults_are_left_out_everywhere() -> None:
    assert SPEC.canonical_json() == '{"groups":[{"k_dim":64,"kv_heads":8,"layers":4,"v_dim":64}],"model":"org/model"}'
    named = ModelSpec("org/model", (FULL,), dtype="bfloat16", block_tokens=64, layout="canonical")
    assert named.root == SPEC.root


def test_text_is_utf8_and_not_escaped() -> None:
    assert '"model":"модель/é"' in ModelSpec("модель/é", (FULL,)).canonical_json()


def test_order_and_spaces_of_parsed_text_do_not_matter() -> None:
    text = '{ "model": "org/model", "groups": [ {"v_dim": 64, "layers": 4, "kv_heads": 8, "k_dim": 64, "window": 0} ] }'
    assert ModelSpec.from_json(text).root == SPEC.root


def test_a_new_defaulted_field_changes_no_digest() -> None:
    @dataclass(frozen=True)
    class LaterGroup(Group):
        sinks: int = 0
        notes: tuple[int, ...] = field(default_factory=tuple)

    @dataclass(frozen=True)
    class LaterSpec(ModelSpec):
        quantisation: str = ""

    def arguments(of: Any) -> dict[str, Any]:
        return {f.name: getattr(of, f.name) for f in fields(of) if f.init}

    later = LaterSpec(**{**arguments(SPEC), "groups": (LaterGroup(**arguments(FULL)),)})
    assert dump(later) == SPEC.canonical_json()
    assert later.root == SPEC.root
    assert replace(later, quantisation="int8").root != SPEC.root
    assert replace(later, groups=(LaterGroup(**arguments(FULL), sinks=4),)).root != SPEC.root


def test_every_field_is_in_the_digest() -> None:
    others = [
        replace(SPEC, model="org/other"),
        replace(SPEC, revision="a"),
        replace(SPEC, dtype="float16"),
        replace(SPEC, rope="yarn"),
        replace(SPEC, numerics="sdpa"),
        replace(SPEC, block_tokens=32),
        replace(SPEC, group_blocks=16),
        replace(SPEC, engine_hash="sha256"),
        replace(SPEC, groups=(FULL, FULL)),
        replace(SPEC, groups=(replace(FULL, layers=5),)),
        replace(SPEC, groups=(replace(FULL, kind="sliding", window=128),)),
        ModelSpec("org/model", (OPAQUE,), layout="opaque:vllm"),
        ModelSpec("org/model", (OPAQUE,), layout="opaque:sglang"),
    ]
    assert len({spec.root for spec in [SPEC, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "half"},
        {"layers": 0},
        {"layers": 5000},
        {"layers": True},
        {"layers": 1.0},
        {"kv_heads": 0},
        {"k_dim": 0},
        {"v_dim": 0},
        {"v_dim": -1},
        {"window": 64},
        {"page_tokens": 16},
        {"page_bytes": 16},
        {"page_dtype": "bfloat16"},
        {"kind": "sliding"},
        {"kind": "latent"},
        {"kind": "latent", "v_dim": 0},
        {"kind": "state", "k_dim": 0, "v_dim": 0},
        {"kind": "state", "k_dim": 0, "v_dim": 0, "page_bytes": 9},
        {"kind": "opaque", "k_dim": 0, "v_dim": 0, "page_bytes": 64},
        {"kind": "opaque", "k_dim": 0, "v_dim": 0, "page_tokens": 16, "page_bytes": 64, "page_dtype": "bf16"},
    ],
)
def test_group_bounds(bad: dict[str, Any]) -> None:
    good = {"layers": 4, "kv_heads": 8, "k_dim": 64, "v_dim": 64}
    Group(**good)
    with pytest.raises(BadRequest) as caught:
        Group(**{**good, **bad})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"model": ""},
        {"model": "x" * 2000},
        {"model": "\ud800"},
        {"model": 7},
        {"revision": None},
        {"dtype": "bf16"},
        {"layout": ""},
        {"layout": "opaque:"},
        {"layout": "opaque:vllm"},
        {"groups": ()},
        {"groups": [FULL]},
        {"groups": (FULL,) * 65},
        {"groups": (OPAQUE,)},
        {"groups": (OPAQUE, FULL), "layout": "opaque:vllm"},
        {"groups": (OPAQUE,), "layout": "opaque:vllm", "block_tokens": 24},
        {"groups": (replace(FULL, layers=4096, k_dim=65536),)},
        {"block_tokens": 0},
        {"block_tokens": 1 << 16},
        {"group_blocks": 0},
    ],
)
def test_spec_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        ModelSpec(**{"model": "m", "groups": (FULL,), **bad})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"model":"m"}',
        '{"groups":[{}]}',
        '{"model":"m","groups":{}}',
        '{"model":"m","groups":[1]}',
        '{"model":"m","groups":[{"k_dim":1,"v_dim":1,"colour":2}]}',
        '{"model":"m","groups":[{"k_dim":1,"v_dim":1}],"colour":2}',
        '{"model":"m","groups":[{"k_dim":1,"v_dim":1}],"_root":""}',
        '{"model":"m","model":"n","groups":[{"k_dim":1,"v_dim":1}]}',
        '{"model":"m","groups":[{"k_dim":1e2,"v_dim":1}]}',
        '{"model":"m","groups":[{"k_dim":' + "9" * 5000 + ',"v_dim":1}]}',
        '{"model":"m","groups":[{"kind":["full"],"k_dim":1,"v_dim":1}]}',
        '{"model":"m","dtype":[],"groups":[{"k_dim":1,"v_dim":1}]}',
        '{"model":"m","rope":{},"groups":[{"k_dim":1,"v_dim":1}]}',
        '{"model":"m","groups":[{"k_dim":1,"v_dim":1,"page_dtype":false}]}',
        '{"model":"m","groups":[{"kind":"state","page_bytes":1,"page_dtype":[1]}]}',
        '{"model":"m","groups":[{"k_dim":1,"v_dim":1,"window":false}]}',
        "[" * 60000,
        " " * 70000,
        b"\xff\xfe{",
    ],
)
def test_bad_json_is_a_bad_request(text: str | bytes) -> None:
    with pytest.raises(BadRequest):
        ModelSpec.from_json(text)


@given(st.binary(max_size=200))
def test_random_bytes_as_json_are_a_bad_request(data: bytes) -> None:
    with pytest.raises(BadRequest):
        ModelSpec.from_json(data)


def test_shard_rectangles() -> None:
    whole = Shard.whole(SPEC)
    assert whole == Shard(0, 0, 4, 0, 8)
    left, right = Shard(0, 0, 4, 0, 4), Shard(0, 0, 4, 4, 4)
    assert whole.contains(left) and whole.contains(whole) and not left.contains(whole)
    assert left.overlap(right) is None and whole.overlap(right) == right
    assert Shard(0, 0, 2, 0, 8).overlap(Shard(0, 1, 3, 4, 4)) == Shard(0, 1, 1, 4, 4)
    assert not Shard(1, 0, 4, 0, 8).contains(left) and Shard(1, 0, 4, 0, 8).overlap(left) is None
    assert left.digest != right.digest and len(left.digest) == 16
    assert left.digest == sha256(b'{"head_count":4,"layer_count":4}').digest()[:16]


@pytest.mark.parametrize(
    "shard",
    [Shard(), Shard(1, 0, 1, 0, 1), Shard(0, 0, 5, 0, 8), Shard(0, 4, 1, 0, 8), Shard(0, 0, 4, 8, 1), Shard(0, 0, 4)],
)
def test_shards_outside_the_spec_are_refused(shard: Shard) -> None:
    with pytest.raises(BadRequest):
        shard.check(SPEC)


def test_shards_out_of_any_bound_are_refused() -> None:
    for bad in ({"group": 64}, {"layer_first": -1}, {"head_count": 1 << 20}, {"layer_count": "1"}):
        with pytest.raises(BadRequest):
            Shard(**bad)  # type: ignore[arg-type]
    with pytest.raises(BadRequest):
        Shard.whole(SPEC, 1)


def test_namespace_digest_is_its_own_domain() -> None:
    assert namespace_digest("default") == sha256(b"namespace\0default").digest()[:16]
    for bad in ("", "x" * 2000):
        with pytest.raises(BadRequest):
            namespace_digest(bad)


def test_catalog_learns_and_is_bounded() -> None:
    catalog = Catalog(specs_max=1, shards_max=1, namespaces_max=1)
    assert catalog.spec(SPEC.root) is None
    assert catalog.spec(catalog.learn_spec(SPEC)) == SPEC
    assert catalog.spec(catalog.learn_spec(SPEC)) == SPEC  # again: no second entry
    shard = Shard.whole(SPEC)
    assert catalog.shard(catalog.learn_shard(shard)) == shard
    assert catalog.namespace(catalog.learn_namespace("default")) == "default"
    with pytest.raises(Overloaded):
        catalog.learn_spec(replace(SPEC, model="n"))
    with pytest.raises(Overloaded):
        catalog.learn_shard(Shard(0, 0, 1, 0, 1))
    with pytest.raises(Overloaded):
        catalog.learn_namespace("other")
    assert (catalog.specs(), catalog.shards(), catalog.namespaces()) == ([SPEC], [shard], ["default"])
    assert catalog.shard(bytes(16)) is None and catalog.namespace(bytes(16)) is None
