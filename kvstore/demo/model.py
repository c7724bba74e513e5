"""The demo's language model: Llama architecture, fp32, weights drawn from a seed on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import xxhash

from kvstore.integrations.transformers import spec_for
from kvstore.spec import ModelSpec

BYTES = 256
"""Token ids below are the bytes of UTF-8 text; the ones from here on are special."""
SYSTEM, USER, ASSISTANT, END = range(BYTES, BYTES + 4)
VOCABULARY = BYTES + 64


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of the model. The default computes about a thousand tokens a second on two cores."""

    hidden: int = 768
    layers: int = 10
    heads: int = 12
    kv_heads: int = 4
    intermediate: int = 2048
    positions: int = 8192


TINY = Size(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128)
"""For tests."""


def make_model(size: Size | None = None, seed: int = 7) -> torch.nn.Module:
    """A `LlamaForCausalLM` with the same weights on every machine with this build of torch.

    Matrices are normal with deviation 0.05, wide enough that attention is selective and what was cached matters.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    from transformers import LlamaConfig, LlamaForCausalLM  # after the switch above: it is read at import

    size = size or Size()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    model: torch.nn.Module = LlamaForCausalLM(config).to(torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            weight.normal_(0.0, 0.05, generator=generator)
        else:
            weight.fill_(1.0)
    return model


def weights_digest(model: torch.nn.Module) -> str:
    """XXH3-128 over all parameters by name, hexadecimal: what tells two models of one architecture apart."""
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(memoryview(weight.detach().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def demo_spec(model: torch.nn.Module, threads: int) -> ModelSpec:
    """The keyspace of the demo's model. The thread count is part of the numerics: it may move the lowest bits."""
    return spec_for(
        model, name="kvstore/demo-llama", revision=weights_digest(model), numerics_note=f"threads={threads}"
    )
