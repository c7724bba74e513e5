"""What happens to blocks, in the order it happened: requests begin, blocks come, are used, leave. Many events a call.

A shadow of leaf-first LRU needs no list of its own: it holds what the latest requests used, as many entries as are
resident. So the oldest request it still holds (EDGE) and how many entries lie behind it (WITHIN) tell whether it would
have hit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.kernels import jit
from kvstore.kernels.reuse_hazard import write_key
from kvstore.kernels.reuse_state import (
    CLASSES_MAX,
    EDGE,
    ENTRIES,
    FREE_ENTRY,
    FREE_RECORD,
    GHOST_FIRST,
    GHOST_LAST,
    GHOSTS,
    GHOSTS_MAX,
    LAST_RECORD,
    LENGTHS,
    LOST,
    LRU_HITS,
    NEW,
    NONE,
    NOW,
    NOW_RECORD,
    OUTPUTS,
    OWN_HITS,
    RECORDS,
    RESIDENT,
    REUSED,
    SEEN,
    SERIAL,
    SHARED,
    TURNS,
    USES,
    WITHIN,
    Known,
    age_bin,
    class_of,
    erase,
    find,
    gap_class,
    insert,
    log_class,
)

BEGIN, ADMIT, TOUCH, LEAVE, TELL, FOLLOW = range(6)
NO_ROW = 0xFFFFFFFF
"""Kinds of events. The first word: kind << 56 | depth << 32 | row."""

assert CLASSES_MAX < 1 << 16


@jit
def output_class(tokens: Any) -> Any:
    """0 where it is not known (negative), then a class each factor of 4."""
    return 0 if tokens < 0 else 1 + log_class(tokens >> 1, 2, OUTPUTS - 1)


@jit
def free_record(s: Known, r: Any) -> Any:
    """A record that no entry needs. Mutates."""
    n = s.n
    if n[EDGE] == r:
        n[EDGE] = s.requests[r].after
    if s.requests[r].before != NONE:
        s.requests[s.requests[r].before].after = s.requests[r].after
    if s.requests[r].after != NONE:
        s.requests[s.requests[r].after].before = s.requests[r].before
    else:
        n[LAST_RECORD] = s.requests[r].before
    if s.requests[r].ident and find(s.sessions, s.requests, s.requests[r].ident) == r:
        erase(s.sessions, s.requests, r)
    s.requests[r].ident = 0
    s.requests[r].end = NONE
    s.requests[r].after = n[FREE_RECORD]
    n[FREE_RECORD] = r
    n[RECORDS] -= 1


@jit
def adopt(s: Known, r: Any, p: Any, depth: Any) -> Any:
    """Request `r` goes on where `p` ended. Mutates."""
    s.requests[r].found = depth
    s.requests[r].turn = min(TURNS - 1, s.requests[p].turn + 1)
    s.requests[r].pause = gap_class(s.requests[r].time - s.requests[p].time)


@jit
def begin(s: Known, now: Any, session: Any, output: Any, finish: Any, blocks: Any) -> Any:
    """A new request. Mutates."""
    n, x = s.n, s.x
    x[NOW] = max(x[NOW], now)
    last = n[NOW_RECORD]
    if last != NONE and s.requests[last].count == 0:
        free_record(s, last)
    r = n[FREE_RECORD]
    n[FREE_RECORD] = s.requests[r].after
    n[RECORDS] += 1
    n[SERIAL] += 1
    new = s.requests[r]
    new.time, new.serial, new.count, new.end, new.deepest = x[NOW], n[SERIAL], 0, NONE, NONE
    new.found, new.turn, new.pause = NONE, 0, 0
    new.output, new.finish, new.length = output_class(output), finish, log_class(blocks, 2, LENGTHS)
    new.expect, new.until, new.priority = 0.0, np.inf, 0
    s.requests[r].ident = session
    s.requests[r].before, s.requests[r].after = n[LAST_RECORD], NONE
    if n[LAST_RECORD] != NONE:
        s.requests[n[LAST_RECORD]].after = r
    n[LAST_RECORD] = n[NOW_RECORD] = r
    if n[EDGE] == NONE:
        n[EDGE] = r
    if session:
        p = find(s.sessions, s.requests, session)
        if p != NONE and p != r:
            adopt(s, r, p, 1 << 30)  # nothing that is covered knows better
            erase(s.sessions, s.requests, p)
            s.requests[p].ident = 0
        insert(s.sessions, s.requests, r)


@jit
def follow(s: Known, row: Any, above: Any, now: Any, within: Any) -> Any:
    """What comes belongs to the request that just used a row, or the block `above`, or began without any; where none
    of them did within so many seconds, to a new one. Mutates."""
    n, x = s.n, s.x
    e = np.int64(s.entry[row]) if row != NO_ROW else find(s.slots, s.blocks, above) if above else np.int64(NONE)
    last = n[NOW_RECORD]
    x[NOW] = max(x[NOW], now)
    if e != NONE and s.blocks[e].request != NONE:
        r = np.int64(s.blocks[e].request)
        if s.requests[r].time >= x[NOW] - within:
            if r != last and s.requests[last].count == 0:
                free_record(s, last)
            n[NOW_RECORD] = r
            return
    elif s.requests[last].count == 0 and s.requests[last].time >= x[NOW] - within:
        return
    begin(s, x[NOW], np.uint64(0), -1, 0, 0)


@jit
def in_shadow(s: Known, q: Any) -> Any:
    """The part of a record's entries that LRU of the resident size would still have."""
    n = s.n
    edge = n[EDGE]
    if edge == NONE:
        return 0.0
    if s.requests[q].serial >= s.requests[edge].serial:
        return 1.0
    if s.requests[edge].before == q:
        return min(1.0, max(0.0, (n[RESIDENT] - n[WITHIN]) / max(1, s.requests[q].count)))
    return 0.0


@jit
def move_edge(s: Known) -> Any:
    """Mutates."""
    n = s.n
    while n[EDGE] != NONE and n[WITHIN] > n[RESIDENT] and s.requests[n[EDGE]].after != NONE:
        n[WITHIN] -= s.requests[n[EDGE]].count
        n[EDGE] = s.requests[n[EDGE]].after
    while n[EDGE] != NONE:
        p = s.requests[n[EDGE]].before
        if p == NONE or n[WITHIN] + s.requests[p].count > n[RESIDENT]:
            break
        n[WITHIN] += s.requests[p].count
        n[EDGE] = p


@jit
def let_go(s: Known, e: Any) -> Any:
    """An entry no longer counts for its record. Mutates."""
    q, n = s.blocks[e].request, s.n
    if n[EDGE] != NONE and s.requests[q].serial >= s.requests[n[EDGE]].serial:
        n[WITHIN] -= 1
    s.requests[q].count -= 1
    if s.requests[q].count == 0 and q != n[NOW_RECORD]:
        free_record(s, q)


@jit
def use(s: Known, e: Any) -> Any:
    """The current request uses an entry. Mutates."""
    n, x = s.n, s.x
    r, q = n[NOW_RECORD], s.blocks[e].request
    if q == r:
        return
    n[USES] += 1
    if q != NONE:
        age = x[NOW] - s.requests[q].time
        s.tables[REUSED, class_of(s, e), age_bin(age)] += 1.0
        x[LRU_HITS] += in_shadow(s, q)
        if s.blocks[e].levels:
            x[OWN_HITS] += 1.0
        p = s.blocks[e].ended
        if p != NONE and s.requests[p].end == e and np.int64(s.blocks[e].depth) > s.requests[r].found:
            adopt(s, r, p, np.int64(s.blocks[e].depth))
        s.blocks[e].gap = gap_class(age)
        s.blocks[e].role = SHARED if s.blocks[e].shared else SEEN
        let_go(s, e)
    s.blocks[e].request = r
    s.requests[r].count += 1
    if n[EDGE] != NONE and s.requests[r].serial >= s.requests[n[EDGE]].serial:
        n[WITHIN] += 1
    if np.int64(s.blocks[e].depth) >= s.requests[r].deepest:
        s.requests[r].deepest, s.requests[r].end, s.blocks[e].ended = s.blocks[e].depth, e, r
        s.requests[r].length = max(s.requests[r].length, log_class(np.int64(s.blocks[e].depth) + 1, 2, LENGTHS))
    move_edge(s)


@jit
def forget(s: Known, e: Any) -> Any:
    """A ghost too many. Mutates."""
    n = s.n
    unghost(s, e)
    s.tables[LOST, class_of(s, e), age_bin(s.x[NOW] - s.requests[s.blocks[e].request].time)] += 1.0
    let_go(s, e)
    erase(s.slots, s.blocks, e)
    s.blocks[e].request = NONE
    s.blocks[e].newer = n[FREE_ENTRY]
    n[FREE_ENTRY] = e
    n[ENTRIES] -= 1


@jit
def unghost(s: Known, e: Any) -> Any:
    """Mutates."""
    n = s.n
    o, w = s.blocks[e].older, s.blocks[e].newer
    if o != NONE:
        s.blocks[o].newer = w
    else:
        n[GHOST_FIRST] = w
    if w != NONE:
        s.blocks[w].older = o
    else:
        n[GHOST_LAST] = o
    n[GHOSTS] -= 1


@jit
def link(s: Known, e: Any) -> Any:
    """A new entry meets its parent: with a second child, it and all above are shared. Mutates."""
    p = find(s.slots, s.blocks, s.blocks[e].above)
    if p == NONE:
        return
    mark = np.uint32(s.blocks[e].ident & np.uint64(0xFFFFFFFF)) | np.uint32(1)
    if s.blocks[p].child == 0:
        s.blocks[p].child = mark
    elif s.blocks[p].child != mark:
        while p != NONE and not s.blocks[p].shared:
            s.blocks[p].shared = 1
            if s.blocks[p].request == s.n[NOW_RECORD] and s.blocks[p].role == SEEN:
                s.blocks[p].role = SHARED
            p = find(s.slots, s.blocks, s.blocks[p].above) if s.blocks[p].above else np.int64(NONE)


@jit
def admit(s: Known, row: Any, ident: Any, above: Any, depth: Any) -> Any:
    """A copy came to a level. Mutates."""
    n = s.n
    e = find(s.slots, s.blocks, ident)
    if e == NONE:
        e = n[FREE_ENTRY]
        n[FREE_ENTRY] = s.blocks[e].newer
        n[ENTRIES] += 1
        s.blocks[e].ident, s.blocks[e].above, s.blocks[e].child = ident, above, 0
        s.blocks[e].request, s.blocks[e].ended, s.blocks[e].levels = NONE, NONE, 0
        s.blocks[e].role, s.blocks[e].shared, s.blocks[e].gap, s.blocks[e].depth = NEW, 0, 0, min(depth, 0xFFFF)
        insert(s.slots, s.blocks, e)
        if above:
            link(s, e)
    fresh = s.blocks[e].levels == 0
    ghost = fresh and s.blocks[e].request != NONE
    if s.blocks[e].request == NONE or ghost:
        use(s, e)
    if ghost:
        unghost(s, e)
    s.blocks[e].levels += 1
    n[RESIDENT] += fresh
    s.entry[row] = e
    write_key(s, row)


@jit
def leave(s: Known, row: Any) -> Any:
    """A copy left a level. Mutates."""
    n, e = s.n, s.entry[row]
    s.blocks[e].levels -= 1
    if s.blocks[e].levels:
        return
    n[RESIDENT] -= 1
    s.blocks[e].older, s.blocks[e].newer = n[GHOST_LAST], NONE
    if n[GHOST_LAST] != NONE:
        s.blocks[n[GHOST_LAST]].newer = e
    else:
        n[GHOST_FIRST] = e
    n[GHOST_LAST] = e
    n[GHOSTS] += 1
    if n[GHOSTS] > n[GHOSTS_MAX]:
        forget(s, n[GHOST_FIRST])
    move_edge(s)


@jit
def tell(s: Known, row: Any, output: Any, finish: Any, expect_s: Any, ttl_s: Any, priority: Any) -> Any:
    """What is known now of the request that used a block last; negative or 0 for what is not. Mutates."""
    r = s.blocks[s.entry[row]].request
    now = s.x[NOW]
    if output >= 0:
        s.requests[r].output = output_class(output)
    if finish > 0:
        s.requests[r].finish = finish
    if expect_s > 0:
        s.requests[r].expect = now + expect_s
    if ttl_s > 0:
        s.requests[r].until = now + ttl_s
    s.requests[r].priority = priority


@jit
def apply(s: Known, events: Any, seconds: Any) -> Any:
    """All of them, in order. `seconds`: the same words as float64. There is room for what comes. Mutates."""
    at = 0
    byte = np.uint64(0xFF)
    while at < len(events):
        word = events[at]
        kind = np.int64(word >> np.uint64(56))
        number = np.int64((word >> np.uint64(32)) & np.uint64(0xFFFFFF))
        row = np.int64(word & np.uint64(0xFFFFFFFF))
        if kind == TOUCH:
            use(s, np.int64(s.entry[row]))
            write_key(s, row)
            at += 1
        elif kind == ADMIT:
            admit(s, row, events[at + 1], events[at + 2], number)
            at += 3
        elif kind == LEAVE:
            leave(s, row)
            at += 1
        elif kind == FOLLOW:
            follow(s, row, events[at + 1], seconds[at + 2], seconds[at + 3])
            at += 4
        elif kind == BEGIN:
            packed = events[at + 3]
            begin(
                s, seconds[at + 1], events[at + 2], np.int64(packed >> np.uint64(8)) - 1, np.int64(packed & byte),
                np.int64(events[at + 4]),
            )  # fmt: skip
            at += 5
        else:
            packed = events[at + 1]
            priority = np.int64(events[at + 4]) - 128
            tell(
                s, row, np.int64(packed >> np.uint64(8)) - 1, np.int64(packed & byte), seconds[at + 2],
                seconds[at + 3], priority,
            )  # fmt: skip
            write_key(s, row)
            at += 5
