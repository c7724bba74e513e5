"""The loops of `kvstore.codecs.batch` in torch, where numba is missing. Importing it imports torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstore.codecs.batch import Bytes, Jobs, low_bytes, quant_bytes
from kvstore.codecs.registry import BY_FORM_ID
from kvstore.codecs.torch_chunks import (
    fast_decode_chunk,
    fast_encode_chunk,
    int4_decode_chunk,
    int4_encode_chunk,
    int8_decode_chunk,
    int8_encode_chunk,
    nested_decode_chunk,
    nested_encode_chunk,
)


def _put(dst: Bytes, start: int, room: int, made: Tensor | None, *, exact: bool) -> int:
    """Bytes written, -1 where nothing was made or it does not fit."""
    if made is None or len(made) > room or (exact and len(made) != room):
        return -1
    dst[start : start + len(made)] = made.cpu().numpy()
    return 0 if exact else len(made)


class Torch:
    """`kvstore.codecs.batch.Backend`, chunk by chunk, on one device: the same bits on every one."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def _tensor(self, buffer: Bytes) -> Tensor:
        return torch.from_numpy(buffer.copy()).to(self.device)

    def fast_encode(self, form: int, src: Bytes, dst: Bytes, jobs: Jobs) -> Jobs:
        def one(at: int, size: int, rows: int, columns: int, to: int, room: int) -> int:
            made = fast_encode_chunk(self._tensor(src[at : at + size]), rows, columns, BY_FORM_ID[form], room)
            return _put(dst, to, room, made, exact=False)

        return _each(jobs, one)

    def fast_decode(self, form: int, src: Bytes, dst: Bytes, jobs: Jobs) -> Jobs:
        def one(at: int, size: int, rows: int, columns: int, to: int, room: int) -> int:
            made = fast_decode_chunk(self._tensor(src[at : at + size]), rows, columns, BY_FORM_ID[form])
            return _put(dst, to, room, made, exact=True)

        return _each(jobs, one)

    def quant_encode(self, bits: int, src: Bytes, dst: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs:
        encode = int8_encode_chunk if bits == 8 else int4_encode_chunk

        def one(at: int, size: int, rows: int, columns: int, to: int, room: int, v: int) -> int:
            if quant_bytes(bits, rows, columns, bool(v)) > room:
                return -1
            return _put(dst, to, room, encode(self._tensor(src[at : at + size]), rows, columns, bool(v)), exact=False)

        return _each(np.column_stack([jobs, by_row]), one)

    def quant_decode(
        self, bits: int, src: Bytes, dst: Bytes, jobs: Jobs, by_row: Bytes, factor: float, shift: float
    ) -> Jobs:
        def one(at: int, size: int, rows: int, columns: int, to: int, room: int, v: int) -> int:
            if size != quant_bytes(bits, rows, columns, bool(v)):
                return -1
            stored = self._tensor(src[at : at + size])
            if bits == 8:
                return _put(dst, to, room, int8_decode_chunk(stored, rows, columns, bool(v)), exact=True)
            return _put(dst, to, room, int4_decode_chunk(stored, rows, columns, bool(v), factor, shift), exact=True)

        return _each(np.column_stack([jobs, by_row]), one)

    def nested_encode(self, src: Bytes, dst: Bytes, rest: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs:
        def one(
            at: int, size: int, rows: int, columns: int, to: int, room: int, low: int, more: int, place: int, v: int
        ) -> int:
            made = nested_encode_chunk(self._tensor(src[at : at + size]), rows, columns, bool(v))
            if made is None or _put(dst, to, room, made[0], exact=True) or _put(dst, low, more, made[1], exact=True):
                return -1
            return _put(rest, place, size, made[2], exact=True) if rest.size else 0

        return _each(np.column_stack([jobs, by_row]), one)

    def nested_decode(self, src: Bytes, dst: Bytes, rest: Bytes, jobs: Jobs, by_row: Bytes) -> Jobs:
        def one(
            at: int, size: int, rows: int, columns: int, to: int, room: int, low: int, more: int, place: int, v: int
        ) -> int:
            if size != quant_bytes(4, rows, columns, bool(v)) or more != low_bytes(rows, columns):
                return -1
            missing = self._tensor(rest[place : place + room]) if rest.size else None
            planes = self._tensor(src[at : at + size]), self._tensor(src[low : low + more])
            return _put(dst, to, room, nested_decode_chunk(*planes, missing, rows, columns, bool(v)), exact=True)

        return _each(np.column_stack([jobs, by_row]), one)


def _each(jobs: Jobs, one: Any) -> Jobs:
    return np.array([one(*map(int, job)) for job in jobs], np.int64)
