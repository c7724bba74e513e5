"""Scales of the quantising codecs: ranges by integer reductions, bf16 scales, rows of float32 to compute with.

A bf16 is the upper half of a float32. As an `ordered` int16 (sign and magnitude made two's complement) its order is the
order of the values, so that minima and maxima are integer reductions: exact, and vectorised without fastmath.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit

U8, U16, U32, I16, I32, F32 = np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32

LARGEST = 0x7E80
"""Magnitude bits of 2^126: from here on (infinities and NaN too) nothing is quantised, or a range could overflow."""

SMALLEST_SCALE = 0x0380
"""Bits of 2^-120: a smaller scale counts as 0, or its reciprocal could overflow."""


@jit
def widen(bits: Any) -> Any:
    """float32 of a bf16."""
    return U32(U32(bits) << U32(16)).view(np.float32)


@jit
def narrow(value: Any) -> Any:
    """bf16 of a finite float32, to nearest, ties to even."""
    bits = F32(value).view(np.uint32)
    return U16(U32(bits + U32(0x7FFF) + U32(U32(bits >> U32(16)) & U32(1))) >> U32(16))


@jit
def ordered(bits: Any) -> Any:
    """int16 in the order of the values; its own inverse but for the type."""
    value = I16(bits)
    return I16(value ^ I16(I16(value >> I16(15)) & I16(0x7FFF)))


@jit
def scale_up(value: Any) -> Any:
    """The next bf16 at or above a float32 that is not negative; 0 where that is tiny."""
    bits = U32(F32(value).view(np.uint32) + U32(0xFFFF)) >> U32(16)
    return U16(bits) if bits >= U32(0x0380) else U16(0)


@jit
def inverse(scale: Any) -> Any:
    """1 / scale in float32, 0 of 0."""
    return F32(F32(1.0) / widen(scale)) if scale != U16(0) else F32(0.0)


@jit
def steps(bits: Any, least: Any, inv: Any) -> Any:
    """(bf16 - least) * inv, rounded to nearest, ties to even, by adding 2^23: in the lower bits of what is returned."""
    return F32(F32(F32(widen(bits) - least) * inv) + F32(8388608.0)).view(np.uint32)


@jit
def value_of(q: Any, scale: Any, least: Any) -> Any:
    """bf16 of q * scale + least, each operation rounded to float32."""
    return narrow(F32(F32(F32(I32(q)) * scale) + least))


@jit
def column_ranges(x: Any, first: Any, rows: Any, cols: Any, low: Any, high: Any) -> Any:
    """Ordered minimum and maximum per column of `rows` rows from `first` on. False where a value is too large."""
    for c in range(cols):
        low[c] = I16(32767)
        high[c] = I16(-32768)
    for t in range(first, first + rows):
        row = x[t * cols : t * cols + cols]
        for c in range(cols):
            value = ordered(row[c])
            low[c] = min(low[c], value)
            high[c] = max(high[c], value)
    return within(low[:cols], high[:cols])


@jit
def tile_ranges(x: Any, first: Any, rows: Any, cols: Any, low: Any, high: Any) -> Any:
    """The same per row and tile of 64 columns."""
    tiles = (cols + 63) // 64
    for t in range(rows):
        row = x[(first + t) * cols : (first + t) * cols + cols]
        for tile in range(cols // 64):
            least, most = I16(32767), I16(-32768)
            for c in range(64):
                value = ordered(row[tile * 64 + c])
                least = min(least, value)
                most = max(most, value)
            low[t * tiles + tile] = least
            high[t * tiles + tile] = most
        if cols % 64:
            least, most = I16(32767), I16(-32768)
            for c in range(cols // 64 * 64, cols):
                value = ordered(row[c])
                least = min(least, value)
                most = max(most, value)
            low[t * tiles + tiles - 1] = least
            high[t * tiles + tiles - 1] = most
    return within(low[: rows * tiles], high[: rows * tiles])


@jit
def row_ranges(x: Any, first: Any, rows: Any, cols: Any, low: Any, high: Any) -> Any:
    """The same per row."""
    for t in range(rows):
        row = x[(first + t) * cols : (first + t) * cols + cols]
        least, most = I16(32767), I16(-32768)
        for c in range(cols):
            value = ordered(row[c])
            least = min(least, value)
            most = max(most, value)
        low[t] = least
        high[t] = most
    return within(low[:rows], high[:rows])


@jit
def within(low: Any, high: Any) -> Any:
    """Whether all ranges lie within what is quantised."""
    for k in range(low.size):
        if high[k] >= I16(0x7E80) or low[k] <= I16(-0x7E80 - 1):
            return False
    return True


@jit
def affine(low: Any, high: Any, steps: Any, heads: Any, scale: Any, least: Any, inv: Any) -> Any:
    """Scale and least value of each range: stored in `heads` (all scales, then all least values) and as float32.

    Mutates the last four. Loops of few arrays each, or LLVM does not vectorise them.
    """
    n = low.size
    for k in range(n):
        bottom = U16(ordered(U16(low[k])))
        heads[n + k] = bottom
        least[k] = widen(bottom)
    for k in range(n):
        scale[k] = F32(F32(widen(U16(ordered(U16(high[k])))) - least[k]) / steps)
    for k in range(n):
        heads[k] = scale_up(scale[k])
    for k in range(n):
        scale[k] = widen(heads[k])
        inv[k] = inverse(heads[k])


@jit
def symmetric(low: Any, high: Any, heads: Any, scale: Any, inv: Any) -> Any:
    """Scale of each range for 127 steps to either side, stored in `heads` and as float32. Mutates the last three."""
    for k in range(low.size):
        top = max(abs(widen(U16(ordered(U16(high[k]))))), abs(widen(U16(ordered(U16(low[k]))))))
        scale[k] = F32(F32(top) / F32(127.0))
    for k in range(low.size):
        heads[k] = scale_up(scale[k])
    for k in range(low.size):
        scale[k] = widen(heads[k])
        inv[k] = inverse(heads[k])


@jit
def stored(heads: Any, factor: Any, shift: Any, scale: Any, least: Any) -> Any:
    """The float32 scales and least values behind `heads`, for values `factor` * q + `shift`. Mutates the last two."""
    n = heads.size // 2
    for k in range(n):
        scale[k] = widen(heads[k])
        least[k] = F32(widen(heads[n + k]) + F32(scale[k] * shift))
    for k in range(n):
        scale[k] = F32(scale[k] * factor)
