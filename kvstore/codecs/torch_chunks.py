"""The codecs made for KV in torch, chunk by chunk, bit for bit as the kernels: on any device. docs/FORMAT.md.

Every function takes and gives tensors of one device. Every float32 operation stands alone and in the same order as in
the kernels, so that nothing is contracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

Form = tuple[int, int, int, int]

GROUP, TILE, SPAN = 64, 64, 1 << 16
LARGEST, SMALLEST_SCALE = 0x7E80, 0x0380  # see kvstore.kernels.scales
ROUND, ROUND_SIGNED = 8388608.0, 12582912.0  # 2^23, 1.5 * 2^23


# ---- bytes and integers


def integers(raw: Tensor, itemsize: int) -> Tensor:
    """int64 values of little-endian unsigned elements in uint8 `raw`."""
    rows = raw.reshape(-1, itemsize).to(torch.int64)
    value = rows[:, 0].clone()
    for byte in range(1, itemsize):
        value |= rows[:, byte] << (8 * byte)
    return value


def raw_of(values: Tensor, itemsize: int) -> Tensor:
    """Inverse of `integers`."""
    return torch.stack([values >> (8 * byte) & 255 for byte in range(itemsize)], -1).to(torch.uint8).reshape(-1)


def widths(bits: int) -> list[int]:
    """Planes of a value, from the bottom."""
    return [1 << power for power in range(4, -1, -1) if bits >> power & 1]


def pack(values: Tensor, width: int) -> Tensor:
    """[row, column] of `width`-bit integers as uint8: several rows share bytes where they are narrow."""
    if width >= 8:
        return raw_of(values.reshape(-1), width // 8)
    rows, share = values.shape[0], 8 // width
    part = -(-rows // share)
    packed = torch.zeros((part, values.shape[1]), dtype=torch.int64, device=values.device)
    for turn in range(share):
        some = values[turn * part : (turn + 1) * part]
        packed[: len(some)] |= some << (turn * width)
    return packed.to(torch.uint8).reshape(-1)


def unpack(packed: Tensor, rows: int, columns: int, width: int) -> Tensor:
    """Inverse of `pack`."""
    if width >= 8:
        return integers(packed, width // 8).reshape(rows, columns)
    share = 8 // width
    part = packed.reshape(-1, columns).to(torch.int64)
    turns = [part >> (turn * width) & ((1 << width) - 1) for turn in range(share)]
    return torch.cat(turns)[:rows]


def plane_bytes(rows: int, columns: int, width: int) -> int:
    return rows * columns * (width // 8) if width >= 8 else -(-rows // (8 // width)) * columns


# ---- fast lossless


def fast_encode_chunk(raw: Tensor, rows: int, columns: int, form: Form, room: int) -> Tensor | None:
    """Stored bytes of one chunk; None where they would be more than `room`, or escapes too many."""
    itemsize, exponent_bits, mantissa_bits, code_bits = form
    codes, bits = 1 << code_bits, code_bits + 1 + mantissa_bits
    values = integers(raw, itemsize).reshape(rows, columns)
    exponents = values >> mantissa_bits & ((1 << exponent_bits) - 1)
    bases = (exponents.max(0).values - (codes - 1)).clamp(min=0)
    code = exponents - bases
    escaped = ((code < 0) | (code >= codes)).reshape(-1).nonzero().reshape(-1)
    spans = -(-rows * columns // SPAN)
    head = columns + sum(plane_bytes(rows, columns, w) for w in widths(bits)) + 4 * spans
    if head + (2 + itemsize) * len(escaped) > room:
        return None
    sign = values >> (mantissa_bits + exponent_bits)
    made = values & ((1 << mantissa_bits) - 1) | sign << mantissa_bits | (code & (codes - 1)) << (mantissa_bits + 1)
    parts, shift = [bases.to(torch.uint8)], 0
    for width in widths(bits):
        parts.append(pack(made >> shift & ((1 << width) - 1), width))
        shift += width
    counts = torch.bincount(escaped // SPAN, minlength=spans)
    raws = values.reshape(-1)[escaped]
    parts += [raw_of(counts, 4), raw_of(escaped % SPAN, 2), raw_of(raws, itemsize)]
    return torch.cat(parts)


def fast_decode_chunk(stored: Tensor, rows: int, columns: int, form: Form) -> Tensor | None:
    """Raw bytes of one chunk; None where the bytes are no such chunk."""
    itemsize, exponent_bits, mantissa_bits, code_bits = form
    bits, spans = code_bits + 1 + mantissa_bits, -(-rows * columns // SPAN)
    sizes = [plane_bytes(rows, columns, w) for w in widths(bits)]
    at, shift = columns, 0
    if len(stored) < columns + sum(sizes) + 4 * spans:
        return None
    made = torch.zeros((rows, columns), dtype=torch.int64, device=stored.device)
    for width, size in zip(widths(bits), sizes, strict=True):
        made |= unpack(stored[at : at + size], rows, columns, width) << shift
        at, shift = at + size, shift + width
    exponent = ((made >> (mantissa_bits + 1)) + stored[:columns].to(torch.int64)) & ((1 << exponent_bits) - 1)
    sign = made >> mantissa_bits & 1
    made = made & ((1 << mantissa_bits) - 1) | exponent << mantissa_bits | sign << (mantissa_bits + exponent_bits)
    counts = integers(stored[at : at + 4 * spans], 4)
    total, first = int(counts.sum()), at + 4 * spans
    if len(stored) != first + (2 + itemsize) * total:
        return None
    places = torch.repeat_interleave(torch.arange(spans, device=stored.device) * SPAN, counts)
    places = places + integers(stored[first : first + 2 * total], 2)
    if total and int(places.max()) >= rows * columns:
        return None
    flat = made.reshape(-1)
    flat[places] = integers(stored[first + 2 * total :], itemsize)
    return raw_of(flat, itemsize)


# ---- scales


def widen(bits: Tensor) -> Tensor:
    """float32 of bf16 bits."""
    return (bits << 16).to(torch.int32).view(torch.float32)


def bits_of(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def narrow(values: Tensor) -> Tensor:
    """bf16 bits of finite float32, to nearest, ties to even."""
    bits = bits_of(values)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


def ordered(bits: Tensor) -> Tensor:
    """int64 in the order of the values of bf16 bits."""
    signed = torch.where(bits >= 0x8000, bits - 0x10000, bits)
    return torch.where(signed < 0, signed ^ 0x7FFF, signed)


def unordered(order: Tensor) -> Tensor:
    return torch.where(order < 0, order ^ 0x7FFF, order) & 0xFFFF


def scale_up(values: Tensor) -> Tensor:
    bits = (bits_of(values) + 0xFFFF) >> 16
    return torch.where(bits >= SMALLEST_SCALE, bits, torch.zeros_like(bits))


def inverse(scale: Tensor) -> Tensor:
    one = torch.ones(scale.shape, dtype=torch.float32, device=scale.device)
    return torch.where(scale != 0, one / widen(scale), torch.zeros_like(one))


def too_large(bits: Tensor) -> bool:
    return bool(((bits & 0x7FFF) >= LARGEST).any())


def per_group(group: Tensor, by_row: bool, whole_rows: bool) -> Tensor:
    """A group [row, column] with the elements that share a scale along the last axis but one: [.., element, scale]."""
    if not by_row:
        return group
    rows, columns = group.shape
    tile = columns if whole_rows else TILE
    padded = torch.cat([group, group[:, -1:].expand(rows, -columns % tile)], 1)  # a repeat changes no range
    return padded.reshape(-1, tile).T


def spread(scales: Tensor, rows: int, columns: int, by_row: bool, whole_rows: bool) -> Tensor:
    """[row, column] of each element's scale."""
    if not by_row:
        return scales.expand(rows, columns)
    if whole_rows:
        return scales.reshape(rows, 1).expand(rows, columns)
    return scales.reshape(rows, -1).repeat_interleave(TILE, 1)[:, :columns]


def affine(group: Tensor, by_row: bool, steps: float) -> tuple[Tensor, Tensor]:
    """bf16 bits of scale and least value of each range of a group of ordered values."""
    ranges = per_group(group, by_row, False)
    bottom = unordered(ranges.min(0).values)
    span = widen(unordered(ranges.max(0).values)) - widen(bottom)
    return scale_up(span / torch.tensor(steps, dtype=torch.float32, device=group.device)), bottom


# ---- int8, int4, nested


def quantise(bits: Tensor, scale: Tensor, bottom: Tensor, by_row: bool, mask: int) -> Tensor:
    rows, columns = bits.shape
    least, over = (
        spread(widen(bottom), rows, columns, by_row, False),
        spread(inverse(scale), rows, columns, by_row, False),
    )
    return bits_of((widen(bits) - least) * over + ROUND) & mask


def values_of(q: Tensor, scale: Tensor, bottom: Tensor, by_row: bool, factor: float, shift: float) -> Tensor:
    """bf16 bits of q * (scale * factor) + (bottom + scale * shift)."""
    rows, columns = q.shape
    step = widen(scale)
    least = widen(bottom) + step * shift
    step = step * factor
    wide = q.to(torch.float32) * spread(step, rows, columns, by_row, False)
    return narrow(wide + spread(least, rows, columns, by_row, False))


def halves(q: Tensor) -> Tensor:
    return pack(q, 4)


def int4_encode_chunk(raw: Tensor, rows: int, columns: int, by_row: bool) -> Tensor | None:
    """Stored bytes; None where a value is too large."""
    bits = integers(raw, 2).reshape(rows, columns)
    if too_large(bits):
        return None
    parts = []
    for group in bits.split(GROUP):
        scale, bottom = affine(ordered(group), by_row, 15.0)
        parts += [raw_of(scale, 2), raw_of(bottom, 2), halves(quantise(group, scale, bottom, by_row, 15))]
    return torch.cat(parts)


def _groups(rows: int) -> list[int]:
    return [min(GROUP, rows - first) for first in range(0, rows, GROUP)]


def int4_decode_chunk(
    stored: Tensor, rows: int, columns: int, by_row: bool, factor: float = 1.0, shift: float = 0.0
) -> Tensor:
    """Raw bytes of a chunk of the right length."""
    at, parts = 0, []
    for n in _groups(rows):
        scale, bottom, at = _heads(stored, at, n, columns, by_row)
        size = (n + 1) // 2 * columns
        parts.append(values_of(unpack(stored[at : at + size], n, columns, 4), scale, bottom, by_row, factor, shift))
        at += size
    return raw_of(torch.cat(parts).reshape(-1), 2)


def _heads(stored: Tensor, at: int, n: int, columns: int, by_row: bool) -> tuple[Tensor, Tensor, int]:
    count = n * -(-columns // TILE) if by_row else columns
    scale, bottom = integers(stored[at : at + 4 * count], 2).split(count)
    return scale, bottom, at + 4 * count


def int8_encode_chunk(raw: Tensor, rows: int, columns: int, by_row: bool) -> Tensor | None:
    bits = integers(raw, 2).reshape(rows, columns)
    if too_large(bits):
        return None
    parts = []
    for group in bits.split(GROUP):
        top = per_group(widen(group).abs(), by_row, True).max(0).values
        scale = scale_up(top / torch.tensor(127.0, dtype=torch.float32, device=raw.device))
        over = spread(inverse(scale), len(group), columns, by_row, True)
        q = bits_of(widen(group) * over + ROUND_SIGNED) & 255
        parts += [raw_of(scale, 2), q.to(torch.uint8).reshape(-1)]
    return torch.cat(parts)


def int8_decode_chunk(stored: Tensor, rows: int, columns: int, by_row: bool) -> Tensor:
    at, parts = 0, []
    for n in _groups(rows):
        count = n if by_row else columns
        scale = integers(stored[at : at + 2 * count], 2)
        at += 2 * count
        q = stored[at : at + n * columns].view(torch.int8).reshape(n, columns).to(torch.float32)
        parts.append(narrow(q * spread(widen(scale), n, columns, by_row, True)))
        at += n * columns
    return raw_of(torch.cat(parts).reshape(-1), 2)


def nested_encode_chunk(raw: Tensor, rows: int, columns: int, by_row: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Plane 0, plane 1 and the rest, as bytes; None where a value is too large."""
    bits = integers(raw, 2).reshape(rows, columns)
    if too_large(bits):
        return None
    high, low, rest = [], [], []
    for group in bits.split(GROUP):
        scale, bottom = affine(ordered(group), by_row, 255.0)
        q = quantise(group, scale, bottom, by_row, 255)
        high += [raw_of(scale, 2), raw_of(bottom, 2), halves(q >> 4)]
        low.append(halves(q & 15))
        far = ordered(group) - ordered(values_of(q, scale, bottom, by_row, 1.0, 0.0))
        far = (far + 0x8000 & 0xFFFF) - 0x8000
        rest.append(raw_of(((far << 1) ^ (far >> 15)).reshape(-1) & 0xFFFF, 2))
    return torch.cat(high), torch.cat(low), torch.cat(rest)


def nested_decode_chunk(
    high: Tensor, low: Tensor, rest: Tensor | None, rows: int, columns: int, by_row: bool
) -> Tensor:
    """Raw bytes of planes 0 and 1, and of the rest where it is given."""
    at, under, parts = 0, 0, []
    for n in _groups(rows):
        scale, bottom, at = _heads(high, at, n, columns, by_row)
        size = (n + 1) // 2 * columns
        q = unpack(high[at : at + size], n, columns, 4) << 4 | unpack(low[under : under + size], n, columns, 4)
        parts.append(values_of(q, scale, bottom, by_row, 1.0, 0.0))
        at, under = at + size, under + size
    bits = torch.cat(parts)
    if rest is not None:
        z = integers(rest, 2).reshape(rows, columns)
        far = ordered(bits) + ((z >> 1) ^ -(z & 1))
        bits = unordered((far + 0x8000 & 0xFFFF) - 0x8000)
    return raw_of(bits.reshape(-1), 2)
