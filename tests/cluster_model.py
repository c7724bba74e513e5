"""A directory written the plain way, to hold the real one against, and small fake models to ask about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from kvstore.directory.directory import Directory, Match
from kvstore.directory.runs import Run
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.types import Fidelity, Tier

TOKENS = 4  # of a block
FULL_GROUP = Group("full", layers=2, kv_heads=4, k_dim=2, v_dim=2)
SLIDING_GROUP = Group("sliding", layers=2, kv_heads=4, k_dim=2, v_dim=2, window=2 * TOKENS + 1)  # three blocks
STATE_GROUP = Group("state", layers=1, kv_heads=2, page_bytes=64)
LATENT_GROUP = Group("latent", layers=4, k_dim=8)
OPAQUE_GROUP = Group("opaque", layers=2, kv_heads=4, page_tokens=2, page_bytes=64)

FULL = ModelSpec("test/full", (FULL_GROUP,), block_tokens=TOKENS)
FULL_SLIDING = ModelSpec("test/full-sliding", (FULL_GROUP, SLIDING_GROUP), block_tokens=TOKENS)
FULL_STATE = ModelSpec("test/full-state", (FULL_GROUP, STATE_GROUP), block_tokens=TOKENS)
SLIDING_STATE = ModelSpec("test/sliding-state", (SLIDING_GROUP, STATE_GROUP), block_tokens=TOKENS)
LATENT = ModelSpec("test/latent", (LATENT_GROUP,), block_tokens=TOKENS)
OPAQUE = ModelSpec("test/opaque", (OPAQUE_GROUP,), block_tokens=TOKENS, layout="opaque:test")
SPECS = (FULL, FULL_SLIDING, FULL_STATE, SLIDING_STATE, LATENT, OPAQUE)


def chain(spec: ModelSpec, length: int, branch: bytes = b"") -> list[bytes]:
    """Keys of a made-up prompt; `branch` tells prompts apart."""
    keys = [sha256(spec.root + branch).digest()[:16]]
    while len(keys) < length:
        keys.append(sha256(keys[-1]).digest()[:16])
    return keys[:length]


def run_of(
    spec: ModelSpec,
    shard: Shard,
    keys: Sequence[bytes],
    first: int,
    stop: int,
    tier: Tier = Tier.HOT,
    fidelity: Fidelity = Fidelity.EXACT,
    stored_bytes: int = 64,
) -> Run:
    """Blocks first..stop-1 of a chain, as one run."""
    parent = keys[first - 1] if first else spec.root
    return Run(spec.root, shard.digest, tier, fidelity, parent, first, tuple(keys[first:stop]), keys[0], stored_bytes)


def halves(spec: ModelSpec, group: int = 0) -> tuple[Shard, Shard]:
    """What two tensor-parallel ranks hold of a group."""
    whole = Shard.whole(spec, group)
    half = whole.head_count // 2
    return (
        Shard(group, 0, whole.layer_count, 0, half),
        Shard(group, 0, whole.layer_count, half, whole.head_count - half),
    )


def rectangles(spec: ModelSpec) -> list[Shard]:
    """Shards worth trying: wholes, head halves, layer halves, a head range that straddles the halves."""
    found: list[Shard] = []
    for index, group in enumerate(spec.groups):
        found.append(Shard.whole(spec, index))
        if group.kv_heads > 1:
            found += halves(spec, index)
        if group.layers > 1:
            half = group.layers // 2
            found += [
                Shard(index, 0, half, 0, group.kv_heads),
                Shard(index, half, group.layers - half, 0, group.kv_heads),
            ]
        if group.kv_heads > 2:
            found.append(Shard(index, 0, group.layers, 1, 2))
    return found


@dataclass
class Kept:
    """What the model knows of one holder."""

    blocks: dict[tuple[bytes, bytes], tuple[Tier, Fidelity, int]] = field(default_factory=dict)  # (shard, key)
    hidden: bool = False


class Model:
    """A directory as a dict of dicts, matched by trying every length, every block and every cell."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.shards = {shard.digest: shard for shard in rectangles(spec)}
        self.holders: dict[str, Kept] = {}

    def add(self, holder: str, run: Run) -> None:
        kept = self.holders.setdefault(holder, Kept())
        for key in run.keys:
            kept.blocks[run.shard, key] = run.tier, run.fidelity, run.stored_bytes

    def remove(self, holder: str, shard: bytes, keys: Sequence[bytes]) -> None:
        for key in keys:
            if holder in self.holders:
                self.holders[holder].blocks.pop((shard, key), None)

    def usable(self, shard: Shard, key: bytes, least: Fidelity) -> set[tuple[str, Tier, Fidelity]]:
        found = set()
        for holder, kept in self.holders.items():
            block = kept.blocks.get((shard.digest, key))
            if block is not None and not kept.hidden and block[1] >= least:
                found.add((holder, block[0], block[1]))
        return found

    def covered(self, needed: Shard, key: bytes, least: Fidelity) -> bool:
        stored = [shard for shard in self.shards.values() if self.usable(shard, key, least)]
        if self.spec.layout != "canonical":
            return needed in stored
        return all(
            any(shard.contains(Shard(needed.group, layer, 1, head, 1)) for shard in stored)
            for layer in range(needed.layer_first, needed.layer_first + needed.layer_count)
            for head in range(needed.head_first, needed.head_first + needed.head_count)
        )

    def needs(self, group: int, length: int) -> range:
        """Depths that a prefix of `length` blocks needs of one group: DESIGN's sentence."""
        kind = self.spec.groups[group].kind
        if kind == "state":
            return range(length - 1, length)
        if kind == "sliding":
            first_token = length * TOKENS - self.spec.groups[group].window
            return range(max(0, first_token // TOKENS), length)
        return range(length)

    def match(self, keys: Sequence[bytes], needed: Sequence[Shard], least: Fidelity) -> int:
        for length in range(len(keys) if needed else 0, 0, -1):
            if all(
                self.covered(shard, keys[depth], least) for shard in needed for depth in self.needs(shard.group, length)
            ):
                return length
        return 0

    def named(
        self, keys: Sequence[bytes], needed: Sequence[Shard], least: Fidelity, length: int
    ) -> set[tuple[object, ...]]:
        """(holder, stored shard, tier, fidelity, depth) that an answer of `length` blocks has to name."""
        found: set[tuple[object, ...]] = set()
        for want in needed if length else ():
            for stored in self.shards.values():
                meets = stored == want if self.spec.layout != "canonical" else stored.overlap(want) is not None
                for depth in self.needs(want.group, length) if meets else ():
                    found |= {(h, stored, t, f, depth) for h, t, f in self.usable(stored, keys[depth], least)}
        return found


def directory_for(spec: ModelSpec, **bounds: int) -> Directory:
    """A directory that knows the spec and every shard of `rectangles`."""
    directory = Directory(**bounds)
    directory.learn_spec(spec)
    for shard in rectangles(spec):
        directory.learn_shard(shard)
    return directory


def check_answer(match: Match, model: Model, keys: Sequence[bytes], needed: Sequence[Shard], least: Fidelity) -> None:
    """The answer is the model's: its length (I9), and every holder of every block it needs, in whole runs."""
    assert match.blocks == model.match(keys, needed, least)
    named = [
        (run.holder, run.shard, run.tier, run.fidelity, depth)
        for run in match.runs
        for depth in range(run.first_depth, run.first_depth + run.count)
    ]
    assert len(set(named)) == len(named), "a block of a holder named twice"
    assert set(named) == model.named(keys, needed, least, match.blocks)
    kinds = {(run.holder, run.shard, run.tier, run.fidelity, run.first_depth) for run in match.runs}
    for run in match.runs:
        ends = (run.holder, run.shard, run.tier, run.fidelity, run.first_depth + run.count)
        assert ends not in kinds, "two runs that are one"
    for shard in {run.shard for run in match.runs}:
        tiers = [run.tier for run in match.runs if run.shard == shard]
        assert tiers == sorted(tiers), "a slower tier first"
