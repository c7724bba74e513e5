"""Clients that stand between `prefill` and the real one: one notes what passed, one spoils it on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

from kvstore.client.kv_client import GetResult
from kvstore.client.plan import HitPlan
from kvstore.client.put_blocks import PutResult
from kvstore.integrations.transformers import BlockClient
from kvstore.keys import Chain
from kvstore.spec import ModelSpec
from kvstore.types import CommitToken


class Watched:
    """Passes everything on and keeps what went in and out, so that digests are taken outside the timing."""

    def __init__(self, client: BlockClient) -> None:
        self._client = client
        self._put: dict[str, Any] = {}
        self._got: dict[str, Any] = {}

    async def match(self, spec: ModelSpec, prefix: Chain, *, after: Iterable[CommitToken] = ()) -> HitPlan:
        return await self._client.match(spec, prefix, after=after)

    async def get(self, plan: HitPlan) -> GetResult:
        result = await self._client.get(plan)
        for depth in range(result.blocks):
            self._got[plan.keys[depth].hex()] = result.buffers[0][depth]
        return result

    async def put(self, spec: ModelSpec, prefix: Chain, blocks: Sequence[Any], first: int = 0) -> PutResult:
        result = await self._client.put(spec, prefix, blocks, first)
        for index, state in enumerate(result.states):
            if state == "committed":
                self._put[prefix.keys[first + index].hex()] = blocks[index]
        return result

    def stored(self) -> dict[str, str]:
        """SHA-256 of the raw bytes of each block that the service took from here, by key."""
        return {key: sha256(block).hexdigest() for key, block in self._put.items()}

    def loaded(self) -> dict[str, str]:
        """SHA-256 of the raw bytes of each block that the service gave, by key."""
        return {key: sha256(block).hexdigest() for key, block in self._got.items()}


class Zeroed:
    """The negative control: loads like the real one, then zeroes every block; stores nothing."""

    def __init__(self, client: BlockClient) -> None:
        self._client = client

    async def match(self, spec: ModelSpec, prefix: Chain, *, after: Iterable[CommitToken] = ()) -> HitPlan:
        return await self._client.match(spec, prefix, after=after)

    async def get(self, plan: HitPlan) -> GetResult:
        result = await self._client.get(plan)
        for row in result.buffers:
            for block in row:
                block[:] = 0
        return result

    async def put(self, spec: ModelSpec, prefix: Chain, blocks: Sequence[Any], first: int = 0) -> PutResult:
        return PutResult()
