"""Blocks whose bytes are a function of their key, so that every byte that comes back can be checked.

They look like bf16 KV (normal values), so that the lossless codec has something to do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.operations.trace import TRACE_BLOCK_TOKENS
from kvstore.spec import Group, ModelSpec

TILE_WORDS = 1 << 20
SIGN_AND_MANTISSA = 0x807F  # of a bf16: changing these bits keeps the exponents
PATTERN_WORDS = 8  # of a key of 16 bytes
BLOCK_BYTES_STEP = TRACE_BLOCK_TOKENS * 2 * 2  # K and V, one bf16 each


def replay_spec(block_bytes: int) -> ModelSpec:
    """A model whose raw block of 512 tokens is that many bytes. ValueError unless a multiple of `BLOCK_BYTES_STEP`."""
    if block_bytes <= 0 or block_bytes % BLOCK_BYTES_STEP:
        raise ValueError(f"{block_bytes} bytes a block: give a multiple of {BLOCK_BYTES_STEP}")
    dim = block_bytes // BLOCK_BYTES_STEP
    layers = 2 - dim % 2
    group = Group(layers=layers, kv_heads=1, k_dim=dim // layers, v_dim=dim // layers)
    return ModelSpec(model="kvstore/replay-1", block_tokens=TRACE_BLOCK_TOKENS, groups=(group,))


def tokens_of(hash_ids: tuple[int, ...]) -> NDArray[np.uint32]:
    """512 token ids for each block of a trace, a function of its id."""
    mixed: NDArray[np.uint64] = np.array(hash_ids, np.uint64).reshape(-1, 1).repeat(TRACE_BLOCK_TOKENS, axis=1)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.arange(TRACE_BLOCK_TOKENS, dtype=np.uint64)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed >>= np.uint64(32)
    return mixed.astype(np.uint32).reshape(-1)


class Payload:
    """`make` and `check`. Two keys share neither their place in the tile nor their pattern, but by chance (2^-84)."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        words = block_bytes // 2
        normal = np.random.Generator(np.random.PCG64(1)).standard_normal(TILE_WORDS, np.float32)
        tile = (normal.view(np.uint32) >> 16).astype(np.uint16)
        self._tile = np.concatenate([tile, np.resize(tile, words)])
        self._scratch = np.empty(words, np.uint16)

    def make(self, key: bytes) -> NDArray[np.uint8]:
        """The block of a key, a new array of uint8."""
        return self._into(key, np.empty(self.block_bytes // 2, np.uint16)).view(np.uint8)

    def check(self, key: bytes, block: NDArray[np.uint8]) -> bool:
        """Whether every byte is as it should be."""
        expected = self._into(key, self._scratch)
        return block.nbytes == self.block_bytes and bool(np.array_equal(expected, block.view(np.uint16)))

    def _into(self, key: bytes, target: NDArray[np.uint16]) -> NDArray[np.uint16]:
        start = int.from_bytes(key[:4], "little") % TILE_WORDS
        pattern = np.frombuffer(key, np.uint16) & np.uint16(SIGN_AND_MANTISSA)
        source = self._tile[start : start + len(target)].reshape(-1, PATTERN_WORDS)
        np.bitwise_xor(source, pattern, out=target.reshape(-1, PATTERN_WORDS))
        return target
