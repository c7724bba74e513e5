"""How long a prefix is held: each group by its own rule, each needed rectangle from whatever stored ones cover it.

Knows nothing of holders: the caller says at which depths a stored shard is held (`Held`). The rules (DESIGN: lookup):
full attention, latent and opaque pages need every block; a sliding window needs the blocks of the last `window`
tokens; recurrent state needs exactly the last block. All groups and needed shards must agree on one length, which is
not the least of each: a state may be held at depth 5 and 9 only, so the search goes downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.spec import OPAQUE_PREFIX, ModelSpec, Shard

CHUNK = 256
"""Depths asked for at a time, so that a chain missed early costs little."""

Held = Callable[[int, int, int], bytes]
"""(position of a stored shard, start, stop) -> one byte per depth start..stop-1, 1 where it is held, else 0."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which blocks of a group a prefix of n blocks needs: those at depth `first_needed(n)`..n-1."""

    window_blocks: int = 0  # 0: all of them

    def first_needed(self, blocks: int) -> int:
        return 0 if self.window_blocks == 0 else max(0, blocks - self.window_blocks)


def rule_of(spec: ModelSpec, group: int) -> Rule:
    """The rule of one group of the spec."""
    kind = spec.groups[group].kind
    if kind == "state":
        return Rule(1)
    if kind == "sliding":
        return Rule(-(-spec.groups[group].window // spec.block_tokens))
    return Rule()


@dataclass(frozen=True, slots=True)
class Cover:
    """How one needed shard is put together: stored shards that meet it, widest first, with the cells each fills.

    The needed rectangle is cut into cells along every stored shard's edges; a set of cells is a bitmask.
    """

    rule: Rule
    full: int  # all cells
    sources: tuple[tuple[int, int], ...]  # (position of the stored shard, cells)


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to be asked for a set of needed shards, given the stored shards of a keyspace. Reusable for any keys."""

    covers: tuple[Cover, ...]

    def sources(self) -> list[tuple[int, Rule]]:
        """Every stored shard that serves some needed one, once, in the order of the needs."""
        rules = {position: cover.rule for cover in self.covers for position, _ in cover.sources}
        return list(rules.items())

    def only_source(self) -> int | None:
        """The stored shard whose own unbroken prefix is the answer, where it is as simple as that: the common case."""
        if len(self.covers) != 1 or self.covers[0].rule.window_blocks or len(self.covers[0].sources) != 1:
            return None
        position, cells = self.covers[0].sources[0]
        return position if cells == self.covers[0].full else None


def make_plan(spec: ModelSpec, needed: Sequence[Shard], stored: Sequence[Shard]) -> Plan:
    """Which stored shards serve the needed ones. BadRequest where a needed one is no rectangle of the spec. Pure."""
    opaque = spec.layout.startswith(OPAQUE_PREFIX)
    covers = []
    for want in dict.fromkeys(needed):
        want.check(spec)
        rule = rule_of(spec, want.group)
        if opaque:
            sources = tuple((position, 1) for position, have in enumerate(stored) if have == want)
            covers.append(Cover(rule, 1, sources))
        else:
            covers.append(_cover(want, rule, stored))
    return Plan(tuple(covers))


def longest(plan: Plan, held: Held, length: int) -> int:
    """The greatest n <= `length` whose needed blocks are all held, for every cover. O(length) per source. Pure."""
    if not plan.covers:
        return 0
    upper = length
    for cover in plan.covers:
        if cover.rule.window_blocks == 0:
            upper = _prefix(cover, held, upper)
    windows: dict[Rule, bytearray] = {}
    for cover in plan.covers:
        if cover.rule.window_blocks and upper:
            flags = _covered(cover, held, 0, upper)
            both = windows.get(cover.rule)
            windows[cover.rule] = flags if both is None else bytearray(map(int.__and__, both, flags))
    ends = [_ends(flags, rule.window_blocks) for rule, flags in windows.items()]
    while upper and not all(end[upper - 1] for end in ends):
        upper -= 1
    return upper


def _ends(flags: bytearray, window: int) -> bytearray:
    """1 where a prefix may end: the last min(n, window) flags are set."""
    if window == 1:
        return flags
    ends = bytearray(len(flags))
    run = 0
    for depth, flag in enumerate(flags):
        run = run + 1 if flag else 0
        ends[depth] = run >= min(window, depth + 1)
    return ends


def _prefix(cover: Cover, held: Held, limit: int) -> int:
    """Leading depths covered without a gap, at most `limit`."""
    for start in range(0, limit, CHUNK):
        stop = min(start + CHUNK, limit)
        gap = _covered(cover, held, start, stop).find(0)
        if gap >= 0:
            return start + gap
    return limit


def _covered(cover: Cover, held: Held, start: int, stop: int) -> bytearray:
    """One byte per depth, 1 where the held sources fill all cells."""
    flags = bytearray(stop - start)
    cells = [0] * (stop - start)
    missing: Sequence[int] = range(stop - start)
    for position, fills in cover.sources:
        source = held(position, start, stop)
        if fills == cover.full:
            if 0 not in source:
                return bytearray(source)
            for at in missing:
                if source[at]:
                    flags[at] = 1
        else:
            for at in missing:
                if source[at]:
                    cells[at] |= fills
                    if cells[at] == cover.full:
                        flags[at] = 1
        missing = [at for at in missing if not flags[at]]
        if not missing:
            break
    return flags


def _cover(want: Shard, rule: Rule, stored: Sequence[Shard]) -> Cover:
    overlaps = [(position, both) for position, have in enumerate(stored) if (both := want.overlap(have)) is not None]
    layers = {want.layer_first, want.layer_first + want.layer_count}
    heads = {want.head_first, want.head_first + want.head_count}
    for _, both in overlaps:
        layers |= {both.layer_first, both.layer_first + both.layer_count}
        heads |= {both.head_first, both.head_first + both.head_count}
    row = {edge: index for index, edge in enumerate(sorted(layers))}
    column = {edge: index for index, edge in enumerate(sorted(heads))}
    width = len(column) - 1

    def cells(both: Shard) -> int:
        first, last = column[both.head_first], column[both.head_first + both.head_count]
        across = (1 << last) - (1 << first)
        mask = 0
        for layer in range(row[both.layer_first], row[both.layer_first + both.layer_count]):
            mask |= across << (layer * width)
        return mask

    filled = [(position, cells(both)) for position, both in overlaps]
    filled.sort(key=lambda source: -source[1].bit_count())  # stable: ties stay in the order of the stored shards
    return Cover(rule, cells(want), tuple(filled))
