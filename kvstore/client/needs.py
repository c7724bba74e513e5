"""What a get still needs, and which layers of it are whole by now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.client.pieces import Piece, layers_before, span_of
from kvstore.client.plan import HitPlan
from kvstore.client.targets import Target
from kvstore.directory.matching import rule_of
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier


@dataclass(slots=True)
class Need:
    """One needed block of `shard` at `depth`; `target` takes `wanted`: all of it, or some of its layers."""

    index: int  # of the shard among the needed ones
    shard: Shard
    wanted: Shard
    depth: int
    target: Target
    lost: dict[Shard, None] = field(default_factory=dict)  # stored rectangles no holder could give
    open: dict[int, Piece] = field(default_factory=dict)  # pieces still on their way, by identity
    pieces: list[Piece] = field(default_factory=list)  # that make it up now, those that came too
    aside: bytearray | None = None  # where heads are cut to, for a target in several parts
    failed: bool = False
    shown: bool = False  # the caller was told of layers of it
    tier: Tier | None = None  # the slowest that served a piece of it
    fidelity: Fidelity = Fidelity.EXACT  # the worst of its pieces

    @property
    def delivered(self) -> bool:
        return self.tier is not None and not self.failed and not self.open

    @property
    def missed(self) -> bool:
        return self.failed and not self.open

    def has(self, spec: ModelSpec, layer: int) -> bool:
        """Whether a layer (of its group) is here, of one copy a piece, and checked. Pure."""
        if self.delivered:
            return True
        mine = [p for p in self.pieces if p.shard.layer_first <= layer < p.shard.layer_first + p.shard.layer_count]
        return bool(mine) and self.aside is None and all(_has(spec, piece, layer) for piece in mine)


def _has(spec: ModelSpec, piece: Piece, layer: int) -> bool:
    if piece.tier is not None:
        return True
    span = span_of(spec, piece.shard, piece.wanted)
    if span is None:
        return False
    first = span.chunks[0].layer
    a_layer = len(span.chunks) // (span.chunks[-1].layer - first + 1)
    return piece.chunks >= span.first_chunk + (layer - first + 1) * a_layer


@dataclass(frozen=True, slots=True)
class LayerReady:
    """A layer of the model lies in the caller's memory for the leading `blocks` blocks, as far as is known now."""

    layer: int
    blocks: int


class Progress:
    """Tells of every layer once, in order, when all blocks that are not missed yet have it."""

    def __init__(self, plan: HitPlan, needs: Sequence[Need], first: int, tell: Callable[[LayerReady], object]) -> None:
        self._plan, self._needs, self._first, self._tell = plan, needs, first, tell
        self._waiting: Iterator[tuple[int, list[tuple[Need, int]]]] | None = None
        self._next: tuple[int, list[tuple[Need, int]]] | None = None

    def _by_layer(self) -> Iterator[tuple[int, list[tuple[Need, int]]]]:
        """(layer of the model, needs with it and which of their group it is), ascending."""
        alike: dict[int, tuple[int, range, list[Need]]] = {}  # by identity of the wanted shard, which most share
        for need in self._needs:
            wanted = need.wanted
            if id(wanted) not in alike:
                base = layers_before(self._plan.spec, wanted.group)
                first = base + wanted.layer_first
                alike[id(wanted)] = base, range(first, first + wanted.layer_count), []
            alike[id(wanted)][2].append(need)
        begin = min((layers.start for _, layers, _ in alike.values()), default=0)
        for layer in range(begin, max((layers.stop for _, layers, _ in alike.values()), default=0)):
            mine = [(need, layer - base) for base, layers, needs in alike.values() if layer in layers for need in needs]
            if mine:
                yield layer, mine

    def look(self) -> None:
        """Something came, or failed. Mutates; calls `tell`."""
        if self._waiting is None:  # at the first arrival: the request does not wait for it
            self._waiting = self._by_layer()
            self._next = next(self._waiting, None)
        spec = self._plan.spec
        while self._next is not None:
            layer, needs = self._next
            if not all(need.missed or need.has(spec, local) for need, local in needs):
                return
            blocks = self._blocks()
            if not blocks:
                return
            self._next = next(self._waiting, None)
            for need, _ in needs:
                need.shown = True
                for piece in need.pieces:
                    piece.shown = True
            self._tell(LayerReady(layer, blocks))

    def _blocks(self) -> int:
        if not any(need.missed for need in self._needs):
            return self._plan.blocks
        rows: list[list[Tier | None]] = [[Tier.HOT] * self._plan.blocks for _ in self._plan.shards]
        for need in self._needs:
            if need.missed:
                rows[need.index][need.depth] = None
        return delivered_blocks(self._plan, rows, self._first)


def delivered_blocks(plan: HitPlan, tiers: Sequence[Sequence[Tier | None]], first: int = 0) -> int:
    """The longest prefix whose needed blocks were all delivered; those before `first` are the caller's. O(n). Pure."""
    blocks = plan.blocks
    windows: list[tuple[int, list[int]]] = []  # (blocks needed, how many in a row end at each depth)
    for shard, row in zip(plan.shards, tiers, strict=True):
        window = rule_of(plan.spec, shard.group).window_blocks
        if not window:
            if None in row[first:blocks]:
                blocks = row.index(None, first)
            continue
        streaks = []
        streak = 0
        for depth in range(plan.blocks):
            streak = streak + 1 if depth < first or row[depth] is not None else 0
            streaks.append(streak)
        windows.append((window, streaks))
    while blocks and any(streaks[blocks - 1] < min(window, blocks) for window, streaks in windows):
        blocks -= 1
    return blocks


def needed_depths(plan: HitPlan, shard: Shard) -> range:
    """The blocks of the plan's prefix that a rectangle's group really reads, by its rule."""
    return range(rule_of(plan.spec, shard.group).first_needed(plan.blocks), plan.blocks)
