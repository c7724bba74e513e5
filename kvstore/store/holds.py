"""Holds: blocks that a reader has open. They stay where they are until the hold ends, by release or by age."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.header import Header
from kvstore.header_columns import Columns
from kvstore.open_rows import FOUND, OPEN_ROWS, WORDS, absent, short_checks
from kvstore.policies.usage import Rows
from kvstore.residency.bulk import column
from kvstore.residency.headers import fill
from kvstore.seams import Segment
from kvstore.store.arena import ArenaSegment
from kvstore.store.stack import Stack
from kvstore.store.together import Taken, end
from kvstore.types import Tier


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an open block lies: raw bytes in canonical order, or a stored record that the reader decodes."""

    header: Header
    tier: Tier  # that served it
    raw: bool
    segment: Segment
    segment_id: int
    data_offset: int  # of the segment: the generation table lies before it
    offset: int  # from the segment's start
    length: int
    generation: int  # of the unit at `offset`, to be found unchanged after reading

    @property
    def view(self) -> memoryview:
        """The bytes, for readers of this process."""
        return self.segment.view[self.offset : self.offset + self.length]


_ABSENT = absent(1).view(np.uint64).reshape(1, WORDS)


class Hold:
    """What `open` answers. Ends with `release(id)`."""

    def __init__(self, id: int, count: int) -> None:
        self.id = id
        self.words = np.repeat(_ABSENT, count, axis=0)  # (count, WORDS), one row a wanted block
        self.segments: dict[int, ArenaSegment] = {}  # those that the rows name

    @property
    def rows(self) -> Columns:
        """(count,) OPEN_ROWS: the same memory, with names."""
        return self.words.view(OPEN_ROWS)[:, 0]

    @property
    def blocks(self) -> list[Placed | None]:
        """One a wanted block, None for a miss. Made at each call."""
        return [self.placed(index) if state == FOUND else None for index, state in enumerate(self.rows["state"])]

    def placed(self, index: int) -> Placed:
        """A block that was found."""
        row = self.rows[index]
        segment = self.segments[int(row["segment"])]
        return Placed(
            header=Header.unpack(row["header"].tobytes(), checked=True),
            tier=Tier(int(row["tier"])),
            raw=bool(row["raw"]),
            segment=segment.segment,
            segment_id=segment.id,
            data_offset=segment.data_offset,
            offset=int(row["offset"]),
            length=int(row["length"]),
            generation=int(row["generation"]),
        )


@dataclass(slots=True)
class Held:
    """What a hold keeps in place."""

    expires: float
    rows: list[int] = field(default_factory=list)  # pinned once each
    places: list[tuple[int, int]] = field(default_factory=list)  # (segment, offset), held in the arena once each
    together: list[tuple[Rows, Columns]] = field(default_factory=list)  # (rows, answers) of what `find` opened


class Holds:
    """All holds of a store. Synchronous."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._held: dict[int, Held] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._held)

    def begin(self, count: int) -> Hold:
        """A new hold of so many blocks, none of them found yet. Mutates."""
        made = Hold(self._next_id, count)
        self._next_id += 1
        self._held[made.id] = Held(self.stack.system.clock.monotonic() + self.stack.config.hold_max_s)
        return made

    def take(
        self,
        hold: Hold,
        at: Sequence[int],
        rows: Sequence[int],
        level: int,
        tier: Tier | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        """Pin blocks, all of which lie at one level in the arena, under a hold, as its `at`-th; `pinned`: the callers'
        pins become the hold's. `tier` is what served them, where that is not the level they lie at. Mutates."""
        stack, held, columns = self.stack, self._held[hold.id], self.stack.residency.rows
        if not pinned:
            for row in rows:
                stack.residency.pin(row)
        held.rows += rows
        segments, offsets = columns.segment[level], columns.offset[level]
        places = [(segments[row], offsets[row]) for row in rows]
        generations = [stack.arena.hold_at(*place) for place in places]
        held.places += places
        rule, numbers = stack.residency.levels[level], np.array(rows, np.int64)
        found = absent(len(rows), FOUND)
        fill(found["header"], columns, numbers, level, raw=rule.raw)
        found["header"]["check"] = short_checks(found)
        found["segment"], found["offset"] = [place[0] for place in places], [place[1] for place in places]
        found["length"] = column(columns.length[level])[numbers]
        found["generation"], found["tier"], found["raw"] = generations, int(tier or rule.tier), rule.raw
        hold.rows[list(at)] = found
        for segment in dict.fromkeys(place[0] for place in places):
            hold.segments[segment] = stack.arena.segment(segment)

    def keep(self, hold: Hold, at: range, taken: Taken) -> None:
        """Blocks that `together.find` has opened, as the `at`-th of a hold, are the hold's. Mutates."""
        words, numbers = hold.words[at.start : at.stop], taken.numbers
        if taken.opened < len(numbers):
            there = taken.levels >= 0
            words, numbers = words[there], numbers[there]
        self._held[hold.id].together.append((numbers, words))
        for segment in dict.fromkeys((words[:, -1] & np.uint64(0xFFFFFFFF)).tolist()):
            hold.segments[segment] = self.stack.arena.segment(segment)

    def end(self, id: int) -> bool:
        """Let go of everything; whether the hold was there. Mutates; idempotent."""
        held = self._held.pop(id, None)
        if held is None:
            return False
        for numbers, words in held.together:
            end(self.stack, numbers, words)
        for segment, offset in held.places:
            self.stack.arena.release_at(segment, offset)
        for row in held.rows:
            self.stack.residency.unpin(row)
        return True

    def alive(self, id: int) -> bool:
        return id in self._held

    def expire(self) -> int:
        """End the holds that are too old; how many. From then on generations protect their readers. Mutates."""
        now = self.stack.system.clock.monotonic()
        late = [id for id, held in self._held.items() if held.expires <= now]
        for id in late:
            self.end(id)
        return len(late)

    def end_all(self) -> None:
        for id in list(self._held):
            self.end(id)
