"""XXH3-64, and a copy that computes it in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from kvstore.errors import BadRequest
from kvstore.types import Buffer

SHORT_BYTES = 240
"""XXH3 takes inputs up to there another way."""

STEP_BYTES = 256 << 10
"""Half of a small L2: what was just copied is still in cache when it is summed."""


def xxh3(data: Buffer) -> int:
    """XXH3-64 of contiguous bytes, seed 0. Releases the GIL for large ones."""
    return int(xxh3_64_intdigest(data))


_kernel: list[Callable[[list[tuple[memoryview, memoryview]]], list[int]]] = []


def prepare() -> None:
    """Thread: load what makes `copy_and_checksum_all` fast; compiled, for seconds, the first time on a machine."""
    if not _kernel:
        from kvstore.kernels.copysum import copy_all

        source = memoryview(bytes(2 * SHORT_BYTES))
        assert copy_all([(source, memoryview(bytearray(2 * SHORT_BYTES)))]) == [xxh3(source)]
        _kernel.append(copy_all)


def copy_and_checksum_all(jobs: Sequence[tuple[memoryview, memoryview]]) -> list[int]:
    """`copy_and_checksum` of each (source, target), once `prepare`d all of them without the interpreter's lock: between
    two steps nobody waits for what other threads do with it. BadRequest as there, before anything is copied."""
    for source, target in jobs:
        _check(source, target)
    if not _kernel or any(source.nbytes <= SHORT_BYTES for source, _ in jobs):
        return [copy_and_checksum(source, target) for source, target in jobs]
    return _kernel[0](list(jobs))


def _check(source: memoryview, target: memoryview) -> None:
    if not source.c_contiguous or not target.c_contiguous or target.readonly or source.nbytes != target.nbytes:
        raise BadRequest(
            f"can't copy {source.nbytes} bytes into {target.nbytes}: give contiguous, equally long, writable ones"
        )


def copy_and_checksum(source: Buffer, target: memoryview) -> int:
    """Copy `source` to `target` and return XXH3-64 of what arrived; mutates `target`.

    The sum is of the target, so that a source changed meanwhile by its owner can't pass with another sum.
    BadRequest unless both are contiguous, equally long, and `target` writable.
    """
    out = memoryview(source)
    _check(out, target)
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
