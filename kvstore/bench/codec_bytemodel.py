"""A small causal language model over bytes with rotary positions and grouped heads, for the cost of a codec in KL.

Trained by `examples/train_byte_model.py` on the texts of `pydoc_data.topics`; its weights lie beside this file. What a
codec costs is the change of the next-byte distribution of tokens that attend to a prefix whose KV went through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WEIGHTS = Path(__file__).parent / "data" / "bytemodel.npz"
HELD_OUT = 0.1
"""Share of the text, at its end, that training never sees."""

KV = list[tuple[Tensor, Tensor]]
"""Per layer K and V of one sequence: [token, kv head, dim], K after rotation."""


@dataclass(frozen=True, slots=True)
class Shape:
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    hidden: int = 352


SHAPE = Shape()


def text() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of Python's topic pages, in the order of their names."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(joined.encode(), np.uint8)


def new_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=made) * (scale / rows**0.5)

    weights = {"embed": torch.randn(256, shape.width, generator=made) * 0.02 * shape.width**0.5}
    q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("q", shape.width, q), ("k", shape.width, kv), ("v", shape.width, kv), ("o", q, shape.width),
            ("gate", shape.width, shape.hidden), ("up", shape.width, shape.hidden), ("down", shape.hidden, shape.width),
        ):  # fmt: skip
            weights[f"{layer}.{name}"] = matrix(rows, columns, 0.5 if name in ("o", "down") else 1.0)
        weights[f"{layer}.norm1"], weights[f"{layer}.norm2"] = torch.ones(shape.width), torch.ones(shape.width)
    weights["norm"] = torch.ones(shape.width)
    weights["head"] = matrix(shape.width, 256)
    return weights


def save(weights: dict[str, Tensor], path: Path) -> None:
    """As the upper halves of float32: two bytes a weight."""
    np.savez_compressed(
        path, **{n: (w.detach().numpy().view(np.uint32) >> 16).astype(np.uint16) for n, w in weights.items()}
    )


def load(path: Path = WEIGHTS) -> dict[str, Tensor]:
    with np.load(path) as found:
        return {n: torch.from_numpy((found[n].astype(np.uint32) << 16).view(np.float32).copy()) for n in found.files}


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary positions (Su et al., "RoFormer", 2021) of [.., token, head, dim], from position `first` on."""
    half = x.shape[-1] // 2
    speeds = 10000.0 ** (-torch.arange(half) / half)
    angles = (first + torch.arange(x.shape[-3]))[:, None] * speeds
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def forward(
    weights: dict[str, Tensor],
    tokens: Tensor,
    past: KV | None = None,
    shape: Shape = SHAPE,
    queries: list[Tensor] | None = None,
) -> tuple[Tensor, KV]:
    """(logits [batch, token, 256], KV of these tokens of the first sequence) of int64 `tokens` [batch, token].

    `past`: KV of what stands before them. `queries` takes each layer's, [token, head, dim] of the first sequence.
    """
    batch, count = tokens.shape
    first = 0 if past is None else len(past[0][0])
    x, kv = weights["embed"][tokens], []
    mask = torch.arange(first + count)[None, :] <= first + torch.arange(count)[:, None]
    for layer in range(shape.layers):
        h = rms(x, weights[f"{layer}.norm1"])
        q = rotate((h @ weights[f"{layer}.q"]).reshape(batch, count, shape.heads, shape.dim), first)
        k = rotate((h @ weights[f"{layer}.k"]).reshape(batch, count, shape.kv_heads, shape.dim), first)
        v = (h @ weights[f"{layer}.v"]).reshape(batch, count, shape.kv_heads, shape.dim)
        kv.append((k[0].detach(), v[0].detach()))
        if queries is not None:
            queries.append(q[0].detach())
        if past is not None:
            k = torch.cat([past[layer][0][None].expand(batch, -1, -1, -1), k], 1)
            v = torch.cat([past[layer][1][None].expand(batch, -1, -1, -1), v], 1)
        share = shape.heads // shape.kv_heads
        wide = [part.repeat_interleave(share, 2).transpose(1, 2) for part in (k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), wide[0], wide[1], attn_mask=mask)
        x = x + out.transpose(1, 2).reshape(batch, count, -1) @ weights[f"{layer}.o"]
        h = rms(x, weights[f"{layer}.norm2"])
        gate = torch.nn.functional.silu(h @ weights[f"{layer}.gate"])
        x = x + (gate * (h @ weights[f"{layer}.up"])) @ weights[f"{layer}.down"]
    return rms(x, weights["norm"]) @ weights["head"], kv


@torch.no_grad()  # type: ignore[untyped-decorator]
def kl_of(
    weights: dict[str, Tensor], prefixes: Sequence[Tensor], suffix: int, through: Callable[[Tensor, bool], Tensor]
) -> float:
    """Mean KL, in nats, of the next-byte distributions of the last `suffix` tokens of each sequence, whose prefix's KV
    went `through` a codec ([token, head, dim], whether it is V), from the one with the KV as it was."""
    total, n = 0.0, 0
    for sequence in prefixes:
        cut = len(sequence) - suffix
        _, kv = forward(weights, sequence[None, :cut])
        plain, _ = forward(weights, sequence[None, cut:], kv)
        lossy, _ = forward(weights, sequence[None, cut:], [(through(k, False), through(v, True)) for k, v in kv])
        p, q = plain[0].log_softmax(-1), lossy[0].log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).sum())
        n += suffix
    return total / n
