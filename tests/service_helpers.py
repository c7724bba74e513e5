"""Helpers of the service tests: small models, bounded waiting, a holder without a store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from kvstore.catalog import Catalog
from kvstore.directory.announce import Outbox
from kvstore.directory.membership import Member
from kvstore.directory.runs import Added, Change, Removed, Run, in_chain_order, to_runs
from kvstore.keys import Chain, chain
from kvstore.layout import block_bytes
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import Fidelity, Tier
from kvstore.wire import common_pb2

FULL = ModelSpec("full", (Group(layers=2, kv_heads=4, k_dim=8, v_dim=8),), dtype="float32", block_tokens=4)
LARGE = ModelSpec("large", (Group(layers=2, kv_heads=4, k_dim=64, v_dim=64),), dtype="float32", block_tokens=16)
"""Its blocks fill a generation unit of the arena each."""
TWO_GROUPS = ModelSpec(
    "two",
    (
        Group(layers=2, kv_heads=4, k_dim=8, v_dim=8),
        Group("sliding", layers=2, kv_heads=4, k_dim=8, v_dim=8, window=8),
    ),
    dtype="float32",
    block_tokens=4,
)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition; AssertionError with `what` when it does not come."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"within {timeout_s} s it did not come true that {what}") from None


def prompt(seed: int, blocks: int, spec: ModelSpec = FULL) -> Chain:
    """The chain of a prompt of random tokens."""
    tokens = np.random.default_rng(seed).integers(0, 1 << 31, blocks * spec.block_tokens, dtype=np.uint32)
    return chain(spec, tokens)


def payload(spec: ModelSpec, shard: Shard, key: bytes, copy: int = 0) -> np.ndarray:
    """Raw bytes of a block: a function of shard, key and copy."""
    seed = int.from_bytes(key, "little") ^ int.from_bytes(shard.digest, "little") ^ copy
    return np.random.default_rng(seed).integers(0, 256, block_bytes(spec, shard), dtype=np.uint8)


class ListSource:
    """`workers.announcer.Source` over a dict: what a store tells of itself, without bytes."""

    def __init__(self, worker: str = "w", epoch: int = 1, outbox: int = 1000) -> None:
        self.catalog = Catalog()
        self.worker, self.epoch = worker, epoch
        self.held: dict[str, dict[tuple[bytes, bytes], Added]] = {}
        self.outboxes: dict[str, Outbox] = {}
        self._limit = outbox
        self.fenced_by: list[int] = []

    def member(self) -> Member:
        return Member(self.worker, self.epoch, "127.0.0.1:1", "/nowhere", "host", "node")

    def namespaces(self) -> Sequence[str]:
        return list(self.outboxes)

    def outbox(self, namespace: str) -> Outbox:
        return self.outboxes[namespace]

    def snapshot(self, namespace: str) -> tuple[int, list[Run]]:
        return self.outboxes[namespace].head, to_runs(in_chain_order(self.held[namespace].values()))

    def status(self) -> common_pb2.WorkerStatus:
        return common_pb2.WorkerStatus(counters={"beats": 1}, pid=7)

    async def fenced(self, epoch: int) -> None:
        self.fenced_by.append(epoch)
        self.epoch = epoch + 1

    def _push(self, namespace: str, change: Change) -> int:
        held = self.held.setdefault(namespace, {})
        if isinstance(change, Added):
            held[change.shard, change.key] = change
        else:
            held.pop((change.shard, change.key), None)
        return self.outboxes.setdefault(namespace, Outbox(self._limit)).push(change)

    def add(self, namespace: str, prefix: Chain, shard: Shard | None = None, tier: Tier = Tier.HOT) -> int:
        """Hold every block of a chain; the last number."""
        spec = prefix.spec
        shard = shard or Shard.whole(spec)
        self.catalog.learn_spec(spec)
        self.catalog.learn_shard(shard)
        seq = 0
        for depth, key in enumerate(prefix.keys):
            added = Added(
                root=spec.root,
                shard=shard.digest,
                key=key,
                parent=prefix.parent(depth),
                group=prefix.group(depth),
                depth=depth,
                tier=tier,
                fidelity=Fidelity.EXACT,
                stored_bytes=100,
            )
            seq = self._push(namespace, added)
        return seq

    def remove(self, namespace: str, prefix: Chain, shard: Shard | None = None) -> int:
        digest = (shard or Shard.whole(prefix.spec)).digest
        seq = 0
        for key in prefix.keys:
            seq = self._push(namespace, Removed(digest, key))
        return seq
