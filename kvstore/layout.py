"""Where each chunk lies in a block's raw bytes, and how one shard is cut from another. docs/FORMAT.md, "Layouts"."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import BadRequest
from kvstore.spec import DTYPES, Group, ModelSpec, Shard
from kvstore.types import Buffer

K, V, LATENT, STATE, OPAQUE = range(5)
"""Components, as stored in chunk tables."""

FLAT_ROWS = 64
"""Rows that codecs cut a page or state into, where it has so many factors of two."""

_BITS: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name if name in ("float64", "float32", "float16", "int8") else f"uint{size * 8}")
    for name, size in DTYPES.items()
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One run of raw bytes of one layer and component. All heads of the shard lie in one chunk."""

    layer: int  # within the group
    component: int
    head_first: int  # opaque: the page's index in the block
    head_count: int
    offset: int  # bytes, in the raw block
    nbytes: int
    shape: tuple[int, ...]  # [token, head, dim] of elements; state [head, byte]; opaque [byte]
    itemsize: int  # bytes of one element as codecs see it; 1 where unknown
    dtype: str  # of its elements; empty where unknown

    @property
    def rows(self) -> int:
        """Of the chunk as codecs see it, [row, column] of elements: tokens; of a page or state, up to 64."""
        if self.component in (STATE, OPAQUE):
            return gcd(self.nbytes // self.itemsize, FLAT_ROWS)
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.nbytes // self.itemsize // self.rows


def dtype_of(spec: ModelSpec) -> np.dtype[np.generic]:
    """Element type of canonical chunks; an unsigned integer of that width where numpy has no such float."""
    return _BITS[spec.dtype]


@lru_cache(maxsize=1024)
def chunks(spec: ModelSpec, shard: Shard) -> tuple[Chunk, ...]:
    """Chunks in canonical order (layer, component, head group; opaque: layer, page). BadRequest as `Shard.check`."""
    shard.check(spec)
    group = spec.groups[shard.group]
    pieces = _layer(spec, shard, group)
    made: list[Chunk] = []
    offset = 0
    for layer in range(shard.layer_first, shard.layer_first + shard.layer_count):
        for component, head_first, shape, width, dtype in pieces:
            nbytes = prod(shape) * width
            known = dtype if nbytes % DTYPES.get(dtype, 1) == 0 else ""
            itemsize = DTYPES.get(dtype, 1)
            made.append(Chunk(layer, component, head_first, shard.head_count, offset, nbytes, shape, itemsize, known))
            offset += nbytes
    return tuple(made)


def _layer(spec: ModelSpec, shard: Shard, group: Group) -> list[tuple[int, int, tuple[int, ...], int, str]]:
    """(component, head_first, shape, bytes of one element of shape, element type) of each chunk of one layer."""
    heads, head_first = shard.head_count, shard.head_first
    of_page = group.page_dtype
    per_head = group.page_bytes // group.kv_heads
    if group.kind == "state":
        return [(STATE, head_first, (heads, per_head), 1, of_page)]
    if group.kind == "opaque":
        pages = spec.block_tokens // group.page_tokens
        return [(OPAQUE, page, (heads * per_head,), 1, of_page) for page in range(pages)]
    width = DTYPES[spec.dtype]
    if group.kind == "latent":
        return [(LATENT, head_first, (spec.block_tokens, heads, group.k_dim), width, spec.dtype)]
    return [
        (K, head_first, (spec.block_tokens, heads, group.k_dim), width, spec.dtype),
        (V, head_first, (spec.block_tokens, heads, group.v_dim), width, spec.dtype),
    ]


@lru_cache(maxsize=1024)
def block_bytes(spec: ModelSpec, shard: Shard) -> int:
    """Raw bytes of one block of a shard."""
    last = chunks(spec, shard)[-1]
    return last.offset + last.nbytes


def cut(spec: ModelSpec, source: Shard, wanted: Shard, raw_source: Buffer, target: memoryview) -> int:
    """Copy what two rectangles share from a raw block of `source` into a raw block of `wanted`; mutates `target`.

    Returns the bytes copied, 0 where they share nothing. BadRequest for wrong lengths, or opaque pages of unequal
    shards: only whole pages are known there.
    """
    for shard, view, name in ((source, raw_source, "source"), (wanted, target, "target")):
        if len(view) != block_bytes(spec, shard):
            raise BadRequest(f"the {name} has {len(view)} bytes, a block of its shard has {block_bytes(spec, shard)}")
    shared = source.overlap(wanted)
    if source != wanted and spec.groups[source.group].kind == "opaque":
        raise BadRequest("opaque pages are served to an equal shard only: ask for the shard as it was stored")
    if shared is None:
        return 0
    into, out = np.frombuffer(target, np.uint8), np.frombuffer(raw_source, np.uint8)
    if source == wanted:
        np.copyto(into, out)
        return len(target)
    to, of = _rows(spec, wanted, shared), _rows(spec, source, shared)
    copied = 0
    for there, here in zip(to, of, strict=True):
        window = _heads(out, here, source, shared)
        np.copyto(_heads(into, there, wanted, shared), window)
        copied += window.size
    return copied


def _rows(spec: ModelSpec, shard: Shard, shared: Shard) -> list[Chunk]:
    last = shared.layer_first + shared.layer_count
    return [c for c in chunks(spec, shard) if shared.layer_first <= c.layer < last]


def _heads(raw: NDArray[np.uint8], chunk: Chunk, shard: Shard, shared: Shard) -> NDArray[np.uint8]:
    """The shared heads of one chunk as [token, head, byte]; a state has one row."""
    rows = 1 if chunk.component == STATE else chunk.shape[0]
    view = raw[chunk.offset : chunk.offset + chunk.nbytes].reshape(rows, shard.head_count, -1)
    first = shared.head_first - shard.head_first
    return view[:, first : first + shared.head_count]
