"""How many copies each placement group has, and who should copy or may give up what. One namespace; pure, incremental.

Groups are learnt from announced runs and looked at again a few at a time: those that changed first, then all in turn
(`Replicas.look`). Targets are drawn by rendezvous over the members (`placement.py`), so that coordinators with the
same view say the same. What comes out are hints: a lost one is given again, a wrong one costs a copy too many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.directory.placement import rank
from kvstore.directory.runs import Run
from kvstore.types import KEY_BYTES, Keys, pack_keys

Shares = Mapping[str, int]
"""Holder -> bitmap of a group's keys that it has, bit i for key i."""

RANKS_A_LOOK = 32
"""Members ranked for what one look at a group costs."""


BARE_S = 60.0
"""Keys that nobody has for so long are forgotten."""


@dataclass(frozen=True, slots=True)
class Copies:
    """What a namespace wants. `hot_copies` of the groups that are asked for most, within `hot_bytes` in all beyond
    `copies`; 0: none."""

    copies: int = 1
    hot_copies: int = 0
    hot_bytes: int = 0

    @property
    def wanted(self) -> bool:
        """Whether anything beyond the writer's copy is."""
        return self.copies > 1 or (self.hot_copies > self.copies and self.hot_bytes > 0)


@dataclass(frozen=True, slots=True)
class Pull:
    """`to` should copy these blocks (keys back to back, parents first) of a group from one of `sources`."""

    to: str
    root: bytes
    shard: bytes
    group: bytes
    keys: bytes
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """`to` holds these blocks beyond the wanted number of copies (`secondary`), or no longer so."""

    to: str
    shard: bytes
    keys: bytes
    secondary: bool


class Popularity(Protocol):
    """Which groups are asked for most (`kvstore.directory.popular`)."""

    def hot(self, group: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is who at the time of a look. `members`: homes are drawn from them; `sources`: those that can be read."""

    members: Mapping[str, None]
    sources: Mapping[str, None]


@dataclass(slots=True)
class _Group:
    root: bytes
    shard: bytes
    id: bytes
    keys: bytes  # back to back
    block_bytes: int
    at: int  # index in the round
    bare_at: float | None = None  # since when some of its keys are nobody's
    told_at: float = float("-inf")  # when pulls were hinted first, of those that may be under way
    told: int = 0  # keys whose pull was hinted since
    marked: dict[str, int] | None = None  # holder -> keys it was told to be secondary


class Replicas:
    """`learn` what is announced, `look` at a bounded number of groups a tick. `groups_max` bounds the memory: groups
    beyond it are left alone and counted in `refused`."""

    def __init__(self, copies: Copies, *, groups_max: int, again_s: float, popular: Popularity | None = None) -> None:
        self.copies = copies
        self.groups_max = groups_max
        self.again_s = again_s  # a pull that was hinted and did not happen is hinted again
        self.refused = 0
        self.hot_bytes = 0  # granted to hot groups beyond `copies`
        self._popular = popular
        self._groups: dict[tuple[bytes, bytes], _Group] = {}  # (shard, group id)
        self._round: list[_Group] = []
        self._next = 0  # of the round
        self._left = 0  # groups until the round is over
        self._due: dict[tuple[bytes, bytes], None] = {}
        self._again: deque[tuple[float, tuple[bytes, bytes]]] = deque()  # when to look once more
        self._marked: dict[tuple[bytes, bytes], None] = {}  # groups with marks
        self._changed_at = float("-inf")
        self._hot: dict[tuple[bytes, bytes], int] = {}  # bytes granted
        self._shards: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def waiting(self) -> int:
        """Groups to be looked at, now or once more later: changed, told something, or left of the round."""
        return len(self._due) + self._left + len(self._again)

    # ---- changes

    def learn(self, run: Run) -> None:
        """A holder announced these blocks. Mutates. O(len(keys))."""
        name = (run.shard, run.group)
        group = self._groups.get(name)
        packed = pack_keys(run.keys)
        if group is None:
            if len(self._groups) >= self.groups_max:
                self.refused += 1
                return
            group = _Group(run.root, run.shard, run.group, packed, run.stored_bytes, len(self._round))
            self._groups[name] = group
            self._round.append(group)
            self._shards[run.shard] = None
        elif len(packed) == KEY_BYTES:
            if not _among(packed, group.keys):
                group.keys += packed
        elif group.keys != packed:
            known = set(Keys(group.keys))
            group.keys += b"".join(key for key in run.keys if key not in known)
        self._due[name] = None

    def asked(self, group: bytes) -> None:
        """It became hot, or no longer is: look at it soon. Mutates."""
        for shard in self._shards:
            if (shard, group) in self._groups:
                self._due[shard, group] = None

    def again(self) -> None:
        """Look at all groups, in one round from here on. Mutates. O(1)."""
        self._left = len(self._round)

    # ---- looking

    def look(
        self, shares: Callable[[bytes, Sequence[bytes]], Shares], fleet: Fleet, now: float, budget: int
    ) -> list[Pull | Mark]:
        """Look at up to `budget` groups; what should be done about them. Mutates. `shares(shard, keys)`: who has which,
        holders that are only suspect too."""
        while self._again and self._again[0][0] <= now:
            self._due[self._again.popleft()[1]] = None
        found: list[Pull | Mark] = []
        while budget > 0 and (group := self._take()) is not None:
            budget -= 1 + self._look(group, shares, fleet, now, found) * (len(fleet.members) // RANKS_A_LOOK)
        return found

    def _take(self) -> _Group | None:
        while self._due:
            name = next(iter(self._due))
            del self._due[name]
            if name in self._groups:
                return self._groups[name]
        if not self._left or not self._round:
            self._left = 0
            return None
        self._left -= 1
        self._next = (self._next + 1) % len(self._round)
        return self._round[self._next]

    def _look(
        self,
        group: _Group,
        shares: Callable[[bytes, Sequence[bytes]], Shares],
        fleet: Fleet,
        now: float,
        found: list[Pull | Mark],
    ) -> bool:
        """Whether members had to be ranked."""
        keys = Keys(group.keys)
        have = shares(group.shard, keys)
        held = 0
        for mine in have.values():
            held |= mine
        if held == (1 << len(keys)) - 1:
            group.bare_at = None
        else:  # evicted, or part of a snapshot that is not whole yet
            group.bare_at = now if group.bare_at is None else group.bare_at
            if now - group.bare_at >= BARE_S:
                return self._prune(group, held)
            self._again.append((now + self.again_s, (group.shard, group.id)))
        live = {holder: mine for holder, mine in have.items() if holder in fleet.members}
        wanted = min(self._wanted(group), len(fleet.members))
        enough, surplus = _at_least(live.values(), wanted), _at_least(live.values(), wanted + 1)
        sources = {holder: mine for holder, mine in have.items() if holder in fleet.sources}
        under = _at_least(sources.values(), 1) & ~enough
        if now >= group.told_at + self.again_s or group.told_at < self._changed_at:
            group.told_at, group.told = now, 0
        under &= ~group.told
        if not (surplus or group.marked or under):
            return False
        ranked = rank(group.id, fleet.members)
        if under:
            group.told |= under
            self._again.append((now + self.again_s, (group.shard, group.id)))
            found += self._pulls(group, keys, under, live, sources, ranked, wanted)
        if surplus or group.marked:
            found += self._marks(group, keys, live, ranked, wanted)
        return True

    def _wanted(self, group: _Group) -> int:
        """Copies this group should have; grants and takes back a share of the budget of hot ones. Mutates."""
        copies, name = self.copies, (group.shard, group.id)
        if self._popular is None or copies.hot_copies <= copies.copies:
            return copies.copies
        self.hot_bytes -= self._hot.pop(name, 0)
        if not self._popular.hot(group.id):
            return copies.copies
        more = (copies.hot_copies - copies.copies) * group.block_bytes * (len(group.keys) // KEY_BYTES)
        if self.hot_bytes + more > copies.hot_bytes:
            return copies.copies
        self._hot[name] = more
        self.hot_bytes += more
        return copies.hot_copies

    def _pulls(
        self,
        group: _Group,
        keys: Sequence[bytes],
        under: int,
        live: Mapping[str, int],
        sources: Mapping[str, int],
        ranked: Sequence[str],
        wanted: int,
    ) -> list[Pull]:
        """The highest ranked who lack something are told to copy it. Pure."""
        given = dict(live)
        pulls: list[Pull] = []
        for member in ranked:
            lacks = under & ~given.get(member, 0) & ~_at_least(given.values(), wanted)
            if not lacks:
                continue
            given[member] = given.get(member, 0) | lacks
            order = sorted(sources, key=lambda holder: -(sources[holder] & lacks).bit_count())
            useful = tuple(holder for holder in order if sources[holder] & lacks and holder != member)
            if useful:
                pulls.append(Pull(member, group.root, group.shard, group.id, _packed(keys, lacks), useful))
        return pulls

    def _marks(
        self, group: _Group, keys: Sequence[bytes], live: Mapping[str, int], ranked: Sequence[str], wanted: int
    ) -> list[Mark]:
        """Copies beyond the wanted number are those of the lowest ranked. Only what changed is told. Mutates."""
        marks: list[Mark] = []
        marked = group.marked or {}
        first: list[int] = []
        for member in ranked:
            mine = live.get(member, 0)
            before = marked.get(member, 0)
            if not mine and not before:
                continue
            secondary = mine & _at_least(first, wanted)
            first.append(mine)
            if secondary & ~before:
                marks.append(Mark(member, group.shard, _packed(keys, secondary & ~before), True))
            if before & mine & ~secondary:
                marks.append(Mark(member, group.shard, _packed(keys, before & mine & ~secondary), False))
            marked.pop(member, None)
            if secondary:
                marked[member] = secondary
        for member in [member for member in marked if member not in live]:
            del marked[member]
        self._marked.pop((group.shard, group.id), None)
        group.marked = marked or None
        if marked:
            self._marked[group.shard, group.id] = None
        return marks

    def changed(self, now: float) -> None:
        """The members changed: what was hinted is void, workers forget their marks too, and every group is looked at
        again. Mutates. O(marked)."""
        self._changed_at = now
        self.again()
        for name in self._marked:
            if name in self._groups:
                self._groups[name].marked = None
        self._marked.clear()

    def forget_marks(self, member: str) -> None:
        """It no longer knows what it was told (another life): it is told again. Mutates. O(marked)."""
        for name in self._marked:
            group = self._groups.get(name)
            if group is not None and group.marked is not None and group.marked.pop(member, None) is not None:
                self._due[name] = None

    def _prune(self, group: _Group, held: int) -> bool:
        """Forget keys that nobody has any more; look again if any are left. Mutates."""
        kept = _packed(Keys(group.keys), held)
        name = (group.shard, group.id)
        group.marked = None
        group.told = 0
        self._marked.pop(name, None)
        if kept:
            group.keys = kept
            self._due[name] = None
            return False
        del self._groups[name]
        self.hot_bytes -= self._hot.pop(name, 0)
        last = self._round.pop()
        if last is not group:
            last.at = group.at
            self._round[group.at] = last
        self._left = min(self._left, len(self._round))
        return False

    def validate(self) -> None:
        """AssertionError where an invariant is broken. O(everything)."""
        assert len(self._round) == len(self._groups) <= max(self.groups_max, 0)
        for index, group in enumerate(self._round):
            assert group.at == index and self._groups[group.shard, group.id] is group
            keys = Keys(group.keys)
            assert keys and len(set(keys)) == len(keys), "a key twice in one group"
        assert sum(self._hot.values()) == self.hot_bytes <= max(self.copies.hot_bytes, 0)
        assert self._left <= len(self._round)


def _packed(keys: Sequence[bytes], mask: int) -> bytes:
    return b"".join(key for index, key in enumerate(keys) if mask >> index & 1)


def _at_least(masks: Iterable[int], count: int) -> int:
    """Bits that are set in `count` of the masks or more: a counter per bit, in unary."""
    if count <= 0:
        return -1
    reached = [0] * count
    for mask in masks:
        for index in range(count - 1, 0, -1):
            reached[index] |= reached[index - 1] & mask
        reached[0] |= mask
    return reached[-1]


def _among(key: bytes, keys: bytes) -> bool:
    """Whether a key is one of those back to back. Pure."""
    at = keys.find(key)
    while at >= 0 and at % KEY_BYTES:
        at = keys.find(key, at + 1)
    return at >= 0
