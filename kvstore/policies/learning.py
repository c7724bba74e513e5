"""What one worker learns of reuse: who used which block when, and from it how soon blocks of a kind are used again.

Pure and deterministic; the time comes with `begin`. Shared by the policies of all levels (`learned.py`). Events
are only written down when they happen (a word or three) and worked off by a kernel, many at a time, before one asks.
docs/EVICTION.md tells the idea; `kvstore.kernels.reuse_state` has the arrays.
"""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b
from typing import Any

import numpy as np

from kvstore.kernels.reuse_events import ADMIT, BEGIN, FOLLOW, LEAVE, NO_ROW, TELL, TOUCH, apply
from kvstore.kernels.reuse_hazard import first_classes, sweep, write_keys
from kvstore.kernels.reuse_state import (
    AGE_BINS,
    BLOCK,
    BY_AGE,
    CLASSES,
    CLASSES_MAX,
    COARSE,
    COMBINATIONS,
    EDGE,
    ENTRIES,
    FINISHES,
    FREE_ENTRY,
    FREE_RECORD,
    GHOST_FIRST,
    GHOST_LAST,
    GHOSTS_MAX,
    LAST_RECORD,
    LRU_HITS,
    N_FIELDS,
    NONE,
    NOW_RECORD,
    OWN_HITS,
    RECORDS,
    REQUEST,
    RESIDENT,
    REUSED,
    TABLES,
    USES,
    X_FIELDS,
    Array,
    Known,
    insert_all,
)
from kvstore.policies.usage import PRIORITY_MAX, Hint, Use

PENDING_WORDS = 8192
FIRST_ITEMS = 256
GOES_ON_S = 1.0  # a request goes on unasked for so long, then its time is looked at again
LINE_MAX = 1 << 14  # blocks stored that are known to be of one request
SWEEP_USES_MIN = 1024
SWEEP_SHARE = 4  # of the entries: so many uses between two sweeps
REUSES_MIN = 1024  # before anything but age counts
KEEP = 0.97  # what a count weighs after one sweep more
GHOST_BYTES = 72  # of an entry with its record and slots
GHOSTS_MIN = 4096
GUARD_USES = 4  # times the resident blocks: how many uses the guard judges by
GUARD_USES_MIN = 4096
GUARD_MARGIN = 1.01  # the shadow must be better by so much
GUARD_ROUNDS_MAX = 64


def _items(kind: np.dtype[Any], count: int) -> Array:
    """Free ones."""
    items = np.zeros(count, kind)
    items["request" if kind == BLOCK else "end"] = NONE
    return items


class Learning:
    """At most 2^31 entries. `ghost_bytes`: memory for blocks that are not resident any more."""

    def __init__(self, ghost_bytes: int) -> None:
        self._known = Known(
            n=np.zeros(N_FIELDS, np.int64),
            x=np.zeros(X_FIELDS),
            slots=np.full(4 * FIRST_ITEMS, NONE, np.int32),
            sessions=np.full(4 * FIRST_ITEMS, NONE, np.int32),
            blocks=_items(BLOCK, FIRST_ITEMS),
            requests=_items(REQUEST, FIRST_ITEMS),
            number=np.empty(COMBINATIONS, np.int32),
            coarse=np.zeros(CLASSES_MAX, np.int32),
            tables=np.zeros((TABLES, CLASSES_MAX, AGE_BINS), np.float32),
            entry=np.full(FIRST_ITEMS, NONE, np.int32),
            key=np.zeros(FIRST_ITEMS, np.int64),
        )
        known = self._known
        first_classes(known.coarse, known.number)
        known.n[[FREE_ENTRY, GHOST_FIRST, GHOST_LAST, FREE_RECORD, NOW_RECORD, LAST_RECORD, EDGE]] = NONE
        known.n[GHOSTS_MAX] = max(GHOSTS_MIN, ghost_bytes // GHOST_BYTES)
        known.n[CLASSES] = COARSE
        self._chain(known.blocks["newer"], FREE_ENTRY, 0)
        self._chain(known.requests["after"], FREE_RECORD, 0)
        self._rows = FIRST_ITEMS
        self._copies = bytearray(FIRST_ITEMS)  # by row: at how many levels it lies
        self._touched = array("q", bytes(8 * FIRST_ITEMS))  # by row: the number of the request that used it last
        self._told_s = -1.0  # when a request was told of last
        self._line = set[int]()  # idents of blocks that the current request stores
        self._awaited = set[int]()  # and of their parents: copies may be ready in another order
        self._events = array("Q")
        self._admits = self._begins = 0  # among them
        self.requests = 0  # told of: begun, or gone on with
        self._swept = 0  # uses at the last sweep
        self._judged, self._rounds, self._lru_rounds = 0, 0, 1
        self._cold = True  # nothing was measured yet: everything goes by age
        known.n[BY_AGE] = 1
        sweep(known, 1.0)
        self.begin(Use(time_s=0.0), 0.0)
        self.keys(np.zeros(0, np.int32))  # the kernels are loaded here, not under the first request

    # ---- what happens

    def begin(self, use: Use, now_s: float) -> None:
        """A request begins at `use.time_s`, else at `now_s`; what comes and is used now belongs to it. Mutates."""
        self._make_way()
        self._begins += 1
        self.requests += 1
        now = now_s if use.time_s is None else use.time_s
        self._told(now)
        session = int.from_bytes(blake2b(use.session, digest_size=8).digest(), "little") if use.session else 0
        output = 0 if use.output_tokens is None else min(use.output_tokens, 1 << 40) + 1
        self._events.extend((BEGIN << 56, _bits(now), session, output << 8 | use.finish, max(0, use.blocks)))

    def follow(self, row: int | None, above: int, now_s: float, within_s: float, coming: int = 0) -> None:
        """What comes belongs to the request that used `row`, or the block with ident `above`, at most so many seconds
        ago; else to one that begins now. `coming`: the ident of the block that comes, if one does. Mutates."""
        if now_s - self._told_s <= min(within_s, GOES_ON_S) and self._goes_on(row, above, coming):
            return  # nothing to learn: most blocks of a prompt are stored right after their parents
        self._told(now_s)
        if coming:
            self._line.add(coming)
            self._awaited.add(above)
        self._make_way()
        self._begins += 1
        self.requests += 1
        self._events.extend((FOLLOW << 56 | (NO_ROW if row is None else row), above, _bits(now_s), _bits(within_s)))

    def _goes_on(self, row: int | None, above: int, coming: int) -> bool:
        """Whether this belongs to the request that is the current one already. Mutates what is known of it."""
        if row is not None:
            return row < self._rows and self._touched[row] == self.requests
        if not coming or len(self._line) >= LINE_MAX or not (above in self._line or coming in self._awaited):
            return False
        self._line.add(coming)
        self._awaited.add(above)
        return True

    def _told(self, now_s: float) -> None:
        """Another request is the current one, maybe, from now on. Mutates."""
        self._told_s = now_s
        self._line.clear()
        self._awaited.clear()

    def admit(self, row: int, ident: int, above: int, depth: int) -> bool:
        """A copy of a block came to a level; whether it is the only one. `above`: its parent's ident, 0 for none.
        Mutates."""
        if row >= self._rows:
            self._more_rows(row)
        if len(self._events) > PENDING_WORDS:
            self.settle()
        self._admits += 1
        self._events.extend((ADMIT << 56 | min(depth, 0xFFFFFF) << 32 | row, ident, above))
        self._copies[row] += 1
        return self._copies[row] == 1

    def touch(self, row: int) -> None:
        """It was used. Mutates."""
        self._touched[row] = self.requests
        self._events.append(TOUCH << 56 | row)

    def leave(self, row: int) -> None:
        """A copy left a level. Mutates."""
        self._copies[row] -= 1
        self._events.append(LEAVE << 56 | row)

    def tell(self, row: int, hint: Hint) -> None:
        """What is known now of the request that used this block last. Mutates."""
        self._make_way()
        output = 0 if hint.output_tokens is None else min(hint.output_tokens, 1 << 40) + 1
        finish = FINISHES - 1 if hint.ended else int(hint.finish)
        priority = max(-PRIORITY_MAX, min(PRIORITY_MAX, hint.priority)) + 128
        expect, ttl = (0.0 if value is None else max(value, 1e-3) for value in (hint.reuse_s, hint.ttl_s))
        self._events.extend((TELL << 56 | row, output << 8 | finish, _bits(expect), _bits(ttl), priority))

    # ---- what is asked

    def settle(self) -> None:
        """Work off what happened. Mutates."""
        events = self._events
        if events:
            self._room()
            words = np.frombuffer(events, np.uint64)
            apply(self._known, words, words.view(np.float64))
            del words
            self._events = array("Q")
            self._admits = self._begins = 0
        n = self._known.n
        if n[USES] - self._swept >= max(SWEEP_USES_MIN, n[ENTRIES] // SWEEP_SHARE):
            self._swept = int(n[USES])
            if self._cold:
                self._cold = float(self._known.tables[REUSED].sum()) < REUSES_MIN
                n[BY_AGE] = self._cold
            else:
                self._judge()
            sweep(self._known, KEEP)

    def keys(self, rows: Array) -> Array:
        """int64 by position: who has less leaves earlier. As of the last `begin`. Mutates."""
        self.settle()
        write_keys(self._known, rows)
        return self._known.key[rows]

    def written(self, rows: Array) -> Array:
        """int64 by position, as they were last written: when the row came or was used, or by `keys`. Pure."""
        return self._known.key[rows]

    def key(self, row: int) -> int:
        """As it was last written. Pure."""
        return int(self._known.key[row])

    @property
    def by_age(self) -> bool:
        """Whether the guard has everything go by age, as LRU would."""
        return bool(self._known.n[BY_AGE])

    def _judge(self) -> None:
        """The guard: where the shadow LRU did better, go by age for some rounds, twice as many each time. Mutates."""
        n, x = self._known.n, self._known.x
        if n[USES] - self._judged < max(GUARD_USES_MIN, GUARD_USES * n[RESIDENT]):
            return
        self._judged = int(n[USES])
        if n[BY_AGE]:
            self._rounds -= 1
            if self._rounds <= 0:
                n[BY_AGE] = 0
        elif x[LRU_HITS] > GUARD_MARGIN * x[OWN_HITS]:
            n[BY_AGE] = 1
            self._rounds = self._lru_rounds
            self._lru_rounds = min(GUARD_ROUNDS_MAX, 2 * self._lru_rounds)
        else:
            self._lru_rounds = max(1, self._lru_rounds // 2)
        x[OWN_HITS] = x[LRU_HITS] = 0.0

    # ---- room

    def _make_way(self) -> None:
        if len(self._events) > PENDING_WORDS:
            self.settle()

    def _chain(self, links: Array, free: int, first: int) -> None:
        """Put the items from `first` on a free list. Mutates."""
        links[first:] = np.arange(first + 1, len(links) + 1)
        links[-1] = self._known.n[free]
        self._known.n[free] = first

    def _room(self) -> None:
        """Entries and records for all that is pending. Mutates."""
        entries, records = int(self._known.n[ENTRIES]) + self._admits, int(self._known.n[RECORDS]) + self._begins
        known, size = self._known, len(self._known.blocks)
        if entries > size:
            blocks = np.concatenate((known.blocks, _items(BLOCK, max(size // 2, entries - size))))
            self._chain(blocks["newer"], FREE_ENTRY, size)
            self._known = known._replace(blocks=blocks, slots=_slots(blocks, np.flatnonzero(blocks["request"] != NONE)))
        known, size = self._known, len(self._known.requests)
        if records > size:
            requests = np.concatenate((known.requests, _items(REQUEST, max(size // 2, records - size))))
            self._chain(requests["after"], FREE_RECORD, size)
            sessions = _slots(requests, np.flatnonzero(requests["ident"]))
            self._known = known._replace(requests=requests, sessions=sessions)

    def _more_rows(self, row: int) -> None:
        known = self._known
        more = max(row + 1 - self._rows, self._rows // 8)
        self._known = known._replace(
            entry=np.concatenate((known.entry, np.full(more, NONE, np.int32))),
            key=np.concatenate((known.key, np.zeros(more, np.int64))),
        )
        self._copies.extend(bytes(more))
        self._touched.frombytes(bytes(8 * more))
        self._rows += more


def _slots(items: Array, taken: Array) -> Array:
    """A table of twice as many slots as there can be items, at least."""
    slots = np.full(1 << int(2 * len(items)).bit_length(), NONE, np.int32)
    insert_all(slots, items, taken)
    return slots


def _bits(value: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])
