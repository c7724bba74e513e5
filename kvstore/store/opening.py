"""Opening: blocks pinned where readers can map them, loaded first where they lie below."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.open_rows import FOUND
from kvstore.policies.usage import Rows
from kvstore.store.holds import Hold, Holds
from kvstore.store.loading import Loading
from kvstore.store.movement import Movement
from kvstore.store.promotion import Promotion
from kvstore.store.stack import Stack
from kvstore.store.together import find, prepared
from kvstore.types import BlockId, Fidelity, Keys, Tier
from kvstore.wanted import Pair, Wanted


@dataclass(slots=True)
class Begun:
    """Blocks that are being opened, and what is still to be done."""

    hold: Hold
    namespace: str
    root: bytes
    wanted: Wanted
    least: Fidelity
    redis: bool  # look there too
    away: list[int] = field(default_factory=list)  # which of them to load
    used: list[Rows] = field(default_factory=list)  # known here, and the policy not yet told
    poor: int = 0  # here, and not good enough


class Opening:
    """One per store."""

    def __init__(self, stack: Stack, movement: Movement, loading: Loading, promotion: Promotion) -> None:
        self.stack = stack
        self.movement = movement
        self.loading = loading
        self.promotion = promotion
        self.holds = Holds(stack)

    async def open(
        self,
        namespace: str,
        root: bytes,
        wanted: Sequence[Pair],
        least: Fidelity,
        *,
        redis: bool,
    ) -> Hold:
        """(shard digest, key) blocks in the arena, held until `release` or `hold_max_s`; None for each that is not to
        be had. `redis`: look there too. Cancelled: nothing is held."""
        begun = self.begin(namespace, root, Wanted.of(wanted), least, redis=redis)
        await self.finish(begun)
        self.served(begun)
        return begun.hold

    def begin(self, namespace: str, root: bytes, wanted: Wanted, least: Fidelity, *, redis: bool) -> Begun:
        """Open what lies in the arena. Mutates. The caller sees to the rest: `finish`, then `served`."""
        hold = self.holds.begin(len(wanted))
        begun = Begun(hold, namespace, root, wanted, least, redis and self.stack.redis is not None)
        try:
            self._here(begun)
        except BaseException:
            self.holds.end(hold.id)
            raise
        return begun

    async def finish(self, begun: Begun) -> None:
        """Load what does not. Mutates; nothing is held when it raises."""
        if not begun.away:
            return
        try:
            self._used(begun)
            loads = [self._load(begun, index) for index in begun.away]
            for error in await asyncio.gather(*loads, return_exceptions=True):
                if error is not None:
                    raise error
        except BaseException:
            self.release(begun.hold.id)
            raise

    def _here(self, begun: Begun) -> None:
        """Take what lies in the arena; which of the others to load. Mutates."""
        stack, hold, at = self.stack, begun.hold, 0
        names, least, elsewhere = (begun.namespace, begun.root), begun.least, begun.redis
        for shard, keys in begun.wanted.groups:
            if prepared():
                taken = find(stack, *names, shard, keys, least, hold.words[at : at + len(keys)])
                self.holds.keep(hold, range(at, at + len(keys)), taken)
                known, missing, refused = taken.known, taken.away(elsewhere), taken.poor
            else:
                known, missing, refused = self._one_by_one(hold, at, *names, shard, keys, least, elsewhere)
            begun.used.append(known)
            begun.poor += refused
            begun.away += [at + index for index in missing]
            at += len(keys)

    def _used(self, begun: Begun) -> None:
        """Tell the policy, once. Mutates."""
        if begun.used:
            stack, used = self.stack, np.concatenate(begun.used)
            stack.planes.opened(begun.namespace, begun.least, len(used) + begun.poor)
            # deepest first, so that no parent is older than its child
            stack.advice.opened(used[::-1], stack.system.clock.monotonic())
            begun.used = []

    def _one_by_one(
        self, hold: Hold, first: int, namespace: str, root: bytes, shard: bytes, keys: Keys, least: Fidelity,
        elsewhere: bool,
    ) -> tuple[Rows, list[int], int]:  # fmt: skip
        """What `find` and `Holds.keep` do, until those are at hand: rows known, which are away, how many too poor."""
        stack, rows = self.stack, self.stack.residency.rows
        index, same_root = stack.residency.keys(namespace, shard), rows.known_root(root)
        away, known, poor = list[int](), list[int](), 0
        here: dict[int, tuple[list[int], list[int]]] = {}  # level -> (which of them, rows)
        for at, key in enumerate(keys):
            row = index.get(key)
            poor += row is not None and rows.fidelity[row] < least
            if row is None or rows.fidelity[row] < least:
                away += [at] * elsewhere
                continue
            known.append(row)
            level = stack.mapped(row, least)
            if level is None:
                away.append(at)
            elif rows.root[row] == same_root:
                mine = here.setdefault(level, ([], []))
                mine[0].append(first + at)
                mine[1].append(row)
        for level, mine in here.items():
            self.holds.take(hold, *mine, level)
        return np.array(known, np.int64), away, poor

    async def _load(self, begun: Begun, index: int) -> None:
        residency, hold, root, least = self.stack.residency, begun.hold, begun.root, begun.least
        id = BlockId(begun.namespace, *begun.wanted[index])
        found = await self.loading.load(id, root, least, redis=begun.redis)
        if found is None:
            return
        level, same = self.stack.mapped(found.row, least), residency.rows.root_of(found.row) == root
        if same and level is not None and self.holds.alive(hold.id):
            self.holds.take(hold, [index], [found.row], level, found.tier, pinned=True)
        else:
            residency.unpin(found.row)

    def served(self, begun: Begun) -> None:
        """Count what is open, tell the policy, promote what lies below. Mutates."""
        self._used(begun)
        residency, hold = self.stack.residency, begun.hold
        found = hold.rows[hold.rows["state"] == FOUND]
        for tier, count in enumerate(np.bincount(found["tier"]).tolist()):
            if count:
                self.stack.hits[Tier(tier)] += count
        raw_bytes = int(found["header"]["raw_length"].sum())
        self.stack.counters["misses"] += len(hold.rows) - len(found)
        spec = self.stack.catalog.spec(begun.root) if raw_bytes else None
        if spec is not None:  # a rank loads its part of a block: as many tokens as its bytes are of the whole block's
            self.stack.saved_tokens += spec.block_tokens * raw_bytes / sum(map(spec.group_bytes, spec.groups))
        below = np.flatnonzero((hold.rows["state"] == FOUND) & (hold.rows["raw"] == 0)).tolist()
        rows = [residency.find(begun.namespace, *begun.wanted[at]) for at in below]
        self.promotion.promote([row for row in rows if row is not None])

    def release(self, hold_id: int) -> None:
        """End a hold. Idempotent."""
        if self.holds.end(hold_id):
            self.movement.nudge()
