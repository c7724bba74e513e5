"""KV reuse for the causal language models of Hugging Face `transformers`.

    made = await prefill(model, input_ids, client)
    token = made.logits.argmax(-1)      # go on as after any forward pass, with made.past_key_values

`prefill` looks the prompt up, loads the blocks held, computes only the rest and stores the new full blocks. Without a
client it computes everything: the same code with nothing loaded. A failed lookup, load or store costs recomputation.

Holds for models whose layers all use full attention with rotary positions that depend on the position alone; others
are refused with UsageError. Keys are stored after the rotation, so a block fits one position, as its key says.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kvstore.client.hinting import NO_HINT
from kvstore.client.kv_client import GetResult
from kvstore.client.plan import HitPlan
from kvstore.client.put_blocks import PutResult
from kvstore.errors import UsageError
from kvstore.keys import Chain, chain
from kvstore.layout import K, block_bytes, chunks
from kvstore.policies.usage import Hint, Use
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import Buffer, CommitToken, Tier

POSITION_ONLY_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotations whose angle does not depend on the length of the sequence (transformers' names)."""

_WORDS: dict[int, tuple[torch.dtype, type[np.generic]]] = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.int16),
    4: (torch.int32, np.int32),
    8: (torch.int64, np.int64),
}
"""Elements are moved as integers of their width: numpy knows no bfloat16, and NaN payloads stay as they are."""


def spec_for(
    model: Any, *, name: str = "", revision: str = "", block_tokens: int = 64, numerics_note: str = ""
) -> ModelSpec:
    """The `ModelSpec` of a loaded model. Pure.

    `name` and `revision` default to where the model was loaded from; they must tell different weights apart, because
    a key can not. `numerics_note` is appended to the attention backend, device and instruction set.
    UsageError for a model that this integration does not know how to cut into blocks.
    """
    config = model.config.get_text_config(decoder=True)
    name = name or str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        raise UsageError("the model has no name: give spec_for(model, name=..., revision=...)")
    kinds = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
    if kinds != ["full_attention"] or (getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")):
        raise UsageError(f"the model has layers of kind {', '.join(kinds)}: only full attention is supported here")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSpec(
        model=name,
        revision=revision or str(getattr(model.config, "_commit_hash", None) or ""),
        groups=(Group(layers=config.num_hidden_layers, kv_heads=heads, k_dim=dim, v_dim=dim),),
        dtype=str(model.dtype).removeprefix("torch."),
        rope=_rope(config),
        numerics=_numerics(model, config, numerics_note),
        block_tokens=block_tokens,
    )


def _rope(config: Any) -> str:
    """The rotation as JSON with sorted keys: equal text, equal angles."""
    found = getattr(config, "rope_parameters", None)  # transformers 5
    if found is None:
        found = {"rope_theta": getattr(config, "rope_theta", None), **(getattr(config, "rope_scaling", None) or {})}
    values = {key: value for key, value in found.items() if value is not None and key != "type"}
    kind = values.setdefault("rope_type", found.get("type") or "default")
    if kind not in POSITION_ONLY_ROPE:
        raise UsageError(f"rope type {kind!r} turns keys by the sequence's length: its KV can not be shared")
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _numerics(model: Any, config: Any, note: str) -> str:
    device = model.device.type
    parts = ["transformers", str(getattr(config, "_attn_implementation", "")), device]
    if device == "cpu":
        parts.append(torch.backends.cpu.get_cpu_capability())
    return "/".join([*parts, note] if note else parts)


def _layers(spec: ModelSpec) -> list[tuple[int, bool, int, tuple[int, ...]]]:
    """(layer, whether K, first element in the block, [token, head, dim]) of each chunk."""
    return [(c.layer, c.component == K, c.offset // c.itemsize, c.shape) for c in chunks(spec, Shard.whole(spec))]


def _words(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as integers of its width, any strides. No copy."""
    view: NDArray[Any] = tensor.detach().view(_WORDS[tensor.element_size()][0]).numpy()
    return view


def cache_from_blocks(model: Any, spec: ModelSpec, blocks: Sequence[Buffer]) -> DynamicCache:
    """A new cache that holds the KV of consecutive canonical blocks from token 0 on. `blocks` may be read-only.

    Per layer K and V of [1, head, token, dim] in the model's dtype, on the model's device. ValueError for a block of
    another length than the spec's.
    """
    cache = DynamicCache()
    if not blocks:
        return cache
    width = block_bytes(spec, Shard.whole(spec))
    if any(memoryview(block).nbytes != width for block in blocks):
        raise ValueError(f"a block of this model has {width} bytes, given are {[memoryview(b).nbytes for b in blocks]}")
    item = _WORDS[model.dtype.itemsize][1]
    sources = [np.frombuffer(block, item) for block in blocks]
    keys: torch.Tensor | None = None
    for layer, is_key, first, (tokens, heads, dim) in _layers(spec):
        made = torch.empty((1, heads, len(blocks) * tokens, dim), dtype=model.dtype)
        target = _words(made)[0]
        for index, source in enumerate(sources):
            chunk = source[first : first + tokens * heads * dim].reshape(tokens, heads, dim)
            target[:, index * tokens : (index + 1) * tokens] = chunk.transpose(1, 0, 2)
        made = made.to(model.device)
        if is_key:
            keys = made
        else:
            assert keys is not None, "K comes before V in canonical order"
            cache.update(keys, made, layer)
    return cache


def blocks_from_cache(spec: ModelSpec, cache: Any, first: int, count: int) -> list[NDArray[np.uint8]]:
    """Canonical raw bytes of blocks `first` .. `first + count` - 1 of a cache, in new memory. Pure."""
    blocks = np.empty((count, block_bytes(spec, Shard.whole(spec))), np.uint8)
    for layer, is_key, offset, (tokens, heads, dim) in _layers(spec):
        held = cache.layers[layer].keys if is_key else cache.layers[layer].values
        source = _words(held[0, :, first * tokens : (first + count) * tokens].cpu())
        words = blocks.view(source.dtype)
        for index in range(count):
            chunk = words[index, offset : offset + tokens * heads * dim].reshape(tokens, heads, dim)
            chunk[...] = source[:, index * tokens : (index + 1) * tokens].transpose(1, 0, 2)
    return list(blocks)


class BlockClient(Protocol):
    """What `prefill` needs of `kvstore.KVClient`. None of the three raises for a fault of the service."""

    async def match(self, spec: ModelSpec, prefix: Chain, *, after: Iterable[CommitToken] = ()) -> HitPlan: ...

    async def get(self, plan: HitPlan) -> GetResult: ...

    async def put(self, spec: ModelSpec, prefix: Chain, blocks: Sequence[Any], first: int = 0) -> PutResult: ...


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """Where a prompt's tokens came from and what each step took, in seconds."""

    prompt_tokens: int
    matched_tokens: int = 0  # what the lookup promised
    loaded_tokens: int = 0
    tokens_by_tier: dict[Tier, int] = field(default_factory=dict)  # of the loaded ones, the tier that served them
    match_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    store_s: float = 0.0
    put_states: dict[str, int] = field(default_factory=dict)  # blocks by outcome: committed, held, dropped, refused
    commits: tuple[CommitToken, ...] = ()  # give them to whoever must see these blocks: prefill(..., after=commits)


class Prefilled(NamedTuple):
    """As after a forward pass over the whole prompt."""

    past_key_values: DynamicCache
    logits: torch.Tensor  # [1, vocabulary], of the last position
    stats: PrefillStats


async def prefill(
    model: Any,
    input_ids: torch.Tensor,
    client: BlockClient | None,
    *,
    spec: ModelSpec | None = None,
    after: Iterable[CommitToken] = (),
) -> Prefilled:
    """Prefill `input_ids` ([1, token], integers), loading what the client finds and storing what was computed.

    At least the last token is computed, for its logits. `spec` defaults to `spec_for(model)`. `after`: commits of
    others that the lookup waits for. UsageError for a batch or an empty prompt.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise UsageError(f"input_ids have shape {list(input_ids.shape)}: give one prompt as [1, tokens]")
    spec = spec or spec_for(model)
    clock = asyncio.get_running_loop().time
    prompt = chain(spec, input_ids[0].numpy(force=True))
    begun = clock()
    plan = await _match(client, prompt, (input_ids.shape[1] - 1) // spec.block_tokens, after)
    matched = clock()
    blocks, by_tier = await _load(client, plan)
    cache = cache_from_blocks(model, spec, blocks)
    known = len(blocks) * spec.block_tokens
    loaded = clock()
    # In a thread: the client's connections are served meanwhile.
    logits = await asyncio.to_thread(_forward, model, input_ids[:, known:], cache)
    computed = clock()
    stored = await _store(client, prompt, cache, len(blocks))
    stats = PrefillStats(
        prompt_tokens=input_ids.shape[1],
        matched_tokens=plan.tokens,
        loaded_tokens=known,
        tokens_by_tier={tier: count * spec.block_tokens for tier, count in sorted(by_tier.items())},
        match_s=matched - begun,
        load_s=loaded - matched,
        compute_s=computed - loaded,
        store_s=clock() - computed,
        put_states=dict(sorted(Counter(stored.states).items())),
        commits=tuple(stored.tokens),
    )
    return Prefilled(cache, logits, stats)


class TellingClient(Protocol):
    """What `tell` needs of `kvstore.KVClient`."""

    async def hint(self, spec: ModelSpec, prefix: Chain, hint: Hint = ..., *, use: Use | None = None) -> int: ...


async def tell(
    client: TellingClient,
    spec: ModelSpec,
    input_ids: torch.Tensor,
    hint: Hint = NO_HINT,
    *,
    use: Use | None = None,
) -> int:
    """Say what is known of a prompt: before `prefill` with `use` (session, time), after its output was generated with
    `hint` (output length, how it ended, session over, reuse expected). `input_ids`: [1, token], as given to `prefill`.

    How many (shard, block) pairs the workers told hold. Never raises for a fault of the service.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise UsageError(f"input_ids have shape {list(input_ids.shape)}: give one prompt as [1, tokens]")
    prompt = chain(spec, input_ids[0].numpy(force=True))
    return await client.hint(spec, prompt, hint, use=use) if len(prompt) else 0


async def _match(client: BlockClient | None, prompt: Chain, most: int, after: Iterable[CommitToken]) -> HitPlan:
    """What is held of the first `most` blocks, exact ones only: what is computed on top is then exact too."""
    if client is None or most == 0:
        return HitPlan(prompt.spec, (), ())
    return await client.match(prompt.spec, Chain(prompt.spec, prompt.keys[:most]), after=after)


async def _load(client: BlockClient | None, plan: HitPlan) -> tuple[list[Buffer], Counter[Tier]]:
    """Leading raw blocks, maybe fewer than planned, and how many each tier served."""
    if client is None or plan.blocks == 0:
        return [], Counter()
    got = await client.get(plan)
    tiers = got.tiers[0][: got.blocks] if got.blocks else []
    return got.buffers[0][: got.blocks] if got.blocks else [], Counter(tier for tier in tiers if tier is not None)


def _forward(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Logits of the last position, [1, vocabulary]. Grows the cache by `ids`."""
    with torch.no_grad():
        logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


async def _store(client: BlockClient | None, prompt: Chain, cache: DynamicCache, first: int) -> PutResult:
    """Store the full blocks from `first` on: those that were computed."""
    count = len(prompt) - first
    if client is None or count == 0:
        return PutResult()
    blocks = await asyncio.to_thread(blocks_from_cache, prompt.spec, cache, first, count)
    return await client.put(prompt.spec, prompt, blocks, first)
