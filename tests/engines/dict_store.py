"""A store that is a dictionary in this process, behind the connector's own client interface."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvstore.engine_face import EngineClient
from kvstore.integrations.vllm.connector import KVStoreConnector
from kvstore.keys import Chain
from kvstore.plan import HitPlan
from kvstore.spec import ModelSpec, Shard
from kvstore.system import real_system
from kvstore.types import Tier

BLOCKS: dict[tuple[bytes, bytes], np.ndarray] = {}
"""(shard digest, key) -> raw bytes. Of the process: the connector's two sides are two clients."""

FAULTS = SimpleNamespace(zero=False, lose_from=None)


class DictClient:
    def __init__(self) -> None:
        self.system = real_system(2)

    async def match(self, spec: ModelSpec, prefix: Chain, shards: Sequence[Shard], **options: Any) -> HitPlan:
        held = 0
        while held < len(prefix) and all((shard.digest, prefix.keys[held]) in BLOCKS for shard in shards):
            held += 1
        return HitPlan(spec, tuple(prefix.keys[:held]), tuple(shards))

    async def get(self, plan: HitPlan, into: Any, *, first: int = 0, **options: Any) -> Any:
        tiers: list[list[Tier | None]] = [[None] * plan.blocks for _ in plan.shards]
        for index, shard in enumerate(plan.shards):
            for depth in range(first, plan.blocks):
                block = BLOCKS.get((shard.digest, plan.keys[depth]))
                if block is not None and (FAULTS.lose_from is None or depth < FAULTS.lose_from):
                    into[index][depth][:] = 0 if FAULTS.zero else block
                    tiers[index][depth] = Tier.HOT
        await asyncio.sleep(0)
        return SimpleNamespace(tiers=tiers)

    async def put(self, spec: ModelSpec, prefix: Chain, blocks: Any, first: int, shard: Shard, **options: Any) -> Any:
        states = []
        for depth, block in enumerate(blocks, first):
            held = (shard.digest, prefix.keys[depth]) in BLOCKS
            BLOCKS.setdefault((shard.digest, prefix.keys[depth]), block.copy())
            states.append("held" if held else "committed")
        return SimpleNamespace(states=states)

    async def close(self) -> None:
        self.system.pool.close()


class DictConnector(KVStoreConnector):
    @staticmethod
    def _client(config: Any) -> EngineClient:
        async def connect() -> Any:
            return DictClient()

        return EngineClient(config, connect=connect)
