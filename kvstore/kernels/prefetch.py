"""Asking for a cache line before it is needed, so that many keys of a batch wait for memory together."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, row: Any) -> Any:
    """Begin to load the first element of a row of a 2-D array. Never faults, reads or writes nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        made = context.make_array(kind)(context, builder, arguments[0])
        row = context.cast(builder, arguments[1], signature.args[1], types.intp)
        index = [row, context.get_constant(types.intp, 0)]
        at = cgutils.get_item_pointer(context, builder, kind, made, index, wraparound=False)
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        wanted = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
        builder.call(function, [builder.bitcast(at, byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, row), generate
