"""Prefill with KV reuse through a dictionary: conversion, reuse, equality with a run without it, refusals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvstore.client.hinting import NO_HINT  # noqa: E402
from kvstore.client.kv_client import GetResult  # noqa: E402
from kvstore.client.plan import HitPlan  # noqa: E402
from kvstore.client.put_blocks import PutResult  # noqa: E402
from kvstore.demo.model import TINY, demo_spec, make_model, weights_digest  # noqa: E402
from kvstore.demo.replica import greedy  # noqa: E402
from kvstore.demo.watch import Watched, Zeroed  # noqa: E402
from kvstore.errors import UsageError  # noqa: E402
from kvstore.integrations.transformers import (  # noqa: E402
    BlockClient,
    Prefilled,
    blocks_from_cache,
    cache_from_blocks,
    prefill,
    spec_for,
    tell,
)
from kvstore.keys import Chain  # noqa: E402
from kvstore.layout import block_bytes, chunks  # noqa: E402
from kvstore.policies.usage import Hint, Use  # noqa: E402
from kvstore.spec import ModelSpec, Shard  # noqa: E402
from kvstore.types import CommitToken, Tier  # noqa: E402


class DictClient:
    """The face of `KVClient` over a dictionary. `serve`: at most so many blocks are delivered of what matched."""

    def __init__(self, serve: int = 1 << 30) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.serve = serve
        self.matched: list[int] = []
        self.after: list[CommitToken] = []
        self.counters: dict[str, int] = {}

    async def match(self, spec: ModelSpec, prefix: Chain, *, after: Iterable[CommitToken] = ()) -> HitPlan:
        self.after += after
        count = next((i for i, key in enumerate(prefix.keys) if key not in self.blocks), len(prefix.keys))
        self.matched.append(count)
        return HitPlan(spec, tuple(prefix.keys[:count]), (Shard.whole(spec),))

    async def get(self, plan: HitPlan) -> GetResult:
        row = [np.frombuffer(self.blocks[key], np.uint8).copy() for key in plan.keys]
        count = min(self.serve, len(row))
        tiers: list[Tier | None] = [Tier.HOT if i % 2 else Tier.SSD for i in range(count)]
        return GetResult(count, [row], [tiers + [None] * (len(row) - count)], sum(len(b) for b in row[:count]))

    async def put(self, spec: ModelSpec, prefix: Chain, blocks: Sequence[Any], first: int = 0) -> PutResult:
        states = []
        for key, block in zip(prefix.keys[first:], blocks, strict=True):
            states.append("held" if key in self.blocks else "committed")
            self.blocks.setdefault(key, bytes(block))
        return PutResult([CommitToken("w", 1, len(self.blocks))], states)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return make_model(TINY)


@pytest.fixture(scope="module")
def spec(model: Any) -> ModelSpec:
    return demo_spec(model, 1)


def prompt(tokens: int, seed: int = 3) -> Any:
    return torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


async def answered(
    model: Any, ids: Any, client: BlockClient | None, spec: ModelSpec
) -> tuple[Prefilled, list[int], Any]:
    made = await prefill(model, ids, client, spec=spec)
    tokens, logits = greedy(model, made, 8)
    return made, tokens, logits


async def test_a_loaded_prefix_gives_the_same_tokens_and_logits(model: Any, spec: ModelSpec) -> None:
    client, ids = DictClient(), prompt(300)
    first = await prefill(model, ids, client, spec=spec)
    assert (first.stats.matched_tokens, first.stats.loaded_tokens) == (0, 0)
    assert first.stats.put_states == {"committed": 4}
    longer = torch.cat([ids, prompt(90, 4)], 1)
    _, plain_tokens, plain = await answered(model, longer, None, spec)
    made, tokens, logits = await answered(model, longer, client, spec)
    assert made.stats.loaded_tokens == 256
    assert made.stats.tokens_by_tier == {Tier.HOT: 128, Tier.SSD: 128}
    assert made.stats.put_states == {"committed": 2}
    assert made.stats.commits == (CommitToken("w", 1, 6),)
    assert made.past_key_values.get_seq_length() == 390 + 7
    assert tokens == plain_tokens
    assert float((logits - plain).abs().max()) <= 1e-4


async def test_zeroed_blocks_change_the_output_and_store_nothing(model: Any, spec: ModelSpec) -> None:
    client, ids = DictClient(), prompt(200)
    await prefill(model, ids, client, spec=spec)
    held = dict(client.blocks)
    longer = torch.cat([ids, prompt(70, 5)], 1)
    _, plain_tokens, plain = await answered(model, longer, None, spec)
    made, tokens, logits = await answered(model, longer, Zeroed(client), spec)
    assert made.stats.loaded_tokens == 192
    assert float((logits - plain)[0].abs().max()) > 1e-2
    assert tokens != plain_tokens
    assert client.blocks == held


async def test_bytes_that_come_back_are_those_stored(model: Any, spec: ModelSpec) -> None:
    client = DictClient()
    writer, reader = Watched(client), Watched(client)
    await prefill(model, prompt(300), writer, spec=spec)
    await prefill(model, prompt(300), reader, spec=spec)
    assert writer.loaded() == {}
    assert len(writer.stored()) == 4
    assert reader.loaded() == writer.stored()
    again = Watched(client)
    client.serve = 1
    await prefill(model, prompt(300), again, spec=spec)
    assert len(again.loaded()) == 1
    assert again.stored() == {}, "what is held already was not stored by this one"


@pytest.mark.parametrize(("tokens", "loaded"), [(1, 0), (63, 0), (64, 0), (65, 64), (128, 64), (129, 128)])
async def test_the_last_token_is_always_computed(model: Any, spec: ModelSpec, tokens: int, loaded: int) -> None:
    client = DictClient()
    once = await prefill(model, prompt(tokens), client, spec=spec)
    twice = await prefill(model, prompt(tokens), client, spec=spec)
    assert twice.stats.loaded_tokens == loaded
    assert len(client.blocks) == tokens // 64
    assert float((once.logits - twice.logits).abs().max()) <= 1e-4


async def test_a_load_that_falls_short_is_computed(model: Any, spec: ModelSpec) -> None:
    client = DictClient()
    await prefill(model, prompt(400), client, spec=spec)
    _, plain_tokens, plain = await answered(model, prompt(400), None, spec)
    for client.serve in (0, 1, 3):
        made, tokens, logits = await answered(model, prompt(400), client, spec)
        assert client.matched[-1] == 6
        assert made.stats.matched_tokens == 6 * 64
        assert made.stats.loaded_tokens == client.serve * 64
        assert tokens == plain_tokens
        assert float((logits - plain).abs().max()) <= 1e-4


async def test_commits_of_others_reach_the_lookup(model: Any, spec: ModelSpec) -> None:
    client, token = DictClient(), CommitToken("other", 2, 9)
    await prefill(model, prompt(100), client, spec=spec, after=[token])
    assert client.after == [token]


async def test_blocks_are_in_canonical_order(model: Any, spec: ModelSpec) -> None:
    cache = (await prefill(model, prompt(140), None, spec=spec)).past_key_values
    blocks = blocks_from_cache(spec, cache, 1, 1)
    assert [block.nbytes for block in blocks] == [block_bytes(spec, Shard.whole(spec))]
    for chunk in chunks(spec, Shard.whole(spec)):
        tensor = (cache.layers[chunk.layer].keys, cache.layers[chunk.layer].values)[chunk.component]
        expected = tensor[0, :, 64:128].permute(1, 0, 2).contiguous().numpy().tobytes()
        assert bytes(blocks[0][chunk.offset : chunk.offset + chunk.nbytes]) == expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_conversion_keeps_every_bit(dtype: str) -> None:
    model = make_model(TINY).to(getattr(torch, dtype))
    spec = spec_for(model, name="tiny")
    assert spec.dtype == dtype
    cache = (await prefill(model, prompt(200), None, spec=spec)).past_key_values
    blocks = blocks_from_cache(spec, cache, 0, 3)
    read_only = [memoryview(bytes(block)) for block in blocks]
    back = cache_from_blocks(model, spec, read_only)
    for held, made in zip(cache.layers, back.layers, strict=True):
        assert made.keys.dtype == held.keys.dtype
        assert torch.equal(held.keys[:, :, :192], made.keys)
        assert torch.equal(held.values[:, :, :192], made.values)
    assert [bytes(b) for b in blocks_from_cache(spec, back, 0, 3)] == [bytes(b) for b in read_only]
    with pytest.raises(ValueError, match="bytes"):
        cache_from_blocks(model, spec, [bytes(7)])


def test_the_spec_tells_apart_what_must_not_mix(model: Any) -> None:
    spec = spec_for(model, name="m", revision="r")
    group = spec.groups[0]
    assert (group.kind, group.layers, group.kv_heads, group.k_dim, group.v_dim) == ("full", 2, 2, 16, 16)
    assert spec.numerics.startswith("transformers/sdpa/cpu/")
    assert "10000" in spec.rope
    others = [
        spec_for(model, name="m", revision="s"),
        spec_for(model, name="n", revision="r"),
        spec_for(model, name="m", revision="r", numerics_note="threads=2"),
        spec_for(model, name="m", revision="r", block_tokens=32),
        replace(spec, dtype="bfloat16"),
    ]
    assert len({spec.root, *(other.root for other in others)}) == 6


def test_two_seeds_are_two_keyspaces_and_one_seed_is_one(model: Any) -> None:
    assert weights_digest(make_model(TINY)) == weights_digest(model)
    assert weights_digest(make_model(TINY, seed=8)) != weights_digest(model)


async def test_what_cannot_be_shared_is_refused(model: Any, spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match="no name"):
        spec_for(model)
    with pytest.raises(UsageError, match="one prompt"):
        await prefill(model, torch.zeros((2, 5), dtype=torch.long), None, spec=spec)
    with pytest.raises(UsageError, match="one prompt"):
        await prefill(model, torch.zeros((1, 0), dtype=torch.long), None, spec=spec)
    other = make_model(TINY)
    other.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UsageError, match="sliding_attention"):
        spec_for(other, name="m")
    other = make_model(TINY)
    other.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UsageError, match="dynamic"):
        spec_for(other, name="m")


async def test_what_is_told_of_a_prompt_names_its_full_blocks(spec: ModelSpec) -> None:
    told: list[Any] = []

    class Client:
        async def hint(self, spec: ModelSpec, prefix: Chain, hint: Hint = NO_HINT, *, use: Use | None = None) -> int:
            told.append((len(prefix), hint, use))
            return len(prefix)

    ids = torch.arange(2 * spec.block_tokens + 3)[None]
    over, begin = Hint(ended=True, output_tokens=9), Use(session=b"chat")
    assert await tell(Client(), spec, ids, over) == 2
    assert await tell(Client(), spec, ids, use=begin) == 2
    assert await tell(Client(), spec, ids[:, :3], over) == 0, "no full block, nothing to tell"
    assert told == [(2, over, None), (2, NO_HINT, begin)]
    with pytest.raises(UsageError):
        await tell(Client(), spec, ids[0], over)
