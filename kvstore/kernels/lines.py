"""Memory in lines of 64 bytes, for compiled loops: loaded exactly once, stored past the caches.

A store past the caches (non-temporal) need not read the line first, which is a third of the traffic of a copy from
memory to memory, and leaves what others keep in the cache alone. It pays where much more is written than is read again
soon; `fence` before anybody else is told. Where the processor has no such stores they are ordinary ones.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE_BYTES = 64
LINE = ir.VectorType(ir.IntType(64), LINE_BYTES // 8)
AHEAD_BYTES = 4096
"""How far before its use a line is asked for: the hardware's own looking ahead ends at a page."""

UNROLL = 4


class _LoadOnce(ir.LoadInstr):  # type: ignore[misc]
    """A volatile load: whoever writes there meanwhile, all uses of it see one value."""

    def descr(self, buf: list[str]) -> None:
        [pointer] = self.operands
        buf.append(f"load volatile {self.type}, {pointer.type} {pointer.get_reference()}, align 1\n")


def load_once(builder: Any, address: Any) -> Any:
    """The line at an i64 address of any alignment."""
    pointer = builder.inttoptr(address, LINE.as_pointer())
    made = _LoadOnce(builder.block, pointer)
    builder._insert(made)
    return made


def store_line(builder: Any, line: Any, address: Any, *, past_caches: bool) -> None:
    """A line to an i64 address, of any alignment or, past the caches, of 64 bytes."""
    stored = builder.store(line, builder.inttoptr(address, LINE.as_pointer()))
    stored.align = LINE_BYTES if past_caches else 1
    if past_caches:
        one = builder.module.add_metadata([ir.IntType(32)(1)])
        stored.set_metadata("nontemporal", one)


def ask_for(builder: Any, address: Any) -> None:
    """Begin to load a line that is read once. Never faults."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    wanted = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
    builder.call(function, [builder.inttoptr(address, byte), word(0), word(0), word(1)])


@intrinsic  # type: ignore[untyped-decorator]
def copy_lines(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """`count` times UNROLL lines from address `source` to `target`, a multiple of 64, past the caches."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there, here, count = arguments
        i64 = ir.IntType(64)
        with cgutils.for_range(builder, count, intp=i64) as loop:
            at = builder.mul(loop.index, i64(UNROLL * LINE_BYTES))
            here_at, there_at = builder.add(here, at), builder.add(there, at)
            steps = [i64(LINE_BYTES * step) for step in range(UNROLL)]
            for step in steps:
                ask_for(builder, builder.add(here_at, builder.add(step, i64(AHEAD_BYTES))))
            lines = [load_once(builder, builder.add(here_at, step)) for step in steps]
            for line, step in zip(lines, steps, strict=True):
                store_line(builder, line, builder.add(there_at, step), past_caches=True)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fence(typing: Any) -> Any:
    """What was stored past the caches is seen by others before anything stored from now on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
