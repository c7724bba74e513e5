"""Byte planes of 16-bit elements: the loops of the dense codec."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit

U8, U16 = np.uint8, np.uint16


@jit
def split(pairs: Any, low: Any, high: Any) -> Any:
    """Both bytes of each uint16 element. Mutates `low` and `high`."""
    for k in range(pairs.size):
        low[k] = U8(pairs[k] & U16(255))
    for k in range(pairs.size):
        high[k] = U8(pairs[k] >> U16(8))


@jit
def join(low: Any, high: Any, pairs: Any) -> Any:
    """Inverse of `split`. Mutates `pairs`."""
    for k in range(pairs.size):
        pairs[k] = U16(U16(low[k]) | U16(U16(high[k]) << U16(8)))


@jit
def commonest(plane: Any, step: Any, pieces: Any, size: Any) -> Any:
    """How often the commonest byte stands in `pieces` pieces of `size` bytes, one each `step` bytes."""
    counts = np.zeros(256, np.int64)
    for piece in range(pieces):
        for k in range(piece * step, piece * step + size):
            counts[plane[k]] += 1
    return counts.max()
