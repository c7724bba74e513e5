"""Copying many blocks in one step without the interpreter lock: no wait for other threads' turns between two of them.

Addresses are plain integers; the caller keeps what lies there alive and in bounds.
"""

from __future__ import annotations

from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvstore.kernels import jit


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
def move(targets: Any, sources: Any, nbytes: Any) -> None:
    """Copy `nbytes[i]` bytes from address `sources[i]` to `targets[i]`, in order. uint64 arrays of one length."""
    for index in range(targets.size):
        _memcpy(targets[index], sources[index], nbytes[index])


cast(Any, move).compile("void(uint64[::1], uint64[::1], uint64[::1])")  # now, and not at the first use
