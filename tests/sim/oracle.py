"""What may come back: every put that was ever tried, and the judgement of every answer a client gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kvstore.checksum import xxh3
from kvstore.client.kv_client import GetResult
from kvstore.client.needs import needed_depths
from kvstore.client.plan import HitPlan
from kvstore.layout import block_bytes, cut
from kvstore.spec import ModelSpec, Shard
from tests.sim.load import HALVES

Id = tuple[str, bytes, bytes]
"""(namespace, shard digest, key)"""


class Violation(AssertionError):
    """An invariant does not hold."""


class Oracle:
    """Remembers; judges."""

    def __init__(self) -> None:
        self._puts: dict[Id, dict[bytes, None]] = {}  # raw blocks
        self._copies: dict[Id, dict[int, None]] = {}  # their checksums
        self.seen: Counter[str] = Counter()

    def tried(self, namespace: str, shard: Shard, key: bytes, raw: bytes) -> None:
        """A client is about to put this. Mutates."""
        id = (namespace, shard.digest, key)
        self._puts.setdefault(id, {})[raw] = None
        self._copies.setdefault(id, {})[xxh3(raw)] = None

    def known(self, namespace: str, shard: bytes, key: bytes) -> bool:
        """Whether anybody ever put a block of that name (I10: in that namespace)."""
        return (namespace, shard, key) in self._puts

    def is_copy(self, namespace: str, shard: bytes, key: bytes, copy_id: int) -> bool:
        """Whether that is the checksum of one of its puts."""
        return copy_id in self._copies.get((namespace, shard, key), {})

    def judge_plan(self, namespace: str, plan: HitPlan) -> None:
        """I9: at each depth that a group's rule needs, stored rectangles that together fill the needed one. I10: of
        blocks that somebody put in this namespace."""
        for shard in plan.shards:
            cells = [(shard.layer_first, head) for head in range(shard.head_first, shard.head_first + shard.head_count)]
            for depth in needed_depths(plan, shard):
                here = [run.shard for run in plan.runs if run.first_depth <= depth < run.first_depth + run.count]
                if not all(any(_covers(have, shard, head) for have in here) for _, head in cells):
                    raise Violation(f"I9: depth {depth} of {plan.blocks} is matched, but nobody holds {shard} there")
        for run in plan.runs:
            for depth in range(run.first_depth, run.first_depth + run.count):
                if not self.known(namespace, run.shard.digest, plan.keys[depth]):
                    raise Violation(f"I10: {namespace} is told of a block at {run.holder} that nobody put there")

    def judge(self, namespace: str, plan: HitPlan, result: GetResult) -> None:
        """I1, for every block that is said to be delivered, also beyond the contiguous ones."""
        for index, shard in enumerate(plan.shards):
            for depth, tier in enumerate(result.tiers[index]):
                if tier is None:
                    continue
                got = bytes(result.buffers[index][depth])
                if not self._made(namespace, plan.spec, shard, plan.keys[depth], got):
                    raise Violation(f"I1: wrong bytes for depth {depth} of {shard} from {tier.name}")
                self.seen[f"blocks_{tier.name.lower()}"] += 1
        self.seen["gets"] += 1

    def _made(self, namespace: str, spec: ModelSpec, shard: Shard, key: bytes, got: bytes) -> bool:
        """Whether `got` is one put, or put together from puts of the rectangles that are stored, each from one."""
        if got in self._puts.get((namespace, shard.digest, key), {}):
            return True
        if spec != HALVES.spec:
            return False
        if shard in HALVES.shards:
            return any(raw == got for raw in self._cuts(namespace, spec, Shard.whole(spec), shard, key))
        for half in HALVES.shards:
            target = memoryview(bytearray(block_bytes(spec, half)))
            cut(spec, shard, half, got, target)
            if not self._made(namespace, spec, half, key, bytes(target)):
                return False
        self.seen["assembled"] += 1
        return True

    def _cuts(self, namespace: str, spec: ModelSpec, stored: Shard, wanted: Shard, key: bytes) -> Iterator[bytes]:
        for raw in self._puts.get((namespace, stored.digest, key), {}):
            target = memoryview(bytearray(block_bytes(spec, wanted)))
            cut(spec, stored, wanted, raw, target)
            yield bytes(target)


def _covers(have: Shard, want: Shard, head: int) -> bool:
    """Whether a stored rectangle has all needed layers of one head."""
    return (
        have.group == want.group
        and have.layer_first <= want.layer_first
        and want.layer_first + want.layer_count <= have.layer_first + have.layer_count
        and have.head_first <= head < have.head_first + have.head_count
    )
