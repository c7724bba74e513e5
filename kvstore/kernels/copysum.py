"""Copying blocks and summing what arrived, many in one step without the interpreter's lock: no wait for other threads.

The sum is XXH3-64 with seed 0 (Collet, the xxHash specification, "XXH3", inputs above 240 bytes). Addresses are plain
integers; the caller keeps what lies there alive and in bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvstore.kernels import jit
from kvstore.kernels.moves import _memcpy

STEP_BYTES = 256 << 10
"""Copied, then summed: it still lies in the core's cache. A multiple of a block of the sum, 1,024 bytes."""

SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
        "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
        "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
"""The specification's default secret."""

PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
MASK = (1 << 64) - 1
STRIPES = 16  # of 64 bytes, in a block
KEYS = np.stack([np.frombuffer(SECRET.tobytes()[8 * n : 8 * n + 64], np.uint64) for n in range(STRIPES)])
SCRAMBLE = np.frombuffer(SECRET.tobytes()[128:], np.uint64)
LAST = np.frombuffer(SECRET.tobytes()[121:185], np.uint64)
START = np.array(
    [PRIME32[2], PRIME64[0], PRIME64[1], PRIME64[2], PRIME64[3], PRIME32[1], PRIME64[4], PRIME32[0]], np.uint64
)


@intrinsic  # type: ignore[untyped-decorator]
def _load(typing: Any, address: Any) -> Any:
    """The u64 at an address of any alignment."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loaded = builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))
        loaded.align = 1
        return loaded

    return types.uint64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _blocks(typing: Any, address: Any, count: Any, sums: Any, keys: Any, scramble: Any) -> Any:
    """`count` blocks of 16 stripes from `address` on, into the eight lanes at address `sums`."""
    return types.void(types.uint64, types.uint64, types.uint64, types.uint64, types.uint64), _emit_blocks


def _emit_blocks(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    address, count, sums, keys, scramble = arguments
    i64 = ir.IntType(64)
    lanes = ir.VectorType(i64, 8)

    def const(value: int) -> Any:
        return ir.Constant(lanes, [value] * 8)

    def load(at: Any) -> Any:
        found = builder.load(builder.inttoptr(at, lanes.as_pointer()))
        found.align = 1
        return found

    swap = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    secret = [load(builder.add(keys, i64(64 * stripe))) for stripe in range(STRIPES)]
    stirring = load(scramble)
    kept = cgutils.alloca_once_value(builder, load(sums))
    with cgutils.for_range(builder, count, intp=i64) as loop:
        at = builder.add(address, builder.mul(loop.index, i64(1024)))
        acc = builder.load(kept)
        for stripe in range(STRIPES):
            data = load(builder.add(at, i64(64 * stripe)))
            key = builder.xor(data, secret[stripe])
            product = builder.mul(builder.and_(key, const(0xFFFFFFFF)), builder.lshr(key, const(32)))
            acc = builder.add(builder.add(acc, product), builder.shuffle_vector(data, data, swap))
        acc = builder.xor(builder.xor(acc, builder.lshr(acc, const(47))), stirring)
        builder.store(builder.mul(acc, const(PRIME32[0])), kept)
    stored = builder.store(builder.load(kept), builder.inttoptr(sums, lanes.as_pointer()))
    stored.align = 1
    return context.get_dummy_value()


@jit
def _stripe(at: Any, keys: Any, sums: Any) -> None:
    low = np.uint64(0xFFFFFFFF)
    for lane in range(0, 8, 2):
        one = _load(at + np.uint64(8 * lane))
        two = _load(at + np.uint64(8 * lane + 8))
        one_key, two_key = one ^ keys[lane], two ^ keys[lane + 1]
        sums[lane] += two + (one_key & low) * (one_key >> np.uint64(32))
        sums[lane + 1] += one + (two_key & low) * (two_key >> np.uint64(32))


@jit
def copy_and_sum(targets: Any, sources: Any, nbytes: Any, sums: Any, keys: Any, scramble: Any, last: Any) -> None:
    """Copy `nbytes[i]` (each over 240) from `sources[i]` to `targets[i]`; mutates `sums`, (n, 8) of START, to the
    lanes of the sum of what arrived, for `finish`."""
    for index in range(targets.size):
        there, here, total = targets[index], sources[index], np.int64(nbytes[index])
        lanes = np.uint64(sums[index].ctypes.data)
        blocks = (total - 1) // 1024
        done = np.int64(0)
        for step in range(0, total, STEP_BYTES):
            size = min(np.int64(STEP_BYTES), total - step)
            _memcpy(there + np.uint64(step), here + np.uint64(step), np.uint64(size))
            upto = min(blocks, (step + size) // 1024)
            _blocks(
                there + np.uint64(1024 * done),
                np.uint64(upto - done),
                lanes,
                np.uint64(keys.ctypes.data),
                np.uint64(scramble.ctypes.data),
            )
            done = upto
        rest = there + np.uint64(1024 * blocks)
        for stripe in range((total - 1 - 1024 * blocks) // 64):
            _stripe(rest + np.uint64(64 * stripe), keys[stripe], sums[index])
        _stripe(there + np.uint64(total - 64), last, sums[index])


def finish(lanes: list[int], nbytes: int) -> int:
    """XXH3-64 from the lanes."""
    secret = SECRET.tobytes()
    result = nbytes * PRIME64[0] & MASK
    for pair in range(4):
        left, right = (int.from_bytes(secret[11 + 16 * pair + at : 19 + 16 * pair + at], "little") for at in (0, 8))
        product = (lanes[2 * pair] ^ left) * (lanes[2 * pair + 1] ^ right)
        result += (product ^ product >> 64) & MASK
    result &= MASK
    result ^= result >> 37
    result = result * 0x165667919E3779F9 & MASK
    return result ^ result >> 32


def copy_all(jobs: list[tuple[memoryview, memoryview]]) -> list[int]:
    """Every source into its target, contiguous and equally long, over 240 bytes; XXH3-64 of what arrived in each."""
    held = [(np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)) for source, target in jobs]
    sources = np.array([source.ctypes.data for source, _ in held], np.uint64)
    targets = np.array([target.ctypes.data for _, target in held], np.uint64)
    nbytes = np.array([source.nbytes for source, _ in held], np.uint64)
    sums = np.tile(START, (len(held), 1))
    copy_and_sum(targets, sources, nbytes, sums, KEYS, SCRAMBLE, LAST)
    return [finish(lanes, size) for lanes, size in zip(sums.tolist(), nbytes.tolist(), strict=True)]
