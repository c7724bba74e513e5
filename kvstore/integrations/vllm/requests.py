"""What the scheduler's side remembers of one request, and how its tokens become keys."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvstore.client.plan import HitPlan
from kvstore.integrations.vllm.identity import folder_digest
from kvstore.keys import ChainBuilder, Extra
from kvstore.spec import ModelSpec


@dataclass(slots=True)
class Tracked:
    """One request, from its first lookup to its end."""

    id: str
    request: Any  # the engine's own object
    builder: ChainBuilder
    hashed: int = 0  # tokens the builder has
    prompt_tokens: int = 0
    saved: int = 0  # leading blocks that are in the store, or were offered to it
    failures: int = 0  # of loads
    lookup: Future[HitPlan] | None = None
    lookup_at: float = 0.0  # begun
    plan: HitPlan | None = None
    plan_at: float = 0.0
    told: bool = False  # whether its begin was told
    own_since: float | None = None  # first time its lookup was put off because this engine is storing its blocks
    saving: dict[int, int] = field(default_factory=dict)  # save number -> ranks that still need its pages

    def extend(self, tokens: int) -> list[bytes]:
        """Hash the request's tokens up to `tokens`, each once. Returns all keys so far. Mutates."""
        if tokens > self.hashed:
            self.builder.extend(self.request.all_token_ids[self.hashed : tokens])
            self.hashed = tokens
        return self.builder.chain.keys


def track(request: Any, spec: ModelSpec, adapters: dict[str, bytes]) -> Tracked | None:
    """None for a request whose inputs are not all visible. `adapters` remembers digests of LoRA folders; mutates it."""
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return None
    extras = extras_of(request, adapters)
    if extras is None:
        return None
    return Tracked(request.request_id, request, ChainBuilder(spec, extras), prompt_tokens=request.num_prompt_tokens)


def extras_of(request: Any, adapters: dict[str, bytes]) -> list[Extra] | None:
    """Inputs that are no tokens: LoRA adapter, cache salt, multimodal items where they begin. None: one is unknown."""
    extras = []
    if request.lora_request is not None:
        extras.append(Extra("lora", _adapter(request.lora_request, adapters)))
    if request.cache_salt:
        extras.append(Extra("salt", request.cache_salt.encode()))
    for feature in request.mm_features or ():
        if not feature.identifier:
            return None
        extras.append(Extra("mm", feature.identifier.encode(), feature.mm_position.offset))
    return extras


ADAPTERS_MAX = 1024


def _adapter(lora: Any, known: dict[str, bytes]) -> bytes:
    """16 bytes that are equal only for equal adapters: their ids are of one engine, their names are anybody's."""
    name = f"{lora.lora_name}\0{lora.lora_path}\0{lora.lora_int_id}"
    if name not in known or lora.load_inplace:
        folder = Path(lora.lora_path)
        content = folder_digest(folder) if folder.is_dir() else f"{lora.lora_name}\0{lora.lora_path}"
        if len(known) >= ADAPTERS_MAX:
            known.pop(next(iter(known)))
        known[name] = sha256(content.encode()).digest()[:16]
    return known[name]
