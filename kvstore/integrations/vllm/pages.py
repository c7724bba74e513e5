"""Copies between the engine's pages and raw blocks. A raw block is opaque: [layer, page of the block, byte]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import SetupError
from kvstore.integrations.vllm.identity import Layout


class Pages:
    """The pages of one group on one rank, as bytes: one [page, byte] view per layer, sharing the engine's memory."""

    def __init__(self, layout: Layout, block_tokens: int, caches: Mapping[str, Any], page_count: int) -> None:
        self.layout = layout
        self.pages_a_block = block_tokens // layout.page_tokens
        self.block_bytes = len(layout.layers) * self.pages_a_block * layout.page_bytes
        layers = [as_pages(caches[name], page_count, layout.page_bytes) for name in layout.layers]
        self.on_cpu = all(view.device.type == "cpu" for view in layers)
        self._layers: list[Any] = [view.numpy() for view in layers] if self.on_cpu else layers

    def gather(self, pages: Sequence[int], blocks: Sequence[NDArray[np.uint8]]) -> None:
        """Copy whole blocks out of the engine; mutates `blocks`, each `block_bytes` of uint8. `pages` are those of all
        blocks, in order."""
        for layer, view in enumerate(self._layers):
            for index, page in enumerate(pages):
                block, slot = divmod(index, self.pages_a_block)
                self._copy(self._rows(blocks[block])[layer, slot], view[page])

    def scatter(self, blocks: Sequence[NDArray[np.uint8]], pages: Sequence[int], skip: int) -> None:
        """Copy raw blocks into the engine's pages; mutates those. The first `skip` pages of the first block stay as
        they are; `pages` begin after them. Page 0 is the engine's null page: nothing is written there."""
        for layer, view in enumerate(self._layers):
            for index, page in enumerate(pages):
                block, slot = divmod(skip + index, self.pages_a_block)
                if page:
                    self._copy(view[page], self._rows(blocks[block])[layer, slot])

    def _rows(self, block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return block.reshape(len(self._layers), self.pages_a_block, self.layout.page_bytes)

    @staticmethod
    def _copy(target: Any, source: Any) -> None:
        if isinstance(target, np.ndarray) and isinstance(source, np.ndarray):
            np.copyto(target, source)
        elif isinstance(target, np.ndarray):
            torch.from_numpy(target).copy_(source)
        else:
            target.copy_(torch.from_numpy(source))


def as_pages(cache: Any, page_count: int, page_bytes: int) -> Any:
    """A layer's KV cache tensor as uint8 [page, byte], sharing memory. SetupError where a page is not one piece."""
    if not isinstance(cache, torch.Tensor):
        raise SetupError(f"a KV cache that is a {type(cache).__name__} is not supported: attention pages only")
    width = cache.element_size()
    if page_bytes % width or cache.numel() * width != page_count * page_bytes:
        raise SetupError(f"a KV cache of {cache.numel() * width} bytes is not {page_count} pages of {page_bytes}")
    sizes = sorted(zip(cache.stride(), cache.shape, strict=True), reverse=True)
    dense = 1
    for stride, size in reversed(sizes):
        if size != 1 and stride != dense:
            raise SetupError("the KV cache has gaps between its elements: this page layout is not supported")
        dense *= size
    if cache.stride(0) * cache.shape[0] != cache.numel():
        raise SetupError("the KV cache is not laid out page by page: this page layout is not supported")
    flat = torch.as_strided(cache, (cache.numel(),), (1,), cache.storage_offset())
    return flat.view(torch.uint8).view(page_count, page_bytes)
