"""Kernels of lookups in the directory's hash table. They change nothing but their outputs."""

from __future__ import annotations

import numpy as np

from kvstore.kernels import jit_borrowing
from kvstore.kernels.directory import (
    AHEAD,
    FIRST,
    FREE_NODE,
    NEXT,
    NODES,
    OWNER_MASK,
    OWNER_SHIFT,
    PAGE_SLOTS,
    PAGES,
    SECOND,
    SLOTS,
    TABLE,
    Array,
    Arrays,
    Int,
    ask_for,
    seek,
)

STATUS_VISIBLE = 1
FIDELITY_SHIFT, FIDELITY_MASK = 28, 3


@jit_borrowing
def _usable(a: Arrays, copy: Int, worst: Int) -> Int:
    return (
        a.status[(copy >> OWNER_SHIFT) & OWNER_MASK] == STATUS_VISIBLE
        and ((copy >> FIDELITY_SHIFT) & FIDELITY_MASK) <= worst
    )


@jit_borrowing
def _held(a: Arrays, slot: Int, worst: Int) -> Int:
    """Whether a slot has a visible copy that is good enough."""
    if _usable(a, np.int64(a.words[slot, FIRST]), worst):
        return True
    copy = np.int64(a.words[slot, SECOND])
    if copy != 0 and _usable(a, copy, worst):
        return True
    node = np.int64(a.words[slot, NEXT])
    while node != 0:
        if _usable(a, np.int64(a.nodes[node, 0]), worst):
            return True
        node = np.int64(a.nodes[node, 1])
    return False


@jit_borrowing
def held(a: Arrays, keys: Array, table: Int, worst: Int, slots: Array, flags: Array) -> None:
    """The slot of every key (-1: none), and 1 in `flags` where it is held."""
    ask_for(a, keys, 0, min(AHEAD, len(keys)), table)
    for at in range(len(keys)):
        ask_for(a, keys, at + AHEAD, min(at + AHEAD + 1, len(keys)), table)
        slot = slots[at] = seek(a, keys[at, 0], keys[at, 1], table)
        flags[at] = slot >= 0 and _held(a, slot, worst)


@jit_borrowing
def gather(a: Arrays, slot: Int, worst: Int, found: Array) -> Int:
    """The usable copies of a slot in rising order, as many as `found` takes; how many."""
    count = 0
    for word in (FIRST, SECOND):
        copy = np.int64(a.words[slot, word])
        if copy != 0 and _usable(a, copy, worst):
            found[count] = copy
            count += 1
    node = np.int64(a.words[slot, NEXT])
    while node != 0 and count < len(found):
        copy = np.int64(a.nodes[node, 0])
        if _usable(a, copy, worst):
            found[count] = copy
            count += 1
        node = np.int64(a.nodes[node, 1])
    return count


@jit_borrowing
def _bytes_of(copy: Int) -> Int:
    return (copy & 127) << ((copy >> 7) & 31)


@jit_borrowing
def _end(work: Array, row: Int, depth: Int, out: Array, done: Int) -> None:
    """The range in a row of `work` ends before `depth`."""
    out[done, 0], out[done, 1], out[done, 3] = work[row, 0], work[row, 1], work[row, 2]
    out[done, 2] = depth - work[row, 1]


@jit_borrowing
def _go_on(found: Array, count: Int, depth: Int, work: Array, old: Int, active: Int, out: Array, done: Int) -> Int:
    """One block more, with `count` copies in `found`: ranges of its kinds go on or begin, the others end.

    Ranges that have not ended are rows of `work` (kind, first depth, bytes; rising kinds): `active` of them from `old`
    on, which is 0 or `len(found)`; afterwards `count` in the other half. How many have ended; -1 where they do not fit.
    """
    if done + active > len(out):
        return -1
    at, new = old, len(found) - old
    for copy in range(count):
        kind = found[copy] >> OWNER_SHIFT
        while at < old + active and work[at, 0] < kind:
            _end(work, at, depth, out, done)
            done += 1
            at += 1
        row = new + copy
        work[row, 0], work[row, 1], work[row, 2] = kind, depth, _bytes_of(found[copy])
        if at < old + active and work[at, 0] == kind:
            work[row, 1] = work[at, 1]
            work[row, 2] += work[at, 2]
            at += 1
    while at < old + active:
        _end(work, at, depth, out, done)
        done += 1
        at += 1
    return done


@jit_borrowing
def spans(a: Arrays, slots: Array, depth: Int, worst: Int, found: Array, work: Array, out: Array) -> Int:
    """The usable copies in `slots` (-1: none), whose first is at `depth`, as ranges of one kind each.

    A kind is a copy without its bytes: tier, fidelity, owner. `out` int64 [m, 4] receives kind, first depth, count,
    bytes; the return is how many, or -1 where they do not fit. Per block at most as many copies as `found` (int64 [c])
    takes are looked at, the fastest. `work` int64 [2 * c, 3].
    """
    old = active = done = 0
    for index in range(len(slots) + 1):
        count = 0
        if index < len(slots) and slots[index] >= 0:
            count = gather(a, slots[index], worst, found)
        done = _go_on(found, count, depth + index, work, old, active, out, done)
        if done < 0:
            return -1
        old, active = len(found) - old, count
    return done


@jit_borrowing
def lookup(a: Arrays, keys: Array, table: Int, worst: Int, found: Array, work: Array, out: Array) -> tuple[Int, Int]:
    """Leading keys held at fidelity `worst` (3 - Fidelity) or better, and their ranges as `spans` has them.

    One pass: a block with the same copies as the one before it (nearly all are) only adds its bytes to the ranges.
    `keys` int64 [n, 2]; `found`, `work`, `out` as in `spans`. The second number is -1 where the ranges do not fit.
    """
    old, active, done = 0, 0, 0
    first, second = np.int64(-1), np.int64(-1)  # kinds of the block before; -1: there is nothing to compare with
    with_first, with_second = False, False  # whether its copies are usable
    blocks = len(keys)
    ask_for(a, keys, 0, min(AHEAD, blocks), table)
    for at in range(len(keys)):
        ask_for(a, keys, at + AHEAD, min(at + AHEAD + 1, len(keys)), table)
        slot = seek(a, keys[at, 0], keys[at, 1], table)
        if slot < 0:
            blocks = at
            break
        one, other = np.int64(a.words[slot, FIRST]), np.int64(a.words[slot, SECOND])
        if one >> OWNER_SHIFT == first and other >> OWNER_SHIFT == second and a.words[slot, NEXT] == 0:
            if with_first:
                work[old, 2] += _bytes_of(one)
            if with_second:
                work[old + active - 1, 2] += _bytes_of(other)
            continue
        count = gather(a, slot, worst, found)
        if count == 0:
            blocks = at
            break
        done = _go_on(found, count, at, work, old, active, out, done)
        if done < 0:
            return at, -1
        old, active, first = len(found) - old, count, np.int64(-1)
        if a.words[slot, NEXT] == 0:
            first, second = one >> OWNER_SHIFT, other >> OWNER_SHIFT
            with_first = _usable(a, one, worst)
            with_second = other != 0 and _usable(a, other, worst)
    return blocks, _go_on(found, 0, blocks, work, old, active, out, done)


@jit_borrowing
def shares(a: Arrays, keys: Array, table: Int, out: Array) -> Int:
    """Per owner of copies of at most 63 keys, visible or not, a bitmap of the keys it has: `out` int64 [m, 2] receives
    (owner, bits). How many; -1 where they do not fit."""
    count = 0
    for at in range(len(keys)):
        slot = seek(a, keys[at, 0], keys[at, 1], table)
        if slot < 0:
            continue
        copy, link = np.int64(a.words[slot, FIRST]), np.int64(-1)
        while copy != 0:
            owner, row = (copy >> OWNER_SHIFT) & OWNER_MASK, 0
            while row < count and out[row, 0] != owner:
                row += 1
            if row == count:
                if count == len(out):
                    return -1
                out[row, 0], out[row, 1] = owner, 0
                count += 1
            out[row, 1] |= np.int64(1) << at
            if link < 0:
                copy, link = np.int64(a.words[slot, SECOND]), np.int64(a.words[slot, NEXT])
            elif link == 0:
                copy = np.int64(0)
            else:
                copy, link = np.int64(a.nodes[link, 0]), np.int64(a.nodes[link, 1])
    return count


@jit_borrowing
def of_owner(a: Arrays, owner: Int, out: Array) -> Int:
    """Every (table, key, copy) of an owner: `out` int64 [m, 4]. How many there are; those that fit are written."""
    count = 0
    for slot in range(a.state[PAGES] * PAGE_SLOTS):
        if a.words[slot, TABLE] == 0:
            continue
        copy, link = np.int64(a.words[slot, FIRST]), np.int64(-1)
        while copy != 0:
            if (copy >> OWNER_SHIFT) & OWNER_MASK == owner:
                if count < len(out):
                    out[count, 0] = np.int64(a.words[slot, TABLE])
                    out[count, 1], out[count, 2], out[count, 3] = a.keys[slot, 0], a.keys[slot, 1], copy
                count += 1
            if link < 0:
                copy, link = np.int64(a.words[slot, SECOND]), np.int64(a.words[slot, NEXT])
            elif link == 0:
                copy = np.int64(0)
            else:
                copy, link = np.int64(a.nodes[link, 0]), np.int64(a.nodes[link, 1])
    return count


@jit_borrowing
def recount(a: Arrays, owned: Array, held: Array, pages: Array) -> Int:
    """Counts everything anew into the outputs (zeroed by the caller). A slot that is wrong, -1 where none is.

    Wrong: not found by its own key, without a copy, or with copies out of order or twice of one owner.
    """
    nodes = 1
    for slot in range(a.state[PAGES] * PAGE_SLOTS):
        table = np.int64(a.words[slot, TABLE])
        if table == 0:
            continue
        if seek(a, a.keys[slot, 0], a.keys[slot, 1], table) != slot or a.words[slot, FIRST] == 0:
            return slot
        held[table] += 1
        pages[slot // PAGE_SLOTS] += 1
        last = np.int64(a.words[slot, FIRST])
        owned[(last >> OWNER_SHIFT) & OWNER_MASK] += 1
        copy, node = np.int64(a.words[slot, SECOND]), np.int64(a.words[slot, NEXT])
        if copy == 0 and node != 0:
            return slot
        while copy != 0:
            if copy <= last:
                return slot
            owned[(copy >> OWNER_SHIFT) & OWNER_MASK] += 1
            last, copy = copy, np.int64(0)
            if node != 0:
                nodes += 1
                copy, node = np.int64(a.nodes[node, 0]), np.int64(a.nodes[node, 1])
    free = a.state[FREE_NODE]
    while free != 0:
        nodes += 1
        free = np.int64(a.nodes[free, 1])
    return -1 if nodes == a.state[NODES] and held.sum() == a.state[SLOTS] else 0
