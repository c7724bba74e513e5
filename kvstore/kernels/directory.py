"""Kernels of the directory's hash table (`kvstore.directory.block_table` owns the arrays and says what they mean).

Extendible hashing (Fagin et al., "Extendible hashing: a fast access method for dynamic files", 1979) over pages of
`PAGE_SLOTS` slots, linear probing within a page: the table grows page by page, in microseconds, and never stands still
to move everything. A slot has 32 bytes, so it never straddles a cache line: the key, the two fastest copies, a link to
further ones, and the number of the table it belongs to (0: free). Copies of a block lie in rising order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.kernels import jit_borrowing
from kvstore.kernels.prefetch import prefetch

PAGE_SLOTS = 1024
SPLIT_AT = PAGE_SLOTS * 7 // 8  # slots in use beyond which a page is split in two
MERGE_AT = PAGE_SLOTS // 3  # slots in use below which two pages become one
DEPTH_MAX = 20
AHEAD = 16  # keys whose slots memory brings while one is looked at

FIRST, SECOND, NEXT, TABLE = 4, 5, 6, 7  # words of a slot, after the key
OWNER_SHIFT, OWNER_MASK = 12, 0xFFFF
STATUS_DEAD = 4
DEPTH, PAGES, FREE_PAGE, NODES, FREE_NODE, SLOTS, DEAD, SEED, SWEPT = range(9)  # fields of `state`
STATE_FIELDS = 9
NEW, REMOVED, REFUSED = range(3)  # fields of what `apply` reports

_MASK = PAGE_SLOTS - 1
_M1, _M2, _M3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_U27, _U31, _U64 = np.uint64(27), np.uint64(31), np.uint64(64)

Array = npt.NDArray[Any]
Int = Any
"""A 64-bit number: Python's outside, numpy's within."""


class Arrays(NamedTuple):
    """Everything the kernels read and write."""

    keys: Array  # int64 [slots, 4]: the key in the first two
    words: Array  # uint32 [slots, 8]: the same memory; copies, link and table in the last four
    nodes: Array  # uint32 [nodes, 2]: copy, link; node 0 is none
    page_of: Array  # int32 [2**DEPTH_MAX]: the first 2**depth name the page of every hash prefix
    pages: Array  # int64 [pages, 3]: depth, slots in use, hash prefix (or the next free page)
    status: Array  # uint8 [owners]
    owned: Array  # int64 [owners]: copies
    held: Array  # int64 [tables]: slots in use
    state: Array  # int64 [STATE_FIELDS]
    page: Array  # int64 [PAGE_SLOTS, 4]: room to take a page apart


@jit_borrowing
def hash_of(first: Int, second: Int, table: Int, seed: Int) -> Int:
    """64 bits of a key and its table, mixed as in SplitMix64."""
    mixed = (np.uint64(first) ^ np.uint64(seed)) * _M1 + np.uint64(second) + np.uint64(table) * _M3
    mixed = (mixed ^ (mixed >> _U31)) * _M2
    mixed = (mixed ^ (mixed >> _U27)) * _M3
    return mixed ^ (mixed >> _U31)


@jit_borrowing
def seek(a: Arrays, first: Int, second: Int, table: Int) -> Int:
    """The slot of a key; where there is none, -1 - the free slot at which the search has ended."""
    mixed = hash_of(first, second, table, a.state[SEED])
    base = np.int64(a.page_of[np.int64(mixed >> (_U64 - np.uint64(a.state[DEPTH])))]) * PAGE_SLOTS
    at = np.int64(mixed) & _MASK
    while True:
        slot = base + at
        held = a.words[slot, TABLE]
        if held == 0:
            return -1 - slot
        if a.keys[slot, 0] == first and a.keys[slot, 1] == second and held == table:
            return slot
        at = (at + 1) & _MASK


@jit_borrowing
def ask_for(a: Arrays, keys: Array, start: Int, stop: Int, table: Int) -> None:
    """Have memory bring the slots where the search for these keys begins."""
    for at in range(start, stop):
        mixed = hash_of(keys[at, 0], keys[at, 1], table, a.state[SEED])
        page = np.int64(a.page_of[np.int64(mixed >> (_U64 - np.uint64(a.state[DEPTH])))])
        prefetch(a.words, page * PAGE_SLOTS + (np.int64(mixed) & _MASK))


@jit_borrowing
def insert(a: Arrays, first: Int, second: Int, table: Int, free: Int) -> Int:
    """A slot for a key that has none, without copies. -1 where nothing can grow any more. `free`: what `seek` found."""
    slot = -1 - free
    page = slot // PAGE_SLOTS
    while a.pages[page, 1] >= SPLIT_AT:
        if not _split(a, page):
            if a.pages[page, 1] >= PAGE_SLOTS - 1:
                return -1
            break
        slot = -1 - seek(a, first, second, table)
        page = slot // PAGE_SLOTS
    a.keys[slot, 0], a.keys[slot, 1] = first, second
    a.words[slot, FIRST] = a.words[slot, SECOND] = a.words[slot, NEXT] = 0
    a.words[slot, TABLE] = table
    a.pages[page, 1] += 1
    a.state[SLOTS] += 1
    a.held[table] += 1
    return slot


@jit_borrowing
def erase(a: Arrays, slot: Int) -> None:
    """Free a slot; those behind it move up (no tombstones)."""
    page, hole = slot // PAGE_SLOTS, slot & _MASK
    base = page * PAGE_SLOTS
    a.held[a.words[slot, TABLE]] -= 1
    a.pages[page, 1] -= 1
    a.state[SLOTS] -= 1
    at = hole
    while True:
        at = (at + 1) & _MASK
        table = a.words[base + at, TABLE]
        if table == 0:
            break
        home = np.int64(hash_of(a.keys[base + at, 0], a.keys[base + at, 1], table, a.state[SEED])) & _MASK
        if ((at - home) & _MASK) >= ((at - hole) & _MASK):
            for word in range(4):
                a.keys[base + hole, word] = a.keys[base + at, word]
            hole = at
    for word in range(4):
        a.keys[base + hole, word] = 0


@jit_borrowing
def _split(a: Arrays, page: Int) -> bool:
    """Two pages of one. False where the depth or the pages are used up."""
    depth = a.pages[page, 0]
    if depth == a.state[DEPTH]:
        if depth == DEPTH_MAX:
            return False
        for at in range((1 << a.state[DEPTH]) - 1, -1, -1):
            a.page_of[2 * at] = a.page_of[2 * at + 1] = a.page_of[at]
        a.state[DEPTH] += 1
    other = a.state[FREE_PAGE]
    if other >= 0:
        a.state[FREE_PAGE] = a.pages[other, 2]
    elif a.state[PAGES] < len(a.pages):
        other = a.state[PAGES]
        a.state[PAGES] += 1
    else:
        return False
    prefix = a.pages[page, 2]
    a.pages[page, 0], a.pages[page, 1], a.pages[page, 2] = depth + 1, 0, 2 * prefix
    a.pages[other, 0], a.pages[other, 1], a.pages[other, 2] = depth + 1, 0, 2 * prefix + 1
    wide = a.state[DEPTH] - depth - 1
    for at in range((2 * prefix + 1) << wide, (2 * prefix + 2) << wide):
        a.page_of[at] = other
    _rehash(a, page)
    return True


@jit_borrowing
def _rehash(a: Arrays, page: Int) -> None:
    """Take everything out of a page and put it where `page_of` says now."""
    base = page * PAGE_SLOTS
    taken = a.page
    for index in range(PAGE_SLOTS):
        for word in range(4):
            taken[index, word] = a.keys[base + index, word]
            a.keys[base + index, word] = 0
    for index in range(PAGE_SLOTS):
        table = np.int64(np.uint64(taken[index, 3]) >> np.uint64(32))
        if table == 0:
            continue
        mixed = hash_of(taken[index, 0], taken[index, 1], table, a.state[SEED])
        to = np.int64(a.page_of[np.int64(mixed >> (_U64 - np.uint64(a.state[DEPTH])))])
        at = np.int64(mixed) & _MASK
        while a.words[to * PAGE_SLOTS + at, TABLE] != 0:
            at = (at + 1) & _MASK
        for word in range(4):
            a.keys[to * PAGE_SLOTS + at, word] = taken[index, word]
        a.pages[to, 1] += 1


@jit_borrowing
def _merge(a: Arrays, page: Int) -> None:
    """Give up the page's sister where both are nearly empty."""
    depth, prefix = a.pages[page, 0], a.pages[page, 2]
    if depth == 0:
        return
    other = np.int64(a.page_of[(prefix ^ 1) << (a.state[DEPTH] - depth)])
    if a.pages[other, 0] != depth or a.pages[other, 1] + a.pages[page, 1] >= MERGE_AT:
        return
    wide = a.state[DEPTH] - depth + 1
    for at in range((prefix >> 1) << wide, ((prefix >> 1) + 1) << wide):
        a.page_of[at] = page
    a.pages[page, 0], a.pages[page, 2] = depth - 1, prefix >> 1
    _rehash(a, other)
    a.pages[other, 0], a.pages[other, 1], a.pages[other, 2] = -1, 0, a.state[FREE_PAGE]
    a.state[FREE_PAGE] = other


@jit_borrowing
def _pop(a: Arrays, slot: Int) -> Int:
    """Take the first of the further copies off a slot, 0 where there is none."""
    node = np.int64(a.words[slot, NEXT])
    if node == 0:
        return 0
    copy = np.int64(a.nodes[node, 0])
    a.words[slot, NEXT] = a.nodes[node, 1]
    a.nodes[node, 1] = a.state[FREE_NODE]
    a.state[FREE_NODE] = node
    return copy


@jit_borrowing
def _gone(a: Arrays, copy: Int, owner: Int) -> Int:
    """2 where the copy is the owner's, 1 where its owner is dead (and then no longer counted), else 0."""
    mine = (copy >> OWNER_SHIFT) & OWNER_MASK
    if mine == owner:
        a.owned[owner] -= 1
        return 2
    if a.status[mine] == STATUS_DEAD:
        a.owned[mine] -= 1
        a.state[DEAD] -= 1
        return 1
    return 0


@jit_borrowing
def take(a: Arrays, slot: Int, owner: Int) -> bool:
    """Take an owner's copy and those of the dead off a slot; whether the owner had one. `owner` 0: only the dead."""
    had = False
    before, node = np.int64(0), np.int64(a.words[slot, NEXT])
    while node != 0:
        after = np.int64(a.nodes[node, 1])
        gone = _gone(a, np.int64(a.nodes[node, 0]), owner)
        if gone:
            had = had or gone == 2
            if before == 0:
                a.words[slot, NEXT] = after
            else:
                a.nodes[before, 1] = after
            a.nodes[node, 1] = a.state[FREE_NODE]
            a.state[FREE_NODE] = node
        else:
            before = node
        node = after
    for word in (SECOND, FIRST):
        copy = np.int64(a.words[slot, word])
        if copy != 0:
            gone = _gone(a, copy, owner)
            if gone:
                had = had or gone == 2
                if word == FIRST:
                    a.words[slot, FIRST] = a.words[slot, SECOND]
                a.words[slot, SECOND] = _pop(a, slot)
    return had


@jit_borrowing
def _give(a: Arrays, slot: Int, copy: Int) -> bool:
    """Put a copy in its place among the others. False where there is no room for one more."""
    node = np.int64(0)
    if a.words[slot, SECOND] != 0:
        node = a.state[FREE_NODE]
        if node != 0:
            a.state[FREE_NODE] = np.int64(a.nodes[node, 1])
        elif a.state[NODES] < len(a.nodes):
            node = a.state[NODES]
            a.state[NODES] += 1
        else:
            return False
    carried = copy
    for word in (FIRST, SECOND):
        there = np.int64(a.words[slot, word])
        if there == 0 or carried < there:
            a.words[slot, word] = carried
            carried = there
            if carried == 0:
                return True
    before, after = np.int64(0), np.int64(a.words[slot, NEXT])
    while after != 0 and np.int64(a.nodes[after, 0]) < carried:
        before, after = after, np.int64(a.nodes[after, 1])
    a.nodes[node, 0], a.nodes[node, 1] = carried, after
    if before == 0:
        a.words[slot, NEXT] = node
    else:
        a.nodes[before, 1] = node
    return True


@jit_borrowing
def _add(a: Arrays, first: Int, second: Int, table: Int, copy: Int, room: Int) -> Int:
    """NEW, REFUSED, or -1 where the owner had the block already and now has it as `copy` says."""
    owner = (copy >> OWNER_SHIFT) & OWNER_MASK
    slot = seek(a, first, second, table)
    had = slot >= 0 and take(a, slot, owner)
    fits = had or room > 0
    if fits and slot < 0:
        slot = insert(a, first, second, table, slot)
        fits = slot >= 0
    if fits and _give(a, slot, copy):
        a.owned[owner] += 1
        return -1 if had else NEW
    if slot >= 0 and a.words[slot, FIRST] == 0:
        erase(a, slot)
    return REFUSED


@jit_borrowing
def apply(a: Arrays, keys: Array, runs: Array, owner: Int, room: Int, report: Array) -> None:
    """Changes of one owner, in order.

    `keys` int64 [n, 2]; `runs` int64 [m, 4]: first key, count, table, copy (0: the owner has them no longer). `report`
    int64 [3] counts copies that are NEW (at most `room`), REMOVED, REFUSED.
    """
    report[:] = 0
    for run in range(len(runs)):
        start, count, table, copy = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        if run == 0:
            ask_for(a, keys, start, start + min(count, AHEAD), table)
        if run + 1 < len(runs):  # memory brings the next run while this one is worked on
            after = runs[run + 1, 0]
            ask_for(a, keys, after, after + min(runs[run + 1, 1], AHEAD), runs[run + 1, 2])
        for at in range(start, start + count):
            ask_for(a, keys, at + AHEAD, min(at + AHEAD + 1, start + count), table)
            if copy != 0:
                done = _add(a, keys[at, 0], keys[at, 1], table, copy, room + report[REMOVED] - report[NEW])
                if done >= 0:
                    report[done] += 1
                continue
            slot = seek(a, keys[at, 0], keys[at, 1], table)
            if slot >= 0:
                report[REMOVED] += take(a, slot, owner)
                if a.words[slot, FIRST] == 0:
                    erase(a, slot)


@jit_borrowing
def sweep(a: Arrays, pages: Int) -> None:
    """Let go of what the dead left in the next `pages` pages, in turn."""
    for _ in range(pages):
        if a.state[DEAD] == 0:
            return
        a.state[SWEPT] = page = (a.state[SWEPT] + 1) % a.state[PAGES]
        if a.pages[page, 1] == 0:
            continue
        slot, stop = page * PAGE_SLOTS, (page + 1) * PAGE_SLOTS
        while slot < stop:
            if a.words[slot, TABLE] != 0:
                take(a, slot, 0)
                if a.words[slot, FIRST] == 0:
                    erase(a, slot)
                    continue  # another one may have moved here
            slot += 1
        _merge(a, page)
