"""Kernels of lookups in the directory's hash table. They change nothing but their outputs."""

from __future__ import annotations

import numpy as np

from kvstore.kernels import jit
from kvstore.kernels.directory import (
    BATCH,
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


@jit
def _usable(a: Arrays, copy: Int, worst: Int) -> Int:
    return (
        a.status[(copy >> OWNER_SHIFT) & OWNER_MASK] == STATUS_VISIBLE
        and ((copy >> FIDELITY_SHIFT) & FIDELITY_MASK) <= worst
    )


@jit
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


@jit
def prefix(a: Arrays, keys: Array, table: Int, worst: Int, slots: Array) -> Int:
    """Leading keys held at fidelity `worst` (3 - Fidelity) or better; their slots in `slots`. `keys` int64 [n, 2]."""
    for at in range(len(keys)):
        if at % BATCH == 0:
            ask_for(a, keys, at, min(at + BATCH, len(keys)), table)
        slot = seek(a, keys[at, 0], keys[at, 1], table)
        if slot < 0 or not _held(a, slot, worst):
            return at
        slots[at] = slot
    return len(keys)


@jit
def held(a: Arrays, keys: Array, table: Int, worst: Int, slots: Array, flags: Array) -> None:
    """The slot of every key (-1: none), and 1 in `flags` where it is held."""
    for at in range(len(keys)):
        if at % BATCH == 0:
            ask_for(a, keys, at, min(at + BATCH, len(keys)), table)
        slot = slots[at] = seek(a, keys[at, 0], keys[at, 1], table)
        flags[at] = slot >= 0 and _held(a, slot, worst)


@jit
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


@jit
def spans(a: Arrays, slots: Array, depth: Int, worst: Int, copies: Int, out: Array) -> Int:
    """The usable copies in `slots` (-1: none), whose first is at `depth`, as ranges of one kind each.

    A kind is a copy without its bytes: tier, fidelity, owner. `out` int64 [m, 4] receives kind, first depth, count,
    bytes; the return is how many, or -1 where they do not fit. Per block at most `copies` are looked at, the fastest.
    """
    found = np.empty(copies, np.int64)
    growing = np.empty((copies, 3), np.int64)  # kind, first depth, bytes; rising kinds
    grown = np.empty((copies, 3), np.int64)
    active = done = 0
    for index in range(len(slots) + 1):
        count = 0
        if index < len(slots) and slots[index] >= 0:
            count = gather(a, slots[index], worst, found)
        if done + active > len(out):
            return -1
        at = 0
        for new in range(count):
            kind, nbytes = found[new] >> OWNER_SHIFT, (found[new] & 127) << ((found[new] >> 7) & 31)
            while at < active and growing[at, 0] < kind:
                out[done, 0], out[done, 1], out[done, 3] = growing[at, 0], growing[at, 1], growing[at, 2]
                out[done, 2] = depth + index - growing[at, 1]
                done += 1
                at += 1
            grown[new, 0], grown[new, 1], grown[new, 2] = kind, depth + index, nbytes
            if at < active and growing[at, 0] == kind:
                grown[new, 1], grown[new, 2] = growing[at, 1], growing[at, 2] + nbytes
                at += 1
        while at < active:
            out[done, 0], out[done, 1], out[done, 3] = growing[at, 0], growing[at, 1], growing[at, 2]
            out[done, 2] = depth + index - growing[at, 1]
            done += 1
            at += 1
        growing, grown = grown, growing
        active = count
    return done


@jit
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


@jit
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


@jit
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
