"""Where a caller wants a block: one buffer, or several that follow each other (pages of an engine's cache)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np

from kvstore.errors import BadRequest
from kvstore.types import Buffer

TARGET_PARTS_MAX = 65_536
"""Buffers that one block may be scattered over."""


class Target:
    """Writable memory for `nbytes` of one raw block, in canonical order. Keeps it alive while it is in use."""

    __slots__ = ("_addresses", "nbytes", "parts", "starts", "whole")
    whole: memoryview | None
    starts: list[int]

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self.parts = parts
        self._addresses: list[int] = []  # found out at the first use, by whoever copies
        if len(parts) == 1:
            self.whole, self.starts, self.nbytes = parts[0], [0], len(parts[0])
            return
        self.whole = None
        self.starts = []
        self.nbytes = 0
        for part in parts:
            self.starts.append(self.nbytes)
            self.nbytes += len(part)

    def spans(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, memoryview]]:
        """(start, end, memory): the ranges of the block, from `offset` on, that lie in one piece. Pure."""
        if self.whole is not None:
            yield offset, offset + nbytes, self.whole[offset : offset + nbytes]
            return
        end = offset + nbytes
        for start, part in zip(self.starts, self.parts, strict=True):
            low, high = max(start, offset), min(start + len(part), end)
            if low < high:
                yield low, high, part[low - start : high - start]

    def places(self, offset: int, nbytes: int) -> list[tuple[int, int, int]]:
        """`spans` as (start, bytes, address). Remembers where its memory lies."""
        if not self._addresses:
            self._addresses = [addressof(c_char.from_buffer(part)) for part in self.parts]
        if self.whole is not None:
            return [(offset, nbytes, self._addresses[0] + offset)]
        end = offset + nbytes
        found = []
        for start, part, address in zip(self.starts, self.parts, self._addresses, strict=True):
            low, high = max(start, offset), min(start + len(part), end)
            if low < high:
                found.append((low, high - low, address + low - start))
        return found

    def fill(self, offset: int, raw: Buffer) -> None:
        """Copy `raw` to the block's bytes from `offset` on. Mutates the caller's memory; lets other threads run."""
        source = np.frombuffer(raw, np.uint8)
        for start, end, memory in self.spans(offset, len(source)):
            np.copyto(np.frombuffer(memory, np.uint8), source[start - offset : end - offset])


def target_of(given: Any, nbytes: int) -> Target:
    """A buffer, or a list or tuple of buffers. BadRequest unless writable, contiguous and `nbytes` together."""
    if not isinstance(given, (list, tuple)):
        views: Sequence[memoryview] = (_writable(given),)
        found = len(views[0])
    else:
        if len(given) > TARGET_PARTS_MAX:
            raise BadRequest(f"a block in {len(given)} buffers: at most {TARGET_PARTS_MAX}")
        views = [_writable(part) for part in given]
        found = sum(map(len, views))
    if found != nbytes:
        raise BadRequest(f"buffers of {found} bytes were given: a block needs {nbytes} here")
    return Target(views)


def _writable(buffer: Any) -> memoryview:
    view = buffer_of(buffer)
    if view.readonly:
        raise BadRequest("a buffer to load into is read-only")
    return view


def buffer_of(buffer: Any) -> memoryview:
    """The bytes of anything with a buffer: bytes, memoryviews, numpy arrays, CPU tensors of torch. BadRequest."""
    if type(buffer) is memoryview and buffer.format == "B" and buffer.c_contiguous and buffer.ndim == 1:
        return buffer
    torch = sys.modules.get("torch")  # whoever gives a tensor has imported it
    try:
        if torch is not None and isinstance(buffer, torch.Tensor):
            return _of_tensor(torch, buffer)
        view = memoryview(buffer)
    except (TypeError, RuntimeError):
        raise BadRequest(
            f"a {type(buffer).__name__} has no buffer: give numpy arrays, CPU tensors, memoryviews or bytes"
        ) from None
    if not view.c_contiguous:
        raise BadRequest("a buffer that is not contiguous was given")
    if view.nbytes == 0:
        raise BadRequest("a buffer of 0 bytes was given")
    return view.cast("B")


def _of_tensor(torch: Any, tensor: Any) -> memoryview:
    """Any dtype: numpy knows no bfloat16, so it is looked at as bytes."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise BadRequest("a tensor must be contiguous and lie in CPU memory")
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy()).cast("B")


def address_of(view: memoryview) -> int:
    """Where a contiguous buffer lies: of use while the buffer lives."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
