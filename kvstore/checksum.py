"""XXH3-64, and a copy that computes it in the same pass."""

from __future__ import annotations

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from kvstore.errors import BadRequest
from kvstore.types import Buffer

STEP_BYTES = 256 << 10
"""Half of a small L2: what was just copied is still in cache when it is summed."""


def xxh3(data: Buffer) -> int:
    """XXH3-64 of contiguous bytes, seed 0. Releases the GIL for large ones."""
    return int(xxh3_64_intdigest(data))


def copy_and_checksum(source: Buffer, target: memoryview) -> int:
    """Copy `source` to `target` and return XXH3-64 of what arrived; mutates `target`.

    The sum is of the target, so that a source changed meanwhile by its owner can't pass with another sum.
    BadRequest unless both are contiguous, equally long, and `target` writable.
    """
    out = memoryview(source)
    if not out.c_contiguous or not target.c_contiguous or target.readonly or out.nbytes != target.nbytes:
        raise BadRequest(
            f"can't copy {out.nbytes} bytes into {target.nbytes}: give contiguous, equally long, writable ones"
        )
    if out.nbytes == 0:
        return xxh3(b"")
    here, there = np.frombuffer(out, np.uint8), np.frombuffer(target, np.uint8)
    if out.nbytes <= STEP_BYTES:
        np.copyto(there, here)
        return xxh3(target)
    state = xxh3_64()
    for start in range(0, out.nbytes, STEP_BYTES):
        step = there[start : start + STEP_BYTES]
        np.copyto(step, here[start : start + STEP_BYTES])
        state.update(step.data)
    return int(state.intdigest())
