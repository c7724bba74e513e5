"""Copying many blocks in one step without the interpreter lock: no wait for other threads' turns between two of them.

Addresses are plain integers; the caller keeps what lies there alive and in bounds.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvstore.kernels import jit
from kvstore.kernels.lines import LINE_BYTES, UNROLL, copy_lines, fence

STREAM_BYTES = 4 << 20
"""From so many bytes on a step is stored past the caches: less may be wanted while it still lies in one."""

STRIDE = LINE_BYTES * UNROLL


@intrinsic  # type: ignore[untyped-decorator]
def _memcpy(typing: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """memcpy(target, source, nbytes) of addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        there, here = (builder.inttoptr(address, pointer) for address in arguments[:2])
        cgutils.raw_memcpy(builder, there, here, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@jit
def _stream(there: Any, here: Any, nbytes: Any) -> None:
    """One piece, past the caches but for its ends."""
    head = min(nbytes, np.uint64(-np.int64(there) & np.int64(LINE_BYTES - 1)))
    middle = (nbytes - head) // np.uint64(STRIDE)
    done = head + middle * np.uint64(STRIDE)
    _memcpy(there, here, head)
    copy_lines(there + head, here + head, middle)
    _memcpy(there + done, here + done, nbytes - done)


@jit
def move(targets: Any, sources: Any, nbytes: Any) -> None:
    """Copy `nbytes[i]` bytes from address `sources[i]` to `targets[i]`, in order. uint64 arrays of one length."""
    total = np.uint64(0)
    for index in range(nbytes.size):
        total += nbytes[index]
    if total < np.uint64(STREAM_BYTES):
        for index in range(targets.size):
            _memcpy(targets[index], sources[index], nbytes[index])
    else:
        for index in range(targets.size):
            _stream(targets[index], sources[index], nbytes[index])
        fence()


cast(Any, move).compile("void(uint64[::1], uint64[::1], uint64[::1])")  # now, and not at the first use
