"""A codec as the store runs it, there and back: what it makes of tensors, and how large that is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvstore.codecs import NESTED, batch
from kvstore.layout import Chunk, K, V

BLOCK = 64


def chunk_of(tokens: int, heads: int, dim: int, *, value: bool) -> Chunk:
    return Chunk(0, V if value else K, 0, heads, 0, tokens * heads * dim * 2, (tokens, heads, dim), 2, "bfloat16")


def raw_of(values: Tensor) -> bytes:
    """bf16 bytes of float32 that hold bf16."""
    return bytes(values.contiguous().to(torch.bfloat16).view(torch.uint8).numpy().tobytes())


def tensor_of(raw: bytes | bytearray, shape: torch.Size) -> Tensor:
    found = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
    return found.view(torch.bfloat16).reshape(shape).to(torch.float32)


@dataclass(slots=True)
class Trip:
    """One codec, of which `planes` leading planes are read back (0: all). Counts bytes as it goes."""

    codec: int
    planes: int = 0
    tokens: int = BLOCK
    raw_bytes: int = 0
    stored_bytes: int = 0
    used: dict[int, int] = field(default_factory=dict)  # codec -> chunks, fallbacks too

    def __call__(self, values: Tensor, value: bool) -> Tensor:
        """[token, head, dim] block by block; what does not fill a block is left as it is. Mutates the counts."""
        parts = []
        whole = len(values) // self.tokens * self.tokens
        for start in range(0, whole, self.tokens):
            parts.append(self.block(values[start : start + self.tokens], value))
        return torch.cat([*parts, values[whole:]])

    def block(self, values: Tensor, value: bool) -> Tensor:
        raw, chunk = raw_of(values), chunk_of(*values.shape, value=value)
        [planes] = batch.encode(memoryview(raw), [chunk], [self.codec])
        used = planes[0].codec
        kept = planes[: self.planes] if self.planes and used == NESTED else planes
        data = b"".join(bytes(plane.data) for plane in kept)
        self.raw_bytes += len(raw)
        self.stored_bytes += len(data)
        self.used[used] = self.used.get(used, 0) + 1
        spans, at = [], 0
        for plane in kept:
            spans.append((at, len(plane.data)))
            at += len(plane.data)
        target = bytearray(len(raw))
        batch.decode(memoryview(data), [batch.Coded(chunk, used, kept[0].params, tuple(spans))], memoryview(target))
        return tensor_of(target, values.shape)

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.stored_bytes
