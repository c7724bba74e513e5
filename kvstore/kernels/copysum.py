"""Copying blocks and summing what arrived, many in one step without the interpreter's lock: no wait for other threads.

The sum is XXH3-64 with seed 0 (Collet, the xxHash specification, "XXH3", inputs above 240 bytes). Addresses are plain
integers; the caller keeps what lies there alive and in bounds.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvstore.kernels import jit
from kvstore.kernels.lines import AHEAD_BYTES, LINE, LINE_BYTES, ask_for, fence, load_once, store_line
from kvstore.kernels.moves import _memcpy

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
STRIPES = 16  # of 64 bytes, in a block
SECRETS = np.stack(
    [np.frombuffer(SECRET.tobytes()[at : at + 64], np.uint64) for at in (*range(0, 8 * STRIPES, 8), 128, 121, 11)]
)
"""A row for each stripe of a block, then for stirring after a block, for the last stripe, and for the end."""

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
def _blocks(typing: Any, target: Any, source: Any, count: Any, sums: Any, keys: Any, scramble: Any) -> Any:
    """`count` blocks of 16 stripes from address `source` to `target`, a multiple of 64, past the caches, and into the
    eight lanes at address `sums`. Each stripe is loaded once: what is stored is what was summed."""
    six = (types.uint64,) * 6
    return types.void(*six), functools.partial(_emit_blocks, past_caches=True)


@intrinsic  # type: ignore[untyped-decorator]
def _unaligned_blocks(typing: Any, target: Any, source: Any, count: Any, sums: Any, keys: Any, scramble: Any) -> Any:
    """`_blocks` to a target of any alignment, through the caches."""
    six = (types.uint64,) * 6
    return types.void(*six), functools.partial(_emit_blocks, past_caches=False)


def _emit_blocks(context: Any, builder: Any, signature: Any, arguments: Any, *, past_caches: bool) -> Any:
    target, source, count, sums, keys, scramble = arguments
    i64 = ir.IntType(64)

    def const(value: int) -> Any:
        return ir.Constant(LINE, [value] * 8)

    def load(at: Any) -> Any:
        found = builder.load(builder.inttoptr(at, LINE.as_pointer()))
        found.align = 1
        return found

    swap = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    secret = [load(builder.add(keys, i64(64 * stripe))) for stripe in range(STRIPES)]
    stirring = load(scramble)
    kept = cgutils.alloca_once_value(builder, load(sums))
    with cgutils.for_range(builder, count, intp=i64) as loop:
        step = builder.mul(loop.index, i64(1024))
        here, there = builder.add(source, step), builder.add(target, step)
        acc = builder.load(kept)
        for stripe in range(STRIPES):
            ask_for(builder, builder.add(here, i64(64 * stripe + AHEAD_BYTES)))
            data = load_once(builder, builder.add(here, i64(64 * stripe)))
            store_line(builder, data, builder.add(there, i64(64 * stripe)), past_caches=past_caches)
            key = builder.xor(data, secret[stripe])
            product = builder.mul(builder.and_(key, const(0xFFFFFFFF)), builder.lshr(key, const(32)))
            acc = builder.add(builder.add(acc, product), builder.shuffle_vector(data, data, swap))
        acc = builder.xor(builder.xor(acc, builder.lshr(acc, const(47))), stirring)
        builder.store(builder.mul(acc, const(PRIME32[0])), kept)
    stored = builder.store(builder.load(kept), builder.inttoptr(sums, LINE.as_pointer()))
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
def _folded(left: Any, right: Any) -> Any:
    """Both halves of the 128-bit product, one upon the other."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b, c, d = left & low, left >> half, right & low, right >> half
    middle = b * c + (a * c >> half)
    crossed = a * d + (middle & low)
    return (left * right) ^ (b * d + (middle >> half) + (crossed >> half))


@jit
def _finish(lanes: Any, keys: Any, nbytes: Any) -> Any:
    """XXH3-64 from the lanes."""
    result = nbytes * np.uint64(PRIME64[0])
    for lane in range(0, 8, 2):
        result += _folded(lanes[lane] ^ keys[lane], lanes[lane + 1] ^ keys[lane + 1])
    result ^= result >> np.uint64(37)
    result *= np.uint64(0x165667919E3779F9)
    return result ^ result >> np.uint64(32)


@jit
def copy_and_sum(targets: Any, sources: Any, nbytes: Any, sums: Any, secrets: Any) -> None:
    """Copy `nbytes[i]` (each over 240) from `sources[i]` to `targets[i]`; mutates `sums`, (n, 8) of START: XXH3-64 of
    what arrived is first in each row. `secrets`: SECRETS."""
    for index in range(targets.size):
        there, here, total = targets[index], sources[index], np.int64(nbytes[index])
        lanes, blocks = np.uint64(sums[index].ctypes.data), (total - 1) // 1024
        secret, stirring, count = (
            np.uint64(secrets.ctypes.data),
            np.uint64(secrets[STRIPES].ctypes.data),
            np.uint64(blocks),
        )
        if there & np.uint64(LINE_BYTES - 1):
            _unaligned_blocks(there, here, count, lanes, secret, stirring)
        else:
            _blocks(there, here, count, lanes, secret, stirring)
        rest = np.uint64(1024 * blocks)
        _memcpy(there + rest, here + rest, np.uint64(total) - rest)
        fence()  # the last line may reach back into what went past the caches
        for stripe in range((total - 1 - 1024 * blocks) // 64):
            _stripe(there + rest + np.uint64(64 * stripe), secrets[stripe], sums[index])
        _stripe(there + np.uint64(total - 64), secrets[STRIPES + 1], sums[index])
        sums[index, 0] = _finish(sums[index], secrets[STRIPES + 2], np.uint64(total))


def copy_all(jobs: list[tuple[memoryview, memoryview]]) -> list[int]:
    """Every source into its target, contiguous and equally long, over 240 bytes; XXH3-64 of what arrived in each."""
    held = [(np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)) for source, target in jobs]
    sources = np.array([source.ctypes.data for source, _ in held], np.uint64)
    targets = np.array([target.ctypes.data for _, target in held], np.uint64)
    nbytes = np.array([source.nbytes for source, _ in held], np.uint64)
    sums = np.tile(START, (len(held), 1))
    copy_and_sum(targets, sources, nbytes, sums, SECRETS)
    found: list[int] = sums[:, 0].tolist()
    return found
