"""The baseline of `bench engine`: a vLLM connector that keeps blocks in a dictionary of its own process.

Blocks are as long as ours, so that both leave the same tokens to compute. Nothing is shared, checked, bounded, evicted:
what is left of a connector when there is no service. Loads are whole before the request is computed, saves are copies;
keys are hashes of the tokens so far.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

BLOCK_TOKENS = 64

PAGES: dict[bytes, list[list[torch.Tensor]]] = {}
"""Key of a block -> of each of its pages, the bytes of every layer."""

CACHES: list[torch.Tensor] = []


@dataclass
class Work(KVConnectorMetadata):  # type: ignore[misc]
    loads: list[tuple[bytes, list[int]]] = field(default_factory=list)  # (key, page ids)
    saves: list[tuple[bytes, list[int]]] = field(default_factory=list)


class DictConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Synchronous; one group of full attention; one rank."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._pages = BLOCK_TOKENS // vllm_config.cache_config.block_size
        self._keys: dict[str, list[bytes]] = {}
        self._work = Work()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        CACHES[:] = list(kv_caches.values())

    def _hashed(self, request: Any) -> list[bytes]:
        keys = self._keys.get(request.request_id)
        if keys is None:
            parent, keys = b"", []
            tokens = request.prompt_token_ids
            for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
                parent = sha256(parent + array("I", tokens[start : start + BLOCK_TOKENS]).tobytes()).digest()
                keys.append(parent)
            self._keys[request.request_id] = keys
        return keys

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        held = 0
        for key in self._hashed(request)[: (request.num_tokens - 1) // BLOCK_TOKENS]:
            if key not in PAGES:
                break
            held += 1
        return max(0, held * BLOCK_TOKENS - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        ids, keys = blocks.get_block_ids()[0], self._hashed(request)
        held = num_external_tokens // BLOCK_TOKENS
        self._work.loads += zip(keys[:held], self._by_block(ids), strict=False)

    def _by_block(self, ids: list[int]) -> list[list[int]]:
        return [ids[first : first + self._pages] for first in range(0, len(ids), self._pages)]

    def build_connector_meta(self, scheduler_output: Any) -> Work:
        for new in scheduler_output.scheduled_new_reqs:
            keys = self._keys.get(new.req_id, [])
            done = (new.num_computed_tokens + scheduler_output.num_scheduled_tokens[new.req_id]) // BLOCK_TOKENS
            self._work.saves += zip(keys[:done], self._by_block(new.block_ids[0]), strict=False)
        work, self._work = self._work, Work()
        return work

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for key, ids in self._get_connector_metadata().loads:
            for page, layers in zip(ids, PAGES[key], strict=True):
                for cache, stored in zip(CACHES, layers, strict=True):
                    cache[page].copy_(stored)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        for key, ids in self._get_connector_metadata().saves:
            if key not in PAGES:
                PAGES[key] = [[cache[page].clone() for cache in CACHES] for page in ids]

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self._keys.pop(request.request_id, None)
        return False, None
