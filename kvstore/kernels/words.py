"""Single numbers at plain addresses, for compiled loops over columns that others own. Little-endian, of any alignment.

The caller keeps what lies there alive and in bounds. A look is volatile: it is made where it stands, once, also when
another process writes there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_NUMBERS = {(8, False): types.uint8, (16, False): types.uint16, (32, False): types.uint32, (64, False): types.uint64,
            (32, True): types.int32, (64, True): types.int64}  # fmt: skip


class _Look(ir.LoadInstr):  # type: ignore[misc]
    def descr(self, buf: list[str]) -> None:
        [pointer] = self.operands
        buf.append(f"load volatile {self.type}, {pointer.type} {pointer.get_reference()}, align 1\n")


def _look(bits: int, signed: bool = False) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def look(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            found = _Look(builder.block, builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer()))
            builder._insert(found)
            return found

        return _NUMBERS[bits, signed](types.uint64), generate

    return look


def _write(bits: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def write(typing: Any, address: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            stored = builder.store(arguments[1], builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer()))
            stored.align = 1
            return context.get_dummy_value()

        return types.void(types.uint64, _NUMBERS[bits, False]), generate

    return write


u8, u16, u32, u64 = (_look(bits) for bits in (8, 16, 32, 64))
i32, i64 = _look(32, signed=True), _look(64, signed=True)
put_u8, put_u16, put_u32, put_u64 = (_write(bits) for bits in (8, 16, 32, 64))
