"""What `kvstore.policies.learning` remembers of blocks and requests, as flat arrays, and how blocks become classes.

An entry is a block that is resident somewhere or remembered after its eviction (a ghost); a record is a request that is
the last one to have used some entry. Entries point to their record, so that what is learned of a request after its
blocks came (how much was generated, how it ended) holds for all of them at once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.kernels import jit

Array = npt.NDArray[Any]
NONE = -1

AGE_BINS = 48
AGE_FIRST_S = 0.05  # the first bin ends here, each further one a factor of the square root of 2 later: a week in all
AGE_STEP = math.log(2.0) / 2.0

NEW, SEEN, SHARED = range(3)  # roles of a block in its last prompt: first met, met before, part of several prompts
ROLES, TURNS, GAPS, OUTPUTS, FINISHES, LENGTHS = 3, 4, 7, 8, 5, 6
COMBINATIONS = ROLES * TURNS * GAPS * OUTPUTS * FINISHES * LENGTHS
COARSE = ROLES * OUTPUTS * FINISHES
CLASSES_MAX = 2048  # fine classes that are counted apart; further ones count as their coarse class

# fields of `Known.n`
ENTRIES, FREE_ENTRY, GHOSTS, GHOST_FIRST, GHOST_LAST, GHOSTS_MAX, RESIDENT = range(7)
RECORDS, FREE_RECORD, NOW_RECORD, LAST_RECORD, SERIAL, CLASSES, USES, EDGE, WITHIN, BY_AGE = range(7, 17)
N_FIELDS = 17
# fields of `Known.x`
NOW, OWN_HITS, LRU_HITS = range(3)
X_FIELDS = 3


BLOCK = np.dtype(
    [
        ("ident", "u8"),
        ("above", "u8"),  # ident of the parent, 0 for none
        ("child", "u4"),  # of the first child's ident, 0 while none was met
        ("request", "i4"),  # the record that used it last; NONE where the entry is free
        ("ended", "i4"),  # the record that ended with it, if that one's `end` says so too
        ("older", "i4"),  # ghosts in the order of their eviction
        ("newer", "i4"),  # also links what is free
        ("depth", "u2"),  # clipped
        ("levels", "u1"),  # at how many it lies
        ("role", "u1"),
        ("shared", "u1"),  # 1: it or a block below it has two children
        ("gap", "u1"),  # class of the time between its last two uses
    ]
)
REQUEST = np.dtype(
    [
        ("ident", "u8"),  # of the session, 0 where nobody named it
        ("time", "f8"),  # s
        ("expect", "f8"),  # s: reuse is expected by then; 0: nobody said so
        ("until", "f8"),  # s: nobody comes back after; infinite where nobody said so
        ("serial", "i8"),  # rising
        ("count", "i4"),  # entries it used last
        ("before", "i4"),  # records in the order of their begin
        ("after", "i4"),  # also links what is free
        ("end", "i4"),  # its deepest entry
        ("deepest", "i4"),
        ("found", "i4"),  # depth at which it continues a session; NONE
        ("turn", "u1"),  # clipped
        ("pause", "u1"),  # class of the time since the session's last request
        ("output", "u1"),
        ("finish", "u1"),
        ("length", "u1"),
        ("priority", "i1"),  # powers of two
    ]
)
REUSED, LOST, OPEN, INDEX = range(4)
TABLES = 4
"""By class and age bin: uses at that age, entries forgotten at it, entries of it at the last sweep, Gittins index."""


class Known(NamedTuple):
    """Everything the kernels read and write."""

    n: Array  # int64, counters
    x: Array  # float64
    slots: Array  # int32, open addressing: entry, NONE where free; a power of two of them
    sessions: Array  # int32, likewise: record by session
    blocks: Array  # BLOCK, by entry
    requests: Array  # REQUEST, by record
    number: Array  # int32, by combination: its class, NONE
    coarse: Array  # int32, by class
    tables: Array  # float32 [table, class, bin]
    entry: Array  # int32, by row
    key: Array  # int64, by row: lesser leaves earlier


@jit
def age_bin(age: Any) -> Any:
    """The bin of an age in seconds."""
    if age <= AGE_FIRST_S:
        return 0
    return min(AGE_BINS - 1, int(math.log(age / AGE_FIRST_S) / AGE_STEP) + 1)


@jit
def gap_class(seconds: Any) -> Any:
    """1 up to 4 s, then a class each factor of 4; 0 is kept for no gap."""
    k, edge = 1, 4.0
    while seconds > edge and k < GAPS - 1:
        k += 1
        edge *= 4.0
    return k


@jit
def log_class(value: Any, step: Any, classes: Any) -> Any:
    """Classes of a whole number, each `step` powers of two wide."""
    k = 0
    value >>= step
    while value > 0 and k < classes - 1:
        k += 1
        value >>= step
    return k


@jit
def class_of(s: Known, e: Any) -> Any:
    """The class of an entry, made where it is the first of its kind. Mutates."""
    r = s.blocks[e].request
    coarse = (np.int64(s.blocks[e].role) * OUTPUTS + s.requests[r].output) * FINISHES + s.requests[r].finish
    gap = s.blocks[e].gap if s.blocks[e].role != NEW else s.requests[r].pause
    combination = ((coarse * TURNS + s.requests[r].turn) * GAPS + gap) * LENGTHS + s.requests[r].length
    number = np.int64(s.number[combination])
    if number == NONE:
        if s.n[CLASSES] >= CLASSES_MAX:
            return coarse
        number = s.n[CLASSES]
        s.n[CLASSES] += 1
        s.number[combination] = number
        s.coarse[number] = coarse
        s.tables[INDEX, number] = s.tables[INDEX, coarse]
    return number


@jit
def find(slots: Any, items: Any, ident: Any) -> Any:
    """The item with this identity, NONE where there is none. Linear probing."""
    mask = len(slots) - 1
    at = np.int64((ident ^ (ident >> np.uint64(29))) & np.uint64(mask))
    while slots[at] != NONE:
        if items[slots[at]].ident == ident:
            return np.int64(slots[at])
        at = (at + 1) & mask
    return np.int64(NONE)


@jit
def insert(slots: Any, items: Any, item: Any) -> Any:
    """Of an item that is not there. Mutates."""
    mask = len(slots) - 1
    ident = items[item].ident
    at = np.int64((ident ^ (ident >> np.uint64(29))) & np.uint64(mask))
    while slots[at] != NONE:
        at = (at + 1) & mask
    slots[at] = item


@jit
def insert_all(slots: Any, items: Any, taken: Any) -> Any:
    """Mutates `slots`."""
    for item in taken:
        insert(slots, items, item)


@jit
def erase(slots: Any, items: Any, item: Any) -> Any:
    """Of an item that is there; later ones of its cluster move up (Knuth, volume 3, algorithm 6.4R). Mutates."""
    mask = len(slots) - 1
    ident = items[item].ident
    at = np.int64((ident ^ (ident >> np.uint64(29))) & np.uint64(mask))
    while slots[at] != item:
        at = (at + 1) & mask
    hole = at
    while True:
        at = (at + 1) & mask
        if slots[at] == NONE:
            break
        other = items[slots[at]].ident
        home = np.int64((other ^ (other >> np.uint64(29))) & np.uint64(mask))
        if (at - home) & mask >= (at - hole) & mask:
            slots[hole] = slots[at]
            hole = at
    slots[hole] = NONE
